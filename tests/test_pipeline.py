"""The commands themselves, as a user runs them, on a tiny data set."""
import contextlib
import csv
import glob
import json
import os
import shutil
import signal
import subprocess
import tarfile

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, command, command_line, copy, give, inside, pictures, sample, wait_until, works
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import model as models
from training import TIMING
from ddm import artifacts


def begin(*args, ranks=0):
    """Starts a script as conftest.command does, in a process group of its own, and does not wait for it."""
    return subprocess.Popen(command_line(*args, ranks=ranks), cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)


def wait_for_rows(process, run, name, count):
    """Until a training, which is far from its end, has logged that many rows and has a checkpoint."""
    log = run / "logs" / f"{name}.csv"
    wait_until(lambda: process.poll() is not None or log.exists() and log.read_text().count("\n") > count
               and glob.glob(str(run / "checkpoints" / name / "step-*[0-9]")))


def rows(run, name):
    with open(os.path.join(run, "logs", f"{name}.csv"), newline="") as f:
        return [{k: v for k, v in row.items() if k not in ("time", "device_hours", *TIMING)} for row in csv.DictReader(f)]


def same_tensors(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def members(folder):
    """{member name: bytes} of all tars in a folder."""
    found = {}
    for path in sorted(glob.glob(os.path.join(folder, "*.tar"))):
        with tarfile.open(path) as tar:
            for m in tar:
                assert m.name not in found
                found[m.name] = tar.extractfile(m).read()
    return found


def tree(folder):
    """{relative path: bytes} of a partition's files."""
    paths = [p for pattern in ("shards/*/*.tar", "clusters.*", "config.toml") for p in glob.glob(os.path.join(folder, pattern))]
    return {os.path.relpath(p, folder): open(p, "rb").read() for p in paths}


# ---- stage 1 ------------------------------------------------------------------------------------------------------

def test_partition_holds_every_member_of_every_sample_once_byte_for_byte(tars, clustered):
    parts = [members(clustered / "shards" / str(k)) for k in range(3)]
    assert all(parts)
    together = {name: payload for part in parts for name, payload in part.items()}
    assert sum(map(len, parts)) == len(together)        # disjoint
    assert together == members(tars)


def test_router_s_shard_is_all_of_a_small_set_with_each_sample_s_cluster(tars, clustered):
    router = members(clustered / "shards" / "router")
    clusters = {name: int(payload) for name, payload in router.items() if name.endswith(".cluster")}
    assert {n: p for n, p in router.items() if not n.endswith(".cluster")} == members(tars)
    for k in range(3):
        keys = {n[:-4] for n in members(clustered / "shards" / str(k)) if n.endswith(".png")}
        assert keys == {n[:-8] for n, cluster in clusters.items() if cluster == k}


def test_router_s_subset_is_exactly_as_large_as_configured_and_in_the_data_s_proportions(tars, config, tmp_path):
    run = tmp_path / "run"
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", run, "--config", config, "--cluster.router_images", 120)
    labels = [int(p) for n, p in members(run / "shards" / "router").items() if n.endswith(".cluster")]
    counts = load_file(run / "clusters.safetensors")["counts"]
    assert len(labels) == 120 and counts.sum() == 240
    assert np.abs(np.bincount(labels, minlength=3) / 120 - counts.numpy() / 240).max() < 0.12     # 2.7 standard deviations
    assert labels != sorted(labels)


def test_clusters_file_has_what_the_design_promises(clustered, tars):
    tensors = load_file(clustered / "clusters.safetensors")
    F, D = tensors["fine_centroids"].shape
    assert F == 6 and tensors["coarse_centroids"].shape == (3, D) and tensors["fine_to_coarse"].shape == (6,)
    with safe_open(clustered / "clusters.safetensors", "pt") as f:
        assert list(f.metadata()) == ["nanoddm"]
        metadata = json.loads(f.metadata()["nanoddm"])
    assert {"fingerprint", "extractor", "seed", "assign"} <= metadata.keys()
    features = load_file(clustered / "features" / "00000.safetensors")
    assert features["features"].shape == (100, D) and features["features"].dtype == torch.float16
    # the images of a cluster are those whose features are nearest to its coarse centroid
    nearest = torch.cdist(features["features"].double(), tensors["coarse_centroids"].double()).argmin(1)
    with tarfile.open(tars / "00000.tar") as tar:
        keys = {m.offset: m.name[:-4] for m in tar if m.name.endswith(".png")}
    for k in range(3):
        with tarfile.open(clustered / "shards" / str(k) / "00000.tar") as tar:
            assert {n[:-4] for n in tar.getnames()} == {keys[o] for o, c in zip(features["offsets"].tolist(), nearest) if c == k}
    assert Image.open(clustered / "clusters.png").width > 500


def test_partition_is_the_same_on_two_ranks(tars, config, clustered, tmp_path):
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", tmp_path / "run", "--config", config, ranks=2)
    assert tree(tmp_path / "run") == tree(clustered)


def test_interrupted_clustering_goes_on_and_ends_the_same(tars, config, clustered, tmp_path):
    run = copy(clustered, tmp_path)
    os.remove(run / "features" / "00001.safetensors")
    (run / "features" / "00002.safetensors").write_bytes(b"damaged")
    os.remove(run / "shards" / "1" / "00002.tar")
    os.remove(run / "clusters.png")
    kept = os.stat(run / "shards" / "1" / "00000.tar").st_mtime_ns
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", run)
    assert tree(run) == tree(clustered) and os.stat(run / "shards" / "1" / "00000.tar").st_mtime_ns == kept


@pytest.mark.parametrize("rule", ["fine", "random"])
def test_other_rules_of_assignment(tars, config, clustered, tmp_path, rule):
    run = tmp_path / "run"
    done = command("cluster.py", "--data", tars / "*.tar", "--run-dir", run, "--config", config, "--cluster.assign", rule)
    tensors, old = load_file(run / "clusters.safetensors"), load_file(clustered / "clusters.safetensors")
    assert torch.equal(tensors["coarse_centroids"], old["coarse_centroids"])
    assert "fingerprint" in done.stdout
    if rule == "random":
        assert tensors["counts"].min() > 50     # of 80 expected
    else:
        features = torch.cat([load_file(p)["features"] for p in sorted(glob.glob(str(run / "features" / "*")))])
        fine = torch.cdist(features.double(), tensors["fine_centroids"].double()).argmin(1)
        assert torch.equal(tensors["fine_to_coarse"][fine].bincount(minlength=3), tensors["counts"])
    read = lambda r: json.loads(safe_open(r / "clusters.safetensors", "pt").metadata()["nanoddm"])["fingerprint"]
    assert read(run) != read(clustered)


def test_unusable_samples_are_left_out_and_counted_by_cause(tars, config, tmp_path):
    from ddm.tars import TarWriter
    folder = tmp_path / "in"
    shutil.copytree(tars, folder)
    with TarWriter(str(folder / "bad.tar")) as tar:
        tar.add("a.png", b"no picture")
        tar.add("a.txt", b"a caption")
        tar.add("b.txt", b"no picture at all")
        tar.add("c.png", members(tars)["000000000.png"])
    torn = (tars / "00000.tar").read_bytes()[:20 * 2048 + 700]
    (folder / "torn.tar").write_bytes(torn)
    done = command("cluster.py", "--data", folder / "0*.tar", folder / "bad.tar", "--run-dir", tmp_path / "run", "--config", config)
    assert "240 images" in done.stdout
    assert "3 skipped" in done.stdout and "no caption: 1, no image: 1, undecodable" in done.stdout
    with open(tmp_path / "run" / "logs" / "cluster.skipped.csv", newline="") as f:
        assert [(row["tar"], row["sample"], row["cause"].split(" (")[0]) for row in csv.DictReader(f)] == [
            ("bad", "a", "undecodable"), ("bad", "b", "no image"), ("bad", "c", "no caption")]
    done = command("cluster.py", "--data", folder / "t*.tar", "--run-dir", tmp_path / "torn", "--config", config, check=False)
    assert "torn.tar" in done.stderr and "the 20 usable images" in done.stderr


# ---- stages 2 and 3 -----------------------------------------------------------------------------------------------

def test_training_writes_what_the_design_promises(trained):
    _, info = artifacts.load(trained / "experts" / "1.safetensors")
    assert info["shard"] == "1" and info["step"] == 6 and info["images"] == 6 * 8 and info["objective"] == "x0"
    assert info["flops"] == 3 * artifacts.load(trained / "experts" / "1.safetensors")[0].flops() * 48
    assert artifacts.read_info(trained / "experts" / "all.safetensors")["images"] == 6 * 24     # the monolith's batch is the ensemble's
    router, _ = artifacts.load(trained / "router.safetensors")
    assert isinstance(router, models.Router) and router.config.clusters == 3
    fingerprints = {artifacts.read_info(p)["fingerprint"] for p in glob.glob(str(trained / "**" / "*.safetensors"), recursive=True)
                    if "experts" in p or "router.safe" in p}
    assert len(fingerprints) == 1
    for name in ("expert-0", "expert-all", "router"):
        log = rows(trained, name)
        assert [r["step"] for r in log] == ["2", "4", "6"] and all(float(r["loss"]) > 0 and float(r["grad_norm"]) > 0 for r in log)
        assert (trained / "checkpoints" / name / "status").read_text() == "finished 6\n"
        assert len(os.listdir(trained / "checkpoints" / name)) == 3      # two checkpoints and the status
    assert "acc_t4" in rows(trained, "router")[0] and "loss_t0" in rows(trained, "expert-0")[0]
    assert Image.open(trained / "samples" / "expert-0-00000006.png").size[0] > 200


def test_finished_training_run_again_changes_nothing(trained, tmp_path):
    run = copy(trained, tmp_path)
    done = command("train_expert.py", "--run-dir", run, "--shard", 0)
    assert "finished at step 6" in done.stdout
    assert same_tensors(run / "experts" / "0.safetensors", trained / "experts" / "0.safetensors") and rows(run, "expert-0") == rows(trained, "expert-0")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed_training_ends_in_the_same_bits(clustered, tmp_path, how):
    """Also: the log has the rows of an undisturbed run, and SIGTERM finishes its step and saves."""
    flags = ["--shard", "0", "--train.save_every", "7", "--train.log_every", "2"]
    whole, broken = copy(clustered, tmp_path / "a"), copy(clustered, tmp_path / "b")
    process = begin("train_expert.py", "--run-dir", broken, *flags, "--train.steps", 100_000)
    wait_for_rows(process, broken, "expert-0", 6)
    process.send_signal(how)
    out = process.communicate(timeout=300)[0]
    status = (broken / "checkpoints" / "expert-0" / "status").read_text()
    assert status.startswith("to be continued")
    if how == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM and f"stopped by a signal, saved at step {status.split()[-1]};" in out
    flags += ["--train.steps", int(rows(broken, "expert-0")[-1]["step"]) + 20]      # wherever it was
    assert "resumed" in command("train_expert.py", "--run-dir", broken, *flags).stdout
    command("train_expert.py", "--run-dir", whole, *flags)
    assert same_tensors(whole / "experts" / "0.safetensors", broken / "experts" / "0.safetensors")
    assert rows(whole, "expert-0") == rows(broken, "expert-0")
    assert (whole / "experts" / "0.safetensors").read_bytes() == (broken / "experts" / "0.safetensors").read_bytes()


def test_two_ranks_killed_between_saves_and_rows_go_on_to_the_same_bits(clustered, tmp_path):
    flags = ["--shard", "all", "--train.save_every", "7", "--train.log_every", "4"]
    whole, broken = copy(clustered, tmp_path / "a"), copy(clustered, tmp_path / "b")
    process = begin("train_expert.py", "--run-dir", broken, *flags, "--train.steps", 100_000, ranks=2)
    wait_for_rows(process, broken, "expert-all", 3)
    for pid in filter(str.isdigit, os.listdir("/proc")):        # torchrun, its ranks and their decoding processes, at one blow
        with contextlib.suppress(OSError):
            if str(broken) in open(f"/proc/{pid}/cmdline").read():
                os.kill(int(pid), signal.SIGKILL)
    process.communicate(timeout=300)
    assert (broken / "checkpoints" / "expert-all" / "status").read_text().startswith("to be continued")
    flags += ["--train.steps", int(rows(broken, "expert-all")[-1]["step"]) + 20]
    for run in (whole, broken):
        command("train_expert.py", "--run-dir", run, *flags, ranks=2)
    assert rows(whole, "expert-all") == rows(broken, "expert-all")
    assert (whole / "experts" / "all.safetensors").read_bytes() == (broken / "experts" / "all.safetensors").read_bytes()


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_failure_ends_the_training_instead_of_hanging(clustered, tmp_path, ranks):
    """On the last rank alone, with decoding processes at work that ignore signals."""
    run = copy(clustered, tmp_path)
    script = tmp_path / "fails.py"
    script.write_text("import os, sys; sys.path.insert(0, os.getcwd()); import flow, train_expert; from ddm import errors\n"
                      "loss = flow.expert_loss\n"
                      "def fail(*a):\n"
                      "    if os.environ.get('RANK', '1') == '1': raise RuntimeError('out of memory')\n"
                      "    return loss(*a)\n"
                      "flow.expert_loss = fail\n"
                      "errors.script(train_expert.main)\n")
    done = command(script, "--run-dir", run, "--shard", "all", "--data.workers", 2, ranks=ranks, check=False, real=True)     # or it runs into its time limit
    assert done.returncode == 1 and "out of memory" in done.stderr


def test_weight_decay_and_learning_rate_may_change_on_a_resume_and_do(trained, tmp_path):
    results = []
    for name, decay in (("a", 0), ("b", 50)):
        run = copy(trained, tmp_path / name)
        command("train_expert.py", "--run-dir", run, "--shard", 0, "--train.steps", 8, "--train.weight_decay", decay)
        results.append(run / "experts" / "0.safetensors")
    assert not same_tensors(*results)



def test_an_export_that_is_gone_is_written_again(trained, tmp_path):
    run = copy(trained, tmp_path)
    for path, script in ((run / "experts" / "0.safetensors", ["train_expert.py", "--shard", 0]), (run / "router.safetensors", ["train_router.py"])):
        before = path.read_bytes()
        os.remove(path)
        command(*script, "--run-dir", run)
        assert path.read_bytes() == before


def test_one_cluster_is_one_expert_and_the_monolith(tars, config, tmp_path):
    """Also: bf16 training and export, runs of consecutive samples, random crops."""
    run = tmp_path / "run"
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", run, "--config", config, "--experts", 1, "--data.shuffle_block", 8, "--data.crop", "random")
    for shard in (0, "all"):
        command("train_expert.py", "--run-dir", run, "--shard", shard, "--train.precision", "bf16", "--train.export", "bf16")
    command("train_router.py", "--run-dir", run, "--train.steps", 2)
    assert same_tensors(run / "experts" / "0.safetensors", run / "experts" / "all.safetensors")
    assert {t.dtype for t in load_file(run / "experts" / "0.safetensors").values()} == {torch.bfloat16}
    for name, flags in (("full", ["--strategy", "full"]), ("once", ["--strategy", "once"]), ("all", ["--monolith"])):
        sample(run, tmp_path / name, *flags)
    for other in ("once", "all"):
        assert all(np.array_equal(a, b) for a, b in zip(pictures(tmp_path / "full"), pictures(tmp_path / other), strict=True))


def test_a_checkpoint_cut_short_is_not_chosen(trained, tmp_path):
    run = copy(trained, tmp_path)
    folder = run / "checkpoints" / "expert-0"
    os.rename(folder / "step-00000006", folder / "step-00000006.tmp")      # as it looks while it is written
    (folder / "step-00000005.tmp").mkdir()
    assert "resumed at step 4" in command("train_expert.py", "--run-dir", run, "--shard", 0).stdout
    assert sorted(os.listdir(folder)) == ["status", "step-00000004", "step-00000006"]      # what was left over is gone
    assert same_tensors(run / "experts" / "0.safetensors", trained / "experts" / "0.safetensors")


@pytest.mark.parametrize("script, name", [(["train_expert.py", "--shard", "all"], "expert-all"), (["train_router.py"], "router")])
def test_two_ranks_and_micro_batches_give_the_curve_of_one_process(clustered, trained, tmp_path, script, name):
    run = copy(clustered, tmp_path)
    command(*script, "--run-dir", run, "--train.micro_batch", 5, ranks=2)
    for one, two in zip(rows(trained, name), rows(run, name), strict=True):
        for column in one:
            # AdamW's first steps are little more than the gradient's signs: rounding shows in its norm before it shows in the loss
            rel = 1e-2 if column in ("grad_norm", "norm_max") else 2e-4
            assert float(two[column] or 0) == pytest.approx(float(one[column] or 0), rel=rel, abs=1e-5), column


def test_a_run_saved_on_two_ranks_goes_on_on_one(clustered, trained, tmp_path):
    run = copy(clustered, tmp_path)
    command("train_expert.py", "--shard", "all", "--run-dir", run, "--train.steps", 3, "--train.save_every", 3, ranks=2)
    done = command("train_expert.py", "--shard", "all", "--run-dir", run)
    assert "resumed at step 3" in done.stdout
    one, two = rows(trained, "expert-all"), rows(run, "expert-all")
    assert float(one[-1]["loss"]) == pytest.approx(float(two[-1]["loss"]), rel=2e-4)


def test_an_expert_needs_its_own_folder_alone_and_no_network(clustered, trained, tmp_path):
    run = copy(clustered, tmp_path)
    for other in ("0", "1", "router"):
        shutil.rmtree(run / "shards" / other)
    shutil.rmtree(run / "features")
    unshare = ["unshare", "-rn"] if works("unshare", "-rn", "true") else []
    done = subprocess.run([*unshare, *command_line("train_expert.py", "--run-dir", run, "--shard", 2)], cwd=ROOT, capture_output=True, text=True,
                          env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert (run / "experts" / "2.safetensors").read_bytes() == (trained / "experts" / "2.safetensors").read_bytes()


def test_training_learns(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    command("train_expert.py", "--run-dir", run, "--shard", 0, "--train.steps", 150, "--train.log_every", 25, "--data.workers", 0)
    command("train_router.py", "--run-dir", run, "--train.steps", 150, "--train.log_every", 25, "--data.workers", 0)
    expert, router = rows(run, "expert-0"), rows(run, "router")
    assert float(expert[-1]["loss"]) < 0.5 * float(expert[0]["loss"])
    assert float(router[-1]["acc_t0"]) > 0.8 and float(router[-1]["acc_t0"]) > float(router[-1]["acc_t4"]) - 0.05


def test_router_s_default_length_is_4_percent_of_the_training_flops(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    done = command("train_router.py", "--run-dir", run, "--train.router.steps", 0)
    expert = models.DiT(models.ModelConfig(8, 3, 32, 1, 2, 2, "text", vocab=64, length=4)).flops() * 6 * 24
    router = models.Router(models.ModelConfig(8, 3, 32, 1, 2, 2, "text", vocab=64, length=4, clusters=3)).flops() * 24
    steps = int(rows(run, "router")[-1]["step"])
    assert steps == -(-0.04 * expert // router) and f"{steps} steps" in done.stdout
    assert f"are {steps} steps of the router, which may be too few" in done.stderr


def test_too_many_unreadable_samples_stop_the_training(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    for path in glob.glob(str(run / "shards" / "0" / "*.tar")):
        data = bytearray(open(path, "rb").read())
        with tarfile.open(path) as tar:
            pictures = [m.offset_data for m in tar if m.name.endswith(".png")]
        for offset in pictures[::2]:
            data[offset:offset + 8] = bytes(8)
        open(path, "wb").write(data)
    done = command("train_expert.py", "--run-dir", run, "--shard", 0, "--train.steps", 20, check=False)
    assert done.returncode == 2 and "data.max_bad = 0.01" in done.stderr.splitlines()[-1]
    done = command("train_expert.py", "--run-dir", run, "--shard", 0, "--data.max_bad", 0.9)
    assert int(rows(run, "expert-0")[-1]["bad"]) > 5 and "undecodable" in done.stderr


# ---- all stages, other conditions -----------------------------------------------------------------------------------

def test_a_class_conditional_run_and_an_unconditional_one_work_end_to_end(tars, config, tmp_path):
    from ddm.tars import TarWriter
    with TarWriter(str(tmp_path / "classes.tar")) as tar:
        for i, (name, payload) in enumerate(sorted((n, p) for n, p in members(tars).items() if n.endswith(".png"))):
            tar.add(name, payload)
            tar.add(name[:-3] + "cls", str(i % 7).encode())
    for condition, flags in (("class", ["--class", 0, "--class", 6]), ("none", [])):
        run = tmp_path / condition
        command("cluster.py", "--data", tmp_path / "classes.tar", "--run-dir", run, "--config", config, "--experts", 2,
                "--data.condition", condition, "--data.classes", 7)
        command("train_expert.py", "--run-dir", run, "--shard", 0, "--train.steps", 2)
        give(run, 0, 1)
        command("train_router.py", "--run-dir", run, "--train.steps", 2)
        n = 2 if flags else 11
        command("sample.py", "--run-dir", run, *flags, "--num-images", n, "--steps", 2, "--out", run / "out")
        assert len(pictures(run / "out")) == (4 if flags else 11)
    done = inside("sample.py", "--run-dir", tmp_path / "none", "--cfg", 2)
    assert done.returncode == 2 and "condition = none: --sample.cfg does nothing" in done.stderr
    done = command("sample.py", "--run-dir", tmp_path / "class", "--class", 7, check=False)
    assert done.returncode == 2 and "--class 7 is not one of 0..6" in done.stderr
