r"""How fast a training step is, beside facebookresearch/DiT's.

    # outside of this folder; DiT's licence is non-commercial
    git clone https://github.com/facebookresearch/DiT scratch/DiT; pip install timm
    # a CPU: DiT-S/2 and DiT-B/2, fp32
    python bench/train_step.py --peer scratch/DiT
    python bench/train_step.py --peer scratch/DiT --presets DiT-XL/2 --batch 32 \
        --precision bf16 --steps 20
    # ours alone: images/s, MFU, memory
    python bench/train_step.py --presets DiT-B/2 DiT-XL/2 MMDiT-3B/2 --batch 32 \
        --precision bf16 --steps 20

A step is forward, backward, clipping, optimiser and EMA weights of the same model on the same
batch. Ours is ddm/engine.py's step and flow.py's loss; theirs is the step of their train.py (its
model, diffusion, AdamW and update_ema), without DDP and the autoencoder. Inputs are random latents
of 32 x 32 x 4. The sides take turns in one process; a ratio is the median over turns, with its
range.
--precision fp32 multiplies in TF32 on a GPU, as both projects do; bf16 is autocast, which theirs as
published lacks: both of theirs are measured.
"""

import argparse
import copy
import functools
import os
import statistics
import sys
import time
import types
from dataclasses import dataclass, field

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import flow
import model
from ddm import plan
from ddm.config import make_config
from ddm.engine import Engine
from ddm.log import Meter
from ddm.process import Ranks, start

REFERENCE = "ours, compiled"


@dataclass
class Side:
    """One of those that take turns, and what has been measured of it."""

    step: object
    parameters: int
    # of an image, forward and backward; None: not known
    flops: float | None
    first_seconds: float
    memory_gb: float
    # of a step, one a turn
    seconds: list[float] = field(default_factory=list)


def ours(preset, args, device, compile):
    """-> (step(), parameters, FLOPs of an image)."""
    batch = args.batch
    mmdit = preset.startswith("MMDiT")
    settings = {
        "data.condition": "text" if mmdit else "class",
        "train.precision": args.precision,
        "train.compile": "yes" if compile else "no",
        "train.activation_checkpointing": args.activation_checkpointing,
    }
    config = make_config(settings)
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


def theirs(preset, args, device, autocast, compile):
    """The step of facebookresearch/DiT's train.py."""
    batch = args.batch
    folder = args.peer
    # its timm wants torchvision, whose operators a CPU build of torch cannot register
    if device.type == "cpu":
        name = "torchvision._meta_registrations"
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.path.insert(1, folder)
    import diffusion as peer_diffusion
    import models as peer_models

    network = peer_models.DiT_models[preset](input_size=32, num_classes=1000).to(device)
    ema = copy.deepcopy(network).requires_grad_(False)
    diffusion = peer_diffusion.create_diffusion(timestep_respacing="")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0)
    update_ema = _functions(os.path.join(folder, "train.py"), "update_ema").update_ema
    network.train()
    called = torch.compile(network) if compile else network
    total = [0.0]
    y = torch.randint(0, 1000, (batch,), device=device)

    def step():
        x = torch.randn(batch, 4, 32, 32, device=device)
        t = torch.randint(0, diffusion.num_timesteps, (batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = diffusion.training_losses(called, x, t, dict(y=y))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_ema(ema, network)
        total[0] += loss.item()

    return step, sum(p.numel() for p in network.parameters()), None


def _functions(path, *names):
    """A module of these functions of a file whose imports are not all at hand."""
    import ast
    from collections import OrderedDict

    with open(path) as f:
        tree = ast.parse(f.read())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    tree.body = [node for node in functions if node.name in names]
    module = types.ModuleType("peer_train")
    vars(module).update(torch=torch, OrderedDict=OrderedDict)
    exec(compile(tree, path, "exec"), vars(module))
    return module


def sides_of(preset, args, device):
    """{name: a function that makes it, as ours() and theirs() do}, the reference first."""
    our = functools.partial(ours, preset, args, device)
    their = functools.partial(theirs, preset, args, device)
    bf16 = args.precision == "bf16"

    sides = {REFERENCE: functools.partial(our, compile=True)}
    if args.eager:
        sides["ours, eager"] = functools.partial(our, compile=False)
    if args.peer:
        sides["DiT as published"] = functools.partial(their, autocast=False, compile=False)
        if bf16:
            sides["DiT with autocast"] = functools.partial(their, autocast=True, compile=False)
        if args.compile_peer:
            sides["DiT compiled"] = functools.partial(their, autocast=bf16, compile=True)
    return sides


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def warm_up(make, device):
    """Makes a side and takes its first three steps, in which it is compiled. -> Side."""
    cuda = device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()

    begin = time.perf_counter()
    step, parameters, flops = make()
    for _ in range(3):
        step()
    synchronize(device)
    seconds = time.perf_counter() - begin

    memory = torch.cuda.max_memory_allocated() - before if cuda else 0
    return Side(step, parameters, flops, first_seconds=seconds, memory_gb=memory / 1e9)


def take_turns(sides, args, device):
    for _ in range(args.turns):
        for side in sides.values():
            begin = time.perf_counter()
            for _ in range(args.steps):
                side.step()
            synchronize(device)
            side.seconds.append((time.perf_counter() - begin) / args.steps)


def describe(name, side, reference, batch, peak):
    """A side's line. peak: the device's FLOPs a second, None: not known."""
    rate = batch / statistics.median(side.seconds)
    line = f"  {name:18s} {side.parameters / 1e6:8.2f}M parameters {rate:9.2f} images/s"
    if peak and side.flops:
        line += f"  MFU {side.flops * rate / peak:.1%}"
    if side.memory_gb:
        line += f"  peak memory {side.memory_gb:.2f} GB"
    line += f"  first three steps {side.first_seconds:.0f} s"
    if side is not reference:
        pairs = zip(side.seconds, reference.seconds, strict=True)
        ratios = [theirs / ours for theirs, ours in pairs]
        line += f"  ours is {statistics.median(ratios):.2f} times as fast"
        line += f" ({min(ratios):.2f} to {max(ratios):.2f})"
    return line


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    peer = "a checkout of facebookresearch/DiT (default: ours alone)"
    add("--peer", default="", metavar="DIR", help=peer)
    add("--presets", nargs="+", default=["DiT-S/2", "DiT-B/2"])
    add("--batch", type=int, default=16)
    add("--steps", type=int, default=4, help="a turn")
    add("--turns", type=int, default=5)
    add("--precision", default="fp32", choices=("fp32", "bf16"))
    modes = ("none", "selective", "block")
    add("--activation-checkpointing", default="none", choices=modes)
    add("--eager", action="store_true", help="measure ours without compilation, too")
    compiled = "measure theirs with torch.compile(model), too"
    add("--compile-peer", action="store_true", help=compiled)
    add("--device", default="")
    return parser


def main():
    args = make_parser().parse_args()
    device = start(args.device).device
    name = f"CPU, {torch.get_num_threads()} threads"
    peak = None
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        peak = plan.peak_flops(name, args.precision == "bf16")
    print(
        f"{name}, torch {torch.__version__}, {args.precision}, batch {args.batch}, "
        f"{args.turns} turns of {args.steps} steps"
    )

    for preset in args.presets:
        makers = sides_of(preset, args, device)
        sides = {side: warm_up(make, device) for side, make in makers.items()}
        take_turns(sides, args, device)
        print(preset)
        for side, measured in sides.items():
            line = describe(side, measured, sides[REFERENCE], args.batch, peak)
            print(line, flush=True)


if __name__ == "__main__":
    main()
