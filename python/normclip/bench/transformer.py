"""Real gradients, from one backward pass of a small language model on the text of Python's manual."""

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

__all__ = ["transformer_gradients"]

_BYTES = 256  # the vocabulary: every byte is a token
_CONTEXT = 128
_BATCH = 8


class _LanguageModel(nn.Module):
    """A pre-norm decoder that predicts the next byte."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_BYTES, width)
        self.position = nn.Parameter(torch.zeros(_CONTEXT, width))
        block = nn.TransformerEncoderLayer(
            width, nhead=width // 32, dim_feedforward=4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, _BYTES)

    def forward(self, tokens: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(_CONTEXT)
        hidden = self.blocks(self.embedding(tokens) + self.position, mask=causal, is_causal=True)
        logits: Tensor = self.head(hidden)
        return logits


def transformer_gradients(width: int, layers: int) -> list[Tensor]:
    """The float32 gradients of one training step, from a fixed seed. Leaves torch's global random state unchanged."""
    text = "".join(topics.values()).encode()[: _BATCH * (_CONTEXT + 1)]
    windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(_BATCH, _CONTEXT + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _LanguageModel(width, layers)
    logits = model(windows[:, :-1])
    torch.autograd.backward(nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
