"""What sampling costs: each strategy beside the monolith, in FLOPs and in time, in one run. Random weights; only the cost is looked at.

    python bench/sample.py                                                      # FLOPs of XL/2 with a B/2 router; seconds of a small model, batch 64, 8, 1
    python bench/sample.py --preset DiT-XL/2 --router DiT-B/2 --size 32 --steps 50 --turns 3 --variants fp32 bf16 bf16+compile      # on a GPU
    python bench/sample.py --preset DiT-XL/2 --router DiT-B/2 --size 32 --batch 8 --resident 1 2 --steps 10

Each image belongs to an expert drawn at random, of all alike, that the router (which is run, and then overruled) is sure of along the
whole path. A ratio is the median over rounds, in which the monolith and the strategies take turns, after one step of each to load and warm up.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import flow
import model as models
from ddm.config import make_config
from ddm.process import start
from ddm.ensemble import Ensemble
from ddm import artifacts

STRATEGIES = {"top-1": {"strategy": "top-1"}, "top-1, route-every 4": {"strategy": "top-1", "route_every": 4, "route_epsilon": 0.0},
              "once": {"strategy": "once"}, "full": {"strategy": "full"},
              **{name: {"strategy": name} for name in ("top-2", "sample-1", "sample-2", "threshold-0.1", "nucleus-0.9", "oracle-0")}}


def shape(preset, size, clusters=0):
    """'DiT-XL/2', or dim,depth,heads,patch."""
    numbers = models.PRESETS.get(preset) or dict(zip(("dim", "depth", "heads", "patch"), map(int, preset.split(","))))
    return models.ModelConfig(size, 4, condition="class", classes=1000, clusters=clusters, **numbers)


def flops(preset, router, size, K, steps):
    with torch.device("meta"):
        E, R = 2 * artifacts.build(shape(preset, size)).flops(), artifacts.build(shape(router, size, K)).flops()
    print(f"{preset}, router {router}, {size}x{size}x4, {K} experts, guidance, {steps} Euler steps, one routing decision for both branches:")
    print(f"  expert and step {E / 1e9:.4g} GFLOPs ({E / 2e9:.4g} billion multiply-adds, as the paper counts), router {R / 1e9:.3g}")
    for name, experts, asked in (("monolith", 1, 0), ("top-1", 1, steps), ("top-1, route-every 4", 1, -(-steps // 4)), ("once", 1, 1),
                                 ("top-2", 2, steps), ("full", K, steps)):
        total = steps * experts * E + asked * R
        print(f"  {name:22s} {total / 1e12:9.4f} TFLOPs an image, {total / (steps * E):6.3f} times the monolith")


def random_run(folder, preset, router, size, K):
    os.makedirs(os.path.join(folder, "experts"))
    info = {"fingerprint": "bench", "shift": 1.0, "autoencoder": {"name": "bench"}, "text": {"name": ""}, "objective": "velocity", "path": "linear"}
    torch.manual_seed(0)
    network = artifacts.build(shape(preset, size))
    print(f"{preset}: {sum(p.numel() for p in network.parameters()) / 1e6:.1f}M parameters", flush=True)
    for k in ("all", *range(K)):
        artifacts.save(os.path.join(folder, "experts", f"{k}.safetensors"), network.config, network.state_dict(), shard=str(k), **info)
    network = artifacts.build(shape(router, size, K))
    artifacts.save(os.path.join(folder, "router.safetensors"), network.config, network.state_dict(), **info)


class Overruled(Ensemble):
    """The router runs; what it says is replaced by `decided` [B,K]."""

    def route(self, x_t, t, c, temperature=1.0):
        super().route(x_t, t, c, temperature)
        return self.decided[:len(x_t)]


def path(team, settings, batch, steps, device):
    """Seconds of one sampling of a batch."""
    generator = torch.Generator().manual_seed(1)
    x, c, u = torch.randn(batch, 4, team.config.size, team.config.size, generator=generator), torch.arange(batch) % 1000, torch.rand(batch, steps, team.K)
    labels = torch.randint(team.K, (batch,), generator=generator)
    rest = 0.01 / max(1, team.K - 1)
    team.decided = torch.full((batch, team.K), rest).scatter(1, labels[:, None], 0.99).to(device)
    if settings.strategy == "once":     # what is drawn is then what top-1 takes
        team.decided = torch.nn.functional.one_hot(labels, team.K).float().to(device)
    x, c, u = x.to(device), c.to(device), u.to(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    since = time.perf_counter()
    # as sample.py does where not all experts fit: one after the other along the whole path
    groups = [labels == k for k in labels.unique()] if settings.strategy == "once" and team.resident else [slice(None)]
    decided = team.decided
    for rows in groups:
        team.decided = decided[rows]
        for _ in flow.integrate(team.velocity(settings, c[rows], None, u[rows]), x[rows], flow.time_grid(steps)):
            pass
    wait()
    return time.perf_counter() - since


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="384,12,6,2", help="of the experts (default: DiT-S/2)")
    parser.add_argument("--router", default="192,9,3,2", help="default: 0.2 of DiT-S/2's FLOPs, as B/2 has of XL/2's")
    parser.add_argument("--size", type=int, default=16, help="side of the latents")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 8, 1])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--strategies", nargs="+", default=["top-1", "top-1, route-every 4", "once"], choices=list(STRATEGIES))
    parser.add_argument("--variants", nargs="+", default=["auto"], help="precision, with +compile: the monolith in each; strategies in the first")
    parser.add_argument("--resident", type=int, nargs="*", default=[], help="also top-1 and once with so many experts on the device")
    parser.add_argument("--device", default="")
    args = parser.parse_args()
    device = start(args.device).device
    flops("DiT-XL/2", "DiT-B/2", 32, args.experts, 50)
    if (args.preset, args.router, args.size) != ("DiT-XL/2", "DiT-B/2", 32):
        flops(args.preset, args.router, args.size, args.experts, args.steps)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {args.steps} Euler steps, guidance; seconds of {args.turns} turns", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        run = os.path.join(folder, "run")
        random_run(run, args.preset, args.router, args.size, args.experts)
        variants = {}
        for name in args.variants:
            options = {"precision": name.split("+")[0], "compile": name.endswith("+compile")}
            variants[f"monolith {name}" if variants else "monolith"] = (Overruled(run, device, "monolith", **options), {"strategy": "full"})
        options = {"precision": args.variants[0].split("+")[0], "compile": args.variants[0].endswith("+compile")}
        team = Overruled(run, device, **options)
        variants |= {name: (team, STRATEGIES[name]) for name in args.strategies}
        for N in args.resident:
            few = Overruled(run, device, resident=N, **options)
            variants |= {f"{name}, resident {N}": (few, STRATEGIES[name]) for name in ("top-1", "once")}
        for batch in args.batch:
            seconds = {name: [] for name in variants}
            for turn in range(args.turns + 1):
                for name, (team, values) in variants.items():
                    settings = make_config({f"sample.{key}": value for key, value in values.items()}).sample
                    took = path(team, settings, batch, args.steps if turn else 1, device)
                    if turn:        # the first loads and warms up
                        seconds[name].append(took)
            for name, took in seconds.items():
                ratios = sorted(a / b for a, b in zip(took, seconds["monolith"]))
                print(f"  batch {batch:3d}  {name:26s} {batch / statistics.median(took):8.3f} images/s  {statistics.median(ratios):6.3f} times the monolith's time "
                      f"({ratios[0]:.3f} to {ratios[-1]:.3f})  [{', '.join(f'{s:.2f}' for s in took)}]", flush=True)
        if device.type == "cuda":
            print(f"peak GPU memory of all this {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")


if __name__ == "__main__":
    main()
