"""Tests of dqn_atari.py against independent oracles; each says what it compares with."""

import json
import pickle
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from common import message_of
from hypothesis import given, settings
from hypothesis import strategies as st

import dqn_atari as dqn

CPU = torch.device("cpu")


# --- Environment ------------------------------------------------------------------------------------------------------


class NoNoops:
    """Stands in for the generator of the no-ops: none."""

    def integers(self, _: int) -> int:
        return 0


@pytest.mark.parametrize("game", ["Pong", "Breakout", "SpaceInvaders", "BeamRider", "MsPacman"])
def test_preprocessing_equals_ale_vector_env(game: str) -> None:
    """Frame by frame against ALE's own preprocessing in C++, across life losses and a game over.

    The screen at a game over is left out: there ALE hands out the step before. No target ever looks at it.
    """
    rom = {"SpaceInvaders": "space_invaders", "BeamRider": "beam_rider", "MsPacman": "ms_pacman"}.get(
        game, game.lower()
    )
    theirs = ale_py.AtariVectorEnv(rom, num_envs=1, noop_max=0, use_fire_reset=False, reward_clipping=False)
    ours = dqn.AtariPreprocessing(
        gym.make(f"ALE/{game}-v5", repeat_action_probability=0.0, **dqn.RAW_SCREENS), NoNoops()
    )
    obs, _ = theirs.reset(seed=3)
    frame, _ = ours.reset(seed=3)
    memory = dqn.ReplayMemory(10_000, 0, NoNoops(), CPU)
    memory.begin_episode(frame)
    rng = np.random.default_rng(0)
    over, games, lives_lost = False, 0, 0
    while games < 2:
        action = int(rng.integers(ours.action_space.n))
        obs, their_reward, their_terminated, _, their_info = theirs.step(np.array([action]))
        if over:  # their next step starts the next game
            frame, _ = ours.reset()
            memory.begin_episode(frame)
            over, games = False, games + 1
        else:
            frame, reward, over, _, info = ours.step(action)
            memory.append(action, reward, over, frame)
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
    frame, _ = env.reset()
    assert frame.shape == (84, 84)
    assert (frame == 0).all()
    frame, reward, terminated, truncated, info = env.step(0)  # raw frames 1 to 4; a life is lost in the fourth
    assert (frame == 4).all()
    assert (reward, terminated, truncated, info["life_lost"]) == (2.0, False, False, True)
    frame, reward, terminated, truncated, info = env.step(0)  # 5 to 8
    assert (reward, terminated, truncated, info["life_lost"]) == (2.0, False, False, False)
    frame, reward, terminated, truncated, info = env.step(0)  # 9 and 10: the game ends within the repetition
    assert (frame == 10).all()
    assert (reward, terminated, truncated) == (1.0, True, False)
    env = dqn.AtariPreprocessing(ScriptedLives("33333", truncated_at=3), NoNoops())
    env.reset()
    assert env.step(0)[1:4] == (1.5, False, True)


def test_noops_are_drawn_from_0_to_30() -> None:
    env = dqn.AtariPreprocessing(ScriptedLives("3" * 40), np.random.default_rng(0))
    assert {int(env.reset()[0][0, 0]) for _ in range(1000)} == set(range(31))


def test_sticky_actions_and_time_limit_reach_the_emulator() -> None:
    args = dqn.Args(sticky_actions=0.25)
    assert dqn.make_env(args, NoNoops()).unwrapped.ale.getFloat("repeat_action_probability") == 0.25
    env = dqn.make_eval_env(args, NoNoops(), Path())
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == 0.25
    assert env.unwrapped.ale.getInt("max_num_frames_per_episode") == 18_000


@pytest.mark.parametrize("game", ["Pong", "Breakout", "Qbert", "Tetris"])
def test_emulator_state_goes_on_as_if_never_stopped(game: str) -> None:
    """At many moments, with actions that stick nearly always, and in a game whose emulator state is incomplete."""
    args = dqn.Args(env_id=f"ALE/{game}-v5", sticky_actions=0.9)
    env, restored = (dqn.make_env(args, np.random.default_rng(0)) for _ in range(2))
    env.reset(seed=1)
    restored.reset(seed=2)
    rng = np.random.default_rng(2)
    for _ in range(12):
        for _ in range(rng.integers(1, 40)):
            if env.step(int(rng.integers(4)))[2]:
                env.reset()
        for _ in range(rng.integers(20)):  # whatever came before
            restored.step(0)
        restored.set_state(pickle.loads(pickle.dumps(env.get_state())))
        for _ in range(6):
            action = int(rng.integers(4))
            (frame, *rest), (restored_frame, *restored_rest) = env.step(action), restored.step(action)
            assert (frame == restored_frame).all()
            assert rest == restored_rest
            if rest[1]:
                env.reset()
                break


# --- Replay memory ----------------------------------------------------------------------------------------------------


class NaiveMemory:
    """Stores whole stacks, with a flag for each screen in use; the oracle of the ring."""

    def __init__(self, capacity: int):
        self.capacity, self.transitions, self.screens = capacity, [], 0

    def begin_episode(self, frame: np.ndarray) -> None:
        self.stack = [np.zeros_like(frame)] * 3 + [frame]
        self.age = 0
        self.screens += 1

    def append(self, action: int, reward: float, terminated: bool, frame: np.ndarray) -> None:
        next_stack = [*self.stack[1:], frame]
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
    memory, naive = dqn.ReplayMemory(capacity, spare, rng, CPU), NaiveMemory(capacity)
    shade = 0
    for length in episodes:
        for t in range(length + 1):
            shade += 1
            frame = np.full((84, 84), shade % 251 + 1, np.uint8)
            if t == 0:
                memory.begin_episode(frame)
                naive.begin_episode(frame)
            else:
                transition = (int(rng.integers(18)), float(rng.integers(-1, 2)), t == length and shade % 2 == 0, frame)
                memory.append(*transition)
                naive.append(*transition)
                assert (memory.newest_obs().numpy()[0] == np.array(naive.stack)).all()
    expected = {key(*transition[:5]) for transition in naive.drawable()}
    drawn = set()
    for _ in range(10):
        obs, action, reward, next_obs, terminated = memory.sample(100)
        drawn |= {key(*parts) for parts in zip(obs, action, reward, terminated, next_obs, strict=True)}
    assert drawn == expected


def test_replay_draws_uniformly() -> None:
    memory = dqn.ReplayMemory(1000, 0, np.random.default_rng(0), CPU)
    memory.begin_episode(np.zeros((84, 84), np.uint8))
    for action in range(100):
        memory.append(action, 0.0, False, np.zeros((84, 84), np.uint8))
    counts = np.bincount(np.concatenate([memory.sample(1000)[1].numpy() for _ in range(50)]), minlength=100)
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 150  # 99 degrees of freedom: exceeded with a probability of 0.001


def test_what_a_checkpoint_refers_to_outlives_the_spare_places(tmp_path: Path) -> None:
    """A memory restored from its file, after as many further screens as there are spare places, holds the same."""
    capacity, spare = 20, 7
    memory = dqn.ReplayMemory(capacity, spare, np.random.default_rng(0), CPU, tmp_path / "frames")

    def grow(count: int) -> None:
        for _ in range(count):
            memory.append(memory.count % 18, 1.0, False, np.full((84, 84), memory.count % 256, np.uint8))

    memory.begin_episode(np.zeros((84, 84), np.uint8))
    grow(90)
    state = memory.state_dict()
    memory.rng = np.random.default_rng(1)
    before = memory.sample(200)
    for _ in range(spare):
        grow(1)
        restored = dqn.ReplayMemory(capacity, spare, np.random.default_rng(1), CPU, tmp_path / "frames")
        restored.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(before, restored.sample(200), strict=True))
    grow(1)  # one screen more than there is room for: the oldest that the checkpoint refers to is gone
    oldest = state["count"] - capacity
    assert memory.frames[oldest % (capacity + spare), 0, 0] != oldest


# --- The update -------------------------------------------------------------------------------------------------------


def test_update_equals_hand_calculation() -> None:
    """Six transitions: ordinary, terminal, truncated (bootstraps like an ordinary one), with rewards -1, 0 and 1."""
    reward = torch.tensor([1.0, 0.0, -1.0, 1.0, 0.0, -1.0])
    terminated = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    next_q_values = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.25], [9.0, 9.0], [9.0, 9.0], [-2.0, -4.0]])
    td_target = dqn.td_targets(reward, terminated, next_q_values, gamma=0.5)
    assert td_target.tolist() == [2.0, 1.5, -0.75, 1.0, 0.0, -2.0]

    q_value = torch.tensor([2.0, 1.0, 0.25, 3.0, 0.0, -2.5], requires_grad=True)  # y - Q: 0, 0.5, -1, -2, 0, 0.5
    loss = dqn.td_loss(q_value, td_target, "mse")
    assert loss.item() == pytest.approx((0.25 + 1 + 4 + 0.25) / 6)
    loss.backward()
    torch.testing.assert_close(q_value.grad, torch.tensor([0.0, -1.0, 2.0, 4.0, 0.0, -1.0]) / 6)

    q_value.grad = None
    loss = dqn.td_loss(q_value, td_target, "huber")
    assert loss.item() == pytest.approx((0.125 + 0.5 + 1.5 + 0.125) / 6)
    loss.backward()  # the paper's error, clipped to [-1, 1]
    torch.testing.assert_close(q_value.grad, torch.tensor([0.0, -0.5, 1.0, 1.0, 0.0, -0.5]) / 6)


def test_network_is_the_papers() -> None:
    """Against the same network written with torch.nn.functional in float64; uint8 in, scaled inside."""
    network = dqn.QNetwork(6)
    shapes = [tuple(parameter.shape) for parameter in network.parameters() if parameter.dim() > 1]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (6, 512)]
    obs = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    (w1, b1, w2, b2, w3, b3, w4, b4, w5, b5) = [parameter.double() for parameter in network.parameters()]
    f = torch.nn.functional
    x = f.relu(f.conv2d(obs.double() / 255, w1, b1, stride=4))
    x = f.relu(f.conv2d(x, w2, b2, stride=2))
    x = f.relu(f.conv2d(x, w3, b3)).flatten(1)
    expected = f.relu(x @ w4.T + b4) @ w5.T + b5
    torch.testing.assert_close(network(obs).double(), expected, rtol=1e-4, atol=1e-5)
    network.features.to(torch.bfloat16)
    assert network(obs).dtype == torch.float32
    torch.testing.assert_close(network(obs).double(), expected, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_step_equals_textbook_optimizer(optimizer: str, dtype: torch.dtype) -> None:
    """Two steps against the optimizer's formula in NumPy; in bfloat16 the float32 weights still move by the formula."""
    args = dqn.Args(optimizer=optimizer, learning_rate=1e-3, optimizer_eps=0.1)
    network = torch.nn.Linear(3, 2, bias=False)
    weights = [parameter.detach().clone() for parameter in network.parameters()]
    network.to(dtype)
    step = dqn.make_optimizer(args, weights)
    x = torch.tensor([[1.0, -2.0, 0.5], [0.25, 1.0, 4.0]], dtype=dtype)
    w, m, v = weights[0].double().numpy().copy(), 0.0, 0.0
    for t in (1, 2):
        loss = (network(x) ** 2).sum().float()
        dqn.gradient_step(loss, network, weights, step)
        grad = network.weight.grad.double().numpy()
        if optimizer == "adam":
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            w = w - 1e-3 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 0.1)
        else:
            m, v = 0.95 * m + 0.05 * grad, 0.95 * v + 0.05 * grad**2
            w = w - 1e-3 * grad / np.sqrt(v - m**2 + 0.1)
        np.testing.assert_allclose(weights[0].numpy(), w, rtol=1e-4, atol=1e-6)
        assert torch.equal(network.weight.data, weights[0].to(dtype))


def test_schedule() -> None:
    epsilons = [dqn.linear_schedule(1.0, 0.1, 100, step) for step in (0, 50, 100, 1000)]
    assert epsilons == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert dqn.linear_schedule(1.0, 0.1, 0, 0) == 0.1


# --- It learns --------------------------------------------------------------------------------------------------------


class Catch(gym.Env):
    """A ball falls through seven rows of a 7 x 7 board; the paddle in the last row moves left, stays or moves right.

    Screens of 84 x 84 with the interface of AtariPreprocessing. The return is 1 for a ball caught, -1 for one missed.
    """

    observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def screen(self) -> np.ndarray:
        board = np.zeros((7, 7), np.uint8)
        board[self.row, self.column] = 255
        board[6, self.paddle] = 255
        return board.repeat(12, axis=0).repeat(12, axis=1)

    def reset(self, **_: object) -> tuple[np.ndarray, dict]:
        self.row, self.column, self.paddle = 0, int(self.rng.integers(7)), int(self.rng.integers(7))
        return self.screen(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.paddle = min(6, max(0, self.paddle + action - 1))
        self.row += 1
        over = self.row == 6
        reward = (1.0 if self.column == self.paddle else -1.0) if over else 0.0
        return self.screen(), reward, over, False, {"life_lost": False}


def test_it_learns_to_catch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's own loop, network, replay and update reach a near-perfect score from screens."""
    monkeypatch.setattr(dqn, "make_env", lambda args, rng: Catch(rng))
    monkeypatch.setattr(dqn, "make_eval_env", lambda args, rng, video_dir: Catch(rng))
    monkeypatch.setattr(dqn, "EVAL_EPSILON", 0.0)
    args = dqn.Args(
        **{"runs_dir": tmp_path, "run_name": "catch", "total_timesteps": 6_000, "learning_starts": 500, "gamma": 0.9},
        **{
            "exploration_fraction": 0.5,
            "target_network_frequency": 200,
            "checkpoint_frequency": 0,
            "eval_episodes": 100,
        },
    )
    dqn.train(args)
    assert json.loads((tmp_path / "catch" / "result.json").read_text())["eval_return_mean"] > 0.95


class Ends(Catch):
    """Every third step loses a life, every sixth ends by a time limit, every twelfth in a terminal state instead."""

    t = 0

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        truncated, terminated = self.t % 12 == 6, self.t % 12 == 0
        return self.screen(), 5.0, terminated, truncated, {"life_lost": self.t % 6 == 3}


def test_terminal_states_and_rewards_that_the_loop_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost life and a game's end are terminal, a time limit is not; rewards are clipped, scores are not."""
    monkeypatch.setattr(dqn, "make_env", lambda args, rng: Ends(rng))
    stored = []
    append = dqn.ReplayMemory.append
    monkeypatch.setattr(
        dqn.ReplayMemory, "append", lambda memory, *row: stored.append(row[1:3]) or append(memory, *row)
    )
    args = dqn.Args(runs_dir=tmp_path, run_name="ends", total_timesteps=48, learning_starts=48, eval_episodes=0)
    args.checkpoint_frequency = 0
    monkeypatch.setattr(dqn, "make_eval_env", lambda args, rng, video_dir: Ends(rng))
    dqn.train(args)
    assert [bool(terminated) for _, terminated in stored] == [t % 6 == 3 or t % 12 == 0 for t in range(1, 49)]
    assert {reward for reward, _ in stored} == {1.0}
    assert json.loads((tmp_path / "ends" / "result.json").read_text())["train_return_mean"] == 30.0


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--env-id ALE/Pnog-v5", "did you mean ALE/Pong-v5"),
        ("--env-id Breakout", "ALE/Breakout-v5"),
        ("--env-id CartPole-v1", "not an Atari game"),
        ("--train-frequency 0", "--train-frequency 0"),
        ("--target-network-frequency 0", "--target-network-frequency 0"),
        ("--start-e 1.5", "--start-e 1.5: must lie in [0, 1]"),
        ("--end-e -0.1", "--end-e -0.1"),
        ("--exploration-fraction nan", "--exploration-fraction nan"),
        ("--sticky-actions 25", "--sticky-actions 25"),
        ("--optimizer sgd", "choose one of adam, rmsprop"),
        ("--loss mae", "choose one of mse, huber"),
        ("--precision float16", "choose one of auto, float32, bfloat16"),
        ("--evaluate breakout.pt --env-id ALE/Freeway-v5", "was trained on ALE/Breakout-v5"),
        ("--evaluate breakout.pt --env-id ALE/Pong-v5", "was trained on ALE/Breakout-v5"),
    ],
)
def test_bad_input(
    flags: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = {"env_id": "ALE/Breakout-v5", "sticky_actions": 0.0}
    torch.save({"script": "dqn_atari", "kind": "model", "args": args, "n_actions": 4, "weights": {}}, "breakout.pt")
    assert expected in message_of(dqn, flags.split(), capsys, monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["breakout.pt"]
