"""ddm.config"""
import argparse
import difflib
import json
import math
import os
import re
import tomllib
from types import SimpleNamespace

from ddm.errors import UserError
from ddm.files import read_text, write_text


# table -> key -> (default, meaning[, the values allowed])
CONFIG = {
    "data": {
        "size": (32, "pixels of the square training picture"),
        "condition": ("text", "what the model is conditioned on", ("none", "class", "text")),
        "classes": (1000, "number of classes, for condition = class"),
        "cond_dropout": (0.1, "share of samples whose condition is dropped, in router and experts alike (for guidance)"),
        "crop": ("center", "which square of a picture that is not one", ("center", "random")),
        "flip": (True, "mirror half of the pictures"),
        "shuffle_block": (1, "consecutive samples read together; 1 is the exact shuffle, larger suits network file systems"),
        "workers": (-1, "decoding processes a rank; 0: none, -1: the cores left over, at most 8"),
        "max_bad": (0.01, "share of samples that cannot be used above which a stage stops (also --max-bad 1%)"),
        "use_latents": (True, "train on RUN/latents where cache_latents.py has made them; false: encode pictures on the fly"),
    },
    "features": {
        "name": ("pixels", "what images are clustered by: DINOv2 or CLIP by hub name or folder; pixels: thumbnail and colours, no network"),
        "pool": ("cls", "DINOv2's class token alone, or with the mean of the patches", ("cls", "cls+mean")),
        "batch": (64, "images a forward pass"),
        "precision": ("auto", "auto: bf16 on a GPU, fp32 on a CPU", ("auto", "bf16", "fp32")),
    },
    "cluster": {
        "experts": (8, "number of clusters K, and so of experts"),
        "fine_clusters": (1024, "fine centroids, at most a 39th of the images"),
        "assign": ("coarse", "an image's cluster: of the nearest coarse centroid, of the nearest fine one, or random (a control)",
                   ("coarse", "fine", "random")),
        "balance": (0.0, "largest share of the images that a cluster may have; whole fine clusters are moved, so assign = fine (0: as it comes)"),
        "seed": (0, "seed of k-means, of the random assignment and of the router's subset"),
        "router_images": (2_000_000, "images that the router trains on, at most"),
    },
    "autoencoder": {
        "name": ("", "AutoencoderKL or AutoencoderTiny by hub name or folder; empty: the model sees pixels"),
        "precision": ("fp32", "of encoding, where a GPU multiplies fp32 in TF32; decoding is in bf16 on a GPU", ("fp32", "bf16")),
    },
    "text": {
        "name": ("words", "a text encoder by hub name or folder, or several: A + B; words: an embedding of hashed words, learned inside the model"),
        "length": (77, "words or tokens a caption, at most"),
        "vocab": (16384, "rows of the table that words are hashed to, for name = words"),
        "layer": ("last", "which layer's token features; Stable Diffusion XL takes the penultimate", ("last", "penultimate")),
        "precision": ("auto", "auto: bf16 on a GPU, fp32 on a CPU; fp32 on a GPU multiplies in TF32", ("auto", "bf16", "fp32")),
    },
    "model": {
        "preset": ("DiT-S/2", "DiT-{S,B,L,XL}/{2,4,8}, MMDiT-3B/{2,4,8}, or tiny/2, mini/2, MMDiT-tiny/2 for a CPU"),
        "dim": (0, "hidden width (0: the preset's)"),
        "depth": (0, "number of blocks (0: the preset's)"),
        "heads": (0, "attention heads (0: the preset's)"),
        "patch": (0, "side of a patch (0: the preset's)"),
        "double": (0, "blocks with streams of their own for picture and text, which makes it an MMDiT (0: the preset's)"),
    },
    "router": {
        "preset": ("DiT-S/4", "as in [model]"),
        "dim": (0, "as in [model]"),
        "depth": (0, "as in [model]"),
        "heads": (0, "as in [model]"),
        "patch": (0, "as in [model]"),
    },
    "flow": {
        "objective": ("velocity", "what an expert predicts", ("velocity", "x0", "eps")),
        "path": ("linear", "from data to noise, when an expert trains: rectified flow, or a variance-preserving schedule", ("linear", "cosine", "ddpm")),
        "t_density": ("uniform", "density of t when an expert trains (the router's is uniform always)", ("uniform", "logit-normal")),
        "shift": (1.0, "t' = shift t / (1 + (shift - 1) t), when an expert trains and when sampling"),
    },
    "train": {
        "steps": (100_000, "optimiser steps"),
        "batch": (256, "images a step of the whole ensemble: an expert takes batch / experts, the monolith and the router batch"),
        "micro_batch": (0, "images a forward pass on each rank (0: all of the rank's at once)"),
        "lr": (1e-4, "AdamW's learning rate"),
        "warmup": (0, "steps of linear warm-up"),
        "decay": (0, "last steps, in which the learning rate falls linearly to zero"),
        "weight_decay": (0.0, "AdamW's weight decay"),
        "grad_clip": (1.0, "largest norm of the gradient (0: not clipped)"),
        "ema_decay": (0.9999, "decay of the averaged weights; min(ema_decay, (1 + n) / (10 + n)) after n steps"),
        "parallel": ("auto", "several GPUs: ddp, each holds the whole model; fsdp, each a part of it; auto: fsdp if the whole does not fit", ("auto", "ddp", "fsdp")),
        "activation_checkpointing": ("none", "what a block forgets until the backward pass: nothing; all but matrix products and attention; everything",
                                     ("none", "selective", "block")),
        "compile": ("auto", "torch.compile the blocks, which takes a minute at first. auto: on a GPU", ("auto", "yes", "no")),
        "precision": ("auto", "auto: bf16 autocast on a GPU, fp32 on a CPU; fp32 on a GPU multiplies in TF32", ("auto", "bf16", "fp32")),
        "export": ("fp32", "dtype of the exported weights", ("fp32", "bf16")),
        "seed": (0, "seed of the initial weights, the order of the data and the noise"),
        "save_every": (1000, "steps between checkpoints"),
        "keep_last": (2, "checkpoints that are kept, the newest"),
        "keep_every": (0, "and those of steps that are a multiple of this (0: none)"),
        "max_nonfinite": (10, "steps in a row with a gradient that is not finite, after which training stops; each is skipped"),
        "timeout": (1800, "seconds without a step after which a rank that hangs, or waits for one that does, ends the run (0: never)"),
        "sample_every": (1000, "steps between sample grids of an expert (0: none but the last)"),
        "log_every": (50, "steps between rows of the log"),
    },
    "train.router": {},     # what differs from [train] when the router or the student trains; filled in below
    "train.student": {},
    "plan": {
        "gpus": (8, "number of GPUs"),
        "gpu": ("H100", "their kind, of which plan.py knows peak rate and memory",
                ("B200", "GB200", "GH200", "H200 NVL", "H200", "H100 NVL", "H100 PCIe", "H100", "H20", "A100", "L40S", "L40", "L4", "A40", "A10G", "A10",
                 "RTX A6000", "RTX 6000 Ada", "RTX 5090", "RTX 4090", "RTX 3090", "MI300X")),
        "mfu": (0.4, "share of the peak rate that training reaches (model FLOPs utilisation)"),
        "step_seconds": (0.0, "a step time from elsewhere, to say which MFU and batch it implies (0: none)"),
    },
    "sample": {
        "steps": (50, "steps of the solver"),
        "solver": ("euler", "first order; second order with two forwards a step; second order with one", ("euler", "heun", "ab2")),
        "shift": (0.0, "t' = shift t / (1 + (shift - 1) t) of the solver's times (0: as the experts were trained)"),
        "cfg": (4.0, "guidance scale w in v_u + w (v_c - v_u); 1: none"),
        "cfg_low": (0.0, "guidance from this t"),
        "cfg_high": (1.0, "to this; outside, the conditional branch alone"),
        "cfg_routing": ("shared", "the conditional branch's experts make both branches, or each branch asks the router for its own", ("shared", "own")),
        "strategy": ("top-1", "which experts make a step: full, top-N, sample-N, threshold-P, nucleus-P, once or oracle-N"),
        "router_temperature": (1.0, "the router's logits are divided by it"),
        "route_every": (1, "forwards that one answer of the router is used for (once and oracle-N keep theirs anyway)"),
        "route_epsilon": (0.001, "with route_every > 1: an expert with at least 1 - epsilon is kept to the end, the router not asked again (0: never)"),
        "resident": (0, "experts on the device at most; 0: all that are used"),
        "precision": ("auto", "of the weights. auto: bf16 on a GPU, fp32 on a CPU; fp32 on a GPU multiplies in TF32", ("auto", "bf16", "fp32")),
        "compile": (False, "torch.compile the models' blocks: a minute at first, for long runs"),
    },
}
for _stage in ("router", "student"):
    CONFIG[f"train.{_stage}"] = {key: (None, f"{entry[1]} ([train]'s if not given)", *entry[2:]) for key, entry in CONFIG["train"].items()}
CONFIG["train.router"]["steps"] = (0, "optimiser steps (0: so many that the router costs 4% of the training FLOPs)")
CONFIG["train.student"]["batch"] = (0, "images a step (0: a quarter of [train]'s, as in the paper)")
CONFIG["train.student"]["micro_batch"] = (0, "images a forward pass, all of one cluster (0: batch / experts)")
# the least value of a number, where it is not 0
LEAST = {"data.size": 1, "data.classes": 1, "data.shuffle_block": 1, "data.workers": -1, "features.batch": 1, "cluster.experts": 1, "cluster.fine_clusters": 1,
         "cluster.router_images": 1, "text.length": 1, "text.vocab": 2, "flow.shift": 0.01, "train.steps": 1, "train.batch": 1,
         "train.log_every": 1, "train.save_every": 1, "train.keep_last": 1, "train.max_nonfinite": 1, "train.router.steps": 0, "train.student.batch": 0, "sample.steps": 1, "sample.router_temperature": 1e-6,
         "sample.route_every": 1, "plan.gpus": 1, "plan.mfu": 0.001}
MOST = {"data.max_bad": 1, "data.cond_dropout": 1, "cluster.balance": 1}     # and the largest, where it is not infinite
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def _nearest(word, words):
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _checked(name, value, entry):
    """value of config key `name`, as the type of its default; UserError if it is another type or not among the choices."""
    default, choices = entry[0], entry[2] if len(entry) > 2 else None
    if default is None:     # a key of [train.router] or [train.student]
        default = CONFIG["train"][name.rsplit(".", 1)[1]][0]
    if isinstance(value, str) and not isinstance(default, str):     # from the command line
        try:
            if isinstance(default, float) and value.endswith("%"):
                value = float(value[:-1]) / 100
            else:
                value = {"true": True, "false": False}[value.lower()] if isinstance(default, bool) else type(default)(value)
        except (KeyError, ValueError):
            raise UserError(f"{name} = {value!r} is not {KINDS[type(default)]}") from None
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise UserError(f"{name} = {value!r} is not {KINDS[type(default)]}")
    if choices and value not in choices:
        raise UserError(f"{name} = {value!r} is not one of {', '.join(repr(c) for c in choices)}")
    least = LEAST.get(name, LEAST.get(re.sub(r"^train\.\w+\.", "train.", name), 0))
    if isinstance(value, (int, float)) and not least <= value < math.inf:
        raise UserError(f"{name} = {value!r} must be a number of at least {least}")
    if name in MOST and value > MOST[name]:
        raise UserError(f"{name} = {value!r} is a share, which is at most {MOST[name]}")
    return value


def read_toml(path):
    """-> {"table.key": value} of one config file; UserError on an unknown table or key, or a wrong type."""
    try:
        tables = tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:       # not TOML, nested to death
        raise UserError(f"cannot read config {path}: {error}") from None
    values = {}

    def walk(table, prefix):
        for key, value in table.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                if name not in CONFIG:
                    raise UserError(f"{path}: unknown table [{name}]{_nearest(name, CONFIG)}")
                walk(value, f"{name}.")
                continue
            keys = CONFIG.get(prefix[:-1], {})
            if key not in keys:
                raise UserError(f"{path}: unknown key {name}{_nearest(name, [f'{t}.{k}' for t in CONFIG for k in CONFIG[t]])}")
            try:
                values[name] = _checked(name, value, keys[key])
            except (ValueError, OverflowError) as error:        # a number of so many digits that it is no float, or cannot be shown
                raise UserError(f"{path}: {name} is out of all bounds: {error}") from None

    walk(tables, "")
    return values


def make_config(*layers):
    """Defaults, then each layer of {"table.key": value} over the ones before -> namespaces: config.data.size."""
    config = SimpleNamespace(**{t.replace(".", "_"): SimpleNamespace(**{k: e[0] for k, e in keys.items()}) for t, keys in CONFIG.items()})
    for layer in layers:
        for name, value in layer.items():
            table, key = name.rsplit(".", 1)
            setattr(getattr(config, table.replace(".", "_")), key, value)
    return config


def flat(config):
    """A config as {"table.key": value}, keys of [train.router] and [train.student] only where they are set."""
    values = {f"{t}.{k}": getattr(getattr(config, t.replace(".", "_")), k) for t in CONFIG for k in CONFIG[t]}
    return {name: value for name, value in values.items() if value is not None}


def write_toml(config, path):
    values, lines = flat(config), []
    for table, keys in CONFIG.items():
        lines.append(f"[{table}]")
        lines += [f"{k} = {json.dumps(values[f'{table}.{k}'], ensure_ascii=False)}" for k in keys if f"{table}.{k}" in values]
        lines.append("")
    write_text(path, "\n".join(lines) + "\n")


def differences(old, new):
    """The keys in which two {"table.key": value} differ, as 'data.size 32 / 64, ...'."""
    def shown(values, key):
        return repr(values[key]) if key in values else "missing"

    return ", ".join(f"{k} {shown(old, k)} / {shown(new, k)}" for k in sorted({*old, *new}) if shown(old, k) != shown(new, k))


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def make_parser(doc, short_table="", run=True):
    """A parser with --run-dir, --device and, not in its help, a flag for each key of the config; its help is the script's docstring.

    short_table: its keys have short forms, too: --route-every is --sample.route_every.
    """
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    if run:
        parser.add_argument("--run-dir", default="runs/ddm", metavar="DIR", help="the run's folder (default: runs/ddm)")
        parser.add_argument("--device", default="", help="cpu | cuda | cuda:1 (default: the best there is)")
    for table in CONFIG if run else []:
        for key, (default, _, *_) in CONFIG[table].items():
            short = [f"--{key.replace('_', '-')}"] if table == short_table else []
            switch = {"nargs": "?", "const": "true"} if default is False else {}
            parser.add_argument(*short, f"--{table}.{key}", dest=f"{table}.{key}", metavar="X", **switch, help=argparse.SUPPRESS)
    return parser


def parse(parser, argv=None):
    """-> (args, {"table.key": value} of the config flags given). UserError names the nearest flag to an unknown one."""
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UserError(f"unknown argument {flag}{_nearest(flag, parser._option_string_actions)}")
    given = {n: _checked(n, v, CONFIG[n.rsplit(".", 1)[0]][n.rsplit(".", 1)[1]])
             for n, v in vars(args).items() if "." in n and v is not None}
    return args, given


def load_run(run, given, stage="", path=""):
    """The config that cluster.py wrote into the run, or that of the file `path`, with the flags given over it.

    stage: whose flags --train.* are, "router" or "student".
    """
    if stage:       # they go over [train.<stage>]
        given = {f"train.{stage}.{n.rpartition('.')[2]}" if n.startswith("train.") else n: v for n, v in given.items()}
    if path:
        return make_config(read_toml(path), given)
    path = os.path.join(run, "config.toml")
    if not os.path.exists(path):
        raise UserError(f"no run at {run} ({path} is missing): make it with cluster.py --run-dir {run} --data ...")
    return make_config(read_toml(path), given)
