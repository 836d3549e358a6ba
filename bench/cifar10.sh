#!/usr/bin/env bash
# Real images with class labels: CIFAR-10's 50,000 in eight clusters; two of the experts and the
# router, a few hundred steps each, to show the path. Sampling then warns that six experts are
# missing and continues with two. About 15 minutes on 2 cores.
#
#     bash bench/cifar10.sh 'CIFAR/*.tar' runs/cifar10
set -euo pipefail

DATA=$1
RUN=${2:-runs/cifar10}
cd "$(dirname "$0")/.."
export CUDA_VISIBLE_DEVICES=

python cluster.py --data "$DATA" --run-dir "$RUN" --experts 8 \
    --data.condition class --data.classes 10 --model.preset tiny/4 --router.preset tiny/4 \
    --flow.objective x0 --flow.t_density logit-normal \
    --train.steps 400 --train.decay 200 --train.batch 256 --train.lr 2e-3 --train.warmup 20 \
    --train.router.steps 150 --train.router.decay 75

# should one fail, do not leave the other behind
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
export OMP_NUM_THREADS=1
python train_expert.py --run-dir "$RUN" --shard 0 &
python train_expert.py --run-dir "$RUN" --shard 1
wait $!
unset OMP_NUM_THREADS
python train_router.py --run-dir "$RUN"

CLASSES=()
for k in 0 1 2 3 4 5 6 7 8 9; do
    CLASSES+=(--class $k)
done
python sample.py --run-dir "$RUN" "${CLASSES[@]}" --num-images 8 --cfg 2 --steps 25 \
    --out "$RUN/samples/two-of-eight"
