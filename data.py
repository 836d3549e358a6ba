"""Tar shards in and out, and the embedded demo set.

    python data.py --out data/shapes --images 6000 --size 16                      # draws captioned coloured shapes
    python data.py --out data/imagenet --imagenet ILSVRC2012_img_train.tar        # ImageNet's own tar to shards with classes

A shard is a tar as img2dataset writes it: the members of one sample stand together and share the name up to the first dot,
KEY.jpg|png|webp, KEY.txt (caption), KEY.json, KEY.cls (class number); pretrained.py's have KEY.lat (latents) instead of the picture.
Of several images of one key the first of IMAGE_TYPES is taken; names that begin with a dot are no samples.
TarDataset indexes each tar once (offsets, kept beside it as NAME.tar.idx, memory-mapped) and then reads any sample by its position, so that

    position -> sample       is a stateless shuffle: every sample once an epoch, over any number of ranks and workers,
    position -> randomness   (crop, mirror, t, noise, dropped condition) is a generator seeded by (seed, position),

and a resume is just a first position. A sample that cannot be read is counted and its slot filled by another one.
"""
import bisect
import collections
import contextlib
import functools
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import stat
import struct
import sys
import tarfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import found
from common import (UserError, atomic, cores, decode_text, gather, make_parser, parse, progress,
                    read_json, script, write_text)
from model import normalise_text, words

# of several images of one key the first of these is taken
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "bmp")
# folders that systems leave in a tar
LEFTOVERS = ("__MACOSX", ".AppleDouble", "@eaDir", ".ipynb_checkpoints")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")      # whatever the name says; not EPS, for which Pillow starts Ghostscript
ROLES = ("image", "txt", "cls", "cluster", "lat", "tok")        # the members of a sample that training reads
INDEX_VERSION = 3
RETRY = (1, 5, 30)      # seconds until a failed read is tried again
LIMITS = {"image": 1 << 28, "txt": 1 << 20, "cls": 64, "cluster": 64}      # bytes of a member, looked at before it is read; of others 1 GB


STALE = "not what the tar's index says (the tar was replaced: delete its .idx)"


class BadSample(Exception):
    """A sample that cannot be used. cause: one of a few, by which they are counted; detail: what
    else is known of this one.
    """

    def __init__(self, cause, detail=""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause, self.detail = cause, detail


def read_patiently(read):
    """read(), tried again if it fails, as a network file system may for a while. BadSample if it stays so."""
    for wait in (*RETRY, None):
        try:
            return read()
        except OSError as error:
            if wait is None:
                raise BadSample(f"unreadable ({type(error).__name__})") from None
            time.sleep(wait)


def check_size(role, size):
    if size > LIMITS.get(role, 1 << 30):
        raise BadSample(f"{role} too large", f"{size} bytes")
    if size < 0:
        raise BadSample(STALE)


# ---- tars ---------------------------------------------------------------------------------------------------------

@dataclass
class Sample:
    key: str
    # its members' bytes in the tar, headers and padding included
    start: int
    end: int = 0
    # role or extension -> (offset, size) of the payload
    members: dict = field(default_factory=dict)
    # the same -> CRC-32 of the block before the payload, which names and sizes it
    heads: dict = field(default_factory=dict)
    taken: dict = field(default_factory=dict)  # the same -> the extension as it is written
    others: list = field(default_factory=list)  # extensions that are left out: a second image

    def add(self, extension, place, head):
        """A member joins the sample. Of two for one role the first of IMAGE_TYPES is taken."""
        role = role_of(extension)
        rank = lambda name: (
            IMAGE_TYPES.index(name.lower()) if role == "image" else 0,
            name != name.lower(),
        )
        if role in self.members:
            first, second = sorted((self.taken[role], extension), key=rank)
            self.others.append(second)
            if first != extension:
                return
        self.members[role], self.heads[role], self.taken[role] = place, head, extension

    def choice(self):
        """What was taken where there was a choice, in words."""
        other = self.others[0]
        return f"{found.printable(self.key)}.{self.taken[role_of(other)]} is taken, not .{other}"


def role_of(extension):
    return "image" if extension.lower() in IMAGE_TYPES else extension.lower()


@dataclass
class Notes:
    """What scan_tar leaves out of a tar."""

    hidden: int = 0  # members whose names begin with a dot, and the like
    torn: str = ""  # why the tar ends early


def split_name(name):
    """A member's name -> (key, extension), the key up to the first dot of the base name. None for
    what systems leave in a tar: ._NAME, .DS_Store, __MACOSX/.
    """
    while name.startswith("./"):
        name = name[2:]
    folder, base = os.path.split(name)
    if base.startswith(".") or not set(LEFTOVERS).isdisjoint(folder.split("/")):
        return None
    stem, _, extension = base.partition(".")
    return os.path.join(folder, stem), extension


class _Header(tarfile.TarInfo):
    """A header that may not be longer than any name or time that is meant well: tarfile's patterns take minutes over a megabyte of digits."""

    def _proc_member(self, tar):
        if self.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK) and self.size > 1 << 14:
            raise tarfile.ReadError("a header is too long")
        return super()._proc_member(tar)

    @classmethod
    def frombuf(cls, block, encoding, errors):
        header = super().frombuf(block, encoding, errors)
        header.crc = zlib.crc32(block)
        return header


def scan_tar(path, notes=None, file=None):
    """Yields the Samples of a tar in its order, reading headers only. A tar that is cut short, or
    damaged, gives its whole samples before that and a warning.

    A second member of the same name begins another sample. Nothing is ever extracted: names are
    names, not paths. notes: a Notes to be filled; file: the tar's bytes, open, where they are not
    at `path`. OSError where the file system fails.
    """
    sample, torn, names, opened = None, "it does not end as a tar does", set(), False
    notes = notes if notes is not None else Notes()
    size = file.seek(0, os.SEEK_END) if file else os.path.getsize(path)
    if file:
        file.seek(0)
    try:
        with tarfile.open(path, "r:", file, encoding="utf-8", tarinfo=_Header) as tar:
            opened = True
            for member in tar:
                tar.members = []  # tarfile would keep them all
                if member.size < 0 or tar.offset <= member.offset:  # it would read in circles
                    raise tarfile.ReadError("a member has an impossible size")
                # of a sparse file the tar holds other bytes than its size says
                if not member.isfile() or member.issparse():
                    continue
                named = split_name(member.name)
                if named is None:
                    notes.hidden += 1
                    continue
                key, extension = named
                if sample is None or sample.key != key or extension in names:
                    if sample is not None:
                        yield sample
                    sample, names = Sample(key, start=member.offset), set()
                names.add(extension)
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("a member is cut off")
                sample.add(extension, (member.offset_data, member.size), member.crc)
                sample.end = member.offset_data + -(-member.size // 512) * 512
            tar.fileobj.seek(tar.offset)
            # nothing but empty blocks: a hole, or another tar, would end it, too
            rest = tar.fileobj.read(1 << 20)
            if len(rest) >= 512 and rest.count(0) == len(rest):
                torn = ""
    except OSError:
        raise  # the file system's fault, not the tar's: what is read now would pass for the whole
    except Exception as error:  # tarfile raises more than its own kinds on a hostile header
        torn = str(error) or type(error).__name__
    if torn:  # the last sample may lack members: not whole
        other = "" if opened or file else found.file_format(path)
        notes.torn = torn if opened else f"it is no tar ({torn})"
        if other:
            notes.torn = f"it is no tar, but {other}"
        print(
            f"warning: {path}: {notes.torn}" + ("; its whole samples are used" if opened else ""),
            file=sys.stderr,
        )
    elif sample is not None:
        yield sample


def scan_patiently(path, notes=None):
    """scan_tar for a file system that fails for a while: goes on where it was. UserError if it
    stays so.
    """
    done, waits = 0, iter(RETRY)
    while True:
        try:
            if notes is not None:
                notes.hidden = 0  # counted anew
            for sample in itertools.islice(scan_tar(path, notes), done, None):
                done += 1
                yield sample
            return
        except OSError as error:
            wait = next(waits, None)
            if wait is None:
                raise UserError(
                    f"cannot read {path}: {error.strerror or error}: look at the disk or the "
                    "network file system, then run the same command again",
                    local=True,
                ) from None
            time.sleep(wait)


def describe_samples(path, cause, condition):
    """Words for the end of an error: what a tar holds, whose samples cannot be used because of
    `cause`, and the likely remedy.
    """
    names, hidden = [], 0
    try:
        with tarfile.open(path, "r:", encoding="utf-8", tarinfo=_Header) as tar:
            for member in itertools.islice(tar, found.MANY):
                tar.members = []
                if named := split_name(member.name) if member.isfile() else ():
                    names.append(named)
                hidden += named is None
    except Exception:  # as in scan_tar, whose warning says why
        pass
    if names:
        return found.instead_of_samples(path, names, cause, condition)
    if hidden:
        return (
            f"{path} holds nothing but {hidden} files whose names begin with a dot, or in folders "
            "like __MACOSX, which are no samples"
        )
    other = found.file_format(path)
    return f"{path} is {other}" if other else f"{path} is a tar without files"


# ---- the tars of --data -------------------------------------------------------------------------------------------

def _match(pattern):
    """The paths that one pattern of --data stands for: itself, if there is such a path, else as a
    glob in which ** is any depth.
    """
    path = os.path.expanduser(pattern)
    if os.path.lexists(path):
        return [path]
    return (
        [] if re.match(r"[a-z][a-z0-9+.-]*://", path) else sorted(glob.glob(path, recursive=True))
    )


def _check_tar(path):
    """UserError unless `path` is a file that can be read."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise UserError(
            f"{path} is a link to {os.readlink(path)}, which is not there: mend the link, or "
            "leave it out of --data"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}: change that, or leave it out of --data"
        ) from None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise UserError(
            f"{path} is {what}, though its name ends in .tar: rename it, or leave it out of --data"
        )
    if not os.access(path, os.R_OK):
        raise UserError(
            f"you lack the right to read {path}: change it (chmod, chown), or leave it out of "
            "--data"
        )


def find_tars(patterns, left=None):
    """{name: path} of the tars that the patterns match, sorted by name. left: a list, to which what
    is no tar joins in words.

    UserError if a pattern matches no tar, if one cannot be read, or two have the same name. A tar
    that is found twice counts once.
    """
    patterns, tars, others, same, names = [str(pattern) for pattern in patterns], {}, {}, 0, {}
    for pattern in patterns:
        matched = _match(pattern)
        if not matched:
            raise UserError(
                f"no tar matches --data {pattern}: "
                f"{found.instead_of_tars(os.path.expanduser(pattern), [])}"
            )
        tars |= dict.fromkeys(path for path in matched if path.lower().endswith(".tar"))
        others |= dict.fromkeys(
            path for path in matched if not path.lower().endswith((".tar", ".tar.idx"))
        )
    if not tars:
        shown = " ".join(patterns[:3]) + (
            f" and {len(patterns) - 3} more" if len(patterns) > 3 else ""
        )
        raise UserError(
            f"no tar matches --data {shown}: {found.instead_of_tars(patterns[0], list(others))}"
        )
    files = set()
    for path in sorted(tars, key=lambda path: (os.path.islink(path), path)):
        _check_tar(path)
        if (file := os.path.realpath(path)) in files:  # by another link or pattern
            same += os.path.islink(path)
            continue
        files.add(file)
        name = os.path.basename(path)[:-4]
        if name in names:
            raise UserError(
                f"two tars are named {name}.tar: {names[name]} and {path}; shards are named after "
                "them, so rename one"
            )
        names[name] = path
    if left is not None and others:
        left.append(
            f"{found.count_endings(others)} ({next(iter(others))} the first"
            + (f"; {words})" if (words := found.remedy(list(others))) else ")")
        )
    if left is not None and same:
        left.append(f"{same} links to tars that are there already")
    return dict(sorted(names.items()))


# ---- which bytes a tar has ----------------------------------------------------------------------------------------

SOURCE = {"bytes": int, "mtime_ns": int, "ctime_ns": int, "sha256": str}       # a Source in JSON


@dataclass(frozen=True)
class Source:
    """Which bytes a tar has: the digest. Size and dates, of contents and of inode, say when it need
    not be computed again.
    """

    bytes: int
    mtime_ns: int
    # nothing sets it back: it tells of a tar replaced by one of the same size and date (cp -p)
    ctime_ns: int
    sha256: str


def is_unchanged(path, source):
    """Whether a file has the size and the dates of a Source."""
    now = os.stat(path)
    return (now.st_size, now.st_mtime_ns, now.st_ctime_ns) == (
        source.bytes,
        source.mtime_ns,
        source.ctime_ns,
    )


def read_source(path, known=None):
    """The Source of a file as it is now: `known`, where size and dates are its; else all of it is
    read. UserError if it cannot be read, or changes meanwhile.
    """

    def read():
        with open(path, "rb") as f:
            now = os.fstat(f.fileno())
            return Source(
                now.st_size,
                now.st_mtime_ns,
                now.st_ctime_ns,
                hashlib.file_digest(f, "sha256").hexdigest(),
            )

    if known is not None and is_unchanged(path, known):
        return known
    try:
        source = read_patiently(read)
    except BadSample as error:
        raise UserError(f"{path} is {error}", local=True) from None
    check_unchanged(path, source)
    return source


def check_unchanged(path, source):
    """UserError if a tar is not as it was when its Source was read."""
    if not is_unchanged(path, source):
        raise UserError(
            f"{path} has changed while it was being read: run the same command again when it is "
            "complete",
            local=True,
        )


def read_sources(paths, file, ranks):
    """[Source] of tars. The ranks share the work; what is known is kept in the JSON `file`."""
    try:
        known = {path: Source(**entry) for path, entry in read_json(file, {str: SOURCE}).items()}
    except (OSError, ValueError, TypeError):
        known = {}  # made anew
    names = [os.path.abspath(path) for path in paths]
    mine = {name: read_source(name, known.get(name)) for name in names[ranks.rank :: ranks.world]}
    every = {name: source for part in gather(mine) for name, source in part.items()}
    if ranks.rank == 0 and any(known.get(name) != source for name, source in every.items()):
        write_text(
            file,
            json.dumps(
                {name: vars(source) for name, source in sorted((known | every).items())}, indent=1
            ),
        )
    return [every[name] for name in names]


# ---- writing and indexing -----------------------------------------------------------------------------------------

class TarWriter:
    """Writes a tar beside its place and renames it there on a clean exit. Members are written as they are: no times, no owners."""

    def __init__(self, path):
        self._atomic = atomic(path)

    def __enter__(self):
        self.file, self.digest, self.bytes = open(self._atomic.__enter__(), "wb"), hashlib.sha256(), 0
        return self

    def __exit__(self, *error):
        try:
            if error[0] is None:
                self._write(bytes(1024))    # a tar ends in two empty blocks
            self.file.close()
        except OSError as full:     # of what was still to be written
            self._atomic.__exit__(type(full), full, full.__traceback__)
            raise
        self._atomic.__exit__(*error)

    def _write(self, blocks):
        self.file.write(blocks)
        self.digest.update(blocks)
        self.bytes += len(blocks)

    def add(self, name, payload):
        info = tarfile.TarInfo(name)
        info.size = len(payload)
        self.add_raw(info.tobuf(tarfile.PAX_FORMAT) + payload)

    def add_raw(self, blocks):
        """Headers and payloads copied from another tar."""
        self._write(blocks + bytes(-len(blocks) % 512))


def _row(sample):
    """What the index says of a Sample."""
    places = [x for role in ROLES for x in sample.members.get(role, (-1, -1))]
    check = 0  # as TarDataset.members computes it from what it reads
    for role in ROLES:
        if role in sample.heads:
            check = (31 * check + sample.heads[role]) & 0xFFFFFFFF
    return [*places, check]


def index_tar(path, mapped=True):
    """[n, 2 * len(ROLES) + 1] int64: offset and size of each sample's members, in the order of
    ROLES, -1 where there is none; and a checksum of their headers, which every read compares.

    Made once and kept beside the tar, as long as the tar's size and date stay. mapped: memory-
    mapped, so that all ranks share it.
    """
    now, file, width = os.stat(path), f"{path}.idx", 2 * len(ROLES) + 1
    head = np.array([INDEX_VERSION, now.st_size, now.st_mtime_ns] + [0] * (width - 3), np.int64)
    if os.path.exists(file) and (rows := os.path.getsize(file) // (8 * width)):
        # torch maps a file without keeping it open: a run may have more tars than a process may have open files
        table = (
            torch.from_file(file, size=rows * width, dtype=torch.int64).numpy()
            if mapped
            else np.fromfile(file, np.int64)
        )
        table = table[: rows * width].reshape(rows, width)
        if np.array_equal(table[0], head):
            return table[1:]
    try:
        rows = read_patiently(lambda: [_row(sample) for sample in scan_tar(path)])
    except BadSample as error:
        raise UserError(f"{path} is {error}", local=True) from None
    table = np.array(rows, np.int64).reshape(-1, width)
    try:
        with atomic(file) as temporary:
            np.concatenate([head[None], table]).tofile(temporary)
    except OSError:
        pass  # a read-only folder: indexed again next time
    return table


# ---- images -------------------------------------------------------------------------------------------------------

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's orientation


def decode(payload, least=0):
    """Bytes of a picture -> PIL image, RGB, upright, transparency on white. BadSample if it cannot
    be decoded.

    least: a JPEG may be decoded at a fraction of its size, as long as its sides stay this long.
    Metadata that Pillow refuses (too large, damaged) costs no picture.
    """
    try:
        return _decode(payload, least)
    except Exception as error:  # Pillow's decoders raise whatever they like
        cause = f"undecodable ({type(error).__name__})"
        words = re.sub(r" ?<.*>", "", " ".join(str(error).split()))[:200]
    bare = _without_metadata(payload)
    if bare == payload:
        raise BadSample(cause, words)
    try:
        return _decode(bare, least)
    except Exception:
        raise BadSample(cause, words) from None


def _decode(payload, least):
    image = Image.open(io.BytesIO(payload), formats=FORMATS)
    # Pillow would only warn, up to twice as many
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    if least:
        image.draft("RGB", (least, least))
    image.load()
    try:
        turn = UPRIGHT.get(image.getexif().get(0x0112))
    except Exception:  # EXIF that cannot be read says nothing of an orientation
        turn = None
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _without_metadata(payload):
    """A PNG or JPEG without what its pixels do not need: texts, colour profile, thumbnails. The
    orientation stays, where it is intact.
    """
    kept, at = [], 0
    try:
        if payload.startswith(b"\x89PNG"):
            at = 8
            while at < len(payload):
                length, kind = struct.unpack_from(">I4s", payload, at)
                chunk = payload[at : at + 12 + length]
                intact = len(chunk) == 12 + length and zlib.crc32(chunk[4:-4]) == int.from_bytes(
                    chunk[-4:], "big"
                )
                # capitals: what every decoder needs
                if kind[:1].isupper() or kind in (b"tRNS", b"eXIf") and intact:
                    kept.append(chunk)
                at += 12 + length
            return payload[:8] + b"".join(kept)
        if payload.startswith(b"\xff\xd8\xff"):
            at = 2
            while payload[at] == 0xFF and payload[at + 1] != 0xDA:  # until the pixels begin
                kind, length = struct.unpack_from(">xBH", payload, at)
                if (
                    kind not in range(0xE1, 0xEE)
                    and kind != 0xFE
                    or payload[at + 4 : at + 10] == b"Exif\0\0"
                ):
                    kept.append(payload[at : at + 2 + length])
                at += 2 + length
            return payload[:2] + b"".join(kept) + payload[at:]
    except (struct.error, IndexError):
        pass
    return payload


def square(image, size, where=(0.5, 0.5), mirror=False):
    """The square of a PIL image at `where` (0..1 in x and y; the middle by default), resized -> [size,size,3] uint8."""
    side = min(image.size)
    left, top = (image.width - side) * where[0], (image.height - side) * where[1]
    image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image)


def check_condition(members, condition, classes=0):
    """The condition of a sample from its members {role: bytes}: None, a class number or a caption.
    BadSample if it is missing.
    """
    if condition == "class":
        if not members.get("cls", b"").strip():
            raise BadSample("no class")
        try:
            text = decode_text(members["cls"]).strip()
            label = int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else None
        except ValueError:
            text, label = repr(members["cls"])[2:-1], None
        if label is None:
            raise BadSample("class is no number", f"KEY.cls is {text[:40]!r}")
        if not 0 <= label < classes:
            raise BadSample(f"class outside data.classes = {classes}", f"KEY.cls is {label}")
        return label
    if condition == "text":
        try:
            caption = normalise_text(decode_text(members.get("txt", b"")))
        except ValueError as error:
            raise BadSample("caption is not UTF-8", str(error)) from None
        if not caption[:1].isalnum() and not words(caption):
            raise BadSample("no caption")       # without a word it would stand for no condition
        return caption
    return None


def check_members(members, least, settings):
    """-> (condition, PIL image) of a sample's members {role: bytes}. BadSample if it cannot be
    used. least: as in decode; settings: the config's [data].
    """
    condition = check_condition(members, settings.condition, settings.classes)
    if "image" not in members:
        raise BadSample("no image")
    return condition, decode(members["image"], least)


def usable(path, prepare, least, settings, bad, notes=None):
    """Yields (Sample, {extension: payload}, condition, prepare(image)) of a tar's usable samples,
    in its order; appends (Sample, BadSample) of the others to bad.

    Threads decode ahead: Pillow lets go of the interpreter meanwhile. least, settings: as in
    check_members; notes: as in scan_tar.
    """

    def read(sample):
        try:
            for role, (_, size) in sample.members.items():
                check_size(role, size)
            members = {
                role: read_patiently(lambda: os.pread(fd, size, offset))
                for role, (offset, size) in sample.members.items()
            }
            condition, image = check_members(members, least, settings)
            return sample, members, condition, prepare(image)
        except BadSample as error:
            return sample, error

    threads = max(1, min(16, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    fd, samples, ahead = (
        os.open(path, os.O_RDONLY),
        scan_patiently(path, notes),
        collections.deque(),
    )
    try:
        with ThreadPoolExecutor(threads) as pool:
            while True:
                ahead.extend(
                    pool.submit(read, sample)
                    for sample in itertools.islice(samples, 256 - len(ahead))
                )
                if not ahead:
                    return
                result = ahead.popleft().result()
                if len(result) == 2:
                    bad.append(result)
                else:
                    yield result
    finally:
        os.close(fd)


def to_float(x):
    """uint8 pictures [B,H,W,3] -> [B,3,H,W] float32 in [-1,1]."""
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """[B,3,H,W] in [-1,1] -> uint8 [B,H,W,3]."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


# ---- a stateless shuffle ------------------------------------------------------------------------------------------

def mix(*numbers, z=0):
    """Any integers -> 64 well-mixed bits (the finaliser of splitmix64, chained). z: what others, before them, were mixed to."""
    for number in numbers:
        z = (z + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        z ^= z >> 31
    return z


@functools.lru_cache(16)
def _rounds(*key):
    """The key mixed with the number of each round of permute, in pairs."""
    return [(mix(mix(*key), r), mix(mix(*key), r + 1)) for r in range(0, 8, 2)]


def permute(i, n, *key):
    """i -> a permutation of 0..n-1, chosen by key: a Feistel network on the smallest 2^b >= n, walked until it lands below n.

    Takes no memory: eight ranks with sixteen workers each shuffle a billion samples without an array of them.
    """
    bits = max(2, (n - 1).bit_length())
    low = bits // 2
    mask_low, mask_high = (1 << low) - 1, (1 << bits - low) - 1
    rounds = _rounds(*key)
    while True:
        high, rest = i >> low, i & mask_low
        for even, odd in rounds:
            high ^= mix(rest, z=even) & mask_high
            rest ^= mix(high, z=odd) & mask_low
        i = high << low | rest
        if i < n:
            return i


def subset(total, size, *key):
    """`size` of the numbers 0..total-1 (all, if there are no more), drawn uniformly by key, sorted [n] int64: what a permutation
    makes of the first `size` numbers."""
    return np.arange(total) if size >= total else np.sort(np.array([permute(i, total, *key) for i in range(size)], np.int64))


def to_tensor(value):
    """The simplest `encode`: a class number, or an empty tensor for no condition."""
    return torch.tensor([] if value is None else value)


class TarDataset(torch.utils.data.Dataset):
    """Samples of a list of tars by *position* in an endless shuffled stream: position // len is the epoch.

    encode(condition) turns a caption or class number into a tensor; None: captions come as they are. latent: the shape of KEY.lat
    where tars have it instead of pictures; tokens (L, E): KEY.tok is there, too, and is the condition. Items are dicts of
        x        [S,S,3] uint8          the picture; with latent: [C,H,W] float32, drawn from the posterior N(mean, std^2)
        c        tensor or str          its condition (an empty tensor for none)
        k        int64                  its cluster (KEY.cluster; -1 without)
        u, drop  float32                uniform on (0,1): the time, and whether to drop the condition
        eps      noise_shape float32    N(0, I)
        post     noise_shape float32    N(0, I), for pictures: to draw from the posterior once they are encoded (if posterior)
        bad      list of (tar, name, cause), the samples that could not be used and which this one replaces
    """

    def __init__(self, tars, size, condition="none", encode=to_tensor, classes=0, seed=0, crop="center", flip=False, run=1,
                 noise_shape=None, clusters=False, posterior=False, latent=None, tokens=None):
        self.tars, self.size, self.condition, self.classes, self.seed = list(tars), size, condition, classes, seed
        self.encode, self.crop, self.flip, self.run, self.clusters = encode, crop, flip, run, clusters
        self.noise_shape, self.posterior, self.latent, self.tokens = noise_shape or (3, size, size), posterior, latent, tokens
        self.index = [index_tar(path, len(self.tars) < 50_000) for path in self.tars]       # Linux maps 65,530 files a process
        self.ends = np.cumsum([len(rows) for rows in self.index]).tolist()
        self.files = collections.OrderedDict()      # open tars, the latest last
        self.lost = set()                           # tars that have gone
        self.rng = torch.Generator()                # seeded anew for each sample

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def order(self, position):
        """Position in the stream -> number of the sample, 0..len-1. Each epoch is another permutation of runs of samples."""
        n, run = len(self), min(self.run, len(self))
        epoch, p = divmod(position, n)
        if run == 1:
            return permute(p, n, self.seed, epoch)
        whole = n // run * run      # the rest, shorter than a run, ends the epoch; where runs begin moves from epoch to epoch
        if p < whole:
            p = permute(p // run, n // run, self.seed, epoch) * run + p % run
        return (p + mix(self.seed, epoch)) % n

    def _read(self, tar, offset, size):
        """Bytes of a tar. BadSample if they cannot be read, or if the tar ends before."""
        try:
            payload = os.pread(self.files[tar], size, offset)
            self.files.move_to_end(tar)
        except (KeyError, OSError):  # not open, or in trouble
            payload = self._read_patiently(tar, offset, size)
        if len(payload) < size:
            raise BadSample("cut off")
        return payload

    def _read_patiently(self, tar, offset, size):
        """A network file system may fail once, or for a while: tried again. BadSample if it stays
        so.
        """

        def read():
            try:
                if tar not in self.files:
                    self.files[tar] = os.open(self.tars[tar], os.O_RDONLY)
                    if len(self.files) > 128:
                        os.close(self.files.popitem(last=False)[1])
                self.files.move_to_end(tar)
                return os.pread(self.files[tar], size, offset)
            except OSError:
                if tar in self.files:
                    os.close(self.files.pop(tar))  # opened anew
                if self.lost:
                    # waited for once, be it for another tar
                    raise BadSample("unreadable (still)") from None
                raise

        try:
            payload = read_patiently(read)
        except BadSample:
            self.lost.add(tar)
            raise
        self.lost.discard(tar)
        return payload

    def name(self, number):
        """The name of sample `number` as its tar has it, for reports; empty where it cannot be
        read.
        """
        tar = bisect.bisect_right(self.ends, number)
        offsets = [
            place
            for place in self.index[tar][number - (self.ends[tar - 1] if tar else 0)][
                :-1:2
            ].tolist()
            if place >= 0
        ]
        try:
            return split_name(
                tarfile.TarInfo.frombuf(
                    self._read(tar, min(offsets) - 512, 512), "utf-8", "replace"
                ).name
            )[0]
        except (BadSample, tarfile.TarError, ValueError, TypeError):
            return ""

    def members(self, number):
        """The payloads of sample `number`: {role: bytes}. BadSample if the headers before them are
        not those that were indexed.
        """
        tar = bisect.bisect_right(self.ends, number)
        row = self.index[tar][number - (self.ends[tar - 1] if tar else 0)].tolist()
        places = [place for place in zip(ROLES, row[::2], row[1::2]) if place[1] >= 0]
        for role, offset, size in places:
            check_size(role, size)
            if offset < 512:
                raise BadSample(STALE)
        members, check = {}, 0
        for role, offset, size in places:
            blocks = self._read(tar, offset - 512, size + 512)  # with the header
            members[role] = blocks[512:]
            check = (31 * check + zlib.crc32(blocks[:512])) & 0xFFFFFFFF
        if check != row[-1]:
            raise BadSample(STALE)
        return members

    def sample(self, number):
        """-> (PIL image or latents [flips,1 or 2,C,H,W] f16, condition, cluster) of sample `number`. BadSample if it cannot be used."""
        members = self.members(number)
        condition = check_condition(members, self.condition, self.classes)
        number = members.get("cluster", b"").strip()
        cluster = int(number) if number.isdigit() else -1
        if self.clusters and cluster < 0:
            raise BadSample("no cluster")
        for role in ["lat" if self.latent else "image"] + ["tok"] * bool(self.tokens):
            if role not in members:
                raise BadSample(f"no {role}")
        if self.tokens:
            condition = np.zeros(self.tokens, np.float16)       # rows of zeros: no token
            if len(members["tok"]) % (2 * self.tokens[1]) or len(members["tok"]) > condition.nbytes:
                raise BadSample(f"{len(members['tok'])} bytes of token features")
            features = np.frombuffer(members["tok"], np.float16)
            condition.reshape(-1)[:len(features)] = features
            condition = torch.from_numpy(condition)
        elif self.encode:
            condition = self.encode(condition)
        if not self.latent:
            return decode(members["image"], self.size), condition, cluster
        if len(members["lat"]) != 2 * math.prod(self.latent):
            raise BadSample(f"{len(members['lat'])} bytes of latents")
        latents = torch.frombuffer(bytearray(members["lat"]), dtype=torch.float16).view(self.latent)
        if not math.isfinite(latents.sum(dtype=torch.float32)):
            raise BadSample("latents that are not finite")
        return latents, condition, cluster

    def __getitem__(self, position):
        bad, number = [], self.order(position)
        while True:
            try:
                image, condition, cluster = self.sample(number)
                break
            except BadSample as error:
                bad.append((self.tars[bisect.bisect_right(self.ends, number)], self.name(number) or f"sample {number}", str(error)))
            if len(bad) > 100:
                raise UserError(f"a hundred samples in a row cannot be used, the last: {found.printable(': '.join(bad[-1]))}; "
                                f"{describe_samples(bad[-1][0], bad[-1][2], self.condition)}")
            number = mix(self.seed, position, len(bad)) % len(self)
        # All that is random about a training sample, always drawn in this order: it depends on nothing but (seed, position).
        # (torch draws normal numbers twice as fast as numpy does, and they are most of the work on a sample of latents. Its generator takes 32 bits
        # of the seed: positions that agree in these, pairs of different pictures, share their numbers.)
        self.rng.manual_seed(mix(self.seed, position))
        mirror, left, top, u, drop = torch.rand(5, generator=self.rng, dtype=torch.float64).tolist()
        noise = torch.randn((1 + self.posterior, *self.noise_shape), generator=self.rng)
        mirror = self.flip and mirror < 0.5
        if self.latent:
            x = image[int(mirror)].float()      # mean, std; or the latents alone
            x = torch.addcmul(x[0], x[1], noise[1]) if self.posterior else x[0]
        else:
            x = torch.from_numpy(square(image, self.size, (left, top) if self.crop == "random" else (0.5, 0.5), mirror).copy())
        u = min(max(u, 1e-6), 1 - 1e-6)
        item = {"x": x, "c": condition, "k": cluster, "u": u, "drop": drop, "eps": noise[0], "bad": bad}
        return item | {"post": noise[1]} if self.posterior and not self.latent else item


def collate(items):
    """Items of TarDataset -> one dict of batched tensors; `bad` is the list of all of theirs, captions stay a list of str."""
    batch = {key: torch.stack([item[key] for item in items]) for key in ("x", "eps", "post") if key in items[0]}
    batch["c"] = [item["c"] for item in items] if isinstance(items[0]["c"], str) else torch.stack([item["c"] for item in items])
    batch |= {key: torch.tensor([item[key] for item in items], dtype=torch.float32) for key in ("u", "drop")}
    return batch | {"k": torch.tensor([item["k"] for item in items]), "bad": [b for item in items for b in item["bad"]]}


# ---- pictures of pictures -----------------------------------------------------------------------------------------

COLOURS = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#edc948", "#76b7b2", "#ff9da7", "#9c755f", "#888888"]


@functools.lru_cache
def label_font(size):
    """The font of labels: DejaVu Sans, which matplotlib carries, has Latin, Greek, Cyrillic; without it Pillow's own."""
    package = importlib.util.find_spec("matplotlib")
    for folder in package.submodule_search_locations if package else []:
        path = os.path.join(folder, "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")
        with contextlib.suppress(OSError):
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)


def cut_label(text, font, width):
    """The text, or as much of its beginning, with dots behind it, as `width` pixels hold."""
    if len(text) <= width and font.getlength(text) <= width:
        return text
    text = text[:width]     # a thousand words need not be set to see that they are too long
    fits = bisect.bisect_right(range(len(text) + 1), width,
                               key=lambda n: font.getlength(text[:n] + "..."))
    return text[:max(0, fits - 1)].rstrip() + "..."


def picture_grid(rows, captions=None, frames=None):
    """rows of pictures ([H,W,3] uint8) -> one PIL image, captions at the left; frames: the same rows of cluster numbers.

    Small pictures are enlarged by a whole factor to about 64 pixels. Captions are cut to the width of four.
    More than a dozen rows stand in two columns, many more in as many as make the sheet about as wide as high.
    """
    columns = 1
    if len(rows) > 12:
        across = max(map(len, rows)) + 4 * bool(captions)
        columns = max(2, round((1.2 * len(rows) / across) ** 0.5))
    height, parts = -(-len(rows) // columns), []
    for first in range(0, len(rows), height):
        cut = slice(first, first + height)
        parts.append(_grid_column(rows[cut], captions and captions[cut], frames and frames[cut]))

    size = sum(part.width for part in parts), max(part.height for part in parts)
    sheet = Image.new("RGB", size, "white")
    left = 0
    for part in parts:
        sheet.paste(part, (left, 0))
        left += part.width
    return sheet


def _grid_column(rows, captions, frames):
    """picture_grid's rows below each other."""
    side = rows[0][0].shape[0]
    scale = max(1, round(64 / side))
    side, gap, margin = side * scale, 6, 6
    if captions:
        font = label_font(12)
        captions = [cut_label(caption, font, min(400, 4 * (side + gap))) for caption in captions]
        margin += gap + math.ceil(max(map(font.getlength, captions)))
    label = 16 if frames else 0
    sheet = Image.new("RGB", (margin + max(map(len, rows)) * (side + gap), gap + len(rows) * (side + label + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        y = gap + r * (side + label + gap)
        if captions:
            draw.text((gap, y + side // 2), captions[r], "black", font, anchor="lm")
        for i, pixels in enumerate(row):
            x = margin + i * (side + gap)
            sheet.paste(Image.fromarray(np.asarray(pixels)).resize((side, side), Image.Resampling.NEAREST), (x, y))
            if frames and frames[r][i] is not None:
                colour = COLOURS[frames[r][i] % len(COLOURS)]
                draw.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline=colour, width=2)
                name = cut_label(f"expert {frames[r][i]}", label_font(11), side + gap)
                draw.text((x, y + side + 2), name, colour, label_font(11))
    return sheet


# ---- the embedded demo set ----------------------------------------------------------------------------------------

SHAPE_COLOURS = {"red": (230, 30, 30), "green": (30, 190, 50), "blue": (40, 70, 235),
                 "yellow": (240, 220, 30), "purple": (150, 40, 200), "white": (245, 245, 245)}
SHAPES = ("circle", "square", "triangle", "cross")


def draw_shape(rng, size):
    """One captioned picture of the demo set: -> (PIL image, caption). Drawn eight times too large, so that edges are smooth."""
    big = 8 * size
    colour, shape = rng.choice(list(SHAPE_COLOURS)), rng.choice(SHAPES)
    r = big * rng.uniform(0.26, 0.42)
    x, y = rng.uniform(r, big - r, 2)
    image = Image.new("RGB", (big, big), tuple(int(v) for v in rng.integers(0, 50, 3)))
    draw = ImageDraw.Draw(image)
    fill = tuple(int(v) for v in np.clip(np.array(SHAPE_COLOURS[colour]) + rng.integers(-10, 11, 3), 0, 255))
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill)
    elif shape == "square":
        draw.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill)
    else:
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill)
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill)
    return image.resize((size, size), Image.Resampling.BOX), f"a {colour} {shape}"


def drawn(images, size, seed):
    """Yields (key, {extension: payload}) of the demo set."""
    for i in range(images):
        image, caption = draw_shape(np.random.default_rng([seed, i]), size)
        png = io.BytesIO()
        image.save(png, "PNG")
        yield f"{i:09d}", {"png": png.getvalue(), "txt": caption.encode()}


def imagenet(path):
    """Yields (key, {extension: payload}) of ILSVRC2012_img_train.tar, a tar of one tar a class; classes are numbered in their names' order."""
    try:
        with tarfile.open(path, "r:") as outer:
            names = sorted(m.name for m in outer if m.isfile() and m.name.endswith(".tar"))
            for number, name in enumerate(names):
                with tarfile.open(fileobj=outer.extractfile(name), mode="r:") as inner:
                    for m in inner:
                        yield os.path.basename(m.name).partition(".")[0], {"jpg": inner.extractfile(m).read(), "cls": str(number).encode()}
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"--imagenet {path}: {error}; the file is ImageNet's own ILSVRC2012_img_train.tar") from None
    if not names:
        raise UserError(f"--imagenet {path} holds no tars of classes; the file is ImageNet's own ILSVRC2012_img_train.tar")


def main():
    parser = make_parser(__doc__, [], run=False)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the tars")
    parser.add_argument("--images", type=int, metavar="N", help="pictures to draw (default: 6000)")
    parser.add_argument("--size", type=int, metavar="S", help="pixels a side (default: 32)")
    parser.add_argument("--seed", type=int, metavar="N", help="default: 0")
    parser.add_argument("--imagenet", metavar="TAR", help="instead of drawing: ILSVRC2012_img_train.tar, to shards of KEY.jpg and KEY.cls")
    parser.add_argument("--per-tar", type=int, metavar="N", help="pictures a tar (default: 1000, of ImageNet 10000)")
    args, _ = parse(parser)
    if args.imagenet and (args.images, args.size, args.seed) != (None, None, None):
        raise UserError("--images, --size and --seed belong to the drawn set, --imagenet copies pictures as they are")
    images, size, seed = (default if value is None else value for value, default in ((args.images, 6000), (args.size, 32), (args.seed, 0)))
    per_tar = args.per_tar if args.per_tar is not None else 10000 if args.imagenet else 1000
    if min(images, size, per_tar) < 1 or seed < 0:
        raise UserError(f"--images {images}, --size {size} and --per-tar {per_tar} must be at least 1, --seed {seed} at least 0")
    names = {f"{i:05d}.tar" for i in range(-(-images // per_tar))} if not args.imagenet else set()
    there = os.listdir(args.out) if os.path.isdir(args.out) else []
    if other := sorted(name for name in there if name.endswith(".tar") and name not in names):
        raise UserError(f"{args.out} holds {len(other)} other tars, {other[0]} the first, which would count as part of the set: use another --out, "
                        f"or delete them")
    samples = imagenet(args.imagenet) if args.imagenet else drawn(images, size, seed)
    samples = iter(progress(samples, desc="writing", unit=" images", total=None if args.imagenet else images))
    number, count, classes = 0, 0, set()
    for first in samples:
        with TarWriter(os.path.join(args.out, f"{number:05d}.tar")) as tar:
            for key, members in itertools.chain([first], itertools.islice(samples, per_tar - 1)):
                for extension, payload in members.items():
                    tar.add(f"{key}.{extension}", payload)
                count, classes = count + 1, classes | {members.get("cls")}
        number += 1
    print(f"{count} pictures" + (f" of {len(classes)} classes" if args.imagenet else "") + f" in {args.out}")


if __name__ == "__main__":
    script(main)
