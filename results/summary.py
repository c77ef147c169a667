"""Tables and learning curves of finished runs, by script and environment, over seeds.

    python results/summary.py runs                                           # of a folder's runs, into runs/summary/
    python results/summary.py --publish runs/pong-1 runs/pong-2              # copies what is published into results/
    python results/summary.py --publish --into tau/0.05 runs/tau/0.05/*__*   # into results/tau/0.05/
    python results/summary.py results                                        # redraws what is published

Where the folder has no run but its folders do (runs/tau/0.005/NAME, runs/tau/0.05/NAME), these are compared, by name.

A finished run gets a returns.csv: the step at which each training episode ended and its return (for regression, epoch
and validation loss). Beside it lie the script's own args.json and result.json; every figure comes from these three.
A published run also has the evaluations during the training and the critic's values, evaluations.csv and values.csv.
Runs that differ in more than the seed are told apart. Over seeds: mean and standard deviation, interquartile mean with
a 95 % bootstrap interval. For the 57 Atari games that the literature normalises (atari_random_human.csv, from DQN
Zoo): the score relative to a random player, 0 %, and a human, 100 %.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "matplotlib==3.11.2",
#     "numpy==2.4.6",
#     "scipy==1.17.1",
#     "tensorboard==2.21.0",
# ]
# ///

import csv
import json
import os
import re
import shutil
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NoReturn

try:
    import numpy as np
    from matplotlib.figure import Figure
    from scipy import stats
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
except ModuleNotFoundError as error:
    print(f"summary: error: {error.name} is not installed; pip install -r requirements.txt", file=sys.stderr)
    raise SystemExit(2) from None

RESULTS = Path(__file__).parent
MAX_ROWS = 5_000  # of a curve's file: under 100 KB
START = b":\x02\x08\x01"  # of an event that says where a resumed run begins to log again, in bytes
CURVES = {  # a file, its second column, and the tags of which a run has one
    "returns.csv": ("return", ("charts/episodic_return", "losses/validation")),
    "evaluations.csv": ("return", ("eval/episodic_return",)),
    "values.csv": ("value", ("losses/q_values", "losses/qf1_values")),
}
SAME_ALGORITHM = {  # flags that do not tell runs apart
    *("seed", "run_name", "runs_dir", "resume", "device", "evaluate", "eval_episodes", "eval_frequency"),
    *("checkpoint_frequency", "capture_video", "track", "wandb_project_name", "wandb_entity"),
}


def fail(message: str) -> NoReturn:
    """Ends the program on a user's mistake: one line on standard error, exit status 2."""
    print(f"summary: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def records(path: Path) -> Iterator[bytes]:
    """The records of an event file: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    content, start = path.read_bytes(), 0
    while start + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        if start + length + 16 > len(content):
            return  # a kill cut the last one short
        yield content[start + 12 : start + 12 + length]
        start += length + 16


def read_events(run_dir: Path, tags: tuple[str, ...]) -> list[tuple[int, float]]:
    """Step and value of a curve; what a resumed run has logged again stands once, as in TensorBoard."""
    matters = re.compile(b"|".join([*map(str.encode, tags), START])).search  # parsing all takes twice as long
    points = []
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        for record in records(path):
            if matters(record):
                event = Event.FromString(record)
                points += [(event.step, value.simple_value) for value in event.summary.value if value.tag in tags]
                if event.session_log.status == SessionLog.START:
                    points = [point for point in points if point[0] < event.step]
    return points


def read_curve(run_dir: Path, name: str = "returns.csv") -> np.ndarray:
    """Steps and values (n, 2) of a finished run, from one of the files in CURVES, which is made where it is missing.

    In a very long one each row is the mean of some consecutive values.
    """
    path = run_dir / name
    if not path.exists():
        column, tags = CURVES[name]
        points = np.array(read_events(run_dir, tags)).reshape(-1, 2)
        blocks = np.array_split(points, min(len(points), MAX_ROWS)) if len(points) else []
        rows = [(block[-1, 0], block[:, 1].mean()) for block in blocks]
        temporary = path.with_name(f"{name}.tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", column])
            writer.writerows((int(step), f"{value:.6g}") for step, value in rows)
        os.replace(temporary, path)
    with open(path) as file:
        return np.array([tuple(map(float, row)) for row in csv.reader(file) if row[0] != "step"]).reshape(-1, 2)


def in_order(value: object) -> tuple[bool, float, str]:
    """What a flag's values, or the names of folders, are sorted by: numbers by size, then all else by its letters."""
    try:
        return False, float(value), ""
    except (TypeError, ValueError):
        return True, 0.0, str(value)


def read_runs(folder: Path) -> dict[tuple[str, str, str], list[dict]]:
    """The runs of a folder by script, environment and the flags in which runs of these two differ.

    Where there is none, the runs of the folders in it, told apart by the names of these as well: "tau 0.005".
    """
    by_environment = defaultdict(list)
    paths, setting = sorted(folder.glob("*/args.json")), ""
    compared = sorted(folder.glob("*/*/args.json"), key=lambda path: (path.parts[-2], in_order(path.parts[-3])))
    for path in paths or compared:
        if not paths:
            setting = f"{folder.resolve().name} {path.parts[-3]}"
        args, result_path = json.loads(path.read_text()), path.with_name("result.json")
        result = json.loads(result_path.read_text()) if result_path.exists() else None
        environment = args.get("env_id") or args.get("data") or args.get("dataset")
        if args.get("units") or not environment:
            continue  # an experiment of several trainings
        named = path.parent.name.split("__")  # ENVIRONMENT__SCRIPT__SEED, before there is a result
        script = result["script"] if result else named[-2] if len(named) > 2 else "?"
        by_environment[script, environment, setting].append({"folder": path.parent, "args": args, "result": result})
    groups = defaultdict(list)
    for (script, environment, setting), runs in by_environment.items():
        names = {name for run in runs for name in run["args"]} - SAME_ALGORITHM
        differing = sorted(name for name in names if len({str(run["args"].get(name)) for run in runs}) > 1)
        for run in sorted(runs, key=lambda run: [in_order(run["args"].get(name)) for name in differing]):
            flags = [f"{name} {run['args'].get(name)}" for name in differing]
            variant = ", ".join(filter(None, [setting, *flags]))
            groups[script, environment, variant].append(run)
    return groups


def human_normalised(environment: str, score: float) -> float | None:
    """100 (score - random) / (human - random), None where no figures are known."""
    game = re.sub(r"^ALE/|NoFrameskip|-v\d+$", "", environment).lower()
    with open(RESULTS / "atari_random_human.csv") as file:
        for row in csv.DictReader(file):
            if row["game"].replace("_", "") == game:
                return 100 * (score - float(row["random"])) / (float(row["human"]) - float(row["random"]))
    return None


def shown(value: float, digits: int = 3) -> str:
    """With so many digits, or as a whole number."""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def spread(values: list[float]) -> str:
    """Mean and standard deviation, and the values themselves where they are few."""
    if len(values) == 1:
        return shown(values[0])
    each = f" ({', '.join(map(shown, values))})" if len(values) <= 5 else ""
    return f"{shown(np.mean(values))} ± {shown(np.std(values, ddof=1), digits=2)}{each}"


def interquartile_mean(values: list[float]) -> str:
    """With its 95 % interval, from 2,000 bootstrap samples."""
    mean = shown(stats.trim_mean(values, 0.25))
    if len(set(values)) < 2:
        return mean

    def statistic(sample: np.ndarray, axis: int) -> np.ndarray:
        return stats.trim_mean(sample, 0.25, axis=axis)

    interval = stats.bootstrap((values,), statistic, n_resamples=2_000, method="percentile", rng=0).confidence_interval
    return f"{mean} [{shown(interval.low)}, {shown(interval.high)}]"


def table_row(script: str, environment: str, variant: str, runs: list[dict]) -> dict[str, str]:
    results = [run["result"] for run in runs if run["result"]]
    row = {
        "script": script,
        "environment": environment + (f" ({variant})" if variant else ""),
        "seeds done": f"{len({result['seed'] for result in results})} of {len({run['args']['seed'] for run in runs})}",
    }
    if not results:
        return row
    row["steps"] = f"{max(result.get('total_timesteps') or result['epochs'] for result in results):,}"
    last_quarters = []
    for run in runs:
        if run["result"]:
            steps, returns = run["returns"].T
            late = returns[steps > 0.75 * (run["args"].get("total_timesteps") or np.inf)]
            last_quarters += [late.mean()] if len(late) else []
    final = [result["train_return_mean"] for result in results if result.get("train_return_mean") is not None]
    scores = [result.get("eval_return_mean", result.get("test_r2")) for result in results]
    scores = [score for score in scores if score is not None]
    if last_quarters:
        row["return, last quarter"] = spread(last_quarters)
    if final:
        row["return, last 100"] = spread(final)
        row["return, last 100, IQM"] = interquartile_mean(final)
    if scores:
        row["evaluation"] = spread(scores) + (" (test R²)" if "test_r2" in results[0] else "")
        row["evaluation, IQM"] = interquartile_mean(scores)
        relative = [human_normalised(environment, score) for score in scores]
        row["human-normalised, %"] = "" if None in relative else spread(relative)
        row["human-normalised, IQM"] = "" if None in relative else interquartile_mean(relative)
    rates = [result.get("steps_per_second") or result.get("epochs_per_second") for result in results]
    row["steps/s"] = f"{np.mean([rate for rate in rates if rate]):.0f}" if any(rates) else ""
    row["hours"] = f"{sum(result['wall_seconds'] for result in results) / 3600:.2f}"
    return row


def write_tables(rows: list[dict[str, str]], folder: Path) -> None:
    """table.csv and table.md, and the same as text on the screen."""
    names = list(dict.fromkeys(name for row in rows for name in row if row[name]))
    cells = [names, *([row.get(name, "") for name in names] for row in rows)]
    with open(folder / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows(cells)
    lines = [f"| {' | '.join(line)} |" for line in cells]
    (folder / "table.md").write_text("\n".join([lines[0], "|---" * len(names) + "|", *lines[1:]]) + "\n")
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def smooth(steps: np.ndarray, returns: np.ndarray, grid: np.ndarray, width: float) -> np.ndarray:
    """Mean return of the episodes that end within `width` steps before each point of the grid.

    The return of the last one before it where none does, and NaN before the first.
    """
    sums = np.concatenate([[0], np.cumsum(returns)])
    last = np.searchsorted(steps, grid, "right")
    first = np.minimum(np.searchsorted(steps, grid - width, "right"), last - 1).clip(0)
    return np.where(last > first, (sums[last] - sums[first]) / np.maximum(last - first, 1), np.nan)


def draw(script: str, environment: str, variants: dict[str, list[dict]], path: Path) -> None:
    """Mean over seeds of the training returns, its 95 % bootstrap interval; up to three settings: also each run."""
    figure = Figure(figsize=(6, 3.6))
    axes = figure.subplots()
    regression = all("test_r2" in run["result"] for runs in variants.values() for run in runs)
    for index, (variant, runs) in enumerate(variants.items()):
        total = max(run["returns"][-1, 0] for run in runs)
        grid = np.linspace(0, total, 201)
        width = total / 200 if regression else total / 25
        curves = np.array([smooth(*run["returns"].T, grid, width) for run in runs])
        grid, curves = grid[np.isfinite(curves).all(axis=0)], curves[:, np.isfinite(curves).all(axis=0)]
        color = f"C{index}"
        label = f"{variant or 'mean'} ({len(runs)} seed{'s' * (len(runs) > 1)})"
        axes.plot(grid, curves.mean(axis=0), color=color, linewidth=2, label=label)
        if len(runs) > 1:
            if len(variants) <= 3:
                axes.plot(grid, curves.T, color=color, linewidth=0.6, alpha=0.5)
            interval = stats.bootstrap(
                (curves,), np.mean, axis=0, n_resamples=500, method="percentile", rng=0, vectorized=True
            ).confidence_interval
            axes.fill_between(grid, interval.low, interval.high, color=color, alpha=0.2, linewidth=0)
    if regression:
        axes.set(xlabel="epochs", ylabel="validation loss", yscale="log")
    else:
        axes.set(xlabel="steps", ylabel="return of training episodes")
    axes.set_title(f"{script}.py, {environment}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", framealpha=0.5)
    figure.subplots_adjust(left=0.14, right=0.97, bottom=0.14, top=0.91)
    figure.savefig(path, dpi=110)


def summarise(folder: Path) -> None:
    groups = read_runs(folder)
    if not groups:
        fail(f"there is no run in {folder}")
    try:
        (folder / "summary").mkdir(exist_ok=True)
    except OSError as error:
        fail(f"{folder / 'summary'}: {error.strerror}")
    all_finished = [run for runs in groups.values() for run in runs if run["result"]]
    with ProcessPoolExecutor() as pool:
        all_returns = pool.map(read_curve, [run["folder"] for run in all_finished], chunksize=8)
        for run, returns in zip(all_finished, all_returns, strict=True):
            run["returns"] = returns
    figures = defaultdict(dict)
    for (script, environment, variant), runs in groups.items():
        finished = [run for run in runs if run["result"]]
        drawable = [run for run in finished if len(run["returns"])]
        if drawable:
            figures[script, environment][variant] = drawable
    write_tables([table_row(*names, runs) for names, runs in groups.items()], folder / "summary")
    for (script, environment), variants in figures.items():
        name = re.sub(r"[^\w.-]", "-", f"{script}__{environment}.png")
        draw(script, environment, variants, folder / "summary" / name)
    print(f"\ntable.csv, table.md and {len(figures)} figures: {folder / 'summary'}")


def publish(run_dir: Path, folder: Path) -> None:
    """Copies what is published of a finished run into a folder."""
    if not (run_dir / "result.json").exists():
        fail(f"{run_dir} is no finished run: it has no result.json")
    published = folder / run_dir.name
    if published.exists() and (published / "args.json").read_bytes() != (run_dir / "args.json").read_bytes():
        fail(f"{published} is of another run; rename this one, or remove that one")
    published.mkdir(parents=True, exist_ok=True)
    for name in ("args.json", "result.json", *(name for name in CURVES if len(read_curve(run_dir, name)))):
        shutil.copy(run_dir / name, published)


def main() -> None:
    match sys.argv[1:]:
        case ["--publish", "--into", folder, *run_dirs] if run_dirs:
            parts = Path(folder).parts
            if not parts or Path(folder).is_absolute() or ".." in parts:
                fail(f"--into {folder}: give the name of a folder in {RESULTS}, such as tau/0.05")
            for run_dir in run_dirs:
                publish(Path(run_dir), RESULTS / folder)
            summarise(RESULTS / parts[0])
        case ["--publish", *run_dirs] if run_dirs:
            for run_dir in run_dirs:
                publish(Path(run_dir), RESULTS)
            summarise(RESULTS)
        case [folder] if Path(folder).is_dir():
            summarise(Path(folder))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
