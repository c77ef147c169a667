"""Tests of rainbow_atari.py against independent oracles; each says what it compares with."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import SHORT, Catch, message_of, run
from hypothesis import given, settings
from hypothesis import strategies as st

import rainbow_atari as rainbow

CPU = torch.device("cpu")
OFF = ["--no-double-q", "--no-prioritised-replay", "--no-dueling", "--no-distributional", "--no-noisy-nets"]


def test_without_its_tricks_it_is_dqn(tmp_path: Path) -> None:
    """The weights and the optimizer's moments after 10 updates are those of dqn_atari.py, to the bit."""
    short = [*SHORT["dqn_atari"], "--total-timesteps", "200", "--train-frequency", "10", "--eval-episodes", "0"]
    settings = ["--n-step", "1", "--learning-rate", "1e-4", "--optimizer-eps", "1e-8", "--max-grad-norm", "1e9"]
    trained = []
    for script, flags in (("dqn_atari", []), ("rainbow_atari", [*OFF, *settings])):
        result = run(script, *short, *flags, "--run-name", script, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        parts = torch.load(tmp_path / "runs" / script / "checkpoint.pt", weights_only=True)["parts"]
        weights = [*parts["q_network"].values(), *parts["target_network"].values()]
        trained.append([*weights, *(x for s in parts["optimizer"]["state"].values() for x in s.values())])
    assert len(trained[0]) == 50
    assert all(torch.equal(*pair) for pair in zip(*trained, strict=True))


def test_a_window_longer_than_the_memory_is_refused(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--n-step", "1000000000000", "--total-timesteps", "30000"]
    message = message_of(rainbow, flags, capsys, monkeypatch)
    assert "--n-step 1000000000000" in message
    assert "--buffer-size 1000000 >= 1000000000005" in message


# --- Replay memory ----------------------------------------------------------------------------------------------------


def make_memory(capacity: int, spare: int, n_step: int, *, prioritised: bool, seed: int = 0) -> rainbow.RainbowMemory:
    slots = capacity + spare
    ring = np.zeros((slots, 84, 84), np.uint8), np.zeros(slots, rainbow.FrameMemory.STEP)
    ring = capacity, *ring, np.random.default_rng(seed), CPU
    return rainbow.RainbowMemory(*ring, n_step=n_step, gamma=0.9, prioritised=prioritised)


def shade(number: int) -> np.ndarray:
    return np.full((84, 84), number % 251 + 1, np.uint8)


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(8, 40),
    spare=st.integers(2, 12),
    lives=st.lists(st.tuples(st.integers(1, 15), st.sampled_from(["life", "over", "limit"])), min_size=2, max_size=12),
    n_step=st.sampled_from([1, 2, 3, 7, 20]),
    prioritised=st.booleans(),
)
def test_windows_equal_a_plain_loop(
    capacity: int, spare: int, lives: list[tuple[int, str]], n_step: int, prioritised: bool
) -> None:
    """Every transition in the ring is drawn with the rewards that a loop over its life adds up, and none other.

    A life ends in the middle of a game, with the game, or by a time limit; the last one goes on at the newest screen.
    """
    memory = make_memory(capacity, spare, n_step, prioritised=prioritised)
    rows, games = [], [[]]  # place of the first screen, reward, terminated; the screens' places of each game
    fresh = True
    for length, end in lives:
        if fresh:
            memory.push(shade(memory.count))
        for t in range(length):
            last = t == length - 1
            rows.append((memory.count - 1, len(games), float(len(rows) % 3 - 1), last and end != "limit"))
            games[-1].append(memory.count - 1)
            memory.append(len(rows) % 18, rows[-1][2], rows[-1][3], shade(memory.count))
        fresh = end != "life"
        if fresh:
            games.append([])

    def stack(place: int, game: int) -> bytes:
        begin = games[game - 1][0]
        dark = np.zeros((84, 84), np.uint8)
        return np.array([shade(i) if i >= begin else dark for i in range(place - 3, place + 1)]).tobytes()

    expected = set()
    oldest = memory.count - capacity + 3 if memory.count > capacity else 0
    for i, (place, game, _, _) in enumerate(rows):
        if place < oldest:
            continue
        total, discount, after = 0.0, 1.0, place
        for other, other_game, reward, terminated in rows[i : i + n_step]:
            if other_game != game:
                break
            total, discount, after = total + discount * reward, discount * 0.9, other + 1
            if terminated:
                discount = 0.0
                break
        following = stack(after, game) if discount else None
        expected.add((stack(place, game), (i + 1) % 18, round(total, 4), round(discount, 4), following))
    drawn = set()
    for _ in range(12):
        _, batch = memory.sample(100, 0.4)
        for obs, action, reward, discount, next_obs, weight in zip(*batch, strict=True):
            following = next_obs.numpy().tobytes() if discount else None
            row = int(action), round(float(reward), 4), round(float(discount), 4), following
            drawn.add((obs.numpy().tobytes(), *row))
            assert weight == 1
    assert drawn == expected


@pytest.mark.parametrize("size", [2, 5, 9, 200])
def test_sum_tree_equals_a_plain_sum(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one to five levels, leaves at every fraction, against a search in the running sum of a list."""
    monkeypatch.setattr(rainbow.SumTree, "FAN_OUT", 3)
    rng, tree, priorities = np.random.default_rng(0), rainbow.SumTree(size), np.zeros(size)
    for _ in range(50):
        leaves = rng.integers(size, size=4)
        values = rng.integers(4, size=4) * (leaves + 1.0)  # whole numbers, so that every order of a sum is exact
        tree.set(leaves, values)
        for leaf, value in zip(leaves, values, strict=True):
            priorities[leaf] = value
        if not priorities.any():
            continue
        assert all(level.sum() == priorities.sum() for level in tree.levels)
        fractions = np.append(np.arange(priorities.sum()) / priorities.sum(), np.nextafter(1, 0))
        found = tree.find(fractions + 1e-12 * (fractions < 0.999))
        assert Counter(found[:-1].tolist()) == {i: p for i, p in enumerate(priorities) if p}
        assert priorities[found[-1]] > 0


def test_no_leaf_of_priority_zero_is_drawn() -> None:
    """Where rounding differs most: great and tiny priorities beside empty leaves, at the very ends of all sums."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        tree = rainbow.SumTree(1000)
        leaves = rng.choice(1000, 30, replace=False)
        tree.set(leaves, 10.0 ** rng.uniform(-12, 12, 30))
        ends = tree.levels[0].ravel().cumsum() / tree.levels[0].sum()
        around = np.concatenate([np.nextafter(ends, 0), ends, np.nextafter(ends, 1), [0.0, np.nextafter(1, 0)]])
        assert np.isin(tree.find(around.clip(0, np.nextafter(1, 0))), leaves).all()


def test_draws_and_weights_follow_priorities() -> None:
    """Frequencies against p / sum p (chi-squared), weights against (N P)^-beta over its largest; p by hand."""
    memory = make_memory(200, 10, 1, prioritised=True)
    memory.push(shade(0))
    for i in range(100):
        memory.append(i % 18, float(i), False, shade(i + 1))
    assert (memory.tree.levels[0].flat[:100] == 1).all()  # before the first loss, as in DQN Zoo
    places, _ = memory.sample(50, 1.0)  # of equal priorities one of every two, not always the same
    assert (places // 2 == np.arange(50)).all()
    assert set(places % 2) == {0, 1}
    loss = torch.linspace(0, 4, 100)
    memory.update(np.arange(100), loss)
    probability = np.sqrt(loss.numpy() + 1e-6) / np.sqrt(loss.numpy() + 1e-6).sum()
    drawn = np.concatenate([memory.sample(50, 1.0)[1][2].numpy().astype(int) for _ in range(1000)])
    assert probability[0] * 50_000 < 1
    expected, counts = 50_000 * probability[1:], np.bincount(drawn, minlength=100)[1:]
    assert ((counts - expected) ** 2 / expected).sum() < 149  # 98 degrees: exceeded with a probability below 0.001
    places, (*_, reward, _, _, weight) = memory.sample(50, 0.6)
    assert (places == reward.numpy()).all()
    by_hand = (100 * probability[places]) ** -0.6
    np.testing.assert_allclose(weight, by_hand / by_hand.max(), rtol=1e-5)
    memory.append(0, 0.0, False, shade(101))
    assert memory.tree.levels[0].flat[100] == pytest.approx(2.0, rel=1e-6)  # the largest so far, 4^0.5
    memory.update(np.arange(101), torch.zeros(101))
    assert memory.tree.levels[0].flat[:101] == pytest.approx(1e-3)  # (0 + 1e-6)^0.5
    memory.append(0, 0.0, False, shade(102))
    assert memory.tree.levels[0].flat[101] == pytest.approx(2.0, rel=1e-6)  # also when it is there no more
    memory.update(np.arange(1), torch.tensor([400.0]))
    assert memory.tree.levels[0].flat[0] == pytest.approx(10.0)  # of a loss clipped to 100
    restored = make_memory(200, 10, 1, prioritised=True)
    restored.load_state_dict(memory.state_dict())
    restored.append(0, 0.0, False, shade(103))
    assert restored.tree.levels[0].flat[102] == pytest.approx(10.0)


# --- Network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2])
def test_noisy_layer_is_the_papers(rows: int) -> None:
    """Against a matrix of noise made by loops from the same normal draws; other noise at every call."""
    torch.manual_seed(1)
    layer, x = rainbow.NoisyLinear(5, 3, sigma=0.4), torch.randn(rows, 5)
    assert (layer.sigma.weight == 0.4 / math.sqrt(5)).all()
    assert (layer.sigma.bias == 0.4 / math.sqrt(5)).all()
    assert all(parameter.abs().max() <= 1 / math.sqrt(5) for parameter in layer.mu.parameters())
    torch.manual_seed(2)
    given_out, again = layer(x), layer(x)
    torch.manual_seed(2)
    f = [math.copysign(math.sqrt(abs(e)), e) for e in torch.randn(8).tolist()]
    weight, bias = layer.mu.weight.clone(), layer.mu.bias.clone()
    for i in range(3):
        bias[i] += layer.sigma.bias[i] * f[i]
        for j in range(5):
            weight[i, j] += layer.sigma.weight[i, j] * f[i] * f[3 + j]
    torch.testing.assert_close(given_out, x @ weight.T + bias)
    assert not torch.equal(given_out, again)
    given_out.sum().backward()
    expected = torch.tensor([[f[i] * f[3 + j] * x[:, j].sum() for j in range(5)] for i in range(3)])
    torch.testing.assert_close(layer.sigma.weight.grad, expected)


def test_dueling_streams_and_the_mean_of_a_distribution() -> None:
    """Value plus advantage less its mean over actions, for each atom before the softmax; Q by a loop over the atoms."""
    network = rainbow.RainbowNetwork(4, rainbow.Args(noisy_nets=False))
    obs = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    with torch.no_grad():
        outputs, features = network(obs), network.convolutions(obs / 255)
        advantage = network.advantage(features).view(2, 4, 51)
        for action in range(4):
            mean = sum(advantage[:, other] for other in range(4)) / 4
            expected = network.value(features) + advantage[:, action] - mean
            torch.testing.assert_close(outputs[:, action], expected)
        probability = outputs.softmax(2)
        expected = sum(probability[:, :, i] * (-10 + 0.4 * i) for i in range(51))
        torch.testing.assert_close(network.q_values(outputs), expected, rtol=0, atol=1e-5)
        assert network.act(obs[:1]) == expected[0].argmax()


def test_sizes_are_the_papers() -> None:
    """Hessel et al.: DQN's convolutions and two streams of 512; van Hasselt et al. 2019: two convolutions and 256."""

    def shapes(**flags: bool) -> list[tuple]:
        network = rainbow.RainbowNetwork(6, rainbow.Args(**flags))
        return [tuple(p.shape) for name, p in network.named_parameters() if p.dim() > 1 and "sigma" not in name]

    convolutions = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)]
    assert shapes() == [*convolutions, (512, 3136), (306, 512), (512, 3136), (51, 512)]
    small = [(32, 4, 5, 5), (64, 32, 5, 5), (256, 576), (306, 256), (256, 576), (51, 256)]
    assert shapes(small_network=True) == small
    assert rainbow.RainbowNetwork(6, rainbow.Args(noisy_sigma=0.3)).value[0].sigma.weight[0, 0] == 0.3 / 3136**0.5


def test_the_small_network_is_its_formula() -> None:
    """Without tricks: two convolutions and two layers, all but the last with a ReLU."""
    flags = {"small_network": True, "noisy_nets": False, "dueling": False, "distributional": False}
    network = rainbow.RainbowNetwork(3, rainbow.Args(**flags))
    w1, b1, w2, b2, w3, b3, w4, b4 = (weight.double() for weight in network.parameters())
    obs = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    x = F.conv2d(obs.double() / 255, w1, b1, stride=5).clamp(0)
    x = F.conv2d(x, w2, b2, stride=5).clamp(0).flatten(1)
    expected = (x @ w3.T + b3).clamp(0) @ w4.T + b4
    torch.testing.assert_close(network(obs)[..., 0].double(), expected, rtol=1e-4, atol=1e-5)


def test_noise_explores_in_an_evaluation_and_no_epsilon(play: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks in each of the three steps of 100 games."""
    looked = []
    play(rainbow, Catch)
    monkeypatch.setattr(rainbow.RainbowNetwork, "act", lambda *_: looked.append(1) or 0)
    args = rainbow.Args(small_network=True, eval_episodes=100)
    rainbow.evaluate(args, {"q_network": rainbow.RainbowNetwork(3, args).state_dict()}, CPU, None)
    assert len(looked) == 300


# --- The update -------------------------------------------------------------------------------------------------------


def test_projection_equals_the_papers_loop() -> None:
    """Algorithm 1 of Bellemare et al. 2017 in float64, with the case that it forgets: an atom that hits one exactly."""
    support = torch.linspace(-10, 10, 51)
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(40, 51, generator=generator) * 8
    atoms[0] = support  # all stay
    atoms[1], atoms[2], atoms[3] = 10.0, -10.0, 99.0
    atoms[4] = support[torch.arange(51).flip(0)]
    probability = torch.randn(40, 51, generator=generator).softmax(1)
    expected = torch.zeros(40, 51, dtype=torch.float64)
    for row in range(40):
        for j in range(51):
            b = (min(10.0, max(-10.0, atoms[row, j].item())) + 10) / 0.4
            low, high = math.floor(b), math.ceil(b)
            if low == high:
                expected[row, low] += probability[row, j]
            else:
                expected[row, low] += probability[row, j] * (high - b)
                expected[row, high] += probability[row, j] * (b - low)
    projected = rainbow.project(atoms, probability, support)
    torch.testing.assert_close(projected, expected.float(), rtol=0, atol=2e-6)
    torch.testing.assert_close(projected.sum(1), torch.ones(40))
    torch.testing.assert_close(projected[0], probability[0], rtol=0, atol=2e-6)


def test_targets_by_hand() -> None:
    """1 + 0.5 * 2 and, at a terminal state, 1: of a value of 2 and of a return that is all but certainly 2."""
    reward, discount, support = torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.0]), torch.linspace(-10, 10, 51)
    assert rainbow.targets(reward, discount, torch.tensor([[2.0], [2.0]]), support).tolist() == [[2.0], [1.0]]
    logits, expected = torch.full((2, 51), -50.0), torch.zeros(2, 51)
    logits[:, 30], expected[0, 30] = 50.0, 1.0
    expected[1, 27], expected[1, 28] = 0.5, 0.5  # 1 lies half way between 0.8 and 1.2
    given_out = rainbow.targets(reward, discount, logits, support)
    torch.testing.assert_close(given_out, expected, rtol=0, atol=1e-5)


def test_losses_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 200.0]])  # probabilities 1/4 and 3/4; nearly 0 and 1
    loss = rainbow.losses(logits, torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    assert loss.tolist() == pytest.approx([0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), 200.0])
    assert rainbow.losses(torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0], [1.0]])).tolist() == [4.0, 0.0]


def test_the_noise_explores_before_anything_is_learnt() -> None:
    """No action takes most of a new network's choices, with DQN Zoo's sigma; the mean is over networks."""
    args, shares = rainbow.Args(env_id="ALE/Assault-v5", small_network=True, noisy_sigma=0.1), []
    env = rainbow.make_atari(args, np.random.default_rng(1))
    screens = [env.reset(seed=1)[0], *(env.step(action % 7)[0] for action in range(103))]
    obs = [torch.from_numpy(np.stack(screens[i : i + 4])[None]) for i in range(100)]
    torch.manual_seed(1)
    for _ in range(12):
        network = rainbow.RainbowNetwork(7, args)
        shares.append(np.bincount([network.act(one) for one in obs]).max() / len(obs))
    assert np.mean(shares) < 0.8


# --- The loop ---------------------------------------------------------------------------------------------------------


def make_run(tmp_path: Path, **flags: object) -> rainbow.Run:
    args = rainbow.Args(runs_dir=tmp_path, run_name="it", device="cpu", small_network=True, **flags)
    return rainbow.Run(args, rainbow.check(args))


def test_what_the_loop_does(tmp_path: Path, play: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """beta at every update, by its line; the gradient's clipped norm, by what Adam gets; three draws of noise in
    an update and one in an action for each of four layers; and flags where they are used."""
    play(rainbow, Catch)
    betas, draws, norms, given_in = [], [0], [], set()
    sample, randn, step = rainbow.RainbowMemory.sample, torch.randn, torch.optim.Adam.step

    def count(*size: int, **options: object) -> torch.Tensor:
        draws[0] += 1
        return randn(*size, **options)

    def watch(optimizer: torch.optim.Adam) -> None:
        norms.append(sum((p.grad**2).sum().item() for p in optimizer.param_groups[0]["params"]) ** 0.5)
        given_in.add((optimizer.defaults["lr"], optimizer.defaults["eps"]))
        step(optimizer)

    def watch_sample(memory: rainbow.RainbowMemory, size: int, beta: float) -> tuple:
        betas.append(beta)
        given_in.add((memory.n_step, memory.gamma, memory.capacity, size))
        return sample(memory, size, beta)

    monkeypatch.setattr(rainbow.RainbowMemory, "sample", watch_sample)
    monkeypatch.setattr(torch, "randn", count)
    monkeypatch.setattr(torch.optim.Adam, "step", watch)
    flags = {"total_timesteps": 60, "learning_starts": 40, "batch_size": 8, "train_frequency": 5, "max_grad_norm": 0.1}
    flags |= {"n_step": 2, "gamma": 0.7, "buffer_size": 50, "learning_rate": 0.03, "optimizer_eps": 0.02}
    run = make_run(tmp_path, **flags)
    rainbow.train(run.args, run)
    run.writer.close()
    assert betas == pytest.approx([0.4 + 0.6 * at / 60 for at in (40, 45, 50, 55, 60)])
    assert draws[0] == 4 * (60 + 3 * 5)
    assert norms == pytest.approx([0.1] * 5, rel=1e-3)
    assert given_in == {(0.03, 0.02), (2, 0.7, 50, 8)}


@pytest.mark.parametrize(("distributional", "double_q"), [(True, True), (True, False), (False, True)])
def test_updates_by_hand(
    distributional: bool, double_q: bool, tmp_path: Path, play: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What three updates bootstrap from, their gradients, new priorities and logged values, against the weighted mean
    written out, with weights and a target network of our own; after the second an evaluation of the same network."""
    play(rainbow, Catch)
    restore, sample, targets = rainbow.Run.restore, rainbow.RainbowMemory.sample, rainbow.targets
    step, update = torch.optim.Adam.step, rainbow.RainbowMemory.update
    now, seen, evaluated = {}, [], []

    def value(row: torch.Tensor) -> torch.Tensor:
        return row.softmax(0) @ torch.linspace(-10, 10, 51) if distributional else row.sum()

    def watch_restore(run: rainbow.Run, **parts: object) -> bool:
        now["network"], now["theirs"] = parts["q_network"], parts["target_network"]
        for weight in now["theirs"].parameters():
            weight.copy_(0.1 * torch.randn_like(weight))
        return restore(run, **parts)

    def watch_sample(memory: rainbow.RainbowMemory, size: int, beta: float) -> tuple:
        places, (*batch, _) = sample(memory, size, beta)
        now["obs"], now["action"], _, _, now["next_obs"] = batch
        return places, (*batch, torch.arange(1, size + 1) / size)

    def watch_targets(*given_in: torch.Tensor) -> torch.Tensor:
        ours, theirs = now["network"](now["next_obs"]), now["theirs"](now["next_obs"])
        best = [[max(range(3), key=lambda a, rows=rows: value(rows[a])) for rows in each] for each in (ours, theirs)]
        assert best[0] != best[1]
        rows = [theirs[i, action] for i, action in enumerate(best[0 if double_q else 1])]
        torch.testing.assert_close(given_in[2], torch.stack(rows))
        now["target"] = targets(*given_in)
        return now["target"]

    def watch_step(optimizer: torch.optim.Adam) -> None:
        outputs = now["network"](now["obs"])
        rows = [outputs[i, action] for i, action in enumerate(now["action"])]
        if distributional:
            losses = [
                (t[t > 0] * (t.log() - row + row.logsumexp(0))[t > 0]).sum()
                for row, t in zip(rows, now["target"], strict=True)
            ]
            now["priority"] = [(loss.item() + 1e-6) ** 0.5 for loss in losses]
        else:
            losses = [(row - t).sum() ** 2 for row, t in zip(rows, now["target"], strict=True)]
            now["priority"] = [
                (abs((row - t).item()) + 1e-6) ** 0.5 for row, t in zip(rows, now["target"], strict=True)
            ]
        now["logged"] = [sum(value(row).item() for row in rows) / 8, sum(loss.item() for loss in losses) / 8]
        mean = sum((i + 1) / 8 * loss for i, loss in enumerate(losses)) / 8
        weights = list(now["network"].parameters())
        for weight, gradient in zip(weights, torch.autograd.grad(mean, weights), strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-6)
        step(optimizer)

    def watch_update(memory: rainbow.RainbowMemory, places: np.ndarray, loss: torch.Tensor) -> None:
        update(memory, places, loss)
        expected = dict(zip(places.tolist(), now["priority"], strict=True))
        assert memory.tree.levels[0].flat[list(expected)] == pytest.approx(list(expected.values()), rel=1e-3)
        seen.append(places)

    def watch_log(_: rainbow.Run, scalars: dict) -> None:
        if "losses/q_values" in scalars:
            said = [scalars["losses/q_values"].item(), scalars["losses/td_loss"].item()]
            assert said == pytest.approx(now["logged"], rel=1e-3, abs=1e-5)

    def watch_evaluate(_: object, model: dict, *__: object) -> dict:
        network = now["network"].state_dict()
        evaluated.append(all(torch.equal(weight, network[name]) for name, weight in model["q_network"].items()))
        return {}

    monkeypatch.setattr(rainbow.Run, "log", watch_log)
    monkeypatch.setattr(rainbow.Run, "restore", watch_restore)
    monkeypatch.setattr(rainbow.RainbowMemory, "sample", watch_sample)
    monkeypatch.setattr(rainbow, "targets", watch_targets)
    monkeypatch.setattr(rainbow, "evaluate", watch_evaluate)
    monkeypatch.setattr(torch.optim.Adam, "step", watch_step)
    monkeypatch.setattr(rainbow.RainbowMemory, "update", watch_update)
    flags = {"total_timesteps": 48, "learning_starts": 40, "batch_size": 8, "noisy_nets": False, "max_grad_norm": 1e9}
    run = make_run(tmp_path, **flags, distributional=distributional, double_q=double_q, eval_frequency=44)
    rainbow.train(run.args, run)
    run.writer.close()
    assert len(seen) == 3
    assert evaluated == [True]


def test_it_learns_to_catch(tmp_path: Path, play: Callable) -> None:
    """The script's own loop, network, replay and update reach a near-perfect score from screens, all tricks on."""
    play(rainbow, Catch)
    flags = {"total_timesteps": 1000, "learning_starts": 100, "gamma": 0.9, "train_frequency": 2, "batch_size": 16}
    flags |= {"learning_rate": 2e-3, "optimizer_eps": 1e-6, "target_network_frequency": 50, "noisy_sigma": 0.1}
    run = make_run(tmp_path, **flags, checkpoint_frequency=0, eval_episodes=60)
    assert run.finish(rainbow.train(run.args, run))["eval_return_mean"] > 0.9
