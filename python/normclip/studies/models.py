"""The two language models that the studies train: both predict the next character."""

from __future__ import annotations

import math
from collections.abc import Callable
from threading import Lock
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

_seeding = Lock()
_Model = TypeVar("_Model", bound=nn.Module)


def seeded(make: Callable[[], _Model], seed: int) -> _Model:
    """Make a model whose initial weights depend on this seed. Leaves torch's global random state unchanged."""
    with _seeding, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean cross-entropy of the next characters, in nats."""
    inputs, targets = batch
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


class CharLSTM(nn.Module):
    """Embedding, LSTM, linear head, as in the language models of Zhang et al., but small."""

    def __init__(self, characters: int, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.embedding: nn.Embedding = nn.Embedding(characters, width)
        self.lstm: nn.LSTM = nn.LSTM(width, width, layers, batch_first=True)
        self.head: nn.Linear = nn.Linear(width, characters)

    def forward(self, inputs: Tensor) -> Tensor:
        """From numbers of characters, (batch, length), to logits, (batch, length, characters)."""
        hidden, _ = self.lstm(self.embedding(inputs))
        return cast("Tensor", self.head(hidden))


class Transformer(nn.Module):
    """A transformer decoder with attention heads of width 32.

    Layers normalize their input, or with ``post_norm`` the sum of input and output, as in the first transformers, which need warm-up.
    """

    def __init__(self, characters: int, width: int, context: int, layers: int = 2, *, post_norm: bool = False) -> None:
        super().__init__()
        self.embedding: nn.Embedding = nn.Embedding(characters, width)
        self.position: nn.Parameter = nn.Parameter(torch.zeros(context, width))
        self.blocks: nn.Sequential = nn.Sequential(*[_Block(width, post_norm) for _ in range(layers)])
        self.norm: nn.Module = nn.Identity() if post_norm else nn.LayerNorm(width)
        self.head: nn.Linear = nn.Linear(width, characters)

    def forward(self, inputs: Tensor) -> Tensor:
        """From numbers of characters to logits, as :meth:`CharLSTM.forward`."""
        hidden = self.blocks(self.embedding(inputs) + self.position)
        return cast("Tensor", self.head(self.norm(hidden)))


def small_weights(model: Transformer) -> Transformer:
    """Initialize the model as GPT-2 is, and return it.

    Weights have a standard deviation of 0.02, divided by √k for the k layers that write to the residual stream. Biases are 0.
    """
    outputs = [layer for block in model.blocks for layer in cast("_Block", block).outputs]
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(len(outputs) if module in outputs else 1))
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.position, std=0.02)
    return model


class _Block(nn.Module):
    def __init__(self, width: int, post_norm: bool) -> None:
        super().__init__()
        self.heads = max(1, width // 32)
        self.post_norm = post_norm
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.perceptron_norm = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    @property
    def outputs(self) -> tuple[nn.Module, nn.Module]:
        """The layers whose outputs are added to the residual stream."""
        return self.projection, self.perceptron[-1]

    def forward(self, hidden: Tensor) -> Tensor:
        if self.post_norm:
            hidden = self.attention_norm(hidden + self._attend(hidden))
            return cast("Tensor", self.perceptron_norm(hidden + self.perceptron(hidden)))
        hidden = hidden + self._attend(self.attention_norm(hidden))
        return hidden + cast("Tensor", self.perceptron(self.perceptron_norm(hidden)))

    def _attend(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        joined = self.attention(hidden).view(batch, length, 3, self.heads, -1)
        query, key, value = joined.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return cast("Tensor", self.projection(attended.transpose(1, 2).reshape(batch, length, width)))
