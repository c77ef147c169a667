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
WARM_UP = 200  # steps with updates that do not count: JAX compiles in them


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


def ours(script: str, args: Args, flags: dict[str, object], first_update: int = FIRST_UPDATE) -> float:
    """Steps per second of one of our scripts, from the first update on."""
    with tempfile.TemporaryDirectory() as folder:
        flags = flags | {"--total-timesteps": first_update + args.steps, "--device": args.device}
        flags |= {"--eval-episodes": 0, "--runs-dir": folder, "--run-name": "benchmark"}
        command = [sys.executable, ROOT / script, *(str(part) for flag in flags.items() for part in flag)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(folder) / "benchmark" / "result.json").read_text())["steps_per_second"]


def theirs(args: Args, library: str) -> float:
    """Steps per second that the benchmark prints when called with "theirs", a library, steps and device."""
    command = [sys.executable, sys.argv[0], "theirs", library, str(args.steps), args.device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def time_peer(model, steps: int, warm: int = FIRST_UPDATE + WARM_UP) -> None:
    """Trains a model with stable-baselines3's interface, and prints its steps per second after the warm ones."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    class Stopwatch(BaseCallback):
        start = 0.0

        def _on_rollout_start(self) -> None:
            if self.num_timesteps == warm:
                self.start = time.perf_counter()

        def _on_step(self) -> bool:
            return True

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    stopwatch = Stopwatch()
    model.learn(warm + steps, callback=stopwatch)
    print(steps / (time.perf_counter() - stopwatch.start))


def print_table(args: Args, programs: dict[str, Callable[[], float]]) -> None:
    """Medians over the rounds, with the lowest and highest; ratios are those of the first program within a round."""
    own, *peers = programs
    names = ["threads", *(f"{name}, steps/s" for name in programs), *(f"{own} / {peer}" for peer in peers)]
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")

    def measured(name: str) -> float:
        rate = programs[name]()
        print(f"{name}: {rate:.0f} steps/s", file=sys.stderr, flush=True)
        return rate

    for threads in args.threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        rates = np.array([[measured(name) for name in programs] for _ in range(args.rounds)])
        cells = [
            f"{np.median(column):.{digits}f} ({column.min():.{digits}f} to {column.max():.{digits}f})"
            for columns, digits in ((rates, 0), (rates[:, :1] / rates[:, 1:], 2))
            for column in columns.T
        ]
        print(f"| {threads} | {' | '.join(cells)} |", flush=True)
