"""How fast the frozen networks run: images/s of feature extraction and of encoding, with random weights of the published shapes.

    python bench/frozen.py                                        # DINOv2-large and Stable Diffusion's autoencoder, on the best device there is
    python bench/frozen.py --device cpu --images 8 --batch 4      # a CPU, in a minute or so

Pictures are drawn, 256 pixels, and go in decoded: the networks' own speed, with the resizing and the transfers around them.
"""
import argparse
import os
import sys
import tempfile
import time

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from ddm.config import make_config
from data import draw_shape, square, to_float
from estimate import published
from ddm import encoders


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")      # as common.start does
    drawn = [draw_shape(np.random.default_rng(i), 256)[0] for i in range(8)]
    pictures = [drawn[i % 8] for i in range(args.images)]
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU, %d threads' % torch.get_num_threads()}, torch {torch.__version__}")

    def measure(what, run):
        run(pictures[:args.batch])      # warm up
        begin = time.perf_counter()
        for first in range(0, args.images, args.batch):
            run(pictures[first:first + args.batch])
        seconds = time.perf_counter() - begin
        print(f"{what}: {args.images / seconds:.1f} images/s ({args.images} in batches of {args.batch})", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for name in ("facebook/dinov2-large", "stabilityai/sd-vae-ft-mse"):
            network = published(name)[0].to_empty(device="cpu")
            with torch.no_grad():
                for p in network.parameters():
                    p.normal_(std=0.02)
            network.save_pretrained(os.path.join(folder, name))
        for precision in ("bf16", "fp32"):
            config = make_config({"features.name": os.path.join(folder, "facebook/dinov2-large"), "features.batch": args.batch,
                                  "features.precision": precision})
            prepare, features, _ = encoders.image_features(config.features, device)
            measure(f"DINOv2-large features, {precision}", lambda images: features([prepare(image) for image in images]))
            latent = encoders.autoencoder(os.path.join(folder, "stabilityai/sd-vae-ft-mse"), device, precision)

            def encode(images):
                x = torch.from_numpy(np.stack([square(image, 256) for image in images]))
                return latent.encode(to_float(x.to(device)))[0].cpu()

            measure(f"sd-vae encoding of 256 x 256, {precision}", encode)


if __name__ == "__main__":
    main()
