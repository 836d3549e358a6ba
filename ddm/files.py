"""ddm.files"""
import codecs
import contextlib
import json
import os
import re
import threading

from safetensors import SafetensorError

from ddm.errors import UserError, explain


UMASK = os.umask(0)     # there is no other way to read it, and threads must not do it beside each other
os.umask(UMASK)


def _try(temporary, path):
    """Writes and removes the file `temporary`; an OSError names `path`."""
    try:
        open(temporary, "wb").close()
        os.remove(temporary)
    except OSError as error:
        error.filename = path
        raise


def try_folder(path):
    """Makes the folder `path`, and tries to write in it. Called before work whose result belongs there: OSError."""
    os.makedirs(path, exist_ok=True)
    _try(_temporary(os.path.join(path, "x")), path)


def try_file(path):
    """Tries to write beside `path`, as atomic does; what is there stays. Called before the work whose result it will hold: OSError, UserError."""
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "no ordinary file"
        raise UserError(f"{path} is {kind}: give another name")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    _try(_temporary(path), path)


BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
        codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}      # UTF-32's before UTF-16's, which they begin with
MARKS = tuple(BOMS)


def decode_text(payload):
    """The bytes of a text file -> str, with \n at the ends of lines. By its byte order mark, UTF-8 without one. ValueError."""
    mark = next(filter(payload.startswith, BOMS)) if payload.startswith(MARKS) else b""
    text = payload[len(mark):].decode(BOMS.get(mark, "utf-8"))
    if "\0" in text:
        raise ValueError("it holds zero bytes; is it UTF-16 without a byte order mark?")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path):
    """The text of a file of the user's, whatever editor wrote it. UserError where it cannot be read, or is no text."""
    try:
        with open(path, "rb") as f:
            return decode_text(f.read())
    except OSError as error:
        raise UserError(explain(error) or f"cannot read {path}: {error}") from None
    except ValueError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 ({error}); save it as UTF-8") from None


def check_shape(value, shape, where=""):
    """ValueError unless `value`, from a JSON file, has the types of `shape`: a type, {key: shape}, {str: shape} for any keys, [shape]."""
    name = where or "it"
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is no table")
        if str in shape:
            shape = dict.fromkeys(value, shape[str])
        for key, inner in shape.items():
            if key not in value:
                raise ValueError(f"{where}.{key} is missing".lstrip("."))
            check_shape(value[key], inner, f"{where}.{key}".lstrip("."))
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{name} is no list")
        for i, inner in enumerate(value):
            check_shape(inner, shape[0], f"{where}[{i}]")
    elif shape is float and type(value) is int:
        pass        # JSON writes a whole number so
    elif not isinstance(value, shape) or isinstance(value, bool) and shape is int:
        raise ValueError(f"{name} = {str(value)[:40]!r} is no {shape.__name__}")
    return value


def parse_json(text, shape):
    """JSON -> its value, which has the types of `shape` (check_shape). ValueError, whatever is wrong with it."""
    try:
        return check_shape(json.loads(text), shape)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path, shape):
    """parse_json of a file. ValueError, whatever is wrong with it; FileNotFoundError if there is none."""
    try:
        with open(path, "rb") as f:
            return parse_json(decode_text(f.read()), shape)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(explain(error) or str(error)) from None


def write_text(path, text):
    """Writes a text file, as UTF-8 whatever the locale."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.write(text)


def sync(path):
    """What has been written to a file, or which names a folder holds, survives a loss of power from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path):
    """A name beside `path`, this thread's own."""
    return f"{path}.{os.getpid()}-{threading.get_native_id()}.tmp"


@contextlib.contextmanager
def atomic(path):
    """Yields a name beside `path` to write to; renames it into place at the end, so that no half-written file is ever seen, even after a loss of power.

    An OSError names `path`, also where safetensors failed to write, or the write itself did, which knows no name.
    """
    folder, temporary = os.path.dirname(os.path.abspath(path)), _temporary(path)
    try:
        os.makedirs(folder, exist_ok=True)
        yield temporary
        os.chmod(temporary, 0o666 & ~UMASK)     # safetensors would make its files private
        sync(temporary)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):      # some network file systems cannot
            sync(folder)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise UserError(f"{path} could not be written: {error}") from None
        raise OSError(int(number[1]), os.strerror(int(number[1])), path) from None
    except OSError as error:
        if error.filename is None or error.filename == temporary:
            error.filename, error.filename2 = path, None
        raise
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
