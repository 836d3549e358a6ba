"""Stage 5: numbers and tables. How good are an ensemble, its monolith and its student, and what did they cost?

    python evaluate.py --run runs/demo --data 'data/shapes/*.tar' --samples 1000
    python evaluate.py --run runs/laion --data 'data/val/*.tar' --features facebook/dinov2-large --clip openai/clip-vit-large-patch14
    python evaluate.py --run runs/laion --data 'data/val/*.tar' --table strategies                  # the paper's table 1
    python evaluate.py --run runs/k4 --runs runs/k8 runs/k16 --data 'data/val/*.tar' --table experts   # its figure 4
    python evaluate.py --data 'data/val/*.tar' --images samples.npz --size 256                      # pictures from elsewhere
    torchrun --nproc_per_node=8 -- evaluate.py ...                                                  # shared out over eight GPUs

reads   the reference tars, pictures that nobody trained on; of RUN whatever is there: the experts and the router, experts/all.safetensors,
        student.safetensors, clusters.safetensors, config.toml, logs/*.csv
writes  RUN/evaluation/NAME.json and NAME.md (NAME: models, or the table's; --out DIR: elsewhere), with --npz the samples of each row as
        ROW.npz (arr_0: uint8 [N,S,S,3], arr_1: classes), with --table experts a figure; reference-*.safetensors, the reference's statistics
Sample i of each row has the noise of seed + i and the condition of the same reference picture: rows differ by their models alone.
Frechet distances compare only with others of the same features, preprocessing, reference and number of samples: each row names them.
"""
import glob
import hashlib
import json
import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import flow
import networks
from cluster import assign, extractor, find_tars, subset
from common import (UserError, atomic, cores, gather, load_run, make_config, make_parser, parse, progress, read_clusters, script, start,
                    sum_over_ranks)
from data import BadSample, TarDataset, check_condition, collate, decode, permute, square, to_tensor
from ensemble import DENSE, Ensemble, beginnings, check_strategy, open_space
from metrics import Statistics, frechet_distance, precision_recall, router_quality
from report import as_text, experts_figure, ledger

BINS = 10           # of t in [0,1], of the validation loss and the router's answers
KEPT = 10_000       # pictures whose features precision and recall look at, at most


# ---- the reference ------------------------------------------------------------------------------------------------

class _Prepared(torch.utils.data.Dataset):
    """Picture i of `numbers` as each feature space wants it, or None if it cannot be used. Spaces look at the training square, clusters at the picture."""

    def __init__(self, data, numbers, size, spaces, clusters):
        self.data, self.numbers, self.size, self.spaces, self.clusters = data, numbers, size, spaces, clusters

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        members = self.data.members(self.numbers[i])
        try:
            check_condition(members, self.data.condition, self.data.classes)
            if "image" not in members:
                raise BadSample("no image")
            image = decode(members["image"], max(256, self.size))
        except BadSample:
            return self.numbers[i], None, None
        picture = Image.fromarray(square(image, self.size)) if self.spaces else None
        return (self.numbers[i], [space.prepare(picture) for space in self.spaces],
                self.clusters and self.clusters.prepare(image.reduce(max(1, min(image.size) // 256))))


def feature_space(settings, device, normalise=False):
    """-> namespace of name, prepare, features, info. FD-DINOv2 and CLIP-FID are the field's names for these networks' features, not normalised."""
    options = {} if settings.name == "pixels" else {"normalise": normalise, "key": "features"}
    prepare, features, info = extractor(settings, device, **options)
    known = {"Dinov2Model": "FD-DINOv2", "Dinov2WithRegistersModel": "FD-DINOv2", "CLIPVisionModelWithProjection": "CLIP-FID"}
    name = known.get(info.get("class"), f"FD-{os.path.basename(os.path.normpath(settings.name))}")
    return SimpleNamespace(name=name, prepare=prepare, features=features, info=info)


def read_reference(data, size, spaces, clusters, folder, args, ranks):
    """-> (statistics of each feature space [dict], cluster of each picture [n] int64: -1 where it cannot be used, 0 where `clusters` is None).

    Cached in `folder` by what they depend on: tars, size, feature space; for the clusters the clustering.
    """
    tars = [(os.path.basename(path), os.path.getsize(path), os.stat(path).st_mtime_ns) for path in data.tars]
    base = {"tars": tars, "size": size, "condition": data.condition, "classes": data.classes}
    wanted = [{**base, "features": networks.identity(space.info), "kept": KEPT} for space in spaces]
    wanted.append({**base, "clustering": clusters and [clusters.about["fingerprint"], networks.identity(clusters.info)]})
    marks = [hashlib.sha256(json.dumps(w, sort_keys=True).encode()).hexdigest()[:12] for w in wanted]
    files = [os.path.join(folder, f"reference-{mark}.safetensors") for mark in marks]
    there = gather([os.path.exists(file) for file in files])[0]
    todo, sort = [space for space, file in zip(spaces, there) if not file], None if there[-1] else clusters
    if not all(there):
        mine = list(range(ranks.rank, len(data), ranks.world))
        keep = [permute(i, len(data), 0, 3) for i in range(min(KEPT, len(data)))]       # the first n of these are a uniform subset, too
        statistics, labels = [Statistics(keep) for _ in todo], torch.full((len(data),), -1)
        workers = max(0, min(8, cores() // ranks.world - 1))
        loader = torch.utils.data.DataLoader(_Prepared(data, mine, size, todo, sort), args.batch, num_workers=workers, collate_fn=list,
                                             multiprocessing_context="fork" if workers else None)
        bar = progress(desc="reference", total=len(mine), unit=" images")
        for batch in loader:
            bar.update(len(batch))
            if batch := [item for item in batch if item[1] is not None]:
                numbers, prepared, sorted_by = zip(*batch)
                for space, s, pictures in zip(todo, statistics, zip(*prepared)):
                    s.add(numbers, space.features(list(pictures)))
                labels[list(numbers)] = clusters_of(sort, list(sorted_by)) if sort else 0
        bar.close()
        if not (usable := int(sum_over_ranks((labels >= 0).sum()))):
            raise UserError(f"none of the {len(data)} pictures of --data can be used with condition = {data.condition}")
        made = [s.close() for s in statistics] + [{"clusters": sum_over_ranks(labels + 1) - 1, "count": torch.tensor(usable)}]
        missing = [i for i, file in enumerate(there) if not file or i == len(there) - 1]
        for i, tensors in zip(missing, made):
            if ranks.rank == 0 and not there[i]:
                with atomic(files[i]) as temporary:
                    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"nanoddm": json.dumps(wanted[i], sort_keys=True)})
    gather(None)        # rank 0 has written them
    found = [load_file(file) for file in files]
    return found[:-1], found[-1]["clusters"]


def clusters_of(space, pictures):
    """The cluster [n] of prepared pictures, by the run's own rule; features rounded as stage 1 keeps them."""
    return torch.from_numpy(assign(space.features(pictures).astype(np.float16), "", space.centroids, space.config))


# ---- samples ------------------------------------------------------------------------------------------------------

def draw(team, settings, space, conditions, labels, args, ranks):
    """Yields (numbers of samples, pictures uint8 [B,S,S,3]) of this rank's share of args.samples. labels [N]: each sample's expert, or None."""
    calls, times = flow.evaluations(settings.steps, settings.solver), flow.time_grid(settings.steps, team.shift(settings))
    shape = (team.config.channels, team.config.size, team.config.size)
    mine = range(ranks.rank, args.samples, ranks.world)
    bar = progress(desc=f"samples, {settings.row}", total=len(mine), unit=" images")
    for first in range(0, len(mine), args.batch):
        numbers = list(mine[first:first + args.batch])
        x, u = (z.to(ranks.device) for z in beginnings([args.seed + i for i in numbers], shape, calls, team.K))
        velocity = team.velocity(settings, conditions(numbers), None, u, None if labels is None else labels[numbers].to(ranks.device))
        for x in flow.integrate(velocity, x, times, settings.solver):
            pass
        yield numbers, space.pictures(x).cpu().numpy()
        bar.update(len(numbers))
    bar.close()


def measure(batches, count, spaces, references, clusters, K, clip, captions, keep):
    """What can be said of pictures that come as (numbers, uint8 [B,S,S,3]) on each rank -> (dict of a row's numbers, pictures [N,S,S,3] if keep)."""
    statistics = [Statistics(range(min(count, KEPT))) for _ in spaces]
    shares, scores, pictures = torch.zeros(K), torch.zeros(2, dtype=torch.float64), {}
    for numbers, batch in batches:
        images = [Image.fromarray(picture) for picture in batch]
        for space, s in zip(spaces, statistics):
            s.add(numbers, space.features([space.prepare(image) for image in images]))
        if clusters:
            shares += torch.bincount(clusters_of(clusters, [clusters.prepare(image) for image in images]), minlength=K)
        if clip:
            scores += torch.tensor([clip.score([clip.prepare(image) for image in images], captions(numbers)).double().sum(), len(images)])
        if keep:
            pictures |= dict(zip(numbers, batch))
    row = {"samples": count}
    for space, s, reference in zip(spaces, statistics, references):
        s = s.close()
        precision, recall = precision_recall(reference["kept"], s["kept"])
        distance = frechet_distance(reference["mean"], reference["covariance"], s["mean"], s["covariance"])
        row[space.name] = {"frechet_distance": distance, "precision": precision, "recall": recall, "neighbours_of": min(len(s["kept"]), len(reference["kept"]))}
    if clusters:
        row["cluster_shares"] = (sum_over_ranks(shares) / count).tolist()
    if clip:
        row["clip_score"] = (scores[0] / scores[1]).item() if sum_over_ranks(scores)[1] else None
    pictures = {i: p for part in gather(pictures) for i, p in part.items()} if keep else {}
    return row, np.stack([pictures[i] for i in range(count)]) if keep else None


# ---- validation loss ----------------------------------------------------------------------------------------------

@torch.no_grad()
def validate(team, strategies, space, data, numbers, labels, args, ranks):
    """Flow-matching loss (eq. 6, of the weighted velocity, eq. 8) on reference pictures, each at one time in each of BINS bins of [0,1].

    -> ({strategy: [n,BINS]}, the router's p [n,BINS,K]); the noise and times of a picture depend on args.seed and its number alone, so that
    all models see the same: compare picture by picture. Conditions as they are, no guidance.
    """
    experts = sorted(team.paths)
    losses, answers = {s: torch.zeros(len(numbers), BINS) for s in strategies}, torch.zeros(len(numbers), BINS, team.K)
    mine, size = range(ranks.rank, len(numbers), ranks.world), max(1, args.batch // BINS)
    bar = progress(desc=f"validation loss, {', '.join(strategies)}", total=len(mine), unit=" images")
    for first in range(0, len(mine), size):
        rows, items = list(mine[first:first + size]), []
        for row in rows:
            image, condition, _ = data.sample(numbers[row])
            rng = np.random.Generator(np.random.Philox(key=[args.seed, numbers[row]]))
            u, eps = rng.random(BINS), rng.standard_normal((BINS, space.channels, space.size, space.size), dtype=np.float32)
            post = rng.standard_normal(eps.shape[1:], dtype=np.float32)
            items.append({"x": torch.from_numpy(square(image, data.size).copy()), "c": condition, "k": 0, "u": 0, "drop": 0, "bad": [],
                          "eps": torch.from_numpy(eps), "post": torch.from_numpy(post), "t": torch.from_numpy((np.arange(BINS) + u) / BINS)})
        batch = collate(items)
        c = space.captions(batch["c"]) if isinstance(batch["c"], list) else batch["c"]
        x_0 = space.x_0(batch["x"].to(ranks.device), batch["post"].to(ranks.device)).repeat_interleave(BINS, dim=0)         # [B*BINS,C,h,w]
        c = c.to(ranks.device).repeat_interleave(BINS, dim=0) if c.numel() else None
        t = torch.stack([item["t"] for item in items]).flatten().float().clamp(1e-4, 1 - 1e-4).to(ranks.device)
        eps = batch["eps"].flatten(0, 1).to(ranks.device)
        x_t = flow.interpolate(x_0, eps, t)
        if team.routed:
            p = team.route(x_t, t, c)
        else:
            p = torch.nn.functional.one_hot(torch.full((len(t),), experts[0], device=ranks.device), team.K).float()
        answers[rows] = p.view(len(rows), BINS, team.K).cpu()
        v = torch.zeros(team.K, *x_t.shape, device=ranks.device)
        for k in sorted(experts, key=lambda k: k not in team.loaded):       # those on the device first
            v[k] = team.expert_velocity(k, x_t, t, c)
        for strategy in strategies:
            if strategy == "oracle":
                w = torch.nn.functional.one_hot(labels[[numbers[row] for row in rows]].repeat_interleave(BINS), team.K).to(p)
            else:
                w = flow.choose(flow.parse_strategy(strategy), p)
            error = torch.einsum("bk,kb...->b...", w, v) - (eps - x_0)
            losses[strategy][rows] = error.square().flatten(1).mean(1).view(len(rows), BINS).cpu()
        bar.update(len(rows))
    bar.close()
    return {s: sum_over_ranks(loss) for s, loss in losses.items()}, sum_over_ranks(answers)


# ---- the stage ----------------------------------------------------------------------------------------------------

TABLE_1 = ["full", "top-1", "top-2", "top-3", "sample-1", "sample-2", "sample-3", "threshold-0.01", "threshold-0.05", "threshold-0.1",
           ("nucleus-0.9", 0.5), ("nucleus-0.9", 1.0), ("nucleus-0.9", 2.0), "once"]


LOSSES = ["full", "top-1", "top-2", "threshold-0.1", "oracle"]


def fits(strategy, K):
    """Whether there are as many experts as a strategy of the lists above asks for."""
    return strategy == "oracle" or flow.parse_strategy(strategy)[0] not in ("top", "sample") or flow.parse_strategy(strategy)[1] <= K


def rows_of(model, table, config, team, labelled):
    """The settings of each row of one model: [sample] with a strategy, and what the row is called."""
    def row(strategy, name=None, temperature=None):
        values = dict(vars(config.sample)) | {"strategy": strategy}
        if temperature is not None:
            values["router_temperature"] = temperature
        return SimpleNamespace(**values, row=name or strategy)

    if model != "ensemble":
        return [row("full", model)]
    if table != "strategies":
        return [row(config.sample.strategy)]
    chosen = [(s, None) if isinstance(s, str) else s for s in TABLE_1]
    return ([row("full", "oracle")] if labelled and not team.missing else []) + [
        row(s, s if t is None else f"{s}, temperature {t}", t) for s, t in chosen if fits(s, team.K)]


def evaluate_run(run, args, given, ranks, folder):
    """-> everything about one run as main() writes it to JSON."""
    config, about = load_run(run, given), read_clusters(run)
    d, K = config.data, config.cluster.experts
    result = {"run": run, "experts": K, "fingerprint": about["fingerprint"], "rows": []}
    there = {"ensemble": bool(glob.glob(os.path.join(glob.escape(run), "experts", "[0-9]*.safetensors")))}
    there |= {name: os.path.exists(os.path.join(run, path)) for name, (path, *_) in DENSE.items()}
    chosen = args.models or [name for name, found in there.items() if found]
    if not chosen:
        raise UserError(f"{run} has neither experts nor a monolith nor a student: train them first")
    spaces = [feature_space(make_config({"features.name": name}).features, ranks.device) for name in args.features or [config.features.name]] if args.samples else []
    sort = None
    if d and config.cluster.assign != "random":     # whose clusters no picture tells
        sort = feature_space(config.features, ranks.device, normalise=True)
        if networks.identity(sort.info) != networks.identity(about["extractor"]):
            raise UserError(f"{run} was clustered by {networks.label(about['extractor'])}, {config.features.name!r} is {networks.label(sort.info)}: "
                            f"give [features] of its config.toml that network")
        sort.about, sort.config = about, config
        sort.centroids = {k: v.numpy() for k, v in load_file(os.path.join(run, "clusters.safetensors")).items()}
    data, references, labels = open_reference(args, d.size, d.condition, d.classes, spaces, sort, folder, ranks)
    usable = (labels >= 0).nonzero().flatten()
    result["reference"] = reference = {"name": args.reference, "tars": [os.path.basename(path) for path in data.tars], "images": len(usable), "size": d.size,
                                       "features": {space.name: space.info for space in spaces}}
    if sort:
        reference["cluster_shares"] = (torch.bincount(labels[usable], minlength=K) / len(usable)).tolist()
    order = [int(usable[permute(i % len(usable), len(usable), args.seed, i // len(usable))]) for i in range(args.samples)]
    clip = None
    if args.clip:
        if d.condition != "text":
            raise UserError(f"--clip scores prompts; {run} has condition = {d.condition}")
        clip = SimpleNamespace(**dict(zip(("prepare", "score", "info"), networks.clip_scorer(args.clip, ranks.device))))
        reference["clip"] = clip.info
    numbers = usable[torch.from_numpy(subset(len(usable), args.loss_images, args.seed, 4))].tolist()
    losses, condition = {}, lambda i: check_condition(data.members(order[i]), d.condition, d.classes)
    if args.table == "strategies" or "ensemble" not in chosen:
        if "sample.strategy" in given:
            raise UserError(f"--strategy {config.sample.strategy} does nothing " + ("with --table strategies" if "ensemble" in chosen else "without the ensemble"))
    if d.condition == "none" and (idle := [name for name in given if name.startswith("sample.cfg")]):
        raise UserError(f"{run} has condition = none: --{idle[0]} does nothing")
    if "oracle" in args.loss and not sort:
        raise UserError(f"--loss oracle: {run} has random clusters, no picture has one of its own")
    for model in chosen:
        team = Ensemble(run, ranks.device, "" if model == "ensemble" else model, config.sample.resident, config.sample.precision, config.sample.compile)
        space = open_space(team, config, {}, ranks.device)
        if model == "ensemble":
            team.check(config.sample)

        def conditions(numbers):
            found = [condition(i) for i in numbers]
            return (space.captions(found) if d.condition == "text" else torch.tensor(found)).to(ranks.device) if d.condition != "none" else None

        for settings in rows_of(model, args.table, config, team, sort is not None) if args.samples else []:
            before, of_images = team.flops(), labels[order] if settings.row == "oracle" else None
            if of_images is None:
                team.check(settings)
            row, pictures = measure(draw(team, settings, space, conditions, of_images, args, ranks), args.samples, spaces, references, sort, K,
                                    clip, lambda numbers: [condition(i) for i in numbers], args.npz)
            guidance = f", guidance {settings.cfg:g}" if d.condition != "none" else ""
            flops = sum_over_ranks(torch.tensor(float(team.flops() - before), dtype=torch.float64)).item()
            result["rows"].append({"model": model, "strategy": "" if model != "ensemble" else settings.row, "gflops_per_image": flops / args.samples / 1e9,
                                   **row, "sampler": f"{settings.solver} {settings.steps} steps{guidance}", "settings": {k: v for k, v in vars(settings).items() if k != "row"},
                                   "shift": team.shift(settings), "seed": args.seed, "reference": args.reference})
            if args.npz and ranks.rank == 0:
                arrays = {"arr_0": pictures} | ({"arr_1": np.array([condition(i) for i in range(args.samples)])} if d.condition == "class" else {})
                name = model if model != "ensemble" else f"ensemble-{settings.row.replace(', temperature ', '-t')}"
                with atomic(os.path.join(folder, f"{name}.npz")) as temporary, open(temporary, "wb") as f:
                    np.savez(f, **arrays)
        if numbers:
            usual = [s for s in LOSSES if s != "oracle" or sort and not team.missing]
            strategies = [s for s in args.loss or usual if args.loss or fits(s, team.K)] if model == "ensemble" else ["full"]
            for strategy in args.loss:
                if strategy != "oracle" and model == "ensemble":
                    team.check(SimpleNamespace(strategy=strategy))
            found, answers = validate(team, strategies, space, data, numbers, labels, args, ranks)
            losses |= {model if model != "ensemble" else f"ensemble, {strategy}": loss for strategy, loss in found.items()}
            if team.routed and sort:
                result["router"] = router_quality(answers, labels[numbers])
        team = space = None     # makes room for the next
    if losses:
        summary = {}
        for name, loss in losses.items():
            summary[name] = {"mean": loss.mean().item(), "by_t": loss.mean(0).tolist()}
            if "monolith" in losses and name != "monolith":
                difference = (loss - losses["monolith"]).mean(1).double()
                summary[name] |= {"difference": difference.mean().item(), "difference_error": (difference.std() / len(difference) ** 0.5).item(),
                                  "difference_by_t": (loss - losses["monolith"]).mean(0).tolist()}
        result["loss"] = {"images": len(numbers), "seed": args.seed, "models": summary}
    result["ledger"], result["equal_compute"] = ledger(run, K)
    return result


def open_reference(args, size, condition, classes, spaces, sort, folder, ranks):
    """-> (TarDataset of --data, statistics of each feature space, cluster of each picture)."""
    tars = list(find_tars(args.data).values())
    data = TarDataset(tars, size, condition, None if condition == "text" else to_tensor, classes)
    if not len(data):
        raise UserError(f"no samples in --data {' '.join(args.data)}")
    return data, *read_reference(data, size, spaces, sort, folder, args, ranks)


def evaluate_images(args, given, ranks, folder):
    """As evaluate_run, of pictures that came from elsewhere: each of --images is a row."""
    spaces = [feature_space(make_config({"features.name": name}).features, ranks.device) for name in args.features or ["pixels"]]
    data, references, labels = open_reference(args, args.size, "none", 0, spaces, None, folder, ranks)
    result = {"run": "", "experts": 0, "rows": [], "reference": {"name": args.reference, "images": int((labels >= 0).sum()), "size": args.size,
                                                                 "features": {space.name: space.info for space in spaces}}}
    for path in args.images:
        pictures = read_images(path)
        if pictures.shape[1:] != (args.size, args.size, 3):
            raise UserError(f"--images {path}: pictures of {pictures.shape[2]}x{pictures.shape[1]}, the reference is made at --size {args.size}: make them equal")
        mine = range(ranks.rank, len(pictures), ranks.world)
        batches = ((mine[i:i + args.batch], pictures[list(mine[i:i + args.batch])]) for i in range(0, len(mine), args.batch))
        row, _ = measure(batches, len(pictures), spaces, references, None, 0, None, None, False)
        result["rows"].append({"model": path, "strategy": "", "gflops_per_image": "", **row, "sampler": "", "seed": "", "reference": args.reference})
    return result


def read_images(path):
    """uint8 [N,H,W,3] of a folder of pictures or the arr_0 of an .npz."""
    try:
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as arrays:
                found = arrays["arr_0"]
        else:
            files = sorted(f for f in glob.glob(os.path.join(glob.escape(path), "*")) if f.lower().endswith((".png", ".jpg", ".jpeg", ".webp"))
                           and os.path.basename(f) not in ("grid.png", "routing.png"))
            found = np.stack([np.asarray(decode(Path(f).read_bytes())) for f in files])
        if found.dtype != np.uint8 or found.ndim != 4 or found.shape[3] != 3:
            raise ValueError(f"{found.dtype} {found.shape}, not uint8 [N,H,W,3]")
        return found
    except (OSError, ValueError, KeyError, BadSample) as error:
        raise UserError(f"--images {path}: {error or type(error).__name__}; give a folder of pictures of one size, or an .npz with arr_0") from None


def main():
    parser = make_parser(__doc__, ["sample"])
    group = parser.add_argument_group("what is measured")
    group.add_argument("--data", nargs="+", required=True, metavar="GLOB", help="the reference tars")
    group.add_argument("--samples", type=int, default=10_000, metavar="N", help="pictures to draw for each row (default: 10000; 0: none)")
    group.add_argument("--models", nargs="+", choices=["ensemble", *DENSE], metavar="M", help=f"ensemble {' '.join(DENSE)} (default: those there are)")
    group.add_argument("--features", nargs="+", default=[], metavar="NAME", help="feature spaces of Frechet distance, precision and recall: DINOv2, CLIP or ResNet "
                       "by hub name or folder, or pixels (default: what the run was clustered by)")
    group.add_argument("--clip", default="", metavar="NAME", help="a CLIP to score pictures against their prompts with")
    group.add_argument("--loss", nargs="+", default=[], metavar="S", help=f"strategies of the validation loss (default: {' '.join(LOSSES)}; oracle: the "
                       "expert of the picture's own cluster)")
    group.add_argument("--loss-images", type=int, default=2000, metavar="N", help="reference pictures for it, at most (default: 2000; 0: none)")
    group.add_argument("--table", choices=["models", "strategies", "experts"], default="models", help="models (default): each model of the run; "
                       "strategies: every strategy, the paper's table 1; experts: several runs, its figure 4")
    group.add_argument("--runs", nargs="+", default=[], metavar="DIR", help="with --table experts: the runs beside --run")
    group.add_argument("--images", nargs="+", default=[], metavar="DIR|NPZ", help="no run: these pictures against the reference")
    group.add_argument("--size", type=int, default=0, metavar="S", help="with --images: pixels a side")
    group.add_argument("--seed", type=int, default=0, help="default: 0")
    group.add_argument("--batch", type=int, default=64, metavar="B", help="images at once (default: 64)")
    group.add_argument("--npz", action="store_true", help="write the samples of each row, too")
    group.add_argument("--out", default="", metavar="DIR", help="default: RUN/evaluation")
    args, given = parse(parser)
    if min(args.samples, args.loss_images, args.seed) < 0 or args.batch < 1:
        raise UserError(f"--samples {args.samples}, --loss-images {args.loss_images} and --seed {args.seed} must be at least 0, --batch {args.batch} at least 1")
    if (args.table == "experts") != bool(args.runs):
        raise UserError("--table experts compares several runs: --run DIR --runs DIR ..." if not args.runs else "--runs needs --table experts")
    if bool(args.images) != bool(args.size):
        raise UserError("--images and --size go together")
    if args.images and (given or args.models or args.clip or args.table != "models" or args.npz):
        raise UserError("--images are pictures from elsewhere: of them only --features can be measured")
    if args.samples == 1:
        raise UserError("--samples 1: one picture has no covariance")
    for strategy in args.loss:
        if strategy != "oracle" and check_strategy(strategy)[0] in ("oracle", *flow.DRAWING):
            raise UserError(f"--loss {strategy}: the loss means nothing for a strategy that draws, and the oracle of a reference picture is its own cluster: --loss oracle")
    tars = find_tars(args.data)
    mark = hashlib.sha256(json.dumps([(name, os.path.getsize(path)) for name, path in tars.items()]).encode()).hexdigest()[:8]
    args.reference = f"{len(tars)} tars {mark}" if len(tars) > 1 else f"{next(iter(tars))}.tar {mark}"

    ranks = start(args.device, timeout=timedelta(hours=12))     # one rank may have much more to read
    folder = args.out or ("evaluation" if args.images else os.path.join(args.run, "evaluation"))
    results = [evaluate_images(args, given, ranks, folder)] if args.images else [evaluate_run(run, args, given, ranks, folder) for run in [args.run, *args.runs]]
    if ranks.rank:
        return
    text, name = as_text(results), os.path.join(folder, "images" if args.images else args.table)
    with atomic(f"{name}.json") as temporary, open(temporary, "w") as f:
        json.dump({"results": results}, f, indent=1)
    with atomic(f"{name}.md") as temporary, open(temporary, "w") as f:
        f.write(text)
    if args.table == "experts":
        experts_figure(results, f"{name}.png")
    print(f"\n{text}\nin {name}.json and {name}.md")


if __name__ == "__main__":
    script(main)
