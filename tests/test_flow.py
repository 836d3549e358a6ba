"""The mathematics against closed forms.

The data are a handful of points, so every flow and posterior is known exactly.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import flow

torch.set_default_dtype(torch.float32)

PATHS = ("linear", "cosine", "ddpm")
MODELS = [(objective, path) for path in PATHS for objective in ("velocity", "x0", "eps")]


def points(n=12, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64)


def times(first, last, n):
    return torch.linspace(first, last, n, dtype=torch.float64)


def constant(time, n):
    return torch.full((n,), time, dtype=torch.float64)


# twelve points in three clusters of unequal size: the prior matters
DATA = points()
CLUSTER = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2])


def log_kernel(x_t, t, data):
    """log p_t(x_t | x_0) up to a constant [B,n]: a Gaussian around (1-t) x_0 with deviation t."""
    centres = (1 - t)[:, None, None] * data
    return -((x_t[:, None] - centres) ** 2).sum(2) / (2 * t[:, None] ** 2)


def exact_flow(x_t, t, data):
    """Eq. 2: the marginal flow of the uniform distribution over `data`."""
    posterior = log_kernel(x_t, t, data).softmax(1)                   # [B,n]
    # eps - x_0 for the eps that leads here
    conditional = (x_t[:, None] - data) / t[:, None, None]            # [B,n,D]
    return (posterior[:, :, None] * conditional).sum(1)


def exact_posterior(x_t, t):
    """Eq. 5: p(k | x_t) of DATA's clusters [B,3]."""
    log_p = log_kernel(x_t, t, DATA)
    return torch.stack([log_p[:, CLUSTER == k].logsumexp(1) for k in range(3)], 1).softmax(1)


def velocity_on(path, x_0, eps, alpha, sigma):
    """What a velocity model of this path is to predict."""
    if path == "linear":
        return eps - x_0
    return alpha * eps - sigma * x_0


def alpha_sigma_for(x, path, t):
    """flow.alpha_sigma, shaped to multiply x."""
    alpha, sigma = flow.alpha_sigma(path, t)
    return flow.expand(alpha, x), flow.expand(sigma, x)


# ---- the identities that the project rests on ----------------------------------------------------

def test_ensemble_of_exact_experts_and_posterior_is_the_exact_marginal_flow():
    x_t = points(64, seed=1)
    t = times(0.05, 1, 64)

    def expert(k, x, t):
        return exact_flow(x, t, DATA[CLUSTER == k])

    mixed = flow.ensemble(exact_posterior(x_t, t), expert, x_t, t)
    torch.testing.assert_close(mixed, exact_flow(x_t, t, DATA), rtol=1e-10, atol=1e-10)


def test_exact_flow_is_the_minimiser_that_the_expert_loss_estimates():
    data = points(4, 2)
    generator = torch.Generator().manual_seed(2)
    x_0 = data[torch.randint(4, (20000,), generator=generator)]
    eps = torch.randn(20000, 2, generator=generator, dtype=torch.float64)
    t = constant(0.6, 20000)

    def loss(shift):
        def model(x, t, c):
            return exact_flow(x, t, data) + shift
        return flow.expert_loss(model, x_0, None, t, eps).mean()

    assert loss(0) < min(loss(0.1), loss(-0.1))


def test_a_student_of_each_sample_s_own_expert_learns_the_ensemble():
    """Section 3.6: at each x_t, the gradient of the distillation loss vanishes at
    sum_k p(k | x_t) v^(k).
    """
    x_t = points(4, seed=1)
    t = torch.tensor([0.3, 0.5, 0.8, 1.0], dtype=torch.float64)
    experts = points(3, 5, seed=2)

    def expert(k, x, t):
        return experts[k].expand_as(x)

    student = flow.ensemble(exact_posterior(x_t, t), expert, x_t, t).requires_grad_()
    loss = 0
    # all pairs of x_0 and eps that lead to x_t, by their probability
    probabilities = log_kernel(x_t, t, DATA).softmax(1).T
    for x_0, k, weight in zip(DATA, CLUSTER, probabilities, strict=True):
        x_0 = x_0.expand_as(x_t)
        eps = (x_t - (1 - t)[:, None] * x_0) / t[:, None]
        teacher = experts[k].expand_as(x_t)
        error = flow.distillation_loss(lambda *_: student, lambda *_, v=teacher: v,
                                       x_0, None, t, eps)
        loss = loss + (weight * error).sum()
    loss.backward()
    assert student.grad.abs().max() < 1e-6 and loss > 0.1


def test_exact_flow_takes_noise_to_the_data():
    data = points(5, 3)

    def velocity(x, t):
        return exact_flow(x, constant(t, len(x)), data)

    *_, x = flow.integrate(velocity, points(40, 3, seed=3), flow.time_grid(400))
    assert torch.cdist(x, data).min(1).values.max() < 1e-3


# ---- paths and losses ----------------------------------------------------------------------------

def test_path_begins_at_data_and_ends_at_noise_and_its_derivative_is_the_target():
    x_0 = points(3, 4)
    eps = points(3, 4, seed=1)
    torch.testing.assert_close(flow.interpolate(x_0, eps, constant(0, 3)), x_0)
    torch.testing.assert_close(flow.interpolate(x_0, eps, constant(1, 3)), eps)

    h = 1e-6
    after = flow.interpolate(x_0, eps, constant(0.4 + h, 3))
    before = flow.interpolate(x_0, eps, constant(0.4 - h, 3))
    torch.testing.assert_close((after - before) / (2 * h), eps - x_0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective, path", MODELS)
def test_a_perfect_prediction_has_no_loss_and_becomes_the_velocity(objective, path):
    """A model that knows x_0 and eps and sees what it saw in training, on any path, gives
    v = eps - x_0 on the linear one.
    """
    x_0 = points(8, 4)
    eps = points(8, 4, seed=1)
    t = times(0.06, 0.94, 8)
    seen = []

    def perfect(x, s, c):
        alpha, sigma = alpha_sigma_for(x, path, s)
        torch.testing.assert_close(x, alpha * x_0 + sigma * eps)
        seen.append(alpha / sigma)
        velocity = velocity_on(path, x_0, eps, alpha, sigma)
        return {"velocity": velocity, "x0": x_0, "eps": eps}[objective]

    assert flow.expert_loss(perfect, x_0, None, t, eps, objective, path).max() < 1e-6
    x_t = flow.interpolate(x_0, eps, t)
    v = flow.predict_velocity(perfect, x_t, t, None, objective, path, bound=10)
    torch.testing.assert_close(v, eps - x_0, rtol=1e-4, atol=1e-4, check_dtype=False)
    # the same signal-to-noise ratio
    torch.testing.assert_close(seen[1].flatten(), (1 - t) / t)


@pytest.mark.parametrize("objective, path", MODELS)
def test_the_minimiser_of_any_objective_on_any_path_is_the_exact_flow(objective, path):
    """What a model learns is E[x_0 | x] or E[eps | x]; for a handful of points that is a sum."""
    x_t = points(64, seed=1)
    t = times(0.06, 0.94, 64)

    def minimiser(x, s, c):
        alpha, sigma = alpha_sigma_for(x, path, s)                    # [B,1]
        distance2 = ((x[:, None] - alpha[:, None] * DATA) ** 2).sum(2)
        posterior = (-distance2 / (2 * sigma ** 2)).softmax(1)        # [B,n]
        x_0 = posterior @ DATA
        eps = (x - alpha * x_0) / sigma
        velocity = velocity_on(path, x_0, eps, alpha, sigma)
        return {"velocity": velocity, "x0": x_0, "eps": eps}[objective]

    v = flow.predict_velocity(minimiser, x_t, t, None, objective, path)
    expected = exact_flow(x_t, t, DATA)
    torch.testing.assert_close(v, expected, rtol=1e-3, atol=2e-4, check_dtype=False)


@pytest.mark.parametrize("path", PATHS)
def test_paths_begin_at_data_end_at_noise_and_the_others_preserve_variance(path):
    t = times(0, 1, 101)
    alpha, sigma = flow.alpha_sigma(path, t)
    assert (alpha[0], sigma[0]) == (1, 0) and sigma[-1] > 0.9999 and alpha[-1] < 0.007
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()
    if path != "linear":
        torch.testing.assert_close(alpha ** 2 + sigma ** 2, torch.ones_like(t))

    s = flow.same_snr(path, t)
    assert s[0] == 0 and s[-1] == 1 and (s.diff() >= 0).all()


def test_ddpm_s_path_is_that_of_its_thousand_betas():
    betas = times(1e-4, 0.02, 1000)
    alpha = torch.cumprod(1 - betas, 0).sqrt()
    ours, _ = flow.alpha_sigma("ddpm", torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(ours, alpha, rtol=0, atol=2e-3)


def test_x0_loss_is_the_velocity_loss_of_the_same_prediction():
    x_0 = points(8, 4)
    eps = points(8, 4, seed=1)
    guess = points(8, 4, seed=2)
    t = times(0.06, 1, 8)
    v = flow.to_velocity(guess, flow.interpolate(x_0, eps, t), t, "x0")
    expected = ((v - (eps - x_0)) ** 2).mean(1).float()
    loss = flow.expert_loss(lambda *_: guess, x_0, None, t, eps, "x0")
    torch.testing.assert_close(loss, expected, check_dtype=False)


def test_x0_loss_is_bounded_where_its_weight_is_not():
    x_0 = points(3, 4)
    t = torch.tensor([0.05, 0.01, 0.0], dtype=torch.float64)
    loss = flow.expert_loss(lambda *_: x_0 + 0.1, x_0, None, t, points(3, 4, seed=1), "x0")
    expected = torch.full((3,), (0.1 / 0.05) ** 2)
    torch.testing.assert_close(loss.float(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("time", [0.0, 0.01, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("objective, path", MODELS)
def test_a_prediction_one_percent_off_stays_harmless_at_both_ends(objective, path, time):
    """Unclamped, 1% of eps is an error of 1 in v at t = 0.99, and no number at all at t = 1."""
    x_0 = points(256, 4).clamp(-1, 1)
    eps = points(256, 4, seed=1)
    t = constant(time, 256)

    def rough(x, s, c):
        alpha, sigma = alpha_sigma_for(x, path, s)
        velocity = velocity_on(path, x_0, eps, alpha, sigma)
        return 1.01 * {"velocity": velocity, "x0": x_0, "eps": eps}[objective]

    x_t = flow.interpolate(x_0, eps, t)
    v = flow.predict_velocity(rough, x_t, t, None, objective, path, bound=1)
    error = (v - (eps - x_0)).square().mean().sqrt()
    # v's own size is 1.3; nothing of eps can be read off data, nothing of x_0 off noise
    blind = objective == "x0" and time < 0.05 or objective == "eps" and time > 0.98
    assert error < (1.3 if blind else 0.25)


def test_a_wrong_eps_near_noise_makes_no_x_0_beyond_the_bound():
    x_0 = points(256, 4).clamp(-1, 1)
    eps = points(256, 4, seed=1)
    t = constant(0.94, 256)
    x_t = flow.interpolate(x_0, eps, t)
    wrong = 1.3 * eps

    # v = eps - x_0
    bounded = wrong - flow.to_velocity(wrong, x_t, t, "eps", bound=1)
    assert bounded.abs().max() == pytest.approx(1)
    free = wrong - flow.to_velocity(wrong, x_t, t, "eps")
    assert free.abs().max() > 5


def test_logit_normal_times_have_the_normal_quantiles():
    # -1, 0 and 1 standard deviations
    u = torch.tensor([0.1587, 0.5, 0.8413])
    expected = torch.sigmoid(torch.tensor([-1.0, 0, 1]))
    t = flow.sample_time(u, "logit-normal")
    torch.testing.assert_close(t, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(flow.sample_time(u, "uniform"), u)


def test_shift_changes_log_snr_by_two_ln_s_and_keeps_the_ends():
    t = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    moved = flow.shift_time(t, 3.0)
    assert moved[0] == 0 and moved[3] == 1

    def log_snr(t):
        return 2 * ((1 - t) / t).log()

    fall = log_snr(t[1:3]) - log_snr(moved[1:3])
    torch.testing.assert_close(fall, constant(2 * math.log(3), 2))


def test_router_loss_is_minimal_at_the_data_s_own_frequencies():
    k = torch.tensor([0] * 6 + [1] * 3 + [2])
    x = torch.zeros(10, 2)

    def loss(p):
        logits = torch.tensor(p).log().expand(10, 3)
        return flow.router_loss(lambda *_: logits, x, k, None, torch.ones(10), x)[0].mean()

    others = ([1 / 3] * 3, [0.65, 0.25, 0.1], [0.55, 0.3, 0.15])
    assert loss([0.6, 0.3, 0.1]) < min(map(loss, others))


# ---- strategies ----------------------------------------------------------------------------------

def weights(strategy, p, u=None):
    return flow.choose(flow.parse_strategy(strategy), p, u)


def numbers(n, K, seed=5):
    return torch.rand(n, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


P = (2 * points(50, 6)).softmax(1)
U = numbers(50, 6)
TOP_1 = F.one_hot(P.argmax(1), 6).double()


@pytest.mark.parametrize("strategy", ["top-6", "threshold-0", "sample-6"])
def test_strategies_that_take_all_experts_are_the_full_ensemble(strategy):
    torch.testing.assert_close(weights(strategy, P, U), weights("full", P))
    assert torch.equal(weights("full", P), P)


@pytest.mark.parametrize("strategy", ["top-1", "nucleus-0", "threshold-1"])
def test_strategies_that_take_the_likeliest_are_top_1(strategy):
    assert torch.equal(weights(strategy, P, U), TOP_1)


@pytest.mark.parametrize("strategy", ["sample-1", "sample-3", "nucleus-0.9", "nucleus-1", "once",
                                      "full", "top-3"])
def test_a_temperature_of_nearly_zero_makes_any_of_them_top_1(strategy):
    cold = (P.log() / 1e-6).softmax(1)
    torch.testing.assert_close(weights(strategy, cold, U), TOP_1)


ROUTED = ["full", "top-1", "top-2", "sample-1", "sample-2", "threshold-0.1", "nucleus-0.9", "once"]


@pytest.mark.parametrize("strategy", ROUTED)
def test_a_router_that_is_sure_gets_the_expert_it_names(strategy):
    one_hot = torch.eye(4, dtype=torch.float64)[[2, 0, 3, 1, 2]]
    assert torch.equal(weights(strategy, one_hot, numbers(5, 4)), one_hot)


@pytest.mark.parametrize("strategy", ROUTED)
def test_identical_experts_are_one(strategy):
    x = points(50, 3)
    mixed = flow.ensemble(weights(strategy, P, U), lambda k, x, t: x.sin(), x, constant(0.5, 50))
    torch.testing.assert_close(mixed, x.sin())


@pytest.mark.parametrize("strategy, count", [("top-2", 2), ("top-3", 3), ("sample-1", 1),
                                             ("sample-2", 2), ("nucleus-0.7", 1), ("once", 1)])
def test_so_many_experts_are_chosen_and_the_router_s_weights_renormalised(strategy, count):
    w = weights(strategy, P, U)
    assert ((w > 0).sum(1) == count).all()
    torch.testing.assert_close(w.sum(1), constant(1, 50))
    chosen = P * (w > 0)
    torch.testing.assert_close(w, chosen / chosen.sum(1, keepdim=True))


def test_threshold_keeps_what_is_above_and_nucleus_the_fewest_with_the_mass():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    likeliest = torch.tensor([[1.0, 0, 0, 0]])
    expected = torch.tensor([[0.5, 0.3, 0.15, 0]]) / 0.95
    torch.testing.assert_close(weights("threshold-0.15", p), expected)
    torch.testing.assert_close(weights("threshold-0.9", p), likeliest)

    torch.testing.assert_close(flow.nucleus(p, 0.6), torch.tensor([[0.5, 0.3, 0, 0]]) / 0.8)
    torch.testing.assert_close(flow.nucleus(p, 0.4), likeliest)
    torch.testing.assert_close(flow.nucleus(p, 1.0), p)


@pytest.mark.parametrize("strategy, share", [("sample-1", [0, 0.5, 0.2, 0.3, 0]),
                                             ("once", [0, 0.5, 0.2, 0.3, 0]),
                                             ("nucleus-0.75", [0, 5 / 8, 0, 3 / 8, 0])])
def test_drawn_experts_have_the_router_s_frequencies_and_never_zero_weight(strategy, share):
    n = 20000
    p = torch.tensor([[0.0, 0.5, 0.2, 0.3, 0.0]]).expand(n, 5)
    w = weights(strategy, p, numbers(n, 5))
    # three standard deviations
    torch.testing.assert_close(w.mean(0), torch.tensor(share), rtol=0, atol=0.012)
    assert (w[:, [0, 4]] == 0).all()


def test_two_drawn_experts_are_drawn_without_replacement():
    n = 20000
    p = torch.tensor([0.6, 0.3, 0.1])
    w = weights("sample-2", p.expand(n, 3), numbers(n, 3))

    # the pair is drawn in either order
    for missing, (i, j) in enumerate([(1, 2), (0, 2), (0, 1)]):
        pair = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        share = (w[:, missing] == 0).float().mean()
        assert share == pytest.approx(pair.item(), abs=0.012)


def test_numbers_at_the_edge_of_the_uniform_distribution_do_no_harm():
    below_one = 1 - 2 ** -24
    u = torch.tensor([[0.0, 0.0], [below_one, 0.0], [0.0, below_one]])
    p = torch.tensor([[0.0, 1.0]]).expand(3, 2)
    assert torch.equal(weights("sample-1", p, u), p)


@pytest.mark.parametrize("text", [
    "best", "top-0", "top-", "top-1.5", "top", "once-1", "full-2", "sample-0", "oracle",
    "oracle--1", "threshold-2", "nucleus-1.01", "nucleus-x", "Top-1", "threshold-nan", ""])
def test_what_is_no_strategy_is_refused(text):
    with pytest.raises(ValueError, match="is not one of full, top-N"):
        flow.parse_strategy(text)


@pytest.mark.parametrize("text, parsed", [
    ("full", ("full", 0)), ("once", ("once", 0)), ("top-12", ("top", 12)),
    ("sample-2", ("sample", 2)), ("oracle-0", ("oracle", 0)),
    ("threshold-.05", ("threshold", 0.05)), ("nucleus-1", ("nucleus", 1.0))])
def test_strategies_are_read(text, parsed):
    assert flow.parse_strategy(text) == parsed


# ---- the ensemble and guidance -------------------------------------------------------------------

def test_a_router_whose_answer_is_no_number_does_not_go_unnoticed():
    p = torch.tensor([[0.5, 0.5], [math.nan, math.nan]])
    with pytest.raises(AssertionError, match="not finite"):
        flow.ensemble(weights("full", p), lambda k, x, t: x, torch.ones(2, 3), torch.ones(2))


def test_ensemble_runs_each_chosen_expert_once_on_its_own_samples_only():
    calls = []
    x = torch.arange(6.0)[:, None]
    labels = torch.tensor([2, 0, 2, 2, 0, 2])

    def velocity(k, x_k, t_k, c_k):
        calls.append((k, x_k.flatten().tolist(), c_k.tolist()))
        return x_k * 0 + k

    v = flow.ensemble(F.one_hot(labels, 4).float(), velocity, x, torch.linspace(0, 1, 6),
                      torch.arange(6))
    assert v.flatten().tolist() == labels.tolist()
    assert calls == [(0, [1, 4], [1, 4]), (2, [0, 2, 3, 5], [0, 2, 3, 5])]


def test_a_single_expert_is_itself():
    x = points(7, 3)
    only = torch.ones(7, 1, dtype=torch.float64)
    v = flow.ensemble(only, lambda k, x, t: x.sin(), x, constant(0.5, 7))
    assert torch.equal(v, x.sin())


class Transfers(TorchFunctionMode):
    """Counts the calls in which tensors would leave a device, or come to it and be waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        waits = name == "to" and not kwargs.get("non_blocking")
        self.count += waits or name in ("cpu", "item")
        return function(*args, **kwargs)


@pytest.mark.parametrize("K", [2, 16])
def test_grouping_by_expert_waits_for_the_device_once(K):
    x = torch.randn(32, 3)
    t = torch.rand(32)
    p = torch.rand(32, K).softmax(1)
    with Transfers() as transfers:
        flow.ensemble(p, lambda k, x, t: x, x, t)
    assert transfers.count == 1


def test_guidance_of_one_is_conditional_and_of_zero_unconditional():
    v_c = points(2, 3)
    v_u = points(2, 3, seed=1)
    torch.testing.assert_close(flow.guide(v_c, v_u, 1), v_c)
    torch.testing.assert_close(flow.guide(v_c, v_u, 0), v_u)
    torch.testing.assert_close(flow.guide(v_c, v_u, 3), v_c + 2 * (v_c - v_u))


# ---- solvers -------------------------------------------------------------------------------------

MEAN = torch.tensor([0.5, -2.0], dtype=torch.float64)
DEVIATION = torch.tensor([0.8, 0.5], dtype=torch.float64)


def gaussian_flow(x, t):
    """The exact flow for data N(MEAN, DEVIATION^2); it takes eps to MEAN + DEVIATION eps."""
    variance = (1 - t) ** 2 * DEVIATION ** 2 + t ** 2
    x_0 = MEAN + (1 - t) * DEVIATION ** 2 / variance * (x - (1 - t) * MEAN)
    if t == 0:
        return MEAN * 0 - x_0
    return (x - x_0) / t


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("ab2", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_solvers_converge_at_their_order_to_a_gaussian_s_closed_form(solver, order, shift):
    noise = points(16, 2)

    def error(steps):
        called = []

        def velocity(x, t):
            called.append(t)
            return gaussian_flow(x, t)

        *_, x = flow.integrate(velocity, noise, flow.time_grid(steps, shift), solver)
        assert len(called) == flow.evaluations(steps, solver)
        return (x - (MEAN + DEVIATION * noise)).abs().max().item()

    # heun's last step and ab2's first are Euler's: one local error of second order keeps the
    # global order
    rate = math.log2(error(128) / error(256))
    assert order - 0.25 < rate < order + 0.35
    assert error(256) < {1: 0.05, 2: 0.002}[order]


def test_ab2_is_exact_for_a_velocity_linear_in_t_on_any_grid():
    """But for the first step, which is Euler's."""
    grid = torch.tensor([1, 0.9, 0.5, 0.45, 0.1, 0], dtype=torch.float64)
    *_, x = flow.integrate(lambda x, t: x * 0 + t, constant(0, 1), grid, "ab2")
    assert x.item() == pytest.approx(-0.1 * 1.0 - 0.9 ** 2 / 2)
