"""What the training stages share: data loading, gradient accumulation, EMA, checkpoints, signals and the log.

A stage's loop stays in its script; this file is the generator that it loops over:

    for step in training.steps(...):            learning rate, resume
        for batch in step.batches():            this rank's share of the global batch, in micro-batches
            loss = ...                          [B]
            step.backward(loss, t)
        step.update()                           clip, AdamW, EMA
        if step.save: export(...)               then: checkpoint, signals, log

Everything random about a sample is a function of (seed, position in the stream) (data.py), so a run gives the same loss curve,
up to rounding, on any number of ranks and with any micro-batch, and a resumed run on a CPU the same bits as an undisturbed one.
"""
import atexit
import contextlib
import csv
import functools
import glob
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import flow
import model as models
import networks
import pretrained
from common import UserError, atomic, barrier, cores, differences, flat, progress, sum_over_ranks
from data import TarDataset, collate, index_tar, mix, picture_grid, to_tensor

BINS = 5            # of t in [0,1], in the log
KEEP = 2            # checkpoints
FINISHED, UNFINISHED = "finished", "to be continued"


# ---- from the run -------------------------------------------------------------------------------------------------

def stage_config(config, stage=""):
    """[train] with the keys of [train.<stage>] that are set over it."""
    values = dict(vars(config.train))
    if stage:
        values |= {k: v for k, v in vars(getattr(config, f"train_{stage}")).items() if v is not None}
    return SimpleNamespace(**values)


def model_config(config, table, space, clusters=0):
    """The ModelConfig that [model] or [router] describes, in a pretrained.Space; clusters = K makes it a router's."""
    settings = dict(vars(getattr(config, table)))
    preset = settings.pop("preset")
    if preset and preset not in models.PRESETS:
        raise UserError(f"{table}.preset = {preset!r} is not one of {', '.join(models.PRESETS)}")
    shape = models.PRESETS.get(preset, {}) | {k: v for k, v in settings.items() if v}
    if unset := settings.keys() - shape.keys():
        raise UserError(f"{table} has no preset, so it needs {', '.join(f'{table}.{k}' for k in sorted(unset))}, too")
    condition = {"none": {}, "class": {"classes": config.data.classes},
                 "text": {"text_dim": space.text_dim, "vocab": 0 if space.text_dim else config.text.vocab,
                          "length": config.text.length}}[config.data.condition]
    try:
        return models.ModelConfig(space.size, space.channels, condition=config.data.condition, clusters=clusters, **condition, **shape)
    except ValueError as error:
        raise UserError(str(error)) from None


def describe(config, space, clusters):
    """What a model's file must say besides its shape, for it to be used, and used together with others of the run."""
    return space.info | {"shift": config.flow.shift, "fingerprint": clusters["fingerprint"]}


def find_shards(run):
    """The numbers of the shards of a run that are here, as pictures or as latents."""
    return sorted({k for part in ("shards", "latents") if os.path.isdir(os.path.join(run, part))
                   for k in os.listdir(os.path.join(run, part)) if k.isdigit()}, key=int)


def open_shards(run, shards, config, train, ranks, clusters, labelled=False, apart=False):
    """-> (the TarDataset of all tars of these shards, of their latents if all are cached, and the Space of the run's models).

    clusters: what common.read_clusters says; labelled: each sample must say its cluster; apart: a list of a TarDataset for each shard.
    UserError if a shard is missing.
    """
    d = config.data
    space = pretrained.Space(config, ranks.device, clusters.get("networks"), os.path.join(run, "clusters.safetensors"))
    about = pretrained.read_cache(run, shards, config, clusters) if d.cached and config.autoencoder.name else None
    folders = [os.path.join(run, "latents" if about else "shards", k) for k in shards]
    found = [glob.glob(os.path.join(glob.escape(folder), "*.tar")) for folder in folders]
    if missing := [folder for folder, tars in zip(folders, found) if not tars]:
        raise UserError(f"no tars in {', '.join(missing)}: copy them there, or make them with cluster.py"
                        + ("" if about or not config.autoencoder.name or not d.cached else "; latents are used where all shards have them"))
    if ranks.rank == 0 and config.autoencoder.name:
        print(f"latents cached in {', '.join(folders)}" if about else "latents not cached: pictures are encoded at each step (pretrained.py caches them)")
    if ranks.rank == 0 and space.text_dim and not (about and about["text"]["name"]):
        print("token features not cached: captions are encoded at each step (pretrained.py --captions caches them)")
    parts = [sorted(paths) for paths in found] if apart else [sorted(path for paths in found for path in paths)]
    for path in sum(parts, [])[ranks.rank::ranks.world]:      # the ranks share the work of the first time
        index_tar(path)
    barrier()
    encode = to_tensor
    if d.condition == "text":       # a pretrained encoder reads a batch of captions at once, in the training process
        encode = None if space.text_dim else functools.partial(models.hash_words, length=config.text.length, vocab=config.text.vocab)
    tokens = (config.text.length, space.text_dim) if about and about["text"]["name"] else None
    data = [TarDataset(tars, d.size, d.condition, encode, d.classes, mix(train.seed, i) if apart else train.seed, d.crop, d.flip, d.run,
                       (space.channels, space.size, space.size), labelled, space.posterior, about and about["shapes"][0], tokens)
            for i, tars in enumerate(parts)]
    if empty := [folder for folder, part in zip(folders if apart else [", ".join(folders)], data) if not len(part)]:
        raise UserError(f"no samples in {empty[0]}")
    if not about:       # loaded now, not in the midst of the first step
        space.network("autoencoder")
    if not tokens:
        space.network("text")
    return data if apart else data[0], space


# ---- state --------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def _quiet():
    """torch warns at each checkpoint of a single process that it is one; and 2.13 of broadcast_buffers, whose successor 2.12 lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        yield


class State:
    """Model, averaged weights, optimiser and counters of one training: all that a checkpoint holds.

    Checkpoints are folders RUN/checkpoints/NAME/step-00001000, written beside their place and renamed. initial: weights {name: tensor} to
    begin with; identity: what else may not change over a resume. image_flops is what training on one image costs.
    """

    def __init__(self, run, name, model_config, train, ranks, config, space, initial=None, **identity):
        self.run, self.name, self.train, self.ranks = run, name, train, ranks
        self.folder = os.path.join(run, "checkpoints", name)
        torch.manual_seed(train.seed)       # the same initial weights on all ranks
        self.model = models.build(model_config).to(ranks.device)
        if initial:
            self.model.load_state_dict(initial)
        self.ema = {k: v.detach().clone() for k, v in self.model.named_parameters()}
        # fused: one kernel over all weights
        self.optimizer = torch.optim.AdamW(self.model.parameters(), train.lr, weight_decay=train.weight_decay, fused=True)
        self.step, self.seconds, self.device_seconds, self.bad, self.warned = 0, 0.0, 0.0, 0, 0
        self.image_flops = 3 * self.model.flops()       # of training on an image: forward, and twice that backward
        # since the last row of the log: loss, images, gradient norms, steps, bad samples; then by bin of t: what is shown, images
        self.sums = torch.zeros(5 + 2 * BINS, dtype=torch.float64, device=ranks.device)
        # what may not change over a resume; the rest, such as steps or micro_batch, may
        free = ("data.workers", "data.max_bad", "data.cached")
        self.identity = {k: v for k, v in flat(config).items() if k.startswith(("data.", "flow.")) and k not in free}
        self.identity |= {"train.seed": train.seed, "train.batch": train.batch, **identity}
        self.identity |= {role: networks.identity(info) for role, info in space.info.items()}
        self.identity |= {f"model.{k}": v for k, v in vars(model_config).items()}
        self.resumed = self._resume()
        self.wrapped = self.model
        if ranks.world > 1:
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            with _quiet():
                self.wrapped = torch.nn.parallel.DistributedDataParallel(self.model, device_ids=ids, broadcast_buffers=False)

    def _tensors(self):
        weights, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optimizer": optimizer, "ema": self.ema, "sums": self.sums}

    def checkpoints(self):
        """Complete checkpoints, the oldest first."""
        return sorted(f for f in glob.glob(os.path.join(glob.escape(self.folder), "step-*")) if f[-1].isdigit())

    def _resume(self):
        newest = self.checkpoints()[-1:]
        if not newest:
            return False
        with open(os.path.join(newest[0], "state.json")) as f:
            state = json.load(f)
        state["identity"].setdefault("flow.path", "linear")     # checkpoints from before there was a choice
        if state["identity"] != self.identity:
            raise UserError(f"{newest[0]} was made with other settings (there / now: {differences(state['identity'], self.identity)}): "
                            f"use those, or delete {self.folder} to start anew")
        tensors = self._tensors()
        with _quiet():
            dcp.load(tensors, checkpoint_id=newest[0], no_dist=not dist.is_initialized())     # in place, whatever the ranks were
        set_state_dict(self.model, self.optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"])
        if self.ranks.rank:
            self.sums.zero_()       # they were summed over the ranks
        self.step, self.seconds, self.bad = state["step"], state["seconds"], state["bad"]
        self.device_seconds = state.get("device_seconds", 0.0)      # checkpoints from before they were counted
        return True

    def save(self, status):
        """Writes a checkpoint and drops the oldest; marks the training as finished or to be continued."""
        place = os.path.join(self.folder, f"step-{self.step:08d}")
        tensors = self._tensors()
        tensors["sums"] = sum_over_ranks(self.sums.clone())
        if self.ranks.rank == 0:
            for torn in glob.glob(os.path.join(glob.escape(self.folder), "step-*.tmp")):     # of a run that was killed here
                shutil.rmtree(torn)
        with _quiet():
            dcp.save(tensors, checkpoint_id=f"{place}.tmp", no_dist=not dist.is_initialized())
        if self.ranks.rank == 0:
            state = {"step": self.step, "seconds": self.seconds, "device_seconds": self.device_seconds, "bad": self.bad, "identity": self.identity}
            with open(os.path.join(f"{place}.tmp", "state.json"), "w") as f:
                json.dump(state, f, indent=1)
            shutil.rmtree(place, ignore_errors=True)
            os.rename(f"{place}.tmp", place)
            for old in self.checkpoints()[:-KEEP]:
                shutil.rmtree(old)
            self.mark(status)
        barrier()

    def mark(self, status):
        """Tells a scheduler's script whether this training is finished."""
        with atomic(os.path.join(self.folder, "status")) as temporary, open(temporary, "w") as f:
            f.write(f"{status} {self.step}\n")

    def export(self, path, images, /, **info):
        """Writes the averaged weights as a model file (rank 0)."""
        if self.ranks.rank == 0:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.train.export]
            models.save(path, self.model.config, self.ema, dtype, step=self.step, images=images, flops=self.image_flops * images, **info)


# ---- the log ------------------------------------------------------------------------------------------------------

class Log:
    """RUN/logs/NAME.csv, on rank 0. A resume drops the rows after the step that it resumes from."""

    def __init__(self, state, columns):
        self.path = os.path.join(state.run, "logs", f"{state.name}.csv")
        self.columns, self.bar = columns, None
        if state.ranks.rank:
            return
        rows = []
        if state.resumed and os.path.exists(self.path):
            with open(self.path, newline="") as f:
                rows = [row for row in csv.DictReader(f) if row["step"].isdigit() and int(row["step"]) <= state.step]
        with atomic(self.path) as temporary, open(temporary, "w", newline="") as f:
            writer = csv.DictWriter(f, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        self.bar = progress(desc=state.name, total=state.train.steps, initial=state.step)

    def row(self, **values):
        if self.bar is not None:
            with open(self.path, "a", newline="") as f:
                csv.DictWriter(f, self.columns).writerow(values)
            by_t = [name for name in self.columns if name[-3:-1] == "_t"]
            self.bar.set_postfix_str(f"loss {values['loss']}, {by_t[0][:-3]} by t {' '.join(values[n][:5] or '-' for n in by_t)}, "
                                     f"{values['images_per_s']} images/s", refresh=False)

    def update(self):
        if self.bar is not None:
            self.bar.update()

    def close(self):
        if self.bar is not None:
            self.bar.close()


# ---- the loop -----------------------------------------------------------------------------------------------------

class _Step:
    def __init__(self, state, loader, space, micro_batches, share, autocast):
        self.state, self.loader, self.space, self.count, self.share, self.autocast = state, loader, space, micro_batches, share, autocast

    def batches(self):
        """This rank's micro-batches of the step, on its device, as namespaces of x_0, c, k, u, drop and eps (data.py).

        Pictures and captions that are not cached go through the frozen networks here. Gradients are summed over ranks in the last one alone.
        """
        device = self.state.ranks.device
        for i in range(self.count):
            try:
                batch = next(self.loader)
            except UserError as error:      # a decoding process adds its traceback
                raise UserError(str(error).strip().splitlines()[-1].removeprefix("common.UserError: "), local=True) from None
            self.state.sums[4] += len(batch["bad"])
            for line in batch["bad"]:
                self.state.warned += 1
                if self.state.warned <= 20:
                    print(f"warning: {line}; another takes its place" + (" (more are only counted)" if self.state.warned == 20 else ""),
                          file=sys.stderr)
            captions = batch.pop("c") if isinstance(batch["c"], list) else None
            batch = SimpleNamespace(**{k: v.to(device, non_blocking=True) for k, v in batch.items() if k != "bad"})
            batch.c = self.space.captions(captions) if captions else batch.c if batch.c.numel() else None      # condition = none
            batch.x_0 = self.space.x_0(batch.x, getattr(batch, "post", None)) if batch.x.dtype == torch.uint8 else batch.x
            if self.state.ranks.world > 1:
                self.state.wrapped.require_backward_grad_sync = i == self.count - 1
            yield batch

    def model(self, x_t, t, c):
        with self.autocast:
            return self.state.wrapped(x_t, t, c)

    def backward(self, loss, t, shown=None):
        """Adds the gradient of loss [B], as a share of the mean over the global batch. `shown` [B] is what the log gives by t."""
        (loss.sum() / self.share).backward()
        bins = (t * BINS).long().clamp(max=BINS - 1)
        shown = (loss if shown is None else shown).detach().double()
        sums = self.state.sums
        sums[0] += loss.detach().double().sum()
        sums[1] += len(loss)
        sums[5:5 + BINS].index_add_(0, bins, shown)
        sums[5 + BINS:].index_add_(0, bins, torch.ones_like(shown))

    def update(self):
        """Clips, steps AdamW, moves the average: ema <- d ema + (1 - d) weights, with d = min(ema, (1 + n) / (10 + n))."""
        state, train = self.state, self.state.train
        norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), train.clip or float("inf"))
        if state.ranks.rank == 0:
            state.sums[2] += norm.double()
            state.sums[3] += 1
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        decay = min(train.ema, (1 + state.step) / (10 + state.step))
        weights = [p.detach() for p in state.model.parameters()]
        torch._foreach_lerp_(list(state.ema.values()), weights, 1 - decay)


def learning_rate(train, step):
    """lr of step 0..steps-1: linear warm-up, constant, linear decay over the last `decay` steps (all, if there are fewer)."""
    up = min(1.0, (step + 1) / train.warmup) if train.warmup else 1.0
    down = min(1.0, (train.steps - step) / min(train.decay, train.steps)) if train.decay else 1.0
    return train.lr * up * down


def _ignore_signals(_):
    """Decoding processes leave SIGTERM and Ctrl-C to their rank, which finishes its step and still needs them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def positions(first, last, batch, rank, world, micro):
    """The positions of a rank's micro-batches (lists of `micro` or fewer) in steps first..last-1: its share of each global batch."""
    share = batch // world
    for n in range(first, last):
        mine = range(n * batch + rank * share, n * batch + (rank + 1) * share)
        yield from (list(mine[i:i + micro]) for i in range(0, share, micro))


def steps(state, data, space, config, batch, shown):
    """Yields a _Step for each optimiser step from the state's to train.steps, on global batches of `batch` images.

    shown: "loss" or "acc", the name of what the log gives by noise level. The script calls batches, backward and update, and
    exports the weights where step.save says so; then this saves a checkpoint, if it is time or SIGTERM came, and logs.
    UserError if the batch does not divide over the ranks, or too many samples cannot be read.
    """
    train, ranks = state.train, state.ranks
    if batch % ranks.world:
        raise UserError(f"a batch of {batch} cannot be shared by {ranks.world} ranks: change train.batch or --nproc_per_node")
    share = batch // ranks.world
    micro = min(train.micro_batch or share, share)
    count = -(-share // micro)
    if ranks.rank == 0:
        print(f"{state.name}: {sum(p.numel() for p in state.model.parameters()) / 1e6:.2f}M parameters, {len(data)} images, "
              f"batch {batch} = {ranks.world} ranks x {share} in micro-batches of {micro}, "
              f"{train.steps} steps = {train.steps * batch / len(data):.1f} epochs; "
              + (f"resumed at step {state.step}" if state.resumed else "from the beginning"), flush=True)
    if state.step >= train.steps:
        if ranks.rank == 0:
            print(f"{state.name} is finished at step {state.step}; a larger --train.steps would go on")
        return

    if ranks.rank == 0:
        state.mark(UNFINISHED)
    workers = config.data.workers if config.data.workers >= 0 else max(1, min(8, cores() // ranks.world - 1))
    # a fork shares the index; and when this process fails, nobody else stops decoding processes that ignore signals
    fork = "fork" if workers and "fork" in multiprocessing.get_all_start_methods() else None
    atexit.register(lambda: [process.kill() for process in multiprocessing.active_children()])
    cuda = ranks.device.type == "cuda"
    loader = iter(torch.utils.data.DataLoader(
        data, batch_sampler=positions(state.step, train.steps, batch, ranks.rank, ranks.world, micro), num_workers=workers,
        collate_fn=collate, worker_init_fn=_ignore_signals, multiprocessing_context=fork, pin_memory=cuda,
        prefetch_factor=4 if workers else None))
    bf16 = train.precision == "bf16" or train.precision == "auto" and cuda
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16)

    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.append(number))
    log = Log(state, ["step", "time", "device_hours", "loss", "lr", "grad_norm", "images_per_s", "images", "flops", "bad"]
              + [f"{shown}_t{i}" for i in range(BINS)])
    state.model.train()
    since, images = time.monotonic(), 0
    try:
        while state.step < train.steps:
            step = _Step(state, loader, space, count, batch / ranks.world, autocast)
            for group in state.optimizer.param_groups:
                group["lr"] = lr = learning_rate(train, state.step)
                group["weight_decay"] = train.weight_decay      # a checkpoint brings its own
            # known before the step, so that all ranks do the same; the sum is through gloo and waits for no GPU
            stopping = bool(sum_over_ranks(torch.tensor(float(len(stop)))))
            step.save = (state.step + 1) % train.save_every == 0 or state.step + 1 == train.steps or stopping
            step.sample = train.sample_every and (state.step + 1) % train.sample_every == 0 or state.step + 1 == train.steps
            yield step

            images += batch
            if state.step % train.log_every == 0 or state.step == train.steps:
                total = sum_over_ranks(state.sums.clone()).tolist()
                state.sums.zero_()
                now = time.monotonic()
                state.seconds, speed = state.seconds + now - since, images / (now - since)
                state.device_seconds += (now - since) * ranks.world
                since, images = now, 0
                state.bad += int(total[4])
                read = state.step * batch + state.bad
                if state.bad > 10 and state.bad > config.data.max_bad * read:
                    raise UserError(f"{state.bad} of {read} samples could not be used, more than data.max_bad = {config.data.max_bad} of them: "
                                    f"see the warnings above")
                by_t = {f"{shown}_t{i}": f"{s / n:.5f}" if n else ""
                        for i, (s, n) in enumerate(zip(total[5:5 + BINS], total[5 + BINS:]))}
                log.row(step=state.step, time=f"{state.seconds:.1f}", device_hours=f"{state.device_seconds / 3600:.5f}", loss=f"{total[0] / total[1]:.6f}", lr=f"{lr:.3g}",
                        grad_norm=f"{total[2] / total[3]:.5f}", images_per_s=f"{speed:.1f}", images=state.step * batch,
                        flops=state.image_flops * state.step * batch, bad=state.bad, **by_t)
            log.update()
            if step.save:
                state.save(FINISHED if state.step == train.steps else UNFINISHED)
            if stopping and state.step < train.steps:
                if ranks.rank == 0:
                    print(f"{state.name}: stopped by a signal, saved at step {state.step}; run the same command to go on", flush=True)
                break
    finally:
        log.close()


# ---- pictures while training --------------------------------------------------------------------------------------

@torch.no_grad()
def save_samples(state, config, data, space, side=4, solver_steps=25):
    """RUN/samples/NAME-STEP.png: a grid drawn by the averaged weights of an expert or a student, for the first conditions of its data (rank 0)."""
    if state.ranks.rank:
        return
    shape = (space.channels, space.size, space.size)
    x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(side * side)])
    c = collate([data[i] for i in range(side * side)])["c"]
    c = space.captions(c) if isinstance(c, list) else c.to(state.ranks.device) if c.numel() else None
    null, w = models.null_condition(state.model.config, c), config.sample.cfg
    model = functools.partial(torch.func.functional_call, state.model, state.ema)

    def velocity(x_t, time):
        t = torch.full((len(x_t),), time, device=x_t.device)
        v = [flow.predict_velocity(lambda *args: model(args), x_t, t, cond, config.flow.objective, config.flow.path, networks.bound(space.info["autoencoder"]))
             for cond in ((c,) if c is None or w == 1 else (c, null))]
        return v[0] if len(v) == 1 else flow.guide(v[0], v[1], w)

    *_, x = flow.integrate(velocity, x.to(state.ranks.device), flow.time_grid(solver_steps, config.flow.shift), config.sample.solver)
    pictures = space.pictures(x).cpu().numpy()
    with atomic(os.path.join(state.run, "samples", f"{state.name}-{state.step:08d}.png")) as temporary:
        picture_grid(pictures.reshape(side, side, *pictures.shape[1:])).save(temporary, "PNG")
