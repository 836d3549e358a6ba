"""Which strategies keep the data's proportions? Drawn shapes in four colours of very uneven shares, a cluster each, unconditional; the
share of samples in each cluster, by nearest coarse centroid, beside the data's. About 25 minutes on 2 cores; run again, it only samples.

    python bench/bias.py runs/uneven
"""
import argparse
import contextlib
import io
import os
import subprocess
import sys

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import flow
from ddm.config import make_config
from ddm.tars import TarWriter
from data import to_uint8
from tools.shapes import draw_shape
from ddm.ensemble import Ensemble, beginnings
from ddm import features

SHARES = {"red": 0.60, "green": 0.25, "blue": 0.11, "white": 0.04}
ROWS = [{"strategy": "full"}, {"strategy": "once"}, {"strategy": "sample-1"}, {"strategy": "sample-2"}, {"strategy": "top-1"}, {"strategy": "top-2"},
        {"strategy": "threshold-0.1"}, {"strategy": "nucleus-0.9"}, {"strategy": "once", "router_temperature": 2.0},
        {"strategy": "sample-1", "router_temperature": 2.0}, {"strategy": "top-1", "route_every": 5}, {"strategy": "sample-1", "route_every": 5}]


def draw(folder, images):
    """The demo set's pictures, of each colour as many as SHARES says."""
    os.makedirs(folder)
    colours = np.random.default_rng(0).choice(list(SHARES), images, p=list(SHARES.values()))
    with TarWriter(os.path.join(folder, "00000.tar")) as tar:
        for i, colour in enumerate(colours):
            rng, caption = np.random.default_rng([1, i]), ""
            while colour not in caption:
                image, caption = draw_shape(rng, 16)
            png = io.BytesIO()
            image.save(png, "PNG")
            tar.add(f"{i:06d}.png", png.getvalue())
            tar.add(f"{i:06d}.txt", caption.encode())


def train(run):
    python = lambda *args: subprocess.Popen([sys.executable, *args], cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    jobs = [["train_expert.py", "--run-dir", run, "--shard", str(k)] for k in range(4)] + [["train_router.py", "--run-dir", run]]
    while jobs:     # two at a time, a core each
        with contextlib.ExitStack() as stack:
            for process in [stack.enter_context(python(*job)) for job in jobs[:2]]:
                if process.wait():
                    sys.exit("a training failed")
        jobs = jobs[2:]


@torch.no_grad()
def shares(team, settings, samples, steps, centroids, batch=250):
    clusters = []
    for first in range(0, samples, batch):
        n = min(batch, samples - first)
        x, u = beginnings(range(first, first + n), (3, 16, 16), steps, team.K)
        *_, x = flow.integrate(team.velocity(settings, None, None, u), x, flow.time_grid(steps, team.shift(settings)))
        points = np.stack([features.pixel_features(Image.fromarray(picture)) for picture in to_uint8(x).numpy()])
        clusters.append(features.nearest(points, centroids))
    return np.bincount(np.concatenate(clusters), minlength=team.K) / samples


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=1200, help="of training an expert; the router takes half as many, of 64 images")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--solver-steps", type=int, default=25)
    args = parser.parse_args()
    run, data = os.path.abspath(args.run_dir), os.path.abspath(args.run_dir) + "-data"
    if not os.path.exists(data):
        draw(data, args.images)
    subprocess.run([sys.executable, "cluster.py", "--data", f"{data}/*.tar", "--run-dir", run, "--config", "configs/demo.toml", "--data.condition", "none",
                    "--train.steps", str(args.steps), "--train.decay", str(args.steps // 2), "--train.router.steps", str(args.steps // 2),
                    "--train.router.decay", str(args.steps // 4)], cwd=ROOT, check=True)
    train(run)
    clusters = load_file(os.path.join(run, "clusters.safetensors"))
    truth = clusters["counts"] / clusters["counts"].sum()
    chance = np.mean([np.abs(np.random.default_rng(i).multinomial(args.samples, truth) / args.samples - truth).sum() / 2 for i in range(2000)])
    print(f"{args.samples} samples a row, {args.solver_steps} Euler steps, noise seeds 0..{args.samples - 1}; |difference|: half the sum of the shares'; "
          f"draws from the data's own shares would have {chance:.1%} on average")
    line = lambda name, share, more="": print(f"{name:34s} {' '.join(f'{s:6.1%}' for s in share)}   {more}", flush=True)
    line("the data", truth, "|difference|, expert forwards a step, router forwards a sample")
    team = Ensemble(run, torch.device("cpu"))
    for values in ROWS:
        settings, before = make_config({f"sample.{key}": value for key, value in values.items()}).sample, team.forwards.copy()
        share = shares(team, settings, args.samples, args.solver_steps, clusters["coarse_centroids"])
        forwards = team.forwards - before
        router = forwards.pop("router", 0)
        line(", ".join(f"{key} {value}" if key != "strategy" else value for key, value in values.items()), share,
             f"{np.abs(share - truth).sum() / 2:6.1%} {sum(forwards.values()) / args.samples / args.solver_steps:6.2f} {router / args.samples:6.1f}")


if __name__ == "__main__":
    main()
