"""What the speed benchmarks of the agents share. Every measurement is a process of its own."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
FIRST_UPDATE = 1_000


@dataclasses.dataclass
class Args:
    rounds: int = 3
    """rounds of ours and theirs, one after the other"""
    steps: int = 6_000
    """steps with updates in a round"""
    threads: tuple[int, ...] = (1, os.cpu_count())
    """thread counts to measure with"""
    device: str = "auto"
    """device of both"""


def ours(script: str, args: Args, flags: dict[str, object]) -> float:
    """Steps per second of one of our scripts, from the first update on."""
    with tempfile.TemporaryDirectory() as folder:
        flags = flags | {
            **{"--total-timesteps": FIRST_UPDATE + args.steps, "--learning-starts": FIRST_UPDATE},
            **{"--device": args.device, "--eval-episodes": 0, "--runs-dir": folder, "--run-name": "benchmark"},
        }
        command = [sys.executable, ROOT / script, *(str(part) for flag in flags.items() for part in flag)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(folder) / "benchmark" / "result.json").read_text())["steps_per_second"]


def theirs(args: Args) -> float:
    """Steps per second that the benchmark prints when it is called with "theirs", the steps and the device."""
    command = [sys.executable, sys.argv[0], "theirs", str(args.steps), args.device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def time_stable_baselines3(model, steps: int) -> None:
    """Trains a model of stable-baselines3, and prints its steps per second from the first update on."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    class Stopwatch(BaseCallback):
        start = 0.0

        def _on_step(self) -> bool:
            if self.num_timesteps == FIRST_UPDATE:
                self.start = time.perf_counter()
            return True

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    stopwatch = Stopwatch()
    model.learn(FIRST_UPDATE + steps, callback=stopwatch)
    print(steps / (time.perf_counter() - stopwatch.start))


def print_table(args: Args, programs: dict[str, Callable[[], float]]) -> None:
    """Medians over the rounds, with the lowest and highest; the last program is the one to compare with."""
    *own, peer = programs
    names = ["threads", *(f"{name}, steps/s" for name in programs), *(f"{name} / {peer}" for name in own)]
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for threads in args.threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        rates = np.array([[program() for program in programs.values()] for _ in range(args.rounds)])
        cells = [
            f"{np.median(column):.{digits}f} ({column.min():.{digits}f} to {column.max():.{digits}f})"
            for columns, digits in ((rates, 0), (rates[:, :-1] / rates[:, -1:], 2))
            for column in columns.T
        ]
        print(f"| {threads} | {' | '.join(cells)} |", flush=True)
