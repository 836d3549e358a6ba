#!/usr/bin/env bash
# img2dataset for real, on real images: serves N images of captioned tars on the loopback, downloads
# them with img2dataset with every tenth link dead, then clusters and trains on what it wrote.
# (tests/test_img2dataset.py does the same with drawn shapes.)
#
#     bash bench/img2dataset.sh 'EMOJI/*.tar' SCRATCH [300]
set -euo pipefail

DATA=$1
OUT=$2
N=${3:-300}
cd "$(dirname "$0")/.."
export CUDA_VISIBLE_DEVICES= NO_ALBUMENTATIONS_UPDATE=1
mkdir -p "$OUT/site"

python - "$DATA" "$OUT" "$N" <<'END'
import glob
import os
import sys
import tarfile

data = sys.argv[1]
out = sys.argv[2]
count = int(sys.argv[3])

images = []
for path in sorted(glob.glob(data)):
    with tarfile.open(path) as tar:
        for member in tar:
            name = os.path.basename(member.name)
            with open(f"{out}/site/{name}", "wb") as f:
                f.write(tar.extractfile(member).read())
            if name.endswith((".png", ".jpg")):
                images.append(name)

with open(f"{out}/urls.tsv", "w") as f:
    f.write("url\tcaption\n")
    for i, name in enumerate(images[:count]):
        stem = os.path.splitext(name)[0]
        caption = open(f"{out}/site/{stem}.txt").read().strip()
        dead = "" if i % 10 else "dead-"
        f.write(f"http://127.0.0.1:8765/{dead}{name}\t{caption}\n")
END

python -m http.server --bind 127.0.0.1 8765 --directory "$OUT/site" > "$OUT/server.log" 2>&1 &
trap "kill $!" EXIT
sleep 2
img2dataset --url_list "$OUT/urls.tsv" --input_format tsv --url_col url --caption_col caption \
    --output_format webdataset --output_folder "$OUT/tars" --number_sample_per_shard 100 \
    --processes_count 1 --thread_count 8 --image_size 32 --resize_mode center_crop

python cluster.py --data "$OUT/tars/*.tar" --run-dir "$OUT/run" --experts 4 --data.size 32 \
    --model.preset tiny/4 --router.preset tiny/4 --train.batch 64 --train.steps 40 \
    --train.log_every 10 --train.lr 1e-3 --train.router.steps 20
python train_expert.py --run-dir "$OUT/run" --shard 0
python train_router.py --run-dir "$OUT/run"
python sample.py --run-dir "$OUT/run" --prompt "red heart" --num-images 4 --out "$OUT/grid.png"
