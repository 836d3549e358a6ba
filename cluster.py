"""Stage 1: images -> features -> k-means -> K partitions of the data, each a folder of tar shards.

    python cluster.py --data 'data/shapes/*.tar' --run runs/demo --config configs/demo.toml
    torchrun --nproc_per_node=8 -- cluster.py --data 'data/laion/*.tar' --run runs/laion --config configs/laion.toml --experts 8

reads   the tars, as img2dataset writes them (data.py)
writes  RUN/config.toml                the experiment: --config with the flags over it; later stages read it
        RUN/features/NAME.safetensors  a feature vector for each usable sample of NAME.tar
        RUN/clusters.safetensors       fine and coarse centroids, counts; its fingerprint names this clustering
        RUN/shards/K/NAME.tar          the samples of NAME.tar in cluster K, byte for byte
        RUN/shards/router/NAME.tar     a uniform subset, each sample with its KEY.cluster
        RUN/clusters.png               some images of each cluster

As in the paper (section 4.1): features to `fine` centroids by k-means, those to K coarse ones by k-means again, each image to
the nearest coarse centroid. Run again, it goes on where it stopped. Data and seed determine the partition, whatever the ranks.
Memory is bounded by the k-means sample (256 images a fine centroid), the router's subset (a number each) and one tar's features.
With [features] name = "pixels" no network is needed, and --device does not matter; networks.py has them.
"""
import collections
import contextlib
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
from common import (CONFIG, UserError, atomic, barrier, broadcast, differences, flat, make_config, make_parser, on_rank_0, parse, progress,
                    read_toml, script, start, sum_over_ranks, write_toml)
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
    except UserError:
        pass    # damaged: made again
    features, places, images, bad = [], [], [], collections.Counter()
    for sample, _, _, image in usable(path, prepare, 256, config.data, bad):
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
                  metadata={"nanoddm": json.dumps({"identity": identity, "images": len(features), "bad": bad}, sort_keys=True)})


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


def fingerprint(clusters, config, info):
    """Names a clustering: whatever is trained on its shards carries this. Counts are left out, they grow when data is added."""
    digest = hashlib.sha256(json.dumps([config.cluster.assign, config.cluster.seed, networks.identity(info)], sort_keys=True).encode())
    for name in ("fine_centroids", "coarse_centroids", "fine_to_coarse"):
        digest.update(np.ascontiguousarray(clusters[name]).tobytes())
    return digest.hexdigest()[:16]


# ---- partition ----------------------------------------------------------------------------------------------------

def partition(path, name, run, features_file, clusters, for_router, config):
    """Copies the samples of one tar to the shards of their clusters, and those with the numbers for_router to the router's, too."""
    targets = [os.path.join(run, "shards", str(k), f"{name}.tar") for k in [*range(config.cluster.experts), "router"]]
    if all(map(os.path.exists, targets)):
        return
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
    old = make_config(old)
    if flat(config) != flat(old):
        raise UserError(f"{args.run} was made with another config (there / now: {differences(flat(old), flat(config))}): "
                        f"use another --run, or leave --config and these flags out")
    return old


def main():
    parser = make_parser(__doc__, CONFIG)
    parser.add_argument("--data", nargs="+", required=True, metavar="GLOB", help="the input tars")
    parser.add_argument("--config", default="", metavar="TOML", help="the experiment, see configs/ (default: every key's default)")
    parser.add_argument("--experts", dest="cluster.experts", metavar="K", help="the same as --cluster.experts")
    args, given = parse(parser)
    tars = find_tars(args.data)
    config = choose_config(args, given)
    K = config.cluster.experts
    space = pretrained.Space(config)      # found out now, not after hours: can the later stages work with this config?
    training.model_config(config, "model", space), training.model_config(config, "router", space, K)
    inputs = hashlib.sha256(json.dumps([(n, os.path.getsize(p)) for n, p in tars.items()]).encode()).hexdigest()[:16]
    clusters_file = os.path.join(args.run, "clusters.safetensors")
    if os.path.exists(clusters_file):
        old = read_metadata(clusters_file)
        if not isinstance(old["extractor"], dict):
            raise UserError(f"{clusters_file} is from an earlier version of this project, which named its features otherwise: use another --run")
        if old["inputs"] != inputs:
            raise UserError(f"{args.run} was clustered from other data ({old['tars']} tars, now {len(tars)}): use another --run")
    elif glob.glob(os.path.join(glob.escape(args.run), "shards", "*", "*.tar")):
        raise UserError(f"{args.run}/shards holds a partition, but {clusters_file} is missing: delete {args.run}/shards to make it anew")

    ranks = start(args.device, timeout=timedelta(days=7))      # a rank may have a much larger tar than the others
    if ranks.rank == 0:
        for pattern in ("features/*.tmp", "shards/*/*.tmp"):    # of a call that was killed
            for path in glob.glob(os.path.join(glob.escape(args.run), pattern)):
                os.remove(path)
    barrier()
    meant = old.get("networks") if os.path.exists(clusters_file) else space.info      # by the later stages, which use no others
    if not os.path.exists(clusters_file):
        on_rank_0(space.name_weights)
    prepare, function, info = extractor(config.features, ranks.device)
    if os.path.exists(clusters_file) and networks.identity(old["extractor"]) != networks.identity(info):
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
    bad = sum((collections.Counter(a["bad"]) for a in about), collections.Counter())
    if ranks.rank == 0:
        print(f"{sum(counts)} images in {len(names)} tars" + "".join(f"; {n} skipped: {cause}" for cause, n in sorted(bad.items())), flush=True)
    if os.path.exists(clusters_file):
        clusters = load_file(clusters_file)
    else:
        if not sum(counts):
            raise UserError(f"no usable image for data.condition = {config.data.condition}: " + ", ".join(f"{cause}: {n}" for cause, n in bad.items()))
        fine = min(config.cluster.fine, sum(counts) // 39)
        if K > fine:
            raise UserError(f"{K} experts need as many fine clusters, there are {fine} (cluster.fine = {config.cluster.fine}, at most a 39th "
                            f"of the {sum(counts)} usable images): fewer --experts, or more data")
        clusters = broadcast(find_centroids([features[n] for n in names], counts, fine, config) if ranks.rank == 0 else None)
    mark = fingerprint(clusters, config, info)
    if os.path.exists(clusters_file) and (mark != old["fingerprint"] or len(clusters["coarse_centroids"]) != K):
        raise UserError(f"{args.run}/config.toml has other [cluster] settings than {clusters_file} was made with: use another --run")
    sizes = np.zeros(K, np.int64)
    for name in mine:
        sizes += np.bincount(assign(load_file(features[name])["features"], name, clusters, config), minlength=K)
    sizes = sum_over_ranks(torch.from_numpy(sizes)).tolist()
    if 0 in sizes:
        raise UserError(f"cluster {sizes.index(0)} of {K} is empty: fewer --experts, or another --cluster.seed")
    if ranks.rank == 0:     # only now: a call that failed above leaves no config behind that the next one would have to match
        write_toml(config, os.path.join(args.run, "config.toml"))
        with atomic(clusters_file) as temporary:
            metadata = {"fingerprint": mark, "extractor": info, "seed": config.cluster.seed, "assign": config.cluster.assign, "inputs": inputs,
                        "tars": len(tars), "networks": meant}
            save_file(clusters | {"counts": np.array(sizes, np.int64)}, temporary, metadata={"nanoddm": json.dumps(metadata, sort_keys=True)})
    barrier()

    router = subset(sum(counts), config.cluster.router_images, config.cluster.seed, 2)
    first = dict(zip(names, np.cumsum([0, *counts]).tolist()))
    for name, n in progress([(name, n) for name, n in zip(names, counts) if name in mine], desc="partition, tars"):
        part = router[np.searchsorted(router, first[name]):np.searchsorted(router, first[name] + n)] - first[name]
        partition(tars[name], name, args.run, features[name], clusters, part, config)
    barrier()
    if ranks.rank == 0:
        contact_sheet(args.run, sizes)
        print(f"\ncluster   images   share      fingerprint {mark}")
        for k, n in enumerate(sizes):
            print(f"{k:7d} {n:8d}   {n / sum(sizes):5.1%}   {'#' * round(50 * n / max(sizes))}")
        print(f"router  {len(router):8d}")


if __name__ == "__main__":
    script(main)
