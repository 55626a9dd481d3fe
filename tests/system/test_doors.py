"""The two doors to Flower, where tests of whole runs do not look."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.client import NumPyClient

from ssfl_app import client_app, runtime
from ssfl_app.client_app import SparseClient
from ssfl_app.comm.payload import ClientState, Payload, PayloadEncoder
from ssfl_app.config import merge, parse
from ssfl_app.results.recorder import Recorder
from ssfl_app.runtime import get_runtime
from ssfl_app.server_app import RecordingCallback, check_folder, default_folder
from ssfl_app.simulation.in_process import InlineGrid
from ssfl_app.simulation.prepared_run import plan
from ssfl_app.sparsity.codec import MaskedValues
from ssfl_app.sparsity.layout import state_of
from ssfl_app.sparsity.mask import Mask
from tests.in_process_grid import SMALL


def test_the_client_is_a_numpy_client_whose_arrays_are_the_alive_values() -> None:
    shop = get_runtime(merge(SMALL))
    memory = ClientState(Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={}), 0)
    client = SparseClient(shop.rule(3, memory))
    assert isinstance(client, NumPyClient)
    mask = Mask.random(shop.layout, 0.1, np.random.default_rng(0))
    values = MaskedValues().encode(shop.layout, state_of(shop.model), mask)["values"]
    config = {"round": 1, "digest": mask.digest}
    # Without the mask it asks; with the mask it trains; after that it holds it.
    client.array_names = ("values",)
    assert client.fit([values], config) == ([], 0, {"need": "mask"})
    for arrays, names in (([values, mask.packed()], ("values", "mask")), ([values], ("values",))):
        client.array_names = names
        (trained,), samples, metadata = client.fit(arrays, config)
        assert client.array_names == ("values",)
        assert client.get_parameters(config)[0] is trained
        assert trained.shape == values.shape == (mask.count + shop.layout.size - shop.layout.prunable_size,)
        assert not np.array_equal(trained, values)
        assert samples == len(shop.partition.train[3])
        assert metadata["digest"] == mask.digest
    loss, samples, metadata = client.evaluate([values], config)
    assert loss > 0
    assert samples == len(shop.partition.test[3])
    assert 0 <= metadata["accuracy"] <= 1


def test_a_message_is_translated_once_each_way_around_a_call_of_the_numpy_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: Counter[str] = Counter()

    def counted(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("get_properties", "fit", "get_parameters", "evaluate"):
        counted(SparseClient, name)
    for name in ("decode_arrays", "decode_metadata"):
        counted(client_app, name)
    counted(PayloadEncoder, "record")
    grid = InlineGrid(client_app.app, merge(SMALL), {7: 0})
    shop = get_runtime(merge(SMALL))
    values = MaskedValues().encode(shop.layout, shop.initial_state(), shop.dense)
    model = Payload(values, {"round": 1, "digest": shop.dense.digest})
    made = {"query.hello": ["get_properties"], "train": ["fit", "get_parameters"], "evaluate": ["evaluate"]}
    for kind, own in made.items():
        record = PayloadEncoder().record(Payload() if kind == "query.hello" else model)
        calls.clear()
        (reply,) = grid.send_and_receive([Message(record, 7, kind)])
        assert not reply.has_error()
        assert calls == Counter(["decode_arrays", "decode_metadata", "record", *own])


def test_a_gpu_that_flower_hides_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for there, visible, hidden in ((True, "", True), (True, "0", False), (False, "", False)):
        with monkeypatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", visible)
            patch.setattr(runtime.Path, "exists", lambda path, there=there: there and str(path) == "/dev/nvidia0")
            assert runtime.gpu_is_hidden() is hidden
    said: list[str] = []
    recorder = Recorder(tmp_path / "run", merge(SMALL), said.append)
    shop = get_runtime(merge(SMALL))
    site = {"code": runtime.code_digest(), "device": "cpu"}
    RecordingCallback(recorder, shop, {}).met({0: {**site, "gpu-is-hidden": False}})
    assert len(said) == 1
    RecordingCallback(recorder, shop, {}).met(
        {0: {**site, "gpu-is-hidden": False}, 1: {**site, "gpu-is-hidden": True}}
    )
    assert [line for line in said if "Flower hides it from the clients (num-gpus 0)" in line] == [said[-1]]
    assert "\n" not in said[-1]
    recorder.close()


def test_actors_share_the_gpus_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssfl_app.simulation.prepared_run.usable_cores", lambda: 16)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert plan(parse(merge({}))) == (10, 0.2)  # never more actors than the cohort has clients
    assert plan(parse(merge({"engine.actors": 4}))) == (4, 0.5)
    assert plan(parse(merge({"run.device": "cpu"}))) == (10, 0.0)


def test_a_folder_with_another_run_is_refused_by_plain_flwr_run_too(tmp_path: Path) -> None:
    from ssfl_app.config import write_toml
    from ssfl_app.options import ConfigError

    flat = merge(SMALL)
    check_folder(tmp_path, flat)
    (tmp_path / "config.toml").write_text(write_toml(flat))
    with pytest.raises(ConfigError, match="it holds a run already"):
        check_folder(tmp_path, flat)
    check_folder(tmp_path, {**flat, "run.resume": True})
    with pytest.raises(ConfigError, match=r"mask.density is 0.3; that run was started with 0.2"):
        check_folder(tmp_path, {**flat, "run.resume": True, "mask.density": 0.3})


def test_two_processes_cannot_write_one_folder(tmp_path: Path) -> None:
    from ssfl_app.options import ConfigError

    first = Recorder(tmp_path, {}, print)
    with pytest.raises(ConfigError, match="no other process is writing to"):
        Recorder(tmp_path, {}, print)
    first.close()
    Recorder(tmp_path, {}, print).close()


def test_the_default_folder_names_time_strategy_and_data() -> None:
    assert default_folder("ssfl", "digits").match("runs/????????-??????-ssfl-digits")


def test_the_code_digest_follows_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("a = 1\n", "a = 2\n"):
        (tmp_path / "module.py").write_text(text)
        monkeypatch.setattr(runtime.resources, "files", lambda _: tmp_path)
        runtime.code_digest.cache_clear()
        digest = runtime.code_digest()
        assert len(digest) == 16
        if text == "a = 1\n":
            first = digest
    assert digest != first
    monkeypatch.undo()
    runtime.code_digest.cache_clear()


def test_simulated_clients_share_one_file_for_one_mask(tmp_path: Path) -> None:
    bitmap = np.arange(200, dtype=np.uint8)
    contexts = [Context(run_id=1, node_id=i, node_config={}, state=RecordDict(), run_config={}) for i in (1, 2)]
    one, two = (ClientState(context, client, tmp_path) for client, context in enumerate(contexts))
    one.keep("abc", bitmap)
    assert two.bitmap("abc") is None  # the file is there, but client two was never given that mask
    two.keep("abc", bitmap)
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["abc"]
    assert two.bitmap("abc").tolist() == bitmap.tolist()
    assert len(str(contexts[0].state)) < 200
    (tmp_path / "masks" / "abc").unlink()
    assert one.bitmap("abc") is None
