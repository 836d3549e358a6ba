"""ddm.tars"""
import glob
import hashlib
import itertools
import json
import os
import re
import stat
import sys
import tarfile
import time
import zlib
from dataclasses import dataclass, field

from ddm import found
from ddm.errors import UserError
from ddm.files import atomic, read_json, write_text
from ddm.process import gather


# of several images of one key the first of these is taken
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "bmp")
# folders that systems leave in a tar
LEFTOVERS = ("__MACOSX", ".AppleDouble", "@eaDir", ".ipynb_checkpoints")
RETRY = (1, 5, 30)      # seconds until a failed read is tried again
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
