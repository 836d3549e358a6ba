"""What a training costs: FLOPs, memory and time, before anything is built.

    flops(config), parameter_count(config)      of the model of a ModelConfig
    Memory(config, bf16)                        bytes of its training, by how it is parallelised
    choose_parallel(...)                        train.parallel = auto: replicas or shards
    report(...)                                 what --plan prints

The memory of activations is measured, not computed: a forward pass is traced with tensors that have
shapes and no data.
"""
import math
import os
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddm import encoders
from ddm.artifacts import build
from ddm.config import Train
from ddm.errors import UserError
from ddm.process import broadcast, local_world
from model import ModelConfig

GB = 1e9
# of a GPU's memory: the rest goes to the driver's context, communication buffers, fragmentation
USABLE = 0.9


# ---- devices -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Device:
    bf16: int       # 1e12 FLOP/s of bf16 products, dense
    tf32: int       # 1e12 FLOP/s of TF32 products, dense
    memory: int     # GB

    def peak(self, bf16):
        """FLOP/s."""
        return (self.bf16 if bf16 else self.tf32) * 1e12


# by words of the device's name; from the vendors' data sheets, their rates with sparsity halved.
# The first whose words are all there is meant
#                            bf16  tf32  memory
DEVICES = {
    "B200":           Device(2250, 1125,    180),
    "GB200":          Device(2500, 1250,    186),
    "GH200":          Device( 989,  495,     96),
    "H200 NVL":       Device( 836,  418,    141),
    "H200":           Device( 989,  495,    141),
    "H100 NVL":       Device( 836,  418,     94),
    "H100 PCIe":      Device( 756,  378,     80),
    "H100":           Device( 989,  495,     80),
    "H20":            Device( 148,   74,     96),
    "A100":           Device( 312,  156,     80),
    "L40S":           Device( 362,  183,     48),
    "L40":            Device( 181,   90,     48),
    "L4":             Device( 121,   60,     24),
    "A40":            Device( 150,   75,     48),
    "A10G":           Device(  70,   35,     24),
    "A10":            Device( 125,   62,     24),
    "RTX A6000":      Device( 155,   77,     48),
    "RTX 6000 Ada":   Device( 364,  182,     48),
    "RTX 5090":       Device( 210,  105,     32),
    "RTX 4090":       Device( 165,   83,     24),
    "RTX 3090":       Device(  71,   36,     24),
    "MI300X":         Device(1307,  654,    192),
}


def peak_flops(name, bf16):
    """FLOP/s of a device by its name; None if it is not in the table."""
    # "NVIDIA H100 80GB HBM3" has all words of "H100"
    words = set(re.split(r"[\s-]+", name.lower()))
    for key, device in DEVICES.items():
        if words.issuperset(key.lower().split()):
            return device.peak(bf16)
    return None


def device_memory(device):
    """Bytes that a rank has: its GPU's memory, or its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // local_world()


# ---- frozen networks ---------------------------------------------------------------------------

# of the networks that configs/ name, so that a plan need not ask the hub
#               downsampling, channels
AUTOENCODERS = {
    "": (1, 3),
    "stabilityai/sd-vae-ft-mse": (8, 4),
}
#               width of the token features
TEXT_ENCODERS = {
    "openai/clip-vit-large-patch14": 768,
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": 1280,
    "google/t5-v1_1-xl": 2048,
}
#               weights
FROZEN = {
    "stabilityai/sd-vae-ft-mse": 83_653_863,
    "openai/clip-vit-large-patch14": 123_060_480,
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": 693_021_440,
    "google/t5-v1_1-xl": 1_223_527_424,
}


class Frozen(NamedTuple):
    weights: int    # bytes of the networks' weights
    work: int       # bytes that they work in
    unknown: str    # words for the networks that are left out


def frozen_sizes(config, names):
    """-> (weights of each of these networks of a run's config, words for those left out)."""
    sizes = [FROZEN.get(name) for name in names]
    if None not in sizes:
        return sizes, ""
    try:
        return encoders.frozen_parameters(config), ""
    except UserError as error:
        known = [size or 0 for size in sizes]
        return known, f"; without some frozen networks, of which nothing is known ({error})"


def frozen(config, bf16):
    """The Frozen networks of a run's config.

    All are resident unless their work is cached. Even then one GPU has the autoencoder, which
    decodes samples.
    """
    latent = config.autoencoder.name != encoders.NONE["autoencoder"]
    text = config.data.condition == "text" and config.text.name != encoders.NONE["text"]
    names = []
    if latent:
        names.append(config.autoencoder.name)
    if text:
        names += [name.strip() for name in config.text.name.split(" + ")]
    sizes, unknown = frozen_sizes(config, names)

    # bytes of a weight
    each = 2 if bf16 and config.text.precision != "fp32" else 4
    weights = each * sum(sizes)
    work = 0
    if latent:
        # an autoencoder's are fp32 always
        weights += (4 - each) * sizes[0]
        # about four feature maps of Stable Diffusion's 128 channels at full resolution
        work = 4 * 128 * 4 * encoders.AT_ONCE
    return Frozen(weights, work, unknown)


# ---- FLOPs and weights -------------------------------------------------------------------------

def tokens(config):
    """Tokens that the model of a ModelConfig makes of an image -> (of the image, of its text).

    The router's CLS token is among the image's, the learned null among the text's.
    """
    image = (config.size // config.patch) ** 2
    if config.clusters:
        image += 1
    text = 0
    if config.condition == "text" or config.double:
        text = 1 + config.length
    return image, text


def flops(config):
    """Forward FLOPs of one image through the model of a ModelConfig (a multiply-add is two).

    To train on it costs three times as many, since the backward pass costs two forward passes.
    """
    D = config.dim
    patches = (config.size // config.patch) ** 2

    patch_embed = 2 * patches * config.patch ** 2 * config.channels * D
    time_mlp = 2 * (256 * D + D * D)
    text_proj = 0
    if config.text_dim:
        text_proj = 2 * config.length * (config.text_dim * D + D * D)
    blocks = mmdit_block_flops(config) if config.double else dit_block_flops(config)
    head = 2 * D * config.clusters if config.clusters else patch_embed
    return patch_embed + time_mlp + text_proj + blocks + head


def dit_block_flops(config):
    """FLOPs of a DiT's or a router's blocks, with all that modulates them and the last norm."""
    D = config.dim
    N, M = tokens(config)

    block = 24 * N * D * D          # qkv 6, proj 2, MLP 16
    block += 4 * N * N * D          # attention
    block += 12 * D * D             # adaLN
    if config.condition == "text":
        block += 4 * N * D * D      # q and proj of cross-attention
        block += 4 * M * D * D      # k and v
        block += 4 * N * M * D      # attention
    return config.depth * block + 4 * D * D


def mmdit_block_flops(config):
    """FLOPs of an MMDiT's blocks, of which both kinds cost the same, with what modulates them."""
    D = config.dim
    T = sum(tokens(config))

    block = 24 * T * D * D          # qkv 6, proj 2, MLP 16
    block += 4 * T * T * D          # attention
    return config.depth * block + 12 * D * D


def parameters(module):
    """The number of a module's weights."""
    return sum(p.numel() for p in module.parameters())


def parameter_count(config):
    """Weights of the model of a ModelConfig, which is built without any data."""
    with torch.device("meta"):
        return parameters(build(config))


# ---- activations -------------------------------------------------------------------------------

aten = torch.ops.aten
# what costs more to compute again than to keep: the engine's selective checkpointing keeps it
EXPENSIVE = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _add(storages, tensor):
    """Notes the memory of a tensor, which several may share, once."""
    storage = tensor.untyped_storage()
    storages[storage._cdata] = storage


def _bytes(storages):
    return sum(storage.nbytes() for storage in storages.values())


class _Watch(TorchDispatchMode):
    """Notes what a forward pass keeps for backward: outside of blocks, in each; what enters one."""

    def __init__(self, model):
        super().__init__()
        self.outside = {}
        self.blocks = []
        self.entering = {}
        # bytes that EXPENSIVE operations give
        self.expensive = 0
        self.in_block = False

        # weights are there anyway
        self.weights = {}
        for weight in model.parameters():
            _add(self.weights, weight)
        for block in model.blocks:
            block.register_forward_pre_hook(self.enter)
            block.register_forward_hook(self.leave)

    def enter(self, block, args):
        self.in_block = True
        self.blocks.append({})
        for arg in args:
            if isinstance(arg, torch.Tensor):
                _add(self.entering, arg)

    def leave(self, block, args, out):
        self.in_block = False

    def pack(self, tensor):
        """autograd's hook for each tensor that it saves."""
        if tensor.untyped_storage()._cdata not in self.weights:
            _add(self.blocks[-1] if self.in_block else self.outside, tensor)
        return tensor

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        if op in EXPENSIVE:
            for result in out if isinstance(out, tuple) else (out,):
                if isinstance(result, torch.Tensor):
                    self.expensive += result.nbytes
        return out


def example(config, batch):
    """Zeros for the model of a ModelConfig: x_t, t, c."""
    c = None
    if config.condition == "class":
        c = torch.zeros(batch, dtype=torch.int64)
    elif config.text_dim:
        c = torch.zeros(batch, config.length, config.text_dim, dtype=torch.float16)
    elif config.condition == "text":
        c = torch.zeros(batch, config.length, dtype=torch.int64)
    x_t = torch.zeros(batch, config.channels, config.size, config.size)
    return x_t, torch.zeros(batch), c


def kept(config, batch, bf16):
    """Bytes that the model of a ModelConfig keeps for the backward pass of a batch.

    -> {"none": , "selective": , "block": } by train.activation_checkpointing. selective is an upper
    bound: the block that is being computed again has its products counted twice.
    """
    # tensors with shapes and without memory: nothing is computed
    with FakeTensorMode():
        model = build(config)
        model.requires_grad_(True)
        watch = _Watch(model)
        saved = torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda tensor: tensor)
        with saved, torch.autocast("cpu", torch.bfloat16, enabled=bf16), watch:
            model(*example(config, batch))

    blocks = [_bytes(storages) for storages in watch.blocks]
    everything = _bytes(watch.outside) + sum(blocks)
    # what enters blocks, and all of one block at a time
    again = _bytes(watch.outside | watch.entering) + max(blocks, default=0)
    return {"none": everything,
            "selective": min(again + watch.expensive, everything),
            "block": again}


# ---- memory of a training ----------------------------------------------------------------------

def how_many(sizes, room):
    """How many of the largest of these models (bytes each) fit into `room` bytes, at least one."""
    total = 0
    count = 0
    # the largest: any of them may be there together
    for size in sorted(sizes, reverse=True):
        total += size
        if total > room:
            break
        count += 1
    return max(1, count)


class Memory:
    """Bytes that training the model of a ModelConfig takes on each of `world` GPUs.

    beside: bytes for something else, such as teachers or frozen networks. work: bytes that frozen
    networks work in, before the forward pass.

    Of the methods' arguments, share is a rank's images of a step, micro those of a forward pass,
    accumulating whether a step has several of these, and mode is train.activation_checkpointing.
    """

    def __init__(self, config, bf16, beside=0, work=0):
        self.bf16 = bf16
        self.beside = beside
        self.work = work

        with torch.device("meta"):
            model = build(config)
        self.parameters = parameters(model)
        # sharded, what is outside of blocks and two of the blocks are whole at a time
        blocks = [parameters(block) for block in model.blocks]
        self.gathered = self.parameters - sum(blocks) + 2 * max(blocks, default=0)

        # their difference is what one image keeps
        two = kept(config, 2, bf16)
        three = kept(config, 3, bf16)
        # token features in f16, as they come and with some of them dropped
        tokens = 2 * 2 * config.length * config.text_dim
        # {mode: bytes of one image's activations}
        self.image = {mode: three[mode] - two[mode] + tokens for mode in two}
        # what is kept whatever the batch: the bf16 copies of the weights that autocast makes
        self.casts = two["none"] - 2 * (three["none"] - two["none"])

    def fixed(self, sharded, world, accumulating):
        """{what: bytes} whatever the micro-batch."""
        P = self.parameters
        W = world if sharded else 1

        gradients = 4 * P / W
        copies = self.casts
        if sharded:
            # of what is gathered: the weights, their gradients, and these in fp32 to be summed
            copies = self.gathered * (8 if self.bf16 else 12)
        if accumulating:
            # while micro-batches add up all gradients are whole
            gradients = 4 * P
        if accumulating and world > 1 and not sharded:
            # DDP has its buckets from the start; the first micro-batch of all, after which nothing
            # is summed, makes gradients beside them
            gradients += 4 * P

        return {"weights": 4 * P / W,
                "gradients": gradients,
                "AdamW": 8 * P / W,
                "EMA": 4 * P / W,
                "copies": copies}

    def total(self, sharded, world, micro, accumulating, mode):
        """Bytes of all there is."""
        fixed = sum(self.fixed(sharded, world, accumulating).values())
        # frozen networks are done before activations are kept
        return self.beside + fixed + max(micro * self.image[mode], self.work)

    def configured(self, sharded, train, world, share):
        """The total as [train] has it."""
        micro = min(train.micro_batch or share, share)
        return self.total(sharded, world, micro, accumulating=micro < share,
                          mode=train.activation_checkpointing)

    def shards(self, train, world, share, memory):
        """Whether train.parallel means sharding, on GPUs of `memory` bytes."""
        if world == 1 or train.parallel == "ddp":
            return False
        if train.parallel == "fsdp":
            return True
        return self.configured(False, train, world, share) > USABLE * memory

    def teachers(self, train, world, share, sizes, memory):
        """How many models of these sizes (bytes) fit beside the training as [train] has it.

        At least one. The student is sharded only where replicas leave no room for one.
        """
        parallel = train.parallel if world > 1 else "ddp"
        ways = {"ddp": [False], "fsdp": [True], "auto": [False, True]}[parallel]
        for sharded in ways:
            room = USABLE * memory - self.configured(sharded, train, world, share)
            if room >= max(sizes):
                return how_many(sizes, room)
        return 1

    def micro_batch(self, sharded, world, share, mode, memory):
        """The largest divisor of `share` that fits into `memory` bytes; 0 if none does."""
        for micro in range(share, 0, -1):
            # no rest, which would be a batch of another size
            if share % micro:
                continue
            need = self.total(sharded, world, micro, accumulating=micro < share, mode=mode)
            if need <= USABLE * memory:
                return micro
        return 0


def choose_parallel(config, train, ranks, share, bf16, beside):
    """-> (whether to shard the model over the ranks, one line that says why).

    share: images of a rank and step; beside: as in Memory.
    """
    if ranks.world == 1:
        return False, ""

    memory = device_memory(ranks.device)
    need = Memory(config, bf16, beside)
    # GPUs may differ by a few bytes; the ranks must not
    sharded = broadcast(need.shards(train, ranks.world, share, memory))

    chosen = "sharded (FSDP2)" if sharded else "replicated (DDP)"
    replicas = need.configured(False, train, ranks.world, share)
    shards = need.configured(True, train, ranks.world, share)
    return sharded, (
        f"{chosen} over {ranks.world} ranks, train.parallel = {train.parallel!r}: "
        f"about {replicas / GB:.2g} GB a rank replicated, {shards / GB:.2g} GB sharded, "
        f"of {memory / GB:.3g} GB")


# ---- the report --------------------------------------------------------------------------------

@dataclass
class Plan:
    """One training on GPUs of one kind."""
    name: str               # expert-3, router, student
    config: ModelConfig
    train: Train            # of the run's config
    steps: int              # those of its own
    batch: int              # images of a step, on all GPUs
    world: int              # GPUs
    gpu: str                # their kind, of DEVICES
    mfu: float              # share of the peak rate that training reaches
    networks: Frozen
    need: Memory
    raw: bool = False       # whether raw weights are exported, too
    teachers: int = 0       # models that it learns from
    resident: int = 0       # so many of which stay on each GPU

    def __post_init__(self):
        device = DEVICES[self.gpu]
        self.share = self.batch // self.world
        self.bf16 = self.train.precision != "fp32"
        # FLOP/s and bytes of a GPU
        self.peak = device.peak(self.bf16)
        self.memory = device.memory * GB
        # a student's images cost a teacher's forward pass, too
        self.image_flops = (4 if self.teachers else 3) * flops(self.config)
        self.step_flops = self.batch * self.image_flops
        self.step_seconds = self.step_flops / (self.world * self.peak * self.mfu)
        # in bf16, see ensemble.py
        self.teacher_bytes = 2 * self.need.parameters


def report(name, config, train, batch, run_config, *, first_step=0, raw=False, teachers=0,
           resident=-1):
    """Prints the plan of one training (rank 0), of the model of a ModelConfig.

    first_step: at which it begins, after a seed. raw: of a seed, whose file has its weights twice.
    teachers: models of its size that it learns from, of which `resident` stay on each GPU (0: all,
    -1: as many as fit). UserError if the GPUs cannot share the batch.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    settings = run_config.plan
    world = int(os.environ.get("WORLD_SIZE", settings.gpus))
    if batch % world:
        raise UserError(f"a batch of {batch} cannot be shared by {world} GPUs: "
                        f"change train.batch or --plan.gpus")
    if settings.gpu not in DEVICES:
        known = ", ".join(map(repr, DEVICES))
        raise UserError(f"plan.gpu = {settings.gpu!r} is not one of {known}")

    bf16 = train.precision != "fp32"
    networks = frozen(run_config, bf16)
    need = Memory(config, bf16, networks.weights, networks.work)
    plan = Plan(name, config, train, steps=train.steps - first_step, batch=batch, world=world,
                gpu=settings.gpu, mfu=settings.mfu, networks=networks, need=need, raw=raw,
                teachers=teachers)
    if teachers:
        add_teachers(plan, resident)

    print_size(plan)
    print()
    print_memory(plan)
    print()
    print_time(plan)
    if settings.step_seconds:
        print_given_step(plan, settings.step_seconds)


def add_teachers(plan, resident):
    """Gives teachers their room; `resident` as in report."""
    if resident < 0:
        sizes = [plan.teacher_bytes] * plan.teachers
        resident = plan.need.teachers(plan.train, plan.world, plan.share, sizes, plan.memory)
    plan.resident = min(resident or plan.teachers, plan.teachers)
    plan.need.beside += plan.resident * plan.teacher_bytes


def print_size(plan):
    """The model, an image, and all images."""
    with torch.device("meta"):
        kind = type(build(plan.config)).__name__
    image, text = tokens(plan.config)
    print(f"{plan.name}: {kind} of {plan.need.parameters / 1e6:.4g}M parameters; "
          f"an image is {image} tokens + {text} of text, {plan.image_flops / 1e12:.4g} TFLOPs to "
          f"train on ({flops(plan.config) / 1e12:.4g} forward)")

    images = plan.steps * plan.batch
    if plan.steps < plan.train.steps:
        print(f"it goes on from the run's seed, which makes the first "
              f"{plan.train.steps - plan.steps:,} of {plan.train.steps:,} steps elsewhere: "
              f"--shard seed --plan")
    print(f"batch {plan.batch} = {plan.world} x {plan.gpu} x {plan.share}; "
          f"{plan.steps:,} steps = {images / 1e6:.4g}M images = "
          f"{images * (image + text) / 1e9:.4g}G tokens = {images * plan.image_flops:.3g} FLOPs")


def print_memory(plan):
    """A row for each way to train; what the host needs."""
    networks = plan.networks
    print(f"memory in GB of the {DEVICES[plan.gpu].memory} of a {plan.gpu}, {USABLE:.0%} of which "
          f"may be used; activations as in eager mode")
    if networks.weights or networks.unknown:
        print(f"of it {networks.weights / GB:.3g} GB for frozen networks (less where their work is "
              f"cached), which work in {networks.work / GB:.2g} GB before the model does"
              f"{networks.unknown}")
    if plan.teachers:
        print(f"of it {plan.resident * plan.teacher_bytes / GB:.3g} GB for {plan.resident} of "
              f"{plan.teachers} teachers")

    print("         activation     weights  gradients   AdamW      EMA  copies"
          "    an image's     micro-batch     in all")
    print("         checkpointing                                            "
          "  activations    that fits")
    for sharded in (False, True) if plan.world > 1 else (False,):
        for mode in plan.need.image:
            print(memory_row(plan, sharded, mode))
    print("* as configured (train.parallel, train.activation_checkpointing); auto shards only if "
          "replicas do not fit")

    # weights, moments, EMA weights
    staged = 16 * plan.need.parameters
    sharded = ""
    if plan.world > 1:
        sharded = f"; sharded (FSDP2) to {staged / plan.world / GB:.3g} GB"
    print(f"host memory: a checkpoint is first copied to {staged / GB:.3g} GB of pinned memory for "
          f"each GPU, which is kept{sharded}")


def memory_row(plan, sharded, mode):
    """One line of the table, for one way to parallelise and one to checkpoint activations."""
    need = plan.need
    fits = need.micro_batch(sharded, plan.world, plan.share, mode=mode, memory=plan.memory)
    # a row that does not fit says what a single image would need
    micro = fits or 1
    accumulating = micro < plan.share
    fixed = need.fixed(sharded, plan.world, accumulating)
    total = need.total(sharded, plan.world, micro, accumulating=accumulating, mode=mode)

    way = "one"
    if plan.world > 1:
        way = "FSDP2" if sharded else "DDP"
    configured = (mode == plan.train.activation_checkpointing
                  and sharded == need.shards(plan.train, plan.world, plan.share, plan.memory))
    mark = "*" if configured else " "
    return (f"{mark}{way:7s} {mode:12s}"
            f"{fixed['weights'] / GB:10.2f}{fixed['gradients'] / GB:11.2f}"
            f"{fixed['AdamW'] / GB:8.2f}{fixed['EMA'] / GB:9.2f}{fixed['copies'] / GB:8.2f}"
            f"{need.image[mode] / GB:14.3f}{fits or 'none':>16}{total / GB:11.1f}")


def print_time(plan):
    """Of a step, of all of them, and of writing checkpoints."""
    step = plan.step_seconds
    steps = plan.steps
    precision = "bf16" if plan.bf16 else "TF32"
    print(f"time: {step:.3g} s a step, {plan.batch / step:.4g} images/s, {days(step * steps)} for "
          f"{steps:,} steps at {plan.mfu:.0%} MFU of {plan.peak / 1e12:.0f} TFLOP/s ({precision}) "
          f"a GPU")

    # weights, moments, EMA weights; and these again, exported
    export = 2 if plan.train.export == "bf16" else 4
    if plan.raw:
        export *= 2
    files = plan.need.parameters * (4 + 8 + 4 + export)
    # whole minutes for a file that is being written, this one, and a step before each
    wait = max(60, 60 * math.ceil((2 * files / 1e9 + 2 * step) / 60))
    print(f"a checkpoint and an export are {files / GB:.3g} GB: at 1 GB/s {files / 1e9:.0f} s. "
          f"After SIGTERM a training needs that, the rest of its step, and as much again if it was "
          f"saving: give torchrun --shutdown-timeout {wait} (torch 2.12 and later; otherwise it "
          f"kills after 30 s, see docs/unattended.md)")


def print_given_step(plan, seconds):
    """What a step time from elsewhere implies."""
    able = plan.world * plan.peak * seconds
    print(f"a step of {seconds:g} s on {plan.world} x {plan.gpu}: "
          f"{days(seconds * plan.steps)}; a batch of {plan.batch} in that time is an MFU of "
          f"{plan.step_flops / able:.1%}; at {plan.mfu:.0%} MFU it is a batch of "
          f"{plan.mfu * able / plan.image_flops:.0f}")


def days(seconds):
    """A duration in words."""
    if seconds > 2 * 86400:
        return f"{seconds / 86400:.1f} days"
    if seconds > 2 * 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.1f} minutes"
