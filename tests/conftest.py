"""A tiny run, made once by the commands themselves: 240 drawn shapes of 8 pixels, 3 experts of 20,000 weights."""
import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

TINY = """
[data]
size = 8
condition = "text"
workers = 1
[cluster]
experts = 3
fine = 6
[text]
length = 4
vocab = 64
[model]
preset = "tiny/2"
dim = 32
depth = 1
heads = 2
[router]
preset = "tiny/2"
dim = 32
depth = 1
heads = 2
[flow]
objective = "x0"
[train]
steps = 6
batch = 24
lr = 1e-3
log_every = 2
save_every = 4
[train.router]
steps = 6
[sample]
steps = 4
"""


ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def command_line(*args, ranks=0):
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"]     # without the dashes torchrun takes our --run for its --run-path
    return [*launcher, *map(str, args)]


def command(*args, ranks=0, check=True):
    """Runs one of the scripts as a user would, on the CPU; -> CompletedProcess with text output."""
    done = subprocess.run(command_line(*args, ranks=ranks), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    command("data.py", "--out", folder, "--images", 240, "--size", 8, "--per-tar", 100)
    return folder


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def clustered(tars, config, tmp_path_factory):
    """A run after stage 1: do not change it, copy it."""
    run = tmp_path_factory.mktemp("clustered") / "run"
    command("cluster.py", "--data", tars / "*.tar", "--run", run, "--config", config)
    return run


@pytest.fixture(scope="session")
def trained(clustered, tmp_path_factory):
    """A run after stage 3, its monolith included: do not change it, copy it."""
    import shutil
    run = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(clustered, run)
    for shard in (0, 1, 2, "all"):
        command("train_expert.py", "--run", run, "--shard", shard)
    command("train_router.py", "--run", run)
    return run
