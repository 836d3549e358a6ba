"""How many images of the demo show the colour and the shape that their prompts name?

    python bench/check_shapes.py runs/demo/samples/demo       # a folder that sample.py wrote
    python bench/check_shapes.py --tars 'data/shapes/*.tar'   # the training images: its own error

Prompts are "a COLOUR SHAPE", or "a SHAPE", of which the shape alone is checked. Reads pixels and
prompts alone and shares no code with the drawing: the background is what the border shows most,
the figure what differs from it; its colour goes by hue, its shape by which of four masks overlaps
it best within its bounding box.
"""
import argparse
import collections
import colorsys
import glob
import io
import sys
import tarfile

import numpy as np
from PIL import Image

# degrees on the colour wheel
HUES = {"red": 0, "yellow": 55, "green": 125, "blue": 230, "purple": 280}


def figure(pixels):
    """[H,W,3] uint8 -> how much each pixel belongs to the figure, [H,W] in 0..1."""
    p = pixels.astype(float)
    border = np.concatenate([p[0], p[-1], p[:, 0], p[:, -1]])
    distance = np.abs(p - np.median(border, axis=0)).max(axis=2)
    return np.clip(distance / max(np.quantile(distance, 0.95), 40), 0, 1)


def name_colour(pixels, mask):
    """The colour of the figure's inside, by the median of its pixels; "none" where it is dark."""
    inside = mask > 0.8
    if not inside.any():
        return "none"
    r, g, b = np.median(pixels[inside], axis=0) / 255
    hue, saturation, value = colorsys.rgb_to_hsv(r, g, b)
    if value < 0.3:
        return "none"
    if saturation < 0.3:
        return "white"

    def degrees_from(name):
        return abs((hue * 360 - HUES[name] + 180) % 360 - 180)

    return min(HUES, key=degrees_from)


def name_shape(mask):
    """The shape whose ideal mask, in the figure's bounding box, overlaps it best.

    The overlap is the soft intersection over union; "none" where the figure has under nine pixels.
    """
    ys, xs = np.nonzero(mask > 0.5)
    if len(ys) < 9:
        return "none"
    box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    image = Image.fromarray(mask.astype(np.float32))
    m = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR, box=box))

    # the centres of the box's cells, in -1..1
    y, x = (np.mgrid[:24, :24] + 0.5) / 12 - 1
    ideal = {
        "circle":   x ** 2 + y ** 2 < 1,
        "square":   np.ones_like(x),
        "triangle": np.abs(x) < (y + 1) / 2,
        "cross":    np.minimum(np.abs(x), np.abs(y)) < 1 / 3,
    }

    def overlap(name):
        return np.minimum(m, ideal[name]).sum() / np.maximum(m, ideal[name]).sum()

    return max(ideal, key=overlap)


def named_in(prompt):
    """"a red circle" -> ("red", "circle"), "a circle" -> (None, "circle")."""
    *before, shape = prompt.split()
    words = [word for word in before if word not in ("a", "an")]
    return words[-1] if words else None, shape


def check(pixels, prompt):
    """-> (whether the colour is right, None where the prompt names none; whether the shape is)."""
    colour, shape = named_in(prompt)
    mask = figure(pixels)
    right_shape = name_shape(mask) == shape
    if colour is None:
        return None, right_shape
    return name_colour(pixels, mask) == colour, right_shape


def from_folder(folder):
    """Yields (pixels [H,W,3] uint8, prompt) of the images that sample.py wrote there."""
    for path in sorted(glob.glob(f"{glob.escape(folder)}/[0-9]*.png")):
        with Image.open(path) as image:
            yield np.asarray(image.convert("RGB")), image.text["prompt"]


def from_tars(pattern):
    """Yields (pixels [H,W,3] uint8, caption) of the samples of tars."""
    for path in sorted(glob.glob(pattern)):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        for name in files:
            if name.endswith(".png"):
                image = Image.open(io.BytesIO(files[name])).convert("RGB")
                yield np.asarray(image), files[name[:-3] + "txt"].decode()


def read_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", nargs="?", help="images with their prompts in them, as sample.py writes them")
    add("--tars", metavar="GLOB", help="captioned tars instead")
    add("--least", type=float, nargs=2, metavar=("COLOUR", "SHAPE"), default=(0, 0),
        help="exit 1 below these shares")
    args = parser.parse_args()
    if not (args.folder or args.tars):
        parser.error("give a folder or --tars")
    return args


def main():
    args = read_arguments()
    images = from_tars(args.tars) if args.tars else from_folder(args.folder)

    colours = []
    shapes = []
    wrong = collections.Counter()
    for pixels, prompt in images:
        colour, shape = check(pixels, prompt)
        shapes.append(shape)
        if colour is not None:
            colours.append(colour)
        if not shape:
            wrong[named_in(prompt)[1]] += 1
    if not shapes:
        sys.exit("no images found")

    right_shape = np.mean(shapes)
    # where no prompt names a colour, none is wrong
    right_colour = np.mean(colours) if colours else 1.0

    line = f"{len(shapes)} images: right shape {right_shape:.1%}"
    if wrong:
        line += f" (wrong: {', '.join(f'{n} {shape}' for shape, n in sorted(wrong.items()))})"
    line += f"; right colour {right_colour:.1%} of {len(colours)} whose prompt names one"
    print(line)
    if right_colour < args.least[0] or right_shape < args.least[1]:
        sys.exit(f"less than {args.least[0]:.0%} of colours and {args.least[1]:.0%} of shapes")


if __name__ == "__main__":
    main()
