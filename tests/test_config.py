"""The config and the command line: what a key may be, the line of each mistake, torchrun."""
import argparse
import copy
import importlib
import os
import pickle
import tomllib
from types import SimpleNamespace

import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser

from ddm import config
from ddm.config import make_config, make_parser, parse, read_toml
from ddm.errors import UserError

# Each has a function parser(). One that has none yet is skipped.
SCRIPTS = ["cluster", "cache_latents", "train_expert", "train_router", "sample", "evaluate",
           "distill"]


def refusal(function, *args):
    """The one line of the UserError that function(*args) raises."""
    with pytest.raises(UserError) as error:
        function(*args)
    text = str(error.value)
    assert "\n" not in text
    return text


def given(*argv, short_table=""):
    return parse(make_parser("", short_table), [str(word) for word in argv])[1]


def script_parser(name):
    path = os.path.join(ROOT, f"{name}.py")
    if not os.path.exists(path):
        pytest.skip(f"there is no {name}.py yet")
    with open(path, encoding="utf-8") as f:
        if "\ndef parser():" not in f.read():
            pytest.skip(f"{name}.py has no parser() yet")
    return importlib.import_module(name).parser()


# ---- config.toml ---------------------------------------------------------------------------------

MISTAKES = [
    ("[train]\nstep = 5", ["unknown key train.step", "did you mean train.steps?"]),
    ("[trian]\nsteps = 5", ["unknown table [trian]", "did you mean train?"]),
    ("[student]\nsteps = 5", ["unknown table [student]", "did you mean train.student?"]),
    ("[train.router]\nstepz = 5", ["unknown key train.router.stepz", "train.router.steps"]),
    ("[train.router.x]\nsteps = 5", ["unknown table [train.router.x]"]),
    ("steps = 5", ["unknown key steps", "did you mean train.steps?"]),
    ("data = 5", ["unknown key data"]),
    ("[train]\nsteps = 'many'", ["train.steps = 'many' is not a whole number"]),
    ("[train]\nsteps = '64'", ["train.steps = '64' is not a whole number"]),
    ("[train]\nsteps = 1.5", ["train.steps = 1.5 is not a whole number"]),
    ("[train]\nsteps = true", ["train.steps = True is not a whole number"]),
    ("[train]\nlr = true", ["train.lr = True is not a number"]),
    ("[train]\nlr = '1%'", ["train.lr = '1%' is not a number"]),
    ("[data]\nflip = 1", ["data.flip = 1 is not true or false"]),
    ("[text]\nname = 1", ["text.name = 1 is not a string"]),
    ("[data]\ncondition = 'txt'", ["data.condition = 'txt' is not one of 'none', 'class', 'text'"]),
    ("[features]\npool = 'mean'", ["features.pool = 'mean' is not one of 'cls', 'cls+mean'"]),
    ("[features]\npool = ['cls']", ["features.pool = ['cls'] is not one of 'cls', 'cls+mean'"]),
    ("[train]\nlog_every = 0", ["train.log_every = 0 must be a number of at least 1"]),
    ("[train.router]\nbatch = 0", ["train.router.batch = 0 must be a number of at least 1"]),
    ("[train]\nlr = nan", ["train.lr = nan must be a number of at least 0"]),
    ("[train]\nlr = inf", ["train.lr = inf must be a number of at least 0"]),
    ("[train]\nlr = 1" + "0" * 400, ["train.lr = 1", "is not a number"]),
    ("[train]\nlr = 0x1" + "0" * 5000, ["train.lr = a number of thousands of digits"]),
    ("[data]\nworkers = -2", ["data.workers = -2 must be a number of at least -1"]),
    ("[text]\nvocab = 1", ["text.vocab = 1 must be a number of at least 2"]),
    ("[data]\ncond_dropout = 1.5", ["data.cond_dropout = 1.5 is a share, which is at most 1"]),
    ("[train\n", ["cannot read config", "x.toml"]),
    ("[" * 5000, ["cannot read config", "x.toml"]),
]


@pytest.mark.parametrize("text, says", MISTAKES)
def test_a_mistake_in_a_file_is_one_line(tmp_path, text, says):
    path = tmp_path / "x.toml"
    path.write_text(text)
    line = refusal(read_toml, path)
    for words in says:
        assert words in line


def test_a_whole_number_may_be_a_float(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("[train]\nlr = 1\n[train.router]\nlr = 2\n")
    values = read_toml(path)
    assert values == {"train.lr": 1.0, "train.router.lr": 2.0}
    assert {type(value) for value in values.values()} == {float}


def test_a_config_survives_writing_and_reading(tmp_path):
    path = tmp_path / "c.toml"
    made = make_config({
        "train.lr": 3e-5,
        "data.flip": False,
        "text.name": "é \"quoted\" \\ C:\\x\nline",
        "train.router.steps": 7,
        "train.student.lr": 1,
        "sample.strategy": "top-2",
    })
    config.write_toml(made, path)
    again = make_config(read_toml(path))
    assert again == made and config.flat(again) == config.flat(made)

    # of the stages' tables what is set, and what differs unasked
    train = tomllib.loads(path.read_text(encoding="utf-8"))["train"]
    assert train["router"] == {"steps": 7}
    assert train["student"] == {"batch": 0, "micro_batch": 0, "lr": 1.0}


def test_later_layers_go_over_earlier_ones():
    made = make_config({"data.size": 16, "train.lr": 0.5}, {}, {"data.size": 64})
    assert (made.data.size, made.train.lr, made.data.flip) == (64, 0.5, True)
    assert "is not one of" in refusal(make_config, {"data.crop": "left"})


def test_a_stage_is_train_with_its_own_table_over_it():
    made = make_config({"train.lr": 0.5, "train.steps": 9, "train.batch": 64,
                        "train.router.decay": 3})
    router = made.stage("router")
    student = made.stage("student")
    assert isinstance(router, config.Training) and isinstance(student, config.Training)
    # experts alone begin with a seed
    assert not hasattr(router, "seed_steps") and not hasattr(student, "seed_steps")
    assert (router.lr, router.steps, router.batch, router.decay) == (0.5, 0, 64, 3)
    assert (student.lr, student.steps, student.batch, student.micro_batch) == (0.5, 9, 0, 0)
    assert made.train.decay == 0

    # a value that is assigned to [train] counts, too
    made.train.lr = 0.25
    assert made.stage("router").lr == 0.25


def test_a_config_is_copied_sent_and_assigned_to():
    made = make_config({"train.router.lr": 0.5})
    assert pickle.loads(pickle.dumps(made)) == made == copy.deepcopy(made)
    made.sample.strategy = "full"
    assert made.sample.strategy == "full" and make_config().sample.strategy == "top-1"
    with pytest.raises(ValueError):
        made.sample.strateg = "full"


def test_differences_are_named():
    old = {"data.size": 32, "train.lr": 1e-4, "text.name": "words"}
    new = {"data.size": 64, "train.lr": 1e-4, "text.length": 4}
    said = "data.size 32 / 64, text.length missing / 4, text.name 'words' / missing"
    assert config.differences(old, new) == said


def test_flags_go_over_the_run_of_a_stage(tmp_path):
    made = make_config({"train.lr": 0.5, "train.router.lr": 0.25})
    config.write_toml(made, tmp_path / "config.toml")
    flags = {"train.lr": 0.125, "train.student.decay": 5, "data.size": 64}

    expert = config.load_run(str(tmp_path), flags)
    assert expert.train.lr == 0.125 and expert.stage("router").lr == 0.25
    router = config.load_run(str(tmp_path), flags, "router")
    assert router.train.lr == 0.5 and router.stage("router").lr == 0.125
    assert router.data.size == 64 and router.stage("student").decay == 5

    # a file in the run's place
    (tmp_path / "other.toml").write_text("[train]\nsteps = 7\n")
    other = config.load_run("nowhere", flags, "router", path=str(tmp_path / "other.toml"))
    assert other.train.steps == 7 and other.stage("router").lr == 0.125
    assert "make it with cluster.py --run-dir nowhere" in refusal(config.load_run, "nowhere", {})


@pytest.mark.parametrize("name", ["imagenet", "laion", "laion-3b"])
def test_configs_name_only_what_differs(name):
    values = read_toml(os.path.join(ROOT, "configs", f"{name}.toml"))
    defaults = config.flat(make_config())
    assert [key for key, value in values.items() if value == defaults.get(key)] == []
    # the paper's experiments can be built: latents of 32 x 32 x 4, and some token features
    space = SimpleNamespace(size=32, channels=4, text_dim=2048)
    config.check_config(make_config(values), space)


# ---- the command line ----------------------------------------------------------------------------

def test_any_key_is_a_flag():
    words = []
    for name, value in config.flat(make_config()).items():
        words += [f"--{name}", str(value)]
    assert given(*words) == config.flat(make_config())
    assert given("--train.router.lr=2e-4", "--data.workers", -1) == {"train.router.lr": 2e-4,
                                                                     "data.workers": -1}


def test_a_switch_may_stand_alone_and_a_number_be_a_percentage():
    assert given("--sample.compile", "--data.flip=false") == {"sample.compile": True,
                                                              "data.flip": False}
    assert given("--data.max_bad", "1%", "--cluster.balance=20%") == {"data.max_bad": 0.01,
                                                                      "cluster.balance": 0.2}


def test_short_flags_and_own_flags_set_keys():
    parser = make_parser("", "sample")
    parser.add_argument("--experts", dest="cluster.experts")
    parser.add_argument("--max-bad", dest="data.max_bad")
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--text.name", help="shown")
    args, values = parse(parser, ["--data", "a", "b", "--route-every", "2", "--max-bad", "1%",
                                  "--steps=8", "--text.name", "clip"])
    assert values == {"sample.route_every": 2, "data.max_bad": 0.01, "sample.steps": 8,
                      "text.name": "clip"}
    # and no key is left among the script's own
    assert vars(args) == {"run_dir": "runs/ddm", "device": "", "data": ["a", "b"]}
    assert "shown" in parser.format_help()


@pytest.mark.parametrize("argv, says", [
    (["--train.stps", 5], ["unknown argument --train.stps", "did you mean --train.steps?"]),
    (["--train.save-every=5"], ["--train.save-every;", "did you mean --train.save_every?"]),
    (["--lr", 5], ["unknown argument --lr", "did you mean --train.lr?"]),
    (["--batch", 5], ["unknown argument --batch", "did you mean --train.batch?"]),
    (["--run", "x"], ["unknown argument --run", "did you mean --run-dir?"]),
    (["--expert", 5], ["unknown argument --expert", "did you mean --experts?"]),
    (["--strategy", "full"], ["unknown argument --strategy", "did you mean --sample.strategy?"]),
    (["5"], ["unknown argument 5"]),
    (["--zzzz"], ["unknown argument --zzzz"]),
    (["--train.lr"], ["--train.lr", "expected one argument"]),
    (["--train.lr", "fast"], ["train.lr = 'fast' is not a number"]),
    (["--train.lr", "x%"], ["train.lr = 'x%' is not a number"]),
    (["--train.lr", "nan"], ["train.lr = nan must be a number of at least 0"]),
    (["--train.steps", "1e3"], ["train.steps = '1e3' is not a whole number"]),
    (["--train.steps", 0], ["train.steps = 0 must be a number of at least 1"]),
    (["--experts", 0], ["cluster.experts = 0 must be a number of at least 1"]),
    (["--data.flip", "no"], ["data.flip = 'no' is not true or false"]),
    (["--data.max_bad", "200%"], ["data.max_bad = 2.0 is a share, which is at most 1"]),
    (["--data.crop", "left"], ["data.crop = 'left' is not one of 'center', 'random'"]),
])
def test_a_mistake_in_a_flag_is_one_line(argv, says):
    parser = make_parser("")
    parser.add_argument("--experts", dest="cluster.experts")
    line = refusal(parse, parser, [str(word) for word in argv])
    for words in says:
        assert words in line


def shown_actions(parser):
    return [action for action in parser._actions if action.help != argparse.SUPPRESS]


def test_help_shows_no_keys_and_says_where_they_are():
    parser = make_parser("what the script does\n\n    with its commands", "sample")
    text = parser.format_help()
    assert "with its commands" in text
    assert "any key of the config is --table.key VALUE: docs/config.md" in text
    assert "--train.lr" not in text and "--route-every" in text
    assert len(shown_actions(parser)) == 3


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_of_a_script_is_short(name):
    parser = script_parser(name)
    # --help itself is no flag of ours
    assert len(shown_actions(parser)) <= 15 + 1
    assert f"{name}.py" in parser.description and "docs/config.md" in parser.format_help()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_hides_no_key_behind_a_flag_of_its_own(name):
    parser = script_parser(name)
    for key in config.flat(make_config()):
        assert parser._option_string_actions[f"--{key}"].dest == key


def all_options(parser):
    return sorted(parser._option_string_actions)


def assert_torchrun_leaves_alone(options, script):
    """torchrun hands each of the options on to the script and takes it for none of its own."""
    torchrun = get_args_parser()
    for option in options:
        line = ["--nproc_per_node=2", script, option, "X"]
        try:
            args = torchrun.parse_args(line)
        except SystemExit:
            pytest.fail(f"torchrun takes {option} for a flag of its own")
        assert args.nproc_per_node == "2" and args.training_script == script
        assert args.training_script_args == [option, "X"]

        # whatever the version of argparse does with an abbreviation
        if option.startswith("--") and option != "--help":
            longer = [own for own in all_options(torchrun) if own.startswith(option)]
            assert longer == []


def test_torchrun_leaves_every_key_alone():
    assert_torchrun_leaves_alone(all_options(make_parser("")), "train_expert.py")
    with pytest.raises(pytest.fail.Exception):
        assert_torchrun_leaves_alone(["--run"], "train_expert.py")


@pytest.mark.parametrize("name", SCRIPTS)
def test_torchrun_leaves_a_scripts_flags_alone(name):
    assert_torchrun_leaves_alone(all_options(script_parser(name)), f"{name}.py")


# ---- what a config means together ----------------------------------------------------------------

PIXELS = SimpleNamespace(size=32, channels=3, text_dim=0)


def test_a_model_config_is_the_preset_with_the_keys_over_it():
    made = make_config({"model.preset": "tiny/2", "model.depth": 3, "text.length": 5})
    shape = config.model_config(made, "model", PIXELS)
    assert (shape.size, shape.channels, shape.patch, shape.depth) == (32, 3, 2, 3)
    assert (shape.condition, shape.vocab, shape.length, shape.clusters) == ("text", 16384, 5, 0)

    # a text encoder's features come in, words do not
    encoded = SimpleNamespace(size=32, channels=4, text_dim=768)
    shape = config.model_config(made, "router", encoded, clusters=8)
    assert (shape.text_dim, shape.vocab, shape.clusters, shape.patch) == (768, 0, 8, 4)

    made = make_config({"data.condition": "class", "data.classes": 10})
    assert config.model_config(made, "model", PIXELS).classes == 10


@pytest.mark.parametrize("values, says", [
    ({"train.batch": 25, "cluster.experts": 3}, ["train.batch = 25", "cluster.experts = 3"]),
    ({"model.preset": "DiT-M/2"}, ["model.preset = 'DiT-M/2' is not one of", "DiT-B/2"]),
    ({"model.preset": "", "model.dim": 64}, ["needs model.depth, model.heads, model.patch, too"]),
    ({"model.patch": 3}, ["size 32 is not a multiple of the patch 3"]),
    ({"router.preset": "MMDiT-tiny/2"}, ["an MMDiT is a denoiser"]),
    ({"train.student.micro_batch": 5}, ["batch of 64", "train.student.micro_batch = 5"]),
    ({"train.student.batch": 12, "train.student.micro_batch": 5}, ["the student's batch of 12"]),
    ({"sample.strategy": "best"}, ["strategy 'best' is not one of"]),
    ({"sample.strategy": "top-9"}, ["'top-9': there are cluster.experts = 8 experts", "at most 8"]),
    ({"sample.strategy": "oracle-8"}, ["the number is at most 7"]),
    ({"sample.cfg_low": 0.9, "sample.cfg_high": 0.1}, ["cfg_low 0.9", "cfg_high 0.1"]),
    ({"sample.cfg_high": 5}, ["cfg_high 5.0", "<= 1"]),
    ({"sample.route_epsilon": 1}, ["route_epsilon 1.0 must be less than 1"]),
])
def test_a_config_that_a_later_stage_would_refuse(values, says):
    line = refusal(config.check_config, make_config(values), PIXELS)
    for words in says:
        assert words in line


def test_the_defaults_fit_together():
    config.check_config(make_config(), PIXELS)


# ---- docs/config.md ------------------------------------------------------------------------------

def test_the_reference_is_of_this_code():
    with open(os.path.join(ROOT, "docs", "config.md"), encoding="utf-8") as f:
        assert f.read() == config.reference(), "python -m ddm.config > docs/config.md"


def test_every_key_and_table_has_a_meaning():
    for table, table_class in config.TABLES.items():
        assert table_class.__doc__
        for key, field in table_class.model_fields.items():
            assert field.description, f"{table}.{key}"
        # the defaults themselves are not checked by pydantic
        for key in config.own_keys(table):
            config.check(f"{table}.{key}", table_class.model_fields[key].default)
