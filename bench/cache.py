"""Training on cached latents against encoding on the fly: images/s, in turns.

    python bench/cache.py runs/emoji-latents --shard 3        # after cache_latents.py --shard 3
    python bench/cache.py runs/emoji-latents --shard 3 --turns 5 --train.micro_batch 16

Other flags are train_expert.py's. Each turn trains --steps (80) from scratch, once each way; the
speed is that of the middle half: the first quarter starts up, the last one samples.
"""
import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def speed(source, args, flags, use_latents):
    """-> images/s of one training on a run's shards or latents, which are linked to."""
    with tempfile.TemporaryDirectory() as run_dir:
        for name in ("config.toml", "clusters.safetensors", "shards", "latents"):
            os.symlink(os.path.join(source, name), os.path.join(run_dir, name))

        command = [sys.executable, "train_expert.py", "--run-dir", run_dir, "--shard", args.shard]
        command += ["--data.use_latents", use_latents, "--train.steps", str(args.steps)]
        # four rows of the log, and nothing written that takes time
        command += ["--train.log_every", str(args.steps // 4), "--train.sample_every", "0"]
        command += ["--train.save_every", "1000", *flags]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)

        log = os.path.join(run_dir, "logs", f"expert-{args.shard}.csv")
        with open(log, newline="") as f:
            rows = list(csv.DictReader(f))

    images = int(rows[2]["images"]) - int(rows[0]["images"])
    seconds = float(rows[2]["time"]) - float(rows[0]["time"])
    return images / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir")
    parser.add_argument("--shard", required=True)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    args, flags = parser.parse_known_args()
    source = os.path.abspath(args.run_dir)

    ratios = []
    for turn in range(args.turns):
        # one after the other, so that what slows the machine slows both
        cached = speed(source, args, flags, use_latents="true")
        on_the_fly = speed(source, args, flags, use_latents="false")
        ratios.append(cached / on_the_fly)
        print(f"turn {turn + 1}: {cached:.1f} images/s cached, {on_the_fly:.1f} on the fly, ratio "
              f"{ratios[-1]:.2f}", flush=True)
    print(f"cached / on the fly: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to "
          f"{max(ratios):.2f}")


if __name__ == "__main__":
    main()
