"""What evaluate.py reports, against closed forms."""
import numpy as np
import pytest
import scipy.linalg
import torch

from ddm import metrics


def seeded(number):
    return torch.Generator().manual_seed(number)


# ---- Frechet distance ----------------------------------------------------------------------------

def gaussian(dim, rank, seed):
    """A mean [D] and a covariance [D,D] of the given rank."""
    generator = seeded(seed)
    root = torch.randn(dim, rank, generator=generator, dtype=torch.float64)
    mean = torch.randn(dim, generator=generator, dtype=torch.float64)
    return mean, root @ root.T


def by_scipy(mean_a, cov_a, mean_b, cov_b):
    root = scipy.linalg.sqrtm(cov_a.numpy() @ cov_b.numpy())
    apart = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()
    return apart.item() - 2 * np.trace(root).real


def test_frechet_distance_is_scipy_s():
    a = gaussian(24, 40, seed=0)
    b = gaussian(24, 40, seed=1)
    distance = metrics.frechet_distance(*a, *b)
    assert distance == pytest.approx(by_scipy(*a, *b), rel=1e-9)
    assert distance == pytest.approx(metrics.frechet_distance(*b, *a), rel=1e-9)


def test_frechet_distance_of_gaussians_with_known_answers():
    zero = torch.zeros(5, dtype=torch.float64)
    eye = torch.eye(5, dtype=torch.float64)
    assert metrics.frechet_distance(zero, eye, zero, eye) == pytest.approx(0, abs=1e-12)
    assert metrics.frechet_distance(zero, eye, zero + 2, eye) == pytest.approx(5 * 4)

    # covariances that commute: the sum of (s - s')^2
    distance = metrics.frechet_distance(zero, 9 * eye, zero, 4 * eye)
    assert distance == pytest.approx(5 * (3 - 2) ** 2)
    a = torch.tensor([1.0, 4, 0, 9, 0]).double()
    b = torch.tensor([4.0, 4, 1, 0, 0]).double()
    distance = metrics.frechet_distance(zero, a.diag(), zero, b.diag())
    assert distance == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item())


@pytest.mark.parametrize("rank_a, rank_b", [(3, 3), (3, 40), (1, 1), (40, 2)])
def test_frechet_distance_is_stable_when_a_covariance_is_singular(rank_a, rank_b):
    a = gaussian(24, rank_a, seed=2)
    b = gaussian(24, rank_b, seed=3)
    distance = metrics.frechet_distance(*a, *b)
    nudge = 1e-9 * torch.eye(24, dtype=torch.float64)
    expected = by_scipy(a[0], a[1] + nudge, b[0], b[1] + nudge)
    assert np.isfinite(distance) and distance == pytest.approx(expected, rel=1e-3)
    assert metrics.frechet_distance(*a, *a) == pytest.approx(0, abs=1e-5)


# ---- Statistics ----------------------------------------------------------------------------------

@pytest.mark.parametrize("order, size", [
    (range(200), 200),
    (range(200), 7),
    (range(199, -1, -1), 1),
    (torch.randperm(200, generator=seeded(1)).tolist(), 13),
])
def test_statistics_do_not_depend_on_batch_size_or_order(order, size):
    x = torch.randn(200, 16, generator=seeded(0)) * 3 + 10
    statistics = metrics.Statistics(range(50))
    for first in range(0, 200, size):
        numbers = list(order)[first:first + size]
        statistics.add(numbers, x[numbers])
    found = statistics.close()

    mean = x.double().mean(0)
    covariance = torch.cov(x.double().T)
    torch.testing.assert_close(found["mean"], mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["covariance"], covariance, rtol=1e-10, atol=1e-10)
    assert torch.equal(found["kept"], x[:50]) and found["count"] == 200
    distance = metrics.frechet_distance(found["mean"], found["covariance"], mean, covariance)
    assert distance == pytest.approx(0, abs=1e-6)


def test_kept_features_come_in_the_order_that_was_asked_for():
    x = torch.arange(6.0)[:, None]
    # 9 could not be used
    statistics = metrics.Statistics([4, 0, 9, 2])
    statistics.add([0, 1, 2], x[:3])
    statistics.add([5, 4, 3], x[[5, 4, 3]])
    assert statistics.close()["kept"].flatten().tolist() == [4, 0, 2]


# ---- precision and recall ------------------------------------------------------------------------

def test_precision_and_recall_of_sets_with_known_answers():
    real = torch.randn(300, 4, generator=seeded(0))
    assert metrics.precision_recall(real, real) == (1, 1)
    assert metrics.precision_recall(real, real + 100) == (0, 0)

    # on a line every point reaches its third neighbour, three steps away; samples at one end alone
    # cover that end
    line = torch.arange(100.0)[:, None]
    crowded = torch.linspace(10, 20, 100)[:, None]
    precision, recall = metrics.precision_recall(line, crowded)
    assert precision == 1 and recall == pytest.approx(11 / 100, abs=0.011)
    precision, recall = metrics.precision_recall(crowded, line)
    assert recall == 1 and precision == pytest.approx(11 / 100, abs=0.011)


def test_precision_and_recall_of_a_single_image_are_unknown():
    one = torch.zeros(1, 4)
    assert np.isnan(metrics.precision_recall(one, one)).all()


def test_precision_and_recall_use_as_many_of_each_and_no_order():
    generator = seeded(0)
    real = torch.randn(2500, 3, generator=generator)
    fake = torch.randn(2100, 3, generator=generator) * 0.5 + 0.3
    shuffled = real[:2100][torch.randperm(2100, generator=generator)]

    precision, recall = metrics.precision_recall(real, fake)
    assert (precision, recall) == metrics.precision_recall(shuffled, fake.flip(0))
    assert precision > 0.8 and recall < 0.9


# ---- router and validation loss ------------------------------------------------------------------

def test_router_quality_of_answers_with_known_calibration():
    # right as often as it says
    p = torch.tensor([0.8, 0.2]).expand(1000, 1, 2).clone()
    labels = (torch.arange(1000) >= 800).long()
    quality = metrics.router_quality(p, labels)
    assert quality["accuracy"] == pytest.approx([0.8])
    assert quality["confidence"] == pytest.approx([0.8])
    assert quality["calibration_error"] == pytest.approx([0], abs=1e-6)
    entropy = -0.8 * np.log(0.8) - 0.2 * np.log(0.2)
    assert quality["negative_log_likelihood"] == pytest.approx([entropy], rel=1e-5)

    sure = torch.tensor([1.0, 0.0]).expand(1000, 1, 2).clone()
    quality = metrics.router_quality(sure, labels)
    assert quality["calibration_error"] == pytest.approx([0.2])


def test_errors_of_opposite_sign_cancel_within_a_bin_of_confidence_alone():
    p = torch.tensor([0.8, 0.2]).expand(500, 1, 2)
    half_right = torch.cat([p, 1 - p])
    quality = metrics.router_quality(half_right, torch.zeros(1000).long())
    assert quality["accuracy"] == pytest.approx([0.5])

    sure = torch.tensor([1.0, 0.0]).expand(500, 1, 2)
    unsure = torch.tensor([0.55, 0.45]).expand(500, 1, 2)
    labels = torch.cat([torch.ones(500), torch.zeros(500)]).long()
    quality = metrics.router_quality(torch.cat([sure, unsure]), labels)
    assert quality["calibration_error"] == pytest.approx([0.5 + 0.5 * 0.45])


def test_losses_are_held_against_the_monolith_s_of_the_same_images():
    monolith = torch.rand(40, 10, generator=seeded(0))
    gain = 0.1 * torch.arange(40)[:, None] / 39
    found = metrics.summarise_losses({"monolith": monolith, "student": monolith - gain})
    assert "difference" not in found["monolith"]

    student = found["student"]
    assert student["mean"] == pytest.approx(found["monolith"]["mean"] - 0.05, abs=1e-6)
    assert student["difference"] == pytest.approx(-0.05, abs=1e-6)
    assert student["difference_error"] == pytest.approx(gain.std().item() / 40 ** 0.5, rel=1e-4)
    assert student["difference_by_t"] == pytest.approx([-0.05] * 10, abs=1e-6)
    assert "difference" not in metrics.summarise_losses({"student": monolith})["student"]
