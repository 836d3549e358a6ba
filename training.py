"""What the training stages share: data loading, gradient accumulation, signals, the log, pictures. (engine.py has the model and its checkpoints.)

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
import faulthandler
import functools
import glob
import hashlib
import math
import multiprocessing.queues
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import torch

import flow
import model as models
from data import TarDataset, collate, index_tar, mix, to_tensor
from ddm import artifacts, encoders, plan
from ddm.codec import Space, read_cache
from ddm.config import differences, make_parser
from ddm.errors import UserError, end, kill_children
from ddm.files import atomic, try_folder
from ddm.pictures import picture_grid
from ddm.process import barrier, cores, gather, local_world, progress, sum_over_ranks
from ddm.run import alone, read_clusters, read_manifest
from ddm.text import hash_words
from engine import BINS, FAILED, FINISHED, SHOWN, UNFINISHED, dispensable, mark


TIMING = ("images_per_s", "mfu", "wait", "memory_gb")       # columns of the log: MFU where the device's peak is known; share of the time spent waiting for data
PARENT = os.getppid()       # torchrun, or whoever started this


def stage_parser(doc, tables):
    """common.make_parser for a training stage, with --plan and --profile."""
    parser = make_parser(doc)
    parser.add_argument("--plan", nargs="?", const="", metavar="CONFIG", help="train nothing: say what this training needs of time and memory; "
                        "with a config file, before there is a run")
    parser.add_argument("--verify", action="store_true", help="before the first step, compare the shards' SHA-256 with their manifest's (their names, sizes and "
                        "clustering always are)")
    parser.add_argument("--max-bad", dest="data.max_bad", metavar="SHARE", help="the same as --data.max_bad: 0.01 or 1%%")
    parser.add_argument("--profile", action="store_true", help="write torch's trace of three steps to RUN/logs/NAME.trace.json")
    return parser


def plan_space(args, config):
    """What model_config asks of a Space, for --plan: without loading any network, and without the hub where plan.py knows the name."""
    names = config.text.name.split(" + ") if config.data.condition == "text" and config.text.name != encoders.NONE["text"] else []
    autoencoder = plan.AUTOENCODERS.get(config.autoencoder.name)
    if not args.plan or not autoencoder or not plan.TEXT_ENCODERS.keys() >= set(names):
        return Space(config, None, None if args.plan else read_clusters(args.run_dir).get("networks"))
    factor, channels = autoencoder
    return SimpleNamespace(size=config.data.size // factor, channels=channels, text_dim=sum(plan.TEXT_ENCODERS[name] for name in names))


def describe(config, space, clusters):
    """What a model's file must say besides its shape, for it to be used, and used together with others of the run."""
    return space.info | {"shift": config.flow.shift, "fingerprint": clusters["fingerprint"]}


def find_shards(run):
    """The numbers of the shards of a run that are here, as pictures or as latents."""
    return sorted({k for part in ("shards", "latents") if os.path.isdir(os.path.join(run, part))
                   for k in os.listdir(os.path.join(run, part)) if k.isdigit()}, key=int)


def check_shard(folder, fingerprint, ranks, verify=False):
    """UserError unless the tars of RUN/shards/K are those of its manifest, and of this clustering. verify: look at their contents, too; the ranks share the work."""
    manifest = read_manifest(folder)
    if manifest["fingerprint"] != fingerprint:
        raise UserError(f"{folder} is of clustering {manifest['fingerprint']}, clusters.safetensors of {fingerprint}: take both from the same run")
    there = {os.path.basename(path): os.path.getsize(path) for path in glob.glob(os.path.join(glob.escape(folder), "*.tar"))}
    meant = {name: entry["bytes"] for name, entry in manifest["tars"].items()}
    if there != meant:
        raise UserError(f"{folder} is not as its manifest says (bytes there / in the manifest: {differences(there, meant)}): copy it again, or run cluster.py again where the data is")
    damaged = []
    for name in progress(sorted(there)[ranks.rank::ranks.world], desc="verifying, tars") if verify else []:
        with open(os.path.join(folder, name), "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != manifest["tars"][name]["sha256"]:
                damaged.append(name)
    if verify and (damaged := sum(gather(damaged), [])):
        raise UserError(f"{folder}: {', '.join(damaged)} is not what its SHA-256 in the manifest says: copy it again")


def open_shards(run, shards, config, train, ranks, clusters, labelled=False, apart=False, verify=False):
    """-> (the TarDataset of all tars of these shards, of their latents if all are cached, and the Space of the run's models).

    clusters: what common.read_clusters says; labelled: each sample must say its cluster; apart: a list of a TarDataset for each shard; verify: as in check_shard.
    UserError if a shard is missing.
    """
    d = config.data
    space = Space(config, ranks.device, clusters.get("networks"), os.path.join(run, "clusters.safetensors"))
    about = read_cache(run, shards, config, clusters) if d.use_latents and config.autoencoder.name else None
    for role in ("autoencoder", "text") if about else ():       # what is cached was made in the cache's precision
        if about[role]["name"]:
            space.info[role] = space.info[role] | {"precision": about[role].get("precision", space.info[role].get("precision"))}
    folders = [os.path.join(run, "latents" if about else "shards", k) for k in shards]
    found = [glob.glob(os.path.join(glob.escape(folder), "*.tar")) for folder in folders]
    if missing := [folder for folder, tars in zip(folders, found) if not tars]:
        raise UserError(f"no tars in {', '.join(missing)}: copy them there, or make them with cluster.py"
                        + ("" if about or not config.autoencoder.name or not d.use_latents else "; latents are used where all shards have them"))
    for k in shards:
        folder = os.path.join(run, "shards", k)
        if verify and not os.path.isdir(folder):
            raise UserError(f"--verify compares {folder} with its manifest, but only its latents are here: leave it out")
        if not about or verify:
            check_shard(folder, clusters["fingerprint"], ranks, verify)
    if ranks.rank == 0 and config.autoencoder.name:
        print(f"latents cached in {', '.join(folders)}" if about else "latents not cached: pictures are encoded at each step (cache_latents.py caches them)")
    if ranks.rank == 0 and space.text_dim and not (about and about["text"]["name"]):
        print("token features not cached: captions are encoded at each step (cache_latents.py --captions caches them)")
    parts = [sorted(paths) for paths in found] if apart else [sorted(path for paths in found for path in paths)]
    for path in sum(parts, [])[ranks.rank::ranks.world]:      # the ranks share the work of the first time
        index_tar(path)
    barrier()
    encode = to_tensor
    if d.condition == "text":       # a pretrained encoder reads a batch of captions at once, in the training process
        encode = None if space.text_dim else functools.partial(hash_words, length=config.text.length, vocab=config.text.vocab)
    tokens = (config.text.length, space.text_dim) if about and about["text"]["name"] else None
    data = [TarDataset(tars, d.size, d.condition, encode, d.classes, mix(train.seed, i) if apart else train.seed, d.crop, d.flip, d.shuffle_block,
                       (space.channels, space.size, space.size), labelled, space.posterior, about and about["shapes"][0], tokens)
            for i, tars in enumerate(parts)]
    manifests = {} if about else {folder: read_manifest(folder)["tars"] for folder in folders}
    for part in data if not about else []:
        for tar, rows in zip(part.tars, part.index):
            meant = manifests[os.path.dirname(tar)][os.path.basename(tar)]["samples"]
            if len(rows) != meant:
                raise UserError(f"{tar} has {len(rows)} samples, its manifest says {meant}: it is damaged, copy it again")
    if empty := [folder for folder, part in zip(folders if apart else [", ".join(folders)], data) if not len(part)]:
        raise UserError(f"no samples in {empty[0]}")
    if not about:       # loaded now, not in the midst of the first step
        space.network("autoencoder")
    if not tokens:
        space.network("text")
    return data if apart else data[0], space


class Table:
    """A CSV file that grows while training does, on rank 0. A resume drops the rows after step `last`."""

    def __init__(self, path, columns, state, last):
        self.path, self.columns, self.rows = path, columns, []
        if state.resumed and os.path.exists(path):
            with open(path, encoding="utf-8", newline="", errors="replace") as f:
                self.rows = [row for row in csv.DictReader(f) if (row["step"] or "").isdigit() and int(row["step"]) <= last]
        with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="", errors="replace") as f:
            writer = csv.DictWriter(f, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)

    def add(self, *rows):
        self.rows = (self.rows + list(rows))[-1000:]
        try:
            with open(self.path, "a", encoding="utf-8", newline="", errors="replace") as f:
                csv.DictWriter(f, self.columns).writerows(rows)
        except OSError as error:        # a full disk: the weights are worth more than the log
            print(f"warning: {self.path}: {error}; rows are missing there, and training goes on", file=sys.stderr, flush=True)


class Log:
    """RUN/logs/NAME.csv and, of the samples that could not be used, RUN/logs/NAME.skipped.csv, on rank 0."""

    def __init__(self, state, columns):
        self.bar = None
        if state.ranks.rank:
            return
        path = os.path.join(state.run, "logs", state.name)
        self.name, self.table, self.columns = state.name, Table(f"{path}.csv", columns, state, state.step), columns
        self.skipped = Table(f"{path}.skipped.csv", ["step", "tar", "sample", "cause"], state,
                             min((row[0] - 1 for row in state.skipped), default=state.step))       # the checkpoint has those that no row of the log has counted
        self.bar = progress(desc=state.name, total=state.train.steps, initial=state.step)

    def skip(self, rows):
        if self.bar is not None:
            self.skipped.add(*(dict(zip(self.skipped.columns, row)) for row in rows))

    def row(self, **values):
        if self.bar is not None:
            for key, of, times in (("loss", "loss", 1.5), ("norm_max", "grad_norm", 10)):
                before = sorted(float(row[of]) for row in self.table.rows[-10:] if re.fullmatch(r"\d+\.\d+", row[of] or ""))       # neither nan nor torn
                if len(before) >= 5 and float(values[key]) > times * (usual := before[len(before) // 2]):
                    print(f"warning: {self.name}: a spike before step {values['step']}: {key} {float(values[key]):.4g}, where {of} of the rows before has a "
                          f"median of {usual:.4g}", file=sys.stderr, flush=True)
            self.table.add(values)
            by_t = [name for name in self.columns if name[-3:-1] == "_t"]
            self.bar.set_postfix_str(f"loss {values['loss']}, {by_t[0][:-3]} by t {' '.join(values[n][:5] or '-' for n in by_t)}, "
                                     f"{values['images_per_s']} images/s" + (f", MFU {float(values['mfu']):.0%}" if values["mfu"] else ""), refresh=False)

    def update(self):
        if self.bar is not None:
            self.bar.update()

    def close(self):
        if self.bar is not None:
            self.bar.close()


class _Stopping:
    """SIGTERM and Ctrl-C, which end a training after its step. A wait for data that lasts is not waited for: `wait` raises Interrupted."""

    PATIENCE = 5        # seconds that a batch may take once a signal has come

    class Interrupted(BaseException):       # no `except Exception` on the way holds it up
        pass

    def __init__(self):
        self.number, self.since = 0, None       # the signal; when the present wait began
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGALRM, self._look)

    def _stop(self, number, frame):
        self.number = self.number or number
        self._look()

    def _look(self, *_):
        if self.number and self.since is not None and time.monotonic() - self.since >= self.PATIENCE:
            raise self.Interrupted

    @contextlib.contextmanager
    def wait(self):
        """While waiting an alarm rings each second: Python looks at signals only when a system call returns, and one may come just before a long one."""
        self.since = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 1, 1)
        try:
            yield
        finally:
            self.since = None
            signal.setitimer(signal.ITIMER_REAL, 0)


class _Step:
    def __init__(self, state, loader, space, stopping, micro_batches, share, autocast):
        self.state, self.loader, self.space, self.stopping = state, loader, space, stopping
        self.count, self.share, self.autocast = micro_batches, share, autocast
        self.save = self.sample = False
        self.abandoned = False  # a signal ended the wait for its data: it never happened
        self.waited = 0.0       # seconds, for data
        self.sums = torch.zeros_like(state.sums)
        self.bad = []           # (tar, name, cause) of samples that could not be used
        self.samples = []       # (t, loss) of each micro-batch, to say which of them were not finite

    def batches(self):
        """This rank's micro-batches of the step, on its device, as namespaces of x_0, c, k, u, drop and eps (data.py).

        Pictures and captions that are not cached go through the frozen networks here. Gradients are summed over ranks in the last one alone.
        """
        device = self.state.ranks.device
        for i in range(self.count):
            since = time.perf_counter()
            try:
                with self.stopping.wait():
                    batch = self._next()
            except _Stopping.Interrupted:
                self.abandoned = True
                return
            self.waited += time.perf_counter() - since
            for tar, name, cause in batch["bad"]:
                self.bad.append((tar, name, cause))
                self.state.warned += 1
                if self.state.warned <= 20:
                    print(f"warning: {tar}: {name}: {cause}; another takes its place"
                          + (f" (more are only listed in logs/{self.state.name}.skipped.csv)" if self.state.warned == 20 else ""), file=sys.stderr)
            captions = batch.pop("c") if isinstance(batch["c"], list) else None
            batch = SimpleNamespace(**{k: v.to(device, non_blocking=True) for k, v in batch.items() if k != "bad"})
            batch.c = self.space.captions(captions) if captions else batch.c if batch.c.numel() else None      # condition = none
            batch.x_0 = self.space.x_0(batch.x, getattr(batch, "post", None)) if batch.x.dtype == torch.uint8 else batch.x
            self.state.synchronise_gradients(i == self.count - 1)
            yield batch

    def _next(self):
        """The loader's next batch. UserError of this rank alone where a decoding process has died, or met one."""
        try:
            return next(self.loader)
        except UserError as error:      # a decoding process adds its traceback
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("common.UserError: "), local=True) from None
        except RuntimeError as error:
            if "Too many open files" in str(error):
                raise UserError("too many open files, of which decoding processes need one a tensor: ulimit -n 65536, or fewer --data.workers", local=True) from None
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(f"a decoding process has died ({str(error).splitlines()[0]}), for want of shared memory (/dev/shm), of memory or of open files (ulimit -n), or killed: "
                            f"fewer --data.workers (0: none), or more room", local=True) from None

    def model(self, x_t, t, c):
        with self.autocast:
            return self.state.wrapped(x_t, t, c)

    def backward(self, loss, t, shown=None):
        """Adds the gradient of loss [B], as a share of the mean over the global batch. `shown` [B] is what the log gives by t."""
        (loss.sum() / self.share).backward()
        bins = (t * BINS).long().clamp(max=BINS - 1)
        shown = (loss if shown is None else shown).detach().double()
        sums = self.sums
        self.samples.append((t.detach(), loss.detach()))
        sums[0] += loss.detach().double().sum()
        sums[1] += len(loss)
        sums[SHOWN:SHOWN + BINS].index_add_(0, bins, shown)
        sums[SHOWN + BINS:].index_add_(0, bins, torch.ones_like(shown))

    def update(self):
        """Clips the gradient, steps AdamW, moves the average; without a finite gradient weights and optimiser stay, and the log counts that alone.

        Nothing is saved after a step that was skipped: the weights may be ruined.
        """
        if self.abandoned:
            self.save = self.sample = False
            return
        norm, sums = self.state.update(), self.state.sums
        sums[4] += len(self.bad)
        self.state.skipped += [(self.state.step, *row) for row in self.bad]
        if self.state.ranks.rank == 0:
            self.sums[2] += norm.double()
            self.sums[3] += 1
            sums[5] = torch.where(norm.isfinite(), sums[5].maximum(norm.double()), sums[5])
        sums += torch.where(norm.isfinite(), self.sums, 0)
        if self.save and not norm.isfinite():       # the only wait for the device, in steps that save
            self.save = False

    def nonfinite(self, positions):
        """What is known of a step without a finite gradient: the samples whose loss is not finite, as this rank sees them."""
        t, loss = (torch.cat(parts).cpu() for parts in zip(*self.samples))
        found = [(p, f"{float(t[i]):.4f}") for i, p in enumerate(positions) if not loss[i].isfinite()]
        return [f"position {p} (t = {x})" for p, x in found]


def learning_rate(train, step):
    """lr of step 0..steps-1: linear warm-up, constant, linear decay over the last `decay` steps (all, if there are fewer)."""
    up = min(1.0, (step + 1) / train.warmup) if train.warmup else 1.0
    down = min(1.0, (train.steps - step) / min(train.decay, train.steps)) if train.decay else 1.0
    return train.lr * up * down


def _end_with_torchrun():
    """A rank whose torchrun has been killed would train on, and write beside the next attempt: it ends, within a second, as if killed, too."""
    def watch():
        while os.getppid() == PARENT:
            time.sleep(0.5)
        try:
            print("error: torchrun has gone, and so this rank ends", file=sys.stderr, flush=True)
        finally:
            os._exit(1)

    if "RANK" in os.environ:
        threading.Thread(target=watch, daemon=True).start()


def _prepare_worker(_):
    """Decoding processes leave SIGTERM and Ctrl-C to their rank, which finishes its step and still needs them.

    A batch that cannot be sent, for want of shared memory, ends its process, and so the training: torch would drop it, and wait for it for ever.
    """
    def end(error, batch):
        print(f"a decoding process could not hand over a batch: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)


AHEAD = 4           # batches that each decoding process has ready


def check_shared_memory(data, position, micro, workers):
    """UserError unless the batches that this node's decoding processes hand over fit into /dev/shm. position: of a sample, which all are like."""
    if not workers or not os.path.isdir("/dev/shm"):
        return
    tensors = [value for value in collate([data[position]]).values() if isinstance(value, torch.Tensor)]
    page = 4096
    batch = sum(-(-tensor.nbytes * micro // page) * page for tensor in tensors)
    need = batch * (AHEAD * workers + 1) * local_world()
    free = shutil.disk_usage("/dev/shm").free
    if free < need:
        raise UserError(f"the shared memory /dev/shm has {free / 1e6:.3g} MB free, and {workers} decoding processes a rank put up to {need / 1e6:.3g} MB there: make it "
                        f"larger (docker run --shm-size 8g), or take fewer --data.workers (0: none)", local=os.environ.get("LOCAL_RANK", "0") == "0")


def positions(first, last, batch, rank, world, micro):
    """The positions of a rank's micro-batches (lists of `micro` or fewer) in steps first..last-1: its share of each global batch."""
    share = batch // world
    for n in range(first, last):
        mine = range(n * batch + rank * share, n * batch + (rank + 1) * share)
        yield from (list(mine[i:i + micro]) for i in range(0, share, micro))


def _peak_memory(cuda):
    """Bytes that this rank has taken at most: of its GPU's memory since the last call, or of the host's."""
    if not cuda:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def _profiler(state):
    """torch's profiler over three steps after the tenth (or over the last ones, if there are fewer), written to RUN/logs/NAME.trace.json."""
    def write(profiler):
        path = os.path.join(state.run, "logs", f"{state.name}.trace.json")
        with atomic(path) as temporary:
            profiler.export_chrome_trace(temporary)
        by = "self_cuda_time_total" if state.ranks.device.type == "cuda" else "self_cpu_time_total"
        print(f"{profiler.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=60)}\n{path}: the trace of three steps, for ui.perfetto.dev", flush=True)

    wait = min(10, max(0, state.train.steps - state.step - 4))
    return torch.profiler.profile(schedule=torch.profiler.schedule(wait=wait, warmup=1, active=3, repeat=1), on_trace_ready=write)


def steps(state, data, space, config, shown, profile=False):
    """Yields a _Step for each optimiser step from the state's to train.steps, on global batches of state.batch images.

    shown: "loss" or "acc", the name of what the log gives by noise level. The script calls batches, backward and update, and
    exports the weights where step.save says so; then this saves a checkpoint, if it is time or SIGTERM came, and logs.
    profile: write a trace of three steps. UserError if too many samples cannot be read.
    """
    train, ranks, batch = state.train, state.ranks, state.batch
    share = batch // ranks.world
    micro = min(train.micro_batch or share, share)
    count = -(-share // micro)
    if ranks.rank == 0:
        print(f"{state.name}: {sum(p.numel() for p in state.model.parameters()) / 1e6:.2f}M parameters, {len(data)} images, "
              f"batch {batch} = {ranks.world} ranks x {share} in micro-batches of {micro}, "
              f"{train.steps} steps = {train.steps * batch / len(data):.1f} epochs; "
              + (f"resumed at step {state.step}" if state.resumed else "from the beginning") + (f"\n{state.choice}" if state.choice else ""), flush=True)
    if state.step >= train.steps:
        if ranks.rank == 0:
            mark(state.folder, FINISHED, state.step, begins=True)       # it may have been killed before it could
            print(f"{state.name} is finished at step {state.step}; a larger --train.steps would go on")
        return

    if ranks.rank == 0:
        mark(state.folder, UNFINISHED, state.step, begins=True)
    workers = config.data.workers if config.data.workers >= 0 else max(1, min(8, cores() // local_world() - 1))
    # a fork shares the index; and when this process fails, nobody else stops decoding processes that ignore signals
    fork = "fork" if workers and "fork" in multiprocessing.get_all_start_methods() else None
    atexit.register(kill_children)
    cuda = ranks.device.type == "cuda"
    check_shared_memory(data, state.step * batch, micro, workers)
    stopping = _Stopping()
    loader = iter(torch.utils.data.DataLoader(
        data, batch_sampler=positions(state.step, train.steps, batch, ranks.rank, ranks.world, micro), num_workers=workers,
        collate_fn=collate, worker_init_fn=_prepare_worker, multiprocessing_context=fork, pin_memory=cuda,
        prefetch_factor=AHEAD if workers else None))
    # torch's handler would raise wherever the main thread is when a decoding process dies; the loader finds it out, too, when it waits for it
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _end_with_torchrun()
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=state.bf16)
    peak = plan.peak_flops(torch.cuda.get_device_name(), state.bf16) if cuda else None
    if cuda and not peak and ranks.rank == 0:
        print(f"warning: the peak rate of {torch.cuda.get_device_name()!r} is not known, so the log has no MFU: plan.py has the table", file=sys.stderr)

    log = Log(state, ["step", "time", "device_hours", "loss", "lr", "grad_norm", "norm_max", *TIMING, "images", "flops", "bad", "nonfinite"]
              + [f"{shown}_t{i}" for i in range(BINS)])
    state.model.train()
    since, images, waited, due = time.monotonic(), 0, 0.0, False
    profiler = _profiler(state) if profile and ranks.rank == 0 else contextlib.nullcontext()
    with contextlib.closing(log), profiler, _ending(state):
        while state.step < train.steps:
            if train.timeout:       # a thread of C, which no hanging call can hold up: it prints where all threads are, and ends the process
                faulthandler.dump_traceback_later(train.timeout, exit=True, file=2)
            step = _Step(state, loader, space, stopping, count, batch / ranks.world, autocast)
            for group in state.optimizer.param_groups:
                group["lr"] = lr = learning_rate(train, state.step)
                group["weight_decay"] = train.weight_decay      # a checkpoint brings its own
            # known before the step, so that all ranks do the same; the sum is through gloo and waits for no GPU
            last = bool(sum_over_ranks(torch.tensor(float(stopping.number > 0))))
            due = due or last or (state.step + 1) % train.save_every == 0 or state.step + 1 == train.steps
            step.save = due
            step.sample = train.sample_every and (state.step + 1) % train.sample_every == 0 or state.step + 1 == train.steps
            yield step

            if step.abandoned:
                break
            due = due and not step.save     # after a step that was skipped nothing is saved, but after the next good one
            images, waited = images + batch, waited + step.waited
            if profile and ranks.rank == 0:
                profiler.step()
            logging = state.step % train.log_every == 0 or state.step == train.steps
            if logging or step.save or due or state.step % train.max_nonfinite == 0:
                check_finite(state, log, step, sum(positions(state.step - 1, state.step, batch, ranks.rank, ranks.world, micro), []))
            if logging:
                total = sum_over_ranks(state.sums.clone()).tolist()
                state.sums.zero_()
                now = time.monotonic()
                seconds = now - since
                state.seconds, state.device_seconds = state.seconds + seconds, state.device_seconds + seconds * ranks.world
                timing = {"images_per_s": f"{images / seconds:.1f}", "wait": f"{waited / seconds:.4f}", "memory_gb": f"{_peak_memory(cuda) / 1e9:.2f}",
                          "mfu": f"{state.image_flops * images / (seconds * ranks.world * peak):.4f}" if peak else ""}
                since, images, waited = now, 0, 0.0
                if total[4]:
                    log.skip(sum(gather(state.skipped), []))
                    state.skipped = []
                state.bad += int(total[4])
                read = state.step * batch + state.bad
                if state.bad > 10 and state.bad > config.data.max_bad * read:
                    state.finish_saving()
                    raise UserError(f"{state.bad} of {read} samples could not be used, more than data.max_bad = {config.data.max_bad} of them: "
                                    f"see logs/{state.name}.skipped.csv")
                by_t = {f"{shown}_t{i}": f"{s / n:.5f}" if n else ""
                        for i, (s, n) in enumerate(zip(total[SHOWN:SHOWN + BINS], total[SHOWN + BINS:]))}
                loss, norm = (total[0] / total[1], total[2] / total[3]) if total[1] else (math.nan, math.nan)      # no step was finite
                log.row(step=state.step, time=f"{state.seconds:.1f}", device_hours=f"{state.device_seconds / 3600:.5f}", loss=f"{loss:.6f}", lr=f"{lr:.3g}",
                        grad_norm=f"{norm:.5f}", norm_max=f"{total[5]:.5f}", images=state.step * batch, flops=state.image_flops * state.step * batch, bad=state.bad,
                        nonfinite=int(state.nonfinite[1]), **timing, **by_t)
            log.update()
            if step.save:
                state.save(FINISHED if state.step == train.steps and state.exported else UNFINISHED)
            if last and step.save:
                break
        if step.abandoned and ranks.world > 1:
            end(1, f"{state.name}: stopped by a signal while waiting for data, NOT saved at step {state.step}; run the same command to resume")
        if step.abandoned and state.step > state.kept:      # the state is that of the step before
            state.save(UNFINISHED)
        saved = state.finish_saving(last=state.step == train.steps)
    if state.step < train.steps:
        if ranks.rank == 0:
            print(f"{state.name}: stopped by a signal, {'saved' if saved else 'NOT saved'} at step {state.step}; run the same command to resume", flush=True)
        if "RANK" not in os.environ:        # torchrun would take it for a failure and start again; whoever started it reads the marker
            sys.exit(128 + stopping.number)


@contextlib.contextmanager
def _ending(state):
    """Ends the watchdog, whatever ended the training."""
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def owned(run, name):
    """For the time of a training, nobody else trains `name` of this run, and a UserError, which the same command would meet again,
    marks it as failed: a scheduler's script need not try.

    Its places of output are tried first, on rank 0, which has the lock. UserError, OSError.
    """
    if not os.path.isdir(run):
        raise UserError(f"there is no run at {run}: make it with cluster.py --run-dir {run} --data ...")
    folder = os.path.join(run, "checkpoints", name)
    if os.environ.get("RANK", "0") == "0":
        for place in (folder, *(os.path.join(run, part) for part in ("logs", "samples", "experts"))):
            try_folder(place)
    with alone(os.path.join(folder, "lock"), f"{name} of {run}"):
        try:
            yield
        except UserError:
            with contextlib.suppress(OSError):
                mark(folder, FAILED)
            raise


def stale(path, state):
    """Whether a finished training's weights are not in their file: it is gone, or older."""
    if state.step < state.train.steps:
        return False
    try:
        return artifacts.read_info(path)["step"] != state.step
    except (ValueError, KeyError):
        return True


def patience(train):
    """How long ranks wait for each other: a rank that waits ends by its own watchdog."""
    return timedelta(seconds=train.timeout) + timedelta(minutes=1) if train.timeout else timedelta(days=7)


def last_good_step(rows, before):
    """The step up to which a training was well that has no finite gradient from step `before` on. rows: of its log.

    Not the step just before, with whose weights all that followed was not finite; nor any since the loss rose to three times its best.
    """
    losses = []
    for row in rows:
        if int(row["step"]) < before and re.fullmatch(r"\d+\.\d+", row["loss"] or ""):
            losses.append((int(row["step"]), float(row["loss"])))

    good = before - 2
    best = min((loss for _, loss in losses), default=0)
    while losses and losses[-1][1] > 3 * best:
        losses.pop()
        good = min(good, losses[-1][0])
    return good


def check_finite(state, log, step, positions):
    """Says which steps were skipped. UserError after train.max_nonfinite in a row, or at the end; checkpoints of ruined weights are set aside first.

    positions: of this rank's samples in the last step.
    """
    row, total, longest = map(int, state.nonfinite.tolist())
    state.nonfinite[2] = 0      # of what has not been looked at yet
    if total > state.reported and state.ranks.rank == 0:
        print(f"warning: {state.name}: {total - state.reported} steps up to {state.step} had a gradient that is not finite and were skipped", file=sys.stderr, flush=True)
    state.reported = total
    too_many = longest >= state.train.max_nonfinite
    if not too_many and not (row and state.step == state.train.steps):
        return
    state.finish_saving()       # a checkpoint on its way would be cut short
    found = sum(gather(step.nonfinite(positions)), []) if row else []
    remedy = ""
    if state.ranks.rank == 0:
        # a few skipped steps at the very end say nothing against the weights before them
        kept, aside = state.set_aside(last_good_step(log.table.rows, state.step - row + 1) if too_many else state.step)
        mark(state.folder, UNFINISHED, int(kept[-8:]) if kept else 0)
        remedy = f"The last good checkpoint is {kept}: the same command resumes there" if kept else "There is no good checkpoint: the same command begins anew"
        if aside:
            remedy += f" ({', '.join(map(os.path.basename, aside))}, of later steps, are set aside as *.not-finite)"
    barrier()
    raise UserError(f"{state.name}: the gradients of {max(row, longest)} steps in a row before step {state.step + 1} are not finite"
                    + (f"; in the last one the losses of {len(found)} samples: {', '.join(found[:5])}" if found else
                       f"; the last step had positions {(state.step - 1) * state.batch} to {state.step * state.batch - 1}")
                    + f". {remedy}. Give it a lower --train.lr, or --train.precision fp32"
                    + ("" if too_many else f", or end at --train.steps {state.step - row}"))


@torch.no_grad()
def save_samples(state, config, data, space, side=4, solver_steps=25):
    """RUN/samples/NAME-STEP.png: a grid drawn by the averaged weights of an expert or a student, for the first conditions of its data.

    Rank 0 draws it; where the model is sharded all ranks must take part, since each holds but a part of it. Where memory is lacking there is
    a warning instead. Only within the sharded model, which no rank can call without the others, does it end the training, as in a step.
    """
    if state.ranks.rank and not state.sharded:
        return

    with dispensable("the samples") as reasons:
        shape = (space.channels, space.size, space.size)
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(side * side)])
        c = collate([data[i] for i in range(side * side)])["c"]
        c = space.captions(c) if isinstance(c, list) else c.to(state.ranks.device) if c.numel() else None
    if state.sharded:
        reasons = sum(gather(reasons), [])
    if reasons:
        return

    with contextlib.nullcontext() if state.sharded else dispensable("the samples") as reasons:
        x = draw_samples(state, config, space, x, c, solver_steps)
    if reasons or state.ranks.rank:
        return

    path = os.path.join(state.run, "samples", f"{state.name}-{state.step:08d}.png")
    with dispensable("the samples"):
        pictures = space.pictures(x).cpu().numpy()
        with atomic(path) as temporary:
            picture_grid(pictures.reshape(side, side, *pictures.shape[1:])).save(temporary, "PNG")


def draw_samples(state, config, space, x, c, solver_steps):
    """Noise x [B,C,S,S] and conditions c [B,...] or None -> what the averaged weights make of them [B,C,S,S]. The weights are as before, whatever happens."""
    device, w = state.ranks.device, config.sample.cfg
    null, bound = models.null_condition(state.model.config, c), encoders.bound(space.info["autoencoder"])
    # no more at once than a micro-batch, for which there was memory with all that its backward pass needs
    at_once = state.train.micro_batch or state.batch // state.ranks.world

    def predict(x_t, t, c):
        conditions = [None] * -(-len(x_t) // at_once) if c is None else c.split(at_once)
        parts = zip(x_t.split(at_once), t.split(at_once), conditions)
        return torch.cat([flow.predict_velocity(state.model, *part, config.flow.objective, config.flow.path, bound) for part in parts])

    def velocity(x_t, time):
        t = torch.full((len(x_t),), time, device=device)
        v = predict(x_t, t, c)
        return v if c is None or w == 1 else flow.guide(v, predict(x_t, t, null), w)

    # eager: another batch without gradients would be compiled anew; autocast: FSDP gathers bf16 weights, which fp32 inputs do not go with
    eager = torch.compiler.set_stance("force_eager")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=state.sharded and state.bf16)
    state.swap_average()
    try:
        with eager, autocast:
            for x in flow.integrate(velocity, x.to(device), flow.time_grid(solver_steps, config.flow.shift), config.sample.solver):
                pass
    finally:
        state.swap_average()
    return x
