"""Does a training that is killed again and again end in the bits of one that never was?

    # 20 kills; some five minutes on two cores
    python bench/chaos.py
    # longer, and its folder is kept
    python bench/chaos.py --kills 100 --seed 1 --run-dir runs/chaos

Expert 0 of a drawn set trains under torchrun on two ranks (gloo, CPU). At random instants SIGKILL
meets one rank, the agent (torchrun itself) or all processes of the run at one blow: while they
start, in a step and, --saves and --exports of them aimed at it, while a checkpoint or the weights
are written. What is left over is noted and killed, as a scheduler would, and the same command is
run again, after the last kill to the end. Then compares with an undisturbed run: the exported
weights byte by byte; the log but for its timing columns, its steps without gap or repetition; the
status. Each attempt resumes at the newest checkpoint that was there. And each rank notes the
positions that it trained on: in the history that ended in the final weights, each position from 0
to steps x batch - 1 must occur exactly once. Exit code 1 if anything differs.
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
from dataclasses import dataclass, field

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
# can be in a checkpoint, with its positions. And it goes no further than the step HOLD, so that a
# kill always finds it, however slow the one who kills
DRIVER = f"""
import os, sys, time
sys.path.insert(0, {ROOT!r})
import torch, data, train_expert
from ddm import errors, loading
from ddm.engine import Engine
from ddm.loading import Batches
path = os.path.join(sys.argv.pop(1), os.environ["RANK"])
note = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
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
    """{pid: parent's pid} of the living processes that have the run in their command line.

    They are torchrun, its ranks and, forked, their decoding processes.
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
    """What is half written (or, checkpoints, half deleted), by name and inode.

    By inode, since what a kill left behind is not the next attempt's.
    """
    found = set()
    for path in glob.glob(os.path.join(run, TORN[what])):
        with contextlib.suppress(OSError):
            found.add((path, os.stat(path).st_ino))
    return found


def newest(run):
    """The step of the newest checkpoint; 0: none."""
    paths = glob.glob(os.path.join(run, "checkpoints", "expert-0", "step-*[0-9]"))
    return max((int(path[-8:]) for path in paths), default=0)


def steps_of(attempt):
    """{step: [(rank, positions)]} that an attempt has noted."""
    found = collections.defaultdict(list)
    for path in glob.glob(os.path.join(attempt, "[0-9]*")):
        rank = os.path.basename(path)
        with open(path) as f:
            for line in f:
                step, _, positions = line.partition(":")
                found[int(step)].append((rank, [int(p) for p in positions.split()]))
    return found


def last_step(attempt):
    """The last step that an attempt's rank 0 has noted; 0: none."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        with open(os.path.join(attempt, "0")) as f:
            return int(f.readlines()[-1].partition(":")[0])
    return 0


def read_log(run):
    """The rows of the log, without what no two runs share."""
    with open(os.path.join(run, "logs", "expert-0.csv"), newline="") as f:
        rows = list(csv.DictReader(f))
    for row in rows:
        for column in ("time", "device_hours", *TIMING):
            row.pop(column, None)
    return rows


# ---- one attempt ---------------------------------------------------------------------------------


@dataclass
class Attempt:
    """A training on its way, and the kill that waits for it."""

    run: str
    # where its ranks note their steps
    folder: str
    agent: subprocess.Popen
    # one of WHOM
    whom: str
    # what the kill waits for: "save", "export", or "" for nothing of the kind
    aimed: str
    # it goes no further than this step
    hold: int
    # what of each kind was half written before it began
    before: dict[str, set] = field(default_factory=dict)

    def under_way(self, what):
        """What of this kind it is writing."""
        return torn(self.run, what) - self.before[what]

    def awaits(self):
        """Whether the moment of the kill has yet to come."""
        if self.aimed and last_step(self.folder) < self.hold and not self.under_way(self.aimed):
            return True
        return self.whom == "rank" and self.agent.pid not in processes(self.run).values()


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


def await_moment(attempt, wait, step, rng):
    """Waits `wait` seconds or, once the attempt has come to a step, that long; then for its aim."""
    agent = attempt.agent
    step = min(step, attempt.hold)
    while agent.poll() is None and last_step(attempt.folder) < step:
        time.sleep(0.005)
    time.sleep(wait)

    # an export is over in no time
    pause = 0 if attempt.aimed == "export" else 0.0005
    while agent.poll() is None and attempt.awaits():
        time.sleep(pause)
    # anywhere in it
    if attempt.aimed == "save":
        time.sleep(rng.uniform(0, 0.03))


def strike(attempt, ranks, rng):
    """The kill itself."""
    agent = attempt.agent
    if attempt.whom == "rank":
        kill([rng.choice(ranks)])
    elif attempt.whom == "agent":
        kill([agent.pid])
    else:
        kill([agent.pid, *ranks])
        kill_all(attempt.run)


def watch(attempt, ranks, starting, time_to_end):
    """What becomes of the others after a kill, in at most `time_to_end` seconds. -> a dict"""
    run = attempt.run
    agent = attempt.agent
    found = {}
    since = time.monotonic()
    if attempt.whom == "rank":
        with contextlib.suppress(subprocess.TimeoutExpired):
            agent.wait(time_to_end)
    found["agent_s"] = time.monotonic() - since
    # None: it still runs
    found["code"] = agent.poll()

    # while starting they wait for torchrun's store, for long
    while not starting and time.monotonic() < since + time_to_end:
        if processes(run).keys().isdisjoint(ranks):
            break
        time.sleep(0.005)

    left = processes(run)
    found["ranks_s"] = time.monotonic() - since
    found["ranks left"] = sum(p in left for p in ranks)
    found["decoding left"] = sum(p not in ranks and p != agent.pid for p in left)
    return found


def disturb(attempt, wait, step, rng, time_to_end):
    """Kills when the moment has come, watches the others, and kills what is left over.

    wait, step: as await_moment() takes them; time_to_end: as watch() does. Returns a dict of what
    happened; None: it had ended before.
    """
    run = attempt.run
    agent = attempt.agent
    attempt.before = {what: torn(run, what) for what in TORN}
    await_moment(attempt, wait, step, rng)
    ranks = [pid for pid, parent in processes(run).items() if parent == agent.pid]
    if agent.poll() is not None:
        return None

    under_way = {what: attempt.under_way(what) for what in TORN}
    strike(attempt, ranks, rng)
    at = max(steps_of(attempt.folder), default=0)
    found = {"whom": attempt.whom, "step": at, "start-up": not at}
    found |= watch(attempt, ranks, not at, time_to_end)
    kill_all(run)
    agent.wait()

    # steps that others took after the kill
    found["steps after"] = max(steps_of(attempt.folder), default=0) - at
    for what in TORN:
        found[what] = bool(under_way[what] or attempt.under_way(what))
    return found


def tell(number, found, after):
    """A line of what happened at a kill; after: the step of the newest checkpoint."""
    where = "starting" if found["start-up"] else f"at step {found['step']}"
    where += ", in a save" * found["save"] + ", in an export" * found["export"]

    if found["whom"] == "rank":
        rest = f"the agent ended after {found['agent_s']:.1f} s, exit code {found['code']}"
    elif found["whom"] == "agent":
        rest = f"its ranks ended after {found['ranks_s']:.1f} s"
        if found["ranks left"]:
            rest = f"{found['ranks left']} ranks still ran after {found['ranks_s']:.1f} s"
        rest += f", {found['steps after']} steps later"
    else:
        rest = "none left"
    if found["decoding left"]:
        rest += f", {found['decoding left']} decoding processes left over"

    newest_step = f"the newest checkpoint is step {after}"
    print(f"kill {number}: {found['whom']:5} {where}; {rest}; {newest_step}", flush=True)


# ---- all of it -----------------------------------------------------------------------------------


def stage(*args):
    command = [sys.executable, *args]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)


def prepare(folder):
    """-> a run after stage 1."""
    run = os.path.join(folder, "clustered")
    config = os.path.join(folder, "config.toml")
    tars = os.path.join(folder, "tars")
    with open(config, "w") as f:
        f.write(CONFIG)
    stage("tools/shapes.py", "--out", tars, "--images", "240", "--size", "8")
    data = os.path.join(tars, "*.tar")
    stage("cluster.py", "--data", data, "--run-dir", run, "--config", config)
    return run


def resumed_at(text):
    """What an attempt says of where it begins; None if it was killed before that."""
    found = re.search(r"resumed at step (\d+)|from the beginning", text)
    return found and int(found[1] or 0)


def read(*path):
    with open(os.path.join(*path), "rb") as f:
        return f.read()


def compare(whole, broken, attempts, args):
    """-> what differs from an undisturbed run, or should not be so: a list of sentences."""
    return [
        *compare_files(whole, broken, args.steps),
        *compare_logs(whole, broken, args),
        *check_history(attempts, args.steps),
    ]


def compare_files(whole, broken, steps):
    wrong = []
    for path in (
        "experts/0.safetensors",
        "checkpoints/expert-0/status",
        f"samples/expert-0-{steps:08d}.png",
    ):
        if read(whole, path) != read(broken, path):
            wrong.append(f"{path} differs")

    state = json.loads(read(broken, f"checkpoints/expert-0/step-{steps:08d}/state.json"))
    if state["step"] != steps:
        wrong.append("the last checkpoint is of another step")
    return wrong


def compare_logs(whole, broken, args):
    wrong = []
    rows = read_log(whole)
    other = read_log(broken)
    if rows != other:
        # as many as both have
        pairs = zip(rows, other, strict=False)
        first = next((a for a, b in pairs if a != b), "its length")
        wrong.append(f"the log differs, first in {first}")

    due = {*range(args.log_every, args.steps + 1, args.log_every), args.steps}
    if [int(row["step"]) for row in other] != sorted(due):
        wrong.append("the log's steps have gaps or repetitions")
    if any(int(row["images"]) != int(row["step"]) * BATCH for row in other):
        wrong.append("the log's images are not its steps' batches")
    return wrong


def check_history(attempts, steps):
    """Each position once, in the history that ended in the final weights."""
    history = {}
    for attempt in attempts:
        noted = steps_of(attempt)
        if noted:
            # it took back what was after its first step
            kept = {step: parts for step, parts in history.items() if step < min(noted)}
            history = kept | noted

    wrong = []
    for step in range(1, steps + 1):
        parts = history.pop(step, [])
        positions = []
        for _, of_rank in parts:
            positions += of_rank
        if sorted(positions) != [*range((step - 1) * BATCH, step * BATCH)]:
            wrong.append(f"step {step} was trained on {parts}")
    if history:
        wrong.append(f"there are steps {sorted(history)}")
    return wrong


@dataclass
class Undisturbed:
    """The run that is compared with, and how long it took: seconds."""

    run: str
    training: float
    # to start and end
    startup: float


def train_undisturbed(run, out, flags, steps):
    since = time.monotonic()
    if begin(["train_expert.py"], run, out, flags).wait():
        raise SystemExit(read(out).decode())
    with open(os.path.join(run, "logs", "expert-0.csv"), newline="") as f:
        training = float([*csv.DictReader(f)][-1]["time"])
    startup = time.monotonic() - since - training
    print(
        f"undisturbed: {steps} steps in {training:.1f} s, and {startup:.1f} s to start and end",
        flush=True,
    )
    return Undisturbed(run, training, startup)


def moment_of(kills_left, at, aimed, whole, steps, rng):
    """When to kill: (seconds, step), as await_moment() takes them.

    Uniformly over the time from an attempt's start to some steps later: in seconds at first, then
    in steps, whose time varies on a shared machine. at: the step of the newest checkpoint.
    """
    span = 1.5 * (steps - at) / (kills_left + 1)
    step_s = whole.training / steps
    moment = rng.uniform(whole.startup if aimed else 0, whole.startup + span * step_s)
    if moment < whole.startup:
        return moment, 0
    return rng.uniform(0, step_s), at + 1 + int((moment - whole.startup) / step_s)


def check_beginning(number, attempt, out, at):
    """-> sentences on an attempt that did not begin where it should; at: the newest checkpoint."""
    wrong = []
    text = read(out).decode(errors="replace")
    there = f"where the newest checkpoint was of step {at}"
    resumed = resumed_at(text)
    if resumed not in (None, at):
        wrong.append(f"attempt {number} resumed at step {resumed}, {there}")
    noted = steps_of(attempt)
    if noted and min(noted) != at + 1:
        wrong.append(f"attempt {number} began with step {min(noted)}, {there}")
    if "damaged" in text:
        wrong.append(f"attempt {number} found a damaged checkpoint: see {out}")
    return wrong


def check_kill(number, found):
    """-> sentences on what should not follow a kill."""
    wrong = []
    if found["whom"] == "rank" and not found["code"]:
        code = found["code"]
        wrong.append(f"kill {number}: the agent's exit code is {code} (None: it still ran)")
    # while starting they wait for torchrun's store, and write nothing
    if found["ranks left"] and not found["start-up"]:
        wrong.append(f"kill {number}: {found['ranks left']} ranks were left over")
    return wrong


def plan_kills(args, rng):
    """-> (whom each kill meets, what it is aimed at)"""
    whom = [WHOM[i % len(WHOM)] for i in range(args.kills)]
    aimed = ["save"] * args.saves + ["export"] * args.exports + [""] * args.kills
    aimed = aimed[: args.kills]
    rng.shuffle(whom)
    rng.shuffle(aimed)
    return whom, aimed


def summarize(happened, wrong, attempts, steps, seconds):
    """Prints what all of it came to."""
    count = collections.Counter(found["whom"] for found in happened)
    whom = ", ".join(f"{n} x {k}" for k, n in sorted(count.items()))
    starting, saves, exports = (
        sum(bool(found[key]) for found in happened) for key in ("start-up", "save", "export")
    )
    print(
        f"{len(happened)} kills ({whom}), {starting} while starting, {saves} in a save, "
        f"{exports} in an export; {seconds:.0f} s",
        flush=True,
    )
    if wrong:
        print("WRONG:\n" + "\n".join(wrong), flush=True)
        return
    trained = sum(len(steps_of(attempt)) for attempt in attempts)
    print(
        f"{trained} steps were taken for {steps} that count, each of their {steps * BATCH} "
        "positions once; weights, log and status are those of the undisturbed run",
        flush=True,
    )


def disturb_all(folder, broken, whole, flags, args):
    """Trains in the run `broken`, with all the kills. -> (what happened, what is wrong, folders)"""
    rng = random.Random(args.seed)
    whom, aimed = plan_kills(args, rng)
    driver = os.path.join(folder, "driver.py")
    with open(driver, "w") as f:
        f.write(DRIVER)

    happened = []
    wrong = []
    attempts = []
    for number in range(args.kills + 1):
        notes = os.path.join(folder, "attempts", f"{number:03}")
        out = f"{notes}.txt"
        os.makedirs(notes)
        attempts.append(notes)
        at = newest(broken)
        last = number == args.kills
        hold = args.steps + 1 if last else args.steps - 1
        agent = begin([driver, notes, str(hold)], broken, out, flags)
        found = None
        if last:
            agent.wait()
        else:
            attempt = Attempt(broken, notes, agent, whom[number], aimed[number], hold)
            left = args.kills - number
            wait, step = moment_of(left, at, attempt.aimed, whole, args.steps, rng)
            found = disturb(attempt, wait, step, rng, args.patience)

        wrong += check_beginning(number, notes, out, at)
        if not found:
            if agent.returncode:
                code = agent.returncode
                wrong.append(f"attempt {number} ended with exit code {code}, not killed: see {out}")
                print(read(out).decode(errors="replace")[-3000:])
            break
        happened.append(found)
        tell(number + 1, found, newest(broken))
        wrong += check_kill(number + 1, found)
    return happened, wrong, attempts


def chaos(folder, args):
    """The whole of it in a folder. -> what is wrong, a list of sentences."""
    began = time.monotonic()
    clustered = prepare(folder)
    whole = os.path.join(folder, "whole")
    broken = os.path.join(folder, "broken")
    for run in (whole, broken):
        shutil.copytree(clustered, run)
    flags = ["--shard", "0", "--train.steps", str(args.steps)]
    flags += ["--train.save_every", str(args.save_every)]
    flags += ["--train.log_every", str(args.log_every)]

    out = os.path.join(folder, "whole.txt")
    undisturbed = train_undisturbed(whole, out, flags, args.steps)
    happened, wrong, attempts = disturb_all(folder, broken, undisturbed, flags, args)
    if len(happened) < args.kills:
        ended = f"the training had ended after {len(happened)} of {args.kills} kills"
        wrong.append(f"{ended}: --steps is too small")
    if newest(broken) == args.steps:
        wrong += compare(whole, broken, attempts, args)
    else:
        wrong.append(f"it never came to its end, but to step {newest(broken)}")
    summarize(happened, wrong, attempts, args.steps, time.monotonic() - began)
    return wrong


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kills", type=int, default=20)
    add("--saves", type=int, help="how many of them wait for a save (default: a third)")
    add("--exports", type=int, help="how many wait for an export (default: a tenth)")
    add("--steps", type=int, default=2000)
    add("--save_every", type=int, default=7)
    add("--log_every", type=int, default=4)
    add("--seed", type=int, default=0)
    patience = "seconds in which ranks must have ended by themselves once another or the agent"
    add("--patience", type=float, default=120, help=f"{patience} was killed")
    kept = "an empty folder to work in, which is kept (default: a temporary one)"
    add("--run-dir", metavar="DIR", help=kept)
    return parser


def main():
    parser = make_parser()
    args = parser.parse_args()
    if args.saves is None:
        args.saves = -(-args.kills // 3)
    if args.exports is None:
        args.exports = -(-args.kills // 10)

    with tempfile.TemporaryDirectory() as scratch:
        folder = os.path.abspath(args.run_dir or scratch)
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder):
            parser.error(f"{folder} is not empty")
        wrong = chaos(folder, args)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
