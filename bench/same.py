"""Are the pictures the same however they are made? All experts resident against --resident 1, 2 ranks and small batches; peak memory of each.

    python bench/same.py runs/demo --prompts runs/demo/prompts.txt
    python bench/same.py runs/demo --prompts runs/demo/prompts.txt --preset DiT-B/2 --num-images 1 --steps 4        # memory worth looking at

--preset: on a copy of the run whose experts are of that size, with random weights.
"""
import argparse
import glob
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import model as models
from ddm import artifacts


def enlarge(run, preset, copy):
    """A copy of what sampling needs of a run, its experts of another size and with random weights."""
    os.makedirs(os.path.join(copy, "experts"))
    for name in ("config.toml", "router.safetensors"):
        shutil.copy(os.path.join(run, name), copy)
    torch.manual_seed(0)
    for path in glob.glob(os.path.join(run, "experts", "[0-9]*.safetensors")):
        info = artifacts.read_info(path)
        network = artifacts.build(models.ModelConfig(**info.pop("model") | models.PRESETS[preset]))
        torch.nn.init.normal_(network.head.weight, std=0.02)        # zero at first: no picture
        artifacts.save(os.path.join(copy, "experts", os.path.basename(path)), network.config, network.state_dict(), **info)
    return copy


def sample(run, out, flags, ranks=1):
    """-> (pictures [N,H,W,3] int, what sample.py said at the end, peak memory of its process in MiB: all of it, then without the mapped files)."""
    launcher = [sys.executable] + (["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"] if ranks > 1 else [])
    # a watcher of its own, since the kernel keeps no peak of the memory that is not mapped from files
    process = subprocess.Popen([*launcher, "sample.py", "--run-dir", os.path.abspath(run), "--out", out, *flags], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    peak = anonymous = 0
    while True:
        try:
            with open(f"/proc/{process.pid}/status") as f:
                memory = {line.split(":")[0]: int(line.split()[1]) // 1024 for line in f if line.startswith(("VmRSS", "RssAnon"))}
            peak, anonymous = max(peak, memory.get("VmRSS", 0)), max(anonymous, memory.get("RssAnon", 0))
        except OSError:
            pass        # it has just ended
        try:
            said = process.communicate(timeout=0.02)[0]
            break
        except subprocess.TimeoutExpired:
            pass        # still at work
    if process.returncode:
        sys.exit(f"sample.py {' '.join(flags)} failed")
    return np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted(glob.glob(f"{out}/[0-9]*.png"))]), said.splitlines()[-1], peak, anonymous


def compare(run, args):
    for strategy in args.strategies:
        common = ["--prompts", os.path.abspath(args.prompts), "--num-images", args.n, "--steps", args.steps, "--strategy", strategy]
        with tempfile.TemporaryDirectory() as folder:
            first = None
            for name, flags, ranks in (("all resident", [], 1), ("--resident 1", ["--resident", "1"], 1), ("2 ranks", [], 2), ("--batch 7", ["--batch", "7"], 1),
                                       ("bf16", ["--precision", "bf16"], 1)):
                made, said, peak, anonymous = sample(run, os.path.join(folder, name.replace(" ", "-")), common + flags, ranks)
                first = made if first is None else first
                off = np.abs(made - first)
                memory = "" if ranks > 1 else f"; peak {peak} MiB, {anonymous} without mapped files"
                print(f"{strategy:9s} {name:13s} {len(made)} pictures: {(off <= 2).mean():.4%} of values within 2/255, largest difference {off.max()}{memory}; "
                      f"{said.rpartition('; ')[2]}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--preset", default="")
    parser.add_argument("--num-images", default="4")
    parser.add_argument("--steps", default="50")
    parser.add_argument("--strategies", nargs="+", default=["top-1", "once", "sample-1"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = enlarge(args.run_dir, args.preset, os.path.join(folder, "run")) if args.preset else args.run_dir
        compare(run, args)


if __name__ == "__main__":
    main()
