"""Who speaks: sequences of 12 numbers, one for each of 29 moments, as JapaneseVowels has them, with an LSTM.

ssfl run speakers.toml          in a folder with this file
"""

import numpy as np
from torch import nn

SPEAKERS, MOMENTS, CHANNELS = 9, 29, 12


def vowels(path, per_speaker=60):
    """Return sequences that are made here: each speaker has frequencies and phases of their own, and noise."""
    rng = np.random.default_rng(0)
    frequency = rng.uniform(0.1, 0.5, (SPEAKERS, CHANNELS))
    phase = rng.uniform(0, 2 * np.pi, (SPEAKERS, CHANNELS))
    y = np.repeat(np.arange(SPEAKERS), per_speaker)
    moments = np.arange(MOMENTS)[:, None] + rng.integers(0, 4, len(y))[:, None, None]
    x = np.sin(frequency[y][:, None] * moments + phase[y][:, None]) + rng.normal(0, 0.7, (len(y), MOMENTS, CHANNELS))
    test = np.arange(len(y)) % 5 == 0
    return (x[~test], y[~test]), (x[test], y[test])


class Lstm(nn.Module):
    """Logits (batch, speakers) of sequences (batch, moments, channels)."""

    def __init__(self, input_shape, outputs, norm, width=64):
        super().__init__()
        self.lstm = nn.LSTM(input_shape[1], width, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x):
        return self.head(self.lstm(x)[0].mean(dim=1))
