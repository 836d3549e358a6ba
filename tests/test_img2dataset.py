"""img2dataset for real: images from a server on the loopback, dead links among them, clustered and
trained on as they came.
"""
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


def publish(files, site, address):
    """Puts the images into the folder that is served -> the lines of a list of URLs and captions.
    """
    lines = ["url\tcaption"]
    images = sorted(name for name in files if name.endswith(".png"))
    for i, name in enumerate(images[:160]):
        # every tenth link is dead
        if i % 10:
            (site / name).write_bytes(files[name])
        caption = files[name.replace(".png", ".txt")].decode()
        lines.append(f"{address}/{name}\t{caption}")
    return lines


def img2dataset(urls, folder):
    """Runs it as a user would, without a proxy between it and the loopback."""
    options = {
        "url_list": urls,
        "input_format": "tsv",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "output_folder": folder,
        "processes_count": 1,
        "thread_count": 8,
        "image_size": 8,
        "resize_mode": "center_crop",
        "encode_format": "png",
        "encode_quality": 9,
        "number_sample_per_shard": 50,
        "timeout": 20,
    }
    tool = os.path.join(os.path.dirname(sys.executable), "img2dataset")
    flags = [f"--{name}={value}" for name, value in options.items()]
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment |= {"NO_ALBUMENTATIONS_UPDATE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([tool, *flags], cwd=folder.parent, env=environment, capture_output=True,
                          text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_what_img2dataset_writes_is_what_we_read(tars, config, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    lines = publish(members(tars), site, f"http://127.0.0.1:{server.server_address[1]}")
    (tmp_path / "urls.tsv").write_text("\n".join(lines))
    out = tmp_path / "out"
    try:
        img2dataset(tmp_path / "urls.tsv", out)
    finally:
        server.shutdown()
    assert len(glob.glob(str(out / "*.tar"))) == 4
    before = sorted(os.listdir(out))

    run = tmp_path / "run"
    done = command("cluster.py", "--data", out / "*.tar", "--run-dir", run, "--config", config)
    assert "144 images in 4 tars" in done.stdout
    # its resume trips over files that are not its own
    assert sorted(os.listdir(out)) == before

    parts = {}
    for k in range(3):
        parts |= members(run / "shards" / str(k))
    assert parts == members(out)
    assert sum(name.endswith(".json") for name in parts) == 144
    command("train_expert.py", "--run-dir", run, "--shard", 0, "--train.steps", 4)
    command("train_router.py", "--run-dir", run, "--train.steps", 4)
    command("sample.py", "--run-dir", run, "--prompt", "a red circle", "--out", tmp_path / "x.png")
