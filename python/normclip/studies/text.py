"""The text that the models are trained on: Python's manual, which the standard library contains as `pydoc_data.topics`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics

import torch
from torch import Tensor


@dataclass(frozen=True)
class Corpus:
    """A text as a tensor of character numbers."""

    characters: str
    """The vocabulary: a character's number is its index here."""
    encoded: Tensor

    def batches(self, *, size: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """An endless iterator of batches of random windows: inputs and targets, shifted by one character, of shape (size, length)."""
        generator = torch.Generator().manual_seed(seed)
        window = torch.arange(length + 1)
        while True:
            starts = torch.randint(len(self.encoded) - length, (size, 1), generator=generator)
            windows = self.encoded[starts + window]
            yield windows[:, :-1], windows[:, 1:]


@cache
def manual() -> Corpus:
    """Python's manual, some 460 thousand characters."""
    text = "".join(topics.values())
    characters = "".join(sorted(set(text)))
    numbers = {character: number for number, character in enumerate(characters)}
    return Corpus(characters, torch.tensor([numbers[character] for character in text]))
