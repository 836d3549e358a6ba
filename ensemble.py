"""The experts and the router of a run as one velocity function: eqs. 7-8 of the paper, from files.

    team = Ensemble("runs/demo", device)                                # or monolith=True: experts/all.safetensors alone
    velocity, used = team.velocity(c, cfg=4, strategy="top-1", u=u)     # c the condition, u [B] uniform numbers for `once`
    *_, x_0 = flow.integrate(velocity, eps, flow.time_grid(50))
"""
import glob
import os
import re
import sys

import torch

import flow
import model as models
import networks
from common import UserError

STRATEGIES = "top-K (top-1, top-2, ...), full or once"


def parse_strategy(text):
    """'top-1' | 'full' | 'once' | ... -> (name, number of experts or 0)."""
    match = re.fullmatch(r"(top)-([1-9]\d*)|(full|once)", text)
    if not match:
        raise UserError(f"strategy {text!r} is not one of {STRATEGIES}")
    return (match[1], int(match[2])) if match[1] else (match[3], 0)


def _must_agree(info):
    """What all models that are used together must have in common."""
    model = info["model"]
    shape = {key: repr(model[key]) for key in ("size", "channels", "condition", "classes", "vocab", "text_dim", "length")}
    return {"clustering (fingerprint)": repr(info["fingerprint"]), **shape}


class Ensemble:
    """Finds the models of a run, checks that they fit together, and loads an expert when it is first needed.

    K is the number of clusters; missing lists those without an expert: left out, the others' weights renormalised.
    info is what the first model's file, `path`, says. UserError if nothing can be sampled from, or models differ in what they must have in common.
    """

    def __init__(self, run, device, monolith=False):
        self.device, self.loaded, self.router, self.missing = device, {}, None, []
        folder = os.path.join(run, "experts")
        if not os.path.isdir(run):
            raise UserError(f"there is no folder {run}: give --run the folder of a trained run")
        if monolith:
            self.paths = {0: os.path.join(folder, "all.safetensors")}
            if not os.path.exists(self.paths[0]):
                raise UserError(f"{self.paths[0]} is missing: train it with train_expert.py --run {run} --shard all")
        else:
            found = (re.fullmatch(r"(\d+)\.safetensors", os.path.basename(p)) for p in glob.glob(os.path.join(glob.escape(folder), "*")))
            self.paths = {int(m[1]): os.path.join(folder, m[0]) for m in sorted(filter(None, found), key=lambda m: int(m[1]))}
            if not self.paths:
                raise UserError(f"no expert in {folder}: train one with train_expert.py --run {run} --shard 0")
        self.infos = {k: _info(path) for k, path in self.paths.items()}
        self.K, checked = 1, dict(zip(self.paths.values(), self.infos.values()))
        if not monolith:
            router = os.path.join(run, "router.safetensors")
            if os.path.exists(router):
                checked[router] = _info(router)
                self.K = checked[router]["model"]["clusters"]
                self.router = models.load(router, device)[0]
            elif len(self.paths) > 1:
                raise UserError(f"{router} is missing: train it with train_router.py --run {run}, or copy it there")
            else:       # a single expert needs nobody to choose it
                self.K = max(self.paths) + 1
            self.missing = [k for k in range(self.K) if k not in self.paths]
            if foreign := [p for k, p in self.paths.items() if k >= self.K]:
                raise UserError(f"{foreign[0]} does not belong to {router}, which knows {self.K} clusters")
            if self.missing:
                print(f"warning: no expert for clusters {', '.join(map(str, self.missing))} of {self.K}: left out, "
                      f"the weights of the others renormalised", file=sys.stderr)
        first = next(iter(checked))
        wanted = _must_agree(checked[first])
        for path, info in checked.items():
            for what, value in _must_agree(info).items():
                if value != wanted[what]:
                    raise UserError(f"{path} and {first} do not fit together: {what} {value} / {wanted[what]}")
            for role in ("autoencoder", "text"):
                a, b = info[role], checked[first][role]
                if networks.identity(a) != networks.identity(b):
                    raise UserError(f"{path} and {first} do not fit together: {role} {networks.label(a)} / {networks.label(b)}")
        self.config, self.info, self.path = models.ModelConfig(**checked[first]["model"]), checked[first], first

    def expert(self, k):
        if k not in self.loaded:
            self.loaded[k] = models.load(self.paths[k], self.device)[0]
        return self.loaded[k]

    def route(self, x_t, t, c):
        """p(k | x_t, t, c) [B,K] over the experts that are there (eq. 5, renormalised)."""
        if len(self.paths) == 1:
            return torch.eye(self.K, device=x_t.device)[[next(iter(self.paths))] * len(x_t)]
        logits = self.router(x_t, t, c).float()
        logits[:, self.missing] = float("-inf")
        return logits.softmax(1)

    def expert_velocity(self, k, x_t, t, c, cfg):
        """Expert k's velocity on x_t [B,C,S,S], t [B]; with guidance, both branches in one batch."""
        objective = self.infos[k]["objective"]
        if c is None or cfg == 1:
            return flow.to_velocity(self.expert(k)(x_t, t, c), x_t, t, objective)
        x, tt = torch.cat([x_t, x_t]), torch.cat([t, t])
        out = self.expert(k)(x, tt, torch.cat([c, models.null_condition(self.config, c)]))
        return flow.guide(*flow.to_velocity(out, x, tt, objective).chunk(2), cfg)

    def velocity(self, c, cfg, strategy, u):
        """-> (velocity(x_t, time), used). One routing decision, for the conditional branch, serves both branches of guidance.

        c: condition [B,...] or None; u [B]: uniform numbers that `once` draws by; used [B,K]: weights, added up over the calls.
        """
        name, k = parse_strategy(strategy)
        used, weights = torch.zeros(len(u), self.K, device=self.device), None

        @torch.inference_mode()
        def velocity(x_t, time):
            nonlocal weights
            t = torch.full((len(x_t),), time, device=x_t.device)
            if name != "once" or weights is None:       # once: the answer at t = 1, for the whole path
                p = self.route(x_t, t, c)
                weights = flow.draw(p, u) if name == "once" else p if name == "full" else flow.top_k(p, k)
            used.add_(weights)
            return flow.ensemble(weights, lambda k, x, tt, cc: self.expert_velocity(k, x, tt, cc, cfg), x_t, t, c)

        return velocity, used


def _info(path):
    try:
        info = models.read_info(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not isinstance(info.get("autoencoder"), dict):
        raise UserError(f"{path} is from an earlier version of this project, which did not say which networks it needs: train it again")
    return info
