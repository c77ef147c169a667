"""Tests of dqn_atari.py against independent oracles; each says what it compares with."""

import copy
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import Catch, message_of, scalars
from hypothesis import given, settings
from hypothesis import strategies as st

import dqn_atari as dqn
import rainbow_atari as rainbow

CPU = torch.device("cpu")


def make_run(tmp_path: Path, script: ModuleType = dqn, **flags: object) -> dqn.Run:
    args = script.Args(runs_dir=tmp_path, run_name="it", device="cpu", **flags)
    return script.Run(args, script.check(args))


# --- Environment ------------------------------------------------------------------------------------------------------


class NoNoops:
    """Stands in for the generator of the no-ops: none."""

    def integers(self, _: int) -> int:
        return 0


def make_memory(capacity: int, spare: int, rng: object) -> dqn.FrameMemory:
    slots = capacity + spare
    screens, steps = np.zeros((slots, 84, 84), np.uint8), np.zeros(slots, dqn.FrameMemory.STEP)
    return dqn.FrameMemory(capacity, screens, steps, rng, CPU)


@pytest.mark.parametrize("game", ["Pong", "Breakout", "SpaceInvaders", "BeamRider", "MsPacman"])
def test_preprocessing_equals_ale_vector_env(game: str) -> None:
    """Frame by frame against ALE's own preprocessing in C++, across life losses and a game over.

    The screen at a game over is left out: there ALE hands out the step before. No target ever looks at it.
    """
    rom = {"SpaceInvaders": "space_invaders", "BeamRider": "beam_rider", "MsPacman": "ms_pacman"}.get(
        game, game.lower()
    )
    theirs = ale_py.AtariVectorEnv(rom, num_envs=1, noop_max=0, use_fire_reset=False, reward_clipping=False)
    ours = dqn.make_atari(dqn.Args(env_id=f"ALE/{game}-v5"), NoNoops())
    obs, _ = theirs.reset(seed=3)
    memory = make_memory(4_000, 0, NoNoops())
    memory.push(ours.reset(seed=3)[0])
    rng = np.random.default_rng(0)
    over, games, lives_lost = False, 0, 0
    while games < 2:
        action = int(rng.integers(ours.action_space.n))
        obs, their_reward, their_terminated, _, their_info = theirs.step(np.array([action]))
        if over:  # their next step starts the next game
            memory.push(ours.reset()[0])
            over, games = False, games + 1
        else:
            screen, reward, over, _, info = ours.step(action)
            memory.append(action, reward, over, screen)
            lives_lost += info["life_lost"]
            assert reward == their_reward[0]
            assert over == their_terminated[0]
            assert info["lives"] == their_info["lives"][0]
        if not over:
            stacked = memory.newest_obs().numpy()[0].astype(int)
            assert np.abs(stacked - obs[0]).max() <= 1
    assert lives_lost > 0 or game == "Pong"


@pytest.mark.parametrize(("size", "new_size"), [(210, 84), (160, 84), (250, 84), (84, 84), (7, 3)])
def test_area_weights_equal_the_integral(size: int, new_size: int) -> None:
    """Against the definition: repeat every old pixel new_size times, then average blocks of `size`."""
    line = np.random.default_rng(0).integers(0, 256, size)
    expected = line.repeat(new_size).reshape(new_size, size).mean(axis=1)
    np.testing.assert_allclose(
        sum(weight * line[index] for index, weight in dqn.area_weights(size, new_size)), expected, rtol=1e-5
    )


class ScriptedLives(gym.Env):
    """A raw screen environment whose lives, rewards and end are written down; its screens count up."""

    observation_space = gym.spaces.Box(0, 255, (210, 160), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def get_action_meanings(self) -> list[str]:
        return ["NOOP", "FIRE"]

    def clone_state(self, include_rng: bool) -> None:
        """No test of this environment restores it."""

    def __init__(self, lives: str, terminated_at: int | None = None, truncated_at: int | None = None):
        self.lives, self.terminated_at, self.truncated_at = [int(c) for c in lives], terminated_at, truncated_at

    def reset(self, **_: object) -> tuple[np.ndarray, dict]:
        self.t = 0
        return np.zeros((210, 160), np.uint8), {"lives": self.lives[0]}

    def step(self, _: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        screen = np.full((210, 160), self.t, np.uint8)
        return screen, 0.5, self.t == self.terminated_at, self.t == self.truncated_at, {"lives": self.lives[self.t]}


def test_action_repeat_lives_and_ends() -> None:
    env = dqn.AtariPreprocessing(ScriptedLives("33332222221111", terminated_at=10), NoNoops())
    screen, _ = env.reset()
    assert screen.shape == (84, 84)
    assert (screen == 0).all()
    screen, reward, terminated, truncated, info = env.step(0)  # raw frames 1 to 4; a life is lost in the fourth
    assert (screen == 4).all()
    assert (reward, terminated, truncated, info["life_lost"]) == (2.0, False, False, True)
    screen, reward, terminated, truncated, info = env.step(0)  # 5 to 8
    assert (reward, terminated, truncated, info["life_lost"]) == (2.0, False, False, False)
    screen, reward, terminated, truncated, info = env.step(0)  # 9 and 10: the game ends within the repetition
    assert (screen == 10).all()
    assert (reward, terminated, truncated) == (1.0, True, False)
    env.reset()
    assert env.step(0)[-1]["life_lost"]
    env = dqn.AtariPreprocessing(ScriptedLives("33333", truncated_at=3), NoNoops())
    env.reset()
    assert env.step(0)[1:4] == (1.5, False, True)


def test_noops_are_drawn_from_0_to_30() -> None:
    env = dqn.AtariPreprocessing(ScriptedLives("3" * 40), np.random.default_rng(0))
    assert {int(env.reset()[0][0, 0]) for _ in range(1000)} == set(range(31))
    for end in ({"terminated_at": 10}, {"truncated_at": 10}):  # a game that is over by then begins again
        env = dqn.AtariPreprocessing(ScriptedLives("3" * 40, **end), np.random.default_rng(0))
        assert {int(env.reset()[0][0, 0]) for _ in range(1000)} == set(range(10))
    env.env.get_action_meanings = lambda: ["FIRE"]
    assert dqn.AtariPreprocessing(env.env, np.random.default_rng(0)).noop_max == 0


@pytest.mark.parametrize("game", ["Pong", "Breakout", "Qbert", "Tetris"])
def test_emulator_state_goes_on_as_if_never_stopped(game: str) -> None:
    """At many moments, with actions that stick nearly always, and in a game whose emulator state is incomplete."""
    args = dqn.Args(env_id=f"ALE/{game}-v5", sticky_actions=0.9)
    env, restored = (dqn.make_atari(args, np.random.default_rng(seed)) for seed in (0, 1))
    env.reset(seed=1)
    restored.reset(seed=2)
    rng = np.random.default_rng(2)
    for _ in range(12):
        for _ in range(rng.integers(1, 40)):
            if env.step(int(rng.integers(4)))[2]:
                env.reset()
        for _ in range(rng.integers(20)):  # whatever came before
            restored.step(0)
        file = io.BytesIO()
        torch.save(env.state_dict(), file)
        file.seek(0)
        restored.load_state_dict(torch.load(file, weights_only=True))
        for _ in range(6):
            action = int(rng.integers(4))
            (screen, *rest), (restored_screen, *restored_rest) = env.step(action), restored.step(action)
            assert (screen == restored_screen).all()
            assert rest == restored_rest
            if rest[1]:
                env.reset()
                break


# --- Replay memory ----------------------------------------------------------------------------------------------------


class NaiveMemory:
    """Stores whole stacks, with the oldest screen that each transition needs; the oracle of the ring."""

    def __init__(self, capacity: int):
        self.capacity, self.transitions, self.screens = capacity, [], 0

    def push(self, screen: np.ndarray) -> None:
        self.stack = [np.zeros_like(screen)] * 3 + [screen]
        self.screens += 1

    def append(self, action: int, reward: float, terminated: bool, screen: np.ndarray) -> None:
        next_stack = [*self.stack[1:], screen]
        oldest_needed = self.screens - 4  # the ring's oldest screen that any stack of this transition may touch
        self.transitions.append((np.array(self.stack), action, reward, terminated, np.array(next_stack), oldest_needed))
        self.stack = next_stack
        self.screens += 1

    def drawable(self) -> list[tuple]:
        oldest = self.screens - self.capacity
        return [transition for transition in self.transitions if oldest <= 0 or transition[5] >= oldest]


def key(obs: object, action: object, reward: object, terminated: object, next_obs: object) -> tuple:
    return np.asarray(obs).tobytes(), int(action), float(reward), bool(terminated), np.asarray(next_obs).tobytes()


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(8, 40),
    spare=st.integers(0, 12),
    episodes=st.lists(st.integers(1, 15), min_size=2, max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
def test_replay_equals_naive_memory(capacity: int, spare: int, episodes: list[int], seed: int) -> None:
    """Every transition that the naive memory holds is drawn, and none other, at every size and after every wrap."""
    rng = np.random.default_rng(seed)
    memory, naive = make_memory(capacity, spare, rng), NaiveMemory(capacity)
    shade = 0
    for length in episodes:
        for t in range(length + 1):
            shade += 1
            screen = np.full((84, 84), shade % 251 + 1, np.uint8)
            if t == 0:
                memory.push(screen)
                naive.push(screen)
            else:
                row = (int(rng.integers(18)), float(rng.integers(-1, 2)), t == length and shade % 2 == 0, screen)
                memory.append(*row)
                naive.append(*row)
                assert (memory.newest_obs().numpy()[0] == np.array(naive.stack)).all()
    expected = {key(*transition[:5]) for transition in naive.drawable()}
    drawn = set()
    for _ in range(10):
        obs, action, reward, next_obs, terminated = memory.sample(100)
        drawn |= {key(*parts) for parts in zip(obs, action, reward, terminated, next_obs, strict=True)}
    assert drawn == expected


def test_replay_draws_uniformly() -> None:
    """Also where half of the draws are repeated, for they are ends: 110 episodes of one step."""
    memory = make_memory(1000, 0, np.random.default_rng(0))
    for action in range(110):
        memory.push(np.zeros((84, 84), np.uint8))
        memory.append(action, 0.0, False, np.zeros((84, 84), np.uint8))
    counts = np.bincount(np.concatenate([memory.sample(1000)[1].numpy() for _ in range(55)]), minlength=110)
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 162  # 109 degrees of freedom: exceeded with a probability of 0.001


@pytest.mark.parametrize("count", [90, 91])
def test_what_a_checkpoint_refers_to_outlives_the_spare_places(count: int, tmp_path: Path) -> None:
    """A memory restored from its files, after as many further screens as there are spare places, holds the same."""
    capacity, spare = 20, 7
    run = make_run(tmp_path)

    def map_memory(seed: int) -> dqn.FrameMemory:
        screens = run.map_file("screens", np.uint8, (capacity + spare, 84, 84))
        steps = run.map_file("steps", dqn.FrameMemory.STEP, (capacity + spare,))
        return dqn.FrameMemory(capacity, screens, steps, np.random.default_rng(seed), CPU)

    def grow(memory: dqn.FrameMemory) -> None:
        if memory.count % 6 == 0:  # the newest transition of the checkpoint at 90 is an episode's last
            memory.push(np.full((84, 84), memory.count, np.uint8))
        else:
            memory.append(memory.count % 18, 1.0, memory.count % 5 == 0, np.full((84, 84), memory.count, np.uint8))

    memory = map_memory(0)
    for _ in range(count):
        grow(memory)
    state = memory.state_dict()
    memory.rng = np.random.default_rng(1)
    before = [*memory.sample(200), memory.newest_obs()]
    for _ in range(spare):
        grow(memory)
        restored = map_memory(1)
        restored.load_state_dict(state)
        after = [*restored.sample(200), restored.newest_obs()]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    grow(memory)  # one screen more than there is room for: the oldest that the checkpoint refers to is gone
    oldest = state["count"] - capacity
    assert memory.screens[oldest % (capacity + spare), 0, 0] != oldest


# --- The update -------------------------------------------------------------------------------------------------------


def test_huber_loss_by_hand() -> None:
    """Six transitions: ordinary, terminal, truncated (bootstraps like an ordinary one), with rewards -1, 0 and 1."""
    reward = torch.tensor([1.0, 0.0, -1.0, 1.0, 0.0, -1.0])
    terminated = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    next_q_values = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.25], [9.0, 9.0], [9.0, 9.0], [-2.0, -4.0]])
    td_target = dqn.td_targets(reward, terminated, next_q_values, gamma=0.5)
    assert td_target.tolist() == [2.0, 1.5, -0.75, 1.0, 0.0, -2.0]

    q_value = torch.tensor([2.0, 1.0, 0.25, 3.0, 0.0, -2.5], requires_grad=True)  # y - Q: 0, 0.5, -1, -2, 0, 0.5
    loss = dqn.td_loss(q_value, td_target, "huber")
    assert loss.item() == pytest.approx((0.125 + 0.5 + 1.5 + 0.125) / 6)
    loss.backward()  # the paper's error, clipped to [-1, 1]
    torch.testing.assert_close(q_value.grad, torch.tensor([0.0, -0.5, 1.0, 1.0, 0.0, -0.5]) / 6)


def papers_network(weights: list[torch.Tensor], obs: torch.Tensor) -> torch.Tensor:
    """The paper's network in functions, from uint8."""
    w1, b1, w2, b2, w3, b3, w4, b4, w5, b5 = weights
    x = F.relu(F.conv2d(obs.to(w1.dtype) / 255, w1, b1, stride=4))
    x = F.relu(F.conv2d(x, w2, b2, stride=2))
    x = F.relu(F.conv2d(x, w3, b3)).flatten(1)
    return F.relu(x @ w4.T + b4) @ w5.T + b5


def test_network_is_the_papers() -> None:
    """Against functions in float64; observations, also of floats, stay as they are."""
    network = dqn.QNetwork(6)
    shapes = [tuple(parameter.shape) for parameter in network.parameters() if parameter.dim() > 1]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (6, 512)]
    obs = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    expected = papers_network([parameter.double() for parameter in network.parameters()], obs)
    for given_obs in (obs, obs.float()):
        torch.testing.assert_close(network(given_obs).double(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(given_obs.to(torch.uint8), obs)
        assert network.act(given_obs[:1]) == expected[0].argmax()


# --- The loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "loss"), [("adam", "mse"), ("rmsprop", "huber")])
def test_seven_updates_by_hand(
    optimizer: str, loss: str, tmp_path: Path, play: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights after updates at steps 32, 34, ... 44 on the minibatches that the memory gave, copied at 35 and 40.

    Logged values too, and the network that is evaluated at step 34.
    The optimizers are the textbook's formulas, of RMSProp the paper's; the networks are functions of weights.
    """
    play(dqn, Catch)
    batches, sample, evaluated = [], dqn.FrameMemory.sample, []
    monkeypatch.setattr(dqn.FrameMemory, "sample", lambda *args: batches.append(sample(*args)) or batches[-1])
    monkeypatch.setattr(dqn, "evaluate", lambda _, model, *__: evaluated.append(copy.deepcopy(model)) or {})
    monkeypatch.setattr(dqn, "LOG_FREQUENCY", 1)
    flags = {"total_timesteps": 44, "learning_starts": 32, "train_frequency": 2, "target_network_frequency": 5}
    flags |= {"optimizer": optimizer, "loss": loss, "learning_rate": 1e-3, "optimizer_eps": 1e-2}
    flags |= {"gamma": 0.9, "batch_size": 20, "eval_frequency": 34}
    run = make_run(tmp_path, **flags)
    torch.manual_seed(7)
    weights = [weight.detach().clone() for weight in dqn.QNetwork(3).parameters()]
    torch.manual_seed(7)
    model = dqn.train(run.args, run)
    target, first, second, logged = copy.deepcopy(weights), [0.0] * 10, [0.0] * 10, []
    assert len(batches) == 7
    for count, (step, batch) in enumerate(zip(range(32, 46, 2), batches, strict=True), start=1):
        obs, action, reward, next_obs, terminated = batch
        y = reward + 0.9 * (1 - terminated) * papers_network(target, next_obs).max(dim=1).values
        variables = [weight.requires_grad_() for weight in weights]
        q_value = papers_network(variables, obs)[range(20), action]
        error = y - q_value
        clipped = torch.where(error.abs() < 1, error**2 / 2, error.abs() - 0.5)
        mean = (error**2 if loss == "mse" else clipped).sum() / 20
        logged.append((mean.item(), q_value.mean().item()))
        gradients = torch.autograd.grad(mean, variables)
        weights = [weight.detach() for weight in weights]
        for i, g in enumerate(gradients):
            if optimizer == "adam":
                first[i], second[i] = 0.9 * first[i] + 0.1 * g, 0.999 * second[i] + 0.001 * g**2
                root = (second[i] / (1 - 0.999**count)).sqrt() + 1e-2
                weights[i] = weights[i] - 1e-3 * first[i] / (1 - 0.9**count) / root
            else:
                first[i], second[i] = 0.95 * first[i] + 0.05 * g, 0.95 * second[i] + 0.05 * g**2
                weights[i] = weights[i] - 1e-3 * g / (second[i] - first[i] ** 2 + 1e-2).sqrt()
        if step == 34:
            for ours, theirs in zip(evaluated[0]["q_network"].values(), weights, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-7)
        if step in (34, 40):  # copied at 35, before the update at 36, and at 40, after that one
            target = copy.deepcopy(weights)
    assert {float(t) for batch in batches for t in batch[4]} == {0.0, 1.0}
    run.writer.flush()
    said = zip(scalars(run.dir, "losses/td_loss"), scalars(run.dir, "losses/q_values"), strict=True)
    np.testing.assert_allclose([(loss, q_value) for (_, loss), (_, q_value) in said], logged, rtol=1e-4, atol=1e-6)
    parts = torch.load(run.dir / "checkpoint.pt", weights_only=True)["parts"]
    assert all(
        torch.equal(w, v) for w, v in zip(model["q_network"].parameters(), parts["q_network"].values(), strict=1)
    )
    for name, expected in (("q_network", weights), ("target_network", target)):
        for ours, theirs in zip(parts[name].values(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-7)


def test_rmsprop_where_the_gradient_hardly_varies() -> None:
    """Rounding then leaves v - m^2 below -eps: the steps stay numbers, of at most lr g / sqrt(eps)."""
    torch.manual_seed(1)
    weight = torch.zeros(1000, requires_grad=True)
    optimizer = dqn.RMSprop([weight], lr=1e-3, eps=1e-8)
    for _ in range(1000):
        before, weight.grad = weight.detach().clone(), 1 + 1e-5 * torch.randn(1000)
        optimizer.step()
    step = (before - weight.detach()) / (1e-3 * weight.grad)
    assert 0 < step.min() <= step.max() < 1.001e4


def test_the_epsilon_that_the_loop_uses(tmp_path: Path, play: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws a hair below and a hair above the value by hand: from 0.9 down to 0.1 over a quarter of 200 steps."""
    play(dqn, Catch)
    greedy, line = [], [max(0.1, 0.9 - 0.8 * step / 50) for step in range(1, 201)]

    class Draws:
        """The run's generator, but for draws near epsilon: below it in every third step."""

        def __init__(self, rng: np.random.Generator):
            self.rng, self.step = rng, 0

        def __getattr__(self, name: str) -> object:
            return getattr(self.rng, name)

        def random(self) -> float:
            self.step += 1
            return line[self.step - 1] + (-1e-9 if self.step % 3 == 0 else 1e-9)

    flags = {"total_timesteps": 200, "learning_starts": 200, "exploration_fraction": 0.25, "start_e": 0.9, "end_e": 0.1}
    run = make_run(tmp_path, **flags)
    run.rng = Draws(run.rng)
    monkeypatch.setattr(dqn.QNetwork, "act", lambda *_: greedy.append(run.rng.step) or 0)
    monkeypatch.setattr(dqn, "LOG_FREQUENCY", 20)
    dqn.train(run.args, run)
    run.writer.close()
    assert greedy == [step for step in range(1, 201) if step % 3 != 0]
    logged = scalars(run.dir, "charts/epsilon")
    assert logged == [(step, pytest.approx(line[step - 1])) for step in range(20, 201, 20)]


class Ends(Catch):
    """Every third step loses a life, every sixth ends by a time limit, every twelfth in a terminal state instead."""

    t = 0

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        truncated, terminated = self.t % 12 == 6, self.t % 12 == 0
        return self.screen(), 5.0, terminated, truncated, {"life_lost": self.t % 6 == 3}


@pytest.mark.parametrize(("script", "flags"), [(dqn, {}), (rainbow, {"noisy_nets": False, "small_network": True})])
def test_terminal_states_and_rewards_that_the_loop_stores(
    script: ModuleType, flags: dict, tmp_path: Path, play: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost life and a game's end are terminal, a time limit is not; rewards are clipped, scores are not.

    All actions are drawn; a game begins where one ended; between two checkpoints there is space for two screens a step.
    """
    play(script, Ends)
    stored, append = [], script.FrameMemory.append
    monkeypatch.setattr(script.FrameMemory, "append", lambda *row: stored.append(row) or append(*row))
    sizes = {"total_timesteps": 48, "learning_starts": 48, "buffer_size": 40, "checkpoint_frequency": 10}
    run = make_run(tmp_path, script, **sizes, **flags, eval_episodes=2, end_e=1.0)
    figures = run.finish(script.train(run.args, run))
    assert [bool(terminated) for *_, terminated, _ in stored] == [t % 6 == 3 or t % 12 == 0 for t in range(1, 49)]
    assert {action for _, action, *_ in stored} == {0, 1, 2}
    assert {reward for _, _, reward, *_ in stored} == {1.0}
    memory = stored[0][0]
    assert (memory.count, memory.capacity, memory.slots) == (1 + 48 + 8, 40, 40 + 2 * 10)
    assert json.loads((run.dir / "result.json").read_text())["train_return_mean"] == 30.0
    assert figures == {"eval_return_mean": 30.0, "eval_return_std": 0.0, "eval_episodes": 2}


def test_it_learns_to_catch(tmp_path: Path, play: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's own loop, network, replay and update reach a near-perfect score from screens."""
    play(dqn, Catch)
    monkeypatch.setattr(dqn, "EVAL_EPSILON", 0.0)
    flags = {"total_timesteps": 1_000, "learning_starts": 100, "gamma": 0.9, "exploration_fraction": 0.5}
    flags |= {"batch_size": 16, "learning_rate": 6e-4, "target_network_frequency": 60}
    run = make_run(tmp_path, **flags, checkpoint_frequency=0, eval_episodes=60)
    assert run.finish(dqn.train(run.args, run))["eval_return_mean"] > 0.95


# --- Evaluation -------------------------------------------------------------------------------------------------------


QUIET = rainbow.Args(noisy_nets=False, small_network=True)
NETWORKS = [(dqn, dqn.QNetwork(3), dqn.Args()), (rainbow, rainbow.RainbowNetwork(3, QUIET), QUIET)]


@pytest.mark.parametrize(("script", "network", "args"), NETWORKS)
def test_evaluation_stacks_screens_as_the_memory_does(
    script: ModuleType, network: torch.nn.Module, args: object, play: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every step of three games, black before their starts; and with probability 0.05 it does not look."""
    memory, looked = make_memory(100, 0, NoNoops()), []

    class Remembered(Catch):
        def reset(self, **options: object) -> tuple[np.ndarray, dict]:
            screen, info = super().reset(**options)
            memory.push(screen)
            return screen, info

        def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
            result = super().step(action)
            memory.append(action, *result[1:3], result[0])
            return result

    def act(_: torch.nn.Module, obs: torch.Tensor) -> int:
        looked.append(torch.equal(obs, memory.newest_obs()))
        return 0

    play(script, Remembered)
    monkeypatch.setattr(type(network), "act", act)
    model = {"q_network": network.state_dict()}
    monkeypatch.setattr(script, "EVAL_EPSILON", 0.0)
    script.evaluate(dataclasses.replace(args, eval_episodes=3), model, CPU, None)
    assert looked == [True] * 9
    monkeypatch.undo()
    taken, step = set(), Catch.step
    monkeypatch.setattr(Catch, "step", lambda env, action: taken.add(action) or step(env, action))
    play(script, Catch)
    monkeypatch.setattr(type(network), "act", act)
    looked.clear()
    script.evaluate(dataclasses.replace(args, eval_episodes=500), model, CPU, None)
    assert len(looked) == pytest.approx(0.95 * 1500, abs=5 * (1500 * 0.05 * 0.95) ** 0.5)
    assert taken == {0, 1, 2}


@pytest.mark.parametrize(("script", "network", "args"), NETWORKS)
def test_figures_and_seed_of_an_evaluation(
    script: ModuleType, network: torch.nn.Module, args: object, play: Callable
) -> None:
    """Mean and deviation of three scores by hand; its own seed, for its generator and for the first game alone."""
    returns, seeds, expected = [2.0, 5.0, 11.0], [], np.random.default_rng(1_000_007).bit_generator.state

    class Scores(Catch):
        def reset(self, *, seed: int | None = None, **options: object) -> tuple[np.ndarray, dict]:
            seeds.append(seed)
            assert len(seeds) > 1 or self.rng.bit_generator.state == expected
            return super().reset(**options)

        def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
            screen, _, *rest = super().step(action)
            return screen, returns[len(seeds) - 1] / 3, *rest

    play(script, Scores)
    args = dataclasses.replace(args, seed=7, eval_episodes=3)
    figures = script.evaluate(args, {"q_network": network.state_dict()}, CPU, None)
    assert figures == pytest.approx({"eval_return_mean": 6.0, "eval_return_std": 14**0.5, "eval_episodes": 3})
    assert seeds == [1_000_007, None, None]


@pytest.mark.parametrize(("script", "limit"), [(dqn, 18_000), (rainbow, 108_000)])
def test_evaluation_plays_other_games_than_the_training(
    script: ModuleType, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other seeds of the emulator and other no-ops; sticky actions in both, a limit of minutes in one."""
    made, begun = [], []

    class Short(script.AtariPreprocessing):
        def __init__(self, *args: object):
            super().__init__(*args)
            made.append(self.unwrapped.ale)
            begun.append([])

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
            result = super().reset(seed=seed, options=options)
            begun[-1].append((seed, self.noops))
            return result

        def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
            screen, reward, _, truncated, info = super().step(action)
            return screen, reward, True, truncated, info

    monkeypatch.setattr(script, "AtariPreprocessing", Short)
    flags = {"seed": 2, "total_timesteps": 32, "learning_starts": 32, "eval_episodes": 2, "sticky_actions": 0.25}
    run = make_run(tmp_path, script, env_id="ALE/Breakout-v5", **flags)
    run.finish(script.train(run.args, run))
    (seed, noops), (other_seed, other_noops) = begun[0][0], begun[1][0]
    assert None not in (seed, other_seed)
    later = {seed for games in begun for seed, _ in games[1:]}
    assert later == {None}  # they go on with the first one's random numbers
    assert seed != other_seed
    assert noops != other_noops
    assert [ale.getFloat("repeat_action_probability") for ale in made] == [0.25, 0.25]
    assert made[1].getInt("max_num_frames_per_episode") == limit


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--env-id ALE/Pnog-v5", "did you mean ALE/Pong-v5"),
        ("--env-id Breakout", "ALE/Breakout-v5"),
        ("--env-id CartPole-v1", "--env-id CartPole-v1: no Atari game"),
        ("--buffer-size 36", "--buffer-size 36 >= 37"),
        ("--evaluate breakout.pt --env-id ALE/Pong-v5", "breakout.pt was started with ALE/Breakout-v5"),
        ("--evaluate breakout.pt --sticky-actions 0.25", "--sticky-actions 0.25: breakout.pt was started with 0.0"),
    ],
)
def test_bad_input(
    flags: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = {name: value for name, value in vars(dqn.Args(env_id="ALE/Breakout-v5")).items() if name not in dqn.FREE}
    torch.save({"script": "dqn_atari", "kind": "model", "args": args, "q_network": {}}, "breakout.pt")
    assert expected in message_of(dqn, flags.split(), capsys, monkeypatch)
    assert [path.name for path in tmp_path.iterdir() if path.name != "runs"] == ["breakout.pt"]
