"""Stage 5: numbers and tables. How good are an ensemble, its monolith and its student?

    python evaluate.py --run-dir runs/demo --data 'data/shapes-held-out/*.tar' --samples 1000
    python evaluate.py --run-dir runs/laion --data 'data/val/*.tar' \\
        --features facebook/dinov2-large --clip openai/clip-vit-large-patch14

    # the paper's table 1, and its figure 4
    python evaluate.py --run-dir runs/laion --data 'data/val/*.tar' --table strategies
    python evaluate.py --run-dir runs/k4 --runs runs/k8 runs/k16 --data 'data/val/*.tar' \\
        --table experts

    # shared out over eight GPUs
    torchrun --nproc_per_node=8 evaluate.py --run-dir runs/laion --data 'data/val/*.tar'

reads   the reference tars, images that nobody trained on; of RUN config.toml,
        clusters.safetensors, logs/*.csv and whatever models there are: experts/*.safetensors,
        router.safetensors, experts/all.safetensors, student.safetensors
writes  RUN/evaluation/TABLE.json and TABLE.md (TABLE: models, strategies or experts; --out DIR:
        elsewhere); with --npz the samples of each row, ROW.npz (arr_0: uint8 [N,S,S,3]; arr_1:
        classes); with --table experts a figure; reference-*.safetensors, kept for the next call

Sample i of each row starts from the noise of (seed, i) and has the condition of the same reference
image, so that rows differ by their models alone.
"""
import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import flow
from data import TarDataset, check_condition, mix, permute, subset
from ddm import encoders
from ddm.config import Config, Sample, check_sample, load_run, make_config, make_parser, parse
from ddm.ensemble import DENSE, Ensemble, beginnings, open_space
from ddm.errors import UserError, script
from ddm.features import (
    KEPT,
    cluster_space,
    distance_space,
    name_reference,
    open_reference,
    read_reference,
)
from ddm.metrics import Statistics, compare, explain, router_quality, summarise_losses
from ddm.process import collect, gather, on_rank_0, progress, start, sum_over_ranks
from ddm.report import Output, experts_figure, ledger
from ddm.run import read_clusters
from ddm.tars import find_tars
from ddm.text import normalise_text
from ddm.validation import encode, validate

# the ensemble's strategies that have a validation loss: any that draws nothing, and
# oracle: the expert of the image's own cluster
LOSSES = ["full", "top-1", "top-2", "threshold-0.1", "oracle"]

# the paper's table 1: what a row is called, and what it changes of [sample]
TABLE_1 = {
    "full":           {"strategy": "full"},
    "top-1":          {"strategy": "top-1"},
    "top-2":          {"strategy": "top-2"},
    "top-3":          {"strategy": "top-3"},
    "sample-1":       {"strategy": "sample-1"},
    "sample-2":       {"strategy": "sample-2"},
    "sample-3":       {"strategy": "sample-3"},
    "threshold-0.01": {"strategy": "threshold-0.01"},
    "threshold-0.05": {"strategy": "threshold-0.05"},
    "threshold-0.1":  {"strategy": "threshold-0.1"},
    "nucleus-0.9, temperature 0.5": {"strategy": "nucleus-0.9", "router_temperature": 0.5},
    "nucleus-0.9, temperature 1.0": {"strategy": "nucleus-0.9", "router_temperature": 1.0},
    "nucleus-0.9, temperature 2.0": {"strategy": "nucleus-0.9", "router_temperature": 2.0},
    "once":           {"strategy": "once"},
}


@dataclass
class Run:
    """A run that is evaluated: all that can be known of it before any work."""
    dir: str
    config: Config
    fingerprint: str
    # model ("ensemble", "monolith", "student") -> its networks, loaded when first needed
    teams: dict[str, Ensemble]
    # model -> the codec.Space that it works in
    spaces: dict
    # features.cluster_space, or None where clusters are random, which no image tells
    clusters: SimpleNamespace | None


@dataclass
class ClipScorer:
    """encoders.clip_scorer: score(prepared images, captions) -> [n]."""
    prepare: Callable
    score: Callable
    info: dict


@dataclass
class Measures:
    """What samples are measured by."""
    # features.distance_space
    spaces: list
    clip: ClipScorer | None


@dataclass
class Reference:
    """The images of --data that one run is measured against."""
    data: TarDataset
    # of each of Measures.spaces {mean, covariance, kept}
    statistics: list[dict]
    # the cluster of each image [n], -1 where it cannot be used
    labels: torch.Tensor
    # the number of the image whose condition sample i has
    order: list[int]
    # the numbers of the images of the validation loss
    for_loss: list[int]
    # what the results say of it
    about: dict

    def condition(self, i):
        """The caption or the class of sample i."""
        members = self.data.members(self.order[i])
        return check_condition(members, self.data.condition, self.data.classes)

    def classes(self):
        """The classes of all samples, None where conditions are none."""
        if self.data.condition != "class":
            return None
        return [self.condition(i) for i in range(len(self.order))]


@dataclass
class Row:
    """A row of the table: samples of one model under one strategy."""
    name: str
    settings: Sample


# ---- the command line ----------------------------------------------------------------------------

def parser():
    found = make_parser(__doc__, "sample")
    group = found.add_argument_group("what is measured")
    group.add_argument("--data", nargs="+", required=True, metavar="GLOB",
                       help="the reference tars")
    group.add_argument("--table", choices=["models", "strategies", "experts"], default="models",
                       help="models (default): each model of the run; strategies: every strategy, "
                       "the paper's table 1; experts: several runs, its figure 4")
    group.add_argument("--models", nargs="+", choices=["ensemble", *DENSE], metavar="M",
                       help=f"ensemble {' '.join(DENSE)} (default: those there are)")
    group.add_argument("--runs", nargs="+", default=[], metavar="DIR",
                       help="with --table experts: the runs beside --run-dir")

    group.add_argument("--samples", type=int, default=10_000, metavar="N",
                       help="images to sample for each row (default: 10000; 0: none)")
    group.add_argument("--features", nargs="+", default=[], metavar="NAME",
                       help="feature spaces of Frechet distance, precision and recall: DINOv2, "
                       "CLIP or ResNet by hub name or folder, or pixels "
                       "(default: what the run was clustered by)")
    group.add_argument("--clip", default="", metavar="NAME",
                       help="a CLIP to score samples against their prompts with")
    group.add_argument("--npz", action="store_true", help="write the samples of each row, too")

    group.add_argument("--loss-images", type=int, default=2000, metavar="N",
                       help="reference images of the validation loss, at most "
                       "(default: 2000; 0: none)")
    group.add_argument("--loss-precision", choices=["fp32", "tf32", "bf16"], default="fp32",
                       help="of the validation loss and the router's answers (default: fp32, also "
                       "on a GPU; samples are drawn in --precision)")

    group.add_argument("--seed", type=int, default=0,
                       help="of samples and validation noise (default: 0)")
    group.add_argument("--batch", type=int, default=64, metavar="B",
                       help="images at once (default: 64)")
    group.add_argument("--out", default="", metavar="DIR", help="default: RUN/evaluation")
    return found


def read_arguments():
    """-> (args, {"table.key": value} of the config's flags). UserError."""
    args, given = parse(parser())
    if args.samples < 0 or args.samples == 1:
        raise UserError(f"--samples {args.samples} must be 0, or at least 2")
    if args.loss_images < 0:
        raise UserError(f"--loss-images {args.loss_images} must be at least 0")
    if args.batch < 1:
        raise UserError(f"--batch {args.batch} must be at least 1")
    if not 0 <= args.seed < 2 ** 63:
        raise UserError(f"--seed {args.seed} must be from 0 to 2^63 - 1")

    if args.table == "experts" and not args.runs:
        raise UserError("--table experts compares several runs: --run-dir DIR --runs DIR ...")
    if args.runs and args.table != "experts":
        raise UserError(f"--runs {args.runs[0]} needs --table experts, which compares several runs")
    if args.runs and args.npz:
        raise UserError("--npz with --table experts: the runs' samples would have the same names; "
                        "evaluate each run alone")
    return args, given


# ---- before the work: what is there, and whether it fits together --------------------------------

def open_run(run_dir, args, given, ranks):
    """-> Run. UserError for whatever does not fit together, or cannot be measured."""
    config = load_run(run_dir, given)
    clustering = read_clusters(run_dir)
    models = find_models(run_dir, config, args.models)

    # without a condition there is nothing to guide by
    if config.data.condition == "none":
        config.sample.cfg = 1.0
    if args.table == "strategies":
        if "ensemble" not in models:
            raise UserError(f"--table strategies compares the ensemble's; of {run_dir} only "
                            f"{' '.join(models)} is evaluated")
        # each row has its own
        config.sample.strategy = "full"
    check_sample(config.sample)
    if args.clip and config.data.condition != "text":
        raise UserError(f"--clip scores prompts; {run_dir} has condition = {config.data.condition}")

    # where the pretrained networks are now, if not where they were in training
    places = {}
    for name, value in given.items():
        if name.endswith(".name"):
            places[name] = value

    teams = {}
    spaces = {}
    for model in models:
        only = "" if model == "ensemble" else model
        team = Ensemble(run_dir, ranks.device, only=only, resident=config.sample.resident,
                        precision=config.sample.precision, compile=config.sample.compile)
        space = open_space(team, config, places, ranks.device)
        check_fits(team, space, run_dir, config, clustering)
        if model == "ensemble":
            check_ensemble(team, run_dir, config)
        teams[model] = team
        spaces[model] = space

    clusters = None
    if config.cluster.assign != "random":
        clusters = cluster_space(run_dir, config, clustering, ranks.device)
    return Run(run_dir, config, clustering["fingerprint"], teams=teams, spaces=spaces,
               clusters=clusters)


def find_models(run_dir, config, wanted):
    """The models to evaluate: those wanted, or those there are. UserError if there is none."""
    if wanted:
        # each once
        return list(dict.fromkeys(wanted))

    models = []
    for k in range(config.cluster.experts):
        if os.path.exists(os.path.join(run_dir, "experts", f"{k}.safetensors")):
            models.append("ensemble")
            break
    for name, (path, *_) in DENSE.items():
        if os.path.exists(os.path.join(run_dir, path)):
            models.append(name)
    if not models:
        raise UserError(f"{run_dir} has neither experts nor a monolith nor a student: "
                        f"train them first")
    return models


def check_fits(team, space, run_dir, config, clustering):
    """UserError if a model is of another clustering, or trained with other data than the run's."""
    theirs = team.info["fingerprint"]
    ours = clustering["fingerprint"]
    if theirs != ours:
        raise UserError(f"{team.path} and {run_dir}/clusters.safetensors do not fit together: "
                        f"clustering {theirs} / {ours}")

    trained = {"size": space.config.data.size, "condition": team.config.condition}
    if config.data.condition == "class":
        trained["classes"] = team.config.classes
    for key, value in trained.items():
        wanted = getattr(config.data, key)
        if value != wanted:
            raise UserError(f"{team.path} was trained with data.{key} {value}, "
                            f"{run_dir}/config.toml says {wanted}")

    # experts of different shifts cannot be sampled from together
    team.shift(config.sample)


def check_ensemble(team, run_dir, config):
    """UserError if there is no router to choose, or [sample] asks for what is not there."""
    unrouted = len(team.paths) > 1 and not team.routed
    if unrouted or team.K != config.cluster.experts:
        raise UserError(f"{run_dir}/router.safetensors is missing: train it with train_router.py "
                        f"--run-dir {run_dir}, or choose --models {' '.join(DENSE)}")
    team.check(config.sample)


def open_measures(args, run, ranks):
    """The networks that measure, by default that which the run was clustered by -> Measures."""
    # the validation loss needs none
    if not args.samples:
        return Measures(spaces=[], clip=None)

    settings = [run.config.features]
    if args.features:
        settings = [make_config({"features.name": name}).features for name in args.features]
    spaces = [distance_space(each, ranks.device) for each in settings]

    # the table has a column of that name
    names = {space.name for space in spaces}
    if len(names) < len(spaces):
        raise UserError(f"--features {' '.join(args.features)}: two of them are called the same")

    clip = None
    if args.clip:
        clip = ClipScorer(*encoders.clip_scorer(args.clip, ranks.device))
    return Measures(spaces, clip)


# ---- one run -------------------------------------------------------------------------------------

def evaluate_run(run, measures, args, *, reference_name, output, ranks):
    """Measures all models of a run, and adds the result to `output`."""
    reference = prepare_reference(run, measures, args, name=reference_name, folder=output.folder,
                                  ranks=ranks)
    experts = run.config.cluster.experts

    # written as it stands after each row, so that a call that is stopped leaves what it has
    result = {
        "run": run.dir,
        "experts": experts,
        "fingerprint": run.fingerprint,
        "reference": reference.about,
        "rows": [],
    }
    result["ledger"], result["equal_compute"] = ledger(run.dir, experts)
    output.results.append(result)

    losses = {}
    # the ensemble's Validation, once there is one
    routed = None
    for model in list(run.teams):
        # popped, so that its memory goes with it
        team = run.teams.pop(model)
        space = run.spaces.pop(model)

        rows = table_rows(model, args.table, run, team) if args.samples else []
        for row in rows:
            measured, images = evaluate_row(row, team, space, run=run, reference=reference,
                                            measures=measures, args=args, ranks=ranks)
            strategy = row.name if model == "ensemble" else ""
            result["rows"].append({"model": model, "strategy": strategy, **measured})
            if ranks.rank == 0:
                if args.npz:
                    output.save_images(file_name(model, row), images, reference.classes())
                output.save()

        if reference.for_loss:
            found, precision = evaluate_loss(model, team, space, run=run, reference=reference,
                                             args=args, ranks=ranks)
            losses |= name_losses(model, found)
            result["loss"] = {
                "images": len(reference.for_loss),
                "seed": args.seed,
                "reference": reference.about["name"],
                "precision": precision,
                "models": summarise_losses(losses),
            }
            if team.routed:
                routed = found
                result["calibration"] = calibration_of(team, run, reference, ranks)
            if routed:
                result |= why(routed, losses.get("monolith"), run, reference)
            if ranks.rank == 0:
                output.save()
    if ranks.rank == 0:
        output.save()


def file_name(model, row):
    """What the samples of a row are called."""
    if model != "ensemble":
        return model
    return f"ensemble-{row.name.replace(', temperature ', '-t')}"


def prepare_reference(run, measures, args, *, name, folder, ranks):
    """Reads --data as a run's models need it, or what an earlier call has kept -> Reference."""
    settings = run.config.data
    data = open_reference(args.data, settings.size, settings.condition, settings.classes)
    statistics, clusters = read_reference(data, measures.spaces, run.clusters, folder=folder,
                                          batch=args.batch, ranks=ranks)
    labels, labels_of_squares = clusters
    usable = (labels >= 0).nonzero().flatten()
    n = len(usable)
    if n < len(data) and ranks.rank == 0:
        print(f"{len(data) - n} of {len(data)} images of --data cannot be used: no condition, "
              f"or undecodable")

    about = {
        "name": f"{name}, {data.size} px",
        "tars": [os.path.basename(path) for path in data.tars],
        "images": n,
        "unusable": len(data) - n,
        "size": data.size,
        "features": {space.name: space.info for space in measures.spaces},
    }
    if measures.clip:
        about["clip"] = measures.clip.info
    if run.clusters:
        # of the squares, as samples are
        counts = torch.bincount(labels_of_squares[usable], minlength=run.config.cluster.experts)
        about["cluster_shares"] = (counts / n).tolist()

    # by a permutation, so that each image comes once before any comes again
    order = []
    for i in range(args.samples):
        place = permute(i % n, n, args.seed, i // n)
        order.append(int(usable[place]))
    for_loss = usable[torch.from_numpy(subset(n, args.loss_images, args.seed, 4))].tolist()
    return Reference(data, statistics, labels, order=order, for_loss=for_loss, about=about)


def table_rows(model, table, run, team):
    """The rows of one model -> list of Row."""
    settings = run.config.sample
    if model != "ensemble":
        return [Row(model, settings.model_copy(update={"strategy": "full"}))]
    if table != "strategies":
        return [Row(settings.strategy, settings)]

    rows = []
    if run.clusters and not team.missing:
        rows.append(Row("oracle", settings))
    for name, changes in TABLE_1.items():
        if has_experts_for(changes["strategy"], team.K):
            rows.append(Row(name, settings.model_copy(update=changes)))
    return rows


def has_experts_for(strategy, K):
    """Whether there are as many experts as a strategy of the lists above asks for."""
    name, number = flow.parse_strategy(strategy)
    return name not in ("top", "sample") or number <= K


# ---- samples -------------------------------------------------------------------------------------

def evaluate_row(row, team, space, *, run, reference, measures, args, ranks):
    """Draws the samples of a row and measures them -> (a dict for the table, the images).

    images: with --npz on rank 0, uint8 [N,S,S,3]; else None.
    """
    # a team counts its forwards from the start
    flops_before = team.flops()
    samples = sample_images(row, team, space, reference=reference, args=args, ranks=ranks)
    measured, images = measure(samples, run, reference, measures=measures, keep=args.npz)
    flops = torch.tensor(float(team.flops() - flops_before), dtype=torch.float64)
    flops = sum_over_ranks(flops).item()

    sampler = f"{row.settings.solver} {row.settings.steps} steps"
    if run.config.data.condition != "none":
        sampler += f", guidance {row.settings.cfg:g}"
    return {
        "missing": team.missing,
        "gflops_per_image": flops / args.samples / 1e9,
        **measured,
        "sampler": sampler,
        "settings": dict(row.settings) | {"precision": team.precision},
        "shift": team.shift(row.settings),
        "seed": args.seed,
        "reference": reference.about["name"],
    }, images


def sample_images(row, team, space, *, reference, args, ranks):
    """Yields (numbers of samples, images uint8 [B,S,S,3]) of this rank's share of a row."""
    settings = row.settings
    times = flow.time_grid(settings.steps, team.shift(settings))
    calls = flow.evaluations(settings.steps, settings.solver)
    shape = (team.config.channels, team.config.size, team.config.size)
    # by the cluster of the image whose condition a sample has
    oracle = reference.labels[reference.order] if row.name == "oracle" else None

    mine = range(ranks.rank, args.samples, ranks.world)
    bar = progress(desc=f"samples, {row.name}", total=len(mine), unit=" images")
    for first in range(0, len(mine), args.batch):
        numbers = list(mine[first:first + args.batch])
        seeds = [mix(args.seed, i) for i in numbers]
        noise, u = beginnings(seeds, shape, calls, team.K)            # [B,C,h,w], [B,calls,K]

        conditions = [reference.condition(i) for i in numbers]
        c = encode(conditions, reference.data.condition, space, ranks.device)
        labels = None if oracle is None else oracle[numbers].to(ranks.device)
        velocity = team.velocity(settings, c, u=u.to(ranks.device), labels=labels)

        # the last of the solver's states is kept
        for x_t in flow.integrate(velocity, noise.to(ranks.device), times, settings.solver):
            x_0 = x_t
        yield numbers, space.images(x_0).cpu().numpy()
        bar.update(len(numbers))
    bar.close()


def measure(samples, run, reference, *, measures, keep):
    """What can be said of the samples that sample_images() yields on each rank.

    -> (a dict of numbers; the images [N,S,S,3], on rank 0 and if keep, else None)
    """
    count = len(reference.order)
    K = run.config.cluster.experts
    sums = [Statistics(range(min(count, KEPT))) for _ in measures.spaces]
    in_cluster = torch.zeros(K, dtype=torch.int64)
    scores = torch.zeros((), dtype=torch.float64)
    kept = {}

    # this rank's share
    for numbers, arrays in samples:
        images = list(map(Image.fromarray, arrays))

        for space, sum_of_space in zip(measures.spaces, sums, strict=True):
            prepared = list(map(space.prepare, images))
            sum_of_space.add(numbers, space.features(prepared))
        if run.clusters:
            prepared = list(map(run.clusters.prepare, images))
            in_cluster += torch.bincount(run.clusters.assign(prepared), minlength=K)
        if measures.clip:
            prepared = list(map(measures.clip.prepare, images))
            captions = [normalise_text(reference.condition(i)) for i in numbers]
            scores += measures.clip.score(prepared, captions).double().sum()
        if keep:
            kept.update(zip(numbers, arrays, strict=True))

    # all ranks' shares together
    row = {"samples": count}
    for space, sum_of_space, real in zip(measures.spaces, sums, reference.statistics, strict=True):
        row[space.name] = compare(real, sum_of_space.close())
    if run.clusters:
        row["cluster_shares"] = (sum_over_ranks(in_cluster) / count).tolist()
    if measures.clip:
        row["clip_score"] = (sum_over_ranks(scores) / count).item()
    return row, collect_images(kept, count) if keep else None


def collect_images(kept, count):
    """{number: image} of each rank -> all of them [N,S,S,3] in their order, None but on rank 0."""
    parts = collect(kept)
    if parts is None:
        return None

    of_all = {}
    for part in parts:
        of_all |= part
    return np.stack([of_all[i] for i in range(count)])


# ---- the validation loss -------------------------------------------------------------------------

def loss_strategies(experts, knows_clusters):
    """Those of LOSSES that so many experts allow: "oracle" asks for each image's own."""
    strategies = []
    for strategy in LOSSES:
        if strategy == "oracle":
            possible = knows_clusters
        else:
            possible = has_experts_for(strategy, experts)
        if possible:
            strategies.append(strategy)
    return strategies


def evaluate_loss(model, team, space, *, run, reference, args, ranks):
    """-> (Validation, the name of the precision)."""
    # whether an image has an expert of its own that is there
    knows_clusters = run.clusters is not None and not team.missing
    strategies = ["full"]
    if model == "ensemble":
        strategies = loss_strategies(team.K, knows_clusters)

    # differences of a thousandth are read from the loss: fp32 unless asked otherwise, whatever
    # the samples are drawn in
    weights = "fp32" if args.loss_precision == "tf32" else args.loss_precision
    exact = team.in_precision(weights)
    # on a GPU fp32 numbers are multiplied in TF32 elsewhere
    multiplied = contextlib.nullcontext()
    if args.loss_precision != "tf32":
        multiplied = encoders.exact_products()
    with multiplied:
        found = validate(exact, strategies, space, data=reference.data,
                         numbers=reference.for_loss, labels=reference.labels, seed=args.seed,
                         batch=args.batch, ranks=ranks,
                         calibrated=run.config.sample.router_calibration)
    precision = "fp32" if args.loss_precision == "fp32" else exact.precision
    return found, precision


def name_losses(model, found):
    """{name in the table: loss [n,BINS]} of a model's Validation."""
    if model != "ensemble":
        return {model: found.losses["full"]}
    return {f"ensemble, {strategy}": loss for strategy, loss in found.losses.items()}


def calibration_of(team, run, reference, ranks):
    """What the router's file says of its temperatures, None where none are used. Warns if they
    were fitted to the images that are measured here.
    """
    if team.temperatures is None or not run.config.sample.router_calibration:
        return None
    about = team.router_info["calibration"]
    name = about["reference"]
    if reference.about["name"].startswith(name) and ranks.rank == 0:
        print(f"warning: the router of {run.dir} was calibrated on these images, {name}: measure "
              f"it on others, or give --router-calibration false", file=sys.stderr)
    return about


def why(found, monolith, run, reference):
    """Why the ensemble's loss is what it is -> {"why": ...}, and {"router": ...} where images tell
    their clusters. monolith: its loss [n,BINS], None without one.
    """
    # an image's own expert may be missing
    if run.clusters is None or found.experts.isinf().any():
        return {"why": explain(found, None, monolith)}
    labels = reference.labels[reference.for_loss]
    counts = run.clusters.clusters["counts"].tolist()
    return {"why": explain(found, labels, monolith, counts),
            "router": router_quality(found.answers, labels)}


# ---- all of it -----------------------------------------------------------------------------------

def main():
    args, given = read_arguments()
    tars = find_tars(args.data)
    # one rank may have much more to read than the others
    ranks = start(args.device, timeout=timedelta(hours=12))

    runs = [open_run(run_dir, args, given, ranks) for run_dir in [args.run_dir, *args.runs]]
    measures = open_measures(args, runs[0], ranks)
    output = Output(args.out or os.path.join(args.run_dir, "evaluation"), args.table)
    on_rank_0(output.check)
    reference_name = name_reference(tars, output.folder, ranks)

    for run in runs:
        evaluate_run(run, measures, args, reference_name=reference_name, output=output, ranks=ranks)

    if ranks.rank == 0:
        if args.table == "experts":
            experts_figure(output.results, output.path("png"))
        output.say()
    # no rank leaves before
    gather(None)


if __name__ == "__main__":
    script(main)
