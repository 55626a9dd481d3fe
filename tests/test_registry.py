"""What the configuration names is found: built in, by "module:attribute", by an entry point; else a line says why."""

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from flwr.app import Message

from ssfl_app import client_app, registry
from ssfl_app.comm.payload import Payload, PayloadEncoder
from ssfl_app.config import (
    BUILTIN,
    complete,
    defaults,
    first_clash,
    foreign_modules,
    keys,
    merge,
    parse,
    read_file,
    read_given,
)
from ssfl_app.options import ConfigError, PrivateError
from ssfl_app.registry import Registry, Unknown, import_from, sources
from ssfl_app.runtime import check, code_digest
from ssfl_app.simulation.in_process import InlineGrid
from ssfl_app.sparsity.layout import state_of
from ssfl_app.training.models import ModelOptions, create, fewest, outline
from ssfl_app.training.trainer import LocalTrainer

NET = """
from torch import nn
from below import width_of

def net(input_shape, outputs, norm, width=4):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(width_of(width)), nn.Linear(width, outputs))

def seen(input_shape, outputs, norm, width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.Linear(width, outputs))

class Own:
    number = 3

def words(*_):
    return "no model"
"""
STRATEGY = """
from dataclasses import dataclass
from ssfl_app.core.options import FromSettings, Section, fraction
from ssfl_app.strategies.fedavg import FedAvg

@dataclass(frozen=True)
class HalfOptions(Section):
    section = "half"
    share: float = fraction(0.5, "how much")

class Half(FedAvg):
    name = "half"
    options = FromSettings(HalfOptions)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder of foreign modules from which this process imports."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(registry.FOLDER, "")
    for name, text in {
        "nets": NET,
        "below": "def width_of(width):\n    return width\n",
        "halves": STRATEGY,
        "broken": "import nets\n1 / 0\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    import_from(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name in ("nets", "below", "halves", "broken"):
            del sys.modules[name]


def test_a_model_of_the_folder_is_made_with_its_options_and_the_weights_of_the_seed(folder: Path) -> None:
    flat = {"model.name": "nets:seen", "model.options.width": 7}
    options = parse(flat).model
    assert options == ModelOptions("nets:seen", "group", options={"width": 7})
    before = torch.get_rng_state()
    one, same, other = (state_of(create(options, (1, 8, 8), 3, seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one["1.weight"].shape == (7, 64)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["1.weight"], other["1.weight"])
    made = outline(options, (1, 8, 8), 3)
    assert made[1].weight.is_meta
    assert fewest(options, (1, 8, 8), 3) == 2  # nobody knows what its BatchNorm sees


def test_frozen_weights_have_no_mask_and_lazy_layers_no_layout(folder: Path) -> None:
    (folder / "odd.py").write_text(
        "from torch import nn\n"
        "def frozen(shape, outputs, norm):\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, outputs))\n"
        "    net[1].weight.requires_grad_(False)\n"
        "    return net\n"
        "def lazy(shape, outputs, norm):\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(outputs))\n"
    )
    with pytest.raises(ConfigError, match=r"model.name is 'odd:frozen'; its 1.weight is frozen"):
        check(parse({"model.name": "odd:frozen"}))
    check(parse({"model.name": "odd:frozen", "strategy": "fedavg"}))
    with pytest.raises(ConfigError, match=r"model.name is 'odd:lazy'; it has lazy layers"):
        check(parse({"model.name": "odd:lazy"}))


def test_an_option_that_only_the_other_run_has_makes_it_another_run() -> None:
    theirs = merge({"model.options.width": 3})
    assert first_clash(merge(), theirs) is None  # what a command line gives may be less
    said = first_clash(merge(), theirs, whole=True)
    assert said == "model.options.width is None; that run was started with 3"


def test_a_class_in_a_module_is_reached_by_dots(folder: Path) -> None:
    numbers: Registry[int] = Registry("ssfl.none", {"one": 1}, "a number", lambda found: isinstance(found, int))
    assert numbers["nets:Own.number"] == 3
    assert list(numbers) == ["one"]  # what is foreign is not listed
    with pytest.raises(Unknown, match="this is function net; it is a number"):
        numbers["nets:net"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("nets:nett", "module nets ({folder}/nets.py) has no nett"),
        ("nest:net", "there is no module nest in {folder} or among those installed"),
        ("nets.inner:net", "there is no module nets.inner in {folder}"),
        ("broken:net", "module broken cannot be imported (ZeroDivisionError: division by zero)"),
        ("nets:net:net", "it is one of cnn, conv4, resnet18, resnet50, "),
        ("resnet8", 'or "module:attribute"; did you mean resnet18?'),
        (":", "it is one of cnn"),
        ("nets.net", 'or "module:attribute"; did you mean nets:net?'),
        ("nets.py:net", "there is no module nets.py in {folder} or among those installed; a module is named without"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused_with_the_cause(folder: Path, value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"model.name is {value!r}; ")) as caught:
        parse({"model.name": value})
    assert said.format(folder=folder) in str(caught.value)


def test_a_node_does_not_tell_its_folders(folder: Path) -> None:
    with pytest.raises(PrivateError) as caught:
        parse({"model.name": "nest:net"})
    assert caught.value.public == "model.name is 'nest:net'; there is no module nest where it runs"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nets:words", "it made str, not a torch.nn.Module"),
        (
            "nets:net",
            "called with (input_shape, outputs, norm), here ((1, 8, 8), 3, 'group', height=2), it says TypeError",
        ),
    ],
)
def test_a_factory_that_makes_no_model_is_refused(folder: Path, name: str, said: str) -> None:
    flat = {"model.name": name} | ({"model.options.height": 2} if name == "nets:net" else {})
    with pytest.raises(ConfigError, match=re.escape(f"model.name is {name!r}; {said}")):
        outline(parse(flat).model, (1, 8, 8), 3)


def test_options_belong_to_models_that_take_them() -> None:
    with pytest.raises(
        ConfigError, match=r"model.options.width is 3; cnn is built in: it has model.width and .* a model of your own"
    ):
        outline(parse({"model.options.width": 3}).model, (1, 8, 8), 3)
    with pytest.raises(ConfigError, match=r"model.name is 'cnn'; .* this model takes images"):
        outline(ModelOptions(), (30,), 3)
    with pytest.raises(ConfigError, match=r"run.options.width is not a key"):
        parse({"run.options.width": 3})


def test_a_strategy_of_the_folder_brings_its_keys(folder: Path) -> None:
    config = parse({"strategy": "halves:Half", "half.share": 1})
    assert config.settings.sections["half"].share == 1.0
    assert config.flat["half.share"] == 1
    assert parse({"strategy": "halves:Half"}).flat["half.share"] == 0.5
    assert [key for key, _ in keys("halves:Half") if key.startswith("half.")] == ["half.share"]
    with pytest.raises(ConfigError, match=r"half.share is not a key; keys are strategy and those of run"):
        parse({"half.share": 1})  # which strategy would read it?
    with pytest.raises(ConfigError, match=r"half.shear is not a key; did you mean half.share\?"):
        merge({"strategy": "halves:Half", "half.shear": 1})
    assert "half" not in BUILTIN
    (folder / "half.toml").write_text("strategy = 'halves:Half'\n[half]\nshare = 1\n[sparsyfed]\nbeta = 1.5\n")
    given = read_given(folder / "half.toml", ["strategy='fedavg' run.rounds=3"])
    assert given == {"strategy": "fedavg", "run.rounds": 3, "sparsyfed.beta": 1.5}  # what fedavg is compared with


def test_the_code_digest_covers_what_is_imported(folder: Path) -> None:
    flat = merge({"strategy": "halves:Half", "model.name": "nets:net"})
    assert foreign_modules(flat) == ["halves", "nets"]
    assert foreign_modules(defaults()) == []
    assert sorted(sources("nets")) == ["below.py", "nets.py"]
    assert sources("torch", {}).keys() > {"torch/__init__.py"}

    def digest() -> str:
        code_digest.cache_clear()
        return code_digest(("halves", "nets"))

    one = digest()
    assert one == digest() != code_digest()
    (folder / "below.py").write_text("def width_of(width):\n    return width + 1\n")
    assert digest() != one
    code_digest.cache_clear()


def test_a_package_without_an_init_is_covered_and_what_the_interpreter_brings_has_no_files(folder: Path) -> None:
    (folder / "bare_models").mkdir()
    (folder / "bare_models" / "mlp.py").write_text("x = 1\n")
    assert sources("bare_models.mlp") == {"bare_models/mlp.py": folder / "bare_models" / "mlp.py"}
    (folder / "bare_models" / "old.py").write_text("print 'no Python 3'\n")
    (folder / "bare_models" / "mlp.py").write_text("def f():\n    from below import width_of\n")
    assert set(sources("bare_models")) == {"bare_models/mlp.py", "bare_models/old.py", "below.py"}
    assert sources("builtins") == sources("sys") == sources("os") == {}


@pytest.mark.parametrize(("key", "value"), [("width", [1, 2]), ("width", None), ("optim.lr", 1)])
def test_an_option_of_your_own_is_one_word_and_a_scalar(key: str, value: object) -> None:
    with pytest.raises(
        ConfigError, match=re.escape(f"model.options.{key} is {value!r}; a key of your own is one word")
    ):
        parse({"model.name": "cnn", f"model.options.{key}": value})


def test_modules_that_import_each_other_have_an_end(folder: Path) -> None:
    (folder / "below.py").write_text("import nets\ndef width_of(width):\n    return width\n")
    assert sorted(sources("nets")) == ["below.py", "nets.py"]


def test_an_installed_package_adds_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = metadata.EntryPoint("theirs", "nets:seen", "ssfl.models")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry] if group == entry.group else [])
    registry._entry_points.cache_clear()
    try:
        assert parse({"model.name": "theirs"}).model.name == "theirs"
        assert foreign_modules(merge({"model.name": "theirs"})) == ["nets"]
        with pytest.raises(ConfigError, match=r'theirs, or "module:attribute"; did you mean theirs\?'):
            parse({"model.name": "their"})
    finally:
        registry._entry_points.cache_clear()


def test_a_folder_of_before_a_key_was_added_is_the_same_run(tmp_path: Path) -> None:
    """Recorded by stop 22; it lacks keys that were added since and would lack each later one."""
    old = read_file(Path(__file__).parent / "recorded" / "run-of-stop-22.toml")
    assert set(old) <= set(defaults())
    assert parse(old).flat == complete(old)
    fresh = merge({"run.rounds": 4, "strategy": "topk", "run.checkpoint-every": 2})
    assert first_clash(fresh, old) is None
    assert first_clash(old, {key: old[key] for key in ("strategy", "run.rounds", "run.checkpoint-every")}) is None


@pytest.mark.parametrize("name", ["shutil:rmtree", "nets:os.path", "nets:rmtree", "ssfl_app.data.cache:clear"])
def test_a_real_node_takes_names_only_of_what_the_app_brought(folder: Path, name: str) -> None:
    """The folder is the node's own data; a reader that is installed there would delete it."""
    (folder / "nets.py").write_text("import os\nfrom shutil import rmtree\n")
    own = folder / "own"
    own.mkdir()
    flat = merge({"run.clients": 1, "run.cohort": 1}) | {"data.name": name}
    site = {"partition-id": 0, "num-partitions": 1, "data-path": str(own)}
    grid = InlineGrid(client_app.app, flat, {7: 0}, {7: site})
    (reply,) = grid.send_and_receive([Message(PayloadEncoder().record(Payload()), 7, "query.hello")])
    assert reply.has_error()
    assert "data.name is" in reply.error.reason
    assert own.is_dir()


def test_the_model_of_an_app_is_taken_by_a_real_node(folder: Path) -> None:
    flat = merge({"run.clients": 1, "run.cohort": 1, "model.name": "nets:seen"})
    grid = InlineGrid(client_app.app, flat, {7: 0}, {7: {"partition-id": 0, "num-partitions": 1}})
    (reply,) = grid.send_and_receive([Message(PayloadEncoder().record(Payload()), 7, "query.hello")])
    assert not reply.has_error(), reply.error.reason


@pytest.mark.parametrize(
    ("body", "keys", "said"),
    [
        (
            "Linear(64, outputs).double()",
            {},
            "of 2 samples of data.name 'digits', inputs .* no loss or score: Runtime",
        ),
        ("Linear(63, outputs)", {}, "no loss or score: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("Linear(64, outputs)", {"task.name": "segmentation"}, "and task.name 'segmentation'; .*Error"),
        ("Linear(64, 1)", {}, "no loss or score: IndexError"),
        ("Linear(64, outputs).requires_grad_(False)", {"strategy": "fedavg"}, "has no gradient"),
        (
            "utils.parametrizations.weight_norm(nn.Linear(64, outputs))",
            {},
            "a mask takes all .* the loss is nan: a str",
        ),
    ],
)
def test_what_a_model_cannot_do_with_the_data_is_said_before_a_run(
    folder: Path, body: str, keys: dict[str, str], said: str
) -> None:
    name = f"misfit{len(body)}{len(keys)}"  # a module is imported once
    (folder / f"{name}.py").write_text(
        f"from torch import nn\ndef net(shape, outputs, norm):\n    return nn.Sequential(nn.Flatten(), nn.{body})\n"
    )
    before = torch.get_rng_state()
    with pytest.raises(ConfigError, match=rf"model.name is '{name}:net' .*{said}") as caught:
        check(parse({"model.name": f"{name}:net", **keys}))
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), before)
    if "weight_norm" in body:
        check(parse({"model.name": f"{name}:net", "strategy": "fedavg"}))


def test_a_misspelt_table_of_options_of_your_own(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.optoins.width is not a key; did you mean model.options.width\?"):
        merge({"model.optoins.width": 3})


def test_what_stands_before_a_run_leaves_threads_and_gradients_to_the_processes_that_train(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that computed in threads, or went backward beside a GPU, has no forks that can train."""
    threads: list[int] = []
    monkeypatch.setattr(LocalTrainer, "evaluate", lambda *_: threads.append(torch.get_num_threads()) or (0.0, 0.0))
    monkeypatch.setattr(torch.Tensor, "backward", None)
    monkeypatch.setattr(LocalTrainer, "fit", None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        check(parse({"model.name": "nets:seen"}))
        assert (threads, torch.get_num_threads()) == ([1, 1], 2)
    finally:
        torch.set_num_threads(before)


def test_a_run_by_a_rule_that_has_changed_is_another_run() -> None:
    old = {key: value for key, value in merge({"strategy": "prunefl"}).items() if key != "prunefl.scope"}
    said = first_clash(merge({"strategy": "prunefl", "prunefl.scope": "global"}), old)
    assert said == "prunefl.scope is 'global'; that run was started with 'the rule before version 0.2.0'"
    others = {key: value for key, value in merge().items() if key != "prunefl.scope"}
    assert first_clash(merge(), others) is None


def test_a_strategy_that_is_replaced_is_not_looked_for(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("strategy = 'fedagv'\n")
    assert read_given(tmp_path / "run.toml", ["strategy='ssfl'"]) == {"strategy": "ssfl"}
