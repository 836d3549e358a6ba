"""Checkpoints of a training: written while it goes on, loaded on any number of ranks; its end.

RUN/checkpoints/NAME/step-00001000/ holds the weights, the EMA weights and the optimiser's state as
torch.distributed.checkpoint writes them, and state.json: counters, and the settings that may not
change over a resume. Each is written beside its place and renamed when it is whole.
"""
import contextlib
import faulthandler
import glob
import json
import os
import re
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ddm import artifacts, encoders
from ddm.config import differences, flat
from ddm.engine import dispensable
from ddm.errors import UserError, end
from ddm.files import read_json, sync, write_text
from ddm.process import barrier, broadcast, end_with_torchrun, gather, on_rank_0
from ddm.run import FINISHED, UNFINISHED, mark

# torch warns at each checkpoint of a single process that it is one. (For good: a filter for the
# time of a call would not hold in the threads that write.)
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

# state.json
STATE = {
    "step": int,
    "nonfinite": [float],
    "optimizer": [str],
    "log": {"seconds": float, "device_seconds": float, "bad": int, "skipped": [list],
            "meter": {"totals": {str: [[float]]}, "norm_max": float}},
    "identity": dict,
    "files": {str: int},
}

# keys of [data] that may change over a resume
FREE = ("data.workers", "data.max_bad", "data.use_latents")


def identity_of(config, train, model_config, space, **more):
    """What may not change over a resume, {name: value}; the rest, such as steps, may."""
    identity = {}
    for name, value in flat(config).items():
        if name.startswith(("data.", "flow.")) and name not in FREE:
            identity[name] = value
    identity["train.seed"] = train.seed
    identity["train.batch"] = train.batch
    for role, info in space.info.items():
        identity[role] = encoders.identity(info)
    for key, value in vars(model_config).items():
        identity[f"model.{key}"] = value
    return identity | more


def cause_of(error):
    """The last line of what an exception says, where torch puts the cause."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1]


def names_of(optimizer):
    """The classes of an optimiser, or of a list of them: another one's state is of another kind."""
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    return [type(each).__name__ for each in optimizers]


def step_of(folder):
    return int(folder[-8:])


class Checkpoints:
    """The checkpoints of the training `name`, and the export of its EMA weights.

    Finds the newest one at once: `resumed` says whether there is one, which `resume` then loads.
    identity: what may not change over a resume. UserError if it has. raw: of a seed, whose exports
    have its raw weights as well.
    """

    def __init__(self, run_dir, name, train, ranks, identity, raw=False):
        self.name = name
        self.folder = os.path.join(run_dir, "checkpoints", name)
        self.train = train
        self.ranks = ranks
        self.identity = identity
        self.raw = raw

        # whether the last export could be written
        self.exported = True
        # the newest checkpoint's step
        self.kept = 0
        # the checkpoint that is being written: (step, future)
        self.saving = None
        self.publisher = ThreadPoolExecutor(1)
        # one for all checkpoints. It copies the state to host memory in this thread, from a GPU to
        # pinned memory that it keeps; without one the thread that writes would open a context on
        # GPU 0 for each rank, and wait for training's kernels every 10 MB
        pinned = ranks.device.type == "cuda"
        self.writer = dcp.FileSystemWriter(self.folder, cache_staged_state_dict=pinned)
        # ranks talk of checkpoints while training talks of gradients
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None

        newest = []
        on_rank_0(lambda: newest.append(self._read_newest()))
        self.newest, self.state = broadcast(newest[0] if newest else None)
        if self.newest and self.state["identity"] != identity:
            different = differences(self.state["identity"], identity)
            raise UserError(f"{self.newest} was made with other settings (there / now: "
                            f"{different}): use those, or delete {self.folder} to start anew")

    @property
    def resumed(self):
        return self.newest is not None

    def folders(self):
        """Complete checkpoints, the oldest first."""
        pattern = os.path.join(glob.escape(self.folder), "step-*")
        return sorted(folder for folder in glob.glob(pattern) if folder[-1].isdigit())

    def _read_newest(self):
        """-> (folder, its state.json) of the newest checkpoint that is whole, or (None, None).

        A damaged one is named and passed over.
        """
        for folder in reversed(self.folders()):
            try:
                state = read_json(os.path.join(folder, "state.json"), STATE)
                # one that was copied in part has files that are too short
                for name, size in state["files"].items():
                    if os.path.getsize(os.path.join(folder, name)) != size:
                        raise ValueError(f"{name} has another size")
                if len(state["nonfinite"]) != 3:
                    raise ValueError("nonfinite has another length")
                if any(len(row) != 4 for row in state["log"]["skipped"]):
                    raise ValueError("skipped has another length")
                return folder, state
            except (OSError, ValueError) as error:
                print(f"warning: {folder} is damaged ({error}): the one before is used",
                      file=sys.stderr, flush=True)
        return None, None

    def resume(self, engine, optimizer, log):
        """Loads the newest checkpoint, if there is one, in place, whatever the ranks were.

        optimizer: one, or a list of them. Their settings stay those of the script.
        """
        if not self.resumed:
            return
        optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
        names = names_of(optimizer)
        if names != self.state["optimizer"]:
            raise UserError(f"{self.newest} was made with the optimiser "
                            f"{' + '.join(self.state['optimizer'])}, now it is "
                            f"{' + '.join(names)}: use that one, or delete {self.folder} to start "
                            f"anew")
        settings = []
        for each in optimizers:
            for group in each.param_groups:
                settings.append({key: v for key, v in group.items() if key != "params"})

        # filled in place, each rank its own parts of sharded weights
        tensors = self._tensors(engine, optimizer)
        try:
            dcp.load(tensors, checkpoint_id=self.newest, no_dist=not dist.is_initialized())
        except dcp.api.CheckpointException as error:
            raise UserError(f"{self.newest} cannot be read ({cause_of(error)}): delete it, to "
                            f"resume from the one before") from None

        set_state_dict(engine.model, optimizer, model_state_dict=tensors["model"],
                       optim_state_dict=tensors["optimizer"])

        # learning rate and weight decay are the script's, not the checkpoint's
        groups = [group for each in optimizers for group in each.param_groups]
        for group, values in zip(groups, settings, strict=True):
            group.update(values)

        engine.step = self.kept = self.state["step"]
        engine.nonfinite.copy_(torch.tensor(self.state["nonfinite"]))
        # has been looked at
        engine.nonfinite[2] = 0
        log.reported = int(engine.nonfinite[1])
        log.load(self.state["log"])

    def _tensors(self, engine, optimizer):
        weights, optimizer = get_state_dict(engine.model, optimizer)
        return {"model": weights, "optimizer": optimizer, "ema": engine.ema}

    def save(self, engine, optimizer, log):
        """Copies the state to host memory and writes it from there, while training goes on.

        Waits first for the checkpoint before. All ranks call it.
        """
        self.finish_saving()
        place = os.path.join(self.folder, f"step-{engine.step:08d}")
        tensors = self._tensors(engine, optimizer)
        state = {"step": engine.step, "nonfinite": engine.nonfinite.tolist(), "log": log.state(),
                 "optimizer": names_of(optimizer), "identity": self.identity}

        if self.ranks.rank == 0:
            # of a run that was killed here
            for torn in glob.glob(os.path.join(glob.escape(self.folder), "step-*.tmp")):
                shutil.rmtree(torn, ignore_errors=True)

        barrier()
        future = dcp.async_save(
            tensors,
            checkpoint_id=f"{place}.tmp",
            storage_writer=self.writer,
            process_group=self.group,
            no_dist=not dist.is_initialized(),
        )
        if self.ranks.rank == 0:
            done = engine.step == self.train.steps and self.exported
            status = FINISHED if done else UNFINISHED
            future = self.publisher.submit(self._publish, place, state, status, future)
        self.saving = engine.step, future
        self.kept = engine.step

    def _publish(self, place, state, status, future):
        """Rank 0, once all ranks have written: gives a checkpoint its name, marks how far training
        is, drops those that are not to be kept.

        In this order, each on the disk (torch syncs its files) before the next, so that whenever
        power fails there is a whole one to resume from.
        """
        future.result()

        # by which a resume knows that the files are whole
        state["files"] = {}
        for name in sorted(os.listdir(f"{place}.tmp")):
            state["files"][name] = os.path.getsize(os.path.join(f"{place}.tmp", name))
        write_text(os.path.join(f"{place}.tmp", "state.json"), json.dumps(state, indent=1))

        if os.path.exists(place):
            # a damaged one that was passed over
            shutil.rmtree(place)
        os.rename(f"{place}.tmp", place)
        sync(self.folder)
        mark(self.folder, status, state["step"])
        self._drop_old(place)

    def _drop_old(self, newest):
        """Deletes all checkpoints but the train.keep_last newest and those of train.keep_every."""
        folders = self.folders()
        number = folders.index(newest)
        # later ones are damaged and were passed over
        dropped = folders[number + 1:]
        for folder in folders[:max(0, number + 1 - self.train.keep_last)]:
            if not self.train.keep_every or step_of(folder) % self.train.keep_every:
                dropped.append(folder)

        for folder in dropped:
            with contextlib.suppress(OSError):
                # half deleted, it is no checkpoint any more
                os.rename(folder, f"{folder}.tmp")
                shutil.rmtree(f"{folder}.tmp")

    def set_aside(self, after):
        """Rank 0: checkpoints of steps after `after` are not resumed from any more: they become
        step-N.not-finite. -> (the newest that is left or None, those)
        """
        kept = None
        aside = []
        for folder in self.folders():
            if step_of(folder) <= after:
                kept = folder
                continue
            shutil.rmtree(f"{folder}.not-finite", ignore_errors=True)
            os.rename(folder, f"{folder}.not-finite")
            aside.append(folder)
        return kept, aside

    def finish_saving(self, last=False):
        """Waits until the last checkpoint is on disk. -> whether it could be written.

        If not, all ranks go on and say so, or, if it was to be the `last`, end with a UserError.
        """
        if not self.saving:
            return True
        step, future = self.saving
        self.saving = None
        why = ""
        try:
            future.result()
        except (Exception, dcp.api.CheckpointException) as error:
            # the latter is torch's, of a rank that failed, and no Exception
            why = cause_of(error)

        reasons = [reason for reason in gather(why) if reason]
        if not reasons:
            return True
        why = (f"{self.name}: the checkpoint of step {step} could not be written ({reasons[0]}); "
               f"is the disk full?")
        if self.ranks.rank == 0:
            # makes room
            torn = os.path.join(self.folder, f"step-{step:08d}.tmp")
            shutil.rmtree(torn, ignore_errors=True)
        if last:
            raise UserError(f"{why} Make room, and run the same command again: it resumes from the "
                            f"checkpoint before, if there is one")
        if self.ranks.rank == 0:
            print(f"warning: {why} The former one is kept, and training goes on",
                  file=sys.stderr, flush=True)
        return False

    # -- export --

    def export(self, path, engine, /, last=False, **info):
        """Writes the EMA weights as a model file, with `info` as its metadata. All ranks call it.

        last: now a file that cannot be written is a UserError, and one that can finishes the
        training.
        """
        # collectives: sharded weights are gathered
        weights = engine.whole(engine.ema)
        raw_weights = {}
        if self.raw:
            raw_weights = engine.whole(dict(engine.model.named_parameters()))
        reasons = []
        if self.ranks.rank == 0:
            dtype = torch.bfloat16 if self.train.export == "bf16" else torch.float32
            with dispensable(path) as reasons:
                # of a run that was killed here
                for torn in glob.glob(f"{glob.escape(path)}.*.tmp"):
                    os.remove(torn)
                artifacts.save(path, engine.config, weights, dtype, raw_weights,
                               step=engine.step, images=engine.images,
                               flops=engine.image_flops * engine.images, **info)
        self.exported = not any(gather(reasons))

        if last and not self.exported:
            raise UserError(f"{path} could not be written: make room, and run the same command "
                            f"again")
        if last and self.ranks.rank == 0:
            mark(self.folder, FINISHED, engine.step)

    def is_stale(self, path, engine):
        """Whether a finished training's weights are not in their file: it is gone, or older."""
        if engine.step < self.train.steps:
            return False
        try:
            return artifacts.read_info(path)["step"] != engine.step
        except (ValueError, KeyError):
            return True


# ---- gradients that are not finite ---------------------------------------------------------------

def last_good_step(rows, before):
    """The step up to which a training was well that has no finite gradient from step `before` on.

    rows: of its log. Not the step just before, with whose weights all that followed was not finite;
    nor any since the loss rose to three times its best.
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


def check_finite(engine, checkpoints, log, batches, saving):
    """Says which steps were skipped, when a checkpoint or a row of the log is due; a collective.

    UserError after train.max_nonfinite in a row, or at the end: checkpoints of ruined weights are
    set aside first. batches: knows the samples of the last step, and their losses. In the steps
    between nobody waits for the device.
    """
    train = engine.train
    if not (saving or engine.is_due(train.log_every) or engine.is_due(train.max_nonfinite)):
        return

    in_a_row, total, longest = map(int, engine.nonfinite.tolist())
    # of what has not been looked at yet
    engine.nonfinite[2] = 0
    rank = engine.ranks.rank
    if total > log.reported and rank == 0:
        print(f"warning: {engine.name}: {total - log.reported} steps up to {engine.step} had a "
              f"gradient that is not finite and were skipped", file=sys.stderr, flush=True)

    log.reported = total

    too_many = longest >= train.max_nonfinite
    at_the_end = in_a_row and engine.step == train.steps
    if not too_many and not at_the_end:
        return

    # a checkpoint on its way would be cut short
    checkpoints.finish_saving()
    where = _nonfinite_samples(engine, batches, in_a_row)

    # a few skipped steps at the very end say nothing against the weights before them
    after = engine.step
    or_end = f", or end at --train.steps {engine.step - in_a_row}"
    if too_many:
        or_end = ""
        after = last_good_step(log.rows(), engine.step - in_a_row + 1)
    remedy = _set_aside(checkpoints, after) if rank == 0 else ""
    barrier()
    raise UserError(f"{engine.name}: the gradients of {max(in_a_row, longest)} steps in a row "
                    f"before step {engine.step + 1} are not finite; {where}. {remedy}. Give it a "
                    f"lower --train.lr, or --train.precision fp32{or_end}")


def _nonfinite_samples(engine, batches, in_a_row):
    """The samples of the last step whose losses are not finite, in words; a collective."""
    found = []
    if in_a_row:
        for of_rank in gather(batches.nonfinite()):
            found += of_rank
    if found:
        return f"in the last one the losses of {len(found)} samples: {', '.join(found[:5])}"
    first = (engine.step - 1) * engine.batch
    return f"the last step had positions {first} to {first + engine.batch - 1}"


def _set_aside(checkpoints, after):
    """Sets checkpoints of steps after `after` aside. -> what the same command would do now."""
    kept, aside = checkpoints.set_aside(after)
    mark(checkpoints.folder, UNFINISHED, step_of(kept) if kept else 0)
    remedy = "There is no good checkpoint: the same command begins anew"
    if kept:
        remedy = f"The last good checkpoint is {kept}: the same command resumes there"
    if aside:
        names = ", ".join(map(os.path.basename, aside))
        remedy += f" ({names}, of later steps, are set aside as *.not-finite)"
    return remedy


# ---- from the first step to the end --------------------------------------------------------------

def announce(engine, checkpoints, images):
    """Says on rank 0 what begins, or that there is nothing left to do; marks it for a scheduler."""
    if engine.ranks.rank:
        return
    share = engine.batch // engine.ranks.world
    micro = min(engine.train.micro_batch or share, share)
    millions = sum(p.numel() for p in engine.model.parameters()) / 1e6
    epochs = (engine.train.steps - engine.first_step) * engine.batch / images
    begins = "from the beginning"
    if checkpoints.resumed:
        begins = f"resumed at step {engine.step}"
    elif engine.first_step:
        begins = f"from the seed's step {engine.first_step}"
    print(f"{engine.name}: {millions:.2f}M parameters, {images} images, "
          f"batch {engine.batch} = {engine.ranks.world} ranks x {share} in micro-batches of "
          f"{micro}, {engine.train.steps} steps = {epochs:.1f} epochs; {begins}", flush=True)
    if engine.choice:
        print(engine.choice, flush=True)

    if engine.step >= engine.train.steps:
        # it may have been killed before it could say so
        mark(checkpoints.folder, FINISHED, engine.step, begins=True)
        # a seed has its own number
        more = "seed_steps" if checkpoints.raw else "steps"
        print(f"{engine.name} is finished at step {engine.step}; a larger --train.{more} would go "
              f"on")
    else:
        mark(checkpoints.folder, UNFINISHED, engine.step, begins=True)


@contextlib.contextmanager
def training(engine, optimizer, checkpoints, log, batches):
    """Around a training's loop: announces it, opens the log, ends both in good order.

    At the end the last checkpoint is waited for. A training that was stopped by a signal says how
    to resume; without torchrun its exit code is 128 + the signal's number.
    """
    announce(engine, checkpoints, len(batches.data))
    if engine.step >= engine.train.steps:
        yield
        return

    end_with_torchrun()
    log.begin(engine.step, checkpoints.resumed)
    try:
        yield
        _finish(engine, optimizer, checkpoints, log, batches)
    finally:
        # only now: the last checkpoint may hang, too
        faulthandler.cancel_dump_traceback_later()
        log.end()


def _finish(engine, optimizer, checkpoints, log, batches):
    """The last checkpoint, and what a training says that was stopped."""
    name = engine.name
    if batches.interrupted and engine.ranks.world > 1:
        # the other ranks may be inside a step, which this one never began
        end(1, f"{name}: stopped by a signal while waiting for data, NOT saved at step "
               f"{engine.step}; run the same command to resume")
    if batches.interrupted and engine.step > max(checkpoints.kept, engine.first_step):
        # the state is that of the step before
        checkpoints.save(engine, optimizer, log)

    finished = engine.step == engine.train.steps
    saved = checkpoints.finish_saving(last=finished)
    if finished:
        return
    if engine.ranks.rank == 0:
        print(f"{name}: stopped by a signal, {'saved' if saved else 'NOT saved'} at step "
              f"{engine.step}; run the same command to resume", flush=True)
    # torchrun would take it for a failure and start again; whoever started it reads the marker
    if "RANK" not in os.environ:
        sys.exit(128 + batches.stop.number)
