"""Publishes runs: returns from TensorBoard's event files to small CSV files, and from those figures and tables.

    python results/curves.py runs/pong-s1 runs/pong-s2    # take these runs over into results/, then redraw everything
    python results/curves.py                              # redraw every figure and table from the CSV files

A run becomes results/RUN_NAME/ with returns.csv (a line a game: the step at which it ended, its return), args.json and
result.json. Runs of the same script, environment and length share a figure, results/SCRIPT__ENV.png.
"""

import csv
import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

mpl.use("agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent


def take_over(run_dir: Path) -> None:
    """Copies what is published of a finished run."""
    if not (run_dir / "result.json").exists():
        raise SystemExit(f"{run_dir} is no finished run: it has no result.json")
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    folder = RESULTS / run_dir.name
    folder.mkdir(exist_ok=True)
    with open(folder / "returns.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "return"])
        writer.writerows((event.step, f"{event.value:g}") for event in events.Scalars("charts/episodic_return"))
    for name in ("args.json", "result.json"):
        shutil.copy(run_dir / name, folder)


def smooth(steps: np.ndarray, returns: np.ndarray, grid: np.ndarray, width: float) -> np.ndarray:
    """Mean return of the games that end within `width` steps before each point of the grid, NaN where none does."""
    sums = np.concatenate([[0], np.cumsum(returns)])
    first, last = np.searchsorted(steps, grid - width, "right"), np.searchsorted(steps, grid, "right")
    return np.where(last > first, (sums[last] - sums[first]) / np.maximum(last - first, 1), np.nan)


def draw(script: str, env_id: str, runs: list[tuple[dict, np.ndarray]]) -> None:
    total = max(result["total_timesteps"] for result, _ in runs)
    grid = np.linspace(0, total, 201)
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    curves = []
    for result, returns in sorted(runs, key=lambda run: run[0]["seed"]):
        curves.append(smooth(returns[:, 0], returns[:, 1], grid, total / 25))
        axes.plot(grid, curves[-1], linewidth=1, alpha=0.6, label=f"seed {result['seed']}")
    complete = np.isfinite(curves).all(axis=0)
    axes.plot(grid[complete], np.mean(curves, axis=0)[complete], color="black", linewidth=2, label="mean")
    axes.set(xlabel="agent steps", ylabel="return of training games", title=f"{script}.py, {env_id}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / f"{script}__{env_id.replace('/', '-')}.png", dpi=120)
    plt.close(figure)


def main() -> None:
    for run_dir in sys.argv[1:]:
        take_over(Path(run_dir))
    groups = defaultdict(list)
    for path in sorted(RESULTS.glob("*/result.json")):
        result = json.loads(path.read_text())
        returns = np.loadtxt(path.with_name("returns.csv"), delimiter=",", skiprows=1, ndmin=2)
        groups[result["script"], result["env_id"]].append((result, returns))
    print("| script | environment | seeds | steps | return in the last quarter | evaluation | steps/s |")
    print("|---|---|---|---|---|---|---|")
    for (script, env_id), runs in groups.items():
        draw(script, env_id, runs)
        last_quarter = [returns[returns[:, 0] > 0.75 * result["total_timesteps"], 1].mean() for result, returns in runs]
        cells = [
            script,
            env_id,
            " ".join(str(result["seed"]) for result, _ in runs),
            f"{runs[0][0]['total_timesteps']:,}",
            f"{np.mean(last_quarter):.1f} ({', '.join(f'{value:.1f}' for value in last_quarter)})",
            ", ".join(f"{result['eval_return_mean']:.1f} +- {result['eval_return_std']:.1f}" for result, _ in runs),
            ", ".join(f"{result['steps_per_second']:.0f}" for result, _ in runs),
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
