"""The mathematics against closed forms. The data are a handful of points, so every flow and posterior is known exactly."""
import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

import flow

torch.set_default_dtype(torch.float32)


def points(n=12, dim=5, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_kernel(x_t, t, data):
    """log p_t(x_t | x_0) up to a constant [B,n]: a Gaussian around (1-t) x_0 with deviation t."""
    return -((x_t[:, None] - (1 - t)[:, None, None] * data) ** 2).sum(2) / (2 * t[:, None] ** 2)


def exact_flow(x_t, t, data):
    """Eq. 2: the marginal flow of the uniform distribution over `data`."""
    posterior = log_kernel(x_t, t, data).softmax(1)                             # [B,n]
    conditional = (x_t[:, None] - data) / t[:, None, None]                      # eps - x_0 for the eps that leads here
    return (posterior[:, :, None] * conditional).sum(1)


def test_ensemble_of_exact_experts_under_the_exact_posterior_is_the_exact_marginal_flow():
    data = points()
    cluster = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2])                # unequal: the prior matters
    x_t, t = points(64, seed=1), torch.linspace(0.05, 1, 64, dtype=torch.float64)
    log_p = log_kernel(x_t, t, data)
    posterior = torch.stack([log_p[:, cluster == k].logsumexp(1) for k in range(3)], 1).softmax(1)      # eq. 5
    experts = [lambda x, t, k=k: exact_flow(x, t, data[cluster == k]) for k in range(3)]
    mixed = flow.ensemble(posterior, lambda k, x, t: experts[k](x, t), x_t, t)
    torch.testing.assert_close(mixed, exact_flow(x_t, t, data), rtol=1e-10, atol=1e-10)


def test_exact_flow_is_the_minimiser_that_the_expert_loss_estimates():
    data = points(4, 2)
    generator = torch.Generator().manual_seed(2)
    x_0 = data[torch.randint(4, (20000,), generator=generator)]
    eps = torch.randn(20000, 2, generator=generator, dtype=torch.float64)
    t = torch.full((20000,), 0.6, dtype=torch.float64)
    best = flow.expert_loss(lambda x, t, c: exact_flow(x, t, data), x_0, None, t, eps).mean()
    for shift in (0.1, -0.1):
        assert flow.expert_loss(lambda x, t, c: exact_flow(x, t, data) + shift, x_0, None, t, eps).mean() > best


def test_a_student_of_each_sample_s_own_expert_learns_the_ensemble_of_the_exact_posterior():
    """Section 3.6: at each x_t, the gradient of the distillation loss vanishes at sum_k p(k | x_t) v^(k)."""
    data, cluster = points(), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    x_t, t, experts = points(4, seed=1), torch.tensor([0.3, 0.5, 0.8, 1.0], dtype=torch.float64), points(3, 5, seed=2)
    log_p = log_kernel(x_t, t, data)
    p = torch.stack([log_p[:, cluster == k].logsumexp(1) for k in range(3)], 1).softmax(1)
    student = flow.ensemble(p, lambda k, x, t: experts[k].expand_as(x), x_t, t).requires_grad_()
    loss = 0
    for x_0, k, weight in zip(data, cluster, log_p.softmax(1).T):       # all pairs of x_0 and eps that lead to x_t, by their probability
        x_0 = x_0.expand_as(x_t)
        eps = (x_t - (1 - t)[:, None] * x_0) / t[:, None]
        loss = loss + (weight * flow.distillation_loss(lambda *_: student, lambda x, *_: experts[k].expand_as(x), x_0, None, t, eps)).sum()
    loss.backward()
    assert student.grad.abs().max() < 1e-6 and loss > 0.1


def test_path_begins_at_data_and_ends_at_noise_and_its_derivative_is_the_target():
    x_0, eps = points(3, 4), points(3, 4, seed=1)
    torch.testing.assert_close(flow.interpolate(x_0, eps, torch.zeros(3, dtype=torch.float64)), x_0)
    torch.testing.assert_close(flow.interpolate(x_0, eps, torch.ones(3, dtype=torch.float64)), eps)
    h, t = 1e-6, torch.full((3,), 0.4, dtype=torch.float64)
    slope = (flow.interpolate(x_0, eps, t + h) - flow.interpolate(x_0, eps, t - h)) / (2 * h)
    torch.testing.assert_close(slope, eps - x_0, rtol=1e-6, atol=1e-6)


PATHS, OBJECTIVES = ("linear", "cosine", "ddpm"), ("velocity", "x0", "eps")
MODELS = [(objective, path) for path in PATHS for objective in OBJECTIVES]


@pytest.mark.parametrize("objective, path", MODELS)
def test_a_perfect_prediction_has_no_loss_and_becomes_the_velocity(objective, path):
    """A model that knows x_0 and eps and sees what it saw in training, on any path, gives v = eps - x_0 on the linear one."""
    x_0, eps, seen = points(8, 4), points(8, 4, seed=1), []
    t = torch.linspace(0.06, 0.94, 8, dtype=torch.float64)

    def perfect(x, s, c):
        alpha, sigma = (flow.expand(a, x) for a in flow.alpha_sigma(path, s))
        torch.testing.assert_close(x, alpha * x_0 + sigma * eps)
        seen.append(alpha / sigma)
        velocity = eps - x_0 if path == "linear" else alpha * eps - sigma * x_0
        return {"velocity": velocity, "x0": x_0, "eps": eps}[objective]

    assert flow.expert_loss(perfect, x_0, None, t, eps, objective, path).max() < 1e-6
    v = flow.predict_velocity(perfect, flow.interpolate(x_0, eps, t), t, None, objective, path, bound=10)
    torch.testing.assert_close(v, eps - x_0, rtol=1e-4, atol=1e-4, check_dtype=False)
    torch.testing.assert_close(seen[1].flatten(), (1 - t) / t)      # the same signal-to-noise ratio


@pytest.mark.parametrize("objective, path", MODELS)
def test_the_minimiser_of_any_objective_on_any_path_is_the_exact_flow(objective, path):
    """What a model learns is E[x_0 | x] or E[eps | x]; for a handful of points that is a sum."""
    data, x_t, t = points(), points(64, seed=1), torch.linspace(0.06, 0.94, 64, dtype=torch.float64)

    def minimiser(x, s, c):
        alpha, sigma = (flow.expand(a, x) for a in flow.alpha_sigma(path, s))
        posterior = (-((x[:, None] - alpha[:, None] * data) ** 2).sum(2) / (2 * sigma ** 2)).softmax(1)
        x_0 = posterior @ data
        eps = (x - alpha * x_0) / sigma
        return {"velocity": eps - x_0 if path == "linear" else alpha * eps - sigma * x_0, "x0": x_0, "eps": eps}[objective]

    v = flow.predict_velocity(minimiser, x_t, t, None, objective, path)
    torch.testing.assert_close(v, exact_flow(x_t, t, data), rtol=1e-3, atol=2e-4, check_dtype=False)


@pytest.mark.parametrize("path", PATHS)
def test_paths_begin_at_data_end_at_noise_and_the_others_preserve_variance(path):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = flow.alpha_sigma(path, t)
    assert (alpha[0], sigma[0]) == (1, 0) and sigma[-1] > 0.9999 and alpha[-1] < 0.007
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()
    if path != "linear":
        torch.testing.assert_close(alpha ** 2 + sigma ** 2, torch.ones_like(t))
    s = flow.same_snr(path, t)
    assert s[0] == 0 and s[-1] == 1 and (s.diff() >= 0).all()


def test_ddpm_s_path_is_that_of_its_thousand_betas():
    alpha = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).sqrt()
    ours, _ = flow.alpha_sigma("ddpm", torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(ours, alpha, rtol=0, atol=2e-3)


def test_x0_loss_is_the_velocity_loss_of_the_same_prediction():
    x_0, eps, guess = points(8, 4), points(8, 4, seed=1), points(8, 4, seed=2)
    t = torch.linspace(0.06, 1, 8, dtype=torch.float64)
    v = flow.to_velocity(guess, flow.interpolate(x_0, eps, t), t, "x0")
    torch.testing.assert_close(flow.expert_loss(lambda *_: guess, x_0, None, t, eps, "x0"), ((v - (eps - x_0)) ** 2).mean(1).float(),
                               check_dtype=False)


@pytest.mark.parametrize("objective, path", MODELS)
def test_a_prediction_one_percent_off_stays_harmless_at_both_ends(objective, path):
    """Unclamped, 1% of eps is an error of 1 in v at t = 0.99, and no number at all at t = 1."""
    x_0, eps = points(256, 4).clamp(-1, 1), points(256, 4, seed=1)
    for time in (0.0, 0.01, 0.95, 0.99, 1.0):
        t = torch.full((256,), time, dtype=torch.float64)

        def rough(x, s, c):
            alpha, sigma = (flow.expand(a, x) for a in flow.alpha_sigma(path, s))
            velocity = eps - x_0 if path == "linear" else alpha * eps - sigma * x_0
            return 1.01 * {"velocity": velocity, "x0": x_0, "eps": eps}[objective]

        v = flow.predict_velocity(rough, flow.interpolate(x_0, eps, t), t, None, objective, path, bound=1)
        error = (v - (eps - x_0)).square().mean().sqrt()
        # v's own size is 1.3; nothing of eps can be read off data, nothing of x_0 off noise
        blind = objective == "x0" and time < 0.05 or objective == "eps" and time > 0.98
        assert error < (1.3 if blind else 0.25), (time, error)


def test_a_wrong_eps_near_noise_makes_no_x_0_beyond_the_bound():
    x_0, eps, t = points(256, 4).clamp(-1, 1), points(256, 4, seed=1), torch.full((256,), 0.94, dtype=torch.float64)
    v = flow.to_velocity(1.3 * eps, flow.interpolate(x_0, eps, t), t, "eps", bound=1)
    assert (1.3 * eps - v).abs().max() == pytest.approx(1)     # v = eps - x_0
    assert (1.3 * eps - flow.to_velocity(1.3 * eps, flow.interpolate(x_0, eps, t), t, "eps")).abs().max() > 5


def test_x0_loss_is_bounded_where_its_weight_is_not():
    x_0, eps, t = points(3, 4), points(3, 4, seed=1), torch.tensor([0.05, 0.01, 0.0], dtype=torch.float64)
    loss = flow.expert_loss(lambda *_: x_0 + 0.1, x_0, None, t, eps, "x0").float()
    torch.testing.assert_close(loss, torch.full((3,), (0.1 / 0.05) ** 2), rtol=1e-5, atol=0)


def test_logit_normal_times_have_the_normal_quantiles():
    u = torch.tensor([0.1587, 0.5, 0.8413])       # -1, 0 and 1 standard deviations
    torch.testing.assert_close(flow.sample_time(u, "logit-normal"), torch.sigmoid(torch.tensor([-1.0, 0, 1])), rtol=1e-3, atol=1e-3)
    assert torch.equal(flow.sample_time(u, "uniform"), u)


def test_shift_changes_log_snr_by_two_ln_s_and_keeps_the_ends():
    t = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    moved = flow.shift_time(t, 3.0)
    assert moved[0] == 0 and moved[3] == 1
    log_snr = lambda t: 2 * ((1 - t) / t).log()
    torch.testing.assert_close(log_snr(t[1:3]) - log_snr(moved[1:3]), torch.full((2,), 2 * math.log(3), dtype=torch.float64))


def test_router_loss_is_minimal_at_the_data_s_own_frequencies():
    k = torch.tensor([0] * 6 + [1] * 3 + [2])
    x = torch.zeros(10, 2)
    loss = lambda p: flow.router_loss(lambda *_: torch.tensor(p).log().expand(10, 3), x, k, None, torch.ones(10), x)[0].mean()
    assert loss([0.6, 0.3, 0.1]) < min(loss([1 / 3] * 3), loss([0.65, 0.25, 0.1]), loss([0.55, 0.3, 0.15]))


# ---- strategies ----------------------------------------------------------------------------------------------------

def weights(strategy, p, u=None):
    return flow.choose(flow.parse_strategy(strategy), p, u)


def numbers(n, K, seed=5):
    return torch.rand(n, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


P, U = (2 * points(50, 6)).softmax(1), numbers(50, 6)
TOP_1 = torch.nn.functional.one_hot(P.argmax(1), 6).double()


@pytest.mark.parametrize("strategy", ["top-6", "threshold-0", "sample-6"])
def test_strategies_that_take_all_experts_are_the_full_ensemble(strategy):
    torch.testing.assert_close(weights(strategy, P, U), weights("full", P))
    assert torch.equal(weights("full", P), P)


@pytest.mark.parametrize("strategy", ["top-1", "nucleus-0", "threshold-1"])
def test_strategies_that_take_the_likeliest_are_top_1(strategy):
    assert torch.equal(weights(strategy, P, U), TOP_1)


@pytest.mark.parametrize("strategy", ["sample-1", "sample-3", "nucleus-0.9", "nucleus-1", "once", "full", "top-3"])
def test_a_temperature_of_nearly_zero_makes_any_of_them_top_1(strategy):
    cold = (P.log() / 1e-6).softmax(1)
    torch.testing.assert_close(weights(strategy, cold, U), TOP_1)


@pytest.mark.parametrize("strategy", ["full", "top-1", "top-2", "sample-1", "sample-2", "threshold-0.1", "nucleus-0.9", "once"])
def test_a_router_that_is_sure_gets_the_expert_it_names_and_identical_experts_are_one(strategy):
    one_hot = torch.eye(4, dtype=torch.float64)[[2, 0, 3, 1, 2]]
    assert torch.equal(weights(strategy, one_hot, numbers(5, 4)), one_hot)
    x, t = points(50, 3), torch.full((50,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(flow.ensemble(weights(strategy, P, U), lambda k, x, t: x.sin(), x, t), x.sin())


@pytest.mark.parametrize("strategy, count", [("top-2", 2), ("top-3", 3), ("sample-1", 1), ("sample-2", 2), ("nucleus-0.7", 1), ("once", 1)])
def test_so_many_experts_are_chosen_and_their_weights_are_the_router_s_renormalised(strategy, count):
    w = weights(strategy, P, U)
    assert ((w > 0).sum(1) == count).all()
    torch.testing.assert_close(w.sum(1), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(w, P * (w > 0) / (P * (w > 0)).sum(1, keepdim=True))


def test_threshold_keeps_what_is_above_and_nucleus_draws_from_the_fewest_with_the_mass():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    torch.testing.assert_close(weights("threshold-0.15", p), torch.tensor([[0.5, 0.3, 0.15, 0]]) / 0.95)
    torch.testing.assert_close(weights("threshold-0.9", p), torch.tensor([[1.0, 0, 0, 0]]))
    torch.testing.assert_close(flow.nucleus(p, 0.6), torch.tensor([[0.5, 0.3, 0, 0]]) / 0.8)
    torch.testing.assert_close(flow.nucleus(p, 0.4), torch.tensor([[1.0, 0, 0, 0]]))
    torch.testing.assert_close(flow.nucleus(p, 1.0), p)


@pytest.mark.parametrize("strategy, share", [("sample-1", [0, 0.5, 0.2, 0.3, 0]), ("once", [0, 0.5, 0.2, 0.3, 0]), ("nucleus-0.75", [0, 5 / 8, 0, 3 / 8, 0])])
def test_drawn_experts_have_the_router_s_frequencies_and_never_zero_weight(strategy, share):
    n = 20000
    w = weights(strategy, torch.tensor([[0.0, 0.5, 0.2, 0.3, 0.0]]).expand(n, 5), numbers(n, 5))
    torch.testing.assert_close(w.mean(0), torch.tensor(share), rtol=0, atol=0.012)      # three standard deviations
    assert (w[:, [0, 4]] == 0).all()


def test_two_drawn_experts_are_drawn_without_replacement():
    p, n = torch.tensor([0.6, 0.3, 0.1]), 20000
    w = weights("sample-2", p.expand(n, 3), numbers(n, 3))
    pair = lambda i, j: p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
    for missing, (i, j) in enumerate([(1, 2), (0, 2), (0, 1)]):
        assert (w[:, missing] == 0).float().mean() == pytest.approx(pair(i, j).item(), abs=0.012)


def test_numbers_at_the_edge_of_the_uniform_distribution_do_no_harm():
    u = torch.tensor([[0.0, 0.0], [1 - 2 ** -24, 0.0], [0.0, 1 - 2 ** -24]])
    assert torch.equal(weights("sample-1", torch.tensor([[0.0, 1.0]]).expand(3, 2), u), torch.tensor([[0.0, 1.0]]).expand(3, 2))


@pytest.mark.parametrize("text", ["best", "top-0", "top-", "top-1.5", "top", "once-1", "full-2", "sample-0", "oracle", "oracle--1", "threshold-2", "nucleus-1.01",
                                  "nucleus-x", "Top-1", "threshold-nan", ""])
def test_what_is_no_strategy_is_refused(text):
    with pytest.raises(ValueError, match="is not one of full, top-N"):
        flow.parse_strategy(text)


def test_strategies_are_read():
    assert [flow.parse_strategy(s) for s in ("full", "once", "top-12", "sample-2", "oracle-0", "threshold-.05", "nucleus-1")] == \
        [("full", 0), ("once", 0), ("top", 12), ("sample", 2), ("oracle", 0), ("threshold", 0.05), ("nucleus", 1.0)]


def test_a_router_whose_answer_is_no_number_does_not_go_unnoticed():
    p = torch.tensor([[0.5, 0.5], [math.nan, math.nan]])
    with pytest.raises(AssertionError, match="not finite"):
        flow.ensemble(flow.choose(("full", 0), p), lambda k, x, t: x, torch.ones(2, 3), torch.ones(2))


def test_ensemble_runs_each_chosen_expert_once_on_its_own_samples_only():
    calls = []
    x, t = torch.arange(6.0)[:, None], torch.linspace(0, 1, 6)
    weights = torch.nn.functional.one_hot(torch.tensor([2, 0, 2, 2, 0, 2]), 4).float()

    def velocity(k, x_k, t_k, c_k):
        calls.append((k, x_k.flatten().tolist(), c_k.tolist()))
        return x_k * 0 + k

    v = flow.ensemble(weights, velocity, x, t, torch.arange(6))
    assert v.flatten().tolist() == [2, 0, 2, 2, 0, 2]
    assert calls == [(0, [1, 4], [1, 4]), (2, [0, 2, 3, 5], [0, 2, 3, 5])]


def test_identical_experts_make_one_and_a_single_expert_is_itself():
    x, t = points(7, 3), torch.full((7,), 0.5, dtype=torch.float64)
    one = lambda k, x, t: x.sin()
    torch.testing.assert_close(flow.ensemble(points(7, 4).softmax(1), one, x, t), x.sin())
    assert torch.equal(flow.ensemble(torch.ones(7, 1, dtype=torch.float64), one, x, t), x.sin())


class Transfers(TorchFunctionMode):
    """Counts the calls in which tensors would leave a device, or come to it and be waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        self.count += name in ("cpu", "item") or name == "to" and not kwargs.get("non_blocking")
        return function(*args, **kwargs)


@pytest.mark.parametrize("K", [2, 16])
def test_grouping_by_expert_waits_for_the_device_once(K):
    x, t, p = torch.randn(32, 3), torch.rand(32), torch.rand(32, K).softmax(1)
    with Transfers() as transfers:
        flow.ensemble(p, lambda k, x, t: x, x, t)
    assert transfers.count == 1


def test_guidance_of_one_is_conditional_and_of_zero_unconditional():
    v_c, v_u = points(2, 3), points(2, 3, seed=1)
    torch.testing.assert_close(flow.guide(v_c, v_u, 1), v_c)
    torch.testing.assert_close(flow.guide(v_c, v_u, 0), v_u)
    torch.testing.assert_close(flow.guide(v_c, v_u, 3), v_c + 2 * (v_c - v_u))


def gaussian_flow(mean, deviation):
    """The exact flow for data N(mean, deviation^2) -> (velocity, where it takes a point at t = 1 by t = 0)."""
    def velocity(x, t):
        variance = (1 - t) ** 2 * deviation ** 2 + t ** 2
        x_0 = mean + (1 - t) * deviation ** 2 / variance * (x - (1 - t) * mean)
        return (x - x_0) / t if t else mean * 0 - x_0
    return velocity, lambda x: mean + deviation * x


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("ab2", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_solvers_converge_at_their_order_to_the_closed_form_of_a_gaussian_s_flow(solver, order, shift):
    velocity, end = gaussian_flow(torch.tensor([0.5, -2.0], dtype=torch.float64), torch.tensor([0.8, 0.5], dtype=torch.float64))
    noise = points(16, 2)

    def error(steps):
        called = []
        *_, x = flow.integrate(lambda x, t: (called.append(t), velocity(x, t))[1], noise, flow.time_grid(steps, shift).double(), solver)
        assert len(called) == flow.evaluations(steps, solver)
        return (x - end(noise)).abs().max().item()

    # heun's last step and ab2's first are Euler's: one local error of second order keeps the global order
    rate = math.log2(error(128) / error(256))
    assert order - 0.25 < rate < order + 0.35
    assert error(256) < {1: 0.05, 2: 0.002}[order]


def test_ab2_is_exact_for_a_velocity_linear_in_t_on_any_grid():
    """But for the first step, which is Euler's."""
    times = torch.tensor([1, 0.9, 0.5, 0.45, 0.1, 0], dtype=torch.float64)
    x = torch.zeros(1, dtype=torch.float64)
    *_, x = flow.integrate(lambda x, t: x * 0 + t, x, times, "ab2")
    assert x.item() == pytest.approx(-0.1 * 1.0 - 0.9 ** 2 / 2)


def test_exact_flow_takes_noise_to_the_data():
    data = points(5, 3)
    x = points(40, 3, seed=3)
    *_, x = flow.integrate(lambda x, t: exact_flow(x, torch.full((len(x),), t, dtype=torch.float64), data), x, flow.time_grid(400).double())
    assert torch.cdist(x, data).min(1).values.max() < 1e-3
