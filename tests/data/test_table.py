"""Tables: columns that become inputs, targets and clients; the part that tests; sites."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import csv, parquet
from torch import nn

from ssfl_app.config import merge, parse
from ssfl_app.data.dataset import DataOptions, load, load_own
from ssfl_app.data.table import split_off
from ssfl_app.options import ConfigError, PrivateError
from ssfl_app.runtime import load_federation
from tests.data.test_arrays import site
from tests.data.test_dataset import png, some_pixels
from tests.in_process_grid import play

TRAIN = {"age": [1.5, 2.5, 3.5, 4.5], "sex": ["m", "f", "f", "m"], "who": list("abab"), "ill": [0, 1, 1, 0]}
TEST = {"ill": [1, 0], "who": ["b", "a"], "sex": ["f", "x"], "age": [3.0, 5.5]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSFL_CACHE", str(tmp_path / "cache"))


def write(folder: Path, ending: str = "csv", **parts: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for part, columns in parts.items():
        put = csv.write_csv if ending == "csv" else parquet.write_table
        put(pa.table(columns), folder / f"{part}.{ending}")
    return folder


def options(folder: Path, target: str = "ill", **keys: Any) -> DataOptions:
    return DataOptions("table", str(folder), target=target, **keys)


def mlp(input_shape: tuple[int, ...], outputs: int, norm: str) -> nn.Module:
    return nn.Sequential(nn.Linear(*input_shape, 16), nn.ReLU(), nn.Linear(16, outputs))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_columns_become_what_the_training_part_says(tmp_path: Path, ending: str) -> None:
    found = load(options(write(tmp_path / "t", ending, train=TRAIN, test=TEST), client="who"))
    age = (np.array([1, 2, 3, 4, 2.5, 5]) - 2.5) / np.std([1, 2, 3, 4])
    words = [[0, 1], [1, 0], [1, 0], [0, 1], [1, 0], [0, 0]]  # f, m; x is neither
    wanted = torch.from_numpy(np.column_stack([age, words]).astype(np.float32))
    assert torch.equal(torch.cat([found.train.inputs, found.test.inputs]), wanted)
    assert (found.task, found.train.labels.tolist(), found.test.labels.tolist()) == (
        "classification",
        [0, 1, 1, 0],
        [1, 0],
    )
    assert found.owners is not None
    assert [part.tolist() for part in found.owners] == [[0, 1, 0, 1], [1, 0]]


def test_floats_are_regressed_words_are_classes_and_inputs_are_chosen(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", train=TRAIN, test=TEST)
    found = load(options(folder, "age", inputs="ill"))
    assert (found.task, found.shape, found.train.targets.tolist()) == (
        "regression",
        (1,),
        [[1.5], [2.5], [3.5], [4.5]],
    )
    found = load(options(folder, "who", inputs=" ill, age"))
    assert (found.class_names, found.shape) == (("a", "b"), (2,))


def test_one_file_is_split_by_client_and_always_alike(tmp_path: Path) -> None:
    rows = {"x": np.arange(30.0), "y": np.arange(30) % 2, "who": np.repeat([7, 9], [20, 10])}
    folder = write(tmp_path / "t", patients=rows)
    one, two = (load(options(place, "y", client="who")) for place in (folder, folder / "patients.csv"))
    assert one.owners is not None
    assert [np.bincount(part).tolist() for part in one.owners] == [[16, 8], [4, 2]]
    assert torch.equal(one.test.inputs, two.test.inputs)
    assert len({*one.train.inputs.flatten().tolist(), *one.test.inputs.flatten().tolist()}) == 30


def test_a_fifth_of_each_owner_tests() -> None:
    owners = np.random.default_rng(0).integers(0, 5, 200)
    train, test = split_off(owners)
    assert sorted([*train, *test]) == list(range(200))
    assert np.array_equal(np.bincount(owners[test]), np.bincount(owners) // 5)
    assert not np.array_equal(test, np.sort(split_off(owners[::-1])[1]))


def test_the_datas_own_clients_are_dealt(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", train=TRAIN, test=TEST)
    keys = {"data.name": "table", "data.path": str(folder), "data.target": "ill", "data.client": "who"}
    keys |= {"partition.name": "natural", "run.clients": 2, "run.cohort": 1}
    _, partition = load_federation(parse(merge(keys)))
    assert [part.tolist() for part in (*partition.train, *partition.test)] == [[0, 2], [1, 3], [1], [0]]


def test_lists_and_images_are_inputs_of_their_own(tmp_path: Path) -> None:
    lists = {"seen": [[[1, 2], [3, 4]]] * 3, "next": [[[2, 3], [4, 5]]] * 3}
    found = load(options(write(tmp_path / "l", "parquet", train=lists, test=lists), "next"))
    assert (found.task, found.shape, found.outputs) == ("next-token", (2, 2), 6)
    pixels = some_pixels(3)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": png(image), "path": None} for image in pixels], type=kind)
    rows = {"image": images, "writer": ["u", "u", "v"], "what": ["cat", "dog", "cat"]}
    folder = write(tmp_path / "i", "parquet", train=rows, test=rows)
    found = load(options(folder, "what", client="writer"))
    assert np.array_equal(found.train.inputs.numpy(), pixels.transpose(0, 3, 1, 2))
    assert found.class_names == ("cat", "dog")
    with pytest.raises(ConfigError, match=r"column image holds arrays; it is then the only one of data.inputs"):
        load(options(folder, "what"))


def test_words_without_a_target_are_text(tmp_path: Path) -> None:
    rows = {"said": ["ab" * 20, "cd" * 20, "ba" * 20], "by": ["x", "y", "x"]}
    found = load(options(write(tmp_path / "t", train=rows, test=rows), "", client="by", inputs="said", length=10))
    assert (found.task, found.shape) == ("next-token", (10,))
    assert found.owners is not None
    assert np.bincount(found.owners[0]).tolist() == [8, 3]  # 81 characters with the line break, and 40


@pytest.mark.parametrize(
    ("changed", "keys", "said"),
    [
        ({}, {"target": "sick"}, "data.target is 'sick'; it names what is a column of each part"),
        ({}, {"target": ""}, "data.target is ''; it names what is a column"),
        ({}, {"client": "whom"}, "data.client is 'whom'"),
        ({}, {"inputs": "age,height"}, "data.inputs is 'height'"),
        ({"age": [1.0, None, None, 2.0]}, {}, "column age, double, has 2 missing values"),
        ({"age": [np.datetime64("2020-01-01", "s")] * 4}, {}, r"column age, timestamp\[ms\], is no numbers"),
        ({"age": [["a"]] * 4}, {}, "column age, list.*, is no numbers"),
        ({"age": [[1], [1, 2], [1], [1]]}, {}, "column age, list.*, is no numbers"),
        ({"ill": [0.5] * 4}, {}, "training samples have .* they are alike"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path: Path, changed: Any, keys: Any, said: str) -> None:
    folder = write(tmp_path / "t", "parquet", train=TRAIN | changed, test=TEST)
    with pytest.raises(ConfigError, match=said) as caught:
        load(options(folder, **keys))
    assert "column age" not in str(getattr(caught.value, "public", ""))


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_text("a,b\n")
    with pytest.raises(PrivateError, match=r"t.parquet cannot be read as parquet") as caught:
        load(options(tmp_path / "t.parquet"))
    assert caught.value.public == "data-path: file 0 cannot be read as parquet"
    with pytest.raises(ConfigError, match=r"it has none of train.csv, train.parquet"):
        load(options(write(tmp_path / "two", test=TEST, more=TEST)))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"data.target": "y"}, "data.target is 'y'; it is for data.name table and hf"),
        ({"data.name": "arrays", "data.client": "y"}, "data.client is 'y'; it is for data.name table and hf"),
        ({"data.length": 3}, "data.length is 3; it is for data.name table and hf and text"),
        ({"data.options.year": 3}, "data.options has year; data.name 'digits' takes none"),
        ({"data.name": "text", "data.where": "sites"}, "data.name is 'text'; with data.where 'sites' it is one of"),
    ],
)
def test_a_key_of_another_format_is_refused(keys: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(merge(keys))


def test_sites_standardise_by_their_own_and_have_no_words(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", train=TRAIN, test=TEST)
    with pytest.raises(PrivateError, match=r"column sex holds words; with data.where 'sites'"):
        load_own(site(folder, name="table", target="ill"), str(folder))
    found = load_own(site(folder, "well,ill", "table", target="ill", inputs="age"), str(folder))
    assert found.class_names == ("well", "ill")
    assert abs(found.train.inputs.mean()) < 1e-6


def test_three_sites_learn_from_their_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssfl_app.comm.membership.DEPLOYMENT_POLL", 0.01)
    monkeypatch.setattr("ssfl_app.comm.exchange.DEPLOYMENT_POLL", 0.01)
    rng, nodes = np.random.default_rng(0), []
    for place, name in enumerate(("athens", "berlin", "cairo", "server")):
        values = rng.normal(place, 1 + place, (60, 3))  # each hospital has units of its own
        ill = (values[:, 0] > place).astype(int)
        columns = {"a": values[:, 0], "b": values[:, 1], "c": values[:, 2], "ill": ill}
        names = list(columns)[place:] + list(columns)[:place]
        write(tmp_path / name, train={key: columns[key] for key in names}, test={k: columns[k][:20] for k in names})
        nodes.append({"name": name, "data-path": str(tmp_path / name), "least-batch": 8})
    keys = {"data.where": "sites", "data.name": "table", "data.target": "ill", "data.classes": "well,ill"}
    keys |= {"data.path": str(tmp_path / "server"), "model.name": "tests.data.test_table:mlp"}
    keys |= {"run.clients": 3, "run.cohort": 3, "run.rounds": 4, "local.epochs": 4, "mask.density": 0.5}
    last = play(keys, node_configs=nodes[:3]).records[-1]
    assert last["local_accuracy_mean"] > 0.9
    assert last["central_accuracy"] > 0.8
