"""The launchers: launch/node.sh by itself, in a job of Slurm, and on hosts over ssh.

There is no network, no Slurm and no GPU: stand-ins of ssh, torchrun, scontrol and nvidia-smi take
their places, in a copy of the repository and with no other programs than those that are named here.
Nothing is measured in seconds: who waits, waits for a file or for a line.
"""

import os
import shutil
import signal
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ENVIRONMENT, ROOT, wait_until

from ddm import artifacts

pytestmark = pytest.mark.slow

# what the scripts need of a machine: one node, the launching machine, a host
NODE = ("bash", "cat", "dirname", "mkdir", "realpath", "sh", "sleep", "touch")
HERE = (
    *("bash", "comm", "cp", "cut", "dirname", "git", "grep", "head", "ls", "mkdir", "mktemp"),
    *("mv", "realpath", "rm", "sleep", "sort", "stat", "tail", "tar", "tr"),
)
HOST = (*NODE, "cut", "flock", "grep", "make", "rm", "stat", "tail", "tar")

TORCHRUN_THERE = ".venv/bin/torchrun"
SEED = "experts/seed.safetensors"

# torchrun, which notes what it was asked for and then does ACTIONS
TORCHRUN = """#!/bin/sh
case $1 in --help) echo "usage: torchrun [--nproc-per-node N] HELP"; exit;; esac
echo "$@" >> arguments
mark() { mkdir -p runs/mine/checkpoints/NAME; echo "$@" > runs/mine/checkpoints/NAME/status; }
ACTIONS
"""

# what a finished training leaves
FINISHES = """
mkdir -p runs/mine/experts runs/mine/logs runs/mine/samples
echo step > runs/mine/logs/NAME.csv
echo image > runs/mine/samples/NAME-6.png
echo weights > runs/mine/WEIGHTS
mark finished 6
"""

# a training that waits for the file `go`, and notes the signals that it gets meanwhile
WAITS = """
trap 'echo TERM >> signals' TERM
trap 'echo another >> signals' INT USR1 HUP
touch begun
while [ ! -e go ]; do sleep 0.01; done
"""

# an expert, which must have a seed, and keeps a copy of it
BEGINS = f"""
cat runs/mine/{SEED} > ancestor || exit 1
"""

# a training that waits for a signal, saves and ends as torchrun does
SAVES = """
trap 'mark to be continued 5; exit 1' TERM
touch begun
while true; do sleep 0.01; done
"""

# ssh HOST COMMAND, where HOST is this machine, with the programs of MACHINES/HOST
SSH = """#!/bin/sh
PATH=$MACHINES/$1
shift
exec sh -c "$*"
"""


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def torchrun(path, actions, name="expert-1", waits=True):
    """Writes a stand-in; waits: whether it knows --shutdown-timeout, as torchrun 2.12 does."""
    text = TORCHRUN.replace("HELP", "[--shutdown-timeout S]" if waits else "")
    weights = f"{name.replace('expert-', 'experts/')}.safetensors"
    text = text.replace("ACTIONS", actions).replace("WEIGHTS", weights)
    program(path, text.replace("NAME", name))


def links(folder, programs):
    folder.mkdir(parents=True)
    for name in programs:
        (folder / name).symlink_to(shutil.which(name))


def environment(path, **variables):
    """Ours, but for what a job of Slurm or a user might have set in it."""
    kept = {}
    for name, value in ENVIRONMENT.items():
        if not name.startswith(("SLURM_", "RUN", "WHAT", "SSH", "EVERY", "TRIES")):
            kept[name] = value
    return kept | {"PATH": str(path)} | variables


def run(words, **options):
    options |= {"capture_output": True, "text": True, "timeout": 300, "stdin": subprocess.DEVNULL}
    return subprocess.run([*map(str, words)], **options)


def default_signals():
    """Where the suite runs under nohup, or behind `&`, its children would ignore these."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def begin(words, **options):
    """Starts a program, in a process group of its own that can be signalled."""
    return subprocess.Popen(
        [*map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=default_signals,
        **options,
    )


def catches(process, number):
    """Whether the process has got as far as to handle this signal."""
    with open(f"/proc/{process.pid}/status") as f:
        fields = dict(line.split(":", 1) for line in f)
    return int(fields["SigCgt"], 16) >> (number - 1) & 1


def copy_launchers(to):
    shutil.copytree(os.path.join(ROOT, "launch"), to / "launch")


def one_error(done):
    """The only line of a mistake that was found before anything began."""
    assert done.returncode == 2 and not done.stdout, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


# ---- launch/node.sh ------------------------------------------------------------------------------


@pytest.fixture
def node(tmp_path):
    """A node with a run of two experts. -> its folders, and what starts node.sh there."""
    here, bin = tmp_path / "here", tmp_path / "bin"
    links(bin, NODE)
    copy_launchers(here)
    for shard in ("0", "1", "router"):
        (here / "runs" / "mine" / "shards" / shard).mkdir(parents=True)
    torchrun(bin / "torchrun", FINISHES)

    def launch(*words, **variables):
        variables = {"RUN": "runs/mine"} | variables
        return run(["launch/node.sh", *words], cwd=here, env=environment(bin, **variables))

    return SimpleNamespace(
        here=here,
        bin=bin,
        launch=launch,
        torchrun=bin / "torchrun",
        arguments=here / "arguments",
        status=here / "runs" / "mine" / "checkpoints" / "expert-1" / "status",
    )


@pytest.mark.parametrize(
    "before, actions, expected",
    [
        (None, "mark finished 6; exit 0", 0),
        ("finished 6", "exit 0", 0),
        # it died, and got further than before
        (None, "mark to be continued 4; exit 1", 75),
        ("to be continued 4", "mark to be continued 8; exit 1", 75),
        ("failed 4", "mark to be continued 4; exit 1", 75),
        # it died, and got no further
        ("to be continued 4", "exit 1", 1),
        (None, "exit 1", 1),
        # it says itself that it would fail again
        ("to be continued 4", "mark failed 4; exit 1", 1),
        # a mistake in the command leaves an earlier marker as it was
        ("finished 6", "exit 1", 1),
    ],
)
def test_node_s_exit_code_follows_the_marker(node, before, actions, expected):
    if before:
        node.status.parent.mkdir(parents=True)
        node.status.write_text(before + "\n")
    torchrun(node.torchrun, actions)

    done = node.launch("1")
    assert done.returncode == expected, done.stdout + done.stderr
    assert "expert-1: exit code " in done.stdout


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "give an expert's number, all, seed, router or student"),
        (["seven"], "'seven': give an expert's number"),
        (["3x"], "'3x': give an expert's number"),
        (["-1"], "'-1': give an expert's number"),
        (["--run-dir", "runs/mine"], "'--run-dir': give an expert's number"),
        (["1", "--run-dir"], "--run-dir needs a directory"),
    ],
)
def test_node_starts_nothing_after_a_mistake(node, words, said):
    assert said in one_error(node.launch(*words))
    assert not node.arguments.exists()


def test_node_names_a_torchrun_that_is_missing(node):
    node.torchrun.unlink()
    assert "there is no torchrun" in one_error(node.launch("1"))


@pytest.mark.parametrize(
    "what, name, stage",
    [
        ("1", "expert-1", "train_expert.py --shard 1"),
        ("all", "expert-all", "train_expert.py --shard all"),
        ("seed", "expert-seed", "train_expert.py --shard seed"),
        ("router", "router", "train_router.py"),
        ("student", "student", "distill.py"),
    ],
)
def test_node_trains_what_it_is_told(node, what, name, stage):
    torchrun(node.torchrun, "mark finished 6", name)
    done = node.launch(what, "--train.lr", "2e-4")
    assert done.returncode == 0 and f"{name}: exit code 0, finished 6" in done.stdout
    words = node.arguments.read_text()
    assert words.endswith(f"/{stage} --run-dir runs/mine --train.lr 2e-4\n")
    assert " --max-restarts 3 " in words and "--nproc_per_node=1 " in words


@pytest.mark.parametrize("flags", [["--run-dir", "runs/mine"], ["--run-dir=runs/mine"]])
def test_node_takes_the_run_directory_from_its_flags(node, flags):
    assert node.launch("1", "--seed", "3", *flags, RUN="runs/another").returncode == 0
    assert node.arguments.read_text().endswith(" --run-dir runs/mine --seed 3\n")


def test_node_passes_on_flags_as_they_are(node):
    torchrun(node.torchrun, 'for word in "$@"; do echo "<$word>"; done')
    word = "a word; $(and) 'another'"
    assert f"<{word}>\n<>\n" in node.launch("1", word, "").stdout


def test_node_prefers_the_torchrun_of_the_repository(node):
    torchrun(node.here / ".venv" / "bin" / "torchrun", "echo the repository has its own")
    assert "the repository has its own" in node.launch("1").stdout


@pytest.mark.parametrize("waits", [True, False])
def test_torchrun_is_asked_to_wait_only_where_it_can_be(node, waits):
    torchrun(node.torchrun, FINISHES, waits=waits)
    assert node.launch("1").returncode == 0
    assert ("--shutdown-timeout 600" in node.arguments.read_text()) == waits


@pytest.mark.parametrize(
    "listed, code, variables, gpus",
    [
        ("GPU 0: NVIDIA H100\n  MIG 1g.10gb\nGPU 1: NVIDIA H100", 0, {}, 2),
        ("NVIDIA-SMI has failed", 9, {}, 0),
        ("GPU 0: NVIDIA H100", 0, {"SLURM_GPUS_ON_NODE": "4"}, 4),
        ("GPU 0: NVIDIA H100", 0, {"SLURM_GPUS_ON_NODE": "0"}, 0),
    ],
)
def test_where_there_are_gpus_they_must_be_used(node, listed, code, variables, gpus):
    program(node.bin / "nvidia-smi", f"#!/bin/sh\necho '{listed}'\nexit {code}\n")
    assert node.launch("1", **variables).returncode == 0
    words = node.arguments.read_text()
    assert f"--nproc_per_node={max(gpus, 1)} " in words
    assert ("--device cuda" in words) == (gpus > 0)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_node_passes_a_signal_on_once_and_as_sigterm(node, name):
    """Also where it goes to the whole process group, as a Ctrl-C does."""
    torchrun(node.torchrun, WAITS)
    variables = environment(node.bin, RUN="runs/mine")
    with begin(["launch/node.sh", "1"], cwd=node.here, env=variables) as process:
        wait_until((node.here / "begun").exists)
        os.killpg(process.pid, getattr(signal, name))
        wait_until((node.here / "signals").exists)
        os.killpg(process.pid, getattr(signal, name))
        os.killpg(process.pid, signal.SIGTERM)
        (node.here / "go").touch()
        out = process.communicate(timeout=300)[0]

    assert process.returncode == 75, out
    assert (node.here / "signals").read_text() == "TERM\n"


@pytest.mark.parametrize("waits, whom", [(True, "torchrun"), (False, "rank")])
def test_a_stop_reaches_the_ranks_also_where_torchrun_would_not_wait(node, waits, whom):
    actions = """
trap 'echo torchrun > stopped; kill -KILL $!' TERM
sh -c 'trap "echo rank > stopped; exit" TERM; touch begun; while true; do sleep 0.01; done' &
wait
"""
    torchrun(node.torchrun, actions, waits=waits)
    variables = environment(node.bin, RUN="runs/mine")
    with begin(["launch/node.sh", "1"], cwd=node.here, env=variables) as process:
        wait_until((node.here / "begun").exists)
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=300)[0]

    assert (node.here / "stopped").read_text() == f"{whom}\n"
    assert process.returncode == 75, out


# ---- launch/slurm.sbatch -------------------------------------------------------------------------

# the variables of a job that is no element of an array
ALONE = {"SLURM_ARRAY_JOB_ID": None, "SLURM_ARRAY_TASK_ID": None, "SLURM_JOB_ID": "91"}


@pytest.fixture
def job(node, tmp_path):
    """A job array of the node's run. -> what starts an element, and the jobs that were requeued."""
    # Slurm runs a copy of the script
    script = tmp_path / "spool" / "slurm_script"
    script.parent.mkdir()
    shutil.copy(node.here / "launch" / "slurm.sbatch", script)
    requeued = tmp_path / "requeued"
    program(node.bin / "scontrol", f'#!/bin/sh\necho "$@" >> {requeued}\n')

    def variables(**changes):
        settings = {"RUN": "runs/mine", "SLURM_SUBMIT_DIR": str(node.here)}
        settings |= {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "1"}
        settings |= {"SLURM_JOB_ID": "78"} | changes
        given = {name: value for name, value in settings.items() if value is not None}
        return environment(node.bin, **given)

    def launch(*flags, **changes):
        words = ["bash", script, *flags]
        return run(words, cwd=script.parent, env=variables(**changes))

    return SimpleNamespace(script=script, requeued=requeued, variables=variables, launch=launch)


@pytest.mark.parametrize(
    "element, name, stage",
    [("1", "expert-1", "train_expert.py --shard 1"), ("2", "router", "train_router.py")],
)
def test_an_element_trains_its_expert_and_the_last_one_the_router(node, job, element, name, stage):
    torchrun(node.torchrun, "mark finished 6", name)
    # WHAT may be left over from the seed's job
    changes = {"SLURM_ARRAY_TASK_ID": element, "SLURM_GPUS_ON_NODE": "2", "WHAT": "seed"}
    done = job.launch("--train.lr", "2e-4", **changes)
    assert done.returncode == 0, done.stdout + done.stderr
    words = node.arguments.read_text()
    assert words.endswith(f"/{stage} --run-dir runs/mine --device cuda --train.lr 2e-4\n")
    assert "--nproc_per_node=2 " in words
    assert not job.requeued.exists()


def test_a_job_that_is_no_array_trains_the_seed(node, job):
    torchrun(node.torchrun, "mark finished 6", "expert-seed")
    done = job.launch("--train.lr", "2e-4", **ALONE, WHAT="seed")
    assert done.returncode == 0, done.stdout + done.stderr
    words = node.arguments.read_text()
    assert words.endswith("/train_expert.py --shard seed --run-dir runs/mine --train.lr 2e-4\n")
    assert not job.requeued.exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"SLURM_ARRAY_TASK_ID": "3"}, "element 3 of the array, and runs/mine has 2 experts"),
        (ALONE, "neither an array nor WHAT: give --array=0-2, or WHAT=seed"),
        (ALONE | {"WHAT": "sed"}, "'sed': give an expert's number, all, seed"),
        ({"RUN": "runs/another"}, "no shards in runs/another/shards"),
    ],
)
def test_a_mistake_in_a_job_is_one_line_and_is_not_requeued(job, changes, said):
    assert said in one_error(job.launch(**changes))
    assert not job.requeued.exists()


@pytest.mark.parametrize(
    "actions, changes, code, again",
    [
        ("mark to be continued 4; exit 1", {}, 75, True),
        ("mark to be continued 4; exit 1", {"SLURM_RESTART_COUNT": "100"}, 75, False),
        ("mark failed 4; exit 1", {}, 1, False),
        ("exit 1", {}, 1, False),
    ],
)
def test_what_died_is_requeued_if_it_can_go_further(node, job, actions, changes, code, again):
    torchrun(node.torchrun, actions)
    done = job.launch(**changes)
    assert done.returncode == code, done.stdout + done.stderr
    assert job.requeued.exists() == again
    if again:
        assert job.requeued.read_text() == "requeue 77_1\n"


def test_a_seed_that_died_is_requeued_by_its_job_s_number(node, job):
    torchrun(node.torchrun, "mark to be continued 4; exit 1", "expert-seed")
    done = job.launch(**ALONE, WHAT="seed")
    assert done.returncode == 75, done.stdout + done.stderr
    assert job.requeued.read_text() == "requeue 91\n"


@pytest.mark.parametrize("name, again", [("SIGUSR1", True), ("SIGTERM", False)])
def test_a_job_saves_and_is_requeued_unless_it_is_cancelled(node, job, name, again):
    torchrun(node.torchrun, SAVES)
    number = getattr(signal, name)
    folder = job.script.parent
    with begin(["bash", job.script], cwd=folder, env=job.variables()) as process:
        wait_until((node.here / "begun").exists)
        wait_until(lambda: catches(process, number))
        process.send_signal(number)
        out = process.communicate(timeout=300)[0]

    assert process.returncode == 75 and "to be continued 5" in out, out
    assert job.requeued.exists() == again


# ---- launch/ssh.sh: what is asked for before anything begins -------------------------------------


def track(folder):
    """Makes a folder a git repository that tracks all its files."""
    for words in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", folder, *words], check=True)


@pytest.fixture
def site(tmp_path):
    """A launching machine with a run, and one host, "gpu1", where .venv is installed.

    -> their folders, and launch(text of hosts.txt, flags).
    """
    here, bin, hosts = tmp_path / "here", tmp_path / "bin", tmp_path / "hosts"
    folder = tmp_path / "folder"
    links(bin, HERE)
    links(hosts / "gpu1", HOST)
    program(bin / "ssh", SSH)
    torchrun(folder / ".venv" / "bin" / "torchrun", FINISHES)
    (folder / ".venv" / "installed").touch()

    copy_launchers(here)
    (here / "ddm").mkdir()
    (here / ".gitignore").write_text("/runs/\n")
    for name in ("Makefile", "requirements.txt", "ddm/run.py"):
        (here / name).write_text(name)
    track(here)
    (here / "runs" / "mine" / "shards" / "1").mkdir(parents=True)
    for name in ("config.toml", "clusters.safetensors", "shards/1/00000.tar"):
        (here / "runs" / "mine" / name).write_text(name)

    words = [here / "launch" / "ssh.sh", "runs/mine", tmp_path / "hosts.txt"]
    settings = {"MACHINES": str(hosts), "SSH": "ssh", "EVERY": "0.05", "TRIES": "4"}
    variables = environment(bin, **settings)

    def launch(text, *flags, start=run):
        content = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "hosts.txt").write_bytes(content)
        return start([*words, *flags], env=variables)

    return SimpleNamespace(
        here=here,
        run=here / "runs" / "mine",
        bin=bin,
        hosts=hosts,
        gpu1=hosts / "gpu1",
        folder=folder,
        launch=launch,
        line=f"gpu1 1 {folder}\n",
        torchrun=folder / ".venv" / "bin" / "torchrun",
        weights=here / "runs" / "mine" / "experts" / "1.safetensors",
    )


@pytest.mark.parametrize("lost", ["ssh", "tar", "git"])
def test_a_program_that_is_missing_here_is_named(site, lost):
    (site.bin / lost).unlink()
    assert f"this machine lacks {lost}" in one_error(site.launch(site.line))
    assert not (site.folder / "runs").exists()


@pytest.mark.parametrize("lost", ["bash", "tar", "flock"])
def test_a_program_that_is_missing_on_a_host_is_named(site, lost):
    links(site.hosts / "gpu2", ["sh"])
    (site.gpu1 / lost).unlink()
    line = one_error(site.launch(f"{site.line}gpu2 1\n"))
    assert f"gpu1 lacks {lost};" in line
    assert "gpu2 lacks bash tar flock make python3.11" in line
    assert not (site.folder / "runs").exists()


def test_make_and_python_are_needed_only_where_nothing_is_installed(site):
    (site.gpu1 / "make").unlink()
    assert site.launch(site.line).returncode == 0
    (site.folder / ".venv" / "installed").unlink()
    assert "gpu1 lacks make python3.11" in one_error(site.launch(site.line))

    # a Python that is too old, and then another one
    links(site.hosts / "gpu2", HOST)
    program(site.hosts / "gpu2" / "python3", "#!/bin/sh\nexit 1\n")
    assert "gpu2 lacks python3.11" in one_error(site.launch(f"gpu2 1 {site.folder}"))
    (site.hosts / "gpu2" / "python3.12").symlink_to(sys.executable)
    assert "lacks" not in site.launch(f"gpu2 1 {site.folder}").stderr


@pytest.mark.parametrize(
    "text, encoding",
    [
        ("\ufeff# all\r\ngpu1 1 FOLDER\r\n", "utf-8"),
        ("\ufeffgpu1\t1 FOLDER\r\n", "utf-16-le"),
        ("\ufeffgpu1\t1 FOLDER\n", "utf-16-be"),
        ("  # all\n\n gpu1   1   FOLDER", "utf-8"),
    ],
)
def test_hosts_txt_of_any_editor_is_read(site, text, encoding):
    done = site.launch(text.replace("FOLDER", str(site.folder)).encode(encoding))
    assert done.returncode == 0, done.stdout + done.stderr
    assert site.weights.read_text() == "weights\n"


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "names no host"),
        ("gpu1 2", "should be HOST WHAT [FOLDER], WHAT one of: 1"),
        ("gpu1", "should be HOST WHAT"),
        ("gpu1 1 a;b", "a;b must be a plain path"),
    ],
)
def test_a_mistake_in_hosts_txt_is_one_line(site, text, said):
    assert said in one_error(site.launch(text))


def test_a_run_without_clusters_is_one_line(site):
    (site.run / "clusters.safetensors").unlink()
    assert "make it with cluster.py" in one_error(site.launch(site.line))


# ---- launch/ssh.sh: what is sent and brought back ------------------------------------------------


def test_what_git_tracks_is_sent_and_results_come_back(site):
    (site.here / "mine.py").touch()
    (site.here / "requirements.txt").unlink()
    done = site.launch(site.line, "--train.lr", "2e-4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 trainings are finished" in done.stdout

    # as it is in the work tree; what git does not know is named
    assert (site.folder / "ddm" / "run.py").exists()
    assert not (site.folder / "requirements.txt").exists()
    assert not (site.folder / "mine.py").exists()
    assert "warning: not sent, since git does not track it: mine.py" in done.stdout

    words = (site.folder / "arguments").read_text()
    assert words.endswith("train_expert.py --shard 1 --run-dir runs/mine --train.lr 2e-4\n")
    assert site.weights.read_text() == "weights\n"
    for name in ("logs/expert-1.csv", "logs/expert-1.log", "samples/expert-1-6.png"):
        assert (site.run / name).exists(), name
    assert not list(site.run.glob(".launch-*"))


def test_no_copy_of_results_makes_a_folder_that_another_may(site):
    (site.bin / "cp").unlink()
    before = "for folder in logs samples; do [ -d runs/mine/$folder ] || exit 1; done"
    program(site.bin / "cp", f'#!/bin/sh\n{before}\nexec {shutil.which("cp")} "$@"\n')
    assert site.launch(site.line).returncode == 0


def test_a_folder_that_is_no_repository_is_named(site):
    shutil.rmtree(site.here / ".git")
    done = site.launch(site.line)
    assert done.returncode == 2 and "error: git tracks nothing in" in done.stderr


def test_data_that_a_host_has_is_not_sent_again(site):
    assert site.launch(site.line).returncode == 0
    sent = site.folder / "runs" / "mine" / "shards" / "1" / "00000.tar"
    before = sent.stat().st_ino
    assert site.launch(site.line).returncode == 0
    assert sent.stat().st_ino == before

    # one that a broken link has cut short, one that has changed here, and one that is new
    (site.run / "shards" / "1" / "00001.tar").write_text("new")
    sent.write_text("sha")
    (site.run / "config.toml").write_text("CONFIG.TOML")
    os.utime(site.run / "config.toml", (1e9, 1e9))
    assert site.launch(site.line).returncode == 0
    assert sent.read_text() == "shards/1/00000.tar"
    assert (sent.parent / "00001.tar").read_text() == "new"
    assert (site.folder / "runs" / "mine" / "config.toml").read_text() == "CONFIG.TOML"


@pytest.mark.parametrize(
    "what, needed",
    [
        ("1", {"shards/1/a", "latents/1/a", SEED}),
        ("seed", {"shards/router/a", "latents/router/a"}),
        ("router", {"shards/router/a", "latents/router/a"}),
        ("all", {"shards/0/a", "shards/1/a", "latents/1/a", SEED}),
        ("student", {"shards/0/a", "shards/1/a", "latents/1/a", "experts/0.safetensors", SEED}),
    ],
)
def test_a_host_gets_its_part_of_the_run_alone(site, what, needed):
    folder = site.run.parent / "parts"
    always = {"config.toml", "clusters.safetensors"}
    data = {"shards/0/a", "shards/1/a", "shards/router/a", "latents/1/a", "latents/router/a"}
    for name in always | data | {"logs/a", "experts/0.safetensors", SEED}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()

    done = run(["launch/host.sh", "list", "runs/parts", what], cwd=site.here)
    listed = {line.split(" ", 2)[2] for line in done.stdout.splitlines()}
    assert listed == {f"runs/parts/{name}" for name in always | needed}


# ---- launch/ssh.sh: what fails later, and what goes on -------------------------------------------


def test_a_host_that_is_not_reached_is_tried_again(site):
    fails = """shift
echo >> $MACHINES/calls
[ $(grep -c '' $MACHINES/calls) -gt 3 ] || { echo 'No route to host' >&2; exit 255; }
"""
    program(site.bin / "ssh", SSH.replace("shift\n", fails))
    done = site.launch(site.line)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not reached, trying again (No route to host" in done.stdout
    assert "1 of 1 trainings are finished" in done.stdout


def test_a_connection_that_fails_while_training_is_told_and_waited_for(site):
    torchrun(site.torchrun, WAITS + FINISHES)
    fails = """shift
if [ -e FOLDER/begun ] && [ ! -e FOLDER/go ]; then : > FOLDER/go; exit 255; fi
""".replace("FOLDER", str(site.folder))
    program(site.bin / "ssh", SSH.replace("shift\n", fails))
    done = site.launch(site.line)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no answer; it trains on without us" in done.stdout
    assert "not reached" not in done.stdout


def test_a_copy_that_fails_is_shown_and_ends_that_training_alone(site):
    (site.run / "shards" / "2").mkdir()
    links(site.hosts / "gpu2", set(HOST) - {"tar"})
    full = "#!/bin/sh\ncat > /dev/null\necho 'tar: No space left on device' >&2\nexit 2\n"
    program(site.hosts / "gpu2" / "tar", full)
    done = site.launch(f"{site.line}gpu2 2 {site.folder}\n")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 of 2 trainings are finished" in done.stdout
    said = "expert-2 on gpu2: error: ship failed, exit code 2: tar: No space left on device"
    assert said in done.stdout and "not reached" not in done.stdout


def test_a_folder_that_cannot_be_made_on_the_host_is_shown(site):
    (site.folder / "file").touch()
    (site.gpu1 / "python3").symlink_to(sys.executable)
    done = site.launch(f"gpu1 1 {site.folder}/file/folder")
    assert done.returncode == 1 and "error: ship failed" in done.stdout
    assert "Not a directory" in done.stdout


def test_an_installation_of_packages_that_fails_is_shown(site):
    (site.folder / ".venv" / "installed").unlink()
    (site.gpu1 / "python3").symlink_to(sys.executable)
    (site.here / "Makefile").write_text(".venv/installed:\n\t@echo no space left; false\n")
    done = site.launch(site.line)
    assert done.returncode == 1 and "install.log: no space left" in done.stdout


def test_a_training_that_fails_is_shown_with_its_log_s_error(site):
    torchrun(site.torchrun, 'echo "error: no such key"\nexit 1')
    done = site.launch(site.line)
    assert done.returncode == 1 and "failed: exit code 1" in done.stdout
    assert "expert-1.log: error: no such key" in done.stdout
    assert not site.weights.exists()


def test_a_training_that_stops_is_started_again(site):
    stops = 'echo >> stops; n=$(grep -c "" stops); mark to be continued $n\n'
    torchrun(site.torchrun, stops + "[ $n = 3 ] || exit 1\n" + FINISHES)
    done = site.launch(site.line)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((site.folder / "arguments").read_text().splitlines()) == 3

    # but not for ever: TRIES is 4
    torchrun(site.torchrun, stops + "exit 1\n")
    done = site.launch(site.line)
    assert done.returncode == 1 and "stopped 4 times, see runs/mine/logs" in done.stdout
    assert len((site.folder / "arguments").read_text().splitlines()) == 3 + 4


def test_a_training_outlives_its_launcher_and_is_not_started_twice(site):
    torchrun(site.torchrun, WAITS + FINISHES)
    with site.launch(site.line, start=begin) as first:
        wait_until((site.folder / "begun").exists)
        first.terminate()
        first.communicate(timeout=300)
    assert first.returncode == 130
    assert not list(site.run.glob(".launch-*"))

    with site.launch(site.line, start=begin) as second:
        line = second.stdout.readline()
        (site.folder / "go").touch()
        out = line + second.communicate(timeout=300)[0]
    assert second.returncode == 0 and "expert-1 on gpu1: running: " in line, out
    assert len((site.folder / "arguments").read_text().splitlines()) == 1
    assert not (site.folder / "signals").exists()


def test_a_host_that_went_down_is_one_to_be_continued(site):
    """Its training has left no exit code, and perhaps a marker of a start before."""
    folder = site.folder / "runs" / "mine"
    copy_launchers(site.folder)
    (folder / "checkpoints" / "expert-1").mkdir(parents=True)
    for said in ("to be continued 4", "finished 6"):
        (folder / "checkpoints" / "expert-1" / "status").write_text(f"{said}\n")
        done = run(["launch/host.sh", "look", "runs/mine", "1"], cwd=site.folder)
        assert done.stdout.startswith("to be continued"), done.stdout + done.stderr


# ---- launch/ssh.sh: the seed ---------------------------------------------------------------------


def write_config(site, seed_steps):
    text = f"[train]\nsteps = 6\nseed_steps = {seed_steps}\n[train.router]\nseed_steps = 0\n"
    (site.run / "config.toml").write_text(text)


@pytest.fixture
def islands(site, tmp_path):
    """The site, where expert 1 needs a seed, and hosts of the seed and the router.

    -> text of hosts.txt, the expert first; the folders of the two; the seed's file here.
    """
    write_config(site, seed_steps=4)
    (site.run / "shards" / "router").mkdir()
    torchrun(site.torchrun, BEGINS + FINISHES)

    text = site.line
    for what, name in (("seed", "expert-seed"), ("router", "router")):
        links(site.hosts / what, HOST)
        torchrun(tmp_path / what / TORCHRUN_THERE, FINISHES, name)
        (tmp_path / what / ".venv" / "installed").touch()
        text += f"{what} {what} {tmp_path / what}\n"

    return SimpleNamespace(
        text=text,
        seed=tmp_path / "seed",
        router=tmp_path / "router",
        weights=site.run / SEED,
    )


@pytest.mark.parametrize("what", ["1", "all"])
def test_experts_wait_for_the_seed_and_the_router_does_not(site, islands, what):
    # the seed waits for the router to be finished, and fails if the expert has been sent
    waits = f"""
while [ ! -e {islands.router}/runs/mine/router.safetensors ]; do sleep 0.01; done
[ ! -e {site.folder}/runs ] || exit 1
"""
    torchrun(islands.seed / TORCHRUN_THERE, waits + FINISHES, "expert-seed")
    torchrun(site.torchrun, BEGINS + FINISHES, f"expert-{what}")

    done = site.launch(islands.text.replace("gpu1 1", f"gpu1 {what}"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 trainings are finished" in done.stdout
    assert (site.folder / "ancestor").read_text() == islands.weights.read_text() == "weights\n"
    for name in ("logs/expert-seed.csv", "samples/expert-seed-6.png", "router.safetensors"):
        assert (site.run / name).exists(), name


def test_experts_are_not_started_where_the_seed_fails(site, islands):
    torchrun(islands.seed / TORCHRUN_THERE, "mark failed 2; exit 1", "expert-seed")
    done = site.launch(islands.text)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "expert-1 on gpu1: not started: the seed" in done.stdout
    assert "1 of 3 trainings are finished" in done.stdout
    assert not (site.folder / "runs").exists()
    assert (site.run / "router.safetensors").exists()


def test_a_seed_that_is_here_is_not_trained_again(site, islands):
    islands.weights.parent.mkdir()
    islands.weights.write_text("of before")
    done = site.launch(islands.text)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"not trained, runs/mine/{SEED} is here" in done.stdout
    assert not (islands.seed / "runs").exists()
    assert (site.folder / "ancestor").read_text() == islands.weights.read_text() == "of before"


def test_a_seed_that_still_trains_is_waited_for(site, islands):
    torchrun(islands.seed / TORCHRUN_THERE, WAITS + FINISHES, "expert-seed")
    with site.launch(islands.text, start=begin) as first:
        wait_until((islands.seed / "begun").exists)
        first.terminate()
        first.communicate(timeout=300)
    assert first.returncode == 130 and not islands.weights.exists()

    out = ""
    with site.launch(islands.text, start=begin) as second:
        while "expert-seed on seed: running: " not in out:
            line = second.stdout.readline()
            assert line, out
            out += line
        (islands.seed / "go").touch()
        out += second.communicate(timeout=300)[0]
    assert second.returncode == 0 and "3 of 3 trainings are finished" in out, out
    assert len((islands.seed / "arguments").read_text().splitlines()) == 1
    assert not (islands.seed / "signals").exists()


@pytest.mark.parametrize(
    "seed_steps, flags",
    [(4, []), (0, ["--train.seed_steps", "4"]), (8, ["--train.lr", "1", "--train.seed_steps=4"])],
)
def test_a_seed_that_nobody_trains_is_one_line(site, seed_steps, flags):
    write_config(site, seed_steps)
    line = one_error(site.launch(site.line, *flags))
    assert f"train.seed_steps = 4, and there is no runs/mine/{SEED}" in line
    assert "add a line 'HOST seed'" in line
    assert not (site.folder / "runs").exists()


def test_a_seed_needs_the_router_s_images(site):
    said = "WHAT one of: 1 all student; or seed, which needs shards/router"
    assert said in one_error(site.launch("gpu1 seed"))


@pytest.mark.parametrize("flags", [[], ["--train.seed_steps", "0"]])
def test_without_seed_steps_no_seed_is_asked_for(site, flags):
    write_config(site, 0 if not flags else 4)
    assert site.launch(site.line, *flags).returncode == 0


def test_a_seed_from_elsewhere_needs_no_line(site, islands):
    islands.weights.parent.mkdir()
    islands.weights.write_text("of elsewhere")
    done = site.launch(site.line)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (site.folder / "ancestor").read_text() == "of elsewhere"


def test_the_router_alone_needs_no_seed(site, islands):
    done = site.launch(islands.text.splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr


# ---- for real ------------------------------------------------------------------------------------


def test_a_training_on_a_host_brings_its_weights_and_can_be_run_again(trained, site, tmp_path):
    for name in os.listdir(ROOT):
        if name.endswith((".py", ".txt")) or name == "Makefile":
            shutil.copy(os.path.join(ROOT, name), site.here)
    shutil.copytree(os.path.join(ROOT, "ddm"), site.here / "ddm", dirs_exist_ok=True)
    track(site.here)

    shutil.rmtree(site.run)
    stages = shutil.ignore_patterns("checkpoints", "experts", "logs")
    shutil.copytree(trained, site.run, ignore=stages)
    real = f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    program(site.torchrun, real)
    # the seed on an island of its own
    island = tmp_path / "island"
    shutil.copytree(site.folder, island)
    # without a newline at the end
    text = f"# a comment\n{site.line}gpu1 seed {island}"

    for steps in (6, 9):
        done = site.launch(text, "--train.seed_steps", "2", "--train.steps", str(steps))
        logs = [log.read_text() for log in tmp_path.glob("*/runs/mine/logs/*.log")]
        assert done.returncode == 0, done.stdout + done.stderr + "".join(logs)
        info = artifacts.read_info(site.weights)
        assert info["step"] == steps and info["init_shard"] == "seed"
        assert (site.run / "logs" / "expert-1.csv").exists()
    assert artifacts.read_info(site.run / SEED)["step"] == 2

    there = site.folder / "runs" / "mine" / "experts" / "1.safetensors"
    assert site.weights.read_bytes() == there.read_bytes()


def test_the_scripts_are_valid_shell_and_can_be_executed():
    executable = ("launch/node.sh", "launch/host.sh", "launch/ssh.sh", ".ci/run")
    for name in (*executable, "launch/slurm.sbatch", "demo.sh"):
        assert run(["bash", "-n", os.path.join(ROOT, name)]).returncode == 0, name
    for name in executable:
        assert os.stat(os.path.join(ROOT, name)).st_mode & stat.S_IXUSR, name
