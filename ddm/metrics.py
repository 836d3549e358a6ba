"""Closed forms that evaluate.py reports: Frechet distance, precision and recall, calibration.

No networks here: images are given as features [N,D], a router's answers as probabilities.
"""
import torch

from ddm.process import gather, sum_over_ranks

# rows of a matrix of distances that are computed at once
CHUNK = 1000


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2) of two Gaussians (Heusel et al. 2017).

    mean [D], cov [D,D], float64. (A B)^1/2 has the trace of (A^1/2 B A^1/2)^1/2, which is
    symmetric: no complex roots, and a singular covariance is no trouble.
    """
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()

    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared
    return distance.item()


def precision_recall(real, fake, k=3):
    """Share of fake [M,D] among real [N,D] images, and of real among fake ones.

    As in Kynkaanniemi et al. 2019: an image is among the others if it is nearer to one of them
    than that one's k-th neighbour. Of the first min(M, N) of each, since both depend on the number;
    NaN for fewer than two.
    """
    n = min(len(real), len(fake))
    if n < 2:
        return float("nan"), float("nan")

    # distances of near points are small differences of large numbers
    real = real[:n].double()
    fake = fake[:n].double()
    precision = _share_among(fake, real, _radii(real, k))
    recall = _share_among(real, fake, _radii(fake, k))
    return precision, recall


def _radii(x, k):
    """The distance [N] of each point [N,D] to its k-th neighbour."""
    found = []
    for first in range(0, len(x), CHUNK):
        distance = torch.cdist(x[first:first + CHUNK], x)

        # a point is no neighbour of itself
        rows = torch.arange(len(distance))
        distance[rows, first + rows] = float("inf")

        nearest = distance.topk(min(k, len(x) - 1), largest=False)
        found.append(nearest.values[:, -1])
    return torch.cat(found)


def _share_among(points, centres, radii):
    """The share of points that are within the radius of one of the centres, at least."""
    inside = []
    for part in points.split(CHUNK):
        inside.append((torch.cdist(part, centres) <= radii).any(1))
    return torch.cat(inside).double().mean().item()


class Statistics:
    """Mean and covariance of features that come in any order and batches, over all ranks.

    keep: numbers of the images whose features are kept, too.
    """

    def __init__(self, keep):
        self.keep = dict.fromkeys(keep)
        self.kept = {}
        self.sums = None

    def add(self, numbers, features):
        """The images' numbers, and their features [B,D]."""
        x = torch.as_tensor(features).double()

        # [1+D,1+D]: n, the sum, and the sum of the products
        ones = torch.ones(len(x), 1, dtype=x.dtype)
        sums = torch.cat([ones, x], dim=1)
        sums = sums.T @ sums
        self.sums = sums if self.sums is None else self.sums + sums

        for number, row in zip(numbers, x, strict=True):
            if number in self.keep:
                self.kept[number] = row.float()

    def close(self):
        """-> {mean [D], covariance [D,D], kept [M,D], count []}, on all ranks.

        kept is in the order of `keep`.
        """
        # a rank may have had no images, and does not know D then
        width = max(gather(0 if self.sums is None else len(self.sums)))
        if self.sums is None:
            self.sums = torch.zeros(width, width, dtype=torch.float64)
        sums = sum_over_ranks(self.sums)

        count = sums[0, 0]
        mean = sums[0, 1:] / count
        # in float64, as the sums: the two terms are nearly equal where the mean is large
        scatter = sums[1:, 1:] - count * torch.outer(mean, mean)

        kept = {}
        for part in gather(self.kept):
            kept |= part
        # an image that could not be used is not among them
        in_order = [kept[number] for number in self.keep if number in kept]

        return {
            "mean": mean,
            "covariance": scatter / (count - 1).clamp(min=1),
            "kept": torch.stack(in_order),
            "count": count,
        }


def compare(real, fake):
    """Frechet distance, precision and recall of two Statistics' {mean, covariance, kept}."""
    distance = frechet_distance(real["mean"], real["covariance"], fake["mean"], fake["covariance"])
    precision, recall = precision_recall(real["kept"], fake["kept"])
    return {
        "frechet_distance": distance,
        "precision": precision,
        "recall": recall,
        "of_pictures": min(len(real["kept"]), len(fake["kept"])),
    }


def router_quality(p, labels):
    """What a router's answers p [n,BINS,K] are worth, of images of the clusters `labels` [n].

    -> by bin of t: accuracy, mean confidence, expected calibration error (over ten bins of
    confidence; Guo et al. 2017), negative log likelihood.
    """
    confidence, answer = p.max(2)
    right = (answer == labels[:, None]).float()

    # within a bin errors of opposite sign cancel: there it is right as often as it says
    bins = (confidence * 10).long().clamp(max=9)
    error = 0
    for b in range(10):
        error = error + ((right - confidence) * (bins == b)).sum(0).abs()

    labels = labels[:, None, None].expand(-1, p.shape[1], 1)
    likelihood = p.gather(2, labels)[..., 0]

    return {
        "accuracy": right.mean(0).tolist(),
        "confidence": confidence.mean(0).tolist(),
        "calibration_error": (error / len(p)).tolist(),
        "negative_log_likelihood": (-likelihood.clamp(min=1e-12).log()).mean(0).tolist(),
    }


def summarise_losses(losses):
    """{name: loss [n,BINS]} -> {name: mean, by_t, and how it differs from the monolith's}.

    The difference is that of the same images, with its standard error.
    """
    summary = {}
    for name, loss in losses.items():
        summary[name] = {"mean": loss.mean().item(), "by_t": loss.mean(0).tolist()}
        if "monolith" not in losses or name == "monolith":
            continue

        # how hard an image is cancels, so this is far less noisy than the two means
        difference = (loss - losses["monolith"]).double()
        n = len(difference)
        error = difference.mean(1).std().item() / n ** 0.5 if n > 1 else float("inf")
        summary[name] |= {
            "difference": difference.mean().item(),
            "difference_error": error,
            "difference_by_t": difference.mean(0).tolist(),
        }
    return summary


def explain(found, labels, monolith, counts=None):
    """Why an ensemble's loss is what it is, from a Validation of n images.

    labels: the cluster of each [n]; None where images do not tell. monolith: its loss [n,BINS] on
    the same noise, or None. counts: images of each cluster that its expert trained on.

    -> {by_t: {name: [BINS]}, clusters: [a dict each, None for the mean of no image]}. The mixture's
    loss is that of its experts, as the router weighs them, less how far they disagree (Krogh &
    Vedelsby 1995):

        |sum_k p_k v_k - v|^2 = sum_k p_k |v_k - v|^2 - sum_k p_k |v_k - sum_j p_j v_j|^2
    """
    p = found.answers
    mixture = found.losses["full"]
    # one that is missing has no weight
    weighed = (p * found.experts.nan_to_num(posinf=0)).sum(2)         # [n,BINS]
    chosen = found.experts.gather(2, p.argmax(2, keepdim=True))[..., 0]
    by_image = {} if monolith is None else {"monolith": monolith}
    by_image |= {
        "mixture": mixture,
        "chosen expert": chosen,
        "best expert in hindsight": found.experts.amin(2),
        "experts, as weighed": weighed,
        "their disagreement": weighed - mixture,
    }
    if labels is None:
        return {"by_t": _means(by_image), "clusters": []}

    # [n,1,1] among the experts [n,BINS,K]
    places = labels[:, None, None].expand(-1, p.shape[1], 1)
    by_image["own expert"] = found.experts.gather(2, places)[..., 0]
    clusters = []
    for k in range(p.shape[2]):
        own = labels == k
        row = {"trained on": counts[k], "images": int(own.sum())}
        for name in ("monolith", "own expert", "chosen expert", "mixture"):
            if name in by_image:
                row[name] = _mean(by_image[name][own])
        # of expert k where it is a stranger
        row["its expert elsewhere"] = _mean(found.experts[~own, :, k])
        if monolith is not None:
            row["gain at home"] = _mean((monolith - by_image["own expert"])[own])
            row["loss elsewhere"] = _mean((found.experts[..., k] - monolith)[~own])
        clusters.append(row)
    return {"by_t": _means(by_image), "clusters": clusters}


def _mean(values):
    return values.mean().item() if len(values) else None


def _means(by_image):
    """{name: [n,BINS]} -> {name: [BINS]}, JSON."""
    return {name: values.mean(0).tolist() for name, values in by_image.items()}
