"""What a training says of itself: means since the last row (Meter), CSV files, step line, grids.

    meter.add("loss", loss)                 mean over images in the column `loss`
    meter.add_by_t("loss", loss, t)         the same by noise level, in loss_t0 ... loss_t4
    meter.commit(norm)                      the step counts, unless its gradient was not finite

One more number in the log is one more line like the first. Nothing here waits for the device until
a row is due, and no checkpoint has to match what is logged.
"""
import contextlib
import csv
import math
import os
import re
import resource
import statistics
import sys
import time

import torch

import flow
from data import collate
from ddm import encoders, plan
from ddm.engine import dispensable
from ddm.errors import UserError
from ddm.files import atomic
from ddm.pictures import image_grid
from ddm.process import gather, progress
from model import null_condition

# bins of t in [0,1]
BINS = 5

# a row is remarkable whose value is so many times the median of the ten rows before
SPIKES = (("loss", "loss", 1.5), ("norm_max", "grad_norm", 10))

# columns of NAME.skipped.csv
SKIPPED = ["step", "tar", "sample", "cause"]

# how the log writes a finite number
NUMBER = re.compile(r"\d+\.\d+")


class Meter:
    """Sums and counts by name since the last row of the log, on the device, in float64.

    What a step adds is kept apart until `commit`, so that a step without a finite gradient leaves
    no trace in the means.
    """

    def __init__(self, device, rank=0):
        self.device = device
        self.rank = rank
        # name -> [n,2]: sum and count, of n = 1 or BINS
        self.kept = {}
        self.of_step = {}
        self.norm_max = torch.zeros((), dtype=torch.float64, device=device)

    def _entry(self, sums, name, rows=1):
        if name not in sums:
            sums[name] = torch.zeros(rows, 2, dtype=torch.float64, device=self.device)
        return sums[name]

    def add(self, name, values):
        """Values [...] of any shape, of which the log shows the mean."""
        # float64: in float32 a sum over millions of values would lose digits
        values = values.detach().double()
        entry = self._entry(self.of_step, name)
        entry[0, 0] += values.sum()
        entry[0, 1] += values.numel()

    def add_by_t(self, name, values, t):
        """Values [B] at times t [B] in [0,1]: the mean in each bin of t."""
        bins = (t.detach() * BINS).long().clamp(max=BINS - 1)
        values = values.detach().double()
        entry = self._entry(self.of_step, f"{name}_t", rows=BINS)
        # one row a bin: sums and counts at once
        entry.index_add_(0, bins, torch.stack([values, torch.ones_like(values)], dim=1))

    def commit(self, norm):
        """Counts what the step added if the gradient's norm (a scalar) is finite, else drops it."""
        finite = norm.isfinite()
        # before the loop, so that it is dropped with the rest
        self.add("grad_norm", norm)
        if self.rank:
            # all ranks have the same norm: it counts once, on any number of them
            self.of_step["grad_norm"].zero_()
        for name, sums in self.of_step.items():
            entry = self._entry(self.kept, name, rows=len(sums))
            # chosen on the device: an `if` would wait for it
            entry += torch.where(finite, sums, 0)
        self.of_step = {}

        largest = self.norm_max.maximum(norm.double())
        self.norm_max = torch.where(finite, largest, self.norm_max)

    def totals(self):
        """{name: [[sum, count], ...]} over all ranks; a collective.

        A name that one rank alone has added is as good as any other.
        """
        totals = {}
        own = {name: sums.cpu() for name, sums in self.kept.items()}
        for of_rank in gather(own):
            for name, sums in of_rank.items():
                totals[name] = totals.get(name, 0) + sums
        return {name: totals[name].tolist() for name in sorted(totals)}

    def means(self):
        """{column: mean over all ranks, nan where nothing was added}, and begins anew."""
        means = {}
        for name, rows in self.totals().items():
            for i, (total, count) in enumerate(rows):
                column = f"{name}{i}" if len(rows) > 1 else name
                means[column] = total / count if count else math.nan
        # all ranks have the same norm already
        means["norm_max"] = float(self.norm_max)

        self.kept = {}
        self.norm_max.zero_()
        return means

    def state(self):
        """What a checkpoint keeps, JSON; a collective."""
        return {"totals": self.totals(), "norm_max": float(self.norm_max)}

    def load(self, state):
        """Takes up `state`: on rank 0, since it has been summed over the ranks."""
        self.norm_max.fill_(state["norm_max"])
        if self.rank == 0:
            for name, rows in state["totals"].items():
                self.kept[name] = torch.tensor(rows, dtype=torch.float64, device=self.device)


class Table:
    """A CSV file that grows while training does. A resume drops the rows after step `last`."""

    def __init__(self, path, columns, resumed=False, last=0):
        self.path = path
        self.columns = columns
        # rows after the checkpoint will be written once more
        rows = []
        if resumed and os.path.exists(path):
            for row in self.read():
                if (row["step"] or "").isdigit() and int(row["step"]) <= last:
                    rows.append(row)

        self._write(rows, self.columns)
        # what has been written lately
        self.recent = rows[-10:]

    def read(self):
        """The file's rows as dicts; its columns become the table's."""
        with open(self.path, encoding="utf-8", newline="", errors="replace") as f:
            reader = csv.DictReader(f)
            rows = list(reader)

        # a file of something else counts as empty
        if reader.fieldnames and "step" in reader.fieldnames:
            self.columns = reader.fieldnames
            return rows
        return []

    def _write(self, rows, columns):
        with (
            atomic(self.path) as temporary,
            open(temporary, "w", encoding="utf-8", newline="", errors="replace") as f,
        ):
            writer = csv.DictWriter(f, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        # only now: a full disk leaves the table as it was
        self.columns = columns

    def add(self, rows):
        """Appends dicts, {column: text}. A full disk costs a warning: weights are worth more."""
        self.recent = (self.recent + rows)[-10:]

        try:
            new = [column for column in rows[0] if column not in self.columns]
            if new:
                # a number that the script logs only now
                before = self.read()
                others = [column for column in self.columns if column not in rows[0]]
                self._write(before + rows, [*rows[0], *others])
                return
            # appended: to rewrite the file would cost more, the longer a training lasts
            with open(self.path, "a", encoding="utf-8", newline="", errors="replace") as f:
                csv.DictWriter(f, self.columns).writerows(rows)
        except OSError as error:
            print(f"warning: {self.path}: {error}; rows are missing there, and training goes on",
                  file=sys.stderr, flush=True)


class Log:
    """RUN/logs/NAME.csv, and NAME.skipped.csv of the samples that could not be used.

    The counters of a training that a checkpoint keeps are here as well. profile: write a trace of
    three steps.
    """

    def __init__(self, run_dir, engine, config, profile=False):
        self.run_dir = run_dir
        self.path = os.path.join(run_dir, "logs", engine.name)
        self.samples = os.path.join(run_dir, "samples")
        self.engine = engine
        self.ranks = engine.ranks
        self.max_bad = config.data.max_bad
        self.profile = profile and engine.ranks.rank == 0

        self.meter = Meter(self.ranks.device, self.ranks.rank)
        # of training over all resumes, and times the ranks
        self.seconds = 0.0
        self.device_seconds = 0.0
        # samples that could not be used: in all, and (step, tar, name, cause) since the last row
        self.bad = 0
        self.skipped = []
        # steps that were skipped for want of a finite gradient and have been reported
        self.reported = 0
        # since the last row
        self.images = 0
        self.waited = 0.0
        self.lr = 0.0

        # open on rank 0 alone: elsewhere they stay None
        self.bar = None
        self.profiler = None
        self.open = contextlib.ExitStack()
        self.peak = self._peak_flops(engine.bf16)

    def _peak_flops(self, bf16):
        """FLOP/s that the device has at most; None where that is not known."""
        if self.ranks.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name()
        peak = plan.peak_flops(name, bf16)
        if not peak and self.ranks.rank == 0:
            print(f"warning: the peak rate of {name!r} is not known, so the log has no MFU: "
                  f"ddm/plan.py has the table", file=sys.stderr)
        return peak

    def state(self):
        """What a checkpoint keeps, JSON; a collective."""
        # gathered, because another number of ranks may resume
        skipped = []
        for of_rank in gather(self.skipped):
            skipped += of_rank
        return {
            "seconds": self.seconds,
            "device_seconds": self.device_seconds,
            "bad": self.bad,
            "skipped": skipped,
            "meter": self.meter.state(),
        }

    def load(self, state):
        """Takes up what a checkpoint keeps."""
        self.seconds = state["seconds"]
        self.device_seconds = state["device_seconds"]
        self.bad = state["bad"]
        self.meter.load(state["meter"])

        # all of them: rank 0 writes the rows
        if self.ranks.rank == 0:
            self.skipped = [tuple(row) for row in state["skipped"]]

    def rows(self):
        """All rows of the file so far, dicts of text, on rank 0; [] elsewhere."""
        if self.bar is None:
            return []
        # what asks for them is about to end the training: a lost or torn log is no reason not to
        try:
            return [row for row in self.table.read() if (row["step"] or "").isdigit()]
        except OSError:
            return []

    def begin(self, step, resumed):
        """Opens the files and the progress bar, on rank 0."""
        self.since = time.monotonic()
        if self.ranks.rank:
            return
        self.table = Table(f"{self.path}.csv", ["step"], resumed, last=step)
        # the checkpoint has those that no row of the log has counted
        last = min((row[0] - 1 for row in self.skipped), default=step)
        self.skipped_table = Table(f"{self.path}.skipped.csv", SKIPPED, resumed, last=last)

        bar = progress(desc=self.engine.name, total=self.engine.train.steps, initial=step)
        self.bar = self.open.enter_context(bar)
        if self.profile:
            self.profiler = self.open.enter_context(profiler(self.run_dir, self.engine))

    def end(self):
        self.open.close()

    def step(self, norm, lr, batches):
        """Counts a step that was made: its gradient's norm, learning rate, and what its `batches`
        met. Nothing waits for the device, and no rank for another.
        """
        self.meter.commit(norm)
        self.lr = lr
        self.images += self.engine.batch
        self.waited += batches.waited
        # as this rank sees them; `row` gathers them
        for tar, sample, cause in batches.bad:
            self.skipped.append((self.engine.step, tar, sample, cause))
        if self.bar is not None:
            self.bar.update()
        if self.profiler is not None:
            self.profiler.step()

    def row(self, checkpoints):
        """Writes the row of this step; a collective.

        UserError if too many samples could not be used; checkpoints: the one on its way is waited
        for before that.
        """
        step = self.engine.step
        images = self.engine.images
        now = time.monotonic()
        seconds = now - self.since
        self.seconds += seconds
        self.device_seconds += seconds * self.ranks.world
        # both are collectives, for which no rank may have left
        means = self.meter.means()
        self._count_bad(images, checkpoints)

        values = {
            "step": step,
            "time": f"{self.seconds:.1f}",
            "device_hours": f"{self.device_seconds / 3600:.5f}",
            "loss": f"{means.pop('loss', math.nan):.6f}",
            "lr": f"{self.lr:.3g}",
            "grad_norm": f"{means.pop('grad_norm', math.nan):.5f}",
            "norm_max": f"{means.pop('norm_max'):.5f}",
            "images_per_s": f"{self.images / seconds:.1f}",
            "mfu": self._mfu(seconds),
            # share of the time in which this rank waited for data
            "wait": f"{self.waited / seconds:.4f}",
            "memory_gb": f"{self._peak_memory() / 1e9:.2f}",
            "images": images,
            "flops": self.engine.image_flops * images,
            "bad": self.bad,
            "nonfinite": int(self.engine.nonfinite[1]),
        }
        # what else the script has added: loss_t0, acc_t3, ...
        for column, mean in means.items():
            values[column] = "" if math.isnan(mean) else f"{mean:.5f}"

        if self.bar is not None:
            self._warn_of_spikes(values)
            self.table.add([values])
            self.bar.set_postfix_str(step_line(values), refresh=False)
        self.since = now
        self.images = 0
        self.waited = 0.0

    def _count_bad(self, images, checkpoints):
        """Lists the samples that could not be used; a collective."""
        rows = []
        for of_rank in gather(self.skipped):
            rows += of_rank
        self.skipped = []
        self.bad += len(rows)
        if rows and self.bar is not None:
            self.skipped_table.add([dict(zip(SKIPPED, row, strict=True)) for row in rows])

        read = images + self.bad
        # a handful in a short training is no reason to stop
        if self.bad > 10 and self.bad > self.max_bad * read:
            checkpoints.finish_saving()
            raise UserError(f"{self.bad} of {read} samples could not be used, more than "
                            f"data.max_bad = {self.max_bad} of them: see {self.path}.skipped.csv")

    def _mfu(self, seconds):
        """Model FLOPs utilisation: the share of the devices' peak rate that the model has used."""
        if not self.peak:
            return ""
        could = seconds * self.ranks.world * self.peak
        return f"{self.engine.image_flops * self.images / could:.4f}"

    def _peak_memory(self):
        """Bytes that this rank took at most: of its GPU since the last row, or of the host."""
        if self.ranks.device.type != "cuda":
            # in KiB on Linux, and since the process began
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def _warn_of_spikes(self, values):
        for key, usual_key, times in SPIKES:
            before = []
            for row in self.table.recent:
                # neither nan nor torn
                if NUMBER.fullmatch(row[usual_key] or ""):
                    before.append(float(row[usual_key]))
            # too few to know what is usual
            if len(before) < 5:
                continue
            # a median, which another spike among them does not move
            usual = statistics.median_high(before)
            if float(values[key]) > times * usual:
                print(f"warning: {self.engine.name}: a spike before step {values['step']}: {key} "
                      f"{float(values[key]):.4g}, where {usual_key} of the rows before has a "
                      f"median of {usual:.4g}", file=sys.stderr, flush=True)


def step_line(values):
    """What the progress bar says of a row: loss, by noise level, images/s, MFU."""
    # loss_t0 ... of an expert, acc_t0 ... of the router
    by_t = [name for name in values if name.endswith(tuple(f"_t{i}" for i in range(BINS)))]
    line = f"loss {values['loss']}"
    if by_t:
        shown = " ".join(values[name][:5] or "-" for name in by_t)
        line += f", {by_t[0][:-3]} by t {shown}"
    line += f", |g| {values['grad_norm']}, lr {values['lr']}, {values['images_per_s']} images/s"
    if values["mfu"]:
        line += f", MFU {float(values['mfu']):.0%}"
    return line


# ---- grids of samples ----------------------------------------------------------------------------

@torch.no_grad()
def save_samples(engine, config, data, space, folder, side=4, solver_steps=25):
    """FOLDER/NAME-STEP.png: a grid sampled with the EMA weights of an expert or a student, for
    the first conditions of its data.

    Rank 0 samples it; where the model is sharded all ranks must take part, since each holds but a
    part of it. Where memory is lacking there is a warning instead. Only within the sharded model,
    which no rank can call without the others, does it end the training, as in a step.
    """
    if engine.ranks.rank and not engine.sharded:
        return

    with dispensable("the samples") as reasons:
        shape = (space.channels, space.size, space.size)
        # a seed each, and the same at every step: grids differ by the weights alone
        noise = []
        for seed in range(side * side):
            noise.append(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
        x = torch.stack(noise)

        # the first of the stream, in all grids the same
        c = collate([data[i] for i in range(side * side)])["c"]
        # without a text encoder they are tensors
        if isinstance(c, list):
            c = space.captions(c)
        else:
            c = c.to(engine.ranks.device) if c.numel() else None

    # where one rank lacks memory none may begin: the others would wait for it
    if engine.sharded:
        reasons = sum(gather(reasons), [])
    if reasons:
        return

    with contextlib.nullcontext() if engine.sharded else dispensable("the samples") as reasons:
        x = sample_ema(engine, config, space, x, c, solver_steps)
    if reasons or engine.ranks.rank:
        return

    path = os.path.join(folder, f"{engine.name}-{engine.step:08d}.png")
    with dispensable("the samples"):
        images = space.images(x).cpu().numpy()
        with atomic(path) as temporary:
            image_grid(images.reshape(side, side, *images.shape[1:])).save(temporary, "PNG")


def sample_ema(engine, config, space, x, c, solver_steps):
    """Noise x [B,C,S,S] and conditions c [B,...] or None -> what the EMA weights make of them
    [B,C,S,S]. The weights are as before, whatever happens.
    """
    device = engine.ranks.device
    w = config.sample.cfg
    null = null_condition(engine.config, c)
    bound = encoders.bound(space.info["autoencoder"])
    # no more at once than a micro-batch, for which there was memory with all that its backward
    # pass needs
    at_once = engine.train.micro_batch or engine.batch // engine.ranks.world

    def predict(x_t, t, c):
        conditions = [None] * math.ceil(len(x_t) / at_once)
        if c is not None:
            conditions = c.split(at_once)
        velocities = []
        for part in zip(x_t.split(at_once), t.split(at_once), conditions, strict=True):
            velocities.append(flow.predict_velocity(
                engine.model, *part, config.flow.objective, config.flow.path, bound))
        return torch.cat(velocities)

    def velocity(x_t, time):
        t = torch.full((len(x_t),), time, device=device)
        v = predict(x_t, t, c)
        if c is None or w == 1:
            return v
        return flow.guide(v, predict(x_t, t, null), w)

    # eager: another batch without gradients would be compiled anew; autocast: FSDP gathers bf16
    # weights, which fp32 inputs do not go with
    eager = torch.compiler.set_stance("force_eager")
    sharded_bf16 = engine.sharded and engine.bf16
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=sharded_bf16)

    # t from 1 (noise) down to 0
    times = flow.time_grid(solver_steps, config.flow.shift)
    # exchanged in place: a copy of the model would take memory
    engine.swap_ema()
    try:
        with eager, autocast:
            for x_t in flow.integrate(velocity, x.to(device), times, config.sample.solver):
                # the last one stays
                x_0 = x_t
    finally:
        engine.swap_ema()
    return x_0


# ---- traces --------------------------------------------------------------------------------------

def profiler(run_dir, engine):
    """torch's profiler over three steps after the tenth (or over the last ones, if there are
    fewer), written to RUN/logs/NAME.trace.json.
    """
    def write(profile):
        path = os.path.join(run_dir, "logs", f"{engine.name}.trace.json")
        with atomic(path) as temporary:
            profile.export_chrome_trace(temporary)
        on_gpu = engine.ranks.device.type == "cuda"
        table = profile.key_averages().table(
            sort_by="self_cuda_time_total" if on_gpu else "self_cpu_time_total",
            row_limit=15,
            max_name_column_width=60,
        )
        print(f"{table}\n{path}: the trace of three steps, for ui.perfetto.dev", flush=True)

    # the first steps compile and warm up, and say little
    wait = min(10, max(0, engine.train.steps - engine.step - 4))
    schedule = torch.profiler.schedule(wait=wait, warmup=1, active=3, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write)
