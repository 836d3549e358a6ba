#!/usr/bin/env bash
# The whole method in ten to twenty minutes on two CPU cores: a drawn data set, four isolated experts, a router, samples from prompts, a student.
# Reads as a tutorial; every line can be typed by hand. `make demo` installs what it needs first.
set -euo pipefail
cd "$(dirname "$0")"
RUN=runs/demo
export CUDA_VISIBLE_DEVICES=          # this size is faster on a CPU, and the same everywhere

# 0. The data: 6,000 captioned pictures ("a red circle") as tar shards, the layout that img2dataset writes.
python data.py --out data/shapes --images 6000 --size 16

# 1. Cluster: features, k-means, and a folder of shards for each of four experts. Look at runs/demo/clusters.png.
python cluster.py --data 'data/shapes/*.tar' --run-dir $RUN --config configs/demo.toml

# 2. Train the experts. They never talk to each other, so here two run at a time, a core each; on four nodes it would be a line each.
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT     # should one fail, do not leave the other behind
THREADS=${OMP_NUM_THREADS:-}
export OMP_NUM_THREADS=1
python train_expert.py --run-dir $RUN --shard 0 &
python train_expert.py --run-dir $RUN --shard 1
wait $!
python train_expert.py --run-dir $RUN --shard 2 &
python train_expert.py --run-dir $RUN --shard 3
wait $!
if [ "$THREADS" ]; then export OMP_NUM_THREADS=$THREADS; else unset OMP_NUM_THREADS; fi

# 3. Train the router: which expert does a noisy picture belong to?
python train_router.py --run-dir $RUN

# 4. Sample: four pictures of each of 24 prompts; under each the expert that drew it.
for colour in red green blue yellow purple white; do
    for shape in circle square triangle cross; do echo "a $colour $shape"; done
done > $RUN/prompts.txt
python sample.py --run-dir $RUN --prompts $RUN/prompts.txt --num-images 4 --out $RUN/samples/demo

# Look inside: what is predicted along the path, and what the router says. Without a prompt it is the noise that decides.
python sample.py --run-dir $RUN --prompt "" --num-images 4 --seed 6 --strategy full --show-routing --out $RUN/samples/routing

# 5. Numbers: does each picture show what its prompt says? (A check by colour and shape that shares no code with the drawing.) Then the losses on
# pictures that nobody trained on, the router's answers by noise level, and what each training did cost.
python bench/check_shapes.py $RUN/samples/demo --least 0.95 0.8
python data.py --out data/shapes-held-out --images 500 --size 16 --seed 1000
python evaluate.py --run-dir $RUN --data 'data/shapes-held-out/*.tar' --samples 200 --steps 20 --loss-images 100

# 6. Distil: one dense student from the four experts, which starts as a copy of the one with the largest cluster. It needs no router.
python distill.py --run-dir $RUN --init 2 --train.steps 400 --train.decay 200 --train.warmup 0
python sample.py --run-dir $RUN --student --prompts $RUN/prompts.txt --num-images 4 --out $RUN/samples/student
python bench/check_shapes.py $RUN/samples/student

echo "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Look at $RUN/clusters.png, $RUN/samples/demo/grid.png, $RUN/samples/student/grid.png,"
echo "$RUN/samples/routing/routing.png and $RUN/evaluation/models.md."
