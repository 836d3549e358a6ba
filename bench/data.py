"""Does the data keep up? Samples a second and core of our reader beside webdataset's, over the same
tars; and what an index of 20 million samples costs.

    python bench/data.py --tars 'data/laion/*.tar' --size 256
    python bench/data.py
    python bench/data.py --index 20e6

The first reads your own images (the recipes have JPEGs of some 512 pixels); the second draws JPEGs
of 512 pixels, decoded at 256, and latents of 4 x 32 x 32; the third measures the start-up time and
the memory of the index, of the main process and of a worker.

One process and one thread, no worker processes, the sides in turn. Both shuffle. Images: both
decode to the same square at the same size and filter (Lanczos), mirror half, and return tensors;
ours also draws time and noise. Latents: once read alone (a tensor of mean and deviation, and the
caption), once with what a step needs (a sample of the posterior, time, noise), drawn by torch on
both sides. webdataset's is its documented pipeline: shards shuffled, a buffer of 1,000 samples,
.decode("pil"), .to_tuple, .map. A ratio is the median over turns, with its range.
"""
import argparse
import glob
import io
import itertools
import os
import statistics
import sys
import tempfile
import time

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data import INDEX_COLUMNS, INDEX_VERSION, TarDataset  # noqa: E402
from ddm.tars import TarWriter  # noqa: E402
from tools.shapes import draw_shape  # noqa: E402

IMAGES = "images"
LATENTS = "latents"
TRAINING = "latents, posterior and noise"
LATENT_SHAPE = (4, 32, 32)


# ---- what is read --------------------------------------------------------------------------------

def draw_images(folder, count, size, per_tar=250):
    """JPEGs with the detail of photographs: shapes over smooth colour and grain."""
    rng = np.random.default_rng(0)
    for first in range(0, count, per_tar):
        with TarWriter(os.path.join(folder, f"{first:05d}.tar")) as tar:
            for i in range(first, min(count, first + per_tar)):
                colours = Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8))
                smooth = colours.resize((size, size), Image.Resampling.BICUBIC)
                shape, caption = draw_shape(rng, size)
                pixels = 0.6 * np.asarray(smooth, float) + 0.3 * np.asarray(shape, float)
                pixels += rng.normal(0, 6, (size, size, 3))

                out = io.BytesIO()
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(out, "JPEG", quality=90)
                tar.add(f"{i:08d}.jpg", out.getvalue())
                tar.add(f"{i:08d}.txt", caption.encode())


def draw_latents(folder, count, per_tar=2500):
    rng = np.random.default_rng(0)
    for first in range(0, count, per_tar):
        with TarWriter(os.path.join(folder, f"{first:05d}.tar")) as tar:
            for i in range(first, min(count, first + per_tar)):
                latents = rng.standard_normal((1, 2, *LATENT_SHAPE), np.float32)
                tar.add(f"{i:08d}.lat", latents.astype(np.float16).tobytes())
                tar.add(f"{i:08d}.txt", b"a red circle")


# ---- the two sides -------------------------------------------------------------------------------

def ours(tars, size, what):
    options = {"flip": True} if what == IMAGES else {"posterior": True, "latent": (1, 2, 4, 32, 32)}
    reader = TarDataset(tars, size, "text", encode=None, noise_shape=LATENT_SHAPE, **options)
    for position in itertools.count():
        if what == LATENTS:
            yield reader.sample(reader.order(position))
        else:
            yield reader[position]


def theirs(tars, size, what):
    import webdataset as wds

    def image(sample):
        image, caption = sample
        side = min(image.size)
        left = (image.width - side) // 2
        top = (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
        if np.random.rand() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)), caption

    def latents(sample):
        payload, caption = sample
        moments = torch.frombuffer(bytearray(payload), dtype=torch.float16)
        return moments.view(2, *LATENT_SHAPE), caption.decode()

    def training(sample):
        (mean, std), caption = latents(sample)
        x = torch.addcmul(mean.float(), std.float(), torch.randn(LATENT_SHAPE))
        return x, caption, torch.rand(()), torch.randn(LATENT_SHAPE)

    pipeline = wds.WebDataset(tars, shardshuffle=len(tars), resampled=False, empty_check=False)
    pipeline = pipeline.repeat().shuffle(1000)
    if what == IMAGES:
        return iter(pipeline.decode("pil").to_tuple("jpg;png;webp", "txt").map(image))
    return iter(pipeline.to_tuple("lat", "txt").map(latents if what == LATENTS else training))


def measure_rate(side, seconds):
    """Samples a second."""
    count = 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        next(side)
        count += 1
    return count / (time.perf_counter() - begin)


def compare(what, tars, args):
    sides = {"ours": ours(tars, args.size, what), "webdataset": theirs(tars, args.size, what)}
    for side in sides.values():
        # indices, page cache, and webdataset's buffer is full
        for _ in range(1200):
            next(side)

    rates = {name: [] for name in sides}
    for _ in range(args.turns):
        for name, side in sides.items():
            rates[name].append(measure_rate(side, args.seconds))

    ratios = [a / b for a, b in zip(rates["ours"], rates["webdataset"], strict=True)]
    print(f"{what}: ours {statistics.median(rates['ours']):.0f} samples/s, "
          f"webdataset {statistics.median(rates['webdataset']):.0f}; "
          f"{statistics.median(ratios):.2f} times "
          f"({min(ratios):.2f} to {max(ratios):.2f} over {args.turns} turns)", flush=True)


# ---- the index -----------------------------------------------------------------------------------

def memory():
    """MB that this process alone has written, and of files that it has mapped (which it shares with
    others, and which the kernel can drop).
    """
    kilobytes = {}
    with open("/proc/self/smaps_rollup") as f:
        for line in f:
            if line.endswith("kB\n"):
                kilobytes[line.split(":")[0]] = int(line.split()[1])
    own = kilobytes["Anonymous"]
    return np.array([own / 1e3, (kilobytes["Rss"] - own) / 1e3])


def make_index(folder, samples, per_tar):
    """Tars without contents, with the index files that real ones would have -> their paths."""
    rows = np.full((per_tar, INDEX_COLUMNS), -1, np.int64)
    rows[:, 0] = np.arange(per_tar) * 32768 + 512
    rows[:, 1] = 30000
    tars = []
    for i in range(-(-samples // per_tar)):
        path = os.path.join(folder, f"{i:06d}.tar")
        with open(path, "wb") as f:
            f.truncate(per_tar * 32768)
        stat = os.stat(path)
        head = np.zeros((1, INDEX_COLUMNS), np.int64)
        head[0, :3] = INDEX_VERSION, stat.st_size, stat.st_mtime_ns
        np.concatenate([head, rows]).tofile(f"{path}.idx")
        tars.append(path)
    return tars


def look_up(reader, positions):
    """What a worker process of the loader does, and what it takes."""
    before = memory()
    begin = time.perf_counter()
    for position in range(positions):
        reader.locate(reader.order(position))
    spent = time.perf_counter() - begin
    own, mapped = memory() - before
    print(f"a worker process, after looking up {positions:,} positions: memory of its own "
          f"{own:.1f} MB more, mapped files {mapped:.1f} MB; {spent / positions * 1e6:.0f} us each",
          flush=True)


def measure_index(samples, per_tar):
    with tempfile.TemporaryDirectory() as folder:
        tars = make_index(folder, samples, per_tar)
        before = memory()
        begin = time.perf_counter()
        reader = TarDataset(tars, 256)
        opened = time.perf_counter() - begin
        own, mapped = memory() - before
        size = len(tars) * (per_tar + 1) * INDEX_COLUMNS * 8
        print(f"index of {len(reader):,} samples in {len(tars)} tars, {size / 1e9:.2f} GB on disk: "
              f"opened in {opened:.2f} s; memory of its own {own:.1f} MB more, "
              f"mapped files {mapped:.1f} MB", flush=True)

        pid = os.fork()
        if pid == 0:
            look_up(reader, 20_000)
            os._exit(0)
        os.waitpid(pid, 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tars", default="", help="images with captions to read (default: drawn)")
    add("--size", type=int, default=256)
    add("--images", type=int, default=2000, help="to draw")
    add("--seconds", type=float, default=5, help="a turn")
    add("--turns", type=int, default=5)
    add("--index", type=float, default=0, metavar="N",
        help="measure the index of N samples instead")
    args = parser.parse_args()

    torch.set_num_threads(1)
    if args.index:
        measure_index(int(args.index), 10_000)
        return

    with tempfile.TemporaryDirectory() as folder:
        tars = sorted(glob.glob(args.tars))
        if not tars:
            draw_images(folder, args.images, 512)
            tars = sorted(glob.glob(f"{folder}/*.tar"))
        compare(IMAGES, tars, args)
    with tempfile.TemporaryDirectory() as folder:
        draw_latents(folder, 10_000)
        tars = sorted(glob.glob(f"{folder}/*.tar"))
        compare(LATENTS, tars, args)
        compare(TRAINING, tars, args)


if __name__ == "__main__":
    main()
