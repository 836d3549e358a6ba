"""How fast a training step is, beside facebookresearch/DiT's: forward, backward, clipping, optimiser and average of the same model on the same batch.

    git clone https://github.com/facebookresearch/DiT scratch/DiT; pip install timm          # outside of this folder; DiT's licence is non-commercial
    python bench/train_step.py --peer scratch/DiT                                            # a CPU: DiT-S/2 and DiT-B/2, fp32
    python bench/train_step.py --peer scratch/DiT --presets DiT-XL/2 --batch 32 --precision bf16 --steps 20
    python bench/train_step.py --presets DiT-B/2 DiT-XL/2 MMDiT-3B/2 --batch 32 --precision bf16 --steps 20      # ours alone: images/s, MFU, memory

Ours is ddm/engine.py's step and flow.py's loss; theirs is the step of their train.py (its model, diffusion, AdamW and update_ema), without DDP and
the autoencoder. Inputs are random latents of 32 x 32 x 4. The sides take turns in one process; a ratio is the median over turns, with its range.
--precision fp32 multiplies in TF32 on a GPU, as both projects do; bf16 is autocast, which theirs as published lacks: both of theirs are measured.
"""

import argparse
import copy
import os
import statistics
import sys
import time
import types

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import flow
import model
from ddm import plan
from ddm.config import make_config
from ddm.engine import Engine
from ddm.log import Meter
from ddm.process import Ranks, start


def ours(preset, batch, device, precision, compile, checkpointing):
    """-> (step(), parameters, FLOPs of an image)."""
    mmdit = preset.startswith("MMDiT")
    config = make_config(
        {
            "data.condition": "text" if mmdit else "class",
            "train.precision": precision,
            "train.compile": "yes" if compile else "no",
            "train.activation_checkpointing": checkpointing,
        }
    )
    condition = dict(condition="class", classes=1000)
    c = torch.randint(0, 1000, (batch,), device=device)
    if mmdit:
        condition = dict(condition="text", text_dim=2048, length=128)
        c = torch.randn(batch, 128, 2048, device=device).half()
    shape = model.ModelConfig(32, 4, **condition, **model.PRESETS[preset])

    train = config.train
    engine = Engine("bench", shape, train, Ranks(0, 1, device), batch=batch)
    optimizer = torch.optim.AdamW(
        engine.model.parameters(), train.lr, weight_decay=train.weight_decay, fused=True
    )
    meter = Meter(device)

    def step():
        x_0, eps = torch.randn(2, batch, 4, 32, 32, device=device)
        t = torch.rand(batch, device=device)
        dropped = model.drop_condition(shape, c, torch.rand(batch, device=device) < 0.1)
        loss = flow.expert_loss(engine, x_0, dropped, t, eps, "velocity", "linear")
        loss.mean().backward()
        # read when a row of the log is due, not at each step
        meter.add("loss", loss)
        norm = engine.clip_gradients(train.grad_clip)
        engine.optimizer_step(norm, optimizer)
        engine.update_ema(train.ema_decay)
        meter.commit(norm)

    parameters = sum(p.numel() for p in engine.model.parameters())
    return step, parameters, engine.image_flops


def theirs(folder, preset, batch, device, autocast, compile):
    """The step of facebookresearch/DiT's train.py."""
    if (
        device.type == "cpu"
    ):  # its timm wants torchvision, whose operators a CPU build of torch cannot register
        sys.modules.setdefault(
            "torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations")
        )
    sys.path.insert(1, folder)
    import diffusion as peer_diffusion
    import models as peer_models

    network = peer_models.DiT_models[preset](input_size=32, num_classes=1000).to(device)
    average = copy.deepcopy(network).requires_grad_(False)
    diffusion = peer_diffusion.create_diffusion(timestep_respacing="")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0)
    update_ema = _functions(os.path.join(folder, "train.py"), "update_ema").update_ema
    network.train()
    called, total = torch.compile(network) if compile else network, [0.0]
    y = torch.randint(0, 1000, (batch,), device=device)

    def step():
        x = torch.randn(batch, 4, 32, 32, device=device)
        t = torch.randint(0, diffusion.num_timesteps, (batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = diffusion.training_losses(called, x, t, dict(y=y))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_ema(average, network)
        total[0] += loss.item()

    return step, sum(p.numel() for p in network.parameters()), None


def _functions(path, *names):
    """A module of these functions of a file whose imports are not all at hand."""
    import ast
    from collections import OrderedDict

    with open(path) as f:
        tree = ast.parse(f.read())
    tree.body = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    module = types.ModuleType("peer_train")
    vars(module).update(torch=torch, OrderedDict=OrderedDict)
    exec(compile(tree, path, "exec"), vars(module))
    return module


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peer",
        default="",
        metavar="DIR",
        help="a checkout of facebookresearch/DiT (default: ours alone)",
    )
    parser.add_argument("--presets", nargs="+", default=["DiT-S/2", "DiT-B/2"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument(
        "--activation-checkpointing", default="none", choices=("none", "selective", "block")
    )
    parser.add_argument(
        "--eager", action="store_true", help="measure ours without compilation, too"
    )
    parser.add_argument(
        "--compile-peer", action="store_true", help="measure theirs with torch.compile(model), too"
    )
    parser.add_argument("--device", default="")
    args = parser.parse_args()
    device = start(args.device).device
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    peak = plan.peak_flops(name, args.precision == "bf16") if cuda else None
    print(
        f"{name}, torch {torch.__version__}, {args.precision}, batch {args.batch}, {args.turns} turns of {args.steps} steps"
    )
    for preset in args.presets:
        sides = {
            "ours, compiled": lambda: ours(
                preset, args.batch, device, args.precision, True, args.activation_checkpointing
            )
        }
        if args.eager:
            sides["ours, eager"] = lambda: ours(
                preset, args.batch, device, args.precision, False, args.activation_checkpointing
            )
        if args.peer:
            sides["DiT as published"] = lambda: theirs(
                args.peer, preset, args.batch, device, False, False
            )
            if args.precision == "bf16":
                sides["DiT with autocast"] = lambda: theirs(
                    args.peer, preset, args.batch, device, True, False
                )
            if args.compile_peer:
                sides["DiT compiled"] = lambda: theirs(
                    args.peer, preset, args.batch, device, args.precision == "bf16", True
                )
        steps, seconds, notes = {}, {}, {}
        for side, make in sides.items():
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if cuda else 0
            begin = time.perf_counter()
            steps[side], parameters, flops = make()
            for _ in range(3):
                steps[side]()
            if cuda:
                torch.cuda.synchronize()
            notes[side] = (
                parameters,
                flops,
                time.perf_counter() - begin,
                (torch.cuda.max_memory_allocated() - before) / 1e9 if cuda else 0,
            )
            seconds[side] = []
        for _ in range(args.turns):
            for side, step in steps.items():
                begin = time.perf_counter()
                for _ in range(args.steps):
                    step()
                if cuda:
                    torch.cuda.synchronize()
                seconds[side].append((time.perf_counter() - begin) / args.steps)
        print(preset)
        for side, times in seconds.items():
            parameters, flops, first, memory = notes[side]
            rate = args.batch / statistics.median(times)
            ratios = [theirs / mine for theirs, mine in zip(times, seconds["ours, compiled"])]
            print(
                f"  {side:18s} {parameters / 1e6:8.2f}M parameters {rate:9.2f} images/s"
                + (f"  MFU {flops * rate / peak:.1%}" if peak and flops else "")
                + (f"  peak memory {memory:.2f} GB" if cuda else "")
                + f"  first three steps {first:.0f} s"
                + (
                    ""
                    if side == "ours, compiled"
                    else f"  ours is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
