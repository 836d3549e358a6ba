"""The partition as a contract: manifests, --verify, --append, --balance; foreign, stale and damaged
shards are refused in one line.
"""
import csv
import hashlib
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from conftest import command, copy, inside
from safetensors.numpy import load_file

import cluster
import data
import ddm.config
import ddm.run
import ddm.tars
from data import TarDataset
from ddm import partition
from ddm.artifacts import write_tensors
from ddm.errors import UserError
from ddm.tars import TarWriter, scan_tar

SHARDS = ("0", "1", "2", "router")


def contents(run):
    return {path.relative_to(run): path.read_bytes() for path in sorted(run.glob("shards/*/*.tar"))}


def manifest(run, shard):
    return json.loads((run / "shards" / shard / "manifest.json").read_text())


def counts(run):
    return load_file(run / "clusters.safetensors")["counts"]


def refused(run, *flags):
    """What train_expert.py says of shard 0, which it does not begin to train on."""
    done = inside("train_expert.py", "--run-dir", run, "--shard", 0, "--device", "cpu", *flags)
    folder = run / "checkpoints" / "expert-0"
    assert done.returncode == 2, done.stderr
    assert os.listdir(folder) == ["status"], done.stderr
    assert (folder / "status").read_text() == "failed 0\n"
    return done.stderr.splitlines()[-1]


@pytest.fixture
def more(tmp_path):
    folder = tmp_path / "more"
    command("tools/shapes.py", "--out", folder, "--images", 60, "--size", 8, "--seed", 9,
            "--per-tar", 40)
    for path in folder.glob("*.tar"):
        path.rename(folder / f"more-{path.name}")
    return folder


# ---- manifests -----------------------------------------------------------------------------------

def test_a_manifest_says_what_a_shard_holds(clustered):
    clusters = ddm.run.read_clusters(clustered)
    for shard in SHARDS:
        folder = clustered / "shards" / shard
        said = manifest(clustered, shard)
        assert said["fingerprint"] == clusters["fingerprint"]
        assert said["shard"] == shard
        assert set(said["tars"]) == {path.name for path in folder.glob("*.tar")}
        for name, entry in said["tars"].items():
            path = folder / name
            assert entry["samples"] == len(list(scan_tar(path)))
            assert entry["bytes"] == path.stat().st_size
            assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_interrupted_partition_gets_the_manifest_of_an_undisturbed_one(clustered, tars,
                                                                          tmp_path):
    run = copy(clustered, tmp_path)
    for path in run.glob("shards/*/manifest.json"):
        path.unlink()
    (run / "shards" / "1" / "00001.tar").unlink()
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", run)
    assert contents(run) == contents(clustered)
    for shard in SHARDS:
        assert manifest(run, shard) == manifest(clustered, shard)


def test_a_partition_without_its_clusters_is_not_written_over(clustered, tars, config, tmp_path):
    run = copy(clustered, tmp_path)
    (run / "clusters.safetensors").unlink()
    done = stage_1([tars / "*.tar"], run, config)
    assert done.returncode == 2
    assert f"delete {run}/shards to make it anew" in done.stderr
    assert contents(run) == contents(clustered)


def test_a_shard_that_is_not_as_its_manifest_says_is_refused(clustered, tmp_path):
    """Before the first step."""
    run = copy(clustered, tmp_path)
    folder = run / "shards" / "0"
    tar = sorted(folder.glob("*.tar"))[0]
    whole = tar.read_bytes()

    tar.write_bytes(whole[:-512])
    line = refused(run)
    assert "is not as its manifest says" in line and tar.name in line
    tar.unlink()
    assert "is not as its manifest says" in refused(run)
    tar.write_bytes(whole)

    shutil.copy(tar, folder / "stray.tar")
    assert "stray.tar" in refused(run)
    (folder / "stray.tar").unlink()

    said = manifest(run, "0")
    other = said | {"fingerprint": "0123456789abcdef"}
    (folder / "manifest.json").write_text(json.dumps(other))
    line = refused(run)
    assert "is of clustering 0123456789abcdef" in line and said["fingerprint"] in line
    (folder / "manifest.json").unlink()
    assert "manifest.json" in refused(run)


def test_verify_finds_a_single_flipped_bit(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    tar = sorted((run / "shards" / "0").glob("*.tar"))[1]
    damaged = bytearray(tar.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    tar.write_bytes(damaged)
    line = refused(run, "--verify")
    assert tar.name in line and "SHA-256" in line
    command("train_expert.py", "--run-dir", run, "--shard", 1, "--verify", "--train.steps", 1)


# ---- --append ------------------------------------------------------------------------------------

def test_appended_tars_join_frozen_centroids_and_touch_no_shard(clustered, tars, more, tmp_path):
    run = copy(clustered, tmp_path)
    before = contents(run)
    centroids = load_file(run / "clusters.safetensors")
    del centroids["counts"]
    command("cluster.py", "--data", more / "*.tar", "--run-dir", run, "--append", ranks=2)

    after = contents(run)
    clusters = load_file(run / "clusters.safetensors")
    assert len(after) == len(before) + 2 * len(SHARDS)
    assert all(after[path] == content for path, content in before.items())
    assert clusters["counts"].sum() == 300
    for name, tensor in centroids.items():
        assert (clusters[name] == tensor).all()
    said = ddm.run.read_clusters(run)
    assert said["fingerprint"] == ddm.run.read_clusters(clustered)["fingerprint"]
    assert said["tars"] == 5 and said["appended"] == 2
    in_manifests = []
    for shard in SHARDS:
        entries = manifest(run, shard)["tars"].values()
        in_manifests.append(sum(entry["samples"] for entry in entries))
    assert in_manifests == [*clusters["counts"], 300]

    # an image's cluster does not depend on how many ranks there are
    again = tmp_path / "again"
    shutil.copytree(clustered, again)
    done = inside("cluster.py", "--data", more / "*.tar", "--run-dir", again, "--append",
                  "--device", "cpu")
    assert done.returncode == 0 and contents(again) == after

    # twice is once, with the old ones beside, too
    done = inside("cluster.py", "--data", tars / "*.tar", more / "*.tar", "--run-dir", run,
                  "--append", "--device", "cpu")
    assert done.returncode == 0 and contents(run) == after
    assert (counts(run) == clusters["counts"]).all()
    command("train_expert.py", "--run-dir", run, "--shard", 0, "--train.steps", 1, "--verify")


def test_the_router_s_subset_keeps_its_share_of_what_is_appended(tars, config, more, tmp_path):
    run = tmp_path / "run"
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", run, "--config", config,
            "--cluster.router_images", 60)
    command("cluster.py", "--data", more / "*.tar", "--run-dir", run, "--append")
    paths = sorted((run / "shards" / "router").glob("*.tar"))
    router = TarDataset([str(path) for path in paths], 8, "none", clusters=True)
    assert len(router) == 60 + 15


def test_an_append_that_does_not_fit_is_refused(clustered, tars, more, tmp_path):
    run = copy(clustered, tmp_path)
    before = contents(run)
    (more / "more-00000.tar").rename(more / "00000.tar")
    done = inside("cluster.py", "--data", more / "*.tar", "--run-dir", run, "--append")
    assert done.returncode == 2
    assert "is named like a tar that the partition has" in done.stderr

    done = inside("cluster.py", "--data", more / "*.tar", "--run-dir", tmp_path / "none",
                  "--append")
    assert done.returncode == 2 and "leave --append out" in done.stderr

    done = inside("cluster.py", "--data", tars / "*.tar", more / "more*.tar", "--run-dir", run)
    assert done.returncode == 2 and "--append" in done.stderr
    assert contents(run) == before


# ---- --balance, --max-bad ------------------------------------------------------------------------

def test_balance_caps_the_largest_share_at_the_least_added_distance():
    """By hand: fine clusters on a line; of those of the large coarse one, the smallest step to
    another with room is taken first.
    """
    clusters = {
        "fine_centroids": np.array([[0.0], [1.0], [4.0], [10.0]], np.float32),
        "coarse_centroids": np.array([[1.0], [9.0]], np.float32),
        "fine_to_coarse": np.array([0, 0, 0, 1]),
    }
    words = cluster.balance(clusters, np.array([30, 30, 20, 20]), 0.6)
    assert clusters["fine_to_coarse"].tolist() == [0, 0, 1, 1]
    assert "1 of 4 fine clusters moved, with 20.0% of the images" in words
    # before: (30 * 1 + 0 + 20 * 9 + 20 * 1) / 100; after: the third is 25 away from the other
    assert "grew from 2.30000 to 5.50000" in words

    clusters["fine_to_coarse"] = np.array([0, 0, 0, 1])
    assert cluster.balance(clusters, np.array([30, 30, 20, 20]), 0.8) == "balance: nothing to move"
    with pytest.raises(UserError, match="cannot be reached"):
        cluster.balance(clusters, np.array([90, 4, 3, 3]), 0.6)


def test_a_balanced_run_holds_the_cap_and_needs_fine_assignment(tars, config, tmp_path):
    run = tmp_path / "run"
    flags = ["--data", tars / "*.tar", "--config", config]
    done = command("cluster.py", *flags, "--run-dir", run, "--cluster.assign", "fine",
                   "--balance", "45%")
    assert counts(run).sum() == 240 and counts(run).max() <= 0.45 * 240
    assert "balance:" in done.stdout
    for k, count in enumerate(counts(run)):
        paths = (run / "shards" / str(k)).glob("*.tar")
        assert sum(len(list(scan_tar(path))) for path in paths) == count

    flags += ["--run-dir", tmp_path / "other"]
    done = inside("cluster.py", *flags, "--balance", "0.45")
    assert done.returncode == 2 and "cluster.assign = fine" in done.stderr
    done = inside("cluster.py", *flags, "--cluster.assign", "fine", "--balance", "0.2")
    assert done.returncode == 2 and "between 1 / 3" in done.stderr


def test_samples_that_cannot_be_used_are_listed_and_too_many_stop(tars, config, tmp_path):
    with TarWriter(str(tmp_path / "bad.tar")) as tar:
        for i in range(30):
            tar.add(f"{i:03d}.png", b"no picture")
            tar.add(f"{i:03d}.txt", b"a caption")
    run = tmp_path / "run"
    patterns = [tars / "*.tar", tmp_path / "bad.tar"]
    done = stage_1(patterns, run, config)
    assert done.returncode == 2
    assert "30 of 270 samples cannot be used" in done.stderr
    assert not (run / "clusters.safetensors").exists()

    with open(run / "logs" / "cluster.skipped.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 30
    assert rows[0]["tar"] == "bad" and rows[0]["sample"] == "000"
    assert rows[0]["cause"].startswith("undecodable")
    assert stage_1(patterns, run, config, "--max-bad", "20%").returncode == 0


# ---- tars that change ----------------------------------------------------------------------------

def stage_1(patterns, run, config, *flags):
    return inside("cluster.py", "--data", *patterns, "--run-dir", run, "--config", config,
                  "--device", "cpu", *flags)


def pack(path, members):
    with TarWriter(str(path)) as tar:
        for name, payload in members:
            tar.add(name, payload)


def unpack(path):
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


@pytest.fixture
def mine(tars, tmp_path):
    """Tars that a test may change."""
    return shutil.copytree(tars, tmp_path / "in", ignore=shutil.ignore_patterns("*.idx"))


def replace(path, members, keep_date):
    """Writes a tar anew, of the same size; keep_date: as cp -p or rsync -t would."""
    stat = os.stat(path)
    pack(path, members)
    if keep_date:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert os.stat(path).st_size == stat.st_size


def features(run):
    return {path.name: path.stat().st_mtime_ns for path in run.glob("features/*.safetensors")}


@pytest.mark.parametrize("keep_date", [False, True])
def test_a_tar_repaired_after_a_failed_call_is_read_again(mine, config, tmp_path, keep_date):
    """The same members in another order, so of the same size; also of the same date."""
    path = mine / "00000.tar"
    run = tmp_path / "run"
    whole = unpack(path)
    pack(path, whole[::2] + whole[1::2])
    done = stage_1([mine / "*.tar"], run, config)
    assert done.returncode == 2
    assert "tar --sort=name" in done.stderr and "00000.tar begins with" in done.stderr

    made = features(run)
    replace(path, whole, keep_date)
    done = stage_1([mine / "*.tar"], run, config)
    assert done.returncode == 0, done.stderr
    assert "\n240 images in 3 tars\n" in done.stdout
    made_anew = [name for name, time in features(run).items() if time != made[name]]
    assert made_anew == ["00000.safetensors"]


@pytest.mark.parametrize("keep_date", [False, True])
def test_a_clustered_tar_that_has_changed_is_named(clustered, mine, config, tmp_path, keep_date):
    run = copy(clustered, tmp_path)
    path = mine / "00001.tar"
    members = [(name, payload.replace(b"circle", b"square")) for name, payload in unpack(path)]
    replace(path, members, keep_date)
    before = contents(run)
    for flags in ((), ("--append",)):
        done = stage_1([mine / "*.tar"], run, config, *flags)
        assert done.returncode == 2
        for words in (str(path), "changed", "--run-dir"):
            assert words in done.stderr

    # without manifests, as an interrupted call leaves it, and without features, which may be gone
    for manifest_file in run.glob("shards/*/manifest.json"):
        manifest_file.unlink()
    assert str(path) in stage_1([mine / "*.tar"], run, config).stderr
    shutil.rmtree(run / "features")
    assert "other data" in stage_1([mine / "*.tar"], run, config).stderr
    assert contents(run) == before


def test_a_copy_of_the_data_is_the_same_data_and_read_once(clustered, mine, config, tmp_path,
                                                           monkeypatch):
    run = copy(clustered, tmp_path)
    for path in mine.glob("*.tar"):
        os.utime(path, ns=(1, 1))
    read = []
    real = hashlib.file_digest

    def file_digest(file, name):
        read.append(file.name)
        return real(file, name)

    monkeypatch.setattr(ddm.tars.hashlib, "file_digest", file_digest)
    assert stage_1([mine / "*.tar"], run, config).returncode == 0
    assert len(read) == 3
    assert stage_1([mine / "*.tar"], run, config).returncode == 0
    assert len(read) == 3
    assert contents(run) == contents(clustered)


def test_what_a_failed_call_could_not_read_is_read_by_the_next(mine, config, tmp_path,
                                                               monkeypatch):
    """The disk fails in the first call; the tars stay as they are."""
    run = tmp_path / "run"
    real = data.decode

    def fail(payload, least=0):
        if len(payload) % 2:
            raise ddm.tars.BadSample("unreadable (OSError)")
        return real(payload, least)

    monkeypatch.setattr(data, "decode", fail)
    done = stage_1([mine / "*.tar"], run, config)
    assert done.returncode == 2
    assert "unreadable (OSError)" in done.stderr and not (run / "config.toml").exists()

    monkeypatch.setattr(data, "decode", real)
    done = stage_1([mine / "*.tar"], run, config)
    assert done.returncode == 0
    assert "\n240 images in 3 tars\n" in done.stdout


def test_an_interrupted_append_of_a_tar_repaired_since_keeps_nothing_old(clustered, more, config,
                                                                         tmp_path):
    run = copy(clustered, tmp_path)
    path = more / "more-00000.tar"
    assert stage_1([more / "*.tar"], run, config, "--append").returncode == 0
    # killed before they were written
    for manifest_file in run.glob("shards/*/manifest.json"):
        shutil.copy(clustered / manifest_file.relative_to(run), manifest_file)
    shutil.copy(clustered / "clusters.safetensors", run)

    members = []
    for name, payload in unpack(path):
        if name.endswith("txt"):
            payload = payload.replace(b"a ", b"A ")
        members.append((name, payload))
    pack(path, members)
    assert stage_1([more / "*.tar"], run, config, "--append").returncode == 0

    texts = []
    for shard in "012":
        for name, payload in unpack(run / "shards" / shard / path.name):
            if name.endswith("txt"):
                texts.append(payload)
    assert len(texts) == 40 and all(text.startswith(b"A ") for text in texts)


def test_bytes_are_copied_only_where_the_header_names_their_key(clustered, mine, tmp_path):
    run = copy(clustered, tmp_path)
    config = ddm.config.make_config(ddm.config.read_toml(run / "config.toml"))
    features_file = run / "features" / "00000.safetensors"
    tar = partition.Tar("00000", str(mine / "00000.tar"), str(features_file))
    members = unpack(tar.path)
    pack(tar.path, members[2:4] + members[:2] + members[4:])

    # as if it were the same
    about = partition.read_metadata(tar.features)
    about["source"] = vars(ddm.tars.read_source(tar.path))
    write_tensors(tar.features, load_file(tar.features), about)
    empty = partition.read_partition(str(tmp_path / "empty"), 3)
    clusters = load_file(run / "clusters.safetensors")
    with pytest.raises(UserError, match="at byte 0 is 000000001") as error:
        cluster.split_tar(tar, empty, clusters=clusters, for_router=np.arange(2), config=config)
    assert tar.path in str(error.value)
    assert not list(tmp_path.glob("empty/shards/*/*.tar"))


def test_what_is_left_out_is_counted_in_the_line_of_images(mine, config, tmp_path):
    whole = unpack(mine / "00000.tar")
    members = [("._" + name, b"fork") for name, _ in whole[:4]]
    for name, payload in whole:
        if name.endswith("png"):
            members.append((name.replace("png", "webp"), payload))
        members.append((name, payload))
    pack(mine / "00000.tar", members)
    (mine / "00001.tar").rename(mine / "00001.tar.gz")
    cut = (mine / "00002.tar").read_bytes()[:-700]
    (mine / "00002.tar").write_bytes(cut)

    # the second call says it again
    for _ in range(2):
        done = stage_1([mine / "*"], tmp_path / "run", config, "--cluster.fine_clusters", 3)
        assert done.returncode == 0, done.stderr
        line = done.stdout.splitlines()[1]
        for words in ("139 images in 2 tars", "1 .tar.gz", "gunzip", "all but one: 100",
                      "000000000.png is taken, not .webp", "begin with a dot", ": 4", "cut off"):
            assert words in line, line


WRONG = [
    {},
    {"images": "many"},
    {"images": 7},
    {"source": {"bytes": 1}},
    {"source": []},
    {"skipped": [["a"]]},
    {"left": []},
]


@pytest.mark.parametrize("about", WRONG, ids=str)
def test_features_that_are_damaged_are_made_again(clustered, tars, config, tmp_path, about):
    run = copy(clustered, tmp_path)
    file = run / "features" / "00001.safetensors"
    made = file.read_bytes()
    said = partition.read_metadata(file) | about if about else {}
    write_tensors(file, load_file(file), said)
    assert stage_1([tars / "*.tar"], run, config).returncode == 0
    assert file.read_bytes() == made


def test_an_expert_can_be_replaced_by_another_of_the_same_clustering(trained, tmp_path):
    run = copy(trained, tmp_path)
    shutil.rmtree(run / "checkpoints" / "expert-1")
    os.remove(run / "experts" / "1.safetensors")
    command("train_expert.py", "--run-dir", run, "--shard", 1, "--train.seed", 7)
    done = inside("sample.py", "--run-dir", run, "--device", "cpu", "--prompt", "a red circle",
                  "--require-all", "--out", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
