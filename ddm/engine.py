"""A model in training on the GPUs of one node: compiled, replicated or sharded; its EMA weights.

    engine = Engine(model_config, train, ranks, ...)
    engine.model        the weights: plain tensors, or this rank's shards of them (DTensor)
    engine(x_t, t, c)   a forward pass under autocast, as the losses in flow.py call a model
    engine.ema          the EMA weights, which are what is exported

Replicated (DDP), each GPU holds all the weights, 20 bytes a parameter with gradients, AdamW's
moments and the EMA; sharded (FSDP2, `fully_shard`), 1/world of them, and each block is gathered
when it is needed. ddm/plan.py says beforehand which of them fits.
"""
import contextlib
import functools
import re
import sys
import warnings

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ddm import artifacts, plan
from ddm.encoders import resolve
from ddm.errors import UserError
from ddm.initial import RANDOM

# torch 2.13 warns of broadcast_buffers, whose successor 2.12 lacks
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)


# ---- blocks: activation checkpointing and compilation --------------------------------------------

def keep_matmuls(_, op, *args, **kwargs):
    """Selective checkpointing: keeps what matrix products and attention give.

    What is cheap (norms, modulation, GELU) is computed again.
    """
    if op in plan.EXPENSIVE:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def prepare_blocks(model, activation_checkpointing="none", compile=False, backend="inductor"):
    """Makes a model's blocks forget their activations ("block", "selective") and compiles them.

    One compiled function serves all blocks: each kind of block is one graph, whatever the depth. It
    stands in for `forward`, not for the call, so that FSDP's hooks stay outside of it and the names
    of the weights as they are.
    """
    options = {"use_reentrant": False, "preserve_rng_state": False}
    if activation_checkpointing == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts,
                                                  keep_matmuls)

    def forward(block, *args):
        if activation_checkpointing == "none":
            return type(block).forward(block, *args)
        return checkpoint(type(block).forward, block, *args, **options)

    if compile:
        # DDP sums gradients in buckets, and Dynamo would cut each compiled block where a bucket
        # ends, so that sums overlap with the backward pass: between blocks they do anyway. (On
        # torch 2.11 selective checkpointing is lost in a block that is cut.)
        torch._dynamo.config.optimize_ddp = False
        forward = torch.compile(forward, fullgraph=True, backend=backend)
    if compile or activation_checkpointing != "none":
        for block in model.blocks:
            block.forward = functools.partial(forward, block)


def warn_of_rest(name, share, micro):
    """Says that a rank's share of the batch is no multiple of its micro-batch, if so.

    The rest is a graph of its own.
    """
    rest = share % min(micro or share, share)
    if not rest:
        return
    divisors = [m for m in range(1, share + 1) if share % m == 0]
    below = max(m for m in divisors if m <= micro)
    above = min(m for m in divisors if m > micro)
    print(f"warning: {name}: train.micro_batch = {micro} does not divide the {share} images of a "
          f"rank: the last micro-batch of each step has {rest}, for which each block is compiled "
          f"once more, for any size, which is slower. {below} and {above} divide {share}",
          file=sys.stderr, flush=True)


# ---- memory --------------------------------------------------------------------------------------

def out_of_memory(error):
    """Whether an exception says that memory was lacking, a GPU's or the host's."""
    if isinstance(error, RuntimeError):
        # CUDA's own is one, cuBLAS's and the CPU's have no class of theirs
        words = "out of memory|allocate memory|ALLOC_FAILED"
        return bool(re.search(words, str(error), re.IGNORECASE))
    return isinstance(error, MemoryError)


@contextlib.contextmanager
def dispensable(what):
    """Training goes on, with a warning, where this cannot be made or written: disk or memory full.

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
        print(f"warning: {what} could not be {'made' if memory else 'written'} ({reasons[0]}), "
              f"and training goes on", file=sys.stderr, flush=True)


# ---- the engine ----------------------------------------------------------------------------------

def local(tensor):
    """A rank's part of a weight."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def learning_rate(train, step, first_step=0):
    """lr of step first_step..steps-1: linear warm-up from the first one on, constant, linear decay
    over the last `decay` steps, or over all steps if there are fewer.
    """
    up = 1.0
    if train.warmup:
        up = min(1.0, (step - first_step + 1) / train.warmup)
    down = 1.0
    if train.decay:
        down = min(1.0, (train.steps - step) / min(train.decay, train.steps))
    return train.lr * up * down


class Engine:
    """Weights and EMA weights of one training, and how they are spread over the ranks.

    name: for messages. batch: images a step, of all ranks. initial: what to begin with
    (ddm/initial.py), by default random weights at step 0; resumed: a checkpoint will be loaded, so
    no weights are made. beside: bytes of each GPU's memory that others need. UserError if the batch
    cannot be shared.
    """

    def __init__(self, name, model_config, train, ranks, *, batch, initial=RANDOM, resumed=False,
                 beside=0):
        if batch % ranks.world:
            raise UserError(f"a batch of {batch} cannot be shared by {ranks.world} ranks: "
                            f"change train.batch or --nproc_per_node")
        self.name = name
        self.config = model_config
        self.train = train
        self.ranks = ranks
        self.batch = batch
        # of the schedule, in which a seed may have made the steps before
        self.first_step = initial.step
        self.step = initial.step

        self.bf16 = resolve(train.precision, ranks.device) == "bf16"
        self.sharded, self.choice = plan.choose_parallel(model_config, train, ranks,
                                                         batch // ranks.world, self.bf16, beside)
        self.autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=self.bf16)
        # forward, and twice that backward
        self.image_flops = 3 * plan.flops(model_config)

        # steps that were skipped: in a row until now, in all, in the longest row since a look
        self.nonfinite = torch.zeros(3, device=ranks.device)
        # (EMA weights, weights), this rank's parts of them: see update_ema
        self.pairs = None
        self._build(initial, resumed)

    def _build(self, initial, resumed):
        """Never two copies on a GPU: memory is taken shard by shard, and filled from a checkpoint
        or from rank 0's host memory.
        """
        train = self.train
        with torch.device("meta"):
            self.model = artifacts.build(self.config)
        self.compiled = train.compile == "yes"
        if train.compile == "auto":
            self.compiled = self.ranks.device.type == "cuda"
        prepare_blocks(self.model, train.activation_checkpointing, self.compiled)
        if self.compiled and self.ranks.rank == 0:
            warn_of_rest(self.name, self.batch // self.ranks.world, train.micro_batch)

        # before there is memory for it: each rank takes that of its shard alone
        if self.sharded:
            self._shard()
        self.model.to_empty(device=self.ranks.device).reset_positions(self.ranks.device)
        # which a checkpoint would overwrite
        if not resumed:
            self._fill(initial)
        # equal to the weights at first, but for a seed's; a resume loads both
        self.ema = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        if initial.raw and not resumed:
            self._fill(initial, raw=True)

        self.wrapped = self.model
        if self.ranks.world > 1 and not self.sharded:
            on_gpu = self.ranks.device.type == "cuda"
            self.wrapped = torch.nn.parallel.DistributedDataParallel(
                self.model,
                device_ids=[self.ranks.device.index] if on_gpu else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        self.model.train()

    def _shard(self):
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self.bf16 else None,
            reduce_dtype=torch.float32,
            # autocast casts
            cast_forward_inputs=False,
        )
        mesh = dist.init_device_mesh(self.ranks.device.type, (self.ranks.world,))
        # blocks first: what is left belongs to the model's own group
        for module in (*self.model.blocks, self.model):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)

    def _fill(self, initial, raw=False):
        """The same initial weights on all ranks: a file's, or random ones from train.seed."""
        if self.sharded and self.ranks.rank:
            # they come from rank 0
            weights = {}
        elif initial.path:
            weights = initial.load(raw)
        else:
            # on the host, whose random numbers are the same beside any device
            torch.manual_seed(self.train.seed)
            weights = artifacts.build(self.config).state_dict()
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.sharded)
        set_model_state_dict(self.model, weights, options=options)

    @property
    def images(self):
        """How many this training has seen; those of a seed before it are the seed's."""
        return (self.step - self.first_step) * self.batch

    def is_due(self, every):
        """Whether something is due after this step that is so each `every` steps (0: never), and
        after the last one.
        """
        if self.step == self.train.steps:
            return True
        return every > 0 and self.step % every == 0

    def __call__(self, x_t, t, c):
        """x_t [B,C,S,S], t [B], c -> what the model says of it, with gradients, under autocast."""
        with self.autocast:
            return self.wrapped(x_t, t, c)

    def sum_gradients(self, now):
        """Whether the next backward pass sums the gradients over the ranks: that of the last
        micro-batch of a step alone needs it.
        """
        if self.sharded:
            self.model.set_requires_gradient_sync(now)
        elif self.wrapped is not self.model:
            self.wrapped.require_backward_grad_sync = now

    def clip_gradients(self, largest):
        """Scales the gradient to a norm of at most `largest` (0: as it is). -> its norm before."""
        parameters = self.model.parameters()
        norm = torch.nn.utils.clip_grad_norm_(parameters, largest or float("inf"))
        # of shards it is summed only now
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def optimizer_step(self, norm, *optimizers):
        """Steps all optimisers, or none if the gradient's norm, which is all ranks' alike, is not
        finite: then weights and the optimisers' state stay as they are. Clears the gradients.

        A fused optimiser is told so on the device, as by torch.amp's scaler, and nobody waits; any
        other one waits.
        """
        nonfinite = ~norm.isfinite()
        for optimizer in optimizers:
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                optimizer.found_inf = nonfinite.float()
                optimizer.step()
            elif not nonfinite:
                optimizer.step()
        # the model's, not the optimisers': one may be given a part of the weights alone. DDP's
        # gradients are views of its buckets: without them there would be two copies
        self.model.zero_grad(set_to_none=self.wrapped is self.model)

        skipped = nonfinite.float()
        self.nonfinite[0] = (self.nonfinite[0] + 1) * skipped
        self.nonfinite[1] += skipped
        self.nonfinite[2] = self.nonfinite[2].maximum(self.nonfinite[0])
        self.step += 1

    def update_ema(self, ema_decay):
        """ema <- d ema + (1 - d) weights, with d = min(ema_decay, (1 + n) / (10 + n)) after n
        steps. After a skipped step, too.
        """
        decay = min(ema_decay, (1 + self.step) / (10 + self.step))
        if self.pairs is None:
            # taken once: of hundreds of DTensors they cost tens of milliseconds a step. Not before
            # the first step: until its forward pass FSDP may give weights another place in memory,
            # after it nothing does
            ema = [local(e) for e in self.ema.values()]
            weights = [local(p) for p in self.model.parameters()]
            self.pairs = ema, weights
        torch._foreach_lerp_(*self.pairs, 1 - decay)

    @torch.no_grad()
    def swap_ema(self):
        """Exchanges the weights and the EMA weights; called again, changes them back.

        Bit by bit in place: that takes no memory, so it never stops half-way.
        """
        for e, p in zip(self.ema.values(), self.model.parameters(), strict=True):
            e = local(e).view(torch.int32)
            p = local(p).view(torch.int32)
            p ^= e
            e ^= p
            p ^= e

    def whole(self, weights):
        """Weights {name: tensor}, such as `ema`, whole on rank 0's host; {} elsewhere. All ranks
        call it: sharded ones are gathered one by one.
        """
        gathered = {}
        for name, weight in weights.items():
            weight = weight.detach()
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if self.ranks.rank == 0:
                gathered[name] = whole.cpu()
        return gathered
