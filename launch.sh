#!/usr/bin/env bash
# Experts and router on hosts that need not know of each other, over ssh and rsync: ships what each needs, trains there, brings the weights back.
#
#     ./launch.sh runs/mine hosts.txt [--train.lr 2e-4 ...]        # after cluster.py; flags go to the training scripts
#
# hosts.txt has a line for each training: HOST WHAT [FOLDER], such as
#     alice@198.51.100.7  0
#     gpu2                1     /scratch/nanoddm
#     gpu3                router
# A host needs bash, rsync, flock, make and Python 3.11, and ssh must ask for no password. The training is its host's own: where the link or this script
# dies it goes on. Run this again at any time: what is there is not sent again, what trains is left alone, what has stopped goes on, what is finished is fetched.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,11p' "$0"; exit 2; }
RUN=${1%/} HOSTS=$(realpath "$2")
shift 2
cd "$(dirname "$0")"
FLAGS=''
[ $# = 0 ] || FLAGS=$(printf '%q ' "$@")
[ -f "$HOSTS" ] || { echo "error: there is no $HOSTS" >&2; exit 2; }
[ -f "$RUN/clusters.safetensors" ] || { echo "error: $RUN has no clusters.safetensors: make it with cluster.py" >&2; exit 2; }
EVERY=${EVERY:-60}              # seconds between two looks at a host
TRIES=${TRIES:-20}              # starts of a training that stops without being finished
export RSYNC_RSH=${SSH:-ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15 -o ServerAliveCountMax=4}
case $RUN in /*|*..*|*[!A-Za-z0-9_./-]*) echo "error: $RUN must be a plain path below $PWD, as it will be on the hosts" >&2; exit 2; esac

# What a host is asked each time, as a script on its standard input: start the training if it should and none runs, and tell how it stands.
# A lock that the training holds as long as it lives says whether one runs; its exit code, whether "finished" is said of this start or of one before.
look() {
    $RSYNC_RSH "$host" bash -s <<REMOTE
cd $folder && mkdir -p $RUN/logs || exit 1
[ -e .venv/installed ] || flock install.lock make .venv/installed > install.log 2>&1 || { echo "failed: see $folder/install.log"; exit; }
if flock -n $RUN/$name.lock true; then
    if [ $1 = start ]; then
        gpus=\$(nvidia-smi -L 2>/dev/null | wc -l)
        rm -f $RUN/$name.code
        setsid nohup flock -n $RUN/$name.lock bash -c '"\$@"; echo \$? > $RUN/$name.code' - \
            .venv/bin/torchrun --standalone --nproc_per_node=\$((gpus > 1 ? gpus : 1)) --shutdown-timeout 600 --max-restarts 3 -- \
            $stage --run $RUN $FLAGS >> $RUN/logs/$name.log 2>&1 < /dev/null &
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

ship() {
    local files=("$RUN/config.toml" "$RUN/clusters.safetensors" "$RUN/shards/$what")
    [ ! -d "$RUN/latents/$what" ] || files+=("$RUN/latents/$what")
    $RSYNC_RSH "$host" mkdir -p "$folder" && rsync -a ./*.py Makefile requirements.txt "$host:$folder/" && rsync -aR "${files[@]}" "$host:$folder/"
}

fetch() {
    rsync -aR --ignore-missing-args "$host:$folder/$RUN/./logs/" "$host:$folder/$RUN/./samples/" "$RUN/" && { [ $1 = logs ] || rsync -aR "$host:$folder/$RUN/./$weights" "$RUN/"; }
}

train() {
    host=$1 what=$2 folder=${3:-nanoddm}
    case $what in
        router) name=router stage=train_router.py weights=router.safetensors;;
        *) name=expert-$what stage="train_expert.py --shard $what" weights=experts/$what.safetensors;;
    esac
    say() { echo "$(date +%T) $name on $host: $*"; }
    until ship; do say "not reached, trying again"; sleep "$EVERY"; done
    local tries=0 answer='' before='' stopped=''
    until answer=$(look start); do say "not reached, trying again"; sleep "$EVERY"; done
    say "$answer"
    while sleep "$EVERY"; do
        answer=$(look no) || answer="no answer; it trains on without us"
        [ "$answer" = "$before" ] || say "$answer"
        before=$answer
        case $answer in
            finished*) until fetch all; do say "not fetched, trying again"; sleep "$EVERY"; done; say "$RUN/$weights is here"; return 0;;
            failed*) fetch logs || true; say "$RUN/logs/$name.log: $(grep '^error' "$RUN/logs/$name.log" | tail -n 1)"; return 1;;
            "to be continued"*)
                tries=$((tries + 1))
                if [ "$answer" = "$stopped" ] || [ $tries -ge "$TRIES" ]; then      # no step further than the time before
                    fetch logs || true
                    say "stopped $tries times, see $RUN/logs/$name.log: $(grep -i error "$RUN/logs/$name.log" | tail -n 1)"
                    return 1
                fi
                stopped=$answer
                look start > /dev/null || true;;
        esac
    done
}

# mistakes are found before anything is sent
lines=()
while read -r host what folder _ || [ -n "$host" ]; do
    case $host in ''|'#'*) continue; esac
    [ -d "$RUN/shards/$what" ] && [ -n "$what" ] || { echo "error: $HOSTS: '$host $what' should be HOST WHAT [FOLDER], WHAT one of: $(ls "$RUN/shards" | tr '\n' ' ')" >&2; exit 2; }
    lines+=("$host $what $folder")
done < "$HOSTS"
[ ${#lines[@]} -gt 0 ] || { echo "error: $HOSTS names no host" >&2; exit 2; }
trainings=()
trap 'trap - EXIT; kill "${trainings[@]}" 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM        # the looking ends with this script; the trainings go on
for line in "${lines[@]}"; do
    train $line < /dev/null &
    trainings+=($!)
done
failed=0
for training in "${trainings[@]}"; do wait "$training" || failed=$((failed + 1)); done
echo "$((${#trainings[@]} - failed)) of ${#trainings[@]} trainings are finished, their weights in $RUN"
[ $failed = 0 ]
