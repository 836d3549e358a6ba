"""Tar shards -> training samples: index, shuffle, decode.

A shard is a tar as img2dataset writes it: the members of one sample stand together, and share the
name up to the first dot.

    KEY.jpg|jpeg|png|webp|bmp    the image (of several the first in this order)
    KEY.txt  KEY.cls             its caption; its class number
    KEY.cluster                  its cluster, in the router's shard
    KEY.lat  KEY.tok             its latents and token features, which cache_latents.py makes

TarDataset turns a *position* in an endless stream into a training sample:

    position -> number           a stateless shuffle: every sample once an epoch, over any number of
                                 ranks and workers
    number   -> bytes            an index, made once, says where in which tar they are
    bytes    -> sample           decoded, cropped, mirrored

What is random about a sample (crop, mirror, t, noise, dropped condition) comes from a generator
seeded by (seed, position). So a resume is just a first position. A sample that cannot be read is
counted, and its slot filled by another one.
"""
import bisect
import collections
import contextlib
import functools
import io
import itertools
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from ddm import found
from ddm.errors import UserError
from ddm.files import atomic, decode_text
from ddm.process import cores, local_world
from ddm.tars import (
    BLOCK,
    STALE,
    BadSample,
    TarFiles,
    describe_samples,
    read_key,
    retry_io,
    scan_tar,
    scan_with_retries,
)
from ddm.text import normalise_text, words

# ---- index: where in its tar each sample is ------------------------------------------------------

# the members of a sample that training reads
ROLES = ("image", "txt", "cls", "cluster", "lat", "tok")

# A row of the index: offset and size of each role's payload (-1 where there is none), and the
# checksum of their headers.
INDEX_COLUMNS = 2 * len(ROLES) + 1
INDEX_VERSION = 3


def index_tar(path, mapped=True):
    """The index of a tar's samples, in its order: [n, INDEX_COLUMNS] int64.

    Made once and kept beside the tar as NAME.tar.idx, as long as the tar's size and date stay.
    mapped: memory-mapped, so that all ranks share it.
    """
    file = f"{path}.idx"
    tar = os.stat(path)
    # the file's first row, which says what the others are the index of
    head = np.zeros(INDEX_COLUMNS, np.int64)
    head[:3] = INDEX_VERSION, tar.st_size, tar.st_mtime_ns

    existing = _read_index(file, mapped)
    if existing is not None and np.array_equal(existing[0], head):
        return existing[1:]

    try:
        rows = retry_io(_scan_rows, path)
    except BadSample as error:
        raise UserError(f"{path} is {error}", local=True) from None
    rows = np.array(rows, np.int64).reshape(-1, INDEX_COLUMNS)

    try:
        with atomic(file) as temporary:
            np.concatenate([head[None], rows]).tofile(temporary)
    except OSError:
        # a read-only folder: indexed again next time
        pass
    return rows


def _read_index(file, mapped):
    """What is in an index file [1 + n, INDEX_COLUMNS]: its head, and the rows. None without one."""
    if not os.path.exists(file):
        return None
    rows = os.path.getsize(file) // (8 * INDEX_COLUMNS)
    if rows == 0:
        return None

    size = rows * INDEX_COLUMNS
    if mapped:
        # torch keeps no file open for it: a run may have more tars than a process may open files
        numbers = torch.from_file(file, size=size, dtype=torch.int64).numpy()
    else:
        numbers = np.fromfile(file, np.int64, count=size)
    return numbers.reshape(rows, INDEX_COLUMNS)


def _scan_rows(path):
    rows = []
    for sample in scan_tar(path):
        row = []
        for role in ROLES:
            row += sample.members.get(role, (-1, -1))
        crcs = [sample.header_crcs[role] for role in ROLES if role in sample.members]
        rows.append([*row, checksum(crcs)])
    return rows


def checksum(crcs):
    """One number for the CRC-32 of each member's header, in the order of ROLES.

    Whatever is read is compared with it: a tar that was replaced gives no other sample's bytes.
    """
    total = 0
    for crc in crcs:
        total = (31 * total + crc) & 0xFFFFFFFF
    return total


# ---- shuffle: a permutation without memory -------------------------------------------------------

def mix(*numbers, state=0):
    """Any integers -> 64 well-mixed bits (the finaliser of splitmix64, chained).

    state: what other numbers, before these, were mixed to.
    """
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


def permute(i, n, *key):
    """Where a permutation of 0..n-1, chosen by key, sends i.

    A Feistel network on the smallest 2^b >= n; what lands at n or above goes through it again.
    Takes no memory: eight ranks with sixteen workers each shuffle a billion samples without an
    array of them.
    """
    bits = max(2, (n - 1).bit_length())
    # a number's two halves, which each change the other in turn
    low_bits = bits // 2
    low_mask = (1 << low_bits) - 1
    high_mask = (1 << bits - low_bits) - 1

    while True:
        high = i >> low_bits
        low = i & low_mask
        for first, second in _round_keys(*key):
            high ^= mix(low, state=first) & high_mask
            low ^= mix(high, state=second) & low_mask
        i = high << low_bits | low
        if i < n:
            return i


@functools.lru_cache(16)
def _round_keys(*key):
    """The key mixed with the number of each of permute's eight rounds, in pairs."""
    state = mix(*key)
    return [(mix(state, r), mix(state, r + 1)) for r in range(0, 8, 2)]


def subset(total, size, *key):
    """`size` of the numbers 0..total-1 (all, if there are no more), drawn uniformly by key.

    Sorted, [size] int64: what a permutation makes of the first `size` numbers.
    """
    if size >= total:
        return np.arange(total)
    drawn = [permute(i, total, *key) for i in range(size)]
    return np.sort(np.array(drawn, np.int64))


# ---- decode: bytes to pixels, captions and classes -----------------------------------------------

# Whatever the name says. Not EPS, for which Pillow starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")

# what undoes EXIF's orientation
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(payload, least=0):
    """Bytes of an image -> PIL image: RGB, upright, transparency on white.

    least: a JPEG may be decoded at a fraction of its size, as long as its sides stay this long.
    BadSample if it cannot be decoded. Metadata that Pillow refuses costs no image.
    """
    try:
        return _decode(payload, least)
    except Exception as error:
        # Pillow's decoders raise whatever they like, and say at which address an object was: <...>
        detail = re.sub(r" ?<.*>", "", " ".join(str(error).split()))
        bad = BadSample(f"undecodable ({type(error).__name__})", detail[:200])

    bare = strip_metadata(payload)
    if bare != payload:
        with contextlib.suppress(Exception):
            return _decode(bare, least)
    raise bad


def _decode(payload, least):
    image = Image.open(io.BytesIO(payload), formats=FORMATS)
    # Pillow would only warn, up to twice as many
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    # JPEGs alone
    if least:
        image.draft("RGB", (least, least))
    image.load()

    turn = None
    # EXIF that cannot be read says nothing of an orientation
    with contextlib.suppress(Exception):
        turn = UPRIGHT.get(image.getexif().get(EXIF_ORIENTATION))
    if turn is not None:
        image = image.transpose(turn)

    # 16 bits, which Pillow would cut off at 255
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def square(image, size, where=(0.5, 0.5), mirror=False):
    """A square of a PIL image, as large as it allows, resized -> [size,size,3] uint8.

    where: in x and y, from 0 (left, top) to 1; the middle by default.
    """
    side = min(image.size)
    left = (image.width - side) * where[0]
    top = (image.height - side) * where[1]
    box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    if mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def to_float(x):
    """uint8 images [B,H,W,3] -> [B,3,H,W] float32 in [-1,1]."""
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """[B,3,H,W] in [-1,1] -> uint8 [B,H,W,3]."""
    x = (x.float().clamp(-1, 1) + 1) * 127.5
    return x.round().to(torch.uint8).permute(0, 2, 3, 1)


def check_condition(members, condition, classes=0):
    """The condition of a sample from its members {role: bytes}: None, a class number or a caption.

    BadSample if it is missing, or is none.
    """
    if condition == "class":
        return _read_class(members, classes)
    if condition == "text":
        return _read_caption(members)
    return None


def _read_class(members, classes):
    payload = members.get("cls", b"")
    if not payload.strip():
        raise BadSample("no class")
    label = None
    try:
        text = decode_text(payload).strip()
        # int() alone would take 1_000, too
        if re.fullmatch(r"[+-]?[0-9]+", text):
            label = int(text)
    except ValueError:
        # no text, or a number of thousands of digits
        text = repr(payload)[2:-1]
    if label is None:
        raise BadSample("class is no number", f"KEY.cls is {text[:40]!r}")
    if not 0 <= label < classes:
        raise BadSample(f"class outside data.classes = {classes}", f"KEY.cls is {label}")
    return label


def _read_caption(members):
    try:
        caption = normalise_text(decode_text(members.get("txt", b"")))
    except ValueError as error:
        raise BadSample("caption is not UTF-8", str(error)) from None
    # without a word it would stand for no condition
    if not caption[:1].isalnum() and not words(caption):
        raise BadSample("no caption")
    return caption


def _read_cluster(members):
    """The number of a sample's cluster; -1 without one."""
    payload = members.get("cluster", b"").strip()
    return int(payload) if payload.isdigit() else -1


def _read_latents(members, shape):
    """KEY.lat -> tensor of `shape`, float16."""
    payload = require(members, "lat")
    if len(payload) != 2 * math.prod(shape):
        raise BadSample(f"{len(payload)} bytes of latents")
    latents = torch.frombuffer(bytearray(payload), dtype=torch.float16).view(shape)
    if not math.isfinite(latents.sum(dtype=torch.float32)):
        raise BadSample("latents that are not finite")
    return latents


def _read_tokens(members, shape):
    """KEY.tok -> token features [L,E] float16, of which rows of zeros are no token."""
    payload = require(members, "tok")
    features = np.zeros(shape, np.float16)
    if len(payload) % (2 * shape[1]) or len(payload) > features.nbytes:
        raise BadSample(f"{len(payload)} bytes of token features")
    features.reshape(-1)[:len(payload) // 2] = np.frombuffer(payload, np.float16)
    return torch.from_numpy(features)


def require(members, role):
    if role not in members:
        raise BadSample(f"no {role}")
    return members[role]


# Bytes of a member, looked at before it is read. Others: 1 GB.
LIMITS = {"image": 1 << 28, "txt": 1 << 20, "cls": 64, "cluster": 64}


def check_size(role, size):
    if size > LIMITS.get(role, 1 << 30):
        raise BadSample(f"{role} too large", f"{size} bytes")


# ---- samples -------------------------------------------------------------------------------------

def to_tensor(condition):
    """The simplest `encode`: a class number, or an empty tensor for no condition."""
    return torch.tensor([] if condition is None else condition)


class TarDataset(torch.utils.data.Dataset):
    """Samples of a list of tars by *position* in an endless shuffled stream.

    position // len is the epoch. Items are dicts of

        x        [S,S,3] uint8          the image; with latent: [C,H,W] float32, drawn from the
                                        posterior N(mean, std^2)
        c        tensor or str          its condition (an empty tensor for none)
        k        int                    its cluster (-1 without)
        u        float                  uniform on (0,1): for the time
        drop     float                  uniform on (0,1): whether to drop the condition
        eps      noise_shape float32    N(0, I)
        post     noise_shape float32    N(0, I), for images that are encoded later, if posterior
        bad      [(tar, name, cause)]   the samples that could not be used, which this one replaces

    condition      "none", "class" or "text"
    encode         caption or class number -> tensor; None: captions come as they are
    classes        class numbers are below it
    crop           "center" or "random"
    flip           mirror half of them
    shuffle_block  so many consecutive samples stay together
    noise_shape    of eps; (3, size, size) by default
    clusters       each sample must say its cluster
    posterior      x (or the image's latents, later) is drawn from the autoencoder's posterior
    latent         shape of KEY.lat, which is there instead of the image: [flips, moments, C, H, W];
                   flips: 2 with the mirrored image's; moments: 2 for mean and std
    tokens         (L, E): KEY.tok is there, too, and is the condition [L,E]
    """

    def __init__(
        self,
        tars: Iterable[str],
        size: int,
        condition: str = "none",
        *,
        encode: Callable | None = to_tensor,
        classes: int = 0,
        seed: int = 0,
        crop: str = "center",
        flip: bool = False,
        shuffle_block: int = 1,
        noise_shape: tuple[int, int, int] | None = None,
        clusters: bool = False,
        posterior: bool = False,
        latent: tuple[int, ...] | None = None,
        tokens: tuple[int, int] | None = None,
    ):
        self.tars = list(tars)
        self.size = size
        self.condition = condition
        self.encode = encode
        self.classes = classes
        self.seed = seed
        self.crop = crop
        self.flip = flip
        self.shuffle_block = shuffle_block
        self.noise_shape = noise_shape or (3, size, size)
        self.clusters = clusters
        self.posterior = posterior
        self.latent = latent
        self.tokens = tokens

        # Linux maps 65,530 files a process
        mapped = len(self.tars) < 50_000
        self.index = [index_tar(path, mapped) for path in self.tars]
        # number of each tar's first sample; and of all samples, at the end
        self.starts = np.cumsum([0] + [len(rows) for rows in self.index]).tolist()
        self.files = TarFiles()
        # seeded anew for each sample
        self.rng = torch.Generator()

    def __len__(self):
        return self.starts[-1]

    def __getitem__(self, position):
        image, condition, cluster, bad = self._usable_sample(position)

        # All that is random about a training sample, always drawn in this order: it depends on
        # nothing but (seed, position). torch draws normal numbers twice as fast as numpy does, and
        # they are most of the work on a sample of latents. Its generator takes 32 bits of the seed:
        # positions that agree in these, pairs of different images, share their numbers.
        self.rng.manual_seed(mix(self.seed, position))
        uniform = torch.rand(5, generator=self.rng, dtype=torch.float64)
        mirror, left, top, u, drop = uniform.tolist()
        noise = torch.randn((1 + self.posterior, *self.noise_shape), generator=self.rng)

        mirror = self.flip and mirror < 0.5
        if self.latent:
            moments = image[int(mirror)].float()
            # without a posterior the autoencoder is deterministic: there is but the latent itself
            x = moments[0]
            if self.posterior:
                mean, std = moments.unbind()
                x = torch.addcmul(mean, std, noise[1])
        else:
            where = (left, top) if self.crop == "random" else (0.5, 0.5)
            x = torch.from_numpy(square(image, self.size, where, mirror).copy())

        item = {
            "x": x,
            "c": condition,
            "k": cluster,
            "u": min(max(u, 1e-6), 1 - 1e-6),
            "drop": drop,
            "eps": noise[0],
            "bad": bad,
        }
        # an image is encoded later, and sampled from its posterior then
        if self.posterior and not self.latent:
            item["post"] = noise[1]
        return item

    def order(self, position):
        """Position in the stream -> number of the sample, 0..len-1.

        Each epoch is another permutation of blocks of samples.
        """
        n = len(self)
        block = min(self.shuffle_block, n)
        epoch, i = divmod(position, n)
        if block == 1:
            return permute(i, n, self.seed, epoch)

        # what is left after the last whole block ends the epoch
        blocks = n // block
        if i < blocks * block:
            i = permute(i // block, blocks, self.seed, epoch) * block + i % block
        # where blocks begin moves from epoch to epoch
        return (i + mix(self.seed, epoch)) % n

    def _usable_sample(self, position):
        """-> what `sample` says of the sample at `position`, and the `bad` ones before it.

        Instead of a bad sample comes another one, chosen by the position: no other position moves.
        """
        number = self.order(position)
        bad = []
        # so many in a row: the data, not a sample, is unusable
        while len(bad) <= 100:
            try:
                return *self.sample(number), bad
            except BadSample as error:
                tar, _ = self.locate(number)
                name = self.name(number) or f"sample {number}"
                bad.append((self.tars[tar], name, str(error)))
            number = mix(self.seed, position, len(bad)) % len(self)

        path, _, cause = bad[-1]
        raise UserError("a hundred samples in a row cannot be used, the last: "
                        f"{found.printable(': '.join(bad[-1]))}; "
                        f"{describe_samples(path, cause, self.condition)}", local=True)

    def sample(self, number):
        """-> (PIL image, or latents of shape `latent` float16; condition; cluster) of a sample.

        BadSample if it cannot be used.
        """
        members = self.members(number)
        condition = check_condition(members, self.condition, self.classes)
        cluster = _read_cluster(members)
        if self.clusters and cluster < 0:
            raise BadSample("no cluster")

        if self.latent:
            image = _read_latents(members, self.latent)
        else:
            image = decode(require(members, "image"), self.size)

        if self.tokens:
            condition = _read_tokens(members, self.tokens)
        elif self.encode:
            condition = self.encode(condition)
        return image, condition, cluster

    def members(self, number):
        """The payloads of sample `number`, {role: bytes}.

        BadSample if the headers before them are not those that were indexed.
        """
        tar, (*places, indexed) = self.locate(number)
        members = {}
        crcs = []
        for role, offset, size in zip(ROLES, places[0::2], places[1::2], strict=True):
            # it has no such member
            if offset < 0:
                continue
            check_size(role, size)
            if offset < BLOCK or size < 0:
                raise BadSample(STALE)

            # with the header
            blocks = self.files.read(self.tars[tar], offset - BLOCK, size + BLOCK)
            crcs.append(zlib.crc32(blocks[:BLOCK]))
            members[role] = blocks[BLOCK:]
        if checksum(crcs) != indexed:
            raise BadSample(STALE)
        return members

    def name(self, number):
        """The name of sample `number` in its tar, for reports; empty if it cannot be read."""
        tar, row = self.locate(number)
        offsets = [offset for offset in row[:-1:2] if offset >= BLOCK]
        if not offsets:
            return ""
        try:
            return read_key(self.files.read(self.tars[tar], min(offsets) - BLOCK, BLOCK))
        except BadSample:
            return ""

    def locate(self, number):
        """Number of a sample -> (number of its tar, its row of the index as a list)."""
        tar = bisect.bisect_right(self.starts, number) - 1
        return tar, self.index[tar][number - self.starts[tar]].tolist()


def collate(items):
    """Items of TarDataset -> one dict of batched tensors.

    `bad` is the list of all of theirs; captions stay a list of str.
    """
    batch = {}
    for key in ("x", "eps", "post"):
        if key in items[0]:
            batch[key] = torch.stack([item[key] for item in items])
    for key in ("u", "drop"):
        batch[key] = torch.tensor([item[key] for item in items], dtype=torch.float32)
    batch["k"] = torch.tensor([item["k"] for item in items])

    # captions for a pretrained encoder, which reads a batch of them at once
    batch["c"] = [item["c"] for item in items]
    if not isinstance(batch["c"][0], str):
        batch["c"] = torch.stack(batch["c"])

    batch["bad"] = []
    for item in items:
        batch["bad"] += item["bad"]
    return batch


# ---- a whole tar in its order, for stage 1 -------------------------------------------------------

# samples that are decoded ahead
AHEAD = 256


def usable(path, prepare, least, settings, bad, notes=None):
    """Yields (Sample, {role: bytes}, condition, prepare(image)) of a tar's usable samples, in its
    order; appends (Sample, BadSample) of the others to `bad`.

    Threads decode ahead: Pillow lets go of the interpreter meanwhile. least: as in decode;
    settings: the config's [data]; notes: as in scan_tar.
    """
    threads = max(1, min(16, cores() // local_world()))
    samples = scan_with_retries(path, notes)
    ahead = collections.deque()
    fd = os.open(path, os.O_RDONLY)

    def read(sample):
        for role, (_, size) in sample.members.items():
            check_size(role, size)
        members = {}
        for role, (offset, size) in sample.members.items():
            members[role] = retry_io(os.pread, fd, size, offset)
        condition, image = check_members(members, least, settings)
        return members, condition, prepare(image)

    try:
        with ThreadPoolExecutor(threads) as pool:
            while True:
                for sample in itertools.islice(samples, AHEAD - len(ahead)):
                    ahead.append((sample, pool.submit(read, sample)))
                if not ahead:
                    return

                sample, result = ahead.popleft()
                try:
                    members, condition, prepared = result.result()
                except BadSample as error:
                    # without the traceback, which would keep the payloads in memory
                    bad.append((sample, BadSample(error.cause, error.detail)))
                    continue
                yield sample, members, condition, prepared
    finally:
        os.close(fd)


def check_members(members, least, settings):
    """-> (condition, PIL image) of a sample's members {role: bytes}.

    least: as in decode; settings: the config's [data]. BadSample if it cannot be used.
    """
    condition = check_condition(members, settings.condition, settings.classes)
    return condition, decode(require(members, "image"), least)


# ---- metadata that Pillow refuses ----------------------------------------------------------------

def strip_metadata(payload):
    """A PNG or JPEG without what its pixels do not need: texts, colour profile, thumbnails.

    The orientation stays, where it is intact. Anything else stays as it is.
    """
    try:
        if payload.startswith(b"\x89PNG"):
            return _strip_png(payload)
        if payload.startswith(b"\xff\xd8\xff"):
            return _strip_jpeg(payload)
    except (struct.error, IndexError):
        pass
    return payload


def _strip_png(payload):
    # a signature, then chunks: length, kind, content, CRC-32
    kept = [payload[:8]]
    at = 8
    while at < len(payload):
        length, kind = struct.unpack_from(">I4s", payload, at)
        chunk = payload[at:at + 12 + length]
        at += 12 + length

        # capitals: what every decoder needs
        is_critical = kind[:1].isupper()
        is_useful = kind in (b"tRNS", b"eXIf")
        if is_critical or is_useful and _is_intact(chunk, length):
            kept.append(chunk)
    return b"".join(kept)


def _is_intact(chunk, length):
    crc = int.from_bytes(chunk[-4:], "big")
    return len(chunk) == 12 + length and zlib.crc32(chunk[4:-4]) == crc


def _strip_jpeg(payload):
    # a signature, then segments: 0xFF, kind, length, content; the pixels begin with kind 0xDA
    kept = [payload[:2]]
    at = 2
    while payload[at] == 0xFF and payload[at + 1] != 0xDA:
        kind, length = struct.unpack_from(">xBH", payload, at)
        segment = payload[at:at + 2 + length]
        at += 2 + length

        # what programs add (APP1 to APP13), and comments
        is_metadata = 0xE1 <= kind <= 0xED or kind == 0xFE
        if not is_metadata or segment[4:].startswith(b"Exif\0\0"):
            kept.append(segment)
    return b"".join(kept) + payload[at:]
