"""README and docs/: links lead somewhere, commands exist, the exercises' diffs apply and train."""
import glob
import os
import re
import subprocess

import pytest
from conftest import ENVIRONMENT, ROOT, command, copy

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(glob.glob("docs/*.md", root_dir=ROOT))]


def read(page):
    with open(os.path.join(ROOT, page), encoding="utf-8") as f:
        return f.read()


def headings(page):
    """The anchors of a page's headings, as GitHub makes them."""
    anchors = []
    for heading in re.findall(r"^#+ (.+)$", read(page), flags=re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        anchors.append(kept.strip().replace(" ", "-"))
    return anchors


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page
        if path:
            target = os.path.normpath(os.path.join(os.path.dirname(page), path))
        assert os.path.exists(os.path.join(ROOT, target)), link
        if anchor:
            assert anchor in headings(target), link


@pytest.mark.parametrize("page", PAGES)
def test_scripts_that_are_named_exist(page):
    called = r"(?:python|torchrun --[^\n`]*?|bash) ((?:[\w./-]+/)?\w+\.(?:py|sh))\b"
    for script in re.findall(called, read(page)):
        assert os.path.exists(os.path.join(ROOT, script)), script


def test_the_readme_is_a_landing_page():
    assert len(read("README.md").splitlines()) <= 150


def exercises():
    return re.findall(r"```diff\n(.*?)```", read("docs/hacking.md"), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(3))
def test_an_exercise_applies_to_one_script_and_trains(clustered, tmp_path, number):
    diff = exercises()[number]
    assert re.findall(r"^\+\+\+ b/(\S+)$", diff, flags=re.MULTILINE) == ["train_expert.py"]
    fork = tmp_path / "fork"
    os.mkdir(fork)
    for name in ("ddm", "model.py", "flow.py", "data.py"):
        os.symlink(os.path.join(ROOT, name), fork / name)
    (fork / "train_expert.py").write_text(read("train_expert.py"))
    subprocess.run(["git", "apply"], cwd=fork, input=diff, text=True, check=True, env=ENVIRONMENT)

    run = copy(clustered, tmp_path)
    command(fork / "train_expert.py", "--run-dir", run, "--shard", 0, "--train.steps", 2)
    # resumed, whatever the optimiser's state is
    done = command(fork / "train_expert.py", "--run-dir", run, "--shard", 0, "--train.steps", 4)
    assert "resumed at step 2" in done.stdout
    header, *rows = (run / "logs" / "expert-0.csv").read_text().splitlines()
    assert len(rows) == 2 and ("contrast" in header) == (number == 1)


@pytest.mark.parametrize("page", PAGES)
def test_no_figure_is_left_to_be_filled_in(page):
    assert "FIGURE-" not in read(page) and "EXERCISE-" not in read(page)
