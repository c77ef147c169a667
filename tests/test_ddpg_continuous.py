"""Tests of ddpg_continuous.py against independent oracles; each says what it compares with."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from common import message_of, run
from hypothesis import given, settings
from hypothesis import strategies as st

import ddpg_continuous as ddpg

CPU = torch.device("cpu")
SMALL = ddpg.Args(hidden_sizes=(16, 16))


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Fills with the steps that a training stores: obs, action, reward, terminated, truncated, next_obs."""
    rows, append = [], ddpg.ReplayMemory.append
    monkeypatch.setattr(ddpg.ReplayMemory, "append", lambda memory, *row: rows.append(row) or append(memory, *row))
    return rows


# --- The theorem ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalisation", ["none", "layer"])
def test_actor_loss_leaves_the_deterministic_policy_gradient(normalisation: str) -> None:
    """Silver et al. 2014: mean of J^T g, J = grad_theta pi(s) by torch.func, g = grad_a Q(s, a) at a = pi(s)."""
    torch.manual_seed(0)
    args = ddpg.Args(hidden_sizes=(16, 16), normalisation=normalisation)
    actor, critic = ddpg.Actor(args, 5, 3).double(), ddpg.Critic(args, 5, 3).double()
    obs = torch.randn(8, 5, dtype=torch.float64)
    ddpg.actor_loss(actor, critic, obs).backward()

    theta = {name: weight.detach() for name, weight in actor.named_parameters()}
    gradient = {name: torch.zeros_like(weight) for name, weight in theta.items()}
    for s in obs:

        def policy(theta: dict[str, torch.Tensor], s: torch.Tensor = s) -> torch.Tensor:
            return torch.func.functional_call(actor, theta, (s[None],))[0]

        jacobian = torch.func.jacrev(policy)(theta)  # for each tensor of theta: (d_action, *its shape)
        action = policy(theta).requires_grad_()
        (g,) = torch.autograd.grad(critic(s[None], action[None]).sum(), action)
        for name in theta:
            gradient[name] += torch.tensordot(g, jacobian[name], dims=1) / len(obs)
    for name, parameter in actor.named_parameters():
        torch.testing.assert_close(-parameter.grad, gradient[name])


def test_the_theorem_on_a_linear_quadratic_problem() -> None:
    """With the true Q of the policy, the mean of J^T g over its discounted states is the derivative of the return.

    s' = 0.9 s + 0.5 a, r = -(s^2 + 0.1 a^2), pi(s) = k s. Under pi, s_t = c^t s_0, c = 0.9 + 0.5 k, so the return is
    -(1 + 0.1 k^2) s_0^2 / (1 - gamma c^2), and Q(s, a) = -(s^2 + 0.1 a^2) + gamma V(0.9 s + 0.5 a).
    """
    gamma, k = 0.95, -0.4
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def value(k: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return -(1 + 0.1 * k**2) * s**2 / (1 - gamma * (0.9 + 0.5 * k) ** 2)

    gain = torch.tensor(k, dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(value(gain, start).sum(), gain)

    class Policy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(k, dtype=torch.float64))

        def forward(self, s: torch.Tensor) -> torch.Tensor:
            return self.gain * s

    def true_q(s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return -(s**2 + 0.1 * a**2) + gamma * value(torch.tensor(k, dtype=torch.float64), 0.9 * s + 0.5 * a)

    gradient, s, discount = 0.0, start, 1.0
    for _ in range(400):
        policy = Policy()
        ddpg.actor_loss(policy, true_q, s).backward()
        gradient += -policy.gain.grad * len(s) * discount
        s, discount = (0.9 + 0.5 * k) * s, discount * gamma
    torch.testing.assert_close(gradient, derivative)


# --- The update -------------------------------------------------------------------------------------------------------


def test_targets_equal_hand_calculation() -> None:
    """One step, a terminal state, and two steps, with gamma = 0.5."""
    n_step_return, discount = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([0.5, 0.0, 0.25])
    assert ddpg.td_targets(n_step_return, discount, torch.tensor([2.0, 9.0, -4.0])).tolist() == [2.0, -1.0, -0.5]


def test_soft_update() -> None:
    targets, parameters = [torch.tensor([0.0, 1.0])], [torch.tensor([1.0, 3.0])]
    ddpg.soft_update(targets, parameters, 0.25)
    assert targets[0].tolist() == [0.25, 1.5]
    assert parameters[0].tolist() == [1.0, 3.0]


@pytest.mark.parametrize(("normalisation", "action_layer"), [("none", 1), ("none", 2), ("layer", 1), ("layer", 2)])
def test_networks_equal_the_formula(normalisation: str, action_layer: int) -> None:
    torch.manual_seed(0)
    args = ddpg.Args(hidden_sizes=(7, 6), normalisation=normalisation, action_layer=action_layer, final_init=3e-3)
    actor, critic = ddpg.Actor(args, 4, 2), ddpg.Critic(args, 4, 2)
    obs, action = torch.randn(5, 4), torch.rand(5, 2)

    def normalised(x: torch.Tensor) -> torch.Tensor:
        if normalisation == "none":
            return x
        return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + args.layer_norm_eps).sqrt()

    w1, b1, w2, b2, w3, b3 = [*actor.hidden.parameters(), *actor.last.parameters()]
    first = normalised(obs @ w1.T + b1).clamp(0)
    expected = torch.tanh(normalised(first @ w2.T + b2).clamp(0) @ w3.T + b3)
    torch.testing.assert_close(actor(obs), expected)
    assert w3.abs().max() <= 3e-3
    w1, b1, w2, b2, w3, b3 = [*critic.hidden.parameters(), *critic.last.parameters()]
    first = normalised((torch.cat([obs, action], 1) if action_layer == 1 else obs) @ w1.T + b1).clamp(0)
    second = normalised((first if action_layer == 1 else torch.cat([first, action], 1)) @ w2.T + b2).clamp(0)
    torch.testing.assert_close(critic(obs, action), (second @ w3.T + b3)[:, 0])


@pytest.mark.parametrize(("noise", "deviation", "kept"), [("gaussian", 0.2, 0.0), ("ornstein-uhlenbeck", 0.3797, 0.85)])
def test_noise_has_its_stationary_moments(noise: str, deviation: float, kept: float) -> None:
    """Mean 0; standard deviation sigma, or sigma / sqrt(1 - 0.85^2); correlation from one step to the next."""
    args, rng = ddpg.Args(noise=noise, exploration_noise=0.2), np.random.default_rng(0)
    values = [np.zeros(1000)]
    for _ in range(300):
        values.append(ddpg.exploration_noise(values[-1], args, rng))
    last = np.array(values[100:])
    assert abs(last.mean()) < 0.01
    assert last.std() == pytest.approx(deviation, rel=0.02)
    assert np.corrcoef(last[:-1].ravel(), last[1:].ravel())[0, 1] == pytest.approx(kept, abs=0.02)


# --- Replay memory ----------------------------------------------------------------------------------------------------


def make_memory(capacity: int, spare: int, n_step: int, path: Path | None = None) -> ddpg.ReplayMemory:
    return ddpg.ReplayMemory(capacity, spare, 3, 2, n_step, 0.5, np.random.default_rng(0), CPU, path)


def make_step(t: int, end: str) -> tuple:
    """Numbers that float32 holds exactly, also summed and halved."""
    return np.full(3, t), np.full(2, t + 0.5), t - 0.25, end == "terminated", end == "truncated", np.full(3, t + 1)


def naive_rows(steps: list[tuple], n_step: int) -> list[tuple]:
    """The transitions of n steps, or as many as there are, each from the whole list of steps, with gamma = 0.5."""
    rows = []
    for start, (obs, action, *_) in enumerate(steps):
        n_step_return, discount = 0.0, 1.0
        for _, _, reward, terminated, truncated, next_obs in steps[start : start + n_step]:
            n_step_return += discount * reward
            discount *= 0.0 if terminated else 0.5
            last_obs = next_obs
            if terminated or truncated:
                break
        rows.append((obs, action, n_step_return, discount, last_obs))
    return rows


def in_bytes(row: tuple) -> tuple[bytes, ...]:
    return tuple(np.float32(part).tobytes() for part in row)


def drawn(memory: ddpg.ReplayMemory) -> set[tuple[bytes, ...]]:
    return {in_bytes(row) for _ in range(5) for row in zip(*memory.sample(200), strict=True)}


ENDS = st.lists(st.sampled_from(["", "", "", "", "terminated", "truncated"]), min_size=1, max_size=90)


@settings(max_examples=100, deadline=None)
@given(capacity=st.integers(5, 30), spare=st.integers(0, 8), n_step=st.integers(1, 5), ends=ENDS)
def test_replay_equals_naive_memory(capacity: int, spare: int, n_step: int, ends: list[str]) -> None:
    """Every one of the last transitions is drawn, and none other."""
    memory = make_memory(capacity, spare, n_step)
    steps = [make_step(t, end) for t, end in enumerate(ends)]
    for step in steps:
        memory.append(*step)
    assert drawn(memory) == {in_bytes(row) for row in naive_rows(steps, n_step)[-capacity:]}


def test_two_steps_by_hand() -> None:
    """Rewards 1, 2, 4 and gamma 0.5, ended by the time limit: 1 + 2/2, 2 + 4/2, and 4 with one step only."""
    memory = make_memory(10, 0, n_step=2)
    for t, reward in enumerate((1.0, 2.0, 4.0)):
        memory.append(np.full(3, t), np.zeros(2), reward, False, t == 2, np.full(3, t + 1))
    assert memory.rows[:3, 5:9].tolist() == [[2, 0.25, 2, 2], [4, 0.25, 3, 3], [4, 0.5, 3, 3]]


@pytest.mark.parametrize("n_step", [1, 3])
def test_a_checkpoint_outlives_what_comes_in_the_spare_places(n_step: int, tmp_path: Path) -> None:
    """Its rows are unchanged, also those that later rewards were added to; from there it goes on as if nothing came."""
    capacity, spare = 10, 4
    memory = make_memory(capacity, spare, n_step, tmp_path / "rows")
    steps = [make_step(t, "terminated" * (t % 7 == 0)) for t in range(25 + spare)]
    for t, step in enumerate(steps):
        if t == 25:
            state = copy.deepcopy(memory.state_dict())
        memory.append(*step)
    restored = make_memory(capacity, spare, n_step, tmp_path / "rows")
    restored.load_state_dict(state)
    assert drawn(restored) == {in_bytes(row) for row in naive_rows(steps[:25], n_step)[-capacity:]}
    for step in steps[25:]:
        restored.append(*step)
    assert drawn(restored) == {in_bytes(row) for row in naive_rows(steps, n_step)[-capacity:]}


# --- Environment ------------------------------------------------------------------------------------------------------


class Bounds(gym.Env):
    """Asymmetric bounds that differ by dimension; tells the action that it got; ends by its time limit only."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(np.array([-1.0, 0.0]), np.array([3.0, 10.0]), dtype=np.float64)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.np_random.standard_normal(2), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        Bounds.taken = action
        return np.asarray(action), 0.0, False, False, {}


class Broken(Bounds):
    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.array([0.0, np.nan]), 0.0, False, False, {}


class Ending(Bounds):
    """Ends in a terminal state at every third step."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.t = 0
        return super().reset(seed=seed)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        return np.asarray(action), float(action[0]), self.t == 3, False, {}


class Images(Bounds):
    observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)


class Dictionaries(Bounds):
    observation_space = gym.spaces.Dict({"position": gym.spaces.Box(-1, 1, (2,))})


class Unbounded(Bounds):
    action_space = gym.spaces.Box(-np.inf, np.inf, (2,))


class Integers(Bounds):
    action_space = gym.spaces.Box(-3, 3, (2,), np.int64)


class Undrawn(Bounds):
    def __init__(self, render_mode: str | None = None):
        if render_mode:
            raise RuntimeError("no screen")


class Endless(Bounds):
    """Without a time limit."""


class Shaken(Bounds):
    """Draws noise of its own, as actuators have."""

    noise: ClassVar[list[np.ndarray]] = []

    def step(self, action: np.ndarray) -> tuple:
        self.noise.append(self.np_random.uniform(-1, 1, 2))
        return super().step(action)


for cls in (Bounds, Broken, Ending, Images, Dictionaries, Unbounded, Integers, Undrawn, Endless, Shaken):
    gym.register(f"{cls.__name__}-v0", cls, max_episode_steps=None if cls is Endless else 50)


def test_actions_reach_their_bounds_and_no_further() -> None:
    env = ddpg.make_env(ddpg.Args(env_id="Bounds-v0"))
    env.reset(seed=1)
    for action, expected in [((-1, -1), (-1, 0)), ((1, 1), (3, 10)), ((0, -0.5), (1, 2.5))]:
        obs, *_ = env.step(np.array(action, np.float32))
        assert obs.dtype == np.float32
        np.testing.assert_allclose(obs, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_never_leave_the_space(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do rounding errors: bounds at random, and of no width."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        low = rng.uniform(-5, 5, 2).round(2)
        high = low + rng.uniform(0, 5, 2).round(2) * [1, 0]
        monkeypatch.setattr(Bounds, "action_space", gym.spaces.Box(low.astype(dtype), high.astype(dtype), dtype=dtype))
        env = ddpg.make_env(ddpg.Args(env_id="Bounds-v0"))
        env.reset(seed=1)
        for action in (-1, 1, rng.uniform(-1, 1)):
            env.step(np.full(2, action, np.float32))
            assert Bounds.action_space.contains(Bounds.taken)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "HalfCheetah-v5", "Hopper-v5", "Bounds-v0"])
def test_environment_goes_on_as_if_never_stopped(env_id: str) -> None:
    args = ddpg.Args(env_id=env_id)
    env, restored = ddpg.make_env(args), ddpg.make_env(args)
    rng = np.random.default_rng(0)
    env.reset(seed=1)
    restored.reset(seed=2)

    def step(env: gym.Env, action: np.ndarray) -> tuple:
        obs, reward, terminated, truncated, _ = env.step(action)
        over = terminated or truncated
        return obs.tolist(), reward, over, env.reset()[0].tolist() if over else None

    for _ in range(8):
        for _ in range(rng.integers(1, 120)):
            step(env, rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        state = pickle.loads(pickle.dumps(env.get_state()))
        assert restored.set_state(state).shape == env.observation_space.shape
        for _ in range(60):
            action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            assert step(env, action) == step(restored, action)


@pytest.mark.parametrize(("env_id", "expected"), [("Bounds-v0", [0] * 120), ("Ending-v0", [0, 0, 1] * 40)])
def test_only_a_terminal_state_stops_the_bootstrap(
    env_id: str, expected: list[int], tmp_path: Path, stored: list[tuple]
) -> None:
    """What the loop tells the memory at a time limit (every 50 steps), and at a terminal state (every third step).

    The steps of an episode that such a limit ends must not be joined to those of the next one.
    """
    args = ddpg.Args(env_id=env_id, runs_dir=tmp_path, run_name="ends", total_timesteps=120, learning_starts=120)
    args.checkpoint_frequency = args.eval_frequency = args.eval_episodes = 0
    ddpg.train(args)
    assert [terminated for _, _, _, terminated, _, _ in stored] == expected
    limits = [step for step, (*_, truncated, _) in enumerate(stored, start=1) if truncated]
    assert limits == ([50, 100] if env_id == "Bounds-v0" else [])


# --- The loop ---------------------------------------------------------------------------------------------------------


def test_four_updates_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights after four updates of the critic and two of the actor, from the same minibatches with an Adam by hand."""
    batches = []
    sample = ddpg.ReplayMemory.sample
    monkeypatch.setattr(ddpg.ReplayMemory, "sample", lambda *args: batches.append(sample(*args)) or batches[-1])
    args = ddpg.Args(env_id="Ending-v0", runs_dir=tmp_path, run_name="four", total_timesteps=67, learning_starts=64)
    args = dataclasses.replace(args, hidden_sizes=(8, 8), batch_size=64, gamma=0.9, tau=0.2, policy_frequency=2)
    args.learning_rate, args.actor_learning_rate, args.weight_decay, args.eval_episodes = 1e-2, 3e-3, 0.1, 0
    args.n_step = 2
    ddpg.train(args)
    learned = torch.load(tmp_path / "four" / "checkpoint.pt", weights_only=True)

    torch.manual_seed(args.seed)
    actor, critic = ddpg.Actor(args, 2, 2), ddpg.Critic(args, 2, 2)
    target_actor, target_critic = copy.deepcopy(actor), copy.deepcopy(critic)
    moments = {network: [[0.0, 0.0] for _ in network.parameters()] for network in (actor, critic)}

    def adam(network: torch.nn.Module, loss: torch.Tensor, count: int, rate: float, decay: float) -> None:
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for w, gradient, m in zip(network.parameters(), gradients, moments[network], strict=True):
                g = gradient + decay * w
                m[0], m[1] = 0.9 * m[0] + 0.1 * g, 0.999 * m[1] + 0.001 * g**2
                w -= rate * (m[0] / (1 - 0.9**count)) / ((m[1] / (1 - 0.999**count)).sqrt() + 1e-8)

    assert len(batches) == 4
    for count, (obs, action, two_rewards, discount, next_obs) in enumerate(batches, start=1):
        kinds = {round(kind, 4) for kind in discount.tolist()}
        assert {0.0, 0.81} <= kinds <= {0.0, 0.81, 0.9}  # terminal, two steps, and the newest, which is of one
        with torch.no_grad():
            y = target_critic(next_obs, target_actor(next_obs))
            y = two_rewards + discount * y
        adam(critic, ((y - critic(obs, action)) ** 2).sum() / 64, count, 1e-2, 0.1)
        if count in (1, 3):  # steps 64 and 66
            adam(actor, -critic(obs, actor(obs)).sum() / 64, (count + 1) // 2, 3e-3, 0.0)
            with torch.no_grad():
                for target, network in ((target_actor, actor), (target_critic, critic)):
                    for old, new in zip(target.parameters(), network.parameters(), strict=True):
                        old.copy_(0.8 * old + 0.2 * new)
    networks = {"actor": actor, "critic": critic, "target_actor": target_actor, "target_critic": target_critic}
    for name, network in networks.items():
        for key, weight in network.state_dict().items():
            torch.testing.assert_close(learned[name][key], weight, rtol=1e-4, atol=1e-5)


def test_noise_starts_anew_with_each_episode_and_actions_are_clipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: list[tuple]
) -> None:
    previous, noise = [], ddpg.exploration_noise
    monkeypatch.setattr(ddpg, "exploration_noise", lambda last, *rest: previous.append(last) or noise(last, *rest))
    args = ddpg.Args(env_id="Ending-v0", runs_dir=tmp_path, run_name="noisy", total_timesteps=90, learning_starts=32)
    args.noise, args.exploration_noise, args.batch_size, args.hidden_sizes = "ornstein-uhlenbeck", 2.0, 32, (8,)
    args.checkpoint_frequency = args.eval_frequency = args.eval_episodes = 0
    ddpg.train(args)
    for step, last in enumerate(previous, start=33):  # an episode has three steps, 33 ends one
        assert (np.abs(last).max() == 0) == (step in (33,) or step % 3 == 1)
    actions = [action for _, action, *_ in stored]
    assert np.abs(actions).max() == 1
    assert len({tuple(action) for action in actions[32:]}) > 10


def test_exploration_and_environment_draw_different_numbers(tmp_path: Path, stored: list[tuple]) -> None:
    """From one seed; the first actions are uniform, and so is the noise in this environment."""
    args = ddpg.Args(env_id="Shaken-v0", runs_dir=tmp_path, run_name="shaken", total_timesteps=300, learning_starts=300)
    args.checkpoint_frequency = args.eval_frequency = args.eval_episodes = 0
    ddpg.train(args)
    actions = np.array([action for _, action, *_ in stored])
    for dimension in (0, 1):
        correlation = np.corrcoef(actions[:, dimension], np.array(Shaken.noise)[:, dimension])[0, 1]
        assert abs(correlation) < 0.3


def test_evaluation_changes_nothing_in_training(tmp_path: Path) -> None:
    for name, frequency in (("with", 100), ("without", 0)):
        args = ddpg.Args(env_id="Pendulum-v1", runs_dir=tmp_path, run_name=name, total_timesteps=500)
        args.learning_starts, args.hidden_sizes, args.normalisation = 256, (16,), "batch"
        args.eval_frequency, args.eval_episodes = frequency, 1
        ddpg.train(args)
    ours, theirs = (
        torch.load(tmp_path / name / "model.pt", weights_only=True)["actor"] for name in ("with", "without")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_targets_have_the_running_means_of_batch_normalisation(tmp_path: Path) -> None:
    args = ddpg.Args(env_id="Pendulum-v1", runs_dir=tmp_path, run_name="batch", total_timesteps=300)
    args.learning_starts, args.hidden_sizes, args.normalisation, args.eval_episodes = 256, (16,), "batch", 0
    ddpg.train(args)
    learned = torch.load(tmp_path / "batch" / "checkpoint.pt", weights_only=True)
    for network in ("actor", "critic"):
        means = {name for name in learned[network] if "running" in name}
        assert {"input_norm.running_mean", "input_norm.running_var"} <= means
        assert all(torch.equal(learned[network][name], learned[f"target_{network}"][name]) for name in means)
        assert learned[network]["input_norm.running_var"].min() != 1


# --- It learns --------------------------------------------------------------------------------------------------------


def test_it_learns_to_swing_up(tmp_path: Path) -> None:
    """Pendulum-v1: random actions score about -1,200, a pendulum that stands after some swings -150 to -300."""
    args = ddpg.Args(env_id="Pendulum-v1", runs_dir=tmp_path, run_name="swing", total_timesteps=6_000)
    args.learning_starts, args.batch_size, args.learning_rate, args.hidden_sizes = 1_000, 128, 1e-3, (64, 64)
    args.checkpoint_frequency = args.eval_frequency = 0
    ddpg.train(args)
    assert json.loads((tmp_path / "swing" / "result.json").read_text())["eval_return_mean"] > -400


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--env-id HalfCheeta-v5", "did you mean HalfCheetah-v5"),
        ("--env-id CartPole-v1", "needs a vector of continuous actions"),
        ("--env-id Hopper-v3", "--env-id Hopper-v3: "),
        ("--env-id nowhere:Hopper-v5", "--env-id nowhere:Hopper-v5: No module named"),
        ("--env-id Integers-v0", "needs a vector of continuous actions"),
        ("--env-id Endless-v0", "needs a time limit"),
        ("--env-id Undrawn-v0 --capture-video", "Undrawn-v0 cannot be drawn here"),
        ("--normalisation batch --batch-size 1 --learning-starts 1", "--normalisation batch needs 2 or more"),
        ("--env-id Images-v0", "needs a vector of observations"),
        ("--env-id Dictionaries-v0", "needs a vector of observations"),
        ("--env-id Unbounded-v0", "needs bounded actions"),
        ("--tau 1.5", "--tau 1.5: must lie in [0, 1]"),
        ("--policy-frequency 0", "--policy-frequency 0"),
        ("--n-step 0", "--n-step 0: must be greater than 0"),
        ("--n-step 500 --buffer-size 400", "--n-step 500: must not exceed --buffer-size 400"),
        ("--eval-frequency -1", "--eval-frequency -1"),
        ("--exploration-noise -1", "--exploration-noise -1"),
        ("--noise pink", "choose one of gaussian, ornstein-uhlenbeck"),
        ("--normalisation group", "choose one of layer, batch, none"),
        ("--layer-norm-eps 0", "--layer-norm-eps 0.0: must be greater than 0"),
        ("--hidden-sizes 0 1", "--hidden-sizes"),
        ("--action-layer 3", "--action-layer 3"),
        ("--evaluate hopper.pt --env-id HalfCheetah-v5", "was trained on Hopper-v5"),
        ("--evaluate hopper.pt --hidden-sizes 8", "another shape"),
    ],
)
def test_bad_input(
    flags: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    actor = ddpg.Actor(SMALL, 11, 3).state_dict()
    args = {**ddpg.plain(SMALL), "env_id": "Hopper-v5"}
    torch.save({"script": "ddpg_continuous", "kind": "model", "args": args, "actor": actor}, "hopper.pt")
    assert expected in message_of(ddpg, flags.split(), capsys, monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["hopper.pt"]


def test_mujoco_missing_names_what_installs_it(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: object, **__: object) -> None:
        raise gym.error.DependencyNotInstalled('MuJoCo is not installed, run `pip install "gymnasium[mujoco]"`')

    monkeypatch.setattr(ddpg.gym, "make", make)
    assert 'pip install "gymnasium[mujoco]"' in message_of(ddpg, [], capsys, monkeypatch)


def test_the_camera_follows(tmp_path: Path) -> None:
    """A cheetah far from the start is in the picture, its brown as large as at the start."""
    with ddpg.make_env(ddpg.Args(), tmp_path / "videos") as env:
        try:
            env.reset(seed=1)
        except Exception as error:  # every renderer has its own
            pytest.skip(f"MuJoCo cannot draw here: {error}")
        brown = []
        for x in (0.0, 50.0):
            env.unwrapped.set_state(np.array([x, *env.unwrapped.data.qpos[1:]]), env.unwrapped.data.qvel)
            red, green, blue = env.unwrapped.render().astype(int).transpose(2, 0, 1)
            brown.append(np.mean((red > 1.15 * green) & (green > 1.15 * blue)))
    assert 0.01 < brown[0] < 2 * brown[1]


def test_a_model_is_evaluated_without_the_default_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without MuJoCo can evaluate a pendulum."""
    args = ddpg.Args(env_id="Pendulum-v1", hidden_sizes=(8,), layer_norm_eps=3.0)
    content = {"script": "ddpg_continuous", "kind": "model", "args": ddpg.plain(args)}
    actor = ddpg.Actor(args, 3, 1)
    torch.save({**content, "actor": actor.state_dict()}, tmp_path / "model.pt")
    make, made = gym.make, []
    monkeypatch.setattr(ddpg.gym, "make", lambda env_id, **options: made.append(env_id) or make(env_id, **options))
    monkeypatch.setattr("sys.argv", ["ddpg", "--evaluate", str(tmp_path / "model.pt"), "--eval-episodes", "1"])
    ddpg.main()
    assert set(made) == {"Pendulum-v1"}
    args.eval_episodes = 1  # the same network, the same episode
    assert f"Pendulum-v1: mean return {ddpg.evaluate(args, actor)[0]:.1f}," in capsys.readouterr().out


def test_an_environment_that_does_not_repeat_is_not_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", "70", "--learning-starts", "64", "--batch-size", "64"]
    flags = [*flags, "--hidden-sizes", "8", "--eval-episodes", "0", "--run-name", "odd", "--resume"]
    assert run("ddpg_continuous", *flags, cwd=tmp_path).returncode == 0
    (tmp_path / "runs/odd/result.json").unlink()
    checkpoint = torch.load(tmp_path / "runs/odd/checkpoint.pt", weights_only=True)
    with open(tmp_path / "runs/odd/replay.transitions", "wb") as file:
        file.truncate(checkpoint["memory"]["bytes"])
    checkpoint["obs"] += 1
    torch.save(checkpoint, tmp_path / "runs/odd/checkpoint.pt")
    assert "does not play an episode again as it was" in message_of(ddpg, flags, capsys, monkeypatch)


def test_nan_from_the_environment_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "NaN" in message_of(ddpg, ["--env-id", "Broken-v0", "--total-timesteps", "30000"], capsys, monkeypatch)
