"""How fast the frozen networks run: images/s of feature extraction and of encoding, with random
weights of the published shapes.

    python bench/frozen.py                                      # on the best device there is
    python bench/frozen.py --device cpu --images 8 --batch 4    # a CPU, in a minute or so

DINOv2-large and Stable Diffusion's autoencoder. Images are drawn, 256 pixels, and go in decoded:
the networks' own speed, with the resizing and the transfers around them.
"""
import argparse
import os
import sys
import tempfile
import time

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from estimate import published  # noqa: E402

from data import square, to_float  # noqa: E402
from ddm import encoders  # noqa: E402
from ddm.config import make_config  # noqa: E402
from tools.shapes import draw_shape  # noqa: E402

DINOV2 = "facebook/dinov2-large"
VAE = "stabilityai/sd-vae-ft-mse"
SIDE = 256


def make_networks(folder):
    """Writes both networks with random weights to FOLDER/NAME."""
    for name in (DINOV2, VAE):
        network = published(name)[0].to_empty(device="cpu")
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(std=0.02)
        network.save_pretrained(os.path.join(folder, name))


def measure(what, run, images, batch):
    """Prints how fast `run` is on batches of images."""
    # warm up
    run(images[:batch])
    begin = time.perf_counter()
    for first in range(0, len(images), batch):
        run(images[first:first + batch])
    seconds = time.perf_counter() - begin
    print(f"{what}: {len(images) / seconds:.1f} images/s ({len(images)} in batches of {batch})",
          flush=True)


def measure_features(folder, precision, device, images, batch):
    config = make_config({
        "features.name": os.path.join(folder, DINOV2),
        "features.batch": batch,
        "features.precision": precision,
    })
    found = encoders.image_features(config.features, device)

    def run(images):
        found.features([found.prepare(image) for image in images])

    measure(f"DINOv2-large features, {precision}", run, images, batch)


def measure_encoding(folder, precision, device, images, batch):
    autoencoder = encoders.Autoencoder(os.path.join(folder, VAE), device, precision)

    def run(images):
        x = torch.from_numpy(np.stack([square(image, SIDE) for image in images]))
        mean, _ = autoencoder.encode(to_float(x.to(device)))
        mean.cpu()

    measure(f"sd-vae encoding of {SIDE} x {SIDE}, {precision}", run, images, batch)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()

    device = torch.device(args.device)
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        # as process.start does
        torch.set_float32_matmul_precision("high")
        name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}")

    drawn = [draw_shape(np.random.default_rng(i), SIDE)[0] for i in range(8)]
    images = [drawn[i % 8] for i in range(args.images)]
    with tempfile.TemporaryDirectory() as folder:
        make_networks(folder)
        for precision in ("bf16", "fp32"):
            measure_features(folder, precision, device, images, args.batch)
            measure_encoding(folder, precision, device, images, args.batch)


if __name__ == "__main__":
    main()
