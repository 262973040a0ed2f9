"""Real gradients of a policy network, as reinforcement learning trains: few and small tensors, so that all time is overhead."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["policy_gradients"]

_OBSERVATIONS, _ACTIONS, _BATCH = 4, 2, 64


class _ActorCritic(nn.Module):
    """Separate networks of two hidden layers for the action and the value: 12 tensors."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.actor = self._network(hidden, _ACTIONS)
        self.critic = self._network(hidden, 1)

    @staticmethod
    def _network(hidden: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            *(nn.Linear(_OBSERVATIONS, hidden), nn.Tanh()), *(nn.Linear(hidden, hidden), nn.Tanh()), nn.Linear(hidden, outputs)
        )

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(observations), self.critic(observations)


def policy_gradients(hidden: int) -> tuple[list[Tensor], Callable[[], object]]:
    """The float32 gradients of one backward pass, and a function that runs another forward and backward pass of the same network.

    That pass leaves the returned gradients unchanged. The seed is fixed, and torch's global random state unchanged.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _ActorCritic(hidden)
        observations, values = torch.randn(_BATCH, _OBSERVATIONS), torch.randn(_BATCH, 1)
        actions = torch.randint(_ACTIONS, (_BATCH,))

    def train() -> None:
        model.zero_grad()
        logits, value = model(observations)
        torch.autograd.backward(nn.functional.cross_entropy(logits, actions) + nn.functional.mse_loss(value, values))

    train()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None], train
