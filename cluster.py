"""Stage 1: images -> features -> k-means -> K partitions of the data, each a folder of tar shards.

    python cluster.py --data 'data/shapes/*.tar' --run-dir runs/demo --config configs/demo.toml
    python cluster.py --data 'data/more/*.tar' --run-dir runs/demo --append
    torchrun --nproc_per_node=8 cluster.py --data 'data/laion/*.tar' --run-dir runs/laion --config configs/laion.toml --experts 8

reads   the tars, as img2dataset writes them (data.py)
writes  RUN/config.toml                the experiment: --config with the flags over it; later stages read it
        RUN/features/NAME.safetensors  a feature vector for each usable sample of NAME.tar
        RUN/clusters.safetensors       fine and coarse centroids, counts; its fingerprint names this clustering
        RUN/shards/K/NAME.tar          the samples of NAME.tar in cluster K, byte for byte
        RUN/shards/router/NAME.tar     a uniform subset, each sample with its KEY.cluster
        RUN/shards/K/manifest.json     the fingerprint, and count, bytes and SHA-256 of each of its tars, and of its source
        RUN/clusters.png               some images of each cluster
        RUN/logs/cluster.skipped.csv   samples that cannot be used, if there are any

As in the paper (section 4.1): features to `fine` centroids by k-means, those to K coarse ones by k-means again, each image to
the nearest coarse centroid. Run again, it goes on where it stopped, and reads again what has changed. What has been clustered must not
change: its bytes are known by their SHA-256, read anew where size or dates differ. Data and seed determine the partition, whatever the ranks.
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
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import faiss
import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from data import check_members, decode, square, subset, usable
from ddm import encoders, found
from ddm.artifacts import read_description
from ddm.codec import Space
from ddm.config import (
    check_config,
    differences,
    flat,
    make_config,
    make_parser,
    parse,
    read_toml,
    write_toml,
)
from ddm.errors import UserError, script
from ddm.features import assign, extractor, nearest
from ddm.files import atomic, try_folder, write_text
from ddm.pictures import picture_grid
from ddm.process import barrier, broadcast, gather, on_rank_0, progress, start, sum_over_ranks
from ddm.run import CLUSTERING, alone, read_manifest
from ddm.tars import (
    BadSample,
    Notes,
    SOURCE,
    Source,
    TarWriter,
    check_unchanged,
    describe_samples,
    find_tars,
    read_source,
    scan_tar,
    split_name,
)


SAMPLE = 256        # images a fine centroid that k-means sees, as in faiss
# What a features file says of itself. skipped: [key, cause, detail, offset, length] of each sample that cannot be used; left: what else of the
# tar is not used, {words: [how many, the first]}
FEATURES = {"identity": dict, "source": SOURCE, "images": int, "skipped": [list], "left": {str: list}}


def extract(path, target, prepare, function, info, config, bar, again=True):
    """Writes `target`: features [n,D] f16 of the usable samples of one tar, in its order, where
    each sample's bytes are, and a checksum of its key.

    A file of the same bytes, features and condition stays as it is, unless a sample that was
    skipped can be used now (again: look). -> whether it was made.
    """
    identity = {
        "extractor": encoders.identity(info),
        "condition": config.data.condition,
        "classes": config.data.classes,
    }
    about = current(path, target)
    if (
        about
        and about["identity"] == identity
        and not (again and any(is_mended(path, row, config.data) for row in about["skipped"]))
    ):
        return False
    features, places, images, bad, notes, several = [], [], [], [], Notes(), [0]
    with ThreadPoolExecutor(1) as beside:
        source = beside.submit(read_source, path)  # the digest: hashing lets go of the interpreter
        for sample, _, _, image in usable(path, prepare, 256, config.data, bad, notes):
            if "cluster" in sample.members:
                raise UserError(
                    f"{path} says which cluster its samples are in: it is a shard of a run; "
                    "--data takes the tars that a run is made of",
                    local=True,
                )
            images.append(image)
            places.append((sample.start, sample.end - sample.start, checksum(sample.key)))
            if sample.others:
                several = [several[0] + 1, *(several[1:] or [sample.choice()])]
            if len(images) == 256:
                features.append(function(images))
                bar.update(len(images))
                images = []
        source = source.result()
    check_unchanged(path, source)
    features = np.concatenate(features + [function(images)]).astype(np.float16)
    bar.update(len(images))
    offsets, lengths, keys = np.array(places, np.int64).reshape(-1, 3).T.copy()
    skipped = [
        [sample.key, error.cause, error.detail, sample.start, sample.end - sample.start]
        for sample, error in bad
    ]
    left = {
        "of samples with several images all but one": several,
        "members whose names begin with a dot, or in folders like __MACOSX": [notes.hidden],
        "the rest of tars that are cut off or damaged": [
            int(bool(notes.torn)),
            f"{path}: {notes.torn}",
        ],
    }
    about = {
        "identity": identity,
        "source": vars(source),
        "images": len(features),
        "skipped": skipped,
        "left": {words: n for words, n in left.items() if n[0]},
    }
    write_features(
        target, about, {"features": features, "offsets": offsets, "lengths": lengths, "keys": keys}
    )
    return True


def checksum(key):
    return zlib.crc32(key.encode("utf-8", "backslashreplace"))


def write_features(target, about, tensors):
    with atomic(target) as temporary:
        save_file(tensors, temporary, metadata={"nanoddm": json.dumps(about, sort_keys=True)})


def current(path, target):
    """What the features file `target` says, if it was made of the tar's bytes as they are now; None
    if not, if there is none, or it is damaged.

    Where the tar's dates alone have changed, as in a copy, its digest is computed, once.
    """
    try:
        about = read_metadata(target)
        known = Source(**about["source"])
    except (UserError, TypeError):
        return None
    if os.path.getsize(path) != known.bytes:
        return None
    source = read_source(path, known)
    if source.sha256 != known.sha256:
        return None
    if source != known:
        about["source"] = vars(source)
        write_features(target, about, load_file(target))
    return about


def is_mended(path, row, settings):
    """Whether a sample that was skipped can be used now: the disk works again, Pillow is another,
    or it is another sample.
    """
    key, cause, _, offset, length = row
    if cause.endswith("too large"):
        return False
    try:
        with open(path, "rb") as file:
            blocks = _read(file, offset, length)
    except OSError:
        return False
    try:
        sample = next(scan_tar(path, file=io.BytesIO(blocks + bytes(1024))))
        members = {
            role: blocks[place : place + size] for role, (place, size) in sample.members.items()
        }
        check_members(members, 256, settings)
        return True
    except BadSample:
        return sample.key != key
    except StopIteration:
        return True


def _read(file, offset, size):
    file.seek(offset)
    return file.read(size)


def read_metadata(path):
    """What a features file says of itself (FEATURES). UserError if it is damaged, or there is none.
    """
    try:
        about = read_description(path, FEATURES)
        with safe_open(path, framework="np") as f:
            shapes = {
                name: f.get_slice(name).get_shape()
                for name in ("features", "offsets", "lengths", "keys")
            }
        if any(shape[0] != about["images"] for shape in shapes.values()) or any(
            len(row) != 5 for row in about["skipped"]
        ):
            raise ValueError(f"it holds other tensors than {about['images']} rows")
        return about
    except Exception as error:  # safetensors raises its own kinds
        raise UserError(
            f"{path} is damaged, or none of ours ({error}): delete it to make it anew"
        ) from None


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
                            f"fit nowhere else. Allow more, or give cluster.fine_clusters more than {F}")
        f, k = np.unravel_index(np.where(allowed, added, np.inf).argmin(), added.shape)
        home[f] = k
    moved = home != before
    return (f"balance: {moved.sum()} of {F} fine clusters moved, with {sizes[moved].sum() / total:.1%} of the images; the mean squared distance of a fine centroid "
            f"to its coarse one, weighted by images, grew from {old:.5f} to {cost():.5f} ({cost() / old - 1:+.1%})" if old else "balance: nothing to move")


def fingerprint(clusters, config, info):
    """Names a clustering: whatever is trained on its shards carries this. Counts are left out, they grow when data is added."""
    digest = hashlib.sha256(json.dumps([config.cluster.assign, config.cluster.seed, encoders.identity(info)], sort_keys=True).encode())
    for name in ("fine_centroids", "coarse_centroids", "fine_to_coarse"):
        digest.update(np.ascontiguousarray(clusters[name]).tobytes())
    return digest.hexdigest()[:16]


def describe_tar(path):
    """A shard that an interrupted call wrote, as the manifest has it."""
    with open(path, "rb") as f:
        return {"samples": sum(1 for _ in scan_tar(path)), "bytes": os.path.getsize(path), "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def first_key(blocks):
    """The key that a sample's bytes begin with. ValueError if they are no header."""
    try:
        header = tarfile.TarInfo.frombuf(blocks[:512], "utf-8", "surrogateescape")
        if not header.isreg():  # a long name, before the header itself
            with tarfile.open(fileobj=io.BytesIO(blocks), mode="r:", encoding="utf-8") as tar:
                header = tar.next()
        return split_name(header.name)[0]
    except (tarfile.TarError, AttributeError, TypeError) as error:
        raise ValueError(str(error)) from None


def partition(path, name, folders, manifests, features_file, clusters, for_router, config):
    """Copies the samples of one tar to the shards of their clusters, and those with the numbers
    for_router to the router's, too.

    folders: RUN/shards/0, 1, ..., router. -> what the manifest of each is to say of its part of the
    tar. UserError if the tar is not the one that the features were made of.
    """
    targets = [os.path.join(folder, f"{name}.tar") for folder in folders]
    source = Source(**read_metadata(features_file)["source"])
    if all(map(os.path.exists, targets)):
        return [
            manifest["tars"].get(f"{name}.tar") or describe_tar(target) | {"source": source.sha256}
            for manifest, target in zip(manifests, targets)
        ]
    table, for_router = load_file(features_file), set(for_router.tolist())
    labels = assign(table["features"], name, clusters, config).tolist()
    check_unchanged(path, source)
    with contextlib.ExitStack() as stack:  # a shard appears when it is whole
        file = stack.enter_context(open(path, "rb"))
        writers = [stack.enter_context(TarWriter(target)) for target in targets]
        rows = zip(*(table[column].tolist() for column in ("offsets", "lengths", "keys")), labels)
        for i, (offset, length, meant, k) in enumerate(rows):
            blocks = _read(file, offset, length)
            try:
                key = first_key(blocks)
            except ValueError:
                key = None
            if key is None or checksum(key) != meant:
                raise UserError(
                    f"{path} is not what {features_file} was made of: at byte {offset} is "
                    f"{key or 'no header'}. If the tar has been replaced, use another "
                    f"--run-dir; if not, delete {features_file} and run the same command again",
                    local=True,
                )
            writers[k].add_raw(blocks)
            if i in for_router:
                writers[-1].add_raw(blocks)
                writers[-1].add(f"{key}.cluster", str(k).encode())
        check_unchanged(path, source)
    counts = [labels.count(k) for k in range(config.cluster.experts)] + [len(for_router)]
    return [
        {
            "samples": n,
            "bytes": writer.bytes,
            "sha256": writer.digest.hexdigest(),
            "source": source.sha256,
        }
        for n, writer in zip(counts, writers)
    ]


def write_manifests(folders, manifests, mark, parts):
    """parts: {name of a tar: what partition says of it}; they join what is in the manifests
    already.
    """
    for i, (folder, manifest) in enumerate(zip(folders, manifests)):
        tars = manifest["tars"] | {f"{name}.tar": entries[i] for name, entries in parts.items()}
        about = {
            "fingerprint": mark,
            "shard": os.path.basename(folder),
            "tars": dict(sorted(tars.items())),
        }
        write_text(os.path.join(folder, "manifest.json"), json.dumps(about, indent=1))
        manifest["tars"] = tars


def read_manifests(folders, mark):
    """Those that are there; empty ones for the others. UserError if one is of another clustering."""
    manifests = [read_manifest(folder) if os.path.exists(os.path.join(folder, "manifest.json")) else {"fingerprint": mark, "tars": {}} for folder in folders]
    if other := [folder for folder, manifest in zip(folders, manifests) if manifest["fingerprint"] != mark]:
        raise UserError(f"{other[0]} is a shard of another clustering, {read_manifest(other[0])['fingerprint']}, this one is {mark}: remove it, or use another --run-dir")
    return manifests


def check_skipped(run, tars, about, left, config, ranks):
    """Lists the samples that cannot be used in RUN/logs/cluster.skipped.csv, and counts what is not
    used. UserError if it is too much.

    tars: {name: path}; about: what the features file of each says; left: what find_tars left out.
    """
    rows = [
        (name, key, cause, detail)
        for name, a in zip(tars, about)
        for key, cause, detail, *_ in a["skipped"]
    ]
    images, most = sum(a["images"] for a in about), config.data.max_bad
    causes = collections.Counter(cause for _, _, cause, _ in rows)
    counted = ", ".join(f"{cause}: {n}" for cause, n in sorted(causes.items()))
    path = os.path.join(run, "logs", "cluster.skipped.csv")
    if ranks.rank == 0:
        print(
            f"{images} images in {len(tars)} tars"
            + (f"; {len(rows)} skipped ({path}): {counted}" if rows else "")
            + left_out(about, left),
            flush=True,
        )
        write_skipped(path, tars, rows)
    if not images and tars:
        raise UserError(
            "no usable image: "
            f"{counted}{'; ' if rows else ''}{first_skipped(tars, rows, causes, config)}{left_out([], left)}"
        )
    if len(rows) > 10 and len(rows) > most * (images + len(rows)):
        raise UserError(
            f"{len(rows)} of {images + len(rows)} samples cannot be used, more than data.max_bad "
            f"= {most} of them ({counted}): see {path}, or allow more; "
            f"{first_skipped(tars, rows, causes, config)}"
        )


def left_out(about, left):
    """'; left out: ...': what of --data and of its tars is not used, besides the samples that are
    skipped.
    """
    every = collections.defaultdict(list)
    for a in about:
        for words, counted in a["left"].items():
            every[words].append(counted)
    words = [
        f"{words}: {sum(n for n, *_ in counted)}"
        + (f" ({first[0]})" if (first := counted[0][1:]) else "")
        for words, counted in every.items()
    ]
    return "; left out: " + ", ".join(words) if (words := [*left, *words]) else ""


def first_skipped(tars, rows, causes, config):
    """Of the most frequent cause the first sample, and what its tar holds."""
    if not rows:
        return describe_samples(next(iter(tars.values())), "", config.data.condition)
    most = causes.most_common(1)[0][0]
    name, key, cause, detail = next(row for row in rows if row[2] == most)
    return (
        f"the first: {found.printable(key)} ({cause}{': ' if detail else ''}{detail}); "
        f"{describe_samples(tars[name], cause, config.data.condition)}"
    )


def write_skipped(path, tars, rows):
    """The list of skipped samples: these, and those of other tars that are in it already."""
    before = []
    if os.path.exists(path):
        with open(path, newline="", encoding="utf-8", errors="replace") as f:
            before = [tuple(row) for row in list(csv.reader(f))[1:] if row and row[0] not in tars]
    if not rows and not before:
        return
    rows = [
        (name, key, f"{cause}: {detail}" if detail else cause) for name, key, cause, detail in rows
    ]
    with (
        atomic(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="replace") as f,
    ):
        csv.writer(f).writerows([("tar", "sample", "cause"), *before, *rows])


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


def choose_config(args, given):
    """The run's config: from --config and flags, or what an earlier call wrote. UserError if the two differ."""
    path = os.path.join(args.run_dir, "config.toml")
    old = read_toml(path) if os.path.exists(path) else {}
    config = make_config(read_toml(args.config) if args.config else old, given)
    if not old:
        return config
    free = {name: value for name, value in flat(config).items() if name in ("data.max_bad", "data.workers")}
    old = make_config(old, free)
    if flat(config) != flat(old):
        raise UserError(f"{args.run_dir} was made with another config (there / now: {differences(flat(old), flat(config))}): "
                        f"use another --run-dir, or leave --config and these flags out")
    return old


def name_inputs(sources):
    """Names the data of a run, {name: SHA-256}."""
    return hashlib.sha256(json.dumps(sorted(sources.items())).encode()).hexdigest()[:16]


def read_old(path):
    """What the clusters.safetensors of an earlier call says."""
    try:
        return read_description(path, CLUSTERING)
    except ValueError as error:
        raise UserError(
            f"{path} is damaged, or of another version ({error}): bring it back, or use another "
            "--run-dir"
        ) from None


def recorded_sources(manifests):
    """{name: SHA-256} of the tars that a partition was made of."""
    return {
        file[:-4]: entry["source"]
        for manifest in manifests
        for file, entry in manifest["tars"].items()
    }


def check_sources(run, tars, features, manifests, old, append, ranks):
    """UserError unless the tars have the bytes that the run was clustered from. The ranks share the
    work, which is little where no date has changed.

    old: what read_old says; features: {name: its file}; append: look only at tars that the
    partition has.
    """
    meant = recorded_sources(manifests)
    names = [name for name in tars if name in meant or not append]
    mine = {}
    for name in names[ranks.rank :: ranks.world]:
        about = current(tars[name], features[name])
        mine[name] = about["source"]["sha256"] if about else read_source(tars[name]).sha256
    sources = {name: digest for part in gather(mine) for name, digest in part.items()}
    changed = [name for name, digest in sources.items() if name in meant and digest != meant[name]]
    if changed and append:
        raise UserError(
            f"{tars[changed[0]]} is named like a tar that the partition has, but holds other "
            "bytes: it has changed, or is another one. "
            f"Rename it, its shards are named after it, or use another --run-dir"
        )
    if append or name_inputs(sources) == old["inputs"]:
        return
    if not changed:  # without manifests, since the partition was interrupted
        changed = [
            name
            for name in names
            if os.path.exists(features[name]) and not current(tars[name], features[name])
        ]
    if changed:
        raise UserError(
            f"{tars[changed[0]]} has changed since {run} was clustered"
            + (f", and {len(changed) - 1} more" if len(changed) > 1 else "")
            + ": bring it back as it was, use another --run-dir, or give what has changed another "
            "name and --append it"
        )
    raise UserError(
        f"{run} was clustered from other data ({old['tars']} tars, now {len(tars)}): use another "
        "--run-dir, or --append to add new tars to it"
    )


def not_there(tars, manifests):
    """Those of {name: path} that the partition does not have."""
    return {
        name: path
        for name, path in tars.items()
        if not all(f"{name}.tar" in manifest["tars"] for manifest in manifests)
    }


def forget_shards(name, folders, manifests):
    """Removes what an interrupted call has made of a tar whose features have been made anew since.
    """
    for folder, manifest in zip(folders, manifests):
        path = os.path.join(folder, f"{name}.tar")
        if f"{name}.tar" not in manifest["tars"] and os.path.exists(path):
            os.remove(path)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--data", nargs="+", required=True, metavar="GLOB", help="the input tars")
    parser.add_argument("--config", default="", metavar="TOML", help="the experiment, see configs/ (default: every key's default)")
    parser.add_argument("--experts", dest="cluster.experts", metavar="K", help="the same as --cluster.experts")
    parser.add_argument("--balance", dest="cluster.balance", metavar="SHARE", help="the same as --cluster.balance: 0.2 or 20%%")
    parser.add_argument("--max-bad", dest="data.max_bad", metavar="SHARE", help="the same as --data.max_bad: 0.01 or 1%%")
    parser.add_argument("--append", action="store_true", help="add these tars to a run that there is: each image to the cluster of the nearest of its frozen centroids, "
                        "in shards of their own beside the others, which are not touched")
    args, given = parse(parser)
    left = []
    tars = find_tars(args.data, left)
    config = choose_config(args, given)
    K, c = config.cluster.experts, config.cluster
    if c.balance and c.assign != "fine":
        raise UserError(f"cluster.balance = {c.balance} moves whole fine clusters, so it needs cluster.assign = fine, not {c.assign}")
    if c.balance and not 1 / K <= c.balance <= 1:
        raise UserError(f"cluster.balance = {c.balance} must be between 1 / {K}, the share of {K} equal clusters, and 1")
    space = Space(config)      # found out now, not after hours: can the later stages work with this config?
    check_config(config, space)
    clusters_file = os.path.join(args.run_dir, "clusters.safetensors")
    folders = [os.path.join(args.run_dir, "shards", str(k)) for k in [*range(K), "router"]]
    old = read_old(clusters_file) if os.path.exists(clusters_file) else None
    if old:
        if not args.append and old.get("appended"):
            raise UserError(f"{args.run_dir} has had tars appended, its partition is whole: only --append changes it now")
    elif args.append:
        raise UserError(f"--append adds to a run that there is, but {clusters_file} is missing: leave --append out")
    elif glob.glob(os.path.join(glob.escape(args.run_dir), "shards", "*", "*.tar")):
        raise UserError(f"{args.run_dir}/shards holds a partition, but {clusters_file} is missing: delete {args.run_dir}/shards to make it anew")
    manifests = read_manifests(folders, old["fingerprint"] if old else "")
    if old and not args.append and old["tars"] != len(tars):
        lacking = sorted(recorded_sources(manifests).keys() - tars.keys())
        gone = f"; {lacking[0]}.tar is missing now" if lacking else ""
        raise UserError(f"{args.run_dir} was clustered from other data ({old['tars']} tars, now {len(tars)}{gone}): use another --run-dir, or --append to add new tars to it")
    if args.append:
        if lacking := [folder for folder, manifest in zip(folders, manifests) if not manifest["tars"]]:
            raise UserError(f"{lacking[0]} has no manifest: --append needs the whole partition, as cluster.py left it")

    with alone(os.path.join(args.run_dir, "cluster.lock"), args.run_dir):
        ranks = start(args.device, timeout=timedelta(days=7))      # a rank may have a much larger tar than the others
        if ranks.rank == 0:     # tried before the work
            for place in ("features", "shards", "logs"):
                try_folder(os.path.join(args.run_dir, place))
            for pattern in ("features/*.tmp", "shards/*/*.tmp"):    # of a call that was killed
                for path in glob.glob(os.path.join(glob.escape(args.run_dir), pattern)):
                    os.remove(path)
        barrier()
        meant = old["networks"] if old else space.info      # by the later stages, which use no others
        if not old:
            on_rank_0(space.name_weights)
        prepare, function, info = extractor(config.features, ranks.device)
        if old and encoders.identity(old["extractor"]) != encoders.identity(info):
            raise UserError(f"{clusters_file} was made with features of {encoders.label(old['extractor'])}, now they would be of {encoders.label(info)}: "
                            f"give that network (and --features.precision), or use another --run-dir")
        features = {name: os.path.join(args.run_dir, "features", f"{name}.safetensors") for name in tars}
        if old:
            check_sources(args.run_dir, tars, features, manifests, old, args.append, ranks)
        all_tars = tars
        if args.append:
            tars = not_there(tars, manifests)       # an --append that was interrupted goes on with the rest
        names = list(tars)
        mine = dict.fromkeys(names[ranks.rank::ranks.world])
        bar = progress(desc="features", unit=" images")
        for i, name in enumerate(mine, 1):
            bar.set_postfix_str(f"tar {i} of {len(mine)}" + (" of this rank" if ranks.world > 1 else ""), refresh=False)
            if extract(tars[name], features[name], prepare, function, info, config, bar, again=not old or args.append):
                forget_shards(name, folders, manifests)
        bar.close()
        barrier()

        about = [read_metadata(features[name]) for name in names]
        counts = [a["images"] for a in about]
        check_skipped(args.run_dir, tars, about, left, config, ranks)
        sources = {name: a["source"]["sha256"] for name, a in zip(names, about)}
        # what is appended is named by all that was given, whether it is there already or not
        inputs = name_inputs(sources | {name: source for name, source in recorded_sources(manifests).items() if name in all_tars})
        if old:
            clusters = load_file(clusters_file)
            clusters.pop("counts")
        else:
            fine = min(c.fine_clusters, sum(counts) // 39)
            if K > fine:
                raise UserError(f"{K} experts need as many fine clusters, there are {fine} (cluster.fine_clusters = {c.fine_clusters}, at most a 39th "
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
            raise UserError(f"{args.run_dir}/config.toml has other [cluster] settings than {clusters_file} was made with: use another --run-dir")
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
            write_toml(config, os.path.join(args.run_dir, "config.toml"))
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
            contact_sheet(args.run_dir, sizes)
            print(f"\ncluster   images   share      fingerprint {mark}")
            for k, n in enumerate(sizes):
                print(f"{k:7d} {n:8d}   {n / sum(sizes):5.1%}   {'#' * round(50 * n / max(sizes))}")
            print(f"router  {in_router:8d}")


if __name__ == "__main__":
    script(main)
