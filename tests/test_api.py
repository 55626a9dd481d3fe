"""`ssfl_app.run` and `load_run`: what may be given, what comes back, and what is refused in one line."""

import functools
import json
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ssfl_app
from ssfl_app import api, registry
from ssfl_app.cli.main import main
from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.results.run_folder import read_run
from ssfl_app.results.status import read_status
from ssfl_app.sparsity.layout import Layout, state_digest, state_of
from ssfl_app.strategies.fedavg import FedAvg
from ssfl_app.training.tasks import Classification
from ssfl_app.training.trainer import LocalTrainer

pytestmark = pytest.mark.usefixtures("quiet_place")

FEW = {"clients": 4, "rounds": 2, "local_epochs": 1, "engine_concurrent": 1, "quiet": True}


class Net(nn.Sequential):
    """A factory and a model in one, as people write it."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, norm: str, width: int = 8) -> None:
        inputs = int(np.prod(input_shape))
        super().__init__(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


class Mine(FedAvg):
    """A strategy of a stranger's."""

    name = "mine"


class Half(Classification):
    """A task whose headline is half of the usual one."""

    def score(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().score(output, target) / 2


@pytest.fixture
def quiet_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(registry.FOLDER, "")
    return


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> api.Run:
    return ssfl_app.run(model=Net, density=0.3, out=tmp_path_factory.mktemp("api") / "run", **FEW)


def test_a_call_leaves_the_run_that_the_command_leaves(
    played: api.Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "run.clients=4 run.cohort=4 run.rounds=2 local.epochs=1 engine.concurrent=1 mask.density=0.3"
    command = ["ssfl", "run", "--quiet", "--out", "same", "-c", f"{words} model.name='tests.test_api:Net'"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert capfd.readouterr() == ("", "")
    same, summary = ssfl_app.load_run("same"), played.summary
    assert summary is not None
    assert same.summary is not None
    assert same.summary["model_sha256"] == summary["model_sha256"]
    mine, theirs = ({k: v for k, v in each.config.items() if k != "run.out"} for each in (played, same))
    assert mine == theirs
    files = [sorted(path.name for path in each.folder.iterdir()) for each in (played, same)]
    assert files[0] == files[1]


def test_what_comes_back_is_the_folder_and_what_was_learnt(played: api.Run) -> None:
    assert repr(played) == f"Run({str(played.folder)!r}: ssfl, density 0.299, seed 1, 2 of 2 rounds)"
    history = played.history
    assert list(history["round"]) == [1, 2]
    assert list(history["ok"]) == [4, 4]
    assert list(history["central_accuracy"]) == [entry["central_accuracy"] for entry in played.rounds]
    assert history["personal_accuracy_mean"].isna().all()
    assert history["mb_sent"].is_monotonic_increasing
    model, summary = played.model(), played.summary
    assert summary is not None
    assert state_digest(Layout.of(model), state_of(model)) == summary["model_sha256"]
    assert not model.training
    assert {name: bits.dtype for name, bits in played.mask.items()} == {
        "1.weight": torch.bool,
        "3.weight": torch.bool,
    }
    assert sum(int(bits.sum()) for bits in played.mask.values()) == summary["alive"]
    assert not state_of(model)["1.weight"][~played.mask["1.weight"]].any()
    assert len(played.plot().axes) == 2


def test_the_model_that_comes_back_has_the_accuracy_of_the_run(played: api.Run) -> None:
    from ssfl_app.data.dataset import DataOptions, load

    test, summary = load(DataOptions()).test, played.summary
    with torch.no_grad():
        said = played.model()(played.transform.test(test.inputs)).argmax(dim=1)
    assert summary is not None
    assert (said == test.targets).double().mean().item() == pytest.approx(summary["central_accuracy"], abs=1e-12)


def test_history_needs_no_pandas(played: api.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "find_spec", lambda name: None)
    rows = played.history
    assert [row["round"] for row in rows] == [1, 2]
    assert rows[0]["personal_accuracy_mean"] is None


def test_things_of_python_are_named_and_the_model_of_a_function_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy, a task and a partition of this module, a model made inside a function, and data as they are."""
    rng = np.random.default_rng(0)
    parts = [(rng.normal(size=(n, 5)).astype(np.float32), rng.integers(0, 3, n)) for n in (60, 30)]
    x, y = parts[1]

    def halves(input_shape: tuple[int, ...], outputs: int, norm: str) -> nn.Module:
        return nn.Sequential(nn.Linear(*input_shape, 4), nn.Tanh(), nn.Linear(4, outputs))

    run = ssfl_app.run(Mine, model=halves, data=parts, task=Half, partition="iid", out="own", **FEW)
    names = {key: run.config[key] for key in ("strategy", "task.name", "run.cohort", "model.name", "data.name")}
    assert list(names.values())[:4] == ["tests.test_api:Mine", "tests.test_api:Half", 4, "this_process:halves_1"]
    assert re.fullmatch(r"this_process:data_\d", names["data.name"])
    with torch.no_grad():
        right = (run.model()(torch.from_numpy(x)).argmax(dim=1) == torch.from_numpy(y)).double().mean().item()
    assert run.summary is not None
    assert run.summary["central_accuracy"] == pytest.approx(right / 2)
    again = ssfl_app.run(resume="own", quiet=True)  # the process that has these things goes on with it
    assert again.summary is not None
    assert again.summary["model_sha256"] == run.summary["model_sha256"]
    monkeypatch.delattr(registry._HERE, names["model.name"].partition(":")[2])  # as in another process
    said = f"model.name is {names['model.name']!r}; module this_process has no halves_1; it was made by the process"
    with pytest.raises(ConfigError, match=said):
        ssfl_app.run(resume="own", quiet=True)


def test_another_thing_of_the_same_name_has_another_one() -> None:
    def make(width: int) -> Any:
        def net(input_shape: tuple[int, ...], outputs: int, norm: str) -> nn.Module:
            return Net(input_shape, outputs, norm, width)

        return net

    one, other = make(3), make(4)
    assert registry.name_of(one) == registry.name_of(one) == "this_process:net_1"
    assert registry.name_of(other) == "this_process:net_2"
    assert registry.name_of(functools.partial(Net, width=3)) == "this_process:partial_1"
    assert registry.name_of(Net) == "tests.test_api:Net"
    assert registry.sources("this_process") == {}


SCRIPT = """
from torch import nn
import ssfl_app

def net(input_shape, outputs, norm, width=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, outputs))

if __name__ == "__main__":
    run = ssfl_app.run(model=net, model_options={"width": 6}, clients=4, rounds=1, local_epochs=1, out="run")
    print(run.config["model.name"], run.model()[1].weight.shape[0])
"""


def test_a_script_gives_its_own_functions_and_prints_plain_lines_into_a_pipe(tmp_path: Path) -> None:
    """They reach the processes that train, which are forks."""
    Path("script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "__main__:net 6"
    assert [line.split()[:2] for line in lines if line.startswith("round")] == [["round", "1/1"]]
    assert Path("run/console.log").read_text().splitlines() == lines[1:-1]


def test_the_rest_of_the_process_stays_as_it_was(played: api.Run) -> None:
    torch.set_num_threads(2)
    try:
        ssfl_app.run(model=Net, density=0.3, out="run", **FEW)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert read_run(Path("run")).summary["model_sha256"] == played.summary["model_sha256"]  # type: ignore[index]


def test_a_run_that_breaks_off_raises_and_goes_on(played: api.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, calls = LocalTrainer.fit, []

    def failing(self: LocalTrainer, *args: Any, **options: Any) -> float:
        calls.append(1)
        if len(calls) > 4:
            raise ValueError("the scanner is offline")
        return fit(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalTrainer, "fit", failing)
        with pytest.raises(RunFailed, match="0 of 4 clients answered well"):
            ssfl_app.run(model=Net, density=0.3, out="run", run_checkpoint_every=1, **FEW)
    broken = ssfl_app.load_run("run")
    assert read_status(broken.folder)["status"] == "failed"
    assert len(broken.history) == 1
    with pytest.raises(ConfigError, match="run does not tell what its model is for; it is one that is finished"):
        broken.model()
    whole = ssfl_app.run(resume="run", quiet=True)
    assert whole.summary is not None
    assert whole.summary["model_sha256"] == played.summary["model_sha256"]  # type: ignore[index]


def test_keys_are_spelled_as_python_and_toml_have_them() -> None:
    Path("my.toml").write_text("[run]\nrounds = 1\nclients = 3\ncohort = 2\n")
    run = ssfl_app.run("random", config="my.toml", local_lr=0.05, local_epochs=1, mask_min_per_layer=0, quiet=True)
    assert (run.config["strategy"], run.config["run.cohort"], run.config["local.lr"]) == ("random", 2, 0.05)
    nested = {"strategy": "fedavg", "local": {"epochs": 1}, "run.clients": 3, "run.rounds": 1, "data.path": ""}
    counted = ssfl_app.run(config=nested, cohort=np.int64(2), local_lr=np.float64(0.05), quiet=True)
    assert (counted.config["strategy"], counted.config["run.cohort"]) == ("fedavg", 2)


def test_an_older_or_dense_run_says_what_it_lacks(played: api.Run, tmp_path: Path) -> None:
    for name in ("config.toml", "rounds.jsonl", "summary.json"):
        (tmp_path / name).write_bytes((played.folder / name).read_bytes())
    run = ssfl_app.load_run(tmp_path)
    assert run.mask == {}
    with pytest.raises(ConfigError, match=r"model.safetensors cannot be read"):
        run.model()
    summary = json.loads((tmp_path / "summary.json").read_text())
    del summary["input"]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ConfigError, match="of this version or a later one"):
        ssfl_app.load_run(tmp_path).model()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"model": Net((4,), 2, "none")},
            "model.name is a Net that is made already; it is what makes it, ",
        ),
        ({"strategy": 3}, "strategy is 3; it is a name, or a function or class"),
        ({"task": Net}, "task.name is 'tests.test_api:Net'; this is type Net; it is a subclass of ssfl_app.Task"),
        ({"data": [1, 2]}, "data.name is 'this_process:data_"),
        ({"client": 4}, "client is not a key; did you mean clients?"),
        ({"trackers": "tensorboard"}, "trackers is not a key; did you mean run_trackers?"),
        ({"local_lr_decy": 1.0}, "local_lr_decy is not a key; did you mean local_lr_decay?"),
        ({"density": 0.1, "config": {"mask.density": 0.2}}, "mask.density is given twice, 0.2 and 0.1; give one"),
        ({"density": 1.7}, "mask.density is 1.7; it is a fraction in (0, 1]"),
        ({"engine": "spark"}, "engine is 'spark'; it is one of ray, inline"),
        ({"engine": "ray", "model": lambda *_: None}, "model.name is 'this_process:lambda_"),
        ({"clients": 4, "cohort": 5}, "run.cohort is 5; it is at most run.clients, 4"),
        ({"config": "missing.toml"}, "CONFIG is missing.toml; it is a TOML file"),
        ({"resume": True}, "resume is True; it is the path of a run folder"),
        ({"data": "folder", "data_path": "missing"}, "/missing'; there is no such folder, it is a folder with train"),
        ({"data": "table", "data_path": "missing.csv"}, "missing.csv'; there is no such file, it is a .csv or"),
        ({"strategy": "sslf"}, "strategy is 'sslf'; it is one of ssfl, "),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        ssfl_app.run(quiet=True, **given)
    assert "\n" not in str(caught.value)
    # A traceback ends with the documented name, whatever the error is inside.
    assert traceback.format_exception_only(caught.value)[-1] == f"ssfl_app.options.ConfigError: {caught.value}\n"
    assert caught.type is ssfl_app.ConfigError
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_module_is_not_here_is_a_documented_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "moved.py").write_text(
        "from torch import nn\ndef net(shape, outputs, norm):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    keys = {"clients": 2, "rounds": 1, "local_epochs": 1, "engine_concurrent": 1, "quiet": True}
    run = ssfl_app.run(model="moved:net", out="run", **keys)  # type: ignore[arg-type]
    assert run.model()[1].weight.shape == (10, 64)
    (tmp_path / "moved.py").unlink()
    monkeypatch.delitem(sys.modules, "moved")
    with pytest.raises(ConfigError, match=r"model\.name is .moved:net.; there is no module moved in") as caught:
        ssfl_app.load_run("run").model()
    assert caught.type is ssfl_app.ConfigError
