"""What is typed is what is meant: values of every type, names that people type, and where an error comes from."""

from dataclasses import dataclass

import pytest

import train
from configs import ROOT, CacheOptions, SampleConfig, TrainConfig, UserError, load_config, option, to_yaml
from sample import sample, sample_ddp
from tools import fidelity, report, sweep
from tools.demo import train_autoencoder

TYPED = [
    "001", "2024_01", "12:30", "on", "a #b", "!x", "*x", "&x", "~nobody/x", "Null", "~x", "1e3", "0x10", "010", "-",
    "yes", "a: b", "[a", "{a}", "'a'", '"a"', "a=b", " a", "%a", "@a", "2024-01-01", "${oc.env:HOME}", "${x",
    "a\\${x}", "null", ".5", "ünï", "True",
]  # fmt: skip


@dataclass(kw_only=True)
class Options:
    """An option of each type."""

    folder: str = option("results", "a path", path=True)
    file: str | None = option(None, "a path or none", path=True)
    word: str = option("a", "text")
    number: float = option(0.5, "a number")
    count: int = option(1, "a whole number")
    limit: int | None = option(None, "a whole number or none")
    switch: bool = option(False, "yes or no")
    names: list[str] = option(lambda: ["a"], "words")
    counts: list[int] | None = option(None, "whole numbers")
    cache: CacheOptions = option(CacheOptions, "a group")


def typed(*overrides: str) -> Options:
    return load_config(Options, None, overrides)


@pytest.mark.parametrize("text", TYPED)
def test_text_and_paths_are_what_was_typed(text, tmp_path, monkeypatch):
    """On the command line, and again from the YAML that a run records."""
    monkeypatch.chdir(tmp_path)
    cfg = typed(f"folder={text}", f"word={text}")
    assert (cfg.folder, cfg.word) == (str(tmp_path / text), text)
    (tmp_path / "run.yaml").write_text(to_yaml(cfg))
    assert load_config(Options, tmp_path / "run.yaml") == cfg
    assert load_config(SampleConfig, None, [f"save_video_path={text}"]).save_video_path == str(tmp_path / text)


def test_home_is_the_only_word_that_a_path_replaces(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (typed("folder=~").folder, typed("file=~/a").file) == (str(tmp_path), str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("count=010", 10), ("count=0100", 100), ("count=-07", -7), ("count=1e6", 1_000_000), ("count=1_000", 1000),
        ("number=010", 10.0), ("number=1e-4", 1e-4), ("number=.5", 0.5), ("number=2024_01", 202401.0),
        ("limit=null", None), ("limit=", None), ("limit=08", 8), ("file=null", None), ("file=", None), ("word=", ""),
        ("switch=on", True), ("switch=0", False), ("switch=No", False), ("switch=TRUE", True),
        ("names=[001,on,1e3,12:30]", ["001", "on", "1e3", "12:30"]), ("names=a, b", ["a", "b"]), ("names=on", ["on"]),
        ("names=['N2', 'a, b']", ["N2", "a, b"]), ("counts=[08,010]", [8, 10]), ("counts=5", [5]), ("counts=", None),
        ("cache={interval: 02, depth: 3}", CacheOptions(interval=2, depth=3)), ("count=12.0", 12),
    ],
)  # fmt: skip
def test_the_type_of_the_option_decides(pair, value):
    """Never a guess of YAML's: neither octal nor sexagesimal numbers, no word that becomes a truth value."""
    assert getattr(typed(pair), pair.partition("=")[0]) == value


def test_a_yaml_file_is_read_like_the_command_line(tmp_path, monkeypatch):
    """Its interpolations are resolved; those typed on the command line are names."""
    monkeypatch.setenv("PLACE", "/data/12:30")
    path = tmp_path / "options.yaml"
    path.write_text("folder: 001\nword: on\ncount: 010\nnames: [no, 2024_01]\nfile: ${oc.env:PLACE}\ncounts: [010]\n")
    cfg = load_config(Options, path)
    assert (cfg.folder, cfg.file, cfg.word, cfg.count) == (str(ROOT / "001"), "/data/12:30", "on", 10)
    assert (cfg.names, cfg.counts) == (["no", "2024_01"], [10])
    path.write_text("count: 1\ncount: 2\n")
    with pytest.raises(UserError, match=r"options.yaml is not valid YAML: the key count is there twice"):
        load_config(Options, path)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("count=many", "count: 'many' is not a number"),
        ("count=1.5", "count: '1.5' is not a whole number"),
        ("count=0x10", "count: '0x10' is not a number"),
        ("count=null", "count: 'null' is not a number"),
        ("count=", "count: '' is not a number"),
        ("count=99999999999999999999", "count: 99999999999999999999 does not fit into 64 bits"),
        ("number=four", "number: 'four' is not a number"),
        ("number=nan", "number: nan is not a finite number"),
        ("number=-inf", "number: -inf is not a finite number"),
        ("switch=maybe", "switch: 'maybe' is neither True nor False"),
        ("counts=[1,x]", "counts: 'x' is not a number"),
        ("names=[]", "names: the list is empty"),
        ("folder=", "folder: the path is empty"),
        ("count.x=1", "count: {'x': '1'} is a list or a group of values, but the option takes one value"),
        ("cache=N2", "cache: N2 is no value; give cache.interval, cache.start, "),
        ("cache.x=2", "unknown key cache.x; valid: depth, "),
    ],
)
def test_a_wrong_value_names_the_option_and_where_it_stands(pair, message, tmp_path):
    """The same line for the command line and for a file, and the true one of the two."""
    with pytest.raises(UserError) as error:
        typed(pair)
    assert str(error.value).startswith(f"command line: {message}") and "\n" not in str(error.value)
    key, _, value = pair.partition("=")
    path = tmp_path / "options.yaml"
    path.write_text(f"word: a\n{key}: {value!r}\n" if "[" not in value else f"{key}: {value}\n")
    with pytest.raises(UserError) as error:
        load_config(Options, path, ["number=3"])
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_list_that_does_not_end_is_one_line():
    with pytest.raises(UserError, match=r"^command line: names: while parsing a flow sequence[^\n]*$"):
        typed("names=[a")


def test_the_last_of_two_values_wins_wherever_it_stands():
    """Flags, pairs and other names of one option."""

    def seed(*argv: str) -> int:
        args = sample.parser.parse_args([*argv, "--classes", "0"])
        return load_config(SampleConfig, args.config, args.overrides).seed

    assert seed("--seed", "1", "seed=2") == 2 and seed("seed=2", "--seed", "1") == 1
    assert sample.parser.parse_args(["--classes", "0", "seed=2", "--seed=1"]).overrides == ["seed=2", "seed=1"]
    cfg = load_config(TrainConfig, None, ["global_seed=1", "seed=2", "lr_schedule=cosine", "lr_schedule=wsd"])
    assert (cfg.global_seed, cfg.lr_schedule) == (2, "wsd")
    assert load_config(TrainConfig, None, ["seed=2", "global_seed=1"]).global_seed == 1


ONE_WORD = [
    (sample, "output=out", "save_video_path", "out"),
    (sample_ddp, "output=out", "save_video_path", "out"),
    (sample_ddp, "num_clips=7", "num_fvd_samples", 7),
    (sample_ddp, "--num-clips=7", "num_fvd_samples", 7),
    (sample_ddp, "deepcache=3", "cache", CacheOptions(interval=3)),
    (train, "seed=7", "global_seed", 7),
    (train, "output=out", "results_dir", "out"),
    (fidelity, "seed=7", "seed", 7),
    (fidelity, "output=out", "output", "out"),
    (sweep, "num_clips=7", "num_clips", 7),
    (train_autoencoder, "output=out", "output", "out"),
    (train_autoencoder, "output_dir=out", "output", "out"),
    (report, "output=out", "output", "out"),
]


@pytest.mark.parametrize(("program", "pair", "key", "value"), ONE_WORD)
def test_one_word_for_one_thing_in_all_programs(program, pair, key, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(program.parser.schema, None, program.parser.parse_args([pair]).overrides)
    assert getattr(cfg, key) == (str(tmp_path / value) if isinstance(value, str) else value)


HINTS = [
    (train, ["batch_size=4"], "did you mean local_batch_size, as in local_batch_size=4?"),
    (sample, ["batch_size=4"], "did you mean per_proc_batch_size, as in per_proc_batch_size=4?"),
    (train, ["lr=1e-4"], "did you mean learning_rate, as in learning_rate=1e-4?"),
    (train, ["--lr", "1e-4"], "did you mean learning_rate, as in learning_rate=1e-4?"),
    (train, ["--resume"], "did you mean resume_from_checkpoint, as in resume_from_checkpoint=auto?"),
    (train, ["resume=True"], "did you mean resume_from_checkpoint, as in resume_from_checkpoint=auto?"),
    (train, ["epochs=10"], "did you mean max_train_steps, as in max_train_steps=20000?"),
    (train, ["stride=8"], "did you mean frame_interval, as in frame_interval=3?"),
    (train, ["steps=10"], "did you mean num_sampling_steps"),
    (train, ["gpus=2"], "torchrun --standalone --nproc_per_node=2 PROGRAM starts a process on each GPU"),
    (train, ["workers=2"], "did you mean num_workers, as in num_workers=4?"),
    (train, ["precision=bf16"], "did you mean mixed_precision, as in mixed_precision=bf16?"),
    (train, ["ckpt=a.pt"], "did you mean pretrained, as in pretrained=weights.pt?"),
    (train, ["configs/demo/demo_train.yaml"], "a YAML file is given as --config configs/demo/demo_train.yaml"),
    (train, ["cache=N2"], "cache: N2 is no value; give cache.interval, "),
    (train, ["--cache", "N2"], "as in cache.interval=2"),
    (sample, ["guidance=4"], "did you mean cfg_scale, as in cfg_scale=7?"),
    (sample, ["steps=20"], "did you mean num_sampling_steps, as in num_sampling_steps=50?"),
    (sample, ["prompt=cup"], "the model reads no text"),
    (sample, ["--prompt", "a cup"], "classes come from --classes Cup 3"),
    (sample, ["checkpoint=a.pt"], "did you mean ckpt, as in ckpt=weights.pt?"),
    (sample, ["--seed", "1", "2", "3"], "2: expected key=value; clip i has seed + i, so one seed is enough"),
    (sample, ["seeds=[1,2]"], "so seed=1 is enough for several clips"),
    (sample, ["device=cuda"], "CUDA_VISIBLE_DEVICES chooses it"),
    (sample, ["--cache", "N2", "cache.depth=2"], "--cache and cache.depth=2 both set cache: leave one out"),
    (sample_ddp, ["num_samples=4"], "did you mean num_fvd_samples"),
    (sweep, ["--cash", "N2"], "did you mean --cache?"),
    (sample, ["qqqqq=1"], "unknown key qqqqq; --help lists the options"),
]


@pytest.mark.parametrize(("program", "argv", "message"), HINTS)
def test_what_people_type_is_answered_with_the_right_option_and_an_example(program, argv, message, tmp_path):
    with pytest.raises(UserError) as error:
        args = program.parser.parse_args(argv)
        load_config(program.parser.schema, None, args.overrides)
    assert message in str(error.value) and "\n" not in str(error.value)
