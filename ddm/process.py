"""Ranks and devices of one node, signals, progress.

One code path for plain python, one GPU and many: without torchrun there is one rank, 0, and what
is summed or gathered over the ranks is its own.
"""
import contextlib
import faulthandler
import glob
import os
import re
import resource
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

# Default arguments in there hold the process group of the time of the import. transformers imports
# it, too; if that were after the group is made, the group would outlive its destruction and now and
# then abort the process at its end (torch 2.13).
import torch.distributed.nn
from tqdm import tqdm

from ddm.errors import UserError, explain

# torchrun, or whoever started this
PARENT = os.getppid()


# ---- ranks and devices ---------------------------------------------------------------------------

@dataclass
class Ranks:
    """This process among those of the node."""

    rank: int
    world: int
    device: torch.device


def cores():
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        # fewer than the machine has, where a scheduler gives only some of them
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def local_world():
    """The ranks of this machine, which share its cores and its memory."""
    world = os.environ.get("WORLD_SIZE", 1)
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))


def unusable_gpu():
    """Why a GPU of this machine cannot be used; empty where there is none, or CUDA_VISIBLE_DEVICES
    hides it on purpose.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if hidden or not glob.glob("/proc/driver/nvidia/gpus/*"):
        return ""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is a build without CUDA"

    # why CUDA fails torch says in a warning alone, and only once
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.is_available()
    return str(caught[0].message).splitlines()[0] if caught else "CUDA finds no device"


def choose_device(device):
    """What --device says, or the best there is -> torch.device, tried. UserError if it cannot be
    used.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if re.fullmatch(r"cuda:\d+", device) and "RANK" in os.environ:
        raise UserError(f"--device {device}: under torchrun each rank has a GPU of its own; say "
                        f"--device cuda, and choose GPUs by CUDA_VISIBLE_DEVICES")

    if not device and torch.cuda.is_available():
        device = "cuda"
    # torchrun starts one rank a GPU
    if device == "cuda":
        device = f"cuda:{local_rank}"

    try:
        found = torch.device(device or "cpu")
        # used at once: a GPU that is missing is found out here, not by the model
        torch.zeros((), device=found)
    except (RuntimeError, AssertionError) as error:
        # where there are GPUs, but too few of them, this rank alone knows
        own = local_rank > 0 and torch.cuda.is_available()
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}",
                        local=own) from None
    return found


def announce_device(world, device, given):
    """The first line of output; warns of a GPU that stays idle."""
    name = f"{cores()} cores, {torch.get_num_threads()} threads a rank"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    print(f"device: {world} x {device.type} ({name}), torch {torch.__version__}", flush=True)

    why = unusable_gpu() if device.type == "cpu" and not given else ""
    if why:
        print(f"warning: this machine has a GPU that cannot be used ({why}): all the work is done "
              f"by the CPU, many times slower; --device cuda makes this an error",
              file=sys.stderr, flush=True)


def start(device="", timeout=timedelta(minutes=30)):
    """Joins torchrun's process group, if there is one. -> Ranks.

    timeout: how long the ranks may wait for each other. UserError if the device cannot be used.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))

    # a run may have many tars, and decoding processes hand each tensor over as a file
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        # fp32 products in TF32
        torch.set_float32_matmul_precision("high")
    if rank == 0:
        announce_device(world, chosen, given=device)

    if "RANK" in os.environ and not dist.is_initialized():
        # both on a GPU: what the ranks tell each other goes by the CPU, and waits for no kernel
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout)
    return Ranks(rank, world, chosen)


# ---- among the ranks -----------------------------------------------------------------------------

def sum_over_ranks(tensor):
    """The tensor with the sum over all ranks in it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast(value):
    """rank 0's value, on all ranks."""
    if not dist.is_initialized():
        return value

    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gather(value):
    """The values of all ranks, on all ranks."""
    if not dist.is_initialized():
        return [value]

    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def collect(value):
    """The values of all ranks on rank 0, None on the others."""
    if not dist.is_initialized():
        return [value]

    # the receiver alone has a list
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def on_rank_0(function):
    """Calls function() on rank 0 alone; a UserError or OSError there is a UserError on all ranks,
    so that none waits for another.
    """
    error = None
    if os.environ.get("RANK", "0") == "0":
        try:
            function()
        except UserError as caught:
            error = str(caught)
        except OSError as caught:
            error = explain(caught) or str(caught)

    # the others wait here until rank 0 is done
    error = broadcast(error)
    if error:
        raise UserError(error)


def barrier():
    """Waits for all ranks, through gloo: no GPU is touched."""
    if dist.is_initialized():
        sum_over_ranks(torch.zeros(1))


# ---- signals and hanging -------------------------------------------------------------------------

class Stop:
    """SIGTERM and Ctrl-C, which end a training after its step.

    A wait for data that lasts is not waited for: within `wait` Interrupted is raised.
    """

    # seconds that a batch may take once a signal has come
    GRACE = 5

    class Interrupted(BaseException):
        """No `except Exception` on the way holds it up."""

    def __init__(self):
        # the signal, 0 if none has come; when the present wait began
        self.number = 0
        self.since = None

        # outside of `wait` neither handler raises: the loop ends after its step
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGALRM, self._look)

    def _stop(self, number, frame):
        # the first is the one that the exit code names
        self.number = self.number or number
        self._look()

    def _look(self, *_):
        if not self.number or self.since is None:
            return
        if time.monotonic() - self.since >= self.GRACE:
            raise self.Interrupted

    @contextlib.contextmanager
    def wait(self):
        """While waiting an alarm rings each second: Python looks at signals only when a system call
        returns, and one may come just before a long one.
        """
        self.since = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 1, 1)
        try:
            yield
        finally:
            self.since = None
            signal.setitimer(signal.ITIMER_REAL, 0)

    def requested(self):
        """Whether a signal has come to any rank; a collective, through gloo: no GPU is waited
        for.
        """
        return bool(sum_over_ranks(torch.tensor(float(self.number > 0))))


def watchdog(seconds):
    """Ends the process, with the place where each thread is, unless called again within `seconds`
    (0: never). A thread of C, which no hanging call can hold up.
    """
    if seconds:
        # each call starts the clock anew
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)


def end_with_torchrun():
    """A rank whose torchrun has been killed would train on, and write beside the next attempt: it
    ends, within a second, as if killed, too.
    """
    def watch():
        # orphans get another parent
        while os.getppid() == PARENT:
            time.sleep(0.5)
        try:
            print("error: torchrun has gone, and so this rank ends", file=sys.stderr, flush=True)
        finally:
            # in `finally`, since stderr may have gone with torchrun
            os._exit(1)

    if "RANK" in os.environ:
        threading.Thread(target=watch, daemon=True).start()


# ---- progress ------------------------------------------------------------------------------------

class _Lines:
    """A stderr for tqdm that is not a terminal: whole lines instead of a bar that redraws itself.
    """

    def write(self, text):
        # not the bare line ends and carriage returns of a bar
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self):
        sys.stderr.flush()


def progress(iterable=None, **options):
    """tqdm on a terminal, from rank 0 alone; in a log, a plain line every 15 seconds."""
    options["disable"] = os.environ.get("RANK", "0") != "0"

    if not sys.stderr.isatty():
        options["file"] = _Lines()
        options["mininterval"] = 15
        options["ncols"] = 200
        options["bar_format"] = ("{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, "
                                 "{rate_fmt}{postfix}]")

    return tqdm(iterable, **options)
