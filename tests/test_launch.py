"""The launchers: what they ask of a machine, what they say, and a training on a host. No network, no rsync: stand-ins take their places."""
import os
import shutil
import signal
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ENVIRONMENT, ROOT, wait_until

import model as models

# rsync -a[R] [--ignore-missing-args] SOURCE... TARGET, where HOST: is this machine
RSYNC = f"""#!{sys.executable}
import os, shutil, sys
flags = [a for a in sys.argv[1:] if a.startswith("-")]
*sources, target = [a.rpartition(":")[2] for a in sys.argv[1:] if not a.startswith("-")]
for source in sources:
    name = os.path.basename(source)
    if "-aR" in flags:
        name = source.partition("/./")[2] or source
    to = os.path.join(target, name)
    if os.path.isdir(source):
        shutil.copytree(source, to, dirs_exist_ok=True)
    elif os.path.exists(source):
        os.makedirs(os.path.dirname(to), exist_ok=True)
        shutil.copy2(source, to)
    elif "--ignore-missing-args" not in flags:
        sys.exit(23)
"""
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
HERE = ("bash", "cat", "cut", "date", "dirname", "env", "grep", "head", "iconv", "ls", "mktemp", "od", "realpath", "rm", "sed", "sh", "sleep", "tail", "tr")
HOST = ("bash", "cat", "cut", "flock", "grep", "make", "mkdir", "nohup", "rm", "setsid", "sh", "tail", "true")


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
    """A launching machine with a run, and one host, "gpu1", where .venv is installed. -> namespace of folders, and launch(hosts.txt's text, flags)."""
    here, hosts, folder = tmp_path / "here", tmp_path / "hosts", tmp_path / "folder"
    links(tmp_path / "bin", HERE)
    links(hosts / "gpu1", HOST)
    for place in (tmp_path / "bin", hosts / "gpu1"):
        program(place / "rsync", RSYNC)
    program(tmp_path / "bin" / "ssh", SSH)
    program(folder / ".venv" / "bin" / "torchrun", TORCHRUN.replace("FLAG", "[--shutdown-timeout S]"))
    (folder / ".venv" / "installed").touch()
    (here / "runs" / "mine" / "shards" / "1").mkdir(parents=True)
    for name in ("runs/mine/config.toml", "runs/mine/clusters.safetensors", "runs/mine/shards/1/00000.tar", "Makefile", "requirements.txt", "common.py"):
        (here / name).write_text(name)
    shutil.copy(os.path.join(ROOT, "launch.sh"), here)

    def launch(text, *flags):
        (tmp_path / "hosts.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        environment = ENVIRONMENT | {"PATH": str(tmp_path / "bin"), "MACHINES": str(hosts), "SSH": "ssh", "EVERY": "0.05", "TRIES": "4"}
        return subprocess.run([str(here / "launch.sh"), "runs/mine", str(tmp_path / "hosts.txt"), *flags], env=environment, capture_output=True, text=True, timeout=300)

    return SimpleNamespace(run=here / "runs" / "mine", here=here, bin=tmp_path / "bin", hosts=hosts, folder=folder, launch=launch,
                           line=f"gpu1 1 {folder}\n", arguments=folder / "arguments")


def one_error(done):
    """The only line of a mistake that was found before anything began."""
    assert done.returncode == 2 and not done.stdout, done.stdout + done.stderr
    line, = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


# ---- what is asked for before anything begins ---------------------------------------------------------------------

@pytest.mark.parametrize("lost", ["rsync", "ssh"])
def test_a_program_that_is_missing_here_is_named(site, lost):
    (site.bin / lost).unlink()
    assert f"this machine lacks {lost}" in one_error(site.launch(site.line))
    assert not (site.folder / "runs").exists()


@pytest.mark.parametrize("lost", ["bash", "rsync", "flock"])
def test_a_program_that_is_missing_on_a_host_is_named(site, lost):
    links(site.hosts / "gpu2", ["sh"])
    (site.hosts / "gpu1" / lost).unlink()
    line = one_error(site.launch(f"{site.line}gpu2 1\n"))
    assert f"gpu1 lacks {lost};" in line and "gpu2 lacks bash rsync flock setsid make python3.11" in line
    assert not (site.folder / "runs").exists()


def test_make_and_python_are_needed_only_where_nothing_is_installed(site):
    (site.hosts / "gpu1" / "make").unlink()
    assert site.launch(site.line).returncode == 0
    (site.folder / ".venv" / "installed").unlink()
    assert "gpu1 lacks make python3.11" in one_error(site.launch(site.line))
    links(site.hosts / "gpu2", HOST)
    program(site.hosts / "gpu2" / "rsync", RSYNC)
    program(site.hosts / "gpu2" / "python3", "#!/bin/sh\nexit 1\n")        # too old
    assert "gpu2 lacks python3.11" in one_error(site.launch(f"gpu2 1 {site.folder}"))
    (site.hosts / "gpu2" / "python3.12").symlink_to(sys.executable)
    assert "lacks" not in site.launch(f"gpu2 1 {site.folder}").stdout


def test_a_packages_installation_that_fails_is_shown(site):
    (site.folder / ".venv" / "installed").unlink()
    (site.hosts / "gpu1" / "python3").symlink_to(sys.executable)
    (site.here / "Makefile").write_text(".venv/installed:\n\t@echo no space left; false\n")
    done = site.launch(site.line)
    assert done.returncode == 1 and "install.log: no space left" in done.stdout


@pytest.mark.parametrize("text", [b"\xef\xbb\xbf# all\r\ngpu1 1 FOLDER\r\n", "gpu1\t1 FOLDER\r\n".encode("utf-16"), b"  # all\n\n gpu1   1   FOLDER"])
def test_hosts_txt_of_any_editor_is_read(site, text):
    encoding = "utf-16-le" if text.startswith(b"\xff\xfe") else "utf-8"
    done = site.launch(text.replace("FOLDER".encode(encoding), str(site.folder).encode(encoding)))
    assert done.returncode == 0 and (site.run / "experts" / "1.safetensors").read_text() == "weights\n", done.stdout + done.stderr


@pytest.mark.parametrize("text, words", [("", "names no host"), ("gpu1 2", "should be HOST WHAT [FOLDER], WHAT one of: 1"), ("gpu1", "should be HOST WHAT")])
def test_a_mistake_in_hosts_txt_is_one_line(site, text, words):
    assert words in one_error(site.launch(text))


# ---- what fails later ---------------------------------------------------------------------------------------------

def test_a_host_that_is_not_reached_is_tried_again(site):
    program(site.bin / "ssh", SSH.replace("shift\n", "shift\necho >> $MACHINES/calls\n"
                                          "[ $(grep -c '' $MACHINES/calls) -gt 3 ] || { echo 'No route to host' >&2; exit 255; }\n"))
    done = site.launch(site.line)
    assert done.returncode == 0 and "not reached, trying again (No route to host" in done.stdout and "1 of 1 trainings are finished" in done.stdout


def test_a_connection_that_fails_while_training_is_told_and_waited_for(site):
    program(site.folder / ".venv" / "bin" / "torchrun", TORCHRUN.replace('echo "$@" >', 'touch begun; while [ ! -e go ]; do sleep 0.1; done; echo "$@" >')
            .replace("FLAG", ""))
    (site.hosts / "gpu1" / "sleep").symlink_to(shutil.which("sleep"))
    (site.hosts / "gpu1" / "touch").symlink_to(shutil.which("touch"))
    program(site.bin / "ssh", SSH.replace("shift\n", f"shift\nif [ -e {site.folder}/begun ] && [ ! -e {site.folder}/go ]; then : > {site.folder}/go; exit 255; fi\n"))
    done = site.launch(site.line)
    assert done.returncode == 0 and "no answer; it trains on without us" in done.stdout and "not reached" not in done.stdout, done.stdout


@pytest.mark.parametrize("code", [11, 12, 23])
def test_a_copy_that_fails_is_shown_and_ends_that_training_alone(site, code):
    """12 is also a broken link's, so it is tried again, but not for ever."""
    (site.run / "shards" / "2").mkdir()
    program(site.bin / "rsync", f"#!/bin/sh\ncase \"$*\" in *shards/2*) echo 'rsync: write failed: No space left on device (28)' >&2; exit {code};; esac\n"
                                + f"exec {site.hosts}/gpu1/rsync \"$@\"\n")
    done = site.launch(f"{site.line}gpu1 2 {site.folder}\n")
    assert done.returncode == 1 and "1 of 2 trainings are finished" in done.stdout, done.stdout
    assert f"expert-2 on gpu1: error: ship failed, exit code {code}: " in done.stdout and "No space left on device (28)" in done.stdout
    assert "not reached" not in done.stdout and ("broke off, trying again" in done.stdout) == (code == 12)


def test_a_folder_that_cannot_be_made_on_the_host_is_shown(site):
    (site.folder / "file").touch()
    (site.hosts / "gpu1" / "python3").symlink_to(sys.executable)
    done = site.launch(f"gpu1 1 {site.folder}/file/folder")
    assert done.returncode == 1 and "error: ship failed" in done.stdout and "Not a directory" in done.stdout


def test_a_training_that_fails_is_shown_with_its_log_s_error(site):
    program(site.folder / ".venv" / "bin" / "torchrun", '#!/bin/sh\necho "error: no such key"\nexit 1\n')
    done = site.launch(site.line)
    assert done.returncode == 1 and "failed: exit code 1" in done.stdout and "expert-1.log: error: no such key" in done.stdout


# ---- what torchrun is asked for -----------------------------------------------------------------------------------

@pytest.mark.parametrize("knows", [True, False])
def test_torchrun_is_asked_to_wait_only_where_it_can_be(site, knows):
    program(site.folder / ".venv" / "bin" / "torchrun", TORCHRUN.replace("FLAG", "[--shutdown-timeout S]" * knows))
    assert site.launch(site.line, "--train.lr", "2e-4").returncode == 0
    words = site.arguments.read_text()
    assert ("--shutdown-timeout 600" in words) == knows and "train_expert.py --shard 1 --run runs/mine --train.lr 2e-4" in words
    assert ("kills a training 30 s after SIGTERM" in (site.folder / "runs/mine/logs/expert-1.log").read_text()) == (not knows)


@pytest.mark.parametrize("listed, code, expected", [("GPU 0: NVIDIA H100\n  MIG 1g.10gb\nGPU 1: NVIDIA H100", 0, "--nproc_per_node=2"),
                                                    ("NVIDIA-SMI has failed", 9, "--nproc_per_node=1")])
def test_where_there_are_gpus_they_must_be_used(site, listed, code, expected):
    program(site.hosts / "gpu1" / "nvidia-smi", f"#!/bin/sh\necho '{listed}'\nexit {code}\n")
    assert site.launch(site.line).returncode == 0
    words = site.arguments.read_text()
    assert expected in words and ("--device cuda" in words) == (code == 0)


BATCH = ["bash", os.path.join(ROOT, "slurm", "ddm.sbatch")]


def of_slurm(site):
    """The environment in which the batch script trains expert 1, after making what it needs."""
    for name in ("mkdir", "wc", "touch"):
        (site.bin / name).symlink_to(shutil.which(name))
    (site.here / "runs/mine/shards/0").mkdir()
    return ENVIRONMENT | {"PATH": str(site.bin), "RUN": "runs/mine", "SLURM_SUBMIT_DIR": str(site.here), "SLURM_ARRAY_TASK_ID": "1", "SLURM_GPUS_ON_NODE": "0"}


@pytest.mark.parametrize("knows, gpus", [(True, 2), (False, 0)])
def test_the_batch_script_asks_torchrun_for_the_same(site, knows, gpus):
    program(site.bin / "torchrun", TORCHRUN.replace("FLAG", "[--shutdown-timeout S]" * knows))
    environment = of_slurm(site) | {"SLURM_GPUS_ON_NODE": str(gpus)}
    run = lambda: subprocess.run([*BATCH, "--train.lr", "2e-4"], env=environment, capture_output=True, text=True, timeout=300)
    done = run()
    assert done.returncode == 0 and "expert-1: exit code 0, finished 6" in done.stdout, done.stdout + done.stderr
    words = (site.here / "arguments").read_text()
    assert ("--shutdown-timeout 600" in words) == knows and ("--device cuda" in words) == (gpus > 0) and f"--nproc_per_node={max(gpus, 1)} " in words
    (site.bin / "torchrun").unlink()
    done = run()
    assert done.returncode == 2 and "error: there is no torchrun" in done.stdout


@pytest.mark.parametrize("knows, whom", [(True, "torchrun"), (False, "rank")])
def test_a_stop_reaches_the_ranks_also_where_torchrun_would_not_wait(site, knows, whom):
    environment = of_slurm(site)
    program(site.bin / "torchrun", f"""#!/bin/sh
case $1 in --help) echo {"--shutdown-timeout" * knows}; exit;; esac
trap 'echo torchrun > stopped; kill -KILL $!' TERM
sh -c 'trap "echo rank > stopped; exit" TERM; touch begun; while :; do sleep 0.05; done' &
wait
""")
    with subprocess.Popen(BATCH, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        wait_until((site.here / "begun").exists)
        process.send_signal(signal.SIGUSR1)
        out = process.communicate(timeout=300)[0]
    assert (site.here / "stopped").read_text() == f"{whom}\n" and "expert-1: exit code" in out


# ---- for real -----------------------------------------------------------------------------------------------------

def test_launch_trains_on_a_host_fetches_the_weights_and_can_be_run_again(trained, site):
    for name in [name for name in os.listdir(ROOT) if name.endswith((".py", ".txt")) or name == "Makefile"]:
        shutil.copy(os.path.join(ROOT, name), site.here)
    shutil.rmtree(site.run)
    shutil.copytree(trained, site.run, ignore=shutil.ignore_patterns("checkpoints", "experts", "logs"))
    program(site.folder / ".venv" / "bin" / "torchrun", f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    for flags, steps in (((), 6), (("--train.steps", "9"), 9)):
        done = site.launch(f"# a comment\n{site.line.strip()}", *flags)      # and no newline at the end
        assert done.returncode == 0 and "1 of 1 trainings are finished" in done.stdout, done.stdout + done.stderr
        assert models.read_info(site.run / "experts" / "1.safetensors")["step"] == steps and (site.run / "logs" / "expert-1.csv").exists()
    assert (site.run / "experts" / "1.safetensors").read_bytes() == (site.folder / "runs" / "mine" / "experts" / "1.safetensors").read_bytes()


def test_the_launchers_are_valid_shell_and_can_be_executed():
    for name in ("launch.sh", "slurm/ddm.sbatch", "demo.sh", ".ci/run"):
        assert subprocess.run(["bash", "-n", os.path.join(ROOT, name)]).returncode == 0
    for name in ("launch.sh", ".ci/run"):
        assert os.stat(os.path.join(ROOT, name)).st_mode & stat.S_IXUSR
