"""Tests of mlp_regression.py against independent oracles; each says what it compares with."""

import errno
import gzip
import io
import json
import shutil
import warnings
from pathlib import Path
from unittest import mock

import imageio.v3 as imageio
import numpy as np
import pandas as pd
import pytest
import torch
from common import message_of, read_events, run, scalars

import mlp_regression as mlp

CPU = torch.device("cpu")


def made_args(**flags: object) -> mlp.Args:
    args = mlp.Args(**flags)
    mlp.fill_defaults(args)
    return args


def sigma(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# --- Models -----------------------------------------------------------------------------------------------------------


def weights_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: weight.detach().numpy() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
def test_mlp_is_its_formula(activation: str) -> None:
    torch.manual_seed(0)
    model = mlp.MLP(made_args(hidden_sizes=(5, 4), activation=activation), 3, 2).double()
    w = weights_of(model)
    x = np.random.default_rng(0).standard_normal((6, 3))
    act = {"relu": lambda z: np.maximum(z, 0), "sigmoid": sigma, "tanh": np.tanh}[activation]
    h = act(x @ w["layers.0.weight"].T + w["layers.0.bias"])
    h = act(h @ w["layers.1.weight"].T + w["layers.1.bias"])
    expected = h @ w["last.weight"].T + w["last.bias"]
    np.testing.assert_allclose(model(torch.from_numpy(x)).detach().numpy(), expected)
    np.testing.assert_allclose(model.hidden(torch.from_numpy(x))[-1].detach().numpy(), h)


def test_linear_logistic_and_rbf_are_their_formulas() -> None:
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((6, 3))
    linear, logistic = mlp.Linear(3, 2).double(), mlp.Logistic(3, 2).double()
    examples = torch.randn(9, 3)
    rbf = mlp.RBFNetwork(3, 2, 4, examples).double()
    places = torch.cdist(rbf.centres, examples.double()).min(dim=1)
    assert places.values.max() < 1e-6
    assert len(places.indices.unique()) > 1
    torch.testing.assert_close(rbf.widths.data, torch.full((4,), 3**0.5 / 4 ** (1 / 3)).double())
    for model, squash in ((linear, lambda z: z), (logistic, sigma)):
        w = weights_of(model)
        for row, output in zip(x, model(torch.from_numpy(x)).detach().numpy(), strict=True):
            expected = [w["last.bias"][k] + sum(w["last.weight"][k] * row) for k in range(2)]
            np.testing.assert_allclose(output, squash(np.array(expected)))
    w = weights_of(rbf)
    for row, output in zip(x, rbf(torch.from_numpy(x)).detach().numpy(), strict=True):
        rho = [np.exp(-((np.linalg.norm(row - c) / b) ** 2)) for c, b in zip(w["centres"], w["widths"], strict=True)]
        np.testing.assert_allclose(output, w["last.weight"] @ rho)
    rbf = mlp.RBFNetwork(3, 1, 40, examples)
    rbf.widths.data[:] = 1e-3  # 40 narrow units at places of size 1, in float32
    near = rbf.hidden(rbf.centres + 5e-4)[0].diagonal()
    torch.testing.assert_close(near, torch.full((40,), np.exp(-0.75)), rtol=1e-2, atol=0)


def test_midpoints_of_the_first_layer_lie_at_examples() -> None:
    torch.manual_seed(0)
    examples = torch.randn(50, 4)
    model = mlp.make_model(made_args(hidden_sizes=(200,), init_scale=6.0), 4, 1, examples)
    assert model.layers[0].weight.std().item() == pytest.approx(3, rel=0.1)  # 6 / sqrt(inputs)
    nearest = model.layers[0](examples).abs().min(dim=0)  # for each unit
    assert nearest.values.max() < 1e-4
    assert len(nearest.indices.unique()) > 40


def test_known_functions_at_two_points() -> None:
    x = np.array([[0.5, 0], [0, -0.7]], np.float32)
    known = {"plane": [0.55, 0.79], "circle": [1, 0], "spiral": [0.5 * np.sin(3), 0.7 * np.sin(4.2 - np.pi / 2)]}
    for name, values in known.items():
        np.testing.assert_allclose(mlp.known_function(mlp.Args(dataset=name), x)[:, 0], values, rtol=1e-5)


def test_the_printed_three_sigmoids_approximate_sin_of_2_pi_x() -> None:
    """Errors of the lecture's network by its printed formula in NumPy, and as ours with those weights."""
    x = np.linspace(-1, 1, 100_001)
    f = 10.9 * sigma(-6.35 * x - 3.05) - 10.9 * sigma(6.35 * x - 3.05) - 36.6 * sigma(-1.3 * x) + 18.23
    error = np.abs(f - np.sin(2 * np.pi * x))
    assert (error.max(), np.sqrt((error**2).mean())) == (
        pytest.approx(0.1323, abs=1e-4),
        pytest.approx(0.0760, abs=1e-4),
    )
    assert np.abs(f - np.sin(x)).max() > 0.8  # what the lecture calls it

    weights = {
        "layers.0.weight": torch.tensor([[-6.35], [6.35], [-1.3]]),
        "layers.0.bias": torch.tensor([-3.05, -3.05, 0.0]),
        "last.weight": torch.tensor([[10.9, -10.9, -36.6]]),
        "last.bias": torch.tensor([18.23]),
    }
    best = {"encoding": mlp.make_data(made_args())[1], "digest": "", "seed": 1, "step": 1, "weights": weights}
    errors = mlp.evaluate(made_args(), {"best": best}, CPU, None)
    assert errors["largest_error"] == pytest.approx(0.1323, abs=2e-4)
    assert errors["function_rmse"] == pytest.approx(0.0760, abs=2e-4)


# --- Training ---------------------------------------------------------------------------------------------------------


def test_an_epoch_of_sgd_by_hand() -> None:
    """Each example once, in the shuffled order; minibatches of 4, 4 and 2, each a step down its own mean gradient."""
    torch.manual_seed(0)
    model = mlp.Linear(2, 1).double()
    x, y = torch.randn(10, 2, dtype=torch.float64), torch.randn(10, 1, dtype=torch.float64)
    w, w_0 = model.last.weight.detach().numpy()[0].copy(), model.last.bias.item()
    optimizer = mlp.make_optimizer(made_args(optimizer="sgd", learning_rate=0.1), model)
    torch.manual_seed(7)
    order = torch.randperm(10).numpy()
    torch.manual_seed(7)
    loss = mlp.train_epoch(model, optimizer, x, y, 4)
    squares = 0.0
    for batch in (order[:4], order[4:8], order[8:]):
        error = x.numpy()[batch] @ w + w_0 - y.numpy()[batch, 0]
        squares += (error**2).sum()
        w = w - 0.1 * (2 * error[:, None] * x.numpy()[batch]).mean(axis=0)
        w_0 = w_0 - 0.1 * (2 * error).mean()
    np.testing.assert_allclose(model.last.weight.detach().numpy()[0], w)
    assert model.last.bias.item() == pytest.approx(w_0)
    assert loss == pytest.approx(squares / 10)
    for name, line_search in (("adam", None), ("lbfgs", "strong_wolfe")):
        (group,) = mlp.make_optimizer(made_args(optimizer=name, learning_rate=0.1), model).param_groups
        assert (group["lr"], group.get("line_search_fn")) == (0.1, line_search)


def test_three_sigmoids_find_the_sine(tmp_path: Path) -> None:
    """A few starts, against the errors that the lecture's printed network is to be beaten by."""
    assert run("mlp_regression", "--seed", 4, "--restarts", 3, "--run-name", "sine", cwd=tmp_path).returncode == 0
    result = json.loads((tmp_path / "runs/sine/result.json").read_text())
    assert result["largest_error"] <= 0.05
    assert result["function_rmse"] <= 0.02
    model = torch.load(tmp_path / "runs/sine/model.pt", weights_only=True)
    w = {name: weight.numpy() for name, weight in model["best"]["weights"].items()}
    x = np.linspace(-1, 1, 1_001)
    h = sigma(np.outer(x, w["layers.0.weight"]) + w["layers.0.bias"])
    assert h.shape == (1_001, 3)
    error = np.abs(h @ w["last.weight"][0] + w["last.bias"] - np.sin(2 * np.pi * x))
    assert error.max() == pytest.approx(result["largest_error"], abs=1e-3)


def test_the_best_epoch_is_kept_and_patience_ends_a_start(tmp_path: Path) -> None:
    """Few noisy examples and many units overfit: the best validation loss comes early, here in the first start."""
    flags = ["--noise", "0.5", "--samples", "60", "--hidden-sizes", "30", "--restarts", "2"]
    flags = [*flags, "--patience", "7", "--seed", "6", "--run-name", "noisy"]
    assert run("mlp_regression", *flags, cwd=tmp_path).returncode == 0
    run_dir = tmp_path / "runs" / "noisy"
    steps, losses = np.array(scalars(run_dir, "losses/validation")).T
    best = torch.load(run_dir / "model.pt", weights_only=True)["best"]
    assert best["loss"] == pytest.approx(losses.min())
    assert best["step"] == steps[losses.argmin()]
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["best_epoch"], result["total_timesteps"]) == (best["step"], steps[-1])
    for start in (steps <= 25, steps > 25):  # seven epochs without a better one end a start; the next begins at 26
        assert 8 <= start.sum() < 25
        assert losses[start].argmin() == start.sum() - 8
    assert 26 in steps
    args = made_args(noise=0.5, samples=60, hidden_sizes=(30,), seed=6)
    model = mlp.make_model(args, 1, 1)
    model.load_state_dict(best["weights"])
    parts, _ = mlp.make_data(args)
    x, y = parts["training"]
    assert (y - np.sin(2 * np.pi * x)).std() == pytest.approx(0.5, rel=0.2)
    x, y = parts["validation"]
    assert ((mlp.predict(model, torch.from_numpy(x)) - y) ** 2).mean() == pytest.approx(losses.min(), rel=1e-5)
    events = read_events(run_dir)
    assert [e.value for e in events.Scalars("charts/validation_r2")] == pytest.approx(1 - losses / y.var(), rel=1e-3)
    drawn, (best_drawn,) = ({e.step: e.encoded_image_string for e in events.Images("model")}, events.Images("best"))
    assert best_drawn.encoded_image_string == drawn[best["step"]] != drawn[4]


def test_scores_by_hand() -> None:
    scores = mlp.scores(np.array([[1.0], [2.0], [4.0]]), np.array([[1.0], [3.0], [5.0]]), [3.0])
    assert scores == pytest.approx({"mse": 2 / 3, "rmse": (2 / 3) ** 0.5, "r2": 1 - 2 / 8, "baseline_mse": 8 / 3})
    assert "r2" not in mlp.scores(np.zeros((2, 1)), np.ones((2, 1)), [0.0])


def test_lbfgs_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state is its history of steps and gradients; from a copy of the folder in the middle of the second start."""
    weights, save, fresh, seen, train_epoch = [], mlp.Run.save_checkpoint, [], [], mlp.train_epoch

    def save_and_copy(run: mlp.Run) -> None:
        save(run)
        if run.progress["step"] == 8 and run.dir.name == "whole":
            shutil.copytree(run.dir, tmp_path / "copied")

    def watched(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *rest: object) -> float:
        fresh.append((not optimizer.state, not seen or not torch.equal(model.last.weight, seen[-1])))
        loss = train_epoch(model, optimizer, *rest)
        seen.append(model.last.weight.detach().clone())
        return loss

    monkeypatch.setattr(mlp.Run, "save_checkpoint", save_and_copy)
    monkeypatch.setattr(mlp, "train_epoch", watched)
    for name, resume in (("whole", False), ("copied", True)):
        args = mlp.Args(runs_dir=tmp_path, run_name=name, resume=resume, restarts=2, epochs=6, checkpoint_frequency=4)
        args.device = "cpu"
        run = mlp.Run(args, mlp.check(args))
        run.finish(mlp.train(args, run))
        parts = torch.load(run.dir / "checkpoint.pt", weights_only=True)["parts"]
        weights.append([*parts["model"].values(), *parts["best"]["weights"].values()])
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))
    curves = [scalars(tmp_path / name, "losses/validation") for name in ("whole", "copied")]
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == list(range(1, 13))
    new, old = (True, True), (False, False)  # each start begins without a history, and with weights of its own
    assert fresh[:12] == [new, *[old] * 5, new, *[old] * 5]
    assert not any(history for history, _ in fresh[12:])


# --- Pictures ---------------------------------------------------------------------------------------------------------


def test_the_picture_of_one_input_adds_up() -> None:
    """Above, the fit is f(x); below, the units and the constant add up to it."""
    torch.manual_seed(0)
    args = made_args()
    parts, encoding = mlp.make_data(args)
    model = mlp.make_model(args, 1, 1, torch.from_numpy(parts["training"][0]))
    figure = mlp.picture(args, model, {part: tuple(map(torch.from_numpy, parts[part])) for part in parts}, encoding)
    above, below = figure.axes
    assert above.collections[0].get_offsets().shape == (700, 2)
    function, fit = above.lines
    x = fit.get_xdata()
    np.testing.assert_allclose(function.get_ydata().ravel(), np.sin(2 * np.pi * x).ravel(), atol=1e-6)
    predicted = model(torch.from_numpy(x).view(-1, 1)).detach().numpy()[:, 0]
    np.testing.assert_allclose(fit.get_ydata(), predicted, atol=1e-5)
    *units, constant = (line.get_ydata() for line in below.lines)
    assert len(units) == 3
    np.testing.assert_allclose(sum(units) + constant[0], predicted, atol=1e-5)


def test_the_maps_of_two_inputs_show_the_prediction_and_each_unit() -> None:
    torch.manual_seed(0)
    args = made_args(dataset="circle", hidden_sizes=(4, 20))
    parts, encoding = mlp.make_data(args)
    model = mlp.make_model(args, 2, 1)
    figure = mlp.picture(args, model, {part: tuple(map(torch.from_numpy, parts[part])) for part in parts}, encoding)
    maps = [image.get_array() for axes in figure.axes for image in axes.images]
    assert len(maps) == 1 + 4 + 16  # of the second layer the first 16
    x = parts["training"][0]
    corner = torch.from_numpy(np.stack([x.min(axis=0), [x[:, 0].min(), x[:, 1].max()]]))  # lower left, upper left
    (left, right, bottom, top), lows, highs = figure.axes[0].images[0].get_extent(), x.min(axis=0), x.max(axis=0)
    assert [left, bottom, right, top] == pytest.approx([*lows, *highs])
    for shown, expected in zip(maps, [model(corner), *torch.cat(model.hidden(corner), dim=1)[:, :20].T], strict=True):
        assert [shown[0, 0], shown[-1, 0]] == pytest.approx(expected.detach().ravel().tolist(), abs=1e-5)
    x[:, 1] = 5.0
    with warnings.catch_warnings(action="error"):  # Matplotlib's, of an axis without a length
        mlp.picture(args, model, {"training": tuple(map(torch.from_numpy, parts["training"]))}, encoding)


def test_the_picture_of_more_inputs_has_predictions_over_true_values(tmp_path: Path) -> None:
    """Of the training and validation examples, in the target's own units; none of the test."""
    houses().to_csv(tmp_path / "houses.csv", index=False)
    args = made_args(data=str(tmp_path / "houses.csv"), target=("price",))
    parts, encoding = mlp.make_data(args)
    model, (mean, std) = mlp.make_model(args, 7, 1), (encoding[key][0] for key in ("mean", "std"))
    figure = mlp.picture(args, model, {part: tuple(map(torch.from_numpy, parts[part])) for part in parts}, encoding)
    clouds = figure.axes[0].collections
    assert [cloud.get_label() for cloud in clouds] == ["training", "validation"]
    for cloud, part in zip(clouds, ("training", "validation"), strict=True):
        x, y = parts[part]
        expected = np.hstack([mean + std * y, mean + std * model(torch.from_numpy(x)).detach().numpy()])
        np.testing.assert_allclose(cloud.get_offsets(), expected, rtol=1e-5)


def assert_pictures(run_dir: Path, tags: list[str]) -> None:
    events = read_events(run_dir)
    assert set(events.Tags()["images"]) == set(tags)
    for tag in tags:
        pictures = [imageio.imread(io.BytesIO(image.encoded_image_string)) for image in events.Images(tag)]
        assert all(picture.std() > 10 for picture in pictures)


@pytest.mark.parametrize(
    "flags",
    [
        "--dataset sine",
        "--dataset sine --model rbf",
        "--dataset circle --hidden-sizes 4 20",
        "--dataset plane --model linear --optimizer adam",
    ],
)
def test_pictures_and_histograms(flags: str, tmp_path: Path) -> None:
    flags += " --epochs 5 --restarts 1 --run-name drawn"
    assert run("mlp_regression", *flags.split(), cwd=tmp_path).returncode == 0
    events = read_events(tmp_path / "runs" / "drawn")
    assert_pictures(tmp_path / "runs" / "drawn", ["model", "best"])
    assert [event.step for event in events.Images("model")] == [1, 2, 4]
    first, second, third = (event.encoded_image_string for event in events.Images("model"))
    assert first != second != third
    assert "last/weight" in events.Tags()["histograms"]


# --- Tables -----------------------------------------------------------------------------------------------------------


def houses(rows: int = 200) -> pd.DataFrame:
    """Two numbers, one with gaps, a category with gaps, a constant; the price has gaps too."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "area": rng.uniform(40, 200, rows),
            "rooms": rng.integers(1, 7, rows).astype(float),
            "city": rng.choice(["Bern", "Zug", "Basel"], rows, p=[0.5, 0.3, 0.2]),
            "country": "CH",
        }
    )
    frame["price"] = 3 * frame["area"] + 20 * frame["rooms"] + 150 * (frame["city"] == "Zug") + rng.normal(0, 5, rows)
    frame.loc[3:9, "rooms"] = np.nan
    frame.loc[12:15, "city"] = None
    frame.loc[20:21, "price"] = np.nan
    return frame


def test_columns_become_numbers_as_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Standardised, gaps filled with the median and marked, one-hot: against each of them done by hand."""
    frame = houses()
    frame.to_csv(tmp_path / "houses.csv", index=False)
    args = made_args(data=str(tmp_path / "houses.csv"), target=("price",))
    parts, encoding = mlp.make_data(args)
    assert [len(parts[part][0]) for part in ("training", "validation", "test")] == [139, 20, 39]
    x, y = (np.concatenate([parts[part][i] for part in parts]) for i in (0, 1))
    prices = encoding["mean"][0] + encoding["std"][0] * y[:, 0].astype(np.float64)
    known = frame.dropna(subset="price").reset_index(drop=True)
    order = [int((known["price"] - price).abs().argmin()) for price in prices]
    assert sorted(order) == list(range(198))
    known = known.iloc[order].reset_index(drop=True)
    training = known.iloc[:139]
    rooms = known["rooms"].fillna(training["rooms"].median())
    expected = [
        (known["area"] - training["area"].mean()) / training["area"].std(ddof=0),
        (rooms - rooms[:139].mean()) / rooms[:139].std(ddof=0),
        known["rooms"].isna(),
        *(known["city"] == city for city in training["city"].value_counts().index),
        known["city"].isna(),
    ]
    np.testing.assert_allclose(x, np.stack([np.asarray(column, float) for column in expected], axis=1), atol=1e-5)
    assert y[:139].mean() == pytest.approx(0, abs=1e-6)
    assert y[:139].std() == pytest.approx(1, abs=1e-6)
    said = capsys.readouterr().out
    for line in (
        "198 rows, 2 without a target left out",
        "column rooms: where it is missing, the median",
        "column city: one-hot, 3 categories",
        "column city: where it is missing, a category of its own",
        "column country (constant): left out",
    ):
        assert line in said


def test_nothing_leaks_from_test_to_training(tmp_path: Path) -> None:
    """Whatever stands in the rows for validation and test, the encoding and the training examples stay the same."""
    frame = houses().dropna(subset="price").reset_index(drop=True)
    frame.to_csv(tmp_path / "houses.csv", index=False)
    args = made_args(data=str(tmp_path / "houses.csv"), target=("price",))
    parts, encoding = mlp.make_data(args)
    others = np.random.default_rng(args.seed).permutation(len(frame))[139:]
    frame.loc[others, ["area", "rooms", "price"]] *= 1_000
    frame.loc[others, "city"] = "Paris"
    frame.to_csv(tmp_path / "houses.csv", index=False)
    changed, changed_encoding = mlp.make_data(args)
    assert changed_encoding == encoding
    for ours, theirs in zip(parts["training"], changed["training"], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(parts["test"][0], changed["test"][0])


def test_linear_model_on_a_table_is_least_squares(tmp_path: Path) -> None:
    """Two targets at once; predictions against NumPy's least squares on the same training rows, scores by hand."""
    rng = np.random.default_rng(3)
    frame = pd.DataFrame(rng.standard_normal((300, 3)) * [1, 50, 0.1] + [0, 1_000, 5], columns=["a", "b", "c"])
    frame["u"] = frame["a"] - 0.02 * frame["b"] + rng.normal(0, 0.3, 300)
    frame["v"] = 100 + 40 * frame["c"] ** 2 + rng.normal(0, 2, 300)
    frame.to_csv(tmp_path / "table.csv", index=False)
    flags = ["--data", "table.csv", "--target", "v", "u", "--model", "linear", "--optimizer", "lbfgs"]
    result = run("mlp_regression", *flags, "--run-name", "table", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")

    rows = np.random.default_rng(1).permutation(300)
    training, test = rows[:210], rows[240:]
    design = np.column_stack([np.ones(300), frame[["a", "b", "c"]]])
    targets = frame[["v", "u"]].to_numpy()
    expected = design @ np.linalg.lstsq(design[training], targets[training], rcond=None)[0]
    frame.assign(u=frame["u"].where(frame.index > 0)).to_csv(tmp_path / "gap.csv", index=False)
    evaluated = run("mlp_regression", "--evaluate", "runs/table/model.pt", "--data", "gap.csv", cwd=tmp_path)
    assert (evaluated.returncode, evaluated.stderr) == (0, "")
    predicted = pd.read_csv(tmp_path / "runs/table/predictions__gap.csv")
    mse = ((predicted[1:] - targets[1:]) ** 2).to_numpy().mean()  # of all rows with both targets
    assert f"test_mse {mse:.6g}," in evaluated.stdout
    assert list(predicted.columns) == ["v", "u"]
    np.testing.assert_allclose(predicted, expected, rtol=1e-3, atol=1e-2)
    content = torch.load(tmp_path / "runs/table/model.pt", weights_only=True)
    with pytest.raises(SystemExit, match="2"):  # within a run
        mlp.evaluate(mlp.Args(**content["args"] | {"data": str(tmp_path / "gap.csv")}), content, CPU, None)

    errors = expected[test] - targets[test]
    figures = json.loads((tmp_path / "runs/table/result.json").read_text())
    assert figures["test_mse"] == pytest.approx((errors**2).mean(), rel=1e-3)
    assert figures["test_rmse"] == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-3)
    r2 = [1 - (errors[:, k] ** 2).sum() / ((targets[test, k] - targets[test, k].mean()) ** 2).sum() for k in (0, 1)]
    assert figures["test_r2"] == pytest.approx(np.mean(r2), abs=1e-3)
    baseline = targets[training].mean(axis=0) - targets[test]
    assert figures["test_baseline_mse"] == pytest.approx((baseline**2).mean(), rel=1e-4)
    assert_pictures(tmp_path / "runs/table", ["model", "best"])


def test_new_rows_without_targets_are_predicted(tmp_path: Path) -> None:
    """Gaps and categories never seen before included; the same rows as in the training get the same predictions."""
    frame = houses()
    frame.to_csv(tmp_path / "houses.csv", index=False)
    flags = ["--data", "houses.csv", "--target", "price", "--epochs", "4", "--run-name", "houses"]
    assert run("mlp_regression", *flags, cwd=tmp_path).returncode == 0
    new = frame.drop(columns=["price", "country"])[["rooms", "city", "area"]]
    new.loc[0, "city"] = "Paris"
    new.to_csv(tmp_path / "new.csv", index=False)
    for data in ("houses.csv", "new.csv"):
        result = run("mlp_regression", "--evaluate", "runs/houses/model.pt", "--data", data, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
    known, others = (pd.read_csv(tmp_path / f"runs/houses/predictions__{name}.csv") for name in ("houses", "new"))
    np.testing.assert_array_equal(known[1:], others[1:])
    assert known["price"][0] != others["price"][0]
    assert np.isfinite(others["price"]).all()


def test_true_and_false_with_gaps_and_rows_without_answers(tmp_path: Path) -> None:
    """pandas reads true, false and gaps as objects; new rows bring an empty target, or blank lines for gaps."""
    rng = np.random.default_rng(0)
    flag = rng.choice(["true", "false", ""], 200)
    pd.DataFrame({"flag": flag, "t": (flag == "true") + rng.normal(0, 0.1, 200)}).to_csv(
        tmp_path / "t.csv", index=False
    )
    flags = ["--data", "t.csv", "--target", "t", "--model", "linear", "--optimizer", "lbfgs", "--run-name", "t"]
    trained = run("mlp_regression", *flags, cwd=tmp_path)
    assert (trained.returncode, trained.stderr) == (0, "")
    (tmp_path / "new.csv").write_text("flag\ntrue\n\nfalse\n")
    (tmp_path / "empty.csv").write_text("flag,t\ntrue,\n,\nfalse,\n")
    for name in ("new", "empty"):
        result = run("mlp_regression", "--evaluate", "runs/t/model.pt", "--data", f"{name}.csv", cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        predicted = pd.read_csv(tmp_path / f"runs/t/predictions__{name}.csv")["t"]
        np.testing.assert_allclose(predicted, [1, 0, 0], atol=0.1)


def test_a_small_table_with_the_defaults(tmp_path: Path) -> None:
    """Fewer rows than a usual minibatch are one; pure noise has nothing to teach, and the training soon ends."""
    rng = np.random.default_rng(0)
    pd.DataFrame(rng.standard_normal((60, 3)), columns=["a", "b", "t"]).to_csv(tmp_path / "t.csv", index=False)
    flags = ["--data", "t.csv", "--target", "t", "--restarts", "1", "--run-name", "t"]
    result = run("mlp_regression", *flags, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    best = torch.load(tmp_path / "runs" / "t" / "model.pt", weights_only=True)["best"]
    assert scalars(tmp_path / "runs" / "t", "losses/train")[-1][0] == best["step"] + 20


def test_a_logistic_model_learns_the_targets_as_they_are(tmp_path: Path) -> None:
    pd.DataFrame({"a": np.arange(60.0), "t": [0, 1] * 30}).to_csv(tmp_path / "t.csv", index=False)
    parts, encoding = mlp.make_data(made_args(data=str(tmp_path / "t.csv"), target=("t",), model="logistic"))
    assert (encoding["mean"], encoding["std"]) == ([0], [1])
    assert set(parts["training"][1].ravel()) == {0, 1}


def test_what_is_said_of_odd_columns(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Tiny units are no constant, integers that floats cannot tell apart are; one bad cell makes a number text; of one
    number, or of a name that is different in every row, it counts where it is missing, if it is in some."""
    frame = houses()
    frame["name"] = [f"house {i}" for i in range(len(frame))]
    frame["farads"] = np.random.default_rng(1).uniform(1e-13, 2e-13, len(frame))
    frame["p_value"] = frame["area"] * 1e-200
    frame["nickname"] = frame["name"].where(frame.index % 3 > 0)
    frame["lift"] = np.where(frame.index % 3 > 0, 1.0, np.nan)
    frame["year"] = frame["area"].round().astype(int).astype(str).where(frame.index != 7, "?")
    frame["sold"] = [f"{area:.9f}" if i else "unknown" for i, area in enumerate(frame["farads"] * 1e13)]
    frame["id"] = 1_790_000_000_000_000_000 + np.arange(len(frame)) // 2
    frame.to_csv(tmp_path / "houses.csv", index=False)
    parts, encoding = mlp.make_data(made_args(data=str(tmp_path / "houses.csv"), target=("price",)))
    assert np.isfinite(parts["training"][0]).all()
    inputs = {column["name"]: column for column in encoding["inputs"]}
    assert list(inputs) == ["area", "rooms", "city", "farads", "p_value", "nickname", "lift", "year"]
    assert inputs["lift"] == {"name": "lift", "missing": True, "median": 1, "mean": 1, "std": 1}
    assert inputs["nickname"] == {"name": "nickname", "missing": True, "categories": []}
    said = capsys.readouterr().out
    assert "column sold (most of it looks like numbers, but not unknown in row 1): left out" in said
    assert "column id (constant): left out" in said
    assert "column name (different in every row): left out" in said
    assert f"column year: one-hot, {len(inputs['year']['categories'])} categories" in said
    assert "column nickname: hardly a value stands twice, so only whether it is missing counts" in said
    rows = np.random.default_rng(1).permutation(198)[:139]
    counts = frame.dropna(subset="price")["year"].iloc[rows].value_counts()
    kept = counts.index.isin(encoding["inputs"][-1]["categories"])
    assert counts[kept].min() == 2 > counts[~kept].max()
    assert "column year: most of it looks like numbers, but not ? in row 8" in said


def test_repeated_rows_are_said_and_fifty_categories_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Whatever their numbers."""
    table = pd.DataFrame({"a": [f"name {i}" for i in range(60)] * 10, "row": range(600), "t": [*range(60)] * 10})
    table["row"] = "row " + table["row"].astype(str)
    table.to_csv(tmp_path / "t.csv", index=False)
    _, encoding = mlp.make_data(made_args(data=str(tmp_path / "t.csv"), target=("t",)))
    assert "540 rows repeat others" in capsys.readouterr().out
    assert len(encoding["inputs"][0]["categories"]) == 50


def test_spaces_after_commas_and_blank_first_lines_do_not_count(tmp_path: Path) -> None:
    for text, expected in (('id, a b, "c"\n1, x, 2\n', {"id": [1], "a b": ["x"], "c": [2]}), ("c\n5\n", {"c": [5]})):
        (tmp_path / "t.gz").write_text("\n\n" + text)
        assert mlp.read_table(str(tmp_path / "t.gz"), ["c"]).to_dict("list") == expected


@pytest.mark.parametrize(
    ("values", "first"),
    [(["7,134", "750", "5,658"], "7,134"), (["45%", "3%", "9"], "45%"), (["3 €", "$4", "?"], "3 €")],
)
def test_text_that_looks_like_numbers_is_said(
    values: list[str], first: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    frame = pd.DataFrame({"lot": values * 20, "price": np.arange(60.0)})
    frame.to_csv(tmp_path / "t.csv", index=False)
    mlp.make_data(made_args(data=str(tmp_path / "t.csv"), target=("price",)))
    assert f"column lot: most of it looks like numbers, but not {first} in row 1" in capsys.readouterr().out


def test_text_that_is_numbers_in_a_new_table_is_described(capsys: pytest.CaptureFixture) -> None:
    encoding = {"inputs": [{"name": "year", "categories": ["1990", "?"], "missing": False}], "left_out": []}
    mlp.describe(pd.DataFrame({"year": ["1990", "1991"]}), encoding)
    assert "column year: 1 rows have others, such as 1991" in capsys.readouterr().out


def test_row_numbers_are_left_out_and_whole_numbers_over_64_bits_are_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    frame = pd.DataFrame({"a": [10**25 * (1 + n % 7) for n in range(60)], "price": np.arange(60.0)})
    frame.to_csv(tmp_path / "t.csv")  # with pandas' own row numbers
    for again in "", ".1":
        parts, encoding = mlp.make_data(made_args(data=str(tmp_path / "t.csv"), target=("price",)))
        assert f"column Unnamed: 0{again} (row numbers, as" in capsys.readouterr().out
        assert [column["name"] for column in encoding["inputs"]] == ["a"]
        assert parts["training"][0].std() == pytest.approx(1, rel=1e-4)
        pd.read_csv(tmp_path / "t.csv").to_csv(tmp_path / "t.csv")
    frame.rename(columns={"a": ""}).assign(**{"": np.sqrt(frame["price"])}).to_csv(tmp_path / "t.csv", index=False)
    _, encoding = mlp.make_data(made_args(data=str(tmp_path / "t.csv"), target=("price",)))
    assert [column["name"] for column in encoding["inputs"]] == ["Unnamed: 0"]  # no row numbers, only without a name


def test_names_with_dollars_are_drawn_and_new_categories_and_files_of_one_name_are_said(tmp_path: Path) -> None:
    """What stands between two dollars is no formula; predictions never replace others."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"garden": ["yes", "no"] * 60, "area": rng.uniform(1, 2, 120), "n": rng.uniform(1, 2, 120)})
    frame["cost_$_in_$"] = frame["area"] * 100
    frame["plot"] = ["01", "02", "A"] * 40
    frame.to_csv(tmp_path / "t.csv", index=False)
    flags = ["--data", "t.csv", "--target", "cost_$_in_$", "--epochs", "2", "--run-name", "t"]
    trained = run("mlp_regression", *flags, cwd=tmp_path)
    assert (trained.returncode, trained.stderr) == (0, "")
    figures = trained.stdout.splitlines()[-1].split(": ")[1]
    again = run("mlp_regression", "--evaluate", "runs/t/model.pt", "--seed", "7", cwd=tmp_path)  # its own test rows
    assert again.stdout.splitlines()[-1].split(": ")[1] == figures
    (tmp_path / "new").mkdir()
    frame.assign(garden="Yes", plot="01").to_csv(tmp_path / "new" / "t.csv", index=False)
    new = run("mlp_regression", "--evaluate", "runs/t/model.pt", "--data", "new/t.csv", cwd=tmp_path)
    assert (new.returncode, new.stderr) == (0, "")
    assert "column garden: 120 rows have others, such as Yes: coded as none" in new.stdout
    assert "column plot: 120 rows" not in new.stdout  # 01 is still text
    first, second = (tmp_path / "runs" / "t" / f"predictions__t{number}.csv" for number in ("", "-2"))
    assert len(pd.read_csv(first)) == len(pd.read_csv(second)) == 120
    assert first.read_text() != second.read_text()


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_evaluation_of_a_known_function_repeats(optimizer: str, tmp_path: Path) -> None:
    """The figures of the training; the mean that they are compared with is that of the training examples."""
    flags = ["--dataset", "circle", "--epochs", "5", "--restarts", "1", "--seed", "4", "--optimizer", optimizer]
    flags = [*flags, "--run-name", "spiral"]
    trained = run("mlp_regression", *flags, cwd=tmp_path)
    evaluated = run("mlp_regression", "--evaluate", "runs/spiral/model.pt", cwd=tmp_path)
    assert (evaluated.returncode, evaluated.stderr) == (0, "")
    assert evaluated.stdout.split(": ")[-1] == trained.stdout.split(": ")[-1]
    parts, _ = mlp.make_data(made_args(dataset="circle", seed=4))
    baseline = ((parts["test"][1] - parts["training"][1].mean()) ** 2).mean()
    assert f"test_baseline_mse {baseline:.6g}," in trained.stdout
    table = run("mlp_regression", "--evaluate", "runs/spiral/model.pt", "--data", "t.csv", cwd=tmp_path)
    assert (table.returncode, table.stderr.count("\n")) == (2, 1)
    assert "was trained on --dataset circle, and predicts from no table" in table.stderr


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--hidden-sizes", "give one number for each hidden layer"),
        ("--model rbf --hidden-sizes 3 3", "an RBF network has one"),
        ("--capture-video", "--capture-video: a regression has no episodes to record"),
        ("--batch-size 10", "lbfgs takes all examples at once"),
        ("--samples 10 --optimizer sgd", "10 rows are too few: training, validation and test need two each"),
        ("--target y", "--data and --target go together"),
        ("--model logistic", "there are targets from -0.999"),
        ("--data no.csv --target price", "no.csv: No such file"),
        ("--data folder --target price", "folder: Is a directory"),
        ("--data houses.csv", "--data and --target go together"),
        ("--data houses.csv --target prize", "there is no column 'prize' among 'area', 'rooms', 'city'"),
        ("--data houses.csv --target city", "column city has Basel in row 1"),
        ("--data houses.csv --target price --model logistic", "its values lie in (0, 1)"),
        ("--data typo.csv --target price", "column price has 12O in row 5"),
        ("--data infinite.csv --target price", "column area has inf in row 40: must be a number between -1e+30 and"),
        ("--data huge.csv --target price", "column area has 1e+39 in row 40"),
        ("--data same.csv --target price", "one value in all rows to train on"),
        ("--data houses.csv --target price price", "no column twice"),
        ("--data houses.csv --target price --target area", "--target is given more than once"),
        ("--data alone.csv --target price", "no column is left to predict from; left out: country (constant)"),
        ("--data dates.csv --target price", "left out: day (different in every row)"),
        ("--data twice.csv --target price", "more than one column is called 'area'"),
        ("--data semicolon.csv --target b", "there is no column 'b' among 'a;b'; columns are divided by commas"),
        ("--data comma.csv --target b", "its first line is ['a;b'], and should name the columns"),
        ("--data comment.csv --target b", "its first line is ['# exported'], and should name the columns"),
        ("--data ragged.csv --target b", "--data ragged.csv: not a CSV file"),
        ("--data binary.csv --target b", "--data binary.csv: not a CSV file"),
        ("--data latin.csv --target b", "--data latin.csv: not a CSV file in UTF-8: save it as one"),
        ("--data zipped.csv.gz --target b", "--data zipped.csv.gz: not a CSV file in UTF-8: save it as one"),
        ("--data unnamed.csv --target c", "there is no column 'c' among 'a', 'b', '', ''"),
        ("--data tiny.csv --target price", "one value in all rows to train on"),
        ("--data empty.csv --target b", "--data empty.csv: not a CSV file"),
        ("--data header.csv --target b", "0 rows are too few"),
        ("--evaluate model.pt --data fewer.csv", "there is no column 'area' among 'rooms'"),
        ("--evaluate model.pt --data far.csv", "column area has 1e+35 in row 40: must be a number between -4.7"),
        ("--evaluate model.pt --data houses.csv --model linear", "model.pt was started with mlp"),
        ("--run-name whole --resume --data houses.csv --target price --epochs 2", "houses.csv has changed since"),
    ],
)
def test_bad_input_of_regression(
    flags: str,
    expected: str,
    trained_on_houses: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line, exit status 2, nothing created and nothing changed."""
    monkeypatch.chdir(tmp_path)
    frame = houses()
    frame.to_csv("houses.csv", index=False)
    frame.astype({"price": object}).replace({"price": {frame["price"][4]: "12O"}}).to_csv("typo.csv", index=False)
    frame.assign(area=frame["area"].where(frame.index != 39, np.inf)).to_csv("infinite.csv", index=False)
    frame.assign(price=0.1).to_csv("same.csv", index=False)
    frame[["country", "price"]].to_csv("alone.csv", index=False)
    frame.drop(columns=["area", "city"]).to_csv("fewer.csv", index=False)
    Path("twice.csv").write_text("area, area,price\n1,2,3\n")
    frame.assign(area=frame["area"].where(frame.index != 39, 1e39)).to_csv("huge.csv", index=False)
    frame.assign(area=frame["area"].where(frame.index != 39, 1e35)).to_csv("far.csv", index=False)
    days = pd.date_range("2024-01-01", periods=len(frame)).strftime("%Y-%m-%d")
    frame[["price"]].assign(day=days).to_csv("dates.csv", index=False)
    Path("ragged.csv").write_text("a,b\n1,2\n1,2,3\n")
    Path("semicolon.csv").write_text("a;b\n1;2\n3;4\n")
    Path("comma.csv").write_text("a;b\n1;2,5\n3;4,5\n")
    Path("comment.csv").write_text("# exported\na,b\n1,2\n")
    Path("binary.csv").write_bytes(bytes(range(256)) * 10)
    Path("latin.csv").write_text("ä,b\n1,2\n", encoding="latin-1")
    Path("zipped.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n"))
    Path("unnamed.csv").write_text("a,b,,\n1,2,,\n")
    frame.assign(price=frame["price"] * 1e-200).to_csv("tiny.csv", index=False)
    Path("empty.csv").touch()
    Path("header.csv").write_text("a,b\n")
    Path("folder").mkdir()
    shutil.copytree(trained_on_houses, "runs/whole")
    Path("runs/whole/result.json").unlink()
    shutil.copy("runs/whole/model.pt", "model.pt")
    if "whole" in flags:
        frame.head(150).to_csv("houses.csv", index=False)
        flags += " --checkpoint-frequency 1"
    before = {path: path.is_file() and path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert expected in message_of(mlp, flags.split(), capsys, monkeypatch)
    assert {path: path.is_file() and path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.fixture(scope="module")
def trained_on_houses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("houses")
    houses().to_csv(cwd / "houses.csv", index=False)
    flags = ["--data", "houses.csv", "--target", "price", "--epochs", "2", "--checkpoint-frequency", "1"]
    assert run("mlp_regression", *flags, "--run-name", "whole", cwd=cwd).returncode == 0
    return cwd / "runs" / "whole"


def test_predictions_are_written_whole_or_not_at_all(
    trained_on_houses: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    houses().to_csv("houses.csv", index=False)
    shutil.copy(trained_on_houses / "model.pt", "model.pt")
    monkeypatch.setattr(mlp.os, "fsync", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    message = message_of(mlp, ["--evaluate", "model.pt", "--data", "houses.csv"], capsys, monkeypatch)
    assert ".: No space left on device" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["houses.csv", "model.pt"]


def test_divergence_is_named(tmp_path: Path) -> None:
    flags = ["--optimizer", "sgd", "--learning-rate", "1e6", "--run-name", "diverged"]
    result = run("mlp_regression", *flags, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "losses/" in result.stderr
    assert "lower --learning-rate" in result.stderr
    assert not (tmp_path / "runs/diverged/result.json").exists()
