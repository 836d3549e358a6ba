"""Hostile and broken files: each of a corpus has its fate written down, both readers agree on it,
and what is mutated at random raises one kind of error at most.
"""
import contextlib
import glob
import gzip
import io
import itertools
import json
import math
import os
import random
import re
import resource
import signal
import struct
import subprocess
import tarfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image
from safetensors.torch import save_file
from test_data import png, write

import cluster
import data
import ddm.config
import ddm.files
import ddm.run
import ddm.tars
import model as models
from data import TarDataset, usable
from ddm import artifacts, features
from ddm.errors import UserError
from ddm.tars import BadSample, TarWriter, scan_tar

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning",
    "ignore::PIL.Image.DecompressionBombWarning",
)
RED = (200, 30, 30)
WHITE = (255, 255, 255)
CAT = b"a cat"


@contextlib.contextmanager
def within(seconds):
    """What works for longer fails, and what waits for five minutes, by an exception that no
    `except Exception` holds up. Seconds of this process's own, which others on the machine do not
    take from it.
    """
    def hangs(*_):
        pytest.fail(f"hangs: not done in {seconds} s")

    old = {}
    for number in (signal.SIGPROF, signal.SIGALRM):
        old[number] = signal.signal(number, hangs)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 300)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in old.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waits for disks, nor between tries."""
    monkeypatch.setattr(ddm.files, "sync", lambda path: None)
    monkeypatch.setattr(ddm.tars, "RETRY", (0, 0, 0))


# ---- makers of bad files -------------------------------------------------------------------------

def encoded(kind, colour=RED, mode="RGB", size=(8, 8), **options):
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, kind, **options)
    return out.getvalue()


def noise(kind, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def exif(orientation, resolution=b"\x48\0\0\0\1\0\0\0"):
    """EXIF by hand: an orientation, and a resolution, a signed fraction."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    entries += struct.pack("<HHII", 0x011A, 10, 1, 38)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4) + resolution


def turned(resolution=b"\x48\0\0\0\1\0\0\0", kind="JPEG", **options):
    """An image that is white at the left and black at the right, of a camera that was turned:
    upright, white is at the top.
    """
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))
    out = io.BytesIO()
    image.save(out, kind, **options or {"exif": exif(6, resolution), "quality": 95})
    return out.getvalue()


def turned_png():
    return turned(kind="PNG", exif=exif(6)[6:])


def turned_tiff():
    return turned(kind="TIFF", tiffinfo={0x0112: 6})


def animated(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    blue = Image.new("RGB", (8, 8), "blue")
    return encoded(kind, save_all=True, append_images=[blue], duration=100, **options)


def gray16(value):
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint16)).save(out, "PNG")
    return out.getvalue()


def palette():
    """A palette PNG whose first colour is transparent."""
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 200, 30, 30])
    image.putpixel((7, 7), 1)
    out = io.BytesIO()
    image.save(out, "PNG", transparency=0)
    return out.getvalue()


def chunk(kind, payload):
    crc = zlib.crc32(kind + payload)
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", crc)


def bomb():
    """A PNG of 100 bytes that claims 60,000 x 60,000 pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + head + pixels + chunk(b"IEND", b"")


def text_bomb(kind=b"zTXt", at=33, whole=None):
    """A PNG with eight megabytes of zeros as its comment, in eight kilobytes."""
    whole = whole or png(RED)
    return whole[:at] + chunk(kind, b"Comment\0\0" + zlib.compress(bytes(1 << 23))) + whole[at:]


def with_chunk(added):
    """A PNG with another chunk behind its header."""
    return png(RED)[:33] + added + png(RED)[33:]


def segment(kind, payload):
    """A JPEG with another segment of metadata."""
    whole = encoded("JPEG", quality=95)
    added = b"\xff" + kind + struct.pack(">H", len(payload) + 2) + payload
    return whole[:2] + added + whole[2:]


def broken(payload, place):
    """The byte at `place` (an offset, or what stands before it) flipped."""
    if not isinstance(place, int):
        place = payload.index(place) + len(place)
    return payload[:place] + bytes([payload[place] ^ 0xFF]) + payload[place + 1:]


def special(name, kind, link="", **attributes):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


def blocks(name, payload, format=tarfile.PAX_FORMAT):
    """One member of a tar: header, payload, padding.

    name: a str, or a TarInfo, or a header's own bytes.
    """
    if not isinstance(name, bytes):
        info = tarfile.TarInfo(name) if isinstance(name, str) else name
        if info.isreg():
            info.size = len(payload)
        name = info.tobuf(format, "utf-8", "surrogateescape")
    return name + payload + bytes(-len(payload) % 512)


def header(name, kind=b"0", size=b"00000000000", raw=b"", at=386):
    """A header by hand: size as it stands there, raw bytes at `at`, the checksum right."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:124 + len(size)] = size
    block[156:157] = kind
    block[at:at + len(raw)] = raw
    sign(block)
    return bytes(block)


def sign(block):
    """Makes the checksum of a header right, in place."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)


def sparse(name, stored, real):
    """The header of a GNU sparse file: `real` bytes long, `stored` of them in the tar."""
    block = header(name, b"S", b"%011o" % stored, b"%011o\0%011o\0" % (0, stored))
    return header(name, b"S", b"%011o" % stored, block[386:483] + b"%011o\0" % real)


# ---- samples -------------------------------------------------------------------------------------

def image_of(payload, extension="png", caption=CAT):
    return lambda: [(f"x.{extension}", payload()), ("x.txt", caption)]


def caption(payload):
    return lambda: [("x.png", png(RED)), ("x.txt", payload)]


def label(payload):
    return lambda: [("x.png", png(RED)), ("x.cls", payload)]


def top_white(image):
    top = image.getpixel((4, 2))
    bottom = image.getpixel((4, 13))
    return image.size == (8, 16) and top[0] > 200 and bottom[0] < 50


# (name, what makes the members of the tar between two good samples, the fates of these). 'used' may
# say more: the colour at the top left, or the caption
SAMPLES = [
    # images
    ("bytes that are no image",
     image_of(lambda: b"not an image"), "skipped: undecodable (UnidentifiedImageError)"),
    ("no bytes at all", image_of(lambda: b""), "skipped: undecodable (UnidentifiedImageError)"),
    ("zeros",
     image_of(lambda: bytes(5000), "jpg"), "skipped: undecodable (UnidentifiedImageError)"),
    ("a PNG named .jpg", image_of(lambda: png(RED), "jpg"), ("used", RED)),
    ("a text named .png",
     image_of(lambda: b"a red square\n"), "skipped: undecodable (UnidentifiedImageError)"),
    ("an error page named .jpg",
     image_of(lambda: b"<!DOCTYPE html><html>404</html>", "jpg"),
     "skipped: undecodable (UnidentifiedImageError)"),
    ("a GIF named .png", image_of(lambda: encoded("GIF")), ("used", RED)),
    ("a TIFF named .jpg", image_of(lambda: encoded("TIFF"), "jpg"), ("used", RED)),
    ("PostScript named .jpg, which Pillow would have Ghostscript run",
     image_of(lambda: encoded("EPS"), "jpg"), "skipped: undecodable (UnidentifiedImageError)"),
    ("upper-case extensions",
     lambda: [("x.PNG", png(RED)), ("x.TXT", b"A CAT")], ("used", "A CAT")),
    ("a BMP", image_of(lambda: encoded("BMP"), "bmp"), ("used", RED)),
    ("a CMYK JPEG",
     image_of(lambda: encoded("JPEG", (0, 255, 255, 0), "CMYK"), "jpg"), ("used", (255, 0, 0))),
    ("a gray JPEG", image_of(lambda: encoded("JPEG", 77, "L"), "jpg"), ("used", (77, 77, 77))),
    ("16-bit gray, dark", image_of(lambda: gray16(0x2080)), ("used", (32, 32, 32))),
    ("16-bit gray, bright", image_of(lambda: gray16(0xFFFF)), ("used", WHITE)),
    ("1-bit", image_of(lambda: encoded("PNG", 0, "1")), ("used", (0, 0, 0))),
    ("a palette with transparency", image_of(palette), ("used", WHITE)),
    ("gray and alpha", image_of(lambda: encoded("PNG", (0, 128), "LA")), ("used", (127, 127, 127))),
    ("RGBA", image_of(lambda: encoded("PNG", (0, 0, 0, 0), "RGBA")), ("used", WHITE)),
    ("EXIF rotation", image_of(turned, "jpg"), ("used", top_white)),
    ("an animated PNG", image_of(lambda: animated("PNG")), ("used", RED)),
    ("an animated WebP", image_of(lambda: animated("WEBP"), "webp"), ("used", RED)),
    ("an animated GIF", image_of(lambda: animated("GIF"), "jpg"), ("used", RED)),
    ("a truncated JPEG",
     image_of(lambda: noise("JPEG")[:1500], "jpg"), "skipped: undecodable (OSError)"),
    ("a truncated WebP", image_of(lambda: noise("WEBP")[:1500], "webp"), "skipped: undecodable ("),
    ("a truncated PNG", image_of(lambda: noise("PNG")[:5000]), "skipped: undecodable (OSError)"),
    ("a PNG cut in its header", image_of(lambda: png(RED)[:20]), "skipped: undecodable ("),
    ("a PNG whose header fails its CRC",
     image_of(lambda: broken(png(RED), 30)), "skipped: undecodable ("),
    ("a PNG whose pixels fail their checksum",
     image_of(lambda: broken(noise("PNG"), 6000)), "skipped: undecodable ("),
    ("a PNG whose last CRC is wrong, and its pixels right",
     image_of(lambda: broken(png(RED), b"IEND")), ("used", RED)),
    ("a PNG with bytes after its end", image_of(lambda: png(RED) + bytes(1000)), ("used", RED)),
    ("a decompression bomb", image_of(bomb), "skipped: undecodable (DecompressionBombError)"),
    ("an image of just too many pixels",
     image_of(lambda: encoded("PNG", 0, "1", (10000, 9000))),
     "skipped: undecodable (DecompressionBombError)"),
    ("a text-chunk bomb, which is passed over", image_of(text_bomb), ("used", RED)),
    ("a text-chunk bomb behind the pixels", image_of(lambda: text_bomb(at=-12)), ("used", RED)),
    ("an ICC-profile bomb", image_of(lambda: text_bomb(b"iCCP")), ("used", RED)),
    ("a text chunk whose CRC is wrong",
     image_of(lambda: with_chunk(broken(chunk(b"tEXt", b"a\0b"), -1))), ("used", RED)),
    ("a resolution that is cut short",
     image_of(lambda: with_chunk(chunk(b"pHYs", b"\0"))), ("used", RED)),
    ("a JPEG whose colour profile is cut short",
     image_of(lambda: segment(b"\xe2", b"ICC_PROFILE\0"), "jpg"), ("used", RED)),
    ("EXIF that cannot be written again",
     image_of(lambda: turned(b"\xff\xff\xff\xff\0\0\0\0"), "jpg"), ("used", top_white)),
    ("EXIF rotation and a text-chunk bomb",
     image_of(lambda: text_bomb(whole=turned_png())), ("used", top_white)),
    ("an orientation of 77",
     image_of(lambda: encoded("JPEG", exif=exif(77)), "jpg"), ("used", RED)),
    ("a TIFF that is turned", image_of(turned_tiff, "jpg"), ("used", top_white)),
    ("a damaged ICC profile",
     image_of(lambda: png(RED, icc_profile=b"not a profile")), ("used", RED)),
    ("damaged EXIF",
     image_of(lambda: encoded("JPEG", exif=b"Exif\0\0not exif", quality=95), "jpg"), "used"),
    ("one pixel", image_of(lambda: png(RED, (1, 1))), ("used", RED)),
    ("a line, 1 x 3000", image_of(lambda: png(RED, (1, 3000))), ("used", RED)),
    ("a line, 3000 x 1", image_of(lambda: png(RED, (3000, 1))), ("used", RED)),
    ("no image", lambda: [("x.txt", CAT)], "skipped: no image"),
    ("an image of an unknown kind",
     lambda: [("x.svg", b"<svg/>"), ("x.txt", CAT)], "skipped: no image"),
    ("nothing but JSON", lambda: [("x.json", b"{}")], "skipped: no caption"),
    ("two images, of which jpg counts",
     lambda: [("x.png", png("blue")), ("x.jpg", png(RED)), ("x.txt", CAT)], ("used", RED)),
    ("two images in the other order",
     lambda: [("x.jpg", png(RED)), ("x.png", png("blue")), ("x.txt", CAT)], ("used", RED)),
    ("four images",
     lambda: [("x.webp", png("blue")), ("x.png", png("blue")), ("x.txt", CAT),
              ("x.JPG", png("blue")), ("x.jpg", png(RED))],
     ("used", RED)),
    ("two captions, of which the one in small letters counts",
     lambda: [("x.TXT", b"A DOG"), ("x.txt", CAT), ("x.png", png(RED))], ("used", "a cat")),
    # captions
    ("no caption", lambda: [("x.png", png(RED))], "skipped: no caption"),
    ("an empty caption", caption(b""), "skipped: no caption"),
    ("a caption of punctuation", caption(b" ?! ... \n"), "skipped: no caption"),
    ("a caption of emoji alone",
     caption("\U0001f408\U0001f308".encode()), ("used", "\U0001f408\U0001f308")),
    ("a caption with an emoji", caption("a cat \U0001f408".encode()), ("used", "a cat \U0001f408")),
    ("a caption in Chinese", caption("一只猫".encode()), ("used", "一只猫")),
    ("a caption of 2 MB", caption(b"cat " * (1 << 19)), "skipped: txt too large"),
    ("a caption of 1 MB", caption(b"cats" * (1 << 18)), "used"),
    ("a caption in Latin-1",
     caption("ein Bär".encode("latin-1")), "skipped: caption is not UTF-8"),
    ("a caption in UTF-16", caption("ein Bär".encode("utf-16")), ("used", "ein Bär")),
    ("a caption in UTF-16, the other way round",
     caption(b"\xfe\xff" + "ein Bär".encode("utf-16-be")), ("used", "ein Bär")),
    ("a caption in UTF-16 without a byte order mark",
     caption("a cat".encode("utf-16-le")), "skipped: caption is not UTF-8"),
    ("a caption in UTF-32", caption("ein Bär".encode("utf-32")), ("used", "ein Bär")),
    ("a caption with a byte order mark",
     caption("ein Bär".encode("utf-8-sig")), ("used", "ein Bär")),
    ("nothing but a byte order mark", caption(b"\xef\xbb\xbf"), "skipped: no caption"),
    ("a caption with NUL", caption(b"a\0cat"), "skipped: caption is not UTF-8"),
    ("a caption with control characters",
     caption(b"a cat\x1b[31m\x07\r\nred"), ("used", "a cat [31m red")),
    ("a caption that looks like a format",
     caption(b"%s {0} {x.__class__} $(rm -rf /) a cat"),
     ("used", "%s {0} {x.__class__} $(rm -rf /) a cat")),
    ("lone surrogates", caption(b"a cat \xed\xa0\x80"), "skipped: caption is not UTF-8"),
    # classes
    ("a class", label(b" 7\n"), ("used", 7)),
    ("no class", lambda: [("x.png", png(RED))], "skipped: no class"),
    ("an empty class", label(b""), "skipped: no class"),
    ("a class that is a word", label(b"cat"), "skipped: class is no number: KEY.cls is 'cat'"),
    ("a class that is a fraction", label(b"1.5"), "skipped: class is no number: KEY.cls is '1.5'"),
    ("a class that is not UTF-8", label(b"\xff9"), "skipped: class is no number"),
    ("a class with a NUL", label(b"1\x000"), "skipped: class is no number"),
    ("a class with a byte order mark", label(b"\xef\xbb\xbf7\r\n"), ("used", 7)),
    ("a class in UTF-16", label("7".encode("utf-16")), ("used", 7)),
    ("a class with an underscore, a number to Python alone",
     label(b"0_7"), "skipped: class is no number: KEY.cls is '0_7'"),
    ("a negative class", label(b"-1"), "skipped: class outside data.classes = 10"),
    ("a class too large", label(b"10"), "skipped: class outside data.classes = 10"),
    ("a class of 60 digits", label(b"9" * 60), "skipped: class outside data.classes = 10"),
    ("a class of 5000 digits", label(b"9" * 5000), "skipped: cls too large"),
    # names
    ("duplicate keys",
     lambda: [("x.png", png(RED)), ("x.txt", b"one"), ("x.png", png("blue")), ("x.txt", b"two")],
     [("used", "one"), ("used", "two")]),
    ("one member twice",
     lambda: [("x.png", png(RED)), ("x.png", png(RED)), ("x.txt", CAT)],
     ["skipped: no caption", "used"]),
    ("the same key in two places",
     lambda: [("x.png", png(RED)), ("x.txt", b"one"), ("y.png", png("blue")), ("y.txt", b"two"),
              ("x.png", png("blue")), ("x.txt", b"three")],
     [("used", "one"), ("used", "two"), ("used", "three")]),
    ("members that do not stand together",
     lambda: [("x.png", png(RED)), ("y.png", png("blue")), ("x.txt", b"one"), ("y.txt", b"two")],
     ["skipped: no caption", "skipped: no caption", "skipped: no image", "skipped: no image"]),
    ("the same key in two folders",
     lambda: [("a/x.png", png(RED)), ("a/x.txt", b"one"),
              ("b/x.png", png("blue")), ("b/x.txt", b"two")],
     [("used", "one"), ("used", "two")]),
    ("a way out of the folder",
     lambda: [("../../x.png", png(RED)), ("../../x.txt", CAT)], ("used", RED)),
    ("an absolute path",
     lambda: [("/nanoddm-evil/x.png", png(RED)), ("/nanoddm-evil/x.txt", CAT)], ("used", RED)),
    ("names that are not UTF-8",
     lambda: [("b\udcffr.png", png(RED)), ("b\udcffr.txt", CAT)], ("used", RED)),
    ("names with line breaks and escapes",
     lambda: [("x\n\x1b[31m.png", png(RED)), ("x\n\x1b[31m.txt", CAT)], ("used", RED)),
    ("names of 3000 characters",
     lambda: [("é" * 3000 + ".png", png(RED)), ("é" * 3000 + ".txt", CAT)], ("used", RED)),
    ("names that begin with a dot are no samples",
     lambda: [(".png", png(RED)), (".DS_Store", b"1"), ("._x.png", bytes(163)),
              ("x.png", png(RED)), ("x.txt", CAT)],
     ("used", RED)),
    ("resource forks between",
     lambda: [("x.png", png(RED)), ("._x.txt", bytes(163)), ("x.txt", CAT),
              ("__MACOSX/x.png", png("blue"))],
     ("used", RED)),
    ("names that begin with ./", lambda: [("./x.png", png(RED)), ("x.txt", CAT)], ("used", RED)),
    ("an extension in capitals and another image in small letters",
     lambda: [("x.PNG", png("blue")), ("x.png", png(RED)), ("x.txt", CAT)], ("used", RED)),
    ("a name without an extension",
     lambda: [("README", b"about"), ("x.png", png(RED)), ("x.txt", CAT)],
     ["skipped: no caption", ("used", RED)]),
    ("a folder between",
     lambda: [(special("f", tarfile.DIRTYPE), b""), ("f/x.png", png(RED)), ("f/x.txt", CAT)],
     ("used", RED)),
    ("a symbolic link",
     lambda: [(special("x.png", tarfile.SYMTYPE, "/etc/passwd"), b""), ("x.txt", CAT)],
     "skipped: no image"),
    ("a hard link",
     lambda: [(special("x.png", tarfile.LNKTYPE, "a.png"), b""), ("x.txt", CAT)],
     "skipped: no image"),
    ("a device",
     lambda: [("x.png", png(RED)),
              (special("x.txt", tarfile.CHRTYPE, devmajor=1, devminor=5), b"")],
     "skipped: no caption"),
    ("a pipe",
     lambda: [("x.png", png(RED)), (special("x.txt", tarfile.FIFOTYPE), b"")],
     "skipped: no caption"),
    ("a sparse file longer than the tar",
     lambda: [("x.png", png(RED)), (sparse("x.txt", 5, 1 << 40), CAT)], "skipped: no caption"),
    ("a sparse file longer than its bytes",
     lambda: [("x.png", png(RED)), ("x.txt", CAT), (sparse("x.json", 2, 2000), b"{}")],
     ("used", "a cat")),
    ("a size of 5000 digits, which tarfile takes for 0",
     lambda: [(pax(size="9" * 5000), b""), ("x.txt", CAT)],
     "skipped: undecodable (UnidentifiedImageError)"),
    ("headers of unknown kinds",
     lambda: [("x.png", png(RED)), (header("x.zzz", b"Z"), b""), ("x.txt", CAT)],
     ("used", "a cat")),
]


def read_both(path, condition):
    """What data.usable and TarDataset say of each sample of a tar -> ([fate], [fate], dataset).

    A fate is ("used", image, condition) or "skipped: cause".
    """
    prepare = features.extractor(SimpleNamespace(name="pixels"), None)[0]
    settings = SimpleNamespace(condition=condition, classes=10)
    bad = []
    fates = {}
    found = usable(path, lambda image: (prepare(image), image), 256, settings, bad=bad)
    for sample, _, c, (vector, image) in found:
        assert np.isfinite(vector).all()
        fates[sample.start] = ("used", image, c)
    for sample, error in bad:
        fates[sample.start] = f"skipped: {error}"
    first = [fates[sample.start] for sample in scan_tar(path)]

    dataset = TarDataset([path], 8, condition, encode=None, classes=10)
    second = []
    for number in range(len(dataset)):
        try:
            image, c, _ = dataset.sample(number)
            second.append(("used", image, c))
        except BadSample as error:
            second.append(f"skipped: {error}")
    return first, second, dataset


def agree(fate, found):
    """Whether what a reader found is the fate."""
    if isinstance(fate, str) and fate != "used":
        return isinstance(found, str) and found.startswith(fate)
    if isinstance(found, str):
        return False
    what = fate[1] if isinstance(fate, tuple) else None
    if callable(what):
        return what(found[1])
    if isinstance(what, tuple):
        colour = np.array(found[1].getpixel((0, 0)))
        return abs(colour - what).max() <= 3
    return what is None or found[2] == what


def good(key):
    return [(f"{key}.png", png((1, 2, 3))), (f"{key}.txt", b"good"), (f"{key}.cls", b"3")]


def told(fate):
    """What of a fate both readers agree on: all but the image, which is another size."""
    return fate if isinstance(fate, str) else fate[2]


def files_below(folder):
    return sorted(path for path in glob.glob(f"{folder}/**", recursive=True, include_hidden=True)
                  if os.path.isfile(path))


@pytest.mark.parametrize("name, members, fate", SAMPLES, ids=[entry[0] for entry in SAMPLES])
def test_both_readers_agree_on_a_bad_sample(tmp_path, monkeypatch, name, members, fate):
    """Its neighbours are used, and nothing is written anywhere, nor any program started."""
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail(f"starts {a}"))
    path = tmp_path / "in" / "here" / "x.tar"
    path.parent.mkdir(parents=True)
    whole = itertools.starmap(blocks, [*good("a"), *members(), *good("z")])
    path.write_bytes(b"".join(whole) + bytes(1024))
    monkeypatch.chdir(path.parent)

    with within(10):
        first, second, dataset = read_both(str(path), "class" if "class" in name else "text")
        items = [dataset[position] for position in range(2 * len(dataset))]

    neighbour = ("used", (1, 2, 3))
    fates = [neighbour, *(fate if isinstance(fate, list) else [fate]), neighbour]
    for by in (first, second):
        assert len(by) == len(fates) and all(map(agree, fates, by)), by
    assert [told(f) for f in first] == [told(f) for f in second]

    # the epoch has a sample for each position, the bad ones replaced and named
    skipped = [f for f in first if isinstance(f, str)]
    assert sum(len(item["bad"]) for item in items[:len(fates)]) >= len(skipped)
    assert all(item["x"].shape == (8, 8, 3) for item in items)

    assert files_below(tmp_path) == [str(path), f"{path}.idx"]
    assert not os.path.exists("/nanoddm-evil")

    # what stage 1 copies, a sample's bytes, is a tar of that sample alone
    with open(path, "rb") as file:
        for sample in scan_tar(path):
            file.seek(sample.start)
            piece = file.read(sample.end - sample.start)
            (tmp_path / "copy.tar").write_bytes(piece + bytes(1024))
            copied, = scan_tar(tmp_path / "copy.tar")
            assert set(copied.members) == set(sample.members)


# unflipped, one latent of two channels of 2 x 2
LATENTS = (1, 1, 2, 2, 2)


def F16(*values):
    return np.array(values, np.float16).tobytes()


@pytest.mark.parametrize("name, members, fate", [
    ("latents as they should be",
     {"lat": F16(*range(8)), "tok": F16(*range(6)), "cluster": b"1"}, "used"),
    ("no latents", {"tok": F16(*range(6)), "cluster": b"1"}, "no lat"),
    ("no bytes of latents", {"lat": b"", "tok": b"", "cluster": b"1"}, "0 bytes of latents"),
    ("too few latents",
     {"lat": F16(*range(7)), "tok": b"", "cluster": b"1"}, "14 bytes of latents"),
    ("too many latents",
     {"lat": F16(*range(9)), "tok": b"", "cluster": b"1"}, "18 bytes of latents"),
    ("half a number of latents",
     {"lat": F16(*range(8))[:-1], "tok": b"", "cluster": b"1"}, "15 bytes of latents"),
    ("latents with a NaN",
     {"lat": F16(*[0] * 7, np.nan), "tok": b"", "cluster": b"1"}, "latents that are not finite"),
    ("latents with an infinity",
     {"lat": F16(*[0] * 7, np.inf), "tok": b"", "cluster": b"1"}, "latents that are not finite"),
    ("latents with both infinities",
     {"lat": F16(*[0] * 6, np.inf, -np.inf), "tok": b"", "cluster": b"1"},
     "latents that are not finite"),
    ("latents as large as can be", {"lat": F16(*[65504] * 8), "tok": b"", "cluster": b"1"}, "used"),
    ("no token features", {"lat": F16(*range(8)), "cluster": b"1"}, "no tok"),
    ("a caption of no tokens", {"lat": F16(*range(8)), "tok": b"", "cluster": b"1"}, "used"),
    ("half a token",
     {"lat": F16(*range(8)), "tok": F16(1), "cluster": b"1"}, "2 bytes of token features"),
    ("too many tokens",
     {"lat": F16(*range(8)), "tok": F16(*range(8)), "cluster": b"1"},
     "16 bytes of token features"),
    ("half a number of token features",
     {"lat": F16(*range(8)), "tok": b"123", "cluster": b"1"}, "3 bytes of token features"),
    ("no cluster", {"lat": F16(*range(8)), "tok": b""}, "no cluster"),
    ("an empty cluster", {"lat": F16(*range(8)), "tok": b"", "cluster": b""}, "no cluster"),
    ("a cluster that is a word",
     {"lat": F16(*range(8)), "tok": b"", "cluster": b"one"}, "no cluster"),
    ("a cluster of 5000 digits",
     {"lat": F16(*range(8)), "tok": b"", "cluster": b"1" * 5000}, "cluster too large"),
])
def test_bad_latents_token_features_and_clusters_are_bad_samples(tmp_path, name, members, fate):
    dataset = TarDataset(
        [write(tmp_path / "x.tar", [members])],
        8,
        latent=LATENTS,
        tokens=(3, 2),
        clusters=True,
        noise_shape=LATENTS[2:],
    )
    if fate == "used":
        item = dataset[0]
        assert item["x"].shape == (2, 2, 2) and item["c"].shape == (3, 2)
        assert item["k"] == 1 and not item["bad"]
    else:
        with pytest.raises(BadSample) as caught:
            dataset.sample(0)
        assert caught.value.cause == fate


# ---- whole tars ----------------------------------------------------------------------------------

# bytes of a sample of valid(): two headers, two payloads below 512 bytes
SAMPLE = 2048


def valid(samples=6):
    tar = b""
    for i in range(samples):
        tar += blocks(f"{i:06d}.png", png(RED)) + blocks(f"{i:06d}.txt", CAT)
    return tar + bytes(1024)


def at(place, patch, tar=None):
    tar = tar or valid()
    return tar[:place] + patch + tar[place + len(patch):]


def pax(**headers):
    info = tarfile.TarInfo("x.png")
    info.pax_headers = headers
    return info.tobuf(tarfile.PAX_FORMAT)


def chained(block):
    """A tar in whose midst a header of a header stands 3000 times."""
    return valid()[:3 * SAMPLE] + 3000 * block + valid()


LIES = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "-5"}
HUGE = b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7
BIG = b"\x80" + b"\0" * 3 + b"\x40" + b"\0" * 7
GARBAGE = bytes(random.Random(0).randbytes(700))
# (name, the file's bytes, its whole samples, whether there is a warning). A sample is whole once
# the next one begins, or the tar ends as it should
TARS = [
    ("as it should be", lambda: valid(), 6, False),
    ("with one empty block at its end", lambda: valid()[:-512], 6, False),
    ("with a page of empty blocks at its end", lambda: valid() + bytes(10240), 6, False),
    ("with garbage behind its end", lambda: valid() + GARBAGE, 5, True),
    ("two tars, one behind the other: the first counts, as for tar",
     lambda: valid() + valid(), 5, True),
    ("an empty file", lambda: b"", 0, True),
    ("only zero blocks: a tar of nothing", lambda: bytes(10240), 0, False),
    ("fewer zeros than a block", lambda: bytes(100), 0, True),
    ("not a tar", lambda: b"no tar at all" * 100, 0, True),
    ("an image", lambda: png(RED), 0, True),
    ("gzip", lambda: gzip.compress(valid()), 0, True),
    ("without its end", lambda: valid()[:-1024], 5, True),
    ("cut in a sample's first header", lambda: valid()[:3 * SAMPLE + 100], 2, True),
    ("cut in a sample's second header", lambda: valid()[:3 * SAMPLE + 1100], 3, True),
    ("cut in a member", lambda: valid()[:3 * SAMPLE + 520], 3, True),
    ("cut in the padding", lambda: valid()[:3 * SAMPLE + 1000], 3, True),
    ("cut in the last member", lambda: valid()[:6 * SAMPLE - 510], 5, True),
    ("garbage over a header", lambda: at(3 * SAMPLE, GARBAGE), 2, True),
    ("garbage over a second header", lambda: at(3 * SAMPLE + 1024, GARBAGE), 3, True),
    ("garbage over the first header", lambda: at(0, GARBAGE[:512]), 0, True),
    ("a header whose checksum is wrong", lambda: broken(valid(), 4 * SAMPLE + 3), 3, True),
    ("a header whose checksum is no number", lambda: at(4 * SAMPLE + 148, b"zzzzzz"), 3, True),
    ("zeros over a header: the tar ends there", lambda: at(3 * SAMPLE, bytes(512)), 2, True),
    ("a hole of zeros", lambda: at(2 * SAMPLE, bytes(4096)), 1, True),
    ("a negative size", lambda: at(3 * SAMPLE, header("x.png", size=b"\xff" * 12)), 2, True),
    ("a huge size", lambda: at(3 * SAMPLE, header("x.png", size=HUGE)), 3, True),
    ("a size beyond 64 bits",
     lambda: at(3 * SAMPLE, header("x.png", size=b"\x80" + b"\xff" * 11)), 3, True),
    ("a size of 8 GB", lambda: at(3 * SAMPLE, header("x.png", size=b"77777777777")), 3, True),
    ("a size that is no number",
     lambda: at(3 * SAMPLE, header("x.png", size=b"zzzzzzzzzzz")), 2, True),
    ("a long name of 2^62 bytes",
     lambda: at(3 * SAMPLE, header("x", b"L", size=BIG)), 2, True),
    ("a PAX header with size=-1", lambda: at(3 * SAMPLE, pax(size="-1")), 2, True),
    ("a PAX header with size=-512: a circle", lambda: at(3 * SAMPLE, pax(size="-512")), 2, True),
    ("a PAX header with a size of 400 digits",
     lambda: at(3 * SAMPLE, pax(size="9" * 400)), 3, True),
    ("a PAX header with a length of 0",
     lambda: at(3 * SAMPLE, header("x", b"x", b"%011o" % 12) + b"0 path=evil\n"), 2, True),
    ("a PAX header of a sparse file that lies",
     lambda: at(3 * SAMPLE, pax(**LIES)), 2, True),
    ("3000 long names, one for the other",
     lambda: chained(header("x", b"L", b"%011o" % 2) + b"x\0" + bytes(510)), 2, True),
    ("3000 PAX headers, one for the other",
     lambda: chained(header("x", b"x", b"%011o" % 11) + b"11 path=ab\n" + bytes(501)), 2, True),
]


@pytest.mark.parametrize("name, make, whole, warns", TARS, ids=[entry[0] for entry in TARS])
def test_a_damaged_tar_gives_its_whole_samples(tmp_path, capsys, name, make, whole, warns):
    path = tmp_path / "x.tar"
    path.write_bytes(make())
    with within(10):
        samples = list(itertools.islice(scan_tar(path), 100))
        assert ("x.tar" in capsys.readouterr().err) == warns
        first, second, dataset = read_both(str(path), "text")
    assert len(samples) == len(dataset) == whole
    assert all(set(s.members) == {"image", "txt"} for s in samples)
    assert all(agree(("used", RED), found) for found in first + second)


# ---- tars that change under a training -----------------------------------------------------------

@pytest.fixture
def two(tmp_path):
    """Two tars of ten samples, of which each has its own colour and class."""
    tars = []
    for t in range(2):
        numbers = range(10 * t, 10 * t + 10)
        samples = [{"png": png((10 * i, 0, 0)), "cls": str(i).encode()} for i in numbers]
        tars.append(write(tmp_path / f"{t}.tar", samples))
    return tars


def open_tars(tars):
    return TarDataset(tars, 8, "class", classes=20)


@pytest.fixture
def clean(two, tmp_path):
    """A dataset of copies of these tars, which nothing happens to."""
    (tmp_path / "clean").mkdir()
    copies = []
    for path in two:
        copies.append(str(tmp_path / "clean" / os.path.basename(path)))
        with open(path, "rb") as source, open(copies[-1], "wb") as target:
            target.write(source.read())
    return open_tars(copies)


@pytest.fixture
def dataset(two):
    return open_tars(two)


def equal(a, b):
    for key in a:
        same = torch.equal if isinstance(a[key], torch.Tensor) else lambda x, y: x == y
        if not same(a[key], b[key]):
            return False
    return True


def compare(dataset, clean, gone):
    """That the samples in `gone` are replaced, and that no other position's sample changes; -> the
    causes, in the order of reading.
    """
    causes = []
    for position in range(40):
        item = dataset[position]
        assert bool(item["bad"]) == (clean.order(position) in gone)
        causes += [cause for _, _, cause in item["bad"]]
        if not item["bad"]:
            assert equal(item, clean[position])
        else:
            assert item["c"].item() not in gone
            assert torch.equal(item["eps"], clean[position]["eps"])
            assert item["u"] == clean[position]["u"]
    return causes


def test_the_samples_of_a_tar_that_vanishes_are_replaced(two, dataset, clean):
    os.remove(two[1])
    first, *others = compare(dataset, clean, set(range(10, 20)))
    # waited for once
    assert first == "unreadable (FileNotFoundError)" and set(others) == {"unreadable (still)"}


def test_samples_cut_off_after_the_tar_was_indexed_are_replaced(two, dataset, clean):
    os.truncate(two[1], 4 * 2048 + 600)
    assert set(compare(dataset, clean, set(range(14, 20)))) == {"cut off"}


def test_the_samples_of_a_tar_overwritten_by_garbage_are_replaced(two, dataset, clean):
    with open(two[1], "r+b") as f:
        f.write(random.Random(0).randbytes(os.path.getsize(two[1])))
    assert set(compare(dataset, clean, set(range(10, 20)))) == {ddm.tars.STALE}


def test_a_tar_of_the_same_size_and_date_gives_no_other_samples(two, dataset, clean):
    """Replaced as by cp -p or rsync -t: the same members in another order, so that each place has
    another sample.
    """
    stat = os.stat(two[1])
    samples = [dataset.members(i) for i in range(10, 20)]
    with TarWriter(two[1]) as tar:
        for i in reversed(range(10)):
            tar.add(f"{i:06d}.png", samples[i]["image"])
            tar.add(f"{i:06d}.cls", samples[i]["cls"])
    os.utime(two[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert os.stat(two[1]).st_size == stat.st_size

    dataset.files.descriptors.clear()
    for reader in (open_tars(two), dataset):
        assert set(compare(reader, clean, set(range(10, 20)))) == {ddm.tars.STALE}


def test_a_damaged_index_is_made_again_or_its_samples_are_bad_ones(two):
    """Its head names the tar; what follows is checked as it is read."""
    rng = random.Random(5)
    whole = data.index_tar(two[0]).copy()
    file = f"{two[0]}.idx"
    with open(file, "rb") as f:
        payload = f.read()
    with within(30):
        for cut in (0, 7, 50, len(payload) - 1):
            with open(file, "wb") as f:
                f.write(payload[:cut] if cut < 104 else bytes(104) + payload[104:])
            assert np.array_equal(data.index_tar(two[0]), whole)
        for _ in range(200):
            with open(file, "wb") as f:
                f.write(payload[:104] + mutated(rng, payload[104:], HOSTILE_BYTES))
            dataset = open_tars(two[:1])
            for number in range(len(dataset)):
                dataset.name(number)
                with contextlib.suppress(BadSample):
                    dataset.sample(number)


@pytest.mark.parametrize("name", ["pread", "open"])
def test_a_read_that_fails_once_is_tried_again(dataset, clean, monkeypatch, name):
    expected = [clean[position] for position in range(40)]
    real = getattr(os, name)
    failed = []

    def flaky(*args):
        if len(failed) < 3 and (name == "pread" or str(args[0]).endswith("1.tar")):
            failed.append(args)
            raise OSError(116, "Stale file handle")
        return real(*args)

    monkeypatch.setattr(os, name, flaky)
    for position in range(40):
        item = dataset[position]
        assert not item["bad"] and equal(item, expected[position])
    assert len(failed) == 3


def test_a_tar_that_comes_back_is_used_again(two, dataset, clean, tmp_path):
    os.rename(two[0], tmp_path / "away")
    position = next(p for p in range(20) if clean.order(p) < 10)
    assert dataset[position]["bad"]
    os.rename(tmp_path / "away", two[0])
    assert equal(dataset[position], clean[position])


def fails(*args):
    raise OSError(5, "Input/output error")


def classes_of(path, bad):
    """What stage 1 reads in a tar: the classes of its usable samples."""
    settings = SimpleNamespace(condition="class", classes=20)
    found = usable(path, lambda image: image, 8, settings, bad=bad)
    return [condition for _, _, condition, _ in found]


def test_stage_1_skips_what_cannot_be_read(two, monkeypatch):
    """And tries again what fails once: each place, whichever thread comes there first."""
    real = os.pread
    failed = set()

    def fails_once(file, size, offset):
        if (size, offset) in failed:
            return real(file, size, offset)
        failed.add((size, offset))
        return fails()

    monkeypatch.setattr(os, "pread", fails_once)
    bad = []
    assert classes_of(two[0], bad) == list(range(10))
    assert not bad and len(failed) == 20

    monkeypatch.setattr(os, "pread", fails)
    assert classes_of(two[0], bad) == []
    assert [error.cause for _, error in bad] == ["unreadable (OSError)"] * 10


def test_headers_that_cannot_be_read_once_are_read_again_or_named(two, monkeypatch):
    """A tar's headers are read while its samples are decoded: it continues where it was, no sample
    twice.
    """
    real = ddm.tars.scan_tar
    left = [2]

    def flaky(path, notes=None):
        for number, sample in enumerate(real(path, notes)):
            if number == 5 and left[0]:
                left[0] -= 1
                fails()
            yield sample

    monkeypatch.setattr(ddm.tars, "scan_tar", flaky)
    assert classes_of(two[0], []) == list(range(10)) and left == [0]
    left[0] = 99
    with pytest.raises(UserError, match="0.tar: Input/output error"):
        classes_of(two[0], [])


# ---- mutations -----------------------------------------------------------------------------------

HOSTILE_BYTES = [
    b"\0", b"\xff", b"\x80", b"0", b"9", b"-", b"/", b"\n", b"\0" * 12, b"\xff" * 12,
    b"77777777777\0", b"L", b"K", b"x", b"g", b"S", b"5", b"1",
]


def mutated(rng, payload, hostile, places=None):
    """Payload with one to four of: a byte changed, a piece overwritten, put in, cut out, repeated,
    or the rest cut off. places: offsets near which most of them are.
    """
    payload = bytearray(payload)
    for _ in range(rng.randint(1, 4)):
        if places and rng.random() < 0.7:
            place = rng.choice(places) + rng.randint(0, 30)
        else:
            place = rng.randrange(len(payload) + 1)
        piece = rng.choice(hostile)

        kind = rng.randrange(12)
        if kind < 4 and place < len(payload):
            payload[place] = rng.randrange(256)
        elif kind < 7:
            payload[place:place + len(piece)] = piece
        elif kind < 9:
            payload[place:place] = piece
        elif kind == 9:
            del payload[place:place + rng.randint(1, 40)]
        elif kind == 10:
            payload[place:place] = payload[place:place + rng.randint(1, 600)]
        elif rng.random() < 0.3:
            del payload[place:]
    return bytes(payload)


def hostile_tar(rng, whole, signed):
    """A mutated tar. signed: the checksums of its headers are right, so that it gets further."""
    # of each header: name, size, checksum of the old one, checksum, type, magic, prefix
    fields = (0, 124, 136, 148, 156, 257, 345)
    places = [block + field for block in range(0, len(whole), 512) for field in fields]
    payload = bytearray(mutated(rng, whole, HOSTILE_BYTES, places))
    if signed:
        for start in range(0, len(payload) - 511, 512):
            block = payload[start:start + 512]
            if block[257:262] == b"ustar":
                sign(block)
                payload[start:start + 512] = block
    return bytes(payload)


def test_mutated_tars_raise_nothing_but_user_errors_and_end(tmp_path):
    rng = random.Random(0)
    settings = SimpleNamespace(condition="text", classes=0)
    long_name = "y." + "é" * 120
    whole = b""
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        whole += blocks(f"{long_name}.png", png(RED), kind) + blocks(f"{long_name}.txt", CAT, kind)
    whole += valid(4)

    read = 0
    with within(60):
        for i in range(300):
            path = tmp_path / f"{i}.tar"
            path.write_bytes(hostile_tar(rng, whole, signed=i % 2))
            samples = list(itertools.islice(scan_tar(path), 1000))
            assert len(samples) < 100
            assert all(0 <= s.start < s.end and s.start % 512 == 0 for s in samples)

            list(usable(path, lambda image: image, 8, settings, bad=[]))
            dataset = TarDataset([str(path)], 8, "text", encode=None)
            assert len(dataset) == len(samples)
            for number in range(len(dataset)):
                dataset.name(number)
                with contextlib.suppress(BadSample):
                    dataset.sample(number)
                    read += 1
            if i % 10 == 0 and len(dataset):
                with contextlib.suppress(UserError):
                    dataset[0]
    # most samples outlive a mutation elsewhere
    assert read > 300


def test_mutated_images_are_used_or_bad_samples(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 20)
    rng = random.Random(1)
    images = [png(RED), palette(), gray16(7), turned()]
    images += [encoded("JPEG"), encoded("TIFF"), encoded("BMP")]
    images += [animated("GIF"), animated("WEBP"), animated("PNG")]
    used = 0
    with within(60):
        for payload in images:
            for _ in range(100):
                with contextlib.suppress(BadSample):
                    image = data.decode(mutated(rng, payload, HOSTILE_BYTES), 8)
                    assert image.mode == "RGB" and data.square(image, 8).shape == (8, 8, 3)
                    used += 1
    assert used > 100


TINY_MODEL = dict(size=8, channels=3, dim=16, depth=2, heads=2, patch=4)


@pytest.fixture
def saved(tmp_path):
    """A model file of a few kilobytes, and what it says."""
    path = str(tmp_path / "model.safetensors")
    config = models.ModelConfig(**TINY_MODEL, condition="class", classes=3)
    artifacts.save(path, config, artifacts.build(config).state_dict(), shard="0", steps=6)
    return path, artifacts.read_info(path)


def claim(path, info, weights=None):
    """Rewrites a model file so that its metadata is `info` (a str as it is)."""
    weights = weights or {"w": torch.zeros(2)}
    text = info if isinstance(info, str) else json.dumps(info)
    save_file(weights, path, metadata={"nanoddm": text})


def only(error, function, *args):
    """-> whether it worked; anything but `error` goes through."""
    try:
        function(*args)
        return True
    except error as caught:
        assert type(caught) is error or error is not ValueError, repr(caught)
        return False


HOSTILE_JSON = [
    b'"', b"{", b"}", b"[", b"]", b":", b",", b"null", b"-1", b"1e999", b"\0", b"\xff", b"\\ud800",
]


def mutated_safetensors(rng, whole, i):
    """Mutated in the length of the header, in the header (its length kept), or in both."""
    pieces = [*HOSTILE_JSON, b"0", b"9" * 20, b"\\", b'"F16"', b'"I64"', b"[" * 2000]
    end = 8 + int.from_bytes(whole[:8], "little")
    if i % 8 == 0:
        return mutated(rng, whole[:8], pieces) + whole[8:]
    if i % 2:
        header = mutated(rng, whole[8:end], pieces)[:end - 8].ljust(end - 8)
        return whole[:8] + header + whole[end:]
    return mutated(rng, whole[:end], pieces) + whole[end:]


def test_mutated_safetensors_raise_value_errors_or_user_errors_alone(saved):
    path, _ = saved
    rng = random.Random(2)
    with open(path, "rb") as f:
        whole = f.read()
    used = 0
    with within(60):
        for i in range(400):
            with open(path, "wb") as f:
                f.write(mutated_safetensors(rng, whole, i))
            readable = only(ValueError, artifacts.read_info, path)
            used += readable and only(ValueError, artifacts.load, path)
            only(UserError, cluster.read_metadata, path)
            only(UserError, ddm.run.read_clusters, os.path.dirname(path))
    assert used < 350


HOSTILE_NUMBERS = [
    0, -1, -8, 7, 10**6, 10**9, 2**31, 2**63, 10**30, 1.5, 8.0, 1e300, math.nan,
    None, True, "8", "", [], [8], {}, "x" * 10000,
]


def memory():
    """The most KB that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_mutated_descriptions_of_a_model_raise_value_errors_alone(saved):
    """Every number of the description replaced by a hostile one, the weights as they were."""
    path, info = saved
    model = info["model"]
    weights = artifacts.load(path)[0].state_dict()
    wholes = [[], {}, None, 5, "x", {"model": None}, {"model": []}, {"model": {}}]
    wholes += [{"model": {"evil": 1}}, {"model": model | {"evil": 1}}]
    before = memory()
    with within(60):
        for key in model:
            for value in HOSTILE_NUMBERS:
                claim(path, info | {"model": model | {key: value}}, weights)
                only(ValueError, artifacts.read_info, path)
                only(ValueError, artifacts.load, path)
        for whole in wholes:
            claim(path, whole, weights)
            assert not only(ValueError, artifacts.read_info, path)
            assert not only(ValueError, artifacts.load, path)
        for text in ("", "{", "[" * 100_000, "9" * 5000, "NaN", '"\\ud800"'):
            claim(path, text, weights)
            assert not only(ValueError, artifacts.load, path)
    assert memory() - before < 300_000


@pytest.mark.parametrize("claimed", [
    {"depth": 10**9},
    {"dim": 10**9},
    {"depth": 10**9, "double": 10**9, "dim": 16},
    {"size": 10**9, "patch": 1},
    {"size": 4 * 10**6},
    {"classes": 10**9},
    {"length": 10**9, "condition": "text", "vocab": 10**9},
    {"clusters": 10**9},
    {"channels": 10**9},
], ids=str)
def test_a_model_that_claims_to_be_huge_is_refused_at_once(saved, claimed):
    """And without memory."""
    path, info = saved
    weights = artifacts.load(path)[0].state_dict()
    claim(path, info | {"model": info["model"] | claimed}, weights)
    before = memory()
    with within(3):
        for function in (artifacts.read_info, artifacts.load):
            with pytest.raises(ValueError, match="is not a model of this project"):
                function(path)
    assert memory() - before < 100_000


NO_SAFETENSORS = {
    "empty":                b"",
    "zeros":                b"\0" * 8,
    "ones":                 b"\xff" * 8,
    "huge header":          b"\xff" * 7 + b"\x7f",
    "no metadata":          b"\x02\0\0\0\0\0\0\0{}",
    "a list":               b"\x02\0\0\0\0\0\0\0[]",
    "zip: torch.save":      b"PK\x03\x04" + b"\0" * 100,
    "pickle":               b"\x80\x04\x95" + b"\0" * 100,
    "a terabyte of header": (1 << 40).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("content", NO_SAFETENSORS.values(), ids=NO_SAFETENSORS.keys())
def test_files_that_are_no_safetensors_are_refused(tmp_path, content):
    path = tmp_path / "clusters.safetensors"
    path.write_bytes(content)
    for error, function, place in (
        (ValueError, artifacts.read_info, path),
        (ValueError, artifacts.load, path),
        (UserError, cluster.read_metadata, path),
        (UserError, ddm.run.read_clusters, tmp_path),
    ):
        with pytest.raises(error, match="clusters.safetensors"), within(5):
            function(str(place))


HOSTILE_TOML = [
    "1" + "0" * 400, "1" + "0" * 5000, "0x" + "f" * 5000, "[" * 5000, "{a=" * 2000,
    "nan", "inf", "-inf", "1e400", '"', "'''", '"""', "=", "\n", "[", "]", "[[data]]",
    "1979-05-27", "{}", "[1, 2]", "true", "-1", "0", "\0", "\udcff", "\\", "a.b.c", "data.size",
    "[train.router.x]", "\u202e", "1_000", "+", "0b1", "#",
]


def test_mutated_configs_raise_user_errors_alone(tmp_path):
    rng = random.Random(3)
    path = tmp_path / "config.toml"
    used = 0
    pieces = [piece.encode(errors="surrogateescape") for piece in HOSTILE_TOML]
    values = [m.start() for m in re.finditer(r"(?<== ).", TINY)]
    with within(60):
        for _ in range(400):
            path.write_bytes(mutated(rng, TINY.encode(), pieces, values))
            used += only(UserError, ddm.config.read_toml, path)
    assert used < 200


@pytest.mark.parametrize("value", HOSTILE_TOML)
def test_hostile_values_of_each_kind_of_key_raise_user_errors_alone(tmp_path, value):
    """Whole numbers, numbers, switches, words, tables and keys."""
    path = tmp_path / "config.toml"
    for text in (
        f"[data]\nsize = {value}",
        f"[train]\nlr = {value}",
        f"[data]\nflip = {value}",
        f"[data]\ncondition = {value}",
        f"[train]\nlr = [{value}]",
        f"data = {value}",
        f"[{value}]\nsize = 8",
        f"[data]\n{value} = 8",
        f"[train.router]\nlr = {value}",
        f"{value}" * 50,
        f"[data]\nsize = -{value}",
    ):
        path.write_bytes(text.encode(errors="surrogateescape"))
        with within(10):
            only(UserError, ddm.config.read_toml, path)
    path.unlink()
    with pytest.raises(UserError):
        ddm.config.read_toml(path)
    with pytest.raises(UserError):
        # a folder
        ddm.config.read_toml(tmp_path)


ENTRY = {"samples": 10, "bytes": 20480, "sha256": "0" * 64, "source": "1" * 64}
MANIFEST = {
    "fingerprint": "abc",
    "shard": "0",
    "tars": {"00000.tar": ENTRY, "00001.tar": ENTRY},
}


def use(folder):
    """A manifest that is read has what others take from it."""
    manifest = ddm.run.read_manifest(folder)
    for entry in manifest["tars"].values():
        assert isinstance(entry["samples"], int | float)
        assert isinstance(entry["bytes"], int | float)
        assert len(entry["sha256"]) >= 0
    return manifest["fingerprint"]


def test_mutated_manifests_raise_user_errors_alone(tmp_path):
    rng = random.Random(4)
    path = tmp_path / "manifest.json"
    text = json.dumps(MANIFEST).encode()
    pieces = [*HOSTILE_JSON, b"NaN", b"9" * 5000, b"[" * 5000, b'{"a":' * 3000, b"true",
              b'"tars": 5, ']
    used = 0
    with within(60):
        for _ in range(400):
            path.write_bytes(mutated(rng, text, pieces))
            used += only(UserError, use, tmp_path)
    assert used < 300


@pytest.mark.parametrize("content", [
    b"",
    b"{",
    b"[]",
    b"null",
    b"5",
    b'"x"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"9" * 5000,
    b'{"fingerprint": 1}',
    b'{"fingerprint": "x", "tars": []}',
    b'{"fingerprint": "x", "tars": null}',
    b'{"fingerprint": "x", "tars": {"a.tar": 5}}',
    b'{"fingerprint": "x", "tars": {"a.tar": {}}}',
    json.dumps(MANIFEST | {"tars": {"a.tar": ENTRY | {"samples": "3"}}}).encode(),
    json.dumps(MANIFEST | {"tars": {"a.tar": ENTRY | {"source": 1}}}).encode(),
], ids=lambda content: content[:50].decode(errors="replace"))
def test_a_manifest_that_is_none_is_a_user_error(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="manifest.json"):
        ddm.run.read_manifest(tmp_path)


def test_a_manifest_as_stage_1_writes_it_is_read(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    assert ddm.run.read_manifest(tmp_path) == MANIFEST


# ---- nothing is executed -------------------------------------------------------------------------

FORBIDDEN = re.compile("|".join([
    r"pickle\.load",
    r"\bimport pickle",
    r"torch\.load\(",
    r"allow_pickle\s*=\s*True",
    r"weights_only\s*=\s*False",
    # `.eval()` is a network's mode
    r"(?<![\w.])(?:eval|exec)\(",
    r"extractall",
    r"\.extract\(",
    r"marshal",
    r"shelve",
    r"yaml\.load",
    r"trust_remote_code\s*=\s*True",
    r"shell\s*=\s*True",
    r"os\.system",
]))


def test_no_reader_unpickles_evaluates_or_extracts_what_it_reads():
    """Artifacts are tars, images, JSON, TOML, CSV and safetensors: data, never code."""
    scripts = []
    for pattern in ("*.py", "ddm/*.py", "tools/*.py"):
        scripts += glob.glob(pattern, root_dir=ROOT)
    assert {"data.py", "model.py", "cluster.py", "sample.py", "ddm/artifacts.py"} <= set(scripts)
    found = []
    for name in scripts:
        with open(os.path.join(ROOT, name)) as f:
            for number, line in enumerate(f, 1):
                if FORBIDDEN.search(line):
                    found.append(f"{name}:{number}: {line.strip()}")
    assert not found


def test_a_header_that_would_take_minutes_to_read_ends_the_tar(tmp_path):
    path = tmp_path / "long.tar"
    header = tarfile.TarInfo("././@PaxHeader")
    header.type = tarfile.XHDTYPE
    header.size = 1 << 20
    path.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + b"1" * (1 << 20) + bytes(1024))
    assert list(scan_tar(path)) == []
