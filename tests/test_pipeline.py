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
from conftest import (
    ENVIRONMENT,
    ROOT,
    command,
    command_line,
    copy,
    give,
    inside,
    pictures,
    sample,
    wait_until,
    works,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import model as models
from ddm import artifacts, plan
from ddm.tars import TarWriter

# columns of a log that are not the same twice
TIMING = ("time", "device_hours", "images_per_s", "mfu", "wait", "memory_gb")


def begin(*args, ranks=0):
    """Starts a script as conftest.command does, in a process group of its own, and does not wait
    for it.
    """
    return subprocess.Popen(command_line(*args, ranks=ranks), cwd=ROOT, env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def wait_for_rows(process, run, name, count):
    """Until a training, which is far from its end, has logged that many rows and has a checkpoint.
    """
    log = run / "logs" / f"{name}.csv"

    def is_there():
        if process.poll() is not None:
            return True
        if not log.exists() or log.read_text().count("\n") <= count:
            return False
        return glob.glob(str(run / "checkpoints" / name / "step-*[0-9]"))

    wait_until(is_there)


def rows(run, name):
    """The rows of a log, without what is not the same twice."""
    with open(os.path.join(run, "logs", f"{name}.csv"), newline="") as f:
        found = list(csv.DictReader(f))
    for row in found:
        for column in TIMING:
            row.pop(column, None)
    return found


def same_tensors(a, b):
    a = load_file(a)
    b = load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def members(folder):
    """{member name: bytes} of all tars in a folder."""
    found = {}
    for path in sorted(glob.glob(os.path.join(folder, "*.tar"))):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found


def tree(folder):
    """{relative path: bytes} of a partition's files."""
    found = {}
    for pattern in ("shards/*/*.tar", "clusters.*", "config.toml"):
        for path in folder.glob(pattern):
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def status(run, name):
    return (run / "checkpoints" / name / "status").read_text()


# ---- stage 1 -------------------------------------------------------------------------------------

def test_partition_holds_every_member_once_byte_for_byte(tars, clustered):
    parts = [members(clustered / "shards" / str(k)) for k in range(3)]
    assert all(parts)
    together = parts[0] | parts[1] | parts[2]
    # disjoint
    assert sum(map(len, parts)) == len(together)
    assert together == members(tars)


def test_router_s_shard_is_all_of_a_small_set_with_its_clusters(tars, clustered):
    images = members(clustered / "shards" / "router")
    clusters = {}
    for name in list(images):
        if name.endswith(".cluster"):
            clusters[name.removesuffix(".cluster")] = int(images.pop(name))
    assert images == members(tars)
    for k in range(3):
        shard = members(clustered / "shards" / str(k))
        keys = {name.removesuffix(".png") for name in shard if name.endswith(".png")}
        assert keys == {key for key, cluster in clusters.items() if cluster == k}


def test_router_s_subset_has_its_size_and_the_data_s_proportions(tars, config, tmp_path):
    run = tmp_path / "run"
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", run, "--config", config,
            "--cluster.router_images", 120)
    subset = members(run / "shards" / "router")
    labels = [int(payload) for name, payload in subset.items() if name.endswith(".cluster")]
    counts = load_file(run / "clusters.safetensors")["counts"].numpy()
    assert len(labels) == 120 and counts.sum() == 240
    # 2.7 standard deviations
    assert np.abs(np.bincount(labels, minlength=3) / 120 - counts / 240).max() < 0.12
    assert labels != sorted(labels)


def test_clusters_file_has_what_the_design_promises(clustered, tars):
    tensors = load_file(clustered / "clusters.safetensors")
    F, D = tensors["fine_centroids"].shape
    assert F == 6
    assert tensors["coarse_centroids"].shape == (3, D)
    assert tensors["fine_to_coarse"].shape == (6,)
    with safe_open(clustered / "clusters.safetensors", "pt") as f:
        assert list(f.metadata()) == ["nanoddm"]
        metadata = json.loads(f.metadata()["nanoddm"])
    assert {"fingerprint", "extractor", "seed", "assign"} <= metadata.keys()
    features = load_file(clustered / "features" / "00000.safetensors")
    assert features["features"].shape == (100, D)
    assert features["features"].dtype == torch.float16

    # the images of a cluster are those whose features are nearest to its coarse centroid
    distance = torch.cdist(features["features"].double(), tensors["coarse_centroids"].double())
    nearest = distance.argmin(1)
    with tarfile.open(tars / "00000.tar") as tar:
        keys = {m.offset: m.name.removesuffix(".png") for m in tar if m.name.endswith(".png")}
    meant = {k: set() for k in range(3)}
    for offset, k in zip(features["offsets"].tolist(), nearest.tolist(), strict=True):
        meant[k].add(keys[offset])
    for k in range(3):
        with tarfile.open(clustered / "shards" / str(k) / "00000.tar") as tar:
            assert {name[:-4] for name in tar.getnames()} == meant[k]
    assert Image.open(clustered / "clusters.png").width > 500


def test_partition_is_the_same_on_two_ranks(tars, config, clustered, tmp_path):
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", tmp_path / "run",
            "--config", config, ranks=2)
    assert tree(tmp_path / "run") == tree(clustered)


def test_interrupted_clustering_resumes_and_ends_the_same(tars, config, clustered, tmp_path):
    run = copy(clustered, tmp_path)
    os.remove(run / "features" / "00001.safetensors")
    (run / "features" / "00002.safetensors").write_bytes(b"damaged")
    os.remove(run / "shards" / "1" / "00002.tar")
    os.remove(run / "clusters.png")
    existing = run / "shards" / "1" / "00000.tar"
    date = os.stat(existing).st_mtime_ns
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", run)
    assert tree(run) == tree(clustered)
    assert os.stat(existing).st_mtime_ns == date


def fingerprint(run):
    with safe_open(run / "clusters.safetensors", "pt") as f:
        return json.loads(f.metadata()["nanoddm"])["fingerprint"]


@pytest.mark.parametrize("rule", ["fine", "random"])
def test_other_rules_of_assignment(tars, config, clustered, tmp_path, rule):
    run = tmp_path / "run"
    done = command("cluster.py", "--data", tars / "*.tar", "--run-dir", run, "--config", config,
                   "--cluster.assign", rule)
    tensors = load_file(run / "clusters.safetensors")
    nearest_rule = load_file(clustered / "clusters.safetensors")
    assert torch.equal(tensors["coarse_centroids"], nearest_rule["coarse_centroids"])
    assert "fingerprint" in done.stdout
    assert fingerprint(run) != fingerprint(clustered)
    if rule == "random":
        # of 80 expected
        assert tensors["counts"].min() > 50
        return

    features = [load_file(path)["features"] for path in sorted((run / "features").iterdir())]
    distance = torch.cdist(torch.cat(features).double(), tensors["fine_centroids"].double())
    labels = tensors["fine_to_coarse"][distance.argmin(1)]
    assert torch.equal(labels.bincount(minlength=3), tensors["counts"])


def test_unusable_samples_are_left_out_and_counted_by_cause(tars, config, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(tars, folder)
    with TarWriter(str(folder / "bad.tar")) as tar:
        tar.add("a.png", b"no picture")
        tar.add("a.txt", b"a caption")
        tar.add("b.txt", b"no picture at all")
        tar.add("c.png", members(tars)["000000000.png"])
    torn = (tars / "00000.tar").read_bytes()[:20 * 2048 + 700]
    (folder / "torn.tar").write_bytes(torn)

    run = tmp_path / "run"
    done = command("cluster.py", "--data", folder / "0*.tar", folder / "bad.tar", "--run-dir", run,
                   "--config", config)
    assert "240 images" in done.stdout and "3 skipped" in done.stdout
    assert "no caption: 1, no image: 1, undecodable" in done.stdout
    with open(run / "logs" / "cluster.skipped.csv", newline="") as f:
        listed = list(csv.DictReader(f))
    assert [row["tar"] for row in listed] == ["bad"] * 3
    assert [row["sample"] for row in listed] == ["a", "b", "c"]
    causes = [row["cause"].split(" (")[0] for row in listed]
    assert causes == ["undecodable", "no image", "no caption"]

    done = command("cluster.py", "--data", folder / "t*.tar", "--run-dir", tmp_path / "torn",
                   "--config", config, check=False)
    assert "torn.tar" in done.stderr and "the 20 usable images" in done.stderr


# ---- stages 2 and 3 ------------------------------------------------------------------------------

def test_training_writes_what_the_design_promises(trained):
    expert, info = artifacts.load(trained / "experts" / "1.safetensors")
    assert info["shard"] == "1" and info["objective"] == "x0"
    assert info["step"] == 6 and info["images"] == 6 * 8
    assert info["flops"] == 3 * plan.flops(expert.config) * 48
    # the monolith's batch is the ensemble's
    assert artifacts.read_info(trained / "experts" / "all.safetensors")["images"] == 6 * 24
    router, _ = artifacts.load(trained / "router.safetensors")
    assert isinstance(router, models.Router) and router.config.clusters == 3

    fingerprints = {artifacts.read_info(trained / "router.safetensors")["fingerprint"]}
    for path in (trained / "experts").glob("*.safetensors"):
        fingerprints.add(artifacts.read_info(path)["fingerprint"])
    assert fingerprints == {fingerprint(trained)}

    for name in ("expert-0", "expert-all", "router"):
        log = rows(trained, name)
        assert [row["step"] for row in log] == ["2", "4", "6"]
        for row in log:
            assert float(row["loss"]) > 0 and float(row["grad_norm"]) > 0
        assert status(trained, name) == "finished 6\n"
        # two checkpoints and the status
        assert len(os.listdir(trained / "checkpoints" / name)) == 3
    assert "acc_t4" in rows(trained, "router")[0]
    assert "loss_t0" in rows(trained, "expert-0")[0]
    assert Image.open(trained / "samples" / "expert-0-00000006.png").size[0] > 200


def test_finished_training_run_again_changes_nothing(trained, tmp_path):
    run = copy(trained, tmp_path)
    done = command("train_expert.py", "--run-dir", run, "--shard", 0)
    assert "finished at step 6" in done.stdout
    assert same_tensors(run / "experts" / "0.safetensors", trained / "experts" / "0.safetensors")
    assert rows(run, "expert-0") == rows(trained, "expert-0")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed_training_ends_in_the_same_bits(clustered, tmp_path, how):
    """Also: the log has the rows of an undisturbed run, and SIGTERM finishes its step and saves."""
    flags = ["--shard", "0", "--train.save_every", "7", "--train.log_every", "2"]
    whole = copy(clustered, tmp_path / "a")
    broken = copy(clustered, tmp_path / "b")
    process = begin("train_expert.py", "--run-dir", broken, *flags, "--train.steps", 100_000)
    wait_for_rows(process, broken, "expert-0", 6)
    process.send_signal(how)
    out = process.communicate(timeout=300)[0]
    said = status(broken, "expert-0")
    assert said.startswith("to be continued")
    if how == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert f"stopped by a signal, saved at step {said.split()[-1]};" in out

    # wherever it was
    flags += ["--train.steps", int(rows(broken, "expert-0")[-1]["step"]) + 20]
    assert "resumed" in command("train_expert.py", "--run-dir", broken, *flags).stdout
    command("train_expert.py", "--run-dir", whole, *flags)
    a = whole / "experts" / "0.safetensors"
    b = broken / "experts" / "0.safetensors"
    assert same_tensors(a, b)
    assert rows(whole, "expert-0") == rows(broken, "expert-0")
    assert a.read_bytes() == b.read_bytes()


def test_two_ranks_killed_between_saves_resume_to_the_same_bits(clustered, tmp_path):
    flags = ["--shard", "all", "--train.save_every", "7", "--train.log_every", "4"]
    whole = copy(clustered, tmp_path / "a")
    broken = copy(clustered, tmp_path / "b")
    process = begin("train_expert.py", "--run-dir", broken, *flags, "--train.steps", 100_000,
                    ranks=2)
    wait_for_rows(process, broken, "expert-all", 3)
    # torchrun, its ranks and their decoding processes, at one blow
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as f:
            if str(broken) in f.read():
                os.kill(int(pid), signal.SIGKILL)
    process.communicate(timeout=300)
    assert status(broken, "expert-all").startswith("to be continued")

    flags += ["--train.steps", int(rows(broken, "expert-all")[-1]["step"]) + 20]
    for run in (whole, broken):
        command("train_expert.py", "--run-dir", run, *flags, ranks=2)
    assert rows(whole, "expert-all") == rows(broken, "expert-all")
    a = whole / "experts" / "all.safetensors"
    b = broken / "experts" / "all.safetensors"
    assert a.read_bytes() == b.read_bytes()


FAILS = """
import os, sys
sys.path.insert(0, os.getcwd())
import flow, train_expert
from ddm import errors
loss = flow.expert_loss

def fail(*args):
    if os.environ.get("RANK", "1") == "1":
        raise RuntimeError("out of memory")
    return loss(*args)

flow.expert_loss = fail
errors.script(train_expert.main)
"""


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_failure_ends_the_training_instead_of_hanging(clustered, tmp_path, ranks):
    """On the last rank alone, with decoding processes at work that ignore signals."""
    run = copy(clustered, tmp_path)
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    # or it runs into its time limit
    done = command(script, "--run-dir", run, "--shard", "all", "--data.workers", 2, ranks=ranks,
                   check=False, real=True)
    assert done.returncode == 1 and "out of memory" in done.stderr


def test_weight_decay_may_change_on_a_resume_and_does(trained, tmp_path):
    results = []
    for name, decay in (("a", 0), ("b", 50)):
        run = copy(trained, tmp_path / name)
        command("train_expert.py", "--run-dir", run, "--shard", 0, "--train.steps", 8,
                "--train.weight_decay", decay)
        results.append(run / "experts" / "0.safetensors")
    assert not same_tensors(*results)


def test_an_export_that_is_gone_is_written_again(trained, tmp_path):
    run = copy(trained, tmp_path)
    for path, script in ((run / "experts" / "0.safetensors", ["train_expert.py", "--shard", 0]),
                         (run / "router.safetensors", ["train_router.py"])):
        before = path.read_bytes()
        os.remove(path)
        command(*script, "--run-dir", run)
        assert path.read_bytes() == before


def test_one_cluster_is_one_expert_and_the_monolith(tars, config, tmp_path):
    """Also: bf16 training and export, runs of consecutive samples, random crops."""
    run = tmp_path / "run"
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", run, "--config", config,
            "--experts", 1, "--data.shuffle_block", 8, "--data.crop", "random")
    for shard in (0, "all"):
        command("train_expert.py", "--run-dir", run, "--shard", shard, "--train.precision", "bf16",
                "--train.export", "bf16")
    command("train_router.py", "--run-dir", run, "--train.steps", 2)
    expert = run / "experts" / "0.safetensors"
    assert same_tensors(expert, run / "experts" / "all.safetensors")
    assert {tensor.dtype for tensor in load_file(expert).values()} == {torch.bfloat16}

    sample(run, tmp_path / "full", "--strategy", "full")
    sample(run, tmp_path / "once", "--strategy", "once")
    sample(run, tmp_path / "all", "--monolith")
    for other in ("once", "all"):
        assert np.array_equal(pictures(tmp_path / "full"), pictures(tmp_path / other))


def test_a_checkpoint_cut_short_is_not_chosen(trained, tmp_path):
    run = copy(trained, tmp_path)
    folder = run / "checkpoints" / "expert-0"
    # as it looks while it is written
    os.rename(folder / "step-00000006", folder / "step-00000006.tmp")
    (folder / "step-00000005.tmp").mkdir()
    done = command("train_expert.py", "--run-dir", run, "--shard", 0)
    assert "resumed at step 4" in done.stdout
    # what was left over is gone
    assert sorted(os.listdir(folder)) == ["status", "step-00000004", "step-00000006"]
    assert same_tensors(run / "experts" / "0.safetensors", trained / "experts" / "0.safetensors")


@pytest.mark.parametrize("script, name", [
    (["train_expert.py", "--shard", "all"], "expert-all"),
    (["train_router.py"], "router"),
])
def test_two_ranks_and_micro_batches_give_the_curve_of_one_process(clustered, trained, tmp_path,
                                                                   script, name):
    run = copy(clustered, tmp_path)
    command(*script, "--run-dir", run, "--train.micro_batch", 5, ranks=2)
    for one, two in zip(rows(trained, name), rows(run, name), strict=True):
        for column in one:
            # AdamW's first steps are little more than the gradient's signs: rounding shows in its
            # norm before it shows in the loss
            rel = 1e-2 if column in ("grad_norm", "norm_max") else 2e-4
            expected = pytest.approx(float(one[column] or 0), rel=rel, abs=1e-5)
            assert float(two[column] or 0) == expected, column


def test_a_run_saved_on_two_ranks_resumes_on_one(clustered, trained, tmp_path):
    run = copy(clustered, tmp_path)
    flags = ["--shard", "all", "--run-dir", run]
    command("train_expert.py", *flags, "--train.steps", 3, "--train.save_every", 3, ranks=2)
    done = command("train_expert.py", *flags)
    assert "resumed at step 3" in done.stdout
    one = float(rows(trained, "expert-all")[-1]["loss"])
    assert float(rows(run, "expert-all")[-1]["loss"]) == pytest.approx(one, rel=2e-4)


def test_an_expert_needs_its_own_folder_alone_and_no_network(clustered, trained, tmp_path):
    run = copy(clustered, tmp_path)
    for other in ("0", "1", "router"):
        shutil.rmtree(run / "shards" / other)
    shutil.rmtree(run / "features")
    unshare = ["unshare", "-rn"] if works("unshare", "-rn", "true") else []
    line = [*unshare, *command_line("train_expert.py", "--run-dir", run, "--shard", 2)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    meant = (trained / "experts" / "2.safetensors").read_bytes()
    assert (run / "experts" / "2.safetensors").read_bytes() == meant


def test_training_learns(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    flags = ["--train.steps", 150, "--train.log_every", 25, "--data.workers", 0]
    command("train_expert.py", "--run-dir", run, "--shard", 0, *flags)
    command("train_router.py", "--run-dir", run, *flags)
    expert = rows(run, "expert-0")
    router = rows(run, "router")[-1]
    assert float(expert[-1]["loss"]) < 0.5 * float(expert[0]["loss"])
    assert float(router["acc_t0"]) > 0.8
    assert float(router["acc_t0"]) > float(router["acc_t4"]) - 0.05


def test_router_s_default_length_is_4_percent_of_the_training_flops(clustered, trained, tmp_path):
    run = copy(clustered, tmp_path)
    done = command("train_router.py", "--run-dir", run, "--train.router.steps", 0)
    expert, _ = artifacts.load(trained / "experts" / "0.safetensors")
    router, _ = artifacts.load(trained / "router.safetensors")
    experts_flops = plan.flops(expert.config) * 6 * 24
    meant = -(-0.04 * experts_flops // (plan.flops(router.config) * 24))
    steps = int(rows(run, "router")[-1]["step"])
    assert steps == meant
    assert f"{steps} steps" in done.stdout
    assert f"are {steps} steps of the router, which may be too few" in done.stderr


def test_too_many_unreadable_samples_stop_the_training(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    for path in (run / "shards" / "0").glob("*.tar"):
        damaged = bytearray(path.read_bytes())
        with tarfile.open(path) as tar:
            images = [member.offset_data for member in tar if member.name.endswith(".png")]
        for offset in images[::2]:
            damaged[offset:offset + 8] = bytes(8)
        path.write_bytes(damaged)
    done = command("train_expert.py", "--run-dir", run, "--shard", 0, "--train.steps", 20,
                   check=False)
    assert done.returncode == 2
    assert "data.max_bad = 0.01" in done.stderr.splitlines()[-1]
    done = command("train_expert.py", "--run-dir", run, "--shard", 0, "--data.max_bad", 0.9)
    assert int(rows(run, "expert-0")[-1]["bad"]) > 5 and "undecodable" in done.stderr


# ---- all stages, other conditions ----------------------------------------------------------------

@pytest.mark.parametrize("condition", ["class", "none"])
def test_a_run_with_another_condition_works_end_to_end(tars, config, tmp_path, condition):
    images = {name: payload for name, payload in members(tars).items() if name.endswith(".png")}
    with TarWriter(str(tmp_path / "classes.tar")) as tar:
        for i, name in enumerate(sorted(images)):
            tar.add(name, images[name])
            tar.add(name.replace(".png", ".cls"), str(i % 7).encode())

    run = tmp_path / "run"
    command("cluster.py", "--data", tmp_path / "classes.tar", "--run-dir", run, "--config", config,
            "--experts", 2, "--data.condition", condition, "--data.classes", 7)
    command("train_expert.py", "--run-dir", run, "--shard", 0, "--train.steps", 2)
    give(run, 0, 1)
    command("train_router.py", "--run-dir", run, "--train.steps", 2)

    flags = ["--class", 0, "--class", 6, "--num-images", 2]
    if condition == "none":
        flags = ["--num-images", 11]
    command("sample.py", "--run-dir", run, *flags, "--steps", 2, "--out", run / "out")
    assert len(pictures(run / "out")) == (4 if condition == "class" else 11)
    if condition == "class":
        done = inside("sample.py", "--run-dir", run, "--class", 7)
        assert done.returncode == 2 and "--class 7 is not one of 0..6" in done.stderr
