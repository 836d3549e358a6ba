"""The validation loss: what the models of a run make of images that nobody trained on.

    found = validate(team, ["full", "top-1"], space, data=..., numbers=..., ...)
    found.losses["full"]        [n,BINS]: each image at one time in each of BINS bins
    found.experts               [n,BINS,K]: of each expert alone
    found.answers               [n,BINS,K]: the router's

evaluate.py compares models by it, calibration.py fits the router's temperatures to the answers.
"""
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import flow
from data import square
from ddm.process import progress, sum_over_ranks

# of t in [0,1], of the validation loss and the router's answers
BINS = 10


@dataclass
class Validation:
    """What validate() finds of n images."""
    # strategy -> [n,BINS]
    losses: dict[str, Tensor]
    # each expert alone [n,BINS,K], infinite where it is missing
    experts: Tensor
    # p(k | x_t, t, c) [n,BINS,K]
    answers: Tensor


@torch.no_grad()
def validate(team, strategies, space, *, data, numbers, labels, seed, batch, ranks,
             calibrated=True):
    """Flow-matching loss (eq. 6, of the weighted velocity, eq. 8) on images of the reference.

    Each image is seen at one time in each of BINS bins of [0,1]. Its noise and times depend on the
    seed and its number alone, so that all models see the same: compare image by image. Conditions
    as they are, no guidance.

    numbers: of the n images. labels: the cluster of each image of `data`, for the strategy
    "oracle". batch: rows of a forward pass, about. calibrated: the router's answers are.
    -> Validation
    """
    losses = {strategy: torch.zeros(len(numbers), BINS) for strategy in strategies}
    experts = torch.zeros(len(numbers), BINS, team.K)
    answers = torch.zeros(len(numbers), BINS, team.K)
    size = max(1, batch // BINS)

    mine = range(ranks.rank, len(numbers), ranks.world)
    bar = progress(desc=f"validation loss, {', '.join(strategies)}", total=len(mine),
                   unit=" images")
    for first in range(0, len(mine), size):
        # places in losses and answers, and the images that stand there
        rows = list(mine[first:first + size])
        of_rows = [numbers[row] for row in rows]
        x_t, t, c, target = noised(data, of_rows, space, seed=seed, device=ranks.device)

        p = route(team, x_t, t, c, calibrated)                        # [B*BINS,K]
        answers[rows] = p.view(len(rows), BINS, team.K).cpu()

        # all experts, those on the device first, before others take their place
        v = torch.zeros(team.K, *x_t.shape, device=ranks.device)      # [K,B*BINS,C,h,w]
        on_device = [k for k in sorted(team.paths) if k in team.loaded]
        others = [k for k in sorted(team.paths) if k not in team.loaded]
        for k in on_device + others:
            v[k] = team.expert_velocity(k, x_t, t, c)
        alone = (v - target).square().flatten(2).mean(2).T            # [B*BINS,K]
        experts[rows] = alone.view(len(rows), BINS, team.K).cpu()

        # the same velocities, mixed in several ways
        for strategy in strategies:
            if strategy == "oracle":
                own = labels[of_rows].to(ranks.device).repeat_interleave(BINS)
                w = torch.nn.functional.one_hot(own, team.K).to(p)
            else:
                w = flow.choose(flow.parse_strategy(strategy), p)
            error = torch.einsum("bk,kb...->b...", w, v) - target
            loss = error.square().flatten(1).mean(1)
            losses[strategy][rows] = loss.view(len(rows), BINS).cpu()
        bar.update(len(rows))
    bar.close()

    for strategy in strategies:
        losses[strategy] = sum_over_ranks(losses[strategy])
    experts = sum_over_ranks(experts)
    experts[..., team.missing] = float("inf")
    return Validation(losses, experts, sum_over_ranks(answers))


def route(team, x_t, t, c, calibrated=True):
    """The router's answers [B,K]; of a single model all of it."""
    if team.routed:
        return team.route(x_t, t, c, calibrated=calibrated)
    only = torch.tensor(min(team.paths), device=x_t.device)
    return torch.nn.functional.one_hot(only, team.K).float().expand(len(t), -1)


def noised(data, numbers, space, *, seed, device):
    """Images of the reference on their way to noise, each at BINS times.

    -> x_t [B*BINS,C,h,w], t [B*BINS], c, v = eps - x_0 [B*BINS,C,h,w]
    """
    squares = []
    conditions = []
    times = []
    noise = []
    encoder_noise = []
    for number in numbers:
        image, condition, _ = data.sample(number)
        squares.append(square(image, data.size))
        conditions.append(condition)

        # the order of these draws is part of the numbers: a new one belongs at the end
        rng = np.random.Generator(np.random.Philox(key=[seed, number]))
        times.append((np.arange(BINS) + rng.random(BINS)) / BINS)
        shape = (space.channels, space.size, space.size)
        noise.append(rng.standard_normal((BINS, *shape), dtype=np.float32))
        # what an autoencoder's posterior is sampled with
        encoder_noise.append(rng.standard_normal(shape, dtype=np.float32))

    def stack(arrays):
        return torch.from_numpy(np.stack(arrays)).to(device)

    x_0 = space.x_0(stack(squares), stack(encoder_noise))             # [B,C,h,w]
    x_0 = x_0.to(device).repeat_interleave(BINS, dim=0)               # [B*BINS,C,h,w]
    eps = stack(noise).flatten(0, 1)
    # what predicts eps divides by 1 - t, what predicts x_0 by t
    t = stack(times).flatten().float().clamp(1e-6, 1 - 1e-6)
    c = encode(conditions, data.condition, space, device)
    if c is not None:
        c = c.repeat_interleave(BINS, dim=0)
    return flow.interpolate(x_0, eps, t), t, c, eps - x_0


def encode(conditions, kind, space, device):
    """Captions or classes as the models take them: [B,L,D], [B,L] or [B]; None for kind = none."""
    if kind == "none":
        return None
    if kind == "text":
        return space.captions(conditions).to(device)
    return torch.tensor(conditions).to(device)
