"""PPO on CartPole by stable-baselines3, with its own optimizer and with ClippedAdamW: `python examples/ppo_cartpole.py [--quick]`.

Needs `pip install stable-baselines3`. Both agents start from the same seed and learn in turns of a few rollouts, so that they meet the same
load of the machine. Printed are the mean return at the end, the time to train, and the time of clipping and stepping in it.
"""

import argparse
import sys
import time
from typing import Any

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

import normclip
from normclip.optim import ClippedAdamW

LIMIT = 0.5  # PPO's own default
ENVIRONMENT = "CartPole-v1"


def own() -> PPO:
    """What stable-baselines3 does by itself: `torch.nn.utils.clip_grad_norm_`, then `torch.optim.Adam`."""
    return PPO("MlpPolicy", ENVIRONMENT, seed=0, max_grad_norm=LIMIT, device="cpu")


def clipped() -> PPO:
    """The optimizer clips. PPO's own clipping is told to let all norms pass; AdamW without weight decay is Adam."""
    settings = {"optimizer_class": ClippedAdamW, "optimizer_kwargs": {"rule": LIMIT, "weight_decay": 0.0, "eps": 1e-5}}
    return PPO("MlpPolicy", ENVIRONMENT, seed=0, max_grad_norm=float("inf"), device="cpu", policy_kwargs=settings)


class Watched:
    """An agent, and how long it took to learn, and to clip and step."""

    def __init__(self, agent: PPO) -> None:
        self.agent = agent
        self.learning = 0.0
        self.stepping = 0.0
        self._step = agent.policy.optimizer.step
        agent.policy.optimizer.step = self._timed(self._step)

    def learn(self, steps: int, seed: int) -> None:
        """Go on learning for so many steps of the environment. Both agents draw the same random numbers."""
        self.agent.set_random_seed(seed)
        clip, start = torch.nn.utils.clip_grad_norm_, time.perf_counter()
        torch.nn.utils.clip_grad_norm_ = self._timed(clip)
        try:
            self.agent.learn(steps, reset_num_timesteps=False)
        finally:
            torch.nn.utils.clip_grad_norm_ = clip
        self.learning += time.perf_counter() - start

    def _timed(self, call: Any) -> Any:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments, **keywords)
            self.stepping += time.perf_counter() - start
            return result

        return timed


def main() -> None:
    """Train both agents, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one rollout")
    quick = parser.parse_args().quick
    turns, episodes = (1, 1) if quick else (8, 20)

    torch.set_num_threads(1)  # as fast as two threads, for networks of this size
    agents = {"clip_grad_norm_, Adam": Watched(own()), "ClippedAdamW": Watched(clipped())}
    for turn in range(turns):
        for name in sorted(agents, reverse=bool(turn % 2)):
            if name == "ClippedAdamW":
                with normclip.patch_torch():  # a limit of inf is then one read, and changes nothing
                    agents[name].learn(2048, turn)
            else:
                agents[name].learn(2048, turn)

    sys.stdout.write(f"{turns * 2048:,} steps of {ENVIRONMENT}\n")
    sys.stdout.write(f"{'':24}{'mean return':>12}{'time to train':>16}{'clip + step':>14}\n")
    for name, watched in agents.items():
        mean, _ = evaluate_policy(watched.agent, watched.agent.get_env(), n_eval_episodes=episodes)
        sys.stdout.write(f"{name:24}{mean:12.1f}{watched.learning:14.2f} s{watched.stepping:12.2f} s\n")


if __name__ == "__main__":
    main()
