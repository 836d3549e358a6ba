"""What images are compared by: feature vectors, clusters, and the statistics of a reference set.

The first part is stage 1's, which clusters images by their features. The rest is evaluate.py's: it
measures distances between sets of images, and asks which cluster of a run an image is in.
"""
import collections
import copy
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from data import TarDataset, check_condition, decode, mix, permute, square, to_tensor
from ddm import encoders
from ddm.artifacts import write_tensors
from ddm.encoders import ImageFeatures
from ddm.errors import UserError
from ddm.metrics import Statistics
from ddm.process import barrier, cores, gather, local_world, progress, sum_over_ranks
from ddm.tars import BadSample, describe_samples, find_tars, read_sources

PIXELS = "square roots of a 4x4x4 RGB histogram, and an 8x8 thumbnail"

# images whose features precision and recall look at, at most
KEPT = 10_000


# ---- features and clusters -----------------------------------------------------------------------

def extractor(settings, device):
    """The ImageFeatures of [features] of a config. UserError where its network cannot be loaded."""
    if settings.name == "pixels":
        prepare = pixel_features
        features = stack_pixel_features
        info = {"name": "pixels", "preprocessing": PIXELS}
    else:
        prepare, features, info = encoders.image_features(settings, device)

    def prepare_small(image):
        # large images lose nothing that matters
        factor = max(1, min(image.size) // 256)
        return prepare(image.reduce(factor))

    return ImageFeatures(prepare_small, features, info)


def pixel_features(image):
    """PIL image -> [256] float32: which colours there are (a histogram), and where (a thumbnail).
    """
    # four levels of red, green and blue each: 64 bins
    levels = square(image, 32) // 64                                    # [32,32,3]
    bins = levels.reshape(-1, 3) @ np.array([16, 4, 1], np.uint8)       # [1024]
    shares = np.bincount(bins, minlength=64) / len(bins)                # [64]

    # of norm 1, and the thumbnail at most
    histogram = np.sqrt(shares)
    thumbnail = square(image, 8).reshape(-1) / (255 * 192 ** 0.5)       # [192]
    return np.concatenate([histogram, thumbnail]).astype(np.float32)


def stack_pixel_features(rows):
    """List of [256] -> [n,256] float32, n may be 0."""
    return np.asarray(rows, np.float32).reshape(-1, 256)


def nearest(points, centroids):
    """The number of the centroid [k,D] nearest to each point [n,D] -> [n] int64.

    In float64: no rounding that differs between machines decides.
    """
    points = points.astype(np.float64)
    centroids = centroids.astype(np.float64)
    # the squared distance without |points|^2, which is the same for all centroids
    distance = (centroids ** 2).sum(1) - 2 * points @ centroids.T       # [n,k]
    return distance.argmin(1)


def assign(features, name, clusters, config):
    """The cluster of each sample of tar `name`, by cluster.assign: features [n,D] -> [n] int64.

    clusters: the tensors of clusters.safetensors.
    """
    rule = config.cluster.assign
    if rule == "random":
        K = config.cluster.experts
        tar = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        labels = [mix(config.cluster.seed, tar, i) % K for i in range(len(features))]
        return np.array(labels, np.int64)
    if rule == "fine":
        return clusters["fine_to_coarse"][nearest(features, clusters["fine_centroids"])]
    return nearest(features, clusters["coarse_centroids"])


# ---- spaces that images are measured in ----------------------------------------------------------

# what the field calls the distances (Stein et al. 2023, Kynkaanniemi et al. 2023)
DISTANCES = {
    "Dinov2Model": "FD-DINOv2",
    "Dinov2WithRegistersModel": "FD-DINOv2",
    "CLIPVisionModelWithProjection": "CLIP-FID",
}


@dataclass
class DistanceSpace:
    """The feature space of a Frechet distance; the rest as in ImageFeatures."""

    # the distance as results name it
    name: str
    prepare: Callable
    features: Callable
    info: dict


def distance_space(settings, device):
    """The DistanceSpace of [features] of a config: in fp32 and not normalised, as the field has it.
    """
    settings = _in_precision(settings, "fp32")
    if settings.name == "pixels":
        prepare, features, info = extractor(settings, device)
    else:
        prepare, features, info = encoders.image_features(settings, device, normalise=False,
                                                          key="features")

    network = os.path.basename(os.path.normpath(settings.name))
    kind = DISTANCES.get(info.get("class"))
    name = f"{kind} ({network})" if kind else f"FD-{network}"
    return DistanceSpace(name, prepare, features, info)


def _in_precision(settings, precision):
    """[features] of a config with another precision."""
    settings = copy.copy(settings)
    settings.precision = precision
    return settings


@dataclass
class ClusterSpace:
    """What says which cluster of a run an image is in."""

    extractor: ImageFeatures
    # the tensors of clusters.safetensors, and its fingerprint
    clusters: dict
    fingerprint: str
    config: Any

    @property
    def info(self):
        return self.extractor.info

    def prepare(self, image):
        return self.extractor.prepare(image)

    def assign(self, prepared):
        """List of prepared images -> their clusters [n] int64."""
        # rounded as stage 1 keeps them
        features = self.extractor.features(prepared).astype(np.float16)
        return torch.from_numpy(assign(features, "", self.clusters, self.config))


def cluster_space(run_dir, config, clustering, device):
    """The ClusterSpace of a run. clustering: what ddm.run.read_clusters says of it.

    UserError if the run was clustered by another network than [features] of its config names.
    """
    meant = clustering["extractor"]
    # as stage 1 computed them, whatever this machine would choose
    precision = "bf16" if meant["preprocessing"].endswith("bfloat16") else "fp32"
    found = extractor(_in_precision(config.features, precision), device)
    if encoders.identity(found.info) != encoders.identity(meant):
        raise UserError(
            f"{run_dir} was clustered by {encoders.label(meant)} ({meant['preprocessing']}), "
            f"features.name of its config.toml is {encoders.label(found.info)} "
            f"({found.info['preprocessing']}): give it the same network")

    tensors = load_file(os.path.join(run_dir, "clusters.safetensors"))
    clusters = {name: tensor.numpy() for name, tensor in tensors.items()}
    return ClusterSpace(found, clusters, clustering["fingerprint"], config)


# ---- the reference set ---------------------------------------------------------------------------

def open_reference(patterns, size, condition="none", classes=0):
    """The TarDataset of --data; captions stay text. UserError if there are no samples in it."""
    unused = []
    tars = list(find_tars(patterns, unused).values())
    encode = None if condition == "text" else to_tensor
    data = TarDataset(tars, size, condition, encode=encode, classes=classes)

    if not len(data):
        raise UserError(f"no samples in --data {' '.join(patterns)}: "
                        f"{describe_samples(data.tars[0], '', condition)}")
    if unused and os.environ.get("RANK", "0") == "0":
        print(f"{len(data)} samples in {len(data.tars)} tars; left out: {', '.join(unused)}",
              flush=True)
    return data


def name_reference(tars, folder, ranks):
    """What results call the tars {name: path} of --data: their number and a hash of all bytes.

    folder: where the tars' own hashes are kept for the next call.
    """
    sources = read_sources(tars.values(), os.path.join(folder, "sources.json"), ranks)
    hashes = [(name, source.sha256) for name, source in zip(tars, sources, strict=True)]
    mark = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:8]

    name = f"{len(tars)} tars" if len(tars) > 1 else f"{next(iter(tars))}.tar"
    return f"{name} {mark}"


@dataclass
class _Prepared:
    """An image of the reference set as the spaces want it, or why it cannot be used."""

    number: int
    # of BadSample; empty where it can be used
    cause: str = ""
    # for each DistanceSpace
    for_spaces: list = field(default_factory=list)
    # for the ClusterSpace: of the image itself, and of the square that models train on
    image_for_clusters: Any = None
    square_for_clusters: Any = None


class _PreparedImages(torch.utils.data.Dataset):
    """The images `numbers` of a TarDataset, each a _Prepared.

    Spaces see the square that models train on, as they see samples; the clusters the image itself,
    as stage 1 did, and that square.
    """

    def __init__(self, data, numbers, spaces, clusters):
        self.data = data
        self.numbers = numbers
        self.spaces = spaces
        self.clusters = clusters

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        number = self.numbers[i]
        try:
            original, image = self._decode(number)
        except BadSample as error:
            return _Prepared(number, error.cause)

        prepared = _Prepared(number)
        prepared.for_spaces = [space.prepare(image) for space in self.spaces]
        if self.clusters:
            prepared.image_for_clusters = self.clusters.prepare(original)
            prepared.square_for_clusters = self.clusters.prepare(image)
        return prepared

    def _decode(self, number):
        """-> (PIL image as stage 1 decodes it, its square of the training size). BadSample."""
        size = self.data.size
        members = self.data.members(number)
        check_condition(members, self.data.condition, self.data.classes)
        if "image" not in members:
            raise BadSample("no image")

        image = decode(members["image"], max(256, size))
        original = image if size <= 256 else decode(members["image"], 256)
        return original, Image.fromarray(square(image, size))


def read_reference(data, spaces, clusters, folder, batch, ranks):
    """What evaluate.py compares with, of a TarDataset's images.

    -> ([{mean, covariance, kept, count} of each DistanceSpace], clusters [2,n] int64 of the images
    and of their training squares, -1 where an image cannot be used). clusters: a ClusterSpace;
    without one they are 0.

    Cached in `folder` by what they depend on: the tars' bytes, size, condition; network;
    clustering. Says how many images are left out. UserError if none can be used.
    """
    descriptions = _describe_reference(data, spaces, clusters, folder=folder, ranks=ranks)
    paths = []
    for description in descriptions:
        text = json.dumps(description, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:12]
        paths.append(os.path.join(folder, f"reference-{name}.safetensors"))

    # as rank 0 sees them
    missing = [i for i, path in enumerate(paths) if not os.path.exists(path)]
    missing = gather(missing)[0]
    if missing:
        missing_spaces = [space for i, space in enumerate(spaces) if i in missing]
        clusters = clusters if len(spaces) in missing else None
        statistics, labels = _measure_reference(data, missing_spaces, clusters, batch=batch,
                                                ranks=ranks)
        if ranks.rank == 0:
            # in the order of `missing`, where the clusters' file is the last, if it is there
            for i, tensors in zip(missing, [*statistics, {"clusters": labels}], strict=False):
                tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
                write_tensors(paths[i], tensors, descriptions[i])
    barrier()

    # all ranks read them, so all go on with the same bits
    found = [load_file(path) for path in paths]
    return found[:-1], found[-1]["clusters"]


def _describe_reference(data, spaces, clusters, *, folder, ranks):
    """What the files of read_reference depend on: one of each space, then that of the clusters."""
    sources = read_sources(data.tars, os.path.join(folder, "sources.json"), ranks)
    tars = []
    for path, source in zip(data.tars, sources, strict=True):
        tars.append((os.path.basename(path), source.sha256))
    images = {"tars": tars, "size": data.size, "condition": data.condition,
              "classes": data.classes}

    descriptions = []
    for space in spaces:
        descriptions.append(images | {"features": encoders.identity(space.info), "kept": KEPT})
    clustering = None
    if clusters:
        clustering = [clusters.fingerprint, encoders.identity(clusters.info)]
    descriptions.append(images | {"clustering": clustering})
    return descriptions


def _measure_reference(data, spaces, clusters, *, batch, ranks):
    """-> ([{mean, covariance, kept, count} of each space], clusters [2,n]), on all ranks, which
    share the images.
    """
    # the first n of these are a uniform subset, too
    keep = [permute(i, len(data), 0, 3) for i in range(min(KEPT, len(data)))]
    statistics = [Statistics(keep) for _ in spaces]
    labels = torch.full((2, len(data)), -1)
    causes = collections.Counter()

    # every world-th image: the ranks share the work
    mine = list(range(ranks.rank, len(data), ranks.world))
    workers = max(0, min(8, cores() // local_world() - 1))
    loader = torch.utils.data.DataLoader(
        _PreparedImages(data, mine, spaces, clusters), batch_size=batch, num_workers=workers,
        collate_fn=list, multiprocessing_context="fork" if workers else None)

    bar = progress(desc="reference", total=len(mine), unit=" images")
    for items in loader:
        bar.update(len(items))
        causes.update(item.cause for item in items if item.cause)
        usable = [item for item in items if not item.cause]
        if not usable:
            continue

        numbers = [item.number for item in usable]
        for i, space in enumerate(spaces):
            prepared = [item.for_spaces[i] for item in usable]
            statistics[i].add(numbers, space.features(prepared))
        labels[:, numbers] = _label(usable, clusters)
    bar.close()

    # what another rank has is -1 here
    labels = sum_over_ranks(labels + 1) - 1
    causes = sum(gather(causes), collections.Counter())
    _report_left_out(data, labels, causes, ranks)
    return [sums.close() for sums in statistics], labels


def _label(items, clusters):
    """The clusters of usable images and of their squares [2,B]; zeros without a ClusterSpace."""
    if not clusters:
        return torch.zeros(2, len(items), dtype=torch.int64)
    images = clusters.assign([item.image_for_clusters for item in items])
    squares = clusters.assign([item.square_for_clusters for item in items])
    return torch.stack([images, squares])


def _report_left_out(data, labels, causes, ranks):
    """Warns of images that cannot be used, counted by cause. UserError if no image can."""
    counted = ", ".join(f"{cause}: {n}" for cause, n in sorted(causes.items()))
    if not (labels >= 0).any():
        most = causes.most_common(1)[0][0] if causes else ""
        raise UserError(
            f"none of the {len(data)} images of --data can be used with condition = "
            f"{data.condition} ({counted}); {describe_samples(data.tars[0], most, data.condition)}")
    if causes and ranks.rank == 0:
        print(f"warning: {causes.total()} of {len(data)} images of --data are left out: {counted}",
              file=sys.stderr, flush=True)
