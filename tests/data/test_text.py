"""Texts: a client a file or a speaker, tokens of the training part, sequences that do not overlap."""

from pathlib import Path

import pytest
from torch import nn

from ssfl_app.config import merge, parse
from ssfl_app.data.dataset import DataOptions, load
from ssfl_app.data.text import by_speaker, sequences
from ssfl_app.options import ConfigError
from ssfl_app.runtime import load_federation
from tests.in_process_grid import play

PLAY = """A note before the play.

ANNA:
Who is there: you?

BOB, a friend:
Nobody.
Nobody at all.

ANNA:
Then come in.
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSFL_CACHE", str(tmp_path / "cache"))


def write(folder: Path, **texts: str) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, "utf-8")
    return folder


def test_a_sequence_and_the_characters_that_follow() -> None:
    found = sequences("", "text", [("abcdabc", "bxdc"), ("dd", "a"), ("cccc", "")], 3)
    # a to d are 1 to 4; x is in no training text. The second text is too short to train on.
    assert found.train.tolist() == [[1, 2, 3], [4, 1, 2], [3, 3, 3]]
    assert found.train_labels.tolist() == [[2, 3, 4], [1, 2, 3], [3, 3, 3]]
    assert (found.test.tolist(), found.test_labels.tolist()) == ([[2, 0, 4]], [[0, 4, 3]])
    assert found.train_owners is not None
    assert found.train_owners.tolist() == [0, 0, 1]
    assert (found.task, found.outputs) == ("next-token", 5)
    assert found.notes == ("texts: 2, with 4 different characters; 1 are left out, which are too short",)


def test_each_file_is_a_client_and_its_last_fifth_tests(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", b="xy" * 50, a="ä€😀" * 50, c="z")
    (folder / ".hidden").write_bytes(b"\xff")
    keys = {"data.name": "text", "data.path": str(folder), "data.length": 9}
    keys |= {"partition.name": "natural", "run.clients": 2, "run.cohort": 1}
    data, partition = load_federation(parse(merge(keys)))
    assert [len(part) for part in partition.train] == [13, 8]  # of 120 and 80 characters
    assert [len(part) for part in partition.test] == [3, 2]
    assert data.train.inputs[partition.train[1]].unique().tolist() == [1, 2]  # x and y: before ä in Unicode
    assert (data.shape, data.outputs, data.numbers) == ((9,), 6, False)


def test_speakers_of_one_file(tmp_path: Path) -> None:
    assert by_speaker(PLAY) == ["Who is there: you?\nThen come in.", "Nobody.\nNobody at all."]
    assert by_speaker("no play") == ["no play"]
    (tmp_path / "play.txt").write_text(PLAY)
    found = load(DataOptions("text", str(tmp_path / "play.txt"), length=3))
    assert found.owners is not None
    assert set(found.owners[0].tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"a": "short"}, "no training text has a test text of more than data.length, 80 characters"),
        ({}, "no training text has a test text"),
    ],
)
def test_texts_that_are_too_short(tmp_path: Path, texts: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(DataOptions("text", str(write(tmp_path / "t", **texts))))


def test_other_bytes_than_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"a.txt cannot be read as text in UTF-8 \(UnicodeDecodeError"):
        load(DataOptions("text", str(tmp_path / "a.txt")))


def bigrams(input_shape: tuple[int, ...], outputs: int, norm: str) -> nn.Module:
    return nn.Sequential(nn.Embedding(outputs, 12), nn.Linear(12, outputs))


def test_natural_clients_learn_the_next_character(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", a="abcd" * 99, b="dabc" * 99, c="cdab" * 99)
    keys = {"data.name": "text", "data.path": str(folder), "data.length": 16, "partition.name": "natural"}
    keys |= {"run.clients": 3, "run.cohort": 3, "run.rounds": 3, "local.epochs": 10, "local.lr": 1.0}
    last = play(keys | {"model.name": "tests.data.test_text:bigrams", "mask.density": 0.5}).records[-1]
    assert last["central_accuracy"] > 0.95


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"ssfl.criterion": "synflow"}, "ssfl.criterion is 'synflow'"),
        ({"strategy": "fedpai", "mask.granularity": "channel"}, "mask.granularity is 'channel'"),
    ],
)
def test_what_needs_an_input_of_ones_is_refused_with_tokens(tmp_path: Path, keys: dict[str, str], why: str) -> None:
    folder = write(tmp_path / "t", b="xy" * 50, a="xyz" * 50)
    flat = {"data.name": "text", "data.path": str(folder), "data.length": 9, "partition.name": "natural"}
    flat |= {"run.clients": 2, "run.cohort": 1} | keys
    with pytest.raises(ConfigError, match=f"{why}; it computes with ones for inputs, and these are tokens"):
        load_federation(parse(merge(flat)))
