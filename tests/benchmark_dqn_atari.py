"""Measures dqn_atari.py beside stable-baselines3's DQN: steps per second, peak memory, the pause of a checkpoint.

    uv run tests/benchmark_dqn_atari.py                 # three rounds on one thread and on all, the two in turn
    uv run tests/benchmark_dqn_atari.py --rounds 5 --threads 2 --steps 10000

Both train on the same game with batches of 32, an update every 4 steps, epsilon 0.05 and float32 screens in [0, 1] of
the same preprocessing; the speed counts from the first update on. Machines drift: only the ratio within a round tells.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1",
#     "gymnasium==1.4.0",
#     "moviepy==2.2.1",
#     "numpy==2.4.6",
#     "opencv-python-headless==5.0.0.93",
#     "stable-baselines3==2.9.2",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tyro==1.0.17",
# ]
# ///

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import tyro

SCRIPT = Path(__file__).parent.parent / "dqn_atari.py"
FIRST_UPDATE = 1_000


@dataclasses.dataclass
class Args:
    rounds: int = 3
    """rounds of ours, ours in float32 and theirs, one after the other"""
    steps: int = 6_000
    """agent steps with updates in a round"""
    threads: tuple[int, ...] = (1, os.cpu_count())
    """thread counts to measure with"""
    env_id: str = "BreakoutNoFrameskip-v4"
    """the game, under an id without frame skip or stickiness"""
    device: str = "auto"
    """device of both"""
    memory: bool = True
    """also measure a full memory of 1,000,000 screens and its checkpoint (8 GB of disk)"""


def ours(args: Args, precision: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            **{"--env-id": args.env_id, "--total-timesteps": FIRST_UPDATE + args.steps, "--device": args.device},
            **{"--learning-starts": FIRST_UPDATE, "--start-e": 0.05, "--end-e": 0.05, "--precision": precision},
            **{"--eval-episodes": 0, "--runs-dir": folder, "--run-name": "benchmark"},
        }
        command = [sys.executable, SCRIPT, *(str(part) for flag in flags.items() for part in flag)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(folder) / "benchmark" / "result.json").read_text())["steps_per_second"]


def theirs(args: Args) -> float:
    command = [sys.executable, __file__, "theirs", args.env_id, str(args.steps), args.device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def run_stable_baselines3(env_id: str, steps: int, device: str) -> None:
    """Prints stable-baselines3's steps per second; in a process of its own."""
    import ale_py
    import gymnasium as gym
    from stable_baselines3 import DQN
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    class Stopwatch(BaseCallback):
        start = 0.0

        def _on_step(self) -> bool:
            if self.num_timesteps == FIRST_UPDATE:
                self.start = time.perf_counter()
            return True

    gym.register_envs(ale_py)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = DQN(
        "CnnPolicy",
        VecFrameStack(make_atari_env(env_id, n_envs=1, seed=1), 4),
        learning_rate=1e-4,
        buffer_size=FIRST_UPDATE + steps,
        learning_starts=FIRST_UPDATE,
        batch_size=32,
        train_freq=4,
        target_update_interval=1_000,
        exploration_initial_eps=0.05,
        exploration_final_eps=0.05,
        device=device,
        seed=1,
    )
    stopwatch = Stopwatch()
    model.learn(FIRST_UPDATE + steps, callback=stopwatch)
    print(steps / (time.perf_counter() - stopwatch.start))


def measure_memory() -> None:
    """Fills the script's own memory of 1,000,000 screens beside its networks; in a process of its own."""
    sys.path.insert(0, str(SCRIPT.parent))
    import dqn_atari as dqn

    args = dqn.Args()
    network = dqn.QNetwork(n_actions=18)
    weights = [parameter.detach() for parameter in network.parameters()]
    optimizer = dqn.make_optimizer(args, weights)
    dqn.gradient_step(network(torch.zeros(1, 4, 84, 84, dtype=torch.uint8)).sum(), network, weights, optimizer)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        capacity, spare = dqn.replay_size(args)
        path = Path(folder) / dqn.REPLAY_FILE
        memory = dqn.ReplayMemory(capacity, spare, np.random.default_rng(1), torch.device("cpu"), path)
        screens = np.random.default_rng(1).integers(0, 256, (100, 84, 84), np.uint8)
        memory.begin_episode(screens[0])
        pauses = []
        for step in range(1, capacity + 5 * spare):
            memory.append(0, 0.0, False, screens[step % 100])
            if step % spare == 0:
                start = time.perf_counter()
                content = {"memory": memory.state_dict(), "optimizer": optimizer.state_dict(), "weights": weights}
                dqn.save(Path(folder) / "checkpoint.pt", content)
                pauses.append(time.perf_counter() - start)
        memory.sample(32)
        full = pauses[capacity // spare :]
        print(f"replay file {path.stat().st_size / 1e9:.2f} GB for {capacity:,} screens and {spare:,} spare places")
        print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB")
        print(
            f"pause of a checkpoint: median {np.median(full):.2f} s, longest {max(full):.2f} s, no screen yet on disk"
        )


def main() -> None:
    if sys.argv[1:2] == ["theirs"]:
        return run_stable_baselines3(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    if sys.argv[1:] == ["memory"]:
        return measure_memory()
    args = tyro.cli(Args, description=__doc__)
    print("| threads | steps/s, this script | in float32 | stable-baselines3 | ratio | ratio in float32 |")
    print("|---|---|---|---|---|---|")
    for threads in args.threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        rows = np.array([(ours(args, "auto"), ours(args, "float32"), theirs(args)) for _ in range(args.rounds)])
        columns = [*rows.T, rows[:, 0] / rows[:, 2], rows[:, 1] / rows[:, 2]]
        cells = [
            f"{np.median(column):.{digits}f} ({min(column):.{digits}f} to {max(column):.{digits}f})"
            for column, digits in zip(columns, (0, 0, 0, 2, 2), strict=True)
        ]
        print(f"| {threads} | {' | '.join(cells)} |", flush=True)
    if args.memory:
        subprocess.run([sys.executable, __file__, "memory"], check=True)


if __name__ == "__main__":
    main()
