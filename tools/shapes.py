"""Draws the demo set: captioned coloured shapes, as tar shards.

    python tools/shapes.py --out data/shapes --images 6000 --size 16

reads   nothing
writes  DIR/00000.tar, 00001.tar, ...: KEY.png with KEY.txt, the layout that img2dataset writes

Two captions in three name colour and shape ("a red circle"), one in three the shape alone
("a circle"): given that one, it is the noise that decides the colour, and so the expert.
Image i depends on --seed and i, on nothing else.
"""
import io
import math
import os
import sys

# `python tools/shapes.py` finds the repository's modules from any folder
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from PIL import Image, ImageDraw

from ddm.config import Parser, parse
from ddm.errors import UserError, script
from tools.to_tars import check_folder, write_shards

SHAPES = ("circle", "square", "triangle", "cross")

# red, green, blue in 0..255, before a little jitter
SHAPE_COLOURS = {
    "red":    (230,  30,  30),
    "green":  ( 30, 190,  50),
    "blue":   ( 40,  70, 235),
    "yellow": (240, 220,  30),
    "purple": (150,  40, 200),
    "white":  (245, 245, 245),
}

# share of the captions that name the shape alone
SHAPE_ALONE = 1 / 3


def draw_shape(rng, size):
    """One captioned image of size x size pixels: -> (PIL image, caption)."""
    # the order of these draws is part of the data set: a new one belongs at the end
    colour = rng.choice(list(SHAPE_COLOURS))
    shape = rng.choice(SHAPES)

    # eight times too large, so that edges are smooth
    big = 8 * size
    r = big * rng.uniform(0.26, 0.42)
    x, y = rng.uniform(r, big - r, 2)

    # dark, so that every colour stands out from it
    background = rng.integers(0, 50, 3)
    fill = np.array(SHAPE_COLOURS[colour]) + rng.integers(-10, 11, 3)
    fill = tuple(fill.clip(0, 255).tolist())

    image = Image.new("RGB", (big, big), tuple(background.tolist()))
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill)
    elif shape == "square":
        draw.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill)
    else:
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill)
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill)
    image = image.resize((size, size), Image.Resampling.BOX)

    # the last number drawn: the image is the same whatever its caption names
    if rng.random() < SHAPE_ALONE:
        return image, f"a {shape}"
    return image, f"a {colour} {shape}"


def draw_samples(images, size, seed):
    """Yields (key, {extension: payload}) of the demo set."""
    for i in range(images):
        image, caption = draw_shape(np.random.default_rng([seed, i]), size)
        png = io.BytesIO()
        image.save(png, "PNG")
        yield f"{i:09d}", {"png": png.getvalue(), "txt": caption.encode()}


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder for the tars")
    add("--images", type=int, default=6000, metavar="N", help="images to draw (default: 6000)")
    add("--size", type=int, default=32, metavar="S", help="pixels a side (default: 32)")
    add("--seed", type=int, default=0, metavar="N", help="default: 0")
    add("--per-tar", type=int, default=1000, metavar="N", help="images a tar (default: 1000)")
    args, _ = parse(parser)

    if min(args.images, args.size, args.per_tar) < 1 or args.seed < 0:
        raise UserError(f"--images {args.images}, --size {args.size} and --per-tar {args.per_tar} "
                        f"must be at least 1, --seed {args.seed} at least 0")
    # a second call with the same number of images may replace the first one's
    check_folder(args.out, tars=math.ceil(args.images / args.per_tar))

    samples = draw_samples(args.images, args.size, args.seed)
    written = write_shards(args.out, samples, args.per_tar, total=args.images)
    print(f"{written.images} images in {args.out}")


if __name__ == "__main__":
    script(main)
