"""Tar shards in and out, and the embedded demo set.

    python data.py --out data/shapes --images 6000 --size 16                      # draws captioned coloured shapes
    python data.py --out data/imagenet --imagenet ILSVRC2012_img_train.tar        # ImageNet's own tar to shards with classes

A shard is a tar as img2dataset writes it: the members of one sample stand together and share the name up to the first dot,
KEY.jpg|png|webp, KEY.txt (caption), KEY.json, KEY.cls (class number); pretrained.py's have KEY.lat (latents) instead of the picture.
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
import math
import os
import re
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common import UserError, atomic, cores, make_parser, parse, progress, script

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")      # whatever the name says; not EPS, for which Pillow starts Ghostscript
ROLES = ("image", "txt", "cls", "cluster", "lat", "tok")        # the members of a sample that training reads
INDEX_VERSION = 2
RETRY = (1, 5, 30)      # seconds until a failed read is tried again
LIMITS = {"image": 1 << 28, "txt": 1 << 20, "cls": 64, "cluster": 64}      # bytes of a member, looked at before it is read; of others 1 GB


class BadSample(Exception):
    """A sample that cannot be used; the message is the cause."""


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
        raise BadSample(f"{role} too large")


# ---- tars ---------------------------------------------------------------------------------------------------------

@dataclass
class Sample:
    key: str
    start: int                                      # its members' bytes in the tar, headers and padding included
    end: int = 0
    members: dict = field(default_factory=dict)     # role or extension -> (offset, size) of the payload


class _Header(tarfile.TarInfo):
    """A header that may not be longer than any name or time that is meant well: tarfile's patterns take minutes over a megabyte of digits."""

    def _proc_member(self, tar):
        if self.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK) and self.size > 1 << 14:
            raise tarfile.ReadError("a header is too long")
        return super()._proc_member(tar)


def scan_tar(path):
    """Yields the Samples of a tar in its order, reading headers only. A tar that is cut short, or damaged, gives its whole samples before that and a warning.

    A second member of the same name begins another sample. Nothing is ever extracted: names are names, not paths.
    """
    sample, torn, names = None, "it does not end as a tar does", set()
    size = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:", tarinfo=_Header) as tar:
            for member in tar:
                tar.members = []        # tarfile would keep them all
                if member.size < 0 or tar.offset <= member.offset:      # it would read in circles
                    raise tarfile.ReadError("a member has an impossible size")
                if not member.isfile() or member.issparse():        # of a sparse file the tar holds other bytes than its size says
                    continue
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                key, extension = os.path.join(folder, stem), extension.lower()
                if sample is None or sample.key != key or extension in names:
                    if sample is not None:
                        yield sample
                    sample, names = Sample(key, start=member.offset), set()
                names.add(extension)
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("a member is cut off")
                sample.members["image" if extension in IMAGE_TYPES else extension] = (member.offset_data, member.size)
                sample.end = member.offset_data + -(-member.size // 512) * 512
            tar.fileobj.seek(tar.offset)
            rest = tar.fileobj.read(1 << 20)        # nothing but empty blocks: a hole, or another tar, would end it, too
            if len(rest) >= 512 and rest.count(0) == len(rest):
                torn = ""
    except OSError:
        raise       # the file system's fault, not the tar's: what is read now would pass for the whole
    except Exception as error:      # tarfile raises more than its own kinds on a hostile header
        torn = str(error) or type(error).__name__
    if torn:    # the last sample may lack members: not whole
        print(f"warning: {path}: {torn}; its whole samples are used", file=sys.stderr)
    elif sample is not None:
        yield sample


def find_tars(patterns):
    """{name: path} of the tars that the patterns match, sorted by name."""
    tars = {}
    for path in sorted({p for pattern in patterns for p in glob.glob(os.path.expanduser(pattern)) if p.endswith(".tar")}):
        name = os.path.basename(path)[:-4]
        if name in tars:
            raise UserError(f"two tars are named {name}.tar: {tars[name]} and {path}; shards are named after them, so rename one")
        tars[name] = path
    if not tars:
        folder = next((pattern for pattern in patterns if os.path.isdir(os.path.expanduser(pattern))), None)
        raise UserError(f"no tar matches --data {' '.join(patterns)}" + (f": a folder; did you mean '{os.path.join(folder, '*.tar')}'?" if folder else ""))
    return dict(sorted(tars.items()))


class TarWriter:
    """Writes a tar beside its place and renames it there on a clean exit. Members are written as they are: no times, no owners."""

    def __init__(self, path):
        self._atomic = atomic(path)

    def __enter__(self):
        self.file, self.digest, self.bytes = open(self._atomic.__enter__(), "wb"), hashlib.sha256(), 0
        return self

    def __exit__(self, *error):
        if error[0] is None:
            self._write(bytes(1024))    # a tar ends in two empty blocks
        self.file.close()
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


def index_tar(path, mapped=True):
    """[n, 2 * len(ROLES)] int64: offset and size of each sample's members, in the order of ROLES; -1 where there is none.

    Made once and kept beside the tar, as long as the tar's size and date stay. mapped: memory-mapped, so that all ranks share it.
    """
    stat, file, width = os.stat(path), f"{path}.idx", 2 * len(ROLES)
    head = np.array([INDEX_VERSION, stat.st_size, stat.st_mtime_ns] + [0] * (width - 3), np.int64)
    if os.path.exists(file) and (rows := os.path.getsize(file) // (8 * width)):
        # torch maps a file without keeping it open: a run may have more tars than a process may have open files
        table = torch.from_file(file, size=rows * width, dtype=torch.int64).numpy() if mapped else np.fromfile(file, np.int64)
        table = table[:rows * width].reshape(rows, width)
        if np.array_equal(table[0], head):
            return table[1:]
    try:
        rows = read_patiently(lambda: [[x for role in ROLES for x in s.members.get(role, (-1, -1))] for s in scan_tar(path)])
    except BadSample as error:
        raise UserError(f"{path} is {error}", local=True) from None
    table = np.array(rows, np.int64).reshape(-1, width)
    try:
        with atomic(file) as temporary:
            np.concatenate([head[None], table]).tofile(temporary)
    except OSError:
        pass    # a read-only folder: indexed again next time
    return table


# ---- images -------------------------------------------------------------------------------------------------------

def decode(payload, least=0):
    """Bytes of a picture -> PIL image, RGB, upright, transparency on white. BadSample if it cannot be decoded.

    least: a JPEG may be decoded at a fraction of its size, as long as its sides stay this long.
    """
    try:
        image = Image.open(io.BytesIO(payload), formats=FORMATS)
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:     # Pillow would only warn, up to twice as many
            raise Image.DecompressionBombError
        if least:
            image.draft("RGB", (least, least))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):      # 16 bits, which Pillow would cut off at 255
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:      # Pillow's decoders raise whatever they like
        raise BadSample(f"undecodable ({type(error).__name__})") from None


def square(image, size, where=(0.5, 0.5), mirror=False):
    """The square of a PIL image at `where` (0..1 in x and y; the middle by default), resized -> [size,size,3] uint8."""
    side = min(image.size)
    left, top = (image.width - side) * where[0], (image.height - side) * where[1]
    image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image)


def check_condition(members, condition, classes=0):
    """The condition of a sample from its members {role: bytes}: None, a class number or a caption. BadSample if it is missing."""
    if condition == "class":
        try:
            label = int(members.get("cls", b""))
        except ValueError:
            raise BadSample("no class") from None
        if not 0 <= label < classes:
            raise BadSample(f"class outside data.classes = {classes}")
        return label
    if condition == "text":
        caption = members.get("txt", b"").decode(errors="replace").strip()
        if not re.search(r"\w", caption):
            raise BadSample("no caption")       # without a word it would stand for no condition
        return caption
    return None


def usable(path, prepare, least, settings, bad):
    """Yields (Sample, {extension: payload}, condition, prepare(image)) of a tar's usable samples, in its order; appends (key, cause) of the others to bad.

    Threads decode ahead: Pillow lets go of the interpreter meanwhile. least: as in decode; settings: the config's [data].
    """
    def read(sample):
        try:
            for role, (_, size) in sample.members.items():
                check_size(role, size)
            members = {role: read_patiently(lambda: os.pread(fd, size, offset)) for role, (offset, size) in sample.members.items()}
            condition = check_condition(members, settings.condition, settings.classes)
            if "image" not in members:
                raise BadSample("no image")
            return sample, members, condition, prepare(decode(members["image"], least))
        except BadSample as error:
            return sample.key, str(error)

    threads = max(1, min(16, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    fd, samples, ahead = os.open(path, os.O_RDONLY), scan_tar(path), collections.deque()
    try:
        with ThreadPoolExecutor(threads) as pool:
            while True:
                ahead.extend(pool.submit(read, sample) for sample in itertools.islice(samples, 256 - len(ahead)))
                if not ahead:
                    return
                found = ahead.popleft().result()
                if len(found) == 2:
                    bad.append(found)
                else:
                    yield found
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
        """Bytes of a tar. A network file system may fail once, or for a while: tried again. BadSample if it stays so, or if the tar ends before."""
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
                    os.close(self.files.pop(tar))       # opened anew
                if self.lost:
                    raise BadSample("unreadable (still)") from None     # waited for once, be it for another tar
                raise

        try:
            payload = read_patiently(read)
        except BadSample:
            self.lost.add(tar)
            raise
        self.lost.discard(tar)
        if len(payload) < size:
            raise BadSample("cut off")
        return payload

    def name(self, number):
        """The name of sample `number` as its tar has it, for reports; empty where it cannot be read."""
        tar = bisect.bisect_right(self.ends, number)
        offsets = [place for place in self.index[tar][number - (self.ends[tar - 1] if tar else 0)][::2].tolist() if place >= 0]
        try:
            folder, name = os.path.split(tarfile.TarInfo.frombuf(self._read(tar, min(offsets) - 512, 512), "utf-8", "replace").name)
            return os.path.join(folder, name.partition(".")[0])
        except (BadSample, tarfile.TarError, ValueError):
            return ""

    def members(self, number):
        """The payloads of sample `number`: {role: bytes}."""
        tar = bisect.bisect_right(self.ends, number)
        row = self.index[tar][number - (self.ends[tar - 1] if tar else 0)].reshape(-1, 2).tolist()
        for role, (_, size) in zip(ROLES, row):
            check_size(role, size)
        return {role: self._read(tar, *place) for role, place in zip(ROLES, row) if place[0] >= 0}

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
                raise UserError(f"a hundred samples in a row cannot be used, the last: {': '.join(bad[-1])}")
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
