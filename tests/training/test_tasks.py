"""The built-in tasks against numpy by hand, through the one training loop."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssfl_app import client_app, registry, server_app
from ssfl_app.config import merge, parse
from ssfl_app.data.dataset import Samples
from ssfl_app.data.transform import AsTheyAre
from ssfl_app.metrics import ACCURACY
from ssfl_app.options import ConfigError
from ssfl_app.results.run_folder import read_run
from ssfl_app.simulation.in_process import run_inline
from ssfl_app.training.tasks import REGISTRY, Task, TaskOptions, make_task
from ssfl_app.training.trainer import EVALUATION_BATCH, LocalOptions, LocalTrainer

ROOT = Path(__file__).parents[2]
DATA = """
import numpy as np
from torch import nn

class Word(Tags):
    metric = "accuracy"

def data(path):
    x = np.random.default_rng(0).normal(size=(160, 3)).astype(np.float32)
    y = (x > 0).astype(np.int64)
    return (x[:120], y[:120]), (x[120:], y[120:])

def net(input_shape, outputs, norm):
    return nn.Linear(*input_shape, outputs)
"""
RNG = np.random.default_rng(7)
OPTIONS = LocalOptions(epochs=3, batch_size=4, lr=0.1, lr_decay=1.0, momentum=0.0, weight_decay=0.0, clip=0.0)


def numpy_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the loss of each answer: logits (n, classes), targets (n,)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(targets)), targets]


def numpy_dice(said: np.ndarray, true: np.ndarray, classes: int) -> float:
    """Return the Dice coefficient of one sample, class by class as a textbook has it."""
    found = []
    for each in range(1, classes):
        one, other = said == each, true == each
        if one.any() or other.any():
            found.append(2 * (one & other).sum() / (one.sum() + other.sum()))
    return float(np.mean(found)) if found else 1.0


def numbers(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def check(task: Task, output: np.ndarray, target: np.ndarray, losses: np.ndarray, scores: np.ndarray) -> None:
    """Compare with the loss and the score of each sample."""
    tensors = torch.from_numpy(output), torch.from_numpy(target)
    assert task.loss(*tensors).item() == pytest.approx(losses.mean(), rel=1e-5)
    assert task.total(*tensors).item() == pytest.approx(losses.sum(), rel=1e-5)
    assert task.score(*tensors).item() == pytest.approx(scores.sum(), rel=1e-6)


def test_classification_is_cross_entropy_and_right_answers() -> None:
    output, target = numbers(9, 4), RNG.integers(0, 4, 9)
    task = make_task(TaskOptions())
    check(task, output, target, numpy_cross_entropy(output, target), output.argmax(axis=1) == target)
    assert task.metric == ACCURACY
    assert task.classes
    assert not task.numbers


@pytest.mark.parametrize("width", [1, 3])
def test_regression_is_squared_error_and_absolute_error(width: int) -> None:
    output, target = numbers(8, width), numbers(8, width)
    task = make_task(TaskOptions(), "regression")
    apart = output - target
    check(task, output, target, (apart**2).mean(axis=1), np.abs(apart).mean(axis=1))
    if width == 1:  # a model without the last axis is not compared with each target
        check(task, output[:, 0], target, (apart**2).mean(axis=1), np.abs(apart).mean(axis=1))
    assert (task.metric.share, task.metric.higher, task.numbers) == (False, False, True)


def test_next_token_is_the_share_of_tokens_of_each_sequence() -> None:
    output, target = numbers(5, 6, 7), RNG.integers(0, 7, (5, 6))
    losses = numpy_cross_entropy(output.reshape(-1, 7), target.ravel()).reshape(5, 6).mean(axis=1)
    task = make_task(TaskOptions("next-token"))
    check(task, output, target, losses, (output.argmax(axis=2) == target).mean(axis=1))
    assert (task.metric.share, task.metric.higher) == (True, True)


@pytest.mark.parametrize("size", [(4, 5), (3, 4, 2)])
def test_segmentation_is_dice_over_the_classes_that_are_there(size: tuple[int, ...]) -> None:
    classes = 4
    output, target = numbers(6, classes, *size), RNG.integers(0, classes, (6, *size))
    target[target == 3] = 0  # class 3 is in no target, but predicted
    target[0] = 0  # no foreground, but predicted
    output[1, 0] += 100  # foreground, and none is predicted
    target[2], output[2, 0] = 0, 100  # none in either: all is right
    target[3] = output[3].argmax(axis=0)
    said = output.argmax(axis=1)
    scores = np.array([numpy_dice(one, other, classes) for one, other in zip(said, target, strict=True)])
    assert scores[:4].tolist() == [0, 0, 1, 1]
    flat = np.moveaxis(output, 1, -1).reshape(-1, classes)
    losses = numpy_cross_entropy(flat, target.ravel()).reshape(6, -1).mean(axis=1)
    check(make_task(TaskOptions("segmentation")), output, target, losses, scores)


def samples(name: str, count: int) -> tuple[Samples, nn.Module]:
    """Return data that can be learnt, and a model for them with all weights 0."""
    rng = np.random.default_rng(1)
    x, tokens = rng.normal(size=(count, 3)).astype(np.float32), rng.integers(0, 5, (count, 6))
    pixels = rng.normal(size=(count, 1, 4, 4)).astype(np.float32)
    torch.manual_seed(1)
    made: dict[str, tuple[np.ndarray, np.ndarray, nn.Module]] = {
        "classification": (x, (x[:, 0] > 0).astype(np.int64), nn.Linear(3, 2)),
        "regression": (x, x @ np.array([[1.0], [-2.0], [0.5]], dtype=np.float32), nn.Linear(3, 1)),
        "next-token": (tokens, (tokens + 1) % 5, nn.Sequential(nn.Embedding(5, 5), nn.Linear(5, 5))),
        "segmentation": (pixels, (pixels[:, 0] > 0).astype(np.int64), nn.Conv2d(1, 2, 1)),
    }
    inputs, targets, model = made[name]
    return Samples(torch.from_numpy(inputs), torch.from_numpy(targets)), model


@pytest.mark.parametrize("name", list(REGISTRY))
def test_the_training_loop_learns_each_task_and_tests_it_batch_by_batch(name: str) -> None:
    task = make_task(TaskOptions(name))
    trainer = LocalTrainer(OPTIONS, AsTheyAre(), torch.device("cpu"), task=task)
    data, model = samples(name, EVALUATION_BATCH + 3)
    before = trainer.evaluate(model, data)
    with torch.no_grad():
        output = model(data.inputs)
        whole = task.loss(output, data.targets).item(), task.score(output, data.targets).item() / len(data)
    assert before == pytest.approx(whole, rel=1e-5)
    part = Samples(data.inputs[:64], data.targets[:64])
    for _ in range(4):
        last = trainer.fit(model, part, np.random.default_rng(1), lr=0.1)
    after = trainer.evaluate(model, data)
    assert after[0] < before[0]
    assert last < before[0]
    assert task.metric.better(after[1], before[1])
    assert after[1] >= 0
    assert after[1] <= 1 or not task.metric.share


def test_options_reach_a_task_and_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Task):
        def __init__(self, width: int = 1) -> None:
            self.width = width

    monkeypatch.setitem(REGISTRY, "own", Own)
    made = make_task(TaskOptions("own", {"width": 3}))
    assert isinstance(made, Own)
    assert made.width == 3
    with pytest.raises(ConfigError, match=r"task.name is 'own'; called with \{'depth': 1\} it says .*depth"):
        make_task(TaskOptions("own", {"depth": 1}))
    with pytest.raises(ConfigError, match=r"task.name is 'auto'; called with \{'depth': 1\} it says"):
        make_task(TaskOptions(options={"depth": 1}))


def test_the_task_of_the_page_runs_from_the_folder_one_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(
        r"^```python tags\.py\n(.*?)^```", (ROOT / "docs" / "tasks.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (tmp_path / "tags_of_a_page.py").write_text(block + DATA)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(registry.FOLDER, "")
    registry.import_from(tmp_path)
    module = "tags_of_a_page"
    keys = {"task.name": f"{module}:Tags", "data.name": f"{module}:data", "model.name": f"{module}:net"}
    flat = merge(
        keys, {"run.clients": 2, "run.cohort": 2, "run.rounds": 2, "partition.name": "iid", "mask.density": 0.5}
    )
    try:
        run_inline(
            server_app.app, client_app.app, parse(flat | {"engine.concurrent": 1, "run.out": str(tmp_path / "r")})
        )
        with pytest.raises(
            ConfigError, match=r"this is type Word; it is a subclass of ssfl_app\.Task, with a Metric"
        ):
            parse(flat | {"task.name": f"{module}:Word"})
    finally:
        del sys.modules[module]
    run = read_run(tmp_path / "r")
    assert run.metric.name == "tags found"
    assert 0.7 < run.rounds[-1]["central_accuracy"] <= 1
    assert f"tags found: central  {100 * run.rounds[-1]['central_accuracy']:.2f}%" in capsys.readouterr().out
