"""The experts and the router of a run as one velocity function: eqs. 7-8 of the paper, from files.

    team = Ensemble("runs/demo", device)                        # or only="monolith", only="student": one dense model
    settings = make_config({"sample.strategy": "top-2"}).sample
    velocity = team.velocity(settings, c)                       # c: the condition [B,...] or None
    *_, x_0 = flow.integrate(velocity, eps, flow.time_grid(50))
    velocity.used, team.forwards, team.flops()                  # who drew what, and what it cost

A batch is grouped by expert: each runs once, on the samples that chose it, both branches of guidance together.
"""
import collections
import copy
import functools
import glob
import os
import re
import sys

import torch

import flow
import model as models
from ddm import artifacts, encoders, plan
from ddm.codec import Space
from ddm.config import check_strategy, choices, make_config
from ddm.errors import UserError
from ddm.files import check_shape
from ddm.run import NETWORK



def _must_agree(info):
    """What all models that are used together must have in common. Size, objective and path are each expert's own."""
    model = info["model"]
    shape = {key: repr(model[key]) for key in ("size", "channels", "condition", "classes", "vocab", "text_dim", "length")}
    return {"clustering (fingerprint)": repr(info["fingerprint"]), **shape}


# what a router's file says of itself, and a denoiser's
ROUTER = {"fingerprint": str, "shift": float, "autoencoder": NETWORK, "text": NETWORK}
DENOISER = ROUTER | {"objective": str, "path": str, "shard": str}
#                      its file, its shard, and what trains it
DENSE = {"monolith": ("experts/all.safetensors", "all", "train_expert.py --run-dir {} --shard all"),
         "student":  ("student.safetensors", "student", "distill.py --run-dir {}")}


class Ensemble:
    """Finds the models of a run, checks that they fit together, and loads an expert when it is first needed.

    only: "monolith" or "student", that model instead of the experts. K is the number of clusters; missing lists those without a readable expert: left
    out, the others' weights renormalised (require_all: a UserError). routed: whether there is a router to choose among several. resident:
    experts on the device at most, 0 for all; the one that was used longest ago makes room.
    precision: auto (bf16 on a GPU, fp32 elsewhere), bf16 or fp32, of the weights; compile: torch.compile the blocks.
    info is what the first model's file, `path`, says. forwards counts samples through each expert and "router".
    UserError if nothing can be sampled from, or models differ in what they must have in common.
    """

    def __init__(self, run, device, only="", resident=0, precision="auto", compile=False, require_all=False):
        self.run, self.device, self.resident, self.compile = run, device, resident, compile
        self.dtype, self.forwards = encoders.dtype_of(precision, device), collections.Counter()
        self.precision = encoders.resolve(precision, device)        # what results are named by: bf16, tf32 or fp32
        self.loaded, self.cost = {}, {}     # loaded: the experts on the device, the one used last at the end
        folder = os.path.join(run, "experts")
        if not os.path.isdir(run):
            raise UserError(f"there is no folder {run}: give --run-dir the folder of a trained run")
        if only:
            path, shard, trainer = DENSE[only]
            self.paths = {0: os.path.join(run, path)}
            if not os.path.exists(self.paths[0]):
                raise UserError(f"{self.paths[0]} is missing: train it with {trainer.format(run)}")
        else:
            found = (re.fullmatch(r"(0|[1-9][0-9]{0,5})\.safetensors", os.path.basename(p)) for p in glob.glob(os.path.join(glob.escape(folder), "*")))
            self.paths = {int(m[1]): os.path.join(folder, m[0]) for m in sorted(filter(None, found), key=lambda m: int(m[1]))}
            if not self.paths:
                raise UserError(f"no expert in {folder}: train one with train_expert.py --run-dir {run} --shard 0")
        self.infos, unreadable = {}, {}
        for k, path in self.paths.items():
            try:
                self.infos[k] = _info(path, DENOISER)
            except UserError as error:
                unreadable[k] = str(error)
                continue
            if (trained := self.infos[k]["shard"]) != (shard if only else str(k)):
                raise UserError(f"{path} was trained on shard {trained}: name it {trained}.safetensors")
        if len(unreadable) == len(self.paths):
            raise UserError("; ".join(unreadable.values()))
        self.K = max(self.paths) + 1        # without a router to say how many clusters there are
        router = os.path.join(run, "router.safetensors")
        if routed := not only and os.path.exists(router):
            self.K = (router_info := _info(router, ROUTER))["model"]["clusters"]
            if foreign := [p for k, p in self.paths.items() if k >= self.K]:
                raise UserError(f"{foreign[0]} does not belong to {router}, which knows {self.K} clusters")
        self.paths = {k: path for k, path in self.paths.items() if k not in unreadable}
        checked = {path: self.infos[k] for k, path in self.paths.items()}
        if routed:
            checked[router] = router_info
        self.path, self.info = next(iter(checked.items()))
        self.config = models.ModelConfig(**self.info["model"])
        for path, info in checked.items():
            self.check_fits(path, info)
        self.missing = [k for k in range(self.K) if k not in self.paths]
        if self.missing:
            why = "; ".join(unreadable.values())
            text = (f"no {'usable ' if why else ''}expert for cluster{'s' * (len(self.missing) > 1)} {', '.join(map(str, self.missing))} of {self.K}"
                    + (f" ({why})" if why else ""))
            if require_all:
                raise UserError(f"{text}: bring them to {folder}")
            if os.environ.get("RANK", "0") == "0":
                print(f"warning: {text}: left out, the weights of the others renormalised", file=sys.stderr)
        self.routed = routed and len(self.paths) > 1       # a single expert needs nobody to choose it

    def check_fits(self, name, info):
        """UserError if the model that `info` describes (called `name`) differs from this ensemble in what they must have in common."""
        together = f"{name} and {self.path} do not fit together"
        wanted = _must_agree(self.info)
        for what, value in _must_agree(info).items():
            if value != wanted[what]:
                raise UserError(f"{together}: {what} {value} / {wanted[what]}")
        for role in ("autoencoder", "text"):
            a, b = info[role], self.info[role]
            if encoders.identity(a) != encoders.identity(b):
                raise UserError(f"{together}: {role} {encoders.label(a)} / {encoders.label(b)}")

    def in_precision(self, precision):
        """This ensemble with its weights in another precision, its models not yet loaded; what is loaded of this one is let go.

        They may not all fit then: as many stay on a GPU as there is room for.
        """
        if encoders.dtype_of(precision, self.device) == self.dtype:
            return self
        self.loaded.clear()
        self.__dict__.pop("router", None)
        other = copy.copy(self)
        other.loaded = {}
        other.dtype, other.precision = encoders.dtype_of(precision, self.device), encoders.resolve(precision, self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            sizes = [plan.parameter_count(models.ModelConfig(**info["model"])) * other.dtype.itemsize for info in self.infos.values()]
            # half of what is free: a forward pass needs its own
            fits = plan.how_many(sizes, torch.cuda.mem_get_info(self.device)[0] / 2)
            other.resident = min(self.resident or len(sizes), fits)
        return other

    @functools.cached_property
    def router(self):
        return self._load(os.path.join(self.run, "router.safetensors"), "router")

    def _load(self, path, name):
        try:
            model = artifacts.load(path, self.device, self.dtype)[0]
        except ValueError as error:
            raise UserError(str(error), local=True) from None
        model.requires_grad_(False)
        self.cost[name] = plan.flops(model.config)
        if self.compile:        # all blocks of a shape share one graph
            for block in model.blocks:
                block.compile(dynamic=True)
        return model

    def expert(self, k):
        """Expert k, loaded if it is not on the device."""
        if k not in self.loaded:
            while 0 < self.resident <= len(self.loaded):
                del self.loaded[next(iter(self.loaded))]
            self.loaded[k] = self._load(self.paths[k], k)
        self.loaded[k] = self.loaded.pop(k)
        return self.loaded[k]

    @torch.no_grad()
    def route(self, x_t, t, c, temperature=1.0):
        """p(k | x_t, t, c) [B,K] over the experts that are there (eq. 5, tempered and renormalised)."""
        self.forwards["router"] += len(x_t)
        logits = self.router(x_t.to(self.dtype), t, c).float() / temperature
        logits[:, self.missing] = float("-inf")
        return logits.softmax(1)

    @torch.no_grad()
    def expert_velocity(self, k, x_t, t, c):
        """Expert k's velocity on x_t [B,C,S,S], t [B], without guidance, whatever it was trained to predict."""
        model, info = self.expert(k), self.infos[k]
        self.forwards[k] += len(x_t)
        return flow.predict_velocity(lambda x, t, c: model(x.to(self.dtype), t, c), x_t, t, c, info["objective"], info["path"],
                                     encoders.bound(info["autoencoder"]))

    def flops(self):
        """FLOPs of all forwards so far (a multiply-add is two)."""
        return sum(count * self.cost[name] for name, count in self.forwards.items())

    def check(self, settings):
        """UserError if this ensemble cannot be sampled from with `settings`, [sample] of a config."""
        name, number = check_strategy(settings.strategy)
        if name in ("top", "sample") and number > self.K:
            raise UserError(f"strategy {settings.strategy!r} asks for {number} experts of {self.K}")
        if name == "oracle" and number not in self.paths:
            raise UserError(f"strategy {settings.strategy!r}: there is no expert {number}, but {', '.join(map(str, self.paths))}")
        if name != "oracle" and not self.routed and len(self.paths) > 1:
            raise UserError(f"{self.run}/router.safetensors is missing: train it with train_router.py --run-dir {self.run}, or copy it there")

    def shift(self, settings):
        """The shift of the solver's times: the settings', or the one that the experts were trained with. UserError if that differs."""
        shifts = {k: info["shift"] for k, info in self.infos.items()}
        if not settings.shift and len(set(shifts.values())) > 1:
            raise UserError(f"the experts were trained with different shifts ({', '.join(f'{k}: {s}' for k, s in shifts.items())}): say which with --shift")
        return settings.shift or next(iter(shifts.values()))

    def velocity(self, settings, c=None, c_null=None, u=None, labels=None):
        """-> Velocity along one batch's path.

        settings: [sample] of a config. c: condition [B,...] or None. c_null: what guidance leads away from (None: no condition; else a
        negative prompt). u [B,R,K]: uniform numbers for strategies that draw, R for the calls of the velocity (once: 1). labels [B]: the
        expert of each sample, in place of the router.
        """
        return Velocity(self, settings, c, c_null, u, labels)


class Velocity:
    """velocity(x_t [B,C,S,S], time float) -> v: the ensemble under one strategy, guided. Calls must follow one path from t = 1 on.

    used [B,K]: the weights of the experts (of the conditional branch), added up over the calls; weights [B,K]: the last call's.
    alone: how many forwards a sample would have taken of a single expert.
    """

    def __init__(self, team, settings, c, c_null, u, labels):
        if labels is None:
            team.check(settings)
            name, number = flow.parse_strategy(settings.strategy)
            if name == "oracle" or len(team.paths) == 1:
                labels = number if name == "oracle" else next(iter(team.paths))
            elif u is None and name in flow.DRAWING:
                raise ValueError(f"strategy {settings.strategy} draws: give it u")
        elif gone := sorted(set(torch.as_tensor(labels).flatten().tolist()) - team.paths.keys()):
            raise UserError(f"labels {', '.join(map(str, gone))}: there are experts for {', '.join(map(str, team.paths))} of {team.K} clusters")
        self.team, self.settings, self.c, self.calls, self.used = team, settings, c, 0, 0
        self.alone = 0
        self.c_null = models.null_condition(team.config, c) if c_null is None else c_null
        self.route = _Route(team, settings, c, u, labels)
        own = settings.cfg_routing == "own" and not self.route.kept
        self.route_null = _Route(team, settings, self.c_null, u, labels) if own else None

    @torch.no_grad()
    def __call__(self, x_t, time):
        s, t = self.settings, torch.full((len(x_t),), time, device=x_t.device)
        guided = self.c is not None and s.cfg != 1 and s.cfg_low - 1e-6 < time < s.cfg_high + 1e-6      # the ends are in, whatever the rounding
        self.weights = w = self.route(x_t, t, self.calls)
        self.used = self.used + w
        c = self.c
        if guided:      # both branches as one batch of 2B
            w_null = self.route_null(x_t, t, self.calls) if self.route_null else w
            x_t, t, c, w = torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([c, self.c_null]), torch.cat([w, w_null])
        self.calls, self.alone = self.calls + 1, self.alone + 1 + guided
        # experts on the device go first, before others take their place
        order = sorted(range(self.team.K), key=lambda k: k not in self.team.loaded)
        v = flow.ensemble(w, self.team.expert_velocity, x_t, t, c, order=order)
        return flow.guide(*v.chunk(2), s.cfg) if guided else v


class _Route:
    """The experts of one branch of a batch along its path. kept: decided once for the whole path."""

    def __init__(self, team, settings, c, u, labels):
        self.team, self.settings, self.c, self.u = team, settings, c, u
        self.p = self.weights = self.open = None        # open: the samples that still ask the router
        self.strategy = ("oracle", labels) if labels is not None else flow.parse_strategy(settings.strategy)
        self.kept = self.strategy[0] in ("oracle", "once")

    def __call__(self, x_t, t, call):
        """-> weights [B,K] for the velocity's call number `call`, 0 at t = 1."""
        name, number = self.strategy
        if self.kept and self.weights is not None:
            return self.weights
        if name == "oracle":
            k = torch.as_tensor(number, device=x_t.device).expand(len(x_t))
            self.weights = torch.nn.functional.one_hot(k, self.team.K).to(x_t)
            return self.weights
        if self.p is None:
            self.p = torch.zeros(len(x_t), self.team.K, device=x_t.device)
            self.open, ask = torch.arange(len(x_t), device=x_t.device), True
        else:
            ask = call % self.settings.route_every == 0
        if ask and len(self.open):
            rows = self.open
            p = self.team.route(x_t[rows], t[rows], None if self.c is None else self.c[rows], self.settings.router_temperature)
            if self.settings.route_every > 1 and self.settings.route_epsilon:
                sure = p.max(1).values >= 1 - self.settings.route_epsilon
                p = torch.where(sure[:, None], flow.top_k(p, 1), p)
                self.open = rows[~sure]
            self.p[rows] = p
        self.weights = flow.choose(self.strategy, self.p, self.u[:, 0 if self.kept else call] if name in flow.DRAWING else None)
        return self.weights


def beginnings(seeds, shape, calls, K):
    """-> (noise [B,*shape], u [B,calls,K]) of images with these seeds: a generator an image, so that it is the same in any batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
    return noise, torch.stack([torch.rand(calls, K, generator=g) for g in generators])


def open_space(team, run_config, given, device):
    """The pretrained.Space that the models of `team` were trained in. Where its networks are now: flags say, or the run's config, or the models."""
    config, info = make_config(given), team.info
    config.data.condition, config.data.size = team.config.condition, team.config.size * info["autoencoder"].get("factor", 1)
    for role in ("autoencoder", "text"):
        if f"{role}.name" not in given:
            local = getattr(run_config, role).name
            getattr(config, role).name = local if "weights" in info[role] and local != encoders.NONE[role] else info[role]["name"]
        elif "weights" not in info[role]:
            raise UserError(f"--{role}.name {given[f'{role}.name']}: {team.path} was trained without a pretrained {role} network")
    config.text.length, config.text.vocab = team.config.length, team.config.vocab
    config.text.layer = info["text"].get("layer", "last")
    # as in training, whatever the device was: a text encoder's tf32 is its fp32 on a GPU
    config.text.precision = info["text"].get("precision", "auto").replace("tf32", "fp32")
    return Space(config, device, info, team.path)


def _info(path, shape):
    """What a model's file says of itself, which has the types of `shape`. UserError."""
    try:
        info = artifacts.read_info(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        check_shape(info, shape)
    except ValueError as error:
        raise UserError(f"{path} is not a model of this project, or has been damaged: copy it again ({error})") from None
    for key in ("objective", "path") if "objective" in shape else ():       # a fork may know others
        if info[key] not in choices("flow", key):
            raise UserError(f"{path} has {key} = {info[key]!r}, which is not one of {', '.join(choices('flow', key))}")
    return info
