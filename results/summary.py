"""Tables and learning curves of runs, by script and environment, over seeds.

    python results/summary.py runs                                            # of a folder's runs, into runs/summary/
    python results/summary.py --publish results/tau/0.05 runs/tau/0.05/*__*   # copies what is published of these runs
    python results/summary.py results                                         # redraws what is published
    python results/summary.py results/ppo results/trpo                        # algorithms together, in results/summary/

Where the folder has no run but its folders do (runs/tau/0.005/NAME, runs/tau/0.05/NAME), these are compared, by name.
Runs that differ in more than the seed are told apart; a flag that a script of then did not have tells nothing. Of runs
that differ in nothing one counts. Curves are those of finished runs.
Algorithms that trained in the same environment are also drawn together, against steps and against hours: those that the
steps from the first update on take at the rate of the fastest seed, for the others may have shared the machine.

Of fewer than five seeds each one's value and curve. Of five and more the mean and its 95 % bootstrap interval
(percentile; of five normal values it covers the true mean in 84 of 100 cases). For the 57 Atari games that the
literature normalises (atari_random_human.csv, from DQN Zoo) the score relative to a random player, 0 %, and a human,
100 %; from two games of five seeds, one folder and the same flags on, also its interquartile mean over all their runs,
with an interval from samples of seeds within each game (Agarwal et al. 2021).
"""

import csv
import io
import json
import os
import re
import signal
import sys
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NoReturn

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MAX_ROWS = 2_000  # of a curve's file: under 40 KB
SEEDS = 5  # from which on there are intervals
NO_RUNS = {"logs", "summary"}  # folders beside the runs
CURVES = {  # a file, its second column, and the tags of which a run has one
    "returns.csv": ("return", ("charts/episodic_return", "losses/validation")),
    "evaluations.csv": ("return", ("eval/return_mean",)),
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


def write(path: Path, content: bytes) -> None:
    """Whole, or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_curves(run_dir: Path) -> None:
    """The curves of a finished run, as the files in CURVES; in a very long one a row is the mean of some values.

    Raises ValueError where the event files do not end as the result says.
    """
    keep = {"scalars": 0, "tensors": 1, "images": 1, "histograms": 1}  # 0: all
    events = EventAccumulator(str(run_dir), size_guidance=keep)
    known = events.Reload().Tags()["scalars"]
    last = json.loads((run_dir / "result.json").read_text()).get("train_return_mean")  # of the last 100
    for name, (column, tags) in reversed(CURVES.items()):  # returns.csv last: where it is, all are
        points = [(event.step, event.value) for tag in tags if tag in known for event in events.Scalars(tag)]
        points = np.array(points).reshape(-1, 2)
        if name == "returns.csv" and not (known and (last is None or np.isclose(points[-100:, 1].mean(), last, 1e-3))):
            raise ValueError("event files are damaged: they do not end as result.json says")
        if len(points) or name == "returns.csv":
            size = -(-len(points) // MAX_ROWS) or 1
            ends = range(len(points) % size or size, len(points) + 1, size)  # fewer in the first row, if in any
            blocks = [points[max(end - size, 0) : end] for end in ends]
            lines = [f"{block[-1, 0]:.0f},{block[:, 1].mean():.6g}" for block in blocks]
            write(run_dir / name, "\n".join([f"step,{column}", *lines, ""]).encode())


def read_returns(run_dir: Path) -> np.ndarray:
    """Steps and returns (n, 2) of a finished run; none, and a line on standard error, where they cannot be read."""
    try:
        if not (run_dir / "returns.csv").exists():
            write_curves(run_dir)
        with open(run_dir / "returns.csv") as file:
            return np.array([row for row in csv.reader(file) if row[:1] != ["step"]], dtype=float).reshape(-1, 2)
    except (OSError, ValueError) as error:
        print(f"summary: the curves of {run_dir} are left out: {error}", file=sys.stderr)
        return np.zeros((0, 2))


def in_order(value: object) -> tuple[bool, float, str]:
    """What a flag's values, or the names of folders, are sorted by: numbers by size, then all else by its letters."""
    try:
        return False, float(value), ""
    except (TypeError, ValueError):
        return True, 0.0, str(value)


def read_run(run_dir: Path) -> dict | None:
    """What a run's folder says of it; None, and a line on standard error, where it is no run of these scripts."""
    try:
        args = json.loads((run_dir / "args.json").read_text())
        environment = args.get("env_id") or (Path(args["data"]).stem if args.get("data") else args["dataset"])
        named = run_dir.name.split("__")  # ENVIRONMENT__SCRIPT__SEED, before there is a result
        run = {"folder": run_dir, "args": args, "environment": str(environment), "seed": args["seed"]}
        run |= {"script": named[1] if len(named) > 2 else "?", "finished": (run_dir / "result.json").exists()}
        if run["finished"]:
            result = json.loads((run_dir / "result.json").read_text())
            run |= {"script": str(result["script"]), "hours": result["wall_seconds"] / 3600}
            run["steps"] = result.get("total_timesteps") or result["epochs"]
            run["rate"] = result.get("steps_per_second") or result.get("epochs_per_second")
            names = {"evaluation": "eval_return_mean", "r2": "test_r2", "rmse": "test_rmse"}
            run |= {name: result.get(key) for name, key in names.items()}
            run["score"] = human_normalised(run["environment"], run["evaluation"])
        return run
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"summary: {run_dir} is left out, for it is no run: {error!r}", file=sys.stderr)
        return None


def read_runs(folder: Path) -> dict[tuple[str, str, str], list[dict]]:
    """The runs of a folder by script, environment and the flags in which runs of these two differ.

    Where there is none, the runs of the folders in it, told apart by the names of these as well, where they are numbers
    with the folder's: "tau 0.005". What is left out is said on standard error.
    """

    def within(folder: Path, setting: str) -> list[tuple[str, dict]]:
        paths = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in NO_RUNS]
        paths = [path for path in paths if os.path.exists(path / "args.json") or not any(path.glob("*/**/args.json"))]
        return [(setting, run) for path in paths if (run := read_run(path))]

    settings = sorted({path.parents[1] for path in folder.glob("*/*/args.json")}, key=lambda path: in_order(path.name))
    found = within(folder, "")
    if found and settings:
        print(f"summary: {folder} has runs of its own; those of folders in it are left out", file=sys.stderr)
    label = {path: f"{folder.resolve().name} " * (not in_order(path.name)[0]) + path.name for path in settings}
    found = found or [run for path in settings for run in within(path, label[path])]
    alike, groups = defaultdict(list), defaultdict(list)
    for setting, run in sorted(found, key=lambda pair: (pair[1]["environment"], not pair[1]["finished"])):
        alike[run["script"], run["environment"], setting].append(run)
    for (script, environment, setting), runs in alike.items():
        given = {(name, str(value)) for run in runs for name, value in run["args"].items()}
        times = Counter(name for name, _ in given)
        differing = sorted(name for name in times if times[name] > 1 and name not in SAME_ALGORITHM)
        runs.sort(key=lambda run: [*(in_order(run["args"].get(name)) for name in differing), in_order(run["seed"])])
        for run in runs:
            variant = [setting, *(f"{name} {run['args'].get(name)}" for name in differing)]
            group = groups[script, environment, ", ".join(filter(None, variant))]
            if run["seed"] not in {other["seed"] for other in group}:
                group.append(run)
            else:
                print(f"summary: {run['folder']} is left out: another run has its flags and its seed", file=sys.stderr)
    return groups


def human_normalised(environment: str, score: float | None) -> float | None:
    """100 (score - random) / (human - random), None where there is no score or no figures are known."""
    game = re.sub(r"^ALE/|NoFrameskip|-v\d+$", "", environment).lower()
    with open(Path(__file__).with_name("atari_random_human.csv")) as file:
        for row in csv.DictReader(file):
            if row["game"].replace("_", "") == game and score is not None:
                return 100 * (score - float(row["random"])) / (float(row["human"]) - float(row["random"]))
    return None


def shown(value: float) -> str:
    """With three digits, or as a whole number."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def interval(values: np.ndarray) -> np.ndarray:
    """The 95 % bootstrap interval (2, ...) of the mean over the first axis."""
    samples = np.random.default_rng(0).integers(len(values), size=(2_000, len(values)))
    weights = np.apply_along_axis(np.bincount, 1, samples, minlength=len(values)) / len(values)
    return np.percentile(weights @ values, [2.5, 97.5], axis=0)


def over_seeds(values: list[float | None]) -> str:
    """Each value where they are few, or else the mean and its interval."""
    known = [value for value in values if value is not None]
    if len(known) < SEEDS:
        return ", ".join("-" if value is None else shown(value) for value in values if known)
    missing = f" ({len(known)} of {len(values)} seeds)" * (len(known) < len(values))
    return "{} [{}, {}]".format(*map(shown, [np.mean(known), *interval(np.array(known))])) + missing


def table_row(script: str, environment: str, variant: str, runs: list[dict]) -> dict[str, str]:
    finished = [run for run in runs if run["finished"]]
    row = {"script": script, "environment": environment + (f" ({variant})" if variant else "")}
    row["seeds done"] = f"{len(finished)} of {len(runs)} begun"
    if finished:
        agents = [run for run in finished if run["rmse"] is None]
        late = [run["returns"][run["returns"][:, 0] > 0.75 * run["steps"], 1] for run in agents]
        row["steps"] = f"{max(run['steps'] for run in finished):,}"
        row["return, last quarter"] = over_seeds([returns.mean() if len(returns) else None for returns in late])
        row["evaluation"] = over_seeds([run["evaluation"] for run in finished])
        row["human-normalised, %"] = over_seeds([run["score"] for run in finished])
        row["test RMSE"] = over_seeds([run["rmse"] for run in finished])
        row["test R²"] = over_seeds([run["r2"] for run in finished])
        row["steps/s"] = f"{np.mean([run['rate'] or np.nan for run in finished]):.0f}"
        row["hours in all"] = f"{sum(run['hours'] for run in finished):.2f}"
    return row


def over_games(groups: dict[tuple[str, str, str], list[dict]]) -> list[str]:
    """For each script and its flags a line on all games and seeds together."""
    alike = defaultdict(dict)
    for (script, environment, variant), runs in groups.items():
        scores = [run["score"] for run in runs if run["finished"] and run["score"] is not None]
        flags = {name: str(value) for name, value in runs[0]["args"].items() if name not in {*SAME_ALGORITHM, "env_id"}}
        if len(scores) >= SEEDS:
            alike[script, runs[0]["folder"].parent, *flags.items()][environment] = variant, scores
    lines, rng = [], np.random.default_rng(0)
    for (script, *_), games in alike.items():
        if len(games) > 1:
            variants, scores = zip(*games.values(), strict=True)
            samples = np.concatenate([rng.choice(game, (2_000, len(game))) for game in scores], axis=1)
            low, high = np.percentile(stats.trim_mean(samples, 0.25, axis=1), [2.5, 97.5])
            mean = stats.trim_mean(np.concatenate(scores), 0.25)
            variant = f" ({max(variants, key=len)})" * any(variants)
            what = f"{script}{variant}, {samples.shape[1]} runs of {', '.join(games)}"
            figures = f"{shown(mean)} % [{shown(low)}, {shown(high)}]"
            lines.append(f"{what}: interquartile mean of the human-normalised evaluations {figures}")
    return lines


def write_tables(rows: list[dict[str, str]], notes: list[str], folder: Path) -> None:
    """table.csv and table.md, which is also shown."""
    names = list(dict.fromkeys(name for row in rows for name in row if row[name]))
    cells = [names, *([row.get(name, "") for name in names] for row in rows)]
    csv.writer(table := io.StringIO()).writerows(cells)
    write(folder / "table.csv", table.getvalue().encode())
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(map(str.ljust, line, widths)) for line in cells]
    text = "\n".join([*(f"| {line} |" for line in lines), *(f"\n{note}" for note in notes)])
    write(folder / "table.md", f"{text}\n".encode())
    print(text)


def smooth(steps: np.ndarray, returns: np.ndarray, grid: np.ndarray, width: float) -> np.ndarray:
    """Mean return of the episodes that end within `width` steps before each point of the grid.

    The return of the last one before it where none does, and NaN before the first.
    """
    sums = np.concatenate([[0], np.cumsum(returns)])
    last = np.searchsorted(steps, grid, "right")
    first = np.minimum(np.searchsorted(steps, grid - width, "right"), last - 1).clip(0)
    return np.where(last > first, (sums[last] - sums[first]) / np.maximum(last - first, 1), np.nan)


def draw_curves(axes: Axes, curves: dict[str, list[dict]], *, regression: bool, in_hours: bool = False) -> None:
    """By label, the mean over seeds of the training returns; each seed's where they are few, or else the interval."""
    for index, (label, runs) in enumerate(curves.items()):
        if not runs:  # it only keeps its colour
            continue
        total = max(run["returns"][-1, 0] for run in runs)
        grid = np.linspace(0, total, 201)
        width = total / 200 if regression else total / 25
        returns = np.array([smooth(*run["returns"].T, grid, width) for run in runs])
        grid, returns = grid[np.isfinite(returns).all(axis=0)], returns[:, np.isfinite(returns).all(axis=0)]
        if in_hours:  # the rate is that of the steps from the first update on; those before it take next to no time
            grid = np.where(grid > (starts := runs[0]["args"].get("learning_starts", 0)), grid - starts, np.nan)
            grid /= 3600 * (max(run["rate"] or 0 for run in runs) or np.nan)
        label = label.replace("$", r"\$")  # no mathematics
        label = f"{label} ({len(runs)} seed{'s' * (len(runs) > 1)})"
        axes.plot(grid, returns.mean(axis=0), color=f"C{index}", linewidth=2, label=label)
        if len(runs) >= SEEDS:
            axes.fill_between(grid, *interval(returns), color=f"C{index}", alpha=0.2, linewidth=0)
        elif len(runs) > 1:
            axes.plot(grid, returns.T, color=f"C{index}", linewidth=0.6, alpha=0.5)
    axes.grid(alpha=0.3)


def write_figure(figure: Figure, folder: Path, name: str) -> None:
    figure.savefig(png := io.BytesIO(), dpi=110)
    write(folder / re.sub(r"[^\w.-]", "-", f"{name}.png"), png.getvalue())


def draw(script: str, environment: str, variants: dict[str, list[dict]], folder: Path) -> None:
    """One algorithm in one environment."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    regression = all(run["rmse"] is not None for runs in variants.values() for run in runs)
    draw_curves(axes, {variant or "mean": runs for variant, runs in variants.items()}, regression=regression)
    x, y, scale = ("epochs", "validation loss", "log") if regression else ("steps", "return in training", "linear")
    axes.set(xlabel=x, ylabel=y, yscale=scale)
    axes.set_title(f"{script}.py, {environment}", parse_math=False)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    write_figure(figure, folder, f"{script}__{environment}")


def draw_together(environment: str, algorithms: dict[str, list[dict]], folder: Path) -> None:
    """Several algorithms in one environment, against steps and against hours."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_steps, by_hours = figure.subplots(1, 2, sharey=True)
    draw_curves(by_steps, algorithms, regression=False)
    draw_curves(by_hours, algorithms, regression=False, in_hours=True)
    by_steps.set(xlabel="steps", ylabel="return in training")
    by_hours.set(xlabel="hours on its machine", xscale="log")
    by_hours.xaxis.set_major_formatter("{x:g}")
    by_hours.set_xlim(left=min(5e-3, by_hours.get_xlim()[1] / 10))
    figure.legend(*by_steps.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(environment, parse_math=False)
    write_figure(figure, folder, environment)


def summarise(*folders: Path) -> None:
    """Of one folder tables and figures; of several the figures in which runs of two or more meet."""
    alone, figures, together = len(folders) == 1, defaultdict(dict), defaultdict(dict)
    groups = {(*names, folder): runs for folder in folders for names, runs in read_runs(folder).items()}
    into = Path(os.path.commonpath([folder.resolve() for folder in folders])) / "summary"
    if not groups:
        fail(f"there is no run in {' '.join(map(str, folders))}")
    finished = [run for runs in groups.values() for run in runs if run["finished"]]
    with ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        for run, returns in zip(finished, pool.map(read_returns, [run["folder"] for run in finished]), strict=True):
            run["returns"] = returns
        for (script, environment, variant, path), runs in groups.items():
            if drawable := [run for run in runs if len(run.get("returns", ()))]:
                figures[script, environment][variant] = drawable
                label = f"{script} {variant}".rstrip()
                label += f", {path.resolve().relative_to(into.parent)}" * (label in together[environment])
                together[environment][label] = drawable
        scripts = Counter(environment for _, environment in figures)
        several = {name: curves for name, curves in together.items() if (scripts[name] if alone else len(curves)) > 1}
        if not (alone or several):
            fail("these folders have no curves of the same environment")
        into.mkdir(exist_ok=True)
        drawn = [pool.submit(draw, *names, variants, into) for names, variants in figures.items() if alone]
        labels = dict.fromkeys(label for curves in several.values() for label in curves)  # each has one colour
        for name, curves in several.items():
            curves = {label: curves.get(label, []) for label in labels}
            drawn.append(pool.submit(draw_together, name, curves, into))
        if alone:
            rows = [table_row(*names, runs) for (*names, _), runs in groups.items()]
            write_tables(rows, over_games({names[:3]: runs for names, runs in groups.items()}), into)
        for figure in drawn:
            figure.result()
    print(f"\n{'table.csv, table.md and ' * alone}{len(drawn)} figures: {into}")


def publish(run_dir: Path, folder: Path) -> None:
    """Copies what is published of a finished run into a folder of published ones; what is there stays."""
    if not (run_dir / "result.json").exists():
        fail(f"{run_dir} is no finished run: it has no result.json")
    published = folder / run_dir.name
    for name in ("args.json", "result.json"):
        if (published / name).exists() and (published / name).read_bytes() != (run_dir / name).read_bytes():
            fail(f"{published} is of another run")
    try:
        if not (run_dir / "returns.csv").exists():
            write_curves(run_dir)
    except ValueError as error:
        fail(f"{run_dir}: {error}")
    published.mkdir(parents=True, exist_ok=True)
    for name in ("args.json", *CURVES, "result.json"):
        if (run_dir / name).exists():
            write(published / name, (run_dir / name).read_bytes())


def main() -> None:
    try:
        match sys.argv[1:]:
            case ["--help" | "-h"]:
                print(__doc__)
            case ["--publish", folder, *run_dirs] if run_dirs and not Path(folder, "args.json").exists():
                for run_dir in map(Path, run_dirs):
                    publish(run_dir.absolute(), Path(folder))
            case [*folders] if folders and all(Path(folder).is_dir() for folder in folders):
                summarise(*map(Path, folders))
            case arguments:
                fail(f"{' '.join(arguments)}: give folders of runs, or --publish FOLDER RUN..., or --help")
    except OSError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
