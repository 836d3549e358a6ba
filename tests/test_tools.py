"""The programs of tools/, and the demo's check: what is drawn, what is brought into shards."""
import io
import os
import tarfile

import numpy as np
import pytest
from conftest import ROOT, command, inside

from data import scan_tar
from tools.shapes import SHAPE_COLOURS, SHAPES, draw_shape


def inside_tool(name, *args):
    return inside(f"tools.{name}", *args)


@pytest.fixture
def check_shapes(monkeypatch):
    """bench/check_shapes.py as a module."""
    monkeypatch.syspath_prepend(os.path.join(ROOT, "bench"))
    import check_shapes
    return check_shapes


# ---- the demo set -------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [16, 32, 64])
def test_the_demo_set_shows_what_its_captions_say(check_shapes, size):
    for i in range(200):
        image, caption = draw_shape(np.random.default_rng([0, i]), size)
        colour, shape = check_shapes.check(np.asarray(image), caption)
        assert shape and colour in (True, None), (i, caption)


def test_a_third_of_the_captions_name_the_shape_alone():
    captions = [draw_shape(np.random.default_rng([0, i]), 4)[1] for i in range(1500)]
    alone = {f"a {shape}" for shape in SHAPES}
    both = {f"a {colour} {shape}" for colour in SHAPE_COLOURS for shape in SHAPES}
    assert set(captions) == alone | both

    share = np.mean([caption in alone for caption in captions])
    assert abs(share - 1 / 3) < 0.04


def test_the_demo_set_is_the_same_for_a_seed():
    image, caption = draw_shape(np.random.default_rng([4, 2]), 16)
    again, same = draw_shape(np.random.default_rng([4, 2]), 16)
    other, _ = draw_shape(np.random.default_rng([5, 2]), 16)
    assert caption == same and image.tobytes() == again.tobytes()
    assert other.tobytes() != image.tobytes()


@pytest.mark.slow
def test_shapes_are_drawn_into_shards_from_any_folder(tmp_path):
    flags = ["--out", tmp_path, "--images", 7, "--size", 8, "--per-tar", 3]
    done = command(os.path.join(ROOT, "tools", "shapes.py"), *flags, real=True)
    assert "7 images" in done.stdout
    assert [len(list(scan_tar(tmp_path / f"0000{i}.tar"))) for i in range(3)] == [3, 3, 1]

    refused = inside_tool("shapes", "--out", tmp_path, "--images", 3, "--per-tar", 3)
    assert refused.returncode == 2 and "holds 2 other tars, 00001.tar the first" in refused.stderr


@pytest.mark.parametrize("flag", ["--images", "--size", "--per-tar"])
def test_nothing_to_draw_is_refused(tmp_path, flag):
    done = inside_tool("shapes", "--out", tmp_path / "out", flag, 0)
    assert done.returncode == 2 and f"{flag} 0" in done.stderr
    assert not (tmp_path / "out").exists()


# ---- the check ----------------------------------------------------------------------------------

def save(path, colour, shape, prompt):
    """An image of that colour and shape that claims to be of that prompt, as sample.py's do."""
    from PIL.PngImagePlugin import PngInfo
    chunks = PngInfo()
    chunks.add_text("prompt", prompt)
    for seed in range(10000):
        image, _ = draw_shape(np.random.default_rng(seed), 16)
        rng = np.random.default_rng(seed)
        if (rng.choice(list(SHAPE_COLOURS)), rng.choice(SHAPES)) == (colour, shape):
            return image.save(path, "PNG", pnginfo=chunks)


@pytest.mark.slow
def test_the_check_asks_for_a_colour_only_where_the_prompt_names_one(tmp_path):
    save(tmp_path / "0000.png", "red", "circle", "a red circle")
    save(tmp_path / "0001.png", "blue", "circle", "a circle")
    save(tmp_path / "0002.png", "blue", "cross", "a red cross")
    save(tmp_path / "0003.png", "blue", "cross", "a circle")

    done = command("bench/check_shapes.py", tmp_path)
    assert "4 images: right shape 75.0% (wrong: 1 circle)" in done.stdout
    assert "right colour 50.0% of 2" in done.stdout

    for least, code in (((0.5, 0.75), 0), ((0.6, 0.7), 1), ((0.5, 0.8), 1)):
        done = command("bench/check_shapes.py", tmp_path, "--least", *least, check=False)
        assert done.returncode == code, least


# ---- ImageNet -----------------------------------------------------------------------------------

def add_member(tar, name, payload):
    info = tarfile.TarInfo(name)
    info.size = len(payload)
    tar.addfile(info, io.BytesIO(payload))


def test_imagenet_s_own_tar_becomes_shards_with_classes_in_the_names_order(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as outer:
        for name in ("n02", "n01"):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in range(3):
                    add_member(tar, f"{name}_{i}.JPEG", f"{name[1:]}{i} ".encode())
            add_member(outer, f"{name}.tar", inner.getvalue())

    out = tmp_path / "out"
    flags = ["--imagenet", tmp_path / "train.tar", "--per-tar", 4]
    done = inside_tool("to_tars", "--out", out, *flags)
    assert "6 images of 2 classes" in done.stdout

    found = [list(scan_tar(out / f"0000{i}.tar")) for i in range(2)]
    assert [len(samples) for samples in found] == [4, 2]
    assert all(sorted(sample.members) == ["cls", "image"] for sample in found[0] + found[1])

    with tarfile.open(out / "00000.tar") as tar:
        payloads = {m.name: tar.extractfile(m).read() for m in tar}
    assert payloads["n01_2.jpg"] == b"012 "
    assert payloads["n01_2.cls"] == b"0" and payloads["n02_0.cls"] == b"1"


@pytest.mark.parametrize("content", [b"no tar", b"", None])
def test_another_file_than_imagenet_s_is_refused(tmp_path, content):
    path = tmp_path / "x.tar"
    if content is None:
        with tarfile.open(path, "w") as tar:
            add_member(tar, "a.jpg", b"x")
    else:
        path.write_bytes(content)
    done = inside_tool("to_tars", "--imagenet", path, "--out", tmp_path / "none")
    assert done.returncode == 2 and "ILSVRC2012_img_train.tar" in done.stderr
    assert not (tmp_path / "none").exists()
