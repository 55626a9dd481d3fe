"""The configuration: every wrong key is named in one line, every default stands in its field alone."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from ssfl_app.config import (
    BUILTIN,
    complete,
    defaults,
    first_clash,
    merge,
    parse,
    read_file,
    read_overrides,
    table,
    write_toml,
)
from ssfl_app.files import app_folder
from ssfl_app.options import ConfigError, above, anything, at_least, build, fraction, keys_of, option
from ssfl_app.strategies import REGISTRY


@dataclasses.dataclass(frozen=True)
class Section:
    how_many: int = at_least(1)
    share: float = fraction()
    rate: float = above(0)
    kind: str = option("one of red, green", lambda value: value in ("red", "green"))
    on: bool = anything("true or false")
    even: int = option("an even number", lambda value: value % 2 == 0)


GOOD = {"how-many": 3, "share": 0.5, "rate": 0.1, "kind": "red", "on": True, "even": 4}


def test_a_section_is_built_of_its_keys():
    assert build(Section, "zoo", GOOD) == Section(3, 0.5, 0.1, "red", True, 4)


def test_a_whole_number_is_taken_for_a_float_and_becomes_one():
    made = build(Section, "zoo", GOOD | {"how-many": 1, "share": 1, "rate": 2})  # the limits are allowed
    assert (made.how_many, made.share, made.rate) == (1, 1.0, 2.0)
    assert type(made.share) is type(made.rate) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "zoo.colour is not a key; zoo has how-many, share, rate, kind, on, even"),
        ({"how_many": 1}, "zoo.how_many is not a key; did you mean zoo.how-many?"),
        ({"share": None}, "zoo.share is missing; it is a fraction in (0, 1]"),
        ({"how-many": 0}, "zoo.how-many is 0; it is a number of at least 1"),
        ({"how-many": 3.0}, "zoo.how-many is 3.0; it is a number of at least 1 (int, not float)"),
        ({"how-many": True}, "zoo.how-many is True; it is a number of at least 1 (int, not bool)"),
        ({"how-many": "3"}, "zoo.how-many is '3'; it is a number of at least 1 (int, not str)"),
        ({"share": 0}, "zoo.share is 0.0; it is a fraction in (0, 1]"),
        ({"share": 1.01}, "zoo.share is 1.01; it is a fraction in (0, 1]"),
        ({"share": float("nan")}, "zoo.share is nan; it is a fraction in (0, 1]"),
        ({"share": True}, "zoo.share is True; it is a fraction in (0, 1] (float, not bool)"),
        ({"share": "0.5"}, "zoo.share is '0.5'; it is a fraction in (0, 1] (float, not str)"),
        ({"rate": 0.0}, "zoo.rate is 0.0; it is a number above 0"),
        ({"rate": [0.1]}, "zoo.rate is [0.1]; it is a number above 0 (float, not list)"),
        ({"kind": "blue"}, "zoo.kind is 'blue'; it is one of red, green"),
        ({"kind": 1}, "zoo.kind is 1; it is one of red, green (str, not int)"),
        ({"on": 1}, "zoo.on is 1; it is true or false (bool, not int)"),
        ({"even": 5}, "zoo.even is 5; it is an even number"),
    ],
)
def test_what_is_wrong_with_a_key_is_said_in_one_line(change, message):
    values = {key: value for key, value in (GOOD | change).items() if value is not None}
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        build(Section, "zoo", values)


def test_the_top_level_has_no_name():
    with pytest.raises(ConfigError, match=re.escape("colour is not a key; the top level has how-many, share")):
        build(Section, "", GOOD | {"colour": 1})


def test_a_whole_number_too_large_for_a_float_is_refused():
    with pytest.raises(ConfigError, match=r"zoo\.rate is"):
        build(Section, "zoo", GOOD | {"rate": 10**400})


def test_the_defaults_are_a_configuration() -> None:
    config = parse(defaults())
    assert config.strategy == "ssfl"
    assert config.settings.mask.density == 0.1
    assert config.settings.local.weight_decay == 5e-4
    assert config.partition.alpha == 0.3
    assert config.flat == defaults()
    assert config.settings.sections["ssfl"].saliency_batch_size == 64


def test_only_the_sections_of_the_chosen_strategy_are_parsed() -> None:
    bad = {"topk.of": "nonsense"}
    assert set(parse(bad).settings.sections) == {"ssfl"}
    with pytest.raises(ConfigError, match=r"topk\.of is 'nonsense'; it is one of weights, update"):
        parse(bad | {"strategy": "topk"})


def test_a_strategy_says_which_sections_its_two_halves_read() -> None:
    read = {name: list(strategy.sections()) for name, strategy in REGISTRY.items()}
    assert read["fedavg"] == read["random"] == []
    assert read["ssfl"] == read["shuffled"] == ["ssfl"]
    assert read["dpsgd-ft"] == ["gossip", "finetune"]
    assert read["dispfl"] == ["dispfl", "gossip"]
    assert read["prunefl"] == ["prunefl", "ssfl"]
    assert read["local-saliency"] == ["local-mask", "ssfl"]
    assert read["ditto"] == ["ditto"]  # the client alone reads it


@pytest.mark.parametrize("strategy", REGISTRY)
def test_every_strategy_runs_on_the_defaults(strategy):
    assert parse(defaults() | {"strategy": strategy}).strategy == strategy


def test_the_table_of_pyproject_is_made_of_the_fields() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert table() in text, "ssfl keys --toml"
    assert (app_folder() / "pyproject.toml").samefile(Path(__file__).parents[1] / "pyproject.toml")


def test_every_key_has_a_default_and_a_meaning() -> None:
    for name, section in BUILTIN.items():
        for key, spec in keys_of(section, name):
            assert spec.default is not dataclasses.MISSING, key
            assert spec.metadata["about"], key
            assert spec.metadata["allowed"], key


@pytest.mark.parametrize("key", ["strategy", "run.seed", "ssfl.saliency-share", "engine.actors"])
def test_a_missing_key_takes_its_default(key: str) -> None:
    flat = defaults()
    del flat[key]
    assert parse(flat).flat == complete(flat) == defaults()
    assert first_clash(defaults(), flat) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "sfl"}, "strategy is 'sfl'; it is one of " + ", ".join(REGISTRY)),
        ({"strategy": 1}, "strategy is 1; it is one of " + ", ".join(REGISTRY)),
        ({"maks.density": 0.1}, "maks.density is not a key; did you mean mask.density?"),
        ({"density": 0.1}, "density is not a key; did you mean mask.density?"),
        ({"colour.red": 0.1}, "colour.red is not a key; keys are strategy and those of run, mask"),
        ({"strategy.name": "ssfl"}, "strategy.name is not a key"),
        ({"mask.desnity": 0.1}, "mask.desnity is not a key; did you mean mask.density?"),
        ({"mask.density": 1.7}, "mask.density is 1.7; it is a fraction in (0, 1]"),
        ({"run.clients": 5, "run.cohort": 6}, "run.cohort is 6; it is at most run.clients, 5"),
        ({"wire.up-values": "fp8"}, "wire.up-values is 'fp8'; it is one of fp32, fp16, bf16, int8"),
    ],
)
def test_what_cannot_be_run_is_refused(change, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        parse(defaults() | change)


@pytest.mark.parametrize("value", [["ssfl"], {"name": "ssfl"}])
def test_a_strategy_that_is_no_scalar_is_refused(value):
    with pytest.raises(ConfigError, match="strategy is"):
        parse(defaults() | {"strategy": value})


def test_a_cohort_of_all_clients_is_allowed():
    assert parse(defaults() | {"run.clients": 5, "run.cohort": 5}).settings.run.cohort == 5
    assert parse({"run.clients": 5}).settings.run.cohort == 5  # one command is enough
    assert parse({"run.clients": 50}).settings.run.cohort == defaults()["run.cohort"]


@pytest.mark.parametrize(
    ("texts", "flat"),
    [
        ([], {}),
        (["", "  "], {}),
        (["strategy='random' mask.density=0.05"], {"strategy": "random", "mask.density": 0.05}),
        (['a.b="two words"  c = 1\td=true\n'], {"a.b": "two words", "c": 1, "d": True}),
        (["x=''", "y=-1e-3"], {"x": "", "y": -1e-3}),
        (["""x="it's" y='say "hi"'"""], {"x": "it's", "y": 'say "hi"'}),
        (["x='a=b c=d'"], {"x": "a=b c=d"}),
        (["run.round-timeout=5", "run.round-timeout=6"], {"run.round-timeout": 6}),
        ([r"x='C:\data'"], {"x": r"C:\data"}),
    ],
)
def test_overrides_are_read(texts, flat):
    got = read_overrides(texts)
    assert got == flat
    assert [type(value) for value in got.values()] == [type(value) for value in flat.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("strategy=random", "strategy is random; it is a TOML value, strings in quotes: 'random'"),
        ("run.resume=True", "run.resume is True; it is a TOML value"),
        ("a=1 b", "-c is 'b'; it is key=value pairs, strings in quotes"),
        ("a=", "-c is 'a='; it is key=value pairs"),
        ("=1", "-c is '=1'; it is key=value pairs"),
        ("a='x", '-c is "a=\'x"; it is key=value pairs'),
        ("a='x'b=1", "-c is \"a='x'b=1\"; it is key=value pairs"),
        ("a=1,b=2", "a is 1,b=2; it is a TOML value"),
        ('a="\\q"', 'a is "\\q"; it is a TOML value'),
    ],
)
def test_bad_overrides_are_refused(text, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        read_overrides([text])


def test_later_layers_win():
    assert merge() == defaults()
    merged = merge({"run.rounds": 3, "run.seed": 7}, {"run.rounds": 4})
    assert merged == defaults() | {"run.rounds": 4, "run.seed": 7}
    assert list(merged) == list(defaults())


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("density", "density is not a key; did you mean mask.density?"),
        ("run.density", "run.density is not a key; did you mean mask.density?"),
        ("local.wieght-decay", "local.wieght-decay is not a key; did you mean local.weight-decay?"),
    ],
)
def test_a_key_that_does_not_exist_is_refused_with_a_suggestion(key, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        merge({"run.rounds": 3}, {key: 1})


def test_what_is_written_is_read_back(tmp_path):
    flat = defaults() | {
        "run.out": "a folder\\ \"quoted\"\n'so'",
        "local.lr": 1e-7,
        "run.resume": True,
        "run.seed": -3,
    }
    path = tmp_path / "config.toml"
    path.write_text(write_toml(flat))
    assert read_file(path) == flat
    tables = tomllib.loads(path.read_text())
    assert tables["strategy"] == "ssfl"
    rest = {"dead": "zero", "granularity": "weight", "budget": "parameters"}
    assert tables["mask"] == {"density": 0.1, "scope": "global", "min-per-layer": -1} | rest


@pytest.mark.parametrize("content", [b"a = ", b"a = 1\na = 2\n", b"a = '\xff'\n", None])
def test_a_file_that_is_no_toml_is_refused(tmp_path, content):
    path = tmp_path / "config.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^CONFIG is {re.escape(str(path))}; it is a TOML file"):
        read_file(path)


def test_the_first_difference_that_matters_is_said():
    ours = defaults()
    assert first_clash(ours, defaults()) is None
    assert first_clash(ours | {"run.out": "x", "run.resume": True, "engine.actors": 3}, ours) is None
    said = first_clash(ours | {"run.seed": 2, "mask.density": 0.2, "strategy": "random"}, ours)
    assert said == "mask.density is 0.2; that run was started with 0.1"
    lacking = {key: value for key, value in ours.items() if key != "local.lr"}
    assert first_clash(ours | {"local.lr": 0.2}, lacking) == "local.lr is 0.2; that run was started with 0.1"
