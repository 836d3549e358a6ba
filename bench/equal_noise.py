"""Do two models make the same picture of the same noise? (Figure 5 of the paper: a DDM and its monolith learn the same flow.)

    python evaluate.py --run-dir RUN --data ... --npz
    python bench/equal_noise.py RUN/evaluation/monolith.npz RUN/evaluation/ensemble-top-1.npz equal_noise.png

Correlation over the pixels of pairs of pictures, from equal noise and from different noise (of the same class, where there are classes), also with the
mean picture of the class subtracted, so that what all of it share counts for nothing; and a picture of pairs and their averages.
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
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    return (a * b).sum(1) / np.maximum(np.sqrt((a * a).sum(1) * (b * b).sum(1)), 1e-12)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("out")
    args = parser.parse_args()
    first, second = np.load(args.first), np.load(args.second)
    a, b = first["arr_0"], second["arr_0"]
    classes = first["arr_1"] if "arr_1" in first else np.zeros(len(a), int)
    if a.shape != b.shape or "arr_1" in first and not np.array_equal(classes, second["arr_1"]):
        sys.exit(f"error: {args.first} and {args.second} are not of the same noise and conditions: make both in one call of evaluate.py")
    other = np.arange(len(a))       # for each picture the next one of its class: different noise, the same condition
    for c in set(classes.tolist()):
        members = np.flatnonzero(classes == c)
        if len(members) < 2:
            sys.exit(f"error: one picture of class {c}: draw more --samples")
        other[members] = np.roll(members, 1)
    flat = [x.reshape(len(x), -1).astype(float) for x in (a, b)]
    centred = []
    for x in flat:
        means = {c: x[classes == c].mean(0) for c in set(classes.tolist())}
        centred.append(x - np.stack([means[c] for c in classes.tolist()]))
    print(f"{len(a)} pairs, correlation over pixels, mean (standard deviation over pairs):")
    for what, (x, y) in (("as they are", flat), ("without the class's mean picture", centred)):
        equal, different = correlation(x, y), correlation(x, y[other])
        print(f"  {what:33s} equal noise {equal.mean():.3f} ({equal.std():.3f}), different noise {different.mean():.3f} ({different.std():.3f})")
    shown = np.linspace(0, len(a) - 1, SHOWN).astype(int)
    average = lambda x, y: ((x.astype(int) + y) // 2).astype(np.uint8)
    rows = [a[shown], b[shown], average(a[shown], b[shown]), b[other[shown]], average(a[shown], b[other[shown]])]
    names = [os.path.splitext(os.path.basename(path))[0] for path in (args.first, args.second)]
    image_grid(rows, [names[0], f"{names[1]}, equal noise", "average of these two", f"{names[1]}, different noise", "average with the first"]).save(args.out)
    print(f"pairs and averages in {args.out}")


if __name__ == "__main__":
    main()
