"""Files of tensors that say what they are: one writer, and the models' save and load.

    write_tensors(path, tensors, description)       any safetensors file of a run
    read_description(path, shape)                   what it says of itself
    save(path, model.config, weights, **info)       a model's
    model, info = load(path)                        rebuilds it with nothing else

What a file says of itself is one string of sorted JSON, under the key "nanoddm" of its metadata:
safetensors orders several keys at random, and equal runs must give equal files.
"""
import json
from dataclasses import asdict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ddm.files import atomic, parse_json
from ddm.mmdit import MMDiT
from model import DiT, ModelConfig, Router

KEY = "nanoddm"
# before the names of weights that are not EMA weights, in a file that has both
RAW = "raw."


def write_tensors(path, tensors, description):
    """Writes tensors {name: torch or numpy} with a description, whatever JSON can hold.

    OSError where the file system refuses.
    """
    # safetensors takes contiguous tensors alone
    tensors = {name: torch.as_tensor(tensor).contiguous() for name, tensor in tensors.items()}
    metadata = {KEY: json.dumps(description, sort_keys=True)}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_description(path, shape):
    """What a file says of itself, of the types of `shape` (see ddm.files.check_shape).

    ValueError, whatever is wrong with it.
    """
    try:
        with safe_open(path, framework="np") as f:
            # the header alone is read, however large the tensors are
            return parse_json((f.metadata() or {})[KEY], shape)
    except KeyError:
        raise ValueError("it says nothing of itself, so it is none of ours") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error)) from None


def build(config):
    """The model of a ModelConfig, with initial weights: Router, MMDiT or DiT."""
    # K makes a router, double-stream blocks an MMDiT
    if config.clusters:
        return Router(config)
    if config.double:
        return MMDiT(config)
    return DiT(config)


def save(path, config, state, dtype=torch.float32, raw=None, /, **info):
    """Writes a model that `load` rebuilds.

    state: its weights {name: tensor}, which are written as dtype. raw: those of the same training
    before they are averaged, for load_raw; a seed has them. info: what else the file is to say,
    whatever JSON can hold. OSError where the file system refuses.
    """
    weights = {name: tensor.detach().to("cpu", dtype) for name, tensor in state.items()}
    if raw:
        info["raw"] = True
        for name, tensor in raw.items():
            weights[RAW + name] = tensor.detach().to("cpu", dtype)
    write_tensors(path, weights, {"model": asdict(config), **info})


def read_info(path):
    """What a saved model's file says of itself, without its weights.

    ValueError if the file is damaged, lacks weights or is another program's.
    """
    try:
        return _read_info(path)
    # safetensors raises its own kinds, and a description may be anything
    except Exception as error:
        raise ValueError(
            f"{path} is not a model of this project, or has been cut short or damaged: copy it "
            f"again ({type(error).__name__}: {error})") from None


def _read_info(path):
    with safe_open(path, framework="pt") as f:
        info = json.loads((f.metadata() or {})[KEY])
        found = {name: f.get_slice(name).get_shape() for name in f.keys()}

    # to build a million blocks would take hours
    if info["model"]["depth"] > len(found):
        raise ValueError("it has fewer weights than blocks")
    # shapes without memory, to compare the file's with
    with torch.device("meta"):
        model = build(ModelConfig(**info["model"]))

    wanted = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    if info.get("raw"):
        wanted |= {RAW + name: shape for name, shape in wanted.items()}
    # missing, superfluous and of another shape alike
    differ = [name for name in found | wanted if found.get(name) != wanted.get(name)]
    if differ:
        raise ValueError(f"weights {sorted(differ)[:3]} are not as its description says")
    return info


def load(path, device="cpu", dtype=torch.float32):
    """-> (model in eval mode on device, its weights as dtype; what its file says of itself).

    A router's head is float32 always. ValueError as read_info. Nothing is copied that need not be:
    on a CPU, weights that are of this dtype in the file stay mapped from it.
    """
    info = read_info(path)
    with torch.device("meta"):
        model = build(ModelConfig(**info["model"]))

    # its logits decide between clusters: see model.Router
    exact = ("head.weight", "head.bias") if info["model"]["clusters"] else ()
    weights = {}
    with safe_open(path, framework="pt", device=str(device)) as f:
        # one by one: never twice on the device
        for name in model.state_dict():
            weight = _finite(f, path, name)
            weights[name] = weight.to(torch.float32 if name in exact else dtype)

    # assign: the file's tensors become the weights, and are not copied
    model.load_state_dict(weights, assign=True)
    # the config gives them, so no file has them
    model.reset_positions(device, dtype)
    return model.eval(), info


def add_info(path, **info):
    """Adds to what a model's file says of itself; its tensors stay, bit by bit."""
    write_tensors(path, load_file(path), read_info(path) | info)


def load_raw(path):
    """The raw weights {name: tensor} of a model's file that has them, as a seed's; else {}.

    ValueError if they are not finite.
    """
    weights = {}
    with safe_open(path, framework="pt") as f:
        for name in f.keys():
            if name.startswith(RAW):
                weights[name.removeprefix(RAW)] = _finite(f, path, name)
    return weights


def _finite(file, path, name):
    """A tensor of an open file. ValueError if it is not finite."""
    weight = file.get_tensor(name)
    if not weight.isfinite().all():
        raise ValueError(f"{path} is damaged, its weights {name} are not finite: copy it again, or "
                         f"train it again")
    return weight
