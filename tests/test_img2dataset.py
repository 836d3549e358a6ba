"""img2dataset for real: pictures from a server on the loopback, dead links among them, clustered and trained on as they came."""
import functools
import glob
import http.server
import os
import subprocess
import sys
import threading

from conftest import command
from test_pipeline import members


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_what_img2dataset_writes_is_what_we_read(tars, config, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    files = members(tars)
    urls = ["url\tcaption"]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for i, (name, payload) in enumerate(sorted((n, p) for n, p in files.items() if n.endswith(".png"))[:160]):
        if i % 10:      # every tenth link is dead
            (site / name).write_bytes(payload)
        urls.append(f"http://127.0.0.1:{server.server_address[1]}/{name}\t{files[name[:-3] + 'txt'].decode()}")
    (tmp_path / "urls.tsv").write_text("\n".join(urls))
    options = dict(url_list=tmp_path / "urls.tsv", input_format="tsv", url_col="url", caption_col="caption", output_format="webdataset",
                   output_folder=tmp_path / "out", processes_count=1, thread_count=8, image_size=8, resize_mode="center_crop",
                   encode_format="png", encode_quality=9, number_sample_per_shard=50, timeout=20)
    tool = os.path.join(os.path.dirname(sys.executable), "img2dataset")
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | {"NO_ALBUMENTATIONS_UPDATE": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run([tool, *(f"--{k}={v}" for k, v in options.items())], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert len(glob.glob(str(tmp_path / "out" / "*.tar"))) == 4
    before = sorted(os.listdir(tmp_path / "out"))

    run = tmp_path / "run"
    assert "144 images in 4 tars" in command("cluster.py", "--data", tmp_path / "out" / "*.tar", "--run-dir", run, "--config", config).stdout
    assert sorted(os.listdir(tmp_path / "out")) == before       # its resume trips over files that are not its own
    parts = {name: payload for k in range(3) for name, payload in members(run / "shards" / str(k)).items()}
    assert parts == members(tmp_path / "out") and sum(name.endswith(".json") for name in parts) == 144
    command("train_expert.py", "--run-dir", run, "--shard", 0, "--train.steps", 4)
    command("train_router.py", "--run-dir", run, "--train.steps", 4)
    command("sample.py", "--run-dir", run, "--prompt", "a red circle", "--out", tmp_path / "x.png")
