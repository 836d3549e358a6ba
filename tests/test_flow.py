"""The mathematics against closed forms. The data are a handful of points, so every flow and posterior is known exactly."""
import math

import pytest
import torch

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


def test_path_begins_at_data_and_ends_at_noise_and_its_derivative_is_the_target():
    x_0, eps = points(3, 4), points(3, 4, seed=1)
    torch.testing.assert_close(flow.interpolate(x_0, eps, torch.zeros(3, dtype=torch.float64)), x_0)
    torch.testing.assert_close(flow.interpolate(x_0, eps, torch.ones(3, dtype=torch.float64)), eps)
    h, t = 1e-6, torch.full((3,), 0.4, dtype=torch.float64)
    slope = (flow.interpolate(x_0, eps, t + h) - flow.interpolate(x_0, eps, t - h)) / (2 * h)
    torch.testing.assert_close(slope, eps - x_0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", ["velocity", "x0", "eps"])
def test_a_perfect_prediction_has_no_loss_and_becomes_the_velocity(objective):
    x_0, eps = points(8, 4), points(8, 4, seed=1)
    t = torch.linspace(0.06, 0.94, 8, dtype=torch.float64)
    perfect = {"velocity": eps - x_0, "x0": x_0, "eps": eps}[objective]
    assert flow.expert_loss(lambda *_: perfect, x_0, None, t, eps, objective).max() < 1e-6
    x_t = flow.interpolate(x_0, eps, t)
    torch.testing.assert_close(flow.to_velocity(perfect, x_t, t, objective), eps - x_0)


def test_x0_loss_is_the_velocity_loss_of_the_same_prediction():
    x_0, eps, guess = points(8, 4), points(8, 4, seed=1), points(8, 4, seed=2)
    t = torch.linspace(0.06, 1, 8, dtype=torch.float64)
    v = flow.to_velocity(guess, flow.interpolate(x_0, eps, t), t, "x0")
    torch.testing.assert_close(flow.expert_loss(lambda *_: guess, x_0, None, t, eps, "x0"), ((v - (eps - x_0)) ** 2).mean(1).float(),
                               check_dtype=False)


@pytest.mark.parametrize("objective", ["x0", "eps"])
def test_conversion_to_velocity_stays_finite_at_both_ends(objective):
    x = points(2, 4)
    assert flow.to_velocity(points(2, 4, seed=1), x, torch.tensor([0.0, 1.0], dtype=torch.float64), objective).abs().max() < 200


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


def test_top_k_of_all_experts_is_the_full_ensemble_and_top_1_the_likeliest():
    p = points(20, 6).softmax(1)
    torch.testing.assert_close(flow.top_k(p, 6), p)
    torch.testing.assert_close(flow.top_k(p, 9), p)
    one = flow.top_k(p, 1)
    assert torch.equal(one.argmax(1), p.argmax(1)) and torch.equal(one.sum(1), torch.ones_like(one[:, 0]))
    two = flow.top_k(p, 2)
    assert ((two > 0).sum(1) == 2).all()
    torch.testing.assert_close(two.sum(1), torch.ones_like(two[:, 0]))


def test_drawn_experts_have_the_router_s_frequencies_and_never_zero_weight():
    p = torch.tensor([[0.0, 0.5, 0.2, 0.3, 0.0]])
    u = (torch.arange(1000) + 0.5) / 1000
    counts = flow.draw(p.expand(1000, 5), u).sum(0)
    assert counts.tolist() == [0, 500, 200, 300, 0]


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


def test_guidance_of_one_is_conditional_and_of_zero_unconditional():
    v_c, v_u = points(2, 3), points(2, 3, seed=1)
    torch.testing.assert_close(flow.guide(v_c, v_u, 1), v_c)
    torch.testing.assert_close(flow.guide(v_c, v_u, 0), v_u)
    torch.testing.assert_close(flow.guide(v_c, v_u, 3), v_c + 2 * (v_c - v_u))


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_solvers_converge_at_their_order(solver, order):
    """dx/dt = x cos(3t) has the solution x(0) = x(1) exp(-sin(3)/3)."""
    def error(steps):
        x = torch.ones(1, dtype=torch.float64)
        *_, x = flow.integrate(lambda x, t: x * math.cos(3 * t), x, flow.time_grid(steps).double(), solver)
        return abs(x.item() - math.exp(-math.sin(3) / 3))
    # heun's last step is Euler's: its one local error, of second order, keeps the global order
    rate = math.log2(error(64) / error(128))
    assert order - 0.25 < rate < order + 0.25


def test_exact_flow_takes_noise_to_the_data():
    data = points(5, 3)
    x = points(40, 3, seed=3)
    *_, x = flow.integrate(lambda x, t: exact_flow(x, torch.full((len(x),), t, dtype=torch.float64), data), x, flow.time_grid(400).double())
    assert torch.cdist(x, data).min(1).values.max() < 1e-3
