"""Stage 1: images -> features -> k-means -> K partitions of the data, each a folder of tar shards.

    python cluster.py --data 'data/shapes/*.tar' --run-dir runs/demo --config configs/demo.toml
    python cluster.py --data 'data/more/*.tar' --run-dir runs/demo --append
    torchrun --nproc_per_node=8 cluster.py --data 'data/laion/*.tar' --run-dir runs/laion \\
        --config configs/laion.toml --experts 8

reads   the tars, as img2dataset writes them (data.py)
writes  RUN/config.toml                the experiment: --config with the flags over it; later stages
                                       read it
        RUN/features/NAME.safetensors  a feature vector for each usable sample of NAME.tar
        RUN/clusters.safetensors       fine and coarse centroids, counts; its fingerprint names this
                                       clustering
        RUN/shards/K/NAME.tar          the samples of NAME.tar in cluster K, byte for byte
        RUN/shards/router/NAME.tar     a uniform subset, each sample with its KEY.cluster
        RUN/shards/K/manifest.json     the fingerprint, and count, bytes and SHA-256 of each of its
                                       tars, and of its source
        RUN/clusters.png               some images of each cluster
        RUN/logs/cluster.skipped.csv   samples that cannot be used, if there are any

As in the paper (section 4.1): features to `fine_clusters` centroids by k-means, those to K coarse
ones by k-means again, each image to the nearest coarse centroid.

Run again, it resumes where it stopped, and reads again what has changed. What has been clustered
must not change (ddm/partition.py). Data and seed determine the partition, whatever the ranks.
Memory is bounded by the k-means sample (256 images a fine centroid), the router's subset (a number
each) and one tar's features. The features' network is one of ddm/encoders.py; with [features] name
= "pixels" none is needed, and --device does not matter.
"""
import contextlib
import functools
import glob
import hashlib
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import faiss
import numpy as np
import torch
from safetensors.numpy import load_file

from data import decode, square, subset, usable
from ddm import encoders
from ddm.artifacts import write_tensors
from ddm.codec import Space
from ddm.config import check_config, make_parser, parse, write_toml
from ddm.errors import UserError, script
from ddm.features import assign, extractor, nearest
from ddm.files import atomic
from ddm.lock import alone
from ddm.partition import (
    NewFeatures,
    check_call,
    check_sources,
    choose_config,
    existing_shards,
    forget_shards,
    has_features,
    list_tars,
    name_given,
    prepare_folders,
    read_at,
    read_metadata,
    read_partition,
    read_sample,
    write_manifests,
)
from ddm.pictures import image_grid
from ddm.process import barrier, broadcast, gather, on_rank_0, progress, start, sum_over_ranks
from ddm.skipped import check_skipped
from ddm.tars import Source, TarWriter, check_unchanged, find_tars, read_source, scan_tar

# images a fine centroid that k-means sees at most, and that it needs: faiss's own limits
MOST_A_CENTROID = 256
LEAST_A_CENTROID = 39

# images whose features are computed together
BATCH = 256

# a JPEG may be decoded at a fraction of its size, as long as its sides have this many pixels
LEAST_SIDE = 256

# images of a cluster in clusters.png, of this many pixels a side
SHOWN = 12
SHOWN_SIDE = 64


def parser():
    parser = make_parser(__doc__)
    parser.add_argument("--data", nargs="+", required=True, metavar="GLOB", help="the input tars")
    parser.add_argument("--config", default="", metavar="TOML",
                        help="the experiment, see configs/ (default: every key's default)")
    parser.add_argument("--experts", dest="cluster.experts", metavar="K",
                        help="the same as --cluster.experts")
    parser.add_argument("--balance", dest="cluster.balance", metavar="SHARE",
                        help="the same as --cluster.balance: 0.2 or 20%%")
    parser.add_argument("--max-bad", dest="data.max_bad", metavar="SHARE",
                        help="the same as --data.max_bad: 0.01 or 1%%")
    parser.add_argument("--append", action="store_true",
                        help="add these tars to a run that there is: each image to the cluster of "
                             "the nearest of its frozen centroids, in shards of their own beside "
                             "the others, which are not touched")
    return parser


def main():
    # parse and check: can the later stages work with this config? Found out now, not after hours
    args, given = parse(parser())
    unused = []
    tars = list_tars(find_tars(args.data, unused), args.run_dir)
    config = choose_config(args, given)
    check_balance(config.cluster)
    space = Space(config)
    check_config(config, space)
    partition = read_partition(args.run_dir, config.cluster.experts)
    check_call(partition, tars, args.append)

    with alone(os.path.join(args.run_dir, "cluster.lock"), args.run_dir):
        # open; a rank may have a much larger tar than the others, which wait for it
        ranks = start(args.device, timeout=timedelta(days=7))
        on_rank_0(functools.partial(prepare_folders, args.run_dir))
        network = open_network(partition, config, ranks.device)
        if partition.clustering:
            check_sources(partition, tars, args.append, ranks)
        else:
            on_rank_0(space.name_weights)

        # images -> features; an --append that was interrupted resumes with the rest
        new = partition.missing(tars) if args.append else tars
        extract_all(new, network, partition, config=config, append=args.append, ranks=ranks)
        described = [read_metadata(tar.features) for tar in new]
        check_skipped(args.run_dir, new, described, unused=unused, config=config, ranks=ranks)
        counts = [about["images"] for about in described]
        inputs = name_given(partition, tars, dict(zip(new, described, strict=True)))

        # features -> centroids, once for all
        if partition.clustering:
            clusters = load_clusters(partition, config, network)
        else:
            clusters = find_clusters(new, counts, config=config, ranks=ranks)
        clustering = describe_clusters(clusters, partition, config=config, network=network,
                                       inputs=inputs, networks=space.info)
        if not args.append:
            sizes = count_clusters(new, clusters, config, ranks)
            # only now: a call that failed above leaves no config that the next would have to match
            if ranks.rank == 0:
                write_toml(config, os.path.join(args.run_dir, "config.toml"))
                write_clusters(partition, clusters, sizes, clustering | {"tars": len(tars)})
            barrier()

        # centroids -> shards
        router = choose_for_router(partition, new, counts, config=config, append=args.append,
                                   inputs=inputs)
        entries = write_shards(new, counts, partition, clusters=clusters, router=router,
                               config=config, ranks=ranks)

        # report
        if ranks.rank == 0:
            write_manifests(partition, clustering["fingerprint"], entries)
            if args.append:
                update_counts(partition, clusters, clustering)
            report(partition, clustering["fingerprint"])


# ---- before the work -----------------------------------------------------------------------------

def check_balance(settings):
    """UserError if [cluster] asks for a balance that cannot be."""
    K = settings.experts
    if settings.balance and settings.assign != "fine":
        raise UserError(f"cluster.balance = {settings.balance} moves whole fine clusters, so it "
                        f"needs cluster.assign = fine, not {settings.assign}")
    if settings.balance and not 1 / K <= settings.balance <= 1:
        raise UserError(f"cluster.balance = {settings.balance} must be between 1 / {K}, the share "
                        f"of {K} equal clusters, and 1")


def open_network(partition, config, device):
    """What makes the features (ImageFeatures). UserError if the run was clustered by another."""
    network = extractor(config.features, device)
    if partition.clustering is None:
        return network

    meant = partition.clustering["extractor"]
    if encoders.identity(meant) != encoders.identity(network.info):
        raise UserError(
            f"{partition.clusters_file} was made with features of {encoders.label(meant)}, now "
            f"they would be of {encoders.label(network.info)}: give that network (and "
            f"--features.precision), or use another --run-dir")
    return network


# ---- images -> features --------------------------------------------------------------------------

def extract_all(tars, network, partition, *, config, append, ranks):
    """Makes the features files of the tars, of which each rank takes every world-th."""
    mine = tars[ranks.rank::ranks.world]
    of_rank = " of this rank" if ranks.world > 1 else ""
    # no sample may join a partition that is there already
    look_again = append or not partition.clustering

    bar = progress(desc="features", unit=" images")
    for i, tar in enumerate(mine, 1):
        bar.set_postfix_str(f"tar {i} of {len(mine)}{of_rank}", refresh=False)
        if extract(tar, network, config, look_again=look_again, bar=bar):
            forget_shards(partition, tar)
    bar.close()
    barrier()


def extract(tar, network, config, *, look_again, bar):
    """Writes features [n,D] f16 of the usable samples of one tar, in its order; where each sample's
    bytes are; and a checksum of its key. -> whether it did.

    A file of the same bytes, features and condition stays as it is, unless a sample that was
    skipped can be used now (look_again).
    """
    identity = {
        "extractor": encoders.identity(network.info),
        "condition": config.data.condition,
        "classes": config.data.classes,
    }
    if has_features(tar, identity, look_again=look_again, settings=config.data):
        return False

    made = NewFeatures(tar)
    images = []
    with ThreadPoolExecutor(1) as beside:
        # the digest meanwhile: hashing lets go of the interpreter
        source = beside.submit(read_source, tar.path)
        for sample, _, _, image in usable(tar.path, network.prepare, LEAST_SIDE,
                                          settings=config.data, bad=made.skipped, notes=made.notes):
            if "cluster" in sample.members:
                raise UserError(
                    f"{tar.path} says which cluster its samples are in: it is a shard of a run; "
                    f"--data takes the tars that a run is made of", local=True)

            made.add(sample)
            images.append(image)
            if len(images) == BATCH:
                made.features.append(network.features(images))
                bar.update(len(images))
                images = []
        source = source.result()

    # the last batch, which may be empty: [0,D]
    made.features.append(network.features(images))
    bar.update(len(images))
    made.write(identity, source)
    return True


# ---- features -> centroids -----------------------------------------------------------------------

def k_means(points, k, seed):
    """points [n,D] float32 -> centroids [k,D] float32."""
    # one thread: faiss's sums depend on how many there are, and torchrun's ranks get one each
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)

    # one start may be a bad one, and on few points another costs little
    attempts = 3 if len(points) < 100_000 else 1
    kmeans = faiss.Kmeans(points.shape[1], k, niter=20, nredo=attempts, seed=seed,
                          min_points_per_centroid=1, max_points_per_centroid=len(points))
    kmeans.train(points)
    faiss.omp_set_num_threads(threads)
    return kmeans.centroids


def find_clusters(tars, counts, *, config, ranks):
    """k-means twice -> {fine_centroids [F,D] f32, coarse_centroids [K,D] f32, fine_to_coarse [F]
    i64}, on all ranks; balanced if cluster.balance says so. UserError if there are too few images.

    counts: images of each tar.
    """
    settings = config.cluster
    K = settings.experts
    total = sum(counts)
    F = min(settings.fine_clusters, total // LEAST_A_CENTROID)
    if K > F:
        raise UserError(
            f"{K} experts need as many fine clusters, there are {F} (cluster.fine_clusters = "
            f"{settings.fine_clusters}, at most a {LEAST_A_CENTROID}th of the {total} usable "
            f"images): fewer --experts, or more data")

    # the others wait, so that all have the same centroids to the bit
    clusters = None
    if ranks.rank == 0:
        points = choose_points(tars, counts, MOST_A_CENTROID * F, settings.seed)
        fine = k_means(points, F, settings.seed)                        # [F,D]
        coarse = k_means(fine, K, settings.seed)                        # [K,D]
        clusters = {
            "fine_centroids": fine,
            "coarse_centroids": coarse,
            "fine_to_coarse": nearest(fine, coarse).astype(np.int64),   # [F]
        }
    clusters = broadcast(clusters)

    if settings.balance:
        # the fine clusters' sizes: each rank counts those of its tars
        sizes = np.zeros(F, np.int64)
        for tar in tars[ranks.rank::ranks.world]:
            labels = nearest(load_file(tar.features)["features"], clusters["fine_centroids"])
            sizes += np.bincount(labels, minlength=F)
        sizes = sum_over_ranks(torch.from_numpy(sizes)).numpy()
        words = balance(clusters, sizes, settings.balance)
        if ranks.rank == 0:
            print(words, flush=True)
    return clusters


def choose_points(tars, counts, size, seed):
    """A uniform sample of the features of all tars, [size,D] float32."""
    chosen = subset(sum(counts), size, seed, 1)
    # tar by tar: all features together may not fit into memory
    points = []
    for tar, numbers in zip(tars, numbers_by_tar(chosen, counts), strict=True):
        points.append(load_file(tar.features)["features"][numbers].astype(np.float32))
    return np.concatenate(points)


def numbers_by_tar(numbers, counts):
    """Sorted numbers of samples, counted through all tars -> for each tar those in it, counted from
    its first sample.
    """
    parts = []
    first = 0
    for count in counts:
        begin, end = np.searchsorted(numbers, [first, first + count])
        parts.append(numbers[begin:end] - first)
        first += count
    return parts


def balance(clusters, sizes, share):
    """Moves whole fine clusters, of `sizes` [F], from coarse ones with more than `share` of all
    images: each time the one whose centroid's squared distance to its coarse one grows least.

    Not in the paper. Changes clusters["fine_to_coarse"]; -> what it did, in words. UserError where
    no move is left.
    """
    home = clusters["fine_to_coarse"]                                   # [F]
    fine = clusters["fine_centroids"].astype(np.float64)                # [F,D]
    coarse = clusters["coarse_centroids"]                               # [K,D]
    distance = ((fine[:, None] - coarse[None]) ** 2).sum(2)             # [F,K]
    K = len(coarse)
    F = len(fine)
    total = int(sizes.sum())
    most = share * total

    before = home.copy()
    of_home = distance[np.arange(F), home]                              # [F]
    old_mean = float((sizes * of_home).sum() / total)
    while True:
        held = np.bincount(home, weights=sizes, minlength=K)            # [K]
        too_large = held > most
        if not too_large.any():
            break

        # to move an empty one would help nobody
        may_leave = too_large[home] & (sizes > 0)                       # [F]
        has_room = held[None] + sizes[:, None] <= most                  # [F,K]
        allowed = may_leave[:, None] & has_room
        if not allowed.any():
            raise UserError(
                f"cluster.balance = {share} cannot be reached: cluster {held.argmax()} keeps "
                f"{held.max() / total:.1%} of the images in fine clusters that fit nowhere else. "
                f"Allow more, or give cluster.fine_clusters more than {F}")

        # what an image's squared distance grows by
        added = distance - of_home[:, None]                             # [F,K]
        f, k = np.unravel_index(np.where(allowed, added, np.inf).argmin(), added.shape)
        home[f] = k
        of_home = distance[np.arange(F), home]

    mean = float((sizes * of_home).sum() / total)
    moved = home != before
    if not moved.any():
        return "balance: nothing to move"
    grown = f" ({mean / old_mean - 1:+.1%})" if old_mean else ""
    return (f"balance: {moved.sum()} of {F} fine clusters moved, with "
            f"{sizes[moved].sum() / total:.1%} of the images; the mean squared distance of a fine "
            f"centroid to its coarse one, weighted by images, grew from {old_mean:.5f} to "
            f"{mean:.5f}{grown}")


def fingerprint(clusters, config, info):
    """Names a clustering: whatever is trained on its shards carries this. Counts are left out, they
    grow when data is added. info: the network's.
    """
    rule = [config.cluster.assign, config.cluster.seed, encoders.identity(info)]
    digest = hashlib.sha256(json.dumps(rule, sort_keys=True).encode())
    for name in ("fine_centroids", "coarse_centroids", "fine_to_coarse"):
        digest.update(np.ascontiguousarray(clusters[name]).tobytes())
    return digest.hexdigest()[:16]


def load_clusters(partition, config, network):
    """What find_clusters found in an earlier call. UserError if the config is not of it."""
    clusters = load_file(partition.clusters_file)
    # they grow, and are written anew
    del clusters["counts"]
    now = fingerprint(clusters, config, network.info)
    K = len(clusters["coarse_centroids"])
    if now != partition.clustering["fingerprint"] or K != config.cluster.experts:
        raise UserError(
            f"{partition.run_dir}/config.toml has other [cluster] settings than "
            f"{partition.clusters_file} was made with: use another --run-dir")
    return clusters


def describe_clusters(clusters, partition, *, config, network, inputs, networks):
    """What clusters.safetensors is to say of itself, but for the number of tars.

    network: its ImageFeatures; inputs: names the data; networks: those of the later stages, which
    may use no others. What an earlier call has said of the latter two holds.
    """
    earlier = partition.clustering or {"inputs": inputs, "networks": networks}
    return {
        "fingerprint": fingerprint(clusters, config, network.info),
        "extractor": network.info,
        "seed": config.cluster.seed,
        "assign": config.cluster.assign,
        "inputs": earlier["inputs"],
        "networks": earlier["networks"],
    }


def write_clusters(partition, clusters, counts, about):
    """counts: images of each cluster."""
    counts = np.array(counts, np.int64)
    write_tensors(partition.clusters_file, clusters | {"counts": counts}, about)


# ---- centroids -> shards -------------------------------------------------------------------------

def count_clusters(tars, clusters, config, ranks):
    """Images of each cluster [K]. UserError if one is empty."""
    K = config.cluster.experts
    sizes = np.zeros(K, np.int64)
    for tar in tars[ranks.rank::ranks.world]:
        labels = assign(load_file(tar.features)["features"], tar.name, clusters, config)
        sizes += np.bincount(labels, minlength=K)
    sizes = sum_over_ranks(torch.from_numpy(sizes)).tolist()

    if 0 in sizes:
        raise UserError(f"cluster {sizes.index(0)} of {K} is empty: fewer --experts, or another "
                        f"--cluster.seed")
    return sizes


def choose_for_router(partition, tars, counts, *, config, append, inputs):
    """Sorted numbers of the samples of these tars that join the router's subset, which is uniform.

    What is appended keeps the subset's share, and is chosen by `inputs`, which names its data.
    """
    total = sum(counts)
    if not append:
        return subset(total, config.cluster.router_images, config.cluster.seed, 2)

    # an interrupted --append may have written some of these tars' shards
    *sizes, in_router = partition.sizes(without={tar.name for tar in tars})
    size = round(total * in_router / sum(sizes))
    return subset(total, size, config.cluster.seed, 2, int(inputs, 16))


def write_shards(tars, counts, partition, *, clusters, router, config, ranks):
    """Writes the shards of the tars, of which each rank takes every world-th. -> {name: what the
    manifest of each folder is to say of it}, of all ranks.

    router: sorted numbers of the samples that go to the router's shard, too.
    """
    work = list(zip(tars, numbers_by_tar(router, counts), strict=True))
    entries = {}
    for tar, for_router in progress(work[ranks.rank::ranks.world], desc="partition, tars"):
        entries[tar.name] = split_tar(tar, partition, clusters=clusters,
                                      for_router=for_router, config=config)

    every = {}
    for of_rank in gather(entries):
        every |= of_rank
    return every


def split_tar(tar, partition, *, clusters, for_router, config):
    """Copies the samples of one tar to the shards of their clusters, and those with the numbers
    for_router to the router's, too.

    -> what the manifest of each folder is to say of its part of the tar. UserError if the tar is
    not the one that the features were made of.
    """
    # an interrupted call may have made them
    source = Source(**read_metadata(tar.features)["source"])
    entries = existing_shards(partition, tar, source)
    if entries:
        return entries

    table = load_file(tar.features)
    labels = assign(table["features"], tar.name, clusters, config).tolist()
    # lists: a loop over numpy's scalars is many times slower
    columns = [table[name].tolist() for name in ("offsets", "lengths", "keys")]
    for_router = set(for_router.tolist())

    # here and at the end: the tar stays the same in between
    check_unchanged(tar.path, source)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(tar.path, "rb"))
        # a shard appears when it is whole
        writers = []
        for folder in partition.folders:
            writer = TarWriter(os.path.join(folder, f"{tar.name}.tar"))
            writers.append(stack.enter_context(writer))

        for i, (offset, length, check, k) in enumerate(zip(*columns, labels, strict=True)):
            key, blocks = read_sample(file, tar, offset=offset, length=length, check=check)
            writers[k].add_raw(blocks)
            # the last is the router's, which learns to tell k
            if i in for_router:
                writers[-1].add_raw(blocks)
                writers[-1].add(f"{key}.cluster", str(k).encode())
        check_unchanged(tar.path, source)

    counts = [labels.count(k) for k in range(config.cluster.experts)]
    entries = []
    for count, writer in zip([*counts, len(for_router)], writers, strict=True):
        entries.append({"samples": count, "bytes": writer.bytes,
                        "sha256": writer.digest.hexdigest(), "source": source.sha256})
    return entries


# ---- what came of it -----------------------------------------------------------------------------

def update_counts(partition, clusters, about):
    """clusters.safetensors after an --append, whose tars are in the manifests now."""
    *sizes, _ = partition.sizes()
    earlier = partition.clustering
    tars = len(partition.manifests[0]["tars"])
    about = about | {"tars": tars}
    appended = earlier.get("appended", 0) + tars - earlier["tars"]
    if appended:
        about["appended"] = appended
    write_clusters(partition, clusters, sizes, about)


def report(partition, mark):
    """Prints how large the clusters are, and draws clusters.png."""
    *sizes, in_router = partition.sizes()
    contact_sheet(partition, sizes)
    print(f"\ncluster   images   share      fingerprint {mark}")
    for k, n in enumerate(sizes):
        bar = "#" * round(50 * n / max(sizes))
        print(f"{k:7d} {n:8d}   {n / sum(sizes):5.1%}   {bar}")
    print(f"router  {in_router:8d}")


def contact_sheet(partition, sizes):
    """RUN/clusters.png: some images of each cluster, from as many of its tars as there are."""
    rows = []
    captions = []
    for k, n in enumerate(sizes):
        rows.append(first_images(partition.folders[k], SHOWN))
        captions.append(f"{k}: {n:,} ({n / sum(sizes):.1%})")
    with atomic(os.path.join(partition.run_dir, "clusters.png")) as temporary:
        image_grid(rows, captions).save(temporary, "PNG")


def first_images(folder, count):
    """The first images of the tars of a folder, `count` in all, [S,S,3] uint8 each."""
    tars = sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar")))
    # an empty one has two blocks
    tars = [path for path in tars if os.path.getsize(path) > 1024]

    images = []
    for path in tars[::max(1, len(tars) // count)]:
        with open(path, "rb") as file:
            # rounded up
            of_tar = -(-count // len(tars))
            for sample in itertools.islice(scan_tar(path), of_tar):
                offset, size = sample.members["image"]
                image = decode(read_at(file, offset, size), SHOWN_SIDE)
                images.append(square(image, SHOWN_SIDE))
    return images[:count]


if __name__ == "__main__":
    script(main)
