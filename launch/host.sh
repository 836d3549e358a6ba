#!/usr/bin/env bash
# What ssh.sh asks of a host, in the folder that it has sent there, about one training: WHAT as for
# node.sh, RUN its run directory. Needs bash, tar and coreutils, and make for the first start.
#
#     launch/host.sh list RUN WHAT               the files that it needs, each with size and time
#     launch/host.sh start RUN WHAT [FLAGS]      starts it unless it runs; says how it stands
#     launch/host.sh look RUN WHAT               says how it stands
#     launch/host.sh logs RUN WHAT               its logs and samples, as a tar
#     launch/host.sh results RUN WHAT            these and its weights, as a tar
#
# How it stands: started | running: ROW OF THE LOG | finished N | to be continued N | failed: WHY
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")/.."

verb=$1
run=$2
what=$3
flags=("${@:4}")

case $what in
    router)   name=router        weights=router.safetensors;;
    student)  name=student       weights=student.safetensors;;
    *)        name=expert-$what  weights=experts/$what.safetensors;;
esac
exit_code=$run/$name.code       # node.sh's, once it has ended

# Prints "SIZE TIME PATH" of each file that the training needs, as far as it is here.
list() {
    local folders folder file files=() i
    case $what in
        all|student) folders=("$run"/{shards,latents}/[0-9]*);;
        *)           folders=("$run"/{shards,latents}/"$what");;
    esac
    [ "$what" != student ] || folders+=("$run/experts")

    for file in "$run/config.toml" "$run/clusters.safetensors"; do
        [ ! -e "$file" ] || files+=("$file")
    done
    for folder in "${folders[@]}"; do
        files+=("$folder"/*)
    done

    # There can be more than fit on a command line.
    for ((i = 0; i < ${#files[@]}; i += 1000)); do
        stat -L -c '%s %Y %n' -- "${files[@]:i:1000}"
    done
}

# Whether the training runs: a process that began as `start` begins it, in this folder. (A file
# that says so would outlive a machine that goes down, and numbers of processes come again.)
runs() {
    local process words
    for process in /proc/[0-9]*; do
        mapfile -d '' -t words < "$process/cmdline" || continue
        [ "${words[*]:1:4}" = "launch/host.sh train $run $what" ] || continue
        [ ! "$process/cwd" -ef . ] || return 0
    done 2> /dev/null
    return 1
}

# The training itself, from its start to its end.
train() {
    local code=0
    launch/node.sh "$what" --run-dir "$run" "${flags[@]}" || code=$?
    echo $code > "$exit_code"
}

# One start at a time, since two trainings may share this folder and its packages. A lock names its
# process, and if that has gone it is nobody's.
lock() {
    until ln -s $$ launch.lock 2> /dev/null; do
        [ "/proc/$(readlink launch.lock)/cwd" -ef . ] || rm -f launch.lock
        sleep 1
    done
    trap 'rm -f launch.lock' EXIT
}

start() {
    lock
    if [ ! -e .venv/installed ] && ! make .venv/installed > install.log 2>&1; then
        echo "failed: $PWD/install.log: $(why_not_installed)"
        return
    fi
    if runs; then
        look
        return
    fi

    # set -m: in a process group of its own it outlives our connection.
    mkdir -p "$run/logs"
    rm -f "$exit_code"
    set -m
    launch/host.sh train "$run" "$what" "${flags[@]}" \
        >> "$run/logs/$name.log" 2>&1 < /dev/null &
    until runs || [ -e "$exit_code" ]; do
        sleep 0.1
    done
    echo started
}

# The last line that is not make's own.
why_not_installed() {
    local line last=''
    while read -r line; do
        case $line in make*) ;; *) last=$line;; esac
    done < install.log
    echo "$last"
}

look() {
    local code status
    if runs; then
        echo "running: $(tail -n 1 "$run/logs/$name.csv" 2> /dev/null | cut -d, -f 1-4)"
        return
    fi

    # No exit code: the host went down.
    code=$(cat "$exit_code" 2> /dev/null) || code=75
    status=$(cat "$run/checkpoints/$name/status" 2> /dev/null) || status='no status'
    case "$code $status" in
        "0 "*|"75 to be continued"*) echo "$status";;
        75*)                         echo "to be continued";;
        *)                           echo "failed: exit code $code, $status";;
    esac
}

# A tar of the named files of the run, with what the training has written beside them.
pack() {
    cd "$run"
    tar -c -f - -- "$@" "logs/$name".* "samples/$name"-*
}

case $verb in
    list|start|look|train) $verb;;
    logs)                  pack;;
    results)               pack "$weights";;
    *)                     echo "error: launch/host.sh $verb: see its first lines" >&2; exit 2;;
esac
