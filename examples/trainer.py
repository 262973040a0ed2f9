"""Fine-tune a language model with the Trainer of Transformers and ClippedAdamW: `python examples/trainer.py [--quick]`.

Needs `pip install transformers accelerate`. Nothing is downloaded: a small GPT-2 is first trained on one half of Python's manual and then
fine-tuned on the other, once with the Trainer's own clipping and AdamW and once with ClippedAdamW.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, get_linear_schedule_with_warmup, set_seed

from normclip.optim import ClippedAdamW

LIMIT = 1.0
LR = 5e-4
CONTEXT = 64
BATCH = 8


def windows(text: bytes) -> list[dict[str, torch.Tensor]]:
    """The text in pieces; every byte is a token."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return [{"input_ids": piece, "labels": piece} for piece in tokens.split(CONTEXT) if len(piece) == CONTEXT]


def train(model: GPT2LMHeadModel, data: Sequence[dict[str, torch.Tensor]], steps: int, *, clipped: bool) -> tuple[float, float]:
    """Train the model in place. Returns the loss over the run, and the seconds that it took."""
    settings: dict[str, Any] = {"per_device_train_batch_size": BATCH, "max_steps": steps, "learning_rate": LR, "warmup_steps": 5, "seed": 0}
    settings |= {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    with tempfile.TemporaryDirectory() as folder:
        if clipped:
            optimizer = ClippedAdamW(model.parameters(), LR, weight_decay=0.0, rule=LIMIT)
            optimizers = (optimizer, get_linear_schedule_with_warmup(optimizer, 5, steps))
            # The optimizer clips, so the Trainer must not: max_grad_norm=0 tells it so.
            trainer = Trainer(model, TrainingArguments(folder, max_grad_norm=0.0, **settings), train_dataset=data, optimizers=optimizers)
        else:
            trainer = Trainer(model, TrainingArguments(folder, max_grad_norm=LIMIT, **settings), train_dataset=data)
        start = time.perf_counter()
        result = trainer.train()
        return result.training_loss, time.perf_counter() - start


def main() -> None:
    """Train, fine-tune twice, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model and few steps")
    width, layers, steps = (32, 1, 10) if parser.parse_args().quick else (128, 3, 150)

    text = "".join(topics.values()).encode()
    half = len(text) // 2
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=width, n_layer=layers, n_head=4))
    train(model, windows(text[:half]), steps, clipped=True)

    contenders = {"max_grad_norm=1, AdamW (fused)": False, "ClippedAdamW": True}
    # The Trainer prints, too, so that the table comes last.
    results = {name: train(copy.deepcopy(model), windows(text[half:]), steps, clipped=clipped) for name, clipped in contenders.items()}
    sys.stdout.write(f"{model.num_parameters():,} parameters, {steps} steps\n")
    sys.stdout.write(f"{'':32}{'loss':>8}{'time':>10}\n")
    for name, (loss, seconds) in results.items():
        sys.stdout.write(f"{name:32}{loss:8.4f}{seconds:8.2f} s\n")


if __name__ == "__main__":
    main()
