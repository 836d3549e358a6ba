"""What earlier calls of cluster.py have left, and whether it holds: features, centroids, shards.

cluster.py is run again after an interruption, after a tar has been repaired, or with --append.
Here stands what of the existing files it may keep, and what it must refuse. A tar is known by its
SHA-256, which is computed anew where its size or its dates differ.
"""
import glob
import hashlib
import io
import json
import os
import tarfile
import zlib
from dataclasses import dataclass

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from data import check_members
from ddm.artifacts import read_description, write_tensors
from ddm.config import differences, flat, make_config, read_toml
from ddm.errors import UserError
from ddm.files import try_folder, write_text
from ddm.process import gather
from ddm.run import CLUSTERING, read_manifest
from ddm.tars import (
    SOURCE,
    BadSample,
    Notes,
    Source,
    check_unchanged,
    read_source,
    scan_tar,
    split_name,
)

# What a features file says of itself. identity: of what its vectors depend on beside the tar
FEATURES = {
    "identity": dict,
    "source": SOURCE,
    "images": int,
    # of each sample that cannot be used: key, cause, detail, offset, length
    "skipped": [list],
    # what else of the tar is not used: {words: [how many, the first]}
    "left": {str: list},
}
TENSORS = ("features", "offsets", "lengths", "keys")

# keys of the config that a later call may change
FREE = ("data.max_bad", "data.workers")


@dataclass(frozen=True)
class Tar:
    """An input tar of a run."""

    # without .tar; its shards are called so, too
    name: str
    path: str
    # its features file, RUN/features/NAME.safetensors
    features: str


@dataclass
class Partition:
    """A run's partition, as earlier calls have left it."""

    run_dir: str
    # RUN/clusters.safetensors, and what it says of itself; None before there is one
    clusters_file: str
    clustering: dict | None
    # RUN/shards/0, 1, ..., router, and their manifests, which are without tars where there is none
    folders: list
    manifests: list

    def sizes(self, without=()):
        """Samples of each folder [K + 1], as its manifest says, without those of some tars."""
        sizes = []
        for manifest in self.manifests:
            counted = [entry["samples"] for file, entry in manifest["tars"].items()
                       if tar_name(file) not in without]
            sizes.append(sum(counted))
        return sizes

    def sources(self):
        """{name: SHA-256} of the tars that it was made of."""
        sources = {}
        for manifest in self.manifests:
            for file, entry in manifest["tars"].items():
                sources[tar_name(file)] = entry["source"]
        return sources

    def missing(self, tars):
        """Those of the Tars that it does not have, or not in every folder."""
        missing = []
        for tar in tars:
            if not all(f"{tar.name}.tar" in manifest["tars"] for manifest in self.manifests):
                missing.append(tar)
        return missing


def tar_name(file):
    return file.removesuffix(".tar")


def list_tars(paths, run_dir):
    """{name: path} -> [Tar]."""
    tars = []
    for name, path in paths.items():
        tars.append(Tar(name, path, os.path.join(run_dir, "features", f"{name}.safetensors")))
    return tars


# ---- the features of a tar -----------------------------------------------------------------------

def read_metadata(path):
    """What a features file says of itself (FEATURES). UserError if it is damaged, or there is none.
    """
    try:
        about = read_description(path, FEATURES)
        with safe_open(path, framework="np") as f:
            for name in TENSORS:
                rows = f.get_slice(name).get_shape()[0]
                if rows != about["images"]:
                    raise ValueError(f"its {name} are {rows}, not {about['images']}")

        for row in about["skipped"]:
            if len(row) != 5:
                raise ValueError(f"a skipped sample has {len(row)} entries, not 5")
        return about
    # safetensors raises its own kinds
    except Exception as error:
        raise UserError(f"{path} is damaged, or none of ours ({error}): delete it to make it anew"
                        ) from None


def read_current(tar):
    """What a tar's features file says of itself, if it was made of the tar's bytes as they are now.
    None if not, if there is none, or it is damaged.

    Where the tar's dates alone have changed, as in a copy, its digest is computed, once.
    """
    try:
        about = read_metadata(tar.features)
        known = Source(**about["source"])
    except (UserError, TypeError):
        return None
    if os.path.getsize(tar.path) != known.bytes:
        return None

    # not read again where the dates are the known ones
    source = read_source(tar.path, known)
    if source.sha256 != known.sha256:
        return None
    if source != known:
        # the next call need not read it
        about["source"] = vars(source)
        write_tensors(tar.features, load_file(tar.features), about)
    return about


def has_features(tar, identity, *, look_again, settings):
    """Whether a tar's features file may stay: it is of the same bytes, by the same network and for
    the same condition. look_again: not if a sample that was skipped can be used now.

    settings: [data] of the config.
    """
    about = read_current(tar)
    if about is None or about["identity"] != identity:
        return False
    return not (look_again and any_mended(tar, about, settings))


def any_mended(tar, about, settings):
    """Whether one of the samples that were skipped can be used now: the disk works again, Pillow is
    another, or it is another sample. settings: [data] of the config.
    """
    for key, cause, _, offset, length in about["skipped"]:
        # nothing mends this, and it would take long to read
        if cause.endswith("too large"):
            continue

        try:
            with open(tar.path, "rb") as file:
                blocks = read_at(file, offset, length)
        except OSError:
            continue
        if _is_mended(tar, key, blocks, settings):
            return True
    return False


def _is_mended(tar, key, blocks, settings):
    """Whether a sample's bytes, which were of no use once, are now."""
    # two empty blocks end a tar
    whole = io.BytesIO(blocks + bytes(1024))
    try:
        sample = next(scan_tar(tar.path, file=whole))
        members = {}
        for role, (place, size) in sample.members.items():
            members[role] = blocks[place:place + size]
        check_members(members, 256, settings)
        return True
    except BadSample:
        return sample.key != key
    # no sample at all: another one than it was
    except StopIteration:
        return True


class NewFeatures:
    """What becomes a tar's features file."""

    def __init__(self, tar):
        self.tar = tar
        # [n,D] of each batch; and of each sample offset, length and checksum of its key
        self.features = []
        self.rows = []

        # for data.usable to fill: samples that cannot be used, and what is not even a sample
        self.skipped = []
        self.notes = Notes()
        # samples with several images, and what was taken in the first of them
        self.several = 0
        self.choice = ""

    def add(self, sample):
        self.rows.append((sample.start, sample.end - sample.start, checksum(sample.key)))
        if sample.others:
            self.several += 1
            self.choice = self.choice or sample.choice()

    def write(self, identity, source):
        """UserError if the tar is not any more as it was when its Source was read."""
        check_unchanged(self.tar.path, source)
        offsets, lengths, keys = np.array(self.rows, np.int64).reshape(-1, 3).T.copy()
        tensors = {
            "features": np.concatenate(self.features).astype(np.float16),
            "offsets": offsets,
            "lengths": lengths,
            "keys": keys,
        }
        write_tensors(self.tar.features, tensors, {
            "identity": identity,
            "source": vars(source),
            "images": len(self.rows),
            "skipped": self._describe_skipped(),
            "left": self._describe_left(),
        })

    def _describe_skipped(self):
        described = []
        for sample, error in self.skipped:
            length = sample.end - sample.start
            described.append([sample.key, error.cause, error.detail, sample.start, length])
        return described

    def _describe_left(self):
        described = {}
        if self.several:
            described["of samples with several images all but one"] = [self.several, self.choice]
        if self.notes.hidden:
            words = "members whose names begin with a dot, or in folders like __MACOSX"
            described[words] = [self.notes.hidden]
        if self.notes.torn:
            words = "the rest of tars that are cut off or damaged"
            described[words] = [1, f"{self.tar.path}: {self.notes.torn}"]
        return described


# ---- the bytes of a sample -----------------------------------------------------------------------

def read_at(file, offset, size):
    file.seek(offset)
    return file.read(size)


def checksum(key):
    """What a features file keeps of a sample's key."""
    return zlib.crc32(key.encode("utf-8", "backslashreplace"))


def read_sample(file, tar, *, offset, length, check):
    """-> (key, the bytes) of a sample of a tar that is open as `file`. UserError if it is not the
    one that the features file knows by this checksum of its key.
    """
    blocks = read_at(file, offset, length)
    key = first_key(blocks)
    if key is None or checksum(key) != check:
        raise UserError(
            f"{tar.path} is not what {tar.features} was made of: at byte {offset} is "
            f"{key or 'no header'}. If the tar has been replaced, use another --run-dir; if not, "
            f"delete {tar.features} and run the same command again", local=True)
    return key, blocks


def first_key(blocks):
    """The key that a sample's bytes begin with; None if they are no header."""
    try:
        header = tarfile.TarInfo.frombuf(blocks[:512], "utf-8", "surrogateescape")
        if not header.isreg():
            # a long name, before the header itself
            with tarfile.open(fileobj=io.BytesIO(blocks), mode="r:", encoding="utf-8") as tar:
                header = tar.next()

        return split_name(header.name)[0]
    # AttributeError: no header follows; TypeError: the name is none of a sample's
    except (tarfile.TarError, AttributeError, TypeError, ValueError):
        return None


# ---- what earlier calls have left ----------------------------------------------------------------

def choose_config(args, given):
    """The run's config: from --config and flags, or what an earlier call wrote. UserError if the
    two differ.
    """
    path = os.path.join(args.run_dir, "config.toml")
    existing = read_toml(path) if os.path.exists(path) else {}
    config = make_config(read_toml(args.config) if args.config else existing, given)
    if not existing:
        return config

    # these do not change which image is where
    free = {name: value for name, value in flat(config).items() if name in FREE}
    existing = make_config(existing, free)
    if flat(config) != flat(existing):
        raise UserError(
            f"{args.run_dir} was made with another config (there / now: "
            f"{differences(flat(existing), flat(config))}): use another --run-dir, or leave "
            f"--config and these flags out")
    return existing


def read_partition(run_dir, experts):
    """The Partition that earlier calls have left in a run directory; an empty one if there is none.
    UserError if it is damaged, or a part is of another clustering.
    """
    shards = [*range(experts), "router"]
    folders = [os.path.join(run_dir, "shards", str(shard)) for shard in shards]
    clusters_file = os.path.join(run_dir, "clusters.safetensors")
    if not os.path.exists(clusters_file):
        manifests = [{"tars": {}} for _ in folders]
        return Partition(run_dir, clusters_file, clustering=None, folders=folders,
                         manifests=manifests)

    clustering = _read_clustering(clusters_file)
    manifests = [_read_manifest(folder, clustering["fingerprint"]) for folder in folders]
    return Partition(run_dir, clusters_file, clustering=clustering, folders=folders,
                     manifests=manifests)


def _read_clustering(path):
    try:
        return read_description(path, CLUSTERING)
    except ValueError as error:
        raise UserError(f"{path} is damaged, or of another version ({error}): bring it back, or "
                        f"use another --run-dir") from None


def _read_manifest(folder, fingerprint):
    """A folder's manifest; an empty one if there is none."""
    if not os.path.exists(os.path.join(folder, "manifest.json")):
        return {"tars": {}}
    manifest = read_manifest(folder)
    if manifest["fingerprint"] != fingerprint:
        raise UserError(
            f"{folder} is a shard of another clustering, {manifest['fingerprint']}, this one is "
            f"{fingerprint}: remove it, or use another --run-dir")
    return manifest


def check_call(partition, tars, append):
    """UserError if what is asked for does not fit what earlier calls have left."""
    run_dir = partition.run_dir
    clustering = partition.clustering
    if append:
        _check_append(partition)
        return

    # without centroids nobody knows what shards are of
    if clustering is None:
        shards = os.path.join(glob.escape(run_dir), "shards", "*")
        if glob.glob(f"{shards}/*.tar") or glob.glob(f"{shards}/manifest.json"):
            raise UserError(
                f"{run_dir}/shards holds a partition, but {partition.clusters_file} is missing: "
                f"delete {run_dir}/shards to make it anew")
        return

    if clustering.get("appended"):
        raise UserError(f"{run_dir} has had tars appended, its partition is whole: only --append "
                        f"changes it now")
    if clustering["tars"] != len(tars):
        lacking = sorted(partition.sources().keys() - {tar.name for tar in tars})
        gone = f"; {lacking[0]}.tar is missing now" if lacking else ""
        raise UserError(
            f"{run_dir} was clustered from other data ({clustering['tars']} tars, now {len(tars)}"
            f"{gone}): use another --run-dir, or --append to add new tars to it")


def _check_append(partition):
    if partition.clustering is None:
        raise UserError(f"--append adds to a run that there is, but {partition.clusters_file} is "
                        f"missing: leave --append out")
    for folder, manifest in zip(partition.folders, partition.manifests, strict=True):
        if not manifest["tars"]:
            raise UserError(f"{folder} has no manifest: --append needs the whole partition, as "
                            f"cluster.py left it")


def name_given(partition, tars, described):
    """Names the bytes of the tars that were given to this call, whether the partition has them
    already or not.

    described: {Tar: what its features file says of itself} of those that it has not.
    """
    recorded = partition.sources()
    sources = {tar.name: recorded[tar.name] for tar in tars if tar.name in recorded}
    for tar, about in described.items():
        sources[tar.name] = about["source"]["sha256"]
    return name_inputs(sources)


def name_inputs(sources):
    """Names the data of a run, {name: SHA-256}, by 16 hex digits."""
    text = json.dumps(sorted(sources.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_sources(partition, tars, append, ranks):
    """UserError unless the tars have the bytes that the run was clustered from. The ranks share the
    work, which is little where no date has changed.

    append: look only at tars that the partition has.
    """
    meant = partition.sources()

    in_partition = [tar for tar in tars if tar.name in meant]
    digests = read_digests(in_partition if append else tars, ranks)
    changed = [tar for tar in in_partition if digests[tar.name] != meant[tar.name]]

    if append:
        if changed:
            raise UserError(
                f"{changed[0].path} is named like a tar that the partition has, but holds other "
                f"bytes: it has changed, or is another one. Rename it, its shards are named after "
                f"it, or use another --run-dir")
        return

    clustering = partition.clustering
    if name_inputs(digests) == clustering["inputs"]:
        return

    if not changed:
        # no manifest tells, since the partition was interrupted; features may
        made = [tar for tar in tars if os.path.exists(tar.features)]
        changed = [tar for tar in made if not read_current(tar)]

    if changed:
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(
            f"{changed[0].path} has changed since {partition.run_dir} was clustered{more}: bring "
            f"it back as it was, use another --run-dir, or give what has changed another name and "
            f"--append it")
    raise UserError(
        f"{partition.run_dir} was clustered from other data ({clustering['tars']} tars, now "
        f"{len(tars)}): use another --run-dir, or --append to add new tars to it")


def read_digests(tars, ranks):
    """{name: SHA-256} of the tars as they are now; the ranks share the work."""
    mine = {}
    for tar in tars[ranks.rank::ranks.world]:
        about = read_current(tar)
        mine[tar.name] = about["source"]["sha256"] if about else read_source(tar.path).sha256

    digests = {}
    for part in gather(mine):
        digests |= part
    return digests


def prepare_folders(run_dir):
    """Tries the places of output, and removes what a call that was killed has left half-written.
    OSError.
    """
    for place in ("features", "shards", "logs"):
        try_folder(os.path.join(run_dir, place))
    for pattern in ("features/*.tmp", "shards/*/*.tmp"):
        for path in glob.glob(os.path.join(glob.escape(run_dir), pattern)):
            os.remove(path)


# ---- its shards ----------------------------------------------------------------------------------

def forget_shards(partition, tar):
    """Removes what an interrupted call has made of a tar whose features have been made anew since.
    """
    for folder, manifest in zip(partition.folders, partition.manifests, strict=True):
        path = os.path.join(folder, f"{tar.name}.tar")
        if f"{tar.name}.tar" not in manifest["tars"] and os.path.exists(path):
            os.remove(path)


def existing_shards(partition, tar, source):
    """What the manifest of each folder is to say of a tar whose shards are there already; None if
    they are not all there. source: the tar's.
    """
    file = f"{tar.name}.tar"
    paths = [os.path.join(folder, file) for folder in partition.folders]
    if not all(map(os.path.exists, paths)):
        return None

    entries = []
    for path, manifest in zip(paths, partition.manifests, strict=True):
        entry = manifest["tars"].get(file)
        # a shard that an interrupted call wrote
        if entry is None:
            entry = describe_shard(path, source)
        entries.append(entry)
    return entries


def describe_shard(path, source):
    """A shard as its manifest has it. source: of the tar that it was made of."""
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    return {
        "samples": sum(1 for _ in scan_tar(path)),
        "bytes": os.path.getsize(path),
        "sha256": digest,
        "source": source.sha256,
    }


def write_manifests(partition, fingerprint, entries):
    """entries: {name of a tar: [what the manifest of each folder is to say of it]}; they join what
    is in the manifests already.
    """
    for i, folder in enumerate(partition.folders):
        tars = dict(partition.manifests[i]["tars"])
        for name, of_tar in entries.items():
            tars[f"{name}.tar"] = of_tar[i]

        manifest = {
            "fingerprint": fingerprint,
            "shard": os.path.basename(folder),
            "tars": dict(sorted(tars.items())),
        }
        write_text(os.path.join(folder, "manifest.json"), json.dumps(manifest, indent=1))
        partition.manifests[i] = manifest
