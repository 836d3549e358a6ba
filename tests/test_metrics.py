"""What evaluate.py reports, against closed forms."""
import numpy as np
import pytest
import scipy.linalg
import torch
from ddm import metrics



def gaussian(dim, rank, seed):
    """A mean [D] and a covariance [D,D] of the given rank."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, rank, generator=generator, dtype=torch.float64)
    return torch.randn(dim, generator=generator, dtype=torch.float64), root @ root.T


def by_scipy(mean_a, cov_a, mean_b, cov_b):
    root = scipy.linalg.sqrtm(cov_a.numpy() @ cov_b.numpy())
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()) - 2 * np.trace(root).real


def test_frechet_distance_is_scipy_s():
    a, b = gaussian(24, 40, 0), gaussian(24, 40, 1)
    assert metrics.frechet_distance(*a, *b) == pytest.approx(by_scipy(*a, *b), rel=1e-9)
    assert metrics.frechet_distance(*a, *b) == pytest.approx(metrics.frechet_distance(*b, *a), rel=1e-9)


def test_frechet_distance_of_gaussians_with_known_answers():
    zero, eye = torch.zeros(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    assert metrics.frechet_distance(zero, eye, zero, eye) == pytest.approx(0, abs=1e-12)
    assert metrics.frechet_distance(zero, eye, zero + 2, eye) == pytest.approx(5 * 4)
    assert metrics.frechet_distance(zero, 9 * eye, zero, 4 * eye) == pytest.approx(5 * (3 - 2) ** 2)      # commuting: sum of (s - s')^2
    diagonal, other = torch.tensor([1.0, 4, 0, 9, 0]).double(), torch.tensor([4.0, 4, 1, 0, 0]).double()
    assert metrics.frechet_distance(zero, diagonal.diag(), zero, other.diag()) == pytest.approx((diagonal.sqrt() - other.sqrt()).square().sum().item())


@pytest.mark.parametrize("rank_a, rank_b", [(3, 3), (3, 40), (1, 1), (40, 2)])
def test_frechet_distance_is_stable_when_a_covariance_is_singular(rank_a, rank_b):
    a, b = gaussian(24, rank_a, 2), gaussian(24, rank_b, 3)
    distance = metrics.frechet_distance(*a, *b)
    nudge = 1e-9 * torch.eye(24, dtype=torch.float64)
    assert np.isfinite(distance) and distance == pytest.approx(by_scipy(a[0], a[1] + nudge, b[0], b[1] + nudge), rel=1e-3)
    assert metrics.frechet_distance(*a, *a) == pytest.approx(0, abs=1e-5)


def test_statistics_do_not_depend_on_batch_size_or_order():
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) * 3 + 10
    found = []
    for order, size in ((range(200), 200), (range(200), 7), (torch.randperm(200, generator=torch.Generator().manual_seed(1)).tolist(), 13), (range(199, -1, -1), 1)):
        statistics = metrics.Statistics(range(50))
        for first in range(0, 200, size):
            numbers = list(order)[first:first + size]
            statistics.add(numbers, x[numbers])
        found.append(statistics.close())
    for s in found:
        torch.testing.assert_close(s["mean"], x.double().mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(s["covariance"], torch.cov(x.double().T), rtol=1e-10, atol=1e-10)
        assert torch.equal(s["kept"], x[:50]) and s["count"] == 200
        assert metrics.frechet_distance(s["mean"], s["covariance"], found[0]["mean"], found[0]["covariance"]) == pytest.approx(0, abs=1e-6)


def test_kept_features_come_in_the_order_that_was_asked_for():
    x = torch.arange(6.0)[:, None]
    statistics = metrics.Statistics([4, 0, 9, 2])       # 9 could not be used
    statistics.add([0, 1, 2], x[:3])
    statistics.add([5, 4, 3], x[[5, 4, 3]])
    assert statistics.close()["kept"].flatten().tolist() == [4, 0, 2]


def test_precision_and_recall_of_sets_with_known_answers():
    real = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    assert metrics.precision_recall(real, real) == (1, 1)
    assert metrics.precision_recall(real, real + 100) == (0, 0)
    # on a line, every point reaches its third neighbour, three steps away; samples only at one end cover that end
    line = torch.arange(100.0)[:, None]
    crowded = torch.linspace(10, 20, 100)[:, None]
    precision, recall = metrics.precision_recall(line, crowded)
    assert precision == 1 and recall == pytest.approx(11 / 100, abs=0.011)
    precision, recall = metrics.precision_recall(crowded, line)
    assert recall == 1 and precision == pytest.approx(11 / 100, abs=0.011)


def test_precision_and_recall_use_as_many_of_each_and_no_order():
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2500, 3, generator=generator), torch.randn(2100, 3, generator=generator) * 0.5 + 0.3
    first = metrics.precision_recall(real, fake)
    assert first == metrics.precision_recall(real[:2100][torch.randperm(2100, generator=generator)], fake.flip(0)) and 0.8 < first[0] and first[1] < 0.9


def test_router_quality_of_answers_with_known_calibration():
    p = torch.tensor([0.8, 0.2]).expand(1000, 1, 2).clone()
    labels = (torch.arange(1000) >= 800).long()         # right as often as it says
    quality = metrics.router_quality(p, labels)
    assert quality["accuracy"] == pytest.approx([0.8]) and quality["confidence"] == pytest.approx([0.8]) and quality["calibration_error"] == pytest.approx([0], abs=1e-6)
    assert quality["negative_log_likelihood"] == pytest.approx([-0.8 * np.log(0.8) - 0.2 * np.log(0.2)], rel=1e-5)
    sure = torch.tensor([1.0, 0.0]).expand(1000, 1, 2).clone()
    assert metrics.router_quality(sure, labels)["calibration_error"] == pytest.approx([0.2])
    half = torch.cat([p[:500], 1 - p[500:]])            # errors of opposite sign in one bin cancel, in two bins they do not
    assert metrics.router_quality(half, torch.zeros(1000).long())["accuracy"] == pytest.approx([0.5])
    assert metrics.router_quality(torch.cat([sure[:500], torch.tensor([0.55, 0.45]).expand(500, 1, 2)]), torch.cat([torch.ones(500), torch.zeros(500)]).long())[
        "calibration_error"] == pytest.approx([0.5 + 0.5 * 0.45])
