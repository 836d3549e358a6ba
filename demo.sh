#!/usr/bin/env bash
# The whole method on two CPU cores: drawn images, four isolated experts, a router, samples.
#
#   make demo           installs what it needs, then runs this: at most six minutes
#   bash demo.sh more   afterwards: every strategy in numbers, and one dense student
#
# Reads as a tutorial; every line can be typed by hand.
set -euo pipefail
cd "$(dirname "$0")"
RUN=runs/demo

# the packages that make demo has installed
if [ -d .venv ]; then
    PATH=$PWD/.venv/bin:$PATH
fi

# this size is faster on a CPU, and the same everywhere
export CUDA_VISIBLE_DEVICES=

demo() {
    # 0. The data: 6,000 captioned images as tar shards, the layout that img2dataset writes.
    #    Most captions name colour and shape, "a red circle"; a third the shape alone, "a circle".
    python tools/shapes.py --out data/shapes --images 6000 --size 16

    # 1. Cluster: features, k-means, and a folder of shards for each of four experts.
    python cluster.py --data 'data/shapes/*.tar' --run-dir $RUN --config configs/demo.toml

    # 2. Train the experts. They never talk to each other: on four nodes it would be a line each.
    #    Here two run at a time, a core each; should one fail, the other is not left behind.
    trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
    OMP_NUM_THREADS=1 python train_expert.py --run-dir $RUN --shard 0 &
    OMP_NUM_THREADS=1 python train_expert.py --run-dir $RUN --shard 1
    wait $!
    OMP_NUM_THREADS=1 python train_expert.py --run-dir $RUN --shard 2 &
    OMP_NUM_THREADS=1 python train_expert.py --run-dir $RUN --shard 3
    wait $!

    # 3. Train the router: which expert does a noisy image belong to?
    python train_router.py --run-dir $RUN

    # 4. Sample: four images of each of 28 prompts; under each the expert that made it.
    for shape in circle square triangle cross; do
        echo "a $shape"
        for colour in red green blue yellow purple white; do
            echo "a $colour $shape"
        done
    done > $RUN/prompts.txt
    python sample.py --run-dir $RUN --prompts $RUN/prompts.txt --out $RUN/samples/demo

    # Look inside: what is predicted along the path, and what the router says. The prompt names no
    # colour, so it is the noise that decides, and the router follows.
    python sample.py --run-dir $RUN --prompt "a circle" --seed 12 --strategy full --show-routing \
        --out $RUN/samples/routing

    # 5. Does each image show what its prompt says? Colour and shape are told by a program that
    #    shares no code with the drawing. Expect 98% of the colours and 95% of the shapes or more.
    python bench/check_shapes.py $RUN/samples/demo --least 0.95 0.9

    echo "Look at $RUN/clusters.png, $RUN/samples/demo/grid.png and" \
        "$RUN/samples/routing/routing.png. Next: bash demo.sh more"
}

more() {
    # 6. Every strategy, on images that nobody trained on. They differ where a caption leaves the
    #    colour open: look at the share of each cluster, and at the loss where t is near 1.
    python tools/shapes.py --out data/shapes-held-out --images 500 --size 16 --seed 1000
    python evaluate.py --run-dir $RUN --data 'data/shapes-held-out/*.tar' --table strategies \
        --samples 200 --loss-images 100

    # 7. Distil: one dense student of the four experts, which begins as a copy of the one with the
    #    largest cluster. It needs no router.
    python distill.py --run-dir $RUN --init 2 --train.steps 800 --train.decay 400 --train.warmup 0
    python sample.py --run-dir $RUN --student --prompts $RUN/prompts.txt --out $RUN/samples/student
    python bench/check_shapes.py $RUN/samples/student

    # 8. The ensemble beside its student: samples, losses, the router's answers by noise level, and
    #    what each training did cost.
    python evaluate.py --run-dir $RUN --data 'data/shapes-held-out/*.tar' \
        --samples 200 --loss-images 100

    echo "Look at $RUN/evaluation/strategies.md, $RUN/evaluation/models.md and" \
        "$RUN/samples/student/grid.png."
}

case ${1:-} in
    "") demo;;
    more) more;;
    *) echo "usage: bash demo.sh [more]" >&2; exit 2;;
esac
echo "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s."
