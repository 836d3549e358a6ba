"""Stage 5: what evaluate.py says of runs whose answers are known."""
import io
import json
import os
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import command, copy, inside, rewrite
from PIL import Image
from safetensors.torch import load_file
from test_mistakes import refused

import ddm.config
import ddm.run
import ddm.text
import evaluate
import flow
from data import TarDataset, square, to_float
from ddm import artifacts, codec, encoders, features, loading, plan, report
from ddm.config import make_config
from ddm.ensemble import Ensemble

CPU = torch.device("cpu")
ALONE = SimpleNamespace(rank=0, world=1, device=CPU)
FEW = ("--samples", 12, "--loss-images", 10, "--device", "cpu")


def results(folder, table="models"):
    """The results in a folder of evaluate.py's, one for each run."""
    with open(folder / f"{table}.json") as f:
        return json.load(f)["results"]


def measured(run, data, *flags, table="models"):
    """-> the result of evaluate.py on one run."""
    done = inside("evaluate.py", "--run-dir", run, "--data", data / "*.tar", *FEW, *flags)
    assert done.returncode == 0, done.stderr
    return results(run / "evaluation", table)[0]


def open_tars(folder, **settings):
    """A TarDataset of a folder's tars at 8 pixels."""
    return TarDataset(sorted(map(str, folder.glob("*.tar"))), 8, **settings)


@pytest.fixture(scope="module")
def evaluated(trained, tars, tmp_path_factory):
    """A trained run, its result and the command that made it. Do not change it."""
    run = copy(trained, tmp_path_factory.mktemp("evaluated"))
    command("distill.py", "--run-dir", run)
    done = command("evaluate.py", "--run-dir", run, "--data", tars / "*.tar", *FEW, "--npz")
    return run, results(run / "evaluation")[0], done


def clustered(run, data, config, *flags):
    """A run after stage 1, with experts and a router that were never trained."""
    command("cluster.py", "--data", data / "*.tar", "--run-dir", run, "--config", config, *flags)
    config = ddm.config.load_run(run, {})
    space = codec.Space(config)
    info = loading.describe(config, space, ddm.run.read_clusters(run))
    info |= {"step": 1, "images": 1, "flops": 1}

    os.mkdir(run / "experts")
    for k in range(config.cluster.experts):
        expert = artifacts.build(ddm.config.model_config(config, "model", space))
        about = info | {"shard": str(k), "objective": "velocity", "path": "linear"}
        artifacts.save(run / "experts" / f"{k}.safetensors", expert.config, expert.state_dict(),
                       **about)

    shape = ddm.config.model_config(config, "router", space, config.cluster.experts)
    router = artifacts.build(shape)
    artifacts.save(run / "router.safetensors", router.config, router.state_dict(), **info)
    return run


def close(a, b, tolerance=1e-4):
    """Whether two JSON values agree, numbers to a relative tolerance."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k], tolerance) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, float):
        return a == pytest.approx(b, rel=tolerance, abs=tolerance)
    return a == b


# ---- the report ----------------------------------------------------------------------------------

def test_every_row_says_how_it_was_made(evaluated):
    run, result, done = evaluated
    assert [(row["model"], row["strategy"]) for row in result["rows"]] == [
        ("ensemble", "top-1"), ("monolith", ""), ("student", "")]
    for row in result["rows"]:
        assert row["samples"] == 12 and row["seed"] == 0
        assert row["sampler"] == "euler 4 steps, guidance 4"
        assert row["settings"]["solver"] == "euler" and row["missing"] == []
        assert row["reference"].startswith("3 tars ") and row["reference"].endswith(", 8 px")
        assert row["FD-pixels"]["frechet_distance"] > 0
        assert sum(row["cluster_shares"]) == pytest.approx(1)

    text = (run / "evaluation" / "models.md").read_text()
    assert text in done.stdout
    for words in ("FD-pixels", "euler 4 steps, guidance 4", "ensemble, threshold-0.1",
                  "negative log likelihood", "images seen", "t 0.9-1.0"):
        assert words in text

    reference = result["reference"]
    assert reference["images"] == 240 and reference["features"]["FD-pixels"]["name"] == "pixels"
    # the reference is the training set here
    counts = load_file(run / "clusters.safetensors")["counts"]
    assert reference["cluster_shares"] == pytest.approx((counts / counts.sum()).tolist())


def test_the_npz_is_what_the_field_s_evaluators_read(evaluated):
    folder = evaluated[0] / "evaluation"
    with np.load(folder / "ensemble-top-1.npz", allow_pickle=False) as arrays:
        images = arrays["arr_0"]
    assert images.dtype == np.uint8 and images.shape == (12, 8, 8, 3) and images.std() > 0
    assert (folder / "monolith.npz").exists() and (folder / "student.npz").exists()


def test_neither_batch_size_nor_ranks_change_the_numbers(evaluated, tars, tmp_path):
    run, first, _ = evaluated
    other = tmp_path / "run"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("evaluation"))
    assert close(measured(other, tars, "--batch", 5) | {"run": ""}, first | {"run": ""})

    shutil.rmtree(other / "evaluation")
    command("evaluate.py", "--run-dir", other, "--data", tars / "*.tar", *FEW, ranks=2)
    assert close(results(other / "evaluation")[0] | {"run": ""}, first | {"run": ""})


def test_the_reference_is_read_once(evaluated, tars, tmp_path, monkeypatch):
    run, first, _ = evaluated
    run = copy(run, tmp_path)
    # would read it
    monkeypatch.setattr(features, "_Prepared", None)
    assert close(measured(run, tars)["rows"], first["rows"])

    # other tars have statistics of their own
    ignore = shutil.ignore_patterns("00002.tar*")
    fewer = shutil.copytree(tars, tmp_path / "tars", ignore=ignore)
    with pytest.raises(AssertionError, match="NoneType"):
        measured(run, fewer)


def test_the_reference_s_own_images_are_at_no_distance(tars, config):
    data = open_tars(tars)
    images = np.stack([square(data.sample(i)[0], 8) for i in range(240)])
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)

    space = features.distance_space(make_config().features, CPU)
    statistics = evaluate.Statistics(range(240))
    statistics.add(range(240), space.features([space.prepare(Image.fromarray(x)) for x in images]))
    run = SimpleNamespace(config=make_config(), clusters=None)
    reference = evaluate.Reference(data, [statistics.close()], labels=None, order=list(range(240)),
                                   for_loss=[], about={})

    found = []
    for samples in (images, noise):
        batches = [(range(100), samples[:100]), (range(100, 240), samples[100:])]
        row, kept = evaluate.measure(batches, run, reference, keep=True,
                                     measures=evaluate.Measures([space], clip=None))
        assert (kept == samples).all()
        found.append(row["FD-pixels"])

    same, other = found
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-5)
    assert same["precision"] == same["recall"] == 1
    assert other["frechet_distance"] > 0.1 and other["recall"] < 0.5


def test_table_strategies_is_the_paper_s_with_its_costs(trained, tars, tmp_path):
    run = copy(trained, tmp_path)
    result = measured(run, tars, "--table", "strategies", table="strategies")
    rows = {row["strategy"] or row["model"]: row for row in result["rows"]}
    assert set(rows) == {
        "monolith", "oracle", "full", "top-1", "top-2", "top-3", "sample-1", "sample-2", "sample-3",
        "threshold-0.01", "threshold-0.05", "threshold-0.1", "nucleus-0.9, temperature 0.5",
        "nucleus-0.9, temperature 1.0", "nucleus-0.9, temperature 2.0", "once"}

    # of four steps
    E = plan.flops(artifacts.load(run / "experts" / "0.safetensors")[0].config) * 4 / 1e9
    R = plan.flops(artifacts.load(run / "router.safetensors")[0].config) * 4 / 1e9
    costs = {
        "monolith": 2 * E,
        "oracle": 2 * E,
        "full": 6 * E + R,
        "top-1": 2 * E + R,
        "top-2": 4 * E + R,
        "sample-3": 6 * E + R,
        "nucleus-0.9, temperature 2.0": 2 * E + R,
        "once": 2 * E + R / 4,
    }
    for name, cost in costs.items():
        assert rows[name]["gflops_per_image"] == pytest.approx(cost)
    assert rows["full"]["FD-pixels"] == rows["top-3"]["FD-pixels"]
    assert rows["nucleus-0.9, temperature 2.0"]["settings"]["router_temperature"] == 2


def test_table_experts_sets_several_runs_beside_each_other(trained, tars, config, tmp_path):
    run = copy(trained, tmp_path)
    other = clustered(tmp_path / "two", tars, config, "--experts", 2)
    done = inside("evaluate.py", "--run-dir", run, "--runs", other, "--data", tars / "*.tar", *FEW,
                  "--table", "experts")
    assert done.returncode == 0, done.stderr

    first, second = results(run / "evaluation", "experts")
    assert first["experts"] == 3 and len(first["rows"]) == 2
    assert second["experts"] == 2 and len(second["rows"]) == 1
    assert first["rows"][0]["reference"] == second["rows"][0]["reference"]
    assert Image.open(run / "evaluation" / "experts.png").width > 600 and str(other) in done.stdout


def test_samples_of_earlier_calls_are_named(evaluated, tars, tmp_path):
    run = copy(evaluated[0], tmp_path)
    done = inside("evaluate.py", "--run-dir", run, "--data", tars / "*.tar", *FEW, "--npz",
                  "--models", "ensemble", "--strategy", "full")
    assert done.returncode == 0 and "; samples in ensemble-full.npz" in done.stdout
    assert ("samples of earlier calls, too, not of this table: "
            "ensemble-top-1.npz, monolith.npz, student.npz") in done.stdout
    assert "earlier calls" not in evaluated[2].stdout


def test_a_table_has_columns_for_what_is_there():
    text = report.markdown([{"model": "a", "empty": "", "loss": 1}, {"model": "bc", "more": 22}])
    assert text.splitlines() == [
        "| model | loss | more |",
        "|-------|------|------|",
        "| a     | 1    |      |",
        "| bc    |      | 22   |",
    ]


@pytest.mark.parametrize("out, says", [
    ("file", "it is a file"),
    ("link", "a link to nothing"),
    ("file/x", "a part of this path is a file"),
    ("x" * 300, "shorter name"),
    ("taken", "models.md is a folder"),
    ("\udcff", "is not UTF-8"),
])
def test_what_the_file_system_refuses_is_said_before_the_work(trained, tars, tmp_path, monkeypatch,
                                                              out, says):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "taken" / "models.md").mkdir(parents=True)
    # would read
    monkeypatch.setattr(evaluate, "open_reference", None)
    refused("evaluate.py", "--run-dir", trained, "--data", tars / "*.tar", *FEW,
            "--out", tmp_path / out, says=[says])


def test_a_damaged_log_costs_its_device_hours_alone(evaluated, tmp_path):
    run = copy(evaluated[0], tmp_path)
    before, _ = report.ledger(run, 3)
    (run / "logs" / "expert-all.csv").write_bytes(b"step,device_hours\n1,\x00\xff\n")
    after, _ = report.ledger(run, 3)

    assert before["monolith"]["device_hours"] > 0
    before["monolith"]["device_hours"] = None
    assert after == before


# ---- the validation loss -------------------------------------------------------------------------

def test_the_loss_is_eq_6_of_the_mixed_velocity_on_the_same_noise(evaluated, tars):
    """By hand, from flow.py: the mean over ten times, one in each tenth."""
    data = open_tars(tars, condition="text", encode=None)
    team = Ensemble(evaluated[0], CPU)
    numbers = [3, 77, 239]
    space = evaluate.open_space(team, make_config(), {}, CPU)
    found = evaluate.validate(team, ["full", "top-1", "oracle"], space, data=data,
                              numbers=numbers, labels=torch.full((240,), 2), seed=0, batch=20,
                              ranks=ALONE)

    for row, number in enumerate(numbers):
        image, caption, _ = data.sample(number)
        rng = np.random.Generator(np.random.Philox(key=[0, number]))
        t = torch.from_numpy((np.arange(10) + rng.random(10)) / 10).float()
        eps = torch.from_numpy(rng.standard_normal((10, 3, 8, 8), dtype=np.float32))
        pixels = torch.from_numpy(square(image, 8).copy())
        x_0 = to_float(pixels[None]).expand(10, -1, -1, -1)
        c = ddm.text.hash_words(caption, 4, 64).expand(10, -1)
        x_t = flow.interpolate(x_0, eps, t)

        p = team.route(x_t, t, c)
        torch.testing.assert_close(found.answers[row], p, rtol=1e-4, atol=1e-5)
        oracle = torch.tensor([[0.0, 0, 1]]).expand(10, -1)
        for name, w in (("full", p), ("top-1", flow.top_k(p, 1)), ("oracle", oracle)):
            v = flow.ensemble(w, team.expert_velocity, x_t, t, c)
            loss = (v - (eps - x_0)).square().flatten(1).mean(1)
            torch.testing.assert_close(found.losses[name][row], loss, rtol=1e-4, atol=1e-5)


def test_the_loss_is_measured_in_fp32_and_named_by_what_ran(evaluated, tars, tmp_path, monkeypatch):
    run, first, _ = evaluated
    run = copy(run, tmp_path)
    seen = []
    plain = evaluate.validate

    def validate(team, *args, **options):
        weights = next(team.expert(min(team.paths)).parameters()).dtype
        seen.append((team.dtype, weights, torch.get_float32_matmul_precision()))
        return plain(team, *args, **options)

    monkeypatch.setattr(evaluate, "validate", validate)
    # as on a GPU
    torch.set_float32_matmul_precision("high")
    try:
        exact = measured(run, tars, "--precision", "bf16", "--models", "ensemble", "monolith")
        assert set(seen) == {(torch.float32, torch.float32, "highest")}
        assert torch.get_float32_matmul_precision() == "high"

        only_loss = ("--samples", 0, "--models", "ensemble")
        half = measured(run, tars, "--loss-precision", "bf16", *only_loss)
        assert seen[-1][:2] == (torch.bfloat16, torch.bfloat16)
        measured(run, tars, "--loss-precision", "tf32", *only_loss)
        assert seen[-1] == (torch.float32, torch.float32, "high")
    finally:
        torch.set_float32_matmul_precision("highest")

    assert exact["loss"]["precision"] == "fp32"
    assert {row["settings"]["precision"] for row in exact["rows"]} == {"bf16"}
    # of the samples' precision it knows nothing
    for name, loss in exact["loss"]["models"].items():
        expected = first["loss"]["models"][name]["mean"]
        assert loss["mean"] == pytest.approx(expected, rel=1e-5)

    assert half["loss"]["precision"] == "bf16"
    full = "ensemble, full"
    assert half["loss"]["models"][full]["mean"] != exact["loss"]["models"][full]["mean"]


def test_no_table_says_auto(evaluated):
    run, result, _ = evaluated
    text = (run / "evaluation" / "models.md").read_text()
    assert "auto" not in text and "precision fp32" in text
    assert "samples were drawn with weights in fp32" in text
    assert result["loss"]["precision"] == "fp32"
    assert {row["settings"]["precision"] for row in result["rows"]} == {"fp32"}


def test_experts_that_are_the_monolith_differ_from_it_by_nothing(evaluated, tars, tmp_path):
    run = copy(evaluated[0], tmp_path)
    experts = run / "experts"
    for k in range(3):
        rewrite(experts / "all.safetensors", experts / f"{k}.safetensors", shard=str(k))

    loss = measured(run, tars, "--samples", 0)["loss"]["models"]
    of_ensemble = {"ensemble, full", "ensemble, top-1", "ensemble, top-2",
                   "ensemble, threshold-0.1", "ensemble, oracle"}
    assert set(loss) == of_ensemble | {"monolith", "student"}
    mean = loss["monolith"]["mean"]
    for name in of_ensemble:
        assert loss[name]["difference"] == pytest.approx(0, abs=1e-4 * mean)
        assert loss[name]["difference_error"] < 1e-3 * mean
    assert abs(loss["student"]["difference"]) > 0.01
    assert loss["student"]["difference_error"] > 1e-3


# ---- runs that lack something --------------------------------------------------------------------

def test_an_unconditional_run_of_one_expert_needs_no_router(tars, config, tmp_path):
    run = clustered(tmp_path / "run", tars, config, "--experts", 1, "--data.condition", "none")
    os.remove(run / "router.safetensors")
    result = measured(run, tars, "--npz")
    assert result["rows"][0]["sampler"] == "euler 4 steps"
    assert set(result["loss"]["models"]) == {"ensemble, full", "ensemble, top-1",
                                             "ensemble, threshold-0.1", "ensemble, oracle"}
    assert result["ledger"]["ensemble"]["flops"] == 1 and "router" not in result


def test_a_damaged_expert_is_said_and_spoils_neither_router_nor_ledger(trained, tars, tmp_path):
    run = copy(trained, tmp_path)
    (run / "experts" / "1.safetensors").write_bytes(b"xx")
    result = measured(run, tars, "--models", "ensemble")
    assert result["rows"][0]["missing"] == [1]
    assert "ensemble (without 1)" in (run / "evaluation" / "models.md").read_text()
    assert "router" not in result and "ensemble" not in result["ledger"]
    assert "ensemble, oracle" not in result["loss"]["models"]

    for k in (1, 2):
        os.remove(run / "experts" / f"{k}.safetensors")
    os.remove(run / "router.safetensors")
    refused("evaluate.py", "--run-dir", run, "--data", tars / "*.tar", *FEW,
            says=["router.safetensors is missing"])


def test_models_of_another_clustering_or_size_are_refused(trained, tars, tmp_path):
    run = copy(trained, tmp_path)
    rewrite(run / "experts" / "all.safetensors", fingerprint="0123456789abcdef")
    common = ("--data", tars / "*.tar", *FEW, "--out", tmp_path / "out")
    refused("evaluate.py", "--run-dir", run, *common, "--models", "monolith",
            says=["clustering 0123456789abcdef / "])
    refused("evaluate.py", "--run-dir", trained, *common, "--models", "ensemble",
            "--autoencoder.name", "x", says=["trained without a pretrained autoencoder"])

    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("size = 8\n", "size = 16\n"))
    refused("evaluate.py", "--run-dir", run, *common, "--models", "ensemble",
            says=["trained with data.size 8", "says 16"])


def test_random_clusters_have_no_oracle_and_no_right_answer(tars, config, tmp_path):
    run = clustered(tmp_path / "run", tars, config, "--cluster.assign", "random")
    result = measured(run, tars)
    assert "router" not in result and "cluster_shares" not in result["rows"][0]
    assert "ensemble, full" in result["loss"]["models"]
    assert "ensemble, oracle" not in result["loss"]["models"]


# ---- the ledger ----------------------------------------------------------------------------------

def ratio_in(line):
    """The number of "the student: 1.234 times the monolith's ..."."""
    return float(line.split(": ")[1].split()[0])


def test_the_ledger_adds_up_a_ddm(evaluated):
    _, result, done = evaluated
    entries = result["ledger"]
    parts = [entries[name] for name in ("expert 0", "expert 1", "expert 2", "router")]
    for key in ("images", "flops", "device_hours"):
        total = sum(part[key] for part in parts)
        assert entries["ensemble"][key] == pytest.approx(total) and total > 0
    assert sum(part["images"] for part in parts[:3]) == entries["monolith"]["images"] == 6 * 24

    of_ensemble, of_student, _ = result["equal_compute"]
    ratio = entries["ensemble"]["flops"] / entries["monolith"]["flops"]
    assert ratio > 1.5 and "NOT equal compute" in of_ensemble
    assert f"the ensemble: {ratio:.3f} times the monolith's training FLOPs" in done.stdout
    ratio = entries["student"]["flops"] / entries["monolith"]["flops"]
    assert f"{ratio:.3f} times" in of_student


def test_the_ledger_calls_equal_only_what_is(evaluated, tmp_path):
    run = copy(evaluated[0], tmp_path)
    entries, _ = report.ledger(run, 3)
    rewrite(run / "router.safetensors", flops=int(0.04 * entries["monolith"]["flops"]))
    _, lines = report.ledger(run, 3)
    assert lines[0].endswith("(experts 1.000, router 0.040): equal compute")

    # a student that begins with an expert's weights costs what that did, too; with all teachers
    # it is counted once
    alone = ratio_in(lines[1])
    with_teachers = ratio_in(lines[2])
    rewrite(run / "student.safetensors", init="ab" * 32, init_shard="0",
            init_flops=entries["expert 0"]["flops"])
    _, lines = report.ledger(run, 3)
    assert ratio_in(lines[1]) == pytest.approx(alone + 1 / 3, abs=2e-3)
    assert ratio_in(lines[2]) == pytest.approx(with_teachers, abs=2e-3)

    # of a part of the experts there is no sum
    os.remove(run / "experts" / "1.safetensors")
    entries, lines = report.ledger(run, 3)
    assert "ensemble" not in entries and not lines


# ---- networks ------------------------------------------------------------------------------------

def test_feature_spaces_have_the_field_s_names_and_are_not_normalised(latent_run, tars, networks,
                                                                      tmp_path):
    run = copy(latent_run, tmp_path)
    dino = networks / "dinov2"
    clip = networks / "clip-image"
    result = measured(run, tars, "--features", dino, clip, "--clip", clip, "--npz")

    row = result["rows"][0]
    assert {"FD-DINOv2 (dinov2)", "CLIP-FID (clip-image)"} <= row.keys()
    assert 0 <= row["clip_score"] <= 100
    assert result["reference"]["clip"]["class"] == "CLIPModel"
    text = (run / "evaluation" / "models.md").read_text()
    described = result["reference"]["features"]["FD-DINOv2 (dinov2)"]["preprocessing"]
    assert "L2" not in described and described in text
    assert "recall (CLIP-FID (clip-image))" in text and "CLIP score" in text
    assert result["loss"]["models"].keys() == {
        "ensemble, full", "ensemble, top-1", "ensemble, top-2", "ensemble, threshold-0.1",
        "ensemble, oracle"}
    assert len(result["router"]["accuracy"]) == 10

    # the reference's statistics, by hand
    settings = make_config({"features.name": str(dino)}).features
    prepare, function, _ = encoders.image_features(settings, CPU, normalise=False)
    data = open_tars(tars)
    squares = [Image.fromarray(square(data.sample(i)[0], 8)) for i in range(240)]
    x = torch.from_numpy(function([prepare(image) for image in squares])).double()
    assert not torch.allclose(x.norm(dim=1), torch.ones(240).double())

    kept = [load_file(path) for path in (run / "evaluation").glob("reference-*.safetensors")]
    mine = next(s for s in kept if "mean" in s and len(s["mean"]) == x.shape[1])
    torch.testing.assert_close(mine["mean"], x.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine["covariance"], torch.cov(x.T), rtol=1e-4, atol=1e-5)


def test_clip_score_is_a_hundred_times_the_cosine(networks):
    import transformers
    folder = networks / "clip-image"
    images = []
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        images.append(Image.fromarray(pixels))
    captions = ["a red circle", "a cross", "a long text " * 20]
    prepare, score, _ = encoders.clip_scorer(str(folder), CPU)
    found = score([prepare(image) for image in images], captions)

    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    for image, caption, value in zip(images, captions, found, strict=True):
        text = tokenizer([caption], truncation=True, max_length=24, return_tensors="pt")
        pixels = torch.from_numpy(square(image, 28).copy()).permute(2, 0, 1) / 255
        with torch.no_grad():
            out = model(input_ids=text["input_ids"], attention_mask=text["attention_mask"],
                        pixel_values=((pixels - mean) / std)[None])
        cosine = torch.cosine_similarity(out.image_embeds, out.text_embeds).item()
        assert value == pytest.approx(max(0, 100 * cosine), abs=1e-3)


def test_class_runs_sample_the_reference_s_classes_and_write_them_down(tars, config, tmp_path,
                                                                       monkeypatch):
    # the captions of a tar become classes
    folder = tmp_path / "tars"
    os.mkdir(folder)
    with tarfile.open(tars / "00000.tar") as source, \
            tarfile.open(folder / "00000.tar", "w") as target:
        for member in source:
            payload = source.extractfile(member).read()
            if member.name.endswith(".txt"):
                payload = str(int(member.name[:9]) % 3).encode()
                member.name = member.name[:-3] + "cls"
                member.size = len(payload)
            target.addfile(member, io.BytesIO(payload))
    run = clustered(tmp_path / "run", folder, config, "--experts", 2,
                    "--data.condition", "class", "--data.classes", 3)

    asked = []
    plain = Ensemble.velocity

    def velocity(team, settings, c, *args, **options):
        asked.extend(c.tolist())
        return plain(team, settings, c, *args, **options)

    monkeypatch.setattr(Ensemble, "velocity", velocity)
    measured(run, folder, "--samples", 100, "--loss-images", 0, "--npz", "--steps", 1)
    with np.load(run / "evaluation" / "ensemble-top-1.npz") as arrays:
        assert arrays["arr_1"].tolist() == asked
    # as many as the reference has
    assert sorted(asked) == sorted(i % 3 for i in range(100))


# ---- mistakes ------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, says", [
    (["--samples", 1], ["--samples 1 must be 0, or at least 2"]),
    (["--loss-images", -1], ["--loss-images -1"]),
    (["--batch", 0], ["--batch 0"]),
    (["--seed", 2 ** 64], ["--seed 18446744073709551616"]),
    (["--loss-precision", "auto"], ["--loss-precision", "'auto'"]),
    (["--cfg-low", 5], ["cfg_low 5.0"]),
    (["--strategy", "top-4"], ["'top-4'", "4 experts of 3"]),
    (["--model", "student"], ["unknown argument --model"]),
    (["--models", "student"], ["student.safetensors is missing", "distill.py"]),
    (["--features", "./nowhere"], ["features = './nowhere'", "no such folder"]),
    (["--features", "pixels", "pixels"], ["--features pixels pixels", "called the same"]),
    (["--table", "strategies", "--models", "monolith"], ["--table strategies", "only monolith"]),
    (["--table", "experts"], ["--runs DIR"]),
    (["--runs", "x"], ["--runs x needs --table experts"]),
    (["--runs", "x", "--table", "experts", "--npz"], ["--npz with --table experts"]),
])
def test_mistakes_are_named_in_one_line(trained, tars, tmp_path, flags, says):
    refused("evaluate.py", "--run-dir", trained, "--data", tars / "*.tar", "--out", tmp_path,
            "--loss-images", 4, "--samples", 4, *flags, says=says)
