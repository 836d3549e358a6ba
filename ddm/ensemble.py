"""The experts and the router of a run as one velocity function: eqs. 7-8 of the paper, from files.

    # or only="monolith", only="student": one dense model
    team = Ensemble("runs/demo", device)
    settings = make_config({"sample.strategy": "top-2"}).sample
    # c: the condition [B,...] or None
    velocity = team.velocity(settings, c)
    *_, x_0 = flow.integrate(velocity, eps, flow.time_grid(50))
    # which experts made which image, and what it cost
    velocity.used, team.forwards, team.flops()

A batch is grouped by expert: each runs once, on the samples that chose it, both branches of
guidance together.
"""
import collections
import copy
import functools
import glob
import os
import re
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import flow
from ddm import artifacts, encoders, plan
from ddm.codec import Space
from ddm.config import Sample, check_strategy, choices, make_config
from ddm.errors import UserError
from ddm.files import check_shape
from ddm.run import NETWORK
from model import ModelConfig, null_condition

# what a router's file says of itself, and a denoiser's
ROUTER = {"fingerprint": str, "shift": float, "autoencoder": NETWORK, "text": NETWORK}
DENOISER = ROUTER | {"objective": str, "path": str, "shard": str}

# what models that are used together have in common; size, objective and path are each one's own
COMMON = ("size", "channels", "condition", "classes", "vocab", "text_dim", "length")


class Dense(NamedTuple):
    """One model in the place of the ensemble."""

    path: str
    shard: str
    # the command that trains it, {} for the run
    trainer: str


DENSE = {
    "monolith": Dense("experts/all.safetensors", "all", "train_expert.py --run-dir {} --shard all"),
    "student": Dense("student.safetensors", "student", "distill.py --run-dir {}"),
}


class Ensemble:
    """Finds the models of a run, checks that they fit together, loads an expert when first needed.

    only: "monolith" or "student", that model instead of the experts.
    resident: experts on the device at most, 0 for all; the one used longest ago makes room.
    precision: auto (bf16 on a GPU, fp32 elsewhere), bf16 or fp32, of the weights.
    compile: torch.compile the blocks. require_all: a missing expert is a UserError.

    K is the number of clusters; missing lists those without a readable expert: left out, the
    others' weights renormalised. routed: whether there is a router to choose among several experts.
    info is what the first model's file, `path`, says; config its ModelConfig. forwards counts the
    samples through each expert and "router".
    UserError if nothing can be sampled from, or models differ in what they must have in common.
    """

    def __init__(self, run_dir, device, only="", resident=0, precision="auto", compile=False,
                 require_all=False):
        self.run_dir = run_dir
        self.device = device
        self.resident = resident
        self.compile = compile
        self.dtype = encoders.dtype_of(precision, device)
        # what results are named by: bf16, tf32 or fp32
        self.precision = encoders.resolve(precision, device)
        # expert -> its model on the device, the one used last at the end
        self.loaded = {}
        # of each expert and "router": FLOPs of a forward, and samples that went through it
        self.cost = {}
        self.forwards = collections.Counter()

        found = find_models(run_dir, only)
        unreadable = self._read_infos(found, only)
        self.paths = {k: found[k] for k in self.infos}
        # where no router says how many clusters there are
        self.K = max(found) + 1
        router = None
        # [BINS] of the router's logits, in equal bins of t; None: it has not been calibrated
        self.temperatures = None
        if not only and os.path.exists(self.router_path):
            router = self.router_info = self._read_router(found)
            if "temperatures" in router:
                self.temperatures = torch.tensor(router["temperatures"], device=device)

        # the files agree with each other
        first = min(self.paths)
        self.path = self.paths[first]
        self.info = self.infos[first]
        self.config = ModelConfig(**self.info["model"])
        for k, path in self.paths.items():
            self.check_fits(path, self.infos[k])
        if router:
            self.check_fits(self.router_path, router)

        self.missing = [k for k in range(self.K) if k not in self.paths]
        if self.missing:
            self._warn_of_missing(list(unreadable.values()), require_all)
        # a single expert needs nobody to choose it
        self.routed = router is not None and len(self.paths) > 1

    # ---- what its files say

    @property
    def router_path(self):
        return os.path.join(self.run_dir, "router.safetensors")

    def _read_infos(self, found, only):
        """Sets infos {k: what expert k's file says} -> {k: why not} of the unreadable ones."""
        self.infos = {}
        unreadable = {}
        for k, path in found.items():
            # a torn copy of one expert does not stop the others
            try:
                info = read_model_info(path, DENOISER)
            except UserError as error:
                unreadable[k] = str(error)
                continue

            wanted = DENSE[only].shard if only else str(k)
            if info["shard"] != wanted:
                raise UserError(f"{path} was trained on shard {info['shard']}: "
                                f"name it {info['shard']}.safetensors")
            self.infos[k] = info

        if not self.infos:
            raise UserError("; ".join(unreadable.values()))
        return unreadable

    def _read_router(self, found):
        """Sets K -> what the router's file says."""
        info = read_model_info(self.router_path, ROUTER)
        self.K = info["model"]["clusters"]
        foreign = [path for k, path in found.items() if k >= self.K]
        if foreign:
            raise UserError(f"{foreign[0]} does not belong to {self.router_path}, "
                            f"which knows {self.K} clusters")
        return info

    def check_fits(self, name, info):
        """UserError if a model does not fit this ensemble. info: what its file says; name: its name
        for the message.
        """
        together = f"{name} and {self.path} do not fit together"
        values = {"clustering (fingerprint)": (info["fingerprint"], self.info["fingerprint"])}
        for key in COMMON:
            values[key] = (info["model"][key], self.info["model"][key])
        for what, (its, ours) in values.items():
            if its != ours:
                raise UserError(f"{together}: {what} {its!r} / {ours!r}")

        # wherever they were loaded from
        for role in ("autoencoder", "text"):
            its = info[role]
            ours = self.info[role]
            if encoders.identity(its) != encoders.identity(ours):
                raise UserError(f"{together}: {role} "
                                f"{encoders.label(its)} / {encoders.label(ours)}")

    def _warn_of_missing(self, reasons, require_all):
        """Names the clusters without an expert; reasons: why files could not be read."""
        usable = "usable " if reasons else ""
        plural = "s" if len(self.missing) > 1 else ""
        names = ", ".join(map(str, self.missing))
        text = f"no {usable}expert for cluster{plural} {names} of {self.K}"
        if reasons:
            text += f" ({'; '.join(reasons)})"

        if require_all:
            raise UserError(f"{text}: bring them to {os.path.join(self.run_dir, 'experts')}")
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {text}: left out, the weights of the others renormalised",
                  file=sys.stderr)

    def check(self, settings: Sample):
        """UserError if this ensemble cannot be sampled from with `settings`, [sample]."""
        name, number = check_strategy(settings.strategy)
        if name in ("top", "sample") and number > self.K:
            raise UserError(f"strategy {settings.strategy!r} asks for {number} experts "
                            f"of {self.K}")
        if name == "oracle" and number not in self.paths:
            raise UserError(f"strategy {settings.strategy!r}: there is no expert {number}, "
                            f"but {self.expert_names()}")
        # one expert needs no router, and an oracle asks none
        if name != "oracle" and not self.routed and len(self.paths) > 1:
            raise UserError(f"{self.router_path} is missing: train it with "
                            f"train_router.py --run-dir {self.run_dir}, or copy it there")

    def expert_names(self):
        """The experts that are there, for a message."""
        return ", ".join(map(str, self.paths))

    def shift(self, settings: Sample):
        """The shift of the solver's times: the settings', or the one that the experts have.

        UserError if theirs differ.
        """
        if settings.shift:
            return settings.shift
        if len({info["shift"] for info in self.infos.values()}) > 1:
            each = ", ".join(f"{k}: {info['shift']}" for k, info in self.infos.items())
            raise UserError(f"the experts were trained with different shifts ({each}): "
                            f"say which with --shift")
        return self.info["shift"]

    # ---- its models

    def expert(self, k):
        """Expert k, loaded if it is not on the device."""
        if k in self.loaded:
            model = self.loaded.pop(k)
        else:
            # the one used longest ago makes room
            while 0 < self.resident <= len(self.loaded):
                del self.loaded[next(iter(self.loaded))]
            model = self._load(self.paths[k], k)
        self.loaded[k] = model
        return model

    @functools.cached_property
    def router(self):
        return self._load(self.router_path, "router")

    def _load(self, path, name):
        try:
            model, _ = artifacts.load(path, self.device, self.dtype)
        except ValueError as error:
            # loaded when needed, so this rank may be alone with it
            raise UserError(str(error), local=True) from None
        # guidance and students need gradients of none of it
        model.requires_grad_(False)
        self.cost[name] = plan.flops(model.config)
        if self.compile:
            # all blocks of a shape share one graph
            for block in model.blocks:
                block.compile(dynamic=True)
        return model

    def in_precision(self, precision):
        """This ensemble with its weights in another precision, nothing loaded yet.

        What is loaded of this one is let go. They may not all fit then: as many stay on a GPU as
        there is room for.
        """
        dtype = encoders.dtype_of(precision, self.device)
        if dtype == self.dtype:
            return self

        self.loaded.clear()
        # the cached one
        vars(self).pop("router", None)
        other = copy.copy(self)
        other.loaded = {}
        other.dtype = dtype
        other.precision = encoders.resolve(precision, self.device)

        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            sizes = []
            for info in self.infos.values():
                sizes.append(plan.parameter_count(ModelConfig(**info["model"])) * dtype.itemsize)
            # half of what is free: a forward pass needs its own
            free, _ = torch.cuda.mem_get_info(self.device)
            fits = plan.how_many(sizes, free / 2)
            other.resident = min(self.resident or len(sizes), fits)
        return other

    def flops(self):
        """FLOPs of all forwards so far (a multiply-add is two)."""
        return sum(count * self.cost[name] for name, count in self.forwards.items())

    # ---- what they predict

    def velocity(self, settings: Sample, c: Tensor | None = None, c_null: Tensor | None = None,
                 u: Tensor | None = None, labels: Tensor | None = None):
        """-> Velocity along the path of one batch.

        c: condition [B,...] or None.
        c_null: what guidance leads away from [B,...]; None: no condition; else a negative prompt.
        u: [B,R,K] uniform numbers for strategies that draw, R for the calls of the velocity (for
        once: 1). labels: [B] the expert of each sample, in place of the router.
        """
        return Velocity(self, settings, c, c_null=c_null, u=u, labels=labels)

    @torch.no_grad()
    def route(self, x_t: Tensor, t: Tensor, c: Tensor | None, temperature=1.0,
              calibrated=True) -> Tensor:
        """p(k | x_t, t, c) [B,K] over the experts that are there (eq. 5), tempered.

        calibrated: also by the temperatures in the router's file, if it has any.
        """
        self.forwards["router"] += len(x_t)
        # its head is float32 in any precision
        logits = self.router(x_t.to(self.dtype), t, c).float() / temperature
        if calibrated and self.temperatures is not None:
            bins = len(self.temperatures)
            bin_of_t = (t * bins).long().clamp(max=bins - 1)          # [B]
            logits = logits / self.temperatures[bin_of_t, None]
        # the softmax renormalises over the others
        logits[:, self.missing] = float("-inf")
        return logits.softmax(1)

    @torch.no_grad()
    def expert_velocity(self, k, x_t: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
        """Expert k's velocity on x_t [B,C,S,S], t [B], without guidance.

        Whatever it was trained to predict, in whatever precision its weights are.
        """
        expert = self.expert(k)
        info = self.infos[k]
        self.forwards[k] += len(x_t)

        def model(x, t, c):
            return expert(x.to(self.dtype), t, c)

        return flow.predict_velocity(model, x_t, t, c, objective=info["objective"],
                                     path=info["path"], bound=encoders.bound(info["autoencoder"]))


# ---- along a path --------------------------------------------------------------------------------

@dataclass
class Branch:
    """One branch of guidance, and what the router has said in it."""

    # condition [B,...] or None
    c: Tensor | None
    # [B,K], the router's last answer on each sample
    p: Tensor | None = None
    # rows of the samples that still ask: the router is not yet sure of them
    asking: Tensor | None = None


class Velocity:
    """velocity(x_t [B,C,S,S], time float) -> v: the ensemble under one strategy, guided.

    Calls must follow one path from t = 1 on.
    weights [B,K]: of the experts (of the conditional branch) in the last call; used [B,K]: added up
    over the calls. calls: how many. alone: how many forwards a sample would have taken of a single
    expert. Arguments: see Ensemble.velocity.
    """

    def __init__(self, team: Ensemble, settings: Sample, c=None, c_null=None, u=None, labels=None):
        self.team = team
        self.settings = settings
        self.strategy = check_strategy(settings.strategy)
        self.labels = labels
        self.u = u
        self._check()

        # guidance leads away from no condition
        if c_null is None:
            c_null = null_condition(team.config, c)
        self.conditional = Branch(c)
        self.unconditional = Branch(c_null)

        # weights [B,K] that are chosen once for the path and both branches
        self.kept = None
        self.weights = None
        self.used = 0
        self.calls = 0
        self.alone = 0

    def _check(self):
        """Settles `labels`. UserError for what this ensemble does not have."""
        team = self.team
        name, number = self.strategy
        if self.labels is not None:
            gone = sorted(set(torch.as_tensor(self.labels).flatten().tolist()) - team.paths.keys())
            if gone:
                raise UserError(f"labels {', '.join(map(str, gone))}: there are experts for "
                                f"{team.expert_names()} of {team.K} clusters")
            return

        team.check(self.settings)
        if name == "oracle":
            self.labels = number
        elif len(team.paths) == 1:
            self.labels = min(team.paths)
        elif name in flow.RANDOM and self.u is None:
            raise ValueError(f"strategy {self.settings.strategy} draws: give it u")

    @torch.no_grad()
    def __call__(self, x_t: Tensor, time: float) -> Tensor:
        t = torch.full((len(x_t),), time, device=x_t.device)
        w = self.choose_experts(self.conditional, x_t, t)             # [B,K]
        self.weights = w
        self.used = self.used + w

        c = self.conditional.c
        guided = self.guided(time)
        if guided:
            # one routing decision serves both branches, unless each is to ask for itself
            w_null = w
            if self.settings.cfg_routing == "own":
                w_null = self.choose_experts(self.unconditional, x_t, t)

            # both branches as one batch of 2B
            x_t = torch.cat([x_t, x_t])
            t = torch.cat([t, t])
            c = torch.cat([c, self.unconditional.c])
            w = torch.cat([w, w_null])
        self.calls += 1
        self.alone += 1 + guided

        # experts on the device go first, before others take their place
        order = sorted(range(self.team.K), key=lambda k: k not in self.team.loaded)
        v = flow.ensemble(w, self.team.expert_velocity, x_t, t, c, order=order)
        if not guided:
            return v
        v_c, v_u = v.chunk(2)
        return flow.guide(v_c, v_u, self.settings.cfg)

    def guided(self, time):
        """Whether guidance has an effect at this time."""
        s = self.settings
        if self.conditional.c is None or s.cfg == 1:
            return False
        # the ends are in, whatever the rounding
        return s.cfg_low - 1e-6 < time < s.cfg_high + 1e-6

    def choose_experts(self, branch, x_t, t):
        """-> weights [B,K] of the experts for this call, of a branch."""
        if self.kept is not None:
            return self.kept

        if self.labels is not None:
            k = torch.as_tensor(self.labels, device=x_t.device).expand(len(x_t))
            self.kept = F.one_hot(k, self.team.K).to(x_t)
            return self.kept

        self._ask_router(branch, x_t, t)
        name, _ = self.strategy
        if name == "once":
            self.kept = flow.choose(self.strategy, branch.p, self.u[:, 0])
            return self.kept
        # new numbers at each call, the same in both branches
        u = self.u[:, self.calls] if name in flow.RANDOM else None
        return flow.choose(self.strategy, branch.p, u)

    def _ask_router(self, branch, x_t, t):
        """Brings branch.p up to date, where it is time to ask: every route_every calls."""
        s = self.settings
        if branch.p is None:
            branch.p = torch.zeros(len(x_t), self.team.K, device=x_t.device)
            branch.asking = torch.arange(len(x_t), device=x_t.device)
        elif self.calls % s.route_every:
            return
        rows = branch.asking
        if len(rows) == 0:
            return

        c = None if branch.c is None else branch.c[rows]
        p = self.team.route(x_t[rows], t[rows], c, s.router_temperature, s.router_calibration)
        if s.route_every > 1 and s.route_epsilon:
            # a sample that the router is sure of keeps its expert, and asks no more
            sure = p.max(1).values >= 1 - s.route_epsilon
            p = torch.where(sure[:, None], flow.top_k(p, 1), p)
            branch.asking = rows[~sure]
        branch.p[rows] = p


def beginnings(seeds, shape, calls, K):
    """-> (noise [B,*shape], u [B,calls,K] uniform on [0,1)) of images with these seeds.

    A generator an image, so that an image is the same in any batch.
    """
    noise = []
    u = []
    # on the CPU, and noise before u: both are part of what a seed means
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn(shape, generator=generator))
        u.append(torch.rand(calls, K, generator=generator))
    return torch.stack(noise), torch.stack(u)


# ---- files ---------------------------------------------------------------------------------------

def find_models(run_dir, only=""):
    """-> {k: path} of the experts of a run, or {0: path} of `only`, a key of DENSE. UserError."""
    if not os.path.isdir(run_dir):
        raise UserError(f"there is no folder {run_dir}: give --run-dir the folder of a trained run")

    if only:
        path = os.path.join(run_dir, DENSE[only].path)
        if not os.path.exists(path):
            trainer = DENSE[only].trainer.format(run_dir)
            raise UserError(f"{path} is missing: train it with {trainer}")
        return {0: path}

    folder = os.path.join(run_dir, "experts")
    found = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "*")):
        # 0.safetensors, 12.safetensors; neither all.safetensors nor 007.safetensors
        match = re.fullmatch(r"(0|[1-9][0-9]{0,5})\.safetensors", os.path.basename(path))
        if match:
            found[int(match[1])] = path
    if not found:
        raise UserError(f"no expert in {folder}: train one with "
                        f"train_expert.py --run-dir {run_dir} --shard 0")
    return dict(sorted(found.items()))


def read_model_info(path, shape):
    """What a model's file says of itself, which has the types of `shape`. UserError."""
    try:
        info = artifacts.read_info(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        check_shape(info, shape)
    except ValueError as error:
        raise UserError(f"{path} is not a model of this project, or has been damaged: "
                        f"copy it again ({error})") from None

    if "objective" in shape:
        # a fork may know others
        for key in ("objective", "path"):
            known = choices("flow", key)
            if info[key] not in known:
                raise UserError(f"{path} has {key} = {info[key]!r}, which is not one of "
                                f"{', '.join(known)}")
    return info


def open_space(team: Ensemble, run_config, given, device):
    """The Space that the models of `team` were trained in.

    Where its networks are on this machine: the flags `given` say, or the run's config, or the
    models.
    """
    info = team.info
    config = make_config(given)
    config.data.condition = team.config.condition
    config.data.size = team.config.size * info["autoencoder"].get("factor", 1)

    for role in ("autoencoder", "text"):
        trained_with_network = "weights" in info[role]
        if f"{role}.name" in given:
            if not trained_with_network:
                name = given[f"{role}.name"]
                raise UserError(f"--{role}.name {name}: {team.path} was trained without a "
                                f"pretrained {role} network")
            continue
        name = getattr(run_config, role).name
        if not trained_with_network or name == encoders.NONE[role]:
            name = info[role]["name"]
        getattr(config, role).name = name

    config.text.length = team.config.length
    config.text.vocab = team.config.vocab
    config.text.layer = info["text"].get("layer", "last")
    # as in training, whatever the device was: a text encoder's tf32 is its fp32 on a GPU
    config.text.precision = info["text"].get("precision", "auto").replace("tf32", "fp32")
    return Space(config, device, wanted=info, origin=team.path)
