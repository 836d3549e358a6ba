"""Does the data keep up? Samples a second and core of our reader beside webdataset's, over the same tars; and what an index of 20 million samples costs.

    python bench/data.py --tars 'data/laion/*.tar' --size 256           # pictures: of your own (JPEG, some 512 pixels, is what the recipes have)
    python bench/data.py                                                # drawn JPEGs of 512 pixels decoded at 256, and latents of 4 x 32 x 32
    python bench/data.py --index 20e6                                   # start-up time and memory of the index, main process and a worker

One process and one thread, no worker processes, the sides in turn. Both shuffle. Pictures: both decode to the same square at the same size and
filter (Lanczos), mirror half, and return tensors; ours also draws time and noise. Latents: once read alone (a tensor of mean and deviation, and the
caption), once with what a step needs (a sample of the posterior, time, noise), drawn by torch on both sides. webdataset's is its documented
pipeline: shards shuffled, a buffer of 1,000 samples, .decode("pil"), .to_tuple, .map. A ratio is the median over turns, with its range.
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
import data
import ddm.tars


def draw_pictures(folder, count, size, per_tar=250):
    """JPEGs with the detail of photographs: shapes over smooth colour and grain."""
    rng = np.random.default_rng(0)
    for first in range(0, count, per_tar):
        with ddm.tars.TarWriter(os.path.join(folder, f"{first:05d}.tar")) as tar:
            for i in range(first, min(count, first + per_tar)):
                smooth = Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
                shape, caption = data.draw_shape(rng, size)
                pixels = 0.6 * np.asarray(smooth, float) + 0.3 * np.asarray(shape, float) + rng.normal(0, 6, (size, size, 3))
                out = io.BytesIO()
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
                tar.add(f"{i:08d}.jpg", out.getvalue())
                tar.add(f"{i:08d}.txt", caption.encode())


def draw_latents(folder, count, per_tar=2500):
    rng = np.random.default_rng(0)
    for first in range(0, count, per_tar):
        with ddm.tars.TarWriter(os.path.join(folder, f"{first:05d}.tar")) as tar:
            for i in range(first, min(count, first + per_tar)):
                tar.add(f"{i:08d}.lat", rng.standard_normal((1, 2, 4, 32, 32), np.float32).astype(np.float16).tobytes())
                tar.add(f"{i:08d}.txt", b"a red circle")


def ours(tars, size, what):
    latent = what != "pictures"
    reader = data.TarDataset(tars, size, "text", None, flip=not latent, noise_shape=(4, 32, 32), posterior=latent, latent=(1, 2, 4, 32, 32) if latent else None)
    for position in itertools.count():
        yield reader.sample(reader.order(position)) if what == "latents" else reader[position]


def theirs(tars, size, what):
    import webdataset as wds

    def picture(sample):
        image, caption = sample
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
        if np.random.rand() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)), caption

    def latents(sample):
        return torch.frombuffer(bytearray(sample[0]), dtype=torch.float16).view(2, 4, 32, 32), sample[1].decode()

    def training(sample):
        (mean, deviation), caption = latents(sample)
        return torch.addcmul(mean.float(), deviation.float(), torch.randn(4, 32, 32)), caption, torch.rand(()), torch.randn(4, 32, 32)

    pipeline = wds.WebDataset(tars, shardshuffle=len(tars), resampled=False, empty_check=False).repeat().shuffle(1000)
    if what == "pictures":
        yield from pipeline.decode("pil").to_tuple("jpg;png;webp", "txt").map(picture)
    yield from pipeline.to_tuple("lat", "txt").map(latents if what == "latents" else training)


def compare(what, tars, size, seconds, turns):
    sides = {"ours": ours(tars, size, what), "webdataset": theirs(tars, size, what)}
    for side in sides.values():
        for _ in range(1200):       # indices, page cache, and webdataset's buffer is full
            next(side)
    rates = {name: [] for name in sides}
    for _ in range(turns):
        for name, side in sides.items():
            count, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < seconds:
                next(side)
                count += 1
            rates[name].append(count / (time.perf_counter() - begin))
    ratios = [a / b for a, b in zip(rates["ours"], rates["webdataset"])]
    print(f"{what}: ours {statistics.median(rates['ours']):.0f} samples/s, webdataset {statistics.median(rates['webdataset']):.0f}; "
          f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f} over {turns} turns)", flush=True)


def memory():
    """MB that this process alone has written, and of files that it has mapped (which it shares with others, and which the kernel can drop)."""
    with open("/proc/self/smaps_rollup") as f:
        values = {line.split(":")[0]: int(line.split()[1]) for line in f if line.split()[-1] == "kB"}
    return values["Anonymous"] / 1e3, (values["Rss"] - values["Anonymous"]) / 1e3


def index(samples, per_tar):
    """Tars without contents, with the index files that real ones would have."""
    with tempfile.TemporaryDirectory() as folder:
        width = 2 * len(data.ROLES) + 1
        rows = np.full((per_tar, width), -1, np.int64)
        rows[:, 0], rows[:, 1] = np.arange(per_tar) * 32768 + 512, 30000
        tars = []
        for i in range(-(-samples // per_tar)):
            path = os.path.join(folder, f"{i:06d}.tar")
            with open(path, "wb") as f:
                f.truncate(per_tar * 32768)
            stat = os.stat(path)
            head = np.array([data.INDEX_VERSION, stat.st_size, stat.st_mtime_ns] + [0] * (width - 3), np.int64)
            np.concatenate([head[None], rows]).tofile(f"{path}.idx")
            tars.append(path)
        before, begin = memory(), time.perf_counter()
        reader = data.TarDataset(tars, 256)
        opened = time.perf_counter() - begin
        after = memory()
        print(f"index of {len(reader):,} samples in {len(tars)} tars, {len(tars) * (per_tar + 1) * width * 8 / 1e9:.2f} GB on disk: opened in {opened:.2f} s; "
              f"memory of its own {after[0] - before[0]:.1f} MB more, mapped files {after[1] - before[1]:.1f} MB")
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:        # as a worker process of the loader
            before = memory()
            begin = time.perf_counter()
            for position in range(20_000):
                number = reader.order(position)
                tar = data.bisect.bisect_right(reader.ends, number)
                reader.index[tar][number - (reader.ends[tar - 1] if tar else 0)].tolist()
            spent, after = time.perf_counter() - begin, memory()
            print(f"a worker process, after looking up 20,000 positions: memory of its own {after[0] - before[0]:.1f} MB more, mapped files {after[1] - before[1]:.1f} MB; {spent / 20_000 * 1e6:.0f} us each", flush=True)
            os._exit(0)
        os.waitpid(pid, 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tars", default="", help="pictures with captions to read (default: drawn)")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--images", type=int, default=2000, help="to draw")
    parser.add_argument("--seconds", type=float, default=5, help="a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--index", type=float, default=0, metavar="N", help="measure the index of N samples instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.index:
        return index(int(args.index), 10_000)
    with tempfile.TemporaryDirectory() as folder:
        tars = sorted(glob.glob(args.tars))
        if not tars:
            draw_pictures(folder, args.images, 512)
            tars = sorted(glob.glob(f"{folder}/*.tar"))
        compare("pictures", tars, args.size, args.seconds, args.turns)
    with tempfile.TemporaryDirectory() as folder:
        draw_latents(folder, 10_000)
        for what in ("latents", "latents, posterior and noise"):
            compare(what, sorted(glob.glob(f"{folder}/*.tar")), 256, args.seconds, args.turns)


if __name__ == "__main__":
    main()
