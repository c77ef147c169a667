"""Measures the scripts that learn from rollouts in steps per second, beside the same algorithm of others.

    uv run tests/benchmark_on_policy.py                                  # ppo_continuous.py: HalfCheetah-v5
    uv run tests/benchmark_on_policy.py --script trpo_continuous
    uv run tests/benchmark_on_policy.py --script ppo_atari --steps 4096  # Breakout
    uv run tests/benchmark_on_policy.py --score                          # scores of stable-baselines3 on Breakout

The peers are stable-baselines3 (PPO) and sb3-contrib (TRPO), and SBX (JAX) for PPO in HalfCheetah. All have the same
networks, rollouts, epochs and minibatches, those of our defaults; the peers normalise nothing. Three rounds on one
thread and on all, the programs in turn: machines drift, and only the ratio within a round tells. "layers" is what the
linear and convolution layers of PPO would reach alone: a call for each step of the environments, and forward and
backward for each minibatch.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1",
#     "gymnasium[classic-control,mujoco]==1.4.0",
#     "moviepy==2.2.1",
#     "mujoco==4.0.0",
#     "numpy==2.4.6",
#     "opencv-python-headless==5.0.0.93",
#     "sb3-contrib==2.9.0",
#     "sbx-rl==0.28.0",
#     "stable-baselines3==2.9.2",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///

import dataclasses
import os
import sys
import time
from typing import Literal

import numpy as np
import tyro
from benchmark_common import ROOT, ours, print_table, theirs, time_peer
from benchmark_common import Args as CommonArgs

ENV_IDS = {"ppo_atari": "BreakoutNoFrameskip-v4"}  # no frame skip, no stickiness
SIZES = {"ppo_atari": 8 * 128}  # steps of a rollout; of the others
ENV_ID, SIZE = "HalfCheetah-v5", 2048


@dataclasses.dataclass
class Args(CommonArgs):
    steps: int = 20_480
    """steps in a round, after two rollouts that do not count"""
    script: Literal["ppo_continuous", "ppo_atari", "trpo_continuous"] = "ppo_continuous"
    """what to measure"""
    score: bool = False
    """train stable-baselines3 on Breakout instead, on all threads, and print its returns"""


def make_peer(library: str, script: str, device: str):
    options = {"device": device, "seed": 1}
    if script == "trpo_continuous":
        from sb3_contrib import TRPO

        return TRPO("MlpPolicy", ENV_ID, n_steps=1024, n_critic_updates=20, **options)  # as ours; the rest by default
    if library == "sbx":
        os.sched_setaffinity(
            0, sorted(os.sched_getaffinity(0))[: int(os.environ["OMP_NUM_THREADS"])]
        )  # XLA's only limit
        from sbx import PPO

        del options["device"]
    else:
        from stable_baselines3 import PPO
    if script == "ppo_continuous":
        return PPO("MlpPolicy", ENV_ID, **options)  # its defaults are ours
    import ale_py
    import gymnasium as gym
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gym.register_envs(ale_py)
    return PPO(
        "CnnPolicy",
        VecFrameStack(make_atari_env(ENV_IDS[script], n_envs=8, seed=1), 4),
        learning_rate=lambda left: 2.5e-4 * left,
        n_steps=128,
        batch_size=256,
        n_epochs=4,
        clip_range=0.1,
        ent_coef=0.01,
        **options,
    )


def run_layers(script: str, steps: int) -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    import ppo_atari
    import ppo_continuous

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if script == "ppo_continuous":
        networks, obs, calls, batch, updates = [ppo_continuous.Policy(17, 6).mean], torch.zeros(64, 17), 2048, 1, 320
        networks.append(ppo_continuous.mlp(17, 1, gain=1.0))
    else:
        networks, obs = [ppo_atari.ActorCritic(4)], torch.zeros(256, 84, 84, 4, dtype=torch.uint8)
        calls, batch, updates = 128, 8, 16
    size = SIZES.get(script, SIZE)
    for rollouts in (1, max(1, steps // size)):  # the first warms up
        start = time.perf_counter()
        for _ in range(rollouts):
            with torch.inference_mode():
                for _ in range(calls):
                    networks[0](obs[:batch])
            for _ in range(updates):
                for network in networks:
                    output = network(obs)
                    sum(part.sum() for part in (output if isinstance(output, tuple) else [output])).backward()
    print(rollouts * size / (time.perf_counter() - start))


def score(args: Args) -> None:
    """Prints the mean of the last 100 training games, unclipped, every 100,000 steps."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Scores(BaseCallback):
        start = time.perf_counter()

        def _on_step(self) -> bool:
            if self.num_timesteps % 100_000 < 8:
                scores = [game["r"] for game in self.model.ep_info_buffer]
                print(self.num_timesteps, np.mean(scores), f"{time.perf_counter() - self.start:.0f} s", flush=True)
            return True

    make_peer("stable-baselines3", "ppo_atari", args.device).learn(1_000_000, callback=Scores())


def main() -> None:
    if sys.argv[1:2] == ["theirs"]:
        (library, script), steps, device = sys.argv[2].split(":"), int(sys.argv[3]), sys.argv[4]
        if library == "layers":
            return run_layers(script, steps)
        return time_peer(make_peer(library, script, device), steps, 2 * SIZES.get(script, SIZE))
    args = tyro.cli(Args, description=__doc__)
    if args.score:
        return score(args)
    script, size = args.script, SIZES.get(args.script, SIZE)
    args.steps = args.steps // size * size
    peers = {"ppo_continuous": ["SBX", "stable-baselines3", "layers"], "ppo_atari": ["stable-baselines3", "layers"]}
    programs = {f"{script}.py": lambda: ours(f"{script}.py", args, {"--env-id": ENV_IDS.get(script, ENV_ID)}, 2 * size)}
    for peer in peers.get(script, ["sb3-contrib"]):
        programs[peer] = lambda peer=peer: theirs(args, f"{peer.lower()}:{script}")
    print_table(args, programs)


if __name__ == "__main__":
    main()
