"""Which strategies keep the data's proportions?

    python bench/bias.py runs/uneven

Drawn shapes in four colours of very uneven shares, a cluster each, unconditional; the share of
samples in each cluster, by nearest coarse centroid, beside the data's. About 25 minutes on 2 cores;
run again, it only samples.
"""
import argparse
import io
import os
import subprocess
import sys

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import flow
from data import to_uint8
from ddm import features
from ddm.config import make_config
from ddm.ensemble import Ensemble, beginnings
from ddm.tars import TarWriter
from tools.shapes import draw_shape

ROOT = sys.path[0]
SHARES = {"red": 0.60, "green": 0.25, "blue": 0.11, "white": 0.04}
STRATEGIES = ("full", "once", "sample-1", "sample-2", "top-1", "top-2", "threshold-0.1",
              "nucleus-0.9")
ROWS = [{"strategy": strategy} for strategy in STRATEGIES] + [
    {"strategy": "once", "router_temperature": 2.0},
    {"strategy": "sample-1", "router_temperature": 2.0},
    {"strategy": "top-1", "route_every": 5},
    {"strategy": "sample-1", "route_every": 5},
]


# ---- the run -------------------------------------------------------------------------------------

def draw_data(folder, images):
    """The demo set's images, of each colour as many as SHARES says."""
    os.makedirs(folder)
    generator = np.random.default_rng(0)
    colours = generator.choice(list(SHARES), images, p=list(SHARES.values()))
    with TarWriter(os.path.join(folder, "00000.tar")) as tar:
        for i, colour in enumerate(colours):
            # captions that name no colour are passed over, too
            rng = np.random.default_rng([1, i])
            caption = ""
            while colour not in caption:
                image, caption = draw_shape(rng, 16)
            png = io.BytesIO()
            image.save(png, "PNG")
            tar.add(f"{i:06d}.png", png.getvalue())
            tar.add(f"{i:06d}.txt", caption.encode())


def cluster(run_dir, data, steps):
    subprocess.run([
        sys.executable, "cluster.py", "--data", f"{data}/*.tar", "--run-dir", run_dir,
        "--config", "configs/demo.toml", "--data.condition", "none",
        "--train.steps", str(steps), "--train.decay", str(steps // 2),
        "--train.router.steps", str(steps // 2), "--train.router.decay", str(steps // 4),
    ], cwd=ROOT, check=True)


def train(run_dir):
    """The experts and the router, two at a time, a core each."""
    commands = [["train_expert.py", "--run-dir", run_dir, "--shard", str(k)] for k in range(4)]
    commands.append(["train_router.py", "--run-dir", run_dir])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    for first in range(0, len(commands), 2):
        running = []
        for command in commands[first:first + 2]:
            running.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment))
        codes = [process.wait() for process in running]
        if any(codes):
            sys.exit("a training failed")


# ---- what is measured ----------------------------------------------------------------------------

@torch.no_grad()
def sampled_shares(team, settings, args, centroids, batch=250):
    """The share of samples in each cluster [K]."""
    times = flow.time_grid(args.solver_steps, team.shift(settings))
    clusters = []
    for first in range(0, args.samples, batch):
        seeds = range(first, min(first + batch, args.samples))
        noise, u = beginnings(seeds, (3, 16, 16), args.solver_steps, team.K)
        *_, x = flow.integrate(team.velocity(settings, u=u), noise, times)
        images = [Image.fromarray(image) for image in to_uint8(x).numpy()]
        points = np.stack([features.pixel_features(image) for image in images])
        clusters.append(features.nearest(points, centroids))
    return np.bincount(np.concatenate(clusters), minlength=team.K) / args.samples


def distance(share, truth):
    """Half the sum of the shares' differences."""
    return np.abs(share - truth).sum() / 2


def distance_by_chance(truth, samples):
    """The mean distance of as many draws from the data's own shares."""
    distances = []
    for seed in range(2000):
        counts = np.random.default_rng(seed).multinomial(samples, truth)
        distances.append(distance(counts / samples, truth))
    return np.mean(distances)


def print_line(name, share, more):
    columns = " ".join(f"{s:6.1%}" for s in share)
    print(f"{name:34s} {columns}   {more}", flush=True)


def print_row(team, values, args, clusters):
    """Samples under one strategy: their shares, and what they cost."""
    truth = clusters["counts"] / clusters["counts"].sum()
    settings = make_config({f"sample.{key}": value for key, value in values.items()}).sample
    team.forwards.clear()
    share = sampled_shares(team, settings, args, clusters["coarse_centroids"])

    router = team.forwards.pop("router", 0)
    experts = team.forwards.total()
    others = [f"{key} {value}" for key, value in values.items() if key != "strategy"]
    print_line(", ".join([values["strategy"], *others]), share,
               f"{distance(share, truth):6.1%} {experts / args.samples / args.solver_steps:6.2f} "
               f"{router / args.samples:6.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", metavar="DIR")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=1200, help="of training an expert; the router "
                        "takes half as many, of 64 images")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--solver-steps", type=int, default=25)
    args = parser.parse_args()

    run_dir = os.path.abspath(args.run_dir)
    data = f"{run_dir}-data"
    if not os.path.exists(data):
        draw_data(data, args.images)
    cluster(run_dir, data, args.steps)
    train(run_dir)

    clusters = load_file(os.path.join(run_dir, "clusters.safetensors"))
    truth = clusters["counts"] / clusters["counts"].sum()
    chance = distance_by_chance(truth, args.samples)
    print(f"{args.samples} samples a row, {args.solver_steps} Euler steps, noise seeds "
          f"0..{args.samples - 1}; |difference|: half the sum of the shares'; "
          f"draws from the data's own shares would have {chance:.1%} on average")
    print_line("the data", truth, "|difference|, expert forwards a step, router forwards a sample")
    team = Ensemble(run_dir, torch.device("cpu"))
    for values in ROWS:
        print_row(team, values, args, clusters)


if __name__ == "__main__":
    main()
