"""What a user's mistake gets: one line that names it, both values and the remedy.

Exit code 2, no traceback, and nothing of the user's changed. What a config or a flag may be is in
test_config.py.
"""
import io
import json
import os
import shutil

import pytest
import safetensors.numpy
from conftest import command, inside, rewrite
from PIL import Image

import ddm.run
from ddm.tars import TarWriter


def error_lines(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


def refused(script, *args, says, process=False):
    """Runs a script that must fail; in this process, unless `process`."""
    done = command(script, *args, check=False) if process else inside(script, *args)
    lines = error_lines(done.stderr)
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == lines[0]
    for words in says:
        assert words in lines[0]


def listing(folder):
    """Every file below a folder, and when it was changed."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.append((path, path.stat().st_mtime_ns))
    return found


# ---- data and clustering -------------------------------------------------------------------------

def test_a_glob_that_matches_nothing(tmp_path):
    refused("cluster.py", "--data", tmp_path / "*.tar", "--run-dir", tmp_path / "run", process=True,
            says=["no tar matches", str(tmp_path / "*.tar")])
    assert not (tmp_path / "run").exists()


def test_a_folder_of_other_tars_is_not_mixed_with_new_ones(tars):
    before = listing(tars)
    refused("tools/shapes.py", "--out", tars, "--images", 100, "--per-tar", 100, process=True,
            says=["holds 2 other tars", "00001.tar"])
    assert listing(tars) == before


def test_two_inputs_of_one_name(tars, tmp_path):
    shutil.copytree(tars, tmp_path / "b")
    refused("cluster.py", "--data", tars / "*.tar", tmp_path / "b" / "*.tar",
            "--run-dir", tmp_path / "run", says=["two tars are named 00000.tar"])


def test_a_misspelt_key_in_the_config_and_on_the_command_line(tars, tmp_path):
    (tmp_path / "x.toml").write_text("[data]\nsise = 8\n")
    new = ("--data", tars / "*.tar", "--run-dir", tmp_path / "run")
    refused("cluster.py", *new, "--config", tmp_path / "x.toml", says=["data.sise", "data.size"])
    # sample.py's alone
    refused("cluster.py", *new, "--steps", 7, says=["unknown argument --steps"])
    refused("train_expert.py", "--shard", 0, "--train.stps", 5,
            says=["unknown argument --train.stps", "did you mean --train.steps?"])
    refused("train_expert.py", says=["--shard"])
    assert not (tmp_path / "run").exists()


def test_more_experts_than_fine_clusters(tars, config, tmp_path):
    new = ("cluster.py", "--data", tars / "*.tar", "--run-dir", tmp_path / "run",
           "--config", config)
    seven = ("--experts", 7, "--train.batch", 28)
    refused(*new, *seven, says=["7 experts", "there are 6", "cluster.fine_clusters = 6", "240"])

    done = command(*new, *seven, ranks=2, check=False, real=True)
    assert any(line.startswith("error: 7 experts") for line in error_lines(done.stderr))
    assert "peer" not in done.stderr

    # the calls that failed left nothing that stands in the way of the next one
    command(*new, "--experts", 2)


def test_an_empty_cluster(config, tmp_path):
    """160 copies of two images have no four clusters."""
    with TarWriter(str(tmp_path / "same.tar")) as tar:
        for i in range(160):
            png = io.BytesIO()
            Image.new("RGB", (8, 8), ("red", "blue")[i % 2]).save(png, "PNG")
            tar.add(f"{i:04d}.png", png.getvalue())
            tar.add(f"{i:04d}.txt", b"x")

    refused("cluster.py", "--data", tmp_path / "same.tar", "--run-dir", tmp_path / "run",
            "--config", config, "--experts", 4, "--cluster.fine_clusters", 4,
            says=["of 4 is empty", "fewer --experts"])
    assert not (tmp_path / "run" / "config.toml").exists()


def test_a_run_made_with_another_config_or_of_other_data(tars, config, clustered):
    before = listing(clustered)
    refused("cluster.py", "--data", tars / "*.tar", "--run-dir", clustered, "--config", config,
            "--train.lr", 0.5, says=["made with another config", "train.lr 0.001 / 0.5"])
    refused("cluster.py", "--data", tars / "00000.tar", "--run-dir", clustered,
            says=["clustered from other data", "3 tars, now 1"])
    assert listing(clustered) == before


@pytest.mark.parametrize("old, new", [
    ('assign = "coarse"', 'assign = "random"'),
    ("experts = 3", "experts = 2"),
])
def test_a_config_that_was_edited_after_clustering(tars, clustered, tmp_path, old, new):
    run = shutil.copytree(clustered, tmp_path / "run")
    text = (run / "config.toml").read_text()
    assert old in text
    (run / "config.toml").write_text(text.replace(old, new))
    before = listing(run / "shards")
    refused("cluster.py", "--data", tars / "*.tar", "--run-dir", run,
            says=["other [cluster] settings"])
    assert listing(run / "shards") == before


def test_clusters_that_are_not_of_this_format(tars, clustered, tmp_path):
    run = shutil.copytree(clustered, tmp_path / "run")
    path = run / "clusters.safetensors"
    about = ddm.run.read_clusters(run) | {"extractor": "pixels: a thumbnail"}
    centroids = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(centroids, path, metadata={"nanoddm": json.dumps(about)})
    refused("cluster.py", "--data", tars / "*.tar", "--run-dir", run,
            says=["clusters.safetensors", "extractor", "--run-dir"])


def test_a_partition_whose_clusters_are_gone(tars, clustered, tmp_path):
    run = shutil.copytree(clustered, tmp_path / "run")
    os.remove(run / "clusters.safetensors")
    refused("cluster.py", "--data", tars / "*.tar", "--run-dir", run,
            says=["clusters.safetensors is missing"])
    refused("train_expert.py", "--run-dir", run, "--shard", 0, says=["clusters.safetensors"])


def test_an_image_size_that_the_patch_does_not_divide(tars, config, clustered, tmp_path):
    refused("cluster.py", "--data", tars / "*.tar", "--run-dir", tmp_path / "run",
            "--config", config, "--data.size", 9, says=["size 9", "patch 2"])
    refused("train_expert.py", "--run-dir", clustered, "--shard", 0, "--data.size", 9,
            says=["size 9", "patch 2", "data.size"])


# ---- training ------------------------------------------------------------------------------------

def test_a_shard_that_does_not_exist(clustered):
    before = listing(clustered)
    refused("train_expert.py", "--run-dir", clustered, "--shard", 7, process=True,
            says=["no shard '7'", "there are 0, 1, 2"])
    assert listing(clustered) == before


def test_a_run_that_does_not_exist(tmp_path):
    nowhere = ("--run-dir", tmp_path / "none")
    refused("train_expert.py", *nowhere, "--shard", 0, says=["no run at", "cluster.py"])
    refused("train_router.py", *nowhere, says=["no run at", "cluster.py"])
    refused("sample.py", *nowhere, "--prompt", "x", says=["there is no folder", "--run-dir"])
    assert not (tmp_path / "none").exists()


def test_a_batch_that_does_not_divide(clustered, tmp_path):
    refused("train_expert.py", "--run-dir", clustered, "--shard", 0, "--train.batch", 25,
            says=["train.batch = 25", "3 experts"])

    run = shutil.copytree(clustered, tmp_path / "run")
    done = command("train_router.py", "--run-dir", run, "--train.batch", 25, ranks=2, check=False,
                   real=True)
    # torchrun makes 1 of any code
    assert done.returncode == 1
    line, = error_lines(done.stderr)
    assert "25 cannot be shared by 2 ranks" in line


def test_a_preset_and_a_device_that_do_not_exist(clustered):
    training = ("train_expert.py", "--run-dir", clustered, "--shard", 0)
    refused(*training, "--model.preset", "DiT-M/2", says=["DiT-M/2", "DiT-B/2"])
    refused(*training, "--device", "tpu", says=["tpu"])


def test_a_checkpoint_of_other_settings(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    refused("train_expert.py", "--run-dir", run, "--shard", 0, "--train.seed", 1,
            "--model.dim", 64, says=["train.seed 0 / 1", "model.dim 32 / 64", "delete"])


# ---- sampling ------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, says", [
    ({"fingerprint": "0123"}, ["1.safetensors", "do not fit together", "fingerprint", "'0123'"]),
    ({"shift": 3.0}, ["different shifts (0: 1.0, 1: 3.0, 2: 1.0)", "--shift"]),
    ({"path": "cubic"}, ["1.safetensors has path = 'cubic'", "linear, cosine, ddpm"]),
    ({"shard": "2"}, ["1.safetensors was trained on shard 2", "name it 2.safetensors"]),
])
def test_models_that_do_not_fit_together(trained, tmp_path, changes, says):
    run = shutil.copytree(trained, tmp_path / "run")
    rewrite(run / "experts" / "1.safetensors", **changes)
    refused("sample.py", "--run-dir", run, "--prompt", "x", "--require-all", says=says)


def test_a_run_of_damaged_models(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    sampling = ("sample.py", "--run-dir", run, "--prompt", "x")
    for k in range(3):
        (run / "experts" / f"{k}.safetensors").write_bytes(b"garbage")
    refused(*sampling, says=["0.safetensors is not a model"])

    shutil.copytree(trained / "experts", run / "experts", dirs_exist_ok=True)
    (run / "experts" / "7.safetensors").write_bytes(b"garbage")
    refused(*sampling, says=["7.safetensors does not belong", "3 clusters"])

    whole = (trained / "router.safetensors").read_bytes()
    (run / "router.safetensors").write_bytes(whole[:-1])
    refused(*sampling, says=["router.safetensors is not a model"])


def test_files_that_stand_where_models_do(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    expert = run / "experts" / "1.safetensors"
    expert.write_bytes(b"")
    # nobody has so many experts
    (run / "experts" / "1234567.safetensors").write_bytes(b"")
    sampling = ("sample.py", "--run-dir", run, "--prompt", "x", "--require-all")
    refused(*sampling,
            says=["no usable expert for cluster 1 of 3", "1.safetensors is not a model"])
    rewrite(trained / "experts" / "1.safetensors", expert, autoencoder="pixels")
    refused(*sampling, says=["1.safetensors is not a model", "autoencoder is no table"])

    (run / "config.toml").unlink()
    (run / "config.toml").mkdir()
    refused("sample.py", "--run-dir", run, "--prompt", "x", says=["config.toml", "is a folder"])
    refused("sample.py", "--run-dir", trained / "config.toml", "--prompt", "x",
            says=["there is no folder"])


def test_prompts_that_cannot_be_read(trained, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \r\n")
    (tmp_path / "latin.txt").write_bytes("été".encode("latin-1"))
    (tmp_path / "utf-16.txt").write_bytes("a red circle".encode("utf-16-le"))
    mistakes = [
        (["--prompts", tmp_path / "none.txt"], ["none.txt"]),
        (["--prompts", tmp_path / "empty.txt"], ["holds no prompt"]),
        (["--prompts", tmp_path / "latin.txt"], ["latin.txt", "UTF-8"]),
        (["--prompts", tmp_path / "utf-16.txt"], ["utf-16.txt", "zero bytes"]),
        (["--prompts", tmp_path], ["is a folder"]),
        (["--prompt", "caf\udce9"], ["--prompt 'caf\\udce9' is not UTF-8"]),
        (["--prompt", "x", "--negative-prompt", "\udcff"], ["--negative-prompt", "is not UTF-8"]),
        ([], ["--prompt TEXT"]),
        (["--class", 3], ["condition = text", "--prompt"]),
    ]
    for flags, says in mistakes:
        refused("sample.py", "--run-dir", trained, "--out", tmp_path / "out", *flags, says=says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, says", [
    (["--strategy", "best"], ["strategy 'best'", "top-N", "full", "once"]),
    (["--strategy", "top-4"], ["'top-4' asks for 4 experts of 3"]),
    (["--strategy", "sample-9"], ["'sample-9' asks for 9 experts of 3"]),
    (["--strategy", "oracle-3"], ["'oracle-3': there is no expert 3, but 0, 1, 2"]),
    (["--router-temperature", 0], ["sample.router_temperature = 0.0 must be"]),
    (["--cfg-low", 0.8, "--cfg-high", 0.2], ["cfg_low 0.8", "cfg_high 0.2"]),
    (["--cfg-high", 5], ["cfg_high 5.0", "<= 1"]),
    (["--route-epsilon", 3, "--route-every", 2], ["route_epsilon 3.0"]),
    (["--seed", 2 ** 64], ["--seed 18446744073709551616"]),
    (["--num-images", 0], ["--num-images 0"]),
])
def test_wrong_wishes_of_sample(trained, tmp_path, flags, says):
    refused("sample.py", "--run-dir", trained, "--prompt", "x", "--out", tmp_path / "out", *flags,
            says=says)
    assert not (tmp_path / "out").exists()


def test_a_run_that_lacks_its_router_or_its_monolith(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    sampling = ("sample.py", "--run-dir", run, "--prompt", "x")
    os.remove(run / "router.safetensors")
    refused(*sampling, says=["router.safetensors is missing", "train_router.py"])
    shutil.rmtree(run / "experts")
    refused(*sampling, "--monolith", says=["all.safetensors is missing", "--shard all"])


# ---- help ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", [
    "cluster.py", "cache_latents.py", "train_expert.py", "train_router.py", "sample.py",
    "evaluate.py", "distill.py"])
def test_help_says_what_a_script_reads_and_writes(script):
    text = inside(script, "--help").stdout
    assert script in text and "reads " in text and "writes " in text
