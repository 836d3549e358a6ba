"""ddm.plan"""
import math
import os
import re

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddm import artifacts, encoders
from ddm.artifacts import build
from ddm.errors import UserError
from ddm.process import broadcast, local_world



def flops(config):
    """Forward FLOPs of one image through the model of a ModelConfig, which is not built."""
    with torch.device("meta"):
        return build(config).flops()


def parameter_count(config):
    """Weights of the model of a ModelConfig, which is not built."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(config).parameters())


# dense peak rates in 1e12 FLOP/s, bf16 and TF32 multiplications (vendors' data sheets, without sparsity), and memory in GB, by words of the device's name
DEVICES = {"B200": (2250, 1125, 180), "GB200": (2500, 1250, 186), "GH200": (989, 495, 96), "H200 NVL": (836, 418, 141), "H200": (989, 495, 141),
           "H100 NVL": (836, 418, 94), "H100 PCIe": (756, 378, 80), "H100": (989, 495, 80), "H20": (148, 74, 96), "A100": (312, 156, 80),
           "L40S": (362, 183, 48), "L40": (181, 90, 48), "L4": (121, 60, 24), "A40": (150, 75, 48), "A10G": (70, 35, 24), "A10": (125, 62, 24),
           "RTX A6000": (155, 77, 48), "RTX 6000 Ada": (364, 182, 48), "RTX 5090": (210, 105, 32), "RTX 4090": (165, 83, 24), "RTX 3090": (71, 36, 24),
           "MI300X": (1307, 654, 192)}
# downsampling and channels, and width of the token features, of networks that configs/ name: a plan need not ask the hub
AUTOENCODERS = {"": (1, 3), "stabilityai/sd-vae-ft-mse": (8, 4)}
TEXT_ENCODERS = {"openai/clip-vit-large-patch14": 768, "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": 1280, "google/t5-v1_1-xl": 2048}
# weights of these
FROZEN = {"stabilityai/sd-vae-ft-mse": 83_653_863, "openai/clip-vit-large-patch14": 123_060_480,
          "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": 693_021_440, "google/t5-v1_1-xl": 1_223_527_424}
USABLE = 0.9        # of a GPU's memory: the rest goes to the driver's context, to communication buffers and to fragmentation
GB = 1e9
aten = torch.ops.aten
# what costs more to compute again than to keep: engine.py's selective checkpointing keeps it
EXPENSIVE = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_dot_product_flash_attention.default,
             aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default,
             aten._scaled_dot_product_flash_attention_for_cpu.default}


def peak_flops(name, bf16):
    """FLOP/s of a device by its name; None if it is not in the table."""
    words = set(re.split(r"[\s-]+", name.lower()))
    found = next((rates for key, rates in DEVICES.items() if set(key.lower().split()) <= words), None)
    return found and found[0 if bf16 else 1] * 1e12


def device_memory(device):
    """Bytes that a rank has: its GPU's memory, or its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // local_world()


class _Expensive(TorchDispatchMode):
    """Adds up what EXPENSIVE operations give."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        if op in EXPENSIVE:
            self.bytes += sum(o.nbytes for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, torch.Tensor))
        return out


def kept(config, batch, bf16):
    """Bytes that the model of a ModelConfig keeps for the backward pass of a batch, by activation checkpointing: {"none": , "selective": , "block": }.

    selective is an upper bound: the block that is being computed again has its products counted twice.
    """
    with FakeTensorMode():
        model = artifacts.build(config)
        model.requires_grad_(True)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        places = [{}]       # storages that are kept: outside of blocks first, then by block
        entering, expensive = {}, _Expensive()

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                places[-1 if inside else 0][storage._cdata] = storage
            return tensor

        inside = []

        def enter(block, args):
            inside.append(block)
            places.append({})
            entering.update((a.untyped_storage()._cdata, a.untyped_storage()) for a in args if isinstance(a, torch.Tensor))

        for block in model.blocks:
            block.register_forward_pre_hook(enter)
            block.register_forward_hook(lambda block, args, out: inside.clear())
        c = {"none": None, "class": torch.zeros(batch, dtype=torch.int64),
             "text": torch.zeros(batch, config.length, config.text_dim, dtype=torch.float16) if config.text_dim else torch.zeros(batch, config.length, dtype=torch.int64)}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16), expensive:
            model(torch.zeros(batch, config.channels, config.size, config.size), torch.zeros(batch), c[config.condition])
        size = lambda storages: sum(s.nbytes() for s in storages.values())
        blocks = [size(p) for p in places[1:]]
        everything = size(places[0]) + sum(blocks)
        again = size(places[0] | entering) + max(blocks, default=0)     # one block at a time has all of its own
    return {"none": everything, "selective": min(again + expensive.bytes, everything), "block": again}


def how_many(sizes, room):
    """How many of the largest of these models (bytes each) fit into `room` bytes, at least one."""
    total, count = 0, 0
    for size in sorted(sizes, reverse=True):
        total += size
        if total > room:
            break
        count += 1
    return max(1, count)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def frozen(config, bf16):
    """The frozen networks of a run's config -> (bytes of their weights, bytes that they work in, words for those left out).

    Both are resident unless their work is cached; even then one GPU has the autoencoder, which draws samples.
    """
    text = config.data.condition == "text" and config.text.name != encoders.NONE["text"]
    names = [name.strip() for name in config.text.name.split(" + ")] if text else []
    latent = config.autoencoder.name != encoders.NONE["autoencoder"]
    sizes = [FROZEN.get(name) for name in [config.autoencoder.name] * latent + names]
    unknown = ""
    if None in sizes:
        try:
            sizes = encoders.frozen_parameters(config)
        except UserError as error:
            sizes = [size or 0 for size in sizes]
            unknown = f"; without some frozen networks, of which nothing is known ({error})"
    half = bf16 and config.text.precision != "fp32"
    # an autoencoder's are fp32 always
    weights = 4 * sum(sizes[:latent]) + sum(sizes[latent:]) * (2 if half else 4)
    # about four feature maps of Stable Diffusion's 128 channels at full resolution
    work = 4 * 128 * 4 * encoders.AT_ONCE if latent else 0
    return weights, work, unknown


class Memory:
    """Bytes that training the model of a ModelConfig takes on each of `world` GPUs.

    micro: images a forward pass; accumulating: a step has several of them; beside: bytes for something else, such as teachers or frozen
    networks; work: bytes that frozen networks work in, before the forward pass.
    """

    def __init__(self, config, bf16, beside=0, work=0):
        self.beside, self.work = beside, work
        two, three = kept(config, 2, bf16), kept(config, 3, bf16)
        self.image = {mode: three[mode] - two[mode] for mode in two}
        self.casts = two["none"] - 2 * self.image["none"]       # bf16 copies of the weights, which autocast makes and backward needs
        # token features in f16, as they come and with some of them dropped
        tokens = 2 * 2 * config.length * config.text_dim
        self.image = {mode: image + tokens for mode, image in self.image.items()}
        with torch.device("meta"):
            model = artifacts.build(config)
        self.parameters = parameters(model)
        self.gathered = self.parameters - parameters(model.blocks) + 2 * max(map(parameters, model.blocks), default=0)
        self.bf16 = bf16

    def fixed(self, sharded, world, accumulating):
        """{what: bytes} whatever the micro-batch."""
        P, W = self.parameters, world if sharded else 1
        # sharded: besides what is outside of blocks two of those are gathered at a time: weights, their gradients, and these in fp32 to be summed.
        # While micro-batches add up, all gradients are whole.
        copies = self.gathered * (8 if self.bf16 else 12) if sharded else self.casts
        gradients = 4 * P / (1 if accumulating else W)
        if accumulating and world > 1 and not sharded:
            # DDP has its buckets from the start; the first micro-batch of all, after which nothing is summed,
            # makes gradients beside them
            gradients += 4 * P
        return {"weights": 4 * P / W, "gradients": gradients, "AdamW": 8 * P / W, "average": 4 * P / W, "copies": copies}

    def total(self, sharded, world, micro, accumulating, mode):
        return self.beside + sum(self.fixed(sharded, world, accumulating).values()) + max(micro * self.image[mode], self.work)

    def configured(self, sharded, train, world, share):
        """The total as [train] has it, for a rank's share of the batch."""
        micro = min(train.micro_batch or share, share)
        return self.total(sharded, world, micro, micro < share, train.activation_checkpointing)

    def shards(self, train, world, share, memory):
        """Whether train.parallel means sharding, for a rank's share of the batch and bytes of memory."""
        return world > 1 and (train.parallel == "fsdp" or train.parallel == "auto" and self.configured(False, train, world, share) > USABLE * memory)

    def teachers(self, train, world, share, sizes, memory):
        """How many models of these sizes (bytes) fit beside the training as [train] has it, at least one.

        The student is sharded only where replicas leave no room for one.
        """
        parallel = train.parallel if world > 1 else "ddp"
        ways = {"ddp": [False], "fsdp": [True], "auto": [False, True]}[parallel]
        for sharded in ways:
            room = USABLE * memory - self.configured(sharded, train, world, share)
            if room >= max(sizes):
                return how_many(sizes, room)
        return 1

    def micro_batch(self, sharded, world, share, mode, memory):
        """The largest divisor of a rank's share of the batch that fits into `memory` bytes; 0 if none does."""
        fits = (m for m in range(share, 0, -1) if share % m == 0 and self.total(sharded, world, m, m < share, mode) <= USABLE * memory)
        return next(fits, 0)


def choose_parallel(config, train, ranks, share, bf16, beside):
    """-> (whether to shard the model over the ranks, one line that says why). share: images a rank and step; beside: as in Memory."""
    if ranks.world == 1:
        return False, ""
    memory, need = device_memory(ranks.device), Memory(config, bf16, beside)
    shard = broadcast(need.shards(train, ranks.world, share, memory))       # GPUs may differ by a few bytes; the ranks must not
    replicated, sharded = (need.configured(way, train, ranks.world, share) for way in (False, True))
    return shard, (f"{'sharded (FSDP2)' if shard else 'replicated (DDP)'} over {ranks.world} ranks, train.parallel = {train.parallel!r}: about {replicated / GB:.2g} GB "
                   f"a rank replicated, {sharded / GB:.2g} GB sharded, of {memory / GB:.3g} GB")


def days(seconds):
    return f"{seconds / 86400:.1f} days" if seconds > 2 * 86400 else f"{seconds / 3600:.1f} hours" if seconds > 2 * 3600 else f"{seconds / 60:.1f} minutes"


def report(name, config, train, batch, run_config, teachers=0, resident=-1):
    """Prints the plan of one training (rank 0), of the model of a ModelConfig.

    teachers: models of its size that it learns from, of which `resident` stay on each GPU (0: all, -1: as many as fit). UserError if the
    GPUs cannot share the batch.
    """
    settings = run_config.plan
    if os.environ.get("RANK", "0") != "0":
        return
    world = int(os.environ.get("WORLD_SIZE", settings.gpus))
    if batch % world:
        raise UserError(f"a batch of {batch} cannot be shared by {world} GPUs: change train.batch or --plan.gpus")
    if settings.gpu not in DEVICES:
        raise UserError(f"plan.gpu = {settings.gpu!r} is not one of {', '.join(map(repr, DEVICES))}")
    rates, share, bf16 = DEVICES[settings.gpu], batch // world, train.precision != "fp32"
    peak, memory = rates[0 if bf16 else 1] * 1e12, rates[2] * GB
    weights, work, unknown = frozen(run_config, bf16)
    need = Memory(config, bf16, weights, work)
    if teachers:
        each = need.parameters * 2      # in bf16, see ensemble.py
        if resident < 0:
            resident = need.teachers(train, world, share, [each] * teachers, memory)
        resident = min(resident or teachers, teachers)
        need.beside += resident * each
    with torch.device("meta"):
        model = artifacts.build(config)
    image_flops, tokens = (4 if teachers else 3) * model.flops(), sum(model.tokens())
    images = train.steps * batch
    print(f"{name}: {type(model).__name__} of {need.parameters / 1e6:.4g}M parameters; an image is {model.tokens()[0]} tokens + {model.tokens()[1]} of text, "
          f"{image_flops / 1e12:.4g} TFLOPs to train on ({model.flops() / 1e12:.4g} forward)")
    print(f"batch {batch} = {world} x {settings.gpu} x {share}; {train.steps:,} steps = {images / 1e6:.4g}M images = {images * tokens / 1e9:.4g}G tokens "
          f"= {images * image_flops:.3g} FLOPs")
    print(f"\nmemory in GB of the {rates[2]} of a {settings.gpu}, {USABLE:.0%} of which may be used; activations as in eager mode")
    if weights or unknown:
        print(f"of it {weights / GB:.3g} GB for frozen networks (less where their work is cached), which work in "
              f"{work / GB:.2g} GB before the model does{unknown}")
    if teachers:
        print(f"of it {resident * each / GB:.3g} GB for {resident} of {teachers} teachers")
    print("         activation     weights  gradients   AdamW  average  copies    an image's     micro-batch     in all\n"
          "         checkpointing                                              activations    that fits")
    for sharded in (False, True) if world > 1 else (False,):
        for mode in need.image:
            micro = need.micro_batch(sharded, world, share, mode, memory)
            chosen = mode == train.activation_checkpointing and sharded == need.shards(train, world, share, memory)
            parts = need.fixed(sharded, world, (micro or 1) < share)
            total = need.total(sharded, world, micro or 1, (micro or 1) < share, mode)
            print(f"{'*' if chosen else ' '}{'FSDP2' if sharded else 'DDP' if world > 1 else 'one':7s} {mode:12s}" + "".join(f"{parts[k] / GB:{w}.2f}" for k, w in zip(parts, (10, 11, 8, 9, 8)))
                  + f"{need.image[mode] / GB:14.3f}{micro or 'none':>16}{total / GB:11.1f}")
    print("* as configured (train.parallel, train.activation_checkpointing); auto shards only if replicas do not fit")
    staged = 16 * need.parameters       # weights, moments, average
    sharded = f"; sharded (FSDP2) to {staged / world / GB:.3g} GB" if world > 1 else ""
    print(f"host memory: a checkpoint is first copied to {staged / GB:.3g} GB of pinned memory for each GPU, "
          f"which is kept{sharded}")
    step = batch * image_flops / (world * peak * settings.mfu)
    print(f"\ntime: {step:.3g} s a step, {batch / step:.4g} images/s, {days(step * train.steps)} for {train.steps:,} steps at {settings.mfu:.0%} MFU of {peak / 1e12:.0f} TFLOP/s "
          f"({'bf16' if bf16 else 'TF32'}) a GPU")
    files = need.parameters * (4 + 8 + 4 + (2 if train.export == "bf16" else 4))
    print(f"a checkpoint and an export are {files / GB:.3g} GB: at 1 GB/s {files / 1e9:.0f} s. After SIGTERM a training needs that, the rest of its step, and as much again if it was "
          f"saving: give torchrun --shutdown-timeout {max(60, 60 * math.ceil((2 * files / 1e9 + 2 * step) / 60))} (torch 2.12 and later; otherwise it kills after 30 s, "
          "see README.md)")
    if settings.step_seconds:
        able = world * peak * settings.step_seconds
        print(f"a step of {settings.step_seconds:g} s on {world} x {settings.gpu}: {days(settings.step_seconds * train.steps)}; a batch of {batch} in that time is an MFU of {batch * image_flops / able:.1%}; "
              f"at {settings.mfu:.0%} MFU it is a batch of {settings.mfu * able / image_flops:.0f}")
