"""The frozen networks, tiny and with random weights but of the real classes: what each role computes, and the pipeline on what they make."""
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
from PIL import Image
from test_mistakes import refused

import data
import flow
import model as models
from tools.shapes import draw_shape
from ddm import artifacts, codec, encoders, ensemble, errors, loading
import ddm.config
import ddm.process
import ddm.run
import ddm.tars

CPU = torch.device("cpu")


def settings(**values):
    """A config with these keys: `features__name` is features.name."""
    return ddm.config.make_config({key.replace("__", "."): value for key, value in values.items()})


@pytest.fixture(scope="module")
def images():
    return [draw_shape(np.random.default_rng(i), 40)[0] for i in range(5)]


# ---- image features -----------------------------------------------------------------------------------------------

def test_dinov2_features_are_pooled_as_the_config_says_and_of_length_one(networks, images):
    network = transformers.Dinov2Model.from_pretrained(networks / "dinov2").eval()
    x = torch.stack([torch.from_numpy(data.square(image, 224).copy()) for image in images]).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        tokens = network(x).last_hidden_state
    assert tokens.shape[1] == 1 + 16 * 16       # patches of 14
    for pool, wanted in (("cls", tokens[:, 0]), ("cls+mean", torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1))):
        prepare, features, info = encoders.image_features(settings(features__name=str(networks / "dinov2"), features__pool=pool, features__batch=2).features, CPU)
        found = torch.from_numpy(features([prepare(image) for image in images]))
        torch.testing.assert_close(found, wanted / wanted.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)
        assert features([]).shape == (0, found.shape[1]) and pool in info["preprocessing"] and "224" in info["preprocessing"]
        half = encoders.image_features(settings(features__name=str(networks / "dinov2"), features__pool=pool, features__precision="bf16").features, CPU)[1]
        torch.testing.assert_close(torch.from_numpy(half([prepare(image) for image in images])), found, rtol=0.1, atol=0.02)


@pytest.fixture
def as_on_a_gpu():
    """fp32 products in TF32, as ddm.process.start has them there."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def test_fp32_features_are_computed_without_tf32(networks, images, monkeypatch, as_on_a_gpu):
    seen, plain = [], encoders.load

    def load(*args):
        network = plain(*args)
        network.register_forward_pre_hook(lambda *_: seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)))
        return network

    monkeypatch.setattr(encoders, "load", load)
    prepare, features, info = encoders.image_features(settings(features__name=str(networks / "dinov2")).features, CPU)
    features([prepare(image) for image in images])
    assert info["preprocessing"].endswith(" float32") and seen == [("highest", False)]
    prepare, score, info = encoders.clip_scorer(str(networks / "clip-image"), CPU)
    score([prepare(image) for image in images], ["a"] * 5)
    assert info["precision"] == "fp32" and seen[1:] == [("highest", False)]
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)        # as they were
    with pytest.raises(ZeroDivisionError), encoders.exact_products():
        1 / 0
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("asked, device, ran", [("auto", "cpu", "fp32"), ("fp32", "cpu", "fp32"), ("bf16", "cpu", "bf16"), ("tf32", "cpu", "fp32"),
                                                ("auto", "cuda", "bf16"), ("fp32", "cuda", "tf32"), ("bf16", "cuda", "bf16"), ("tf32", "cuda", "tf32")])
def test_a_precision_is_named_by_what_runs(asked, device, ran):
    assert encoders.resolve(asked, torch.device(device)) == ran


def test_records_of_networks_say_the_precision_that_ran(latent_run):
    about = json.loads((latent_run / "latents" / "0" / "about.json").read_text())
    expert = artifacts.read_info(latent_run / "experts" / "0.safetensors")
    assert [made[role]["precision"] for made in (about, expert) for role in ("autoencoder", "text")] == ["fp32"] * 4
    meant = ddm.run.read_clusters(latent_run)["networks"]
    assert "precision" not in meant["autoencoder"] and "precision" not in meant["text"]      # each stage has its own
    config = ddm.config.load_run(latent_run, {})
    on_a_gpu = codec.Space(config, torch.device("cuda"), meant)       # which loads nothing yet
    assert [on_a_gpu.info[role]["precision"] for role in ("autoencoder", "text")] == ["tf32", "bf16"]


def test_the_patches_mean_leaves_registers_out(images, tmp_path):
    torch.manual_seed(0)
    network = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, num_register_tokens=3)).eval()
    network.save_pretrained(tmp_path / "registers")
    prepare, features, _ = encoders.image_features(settings(features__name=str(tmp_path / "registers"), features__pool="cls+mean").features, CPU)
    x = torch.from_numpy(prepare(images[0]).copy()).permute(2, 0, 1)[None] / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        tokens = network(x).last_hidden_state
    wanted = torch.cat([tokens[:, 0], tokens[:, 4:].mean(1)], 1)
    torch.testing.assert_close(torch.from_numpy(features([prepare(images[0])])), wanted / wanted.norm(), rtol=1e-4, atol=1e-5)


def test_clip_image_features_are_the_projected_embedding_under_clip_s_own_statistics(networks, images):
    network = transformers.CLIPModel.from_pretrained(networks / "clip-image").eval()
    x = torch.stack([torch.from_numpy(data.square(image, 28).copy()) for image in images]).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)) / torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        wanted = network.visual_projection(network.vision_model(x).pooler_output)
    prepare, features, _ = encoders.image_features(settings(features__name=str(networks / "clip-image")).features, CPU)
    found = torch.from_numpy(features([prepare(image) for image in images]))
    torch.testing.assert_close(found, wanted / wanted.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_resnet_features_are_the_mean_over_the_picture_and_may_stay_as_they_are(images, tmp_path):
    torch.manual_seed(0)
    network = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")).eval()
    network.save_pretrained(tmp_path / "resnet")
    config = settings(features__name=str(tmp_path / "resnet")).features
    with pytest.raises(errors.UserError, match="no preprocessor_config.json"):
        encoders.image_features(config, CPU)
    (tmp_path / "resnet" / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 32}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}')
    x = torch.stack([torch.from_numpy(data.square(image, 32).copy()) for image in images]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        wanted = network((x - 0.5) / 0.25).last_hidden_state.mean((2, 3))
    for normalise, scale in ((False, 1), (True, wanted.norm(dim=1, keepdim=True))):
        prepare, features, _ = encoders.image_features(config, CPU, normalise)
        torch.testing.assert_close(torch.from_numpy(features([prepare(image) for image in images])), wanted / scale, rtol=1e-4, atol=1e-5)


# ---- autoencoder --------------------------------------------------------------------------------------------------

def test_latents_are_standardised_by_the_autoencoder_s_own_config(networks, tmp_path):
    x = torch.randn(3, 3, 8, 8)
    per_channel = dict(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5, 1.0, 2.0, 4.0], shift_factor=None)
    for options, scale, shift in (({}, 0.5, 0.25), ({"shift_factor": None, "scaling_factor": 3.0}, 3.0, 0.0),
                                  (per_channel, [1.0, 0.5, 0.25, 0.125], [1.0, 2.0, 3.0, 4.0])):
        network = vae(**options)
        network.save_pretrained(tmp_path / "vae")
        found = encoders.Autoencoder(str(tmp_path / "vae"), CPU)
        mean, std = found.encode(x)
        scale, shift = (torch.tensor(v).view(-1, 1, 1) for v in (scale, shift))
        with torch.no_grad():
            posterior = network.eval().encode(x).latent_dist
            torch.testing.assert_close(mean, (posterior.mean - shift) * scale)
            torch.testing.assert_close(std, posterior.std * scale)
            torch.testing.assert_close(found.decode(mean), network.decode(posterior.mean).sample)


def test_a_config_that_leaves_the_scale_out_means_the_class_s_default(networks, tmp_path):
    """As Stable Diffusion's own autoencoder does."""
    shutil.copytree(networks / "vae", tmp_path / "vae")
    about = json.loads((tmp_path / "vae" / "config.json").read_text())
    for key in ("scaling_factor", "shift_factor"):
        del about[key]
    (tmp_path / "vae" / "config.json").write_text(json.dumps(about))
    info = encoders.Autoencoder(str(tmp_path / "vae"), CPU).info
    assert (info["scale"], info["shift"]) == (0.18215, 0.0)


def test_the_tiny_autoencoder_has_no_posterior(networks):
    found, network = encoders.Autoencoder(str(networks / "tiny-vae"), CPU), diffusers.AutoencoderTiny.from_pretrained(networks / "tiny-vae").eval()
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    mean, std = found.encode(x)
    assert std is None and found.info["factor"] == 2 and mean.shape == (2, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(mean, network.encode(x).latents)
        torch.testing.assert_close(found.decode(mean), network.decode(mean).sample)


@pytest.mark.parametrize("name", ["vae", "tiny-vae"])
def test_decoding_is_bounded_in_batch_and_in_size(networks, monkeypatch, name):
    monkeypatch.setattr(encoders, "AT_ONCE", 3 * 64)
    whole = encoders.Autoencoder(str(networks / name), CPU)
    sizes = []
    monkeypatch.setattr(encoders, "TILE", 16)
    tiled = encoders.Autoencoder(str(networks / name), CPU)
    kind = getattr(diffusers.models.autoencoders, {"vae": "autoencoder_kl", "tiny-vae": "autoencoder_tiny"}[name])
    decoder = kind.Decoder if name == "vae" else kind.DecoderTiny
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda self, z, *rest: (sizes.append(tuple(z.shape)), forward(self, z, *rest))[1])
    z = torch.randn(7, 4, 4, 4)
    a = whole.decode(z)
    assert max(n for n, *_ in sizes) == 3 and sum(n for n, *_ in sizes) == 7
    torch.testing.assert_close(a, torch.cat([whole.decode(one) for one in z.split(1)]), rtol=1e-3, atol=1e-4)
    sizes.clear()
    z = torch.ones(1, 4, 40, 40)
    pictures = tiled.decode(z)
    assert max(max(shape[2:]) for shape in sizes) == 8 and len(sizes) > 25      # tiles of 16 pixels that overlap
    # of constant latents: a constant picture, but for the borders of the picture, or of a tile
    middle = whole.decode(torch.ones(1, 4, 8, 8))[..., 7:9, 7:9].mean()
    assert pictures.shape == (1, 3, 80, 80) and (pictures.median() - middle).abs() < 0.2
    sizes.clear()
    tiled.decode(z[..., :8, :8])
    assert [shape[2:] for shape in sizes] == [(8, 8)]       # what fits is decoded whole
    mean = tiled.encode(torch.zeros(1, 3, 40, 40))[0]
    inside = whole.encode(torch.zeros(1, 3, 16, 16))[0][..., 3:5, 3:5].mean((2, 3))
    assert mean.shape == (1, 4, 20, 20) and (mean.flatten(2).median(2)[0] - inside).abs().max() < 0.2


# ---- text ---------------------------------------------------------------------------------------------------------

CAPTIONS = ["a red cross", "blue", "", "  ", "a yellow triangle"]


def encoder(networks, *names, length=20, layer="last"):
    return encoders.TextEncoder(settings(text__name=" + ".join(str(networks / n) for n in names), text__length=length, text__layer=layer).text, CPU)


@pytest.mark.parametrize("name", ["clip", "clip-2", "clip-image", "t5", "bert", "bart"])
def test_token_features_are_the_encoder_s_and_zero_behind_the_last_token(networks, name):
    kind = {"clip": transformers.CLIPTextModel, "clip-2": transformers.CLIPTextModelWithProjection, "t5": transformers.T5EncoderModel,
            "bert": transformers.BertModel, "clip-image": transformers.CLIPModel, "bart": transformers.BartModel}[name]
    network, tokenizer = kind.from_pretrained(networks / name).eval(), transformers.AutoTokenizer.from_pretrained(networks / name)
    network = {"clip-image": lambda: network.text_model, "bart": lambda: network.get_encoder()}.get(name, lambda: network)()
    found = encoder(networks, name)
    c = found.encode(CAPTIONS)
    assert c.shape == (5, 20, found.info["dim"]) and c.dtype == torch.float16
    for i in (0, 1, 4):
        with torch.no_grad():
            tokens = tokenizer(CAPTIONS[i], return_tensors="pt")        # alone, without padding
            wanted = network(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state[0]
        n = len(wanted)
        assert 4 < n < 20
        torch.testing.assert_close(c[i, :n].float(), wanted, rtol=2e-3, atol=2e-3)
        assert c[i, n:].abs().max() == 0 and c[i, :n].any(1).all()
    assert c[2:4].abs().max() == 0       # the empty caption


def test_sdxl_s_pair_of_encoders_stands_side_by_side(networks):
    one, two, pair = (encoder(networks, *names, layer="penultimate") for names in (["clip"], ["clip-2"], ["clip", "clip-2"]))
    assert pair.info["dim"] == 24
    torch.testing.assert_close(pair.encode(CAPTIONS), torch.cat([one.encode(CAPTIONS), two.encode(CAPTIONS)], dim=2))
    network = transformers.CLIPTextModel.from_pretrained(networks / "clip").eval()
    with torch.no_grad():
        out = network(**clip_tokenizer()("a red cross", return_tensors="pt"), output_hidden_states=True)
    n = out.hidden_states[-2].shape[1]
    torch.testing.assert_close(one.encode(["a red cross"])[0, :n].float(), out.hidden_states[-2][0], rtol=2e-3, atol=2e-3)


def test_long_captions_are_cut_with_one_warning(networks):
    found = encoder(networks, "clip", length=8)
    with redirect_stderr(io.StringIO()) as stderr:
        first = found.encode(["a purple triangle", "a"])
        found.encode(["another long caption"])
    assert stderr.getvalue().count("warning") == 1 and "1 of 2 captions are longer than text.length = 8 tokens: cut" in stderr.getvalue()
    assert first[0].any(1).all()


def test_more_tokens_than_the_encoder_reads(networks):
    with pytest.raises(errors.UserError, match="text.length = 25, but .*clip' reads 24 tokens at most"):
        encoder(networks, "clip", length=25)


def test_the_empty_prompt_is_the_unconditional_branch(networks, latent_run):
    network, _ = artifacts.load(latent_run / "experts" / "0.safetensors")
    c = encoder(networks, "clip", "clip-2", layer="penultimate").encode(["", "a red circle"])
    assert torch.equal(models.null_condition(network.config, c)[:1], c[:1])
    with torch.no_grad():
        network.head.weight.normal_()
        for block in network.blocks:
            block.cross.proj.weight.normal_()
        x, t = torch.randn(1, 4, 4, 4).expand(2, -1, -1, -1), torch.full((2,), 0.5)
        null = models.null_condition(network.config, c)
        out, none = network(x, t, c), network(x, t, null)
    torch.testing.assert_close(out[0], none[0])
    assert (out[1] - none[1]).abs().max() > 1e-3


# ---- identity -----------------------------------------------------------------------------------------------------

def test_a_network_is_its_weights_and_not_its_name_or_file(networks, tmp_path):
    clip = encoders.TextEncoder(settings(text__name=str(networks / "clip"), text__length=20).text, CPU).info
    shutil.copytree(networks / "clip", tmp_path / "elsewhere")
    moved = encoders.TextEncoder(settings(text__name=str(tmp_path / "elsewhere"), text__length=20).text, CPU).info
    assert moved["name"] != clip["name"] and encoders.identity(moved) == encoders.identity(clip)
    network = transformers.CLIPTextModel.from_pretrained(networks / "clip")
    mark = encoders.digest(network)
    renamed = torch.nn.ModuleDict({"other": network})
    assert encoders.digest(renamed) == mark == clip["weights"].split(":")[1]
    with torch.no_grad():
        network.final_layer_norm.weight[0] += 1e-3
    assert encoders.digest(network) != mark


# ---- the pipeline -------------------------------------------------------------------------------------------------

def rows(run, name):
    with open(os.path.join(run, "logs", f"{name}.csv"), newline="") as f:
        return list(csv.DictReader(f))


def members(folder):
    found = {}
    for path in sorted(glob.glob(os.path.join(folder, "*.tar"))):
        with tarfile.open(path) as tar:
            found |= {m.name: tar.extractfile(m).read() for m in tar}
    return found


def test_captions_of_too_many_words_are_cut_with_a_warning(capsys):
    space = codec.Space(settings(text__length=3, text__vocab=64))
    assert torch.equal(space.captions(["a red circle"])[0], space.captions(["a red circle in a box"])[0])
    assert "1 of 1 captions are longer than text.length = 3 words: cut" in capsys.readouterr().err


def test_an_encoder_and_the_hash_see_normalised_captions(monkeypatch):
    space = codec.Space(settings(text__length=3, text__vocab=64))
    assert torch.equal(*space.captions([" un  café\n", "un cafe\u0301"]))
    monkeypatch.setattr(space, "network", lambda role: SimpleNamespace(encode=list))
    assert space.captions([" un  caf\u00e9\n", "un cafe\u0301", "\ufeff\u00a0", "🎉\r\n"]) == ["un caf\u00e9", "un caf\u00e9", "", "🎉"]


def test_cached_latents_and_captions_are_what_the_networks_make_of_each_sample(latent_run, networks):
    source, cached = members(latent_run / "shards" / "router"), members(latent_run / "latents" / "router")
    about = json.loads((latent_run / "latents" / "router" / "about.json").read_text())
    assert about["shapes"] == [[2, 2, 4, 4, 4]] and list(about["tars"]) == [f"0000{i}.tar" for i in range(3)]
    assert {n for n in cached if not n.endswith((".lat", ".tok"))} == {n for n in source if not n.endswith(".png")}
    assert all(cached[n] == source[n] for n in cached if n in source)
    latent, text = encoders.Autoencoder(str(networks / "vae"), CPU), encoder(networks, "clip", "clip-2", layer="penultimate")
    for key in sorted(n[:-4] for n in source if n.endswith(".png"))[::60]:
        image = data.decode(source[f"{key}.png"])
        x = data.to_float(torch.from_numpy(np.stack([data.square(image, 8), data.square(image, 8, mirror=True)])))
        wanted = torch.stack(latent.encode(x), dim=1)
        found = torch.from_numpy(np.frombuffer(cached[f"{key}.lat"], np.float16).reshape(2, 2, 4, 4, 4).astype(np.float32))
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-4)
        c = text.encode([source[f"{key}.txt"].decode()])[0]
        tokens = np.frombuffer(cached[f"{key}.tok"], np.float16).reshape(-1, 24)
        torch.testing.assert_close(torch.from_numpy(tokens.copy()), c[:len(tokens)], rtol=1e-2, atol=1e-2)
        assert not c[len(tokens):].any() and len(tokens) == len(clip_tokenizer()(source[f"{key}.txt"].decode())["input_ids"])


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
    logs = {}
    for kind, gone in (("fly", "latents"), ("cached", "shards")):
        run = shutil.copytree(latent_run, tmp_path / kind, ignore=shutil.ignore_patterns(gone, "experts", "logs", "checkpoints", "samples"))
        done = command("train_expert.py", "--shard", 0, "--run-dir", run)
        assert ("latents not cached" if kind == "fly" else "latents cached in") in done.stdout
        logs[kind] = [float(row["loss"]) for row in rows(run, "expert-0")]
    assert logs["fly"] == pytest.approx(logs["cached"], rel=1e-3)
    assert (tmp_path / "cached" / "experts" / "0.safetensors").read_bytes() == (latent_run / "experts" / "0.safetensors").read_bytes()


def test_a_monolith_is_not_trained_on_part_of_the_data(latent_run, tmp_path):
    run = shutil.copytree(latent_run, tmp_path / "run", ignore=shutil.ignore_patterns("experts", "checkpoints"))
    shutil.rmtree(run / "shards" / "1")
    train = ["train_expert.py", "--run-dir", run, "--shard", "all"]
    refused(*train, "--data.use_latents", "false", says=["no tars in", "shards/1"])
    shutil.rmtree(run / "latents" / "0")
    refused(*train, says=["no tars in", "shards/1", "latents are used where all shards have them"])


def test_each_epoch_draws_from_the_posterior_anew(latent_run):
    tars = sorted(glob.glob(str(latent_run / "latents" / "0" / "*.tar")))
    samples = data.TarDataset(tars, 8, "text", None, flip=True, noise_shape=(4, 4, 4), posterior=True, latent=[2, 2, 4, 4, 4], tokens=(20, 24))
    n, drawn = len(samples), {}
    for position in range(40 * n):
        if samples.order(position) == 0:
            drawn[position] = samples[position]["x"]
    assert len(drawn) == 40
    stored = np.frombuffer(samples.members(0)["lat"], np.float16).reshape(2, 2, 4, 4, 4).astype(np.float32)
    z, mirrored = [], 0
    for position, x in drawn.items():
        flip = torch.rand(1, generator=torch.Generator().manual_seed(data.mix(0, position)), dtype=torch.float64).item() < 0.5
        mirrored += flip
        z.append((x.numpy() - stored[int(flip), 0]) / stored[int(flip), 1])
    assert abs(np.mean(z)) < 0.06 and abs(np.std(z) - 1) < 0.05 and 10 < mirrored < 30


def test_caching_on_two_ranks_and_after_an_interruption_gives_the_same(latent_run, tmp_path):
    run = shutil.copytree(latent_run, tmp_path / "run", ignore=shutil.ignore_patterns("latents", "experts", "checkpoints"))
    done = command("cache_latents.py", "--run-dir", run, "--shard", "router", "--captions", ranks=2)
    assert "GB per million images" in done.stdout and "240 samples made now" in done.stdout
    same = lambda: members(run / "latents" / "router") == members(latent_run / "latents" / "router")
    assert same()
    os.remove(run / "latents" / "router" / "00001.tar")
    kept = os.stat(run / "latents" / "router" / "00000.tar").st_mtime_ns
    refused("train_router.py", "--run-dir", run, says=["lacks 1 of 3 tars, 00001.tar", "cache_latents.py", "--data.use_latents false"])
    (run / "latents" / "router" / "00001.tar.1.tmp").write_bytes(b"torn")
    done = command("cache_latents.py", "--run-dir", run, "--shard", "router", "--captions")
    assert same() and "100 samples made now" in done.stdout and os.stat(run / "latents" / "router" / "00000.tar").st_mtime_ns == kept
    assert not glob.glob(str(run / "latents" / "router" / "*.tmp"))


def test_a_cache_of_other_shards_is_not_used(latent_run, tmp_path):
    run = shutil.copytree(latent_run, tmp_path / "run", ignore=shutil.ignore_patterns("experts", "checkpoints"))
    train, shard = ["train_expert.py", "--run-dir", run, "--shard", 0], run / "shards" / "0" / "00001.tar"
    with ddm.tars.TarWriter(str(shard)) as tar:         # a shard that has changed since
        for name, payload in list(members(latent_run / "shards" / "0").items())[:2]:
            tar.add(name, payload)
    refused(*train, says=["shards/0 is not as its manifest says", "00001.tar", "copy it again"])
    refused("cache_latents.py", "--run-dir", run, "--shard", 0, "--captions", says=["shards/0 is not as its manifest says"])
    manifest = json.loads((shard.parent / "manifest.json").read_text())
    manifest["tars"]["00001.tar"] |= {"samples": 1, "bytes": shard.stat().st_size, "sha256": hashlib.sha256(shard.read_bytes()).hexdigest()}
    (shard.parent / "manifest.json").write_text(json.dumps(manifest))
    refused(*train, says=["latents/0/00001.tar was not made of", "--data.use_latents false"])
    done = command("cache_latents.py", "--run-dir", run, "--shard", 0, "--captions")
    assert ": 1 samples made now" in done.stdout.replace("; ", ": ")
    assert set(members(run / "latents" / "0")) < set(members(latent_run / "latents" / "0"))
    shutil.copy(run / "latents" / "0" / "00001.tar", run / "latents" / "0" / "surplus.tar")
    refused(*train, says=["surplus.tar was not made of"])
    os.remove(run / "latents" / "0" / "surplus.tar")
    about = json.loads((run / "latents" / "0" / "about.json").read_text())
    (run / "latents" / "0" / "about.json").write_text(json.dumps(about | {"fingerprint": "0123"}))
    refused(*train, says=["clustering", "'0123'", about["fingerprint"]])
    refused("cache_latents.py", "--run-dir", run, "--shard", 0, "--captions", says=["fingerprint", "'0123'", about["fingerprint"]])
    for damage in ("{", "[]", json.dumps(about | {"size": "8"}), json.dumps(about | {"text": None}), json.dumps(about | {"shapes": []}), json.dumps(about | {"shapes": [[2]]}),
                   json.dumps(about | {"tars": {"00001.tar": 2048}}), "[" * 100_000):
        (run / "latents" / "0" / "about.json").write_text(damage)
        refused(*train, says=["about.json is damaged"])


def test_the_size_that_is_printed_is_the_size_on_disk(latent_run, tmp_path):
    run = shutil.copytree(latent_run, tmp_path / "run", ignore=shutil.ignore_patterns("latents", "experts", "checkpoints"))
    text = command("cache_latents.py", "--run-dir", run, "--shard", "1", "--captions").stdout.partition("\n")[2]      # the first line names the device
    count, each = int(text.split(": ")[1].split()[0]), [float(text.split(word)[0].split()[-1]) for word in (" bytes", " of token", " of other")]
    size = sum(os.path.getsize(p) - 1024 for p in glob.glob(str(run / "latents" / "1" / "*.tar")))
    assert each[0] == 512 + 512 and size == pytest.approx(count * sum(each), rel=0.05)


def test_a_disk_that_is_too_small_is_said_once_on_all_ranks(latent_run, tmp_path):
    """Also: the size is measured where there are samples, and the causes of unusable ones are those of all ranks."""
    run = shutil.copytree(latent_run, tmp_path / "run", ignore=shutil.ignore_patterns("latents", "experts", "checkpoints"))
    folder = run / "shards" / "1"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, members in (("00000.tar", {}), ("99999.tar", {"x.png": b"no picture", "x.txt": b"a caption"})):
        with ddm.tars.TarWriter(str(folder / name)) as tar:
            for member, payload in members.items():
                tar.add(member, payload)
        manifest["tars"][name] = {"samples": len(members) // 2, "bytes": tar.bytes, "sha256": tar.digest.hexdigest(), "source": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    script = tmp_path / "small.py"
    script.write_text("import os, shutil, sys; sys.path.insert(0, os.getcwd()); import cache_latents; from ddm import errors\n"
                      "from types import SimpleNamespace\n"
                      "shutil.disk_usage = lambda path: SimpleNamespace(free=100)\n"
                      "errors.script(cache_latents.main)\n")
    done = command(script, "--run-dir", run, "--shard", 1, ranks=2, check=False, real=True)
    assert done.returncode == 1 and done.stderr.count("GB more, the disk has 1e-07 GB left") == 1 and "Connection closed" not in done.stderr
    done = command("cache_latents.py", "--run-dir", run, "--shard", 1, ranks=2)
    assert "1 left out: undecodable" in done.stdout and " 0 of other members" not in done.stdout


def test_samples_are_decoded_pictures_also_where_the_networks_have_moved(latent_run, networks, tmp_path):
    run = shutil.copytree(latent_run, tmp_path / "run", ignore=shutil.ignore_patterns("shards", "latents", "checkpoints"))
    flags = ["--prompt", "a red circle", "--prompt", "", "--num-images", 2, "--steps", 3]
    command("sample.py", "--run-dir", run, *flags, "--out", tmp_path / "a")
    pictures = [np.asarray(Image.open(p)).astype(int) for p in sorted(glob.glob(str(tmp_path / "a" / "0*.png")))]
    assert len(pictures) == 4 and all(p.shape == (8, 8, 3) for p in pictures)
    # what the models say, decoded by hand
    team = ensemble.Ensemble(run, CPU)
    c = encoder(networks, "clip", "clip-2", layer="penultimate").encode(["a red circle"])
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    *_, x = flow.integrate(team.velocity(ddm.config.make_config().sample, c), x, flow.time_grid(3))
    wanted = data.to_uint8(encoders.Autoencoder(str(networks / "vae"), CPU).decode(x))[0].numpy().astype(int)
    assert np.abs(pictures[1] - wanted).max() <= 1
    shutil.copytree(networks, tmp_path / "moved")
    for path in glob.glob(str(run / "experts" / "*")) + [run / "router.safetensors"]:       # as if the folder of the training machine were not here
        network, info = artifacts.load(path)
        info["autoencoder"]["name"], info["text"]["name"] = "/elsewhere/vae", "/elsewhere/clip + /elsewhere/clip-2"
        info.pop("model")
        artifacts.save(path, network.config, network.state_dict(), **info)
    os.remove(run / "config.toml")      # which says where they are
    refused("sample.py", "--run-dir", run, *flags, "--out", tmp_path / "b", says=["text.name = '/elsewhere/clip'", "no such folder", "--text.name"])
    command("sample.py", "--run-dir", run, *flags, "--out", tmp_path / "b", "--autoencoder.name", tmp_path / "moved" / "vae",
            "--text.name", f"{tmp_path / 'moved' / 'clip'} + {tmp_path / 'moved' / 'clip-2'}")
    again = [np.asarray(Image.open(p)).astype(int) for p in sorted(glob.glob(str(tmp_path / "b" / "0*.png")))]
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(pictures, again, strict=True))


def test_clip_clusters_tiny_latents_and_t5_on_the_fly_and_without_flips(tars, config, networks, tmp_path):
    run = tmp_path / "run"
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", run, "--config", config, "--experts", 1, "--features.name", networks / "clip-image",
            "--autoencoder.name", networks / "tiny-vae", "--text.name", networks / "t5", "--text.length", 20, "--data.flip", "false", ranks=2)
    about = ddm.run.read_clusters(run)
    assert about["extractor"]["class"] == "CLIPVisionModelWithProjection" and about["networks"]["text"]["weights"].startswith("T5EncoderModel:")
    torch.manual_seed(1)
    transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(networks / "clip-image")).save_pretrained(tmp_path / "clip-image")
    shutil.copytree(run, tmp_path / "copy")
    text = (run / "config.toml").read_text()
    (tmp_path / "copy" / "config.toml").write_text(text.replace(str(networks / "clip-image"), str(tmp_path / "clip-image")))
    refused("cluster.py", "--data", tars / "*.tar", "--run-dir", tmp_path / "copy", says=["made with features of", str(networks), str(tmp_path / "clip-image")])
    done = command("train_expert.py", "--run-dir", run, "--shard", 0, "--train.steps", 4)
    assert "latents not cached" in done.stdout and "token features not cached" in done.stdout
    command("cache_latents.py", "--run-dir", run, "--shard", 0)
    assert json.loads((run / "latents" / "0" / "about.json").read_text())["shapes"] == [[1, 1, 4, 4, 4]]
    done = command("train_expert.py", "--run-dir", run, "--shard", 0)       # goes on on the cache, captions still on the fly
    assert "latents cached in" in done.stdout and "resumed at step 4" in done.stdout
    command("sample.py", "--run-dir", run, "--prompt", "a red circle", "--steps", 2, "--out", run / "out")


def test_hub_names_come_from_the_hub_s_cache_and_stay_at_their_commit(tars, config, networks, tmp_path):
    """In processes of their own, without a network; what a model was trained with is used again after the hub's main branch has moved."""
    def publish(name, folder, commit):
        repository = pathlib.Path(HUB.name) / f"models--someone--{name}"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)

    for name in ("vae", "bert", "dinov2"):
        publish(name, networks / name, "a" * 40)
    run = tmp_path / "run"
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", run, "--config", config, "--experts", 1, "--features.name", "someone/dinov2",
            "--autoencoder.name", "someone/vae", "--text.name", "someone/bert", "--text.length", 20)
    assert ddm.run.read_clusters(run)["extractor"]["revision"] == "a" * 40
    torch.manual_seed(1)
    vae().save_pretrained(tmp_path / "other-vae")
    publish("vae", tmp_path / "other-vae", "b" * 40)
    command("train_expert.py", "--run-dir", run, "--shard", 0, "--train.steps", 2)
    assert artifacts.read_info(run / "experts" / "0.safetensors")["autoencoder"]["revision"] == "a" * 40
    command("sample.py", "--run-dir", run, "--prompt", "x", "--steps", 2, "--out", tmp_path / "out")
    done = command("sample.py", "--run-dir", run, "--prompt", "x", "--autoencoder.name", "someone/vae@" + "b" * 40, check=False)
    assert done.returncode == 2 and "a" * 40 in done.stderr and "b" * 40 in done.stderr
    done = command("sample.py", "--run-dir", run, "--prompt", "x", "--autoencoder.name", "someone/none", check=False)
    assert done.returncode == 2 and "'someone/none' is no folder here and cannot be fetched" in done.stderr.splitlines()[-1]


# ---- what does not fit --------------------------------------------------------------------------------------------

def rewrite(path, change):
    """The model file with other metadata."""
    network, info = artifacts.load(path)
    change(info)
    info.pop("model")
    artifacts.save(path, network.config, network.state_dict(), **info)


def test_a_wrong_pair_of_networks_is_refused_in_one_line(latent_run, networks, tmp_path):
    run = shutil.copytree(latent_run, tmp_path / "run", ignore=shutil.ignore_patterns("shards", "latents", "checkpoints"))
    torch.manual_seed(1)
    vae().save_pretrained(tmp_path / "other-vae")
    vae(scaling_factor=0.6).save_pretrained(tmp_path / "scaled")
    shutil.copy(networks / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "scaled")
    say = ["sample.py", "--run-dir", run, "--prompt", "x", "--out", tmp_path / "out"]
    # between router, experts and what sample.py is given
    refused(*say, "--autoencoder.name", tmp_path / "other-vae", says=["autoencoder", "/vae'", "/other-vae'", "weights"])
    refused(*say, "--autoencoder.name", tmp_path / "scaled", says=["/scaled'", "scale 0.5", "scale 0.6"])
    refused(*say, "--text.name", networks / "clip", says=["text", "clip-2'", "/clip'"])
    refused(*say, "--text.name", networks / "t5", says=["text", "T5EncoderModel", "CLIPTextModel"])
    # between the models' files
    path = run / "experts" / "1.safetensors"
    before = path.read_bytes()
    for role, key, value, words in (("autoencoder", "weights", "abcdef", ["weights abcdef"]), ("autoencoder", "scale", 0.4, ["scale 0.4", "scale 0.5"]),
                                    ("text", "weights", "T5EncoderModel:123", ["T5EncoderModel:123"])):
        rewrite(path, lambda info: info[role].update({key: value, "name": "another"}))
        refused(*say, says=["1.safetensors", "do not fit together", role, "'another'", str(networks), *words])
        path.write_bytes(before)
    # the same name, but other weights behind it now
    os.remove(run / "config.toml")
    shutil.copytree(networks / "vae", tmp_path / "vae")
    for file in (*glob.glob(str(run / "experts" / "*")), run / "router.safetensors"):
        rewrite(file, lambda info: info["autoencoder"].update(name=str(tmp_path / "vae")))
    shutil.rmtree(tmp_path / "vae")
    shutil.copytree(tmp_path / "other-vae", tmp_path / "vae")
    refused(*say, says=["needs the autoencoder", "weights"])
    assert not (tmp_path / "out").exists()


def test_a_cache_of_other_networks_or_settings_is_refused(latent_run, networks, tmp_path):
    run = shutil.copytree(latent_run, tmp_path / "run", ignore=shutil.ignore_patterns("experts", "checkpoints"))
    torch.manual_seed(1)
    vae().save_pretrained(tmp_path / "other-vae")
    train = ["train_expert.py", "--run-dir", run, "--shard", 0]
    refused(*train, "--autoencoder.name", tmp_path / "other-vae", says=["clusters.safetensors", "needs the autoencoder", "/other-vae'"])
    refused(*train, "--text.name", networks / "t5", says=["clusters.safetensors", "needs the text", "/t5'"])
    refused(*train, "--text.length", 10, says=["length 20", "length 10"])
    refused(*train, "--data.size", 16, says=["latents/0", "data.size 8, now it is 16"])
    refused(*train, "--data.crop", "random", says=["data.crop 'center', now it is 'random'"])
    refused("cache_latents.py", "--run-dir", run, "--shard", 0, "--autoencoder.name", tmp_path / "other-vae", "--captions", says=["needs the autoencoder", "/other-vae'"])
    refused("cache_latents.py", "--run-dir", run, "--shard", 0, says=["was made with --captions", "delete"])
    refused("cache_latents.py", "--run-dir", run, "--shard", 0, "--captions", "--autoencoder.precision", "bf16", says=["autoencoder", "fp32", "bf16"])
    about = json.loads((run / "latents" / "0" / "about.json").read_text())
    (run / "latents" / "0" / "about.json").write_text(json.dumps(about | {"flip": False}))
    refused(*train, says=["data.flip False, now it is True"])
    (run / "latents" / "0" / "about.json").write_text(json.dumps(about | {"autoencoder": about["autoencoder"] | {"name": "another", "weights": "0"}}))
    refused(*train, says=["latents/0 was made with autoencoder 'another'", "/vae'"])
    (run / "latents" / "0" / "about.json").write_text(json.dumps(about | {"text": {"name": ""}}))
    refused("train_expert.py", "--run-dir", run, "--shard", "all", says=["latents/0 was made without --captions", "delete"])


def test_a_training_does_not_go_on_in_another_latent_space(latent_run, networks, tmp_path):
    run = shutil.copytree(latent_run, tmp_path / "run", ignore=shutil.ignore_patterns("latents"))
    shutil.copytree(networks / "vae", tmp_path / "vae")
    about = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(about | {"scaling_factor": 0.6}))
    refused("train_expert.py", "--run-dir", run, "--shard", 0, "--autoencoder.name", tmp_path / "vae", says=["autoencoder", "scale 0.5", "scale 0.6"])


@pytest.mark.parametrize("key", ["features.name", "autoencoder.name", "text.name"])
def test_a_name_that_cannot_be_fetched(tars, config, tmp_path, key):
    refused("cluster.py", "--data", tars / "*.tar", "--run-dir", tmp_path / "run", "--config", config, f"--{key}", "someone/some-network",
            process=key == "features.name", says=[f"{key} = 'someone/some-network'", "cannot be fetched", "offline", f"--{key} DIR"])
    assert not (tmp_path / "run" / "config.toml").exists()


def test_networks_of_the_wrong_kind(tars, config, networks, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    for key, value, says in (("features.name", networks / "t5", ["'t5'", "dinov2"]), ("autoencoder.name", networks / "t5", ["'t5'", "AutoencoderKL"]),
                             ("features.name", tmp_path / "empty", ["without config.json"]), ("text.name", tmp_path / "damaged", ["is damaged"]),
                             ("text.name", networks / "dinov2", ["no tokenizer"])):
        refused("cluster.py", "--data", tars / "*.tar", "--run-dir", tmp_path / "run", "--config", config, f"--{key}", value, says=[key, *says])
    refused("cluster.py", "--data", tars / "*.tar", "--run-dir", tmp_path / "run", "--config", config, "--autoencoder.name", networks / "vae", "--data.size", 9,
            says=["data.size = 9 is not a multiple of 2"])
    # weights that are not there would be random ones
    network = transformers.CLIPVisionModel(transformers.CLIPModel.from_pretrained(networks / "clip-image").config.vision_config)
    network.save_pretrained(tmp_path / "no-projection")
    with pytest.raises(errors.UserError, match="lacks weights of a CLIPVisionModelWithProjection: visual_projection.weight"):
        encoders.image_features(settings(features__name=str(tmp_path / "no-projection")).features, CPU)


def test_nothing_to_cache(clustered):
    refused("cache_latents.py", "--run-dir", clustered, "--shard", 0, says=["nothing to cache", "pixel space"])
    refused("cache_latents.py", "--run-dir", clustered, "--shard", 9, says=["no tars in", "shards/9", "0, 1, 2, router"])


def test_the_recipes_estimates_are_computed():
    done = command("bench/estimate.py", "configs/laion.toml", "--images", "1e6", "--image-bytes", "30e3", "--tokens", "20")
    lines = {line[:40].strip(): line for line in done.stdout.splitlines()}
    # KEY.lat: one header, one picture, mean and std, 4 x 32 x 32 in f16; and a caption
    assert "latents, 17.92 kB a picture" in done.stdout and 2 * 4 * 32 * 32 * 2 + 512 + 1024 == 17920
    assert "162 GFLOPs" in lines["features (DINOv2), once"] and "826M parameters" in done.stdout
