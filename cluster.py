"""Stage 1: images -> features -> k-means -> K partitions of the data, each a folder of tar shards.

    python cluster.py --data 'data/shapes/*.tar' --run runs/demo --config configs/demo.toml
    python cluster.py --data 'data/more/*.tar' --run runs/demo --append
    torchrun --nproc_per_node=8 -- cluster.py --data 'data/laion/*.tar' --run runs/laion --config configs/laion.toml --experts 8

reads   the tars, as img2dataset writes them (data.py)
writes  RUN/config.toml                the experiment: --config with the flags over it; later stages read it
        RUN/features/NAME.safetensors  a feature vector for each usable sample of NAME.tar
        RUN/clusters.safetensors       fine and coarse centroids, counts; its fingerprint names this clustering
        RUN/shards/K/NAME.tar          the samples of NAME.tar in cluster K, byte for byte
        RUN/shards/router/NAME.tar     a uniform subset, each sample with its KEY.cluster
        RUN/shards/K/manifest.json     the fingerprint, and count, bytes and SHA-256 of each of its tars
        RUN/clusters.png               some images of each cluster
        RUN/logs/cluster.skipped.csv   samples that cannot be used, if there are any

As in the paper (section 4.1): features to `fine` centroids by k-means, those to K coarse ones by k-means again, each image to
the nearest coarse centroid. Run again, it goes on where it stopped. Data and seed determine the partition, whatever the ranks.
Memory is bounded by the k-means sample (256 images a fine centroid), the router's subset (a number each) and one tar's features.
With [features] name = "pixels" no network is needed, and --device does not matter; networks.py has them.
"""
import collections
import contextlib
import csv
import glob
import hashlib
import io
import itertools
import json
import os
import tarfile
from datetime import timedelta

import faiss
import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import networks
import pretrained
import training
from common import (CONFIG, UserError, atomic, barrier, broadcast, differences, flat, gather, make_config, make_parser, on_rank_0, parse, progress,
                    read_manifest, read_toml, script, start, sum_over_ranks, write_toml)
from data import TarWriter, decode, find_tars, picture_grid, scan_tar, square, subset, usable
from features import assign, extractor, nearest

SAMPLE = 256        # images a fine centroid that k-means sees, as in faiss


# ---- features -----------------------------------------------------------------------------------------------------

def extract(path, target, prepare, function, info, config, bar):
    """Writes `target`: features [n,D] f16 of the usable samples of one tar, in its order, and where each sample's bytes are."""
    identity = {"extractor": networks.identity(info), "bytes": os.path.getsize(path), "condition": config.data.condition, "classes": config.data.classes}
    try:
        if os.path.exists(target) and read_metadata(target)["identity"] == identity:
            return
    except (UserError, KeyError, TypeError):
        pass    # damaged: made again
    features, places, images, bad = [], [], [], []
    for sample, _, _, image in usable(path, prepare, 256, config.data, bad):
        if "cluster" in sample.members:
            raise UserError(f"{path} says which cluster its samples are in: it is a shard of a run; --data takes the tars that a run is made of", local=True)
        images.append(image)
        places.append((sample.start, sample.end - sample.start))
        if len(images) == 256:
            features.append(function(images))
            bar.update(len(images))
            images = []
    features = np.concatenate(features + [function(images)]).astype(np.float16)
    bar.update(len(images))
    offsets, lengths = np.array(places, np.int64).reshape(-1, 2).T.copy()
    with atomic(target) as temporary:
        save_file({"features": features, "offsets": offsets, "lengths": lengths}, temporary,
                  metadata={"nanoddm": json.dumps({"identity": identity, "images": len(features), "skipped": bad}, sort_keys=True)})


def _read(file, offset, size):
    file.seek(offset)
    return file.read(size)


def read_metadata(path):
    try:
        with safe_open(path, framework="np") as f:
            return json.loads(f.metadata()["nanoddm"])
    except Exception as error:      # safetensors raises its own kinds
        raise UserError(f"{path} is damaged, or none of ours ({error}): delete it to make it anew") from None


# ---- clusters -----------------------------------------------------------------------------------------------------

def k_means(points, k, seed):
    """-> centroids [k,D] float32. One thread: faiss's sums depend on how many there are, torchrun's ranks get one each."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    kmeans = faiss.Kmeans(points.shape[1], k, niter=20, nredo=3 if len(points) < 100_000 else 1, seed=seed,
                          min_points_per_centroid=1, max_points_per_centroid=len(points))
    kmeans.train(points)
    faiss.omp_set_num_threads(threads)
    return kmeans.centroids


def find_centroids(files, counts, fine, config):
    """k-means twice, on a uniform sample of the features -> {fine_centroids, coarse_centroids, fine_to_coarse}."""
    K, seed, total = config.cluster.experts, config.cluster.seed, sum(counts)
    chosen, first, points = subset(total, SAMPLE * fine, seed, 1), 0, []
    for file, n in zip(files, counts):
        rows = chosen[np.searchsorted(chosen, first):np.searchsorted(chosen, first + n)] - first
        points.append(load_file(file)["features"][rows].astype(np.float32))
        first += n
    fine_centroids = k_means(np.concatenate(points), fine, seed)
    coarse_centroids = k_means(fine_centroids, K, seed)
    return {"fine_centroids": fine_centroids, "coarse_centroids": coarse_centroids,
            "fine_to_coarse": nearest(fine_centroids, coarse_centroids).astype(np.int64)}


def balance(clusters, sizes, share):
    """Moves whole fine clusters (of sizes [F]) from coarse ones with more than `share` of all images, each time the one whose
    centroid's squared distance to its coarse one grows least. Changes fine_to_coarse; -> what it did, in words.

    Not in the paper. UserError where no move is left.
    """
    home, distance = clusters["fine_to_coarse"], ((clusters["fine_centroids"][:, None].astype(np.float64) - clusters["coarse_centroids"][None]) ** 2).sum(2)     # [F,K]
    K, F, total = len(clusters["coarse_centroids"]), len(home), int(sizes.sum())
    most = share * total
    before, cost = home.copy(), lambda: float((sizes * distance[np.arange(F), home]).sum() / total)
    old = cost()
    while True:
        held = np.bincount(home, weights=sizes, minlength=K)
        over = held > most
        if not over.any():
            break
        added = distance - distance[np.arange(F), home][:, None]        # per image
        allowed = (over[home] & (sizes > 0))[:, None] & (held[None] + sizes[:, None] <= most)
        if not allowed.any():
            raise UserError(f"cluster.balance = {share} cannot be reached: cluster {held.argmax()} keeps {held.max() / total:.1%} of the images in fine clusters that "
                            f"fit nowhere else. Allow more, or give cluster.fine more than {F}")
        f, k = np.unravel_index(np.where(allowed, added, np.inf).argmin(), added.shape)
        home[f] = k
    moved = home != before
    return (f"balance: {moved.sum()} of {F} fine clusters moved, with {sizes[moved].sum() / total:.1%} of the images; the mean squared distance of a fine centroid "
            f"to its coarse one, weighted by images, grew from {old:.5f} to {cost():.5f} ({cost() / old - 1:+.1%})" if old else "balance: nothing to move")


def fingerprint(clusters, config, info):
    """Names a clustering: whatever is trained on its shards carries this. Counts are left out, they grow when data is added."""
    digest = hashlib.sha256(json.dumps([config.cluster.assign, config.cluster.seed, networks.identity(info)], sort_keys=True).encode())
    for name in ("fine_centroids", "coarse_centroids", "fine_to_coarse"):
        digest.update(np.ascontiguousarray(clusters[name]).tobytes())
    return digest.hexdigest()[:16]


# ---- partition ----------------------------------------------------------------------------------------------------

def describe_tar(path):
    """A shard that an interrupted call wrote, as the manifest has it."""
    with open(path, "rb") as f:
        return {"samples": sum(1 for _ in scan_tar(path)), "bytes": os.path.getsize(path), "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def partition(path, name, folders, manifests, features_file, clusters, for_router, config):
    """Copies the samples of one tar to the shards of their clusters, and those with the numbers for_router to the router's, too.

    folders: RUN/shards/0, 1, ..., router. -> what the manifest of each is to say of its part of the tar.
    """
    targets = [os.path.join(folder, f"{name}.tar") for folder in folders]
    source = {"source": os.path.getsize(path)}
    if all(map(os.path.exists, targets)):
        return [manifest["tars"].get(f"{name}.tar") or describe_tar(target) | source for manifest, target in zip(manifests, targets)]
    table, for_router = load_file(features_file), set(for_router.tolist())
    labels = assign(table["features"], name, clusters, config).tolist()
    with contextlib.ExitStack() as stack:       # a shard appears when it is whole
        file = stack.enter_context(open(path, "rb"))
        writers = [stack.enter_context(TarWriter(target)) for target in targets]
        for i, (offset, length, k) in enumerate(zip(table["offsets"].tolist(), table["lengths"].tolist(), labels)):
            blocks = _read(file, offset, length)
            writers[k].add_raw(blocks)
            if i in for_router:
                with tarfile.open(fileobj=io.BytesIO(blocks)) as tar:
                    folder, slash, stem = tar.next().name.rpartition("/")
                writers[-1].add_raw(blocks)
                writers[-1].add(f"{folder}{slash}{stem.partition('.')[0]}.cluster", str(k).encode())
    counts = [labels.count(k) for k in range(config.cluster.experts)] + [len(for_router)]
    return [{"samples": n, "bytes": writer.bytes, "sha256": writer.digest.hexdigest()} | source for n, writer in zip(counts, writers)]


def write_manifests(folders, manifests, mark, parts):
    """parts: {name of a tar: what partition says of it}; they join what is in the manifests already."""
    for i, (folder, manifest) in enumerate(zip(folders, manifests)):
        tars = manifest["tars"] | {f"{name}.tar": entries[i] for name, entries in parts.items()}
        with atomic(os.path.join(folder, "manifest.json")) as temporary, open(temporary, "w") as f:
            json.dump({"fingerprint": mark, "shard": os.path.basename(folder), "tars": dict(sorted(tars.items()))}, f, indent=1)
        manifest["tars"] = tars


def read_manifests(folders, mark):
    """Those that are there; empty ones for the others. UserError if one is of another clustering."""
    manifests = [read_manifest(folder) if os.path.exists(os.path.join(folder, "manifest.json")) else {"fingerprint": mark, "tars": {}} for folder in folders]
    if other := [folder for folder, manifest in zip(folders, manifests) if manifest["fingerprint"] != mark]:
        raise UserError(f"{other[0]} is a shard of another clustering, {read_manifest(other[0])['fingerprint']}, this one is {mark}: remove it, or use another --run")
    return manifests


def check_skipped(run, names, about, most, ranks):
    """Lists the samples that cannot be used in RUN/logs/cluster.skipped.csv. UserError if they are too many."""
    rows = [(name, *row) for name, a in zip(names, about) for row in a.get("skipped", [])]
    images = sum(a["images"] for a in about)
    causes = ", ".join(f"{cause}: {n}" for cause, n in sorted(collections.Counter(cause for *_, cause in rows).items()))
    path = os.path.join(run, "logs", "cluster.skipped.csv")
    if ranks.rank == 0:
        print(f"{images} images in {len(names)} tars" + (f"; {len(rows)} skipped ({path}): {causes}" if rows else ""), flush=True)
        before = []
        if os.path.exists(path):
            with open(path, newline="", errors="replace") as f:
                before = [tuple(row) for row in list(csv.reader(f))[1:] if row[0] not in names]
        if rows or before:
            with atomic(path) as temporary, open(temporary, "w", newline="", errors="replace") as f:
                csv.writer(f).writerows([("tar", "sample", "cause"), *before, *rows])
    if not images and names:
        raise UserError(f"no usable image: {causes or 'the tars are empty'}")
    if len(rows) > 10 and len(rows) > most * (images + len(rows)):
        raise UserError(f"{len(rows)} of {images + len(rows)} samples cannot be used, more than data.max_bad = {most} of them ({causes}): see {path}, or allow more")


def contact_sheet(run, counts):
    """RUN/clusters.png: twelve images of each cluster, from as many of its tars as there are."""
    rows = []
    for k in range(len(counts)):
        tars, row = sorted(glob.glob(os.path.join(glob.escape(run), "shards", str(k), "*.tar"))), []
        tars = [path for path in tars if os.path.getsize(path) > 1024]      # that much is an empty one
        for path in tars[::max(1, len(tars) // 12)]:
            with open(path, "rb") as f:
                for sample in itertools.islice(scan_tar(path), -(-12 // len(tars))):
                    row.append(square(decode(_read(f, *sample.members["image"]), 64), 64))
        rows.append(row[:12])
    captions = [f"{k}: {n:,} ({n / sum(counts):.1%})" for k, n in enumerate(counts)]
    with atomic(os.path.join(run, "clusters.png")) as temporary:
        picture_grid(rows, captions).save(temporary, "PNG")


# ---- the stage ----------------------------------------------------------------------------------------------------

def choose_config(args, given):
    """The run's config: from --config and flags, or what an earlier call wrote. UserError if the two differ."""
    path = os.path.join(args.run, "config.toml")
    old = read_toml(path) if os.path.exists(path) else {}
    config = make_config(read_toml(args.config) if args.config else old, given)
    if not old:
        return config
    free = {name: value for name, value in flat(config).items() if name in ("data.max_bad", "data.workers")}
    old = make_config(old, free)
    if flat(config) != flat(old):
        raise UserError(f"{args.run} was made with another config (there / now: {differences(flat(old), flat(config))}): "
                        f"use another --run, or leave --config and these flags out")
    return old


def not_there(tars, manifests):
    """Those of {name: path} that the partition does not have. UserError if it has another one of that name."""
    for name, path in tars.items():
        entry = next(filter(None, (manifest["tars"].get(f"{name}.tar") for manifest in manifests)), None)
        if entry and entry["source"] != os.path.getsize(path):
            raise UserError(f"{path} is named like a tar that the partition has, of {entry['source']} bytes: rename it, its shards are named after it")
    return {name: path for name, path in tars.items() if not all(f"{name}.tar" in manifest["tars"] for manifest in manifests)}


def main():
    parser = make_parser(__doc__, CONFIG)
    parser.add_argument("--data", nargs="+", required=True, metavar="GLOB", help="the input tars")
    parser.add_argument("--config", default="", metavar="TOML", help="the experiment, see configs/ (default: every key's default)")
    parser.add_argument("--experts", dest="cluster.experts", metavar="K", help="the same as --cluster.experts")
    parser.add_argument("--balance", dest="cluster.balance", metavar="SHARE", help="the same as --cluster.balance: 0.2 or 20%%")
    parser.add_argument("--max-bad", dest="data.max_bad", metavar="SHARE", help="the same as --data.max_bad: 0.01 or 1%%")
    parser.add_argument("--append", action="store_true", help="add these tars to a run that there is: each image to the cluster of the nearest of its frozen centroids, "
                        "in shards of their own beside the others, which are not touched")
    args, given = parse(parser)
    tars = find_tars(args.data)
    config = choose_config(args, given)
    K, c = config.cluster.experts, config.cluster
    if c.balance and c.assign != "fine":
        raise UserError(f"cluster.balance = {c.balance} moves whole fine clusters, so it needs cluster.assign = fine, not {c.assign}")
    if c.balance and not 1 / K <= c.balance <= 1:
        raise UserError(f"cluster.balance = {c.balance} must be between 1 / {K}, the share of {K} equal clusters, and 1")
    space = pretrained.Space(config)      # found out now, not after hours: can the later stages work with this config?
    training.check_config(config, space)
    inputs = hashlib.sha256(json.dumps([(n, os.path.getsize(p)) for n, p in tars.items()]).encode()).hexdigest()[:16]
    clusters_file = os.path.join(args.run, "clusters.safetensors")
    folders = [os.path.join(args.run, "shards", str(k)) for k in [*range(K), "router"]]
    old = read_metadata(clusters_file) if os.path.exists(clusters_file) else None
    if old:
        if not isinstance(old["extractor"], dict):
            raise UserError(f"{clusters_file} is from an earlier version of this project, which named its features otherwise: use another --run")
        if not args.append and old["inputs"] != inputs:
            raise UserError(f"{args.run} was clustered from other data ({old['tars']} tars, now {len(tars)}): use another --run, or --append to add new tars to it")
        if not args.append and old.get("appended"):
            raise UserError(f"{args.run} has had tars appended, its partition is whole: only --append changes it now")
    elif args.append:
        raise UserError(f"--append adds to a run that there is, but {clusters_file} is missing: leave --append out")
    elif glob.glob(os.path.join(glob.escape(args.run), "shards", "*", "*.tar")):
        raise UserError(f"{args.run}/shards holds a partition, but {clusters_file} is missing: delete {args.run}/shards to make it anew")
    manifests = read_manifests(folders, old["fingerprint"] if old else "")
    if args.append:
        if lacking := [folder for folder, manifest in zip(folders, manifests) if not manifest["tars"]]:
            raise UserError(f"{lacking[0]} has no manifest: --append needs the whole partition, as cluster.py left it")
        tars = not_there(tars, manifests)       # an --append that was interrupted goes on with the rest

    ranks = start(args.device, timeout=timedelta(days=7))      # a rank may have a much larger tar than the others
    if ranks.rank == 0:
        for pattern in ("features/*.tmp", "shards/*/*.tmp"):    # of a call that was killed
            for path in glob.glob(os.path.join(glob.escape(args.run), pattern)):
                os.remove(path)
    barrier()
    meant = old.get("networks") if old else space.info      # by the later stages, which use no others
    if not old:
        on_rank_0(space.name_weights)
    prepare, function, info = extractor(config.features, ranks.device)
    if old and networks.identity(old["extractor"]) != networks.identity(info):
        raise UserError(f"{clusters_file} was made with features of {networks.label(old['extractor'])}, now they would be of {networks.label(info)}: "
                        f"give that network (and --features.precision), or use another --run")
    names = list(tars)
    mine = dict.fromkeys(names[ranks.rank::ranks.world])
    features = {name: os.path.join(args.run, "features", f"{name}.safetensors") for name in names}
    bar = progress(desc="features", unit=" images")
    for i, name in enumerate(mine, 1):
        bar.set_postfix_str(f"tar {i} of {len(mine)}" + (" of this rank" if ranks.world > 1 else ""), refresh=False)
        extract(tars[name], features[name], prepare, function, info, config, bar)
    bar.close()
    barrier()

    about = [read_metadata(features[name]) for name in names]
    counts = [a["images"] for a in about]
    check_skipped(args.run, names, about, config.data.max_bad, ranks)
    if old:
        clusters = load_file(clusters_file)
        clusters.pop("counts")
    else:
        fine = min(c.fine, sum(counts) // 39)
        if K > fine:
            raise UserError(f"{K} experts need as many fine clusters, there are {fine} (cluster.fine = {c.fine}, at most a 39th "
                            f"of the {sum(counts)} usable images): fewer --experts, or more data")
        clusters = broadcast(find_centroids([features[n] for n in names], counts, fine, config) if ranks.rank == 0 else None)
        if c.balance:
            sizes = np.zeros(fine, np.int64)
            for name in mine:
                sizes += np.bincount(nearest(load_file(features[name])["features"], clusters["fine_centroids"]), minlength=fine)
            words = balance(clusters, sum_over_ranks(torch.from_numpy(sizes)).numpy(), c.balance)
            if ranks.rank == 0:
                print(words, flush=True)
    mark = fingerprint(clusters, config, info)
    if old and (mark != old["fingerprint"] or len(clusters["coarse_centroids"]) != K):
        raise UserError(f"{args.run}/config.toml has other [cluster] settings than {clusters_file} was made with: use another --run")
    sizes = np.zeros(K, np.int64)
    for name in mine:
        sizes += np.bincount(assign(load_file(features[name])["features"], name, clusters, config), minlength=K)
    sizes = sum_over_ranks(torch.from_numpy(sizes)).tolist()
    if 0 in sizes and not args.append:
        raise UserError(f"cluster {sizes.index(0)} of {K} is empty: fewer --experts, or another --cluster.seed")

    def write_clusters(counts, tars, appended):
        with atomic(clusters_file) as temporary:
            metadata = {"fingerprint": mark, "extractor": info, "seed": c.seed, "assign": c.assign, "inputs": old["inputs"] if old else inputs,
                        "tars": tars, "networks": meant} | ({"appended": appended} if appended else {})
            save_file(clusters | {"counts": np.array(counts, np.int64)}, temporary, metadata={"nanoddm": json.dumps(metadata, sort_keys=True)})

    if ranks.rank == 0 and not args.append:     # only now: a call that failed above leaves no config behind that the next one would have to match
        write_toml(config, os.path.join(args.run, "config.toml"))
        write_clusters(sizes, len(tars), 0)
    barrier()

    # the router's subset is uniform; what is appended keeps its share
    there = [sum(entry["samples"] for file, entry in manifest["tars"].items() if file[:-4] not in tars) for manifest in manifests]
    size, seeds = (round(sum(counts) * there[-1] / sum(there[:-1])), (c.seed, 2, int(inputs, 16))) if args.append else (c.router_images, (c.seed, 2))
    router = subset(sum(counts), size, *seeds)
    first = dict(zip(names, np.cumsum([0, *counts]).tolist()))
    parts = {}
    for name, n in progress([(name, n) for name, n in zip(names, counts) if name in mine], desc="partition, tars"):
        part = router[np.searchsorted(router, first[name]):np.searchsorted(router, first[name] + n)] - first[name]
        parts[name] = partition(tars[name], name, folders, manifests, features[name], clusters, part, config)
    parts = gather(parts)
    if ranks.rank == 0:
        write_manifests(folders, manifests, mark, {name: entries for of_rank in parts for name, entries in of_rank.items()})
        *sizes, in_router = [sum(entry["samples"] for entry in manifest["tars"].values()) for manifest in manifests]
        if args.append:
            every = len(manifests[0]["tars"])
            write_clusters(sizes, every, old.get("appended", 0) + every - old["tars"])
        contact_sheet(args.run, sizes)
        print(f"\ncluster   images   share      fingerprint {mark}")
        for k, n in enumerate(sizes):
            print(f"{k:7d} {n:8d}   {n / sum(sizes):5.1%}   {'#' * round(50 * n / max(sizes))}")
        print(f"router  {in_router:8d}")


if __name__ == "__main__":
    script(main)
