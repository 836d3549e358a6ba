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

import evaluate
import flow

from ddm.config import make_config
from data import TarDataset, square, to_float
from ddm.ensemble import Ensemble
from ddm import artifacts, codec, encoders, features, loading, report
import ddm.config
import ddm.run
import ddm.text

CPU = torch.device("cpu")
FEW = ("--samples", 12, "--loss-images", 10, "--device", "cpu")


def measured(run, data, *flags, table="models"):
    """-> the JSON of evaluate.py on one run."""
    done = inside("evaluate.py", "--run-dir", run, "--data", data / "*.tar", *FEW, *flags)
    assert done.returncode == 0, done.stderr
    return json.load(open(run / "evaluation" / f"{table}.json"))["results"][0]


@pytest.fixture(scope="module")
def evaluated(trained, tars, tmp_path_factory):
    """A trained run and its evaluation by the command. Do not change it."""
    run = copy(trained, tmp_path_factory.mktemp("evaluated"))
    command("distill.py", "--run-dir", run)
    done = command("evaluate.py", "--run-dir", run, "--data", tars / "*.tar", *FEW, "--npz")
    return run, json.load(open(run / "evaluation" / "models.json"))["results"][0], done


def clustered(run, data, config, *flags):
    """A run after stage 1, with experts and a router that were never trained."""
    command("cluster.py", "--data", data / "*.tar", "--run-dir", run, "--config", config, *flags)
    config, clusters = ddm.config.load_run(run, {}), ddm.run.read_clusters(run)
    space = codec.Space(config)
    info = loading.describe(config, space, clusters) | {"step": 1, "images": 1, "flops": 1}
    os.mkdir(run / "experts")
    for k in range(config.cluster.experts):
        expert = artifacts.build(ddm.config.model_config(config, "model", space))
        artifacts.save(run / "experts" / f"{k}.safetensors", expert.config, expert.state_dict(), shard=str(k), objective="velocity", path="linear", **info)
    router = artifacts.build(ddm.config.model_config(config, "router", space, config.cluster.experts))
    artifacts.save(run / "router.safetensors", router.config, router.state_dict(), **info)
    return run


def close(a, b, tolerance=1e-4):
    """Two JSON values agree, numbers to a relative tolerance."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k], tolerance) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(close(x, y, tolerance) for x, y in zip(a, b))
    return a == pytest.approx(b, rel=tolerance, abs=tolerance) if isinstance(a, float) else a == b


# ---- the report ---------------------------------------------------------------------------------------------------

def test_every_row_says_how_it_was_made(evaluated):
    run, result, done = evaluated
    assert [(row["model"], row["strategy"]) for row in result["rows"]] == [("ensemble", "top-1"), ("monolith", ""), ("student", "")]
    for row in result["rows"]:
        assert row["samples"] == 12 and row["seed"] == 0 and row["sampler"] == "euler 4 steps, guidance 4"
        assert row["reference"].startswith("3 tars ") and row["reference"].endswith(", 8 px") and row["missing"] == []
        assert row["FD-pixels"]["frechet_distance"] > 0 and row["settings"]["solver"] == "euler" and sum(row["cluster_shares"]) == pytest.approx(1)
    text = (run / "evaluation" / "models.md").read_text()
    assert text in done.stdout
    for words in ("FD-pixels", "euler 4 steps, guidance 4", "ensemble, threshold-0.1", "negative log likelihood", "images seen", "t 0.9-1.0"):
        assert words in text
    assert result["reference"]["images"] == 240 and result["reference"]["features"]["FD-pixels"]["name"] == "pixels"
    counts = load_file(run / "clusters.safetensors")["counts"]
    assert result["reference"]["cluster_shares"] == pytest.approx((counts / counts.sum()).tolist())      # the reference is the training set here


def test_the_npz_is_what_the_field_s_evaluators_read(evaluated):
    run, *_ = evaluated
    with np.load(run / "evaluation" / "ensemble-top-1.npz", allow_pickle=False) as arrays:
        pictures = arrays["arr_0"]
    assert pictures.dtype == np.uint8 and pictures.shape == (12, 8, 8, 3) and pictures.std() > 0
    assert (run / "evaluation" / "monolith.npz").exists() and (run / "evaluation" / "student.npz").exists()


def test_neither_batch_size_nor_ranks_change_the_numbers(evaluated, tars, tmp_path):
    run, first, _ = evaluated
    other = tmp_path / "run"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("evaluation"))
    assert close(measured(other, tars, "--batch", 5) | {"run": ""}, first | {"run": ""})
    shutil.rmtree(other / "evaluation")
    command("evaluate.py", "--run-dir", other, "--data", tars / "*.tar", *FEW, ranks=2)
    assert close(json.load(open(other / "evaluation" / "models.json"))["results"][0] | {"run": ""}, first | {"run": ""})


def test_the_reference_is_read_once(evaluated, tars, tmp_path, monkeypatch):
    run, first, _ = evaluated
    run = copy(run, tmp_path)
    monkeypatch.setattr(features, "_Prepared", None)        # would read it
    assert close(measured(run, tars)["rows"], first["rows"])
    with pytest.raises(AssertionError, match="NoneType"):      # other tars have statistics of their own
        measured(run, shutil.copytree(tars, tmp_path / "tars", ignore=shutil.ignore_patterns("00002.tar*")))


def test_the_reference_s_own_pictures_are_at_no_distance(tars, tmp_path):
    data, folder = TarDataset(sorted(map(str, tars.glob("*.tar"))), 8), tmp_path / "pictures"
    os.mkdir(folder)
    pictures = np.stack([square(data.sample(i)[0], 8) for i in range(240)])
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:04d}.png")
    np.savez(tmp_path / "noise.npz", arr_0=np.random.default_rng(0).integers(0, 256, pictures.shape, dtype=np.uint8))
    done = inside("evaluate.py", "--data", tars / "*.tar", "--images", folder, tmp_path / "noise.npz", "--size", 8, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    same, noise = json.load(open(tmp_path / "out" / "images.json"))["results"][0]["rows"]
    assert same["FD-pixels"]["frechet_distance"] == pytest.approx(0, abs=1e-5) and same["FD-pixels"]["precision"] == same["FD-pixels"]["recall"] == 1
    assert noise["FD-pixels"]["frechet_distance"] > 0.1 and noise["FD-pixels"]["recall"] < 0.5


def test_table_strategies_is_the_paper_s_with_its_costs(trained, tars, tmp_path):
    run = copy(trained, tmp_path)
    rows = {row["strategy"] or row["model"]: row for row in measured(run, tars, "--table", "strategies", table="strategies")["rows"]}
    assert set(rows) == {"monolith", "oracle", "full", "top-1", "top-2", "top-3", "sample-1", "sample-2", "sample-3", "threshold-0.01", "threshold-0.05",
                         "threshold-0.1", "nucleus-0.9, temperature 0.5", "nucleus-0.9, temperature 1.0", "nucleus-0.9, temperature 2.0", "once"}
    E, R = (artifacts.load(run / name)[0].flops() * 4 / 1e9 for name in ("experts/0.safetensors", "router.safetensors"))      # of four steps
    for name, cost in (("monolith", 2 * E), ("oracle", 2 * E), ("full", 6 * E + R), ("top-1", 2 * E + R), ("top-2", 4 * E + R), ("sample-3", 6 * E + R),
                       ("nucleus-0.9, temperature 2.0", 2 * E + R), ("once", 2 * E + R / 4)):
        assert rows[name]["gflops_per_image"] == pytest.approx(cost)
    assert rows["full"]["FD-pixels"] == rows["top-3"]["FD-pixels"] and rows["nucleus-0.9, temperature 2.0"]["settings"]["router_temperature"] == 2


def test_table_experts_sets_several_runs_beside_each_other(trained, tars, config, tmp_path):
    run, other = copy(trained, tmp_path), clustered(tmp_path / "two", tars, config, "--experts", 2)
    done = inside("evaluate.py", "--run-dir", run, "--runs", other, "--data", tars / "*.tar", *FEW, "--table", "experts")
    assert done.returncode == 0, done.stderr
    results = json.load(open(run / "evaluation" / "experts.json"))["results"]
    assert [r["experts"] for r in results] == [3, 2] and [len(r["rows"]) for r in results] == [2, 1] and results[0]["rows"][0]["reference"] == results[1]["rows"][0]["reference"]
    assert Image.open(run / "evaluation" / "experts.png").width > 600 and str(other) in done.stdout


def test_samples_of_earlier_calls_are_named(evaluated, tars, tmp_path):
    run = copy(evaluated[0], tmp_path)
    np.savez(run / "evaluation" / "ensemble-top-1.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    done = inside("evaluate.py", "--run-dir", run, "--data", tars / "*.tar", *FEW, "--models", "ensemble", "--strategy", "full", "--npz")
    assert done.returncode == 0 and "; samples in ensemble-full.npz" in done.stdout
    assert "samples of earlier calls, too, not of this table: ensemble-top-1.npz, monolith.npz, student.npz" in done.stdout
    assert "earlier calls" not in evaluated[2].stdout


def test_what_the_file_system_refuses_is_said_before_the_work(trained, tars, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "taken" / "models.md").mkdir(parents=True)
    monkeypatch.setattr(evaluate, "open_reference", None)       # would read
    for out, says in (("file", "it is a file"), ("link", "a link to nothing"), ("file/x", "a part of this path is a file"), ("x" * 300, "shorter name"),
                      ("taken", "models.md is a folder"), ("\udcff", "is not UTF-8")):
        done = inside("evaluate.py", "--run-dir", trained, "--data", tars / "*.tar", *FEW, "--out", tmp_path / out)
        lines = done.stderr.splitlines()
        assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], done.stderr
    done = inside("evaluate.py", "--data", tars / "*.tar", "--images", tmp_path / "taken", "--size", 8, "--out", tmp_path / "file")
    assert done.returncode == 2 and "it is a file" in done.stderr


def test_a_damaged_log_costs_its_device_hours_alone(evaluated, tmp_path):
    run = copy(evaluated[0], tmp_path)
    before, _ = report.ledger(run, 3)
    (run / "logs" / "expert-all.csv").write_bytes(b"step,device_hours\n1,\x00\xff\n")
    after, _ = report.ledger(run, 3)
    assert before["monolith"]["device_hours"] > 0 and after == before | {"monolith": before["monolith"] | {"device_hours": None}}


# ---- the validation loss ------------------------------------------------------------------------------------------

def test_the_loss_is_eq_6_of_the_mixed_velocity_on_the_same_noise(evaluated, tars):
    """By hand, from flow.py: the mean over ten times, one in each tenth."""
    run, result, _ = evaluated
    data = TarDataset(sorted(map(str, tars.glob("*.tar"))), 8, "text", None)
    numbers, team, labels = [3, 77, 239], Ensemble(run, CPU), torch.zeros(240).long() + 2
    args = make_config().sample
    args.seed, args.batch = 0, 20
    space = evaluate.open_space(team, make_config(), {}, CPU)
    found, answers = evaluate.validate(team, ["full", "top-1", "oracle"], space, data, numbers, labels, args, SimpleNamespace(rank=0, world=1, device=CPU))
    for row, number in enumerate(numbers):
        image, caption, _ = data.sample(number)
        rng = np.random.Generator(np.random.Philox(key=[0, number]))
        t = torch.from_numpy((np.arange(10) + rng.random(10)) / 10).float()
        eps = torch.from_numpy(rng.standard_normal((10, 3, 8, 8), dtype=np.float32))
        x_0 = to_float(torch.from_numpy(square(image, 8).copy())[None]).expand(10, -1, -1, -1)
        c = ddm.text.hash_words(caption, 4, 64).expand(10, -1)
        x_t = flow.interpolate(x_0, eps, t)
        p = team.route(x_t, t, c)
        for name, w in (("full", p), ("top-1", flow.top_k(p, 1)), ("oracle", torch.tensor([[0.0, 0, 1]]).expand(10, -1))):
            v = flow.ensemble(w, team.expert_velocity, x_t, t, c)
            torch.testing.assert_close(found[name][row], (v - (eps - x_0)).square().flatten(1).mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(answers[row], p, rtol=1e-4, atol=1e-5)


def test_the_loss_is_measured_in_fp32_and_named_by_what_ran(evaluated, tars, tmp_path, monkeypatch):
    run, first, _ = evaluated
    run, seen, plain = copy(run, tmp_path), [], evaluate.validate

    def validate(team, *rest):
        seen.append((team.dtype, next(team.expert(min(team.paths)).parameters()).dtype, torch.get_float32_matmul_precision()))
        return plain(team, *rest)

    monkeypatch.setattr(evaluate, "validate", validate)
    torch.set_float32_matmul_precision("high")      # as on a GPU
    try:
        result = measured(run, tars, "--precision", "bf16", "--models", "ensemble", "monolith")
        assert set(seen) == {(torch.float32, torch.float32, "highest")} and torch.get_float32_matmul_precision() == "high"
        half = measured(run, tars, "--loss-precision", "bf16", "--samples", 0, "--models", "ensemble")
        assert seen[-1][:2] == (torch.bfloat16, torch.bfloat16)
        measured(run, tars, "--loss-precision", "tf32", "--samples", 0, "--models", "ensemble")
        assert seen[-1] == (torch.float32, torch.float32, "high")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert result["loss"]["precision"] == "fp32" and {row["settings"]["precision"] for row in result["rows"]} == {"bf16"}
    for name, loss in result["loss"]["models"].items():     # of the samples' precision it knows nothing
        assert loss["mean"] == pytest.approx(first["loss"]["models"][name]["mean"], rel=1e-5)
    assert half["loss"]["precision"] == "bf16" and half["loss"]["models"]["ensemble, full"]["mean"] != result["loss"]["models"]["ensemble, full"]["mean"]


def test_no_table_says_auto(evaluated):
    run, result, done = evaluated
    text = (run / "evaluation" / "models.md").read_text()
    assert "auto" not in text and "precision fp32" in text and "samples were drawn with weights in fp32" in text
    assert result["loss"]["precision"] == "fp32" and all(row["settings"]["precision"] == "fp32" for row in result["rows"])


def test_experts_that_are_the_monolith_differ_from_it_by_nothing(evaluated, tars, tmp_path):
    run = copy(evaluated[0], tmp_path)
    for k in range(3):
        rewrite(run / "experts" / "all.safetensors", run / "experts" / f"{k}.safetensors", shard=str(k))
    loss = measured(run, tars, "--samples", 0)["loss"]["models"]
    assert set(loss) == {"ensemble, full", "ensemble, top-1", "ensemble, top-2", "ensemble, threshold-0.1", "ensemble, oracle", "monolith", "student"}
    for name in set(loss) - {"monolith", "student"}:
        assert loss[name]["difference"] == pytest.approx(0, abs=1e-4 * loss["monolith"]["mean"]) and loss[name]["difference_error"] < 1e-3 * loss["monolith"]["mean"]
    assert abs(loss["student"]["difference"]) > 0.01 and loss["student"]["difference_error"] > 1e-3


def test_an_unconditional_run_of_one_expert_needs_no_router(tars, config, tmp_path):
    run = clustered(tmp_path / "run", tars, config, "--experts", 1, "--data.condition", "none")
    os.remove(run / "router.safetensors")
    result = measured(run, tars, "--npz")
    assert result["rows"][0]["sampler"] == "euler 4 steps" and set(result["loss"]["models"]) == {"ensemble, full", "ensemble, top-1", "ensemble, threshold-0.1", "ensemble, oracle"}
    assert result["ledger"]["ensemble"]["flops"] == 1 and "router" not in result


def test_a_missing_or_damaged_expert_is_said_and_spoils_neither_router_nor_ledger(trained, tars, tmp_path):
    run = copy(trained, tmp_path)
    (run / "experts" / "1.safetensors").write_bytes(b"xx")
    result = measured(run, tars, "--models", "ensemble")
    assert result["rows"][0]["missing"] == [1] and "ensemble (without 1)" in (run / "evaluation" / "models.md").read_text()
    assert "router" not in result and "ensemble, oracle" not in result["loss"]["models"] and "ensemble" not in result["ledger"]
    for flags, says in ((["--loss", "oracle"], "1 of 3 are missing"), (["--table", "strategies", "--strategy", "full"], "does nothing")):
        done = inside("evaluate.py", "--run-dir", run, "--data", tars / "*.tar", *FEW, *flags)
        assert done.returncode == 2 and says in done.stderr.splitlines()[-1]
    for k in (1, 2):
        os.remove(run / "experts" / f"{k}.safetensors")
    os.remove(run / "router.safetensors")
    done = inside("evaluate.py", "--run-dir", run, "--data", tars / "*.tar", *FEW)
    assert done.returncode == 2 and "router.safetensors is missing" in done.stderr


def test_models_of_another_clustering_or_size_are_refused(trained, tars, tmp_path):
    run = copy(trained, tmp_path)
    rewrite(run / "experts" / "all.safetensors", fingerprint="0123456789abcdef")
    done = inside("evaluate.py", "--run-dir", run, "--data", tars / "*.tar", *FEW, "--models", "monolith")
    assert done.returncode == 2 and "clustering 0123456789abcdef / " in done.stderr
    done = inside("evaluate.py", "--run-dir", trained, "--data", tars / "*.tar", *FEW, "--models", "ensemble", "--out", tmp_path, "--autoencoder.name", "x")
    assert done.returncode == 2 and "trained without a pretrained autoencoder" in done.stderr
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("size = 8\n", "size = 16\n"))
    done = inside("evaluate.py", "--run-dir", run, "--data", tars / "*.tar", *FEW, "--models", "ensemble")
    assert done.returncode == 2 and "trained with data.size 8" in done.stderr


def test_random_clusters_have_no_oracle_and_no_right_answer(tars, config, tmp_path):
    result = measured(clustered(tmp_path / "run", tars, config, "--cluster.assign", "random"), tars)
    assert "router" not in result and "ensemble, oracle" not in result["loss"]["models"] and "cluster_shares" not in result["rows"][0]
    assert "ensemble, full" in result["loss"]["models"]


# ---- the ledger ---------------------------------------------------------------------------------------------------

def test_the_ledger_adds_up_a_ddm_and_calls_equal_only_what_is(evaluated, tmp_path):
    run, result, done = evaluated
    books = result["ledger"]
    parts = [books[name] for name in ("expert 0", "expert 1", "expert 2", "router")]
    for key in ("images", "flops", "device_hours"):
        assert books["ensemble"][key] == pytest.approx(sum(part[key] for part in parts)) and books["ensemble"][key] > 0
    assert sum(books[f"expert {k}"]["images"] for k in range(3)) == books["monolith"]["images"] == 6 * 24
    ratio = books["ensemble"]["flops"] / books["monolith"]["flops"]
    assert ratio > 1.5 and f"the ensemble: {ratio:.3f} times the monolith's training FLOPs" in done.stdout and "NOT equal compute" in result["equal_compute"][0]
    assert f"{books['student']['flops'] / books['monolith']['flops']:.3f} times" in result["equal_compute"][1]
    run = copy(run, tmp_path)
    rewrite(run / "router.safetensors", flops=int(0.04 * books["monolith"]["flops"]))
    entries, words = report.ledger(run, 3)
    assert words[0].endswith("(experts 1.000, router 0.040): equal compute")
    # a student that begins with an expert's weights costs what that did, too; with all teachers it is counted once
    alone, with_teachers = (float(line.split(": ")[1].split()[0]) for line in words[1:])
    rewrite(run / "student.safetensors", init="0", init_flops=books["expert 0"]["flops"])
    assert [float(line.split(": ")[1].split()[0]) for line in report.ledger(run, 3)[1][1:]] == pytest.approx([alone + 1 / 3, with_teachers], abs=2e-3)
    os.remove(run / "experts" / "1.safetensors")
    entries, words = report.ledger(run, 3)
    assert "ensemble" not in entries and not words      # of a part of the experts there is no sum


# ---- networks -----------------------------------------------------------------------------------------------------

def test_feature_spaces_have_the_field_s_names_and_are_not_normalised(latent_run, tars, networks, tmp_path):
    run = copy(latent_run, tmp_path)
    result = measured(run, tars, "--features", networks / "dinov2", networks / "clip-image", "--clip", networks / "clip-image", "--npz")
    row = result["rows"][0]
    assert {"FD-DINOv2 (dinov2)", "CLIP-FID (clip-image)"} <= row.keys()
    assert "L2" not in (described := result["reference"]["features"]["FD-DINOv2 (dinov2)"]["preprocessing"]) and described in (run / "evaluation" / "models.md").read_text()
    assert result["loss"]["models"].keys() == {"ensemble, full", "ensemble, top-1", "ensemble, top-2", "ensemble, threshold-0.1", "ensemble, oracle"}
    assert len(result["router"]["accuracy"]) == 10 and result["reference"]["clip"]["class"] == "CLIPModel" and 0 <= row["clip_score"] <= 100
    # the reference's statistics, by hand
    prepare, function, info = encoders.image_features(make_config({"features.name": str(networks / "dinov2")}).features, CPU, normalise=False)
    data = TarDataset(sorted(map(str, tars.glob("*.tar"))), 8)
    x = torch.from_numpy(function([prepare(Image.fromarray(square(data.sample(i)[0], 8))) for i in range(240)])).double()
    kept = [load_file(path) for path in (run / "evaluation").glob("reference-*.safetensors")]
    mine = next(s for s in kept if "mean" in s and len(s["mean"]) == x.shape[1])
    torch.testing.assert_close(mine["mean"], x.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine["covariance"], torch.cov(x.T), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(x.norm(dim=1), torch.ones(240).double())


def test_clip_score_is_a_hundred_times_the_cosine(networks):
    import transformers
    prepare, score, _ = encoders.clip_scorer(str(networks / "clip-image"), CPU)
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)) for i in range(3)]
    captions = ["a red circle", "a cross", "a long text " * 20]
    found = score([prepare(image) for image in images], captions)
    model = transformers.CLIPModel.from_pretrained(networks / "clip-image").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(networks / "clip-image")
    for image, caption, value in zip(images, captions, found):
        text = tokenizer([caption], truncation=True, max_length=24, return_tensors="pt")
        pixels = (torch.from_numpy(square(image, 28).copy()).permute(2, 0, 1) / 255 - torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
                  ) / torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        with torch.no_grad():
            out = model(input_ids=text["input_ids"], attention_mask=text["attention_mask"], pixel_values=pixels[None])
        assert value == pytest.approx(max(0, 100 * torch.cosine_similarity(out.image_embeds, out.text_embeds).item()), abs=1e-3)


def test_class_runs_sample_the_reference_s_classes_and_write_them_down(tars, config, tmp_path, monkeypatch):
    folder = tmp_path / "tars"
    os.mkdir(folder)
    with tarfile.open(tars / "00000.tar") as source, tarfile.open(folder / "00000.tar", "w") as target:
        for member in source:
            payload = source.extractfile(member).read()
            if member.name.endswith(".txt"):
                member.name, payload = member.name[:-3] + "cls", str(int(member.name[:9]) % 3).encode()
                member.size = len(payload)
            target.addfile(member, io.BytesIO(payload))
    run = clustered(tmp_path / "run", folder, config, "--experts", 2, "--data.condition", "class", "--data.classes", 3)
    asked, velocity = [], Ensemble.velocity
    monkeypatch.setattr(Ensemble, "velocity", lambda team, s, c, *rest: (asked.extend(c.tolist()), velocity(team, s, c, *rest))[1])
    measured(run, folder, "--samples", 100, "--loss-images", 0, "--npz", "--steps", 1)
    with np.load(run / "evaluation" / "ensemble-top-1.npz") as arrays:
        assert arrays["arr_1"].tolist() == asked and sorted(asked) == sorted(i % 3 for i in range(100))     # as many as the reference has


# ---- mistakes -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, says", [
    (["--loss", "sample-1"], ["--loss sample-1", "draws"]),
    (["--loss", "oracle-1"], ["--loss oracle-1", "--loss oracle"]),
    (["--images", "x"], ["--images needs --size"]),
    (["--images", "x", "--size", 8], ["--samples does nothing with --images"]),
    (["--samples", 0, "--npz"], ["--npz does nothing with --samples 0"]),
    (["--samples", 0, "--cfg", 2], ["--cfg does nothing with --samples 0"]),
    (["--loss-images", 0, "--loss", "full"], ["--loss does nothing with --loss-images 0"]),
    (["--loss-images", 0, "--loss-precision", "bf16"], ["--loss-precision does nothing with --loss-images 0"]),
    (["--samples", 0, "--precision", "bf16"], ["--precision does nothing with --samples 0"]),
    (["--loss-precision", "auto"], ["--loss-precision", "'auto'"]),
    (["--models", "monolith", "--route-every", 2], ["--route-every does nothing with --monolith"]),
    (["--cfg-low", 5], ["cfg_low 5.0"]),
    (["--seed", 2 ** 64], ["--seed"]),
    (["--clip", "x", "--models", "student"], ["student.safetensors is missing"]),
    (["--runs", "x"], ["--runs needs --table experts"]),
    (["--table", "experts"], ["--runs DIR"]),
    (["--models", "student"], ["student.safetensors is missing", "distill.py"]),
    (["--features", "./nowhere"], ["features = './nowhere'", "no such folder"]),
    (["--samples", 1], ["--samples 1 (0, or at least 2)"]),
    (["--table", "strategies", "--models", "monolith"], ["--table strategies", "only monolith"]),
    (["--loss", "top-4"], ["'top-4'", "4 experts of 3"]),
    (["--table", "strategies", "--strategy", "once"], ["--strategy once does nothing with --table strategies"]),
    (["--model", "student"], ["unknown argument --model"])])
def test_mistakes_are_named_in_one_line(trained, tars, tmp_path, flags, says):
    done = inside("evaluate.py", "--run-dir", trained, "--data", tars / "*.tar", "--out", tmp_path, "--loss-images", 4, "--samples", 4, *flags)
    lines = [line for line in done.stderr.strip().splitlines() if "images" not in line or line.startswith("error")]
    assert done.returncode == 2 and len(lines) == 1 and all(text in lines[0] for text in says), done.stderr


def test_pictures_of_another_size_are_refused(tars, tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    (tmp_path / "torn.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-30])
    for path, says in (("x.npz", ["16x16", "--size 8"]), ("torn.npz", ["cannot read pictures", "torn.npz"]), ("nowhere", ["cannot read pictures", "nowhere"])):
        done = inside("evaluate.py", "--data", tars / "*.tar", "--images", tmp_path / path, "--size", 8, "--out", tmp_path / "out")
        assert done.returncode == 2 and all(text in done.stderr for text in says)
