"""A small causal transformer: next tokens of sequences, as GPT-2 has it (Radford et al., 2019).

Pre-norm blocks of attention and a feed-forward layer of four times the width, each around a residual; a last norm; a
head with weights of its own, or those of the embedding (`tied`). Query, key and value projections are tensors of
their own, so that a mask ranks them as what they are: stacked in one matrix, values take what queries and keys need.

Masks never prune the two embeddings: a token whose vector is emptied is lost, and so is a place. Attention is written
out, since fused kernels of it have no second derivative, which GraSP takes.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer; inputs and outputs (batch, length, width)."""

    def __init__(self, width: int, heads: int, normed: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = _norm(width, normed), _norm(width, normed)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.rise, self.fall = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x with what attention and then the feed-forward layer add to it."""
        x = x + self.out(self._attend(self.norm1(x)))
        return x + self.fall(F.gelu(self.rise(self.norm2(x))))  # type: ignore[no-any-return]

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            project(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(width // self.heads)
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mixed: torch.Tensor = scores.masked_fill(later, -math.inf).softmax(dim=-1) @ v
        return mixed.transpose(1, 2).reshape(x.shape)


class Transformer(nn.Module):
    """Logits (batch, length, tokens) of the token that follows each of (batch, length) tokens.

    Raises
    ------
    ValueError
        The width is no multiple of the number of heads, or there is no block.
    """

    never_pruned = ("tokens", "places")

    def __init__(
        self, length: int, tokens: int, width: int, depth: int, heads: int, tied: bool = False, normed: bool = True
    ) -> None:
        super().__init__()
        if heads < 1 or width < 1 or width % heads:
            raise ValueError(f"{width} channels do not divide into {heads} heads")
        if depth < 1:
            raise ValueError(f"depth is {depth}; it is at least 1")
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, normed) for _ in range(depth)))
        self.norm = _norm(width, normed)
        # A tied head is no module: the state then has the shared tensor once.
        self.head = None if tied else nn.Linear(width, tokens)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape)
        y = self.norm(self.blocks(self.tokens(x) + self.places(places)))
        return F.linear(y, self.tokens.weight) if self.head is None else self.head(y)


def _norm(width: int, normed: bool) -> nn.Module:
    return nn.LayerNorm(width) if normed else nn.Identity()
