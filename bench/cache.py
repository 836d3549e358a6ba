"""Training on cached latents against encoding on the fly: steps/s, in turns in one run.

    python bench/cache.py runs/emoji-latents --shard 3                                        # a run after cache_latents.py --shard 3
    python bench/cache.py runs/emoji-latents --shard 3 --turns 5 -- --train.micro_batch 16    # any flag of train_expert.py

Each turn trains --steps (80) from scratch, once each way; the speed is that of the middle half (the first quarter starts up, the last one draws).
"""
import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def speed(source, shard, cached, steps, flags):
    """-> images/s of one training."""
    with tempfile.TemporaryDirectory() as run:
        for name in ("config.toml", "clusters.safetensors", "shards", "latents"):
            os.symlink(os.path.join(os.path.abspath(source), name), os.path.join(run, name))
        subprocess.run([sys.executable, "train_expert.py", "--run-dir", run, "--shard", shard, "--data.use_latents", cached, "--train.steps", str(steps),
                        "--train.log_every", str(steps // 4), "--train.sample_every", "0", "--train.save_every", "1000", *flags],
                       cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with open(os.path.join(run, "logs", f"expert-{shard}.csv"), newline="") as f:
            rows = list(csv.DictReader(f))
    return (int(rows[2]["images"]) - int(rows[0]["images"])) / (float(rows[2]["time"]) - float(rows[0]["time"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--shard", required=True)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()
    ratios = []
    for turn in range(args.turns):
        fast, slow = (speed(args.run_dir, args.shard, cached, args.steps, args.flags) for cached in ("true", "false"))
        ratios.append(fast / slow)
        print(f"turn {turn + 1}: {fast:.1f} images/s cached, {slow:.1f} on the fly, ratio {fast / slow:.2f}", flush=True)
    print(f"cached / on the fly: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
