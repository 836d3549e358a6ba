#!/usr/bin/env bash
# One training on one node, whatever starts it: a shell, a container, slurm.sbatch, ssh.sh.
#
#     launch/node.sh 3 --run-dir runs/laion --train.lr 2e-4       # expert 3
#     launch/node.sh seed                                         # what experts begin with
#     launch/node.sh all                                          # the monolith, of runs/ddm
#     launch/node.sh router
#     launch/node.sh student
#
# Flags go to the training script. Without --run-dir, the environment's RUN is the run directory.
# SIGTERM, SIGINT, SIGUSR1 and SIGHUP (without nohup) make the training finish its step, save and
# stop.
#
# reads   RUN/checkpoints/NAME/status, where the training says how it stands
# exits   0   finished
#         75  to be continued: the same command resumes
#         1   failed: it would fail again, see the log
#         2   a mistake in the command: nothing was started
set -euo pipefail

root=$(realpath "$(dirname "$0")/..")
run=${RUN:-runs/ddm}
torchrun=''         # its process, once there is one
asked=no            # whether we were asked to stop
told=no             # whether the training knows

mistake() {
    echo "error: $*" >&2
    exit 2
}

# Sets name (of checkpoints and logs) and stage (the script, with the flag that says what to train).
read_what() {
    case ${1:-} in
        router)      name=router    stage=("$root/train_router.py");;
        student)     name=student   stage=("$root/distill.py");;
        all|seed)    name=expert-$1 stage=("$root/train_expert.py" --shard "$1");;
        ''|*[!0-9]*) mistake "launch/node.sh '${1:-}': give an expert's number," \
                         "all, seed, router or student";;
        *)           name=expert-$1 stage=("$root/train_expert.py" --shard "$1");;
    esac
}

# Sets flags, and run where --run-dir is among them: the status is looked for there, too.
read_flags() {
    flags=()
    while [ $# -gt 0 ]; do
        case $1 in
            --run-dir=*)
                run=${1#*=};;
            --run-dir)
                [ $# -gt 1 ] || mistake "--run-dir needs a directory"
                run=$2
                shift;;
            *)
                flags+=("$1");;
        esac
        shift
    done
}

# Sets PATH, and waits: torchrun passes SIGTERM on, and after so many seconds kills the ranks. At 3B
# parameters a checkpoint and an export are some 60 GB, so the save takes more than its usual 30 s.
# The torchrun of torch 2.11 cannot be told.
find_torchrun() {
    [ ! -x "$root/.venv/bin/torchrun" ] || PATH=$root/.venv/bin:$PATH
    command -v torchrun > /dev/null ||
        mistake "there is no torchrun: run make .venv/installed, or load your cluster's torch first"

    waits=()
    case $(torchrun --help 2>&1) in
        *--shutdown-timeout*) waits=(--shutdown-timeout 600);;
    esac
}

# Sets gpus, and device: where there are GPUs they must be used. Without --device, a driver that is
# too old would make it train on the CPU.
count_gpus() {
    local word
    gpus=0
    while read -r word _; do
        [ "$word" != GPU ] || gpus=$((gpus + 1))
    done < <(nvidia-smi -L 2> /dev/null)
    gpus=${SLURM_GPUS_ON_NODE:-$gpus}

    device=()
    [ "$gpus" = 0 ] || device=(--device cuda)
}

# A rank that dies is replaced by starting all of them from the newest checkpoint, three times.
# set -m gives torchrun a process group of its own: a Ctrl-C then reaches us alone, and torchrun
# gets one signal and not two.
start() {
    local processes=$((gpus > 1 ? gpus : 1))

    set -m
    torchrun --standalone --nproc_per_node=$processes "${waits[@]}" --max-restarts 3 \
        "${stage[@]}" --run-dir "$run" "${device[@]}" "${flags[@]}" < /dev/null &
    torchrun=$!
    set +m
}

# Makes the training save and end. It is told once: at the second signal torchrun begins to wait
# anew (Slurm may have sent the first), at the third it leaves its ranks alone. And by SIGTERM,
# since SIGUSR1 would end torchrun at once.
stop() {
    asked=yes
    [ -n "$torchrun" ] && [ $told = no ] || return 0
    told=yes

    # A torchrun that cannot be told to wait is not told to end: it does when its ranks have ended.
    local whom=$torchrun
    if [ ${#waits[@]} = 0 ]; then
        whom=$(cat "/proc/$torchrun/task/$torchrun/children") || true
    fi
    # shellcheck disable=SC2086     # ranks are several words
    kill -TERM ${whom:-$torchrun} || true
}

# Sets code, torchrun's. A signal ends `wait`, and not the training.
await_end() {
    while kill -0 "$torchrun" 2> /dev/null; do
        wait "$torchrun" || true
    done
    code=0
    wait "$torchrun" || code=$?
}

status() {
    cat "$run/checkpoints/$name/status" 2> /dev/null || true
}

# Our exit code. torchrun's does not tell a stop from a failure, and a status may be that of an
# earlier start: a misspelt flag leaves it as it was. What died without being asked to is to be
# continued if it got further than before.
verdict() {
    local before=$1 after=$2
    case "$code $after" in
        "0 finished"*) return 0;;
    esac
    [ "$after" != "$before" ] || after=unchanged
    case "$after" in
        failed*)            return 1;;
        "to be continued"*) return 75;;
    esac
    [ $asked = no ] || return 75
    return 1
}

read_what "$@"
read_flags "${@:2}"
trap stop TERM INT USR1 HUP
find_torchrun
count_gpus

before=$(status)
start
[ $asked = no ] || stop         # a signal came too early to be passed on
await_end

after=$(status)
echo "$name: exit code $code, ${after:-no status}"
verdict "$before" "$after"
