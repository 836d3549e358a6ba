"""Do two models make the same image of the same noise?

    python evaluate.py --run-dir RUN --data ... --npz
    python bench/equal_noise.py RUN/evaluation/monolith.npz RUN/evaluation/ensemble-top-1.npz \\
        equal_noise.png

Figure 5 of the paper: a DDM and its monolith learn the same flow. Correlation over the pixels of
pairs of images, from equal noise and from different noise (of the same class, where there are
classes), also with the mean image of the class subtracted, so that what all of it share counts for
nothing; and a sheet of pairs and their averages.
"""
import argparse
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from ddm.pictures import image_grid

SHOWN = 10


def correlation(a, b):
    """Of each pair of rows [N,P] -> [N]."""
    a = a - a.mean(1, keepdims=True)
    b = b - b.mean(1, keepdims=True)
    norm = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return (a * b).sum(1) / np.maximum(norm, 1e-12)


def average(a, b):
    return ((a.astype(int) + b) // 2).astype(np.uint8)


def read(first_path, second_path):
    """-> (images [N,S,S,3] of each, classes [N], zeros where there are none)."""
    first = np.load(first_path)
    second = np.load(second_path)
    a = first["arr_0"]
    b = second["arr_0"]
    classes = np.zeros(len(a), int)
    same = a.shape == b.shape
    if same and "arr_1" in first:
        classes = first["arr_1"]
        same = np.array_equal(classes, second["arr_1"])
    if not same:
        sys.exit(f"error: {first_path} and {second_path} are not of the same noise and conditions: "
                 f"make both in one call of evaluate.py")
    return a, b, classes


def next_of_class(classes):
    """For each image another one of its class [N]: different noise, the same condition."""
    other = np.arange(len(classes))
    for c in set(classes.tolist()):
        members = np.flatnonzero(classes == c)
        if len(members) < 2:
            sys.exit(f"error: one image of class {c}: evaluate with more --samples")
        other[members] = np.roll(members, 1)
    return other


def without_mean(x, classes):
    """Rows [N,P] less the mean of their class."""
    x = x.copy()
    for c in set(classes.tolist()):
        x[classes == c] -= x[classes == c].mean(0)
    return x


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("out")
    args = parser.parse_args()

    a, b, classes = read(args.first, args.second)
    other = next_of_class(classes)
    flat_a = a.reshape(len(a), -1).astype(float)
    flat_b = b.reshape(len(b), -1).astype(float)
    pairs = {
        "as they are": (flat_a, flat_b),
        "without the class's mean image": (without_mean(flat_a, classes),
                                           without_mean(flat_b, classes)),
    }
    print(f"{len(a)} pairs, correlation over pixels, mean (standard deviation over pairs):")
    for what, (x, y) in pairs.items():
        equal = correlation(x, y)
        different = correlation(x, y[other])
        print(f"  {what:33s} equal noise {equal.mean():.3f} ({equal.std():.3f}), "
              f"different noise {different.mean():.3f} ({different.std():.3f})")

    shown = np.linspace(0, len(a) - 1, SHOWN).astype(int)
    first, second = (os.path.splitext(os.path.basename(path))[0]
                     for path in (args.first, args.second))
    rows = {
        first: a[shown],
        f"{second}, equal noise": b[shown],
        "average of these two": average(a[shown], b[shown]),
        f"{second}, different noise": b[other[shown]],
        "average with the first": average(a[shown], b[other[shown]]),
    }
    image_grid(list(rows.values()), list(rows)).save(args.out)
    print(f"pairs and averages in {args.out}")


if __name__ == "__main__":
    main()
