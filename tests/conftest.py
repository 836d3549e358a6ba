"""A tiny run, made once by the commands themselves, and tiny pretrained networks.

The run is of 240 drawn shapes of 8 pixels, with 3 experts of 20,000 weights.
"""

import contextlib
import glob
import importlib
import io
import os
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from unittest import mock

import forks
import numpy as np
import pytest
from PIL import Image

HUB = tempfile.TemporaryDirectory()
# no test asks the network, nor what the user has of it
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_CACHE"] = HUB.name
# processes of several threads would wait for each other
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

TINY = """
[data]
size = 8
condition = "text"
workers = 1
[cluster]
experts = 3
fine_clusters = 6
[text]
length = 4
vocab = 64
[model]
preset = "tiny/2"
dim = 32
depth = 1
heads = 2
[router]
preset = "tiny/2"
dim = 32
depth = 1
heads = 2
[flow]
objective = "x0"
[train]
steps = 6
batch = 24
lr = 1e-3
log_every = 2
save_every = 4
[train.router]
steps = 6
[sample]
steps = 4
"""


def pytest_collection_modifyitems(items):
    """Slow is whatever needs what the commands make: the tars, a run."""
    for item in items:
        if "tars" in item.fixturenames:
            item.add_marker("slow")


ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": ""}


def command_line(*args, ranks=0):
    launcher = [sys.executable]
    if ranks:
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        launcher += [*torchrun, f"--nproc_per_node={ranks}"]
    return [*launcher, *map(str, args)]


def command(*args, ranks=0, check=True, real=False):
    """Runs one of the scripts as a user would, on the CPU; -> CompletedProcess with text output.

    real: by python or torchrun itself, where their own words and exit codes count; else by
    forks.py, which is quicker.
    """
    if real:
        done = subprocess.run(
            command_line(*args, ranks=ranks),
            cwd=ROOT,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
        )
    else:
        done = forks.run([*map(str, args)], cwd=ROOT, environment=ENVIRONMENT, ranks=ranks)
    assert not check or done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done


def inside(script, *args):
    """Runs a script's main() in this process; -> CompletedProcess.

    That spares the seconds that a start of torch takes.
    """
    from ddm import errors

    main = importlib.import_module(script.removesuffix(".py")).main
    code = 0
    with (
        mock.patch.object(sys, "argv", [script, *map(str, args)]),
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        contextlib.redirect_stdout(io.StringIO()) as stdout,
    ):
        try:
            errors.script(main)
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess([script, *args], code, stdout.getvalue(), stderr.getvalue())


def wait_until(condition):
    """Looks again and again; fails after five minutes, lest the suite hangs."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "waits for what does not come"
        time.sleep(0.005)


@contextlib.contextmanager
def signalled_at(position):
    """SIGTERM comes while the sample at this position is read, which then hangs.

    -> a list, in which the position stands once that has happened.
    """
    import data
    import ddm.process

    read = data.TarDataset.__getitem__
    signalled = []

    def stuck(self, at):
        if at >= position and not signalled:
            signalled.append(at)
            signal.raise_signal(signal.SIGTERM)
            time.sleep(600)
        return read(self, at)

    with (
        mock.patch.object(ddm.process.Stop, "GRACE", 0.1),
        mock.patch("data.TarDataset.__getitem__", stuck),
    ):
        yield signalled


def works(*args):
    """Whether there is such a program, and it does not fail."""
    if not shutil.which(args[0]):
        return False
    return subprocess.run(args, capture_output=True).returncode == 0


def copy(run, tmp_path):
    """A copy of a run in a test's own folder."""
    return shutil.copytree(run, tmp_path / "run")


def sample(run, out, *flags, ranks=None):
    """Six images of two prompts; in this process unless ranks are given."""
    prompts = ["--prompt", "a red circle", "--prompt", "a blue cross"]
    args = ["sample.py", "--run-dir", run, "--device", "cpu", *prompts]
    args += ["--num-images", 3, "--out", out, *flags]
    done = inside(*args) if ranks is None else command(*args, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return done


def rewrite(path, to=None, /, **changes):
    """Saves a model again, its metadata changed, there or at `to`."""
    from ddm import artifacts

    network, info = artifacts.load(path)
    info.pop("model")
    artifacts.save(to or path, network.config, network.state_dict(), **info | changes)


def give(run, k, other):
    """Makes expert k of a run that of another cluster, too."""
    folder = run / "experts"
    rewrite(folder / f"{k}.safetensors", folder / f"{other}.safetensors", shard=str(other))


def pictures(folder):
    """The single images that sample.py wrote, [N,H,W,3] int."""
    paths = sorted(glob.glob(str(folder / "[0-9]*.png")))
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])


@pytest.fixture(scope="session")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    command("tools/shapes.py", "--out", folder, "--images", 240, "--size", 8, "--per-tar", 100)
    return folder


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def clustered(tars, config, tmp_path_factory):
    """A run after stage 1: do not change it, copy it."""
    run = tmp_path_factory.mktemp("clustered") / "run"
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", run, "--config", config)
    return run


@pytest.fixture(scope="session")
def trained(clustered, tmp_path_factory):
    """A run after stage 3, its monolith included: do not change it, copy it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(clustered, run)
    for shard in (0, 1, 2, "all"):
        command("train_expert.py", "--run-dir", run, "--shard", shard)
    command("train_router.py", "--run-dir", run)
    return run


# ---- pretrained networks: the real classes with random weights ----------------------------------


def clip_tokenizer():
    """Every letter is a token, and another one at the end of a word."""
    from transformers import CLIPTokenizer

    letters = list(string.ascii_lowercase)
    pieces = letters + [f"{c}</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=24)


def t5_tokenizer():
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    letters = [(c, -3.0) for c in string.ascii_lowercase]
    return T5Tokenizer(vocab=special + letters, extra_ids=0)


def bert_tokenizer():
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = list(string.ascii_lowercase)
    pieces = special + letters + [f"##{c}" for c in letters]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return BertTokenizer(vocab=vocab, model_max_length=24)


# what each config below names by itself
SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def clip_configs():
    """-> (of the text half, of the image half)"""
    from transformers import CLIPTextConfig, CLIPVisionConfig

    text = CLIPTextConfig(
        **SMALL,
        vocab_size=54,
        max_position_embeddings=24,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        projection_dim=12,
    )
    return text, CLIPVisionConfig(**SMALL, image_size=28, patch_size=14, projection_dim=12)


def t5_config():
    from transformers import T5Config

    return T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )


def bart_config():
    from transformers import BartConfig

    return BartConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=57,
        max_position_embeddings=24,
    )


def vae(**options):
    """8x8 images -> 4x4 latents."""
    import diffusers

    settings = dict(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=8,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    return diffusers.AutoencoderKL(**settings | options)


def tiny_vae():
    import diffusers

    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )


TOKENIZERS = {
    "clip": clip_tokenizer,
    "clip-2": clip_tokenizer,
    "clip-image": clip_tokenizer,
    "t5": t5_tokenizer,
    "bert": bert_tokenizer,
    "bart": bert_tokenizer,
}


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """A folder of folders as save_pretrained writes them.

    They are dinov2, clip-image, clip, clip-2, t5, bert, bart, vae and tiny-vae.
    """
    import torch
    import transformers as tf

    tf.logging.disable_progress_bar()
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("networks")
    text, image = clip_configs()
    both = tf.CLIPConfig(
        text_config=text.to_dict(), vision_config=image.to_dict(), projection_dim=12
    )
    narrow = tf.CLIPTextConfig(**text.to_dict() | {"hidden_size": 8})
    dinov2 = tf.Dinov2Config(**SMALL, image_size=28, patch_size=14)
    bert = tf.BertConfig(**SMALL, vocab_size=57, max_position_embeddings=24)
    made = {
        "dinov2": tf.Dinov2Model(dinov2),
        "clip-image": tf.CLIPModel(both),
        "clip": tf.CLIPTextModel(text),
        "clip-2": tf.CLIPTextModelWithProjection(narrow),
        "t5": tf.T5EncoderModel(t5_config()),
        "bart": tf.BartModel(bart_config()),
        "bert": tf.BertModel(bert),
        "vae": vae(),
        "tiny-vae": tiny_vae(),
    }
    for name, network in made.items():
        network.save_pretrained(folder / name)
        if name in TOKENIZERS:
            TOKENIZERS[name]().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def latent_run(tars, config, networks, tmp_path_factory):
    """A run in the real recipe's shape, trained. Do not change it, copy it.

    DINOv2 clusters, cached latents, SDXL's pair of text encoders.
    """
    run = tmp_path_factory.mktemp("latent") / "run"
    flags = ["--data", tars / "*.tar", "--run-dir", run, "--config", config, "--experts", 2]
    flags += ["--features.name", networks / "dinov2", "--features.pool", "cls+mean"]
    flags += ["--autoencoder.name", networks / "vae", "--train.batch", 12]
    flags += ["--text.name", f"{networks / 'clip'} + {networks / 'clip-2'}"]
    flags += ["--text.layer", "penultimate", "--text.length", 20]
    command("cluster.py", *flags)
    for shard in (0, 1, "router"):
        command("cache_latents.py", "--run-dir", run, "--shard", shard, "--captions")
    for shard in (0, 1):
        command("train_expert.py", "--run-dir", run, "--shard", shard)
    command("train_router.py", "--run-dir", run)
    return run
