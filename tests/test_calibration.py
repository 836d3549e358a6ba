"""The router's temperatures, and why an ensemble's loss is what it is: closed forms."""
import json
import shutil

import pytest
import torch
from conftest import command, copy, inside
from safetensors.torch import load_file
from test_evaluate import FEW, measured
from test_mistakes import refused
from test_sample import condition, draw, start

from ddm import artifacts
from ddm.calibration import LARGEST, SMALLEST, fit_temperatures
from ddm.ensemble import Ensemble
from ddm.metrics import explain
from ddm.validation import BINS, Validation

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def negative_log_likelihood(logits, labels):
    """Of each bin [BINS], in float64."""
    log_p = logits.double().log_softmax(2)
    places = labels[:, None, None].expand(-1, BINS, 1)
    return -log_p.gather(2, places)[..., 0].mean(0)


# ---- fitting -------------------------------------------------------------------------------------

def test_the_temperature_by_which_logits_were_spoilt_is_found():
    n = 40_000
    true = torch.randn(n, 1, 4, generator=generator()).expand(-1, BINS, -1)
    labels = torch.multinomial(true[:, 0].softmax(1), 1, generator=generator(1)).flatten()
    spoilt = torch.linspace(0.3, 5, BINS)
    found = fit_temperatures(true * spoilt[:, None], labels)
    torch.testing.assert_close(found, spoilt.double(), rtol=0.05, atol=0)


def test_no_other_temperature_is_likelier():
    logits = 3 * torch.randn(200, BINS, 5, generator=generator())
    labels = torch.randint(0, 5, (200,), generator=generator(1))
    # some truth in them, or the best temperature would be infinite
    logits[torch.arange(200), :, labels] += torch.linspace(1, 4, BINS)
    best = fit_temperatures(logits, labels)
    least = negative_log_likelihood(logits / best[:, None], labels)
    for factor in (0.97, 1.03):
        other = negative_log_likelihood(logits / (factor * best)[:, None], labels)
        assert (other > least).all()


def test_a_router_that_is_never_wrong_gets_no_endless_temperature():
    labels = torch.arange(30) % 3
    right = 10 * torch.nn.functional.one_hot(labels, 3).float()
    right = right[:, None].expand(-1, BINS, -1)
    assert (fit_temperatures(right, labels) >= SMALLEST).all()
    # and one that is always wrong
    assert (fit_temperatures(-right, labels) <= LARGEST).all()


# ---- in use --------------------------------------------------------------------------------------

@pytest.fixture
def calibrated(trained, tmp_path):
    """A run whose router has temperatures 1, 2, ..., 10."""
    run = copy(trained, tmp_path)
    temperatures = [float(i) for i in range(1, BINS + 1)]
    artifacts.add_info(run / "router.safetensors", temperatures=temperatures,
                       calibration={"images": 1, "reference": "others"})
    return run


def test_temperatures_divide_the_logits_of_their_bin_of_t(calibrated):
    team = Ensemble(calibrated, CPU)
    x, _ = start()
    for time, temperature in ((0.0, 1), (0.05, 1), (0.1, 2), (0.55, 6), (0.999, 10), (1.0, 10)):
        t = torch.full((4,), time)
        plain = team.route(x, t, condition(), calibrated=False)
        meant = (plain.log() / temperature).softmax(1)
        torch.testing.assert_close(team.route(x, t, condition()), meant)


def test_calibration_changes_weights_but_no_choice_of_top_1(calibrated):
    team = Ensemble(calibrated, CPU)
    for strategy, same in (("top-1", True), ("full", False), ("top-2", False)):
        on, _ = draw(team, strategy=strategy)
        off, _ = draw(team, strategy=strategy, router_calibration=False)
        assert torch.equal(on, off) == same, strategy


def test_calibration_can_be_switched_off(calibrated, trained, tars):
    flags = ("--samples", 0, "--models", "ensemble")
    plain = measured(trained, tars, *flags)
    on = measured(calibrated, tars, *flags)
    off = measured(calibrated, tars, *flags, "--router-calibration", "false")
    assert off["loss"] == plain["loss"] and off["router"] == plain["router"]
    assert on["router"]["confidence"][9] < plain["router"]["confidence"][9]
    losses = [result["loss"]["models"] for result in (on, plain)]
    assert losses[0]["ensemble, top-1"] == losses[1]["ensemble, top-1"]
    assert losses[0]["ensemble, full"] != losses[1]["ensemble, full"]


def test_calibrate_adds_temperatures_and_leaves_the_weights(trained, tars, tmp_path):
    run = copy(trained, tmp_path)
    path = run / "router.safetensors"
    before = load_file(path)
    done = inside("train_router.py", "--run-dir", run, "--calibrate", tars / "*.tar")
    assert done.returncode == 0, done.stderr
    assert "fitted on 240 images" in done.stdout

    info = artifacts.read_info(path)
    assert len(info["temperatures"]) == BINS and info["calibration"]["images"] == 240
    assert all(torch.equal(before[name], weight) for name, weight in load_file(path).items())
    # the ensemble that was calibrated on these images is likelier on them
    sums = []
    for each in (trained, run):
        router = measured(each, tars, "--samples", 0, "--loss-images", 240)["router"]
        sums.append(sum(router["negative_log_likelihood"]))
    assert sums[1] < sums[0]


def test_ranks_share_the_calibration(trained, tars, tmp_path):
    found = []
    for ranks in (0, 2):
        run = copy(trained, tmp_path / str(ranks))
        command("train_router.py", "--run-dir", run, "--calibrate", tars / "*.tar", ranks=ranks)
        found.append(artifacts.read_info(run / "router.safetensors")["temperatures"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_router_that_trains_on_loses_its_temperatures(calibrated):
    command("train_router.py", "--run-dir", calibrated, "--train.steps", 8)
    assert "temperatures" not in artifacts.read_info(calibrated / "router.safetensors")


def test_calibrating_needs_the_router_s_file_and_trains_nothing(trained, tars, tmp_path):
    whole = copy(trained, tmp_path / "whole")
    run = copy(trained, tmp_path)
    for folder in ("shards", "checkpoints", "experts", "features", "logs"):
        shutil.rmtree(run / folder)
    for each in (whole, run):
        done = inside("train_router.py", "--run-dir", each, "--calibrate", tars / "*.tar")
        assert done.returncode == 0, done.stderr
    assert not (run / "checkpoints").exists()
    router = (run / "router.safetensors").read_bytes()
    assert router == (whole / "router.safetensors").read_bytes()


def test_evaluating_on_the_images_of_the_calibration_is_a_warning(trained, tars, tmp_path):
    run = copy(trained, tmp_path)
    inside("train_router.py", "--run-dir", run, "--calibrate", tars / "*.tar")
    flags = ("--run-dir", run, *FEW, "--samples", 0, "--models", "ensemble", "--data")
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(sorted(tars.glob("*.tar"))[0], half)
    assert "calibrated on these images" in inside("evaluate.py", *flags, tars / "*.tar").stderr
    assert "calibrated on" not in inside("evaluate.py", *flags, half / "*.tar").stderr
    text = (run / "evaluation" / "models.md").read_text()
    assert "router (calibrated on 240 images of 3 tars" in text


def test_what_cannot_be_calibrated_is_refused(tars, config, trained, tmp_path):
    run = tmp_path / "run"
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", run, "--config", config,
            "--cluster.assign", "random")
    refused("train_router.py", "--run-dir", run, "--calibrate", tars / "*.tar",
            says=["router.safetensors is missing", "train it with train_router.py"])
    shutil.copy(trained / "router.safetensors", run)
    refused("train_router.py", "--run-dir", run, "--calibrate", tars / "*.tar", says=["random"])
    missing = tmp_path / "none.tar"
    refused("train_router.py", "--run-dir", trained, "--calibrate", missing, says=["none.tar"])


# ---- why -----------------------------------------------------------------------------------------

def by_hand(n=50, K=3, seed=0):
    """-> (a Validation, v [n,BINS,K,5], p [n,BINS,K], labels [n]) of made-up velocities."""
    numbers = generator(seed)
    target = torch.randn(n, BINS, 1, 5, generator=numbers)
    v = target + torch.randn(n, BINS, K, 5, generator=numbers)
    p = torch.randn(n, BINS, K, generator=numbers).softmax(2)
    mixed = (p[..., None] * v).sum(2, keepdim=True)
    full = (mixed - target).square().mean(3)[..., 0]
    experts = (v - target).square().mean(3)
    labels = torch.randint(0, K, (n,), generator=numbers)
    return Validation({"full": full}, experts, p), v, p, labels


def test_the_mixture_s_loss_is_the_experts_less_their_disagreement():
    found, v, p, _ = by_hand()
    spread = (v - (p[..., None] * v).sum(2, keepdim=True)).square().mean(3)
    meant = (p * spread).sum(2).mean(0)
    why = explain(found, None, None)["by_t"]
    torch.testing.assert_close(torch.tensor(why["their disagreement"]), meant)
    experts = torch.tensor(why["experts, as weighed"])
    torch.testing.assert_close(torch.tensor(why["mixture"]), experts - meant)


def test_own_chosen_and_best_experts_are_told_apart():
    found, _, p, labels = by_hand()
    why = explain(found, labels, None, counts=[9, 8, 7])
    n = len(labels)
    chosen = torch.zeros(n, BINS)
    own = torch.zeros(n, BINS)
    best = torch.zeros(n, BINS)
    for i in range(n):
        for b in range(BINS):
            losses = found.experts[i, b]
            chosen[i, b] = losses[p[i, b].argmax()]
            own[i, b] = losses[labels[i]]
            best[i, b] = losses.min()
    for name, meant in (("chosen expert", chosen), ("own expert", own),
                        ("best expert in hindsight", best)):
        torch.testing.assert_close(torch.tensor(why["by_t"][name]), meant.mean(0))


def test_an_expert_is_set_beside_the_monolith_at_home_and_elsewhere():
    found, _, _, labels = by_hand()
    monolith = torch.rand(len(labels), BINS, generator=generator(3))
    rows = explain(found, labels, monolith, counts=[9, 8, 7])["clusters"]
    assert [row["trained on"] for row in rows] == [9, 8, 7]
    assert sum(row["images"] for row in rows) == len(labels)
    for k, row in enumerate(rows):
        home = labels == k
        assert row["own expert"] == pytest.approx(found.experts[home][..., k].mean().item())
        assert row["monolith"] == pytest.approx(monolith[home].mean().item())
        gain = row["monolith"] - row["own expert"]
        assert row["gain at home"] == pytest.approx(gain, abs=1e-6)
        elsewhere = found.experts[~home][..., k].mean().item()
        assert row["its expert elsewhere"] == pytest.approx(elsewhere)
        loss = elsewhere - monolith[~home].mean().item()
        assert row["loss elsewhere"] == pytest.approx(loss, abs=1e-6)


def test_a_cluster_without_images_has_no_means():
    found, _, _, labels = by_hand()
    rows = explain(found, torch.zeros_like(labels), None, counts=[9, 8, 7])["clusters"]
    assert rows[0]["its expert elsewhere"] is None and rows[0]["images"] == len(labels)
    assert rows[1]["own expert"] is None and rows[1]["its expert elsewhere"] is not None
    # NaN is no JSON
    json.dumps(rows, allow_nan=False)


def test_a_missing_expert_is_neither_best_nor_weighed():
    found, _, p, _ = by_hand()
    others = torch.tensor([0, 2])
    found.experts[..., 1] = float("inf")
    found.answers = p * torch.tensor([1.0, 0, 1])
    why = explain(found, None, None)["by_t"]
    best = found.experts[..., others].amin(2).mean(0)
    torch.testing.assert_close(torch.tensor(why["best expert in hindsight"]), best)
    weighed = (found.answers * found.experts)[..., others].sum(2).mean(0)
    torch.testing.assert_close(torch.tensor(why["experts, as weighed"]), weighed)


def test_evaluate_says_why_for_the_images_of_the_loss(trained, tars):
    result = measured(trained, tars, "--samples", 0)
    losses = result["loss"]["models"]
    why = result["why"]["by_t"]
    for name, model in (("mixture", "ensemble, full"), ("chosen expert", "ensemble, top-1"),
                        ("own expert", "ensemble, oracle"), ("monolith", "monolith")):
        assert why[name] == pytest.approx(losses[model]["by_t"], rel=1e-4), name
    assert sum(row["images"] for row in result["why"]["clusters"]) == 10
    # an ensemble alone has nothing to be set beside
    alone = measured(trained, tars, "--samples", 0, "--models", "ensemble")
    assert "monolith" not in alone["why"]["by_t"]
