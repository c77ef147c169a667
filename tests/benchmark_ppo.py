"""Measures ppo_continuous.py beside SBX's (JAX) and stable-baselines3's PPO, and ppo_atari.py beside the latter's.

    uv run tests/benchmark_ppo.py                               # HalfCheetah-v5, three rounds on one thread and on all
    uv run tests/benchmark_ppo.py --atari --steps 4096          # Breakout
    uv run tests/benchmark_ppo.py --score                       # stable-baselines3 on Breakout for 1,000,000 steps

All have the same networks, rollouts, epochs and minibatches: the scripts' defaults, without normalisation in the peers.
Machines drift: only the ratio within a round tells. "layers" is what the linear and convolution layers would reach
alone: a call for each step of the environments, and forward and backward for each minibatch.
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

import numpy as np
import tyro
from benchmark_common import ROOT, ours, print_table, theirs, time_peer
from benchmark_common import Args as CommonArgs

GAMES = {"continuous": "HalfCheetah-v5", "atari": "BreakoutNoFrameskip-v4"}  # no frame skip, no stickiness
SIZES = {"continuous": 2048, "atari": 8 * 128}  # steps of a rollout


@dataclasses.dataclass
class Args(CommonArgs):
    steps: int = 20_480
    """steps in a round, after two rollouts that do not count"""
    atari: bool = False
    """measure ppo_atari.py"""
    score: bool = False
    """train stable-baselines3 on Breakout instead, on all threads, and print its returns"""


def make_peer(library: str, kind: str, device: str, total: int = 10**9):
    """Of a training of `total` steps, over which the rate falls; the speed does not depend on it."""
    options = {"device": device, "seed": 1}
    if library == "sbx":
        os.sched_setaffinity(
            0, sorted(os.sched_getaffinity(0))[: int(os.environ["OMP_NUM_THREADS"])]
        )  # XLA's only limit
        from sbx import PPO

        del options["device"]
    else:
        from stable_baselines3 import PPO
    if kind == "continuous":
        return PPO("MlpPolicy", GAMES[kind], **options)  # its defaults are ours
    import ale_py
    import gymnasium as gym
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gym.register_envs(ale_py)
    return PPO(
        "CnnPolicy",
        VecFrameStack(make_atari_env(GAMES[kind], n_envs=8, seed=1), 4),
        learning_rate=lambda left: 2.5e-4 * left,
        n_steps=128,
        batch_size=256,
        n_epochs=4,
        clip_range=0.1,
        ent_coef=0.01,
        **options,
    )


def run_layers(kind: str, steps: int) -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    import ppo_atari
    import ppo_continuous

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if kind == "continuous":
        networks, obs, calls, batch, updates = [ppo_continuous.Policy(17, 6).mean], torch.zeros(64, 17), 2048, 1, 320
        networks.append(ppo_continuous.ValueFunction(17))
    else:
        networks, obs = [ppo_atari.ActorCritic(4)], torch.zeros(256, 84, 84, 4, dtype=torch.uint8)
        calls, batch, updates = 128, 8, 16
    for rollouts in (1, max(1, steps // SIZES[kind])):  # the first warms up
        start = time.perf_counter()
        for _ in range(rollouts):
            with torch.inference_mode():
                for _ in range(calls):
                    networks[0](obs[:batch])
            for _ in range(updates):
                for network in networks:
                    output = network(obs)
                    sum(part.sum() for part in (output if isinstance(output, tuple) else [output])).backward()
    print(rollouts * SIZES[kind] / (time.perf_counter() - start))


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

    make_peer("stable-baselines3", "atari", args.device).learn(1_000_000, callback=Scores())


def main() -> None:
    if sys.argv[1:2] == ["theirs"]:
        (library, kind), steps, device = sys.argv[2].split(":"), int(sys.argv[3]), sys.argv[4]
        if library == "layers":
            return run_layers(kind, steps)
        return time_peer(make_peer(library, kind, device), steps, 2 * SIZES[kind])
    args = tyro.cli(Args, description=__doc__)
    if args.score:
        return score(args)
    kind = "atari" if args.atari else "continuous"
    steps, flags = args.steps // SIZES[kind] * SIZES[kind], {"--env-id": GAMES[kind]}
    args.steps = steps
    peers = ["stable-baselines3", "layers"] if args.atari else ["sbx", "stable-baselines3", "layers"]
    programs = {f"ppo_{kind}.py": lambda: ours(f"ppo_{kind}.py", args, flags, 2 * SIZES[kind])}
    print_table(args, programs | {peer: lambda peer=peer: theirs(args, f"{peer}:{kind}") for peer in peers})


if __name__ == "__main__":
    main()
