"""What is there instead: the second half of errors about --data.

Each function says in words what was found, and the likely remedy. They look at names and first
bytes alone, and raise nothing.
"""
import collections
import glob
import itertools
import os
import re
import shlex

# what decompresses a file, by the end of its name
TOOLS = {
    ".tar.gz":  "gunzip",
    ".tgz":     "gunzip",
    ".tar.bz2": "bunzip2",
    ".tbz2":    "bunzip2",
    ".tar.xz":  "unxz",
    ".txz":     "unxz",
    ".tar.zst": "unzstd",
    ".tar.lz4": "unlz4",
    ".gz":      "gunzip",
    ".bz2":     "bunzip2",
    ".xz":      "unxz",
    ".zst":     "unzstd",
}
ARCHIVES = (".zip", ".7z", ".rar")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic")
TABLES = (".parquet", ".csv", ".tsv", ".jsonl")

# extensions of captions elsewhere
CAPTIONS = ("caption", "captions", "cap", "text", "tags", "prompt", "json")

# files or members that are looked at, at most
MANY = 100_000

# what a file is that is named .tar, by its first bytes
FORMATS = {
    b"\x1f\x8b":                   "compressed by gzip: name it .tar.gz and gunzip it",
    b"BZh":                        "compressed by bzip2: name it .tar.bz2 and bunzip2 it",
    b"\xfd7zXZ":                   "compressed by xz: name it .tar.xz and unxz it",
    b"\x28\xb5\x2f\xfd":           "compressed by zstd: name it .tar.zst and unzstd it",
    b"PK":                         "a zip archive: unzip it and pack a tar",
    b"PAR1":                       "a parquet file",
    b"version https://git-lfs":    "a pointer of Git LFS: fetch the file itself (git lfs pull)",
    b"\xff\xd8\xff":               "a JPEG",
    b"\x89PNG":                    "a PNG",
    b"{":                          "JSON",
    b"<":                          "a web page or XML, perhaps a server's error: download it again",
}

WANTED = "tar shards are wanted: README.md says how to make them"


def printable(text):
    """A name from somebody's tar on one line of a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# ---- files ---------------------------------------------------------------------------------------

def file_format(path):
    """What a file named .tar is that is none; empty where its first bytes tell nothing."""
    with open(path, "rb") as f:
        # enough for the longest of FORMATS, behind some blank lines
        head = f.read(512)
    if not head:
        return "empty (0 bytes): download or copy it again"
    # text formats may begin with white space
    for magic, words in FORMATS.items():
        if head.lstrip().startswith(magic):
            return words
    return ""


def ending(path):
    """What a file's name ends in, as lists of what was left out have it."""
    if os.path.isdir(path):
        return "folder"
    lower = path.lower()
    # in this order .tar.gz is found before .gz
    for end in (*TOOLS, *ARCHIVES):
        if lower.endswith(end):
            return end
    return os.path.splitext(lower)[1] or "file without an extension"


def count_endings(paths):
    """'60 .jpg, 2 .parquet': the most frequent first."""
    counts = collections.Counter(ending(path) for path in paths)
    return ", ".join(f"{n} {end}" for end, n in counts.most_common(6))


def remedy(paths):
    """What to do with files that are no tars; empty where that is not known."""
    endings = {path: ending(path) for path in paths}

    # one kind decides, even where there are several: each needs a command of its own
    compressed = [path for path, end in endings.items() if end in TOOLS]
    if compressed:
        command = f"{TOOLS[endings[compressed[0]]]} {shlex.quote(compressed[0])}"
        return f"compressed tars cannot be read at any place: decompress them ({command})"

    if any(end in ARCHIVES for end in endings.values()):
        return ("unpack the archives, then pack tar shards: "
                "tar --sort=name -cf 00000.tar -C FOLDER .")

    images = [path for path, end in endings.items() if end in IMAGES]
    if images:
        # the folder that holds all of them
        folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in images])
        folder = shlex.quote(os.path.relpath(folder))
        return ("pack them into tar shards, KEY.jpg with its caption KEY.txt or class number "
                f"KEY.cls: tar --sort=name -cf 00000.tar -C {folder} .")

    tables = [path for path, end in endings.items() if end in TABLES]
    if tables:
        return ("of a list of URLs img2dataset makes tar shards: img2dataset "
                f"--url_list {shlex.quote(tables[0])} --input_format {endings[tables[0]][1:]} "
                "--output_format webdataset --output_folder DIR")
    return ""


def list_files(folder):
    """The first paths of files in a folder and those below it."""
    files = []
    for at, _, names in os.walk(folder):
        files += [os.path.join(at, name) for name in sorted(names)]
        # data sets have millions of files, and this is for a line of text
        if len(files) >= MANY:
            break
    return files[:MANY]


def look_into(folder):
    """What a folder holds, with a pattern for its tars if there are any."""
    files = list_files(folder)
    if not files:
        return f"{folder} is an empty folder; {WANTED}"

    tars = [path for path in files if path.lower().endswith(".tar")]
    if not tars:
        return f"{folder} holds {count_endings(files)}; {remedy(files) or WANTED}"

    # a pattern for those in the folder itself, or else for those anywhere below it
    on_top = any(os.path.dirname(path) == folder.rstrip("/") for path in tars)
    extension = os.path.splitext(tars[0])[1]
    pattern = os.path.join(folder, "" if on_top else "**", f"*{extension}")
    # what is suggested has been tried
    if glob.glob(pattern, recursive=True):
        return f"{folder} is a folder with {len(tars)} tars; did you mean '{pattern}'?"
    return f"{folder} is a folder with {len(tars)} tars: name them"


def instead_of_tars(pattern, matched):
    """Why a pattern of --data gives no tar: what it matches, or what is near.

    matched: the paths that it matches.
    """
    if re.match(r"[a-z][a-z0-9+.-]*://|pipe:", pattern):
        return ("files of this machine are read, no URLs: download them first (aws s3 sync, wget), "
                "or mount the bucket")

    # something is there, but no tar
    files = [path for path in matched if not os.path.isdir(path)]
    if files:
        return f"it matches {count_endings(matched)}; {remedy(files) or WANTED}"
    if matched:
        return look_into(matched[0])

    # {00000..00099}.tar, as WebDataset writes it
    if re.search(r"\{[^}]*(,|\.\.)[^}]*\}", pattern):
        wider = re.sub(r"\{[^}]*\}", "*", pattern)
        if glob.glob(wider, recursive=True):
            return f"braces are not expanded: did you mean '{wider}'?"
        return "braces are not expanded here, but by the shell, without quotes"
    return _nearest_folder(pattern)


def _nearest_folder(pattern):
    """What is where a pattern that matches nothing points to."""
    # the nearest folder above that there is
    wanted = os.path.dirname(pattern)
    folder = wanted
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    if folder != wanted and not glob.has_magic(wanted):
        return f"there is no folder {wanted}"
    return f"there is nothing of that name; {look_into(folder or '.')}"


# ---- members of a tar ----------------------------------------------------------------------------

def instead_of_samples(path, names, cause, condition):
    """What a tar holds whose samples cannot be used because of `cause`.

    names: [(key, extension)] of its members, in their order.
    """
    # a few names show how all are built
    shown = []
    for key, extension in names[:4]:
        shown.append(printable(f"{key}.{extension}" if extension else key))

    endings = collections.Counter()
    for _, extension in names:
        endings[f".{extension.lower()}" if extension else "without an extension"] += 1
    holds = printable(", ".join(f"{n} {end}" for end, n in endings.most_common(5)))

    words = f"{path} begins with {', '.join(shown)} and holds {holds}"
    likely = _likely(names, cause, condition)
    return f"{words}; {likely}" if likely else words


def _likely(names, cause, condition):
    """The likely reason that the samples of a tar cannot be used, and what to do."""
    endings = collections.Counter(extension.lower() for _, extension in names)
    # names first: how they are built may be behind any cause
    reason = _dots(endings) or _order(names)
    if reason:
        return reason
    # these are of RUN/latents
    if "lat" in endings and not any(f".{end}" in IMAGES for end in endings):
        return "KEY.lat holds latents, --data takes images"
    if cause.startswith("no image"):
        return "images are KEY.jpg, KEY.jpeg, KEY.png, KEY.webp or KEY.bmp"
    # what is left is a condition that cannot be used
    if condition == "text":
        return _captions(endings, cause)
    if condition == "class":
        return _classes(endings, cause)
    return ""


def _dots(endings):
    """Names with further dots, of which the first ends the key. endings: extension -> how many."""
    # a key ends at the first dot, so these hold what was meant to be a part of it
    dotted = [extension for extension in endings if "." in extension]
    for extension in dotted:
        # a.jpg.txt beside a.jpg: a caption that is named after the whole file
        first, *_, last = extension.split(".")
        if last == "txt" and f".{first}" in IMAGES:
            return ("KEY ends at the first dot of a name, so the caption of "
                    f"KEY.{first} is KEY.txt, not KEY.{extension}")

    if sum(endings[extension] for extension in dotted) > endings.total() / 2:
        return (f"KEY ends at the first dot of a name, so {dotted[0]!r} is taken for an extension: "
                "rename what has other dots (a.b.jpg to a_b.jpg)")
    return ""


def _order(names):
    """Keys that come back after other keys: members of one sample that do not stand together."""
    keys = [key for key, _ in names]
    # groupby begins anew when a key comes back, a set does not
    if len(list(itertools.groupby(keys))) > len(set(keys)):
        return ("the members of one sample must stand together: pack the tar again in the order of "
                "names, tar --sort=name -cf NAME.tar -C FOLDER .")
    return ""


def _captions(endings, cause):
    """What to do about captions, if they are the cause; else empty."""
    if "UTF-8" in cause:
        return "save captions as UTF-8"
    if "caption" not in cause:
        return ""

    # a caption under another name comes first: KEY.txt alone is read
    for end in CAPTIONS:
        if end in endings:
            return (f"captions are read from KEY.txt alone, here may be some in KEY.{end}: write "
                    "them to KEY.txt")
    if "cls" in endings:
        return ("KEY.cls holds classes: data.condition = class (with data.classes) uses them, or "
                "none trains without a condition")
    if "txt" in endings:
        return "a caption must have a word in it"
    return "there is no KEY.txt; data.condition = none trains without captions"


def _classes(endings, cause):
    """What to do about classes, if they are the cause; else empty."""
    if "class" not in cause:
        return ""

    if "cls" in endings and "outside" in cause:
        return "raise data.classes, or number the classes from 0"
    if "cls" in endings:
        return "KEY.cls holds the number of a class, 0 to data.classes - 1: number the classes"
    if "txt" in endings:
        return ("KEY.txt holds captions: data.condition = text uses them, or none trains without a "
                "condition")
    return "there is no KEY.cls; data.condition = none trains without classes"
