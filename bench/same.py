"""Are the pictures the same however they are made? All experts resident against --resident 1, 2 ranks and small batches; peak memory of each.

    python bench/same.py runs/demo --prompts runs/demo/prompts.txt

For memory worth looking at, a run of large experts, hardly trained: any clustered run, and on a copy of it
    for k in 0 1 2 3; do python train_expert.py --run COPY --shard $k --model.preset DiT-B/2 --train.steps 2 --train.warmup 0 --train.sample_every 0; done
"""
import argparse
import glob
import os
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def sample(run, out, flags, ranks=1):
    """-> (pictures [N,H,W,3] int, what sample.py said at the end, peak memory of its process in MiB: all of it, then without the mapped files)."""
    launcher = [sys.executable] + (["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"] if ranks > 1 else [])
    # a watcher of its own, since the kernel keeps no peak of the memory that is not mapped from files
    process = subprocess.Popen([*launcher, "sample.py", "--run", os.path.abspath(run), "--out", out, *flags], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    peak = anonymous = 0
    while True:
        try:
            with open(f"/proc/{process.pid}/status") as f:
                memory = {line.split(":")[0]: int(line.split()[1]) // 1024 for line in f if line.startswith(("VmRSS", "RssAnon"))}
            peak, anonymous = max(peak, memory.get("VmRSS", 0)), max(anonymous, memory.get("RssAnon", 0))
        except (OSError, ProcessLookupError):
            pass
        try:
            said = process.communicate(timeout=0.02)[0]
            break
        except subprocess.TimeoutExpired:
            pass
    if process.returncode:
        sys.exit(f"sample.py {' '.join(flags)} failed")
    return np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted(glob.glob(f"{out}/[0-9]*.png"))]), said.splitlines()[-1], peak, anonymous


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--n", default="4")
    parser.add_argument("--steps", default="50")
    parser.add_argument("--strategies", nargs="+", default=["top-1", "once", "sample-1"])
    args = parser.parse_args()
    for strategy in args.strategies:
        common = ["--prompts", os.path.abspath(args.prompts), "--n", args.n, "--steps", args.steps, "--strategy", strategy]
        with tempfile.TemporaryDirectory() as folder:
            first = None
            for name, flags, ranks in (("all resident", [], 1), ("--resident 1", ["--resident", "1"], 1), ("2 ranks", [], 2), ("--batch 7", ["--batch", "7"], 1),
                                       ("bf16", ["--precision", "bf16"], 1)):
                made, said, peak, anonymous = sample(args.run, os.path.join(folder, name.replace(" ", "-")), common + flags, ranks)
                first = made if first is None else first
                off = np.abs(made - first)
                memory = "" if ranks > 1 else f"; peak {peak} MiB, {anonymous} without mapped files"
                print(f"{strategy:9s} {name:13s} {len(made)} pictures: {(off <= 2).mean():.4%} of values within 2/255, largest difference {off.max()}{memory}; "
                      f"{said.rpartition('; ')[2]}", flush=True)


if __name__ == "__main__":
    main()
