"""Function approximation in one file: linear and logistic models, RBF networks and multilayer perceptrons, trained by
gradient descent and looked at in TensorBoard.

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

An MLP with one hidden layer approximates every continuous function on a bounded region, given enough units (Cybenko
1989, Hornik et al. 1989). `--units 1 2 3 5 10 30` shows it. That good weights exist does not mean that descent finds
them: from usual starts three sigmoids do not find the sine. `--restarts` and `--init-scale` do.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "matplotlib==3.11.2",
#     "numpy==2.4.6",
#     "pandas==3.1.1",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tyro==1.0.17",
# ]
# ///

import copy
import dataclasses
import difflib
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

try:
    import fcntl
except ImportError:  # Windows: runs are not locked
    fcntl = None

warnings.filterwarnings("ignore", "Glyph")  # of columns' names in scripts that the pictures' font lacks
SCRIPT = Path(__file__).stem
MAX_CATEGORIES = 50  # of a column; rarer ones share the code of all zeros
PARTS = {"training": 0.7, "validation": 0.1, "test": 0.2}  # of the rows
DATASETS = {  # number of inputs, each uniform in [-1, 1], and the function
    "sine": (1, lambda x: np.sin(2 * np.pi * x[:, 0])),
    "plane": (2, lambda x: 0.3 + 0.5 * x[:, 0] - 0.7 * x[:, 1]),
    "circle": (2, lambda x: (np.hypot(x[:, 0], x[:, 1]) < 0.6).astype(float)),
    "spiral": (2, lambda x: np.hypot(x[:, 0], x[:, 1]) * np.sin(np.arctan2(x[:, 1], x[:, 0]) + 6 * np.hypot(*x.T))),
}


@dataclasses.dataclass
class Args:
    # The run
    seed: int = 1
    """seed of the weights, the split, the order of the examples, and the built-in data"""
    epochs: int | None = None
    """passes over the training examples, at most; with lbfgs 20 iterations each. Default: 25 with lbfgs, else 1000"""
    device: str = "auto"
    """auto, cpu, cuda or mps; auto takes cuda or mps where there is one"""
    runs_dir: Path = Path("runs")
    """folder that holds the runs"""
    run_name: str = ""
    """name of this run's folder in the runs' folder; default DATA__SCRIPT__SEED__TIMESTAMP"""
    resume: bool = False
    """go on from the checkpoint of --run-name; start the run where there is none"""
    checkpoint_frequency: int = 100
    """epochs between two checkpoints; 0 switches them off"""
    evaluate: Path | None = None
    """a model.pt to evaluate, instead of training; with --data, its predictions go to a CSV file"""
    track: bool = False
    """also log to Weights & Biases (pip install wandb)"""
    wandb_project_name: str = "deep-rl-reference-scripts"
    """project name in Weights & Biases"""
    wandb_entity: str | None = None
    """team name in Weights & Biases"""

    # The data
    dataset: str = "sine"
    """a known function on [-1, 1] or its square: sine, plane, circle or spiral"""
    samples: int = 1_000
    """examples of it"""
    noise: float = 0.0
    """standard deviation of the noise on its values"""
    data: Path | None = None
    """a CSV file with a header, instead of --dataset"""
    target: tuple[str, ...] = ()
    """the column (or columns) of --data to predict from all others"""

    # The model
    model: str = "mlp"
    """linear, logistic, rbf or mlp"""
    hidden_sizes: tuple[int, ...] | None = None
    """units in each hidden layer (rbf: one number). Default: 3; with --data 64 64, for rbf 64"""
    activation: str | None = None
    """relu, sigmoid or tanh. Default: sigmoid; with --data relu"""
    init_scale: float | None = None
    """an MLP's first layer starts with weights of this standard deviation, each unit's midpoint at a random example.
    Default: 8 with lbfgs on a --dataset, else 0: as PyTorch does"""

    # The training
    optimizer: str | None = None
    """sgd, adam or lbfgs (all examples at once). Default: lbfgs; with --data adam"""
    learning_rate: float | None = None
    """step size. Default: 1 with lbfgs, else 0.001"""
    batch_size: int | None = None
    """examples in a minibatch. Default: 10 with sgd, 64 with adam; with adam and --data 200, or all if fewer"""
    patience: int | None = None
    """end after this many epochs without a better validation loss; 0: never. Default: 0; with --data 20"""
    restarts: int | None = None
    """random starts, of which the best is kept. Default: 20 with lbfgs for rbf and mlp, else 1"""
    units: tuple[int, ...] = ()
    """fit once with each of these numbers of hidden units, and plot the largest error against them"""


def fill_defaults(args: Args) -> None:
    """Those that depend on the data and on the optimizer."""

    def default(name: str, value: object) -> None:
        if getattr(args, name) is None:
            setattr(args, name, value)

    default("optimizer", "adam" if args.data else "lbfgs")
    default("activation", "relu" if args.data else "sigmoid")
    default("hidden_sizes", (3,) if not args.data else (64,) if args.model == "rbf" else (64, 64))
    lbfgs = args.optimizer == "lbfgs"
    default("epochs", 25 if lbfgs else 1_000)
    default("learning_rate", 1.0 if lbfgs else 1e-3)
    default("init_scale", 8.0 if lbfgs and not args.data else 0.0)
    default("restarts", 20 if lbfgs and args.model in ("rbf", "mlp") else 1)
    default("patience", 20 if args.data else 0)
    if args.optimizer == "sgd":
        default("batch_size", 10)
    elif args.optimizer == "adam" and not args.data:
        default("batch_size", 64)


def plain(args: Args) -> dict:
    """The flags in types that JSON knows."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def fail(message: str) -> NoReturn:
    """Ends the program on a user's mistake: one line on standard error, exit status 2."""
    print(f"{SCRIPT}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


# --- Data -------------------------------------------------------------------------------------------------------------


def read_table(path: Path, targets: tuple[str, ...], text: tuple[str, ...] = ()) -> pd.DataFrame:
    """A CSV file with a header, `text` columns unparsed; ends the program where it is none, or has no such targets."""
    try:
        options = {"index_col": False, "encoding": "utf-8-sig"}
        header = pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False, **options).iloc[0].tolist()
        options["skip_blank_lines"] = len(header) > 1  # in a single column a missing value is a blank line
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            frame = pd.read_csv(path, low_memory=False, dtype=dict.fromkeys(text, str), **options)
    except OSError as error:
        fail(f"--data {path}: {error.strerror}")
    except (ValueError, pd.errors.ParserError, pd.errors.ParserWarning) as error:
        fail(f"--data {path}: not a CSV file with a header ({str(error).splitlines()[0]})")
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        fail(f"--data {path}: more than one column is called {', '.join(map(repr, sorted(twice)))}")
    for name in targets:
        if name not in frame:
            lower = {column.lower(): column for column in frame.columns}
            near = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.4)]
            near = near or frame.columns[:5]
            fail(f"--target {name}: {path} has no such column; did you mean {', '.join(near)}?")
    return frame


def numbers(frame: pd.DataFrame, name: str, flag: str) -> np.ndarray:
    """A column as float64 (rows,), NaN where it is empty; ends the program where it is no finite number."""
    column = frame[name]
    values = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    wrong = np.isinf(values) | np.isnan(values) & column.notna().to_numpy()
    if wrong.any():
        first = column[wrong].head(1)
        fail(f"{flag}: column {name} has {first.iloc[0]} in row {first.index[0] + 1}, which is no finite number")
    return values


def fit_encoding(frame: pd.DataFrame, targets: tuple[str, ...], training: np.ndarray) -> dict:
    """How columns become numbers, from the training rows alone: means, deviations, medians, categories."""
    encoding = {"inputs": [], "targets": []}
    for name in targets:
        values = numbers(frame, name, "--target")[training]
        if values.min() == values.max():
            fail(f"--target {name}: it is {values[0]:g} in every row to train on, there is nothing to learn")
        encoding["targets"].append({"name": name, "mean": float(values.mean()), "std": float(values.std())})
    for name in frame.columns.drop(list(targets)):
        if pd.api.types.is_numeric_dtype(frame[name].dropna().infer_objects()):  # true and false are numbers too
            values = numbers(frame, name, "--data")[training]
            missing = np.isnan(values)
            if missing.all() or (values.min() == values.max() and not missing.any()):
                continue
            median = float(np.nanmedian(values))
            constant = np.nanmin(values) == np.nanmax(values)  # but for the gaps
            values = np.where(missing, median, values)
            scale = {"median": median, "mean": float(values.mean()), "std": 1.0 if constant else float(values.std())}
            encoding["inputs"].append({"name": name, "missing": bool(missing.any()), **scale})
        else:
            known = frame[name].iloc[training]
            counts, missing = known.value_counts(), bool(known.isna().any())
            if len(counts) + missing > 1 and (len(counts) < known.count() or missing):
                categories = [str(category) for category in counts.index[:MAX_CATEGORIES]]
                column = {"name": name, "missing": missing, "categories": categories, "distinct": len(counts)}
                encoding["inputs"].append(column)
    return encoding


def encode(frame: pd.DataFrame, encoding: dict) -> np.ndarray:
    """The inputs as float32 (rows, d): numbers standardised, categories one-hot, and a column for what is missing."""
    columns = []
    for column in encoding["inputs"]:
        if "categories" in column:
            text = frame[column["name"]].astype(str).to_numpy()
            columns += [text == category for category in column["categories"]]
            missing = frame[column["name"]].isna().to_numpy()
        else:
            values = numbers(frame, column["name"], "--data")
            missing = np.isnan(values)
            columns.append((np.where(missing, column["median"], values) - column["mean"]) / column["std"])
        if column["missing"]:
            columns.append(missing)
    return np.stack(columns, axis=1, dtype=np.float32, casting="unsafe")


def describe(frame: pd.DataFrame, encoding: dict, dropped: int, sizes: list[int]) -> None:
    """What became of a table, for the user to check."""
    print(f"{sum(sizes):,} rows: {', '.join(f'{size:,} {part}' for part, size in zip(PARTS, sizes, strict=True))}")
    if dropped:
        print(f"{dropped:,} rows without a target left out")
    for column in encoding["inputs"]:
        if "categories" in column:
            text = frame[column["name"]][pd.to_numeric(frame[column["name"]], errors="coerce").isna()].dropna()
            almost = (
                f"; numbers but for {text.iloc[0]} in row {text.index[0] + 1}" if len(text) < len(frame) / 2 else ""
            )
            known = f"{len(column['categories'])} of {column['distinct']} categories"
            print(f"column {column['name']}: one-hot, {known}{almost}")
        if column["missing"]:
            instead = "a category of its own" if "categories" in column else f"the median {column['median']:g}, marked"
            print(f"column {column['name']}: where it is missing, {instead}")
    used = {column["name"] for column in encoding["inputs"] + encoding["targets"]}
    for name in frame.columns:
        if name not in used:
            print(f"column {name}: constant, or different in every row, left out")


def known_function(args: Args, x: np.ndarray) -> np.ndarray:
    """The values (rows, 1) of --dataset at x (rows, d), float32."""
    return DATASETS[args.dataset][1](x.astype(np.float64)).astype(np.float32)[:, None]


def make_data(args: Args) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict]:
    """Inputs and targets, float32 (rows, d) and (rows, k), of each part of the data; and the encoding of its table."""
    rng = np.random.default_rng(args.seed)
    if args.data:
        frame = read_table(args.data, args.target)
        targets = np.stack([numbers(frame, name, "--target") for name in args.target], axis=1)
        complete = ~np.isnan(targets).any(axis=1)
        frame, targets = frame[complete], targets[complete]
        rows = len(frame)
    else:
        rows = args.samples
        d = DATASETS[args.dataset][0]
        encoding = {"inputs": [{"name": f"x{i + 1}"} for i in range(d)], "targets": [{"name": "y"}]}
        encoding["targets"][0] |= {"mean": 0.0, "std": 1.0}  # neither is standardised
        x = rng.uniform(-1, 1, (rows, d)).astype(np.float32)
        y = known_function(args, x) + args.noise * rng.standard_normal((rows, 1), np.float32)
    order = rng.permutation(rows)
    bounds = np.cumsum([round(rows * PARTS["training"]), round(rows * PARTS["validation"])])
    split = np.split(order, bounds)
    flag = f"--data {args.data}" if args.data else f"--samples {args.samples}"
    if min(map(len, split)) < 2:
        fail(f"{flag}: {rows} rows are too few: training, validation and test need two each")
    if len(split[0]) < (args.batch_size or 1):
        fail(f"{flag}: {len(split[0])} rows to train on are too few for --batch-size {args.batch_size}")
    if args.data:
        encoding = fit_encoding(frame, args.target, split[0])
        if not encoding["inputs"]:
            fail(f"{flag}: no column is left to predict from")
        if args.model == "logistic":  # sigma's values lie in (0, 1)
            for column in encoding["targets"]:
                column |= {"mean": 0.0, "std": 1.0}
        describe(frame, encoding, int((~complete).sum()), [len(part) for part in split])
        x = encode(frame, encoding)
        mean, std = target_scale(encoding)
        y = ((targets - mean) / std).astype(np.float32)
    if args.model == "logistic" and not (y.min() >= 0 and y.max() <= 1):
        fail(f"--model logistic: its values lie in (0, 1), but there are targets from {y.min():g} to {y.max():g}")
    parts = {part: (x[rows], y[rows]) for part, rows in zip(PARTS, split, strict=True)}
    mean, std = target_scale(encoding)
    encoding["baseline"] = (mean + std * parts["training"][1].mean(axis=0, dtype=np.float64)).tolist()
    return parts, encoding


def target_scale(encoding: dict) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (k,) that the targets were standardised with."""
    return tuple(np.array([column[name] for column in encoding["targets"]]) for name in ("mean", "std"))


def digest(args: Args) -> str:
    """Tells whether a table is still the same."""
    if not args.data:
        return ""
    with open(args.data, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Models -----------------------------------------------------------------------------------------------------------

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
        return [torch.exp(-(torch.cdist(x, self.centres) / self.widths).square())]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.hidden(x)[0])


class MLP(nn.Module):
    """4: h = activation(W x + b) for each hidden layer, f(x) = a_0 + sum_i a_i h_i; (batch, d) to (batch, k)."""

    def __init__(
        self,
        d: int,
        k: int,
        hidden_sizes: tuple[int, ...],
        activation: str,
        init_scale: float = 0.0,
        examples: torch.Tensor | None = None,
    ):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in itertools.pairwise([d, *hidden_sizes]))
        self.activation = {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}[activation]
        self.last = nn.Linear(hidden_sizes[-1], k)
        if init_scale and examples is not None:
            # Steep units whose midpoints, w x + b = 0, lie among the data: each sees a part of the function from the
            # start (in the spirit of Nguyen and Widrow 1990).
            first = self.layers[0]
            nn.init.normal_(first.weight, std=init_scale / math.sqrt(d))
            midpoints = examples[torch.randint(len(examples), (hidden_sizes[0],))]
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
        return MLP(d, k, args.hidden_sizes, args.activation, args.init_scale, examples)
    if args.model == "rbf":
        return RBFNetwork(d, k, args.hidden_sizes[0], torch.zeros(1, d) if examples is None else examples)
    return {"linear": Linear, "logistic": Logistic}[args.model](d, k)


# --- The update -------------------------------------------------------------------------------------------------------


class SGD:
    """w <- w - lr grad_w. As torch.optim.SGD, whose bookkeeping takes a third of the time of so small a step."""

    def __init__(self, weights: Iterable[torch.Tensor], lr: float):
        self.weights, self.lr = list(weights), lr

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_add_(self.weights, [weight.grad for weight in self.weights], alpha=-self.lr)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def make_optimizer(args: Args, model: nn.Module) -> SGD | torch.optim.Optimizer:
    if args.optimizer == "lbfgs":
        return torch.optim.LBFGS(model.parameters(), lr=args.learning_rate, line_search_fn="strong_wolfe")
    return {"sgd": SGD, "adam": torch.optim.Adam}[args.optimizer](model.parameters(), lr=args.learning_rate)


def train_epoch(
    model: nn.Module, optimizer: SGD | torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, batch_size: int | None
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


# --- Pictures ---------------------------------------------------------------------------------------------------------


def picture(
    args: Args, model: nn.Module, parts: dict[str, tuple[torch.Tensor, torch.Tensor]], encoding: dict
) -> Figure:
    """What the model does: the sum of its units for one input, maps for two, predicted against true for more.

    For several targets, the first one.
    """
    x, y = (tensor.cpu() for tensor in parts["training"])
    model = copy.deepcopy(model).cpu()
    d = x.shape[1]
    with torch.inference_mode():
        if d == 1:
            return picture_of_sum(args, model, x, y)
        if d == 2:
            return picture_of_maps(args, model, x, y)
        mean, std = (values[0] for values in target_scale(encoding))
        figure = Figure(figsize=(5, 5), layout="constrained")
        axes = figure.subplots()
        for part, (inputs, targets) in parts.items():
            if part != "test":
                true, predicted = targets[:5_000, 0].cpu().numpy(), model(inputs[:5_000].cpu())[:, 0].numpy()
                axes.scatter(mean + std * true, mean + std * predicted, s=6, alpha=0.5, label=part)
        axes.axline((mean, mean), slope=1, color="black", linewidth=1)
        axes.set(xlabel="true", ylabel="predicted", title=encoding["targets"][0]["name"])
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
    """A map of the prediction with the data on it, and beside it small maps of each hidden layer's first 16 units."""
    low, high = x.min(dim=0).values, x.max(dim=0).values
    axis = torch.linspace(0, 1, 81)
    grid = torch.cartesian_prod(low[0] + axis * (high[0] - low[0]), low[1] + axis * (high[1] - low[1]))
    extent = (low[0].item(), high[0].item(), low[1].item(), high[1].item())

    def draw(axes: object, values: torch.Tensor, **options: object) -> None:
        axes.imshow(values.view(81, 81).T.numpy(), origin="lower", extent=extent, aspect="auto", cmap="RdBu", **options)

    layers = [] if isinstance(model, Linear) else [values[:, :16] for values in model.hidden(grid)]
    figure = Figure(figsize=(5 + 2.6 * len(layers), 5), layout="constrained")
    large, *small = figure.subfigures(1, 1 + len(layers), width_ratios=[2] + [1] * len(layers), squeeze=False)[0]
    axes = large.subplots()
    limits = {"vmin": y[:, 0].min().item(), "vmax": y[:, 0].max().item()}
    draw(axes, model(grid)[:, 0], **limits)
    axes.scatter(
        *x[:500].T.numpy(), c=y[:500, 0].numpy(), s=12, cmap="RdBu", edgecolors="black", linewidths=0.4, **limits
    )
    axes.set_title("prediction and examples")
    for layer, (subfigure, values) in enumerate(zip(small, layers, strict=True), start=1):
        columns = math.ceil(values.shape[1] / 8)
        panels = subfigure.subplots(math.ceil(values.shape[1] / columns), columns, squeeze=False)
        subfigure.suptitle(f"hidden layer {layer}")
        for panel, unit in itertools.zip_longest(panels.flat, values.T):
            panel.set_axis_off()
            if unit is not None:
                draw(panel, unit)
    return figure


def picture_of_units(units: list[int], errors: list[float]) -> Figure:
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(units, errors, marker="o")
    axes.set_xticks(units, units)
    axes.minorticks_off()
    axes.set(xlabel="hidden units", ylabel="largest error on [-1, 1]")
    axes.grid(alpha=0.3)
    return figure


# --- Checkpoint and evaluation ----------------------------------------------------------------------------------------


def save(path: Path, content: dict) -> None:
    """Writes a .json or .pt file whole or not at all, also through a power cut: temporary name, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        if path.suffix == ".json":
            file.write((json.dumps(content, indent=2) + "\n").encode())
        else:
            torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the new name too must survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def load(path: Path, flag: str, kind: str) -> dict:
    """Reads a "model" or "checkpoint" that `save` wrote, tensors and plain types only; all else ends the program."""
    if not path.is_file():
        fail(f"{flag}: there is no file {path}")
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles by other programs
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types on damaged or foreign files
        fail(f"{flag}: {path} is damaged or not written by {SCRIPT}.py ({type(error).__name__})")
    if not isinstance(content, dict) or (content.get("script"), content.get("kind")) != (SCRIPT, kind):
        fail(f"{flag}: {path} is no {kind} of {SCRIPT}.py")
    return content


def lock(run_dir: Path) -> None:
    """Ends the program if another process trains in this folder; the lock goes with the process."""
    if fcntl:
        try:
            fcntl.flock(os.open(run_dir, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--run-name {run_dir.name}: another process is training in {run_dir}")


def load_checkpoint(args: Args) -> dict | None:
    """The checkpoint that --resume goes on from, None where there is none; ends the program where it does not fit."""
    run_dir = args.runs_dir / args.run_name
    if not (args.resume and (run_dir / "checkpoint.pt").exists()):
        return None
    checkpoint = load(run_dir / "checkpoint.pt", "--resume", "checkpoint")
    check_same_flags(args, checkpoint["args"])
    return checkpoint


def check_same_flags(args: Args, started: dict) -> None:
    """Ends the program where a run goes on with other flags than it was started with."""
    may_differ = {"resume", "runs_dir", "run_name", "device", "eval_episodes", "evaluate", "capture_video", "track"}
    for name, value in plain(args).items():
        if value != started.get(name) and name not in may_differ and not name.startswith("wandb"):
            run_dir = args.runs_dir / args.run_name
            reject(args, name, f"{run_dir} was started with {started.get(name)}; give the same flags")


def predict(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """f(x) of (n, d) as (n, k), some thousand rows at a time."""
    with torch.inference_mode():
        return torch.cat([model(rows) for rows in x.split(16_384)])


def scores(prediction: np.ndarray, target: np.ndarray, baseline: list[float]) -> dict:
    """MSE, RMSE and R^2 of predictions (n, k), and the MSE of predicting `baseline` (k,); means over the targets.

    R^2 is None where a target has one value only.
    """
    mse, baseline_mse = ((values - target) ** 2 for values in (prediction, baseline))
    varied = (target.min(axis=0) < target.max(axis=0)).all()
    return {
        "mse": float(mse.mean()),
        "rmse": math.sqrt(mse.mean()),
        "r2": float((1 - mse.mean(axis=0) / target.var(axis=0)).mean()) if varied else None,
        "baseline_mse": float(baseline_mse.mean()),
    }


def function_errors(args: Args, model: nn.Module, device: torch.device) -> dict:
    """Largest and root mean square error against --dataset's own function, on an even grid of [-1, 1] or its square."""
    d = DATASETS[args.dataset][0]
    axis = torch.linspace(-1, 1, {1: 1001, 2: 101}[d])
    grid = torch.cartesian_prod(*[axis] * d).view(-1, d)
    error = predict(model, grid.to(device)).cpu().numpy() - known_function(args, grid.numpy())
    return {"largest_error": float(np.abs(error).max()), "function_rmse": math.sqrt(np.mean(error**2))}


def report(test: dict, errors: dict) -> str:
    """The figures in a line."""
    r2 = "-" if test["r2"] is None else f"{test['r2']:.4f}"
    line = f"MSE {test['mse']:.4g}, RMSE {test['rmse']:.4g}, R^2 {r2}"
    line += f"; predicting the mean: MSE {test['baseline_mse']:.4g}"
    if errors:
        line += f"; largest error on the function {errors['largest_error']:.4g}, RMSE {errors['function_rmse']:.4g}"
    return line


def evaluate_model(args: Args) -> None:
    """Scores a model.pt, and with --data writes its predictions to a CSV file beside it."""
    content = load(args.evaluate, "--evaluate", "model")
    data_flags = ("seed", "dataset", "samples", "noise", "target")
    names = (*data_flags, "model", "hidden_sizes", "activation", "optimizer", "batch_size")
    trained = Args(**{name: content["args"][name] for name in names})
    args = tyro.cli(Args, default=trained)
    changed = [name for name in names if getattr(args, name) != getattr(trained, name)]
    if changed:
        reject(args, changed[0], f"{args.evaluate} was trained with {getattr(trained, changed[0])}")
    if content["args"]["data"] and not args.data:
        fail(f"--evaluate: give --data, a CSV file with the columns of {content['args']['data']}")
    if args.data and not content["args"]["data"]:
        fail(f"--evaluate: {args.evaluate} was trained on --dataset {args.dataset}; leave --data out")
    fill_defaults(args)
    check_args(args)
    device, encoding = choose_device(args), content["encoding"]
    mean, std = target_scale(encoding)
    if not args.data:
        parts, _ = make_data(args)
        x, target = parts["test"]
    else:
        text = tuple(column["name"] for column in encoding["inputs"] if "categories" in column)
        frame = read_table(args.data, (), text)
        missing = [column["name"] for column in encoding["inputs"] if column["name"] not in frame]
        if missing:
            fail(f"--data {args.data}: columns {', '.join(missing)} are missing; {args.evaluate} was trained on them")
        if frame.empty:
            fail(f"--data {args.data}: there is no row in it")
        x, target = encode(frame, encoding), None
        if all(name in frame for name in args.target):
            target = np.stack([numbers(frame, name, "--target") for name in args.target], axis=1)
    model = make_model(args, x.shape[1], len(mean)).to(device)
    model.load_state_dict(content["weights"])
    prediction = mean + std * predict(model, torch.from_numpy(x).to(device)).cpu().numpy()
    known = None if target is None else ~np.isnan(target).any(axis=1)
    if known is not None and known.any():
        errors = {} if args.data else function_errors(args, model, device)
        print(f"{args.evaluate}: {report(scores(prediction[known], target[known], encoding['baseline']), errors)}")
    if args.data:
        path = args.evaluate.parent / f"predictions__{args.data.stem}.csv"
        if not os.access(path.parent, os.W_OK):
            fail(f"--evaluate: the predictions would go into {path.parent}, which cannot be written to")
        temporary = path.with_name(path.name + ".tmp")
        pd.DataFrame(prediction, columns=[column["name"] for column in encoding["targets"]]).to_csv(
            temporary, index=False
        )
        os.replace(temporary, path)
        print(f"{len(prediction):,} predictions: {path}")


# --- Training ---------------------------------------------------------------------------------------------------------


def choose_device(args: Args) -> torch.device:
    """The device that --device asks for."""
    if args.device != "auto":
        return torch.device(args.device)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


@dataclasses.dataclass
class Progress:
    """How far a run has come."""

    global_step: int = 0  # epochs, of all starts together
    start: int = 0
    epoch: int = 0  # of this start
    best_loss: float = math.inf  # of this start, on the validation examples, in units of the targets' variance
    stale_epochs: int = 0  # since then
    wall_seconds: float = 0.0
    train_seconds: float = 0.0


class Display:
    """A bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, args: Args, progress: Progress):
        self.args, self.progress, self.terminal = args, progress, sys.stdout.isatty()
        self.last_shown = time.perf_counter()

    def show(self) -> None:
        args, progress, now = self.args, self.progress, time.perf_counter()
        if now - self.last_shown < (0.2 if self.terminal else 60):
            return
        self.last_shown = now
        done, total = progress.start * args.epochs + progress.epoch, args.restarts * args.epochs
        rate = progress.global_step / progress.train_seconds
        minutes, seconds = divmod(int((total - done) / rate), 60)
        start = f"start {progress.start + 1}/{args.restarts}  " if args.restarts > 1 else ""
        line = f"{start}epoch {progress.epoch:,}/{args.epochs:,}  validation loss {progress.best_loss:.3g}"
        line += f"  {rate:.0f} epochs/s  {minutes}:{seconds:02} min left"
        if self.terminal:
            filled = 24 * done // total
            print(f"\r[{'#' * filled}{'.' * (24 - filled)}] {line}\033[K", end="", flush=True)
        else:
            print(line, flush=True)

    def say(self, line: str) -> None:
        print(f"\r{line}\033[K" if self.terminal else line, flush=True)


def log_hyperparameters(writer: SummaryWriter, args: Args) -> None:
    """As a text, and for the HPARAMS tab beside the validation loss."""
    values = {name: value if isinstance(value, (int, float)) else str(value) for name, value in vars(args).items()}
    table = "\n".join(f"|{name}|{value}|" for name, value in values.items())
    writer.add_text("hyperparameters", "|name|value|\n|-|-|\n" + table)
    for summary in hparams(values, {"losses/validation": 0.0}):
        writer.file_writer.add_summary(summary)


def train(args: Args) -> None:
    """Trains as the listing above says; leaves curves, pictures, weights and a result in the run's folder.

    Raises KeyboardInterrupt, with a checkpoint written, when SIGINT or SIGTERM asks to stop.
    """
    start_time = time.perf_counter()
    device = choose_device(args)
    run_dir = args.runs_dir / args.run_name
    checkpoint = load_checkpoint(args)
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(args.seed)
    arrays, encoding = make_data(args)
    data_digest = digest(args)
    if checkpoint and checkpoint["digest"] != data_digest:
        fail(f"--resume: {args.data} has changed since {run_dir} was started")
    parts = {part: tuple(torch.from_numpy(array).to(device) for array in arrays[part]) for part in PARTS}
    x, y = parts["training"]
    x_validation, _ = parts["validation"]
    batch_size = 200 if args.batch_size is None and args.optimizer == "adam" else args.batch_size
    run_dir.mkdir(parents=True, exist_ok=args.resume)
    lock(run_dir)
    if not checkpoint:
        save(run_dir / "args.json", plain(args))
    if args.track:
        start_tracking(args)
    # A killed run repeats what came after its checkpoint: TensorBoard forgets the first version from purge_step on.
    writer = SummaryWriter(run_dir, purge_step=checkpoint["progress"]["global_step"] + 1 if checkpoint else 0)

    def begin() -> tuple[nn.Module, SGD | torch.optim.Optimizer]:
        model = make_model(args, x.shape[1], y.shape[1], x.cpu()).to(device)
        return model, make_optimizer(args, model)

    def snapshot() -> dict:
        return {
            "script": SCRIPT,
            "kind": "checkpoint",
            "args": plain(args),
            "digest": data_digest,
            "progress": dataclasses.asdict(progress),
            "weights": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "best": best,
            "rng": torch.get_rng_state(),
        }

    model, optimizer = begin()  # 5: initialise w at random
    if checkpoint:
        progress, best = Progress(**checkpoint["progress"]), checkpoint["best"]
        model.load_state_dict(checkpoint["weights"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
    else:
        progress, best = Progress(), {"loss": math.inf}
        log_hyperparameters(writer, args)
    display = Display(args, progress)
    wall_seconds_before = progress.wall_seconds
    stop_signals = []

    def request_stop(signum: int, _: object) -> None:
        stop_signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)  # a second signal ends the program at once

    previous_handlers = {signum: signal.signal(signum, request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}

    while not stop_signals:
        # 6: an epoch; after the last one, the next start
        if progress.epoch == args.epochs or 0 < args.patience <= progress.stale_epochs:
            if args.restarts > 1:
                display.say(
                    f"start {progress.start + 1}/{args.restarts}: validation RMSE {progress.best_loss**0.5:.4g}"
                )
                writer.add_scalar("starts/validation_loss", progress.best_loss, progress.global_step)
            if progress.start + 1 == args.restarts:
                break
            progress.start, progress.epoch, progress.stale_epochs = progress.start + 1, 0, 0
            progress.best_loss = math.inf
            model, optimizer = begin()  # 5
        epoch_start = time.perf_counter()
        loss = train_epoch(model, optimizer, x, y, batch_size)  # 7 to 12
        validation = scores(predict(model, x_validation).cpu().numpy(), arrays["validation"][1], [0.0] * y.shape[1])
        validation_loss = validation["mse"]
        if not math.isfinite(loss + validation_loss):
            writer.close()
            where = f"epoch {progress.epoch + 1}" + (f" of start {progress.start + 1}" if args.restarts > 1 else "")
            fail(f"the loss is no longer finite in {where}; try a lower --learning-rate than {args.learning_rate:g}")
        progress.global_step += 1
        progress.epoch += 1
        progress.stale_epochs += 1
        progress.train_seconds += time.perf_counter() - epoch_start
        progress.wall_seconds = wall_seconds_before + time.perf_counter() - start_time
        if validation_loss < progress.best_loss:
            progress.best_loss, progress.stale_epochs = validation_loss, 0
        if validation_loss < best["loss"]:  # 13: keep w
            weights = {name: weight.clone() for name, weight in model.state_dict().items()}
            best = {"loss": validation_loss, "start": progress.start, "epoch": progress.epoch, "weights": weights}

        # The rest keeps the books.
        step = progress.global_step
        writer.add_scalar("losses/train", loss, step)
        writer.add_scalar("losses/validation", validation_loss, step)
        if validation["r2"] is not None:
            writer.add_scalar("charts/validation_r2", validation["r2"], step)
        if progress.start == 0 and progress.epoch & (progress.epoch - 1) == 0:  # 1, 2, 4, 8, ...
            writer.add_figure("model", picture(args, model, parts, encoding), step)
            for name, weight in model.named_parameters():
                writer.add_histogram(name.replace(".", "/"), weight, step)
            writer.add_scalar("charts/epochs_per_second", step / progress.train_seconds, step)
        display.show()
        if args.checkpoint_frequency and (step % args.checkpoint_frequency == 0 or stop_signals):
            writer.flush()
            save(run_dir / "checkpoint.pt", snapshot())

    for signum, handler in previous_handlers.items():
        signal.signal(signum, handler)
    if stop_signals:
        writer.close()
        raise KeyboardInterrupt

    model.load_state_dict(best["weights"])
    content = {"script": SCRIPT, "kind": "model", "args": plain(args), "encoding": encoding, "weights": best["weights"]}
    save(run_dir / "model.pt", content)
    mean, std = target_scale(encoding)
    x_test, y_test = parts["test"]
    prediction = mean + std * predict(model, x_test).cpu().numpy()
    test = scores(prediction, mean + std * y_test.cpu().numpy(), encoding["baseline"])
    errors = {} if args.data else function_errors(args, model, device)
    writer.add_figure("model/best", picture(args, model, parts, encoding), progress.global_step)
    for name, value in (test | errors).items():
        if value is not None:
            writer.add_scalar(f"test/{name}", value, progress.global_step)
    writer.close()
    save(
        run_dir / "result.json",
        {
            "script": SCRIPT,
            "data": str(args.data or args.dataset),
            "model": args.model,
            "seed": args.seed,
            "epochs": progress.global_step,
            "best_start": best["start"] + 1,
            "best_epoch": best["epoch"],
            "validation_loss": best["loss"],
            **{f"test_{name}": value for name, value in test.items()},
            **errors,
            "epochs_per_second": progress.global_step / progress.train_seconds,
            "wall_seconds": wall_seconds_before + time.perf_counter() - start_time,
            "device": device.type,
            "torch_threads": torch.get_num_threads(),
            "versions": {module.__name__: module.__version__ for module in (torch, np, pd)}
            | {"python": platform.python_version()},
        },
    )
    kept = f"epoch {best['epoch']:,}" + (f" of start {best['start'] + 1}" if args.restarts > 1 else "")
    display.say(f"{run_dir}: {kept} kept; test {report(test, errors)}")


def train_with_units(args: Args) -> None:
    """Trains once with each number of hidden units, in folders of their own, and plots the largest error."""
    run_dir, errors = args.runs_dir / args.run_name, []
    if (run_dir / "args.json").exists():
        started = json.loads((run_dir / "args.json").read_text())
        check_same_flags(
            args, {name: tuple(flag) if isinstance(flag, list) else flag for name, flag in started.items()}
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    save(run_dir / "args.json", plain(args))
    for units in args.units:
        run = dataclasses.replace(args, units=(), hidden_sizes=(units,), run_name=f"{args.run_name}/units-{units}")
        result = run_dir / f"units-{units}" / "result.json"
        if not result.exists():
            train(run)
        errors.append(json.loads(result.read_text())["largest_error"])
    print("| hidden units | largest error |\n|---|---|")
    for units, error in zip(args.units, errors, strict=True):
        print(f"| {units} | {error:.4g} |")
    with SummaryWriter(run_dir) as writer:
        writer.add_figure("largest_error", picture_of_units(args.units, errors))
    save(run_dir / "result.json", {"units": args.units, "largest_error": errors})


def start_tracking(args: Args) -> None:
    import wandb

    wandb.init(
        project=args.wandb_project_name,
        entity=args.wandb_entity,
        id=args.run_name,
        resume="allow",
        config=plain(args),
        dir=args.runs_dir / args.run_name,
        sync_tensorboard=True,
    )


# --- Command line -----------------------------------------------------------------------------------------------------


def reject(args: Args, name: str, reason: str) -> NoReturn:
    fail(f"--{name.replace('_', '-')} {getattr(args, name)}: {reason}")


def check_args(args: Args) -> None:
    """Ends the program with one line where a flag cannot work, whether it trains or evaluates."""
    choices = {
        "device": ("auto", "cpu", "cuda", "mps"),
        "dataset": tuple(DATASETS),
        "model": ("linear", "logistic", "rbf", "mlp"),
        "activation": ("relu", "sigmoid", "tanh"),
        "optimizer": ("sgd", "adam", "lbfgs"),
    }
    for name, allowed in choices.items():
        if getattr(args, name) not in allowed:
            reject(args, name, f"choose one of {', '.join(allowed)}")
    for name in ("epochs", "samples", "restarts", "learning_rate"):
        if not 0 < getattr(args, name) < math.inf:
            reject(args, name, "must be greater than 0")
    for name in ("noise", "init_scale", "patience"):
        if not 0 <= getattr(args, name) < math.inf:
            reject(args, name, "must not be negative")
    for name in ("seed", "checkpoint_frequency"):
        if not 0 <= getattr(args, name) < 2**62:
            reject(args, name, "must not be negative, nor 2^62 or more")
    if args.batch_size is not None and args.batch_size < 1:
        reject(args, "batch_size", "must be greater than 0")
    if args.batch_size is not None and args.optimizer == "lbfgs":
        reject(args, "batch_size", "lbfgs takes all examples at once; leave it out, or take --optimizer adam")
    if not args.hidden_sizes or min(args.hidden_sizes) < 1:
        reject(args, "hidden_sizes", "give one positive number for each hidden layer")
    if args.model == "rbf" and len(args.hidden_sizes) > 1:
        reject(args, "hidden_sizes", "an RBF network has one hidden layer")
    if args.data and not args.target:
        fail(f"--data {args.data}: give the column to predict, with --target")
    if len(set(args.target)) < len(args.target):
        reject(args, "target", "names a column twice")
    if args.target and not (args.data or args.evaluate):
        reject(args, "target", "is for the columns of --data")
    if args.units and (args.data or args.model not in ("mlp", "rbf") or min(args.units) < 1):
        reject(args, "units", "is for positive numbers of units, a model mlp or rbf and a known function")
    if args.device in ("cuda", "mps") and not getattr(torch, args.device).is_available():
        reject(args, "device", "PyTorch finds no such device here; use --device cpu")


def check_run(args: Args) -> None:
    """Ends the program with one line where the run's folder cannot be; creates nothing."""
    run_dir = args.runs_dir / args.run_name
    if Path(args.run_name).name != args.run_name or args.run_name == "..":
        reject(args, "run_name", f"must be a plain name, for a folder in --runs-dir {args.runs_dir}")
    folder = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        reject(args, "runs_dir", f"{folder} is no folder that can be written to")
    if run_dir.exists() and not args.resume:
        reject(args, "run_name", f"{run_dir} exists; take another name, or add --resume to go on with it")
    if args.track and getattr(importlib.util.find_spec("wandb"), "origin", None) is None:  # not even a folder wandb/
        fail("--track: Weights & Biases is not installed; pip install wandb")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.evaluate:
        return evaluate_model(args)
    fill_defaults(args)
    check_args(args)
    if args.resume and not args.run_name:
        fail("--resume: give the --run-name of the run to go on with")
    if not args.run_name:
        data = args.data.stem if args.data else args.dataset
        args.run_name = f"{data}__{SCRIPT}__{args.seed}__{int(time.time())}"
    run_dir = args.runs_dir / args.run_name
    if args.resume and (run_dir / "result.json").exists():
        return print(f"{run_dir} is finished: see its result.json")
    check_run(args)
    try:
        train_with_units(args) if args.units else train(args)
    except KeyboardInterrupt:
        flags = [flag for flag in sys.argv[1:] if flag != "--resume"]
        if "--run-name" not in flags:
            flags += ["--run-name", args.run_name]
        command = f"python {shlex.join([sys.argv[0], *flags, '--resume'])}"
        print(f"\nstopped; go on with: {command}" if args.checkpoint_frequency else "\nstopped, without a checkpoint")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
