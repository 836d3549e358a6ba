"""What a user's mistake gets: one line that names it, both values and the remedy; exit code 2; nothing changed, no traceback."""
import io
import json
import os
import re
import shutil
import tomllib

import pytest
import safetensors.numpy
from conftest import ROOT, command, inside, rewrite
from ddm import errors
import ddm.config
import ddm.run



def refused(script, *args, says, process=False):
    """Runs a script that must fail; in this process, unless `process`."""
    done = command(script, *args, check=False) if process else inside(script, *args)
    code, text = done.returncode, done.stderr
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in text, text
    assert text.splitlines()[-1] == lines[0]
    for words in says:
        assert words in lines[0], lines[0]


def listing(folder):
    return sorted((os.path.join(d, f), os.stat(os.path.join(d, f)).st_mtime_ns) for d, _, files in os.walk(folder) for f in files)


def test_a_glob_that_matches_nothing(tmp_path):
    refused("cluster.py", "--data", tmp_path / "*.tar", "--run-dir", tmp_path / "run", process=True,
            says=["no tar matches", str(tmp_path / "*.tar")])
    assert not (tmp_path / "run").exists()


def test_a_folder_of_other_tars_is_not_mixed_with_new_ones(tars):
    before = listing(tars)
    refused("tools/shapes.py", "--out", tars, "--images", 100, "--per-tar", 100, says=["holds 2 other tars", "00001.tar"])
    assert listing(tars) == before


def test_two_inputs_of_one_name(tars, tmp_path):
    shutil.copytree(tars, tmp_path / "b")
    refused("cluster.py", "--data", tars / "*.tar", tmp_path / "b" / "*.tar", "--run-dir", tmp_path / "run", says=["two tars are named 00000.tar"])


def test_a_shard_that_does_not_exist(clustered):
    before = listing(clustered)
    refused("train_expert.py", "--run-dir", clustered, "--shard", 7, process=True, says=["no shard '7'", "there are 0, 1, 2"])
    assert listing(clustered) == before


def test_a_run_that_does_not_exist(tmp_path):
    refused("train_expert.py", "--run-dir", tmp_path / "none", "--shard", 0, says=["no run at", "cluster.py"])
    refused("train_router.py", "--run-dir", tmp_path / "none", says=["no run at", "cluster.py"])
    refused("sample.py", "--run-dir", tmp_path / "none", "--prompt", "x", says=["there is no folder", "--run-dir"])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("text, says", [
    ("[train]\nstep = 5", ["unknown key train.step", "did you mean train.steps?"]),
    ("[trian]\nsteps = 5", ["unknown table [trian]", "did you mean train?"]),
    ("[train.router]\nstepz = 5", ["unknown key train.router.stepz", "train.router.steps"]),
    ("[train]\nsteps = 'many'", ["train.steps = 'many' is not a whole number"]),
    ("[train]\nsteps = 1.5", ["train.steps = 1.5 is not a whole number"]),
    ("[data]\ncondition = 'txt'", ["data.condition = 'txt' is not one of 'none', 'class', 'text'"]),
    ("[features]\npool = 'mean'", ["features.pool = 'mean' is not one of 'cls', 'cls+mean'"]),
    ("[train]\nlog_every = 0", ["train.log_every = 0 must be a number of at least 1"]),
    ("[train.router]\nbatch = 0", ["train.router.batch = 0 must be"]),
    ("[train]\nlr = nan", ["train.lr = nan must be"]),
    ("[text]\nvocab = 1", ["text.vocab = 1 must be", "2"]),
    ("steps = 5", ["unknown key steps"]),
    ("[train\n", ["cannot read config"]),
])
def test_a_wrong_config_file(tmp_path, text, says):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(errors.UserError) as error:
        ddm.config.read_toml(tmp_path / "x.toml")
    assert all(words in str(error.value) and "\n" not in str(error.value) for words in says), error.value


def test_a_misspelt_key_in_the_config_and_on_the_command_line(tars, tmp_path):
    (tmp_path / "x.toml").write_text("[data]\nsise = 8\n")
    refused("cluster.py", "--data", tars / "*.tar", "--run-dir", tmp_path / "run", "--config", tmp_path / "x.toml", says=["data.sise", "data.size"])
    refused("train_expert.py", "--shard", 0, "--train.stps", 5, says=["unknown argument --train.stps", "did you mean --train.steps?"])
    refused("cluster.py", "--data", tars / "*.tar", "--steps", 7, says=["unknown argument --steps"])       # sample.py's alone
    refused("train_expert.py", "--shard", 0, "--train.lr", "fast", says=["train.lr = 'fast' is not a number"])
    refused("train_expert.py", says=["--shard"])


def test_more_experts_than_fine_clusters(tars, config, tmp_path):
    refused("cluster.py", "--data", tars / "*.tar", "--run-dir", tmp_path / "run", "--config", config, "--experts", 7, "--train.batch", 28,
            says=["7 experts", "there are 6", "cluster.fine_clusters = 6", "240"])
    done = command("cluster.py", "--data", tars / "*.tar", "--run-dir", tmp_path / "run", "--config", config, "--experts", 7, "--train.batch", 28,
                   ranks=2, check=False, real=True)
    assert [line for line in done.stderr.splitlines() if line.startswith("error: 7 experts")] and "peer" not in done.stderr
    # the calls that failed left nothing that stands in the way of the next one
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", tmp_path / "run", "--config", config, "--experts", 2)


def test_an_empty_cluster(config, tmp_path):
    """160 copies of two pictures have no four clusters."""
    from ddm.tars import TarWriter
    from data import draw_shape, np
    with TarWriter(str(tmp_path / "same.tar")) as tar:
        for i in range(160):
            png = io.BytesIO()
            draw_shape(np.random.default_rng(i % 2), 8)[0].save(png, "PNG")
            tar.add(f"{i:04d}.png", png.getvalue())
            tar.add(f"{i:04d}.txt", b"x")
    refused("cluster.py", "--data", tmp_path / "same.tar", "--run-dir", tmp_path / "run", "--config", config, "--experts", 4, "--cluster.fine_clusters", 4,
            says=["of 4 is empty", "fewer --experts"])
    assert not (tmp_path / "run" / "config.toml").exists()


def test_a_run_made_with_another_config_or_of_other_data(tars, config, clustered, tmp_path):
    before = listing(clustered)
    refused("cluster.py", "--data", tars / "*.tar", "--run-dir", clustered, "--config", config, "--train.lr", 0.5,
            says=["made with another config", "train.lr 0.001 / 0.5"])
    refused("cluster.py", "--data", tars / "00000.tar", "--run-dir", clustered, says=["clustered from other data", "3 tars, now 1"])
    assert listing(clustered) == before


def test_a_config_that_was_edited_after_clustering(tars, clustered, tmp_path):
    run = shutil.copytree(clustered, tmp_path / "run")
    text = (run / "config.toml").read_text()
    for old, new in (('assign = "coarse"', 'assign = "random"'), ("experts = 3", "experts = 2")):
        assert old in text
        (run / "config.toml").write_text(text.replace(old, new))
        before = listing(run / "shards")
        refused("cluster.py", "--data", tars / "*.tar", "--run-dir", run, says=["other [cluster] settings"])
        assert listing(run / "shards") == before


def test_clusters_of_an_earlier_version(tars, clustered, tmp_path):
    run = shutil.copytree(clustered, tmp_path / "run")
    path, about = run / "clusters.safetensors", ddm.run.read_clusters(run)
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, metadata={"nanoddm": json.dumps(about | {"extractor": "pixels: a thumbnail"})})
    refused("cluster.py", "--data", tars / "*.tar", "--run-dir", run, says=["clusters.safetensors is damaged, or of another version", "extractor", "--run-dir"])


def test_a_partition_whose_clusters_are_gone(tars, clustered, tmp_path):
    run = shutil.copytree(clustered, tmp_path / "run")
    os.remove(run / "clusters.safetensors")
    refused("cluster.py", "--data", tars / "*.tar", "--run-dir", run, says=["clusters.safetensors is missing"])
    refused("train_expert.py", "--run-dir", run, "--shard", 0, says=["clusters.safetensors"])


def test_an_image_size_that_the_patch_does_not_divide(tars, config, clustered, tmp_path):
    refused("cluster.py", "--data", tars / "*.tar", "--run-dir", tmp_path / "run", "--config", config, "--data.size", 9, says=["size 9", "patch 2"])
    refused("train_expert.py", "--run-dir", clustered, "--shard", 0, "--data.size", 9, says=["size 9", "patch 2", "data.size"])


def test_a_batch_that_does_not_divide(clustered, tmp_path):
    refused("train_expert.py", "--run-dir", clustered, "--shard", 0, "--train.batch", 25, says=["train.batch = 25", "3 experts"])
    run = shutil.copytree(clustered, tmp_path / "run")
    done = command("train_router.py", "--run-dir", run, "--train.batch", 25, ranks=2, check=False, real=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 1 and "25 cannot be shared by 2 ranks" in lines[0]      # torchrun makes 1 of any code


def test_a_preset_and_a_device_that_do_not_exist(clustered):
    refused("train_expert.py", "--run-dir", clustered, "--shard", 0, "--model.preset", "DiT-M/2", says=["DiT-M/2", "DiT-B/2"])
    refused("train_expert.py", "--run-dir", clustered, "--shard", 0, "--device", "tpu", says=["tpu"])


def test_a_checkpoint_of_other_settings(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    refused("train_expert.py", "--run-dir", run, "--shard", 0, "--train.seed", 1, "--model.dim", 64,
            says=["train.seed 0 / 1", "model.dim 32 / 64", "delete"])


@pytest.mark.parametrize("changes, says", [
    ({"fingerprint": "0123"}, ["1.safetensors", "do not fit together", "fingerprint", "'0123'"]),
    ({"shift": 3.0}, ["different shifts (0: 1.0, 1: 3.0, 2: 1.0)", "--shift"]),
    ({"path": "cubic"}, ["1.safetensors has path = 'cubic'", "linear, cosine, ddpm"]),
    ({"shard": "2"}, ["1.safetensors was trained on shard 2", "name it 2.safetensors"])])
def test_models_that_do_not_fit_together(trained, tmp_path, changes, says):
    run = shutil.copytree(trained, tmp_path / "run")
    rewrite(run / "experts" / "1.safetensors", **changes)
    refused("sample.py", "--run-dir", run, "--prompt", "x", "--require-all", says=says)


def test_a_run_of_damaged_models(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    for k in range(3):
        (run / "experts" / f"{k}.safetensors").write_bytes(b"garbage")
    refused("sample.py", "--run-dir", run, "--prompt", "x", says=["0.safetensors is not a model"])
    shutil.copytree(trained / "experts", run / "experts", dirs_exist_ok=True)
    (run / "experts" / "7.safetensors").write_bytes(b"garbage")
    refused("sample.py", "--run-dir", run, "--prompt", "x", says=["7.safetensors does not belong", "3 clusters"])
    (run / "router.safetensors").write_bytes((trained / "router.safetensors").read_bytes()[:-1])
    refused("sample.py", "--run-dir", run, "--prompt", "x", says=["router.safetensors is not a model"])


def test_prompts_that_cannot_be_read(trained, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \r\n")
    (tmp_path / "latin.txt").write_bytes("été".encode("latin-1"))
    (tmp_path / "utf-16.txt").write_bytes("a red circle".encode("utf-16-le"))
    for flags, says in ((["--prompts", tmp_path / "empty.txt"], ["holds no prompt"]), (["--prompts", tmp_path / "latin.txt"], ["latin.txt", "UTF-8"]),
                        (["--prompts", tmp_path / "utf-16.txt"], ["utf-16.txt", "zero bytes"]), (["--prompts", tmp_path], ["is a folder"]),
                        (["--prompt", "caf\udce9"], ["--prompt 'caf\\udce9' is not UTF-8"]),
                        (["--prompt", "x", "--negative-prompt", "\udcff"], ["--negative-prompt", "is not UTF-8"])):
        refused("sample.py", "--run-dir", trained, "--out", tmp_path / "out", *flags, says=says)
    assert not (tmp_path / "out").exists()


def test_files_that_stand_where_models_do(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "experts" / "1.safetensors").write_bytes(b"")
    (run / "experts" / "1234567.safetensors").write_bytes(b"")      # nobody has so many experts
    refused("sample.py", "--run-dir", run, "--prompt", "x", "--require-all", says=["no usable expert for cluster 1 of 3", "1.safetensors is not a model"])
    rewrite(trained / "experts" / "1.safetensors", run / "experts" / "1.safetensors", autoencoder="pixels")
    refused("sample.py", "--run-dir", run, "--prompt", "x", "--require-all", says=["1.safetensors is not a model", "autoencoder is no table"])
    (run / "config.toml").unlink()
    (run / "config.toml").mkdir()
    refused("sample.py", "--run-dir", run, "--prompt", "x", says=["config.toml", "is a folder"])
    refused("sample.py", "--run-dir", trained / "config.toml", "--prompt", "x", says=["there is no folder"])


def test_wrong_wishes_of_sample(trained, tmp_path):
    for flags, says in ((["--prompt", "x", "--strategy", "best"], ["strategy 'best'", "top-N", "full", "once"]),
                        (["--prompt", "x", "--strategy", "top-4"], ["'top-4' asks for 4 experts of 3"]),
                        (["--prompt", "x", "--strategy", "sample-9"], ["'sample-9' asks for 9 experts of 3"]),
                        (["--prompt", "x", "--strategy", "oracle-3"], ["'oracle-3': there is no expert 3, but 0, 1, 2"]),
                        (["--prompt", "x", "--router-temperature", 0], ["sample.router_temperature = 0.0 must be"]),
                        (["--prompt", "x", "--negative-prompt", "y", "--cfg", 1], ["--negative-prompt needs guidance"]),
                        (["--prompt", "x", "--cfg-low", 0.8, "--cfg-high", 0.2], ["cfg_low 0.8", "cfg_high 0.2"]),
                        (["--prompt", "x", "--cfg-high", 5], ["cfg_high 5.0", "<= 1"]),
                        (["--prompt", "x", "--route-epsilon", 3, "--route-every", 2], ["route_epsilon 3.0"]),
                        (["--prompt", "x", "--route-epsilon", 0.1], ["--route-epsilon does nothing with --route-every 1"]),
                        (["--prompt", "x", "--route-every", 2, "--strategy", "once"], ["--route-every does nothing with --strategy once"]),
                        (["--prompt", "x", "--router-temperature", 2, "--monolith"], ["--router-temperature does nothing with --monolith"]),
                        (["--prompt", "x", "--cfg-low", 0.2, "--cfg", 1], ["--cfg-low does nothing with --cfg 1.0"]),
                        (["--prompt", "x", "--monolith", "--strategy", "once"], ["--monolith", "no --strategy once"]),
                        (["--prompt", "x", "--seed", 2 ** 64], ["--seed 18446744073709551616"]),
                        (["--class", 3], ["condition = text", "--prompt"]),
                        ([], ["--prompt TEXT"]),
                        (["--prompt", "x", "--num-images", 0], ["--num-images 0"]),
                        (["--prompts", tmp_path / "none.txt"], ["none.txt"])):
        refused("sample.py", "--run-dir", trained, "--out", tmp_path / "out", *flags, says=says)
    assert not (tmp_path / "out").exists()
    run = shutil.copytree(trained, tmp_path / "run")
    os.remove(run / "router.safetensors")
    refused("sample.py", "--run-dir", run, "--prompt", "x", says=["router.safetensors is missing", "train_router.py"])
    shutil.rmtree(run / "experts")
    refused("sample.py", "--run-dir", run, "--prompt", "x", "--monolith", says=["all.safetensors is missing", "--shard all"])


# ---- the config itself --------------------------------------------------------------------------------------------

def test_demo_toml_explains_every_key():
    """Every key stands in configs/demo.toml with a comment of its own; [train.router] and [train.student] have what differs."""
    path = os.path.join(ROOT, "configs", "demo.toml")
    tables = dict(re.findall(r"^\[([a-z.]+)\][^\n]*\n(.*?)(?=^\[|\Z)", open(path).read(), re.M | re.S))
    given = ddm.config.read_toml(path)
    for table, keys in ddm.config.CONFIG.items():
        for key in keys if not table.startswith("train.") else []:
            assert f"{table}.{key}" in given
            assert re.search(rf"^{key} = .*# \S", tables[table], re.M), f"{table}.{key}"


def test_a_config_survives_writing_and_reading(tmp_path):
    config = ddm.config.make_config({"train.lr": 3e-5, "data.flip": False, "features.name": "pixels", "train.router.steps": 7, "sample.strategy": "top-2"})
    ddm.config.write_toml(config, tmp_path / "c.toml")
    assert ddm.config.flat(ddm.config.make_config(ddm.config.read_toml(tmp_path / "c.toml"))) == ddm.config.flat(config)
    assert tomllib.loads((tmp_path / "c.toml").read_text())["train"]["router"]["steps"] == 7


@pytest.mark.parametrize("script", ["data.py", "cluster.py", "cache_latents.py", "train_expert.py", "train_router.py", "sample.py", "distill.py", "evaluate.py"])
def test_help_says_what_a_script_reads_and_writes(script):
    text = command(script, "--help").stdout
    assert script in text and (script == "data.py" or ("reads " in text and "writes " in text))
