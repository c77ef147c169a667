"""Measures mlp_regression.py: its training loop beside the usual DataLoader loop and scikit-learn, in speed and in fit.

    uv run tests/benchmark_mlp_regression.py            # the three tables
    uv run tests/benchmark_mlp_regression.py --no-fit   # the speed alone

Speed: the same network, examples, batch size and stochastic gradient descent for all, on one thread, the three in turn;
medians of the rounds. Fit: test R^2 on three real data sets, over 10 splits, the same rows for both; means and standard
deviations. A table of 1,000,000 rows by 20 columns: seconds and peak memory of the whole script.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "matplotlib==3.11.2",
#     "numpy==2.4.6",
#     "pandas==3.1.1",
#     "scikit-learn==1.9.1",
#     "statsmodels==0.15.0",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
#     "vega-datasets==0.9.0",
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
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch
import tyro
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SCRIPT = Path(__file__).parent.parent / "mlp_regression.py"
sys.path.insert(0, str(SCRIPT.parent))
import mlp_regression as mlp  # noqa: E402


@dataclasses.dataclass
class Args:
    rounds: int = 5
    """rounds of the three, one after the other"""
    speed: bool = True
    """measure the training loops"""
    fit: bool = True
    """compare test R^2 with scikit-learn's"""
    table: bool = True
    """train on 1,000,000 rows by 20 columns of CSV (400 MB of disk)"""


def median_seconds(epochs: list[Callable[[], object]], rounds: int) -> np.ndarray:
    """Of one call of each, in turn."""
    seconds = np.empty((rounds + 1, len(epochs)))
    for row in seconds:
        for i, epoch in enumerate(epochs):
            start = time.perf_counter()
            epoch()
            row[i] = time.perf_counter() - start
    return np.median(seconds[1:], axis=0)  # the first warms up


def measure_speed(rows: int, d: int, batch_size: int, rounds: int, scikit_learn: bool) -> None:
    from sklearn.neural_network import MLPRegressor

    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, (rows, d)).astype(np.float32)
    y = (x @ rng.standard_normal((d, 1))).astype(np.float32)
    x_tensor, y_tensor = torch.from_numpy(x), torch.from_numpy(y)

    args = mlp.Args(optimizer="sgd", hidden_sizes=(10,), activation="relu", batch_size=batch_size)
    mlp.fill_defaults(args)
    ours = mlp.make_model(args, d, 1)
    optimizer = mlp.make_optimizer(args, ours)

    usual = nn.Sequential(nn.Linear(d, 10), nn.ReLU(), nn.Linear(10, 1))
    usual_optimizer = torch.optim.SGD(usual.parameters(), lr=1e-3)
    criterion = nn.MSELoss()
    loader = DataLoader(TensorDataset(x_tensor, y_tensor), batch_size=batch_size, shuffle=True)

    def usual_epoch() -> None:
        for x_batch, y_batch in loader:
            usual_optimizer.zero_grad()
            loss = criterion(usual(x_batch), y_batch)
            loss.backward()
            usual_optimizer.step()

    theirs = MLPRegressor(
        hidden_layer_sizes=(10,), solver="sgd", batch_size=batch_size, learning_rate_init=1e-3, momentum=0, alpha=0
    )
    epochs = [lambda: mlp.train_epoch(ours, optimizer, x_tensor, y_tensor, batch_size), usual_epoch]
    if scikit_learn:  # partial_fit is one epoch
        epochs.append(lambda: theirs.partial_fit(x, y[:, 0]))
    seconds = median_seconds(epochs, rounds)
    cells = [f"{1 / second:.2f}" for second in seconds] + [""] * (3 - len(seconds))
    ratios = [f"{second / seconds[0]:.2f}" for second in seconds[1:]] + [""] * (3 - len(seconds))
    print(f"| {rows:,} x {d} | {batch_size:,} | {' | '.join(cells)} | {' | '.join(ratios)} |", flush=True)


def real_data() -> dict[str, tuple[pd.DataFrame, str]]:
    """Three tables that ship inside packages, and their targets."""
    import statsmodels.datasets
    import vega_datasets
    from sklearn.datasets import load_diabetes

    cars = vega_datasets.data.cars().dropna(subset="Miles_per_Gallon")
    cars = cars.assign(Year=pd.to_datetime(cars["Year"]).dt.year).drop(columns="Name")
    fair = statsmodels.datasets.fair.load_pandas().data
    return {
        "diabetes (scikit-learn)": (load_diabetes(as_frame=True).frame, "target"),
        "cars (vega_datasets)": (cars, "Miles_per_Gallon"),
        "fair (statsmodels)": (fair, "affairs"),
    }


def compare_fit(name: str, frame: pd.DataFrame, target: str) -> None:
    """Test R^2 of the script with its defaults and of scikit-learn's MLPRegressor with early stopping."""
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.metrics import r2_score
    from sklearn.neural_network import MLPRegressor
    from sklearn.preprocessing import StandardScaler

    scores = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        frame.to_csv(path, index=False)
        for seed in range(1, 11):
            flags = ["--data", path, "--target", target, "--seed", seed, "--runs-dir", folder, "--run-name", f"r{seed}"]
            subprocess.run([sys.executable, SCRIPT, *map(str, flags)], check=True, stdout=subprocess.DEVNULL)
            result = json.loads((Path(folder) / f"r{seed}" / "result.json").read_text())
            args = mlp.Args(seed=seed, data=str(path), target=(target,))
            mlp.fill_defaults(args)
            parts, _ = mlp.make_data(args, quiet=True)
            # Its early stopping splits off its own validation examples.
            x, y = (np.concatenate([parts["training"][i], parts["validation"][i]]) for i in (0, 1))
            theirs = TransformedTargetRegressor(
                MLPRegressor(early_stopping=True, random_state=seed), transformer=StandardScaler()
            )
            with warnings.catch_warnings(action="ignore"):  # that 200 epochs were not enough
                theirs.fit(x, y[:, 0])
            x_test, y_test = parts["test"]
            scores.append((result["test_r2"], r2_score(y_test[:, 0], theirs.predict(x_test))))
    (ours, theirs), (ours_std, theirs_std) = np.mean(scores, axis=0), np.std(scores, axis=0)
    size = f"{len(frame):,} x {frame.shape[1] - 1}"
    print(f"| {name} | {size} | {ours:.3f} +- {ours_std:.3f} | {theirs:.3f} +- {theirs_std:.3f} |", flush=True)


def train_on_large_table() -> None:
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "large.csv"
        for chunk in range(20):
            x = rng.standard_normal((50_000, 20))
            frame = pd.DataFrame(x, columns=[f"x{i}" for i in range(20)]).assign(y=np.sin(x[:, 0]) + x[:, 1] * x[:, 2])
            frame.to_csv(path, index=False, mode="a", header=chunk == 0, float_format="%.6g")
        flags = ["--data", path, "--target", "y", "--epochs", "3", "--batch-size", "1024", "--runs-dir", folder]
        start = time.perf_counter()
        subprocess.run([sys.executable, SCRIPT, *map(str, flags)], check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
        print(f"1,000,000 rows by 20 columns, 3 epochs: {time.perf_counter() - start:.0f} s, peak memory {peak:.2f} GB")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.speed:
        print("| examples | batch | epochs/s, this script | DataLoader | scikit-learn | ratio | ratio |")
        print("|---|---|---|---|---|---|---|")
        measure_speed(1_000, 2, 10, 20 * args.rounds, scikit_learn=True)
        measure_speed(1_000_000, 20, 1_024, args.rounds, scikit_learn=False)
    if args.table:
        train_on_large_table()
    if args.fit:
        print("| data | rows x columns | test R^2, this script | scikit-learn |\n|---|---|---|---|")
        for name, (frame, target) in real_data().items():
            compare_fit(name, frame, target)


if __name__ == "__main__":
    main()
