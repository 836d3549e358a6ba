"""Tar shards in and out, and the embedded demo set.

    python data.py --out data/shapes --images 6000 --size 16                      # draws captioned coloured shapes
    python data.py --out data/imagenet --imagenet ILSVRC2012_img_train.tar        # ImageNet's own tar to shards with classes

A shard is a tar as img2dataset writes it: the members of one sample stand together and share the name up to the first dot,
KEY.jpg|png|webp, KEY.txt (caption), KEY.json, KEY.cls (class number); cache_latents.py's have KEY.lat (latents) instead of the picture.
Of several images of one key the first of IMAGE_TYPES is taken; names that begin with a dot are no samples.
TarDataset indexes each tar once (offsets, kept beside it as NAME.tar.idx, memory-mapped) and then reads any sample by its position, so that

    position -> sample       is a stateless shuffle: every sample once an epoch, over any number of ranks and workers,
    position -> randomness   (crop, mirror, t, noise, dropped condition) is a generator seeded by (seed, position),

and a resume is just a first position. A sample that cannot be read is counted and its slot filled by another one.
"""
import bisect
import collections
import functools
import io
import itertools
import math
import os
import re
import struct
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from ddm import found
from ddm.errors import UserError
from ddm.files import atomic, decode_text
from ddm.process import cores
from ddm.tars import (
    BadSample,
    STALE,
    describe_samples,
    read_patiently,
    scan_patiently,
    scan_tar,
    split_name,
)
from ddm.text import normalise_text, words


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")      # whatever the name says; not EPS, for which Pillow starts Ghostscript
ROLES = ("image", "txt", "cls", "cluster", "lat", "tok")        # the members of a sample that training reads
INDEX_VERSION = 3
LIMITS = {"image": 1 << 28, "txt": 1 << 20, "cls": 64, "cluster": 64}      # bytes of a member, looked at before it is read; of others 1 GB


def check_size(role, size):
    if size > LIMITS.get(role, 1 << 30):
        raise BadSample(f"{role} too large", f"{size} bytes")
    if size < 0:
        raise BadSample(STALE)


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
