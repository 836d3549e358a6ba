r"""The text of captions and prompts: what an encoder gets, its words, and these as numbers.

    normalise_text(" a  red\tcircle ")    ->  "a red circle"
    words("A red, RED circle!")           ->  ["a", "red", "red", "circle"]
    hash_words("a red circle", 4, 1000)   ->  [L] int64, the words' numbers and zeros
"""
import functools
import re
import unicodedata
import zlib

import torch

# Formatting characters that nobody sees: soft hyphens, marks of direction, word joiners, byte order
# marks. Not the joiners U+200C and U+200D, which change how letters and emoji look.
INVISIBLE = re.compile("[\u00ad\u061c\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
# control characters and the space of no width are space
SPACES = re.compile("[\\s\\x00-\\x1f\\x7f-\\x9f\u200b]+")
# The letters are kinds of characters, as _kind tells them. A flag is a pair of regional indicators
# (r). A symbol (s) has its skin tone (t), its marks (m), and joined (j) to others it is one emoji.
# A word is letters, digits, underscores (w) and marks. Anything else but space (x) counts where it
# carries a mark: the keycap of "#", the "!!" that is drawn as an emoji.
WORD = re.compile("rr?|[st][tm]*(?:j+[st][tm]*)*|[wm]+(?:j+[wm]+)*|xm+")
# behind a character: the same one, drawn in another way
VARIANTS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")


def normalise_text(text):
    """A caption or a prompt as every text encoder gets it: one line; what looks alike is alike.

    Unicode's NFC, no invisible characters, no outer spaces; spaces, line ends and control
    characters in a row are one space.
    """
    # the same, sooner
    if text.isascii() and text.isprintable() and "  " not in text:
        return text.strip()

    text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    return SPACES.sub(" ", text).strip()


def words(text):
    """The words of a text in lower case: letters, digits, underscores with marks; each symbol."""
    # the same, sooner
    if text.isascii():
        return re.findall(r"\w+", text.lower())

    text = normalise_text(text).lower()
    kinds = "".join(map(_kind, text))
    found = []
    for match in WORD.finditer(kinds):
        word = VARIANTS.sub("", text[match.start():match.end()])
        if word:
            found.append(word)
    return found


@functools.lru_cache(4096)
def _kind(character):
    """The kind of a character, one letter of those that WORD is written in."""
    if character.isalnum() or character == "_":
        return "w"
    if character in "\u200c\u200d":
        return "j"
    if "\U0001f1e6" <= character <= "\U0001f1ff":
        return "r"
    # modifiers of the skin's colour, and the tags that spell the flags of regions
    if "\U0001f3fb" <= character <= "\U0001f3ff" or "\U000e0020" <= character <= "\U000e007f":
        return "t"

    category = unicodedata.category(character)
    if category[0] == "M":
        return "m"
    if category[0] == "Z":
        return " "
    # "$", "+" and their like are no words, as any punctuation
    if category in ("So", "Sm", "Sc") and not character.isascii():
        return "s"
    return "x"


def hash_words(text, length, vocab):
    """A caption -> [L] int64: its words as numbers 1..vocab-1, then zeros up to L = length.

    The empty text is all zeros: no condition. A fixed hash (CRC-32) instead of a vocabulary file:
    nothing to build, to ship or to keep in step between nodes.
    """
    numbers = []
    for word in words(text)[:length]:
        numbers.append(zlib.crc32(word.encode()) % (vocab - 1) + 1)
    return torch.tensor(numbers + [0] * (length - len(numbers)), dtype=torch.int64)
