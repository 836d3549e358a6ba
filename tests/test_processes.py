"""Processes and their surroundings.

Failing ranks, locks, signals, shared memory, devices, what the file system refuses, text files.
"""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, command, copy, inside, signalled_at

import data
import ddm.config
import ddm.files
import ddm.lock
import ddm.process
import ddm.run
import flow
from ddm import checkpoint, errors, loading
from ddm.errors import UserError

FLAGS = ["--shard", 0, "--train.save_every", 4, "--train.log_every", 2, "--data.workers", 0]


def train(run, steps, *flags):
    return inside("train_expert.py", "--run-dir", run, *FLAGS, "--train.steps", steps, *flags)


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints" / "expert-0").glob("step-*"))


def error_of(done):
    """The one error line of a stage that a mistake ended."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return lines[0]


# ---- a rank that fails ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failing_rank_ends_at_once_and_shows_its_traceback(tmp_path):
    """Leaving the group is a collective with NCCL.

    Here it is one that never ends, as it would be for a rank that fails alone.
    """
    (tmp_path / "stage.py").write_text(f"""
import os, sys, time
sys.path.insert(0, {ROOT!r})
import ddm.process, ddm.errors, torch.distributed as dist

def main():
    ddm.process.start("cpu")
    dist.destroy_process_group = lambda: time.sleep(600)
    if os.environ["RANK"] == "1":
        raise RuntimeError("CUDA out of memory, say")
    ddm.process.barrier()

ddm.errors.script(main)
""")
    done = command(tmp_path / "stage.py", ranks=2, check=False, real=True)
    assert done.returncode == 1
    assert "RuntimeError: CUDA out of memory, say" in done.stderr
    assert "line 10, in main" in done.stderr


# ---- locks ---------------------------------------------------------------------------------------


def test_a_lock_is_held_once_and_says_by_whom(tmp_path):
    path = tmp_path / "folder" / "lock"
    with ddm.lock.Lock(path, "expert-0 of runs/x"):
        assert json.loads(path.read_text()) == {
            "host": socket.gethostname(),
            "kernel": mock.ANY,
            "pid": os.getpid(),
            "since": mock.ANY,
        }
        holder = f"by process {os.getpid()} on {socket.gethostname()} since 20"
        with pytest.raises(UserError, match=f"expert-0 of runs/x is being worked on {holder}"):
            ddm.lock.Lock(path, "expert-0 of runs/x").__enter__()
    assert not path.exists()
    with ddm.lock.Lock(path, "it"):
        pass


@pytest.mark.slow
def test_a_lock_does_not_outlive_a_kill_nor_lives_in_forks(tmp_path):
    path = tmp_path / "lock"
    holder = f"""
import os, sys, time
sys.path.insert(0, {ROOT!r})
import ddm.lock
ddm.lock.Lock({str(path)!r}, "it").__enter__()
if os.fork() == 0:
    time.sleep(120)
    os._exit(0)
print("held", flush=True)
time.sleep(120)
"""
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"by process {process.pid} on"):
            ddm.lock.Lock(path, "it").__enter__()
        process.kill()
        process.wait()

        # the forked process still lives
        assert path.exists()
        with ddm.lock.Lock(path, "it"):
            pass
        os.killpg(process.pid, signal.SIGKILL)


ELSEWHERE = {"host": "elsewhere", "kernel": "another", "pid": 7, "since": "yesterday"}


def test_a_lock_of_another_host_holds_while_it_shows_signs_of_life(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    path.write_text(json.dumps(ELSEWHERE))
    stop = threading.Event()

    def live():
        while not stop.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(UserError, match="by process 7 on elsewhere since yesterday"):
            ddm.lock.Lock(path, "it").__enter__()
    finally:
        stop.set()
        thread.join()
    monkeypatch.setattr(ddm.lock, "SILENCE", 0.2)
    with ddm.lock.Lock(path, "it"):
        assert json.loads(path.read_text())["host"] == socket.gethostname()


def test_a_lock_that_its_holder_removes_meanwhile_is_taken(tmp_path):
    path = tmp_path / "lock"
    path.write_text(json.dumps(ELSEWHERE))
    with mock.patch("time.sleep", lambda seconds: path.unlink(missing_ok=True)):
        with ddm.lock.Lock(path, "it"):
            assert json.loads(path.read_text())["pid"] == os.getpid()


def test_the_lock_of_a_machine_that_died_is_waited_for(tmp_path, monkeypatch):
    """A file server keeps it for a while; its holder shows no sign of life."""
    monkeypatch.setattr(ddm.lock, "SILENCE", 0.05)
    path = tmp_path / "lock"
    flock = ddm.lock.fcntl.flock
    refusals = []
    path.write_text(json.dumps(ELSEWHERE))

    def leased(file, how):
        if len(refusals) < 2:
            refusals.append(file)
            raise BlockingIOError
        return flock(file, how)

    with mock.patch("fcntl.flock", leased), ddm.lock.Lock(path, "it"):
        assert len(refusals) == 2
    path.write_text(json.dumps(ELSEWHERE))
    monkeypatch.setattr(ddm.lock, "LEASE", 0)
    with (
        mock.patch("fcntl.flock", side_effect=BlockingIOError),
        pytest.raises(UserError, match="by process 7 on elsewhere"),
    ):
        ddm.lock.Lock(path, "it").__enter__()


def test_a_file_system_without_locks_goes_by_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(ddm.lock, "BEAT", 0.02)
    with mock.patch("fcntl.flock", side_effect=OSError(errno.ENOLCK, "No locks available")):
        with ddm.lock.Lock(tmp_path / "lock", "it"):
            with pytest.raises(UserError, match="it is being worked on by process"):
                ddm.lock.Lock(tmp_path / "lock", "it").__enter__()
        with ddm.lock.Lock(tmp_path / "lock", "it"):
            pass


def test_a_second_training_of_a_shard_is_refused_and_marks_nothing(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    assert train(run, 4).returncode == 0
    with ddm.lock.Lock(run / "checkpoints" / "expert-0" / "lock", "expert-0 of here"):
        line = error_of(train(run, 8))
        assert f"by process {os.getpid()} on" in line
        # found before
        mistaken = ["--run-dir", run, "--shard", 0, "--train.stepz", 8]
        assert error_of(inside("train_expert.py", *mistaken))
    assert (run / "checkpoints" / "expert-0" / "status").read_text() == "finished 4\n"
    assert train(run, 8).returncode == 0


# ---- waiting for data ----------------------------------------------------------------------------


def test_a_wait_for_data_that_lasts_is_ended_by_a_signal_and_saved(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    stuck = f"""
import sys, time
sys.path.insert(0, {ROOT!r})
import data, train_expert
from ddm import checkpoint, errors, loading
read = data.TarDataset.__getitem__

def sometimes(self, position):
    if position >= 5 * 8:
        print("stuck", flush=True)
        time.sleep(600)
    return read(self, position)

data.TarDataset.__getitem__ = sometimes
errors.script(train_expert.main)
"""
    arguments = ["--run-dir", run, *FLAGS, "--train.steps", 100]
    with subprocess.Popen(
        [sys.executable, "-c", stuck, *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        line = ""
        while line != "stuck\n":
            line = process.stdout.readline()
            assert line, "it ended before it was stuck"
        process.terminate()
        out = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, out
    assert "stopped by a signal, saved at step 5" in out, out
    assert (run / "checkpoints" / "expert-0" / "status").read_text() == "to be continued 5\n"
    assert checkpoints(run) == ["step-00000004", "step-00000005"]


def test_a_batch_that_cannot_be_handed_over_ends_the_training(clustered, tmp_path):
    run = copy(clustered, tmp_path)

    class Lost:
        def __reduce__(self):
            raise OSError(errno.ENOSPC, "unable to allocate shared memory")

    collate = loading.collate

    # of the one item that is looked at first, nothing is lost
    def losing(items):
        return collate(items) | ({"lost": Lost()} if len(items) > 1 else {})

    with mock.patch.object(loading, "collate", losing):
        line = error_of(train(run, 8, "--data.workers", 1))
    assert "a decoding process has died" in line
    assert "/dev/shm" in line
    assert "--data.workers" in line


def test_a_killed_decoding_process_ends_the_training_with_one_line(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    read = data.TarDataset.__getitem__

    def killed(self, position):
        if torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, position)

    with mock.patch("data.TarDataset.__getitem__", killed):
        line = error_of(train(run, 8, "--data.workers", 1))
    assert "a decoding process has died" in line


def test_a_decoding_process_killed_while_its_rank_computes_is_one_line(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    killed = []

    def kills(*args, loss=flow.expert_loss):
        if not killed:
            killed.extend(multiprocessing.active_children())
            for process in killed:
                process.kill()
                process.join()
        return loss(*args)

    with mock.patch.object(flow, "expert_loss", kills):
        line = error_of(train(run, 100, "--data.workers", 1))
    assert killed
    assert "a decoding process has died" in line


def test_a_wait_in_the_first_step_leaves_nothing_that_cannot_be_resumed(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    with signalled_at(4) as signalled:
        done = train(run, 6, "--train.micro_batch", 4)
    assert signalled
    assert done.returncode == 128 + signal.SIGTERM
    assert checkpoints(run) == []

    assert train(run, 6, "--train.micro_batch", 4).returncode == 0
    again = copy(clustered, tmp_path / "again")
    assert train(again, 6, "--train.micro_batch", 4).returncode == 0
    weights = (run / "experts" / "0.safetensors").read_bytes()
    assert weights == (again / "experts" / "0.safetensors").read_bytes()


def test_shared_memory_is_compared_with_what_will_be_put_there(monkeypatch):
    """By hand: a batch of 8 images of 4 x 4 and as much noise, each tensor in pages of 4096 bytes.

    There are 2 processes of 4 batches, and one in use, of 3 ranks.
    """
    item = {
        "x": torch.zeros(4, 4, 3, dtype=torch.uint8),
        "eps": torch.zeros(3, 64, 64),
        "c": torch.zeros(0),
        "k": 0,
        "u": 0.5,
        "drop": 0.5,
        "bad": [],
    }
    # x, eps; u, drop and k
    batch = 4096 + 8 * 3 * 64 * 64 * 4 + 3 * 4096
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    need = batch * (4 * 2 + 1) * 3
    with mock.patch("shutil.disk_usage", return_value=SimpleNamespace(free=need)):
        loading.check_shared_memory([item], 0, 8, 2)
    with mock.patch("shutil.disk_usage", return_value=SimpleNamespace(free=need - 1)):
        said = "/dev/shm has .* MB free, and 2 decoding processes a rank put up to .* MB there: "
        with pytest.raises(UserError, match=said + ".*--shm-size"):
            loading.check_shared_memory([item], 0, 8, 2)
        loading.check_shared_memory([item], 0, 8, 0)


# ---- gradients that are not finite ---------------------------------------------------------------


def ruined_from(step):
    """flow.expert_loss as of a model whose weights an optimiser step has ruined.

    All losses from `step` on are not finite, whatever the data.
    """
    calls = []

    def loss(*args, loss=flow.expert_loss):
        calls.append(1)
        return loss(*args) * (float("nan") if len(calls) >= step else 1)

    return mock.patch.object(flow, "expert_loss", loss)


def test_nothing_is_saved_while_steps_are_skipped_and_the_last_good_is_resumed(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    with ruined_from(6):
        line = error_of(train(run, 40, "--train.save_every", 2, "--train.max_nonfinite", 5))
    assert checkpoints(run) == ["step-00000002", "step-00000004"]
    assert "step-00000004: the same command resumes there" in line
    assert "--train.lr" in line

    # the weights of step 5 are the ruined ones, and they were saved
    with ruined_from(2):
        assert train(run, 5, "--train.save_every", 5).returncode == 0
    with ruined_from(1):
        line = error_of(train(run, 40, "--train.save_every", 5, "--train.max_nonfinite", 5))
    assert "step-00000004: the same command resumes there" in line
    assert "step-00000005, of later steps, are set aside" in line
    assert checkpoints(run) == ["step-00000004", "step-00000005.not-finite"]

    done = train(run, 8)
    assert done.returncode == 0
    assert "resumed at step 4" in done.stdout


def test_a_training_whose_last_steps_are_skipped_is_not_finished(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    with ruined_from(7):
        line = error_of(train(run, 8))
    assert "2 steps in a row before step 9 are not finite" in line
    assert checkpoints(run) == ["step-00000004"]
    assert (run / "checkpoints" / "expert-0" / "status").read_text() == "failed 4\n"


def test_a_skipped_last_step_says_nothing_against_the_weights_before(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    with ruined_from(6):
        line = error_of(train(run, 6, "--train.save_every", 5))
    assert checkpoints(run) == ["step-00000005"]
    assert "step-00000005: the same command resumes there" in line
    assert "--train.steps 5" in line


def test_a_row_of_skipped_steps_counts_once(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    calls = []

    def thrice(*args, loss=flow.expert_loss):
        calls.append(1)
        return loss(*args) * (float("nan") if 2 <= len(calls) <= 4 else 1)

    with mock.patch.object(flow, "expert_loss", thrice):
        assert train(run, 6, "--train.max_nonfinite", 5).returncode == 0
    assert train(run, 8, "--train.max_nonfinite", 3).returncode == 0


def test_an_isolated_skipped_step_only_delays_the_checkpoint(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    calls = []

    def once(*args, loss=flow.expert_loss):
        calls.append(1)
        return loss(*args) * (float("nan") if len(calls) == 4 else 1)

    with mock.patch.object(flow, "expert_loss", once):
        assert train(run, 6, "--train.keep_last", 5).returncode == 0
    assert checkpoints(run) == ["step-00000005", "step-00000006"]


@pytest.mark.parametrize(
    "losses, good",
    [
        # well to the end, but with the weights of step 4 all that followed was not finite
        ([1.0, 0.9, 0.8, 0.7], 3),
        # the loss had risen since
        ([1.0, 0.9, 5.0, 90.0], 2),
        ([1.0, float("nan"), 0.5, 0.6], 3),
        ([], 3),
    ],
)
def test_the_last_good_step_is_from_before_the_loss_rose(losses, good):
    """The losses are those of steps 1, 2, 3 and 4."""
    rows = [{"step": str(i), "loss": f"{loss:.6f}"} for i, loss in enumerate(losses, 1)]
    rows.append({"step": "5", "loss": "nan"})
    assert checkpoint.last_good_step(rows, before=5) == good


# ---- the marker ----------------------------------------------------------------------------------


def test_a_failure_is_not_marked_over_by_a_checkpoint_on_its_way(tmp_path):
    folder = str(tmp_path)
    ddm.run.mark(folder, ddm.run.UNFINISHED, 3, begins=True)
    ddm.run.mark(folder, ddm.run.FAILED)
    threads = [
        threading.Thread(target=ddm.run.mark, args=(folder, ddm.run.UNFINISHED, step))
        for step in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "status").read_text() == "failed 3\n"
    assert os.listdir(tmp_path) == ["status"]
    ddm.run.mark(folder, ddm.run.UNFINISHED, 3, begins=True)
    assert (tmp_path / "status").read_text() == "to be continued 3\n"


# ---- devices -------------------------------------------------------------------------------------


def test_the_first_line_names_the_devices(clustered, tmp_path):
    done = train(copy(clustered, tmp_path), 1)
    assert done.stdout.startswith("device: 1 x cpu (")


def test_one_gpu_for_all_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    said = "--device cuda:1: under torchrun each rank has a GPU of its own"
    with pytest.raises(UserError, match=said):
        ddm.process.start("cuda:1")


def test_a_gpu_that_cannot_be_used_is_a_warning(monkeypatch, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with mock.patch("glob.glob", return_value=["/proc/driver/nvidia/gpus/0"]):
        ddm.process.start()
        assert "warning: this machine has a GPU that cannot be used" in capsys.readouterr().err
        # as asked
        ddm.process.start("cpu")
        assert not capsys.readouterr().err
        # hidden on purpose
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        ddm.process.start()
        assert not capsys.readouterr().err


# ---- a config that a later stage refuses ---------------------------------------------------------


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--train.batch", 25], "train.batch = 25"),
        (["--sample.strategy", "top-4"], "'top-4': there are cluster.experts = 3 experts"),
        (["--sample.strategy", "oracle-3"], "the number is at most 2"),
        (["--sample.strategy", "best"], "strategy 'best' is not one of"),
        (["--sample.cfg_low", 0.9, "--sample.cfg_high", 0.1], "cfg_low 0.9"),
        (["--train.student.micro_batch", 5], "train.student.micro_batch = 5"),
        (["--router.preset", "MMDiT-tiny/2"], "an MMDiT is a denoiser"),
        (["--model.patch", 3], "not a multiple of the patch 3"),
    ],
)
def test_a_config_that_a_later_stage_refuses_is_refused_by_the_first(
    tars, config, tmp_path, flags, said
):
    run = tmp_path / "run"
    args = ["--data", tars / "*.tar", "--run-dir", run, "--config", config, *flags]
    assert said in error_of(inside("cluster.py", *args))
    assert not (run / "config.toml").exists()


# ---- what the file system refuses ----------------------------------------------------------------


@pytest.mark.parametrize(
    "number, remedy",
    [
        (errno.ENOSPC, "make room"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "right"),
        (errno.ENOTDIR, "is a file"),
        (errno.ENAMETOOLONG, "shorter"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "again when it works"),
    ],
)
def test_an_error_of_the_file_system_is_one_line_with_its_remedy(number, remedy, capsys):
    def main():
        raise OSError(number, os.strerror(number), "some/path")

    with pytest.raises(SystemExit) as end:
        errors.script(main)
    line = capsys.readouterr().err
    assert end.value.code == 2
    assert line.startswith("error: some/path: ")
    assert remedy in line
    assert line.count("\n") == 1


def test_what_is_written_names_the_place_that_was_meant(tmp_path):
    with pytest.raises(OSError) as caught, ddm.files.atomic(tmp_path / "x.txt") as temporary:
        open(temporary, "wb").close()
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == tmp_path / "x.txt"
    assert os.listdir(tmp_path) == []
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught:
        ddm.files.write_text(tmp_path / "folder", "text")
    assert str(caught.value.filename) == str(tmp_path / "folder")
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        ddm.files.try_folder(tmp_path / "file")


def test_places_of_output_are_tried_before_the_work(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    (run / "logs").rmdir()
    (run / "logs").touch()
    assert "logs: " in error_of(train(run, 4))
    assert not (run / "checkpoints" / "expert-0" / "step-00000004").exists()


# ---- text files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_text_file_is_read_whatever_editor_wrote_it(tmp_path, encoding):
    path = tmp_path / "config.toml"
    path.write_bytes('[text]\r\nname = "café"\r\n'.encode(encoding))
    assert ddm.files.read_text(path) == '[text]\nname = "café"\n'
    assert ddm.config.read_toml(path) == {"text.name": "café"}


@pytest.mark.parametrize("payload", ["café".encode("latin-1"), "text".encode("utf-16-le")])
def test_a_text_file_in_another_encoding_is_refused(tmp_path, payload):
    (tmp_path / "x").write_bytes(payload)
    with pytest.raises(UserError, match="UTF-8"):
        ddm.files.read_text(tmp_path / "x")


ROUND_TRIP = f"""
import sys
sys.path.insert(0, {ROOT!r})
import ddm.config
ddm.config.write_toml(ddm.config.make_config({{"text.name": "caf\\xe9"}}), "x.toml")
print(ddm.config.read_toml("x.toml")["text.name"] == "caf\\xe9")
"""


@pytest.mark.slow
def test_a_config_survives_any_locale(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", ROUND_TRIP],
        cwd=tmp_path,
        env=ENVIRONMENT | {"LC_ALL": "en_US.ISO-8859-1", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    "value, said",
    [
        (3, "it is no table"),
        ({}, "tars is missing"),
        ({"tars": []}, "tars is no table"),
        ({"tars": {"a": {"n": "4"}}}, "tars.a.n = '4' is no int"),
        ({"tars": {"a": {"n": True}}}, "is no int"),
    ],
)
def test_json_of_the_wrong_shape_says_where(tmp_path, value, said):
    (tmp_path / "x.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=said):
        ddm.files.read_json(tmp_path / "x.json", {"tars": {str: {"n": int}}})


# ---- torchrun, as a user types it ----------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--run-dir", "runs/ddm"]])
def test_torchrun_takes_no_flag_of_ours_for_its_own(clustered, tmp_path, flags):
    """torchrun --nproc_per_node=2 train_expert.py --shard 0, in a folder with runs/ddm."""
    shutil.copytree(clustered, tmp_path / "runs" / "ddm")
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    script = os.path.join(ROOT, "train_expert.py")
    done = subprocess.run(
        [*torchrun, "--nproc_per_node=2", script, "--shard", "0", *flags],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "ddm" / "experts" / "0.safetensors").exists()
