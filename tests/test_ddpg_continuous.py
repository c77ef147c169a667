"""Tests of ddpg_continuous.py against independent oracles; each says what it compares with."""

import copy
import io
import itertools
import sys
from ctypes.util import find_library
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from common import ROOT, message_of, run_python, scalars
from gymnasium.wrappers import TransformAction
from hypothesis import given, settings
from hypothesis import strategies as st

import ddpg_continuous as ddpg

CPU = torch.device("cpu")


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Fills with what a training stores: obs, action, reward, terminated, next_obs."""
    rows, append = [], ddpg.ReplayMemory.append
    monkeypatch.setattr(ddpg.ReplayMemory, "append", lambda *row: rows.append(copy.deepcopy(row[1:])) or append(*row))
    return rows


def make_run(tmp_path: Path, env_id: str, steps: int, **flags: object) -> ddpg.Run:
    """Of small networks and no evaluation, all of its actions random; `flags` say what is otherwise."""
    small = {"env_id": env_id, "total_timesteps": steps, "learning_starts": steps, "batch_size": 16}
    small |= {"hidden_sizes": (8, 8), "eval_episodes": 0, "run_name": "it", "device": "cpu"} | flags
    args = ddpg.Args(runs_dir=tmp_path, **small)
    return ddpg.Run(args, ddpg.check(args))


# --- The theorem ------------------------------------------------------------------------------------------------------


def test_actor_loss_leaves_the_deterministic_policy_gradient() -> None:
    """Silver et al. 2014: mean of J^T g, J = grad_theta pi(s) by torch.func, g = grad_a Q(s, a) at a = pi(s)."""
    torch.manual_seed(0)
    actor, critic = ddpg.Actor(5, 3, (16, 16)).double(), ddpg.Critic(5, 3, (16, 16)).double()
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


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_networks_equal_the_formula() -> None:
    torch.manual_seed(0)
    actor, critic = ddpg.Actor(4, 2, (7, 6)), ddpg.Critic(4, 2, (7, 6))
    obs, action = torch.randn(5, 4), torch.rand(5, 2)
    w1, b1, w2, b2, w3, b3 = actor.parameters()
    expected = torch.tanh(((obs @ w1.T + b1).clamp(0) @ w2.T + b2).clamp(0) @ w3.T + b3)
    torch.testing.assert_close(actor(obs), expected)
    np.testing.assert_allclose(actor.act(obs[0].numpy()), expected[0].detach(), rtol=1e-5)
    w1, b1, w2, b2, w3, b3 = critic.parameters()
    hidden = ((torch.cat([obs, action], 1) @ w1.T + b1).clamp(0) @ w2.T + b2).clamp(0)
    torch.testing.assert_close(critic(obs, action), (hidden @ w3.T + b3)[:, 0])


def test_weights_as_a_vector() -> None:
    """Views both ways, also after loading; the gradient too; and three steps of Adam are those of Adam on the parts."""
    torch.manual_seed(0)
    network, theirs, other = (ddpg.Critic(4, 2, (7, 6)) for _ in range(3))
    theirs.load_state_dict(network.state_dict())
    vector = ddpg.as_vector(network)
    flat = torch.nn.utils.parameters_to_vector
    assert vector.shape == (7 * 6 + 7 + 6 * 7 + 6 + 6 + 1,)
    for state in (theirs, other, theirs):
        network.load_state_dict(state.state_dict())
        assert torch.equal(vector, flat(state.parameters()))
    adam = torch.optim.Adam([vector], lr=0.01)
    their_adam = torch.optim.Adam(theirs.parameters(), lr=0.01)
    for _ in range(3):
        obs, action = torch.randn(5, 4), torch.rand(5, 2)
        vector.grad.zero_()
        network(obs, action).square().mean().backward()
        adam.step()
        their_adam.zero_grad()
        theirs(obs, action).square().mean().backward()
        their_adam.step()
        torch.testing.assert_close(vector.grad, flat([weight.grad for weight in theirs.parameters()]))
        for ours, expected in zip(network.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(ours, expected)


# --- Replay memory ----------------------------------------------------------------------------------------------------


def make_memory(capacity: int, rows: np.ndarray) -> ddpg.ReplayMemory:
    return ddpg.ReplayMemory(capacity, rows, 3, np.random.default_rng(0), CPU)


def make_row(t: int) -> tuple:
    """Numbers that float32 holds exactly."""
    return np.full(3, t), np.full(2, t + 0.5), t - 0.25, t % 7 == 0, np.full(3, t + 1)


def in_bytes(row: tuple) -> tuple[bytes, ...]:
    return tuple(np.float32(part).tobytes() for part in row)


def drawn(memory: ddpg.ReplayMemory) -> set[tuple[bytes, ...]]:
    return {in_bytes(row) for _ in range(5) for row in zip(*memory.sample(200), strict=True)}


@settings(max_examples=60, deadline=None)
@given(capacity=st.integers(5, 30), spare=st.integers(0, 8), count=st.integers(1, 90))
def test_replay_equals_naive_memory(capacity: int, spare: int, count: int) -> None:
    """Every one of the last transitions is drawn, and none other."""
    memory = make_memory(capacity, np.zeros((capacity + spare, 10), np.float32))
    rows = [make_row(t) for t in range(count)]
    for row in rows:
        memory.append(*row)
    assert drawn(memory) == {in_bytes(row) for row in rows[-capacity:]}


def test_a_checkpoint_outlives_what_comes_in_the_spare_places(tmp_path: Path) -> None:
    """A memory restored from its file holds what it held, and goes on as if nothing had come."""
    capacity, spare = 10, 4
    run = make_run(tmp_path, "Bounds-v0", 16)

    def map_rows() -> np.ndarray:
        return run.map_file("transitions", np.float32, (capacity + spare, 10))

    memory, rows = make_memory(capacity, map_rows()), [make_row(t) for t in range(25 + spare)]
    for t, row in enumerate(rows):
        if t == 25:
            state = copy.deepcopy(memory.state_dict())
        memory.append(*row)
    restored = make_memory(capacity, map_rows())
    restored.load_state_dict(state)
    assert drawn(restored) == {in_bytes(row) for row in rows[25 - capacity : 25]}
    for row in rows[25:]:
        restored.append(*row)
    assert drawn(restored) == {in_bytes(row) for row in rows[-capacity:]}


# --- Environment ------------------------------------------------------------------------------------------------------


class Bounds(gym.Env):
    """Asymmetric bounds that differ by dimension; tells the action that it got; ends by its time limit only."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(np.array([-1.0, 0.0]), np.array([3.0, 10.0]), dtype=np.float64)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.standard_normal(2), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        Bounds.taken = action
        self.t += 1
        return np.asarray(action), 0.0, False, False, {}


class Broken(Bounds):
    """Gives what is no observation or no reward; by the name that it is registered under."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        obs, info = super().reset(seed=seed)
        what = self.spec.id
        if "OldGym" in what:
            return np.zeros(2)  # two numbers, as (observation, info) are two
        return (np.array([0.0, np.nan]) if "Start" in what else obs), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, object, bool, bool, dict]:
        obs = {"Broken-v0": [0.0, np.nan], "BrokenShape-v0": [0.0]}.get(self.spec.id, [0.0, 0.0])
        reward = {"BrokenReward-v0": np.nan, "BrokenRewards-v0": np.ones(2)}.get(self.spec.id, 0.0)
        obs, reward = {"BrokenLarge-v0": ([0.0, 1e39], 0.0), "BrokenSum-v0": (obs, -1e39)}.get(
            self.spec.id, (obs, reward)
        )
        return np.array(obs), reward, False, False, {}


class Ending(Bounds):
    """Ends in a terminal state at every third step; its observations are one array, changed in place."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    obs = np.zeros(2, np.float32)

    def reset(self, **options: object) -> tuple[np.ndarray, dict]:
        self.obs[:], info = super().reset(**options)
        return self.obs, info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.obs[:], *_ = super().step(action)
        return self.obs, float(action[0]), self.t == 3, False, {}


class OwnLimit(Bounds):
    """Truncates itself; registered without a limit."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, *_ = super().step(action)
        return obs, 1.0, False, self.t == 7, {}


class Lists(OwnLimit):
    """Observations as lists, rewards of shape (1,), ends as NumPy's."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[list, dict]:
        obs, info = super().reset(seed=seed, options=options)
        return obs.tolist(), info

    def step(self, action: np.ndarray) -> tuple[list, np.ndarray, np.bool_, np.bool_, dict]:
        obs, _, terminated, truncated, _ = super().step(action)
        return obs.tolist(), np.array([2.5]), np.bool_(terminated), np.bool_(truncated), {}


class Images(Bounds):
    observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)


class Dictionaries(Bounds):
    observation_space = gym.spaces.Dict({"position": gym.spaces.Box(-1, 1, (2,))})


class Integers(Bounds):
    action_space = gym.spaces.Box(-3, 3, (2,), np.int64)


class HalfInfinite(Bounds):
    action_space = gym.spaces.Box(np.zeros(2, np.float32), np.array([np.inf, 1], np.float32))


class Huge(Bounds):
    action_space = gym.spaces.Box(np.finfo(np.float32).min, np.finfo(np.float32).max, (2,), np.float32)


class Shaken(Bounds):
    """Draws noise of its own, as actuators have."""

    noise: ClassVar[list[np.ndarray]] = []

    def step(self, action: np.ndarray) -> tuple:
        self.noise.append(self.np_random.uniform(-1, 1, 2))
        return super().step(action)


class Curriculum(Bounds):
    """A state that lives longer than an episode: rewards grow with every one."""

    episodes = 0

    def reset(self, **options: object) -> tuple[np.ndarray, dict]:
        self.episodes += 1
        return super().reset(**options)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, *rest = super().step(action)
        return obs, float(self.episodes), *rest[1:]


class OwnRandom(Bounds):
    """Draws from another generator than np_random."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.random.default_rng().standard_normal(2), *super().step(action)[1:]


class Alone(Bounds):
    """Only one can exist at a time, as a simulator on a port."""

    made = opened = 0

    def __init__(self):
        assert Alone.opened == 0
        Alone.opened, Alone.made = 1, Alone.made + 1

    def close(self) -> None:
        Alone.opened = 0


for cls in [Bounds, *Bounds.__subclasses__(), Lists]:
    gym.register(f"{cls.__name__}-v0", cls, max_episode_steps=None if issubclass(cls, OwnLimit) else 50)
for name in ("Reward", "Rewards", "Start", "Shape", "OldGym", "Large", "Sum"):
    gym.register(f"Broken{name}-v0", Broken, max_episode_steps=50)
gym.register(
    "Transformed-v0",
    lambda: TransformAction(HalfInfinite(), lambda action: action + 1, gym.spaces.Box(-1, 1, (2,))),
    max_episode_steps=50,
)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_reach_their_bounds_and_never_leave_the_space(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asymmetric ones by dimension; then at random, of no width too, where rounding errors must not."""
    env = ddpg.make_env(ddpg.Args(env_id="Bounds-v0"))
    env.reset(seed=1)
    for action, expected in [((-1, -1), (-1, 0)), ((1, 1), (3, 10)), ((0, -0.5), (1, 2.5))]:
        obs, *_ = env.step(np.array(action, np.float32))
        assert obs.dtype == np.float32
        np.testing.assert_allclose(obs, expected, atol=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(300):
        low, high = np.sort(rng.uniform(-5, 5, (2, 2)), axis=0)
        high[1] = low[1]
        monkeypatch.setattr(Bounds, "action_space", gym.spaces.Box(low.astype(dtype), high.astype(dtype), dtype=dtype))
        env = ddpg.make_env(ddpg.Args(env_id="Bounds-v0"))
        env.reset(seed=1)
        for action in (-1, 1, rng.uniform(-1, 1)):
            env.step(np.full(2, action, np.float32))
            assert Bounds.action_space.contains(Bounds.taken)


def test_the_largest_bounds_do_not_overflow() -> None:
    env = ddpg.make_env(ddpg.Args(env_id="Huge-v0"))
    env.reset(seed=1)
    for action in (-1, -0.5, 0, 0.5, 1):
        env.step(np.full(2, action, np.float32))
        np.testing.assert_allclose(Bounds.taken, np.float64(action) * np.finfo(np.float32).max)
        assert Huge.action_space.contains(Bounds.taken)


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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
        restored.load_state_dict(through_a_file(env.state_dict()))
        assert (restored.obs == env.obs).all()
        for _ in range(60):
            action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            assert step(env, action) == step(restored, action)


@pytest.mark.parametrize("env_id", ["Curriculum-v0", "OwnRandom-v0", "Bounds-v0"])
def test_an_environment_that_does_not_repeat_is_not_resumed(env_id: str, capsys: pytest.CaptureFixture) -> None:
    """Other rewards, or other observations; one that does repeat is."""
    env, restored = (ddpg.make_env(ddpg.Args(env_id=env_id)) for _ in range(2))
    env.reset(seed=1)
    for step in range(130):
        env.step(np.full(2, step % 2, np.float32))
        if step in (49, 99):
            env.reset()
    if env_id == "Bounds-v0":
        return restored.load_state_dict(through_a_file(env.state_dict()))
    with pytest.raises(SystemExit, match="2"):
        restored.load_state_dict(through_a_file(env.state_dict()))
    said = capsys.readouterr().err
    assert f"--resume: {env_id} does not play an episode again as it was" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("evaluations", "made"), [(0, 1), (2, 2)])
def test_an_environment_that_can_exist_once(evaluations: int, made: int, tmp_path: Path) -> None:
    """It is closed before the evaluation makes another; without an evaluation none is made."""
    Alone.made = Alone.opened = 0
    run = make_run(tmp_path, "Alone-v0", 60, eval_episodes=evaluations)
    run.finish(ddpg.train(run.args, run))
    assert (Alone.made, Alone.opened) == (made, 0)


def test_rewards_and_observations_of_other_types_and_an_own_limit(tmp_path: Path, stored: list[tuple]) -> None:
    run = make_run(tmp_path, "Lists-v0", 40, eval_episodes=1)
    figures = run.finish(ddpg.train(run.args, run))
    assert figures["eval_return_mean"] == 7 * 2.5
    assert scalars(run.dir, "charts/episodic_return") == [(step, 7 * 2.5) for step in (7, 14, 21, 28, 35)]
    assert {row[2] for row in stored} == {2.5}
    assert {row[3] for row in stored} == {False}
    for row, following in itertools.pairwise(stored[:7]):
        np.testing.assert_array_equal(row[4], following[0])


# --- The loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("env_id", "expected"), [("Bounds-v0", [0] * 120), ("Ending-v0", [0, 0, 1] * 40)])
def test_only_a_terminal_state_stops_the_bootstrap(
    env_id: str, expected: list[int], tmp_path: Path, stored: list[tuple]
) -> None:
    """What the loop tells the memory at a time limit (every 50 steps), and at a terminal state (every third step)."""
    run = make_run(tmp_path, env_id, 120)
    ddpg.train(run.args, run)
    run.writer.close()
    assert [terminated for *_, terminated, _ in stored] == expected
    ends = [step for step, _ in scalars(run.dir, "charts/episodic_length")]
    assert ends == ([50, 100] if env_id == "Bounds-v0" else list(range(3, 121, 3)))
    for step, (row, following) in enumerate(itertools.pairwise(stored), start=1):
        assert np.array_equal(row[4], following[0]) == (step not in ends)  # the episode's own last state
        assert not np.array_equal(row[0], row[4])
    starts = [0, *(step for step in ends if step < 120)]
    assert len({tuple(stored[start][0]) for start in starts}) == len(starts)  # each episode begins elsewhere


def test_four_updates_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights after four updates, targets' too, from the minibatches that the memory gave with an Adam by hand."""
    batches, sample = [], ddpg.ReplayMemory.sample

    def sampled(memory: ddpg.ReplayMemory, batch_size: int) -> tuple[torch.Tensor, ...]:
        assert memory.capacity == 65  # --buffer-size
        batches.append(sample(memory, batch_size))
        return batches[-1]

    monkeypatch.setattr(ddpg.ReplayMemory, "sample", sampled)
    evaluated = []
    monkeypatch.setattr(ddpg, "evaluate", lambda _, model, *__: evaluated.append(copy.deepcopy(model["actor"])) or {})
    flags = {"batch_size": 64, "gamma": 0.9, "tau": 0.2, "learning_rate": 1e-2, "learning_starts": 64}
    flags |= {"buffer_size": 65, "eval_frequency": 66}
    run = make_run(tmp_path, "Ending-v0", 67, **flags)
    torch.manual_seed(7)
    actor, critic = ddpg.Actor(2, 2, (8, 8)), ddpg.Critic(2, 2, (8, 8))
    made = [copy.deepcopy(critic), copy.deepcopy(actor)]  # once each: the targets are copies
    monkeypatch.setattr(ddpg, "Actor", lambda *_: made.pop())
    monkeypatch.setattr(ddpg, "Critic", lambda *_: made.pop())
    monkeypatch.setattr(ddpg, "LOG_FREQUENCY", 1)
    model = ddpg.train(run.args, run)
    trained = torch.load(run.dir / "checkpoint.pt", weights_only=True)["parts"]

    target_actor, target_critic = copy.deepcopy(actor), copy.deepcopy(critic)
    losses = {"qf1_loss": [], "qf1_values": [], "actor_loss": []}
    moments = {network: [[0.0, 0.0] for _ in network.parameters()] for network in (actor, critic)}

    def adam(network: torch.nn.Module, loss: torch.Tensor, count: int) -> None:
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for w, g, m in zip(network.parameters(), gradients, moments[network], strict=True):
                m[0], m[1] = 0.9 * m[0] + 0.1 * g, 0.999 * m[1] + 0.001 * g**2
                w -= 1e-2 * (m[0] / (1 - 0.9**count)) / ((m[1] / (1 - 0.999**count)).sqrt() + 1e-8)

    assert len(batches) == 4
    for count, (obs, action, reward, terminated, next_obs) in enumerate(batches, start=1):
        assert set(terminated.tolist()) == {0.0, 1.0}
        with torch.no_grad():
            y = reward + 0.9 * torch.where(terminated == 1, 0.0, target_critic(next_obs, target_actor(next_obs)))
        q_value = critic(obs, action)
        adam(critic, critic_loss := ((y - q_value) ** 2).sum() / 64, count)
        adam(actor, actor_loss := -critic(obs, actor(obs)).sum() / 64, count)
        for values, value in zip(losses.values(), (critic_loss, q_value.mean(), actor_loss), strict=True):
            values.append(value.item())
        with torch.no_grad():
            for target, network in ((target_actor, actor), (target_critic, critic)):
                for old, new in zip(target.parameters(), network.parameters(), strict=True):
                    old.copy_(0.8 * old + 0.2 * new)
        if count == 3:  # step 66
            for key, weight in actor.state_dict().items():
                torch.testing.assert_close(evaluated[0][key], weight, rtol=1e-4, atol=1e-5)
    networks = {"actor": actor, "critic": critic, "target_actor": target_actor, "target_critic": target_critic}
    for name, network in networks.items():
        for key, weight in network.state_dict().items():
            torch.testing.assert_close(trained[name][key], weight, rtol=1e-4, atol=1e-5)
    for key, weight in model["actor"].state_dict().items():
        assert torch.equal(weight, trained["actor"][key])
    for name, values in losses.items():
        assert [value for _, value in scalars(run.dir, f"losses/{name}")] == pytest.approx(values, rel=1e-3)


def test_exploration(tmp_path: Path, stored: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform actions, then the actor's at the state that it is in, with Gaussian noise, clipped to the bounds."""
    seen, answer = [], np.array([0.0, 0.95], np.float32)
    monkeypatch.setattr(ddpg.Actor, "act", lambda actor, obs: seen.append((actor, obs)) or answer)
    run = make_run(tmp_path, "Ending-v0", 1_000, learning_starts=500, exploration_noise=0.2, hidden_sizes=(1, 1))
    model = ddpg.train(run.args, run)
    actions = np.array([action for _, action, *_ in stored])
    assert actions.shape == (1_000, 2)
    assert np.abs(actions).max() == 1
    for start in (0, 250):  # uniform: standard deviation 1 / sqrt(3)
        assert actions[start : start + 250].std() == pytest.approx(3**-0.5, rel=0.1)
    noise = actions[500:] - answer
    assert noise[:, 0].std() == pytest.approx(0.2, rel=0.12)
    assert abs(noise[:, 0].mean()) < 0.04
    assert abs(np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1]) < 0.15
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.15  # each dimension its own
    assert np.abs(noise[:, 0]).max() > 0.45  # a uniform one of this deviation ends at 0.35
    assert (actions[500:, 1] == 1).mean() == pytest.approx(0.4013, abs=0.1)  # P(0.2 z > 0.05)
    np.testing.assert_array_equal([obs for _, obs in seen], [row[0] for row in stored[500:]])
    assert all(actor is model["actor"] for actor, _ in seen)
    executed = [row[4] for row in stored]  # what this environment gives
    np.testing.assert_allclose(executed, [-1, 0] + (actions + 1) / 2 * [4, 10], atol=1e-5)


def test_exploration_and_environment_draw_different_numbers(tmp_path: Path, stored: list[tuple]) -> None:
    """From one seed; the first actions are uniform, and so is the noise in this environment."""
    Shaken.noise.clear()
    run = make_run(tmp_path, "Shaken-v0", 300)
    ddpg.train(run.args, run)
    actions = np.array([action for _, action, *_ in stored])
    assert len(np.unique(actions)) == 600
    assert not np.isin(actions, Shaken.noise).any()  # draws of one stream would be the same to the bit


def test_evaluation_equals_a_loop_by_hand() -> None:
    """Pendulum-v1 itself, whose torques reach from -2 to 2, without noise, from a seed of its own."""
    torch.manual_seed(0)
    actor = ddpg.Actor(3, 1, (8, 8))
    env, returns = gym.make("Pendulum-v1"), []
    env.reset(seed=4 + ddpg.EVAL_SEED)
    for _ in range(3):
        (obs, _), done, total = env.reset(), False, 0.0
        while not done:
            with torch.no_grad():
                obs, reward, _terminated, done, _ = env.step(2 * actor(torch.from_numpy(obs)[None])[0].numpy())
            total += reward
        returns.append(total)
    args = ddpg.Args(env_id="Pendulum-v1", hidden_sizes=(8, 8), seed=4, eval_episodes=3)
    figures = ddpg.evaluate(args, {"actor": actor.state_dict()}, CPU, None)
    expected = {"eval_return_mean": np.mean(returns), "eval_return_std": np.std(returns), "eval_episodes": 3}
    assert figures == pytest.approx(expected, rel=1e-3)
    args, actor = ddpg.Args(env_id="Ending-v0", hidden_sizes=(8, 8), eval_episodes=1), ddpg.Actor(2, 2, (8, 8))
    figures = ddpg.evaluate(args, {"actor": actor.state_dict()}, CPU, None)
    assert -3 <= figures["eval_return_mean"] <= 9  # a terminal state ends it: three rewards from -1 to 3


def test_it_learns_to_swing_up(tmp_path: Path) -> None:
    """Pendulum-v1: random actions score about -1,200, a pendulum that stands after some swings -150 to -300."""
    flags = {"learning_starts": 500, "batch_size": 64, "learning_rate": 2e-3, "tau": 0.01, "hidden_sizes": (64, 64)}
    run = make_run(tmp_path, "Pendulum-v1", 4_000, **flags, eval_episodes=10, checkpoint_frequency=0)
    assert run.finish(ddpg.train(run.args, run))["eval_return_mean"] > -400


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--env-id HalfCheeta-v5", "Did you mean: `HalfCheetah`"),
        ("--env-id Hopper-v3", "--env-id Hopper-v3: "),
        ("--env-id nowhere:Hopper-v5", "No module named 'nowhere'"),
        ("--env-id nowhere:Hopper-v5", "(PYTHONPATH names a module's folder)"),
        ("--env-id test_ddpg_continuous:Xqzwvk-v0", "Environment `Xqzwvk` doesn't exist.\n"),  # the module does
        ("--env-id CartPole-v1", "needs vectors (Box): observations and bounded float actions"),
        ("--env-id Integers-v0", "needs vectors (Box)"),
        ("--env-id Images-v0", "needs vectors (Box)"),
        ("--env-id Dictionaries-v0", "needs vectors (Box)"),
        ("--env-id HalfInfinite-v0", "gymnasium.wrappers such as FlattenObservation and TransformAction change them"),
        ("--env-id Broken-v0", "--env-id Broken-v0: gave observation [ 0. nan] and reward 0.0 for action ["),
        ("--env-id BrokenReward-v0", "and reward nan for action ["),
        ("--env-id BrokenStart-v0", "gave observation [ 0. nan] on reset; must be 2 finite numbers\n"),
        ("--env-id BrokenLarge-v0", "gave observation [ 0. inf] and reward 0.0 for action ["),
        ("--env-id BrokenSum-v0", "and reward -1e+39 for action ["),
        ("--env-id BrokenRewards-v0", "gave observation [0. 0.] and reward [1. 1.] for action ["),
        ("--env-id BrokenShape-v0", "gave observation [0.] and reward 0.0 for action ["),
        ("--env-id BrokenShape-v0", "]; must be 2 finite numbers and one\n"),
        ("--env-id BrokenOldGym-v0", "gave observation 0.0 on reset; must be 2 finite numbers\n"),
        ("--env-id Bounds-v0 --capture-video", "--capture-video: Bounds-v0 cannot be drawn here"),
        ("--evaluate hopper.pt --env-id HalfCheetah-v5", "hopper.pt was started with Hopper-v5"),
    ],
)
def test_bad_input(
    flags: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left behind, but for a run that had begun."""
    monkeypatch.chdir(tmp_path)
    args = vars(ddpg.Args(env_id="Hopper-v5", hidden_sizes=(16, 16)))
    args = {name: value for name, value in args.items() if name not in ddpg.FREE}
    torch.save({"script": "ddpg_continuous", "kind": "model", "args": args, "actor": {}}, "hopper.pt")
    assert expected in message_of(ddpg, flags.split(), capsys, monkeypatch)
    left = {path.name for path in tmp_path.rglob("*")} - {"hopper.pt", "runs"}
    assert bool(left) == ("Broken" in flags)


WITHOUT_EGL = """
import ctypes, runpy, sys
load = ctypes.CDLL.__init__
def refuse(self, name, *rest, **options):
    if "EGL" in str(name):
        raise OSError("no such library")
    load(self, name, *rest, **options)
ctypes.CDLL.__init__, sys.argv = refuse, sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="MuJoCo draws by other means")
def test_video_without_screen_and_egl_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on many a server. MuJoCo's renderer, half made, would add two tracebacks, and Gymnasium a warning."""
    for name in ("DISPLAY", "MUJOCO_GL", "PYOPENGL_PLATFORM"):  # the last two by other tests
        monkeypatch.delenv(name, raising=False)
    flags = ["--env-id", "Hopper-v5", "--capture-video"]
    result = run_python("-c", WITHOUT_EGL, ROOT / "ddpg_continuous.py", *flags, cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "Hopper-v5 cannot be drawn here" in result.stderr
    assert result.stderr.endswith("; install libEGL\n")


@pytest.mark.skipif(not find_library("EGL"), reason="no libEGL")
def test_the_camera_follows_a_robot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten metres away, as much of the picture is of the cheetah's orange as at the start; the floor is grey."""
    monkeypatch.delenv("DISPLAY", raising=False)
    env, orange = ddpg.make_env(ddpg.Args(), tmp_path / "videos"), []
    for distance in (0, 10):
        env.reset(seed=1)
        robot = env.unwrapped
        robot.set_state(robot.init_qpos + distance * np.eye(9)[0], robot.init_qvel)
        picture = env.render().astype(int)
        orange.append((picture[..., 0] - picture[..., 2] > 20).sum())
    env.close()
    assert orange[0] > 5_000
    assert orange[1] == pytest.approx(orange[0], rel=0.1)


def test_what_is_recommended_for_unbounded_actions_works() -> None:
    env = ddpg.make_env(ddpg.Args(env_id="Transformed-v0"))
    env.reset(seed=1)
    env.step(np.array([-1, 0.5], np.float32))
    np.testing.assert_allclose(Bounds.taken, [0, 1.5])


def test_mujoco_missing_names_what_installs_it(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: object, **__: object) -> None:
        raise gym.error.DependencyNotInstalled('MuJoCo is not installed, run `pip install "gymnasium[mujoco]"`')

    monkeypatch.setattr(ddpg.gym, "make", make)
    assert 'pip install "gymnasium[mujoco]"' in message_of(ddpg, [], capsys, monkeypatch)
