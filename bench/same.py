"""Are the images the same however they are made, and what memory does each way take?

    python bench/same.py runs/demo --prompts runs/demo/prompts.txt
    python bench/same.py runs/demo --prompts runs/demo/prompts.txt --preset DiT-B/2 \\
        --num-images 1 --steps 4        # memory worth looking at

All experts resident is compared with --resident 1, 2 ranks, small batches and bf16. --preset: on a
copy of the run whose experts are of that size, with random weights.
"""
import argparse
import glob
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from ddm import artifacts
from model import PRESETS, ModelConfig

ROOT = sys.path[0]

#         name              flags                     ranks
WAYS = (("all resident",    [],                         1),
        ("--resident 1",    ["--resident", "1"],        1),
        ("2 ranks",         [],                         2),
        ("--batch 7",       ["--batch", "7"],           1),
        ("bf16",            ["--precision", "bf16"],    1))


@dataclass
class Sampled:
    images: np.ndarray      # [N,H,W,3] int
    cost: str               # the end of what sample.py says at the end
    peak: int               # MiB of its process
    anonymous: int          # of it without the mapped files


def enlarge(run, preset, copy):
    """A copy of what sampling needs of a run, its experts of another size, weights random."""
    os.makedirs(os.path.join(copy, "experts"))
    for name in ("config.toml", "router.safetensors"):
        shutil.copy(os.path.join(run, name), copy)

    torch.manual_seed(0)
    for path in sorted(glob.glob(os.path.join(run, "experts", "[0-9]*.safetensors"))):
        info = artifacts.read_info(path)
        network = artifacts.build(ModelConfig(**info.pop("model") | PRESETS[preset]))
        # zeros at first, which would give no image
        torch.nn.init.normal_(network.head.weight, std=0.02)
        target = os.path.join(copy, "experts", os.path.basename(path))
        artifacts.save(target, network.config, network.state_dict(), **info)
    return copy


def memory(pid):
    """MiB of a process that are in memory -> (all, without mapped files); 0 once it has ended."""
    found = {"VmRSS": 0, "RssAnon": 0}
    try:
        with open(f"/proc/{pid}/status") as f:
            for line in f:
                key, _, value = line.partition(":")
                if key in found:
                    found[key] = int(value.split()[0]) // 1024
    except OSError:
        pass
    return found["VmRSS"], found["RssAnon"]


def sample(run, out, flags, ranks=1):
    """Runs sample.py -> Sampled."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launcher, "sample.py", "--run-dir", os.path.abspath(run), "--out", out, *flags]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)

    # watched, since the kernel keeps no peak of the memory that is not mapped from files
    peak = 0
    anonymous = 0
    while True:
        now = memory(process.pid)
        peak = max(peak, now[0])
        anonymous = max(anonymous, now[1])
        try:
            said, _ = process.communicate(timeout=0.02)
            break
        except subprocess.TimeoutExpired:
            continue
    if process.returncode:
        sys.exit(f"sample.py {' '.join(flags)} failed")

    files = sorted(glob.glob(os.path.join(out, "[0-9]*.png")))
    images = np.stack([np.asarray(Image.open(path)).astype(int) for path in files])
    return Sampled(images, said.splitlines()[-1].rpartition("; ")[2], peak, anonymous)


def compare(run, strategy, args):
    """Samples in each way, and prints how far its images are from the first way's."""
    common = ["--prompts", os.path.abspath(args.prompts), "--num-images", args.num_images,
              "--steps", args.steps, "--strategy", strategy]
    first = None
    with tempfile.TemporaryDirectory() as folder:
        for name, flags, ranks in WAYS:
            out = os.path.join(folder, name.replace(" ", "-"))
            found = sample(run, out, common + flags, ranks)
            if first is None:
                first = found.images
            off = np.abs(found.images - first)

            # under torchrun the process that is watched is the launcher
            used = ""
            if ranks == 1:
                used = f"; peak {found.peak} MiB, {found.anonymous} without mapped files"
            print(f"{strategy:9s} {name:13s} {len(off)} images: {(off <= 2).mean():.4%} of values "
                  f"within 2/255, largest difference {off.max()}{used}; {found.cost}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--preset", default="")
    parser.add_argument("--num-images", default="4")
    parser.add_argument("--steps", default="50")
    parser.add_argument("--strategies", nargs="+", default=["top-1", "once", "sample-1"])
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        run = args.run
        if args.preset:
            run = enlarge(run, args.preset, os.path.join(folder, "run"))
        for strategy in args.strategies:
            compare(run, strategy, args)


if __name__ == "__main__":
    main()
