"""What pictures are compared by: feature spaces, the clusters of pictures, a reference set's statistics. For cluster.py and evaluate.py."""
import collections
import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data import TarDataset, check_condition, decode, mix, permute, square, to_tensor
from ddm import encoders
from ddm.errors import UserError
from ddm.files import atomic
from ddm.metrics import Statistics
from ddm.process import cores, gather, local_world, progress, sum_over_ranks
from ddm.tars import BadSample, describe_samples, find_tars, read_sources


PIXELS = "square roots of a 4x4x4 RGB histogram, and an 8x8 thumbnail"
KEPT = 10_000       # pictures whose features precision and recall look at, at most


def pixel_features(image):
    """PIL image -> [256] float32: which colours there are (a histogram), and where (a thumbnail)."""
    bins = (square(image, 32) // 64).reshape(-1, 3) @ np.array([16, 4, 1], np.uint8)
    histogram = np.sqrt(np.bincount(bins, minlength=64) / len(bins))                # of norm 1, as the thumbnail at most
    return np.concatenate([histogram, square(image, 8).reshape(-1) / (255 * 192 ** 0.5)]).astype(np.float32)


def extractor(settings, device):
    """For [features] of a config -> (what to make of each PIL image, while the next are decoded; function from a list of these to features [n,D]; what names it)."""
    if settings.name == "pixels":
        prepare, features, info = pixel_features, lambda rows: np.asarray(rows, np.float32).reshape(-1, 256), {"name": "pixels", "preprocessing": PIXELS}
    else:
        prepare, features, info = encoders.image_features(settings, device)
    return lambda image: prepare(image.reduce(max(1, min(image.size) // 256))), features, info      # large pictures lose nothing that matters


def nearest(points, centroids):
    """Number of the centroid nearest to each point [n], in float64: no rounding that differs between machines decides."""
    points, centroids = points.astype(np.float64), centroids.astype(np.float64)
    return ((centroids ** 2).sum(1) - 2 * points @ centroids.T).argmin(1)


def assign(features, name, clusters, config):
    """The cluster of each sample [n] of tar `name`."""
    K, rule = config.cluster.experts, config.cluster.assign
    if rule == "random":
        tar = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        return np.array([mix(config.cluster.seed, tar, i) % K for i in range(len(features))], np.int64)
    if rule == "fine":
        return clusters["fine_to_coarse"][nearest(features, clusters["fine_centroids"])]
    return nearest(features, clusters["coarse_centroids"])


def distance_space(settings, device):
    """The space of a Frechet distance -> namespace of name, prepare, features, info. For [features] of a config.

    The field's: FD-DINOv2 (Stein et al. 2023) and CLIP-FID (Kynkaanniemi et al. 2023), with the network's name; features in fp32, not normalised.
    """
    settings = SimpleNamespace(**vars(settings) | {"precision": "fp32"})
    if settings.name == "pixels":
        prepare, features, info = extractor(settings, device)
    else:
        prepare, features, info = encoders.image_features(settings, device, normalise=False, key="features")
    kind = {"Dinov2Model": "FD-DINOv2", "Dinov2WithRegistersModel": "FD-DINOv2", "CLIPVisionModelWithProjection": "CLIP-FID"}.get(info.get("class"))
    base = os.path.basename(os.path.normpath(settings.name))
    return SimpleNamespace(name=f"{kind} ({base})" if kind else f"FD-{base}", prepare=prepare, features=features, info=info)


def cluster_space(run, config, about, device):
    """What says which cluster of a run a picture is in -> namespace of prepare, features, info, assign: list of prepared pictures -> [n] int64.

    about: what common.read_clusters says. UserError if the run was clustered by another network than [features] of its config names.
    """
    meant = about["extractor"]
    settings = SimpleNamespace(**vars(config.features) | {"precision": "bf16" if meant["preprocessing"].endswith("bfloat16") else "fp32"})
    prepare, features, info = extractor(settings, device)
    if encoders.identity(info) != encoders.identity(meant):
        raise UserError(f"{run} was clustered by {encoders.label(meant)} ({meant['preprocessing']}), features.name of its config.toml is {encoders.label(info)} "
                        f"({info['preprocessing']}): give it the same network")
    centroids = {k: v.numpy() for k, v in load_file(os.path.join(run, "clusters.safetensors")).items()}
    of = lambda pictures: torch.from_numpy(assign(features(pictures).astype(np.float16), "", centroids, config))      # rounded as stage 1 keeps them
    return SimpleNamespace(prepare=prepare, info=info, fingerprint=about["fingerprint"], assign=of)


class _Prepared(torch.utils.data.Dataset):
    """Picture number `numbers[i]` as spaces and clusters want it -> (number, [of each space], of the clusters, of the clusters from the square), or (number, BadSample).

    Spaces see the square that models train on, as they see samples; the clusters the picture itself, as stage 1 did, and that square.
    """

    def __init__(self, data, numbers, spaces, clusters):
        self.data, self.numbers, self.spaces, self.clusters = data, numbers, spaces, clusters

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        number, size = self.numbers[i], self.data.size
        try:
            members = self.data.members(number)
            check_condition(members, self.data.condition, self.data.classes)
            if "image" not in members:
                raise BadSample("no image")
            image = decode(members["image"], max(256, size))
            original = image if size <= 256 else decode(members["image"], 256)
        except BadSample as error:
            return number, error.cause
        picture = Image.fromarray(square(image, size))
        of_clusters = (self.clusters.prepare(original), self.clusters.prepare(picture)) if self.clusters else (None, None)
        return number, [space.prepare(picture) for space in self.spaces], *of_clusters


def read_reference(data, spaces, clusters, folder, batch, ranks):
    """-> ([{mean, covariance, kept, count} of each space], clusters [2,n] int64 of the pictures and of their training squares: -1 where a picture cannot be used).

    Without `clusters` (a cluster_space) they are 0. Cached in `folder` by what they depend on: the tars' bytes, size, condition; network;
    clustering. Says how many pictures are left out. UserError if none can be used.
    """
    sources = read_sources(data.tars, os.path.join(folder, "sources.json"), ranks)
    tars = [(os.path.basename(path), source.sha256) for path, source in zip(data.tars, sources)]
    base = {"tars": tars, "size": data.size, "condition": data.condition, "classes": data.classes}
    wanted = [{**base, "features": encoders.identity(space.info), "kept": KEPT} for space in spaces]
    wanted.append({**base, "clustering": clusters and [clusters.fingerprint, encoders.identity(clusters.info)]})
    files = [os.path.join(folder, f"reference-{hashlib.sha256(json.dumps(w, sort_keys=True).encode()).hexdigest()[:12]}.safetensors") for w in wanted]
    missing = gather([i for i, file in enumerate(files) if not os.path.exists(file)])[0]
    if missing:
        spaces, clusters = [space for i, space in enumerate(spaces) if i in missing], clusters if len(files) - 1 in missing else None
        keep = [permute(i, len(data), 0, 3) for i in range(min(KEPT, len(data)))]       # the first n of these are a uniform subset, too
        statistics, labels = [Statistics(keep) for _ in spaces], torch.full((2, len(data)), -1)
        mine, workers = list(range(ranks.rank, len(data), ranks.world)), max(0, min(8, cores() // local_world() - 1))
        loader = torch.utils.data.DataLoader(_Prepared(data, mine, spaces, clusters), batch, num_workers=workers, collate_fn=list,
                                             multiprocessing_context="fork" if workers else None)
        bar, causes = progress(desc="reference", total=len(mine), unit=" images"), collections.Counter()
        for items in loader:
            bar.update(len(items))
            causes.update(item[1] for item in items if len(item) == 2)
            if items := [item for item in items if len(item) > 2]:
                numbers, prepared, *of_clusters = zip(*items)
                for space, s, pictures in zip(spaces, statistics, zip(*prepared)):
                    s.add(numbers, space.features(list(pictures)))
                for row, pictures in zip(labels, of_clusters):
                    row[list(numbers)] = clusters.assign(list(pictures)) if clusters else 0
        bar.close()
        labels = sum_over_ranks(labels + 1) - 1
        causes = sum(gather(causes), collections.Counter())
        counted = ", ".join(f"{cause}: {n}" for cause, n in sorted(causes.items()))
        if not (labels >= 0).any():
            most = causes.most_common(1)[0][0] if causes else ""
            raise UserError(f"none of the {len(data)} pictures of --data can be used with condition = {data.condition} ({counted}); "
                            f"{describe_samples(data.tars[0], most, data.condition)}")
        if causes and ranks.rank == 0:
            print(f"warning: {causes.total()} of {len(data)} pictures of --data are left out: {counted}", file=sys.stderr, flush=True)
        tensors = dict(zip(missing, [s.close() for s in statistics])) | ({len(files) - 1: {"clusters": labels}} if len(files) - 1 in missing else {})
        for i in missing if ranks.rank == 0 else []:
            with atomic(files[i]) as temporary:
                save_file({k: v.contiguous() for k, v in tensors[i].items()}, temporary, metadata={"nanoddm": json.dumps(wanted[i], sort_keys=True)})
    gather(None)        # rank 0 has written them
    found = [load_file(file) for file in files]
    return found[:-1], found[-1]["clusters"]


def open_reference(patterns, size, condition="none", classes=0):
    """The TarDataset of --data; captions stay text."""
    left = []
    data = TarDataset(
        list(find_tars(patterns, left).values()),
        size,
        condition,
        encode=None if condition == "text" else to_tensor,
        classes=classes,
    )
    if not len(data):
        raise UserError(
            f"no samples in --data {' '.join(patterns)}: "
            f"{describe_samples(data.tars[0], '', condition)}"
        )
    if left and os.environ.get("RANK", "0") == "0":
        print(
            f"{len(data)} samples in {len(data.tars)} tars; left out: {', '.join(left)}", flush=True
        )
    return data


def read_pictures(path):
    """uint8 [N,H,W,3] of a folder of pictures (but sample.py's grids) or the arr_0 of an .npz. UserError if they are not that."""
    try:
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as arrays:
                found = arrays["arr_0"]
        else:
            files = [f for f in sorted(Path(path).iterdir()) if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and f.stem not in ("grid", "routing")]
            found = np.stack([np.asarray(decode(f.read_bytes())) for f in files])
        if found.dtype != np.uint8 or found.ndim != 4 or found.shape[3] != 3 or len(found) < 2:
            raise ValueError(f"{found.dtype} {list(found.shape)} is not uint8 [N,H,W,3] of two pictures or more")
        return found
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, BadSample) as error:
        raise UserError(f"cannot read pictures from {path} ({error or type(error).__name__}): give a folder of pictures of one size, or an .npz with arr_0") from None
