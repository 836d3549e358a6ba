"""The reader: every sample exactly once, in an order and with a randomness that depend on the position alone; faults are survived."""
import io
import os
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from ddm.errors import UserError
from ddm.tars import BadSample, TarWriter, scan_tar
from data import TarDataset, decode, permute, square
from ddm import features
from ddm.loading import positions
import ddm.tars


def png(colour=(200, 30, 30), size=(8, 8), mode="RGB", **options):
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, "PNG", **options)
    return out.getvalue()


def write(path, samples):
    """samples: list of dicts {extension: bytes}; keys are 0, 1, ..."""
    with TarWriter(str(path)) as tar:
        for i, members in enumerate(samples):
            for extension, payload in members.items():
                tar.add(f"{i:06d}.{extension}", payload)
    return str(path)


@pytest.fixture
def uneven(tmp_path):
    """Three tars of 7, 0 and 12 samples; a sample's class is its number."""
    numbers = [range(0, 7), [], range(7, 19)]
    return [write(tmp_path / f"{t}.tar", [{"png": png(), "cls": str(i).encode()} for i in ns]) for t, ns in enumerate(numbers)]


# ---- order --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000])
def test_the_shuffle_is_a_permutation_and_another_for_each_key(n):
    orders = [[permute(i, n, seed, epoch) for i in range(n)] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 64 or len({tuple(order) for order in orders}) == 3


def test_the_shuffle_is_uniform_enough_that_each_sample_comes_first_equally_often():
    first = np.bincount([permute(0, 10, 0, epoch) for epoch in range(5000)], minlength=10)
    assert abs(first - 500).max() < 5 * 500 ** 0.5


def read_by(dataset, first, last, batch, world, micro, workers=0):
    """What training reads in steps first..last-1 of a global batch: the class numbers, rank by rank within a step."""
    per_rank = []
    for rank in range(world):
        batches = positions(first, last, batch, rank, world, micro)
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=data.collate)
        per_rank.append([label for part in loader for label in part["c"].tolist()])
    share = batch // world
    return [label for n in range(last - first) for labels in per_rank for label in labels[n * share:(n + 1) * share]]


@pytest.mark.parametrize("world, workers, micro", [(1, 0, 38), (1, 2, 5), (2, 1, 19), (2, 2, 4), (19, 0, 1)])
@pytest.mark.parametrize("run", [1, 4])
def test_each_sample_exactly_once_an_epoch_over_ranks_and_workers(uneven, world, workers, micro, run):
    """Micro-batches that do not divide a rank's share, tars of 7, 0 and 12 samples; a step of 38 is two epochs of 19."""
    dataset = TarDataset(uneven, 8, "class", classes=19, seed=3, shuffle_block=run)
    seen = read_by(dataset, 0, 2, 38, world, micro, workers)
    for epoch in range(4):
        assert sorted(seen[epoch * 19:(epoch + 1) * 19]) == list(range(19))


def test_a_resume_goes_on_with_the_very_next_sample_on_any_number_of_ranks(uneven):
    dataset = TarDataset(uneven, 8, "class", classes=19)
    whole = read_by(dataset, 0, 10, 6, 1, 6)
    for world, micro, workers in ((1, 4, 2), (2, 3, 0), (3, 1, 1)):
        assert read_by(dataset, 0, 4, 6, 1, 6) + read_by(dataset, 4, 10, 6, world, micro, workers) == whole


def test_runs_of_consecutive_samples_stay_together(uneven):
    dataset = TarDataset(uneven, 8, "class", classes=19, shuffle_block=4)
    order = [dataset.order(p) for p in range(16)]
    assert all(order[i + 1] == (order[i] + 1) % 19 for i in range(16) if i % 4 != 3)


def test_randomness_is_a_function_of_seed_and_position(uneven):
    a, b = (TarDataset(uneven, 8, "class", classes=19, crop="random", flip=True) for _ in range(2))
    other = TarDataset(uneven, 8, "class", classes=19, seed=1)
    one, same = a[11], (b[3], b[11])[1]
    assert torch.equal(one["eps"], same["eps"]) and one["u"] == same["u"] and torch.equal(one["x"], same["x"])
    assert one["u"] != a[12]["u"] and one["u"] != other[11]["u"]


def test_noise_is_standard_normal_and_time_uniform(uneven):
    items = [TarDataset(uneven, 8, "class", classes=19)[p] for p in range(400)]
    eps, u = torch.stack([i["eps"] for i in items]), torch.tensor([i["u"] for i in items])
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02
    assert abs(u.mean() - 0.5) < 0.05 and 0 < u.min() and u.max() < 1


# ---- tars ---------------------------------------------------------------------------------------------------------

def test_the_index_is_made_once_beside_the_tar_and_again_when_the_tar_changes(uneven, monkeypatch):
    first = data.index_tar(uneven[0])
    with monkeypatch.context() as m:
        m.setattr(ddm.tars, "scan_tar", lambda path: pytest.fail("scanned again"))
        assert np.array_equal(data.index_tar(uneven[0]), first)
    write(uneven[0], [{"png": png(), "cls": b"5"}])
    assert len(data.index_tar(uneven[0])) == 1


def test_the_index_reads_the_same_mapped_or_not(uneven):
    made = data.index_tar(uneven[2])
    assert np.array_equal(data.index_tar(uneven[2], mapped=False), made) and np.array_equal(data.index_tar(uneven[2], mapped=True), made)


def test_a_read_only_folder_can_be_indexed(uneven, monkeypatch):
    def refuse(path):
        raise OSError("read-only")
    monkeypatch.setattr(data, "atomic", refuse)
    assert len(data.index_tar(uneven[2])) == 12 and not os.path.exists(uneven[2] + ".idx")


def test_tars_of_other_programs_are_read_with_long_and_non_ascii_names(tmp_path):
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "long.tar"
        with tarfile.open(path, "w", format=kind) as tar:
            for name in ("é" * 90 + "/" + "x" * 120, "plain"):
                for extension, payload in ((".jpg", png()), (".txt", "ein Bär".encode())):
                    info = tarfile.TarInfo(name + extension)
                    info.size = len(payload)
                    tar.addfile(info, io.BytesIO(payload))
        samples = list(scan_tar(path))
        assert [len(s.members) for s in samples] == [2, 2] and samples[0].start == 0
        # a copy of a sample's bytes is a tar of it
        piece = path.read_bytes()[samples[1].start:samples[1].end]
        with tarfile.open(fileobj=io.BytesIO(piece)) as tar:
            assert tar.extractfile("plain.txt").read().decode() == "ein Bär"


@pytest.mark.parametrize("keep", [100, 512, 700, 2300, 2600, 5000, 9000])
def test_a_torn_tar_gives_its_whole_samples_and_a_warning(tmp_path, capsys, keep):
    path = tmp_path / "torn.tar"
    write(path, [{"png": png(), "txt": b"a red square"} for _ in range(6)])     # 2048 bytes each
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    samples = list(scan_tar(path))
    assert "torn.tar" in capsys.readouterr().err
    assert len(samples) in (keep // 2048, max(0, keep // 2048 - 1))     # cut just at a sample's end: it cannot be told to be whole
    assert all(set(s.members) == {"image", "txt"} for s in samples)


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_a_file_that_is_no_tar_gives_nothing_and_a_warning(tmp_path, capsys, content):
    (tmp_path / "x.tar").write_bytes(content)
    assert list(scan_tar(tmp_path / "x.tar")) == [] and "x.tar" in capsys.readouterr().err


def test_a_failed_writer_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError):
        with TarWriter(str(tmp_path / "a.tar")) as tar:
            tar.add("x.txt", b"x")
            raise RuntimeError
    assert os.listdir(tmp_path) == []


# ---- --data ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*paths):
    for path in paths:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write(path, [{"png": png(), "txt": b"a cat"}])


def test_a_path_that_exists_is_that_file_whatever_its_characters(here):
    touch("data [v2]/0 {a,b}.tar", "data [v2]/what?.tar", "data v/x.tar", "s p/*.tar")
    assert list(ddm.tars.find_tars(["data [v2]/0 {a,b}.tar", "data [v2]/what?.tar", "s p/*.tar"]).values()) == ["s p/*.tar", "data [v2]/0 {a,b}.tar", "data [v2]/what?.tar"]


def test_two_stars_are_folders_at_any_depth_and_a_tar_counts_once(here):
    touch("d/0.tar", "d/a/1.tar", "d/a/b/2.TAR")
    os.symlink("a/1.tar", "d/link.tar")
    left = []
    assert ddm.tars.find_tars(["d/**/*.tar", "d/**/*.TAR", "d/0.tar", str(here / "d" / "0.tar")], left) == {"0": str(here / "d" / "0.tar"), "1": "d/a/1.tar", "2": "d/a/b/2.TAR"}
    assert left == ["1 links to tars that are there already"]


def test_what_is_no_tar_is_counted(here):
    touch("d/0.tar")
    for name in ("1.tar.gz", "2.TAR.GZ", "3.tgz", "0.tar.idx", "0.parquet", "sub/x.png"):
        os.makedirs("d/sub", exist_ok=True)
        (here / "d" / name).write_bytes(b"x")
    left = []
    assert list(ddm.tars.find_tars(["d/*"], left)) == ["0"]
    assert left == ["2 .tar.gz, 1 .parquet, 1 .tgz, 1 folder (d/0.parquet the first; compressed tars cannot be read at any place: decompress them (gunzip d/1.tar.gz))"]


@pytest.mark.parametrize("pattern, says", [
    ("none/*.tar", "there is no folder none"), ("d/9.tar", "there is nothing of that name; d is a folder with 1 tars; did you mean 'd/*.tar'?"), ("d", "did you mean 'd/*.tar'?"),
    ("deep", "did you mean 'deep/**/*.tar'?"), ("d/{0..3}.tar", "braces are not expanded: did you mean 'd/*.tar'?"), ("d/x{a,b}.tar", "braces are not expanded here"),
    ("s3://bucket/0.tar", "no URLs"), ("pipe:cat x", "no URLs"), ("gz/*.tar", "gunzip gz/0.tar.gz"), ("gz/0.tar.gz", "gunzip gz/0.tar.gz"), ("zip/*", "unpack"),
    ("pictures", "tar --sort=name -cf 00000.tar -C pictures ."), ("pictures/*/*.JPG", "tar --sort=name"), ("x.parquet", "img2dataset --url_list x.parquet --input_format parquet"),
    ("empty", "an empty folder"), ("folder.tar", "folder.tar is a folder"), ("dangling.tar", "dangling.tar is a link to nowhere")])
def test_a_pattern_without_tars_is_told_what_is_there(here, pattern, says):
    touch("d/0.tar", "deep/er/0.tar")
    os.makedirs("folder.tar")
    os.makedirs("empty")
    os.symlink("nowhere", "dangling.tar")
    for name in ("gz/0.tar.gz", "zip/0.zip", "pictures/cat/0.JPG", "pictures/dog/1.JPG", "x.parquet"):
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        (here / name).write_bytes(b"x")
    for patterns in ([pattern], ["d/*.tar", pattern]):
        if patterns[1:] and pattern in ("d", "deep", "gz/0.tar.gz", "zip/*", "pictures", "pictures/*/*.JPG", "x.parquet", "empty"):
            continue        # left out beside what there is
        with pytest.raises(UserError) as error:
            ddm.tars.find_tars(patterns)
        assert says in str(error.value) and "\n" not in str(error.value)


def members(*names, payload=b"a cat"):
    return [(name, png() if name.lower().endswith(".png") else payload) for name in names]


@pytest.mark.parametrize("condition, names, cause, says", [
    ("text", ["a.png", "b.png", "a.txt", "b.txt"], "no caption", "tar --sort=name"),
    ("text", ["a.png", "a.png.txt"], "no caption", "KEY.txt, not KEY.png.txt"),
    ("text", ["a.v1.png", "a.v1.txt", "a.v2.png", "a.v2.txt"], "no caption", "first dot"),
    ("text", ["a.png", "a.json"], "no caption", "KEY.json"), ("text", ["a.png", "a.caption"], "no caption", "KEY.caption"),
    ("text", ["a.png", "a.cls"], "no caption", "data.condition = class"), ("text", ["a.png"], "no caption", "data.condition = none"),
    ("class", ["a.png", "a.txt"], "no class", "data.condition = text"), ("class", ["a.png", "a.cls"], "class is no number", "number the classes"),
    ("text", ["a.svg", "a.txt"], "no image", "images are KEY.jpg"), ("text", ["a.lat", "a.txt"], "no image", "holds latents"),
    ("text", ["._a.png", "__MACOSX/b.png"], "", "nothing but 2 files"), ("text", [], "", "a tar without files")])
def test_an_error_says_what_a_tar_holds_instead(here, condition, names, cause, says):
    with TarWriter("x.tar") as tar:
        for name, payload in members(*names):
            tar.add(name, payload)
    words = ddm.tars.describe_samples("x.tar", cause, condition)
    assert words.startswith("x.tar ") and says in words and (cause == "" or f"begins with {names[0]}" in words)


@pytest.mark.parametrize("payload, says", [(b"\x1f\x8b" + bytes(900), "gzip"), (b"PK\3\4" + bytes(900), "zip"), (b"\n<!DOCTYPE html>", "web page"), (b"", "empty"),
                                           (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (png(), "a PNG")])
def test_a_file_that_is_no_tar_is_named_for_what_it_is(here, capsys, payload, says):
    (here / "x.tar").write_bytes(payload)
    notes = ddm.tars.Notes()
    assert list(scan_tar("x.tar", notes)) == [] and says in notes.torn and says in capsys.readouterr().err and says in ddm.tars.describe_samples("x.tar", "", "text")


def test_the_first_of_jpg_jpeg_png_webp_is_taken_in_any_order(here):
    for order in (["png", "jpeg", "webp", "txt"], ["webp", "txt", "jpeg", "png"], ["JPEG", "png", "webp", "txt"]):
        with TarWriter("x.tar") as tar:
            for extension in order:
                tar.add(f"a.{extension}", extension.encode())
        sample, = scan_tar("x.tar")
        assert sample.taken["image"].lower() == "jpeg" and sorted(sample.others) == ["png", "webp"] and "a." in sample.choice()
        assert TarDataset(["x.tar"], 8).members(0)["image"].lower() == b"jpeg"


def test_a_reference_says_what_it_leaves_out(here, capsys):
    write("x.tar", [{"png": png((i, 0, 0)), "txt": b"a cat" if i % 4 else b""} for i in range(12)])
    (here / "y.tar.gz").write_bytes(b"x")
    pixels, ranks = features.distance_space(SimpleNamespace(name="pixels"), None), SimpleNamespace(rank=0, world=1)
    (statistics,), labels = features.read_reference(features.open_reference(["*"], 8, "text"), [pixels], None, "out", 4, ranks)
    told = capsys.readouterr()
    assert "12 samples in 1 tars; left out: 1 .tar.gz" in told.out and "3 of 12 pictures of --data are left out: no caption: 3" in told.err
    assert statistics["count"] == 9 and (labels[0] >= 0).sum() == 9
    with pytest.raises(UserError, match="data.condition = text uses them"):
        features.read_reference(features.open_reference(["x.tar"], 8, "class", 5), [pixels], None, "out", 4, ranks)


# ---- which bytes a tar has ----------------------------------------------------------------------------------------

def test_a_copy_is_the_same_source_and_another_content_is_not(here):
    touch("a.tar")
    source = ddm.tars.read_source("a.tar")
    os.utime("a.tar", ns=(1, 1))
    again = ddm.tars.read_source("a.tar", source)
    assert again != source and again.sha256 == source.sha256
    stat, payload = os.stat("a.tar"), bytearray((here / "a.tar").read_bytes())
    payload[600] ^= 1
    (here / "a.tar").write_bytes(payload)
    os.utime("a.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))     # the same size and date, as cp -p leaves them
    assert ddm.tars.read_source("a.tar", again).sha256 != source.sha256


def test_an_unchanged_tar_is_not_read_again(here, monkeypatch):
    touch("a.tar")
    ranks = SimpleNamespace(rank=0, world=1)
    first = ddm.tars.read_sources(["a.tar"], "out/sources.json", ranks)
    monkeypatch.setattr(ddm.tars.hashlib, "file_digest", lambda *args: pytest.fail("read again"))
    assert ddm.tars.read_sources(["a.tar"], "out/sources.json", ranks) == first
    (here / "out" / "sources.json").write_text('{"x": 5}')
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert ddm.tars.read_sources(["a.tar"], "out/sources.json", ranks) == first


# ---- bad samples --------------------------------------------------------------------------------------------------

def test_bad_samples_are_named_and_replaced_without_moving_any_other(tmp_path):
    good = [{"png": png((i, 0, 0)), "txt": b"x"} for i in range(20)]
    bad = [dict(s) for s in good]
    bad[3]["png"] = b"not a picture"
    bad[5]["txt"] = b" ?! "
    del bad[9]["png"]
    dataset, clean = (TarDataset([write(tmp_path / f"{n}.tar", s)], 8, "text", encode=lambda c: torch.zeros(1)) for n, s in (("bad", bad), ("good", good)))
    causes = []
    for p in range(20):
        item = dataset[p]
        if item["bad"]:
            assert clean.order(p) in (3, 5, 9)
            causes += item["bad"]
        else:
            assert torch.equal(item["x"], clean[p]["x"])
        assert torch.equal(item["eps"], clean[p]["eps"])
    assert {(name, cause.split(" (")[0]) for _, name, cause in causes} == {("000003", "undecodable"), ("000005", "no caption"), ("000009", "no image")}
    assert torch.equal(dataset[4]["x"], dataset[4]["x"])


def test_data_without_a_single_good_sample_is_an_error_and_no_endless_loop(tmp_path):
    dataset = TarDataset([write(tmp_path / "x.tar", [{"png": b"x"}])], 8)
    with pytest.raises(UserError, match="a hundred samples"):
        dataset[0]


@pytest.mark.parametrize("payload, cause", [(b"", "no class"), (b"cat", "'cat'"), (b"10", "classes = 10"), (b"-1", "classes = 10")])
def test_a_class_must_be_a_number_below_the_configured_classes(payload, cause):
    with pytest.raises(BadSample, match=cause):
        data.check_condition({"cls": payload}, "class", 10)
    assert data.check_condition({"cls": b" 7\n"}, "class", 10) == 7


# ---- pictures -----------------------------------------------------------------------------------------------------

def test_pictures_of_every_mode_come_out_rgb_with_transparency_on_white():
    assert decode(png((0, 0, 0, 0), mode="RGBA")).getpixel((0, 0)) == (255, 255, 255)
    assert decode(png((255, 0, 0, 255), mode="RGBA")).getpixel((0, 0)) == (255, 0, 0)
    assert decode(png((10, 20, 30), transparency=(10, 20, 30))).getpixel((0, 0)) == (255, 255, 255)
    assert decode(png(77, mode="L")).getpixel((0, 0)) == (77, 77, 77)
    out = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(out, "JPEG")
    assert decode(out.getvalue()).mode == "RGB"


def test_exif_rotation_is_undone():
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6        # the camera was turned: show it turned clockwise
    image.save(out, "JPEG", exif=exif, quality=95)
    upright = decode(out.getvalue())
    assert upright.size == (8, 16) and upright.getpixel((4, 2))[0] > 200 and upright.getpixel((4, 13))[0] < 50


def test_a_decompression_bomb_is_a_bad_sample(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(BadSample, match="DecompressionBomb"):
        decode(png())


def test_square_crops_where_asked_and_mirrors():
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, :4], pixels[:, 4:8], pixels[:, 8:] = 10, 20, 30
    image = Image.fromarray(pixels)
    assert [square(image, 4, (x, 0))[0, 0, 0] for x in (0, 0.5, 1)] == [10, 20, 30]
    pixels[:, 8:10] = 99
    mirrored = square(Image.fromarray(pixels), 4, (1, 0), mirror=True)
    assert mirrored[0, 0, 0] == 30 and mirrored[0, 3, 0] == 99


def test_flips_and_random_crops_vary_and_can_be_switched_off(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 24, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    tar = write(tmp_path / "x.tar", [{"png": out.getvalue()}])
    pictures = lambda **options: len({TarDataset([tar], 8, **options)[p]["x"].numpy().tobytes() for p in range(20)})
    assert pictures() == 1 and pictures(flip=True) == 2 and pictures(crop="random") > 10


def test_pixels_survive_the_round_trip_through_floats():
    x = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    floats = data.to_float(x)
    assert floats.min() == -1 and floats.max() == 1 and floats.shape == (1, 3, 16, 16)
    assert torch.equal(data.to_uint8(floats), x)
