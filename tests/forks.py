"""Scripts in processes of their own, without the seconds that each takes to import torch.

A server that has imported it forks itself. A process begins where python would have come to after
the imports: nothing of ours is imported yet, and it has its own environment, folder and output.
"""

import atexit
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torch._subclasses.fake_tensor",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.nn",
        "torch.distributed.tensor",
        "faiss",
        "numpy",
        "PIL.Image",
        "safetensors.torch",
        "tqdm",
        "transformers.models.clip.modeling_clip",
        "transformers.models.clip.tokenization_clip",
        "transformers.models.dinov2.modeling_dinov2",
        "transformers.models.t5.modeling_t5",
        "diffusers.models.autoencoders.autoencoder_kl",
        "forks",
    ]
)


def run(args, cwd, environment, ranks=0, timeout=300):
    """`python *args`, or so many ranks of it as torchrun would start them.

    Returns a CompletedProcess with text output. A rank that fails ends the others.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        settings = [environment]
        store = None
        if ranks:
            settings, store = rank_settings(environment, ranks)

        processes = [
            CONTEXT.Process(target=become, args=(args, cwd, each, *paths)) for each in settings
        ]
        for process in processes:
            process.start()
        code = wait(processes, time.monotonic() + timeout)
        # the ranks met there
        del store

        texts = []
        for path in paths:
            with open(path, errors="backslashreplace") as f:
                texts.append(f.read())

    if code is None:
        raise subprocess.TimeoutExpired(args, timeout, *texts)
    return subprocess.CompletedProcess(args, code, *texts)


def rank_settings(environment, ranks):
    """The environment of each rank, and the store where they meet: it must live as long as they."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }
    settings = []
    for rank in range(ranks):
        own = common | {"RANK": rank, "LOCAL_RANK": rank}
        settings.append(environment | {name: str(value) for name, value in own.items()})
    return settings, store


def wait(processes, deadline):
    """The first exit code that is not 0, or 0; None: they ran at the deadline, and were killed."""
    code = 0
    running = list(processes)
    while running and code == 0:
        left = max(0, deadline - time.monotonic())
        ended = multiprocessing.connection.wait([p.sentinel for p in running], left)
        if not ended:
            code = None
        for process in [p for p in running if p.sentinel in ended]:
            process.join()
            running.remove(process)
            code = code or process.exitcode

    for process in running:
        process.kill()
        process.join()
    return code


def become(args, cwd, environment, stdout, stderr):
    """The process itself, from here on as if python had been called with `args`."""
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(args)
    sys.path.insert(0, os.path.dirname(os.path.abspath(args[0])))
    try:
        runpy.run_path(args[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        # torch's handler complains of the decoding processes that are killed now
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # multiprocessing's processes leave without
        atexit._run_exitfuncs()
