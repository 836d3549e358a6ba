#!/usr/bin/env bash
# Does the ensemble beat the monolith at equal compute, and from which length of training on? One
# monolith; K experts and a router from random weights, as in the paper; K experts from a seed that
# has made a share of all steps; the same with random clusters; the monolith from such a seed. Each
# at several lengths and with several seeds, at the learning rate that was the best of three on a
# run of SHORT steps. The rate decays over the last quarter of the steps.
#
#     # all of it: many hours on 2 cores
#     bash bench/claim.sh 'CIFAR/0000[0-8].tar' CIFAR/00009.tar runs/claim
#     # a part of it
#     LENGTHS="800 3200" SEEDS=0 ARMS="monolith k4 k4-seed50" bash bench/claim.sh ...
#     # a larger model; everything after the third argument goes to cluster.py over claim.toml
#     bash bench/claim.sh TRAIN VALIDATION RUNS --data.size 32 --model.dim 128
#
# LENGTHS are steps of 128 images. ARMS: monolith, kK or randomK for K clusters, and each with
# -seedP, P the seed's share of the steps in percent. SEEDS. At lengths over 3200 LONG_ARMS and
# LONG_SEEDS. Arms share a learning rate where they differ in P or in random clusters alone. Samples
# are drawn by top-1 at each length; at the last one by all of STRATEGIES, of the GUIDED arms also
# with each of CFGS. SAMPLES a row. JOBS at a time, a CPU core each. Killed at any time and started
# again, it goes on: trainings resume, what is finished is not done again. Paths have no spaces.
#
# reads   TRAIN and VALIDATION, tars of 32-pixel images with classes
# writes  RUNS/clusters/KIND-SEED, RUNS/seeds/STEPS-SEED and, for each arm, a run folder
#         RUNS/LENGTH/ARM-SEED with its evaluations in loss/ and samples-STRATEGY-CFG/; RUNS/lr, the
#         short runs; RUNS/calibrated, routers with temperatures; RUNS/claim.md and figures
set -euo pipefail

TRAIN=$(realpath -s "$1")
VALIDATION=$(realpath -s "$2")
mkdir -p "$3"
RUNS=$(realpath "$3")
shift 3
FLAGS=$*

LENGTHS=${LENGTHS:-800 3200 12800}
SEEDS=${SEEDS:-0 1 2}
LONG_SEEDS=${LONG_SEEDS:-0 1}
ARMS=${ARMS:-monolith k4 k4-seed10 k4-seed25 k4-seed50 k4-seed75 monolith-seed50
    random4 random4-seed50 k8 k8-seed50}
ARMS=$(echo $ARMS)
LONG_ARMS=${LONG_ARMS:-monolith k4 k4-seed25 k4-seed50 k4-seed75 random4-seed50 k8-seed50}
LRS=${LRS:-2e-3 4e-3 8e-3}
SHORT=${SHORT:-3200}
SAMPLES=${SAMPLES:-2500}
STRATEGIES=${STRATEGIES:-full top-1 top-2 once}
GUIDED=${GUIDED:-monolith k4 k4-seed50}
CFGS=${CFGS:-1.5 2}
JOBS=${JOBS:-2}
LAST=${LENGTHS##* }
FIRST=${SEEDS%% *}

cd "$(dirname "$0")/.."
if [ "$JOBS" -gt 1 ]; then export OMP_NUM_THREADS=1; fi

# a killed one may have left trainings behind, which hold the lock until they have ended
exec 9> "$RUNS/lock"
flock -n 9 || { echo "error: another claim.sh is at work in $RUNS" >&2; exit 1; }
trap 'trap - TERM; kill 0' INT TERM
[ -e "$RUNS/flags" ] || echo "$FLAGS" > "$RUNS/flags"
[ "$FLAGS" = "$(cat "$RUNS/flags")" ] ||
    { echo "error: $RUNS was begun with the flags $(cat "$RUNS/flags")" >&2; exit 1; }

# ---- the parts, each done once ----

# KIND of an ARM: k4-seed50 -> k4. Any clustering will do for the monolith.
kind() {
    local kind=${1%-seed*}
    if [ "$kind" = monolith ]; then kind=k4; fi
    echo "$kind"
}

# The percentage that an ARM's seed has of the steps: k4-seed50 -> 50, k4 -> 0.
share() {
    case $1 in
        *-seed*) echo "${1##*-seed}";;
        *) echo 0;;
    esac
}

# Sets a key in a table of a config, which must be there: set_key FILE TABLE KEY VALUE.
set_key() {
    awk -v table="[$2]" -v key="$3" -v value="$4" '
        /^\[/ { now = $0 }
        now == table && $1 == key { $0 = key " = " value; found = 1 }
        { print }
        END { exit !found }' "$1" > "$1.new"
    mv "$1.new" "$1"
}

cluster() {
    local kind=$1 seed=$2 run=$RUNS/clusters/$1-$2 assign=coarse
    if [ -e "$run/clusters.png" ]; then return; fi
    case $kind in random*) assign=random;; esac
    python cluster.py --data "$TRAIN" --run-dir "$run" --config bench/claim.toml \
        --cluster.experts "${kind##*[a-z]}" --cluster.assign $assign \
        --cluster.seed "$seed" --train.seed "$seed" $FLAGS
}

# A run folder with the clusters of another: folder RUN KIND SEED STEPS LR.
folder() {
    local run=$1 kind=$2 seed=$3 steps=$4 lr=$5 base=$RUNS/clusters/$2-$3
    if [ -e "$run/config.toml" ]; then return; fi
    mkdir -p "$run/experts"
    ln -sfn "$base/shards" "$run/shards"
    ln -sfn "$base/clusters.safetensors" "$run/clusters.safetensors"
    cp "$base/config.toml" "$run/config.new"
    set_key "$run/config.new" train steps "$steps"
    set_key "$run/config.new" train decay $((steps / 4))
    set_key "$run/config.new" train lr "$lr"
    mv "$run/config.new" "$run/config.toml"
}

# The arm whose learning rate an ARM has: of all shares that of a half, of random clusters k-means'.
rate_arm() {
    local base=${1%-seed*}
    base=${base/random/k}
    case $1 in
        *-seed*) echo "$base-seed50";;
        *) echo "$base";;
    esac
}

# The learning rate of an ARM, once it has been chosen.
rate() {
    awk -v arm="$(rate_arm "$1")" '$1 == arm { print $2 }' "$RUNS/lr/chosen"
}

# A seed of so many steps: train_seed STEPS SEED. It resumes from the longest shorter one.
train_seed() {
    local steps=$1 seed=$2 run=$RUNS/seeds/$1-$2 shorter
    if [ -e "$run/done" ]; then return; fi
    folder "$run" k4 "$seed" 1000000 "$(rate monolith)"
    shorter=$(ls "$RUNS/seeds" | awk -F - -v s="$steps" -v n="$seed" \
        '$2 == n && $1 < s + 0 { print $1 }' | sort -n | tail -n 1)
    if [ ! -e "$run/checkpoints" ] && [ -e "$RUNS/seeds/$shorter-$seed/done" ]; then
        cp -r "$RUNS/seeds/$shorter-$seed/checkpoints" "$run/"
    fi
    python train_expert.py --run-dir "$run" --shard seed --train.seed_steps "$steps"
    touch "$run/done"
}

# The folder of an arm: open_arm RUN ARM SEED STEPS LR.
open_arm() {
    local run=$1 arm=$2 seed=$3 steps=$4 lr=$5 seed_steps
    folder "$run" "$(kind "$arm")" "$seed" "$steps" "$lr"
    seed_steps=$((steps * $(share "$arm") / 100))
    if [ $seed_steps != 0 ]; then
        set_key "$run/config.toml" train seed_steps $seed_steps
        ln -sfn "$RUNS/seeds/$seed_steps-$seed/experts/seed.safetensors" \
            "$run/experts/seed.safetensors"
    fi
}

# Copies an arm of the short runs, without what was measured: take_over FROM TO.
take_over() {
    if [ ! -e "$1" ] || [ -e "$2" ]; then return; fi
    rm -rf "$2.new"
    cp -r "$1" "$2.new"
    rm -rf "$2.new/loss"
    mv "$2.new" "$2"
}

# Prints the trainings of an arm: of its experts, or of the monolith.
trainings() {
    local run=$1 arm=$2 kind k
    if [ "${arm%-seed*}" = monolith ]; then
        echo "train_expert.py --run-dir $run --shard all"
        return
    fi
    kind=$(kind "$arm")
    for ((k = 0; k < ${kind##*[a-z]}; k++)); do
        echo "train_expert.py --run-dir $run --shard $k"
    done
}

# Brings what an arm is evaluated with, and the logs of what it has cost: the router of its
# clusters, its seed's log, and its monolith, if that is there yet.
complete() {
    local run=$1 arm=$2 seed=$3 steps=$4 seed_steps router monolith=$RUNS/$4/monolith-$3
    seed_steps=$((steps * $(share "$arm") / 100))
    if [ $seed_steps != 0 ]; then
        ln -sfn "$RUNS/seeds/$seed_steps-$seed/logs/expert-seed.csv" "$run/logs/"
    fi
    if [ "${arm%-seed*}" = monolith ]; then return; fi
    router=$RUNS/$steps/router/$(kind "$arm")-$seed
    ln -sfn "$router/router.safetensors" "$run/"
    ln -sfn "$router/logs/router.csv" "$run/logs/"
    if [ -e "$monolith/experts/all.safetensors" ]; then
        ln -sfn "$monolith/logs/expert-all.csv" "$run/logs/"
        # it knows no clusters, and was trained in the folder of others
        python bench/claim.py --adopt "$monolith/experts/all.safetensors" "$run"
    fi
}

# evaluate RUN NAME FLAGS...: results in RUN/NAME. What is known of the images is shared by all.
evaluate() {
    local out=$1/$2
    if [ -e "$out/done" ]; then return; fi
    mkdir -p "$out" "$RUNS/reference"
    ln "$RUNS"/reference/* "$out/" 2> /dev/null || true
    python evaluate.py --run-dir "$1" --data "$VALIDATION" --out "$out" --batch 100 "${@:3}"
    ln "$out"/reference-* "$RUNS/reference/" 2> /dev/null || true
    touch "$out/done"
}

# Samples of one model: sample_arm RUN ARM STRATEGY CFG.
sample_arm() {
    local run=$1 arm=$2 strategy=$3 cfg=$4 model=ensemble
    if [ "${arm%-seed*}" = monolith ]; then model=monolith; fi
    evaluate "$run" "samples-$strategy-$cfg" --models $model --loss-images 0 --npz \
        --features "$RUNS/classifier" --samples "$SAMPLES" --solver ab2 --steps 20 \
        --strategy "$strategy" --cfg "$cfg"
}

# Prints the samplings of an arm at a length.
samplings() {
    local steps=$1 arm=$2 seed=$3 run=$RUNS/$1/$2-$3 strategies=top-1 cfgs=1 strategy cfg
    if [ "$steps" = "$LAST" ]; then
        if [ "${arm%-seed*}" != monolith ]; then strategies=$STRATEGIES; fi
        case " $GUIDED " in *" $arm "*) cfgs="1 $CFGS";; esac
    fi
    for strategy in $strategies; do
        for cfg in $cfgs; do echo "sample_arm $run $arm $strategy $cfg"; done
    done
}

# The longest arms with a calibrated router: one half of the held-out images fits the temperatures,
# the other half is measured.
calibrate() {
    local arm=$1 seed=$2 run=$RUNS/calibrated/$1-$2 half=$RUNS/calibrated/halves
    if [ -e "$run/done" ]; then return; fi
    rm -rf "$run"
    cp -r "$RUNS/$LAST/router/$(kind "$arm")-$seed" "$run"
    rm -rf "$run/experts"
    ln -sfn "$RUNS/$LAST/$arm-$seed/experts" "$run/experts"
    python train_router.py --run-dir "$run" --calibrate "$half/fit.tar"
    for on in true false; do
        VALIDATION=$half/test.tar evaluate "$run" "loss-$on" --samples 0 --loss-images 2500 \
            --router-calibration $on
        for strategy in full top-1 top-2 once; do
            evaluate "$run" "samples-$strategy-$on" --models ensemble --loss-images 0 \
                --npz --features "$RUNS/classifier" --samples "$SAMPLES" --solver ab2 --steps 20 \
                --strategy "$strategy" --cfg 1 --router-calibration $on
        done
    done
    touch "$run/done"
}

# Runs the lines of its input, JOBS at a time.
at_a_time() {
    xargs -P "$JOBS" -I LINE bash -euo pipefail -c LINE
}

export TRAIN VALIDATION RUNS FLAGS LAST SAMPLES
export -f kind share set_key cluster folder rate_arm rate train_seed open_arm trainings complete
export -f evaluate sample_arm calibrate

# ---- the experiment ----

# the monolith's, of which seeds are trained too, is among them
kinds=$(for arm in monolith $ARMS; do kind "$arm"; done | sort -u)
mkdir -p "$RUNS/lr" "$RUNS/seeds"
[ -e "$RUNS/classifier" ] ||
    python bench/classifier.py "$TRAIN" "$VALIDATION" "$RUNS/classifier"

# Clusters and routers of a length: stage STEPS SEEDS.
prepare() {
    local steps=$1 seeds=$2 seed kind run
    for seed in $seeds; do
        for kind in $kinds; do echo "cluster $kind $seed"; done
    done | at_a_time
    for seed in $seeds; do
        for kind in $kinds; do
            run=$RUNS/$steps/router/$kind-$seed
            folder "$run" "$kind" "$seed" "$steps" 2e-3
            [ "$kind" = k1 ] || echo "python train_router.py --run-dir $run"
        done
    done | at_a_time
}

# The best learning rate of each arm on a short run, by the loss of 500 images under `full`: first
# of the monolith, with which seeds are trained.
choose_rates() {
    local arm lr run
    for arm in monolith $(for arm in $ARMS; do rate_arm "$arm"; done | sort -u); do
        if [ -n "$(rate "$arm")" ]; then continue; fi
        if [ "$(share "$arm")" != 0 ]; then
            train_seed $((SHORT * $(share "$arm") / 100)) "$FIRST"
        fi
        for lr in $LRS; do
            run=$RUNS/lr/$arm-$lr
            open_arm "$run" "$arm" "$FIRST" "$SHORT" "$lr"
            trainings "$run" "$arm" | sed 's/^/python /'
        done | at_a_time
        for lr in $LRS; do
            mkdir -p "$RUNS/lr/$arm-$lr/logs"
            complete "$RUNS/lr/$arm-$lr" "$arm" "$FIRST" "$SHORT"
            echo "evaluate $RUNS/lr/$arm-$lr loss --samples 0 --loss-images 500 --seed 1"
        done | at_a_time
        python bench/claim.py --choose "$RUNS/lr" --arm "$arm" --rates $LRS >> "$RUNS/lr/chosen"
    done
}

draw() {
    python bench/claim.py "$RUNS" --lengths $LENGTHS --arms $ARMS --validation "$VALIDATION"
}

touch "$RUNS/lr/chosen"
prepare "$SHORT" "$FIRST"
choose_rates

for steps in $LENGTHS; do
    seeds=$SEEDS
    arms=$ARMS
    if [ "$steps" -gt 3200 ]; then
        seeds=$LONG_SEEDS
        arms=$LONG_ARMS
    fi
    prepare "$steps" "$seeds"

    # in the order of their lengths: each resumes from the one before
    for share in $(for arm in $arms; do share "$arm"; done | sort -nu); do
        if [ "$share" = 0 ]; then continue; fi
        for seed in $seeds; do echo "train_seed $((steps * share / 100)) $seed"; done | at_a_time
    done
    for seed in $seeds; do
        for arm in $arms; do
            # of that length, seed and rate one is trained already
            if [ "$steps-$seed" = "$SHORT-$FIRST" ]; then
                take_over "$RUNS/lr/$arm-$(rate "$arm")" "$RUNS/$steps/$arm-$seed"
            fi
            open_arm "$RUNS/$steps/$arm-$seed" "$arm" "$seed" "$steps" "$(rate "$arm")"
            trainings "$RUNS/$steps/$arm-$seed" "$arm" | sed 's/^/python /'
        done
    done | at_a_time
    for seed in $seeds; do
        for arm in $arms; do
            complete "$RUNS/$steps/$arm-$seed" "$arm" "$seed" "$steps"
            echo "evaluate $RUNS/$steps/$arm-$seed loss --samples 0 --loss-images 2500"
            samplings "$steps" "$arm" "$seed"
        done
    done | at_a_time
    draw
done

mkdir -p "$RUNS/calibrated/halves"
python bench/claim.py --halve "$VALIDATION" "$RUNS/calibrated/halves"
# of the last length
for seed in $seeds; do
    for arm in $arms; do
        case " ${GUIDED//monolith/} " in *" $arm "*) echo "calibrate $arm $seed";; esac
    done
done | at_a_time
draw
