"""The engine, and the plan of it.

Sharded like replicated like alone, activation checkpointing, one graph a block, checkpoints in the
background.
"""

import csv
import json
import os
import resource
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, command, command_line, copy, inside
from safetensors.torch import load_file

import ddm.process
import flow
import model as models
from ddm import artifacts, engine, plan
from ddm import log as logs
from ddm.checkpoint import Checkpoints
from ddm.config import make_config
from ddm.initial import Initial
from ddm.log import Log

# columns of the log that no two runs share
TIMING = ("images_per_s", "mfu", "wait", "memory_gb")

KINDS = {
    "DiT": dict(condition="class", classes=10),
    "MMDiT": dict(condition="text", text_dim=6, length=5, double=2),
}


def small(kind, seed=0):
    torch.manual_seed(seed)
    model = artifacts.build(
        models.ModelConfig(8, 3, dim=32, depth=4, heads=2, patch=2, **KINDS[kind])
    )
    # adaLN-Zero starts as a constant
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def inputs(kind, batch=3):
    torch.manual_seed(1)
    c = torch.randint(0, 10, (batch,)) if kind == "DiT" else torch.randn(batch, 5, 6).half()
    return torch.randn(batch, 3, 8, 8), torch.rand(batch), c


def gradients(model, kind):
    model(*inputs(kind)).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def log(run, name):
    with open(run / "logs" / f"{name}.csv", newline="") as f:
        return list(csv.DictReader(f))


def same_rows(run, other, name, rel=1e-5):
    for one, two in zip(log(run, name), log(other, name), strict=True):
        for column in one.keys() - {"time", "device_hours", *TIMING}:
            near = 1e-2 if column == "grad_norm" else rel
            expected = pytest.approx(float(one[column] or 0), rel=near, abs=1e-5)
            assert float(two[column] or 0) == expected, column


# ---- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["selective", "block"])
def test_activation_checkpointing_changes_no_gradient(kind, mode):
    plain = small(kind)
    forgetful = small(kind)
    engine.prepare_blocks(forgetful, mode)
    for a, b in zip(gradients(plain, kind), gradients(forgetful, kind), strict=True):
        assert torch.equal(a, b)


class Graphs(list):
    """A backend of torch.compile that keeps the graphs it is given, and runs them as they are."""

    def __call__(self, graph, example):
        self.append(graph)
        return graph.forward


@pytest.mark.parametrize("kind, graphs", [("DiT", 1), ("MMDiT", 2)])
@pytest.mark.parametrize("mode", ["none", "selective", "block"])
def test_all_blocks_of_a_kind_share_one_graph_that_is_never_compiled_again(kind, graphs, mode):
    compiled = Graphs()
    torch._dynamo.reset()
    plain = small(kind)
    model = small(kind)
    engine.prepare_blocks(model, mode, compile=True, backend=compiled)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=True)
    for a, b in zip(gradients(plain, kind), gradients(model, kind), strict=True):
        torch.testing.assert_close(a, b)

    # a run: the weights move, and images are sampled in between
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        gradients(model, kind)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(*inputs(kind, batch=7))
    assert len(compiled) == graphs
    assert all(k in dict(plain.named_parameters()) for k, _ in model.named_parameters())


@pytest.mark.parametrize("kind, graphs", [("DiT", 1), ("MMDiT", 2)])
@pytest.mark.parametrize("condition", ["none", "given"])
def test_autocast_compiles_no_more_graphs(kind, graphs, condition):
    compiled = Graphs()
    torch._dynamo.reset()
    model = small(kind)
    engine.prepare_blocks(model, compile=True, backend=compiled)
    x, t, c = inputs(kind)
    if condition == "none":
        c = torch.zeros_like(c)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            model(x, t, c).square().mean().backward()
    assert len(compiled) == graphs


@pytest.fixture
def alone():
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_a_block_in_ddp_is_compiled_whole(alone, mode):
    compiled = Graphs()
    torch._dynamo.reset()
    model = small("DiT")
    engine.prepare_blocks(model, mode, compile=True, backend=compiled)
    # many buckets, at whose ends it would be cut
    replica = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.01)
    gradients(replica, "DiT")
    assert len(compiled) == 1


def test_a_micro_batch_that_leaves_a_rest_is_said_with_its_divisors(capsys):
    for share, micro in ((12, 0), (12, 4), (12, 12), (12, 50)):
        engine.warn_of_rest("expert-0", share, micro)
    assert capsys.readouterr().err == ""
    engine.warn_of_rest("expert-0", 12, 5)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "5 does not divide the 12 images" in said
    assert "has 2" in said
    assert "4 and 6 divide 12" in said
    engine.warn_of_rest("router", 7, 2)
    assert "1 and 7 divide 7" in capsys.readouterr().err


class Made:
    """A training of the small DiT on this process, as the scripts put one together."""

    def __init__(self, folder, make_optimizer=None, **settings):
        config = make_config({f"train.{key}": value for key, value in settings.items()})
        self.train = config.train
        ranks = ddm.process.Ranks(0, 1, torch.device("cpu"))
        model = small("DiT")
        path = str(folder / "initial.safetensors")
        artifacts.save(path, model.config, model.state_dict())
        self.checkpoints = Checkpoints(str(folder), "x", self.train, ranks, {"model": "small"})
        self.engine = engine.Engine(
            "x",
            model.config,
            self.train,
            ranks,
            batch=3,
            initial=Initial(path),
            resumed=self.checkpoints.resumed,
        )
        make_optimizer = make_optimizer or self.adamw
        self.optimizer = make_optimizer(self.engine.model)
        self.log = Log(str(folder), self.engine, config)
        self.checkpoints.resume(self.engine, self.optimizer, self.log)

    def adamw(self, model):
        return torch.optim.AdamW(model.parameters(), self.train.lr, fused=True)

    def step(self, spoil=False):
        """One step on the fixed inputs; spoil: with a gradient that is not finite."""
        gradients(self.engine.model, "DiT")
        if spoil:
            next(self.engine.model.parameters()).grad.fill_(float("nan"))
        norm = self.engine.clip_gradients(self.train.grad_clip)
        optimizers = self.optimizer if isinstance(self.optimizer, list) else [self.optimizer]
        self.engine.optimizer_step(norm, *optimizers)
        self.engine.update_ema(self.train.ema_decay)

    def save(self):
        self.checkpoints.save(self.engine, self.optimizer, self.log)

    def weights(self):
        return {k: p.detach().clone() for k, p in self.engine.model.named_parameters()}

    def ema(self):
        return {k: e.clone() for k, e in self.engine.ema.items()}


def made(folder, make_optimizer=None, **settings):
    return Made(folder, make_optimizer, **settings)


def test_a_compiled_training_warns_of_a_rest_and_an_eager_one_does_not(tmp_path, capsys):
    made(tmp_path, micro_batch=2)
    assert "does not divide" not in capsys.readouterr().err
    made(tmp_path, micro_batch=2, compile="yes")
    assert "train.micro_batch = 2 does not divide the 3 images of a rank" in capsys.readouterr().err


@pytest.mark.parametrize("cached", [False, True])
def test_one_writer_writes_each_checkpoint_as_the_state_was(tmp_path, monkeypatch, cached):
    """cached: as on a GPU, where memory is pinned once and kept; here it cannot be pinned."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    training = made(tmp_path)
    checkpoints = training.checkpoints
    checkpoints.writer.cache_staged_state_dict = cached
    writer = checkpoints.writer
    ema_weights = []
    for _ in range(3):
        training.step()
        ema_weights.append(training.ema())
        training.save()
        # training continues while it is written
        with torch.no_grad():
            next(iter(training.engine.ema.values())).add_(100)
        assert checkpoints.finish_saving() and checkpoints.writer is writer
        next(iter(training.engine.ema.values())).sub_(100)

    # train.keep_last
    names = [os.path.basename(path) for path in checkpoints.folders()]
    assert names == ["step-00000002", "step-00000003"]
    for path, ema in zip(checkpoints.folders(), ema_weights[1:], strict=True):
        found = {"ema": {k: torch.zeros_like(e) for k, e in ema.items()}}
        torch.distributed.checkpoint.load(found, checkpoint_id=path, no_dist=True)
        assert all(torch.equal(found["ema"][k], e) for k, e in ema.items())


# ---- gradients that are not finite, whatever the optimiser ---------------------------------------


def muon_and_adamw(model):
    """torch's Muon for the blocks' matrices, AdamW for the rest."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(rest, 0.01)]


OPTIMIZERS = {
    "AdamW, fused": lambda model: torch.optim.AdamW(model.parameters(), 0.01, fused=True),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), 0.01),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), 0.01),
    "SGD, momentum": lambda model: torch.optim.SGD(model.parameters(), 0.01, momentum=0.9),
    "Muon": muon_and_adamw,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_is_skipped_by_any_optimiser(tmp_path, name):
    training = made(tmp_path / "with", OPTIMIZERS[name])
    without = made(tmp_path / "without", OPTIMIZERS[name])
    for spoil in (False, True, True, False):
        before = training.weights()
        training.step(spoil)
        moved = any(not torch.equal(p, before[k]) for k, p in training.weights().items())
        assert moved != spoil
    assert training.engine.nonfinite.tolist() == [0, 2, 2]

    # as if the two steps had not been, momentum and all
    for _ in range(2):
        without.step()
    for k, p in without.weights().items():
        assert torch.equal(p, training.weights()[k])


def test_weights_that_no_optimiser_has_keep_no_gradient(tmp_path):
    """Else it would grow from step to step, and with it the norm by which all are clipped."""
    training = made(tmp_path, lambda model: torch.optim.SGD(model.head.parameters(), 0.01))
    training.step()
    assert all(p.grad is None for p in training.engine.model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimiser_resumes_with_the_same_bits(tmp_path, name):
    training = made(tmp_path, OPTIMIZERS[name])
    for _ in range(2):
        training.step()
    training.save()
    assert training.checkpoints.finish_saving()
    again = made(tmp_path, OPTIMIZERS[name])
    assert again.checkpoints.resumed and again.engine.step == 2
    for each in (training, again):
        each.step()
    for k, p in training.weights().items():
        assert torch.equal(p, again.weights()[k])


# ---- samples while training ----------------------------------------------------------------------


class Stub:
    """Stands for a Space of pixels, and for data: each sample is of class 3."""

    channels, size, info = 3, 8, {"autoencoder": {"name": ""}}

    def __getitem__(self, i):
        numbers = {"u": 0.0, "drop": 0.0, "k": 0, "bad": []}
        return {"c": torch.tensor(3), "x": torch.zeros(3, 8, 8), **numbers}

    def images(self, x):
        return torch.zeros(len(x), self.size, self.size, 3, dtype=torch.uint8)


LACKING = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    MemoryError(),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 9 bytes"
    ),
]


def sampled(training, folder):
    config = make_config({})
    logs.save_samples(
        training.engine, config, Stub(), Stub(), folder / "samples", solver_steps=2
    )


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


@pytest.mark.parametrize("error", LACKING, ids=range(4))
@pytest.mark.parametrize("where", ["decoding", "the model", "the conditions"])
def test_memory_that_samples_lack_is_a_warning_and_changes_no_weight(
    tmp_path, monkeypatch, capsys, where, error
):
    training = made(tmp_path)
    training.step()
    weights = training.weights()
    ema = training.ema()
    if where == "the model":
        monkeypatch.setattr("flow.predict_velocity", raising(error))
    elif where == "decoding":
        monkeypatch.setattr(Stub, "images", raising(error))
    else:
        monkeypatch.setattr(Stub, "__getitem__", raising(error))

    sampled(training, tmp_path)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("warning: the samples could not be made (")
    assert "training goes on" in said
    assert not os.path.exists(tmp_path / "samples")
    assert all(torch.equal(p, weights[k]) for k, p in training.weights().items())
    assert all(torch.equal(e, ema[k]) for k, e in training.ema().items())
    monkeypatch.undo()
    sampled(training, tmp_path)
    assert os.listdir(tmp_path / "samples") == ["x-00000001.png"]


def test_another_error_of_samples_ends_training_with_the_weights_in_place(tmp_path, monkeypatch):
    training = made(tmp_path)
    training.step()
    before = training.weights()
    monkeypatch.setattr("flow.predict_velocity", raising(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes"):
        sampled(training, tmp_path)
    assert all(torch.equal(p, before[k]) for k, p in training.weights().items())


def test_sharded_ranks_agree_before_the_model_and_fail_within_it(tmp_path, monkeypatch):
    """As if this rank were of a sharded training: another one's lack of memory is this one's, too;
    within the model nobody may leave alone.
    """
    training = made(tmp_path)
    training.engine.sharded = True
    monkeypatch.setattr(logs, "gather", lambda reasons: [reasons, ["out of memory"]])
    monkeypatch.setattr("flow.predict_velocity", raising(AssertionError("is not called")))
    sampled(training, tmp_path)
    monkeypatch.setattr(logs, "gather", lambda reasons: [reasons, []])
    monkeypatch.setattr("flow.predict_velocity", raising(LACKING[0]))
    with pytest.raises(torch.OutOfMemoryError):
        sampled(training, tmp_path)


def test_no_more_is_sampled_at_once_than_a_micro_batch(tmp_path, monkeypatch):
    training = made(tmp_path, micro_batch=3)
    sizes = []
    plain = flow.predict_velocity

    def noting(model, x, *rest):
        sizes.append(len(x))
        return plain(model, x, *rest)

    monkeypatch.setattr(flow, "predict_velocity", noting)
    x = torch.randn(16, 3, 8, 8)
    c = torch.arange(16) % 10
    config = make_config({})
    some = logs.sample_ema(training.engine, config, Stub(), x, c, 2)
    assert set(sizes) == {3, 1} and some.shape == x.shape
    training.train.micro_batch = 0
    training.engine.batch = 16
    all_at_once = logs.sample_ema(training.engine, config, Stub(), x, c, 2)
    torch.testing.assert_close(all_at_once, some, rtol=1e-4, atol=1e-5)
    assert max(sizes) == 16


# ---- the EMA weights -----------------------------------------------------------------------------


def test_ema_weights_are_the_formula_s_and_swapping_them_twice_changes_nothing(tmp_path):
    training = made(tmp_path, lr=0.01, ema_decay=0.5, grad_clip=0.0)
    expected = training.ema()
    for n in range(1, 4):
        training.step()
        decay = min(0.5, (1 + n) / (10 + n))
        for k, p in training.weights().items():
            expected[k] = decay * expected[k] + (1 - decay) * p
    for k, e in training.ema().items():
        torch.testing.assert_close(e, expected[k])

    before = training.weights()
    training.engine.swap_ema()
    for k, p in training.weights().items():
        torch.testing.assert_close(p, expected[k])
    assert any((p - before[k]).abs().max() > 1e-3 for k, p in training.weights().items())
    training.engine.swap_ema()
    assert all(torch.equal(p, before[k]) for k, p in training.weights().items())


def test_sharded_ema_weights_are_the_formula_s_also_after_a_resume(alone, tmp_path, monkeypatch):
    """Their parts are taken once: they must be those that the optimiser moves, whatever loading and
    the first forward pass did to them.
    """
    monkeypatch.setattr(plan, "choose_parallel", lambda *_: (True, ""))

    def steps(training, count):
        expected = {k: e.full_tensor().clone() for k, e in training.engine.ema.items()}
        for _ in range(count):
            training.step()
            decay = min(0.5, (1 + training.engine.step) / (10 + training.engine.step))
            for k, p in training.engine.model.named_parameters():
                expected[k] = decay * expected[k] + (1 - decay) * p.full_tensor().detach()
        for k, e in training.engine.ema.items():
            torch.testing.assert_close(e.full_tensor(), expected[k])
        return expected

    settings = {"ema_decay": 0.5, "lr": 0.01}
    training = made(tmp_path, **settings)
    for p in training.engine.model.parameters():
        assert isinstance(p, torch.distributed.tensor.DTensor)
    steps(training, 2)
    sampled(training, tmp_path)
    last = steps(training, 1)
    training.save()
    assert training.checkpoints.finish_saving()

    again = made(tmp_path, **settings)
    assert again.checkpoints.resumed
    for k, e in again.engine.ema.items():
        assert torch.equal(e.full_tensor(), training.engine.ema[k].full_tensor())
    assert any((e - last[k]).abs().max() > 1e-4 for k, e in steps(again, 3).items())
    parts = [
        [e.to_local().data_ptr() for e in again.engine.ema.values()],
        [p.to_local().data_ptr() for p in again.engine.model.parameters()],
    ]
    assert [[part.data_ptr() for part in side] for side in again.engine.pairs] == parts


def test_a_checkpoint_holds_the_moment_it_was_made_while_training_continues(tmp_path):
    training = made(tmp_path)
    training.step()
    weights = training.weights()
    ema = training.ema()
    training.save()
    model = training.engine.model.parameters()
    with torch.no_grad():
        for p, e in zip(model, training.engine.ema.values(), strict=True):
            p += 1
            e += 1
    training.checkpoints.finish_saving()
    again = made(tmp_path)
    assert again.checkpoints.resumed and again.engine.step == 1
    assert all(torch.equal(p, weights[k]) for k, p in again.weights().items())
    assert all(torch.equal(e, ema[k]) for k, e in again.ema().items())


# ---- ranks ---------------------------------------------------------------------------------------


# a monolith of one double block and another one
MMDIT = ["--shard", "all", "--model.double", 1, "--model.depth", 2]


@pytest.fixture(scope="module")
def mmdit(clustered, tmp_path_factory):
    """An MMDiT trained as the monolith by one process. Do not change it, copy it."""
    run = copy(clustered, tmp_path_factory.mktemp("mmdit"))
    command("train_expert.py", "--run-dir", run, *MMDIT)
    return run


def same_weights(run, other):
    """The monolith's, but for the order of sums."""
    one = load_file(run / "experts" / "all.safetensors")
    two = load_file(other / "experts" / "all.safetensors")
    assert one.keys() == two.keys()
    assert all((one[k] - two[k]).abs().max() < 2e-4 for k in one)


@pytest.mark.parametrize(
    "flags", [[], ["--train.micro_batch", 6, "--train.activation_checkpointing", "selective"]]
)
def test_sharded_training_gives_the_losses_and_the_ema_of_one_process(
    clustered, mmdit, tmp_path, flags
):
    run = copy(clustered, tmp_path)
    flags = [*MMDIT, "--train.parallel", "fsdp", *flags]
    done = command("train_expert.py", "--run-dir", run, *flags, ranks=2)
    assert "sharded (FSDP2) over 2 ranks" in done.stdout
    same_rows(mmdit, run, "expert-all")
    same_weights(mmdit, run)
    assert os.path.exists(run / "samples" / "expert-all-00000006.png")


def test_sharded_training_in_bf16_follows_one_process_in_bf16(clustered, tmp_path):
    """To bf16's rounding: FSDP's gathered weights are bf16 where autocast would leave fp32.

    Images are sampled as well.
    """
    flags = [*MMDIT, "--train.precision", "bf16"]
    one = copy(clustered, tmp_path / "a")
    two = copy(clustered, tmp_path / "b")
    command("train_expert.py", "--run-dir", one, *flags)
    command("train_expert.py", "--run-dir", two, *flags, "--train.parallel", "fsdp", ranks=2)
    for a, b in zip(log(one, "expert-all"), log(two, "expert-all"), strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=0.02)
    assert os.path.exists(two / "samples" / "expert-all-00000006.png")


def test_replicated_or_sharded_is_chosen_by_the_estimate_and_replicas_give_the_same(
    clustered, mmdit, tmp_path
):
    run = copy(clustered, tmp_path)
    done = command("train_expert.py", "--run-dir", run, *MMDIT, ranks=2)
    assert "replicated (DDP) over 2 ranks, train.parallel = 'auto'" in done.stdout
    assert "GB a rank replicated" in done.stdout
    same_rows(mmdit, run, "expert-all")


def test_a_sharded_training_resumes_with_one_rank_and_sharded_again(clustered, mmdit, tmp_path):
    """2 -> 1 -> 2 ranks; moments and EMA weights are resharded as they are loaded."""
    run = copy(clustered, tmp_path)
    flags = ["--run-dir", run, *MMDIT]
    sharded = ["--train.parallel", "fsdp"]
    command("train_expert.py", *flags, "--train.steps", 2, *sharded, ranks=2)
    done = command("train_expert.py", *flags, "--train.steps", 4)
    assert "resumed at step 2" in done.stdout
    done = command("train_expert.py", *flags, *sharded, ranks=2)
    assert "resumed at step 4" in done.stdout
    same_rows(mmdit, run, "expert-all")
    same_weights(mmdit, run)


TRACED = """
import functools, os, sys
sys.path.insert(0, os.getcwd())
import train_expert
from ddm import engine, errors
engine.prepare_blocks = functools.partial(engine.prepare_blocks, backend="aot_eager")
errors.script(train_expert.main)
"""


def test_compiled_blocks_train_sharded(clustered, mmdit, tmp_path):
    """The graphs run as they are traced: no C++ compiler is needed for this."""
    run = copy(clustered, tmp_path)
    script = tmp_path / "traced.py"
    script.write_text(TRACED)
    flags = ["--train.parallel", "fsdp", "--train.compile", "yes"]
    flags += ["--train.activation_checkpointing", "block"]
    command(script, "--run-dir", run, *MMDIT, *flags, ranks=2)
    same_rows(mmdit, run, "expert-all", rel=1e-4)


def limit_file_size():
    """To 300 KB: the model's file is smaller, a checkpoint larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_the_former_one_is_used(
    clustered, tmp_path
):
    run = copy(clustered, tmp_path)
    flags = ["--run-dir", run, "--shard", 0, "--train.save_every", 2, "--data.workers", 0]
    command("train_expert.py", *flags, "--train.steps", 2)
    done = subprocess.run(
        command_line("train_expert.py", *flags),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=limit_file_size,
    )
    assert done.returncode == 2
    assert "checkpoint of step 6 could not be written" in done.stderr.splitlines()[-1]
    assert "checkpoint of step 4 could not be written" in done.stderr
    assert "training goes on" in done.stderr
    assert "resumed at step 2" in command("train_expert.py", *flags).stdout


# ---- the log -------------------------------------------------------------------------------------


def test_a_profile_is_a_trace_and_the_log_has_speed_and_memory(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    command("train_expert.py", "--run-dir", run, "--shard", 0, "--profile")
    trace = json.loads((run / "logs" / "expert-0.trace.json").read_text())
    assert any("addmm" in event.get("name", "") for event in trace["traceEvents"])
    for row in log(run, "expert-0"):
        assert 0 <= float(row["wait"]) <= 1
        assert float(row["memory_gb"]) > 0.05
        assert float(row["images_per_s"]) > 0
        # of a CPU no peak is known
        assert row["mfu"] == ""


@pytest.mark.parametrize(
    "name, bf16, tflops",
    [
        ("NVIDIA H100 80GB HBM3", True, 989),
        ("NVIDIA H100 PCIe", True, 756),
        ("NVIDIA H200", False, 495),
        ("NVIDIA A100-SXM4-80GB", True, 312),
        ("NVIDIA GeForce RTX 4090", True, 165),
        ("NVIDIA L40S", True, 362),
        ("Voodoo 3", True, None),
        ("NVIDIA GH200 480GB", True, 989),
    ],
)
def test_peak_rates_are_found_by_the_names_that_devices_give_themselves(name, bf16, tflops):
    assert plan.peak_flops(name, bf16) == (tflops and tflops * 1e12)


# ---- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bf16", [False, True])
def test_the_plan_counts_what_a_real_forward_pass_keeps(kind, bf16):
    model = small(kind)
    storages = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        out = model(*inputs(kind))
    counted = plan.kept(model.config, 3, bf16)
    kept = sum(s.nbytes() for s in storages.values())
    assert out.requires_grad
    assert counted["none"] == pytest.approx(kept, rel=0.02)


def test_selective_checkpointing_keeps_products_and_block_checkpointing_what_enters():
    """By hand, for a deep DiT in fp32.

    adaLN 6 D; q, k, v, attention, projection and both layers of the MLP 3 + 1 + 1 + 4 + 1 of N D.
    """
    config = models.ModelConfig(16, 3, dim=64, depth=24, heads=2, patch=2)
    image = plan.Memory(config, bf16=False).image
    N = 64
    D = 64
    products = 4 * 24 * (10 * N * D + 6 * D + 2 * N)
    assert image["selective"] - image["block"] == pytest.approx(products, rel=0.02)
    assert image["block"] < image["selective"] < image["none"]
    inputs_and_a_block = 4 * 24 * N * D + image["none"] / 24
    assert image["block"] == pytest.approx(inputs_and_a_block, rel=0.1)


def test_memory_by_hand_replicated_and_sharded():
    need_config = small("DiT").config
    need = plan.Memory(need_config, bf16=False)
    P = sum(p.numel() for p in small("DiT").parameters())
    assert need.parameters == P
    assert need.casts == 0
    # weights, gradients, two moments, EMA weights
    assert sum(need.fixed(False, 8, False).values()) == 20 * P

    sharded = need.fixed(True, 8, False)
    assert sum(sharded.values()) - sharded["copies"] == 20 * P / 8
    assert need.fixed(True, 8, True)["gradients"] == 4 * P
    room = need.total(False, 1, 4, True, "none") / plan.USABLE
    assert need.micro_batch(False, 1, 12, "none", room) == 4
    assert need.micro_batch(False, 1, 12, "none", 10 * P) == 0

    # two replicas: the first micro-batch of all has gradients beside DDP's buckets
    assert need.fixed(False, 2, True)["gradients"] == 8 * P
    assert need.fixed(False, 1, True)["gradients"] == 4 * P
    room = need.total(False, 2, 4, True, "none") / plan.USABLE
    tight = SimpleNamespace(micro_batch=4, activation_checkpointing="none", parallel="auto")
    assert not need.shards(tight, 2, 12, room)
    assert need.shards(tight, 2, 12, 0.9 * room)

    # no room beside teachers
    assert plan.Memory(need_config, False, beside=room).shards(tight, 2, 12, room)


def test_frozen_networks_are_planned_for_and_work_before_the_model_does():
    sdxl = "openai/clip-vit-large-patch14 + laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
    config = make_config({"autoencoder.name": "stabilityai/sd-vae-ft-mse", "text.name": sdxl})
    weights, work, unknown = plan.frozen(config, bf16=True)
    vae = 83_653_863
    encoders = 123_060_480 + 693_021_440
    assert weights == 4 * vae + 2 * encoders
    assert 1e9 < work < 4e9
    assert not unknown
    config.text.precision = "fp32"
    assert plan.frozen(config, bf16=True)[0] == 4 * (vae + encoders)
    config.data.condition = "class"
    config.autoencoder.name = ""
    assert plan.frozen(config, bf16=True) == (0, 0, "")

    shape = small("DiT").config
    plain = plan.Memory(shape, False)
    beside = plan.Memory(shape, False, beside=1000, work=10**9)
    fixed = 20 * plain.parameters
    assert beside.total(False, 1, 1, False, "none") == 1000 + fixed + 10**9
    # so many images take more than it
    many = -(-(10**9) // plain.image["none"])
    alone = plain.total(False, 1, many, False, "none")
    assert beside.total(False, 1, many, False, "none") == 1000 + alone


@pytest.mark.slow
def test_frozen_networks_of_a_folder_are_counted_by_their_configs(networks):
    import diffusers
    import transformers

    names = {
        "autoencoder.name": str(networks / "vae"),
        "text.name": f"{networks / 'clip'} + {networks / 't5'} + {networks / 'bart'}",
    }
    config = make_config(names)
    classes = {
        "clip": transformers.CLIPTextModel,
        "t5": transformers.T5EncoderModel,
        "bart": transformers.BartModel,
    }
    loaded = {name: kind.from_pretrained(networks / name) for name, kind in classes.items()}
    loaded["bart"] = loaded["bart"].get_encoder()
    vae = plan.parameters(diffusers.AutoencoderKL.from_pretrained(networks / "vae"))
    encoders = sum(plan.parameters(network) for network in loaded.values())
    assert plan.frozen(config, bf16=True)[0] == 4 * vae + 2 * encoders

    # a CLIP of both halves: its text half
    config.text.name = str(networks / "clip-image")
    half = transformers.CLIPTextModel.from_pretrained(networks / "clip-image")
    assert plan.frozen(config, bf16=True)[0] == 4 * vae + 2 * plan.parameters(half)
    config.text.name = "nobody/knows-this"
    weights, _, unknown = plan.frozen(config, bf16=True)
    assert weights == 0
    assert "nobody/knows-this" in unknown


def test_as_many_teachers_as_fit_beside_the_training():
    need = plan.Memory(small("DiT").config, False)
    train = SimpleNamespace(micro_batch=0, activation_checkpointing="none", parallel="auto")
    sizes = [100_000] * 8
    alone = need.configured(False, train, 2, 4)

    def teachers(room):
        return need.teachers(train, 2, 4, sizes, (room + 1) / plan.USABLE)

    for fits in (1, 3, 8):
        assert teachers(alone + fits * 100_000) == fits
    assert need.teachers(train, 2, 4, sizes, 10**12) == 8

    # no replica would leave room for one
    sharded = need.configured(True, train, 2, 4)
    assert sharded < alone
    assert teachers(sharded + 200_000) == 2
    assert teachers(0) == 1

    assert plan.how_many([30, 10, 20], 50) == 2
    assert plan.how_many([30, 10, 20], 60) == 3
    assert plan.how_many([30], 0) == 1


def test_ranks_share_their_own_machine_s_cores_and_memory(monkeypatch):
    cpu = torch.device("cpu")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ddm.process.local_world() == 1
    whole = plan.device_memory(cpu)
    # a launcher that does not say it
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert ddm.process.local_world() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert ddm.process.local_world() == 8
    assert plan.device_memory(cpu) == whole // 8


def test_the_plan_of_the_3b_config_says_memory_time_and_what_the_paper_s_step_implies():
    config = os.path.join(ROOT, "configs", "laion-3b.toml")
    flags = ["--plan", config, "--plan.gpus", 16, "--plan.step_seconds", 0.28]
    done = inside("train_expert.py", "--shard", 0, *flags)
    assert done.returncode == 0, done.stderr

    condition = dict(condition="text", text_dim=2048, length=128)
    shape = models.ModelConfig(32, 4, **condition, **models.PRESETS["MMDiT-3B/2"])
    image = 3 * plan.flops(shape)
    mfu = 256 * image / (16 * 989e12 * 0.28)
    assert f"{image / 1e12:.4g} TFLOPs" in done.stdout
    assert f"an MFU of {mfu:.1%}" in done.stdout
    assert "3.2 days" in done.stdout
    assert "FSDP2" in done.stdout
    assert "DDP" in done.stdout

    # the autoencoder in fp32, T5's encoder in bf16; weights, moments and EMA weights, once a GPU
    frozen = 4 * 83_653_863 + 2 * 1_223_527_424
    pinned = 16 * plan.parameter_count(shape)
    assert f"{frozen / 1e9:.3g} GB for frozen networks" in done.stdout
    assert f"copied to {pinned / 1e9:.3g} GB of pinned memory" in done.stdout


def test_plans_of_a_run_train_nothing(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    for script, flags in (
        ("train_expert.py", ["--shard", 0]),
        ("train_router.py", []),
        ("distill.py", []),
    ):
        done = inside(script, "--run-dir", run, *flags, "--plan", "--plan.gpus", 1)
        assert done.returncode == 0, done.stderr
        assert "images/s" in done.stdout, done.stderr
        assert "micro-batch" in done.stdout, done.stderr
    assert not (run / "checkpoints").exists()
    done = inside("train_expert.py", "--run-dir", run, "--shard", 0, "--plan", "--plan.gpus", 3)
    assert done.returncode == 2
    assert "a batch of 8 cannot be shared by 3 GPUs" in done.stderr
