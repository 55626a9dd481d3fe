"""Apps of other libraries under `SSFL`, as a new user writes them: Lightning, HF Trainer with LoRA, Opacus, sklearn.

All are played on the in-process grid; `tests/system/test_examples.py` plays the LoRA app with ``flwr run``.
"""

import gc
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ssfl_app import mask_gradients
from tests.apps.trial import App, Call, State, mean, moved, play, same, scores, top, watched

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


def mlp() -> nn.Sequential:
    """Return a small network, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))


@cache
def points(partition: int) -> TensorDataset:
    """Return 80 points, 20 more in later partitions, and which of their first three numbers is largest."""
    x = torch.randn(80 + 20 * partition, 10, generator=torch.Generator().manual_seed(partition))
    return TensorDataset(x, x[:, :3].argmax(1))


def accuracy(net: nn.Module, partition: int) -> dict[str, float]:
    x, y = points(partition).tensors
    return {"accuracy": (net(x).argmax(1) == y).float().mean().item(), "num-examples": len(x)}


# ---- Lightning: the optimizer gets a closure, which makes the gradients ----------------------------


@pytest.mark.parametrize("batches", [1, 3])
def test_lightning(batches: int, tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning")

    class Lit(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            mask_gradients(self)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.05)

    def fit(state: State, partition: int) -> tuple[State, dict[str, float]]:
        model = Lit()
        model.load_state_dict(state)
        trainer = lightning.Trainer(
            max_epochs=3,
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that so small a loader should have workers
            trainer.fit(model, DataLoader(points(partition), batch_size=20))
        return model.state_dict(), {"num-examples": len(points(partition))}

    def test(state: State, partition: int) -> dict[str, float]:
        model = Lit()
        model.load_state_dict(state)
        return accuracy(model.net, partition)

    trial = App(fit, test).play(Lit().state_dict(), density=0.25, saliency_batches=batches)
    told = []
    for partition in range(2):
        model = Lit()
        rows = list(DataLoader(points(partition), batch_size=20))[:batches]
        told.append(scores(model, [F.cross_entropy(model.net(x), y) for x, y in rows]))
    alive = top(mean(told, [80, 100]), 0.25)
    assert same(trial.mask, alive)
    assert trial.strategy.history[0]["scored_by"] == {"gradient": 2}
    assert moved(alive, [trial.arrays, *(state for c in trial.trained for state in (c.given, c.returned))]) == 0
    # Nothing moved while the weights were scored.
    assert all(same(call.given, call.returned) for call in trial.calls[:2])
    assert trial.told("accuracy", "evaluate")[-1] > 0.8


# ---- Hugging Face: Trainer, peft's LoRA, whose B begins at zero ------------------------------------


@pytest.fixture
def quick_collections() -> Iterator[None]:
    """Have the collections that accelerate asks for pass over what is imported already: a second each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_trainer_with_lora(quick_collections: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The app of examples/lora, whose adapters are all that travels."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(EXAMPLES / "lora" / "after")
    from lora import task  # type: ignore[import-not-found]

    def adapters(state: State) -> Any:
        model = task.get_model()
        peft.set_peft_model_state_dict(model, dict(state))
        return model

    def fit(state: State, partition: int) -> tuple[State, dict[str, float]]:
        model, text = adapters(state), task.Text(partition)
        loss = task.train(model, text, 0.01, partition)
        return peft.get_peft_model_state_dict(model), {"loss": loss, "num-examples": len(text)}

    def test(state: State, partition: int) -> dict[str, float]:
        return {"loss": task.test(adapters(state), task.Text(partition)), "num-examples": 64}

    initial = peft.get_peft_model_state_dict(task.get_model())
    trial = App(fit, test).play(initial, rounds=3, density=0.25)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lora"]:
        del sys.modules[name]
    down, up = [n for n in initial if "lora_A" in n], [n for n in initial if "lora_B" in n]
    assert len(down) == len(up) == 6
    assert all(not initial[name].any() for name in up)
    # No adapter was cut: both its halves are alive, and its B, which began at zero, is not zero any more.
    first = trial.trained[0].given
    assert all(np.count_nonzero(first[name]) for name in down)
    assert all(np.count_nonzero(trial.arrays[name]) for name in up)
    assert trial.strategy.mask.count == int(0.25 * 3072)
    assert moved(trial.mask, [trial.arrays, *(state for c in trial.trained for state in (c.given, c.returned))]) == 0
    losses = trial.told("loss", "evaluate")
    assert losses[-1] < 0.8 * losses[0]
    assert trial.strategy.history[2]["bytes_train_up"] == 2 * 4 * int(0.25 * 3072)


def test_trainer_updates_a_few_weights_of_a_tiny_llama(
    quick_collections: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks instead of adapters: `SSFL(dead="frozen", criterion="gradient")` on the base model of examples/lora."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(EXAMPLES / "lora" / "after")
    from lora import task

    def llama() -> Any:
        return task.get_model().unload()  # the base, whose weights are frozen for the adapters

    def loaded(state: State) -> Any:
        model = llama()
        model.load_state_dict(state)
        return model.requires_grad_(True)

    def fit(state: State, partition: int) -> tuple[State, dict[str, float]]:
        model, text = loaded(state), task.Text(partition)
        loss = task.train(model, text, 0.02, partition)
        return model.state_dict(), {"loss": loss, "num-examples": len(text)}

    def test(state: State, partition: int) -> dict[str, float]:
        return {"loss": task.test(loaded(state), task.Text(partition)), "num-examples": 64}

    initial = {name: tensor.clone() for name, tensor in llama().state_dict().items()}
    frozen = {"dead": "frozen", "criterion": "gradient", "fraction_evaluate": 1.0}
    trial = App(fit, test).play(initial, rounds=3, density=0.01, **frozen)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lora"]:
        del sys.modules[name]
    mask, size = trial.mask, sum(alive.size for alive in trial.mask.values())
    assert trial.strategy.mask.count == int(0.01 * size)
    for state in [trial.arrays, *(each for call in trial.trained for each in (call.given, call.returned))]:
        for name, alive in mask.items():
            assert (state[name] == initial[name].numpy())[~alive].all()
    changed = sum(int((trial.arrays[name] != initial[name].numpy()).sum()) for name in mask)
    assert changed > 0.9 * trial.strategy.mask.count
    rest = trial.strategy.mask.transmitted.sum() - trial.strategy.mask.count
    assert trial.strategy.history[2]["bytes_train_up"] == 2 * 4 * (int(0.01 * size) + rest)
    # Once, to each of two nodes: the bitmap, what is frozen, and the sheet of names.
    kept = trial.strategy.history[1]["bytes_mask_down"]
    assert kept > 2 * 4 * (size - trial.strategy.mask.count)
    assert trial.strategy.history[2]["bytes_mask_down"] == 0
    losses = trial.told("loss", "evaluate")
    assert losses[-1] < losses[0]


# ---- Opacus: the optimizer makes the gradients itself, inside step() -------------------------------

NOISE, NORM = 0.3, 1.0


def private_gradients(net: nn.Module, x: torch.Tensor, y: torch.Tensor, chance: torch.Generator) -> State:
    """Return gradients of a minibatch, clipped example by example, summed, with noise: DP-SGD."""
    parameters = dict(net.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for example, label in zip(x, y, strict=True):
        loss = F.cross_entropy(net(example[None]), label[None])
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient * min(1.0, NORM / (norm.item() + 1e-6))
    noise = {name: torch.normal(0.0, NOISE * NORM, p.shape, generator=chance) for name, p in parameters.items()}
    return {name: (total[name] + noise[name]) / len(x) for name in parameters}


def test_opacus() -> None:
    opacus = pytest.importorskip("opacus")

    def fit(state: State, partition: int) -> tuple[State, dict[str, float]]:
        net = mlp()
        net.load_state_dict(state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this noise is not cryptographic
            private, optimizer, loader = opacus.PrivacyEngine().make_private(
                module=net,
                optimizer=torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9),
                data_loader=DataLoader(points(partition), batch_size=20),
                noise_multiplier=NOISE,
                max_grad_norm=NORM,
                poisson_sampling=False,
                noise_generator=torch.Generator().manual_seed(partition),
            )
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(private(x), y).backward()
                mask_gradients(private)
                optimizer.step()
        return net.state_dict(), {"num-examples": len(points(partition))}

    def test(state: State, partition: int) -> dict[str, float]:
        net = mlp()
        net.load_state_dict(state)
        return accuracy(net, partition)

    trial = App(fit, test).play(mlp().state_dict(), rounds=5, density=0.25)
    told = []
    for partition in range(2):
        net, (x, y) = mlp(), points(partition).tensors
        gradients = private_gradients(net, x[:20], y[:20], torch.Generator().manual_seed(partition))
        state = net.state_dict()
        told.append({n: (g * state[n]).abs().double().numpy() for n, g in gradients.items() if g.dim() > 1})
    alive = top(mean(told, [80, 100]), 0.25)
    assert same(trial.mask, alive)
    assert moved(alive, [trial.arrays, *(state for c in trial.trained for state in (c.given, c.returned))]) == 0
    assert trial.told("accuracy", "evaluate")[-1] > 0.6


# ---- scikit-learn: no torch, no names, and all weights are zero at the start -----------------------


def test_scikit_learn_from_zeros() -> None:
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))

    def part(partition: int) -> tuple[Any, Any]:
        rows = order[: 400 + 200 * partition] if partition else order[1000:1400]
        return digits.data[rows] / 16, digits.target[rows]

    def model(parameters: list[Any]) -> Any:
        made = LogisticRegression(max_iter=3, warm_start=True)
        made.classes_ = np.arange(10)
        made.coef_, made.intercept_ = (np.array(values, dtype=np.float64) for values in parameters)
        return made

    def fitted(parameters: list[Any], partition: int) -> list[Any]:
        made = model(parameters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that three iterations are few
            made.fit(*part(partition))
        return [made.coef_, made.intercept_]

    calls: list[Call] = []
    app = ClientApp(mods=watched(calls))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition, came = int(context.node_config["partition-id"]), message.content["arrays"].to_numpy_ndarrays()
        metrics = MetricRecord({"num-examples": len(part(partition)[1])})
        records = {"arrays": ArrayRecord(fitted(came, partition)), "metrics": metrics}
        return Message(RecordDict(records), reply_to=message)  # type: ignore[arg-type]

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        x, y = part(int(context.node_config["partition-id"]))
        right = model(message.content["arrays"].to_numpy_ndarrays()).score(x, y)
        metrics = MetricRecord({"accuracy": float(right), "num-examples": len(y)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    zeros = [np.zeros((10, 64)), np.zeros(10)]
    trial = play(app, calls, ArrayRecord(zeros), nodes=2, rounds=4, density=0.3, prunable=["0"])
    # Nothing steps, so a whole training stands in; |w0 - w1| where |w0 * (w0 - w1)| is 0 everywhere.
    told = [{"0": np.abs(fitted(zeros, partition)[0])} for partition in range(2)]
    alive = top(mean(told, [400, 600]), 0.3)
    assert same(trial.mask, alive)
    assert trial.strategy.history[0]["scored_by"] == {"difference": 2}
    assert moved(alive, [trial.arrays, *(call.given for call in trial.trained)]) == 0
    assert trial.arrays["0"].dtype == np.float64
    assert trial.told("accuracy", "evaluate")[-1] > 0.85
