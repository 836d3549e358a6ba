"""The mathematics: paths, targets, losses, strategies, guidance, solvers.

Equation numbers are of the paper, arXiv 2501.05450. Time runs from data (t = 0) to noise (t = 1) on
the linear path of rectified flow:

    x_t = (1 - t) x_0 + t eps,      v = d x_t / d t = eps - x_0,      eps ~ N(0, I).

Router and sampling know this path alone. An expert may have been trained on another one, or to
predict eps or x_0: predict_velocity translates.

Shapes: x_0, x_t, eps, v are [B,C,H,W] (any trailing shape will do), t is [B], router probabilities
p and weights are [B,K].
"""
import itertools
import re

import torch
import torch.nn.functional as F
from torch import Tensor

# x_0 -> v divides by t, eps -> x_0 by 1 - t: neither is taken below this
T_MIN = 0.05


def expand(t, x):
    """t [B] shaped to multiply x [B,...]."""
    return t.view(-1, *[1] * (x.ndim - 1))


# ---- paths ---------------------------------------------------------------------------------------

def alpha_sigma(path, t):
    """The path x_t = alpha x_0 + sigma eps at its own time t [B] -> alpha [B], sigma [B].

    linear: 1 - t and t. The others preserve variance, alpha^2 + sigma^2 = 1.
    cosine: an angle of pi t / 2 (Nichol & Dhariwal 2021, without their offset).
    ddpm: beta from 0.1 to 20, linear in t, which is Ho et al.'s 1e-4 to 0.02 in 1000 steps
    (Song et al. 2021, app. C).
    """
    if path == "linear":
        return 1 - t, t

    if path == "cosine":
        angle = torch.pi / 2 * t
        return torch.cos(angle), torch.sin(angle)

    # minus the integral of beta from 0 to t
    log_alpha2 = -(0.1 * t + 9.95 * t * t)
    return torch.exp(log_alpha2 / 2), torch.sqrt(-torch.expm1(log_alpha2))


def same_snr(path, t):
    """The time [B] at which `path` has the signal-to-noise ratio of the linear path at t [B].

    Solves alpha / sigma = (1 - t) / t for the path's own time.
    """
    if path == "linear":
        return t

    if path == "cosine":
        return torch.atan2(t, 1 - t) * 2 / torch.pi

    # 0.1 s + 9.95 s^2 = log(1 + sigma^2 / alpha^2), for s
    noise_to_signal = t / (1 - t).clamp(min=1e-8)
    minus_log_alpha2 = torch.log1p(noise_to_signal.square())
    root = torch.sqrt(0.01 + 4 * 9.95 * minus_log_alpha2)

    # ddpm ends a little short of pure noise
    return ((root - 0.1) / (2 * 9.95)).clamp(max=1)


def interpolate(x_0, eps, t, path="linear"):
    """x_t = alpha x_0 + sigma eps; on the linear path (1 - t) x_0 + t eps."""
    alpha, sigma = alpha_sigma(path, t)
    return expand(alpha, x_0) * x_0 + expand(sigma, x_0) * eps


def shift_time(t, shift):
    """t' = s t / (1 + (s - 1) t): log-SNR falls by 2 ln s (Esser et al. 2024, eq. 23).

    For large images s = 3, say.
    """
    return shift * t / (1 + (shift - 1) * t)


def sample_time(u, density="uniform", shift=1.0):
    """Maps u [B], uniform on (0,1), to training times [B].

    uniform, or logit-normal (t = sigmoid(z), z ~ N(0,1)), then shifted.
    """
    if density == "logit-normal":
        # in float64: float32's quantiles are rough near 0 and 1
        z = torch.special.ndtri(u.double())
        u = torch.sigmoid(z).to(u.dtype)
    return shift_time(u, shift)


# ---- training ------------------------------------------------------------------------------------

def expert_loss(model, x_0: Tensor, c, t: Tensor, eps: Tensor, objective="velocity",
                path="linear") -> Tensor:
    """Conditional flow matching on the expert's own cluster (eq. 6) -> squared error [B].

    velocity on a variance-preserving path is alpha eps - sigma x_0 (Salimans & Ho 2022). An x0
    model is trained on its velocity, too: the error of x_0 over sigma, which is taken as T_MIN at
    the least.
    """
    x_t = interpolate(x_0, eps, t, path)                              # [B,C,H,W]
    out = model(x_t, t, c).float()                                    # [B,C,H,W]

    alpha, sigma = alpha_sigma(path, t)
    if objective == "x0":
        target = x_0
    elif objective == "eps":
        target = eps
    elif path == "linear":
        target = eps - x_0
    else:
        target = expand(alpha, x_0) * eps - expand(sigma, x_0) * x_0

    loss = (out - target).square().flatten(1).mean(1)                 # [B]
    if objective == "x0":
        loss = loss / sigma.clamp(min=T_MIN).square()
    return loss


def router_loss(router, x_0: Tensor, k: Tensor, c, t: Tensor, eps: Tensor):
    """Cross-entropy against the cluster k [B] of each sample (algorithm 1).

    -> (loss [B], whether the answer was right [B]). Its minimiser is p(k | x_t, t, c) (eq. 5) only
    while samples come in the data's own cluster proportions: never balance them.
    """
    x_t = interpolate(x_0, eps, t)                                    # [B,C,H,W]
    logits = router(x_t, t, c).float()                                # [B,K]
    loss = F.cross_entropy(logits, k, reduction="none")               # [B]
    return loss, logits.argmax(1) == k


def distillation_loss(student, teacher, x_0: Tensor, c, t: Tensor, eps: Tensor) -> Tensor:
    """||v_student - v_teacher||^2 of each sample [B] (section 3.6).

    teacher(x_t, t, c) is the velocity of the expert of the samples' own cluster. Given x_t, that
    cluster is distributed as p(k | x_t, t, c), what the router learns, so the minimiser is the
    ensemble's own flow (eq. 8), sum_k p(k | x_t, t, c) v^(k), without a router.
    """
    x_t = interpolate(x_0, eps, t)                                    # [B,C,H,W]
    error = student(x_t, t, c).float() - teacher(x_t, t, c)
    return error.square().flatten(1).mean(1)


# ---- an expert's velocity ------------------------------------------------------------------------

def predict_velocity(model, x_t: Tensor, t: Tensor, c, objective="velocity", path="linear",
                     bound=None) -> Tensor:
    """The velocity of model(x, t, c) at (x_t, t) on the linear path.

    Whatever the model was trained to predict, on whichever path. One of a variance-preserving path
    sees x_t at the time of equal signal-to-noise ratio and rescaled to alpha^2 + sigma^2 = 1.
    """
    norm = 1
    if path != "linear":
        norm = expand(torch.sqrt((1 - t).square() + t.square()), x_t)
    out = model(x_t / norm, same_snr(path, t), c).float()             # [B,C,H,W]
    return to_velocity(out, x_t, t, objective, path, bound)


def to_velocity(out, x_t, t, objective="velocity", path="linear", bound=None):
    """What a model predicted of (x_t, t) on the linear path, as the velocity there.

    bound: the largest |x_0| that there can be. An error in eps is one of t / (1 - t) times as much
    in x_0, so near t = 1 the divisor and x_0 are clamped. Whatever path the model was trained on,
    its x_0 and eps are those of the linear path.
    """
    if objective == "velocity" and path == "linear":
        return out

    t = expand(t, x_t)
    if objective == "x0":
        # eps - x_0, for eps = (x_t - (1-t) x_0) / t
        return (x_t - out) / t.clamp(min=T_MIN)

    if objective == "eps":
        eps = out
        x_0 = (x_t - t * out) / (1 - t).clamp(min=T_MIN)
    else:
        # v = alpha eps - sigma x_0 is a rotation of (x_0, eps): no division
        norm = torch.sqrt((1 - t).square() + t.square())
        alpha = (1 - t) / norm
        sigma = t / norm
        x = x_t / norm
        eps = sigma * x + alpha * out
        x_0 = alpha * x - sigma * out

    if bound is not None:
        x_0 = x_0.clamp(-bound, bound)
    return eps - x_0


# ---- strategies ----------------------------------------------------------------------------------

# Router probabilities p [B,K] -> weights [B,K] of the experts, each row adding up to 1. With E the
# FLOPs of an expert's step (both branches of guidance: two forwards) and R of the router's (two
# forwards if each branch asks for itself), an image and step cost
#
#     full            K E + R     all experts: the exact ensemble (eq. 8)
#     top-N           N E + R     the N likeliest
#     sample-N        N E + R     N different ones, drawn from p at each step
#     threshold-P     E..K E + R  those with p >= P, or the likeliest
#     nucleus-P       E + R       one, drawn at each step from the likeliest that have a mass of P
#                                 together
#     once            E           one, drawn at t = 1 and kept; R is paid once. Exact for the
#                                 mixture p(x | c) = sum_k p(k | c) p(x | k, c)
#     oracle-N        E           expert N, or the expert of the label that each image comes with;
#                                 no router

STRATEGIES = "full, top-N, sample-N, threshold-P, nucleus-P, once, oracle-N"
# those that need random numbers
RANDOM = ("sample", "nucleus", "once")


def parse_strategy(text):
    """'top-2' | 'nucleus-0.9' | 'once' | ... -> (name, number); ValueError."""
    name, dash, number = text.partition("-")
    if name in ("full", "once") and not dash:
        return name, 0
    if name in ("top", "sample") and re.fullmatch(r"[1-9]\d*", number):
        return name, int(number)
    if name == "oracle" and re.fullmatch(r"\d+", number):
        return name, int(number)
    if name in ("threshold", "nucleus") and re.fullmatch(r"\d*\.?\d+", number):
        if float(number) <= 1:
            return name, float(number)
    raise ValueError(f"strategy {text!r} is not one of {STRATEGIES} "
                     f"(N a whole number, but for oracle from 1; P from 0 to 1)")


def choose(strategy, p: Tensor, u=None) -> Tensor:
    """The weights [B,K] of a parsed strategy's experts.

    u [B,K]: the uniform numbers that it draws by; for `once` those of the first step.
    """
    name, number = strategy
    if name == "full":
        return p
    if name == "top":
        return top_k(p, number)
    if name == "threshold":
        return threshold(p, number)
    if name == "sample":
        return sample_experts(p, u, number)
    if name == "nucleus":
        return sample_experts(nucleus(p, number), u)
    assert name == "once", f"the router has no say in {name}"
    return sample_experts(p, u)


def _among(p, chosen):
    """p renormalised over the chosen experts [B,K] (bool)."""
    p = p * chosen
    return p / p.sum(1, keepdim=True)


def _largest(values, k):
    """Where the k largest values of each row are [B,K] (bool)."""
    order = values.topk(min(k, values.shape[1]), dim=1).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, order, True)


def top_k(p, k):
    """The k most likely experts. k = K: the full ensemble."""
    return _among(p, _largest(p, k))


def threshold(p, least):
    """The experts with p >= least, or the likeliest if there is none.

    least = 0: the full ensemble.
    """
    return _among(p, (p >= least) | _largest(p, 1))


def nucleus(p, mass):
    """The fewest most likely experts that have this mass together, at least one.

    Holtzman et al. 2020. mass = 1: all.
    """
    values, order = p.sort(dim=1, descending=True)
    # those before it have less
    inside = values.cumsum(1) - values < mass
    inside[:, 0] = True
    return _among(p, torch.zeros_like(inside).scatter(1, order, inside))


def sample_experts(p, u, k=1):
    """k different experts an image, drawn in proportion to p by u [B,K], uniform on [0,1).

    The k largest of log p plus Gumbel noise are such a draw (Kool et al. 2019).
    """
    gumbel = -torch.log(-torch.log(u.double().clamp(min=1e-12)))
    return _among(p, _largest(p.double().log() + gumbel, k))


# ---- the ensemble and guidance -------------------------------------------------------------------

def ensemble(weights: Tensor, velocity, x_t: Tensor, t: Tensor, *conditions, order=None) -> Tensor:
    """v(x_t) = sum_k w_k v^(k)(x_t) (eqs. 7-8), the batch grouped by expert.

    Expert k runs once, on the samples that use it: velocity(k, x_t, t, *conditions) is its v there.
    Each condition is None or a tensor [B,...]. order: of the experts, if it matters.
    """
    # the one wait for the device: which samples are whose is worked out on the host
    chosen = (weights > 0).cpu()                                      # [B,K]
    assert chosen.any(1).all(), "a sample has no expert: its router's answer is not finite"

    # back goes one list, those of expert 0, then those of expert 1, ..., that nobody waits for
    samples = chosen.T.nonzero()[:, 1].to(x_t.device, non_blocking=True)
    groups = samples.split(chosen.sum(0).tolist())

    v = torch.zeros_like(x_t)
    if order is None:
        order = range(len(groups))
    for k in order:
        rows = groups[k]
        if len(rows) == 0:
            continue
        own = [None if c is None else c[rows] for c in conditions]
        v_k = velocity(k, x_t[rows], t[rows], *own)
        v.index_add_(0, rows, expand(weights[rows, k], v_k) * v_k)
    return v


def guide(v_c, v_u, w):
    """Classifier-free guidance on all channels: v_u + w (v_c - v_u).

    w = 1: the conditional flow alone.
    """
    return v_u + w * (v_c - v_u)


# ---- solvers -------------------------------------------------------------------------------------

def time_grid(steps, shift=1.0):
    """[steps + 1] times from 1 (noise) down to 0 (data), in float64."""
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def evaluations(steps, solver):
    """How often `integrate` calls the velocity."""
    if solver == "heun":
        return 2 * steps - 1
    return steps


def integrate(velocity, x: Tensor, times: Tensor, solver="euler"):
    """Follows dx/dt = velocity(x, t) from noise x at times[0]; yields x after each step.

    times: [steps + 1], of which the velocity gets a float each.
    euler: first order, one forward a step.
    heun: second order, two forwards a step (one in the last, where t reaches 0).
    ab2: second order with one forward a step, from the last two velocities (Adams-Bashforth; the
    first step is Euler's).
    """
    v_before = None
    h_before = None

    for now, then in itertools.pairwise(times.tolist()):
        h = then - now
        v = velocity(x, now)

        slope = v
        if solver == "heun" and then > 0:
            slope = (v + velocity(x + h * v, then)) / 2
        elif solver == "ab2" and v_before is not None:
            slope = v + h / (2 * h_before) * (v - v_before)

        x = x + h * slope
        v_before = v
        h_before = h
        yield x
