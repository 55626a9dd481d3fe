"""DP-SGD on a site (privacy.level "record"): its batches, its noise, and what its rounds cost.

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar and Zhang, "Deep learning with differential privacy", CCS 2016,
algorithm 1. A batch holds each of a site's n samples with probability ``q = batch / n``; each sample's gradient is
cut to the length C, their sum gets Gaussian noise of standard deviation ``z C`` and is divided by the expected batch.

Two data sets are neighbours if one has a record more. n itself, which sets q, is taken as known to all.

What the steps cost is by `ssfl_app.privacy.accounting`; they are taken by `ssfl_app.training.private_step`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ssfl_app.privacy.accounting import steps_epsilon, steps_noise
from ssfl_app.privacy.options import PrivacyOptions
from ssfl_app.sparsity.values import PayloadError

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

    def epsilon(self, noise_multiplier: float, rounds: int, delta: float) -> float:
        """Return what `rounds` local rounds cost at this delta: every step of them, for one record more or less."""
        return steps_epsilon(noise_multiplier, self.rate, self.steps * rounds, delta)

    def noise_for(self, epsilon: float, delta: float, rounds: int) -> float:
        """Return the least noise multiplier with which `rounds` local rounds cost at most `epsilon`."""
        return steps_noise(self.rate, self.steps * rounds, epsilon, delta)


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
    noise = noise or sampling.noise_for(options.epsilon, options.delta, rounds)
    return terms | {"noise": noise, "begun": done + 1}


def spent(ledger: Mapping[str, int | float]) -> float:
    """Return the epsilon of all rounds that a site has begun."""
    sampling = Sampling(int(ledger["samples"]), int(ledger["batch"]), int(ledger["steps"]))
    return sampling.epsilon(ledger["noise"], int(ledger["begun"]), ledger["delta"])
