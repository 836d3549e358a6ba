"""The config: every key with its type, default, range and meaning; config.toml; the command line.

An experiment is one TOML file. A class below is one of its tables, a field one of its keys. On the
command line of every script a key is `--table.key VALUE`. Nothing is ignored: an unknown table, key
or flag is an error that names the nearest one.

    args, given = parse(make_parser(__doc__))       given: {"train.lr": 1e-4}, what the flags say
    config = load_run(args.run_dir, given)          the run's config.toml, the flags over it
    config.train.lr                                 [train], as an expert trains
    config.stage("router").lr                       the same with [train.router] over it

    python -m ddm.config > docs/config.md           makes the reference of all keys anew
"""
import argparse
import difflib
import inspect
import json
import os
import sys
import textwrap
import tomllib
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import flow
from ddm.errors import UserError
from ddm.files import read_text, write_text
from model import PRESETS, ModelConfig

# ---- the tables ----------------------------------------------------------------------------------


class Table(BaseModel):
    """A table of the config. No unknown key, no number in quotes; a whole number may be a float."""
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def key(default, meaning, least=0, most=None):
    """A key of a table. least, most: a number's range; where none is given it is not negative."""
    # type(), since to isinstance a bool is an int
    if type(default) not in (int, float):
        return Field(default, description=meaning)
    return Field(default, description=meaning, ge=least, le=most)


Precision = Literal["auto", "bf16", "fp32"]


class Data(Table):
    """What a training image is, what it is conditioned on, and how both are read."""
    # the image
    size: int = key(32, "pixels a side of the training image, a square", least=1)
    crop: Literal["center", "random"] = key("center", "which square of an image that is not one")
    flip: bool = key(True, "mirror half of the images")

    # its condition
    condition: Literal["none", "class", "text"] = key("text", "what the models are conditioned on")
    classes: int = key(1000, "number of classes, for condition = class", least=1)
    cond_dropout: float = key(
        0.1, "share of samples that lose their condition (for guidance), router and experts alike",
        most=1)

    # how it is read
    shuffle_block: int = key(
        1, "consecutive samples that are read together; 1 is the exact shuffle, "
        "larger suits network file systems", least=1)
    workers: int = key(
        -1, "decoding processes a rank; 0: none, -1: the cores left over, at most 8", least=-1)
    max_bad: float = key(0.01, "share of unusable samples above which a stage stops", most=1)
    use_latents: bool = key(
        True, "train on RUN/latents where cache_latents.py has made them; "
        "false: encode images on the fly")


class Features(Table):
    """What images are clustered by."""
    name: str = key(
        "pixels", "DINOv2 or CLIP by hub name or folder; pixels: thumbnail and colours, no network")
    pool: Literal["cls", "cls+mean"] = key(
        "cls", "DINOv2's class token alone, or with the mean of the patches")
    batch: int = key(64, "images a forward pass", least=1)
    precision: Precision = key("auto", "auto: bf16 on a GPU, fp32 on a CPU")


class Cluster(Table):
    """The partition: k-means to fine clusters, then of their centroids to one for each expert."""
    experts: int = key(8, "number of clusters K, and so of experts", least=1)
    fine_clusters: int = key(1024, "fine centroids, at most a 39th of the images", least=1)
    assign: Literal["coarse", "fine", "random"] = key(
        "coarse", "an image's cluster: of the nearest coarse centroid, of the nearest fine one, "
        "or random (a control)")
    balance: float = key(
        0.0, "largest share of the images that a cluster may have; whole fine clusters are moved, "
        "so assign = fine (0: as it comes)", most=1)
    seed: int = key(0, "seed of k-means, of the random assignment and of the router's subset")
    router_images: int = key(2_000_000, "images that the router trains on, at most", least=1)


class Autoencoder(Table):
    """The frozen autoencoder in whose latents the models work."""
    name: str = key(
        "", "AutoencoderKL or AutoencoderTiny by hub name or folder; empty: the models see pixels")
    precision: Literal["fp32", "bf16"] = key(
        "fp32", "of encoding, where a GPU multiplies fp32 in TF32; decoding is in bf16 on a GPU")


class Text(Table):
    """How captions are read, for condition = text."""
    name: str = key(
        "words", "a frozen text encoder by hub name or folder, or several: A + B; "
        "words: an embedding of hashed words, learned inside the model")
    length: int = key(77, "words or tokens a caption, at most", least=1)
    vocab: int = key(16384, "rows of the table that words are hashed to, for name = words", least=2)
    layer: Literal["last", "penultimate"] = key(
        "last", "which layer's token features; Stable Diffusion XL takes the penultimate")
    precision: Precision = key(
        "auto", "auto: bf16 on a GPU, fp32 on a CPU; fp32 on a GPU multiplies in TF32")


class Model(Table):
    """An expert, the monolith and the student. A number other than 0 replaces the preset's."""
    preset: str = key(
        "DiT-S/2", "DiT-{S,B,L,XL}/{2,4,8}, MMDiT-3B/{2,4,8}, "
        "or tiny/2, mini/2, MMDiT-tiny/2 for a CPU")
    dim: int = key(0, "hidden width")
    depth: int = key(0, "number of blocks")
    heads: int = key(0, "attention heads")
    patch: int = key(0, "side of a patch")
    double: int = key(
        0, "blocks with streams of their own for image and text, which makes it an MMDiT")


class Router(Table):
    """The router's model. A number other than 0 replaces the preset's."""
    preset: str = key("DiT-S/4", "as in [model], but no MMDiT")
    dim: int = key(0, "hidden width")
    depth: int = key(0, "number of blocks")
    heads: int = key(0, "attention heads")
    patch: int = key(0, "side of a patch")


class Flow(Table):
    """What an expert learns: the path from data (t = 0) to noise (t = 1), and what it predicts."""
    objective: Literal["velocity", "x0", "eps"] = key("velocity", "what an expert predicts")
    path: Literal["linear", "cosine", "ddpm"] = key(
        "linear", "linear: rectified flow; cosine, ddpm: variance-preserving schedules")
    t_density: Literal["uniform", "logit-normal"] = key(
        "uniform", "density of t when an expert trains; the router's is always uniform")
    shift: float = key(
        1.0, "t' = shift t / (1 + (shift - 1) t), when an expert trains and when sampling",
        least=0.01)


class Training(Table):
    """How any model trains."""
    # how much
    steps: int = key(100_000, "optimiser steps", least=1)
    batch: int = key(
        256, "images a step of the whole ensemble: an expert takes batch / experts, "
        "the monolith and the router batch", least=1)
    micro_batch: int = key(0, "images a forward pass on each rank (0: all of the rank's at once)")

    # the optimiser
    lr: float = key(1e-4, "AdamW's learning rate")
    warmup: int = key(0, "first steps, in which the learning rate rises linearly")
    decay: int = key(0, "last steps, in which the learning rate falls linearly to zero")
    weight_decay: float = key(0.0, "AdamW's weight decay")
    grad_clip: float = key(1.0, "largest norm of the gradient (0: not clipped)")
    ema_decay: float = key(
        0.9999, "decay of the EMA weights; min(ema_decay, (1 + n) / (10 + n)) after n steps",
        most=1)
    seed: int = key(0, "seed of the initial weights, the order of the data and the noise")

    # memory and speed
    parallel: Literal["auto", "ddp", "fsdp"] = key(
        "auto", "several GPUs: ddp, each holds the whole model; fsdp, each a part of it; "
        "auto: fsdp if the whole does not fit")
    activation_checkpointing: Literal["none", "selective", "block"] = key(
        "none", "what a block forgets until the backward pass: nothing; "
        "all but matrix products and attention; everything")
    compile: Literal["auto", "yes", "no"] = key(
        "auto", "torch.compile the blocks, which takes a minute at first; auto: on a GPU")
    precision: Precision = key(
        "auto", "auto: bf16 autocast on a GPU, fp32 on a CPU; fp32 on a GPU multiplies in TF32")

    # what is written, and how often
    export: Literal["fp32", "bf16"] = key("fp32", "dtype of the exported weights")
    save_every: int = key(1000, "steps between checkpoints", least=1)
    keep_last: int = key(2, "checkpoints that are kept, the newest", least=1)
    keep_every: int = key(0, "and those of steps that are a multiple of this (0: none)")
    sample_every: int = key(
        1000, "steps between sample grids of an expert or the student (0: the last alone)")
    log_every: int = key(50, "steps between rows of the log", least=1)

    # what ends a run
    max_nonfinite: int = key(
        10, "steps in a row with a gradient that is not finite, after which training stops; "
        "each is skipped", least=1)
    timeout: int = key(
        1800, "seconds without a step after which a rank that hangs, or waits for one that does, "
        "ends the run (0: never)")


class Train(Training):
    """How a model trains: as it stands here an expert or the monolith."""
    seed_steps: int = key(
        0, "the first steps, made by one seed (--shard seed) on the router's images, from which "
        "experts and monolith go on (0: each begins with random weights)")


class TrainRouter(Training):
    """What differs from [train] when the router trains: any of its keys but seed_steps. These
    always differ.
    """
    steps: int = key(0, "optimiser steps (0: as many as cost 4% of the training FLOPs)")


class TrainStudent(Training):
    """What differs from [train] when the student trains: any of its keys but seed_steps. These
    always differ.
    """
    batch: int = key(0, "images a step (0: a quarter of [train]'s, as in the paper)")
    micro_batch: int = key(0, "images a forward pass, all of one cluster (0: batch / experts)")


class Plan(Table):
    """What --plan reckons with, which trains nothing and says what a training needs."""
    gpus: int = key(8, "number of GPUs", least=1)
    gpu: str = key(
        "H100", "their kind: B200, H200, A100, L40S, RTX 4090, ... (DEVICES in ddm/plan.py)")
    mfu: float = key(
        0.4, "share of the peak rate that training reaches (model FLOPs utilisation)", least=0.001)
    step_seconds: float = key(
        0.0, "a step time from elsewhere, to say which MFU and batch it implies (0: none)")


class Sample(Table):
    """How images are sampled; for sample.py and evaluate.py --strategy, --cfg ... for short."""
    # the solver
    steps: int = key(50, "steps of the solver", least=1)
    solver: Literal["euler", "heun", "ab2"] = key(
        "euler", "first order; second order with two forwards a step; second order with one")
    shift: float = key(
        0.0, "t' = shift t / (1 + (shift - 1) t) of the solver's times (0: as the experts trained)")

    # guidance
    cfg: float = key(4.0, "guidance scale w in v_u + w (v_c - v_u); 1: no guidance")
    cfg_low: float = key(0.0, "guidance from this t")
    cfg_high: float = key(1.0, "to this, at most 1; outside, the conditional branch alone")
    cfg_routing: Literal["shared", "own"] = key(
        "shared", "the conditional branch's experts make both branches, "
        "or each branch asks the router for its own")

    # the ensemble
    strategy: str = key(
        "top-1", "which experts make a step: full, top-N, sample-N, threshold-P, nucleus-P, "
        "once or oracle-N")
    router_temperature: float = key(1.0, "the router's logits are divided by it", least=1e-6)
    router_calibration: bool = key(
        True, "and by the temperatures that train_router.py --calibrate has fitted, if it has")
    route_every: int = key(
        1, "forwards that one answer of the router is used for (once and oracle-N keep theirs)",
        least=1)
    route_epsilon: float = key(
        0.001, "with route_every > 1: an expert with at least 1 - epsilon is kept to the end, "
        "the router not asked again (0: never); less than 1")

    # memory and speed
    resident: int = key(0, "experts on the device at most (0: all that are used)")
    precision: Precision = key(
        "auto", "of the weights; auto: bf16 on a GPU, fp32 on a CPU; "
        "fp32 on a GPU multiplies in TF32")
    compile: bool = key(False, "torch.compile the models' blocks: a minute at first, for long runs")


# in the order of config.toml and of docs/config.md
TABLES = {
    "data": Data,
    "features": Features,
    "cluster": Cluster,
    "autoencoder": Autoencoder,
    "text": Text,
    "model": Model,
    "router": Router,
    "flow": Flow,
    "train": Train,
    "train.router": TrainRouter,
    "train.student": TrainStudent,
    "plan": Plan,
    "sample": Sample,
}
# the tables that are laid over [train]
STAGES = {"train.router": "router", "train.student": "student"}


class Config(BaseModel):
    """An experiment: config.data.size. Values may be assigned; make_config makes one."""
    data: Data
    features: Features
    cluster: Cluster
    autoencoder: Autoencoder
    text: Text
    model: Model
    router: Router
    flow: Flow
    train: Train
    # stage -> key -> value, of what differs from [train]: [train.router] and [train.student]
    overrides: dict[str, dict[str, Any]]
    plan: Plan
    sample: Sample

    def stage(self, name):
        """[train] with the keys of [train.NAME] over it; name: "router" or "student"."""
        table = TABLES[f"train.{name}"]
        values = {key: value for key, value in self.train if key in table.model_fields}
        return table(**values | self.overrides[name])


def own_keys(table):
    """A table's keys; of [train.router] and [train.student] those with own defaults."""
    if table in STAGES:
        return list(inspect.get_annotations(TABLES[table]))
    return list(TABLES[table].model_fields)


def choices(table, key):
    """The values that a key may have, for a key that has a choice; else ()."""
    annotation = TABLES[table].model_fields[key].annotation
    return get_args(annotation)


def _limits(field):
    """-> (least, most) of a number's range, None where there is none."""
    least = None
    most = None
    # pydantic keeps each bound of a field as an object of its own
    for bound in field.metadata:
        least = getattr(bound, "ge", least)
        most = getattr(bound, "le", most)
    return least, most


def _all_keys():
    names = []
    for table, table_class in TABLES.items():
        names += [f"{table}.{key}" for key in table_class.model_fields]
    return names


# ---- one value, and what is wrong with it --------------------------------------------------------

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def _nearest(word, words):
    """'; did you mean ...?' for the nearest of `words`, or nothing where none is near."""
    # for --lr it is a key of that name, however long its table's: --train.lr
    key = word.lstrip("-")
    same_key = [known for known in words if known.endswith(f".{key}")]

    cutoff = 0 if same_key else 0.5
    close = difflib.get_close_matches(word, same_key or words, n=1, cutoff=cutoff)
    if not close:
        return ""
    return f"; did you mean {close[0]}?"


def _shown(value):
    """repr; Python refuses that of a number of thousands of digits."""
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _mistake(name, value, field, kind):
    """One line on a value that pydantic refused. kind: of its error, as "less_than_equal"."""
    least, most = _limits(field)
    said = f"{name} = {_shown(value)}"
    options = get_args(field.annotation)

    # of a choice: all there is
    if options:
        allowed = ", ".join(repr(option) for option in options)
        return f"{said} is not one of {allowed}"
    if kind in ("greater_than_equal", "finite_number"):
        return f"{said} must be a number of at least {least}"
    if kind == "less_than_equal":
        return f"{said} is a share, which is at most {most}"
    return f"{said} is not {KINDS[field.annotation]}"


def check(name, value):
    """The value of the key "table.key", as its type (1 -> 1.0). UserError: what it may be."""
    table, _, key = name.rpartition(".")
    field = TABLES[table].model_fields[key]

    try:
        # the table's other keys have their defaults, so an error is of this one
        checked = TABLES[table].model_validate({key: value})
    except ValidationError as error:
        kind = error.errors()[0]["type"]
        raise UserError(_mistake(name, value, field, kind)) from None
    return getattr(checked, key)


def _from_flag(name, text):
    """The text behind --table.key -> its value, unchecked. A number may be a percentage: 1%."""
    table, _, key = name.rpartition(".")
    kind = TABLES[table].model_fields[key].annotation

    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is float and text.endswith("%"):
            return float(text[:-1]) / 100
        if kind in (int, float):
            return kind(text)
    except (KeyError, ValueError):
        raise UserError(f"{name} = {text!r} is not {KINDS[kind]}") from None

    # a string, or one of a choice
    return text


# ---- config.toml ---------------------------------------------------------------------------------

def read_toml(path):
    """-> {"table.key": value} of a config file. UserError for an unknown key or a wrong value."""
    try:
        tables = tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        # no TOML, a number of too many digits, nested to death
        raise UserError(f"cannot read config {path}: {error}") from None

    # filled on the way through tables within tables
    values = {}
    _read_table(path, tables, "", values)
    return values


def _read_table(path, entries, table, values):
    """Adds the keys of a table of the file `path`, and of the tables within it, to `values`."""
    known = TABLES[table].model_fields if table else {}
    for key, value in entries.items():
        name = f"{table}.{key}" if table else key

        if isinstance(value, dict):
            if name not in TABLES:
                raise UserError(f"{path}: unknown table [{name}]{_nearest(name, TABLES)}")
            # TOML has [train.router] as a table within [train]
            _read_table(path, value, name, values)
        elif key not in known:
            raise UserError(f"{path}: unknown key {name}{_nearest(name, _all_keys())}")
        else:
            values[name] = check(name, value)


def make_config(*layers):
    """The defaults, each layer of {"table.key": value} over the ones before -> Config."""
    tables = {}
    for table in TABLES:
        tables[table] = {}

    # the router's number of steps is never [train]'s, unless a layer says so
    for table in STAGES:
        for key in own_keys(table):
            tables[table][key] = TABLES[table].model_fields[key].default

    for layer in layers:
        for name, value in layer.items():
            table, _, key = name.rpartition(".")
            tables[table][key] = check(name, value)

    # what is left out here has its default in the table's class
    overrides = {}
    for table, stage in STAGES.items():
        overrides[stage] = tables.pop(table)
    return Config(overrides=overrides, **tables)


def _entries(config, table):
    """{key: value} of a table; of [train.router] and [train.student] what is set there."""
    if table in STAGES:
        return config.overrides[STAGES[table]]
    return dict(getattr(config, table))


def flat(config):
    """A Config as {"table.key": value}."""
    values = {}
    for table in TABLES:
        for key, value in _entries(config, table).items():
            values[f"{table}.{key}"] = value
    return values


def write_toml(config, path):
    """Writes a Config as a file that read_toml reads; keys with their defaults stand there, too."""
    lines = []
    for table in TABLES:
        lines.append(f"[{table}]")
        for key, value in _entries(config, table).items():
            # TOML spells these types as JSON does
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
        lines.append("")
    write_text(path, "\n".join(lines))


def differences(old, new):
    """The keys in which two {"table.key": value} differ, as 'data.size 32 / 64, ...'."""
    differing = []
    for name in sorted({*old, *new}):
        before = repr(old[name]) if name in old else "missing"
        after = repr(new[name]) if name in new else "missing"
        # of repr, so that 1 and 1.0 differ and nan does not
        if before != after:
            differing.append(f"{name} {before} / {after}")
    return ", ".join(differing)


def load_run(run_dir, given, stage="", path=""):
    """The config that cluster.py wrote into the run, or that of the file `path`, `given` over it.

    stage: "router" or "student"; what `given` has of [train] goes over [train.<stage>] then.
    UserError if there is no such run.
    """
    if not path:
        path = os.path.join(run_dir, "config.toml")
        if not os.path.exists(path):
            raise UserError(f"no run at {run_dir} ({path} is missing): "
                            f"make it with cluster.py --run-dir {run_dir} --data ...")

    # the router's --train.lr is its own, not the experts'
    flags = {}
    for name, value in given.items():
        table, _, key = name.rpartition(".")
        if stage and table == "train" and key in TABLES[f"train.{stage}"].model_fields:
            name = f"train.{stage}.{key}"
        flags[name] = value
    return make_config(read_toml(path), flags)


# ---- the command line ----------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, with a mistake as a UserError and no flags cut short."""

    def __init__(self, doc, **options):
        # resolve: a script may show a key in its --help by adding the flag once more
        super().__init__(description=doc, allow_abbrev=False, conflict_handler="resolve",
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        # argparse would print its usage and exit
        raise UserError(message)


def make_parser(doc, short_table=""):
    """A stage's parser with --run-dir, --device and, not shown by --help, a flag for each key.

    doc: the script's docstring. short_table: "sample" gives its keys short flags as well, as
    --route-every for --sample.route_every. A flag of the script's own whose dest is "table.key"
    sets that key; one that is named --table.key shows it in --help.
    """
    epilog = "any key of the config is --table.key VALUE: docs/config.md"
    if short_table:
        short = " ".join(_short_flag(key) for key in TABLES[short_table].model_fields)
        short = textwrap.fill(f"[{short_table}]'s keys also for short: {short}", width=80,
                              break_on_hyphens=False)
        epilog = f"{short}\n{epilog}"

    parser = Parser(doc, epilog=epilog)
    parser.add_argument("--run-dir", default="runs/ddm", metavar="DIR",
                        help="the run directory (default: runs/ddm)")
    parser.add_argument("--device", default="",
                        help="cpu | cuda | cuda:1 (default: the best there is)")

    # not in --help, where they would hide the script's own
    for table, table_class in TABLES.items():
        for key, field in table_class.model_fields.items():
            names = [f"--{table}.{key}"]
            if table == short_table:
                names.append(_short_flag(key))

            # a switch may stand alone
            alone = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
            parser.add_argument(*names, dest=f"{table}.{key}", default=argparse.SUPPRESS,
                                help=argparse.SUPPRESS, **alone)
    return parser


def make_training_parser(doc):
    """make_parser for a training stage, with --plan, --verify, --max-bad and --profile."""
    parser = make_parser(doc)
    parser.add_argument("--plan", nargs="?", const="", metavar="CONFIG",
                        help="train nothing: say what this training needs of time and memory; "
                        "with a config file, before there is a run")
    parser.add_argument("--verify", action="store_true",
                        help="before the first step, compare the shards' SHA-256 with their "
                        "manifest's (their names, sizes and clustering always are)")
    parser.add_argument("--max-bad", dest="data.max_bad", metavar="SHARE",
                        help="the same as --data.max_bad: 0.01 or 1%%")
    parser.add_argument("--profile", action="store_true",
                        help="write torch's trace of three steps to RUN/logs/NAME.trace.json")
    return parser


def _short_flag(key):
    return f"--{key.replace('_', '-')}"


def parse(parser, argv=None):
    """-> (args, {"table.key": value} of the config's flags). UserError names the nearest flag."""
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UserError(f"unknown argument {flag}{_nearest(flag, parser._option_string_actions)}")

    # flags of keys go into the config, the script's own stay in args
    given = {}
    # a copy: the script's Namespace loses entries in the loop
    for name, text in list(vars(args).items()):
        if "." not in name:
            continue
        delattr(args, name)

        # a flag of the script's own that was not given is None
        if text is not None:
            given[name] = check(name, _from_flag(name, text))
    return args, given


# ---- what a config means together ----------------------------------------------------------------

def model_config(config, table, space, clusters=0):
    """The ModelConfig that [model] or [router] describes, in a Space. clusters: K, of a router.

    UserError for a preset that there is not, or a shape that cannot be.
    """
    settings = dict(getattr(config, table))
    preset = settings.pop("preset")
    if preset and preset not in PRESETS:
        raise UserError(f"{table}.preset = {preset!r} is not one of {', '.join(PRESETS)}")

    # the preset's, and what is given over it
    shape = {"double": 0} | PRESETS.get(preset, {})
    for key, value in settings.items():
        if value:
            shape[key] = value

    unset = sorted(settings.keys() - shape.keys())
    if unset:
        needed = ", ".join(f"{table}.{key}" for key in unset)
        raise UserError(f"{table} has no preset, so it needs {needed}, too")

    # what the condition adds
    if config.data.condition == "class":
        shape["classes"] = config.data.classes
    if config.data.condition == "text":
        shape["text_dim"] = space.text_dim
        # words have numbers of the model's own table where no encoder makes token features
        shape["vocab"] = 0 if space.text_dim else config.text.vocab
        shape["length"] = config.text.length

    try:
        return ModelConfig(size=space.size, channels=space.channels, clusters=clusters,
                           condition=config.data.condition, **shape)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_strategy(text):
    """flow.parse_strategy with a UserError."""
    try:
        return flow.parse_strategy(text)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_sample(sample):
    """UserError if [sample] has values that cannot be together."""
    if not sample.cfg_low <= sample.cfg_high <= 1:
        raise UserError(f"guidance from cfg_low {sample.cfg_low} to cfg_high {sample.cfg_high} "
                        f"must be 0 <= cfg_low <= cfg_high <= 1")
    if sample.route_epsilon >= 1:
        raise UserError(f"route_epsilon {sample.route_epsilon} must be less than 1")
    check_strategy(sample.strategy)


def check_seed(train):
    """UserError if the seed leaves the experts no step; a warning where their rate is another."""
    if train.seed_steps >= train.steps:
        raise UserError(f"train.seed_steps = {train.seed_steps} must be less than train.steps = "
                        f"{train.steps}: the experts make the steps between")
    constant = max(0, train.steps - train.decay)
    if train.seed_steps > constant and os.environ.get("RANK", "0") == "0":
        print(f"warning: the learning rate falls over the last train.decay = {train.decay} of "
              f"{train.steps} steps, and train.seed_steps = {train.seed_steps} reaches into them: "
              f"the seed's rate is constant, so the experts' begins lower than it ended",
              file=sys.stderr)


def check_config(config, space):
    """UserError for what a later stage would refuse: found out before the work, not after days."""
    experts = config.cluster.experts
    train = config.train
    if train.batch % experts:
        raise UserError(f"train.batch = {train.batch} is the whole ensemble's and must be a "
                        f"multiple of cluster.experts = {experts}, which share it")

    check_seed(train)
    # what cannot be built is refused with it
    model_config(config, "model", space)
    model_config(config, "router", space, clusters=experts)

    student = config.stage("student")
    # as distill.py reads it
    batch = student.batch or max(1, train.batch // 4)
    if student.micro_batch and batch % student.micro_batch:
        raise UserError(f"the student's batch of {batch} must be a multiple of "
                        f"train.student.micro_batch = {student.micro_batch}")

    check_sample(config.sample)
    strategy, number = check_strategy(config.sample.strategy)

    # the oracle's number is an expert's, the others' are counts
    most = experts - 1 if strategy == "oracle" else experts
    if strategy in ("top", "sample", "oracle") and number > most:
        raise UserError(f"sample.strategy = {config.sample.strategy!r}: there are cluster.experts "
                        f"= {experts} experts, so the number is at most {most}")


# ---- docs/config.md ------------------------------------------------------------------------------

INTRODUCTION = """\
# The config

<!-- made by `python -m ddm.config > docs/config.md` from ddm/config.py; do not edit -->

An experiment is one TOML file, as those in [configs/](../configs). A key that it does not name has
its default. `cluster.py --config FILE` writes all of it to `RUN/config.toml`, for the later stages.

On the command line of any script a key is `--table.key VALUE`, which goes over the file's:
`--train.lr 2e-4`. A number may be a percentage, and a key that is true or false may stand alone:
`--data.max_bad 1%`, `--sample.compile`. For train_router.py and distill.py `--train.lr` means
theirs, `--train.router.lr` or `--train.student.lr`.
"""


def _allowed(field):
    """The cell that says what a key may be."""
    options = get_args(field.annotation)
    if options:
        return ", ".join(f"`{option}`" for option in options)

    kind = KINDS[field.annotation].removeprefix("a ")
    least, most = _limits(field)
    if least is None:
        return kind
    if most is None:
        return f"{kind} from {least}"
    return f"{kind} from {least} to {most}"


def reference():
    """docs/config.md: a heading, the class's docstring and a row for each key, of each table."""
    lines = [INTRODUCTION]
    for table, table_class in TABLES.items():
        lines += [f"## [{table}]", "", inspect.getdoc(table_class), ""]
        lines += ["| key | default | allowed | meaning |", "|---|---|---|---|"]

        # [train.router] has all of [train]'s, which need no second description
        for key in own_keys(table):
            field = table_class.model_fields[key]
            default = json.dumps(field.default)
            # a bar would end the cell
            meaning = field.description.replace("|", "\\|")
            lines.append(f"| `{key}` | `{default}` | {_allowed(field)} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference(), end="")
