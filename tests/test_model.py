"""The networks: sizes, formulas against torch, files. And the words of captions."""
import errno
import hashlib
import os
import re
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model as models
from ddm import artifacts, mmdit, plan
from ddm.mmdit import MMDiT
from ddm.text import hash_words, normalise_text, words
from model import DiT, ModelConfig, Router


def small(kind=DiT, **changes):
    settings = dict(size=8, channels=3, dim=32, depth=2, heads=2, patch=2)
    torch.manual_seed(0)
    return kind(ModelConfig(**settings | changes))


def shaken(model):
    """adaLN-Zero starts as a constant: move the weights so that all of the network shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval()


TEXT = dict(condition="text", vocab=64, length=5)
TOKENS = dict(condition="text", text_dim=6, length=5)
DOUBLE = dict(double=1)
CLASS = dict(condition="class", classes=10)

KINDS = [
    (DiT, {}),
    (DiT, CLASS),
    (DiT, TEXT),
    (DiT, TOKENS),
    (MMDiT, DOUBLE),
    (MMDiT, DOUBLE | CLASS),
    (MMDiT, DOUBLE | TEXT),
    (MMDiT, DOUBLE | TOKENS),
    (Router, {"clusters": 8}),
    (Router, TEXT | {"clusters": 4}),
]


# ---- sizes and FLOPs ---------------------------------------------------------------------------

@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("name, millions",
                         [("DiT-S", 33), ("DiT-B", 130), ("DiT-L", 458), ("DiT-XL", 675)])
def test_presets_have_the_published_parameter_counts(name, millions, patch):
    shape = models.PRESETS[f"{name}/{patch}"]
    config = ModelConfig(32, 4, condition="class", classes=1000, **shape)
    count = plan.parameter_count(config) / 1e6
    # published for patch 2; a larger patch has a few more weights in the first and the last layer
    assert round(count) == millions if patch == 2 else abs(count - millions) < 1.5


def test_mmdit_3b_has_2_99_billion_weights_in_its_blocks():
    config = ModelConfig(32, 4, condition="text", text_dim=2048, length=128,
                         **models.PRESETS["MMDiT-3B/2"])
    with torch.device("meta"):
        model = artifacts.build(config)
    assert type(model) is MMDiT
    assert [type(b) for b in model.blocks] == 8 * [mmdit.DoubleBlock] + 22 * [mmdit.SingleBlock]
    assert round(plan.parameters(model.blocks) / 1e9, 2) == 2.99
    assert plan.parameters(model) / 1e9 < 1.02 * 2.99


def counted_flops(model, backward=False):
    """FLOPs on one image by torch's counter, which sees attention in this backend alone."""
    config = model.config
    c = None
    if config.condition == "class":
        c = torch.ones(1, dtype=torch.int64)
    elif config.text_dim:
        c = torch.ones(1, 5, config.text_dim)
    elif config.condition == "text":
        c = torch.ones(1, 5, dtype=torch.int64)

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = model(torch.zeros(1, 3, 8, 8), torch.zeros(1), c)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind, extra", KINDS)
def test_flops_formula_agrees_with_torch_s_counter(kind, extra):
    model = small(kind, **extra)
    assert plan.flops(model.config) == counted_flops(model)


@pytest.mark.parametrize("kind, extra", KINDS)
def test_training_costs_three_forwards_less_the_gradients_of_inputs(kind, extra):
    """The ledger's rule: backward is twice forward. But nobody asks for the gradient of an image or
    a time (token features pass a norm's weights first)."""
    model = small(kind, **extra)
    of_inputs = 2 * 16 * 12 * 32 + 2 * 256 * 32
    assert 3 * plan.flops(model.config) - counted_flops(model, backward=True) == of_inputs


@pytest.mark.parametrize("kind, extra", KINDS)
def test_the_plan_counts_the_tokens_that_blocks_see(kind, extra):
    model = small(kind, **extra)
    seen = []
    model.blocks[-1].register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1]))
    model(*plan.example(model.config, 2))
    image, text = plan.tokens(model.config)
    # the last block of an MMDiT is single-stream
    assert seen == [image + text if kind is MMDiT else image]
    assert image == 16 + (kind is Router)


# ---- formulas ----------------------------------------------------------------------------------

def test_attention_is_torch_s_multihead_attention():
    torch.manual_seed(0)
    ours = models.Attention(32, 4)
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict({
        "in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
        "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias})
    x = torch.randn(2, 7, 32)
    y = torch.randn(2, 5, 32)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])
    torch.testing.assert_close(ours(x, y, mask), theirs(x, y, y, key_padding_mask=~mask)[0])


def test_gelu_is_torch_s_by_the_tanh_approximation(monkeypatch):
    x = torch.linspace(-6, 6, 1001)
    wanted = torch.nn.functional.gelu(x, approximate="tanh")
    assert torch.equal(models.GELU()(x), wanted)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(models.GELU()(x), wanted, rtol=1e-5, atol=1e-6)


def test_the_untrained_model_predicts_zero_and_the_router_is_undecided():
    x = torch.randn(2, 3, 8, 8)
    t = torch.rand(2)
    assert small()(x, t).abs().max() == 0
    assert small(MMDiT, **DOUBLE)(x, t).abs().max() == 0
    assert small(Router, clusters=4)(x, t).softmax(1).unique().tolist() == [0.25]


def test_each_pixel_of_the_output_belongs_to_the_same_place_of_the_input():
    """With the identity for patches, positions and blocks left out, the network must put every
    patch back where it was."""
    model = small(dim=12, heads=1, depth=0)
    with torch.no_grad():
        model.positions.zero_()
        model.patch_embed.weight.copy_(torch.eye(12).view(12, 3, 2, 2))
        # the head gives (row, column, channel)
        order = torch.arange(12).view(3, 2, 2).permute(1, 2, 0).flatten()
        model.head.weight.copy_(torch.eye(12)[order])
    model.final_norm = torch.nn.Identity()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x, torch.rand(2)), x)


def test_rotary_positions_make_attention_depend_on_distance_alone():
    angle = mmdit.rotary_2d(8, 5)
    torch.manual_seed(0)
    q, k = torch.randn(2, 8)

    def score(a, b):
        turned_q = mmdit.rotate(q.view(1, 1, 1, 8), angle[a:a + 1])
        turned_k = mmdit.rotate(k.view(1, 1, 1, 8), angle[b:b + 1])
        return (turned_q * turned_k).sum()

    # one row down, two columns to the right; then two down, one to the right
    torch.testing.assert_close(score(0, 7), score(6, 13))
    assert (score(0, 7) - score(0, 11)).abs() > 1e-3
    # the centre
    assert angle[12].abs().max() == 0


def test_a_size_that_the_patch_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="size 9 is not a multiple of the patch 2"):
        small(size=9)


# ---- conditions --------------------------------------------------------------------------------

def test_padding_does_not_change_the_answer_and_words_and_their_order_do():
    model = shaken(small(**TEXT))
    x = torch.randn(1, 3, 8, 8)
    t = torch.rand(1)
    c = torch.tensor([[3, 4, 0, 0, 0]])
    before = model(x, t, c)
    with torch.no_grad():
        # what stands at "no word" must not matter
        model.word_embed.weight[0] += 5
    torch.testing.assert_close(model(x, t, c), before)
    for other in ([4, 3, 0, 0, 0], [3, 5, 0, 0, 0]):
        assert (model(x, t, torch.tensor([other])) - before).abs().max() > 1e-3


def test_token_features_count_up_to_the_first_row_of_zeros():
    model = shaken(small(**TOKENS))
    x = torch.randn(1, 3, 8, 8)
    t = torch.rand(1)
    c = torch.randn(1, 5, 6).half()
    c[:, 2:] = 0
    before = model(x, t, c)
    torch.testing.assert_close(model(x, t, c.float()), before)

    # no weight depends on the length: the tokens know their places
    short = DiT(ModelConfig(**vars(model.config) | {"length": 2})).eval()
    short.load_state_dict(model.state_dict())
    torch.testing.assert_close(short(x, t, c[:, :2]), before)
    assert (model(x, t, c.flip(2)) - before).abs().max() > 1e-3
    assert (model(x, t, torch.zeros_like(c)) - before).abs().max() > 1e-3


@pytest.mark.parametrize("extra, c", [
    (CLASS, torch.tensor([3, 4])),
    (TOKENS, torch.randn(2, 5, 6)),
    (TEXT, torch.tensor([[3, 4, 0, 0, 0], [5, 0, 0, 0, 0]])),
])
def test_dropping_a_condition_makes_that_sample_alone_unconditional(extra, c):
    config = small(**extra).config
    dropped = models.drop_condition(config, c, torch.tensor([True, False]))
    assert torch.equal(dropped[0], models.null_condition(config, c)[0])
    assert torch.equal(dropped[1], c[1])
    assert models.drop_condition(config, None, torch.tensor([True])) is None


def test_mmdit_ignores_padding_and_minds_text_time_and_the_order_of_patches():
    model = shaken(small(MMDiT, **DOUBLE | TOKENS))
    x = torch.randn(1, 3, 8, 8)
    t = torch.rand(1)
    c = torch.randn(1, 5, 6).half()
    c[:, 2:] = 0
    before = model(x, t, c)

    short = MMDiT(ModelConfig(**vars(model.config) | {"length": 2})).eval()
    short.load_state_dict(model.state_dict())
    torch.testing.assert_close(short(x, t, c[:, :2]), before)
    for other in ((x, t, c.flip(2)), (x, t + 0.1, c), (x, t, torch.zeros_like(c))):
        assert (model(*other) - before).abs().max() > 1e-3

    # moved by a patch: without positions nothing but the place would change
    moved = model(x.roll(2, dims=3), t, c).roll(-2, dims=3)
    assert (moved - before).abs().max() > 1e-3
    model.positions = torch.zeros_like(model.positions)
    moved = model(x.roll(2, dims=3), t, c).roll(-2, dims=3)
    torch.testing.assert_close(moved, model(x, t, c))


def test_time_and_condition_matter_to_router_and_denoiser():
    x = torch.randn(1, 3, 8, 8)
    for model in (shaken(small(**CLASS)), shaken(small(Router, clusters=4, **CLASS))):
        out = model(x, torch.tensor([0.3]), torch.tensor([1]))
        assert (model(x, torch.tensor([0.9]), torch.tensor([1])) - out).abs().max() > 1e-3
        assert (model(x, torch.tensor([0.3]), torch.tensor([2])) - out).abs().max() > 1e-3


# ---- precision and layout ----------------------------------------------------------------------

@pytest.mark.parametrize("kind, extra, c", [
    (DiT, CLASS, torch.tensor([1, 2])),
    (DiT, TEXT, torch.ones(2, 5, dtype=torch.int64)),
    (Router, CLASS | {"clusters": 4}, torch.tensor([1, 2])),
    (MMDiT, DOUBLE | TOKENS, torch.ones(2, 5, 6)),
])
@pytest.mark.parametrize("bf16", [False, True])
def test_no_block_gets_tokens_that_are_transposed_in_memory(kind, extra, c, bf16):
    model = shaken(small(kind, **extra))
    seen = []

    def look(block, args):
        seen.append(all(arg.is_contiguous() for arg in args[:2]))

    for block in model.blocks:
        block.register_forward_pre_hook(look)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(torch.randn(2, 3, 8, 8), torch.rand(2), c)
    assert seen == [True] * 2


def test_a_router_s_head_is_fp32_whatever_the_rest_is(tmp_path):
    model = shaken(small(Router, **CLASS | {"clusters": 64}))
    x = torch.randn(128, 3, 8, 8)
    t = torch.rand(128)
    c = torch.randint(0, 10, (128,))

    def exact(router):
        """p by a head in float64 on the same features."""
        tokens = router.features(x.to(router.cls_token.dtype), t, c, router.cls_token)
        features = tokens[:, 0].double()
        logits = features @ model.head.weight.double().T + model.head.bias.double()
        return logits.softmax(1).float()

    artifacts.save(tmp_path / "router.safetensors", model.config, model.state_dict())
    half, _ = artifacts.load(tmp_path / "router.safetensors", dtype=torch.bfloat16)
    assert half.head.weight.dtype == torch.float32
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16, torch.float32}

    with torch.no_grad():
        for router, autocast in ((model, True), (half, False)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = router(x.to(router.cls_token.dtype), t, c)
                wanted = exact(router)
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits.softmax(1), wanted, rtol=1e-4, atol=1e-6)
            # no two clusters tie; in bf16 hundreds of these 128 * 64 would
            values = logits.sort(dim=1).values
            assert (values[:, 1:] > values[:, :-1]).all()


# ---- files -------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, extra", [
    (DiT, TEXT), (MMDiT, DOUBLE | TEXT), (Router, CLASS | {"clusters": 4})])
def test_a_file_rebuilds_its_model_with_nothing_else(kind, extra, tmp_path):
    path = tmp_path / "m.safetensors"
    model = shaken(small(kind, **extra))
    artifacts.save(path, model.config, model.state_dict(), objective="x0", step=7)
    again, info = artifacts.load(path)
    assert type(again) is kind and again.config == model.config
    assert info["objective"] == "x0" and info["step"] == 7

    x = torch.randn(2, 3, 8, 8)
    t = torch.rand(2)
    c = torch.ones((2, 5) if "vocab" in extra else 2, dtype=torch.int64)
    assert torch.equal(again(x, t, c), model(x, t, c))


def test_equal_models_give_equal_files(tmp_path):
    model = small(**TEXT)
    digests = set()
    for _ in range(4):
        artifacts.save(tmp_path / "m", model.config, model.state_dict(), b=1, a={"z": 1, "y": 2})
        digests.add(hashlib.sha256((tmp_path / "m").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_bf16_export_is_half_as_large_and_loads_as_fp32(tmp_path):
    model = shaken(small())
    artifacts.save(tmp_path / "32", model.config, model.state_dict())
    artifacts.save(tmp_path / "16", model.config, model.state_dict(), torch.bfloat16)
    assert (tmp_path / "16").stat().st_size < 0.6 * (tmp_path / "32").stat().st_size
    again, _ = artifacts.load(tmp_path / "16")
    assert all(p.dtype is torch.float32 for p in again.parameters())
    torch.testing.assert_close(again.head.weight, model.head.weight, rtol=1e-2, atol=1e-2)


def test_tensors_of_numpy_and_torch_are_written_with_what_they_say(tmp_path):
    path = tmp_path / "folder" / "t.safetensors"
    tensors = {"a": np.arange(6, dtype=np.float16).reshape(2, 3).T, "b": torch.arange(3)}
    artifacts.write_tensors(path, tensors, {"name": "é", "seed": 3})
    found = load_file(path)
    assert np.array_equal(found["a"], tensors["a"]) and found["b"].tolist() == [0, 1, 2]
    assert artifacts.read_description(path, {"name": str, "seed": int}) == {"name": "é", "seed": 3}
    with pytest.raises(ValueError, match="seed = '3' is no str"):
        artifacts.read_description(path, {"seed": str})


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    artifacts.write_tensors(path, {"a": torch.zeros(1)}, {})
    before = path.read_bytes()

    def full(tensors, path, metadata):
        with open(path, "wb") as f:
            f.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(artifacts, "save_file", full)
    with pytest.raises(OSError, match="No space") as caught:
        artifacts.write_tensors(path, {"a": torch.ones(1)}, {})
    assert caught.value.filename == path
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("content", [b"", b"not a model", b"\xff" * 100])
def test_a_file_that_is_no_model_is_refused(content, tmp_path):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match="bad is not a model"):
        artifacts.load(tmp_path / "bad")


# ---- words -------------------------------------------------------------------------------------

def test_words_hash_alike_everywhere_and_the_empty_caption_is_no_condition():
    a = hash_words("A red, RED circle!", 6, 1000)
    assert a.tolist() == hash_words("a red red circle", 6, 1000).tolist()
    assert a[1] == a[2] and a[4:].tolist() == [0, 0]
    # CRC-32 of "a"
    assert a[0].item() == 0xe8b7be43 % 999 + 1
    assert not hash_words("", 6, 1000).any()
    assert len(hash_words("w " * 50, 6, 1000)) == 6


@pytest.mark.parametrize("text", [
    "a red circle",
    "Don't: 2x_3, it's \"here\"!\tand\r\nthere  (50% + $5 ~ #1)",
    "...",
])
def test_words_of_plain_captions_are_those_of_a_regular_expression(text):
    assert words(text) == re.findall(r"\w+", text.lower())


def test_a_caption_s_numbers_are_its_words_and_zeros():
    numbers = [zlib.crc32(word) % 999 + 1 for word in (b"a", b"red", b"circle")]
    assert hash_words("a red circle", 4, 1000).tolist() == [*numbers, 0]


@pytest.mark.parametrize("text", [
    "un café à la crème", "Łódź", "Ångström", "क़लम", "한국어", "ΜΈΛΙ", "ἄνθρωπος", "İstanbul",
    "ở đâu"])
def test_composed_and_decomposed_text_has_the_same_words(text):
    composed = unicodedata.normalize("NFC", text)
    decomposed = unicodedata.normalize("NFD", text)
    assert normalise_text(composed) == normalise_text(decomposed)
    assert words(composed) == words(decomposed) and len(words(text)) == len(text.split())
    numbers = hash_words(composed, 8, 2 ** 20)
    assert torch.equal(numbers, hash_words(decomposed, 8, 2 ** 20))


@pytest.mark.parametrize("text, found", [
    ("बिल्ली और कुत्ता।", ["बिल्ली", "और", "कुत्ता"]),
    ("แมวกินปลา", ["แมวกินปลา"]),
    ("مَدْرَسَة كبيرة", ["مَدْرَسَة", "كبيرة"]),
    ("שָׁלוֹם", ["שָׁלוֹם"]),
    ("می\u200cخواهم", ["می\u200cخواهم"]),
    ("क्\u200dष", ["क्\u200dष"]),
    ("\u200dred\u200c \u200d", ["red"]),
    ("🎉", ["🎉"]),
    ("a cat😀and ☃!", ["a", "cat", "😀", "and", "☃"]),
    ("👍🏽👍", ["👍🏽", "👍"]),
    ("👩🏽\u200d🚀👩", ["👩🏽\u200d🚀", "👩"]),
    ("🇫🇷🇩🇪", ["🇫🇷", "🇩🇪"]),
    ("❤\ufe0f ❤", ["❤", "❤"]),
    ("❤\ufe0f\u200d🔥", ["❤\u200d🔥"]),
    ("1\ufe0f\u20e3 #\ufe0f\u20e3", ["1\u20e3", "#\u20e3"]),
    ("20°C, 5 €", ["20", "°", "c", "5", "€"]),
    ("\ufe0f \u0020\ufe0f", []),
    ("…—¡!", []),
    ("soft\u00adhyphen\u200bspace", ["softhyphen", "space"]),
])
def test_words_keep_their_marks_and_an_emoji_is_one(text, found):
    assert words(text) == found
    assert hash_words(text, 8, 1000).count_nonzero() == len(found)


@pytest.mark.parametrize("text, found", [
    ("\ufeff a\r\nred\u2028\tcir\u00adcle\x00\x1b \u00a0 now\u3000", "a red circle now"),
    (" \n\u200b\u200e", ""),
    ("👩\u200d🚀 می\u200cخواهم", "👩\u200d🚀 می\u200cخواهم"),
])
def test_normalised_text_is_one_line_without_what_nobody_sees(text, found):
    assert normalise_text(text) == found
