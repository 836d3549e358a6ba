"""Temperatures of a trained router: post-hoc calibration (Guo et al. 2017), one for each bin of t.

A router that has seen its images often is surer of others than it is right. Divided by a
temperature that was fitted on images that it has not seen, its logits say how sure it may be. Their
order stays, so top-1 chooses as before; what weighs experts by them (full, top-N) or draws from
them (once, sample-N) changes.
"""
import math
import os
from datetime import timedelta

import torch
import torch.nn.functional as F

from data import subset
from ddm import artifacts
from ddm.codec import Space
from ddm.errors import UserError
from ddm.features import cluster_space, name_reference, open_reference, read_reference
from ddm.metrics import router_quality
from ddm.process import progress, start, sum_over_ranks
from ddm.report import calibration_table
from ddm.run import read_clusters
from ddm.tars import find_tars
from ddm.validation import BINS, noised

# held-out images that it is fitted on, at most: a temperature is one number
IMAGES = 5000
# where the router is never wrong, on few images, the likeliest temperature would be 0
SMALLEST = 0.1
LARGEST = 10.0


def fit_temperatures(logits, labels):
    """logits [n,BINS,K], labels [n] -> T [BINS], for which logits / T have the least negative log
    likelihood.

    It is convex in 1 / T, so a ternary search finds it: in each bin at once, between SMALLEST and
    LARGEST.
    """
    logits = logits.double()

    def loss(log_t):
        scaled = logits / log_t.exp()[:, None]
        targets = labels[:, None].expand(-1, BINS)
        return F.cross_entropy(scaled.movedim(2, 1), targets, reduction="none").mean(0)

    low = torch.full((BINS,), math.log(SMALLEST), dtype=torch.float64)
    high = torch.full((BINS,), math.log(LARGEST), dtype=torch.float64)
    # a third less at each turn
    for _ in range(40):
        third = (high - low) / 3
        below = loss(low + third) < loss(high - third)
        high = torch.where(below, high - third, high)
        low = torch.where(below, low, low + third)
    return ((low + high) / 2).exp()


@torch.no_grad()
def held_out_logits(router, space, data, numbers, *, batch, ranks):
    """The router's logits [n,BINS,K] of images `numbers` of a TarDataset, each at BINS times."""
    logits = torch.zeros(len(numbers), BINS, router.config.clusters)
    size = max(1, batch // BINS)
    # the ranks share the images
    mine = range(ranks.rank, len(numbers), ranks.world)
    for first in progress(range(0, len(mine), size), desc="calibration"):
        rows = list(mine[first:first + size])
        x_t, t, c, _ = noised(data, [numbers[row] for row in rows], space, seed=0,
                              device=ranks.device)
        logits[rows] = router(x_t, t, c).float().view(len(rows), BINS, -1).cpu()
    return sum_over_ranks(logits)


def calibrate(run_dir, patterns, config, device="", batch=64):
    """Fits the temperatures of RUN/router.safetensors on held-out tars, and writes them into its
    metadata. Prints what they change. UserError if there is no router, or the tars cannot be used.
    """
    path = os.path.join(run_dir, "router.safetensors")
    if not os.path.exists(path):
        raise UserError(f"{path} is missing: train it with train_router.py --run-dir {run_dir}, or "
                        f"copy it there")
    if config.cluster.assign == "random":
        raise UserError("--calibrate: no image tells its cluster where cluster.assign = 'random', "
                        "so there is nothing to fit the router to")
    clustering = read_clusters(run_dir)
    settings = config.data
    data = open_reference(patterns, settings.size, settings.condition, settings.classes)
    # one rank may have much more to read than the others
    ranks = start(device, timeout=timedelta(hours=12))

    folder = os.path.join(run_dir, "evaluation")
    clusters = cluster_space(run_dir, config, clustering, ranks.device)
    _, (labels, _) = read_reference(data, [], clusters, folder=folder, batch=batch, ranks=ranks)
    usable = (labels >= 0).nonzero().flatten()
    numbers = usable[torch.from_numpy(subset(len(usable), IMAGES, 0, 4))]
    labels = labels[numbers]

    # of the file, as it is used
    router, _ = artifacts.load(path, ranks.device)
    space = Space(config, ranks.device, clustering["networks"],
                  os.path.join(run_dir, "clusters.safetensors"))
    logits = held_out_logits(router, space, data, numbers.tolist(), batch=batch, ranks=ranks)
    temperatures = fit_temperatures(logits, labels)

    # by which evaluate.py knows whether it is about to measure the same images
    name = name_reference(find_tars(patterns), folder, ranks)
    if ranks.rank:
        return
    about = {"images": len(numbers), "reference": name}
    artifacts.add_info(path, temperatures=temperatures.tolist(), calibration=about)
    before = router_quality(logits.softmax(2), labels)
    after = router_quality((logits / temperatures[:, None]).softmax(2), labels)
    print(calibration_table(temperatures.tolist(), before, after, about))
    print(f"temperatures are kept between {SMALLEST} and {LARGEST}; they are in {path}")
