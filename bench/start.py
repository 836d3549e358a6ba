"""What does the start of a training cost where a shard has many tars? And what do digests cost?

    python bench/start.py                   # 1,000 tars of 50 samples
    python bench/start.py --digest 4        # what the SHA-256 of 4 GB costs, beside reading them

training.open_shards compares the tars with their manifest and opens their indices, which are there
already. The median over turns, in seconds. PRODUCT=DIR measures the code in another folder.
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from types import SimpleNamespace

import torch

sys.path.insert(
    0, os.environ.get("PRODUCT") or os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
)
import training
import ddm.config
import ddm.tars


def make_shard(folder, tars, samples):
    """A shard as cluster.py leaves it: tars of tiny samples, their manifest, and their indices."""
    entries = {}
    for t in range(tars):
        path = os.path.join(folder, f"{t:05d}.tar")
        with ddm.tars.TarWriter(path) as tar:
            for i in range(samples):
                tar.add(f"{t:05d}{i:04d}.png", b"not looked at")
                tar.add(f"{t:05d}{i:04d}.txt", b"a red circle")
        entries[os.path.basename(path)] = {
            "samples": samples,
            "bytes": tar.bytes,
            "sha256": tar.digest.hexdigest(),
            "source": "0" * 64,
        }
    with open(os.path.join(folder, "manifest.json"), "w") as f:
        json.dump({"fingerprint": "bench", "shard": "0", "tars": entries}, f, indent=1)


def start(run):
    config = ddm.config.make_config({})
    clusters = {
        "fingerprint": "bench",
        "networks": {"autoencoder": {"name": ""}, "text": {"name": "words"}},
    }
    ranks = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))
    return training.open_shards(run, ["0"], config, training.stage_config(config), ranks, clusters)


def measure_digest(size):
    """Seconds to read a file of `size` bytes, and to compute its SHA-256; the file is in the page
    cache.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(os.urandom(1 << 26) * -(-size // (1 << 26)))
        file.flush()
        for name, read in (
            ("read", lambda f: sum(len(part) for part in iter(lambda: f.read(1 << 20), b""))),
            ("SHA-256", lambda f: hashlib.file_digest(f, "sha256")),
        ):
            begin = time.perf_counter()
            with open(file.name, "rb") as f:
                read(f)
            print(
                f"{name}: {os.path.getsize(file.name) / 1e9 / (time.perf_counter() - begin):.2f} "
                "GB/s"
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tars", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=50, help="a tar")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument(
        "--digest",
        type=float,
        default=0,
        metavar="GB",
        help="measure the digest of so many GB instead",
    )
    args = parser.parse_args()
    if args.digest:
        measure_digest(int(args.digest * 1e9))
        return
    with tempfile.TemporaryDirectory() as run:
        folder = os.path.join(run, "shards", "0")
        os.makedirs(folder)
        make_shard(folder, args.tars, args.samples)
        begin = time.perf_counter()
        start(run)
        first, seconds = time.perf_counter() - begin, []
        for _ in range(args.turns):
            begin = time.perf_counter()
            start(run)
            seconds.append(time.perf_counter() - begin)
    print(
        f"{args.tars} tars of {args.samples} samples: {statistics.median(seconds):.3f} s "
        f"({min(seconds):.3f} to {max(seconds):.3f}); the first time, with indexing, {first:.2f} s"
    )


if __name__ == "__main__":
    main()
