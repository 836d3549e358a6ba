"""ddm.pictures"""
import bisect
import contextlib
import functools
import importlib.util
import math
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont


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
