"""Apps of plain PyTorch under `SSFL`, as a new user writes them: Flower's quickstart, a NumPyClient, an LSTM, a GPT.

All are played on the in-process grid; `tests/system/test_examples.py` has real runs of the first two kinds.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ssfl_app import mask_gradients, sparse_numpy_mod
from tests.apps.trial import App, Arrays, Call, State, mean, moved, play, same, scores, state_of, top, watched

pytestmark = pytest.mark.slow


def made(kind: Any) -> Any:
    """Return a model, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind()


def chance(partition: int) -> torch.Generator:
    return torch.Generator().manual_seed(partition)


# ---- Flower's quickstart: a CNN, a shuffling DataLoader, SGD with momentum -------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 12, 3)
        self.pool = nn.MaxPool2d(2)
        self.fc1, self.fc2 = nn.Linear(12 * 3 * 3, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv2(self.pool(torch.relu(self.conv1(x)))))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


@cache
def images(partition: int) -> TensorDataset:
    """Return noise with one bright quarter, which is the class; more of them in later partitions."""
    count = 96 + 32 * partition
    labels = torch.randint(4, (count,), generator=chance(partition))
    x = torch.randn(count, 3, 12, 12, generator=chance(partition + 10))
    for image, label in zip(x, labels.tolist(), strict=True):
        image[:, 6 * (label // 2) : 6 * (label // 2) + 6, 6 * (label % 2) : 6 * (label % 2) + 6] += 2
    return TensorDataset(x, labels)


def loader(partition: int) -> Iterable[list[torch.Tensor]]:
    return DataLoader(images(partition), batch_size=32, shuffle=True, generator=chance(partition))


def train_net(net: Net, partition: int) -> dict[str, float]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.train()
    total = 0.0
    for x, y in loader(partition):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        mask_gradients(net)
        optimizer.step()
        total += loss.item()
    return {"train_loss": total, "num-examples": len(images(partition))}


def test_net(net: Net, partition: int) -> tuple[float, float]:
    x, y = images(partition).tensors
    with torch.no_grad():
        logits = net.eval()(x)
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()


test_net.__test__ = False  # type: ignore[attr-defined]


def net_scores(nodes: int) -> Arrays:
    told = []
    for partition in range(nodes):
        net = made(Net)
        x, y = next(iter(loader(partition)))
        told.append(scores(net, [F.cross_entropy(net(x), y)]))
    return mean(told, [len(images(partition)) for partition in range(nodes)])


def test_flowers_quickstart() -> None:
    calls: list[Call] = []
    app = ClientApp(mods=watched(calls))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        net = Net()
        net.load_state_dict(state_of(message))
        metrics = train_net(net, int(context.node_config["partition-id"]))
        records = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord(metrics)}  # type: ignore[arg-type]
        return Message(RecordDict(records), reply_to=message)  # type: ignore[arg-type]

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        net = Net()
        net.load_state_dict(state_of(message))
        partition = int(context.node_config["partition-id"])
        loss, accuracy = test_net(net, partition)
        metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(images(partition))}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    trial = play(app, calls, made(Net).state_dict(), nodes=3, rounds=4, density=0.2)
    alive = top(net_scores(3), 0.2)
    assert same(trial.mask, alive)
    assert moved(alive, [trial.arrays, *(state for c in trial.trained for state in (c.given, c.returned))]) == 0
    assert trial.strategy.history[0]["scored_by"] == {"gradient": 3}
    biases = 6 + 12 + 32 + 4
    assert trial.strategy.history[1]["bytes_train_up"] == 3 * 4 * (sum(map(np.sum, alive.values())) + biases)
    assert trial.told("eval_acc", "evaluate")[-1] > 0.9


def test_a_numpy_client() -> None:
    """The same network and data behind the old interface have the same mask."""

    class Client(NumPyClient):
        def __init__(self, partition: int) -> None:
            self.net, self.partition = Net(), partition

        def put(self, parameters: Any) -> None:
            pairs = zip(self.net.state_dict(), parameters, strict=True)
            self.net.load_state_dict({name: torch.tensor(value) for name, value in pairs})

        def fit(self, parameters: Any, config: Any) -> Any:
            self.put(parameters)
            told = train_net(self.net, self.partition)
            return [t.numpy() for t in self.net.state_dict().values()], int(told["num-examples"]), {}

        def evaluate(self, parameters: Any, config: Any) -> Any:
            self.put(parameters)
            loss, accuracy = test_net(self.net, self.partition)
            return loss, len(images(self.partition)), {"accuracy": accuracy}

    calls: list[Call] = []
    app = ClientApp(
        client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client(),
        mods=watched(calls, sparse_numpy_mod),
    )
    trial = play(app, calls, made(Net).state_dict(), nodes=3, rounds=4, density=0.2)
    alive = top(net_scores(3), 0.2)
    assert same(trial.mask, alive)
    assert moved(alive, [trial.arrays, *(state for c in trial.trained for state in (c.given, c.returned))]) == 0
    assert trial.told("accuracy", "evaluate")[-1] > 0.9


# ---- an LSTM: no matrix of it has a name that ends in "weight" -------------------------------------


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 12, batch_first=True)
        self.fc = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.lstm(x)[0][:, -1])


@cache
def series(partition: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return walks of ten steps, and whether their first coordinate ended above 0."""
    x = torch.randn(80, 10, 4, generator=chance(partition))
    return x, (x[:, :, 0].sum(1) > 0).long()


def test_an_lstm() -> None:
    def fit(state: State, partition: int) -> tuple[State, dict[str, float]]:
        net = Recurrent()
        net.load_state_dict(state)
        optimizer, (x, y), total = torch.optim.Adam(net.parameters(), lr=0.02), series(partition), 0.0
        for rows in torch.arange(80).split(16):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x[rows]), y[rows])
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 100.0)  # higher than it ever is
            mask_gradients(net)
            optimizer.step()
            total += loss.item()
        return net.state_dict(), {"loss": total / 5, "num-examples": 80}

    def test(state: State, partition: int) -> dict[str, float]:
        net, (x, y) = Recurrent(), series(partition)
        net.load_state_dict(state)
        return {"accuracy": (net(x).argmax(1) == y).float().mean().item(), "num-examples": 80}

    trial = App(fit, test).play(made(Recurrent).state_dict(), rounds=6, density=0.3)
    told = []
    for partition in range(2):
        net, (x, y) = made(Recurrent), series(partition)
        told.append(scores(net, [F.cross_entropy(net(x[:16]), y[:16])]))
    alive = top(mean(told, [80, 80]), 0.3)
    assert set(alive) == {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "fc.weight"}
    assert same(trial.mask, alive)
    assert trial.strategy.mask.count == int(0.3 * (48 * 4 + 48 * 12 + 2 * 12))
    assert moved(alive, [trial.arrays, *(state for c in trial.trained for state in (c.given, c.returned))]) == 0
    assert trial.told("accuracy", "evaluate")[-1] > 0.8


# ---- a small GPT: the head is the embedding's own tensor, under a second name ----------------------

WORDS, LENGTH, WIDTH = 12, 10, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.proj(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        nn.init.normal_(self.wte.weight, std=0.2)
        self.lm_head.weight = self.wte.weight

    def loss(self, text: torch.Tensor) -> torch.Tensor:
        x = self.wte(text[:, :-1]) + self.wpe(torch.arange(LENGTH))
        return F.cross_entropy(self.lm_head(self.norm(self.blocks(x))).flatten(0, 1), text[:, 1:].flatten())


@cache
def text(partition: int) -> torch.Tensor:
    """Return rows in which a word is followed by the one five further, from 64 beginnings."""
    first = torch.randint(WORDS, (64, 1), generator=chance(partition))
    return (first + 5 * torch.arange(LENGTH + 1)) % WORDS


def test_a_gpt_with_a_tied_head() -> None:
    def fit(state: State, partition: int) -> tuple[State, dict[str, float]]:
        model, total = Gpt(), 0.0
        model.load_state_dict(state)
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.03, betas=(0.9, 0.95))
        for rows in text(partition).split(16):
            optimizer.zero_grad(set_to_none=True)
            loss = model.loss(rows)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            mask_gradients(model)
            optimizer.step()
            total += loss.item()
        assert model.lm_head.weight is model.wte.weight
        return model.state_dict(), {"loss": total / 4, "num-examples": 64}

    trial = App(fit).play(made(Gpt).state_dict(), rounds=5, density=0.4)
    told = []
    for partition in range(2):
        model = made(Gpt)
        told.append(scores(model, [model.loss(text(partition)[:16])]))
    alive = top(mean(told, [64, 64]), 0.4)  # named_parameters has wte.weight, and not lm_head.weight once more
    assert trial.strategy.mask.count == sum(map(np.sum, alive.values()))
    alive |= {"lm_head.weight": alive["wte.weight"]}
    assert all(np.array_equal(there, alive[name]) for name, there in trial.mask.items())
    states = [trial.arrays, *(state for c in trial.trained for state in (c.given, c.returned))]
    assert moved(alive, states) == 0
    assert all(np.array_equal(state["wte.weight"], state["lm_head.weight"]) for state in states)
    assert np.count_nonzero(trial.arrays["lm_head.weight"]) > 0
    # The one tensor travels once.
    dense = sum(p.numel() for p in made(Gpt).parameters() if p.dim() < 2)
    assert trial.strategy.history[2]["bytes_train_up"] == 2 * 4 * (trial.strategy.mask.count + dense)
    losses = trial.told("loss")
    assert losses[-1] < 0.6 * losses[0]
