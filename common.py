"""What every stage shares: config.toml and flags, one-line errors, ranks and devices, progress, safe writes.

An experiment is one TOML file of flat tables. CONFIG below lists every key with its default and meaning; configs/demo.toml
shows them in use. On the command line a key is `--table.key VALUE`. Nothing is ignored: an unknown key or flag is an error.
"""
import argparse
import codecs
import contextlib
import difflib
import errno
import fcntl
import glob
import io
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
import tomllib
import traceback
import warnings
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
# Default arguments in there hold the process group of the time of the import. transformers imports it, too; if that were after the group is
# made, the group would outlive its destruction and now and then abort the process at its end (torch 2.13).
import torch.distributed.nn     # noqa: F401
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

# table -> key -> (default, meaning[, the values allowed])
CONFIG = {
    "data": {
        "size": (32, "pixels of the square training picture"),
        "condition": ("text", "what the model is conditioned on", ("none", "class", "text")),
        "classes": (1000, "number of classes, for condition = class"),
        "drop": (0.1, "share of samples whose condition is dropped, in router and experts alike (for guidance)"),
        "crop": ("center", "which square of a picture that is not one", ("center", "random")),
        "flip": (True, "mirror half of the pictures"),
        "run": (1, "consecutive samples read together; 1 is the exact shuffle, larger suits network file systems"),
        "workers": (-1, "decoding processes a rank; 0: none, -1: the cores left over, at most 8"),
        "max_bad": (0.01, "share of samples that cannot be used above which a stage stops (also --max-bad 1%)"),
        "cached": (True, "train on RUN/latents where pretrained.py has made them; false: encode pictures on the fly"),
    },
    "features": {
        "name": ("pixels", "what images are clustered by: DINOv2 or CLIP by hub name or folder; pixels: thumbnail and colours, no network"),
        "pool": ("cls", "DINOv2's class token alone, or with the mean of the patches", ("cls", "cls+mean")),
        "batch": (64, "images a forward pass"),
        "precision": ("auto", "auto: bf16 on a GPU, fp32 on a CPU", ("auto", "bf16", "fp32")),
    },
    "cluster": {
        "experts": (8, "number of clusters K, and so of experts"),
        "fine": (1024, "fine centroids, at most a 39th of the images"),
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
        "time": ("uniform", "density of t when an expert trains (the router's is uniform always)", ("uniform", "logit-normal")),
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
        "clip": (1.0, "largest norm of the gradient (0: not clipped)"),
        "ema": (0.9999, "decay of the averaged weights; min(ema, (1 + n) / (10 + n)) after n steps"),
        "parallel": ("auto", "several GPUs: ddp, each holds the whole model; fsdp, each a part of it; auto: fsdp if the whole does not fit", ("auto", "ddp", "fsdp")),
        "activation_checkpointing": ("none", "what a block forgets until the backward pass: nothing; all but matrix products and attention; everything",
                                     ("none", "selective", "block")),
        "compile": ("auto", "torch.compile the blocks, which takes a minute at first. auto: on a GPU", ("auto", "yes", "no")),
        "precision": ("auto", "auto: bf16 autocast on a GPU, fp32 on a CPU; fp32 on a GPU multiplies in TF32", ("auto", "bf16", "fp32")),
        "export": ("fp32", "dtype of the exported weights", ("fp32", "bf16")),
        "seed": (0, "seed of the initial weights, the order of the data and the noise"),
        "save_every": (1000, "steps between checkpoints"),
        "keep": (2, "checkpoints that are kept, the newest"),
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
LEAST = {"data.size": 1, "data.classes": 1, "data.run": 1, "data.workers": -1, "features.batch": 1, "cluster.experts": 1, "cluster.fine": 1,
         "cluster.router_images": 1, "text.length": 1, "text.vocab": 2, "flow.shift": 0.01, "train.steps": 1, "train.batch": 1,
         "train.log_every": 1, "train.save_every": 1, "train.keep": 1, "train.max_nonfinite": 1, "train.router.steps": 0, "train.student.batch": 0, "sample.steps": 1, "sample.router_temperature": 1e-6,
         "sample.route_every": 1, "plan.gpus": 1, "plan.mfu": 0.001}
MOST = {"data.max_bad": 1, "data.drop": 1, "cluster.balance": 1}     # and the largest, where it is not infinite
UMASK = os.umask(0)     # there is no other way to read it, and threads must not do it beside each other
os.umask(UMASK)
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


class UserError(Exception):
    """Something the user got wrong: one line that names it, both values and the remedy.

    Rank 0 prints it, since all ranks meet the same mistake; local: this rank alone knows of it, and prints it.
    """

    def __init__(self, text, local=False):
        super().__init__(text)
        self.local = local


def script(main):
    """Runs a stage's main(); a mistake of the user's becomes one line on stderr, from rank 0 alone, and exit code 2.

    So does whatever the file system refuses. Any other exception prints its traceback. The process group is left only after
    main() has returned: with NCCL, leaving it is a collective, in which a rank that failed would wait for all the others.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")       # a file's name need not be text
    others = os.environ.get("RANK", "0") != "0"
    try:
        main()
    except UserError as error:
        # ranks other than 0 keep silent about what all of them have met
        end(2, error_line(error) if error.local or not others else "", after=0 if error.local else 3)
    except (OSError, UnicodeEncodeError) as error:
        if line := explain(error):
            end(2, error_line(line), after=3)      # rank 0 may have met the same
        end(1, traceback.format_exc())
    except KeyboardInterrupt:
        end(130, "stopped by Ctrl-C")
    except SystemExit:
        raise
    except BaseException:       # some of torch's are no Exception
        end(1, traceback.format_exc())
    if dist.is_initialized():
        dist.destroy_process_group()


def error_line(text):
    """One line, whatever characters the names in it have."""
    return "error: " + " ".join(str(text).splitlines())


def end(code, text, after=0):
    """Prints `text` and ends the process; on several ranks without another word to the others, which may wait for this one.

    after: seconds that ranks other than 0 wait with it. torchrun ends them when the first has gone: rank 0 speaks first.
    """
    if after and os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(after)
    if text:
        print(text.rstrip(), file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(code)
    sys.stdout.flush()
    kill_children()
    os._exit(code)


def kill_children():
    """Ends decoding processes, which ignore signals."""
    for process in multiprocessing.active_children():
        process.kill()


# ---- what the file system refuses -----------------------------------------------------------------------------------

REMEDIES = {
    errno.ENOSPC: "make room, and run the same command again",
    errno.EDQUOT: "the quota is used up: make room, and run the same command again",
    errno.EROFS: "it is mounted read-only: give a place that can be written to",
    errno.EACCES: "you lack the right to: change it (chmod, chown), or give another place",
    errno.EPERM: "you lack the right to: change it (chmod, chown), or give another place",
    errno.ENOENT: "there is no such file or folder (or it is a link to nothing): look at the path",
    errno.EISDIR: "it is a folder, where a file is wanted: give another name",
    errno.ENOTDIR: "a part of this path is a file, where a folder is wanted: give another name",
    errno.EEXIST: "it is a file, or a link to nothing, where a folder is wanted: give another name",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "links lead in a circle: look at the path",
    errno.EMFILE: "raise the number of files that a process may open: ulimit -n 65536",
    errno.ENFILE: "the machine has too many files open: close other programs",
    errno.EFBIG: "raise the largest size that a file may have: ulimit -f unlimited",
    errno.EIO: "the disk or the network file system fails: run the same command again when it works",
    errno.ESTALE: "the network file system has lost it: run the same command again",
}


def explain(error):
    """One line for what the file system refused: path, reason and remedy. Empty for an error that is none of this kind."""
    if isinstance(error, UnicodeEncodeError):
        return (f"{error.object!r} cannot be written in {error.encoding}: rename it, or use a UTF-8 locale (LANG=C.UTF-8)")
    path = error.filename if error.filename2 is None else error.filename2
    if error.errno in REMEDIES and (path is not None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE)):
        place = "" if path is None else f"{path}: "
        return f"{place}{os.strerror(error.errno)}: {REMEDIES[error.errno]}"
    if path is not None and error.errno:
        return f"{path}: {error.strerror}"
    return ""


def _try(temporary, path):
    """Writes and removes the file `temporary`; an OSError names `path`."""
    try:
        open(temporary, "wb").close()
        os.remove(temporary)
    except OSError as error:
        error.filename = path
        raise


def try_folder(path):
    """Makes the folder `path`, and tries to write in it. Called before work whose result belongs there: OSError."""
    os.makedirs(path, exist_ok=True)
    _try(_temporary(os.path.join(path, "x")), path)


def try_file(path):
    """Tries to write beside `path`, as atomic does; what is there stays. Called before the work whose result it will hold: OSError, UserError."""
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "no ordinary file"
        raise UserError(f"{path} is {kind}: give another name")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    _try(_temporary(path), path)


# ---- text and JSON --------------------------------------------------------------------------------------------------

BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
        codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}      # UTF-32's before UTF-16's, which they begin with
MARKS = tuple(BOMS)


def decode_text(payload):
    """The bytes of a text file -> str, with \n at the ends of lines. By its byte order mark, UTF-8 without one. ValueError."""
    mark = next(filter(payload.startswith, BOMS)) if payload.startswith(MARKS) else b""
    text = payload[len(mark):].decode(BOMS.get(mark, "utf-8"))
    if "\0" in text:
        raise ValueError("it holds zero bytes; is it UTF-16 without a byte order mark?")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path):
    """The text of a file of the user's, whatever editor wrote it. UserError where it cannot be read, or is no text."""
    try:
        with open(path, "rb") as f:
            return decode_text(f.read())
    except OSError as error:
        raise UserError(explain(error) or f"cannot read {path}: {error}") from None
    except ValueError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 ({error}); save it as UTF-8") from None


def check_shape(value, shape, where=""):
    """ValueError unless `value`, from a JSON file, has the types of `shape`: a type, {key: shape}, {str: shape} for any keys, [shape]."""
    name = where or "it"
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is no table")
        if str in shape:
            shape = dict.fromkeys(value, shape[str])
        for key, inner in shape.items():
            if key not in value:
                raise ValueError(f"{where}.{key} is missing".lstrip("."))
            check_shape(value[key], inner, f"{where}.{key}".lstrip("."))
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{name} is no list")
        for i, inner in enumerate(value):
            check_shape(inner, shape[0], f"{where}[{i}]")
    elif shape is float and type(value) is int:
        pass        # JSON writes a whole number so
    elif not isinstance(value, shape) or isinstance(value, bool) and shape is int:
        raise ValueError(f"{name} = {str(value)[:40]!r} is no {shape.__name__}")
    return value


def parse_json(text, shape):
    """JSON -> its value, which has the types of `shape` (check_shape). ValueError, whatever is wrong with it."""
    try:
        return check_shape(json.loads(text), shape)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path, shape):
    """parse_json of a file. ValueError, whatever is wrong with it; FileNotFoundError if there is none."""
    try:
        with open(path, "rb") as f:
            return parse_json(decode_text(f.read()), shape)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(explain(error) or str(error)) from None


def write_text(path, text):
    """Writes a text file, as UTF-8 whatever the locale."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.write(text)


# ---- config.toml and flags ----------------------------------------------------------------------------------------

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


def make_parser(doc, tables, run=True):
    """A parser with --run, --device and a flag for each key of the config's `tables`; its help is the script's docstring.

    sample.py, whose flags are those of one table, has short forms, too: --route-every is --sample.route_every.
    """
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    if run:
        parser.add_argument("--run", default="runs/ddm", metavar="DIR", help="the run's folder (default: runs/ddm)")
        parser.add_argument("--device", default="", help="cpu | cuda | cuda:1 (default: the best there is)")
    for table in tables:
        group = parser.add_argument_group(f"[{table}]")
        for key, (default, meaning, *choices) in CONFIG[table].items():
            allowed = f" {' | '.join(c or repr(c) for c in choices[0])}" if choices else ""
            shown = "" if default is None else f" (default: {default!r})"
            short = [f"--{key.replace('_', '-')}"] if tables == ["sample"] else []
            switch = {"nargs": "?", "const": "true"} if default is False else {}
            group.add_argument(*short, f"--{table}.{key}", dest=f"{table}.{key}", metavar="X", **switch, help=f"{meaning}{allowed}{shown}".replace("%", "%%"))
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
        raise UserError(f"no run at {run} ({path} is missing): make it with cluster.py --run {run} --data ...")
    return make_config(read_toml(path), given)


NETWORK = {"name": str}         # what an artifact says of a network, at the least
CLUSTERING = {"fingerprint": str, "extractor": NETWORK, "seed": int, "assign": str, "inputs": str, "tars": int,
              "networks": {"autoencoder": NETWORK, "text": NETWORK}}
MANIFEST = {"fingerprint": str, "tars": {str: {"samples": int, "bytes": int, "sha256": str, "source": str}}}


def read_description(path, shape):
    """The JSON in a safetensors file's metadata, of the types of `shape` (check_shape). ValueError, whatever is wrong with it."""
    try:
        with safe_open(path, framework="np") as f:
            return parse_json((f.metadata() or {})["nanoddm"], shape)
    except KeyError:
        raise ValueError("it says nothing of itself, so it is none of ours") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error)) from None


def read_clusters(run):
    """What RUN/clusters.safetensors says besides its centroids: the fingerprint that all of the run carries, and the networks meant for it."""
    path = os.path.join(run, "clusters.safetensors")
    try:
        return read_description(path, CLUSTERING)
    except ValueError as error:
        raise UserError(f"cannot read {path} ({error}): make it with cluster.py --run {run} --data ...") from None


def read_manifest(folder):
    """What RUN/shards/K/manifest.json says (MANIFEST). UserError where there is none, or it is damaged."""
    path = os.path.join(folder, "manifest.json")
    try:
        return read_json(path, MANIFEST)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): copy the folder whole, or make it with cluster.py") from None


# ---- ranks and devices --------------------------------------------------------------------------------------------

def cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _unusable_gpu():
    """Why a GPU of this machine cannot be used; empty where there is none, or CUDA_VISIBLE_DEVICES hides it on purpose."""
    if not glob.glob("/proc/driver/nvidia/gpus/*") or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return ""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is a build without CUDA"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.is_available()
    return str(caught[0].message).splitlines()[0] if caught else "CUDA finds no device"


def _choose_device(device):
    """What --device says, or the best there is -> torch.device, tried. UserError if it cannot be used."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if re.fullmatch(r"cuda:\d+", device) and "RANK" in os.environ:
        raise UserError(f"--device {device}: under torchrun each rank has a GPU of its own; say --device cuda, and choose GPUs by CUDA_VISIBLE_DEVICES")
    if not device and torch.cuda.is_available():
        device = "cuda"
    if device == "cuda":
        device = f"cuda:{local}"
    try:
        found = torch.device(device or "cpu")
        torch.zeros((), device=found)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}", local=local > 0 and torch.cuda.is_available()) from None
    return found


def local_world():
    """The ranks of this machine, which share its cores and its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))


def start(device="", timeout=timedelta(minutes=30)):
    """Joins torchrun's process group, if there is one. -> namespace of rank, world, device (torch.device).

    One code path for plain python, one GPU and many: without torchrun rank is 0 and world is 1. timeout: how long the ranks may
    wait for each other. Rank 0 says which devices they are, and warns of a GPU that stays idle.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # a run may have many tars, and decoding processes hand each tensor over as a file
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    chosen = _choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
    if rank == 0:
        name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else f"{cores()} cores, {torch.get_num_threads()} threads a rank"
        print(f"device: {world} x {chosen.type} ({name}), torch {torch.__version__}", flush=True)
        if not device and chosen.type == "cpu" and (why := _unusable_gpu()):
            print(f"warning: this machine has a GPU that cannot be used ({why}): all the work is done by the CPU, many times slower; "
                  f"--device cuda makes this an error", file=sys.stderr, flush=True)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=timeout)
    return SimpleNamespace(rank=rank, world=world, device=chosen)


def sum_over_ranks(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast(value):
    """rank 0's value, on all ranks."""
    if dist.is_initialized():
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]
    return value


def gather(value):
    """The values of all ranks, on all ranks."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def collect(value):
    """The values of all ranks on rank 0, None on the others."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(value, values)
    return values


def on_rank_0(function):
    """Calls function() on rank 0 alone; a UserError or OSError there is a UserError on all ranks, so that none waits for another."""
    error = None
    if os.environ.get("RANK", "0") == "0":
        try:
            function()
        except UserError as caught:
            error = str(caught)
        except OSError as caught:
            error = explain(caught) or str(caught)
    if error := broadcast(error):
        raise UserError(error)


def barrier():
    if dist.is_initialized():
        sum_over_ranks(torch.zeros(1))   # through gloo: no GPU is touched


# ---- progress and files -------------------------------------------------------------------------------------------

class _Lines:
    """A stderr for tqdm that is not a terminal: whole lines instead of a bar that redraws itself."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self):
        sys.stderr.flush()


def progress(iterable=None, **options):
    """tqdm on a terminal, from rank 0 alone; in a log, a plain line every 15 seconds."""
    options["disable"] = os.environ.get("RANK", "0") != "0"
    if not sys.stderr.isatty():
        options |= {"file": _Lines(), "mininterval": 15, "ncols": 200,
                    "bar_format": "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"}
    return tqdm(iterable, **options)


def sync(path):
    """What has been written to a file, or which names a folder holds, survives a loss of power from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path):
    """A name beside `path`, this thread's own."""
    return f"{path}.{os.getpid()}-{threading.get_native_id()}.tmp"


@contextlib.contextmanager
def atomic(path):
    """Yields a name beside `path` to write to; renames it into place at the end, so that no half-written file is ever seen, even after a loss of power.

    An OSError names `path`, also where safetensors failed to write, or the write itself did, which knows no name.
    """
    folder, temporary = os.path.dirname(os.path.abspath(path)), _temporary(path)
    try:
        os.makedirs(folder, exist_ok=True)
        yield temporary
        os.chmod(temporary, 0o666 & ~UMASK)     # safetensors would make its files private
        sync(temporary)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):      # some network file systems cannot
            sync(folder)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise UserError(f"{path} could not be written: {error}") from None
        raise OSError(int(number[1]), os.strerror(int(number[1])), path) from None
    except OSError as error:
        if error.filename is None or error.filename == temporary:
            error.filename, error.filename2 = path, None
        raise
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


# ---- who works in a folder ----------------------------------------------------------------------------------------

BEAT = 5            # seconds between two signs of life of a lock's holder
SILENCE = 20        # seconds without one, after which a holder that this kernel does not know is dead
LEASE = 120         # seconds that a network file system may keep the lock of a machine that died


def _this_kernel():
    """Names the running kernel, whose locks its processes see, in containers too."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return f.read().strip()
    except OSError:
        return socket.gethostname()


class Lock:
    """`with Lock(path, what):` nobody else, on any host that shares the file system, has the lock of this path meanwhile.

    The kernel's lock (flock) ends with its process, whatever killed it. Where hosts do not see each other's, the holder touches
    the file every few seconds: one that stays untouched is a dead process's. UserError if somebody has it.
    """

    def __init__(self, path, what):
        self.path, self.what, self.file = path, what, None

    def __enter__(self):
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        deadline = time.monotonic() + LEASE
        while self.file is None:
            file = open(self.path, "a+b")
            try:
                if self._take(file, deadline):
                    self.file = file
            except FileNotFoundError:       # its holder has just finished, and removed it
                pass
            finally:
                if self.file is None:
                    file.close()

        me = {"host": socket.gethostname(), "kernel": _this_kernel(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self.file.truncate(0)
        self.file.write(json.dumps(me).encode())
        self.file.flush()
        # a forked process would hold the lock for as long as it lives
        os.register_at_fork(after_in_child=self.file.close)
        self._done = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._done.set()
        with contextlib.suppress(OSError):
            os.remove(self.path)
        self.file.close()

    def _beat(self):
        while not self._done.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _take(self, file, deadline):
        """Whether the lock is ours now; False: try again. UserError if it is somebody's. FileNotFoundError if it has gone meanwhile."""
        taken, by_kernel = False, True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:         # a file system without locks: the signs of life must do
            by_kernel = False

        holder = self._holder(file)
        here = holder is None or holder["kernel"] == _this_kernel()
        if taken and here:
            raise UserError(self._taken(holder))
        if holder and not (here and by_kernel) and self._shows_life():
            raise UserError(self._taken(holder))
        if taken:               # by a machine that is dead: the file server gives the lock up in a while
            if time.monotonic() > deadline:
                raise UserError(self._taken(holder))
            return False
        return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))

    def _holder(self, file):
        """Who wrote the file -> {host, kernel, pid, since}; None if nobody has yet."""
        file.seek(0)
        try:
            return parse_json(file.read().decode(), {"host": str, "kernel": str, "pid": int, "since": str})
        except ValueError:
            return None

    def _taken(self, holder):
        by = f"process {holder['pid']} on {holder['host']} since {holder['since']}" if holder else "another process"
        return f"{self.what} is being worked on by {by} ({self.path}): wait until it has ended, or stop it"

    def _shows_life(self):
        """Looks for SILENCE whether the holder touches the file."""
        print(f"{self.path} is of another machine: looking for {SILENCE} s whether its process lives", file=sys.stderr, flush=True)
        first, until = os.stat(self.path).st_mtime_ns, time.monotonic() + SILENCE
        while True:
            last_look = time.monotonic() > until
            with open(self.path, "rb") as file:     # opened anew, a network file system says the truth
                if os.fstat(file.fileno()).st_mtime_ns != first:
                    return True
            if last_look:
                return False
            time.sleep(min(1, SILENCE / 4))


@contextlib.contextmanager
def alone(path, what):
    """Lock, held by rank 0 for all of them."""
    with Lock(path, what) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext():
        yield
