"""The weights that a training begins with, where they are not random: a seed's, or any model's.

    initial = read_seed(run_dir, steps, ...)        experts go on from the run's seed
    initial = read_initial(path, ...)               --init: the weights of a model file, no more
    Engine(..., initial=initial)

Branch-Train-Merge (Li et al. 2022) begins like this: one model learns what all clusters have in
common, then each expert goes on from it, alone. The paper's experts begin with random weights.
"""
import hashlib
import os
from dataclasses import dataclass

from ddm import artifacts, encoders
from ddm.config import differences
from ddm.errors import UserError
from ddm.files import check_shape
from ddm.process import broadcast, on_rank_0
from ddm.run import NETWORK

# what the file must say of itself
INITIAL = {"objective": str, "path": str, "autoencoder": NETWORK, "text": NETWORK}


@dataclass
class Initial:
    """What a training begins with."""
    # its model file; none: random weights, from train.seed
    path: str = ""
    # of the schedule, at which training begins
    step: int = 0
    # whether the file has raw weights, and these are begun with; else its EMA weights are both
    raw: bool = False
    # which model of the same run it is, if one: seed, 3, all
    shard: str = ""
    # what it cost, with what it had itself begun with
    sha256: str = ""
    images: int = 0
    flops: int = 0

    def about(self):
        """For the metadata of the model that is trained."""
        return {"init": self.sha256, "init_shard": self.shard, "init_images": self.images,
                "init_flops": self.flops}

    def load(self, raw=False):
        """The EMA weights {name: tensor} on the host, or the raw ones. UserError, on this rank
        alone, if they are damaged.
        """
        try:
            if raw:
                return artifacts.load_raw(self.path)
            return artifacts.load(self.path)[0].state_dict()
        except ValueError as error:
            raise UserError(str(error), local=True) from None


RANDOM = Initial()


def check_exists(path):
    """UserError for an --init that names no file: before the work."""
    if path and not os.path.isfile(path):
        raise UserError(f"--init {path}: there is no such file to begin with")


def read_initial(path, shape, space, objective, flow_path):
    """A model file to begin with -> Initial, no weights loaded; a collective.

    For a model of the ModelConfig `shape` in a codec.Space; objective, flow_path: [flow]'s.
    UserError where the file's model is another one, works in other latents or token features, or
    predicts something else.
    """
    try:
        info = artifacts.read_info(path)
    except ValueError as error:
        raise UserError(str(error)) from None

    if info["model"]["clusters"]:
        raise UserError(f"{path} is a router, which no expert can begin with")
    differ = differences(info["model"], vars(shape))
    if differ:
        raise UserError(f"{path} is another model than what is trained here ({differ}): see "
                        f"--model.*")
    try:
        check_shape(info, INITIAL)
    except ValueError as error:
        raise UserError(f"{path} is no model to begin with: {error}") from None

    for role, ours in space.info.items():
        if encoders.identity(info[role]) != encoders.identity(ours):
            network = "text encoder" if role == "text" else role
            raise UserError(f"{path} was trained with another {network} "
                            f"({encoders.label(info[role])} / {encoders.label(ours)}): its weights "
                            f"mean nothing here")
    if (info["objective"], info["path"]) != (objective, flow_path):
        raise UserError(f"{path} predicts {info['objective']} on the {info['path']} path, what is "
                        f"trained here {objective} on the {flow_path} path")

    # a checkpoint that was imported does not know what it cost
    images = info.get("images", 0) + info.get("init_images", 0)
    flops = info.get("flops", 0) + info.get("init_flops", 0)
    return Initial(path, sha256=digest(path), images=images, flops=flops)


def digest(path):
    """A file's SHA-256, which rank 0 reads for all."""
    found = []

    def read():
        with open(path, "rb") as f:
            found.append(hashlib.file_digest(f, "sha256").hexdigest())

    on_rank_0(read)
    return broadcast(found[0] if found else "")


def seed_path(run_dir):
    return os.path.join(run_dir, "experts", "seed.safetensors")


def read_seed(run_dir, steps, shape, space, objective, flow_path):
    """The run's seed -> Initial at its last step, which must be `steps`; a collective.

    It knows no clusters, so that of another clustering of the same images will do. UserError as
    read_initial, and where there is no seed, or one of another number of steps.
    """
    path = seed_path(run_dir)
    if not os.path.exists(path):
        raise UserError(f"train.seed_steps = {steps}, but {path} is missing: train it with "
                        f"train_expert.py --run-dir {run_dir} --shard seed, or copy it there")
    initial = read_initial(path, shape, space, objective, flow_path)
    info = artifacts.read_info(path)
    if not info.get("raw"):
        raise UserError(f"{path} is no seed, it has EMA weights alone: begin with it by --init "
                        f"{path} --train.seed_steps 0")
    made = info["step"]
    if made < steps:
        raise UserError(f"{path} has made {made} steps, train.seed_steps is {steps}: train it on "
                        f"with --shard seed, or copy that one here")
    if made > steps:
        raise UserError(f"{path} has made {made} steps, train.seed_steps is {steps}: give "
                        f"--train.seed_steps {made} to all experts, or copy one of {steps} steps "
                        f"here")

    initial.raw = True
    initial.step = steps
    initial.shard = "seed"
    return initial
