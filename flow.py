"""The mathematics: path, targets, losses, guidance, the ensemble, solvers. Equation numbers are of arXiv 2501.05450.

Time runs from data (t = 0) to noise (t = 1) on the linear path of rectified flow:

    x_t = (1 - t) x_0 + t eps,      v = d x_t / d t = eps - x_0,      eps ~ N(0, I).

Shapes: x_0, x_t, eps, v are [B,C,H,W] (any trailing shape will do), t is [B], routing weights are [B,K].
"""
import torch
import torch.nn.functional as F

T_MIN = 0.05        # x0 -> v divides by t, eps -> x0 by 1 - t: neither is taken below this


def expand(t, x):
    """t [B] shaped to multiply x [B,...]."""
    return t.view(-1, *[1] * (x.ndim - 1))


def interpolate(x_0, eps, t):
    """The path: x_t = (1 - t) x_0 + t eps."""
    t = expand(t, x_0)
    return (1 - t) * x_0 + t * eps


def sample_time(u, density="uniform", shift=1.0):
    """Maps u [B], uniform on (0,1), to training times: uniform, or logit-normal (t = sigmoid(z), z ~ N(0,1)), then shifted."""
    t = torch.sigmoid(torch.special.ndtri(u.double())).to(u.dtype) if density == "logit-normal" else u
    return shift_time(t, shift)


def shift_time(t, shift):
    """t' = s t / (1 + (s - 1) t): log-SNR falls by 2 ln s (Esser et al. 2024, eq. 23). For large pictures s = 3, say."""
    return shift * t / (1 + (shift - 1) * t)


# ---- training -----------------------------------------------------------------------------------------------------

def expert_loss(model, x_0, c, t, eps, objective="velocity"):
    """Conditional flow matching on the expert's own cluster (eq. 6) -> squared error of each sample [B].

    An x0 model is trained on its velocity, too: ||v_theta - v||^2 = ||x0_theta - x_0||^2 / t^2.
    """
    out = model(interpolate(x_0, eps, t), t, c).float()
    target = {"velocity": eps - x_0, "x0": x_0, "eps": eps}[objective]
    loss = (out - target).square().flatten(1).mean(1)
    return loss / t.clamp(min=T_MIN).square() if objective == "x0" else loss


def router_loss(router, x_0, k, c, t, eps):
    """Cross-entropy against the cluster k [B] of each sample (algorithm 1) -> (loss [B], whether the answer was right [B]).

    Its minimiser is p(k | x_t, t, c) (eq. 5) only while samples come in the data's own cluster proportions: never balance them.
    """
    logits = router(interpolate(x_0, eps, t), t, c).float()
    return F.cross_entropy(logits, k, reduction="none"), logits.argmax(1) == k


# ---- sampling -----------------------------------------------------------------------------------------------------

def to_velocity(out, x_t, t, objective="velocity"):
    """What a model predicts at (x_t, t), as velocity."""
    if objective == "velocity":
        return out
    t = expand(t, x_t)
    if objective == "x0":
        return (x_t - out) / t.clamp(min=T_MIN)                     # eps - x_0, for eps = (x_t - (1-t) x_0) / t
    return out - (x_t - t * out) / (1 - t).clamp(min=T_MIN)         # eps - x_0, for x_0 = (x_t - t eps) / (1-t)


def guide(v_c, v_u, w):
    """Classifier-free guidance on all channels: v_u + w (v_c - v_u). w = 1: the conditional flow alone."""
    return v_u + w * (v_c - v_u)


def top_k(p, k):
    """Router probabilities [B,K] -> weights [B,K]: the k most likely experts, renormalised. k = K: the full ensemble (eq. 8)."""
    values, index = p.topk(min(k, p.shape[1]), dim=1)
    return torch.zeros_like(p).scatter(1, index, values / values.sum(1, keepdim=True))


def draw(p, u):
    """One expert an image, drawn from p [B,K] by u [B] uniform on [0,1) -> one-hot weights [B,K].

    Drawn once, from the router's answer at t = 1 (pure noise, so p(k | c)), and kept along the whole path, this is exact for
    the mixture p(x | c) = sum_k p(k | c) p(x | k, c): strategy "once".
    """
    k = (p.double().cumsum(1) <= u.double()[:, None] * p.double().sum(1, keepdim=True)).sum(1)
    return F.one_hot(k.clamp(max=p.shape[1] - 1), p.shape[1]).to(p)


def ensemble(weights, velocity, x_t, t, *conditions):
    """v(x_t) = sum_k w_k v^(k)(x_t) (eqs. 7-8), the batch grouped by expert: expert k runs once, on the samples that use it.

    velocity(k, x_t, t, *conditions) -> v of expert k; each condition is None or a tensor [B,...].
    """
    v = torch.zeros_like(x_t)
    for k in weights.sum(0).nonzero().flatten().tolist():
        rows = weights[:, k].nonzero().flatten()
        v_k = velocity(k, x_t[rows], t[rows], *(None if c is None else c[rows] for c in conditions))
        v.index_add_(0, rows, expand(weights[rows, k], v_k) * v_k)
    return v


def time_grid(steps, shift=1.0):
    """[steps + 1] times from 1 (noise) down to 0 (data)."""
    return shift_time(torch.linspace(1, 0, steps + 1), shift)


def integrate(velocity, x, times, solver="euler"):
    """Follows dx/dt = velocity(x, t) along `times` (a float each) from noise x at times[0]; yields x after each step.

    euler: first order, one forward a step. heun: second order, two forwards a step (one in the last, where t reaches 0).
    """
    for now, then in zip(times[:-1].tolist(), times[1:].tolist()):
        v = velocity(x, now)
        moved = x + (then - now) * v
        if solver == "heun" and then > 0:
            moved = x + (then - now) * (v + velocity(moved, then)) / 2
        x = moved
        yield x
