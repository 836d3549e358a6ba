"""ddm.process"""
import glob
import os
import re
import resource
import sys
import warnings
from datetime import timedelta
from types import SimpleNamespace

import torch.distributed as dist
import torch.distributed.nn
from tqdm import tqdm

from ddm.errors import UserError, explain



def cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _unusable_gpu():
    """Why a GPU of this machine cannot be used; empty where there is none, or CUDA_VISIBLE_DEVICES hides it on purpose."""
    if not glob.glob("/proc/driver/nvidia/gpus/*") or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return ""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is a build without CUDA"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.is_available()
    return str(caught[0].message).splitlines()[0] if caught else "CUDA finds no device"


def _choose_device(device):
    """What --device says, or the best there is -> torch.device, tried. UserError if it cannot be used."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if re.fullmatch(r"cuda:\d+", device) and "RANK" in os.environ:
        raise UserError(f"--device {device}: under torchrun each rank has a GPU of its own; say --device cuda, and choose GPUs by CUDA_VISIBLE_DEVICES")
    if not device and torch.cuda.is_available():
        device = "cuda"
    if device == "cuda":
        device = f"cuda:{local}"
    try:
        found = torch.device(device or "cpu")
        torch.zeros((), device=found)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}", local=local > 0 and torch.cuda.is_available()) from None
    return found


def local_world():
    """The ranks of this machine, which share its cores and its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))


def start(device="", timeout=timedelta(minutes=30)):
    """Joins torchrun's process group, if there is one. -> namespace of rank, world, device (torch.device).

    One code path for plain python, one GPU and many: without torchrun rank is 0 and world is 1. timeout: how long the ranks may
    wait for each other. Rank 0 says which devices they are, and warns of a GPU that stays idle.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # a run may have many tars, and decoding processes hand each tensor over as a file
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    chosen = _choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
    if rank == 0:
        name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else f"{cores()} cores, {torch.get_num_threads()} threads a rank"
        print(f"device: {world} x {chosen.type} ({name}), torch {torch.__version__}", flush=True)
        if not device and chosen.type == "cpu" and (why := _unusable_gpu()):
            print(f"warning: this machine has a GPU that cannot be used ({why}): all the work is done by the CPU, many times slower; "
                  f"--device cuda makes this an error", file=sys.stderr, flush=True)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=timeout)
    return SimpleNamespace(rank=rank, world=world, device=chosen)


def sum_over_ranks(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast(value):
    """rank 0's value, on all ranks."""
    if dist.is_initialized():
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]
    return value


def gather(value):
    """The values of all ranks, on all ranks."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def collect(value):
    """The values of all ranks on rank 0, None on the others."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(value, values)
    return values


def on_rank_0(function):
    """Calls function() on rank 0 alone; a UserError or OSError there is a UserError on all ranks, so that none waits for another."""
    error = None
    if os.environ.get("RANK", "0") == "0":
        try:
            function()
        except UserError as caught:
            error = str(caught)
        except OSError as caught:
            error = explain(caught) or str(caught)
    if error := broadcast(error):
        raise UserError(error)


def barrier():
    if dist.is_initialized():
        sum_over_ranks(torch.zeros(1))   # through gloo: no GPU is touched


class _Lines:
    """A stderr for tqdm that is not a terminal: whole lines instead of a bar that redraws itself."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self):
        sys.stderr.flush()


def progress(iterable=None, **options):
    """tqdm on a terminal, from rank 0 alone; in a log, a plain line every 15 seconds."""
    options["disable"] = os.environ.get("RANK", "0") != "0"
    if not sys.stderr.isatty():
        options |= {"file": _Lines(), "mininterval": 15, "ncols": 200,
                    "bar_format": "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"}
    return tqdm(iterable, **options)
