"""The run directory: what stages read of each other in it, and how a training stands.

What one stage has written another one reads through here; whatever is damaged, or of another
clustering, is refused with one line.
"""
import contextlib
import glob
import hashlib
import os
import threading
from datetime import timedelta

from ddm.artifacts import read_description
from ddm.config import differences
from ddm.errors import UserError
from ddm.files import read_json, try_folder, write_text
from ddm.lock import alone
from ddm.process import gather, progress

# how a training stands, in RUN/checkpoints/NAME/status
FINISHED = "finished"
UNFINISHED = "to be continued"
FAILED = "failed"

# what an artifact says of a network, at the least
NETWORK = {"name": str}

# what clusters.safetensors says of itself
CLUSTERING = {
    "fingerprint": str,
    "extractor": NETWORK,
    "seed": int,
    "assign": str,
    "inputs": str,
    "tars": int,
    "networks": {"autoencoder": NETWORK, "text": NETWORK},
}

# shards/K/manifest.json
ENTRY = {"samples": int, "bytes": int, "sha256": str, "source": str}
MANIFEST = {"fingerprint": str, "tars": {str: ENTRY}}


# ---- what cluster.py has written -----------------------------------------------------------------

def read_clusters(run_dir):
    """What RUN/clusters.safetensors says besides its centroids (CLUSTERING): the fingerprint that
    all of the run carries, and the networks meant for it.
    """
    path = os.path.join(run_dir, "clusters.safetensors")
    try:
        return read_description(path, CLUSTERING)
    except ValueError as error:
        raise UserError(f"cannot read {path} ({error}): make it with cluster.py --run-dir "
                        f"{run_dir} --data ...") from None


def read_manifest(folder):
    """What RUN/shards/K/manifest.json says (MANIFEST). UserError if there is none, or damaged."""
    path = os.path.join(folder, "manifest.json")
    try:
        return read_json(path, MANIFEST)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): copy the folder whole, or make it with "
                        f"cluster.py") from None


def find_shards(run_dir):
    """The numbers of the shards that are here, as images or as latents: ["0", "1", ...]."""
    # a node may have its own shard alone
    found = set()
    for part in ("shards", "latents"):
        folder = os.path.join(run_dir, part)
        if os.path.isdir(folder):
            # but for the router's, which has images of all clusters
            found.update(name for name in os.listdir(folder) if name.isdigit())
    return sorted(found, key=int)


def check_shard(folder, fingerprint, ranks, verify=False):
    """UserError unless the tars of RUN/shards/K are those of its manifest, and of this clustering.

    verify: look at their contents, too; the ranks share the work.
    """
    manifest = read_manifest(folder)
    if manifest["fingerprint"] != fingerprint:
        raise UserError(f"{folder} is of clustering {manifest['fingerprint']}, "
                        f"clusters.safetensors of {fingerprint}: take both from the same run")

    # names and sizes cost nothing; the contents are read by --verify alone
    existing = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "*.tar")):
        existing[os.path.basename(path)] = os.path.getsize(path)

    meant = {name: entry["bytes"] for name, entry in manifest["tars"].items()}
    if existing != meant:
        raise UserError(f"{folder} is not as its manifest says (bytes there / in the manifest: "
                        f"{differences(existing, meant)}): copy it again, or run cluster.py again "
                        f"where the data is")

    if verify:
        verify_shard(folder, manifest, ranks)


def verify_shard(folder, manifest, ranks):
    """UserError unless the tars' SHA-256 are the manifest's."""
    damaged = []
    mine = sorted(manifest["tars"])[ranks.rank::ranks.world]
    for name in progress(mine, desc="verifying, tars"):
        with open(os.path.join(folder, name), "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        if digest != manifest["tars"][name]["sha256"]:
            damaged.append(name)

    # the same list on all ranks, so that all of them raise
    damaged = sum(gather(damaged), [])
    if damaged:
        raise UserError(f"{folder}: {', '.join(damaged)} is not what its SHA-256 in the manifest "
                        f"says: copy it again")


# ---- how a training stands -----------------------------------------------------------------------

# a thread that publishes a checkpoint may mark beside the main one
_marking = threading.Lock()


def mark(folder, status, step=None, begins=False):
    """Tells a scheduler's script how the training in RUN/checkpoints/NAME stands, in its file
    `status`: finished, to be continued (the same command resumes), or failed (it would fail again),
    and at which step (None: as it says already).

    What has failed stays so, whatever a thread is still writing, until a training `begins` anew.
    """
    path = os.path.join(folder, "status")
    with _marking:
        said = ""
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as f:
                said = f.read().strip()

        if said.startswith(FAILED) and status != FAILED and not begins:
            return

        # "finished 1000" -> 1000; without a mark it is at the beginning
        if step is None:
            step = said.rpartition(" ")[2] or 0
        write_text(path, f"{status} {step}\n")


@contextlib.contextmanager
def owned(run_dir, name):
    """For the time of a training, nobody else trains `name` of this run. A UserError, which the
    same command would meet again, marks it as failed: a scheduler's script need not try.

    Its places of output are tried first, on rank 0, which has the lock. UserError, OSError.
    """
    if not os.path.isdir(run_dir):
        raise UserError(f"there is no run at {run_dir}: make it with cluster.py --run-dir "
                        f"{run_dir} --data ...")

    folder = os.path.join(run_dir, "checkpoints", name)
    if os.environ.get("RANK", "0") == "0":
        # read-only or full places are found out now, not at the first checkpoint
        try_folder(folder)
        for part in ("logs", "samples", "experts"):
            try_folder(os.path.join(run_dir, part))

    with alone(os.path.join(folder, "lock"), f"{name} of {run_dir}"):
        try:
            yield
        except UserError:
            # the error that is raised matters more than its mark
            with contextlib.suppress(OSError):
                mark(folder, FAILED)
            raise


def collective_timeout(train):
    """How long ranks wait for each other: one that waits ends by its own watchdog before."""
    if train.timeout:
        return timedelta(seconds=train.timeout) + timedelta(minutes=1)
    # train.timeout = 0 means never, for which torch has no word
    return timedelta(days=7)
