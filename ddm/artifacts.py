"""ddm.artifacts"""
import json
from dataclasses import asdict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ddm.files import atomic, parse_json
from ddm.mmdit import MMDiT
from model import DiT, ModelConfig, Router



def read_description(path, shape):
    """The JSON in a safetensors file's metadata, of the types of `shape` (check_shape). ValueError, whatever is wrong with it."""
    try:
        with safe_open(path, framework="np") as f:
            return parse_json((f.metadata() or {})["nanoddm"], shape)
    except KeyError:
        raise ValueError("it says nothing of itself, so it is none of ours") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error)) from None


def build(config):
    """The model of a ModelConfig, with initial weights."""
    return (Router if config.clusters else MMDiT if config.double else DiT)(config)


def write_tensors(path, tensors, description):
    """Writes tensors {name: torch or numpy} and what the file says of itself as one safetensors file.

    All metadata is one key of sorted JSON: safetensors orders several keys at random, and equal
    runs must give equal files. OSError where the file system refuses.
    """
    metadata = {"nanoddm": json.dumps(description, sort_keys=True)}
    tensors = {name: torch.as_tensor(tensor) for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def save(path, config, state, dtype=torch.float32, /, **info):
    """Writes weights {name: tensor} as one safetensors file that `load` rebuilds the model from.

    info: whatever JSON can hold.
    """
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    write_tensors(path, weights, {"model": asdict(config), **info})


def read_info(path):
    """A saved model's metadata, without its weights. ValueError if the file is damaged, lacks weights or is another program's."""
    try:
        with safe_open(path, framework="pt") as f:
            info = json.loads((f.metadata() or {})["nanoddm"])
            if info["model"]["depth"] > len(f.keys()):      # building a million blocks would take hours
                raise ValueError("it has fewer weights than blocks")
            with torch.device("meta"):
                wanted = {k: list(v.shape) for k, v in build(ModelConfig(**info["model"])).state_dict().items()}
            there = {k: f.get_slice(k).get_shape() for k in f.keys()}
        if there != wanted:
            raise ValueError(f"weights {sorted(k for k in {*there, *wanted} if there.get(k) != wanted.get(k))[:3]} are not as its description says")
        return info
    except Exception as error:      # safetensors raises its own kinds
        raise ValueError(f"{path} is not a model of this project, or has been cut short or damaged: copy it again ({type(error).__name__}: {error})") from None


def load(path, device="cpu", dtype=torch.float32):
    """-> (model in eval mode on device, its weights as dtype, a router's head as float32; its metadata). ValueError as read_info.

    Nothing is copied that need not be: on a CPU, weights that are of this dtype in the file stay mapped from it.
    """
    info = read_info(path)
    with torch.device("meta"):
        model = build(ModelConfig(**info["model"]))
    exact = ("head.weight", "head.bias") if info["model"]["clusters"] else ()
    with safe_open(path, framework="pt", device=str(device)) as f:
        # one by one: never twice on the device
        weights = {k: f.get_tensor(k).to(torch.float32 if k in exact else dtype) for k in f.keys()}
    spoilt = [k for k, weight in weights.items() if not weight.isfinite().all()]
    if spoilt:
        raise ValueError(f"{path} is damaged, its weights {spoilt[0]} are not finite: copy it again, or train it again")
    model.load_state_dict(weights, assign=True)
    model.reset_positions(device, dtype)
    return model.eval(), info
