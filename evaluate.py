"""Stage 5: numbers and tables. How good are an ensemble, its monolith and its student, and what did they cost?

    python evaluate.py --run-dir runs/demo --data 'data/shapes-held-out/*.tar' --samples 1000
    python evaluate.py --run-dir runs/laion --data 'data/val/*.tar' --features facebook/dinov2-large --clip openai/clip-vit-large-patch14
    python evaluate.py --run-dir runs/laion --data 'data/val/*.tar' --table strategies                      # the paper's table 1
    python evaluate.py --run-dir runs/k4 --runs runs/k8 runs/k16 --data 'data/val/*.tar' --table experts    # its figure 4
    python evaluate.py --data 'data/val/*.tar' --images samples.npz --size 256 --out elsewhere          # pictures from anywhere
    torchrun --nproc_per_node=8 evaluate.py --run-dir runs/laion --data 'data/val/*.tar'                 # shared out over eight GPUs

reads   the reference tars, pictures that nobody trained on; of RUN config.toml, clusters.safetensors and whatever is there: the experts and the
        router, experts/all.safetensors, student.safetensors, logs/*.csv; the pretrained networks that these need
writes  RUN/evaluation/TABLE.json and TABLE.md (models, or strategies, experts; --out DIR: elsewhere), with --npz the samples of each row as
        ROW.npz (arr_0: uint8 [N,S,S,3]; arr_1: classes), with --table experts a figure; reference-*.safetensors, the reference's statistics
Sample i of each row starts from the noise of (seed, i) and has the condition of the same reference picture: rows differ by their models alone.
"""
import contextlib
import hashlib
import json
import os
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import flow
from data import check_condition, mix, permute, square, subset
from ddm import encoders
from ddm.config import check_sample, check_strategy, load_run, make_config, make_parser, parse
from ddm.ensemble import DENSE, Ensemble, beginnings, open_space
from ddm.errors import UserError, script
from ddm.features import (
    KEPT,
    cluster_space,
    distance_space,
    open_reference,
    read_pictures,
    read_reference,
)
from ddm.files import atomic, try_file, try_folder, write_text
from ddm.metrics import Statistics, frechet_distance, precision_recall, router_quality
from ddm.process import collect, gather, on_rank_0, progress, start, sum_over_ranks
from ddm.report import as_text, experts_figure, ledger
from ddm.run import read_clusters
from ddm.tars import find_tars, read_sources
from ddm.text import normalise_text


BINS = 10           # of t in [0,1], of the validation loss and the router's answers
LOSSES = ["full", "top-1", "top-2", "threshold-0.1", "oracle"]
TABLE_1 = ["full", "top-1", "top-2", "top-3", "sample-1", "sample-2", "sample-3", "threshold-0.01", "threshold-0.05", "threshold-0.1",
           ("nucleus-0.9", 0.5), ("nucleus-0.9", 1.0), ("nucleus-0.9", 2.0), "once"]        # strategy, or (strategy, router temperature)


def draw(team, settings, space, conditions, labels, args, ranks):
    """Yields (numbers of samples, pictures uint8 [B,S,S,3]) of this rank's share of args.samples. labels [N]: each sample's expert, or None."""
    calls, times = flow.evaluations(settings.steps, settings.solver), flow.time_grid(settings.steps, team.shift(settings))
    shape = (team.config.channels, team.config.size, team.config.size)
    mine = range(ranks.rank, args.samples, ranks.world)
    bar = progress(desc=f"samples, {settings.row}", total=len(mine), unit=" images")
    for first in range(0, len(mine), args.batch):
        numbers = list(mine[first:first + args.batch])
        x, u = (z.to(ranks.device) for z in beginnings([mix(args.seed, i) for i in numbers], shape, calls, team.K))
        velocity = team.velocity(settings, conditions(numbers), None, u, None if labels is None else labels[numbers].to(ranks.device))
        for x in flow.integrate(velocity, x, times, settings.solver):
            pass
        yield numbers, space.pictures(x).cpu().numpy()
        bar.update(len(numbers))
    bar.close()


def measure(batches, count, spaces, references, clusters=None, K=0, clip=None, captions=None, keep=False):
    """What can be said of `count` pictures that come as (numbers, uint8 [B,S,S,3]), each on one rank.

    -> (a row's dict of numbers, on rank 0 and if keep the pictures [N,S,S,3])
    """
    statistics = [Statistics(range(min(count, KEPT))) for _ in spaces]
    shares, scores, pictures = torch.zeros(K, dtype=torch.int64), torch.zeros((), dtype=torch.float64), {}
    for numbers, batch in batches:
        images = [Image.fromarray(picture) for picture in batch]
        for space, s in zip(spaces, statistics):
            s.add(numbers, space.features([space.prepare(image) for image in images]))
        if clusters:
            shares += torch.bincount(clusters.assign([clusters.prepare(image) for image in images]), minlength=K)
        if clip:
            scores += clip.score([clip.prepare(image) for image in images], captions(numbers)).double().sum()
        if keep:
            pictures |= dict(zip(numbers, batch))
    row = {"samples": count}
    for space, s, reference in zip(spaces, statistics, references):
        s = s.close()
        precision, recall = precision_recall(reference["kept"], s["kept"])
        row[space.name] = {"frechet_distance": frechet_distance(reference["mean"], reference["covariance"], s["mean"], s["covariance"]),
                           "precision": precision, "recall": recall, "of_pictures": min(len(s["kept"]), len(reference["kept"]))}
    if clusters:
        row["cluster_shares"] = (sum_over_ranks(shares) / count).tolist()
    if clip:
        row["clip_score"] = (sum_over_ranks(scores) / count).item()
    if keep and (parts := collect(pictures)):
        pictures = {i: picture for part in parts for i, picture in part.items()}
        return row, np.stack([pictures[i] for i in range(count)])
    return row, None


def loss_precision(precision):
    """The context of a validation loss in this precision: without TF32 unless it is asked for."""
    return contextlib.nullcontext() if precision == "tf32" else encoders.exact_products()


@torch.no_grad()
def validate(team, strategies, space, data, numbers, labels, args, ranks):
    """Flow-matching loss (eq. 6, of the weighted velocity, eq. 8) on reference pictures, each at one time in each of BINS bins of [0,1].

    -> ({strategy: [n,BINS]}, the router's p [n,BINS,K]); the noise and times of a picture depend on args.seed and its number alone, so that
    all models see the same: compare picture by picture. Conditions as they are, no guidance. labels: the cluster of each picture, for "oracle".
    """
    experts = sorted(team.paths)
    losses, answers = {s: torch.zeros(len(numbers), BINS) for s in strategies}, torch.zeros(len(numbers), BINS, team.K)
    mine, size = range(ranks.rank, len(numbers), ranks.world), max(1, args.batch // BINS)
    bar = progress(desc=f"validation loss, {', '.join(strategies)}", total=len(mine), unit=" images")
    for first in range(0, len(mine), size):
        rows = list(mine[first:first + size])
        pictures, times, noise, post, conditions = [], [], [], [], []
        for row in rows:
            image, condition, _ = data.sample(numbers[row])
            rng = np.random.Generator(np.random.Philox(key=[args.seed, numbers[row]]))
            times.append((np.arange(BINS) + rng.random(BINS)) / BINS)
            noise.append(rng.standard_normal((BINS, space.channels, space.size, space.size), dtype=np.float32))
            post.append(rng.standard_normal(noise[-1].shape[1:], dtype=np.float32))
            pictures.append(square(image, data.size))
            conditions.append(condition)
        to_device = lambda arrays: torch.from_numpy(np.stack(arrays)).to(ranks.device)
        each = lambda z: z.to(ranks.device).repeat_interleave(BINS, dim=0)
        x_0 = each(space.x_0(to_device(pictures), to_device(post)))                     # [B*BINS,C,h,w]
        eps, t = to_device(noise).flatten(0, 1), to_device(times).flatten().float().clamp(1e-6, 1 - 1e-6)
        c = None if data.condition == "none" else each(space.captions(conditions) if data.condition == "text" else torch.stack(conditions))
        x_t = flow.interpolate(x_0, eps, t)
        p = team.route(x_t, t, c) if team.routed else torch.eye(team.K, device=ranks.device)[experts[:1]].expand(len(t), -1)
        answers[rows] = p.view(len(rows), BINS, team.K).cpu()
        v = torch.zeros(team.K, *x_t.shape, device=ranks.device)
        for k in sorted(experts, key=lambda k: k not in team.loaded):       # those on the device first
            v[k] = team.expert_velocity(k, x_t, t, c)
        for strategy in strategies:
            if strategy == "oracle":
                w = each(torch.nn.functional.one_hot(labels[[numbers[row] for row in rows]], team.K)).to(p)
            else:
                w = flow.choose(flow.parse_strategy(strategy), p)
            error = torch.einsum("bk,kb...->b...", w, v) - (eps - x_0)
            losses[strategy][rows] = error.square().flatten(1).mean(1).view(len(rows), BINS).cpu()
        bar.update(len(rows))
    bar.close()
    return {s: sum_over_ranks(loss) for s, loss in losses.items()}, sum_over_ranks(answers)


def summarise(losses):
    """{name: [n,BINS]} -> {name: mean, by_t and, beside the monolith's of the same pictures, the difference and its standard error}."""
    summary = {name: {"mean": loss.mean().item(), "by_t": loss.mean(0).tolist()} for name, loss in losses.items()}
    for name in losses.keys() - {"monolith"} if "monolith" in losses else ():
        difference = (losses[name] - losses["monolith"]).double()
        error = difference.mean(1).std() / len(difference) ** 0.5 if len(difference) > 1 else torch.tensor(float("inf"))
        summary[name] |= {"difference": difference.mean().item(), "difference_error": error.item(), "difference_by_t": difference.mean(0).tolist()}
    return summary


def open_run(run, args, given, ranks):
    """All that can be known of a run before any work -> namespace of run, config, about, teams {model: Ensemble}, spaces {model: Space}, clusters.

    UserError for whatever does not fit together, or cannot be measured.
    """
    config, about = load_run(run, given), read_clusters(run)
    d, K, settings = config.data, config.cluster.experts, config.sample
    there = ["ensemble"] * any(os.path.exists(os.path.join(run, "experts", f"{k}.safetensors")) for k in range(K))
    there += [name for name, (path, *_) in DENSE.items() if os.path.exists(os.path.join(run, path))]
    if not (chosen := args.models or there):
        raise UserError(f"{run} has neither experts nor a monolith nor a student: train them first")
    if d.condition == "none":
        if idle := [name for name in given if name.startswith("sample.cfg")]:
            raise UserError(f"{run} has condition = none: --{idle[0]} does nothing")
        settings.cfg = 1.0
    routed = SimpleNamespace(**vars(settings) | ({"strategy": "full"} if args.table == "strategies" else {}))
    if args.table == "strategies" and "ensemble" not in chosen:
        raise UserError(f"--table strategies compares the ensemble's; of {run} only {' '.join(chosen)} is evaluated")
    if "sample.strategy" in given and (args.table == "strategies" or "ensemble" not in chosen):
        raise UserError(f"--strategy {settings.strategy} does nothing with" + (" --table strategies" if "ensemble" in chosen else "out the ensemble"))
    check_sample(routed)
    if args.loss and "ensemble" not in chosen:
        raise UserError(f"--loss {args.loss[0]} is a strategy of the ensemble, which is not evaluated")
    if args.clip and d.condition != "text":
        raise UserError(f"--clip scores prompts; {run} has condition = {d.condition}")
    if "oracle" in args.loss and config.cluster.assign == "random":
        raise UserError(f"--loss oracle: {run} has random clusters, no picture has one of its own")
    teams, spaces = {}, {}
    for model in dict.fromkeys(chosen):
        team = Ensemble(run, ranks.device, "" if model == "ensemble" else model, settings.resident, settings.precision, settings.compile)
        if team.info["fingerprint"] != about["fingerprint"]:
            raise UserError(f"{team.path} and {run}/clusters.safetensors do not fit together: clustering {team.info['fingerprint']} / {about['fingerprint']}")
        space = open_space(team, config, {name: value for name, value in given.items() if name.endswith(".name")}, ranks.device)
        for what, model_s, run_s in (("data.size", space.config.data.size, d.size), ("data.condition", team.config.condition, d.condition),
                                     ("data.classes", team.config.classes, d.classes if d.condition == "class" else team.config.classes)):
            if model_s != run_s:
                raise UserError(f"{team.path} was trained with {what} {model_s}, {run}/config.toml says {run_s}")
        team.shift(settings)
        if model == "ensemble":
            if team.K != K or not team.routed and len(team.paths) > 1:
                raise UserError(f"{run}/router.safetensors is missing: train it with train_router.py --run-dir {run}, or choose --models {' '.join(DENSE)}")
            team.check(routed)
            for strategy in args.loss:
                if strategy != "oracle":
                    team.check(SimpleNamespace(strategy=strategy))
            if "oracle" in args.loss and team.missing:
                raise UserError(f"--loss oracle needs all experts: {', '.join(map(str, team.missing))} of {K} are missing")
        teams[model], spaces[model] = team, space
    # which no picture tells, where clusters are random
    clusters = cluster_space(run, config, about, ranks.device) if config.cluster.assign != "random" else None
    return SimpleNamespace(run=run, config=config, about=about, teams=teams, spaces=spaces, clusters=clusters)


def rows_of(model, table, settings, team, labelled):
    """The settings of each row of one model: [sample] with a strategy, and what the row is called."""
    row = lambda strategy, name, **more: SimpleNamespace(**vars(settings) | {"strategy": strategy, "row": name} | more)
    if model != "ensemble":
        return [row("full", model)]
    if table != "strategies":
        return [row(settings.strategy, settings.strategy)]
    rows = [row("full", "oracle")] if labelled and not team.missing else []
    for strategy, temperature in ((s, None) if isinstance(s, str) else s for s in TABLE_1):
        if fits(strategy, team.K):
            rows.append(row(strategy, strategy) if temperature is None else row(strategy, f"{strategy}, temperature {temperature}", router_temperature=temperature))
    return rows


def fits(strategy, K):
    """Whether there are as many experts as a strategy of the lists above asks for."""
    return strategy == "oracle" or flow.parse_strategy(strategy)[0] not in ("top", "sample") or flow.parse_strategy(strategy)[1] <= K


def evaluate_run(opened, args, spaces, clip, ranks, folder, save):
    """Measures all models of an opened run; save(result) after each row, so that a long evaluation that is stopped leaves what it has.

    -> the names of the files of samples that it wrote, on rank 0
    """
    run, config, clusters, d, K = opened.run, opened.config, opened.clusters, opened.config.data, opened.config.cluster.experts
    data = open_reference(args.data, d.size, d.condition, d.classes)
    references, (labels, of_squares) = read_reference(data, spaces, clusters, folder, args.batch, ranks)
    usable = (labels >= 0).nonzero().flatten()
    reference = describe_reference(args, data, len(usable), spaces, ranks) | ({"clip": clip.info} if clip else {})
    if clusters:        # of the squares, as samples are
        reference["cluster_shares"] = (torch.bincount(of_squares[usable], minlength=K) / len(usable)).tolist()
    order = [int(usable[permute(i % len(usable), len(usable), args.seed, i // len(usable))]) for i in range(args.samples)]
    condition = lambda i: check_condition(data.members(order[i]), d.condition, d.classes)
    numbers = usable[torch.from_numpy(subset(len(usable), args.loss_images, args.seed, 4))].tolist()
    result = {"run": run, "experts": K, "fingerprint": opened.about["fingerprint"], "reference": reference, "rows": []}
    result["ledger"], result["equal_compute"] = ledger(run, K)
    losses, written = {}, []
    for model in list(opened.teams):
        team, space = opened.teams.pop(model), opened.spaces[model]     # popped: its memory goes with it

        def conditions(numbers):
            found = [condition(i) for i in numbers]
            return None if d.condition == "none" else (space.captions(found) if d.condition == "text" else torch.tensor(found)).to(ranks.device)

        for settings in rows_of(model, args.table, config.sample, team, clusters) if args.samples else []:
            before, own = team.flops(), labels[order] if settings.row == "oracle" else None
            row, pictures = measure(draw(team, settings, space, conditions, own, args, ranks), args.samples, spaces, references, clusters, K, clip,
                                    lambda numbers: [normalise_text(condition(i)) for i in numbers], args.npz)
            flops = sum_over_ranks(torch.tensor(float(team.flops() - before), dtype=torch.float64)).item()
            guidance = f", guidance {settings.cfg:g}" if d.condition != "none" else ""
            result["rows"].append({"model": model, "strategy": settings.row if model == "ensemble" else "", "missing": team.missing,
                                   "gflops_per_image": flops / args.samples / 1e9, **row, "sampler": f"{settings.solver} {settings.steps} steps{guidance}",
                                   "settings": {k: v for k, v in vars(settings).items() if k != "row"} | {"precision": team.precision}, "shift": team.shift(settings), "seed": args.seed,
                                   "reference": reference["name"]})
            if args.npz and ranks.rank == 0:
                arrays = {"arr_0": pictures} | ({"arr_1": np.array([condition(i) for i in range(args.samples)])} if d.condition == "class" else {})
                name = model if model != "ensemble" else f"ensemble-{settings.row.replace(', temperature ', '-t')}"
                written.append(f"{name}.npz")
                with atomic(os.path.join(folder, written[-1])) as temporary, open(temporary, "wb") as f:
                    np.savez(f, **arrays)
            save(result)
        if numbers:
            strategies = ["full"] if model != "ensemble" else args.loss or [s for s in LOSSES if (clusters and not team.missing if s == "oracle" else fits(s, K))]
            # differences of a thousandth are read from it: fp32 unless asked otherwise, whatever the
            # samples are drawn in
            exact = team.in_precision("fp32" if args.loss_precision == "tf32" else args.loss_precision)
            with loss_precision(args.loss_precision):
                found, answers = validate(exact, strategies, space, data, numbers, labels, args, ranks)
            named = "fp32" if args.loss_precision == "fp32" else exact.precision
            del exact       # its memory goes with it
            losses |= {f"ensemble, {strategy}": loss for strategy, loss in found.items()} if model == "ensemble" else {model: found["full"]}
            result["loss"] = {"images": len(numbers), "seed": args.seed, "reference": reference["name"], "precision": named, "models": summarise(losses)}
            if team.routed and clusters and not team.missing:
                result["router"] = router_quality(answers, labels[numbers])
            save(result)
    save(result)
    return written


def describe_reference(args, data, usable, spaces, ranks):
    if usable < len(data) and ranks.rank == 0:
        print(f"{len(data) - usable} of {len(data)} pictures of --data cannot be used: no condition, or undecodable")
    return {"name": f"{args.reference}, {data.size} px", "tars": [os.path.basename(path) for path in data.tars], "images": usable, "unusable": len(data) - usable,
            "size": data.size, "features": {space.name: space.info for space in spaces}}


def evaluate_images(args, spaces, ranks, save):
    """As evaluate_run, of pictures that came from elsewhere: each of --images is a row."""
    found = {path: read_pictures(path) for path in args.images}
    for path, pictures in found.items():
        if pictures.shape[1:3] != (args.size, args.size):
            raise UserError(f"--images {path}: pictures of {pictures.shape[2]}x{pictures.shape[1]}, the reference is made at --size {args.size}: make them equal")
    data = open_reference(args.data, args.size)
    references, (labels, _) = read_reference(data, spaces, None, args.out, args.batch, ranks)
    reference = describe_reference(args, data, int((labels >= 0).sum()), spaces, ranks)
    result = {"run": "", "experts": 0, "reference": reference, "rows": []}
    for path, pictures in found.items():
        mine = range(ranks.rank, len(pictures), ranks.world)
        batches = ((part := list(mine[i:i + args.batch]), pictures[part]) for i in range(0, len(mine), args.batch))
        row, _ = measure(batches, len(pictures), spaces, references)
        result["rows"].append({"model": path, "strategy": "", "gflops_per_image": None, **row, "sampler": "", "seed": "", "reference": reference["name"]})
        save(result)


def read_arguments():
    parser = make_parser(__doc__, "sample")
    group = parser.add_argument_group("what is measured")
    group.add_argument("--data", nargs="+", required=True, metavar="GLOB", help="the reference tars")
    group.add_argument("--samples", type=int, metavar="N", help="pictures to draw for each row (default: 10000; 0: none)")
    group.add_argument("--models", nargs="+", choices=["ensemble", *DENSE], metavar="M", help=f"ensemble {' '.join(DENSE)} (default: those there are)")
    group.add_argument("--features", nargs="+", default=[], metavar="NAME", help="feature spaces of Frechet distance, precision and recall: DINOv2, CLIP or ResNet "
                       "by hub name or folder, or pixels (default: what the run was clustered by)")
    group.add_argument("--clip", default="", metavar="NAME", help="a CLIP to score pictures against their prompts with")
    group.add_argument("--loss", nargs="+", default=[], metavar="S", help=f"strategies of the validation loss (default: {' '.join(LOSSES)}; oracle: the "
                       "expert of the picture's own cluster)")
    group.add_argument("--loss-images", type=int, metavar="N", help="reference pictures for it, at most (default: 2000; 0: none)")
    group.add_argument("--loss-precision", default="fp32", choices=("fp32", "tf32", "bf16"),
                       help="of the validation loss and the router's answers (default: fp32, also on a GPU; "
                       "samples are drawn in --precision)")
    group.add_argument("--table", choices=["models", "strategies", "experts"], default="models", help="models (default): each model of the run; "
                       "strategies: every strategy, the paper's table 1; experts: several runs, its figure 4")
    group.add_argument("--runs", nargs="+", default=[], metavar="DIR", help="with --table experts: the runs beside --run-dir")
    group.add_argument("--images", nargs="+", default=[], metavar="DIR|NPZ", help="no run: these pictures against the reference; needs --size and --out")
    group.add_argument("--size", type=int, default=0, metavar="S", help="with --images: pixels a side")
    group.add_argument("--seed", type=int, help="of samples and validation noise (default: 0)")
    group.add_argument("--batch", type=int, default=64, metavar="B", help="images at once (default: 64)")
    group.add_argument("--npz", action="store_true", help="write the samples of each row, too")
    group.add_argument("--out", default="", metavar="DIR", help="default: RUN/evaluation")
    for role in ("autoencoder", "text", "features"):
        group.add_argument(f"--{role}.name", metavar="NAME", help="hub name or local folder of the same network")
    args, given = parse(parser)
    alone = {"--loss": args.loss, "--loss-precision": args.loss_precision.removeprefix("fp32"), "--samples": args.samples, "--loss-images": args.loss_images, "--seed": args.seed, "--models": args.models, "--clip": args.clip,
             "--npz": args.npz, "--table": args.table != "models"} | {f"--{name}": True for name in given}
    if args.images:
        alone["--run-dir"] = args.run_dir != parser.get_default("run")
        if not args.size or not args.out:
            raise UserError("--images needs --size, the pixels of a side, and --out, a folder for the results")
        if idle := [flag for flag, value in alone.items() if value not in (None, False, "", [])]:
            raise UserError(f"{idle[0]} does nothing with --images, which are pictures from elsewhere")
    elif args.size:
        raise UserError(f"--size {args.size} does nothing without --images")
    args.samples, args.loss_images, args.seed = (default if value is None else value
                                                 for value, default in ((args.samples, 10_000), (args.loss_images, 2000), (args.seed, 0)))
    if min(args.samples, args.loss_images) < 0 or args.samples == 1 or args.batch < 1 or not 0 <= args.seed < 2 ** 63:
        raise UserError(f"one of these is out of range: --samples {args.samples} (0, or at least 2), --loss-images {args.loss_images} (at least 0), "
                        f"--batch {args.batch} (at least 1), --seed {args.seed} (0 to 2^63)")
    of_samples = {"--features": args.features, "--clip": args.clip, "--npz": args.npz} | {
        f"--{n.partition('.')[2].replace('_', '-')}": n.startswith("sample.") and n.partition(".")[2] not in ("resident", "compile") for n in given}
    for idle, why in ((not args.samples and next((flag for flag, value in of_samples.items() if value), ""), "--samples 0"),
                      (not args.loss_images and args.loss and "--loss", "--loss-images 0"),
                      (not args.loss_images and args.loss_precision != "fp32" and "--loss-precision", "--loss-images 0"), (args.runs and args.npz and "--npz", "--table experts")):
        if idle:
            raise UserError(f"{idle} does nothing with {why}")
    if (args.table == "experts") != bool(args.runs):
        raise UserError("--table experts compares several runs: --run-dir DIR --runs DIR ..." if not args.runs else "--runs needs --table experts")
    for strategy in args.loss:
        if strategy != "oracle" and check_strategy(strategy)[0] in ("oracle", *flow.DRAWING):
            raise UserError(f"--loss {strategy}: the loss means nothing for a strategy that draws, and the oracle of a reference picture is its own cluster: --loss oracle")
    return args, given


def main():
    args, given = read_arguments()
    tars = find_tars(args.data)
    ranks = start(args.device, timeout=timedelta(hours=12))     # one rank may have much more to read
    opened = [] if args.images else [open_run(run, args, given, ranks) for run in [args.run_dir, *args.runs]]
    usual = make_config({"features.name": "pixels"}).features if args.images else opened[0].config.features     # of several runs the first's
    named = [make_config({"features.name": name}).features for name in args.features] or [usual]
    spaces = [distance_space(settings, ranks.device) for settings in named] if args.samples else []
    if len({space.name for space in spaces}) < len(spaces):
        raise UserError(f"--features {' '.join(args.features)}: two of them are called the same")
    clip = SimpleNamespace(**dict(zip(("prepare", "score", "info"), encoders.clip_scorer(args.clip, ranks.device)))) if args.clip else None
    folder = args.out or os.path.join(args.run_dir, "evaluation")
    name, results, written = os.path.join(folder, "images" if args.images else args.table), {}, []

    def try_output():
        try:
            folder.encode()
        except UnicodeEncodeError:      # safetensors would fail later
            raise UserError(f"--out {folder!r} is not UTF-8: give another folder") from None
        try_folder(folder)
        for ending in ["json", "md"] + ["png"] * (args.table == "experts"):
            try_file(f"{name}.{ending}")

    def save(result):
        if ranks.rank == 0:
            results[result["run"]] = result
            write_text(f"{name}.json", json.dumps({"results": list(results.values())}, indent=1))
            text = as_text(list(results.values()))
            # names of files need not be text
            write_text(f"{name}.md", text.encode(errors="backslashreplace").decode())

    on_rank_0(try_output)
    sources = read_sources(tars.values(), os.path.join(folder, "sources.json"), ranks)
    mark = hashlib.sha256(json.dumps([(name, source.sha256) for name, source in zip(tars, sources)]).encode()).hexdigest()[:8]
    args.reference = f"{len(tars)} tars {mark}" if len(tars) > 1 else f"{next(iter(tars))}.tar {mark}"
    if args.images:
        evaluate_images(args, spaces, ranks, save)
    for run in opened:
        written += evaluate_run(run, args, spaces, clip, ranks, folder, save)
    if ranks.rank == 0:
        if args.table == "experts":
            experts_figure(list(results.values()), f"{name}.png")
        print(f"\n{as_text(list(results.values()))}\nin {name}.json and {name}.md"
              + (f"; samples in {', '.join(written)}" if written else ""))
        there = sorted(file for file in os.listdir(folder) if file.endswith(".npz"))
        if opened and (earlier := [file for file in there if file not in written]):
            print(f"{folder} holds samples of earlier calls, too, not of this table: {', '.join(earlier)}")
    gather(None)        # no rank leaves before


if __name__ == "__main__":
    script(main)
