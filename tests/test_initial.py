"""The seed phase (train.seed_steps), and --init.

The run is conftest's, of 12 steps, of which a seed makes the first 4.
"""
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from conftest import (
    ENVIRONMENT,
    ROOT,
    command,
    command_line,
    copy,
    inside,
    pictures,
    rewrite,
    sample,
    signalled_at,
    works,
)
from safetensors.torch import load_file, save_file
from test_evaluate import FEW, ratio_in, results
from test_mistakes import refused
from test_pipeline import rows, same_tensors

from ddm import artifacts, loading, plan, report

SEED_STEPS = 4
STEPS = 12
# the seed's and the monolith's, and each of three experts' share
BATCH = 24
SHARE = 8
LR = 1e-3
WARMUP = 3
DECAY = 4
SCHEDULE = ["--train.seed_steps", SEED_STEPS, "--train.steps", STEPS, "--train.warmup", WARMUP,
            "--train.decay", DECAY, "--train.log_every", 1]
# where a training runs in this process
ALONE = ["--data.workers", 0, "--device", "cpu"]
NOT_SEEDED = ["--train.seed_steps", 0]


@pytest.fixture(scope="module")
def prepared(tars, config, tmp_path_factory):
    """A run with train.seed_steps after stage 1. Do not change it, copy it."""
    run = tmp_path_factory.mktemp("prepared") / "run"
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", run, "--config", config,
            *SCHEDULE)
    return run


@pytest.fixture(scope="module")
def seeded(prepared, tmp_path_factory):
    """The same run after stage 3, its monolith included. Do not change it, copy it."""
    run = copy(prepared, tmp_path_factory.mktemp("seeded"))
    for shard in ("seed", 0, 1, 2, "all"):
        command("train_expert.py", "--run-dir", run, "--shard", shard)
    command("train_router.py", "--run-dir", run)
    return run


@pytest.fixture(scope="module")
def student(seeded, tmp_path_factory):
    """The file of a student that began with random weights."""
    run = copy(seeded, tmp_path_factory.mktemp("student"))
    done = inside("distill.py", "--run-dir", run, "--train.steps", 1, *ALONE)
    assert done.returncode == 0, done.stderr
    return run / "student.safetensors"


def model_of(run, shard):
    return run / "experts" / f"{shard}.safetensors"


def bring_seed(prepared, seeded, tmp_path):
    """A copy of the run before stage 2, to which its seed has been brought."""
    run = copy(prepared, tmp_path)
    os.mkdir(run / "experts")
    shutil.copy(model_of(seeded, "seed"), run / "experts")
    return run


def train(run, shard, *flags):
    """Trains in this process."""
    done = inside("train_expert.py", "--run-dir", run, "--shard", shard, *ALONE, *flags)
    assert done.returncode == 0, done.stderr
    return done


def ema_of(path):
    """The EMA weights of a model's file, which are not those named raw.NAME."""
    tensors = load_file(path)
    return {name: tensors[name] for name in tensors if not name.startswith(artifacts.RAW)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a, b):
    """The largest difference of two models' weights."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def begun_with(path):
    """What a checkpoint remembers of a file that its training began with."""
    return sha256_of(path)[:12]


# ---- the seed, and what goes on from it ----------------------------------------------------------

def test_a_seed_s_file_has_both_weights_and_its_cost(seeded):
    model, info = artifacts.load(model_of(seeded, "seed"))
    ema = ema_of(model_of(seeded, "seed"))
    raw = artifacts.load_raw(model_of(seeded, "seed"))
    # what is loaded is the EMA weights
    assert same(model.state_dict(), ema)
    assert distance(raw, ema) > 1e-4
    assert {tensor.dtype for tensor in raw.values()} == {torch.float32}
    assert info["shard"] == "seed" and info["raw"] is True
    assert info["step"] == SEED_STEPS
    assert info["images"] == SEED_STEPS * BATCH
    assert info["flops"] == 3 * plan.flops(model.config) * SEED_STEPS * BATCH
    assert (info["init"], info["init_images"], info["init_flops"]) == ("", 0, 0)


def test_a_seed_s_file_is_not_rounded_and_is_written_again(seeded, tmp_path):
    run = copy(seeded, tmp_path)
    path = model_of(run, "seed")
    whole = path.read_bytes()
    os.remove(path)
    train(run, "seed", "--train.export", "bf16")
    assert path.read_bytes() == whole


def test_an_expert_s_file_says_which_seed_it_began_with(seeded):
    seed = artifacts.read_info(model_of(seeded, "seed"))
    for shard, batch in ((0, SHARE), (1, SHARE), (2, SHARE), ("all", BATCH)):
        info = artifacts.read_info(model_of(seeded, shard))
        assert not artifacts.load_raw(model_of(seeded, shard))
        assert info["step"] == STEPS
        # its own steps alone
        assert info["images"] == (STEPS - SEED_STEPS) * batch
        assert info["flops"] == info["images"] * seed["flops"] // seed["images"]
        last = rows(seeded, f"expert-{shard}")[-1]
        assert (last["images"], last["flops"]) == (str(info["images"]), str(info["flops"]))
        assert info["init"] == sha256_of(model_of(seeded, "seed"))
        assert info["init_shard"] == "seed"
        assert info["init_images"] == seed["images"]
        assert info["init_flops"] == seed["flops"]


def test_one_expert_with_a_seed_is_the_monolith(tars, config, tmp_path):
    run = tmp_path / "run"
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", run, "--config", config,
            "--experts", 1, *SCHEDULE)
    for shard in ("seed", 0, "all"):
        train(run, shard)
    assert same_tensors(model_of(run, 0), model_of(run, "all"))
    assert rows(run, "expert-0") == rows(run, "expert-all")
    assert rows(run, "expert-0")[0]["step"] == str(SEED_STEPS + 1)


# ends itself at the beginning of a step, with a signal
ENDS = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
import train_expert
from ddm import errors

number = int(sys.argv.pop(1))
last = int(sys.argv.pop(1))
learning_rate = train_expert.learning_rate

def end(train, step, first_step):
    if step == last:
        os.kill(os.getpid(), number)
    return learning_rate(train, step, first_step)

train_expert.learning_rate = end
errors.script(train_expert.main)
"""


@pytest.fixture
def ends(tmp_path):
    """A train_expert.py that takes a signal and a step, and ends itself there."""
    script = tmp_path / "ends.py"
    script.write_text(ENDS)
    return script


@pytest.mark.parametrize("how, save_every", [(signal.SIGKILL, 1), (signal.SIGTERM, 1000)])
def test_a_seed_and_its_expert_resume_to_the_same_bits(prepared, seeded, ends, tmp_path, how,
                                                       save_every):
    """Both stopped in the midst; the expert goes on from the seed that was; the logs, too."""
    run = copy(prepared, tmp_path)
    for shard, last, steps in (("seed", 2, SEED_STEPS), (1, SEED_STEPS + 4, STEPS)):
        name = f"expert-{shard}"
        flags = ["--run-dir", run, "--shard", shard, "--data.workers", 0]
        # SIGTERM: the step in which it comes is made, and the next one, which notices it
        at = last if how == signal.SIGKILL else last - 1
        done = command(ends, int(how), at, *flags, "--train.save_every", save_every, check=False)
        said = (run / "checkpoints" / name / "status").read_text()
        assert said.startswith("to be continued")
        if how == signal.SIGKILL:
            assert done.returncode == -signal.SIGKILL, done.stderr
            # the newest checkpoint may not have been whole yet
            may_be = (last - 1, last)
        else:
            assert done.returncode == 128 + signal.SIGTERM, done.stderr
            assert f"stopped by a signal, saved at step {last + 1};" in done.stdout
            may_be = (last + 1,)
        assert artifacts.read_info(model_of(run, shard))["step"] < steps

        done = command("train_expert.py", *flags)
        assert int(re.search(r"resumed at step (\d+)", done.stdout)[1]) in may_be
        assert model_of(run, shard).read_bytes() == model_of(seeded, shard).read_bytes()
        assert rows(run, name) == rows(seeded, name)


def train_alone(run, shard):
    """Trains in a process that has no network, where that is possible."""
    unshare = ["unshare", "-rn"] if works("unshare", "-rn", "true") else []
    line = [*unshare, *command_line("train_expert.py", "--run-dir", run, "--shard", shard)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


def node(prepared, folder, shard):
    """What a node gets: the config, the clusters, and a single shard's folder."""
    for part in ("config.toml", "clusters.safetensors"):
        os.makedirs(folder, exist_ok=True)
        shutil.copy(prepared / part, folder)
    shutil.copytree(prepared / "shards" / shard, folder / "shards" / shard)
    return folder


def test_a_seed_needs_its_folder_and_an_expert_the_seed(prepared, seeded, tmp_path):
    first = node(prepared, tmp_path / "first", "router")
    train_alone(first, "seed")
    assert model_of(first, "seed").read_bytes() == model_of(seeded, "seed").read_bytes()

    second = node(prepared, tmp_path / "second", "2")
    os.mkdir(second / "experts")
    shutil.copy(model_of(first, "seed"), second / "experts")
    train_alone(second, 2)
    assert model_of(second, 2).read_bytes() == model_of(seeded, 2).read_bytes()


@pytest.mark.parametrize("shard", [0, "all"])
def test_training_begins_with_the_seed_s_raw_and_ema_weights(prepared, seeded, tmp_path, shard):
    """With a learning rate of 0: EMA weights go from the seed's towards its raw weights."""
    run = bring_seed(prepared, seeded, tmp_path)
    flags = ["--train.lr", 0, "--train.steps", SEED_STEPS + 2]
    done = train(run, shard, *flags)
    assert f"from the seed's step {SEED_STEPS}" in done.stdout

    raw = artifacts.load_raw(model_of(seeded, "seed"))
    meant = ema_of(model_of(seeded, "seed"))
    began = distance(raw, meant)
    for n in (SEED_STEPS + 1, SEED_STEPS + 2):
        decay = (1 + n) / (10 + n)
        for name in meant:
            meant[name] = decay * meant[name] + (1 - decay) * raw[name]
    ema = ema_of(model_of(run, shard))
    # nothing else is as near
    assert distance(ema, meant) < 1e-3 * began
    assert distance(ema, raw) > 0.1 * began


@pytest.mark.parametrize("shard, first, last, batch", [
    ("seed", 0, SEED_STEPS, BATCH),
    (0, SEED_STEPS, STEPS, SHARE),
    ("all", SEED_STEPS, STEPS, BATCH),
])
def test_samples_go_on_where_the_schedule_does(prepared, seeded, tmp_path, monkeypatch, shard,
                                               first, last, batch):
    run = bring_seed(prepared, seeded, tmp_path)
    positions = []
    folders = set()
    plain = loading.Reader.__getitems__

    def read(reader, places):
        positions.extend(places)
        folders.update(os.path.dirname(tar) for tar in reader.data.tars)
        return plain(reader, places)

    monkeypatch.setattr(loading.Reader, "__getitems__", read)
    train(run, shard)
    assert positions == list(range(first * batch, last * batch))
    shards = {"seed": ["router"], "all": ["0", "1", "2"]}.get(shard, [str(shard)])
    assert folders == {str(run / "shards" / k) for k in shards}


def test_learning_rates_are_those_of_one_schedule(seeded):
    """Warm-up begins anew; the seed's rate stays constant after its own."""
    def logged(name):
        return [(int(row["step"]), row["lr"]) for row in rows(seeded, name)]

    seed = []
    for n in range(1, SEED_STEPS + 1):
        seed.append((n, f"{LR * min(1, n / WARMUP):.3g}"))
    assert logged("expert-seed") == seed

    later = []
    for n in range(SEED_STEPS + 1, STEPS + 1):
        up = min(1, (n - SEED_STEPS) / WARMUP)
        down = min(1, (STEPS - n + 1) / DECAY)
        later.append((n, f"{LR * up * down:.3g}"))
    assert logged("expert-0") == later
    assert logged("expert-all") == later


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_begin_with_a_seed_and_one_resumes(prepared, seeded, ends, tmp_path, parallel):
    """Stopped in the midst: weights and log are those of one process, up to rounding."""
    run = bring_seed(prepared, seeded, tmp_path)
    flags = ["--run-dir", run, "--shard", 0, "--data.workers", 0]
    last = SEED_STEPS + 2
    done = command(ends, int(signal.SIGTERM), last, *flags, "--train.parallel", parallel, ranks=2)
    assert f"from the seed's step {SEED_STEPS}" in done.stdout
    assert f"saved at step {last + 2};" in done.stdout
    assert ("FSDP2" in done.stdout) == (parallel == "fsdp")

    done = command("train_expert.py", *flags)
    assert f"resumed at step {last + 2}" in done.stdout
    same_rows(run, seeded, "expert-0")
    assert distance(ema_of(model_of(run, 0)), ema_of(model_of(seeded, 0))) < 5e-5


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_seed_of_two_ranks_is_that_of_one(prepared, seeded, tmp_path, parallel):
    run = copy(prepared, tmp_path)
    command("train_expert.py", "--run-dir", run, "--shard", "seed", "--data.workers", 0,
            "--train.parallel", parallel, ranks=2)
    same_rows(run, seeded, "expert-seed")
    one = load_file(model_of(seeded, "seed"))
    two = load_file(model_of(run, "seed"))
    # raw weights and EMA weights, which differ by more
    assert distance(one, two) < 1e-5


def same_rows(run, other, name):
    """The rows of both logs agree but for the order of sums."""
    for a, b in zip(rows(run, name), rows(other, name), strict=True):
        for column in a:
            rel = 1e-2 if column in ("grad_norm", "norm_max") else 2e-4
            meant = pytest.approx(float(b[column] or 0), rel=rel, abs=1e-5)
            assert float(a[column] or 0) == meant, column


# ---- the ledger ----------------------------------------------------------------------------------

def test_the_ledger_counts_the_seed_once(seeded):
    entries, lines = report.ledger(seeded, 3)
    seed = entries["seed"]
    experts = [entries[f"expert {k}"] for k in range(3)]
    assert seed["images"] == SEED_STEPS * BATCH
    # a row of its own: with what it began with
    for expert in experts:
        assert expert["images"] == SEED_STEPS * BATCH + (STEPS - SEED_STEPS) * SHARE
        assert expert["init_images"] == seed["images"]
        assert expert["init_flops"] == seed["flops"]

    monolith = entries["monolith"]
    router = entries["router"]
    ensemble = entries["ensemble"]
    # S x batch + K x (steps - S) x batch / K = steps x batch
    assert monolith["images"] == STEPS * BATCH
    assert ensemble["images"] == STEPS * BATCH + router["images"]
    assert ensemble["flops"] == monolith["flops"] + router["flops"]
    hours = seed["device_hours"] + router["device_hours"]
    hours += sum(expert["device_hours"] for expert in experts)
    assert ensemble["device_hours"] == pytest.approx(hours)
    assert "(experts 1.000, router " in lines[0]


def test_a_seeded_ensemble_is_equal_compute(seeded, tmp_path):
    run = copy(seeded, tmp_path)
    flops = report.ledger(run, 3)[0]["monolith"]["flops"]
    rewrite(run / "router.safetensors", flops=flops // 25)
    _, lines = report.ledger(run, 3)
    assert lines == ["the ensemble: 1.040 times the monolith's training FLOPs "
                     "(experts 1.000, router 0.040): equal compute"]
    # experts that each had a seed of their own would not be
    for k in range(3):
        rewrite(model_of(run, k), init=f"seed {k}")
    _, lines = report.ledger(run, 3)
    extra = 2 * SEED_STEPS / STEPS
    assert ratio_in(lines[0]) == pytest.approx(1.04 + extra, abs=1e-3)
    assert lines[0].endswith(": NOT equal compute")


def test_a_file_that_several_began_with_is_counted_once(seeded, tmp_path):
    run = copy(seeded, tmp_path)
    for k in range(3):
        rewrite(model_of(run, k), init="", init_shard="", init_images=0, init_flops=0)
    before, _ = report.ledger(run, 3)
    for k in (0, 1):
        rewrite(model_of(run, k), init="a", init_images=1000, init_flops=10 ** 9)
    rewrite(model_of(run, 2), init="b", init_images=20, init_flops=10 ** 7)
    after, _ = report.ledger(run, 3)
    assert after["expert 0"]["images"] == before["expert 0"]["images"] + 1000
    assert after["ensemble"]["images"] == before["ensemble"]["images"] + 1000 + 20
    assert after["ensemble"]["flops"] == before["ensemble"]["flops"] + 10 ** 9 + 10 ** 7
    # the hours of another run are not known
    assert before["ensemble"]["device_hours"] > 0
    assert after["ensemble"]["device_hours"] is None


def test_a_student_of_a_seeded_run_has_each_cost_once(seeded, student, tmp_path):
    run = copy(seeded, tmp_path)
    shutil.copy(student, run / "student.safetensors")
    entries, lines = report.ledger(run, 3)
    monolith = entries["monolith"]["flops"]
    assert entries["monolith"]["init_flops"] > 0
    own = entries["student"]["flops"] / monolith
    assert ratio_in(lines[2]) == pytest.approx(own + 1, abs=2e-3)

    # what it began with -> its cost beside its own, in shares of the monolith's; of which the
    # teachers' has all but the monolith's own steps
    seed = SEED_STEPS / STEPS
    expert = seed + (1 - seed) / 3
    cases = {"0": (expert, 0), "seed": (seed, 0), "all": (1, 1 - seed)}
    for shard, (cost, beside) in cases.items():
        began = entries[{"0": "expert 0", "seed": "seed", "all": "monolith"}[shard]]
        rewrite(run / "student.safetensors", init=shard, init_shard=shard,
                init_images=began["images"], init_flops=began["flops"])
        _, lines = report.ledger(run, 3)
        assert ratio_in(lines[1]) == pytest.approx(own + cost, abs=2e-3), shard
        assert ratio_in(lines[2]) == pytest.approx(own + 1 + beside, abs=2e-3), shard


# ---- --init --------------------------------------------------------------------------------------

@pytest.fixture
def file_of(seeded, student):
    """-> the path of the model file that a name stands for."""
    def path(name):
        return student if name == "student" else model_of(seeded, name)
    return path


@pytest.mark.parametrize("kind", ["1", "all", "seed", "student"])
@pytest.mark.parametrize("shard", ["0", "seed"])
def test_training_begins_with_the_ema_weights_of_any_model(prepared, file_of, tmp_path, kind,
                                                           shard):
    run = copy(prepared, tmp_path)
    path = file_of(kind)
    flags = ["--init", path, "--train.lr", 0, "--train.steps", 1, *NOT_SEEDED]
    if shard == "seed":
        flags = ["--init", path, "--train.lr", 0, "--train.seed_steps", 1]
    if kind == "student":
        flags += ["--flow.objective", "velocity"]
    train(run, shard, *flags)

    weights = ema_of(path)
    assert same(ema_of(model_of(run, shard)), weights)
    # a seed's raw weights begin there, too
    if shard == "seed":
        assert same(artifacts.load_raw(model_of(run, shard)), weights)
    info = artifacts.read_info(model_of(run, shard))
    began = artifacts.read_info(path)
    assert info["step"] == 1
    assert info["images"] == (BATCH if shard == "seed" else SHARE)
    assert info["init"] == sha256_of(path) and info["init_shard"] == ""
    # with what that one began with
    assert info["init_images"] == began["images"] + began["init_images"]
    assert info["init_flops"] == began["flops"] + began["init_flops"]
    assert [row["step"] for row in rows(run, f"expert-{shard}")] == ["1"]


def test_a_seed_hands_on_the_cost_of_its_beginning(prepared, seeded, tmp_path):
    run = copy(prepared, tmp_path)
    train(run, "seed", "--init", model_of(seeded, "all"))
    train(run, 0)
    seed = artifacts.read_info(model_of(run, "seed"))
    expert = artifacts.read_info(model_of(run, 0))
    assert expert["init_images"] == seed["images"] + STEPS * BATCH
    assert expert["init_flops"] == seed["flops"] + seed["init_flops"]
    assert expert["init_flops"] > 2 * seed["flops"]


def test_an_imported_model_that_knows_no_cost_has_none(prepared, seeded, tmp_path):
    run = copy(prepared, tmp_path)
    model, info = artifacts.load(model_of(seeded, 0))
    about = {key: info[key] for key in ("objective", "path", "autoencoder", "text")}
    artifacts.save(tmp_path / "imported", model.config, model.state_dict(), torch.bfloat16, **about)
    train(run, 0, "--init", tmp_path / "imported", "--train.lr", 0, "--train.steps", 1,
          *NOT_SEEDED)
    info = artifacts.read_info(model_of(run, 0))
    assert info["init"] == sha256_of(tmp_path / "imported")
    assert (info["init_images"], info["init_flops"]) == (0, 0)
    meant = {name: w.bfloat16().float() for name, w in ema_of(model_of(seeded, 0)).items()}
    assert same(ema_of(model_of(run, 0)), meant)


def test_a_resume_with_another_beginning_is_refused(prepared, seeded, tmp_path):
    run = copy(prepared, tmp_path)
    one = model_of(seeded, 1)
    two = model_of(seeded, 2)
    flags = [*NOT_SEEDED, *ALONE]
    train(run, 0, "--init", one, "--train.steps", 1, *NOT_SEEDED)
    before = model_of(run, 0).read_bytes()
    for init, now in ((["--init", two], begun_with(two)), ([], "")):
        refused("train_expert.py", "--run-dir", run, "--shard", 0, *flags, *init,
                says=["other settings", f"init '{begun_with(one)}' / '{now}'", "delete"])
    assert model_of(run, 0).read_bytes() == before
    done = train(run, 0, "--init", one, "--train.steps", 2, *NOT_SEEDED)
    assert "resumed at step 1" in done.stdout


def test_a_resume_with_another_seed_is_refused(prepared, seeded, tmp_path):
    run = bring_seed(prepared, seeded, tmp_path)
    train(run, 0, "--train.steps", SEED_STEPS + 1)
    there = begun_with(model_of(run, "seed"))
    os.remove(model_of(run, "seed"))
    train(run, "seed", "--train.lr", 1e-2)
    refused("train_expert.py", "--run-dir", run, "--shard", 0, *ALONE,
            says=[f"init '{there}' / '{begun_with(model_of(run, 'seed'))}'"])
    refused("train_expert.py", "--run-dir", run, "--shard", 0, *ALONE, *NOT_SEEDED,
            says=[f"first_step {SEED_STEPS} / 0", f"init '{there}' / ''"])


def test_a_seed_trained_further_is_what_it_would_have_been(prepared, seeded, tmp_path):
    """Its rate does not fall at the end: a longer seed resumes from a shorter one."""
    run = copy(prepared, tmp_path)
    train(run, "seed", "--train.seed_steps", SEED_STEPS - 1)
    refused("train_expert.py", "--run-dir", run, "--shard", 0, *ALONE,
            says=["seed.safetensors has made 3 steps", "train.seed_steps is 4", "--shard seed"])
    done = train(run, "seed")
    assert f"resumed at step {SEED_STEPS - 1}" in done.stdout
    assert model_of(run, "seed").read_bytes() == model_of(seeded, "seed").read_bytes()
    assert rows(run, "expert-seed") == rows(seeded, "expert-seed")


def test_a_finished_seed_says_what_would_train_it_further(seeded, tmp_path):
    done = train(copy(seeded, tmp_path), "seed")
    assert f"expert-seed is finished at step {SEED_STEPS}; a larger --train.seed_steps would" in \
        done.stdout


def test_the_remedy_for_a_seed_of_more_steps_works(seeded, tmp_path):
    run = copy(seeded, tmp_path)
    shutil.rmtree(run / "checkpoints" / "expert-0")
    flags = ["--train.seed_steps", SEED_STEPS - 1]
    done = inside("train_expert.py", "--run-dir", run, "--shard", 0, *ALONE, *flags)
    assert "seed.safetensors has made 4 steps, train.seed_steps is 3" in done.stderr
    remedy = ["--train.seed_steps", SEED_STEPS]
    assert " ".join(map(str, remedy)) in done.stderr
    train(run, 0, *remedy)


def test_an_expert_stopped_before_its_first_step_saves_nothing(prepared, seeded, tmp_path):
    """A fresh optimiser has no state that could be saved and resumed with the same bits."""
    run = bring_seed(prepared, seeded, tmp_path)
    # in the second half of the first batch
    with signalled_at(SEED_STEPS * SHARE + 4) as signalled:
        done = inside("train_expert.py", "--run-dir", run, "--shard", 0, *ALONE,
                      "--train.micro_batch", 4)
    assert signalled and done.returncode == 128 + signal.SIGTERM
    assert not list(run.glob("checkpoints/expert-0/step-*"))


# ---- refusals ------------------------------------------------------------------------------------

def refused_here(run, shard, *flags, says):
    refused("train_expert.py", "--run-dir", run, "--shard", shard, *ALONE, *flags, says=says)
    # nothing was trained
    assert not list(run.glob(f"checkpoints/expert-{shard}/step-*"))
    assert not model_of(run, shard).exists()


SCALED = {"name": "vae", "factor": 1, "weights": "ab" * 32}


@pytest.mark.parametrize("changes, flags, says", [
    ({}, ["--model.dim", 16], ["another model", "dim 32 / 16", "--model.*"]),
    ({"autoencoder": SCALED}, [], ["another autoencoder ('vae'", " / none)"]),
    ({"text": {"name": "clip", "weights": "ab" * 32}}, [],
     ["another text encoder ('clip'", " / 'words')"]),
    ({}, ["--flow.objective", "eps"], ["predicts x0 on the linear path", "eps on the linear"]),
    ({}, ["--flow.path", "cosine"], ["predicts x0 on the linear path", "x0 on the cosine path"]),
    ({"autoencoder": "none"}, [], ["no model to begin with", "autoencoder"]),
])
@pytest.mark.parametrize("as_seed", [False, True])
def test_a_model_that_does_not_fit_is_refused(prepared, seeded, tmp_path, changes, flags, says,
                                              as_seed):
    run = bring_seed(prepared, seeded, tmp_path)
    path = model_of(run, "seed")
    if changes:
        describe(path, **changes)
    init = [] if as_seed else ["--init", path, *NOT_SEEDED]
    refused_here(run, 0, *flags, *init, says=[str(path), *says])


def describe(path, **changes):
    """Changes what a model file says of itself, and none of its tensors."""
    info = artifacts.read_info(path)
    artifacts.write_tensors(path, load_file(path), info | changes)


def test_files_that_are_no_model_to_begin_with_are_refused(prepared, seeded, tmp_path):
    run = copy(prepared, tmp_path)
    whole = model_of(seeded, 0).read_bytes()
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(whole[:-100])
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(3)}, foreign)
    ruined = tmp_path / "ruined.safetensors"
    weights = ema_of(model_of(seeded, 0))
    next(iter(weights.values())).fill_(float("nan"))
    artifacts.write_tensors(ruined, weights, artifacts.read_info(model_of(seeded, 0)))

    cases = {
        seeded / "router.safetensors": ["is a router", "no expert can begin with"],
        tmp_path / "nowhere": ["there is no", "to begin with"],
        tmp_path: ["there is no", "to begin with"],
        torn: ["cut short or damaged"],
        foreign: ["not a model of this project"],
        ruined: ["damaged", "not finite"],
    }
    for path, says in cases.items():
        refused_here(run, 0, "--init", path, *NOT_SEEDED, says=[str(path), *says])


def test_a_file_that_is_no_seed_is_refused(prepared, seeded, tmp_path):
    run = copy(prepared, tmp_path)
    path = model_of(run, "seed")
    refused_here(run, 0, says=["train.seed_steps = 4", f"{path} is missing", "--shard seed"])
    shutil.copytree(seeded / "experts", run / "experts", dirs_exist_ok=True)
    for shard in (0, 1, 2, "all"):
        shutil.copy(model_of(run, shard), path)
        os.remove(model_of(run, shard))
        refused_here(run, shard, says=["seed.safetensors is no seed", "EMA weights alone",
                                       f"--init {path} --train.seed_steps 0"])
    path.write_bytes(model_of(seeded, "seed").read_bytes()[:-100])
    refused_here(run, 0, says=[str(path), "cut short or damaged"])


def test_a_seed_of_another_number_of_steps_is_refused(prepared, seeded, tmp_path):
    run = bring_seed(prepared, seeded, tmp_path)
    for shard in (0, "all"):
        refused_here(run, shard, "--train.seed_steps", 5,
                     says=["seed.safetensors has made 4 steps", "train.seed_steps is 5"])


def test_a_seed_with_ruined_raw_weights_is_refused(prepared, seeded, tmp_path):
    run = bring_seed(prepared, seeded, tmp_path)
    path = model_of(run, "seed")
    tensors = load_file(path)
    for name in tensors:
        if name.startswith(artifacts.RAW):
            tensors[name].fill_(float("nan"))
    artifacts.write_tensors(path, tensors, artifacts.read_info(path))
    refused_here(run, 0, says=[str(path), "damaged", "not finite"])


@pytest.mark.parametrize("shard, flags, says", [
    ("0", ["--init", "x"], ["--init x", "train.seed_steps = 4", "--shard seed"]),
    ("seed", NOT_SEEDED, ["--shard seed", "train.seed_steps is 0", "--train.seed_steps N"]),
    ("0", ["--train.seed_steps", 12], ["train.seed_steps = 12", "train.steps = 12"]),
    ("seed", ["--train.seed_steps", 13], ["train.seed_steps = 13", "train.steps = 12"]),
    ("0", ["--train.steps", 4], ["train.seed_steps = 4", "train.steps = 4"]),
    ("0", ["--train.seed_steps", -1], ["train.seed_steps", "-1"]),
    ("0", ["--train.router.seed_steps", 5], ["unknown argument --train.router.seed_steps"]),
    ("0", ["--train.seed_steps", 0, "--init", "x"], ["--init x", "no such file"]),
    ("seeds", [], ["no shard 'seeds'", "all for the monolith"]),
])
def test_mistaken_flags_are_refused(prepared, tmp_path, shard, flags, says):
    run = copy(prepared, tmp_path)
    refused("train_expert.py", "--run-dir", run, "--shard", shard, *flags, says=says)
    assert not (run / "checkpoints").exists()


def test_a_seed_without_the_router_s_folder_is_refused(prepared, tmp_path):
    run = node(prepared, tmp_path / "run", "2")
    refused_here(run, "seed", says=[f"no {run / 'shards' / 'router'}", "copy them here"])


def test_a_seed_that_leaves_no_step_is_refused_by_stage_1(tars, config, tmp_path):
    run = tmp_path / "run"
    refused("cluster.py", "--data", tars / "*.tar", "--run-dir", run, "--config", config,
            "--train.seed_steps", 6, says=["train.seed_steps = 6", "train.steps = 6"])
    assert not (run / "config.toml").exists()


# ---- plans, samples, evaluation ------------------------------------------------------------------

@pytest.mark.parametrize("shard, steps, batch", [
    ("seed", SEED_STEPS, BATCH),
    ("0", STEPS - SEED_STEPS, SHARE),
    ("all", STEPS - SEED_STEPS, BATCH),
])
def test_a_plan_counts_the_training_s_own_steps(prepared, seeded, shard, steps, batch):
    done = inside("train_expert.py", "--run-dir", prepared, "--shard", shard, "--plan",
                  "--plan.gpus", 1)
    assert done.returncode == 0, done.stderr
    images = steps * batch
    flops = images * 3 * plan.flops(artifacts.load(model_of(seeded, "seed"))[0].config)
    assert f"{steps} steps = {images / 1e6:.4g}M images" in done.stdout
    assert f" = {flops:.3g} FLOPs" in done.stdout
    assert f" for {steps} steps at " in done.stdout
    says = f"goes on from the run's seed, which makes the first {SEED_STEPS} of {STEPS} steps"
    assert (says in done.stdout) == (shard != "seed")
    assert not (prepared / "checkpoints").exists()


def test_a_seed_s_file_does_not_disturb_samples(seeded, tmp_path):
    bare = copy(seeded, tmp_path)
    os.remove(model_of(bare, "seed"))
    for flags in (["--strategy", "full"], ["--strategy", "top-1"], ["--monolith"]):
        name = flags[-1]
        sample(seeded, tmp_path / f"a{name}", *flags)
        done = sample(bare, tmp_path / f"b{name}", *flags)
        images = pictures(tmp_path / f"a{name}")
        assert np.array_equal(images, pictures(tmp_path / f"b{name}"))
        assert done.stderr.count("warning") == 0, done.stderr


def test_a_seeded_run_is_evaluated_with_its_seed(seeded, tars, tmp_path):
    found = []
    for name in ("a", "b"):
        run = copy(seeded, tmp_path / name)
        if name == "b":
            os.remove(model_of(run, "seed"))
        done = inside("evaluate.py", "--run-dir", run, "--data", tars / "*.tar", *FEW)
        assert done.returncode == 0, done.stderr
        found.append(results(run / "evaluation")[0])
        found[-1]["table"] = done.stdout

    with_seed, without = found
    assert json.dumps(with_seed["rows"]) == json.dumps(without["rows"])
    assert json.dumps(with_seed["loss"]) == json.dumps(without["loss"])
    assert [row["model"] for row in with_seed["rows"]] == ["ensemble", "monolith"]
    assert with_seed["ledger"]["seed"]["images"] == SEED_STEPS * BATCH
    flops = with_seed["ledger"]["seed"]["flops"]
    assert re.search(rf"\| seed +\| {SEED_STEPS} +\| 96 +\|", with_seed["table"])
    assert with_seed["table"].count(f"| {flops:.4g} ") == 5
    assert "of these, inherited" in with_seed["table"]
    # what it cost is known without its file, too, but for the hours
    ensemble = without["ledger"]["ensemble"]
    assert ensemble["device_hours"] is None
    assert ensemble["flops"] == with_seed["ledger"]["ensemble"]["flops"]
