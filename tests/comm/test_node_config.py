"""What no server gets a real node to do: obey its paths, tell it names of files, or answer for few images."""

import contextlib
import errno
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from safetensors.torch import save_file

from ssfl_app import client_app
from ssfl_app.client_app import handle
from ssfl_app.client_node import NodeError, memory_of
from ssfl_app.comm.node_config import LEAST_BATCH, SIMULATED, read_node_config, simulated
from ssfl_app.comm.payload import Payload, PayloadEncoder, decode_metadata
from ssfl_app.config import Flat, merge
from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.runtime import get_runtime
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.strategies import REGISTRY
from tests.data.test_dataset import png, some_pixels, write_folder
from tests.in_process_grid import SMALL, DeploymentGrid, Played, play

TOKEN = "0123456789abcdef"
SITE: Flat = {"data.where": "sites", "data.name": "folder", "data.image-size": 8, "data.augment": "none"}


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSFL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ssfl_app.comm.membership.DEPLOYMENT_POLL", 0.01)
    monkeypatch.setattr("ssfl_app.comm.exchange.DEPLOYMENT_POLL", 0.01)


def context_of(node: Flat, keys: Flat) -> Context:
    return Context(1, 7, dict(node), RecordDict(), dict(merge(SMALL, keys)))


def hello(node: Flat, keys: Flat) -> Message:
    message = Message(PayloadEncoder().record(Payload()), 7, "query.hello", group_id="0")
    message.metadata.__dict__["_message_id"] = "hello"
    return handle(message, context_of(node, keys))


def nodes(count: int, **more: Any) -> list[Flat]:
    return [
        {"partition-id": i, **{key.replace("_", "-"): value for key, value in more.items()}} for i in range(count)
    ]


# ---- which node is a real one ---------------------------------------------------------------------


def test_a_simulated_client_is_told_by_its_process_and_not_by_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    flower = {"partition-id": 1, "num-partitions": 4}  # a real node may be started with both, too
    assert simulated({SIMULATED: True})
    assert not simulated({SIMULATED: "yes"})
    assert not simulated(flower)
    for joined in (False, True):
        monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda joined=joined: joined))
        assert simulated(flower) is joined
    monkeypatch.setitem(sys.modules, "ray", None)
    grid = DeploymentGrid(merge(SMALL))
    assert all(simulated(context.node_config) for context in grid._contexts.values())


# ---- paths ----------------------------------------------------------------------------------------


def test_a_real_node_obeys_no_folder_of_a_server(tmp_path: Path) -> None:
    evil = tmp_path / "home" / ".config"
    for node in ({}, {"state-path": str(tmp_path / "state")}):
        place = read_node_config({"partition-id": 0, **node}, "shared")
        for metadata in ({"folder": str(evil)}, {"folder": "", "run": TOKEN}, {"folder": str(evil), "run": TOKEN}):
            with pytest.raises(PayloadError, match="the fact folder, which is for simulations"):
                memory_of(context_of({}, {}), place, 0, metadata)
    with contextlib.suppress(RunFailed):
        play({"strategy": "ditto", "run.rounds": 1}, folder=evil, node_configs=nodes(6))
    assert not evil.exists()


def test_a_simulated_client_keeps_its_files_where_the_server_says(tmp_path: Path) -> None:
    play({"strategy": "ditto", "run.rounds": 1}, folder=tmp_path / "clients")
    assert len(list((tmp_path / "clients").glob("client-*"))) == 4


def test_with_a_state_path_the_token_is_required(tmp_path: Path) -> None:
    place = read_node_config({"partition-id": 0, "state-path": str(tmp_path)}, "shared")
    for metadata in ({}, {"run": 7}, {"run": "../x"}):
        with pytest.raises(PayloadError, match=r"run is .*; it is 16 hex digits"):
            memory_of(context_of({}, {}), place, 0, metadata)
    assert list(tmp_path.iterdir()) == []


def test_the_number_that_a_server_gives_a_site_leads_to_no_other_site(tmp_path: Path) -> None:
    kept = {}
    for name in ("athens", "client-00001"):
        place = read_node_config({"name": name, "data-path": "/data", "state-path": str(tmp_path)}, "sites")
        kept[name] = memory_of(context_of({}, {}), place, 1, {"run": TOKEN})
    kept["athens"].save(5, {"model": np.ones(3, np.float32)}, 0)
    one = memory_of(
        context_of({}, {}),
        read_node_config({"partition-id": 1, "state-path": str(tmp_path)}, "shared"),
        1,
        {"run": TOKEN},
    )
    for other in (kept["client-00001"], one):
        assert other.load(9) is None
        other.load(0)  # deletes what is later
    assert kept["athens"].load(9) is not None


def test_the_data_path_of_a_server_is_ignored_unless_the_node_allows_it(tmp_path: Path) -> None:
    private = tmp_path / "private"
    write_folder(private, {f"{part}/{name}": some_pixels(9) for part in ("train", "test") for name in ("hiv", "tb")})
    keys: Flat = {
        "data.name": "folder",
        "data.path": str(private),
        "data.download": True,
        "run.clients": 2,
        "run.cohort": 2,
    }
    keys["partition.name"] = "iid"
    told = []
    for path in (private, tmp_path / "nowhere"):
        with pytest.raises(NodeError) as caught:
            hello({"partition-id": 0}, keys | {"data.path": str(path)})
        told.append(str(caught.value))
    assert told[0] == told[1]  # no oracle of what exists
    assert "data-path is missing in --node-config; data.name is 'folder'" in told[0]
    answer = hello({"partition-id": 0, "server-data-path": True}, keys)
    assert answer.content["facts"]["classes"] == "hiv\ntb"
    with pytest.raises(NodeError, match="server-data-path is 'yes' in --node-config; it is true or false"):
        hello({"partition-id": 0, "server-data-path": "yes"}, keys)
    real = read_node_config({"partition-id": 0, "server-data-path": True}, "shared")
    assert real.obeyed(keys) == keys | {"data.download": False}  # it reads there and writes nothing
    mine = read_node_config({"partition-id": 0, "data-path": "/mine"}, "shared")
    assert mine.obeyed(keys)["data.download"] is True  # into a folder of its own
    assert hello({"partition-id": 0}, {"data.path": "/private"}).content["facts"]["samples"] > 0  # digits need none
    with pytest.raises(NodeError, match=r"ConfigError: data.name is digits; it reads no data-path$"):
        hello({"partition-id": 0, "data-path": str(private)}, {})  # or a forgotten data.name trains on digits


def test_the_file_of_weights_is_one_that_the_node_names(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    state = get_runtime(merge(SMALL, {"run.seed": 3})).initial_state()
    save_file({name: tensor.clone() for name, tensor in state.items()}, ours)
    save_file({name: tensor + 1 for name, tensor in state.items()}, theirs)
    keys: Flat = {"model.weights": str(theirs), "mask.dead": "frozen"}
    for there in (theirs, tmp_path / "nowhere"):
        with pytest.raises(NodeError, match="weights-path is missing in --node-config") as caught:
            hello({"partition-id": 0}, keys | {"model.weights": str(there)})
        assert str(tmp_path) not in str(caught.value)
    missing = {"partition-id": 0, "weights-path": str(tmp_path / "nowhere")}
    with pytest.raises(NodeError, match=r"weights-path: it is a safetensors file that can be read") as caught:
        hello(missing, keys)
    assert str(tmp_path) not in str(caught.value)

    def told(node: Flat) -> Any:
        return decode_metadata(hello({"partition-id": 0, **node}, keys).content)["weights"]

    assert (
        told({"weights-path": str(ours)})
        == get_runtime(merge(SMALL, keys, {"model.weights": str(ours)})).start_digest
    )
    assert told({"server-data-path": True}) == get_runtime(merge(SMALL, keys)).start_digest
    assert "weights" not in decode_metadata(hello({"partition-id": 0}, {}).content)


def test_a_node_without_a_state_path_takes_part_in_no_run_with_a_budget_of_its_own(tmp_path: Path) -> None:
    keys: Flat = {"strategy": "fedavg", "privacy.level": "record", "privacy.epsilon": 8.0}
    with pytest.raises(NodeError, match=r"PayloadError: privacy.level is 'record'; this node has no state-path, and"):
        hello({"partition-id": 0}, keys)
    assert hello({"partition-id": 0, "state-path": str(tmp_path)}, keys).content["facts"]["samples"] > 0


# ---- what errors tell -------------------------------------------------------------------------------


def test_no_name_of_a_file_or_folder_crosses_with_an_error(tmp_path: Path) -> None:
    site = tmp_path / "St_Mary"
    write_folder(site, {f"{part}/{name}": some_pixels(3) for part in ("train", "test") for name in ("cat", "hiv")})
    biopsy = site / "train" / "hiv" / "Jane_Doe_1970-01-02.png"
    node: Flat = {"name": "a", "data-path": str(site), "state-path": str(tmp_path / "state")}
    secrets = ("Jane", "hiv", "St_Mary", str(tmp_path), ".png")

    def told(words: str, keys: Flat = SITE) -> None:
        with pytest.raises(NodeError) as caught:
            hello(node, keys)
        assert words in str(caught.value)
        assert not [secret for secret in secrets if secret in str(caught.value)]
        assert str(site) in str(caught.value.__cause__)  # Flower writes the cause into the log of the node

    biopsy.write_bytes(b"no image")
    told("data-path: image 4 of train/<class 1> cannot be decoded (UnidentifiedImageError)")
    biopsy.write_bytes(png(some_pixels(1, side=9)[0]))
    told("image 4 of train/<class 1> is 9x9, the first image is 6x6", SITE | {"data.image-size": 0})
    biopsy.unlink()
    told("train has 1 class folder(s) that data.classes does not name", SITE | {"data.classes": "cat,dog"})
    (site / "train" / "hiv" / "loop").mkdir()
    (site / "test" / "hiv").rename(site / "test" / "hiv-2")
    told("a class is only in one of train and test")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            FileNotFoundError(errno.ENOENT, "No such file", "/data/Jane_Doe.png"),
            "FileNotFoundError: what it says is in",
        ),
        (KeyError("Jane_Doe"), "KeyError: what it says is in the log of this node"),
        (MemoryError("Jane_Doe"), "MemoryError: what it says is in the log of this node"),
        (ConfigError("/state/of/node/x is short, Jane_Doe"), "ConfigError: what it says is in the log of this node"),
        (
            PayloadError("/state/of/node/x is short, Jane_Doe"),
            "PayloadError: what it says is in the log of this node",
        ),
        (ConfigError("run.device is 'cuda'"), "ConfigError: run.device is 'cuda'"),
    ],
)
def test_whatever_is_raised_leaves_by_one_door(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(client_app, "get_runtime", fail)
    with pytest.raises(NodeError) as caught:
        hello({"partition-id": 0, "state-path": "/state/of/node"}, {})
    assert words in str(caught.value)
    assert "Jane" not in str(caught.value)
    assert "/state" not in str(caught.value)
    with pytest.raises(type(error)) as whole:  # a simulation is one user's
        hello({"partition-id": 0, SIMULATED: True}, {})
    assert str(whole.value) == str(error)


# ---- what leaves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", REGISTRY)
def test_no_strategy_gets_an_answer_that_is_made_of_too_few_images(strategy: str) -> None:
    keys: Flat = {"strategy": strategy, "run.rounds": 1, "run.clients": 3, "run.cohort": 3}
    flat = merge(SMALL, keys)
    grid = DeploymentGrid(flat, node_configs=nodes(3, least_batch=10_000))
    with pytest.raises(RunFailed):
        play(keys, grid=grid)
    kinds = {where[0] for where, _ in grid.got}
    assert not [where for where, payload in grid.got if payload.arrays]
    assert kinds <= {"query.hello", "evaluate"}
    assert len(grid.log) > 3  # they were asked


def refusals(keys: Flat, node_configs: list[Flat]) -> tuple[DeploymentGrid, str]:
    grid = DeploymentGrid(merge(SMALL, keys), node_configs=node_configs)
    with pytest.raises(RunFailed) as caught:
        play(keys, grid=grid)
    return grid, str(caught.value)


@pytest.mark.parametrize("criterion", ["snip", "pooled-snip", "grasp", "iterative-snip", "force"])
def test_a_server_cannot_ask_for_the_scores_of_one_image(criterion: str) -> None:
    keys: Flat = {"run.clients": 3, "run.cohort": 3, "run.rounds": 1, "ssfl.criterion": criterion}
    few = keys | {"ssfl.saliency-batch-size": 1}
    grid, said = refusals(few, nodes(3))
    assert f"scores would be made of 1 images; least-batch is {LEAST_BATCH} here" in said
    assert not [where for where, payload in grid.got if payload.arrays]
    assert play(few | {"ssfl.steps": 0}, node_configs=nodes(3, least_batch=1)).records[1]["ok"] == [0, 1, 2]


def test_an_image_that_is_drawn_often_counts_once(tmp_path: Path) -> None:
    # Of 64 balanced draws 32 are the one image of the second class.
    names = {"cat": 39, "eel": 1}
    for part in ("train", "test"):
        write_folder(tmp_path / "a", {f"{part}/{name}": some_pixels(count, 8) for name, count in names.items()})
    site: Flat = {"name": "a", "data-path": str(tmp_path / "a")}
    keys = SITE | {"data.classes": "cat,eel", "data.channels": 3, "run.clients": 1, "run.cohort": 1, "run.rounds": 1}
    assert play(keys, node_configs=[site]).records[1]["ok"] == [0]
    said = refusals(keys | {"ssfl.saliency-batch-size": 40}, [site])[1]
    assert "scores would be made of 21 images; least-batch is 32 here" in said


def test_a_floor_that_is_kept_changes_no_bit() -> None:
    keys: Flat = {"run.clients": 3, "run.cohort": 3, "run.rounds": 2}
    real: Played = play(keys, node_configs=nodes(3))
    assert real.bits() == play(keys).bits()


@pytest.mark.parametrize("value", [0, -1, 1.5, "32", True])
def test_a_floor_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"least-batch is .* in --node-config; it is a whole number of at least 1"):
        read_node_config({"partition-id": 0, "least-batch": value}, "shared")
