"""Sheets of images with labels, and PNGs that say how they were made.

    image_grid(rows, captions)          -> PIL image, rows of images with their captions
    routing_sheet(rows, K)              -> PIL image, each row's predictions and router answers
    save_png(path, image, {"seed": 1})  a PNG with text chunks; made_here(path) knows it again
"""
import bisect
import contextlib
import functools
import importlib.util
import math
import os
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngImageFile, PngInfo

from ddm.files import atomic

# of expert k, repeated
COLOURS = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1",
           "#edc948", "#76b7b2", "#ff9da7", "#9c755f", "#888888"]
# images of a path in a row of the routing sheet, beside the sample
COLUMNS = 8
# pixels between the images of the routing sheet
GAP = 4
# what our PNGs say of their origin
SOFTWARE = "nanoDDM"


# ---- labels --------------------------------------------------------------------------------------

@functools.lru_cache
def label_font(size):
    """The font of labels: DejaVu Sans, which matplotlib carries, or Pillow's own.

    DejaVu Sans has Latin, Greek and Cyrillic.
    """
    package = importlib.util.find_spec("matplotlib")
    folders = package.submodule_search_locations if package else []
    for folder in folders:
        path = os.path.join(folder, "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")
        with contextlib.suppress(OSError):
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)


def cut_label(text, font, width):
    """The text, or as much of its beginning, with dots behind it, as `width` pixels hold."""
    if len(text) <= width and font.getlength(text) <= width:
        return text

    # a thousand words need not be set to see that they are too long
    text = text[:width]
    # how many characters fit, by halving
    fits = bisect.bisect_right(range(len(text) + 1), width,
                               key=lambda n: font.getlength(text[:n] + "..."))
    return text[:max(0, fits - 1)].rstrip() + "..."


def _colour(k):
    return COLOURS[k % len(COLOURS)]


def _enlarged(image, side):
    """An image [H,W,3] uint8 as a PIL image of side x side pixels, each pixel a square."""
    return Image.fromarray(np.asarray(image)).resize((side, side), Image.Resampling.NEAREST)


# ---- a grid --------------------------------------------------------------------------------------

def image_grid(rows, captions=None, frames=None):
    """Rows of images ([S,S,3] uint8) -> one PIL image.

    captions: a text at the left of each row, cut to the width of four images. frames: the same rows
    of cluster numbers, or None for an image without a frame. Small images are enlarged by a whole
    factor to about 64 pixels. More than a dozen rows stand in two columns, many more in as many as
    make the sheet about as wide as high.
    """
    columns = 1
    if len(rows) > 12:
        across = max(map(len, rows)) + 4 * bool(captions)
        columns = max(2, round((1.2 * len(rows) / across) ** 0.5))

    # each column is a grid of its own, with its own margin for captions
    height = math.ceil(len(rows) / columns)
    parts = []
    for first in range(0, len(rows), height):
        part = slice(first, first + height)
        parts.append(_grid_column(rows[part], captions and captions[part], frames and frames[part]))

    width = sum(part.width for part in parts)
    sheet = Image.new("RGB", (width, max(part.height for part in parts)), "white")
    left = 0
    for part in parts:
        sheet.paste(part, (left, 0))
        left += part.width
    return sheet


def _grid_column(rows, captions, frames):
    """image_grid's rows below each other."""
    # a whole factor keeps the pixels square
    side = rows[0][0].shape[0]
    side *= max(1, round(64 / side))
    gap = 6
    step = side + gap

    margin = gap
    if captions:
        font = label_font(12)
        captions = [cut_label(caption, font, min(400, 4 * step)) for caption in captions]
        margin += gap + math.ceil(max(map(font.getlength, captions)))

    # below a framed image stands the number of its expert
    below = 16 if frames else 0
    width = margin + max(map(len, rows)) * step
    height = gap + len(rows) * (step + below)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)

    for r, row in enumerate(rows):
        y = gap + r * (step + below)
        if captions:
            draw.text((gap, y + side // 2), captions[r], "black", font, anchor="lm")
        for i, image in enumerate(row):
            x = margin + i * step
            sheet.paste(_enlarged(image, side), (x, y))
            if frames and frames[r][i] is not None:
                _draw_frame(draw, (x, y), side, k=frames[r][i])
    return sheet


def _draw_frame(draw, corner, side, k):
    """A frame in expert k's colour, and its name below."""
    x, y = corner
    draw.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline=_colour(k), width=2)
    font = label_font(11)
    draw.text((x, y + side + 2), cut_label(f"expert {k}", font, side + 6), _colour(k), font)


# ---- the routing sheet ---------------------------------------------------------------------------

@dataclass
class Step:
    """What one step of a path asked and used."""

    t: float
    # the router's p(k | x_t, t, c) [K]
    p: list[float]
    # of the experts in use [K]
    weights: list[float]


@dataclass
class RoutingRow:
    """One image's path through the ensemble."""

    title: str
    path: list[Step] = field(default_factory=list)
    # (t, x_0 as predicted there [S,S,3] uint8), at most COLUMNS, and at last (0, the sample)
    images: list[tuple] = field(default_factory=list)


def routing_sheet(rows, K):
    """An image for teaching: for each RoutingRow its images and, below, two strips over time.

    The upper strip stacks the router's p(k | x_t, t, c), the lower one the weights of the experts.
    """
    # labels need room
    side = max(64, rows[0].images[0][1].shape[0])
    width = (COLUMNS + 1) * (side + GAP)
    sheet_rows = [_routing_row(row, side, width) for row in rows]
    legend = _legend(K, width)

    height = legend.height + sum(row.height for row in sheet_rows)
    sheet = Image.new("RGB", (width + GAP, height), "white")
    top = 0
    for part in (legend, *sheet_rows):
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


# of a line of text, of a strip of probabilities, of a strip of weights
LINE = 18
BAND = 40
THIN = 10


def _legend(K, width):
    """What the sheet shows, and each expert's colour."""
    font = label_font(11)
    name_width = round(font.getlength(f"expert {K - 1}")) + 3 * GAP
    names_in_line = width // name_width
    lines = 2 + math.ceil(K / names_in_line)

    sheet = Image.new("RGB", (width + GAP, lines * LINE + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 2), "x_0 as predicted at time t, and the sample.", "black", font)
    about = "Strips, from noise to data: p(k | x_t, t, c); thin: the experts in use"
    draw.text((GAP, 2 + LINE), about, "black", font)
    for k in range(K):
        line, place = divmod(k, names_in_line)
        corner = (GAP + place * name_width, 2 + (2 + line) * LINE)
        draw.text(corner, f"expert {k}", _colour(k), font)
    return sheet


def _routing_row(row, side, width):
    """A RoutingRow drawn: its title, its images, its two strips."""
    height = LINE + side + BAND + THIN + 4 * GAP
    sheet = Image.new("RGB", (width + GAP, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = label_font(11)
    draw.text((GAP, 0), cut_label(row.title, font, width - GAP), "black", font)

    for i, (t, image) in enumerate(row.images):
        x = GAP + i * (side + GAP)
        sheet.paste(_enlarged(image, side), (x, LINE))
        # on the image, in white with a black edge: legible on any
        label = f"t = {t:.2f}" if t else "sample"
        draw.text((x + 3, LINE + side - 15), label, "white", font, stroke_width=1,
                  stroke_fill="black")

    top = LINE + side + GAP
    ends = [step.t for step in row.path[1:]] + [0.0]
    for step, end in zip(row.path, ends, strict=True):
        # from its own time to the next one's
        left = GAP + round((1 - step.t) * (width - GAP))
        right = GAP + round((1 - end) * (width - GAP)) - 1
        _draw_stack(draw, (left, right), (top, BAND), shares=step.p)
        _draw_stack(draw, (left, right), (top + BAND + GAP // 2, THIN), shares=step.weights)
    return sheet


def _draw_stack(draw, across, down, shares):
    """Stacks rectangles, as high as the experts' shares. across: left, right; down: top, height."""
    left, right = across
    top, height = down
    edge = 0.0
    for k, share in enumerate(shares):
        upper = top + round(edge * height)
        edge += share
        lower = top + round(edge * height) - 1
        # a share of less than a pixel is left out
        if right >= left and lower >= upper:
            draw.rectangle((left, upper, right, lower), fill=_colour(k))


# ---- PNGs ----------------------------------------------------------------------------------------

def save_png(path, image, values):
    """Writes a PIL image with text chunks {name: value} that say how it was made."""
    chunks = PngInfo()
    for name, value in values.items():
        chunks.add_text(name, str(value))
    chunks.add_text("software", SOFTWARE)
    with atomic(path) as temporary:
        image.save(temporary, "PNG", pnginfo=chunks)


def made_here(path):
    """Whether a file is a PNG that says that it comes from here."""
    if not os.path.isfile(path):
        return False
    try:
        # Image.open would refuse a large grid
        with PngImageFile(path) as image:
            return image.info.get("software") == SOFTWARE
    except Exception:
        # whatever Pillow makes of a file that is no PNG
        return False
