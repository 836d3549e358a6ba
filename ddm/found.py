"""What is there instead: the second half of errors about --data.

They say what was found, and the likely remedy.
"""
import collections
import glob
import itertools
import os
import re
import shlex


COMPRESSED = (
    ".tar.gz",
    ".tgz",
    ".tar.bz2",
    ".tbz2",
    ".tar.xz",
    ".txz",
    ".tar.zst",
    ".tar.lz4",
    ".gz",
    ".bz2",
    ".xz",
    ".zst",
)
ARCHIVES = (".zip", ".7z", ".rar")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic")
TABLES = (".parquet", ".csv", ".tsv", ".jsonl")
# extensions of captions elsewhere
CAPTIONS = (
    "caption",
    "captions",
    "cap",
    "text",
    "tags",
    "prompt",
    "json",
)
MANY = 100_000  # files or members that are looked at, at most
FORMATS = {
    b"\x1f\x8b": "compressed by gzip: name it .tar.gz and gunzip it",
    b"BZh": "compressed by bzip2: name it .tar.bz2 and bunzip2 it",
    b"\xfd7zXZ": "compressed by xz: name it .tar.xz and unxz it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: name it .tar.zst and unzstd it",
    b"PK": "a zip archive: unzip it and pack a tar",
    b"PAR1": "a parquet file",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself (git lfs pull)",
    b"\xff\xd8\xff": "a JPEG",
    b"\x89PNG": "a PNG",
    b"{": "JSON",
    b"<": "a web page or XML, perhaps a server's error: download it again",
}


def printable(text):
    """A name from somebody's tar on one line of a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def file_format(path):
    """What a file named .tar is that is none, in words; empty where its first bytes tell nothing.
    """
    with open(path, "rb") as f:
        head = f.read(512)
    if not head:
        return "empty (0 bytes): download or copy it again"
    return next((words for magic, words in FORMATS.items() if head.lstrip().startswith(magic)), "")


def ending(path):
    """What a file's name ends in, as lists of what was left out have it."""
    if os.path.isdir(path):
        return "folder"
    lower = path.lower()
    return next(
        (end for end in (*COMPRESSED, *ARCHIVES) if lower.endswith(end)),
        os.path.splitext(lower)[1] or "file without an extension",
    )


def count_endings(paths):
    """'60 .jpg, 2 .parquet': the most frequent first."""
    return ", ".join(
        f"{n} {end}" for end, n in collections.Counter(map(ending, paths)).most_common(6)
    )


def remedy(paths):
    """What to do with files that are no tars; empty where that is not known."""
    first = next((path for path in paths if ending(path) in COMPRESSED), None)
    if first:
        tool = {".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}.get(
            os.path.splitext(first)[1].lower(), "gunzip"
        )
        return (
            f"compressed tars cannot be read at any place: decompress them ({tool} "
            f"{shlex.quote(first)})"
        )
    if any(ending(path) in ARCHIVES for path in paths):
        return (
            "unpack the archives, then pack tar shards: tar --sort=name -cf 00000.tar -C FOLDER ."
        )
    pictures = [path for path in paths if ending(path) in PICTURES]
    if pictures:
        folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in pictures])
        return (
            f"pack them into tar shards, KEY.jpg with its caption KEY.txt or class number KEY.cls: "
            f"tar --sort=name -cf 00000.tar -C {shlex.quote(os.path.relpath(folder))} ."
        )
    table = next((path for path in paths if ending(path) in TABLES), None)
    if table:
        return (
            "of a list of URLs img2dataset makes tar shards: img2dataset --url_list "
            f"{shlex.quote(table)} "
            f"--input_format {ending(table)[1:]} --output_format webdataset --output_folder DIR"
        )
    return ""


def look_into(folder):
    """What a folder holds, in words, with a pattern for its tars if there are any."""
    files = list(
        itertools.islice(
            (os.path.join(at, name) for at, _, names in os.walk(folder) for name in sorted(names)),
            MANY,
        )
    )
    tars = [path for path in files if path.lower().endswith(".tar")]
    if tars:
        deep = "" if any(os.path.dirname(path) == folder.rstrip("/") for path in tars) else "**"
        pattern = os.path.join(folder, deep, f"*{os.path.splitext(tars[0])[1]}")
        if glob.glob(pattern, recursive=True):
            return f"{folder} is a folder with {len(tars)} tars; did you mean '{pattern}'?"
        return f"{folder} is a folder with {len(tars)} tars: name them"
    if not files:
        return (
            f"{folder} is an empty folder; tar shards are wanted: README.md says how to make them"
        )
    return (
        f"{folder} holds {count_endings(files)}; "
        f"{remedy(files) or 'tar shards are wanted: README.md says how to make them'}"
    )


def instead_of_tars(pattern, matched):
    """Why a pattern of --data gives no tar: what it matches, or what is near. matched: the paths
    that it matches.
    """
    if re.match(r"[a-z][a-z0-9+.-]*://|pipe:", pattern):
        return (
            "files of this machine are read, no URLs: download them first (aws s3 sync, wget), "
            "or mount the bucket"
        )
    files = [path for path in matched if not os.path.isdir(path)]
    if files:
        return (
            f"it matches {count_endings(matched)}; "
            f"{remedy(files) or 'tar shards are wanted: README.md says how to make them'}"
        )
    if matched:
        return look_into(matched[0])
    if re.search(r"\{[^}]*(,|\.\.)[^}]*\}", pattern):
        wider = re.sub(r"\{[^}]*\}", "*", pattern)
        return "braces are not expanded" + (
            f": did you mean '{wider}'?"
            if glob.glob(wider, recursive=True)
            else " here, but by the shell, without quotes"
        )
    folder = os.path.dirname(pattern)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    if folder != os.path.dirname(pattern) and not glob.has_magic(os.path.dirname(pattern)):
        return f"there is no folder {os.path.dirname(pattern)}"
    return f"there is nothing of that name; {look_into(folder or '.')}"


def _order(names):
    """Whether keys come back after other keys: members of one sample that do not stand together."""
    return len(list(itertools.groupby(key for key, _ in names))) > len({key for key, _ in names})


def _captions(endings):
    elsewhere = next((end for end in CAPTIONS if end in endings), None)
    if elsewhere:
        return (
            f"captions are read from KEY.txt alone, here may be some in KEY.{elsewhere}: write "
            "them to KEY.txt"
        )
    if "cls" in endings:
        return (
            "KEY.cls holds classes: data.condition = class (with data.classes) uses them, or "
            "none trains without a condition"
        )
    if "txt" in endings:
        return "a caption must have a word in it"
    return "there is no KEY.txt; data.condition = none trains without captions"


def _classes(endings, cause):
    if "cls" in endings:
        return (
            "raise data.classes, or number the classes from 0"
            if "outside" in cause
            else "KEY.cls holds the number of a class, 0 to data.classes - 1: number the classes"
        )
    if "txt" in endings:
        return (
            "KEY.txt holds captions: data.condition = text uses them, or none trains without a "
            "condition"
        )
    return "there is no KEY.cls; data.condition = none trains without classes"


def _likely(names, cause, condition):
    """The likely reason that the samples of a tar cannot be used, and what to do."""
    endings = collections.Counter(extension.lower() for _, extension in names)
    dotted = [extension for extension in endings if "." in extension]
    if any(
        extension.rpartition(".")[2] == "txt" and f".{extension.split('.')[0]}" in PICTURES
        for extension in dotted
    ):
        return (
            "KEY ends at the first dot of a name, so the caption of "
            f"KEY.{dotted[0].split('.')[0]} is KEY.txt, not KEY.{dotted[0]}"
        )
    if sum(endings[extension] for extension in dotted) > len(names) / 2:
        return (
            f"KEY ends at the first dot of a name, so {dotted[0]!r} is taken for an extension: "
            "rename what has other dots (a.b.jpg to a_b.jpg)"
        )
    if _order(names):
        return (
            "the members of one sample must stand together: pack the tar again in the order of "
            "names, tar --sort=name -cf NAME.tar -C FOLDER ."
        )
    if "lat" in endings and not any(f".{end}" in PICTURES for end in endings):
        return "KEY.lat holds latents, --data takes images"
    if cause.startswith("no image"):
        return "images are KEY.jpg, KEY.jpeg, KEY.png, KEY.webp or KEY.bmp"
    if condition == "text" and "caption" in cause:
        return "save captions as UTF-8" if "UTF-8" in cause else _captions(endings)
    if condition == "class" and "class" in cause:
        return _classes(endings, cause)
    return ""


def instead_of_samples(path, names, cause, condition):
    """What a tar holds whose samples cannot be used because of `cause`. names: [(key, extension)]
    of its members, in their order.
    """
    shown = [printable(f"{key}.{extension}" if extension else key) for key, extension in names[:4]]
    endings = collections.Counter(
        f".{extension.lower()}" if extension else "without an extension" for _, extension in names
    )
    holds = printable(", ".join(f"{n} {end}" for end, n in endings.most_common(5)))
    likely = _likely(names, cause, condition)
    return f"{path} begins with {', '.join(shown)} and holds {holds}" + (
        f"; {likely}" if likely else ""
    )
