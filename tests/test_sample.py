"""Stage 4: the ensemble of a run under every strategy, its engine, and sample.py."""
import collections
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command, copy, give, inside, pictures, rewrite, sample, works
from PIL import Image

import flow
from ddm import artifacts, plan
from ddm import pictures as sheets
from ddm.config import make_config
from ddm.ensemble import Ensemble, beginnings
from ddm.errors import UserError
from ddm.pictures import RoutingRow, Step, cut_label, image_grid, label_font, routing_sheet
from ddm.text import hash_words

CPU = torch.device("cpu")
STRATEGIES = ("full", "top-1", "top-2", "sample-1", "sample-2", "threshold-0.3", "nucleus-0.9",
              "once", "oracle-1")
TEXTS = ("a red circle", "a blue cross", "a white square", "")


def settings(**values):
    flags = {"sample.strategy": "full", "sample.cfg": 3.0}
    for key, value in values.items():
        flags[f"sample.{key}"] = value
    return make_config(flags).sample


def condition(texts=TEXTS):
    return torch.stack([hash_words(text, 4, 64) for text in texts])


def start(n=4, calls=5, K=3, seed=0):
    return beginnings(range(seed, seed + n), (3, 8, 8), calls, K)


def draw(team, steps=5, c=None, c_null=None, labels=None, **values):
    """-> (x_0, Velocity) of the four texts under settings(**values)."""
    s = settings(**values)
    if c is None:
        c = condition()
    noise, u = start(calls=flow.evaluations(steps, s.solver))
    velocity = team.velocity(s, c, c_null=c_null, u=u, labels=labels)
    *_, x = flow.integrate(velocity, noise, flow.time_grid(steps), s.solver)
    return x, velocity


def spread(run, sharpness=2.0):
    """Makes the router of a run prefer different experts for different samples.

    Six steps have taught it little: random, centred logits instead.
    """
    path = run / "router.safetensors"
    router, info = artifacts.load(path)
    info.pop("model")
    x, _ = start(64)
    t = torch.ones(64)
    c = condition(16 * TEXTS)
    with torch.no_grad():
        torch.manual_seed(2)
        for block in router.blocks:
            block.adaLN[1].weight.normal_(std=0.2)
            block.cross.proj.weight.normal_(std=0.2)
        features = router.features(x, t, c, router.cls_token)[:, 0]
        head = torch.randn(3, features.shape[1])
        head *= sharpness / (features @ head.T).std(0)[:, None]
        router.head.weight.copy_(head)
        router.head.bias.copy_(-(features @ head.T).mean(0))
    artifacts.save(path, router.config, router.state_dict(), **info)
    return run


@pytest.fixture(scope="module")
def mixed(trained, tmp_path_factory):
    """A run whose experts differ in size, objective and path, and whose router is of different
    minds. Do not change it.
    """
    run = spread(copy(trained, tmp_path_factory.mktemp("mixed")))
    others = {
        1: ["--flow.objective", "eps", "--flow.path", "cosine",
            "--model.dim", 48, "--model.depth", 2],
        2: ["--flow.objective", "velocity", "--flow.path", "ddpm", "--model.patch", 4],
    }
    for k, flags in others.items():
        shutil.rmtree(run / "checkpoints" / f"expert-{k}")
        command("train_expert.py", "--run-dir", run, "--shard", k, *flags)
    return run


def assert_same(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def differ(a, b):
    """The largest difference between images."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()


def texts_in(folder):
    """The text chunks of the single images of a folder."""
    return [Image.open(path).text for path in sorted(folder.glob("0*.png"))]


# ---- strategies ----------------------------------------------------------------------------------

def test_identical_experts_are_one_expert_under_every_strategy(trained, tmp_path):
    run = spread(copy(trained, tmp_path))
    for k in (1, 2):
        give(run, 0, k)
    team = Ensemble(run, CPU)
    first, _ = draw(team, strategy="oracle-0")
    for routing in ("shared", "own"):
        for strategy in STRATEGIES:
            x, velocity = draw(team, strategy=strategy, cfg_routing=routing)
            assert_same(velocity.used.sum(1), torch.full((4,), 5.0))
            assert_same(x, first)


def test_full_is_the_sum_of_eq_8_with_guidance_by_hand(mixed):
    team = Ensemble(mixed, CPU)
    x, _ = start()
    c = condition()
    null = torch.zeros_like(c)
    t = torch.full((4,), 0.7)

    def by_hand(p, c):
        return sum(p[:, k].view(-1, 1, 1, 1) * team.expert_velocity(k, x, t, c) for k in range(3))

    with torch.no_grad():
        p = team.route(x, t, c)
        p_null = team.route(x, t, null)
        v_c = by_hand(p, c)
        v_shared = by_hand(p, null)
        v_own = by_hand(p_null, null)
    shared = team.velocity(settings(), c)(x, 0.7)
    own = team.velocity(settings(cfg_routing="own"), c)(x, 0.7)
    assert_same(shared, v_shared + 3 * (v_c - v_shared))
    assert_same(own, v_own + 3 * (v_c - v_own))
    assert (shared - own).abs().max() > 0.01


def test_oracle_and_labels_are_those_experts_alone(mixed):
    team = Ensemble(mixed, CPU)
    labels = torch.tensor([2, 0, 1, 0])
    x, velocity = draw(team, labels=labels)
    assert torch.equal(velocity.used, 5 * F.one_hot(labels, 3).float())
    assert not team.forwards["router"]
    for k in range(3):
        alone, _ = draw(team, strategy=f"oracle-{k}")
        assert_same(alone[labels == k], x[labels == k])


def test_a_velocity_can_teach_a_student(mixed):
    team = Ensemble(mixed, CPU)
    x, _ = start()
    student = torch.nn.Parameter(torch.zeros_like(x))
    teacher = team.velocity(settings(), condition(), labels=torch.tensor([0, 1, 1, 0]))
    F.mse_loss(student, teacher(x, 0.5)).backward()
    assert student.grad.abs().max() > 0
    assert not any(p.requires_grad for p in team.expert(0).parameters())


def test_a_label_without_an_expert_is_named(mixed, tmp_path):
    run = copy(mixed, tmp_path)
    os.remove(run / "experts" / "2.safetensors")
    team = Ensemble(run, CPU)
    with pytest.raises(UserError, match="labels 2: there are experts for 0, 1 of 3 clusters"):
        team.velocity(settings(), condition(), labels=torch.tensor([0, 2, 1, 0]))


def test_temperature_divides_the_router_s_logits(mixed):
    team = Ensemble(mixed, CPU)
    x, _ = start()
    t = torch.ones(4)
    c = condition()
    root = team.route(x, t, c).sqrt()
    assert_same(team.route(x, t, c, 2.0), root / root.sum(1, keepdim=True))

    def images(strategy, temperature=1.0):
        return draw(team, strategy=strategy, router_temperature=temperature)[0]

    top_1 = images("top-1")
    assert torch.equal(images("top-1", 50.0), top_1)
    assert_same(images("full", 1e-6), top_1)
    assert_same(images("sample-1", 1e-6), top_1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_image_is_the_same_in_any_batch(mixed, strategy):
    team = Ensemble(mixed, CPU)
    whole, _ = draw(team, strategy=strategy)
    for i in range(4):
        noise, u = start(1, seed=i)
        velocity = team.velocity(settings(strategy=strategy), condition()[i:i + 1], u=u)
        *_, x = flow.integrate(velocity, noise, flow.time_grid(5))
        assert_same(x[0], whole[i])


def test_the_numbers_that_draw_are_the_image_s_own_and_new_at_each_step(mixed):
    team = Ensemble(mixed, CPU)
    # nearly even
    _, velocity = draw(team, 50, strategy="sample-1", router_temperature=100.0)
    assert (velocity.used > 5).all()
    assert len({tuple(row.tolist()) for row in velocity.used}) > 1


# ---- what is run ---------------------------------------------------------------------------------

def counted(team):
    """The sizes of the batches that each expert and the router run."""
    batches = collections.defaultdict(list)

    def count(name, network):
        network.register_forward_pre_hook(lambda module, args: batches[name].append(len(args[0])))

    for k in team.paths:
        count(k, team.expert(k))
    count("router", team.router)
    return batches


@pytest.mark.parametrize("strategy, experts, questions", [
    ("full", 3, 5), ("top-1", 1, 5), ("top-2", 2, 5), ("sample-1", 1, 5), ("sample-2", 2, 5),
    ("threshold-0", 3, 5), ("threshold-1", 1, 5), ("nucleus-0.9", 1, 5), ("once", 1, 1),
    ("oracle-2", 1, 0)])
@pytest.mark.parametrize("routing", ["shared", "own"])
def test_a_strategy_runs_as_many_forwards_as_its_table_says(mixed, strategy, experts, questions,
                                                            routing):
    """Per sample and step, both branches of guidance: 2 `experts`; and each expert runs once a
    step, on both.
    """
    team = Ensemble(mixed, CPU)
    batches = counted(team)
    _, velocity = draw(team, strategy=strategy, cfg_routing=routing)
    kept = strategy in ("once", "oracle-2")

    asked = batches["router"]
    assert len(asked) == questions * (2 if routing == "own" and not kept else 1)
    assert sum(asked) == 4 * len(asked)

    assert sum(sum(batches[k]) for k in range(3)) == 5 * 4 * 2 * experts
    for k in range(3):
        assert len(batches[k]) <= 5
        assert routing == "own" or all(n % 2 == 0 for n in batches[k])

    assert {name: sum(sizes) for name, sizes in batches.items() if sizes} == dict(team.forwards)
    flops = 0
    for name, sizes in batches.items():
        network = team.router if name == "router" else team.expert(name)
        flops += sum(sizes) * plan.flops(network.config)
    assert team.flops() == flops
    if kept:
        assert sorted(set(velocity.used.flatten().tolist())) == [0.0, 5.0]


def test_once_keeps_the_drawn_expert_in_both_branches(mixed):
    team = Ensemble(mixed, CPU)
    own, _ = draw(team, strategy="once", cfg_routing="own")
    shared, _ = draw(team, strategy="once", cfg_routing="shared")
    assert torch.equal(own, shared)


def test_the_router_is_asked_every_m_forwards(mixed):
    team = Ensemble(mixed, CPU)
    batches = counted(team)
    x, _ = draw(team, 10, strategy="top-1", route_every=4, route_epsilon=0.0)
    # at forwards 0, 4 and 8
    assert batches["router"] == [4, 4, 4]

    # the steps between follow the last answer
    c = condition()
    weights = []

    def velocity(x_t, time):
        t = torch.full((4,), time)
        if len(weights) % 4 == 0:
            weights.append(flow.top_k(team.route(x_t, t, c), 1))
        else:
            weights.append(weights[-1])
        v_c = flow.ensemble(weights[-1], team.expert_velocity, x_t, t, c)
        v_u = flow.ensemble(weights[-1], team.expert_velocity, x_t, t, torch.zeros_like(c))
        return flow.guide(v_c, v_u, 3.0)

    with torch.inference_mode():
        *_, by_hand = flow.integrate(velocity, start(calls=10)[0], flow.time_grid(10))
    assert_same(x, by_hand)

    batches.clear()
    draw(team, 10, strategy="top-1", route_every=4, route_epsilon=0.0, cfg_routing="own",
         cfg_high=0.95)
    # the unconditional branch at forwards 1 (the first guided one), 4 and 8
    assert batches["router"] == [4, 4, 4, 4, 4, 4]


def test_the_router_is_off_for_a_sample_once_it_is_sure(mixed):
    """Sample 0 is sure from the start, sample 1 from t = 0.5 on, the others never."""
    team = Ensemble(mixed, CPU)
    asked = []
    known = {tuple(row.tolist()): number for number, row in enumerate(condition())}

    def route(x_t, t, c, temperature, calibrated):
        rows = [known[tuple(row.tolist())] for row in c]
        asked.append((round(t[0].item(), 2), rows))
        sure = torch.tensor([row == 0 or row == 1 and t[0] <= 0.5 for row in rows])
        return torch.where(sure[:, None], torch.tensor([[0.0004, 0.9995, 0.0001]]),
                           torch.tensor([[0.3, 0.3, 0.4]]))

    team.route = route
    _, velocity = draw(team, 10, strategy="full", route_every=2, route_epsilon=0.001)
    assert asked == [(1.0, [0, 1, 2, 3]), (0.8, [1, 2, 3]), (0.6, [1, 2, 3]), (0.4, [1, 2, 3]),
                     (0.2, [2, 3])]
    # that expert alone, though the strategy is full
    assert_same(velocity.used[0], torch.tensor([0.0, 10.0, 0.0]))
    assert_same(velocity.used[1], torch.tensor([0.3 * 6, 0.3 * 6 + 4, 0.4 * 6]))

    # not unless route_every asks for it
    asked.clear()
    draw(team, 10, strategy="full")
    assert len(asked) == 10 and all(len(rows) == 4 for _, rows in asked)


def test_guidance_interval_runs_one_branch_outside_and_leaves_the_inside_alone(mixed):
    team = Ensemble(mixed, CPU)
    batches = counted(team)
    # times as a grid has them, with their rounding
    velocity = team.velocity(settings(cfg_low=0.3, cfg_high=0.7), condition())
    plain = team.velocity(settings(cfg=1.0), condition())
    guided = team.velocity(settings(), condition())
    x, _ = start()
    for time in flow.time_grid(10).tolist():
        expected = guided if 0.29 < time < 0.71 else plain
        assert_same(velocity(x, time), expected(x, time))

    batches.clear()
    team.velocity(settings(cfg_high=0.5), condition())(x, 0.6)
    assert batches[0] == batches[1] == batches[2] == [4]


def test_a_negative_prompt_takes_the_place_of_no_condition(mixed, tmp_path):
    team = Ensemble(mixed, CPU)
    x, _ = start()
    t = torch.full((4,), 0.6)
    c = condition()
    c_null = condition(["a green cross"]).expand(4, -1)
    v = team.velocity(settings(cfg=2.5, strategy="oracle-1"), c, c_null)(x, 0.6)
    with torch.no_grad():
        v_c = team.expert_velocity(1, x, t, c)
        v_n = team.expert_velocity(1, x, t, c_null)
    assert_same(v, v_n + 2.5 * (v_c - v_n))

    sample(mixed, tmp_path / "with", "--negative-prompt", "a green cross", "--seed", 3)
    sample(mixed, tmp_path / "without", "--seed", 3)
    assert differ(pictures(tmp_path / "with"), pictures(tmp_path / "without")) > 1
    assert texts_in(tmp_path / "with")[0]["negative prompt"] == "a green cross"


# ---- experts of different kinds ------------------------------------------------------------------

def test_experts_of_other_size_objective_and_path_make_one_velocity(mixed):
    team = Ensemble(mixed, CPU)
    kinds = {}
    for k, info in team.infos.items():
        model = info["model"]
        kinds[k] = (info["objective"], info["path"], model["dim"], model["patch"])
    assert kinds == {0: ("x0", "linear", 32, 2), 1: ("eps", "cosine", 48, 2),
                     2: ("velocity", "ddpm", 32, 4)}

    x, _ = start()
    c = condition()
    t = torch.tensor([0.2, 0.5, 0.9, 1.0])
    tt = t.view(-1, 1, 1, 1)

    def predicted(k, path):
        """Expert k's output at its own time and scale of the same signal-to-noise ratio."""
        s = t if path == "linear" else flow.same_snr(path, t)
        alpha, sigma = (a.view(-1, 1, 1, 1) for a in flow.alpha_sigma(path, s))
        seen = x * ((alpha ** 2 + sigma ** 2) / ((1 - tt) ** 2 + tt ** 2)).sqrt()
        return team.expert(k)(seen, s, c), seen, alpha, sigma

    with torch.no_grad():
        out, *_ = predicted(0, "linear")
        assert_same(team.expert_velocity(0, x, t, c), (x - out) / tt, 1e-3)

        out, *_ = predicted(1, "cosine")
        x_0 = ((x - tt * out) / (1 - tt).clamp(min=0.05)).clamp(-1, 1)
        assert_same(team.expert_velocity(1, x, t, c), out - x_0, 1e-3)

        # ddpm's time ends just short of noise
        out, seen, alpha, sigma = predicted(2, "ddpm")
        x_0 = (alpha * seen - sigma * out).clamp(-1, 1)
        eps = sigma * seen + alpha * out
        assert_same(team.expert_velocity(2, x, t, c), eps - x_0, 2e-2)


# ---- the engine ----------------------------------------------------------------------------------

# those on the device go first: K - N loads a step
@pytest.mark.parametrize("resident, loads", [(0, 3), (1, 3 + 4 * 2), (2, 3 + 4 * 1), (3, 3)])
def test_resident_bounds_what_is_loaded_and_changes_nothing(mixed, resident, loads):
    expected, _ = draw(Ensemble(mixed, CPU), strategy="full")
    team = Ensemble(mixed, CPU, resident=resident)
    # nothing before it is needed
    assert not team.loaded

    counts = []
    load = team._load

    def noted(path, name):
        if name != "router":
            counts.append(len(team.loaded) + 1)
        return load(path, name)

    team._load = noted
    x, _ = draw(team, strategy="full")
    assert_same(x, expected)
    assert max(counts) <= (resident or 3) and len(counts) == loads


def test_weights_on_a_cpu_are_mapped_from_the_file_and_let_go_at_once(mixed, tmp_path):
    run = copy(mixed, tmp_path)
    path = str(run / "experts" / "0.safetensors")
    team = Ensemble(run, CPU, resident=1)

    def mapped():
        return path in Path("/proc/self/maps").read_text()

    assert not mapped()
    team.expert(0)
    assert mapped()
    team.expert(1)
    assert not mapped()


def test_bf16_weights_give_nearly_the_images_of_fp32(mixed):
    fp32, _ = draw(Ensemble(mixed, CPU), strategy="once")
    team = Ensemble(mixed, CPU, precision="bf16")
    bf16, _ = draw(team, strategy="once")
    assert {p.dtype for p in team.expert(0).parameters()} == {torch.bfloat16}
    assert bf16.dtype == torch.float32
    error = (fp32 - bf16).square().mean().sqrt() / fp32.square().mean().sqrt()
    assert 0 < error < 0.05


@pytest.mark.skipif(not works("g++", "--version"), reason="torch.compile needs a C++ compiler; "
                    "bench/sample.py and bench/train_step.py compile, too")
def test_compiled_models_give_the_same_images(mixed):
    torch._dynamo.utils.counters.clear()
    plain, _ = draw(Ensemble(mixed, CPU), 2, strategy="once")
    compiled, _ = draw(Ensemble(mixed, CPU, compile=True), 2, strategy="once")
    assert_same(plain, compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


# ---- the command ---------------------------------------------------------------------------------

def test_samples_carry_how_they_were_made(trained, tmp_path):
    flags = ["--cfg", 2, "--strategy", "top-2", "--solver", "heun"]
    sample(trained, tmp_path / "out", "--seed", 5, *flags, ranks=0)
    singles = [f"{i:04d}.png" for i in range(6)]
    assert sorted(os.listdir(tmp_path / "out")) == [*singles, "grid.png"]

    expected = {"strategy": "top-2", "guidance": "2.0", "steps": "4", "solver": "heun",
                # of the weights, resolved
                "precision": "fp32"}
    texts = texts_in(tmp_path / "out")
    for i, prompt, seed in ((0, "a red circle", "5"), (4, "a blue cross", "6")):
        assert expected.items() <= texts[i].items()
        assert (texts[i]["prompt"], texts[i]["seed"]) == (prompt, seed)

    sample(trained, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").text["prompt"] == "a red circle | a blue cross"

    # the image's own seed gives it again, alone
    inside("sample.py", "--run-dir", trained, "--device", "cpu", "--prompt", "a blue cross",
           "--num-images", 1, "--seed", 6, *flags, "--out", tmp_path / "one")
    assert differ(pictures(tmp_path / "one")[0], pictures(tmp_path / "out")[4]) <= 1


@pytest.mark.parametrize("strategy", ["top-1", "once", "sample-1"])
def test_batch_size_resident_experts_and_ranks_do_not_matter(mixed, tmp_path, strategy):
    sample(mixed, tmp_path / "one", "--strategy", strategy)
    expected = pictures(tmp_path / "one")
    texts = texts_in(tmp_path / "one")
    assert len({text["experts"] for text in texts}) > 1

    ways = {"batch": (["--batch", 2], None), "resident": (["--resident", 1], None),
            "ranks": ([], 2)}
    for name, (flags, ranks) in ways.items():
        done = sample(mixed, tmp_path / name, "--strategy", strategy, *flags, ranks=ranks)
        assert differ(pictures(tmp_path / name), expected) <= 1
        assert texts_in(tmp_path / name) == texts
        assert differ(Image.open(tmp_path / name / "grid.png"),
                      Image.open(tmp_path / "one" / "grid.png")) <= 1
        assert done.stdout.count("6 images in") == 1


def test_more_ranks_than_images(mixed, tmp_path):
    command("sample.py", "--run-dir", mixed, "--prompt", "x", "--num-images", 1,
            "--strategy", "once", "--out", tmp_path / "x.png", ranks=2)
    assert (tmp_path / "x.png").exists()


COST = re.compile(r"per sample: ([\d.]+) of experts, ([\d.]+) of the router; (\S+) GFLOPs per "
                  r"image, (\S+) times a single expert's; \S+ images/s")


def test_the_end_says_what_it_cost(mixed, tmp_path):
    def flops(name):
        return plan.flops(artifacts.load(mixed / name)[0].config)

    experts = [flops(f"experts/{k}.safetensors") for k in range(3)]
    router = flops("router.safetensors")

    def cost(*flags):
        done = sample(mixed, tmp_path / "x.png", *flags)
        return [float(number) for number in COST.search(done.stdout).groups()]

    of_experts, of_router, gflops, _ = cost("--strategy", "full")
    assert (of_experts, of_router) == (24, 4)
    assert gflops == pytest.approx((8 * sum(experts) + 4 * router) / 1e9, rel=1e-3)

    both = cost("--strategy", "top-1", "--cfg-routing", "own", "--solver", "heun")
    assert both[:2] == [14, 14]
    assert cost("--strategy", "once", "--solver", "ab2", "--cfg", 1)[:2] == [4, 1]

    of_experts, of_router, gflops, times = cost("--strategy", "oracle-1", "--show-routing")
    assert (of_experts, of_router, times) == (8, 0, 1)
    assert gflops == pytest.approx(8 * experts[1] / 1e9, rel=1e-3)

    assert cost("--strategy", "top-1", "--route-every", 2, "--route-epsilon", 0)[1] == 2
    assert cost("--monolith")[:2] == [8, 0]

    # guided at t = 0.5 and 0.25, not at 1 and 0.75
    mean = sum(experts) / 3
    expected = (3 * 6 * mean + 4 * router) / (6 * mean)
    assert cost("--strategy", "full", "--cfg-high", 0.6)[3] == pytest.approx(expected, rel=1e-3)


def test_shift_moves_the_solver_s_times_and_is_the_experts_own_by_default(trained, tmp_path):
    run = copy(trained, tmp_path)
    for path in run.rglob("[0-9].safetensors"):
        rewrite(path, shift=3.0)
    sample(run, tmp_path / "own")
    sample(run, tmp_path / "same", "--shift", 3.0)
    sample(run, tmp_path / "other", "--shift", 1.0)
    own = pictures(tmp_path / "own")
    assert np.array_equal(own, pictures(tmp_path / "same"))
    assert differ(own, pictures(tmp_path / "other")) > 1


@pytest.mark.parametrize("strategy", ["top-1", "once", "top-3"])
def test_missing_and_unreadable_experts_are_named_and_left_out(trained, tmp_path, strategy):
    run = copy(trained, tmp_path)
    path = run / "experts" / "0.safetensors"
    whole = path.read_bytes()
    os.remove(path)
    done = sample(run, tmp_path / "two", "--strategy", strategy)
    assert "warning: no expert for cluster 0 of 3: left out" in done.stderr
    texts = texts_in(tmp_path / "two")
    assert len(texts) == 6 and not any(text["experts"].startswith("0:") for text in texts)

    # a copy that was cut short
    path.write_bytes(whole[:-8])
    done = sample(run, tmp_path / "torn", "--strategy", strategy)
    assert "warning: no usable expert for cluster 0 of 3 (" in done.stderr
    assert "0.safetensors is not a model" in done.stderr
    assert np.array_equal(pictures(tmp_path / "two"), pictures(tmp_path / "torn"))

    os.remove(run / "experts" / "1.safetensors")
    sample(run, tmp_path / "left", "--strategy", strategy)
    done = inside("sample.py", "--run-dir", run, "--prompt", "x", "--require-all",
                  "--out", tmp_path / "none")
    assert done.returncode == 2 and not (tmp_path / "none").exists()
    assert "error: no usable expert for clusters 0, 1 of 3 (" in done.stderr

    # the one that is left is the ensemble: whatever the strategy, and also without a router
    os.remove(path)
    os.remove(run / "router.safetensors")
    sample(run, tmp_path / "alone", "--strategy", "full")
    assert np.array_equal(pictures(tmp_path / "left"), pictures(tmp_path / "alone"))


def test_an_expert_that_lacks_a_weight_is_unreadable(trained, tmp_path):
    run = copy(trained, tmp_path)
    path = run / "experts" / "2.safetensors"
    network, info = artifacts.load(path)
    info.pop("model")
    weights = {name: weight.clone() for name, weight in network.state_dict().items()}
    weights.pop("head.bias")
    artifacts.save(path, network.config, weights, **info)
    done = sample(run, tmp_path / "x.png")
    assert "cluster 2 of 3" in done.stderr and "head.bias" in done.stderr


def test_the_monolith_samples_from_its_own_file(trained, tmp_path):
    run = copy(trained, tmp_path)
    for k in range(3):
        os.remove(run / "experts" / f"{k}.safetensors")
    # is the ensemble's
    text = (run / "config.toml").read_text()
    text = text.replace('strategy = "top-1"', 'strategy = "top-2"')
    (run / "config.toml").write_text(text)
    sample(run, tmp_path / "all", "--monolith")
    assert [text["strategy"] for text in texts_in(tmp_path / "all")] == 6 * ["monolith"]


# ---- prompts -------------------------------------------------------------------------------------

def drawn(run, out, *prompts, flags=()):
    """One image of each prompt -> (CompletedProcess, images [P,H,W,3])."""
    args = []
    for prompt in prompts:
        args += ["--prompt", prompt]
    done = inside("sample.py", "--run-dir", run, "--device", "cpu", "--num-images", 1,
                  "--cfg", 20, "--out", out, *args, *flags)
    assert done.returncode == 0, done.stderr
    return done, pictures(out)


def test_prompts_that_look_alike_give_one_image(trained, tmp_path):
    _, found = drawn(trained, tmp_path / "o", "un café", "un cafe\u0301", " Un\u00a0CAF\u00c9\n",
                     "un caf\u00e9\u200b", "un cafe")
    assert all(np.array_equal(found[0], other) for other in found[1:4])
    assert not np.array_equal(found[0], found[4])
    assert texts_in(tmp_path / "o")[2]["prompt"] == "Un CAFÉ"


def test_an_emoji_and_a_vowel_sign_are_part_of_the_prompt(trained, tmp_path):
    done, found = drawn(trained, tmp_path / "o", "", "🎉", "👩🏽\u200d🚀", "बिल्ली", "बल्ला")
    assert len({image.tobytes() for image in found}) == 5 and "warning" not in done.stderr
    assert texts_in(tmp_path / "o")[3]["prompt"] == "बिल्ली"
    assert "👩🏽\u200d🚀" in Image.open(tmp_path / "o" / "grid.png").text["prompt"]


def test_a_prompt_without_a_word_is_named(trained, tmp_path):
    done, found = drawn(trained, tmp_path / "o", "...", "", " ", "a red circle")
    assert "warning: 2 of 4 prompts hold no word, '...' the first" in done.stderr
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[1], found[3])
    done, _ = drawn(trained, tmp_path / "o", "a red circle", flags=["--negative-prompt", "?!"])
    assert "warning: 1 of 2 prompts hold no word, '?!' the first" in done.stderr


def test_a_prompt_that_is_cut_is_said(trained, tmp_path):
    done, found = drawn(trained, tmp_path / "o", "one two three four", "one two three four five",
                        "🎉 🎈 🎁 🎀")
    assert "1 of 3 captions are longer than text.length = 4 words: cut" in done.stderr
    assert np.array_equal(found[0], found[1])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_file_of_prompts_is_read_whatever_editor_wrote_it(trained, tmp_path, encoding):
    text = "un café\r\n\r\n  \t\r\nкрасный круг\r\n🎉"
    (tmp_path / "p.txt").write_bytes(text.encode(encoding))
    drawn(trained, tmp_path / "o", flags=["--prompts", tmp_path / "p.txt"])
    prompts = [text["prompt"] for text in texts_in(tmp_path / "o")]
    assert prompts == ["un café", "красный круг", "🎉"]


# ---- sheets --------------------------------------------------------------------------------------

def grid_of(text, side=16):
    return image_grid([[np.full((side, side, 3), 99, np.uint8)] * 2], [text])


def test_labels_are_cut():
    short = grid_of("a red circle")
    long = grid_of(" ".join(f"word{i}" for i in range(1000)))
    assert short.width < long.width < 7 * 70 + 20
    assert short.height == long.height == 76
    assert grid_of("word " * 1000, side=512).width < 2 * 512 + 450

    font = label_font(12)
    for text in ("a red circle", "", "word " * 99, "🎉" * 999, "बिल्ली " * 99):
        cut = cut_label(text, font, 100)
        assert font.getlength(cut) <= 100 and (cut == text or cut.endswith("..."))


@pytest.mark.parametrize("n, per_row", [(24, 4), (25, 1), (1000, 1), (128, 8)])
def test_a_sheet_of_many_rows_is_about_as_wide_as_high(n, per_row):
    image = np.full((16, 16, 3), 99, np.uint8)
    sheet = image_grid([[image] * per_row] * n, ["a long prompt that will be cut " * 9] * n)
    assert 0.4 < sheet.width / sheet.height < 2.5, sheet.size


def test_labels_have_the_letters():
    pytest.importorskip("matplotlib")
    image = np.zeros((16, 16, 3), np.uint8)
    # all differ, also from the box of a letter that a font lacks
    letters = "eéěęèèñÅøßçğżжщЯλΩאع\U0010ffff"
    labels = {image_grid([[image]], [letter]).crop((0, 0, 20, 76)).tobytes() for letter in letters}
    assert len(labels) == len(set(letters))

    # whatever it looks like
    for text in ("बिल्ली", "猫と犬", "🎉👩🏽\u200d🚀", "مرحبا", "\u0301", "a\u200bb"):
        assert image_grid([[image]], [text], [[0]]).height > 64


def test_without_matplotlib_labels_are_drawn_in_pillow_s_font(monkeypatch):
    monkeypatch.setattr(sheets.importlib.util, "find_spec", lambda name: None)
    label_font.cache_clear()
    try:
        image = np.zeros((16, 16, 3), np.uint8)
        assert image_grid([[image]], ["un café, красный круг 🎉"], [[3]]).width > 100
    finally:
        label_font.cache_clear()


def test_routing_sheet_shows_probabilities_as_heights_and_times_as_widths():
    row = RoutingRow("title", images=[(0.0, np.full((8, 8, 3), 200, np.uint8))])
    # t from 1 to 0.75: 1/4 and 3/4; from there to 0: the second expert alone
    row.path.append(Step(1.0, p=[0.25, 0.75], weights=[0.0, 1.0]))
    row.path.append(Step(0.75, p=[0.0, 1.0], weights=[0.0, 1.0]))
    sheet = np.asarray(routing_sheet([row], 2)).astype(int)

    def pixels_of(k):
        """Where the sheet, without the legend, has expert k's colour."""
        colour = np.array(Image.new("RGB", (1, 1), sheets.COLOURS[k]))[0, 0]
        return (sheet[58:] == colour).all(2)

    first = pixels_of(0)
    second = pixels_of(1)
    width = sheet.shape[1]
    assert first.any(0).sum() == pytest.approx(width / 4, abs=4)
    assert first.any(1).sum() == 10
    assert second[:, width // 10].sum() == 30 + 10
    assert second[:, width // 2].sum() == 40 + 10


def test_show_routing_writes_a_sheet_and_changes_nothing_else(mixed, tmp_path):
    plain = sample(mixed, tmp_path / "a")
    shown = sample(mixed, tmp_path / "b", "--show-routing")
    assert np.array_equal(pictures(tmp_path / "a"), pictures(tmp_path / "b"))
    assert COST.search(plain.stdout).groups() == COST.search(shown.stdout).groups()
    assert "routing and predictions of 6 in" in shown.stdout

    sample(mixed, tmp_path / "c.png", "--show-routing", "--strategy", "oracle-0")
    sample(mixed, tmp_path / "d.png", "--show-routing", "--monolith")
    for name in ("b/routing.png", "c.routing.png", "d.routing.png"):
        assert Image.open(tmp_path / name).width > 600


# ---- the places of output ------------------------------------------------------------------------

def test_images_of_an_earlier_call_are_replaced_and_others_are_left(trained, tmp_path):
    out = tmp_path / "o"
    sample(trained, out, "--show-routing")
    mine = ["0001.txt", "expert-0-00000100.png", "grid.json", "mine.png"]
    for name in mine:
        (out / name).write_bytes(b"mine")

    done, _ = drawn(trained, out, "a green square", "a white cross")
    assert "2 images in" in done.stdout and "in place of 6 of an earlier call" in done.stdout
    assert sorted(os.listdir(out)) == sorted(["0000.png", "0001.png", "grid.png", *mine])
    assert (out / "mine.png").read_bytes() == b"mine"
    assert texts_in(out)[1]["prompt"] == "a white cross"

    done = sample(trained, out, ranks=2)
    assert len(pictures(out)) == 6 and "in place of 2 of an earlier call" in done.stdout

    # beside one grid, what it was accompanied by
    sample(trained, tmp_path / "g.png", "--show-routing")
    sample(trained, tmp_path / "g.png")
    assert sorted(path.name for path in tmp_path.glob("g*")) == ["g.png"]


@pytest.mark.parametrize("name", ["0007.png", "12345.png", "grid.png", "routing.png"])
def test_a_folder_with_other_people_s_images_is_refused(trained, tmp_path, name):
    out = tmp_path / "o"
    sample(trained, out)
    Image.new("RGB", (8, 8)).save(out / name)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    done = inside("sample.py", "--run-dir", trained, "--device", "cpu", "--prompt", "x",
                  "--out", out)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"holds {name}, which sample.py has not made (1 such" in done.stderr
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


REFUSED = [
    ("folder.png", "is a folder"),
    ("file", "it is a file"),
    ("link", "a link to nothing"),
    ("file/x", "a part of this path is a file"),
    ("file/x.png", "it is a file"),
    ("fifo.png", "no ordinary file"),
    ("x" * 300, "shorter name"),
    ("x" * 250 + ".png", "shorter name"),
    ("beside.png", "beside.routing.png is a folder"),
    ("x.tiff", "ends in .png"),
]


def test_what_the_file_system_refuses_is_said_before_the_work(trained, tmp_path, monkeypatch):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "beside.routing.png").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo.png")
    before = sorted(os.listdir(tmp_path))

    # would sample
    monkeypatch.setattr(Ensemble, "velocity", None)
    flags = ["--run-dir", trained, "--device", "cpu", "--prompt", "x"]
    for out, says in REFUSED:
        done = inside("sample.py", *flags, "--show-routing", "--out", tmp_path / out)
        lines = done.stderr.splitlines()
        assert done.returncode == 2 and len(lines) == 1, done.stderr
        assert lines[0].startswith("error: ") and says in lines[0], done.stderr
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == before

    done = command("sample.py", *flags, "--out", tmp_path / "file", ranks=2, check=False)
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "peer" not in done.stderr and "sampling" not in done.stderr


@pytest.mark.parametrize("strategy", ["full", "oracle-0"])
def test_a_damaged_expert_is_named_before_it_samples(trained, tmp_path, strategy):
    run = copy(trained, tmp_path)
    path = run / "experts" / "0.safetensors"
    spoilt = bytearray(path.read_bytes())
    spoilt[-4000:] = b"\xff" * 4000
    path.write_bytes(spoilt)
    done = inside("sample.py", "--run-dir", run, "--device", "cpu", "--prompt", "a red circle",
                  "--strategy", strategy, "--out", tmp_path / "x.png")
    assert done.returncode == 2 and "copy it again" in done.stderr
    assert "experts/0.safetensors is damaged, its weights" in done.stderr
