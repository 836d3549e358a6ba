"""Tars: which ones --data names, what samples and bytes are in them, and how one is written.

find_tars     patterns -> {name: path}
scan_tar      a tar -> its Samples: where each one's members are, from the headers alone
TarFiles      (path, offset, size) -> bytes, through the failures of a network file system
Source        which bytes a tar has, by its SHA-256
TarWriter     writes a tar

data.py makes training samples of the bytes.
"""
import collections
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

# a tar consists of blocks of so many bytes: a header is one, a payload is padded to whole ones
BLOCK = 512

# seconds until a failed read is tried again
RETRY = (1, 5, 30)

# tars that TarFiles keeps open
OPEN_FILES = 128

STALE = "not what the tar's index says (the tar was replaced: delete its .idx)"


# ---- reading -------------------------------------------------------------------------------------

class BadSample(Exception):
    """A sample that cannot be used.

    cause: one of a few, by which they are counted; detail: what else is known of this one.
    """

    def __init__(self, cause, detail=""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.detail = detail


def retry_io(function, *args):
    """function(*args), tried again if it fails, as a network file system may for a while.

    BadSample if it stays so.
    """
    # None: the last try
    for wait in (*RETRY, None):
        try:
            return function(*args)
        except OSError as error:
            if wait is None:
                raise BadSample(f"unreadable ({type(error).__name__})") from None
            time.sleep(wait)


class TarFiles:
    """Reads pieces of tars, and keeps those open that it has read last."""

    def __init__(self):
        # path -> descriptor, the latest last
        self.descriptors = collections.OrderedDict()
        # paths that could not be read even after a wait
        self.lost = set()

    def read(self, path, offset, size):
        """Bytes of a tar. BadSample if they cannot be read, or if the tar ends before."""
        try:
            payload = retry_io(self._read_once, path, offset, size)
        except BadSample:
            self.lost.add(path)
            raise
        if self.lost:
            self.lost.discard(path)

        if len(payload) < size:
            raise BadSample("cut off")
        return payload

    def _read_once(self, path, offset, size):
        try:
            if path not in self.descriptors:
                self.descriptors[path] = os.open(path, os.O_RDONLY)
                if len(self.descriptors) > OPEN_FILES:
                    _, oldest = self.descriptors.popitem(last=False)
                    os.close(oldest)
            self.descriptors.move_to_end(path)
            return os.pread(self.descriptors[path], size, offset)
        except OSError:
            # the next try opens it anew
            if path in self.descriptors:
                os.close(self.descriptors.pop(path))
            # there was a wait already, be it for another tar: not one for each sample
            if self.lost:
                raise BadSample("unreadable (still)") from None
            raise


# ---- the samples of a tar ------------------------------------------------------------------------

@dataclass
class Sample:
    """Where a sample's members are. A role is "image", or an extension in small letters."""

    key: str
    # its members' bytes in the tar, headers and padding included
    start: int
    end: int = 0
    # role -> (offset, size) of the payload
    members: dict = field(default_factory=dict)
    # role -> CRC-32 of the block before the payload, which names and sizes it
    header_crcs: dict = field(default_factory=dict)
    # role -> the extension as it is written
    taken: dict = field(default_factory=dict)
    # extensions that are left out: a second image
    others: list = field(default_factory=list)

    def add(self, extension, place, header_crc):
        """A member joins the sample. place: (offset, size) of its payload."""
        role = role_of(extension)

        # a second one for this role
        if role in self.members:
            first, second = sorted((self.taken[role], extension), key=_precedence)
            self.others.append(second)
            if first != extension:
                return

        self.members[role] = place
        self.header_crcs[role] = header_crc
        self.taken[role] = extension

    def choice(self):
        """What was taken where there was a choice, in words."""
        other = self.others[0]
        return f"{found.printable(self.key)}.{self.taken[role_of(other)]} is taken, not .{other}"


def role_of(extension):
    lower = extension.lower()
    return "image" if lower in IMAGE_TYPES else lower


def _precedence(extension):
    """Of two members for one role the one that sorts first is taken."""
    lower = extension.lower()
    kind = IMAGE_TYPES.index(lower) if lower in IMAGE_TYPES else 0
    return kind, extension != lower


@dataclass
class Notes:
    """What scan_tar leaves out of a tar."""

    # members whose names begin with a dot, and the like
    hidden: int = 0
    # why the tar ends early
    torn: str = ""


def split_name(name):
    """A member's name -> (key, extension), the key up to the first dot of the base name.

    None for what systems leave in a tar: ._NAME, .DS_Store, __MACOSX/.
    """
    while name.startswith("./"):
        name = name[2:]

    folder, base = os.path.split(name)
    if base.startswith(".") or not set(LEFTOVERS).isdisjoint(folder.split("/")):
        return None
    stem, _, extension = base.partition(".")
    return os.path.join(folder, stem), extension


def read_key(block):
    """The key in a member's header, one block; empty where it says none."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    except (tarfile.TarError, ValueError, TypeError):
        return ""
    named = split_name(header.name)
    return named[0] if named else ""


class _Header(tarfile.TarInfo):
    """A header with the CRC-32 of its block, and no longer than any name or time that is meant
    well: tarfile's patterns take minutes over a megabyte of digits.
    """

    EXTENDED = (
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    )

    def _proc_member(self, tar):
        if self.type in self.EXTENDED and self.size > 1 << 14:
            raise tarfile.ReadError("a header is too long")
        return super()._proc_member(tar)

    @classmethod
    def frombuf(cls, block, encoding, errors):
        header = super().frombuf(block, encoding, errors)
        header.crc = zlib.crc32(block)
        return header


def scan_tar(path, notes=None, file=None):
    """Yields the Samples of a tar in its order, reading headers only.

    A tar that is cut short, or damaged, gives its whole samples before that and a warning. A
    second member of the same name begins another sample. Nothing is ever extracted: names are
    names, not paths. notes: a Notes to be filled; file: the tar's bytes, open, where they are not
    at `path`. OSError where the file system fails.
    """
    if notes is None:
        notes = Notes()
    if file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
    else:
        size = os.path.getsize(path)

    torn = ""
    opened = False
    try:
        with tarfile.open(path, "r:", file, encoding="utf-8", tarinfo=_Header) as tar:
            opened = True
            yield from _whole_samples(tar, notes, size)
    except OSError:
        # the file system's fault, not the tar's: what is read now would pass for the whole
        raise
    except Exception as error:
        # tarfile raises more than its own kinds on a hostile header
        torn = str(error) or type(error).__name__

    if torn:
        notes.torn = _describe_torn(path, torn, opened, file)
        whole = "; its whole samples are used" if opened else ""
        print(f"warning: {path}: {notes.torn}{whole}", file=sys.stderr)


def _whole_samples(tar, notes, size):
    """Yields the Samples of an open tar of so many bytes. ReadError where it is torn."""
    sample = None
    # of the sample so far: one that comes again begins another
    extensions = set()
    for key, extension, member in _named_members(tar, notes):
        if sample is None or sample.key != key or extension in extensions:
            if sample is not None:
                yield sample
            sample = Sample(key, start=member.offset)
            extensions = set()
        extensions.add(extension)

        if member.offset_data + member.size > size:
            raise tarfile.ReadError("a member is cut off")
        sample.add(extension, (member.offset_data, member.size), member.crc)
        # a member's bytes are padded to whole blocks
        blocks = -(-member.size // BLOCK)
        sample.end = member.offset_data + blocks * BLOCK

    if not _ends_well(tar):
        raise tarfile.ReadError("it does not end as a tar does")
    # not before: of a torn tar the last sample may lack members
    if sample is not None:
        yield sample


def _named_members(tar, notes):
    """Yields (key, extension, member) of the files in an open tar; counts the hidden ones."""
    for member in tar:
        # tarfile would keep them all
        tar.members = []
        # it would read in circles
        if member.size < 0 or tar.offset <= member.offset:
            raise tarfile.ReadError("a member has an impossible size")
        # of a sparse file the tar holds other bytes than its size says
        if not member.isfile() or member.issparse():
            continue

        named = split_name(member.name)
        if named is None:
            notes.hidden += 1
            continue
        yield *named, member


def _ends_well(tar):
    """Whether nothing but empty blocks follows: a hole, or another tar, would end it, too."""
    tar.fileobj.seek(tar.offset)
    rest = tar.fileobj.read(1 << 20)
    return len(rest) >= BLOCK and rest.count(0) == len(rest)


def _describe_torn(path, torn, opened, file):
    if opened:
        return torn
    other = "" if file else found.file_format(path)
    return f"it is no tar, but {other}" if other else f"it is no tar ({torn})"


def scan_with_retries(path, notes=None):
    """scan_tar for a file system that fails for a while: continues where it was.

    UserError if it stays so.
    """
    done = 0
    waits = iter(RETRY)
    while True:
        try:
            if notes is not None:
                # counted anew
                notes.hidden = 0

            for sample in itertools.islice(scan_tar(path, notes), done, None):
                done += 1
                yield sample
            return
        except OSError as error:
            wait = next(waits, None)
            if wait is None:
                raise UserError(f"cannot read {path}: {error.strerror or error}: look at the disk "
                                "or the network file system, then run the same command again",
                                local=True) from None
            time.sleep(wait)


def describe_samples(path, cause, condition):
    """Words for the end of an error: what a tar holds, whose samples cannot be used because of
    `cause`, and the likely remedy.
    """
    names = []
    notes = Notes()
    try:
        with tarfile.open(path, "r:", encoding="utf-8", tarinfo=_Header) as tar:
            for key, extension, _ in itertools.islice(_named_members(tar, notes), found.MANY):
                names.append((key, extension))
    except Exception:
        # as in scan_tar, whose warning says why
        pass

    if names:
        return found.instead_of_samples(path, names, cause, condition)
    if notes.hidden:
        return (f"{path} holds nothing but {notes.hidden} files whose names begin with a dot, or "
                "in folders like __MACOSX, which are no samples")
    other = found.file_format(path)
    return f"{path} is {other}" if other else f"{path} is a tar without files"


# ---- --data --------------------------------------------------------------------------------------

def find_tars(patterns, left=None):
    """{name: path} of the tars that the patterns match, sorted by name.

    A tar that is found twice counts once. left: a list, to which joins in words what is no tar.
    UserError if a pattern matches no tar, if one cannot be read, or two have the same name.
    """
    patterns = [str(pattern) for pattern in patterns]
    # as sets that keep their order
    tars = {}
    others = {}
    for pattern in patterns:
        matched = _match(pattern)
        if not matched:
            instead = found.instead_of_tars(os.path.expanduser(pattern), [])
            raise UserError(f"no tar matches --data {pattern}: {instead}")
        for path in matched:
            lower = path.lower()
            if lower.endswith(".tar"):
                tars[path] = None
            elif not lower.endswith(".tar.idx"):
                others[path] = None

    if not tars:
        shown = " ".join(patterns[:3])
        if len(patterns) > 3:
            shown += f" and {len(patterns) - 3} more"
        instead = found.instead_of_tars(patterns[0], list(others))
        raise UserError(f"no tar matches --data {shown}: {instead}")

    names, links = _name_tars(tars)
    if left is not None:
        left += _describe_left(list(others), links)
    return dict(sorted(names.items()))


def _describe_left(others, links):
    """What find_tars leaves out, in words. others: paths that are no tars; links: how many."""
    left = []
    if others:
        words = f"{found.count_endings(others)} ({others[0]} the first"
        remedy = found.remedy(others)
        left.append(f"{words}; {remedy})" if remedy else f"{words})")
    if links:
        left.append(f"{links} links to tars that are there already")
    return left


def _match(pattern):
    """The paths that one pattern of --data stands for: itself, if there is such a path, else as a
    glob in which ** is any depth.
    """
    path = os.path.expanduser(pattern)
    if os.path.lexists(path):
        return [path]

    is_url = re.match(r"[a-z][a-z0-9+.-]*://", path)
    return [] if is_url else sorted(glob.glob(path, recursive=True))


def _name_tars(paths):
    """-> ({name: path} of the tars, how many links were left out as they lead to one of these)."""
    names = {}
    links = 0
    files = set()
    # files before the links to them
    for path in sorted(paths, key=lambda path: (os.path.islink(path), path)):
        _check_tar(path)
        file = os.path.realpath(path)
        if file in files:
            # by another link or pattern
            links += os.path.islink(path)
            continue
        files.add(file)

        name = os.path.basename(path)[:-len(".tar")]
        if name in names:
            raise UserError(f"two tars are named {name}.tar: {names[name]} and {path}; shards are "
                            "named after them, so rename one")
        names[name] = path
    return names, links


def _check_tar(path):
    """UserError unless `path` is a file that can be read."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise UserError(f"{path} is a link to {os.readlink(path)}, which is not there: mend the "
                        "link, or leave it out of --data") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: change that, or leave it out of "
                        "--data") from None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise UserError(f"{path} is {what}, though its name ends in .tar: rename it, or leave it "
                        "out of --data")
    if not os.access(path, os.R_OK):
        raise UserError(f"you lack the right to read {path}: change it (chmod, chown), or leave "
                        "it out of --data")


# ---- which bytes a tar has -----------------------------------------------------------------------

# a Source in JSON
SOURCE = {"bytes": int, "mtime_ns": int, "ctime_ns": int, "sha256": str}


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
    dates = (source.mtime_ns, source.ctime_ns)
    return now.st_size == source.bytes and (now.st_mtime_ns, now.st_ctime_ns) == dates


def check_unchanged(path, source):
    """UserError if a tar is not as it was when its Source was read."""
    if not is_unchanged(path, source):
        raise UserError(f"{path} has changed while it was being read: run the same command again "
                        "when it is complete", local=True)


def read_source(path, known=None):
    """The Source of a file as it is now: `known`, where size and dates are its; else all of it is
    read. UserError if it cannot be read, or changes meanwhile.
    """
    if known is not None and is_unchanged(path, known):
        return known
    try:
        source = retry_io(_digest, path)
    except BadSample as error:
        raise UserError(f"{path} is {error}", local=True) from None
    check_unchanged(path, source)
    return source


def _digest(path):
    with open(path, "rb") as f:
        # before the bytes: if they change meanwhile, check_unchanged sees it
        now = os.fstat(f.fileno())
        return Source(
            bytes=now.st_size,
            mtime_ns=now.st_mtime_ns,
            ctime_ns=now.st_ctime_ns,
            sha256=hashlib.file_digest(f, "sha256").hexdigest(),
        )


def read_sources(paths, file, ranks):
    """[Source] of tars. The ranks share the work; what is known is kept in the JSON `file`."""
    try:
        entries = read_json(file, {str: SOURCE})
        known = {path: Source(**entry) for path, entry in entries.items()}
    except (OSError, ValueError, TypeError):
        # made anew
        known = {}

    names = [os.path.abspath(path) for path in paths]
    mine = {name: read_source(name, known.get(name)) for name in names[ranks.rank::ranks.world]}
    sources = {}
    for part in gather(mine):
        sources |= part

    is_news = any(known.get(name) != source for name, source in sources.items())
    if ranks.rank == 0 and is_news:
        every = sorted((known | sources).items())
        write_text(file, json.dumps({name: vars(source) for name, source in every}, indent=1))
    return [sources[name] for name in names]


# ---- writing -------------------------------------------------------------------------------------

class TarWriter:
    """Writes a tar beside its place, and renames it there on a clean exit.

    Members are written as they are: no times, no owners. After that `bytes` and `digest` (SHA-256)
    are the file's.
    """

    def __init__(self, path):
        self._atomic = atomic(path)
        self.digest = hashlib.sha256()
        self.bytes = 0

    def __enter__(self):
        self.file = open(self._atomic.__enter__(), "wb")
        return self

    def __exit__(self, *error):
        try:
            if error[0] is None:
                # a tar ends in two empty blocks
                self._write(bytes(2 * BLOCK))
            self.file.close()
        except OSError as full:
            # the disk has no room for what was still to be written
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
        self._write(blocks + bytes(-len(blocks) % BLOCK))
