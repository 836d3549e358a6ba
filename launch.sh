#!/usr/bin/env bash
# Experts and router on hosts that need not know of each other, over ssh and rsync: ships what each needs, trains there, brings the weights back.
#
#     ./launch.sh runs/mine hosts.txt [--train.lr 2e-4 ...]        # after cluster.py; flags go to the training scripts
#
# hosts.txt has a line for each training: HOST WHAT [FOLDER], such as
#     alice@198.51.100.7  0
#     gpu2                1     /scratch/nanoddm
#     gpu3                router
# A host needs bash, rsync and flock, make and Python 3.11 to install the packages, and ssh must ask for no password. The training is its host's own:
# where the link or this script dies it goes on. Run this again at any time: what is there is not sent again, what trains is left alone, what has stopped
# goes on, what is finished is fetched.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,12p' "$0"; exit 2; }
mistake() { echo "error: $*" >&2; exit 2; }
[ -f "$2" ] || mistake "there is no $2, which should name the hosts"
RUN=${1%/} HOSTS=$(realpath "$2")
shift 2
cd "$(dirname "$0")"
FLAGS=''
[ $# = 0 ] || FLAGS=$(printf '%q ' "$@")
[ -f "$RUN/clusters.safetensors" ] || mistake "$RUN has no clusters.safetensors: make it with cluster.py"
EVERY=${EVERY:-60}              # seconds between two looks at a host
TRIES=${TRIES:-20}              # starts of a training that stops without being finished, and of a copy that breaks off
export RSYNC_RSH=${SSH:-ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15 -o ServerAliveCountMax=4}
case $RUN in /*|*..*|*[!A-Za-z0-9_./-]*) mistake "$RUN must be a plain path below $PWD, as it will be on the hosts";; esac

# ---- what is done with a host: each prints its answer, and what went wrong on its standard error ----

# The programs that a host lacks, in a line. Asked of sh, since bash may be one of them.
lacking() {
    $RSYNC_RSH "$host" sh -s <<REMOTE
lacks=''
need() { command -v \$1 > /dev/null 2>&1 || lacks="\$lacks \$1"; }
for program in bash rsync flock setsid; do need \$program; done
if [ ! -e $folder/.venv/installed ]; then
    need make
    for python in python3 python3.11 python3.12 python3.13 python3.14 none; do
        \$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1 && break
    done
    [ \$python != none ] || lacks="\$lacks python3.11-with-venv"
fi
echo \$lacks
REMOTE
}

ship() {
    local files=("$RUN/config.toml" "$RUN/clusters.safetensors" "$RUN/shards/$what")
    [ ! -d "$RUN/latents/$what" ] || files+=("$RUN/latents/$what")
    $RSYNC_RSH "$host" mkdir -p "$folder" && rsync -a ./*.py Makefile requirements.txt "$host:$folder/" && rsync -aR "${files[@]}" "$host:$folder/"
}

# What a host is asked each time, as a script on its standard input: start the training if it should and none runs, and tell how it stands.
# A lock that the training holds as long as it lives says whether one runs; its exit code, whether "finished" is said of this start or of one before.
# Where there are GPUs they must be used: without --device, a driver that is too old would make it train on the CPU. torch 2.11's torchrun cannot be told
# how long a save may take.
look() {
    $RSYNC_RSH "$host" bash -s <<REMOTE
cd $folder && mkdir -p $RUN/logs || exit 1
[ -e .venv/installed ] || flock install.lock make .venv/installed > install.log 2>&1 || {
    echo "failed: $folder/install.log: \$(grep -v '^make' install.log | tail -n 1)"
    exit
}
flock -n $RUN/$name.lock true
locked=\$?
[ \$locked -le 1 ] || exit 1        # 1: by a training that runs; else flock has said what is wrong
if [ \$locked = 0 ]; then
    if [ $1 = start ]; then
        gpus=\$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
        device=() waits=()
        [ \$gpus = 0 ] || device=(--device cuda)
        case \$(.venv/bin/torchrun --help 2>&1) in
            *--shutdown-timeout*) waits=(--shutdown-timeout 600);;
            *) echo "warning: this torchrun kills a training 30 s after SIGTERM, in the middle of a save that takes longer: see README.md" >> $RUN/logs/$name.log;;
        esac
        rm -f $RUN/$name.code
        setsid nohup flock -n $RUN/$name.lock bash -c '"\$@"; echo \$? > $RUN/$name.code' - \
            .venv/bin/torchrun --standalone --nproc_per_node=\$((gpus > 1 ? gpus : 1)) "\${waits[@]}" --max-restarts 3 -- \
            $stage --run $RUN "\${device[@]}" $FLAGS >> $RUN/logs/$name.log 2>&1 < /dev/null &
        echo started
    else
        code=\$(cat $RUN/$name.code 2>/dev/null) status=\$(cat $RUN/checkpoints/$name/status 2>/dev/null)
        case "\$code \$status" in
            "0 "*|*" to be continued"*) echo "\$status";;
            *) echo "failed: exit code \${code:-unknown}, \$status";;
        esac
    fi
else
    echo "running: \$(tail -n 1 $RUN/logs/$name.csv 2>/dev/null | cut -d, -f 1-4)"
fi
REMOTE
}

fetch() {
    rsync -aR --ignore-missing-args "$host:$folder/$RUN/./logs/" "$host:$folder/$RUN/./samples/" "$RUN/" && { [ $1 = logs ] || rsync -aR "$host:$folder/$RUN/./$weights" "$RUN/"; }
}

# ---- one training ----

say() { echo "$(date +%T) $name on $host: $*"; }

# what went wrong last, in a line
told() { tr -s '\r\n' ' ' < "$SCRATCH/$name" | cut -c 1-400; }

# Does one of the above, until the host has been reached; what it prints is in $answer. 255 is ssh's own code for a connection that failed. 10, 12, 30 and 35
# are rsync's where it saw a link's end before ssh told of it, 24 where a file went away under it. Any other failure would only come again: it ends this
# training (here; the host's goes on).
reach() {
    local code words before='' breaks=0
    while true; do
        code=0
        answer=$("$@" 2> "$SCRATCH/$name") || code=$?
        [ $code != 0 ] || return 0
        words=$(told)
        case $code in
            255) words="$unreached ($words)";;
            10|12|24|30|35) words="$1 broke off, trying again ($words)" breaks=$((breaks + 1));;
            *) breaks=$TRIES;;
        esac
        if [ $breaks -ge "$TRIES" ]; then
            say "error: $1 failed, exit code $code: $words"
            return 1
        fi
        [ "$words" = "$before" ] || say "$words"
        before=$words
        sleep "$EVERY"
    done
}

train() {
    local tries=0 before='' stopped='' unreached="not reached, trying again"
    reach lacking || return 1
    [ -z "$answer" ] || { say "error: this host lacks $answer"; return 1; }
    reach ship || return 1
    reach look start || return 1
    unreached="no answer; it trains on without us"
    while true; do
        [ "$answer" = "$before" ] || say "$answer"
        before=$answer
        case $answer in
            finished*)
                reach fetch all || return 1
                say "$RUN/$weights is here"
                return 0;;
            failed*)
                fetch logs 2> /dev/null || true
                say "$RUN/logs/$name.log: $(grep -s '^error' "$RUN/logs/$name.log" | tail -n 1)"
                return 1;;
            "to be continued"*)
                tries=$((tries + 1))
                if [ "$answer" = "$stopped" ] || [ $tries -ge "$TRIES" ]; then      # no step further than the time before
                    fetch logs 2> /dev/null || true
                    say "stopped $tries times, see $RUN/logs/$name.log: $(grep -is error "$RUN/logs/$name.log" | tail -n 1)"
                    return 1
                fi
                stopped=$answer
                reach look start || return 1
                continue;;
        esac
        sleep "$EVERY"
        reach look no || return 1
    done
}

# host, what and folder of a line of hosts.txt, and what follows from them
of_line() {
    read -r host what folder _ <<< "$1"
    folder=${folder:-nanoddm}
    case $what in
        router) name=router stage=train_router.py weights=router.safetensors;;
        *) name=expert-$what stage="train_expert.py --shard $what" weights=experts/$what.safetensors;;
    esac
}

# hosts.txt as UTF-8 without BOM and carriage returns, whatever an editor has made of it
hosts() {
    case $(head -c 2 "$HOSTS" | od -An -tx1) in
        ' ff fe'|' fe ff') iconv -f UTF-16 -t UTF-8 "$HOSTS";;
        *) cat "$HOSTS";;
    esac | LC_ALL=C sed $'1s/^\xef\xbb\xbf//; s/\r$//'
}

# ---- mistakes are found before anything is sent ----

lines=()
while read -r line || [ -n "$line" ]; do
    case $line in ''|'#'*) continue; esac
    of_line "$line"
    [ -n "$what" ] && [ -d "$RUN/shards/$what" ] || mistake "$HOSTS: '$host $what' should be HOST WHAT [FOLDER], WHAT one of: $(ls "$RUN/shards" | tr '\n' ' ')"
    lines+=("$line")
done < <(hosts)
[ ${#lines[@]} -gt 0 ] || mistake "$HOSTS names no host"

lacks=''
for program in "${RSYNC_RSH%% *}" rsync; do
    command -v "$program" > /dev/null || lacks+=" $program"
done
[ -z "$lacks" ] || mistake "this machine lacks$lacks, which launch.sh needs: install it here"
SCRATCH=$(mktemp -d)
trainings=()
trap 'trap - EXIT; kill ${trainings[@]+"${trainings[@]}"} 2>/dev/null || true; rm -rf "$SCRATCH"' EXIT
trap 'exit 130' INT TERM        # the looking ends with this script; the trainings go on

for line in "${lines[@]}"; do
    of_line "$line"
    code=0
    answer=$(lacking 2> "$SCRATCH/$name" < /dev/null) || code=$?
    case $code in
        0) [ -z "$answer" ] || lacks+="${lacks:+; }$host lacks $answer";;
        255) ;;         # not reached: asked again when it is
        *) lacks+="${lacks:+; }$host cannot be asked what it has, exit code $code: $(told)";;
    esac
done
[ -z "$lacks" ] || mistake "$lacks: install it there"
for line in "${lines[@]}"; do
    of_line "$line"
    train < /dev/null &
    trainings+=($!)
done
failed=0
for training in "${trainings[@]}"; do wait "$training" || failed=$((failed + 1)); done
echo "$((${#trainings[@]} - failed)) of ${#trainings[@]} trainings are finished, their weights in $RUN"
[ $failed = 0 ]
