"""The partition as a contract: manifests, --verify, --append, --balance; foreign, stale and damaged shards are refused in one line."""
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
from ddm.errors import UserError
from data import TarDataset
from ddm.tars import TarWriter, scan_tar
import ddm.config
import ddm.run
import ddm.tars

SHARDS = ("0", "1", "2", "router")


def contents(run):
    return {path.relative_to(run): path.read_bytes() for path in sorted(run.glob("shards/*/*.tar"))}


def manifest(run, shard):
    return json.loads((run / "shards" / shard / "manifest.json").read_text())


def refused(run, *flags):
    done = inside("train_expert.py", "--run-dir", run, "--shard", 0, "--device", "cpu", *flags)
    assert done.returncode == 2 and os.listdir(run / "checkpoints" / "expert-0") == ["status"], done.stderr
    assert (run / "checkpoints" / "expert-0" / "status").read_text() == "failed 0\n"
    return done.stderr.splitlines()[-1]


@pytest.fixture
def more(tmp_path):
    folder = tmp_path / "more"
    command("tools/shapes.py", "--out", folder, "--images", 60, "--size", 8, "--seed", 9, "--per-tar", 40)
    for path in folder.glob("*.tar"):
        path.rename(folder / f"more-{path.name}")
    return folder


def test_a_manifest_says_what_a_shard_holds(clustered):
    clusters = ddm.run.read_clusters(clustered)
    for shard in SHARDS:
        said = manifest(clustered, shard)
        assert said["fingerprint"] == clusters["fingerprint"] and said["shard"] == shard
        assert set(said["tars"]) == {path.name for path in (clustered / "shards" / shard).glob("*.tar")}
        for name, entry in said["tars"].items():
            path = clustered / "shards" / shard / name
            assert entry["samples"] == len(list(scan_tar(path))) and entry["bytes"] == path.stat().st_size
            assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_partition_that_was_interrupted_gets_the_manifest_of_an_undisturbed_one(clustered, tars, tmp_path):
    run = copy(clustered, tmp_path)
    for path in run.glob("shards/*/manifest.json"):
        path.unlink()
    (run / "shards" / "1" / "00001.tar").unlink()
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", run)
    assert all(manifest(run, shard) == manifest(clustered, shard) for shard in SHARDS) and contents(run) == contents(clustered)


def test_a_shard_that_is_not_as_its_manifest_says_is_refused_before_the_first_step(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    folder = run / "shards" / "0"
    tar = sorted(folder.glob("*.tar"))[0]
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    assert "is not as its manifest says" in refused(run) and tar.name in refused(run)
    tar.unlink()
    assert "is not as its manifest says" in refused(run)
    tar.write_bytes(whole)
    shutil.copy(tar, folder / "stray.tar")
    assert "stray.tar" in refused(run)
    (folder / "stray.tar").unlink()
    said = manifest(run, "0")
    (folder / "manifest.json").write_text(json.dumps(said | {"fingerprint": "0123456789abcdef"}))
    assert "is of clustering 0123456789abcdef" in refused(run) and said["fingerprint"] in refused(run)
    (folder / "manifest.json").unlink()
    assert "manifest.json" in refused(run)


def test_verify_finds_a_single_flipped_bit(clustered, tmp_path):
    run = copy(clustered, tmp_path)
    tar = sorted((run / "shards" / "0").glob("*.tar"))[1]
    damaged = bytearray(tar.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    tar.write_bytes(damaged)
    assert tar.name in refused(run, "--verify") and "SHA-256" in refused(run, "--verify")
    command("train_expert.py", "--run-dir", run, "--shard", 1, "--verify", "--train.steps", 1)


def test_appended_tars_join_the_clusters_of_the_frozen_centroids_and_touch_no_shard(clustered, tars, more, tmp_path):
    run = copy(clustered, tmp_path)
    before, centroids = contents(run), load_file(run / "clusters.safetensors")
    command("cluster.py", "--data", more / "*.tar", "--run-dir", run, "--append", ranks=2)
    after, clusters = contents(run), load_file(run / "clusters.safetensors")
    assert all(after[path] == content for path, content in before.items()) and len(after) == len(before) + 2 * len(SHARDS)
    assert clusters["counts"].sum() == 300 and all((clusters[k] == centroids[k]).all() for k in centroids if k != "counts")
    assert ddm.run.read_clusters(run)["fingerprint"] == ddm.run.read_clusters(clustered)["fingerprint"]
    assert [sum(e["samples"] for e in manifest(run, shard)["tars"].values()) for shard in SHARDS] == [*clusters["counts"], 300]
    again = tmp_path / "again"      # a picture's cluster is the same whenever it comes: here all at once, assigned by the same centroids
    shutil.copytree(clustered, again)
    assert inside("cluster.py", "--data", more / "*.tar", "--run-dir", again, "--append", "--device", "cpu").returncode == 0
    assert contents(again) == after
    done = inside("cluster.py", "--data", tars / "*.tar", more / "*.tar", "--run-dir", run, "--append", "--device", "cpu")      # twice is once, with the old ones beside, too
    assert done.returncode == 0 and contents(run) == after and (load_file(run / "clusters.safetensors")["counts"] == clusters["counts"]).all()
    command("train_expert.py", "--run-dir", run, "--shard", 0, "--train.steps", 1, "--verify")


def test_the_router_s_subset_keeps_its_share_of_what_is_appended(tars, config, more, tmp_path):
    run = tmp_path / "run"
    command("cluster.py", "--data", tars / "*.tar", "--run-dir", run, "--config", config, "--cluster.router_images", 60)
    command("cluster.py", "--data", more / "*.tar", "--run-dir", run, "--append")
    router = TarDataset([str(path) for path in sorted((run / "shards" / "router").glob("*.tar"))], 8, "none", clusters=True)
    assert len(router) == 60 + 15


def test_an_append_that_does_not_fit_is_refused(clustered, tars, more, tmp_path):
    run = copy(clustered, tmp_path)
    before = contents(run)
    (more / "more-00000.tar").rename(more / "00000.tar")
    done = inside("cluster.py", "--data", more / "*.tar", "--run-dir", run, "--append")
    assert done.returncode == 2 and "is named like a tar that the partition has" in done.stderr
    done = inside("cluster.py", "--data", more / "*.tar", "--run-dir", tmp_path / "none", "--append")
    assert done.returncode == 2 and "leave --append out" in done.stderr
    done = inside("cluster.py", "--data", tars / "*.tar", more / "more*.tar", "--run-dir", run)
    assert done.returncode == 2 and "--append" in done.stderr
    assert contents(run) == before


def test_balance_caps_the_largest_share_at_the_least_added_distance():
    """By hand: fine clusters on a line; of those of the large coarse one, the smallest step to another with room is taken first."""
    clusters = {"fine_centroids": np.array([[0.0], [1.0], [4.0], [10.0]], np.float32), "coarse_centroids": np.array([[1.0], [9.0]], np.float32),
                "fine_to_coarse": np.array([0, 0, 0, 1])}
    words = cluster.balance(clusters, np.array([30, 30, 20, 20]), 0.6)
    assert clusters["fine_to_coarse"].tolist() == [0, 0, 1, 1] and "1 of 4 fine clusters moved, with 20.0% of the images" in words
    # before: (30 * 1 + 0 + 20 * 9 + 20 * 1) / 100; after: the third is 25 away from the other
    assert "grew from 2.30000 to 5.50000" in words
    with pytest.raises(UserError, match="cannot be reached"):
        cluster.balance(clusters | {"fine_to_coarse": np.array([0, 0, 0, 1])}, np.array([90, 4, 3, 3]), 0.6)


def test_a_balanced_run_holds_the_cap_and_needs_fine_assignment(tars, config, tmp_path):
    run = tmp_path / "run"
    done = command("cluster.py", "--data", tars / "*.tar", "--run-dir", run, "--config", config, "--cluster.assign", "fine", "--balance", "45%")
    counts = load_file(run / "clusters.safetensors")["counts"]
    assert counts.sum() == 240 and counts.max() <= 0.45 * 240 and "balance:" in done.stdout
    assert [sum(1 for path in (run / "shards" / str(k)).glob("*.tar") for _ in scan_tar(path)) for k in range(3)] == counts.tolist()
    done = inside("cluster.py", "--data", tars / "*.tar", "--run-dir", tmp_path / "other", "--config", config, "--balance", "0.45")
    assert done.returncode == 2 and "cluster.assign = fine" in done.stderr
    done = inside("cluster.py", "--data", tars / "*.tar", "--run-dir", tmp_path / "other", "--config", config, "--cluster.assign", "fine", "--balance", "0.2")
    assert done.returncode == 2 and "between 1 / 3" in done.stderr


def test_samples_that_cannot_be_used_are_listed_and_too_many_of_them_stop_the_clustering(tars, config, tmp_path):
    with TarWriter(str(tmp_path / "bad.tar")) as tar:
        for i in range(30):
            tar.add(f"{i:03d}.png", b"no picture")
            tar.add(f"{i:03d}.txt", b"a caption")
    flags = ["--data", tars / "*.tar", tmp_path / "bad.tar", "--run-dir", tmp_path / "run", "--config", config]
    done = inside("cluster.py", *flags, "--device", "cpu")
    assert done.returncode == 2 and "30 of 270 samples cannot be used" in done.stderr and not (tmp_path / "run" / "clusters.safetensors").exists()
    with open(tmp_path / "run" / "logs" / "cluster.skipped.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 30 and rows[0]["tar"] == "bad" and rows[0]["sample"] == "000" and rows[0]["cause"].startswith("undecodable")
    assert inside("cluster.py", *flags, "--max-bad", "20%", "--device", "cpu").returncode == 0


# ---- tars that change ---------------------------------------------------------------------------------------------

def stage_1(patterns, run, config, *flags):
    return inside("cluster.py", "--data", *patterns, "--run-dir", run, "--config", config, "--device", "cpu", *flags)


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


def keep_date(path, change):
    """Changes a file as cp -p or rsync -t would replace it: of the same date."""
    stat = os.stat(path)
    change()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert os.stat(path).st_size == stat.st_size


def features(run):
    return {path.name: path.stat().st_mtime_ns for path in run.glob("features/*.safetensors")}


@pytest.mark.parametrize("dated", [False, True])
def test_a_tar_repaired_after_a_failed_call_is_read_again(mine, config, tmp_path, dated):
    """The same members in another order, so of the same size; also of the same date."""
    whole, path, run = unpack(mine / "00000.tar"), mine / "00000.tar", tmp_path / "run"
    pack(path, whole[::2] + whole[1::2])
    done = stage_1([mine / "*.tar"], run, config)
    assert done.returncode == 2 and "tar --sort=name" in done.stderr and "00000.tar begins with" in done.stderr
    made = features(run)
    (keep_date if dated else lambda path, change: change())(path, lambda: pack(path, whole))
    done = stage_1([mine / "*.tar"], run, config)
    assert done.returncode == 0 and "\n240 images in 3 tars\n" in done.stdout, done.stdout + done.stderr
    assert [name for name, time in features(run).items() if time != made[name]] == ["00000.safetensors"]


@pytest.mark.parametrize("dated", [False, True])
def test_a_clustered_tar_that_has_changed_is_named(clustered, mine, config, tmp_path, dated):
    run, path = copy(clustered, tmp_path), mine / "00001.tar"
    change = lambda: pack(path, [(name, payload.replace(b"circle", b"square")) for name, payload in unpack(path)])
    (keep_date if dated else lambda path, change: change())(path, change)
    before = contents(run)
    for flags in ((), ("--append",)):
        done = stage_1([mine / "*.tar"], run, config, *flags)
        assert done.returncode == 2 and str(path) in done.stderr and "changed" in done.stderr and "--run-dir" in done.stderr
    # without manifests, as an interrupted call leaves it, and without features, which may be deleted
    for manifest in run.glob("shards/*/manifest.json"):
        manifest.unlink()
    assert str(path) in stage_1([mine / "*.tar"], run, config).stderr
    shutil.rmtree(run / "features")
    assert "other data" in stage_1([mine / "*.tar"], run, config).stderr
    assert contents(run) == before


def test_a_copy_of_the_data_is_the_same_data_and_read_once(clustered, mine, config, tmp_path, monkeypatch):
    run, read = copy(clustered, tmp_path), []
    for path in mine.glob("*.tar"):
        os.utime(path, ns=(1, 1))
    monkeypatch.setattr(data.hashlib, "file_digest", lambda f, name, real=data.hashlib.file_digest: read.append(f.name) or real(f, name))
    assert stage_1([mine / "*.tar"], run, config).returncode == 0 and len(read) == 3
    assert stage_1([mine / "*.tar"], run, config).returncode == 0 and len(read) == 3 and contents(run) == contents(clustered)


def test_what_a_failed_call_could_not_read_is_read_by_the_next(mine, config, tmp_path, monkeypatch):
    """The disk fails in the first call, and a picture's decoder is missing; the tars stay as they are."""
    run, real = tmp_path / "run", data.decode
    monkeypatch.setattr(data, "decode", lambda payload, least=0: (_ for _ in ()).throw(ddm.tars.BadSample("unreadable (OSError)")) if len(payload) % 2 else real(payload, least))
    done = stage_1([mine / "*.tar"], run, config)
    assert done.returncode == 2 and "unreadable (OSError)" in done.stderr and not (run / "config.toml").exists()
    monkeypatch.setattr(data, "decode", real)
    done = stage_1([mine / "*.tar"], run, config)
    assert done.returncode == 0 and "\n240 images in 3 tars\n" in done.stdout, done.stdout


def test_an_interrupted_append_of_a_tar_that_is_then_repaired_keeps_nothing_of_the_old(clustered, more, config, tmp_path):
    run, path = copy(clustered, tmp_path), more / "more-00000.tar"
    assert stage_1([more / "*.tar"], run, config, "--append").returncode == 0
    for manifest in run.glob("shards/*/manifest.json"):       # killed before they were written
        shutil.copy(clustered / manifest.relative_to(run), manifest)
    shutil.copy(clustered / "clusters.safetensors", run)
    pack(path, [(name, payload.replace(b"a ", b"A ") if name.endswith("txt") else payload) for name, payload in unpack(path)])
    assert stage_1([more / "*.tar"], run, config, "--append").returncode == 0
    texts = [payload for shard in "012" for name, payload in unpack(run / "shards" / shard / "more-00000.tar") if name.endswith("txt")]
    assert len(texts) == 40 and all(text.startswith(b"A ") for text in texts)


def test_bytes_are_copied_only_where_the_header_names_their_key(clustered, mine, tmp_path):
    run, path = copy(clustered, tmp_path), mine / "00000.tar"
    config = ddm.config.make_config(ddm.config.read_toml(run / "config.toml"))
    clusters, folders = load_file(run / "clusters.safetensors"), [str(tmp_path / shard) for shard in SHARDS]
    file, members = run / "features" / "00000.safetensors", unpack(path)
    pack(path, members[2:4] + members[:2] + members[4:])
    about = cluster.read_metadata(file)
    cluster.write_features(str(file), about | {"source": vars(ddm.tars.read_source(path))}, load_file(file))       # as if it were the same
    with pytest.raises(UserError, match="at byte 0 is 000000001") as error:
        cluster.partition(str(path), "00000", folders, [{"tars": {}}] * 4, str(file), clusters, np.arange(2), config)
    assert str(path) in str(error.value) and not list(tmp_path.glob("[0-2r]*/*.tar"))


def test_what_is_left_out_is_counted_in_the_line_of_images(mine, config, tmp_path):
    whole = unpack(mine / "00000.tar")
    pack(mine / "00000.tar", [("._" + name, b"fork") for name, _ in whole[:4]] + [member for name, payload in whole for member in
                             ([(name.replace("png", "webp"), payload), (name, payload)] if name.endswith("png") else [(name, payload)])])
    (mine / "00001.tar").rename(mine / "00001.tar.gz")
    (mine / "00002.tar").write_bytes((mine / "00002.tar").read_bytes()[:-700])
    for _ in range(2):      # the second call says it again
        done = stage_1([mine / "*"], tmp_path / "run", config, "--cluster.fine_clusters", 3)
        assert done.returncode == 0, done.stderr
        line = done.stdout.splitlines()[1]
        for words in ("139 images in 2 tars", "1 .tar.gz", "gunzip", "000000000.png is taken, not .webp", "all but one: 100", "begin with a dot", ": 4", "cut off"):
            assert words in line, line


@pytest.mark.parametrize("about", [{}, {"images": "many"}, {"source": {"bytes": 1}}, {"skipped": [["a"]]}, {"images": 7}, {"source": []}, {"left": []}])
def test_features_that_are_damaged_are_made_again(clustered, tars, config, tmp_path, about):
    run = copy(clustered, tmp_path)
    file = run / "features" / "00001.safetensors"
    made = file.read_bytes()
    cluster.write_features(str(file), cluster.read_metadata(file) | about if about else {}, load_file(file))
    assert stage_1([tars / "*.tar"], run, config).returncode == 0 and file.read_bytes() == made


def test_an_expert_can_be_replaced_by_another_of_the_same_clustering(trained, tmp_path):
    run = copy(trained, tmp_path)
    shutil.rmtree(run / "checkpoints" / "expert-1")
    os.remove(run / "experts" / "1.safetensors")
    command("train_expert.py", "--run-dir", run, "--shard", 1, "--train.seed", 7)
    done = inside("sample.py", "--run-dir", run, "--device", "cpu", "--prompt", "a red circle", "--require-all", "--out", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
