"""Brings images from elsewhere into tar shards.

    python tools/to_tars.py --imagenet ILSVRC2012_img_train.tar --out data/imagenet

reads   --imagenet TAR: ImageNet's own training set, a tar of one tar a class
writes  DIR/00000.tar, 00001.tar, ...: KEY.jpg as it is, with KEY.cls, its class's number

A source is a generator of (key, {extension: payload}), one for each sample; write_shards packs
what it yields. Classes are numbered in the order of their names.
"""
import itertools
import os
import sys
import tarfile
from dataclasses import dataclass, field

# `python tools/to_tars.py` finds the repository's modules from any folder
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from ddm.config import Parser, parse
from ddm.errors import UserError, script
from ddm.process import progress
from ddm.tars import TarWriter


@dataclass
class Written:
    """What write_shards wrote."""
    images: int = 0
    # the payloads of KEY.cls
    classes: set = field(default_factory=set)


def shard_name(number):
    return f"{number:05d}.tar"


def check_folder(out, tars=0):
    """UserError where `out` holds tars that would not be overwritten by the first `tars` shards.

    They would silently count as part of the set, which is read by a pattern.
    """
    ours = {shard_name(number) for number in range(tars)}
    existing = os.listdir(out) if os.path.isdir(out) else []
    others = sorted(name for name in existing if name.endswith(".tar") and name not in ours)
    if others:
        raise UserError(f"{out} holds {len(others)} other tars, {others[0]} the first, which would "
                        "count as part of the set: use another --out, or delete them")


def write_shards(out, samples, per_tar, total=None):
    """Packs samples (key, {extension: payload}) into OUT/00000.tar, ..., per_tar in each.

    total: their number, if it is known. -> Written
    """
    written = Written()
    samples = iter(progress(samples, desc="writing", unit=" images", total=total))

    # a shard begins only when there is a sample for it: a source that fails at once leaves nothing
    for number, first in enumerate(samples):
        rest = itertools.islice(samples, per_tar - 1)
        with TarWriter(os.path.join(out, shard_name(number))) as tar:
            for key, members in itertools.chain([first], rest):
                for extension, payload in members.items():
                    tar.add(f"{key}.{extension}", payload)
                written.images += 1
                if "cls" in members:
                    written.classes.add(members["cls"])
    return written


def read_imagenet(path):
    """Yields (key, {"jpg", "cls"}) of ILSVRC2012_img_train.tar."""
    remedy = "the file is ImageNet's own ILSVRC2012_img_train.tar"
    try:
        with tarfile.open(path, "r:") as outer:
            names = sorted(m.name for m in outer if m.isfile() and m.name.endswith(".tar"))
            if not names:
                raise UserError(f"--imagenet {path} holds no tars of classes; {remedy}")
            # the classes in the order of their names, wherever they stand in the tar
            for number, name in enumerate(names):
                label = str(number).encode()
                for key, payload in read_class(outer.extractfile(name)):
                    yield key, {"jpg": payload, "cls": label}
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"--imagenet {path}: {error}; {remedy}") from None


def read_class(file):
    """Yields (key, payload) of the images in the tar of one class."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            # n01440764_18.JPEG -> n01440764_18; the extension becomes .jpg
            key = os.path.basename(member.name).partition(".")[0]
            yield key, tar.extractfile(member).read()


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--imagenet", required=True, metavar="TAR", help="ILSVRC2012_img_train.tar")
    add("--out", required=True, metavar="DIR", help="folder for the tars")
    add("--per-tar", type=int, default=10000, metavar="N", help="images a tar (default: 10000)")
    args, _ = parse(parser)

    if args.per_tar < 1:
        raise UserError(f"--per-tar {args.per_tar} must be at least 1")
    # how many shards it will be is not known yet: the folder must hold none
    check_folder(args.out)

    written = write_shards(args.out, read_imagenet(args.imagenet), args.per_tar)
    print(f"{written.images} images of {len(written.classes)} classes in {args.out}")


if __name__ == "__main__":
    script(main)
