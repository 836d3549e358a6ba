#!/usr/bin/env bash
# Does the ensemble beat the monolith at equal compute? For each seed (of clustering and training)
# one monolith (batch B), K experts (batch B/K each, the same steps) and a router; with the first
# seed also random clusters as a control and a distilled student (a quarter of the batch). Then the
# paired validation loss, Frechet distances and the ledger of each, and a table and figure of all.
#
#     # about two hours on 2 cores
#     bash bench/flop_for_flop.sh 'CIFAR/0000[0-8].tar' CIFAR/00009.tar runs/flops
#     # about eight
#     bash bench/flop_for_flop.sh TRAIN VALIDATION RUNS --train.steps 3200 --train.decay 1600
#     # on one GPU
#     JOBS=1 bash bench/flop_for_flop.sh TRAIN VALIDATION RUNS \
#         --experts 8 --model.preset DiT-S/2 --train.steps ...
#
# Everything after the third argument goes to cluster.py over bench/flop_for_flop.toml.
# SEEDS="0 1 2"; SAMPLES=2500 a row; JOBS=2 at a time, on one CPU core each. Run again after a kill,
# trainings resume; evaluations are made anew.
set -euo pipefail

TRAIN=$1
VALIDATION=$2
RUNS=$3
shift 3
SEEDS=${SEEDS:-0 1 2}
SAMPLES=${SAMPLES:-2500}
JOBS=${JOBS:-2}
FIRST=${SEEDS%% *}

cd "$(dirname "$0")/.."
if [ "$JOBS" -gt 1 ]; then export OMP_NUM_THREADS=1; fi
mkdir -p "$RUNS"

for seed in $SEEDS random; do
    if [ -e "$RUNS/$seed/clusters.png" ]; then continue; fi
    assign=coarse
    number=$seed
    if [ "$seed" = random ]; then
        assign=random
        number=$FIRST
    fi
    python cluster.py --data "$TRAIN" --run-dir "$RUNS/$seed" --config bench/flop_for_flop.toml \
        --cluster.assign $assign --cluster.seed "$number" --train.seed "$number" "$@"
done

# A training that is finished says so and ends; the longest come first.
for seed in $SEEDS random; do
    K=$(sed -n 's/^experts = //p' "$RUNS/$seed/config.toml")
    if [ "$seed" != random ]; then
        echo "train_expert.py --run-dir $RUNS/$seed --shard all"
    fi
    for k in $(seq 0 $((K - 1))); do
        echo "train_expert.py --run-dir $RUNS/$seed --shard $k"
    done
    echo "train_router.py --run-dir $RUNS/$seed"
done | xargs -P "$JOBS" -L 1 python

CLASSIFIER=$RUNS/classifier
{
    [ -e "$CLASSIFIER" ] || echo "bench/classifier.py $TRAIN $VALIDATION $CLASSIFIER"
    echo "distill.py --run-dir $RUNS/$FIRST"
} | xargs -P "$JOBS" -L 1 python

for seed in $SEEDS random; do
    echo "evaluate.py --run-dir $RUNS/$seed --data $VALIDATION --features $CLASSIFIER" \
        "--samples $SAMPLES --loss-images 1000 --solver ab2 --steps 20 --cfg 1" \
        "--strategy top-1 --batch 100 --npz"
done | xargs -P "$JOBS" -L 1 python

python bench/flop_for_flop.py "$RUNS" --seeds $SEEDS
python bench/equal_noise.py "$RUNS/$FIRST/evaluation/monolith.npz" \
    "$RUNS/$FIRST/evaluation/ensemble-top-1.npz" "$RUNS/equal_noise.png"
