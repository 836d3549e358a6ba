"""Does a training that is killed again and again end in the bits of one that never was?

    python bench/chaos.py                                   # 20 kills; some five minutes on two cores
    python bench/chaos.py --kills 100 --seed 1 --run-dir runs/chaos     # longer, and its folder is kept

Expert 0 of a drawn set trains under torchrun on two ranks (gloo, CPU). At random instants SIGKILL meets one rank, the agent (torchrun itself) or all
processes of the run at one blow: while they start, in a step and, --saves and --exports of them aimed at it, while a checkpoint or the weights are written. What is
left over is noted and killed, as a scheduler would, and the same command is run again, after the last kill to the end. Then compares with an undisturbed run:
the exported weights byte by byte; the log but for its timing columns, its steps without gap or repetition; the status. Each attempt resumes at the
newest checkpoint that was there. And each rank notes the positions that it trained on: in the history that ended in the final weights, each position
from 0 to steps x batch - 1 must occur exactly once. Exit code 1 if anything differs.
"""

import argparse
import collections
import contextlib
import csv
import glob
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
# columns of the log that no two runs share
TIMING = ("images_per_s", "mfu", "wait", "memory_gb")

ENVIRONMENT = os.environ | {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
WHOM = ("rank", "agent", "all")
BATCH = 8
CONFIG = f"""
[data]
size = 8
condition = "text"
workers = 1
[cluster]
experts = 3
fine_clusters = 6
[text]
length = 4
vocab = 64
[model]
preset = "tiny/2"
dim = 32
depth = 1
heads = 2
[train]
batch = {3 * BATCH}
lr = 1e-3
"""
# train_expert.py, but for a file ATTEMPT/RANK: a line for each step that has been taken, before it
# can be in a checkpoint, with its positions. And it goes
# no further than the step HOLD, so that a kill always finds it, however slow the one who kills
DRIVER = f"""
import os, sys, time
sys.path.insert(0, {ROOT!r})
import torch, data, train_expert
from ddm import errors, loading
from ddm.engine import Engine
from ddm.loading import Batches
note = os.open(os.path.join(sys.argv.pop(1), os.environ["RANK"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
hold = int(sys.argv.pop(1))
item, collate = data.TarDataset.__getitem__, loading.collate
of_step, to_device, update_ema = Batches.of_step, Batches._to_device, Engine.update_ema
positions = []
def numbered(items):
    return collate(items) | {{"position": torch.tensor([item["position"] for item in items])}}
def stepping(self, step):
    positions.clear()
    yield from of_step(self, step)
def noting(self, tensors, *args, **options):
    positions.extend(tensors.pop("position").tolist())
    return to_device(self, tensors, *args, **options)
def updating(self, ema_decay):
    update_ema(self, ema_decay)
    os.write(note, f"{{self.step}}: {{' '.join(map(str, positions))}}\\n".encode())
    while self.step >= hold:
        time.sleep(1)
data.TarDataset.__getitem__ = lambda self, position: item(self, position) | {{"position": position}}
loading.collate = numbered
Batches.of_step, Batches._to_device, Engine.update_ema = stepping, noting, updating
errors.script(train_expert.main)
"""


# ---- what there is -------------------------------------------------------------------------------


def processes(run):
    """{pid: parent's pid} of the living processes that have the run in their command line:
    torchrun, its ranks and, forked, their decoding processes.
    """
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                if run.encode() not in f.read().split(b"\0"):
                    continue
            with open(f"/proc/{pid}/stat") as f:
                state, parent = f.read().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                found[int(pid)] = int(parent)
    return found


def kill(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_all(run):
    """Until there is none."""
    while left := processes(run):
        kill(left)
        time.sleep(0.005)


TORN = {"save": "checkpoints/expert-0/step-*.tmp", "export": "experts/*.tmp"}


def torn(run, what="save"):
    """What is half written (or, checkpoints, half deleted), by name and inode: what a kill left
    behind is not the next attempt's.
    """
    found = set()
    for path in glob.glob(os.path.join(run, TORN[what])):
        with contextlib.suppress(OSError):
            found.add((path, os.stat(path).st_ino))
    return found


def newest(run):
    """The step of the newest checkpoint; 0: none."""
    return max(
        (
            int(path[-8:])
            for path in glob.glob(os.path.join(run, "checkpoints", "expert-0", "step-*[0-9]"))
        ),
        default=0,
    )


def steps_of(attempt):
    """{step: [(rank, positions)]} that an attempt has noted."""
    found = collections.defaultdict(list)
    for path in glob.glob(os.path.join(attempt, "[0-9]*")):
        with open(path) as f:
            for line in f:
                step, _, positions = line.partition(":")
                found[int(step)].append(
                    (os.path.basename(path), [int(p) for p in positions.split()])
                )
    return found


def log(run):
    with open(os.path.join(run, "logs", "expert-0.csv"), newline="") as f:
        return [
            {k: v for k, v in row.items() if k not in ("time", "device_hours", *TIMING)}
            for row in csv.DictReader(f)
        ]


# ---- one attempt ---------------------------------------------------------------------------------


def begin(script, run, out, args):
    """Starts it; its output goes to a file. Popen."""
    with open(out, "w") as f:
        return subprocess.Popen(
            [*TORCHRUN, *script, "--run-dir", run, *args],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=f,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def last_step(attempt):
    """The last step that an attempt's rank 0 has noted; 0: none."""
    with (
        contextlib.suppress(OSError, IndexError, ValueError),
        open(os.path.join(attempt, "0")) as f,
    ):
        return int(f.readlines()[-1].partition(":")[0])
    return 0


def disturb(run, agent, whom, wait, step, aimed, rng, attempt, patience, hold):
    """Waits `wait` seconds or, once the attempt has come to a step, that long; kills; watches what the others do for at most `patience` seconds, and kills
    what is left over. hold: where the attempt waits for its kill. -> a dict of what happened; None: it had ended before."""
    before = {what: torn(run, what) for what in TORN}
    new = lambda what: torn(run, what) - before[what]
    while step and agent.poll() is None and last_step(attempt) < min(step, hold):
        time.sleep(0.005)
    time.sleep(wait)
    aims = lambda: aimed and last_step(attempt) < hold and not new(aimed)
    while agent.poll() is None and (
        aims() or whom == "rank" and agent.pid not in processes(run).values()
    ):
        time.sleep(0 if aimed == "export" else 0.0005)
    if aimed == "save":
        time.sleep(rng.uniform(0, 0.03))  # anywhere in it
    ranks = [pid for pid, parent in processes(run).items() if parent == agent.pid]
    if agent.poll() is not None:
        return None
    underway = {what: new(what) for what in TORN}
    if whom == "rank":
        kill([rng.choice(ranks)])
    elif whom == "agent":
        kill([agent.pid])
    else:
        kill([agent.pid, *ranks])
        kill_all(run)
    since, at = time.monotonic(), max(steps_of(attempt), default=0)
    found = {"whom": whom, "step": at, "start-up": not at}
    if whom == "rank":
        with contextlib.suppress(subprocess.TimeoutExpired):
            agent.wait(patience)
    found["agent_s"], found["code"] = time.monotonic() - since, agent.poll()  # None: it still runs
    while (
        at and time.monotonic() < since + patience and any(p in processes(run) for p in ranks)
    ):  # while starting they wait for torchrun's store, for long
        time.sleep(0.005)
    left = processes(run)
    found["ranks_s"], found["ranks left"] = time.monotonic() - since, sum(p in left for p in ranks)
    found["decoding left"] = sum(p not in ranks and p != agent.pid for p in left)
    kill_all(run)
    agent.wait()
    found["went on"] = (
        max(steps_of(attempt), default=0) - at
    )  # steps that others took after the kill
    for what in TORN:
        found[what] = bool(underway[what] or new(what))
    return found


def tell(number, found, after):
    where = "starting" if found["start-up"] else f"at step {found['step']}"
    phase = ", in a save" * found["save"] + ", in an export" * found["export"]
    if found["whom"] == "rank":
        rest = f"the agent ended after {found['agent_s']:.1f} s, exit code {found['code']}"
    elif found["whom"] == "agent":
        rest = (
            f"{found['ranks left']} ranks still ran after {found['ranks_s']:.1f} s"
            if found["ranks left"]
            else f"its ranks ended after {found['ranks_s']:.1f} s"
        ) + f", {found['went on']} steps later"
    else:
        rest = "none left"
    print(
        f"kill {number}: {found['whom']:5} {where}{phase}; {rest}"
        + (
            f", {found['decoding left']} decoding processes left over"
            if found["decoding left"]
            else ""
        )
        + f"; the newest checkpoint is step {after}",
        flush=True,
    )


# ---- all of it -----------------------------------------------------------------------------------


def prepare(folder):
    """-> a run after stage 1."""
    run = os.path.join(folder, "clustered")
    with open(os.path.join(folder, "config.toml"), "w") as f:
        f.write(CONFIG)
    for args in (
        [
            "tools/shapes.py",
            "--out",
            os.path.join(folder, "tars"),
            "--images",
            "240",
            "--size",
            "8",
        ],
        [
            "cluster.py",
            "--data",
            os.path.join(folder, "tars", "*.tar"),
            "--run-dir",
            run,
            "--config",
            os.path.join(folder, "config.toml"),
        ],
    ):
        subprocess.run(
            [sys.executable, *args], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True
        )
    return run


def resumed_at(text):
    """What an attempt says of where it begins; None if it was killed before that."""
    found = re.search(r"resumed at step (\d+)|from the beginning", text)
    return found and int(found[1] or 0)


def compare(whole, broken, attempts, steps, log_every):
    """-> what differs from an undisturbed run, or should not be so: a list of sentences."""
    wrong = []
    read = lambda run, *path: open(os.path.join(run, *path), "rb").read()
    for path in (
        ["experts", "0.safetensors"],
        ["checkpoints", "expert-0", "status"],
        ["samples", f"expert-0-{steps:08d}.png"],
    ):
        if read(whole, *path) != read(broken, *path):
            wrong.append(f"{'/'.join(path)} differs")
    rows, other = log(whole), log(broken)
    if rows != other:
        wrong.append(
            f"the log differs, first in {next((a for a, b in zip(rows, other) if a != b), 'its length')}"
        )
    if [int(row["step"]) for row in other] != sorted(
        {*range(log_every, steps + 1, log_every), steps}
    ):
        wrong.append("the log's steps have gaps or repetitions")
    if any(int(row["images"]) != int(row["step"]) * BATCH for row in other):
        wrong.append("the log's images are not its steps' batches")
    with open(
        os.path.join(broken, "checkpoints", "expert-0", f"step-{steps:08d}", "state.json")
    ) as f:
        if json.load(f)["step"] != steps:
            wrong.append("the last checkpoint is of another step")
    history = {}
    for attempt in attempts:
        if noted := steps_of(attempt):
            history = {
                step: parts for step, parts in history.items() if step < min(noted)
            } | noted  # it took back what was after its first step
    for step in range(1, steps + 1):
        parts = history.pop(step, [])
        if sorted(p for _, positions in parts for p in positions) != [
            *range((step - 1) * BATCH, step * BATCH)
        ]:
            wrong.append(f"step {step} was trained on {parts}")
    if history:
        wrong.append(f"there are steps {sorted(history)}")
    return wrong


def chaos(folder, kills, saves, exports, steps, save_every, log_every, seed, patience):
    """The whole of it in a folder. -> (what happened at each kill, what is wrong)."""
    rng, began = random.Random(seed), time.monotonic()
    clustered, whole, broken, driver = (
        prepare(folder),
        *(os.path.join(folder, name) for name in ("whole", "broken", "driver.py")),
    )
    args = [
        "--shard",
        "0",
        "--train.steps",
        str(steps),
        "--train.save_every",
        str(save_every),
        "--train.log_every",
        str(log_every),
    ]
    for run in (whole, broken):
        shutil.copytree(clustered, run)
    with open(driver, "w") as f:
        f.write(DRIVER)
    since = time.monotonic()
    if begin(["train_expert.py"], whole, os.path.join(folder, "whole.txt"), args).wait():
        raise SystemExit(open(os.path.join(folder, "whole.txt")).read())
    with open(os.path.join(whole, "logs", "expert-0.csv"), newline="") as f:
        training = float([*csv.DictReader(f)][-1]["time"])
    startup = time.monotonic() - since - training
    print(
        f"undisturbed: {steps} steps in {training:.1f} s, and {startup:.1f} s to start and end",
        flush=True,
    )

    whom, aimed = (
        [WHOM[i % len(WHOM)] for i in range(kills)],
        ["save" if i < saves else "export" if i < saves + exports else "" for i in range(kills)],
    )
    rng.shuffle(whom), rng.shuffle(aimed)
    happened, wrong, attempts = [], [], []
    for number in range(kills + 1):
        attempts.append(os.path.join(folder, "attempts", f"{number:03}"))
        os.makedirs(attempts[-1])
        out, at = f"{attempts[-1]}.txt", newest(broken)
        hold = steps - 1 if number < kills else steps + 1
        agent = begin([driver, attempts[-1], str(hold)], broken, out, args)
        if number < kills:
            # drawn uniformly over the time from its start to some steps later: in seconds at first,
            # then in steps, whose time varies on a shared machine
            span, step_s = 1.5 * (steps - at) / (kills - number + 1), training / steps
            moment = rng.uniform(startup if aimed[number] else 0, startup + span * step_s)
            when = (
                (moment, 0)
                if moment < startup
                else (rng.uniform(0, step_s), at + 1 + int((moment - startup) / step_s))
            )
            found = disturb(
                broken, agent, whom[number], *when, aimed[number], rng, attempts[-1], patience, hold
            )
        else:
            found = None
            agent.wait()
        text = open(out).read()
        if (resumed := resumed_at(text)) not in (None, at):
            wrong.append(
                f"attempt {number} resumed at step {resumed}, where the newest checkpoint was of step {at}"
            )
        if (noted := steps_of(attempts[-1])) and min(noted) != at + 1:
            wrong.append(
                f"attempt {number} began with step {min(noted)}, where the newest checkpoint was of step {at}"
            )
        if "damaged" in text:
            wrong.append(f"attempt {number} found a damaged checkpoint: see {out}")
        if not found:
            if agent.returncode:
                wrong.append(
                    f"attempt {number} ended with exit code {agent.returncode}, not killed: see {out}"
                )
                print(text[-3000:])
            break
        happened.append(found)
        tell(number + 1, found, newest(broken))
        if found["whom"] == "rank" and not found["code"]:
            wrong.append(
                f"kill {number + 1}: the agent's exit code is {found['code']} (None: it still ran)"
            )
        if (
            found["ranks left"] and not found["start-up"]
        ):  # while starting they wait for torchrun's store, and write nothing
            wrong.append(f"kill {number + 1}: {found['ranks left']} ranks were left over")
    if len(happened) < kills:
        wrong.append(
            f"the training had ended after {len(happened)} of {kills} kills: --steps is too small"
        )
    if newest(broken) == steps:
        wrong += compare(whole, broken, attempts, steps, log_every)
    else:
        wrong.append(f"it never came to its end, but to step {newest(broken)}")
    count = lambda key: sum(bool(found[key]) for found in happened)
    print(
        f"{len(happened)} kills ({', '.join(f'{n} x {k}' for k, n in sorted(collections.Counter(found['whom'] for found in happened).items()))}), "
        f"{count('start-up')} while starting, {count('save')} in a save, {count('export')} in an export; {time.monotonic() - began:.0f} s",
        flush=True,
    )
    trained = sum(len(steps_of(attempt)) for attempt in attempts)
    print(
        f"{trained} steps were taken for {steps} that count, each of their {steps * BATCH} positions once; weights, log and status are those of the "
        "undisturbed run"
        if not wrong
        else "WRONG:\n" + "\n".join(wrong),
        flush=True,
    )
    return happened, wrong


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--saves", type=int, help="how many of them wait for a save (default: a third)"
    )
    parser.add_argument(
        "--exports", type=int, help="how many wait for an export (default: a tenth)"
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--save_every", type=int, default=7)
    parser.add_argument("--log_every", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--patience",
        type=float,
        default=120,
        help="seconds in which ranks must have ended by themselves once another or the agent was killed",
    )
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        help="an empty folder to work in, which is kept (default: a temporary one)",
    )
    args = parser.parse_args()
    saves = -(-args.kills // 3) if args.saves is None else args.saves
    exports = -(-args.kills // 10) if args.exports is None else args.exports
    with tempfile.TemporaryDirectory() as scratch:
        folder = os.path.abspath(args.run_dir or scratch)
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder):
            parser.error(f"{folder} is not empty")
        wrong = chaos(
            folder,
            args.kills,
            saves,
            exports,
            args.steps,
            args.save_every,
            args.log_every,
            args.seed,
            args.patience,
        )[1]
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
