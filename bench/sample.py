"""What sampling costs: each strategy beside the monolith, in FLOPs and in time, in one run.

    # FLOPs of XL/2 with a B/2 router; seconds of a small model, batch 64, 8, 1
    python bench/sample.py
    # on a GPU
    python bench/sample.py --preset DiT-XL/2 --router DiT-B/2 --size 32 --steps 50 \\
        --variants fp32 bf16 bf16+compile
    python bench/sample.py --preset DiT-XL/2 --router DiT-B/2 --size 32 --steps 10 \\
        --batch 8 --resident 1 2

Random weights; only the cost is looked at. Each image belongs to an expert drawn at random, of all
alike, that the router (which is run, and then overruled) is sure of along the whole path. A ratio
is the median over rounds, in which the monolith and the strategies take turns, after one step of
each to load and warm up.
"""
import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import flow
from ddm import artifacts, plan
from ddm.config import make_config
from ddm.ensemble import Ensemble
from ddm.process import start
from model import PRESETS, ModelConfig

STRATEGIES = {
    "top-1": {"strategy": "top-1"},
    "top-1, route-every 4": {"strategy": "top-1", "route_every": 4, "route_epsilon": 0.0},
}
for strategy in ("once", "full", "top-2", "sample-1", "sample-2", "threshold-0.1", "nucleus-0.9",
                 "oracle-0"):
    STRATEGIES[strategy] = {"strategy": strategy}


@dataclass
class Variant:
    """A model or an ensemble under one strategy, and how long its rounds took."""
    team: Ensemble
    settings: dict
    seconds: list = field(default_factory=list)


# ---- FLOPs ---------------------------------------------------------------------------------------

def model_shape(preset, size, clusters=0):
    """The ModelConfig of 'DiT-XL/2', or of dim,depth,heads,patch."""
    shape = PRESETS.get(preset)
    if shape is None:
        keys = ("dim", "depth", "heads", "patch")
        shape = dict(zip(keys, map(int, preset.split(",")), strict=True))
    return ModelConfig(size, 4, condition="class", classes=1000, clusters=clusters, **shape)


def print_flops(preset, router, size, experts, steps):
    # both branches of guidance
    E = 2 * plan.flops(model_shape(preset, size))
    R = plan.flops(model_shape(router, size, experts))
    print(f"{preset}, router {router}, {size}x{size}x4, {experts} experts, guidance, "
          f"{steps} Euler steps, one routing decision for both branches:")
    print(f"  expert and step {E / 1e9:.4g} GFLOPs ({E / 2e9:.4g} billion multiply-adds, as the "
          f"paper counts), router {R / 1e9:.3g}")

    # experts that run a step, and questions to the router
    runs = {
        "monolith": (1, 0),
        "top-1": (1, steps),
        "top-1, route-every 4": (1, math.ceil(steps / 4)),
        "once": (1, 1),
        "top-2": (2, steps),
        "full": (experts, steps),
    }
    for name, (running, asked) in runs.items():
        total = steps * running * E + asked * R
        print(f"  {name:22s} {total / 1e12:9.4f} TFLOPs an image, "
              f"{total / (steps * E):6.3f} times the monolith")


# ---- time ----------------------------------------------------------------------------------------

def write_random_run(run_dir, args):
    """A run of untrained models: K experts, a monolith, a router."""
    os.makedirs(os.path.join(run_dir, "experts"))
    info = {"fingerprint": "bench", "shift": 1.0, "autoencoder": {"name": "bench"},
            "text": {"name": ""}, "objective": "velocity", "path": "linear"}
    torch.manual_seed(0)

    network = artifacts.build(model_shape(args.preset, args.size))
    parameters = sum(p.numel() for p in network.parameters())
    print(f"{args.preset}: {parameters / 1e6:.1f}M parameters", flush=True)
    for k in ("all", *range(args.experts)):
        path = os.path.join(run_dir, "experts", f"{k}.safetensors")
        artifacts.save(path, network.config, network.state_dict(), shard=str(k), **info)

    network = artifacts.build(model_shape(args.router, args.size, args.experts))
    path = os.path.join(run_dir, "router.safetensors")
    artifacts.save(path, network.config, network.state_dict(), **info)


class Overruled(Ensemble):
    """The router runs; what it says is replaced by `decided` [B,K]."""

    def route(self, x_t, t, c, temperature=1.0, calibrated=True):
        super().route(x_t, t, c, temperature, calibrated)
        return self.decided[:len(x_t)]


def time_sampling(team, values, batch, steps):
    """Seconds of one sampling of a batch."""
    device = team.device
    side = team.config.size
    settings = make_config({f"sample.{key}": value for key, value in values.items()}).sample
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, side, side, generator=generator).to(device)
    c = (torch.arange(batch) % 1000).to(device)
    u = torch.rand(batch, steps, team.K).to(device)
    labels = torch.randint(team.K, (batch,), generator=generator)

    others = 0.01 / max(1, team.K - 1)
    decided = torch.full((batch, team.K), others).scatter(1, labels[:, None], 0.99)
    if settings.strategy == "once":
        # what is drawn is then what top-1 takes
        decided = F.one_hot(labels, team.K).float()
    decided = decided.to(device)

    groups = [slice(None)]
    if settings.strategy == "once" and team.resident:
        # as sample.py does where not all experts fit: one after the other along the whole path
        groups = [labels == k for k in labels.unique()]

    wait(device)
    since = time.perf_counter()
    for rows in groups:
        team.decided = decided[rows]
        velocity = team.velocity(settings, c[rows], u=u[rows])
        for _ in flow.integrate(velocity, x[rows], flow.time_grid(steps)):
            pass
    wait(device)
    return time.perf_counter() - since


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def open_team(run_dir, device, variant, **options):
    """variant: a precision, with +compile."""
    precision = variant.split("+")[0]
    return Overruled(run_dir, device, precision=precision, compile=variant.endswith("+compile"),
                     **options)


def open_variants(run_dir, device, args):
    """-> {name: Variant}, the monolith first."""
    variants = {}
    for name in args.variants:
        title = f"monolith {name}" if variants else "monolith"
        team = open_team(run_dir, device, name, only="monolith")
        variants[title] = Variant(team, STRATEGIES["full"])

    team = open_team(run_dir, device, args.variants[0])
    for name in args.strategies:
        variants[name] = Variant(team, STRATEGIES[name])
    for N in args.resident:
        few = open_team(run_dir, device, args.variants[0], resident=N)
        for name in ("top-1", "once"):
            variants[f"{name}, resident {N}"] = Variant(few, STRATEGIES[name])
    return variants


def time_batch(variants, batch, args):
    """Rounds of all variants with this batch, printed."""
    for variant in variants.values():
        variant.seconds.clear()
        # loads and warms up
        time_sampling(variant.team, variant.settings, batch, steps=1)
    for _ in range(args.turns):
        for variant in variants.values():
            took = time_sampling(variant.team, variant.settings, batch, args.steps)
            variant.seconds.append(took)

    monolith = variants["monolith"].seconds
    for name, variant in variants.items():
        took = variant.seconds
        ratios = sorted(a / b for a, b in zip(took, monolith, strict=True))
        each = ", ".join(f"{s:.2f}" for s in took)
        print(f"  batch {batch:3d}  {name:26s} {batch / statistics.median(took):8.3f} images/s  "
              f"{statistics.median(ratios):6.3f} times the monolith's time "
              f"({ratios[0]:.3f} to {ratios[-1]:.3f})  [{each}]", flush=True)


def parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="384,12,6,2", help="of the experts (default: DiT-S/2)")
    parser.add_argument("--router", default="192,9,3,2",
                        help="default: 0.2 of DiT-S/2's FLOPs, as B/2 has of XL/2's")
    parser.add_argument("--size", type=int, default=16, help="side of the latents")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 8, 1])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES),
                        default=["top-1", "top-1, route-every 4", "once"])
    parser.add_argument("--variants", nargs="+", default=["auto"], help="precision, with +compile: "
                        "the monolith in each; strategies in the first")
    parser.add_argument("--resident", type=int, nargs="*", default=[],
                        help="also top-1 and once with so many experts on the device")
    parser.add_argument("--device", default="")
    return parser


def main():
    args = parser().parse_args()
    device = start(args.device).device

    print_flops("DiT-XL/2", "DiT-B/2", 32, experts=args.experts, steps=50)
    if (args.preset, args.router, args.size) != ("DiT-XL/2", "DiT-B/2", 32):
        print_flops(args.preset, args.router, args.size, experts=args.experts, steps=args.steps)

    where = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}, {args.steps} Euler steps, guidance; "
          f"seconds of {args.turns} turns", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        run_dir = os.path.join(folder, "run")
        write_random_run(run_dir, args)
        variants = open_variants(run_dir, device, args)
        for batch in args.batch:
            time_batch(variants, batch, args)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2 ** 30
        print(f"peak GPU memory of all this {peak:.1f} GiB")


if __name__ == "__main__":
    main()
