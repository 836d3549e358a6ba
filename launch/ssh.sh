#!/usr/bin/env bash
# The trainings of a run on hosts that need not know of each other, over ssh.
#
#     launch/ssh.sh runs/laion hosts.txt [--train.lr 2e-4 ...]      # after cluster.py
#
# hosts.txt has a line for each training, HOST WHAT [FOLDER]: WHAT is an expert's number, all, seed,
# router or student, FOLDER is where to work (default: nanoddm in the home folder).
#
#     alice@198.51.100.7  0
#     gpu2                1     /scratch/nanoddm
#     gpu3                router
#
# Flags go to the training scripts. It sends to each host what git tracks here and its part of the
# run, starts launch/node.sh there, starts it again when it has stopped, and brings the weights
# back. A training is its host's own: where the link or this script dies, it goes on. Run this again
# at any time: what is there is not sent again, what trains is left alone, what has stopped is
# resumed, what is finished is fetched.
#
# With a line for the seed, experts and monolith are sent and started when its weights are here, the
# router at once. A seed that is here is not trained again.
#
# This machine needs Linux, ssh, which must ask for no password, tar and git; a host needs bash, tar
# and flock, and make and Python 3.11 to install the packages.
#
# reads   RUN/config.toml, RUN/clusters.safetensors, RUN/shards/K and RUN/latents/K
#         (for student also RUN/experts), RUN/experts/seed.safetensors
# writes  RUN/experts/K.safetensors (seed.safetensors, too), RUN/router.safetensors,
#         RUN/student.safetensors; RUN/logs, RUN/samples
set -euo pipefail

EVERY=${EVERY:-60}      # seconds between two looks at a host
TRIES=${TRIES:-20}      # starts of a training that stops without being finished
read -ra ssh <<< "${SSH:-ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=20}"

mistake() {
    echo "error: $*" >&2
    exit 2
}

# ---- what is done with a host: each prints its answer, and on its stderr what went wrong ----

# Runs a command in the host's folder. It goes to bash by standard input: no login shell reads it.
on_host() {
    "${ssh[@]}" "$host" bash <<< "cd $folder && $(printf '%q ' "$@")"
}

# The programs that a host lacks, in a line. Asked of sh, since bash may be one of them.
ask() {
    "${ssh[@]}" "$host" sh -s "$folder" <<'REMOTE'
lacks=''
need() { command -v "$1" > /dev/null 2>&1 || lacks="$lacks $1"; }
need bash
need tar
need flock
if [ ! -e "$1/.venv/installed" ]; then
    need make
    for python in python3 python3.11 python3.12 python3.13 python3.14 none; do
        $python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
            > /dev/null 2>&1 && break
    done
    [ $python != none ] || lacks="$lacks python3.11-with-venv"
fi
echo $lacks
REMOTE
}

# Sends the files whose names are in a list, each ended by a null byte.
send() {
    [ -s "$1" ] || return 0
    tar -c -h --format=pax -f - --null -T "$1" |
        "${ssh[@]}" "$host" "mkdir -p $folder && tar -xo -f - -C $folder"
}

# Sends the code, and what the host does not have of the data: of the same size and time, as rsync
# looks at it. A link that breaks costs the file that it broke in.
ship() {
    local lists=$scratch/$name
    send "$scratch/tracked" &&
        on_host launch/host.sh list "$run" "$what" | sort > "$lists.there" &&
        launch/host.sh list "$run" "$what" | sort > "$lists.here" &&
        comm -23 "$lists.here" "$lists.there" | cut -d ' ' -f 3- | tr '\n' '\0' > "$lists.send" &&
        send "$lists.send"
}

start() {
    on_host launch/host.sh start "$run" "$what" "${flags[@]}"
}

look() {
    on_host launch/host.sh look "$run" "$what"
}

# Brings logs and samples, or all results. Weights appear whole: they are renamed into their place.
fetch() {
    local place=$scratch/$name.fetched
    rm -rf "$place"
    mkdir "$place"
    on_host launch/host.sh "$1" "$run" "$what" > "$place.tar" &&
        tar -xo -f "$place.tar" -C "$place" || return

    if [ "$1" = results ]; then
        mv "$place/$weights" "$run/$weights" || return
    fi
    cp -R "$place/." "$run/"
}

# ---- one training ----

say() {
    printf '%(%T)T %s\n' -1 "$name on $host: $*"
}

# What went wrong last, in a line.
told() {
    tr -s '\r\n' ' ' < "$scratch/$name.err" | cut -c 1-400
}

# Does one of the above until the host has been reached, and puts what it prints into answer. 255 is
# ssh's code for a connection that failed. Any other failure would only come again, and ends this
# training here; the host's goes on.
reach() {
    local code words before=none
    while true; do
        code=0
        answer=$("$@" 2> "$scratch/$name.err") || code=$?
        [ $code != 0 ] || return 0

        words=$(told)
        if [ $code != 255 ]; then
            say "error: $1 failed, exit code $code: $words"
            return 1
        fi
        [ "$words" = "$before" ] || say "$unreached ($words)"
        before=$words
        sleep "$EVERY"
    done
}

# Starts it and watches it to its end.
train() {
    local tries=0 before=''
    # experts may have begun with it, and would not take another
    if [ "$what" = seed ] && [ -e "$run/$weights" ]; then
        say "not trained, $run/$weights is here"
        return 0
    fi

    unreached="not reached, trying again"
    reach ship || return 1
    reach start || return 1

    unreached="no answer; it trains on without us"
    while true; do
        [ "$answer" = "$before" ] || say "$answer"
        before=$answer
        case $answer in
            finished*)
                reach fetch results || return 1
                say "$run/$weights is here"
                return 0;;
            failed*)
                give_up "failed"
                return 1;;
            "to be continued"*)
                tries=$((tries + 1))
                [ $tries -lt "$TRIES" ] || { give_up "stopped $tries times"; return 1; }
                reach start || return 1;;
            *)
                sleep "$EVERY"
                reach look || return 1;;
        esac
    done
}

give_up() {
    fetch logs 2> /dev/null || true
    say "$1, see $run/logs/$name.log: $(grep -is '^error' "$run/logs/$name.log" | tail -n 1)"
}

# Starts the trainings of lines, in a process group each, to end with its ssh and tar.
begin() {
    local line
    for line in "$@"; do
        read_line "$line"
        set -m
        train < /dev/null &
        set +m
        trainings+=($!)
    done
}

# Waits for trainings, and sets failed, the number of those that are not finished.
await() {
    local training
    failed=0
    for training in "$@"; do
        wait "$training" || failed=$((failed + 1))
    done
}

# ---- mistakes are found before anything is sent ----

# Sets host, what and folder from a line of hosts.txt, and what follows from them.
read_line() {
    read -r host what folder _ <<< "$1"
    folder=${folder:-nanoddm}
    case $what in
        router|student) name=$what        weights=$what.safetensors;;
        *)              name=expert-$what weights=experts/$what.safetensors;;
    esac
}

check_line() {
    local shard=$what
    # the seed has the router's images
    [ "$what" != seed ] || shard=router
    case $what in
        all|student) ;;
        *)  [ -n "$what" ] && [ -d "$run/shards/$shard" ] ||
                mistake "$hosts: '$host $what' should be HOST WHAT [FOLDER]," \
                    "WHAT one of: $(ls "$run/shards" | tr '\n' ' ')all student;" \
                    "or seed, which needs shards/router";;
    esac
    case $folder in
        *[!A-Za-z0-9_./~-]*) mistake "$hosts: $folder must be a plain path, as it is on $host";;
    esac
}

# Sets lines, those of hosts.txt, whatever an editor has made of it: without carriage returns, byte
# order marks, and the null bytes of UTF-16. And the same in three parts: seeds, heirs (which begin
# with the seed) and others.
read_hosts() {
    local line
    lines=()
    seeds=()
    heirs=()
    others=()
    while read -r line || [ -n "$line" ]; do
        case $line in ''|'#'*) continue;; esac
        read_line "$line"
        check_line
        lines+=("$line")
        case $what in
            seed)           seeds+=("$line");;
            router|student) others+=("$line");;
            *)              heirs+=("$line");;
        esac
    done < <(LC_ALL=C tr -d '\000\r\357\273\277\376\377' < "$hosts")
    [ ${#lines[@]} -gt 0 ] || mistake "$hosts names no host"
}

# Prints train.seed_steps: the flags' or else the config's, which has one such key.
seed_steps() {
    local steps flag before=''
    steps=$(grep -Eos '^ *seed_steps *= *[1-9][0-9]*' "$run/config.toml" | tr -dc 0-9) || true
    for flag in "${flags[@]}"; do
        [ "$before" != --train.seed_steps ] || steps=$flag
        before=$flag
        case $flag in --train.seed_steps=*) steps=${flag#*=};; esac
    done
    echo "${steps:-0}"
}

# A seed that no training could find is a mistake.
check_seed() {
    local steps seed=$run/experts/seed.safetensors
    steps=$(seed_steps)
    [ "$steps" = 0 ] || [ ${#heirs[@]} = 0 ] || [ ${#seeds[@]} != 0 ] || [ -e "$seed" ] ||
        mistake "train.seed_steps = $steps, and there is no $seed to begin with:" \
            "add a line 'HOST seed' to $hosts, or copy it there"
}

check_hosts() {
    local line code lacks=''
    for line in "${lines[@]}"; do
        read_line "$line"
        code=0
        answer=$(ask 2> "$scratch/$name.err") || code=$?
        case $code in
            0)   [ -z "$answer" ] || lacks+="; $host lacks $answer";;
            255) ;;         # not reached: asked again when it is
            *)   lacks+="; $host cannot be asked what it has, exit code $code: $(told)";;
        esac
    done
    [ -z "$lacks" ] || mistake "${lacks#; }: install it there"
}

# Lists what git tracks, as far as it is in the work tree.
list_tracked() {
    local file
    git ls-files -z | while IFS= read -r -d '' file; do
        [ ! -f "$file" ] || printf '%s\0' "$file"
    done > "$scratch/tracked" || true
    [ -s "$scratch/tracked" ] || mistake "git tracks nothing in $PWD, and that is what is sent"

    file=$(git ls-files --others --exclude-standard '*.py' | tr '\n' ' ')
    [ -z "$file" ] || echo "warning: not sent, since git does not track it: $file"
}

[ $# -ge 2 ] || { head -n 28 "$0" | tail -n +2; exit 2; }
[ -f "$2" ] || mistake "there is no $2, which should name the hosts"
run=${1%/}
hosts=$(realpath "$2")
flags=("${@:3}")

cd "$(dirname "$0")/.."
case $run in
    /*|-*|*..*|*[!A-Za-z0-9_./-]*)
        mistake "$run must be a plain path below $PWD, as it will be on the hosts";;
esac
[ -f "$run/clusters.safetensors" ] ||
    mistake "$run has no clusters.safetensors: make it with cluster.py"
read_hosts
check_seed
for program in "${ssh[0]}" tar git; do
    command -v "$program" > /dev/null ||
        mistake "this machine lacks $program, which launch/ssh.sh needs: install it here"
done

# Beside the results, so that these can be renamed. The looking ends with this script, whatever ends
# it; the trainings go on.
scratch=$(mktemp -d "$run/.launch-XXXXXX")
# here, since of two copies at once that make the same folder one would fail
mkdir -p "$run"/{experts,logs,samples}
trainings=()
trap 'kill -- "${trainings[@]/#/-}" 2> /dev/null || true; wait; rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM
list_tracked
check_hosts

begin "${seeds[@]}"
seedings=("${trainings[@]}")
begin "${others[@]}"

await "${seedings[@]}"
if [ $failed = 0 ]; then
    begin "${heirs[@]}"
else
    for line in "${heirs[@]}"; do
        read_line "$line"
        say "not started: the seed that it begins with is not finished"
    done
fi

await "${trainings[@]}"
finished=$((${#trainings[@]} - failed))
echo "$finished of ${#lines[@]} trainings are finished, their weights in $run"
[ $finished = ${#lines[@]} ]
