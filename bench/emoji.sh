#!/usr/bin/env bash
# Real images with captions: 1,405 emoji, four experts, about an hour on 2 cores. In pixel space at
# 32 pixels; or, with an autoencoder and a text encoder given, as cached latents at 64 pixels under
# that encoder's token features.
#
#     bash bench/emoji.sh 'EMOJI/*.tar' runs/emoji
#     bash bench/emoji.sh 'EMOJI/*.tar' runs/emoji-latents AUTOENCODER TEXT_ENCODER
#
# EMOJI: captioned emoji as img2dataset-style tars (KEY.png, KEY.txt); here googlefonts/noto-emoji,
# png/128, with Unicode names.
# AUTOENCODER: a folder in diffusers' format (here an AutoencoderKL of 0.5M, 64x64x3 -> 16x16x4,
# trained on such images); TEXT_ENCODER: one in transformers' format (here all-MiniLM-L6-v2, a BERT
# of 22M).
set -euo pipefail

DATA=$1
RUN=${2:-runs/emoji}
cd "$(dirname "$0")/.."
export CUDA_VISIBLE_DEVICES=

if [ $# -gt 2 ]; then
    SPACE=(--data.size 64 --text.length 16 --autoencoder.name "$3" --text.name "$4"
           --model.preset mini/2 --router.preset tiny/2
           --train.router.steps 500 --train.router.decay 250)
else
    SPACE=(--data.size 32 --text.length 12 --text.vocab 8192
           --model.preset mini/4 --router.preset tiny/4
           --train.router.steps 120 --train.router.decay 60)
fi
python cluster.py --data "$DATA" --run-dir "$RUN" --config configs/demo.toml --data.flip false \
    "${SPACE[@]}" --train.steps 2000 --train.decay 800 --train.batch 128 --train.lr 1e-3 \
    --train.warmup 50 --train.save_every 500
if [ $# -gt 2 ]; then
    for k in 0 1 2 3 router; do
        python cache_latents.py --run-dir "$RUN" --shard $k --captions
    done
fi

# should one fail, do not leave the other behind
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
# two experts at a time, a core each
export OMP_NUM_THREADS=1
for k in 0 2; do
    next=$((k + 1))
    python train_expert.py --run-dir "$RUN" --shard $k > "$RUN/expert-$k.log" 2>&1 &
    python train_expert.py --run-dir "$RUN" --shard $next > "$RUN/expert-$next.log" 2>&1
    wait $!
done
unset OMP_NUM_THREADS
python train_router.py --run-dir "$RUN" --data.workers 1

cat > "$RUN/prompts.txt" <<END
grinning face
pig face
blue heart
green apple
tulip
octopus
soccer ball
automobile
clock face one oclock
large red circle
END
for strategy in top-1 once; do
    python sample.py --run-dir "$RUN" --prompts "$RUN/prompts.txt" --num-images 8 \
        --strategy $strategy --out "$RUN/samples/$strategy"
done
