"""Sites with data of their own: numbers that follow names, label sets, what survives, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from PIL import Image

from ssfl_app import client_node, server_app
from ssfl_app.cli.main import main
from ssfl_app.comm.node_config import read_node_config
from ssfl_app.comm.payload import ClientState
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.strategy import SparseStrategy
from ssfl_app.data.dataset import load_central, load_own
from ssfl_app.data.readers import digits
from ssfl_app.data.summary import DataSummary, mismatch, read_data_summary
from ssfl_app.deployment import credentials
from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.sparsity.values import PayloadError
from tests.data.test_dataset import some_pixels, write_folder, write_parquet
from tests.in_process_grid import SMALL, DeploymentGrid, Played, forget, play

NAMES = ("athens", "berlin", "cairo")
TOKEN = "0123456789abcdef"
DIGEST = "0123456789abcdef" * 4  # of a mask
OWN: Flat = {
    "data.where": "sites",
    "data.name": "folder",
    "data.classes": ",".join("0123456789"),
    "data.channels": 1,
    "data.image-size": 8,
    "data.augment": "none",
    "run.clients": 3,
    "run.cohort": 3,
    "run.rounds": 2,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSFL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ssfl_app.comm.membership.DEPLOYMENT_POLL", 0.01)
    monkeypatch.setattr("ssfl_app.comm.exchange.DEPLOYMENT_POLL", 0.01)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> list[Flat]:
    """Return the node configs of three sites that hold every tenth digit as image folders; cairo has no 9."""
    root = tmp_path_factory.mktemp("sites")
    raw = digits("", False, 0)
    for place, name in enumerate(NAMES):
        for part, pixels, labels in (("train", raw.train, raw.train_labels), ("test", raw.test, raw.test_labels)):
            for index in range(place, len(labels), 8 if part == "train" else 6):
                if name == "cairo" and labels[index] == 9:
                    continue
                folder = root / name / part / str(labels[index])
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[index, 0]).save(folder / f"{index}.png")
    return [{"name": name, "data-path": str(root / name)} for name in NAMES]


def own(sites: list[Flat], keys: Flat | None = None, **options: Any) -> Played:
    return play(OWN | (keys or {}), node_configs=sites, **options)


# ---- numbers and bits ---------------------------------------------------------------------------


def test_numbers_follow_names_and_bits_follow_numbers(sites: list[Flat]) -> None:
    one, two = own(sites), own(list(reversed(sites)), luck=5)
    assert one.strategy.messenger.registry.names == two.strategy.messenger.registry.names == dict(enumerate(NAMES))
    assert list(one.strategy.messenger.registry.nodes.values()) != list(
        two.strategy.messenger.registry.nodes.values()
    )
    assert one.bits() == two.bits()
    assert one.metrics() == two.metrics()
    for grid in (one.grid, two.grid):
        told = {where[2]: payload.metadata.get("client") for where, payload in grid.sent if where[0] == "train"}
        assert told == {0: 0, 1: 1, 2: 2}
        assert all("client" not in payload.metadata for where, payload in grid.sent if where[0] == "query.hello")


def test_the_order_in_which_sites_join_does_not_show(sites: list[Flat], monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(DeploymentGrid):
        looks = 0

        def get_node_ids(self) -> list[int]:
            self.looks += 1
            return list(self._contexts)[-min(3, 1 + self.looks // 4) :]  # the last one first, then one by one

    late = Late(merge(SMALL, OWN), node_configs=sites)
    played = play(OWN, grid=late)
    assert played.strategy.messenger.registry.names == dict(enumerate(NAMES))
    poller = [where[2] for where in late.log if where[0] == "query.hello"]
    assert poller == [2, 1, 0]
    assert played.bits() == own(sites).bits()


@pytest.mark.parametrize("strategy", ["ssfl", "fedavg"])
def test_a_run_on_own_data_learns(sites: list[Flat], strategy: str) -> None:
    keys: Flat = {"strategy": strategy, "run.rounds": 4, "run.evaluate-every": 4, "local.epochs": 4}
    played = own(sites, keys)
    last = played.records[-1]
    assert last["local_accuracy_mean"] > 0.6
    assert last["central_accuracy"] is None
    assert sorted(last["local_accuracy"]) == ["0", "1", "2"]


def test_without_own_data_nothing_is_said_of_clients() -> None:
    plain = play({"run.rounds": 1})
    assert all("client" not in p.metadata and "run" not in p.metadata for where, p in plain.grid.sent)


# ---- the run folder -----------------------------------------------------------------------------


def run(folder: Path, configs: list[Flat], keys: Flat | None = None) -> None:
    flat = merge(SMALL, OWN, {"run.checkpoint-every": 1, "run.out": str(folder)}, keys or {})
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(flat))
    server_app.app(DeploymentGrid(flat, node_configs=configs), context)


def test_the_run_folder_names_the_sites_and_what_they_hold(sites: list[Flat], tmp_path: Path) -> None:
    run(tmp_path / "run", sites, {"data.path": sites[0]["data-path"]})
    written = json.loads((tmp_path / "run" / "clients.json").read_text())
    assert written["class_names"] == list("0123456789")
    assert [row["name"] for row in written["clients"]] == list(NAMES)
    for row, site in zip(written["clients"], sites, strict=True):
        there = [len(list(Path(str(site["data-path"])).glob(f"train/{label}/*"))) for label in range(10)]
        assert row["train"] == there
        assert row["test_images"] == len(list(Path(str(site["data-path"])).glob("test/*/*")))
        assert 0 <= row["accuracy"] <= 1
    assert written["clients"][2]["train"][9] == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["partition"], summary["engine"]) == ("sites", "deployment")
    assert summary["central_accuracy"] is not None
    assert "3 clients on cpu, own data, cnn" in (tmp_path / "run" / "console.log").read_text()
    assert (tmp_path / "run" / "report.html").stat().st_size > 0


def test_without_a_central_test_set_the_summary_still_has_the_clients_accuracy(
    sites: list[Flat], tmp_path: Path
) -> None:
    run(tmp_path / "run", sites, {"run.rounds": 1})
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["central_accuracy"] is None
    assert summary["local_accuracy_mean"] > 0
    assert (tmp_path / "run" / "report.html").stat().st_size > 0


def test_a_run_resumes_with_the_same_sites_only(sites: list[Flat], tmp_path: Path) -> None:
    keys: Flat = {"run.rounds": 1, "run.join-timeout": 3.0}
    run(tmp_path / "run", sites, keys)
    token = (tmp_path / "run" / "checkpoint" / "token").read_text()
    other = [*sites[:2], {**sites[2], "name": "zurich"}]
    with pytest.raises(RunFailed, match=r"missing: cairo .*'zurich'; the sites of the run that is resumed are"):
        run(tmp_path / "run", other, keys | {"run.resume": True})
    run(tmp_path / "run", sites, keys | {"run.resume": True})
    assert (tmp_path / "run" / "checkpoint" / "token").read_text() == token
    assert len(token.strip()) == 16


# ---- who may be in it ---------------------------------------------------------------------------


def holding(**changes: Any) -> DataSummary:
    return DataSummary(
        **{"class_names": ("cat", "dog"), "shape": (3, 8, 8), "counts": (4, 5), "test_images": 3, **changes}
    )


DIFFERENT = [
    (holding(class_names=("cat", "eel")), "a has no 'eel'; b has no 'dog'. The cure: name all classes in"),
    (holding(class_names=("cat",), counts=(1,)), "a and b have different classes: b has no 'dog'."),
    (holding(class_names=("dog", "cat")), "a and b have the same classes in another order. The cure: name all"),
    (holding(shape=(1, 8, 8)), "a has 3x8x8, b has 1x8x8. The cure: set data.channels"),
    (holding(shape=(3, 8, 9)), "a has 3x8x8, b has 3x8x9. The cure: set data.image-size"),
    (holding(shape=(3, 8, 9, 2)), "a and b have inputs of different shapes: a has 3x8x8, b has 3x8x9x2"),
]


@pytest.mark.parametrize(("other", "words"), DIFFERENT, ids=[words for _, words in DIFFERENT])
def test_a_difference_names_both_sides_and_the_cure(other: DataSummary, words: str) -> None:
    assert words in str(mismatch("a", holding(), "b", other))
    assert mismatch("a", holding(), "b", holding(counts=(0, 7), test_images=9)) is None
    assert read_data_summary(other.metadata()) == other


@pytest.mark.parametrize(
    ("key", "value"),
    [("classes", "a\na"), ("classes", ""), ("counts", "1"), ("counts", "1,-2"), ("counts", "1,٣"), ("shape", "8,0")],
)
def test_a_holding_that_makes_no_sense_is_refused(key: str, value: str) -> None:
    with pytest.raises(PayloadError, match=f"{key} is"):
        read_data_summary(holding().metadata() | {key: value})


def small_sites(root: Path, parts: dict[str, dict[str, int]], channels: int = 1) -> list[Flat]:
    """Write sites {name: {class: images}} as folders, the same for training and test."""
    for name, classes in parts.items():
        for part in ("train", "test"):
            write_folder(root / name, {f"{part}/{c}": some_pixels(n, 8, channels) for c, n in classes.items()})
    return [{"name": name, "data-path": str(root / name), "least-batch": 1} for name in parts]


def test_sites_with_other_label_sets_are_told_and_the_cure_works(tmp_path: Path) -> None:
    both = small_sites(tmp_path, {"a": {"cat": 3, "dog": 2}, "b": {"cat": 3, "eel": 2}})
    keys: Flat = {"run.clients": 2, "run.cohort": 2, "run.rounds": 1, "data.path": str(tmp_path / "a")}
    keys["run.join-timeout"] = 3.0
    words = r"b and the server have different classes: b has no 'dog'; the server has no 'eel'. The cure"
    with pytest.raises(RunFailed, match=words):
        run(tmp_path / "one", both, keys | {"data.classes": ""})
    run(tmp_path / "two", both, keys | {"data.classes": "cat,dog,eel"})
    written = json.loads((tmp_path / "two" / "clients.json").read_text())
    assert [row["train"] for row in written["clients"]] == [[3, 2, 0], [3, 0, 2]]


def test_what_was_done_to_files_is_said_where_they_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = small_sites(tmp_path, {name: {"cat": 3, "dog": 2} for name in ("a", "b")}, channels=3)
    (tmp_path / "a" / "train" / "cat" / "Jane.doe").touch()
    keys: Flat = {"run.clients": 2, "run.cohort": 2, "run.rounds": 1, "data.classes": "cat,dog", "data.channels": 1}
    run(tmp_path / "one", both, keys)
    said, left = capsys.readouterr().out, "files and folders left out: 1 with endings that are no image's (1 .doe)"
    grey = "note: 10 of 10 images are colour and were made grey, as data.channels says"
    assert (said.count(f"note: {left}"), said.count(grey)) == (1, 2)  # in the nodes' logs, not at each message
    assert "note:" not in (tmp_path / "one" / "console.log").read_text()
    run(tmp_path / "two", both[1:], keys | {"data.path": both[0]["data-path"], "run.clients": 1, "run.cohort": 1})
    assert f"note: {left}\n{grey}\n" in (tmp_path / "two" / "console.log").read_text()


def test_a_site_with_too_few_images_for_the_norm_is_refused_by_name_before_the_first_round(tmp_path: Path) -> None:
    nodes = small_sites(tmp_path, {"a": {"cat": 3}, "b": {"cat": 1}})
    keys: Flat = {"run.clients": 2, "run.cohort": 2, "run.rounds": 1, "data.classes": "cat", "run.join-timeout": 3.0}
    keys |= {"model.name": "resnet18", "model.norm": "batch"}
    words = (
        r"1 of 2 .*\(node \d+ raised: .*ConfigError: this site has 1 training image\(s\) and trains on 1; it needs 2"
    )
    with pytest.raises(RunFailed, match=words):
        play(OWN | keys, node_configs=nodes)


def test_more_sites_than_clients_are_named_and_registered_ones_come_first(tmp_path: Path) -> None:
    three = small_sites(tmp_path, {name: {"cat": 2, "dog": 2} for name in "abc"})
    keys = OWN | {"data.classes": "cat,dog", "run.clients": 2, "run.cohort": 2, "run.rounds": 1}
    for registered, names in (("", "ab"), ("bc", "bc"), ("c", "ac")):
        grid, told = DeploymentGrid(merge(SMALL, keys), node_configs=three), list[str]()
        node = dict(zip("abc", grid._contexts, strict=True))

        def prepare(strategy: SparseStrategy) -> None:
            strategy.messenger.registry.say = told.append  # noqa: B023
            strategy.messenger.registry.bound = lambda: {name: node[name] for name in registered}  # noqa: B023

        played = play(keys, grid=grid, prepare=prepare)
        assert "".join(played.strategy.messenger.registry.names.values()) == names
        (out,) = set("abc") - set(names)
        line = f"warning: node {node[out]} is set aside: is site {out!r}; run.clients is 2: {', '.join(names)}"
        assert line in told
    twice = [three[0], three[0]]
    with pytest.raises(RunFailed, match=r"1 of 2 .*is site 'a', which node \d+ is; each needs its own name"):
        play(keys | {"run.join-timeout": 3.0}, node_configs=twice)


def test_a_client_whose_copy_of_a_shared_set_is_another_one_is_named(tmp_path: Path) -> None:
    images = some_pixels(20, 8, 1)
    for copy, labels in (("a", [0, 1] * 10), ("b", [1] * 10 + [0] * 10), ("c", [0, 2] * 10)):
        (tmp_path / copy).mkdir()
        for part in ("train", "test"):
            write_parquet(tmp_path / copy / f"{part}.parquet", ("img", images), {"label": labels})
    keys: Flat = {
        "data.where": "shared",
        "data.name": "parquet",
        "data.path": str(tmp_path / "a"),
        "data.classes": "",
    }
    keys |= {"data.channels": 0, "run.clients": 2, "run.cohort": 2, "run.rounds": 1, "partition.name": "iid"}
    keys["run.join-timeout"] = 3.0
    obeys, own_copy = {"server-data-path": True, "least-batch": 1}, {"partition-id": 1, "least-batch": 1}
    nodes: list[Flat] = [{"partition-id": 0, **obeys}, {**own_copy, "data-path": str(tmp_path / "a")}]
    run(tmp_path / "one", nodes, keys)
    nodes[1] = {**own_copy, "data-path": str(tmp_path / "c")}
    with pytest.raises(RunFailed, match="client 1 and the server have different classes: the server has no '2'"):
        run(tmp_path / "two", nodes, keys)
    nodes[1] = {**own_copy, "data-path": str(tmp_path / "nowhere")}
    with pytest.raises(RunFailed, match=r"missing: 1 \(node \d+ raised: .*NodeError.*data-path: there is no such"):
        run(tmp_path / "three", nodes, keys)


# ---- what a site's folder may look like ----------------------------------------------------------


def options(**keys: Any) -> Any:
    changed = {f"data.{key.replace('_', '-')}": value for key, value in keys.items()}
    return parse(merge(OWN, changed)).data


def test_classes_order_the_labels_and_one_may_be_missing(tmp_path: Path) -> None:
    small_sites(tmp_path, {"a": {"cat": 3, "dog": 2}}, channels=3)
    found = load_own(options(classes="eel, dog,cat", channels=0, image_size=0), str(tmp_path / "a"))
    assert found.class_names == ("eel", "dog", "cat")
    assert found.train.labels.tolist() == [1, 1, 2, 2, 2]
    assert found.shape == (3, 8, 8)
    assert load_own(options(classes="dog,cat", channels=1, image_size=4), str(tmp_path / "a")).shape == (1, 4, 4)
    with pytest.raises(ConfigError, match=r"train has a folder 'dog', data.classes names cat, eel"):
        load_own(options(classes="cat,eel"), str(tmp_path / "a"))


def test_parquet_labels_become_positions_in_classes(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    images = some_pixels(4, 8, 1)
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", ("img", images), {"label": [2, 0, 2, 0]})
    opts = {"name": "parquet", "channels": 0}
    assert load_own(options(classes="x,y,z", **opts), str(tmp_path)).train.labels.tolist() == [2, 0, 2, 0]
    with pytest.raises(ConfigError, match=r"has the label 2 without a name, data.classes names 2 classes: x, y"):
        load_own(options(classes="x,y", **opts), str(tmp_path))
    info = json.dumps({"info": {"features": {"label": {"names": ["cat", "dog", "eel"]}}}})
    for part in ("train", "test"):
        table = pq.read_table(tmp_path / f"{part}.parquet")
        pq.write_table(table.replace_schema_metadata({"huggingface": info}), tmp_path / f"{part}.parquet")
    found = load_own(options(classes="eel,cat", **opts), str(tmp_path))  # no image is a dog
    assert (found.class_names, found.train.labels.tolist()) == (("eel", "cat"), [0, 1, 0, 1])
    with pytest.raises(ConfigError, match=r"has images of class 'eel', data.classes names cat, dog"):
        load_own(options(classes="cat,dog", **opts), str(tmp_path))


def test_the_servers_images_only_test(tmp_path: Path) -> None:
    write_folder(tmp_path / "server", {"test/cat": some_pixels(3, 8, 1), "test/dog": some_pixels(1, 8, 1)})
    found = load_central(options(path=str(tmp_path / "server"), classes="cat,dog"))
    assert (len(found.test), found.class_names) == (4, ("cat", "dog"))
    with pytest.raises(ConfigError, match="train is missing"):
        load_own(options(classes="cat,dog"), str(tmp_path / "server"))
    none = load_central(options(path="", classes="cat,dog"))
    assert (len(none.test), none.classes, none.shape) == (0, 2, (1, 8, 8))
    for key, value in (("classes", ""), ("channels", 0), ("image_size", 0)):
        with pytest.raises(ConfigError, match=f"data.{key.replace('_', '-')} is {value!r}; with data.where 'sites'"):
            load_central(options(path="", **{key: value}))


# ---- keys ---------------------------------------------------------------------------------------


BAD_NODES = [
    ({}, "shared", "partition-id is missing in --node-config"),
    ({}, "sites", "name is missing in --node-config"),
    ({"name": "a"}, "sites", "data-path is missing in --node-config"),
    ({"name": "a", "data-path": "/a"}, "shared", "partition-id is missing"),
    ({"name": "a", "data-path": "/a", "partition-id": 1}, "sites", "partition-id is 1 in --node-config beside name"),
    ({"partition-id": 1, "name": "a"}, "shared", "name is 'a' in --node-config beside partition-id"),
    ({"name": "../a", "data-path": "/a"}, "sites", "name is '../a'"),
    ({"name": 3, "data-path": "/a"}, "sites", "name is 3"),
    ({"name": "a", "data-path": "a"}, "sites", "data-path is 'a' in --node-config; it is an absolute path"),
    ({"partition-id": "1"}, "shared", "partition-id is '1'"),
    ({"partition-id": -1}, "shared", "partition-id is -1"),
    (
        {"partition-id": 1, "state_path": "/s"},
        "shared",
        "state_path is not a key of --node-config; did you mean",
    ),
]


@pytest.mark.parametrize(("config", "where", "words"), BAD_NODES, ids=[words for _, _, words in BAD_NODES])
def test_a_bad_node_config_is_one_line_that_names_the_key(config: Flat, where: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_node_config(config, where)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_of_other_apps_are_left_alone() -> None:
    place = read_node_config({"partition-id": 2, "num-partitions": 4, "gpu": 1, "state-path": "/s"}, "shared")
    assert (place.number, place.name, place.data_path, place.state_path) == (2, "", "", Path("/s"))


def test_a_bad_node_config_reaches_the_user(sites: list[Flat]) -> None:
    with pytest.raises(RunFailed, match=r"\(node \d+ raised: .*data-path is missing in --node-config"):
        own([*sites[:2], {"name": "cairo"}])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"data.name": "digits"}, "data.name is 'digits'; with data.where 'sites' it is one of parquet, folder"),
        ({"data.classes": "a,,b"}, "data.classes is 'a,,b'; a class name is printable"),
        ({"data.classes": "a,a"}, "data.classes is 'a,a'"),
        ({"data.channels": 2}, "data.channels is 2; it is 0, 1 or 3"),
        ({"data.where": "here"}, "data.where is 'here'; it is one of shared, sites"),
        ({"data.where": "shared"}, "data.classes is '0,1,2,3,4,5,6,7,8,9'; it is '' with data.where 'shared'"),
        ({"shift.round": 2}, "shift.round is 2; it is 0 with data.where 'sites'"),
    ],
)
def test_keys_that_do_not_fit_together(keys: Flat, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(merge(SMALL, OWN, {"shift.clients": 1, "run.cohort": 2}, keys))
    assert str(caught.value).startswith(words)


def test_simulations_have_no_own_data(tmp_path: Path) -> None:
    from ssfl_app.simulation.command import Engine, RunArgs
    from ssfl_app.simulation.resolve import resolve

    for engine in ("ray", "inline"):
        command = RunArgs(
            None, ["data.where='sites' data.name='folder'"], None, Engine(engine), tmp_path / "run", None
        )
        with pytest.raises(ConfigError, match=r"data.where is 'sites'; own data need real SuperNodes"):
            resolve(command)


# ---- what survives ------------------------------------------------------------------------------


def token(strategy: SparseStrategy) -> None:
    strategy.messenger.token = TOKEN


def stateful(sites: list[Flat], tmp_path: Path) -> list[Flat]:
    return [{**site, "state-path": str(tmp_path / "state")} for site in sites]


def test_with_a_state_path_the_mask_survives_a_restart(sites: list[Flat], tmp_path: Path) -> None:
    faults = {("train", 2, client): forget for client in range(3)}
    with_path = own(stateful(sites, tmp_path), faults=faults, prepare=token)
    without = own(sites, faults=faults, prepare=token)
    assert with_path.bits() == without.bits()
    bitmap = -(-with_path.layout.prunable_size // 8)
    assert [played.records[2]["bytes_mask_down"] for played in (with_path, without)] == [0, 3 * bitmap]
    kept = sorted(p.relative_to(tmp_path / "state" / TOKEN) for p in (tmp_path / "state").glob("*/*/*"))
    assert kept == [Path(name, "client-00000") for name in NAMES]  # whatever number the server gives


def test_a_mask_file_answers_to_its_own_digest_only(tmp_path: Path) -> None:
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    ClientState(context, 1, tmp_path, survives=True).keep(DIGEST, np.array([1, 2, 3], np.uint8))
    assert not context.state
    again = ClientState(context, 1, tmp_path, survives=True)
    assert again.bitmap(DIGEST) is not None
    assert again.bitmap(DIGEST).tolist() == [1, 2, 3]  # type: ignore[union-attr]
    assert again.bitmap("f" * 64) is None
    assert again.bitmap("") is None
    assert again.bitmap("../client-00001/mask") is None
    again.keep("f" * 64, np.array([4], np.uint8))
    assert again.bitmap(DIGEST) is None
    assert [path.name for path in (tmp_path / "client-00001").iterdir()] == ["mask"]
    assert ClientState(context, 2, tmp_path, survives=True).bitmap("f" * 64) is None


@pytest.mark.parametrize("bad", ["../../x", "0123456789ABCDEF", "", "0" * 17, "0" * 16 + "\n"])
def test_a_token_that_is_no_token_never_becomes_a_path(tmp_path: Path, bad: str) -> None:
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    place = read_node_config({"partition-id": 0, "state-path": str(tmp_path / "state")}, "shared")
    with pytest.raises(PayloadError, match=r"run is .*; it is 16 hex digits"):
        client_node.memory_of(context, place, 0, {"run": bad})
    assert list(tmp_path.glob("**/client*")) == []


def test_personal_models_survive_a_restart_and_a_resume(sites: list[Flat], tmp_path: Path) -> None:
    keys: Flat = {"strategy": "ditto", "ditto.global-epochs": 1, "ditto.personal-epochs": 1, "run.rounds": 3}
    keys["run.checkpoint-every"] = 1
    whole = own(sites, keys, prepare=token)
    faults = {("train", 2, client): forget for client in range(3)}
    forgotten = own(sites, keys, faults=faults, prepare=token)
    assert forgotten.strategy.personal_accuracy != whole.strategy.personal_accuracy
    nodes = stateful(sites, tmp_path)
    kept = own(nodes, keys, faults=faults, prepare=token)
    assert kept.strategy.personal_accuracy == whole.strategy.personal_accuracy
    # The server breaks off after round 2, its checkpoint is of round 1, and no SuperNode knows anything by heart.
    snapshots: list[Any] = []

    def resumed(strategy: SparseStrategy) -> None:
        strategy.messenger.token = TOKEN[::-1]
        if snapshots:
            strategy.load_state_dict(1, snapshots[0])

    snapshots.append(own(nodes, keys, prepare=resumed, until=1).strategy.state_dict())
    own(nodes, keys, prepare=resumed, until=2)
    again = own(nodes, keys, prepare=resumed)
    assert again.strategy.personal_accuracy == whole.strategy.personal_accuracy
    assert again.bits() == whole.bits()


@pytest.mark.parametrize(
    "words", [["a b=."], ["=."], ["a="], ["a=nowhere"], ["-a=."], ["x" * 65 + "=."], ["a=.", "a=."]]
)
def test_sites_of_a_trial_federation_are_refused_by_the_words_that_name_them(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = [part for word in words for part in ("--site", word)]
    monkeypatch.setattr(sys, "argv", ["ssfl", "federation", "up", "--dir", str(tmp_path / "made"), *sites])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"--site is {words[-1]!r}" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_new_certificate_needs_the_key_of_the_authority_and_is_for_the_same_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"

    def ssfl(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ssfl", "federation", *words, "--dir", str(made)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out + err

    code, said = ssfl("certificate")
    assert code == 2
    assert f"--dir is {made}; it is a folder that `ssfl federation up` or `init` made" in said
    assert ssfl("init", "--host", "hub.example", "--name", "a", "--days", "3")[0] == 0
    first, key = (made / "superlink" / "server.pem").read_bytes(), (made / "nodes" / "a" / "key").read_bytes()
    hosts = credentials.hosts_of(made)
    assert "hub.example" in hosts
    assert ssfl("certificate", "--days", "9")[0] == 0
    assert (made / "superlink" / "server.pem").read_bytes() != first
    assert (made / "nodes" / "a" / "key").read_bytes() == key
    assert credentials.hosts_of(made) == hosts
    (made / "ca" / "ca.key").unlink()  # as on the SuperLink's host
    code, said = ssfl("certificate")
    assert code == 2
    assert f"--dir is {made}; it is a folder with ca/ca.key" in said
