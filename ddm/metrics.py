"""Closed forms that evaluate.py reports: Frechet distance, precision and recall, a router's calibration. No networks here."""
import torch

from ddm.process import gather, sum_over_ranks



def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2) of two Gaussians (Heusel et al. 2017), float64 tensors [D] and [D,D].

    (A B)^1/2 has the trace of (A^1/2 B A^1/2)^1/2, which is symmetric: no complex roots, and a singular covariance is no trouble.
    """
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared).item()


def precision_recall(real, fake, k=3):
    """Share of fake [M,D] among real [N,D] pictures, and of real among fake ones (Kynkaanniemi et al. 2019): a picture is among the others
    if it is nearer to one of them than that one's k-th neighbour. Of the first min(M, N) of each, as both depend on the number.
    """
    n = min(len(real), len(fake))
    real, fake = real[:n].double(), fake[:n].double()

    def radii(x):
        found = []
        for first in range(0, n, 1000):
            distance = torch.cdist(x[first:first + 1000], x)
            distance[torch.arange(len(distance)), first + torch.arange(len(distance))] = float("inf")      # itself
            found.append(distance.topk(min(k, n - 1), largest=False).values[:, -1])
        return torch.cat(found)

    def among(points, centres):
        reach = radii(centres)
        return torch.cat([(torch.cdist(part, centres) <= reach).any(1) for part in points.split(1000)]).double().mean().item()

    return (among(fake, real), among(real, fake)) if n > 1 else (float("nan"), float("nan"))


class Statistics:
    """Mean and covariance of features that come in any order and batches, over all ranks; and the features of the pictures numbered in `keep`."""

    def __init__(self, keep):
        self.keep, self.kept, self.sums = dict.fromkeys(keep), {}, None

    def add(self, numbers, features):
        x = torch.as_tensor(features).double()
        sums = torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x], dim=1)
        sums = sums.T @ sums        # [1+D,1+D]: n, the sum and the sum of the products
        self.sums = sums if self.sums is None else self.sums + sums
        self.kept |= {i: row.float() for i, row in zip(numbers, x) if i in self.keep}

    def close(self):
        """-> {mean [D], covariance [D,D], kept [M,D] in the order of `keep`, count []}, on all ranks."""
        width = max(gather(0 if self.sums is None else len(self.sums)))
        sums = sum_over_ranks(torch.zeros(width, width, dtype=torch.float64) if self.sums is None else self.sums)
        count, mean = sums[0, 0], sums[0, 1:] / sums[0, 0]
        kept = {i: row for part in gather(self.kept) for i, row in part.items()}
        return {"mean": mean, "covariance": (sums[1:, 1:] - count * torch.outer(mean, mean)) / (count - 1).clamp(min=1),
                "kept": torch.stack([kept[i] for i in self.keep if i in kept]), "count": count}


def router_quality(p, labels):
    """p [n,BINS,K], true clusters [n] -> by bin: accuracy, mean confidence, expected calibration error (ten bins of confidence), negative log likelihood."""
    confidence, answer = p.max(2)
    right = (answer == labels[:, None]).float()
    bins = (confidence * 10).long().clamp(max=9)
    error = sum(((right - confidence) * (bins == b)).sum(0).abs() for b in range(10)) / len(p)
    likelihood = p.gather(2, labels[:, None, None].expand(-1, p.shape[1], 1))[..., 0]
    return {"accuracy": right.mean(0).tolist(), "confidence": confidence.mean(0).tolist(), "calibration_error": error.tolist(),
            "negative_log_likelihood": (-likelihood.clamp(min=1e-12).log()).mean(0).tolist()}
