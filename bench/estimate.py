"""Disk and time of a real recipe, computed from its config before anything is downloaded.

    python bench/estimate.py configs/imagenet.toml --images 1281167 --image-bytes 115e3
    python bench/estimate.py configs/laion.toml --images 153.6e6 --image-bytes 30e3 \\
        --other-bytes 2560 --tokens 20

The tables of docs/recipes.md are from here. Bytes: as the stages write them. FLOPs: of the frozen
networks by torch's counter, on the meta device, from their published shapes (no weights, no network
needed); of the models by ddm/plan.py. Time: FLOPs over a rate a GPU that you state.
"""
import argparse
import functools
import os
import sys
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from ddm import plan
from ddm.config import make_config, model_config, read_toml
from ddm.encoders import NONE

TB = 1e12
CLIP = {
    "openai/clip-vit-large-patch14": dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": dict(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
        hidden_act="gelu", projection_dim=1280),
}
T5_XL = dict(d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32,
             feed_forward_proj="gated-gelu")
DINOV2_LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                    image_size=518, patch_size=14)
STABLE_DIFFUSION = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=256,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)


def published(name):
    """(network on the meta device, what calls it once) for the names in configs/."""
    import transformers
    from diffusers import AutoencoderKL

    ids = torch.zeros(1, 77, dtype=torch.int64, device="meta")
    with torch.device("meta"):
        if name == "facebook/dinov2-large":
            network = transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2_LARGE))
            return network, lambda: network(torch.zeros(1, 3, 224, 224))
        if name == "stabilityai/sd-vae-ft-mse":
            network = AutoencoderKL(**STABLE_DIFFUSION)
            return network, lambda: network.encode(torch.zeros(1, 3, 256, 256))
        if name in CLIP:
            network = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP[name]))
            return network, lambda: network(input_ids=ids)
        if name == "google/t5-v1_1-xl":
            network = transformers.T5EncoderModel(transformers.T5Config(**T5_XL))
            return network, lambda: network(input_ids=ids)
    sys.exit(f"error: the shape of {name} is not written down in bench/estimate.py: add it there, "
             f"or give the hub's name of one that is")


@functools.cache
def width(name):
    """Width of the features that a network gives."""
    return published(name)[0].config.hidden_size


@functools.cache
def frozen_flops(name):
    """FLOPs of a frozen network on one image or caption."""
    if name in ("pixels", "words", ""):
        return 0
    _, call = published(name)
    counter = FlopCounterMode(display=False)
    # attention in the one backend that the counter sees
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad(), torch.device("meta"):
        call()
    return counter.get_total_flops()


@dataclass
class Shape:
    """What model_config asks of a Space."""
    size: int
    channels: int
    text_dim: int


def in_tar(size):
    """Bytes that a file takes in a tar: a header, and blocks of 512."""
    return 512 + -(-size // 512) * 512


def text_encoders(config):
    """The names of a config's pretrained text encoders."""
    if config.data.condition != "text" or config.text.name == NONE["text"]:
        return []
    return config.text.name.split(" + ")


def make_shape(config):
    """The Shape of a config's images and captions, without any network."""
    factor, channels = plan.AUTOENCODERS[config.autoencoder.name]
    text_dim = sum(width(name) for name in text_encoders(config))
    return Shape(config.data.size // factor, channels, text_dim)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--images", type=float, required=True)
    parser.add_argument("--image-bytes", type=float, required=True,
                        help="of an image as downloaded, on average")
    parser.add_argument("--other-bytes", type=float, default=1024,
                        help="of a sample's other members, with their headers: a class or caption "
                        "takes 1024 (the default), img2dataset's JSON some 1500 more")
    parser.add_argument("--tokens", type=float, default=20,
                        help="of a caption, on average (default: 20)")
    parser.add_argument("--tflops", type=float, default=400,
                        help="sustained by one GPU, in 1e12 a second (default: 400)")
    parser.add_argument("--gpus", type=int, default=8, help="of a node (default: 8)")
    return parser.parse_args()


def print_disk(args, config, shape):
    """Bytes on the node that clusters, on an expert's and on the router's."""
    K = config.cluster.experts
    N = args.images
    flips = 2 if config.data.flip else 1
    in_router = min(N, config.cluster.router_images)

    # bytes of a sample
    image = in_tar(args.image_bytes) + args.other_bytes
    latents = 0
    if config.autoencoder.name != NONE["autoencoder"]:
        # mean and deviation in f16, of the image and of its mirror image
        values = 2 * shape.channels * shape.size ** 2
        latents = in_tar(flips * values * 2) + args.other_bytes
    tokens = 0
    if text_encoders(config):
        tokens = in_tar(args.tokens * shape.text_dim * 2)
    # f16, with offset and length in the tar
    features = 256 if config.features.name == "pixels" else width(config.features.name)
    features = 2 * features + 16

    rows = [
        ("images as downloaded", N * image, 0, 0),
        ("shards, all / its own / router",
         (N + in_router) * image, N / K * image, in_router * image),
        ("features", N * features, 0, 0),
        (f"latents, {latents / 1e3:.4g} kB an image", 0, N / K * latents, in_router * latents),
        (f"token features, {tokens / 1e3:.4g} kB", 0, N / K * tokens, in_router * tokens),
    ]
    print("disk, TB                         clustering node   expert's node (on average)   "
          "router's node")
    for what, clustering, expert, router in rows:
        print(f"{what:32s} {clustering / TB:12.3f} {expert / TB:20.3f} {router / TB:22.3f}")


def print_compute(args, config, shape):
    """FLOPs and hours of what is done once, of an expert and of the router."""
    K = config.cluster.experts
    N = args.images
    flips = 2 if config.data.flip else 1
    train = config.train
    expert = model_config(config, "model", shape)
    router = model_config(config, "router", shape, K)

    # FLOPs of an image or a caption
    features = frozen_flops(config.features.name)
    encode = frozen_flops(config.autoencoder.name)
    captions = sum(frozen_flops(name) for name in text_encoders(config))
    step = 3 * plan.flops(expert)
    fly = step + encode + captions
    # images that an expert trains on
    images = train.steps * train.batch / K

    rows = [
        ("features (DINOv2), once", features * N, f"{features / 1e9:.0f} GFLOPs an image"),
        ("latents of an expert's shard, once", encode * N / K * flips,
         f"{encode / 1e9:.0f} GFLOPs an image, {flips} of each"),
    ]
    if captions:
        rows.append(("captions of an expert's shard, once", captions * N / K,
                     f"{captions / 1e9:.0f} GFLOPs a caption"))
    rows += [
        (f"an expert, {train.steps} steps of {train.batch // K}", step * images,
         f"{step / 1e9:.0f} GFLOPs an image, {plan.parameter_count(expert) / 1e6:.0f}M parameters"),
        ("the same, images encoded on the fly", fly * images, f"{fly / step:.2f} times as much"),
        ("the router, 4% of the experts", 0.04 * step * images * K,
         f"{3 * plan.flops(router) / 1e9:.0f} GFLOPs an image, "
         f"{plan.parameter_count(router) / 1e6:.0f}M parameters"),
    ]
    print("compute                                      EFLOPs    hours on a node")
    for what, total, note in rows:
        hours = total / (args.gpus * args.tflops * 1e12) / 3600
        print(f"{what:40s} {total / 1e18:10.1f} {hours:14.2f}    {note}")


def main():
    args = parse()
    config = make_config(read_toml(args.config))
    shape = make_shape(config)

    print(f"{args.config}: {args.images / 1e6:.4g}M images of {args.image_bytes / 1e3:.4g} kB on "
          f"average, {config.cluster.experts} nodes of {args.gpus} GPUs at {args.tflops:g} TFLOP/s "
          f"each\n")
    print_disk(args, config, shape)
    print()
    print_compute(args, config, shape)


if __name__ == "__main__":
    main()
