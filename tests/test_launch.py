"""The launchers: what they ask of a machine, what they say, a training on a host, and exit codes.

No network: stand-ins take the places of ssh, torchrun and nvidia-smi.
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

# ssh HOST COMMAND, where HOST is this machine, with the programs of MACHINES/HOST
SSH = """#!/bin/sh
PATH=$MACHINES/$1
shift
exec sh -c "$*"
"""

# torchrun, which notes what it was asked for, and leaves what a finished training does
TORCHRUN = """#!/bin/sh
case $1 in --help) echo "usage: torchrun [--nproc-per-node N] FLAG"; exit;; esac
echo "$@" > arguments
mkdir -p runs/mine/checkpoints/expert-1 runs/mine/experts runs/mine/logs
echo "finished 6" > runs/mine/checkpoints/expert-1/status
echo step > runs/mine/logs/expert-1.csv
echo weights > runs/mine/experts/1.safetensors
"""

# the programs of the launching machine, and of a host
COMMON = (
    "bash",
    "cat",
    "cp",
    "cut",
    "dirname",
    "env",
    "head",
    "ln",
    "ls",
    "mkdir",
    "mv",
    "readlink",
    "realpath",
    "rm",
    "sh",
    "sleep",
    "sort",
    "stat",
    "tail",
    "tar",
    "touch",
    "tr",
)
HERE = (*COMMON, "comm", "git", "mktemp")
HOST = (*COMMON, "make")


def git(folder, *args):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *args], cwd=folder, check=True, capture_output=True)


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def links(folder, programs):
    folder.mkdir(parents=True)
    for name in programs:
        (folder / name).symlink_to(shutil.which(name))


@pytest.fixture
def site(tmp_path):
    """A launching machine with a run, and one host, "gpu1", where .venv is installed.

    -> namespace of folders, and launch(hosts.txt's text, flags).
    """
    here = tmp_path / "here"
    hosts = tmp_path / "hosts"
    folder = tmp_path / "folder"
    links(tmp_path / "bin", HERE)
    links(hosts / "gpu1", HOST)
    program(tmp_path / "bin" / "ssh", SSH)
    torchrun = TORCHRUN.replace("FLAG", "[--shutdown-timeout S]")
    program(folder / ".venv" / "bin" / "torchrun", torchrun)
    (folder / ".venv" / "installed").touch()

    (here / "runs" / "mine" / "shards" / "1").mkdir(parents=True)
    for name in ("config.toml", "clusters.safetensors", "shards/1/00000.tar"):
        (here / "runs" / "mine" / name).write_text(name)
    for name in ("Makefile", "requirements.txt", "train_expert.py", "of_a_fork.txt"):
        (here / name).write_text(name)
    shutil.copytree(os.path.join(ROOT, "launch"), here / "launch")
    (here / ".gitignore").write_text("/runs\n")
    git(here, "init", "-q")
    git(here, "add", "-A")
    (here / "untracked.py").touch()

    def launch(text, *flags):
        payload = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "hosts.txt").write_bytes(payload)
        environment = ENVIRONMENT | {
            "PATH": str(tmp_path / "bin"),
            "MACHINES": str(hosts),
            "SSH": "ssh",
            "EVERY": "0.05",
            "TRIES": "4",
        }
        command = [str(here / "launch" / "ssh.sh"), "runs/mine", str(tmp_path / "hosts.txt")]
        return subprocess.run(
            [*command, *flags], env=environment, capture_output=True, text=True, timeout=300
        )

    return SimpleNamespace(
        run=here / "runs" / "mine",
        here=here,
        bin=tmp_path / "bin",
        hosts=hosts,
        folder=folder,
        launch=launch,
        line=f"gpu1 1 {folder}\n",
        arguments=folder / "arguments",
    )


def one_error(done):
    """The only line of a mistake that was found before anything began."""
    assert done.returncode == 2 and not done.stdout, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


# ---- what is asked for before anything begins ----------------------------------------------------


@pytest.mark.parametrize("lost", ["tar", "git", "ssh"])
def test_a_program_that_is_missing_here_is_named(site, lost):
    (site.bin / lost).unlink()
    assert f"this machine lacks {lost}" in one_error(site.launch(site.line))
    assert not (site.folder / "runs").exists()


@pytest.mark.parametrize("lost", ["bash", "tar"])
def test_a_program_that_is_missing_on_a_host_is_named(site, lost):
    links(site.hosts / "gpu2", ["sh"])
    (site.hosts / "gpu1" / lost).unlink()
    line = one_error(site.launch(f"{site.line}gpu2 1\n"))
    assert f"gpu1 lacks {lost};" in line
    assert "gpu2 lacks bash tar make python3.11" in line
    assert not (site.folder / "runs").exists()


def test_make_and_python_are_needed_only_where_nothing_is_installed(site):
    (site.hosts / "gpu1" / "make").unlink()
    assert site.launch(site.line).returncode == 0
    (site.folder / ".venv" / "installed").unlink()
    assert "gpu1 lacks make python3.11" in one_error(site.launch(site.line))
    links(site.hosts / "gpu2", HOST)
    program(site.hosts / "gpu2" / "python3", "#!/bin/sh\nexit 1\n")  # too old
    assert "gpu2 lacks python3.11" in one_error(site.launch(f"gpu2 1 {site.folder}"))
    (site.hosts / "gpu2" / "python3.12").symlink_to(sys.executable)
    assert "lacks" not in site.launch(f"gpu2 1 {site.folder}").stdout


def test_a_packages_installation_that_fails_is_shown(site):
    (site.folder / ".venv" / "installed").unlink()
    (site.hosts / "gpu1" / "python3").symlink_to(sys.executable)
    (site.here / "Makefile").write_text(".venv/installed:\n\t@echo no space left; false\n")
    done = site.launch(site.line)
    assert done.returncode == 1 and "install.log: no space left" in done.stdout


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf# all\r\ngpu1 1 FOLDER\r\n",
        "gpu1\t1 FOLDER\r\n".encode("utf-16"),
        b"  # all\n\n gpu1   1   FOLDER",
    ],
)
def test_hosts_txt_of_any_editor_is_read(site, text):
    encoding = "utf-16-le" if text.startswith(b"\xff\xfe") else "utf-8"
    done = site.launch(text.replace("FOLDER".encode(encoding), str(site.folder).encode(encoding)))
    assert (
        done.returncode == 0 and (site.run / "experts" / "1.safetensors").read_text() == "weights\n"
    ), done.stdout + done.stderr


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "names no host"),
        ("gpu1 2", "should be HOST WHAT [FOLDER], WHAT one of: 1"),
        ("gpu1", "should be HOST WHAT"),
    ],
)
def test_a_mistake_in_hosts_txt_is_one_line(site, text, words):
    assert words in one_error(site.launch(text))


# ---- what fails later ----------------------------------------------------------------------------


def test_a_host_that_is_not_reached_is_tried_again(site):
    (site.hosts / "gpu1" / "grep").symlink_to(shutil.which("grep"))
    program(
        site.bin / "ssh",
        SSH.replace(
            "shift\n",
            "shift\necho >> $MACHINES/calls\n"
            "[ $(grep -c '' $MACHINES/calls) -gt 3 ] || { echo 'No route to host' >&2; exit 255; }\n",
        ),
    )
    done = site.launch(site.line)
    assert (
        done.returncode == 0
        and "not reached, trying again (No route to host" in done.stdout
        and "1 of 1 trainings are finished" in done.stdout
    )


def test_a_connection_that_fails_while_training_is_told_and_waited_for(site):
    program(
        site.folder / ".venv" / "bin" / "torchrun",
        TORCHRUN.replace(
            'echo "$@" >', 'touch begun; while [ ! -e go ]; do sleep 0.1; done; echo "$@" >'
        ).replace("FLAG", ""),
    )
    program(
        site.bin / "ssh",
        SSH.replace(
            "shift\n",
            f"shift\nif [ -e {site.folder}/begun ] && [ ! -e {site.folder}/go ]; then : > {site.folder}/go; exit 255; fi\n",
        ),
    )
    done = site.launch(site.line)
    assert (
        done.returncode == 0
        and "no answer; it trains on without us" in done.stdout
        and "not reached" not in done.stdout
    ), done.stdout


def test_a_copy_that_fails_is_shown_and_ends_that_training_alone(site, tmp_path):
    (site.run / "shards" / "2").mkdir()
    (site.run / "shards" / "2" / "00000.tar").write_text("2")
    full = tmp_path / "full"
    links(site.hosts / "gpu2", HOST)
    (site.hosts / "gpu2" / "tar").unlink()
    program(
        site.hosts / "gpu2" / "tar", "#!/bin/sh\necho 'tar: No space left on device' >&2; exit 2\n"
    )
    (full / ".venv").mkdir(parents=True)
    (full / ".venv" / "installed").touch()
    done = site.launch(f"{site.line}gpu2 2 {full}\n")
    assert done.returncode == 1 and "1 of 2 trainings are finished" in done.stdout, done.stdout
    assert "expert-2 on gpu2: error: ship failed, exit code" in done.stdout
    assert "No space left on device" in done.stdout and "not reached" not in done.stdout


def test_what_git_tracks_is_sent_and_what_it_does_not_is_named(site):
    done = site.launch(site.line)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("Makefile", "of_a_fork.txt", "launch/node.sh", "runs/mine/shards/1/00000.tar"):
        assert (site.folder / name).exists()
    assert not (site.folder / "untracked.py").exists()
    assert "not sent, since git does not track it: untracked.py" in done.stdout + done.stderr


def test_a_folder_that_cannot_be_made_on_the_host_is_shown(site):
    (site.folder / "file").touch()
    (site.hosts / "gpu1" / "python3").symlink_to(sys.executable)
    done = site.launch(f"gpu1 1 {site.folder}/file/folder")
    assert (
        done.returncode == 1
        and "error: ship failed" in done.stdout
        and "Not a directory" in done.stdout
    )


def test_a_training_that_fails_is_shown_with_its_log_s_error(site):
    program(
        site.folder / ".venv" / "bin" / "torchrun", '#!/bin/sh\necho "error: no such key"\nexit 1\n'
    )
    done = site.launch(site.line)
    assert (
        done.returncode == 1
        and "failed: exit code 1" in done.stdout
        and "expert-1.log: error: no such key" in done.stdout
    )


# ---- what torchrun is asked for ------------------------------------------------------------------


@pytest.mark.parametrize("knows", [True, False])
def test_torchrun_is_asked_to_wait_only_where_it_can_be(site, knows):
    program(
        site.folder / ".venv" / "bin" / "torchrun",
        TORCHRUN.replace("FLAG", "[--shutdown-timeout S]" * knows),
    )
    assert site.launch(site.line, "--train.lr", "2e-4").returncode == 0
    words = site.arguments.read_text()
    assert (
        "--shutdown-timeout 600" in words
    ) == knows and "train_expert.py --shard 1 --run-dir runs/mine --train.lr 2e-4" in words


@pytest.mark.parametrize(
    "listed, code, expected",
    [
        ("GPU 0: NVIDIA H100\n  MIG 1g.10gb\nGPU 1: NVIDIA H100", 0, "--nproc_per_node=2"),
        ("NVIDIA-SMI has failed", 9, "--nproc_per_node=1"),
    ],
)
def test_where_there_are_gpus_they_must_be_used(site, listed, code, expected):
    program(site.hosts / "gpu1" / "nvidia-smi", f"#!/bin/sh\necho '{listed}'\nexit {code}\n")
    assert site.launch(site.line).returncode == 0
    words = site.arguments.read_text()
    assert expected in words and ("--device cuda" in words) == (code == 0)


BATCH = ["bash", "launch/slurm.sbatch"]


def of_slurm(site):
    """The environment in which the batch script trains expert 1, after making what it needs."""
    (site.here / "runs/mine/shards/0").mkdir()
    return ENVIRONMENT | {
        "PATH": str(site.bin),
        "RUN": "runs/mine",
        "SLURM_SUBMIT_DIR": str(site.here),
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_GPUS_ON_NODE": "0",
    }


@pytest.mark.parametrize("knows, gpus", [(True, 2), (False, 0)])
def test_the_batch_script_asks_torchrun_for_the_same(site, knows, gpus):
    program(site.bin / "torchrun", TORCHRUN.replace("FLAG", "[--shutdown-timeout S]" * knows))
    environment = of_slurm(site) | {"SLURM_GPUS_ON_NODE": str(gpus)}

    def run():
        return subprocess.run(
            [*BATCH, "--train.lr", "2e-4"],
            cwd=site.here,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = run()
    assert done.returncode == 0 and "expert-1: exit code 0, finished 6" in done.stdout, (
        done.stdout + done.stderr
    )
    words = (site.here / "arguments").read_text()
    assert (
        ("--shutdown-timeout 600" in words) == knows
        and ("--device cuda" in words) == (gpus > 0)
        and f"--nproc_per_node={max(gpus, 1)} " in words
    )
    (site.bin / "torchrun").unlink()
    done = run()
    assert done.returncode == 2 and "error: there is no torchrun" in done.stderr


@pytest.mark.parametrize("knows, whom", [(True, "torchrun"), (False, "rank")])
def test_a_stop_reaches_the_ranks_also_where_torchrun_would_not_wait(site, knows, whom):
    environment = of_slurm(site)
    program(
        site.bin / "torchrun",
        f"""#!/bin/sh
case $1 in --help) echo {"--shutdown-timeout" * knows}; exit;; esac
trap 'echo torchrun > stopped; kill -KILL $!' TERM
sh -c 'trap "echo rank > stopped; exit" TERM; touch begun; while :; do sleep 0.05; done' &
wait
""",
    )
    with subprocess.Popen(
        BATCH,
        cwd=site.here,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        wait_until((site.here / "begun").exists)
        process.send_signal(signal.SIGUSR1)
        out = process.communicate(timeout=300)[0]
    assert (site.here / "stopped").read_text() == f"{whom}\n" and "expert-1: exit code" in out


# ---- for real ------------------------------------------------------------------------------------


def test_launch_trains_on_a_host_fetches_the_weights_and_can_be_run_again(trained, site):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.split():
        if os.path.isfile(os.path.join(ROOT, name)) and not name.startswith(("bench", "assets")):
            os.makedirs(os.path.dirname(site.here / name), exist_ok=True)
            shutil.copy(os.path.join(ROOT, name), site.here / name)
    git(site.here, "add", "-A")
    shutil.rmtree(site.run)
    shutil.copytree(
        trained, site.run, ignore=shutil.ignore_patterns("checkpoints", "experts", "logs")
    )
    program(
        site.folder / ".venv" / "bin" / "torchrun",
        f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n',
    )
    for flags, steps in (((), 6), (("--train.steps", "9"), 9)):
        done = site.launch(f"# a comment\n{site.line.strip()}", *flags)  # and no newline at the end
        assert done.returncode == 0 and "1 of 1 trainings are finished" in done.stdout, (
            done.stdout + done.stderr
        )
        assert (
            artifacts.read_info(site.run / "experts" / "1.safetensors")["step"] == steps
            and (site.run / "logs" / "expert-1.csv").exists()
        )
    assert (site.run / "experts" / "1.safetensors").read_bytes() == (
        site.folder / "runs" / "mine" / "experts" / "1.safetensors"
    ).read_bytes()


# ---- node.sh -------------------------------------------------------------------------------------


def node(site, *args, **more):
    command = ["bash", "launch/node.sh", *args]
    environment = ENVIRONMENT | {"PATH": str(site.bin)} | more
    return subprocess.run(
        command, cwd=site.here, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    "status, torchrun, code",
    [
        ("finished 6", 0, 0),
        ("to be continued 4", 1, 75),
        ("failed 4", 1, 1),
        ("", 1, 1),
    ],
)
def test_the_exit_code_says_how_the_training_stands(site, status, torchrun, code):
    program(
        site.bin / "torchrun",
        f"""#!/bin/sh
case $1 in --help) exit;; esac
mkdir -p runs/mine/checkpoints/router
[ -z "{status}" ] || echo "{status}" > runs/mine/checkpoints/router/status
exit {torchrun}
""",
    )
    done = node(site, "router", "--run-dir", "runs/mine")
    assert done.returncode == code, done.stdout + done.stderr


def test_a_death_that_got_no_further_is_a_failure(site):
    """Else a command that fails at once would be started again and again."""
    (site.run / "checkpoints" / "expert-1").mkdir(parents=True)
    (site.run / "checkpoints" / "expert-1" / "status").write_text("to be continued 4\n")
    program(site.bin / "torchrun", "#!/bin/sh\n[ $1 = --help ] || exit 1\n")
    assert node(site, "1", "--run-dir=runs/mine").returncode == 1


@pytest.mark.parametrize(
    "what, words",
    [
        ("1", "train_expert.py --shard 1 --run-dir runs/mine --train.lr 1"),
        ("all", "train_expert.py --shard all --run-dir runs/mine --train.lr 1"),
        ("router", "train_router.py --run-dir runs/mine --train.lr 1"),
        ("student", "distill.py --run-dir runs/mine --train.lr 1"),
    ],
)
def test_what_is_trained_and_the_flags_go_to_the_script(site, what, words):
    program(site.bin / "torchrun", TORCHRUN.replace("FLAG", ""))
    node(site, what, "--train.lr", "1", RUN="runs/mine")
    assert words in (site.here / "arguments").read_text()


@pytest.mark.parametrize("what", ["", "rooter", "--shard"])
def test_a_mistake_in_what_is_one_line(site, what):
    done = node(site, what)
    assert done.returncode == 2 and "give an expert's number, all, router or student" in done.stderr


# ---- all of them ---------------------------------------------------------------------------------


def test_the_launchers_are_valid_shell_and_can_be_executed():
    launchers = ["launch/node.sh", "launch/host.sh", "launch/ssh.sh"]
    for name in (*launchers, "launch/slurm.sbatch", "demo.sh", ".ci/run"):
        assert subprocess.run(["bash", "-n", os.path.join(ROOT, name)]).returncode == 0
    for name in (*launchers, ".ci/run"):
        assert os.stat(os.path.join(ROOT, name)).st_mode & stat.S_IXUSR
