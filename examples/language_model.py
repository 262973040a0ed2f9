"""Train a character language model by torch's clipping and AdamW, and by ClippedAdamW: `python examples/language_model.py [--quick]`.

All contenders start from the same weights and take the same batches in turn, so that they meet the same load of the machine. Printed are
the loss that each ends with, the time of clipping and stepping, and the share of that in a whole training step.
"""

import argparse
import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

from normclip.optim import ClippedAdamW

LIMIT = 1.0
LR = 1e-3
CONTEXT = 64
BATCH = 16


class CharacterModel(nn.Module):
    """A small decoder that predicts the next character."""

    def __init__(self, characters: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(torch.zeros(CONTEXT, width))
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, characters)

    def loss(self, tokens: Tensor) -> Tensor:
        """The mean cross-entropy of each next character, in nats."""
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        hidden = self.blocks(self.embedding(tokens[:, :-1]) + self.position, mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), tokens[:, 1:].flatten())


class Contender:
    """A copy of the model, how it takes an optimizer step, and what that took."""

    def __init__(self, model: CharacterModel, clip_and_step: Callable[[CharacterModel], Callable[[], object]]) -> None:
        self.model = copy.deepcopy(model)
        self.clip_and_step = clip_and_step(self.model)
        self.losses: list[float] = []
        self.steps: list[float] = []
        self.clips: list[float] = []

    def train(self, batch: Tensor) -> None:
        """One training step."""
        start = time.perf_counter()
        self.model.zero_grad()
        loss = self.model.loss(batch)
        loss.backward()
        before = time.perf_counter()
        self.clip_and_step()
        end = time.perf_counter()
        self.losses.append(loss.item())
        self.clips.append(end - before)
        self.steps.append(end - start)


def torch_adamw(model: CharacterModel, *, fused: bool) -> Callable[[], object]:
    """Clip and step as torch does it."""
    optimizer = torch.optim.AdamW(model.parameters(), LR, fused=fused)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        optimizer.step()

    return clip_and_step


def main() -> None:
    """Train, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model and few steps")
    quick = parser.parse_args().quick
    width, layers, steps = (32, 1, 20) if quick else (128, 2, 300)

    text = "".join(topics.values())  # the text of Python's own manual
    alphabet = {character: index for index, character in enumerate(sorted(set(text)))}
    data = torch.tensor([alphabet[character] for character in text])

    torch.manual_seed(0)
    model = CharacterModel(len(alphabet), width, layers)
    contenders = {
        "clip_grad_norm_, AdamW": Contender(model, lambda model: torch_adamw(model, fused=False)),
        "clip_grad_norm_, AdamW(fused=True)": Contender(model, lambda model: torch_adamw(model, fused=True)),
        "ClippedAdamW": Contender(model, lambda model: ClippedAdamW(model.parameters(), LR, rule=LIMIT).step),
    }
    turns = itertools.cycle(itertools.permutations(contenders.values()))
    for _ in range(steps):
        starts = torch.randint(len(data) - CONTEXT, (BATCH,)).tolist()
        batch = torch.stack([data[start : start + CONTEXT + 1] for start in starts])
        for contender in next(turns):
            contender.train(batch)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    sys.stdout.write(f"{parameters:,} parameters, {steps} steps\n")
    sys.stdout.write(f"{'':36}{'loss':>8}{'clip + step':>14}{'share of the training step':>30}\n")
    for name, contender in contenders.items():
        clip, step = statistics.median(contender.clips), statistics.median(contender.steps)
        loss = statistics.fmean(contender.losses[-10:])
        sys.stdout.write(f"{name:36}{loss:8.4f}{clip * 1e3:11.3f} ms{clip / step:30.1%}\n")


if __name__ == "__main__":
    main()
