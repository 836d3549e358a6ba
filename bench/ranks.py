"""Do two ranks give the losses of one process? And does an expert alone give the same bits?

    python bench/ranks.py runs/demo    # a run after cluster.py; changes copies of it only

Trains, for 60 steps each, expert 0, the monolith and the router, as one process and with torchrun
on two ranks (gloo, CPU), and prints the largest relative difference of their logged losses. Then
trains expert 0 again inside `unshare -rn` (no network but loopback) with every other shard deleted,
and compares all tensors bit by bit.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

# the name of a log, the file of its weights, the command
TRAININGS = (
    ("expert-0", "experts/0.safetensors", ["train_expert.py", "--shard", "0"]),
    ("expert-all", "experts/all.safetensors", ["train_expert.py", "--shard", "all"]),
    ("router", "router.safetensors", ["train_router.py"]),
)


def train(run, *script, launcher=(sys.executable,)):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    flags = ["--run-dir", run, "--train.steps", "60", "--train.log_every", "5"]
    flags += ["--train.warmup", "0", "--train.decay", "0"]
    subprocess.run(
        [*launcher, *script, *flags],
        cwd=ROOT,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def losses(run, name):
    with open(os.path.join(run, "logs", f"{name}.csv"), newline="") as f:
        return [float(row["loss"]) for row in csv.DictReader(f)]


def copy_clustered(source, run):
    """What cluster.py has made, and nothing of later stages."""
    os.makedirs(run)
    shutil.copytree(os.path.join(source, "shards"), os.path.join(run, "shards"))
    for name in ("config.toml", "clusters.safetensors"):
        shutil.copy(os.path.join(source, name), run)


def compare_ranks(one, two):
    """Trains all by one process in the run `one` and by two ranks in the run `two`."""
    for name, file, script in TRAININGS:
        train(one, *script)
        train(two, *script, launcher=TORCHRUN)

        a = losses(one, name)
        b = losses(two, name)
        worst = max(abs(x - y) / x for x, y in zip(a, b, strict=True))

        a_weights = load_file(os.path.join(one, file))
        b_weights = load_file(os.path.join(two, file))
        apart = max((a_weights[k] - b_weights[k]).abs().max().item() for k in a_weights)
        print(
            f"{name}: 2 ranks against 1 process, 60 steps: loss {a[0]:.4f} -> {a[-1]:.4f}, "
            f"largest relative difference of a logged loss {worst:.1e}, "
            f"of weights (absolute) {apart:.1e}",
            flush=True,
        )


def compare_alone(one, alone):
    """Trains expert 0 in the run `alone` without network and other shards; run `one` has it."""
    for other in os.listdir(os.path.join(alone, "shards")):
        if other != "0":
            shutil.rmtree(os.path.join(alone, "shards", other))
    train(alone, "train_expert.py", "--shard", "0", launcher=("unshare", "-rn", sys.executable))

    a = load_file(os.path.join(one, "experts", "0.safetensors"))
    b = load_file(os.path.join(alone, "experts", "0.safetensors"))
    same = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    verdict = "bit-identical" if same else "DIFFER"
    print(f"expert-0 without network and other shards: {len(a)} tensors {verdict}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run directory after cluster.py")
    source = parser.parse_args().run

    with tempfile.TemporaryDirectory() as scratch:
        one, two, alone = (os.path.join(scratch, name) for name in ("one", "two", "alone"))
        for run in (one, two, alone):
            copy_clustered(source, run)
        compare_ranks(one, two)
        compare_alone(one, alone)


if __name__ == "__main__":
    main()
