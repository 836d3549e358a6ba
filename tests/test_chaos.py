"""Faults while an expert trains. (bench/chaos.py is the long form.)

Kills, a hung rank, damaged checkpoints, a full disk, gradients that are not finite.
"""

import contextlib
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, command, command_line, copy, inside, wait_until
from safetensors.torch import load_file

import flow
from ddm import log as logs
from ddm.checkpoint import Checkpoints
from ddm.config import make_config

# columns of the log that no two runs share
TIMING = ("images_per_s", "mfu", "wait", "memory_gb")

FLAGS = ["--shard", 0, "--train.save_every", 4, "--train.log_every", 2, "--data.workers", 0]


def train(run, steps, *flags):
    return inside("train_expert.py", "--run-dir", run, *FLAGS, "--train.steps", steps, *flags)


def weights(run):
    return (run / "experts" / "0.safetensors").read_bytes()


def checkpoints(run):
    return [int(p.name[5:]) for p in sorted((run / "checkpoints" / "expert-0").glob("step-*[0-9]"))]


def status(run):
    return (run / "checkpoints" / "expert-0" / "status").read_text()


def rows(run):
    with open(run / "logs" / "expert-0.csv", newline="") as f:
        found = list(csv.DictReader(f))
    for row in found:
        for column in ("time", "device_hours", *TIMING):
            row.pop(column, None)
    return found


def same(run, other):
    """Whether two runs ended alike, in weights and log."""
    return weights(run) == weights(other) and rows(run) == rows(other)


@pytest.fixture(scope="module")
def whole(clustered, tmp_path_factory):
    """Twelve undisturbed steps: do not change it, copy it."""
    run = copy(clustered, tmp_path_factory.mktemp("whole"))
    assert train(run, 12).returncode == 0
    return run


# ---- kills and hangs -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_rank_torchrun_and_all_killed_in_turn_leave_no_trace(tmp_path):
    """Neither in the weights nor in the log nor in the order of the data.

    Also: torchrun ends when a rank has gone, and ranks end when torchrun has, before another
    attempt can begin.
    """
    flags = ["--kills", "3", "--saves", "3", "--exports", "0", "--steps", "150"]
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "bench", "chaos.py"), "--run-dir", tmp_path, *flags],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # when they came is another machine's affair
    assert "3 kills (1 x agent, 1 x all, 1 x rank)" in done.stdout


def lives(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as f:
        return f.read().rpartition(")")[2].split()[0] not in "ZX"
    return False


def test_a_hung_rank_ends_the_run_which_is_to_be_continued(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    args = ["train_expert.py", "--run-dir", run, *FLAGS]
    args += ["--train.steps", 100_000, "--train.timeout", 15]

    def trains():
        logged = os.path.exists(run / "logs" / "expert-0.csv") and len(rows(run)) > 3
        return logged and checkpoints(run)

    with subprocess.Popen(
        command_line(*args, ranks=2),
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        wait_until(lambda: process.poll() is not None or trains())
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
            other, hung = map(int, f.read().split())
        os.kill(hung, signal.SIGSTOP)
        try:
            wait_until(lambda: not lives(other))
            # as torchrun would, half a minute later
            os.kill(hung, signal.SIGKILL)
            out = process.communicate(timeout=300)[0]
        finally:
            process.kill()
    assert process.returncode > 0, out
    # where the other one was waiting
    assert "Timeout" in out
    assert "most recent call first" in out
    assert status(run).startswith("to be continued ")


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["a file cut short", "its state.json lost"])
def test_a_damaged_newest_checkpoint_is_passed_over(clustered, whole, tmp_path, damage):
    """With a warning; and the weights end the same."""
    run = copy(clustered, tmp_path)
    assert train(run, 8).returncode == 0
    assert checkpoints(run) == [4, 8]
    folder = run / "checkpoints" / "expert-0" / "step-00000008"
    if damage == "its state.json lost":
        os.remove(folder / "state.json")
    else:
        file = max(folder.iterdir(), key=lambda p: p.stat().st_size)
        os.truncate(file, file.stat().st_size // 2)
    done = train(run, 12)
    assert done.returncode == 0
    assert "resumed at step 4" in done.stdout
    said = ("warning", "step-00000008 is damaged", "the one before is used")
    assert any(all(part in line for part in said) for line in done.stderr.splitlines())
    assert same(run, whole)
    assert checkpoints(run) == [8, 12]


@pytest.mark.parametrize(
    "keep, keep_every, left", [(2, 0, [18, 20]), (1, 6, [6, 12, 18, 20]), (3, 8, [8, 16, 18, 20])]
)
def test_the_newest_checkpoints_are_kept_and_those_of_multiples(
    clustered, tmp_path, keep, keep_every, left
):
    run = copy(clustered, tmp_path)
    flags = ["--train.save_every", 2, "--train.keep_last", keep, "--train.keep_every", keep_every]
    assert train(run, 20, *flags).returncode == 0
    assert checkpoints(run) == left


def mounted(folder):
    """Whether a disk of 8 MB could be mounted there."""
    if not hasattr(os, "geteuid") or os.geteuid() or not shutil.which("mount"):
        return False
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]
    return subprocess.run(mount, capture_output=True).returncode == 0


@pytest.fixture
def small_disk(clustered, tmp_path):
    """A run whose checkpoints are on a disk of 8 MB of their own."""
    run = copy(clustered, tmp_path)
    folder = run / "checkpoints"
    folder.mkdir()
    if not mounted(folder):
        pytest.skip("only root can mount a small disk")
    yield run
    subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def full_at(run, *steps):
    """The disk is full when the checkpoints of these steps are written, and not when others are."""
    save = Checkpoints.save
    filler = run / "checkpoints" / "filler"

    def saving(checkpoints, engine, *args):
        checkpoints.finish_saving()
        filler.unlink(missing_ok=True)
        if engine.step in steps:
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as f:
                while True:
                    f.write(bytes(4096))
        save(checkpoints, engine, *args)

    with mock.patch.object(Checkpoints, "save", saving):
        yield
    filler.unlink(missing_ok=True)


def test_a_full_disk_costs_a_checkpoint_and_a_warning(whole, small_disk):
    with full_at(small_disk, 8):
        done = train(small_disk, 12)
    assert done.returncode == 0
    assert status(small_disk) == "finished 12\n"
    warnings = [line for line in done.stderr.splitlines() if "could not be written" in line]
    assert len(warnings) == 1
    assert re.search(
        "^warning: expert-0: the checkpoint of step 8 .*No space left.*"
        "The former one is kept, and training goes on",
        warnings[0],
    )
    assert checkpoints(small_disk) == [4, 12]
    assert same(small_disk, whole)


def test_a_disk_full_at_the_end_is_an_error_and_the_former_checkpoint_resumes(whole, small_disk):
    with full_at(small_disk, 8, 12):
        done = train(small_disk, 12)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "the checkpoint of step 12 could not be written" in errors[0]
    assert done.stderr.splitlines()[-1] == errors[0]
    assert checkpoints(small_disk) == [4]

    done = train(small_disk, 12)
    assert done.returncode == 0
    assert "resumed at step 4" in done.stdout
    assert status(small_disk) == "finished 12\n"
    assert same(small_disk, whole)


# ---- gradients that are not finite ---------------------------------------------------------------

# the calls FIRST to LAST of rank 1 give a loss that is not finite
POISON = """
import os, sys
sys.path.insert(0, os.getcwd())
import flow, train_expert
from ddm import errors
loss, calls, first, last = flow.expert_loss, 0, int(sys.argv.pop(1)), int(sys.argv.pop(1))
def poisoned(*args):
    global calls
    calls += 1
    poison = first <= calls <= last and os.environ["RANK"] == "1"
    return loss(*args) * (float("nan") if poison else 1)
flow.expert_loss = poisoned
errors.script(train_expert.main)
"""


@pytest.fixture
def poisoned(tmp_path):
    path = tmp_path / "poisoned.py"
    path.write_text(POISON)
    return path


def test_a_loss_that_is_nan_on_one_rank_is_skipped_by_both(clustered, poisoned, tmp_path):
    one = copy(clustered, tmp_path / "one")
    two = copy(clustered, tmp_path / "two")
    done = command(poisoned, 5, 5, "--run-dir", two, *FLAGS, "--train.steps", 12, ranks=2)
    assert "1 steps up to 6 had a gradient that is not finite and were skipped" in done.stderr
    loss = flow.expert_loss
    calls = []

    # of what would be rank 1's share of the batch
    def half(*args):
        calls.append(0)
        found = loss(*args)
        return torch.cat([found[:4], found[4:] * float("nan")]) if len(calls) == 5 else found

    with mock.patch.object(flow, "expert_loss", half):
        assert train(one, 12).returncode == 0
    assert [row["nonfinite"] for row in rows(two)] == ["0", "0", "1", "1", "1", "1"]
    tensors = load_file(two / "experts" / "0.safetensors").values()
    assert all(tensor.isfinite().all() for tensor in tensors)
    for a, b in zip(rows(one), rows(two), strict=True):
        for column in a:
            # as in test_pipeline.py
            rel = 1e-2 if column in ("grad_norm", "norm_max") else 2e-4
            expected = pytest.approx(float(a[column] or 0), rel=rel, abs=1e-5)
            assert float(b[column] or 0) == expected, column


def test_too_many_such_steps_in_a_row_stop_the_training(clustered, poisoned, tmp_path):
    """And the step and its positions are named."""
    run = copy(clustered, tmp_path)
    args = [poisoned, 6, 1000, "--run-dir", run, *FLAGS]
    args += ["--train.steps", 40, "--train.max_nonfinite", 3]
    done = command(*args, ranks=2, check=False, real=True)
    # the ranks'; torchrun's own is 1
    assert "exitcode  : 2" in done.stderr
    # the newest checkpoint's step
    assert status(run) == "failed 4\n"

    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "the gradients of 3 steps in a row before step 9 are not finite" in errors[0]
    # rank 1's of step 8
    assert all(f"position {p} (t = 0." in errors[0] for p in range(60, 64))
    assert "position 59" not in errors[0]
    assert checkpoints(run) == [4]

    def nan(*args, loss=flow.expert_loss):
        return loss(*args) * float("nan")

    with mock.patch.object(flow, "expert_loss", nan):
        done = train(run, 40, "--train.max_nonfinite", 3)
    assert done.returncode == 2
    assert status(run).startswith("failed ")


def idle_engine(name):
    """As much of an engine as a log asks for."""
    return SimpleNamespace(
        name=name,
        ranks=SimpleNamespace(rank=0, world=1, device=torch.device("cpu")),
        bf16=False,
        batch=1,
        step=0,
        images=0,
        image_flops=1,
        nonfinite=torch.zeros(3),
        train=SimpleNamespace(steps=100),
    )


def test_a_spike_of_loss_or_gradient_is_a_warning_also_after_a_resume(tmp_path, capsys):
    engine = idle_engine("expert-0")
    batches = SimpleNamespace(waited=0.0, bad=[])
    config = make_config({})

    def add(log, step, loss, norm):
        engine.step = step
        log.meter.add("loss", torch.tensor([loss]))
        log.step(torch.tensor(norm), 0.1, batches)
        log.row(checkpoints=None)
        return capsys.readouterr().err

    log = logs.Log(str(tmp_path), engine, config)
    log.begin(0, resumed=False)
    losses = [9, 5, 1, 1.1, 0.9, 1, 1.4, float("nan"), 1]
    assert not any("spike" in add(log, step, loss, 1.0) for step, loss in enumerate(losses))
    log.end()
    log = logs.Log(str(tmp_path), engine, config)
    log.begin(8, resumed=True)
    assert "a spike before step 9: loss 1.8" in add(log, 9, 1.8, 9.0)
    assert "a spike before step 10: norm_max 11" in add(log, 10, 1.0, 11.0)


def test_one_more_number_is_one_column_more_also_after_a_resume(tmp_path):
    """A script that logs something else continues an old log, whose rows lack it."""
    engine = idle_engine("x")
    batches = SimpleNamespace(waited=0.0, bad=[])
    for step, names in ((1, ["loss"]), (2, ["loss", "weight_norm"])):
        log = logs.Log(str(tmp_path), engine, make_config({}))
        log.begin(step - 1, resumed=step > 1)
        engine.step = step
        for name in names:
            log.meter.add(name, torch.tensor([1.0, 3.0]))
        log.meter.add_by_t("loss", torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 0.1, 1.0]))
        log.step(torch.tensor(0.5), 0.1, batches)
        state = log.state()
        again = logs.Log(str(tmp_path), engine, make_config({}))
        again.load(state)
        assert again.meter.totals() == log.meter.totals()
        log.row(checkpoints=None)
        log.end()
    with open(tmp_path / "logs" / "x.csv", newline="") as f:
        first, second = csv.DictReader(f)
    assert first["loss"] == second["loss"] == "2.000000"
    assert (first["weight_norm"], second["weight_norm"]) == ("", "2.00000")
    assert (second["loss_t0"], second["loss_t1"], second["loss_t4"]) == ("2.00000", "", "5.00000")


def test_a_number_of_one_rank_alone_is_logged_and_resumed(monkeypatch):
    """Sums are matched by name: a script may log what only some ranks have, and no longer."""
    cpu = torch.device("cpu")
    meter = logs.Meter(cpu)
    meter.add("loss", torch.tensor([1.0, 3.0]))
    meter.commit(torch.tensor(0.5))
    other = {"loss": torch.tensor([[8.0, 2.0]]), "extra": torch.tensor([[3.0, 1.0]])}
    monkeypatch.setattr(logs, "gather", lambda own: [own, other])
    state = meter.state()
    assert state["totals"]["loss"] == [[12.0, 4.0]] and state["totals"]["extra"] == [[3.0, 1.0]]

    monkeypatch.undo()
    for rank, mean in ((0, 3.0), (1, None)):
        resumed = logs.Meter(cpu, rank)
        resumed.load(state)
        assert resumed.means().get("loss") == mean
