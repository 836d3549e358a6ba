"""A model in training on the GPUs of one node: compiled, replicated or sharded; its averaged weights, optimiser, checkpoints and export.

    state = engine.State(...)       the model, from its newest checkpoint or from the seed
    state.model                     the weights: plain tensors, or this rank's shards of them (DTensor)
    state.wrapped                   what a forward pass calls
    state.save(...)                 a checkpoint, written while training goes on; any number of ranks can load it

Replicated (DDP), each GPU holds all the weights, 20 bytes a parameter with gradients, AdamW's moments and the average; sharded (FSDP2,
`fully_shard`), 1/world of them, and each block is gathered when it is needed. plan.py says beforehand which of them fits.
"""
import contextlib
import functools
import glob
import json
import os
import re
import shutil
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ddm import artifacts, encoders, plan
from ddm.config import differences, flat
from ddm.errors import UserError
from ddm.files import read_json, sync, write_text
from ddm.process import barrier, broadcast, gather, on_rank_0, sum_over_ranks


BINS = 5            # of t in [0,1], in the log
SHOWN = 6           # where in the sums the bins begin
FINISHED, UNFINISHED, FAILED = "finished", "to be continued", "failed"
# state.json of a checkpoint
STATE = {"step": int, "seconds": float, "device_seconds": float, "bad": int, "nonfinite": [float], "skipped": [list],
         "identity": dict, "files": {str: int}}


def keep_matmuls(_, op, *args, **kwargs):
    """Selective checkpointing: what matrix products and attention give is kept; what is cheap (norms, modulation, GELU) is computed again."""
    return CheckpointPolicy.MUST_SAVE if op in plan.EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def prepare_blocks(model, activation_checkpointing="none", compile=False, backend="inductor"):
    """Makes the blocks of a model forget their activations ("block", "selective") and compiles them.

    One compiled function serves all blocks: each kind of block is one graph, whatever the depth. It stands in for `forward`, not for the
    call, so that FSDP's hooks stay outside of it and the names of the weights as they are.
    """
    def forward(block, *args):
        if activation_checkpointing == "none":
            return type(block).forward(block, *args)
        context = {"context_fn": functools.partial(create_selective_checkpoint_contexts, keep_matmuls)} if activation_checkpointing == "selective" else {}
        return checkpoint(type(block).forward, block, *args, use_reentrant=False, preserve_rng_state=False, **context)

    if compile:
        # DDP sums gradients in buckets, and Dynamo would cut each compiled block where a bucket ends, so
        # that sums overlap with the backward pass: between blocks they do anyway. (On torch 2.11
        # selective checkpointing is lost in a block that is cut.)
        torch._dynamo.config.optimize_ddp = False
    if compile or activation_checkpointing != "none":
        function = torch.compile(forward, fullgraph=True, backend=backend) if compile else forward
        for block in model.blocks:
            block.forward = functools.partial(function, block)


def local(tensor):
    """A rank's part of a weight."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def out_of_memory(error):
    """Whether an exception says that memory was lacking, a GPU's or the host's."""
    if isinstance(error, RuntimeError):     # CUDA's own is one, cuBLAS's and the CPU's have no class of theirs
        return bool(re.search("out of memory|allocate memory|ALLOC_FAILED", str(error), re.IGNORECASE))
    return isinstance(error, MemoryError)


@contextlib.contextmanager
def dispensable(what):
    """Training goes on, with a warning, where this cannot be made or written: disk or memory are full.

    Yields a list, to which the reason is added.
    """
    reasons = []
    try:
        yield reasons
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        memory = out_of_memory(error)
        if not memory and isinstance(error, RuntimeError):
            raise
        reasons.append(str(error).strip().partition("\n")[0] or type(error).__name__)
        print(f"warning: {what} could not be {'made' if memory else 'written'} ({reasons[0]}), and "
              f"training goes on", file=sys.stderr, flush=True)


def warn_of_rest(name, share, micro):
    """Says that a rank's share of the batch is no multiple of its micro-batch: the rest is a graph of its own."""
    if share % min(micro or share, share):
        divisors = [m for m in range(1, share + 1) if share % m == 0]
        nearest = [max(m for m in divisors if m <= micro), min(m for m in divisors if m > micro)]
        print(f"warning: {name}: train.micro_batch = {micro} does not divide the {share} images of a rank: the "
              f"last micro-batch of each step has {share % micro}, for which each block is compiled once more, "
              f"for any size, which is slower. {nearest[0]} and {nearest[1]} divide {share}",
              file=sys.stderr, flush=True)


# torch warns at each checkpoint of a single process that it is one; and 2.13 of broadcast_buffers, whose successor 2.12 lacks. (For good: a filter
# for the time of a call would not hold in the threads that write.)
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
_marking = threading.Lock()


def mark(folder, status, step=None, begins=False):
    """Tells a scheduler's script how the training in RUN/checkpoints/NAME stands, in its file `status`: finished, to be continued (the
    same command goes on), or failed (it would fail again), and at which step (None: as it says already).

    What has failed stays so, whatever a thread is still writing, until a training `begins` anew.
    """
    path = os.path.join(folder, "status")
    with _marking:
        said = ""
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as f:
                said = f.read().strip()
        if said.startswith(FAILED) and status != FAILED and not begins:
            return
        if step is None:
            step = said.rpartition(" ")[2] or 0
        write_text(path, f"{status} {step}\n")


class State:
    """Model, averaged weights, optimiser and counters of one training: all that a checkpoint holds.

    Checkpoints are folders RUN/checkpoints/NAME/step-00001000, written beside their place and renamed. batch: images a step, of all ranks;
    initial: weights {name: tensor} to begin with; beside: bytes of each GPU's memory that others need; identity: what else may not change
    over a resume. image_flops is what training on one image costs.
    """

    def __init__(self, run, name, model_config, train, ranks, config, space, batch, initial=None, beside=0, **identity):
        self.run, self.name, self.train, self.ranks, self.batch = run, name, train, ranks, batch
        self.folder = os.path.join(run, "checkpoints", name)
        if batch % ranks.world:
            raise UserError(f"a batch of {batch} cannot be shared by {ranks.world} ranks: change train.batch or --nproc_per_node")
        # what may not change over a resume; the rest, such as steps or micro_batch, may
        free = ("data.workers", "data.max_bad", "data.use_latents")
        self.identity = {k: v for k, v in flat(config).items() if k.startswith(("data.", "flow.")) and k not in free}
        self.identity |= {"train.seed": train.seed, "train.batch": train.batch, **identity}
        self.identity |= {role: encoders.identity(info) for role, info in space.info.items()}
        self.identity |= {f"model.{k}": v for k, v in vars(model_config).items()}
        self.step, self.seconds, self.device_seconds, self.bad, self.warned, self.reported = 0, 0.0, 0.0, 0, 0, 0
        self.exported = True    # whether the last export could be written
        self.kept = 0           # the newest checkpoint's step
        self.skipped = []       # samples that could not be used since the last row of the log: (step, tar, name, cause)
        self.saving = None      # the checkpoint that is being written: (step, future)
        self.publisher = ThreadPoolExecutor(1)
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None      # it talks while training does
        newest = []
        on_rank_0(lambda: newest.append(self._read_newest()))
        newest = broadcast(newest[0] if newest else None)
        self.resumed = bool(newest)
        if newest and newest[1]["identity"] != self.identity:
            raise UserError(f"{newest[0]} was made with other settings (there / now: {differences(newest[1]['identity'], self.identity)}): "
                            f"use those, or delete {self.folder} to start anew")
        self.bf16 = train.precision == "bf16" or train.precision == "auto" and ranks.device.type == "cuda"
        self.sharded, self.choice = plan.choose_parallel(model_config, train, ranks, batch // ranks.world, self.bf16, beside)
        self._build(model_config, initial, newest)
        if newest:
            self._load(*newest)

    def _build(self, model_config, initial, newest):
        """Never two copies on a GPU: memory is taken shard by shard, and filled from a checkpoint or from rank 0's host memory."""
        train, ranks = self.train, self.ranks
        with torch.device("meta"):
            self.model = artifacts.build(model_config)
        self.image_flops = 3 * plan.flops(self.model.config)       # forward, and twice that backward
        self.compiled = train.compile == "yes" or train.compile == "auto" and ranks.device.type == "cuda"
        prepare_blocks(self.model, train.activation_checkpointing, self.compiled)
        if self.compiled and ranks.rank == 0:
            warn_of_rest(self.name, self.batch // ranks.world, train.micro_batch)
        if self.sharded:
            policy = MixedPrecisionPolicy(torch.bfloat16 if self.bf16 else None, torch.float32, cast_forward_inputs=False)    # autocast casts
            mesh = dist.init_device_mesh(ranks.device.type, (ranks.world,))
            for module in (*self.model.blocks, self.model):
                fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        self.model.to_empty(device=ranks.device).reset_positions(ranks.device)
        if not newest:
            weights = {}
            if not self.sharded or ranks.rank == 0:
                torch.manual_seed(train.seed)       # the same initial weights on all ranks
                weights = artifacts.build(model_config).state_dict() | (initial or {})
            set_model_state_dict(self.model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.sharded))
        self.ema = {k: v.detach().clone() for k, v in self.model.named_parameters()}
        self.pairs = None       # (average, weights), this rank's parts of them: see update
        # one for all checkpoints. It copies the state to host memory in this thread, from a GPU to pinned
        # memory that it keeps; without one the thread that writes would open a context on GPU 0 for each
        # rank, and wait for training's kernels every 10 MB
        pinned = ranks.device.type == "cuda"
        self.writer = dcp.FileSystemWriter(self.folder, cache_staged_state_dict=pinned)
        # fused: one kernel over all weights
        self.optimizer = torch.optim.AdamW(self.model.parameters(), train.lr, weight_decay=train.weight_decay, fused=True)
        # since the last row of the log: loss, images, gradient norms, steps, samples that could not be used, the largest norm; then by bin of t: what is
        # shown, images
        self.sums = torch.zeros(SHOWN + 2 * BINS, dtype=torch.float64, device=ranks.device)
        self.nonfinite = torch.zeros(3, device=ranks.device)        # steps that were skipped: in a row until now, in all, in the longest row
        self.wrapped = self.model
        if ranks.world > 1 and not self.sharded:
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            self.wrapped = torch.nn.parallel.DistributedDataParallel(self.model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)

    def synchronise_gradients(self, now):
        """Whether the next backward pass sums the gradients over the ranks: only the last micro-batch of a step needs it."""
        if self.sharded:
            self.model.set_requires_gradient_sync(now)
        elif self.wrapped is not self.model:
            self.wrapped.require_backward_grad_sync = now

    def update(self):
        """Clips, steps AdamW, moves the average: ema <- d ema + (1 - d) weights, with d = min(ema, (1 + n) / (10 + n)). -> the gradient's norm.

        Without a finite norm, which is all ranks' alike, weights and optimiser stay as they are (the average goes on towards them). It is the optimiser's kernel that looks, as it does for
        torch.amp's scaler, so that nobody waits for the GPU here.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.grad_clip or float("inf"))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        self.nonfinite[0] = (self.nonfinite[0] + 1) * self.optimizer.found_inf
        self.nonfinite[1] += self.optimizer.found_inf
        self.nonfinite[2] = self.nonfinite[2].maximum(self.nonfinite[0])
        self.optimizer.zero_grad(set_to_none=self.wrapped is self.model)        # DDP's gradients are views of its buckets: without them there would be two
        self.step += 1
        decay = min(self.train.ema_decay, (1 + self.step) / (10 + self.step))
        if self.pairs is None:
            # taken once: of hundreds of DTensors they cost tens of milliseconds a step. Not before the first
            # step: until its forward pass FSDP may give weights another place in memory, after it nothing does
            self.pairs = [local(e) for e in self.ema.values()], [local(p) for p in self.model.parameters()]
        torch._foreach_lerp_(*self.pairs, 1 - decay)
        return norm

    @torch.no_grad()
    def swap_average(self):
        """Exchanges the weights and their average, weight by weight; called again, changes them back.

        Bit by bit in place: that takes no memory, so it never stops half-way.
        """
        for e, p in zip(self.ema.values(), self.model.parameters()):
            e, p = local(e).view(torch.int32), local(p).view(torch.int32)
            p ^= e
            e ^= p
            p ^= e

    # -- checkpoints --

    def _tensors(self):
        weights, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optimizer": optimizer, "ema": self.ema, "sums": self.sums}

    def checkpoints(self):
        """Complete checkpoints, the oldest first."""
        return sorted(f for f in glob.glob(os.path.join(glob.escape(self.folder), "step-*")) if f[-1].isdigit())

    def _read_newest(self):
        """-> (folder, what its state.json says) of the newest checkpoint that is whole, if there is one; a damaged one is named and passed over."""
        for folder in reversed(self.checkpoints()):
            try:
                state = read_json(os.path.join(folder, "state.json"), STATE)
                if damaged := [name for name, size in state["files"].items() if os.path.getsize(os.path.join(folder, name)) != size]:
                    raise ValueError(f"{damaged[0]} has another size")
                if len(state["nonfinite"]) != 3 or any(len(row) != 4 for row in state["skipped"]):
                    raise ValueError("nonfinite or skipped has another length")
                return folder, state
            except (OSError, ValueError) as error:
                print(f"warning: {folder} is damaged ({error}): the one before is used", file=sys.stderr, flush=True)

    def _load(self, folder, state):
        tensors = self._tensors()
        try:
            dcp.load(tensors, checkpoint_id=folder, no_dist=not dist.is_initialized())     # in place, whatever the ranks were
        except dcp.api.CheckpointException as error:
            cause = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise UserError(f"{folder} cannot be read ({cause}): delete it, to resume from the one before") from None
        set_state_dict(self.model, self.optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"])
        if self.ranks.rank:
            self.sums.zero_()       # they were summed over the ranks
        self.step, self.seconds, self.bad = state["step"], state["seconds"], state["bad"]
        self.kept = self.step
        self.device_seconds = state["device_seconds"]
        self.nonfinite.copy_(torch.tensor(state["nonfinite"]))
        self.nonfinite[2] = 0       # has been looked at
        self.reported = int(self.nonfinite[1])
        if self.ranks.rank == 0:
            self.skipped = [tuple(row) for row in state["skipped"]]

    def save(self, status):
        """Copies the state to host memory and writes it from there as a checkpoint, while training goes on; first waits for the former one."""
        self.finish_saving()
        place = os.path.join(self.folder, f"step-{self.step:08d}")
        tensors = self._tensors()
        tensors["sums"] = sum_over_ranks(self.sums.clone())
        skipped = sum(gather(self.skipped), [])
        if self.ranks.rank == 0:
            for torn in glob.glob(os.path.join(glob.escape(self.folder), "step-*.tmp")):     # of a run that was killed here
                shutil.rmtree(torn, ignore_errors=True)
        barrier()
        future = dcp.async_save(tensors, checkpoint_id=f"{place}.tmp", storage_writer=self.writer, process_group=self.group, no_dist=not dist.is_initialized())
        if self.ranks.rank == 0:
            state = {"step": self.step, "seconds": self.seconds, "device_seconds": self.device_seconds, "bad": self.bad,
                     "nonfinite": self.nonfinite.tolist(), "skipped": skipped, "identity": self.identity}
            future = self.publisher.submit(self._publish, place, state, status, future)
        self.saving = self.step, future
        self.kept = self.step

    def _publish(self, place, state, status, future):
        """Rank 0, once all ranks have written: gives a checkpoint its name, marks how far training is, drops those that are not to be kept.

        In this order, each on the disk (torch syncs its files) before the next, so that whenever power fails there is a whole one to go on from.
        """
        future.result()
        state["files"] = {name: os.path.getsize(os.path.join(f"{place}.tmp", name)) for name in sorted(os.listdir(f"{place}.tmp"))}
        write_text(os.path.join(f"{place}.tmp", "state.json"), json.dumps(state, indent=1))
        if os.path.exists(place):       # a damaged one that was passed over
            shutil.rmtree(place)
        os.rename(f"{place}.tmp", place)
        sync(self.folder)
        mark(self.folder, status, state["step"])
        there = self.checkpoints()
        newest = there.index(place)     # later ones are damaged and were passed over
        for old in there[:max(0, newest + 1 - self.train.keep_last)] + there[newest + 1:]:
            if old > place or not self.train.keep_every or int(old[-8:]) % self.train.keep_every:
                with contextlib.suppress(OSError):
                    os.rename(old, f"{old}.tmp")        # half deleted, it is no checkpoint any more
                    shutil.rmtree(f"{old}.tmp")

    def set_aside(self, after):
        """Rank 0: checkpoints of steps after `after` are not resumed from any more, as step-N.not-finite. -> (newest that is left or None, those)"""
        kept, aside = None, []
        for folder in self.checkpoints():
            if int(folder[-8:]) <= after:
                kept = folder
                continue
            shutil.rmtree(f"{folder}.not-finite", ignore_errors=True)
            os.rename(folder, f"{folder}.not-finite")
            aside.append(folder)
        return kept, aside

    def finish_saving(self, last=False):
        """Waits until the last checkpoint is on disk. If it could not be written, all ranks go on and say so, or, if it was to be the last, end with a UserError. -> whether it was."""
        if self.saving:
            (step, future), self.saving, why = self.saving, None, ""
            try:
                future.result()
            except (Exception, dcp.api.CheckpointException) as error:       # the latter is torch's, of a rank that failed, and no Exception
                why = (str(error).strip() or type(error).__name__).splitlines()[-1]
            if why := next(filter(None, gather(why)), ""):
                why = f"{self.name}: the checkpoint of step {step} could not be written ({why}); is the disk full?"
                if self.ranks.rank == 0:
                    shutil.rmtree(os.path.join(self.folder, f"step-{step:08d}.tmp"), ignore_errors=True)       # makes room
                if last:
                    raise UserError(f"{why} Make room, and run the same command again: it resumes from the checkpoint before, if there is one")
                if self.ranks.rank == 0:
                    print(f"warning: {why} The former one is kept, and training goes on", file=sys.stderr, flush=True)
                return False
        return True

    def export(self, path, images, /, last=False, **info):
        """Writes the averaged weights as a model file. All ranks call it: sharded ones are gathered one by one, into rank 0's host memory.

        last: now a file that cannot be written is a UserError, and one that can finishes the training.
        """
        weights, reasons = {}, []
        for name, e in self.ema.items():
            whole = e.full_tensor() if isinstance(e, DTensor) else e
            if self.ranks.rank == 0:
                weights[name] = whole.cpu()
        if self.ranks.rank == 0:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.train.export]
            with dispensable(path) as reasons:
                for torn in glob.glob(f"{glob.escape(path)}.*.tmp"):     # of a run that was killed here
                    os.remove(torn)
                artifacts.save(path, self.model.config, weights, dtype, step=self.step, images=images, flops=self.image_flops * images, **info)
        self.exported = not sum(gather(reasons), [])
        if last and not self.exported:
            raise UserError(f"{path} could not be written: make room, and run the same command again")
        if last and self.ranks.rank == 0:
            mark(self.folder, FINISHED, self.step)
