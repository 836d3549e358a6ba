"""Files: written whole or not at all, tried before the work, read with one line for what is wrong.
"""
import codecs
import contextlib
import errno
import json
import os
import re
import threading

from safetensors import SafetensorError

from ddm.errors import UserError, explain

# there is no other way to read it, and threads must not do it beside each other
UMASK = os.umask(0)
os.umask(UMASK)


# ---- writing -------------------------------------------------------------------------------------

def sync(path):
    """What has been written to a file, or which names a folder holds, survives a loss of power from
    here on.
    """
    # for reading alone: a folder can be opened in no other way
    descriptor = os.open(path, os.O_RDONLY)

    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path):
    """A name beside `path`, this thread's own."""
    return f"{path}.{os.getpid()}-{threading.get_native_id()}.tmp"


@contextlib.contextmanager
def atomic(path):
    """Yields a name beside `path` to write to; renames it into place at the end, so that no
    half-written file is ever seen, even after a loss of power.

    An OSError names `path`, also where safetensors failed to write, or the write itself did, which
    knows no name.
    """
    folder = os.path.dirname(os.path.abspath(path))
    # beside it: a rename is a single step only within one file system
    temporary = temporary_name(path)

    try:
        os.makedirs(folder, exist_ok=True)
        # an exception in the caller's block skips the rename, and what was at `path` stays
        yield temporary
        # safetensors would make its files private
        os.chmod(temporary, 0o666 & ~UMASK)
        # first the bytes, then the name: the other way round, power may fail in between
        sync(temporary)
        os.replace(temporary, path)
        # some network file systems cannot
        with contextlib.suppress(OSError):
            sync(folder)
    except SafetensorError as error:
        # safetensors is written in Rust, and gives the number within a text alone
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(errno.EIO, str(error), path) from None
        number = int(number[1])
        raise OSError(number, os.strerror(number), path) from None
    except OSError as error:
        # the temporary name would tell the user nothing
        if error.filename is None or error.filename == temporary:
            error.filename = path
            error.filename2 = None
        raise
    finally:
        # renamed, it is gone; still there, it is half-written
        if os.path.exists(temporary):
            os.remove(temporary)


def write_text(path, text):
    """Writes a text file, as UTF-8 whatever the locale."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.write(text)


def _try(temporary, path):
    """Writes and removes the file `temporary`; an OSError names `path`."""
    try:
        # done rather than asked for: of a network file system os.access may be wrong
        open(temporary, "wb").close()
        os.remove(temporary)
    except OSError as error:
        error.filename = path
        raise


def try_folder(path):
    """Makes the folder `path`, and tries to write in it, before work whose result belongs there.
    OSError.
    """
    os.makedirs(path, exist_ok=True)
    # any name will do
    _try(temporary_name(os.path.join(path, "x")), path)


def try_file(path):
    """Tries to write beside `path`, as atomic does, before the work whose result it will hold; what
    is there stays. OSError, UserError.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "no ordinary file"
        raise UserError(f"{path} is {kind}: give another name")

    # the file itself is not opened: it may hold what an earlier call has worked for
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    _try(temporary_name(path), path)


# ---- text ----------------------------------------------------------------------------------------

# UTF-32's before UTF-16's, which they begin with
BOMS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
MARKS = tuple(BOMS)


def decode_text(payload):
    """The bytes of a text file -> str, with \\n at the ends of lines.

    By its byte order mark, UTF-8 without one. ValueError if it is no text.
    """
    encoding = "utf-8"
    if payload.startswith(MARKS):
        # the first that fits, by the order of BOMS
        mark = next(filter(payload.startswith, BOMS))
        payload = payload[len(mark):]
        encoding = BOMS[mark]

    text = payload.decode(encoding)

    # each letter of UTF-16 has one, where it is taken for UTF-8
    if "\0" in text:
        raise ValueError("it holds zero bytes; is it UTF-16 without a byte order mark?")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path):
    """The text of a file of the user's, whatever editor wrote it. UserError where it cannot be
    read, or is no text.
    """
    try:
        with open(path, "rb") as f:
            return decode_text(f.read())
    except OSError as error:
        raise UserError(explain(error) or f"cannot read {path}: {error}") from None
    except ValueError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 ({error}); save it as UTF-8"
                        ) from None


# ---- JSON ----------------------------------------------------------------------------------------

def check_shape(value, shape, where=""):
    """-> value. ValueError unless `value`, from a JSON file, has the types of `shape`.

    shape: a type, {key: shape}, {str: shape} for any keys, [shape]. where: its name in the file.
    """
    name = where or "it"
    # `where` grows on the way down, so that the error names the place in the file
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is no table")
        _check_table(value, shape, where)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{name} is no list")
        for i, inner in enumerate(value):
            check_shape(inner, shape[0], f"{where}[{i}]")
    elif not _is_of(value, shape):
        raise ValueError(f"{name} = {str(value)[:40]!r} is no {shape.__name__}")
    return value


def _check_table(value, shape, where):
    # any keys, such as names of tars
    if str in shape:
        shape = dict.fromkeys(value, shape[str])

    # more keys than these are no mistake
    for key, inner in shape.items():
        place = f"{where}.{key}".lstrip(".")
        if key not in value:
            raise ValueError(f"{place} is missing")
        check_shape(value[key], inner, place)


def _is_of(value, kind):
    """isinstance, for JSON: a whole number may be a float, and true is no number."""
    if kind is float and type(value) is int:
        return True

    # bool is a subclass of int
    if kind is int and isinstance(value, bool):
        return False

    return isinstance(value, kind)


def parse_json(text, shape):
    """JSON -> its value, which has the types of `shape` (check_shape). ValueError, whatever is
    wrong with it.
    """
    try:
        return check_shape(json.loads(text), shape)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path, shape):
    """parse_json of a file. ValueError, whatever is wrong with it; FileNotFoundError if there is
    none.
    """
    try:
        with open(path, "rb") as f:
            return parse_json(decode_text(f.read()), shape)
    # callers tell a file that is missing from one that is damaged
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(explain(error) or str(error)) from None
