"""How many samples of the demo show the colour and the shape that their prompts name?

    python bench/check_shapes.py runs/demo/samples/final          # a folder that sample.py wrote
    python bench/check_shapes.py --tars 'data/shapes/*.tar'       # the same check on the training pictures: its own error

Reads pixels and prompts alone and shares no code with the drawing: the background is what the border shows most, the figure what
differs from it; its colour goes by hue, its shape by which of four masks overlaps it best within its bounding box.
"""
import argparse
import colorsys
import glob
import io
import sys
import tarfile

import numpy as np
from PIL import Image

HUES = {"red": 0, "yellow": 55, "green": 125, "blue": 230, "purple": 280}      # degrees


def figure(pixels):
    """[H,W,3] uint8 -> how much each pixel belongs to the figure [H,W] in 0..1."""
    p = pixels.astype(float)
    border = np.concatenate([p[0], p[-1], p[:, 0], p[:, -1]])
    distance = np.abs(p - np.median(border, axis=0)).max(axis=2)
    return np.clip(distance / max(np.quantile(distance, 0.95), 40), 0, 1)


def name_colour(pixels, mask):
    """The colour of the figure's inside."""
    r, g, b = np.median(pixels[mask > 0.8], axis=0) / 255 if (mask > 0.8).any() else (0, 0, 0)
    hue, saturation, value = colorsys.rgb_to_hsv(r, g, b)
    if value < 0.3:
        return "none"
    if saturation < 0.3:
        return "white"
    return min(HUES, key=lambda name: abs((hue * 360 - HUES[name] + 180) % 360 - 180))


def name_shape(mask):
    """The shape whose ideal mask, in the figure's bounding box, has the largest overlap with it (soft intersection over union)."""
    ys, xs = np.nonzero(mask > 0.5)
    if len(ys) < 9:
        return "none"
    box = Image.fromarray(mask.astype(np.float32)).resize((24, 24), Image.Resampling.BILINEAR,
                                                          box=(xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    m = np.asarray(box)
    y, x = (np.mgrid[:24, :24] + 0.5) / 12 - 1
    ideal = {"circle": x ** 2 + y ** 2 < 1, "square": x == x, "triangle": np.abs(x) < (y + 1) / 2,
             "cross": np.minimum(np.abs(x), np.abs(y)) < 1 / 3}
    return max(ideal, key=lambda name: np.minimum(m, ideal[name]).sum() / np.maximum(m, ideal[name]).sum())


def check(pixels, prompt):
    """-> (colour is right, shape is right), for a prompt that ends in 'COLOUR SHAPE'."""
    colour, shape = prompt.split()[-2:]
    mask = figure(pixels)
    return name_colour(pixels, mask) == colour, name_shape(mask) == shape


def from_folder(folder):
    for path in sorted(glob.glob(f"{glob.escape(folder)}/[0-9]*.png")):
        with Image.open(path) as image:
            yield np.asarray(image.convert("RGB")), image.text["prompt"]


def from_tars(pattern):
    for path in sorted(glob.glob(pattern)):
        with tarfile.open(path) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar}
        for name in files:
            if name.endswith(".png"):
                yield np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB")), files[name[:-3] + "txt"].decode()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="pictures with their prompts in them, as sample.py writes them")
    parser.add_argument("--tars", help="captioned tars instead")
    parser.add_argument("--least", type=float, nargs=2, metavar=("COLOUR", "SHAPE"), default=(0, 0), help="exit 1 below these shares")
    args = parser.parse_args()
    if not (args.folder or args.tars):
        parser.error("give a folder or --tars")
    results, wrong = [], {}
    for pixels, prompt in from_tars(args.tars) if args.tars else from_folder(args.folder):
        results.append(check(pixels, prompt))
        if not results[-1][1]:
            wrong[prompt.split()[-1]] = wrong.get(prompt.split()[-1], 0) + 1
    if not results:
        sys.exit("no pictures found")
    colour, shape = np.mean(results, axis=0)
    print(f"{len(results)} pictures: right colour {colour:.1%}, right shape {shape:.1%}"
          + (f" (wrong: {', '.join(f'{n} {s}' for s, n in sorted(wrong.items()))})" if wrong else ""))
    sys.exit(int(colour < args.least[0] or shape < args.least[1]))


if __name__ == "__main__":
    main()
