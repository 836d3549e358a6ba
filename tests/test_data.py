"""The reader: every sample exactly once, in an order and with a randomness that depend on the
position alone; faults are survived.
"""
import io
import os
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import ddm.tars
from data import TarDataset, decode, permute, square
from ddm import features
from ddm.errors import UserError
from ddm.loading import positions
from ddm.tars import BadSample, TarWriter, find_tars, scan_tar

ONE_RANK = SimpleNamespace(rank=0, world=1)


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
    tars = []
    for t, numbers in enumerate([range(0, 7), [], range(7, 19)]):
        samples = [{"png": png(), "cls": str(i).encode()} for i in numbers]
        tars.append(write(tmp_path / f"{t}.tar", samples))
    return tars


def open_uneven(tars, **options):
    return TarDataset(tars, 8, "class", classes=19, **options)


# ---- order ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000])
def test_the_shuffle_is_another_permutation_for_each_key(n):
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        orders.append(tuple(permute(i, n, seed, epoch) for i in range(n)))

    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 64 or len(set(orders)) == 3


def test_each_sample_comes_first_equally_often():
    first = np.bincount([permute(0, 10, 0, epoch) for epoch in range(5000)], minlength=10)
    assert abs(first - 500).max() < 5 * 500 ** 0.5


def read_by(dataset, first, last, batch, world, micro, workers=0):
    """What training reads in steps first..last-1 of a global batch: the class numbers, rank by rank
    within a step.
    """
    ranks = []
    for rank in range(world):
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=positions(first, last, batch, rank, world, micro),
            num_workers=workers,
            collate_fn=data.collate,
        )
        ranks.append(torch.cat([part["c"] for part in loader]).tolist())

    share = batch // world
    labels = []
    for step in range(last - first):
        for rank in ranks:
            labels += rank[step * share:(step + 1) * share]
    return labels


PLACES = [(1, 0, 38), (1, 2, 5), (2, 1, 19), (2, 2, 4), (19, 0, 1)]


@pytest.mark.parametrize("world, workers, micro", PLACES)
@pytest.mark.parametrize("shuffle_block", [1, 4])
def test_each_sample_exactly_once_an_epoch(uneven, world, workers, micro, shuffle_block):
    """Micro-batches that do not divide a rank's share, tars of 7, 0 and 12 samples; a step of 38 is
    two epochs of 19.
    """
    dataset = open_uneven(uneven, seed=3, shuffle_block=shuffle_block)
    seen = read_by(dataset, 0, 2, 38, world, micro, workers)
    for epoch in range(4):
        assert sorted(seen[epoch * 19:(epoch + 1) * 19]) == list(range(19))


def test_a_resume_reads_the_very_next_sample_on_any_number_of_ranks(uneven):
    dataset = open_uneven(uneven)
    whole = read_by(dataset, 0, 10, 6, 1, 6)
    before = read_by(dataset, 0, 4, 6, 1, 6)
    for world, micro, workers in ((1, 4, 2), (2, 3, 0), (3, 1, 1)):
        assert before + read_by(dataset, 4, 10, 6, world, micro, workers) == whole


def test_blocks_of_consecutive_samples_stay_together(uneven):
    dataset = open_uneven(uneven, shuffle_block=4)
    order = [dataset.order(p) for p in range(16)]
    assert all(order[i + 1] == (order[i] + 1) % 19 for i in range(16) if i % 4 != 3)


def test_randomness_is_a_function_of_seed_and_position(uneven):
    one = open_uneven(uneven, crop="random", flip=True)[11]
    again = open_uneven(uneven, crop="random", flip=True)
    again[3]
    same = again[11]

    assert torch.equal(one["eps"], same["eps"])
    assert torch.equal(one["x"], same["x"])
    assert one["u"] == same["u"]
    assert one["u"] != again[12]["u"]
    assert one["u"] != open_uneven(uneven, seed=1)[11]["u"]


def test_noise_is_standard_normal_and_time_uniform(uneven):
    dataset = open_uneven(uneven)
    items = [dataset[p] for p in range(400)]
    eps = torch.stack([item["eps"] for item in items])
    u = torch.tensor([item["u"] for item in items])

    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02
    assert abs(u.mean() - 0.5) < 0.05 and 0 < u.min() and u.max() < 1


# ---- tars ----------------------------------------------------------------------------------------

def test_the_index_is_made_once_and_again_when_the_tar_changes(uneven, monkeypatch):
    first = data.index_tar(uneven[0])
    with monkeypatch.context() as m:
        m.setattr(data, "scan_tar", lambda path: pytest.fail("scanned again"))
        assert np.array_equal(data.index_tar(uneven[0]), first)

    write(uneven[0], [{"png": png(), "cls": b"5"}])
    assert len(data.index_tar(uneven[0])) == 1


def test_the_index_reads_the_same_mapped_or_not(uneven):
    made = data.index_tar(uneven[2])
    for mapped in (False, True):
        assert np.array_equal(data.index_tar(uneven[2], mapped), made)


def test_a_read_only_folder_can_be_indexed(uneven, monkeypatch):
    def refuse(path):
        raise OSError("read-only")

    monkeypatch.setattr(data, "atomic", refuse)
    assert len(data.index_tar(uneven[2])) == 12
    assert not os.path.exists(uneven[2] + ".idx")


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_non_ascii_names_of_other_programs_are_read(tmp_path, kind):
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
    # 2048 bytes each
    write(path, [{"png": png(), "txt": b"a red square"} for _ in range(6)])
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])

    samples = list(scan_tar(path))
    assert "torn.tar" in capsys.readouterr().err
    # cut just at a sample's end: it cannot be told to be whole
    assert len(samples) in (keep // 2048, max(0, keep // 2048 - 1))
    assert all(set(s.members) == {"image", "txt"} for s in samples)


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_a_file_that_is_no_tar_gives_nothing_and_a_warning(tmp_path, capsys, content):
    (tmp_path / "x.tar").write_bytes(content)
    assert list(scan_tar(tmp_path / "x.tar")) == []
    assert "x.tar" in capsys.readouterr().err


def test_a_failed_writer_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError):
        with TarWriter(str(tmp_path / "a.tar")) as tar:
            tar.add("x.txt", b"x")
            raise RuntimeError
    assert os.listdir(tmp_path) == []


# ---- --data --------------------------------------------------------------------------------------

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*paths):
    """Writes tars of one sample."""
    for path in paths:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write(path, [{"png": png(), "txt": b"a cat"}])


def test_a_path_that_exists_is_that_file_whatever_its_characters(here):
    wanted = ["data [v2]/0 {a,b}.tar", "data [v2]/what?.tar", "s p/*.tar"]
    touch(*wanted, "data v/x.tar")
    # in the order of their names
    assert list(find_tars(wanted).values()) == [wanted[2], *wanted[:2]]


def test_two_stars_are_any_depth_and_a_tar_counts_once(here):
    touch("d/0.tar", "d/a/1.tar", "d/a/b/2.TAR")
    os.symlink("a/1.tar", "d/link.tar")
    absolute = str(here / "d" / "0.tar")
    left = []
    found = find_tars(["d/**/*.tar", "d/**/*.TAR", "d/0.tar", absolute], left)
    assert found == {"0": absolute, "1": "d/a/1.tar", "2": "d/a/b/2.TAR"}
    assert left == ["1 links to tars that are there already"]


def test_what_is_no_tar_is_counted(here):
    touch("d/0.tar")
    os.makedirs("d/sub")
    for name in ("1.tar.gz", "2.TAR.GZ", "3.tgz", "0.tar.idx", "0.parquet", "sub/x.png"):
        (here / "d" / name).write_bytes(b"x")
    left = []
    assert list(find_tars(["d/*"], left)) == ["0"]
    assert left == ["2 .tar.gz, 1 .parquet, 1 .tgz, 1 folder (d/0.parquet the first; compressed "
                    "tars cannot be read at any place: decompress them (gunzip d/1.tar.gz))"]


# beside a pattern that matches tars these are errors, too
NO_TARS = {
    "none/*.tar":       "there is no folder none",
    "d/9.tar":          "there is nothing of that name; d is a folder with 1 tars; did you mean "
                        "'d/*.tar'?",
    "d/{0..3}.tar":     "braces are not expanded: did you mean 'd/*.tar'?",
    "d/x{a,b}.tar":     "braces are not expanded here",
    "s3://bucket/0.tar": "no URLs",
    "pipe:cat x":       "no URLs",
    "gz/*.tar":         "gunzip gz/0.tar.gz",
    "folder.tar":       "folder.tar is a folder",
    "dangling.tar":     "dangling.tar is a link to nowhere",
}
# beside a pattern that matches tars these are left out
NO_TARS_ALONE = {
    "d":                "did you mean 'd/*.tar'?",
    "deep":             "did you mean 'deep/**/*.tar'?",
    "gz/0.tar.gz":      "gunzip gz/0.tar.gz",
    "zip/*":            "unpack",
    "images":           "tar --sort=name -cf 00000.tar -C images .",
    "images/*/*.JPG":   "tar --sort=name",
    "x.parquet":        "img2dataset --url_list x.parquet --input_format parquet",
    "empty":            "an empty folder",
}


@pytest.mark.parametrize("pattern, says", (NO_TARS | NO_TARS_ALONE).items())
def test_a_pattern_without_tars_is_told_what_is_there(here, pattern, says):
    touch("d/0.tar", "deep/er/0.tar")
    os.makedirs("folder.tar")
    os.makedirs("empty")
    os.symlink("nowhere", "dangling.tar")
    for name in ("gz/0.tar.gz", "zip/0.zip", "images/cat/0.JPG", "images/dog/1.JPG", "x.parquet"):
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        (here / name).write_bytes(b"x")

    calls = [[pattern]]
    if pattern in NO_TARS:
        calls.append(["d/*.tar", pattern])
    for patterns in calls:
        with pytest.raises(UserError) as error:
            find_tars(patterns)
        assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("condition, names, cause, says", [
    ("text", ["a.png", "b.png", "a.txt", "b.txt"], "no caption", "tar --sort=name"),
    ("text", ["a.png", "a.png.txt"], "no caption", "KEY.txt, not KEY.png.txt"),
    ("text", ["a.v1.png", "a.v1.txt", "a.v2.png", "a.v2.txt"], "no caption", "first dot"),
    ("text", ["a.png", "a.json"], "no caption", "KEY.json"),
    ("text", ["a.png", "a.caption"], "no caption", "KEY.caption"),
    ("text", ["a.png", "a.cls"], "no caption", "data.condition = class"),
    ("text", ["a.png"], "no caption", "data.condition = none"),
    ("class", ["a.png", "a.txt"], "no class", "data.condition = text"),
    ("class", ["a.png", "a.cls"], "class is no number", "number the classes"),
    ("text", ["a.svg", "a.txt"], "no image", "images are KEY.jpg"),
    ("text", ["a.lat", "a.txt"], "no image", "holds latents"),
    ("text", ["._a.png", "__MACOSX/b.png"], "", "nothing but 2 files"),
    ("text", [], "", "a tar without files"),
])
def test_an_error_says_what_a_tar_holds_instead(here, condition, names, cause, says):
    with TarWriter("x.tar") as tar:
        for name in names:
            tar.add(name, png() if name.endswith(".png") else b"a cat")

    words = ddm.tars.describe_samples("x.tar", cause, condition)
    assert words.startswith("x.tar ") and says in words
    if cause:
        assert f"begins with {names[0]}" in words


@pytest.mark.parametrize("payload, says", [
    (b"\x1f\x8b" + bytes(900), "gzip"),
    (b"PK\3\4" + bytes(900), "zip"),
    (b"\n<!DOCTYPE html>", "web page"),
    (b"", "empty"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (png(), "a PNG"),
])
def test_a_file_that_is_no_tar_is_named_for_what_it_is(here, capsys, payload, says):
    (here / "x.tar").write_bytes(payload)
    notes = ddm.tars.Notes()
    assert list(scan_tar("x.tar", notes)) == []
    assert says in notes.torn
    assert says in capsys.readouterr().err
    assert says in ddm.tars.describe_samples("x.tar", "", "text")


@pytest.mark.parametrize("order", [
    ["png", "jpeg", "webp", "txt"],
    ["webp", "txt", "jpeg", "png"],
    ["JPEG", "png", "webp", "txt"],
])
def test_the_first_of_jpg_jpeg_png_webp_is_taken_in_any_order(here, order):
    with TarWriter("x.tar") as tar:
        for extension in order:
            tar.add(f"a.{extension}", extension.encode())

    sample, = scan_tar("x.tar")
    assert sample.taken["image"].lower() == "jpeg"
    assert sorted(sample.others) == ["png", "webp"] and "a." in sample.choice()
    assert TarDataset(["x.tar"], 8).members(0)["image"].lower() == b"jpeg"


def test_a_reference_says_what_it_leaves_out(here, capsys):
    captions = [b"a cat" if i % 4 else b"" for i in range(12)]
    write("x.tar", [{"png": png((i, 0, 0)), "txt": text} for i, text in enumerate(captions)])
    (here / "y.tar.gz").write_bytes(b"x")
    pixels = features.distance_space(SimpleNamespace(name="pixels"), None)

    reference = features.open_reference(["*"], 8, "text")
    (statistics,), labels = features.read_reference(reference, [pixels], None, "out", 4, ONE_RANK)
    told = capsys.readouterr()
    assert "12 samples in 1 tars; left out: 1 .tar.gz" in told.out
    assert "3 of 12 " in told.err and "are left out: no caption: 3" in told.err
    assert statistics["count"] == 9 and (labels[0] >= 0).sum() == 9

    reference = features.open_reference(["x.tar"], 8, "class", 5)
    with pytest.raises(UserError, match="data.condition = text uses them"):
        features.read_reference(reference, [pixels], None, "out", 4, ONE_RANK)


# ---- which bytes a tar has -----------------------------------------------------------------------

def test_a_copy_is_the_same_source_and_another_content_is_not(here):
    touch("a.tar")
    source = ddm.tars.read_source("a.tar")
    os.utime("a.tar", ns=(1, 1))
    again = ddm.tars.read_source("a.tar", source)
    assert again != source and again.sha256 == source.sha256

    # the same size and date, as cp -p leaves them
    stat = os.stat("a.tar")
    payload = bytearray((here / "a.tar").read_bytes())
    payload[600] ^= 1
    (here / "a.tar").write_bytes(payload)
    os.utime("a.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert ddm.tars.read_source("a.tar", again).sha256 != source.sha256


def test_an_unchanged_tar_is_not_read_again(here, monkeypatch):
    def read():
        return ddm.tars.read_sources(["a.tar"], "out/sources.json", ONE_RANK)

    touch("a.tar")
    first = read()
    with monkeypatch.context() as m:
        m.setattr(ddm.tars.hashlib, "file_digest", lambda *args: pytest.fail("read again"))
        assert read() == first

    (here / "out" / "sources.json").write_text('{"x": 5}')
    assert read() == first


# ---- bad samples ---------------------------------------------------------------------------------

def test_bad_samples_are_named_and_replaced_without_moving_any_other(tmp_path):
    good = [{"png": png((i, 0, 0)), "txt": b"x"} for i in range(20)]
    bad = [dict(members) for members in good]
    bad[3]["png"] = b"not an image"
    bad[5]["txt"] = b" ?! "
    del bad[9]["png"]
    clean = TarDataset([write(tmp_path / "good.tar", good)], 8, "text", encode=None)
    dataset = TarDataset([write(tmp_path / "bad.tar", bad)], 8, "text", encode=None)

    causes = set()
    for p in range(20):
        item = dataset[p]
        assert bool(item["bad"]) == (clean.order(p) in (3, 5, 9))
        if not item["bad"]:
            assert torch.equal(item["x"], clean[p]["x"])
        assert torch.equal(item["eps"], clean[p]["eps"])
        assert torch.equal(item["x"], dataset[p]["x"])
        for _, name, cause in item["bad"]:
            causes.add((name, cause.split(" (")[0]))
    assert causes == {("000003", "undecodable"), ("000005", "no caption"), ("000009", "no image")}


def test_data_without_a_good_sample_is_an_error(tmp_path):
    dataset = TarDataset([write(tmp_path / "x.tar", [{"png": b"x"}])], 8)
    with pytest.raises(UserError, match="a hundred samples"):
        dataset[0]


@pytest.mark.parametrize("payload, cause", [
    (b"", "no class"),
    (b"cat", "'cat'"),
    (b"10", "classes = 10"),
    (b"-1", "classes = 10"),
    (b"9" * 5000, "no number"),
])
def test_a_class_must_be_a_number_below_the_configured_classes(payload, cause):
    with pytest.raises(BadSample, match=cause):
        data.check_condition({"cls": payload}, "class", 10)
    assert data.check_condition({"cls": b" 7\n"}, "class", 10) == 7


# ---- images --------------------------------------------------------------------------------------

def corner(payload):
    return decode(payload).getpixel((0, 0))


def test_images_of_every_mode_come_out_rgb_with_transparency_on_white():
    assert corner(png((0, 0, 0, 0), mode="RGBA")) == (255, 255, 255)
    assert corner(png((255, 0, 0, 255), mode="RGBA")) == (255, 0, 0)
    assert corner(png((10, 20, 30), transparency=(10, 20, 30))) == (255, 255, 255)
    assert corner(png(77, mode="L")) == (77, 77, 77)
    out = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(out, "JPEG")
    assert decode(out.getvalue()).mode == "RGB"


def test_exif_rotation_is_undone():
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    # the camera was turned: show it turned clockwise
    exif[0x0112] = 6
    out = io.BytesIO()
    image.save(out, "JPEG", exif=exif, quality=95)

    upright = decode(out.getvalue())
    assert upright.size == (8, 16)
    assert upright.getpixel((4, 2))[0] > 200 and upright.getpixel((4, 13))[0] < 50


def test_a_decompression_bomb_is_a_bad_sample(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(BadSample, match="DecompressionBomb"):
        decode(png())


def test_square_crops_where_asked_and_mirrors():
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, :4] = 10
    pixels[:, 4:8] = 20
    pixels[:, 8:] = 30
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

    def different(**options):
        dataset = TarDataset([tar], 8, **options)
        return len({dataset[p]["x"].numpy().tobytes() for p in range(20)})

    assert different() == 1
    assert different(flip=True) == 2
    assert different(crop="random") > 10


def test_pixels_survive_the_round_trip_through_floats():
    x = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    floats = data.to_float(x)
    assert floats.min() == -1 and floats.max() == 1 and floats.shape == (1, 3, 16, 16)
    assert torch.equal(data.to_uint8(floats), x)
