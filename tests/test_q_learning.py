"""Tests of q_learning.py against independent oracles; each says what it compares with."""

import math
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from common import message_of, read_events, scalars
from torch import nn

import q_learning as ql


def make_run(tmp_path: Path, env_id: str, steps: int, **flags: object) -> ql.Run:
    flags = {"eval_episodes": 0, "run_name": "it", "device": "cpu"} | flags
    args = ql.Args(runs_dir=tmp_path, env_id=env_id, total_timesteps=steps, **flags)
    return ql.Run(args, ql.check(args))


# --- Features ---------------------------------------------------------------------------------------------------------


def test_observations_are_scaled_between_their_bounds() -> None:
    """A dimension without bounds, or of no width, from -3 to 3; what lies outside, to the bound."""
    space = gym.spaces.Box(np.float32([-1, 0, -np.inf, 2]), np.float32([3, 10, np.inf, 2]))
    z = ql.Scaled(space)(torch.tensor([[-1.0, 5.0, 0.0, 1.5], [3.0, 10.0, 1.5, 0.0], [9.0, -1.0, -7.0, 3.0]]))
    assert z.tolist() == [[-1, 0, 0, 0.5], [1, 1, 0.5, 0], [1, -1, -1, 1]]


def test_raw_features_have_a_constant() -> None:
    assert ql.Raw(2, ql.Args())(torch.tensor([[0.5, -1.0]])).tolist() == [
        pytest.approx([x / math.sqrt(3) for x in (0.5, -1, 1)])
    ]


@pytest.mark.parametrize(("d_obs", "tilings", "tiles"), [(1, 4, 3), (2, 8, 8), (3, 16, 2)])
def test_tile_coding_is_that_of_the_book(d_obs: int, tilings: int, tiles: int) -> None:
    """By plain loops: in tiling i the place in dimension k, in tiles, is shifted by (2 k + 1) i / n, modulo 1."""
    coding, rng = ql.TileCoding(d_obs, ql.Args(tilings=tilings, tiles=tiles)), np.random.default_rng(0)
    z = rng.uniform(-1, 1, (200, d_obs)).astype(np.float32)
    z[:2] = [[-1], [1]]  # the corners
    active = coding.active(torch.from_numpy(z)).numpy()
    tiles_of = {}
    for row, indices in zip(z, active, strict=True):
        for i, index in enumerate(indices):
            place = [
                math.floor((x + 1) / 2 * tiles + (2 * k + 1) * i / tilings % 1) for k, x in enumerate(row.tolist())
            ]
            assert tiles_of.setdefault((i, *place), index) == index
    assert len(set(tiles_of.values())) == len(tiles_of)  # different tiles, different features
    assert 0 <= active.min() <= active.max() < coding.n_features == tilings * (tiles + 1) ** d_obs
    features = coding(torch.from_numpy(z))
    assert ((features > 0).sum(1) == tilings).all()
    torch.testing.assert_close(features.norm(dim=1), torch.ones(200))


def test_cosines_are_radial_basis_functions() -> None:
    """Inner products of features near the mean of Gaussian kernels, exp(-|x - y|^2 / (2 h^2)), of all widths h."""
    torch.manual_seed(0)
    z = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.2, -0.2], [1.0, 1.0]])
    basis = ql.RandomFourier(2, ql.Args(rbf_features=1_000_000))
    products, distance = basis(z) @ basis(z).T, torch.cdist(z, z)
    kernel = sum((-(distance**2) / (2 * h**2)).exp() for h in basis.WIDTHS) / len(basis.WIDTHS)
    torch.testing.assert_close(products, kernel, atol=0.005, rtol=0)  # over four standard deviations


# --- Line 4 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["raw", "tiles", "rbf", "mlp"])
def test_a_step_is_the_listings_line(features: str) -> None:
    """theta - alpha (Q(s, a) - y) grad Q(s, a), the gradient by autograd of Q alone; of a batch, the mean."""
    torch.manual_seed(0)
    env = gym.make("MountainCar-v0")
    q_function = ql.QFunction(ql.Args(features=features), env)
    theta = nn.utils.parameters_to_vector(q_function.parameters()).detach()
    theta += 0.1 * torch.randn(len(theta))
    nn.utils.vector_to_parameters(theta.clone(), q_function.parameters())
    obs, action = torch.tensor([[-0.5, 0.01], [0.3, -0.02], [-1.2, 0.0]]), torch.tensor([2, 0, 2])
    target, change = torch.tensor([-7.0, 3.0, 0.0]), 0
    for s, a, y in zip(obs, action, target, strict=True):
        q = q_function(s[None])[0, a]
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(q, list(q_function.parameters()))])
        change = change + (q.detach() - y) * gradient / 3
    q_value = q_function(obs).gather(1, action[:, None]).squeeze(1)
    loss = ql.td_gradient_step(q_function, q_value, target, 0.3)
    after = nn.utils.parameters_to_vector(q_function.parameters()).detach()
    torch.testing.assert_close(after, theta - 0.3 * change)
    torch.testing.assert_close(loss.detach(), ((q_value - target) ** 2).mean().detach())


@pytest.mark.parametrize("features", ["raw", "tiles", "rbf"])
def test_linear_values_begin_at_0_and_alpha_is_the_part_of_an_error_that_goes(features: str) -> None:
    q_function, obs = ql.QFunction(ql.Args(features=features), gym.make("MountainCar-v0")), torch.tensor([[0.6, 0.07]])
    assert not q_function(obs).any()
    ql.td_gradient_step(q_function, q_function(obs)[:, 1], torch.tensor([-10.0]), 0.25)
    low = {"rbf": -2.5 * 1.3}.get(features, -2.5 * 1.001)  # the length of random cosines is only about 1
    assert low <= q_function(obs)[0, 1] <= -2.5 * (0.7 if features == "rbf" else 0.999)


# --- The loop ---------------------------------------------------------------------------------------------------------


class Corridor(gym.Env):
    """Places 0 to 4; action 1 goes up, 0 down. The end at 4 is terminal; each step costs 1. It gives one array again
    and again."""

    metadata = {"render_modes": []}  # noqa: RUF012
    observation_space, action_space = gym.spaces.Box(0, 4, (1,)), gym.spaces.Discrete(2)
    starts: ClassVar = []

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.place = int(self.np_random.integers(4))
        self.starts.append(self.place)
        self.obs = np.float32([self.place])
        return self.obs, {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.obs[0] = self.place = max(0, self.place + 2 * action - 1)
        return self.obs, -1.0, self.place == 4, False, {}


class Noisy(Corridor):
    """Draws its rewards from another generator than np_random."""

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, _, *rest = super().step(action)
        return obs, np.random.default_rng().random(), *rest


class Elsewhere(Corridor):
    """Draws where it goes to from another generator."""

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.random.default_rng().random(1), *super().step(action)[1:]


class From1(Corridor):
    """Has actions 1 and 2."""

    action_space = gym.spaces.Discrete(2, start=1)


gym.register("Corridor-v0", "test_q_learning:Corridor", max_episode_steps=3)
gym.register("Noisy-v0", "test_q_learning:Noisy", max_episode_steps=3)
gym.register("Elsewhere-v0", "test_q_learning:Elsewhere", max_episode_steps=3)
gym.register("From1-v0", "test_q_learning:From1")


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("target_network", [False, True])
def test_a_training_by_hand(target_network: bool, replay: bool, tmp_path: Path) -> None:
    """150 steps of the listing in numpy, on features (z, 1) / sqrt 2: episodes end at 4, or are cut after 3 steps."""
    flags = {"features": "raw", "learning_rate": 0.2, "gamma": 0.9, "start_e": 1.0, "end_e": 0.1, "seed": 5}
    flags |= {"target_network": target_network, "target_network_frequency": 7, "exploration_fraction": 0.5}
    flags |= {"replay": replay, "buffer_size": 9, "batch_size": 4}
    run = make_run(tmp_path, "Corridor-v0", 150, **flags)
    model = ql.train(run.args, run)

    rng, env, ends, past = np.random.default_rng(5), gym.make("Corridor-v0"), [], []
    env.reset(seed=int(rng.integers(2**31)))
    (place,), _ = env.reset()
    w = older = np.zeros((2, 2))
    for step in range(1, 151):
        epsilon = 0.1 if step >= 75 else 1 - 0.9 * step / 75
        x = np.array([place / 2 - 1, 1]) / np.sqrt(2)
        action = int(rng.integers(2)) if rng.random() < epsilon else int((w @ x).argmax())
        (after,), reward, terminated, truncated, _ = env.step(action)
        past.append((x, action, reward, terminated, np.array([after / 2 - 1, 1]) / np.sqrt(2)))
        change = np.zeros((2, 2))
        batch = rng.integers(max(0, step - 9), step, 4) if replay else rng.integers(step - 1, step, 1)
        for x, a, r, terminal, x_next in (past[i] for i in batch):
            y = r if terminal else r + 0.9 * ((older if target_network else w) @ x_next).max()
            change[a] += (w[a] @ x - y) * x / len(batch)
        w = w - 0.2 * change
        older = w if step % 7 == 0 else older
        place = env.reset()[0][0] if terminated or truncated else after
        ends.append((terminated, truncated))
    assert (True, False) in ends
    assert (False, True) in ends
    torch.testing.assert_close(
        model["q_function"].layers[-1].weight.detach().numpy(), w.astype(np.float32), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("flags", [{"features": "tiles"}, {"features": "mlp", "replay": True, "batch_size": 16}])
def test_it_learns_to_leave_the_corridor(flags: dict, tmp_path: Path) -> None:
    """Values of the greedy policy: minus the number of steps to the end, though episodes are cut before it."""
    flags |= {"learning_rate": 0.05 if flags["features"] == "mlp" else 0.3, "hidden_sizes": (16, 16)}
    run = make_run(tmp_path, "Corridor-v0", 3_000, start_e=0.5, end_e=0.5, **flags)
    q_function = ql.train(run.args, run)["q_function"]
    values = q_function(torch.tensor([[0.0], [1.0], [2.0], [3.0]])).amax(dim=1).detach()
    torch.testing.assert_close(values, torch.tensor([-4.0, -3.0, -2.0, -1.0]), atol=0.3, rtol=0)


def test_an_evaluation_plays_greedily_and_sums_the_rewards() -> None:
    """By weights with which it always goes up, minus the steps to the end or to the cut after 3; always down, -3."""
    args = ql.Args(env_id="Corridor-v0", features="raw", eval_episodes=20)
    state = ql.QFunction(args, gym.make("Corridor-v0")).state_dict()
    for weights, always_up in (([[0.0, 0.0], [0.0, 1.0]], True), ([[0.0, 1.0], [0.0, 0.0]], False)):
        state["layers.2.weight"] = torch.tensor(weights)
        figures = ql.evaluate(args, {"q_function": state}, torch.device("cpu"), None)
        returns = [max(place - 4, -3) if always_up else -3 for place in Corridor.starts[-20:]]
        assert figures["eval_return_mean"] == pytest.approx(np.mean(returns))
        assert figures["eval_return_std"] == pytest.approx(np.std(returns))


def test_a_surface_is_drawn_of_two_dimensions(tmp_path: Path) -> None:
    run = make_run(tmp_path, "MountainCar-v0", 600, max_episode_steps=1000)
    ql.train(run.args, run)
    run.writer.close()
    assert [event.step for event in read_events(run.dir).Images("cost_to_go")] == [256, 512, 600]
    assert run.progress["episodes"] == {0: (-600.0, 600)}  # not the environment's limit of 200


def test_the_surface_is_minus_the_best_value() -> None:
    """With linear values, of known slopes and the larger of two: the corners and the middle of Mountain Car's plane."""
    q_function = ql.QFunction(ql.Args(features="raw"), gym.make("MountainCar-v0"))
    q_function.layers[-1].weight.data = torch.tensor([[1.0, 4.0, 10.0], [-1.0, -4.0, 2.0], [-1.0, -4.0, 2.0]])
    (mesh, *_), bounds = (axes := ql.surface(q_function).axes[0]).collections, ((-1.2, 0.6), (-0.07, 0.07))
    cost = mesh.get_array() * math.sqrt(3)  # rows of one velocity, from the lowest up
    assert [cost[0, 0], cost[0, -1], cost[-1, 0], cost[-1, -1]] == pytest.approx([-7, -7, -13, -15], abs=1e-4)
    assert [axes.get_xlim(), axes.get_ylim()] == [pytest.approx(bound, rel=0.05) for bound in bounds]


def test_the_network_is_its_formula() -> None:
    """Of observations between their bounds, from -1 to 1."""
    torch.manual_seed(0)
    q_function = ql.QFunction(ql.Args(features="mlp", hidden_sizes=(3, 5)), gym.make("MountainCar-v0"))
    w1, b1, w2, b2, w3, b3 = q_function.parameters()
    assert [tuple(w.shape) for w in (w1, w2, w3)] == [(3, 2), (5, 3), (3, 5)]
    z = 2 * torch.rand(20, 2) - 1
    obs = z * torch.tensor([0.9, 0.07]) + torch.tensor([-0.3, 0.0])
    expected = ((z @ w1.T + b1).clamp(0) @ w2.T + b2).clamp(0) @ w3.T + b3
    torch.testing.assert_close(q_function(obs), expected, rtol=1e-4, atol=1e-5)


# --- Baird's star -----------------------------------------------------------------------------------------------------


def test_bairds_star_diverges_as_computed(tmp_path: Path) -> None:
    """Sweeps of plain sums; and the figures that two other programs gave: w_8 = 335.00, values of 581.4."""
    run = make_run(tmp_path, "Baird-v0", 1_000, gamma=0.99, learning_rate=0.01, eval_frequency=500)
    weights = ql.train(run.args, run)["value"].weight.detach().numpy()[0]
    w = [1.0] * 6 + [10.0, 1.0]
    for _ in range(1_000):
        v7, change = w[6] + 2 * w[7], [0.0] * 8
        for s in range(6):
            error = 0.99 * v7 - (2 * w[s] + w[7])
            change[s] += 2 * error / 7
            change[7] += error / 7
        error = 0.99 * v7 - v7
        change[6] += error / 7
        change[7] += 2 * error / 7
        w = [old + 0.01 * step for old, step in zip(w, change, strict=True)]
    np.testing.assert_allclose(weights, w)
    assert weights[7] == pytest.approx(335.00, abs=0.01)
    assert scalars(run.dir, "losses/value_rms")[-1] == (1_000, pytest.approx(581.4, abs=0.05))
    assert scalars(run.dir, "eval/value_rms") == [(500, scalars(run.dir, "losses/value_rms")[4][1])]


def test_bairds_star_with_a_target_network(tmp_path: Path) -> None:
    """By numpy, with a copy every 300 sweeps."""
    flags = {"gamma": 0.99, "learning_rate": 0.01, "target_network": True, "target_network_frequency": 300}
    run = make_run(tmp_path, "Baird-v0", 1_000, **flags)
    weights = ql.train(run.args, run)["value"].weight.detach().numpy()[0]
    features = np.hstack([2 * np.eye(7), np.ones((7, 1))])
    features[6] = [0, 0, 0, 0, 0, 0, 1, 2]
    w = older = np.array([1.0] * 6 + [10.0, 1.0])
    for sweep in range(1, 1_001):
        w = w - 0.01 / 7 * (features @ w - 0.99 * features[6] @ older) @ features
        older = w if sweep % 300 == 0 else older
    np.testing.assert_allclose(weights, w)


@pytest.mark.parametrize("env_id", ["Corridor-v0", "Noisy-v0", "Elsewhere-v0"])
def test_an_environment_that_does_not_repeat_is_not_resumed(env_id: str, capsys: pytest.CaptureFixture) -> None:
    """Its rewards, or its observations; one that does repeat is."""
    env, restored = (ql.make_discrete_env(ql.Args(env_id=env_id)) for _ in range(2))
    env.reset(seed=1)
    env.step(0)
    if env_id == "Corridor-v0":
        return restored.load_state_dict(env.state_dict())
    with pytest.raises(SystemExit, match="2"):
        restored.load_state_dict(env.state_dict())
    assert f"--resume: {env_id} does not play an episode again as it was" in capsys.readouterr().err


# --- Bad input --------------------------------------------------------------------------------------------------------


BAD = [
    ("--env-id Pendulum-v1", "needs vectors (Box) of observations and Discrete actions from 0"),
    ("--env-id FrozenLake-v1", "needs vectors (Box) of observations and Discrete actions from 0"),
    ("--env-id ale_py:ALE/Pong-v5", "needs vectors (Box) of observations and Discrete actions from 0"),
    ("--env-id ALE/Pong-v5", "for Atari take a script whose name ends in _atari"),
    ("--env-id MountainCar-v9", "--env-id MountainCar-v9: "),
    ("--env-id nowhere:Car-v0", "(PYTHONPATH names a module's folder)"),
    ("--env-id test_q_learning:Xqzwvk-v0", "Environment `Xqzwvk` doesn't exist.\n"),  # the module does
    ("--env-id test_q_learning:From1-v0", "needs vectors (Box) of observations and Discrete actions from 0"),
    ("--env-id Acrobot-v1", "--tilings 8 --tiles 8: make 4,251,528 features"),
    ("--tilings 6", "--tilings 6: must be a power of 2"),
    ("--env-id Baird-v0 --replay", "has no --max-episode-steps, --replay or --capture-video"),
]


class Faulty(gym.Env):
    """Gives a reward that is no number, or an observation; by the name that it is registered under."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.full(2, np.nan if "Start" in self.spec.id else 0.0), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        return (
            np.full(1 if "Shape" in self.spec.id else 2, np.nan if "Obs" in self.spec.id else 0.0),
            {"R": np.nan, "L": 1e39}.get(self.spec.id[6], 0.0),
            False,
            False,
            {},
        )


@pytest.mark.parametrize("what", ["Start", "Obs", "Reward", "Large", "Shape"])
def test_an_environment_that_gives_no_number_is_named(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    gym.register(f"Faulty{what}-v0", Faulty, max_episode_steps=10)
    flags = ["--env-id", f"Faulty{what}-v0", "--total-timesteps", "100"]
    message = message_of(ql, flags, capsys, monkeypatch)
    assert f"--env-id Faulty{what}-v0: gave observation [" in message
    assert ("nan" in message) == (what not in ("Large", "Shape"))
    assert "learning-rate" not in message


@pytest.mark.parametrize(("flags", "expected"), BAD)
def test_bad_input(
    flags: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in message_of(ql, flags.split(), capsys, monkeypatch)
    assert not list(tmp_path.iterdir())
