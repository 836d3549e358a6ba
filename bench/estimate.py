"""Disk and time of a real recipe, computed from its config before anything is downloaded: what the README's tables say.

    python bench/estimate.py configs/imagenet.toml --images 1281167 --image-bytes 115e3
    python bench/estimate.py configs/laion.toml --images 153.6e6 --image-bytes 30e3 --other-bytes 2560 --tokens 20

Bytes: as the stages write them. FLOPs: of the frozen networks by torch's counter, on the meta device, from their published shapes (no
weights, no network needed); of the models by their own formula. Time: FLOPs over a rate a GPU that you state.
"""
import argparse
import os
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import training
from ddm.config import make_config, read_toml
from ddm import artifacts

CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
CLIP_BIGG = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu", projection_dim=1280)
STABLE_DIFFUSION = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=256,
                        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)


def published(name):
    """(network on the meta device, what it is called with) for the names in configs/."""
    import transformers as t
    from diffusers import AutoencoderKL
    ids = torch.zeros(1, 77, dtype=torch.int64, device="meta")
    with torch.device("meta"):
        if name == "facebook/dinov2-large":
            network = t.Dinov2Model(t.Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14))
            return network, lambda: network(torch.zeros(1, 3, 224, 224))
        if name == "stabilityai/sd-vae-ft-mse":
            network = AutoencoderKL(**STABLE_DIFFUSION)
            return network, lambda: network.encode(torch.zeros(1, 3, 256, 256))
        if name in ("openai/clip-vit-large-patch14", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"):
            network = t.CLIPTextModel(t.CLIPTextConfig(**CLIP_L if name.startswith("openai") else CLIP_BIGG))
            return network, lambda: network(input_ids=ids)
        if name == "google/t5-v1_1-xl":
            network = t.T5EncoderModel(t.T5Config(d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu"))
            return network, lambda: network(input_ids=ids)
    sys.exit(f"error: the shape of {name} is not written down in bench/estimate.py: add it there, or give the hub's name of one that is")


def flops(name):
    if name in ("pixels", "words", ""):
        return 0
    network, call = published(name)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad(), torch.device("meta"):
        call()
    return counter.get_total_flops()


class Shape:
    """What training.model_config asks of a Space, for pixels or Stable Diffusion's autoencoder."""

    def __init__(self, config, text_dim):
        latent = config.autoencoder.name != ""
        self.size, self.channels, self.text_dim = config.data.size // (8 if latent else 1), 4 if latent else 3, text_dim


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--images", type=float, required=True)
    parser.add_argument("--image-bytes", type=float, required=True, help="of a picture as downloaded, on average")
    parser.add_argument("--other-bytes", type=float, default=1024, help="of a sample's other members, with their headers: a class or caption "
                        "takes 1024 (the default), img2dataset's JSON some 1500 more")
    parser.add_argument("--tokens", type=float, default=20, help="of a caption, on average (default: 20)")
    parser.add_argument("--tflops", type=float, default=400, help="sustained by one GPU, in 1e12 a second (default: 400)")
    parser.add_argument("--gpus", type=int, default=8, help="of a node (default: 8)")
    args = parser.parse_args()
    config = make_config(read_toml(args.config))
    K, N, text = config.cluster.experts, args.images, config.data.condition == "text"
    names = config.text.name.split(" + ") if text and config.text.name != "words" else []
    space = Shape(config, sum(published(name)[0].config.hidden_size for name in names))
    with torch.device("meta"):
        expert = artifacts.build(training.model_config(config, "model", space))
        router = artifacts.build(training.model_config(config, "router", space, K))
    in_tar = lambda size: 512 + -(-size // 512) * 512
    flips = 1 + config.data.flip
    latents = in_tar(flips * 2 * space.channels * space.size ** 2 * 2) + args.other_bytes if config.autoencoder.name else 0
    tokens = in_tar(args.tokens * space.text_dim * 2) if names else 0
    picture = in_tar(args.image_bytes) + args.other_bytes
    in_router = min(N, config.cluster.router_images)
    TB = 1e12
    print(f"{args.config}: {N / 1e6:.4g}M pictures of {args.image_bytes / 1e3:.4g} kB on average, {K} nodes of {args.gpus} GPUs at {args.tflops:g} TFLOP/s each\n")
    print("disk, TB                         clustering node   expert's node (on average)   router's node")
    for what, a, b, c in (("pictures as downloaded", N * picture, 0, 0), ("shards, all / its own / router", (N + in_router) * picture, N / K * picture, in_router * picture),
                          ("features", N * (2 * (256 if config.features.name == "pixels" else published(config.features.name)[0].config.hidden_size) + 16), 0, 0), (f"latents, {latents / 1e3:.4g} kB a picture", 0, N / K * latents, in_router * latents),
                          (f"token features, {tokens / 1e3:.4g} kB", 0, N / K * tokens, in_router * tokens)):
        print(f"{what:32s} {a / TB:12.3f} {b / TB:20.3f} {c / TB:22.3f}")
    train, batch = config.train, config.train.batch
    rows = [("features (DINOv2), once", flops(config.features.name) * N, f"{flops(config.features.name) / 1e9:.0f} GFLOPs a picture"),
            ("latents of an expert's shard, once", flops(config.autoencoder.name) * N / K * flips, f"{flops(config.autoencoder.name) / 1e9:.0f} GFLOPs a picture, {flips} of each")]
    if names:
        rows.append(("captions of an expert's shard, once", sum(map(flops, names)) * N / K, f"{sum(map(flops, names)) / 1e9:.0f} GFLOPs a caption"))
    images = train.steps * batch / K
    step = 3 * expert.flops()
    frozen = flops(config.autoencoder.name) + sum(map(flops, names))
    rows += [(f"an expert, {train.steps} steps of {batch // K}", step * images,
              f"{step / 1e9:.0f} GFLOPs a picture, {sum(p.numel() for p in expert.parameters()) / 1e6:.0f}M parameters"),
             ("the same, pictures encoded on the fly", (step + frozen) * images, f"{(step + frozen) / step:.2f} times as much"),
             ("the router, 4% of the experts", 0.04 * step * images * K, f"{3 * router.flops() / 1e9:.0f} GFLOPs a picture, "
              f"{sum(p.numel() for p in router.parameters()) / 1e6:.0f}M parameters")]
    print("\ncompute                                      EFLOPs    hours on a node")
    for what, total, note in rows:
        print(f"{what:40s} {total / 1e18:10.1f} {total / (args.gpus * args.tflops * 1e12) / 3600:14.2f}    {note}")


if __name__ == "__main__":
    main()
