"""The frozen networks, tiny and with random weights but of the real classes: what each role
computes, and the pipeline on what they make.
"""
import csv
import glob
import hashlib
import io
import json
import os
import pathlib
import shutil
import tarfile
from contextlib import redirect_stderr
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from conftest import HUB, clip_tokenizer, command, vae
from diffusers.models.autoencoders import autoencoder_kl, autoencoder_tiny
from PIL import Image
from test_mistakes import refused

import data
import ddm.config
import ddm.process
import ddm.run
import ddm.tars
import flow
import model as models
from ddm import artifacts, codec, encoders, ensemble, errors, loading
from tools.shapes import draw_shape

CPU = torch.device("cpu")
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


def settings(**values):
    """A config with these keys: `features__name` is features.name."""
    return ddm.config.make_config({key.replace("__", "."): value for key, value in values.items()})


def image_features(name, normalise=True, **values):
    """encoders.image_features, by keys of [features]."""
    keys = {f"features__{key}": value for key, value in values.items()}
    config = settings(features__name=str(name), **keys)
    return encoders.image_features(config.features, CPU, normalise)


def features_of(found, images):
    """What encoders.image_features has found says of PIL images [n,D]."""
    return torch.from_numpy(found.features([found.prepare(image) for image in images]))


def as_networks_see(images, size, mean, std):
    """PIL images -> [n,3,S,S], written down once more."""
    x = torch.stack([torch.from_numpy(data.square(image, size).copy()) for image in images])
    x = x.permute(0, 3, 1, 2) / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def of_length_1(x):
    return x / x.norm(dim=1, keepdim=True)


def copy(run, folder, *left_out):
    """A copy of a run without some of its parts."""
    return shutil.copytree(run, folder, ignore=shutil.ignore_patterns(*left_out))


def about_of(run, shard):
    return json.loads((run / "latents" / str(shard) / "about.json").read_text())


@pytest.fixture(scope="module")
def images():
    return [draw_shape(np.random.default_rng(i), 40)[0] for i in range(5)]


# ---- image features ------------------------------------------------------------------------------

@pytest.mark.parametrize("pool", ["cls", "cls+mean"])
def test_dinov2_features_are_pooled_as_the_config_says_and_of_length_one(networks, images, pool):
    network = transformers.Dinov2Model.from_pretrained(networks / "dinov2").eval()
    with torch.no_grad():
        tokens = network(as_networks_see(images, 224, *IMAGENET)).last_hidden_state
    # patches of 14
    assert tokens.shape[1] == 1 + 16 * 16
    wanted = tokens[:, 0]
    if pool == "cls+mean":
        wanted = torch.cat([wanted, tokens[:, 1:].mean(1)], 1)

    extractor = image_features(networks / "dinov2", pool=pool, batch=2)
    found = features_of(extractor, images)
    torch.testing.assert_close(found, of_length_1(wanted), rtol=1e-4, atol=1e-5)
    assert extractor.features([]).shape == (0, found.shape[1])
    preprocessing = extractor.info["preprocessing"]
    assert pool in preprocessing and "224" in preprocessing

    half = image_features(networks / "dinov2", pool=pool, precision="bf16")
    torch.testing.assert_close(features_of(half, images), found, rtol=0.1, atol=0.02)


@pytest.fixture
def as_on_a_gpu():
    """fp32 products in TF32, as ddm.process.start has them there."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def test_fp32_features_are_computed_without_tf32(networks, images, monkeypatch, as_on_a_gpu):
    seen = []
    plain = encoders.load

    def modes():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    def load(*args):
        network = plain(*args)
        network.register_forward_pre_hook(lambda *_: seen.append(modes()))
        return network

    monkeypatch.setattr(encoders, "load", load)
    found = image_features(networks / "dinov2")
    features_of(found, images)
    assert found.info["preprocessing"].endswith(" float32")
    assert seen == [("highest", False)]

    found = encoders.clip_scorer(str(networks / "clip-image"), CPU)
    found.score([found.prepare(image) for image in images], ["a"] * 5)
    assert found.info["precision"] == "fp32"
    assert seen[1:] == [("highest", False)]

    # as they were, whatever happens
    assert modes() == ("high", True)
    with pytest.raises(RuntimeError), encoders.exact_products():
        raise RuntimeError
    assert modes() == ("high", True)


@pytest.mark.parametrize("asked, device, ran", [
    ("auto", "cpu", "fp32"),
    ("fp32", "cpu", "fp32"),
    ("bf16", "cpu", "bf16"),
    ("tf32", "cpu", "fp32"),
    ("auto", "cuda", "bf16"),
    ("fp32", "cuda", "tf32"),
    ("bf16", "cuda", "bf16"),
    ("tf32", "cuda", "tf32"),
])
def test_a_precision_is_named_by_what_runs(asked, device, ran):
    assert encoders.resolve(asked, torch.device(device)) == ran


def test_records_of_networks_say_the_precision_that_ran(latent_run):
    expert = artifacts.read_info(latent_run / "experts" / "0.safetensors")
    for record in (about_of(latent_run, 0), expert):
        for role in codec.ROLES:
            assert record[role]["precision"] == "fp32"

    # each stage has its own
    meant = ddm.run.read_clusters(latent_run)["networks"]
    assert "precision" not in meant["autoencoder"]
    assert "precision" not in meant["text"]

    # which loads nothing yet
    config = ddm.config.load_run(latent_run, {})
    on_a_gpu = codec.Space(config, torch.device("cuda"), meant)
    assert on_a_gpu.info["autoencoder"]["precision"] == "tf32"
    assert on_a_gpu.info["text"]["precision"] == "bf16"


def test_the_patches_mean_leaves_registers_out(images, tmp_path):
    torch.manual_seed(0)
    network = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
        num_register_tokens=3)).eval()
    network.save_pretrained(tmp_path / "registers")
    with torch.no_grad():
        tokens = network(as_networks_see(images[:1], 224, *IMAGENET)).last_hidden_state
    wanted = torch.cat([tokens[:, 0], tokens[:, 4:].mean(1)], 1)

    found = features_of(image_features(tmp_path / "registers", pool="cls+mean"), images[:1])
    torch.testing.assert_close(found, of_length_1(wanted), rtol=1e-4, atol=1e-5)


def test_clip_image_features_are_the_projected_embedding_under_clip_s_statistics(networks, images):
    network = transformers.CLIPModel.from_pretrained(networks / "clip-image").eval()
    x = as_networks_see(images, 28, *CLIP)
    with torch.no_grad():
        wanted = network.visual_projection(network.vision_model(x).pooler_output)

    found = features_of(image_features(networks / "clip-image"), images)
    torch.testing.assert_close(found, of_length_1(wanted), rtol=1e-4, atol=1e-5)


def test_resnet_features_are_the_mean_over_the_image_and_may_stay_as_they_are(images, tmp_path):
    torch.manual_seed(0)
    network = transformers.ResNetModel(transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")).eval()
    network.save_pretrained(tmp_path / "resnet")
    with pytest.raises(errors.UserError, match="no preprocessor_config.json"):
        image_features(tmp_path / "resnet")

    (tmp_path / "resnet" / "preprocessor_config.json").write_text(json.dumps({
        "size": {"shortest_edge": 32},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
    }))
    x = as_networks_see(images, 32, [0.5] * 3, [0.25] * 3)
    with torch.no_grad():
        wanted = network(x).last_hidden_state.mean((2, 3))

    found = features_of(image_features(tmp_path / "resnet", normalise=False), images)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    found = features_of(image_features(tmp_path / "resnet"), images)
    torch.testing.assert_close(found, of_length_1(wanted), rtol=1e-4, atol=1e-5)


# ---- autoencoder ---------------------------------------------------------------------------------

PER_CHANNEL = {
    "latents_mean": [1.0, 2.0, 3.0, 4.0],
    "latents_std": [0.5, 1.0, 2.0, 4.0],
    "shift_factor": None,
}


@pytest.mark.parametrize("options, scale, shift", [
    ({}, 0.5, 0.25),
    ({"shift_factor": None, "scaling_factor": 3.0}, 3.0, 0.0),
    (PER_CHANNEL, [1.0, 0.5, 0.25, 0.125], [1.0, 2.0, 3.0, 4.0]),
])
def test_latents_are_standardised_by_the_autoencoder_s_own_config(tmp_path, options, scale, shift):
    x = torch.randn(3, 3, 8, 8)
    network = vae(**options)
    network.save_pretrained(tmp_path / "vae")
    found = encoders.Autoencoder(str(tmp_path / "vae"), CPU)
    mean, std = found.encode(x)

    scale = torch.tensor(scale).view(-1, 1, 1)
    shift = torch.tensor(shift).view(-1, 1, 1)
    with torch.no_grad():
        posterior = network.eval().encode(x).latent_dist
        torch.testing.assert_close(mean, (posterior.mean - shift) * scale)
        torch.testing.assert_close(std, posterior.std * scale)
        torch.testing.assert_close(found.decode(mean), network.decode(posterior.mean).sample)


def test_a_config_that_leaves_the_scale_out_means_the_class_s_default(networks, tmp_path):
    """As Stable Diffusion's own autoencoder does."""
    shutil.copytree(networks / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    about = json.loads(path.read_text())
    for key in ("scaling_factor", "shift_factor"):
        del about[key]
    path.write_text(json.dumps(about))
    info = encoders.Autoencoder(str(tmp_path / "vae"), CPU).info
    assert (info["scale"], info["shift"]) == (0.18215, 0.0)


def test_the_tiny_autoencoder_has_no_posterior(networks):
    found = encoders.Autoencoder(str(networks / "tiny-vae"), CPU)
    network = diffusers.AutoencoderTiny.from_pretrained(networks / "tiny-vae").eval()
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    mean, std = found.encode(x)
    assert std is None
    assert found.info["factor"] == 2
    assert mean.shape == (2, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(mean, network.encode(x).latents)
        torch.testing.assert_close(found.decode(mean), network.decode(mean).sample)


@pytest.mark.parametrize("name, kind", [
    ("vae", autoencoder_kl.Decoder),
    ("tiny-vae", autoencoder_tiny.DecoderTiny),
])
def test_decoding_is_bounded_in_batch_and_in_size(networks, monkeypatch, name, kind):
    shapes = []
    forward = kind.forward

    def watched(self, z, *rest):
        shapes.append(tuple(z.shape))
        return forward(self, z, *rest)

    monkeypatch.setattr(kind, "forward", watched)
    monkeypatch.setattr(encoders, "AT_ONCE", 3 * 64)
    whole = encoders.Autoencoder(str(networks / name), CPU)
    monkeypatch.setattr(encoders, "TILE", 16)
    tiled = encoders.Autoencoder(str(networks / name), CPU)

    # in batches of three
    z = torch.randn(7, 4, 4, 4)
    images = whole.decode(z)
    assert [n for n, *_ in shapes] == [3, 3, 1]
    one_by_one = torch.cat([whole.decode(one) for one in z.split(1)])
    torch.testing.assert_close(images, one_by_one, rtol=1e-3, atol=1e-4)

    # in tiles of 16 pixels that overlap
    shapes.clear()
    z = torch.ones(1, 4, 40, 40)
    images = tiled.decode(z)
    assert max(max(shape[2:]) for shape in shapes) == 8
    assert len(shapes) > 25

    # of constant latents: a constant image, but for the borders of the image, or of a tile
    middle = whole.decode(torch.ones(1, 4, 8, 8))[..., 7:9, 7:9].mean()
    assert images.shape == (1, 3, 80, 80)
    assert (images.median() - middle).abs() < 0.2

    # what fits is decoded whole
    shapes.clear()
    tiled.decode(z[..., :8, :8])
    assert [shape[2:] for shape in shapes] == [(8, 8)]

    mean, _ = tiled.encode(torch.zeros(1, 3, 40, 40))
    small, _ = whole.encode(torch.zeros(1, 3, 16, 16))
    inside = small[..., 3:5, 3:5].mean((2, 3))
    assert mean.shape == (1, 4, 20, 20)
    assert (mean.flatten(2).median(2)[0] - inside).abs().max() < 0.2


# ---- text ----------------------------------------------------------------------------------------

CAPTIONS = ["a red cross", "blue", "", "  ", "a yellow triangle"]


def encoder(networks, *names, length=20, layer="last"):
    name = " + ".join(str(networks / name) for name in names)
    config = settings(text__name=name, text__length=length, text__layer=layer)
    return encoders.TextEncoder(config.text, CPU)


@pytest.mark.parametrize("name, kind", [
    ("clip", transformers.CLIPTextModel),
    ("clip-2", transformers.CLIPTextModelWithProjection),
    ("clip-image", transformers.CLIPModel),
    ("t5", transformers.T5EncoderModel),
    ("bert", transformers.BertModel),
    ("bart", transformers.BartModel),
])
def test_token_features_are_the_encoder_s_and_zero_behind_the_last_token(networks, name, kind):
    network = kind.from_pretrained(networks / name).eval()
    if name == "clip-image":
        network = network.text_model
    if name == "bart":
        network = network.get_encoder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(networks / name)

    found = encoder(networks, name)
    c = found.encode(CAPTIONS)
    assert c.shape == (5, 20, found.info["dim"])
    assert c.dtype == torch.float16
    for i in (0, 1, 4):
        # alone, without padding
        tokens = tokenizer(CAPTIONS[i], return_tensors="pt")
        with torch.no_grad():
            out = network(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        wanted = out.last_hidden_state[0]
        n = len(wanted)
        assert 4 < n < 20
        torch.testing.assert_close(c[i, :n].float(), wanted, rtol=2e-3, atol=2e-3)
        assert c[i, n:].abs().max() == 0
        assert c[i, :n].any(1).all()

    # the empty caption
    assert c[2:4].abs().max() == 0


def test_sdxl_s_pair_of_encoders_stands_side_by_side(networks):
    one = encoder(networks, "clip", layer="penultimate")
    two = encoder(networks, "clip-2", layer="penultimate")
    pair = encoder(networks, "clip", "clip-2", layer="penultimate")
    assert pair.info["dim"] == 24
    both = torch.cat([one.encode(CAPTIONS), two.encode(CAPTIONS)], dim=2)
    torch.testing.assert_close(pair.encode(CAPTIONS), both)

    network = transformers.CLIPTextModel.from_pretrained(networks / "clip").eval()
    tokens = clip_tokenizer()("a red cross", return_tensors="pt")
    with torch.no_grad():
        wanted = network(**tokens, output_hidden_states=True).hidden_states[-2][0]
    found = one.encode(["a red cross"])[0, :len(wanted)]
    torch.testing.assert_close(found.float(), wanted, rtol=2e-3, atol=2e-3)


def test_long_captions_are_cut_with_one_warning(networks):
    found = encoder(networks, "clip", length=8)
    with redirect_stderr(io.StringIO()) as stderr:
        first = found.encode(["a purple triangle", "a"])
        found.encode(["another long caption"])
    said = stderr.getvalue()
    assert said.count("warning") == 1
    assert "1 of 2 captions are longer than text.length = 8 tokens: cut" in said
    assert first[0].any(1).all()


def test_more_tokens_than_the_encoder_reads(networks):
    says = "text.length = 25, but .*clip' reads 24 tokens at most"
    with pytest.raises(errors.UserError, match=says):
        encoder(networks, "clip", length=25)


def test_the_empty_prompt_is_the_unconditional_branch(networks, latent_run):
    network, _ = artifacts.load(latent_run / "experts" / "0.safetensors")
    c = encoder(networks, "clip", "clip-2", layer="penultimate").encode(["", "a red circle"])
    null = models.null_condition(network.config, c)
    assert torch.equal(null[:1], c[:1])

    with torch.no_grad():
        network.head.weight.normal_()
        for block in network.blocks:
            block.cross.proj.weight.normal_()
        x = torch.randn(1, 4, 4, 4).expand(2, -1, -1, -1)
        t = torch.full((2,), 0.5)
        out = network(x, t, c)
        unconditional = network(x, t, null)
    torch.testing.assert_close(out[0], unconditional[0])
    assert (out[1] - unconditional[1]).abs().max() > 1e-3


# ---- identity ------------------------------------------------------------------------------------

def test_a_network_is_its_weights_and_not_its_name_or_file(networks, tmp_path):
    clip = encoder(networks, "clip").info
    shutil.copytree(networks / "clip", tmp_path / "elsewhere")
    moved = encoder(tmp_path, "elsewhere").info
    assert moved["name"] != clip["name"]
    assert encoders.identity(moved) == encoders.identity(clip)

    network = transformers.CLIPTextModel.from_pretrained(networks / "clip")
    mark = encoders.digest(network)
    renamed = torch.nn.ModuleDict({"other": network})
    assert encoders.digest(renamed) == mark == clip["weights"].split(":")[1]
    with torch.no_grad():
        network.final_layer_norm.weight[0] += 1e-3
    assert encoders.digest(network) != mark


# ---- the pipeline --------------------------------------------------------------------------------

def rows(run, name):
    with open(os.path.join(run, "logs", f"{name}.csv"), newline="") as f:
        return list(csv.DictReader(f))


def members(folder):
    """{name: bytes} of all members of the tars in a folder."""
    found = {}
    for path in sorted(glob.glob(os.path.join(folder, "*.tar"))):
        with tarfile.open(path) as tar:
            for member in tar:
                found[member.name] = tar.extractfile(member).read()
    return found


def make_tar(path, payloads):
    """Writes {name: bytes} as a tar -> its TarWriter, which knows the size and the digest."""
    with ddm.tars.TarWriter(str(path)) as tar:
        for name, payload in payloads.items():
            tar.add(name, payload)
    return tar


def test_captions_of_too_many_words_are_cut_with_a_warning(capsys):
    space = codec.Space(settings(text__length=3, text__vocab=64))
    short = space.captions(["a red circle"])
    assert torch.equal(short, space.captions(["a red circle in a box"]))
    says = "1 of 1 captions are longer than text.length = 3 words: cut"
    assert says in capsys.readouterr().err


def test_an_encoder_and_the_hash_see_normalised_captions(monkeypatch):
    space = codec.Space(settings(text__length=3, text__vocab=64))
    assert torch.equal(*space.captions([" un  café\n", "un cafe\u0301"]))

    monkeypatch.setattr(space, "network", lambda role: SimpleNamespace(encode=list))
    captions = [" un  caf\u00e9\n", "un cafe\u0301", "\ufeff\u00a0", "🎉\r\n"]
    assert space.captions(captions) == ["un caf\u00e9", "un caf\u00e9", "", "🎉"]


def test_cached_latents_and_captions_are_what_the_networks_make_of_a_sample(latent_run, networks):
    source = members(latent_run / "shards" / "router")
    cached = members(latent_run / "latents" / "router")
    about = about_of(latent_run, "router")
    assert about["shapes"] == [[2, 2, 4, 4, 4]]
    assert list(about["tars"]) == [f"0000{i}.tar" for i in range(3)]

    # all other members as they are
    others = {name for name in cached if not name.endswith((".lat", ".tok"))}
    assert others == {name for name in source if not name.endswith(".png")}
    for name in others:
        assert cached[name] == source[name]

    autoencoder = encoders.Autoencoder(str(networks / "vae"), CPU)
    text = encoder(networks, "clip", "clip-2", layer="penultimate")
    keys = sorted(name[:-4] for name in source if name.endswith(".png"))
    for key in keys[::60]:
        image = data.decode(source[f"{key}.png"])
        crops = np.stack([data.square(image, 8), data.square(image, 8, mirror=True)])
        wanted = torch.stack(autoencoder.encode(data.to_float(torch.from_numpy(crops))), dim=1)
        latents = np.frombuffer(cached[f"{key}.lat"], np.float16).reshape(2, 2, 4, 4, 4)
        found = torch.from_numpy(latents.astype(np.float32))
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-4)

        caption = source[f"{key}.txt"].decode()
        c = text.encode([caption])[0]
        tokens = np.frombuffer(cached[f"{key}.tok"], np.float16).reshape(-1, 24)
        n = len(clip_tokenizer()(caption)["input_ids"])
        assert len(tokens) == n
        torch.testing.assert_close(torch.from_numpy(tokens.copy()), c[:n], rtol=1e-2, atol=1e-2)
        assert not c[n:].any()


def first_batches(run, shard, cached):
    """(batch, x_0, c) of the first three batches of 16 that a training on `shard` sees."""
    toml = ddm.config.read_toml(run / "config.toml")
    config = ddm.config.make_config(toml, {"data.use_latents": cached})
    ranks = ddm.process.Ranks(rank=0, world=1, device=CPU)
    clusters = ddm.run.read_clusters(run)
    samples, space = loading.open_shards(run, [shard], config, config.train, ranks, clusters,
                                         labelled=shard == "router")
    found = []
    for first in (0, 16, 32):
        batch = data.collate([samples[p] for p in range(first, first + 16)])
        batch = SimpleNamespace(**batch)
        x_0, c = loading.encode(space, batch)
        found.append((batch, x_0, c))
    return found


@pytest.mark.parametrize("shard", ["0", "router"])
def test_training_on_the_cache_sees_what_it_sees_on_the_fly(latent_run, shard):
    """The same samples in the same order, mirrored alike, sampled from the posterior by the same
    noise, with the same captions.
    """
    cached = first_batches(latent_run, shard, True)
    on_the_fly = first_batches(latent_run, shard, False)
    for (a, a_0, a_c), (b, b_0, b_c) in zip(cached, on_the_fly, strict=True):
        torch.testing.assert_close(a_0, b_0, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(a_c, b_c, rtol=1e-2, atol=1e-2)
        for name in ("eps", "u", "drop", "k"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a_0.shape == (16, 4, 4, 4) and a_0.std() > 0.1
        assert a_c.shape == (16, 20, 24) and a_c.float().std() > 0.1


def test_training_needs_the_cache_or_the_shards_not_both(latent_run, tmp_path):
    losses = {}
    for kind, gone in (("fly", "latents"), ("cached", "shards")):
        run = copy(latent_run, tmp_path / kind, gone, "experts", "logs", "checkpoints", "samples")
        done = command("train_expert.py", "--shard", 0, "--run-dir", run)
        says = "latents not cached" if kind == "fly" else "latents cached in"
        assert says in done.stdout
        losses[kind] = [float(row["loss"]) for row in rows(run, "expert-0")]

    assert losses["fly"] == pytest.approx(losses["cached"], rel=1e-3)
    expert = (tmp_path / "cached" / "experts" / "0.safetensors").read_bytes()
    assert expert == (latent_run / "experts" / "0.safetensors").read_bytes()


def test_a_monolith_is_not_trained_on_part_of_the_data(latent_run, tmp_path):
    run = copy(latent_run, tmp_path / "run", "experts", "checkpoints")
    shutil.rmtree(run / "shards" / "1")
    train = ["train_expert.py", "--run-dir", run, "--shard", "all"]
    refused(*train, "--data.use_latents", "false", says=["no tars in", "shards/1"])
    shutil.rmtree(run / "latents" / "0")
    refused(*train, says=["no tars in", "shards/1", "latents are used where all shards have them"])


def test_each_epoch_samples_from_the_posterior_anew(latent_run):
    tars = sorted(glob.glob(str(latent_run / "latents" / "0" / "*.tar")))
    samples = data.TarDataset(tars, 8, "text", encode=None, flip=True, noise_shape=(4, 4, 4),
                              posterior=True, latent=[2, 2, 4, 4, 4], tokens=(20, 24))
    # what the first sample is in 40 epochs
    seen = {}
    for position in range(40 * len(samples)):
        if samples.order(position) == 0:
            seen[position] = samples[position]["x"].numpy()
    assert len(seen) == 40

    stored = np.frombuffer(samples.members(0)["lat"], np.float16).reshape(2, 2, 4, 4, 4)
    stored = stored.astype(np.float32)
    z = []
    mirrored = 0
    for position, x in seen.items():
        generator = torch.Generator().manual_seed(data.mix(0, position))
        flip = int(torch.rand(1, generator=generator, dtype=torch.float64).item() < 0.5)
        mean, std = stored[flip]
        mirrored += flip
        z.append((x - mean) / std)
    assert abs(np.mean(z)) < 0.06
    assert abs(np.std(z) - 1) < 0.05
    assert 10 < mirrored < 30


def test_caching_on_two_ranks_and_after_an_interruption_gives_the_same(latent_run, tmp_path):
    run = copy(latent_run, tmp_path / "run", "latents", "experts", "checkpoints")
    folder = run / "latents" / "router"
    cache = ["cache_latents.py", "--run-dir", run, "--shard", "router", "--captions"]
    wanted = members(latent_run / "latents" / "router")
    done = command(*cache, ranks=2)
    assert "GB per million images" in done.stdout
    assert "240 samples made now" in done.stdout
    assert members(folder) == wanted

    os.remove(folder / "00001.tar")
    kept = os.stat(folder / "00000.tar").st_mtime_ns
    refused("train_router.py", "--run-dir", run,
            says=["lacks 1 of 3 tars, 00001.tar", "cache_latents.py", "--data.use_latents false"])

    (folder / "00001.tar.1.tmp").write_bytes(b"torn")
    done = command(*cache)
    assert members(folder) == wanted
    assert "100 samples made now" in done.stdout
    assert os.stat(folder / "00000.tar").st_mtime_ns == kept
    assert not list(folder.glob("*.tmp"))


def test_a_cache_of_other_shards_is_not_used(latent_run, tmp_path):
    run = copy(latent_run, tmp_path / "run", "experts", "checkpoints")
    train = ["train_expert.py", "--run-dir", run, "--shard", 0]
    cache = ["cache_latents.py", "--run-dir", run, "--shard", 0, "--captions"]
    latents = run / "latents" / "0"

    # a shard that has changed since
    shard = run / "shards" / "0" / "00001.tar"
    first = list(members(latent_run / "shards" / "0").items())[:2]
    make_tar(shard, dict(first))
    refused(*train, says=["shards/0 is not as its manifest says", "00001.tar", "copy it again"])
    refused(*cache, says=["shards/0 is not as its manifest says"])

    # its manifest, too
    path = shard.parent / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tars"]["00001.tar"] |= {
        "samples": 1,
        "bytes": shard.stat().st_size,
        "sha256": hashlib.sha256(shard.read_bytes()).hexdigest(),
    }
    path.write_text(json.dumps(manifest))
    refused(*train, says=["latents/0/00001.tar was not made of", "--data.use_latents false"])

    # the same command makes what has changed, and nothing else
    done = command(*cache)
    assert "; 1 samples made now" in done.stdout
    assert set(members(latents)) < set(members(latent_run / "latents" / "0"))
    shutil.copy(latents / "00001.tar", latents / "surplus.tar")
    refused(*train, says=["surplus.tar was not made of"])


def test_a_cache_of_another_clustering_or_a_damaged_one_is_not_used(latent_run, tmp_path):
    run = copy(latent_run, tmp_path / "run", "experts", "checkpoints")
    train = ["train_expert.py", "--run-dir", run, "--shard", 0]
    about = about_of(run, 0)
    path = run / "latents" / "0" / "about.json"

    path.write_text(json.dumps(about | {"fingerprint": "0123"}))
    refused(*train, says=["clustering", "'0123'", about["fingerprint"]])
    refused("cache_latents.py", "--run-dir", run, "--shard", 0, "--captions",
            says=["fingerprint", "'0123'", about["fingerprint"]])

    for change in ({"size": "8"}, {"text": None}, {"shapes": []}, {"shapes": [[2]]},
                   {"tars": {"00001.tar": 2048}}):
        path.write_text(json.dumps(about | change))
        refused(*train, says=["about.json is damaged"])
    for damage in ("{", "[]", "[" * 100_000):
        path.write_text(damage)
        refused(*train, says=["about.json is damaged"])


def test_the_size_that_is_printed_is_the_size_on_disk(latent_run, tmp_path):
    run = copy(latent_run, tmp_path / "run", "latents", "experts", "checkpoints")
    done = command("cache_latents.py", "--run-dir", run, "--shard", "1", "--captions")
    # the first line names the device
    text = done.stdout.partition("\n")[2]
    count = int(text.split(": ")[1].split()[0])
    each = [float(text.split(word)[0].split()[-1]) for word in (" bytes", " of token", " of other")]
    # without the two empty blocks at the end of each tar
    paths = glob.glob(str(run / "latents" / "1" / "*.tar"))
    size = sum(os.path.getsize(path) - 1024 for path in paths)
    assert each[0] == 512 + 512
    assert size == pytest.approx(count * sum(each), rel=0.05)


SMALL_DISK = """
import os, shutil, sys
from types import SimpleNamespace
sys.path.insert(0, os.getcwd())
import cache_latents
from ddm import errors
shutil.disk_usage = lambda path: SimpleNamespace(free=100)
errors.script(cache_latents.main)
"""


def test_a_disk_that_is_too_small_is_said_once_on_all_ranks(latent_run, tmp_path):
    """Also: the size is measured where there are samples, and the causes of unusable ones are those
    of all ranks.
    """
    run = copy(latent_run, tmp_path / "run", "latents", "experts", "checkpoints")
    folder = run / "shards" / "1"
    manifest = json.loads((folder / "manifest.json").read_text())
    bad = {"x.png": b"no image", "x.txt": b"a caption"}
    for name, payloads in (("00000.tar", {}), ("99999.tar", bad)):
        tar = make_tar(folder / name, payloads)
        manifest["tars"][name] = {
            "samples": len(payloads) // 2,
            "bytes": tar.bytes,
            "sha256": tar.digest.hexdigest(),
            "source": "",
        }
    (folder / "manifest.json").write_text(json.dumps(manifest))

    script = tmp_path / "small.py"
    script.write_text(SMALL_DISK)
    done = command(script, "--run-dir", run, "--shard", 1, ranks=2, check=False, real=True)
    assert done.returncode == 1
    assert done.stderr.count("GB more, the disk has 1e-07 GB left") == 1
    assert "Connection closed" not in done.stderr

    done = command("cache_latents.py", "--run-dir", run, "--shard", 1, ranks=2)
    assert "1 left out: undecodable" in done.stdout
    assert " 0 of other members" not in done.stdout


def samples_in(folder):
    """The single images that sample.py wrote, each [H,W,3] int."""
    paths = sorted(glob.glob(str(folder / "0*.png")))
    return [np.asarray(Image.open(path)).astype(int) for path in paths]


def save(path, network, info):
    """A model's file with other metadata."""
    info.pop("model")
    artifacts.save(path, network.config, network.state_dict(), **info)


def test_samples_are_decoded_images_also_where_the_networks_have_moved(
    latent_run, networks, tmp_path
):
    run = copy(latent_run, tmp_path / "run", "shards", "latents", "checkpoints")
    sample = ["sample.py", "--run-dir", run, "--prompt", "a red circle", "--prompt", "",
              "--num-images", 2, "--steps", 3]
    command(*sample, "--out", tmp_path / "a")
    images = samples_in(tmp_path / "a")
    assert [image.shape for image in images] == 4 * [(8, 8, 3)]

    # what the models say, decoded by hand
    team = ensemble.Ensemble(run, CPU)
    text = encoder(networks, "clip", "clip-2", layer="penultimate")
    velocity = team.velocity(ddm.config.make_config().sample, text.encode(["a red circle"]))
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    *_, x = flow.integrate(velocity, x, flow.time_grid(3))
    decoded = encoders.Autoencoder(str(networks / "vae"), CPU).decode(x)
    wanted = data.to_uint8(decoded)[0].numpy().astype(int)
    assert np.abs(images[1] - wanted).max() <= 1

    # as if the folders of the training machine were not here
    shutil.copytree(networks, tmp_path / "moved")
    for path in [*glob.glob(str(run / "experts" / "*")), run / "router.safetensors"]:
        network, info = artifacts.load(path)
        info["autoencoder"]["name"] = "/elsewhere/vae"
        info["text"]["name"] = "/elsewhere/clip + /elsewhere/clip-2"
        save(path, network, info)
    # which says where they are
    os.remove(run / "config.toml")
    refused(*sample, "--out", tmp_path / "b",
            says=["text.name = '/elsewhere/clip'", "no such folder", "--text.name"])

    moved = tmp_path / "moved"
    command(*sample, "--out", tmp_path / "b", "--autoencoder.name", moved / "vae",
            "--text.name", f"{moved / 'clip'} + {moved / 'clip-2'}")
    for image, again in zip(images, samples_in(tmp_path / "b"), strict=True):
        assert np.abs(image - again).max() <= 1


def test_clip_clusters_tiny_latents_and_t5_on_the_fly_and_without_flips(
    tars, config, networks, tmp_path
):
    run = tmp_path / "run"
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", run, "--config", config,
            "--experts", 1, "--features.name", networks / "clip-image",
            "--autoencoder.name", networks / "tiny-vae", "--text.name", networks / "t5",
            "--text.length", 20, "--data.flip", "false", ranks=2)
    about = ddm.run.read_clusters(run)
    assert about["extractor"]["class"] == "CLIPVisionModelWithProjection"
    assert about["networks"]["text"]["weights"].startswith("T5EncoderModel:")

    # another network to cluster by
    torch.manual_seed(1)
    other = tmp_path / "clip-image"
    clip_config = transformers.CLIPConfig.from_pretrained(networks / "clip-image")
    transformers.CLIPModel(clip_config).save_pretrained(other)
    shutil.copytree(run, tmp_path / "copy")
    text = (run / "config.toml").read_text()
    text = text.replace(str(networks / "clip-image"), str(other))
    (tmp_path / "copy" / "config.toml").write_text(text)
    refused("cluster.py", "--data", tars / "*.tar", "--run-dir", tmp_path / "copy",
            says=["made with features of", str(networks), str(other)])

    train = ["train_expert.py", "--run-dir", run, "--shard", 0]
    done = command(*train, "--train.steps", 4)
    assert "latents not cached" in done.stdout
    assert "token features not cached" in done.stdout

    # resumes on the cache, captions still on the fly
    command("cache_latents.py", "--run-dir", run, "--shard", 0)
    assert about_of(run, 0)["shapes"] == [[1, 1, 4, 4, 4]]
    done = command(*train)
    assert "latents cached in" in done.stdout
    assert "resumed at step 4" in done.stdout
    command("sample.py", "--run-dir", run, "--prompt", "a red circle", "--steps", 2,
            "--out", run / "out")


def test_hub_names_come_from_the_hub_s_cache_and_stay_at_their_commit(
    tars, config, networks, tmp_path
):
    """In processes of their own, without a network; what a model was trained with is used again
    after the hub's main branch has moved.
    """
    def publish(name, folder, commit):
        repository = pathlib.Path(HUB.name) / f"models--someone--{name}"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)

    old = "a" * 40
    new = "b" * 40
    for name in ("vae", "bert", "dinov2"):
        publish(name, networks / name, old)
    run = tmp_path / "run"
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", run, "--config", config,
            "--experts", 1, "--features.name", "someone/dinov2",
            "--autoencoder.name", "someone/vae", "--text.name", "someone/bert",
            "--text.length", 20)
    assert ddm.run.read_clusters(run)["extractor"]["revision"] == old

    torch.manual_seed(1)
    vae().save_pretrained(tmp_path / "other-vae")
    publish("vae", tmp_path / "other-vae", new)
    command("train_expert.py", "--run-dir", run, "--shard", 0, "--train.steps", 2)
    expert = artifacts.read_info(run / "experts" / "0.safetensors")
    assert expert["autoencoder"]["revision"] == old

    sample = ["sample.py", "--run-dir", run, "--prompt", "x"]
    command(*sample, "--steps", 2, "--out", tmp_path / "out")
    refused(*sample, "--autoencoder.name", f"someone/vae@{new}", says=[old, new], process=True)
    refused(*sample, "--autoencoder.name", "someone/none", process=True,
            says=["'someone/none' is no folder here and cannot be fetched"])


# ---- what does not fit ---------------------------------------------------------------------------

def test_a_wrong_pair_of_networks_is_refused_in_one_line(latent_run, networks, tmp_path):
    run = copy(latent_run, tmp_path / "run", "shards", "latents", "checkpoints")
    torch.manual_seed(1)
    vae().save_pretrained(tmp_path / "other-vae")
    vae(scaling_factor=0.6).save_pretrained(tmp_path / "scaled")
    weights = "diffusion_pytorch_model.safetensors"
    shutil.copy(networks / "vae" / weights, tmp_path / "scaled")
    say = ["sample.py", "--run-dir", run, "--prompt", "x", "--out", tmp_path / "out"]

    # between router, experts and what sample.py is given
    refused(*say, "--autoencoder.name", tmp_path / "other-vae",
            says=["autoencoder", "/vae'", "/other-vae'", "weights"])
    refused(*say, "--autoencoder.name", tmp_path / "scaled",
            says=["/scaled'", "scale 0.5", "scale 0.6"])
    refused(*say, "--text.name", networks / "clip", says=["text", "clip-2'", "/clip'"])
    refused(*say, "--text.name", networks / "t5", says=["text", "T5EncoderModel", "CLIPTextModel"])

    # between the models' files
    path = run / "experts" / "1.safetensors"
    before = path.read_bytes()
    for role, key, value, says in (
        ("autoencoder", "weights", "abcdef", ["weights abcdef"]),
        ("autoencoder", "scale", 0.4, ["scale 0.4", "scale 0.5"]),
        ("text", "weights", "T5EncoderModel:123", ["T5EncoderModel:123"]),
    ):
        network, info = artifacts.load(path)
        info[role] |= {key: value, "name": "another"}
        save(path, network, info)
        refused(*say, says=["1.safetensors", "do not fit together", role, "'another'",
                            str(networks), *says])
        path.write_bytes(before)

    # the same name, but other weights behind it now
    os.remove(run / "config.toml")
    moved = tmp_path / "vae"
    shutil.copytree(networks / "vae", moved)
    for file in (*glob.glob(str(run / "experts" / "*")), run / "router.safetensors"):
        network, info = artifacts.load(file)
        info["autoencoder"]["name"] = str(moved)
        save(file, network, info)
    shutil.rmtree(moved)
    shutil.copytree(tmp_path / "other-vae", moved)
    refused(*say, says=["needs the autoencoder", "weights"])
    assert not (tmp_path / "out").exists()


def test_a_cache_of_other_networks_or_settings_is_refused(latent_run, networks, tmp_path):
    run = copy(latent_run, tmp_path / "run", "experts", "checkpoints")
    torch.manual_seed(1)
    other = tmp_path / "other-vae"
    vae().save_pretrained(other)

    train = ["train_expert.py", "--run-dir", run, "--shard", 0]
    refused(*train, "--autoencoder.name", other,
            says=["clusters.safetensors", "needs the autoencoder", "/other-vae'"])
    refused(*train, "--text.name", networks / "t5",
            says=["clusters.safetensors", "needs the text", "/t5'"])
    refused(*train, "--text.length", 10, says=["length 20", "length 10"])
    refused(*train, "--data.size", 16, says=["latents/0", "data.size 8, now it is 16"])
    refused(*train, "--data.crop", "random", says=["data.crop 'center', now it is 'random'"])

    cache = ["cache_latents.py", "--run-dir", run, "--shard", 0]
    refused(*cache, "--captions", "--autoencoder.name", other,
            says=["needs the autoencoder", "/other-vae'"])
    refused(*cache, says=["was made with --captions", "delete"])
    refused(*cache, "--captions", "--autoencoder.precision", "bf16",
            says=["autoencoder", "fp32", "bf16"])

    about = about_of(run, 0)
    path = run / "latents" / "0" / "about.json"
    path.write_text(json.dumps(about | {"flip": False}))
    refused(*train, says=["data.flip False, now it is True"])

    another = about["autoencoder"] | {"name": "another", "weights": "0"}
    path.write_text(json.dumps(about | {"autoencoder": another}))
    refused(*train, says=["latents/0 was made with autoencoder 'another'", "/vae'"])

    path.write_text(json.dumps(about | {"text": {"name": ""}}))
    refused("train_expert.py", "--run-dir", run, "--shard", "all",
            says=["latents/0 was made without --captions", "delete"])


def test_a_training_does_not_resume_in_another_latent_space(latent_run, networks, tmp_path):
    run = copy(latent_run, tmp_path / "run", "latents")
    shutil.copytree(networks / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"scaling_factor": 0.6}))
    refused("train_expert.py", "--run-dir", run, "--shard", 0,
            "--autoencoder.name", tmp_path / "vae", says=["autoencoder", "scale 0.5", "scale 0.6"])


@pytest.mark.parametrize("key", ["features.name", "autoencoder.name", "text.name"])
def test_a_name_that_cannot_be_fetched(tars, config, tmp_path, key):
    refused("cluster.py", "--data", tars / "*.tar", "--run-dir", tmp_path / "run",
            "--config", config, f"--{key}", "someone/some-network",
            process=key == "features.name",
            says=[f"{key} = 'someone/some-network'", "cannot be fetched", "offline",
                  f"--{key} DIR"])
    assert not (tmp_path / "run" / "config.toml").exists()


def test_networks_of_the_wrong_kind(tars, config, networks, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    cluster = ["cluster.py", "--data", tars / "*.tar", "--run-dir", tmp_path / "run",
               "--config", config]
    for key, value, says in (
        ("features.name", networks / "t5", ["'t5'", "dinov2"]),
        ("autoencoder.name", networks / "t5", ["'t5'", "AutoencoderKL"]),
        ("features.name", tmp_path / "empty", ["without config.json"]),
        ("text.name", tmp_path / "damaged", ["is damaged"]),
        ("text.name", networks / "dinov2", ["no tokenizer"]),
    ):
        refused(*cluster, f"--{key}", value, says=[key, *says])
    refused(*cluster, "--autoencoder.name", networks / "vae", "--data.size", 9,
            says=["data.size = 9 is not a multiple of 2"])

    # weights that are not there would be random ones
    clip = transformers.CLIPModel.from_pretrained(networks / "clip-image")
    network = transformers.CLIPVisionModel(clip.config.vision_config)
    network.save_pretrained(tmp_path / "no-projection")
    says = "lacks weights of a CLIPVisionModelWithProjection: visual_projection.weight"
    with pytest.raises(errors.UserError, match=says):
        image_features(tmp_path / "no-projection")


def test_nothing_to_cache(clustered):
    cache = ["cache_latents.py", "--run-dir", clustered, "--shard"]
    refused(*cache, 0, says=["nothing to cache", "pixel space"])
    refused(*cache, 9, says=["no tars in", "shards/9", "0, 1, 2, router"])


def test_the_recipes_estimates_are_computed():
    done = command("bench/estimate.py", "configs/laion.toml", "--images", "1e6",
                   "--image-bytes", "30e3", "--tokens", "20")
    # KEY.lat: one header, one image, mean and std, 4 x 32 x 32 in f16; and a caption
    assert 2 * 4 * 32 * 32 * 2 + 512 + 1024 == 17920
    assert "latents, 17.92 kB an image" in done.stdout
    assert "826M parameters" in done.stdout
    lines = {line[:40].strip(): line for line in done.stdout.splitlines()}
    assert "162 GFLOPs" in lines["features (DINOv2), once"]
