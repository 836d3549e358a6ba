"""What does the start of a training cost where a shard has many tars? And what do digests cost?

    python bench/start.py                   # 1,000 tars of 50 samples
    python bench/start.py --digest 4        # what the SHA-256 of 4 GB costs, beside reading them

loading.open_shards compares the tars with their manifest and opens their indices, which are there
already. The median over turns, in seconds.
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

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from ddm.config import make_config  # noqa: E402
from ddm.loading import open_shards  # noqa: E402
from ddm.tars import TarWriter  # noqa: E402

CLUSTERS = {
    "fingerprint": "bench",
    "networks": {"autoencoder": {"name": ""}, "text": {"name": "words"}},
}


def make_shard(folder, tars, samples):
    """A shard as cluster.py leaves it: tars of tiny samples, and their manifest."""
    entries = {}
    for t in range(tars):
        name = f"{t:05d}.tar"
        with TarWriter(os.path.join(folder, name)) as tar:
            for i in range(samples):
                tar.add(f"{t:05d}{i:04d}.png", b"not looked at")
                tar.add(f"{t:05d}{i:04d}.txt", b"a red circle")
        entries[name] = {
            "samples": samples,
            "bytes": tar.bytes,
            "sha256": tar.digest.hexdigest(),
            "source": "0" * 64,
        }
    with open(os.path.join(folder, "manifest.json"), "w") as f:
        json.dump({"fingerprint": "bench", "shard": "0", "tars": entries}, f, indent=1)


def measure_start(run_dir):
    """Seconds to open the shard."""
    config = make_config({})
    ranks = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))
    begin = time.perf_counter()
    open_shards(run_dir, ["0"], config, config.train, ranks, CLUSTERS)
    return time.perf_counter() - begin


def read(f):
    while f.read(1 << 20):
        pass


def digest(f):
    hashlib.file_digest(f, "sha256")


def measure_digest(size):
    """GB a second that are read, and that become a SHA-256; the file is in the page cache."""
    with tempfile.NamedTemporaryFile() as file:
        piece = 1 << 26
        file.write(os.urandom(piece) * -(-size // piece))
        file.flush()
        gigabytes = os.path.getsize(file.name) / 1e9
        for name, function in (("read", read), ("SHA-256", digest)):
            begin = time.perf_counter()
            with open(file.name, "rb") as f:
                function(f)
            print(f"{name}: {gigabytes / (time.perf_counter() - begin):.2f} GB/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tars", type=int, default=1000)
    add("--samples", type=int, default=50, help="a tar")
    add("--turns", type=int, default=7)
    add("--digest", type=float, default=0, metavar="GB",
        help="measure the digest of so many GB instead")
    args = parser.parse_args()

    if args.digest:
        measure_digest(int(args.digest * 1e9))
        return

    with tempfile.TemporaryDirectory() as run_dir:
        folder = os.path.join(run_dir, "shards", "0")
        os.makedirs(folder)
        make_shard(folder, args.tars, args.samples)
        first = measure_start(run_dir)
        seconds = [measure_start(run_dir) for _ in range(args.turns)]
    print(f"{args.tars} tars of {args.samples} samples: {statistics.median(seconds):.3f} s "
          f"({min(seconds):.3f} to {max(seconds):.3f}); the first time, with indexing, "
          f"{first:.2f} s")


if __name__ == "__main__":
    main()
