"""The weights that a training begins with, where they are not random: a seed's, or any model's.

    initial = read_seed(run_dir, steps, ...)        experts go on from the run's seed
    initial = read_initial(path, ...)               --init: the weights of a model file, no more
    Engine(..., initial=initial)

Branch-Train-Merge (Li et al. 2022) begins like this: one model learns what all clusters have in
common, then each expert goes on from it, alone. The paper's experts begin with random weights.
"""
import hashlib
import os
from dataclasses import dataclass, field

from torch import Tensor

from ddm import artifacts, encoders
from ddm.config import differences
from ddm.errors import UserError
from ddm.files import check_shape
from ddm.run import NETWORK

# what the file must say of itself
INITIAL = {"objective": str, "path": str, "autoencoder": NETWORK, "text": NETWORK}


@dataclass
class Initial:
    """What a training begins with."""
    # {name: tensor}; none: random ones, from train.seed
    weights: dict[str, Tensor] = field(default_factory=dict)
    # EMA weights; none: equal to the weights
    ema: dict[str, Tensor] = field(default_factory=dict)
    # of the schedule, at which training begins
    step: int = 0
    # the SHA-256 of their file, and which model of the same run it is, if one: seed, 3, all
    sha256: str = ""
    shard: str = ""
    # what they cost, with what they themselves began with
    images: int = 0
    flops: int = 0

    def about(self):
        """For the metadata of the model that is trained."""
        return {"init": self.sha256, "init_shard": self.shard, "init_images": self.images,
                "init_flops": self.flops}


RANDOM = Initial()


def read_initial(path, shape, space, objective, flow_path):
    """The weights of a model file, for a model of the ModelConfig `shape` in a codec.Space.

    objective, flow_path: [flow]'s. UserError where the file's model is another one, works in other
    latents or token features, or predicts something else.
    """
    if not os.path.exists(path):
        raise UserError(f"there is no {path} to begin with")
    try:
        # on the host: mapped from the file, and copied to a device part by part
        model, info = artifacts.load(path)
    except ValueError as error:
        raise UserError(str(error)) from None

    if model.config != shape:
        differ = differences(vars(model.config), vars(shape))
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

    with open(path, "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    # a checkpoint that was imported does not know what it cost
    images = info.get("images", 0) + info.get("init_images", 0)
    flops = info.get("flops", 0) + info.get("init_flops", 0)
    return Initial(model.state_dict(), sha256=sha256, images=images, flops=flops)


def seed_path(run_dir):
    return os.path.join(run_dir, "experts", "seed.safetensors")


def read_seed(run_dir, steps, shape, space, objective, flow_path):
    """The run's seed: its raw weights and its EMA weights, at its last step, which must be `steps`.

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
                        f"--train.seed_steps {made}, or copy one of {steps} steps here")

    initial.ema = initial.weights
    try:
        initial.weights = artifacts.load_raw(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    initial.step = steps
    initial.shard = "seed"
    return initial
