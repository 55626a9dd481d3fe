"""DP-SGD on a site (privacy.level "record"): its batches, its noise, and what its rounds cost.

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar and Zhang, "Deep learning with differential privacy", CCS 2016,
algorithm 1. A batch holds each of a site's n samples with probability ``q = batch / n``; each sample's gradient is
cut to the length C, their sum gets Gaussian noise of standard deviation ``z C`` and is divided by the expected batch.

Two data sets are neighbours if one has a record more. n itself, which sets q, is taken as known to all.

Accounting is by the privacy loss distribution of Poisson-sampled Gaussians, of dp-accounting; steps are by
`ssfl_app.training.private_step`.
"""

import functools
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ssfl_app.options import ConfigError
from ssfl_app.privacy.options import PrivacyOptions
from ssfl_app.sparsity.values import PayloadError

GRID = 1e-3
"""Between values of the privacy loss in its distribution; the bound holds for any, and is tighter for a finer one."""

Ledger = dict[str, int | float]
"""What a site remembers of a run: what its noise follows from, the noise, and how many rounds it has begun."""

_STATE_BYTES, _WORDS_AT, _WORDS = 5056, 24, 624  # of torch's Mersenne Twister: its state, as it is read and set


@dataclass(frozen=True)
class Sampling:
    """The batches of one local round: each of `steps` holds each of `samples` with probability `rate`.

    Attributes
    ----------
    batch : int
        Samples of a batch on average; sums of gradients are divided by it.
    """

    samples: int
    batch: int
    steps: int

    @classmethod
    def of(cls, samples: int, batch_size: int, epochs: int) -> "Sampling":
        """Return the batches of `epochs` passes, on average, over `samples` >= 1.

        Examples
        --------
        >>> Sampling.of(90, 16, epochs=2)
        Sampling(samples=90, batch=16, steps=12)
        """
        batch = min(batch_size, samples)
        return cls(samples, batch, -(-epochs * samples // batch))

    @property
    def rate(self) -> float:
        """The probability with which a sample is in a batch."""
        return self.batch / self.samples


@dataclass(frozen=True)
class PrivateSteps:
    """What a private local round is made with; what is random in it nobody else knows.

    Attributes
    ----------
    clip : float
        Largest Euclidean length of a record's gradient, C.
    noise_multiplier : float
        Standard deviation of the noise on a sum of gradients, by C.
    noise, choice : torch.Generator
        Of the noise, on the device of the model, and of the batches, on the CPU.
    """

    clip: float
    noise_multiplier: float
    sampling: Sampling
    noise: torch.Generator
    choice: torch.Generator


def needed(module: str) -> Any:
    """Return a module of the extra ``privacy``; ConfigError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0].replace("_", "-")
        raise ConfigError(
            f"privacy.level is not 'none'; {library} is not installed here: pip install \"ssfl-app[privacy]\""
        ) from error


def secret_generator(device: torch.device) -> torch.Generator:
    """Return a generator whose state is the operating system's random bytes: os.urandom, nothing of a run.

    A seed would not do on the CPU, where torch keeps 32 bits of it: all of them can be tried. So there the whole
    state of its Mersenne Twister is drawn. On a GPU the generator is Philox, with a key of 64 bits.
    """
    generator = torch.Generator(device)
    if device.type != "cpu":
        return generator.manual_seed(int.from_bytes(os.urandom(8), "little"))
    state = generator.get_state().numpy().copy()
    if state.nbytes != _STATE_BYTES:
        raise RuntimeError(f"torch's generator has a state of {state.nbytes} bytes; {_STATE_BYTES} are known here")
    words = np.frombuffer(os.urandom(4 * _WORDS), dtype=np.uint32)
    state[_WORDS_AT : _WORDS_AT + 8 * _WORDS] = words.astype(np.uint64).view(np.uint8)  # one in eight bytes
    return generator.set_state(torch.from_numpy(state))


@functools.lru_cache
def epsilon(noise_multiplier: float, sampling: Sampling, rounds: int, delta: float) -> float:
    """Return what `rounds` local rounds cost at this delta: every step of them, for one record more or less."""
    dp, pld = needed("dp_accounting"), needed("dp_accounting.pld")
    # A step's loss grows by the square of 1 / noise, and on one grid for all so would the memory.
    grid = GRID * max(1.0, 1 / (2 * noise_multiplier) ** 2)
    accountant = pld.PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE, grid)
    return float(accountant.compose(_event(dp, noise_multiplier, sampling, rounds)).get_epsilon(delta))


@functools.lru_cache
def noise_multiplier(wanted: float, delta: float, sampling: Sampling, rounds: int) -> float:
    """Return the least noise multiplier, to a thousandth, with which `rounds` cost at most epsilon `wanted`."""
    dp, pld = needed("dp_accounting"), needed("dp_accounting.pld")
    return float(
        dp.calibrate_dp_mechanism(
            lambda: pld.PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE, max(GRID, 1e-4 * wanted)),
            lambda noise: _event(dp, noise, sampling, rounds),
            wanted,
            delta,
            dp.LowerEndpointAndGuess(0.0, 2.0),
            tol=1e-3,
        )
    )


def _event(dp: Any, noise: float, sampling: Sampling, rounds: int) -> Any:
    step = dp.PoissonSampledDpEvent(sampling.rate, dp.GaussianDpEvent(noise))
    return dp.SelfComposedDpEvent(step, sampling.steps * rounds)


def begun(ledger: Mapping[str, int | float], options: PrivacyOptions, sampling: Sampling, rounds: int) -> Ledger:
    """Return a site's ledger with one more round in it; empty before the first one of a run.

    A round counts when it begins: one whose answer is lost, or that is played again, was paid for too. With
    privacy.epsilon the noise is that of a site which takes part in all `rounds` of the run.

    Raises
    ------
    PayloadError
        The budget does not pay for another round; or the site has other data, or other options, than before.
    """
    terms: Ledger = {
        "samples": sampling.samples,
        "batch": sampling.batch,
        "steps": sampling.steps,
        "rounds": rounds,
        "delta": options.delta,
        "epsilon": options.epsilon,
        "noise-multiplier": options.noise_multiplier,
    }
    for name, value in terms.items() if ledger else ():
        if ledger[name] != value:
            raise PayloadError(
                f"{name} is {value}; this client began its private rounds with {ledger[name]}, and another has other "
                "costs"
            )
    done = int(ledger["begun"]) if ledger else 0
    if options.epsilon and done >= rounds:
        raise PayloadError(
            f"privacy.epsilon is {options.epsilon:g}; it pays for {rounds} rounds of this client, which has begun "
            f"{done} and answers no more"
        )
    noise = ledger["noise"] if ledger else options.noise_multiplier
    noise = noise or noise_multiplier(options.epsilon, options.delta, sampling, rounds)
    return terms | {"noise": noise, "begun": done + 1}


def spent(ledger: Mapping[str, int | float]) -> float:
    """Return the epsilon of all rounds that a site has begun."""
    sampling = Sampling(int(ledger["samples"]), int(ledger["batch"]), int(ledger["steps"]))
    return epsilon(ledger["noise"], sampling, int(ledger["begun"]), ledger["delta"])
