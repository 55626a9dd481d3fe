"""What secure aggregation costs a client and the server: .venv/bin/python benchmarks/secure.py

Plays exchanges in this process, without a network, at the size of ResNet-18 at density 0.5: seconds of CPU, not of
a clock, so that other work on the machine counts little; medians of five exchanges. A client's are those of the
digest of what it is asked, a model of as many values in fp32, of its masks, and of its shares. Bytes are those of the
arrays of all four messages of a client. Results: benchmarks/results/secure.json. It fails if a goal of the product is
missed.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from ssfl_app.comm.payload import Payload  # noqa: E402
from ssfl_app.config import merge, parse  # noqa: E402
from ssfl_app.core.summand import question_digest, terms_of  # noqa: E402
from ssfl_app.files import write_json  # noqa: E402
from ssfl_app.privacy.keys import KeyPair  # noqa: E402
from ssfl_app.privacy.masking import MaskedSum, Masker, neighbours, write_peers  # noqa: E402
from ssfl_app.results.recorder import environment  # noqa: E402
from ssfl_app.sparsity.values import Arrays  # noqa: E402

VALUES, TURNS, THRESHOLD, WIDTH = 5_600_000, 5, 2 / 3, np.uint32
MOST_SECONDS, MOST_BYTES = 0.2, 20_000
"""Goals: CPU of a client at 9 neighbours, bytes of a client at 30, without dropouts."""


class Exchange:
    """An exchange of some clients, all neighbours of each other; `seconds` is the server's CPU so far."""

    def __init__(self, count: int, size: int, turn: int) -> None:
        self.about, self.size, self.seconds = f"benchmark, exchange {turn}".encode(), size, 0.0
        self.keys = {client: KeyPair.new() for client in range(count)}
        publics = {client: key.public for client, key in self.keys.items()}
        self.server = MaskedSum(size, WIDTH, neighbours(range(count), 1, turn), publics, self.about, THRESHOLD)
        self.bytes = {client: write_peers(self.server.peers(client)).nbytes for client in self.keys}
        self.expected = np.zeros(size, WIDTH)

    def masker(self, client: int) -> Masker:
        peers = self.server.peers(client)
        return Masker(self.keys[client], client, peers, self.about, THRESHOLD, WIDTH)

    def count(self, client: int, arrays: Arrays) -> None:
        self.bytes[client] += sum(array.nbytes for array in arrays.values())

    def timed(self, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        made = work()
        self.seconds += time.process_time() - began
        return made

    def play(self, uploaded: range, answered: range) -> None:
        for client in uploaded:
            values = np.random.default_rng(client).integers(0, 1 << 27, self.size, WIDTH)
            self.expected += values
            arrays = self.masker(client).mask(values)
            self.count(client, arrays)
            self.timed(lambda client=client, values=values, arrays=arrays: self.server.add(client, values, arrays))
        requests = self.timed(self.server.requests)
        for client in answered:
            answer = self.masker(client).unmask(requests[client])
            self.count(client, requests[client])
            self.count(client, answer)
            self.timed(lambda client=client, answer=answer: self.server.answer(client, answer))
        assert np.array_equal(self.timed(self.server.total), self.expected)


def client_seconds(count: int, size: int) -> list[float]:
    """Return the CPU of a client with `size` values among `count` clients, both messages, a row a turn."""
    exchange, values, first, second = Exchange(count, 1, 0), np.zeros(size, WIDTH), [], []
    terms = terms_of(parse(merge({"strategy": "ssfl", "privacy.secure-aggregation": True})).settings)
    asked = Payload({"values": np.zeros(size, np.float32)}, {"round": 1, "digest": "0" * 32})
    # The others' vectors are short, and no mask is removed: of them only what they sealed for this client matters.
    for client in range(1, count):
        exchange.server.add(client, short := np.zeros(1, WIDTH), exchange.masker(client).mask(short))
    for _ in range(TURNS):
        began = time.process_time()
        question_digest(asked, terms)
        arrays = exchange.masker(0).mask(values)
        first.append(time.process_time() - began)
    exchange.server.add(0, np.zeros(1, WIDTH), arrays)
    request = exchange.server.requests()[0]
    for _ in range(TURNS):
        began = time.process_time()
        exchange.masker(0).unmask(request)
        second.append(time.process_time() - began)
    return [sum(each) for each in zip(first, second, strict=True)]


def server_seconds(gone: int) -> list[float]:
    """Return the server's CPU for ten clients, of which `gone` drop out before each of the two answers."""
    rows = []
    for turn in range(TURNS):
        exchange = Exchange(10, VALUES, turn)
        exchange.play(range(gone, 10), range(gone, 10 - gone))
        rows.append(exchange.seconds)
    return rows


def summary(rows: list[float]) -> dict[str, object]:
    return {"median_seconds": round(statistics.median(rows), 4), "seconds": [round(row, 4) for row in rows]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "secure.json")
    words = parser.parse_args()
    record: dict[str, object] = {
        "date": date.today().isoformat(),
        "load": os.getloadavg()[0],
        "environment": environment(),
        "values": VALUES,
        "bits": 8 * np.dtype(WIDTH).itemsize,
        "threshold": THRESHOLD,
    }
    clients = {str(near): summary(client_seconds(near + 1, VALUES)) for near in (9, 30)}
    record["client_cpu_by_neighbours"] = clients
    record["client_cpu_of_one_value"] = {str(near): summary(client_seconds(near + 1, 1)) for near in (9, 30)}
    record["server_cpu_of_10_clients"] = {
        "no_dropout": summary(server_seconds(0)),
        "one_dropout_in_each_exchange": summary(server_seconds(1)),
    }
    sizes = {}
    for near in (9, 30):
        exchange = Exchange(near + 1, 1, 0)
        exchange.play(range(near + 1), range(near + 1))
        sizes[str(near)] = max(exchange.bytes.values())
    record["bytes_by_neighbours"] = sizes
    write_json(words.out, record)
    print({key: value for key, value in record.items() if key != "environment"})
    assert clients["9"]["median_seconds"] <= MOST_SECONDS
    assert sizes["30"] < MOST_BYTES


if __name__ == "__main__":
    main()
