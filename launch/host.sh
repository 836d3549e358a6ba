#!/usr/bin/env bash
# What ssh.sh asks of a host, in the folder that it has sent there, about one training: WHAT as for
# node.sh, RUN its run directory. Needs bash, tar, flock and coreutils, and make for the first
# start. The seed's weights are brought to RUN/experts/seed.safetensors of the machine that asks,
# and from there to the hosts of the experts.
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
    local folders folder named file files=() i
    named=("$run/config.toml" "$run/clusters.safetensors")
    case $what in
        all|student) folders=("$run"/{shards,latents}/[0-9]*);;
        seed)        folders=("$run"/{shards,latents}/router);;
        *)           folders=("$run"/{shards,latents}/"$what");;
    esac
    case $what in
        student)    folders+=("$run/experts");;
        all|[0-9]*) named+=("$run/experts/seed.safetensors");;
    esac

    for file in "${named[@]}"; do
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

# Whether the training runs. It has inherited file 8, with its lock, and keeps both as long as it
# lives. Another's look takes the lock for a moment, hence the wait.
runs() {
    local code=0
    flock -w 1 8 || code=$?
    case $code in
        0) return 1;;
        1) return 0;;
        *) exit $code;;     # flock has said what is wrong
    esac
}

# The training, from its start to its end.
train() {
    local code=0
    launch/node.sh "$what" --run-dir "$run" "${flags[@]}" || code=$?
    echo $code > "$exit_code"
}

start() {
    # Trainings may share this folder, and its packages are installed once.
    exec 9>> install.lock
    flock 9
    if [ ! -e .venv/installed ] && ! make .venv/installed > install.log 2>&1; then
        echo "failed: $PWD/install.log: $(grep -v '^make' install.log | tail -n 1)"
        return
    fi
    exec 9>&-

    if runs; then
        look
        return
    fi
    rm -f "$exit_code"
    # In a process group of its own (set -m), and without SIGHUP, it outlives our connection.
    trap '' HUP
    set -m
    train >> "$run/logs/$name.log" 2>&1 < /dev/null &
    echo started
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
    start|look)
        mkdir -p "$run/logs"
        exec 8>> "$run/$name.lock"
        $verb;;
    list)    list;;
    logs)    pack;;
    results) pack "$weights";;
    *)       echo "error: launch/host.sh $verb: see its first lines" >&2; exit 2;;
esac
