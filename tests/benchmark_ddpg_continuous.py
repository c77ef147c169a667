"""Measures ddpg_continuous.py beside stable-baselines3's DDPG in steps per second.

    uv run tests/benchmark_ddpg_continuous.py                # three rounds on one thread and on all, the two in turn
    uv run tests/benchmark_ddpg_continuous.py --rounds 5 --threads 2 --steps 10000

Both train on HalfCheetah-v5 with two hidden layers of 256 units without normalisation, batches of 256, and an update of
actor and critic at every step; the speed counts from the first update on. Machines drift: only the ratio within a round
tells.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[classic-control,mujoco]==1.4.0",
#     "moviepy==2.2.1",
#     "mujoco==4.0.0",
#     "numpy==2.4.6",
#     "stable-baselines3==2.9.2",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tyro==1.0.17",
# ]
# ///

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import tyro

SCRIPT = Path(__file__).parent.parent / "ddpg_continuous.py"
FIRST_UPDATE = 1_000


@dataclasses.dataclass
class Args:
    rounds: int = 3
    """rounds of ours, ours with the default layer normalisation, and theirs, one after the other"""
    steps: int = 6_000
    """steps with updates in a round"""
    threads: tuple[int, ...] = (1, os.cpu_count())
    """thread counts to measure with"""
    env_id: str = "HalfCheetah-v5"
    """the environment"""
    device: str = "auto"
    """device of both"""


def ours(args: Args, normalisation: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            **{"--env-id": args.env_id, "--total-timesteps": FIRST_UPDATE + args.steps, "--device": args.device},
            **{"--learning-starts": FIRST_UPDATE, "--normalisation": normalisation, "--eval-frequency": 0},
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
    from stable_baselines3 import DDPG
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.noise import NormalActionNoise

    class Stopwatch(BaseCallback):
        start = 0.0

        def _on_step(self) -> bool:
            if self.num_timesteps == FIRST_UPDATE:
                self.start = time.perf_counter()
            return True

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = DDPG(
        "MlpPolicy",
        env_id,
        learning_rate=3e-4,
        buffer_size=FIRST_UPDATE + steps,
        learning_starts=FIRST_UPDATE,
        batch_size=256,
        train_freq=1,
        gradient_steps=1,
        action_noise=NormalActionNoise(np.zeros(1), np.full(1, 0.1)),
        policy_kwargs={"net_arch": [256, 256]},
        device=device,
        seed=1,
    )
    stopwatch = Stopwatch()
    model.learn(FIRST_UPDATE + steps, callback=stopwatch)
    print(steps / (time.perf_counter() - stopwatch.start))


def main() -> None:
    if sys.argv[1:2] == ["theirs"]:
        return run_stable_baselines3(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    args = tyro.cli(Args, description=__doc__)
    print("| threads | steps/s, this script | with layer normalisation | stable-baselines3 | ratio |")
    print("|---|---|---|---|---|")
    for threads in args.threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        rows = np.array([(ours(args, "none"), ours(args, "layer"), theirs(args)) for _ in range(args.rounds)])
        columns = [*rows.T, rows[:, 0] / rows[:, 2]]
        cells = [
            f"{np.median(column):.{digits}f} ({min(column):.{digits}f} to {max(column):.{digits}f})"
            for column, digits in zip(columns, (0, 0, 0, 2), strict=True)
        ]
        print(f"| {threads} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
