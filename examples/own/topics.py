"""Next character of Python's own help pages, 79 natural clients, with a transformer.

ssfl run topics.toml            in a folder with this file
"""

import math
from pydoc_data.topics import topics

import torch
from torch import nn

LENGTH = 32


def pages(path, length=LENGTH):
    """Return windows of text with the characters that follow; the last fifth of each page is for testing."""
    letters = sorted(set("".join(topics.values())))
    parts = [[], []]
    for client, name in enumerate(sorted(topics)):
        codes = torch.tensor([letters.index(letter) for letter in topics[name]])
        rows = codes[: (len(codes) - 1) // length * length + 1]
        x, y = rows[:-1].view(-1, length), rows[1:].view(-1, length)
        cut = max(1, len(x) * 4 // 5)
        for part, where in zip(parts, (slice(0, cut), slice(cut, None)), strict=True):
            part.append((x[where], y[where], torch.full((len(x[where]),), client)))
    return tuple(tuple(torch.cat(column) for column in zip(*part, strict=True)) for part in parts)


class Block(nn.Module):
    """Attention and a feed-forward layer, each around a residual."""

    def __init__(self, width, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x):
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, attn_mask=later, need_weights=False)[0]
        return x + self.feed(self.norms[1](x))


class Transformer(nn.Module):
    """Logits (batch, length, letters) of letters (batch, length)."""

    def __init__(self, input_shape, outputs, norm, width=64, heads=4, depth=2):
        super().__init__()
        self.letters = nn.Embedding(outputs, width)
        self.places = nn.Parameter(torch.randn(input_shape[0], width) / math.sqrt(width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Linear(width, outputs)

    def forward(self, x):
        return self.head(self.blocks(self.letters(x) + self.places))
