"""The simulated clock: how long a round would have taken on clients of stated speeds behind stated links.

For one exchange, a client that answered well takes, in seconds,

    (3 passes + looks) F / speed
    + h (bytes down / rate down + bytes up / rate up)
    + (d messages down + u messages up) RTT

``passes`` are samples that went forward and backward, ``looks`` those that went forward only, as replies state them.
F are the floating-point operations of a forward pass of one sample, as torch counts them; a backward pass counts as
two forward ones (Kaplan et al., "Scaling laws for neural language models", arXiv 2001.08361, section 2.1). Dead
weights are multiplied like others. Bytes are payload bytes of the encoded arrays, masks with them. h, d and u are
`HEADERS`, `TRIPS_DOWN` and `TRIPS_UP` of messages between a SuperLink and the nodes of `ssfl federation`, read from a
record (docs/wan.md).

An exchange takes as long as its slowest reply that counts, or until it closes (`closing`), a round as long as its
exchanges one after the other. No clock of this machine is read. Evaluation is left out: it is how a study looks at a
run. So are the server's work, its own link, and what Flower waits between polls.
"""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssfl_app.comm.exchange import ExchangeReport, Traffic
from ssfl_app.options import ConfigError, option
from ssfl_app.seeding import generator

FORWARD_PASSES = 3
"""What a forward and a backward pass cost, in forward passes."""

HEADERS = 1.04
"""IP bytes of a message by its payload bytes."""

TRIPS_DOWN, TRIPS_UP = 4, 4
"""Round trips of one message: requests, what they wait for, and windows that grow."""

COLUMNS = ("gflops", "down_mbit", "up_mbit", "rtt_ms")
"""Of a CSV file of clients."""


@dataclass(frozen=True)
class Capacity:
    """What a client computes and how it is reached.

    Attributes
    ----------
    speed : float
        Floating-point operations a second, in training.
    down, up : float
        Bits a second from the server and to it.
    rtt : float
        Round-trip time in seconds.
    """

    speed: float
    down: float
    up: float
    rtt: float

    def seconds(self, flops: float, traffic: Traffic) -> float:
        """Return how long so many floating-point operations and these messages take, one after the other."""
        moved = 8 * HEADERS * (traffic.bytes_down / self.down + traffic.bytes_up / self.up)
        trips = TRIPS_DOWN * traffic.messages_down + TRIPS_UP * traffic.messages_up
        return flops / self.speed + moved + trips * self.rtt


@dataclass(frozen=True)
class Profile:
    """Clients of a kind: client k has row k modulo their number.

    With a `spread` its speed is multiplied by exp(spread * z), and so are both its rates with another z: two draws
    from a standard normal distribution, by the seed of the run.
    """

    rows: tuple[Capacity, ...]
    spread: float = 0.0

    def capacity(self, seed: int, client: int) -> Capacity:
        """Return what a client of a run has."""
        row = self.rows[client % len(self.rows)]
        if not self.spread:
            return row
        draws = generator(seed, "clock", client).standard_normal(2)
        compute, network = (math.exp(self.spread * float(z)) for z in draws)
        return Capacity(row.speed * compute, row.down * network, row.up * network, row.rtt)


# docs/clock.md has the sources of these numbers, and says which of them are assumptions.
GPU, PHONE = 0.3 * 8.1e12, 20e9
DECADE = math.log(10) / (2 * 1.6449)
"""With this spread nine clients of ten are within a factor of ten."""

PROFILES: dict[str, Profile] = {
    "lan": Profile((Capacity(GPU, 1e9, 1e9, 0.0002),)),
    "hospital": Profile((Capacity(GPU, 100e6, 100e6, 0.021), Capacity(GPU, 1e9, 1e9, 0.021))),
    "mobile": Profile((Capacity(PHONE, 35.96e6, 11.22e6, 0.040),), DECADE),
    "wan": Profile(tuple(Capacity(GPU, 50e6, 50e6, ms / 1e3) for ms in (0.12, 12.61, 88.70, 76.72, 91.69))),
}


@dataclass(frozen=True)
class ClockOptions:
    """Keys of the section ``clock``."""

    profile: str = option(
        f"{', '.join(PROFILES)}, a CSV file with the columns {', '.join(COLUMNS)}, or empty",
        lambda name: name in ("", *PROFILES) or name.endswith(".csv"),
        "",
        "whose time a simulation tells (docs/clock.md); empty: nobody's",
        (*PROFILES, "FILE.csv"),
    )


def find_profile(name: str) -> Profile:
    """Return a profile by its name, or the clients of a CSV file, a row each; with more clients its rows repeat.

    Raises
    ------
    ConfigError
        The file cannot be read, or has other columns or values than it must.
    """
    if name in PROFILES:
        return PROFILES[name]
    try:
        with Path(name).open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"clock.profile is {name!r}; it is a CSV file that can be read ({error})") from error
    if not lines or set(lines[0]) != set(COLUMNS):
        found = ", ".join(map(str, lines[0])) if lines else "no row"
        raise ConfigError(f"clock.profile is {name!r} with {found}; its columns are {', '.join(COLUMNS)}")
    return Profile(tuple(_capacity(name, number, line) for number, line in enumerate(lines, start=2)))


def _capacity(name: str, number: int, line: dict[str, str]) -> Capacity:
    def value(column: str) -> float:
        least = 0 if column == "rtt_ms" else math.ulp(0.0)
        try:
            found = float(line[column])
        except (TypeError, ValueError):
            found = math.nan
        if not least <= found < math.inf:
            rule = "a number of at least 0" if least == 0 else "a number above 0"
            raise ConfigError(
                f"clock.profile is {name!r}; {column} in line {number} is {line[column]!r}: it is {rule}"
            )
        return found

    return Capacity(1e9 * value("gflops"), 1e6 * value("down_mbit"), 1e6 * value("up_mbit"), value("rtt_ms") / 1e3)


class Clock:
    """Tells how long the exchanges of a run take.

    Parameters
    ----------
    profile : Profile
    seed : int
        Of the run.
    forward_flops : callable
        Floating-point operations of a forward pass of one sample by the model of this moment.
    """

    def __init__(self, profile: Profile, seed: int, forward_flops: Callable[[], int]) -> None:
        self._profile, self._seed, self._forward_flops = profile, seed, forward_flops

    def client_seconds(self, report: ExchangeReport) -> dict[int, float]:
        """Return how long each client took that answered well, in one exchange, by client."""
        flops, found = self._forward_flops(), dict[int, float]()
        for client in sorted(report.examples):
            passes, looks = report.examples[client]
            capacity = self._profile.capacity(self._seed, client)
            found[client] = capacity.seconds((FORWARD_PASSES * passes + looks) * flops, report.traffic[client])
        return found

    def seconds(self, report: ExchangeReport) -> float:
        """Return how long an exchange took, and those that belong to it, one after the other."""
        end = report.seconds
        if end is None:
            found = self.client_seconds(report)
            end = max((found[client] for client in report.ok), default=0.0)
        return end + math.fsum(map(self.seconds, report.further))
