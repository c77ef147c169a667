"""Function approximation in one file: linear and logistic models, RBF networks and multilayer perceptrons, trained by
their gradients and looked at in TensorBoard.

    python mlp_regression.py                                        # sin(2 pi x) as a sum of three sigmoids
    python mlp_regression.py --dataset circle --hidden-sizes 4      # a region of the plane, and what each unit learnt
    python mlp_regression.py --data houses.csv --target price       # a table of your own

The parametric functions f(x; w) and how they learn. The numbers stand again below, where each line happens.

     1  linear      f(x) = w_0 + sum_i w_i x_i
     2  logistic    f(x) = sigma(w_0 + sum_i w_i x_i)
     3  RBF         f(x) = sum_i a_i rho(|x - c_i|), centres c_i learnt; rho(r) = exp(-(r / b_i)^2), widths b_i learnt
     4  MLP         h = activation(W x + b), once for each hidden layer; f(x) = a_0 + sum_i a_i h_i
     5  initialise w at random
     6  for each epoch:
     7      shuffle the training examples, cut them into minibatches
     8      for each minibatch of examples (x_j, y_j):
     9          clear the gradient
    10          loss = mean of (y_j - f(x_j; w))^2
    11          the gradient of the loss by w, by backpropagation
    12          one step of the optimizer
    13      keep w if the loss on the validation examples is the best so far

An MLP with one hidden layer approximates every continuous function on a closed bounded region, given enough units
(Cybenko 1989, Hornik et al. 1989). That good weights exist does not mean that descent finds them: from a usual start
three sigmoids often miss the sine. `--restarts` takes the best of several, `--init-scale` begins with steep units.

An evaluation is of the test examples, whatever `--eval-episodes` says. The common flags' steps are epochs: a training
of hours wants `--checkpoint-frequency 100`.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "matplotlib==3.11.2",
#     "numpy==2.4.6",
#     "pandas==3.1.1",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///

from __future__ import annotations

import contextlib
import copy
import csv
import ctypes
import dataclasses
import errno
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tyro.constructors import PrimitiveConstructorSpec

warnings.filterwarnings("ignore", "Glyph")  # of columns' names in scripts that the pictures' font lacks
LOG_FREQUENCY = 1  # epochs between two records of losses
MAX_CATEGORIES = 50  # of a column; rarer ones share the code of all zeros
MAX_NUMBER = 1e30  # float32, in which networks compute, ends at 3e38
PARTS = {"training": 0.7, "validation": 0.1, "test": 0.2}  # of the rows
DATASETS = {  # number of inputs, each uniform in [-1, 1], and the function
    "sine": (1, lambda x: np.sin(2 * np.pi * x[:, 0])),
    "plane": (2, lambda x: 0.3 + 0.5 * x[:, 0] - 0.7 * x[:, 1]),
    "circle": (2, lambda x: (np.hypot(x[:, 0], x[:, 1]) < 0.6).astype(float)),
    "spiral": (2, lambda x: np.hypot(x[:, 0], x[:, 1]) * np.sin(np.arctan2(x[:, 1], x[:, 0]) + 6 * np.hypot(*x.T))),
}


@dataclasses.dataclass
class Args:
    dataset: Literal["sine", "plane", "circle", "spiral"] = "sine"
    """a known function, on [-1, 1] or on the square [-1, 1]^2"""
    samples: Count = 1_000
    """examples of it"""
    noise: NonNegative = 0.0
    """standard deviation of the noise on its values"""
    data: str = ""
    """a CSV file with a header, instead of --dataset"""
    target: tuple[str, ...] = ()
    """the column (or columns) of --data to predict from all others"""
    model: Literal["linear", "logistic", "rbf", "mlp"] = "mlp"
    """1, 2, 3 or 4 of the listing"""
    hidden_sizes: tuple[Count, ...] | None = None
    """units in each hidden layer (rbf: one number). Default: 3; with --data 64 64, for rbf 64"""
    activation: Literal["relu", "sigmoid", "tanh"] | None = None
    """of an MLP. Default: sigmoid; with --data relu"""
    init_scale: NonNegative | None = None
    """an MLP's first layer starts with weights of this standard deviation over the root of the number of inputs, each
    unit's midpoint at a random example. Default: 8 with lbfgs on a --dataset, else 0: as PyTorch does"""
    optimizer: Literal["sgd", "adam", "lbfgs"] | None = None
    """lbfgs takes all examples at once. Default: lbfgs; with --data adam"""
    learning_rate: Positive | None = None
    """step size. Default: 1 with lbfgs, else 0.001"""
    batch_size: Count | None = None
    """examples in a minibatch, or all if fewer. Default: 10 with sgd, 64 with adam; with adam and --data 200"""
    epochs: Count | None = None
    """passes over the training examples, at most; of lbfgs up to 20 iterations. Default: 25 with lbfgs, else 1000"""
    patience: Natural | None = None
    """end after this many epochs without a better validation loss; 0: never. Default: 0; with --data 20"""
    restarts: Count | None = None
    """random starts, of which the best is kept. Default: 20 with lbfgs for rbf and mlp, else 1"""

    # The run
    seed: Natural = 1
    """seed of the weights, of all draws and of the environment"""
    device: Literal[DEVICES] = "cpu"
    """auto takes cuda where there is one; for networks this small the CPU is faster"""
    runs_dir: Path = Path("runs")
    """folder that holds the runs"""
    run_name: str = ""
    """name of this run's folder in the runs' folder; default ENV__SCRIPT__SEED__TIMESTAMP"""
    resume: bool = False
    """go on from the checkpoint of --run-name; start the run where there is none"""
    checkpoint_frequency: Natural = 10_000
    """steps between two checkpoints; 0: only at evaluations, on signals and at the end"""
    eval_frequency: Natural = 0
    """steps between two evaluations during the training, in an environment of their own; 0: none"""
    eval_episodes: Natural = 10
    """episodes of an evaluation, also of the one after the training; 0: none"""
    evaluate: Path | None = None
    """a model.pt to evaluate, instead of training"""
    capture_video: bool = False
    """record the episodes of the last evaluation as mp4"""
    track: bool = False
    """also log to Weights & Biases (pip install wandb); WANDB_PROJECT and WANDB_ENTITY say where"""


def fill_defaults(args: Args) -> None:
    """Those that depend on the data and on the optimizer."""
    args.optimizer = args.optimizer or ("adam" if args.data else "lbfgs")
    lbfgs = args.optimizer == "lbfgs"
    defaults = {
        "activation": "relu" if args.data else "sigmoid",
        "hidden_sizes": (3,) if not args.data else (64,) if args.model == "rbf" else (64, 64),
        "epochs": 25 if lbfgs else 1_000,
        "learning_rate": 1.0 if lbfgs else 1e-3,
        "init_scale": 8.0 if lbfgs and not args.data else 0.0,
        "restarts": 20 if lbfgs and args.model in ("rbf", "mlp") else 1,
        "patience": 20 if args.data else 0,
        "batch_size": None if lbfgs else 10 if args.optimizer == "sgd" else 200 if args.data else 64,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def read_table(path: str, columns: Iterable[str], text: Iterable[str] = ()) -> pd.DataFrame:
    """A CSV file with a header that has these columns, `text` unparsed; ends the program where it is none."""
    header = [""]
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            lines = enumerate(csv.reader(file, skipinitialspace=True))
            blank, header = next(((n, line) for n, line in lines if line), (0, header))
        options = {"index_col": False, "low_memory": False, "skipinitialspace": True, "skiprows": blank}
        options["compression"] = None  # whatever the file's name ends with
        options |= {"dtype": dict.fromkeys(text, str), "skip_blank_lines": len(header) > 1}  # in one column: gaps
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            frame = pd.read_csv(path, **options)
    except UnicodeDecodeError as error:
        fail(f"--data {path}: not a CSV file in UTF-8: save it as one ({error})")
    except (csv.Error, ValueError, pd.errors.ParserWarning) as error:
        seen = f"its first line is {header[:9]}, and should name the columns of the others, divided by commas"
        fail(f"--data {path}: not a CSV file with a header: {seen} ({str(error).splitlines()[0]})")
    for name in header:
        if name and header.count(name) > 1:
            fail(f"--data {path}: more than one column is called {name!r}")
    for name in columns:
        if name not in frame:
            hint = "; columns are divided by commas" * (len(header) == 1)
            fail(f"--data {path}: there is no column {name!r} among {', '.join(map(repr, header[:99]))}{hint}")
    return frame


def numbers(frame: pd.DataFrame, name: str, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    """A column, standardised, as float64 (rows,), NaN where it is empty; ends the program where it is no number."""
    values = pd.to_numeric(frame[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
    low, high = mean - MAX_NUMBER * std, mean + MAX_NUMBER * std
    wrong = frame[name].notna().to_numpy() & ~((low < values) & (values < high))
    if wrong.any():
        row = int(wrong.argmax())
        where = f"column {name} has {frame[name].iloc[row]} in row {frame.index[row] + 1}"
        fail(f"{where}: must be a number between {low:g} and {high:g}")
    return (values - mean) / std


def not_numbers(column: pd.Series) -> pd.Series:
    """What stands in it and is no number."""
    return column[column.notna() & pd.to_numeric(column, errors="coerce").isna()]


def nearly_numbers(column: pd.Series) -> str:
    """What keeps a column, most of which looks like numbers, from being one; else nothing."""
    odd, bare = not_numbers(column), column.dropna().astype(str).str.replace(r"[,%$€\s]", "", regex=True)
    if odd.empty or pd.to_numeric(bare, errors="coerce").notna().mean() <= 0.5:
        return ""
    return f"most of it looks like numbers, but not {odd.iloc[0]} in row {odd.index[0] + 1}"


def fit_encoding(frame: pd.DataFrame, training: np.ndarray) -> dict:
    """How columns become numbers: means, deviations, medians, categories, from the training rows alone.

    Only whether a column is one of numbers is seen from all rows.
    """
    encoding = {"inputs": [], "left_out": []}
    for name in frame.columns:
        column, numeric = frame[name].iloc[training], not_numbers(frame[name]).empty
        if numeric:
            column = pd.Series(numbers(frame, name)[training])  # as which large integers may be alike
        missing, distinct = bool(column.isna().any()), column.nunique()
        if re.fullmatch(r"Unnamed: 0(\.\d+)*", name) and numeric and (column % 1 == 0).all():  # .1: saved once more
            encoding["left_out"].append(f"{name} (row numbers, as pandas and R write them)")
        elif distinct == 0 or (distinct == 1 and not missing):
            encoding["left_out"].append(f"{name} ({'constant' if distinct else 'empty'})")
        elif numeric:
            filled = column.fillna(column.median())
            scale = {
                "median": column.median(),
                "mean": filled.mean(),
                "std": (filled.std(ddof=0) if distinct > 1 else 0.0) or 1.0,  # 0 too where squares are too small
            }
            encoding["inputs"].append({"name": name, "missing": missing} | {key: float(scale[key]) for key in scale})
        elif distinct == column.count() and not missing:
            encoding["left_out"].append(f"{name} ({nearly_numbers(frame[name]) or 'different in every row'})")
        else:
            counts = column.value_counts()
            known = [str(category) for category in counts[counts > 1].index[:MAX_CATEGORIES]]
            encoding["inputs"].append({"name": name, "missing": missing, "categories": known})
    return encoding


def encode(frame: pd.DataFrame, encoding: dict) -> np.ndarray:
    """The inputs as float32 (rows, d): numbers standardised, categories one-hot, and a column for what is missing."""
    columns = []
    for column in encoding["inputs"]:
        name, missing = column["name"], frame[column["name"]].isna()
        if "categories" in column:
            text = frame[name].astype(str).to_numpy()
            columns += [text == category for category in column["categories"]]
        else:
            mean, std = column["mean"], column["std"]
            columns.append(np.where(missing, (column["median"] - mean) / std, numbers(frame, name, mean, std)))
        columns += [missing] * column["missing"]
    return np.stack(columns, axis=1, dtype=np.float32, casting="unsafe")


def describe(frame: pd.DataFrame, encoding: dict) -> None:
    """Says what becomes of a table's columns."""
    for column in encoding["inputs"]:
        name, there = column["name"], frame[column["name"]].dropna()
        instead = "a category of its own" if column["missing"] else "coded as none"
        if not column.get("categories", True):
            print(f"column {name}: hardly a value stands twice, so only whether it is missing counts")
        elif "categories" in column:
            text = there.astype(str)
            others = text[~text.isin(column["categories"])]
            print(f"column {name}: one-hot, {len(column['categories'])} categories")
            if len(others):
                print(f"column {name}: {len(others):,} rows have others, such as {others.iloc[0]}: coded as none")
            if nearly := nearly_numbers(there):
                print(f"column {name}: {nearly}")
        else:
            instead = f"the median {column['median']:g}" + ", marked" * column["missing"]
        if len(there) < len(frame):
            print(f"column {name}: where it is missing, {instead}")
    for reason in encoding["left_out"]:
        print(f"column {reason}: left out")


def known_function(args: Args, x: np.ndarray) -> np.ndarray:
    """The values (rows, 1) of --dataset at x (rows, d), float32."""
    return DATASETS[args.dataset][1](x.astype(np.float64)).astype(np.float32)[:, None]


def make_data(args: Args, quiet: bool = False) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict]:
    """Inputs and targets, float32 (rows, d) and (rows, k), of each part of the data; and the encoding of its table."""
    rng = np.random.default_rng(args.seed)
    if args.data:
        frame = read_table(args.data, args.target)
        targets = np.stack([numbers(frame, name) for name in args.target], axis=1)
        complete = ~np.isnan(targets).any(axis=1)
        frame, targets = frame[complete].drop(columns=list(args.target)), targets[complete]
        rows, dropped = len(frame), int((~complete).sum())
    else:
        rows, d = args.samples, DATASETS[args.dataset][0]
        x = rng.uniform(-1, 1, (rows, d)).astype(np.float32)
        y = known_function(args, x) + args.noise * rng.standard_normal((rows, 1), np.float32)
    order = rng.permutation(rows)
    split = np.split(order, np.cumsum([round(rows * PARTS["training"]), round(rows * PARTS["validation"])]))
    flag = f"--data {args.data}" if args.data else f"--samples {args.samples}"
    if min(map(len, split)) < 2:
        fail(f"{flag}: {rows} rows are too few: training, validation and test need two each")
    encoding = {"mean": [0.0], "std": [1.0]}
    if args.data:
        known = targets[split[0]]
        if ((known.min(axis=0) == known.max(axis=0)) | (known.std(axis=0) == 0)).any():
            fail(f"{flag}: a target has one value in all rows to train on, there is nothing to learn")
        encoding = fit_encoding(frame, split[0])
        if not encoding["inputs"]:
            fail(f"{flag}: no column is left to predict from; left out: {', '.join(encoding['left_out']) or None}")
        scaled = args.model != "logistic"  # sigma's values lie in (0, 1)
        encoding |= {"mean": (known.mean(axis=0) * scaled).tolist(), "std": (known.std(axis=0) ** scaled).tolist()}
        x, y = encode(frame, encoding), ((targets - encoding["mean"]) / encoding["std"]).astype(np.float32)
        if not quiet:
            print(f"{rows:,} rows, {dropped:,} without a target left out")
            if repeated := int(pd.DataFrame(np.hstack([x, y])).duplicated().sum()):
                print(f"{repeated:,} rows repeat others: test rows may stand among those that are trained on")
            describe(frame, encoding)
    if args.model == "logistic" and not (y.min() >= 0 and y.max() <= 1):
        fail(f"--model logistic: its values lie in (0, 1), but there are targets from {y.min():g} to {y.max():g}")
    parts = {part: (x[rows], y[rows]) for part, rows in zip(PARTS, split, strict=True)}
    baseline = parts["training"][1].mean(axis=0, dtype=np.float64)
    encoding["baseline"] = (np.array(encoding["mean"]) + np.array(encoding["std"]) * baseline).tolist()
    return parts, encoding


# Each has `hidden`, the values of its hidden layers, (batch, units), first to last, and a layer `last`, whose weights
# times the last hidden values add up to its output (for the logistic model, before sigma).


class Linear(nn.Module):
    """1: f(x) = w_0 + sum_i w_i x_i, (batch, d) to (batch, k)."""

    def __init__(self, d: int, k: int):
        super().__init__()
        self.last = nn.Linear(d, k)

    def hidden(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x)


class Logistic(Linear):
    """2: f(x) = sigma(w_0 + sum_i w_i x_i), (batch, d) to (batch, k)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.last(x))


class RBFNetwork(nn.Module):
    """3: f(x) = sum_i a_i exp(-(|x - c_i| / b_i)^2), (batch, d) to (batch, k); the centres start at random examples."""

    def __init__(self, d: int, k: int, units: int, examples: torch.Tensor):
        super().__init__()
        self.centres = nn.Parameter(examples[torch.randint(len(examples), (units,))].clone())
        self.widths = nn.Parameter(torch.full((units,), math.sqrt(d) / units ** (1 / d)))
        self.last = nn.Linear(units, k, bias=False)

    def hidden(self, x: torch.Tensor) -> list[torch.Tensor]:
        distance = torch.cdist(x, self.centres, compute_mode="donot_use_mm_for_euclid_dist")  # exact near a centre
        return [torch.exp(-(distance / self.widths).square())]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.hidden(x)[0])


class MLP(nn.Module):
    """4: h = activation(W x + b) for each hidden layer, f(x) = a_0 + sum_i a_i h_i; (batch, d) to (batch, k).

    With an init_scale the units of the first layer are steep and their midpoints, w x + b = 0, lie among the examples:
    each sees a part of the function from the start (in the spirit of Nguyen and Widrow 1990).
    """

    def __init__(self, args: Args, d: int, k: int, examples: torch.Tensor | None = None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in itertools.pairwise([d, *args.hidden_sizes]))
        self.activation = {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}[args.activation]
        self.last = nn.Linear(args.hidden_sizes[-1], k)
        if args.init_scale and examples is not None:
            first = self.layers[0]
            nn.init.normal_(first.weight, std=args.init_scale / math.sqrt(d))
            midpoints = examples[torch.randint(len(examples), (args.hidden_sizes[0],))]
            first.bias.data = -(first.weight.data * midpoints).sum(dim=1)

    def hidden(self, x: torch.Tensor) -> list[torch.Tensor]:
        values = []
        for layer in self.layers:
            x = self.activation(layer(x))
            values.append(x)
        return values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.hidden(x)[-1])


def make_model(args: Args, d: int, k: int, examples: torch.Tensor | None = None) -> nn.Module:
    """The model of the flags; `examples` (n, d) place its units, where it is to be trained."""
    if args.model == "mlp":
        return MLP(args, d, k, examples)
    if args.model == "rbf":
        return RBFNetwork(d, k, args.hidden_sizes[0], torch.zeros(1, d) if examples is None else examples)
    return {"linear": Linear, "logistic": Logistic}[args.model](d, k)


def make_optimizer(args: Args, model: nn.Module) -> torch.optim.Optimizer:
    if args.optimizer == "lbfgs":
        return torch.optim.LBFGS(model.parameters(), lr=args.learning_rate, line_search_fn="strong_wolfe")
    return {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[args.optimizer](model.parameters(), lr=args.learning_rate)


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, batch_size: int | None
) -> float:
    """One pass over x (n, d) and y (n, k); returns the mean loss, each minibatch before its step."""
    if batch_size is None:  # 8: all examples at once

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        return optimizer.step(closure).item()
    # 7: shuffled once for the whole epoch; cutting up is free, fetching example after example is not
    order = torch.randperm(len(x)).to(x.device)
    losses, sizes = [], []
    for x_batch, y_batch in zip(x[order].split(batch_size), y[order].split(batch_size), strict=True):  # 8
        optimizer.zero_grad()  # 9
        loss = F.mse_loss(model(x_batch), y_batch)  # 10
        loss.backward()  # 11
        optimizer.step()  # 12
        losses.append(loss.detach())
        sizes.append(len(x_batch))
    return float(np.average(torch.stack(losses).cpu().numpy(), weights=sizes))


class Best(dict):
    """The weights with the best validation loss so far, and what else is needed to predict and to go on."""

    state_dict, load_state_dict = dict.copy, dict.update


def predict(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    """f(x) of (n, d) as (n, k), some thousand rows at a time."""
    with torch.inference_mode():
        return torch.cat([model(rows) for rows in x.split(16_384)]).cpu().numpy()


def scores(prediction: np.ndarray, target: np.ndarray, baseline: list[float]) -> dict[str, float]:
    """MSE, RMSE and R^2 of predictions (n, k), and the MSE of predicting `baseline` (k,); means over the targets.

    There is no R^2 where a target has one value only.
    """
    mse, baseline_mse = ((values - target) ** 2 for values in (prediction, baseline))
    figures = {"mse": mse.mean().item(), "rmse": math.sqrt(mse.mean()), "baseline_mse": baseline_mse.mean().item()}
    if (target.min(axis=0) < target.max(axis=0)).all():
        figures["r2"] = (1 - mse.mean(axis=0) / target.var(axis=0)).mean().item()
    return figures


def digest(args: Args) -> str:
    """Tells whether a table is still the same."""
    return hashlib.sha256(Path(args.data).read_bytes()).hexdigest() if args.data else ""


def train(args: Args, run: Run) -> dict[str, Best]:
    """Trains as the listing above says; returns the best weights."""
    arrays, encoding = make_data(args)
    parts = {part: tuple(torch.from_numpy(array).to(run.device) for array in arrays[part]) for part in PARTS}
    (x, y), (x_validation, _) = parts["training"], parts["validation"]
    # 5: initialise w at random
    model = make_model(args, x.shape[1], y.shape[1], x.cpu()).to(run.device)
    optimizer = make_optimizer(args, model)
    best = Best(
        encoding=encoding, digest=digest(args), seed=args.seed, loss=math.inf, step=0, start_loss=math.inf, start_step=0
    )
    if run.checkpoint and run.checkpoint["parts"]["best"]["digest"] != best["digest"]:
        fail(f"--resume: {args.data} has changed since {run.dir} was started")
    run.restore(model=model, optimizer=optimizer, best=best)

    for step in run.steps(args.restarts * args.epochs, best=best):  # 6: for each epoch, of one start after the other
        if step > 1 and (step - 1) % args.epochs == 0:  # 5: the next start
            model.load_state_dict(make_model(args, x.shape[1], y.shape[1], x.cpu()).state_dict())
            optimizer.state.clear()
            best |= {"start_loss": math.inf, "start_step": step - 1}
        if 0 < args.patience <= step - 1 - best["start_step"]:
            continue  # this start has ended
        loss = train_epoch(model, optimizer, x, y, args.batch_size)  # 7 to 12
        figures = scores(predict(model, x_validation), arrays["validation"][1], [0.0] * y.shape[1])
        if figures["mse"] < best["start_loss"]:
            best |= {"start_loss": figures["mse"], "start_step": step}
        if figures["mse"] < best["loss"]:  # 13: keep w
            weights = {name: weight.clone() for name, weight in model.state_dict().items()}
            best |= {"loss": figures["mse"], "step": step, "weights": weights}
        r2 = {"charts/validation_r2": figures["r2"]} if "r2" in figures else {}
        run.log({"losses/train": loss, "losses/validation": figures["mse"], **r2})
        if step <= args.epochs and step & (step - 1) == 0:  # 1, 2, 4, 8, ...
            run.writer.add_figure("model", picture(args, model, parts, encoding), step)
            for name, weight in model.named_parameters():
                run.writer.add_histogram(name.replace(".", "/"), weight, step)
        if step > (args.restarts - 1) * args.epochs and 0 < args.patience <= step - best["start_step"]:
            break  # the last start has ended

    model.load_state_dict(best["weights"])
    run.writer.add_figure("best", picture(args, model, parts, encoding), best["step"])
    return {"best": best}


def evaluate(args: Args, model: dict[str, dict], device: torch.device, folder: Path | None) -> dict[str, float]:
    """Scores on the test examples, or on all rows of another table than that of the training.

    `best_epoch` counts through all starts. With --evaluate and --data the predictions for all rows go to a new CSV
    file in `folder`.
    """
    model = model["best"]
    encoding = model["encoding"]
    mean, std, same = np.array(encoding["mean"]), np.array(encoding["std"]), model["digest"] == digest(args)
    if same:
        x, y = make_data(dataclasses.replace(args, seed=model["seed"]), quiet=True)[0]["test"]
        target = mean + std * y
    elif not args.evaluate:
        fail(f"--data {args.data} has changed since the training began")
    if args.evaluate and args.data:
        text = tuple(column["name"] for column in encoding["inputs"] if "categories" in column)
        frame = read_table(args.data, tuple(column["name"] for column in encoding["inputs"]), text)
        describe(frame, encoding)
        rows = encode(frame, encoding)
        if not same:
            x, there = rows, set(args.target) <= set(frame.columns)
            target = np.stack(
                [numbers(frame, name) if there else np.full(len(x), np.nan) for name in args.target], axis=1
            )
    network = make_model(args, x.shape[1], len(mean)).to(device)
    network.load_state_dict(model["weights"])

    def f(x: np.ndarray) -> np.ndarray:
        return mean + std * predict(network, torch.from_numpy(x).to(device))

    figures, known = {"best_epoch": model["step"]}, ~np.isnan(target).any(axis=1)
    if known.any():
        if not same:
            print("the figures are of all rows of this other table with a target, also of any that were trained on")
        figures |= {f"test_{name}": v for name, v in scores(f(x[known]), target[known], encoding["baseline"]).items()}
    if not args.data:  # against the function itself, on an even grid
        axis = np.linspace(-1, 1, 1001 if x.shape[1] == 1 else 101, dtype=np.float32)
        grid = np.stack(np.meshgrid(*[axis] * x.shape[1]), axis=-1).reshape(-1, x.shape[1])
        error = f(grid) - known_function(args, grid)
        figures |= {"largest_error": np.abs(error).max().item(), "function_rmse": math.sqrt(np.mean(error**2))}
    elif args.evaluate:
        path, n = folder / f"predictions__{Path(args.data).stem}.csv", itertools.count(2)
        while path.exists():
            path = path.with_stem(f"predictions__{Path(args.data).stem}-{next(n)}")
        save(path, pd.DataFrame(f(rows), columns=list(args.target)).to_csv(index=False))
        print(f"{len(rows):,} predictions: {path}")
    return figures


def check(args: Args) -> str:
    """Refuses what only this script can refuse; returns the name of what it trains on."""
    fill_defaults(args)
    if args.capture_video:
        fail("--capture-video: a regression has no episodes to record")
    if args.batch_size and args.optimizer == "lbfgs":
        fail(f"--batch-size {args.batch_size}: lbfgs takes all examples at once; take --optimizer adam or sgd")
    if not args.hidden_sizes or (args.model == "rbf" and len(args.hidden_sizes) > 1):
        fail(f"--hidden-sizes {args.hidden_sizes}: give one number for each hidden layer; an RBF network has one")
    if args.evaluate and args.data and not args.target:
        fail(f"--data {args.data}: {args.evaluate} was trained on --dataset {args.dataset}, and predicts from no table")
    if sum(word.split("=")[0] == "--target" for word in sys.argv) > 1:
        fail("--target is given more than once: give all columns after one")
    if bool(args.data) != bool(args.target) or len(set(args.target)) < len(args.target):
        fail(
            f"--data and --target go together, and no column twice: --data {args.data or None}, --target {args.target}"
        )
    return Path(args.data).stem if args.data else args.dataset


def picture(args: Args, model: nn.Module, parts: dict[str, tuple[torch.Tensor, ...]], encoding: dict) -> Figure:
    """The sum of the units for one input, maps for two, predicted against true for more; of the first target."""
    x, y = (tensor.cpu() for tensor in parts["training"])
    model = copy.deepcopy(model).cpu()
    d = x.shape[1]
    with torch.inference_mode():
        if d == 1:
            return picture_of_sum(args, model, x, y)
        if d == 2:
            return picture_of_maps(args, model, x, y)
        mean, std = encoding["mean"][0], encoding["std"][0]
        figure = Figure(figsize=(5, 5), layout="constrained")
        axes = figure.subplots()
        for part, (inputs, targets) in parts.items():
            if part != "test":
                true, predicted = targets[:5_000, 0].cpu().numpy(), model(inputs[:5_000].cpu())[:, 0].numpy()
                axes.scatter(mean + std * true, mean + std * predicted, s=6, alpha=0.5, label=part)
        axes.axline((mean, mean), slope=1, color="black", linewidth=1)
        axes.set(xlabel="true", ylabel="predicted")
        axes.locator_params(nbins=5)  # labels of large numbers are wide
        axes.set_title(args.target[0], parse_math=False)  # a name such as cost_$_in_$ is no formula
        axes.legend()
        return figure


def picture_of_sum(args: Args, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Figure:
    """The data and the fit; below, each unit's contribution, which add up to it."""
    grid = torch.linspace(x.min().item(), x.max().item(), 401)[:, None]
    line = grid.numpy()
    figure = Figure(figsize=(6, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    above.scatter(x[:1_000].numpy(), y[:1_000, 0].numpy(), s=6, color="silver", label="training examples")
    if not args.data:
        above.plot(line, known_function(args, line), color="black", linewidth=1, label=args.dataset)
    above.plot(line, model(grid)[:, 0].numpy(), color="crimson", label="fit")
    above.legend(loc="upper right")
    below.plot(line, (model.hidden(grid)[-1] * model.last.weight[0]).numpy(), linewidth=1)
    if model.last.bias is not None:
        below.axhline(model.last.bias[0].item(), color="black", linestyle="--", linewidth=1, label="constant")
        below.legend(loc="upper right")
    below.set(xlabel="x, standardised" if args.data else "x", title="what each unit adds")
    return figure


def picture_of_maps(args: Args, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Figure:
    """A map of the prediction with the data on it; right of it maps of the first 16 units of each hidden layer."""
    low, high = x.min(dim=0).values, x.max(dim=0).values
    high = high + (high == low)  # an input may have one value alone
    axis = torch.linspace(0, 1, 81)[:, None]
    grid = torch.cartesian_prod(*(low + axis * (high - low)).T)
    extent = (low[0].item(), high[0].item(), low[1].item(), high[1].item())
    limits = {"cmap": "RdBu", "vmin": y[:, 0].min().item(), "vmax": y[:, 0].max().item()}
    layers = [] if isinstance(model, Linear) else model.hidden(grid)
    units = [(f"{n}.{m}", unit) for n, h in enumerate(layers, 1) for m, unit in enumerate(h.T[:16], 1)]
    columns = math.ceil(len(units) / 4)
    figure = Figure(figsize=(6 + 1.5 * columns, 5), layout="constrained")
    large, small = figure.subplots(1, 2, width_ratios=[4, columns or 0.01])
    large.imshow(model(grid)[:, 0].view(81, 81).T.numpy(), origin="lower", extent=extent, aspect="auto", **limits)
    large.scatter(*x[:500].T.numpy(), c=y[:500, 0].numpy(), s=12, edgecolors="black", linewidths=0.4, **limits)
    large.set_title("prediction and examples", fontsize="small")
    for i, (name, unit) in enumerate(units):
        left, bottom = 1.1 * (i % columns), -1.25 * (i // columns)
        place = left, left + 1, bottom, bottom + 1
        small.imshow(unit.view(81, 81).T.numpy(), origin="lower", extent=place, cmap="RdBu")
        small.text(left + 0.5, bottom + 1.02, name, fontsize="small", ha="center")
    small.set(xlim=(-0.05, 1.1 * columns), ylim=(-3.8, 1.25), aspect="auto")
    for axes in (large, small):
        axes.set_axis_off()
    return figure


# === The run: the same in every script ================================================================================

SCRIPT, SHA256 = Path(__file__).stem, hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
DEVICES = ("auto", *(name for name in ("mps", "cpu", "cuda") if getattr(torch, name).is_available()))  # auto: the last
FREE = {"device", "runs_dir", "run_name", "resume", "evaluate", "capture_video", "track"}  # --resume may change these


def number(kind: type, words: str, low: float, high: float) -> PrimitiveConstructorSpec:
    """The bounds of a flag: `--help` shows the words, and the parser refuses what lies outside."""

    def parse(given: list[str]) -> float:
        if low <= kind(given[0]) <= high:
            return kind(given[0])
        raise ValueError(f"{given[0]} is not {words}")

    return PrimitiveConstructorSpec(1, words, parse, lambda value: isinstance(value, kind), lambda value: [str(value)])


Count = Annotated[int, number(int, "INT >= 1", 1, 2**40)]
Natural = Annotated[int, number(int, "INT >= 0", 0, 2**40)]
Positive = Annotated[float, number(float, "FLOAT > 0", 1e-30, 1e30)]
NonNegative = Annotated[float, number(float, "FLOAT >= 0", 0, 1e30)]
Fraction = Annotated[float, number(float, "FLOAT from 0 to 1", 0, 1)]


def fail(message: str) -> NoReturn:
    """Ends the program on a user's mistake: one line on standard error, exit status 2."""
    print(f"{SCRIPT}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def check_same_flags(args: Args, started: dict, free: set[str], path: Path) -> None:
    """Ends the program where a flag that is not `free` differs from the one that `path` was started with."""
    now, started = (json.loads(json.dumps(flags, default=str)) for flags in (vars(args), started))
    if now.keys() - started.keys() - free:
        fail(f"{path} was begun by another script than {SCRIPT}.py, or another version of it")
    for name in now:
        if name not in free and now[name] != started[name]:
            why = "; a run's length is fixed, for its schedules depend on it" if name == "total_timesteps" else ""
            fail(f"--{name.replace('_', '-')} {now[name]}: {path} was started with {started[name]}{why}")


def save(path: Path, content: dict | str) -> None:
    """Writes a .json, .pt or text file whole or not at all, also through a power cut: temporary name, fsync, rename."""
    buffer, temporary = io.BytesIO(), Path(f"{path}.tmp")
    if path.suffix == ".pt":
        torch.save(content, buffer)  # to memory, for on a full disk its errors are no OSErrors
    else:
        buffer.write((content if isinstance(content, str) else json.dumps(content, indent=2, default=str)).encode())
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file)
        os.replace(temporary, path)
        os.fsync(folder := os.open(path.parent, os.O_RDONLY))
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)  # nothing is left where the disk is full


def load(path: Path, kind: str) -> dict:
    """What `save` wrote: flags; a "model" or "checkpoint" of tensors and plain types. All else ends the program."""
    try:
        if kind == "list of flags":
            return dict(json.loads(path.read_text()))
        with warnings.catch_warnings(action="ignore"):  # of pickles by other programs
            content = torch.load(path, map_location="cpu", weights_only=True)
        if (content["script"], content["kind"]) == (SCRIPT, kind):
            return content
        raise TypeError
    except Exception as error:  # a dozen types on damaged or foreign files
        fail(f"{path} is missing, damaged, or no {kind} of {SCRIPT}.py ({type(error).__name__})")


def progress_bar(steps: range, **options: object) -> tqdm:
    """Tells on standard output how many of the steps are done: a bar in a terminal, else a line a minute."""
    line = {"mininterval": 60, "miniters": 1, "bar_format": "{desc}{n} of {total}, {rate_fmt}{postfix}\n"}
    options |= {} if sys.stdout and sys.stdout.isatty() else line
    return tqdm(steps, file=sys.stdout, disable=sys.stdout is None, position=0, **options)  # None: closed


def on_signals(handler: Callable) -> None:
    """Has it called on Ctrl-C, SIGTERM and SIGHUP, but for those that are ignored, as by nohup."""
    for signum in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # Windows has no SIGHUP
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handler)


class Run:
    """A training's folder, curves and checkpoints, its random generator and its device.

    From its checkpoint a run ends with the weights and curves, to the bit, of one that was never interrupted.
    """

    def __init__(self, args: Args, subject: str):
        self.args, self.subject, self.start, self.rng = args, subject, time.time(), np.random.default_rng(args.seed)
        self.device = torch.device(DEVICES[-1] if args.device == "auto" else args.device)
        self.progress = {"step": 0, "episodes": {}, "returns": [], "first_update": None}
        default = f"{re.sub('[^A-Za-z0-9._-]', '-', subject)}__{SCRIPT}__{args.seed}__{self.start:.6f}"
        name = args.run_name or (fail("--resume: give the --run-name to go on with") if args.resume else default)
        self.dir, self.checkpoint, args.run_name = args.runs_dir / name, None, name
        self.evaluating, self.stopping = False, 0.0  # the time of the first signal
        plain = Path(name).name == name != ".." and name.isprintable()
        if not plain or (os.path.lexists(self.dir) and not args.resume):
            fail(f"--run-name {name}: must be a plain and new name in {args.runs_dir}, or --resume an old one")
        fcntl = importlib.import_module("fcntl")  # Windows has none
        self.wandb = importlib.import_module("wandb") if args.track else None
        self.made = not self.dir.exists()
        self.dir.mkdir(parents=True, exist_ok=True)
        try:
            fcntl.flock(os.open(self.dir, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # any other than this one is of a file system without locks
            if isinstance(error, BlockingIOError):
                fail(f"--run-name {name}: another process is training in {self.dir}")
        ours = r"args\.json(\.tmp)?|replay\.\w+\.bin"
        foreign = [path.name for path in self.dir.iterdir() if not re.fullmatch(ours, path.name)]
        if (self.dir / "args.json").exists():
            check_same_flags(args, load(self.dir / "args.json", "list of flags"), FREE, self.dir)
        elif foreign:
            fail(f"--run-name {name}: {self.dir} holds {foreign[0]}, but is no run's folder")
        if (self.dir / "result.json").exists():
            self.remove_replay()
            print(f"{self.dir} is finished: see its result.json")
            raise SystemExit(0)
        if (self.dir / "checkpoint.pt").exists():
            self.checkpoint = load(self.dir / "checkpoint.pt", "checkpoint")
            if self.checkpoint.get("sha256") != SHA256:
                print(f"{self.dir} was begun by another version of {SCRIPT}.py", file=sys.stderr)
            if (threads := self.checkpoint.get("threads")) not in (None, torch.get_num_threads()):
                print(f"{self.dir} was begun with OMP_NUM_THREADS={threads}: its bits will differ", file=sys.stderr)
        torch.manual_seed(args.seed)
        torch.backends.cudnn.deterministic = True
        torch.set_flush_denormal(True)  # Adam's moments may decay into denormals, at less than half the speed
        if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc's: else big arrays go back to the system each time
            libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: up to 32 MB they come from the heap
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: of which 2 GB may lie free

    def map_file(self, name: str, dtype: np.typing.DTypeLike, shape: tuple[int, ...]) -> np.ndarray:
        """An array in a file, whose space is taken at once; it holds what it held at the checkpoint."""
        path, size = self.dir / f"replay.{name}.bin", math.prod(shape) * np.dtype(dtype).itemsize
        try:
            with open(os.open(path, os.O_RDWR | (0 if self.checkpoint else os.O_CREAT), 0o666), "r+b") as file:
                if self.checkpoint and os.fstat(file.fileno()).st_size != size:
                    raise ValueError("it has another size")
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):  # macOS has none
                    os.posix_fallocate(file.fileno(), 0, size)
                return np.asarray(np.memmap(file, dtype, "r+", shape=shape))  # without np.memmap's cost at every index
        except (OSError, OverflowError, ValueError) as error:
            why = "start anew" if self.checkpoint else "give a smaller --buffer-size or another --checkpoint-frequency"
            fail(f"{path}: no {size / 1e9:,.1f} GB ({error}); {why}")

    def restore(self, **parts: object) -> bool:
        """Loads the checkpoint into parts, which have state_dict and load_state_dict; False where there is none."""
        self.parts, flags, state = parts, vars(self.args), self.checkpoint or {"events": {}}
        if self.checkpoint:
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])
            self.progress, self.start = state["progress"], self.start - state["seconds"]
            self.rng.bit_generator.state = state["rng"]
            torch.set_rng_state(state["torch_rng"])
            if self.device.type == "cuda" and "cuda_rng" in state:
                torch.cuda.set_rng_state(state["cuda_rng"])
        else:
            save(self.dir / "args.json", flags)
        for path in self.dir.glob("events.out.tfevents.*"):  # what was logged after the checkpoint is logged again
            os.truncate(path, state["events"].get(path.name, 0))
        if self.wandb:
            options = {"id": self.progress.setdefault("wandb", os.urandom(4).hex()), "name": self.args.run_name}
            try:
                self.wandb.init(**options, resume="allow", config=flags, dir=self.dir, sync_tensorboard=True)
            except self.wandb.Error as error:  # no login, no connection
                fail(f"--track: {error}")
        hook = threading.excepthook  # what goes wrong on disk in the writer's thread is raised by its next flush
        threading.excepthook = lambda failed: None if isinstance(failed.exc_value, OSError) else hook(failed)
        self.writer = SummaryWriter(self.dir, purge_step=self.progress["step"] + 1)
        if not self.checkpoint:
            self.writer.add_text("flags", "\n".join(f"|{name}|{value}|" for name, value in flags.items()))
        on_signals(self.stop)
        return self.checkpoint is not None

    def cuda_graph(self, function: Callable, *optimizers: torch.optim.Optimizer) -> Callable:
        """On a GPU, the function as one CUDA graph: to launch its kernels one by one takes longer than they do.

        It takes and gives tensors on the GPU, whose shapes never change; a call overwrites what the last one gave. The
        first three calls run as they are, for what libraries set up then cannot be recorded, the fourth is recorded:
        Python's numbers, such as a learning rate, stay what they are in that call. torch's optimizers must be `fused`:
        others count their steps on the CPU.
        """
        if self.device.type != "cuda":
            return function
        graph, stream, calls = torch.cuda.CUDAGraph(), torch.cuda.Stream(), itertools.count()
        inputs, outputs = [], None

        def call(*arguments: torch.Tensor) -> object:
            nonlocal inputs, outputs
            if (number := next(calls)) < 3:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    outputs = function(*arguments)
                torch.cuda.current_stream().wait_stream(stream)
                return outputs
            if number == 3:
                inputs = [argument.clone() for argument in arguments]
                groups = [group for optimizer in optimizers for group in optimizer.param_groups]
                for group in groups:
                    group["capturable"] = True  # torch asks for it while it records
                with torch.cuda.graph(graph, stream=stream):
                    outputs = function(*inputs)
                for group in groups:
                    group["capturable"] = False
            for recorded, argument in zip(inputs, arguments, strict=True):
                recorded.copy_(argument)
            graph.replay()
            return outputs

        return call

    def stop(self, signum: int, _: object) -> None:
        """On a signal: ends an evaluation at once, the training after its step; on one a second later, the program."""
        if not self.stopping:
            self.stopping = time.time()
            if self.evaluating:
                raise KeyboardInterrupt
            with contextlib.suppress(OSError):  # a terminal may be gone
                os.write(2, b"\nends after this step; a second signal ends it at once\n")
        elif time.time() > self.stopping + 1:  # a terminal that is closed sends some at once
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    def steps(self, total: int, size: int = 1, **model: object) -> Iterator[int]:
        """The steps that are left, `size` at a time; between two of them, all that is not the algorithm.

        The parts of the model, which have a state_dict, are evaluated every --eval-frequency steps.
        """
        args, progress, self.size = self.args, self.progress, size
        with progress_bar(range(total), initial=progress["step"]) as self.bar:
            while progress["step"] < total:
                if progress["step"] and self.due(args.eval_frequency):  # behind its checkpoint
                    self.evaluate(model, None)
                self.counted, progress["step"] = progress["step"], progress["step"] + size
                yield progress["step"]
                self.log({"charts/SPS": progress["step"] / (time.time() - self.start)})
                stopping = self.stopping  # a signal from here on waits for the next step
                last = stopping or progress["step"] >= total
                if last or self.due(args.checkpoint_frequency) or self.due(args.eval_frequency):
                    self.save_checkpoint()
                self.bar.update(size)  # after it, for `| tee` may be gone
                if stopping:
                    raise KeyboardInterrupt

    def due(self, frequency: int) -> bool:
        """Whether this step is one of every so many."""
        return frequency > 0 and self.progress["step"] % frequency < self.size

    def count_reward(self, reward: float, done: bool, env: int = 0) -> None:
        """Adds a step to the episode of an environment; where it is done, its return and length are logged."""
        self.counted += 1
        total, length = self.progress["episodes"].pop(env, (0.0, 0))
        total, length = total + float(reward), length + 1  # a NumPy number would not load again
        if not done:
            self.progress["episodes"][env] = total, length
            return
        self.writer.add_scalar("charts/episodic_return", total, self.counted)
        self.writer.add_scalar("charts/episodic_length", length, self.counted)
        returns = self.progress["returns"] = [*self.progress["returns"], total][-100:]
        self.bar.set_postfix_str(f"return {np.mean(returns):.6g}", refresh=False)

    def log(self, scalars: dict[str, float | torch.Tensor]) -> None:
        """Scalars of this step, every LOG_FREQUENCY steps; only then is a tensor read. They must be finite."""
        step, progress = self.progress["step"], self.progress
        if progress["first_update"] is None and any(tag.startswith("losses/") for tag in scalars):
            progress["first_update"] = step, time.time() - self.start
        for tag, value in scalars.items() if self.due(LOG_FREQUENCY) else ():
            if not math.isfinite(value := float(torch.as_tensor(value).detach())):
                fail(f"{tag} is {value:g} in step {step:,}; try a lower --learning-rate")
            self.writer.add_scalar(tag, value, step)

    def sync(self) -> dict[str, int]:
        """Has events and mapped files written to the disk; returns the sizes of the former."""
        self.writer.flush()
        events = list(self.dir.glob("events.out.tfevents.*"))
        for path in [*events, *self.dir.glob("replay.*.bin")]:
            with open(path) as file:
                os.fsync(file)
        return {path.name: path.stat().st_size for path in events}

    def remove_replay(self) -> None:
        for path in self.dir.glob("replay.*.bin"):
            path.unlink()

    def save_checkpoint(self) -> None:
        """All that the run goes on from; of mapped files, what is not overwritten before the next checkpoint."""
        events = self.sync()
        state = {"script": SCRIPT, "sha256": SHA256, "kind": "checkpoint", "progress": self.progress, "events": events}
        state |= {"parts": {name: part.state_dict() for name, part in self.parts.items()}}
        state |= {"seconds": time.time() - self.start, "rng": self.rng.bit_generator.state}
        state |= {"torch_rng": torch.get_rng_state(), "threads": torch.get_num_threads()}
        state |= {"cuda_rng": torch.cuda.get_rng_state()} if self.device.type == "cuda" else {}
        save(self.dir / "checkpoint.pt", state)

    def evaluate(self, model: dict[str, object], folder: Path | None) -> dict[str, float]:
        """Figures of the model, logged. A signal ends it at once, for all that came before is in the checkpoint."""
        self.evaluating = True
        if self.stopping:
            raise KeyboardInterrupt
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            states = {name: part.state_dict() for name, part in model.items()}
            figures = evaluate(self.args, states, self.device, folder)
        self.evaluating = False
        for name, value in figures.items():
            self.writer.add_scalar(f"eval/{name.removeprefix('eval_')}", value, self.progress["step"])
        return figures

    def finish(self, model: dict[str, object]) -> dict[str, float]:
        """Writes model.pt, evaluates the model, and writes result.json when all else is done."""
        content = {"args": {name: value for name, value in vars(self.args).items() if name not in FREE}}
        content |= {name: part.state_dict() for name, part in model.items()}
        weights = [weight for name in model for weight in content[name].values() if isinstance(weight, torch.Tensor)]
        if not all(weight.isfinite().all() for weight in weights):
            fail("weights are no numbers any more; try a lower --learning-rate")
        save(self.dir / "model.pt", {"script": SCRIPT, "kind": "model"} | content)
        progress, (step, second) = self.progress, self.progress["first_update"] or (0, 0.0)
        rate = (progress["step"] - step) / (time.time() - self.start - second)
        figures = self.evaluate(model, self.dir)
        self.sync()
        self.writer.close()
        modules = [sys.modules[n] for n in ("torch", "numpy", "gymnasium", "ale_py", "pandas") if n in sys.modules]
        result = {"script": SCRIPT, "script_sha256": SHA256, "env_id": self.subject, "seed": self.args.seed}
        result |= {"total_timesteps": progress["step"], **figures, "device": self.device.type}
        result |= {"train_return_mean": np.mean(progress["returns"]).item() if progress["returns"] else None}
        result |= {"steps_per_second": rate, "wall_seconds": time.time() - self.start}
        card = f", {torch.cuda.get_device_name()}" if self.device.type == "cuda" else ""
        result |= {"processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{card}"}
        result |= {"torch_threads": torch.get_num_threads(), "versions": {m.__name__: m.__version__ for m in modules}}
        save(self.dir / "result.json", result)
        self.remove_replay()
        return figures


def main() -> None:
    args, run = tyro.cli(Args, description=__doc__), None
    try:
        on_signals(signal.default_int_handler)
        if args.evaluate:
            content = load(args.evaluate, "model")
            if content["args"].keys() != vars(args).keys() - FREE:
                fail(f"{args.evaluate} is of another version of {SCRIPT}.py")
            args = tyro.cli(Args, default=dataclasses.replace(Args(), **content["args"]))
            check_same_flags(args, content["args"], FREE | {"seed", "eval_episodes", "data"}, args.evaluate)
            check(args)
            device = torch.device(DEVICES[-1] if args.device == "auto" else args.device)
            figures = evaluate(args, content, device, args.evaluate.parent)
        else:
            run = Run(args, check(args))
            figures = run.finish(train(args, run))
        words = [f"{name} {value:.6g}" for name, value in figures.items()]
        print(f"{args.evaluate or run.dir}: {', '.join(words) or 'done'}")
    except (KeyboardInterrupt, BrokenPipeError):  # the latter: of `| tee`, by the same Ctrl-C
        named = re.search(rf"--run[-_]name[= ]{re.escape(args.run_name)}( |$)", " ".join(sys.argv))
        more = ["--run-name", args.run_name] * (not named) + ["--resume"] * (not args.resume)
        env = [f"{n}={shlex.quote(os.environ[n])}" for n in ("OMP_NUM_THREADS", "PYTHONPATH") if n in os.environ]
        line = " ".join([*env, shlex.join([sys.executable, *sys.argv, *more])])
        print("\nstopped" + f"; go on with: {line}" * (run is not None), file=sys.stderr)
        raise SystemExit(130) from None
    except ModuleNotFoundError as error:
        fail(f"there is no module {error.name} here; pip install {error.name} (but for fcntl, use Linux or macOS)")
    except (MemoryError, RuntimeError) as error:  # NumPy's; torch's
        if "loading state_dict" in str(error):
            fail(f"{args.evaluate or run.dir} does not fit this script's networks or the environment's spaces: {error}")
        if isinstance(error, RuntimeError) and not re.search("(out of|allocate) memory", str(error)):
            raise
        fail(f"out of memory: {error}")
    except OSError as error:  # a full disk, a folder that cannot be written to
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise  # an environment's own
        hint = "; --resume goes on from the last checkpoint" if run and (run.dir / "checkpoint.pt").exists() else ""
        folder = args.evaluate.parent if args.evaluate else args.runs_dir
        fail(f"{error.filename or folder}: {error.strerror}{hint}")
    finally:
        if run and not (run.dir / "checkpoint.pt").exists():  # nothing to go on from
            run.remove_replay()
        if run and run.made:
            with contextlib.suppress(OSError):  # it is not empty, for its training began
                run.dir.rmdir()


if __name__ == "__main__":
    main()
