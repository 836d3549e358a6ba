"""Stage 4: the ensemble of a run under every strategy, its engine, and sample.py."""
import collections
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import command, copy, give, inside, pictures, rewrite, sample, works
from PIL import Image

import data
import flow
import sample as script
from ddm.errors import UserError
from ddm.config import make_config
from ddm.pictures import cut_label, label_font, picture_grid
from ddm.ensemble import Ensemble
from ddm import artifacts
import ddm.text

CPU = torch.device("cpu")
STRATEGIES = ("full", "top-1", "top-2", "sample-1", "sample-2", "threshold-0.3", "nucleus-0.9", "once", "oracle-1")
TEXTS = ("a red circle", "a blue cross", "a white square", "")


def settings(**values):
    return make_config({f"sample.{key}": value for key, value in ({"strategy": "full", "cfg": 3.0} | values).items()}).sample


def condition(texts=TEXTS):
    return torch.stack([ddm.text.hash_words(text, 4, 64) for text in texts])


def start(n=4, calls=5, K=3, seed=0):
    return script.beginnings(range(seed, seed + n), (3, 8, 8), calls, K)


def draw(team, steps=5, c=None, c_null=None, labels=None, n=4, **values):
    """-> (x_0, Velocity) of the four texts under settings(**values)."""
    s, c = settings(**values), condition() if c is None else c
    x, u = start(n, flow.evaluations(steps, s.solver))
    velocity = team.velocity(s, c, c_null, u, labels)
    *_, x = flow.integrate(velocity, x, flow.time_grid(steps), s.solver)
    return x, velocity


def spread(run, sharpness=2.0):
    """Makes the router of a run, which six steps have taught little, prefer different experts for different samples: random, centred logits."""
    path = run / "router.safetensors"
    router, info = artifacts.load(path)
    info.pop("model")
    x, t, c = start(64)[0], torch.ones(64), condition(16 * TEXTS)
    with torch.no_grad():
        torch.manual_seed(2)
        for block in router.blocks:
            block.adaLN[1].weight.normal_(std=0.2)
            block.cross.proj.weight.normal_(std=0.2)
        features = router.trunk(x, t, c, router.cls_token)[:, 0]
        head = torch.randn(3, features.shape[1])
        head *= sharpness / (features @ head.T).std(0)[:, None]
        router.head.weight.copy_(head)
        router.head.bias.copy_(-(features @ head.T).mean(0))
    artifacts.save(path, router.config, router.state_dict(), **info)
    return run


@pytest.fixture(scope="module")
def mixed(trained, tmp_path_factory):
    """A run whose experts differ in size, objective and path, and whose router is of different minds. Do not change it."""
    run = spread(copy(trained, tmp_path_factory.mktemp("mixed")))
    for k, flags in ((1, ["--flow.objective", "eps", "--flow.path", "cosine", "--model.dim", 48, "--model.depth", 2]),
                     (2, ["--flow.objective", "velocity", "--flow.path", "ddpm", "--model.patch", 4])):
        shutil.rmtree(run / "checkpoints" / f"expert-{k}")
        command("train_expert.py", "--run-dir", run, "--shard", k, *flags)
    return run


def assert_same(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- strategies ---------------------------------------------------------------------------------------------------

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
    c, t = condition(), torch.full((4,), 0.7)
    with torch.no_grad():
        branch = [sum(p[:, k].view(-1, 1, 1, 1) * team.expert_velocity(k, x, t, cc) for k in range(3))
                  for cc in (c, torch.zeros_like(c)) for p in (team.route(x, t, c),)]
        own = [sum(team.route(x, t, cc)[:, k].view(-1, 1, 1, 1) * team.expert_velocity(k, x, t, cc) for k in range(3)) for cc in (c, torch.zeros_like(c))]
    shared_v = team.velocity(settings(), c)(x, 0.7)
    own_v = team.velocity(settings(cfg_routing="own"), c)(x, 0.7)
    assert_same(shared_v, branch[1] + 3 * (branch[0] - branch[1]))
    assert_same(own_v, own[1] + 3 * (own[0] - own[1]))
    assert (shared_v - own_v).abs().max() > 0.01


def test_oracle_and_labels_are_those_experts_alone(mixed):
    team = Ensemble(mixed, CPU)
    labels = torch.tensor([2, 0, 1, 0])
    x, velocity = draw(team, labels=labels)
    assert torch.equal(velocity.used, 5 * torch.nn.functional.one_hot(labels, 3).float()) and not team.forwards["router"]
    for k in range(3):
        alone, _ = draw(team, strategy=f"oracle-{k}")
        assert_same(alone[labels == k], x[labels == k])


def test_a_velocity_can_teach_a_student_and_a_label_without_an_expert_is_named(mixed, tmp_path):
    run = copy(mixed, tmp_path)
    os.remove(run / "experts" / "2.safetensors")
    team, (x, _), c = Ensemble(run, CPU), start(), condition()
    student = torch.nn.Parameter(torch.zeros_like(x))
    torch.nn.functional.mse_loss(student, team.velocity(settings(), c, labels=torch.tensor([0, 1, 1, 0]))(x, 0.5)).backward()
    assert student.grad.abs().max() > 0 and not any(p.requires_grad for p in team.expert(0).parameters())
    with pytest.raises(UserError, match="labels 2: there are experts for 0, 1 of 3 clusters"):
        team.velocity(settings(), c, labels=torch.tensor([0, 2, 1, 0]))


def test_temperature_divides_the_router_s_logits(mixed):
    team = Ensemble(mixed, CPU)
    x, t, c = start()[0], torch.ones(4), condition()
    p = team.route(x, t, c)
    assert_same(team.route(x, t, c, 2.0), p.sqrt() / p.sqrt().sum(1, keepdim=True))
    assert torch.equal(draw(team, strategy="top-1", router_temperature=50.0)[0], draw(team, strategy="top-1")[0])
    assert_same(draw(team, strategy="full", router_temperature=1e-6)[0], draw(team, strategy="top-1")[0])
    assert_same(draw(team, strategy="sample-1", router_temperature=1e-6)[0], draw(team, strategy="top-1")[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_image_is_the_same_in_any_batch(mixed, strategy):
    team = Ensemble(mixed, CPU)
    whole, _ = draw(team, strategy=strategy)
    for i in range(4):
        s, (x, u) = settings(strategy=strategy), start(1, 5, seed=i)
        *_, x = flow.integrate(team.velocity(s, condition()[i:i + 1], None, u), x, flow.time_grid(5))
        assert_same(x[0], whole[i])


def test_the_numbers_that_draw_are_the_image_s_own_and_new_at_each_step(mixed):
    team = Ensemble(mixed, CPU)
    _, velocity = draw(team, 50, strategy="sample-1", router_temperature=100.0)        # nearly even
    assert (velocity.used > 5).all() and len({tuple(row.tolist()) for row in velocity.used}) > 1


# ---- what is run --------------------------------------------------------------------------------------------------

def counted(team):
    """The sizes of the batches that each expert and the router run."""
    batches = collections.defaultdict(list)
    for name in (*team.paths, "router"):
        network = team.expert(name) if name != "router" else team.router
        network.register_forward_pre_hook(lambda module, args, name=name: batches[name].append(len(args[0])))
    return batches


@pytest.mark.parametrize("strategy, experts, questions", [
    ("full", 3, 5), ("top-1", 1, 5), ("top-2", 2, 5), ("sample-1", 1, 5), ("sample-2", 2, 5), ("threshold-0", 3, 5), ("threshold-1", 1, 5),
    ("nucleus-0.9", 1, 5), ("once", 1, 1), ("oracle-2", 1, 0)])
@pytest.mark.parametrize("routing", ["shared", "own"])
def test_a_strategy_runs_as_many_forwards_as_its_table_says(mixed, strategy, experts, questions, routing):
    """Per sample and step, both branches of guidance: 2 `experts`; and each expert runs once a step, on both."""
    team = Ensemble(mixed, CPU)
    batches = counted(team)
    _, velocity = draw(team, strategy=strategy, cfg_routing=routing)
    kept = strategy in ("once", "oracle-2")
    assert len(batches["router"]) == questions * (2 if routing == "own" and not kept else 1) and sum(batches["router"]) == 4 * len(batches["router"])
    assert sum(sum(batches[k]) for k in range(3)) == 5 * 4 * 2 * experts
    assert all(len(batches[k]) <= 5 for k in range(3)) and (routing == "own" or all(n % 2 == 0 for k in range(3) for n in batches[k]))
    assert {name: sum(sizes) for name, sizes in batches.items() if sizes} == dict(team.forwards)
    assert team.flops() == sum(sum(sizes) * (team.router if name == "router" else team.expert(name)).flops() for name, sizes in batches.items())
    if kept:
        assert sorted(set(velocity.used.flatten().tolist())) == [0.0, 5.0]


def test_once_keeps_the_drawn_expert_in_both_branches(mixed):
    team = Ensemble(mixed, CPU)
    own, shared = (draw(team, strategy="once", cfg_routing=routing)[0] for routing in ("own", "shared"))
    assert torch.equal(own, shared)


def test_the_router_is_asked_every_m_forwards(mixed):
    team = Ensemble(mixed, CPU)
    batches = counted(team)
    x, _ = draw(team, 10, strategy="top-1", route_every=4, route_epsilon=0.0)
    assert batches["router"] == [4, 4, 4]       # at forwards 0, 4 and 8
    # the steps between follow the last answer
    c, seen = condition(), []
    asked = {}
    def velocity(x_t, time):
        if len(seen) % 4 == 0:
            asked["weights"] = flow.top_k(team.route(x_t, torch.full((4,), time), c), 1)
        seen.append(time)
        t, w = torch.full((4,), time), asked["weights"]
        v = [flow.ensemble(w, team.expert_velocity, x_t, t, cc) for cc in (c, torch.zeros_like(c))]
        return flow.guide(*v, 3.0)
    with torch.inference_mode():
        *_, by_hand = flow.integrate(velocity, start(calls=10)[0], flow.time_grid(10))
    assert_same(x, by_hand)
    batches.clear()
    draw(team, 10, strategy="top-1", route_every=4, route_epsilon=0.0, cfg_routing="own", cfg_high=0.95)
    assert batches["router"] == [4, 4, 4, 4, 4, 4]      # the unconditional branch at forwards 1 (the first guided one), 4 and 8


def test_the_router_is_off_for_a_sample_once_it_is_sure(mixed):
    """Sample 0 is sure from the start, sample 1 from t = 0.5 on, the others never."""
    team = Ensemble(mixed, CPU)
    asked = []

    def route(x_t, t, c, temperature):
        rows = [TEXTS.index(text) for text in TEXTS for row in c if torch.equal(row, condition([text])[0])]
        asked.append((round(t[0].item(), 2), rows))
        sure = torch.tensor([row == 0 or row == 1 and t[0] <= 0.5 for row in rows])
        return torch.where(sure[:, None], torch.tensor([[0.0004, 0.9995, 0.0001]]), torch.tensor([[0.3, 0.3, 0.4]]))

    team.route = route
    _, velocity = draw(team, 10, strategy="full", route_every=2, route_epsilon=0.001)
    assert asked == [(1.0, [0, 1, 2, 3]), (0.8, [1, 2, 3]), (0.6, [1, 2, 3]), (0.4, [1, 2, 3]), (0.2, [2, 3])]
    assert_same(velocity.used[0], torch.tensor([0.0, 10.0, 0.0]))     # that expert alone, though the strategy is full
    assert_same(velocity.used[1], torch.tensor([0.3 * 6, 0.3 * 6 + 4, 0.4 * 6]))
    asked.clear()
    draw(team, 10, strategy="full")
    assert len(asked) == 10 and all(len(rows) == 4 for _, rows in asked)        # not unless route_every asks for it


def test_guidance_interval_runs_one_branch_outside_and_leaves_the_inside_alone(mixed):
    team = Ensemble(mixed, CPU)
    batches = counted(team)
    velocity = team.velocity(settings(cfg_low=0.3, cfg_high=0.7), condition())      # times as a grid has them, with their rounding
    plain, guided = team.velocity(settings(cfg=1.0), condition()), team.velocity(settings(), condition())
    x, _ = start()
    for time in flow.time_grid(10).tolist():
        assert_same(velocity(x, time), (guided if 0.29 < time < 0.71 else plain)(x, time))
    batches.clear()
    team.velocity(settings(cfg_high=0.5), condition())(x, 0.6)
    assert batches[0] == batches[1] == batches[2] == [4]


def test_a_negative_prompt_takes_the_place_of_no_condition(mixed, tmp_path):
    team = Ensemble(mixed, CPU)
    x, c, c_null = start()[0], condition(), condition(["a green cross"]).expand(4, -1)
    v = team.velocity(settings(cfg=2.5, strategy="oracle-1"), c, c_null)(x, 0.6)
    t = torch.full((4,), 0.6)
    with torch.no_grad():
        v_c, v_n = (team.expert_velocity(1, x, t, cc) for cc in (c, c_null))
    assert_same(v, v_n + 2.5 * (v_c - v_n))
    sample(mixed, tmp_path / "with", "--negative-prompt", "a green cross", "--seed", 3)
    sample(mixed, tmp_path / "without", "--seed", 3)
    assert np.abs(pictures(tmp_path / "with") - pictures(tmp_path / "without")).max() > 1
    assert Image.open(tmp_path / "with" / "0000.png").text["negative prompt"] == "a green cross"


# ---- experts of different kinds -----------------------------------------------------------------------------------

def test_experts_of_other_size_objective_and_path_make_one_velocity(mixed):
    team = Ensemble(mixed, CPU)
    kinds = {k: (info["objective"], info["path"], info["model"]["dim"], info["model"]["patch"]) for k, info in team.infos.items()}
    assert kinds == {0: ("x0", "linear", 32, 2), 1: ("eps", "cosine", 48, 2), 2: ("velocity", "ddpm", 32, 4)}
    x, c, t = start()[0], condition(), torch.tensor([0.2, 0.5, 0.9, 1.0])
    with torch.no_grad():
        for k in range(3):
            # by hand: the expert's own time and scale of the same signal-to-noise ratio
            s = t if k == 0 else flow.same_snr(kinds[k][1], t)
            alpha, sigma = (a.view(-1, 1, 1, 1) for a in flow.alpha_sigma(kinds[k][1], s))
            tt = t.view(-1, 1, 1, 1)
            seen = x * ((alpha ** 2 + sigma ** 2) / ((1 - tt) ** 2 + tt ** 2)).sqrt()
            out = team.expert(k)(seen, s, c)
            if k == 0:
                v = (x - out) / tt
            elif k == 1:
                v = out - ((x - tt * out) / (1 - tt).clamp(min=0.05)).clamp(-1, 1)
            else:
                v = (sigma * seen + alpha * out) - (alpha * seen - sigma * out).clamp(-1, 1)
            assert_same(team.expert_velocity(k, x, t, c), v, 2e-2 if k == 2 else 1e-3)     # ddpm's time ends just short of noise


# ---- the engine ---------------------------------------------------------------------------------------------------

def test_resident_bounds_what_is_loaded_and_changes_nothing(mixed):
    x, _ = draw(Ensemble(mixed, CPU), strategy="full")
    for resident, loads in ((0, 3), (1, 3 + 4 * 2), (2, 3 + 4 * 1), (3, 3)):      # those on the device go first: K - N loads a step
        team, most = Ensemble(mixed, CPU, resident=resident), []
        load = team._load
        team._load = lambda path, name: (name == "router" or most.append(len(team.loaded) + 1), load(path, name))[1]
        assert_same(draw(team, strategy="full")[0], x)
        assert max(most) <= (resident or 3) and len(most) == loads
    assert not Ensemble(mixed, CPU).loaded      # nothing before it is needed


def test_weights_on_a_cpu_are_mapped_from_the_file_and_let_go_at_once(mixed, tmp_path):
    run = copy(mixed, tmp_path)
    path = str(run / "experts" / "0.safetensors")
    team = Ensemble(run, CPU, resident=1)
    mapped = lambda: path in open("/proc/self/maps").read()
    assert not mapped()
    team.expert(0)
    assert mapped()
    team.expert(1)
    assert not mapped()


def test_bf16_weights_give_nearly_the_pictures_of_fp32(mixed):
    fp32, _ = draw(Ensemble(mixed, CPU), strategy="once")
    team = Ensemble(mixed, CPU, precision="bf16")
    bf16, _ = draw(team, strategy="once")
    assert {p.dtype for p in team.expert(0).parameters()} == {torch.bfloat16} and bf16.dtype == torch.float32
    error = (fp32 - bf16).square().mean().sqrt() / fp32.square().mean().sqrt()
    assert 0 < error < 0.05


@pytest.mark.skipif(not works("g++", "--version"), reason="torch.compile needs a C++ compiler; bench/sample.py and bench/train_step.py compile, too")
def test_compiled_models_give_the_same_pictures(mixed):
    torch._dynamo.utils.counters.clear()
    plain, _ = draw(Ensemble(mixed, CPU), 2, strategy="once")
    team = Ensemble(mixed, CPU, compile=True)
    compiled, _ = draw(team, 2, strategy="once")
    assert_same(plain, compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


# ---- the command --------------------------------------------------------------------------------------------------

def test_samples_carry_how_they_were_made(trained, tmp_path):
    sample(trained, tmp_path / "out", "--seed", 5, "--cfg", 2, "--strategy", "top-2", "--solver", "heun", ranks=0)
    assert sorted(os.listdir(tmp_path / "out")) == [f"{i:04d}.png" for i in range(6)] + ["grid.png"]
    for i, prompt, seed in ((0, "a red circle", 5), (4, "a blue cross", 6)):
        text = Image.open(tmp_path / "out" / f"{i:04d}.png").text
        assert (text["prompt"], text["seed"], text["strategy"], text["guidance"], text["steps"], text["solver"]) == \
            (prompt, str(seed), "top-2", "2.0", "4", "heun")
        assert text["precision"] == "fp32"      # of the weights, resolved
    sample(trained, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").text["prompt"] == "a red circle | a blue cross"
    # the image's own seed gives it again, alone
    inside("sample.py", "--run-dir", trained, "--prompt", "a blue cross", "--num-images", 1, "--seed", 6, "--cfg", 2, "--strategy", "top-2",
           "--solver", "heun", "--out", tmp_path / "one", "--device", "cpu")
    assert np.abs(pictures(tmp_path / "one")[0] - pictures(tmp_path / "out")[4]).max() <= 1


@pytest.mark.parametrize("strategy", ["top-1", "once", "sample-1"])
def test_batch_size_resident_experts_and_ranks_do_not_matter(mixed, tmp_path, strategy):
    sample(mixed, tmp_path / "one", "--strategy", strategy)
    expected, texts = pictures(tmp_path / "one"), [Image.open(p).text for p in sorted((tmp_path / "one").glob("0*.png"))]
    assert len({text["experts"] for text in texts}) > 1
    for name, flags, ranks in (("batch", ["--batch", 2], None), ("resident", ["--resident", 1], None), ("ranks", [], 2)):
        done = sample(mixed, tmp_path / name, "--strategy", strategy, *flags, ranks=ranks)
        assert np.abs(pictures(tmp_path / name) - expected).max() <= 1
        assert [Image.open(p).text for p in sorted((tmp_path / name).glob("0*.png"))] == texts
        assert np.abs(np.asarray(Image.open(tmp_path / name / "grid.png")).astype(int) - np.asarray(Image.open(tmp_path / "one" / "grid.png"))).max() <= 1
        assert done.stdout.count("6 pictures in") == 1


def test_more_ranks_than_pictures(mixed, tmp_path):
    command("sample.py", "--run-dir", mixed, "--prompt", "x", "--num-images", 1, "--strategy", "once", "--out", tmp_path / "x.png", ranks=2)
    assert (tmp_path / "x.png").exists()


def test_the_end_says_what_it_cost(mixed, tmp_path):
    first, expert, third, router = (artifacts.load(mixed / name)[0].flops() for name in
                                    ("experts/0.safetensors", "experts/1.safetensors", "experts/2.safetensors", "router.safetensors"))
    said = lambda *flags: re.search(r"per sample: ([\d.]+) of experts, ([\d.]+) of the router; (\S+) GFLOPs per image, (\S+) times a single expert's; \S+ images/s",
                                    sample(mixed, tmp_path / "x.png", *flags).stdout).groups()
    assert said("--strategy", "full")[:2] == ("24.0", "4.0")
    assert float(said("--strategy", "full")[2]) == pytest.approx((8 * (first + expert + third) + 4 * router) / 1e9, rel=1e-3)
    assert said("--strategy", "top-1", "--cfg-routing", "own", "--solver", "heun")[:2] == ("14.0", "14.0")
    assert said("--strategy", "once", "--solver", "ab2", "--cfg", 1)[:2] == ("4.0", "1.0")
    experts, routers, gflops, times = said("--strategy", "oracle-1", "--show-routing")
    assert (experts, routers, times) == ("8.0", "0.0", "1.000") and float(gflops) == pytest.approx(8 * expert / 1e9, rel=1e-3)
    assert float(said("--strategy", "top-1", "--route-every", 2, "--route-epsilon", 0)[1]) == 2
    assert said("--monolith")[:2] == ("8.0", "0.0")
    mean = (first + expert + third) / 3
    assert float(said("--strategy", "full", "--cfg-high", 0.6)[3]) == pytest.approx((3 * 6 * mean + 4 * router) / (6 * mean), rel=1e-3)    # t = 1, .75, .5, .25


def test_shift_moves_the_times_of_the_solver_and_is_the_experts_own_by_default(trained, tmp_path):
    run = copy(trained, tmp_path)
    for path in run.rglob("[0-9].safetensors"):
        rewrite(path, shift=3.0)
    for name, flags in (("a", []), ("b", ["--shift", 3.0]), ("c", ["--shift", 1.0])):
        sample(run, tmp_path / name, *flags)
    assert np.array_equal(pictures(tmp_path / "a"), pictures(tmp_path / "b"))
    assert np.abs(pictures(tmp_path / "a") - pictures(tmp_path / "c")).max() > 1


@pytest.mark.parametrize("strategy", ["top-1", "once", "top-3"])
def test_missing_and_unreadable_experts_are_named_and_left_out(trained, tmp_path, strategy):
    run = copy(trained, tmp_path)
    path = run / "experts" / "0.safetensors"
    whole = path.read_bytes()
    os.remove(path)
    done = sample(run, tmp_path / "two", "--strategy", strategy)
    assert "warning: no expert for cluster 0 of 3: left out" in done.stderr and len(pictures(tmp_path / "two")) == 6
    assert all("0:" not in Image.open(p).text["experts"].split()[0] for p in (tmp_path / "two").glob("0*.png"))
    path.write_bytes(whole[:-8])        # a copy that was cut short
    done = sample(run, tmp_path / "torn", "--strategy", strategy)
    assert "warning: no usable expert for cluster 0 of 3 (" in done.stderr and "0.safetensors is not a model" in done.stderr
    assert np.array_equal(pictures(tmp_path / "two"), pictures(tmp_path / "torn"))
    os.remove(run / "experts" / "1.safetensors")
    sample(run, tmp_path / "left", "--strategy", strategy)
    done = inside("sample.py", "--run-dir", run, "--prompt", "x", "--require-all", "--out", tmp_path / "none")
    assert done.returncode == 2 and "error: no usable expert for clusters 0, 1 of 3 (" in done.stderr and not (tmp_path / "none").exists()
    os.remove(path)
    # the one that is left is the ensemble: whatever the strategy, and also without a router
    os.remove(run / "router.safetensors")
    sample(run, tmp_path / "alone", "--strategy", "full")
    assert np.array_equal(pictures(tmp_path / "left"), pictures(tmp_path / "alone"))


def test_an_expert_that_lacks_a_weight_is_unreadable(trained, tmp_path):
    run = copy(trained, tmp_path)
    path = run / "experts" / "2.safetensors"
    network, info = artifacts.load(path)
    info.pop("model")
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    weights.pop("head.bias")
    artifacts.save(path, network.config, weights, **info)
    assert "cluster 2 of 3" in (text := sample(run, tmp_path / "x.png").stderr) and "head.bias" in text


def test_the_monolith_samples_from_its_own_file(trained, tmp_path):
    run = copy(trained, tmp_path)
    for k in range(3):
        os.remove(run / "experts" / f"{k}.safetensors")
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace('strategy = "top-1"', 'strategy = "top-2"'))      # is the ensemble's
    sample(run, tmp_path / "all", "--monolith")
    assert len(pictures(tmp_path / "all")) == 6 and Image.open(tmp_path / "all" / "0000.png").text["strategy"] == "monolith"


# ---- prompts ------------------------------------------------------------------------------------------------------

def drawn(run, out, *prompts, flags=()):
    """One image of each prompt -> (CompletedProcess, images [P,H,W,3])."""
    args = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    done = inside("sample.py", "--run-dir", run, "--device", "cpu", "--num-images", 1, "--cfg", 20, "--out", out, *args, *flags)
    assert done.returncode == 0, done.stderr
    return done, pictures(out)


def test_prompts_that_look_alike_give_one_image(trained, tmp_path):
    _, found = drawn(trained, tmp_path / "o", "un café", "un cafe\u0301", " Un\u00a0CAF\u00c9\n", "un caf\u00e9\u200b", "un cafe")
    assert all(np.array_equal(found[0], other) for other in found[1:4]) and not np.array_equal(found[0], found[4])
    assert Image.open(tmp_path / "o" / "0002.png").text["prompt"] == "Un CAFÉ"


def test_an_emoji_and_a_vowel_sign_are_part_of_the_prompt(trained, tmp_path):
    done, found = drawn(trained, tmp_path / "o", "", "🎉", "👩🏽\u200d🚀", "बिल्ली", "बल्ला")
    assert len({image.tobytes() for image in found}) == 5 and "warning" not in done.stderr
    assert Image.open(tmp_path / "o" / "0003.png").text["prompt"] == "बिल्ली"
    assert "👩🏽\u200d🚀" in Image.open(tmp_path / "o" / "grid.png").text["prompt"]


def test_a_prompt_without_a_word_is_named(trained, tmp_path):
    done, found = drawn(trained, tmp_path / "o", "...", "", " ", "a red circle")
    assert "warning: 2 of 4 prompts hold no word, '...' the first" in done.stderr
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[1], found[3])
    done, _ = drawn(trained, tmp_path / "o", "a red circle", flags=["--negative-prompt", "?!"])
    assert "warning: 1 of 2 prompts hold no word, '?!' the first" in done.stderr


def test_a_prompt_that_is_cut_is_said(trained, tmp_path):
    done, found = drawn(trained, tmp_path / "o", "one two three four", "one two three four five", "🎉 🎈 🎁 🎀")
    assert "1 of 3 captions are longer than text.length = 4 words: cut" in done.stderr and np.array_equal(found[0], found[1])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_file_of_prompts_is_read_whatever_editor_wrote_it(trained, tmp_path, encoding):
    (tmp_path / "p.txt").write_bytes("un café\r\n\r\n  \t\r\nкрасный круг\r\n🎉".encode(encoding))
    drawn(trained, tmp_path / "o", flags=["--prompts", tmp_path / "p.txt"])
    assert [Image.open(path).text["prompt"] for path in sorted((tmp_path / "o").glob("0*.png"))] == ["un café", "красный круг", "🎉"]


# ---- pictures -----------------------------------------------------------------------------------------------------

def test_labels_are_cut_and_a_sheet_stays_as_wide_as_high():
    image = np.full((16, 16, 3), 99, np.uint8)
    short, long = (picture_grid([[image, image]], [text]) for text in ("a red circle", " ".join(f"word{i}" for i in range(1000))))
    assert short.width < long.width < 7 * 70 + 20 and short.height == long.height == 76
    large = picture_grid([[np.zeros((512, 512, 3), np.uint8)]], ["word " * 1000])
    assert large.width < 512 + 450
    for n, per_row in ((24, 4), (25, 1), (1000, 1), (128, 8)):
        sheet = picture_grid([[image] * per_row] * n, ["a long prompt that will be cut " * 9] * n)
        assert 0.4 < sheet.width / sheet.height < 2.5, (n, per_row, sheet.size)
    font = label_font(12)
    for text in ("a red circle", "", "word " * 99, "🎉" * 999, "बिल्ली " * 99):
        cut = cut_label(text, font, 100)
        assert font.getlength(cut) <= 100 and (cut == text or cut.endswith("..."))


def test_labels_have_the_letters():
    pytest.importorskip("matplotlib")
    image, letters = np.zeros((16, 16, 3), np.uint8), "eéěęèèñÅøßçğżжщЯλΩאع"
    drawn = {letter: picture_grid([[image]], [letter]).crop((0, 0, 20, 76)).tobytes() for letter in letters + "\U0010ffff"}
    # all differ, also from the box of a letter that a font lacks
    assert len(set(drawn.values())) == len(drawn)
    for text in ("बिल्ली", "猫と犬", "🎉👩🏽\u200d🚀", "مرحبا", "\u0301", "a\u200bb"):
        assert picture_grid([[image]], [text], [[0]]).height > 64      # whatever it looks like


def test_without_matplotlib_labels_are_drawn_in_pillow_s_font(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    label_font.cache_clear()
    try:
        assert picture_grid([[np.zeros((16, 16, 3), np.uint8)]], ["un café, красный круг 🎉"], [[3]]).width > 100
    finally:
        label_font.cache_clear()


# ---- the places of output -----------------------------------------------------------------------------------------

def test_images_of_an_earlier_call_are_replaced_and_others_are_left(trained, tmp_path):
    out = tmp_path / "o"
    sample(trained, out, "--show-routing")
    for name in ("mine.png", "0001.txt", "grid.json", "expert-0-00000100.png"):
        (out / name).write_bytes(b"mine")
    done = drawn(trained, out, "a green square", "a white cross")[0]
    assert "2 pictures in" in done.stdout and "in place of 6 of an earlier call" in done.stdout
    assert sorted(os.listdir(out)) == ["0000.png", "0001.png", "0001.txt", "expert-0-00000100.png", "grid.json", "grid.png", "mine.png"]
    assert (out / "mine.png").read_bytes() == b"mine" and Image.open(out / "0001.png").text["prompt"] == "a white cross"
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
    done = inside("sample.py", "--run-dir", trained, "--device", "cpu", "--prompt", "x", "--out", out)
    assert done.returncode == 2 and f"holds {name}, which sample.py has not made (1 such" in done.stderr and len(done.stderr.splitlines()) == 1
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_what_the_file_system_refuses_is_said_before_the_work(trained, tmp_path, monkeypatch):
    for folder in ("folder.png", "beside.routing.png"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo.png")
    monkeypatch.setattr(Ensemble, "velocity", None)     # would draw
    for out, says in (("folder.png", "is a folder"), ("file", "it is a file"), ("link", "a link to nothing"), ("file/x", "a part of this path is a file"),
                      ("file/x.png", "it is a file"), ("fifo.png", "no ordinary file"), ("x" * 300, "shorter name"), ("x" * 250 + ".png", "shorter name"),
                      ("beside.png", "beside.routing.png is a folder"), ("x.tiff", "ends in .png")):
        done = inside("sample.py", "--run-dir", trained, "--device", "cpu", "--prompt", "x", "--show-routing", "--out", tmp_path / out)
        lines = done.stderr.splitlines()
        assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], done.stderr
    assert (tmp_path / "file").read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["beside.routing.png", "fifo.png", "file", "folder.png", "link"]
    done = command("sample.py", "--run-dir", trained, "--device", "cpu", "--prompt", "x", "--out", tmp_path / "file", ranks=2, check=False)
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] and "peer" not in done.stderr and "sampling" not in done.stderr


def test_show_routing_writes_a_picture_and_changes_nothing_else(mixed, tmp_path):
    a = sample(mixed, tmp_path / "a")
    b = sample(mixed, tmp_path / "b", "--show-routing")
    sample(mixed, tmp_path / "c.png", "--show-routing", "--strategy", "oracle-0")
    sample(mixed, tmp_path / "d.png", "--show-routing", "--monolith")
    assert np.array_equal(pictures(tmp_path / "a"), pictures(tmp_path / "b"))
    cost = lambda done: re.search(r"forwards per sample.*expert's;", done.stdout)[0]
    assert cost(a) == cost(b) and "routing and predictions of 6 in" in b.stdout
    for path in (tmp_path / "b" / "routing.png", tmp_path / "c.routing.png", tmp_path / "d.routing.png"):
        assert Image.open(path).width > 600


def test_routing_picture_shows_the_probabilities_as_heights_and_the_times_as_widths():
    final = np.full((8, 8, 3), 200, np.uint8)
    # t from 1 to 0.75: 1/4 and 3/4; from there to 0: the second expert alone
    path = [(1.0, [0.25, 0.75], [0.0, 1.0]), (0.75, [0.0, 1.0], [0.0, 1.0])]
    sheet = np.asarray(script.routing_picture([("title", path, [(0.0, final)])], 2)).astype(int)
    near = lambda colour: (np.abs(sheet - np.array(Image.new("RGB", (1, 1), colour))[0, 0]).max(2) == 0)
    first, second = near(script.COLOURS[0])[58:], near(script.COLOURS[1])[58:]      # without the legend
    width = sheet.shape[1]
    assert first.any(0).sum() == pytest.approx(width / 4, abs=4)
    assert first.any(1).sum() == 10 and second[:, width // 10].sum() == 30 + 10 and second[:, width // 2].sum() == 40 + 10


def test_a_damaged_expert_is_named_before_it_samples(trained, tmp_path):
    run = copy(trained, tmp_path)
    path = run / "experts" / "0.safetensors"
    spoilt = bytearray(path.read_bytes())
    spoilt[-4000:] = b"\xff" * 4000
    path.write_bytes(spoilt)
    for strategy in ("full", "oracle-0"):
        done = inside("sample.py", "--run-dir", run, "--device", "cpu", "--prompt", "a red circle", "--strategy", strategy, "--out", tmp_path / "x.png")
        assert done.returncode == 2 and "experts/0.safetensors is damaged, its weights" in done.stderr and "copy it again" in done.stderr
