"""Stage 6: the ensemble distilled into one dense student."""

import csv
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import command, copy, give, inside, pictures, sample
from safetensors.torch import load_file

import distill
import model as models
from ddm import artifacts, plan
from ddm.config import make_config


class Part:
    """Stands for the TarDataset of a cluster: items say which position they are of."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, position):
        return {"position": position}


def losses(run):
    with open(run / "logs" / "student.csv", newline="") as f:
        return [float(row["loss"]) for row in csv.DictReader(f)]


@pytest.fixture(scope="module")
def distilled(trained, tmp_path_factory):
    """A trained run with a student. Do not change it."""
    run = copy(trained, tmp_path_factory.mktemp("distilled"))
    command("distill.py", "--run-dir", run)
    return run


def test_micro_batches_are_of_one_cluster_in_the_data_s_shares_over_any_stretch():
    sizes = [600, 250, 110, 40]
    micro = 5
    count = 4000
    data = distill.ByCluster([Part(n) for n in sizes], micro)
    items = [data[p] for p in range(micro * count)]
    clusters = np.array([item["k"] for item in items]).reshape(count, micro)
    assert (clusters == clusters[:, :1]).all()

    for k, n in enumerate(sizes):
        # the cluster's own stream, in order
        of_cluster = clusters[:, 0] == k
        positions = [item["position"] for item in items if item["k"] == k]
        assert positions == list(range(of_cluster.sum() * micro))

        # of the golden ratio's sequence: no stretch is more than a few micro-batches off
        running = np.cumsum(of_cluster) - np.arange(1, count + 1) * n / 1000
        assert np.ptp(running) < 4


def test_the_stream_of_a_billion_steps_takes_no_memory_and_is_the_formula_s():
    sizes = [600, 250, 110, 40]
    count = 3 * distill.BLOCK + 10
    shares = np.cumsum(sizes) / 1000
    clusters = np.searchsorted(shares[:-1], np.arange(count) * distill.GOLDEN % 1, side="right")
    turns = np.zeros(count, np.int64)
    for k in range(4):
        turns[clusters == k] = np.arange((clusters == k).sum())

    # in any order: a resume, a grid of samples
    data = distill.ByCluster([Part(n) for n in sizes], 1)
    edges = [0, 1]
    for edge in range(distill.BLOCK, count, distill.BLOCK):
        edges += [edge - 1, edge, edge + 1]
    others = np.random.default_rng(0).integers(0, count, 300).tolist()
    for m in [count - 1, *edges, *others]:
        assert (data.cluster(m), data.turn(m)) == (clusters[m], turns[m])
        assert data[m] == {"position": turns[m], "k": clusters[m]}

    # a row a block, and not an entry a micro-batch
    whole = data.before[3]
    assert whole.tolist() == np.bincount(clusters[: 3 * distill.BLOCK], minlength=4).tolist()
    assert sum(row.nbytes for row in data.before) < 1000


def test_teachers_stay_where_there_is_room(monkeypatch):
    shapes = [models.ModelConfig(8, 3, dim=dim, depth=1, heads=2, patch=2) for dim in (32, 32, 64)]
    sizes = sorted(4 * plan.parameter_count(shape) for shape in shapes)
    infos = {k: {"model": vars(shape)} for k, shape in enumerate(shapes)}
    train = make_config({"train.precision": "fp32", "train.batch": 4}).train

    def kept(resident, device, room=0):
        need = plan.Memory(shapes[0], False, beside=7)
        memory = (need.configured(False, train, 1, 4) + room + 1) / plan.USABLE
        monkeypatch.setattr(plan, "device_memory", lambda device: memory)
        teachers = SimpleNamespace(infos=infos, dtype=torch.float32, resident=None)
        ranks = SimpleNamespace(rank=0, world=1, device=torch.device(device))
        beside = distill.keep_teachers(teachers, resident, shapes[0], train, ranks, frozen=7)
        return teachers.resident, beside

    # 0: all
    assert kept(-1, "cpu") == (0, sum(sizes))
    assert kept(0, "cuda") == (0, sum(sizes))
    assert kept(2, "cuda") == (2, sizes[1] + sizes[2])
    assert kept(-1, "cuda", sum(sizes)) == (3, sum(sizes))
    assert kept(-1, "cuda", sizes[1] + sizes[2]) == (2, sizes[1] + sizes[2])
    assert kept(-1, "cuda", 0) == (1, sizes[2])


def test_the_student_s_file_says_what_it_is_and_what_it_cost(distilled):
    info = artifacts.read_info(distilled / "student.safetensors")
    teacher = artifacts.read_info(distilled / "experts" / "0.safetensors")
    # a quarter of the monolith's 24
    images = 6 * 6
    one = plan.flops(models.ModelConfig(**info["model"]))
    assert info["images"] == images
    assert info["flops"] == images * (3 * one + one)
    assert info["init_flops"] == 0
    assert info["fingerprint"] == teacher["fingerprint"]
    assert info["shard"] == "student"
    assert (info["objective"], info["path"]) == ("velocity", "linear")
    assert teacher["objective"] == "x0"
    assert (distilled / "checkpoints" / "student" / "status").read_text() == "finished 6\n"
    assert (distilled / "samples" / "student-00000006.png").exists()


def test_the_student_samples_like_a_monolith(distilled, tmp_path):
    sample(distilled, tmp_path / "student", "--student")
    sample(distilled, tmp_path / "ensemble", "--strategy", "full")
    images = pictures(tmp_path / "student")
    assert len(images) == 6
    assert (images != pictures(tmp_path / "ensemble")).any()
    done = inside("sample.py", "--run-dir", distilled, "--prompt", "x", "--student", "--monolith")
    assert done.returncode == 2
    assert "not allowed with" in done.stderr


def test_a_student_that_is_its_teachers_has_nothing_to_learn(trained, tmp_path):
    run = copy(trained, tmp_path)
    shutil.rmtree(run / "checkpoints" / "expert-0")
    flags = ["--shard", 0, "--flow.objective", "velocity", "--train.lr", 1e-2]
    command("train_expert.py", "--run-dir", run, *flags)
    for k in (1, 2):
        give(run, 0, k)
    command("distill.py", "--run-dir", run, "--init", 0, "--train.steps", 4)
    assert losses(run) == [0.0, 0.0]
    assert artifacts.read_info(run / "student.safetensors")["init_flops"] > 0
    expert = load_file(run / "experts" / "0.safetensors")
    student = load_file(run / "student.safetensors")
    assert all(torch.allclose(expert[k], student[k], atol=1e-6) for k in expert)


def test_a_student_gets_nearer_to_its_teachers(distilled, tmp_path):
    run = copy(distilled, tmp_path)
    flags = ["--train.steps", 60, "--train.lr", 3e-3, "--train.log_every", 10]
    command("distill.py", "--run-dir", run, *flags)
    # resumes at step 6
    loss = losses(run)
    assert loss[-1] < 0.7 * loss[0]


def test_a_training_of_fewer_images_than_it_samples(trained, tmp_path):
    run = copy(trained, tmp_path)
    # 7: three clusters do not divide it
    command("distill.py", "--run-dir", run, "--train.steps", 1, "--train.batch", 7)
    assert (run / "checkpoints" / "student" / "status").read_text() == "finished 1\n"
    assert artifacts.read_info(run / "student.safetensors")["images"] == 7


def test_two_ranks_and_a_resume_teach_the_same_student(distilled, trained, tmp_path):
    run = copy(trained, tmp_path)
    flags = ["--train.batch", 8, "--train.micro_batch", 2]
    command("distill.py", "--run-dir", run, *flags, "--train.steps", 4)
    command("distill.py", "--run-dir", run, *flags)
    os.rename(run / "student.safetensors", tmp_path / "resumed")
    other = copy(trained, tmp_path / "other")
    command("distill.py", "--run-dir", other, *flags, ranks=2)
    assert losses(run) == pytest.approx(losses(other), rel=1e-4)
    a = load_file(tmp_path / "resumed")
    b = load_file(other / "student.safetensors")
    assert all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)


BATCH_OF_9 = ["--train.batch", 9, "--train.micro_batch", 2]


@pytest.mark.parametrize(
    "flags, says",
    [
        (BATCH_OF_9, ["batch of 9", "2", "--train.micro_batch"]),
        (["--init", "7"], ["there is no", "experts/7.safetensors"]),
        (["--init", "0"], ["0.safetensors", "predicts x0"]),
        (["--data.size", 16], ["the student", "do not fit together", "size 16 / 8"]),
        (["--flow.objective", "eps"], ["--flow.objective", "velocity on the linear path"]),
    ],
)
def test_mistakes_are_named_in_one_line(trained, flags, says):
    done = inside("distill.py", "--run-dir", trained, *flags)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().count("\n") == 0, done.stderr
    assert all(text in done.stderr for text in says), done.stderr


def test_a_missing_teacher_is_an_error(trained, tmp_path):
    run = copy(trained, tmp_path)
    os.remove(run / "experts" / "1.safetensors")
    done = inside("distill.py", "--run-dir", run)
    assert done.returncode == 2
    assert "no expert for cluster 1 of 3: bring them to" in done.stderr
    assert os.listdir(run / "checkpoints" / "student") == ["status"]
