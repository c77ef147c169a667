"""Q-learning with function approximation in one file, after Watkins 1989 and Sutton and Barto 2018, chapters 9 to 11.

    python q_learning.py                                          # Mountain Car with tile coding, in minutes
    python q_learning.py --run-name m --resume                    # start, or go on after a kill, to the bit
    python q_learning.py --evaluate runs/m/model.pt               # act with trained weights

The numbers recur in `train`, beside the code of each line.

     1  initialise Q_theta
     2  for each step:
     3      a behaviour policy, epsilon-greedy here, gives (s, a, s', r)
     4      theta = theta - alpha (Q_theta(s, a) - r - gamma max_a' Q_theta(s', a')) grad_theta Q_theta(s, a)

Q is linear in features of s (`--features raw`, `rbf`, `tiles`), with weights for each action, or a network (`mlp`).
Features of `rbf` and `tiles` have a length of about 1, so that alpha is the part of an error that its update removes:
with n tilings, alpha here is alpha / n on features of 0 and 1, the book's rule. Linear weights begin at 0, which is
optimistic where rewards are negative: it explores without an epsilon (elsewhere, as in CartPole, give `--start-e 1`;
`mlp` wants an alpha of some ten-thousandths).

A terminal state has no value. A time limit is no terminal state: its target goes on with max_a' Q(s', a').

DQN's two ideas are switches: `--replay` takes line 4's mean over a minibatch of past transitions, from
the first step on, and `--target-network` takes max_a' from older weights, copied every so many steps.

Differs from the book: its Mountain Car learns by Sarsa and has no time limit (`--max-episode-steps`); of equal values
the first action is taken, not any of them; the radial basis functions are random cosines (Rahimi and Recht 2007).

`--env-id Baird-v0 --learning-rate 0.01 --gamma 0.99 --total-timesteps 10000` is Baird's star (Baird 1995; Sutton and
Barto 2018, equation 11.9): line 4 for state values, in expectation, swept over seven states, and off-policy: for
max_a' it takes the target policy, which always goes to state 7. Rewards are 0 and weights could say so, and yet they
grow without bound, at any learning rate. A gamma below 0.88 mends it (0.8 soon, 0.87 slowly); so does
`--target-network` with copies 77 or more sweeps apart, but slowly: the values grow until sweep 2,000 or 3,000, and then
fall. There are no features, no exploration and no episodes: their flags have no effect.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[classic-control,mujoco]==1.4.0",
#     "matplotlib==3.11.2",
#     "moviepy==2.2.1",
#     "numpy==2.4.6",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///

from __future__ import annotations

import contextlib
import copy
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
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tyro.constructors import PrimitiveConstructorSpec

EVAL_SEED = 1_000_000  # added to the seed: evaluations play other episodes than the training
EVAL_MAX_STEPS = 100_000  # evaluation episodes without a time limit end there
LOG_FREQUENCY = 100  # steps between two records of losses


@dataclasses.dataclass
class Args:
    env_id: str = "MountainCar-v0"
    """an environment with vectors of observations and finitely many actions, or Baird-v0"""
    max_episode_steps: Natural = 0
    """time limit of an episode, in steps; 0: its own (Mountain Car's 200 end most first episodes before the goal)"""
    total_timesteps: Count = 100_000
    """steps to train for; in Baird-v0, sweeps"""
    features: Literal["raw", "rbf", "tiles", "mlp"] = "tiles"
    """what Q is linear in, or mlp: a network of the scaled observation"""
    tilings: Count = 8
    """tilings, each shifted against the others: a power of 2, best at least 4 times the dimensions of an observation"""
    tiles: Count = 8
    """tiles of a tiling in each dimension"""
    rbf_features: Count = 400
    """random cosines, whose inner products are near Gaussian radial basis functions (Rahimi and Recht 2007)"""
    hidden_sizes: tuple[Count, Count] = (120, 84)
    """units in the two hidden layers of the mlp"""
    learning_rate: Positive = 0.3
    """alpha: step size"""
    gamma: Fraction = 1.0
    """discount factor"""
    start_e: Fraction = 0.0
    """epsilon of the exploration at the start"""
    end_e: Fraction = 0.0
    """epsilon of the exploration at its end"""
    exploration_fraction: Fraction = 0.5
    """part of the run over which epsilon falls from start to end"""
    replay: bool = False
    """learn from minibatches of past transitions"""
    buffer_size: Count = 10_000
    """transitions that the replay memory holds"""
    batch_size: Count = 128
    """transitions in a minibatch"""
    target_network: bool = False
    """take the values of next states from older weights"""
    target_network_frequency: Count = 500
    """steps between two updates of the target network"""

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


class Repeatable(gym.Wrapper):
    """float32 observations, the newest of which is `obs`.

    A checkpoint holds how the episode began and what was done since, and plays it again; `--resume` ends where that
    comes out otherwise. So all randomness must come from `np_random`, and nothing else outlast an episode.
    """

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self.env.reset(seed=seed)
        self.start, self.actions, self.episodic_return = self.unwrapped.np_random.bit_generator.state, [], 0.0
        obs, info = self.env.reset(options=options)
        self.take(obs)
        return self.obs, info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        reward = self.take(obs, reward, action)
        self.actions.append(action)
        self.episodic_return += reward
        return self.obs, reward, bool(terminated), bool(truncated), info

    def take(self, obs: object, reward: object = 0.0, action: object = None) -> float:
        """Keeps the observation and returns the reward; ends the program where they are not numbers as they must be."""
        with np.errstate(over="ignore"):
            self.obs, reward = np.array(obs, np.float32), np.asarray(reward, np.float64)
        shaped = self.obs.shape == self.observation_space.shape and reward.size == 1
        if not (shaped and np.isfinite(self.obs).all() and abs(reward.item()) < 1e38):  # float32 ends at 3e38
            when = "on reset" if action is None else f"and reward {reward} for action {action}"
            must = f"must be {self.observation_space.shape[0]} finite numbers" + " and one" * (action is not None)
            fail(f"--env-id {self.spec.id}: gave observation {self.obs} {when}; {must}")
        return reward.item()

    def state_dict(self) -> dict:
        episode = {"start": self.start, "actions": self.actions}
        return episode | {"obs": self.obs.tolist(), "return": self.episodic_return}

    def load_state_dict(self, state: dict) -> None:
        self.env.reset(seed=0)
        self.unwrapped.np_random.bit_generator.state = state["start"]
        self.reset()
        for action in state["actions"]:
            self.step(action)
        if (self.obs.tolist(), self.episodic_return) != (state["obs"], state["return"]):
            fail(f"--resume: {self.spec.id} does not play an episode again as it was; its runs can only start anew")


def make_discrete_env(args: Args, video_dir: Path | None = None) -> gym.Env:
    """The environment; with a `video_dir`, every episode is recorded there, without a screen."""
    if "DISPLAY" not in os.environ and sys.platform == "linux":
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    if not re.fullmatch(r"(\w[\w.]*:)?[^:]+", args.env_id):
        fail(f"--env-id {args.env_id}: must be NAME or MODULE:NAME")
    atari = "; for Atari take a script whose name ends in _atari" * ("ALE/" in args.env_id)
    options = {"render_mode": "rgb_array"} if video_dir else {}
    try:
        env = gym.make(args.env_id, max_episode_steps=args.max_episode_steps or None, **options)
    except (ImportError, gym.error.Error) as error:
        hint = " (PYTHONPATH names a module's folder)" * (":" in args.env_id and isinstance(error, ImportError))
        fail(f"--env-id {args.env_id}: {error}{hint}{atari}")
    spaces = env.observation_space, env.action_space
    vector = isinstance(spaces[0], gym.spaces.Box) and len(spaces[0].shape) == 1
    if not (vector and isinstance(spaces[1], gym.spaces.Discrete) and spaces[1].start == 0):
        must = "needs vectors (Box) of observations and Discrete actions from 0"
        fail(f"--env-id {args.env_id}: {must}, not {spaces}{atari}")
    env = Repeatable(env)
    if video_dir:
        env = gym.wrappers.RecordVideo(env, video_dir, episode_trigger=lambda _: True, disable_logger=True)
    return env


class Scaled(nn.Module):
    """Observations (batch, d_obs) to [-1, 1] in every dimension, between the bounds of their space, and clipped there.

    Where a bound is missing, as of CartPole's velocities, or both are equal, -3 and 3 are taken.
    """

    def __init__(self, space: gym.spaces.Box):
        super().__init__()
        finite = (space.high < 1e6) & (space.low > -1e6) & (space.low < space.high)
        low, high = np.where(finite, space.low, -3), np.where(finite, space.high, 3)
        self.register_buffer("low", torch.tensor(low, dtype=torch.float32))
        self.register_buffer("high", torch.tensor(high, dtype=torch.float32))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return (2 * (obs - self.low) / (self.high - self.low) - 1).clamp(-1, 1)


class Raw(nn.Module):
    """The scaled observation and a 1, at a length of at most 1: (batch, d_obs + 1)."""

    def __init__(self, d_obs: int, args: Args):
        super().__init__()
        self.n_features = d_obs + 1

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return F.pad(z, (0, 1), value=1.0) / math.sqrt(self.n_features)


class RandomFourier(nn.Module):
    """Random Fourier features of Gaussian kernels (Rahimi and Recht 2007): sqrt(2 / n) cos(w z + b).

    For a kernel of width h, w is normal with standard deviation 1 / h and b uniform. Each of `WIDTHS`, in units in
    which an observation has a range of 2, is the width of half of the features.
    """

    WIDTHS = (0.1, 0.3)

    def __init__(self, d_obs: int, args: Args):
        super().__init__()
        self.n_features = n = args.rbf_features
        widths = torch.tensor(self.WIDTHS).repeat(math.ceil(n / len(self.WIDTHS)))[:n]
        self.register_buffer("w", torch.randn(d_obs, n) / widths)
        self.register_buffer("b", 2 * math.pi * torch.rand(n))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return math.sqrt(2 / self.n_features) * (z @ self.w + self.b).cos()


class TileCoding(nn.Module):
    """Of each of n tilings the tile that an observation lies in (Sutton and Barto 2018, section 9.5.4).

    A tile is as wide as 1 / tiles of the range. Tiling i is shifted by i / n of a tile times 1, 3, 5, ... in the first,
    second, third, ... dimension. The feature of a tile is 1 / sqrt(n) inside and 0 elsewhere.
    """

    def __init__(self, d_obs: int, args: Args):
        super().__init__()
        self.tilings, self.tiles = args.tilings, args.tiles
        self.n_features = self.tilings * (self.tiles + 1) ** d_obs
        shift = torch.arange(self.tilings)[:, None] * torch.arange(1, 2 * d_obs, 2) / self.tilings % 1
        self.register_buffer("shift", shift)
        self.register_buffer("stride", (self.tiles + 1) ** torch.arange(d_obs))

    def active(self, z: torch.Tensor) -> torch.Tensor:
        """Indices of the active tiles, int64 (batch, tilings)."""
        place = ((z[:, None] + 1) / 2 * self.tiles + self.shift).long()
        first = torch.arange(self.tilings, device=z.device) * (self.n_features // self.tilings)
        return first + (place * self.stride).sum(dim=2)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        features = torch.zeros(len(z), self.n_features, device=z.device)
        return features.scatter_(1, self.active(z), 1 / math.sqrt(self.tilings))


class QFunction(nn.Module):
    """Q_theta: observations (batch, d_obs) to action values (batch, n_actions)."""

    def __init__(self, args: Args, env: gym.Env):
        super().__init__()
        d_obs, n_actions, (first, second) = env.observation_space.shape[0], int(env.action_space.n), args.hidden_sizes
        if args.features == "mlp":
            hidden = nn.Linear(d_obs, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU()
            layers = *hidden, nn.Linear(second, n_actions)
        else:
            features = {"raw": Raw, "rbf": RandomFourier, "tiles": TileCoding}[args.features](d_obs, args)
            layers = features, nn.Linear(features.n_features, n_actions, bias=False)
            nn.init.zeros_(layers[-1].weight)
        self.layers = nn.Sequential(Scaled(env.observation_space), *layers)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.layers(obs)

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> int:
        """argmax_a Q(s, a) for one observation, float32 (d_obs,)."""
        return int(self(torch.from_numpy(obs)[None].to(next(self.parameters()).device)).argmax())


class ReplayMemory:
    """The last `capacity` transitions in a ring: rows of s_t, a_t, r_t, whether s_{t+1} is terminal, s_{t+1}.

    `rows`, float32 (slots, 2 d_obs + d_action + 2), may lie in a file. What could be drawn at a checkpoint is not
    overwritten by the next slots - capacity transitions, and so a checkpoint holds the count alone.
    """

    def __init__(self, capacity: int, rows: np.ndarray, d_obs: int, rng: np.random.Generator, device: torch.device):
        self.capacity, self.rows, self.rng, self.device = capacity, rows, rng, device
        self.widths = [d_obs, rows.shape[1] - 2 * d_obs - 2, 1, 1, d_obs]
        self.count = 0  # transitions ever stored

    def append(
        self, obs: np.ndarray, action: np.ndarray, reward: float, terminated: bool, next_obs: np.ndarray
    ) -> None:
        np.concatenate([obs, action, (reward, terminated), next_obs], out=self.rows[self.count % len(self.rows)])
        self.count += 1

    def sample(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        """Transitions drawn uniformly with replacement, float32.

        obs (batch, d_obs), action (batch, d_action), reward (batch,), terminated (batch,), next_obs (batch, d_obs).
        """
        position = self.rng.integers(max(0, self.count - self.capacity), self.count, batch_size)
        rows = torch.from_numpy(np.take(self.rows, position % len(self.rows), axis=0)).to(self.device)
        obs, action, reward, terminated, next_obs = rows.split(self.widths, dim=1)
        return obs, action, reward.squeeze(1), terminated.squeeze(1), next_obs

    def state_dict(self) -> dict:
        return {"count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    """The value at a step: from `start` at step 0 in a straight line to `end` at `duration`, then constant."""
    return end if step >= duration else start + (end - start) * step / duration


def td_gradient_step(q: nn.Module, q_value: torch.Tensor, target: torch.Tensor, learning_rate: float) -> torch.Tensor:
    """Line 4: theta -= alpha times the batch's mean of (Q(s, a) - y) grad Q(s, a); returns the mean of (Q - y)^2.

    `q_value` (batch,) is a function of theta, the weights of `q`; `target`, y (batch,), is not.
    """
    q.zero_grad()
    loss = F.mse_loss(q_value, target)
    (loss / 2).backward()
    for weight in q.parameters():
        weight.data.sub_(weight.grad, alpha=learning_rate)
    return loss


def baird_features() -> torch.Tensor:
    """Of Baird's seven states, double (7, 8): v(s) = 2 w_s + w_8 in the states 1 to 6, w_7 + 2 w_8 in the state 7."""
    features = torch.cat([2 * torch.eye(7), torch.ones(7, 1)], dim=1).double()
    features[6, 6:] = torch.tensor([1.0, 2.0])
    return features


def sweep_baird(args: Args, run: Run) -> dict[str, nn.Module]:
    """Line 4 for v, in expectation over Baird's seven states, from w = (1, 1, 1, 1, 1, 1, 10, 1); returns v.

    The target policy always goes to state 7; the behaviour policy visits all states equally often.
    """
    features = baird_features()
    value = nn.Linear(8, 1, bias=False).double()
    value.weight.data[0] = torch.tensor([1.0] * 6 + [10.0, 1.0])
    target_value = copy.deepcopy(value) if args.target_network else value
    run.restore(value=value, target_value=target_value)
    for step in run.steps(args.total_timesteps, value=value):
        with torch.no_grad():
            target = args.gamma * target_value(features[6]).expand(7)
        loss = td_gradient_step(value, value(features).squeeze(1), target, args.learning_rate)
        if step % args.target_network_frequency == 0:
            target_value.load_state_dict(value.state_dict())
        rms = value(features).square().mean().sqrt()
        run.log({"losses/td_loss": loss, "losses/value_rms": rms, "charts/w_8": value.weight[0, 7]})
    return {"value": value}


def surface(q_function: QFunction) -> Figure:
    """The cost to go, -max_a Q(s, a), over two-dimensional observations, as in Sutton and Barto's figure 10.1."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    low, high = q_function.layers[0].low, q_function.layers[0].high
    x, y = (torch.linspace(low[i], high[i], 60, device=low.device) for i in (0, 1))
    with torch.no_grad():
        cost = -q_function(torch.cartesian_prod(x, y)).amax(dim=1).view(60, 60).T
    figure.colorbar(axes.pcolormesh(*(array.cpu().numpy() for array in (x, y, cost))))
    axes.set(xlabel="first dimension", ylabel="second dimension", title="cost to go")
    return figure


def train(args: Args, run: Run) -> dict[str, nn.Module]:
    """Trains as the listing above says; returns Q."""
    if args.env_id == "Baird-v0":
        return sweep_baird(args, run)
    rng, device, env = run.rng, run.device, make_discrete_env(args)
    # 1: initialise Q_theta
    q_function = QFunction(args, env).to(device)
    target_network = copy.deepcopy(q_function) if args.target_network else q_function
    d_obs = env.observation_space.shape[0]
    capacity = args.buffer_size if args.replay else 1
    slots = min(capacity + (args.checkpoint_frequency or args.total_timesteps), args.total_timesteps)
    memory = ReplayMemory(capacity, run.map_file("transitions", np.float32, (slots, 2 * d_obs + 3)), d_obs, rng, device)

    if not run.restore(env=env, memory=memory, q_function=q_function, target_network=target_network):
        env.reset(seed=int(rng.integers(2**31)))

    pictured = {2**k for k in range(8, 62)} | {args.total_timesteps}  # steps with a picture of the cost to go
    for step in run.steps(args.total_timesteps, q_function=q_function):  # 2: for each step
        # 3: the behaviour policy gives (s, a, s', r)
        epsilon = linear_schedule(args.start_e, args.end_e, args.exploration_fraction * args.total_timesteps, step)
        obs = env.obs
        action = int(rng.integers(env.action_space.n)) if rng.random() < epsilon else q_function.act(obs)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        memory.append(obs, np.float32([action]), reward, terminated, next_obs)
        run.count_reward(reward, terminated or truncated)
        if terminated or truncated:
            env.reset()
        # 4: theta = theta - alpha (Q(s, a) - r - gamma max_a' Q(s', a')) grad Q(s, a), with --replay its mean
        s, a, r, terminal, s_next = memory.sample(args.batch_size if args.replay else 1)
        with torch.no_grad():
            target = r + args.gamma * (1 - terminal) * target_network(s_next).amax(dim=1)
        q_value = q_function(s).gather(1, a.long()).squeeze(1)
        loss = td_gradient_step(q_function, q_value, target, args.learning_rate)
        if step % args.target_network_frequency == 0:
            target_network.load_state_dict(q_function.state_dict())

        run.log({"losses/td_loss": loss, "losses/q_values": q_value.mean(), "charts/epsilon": epsilon})
        if d_obs == 2 and step in pictured:
            run.writer.add_figure("cost_to_go", surface(q_function), step)

    env.close()
    return {"q_function": q_function}


def evaluate(args: Args, model: dict[str, dict], device: torch.device, folder: Path | None) -> dict[str, float]:
    """Returns of whole episodes with the greedy policy; of Baird's star, the root mean square of its values."""
    if args.env_id == "Baird-v0":
        return {"value_rms": (baird_features() @ model["value"]["weight"][0]).square().mean().sqrt().item()}
    if args.eval_episodes == 0:
        return {}
    env = make_discrete_env(args, folder / f"videos-{time.time():.6f}" if folder and args.capture_video else None)
    q_function = QFunction(args, env).to(device)
    q_function.load_state_dict(model["q_function"])
    returns = np.zeros(args.eval_episodes)
    for episode in progress_bar(range(args.eval_episodes), desc="evaluation: ", delay=10):
        obs, _ = env.reset(seed=args.seed + EVAL_SEED if episode == 0 else None)
        for _ in range(EVAL_MAX_STEPS):
            obs, reward, terminated, truncated, _ = env.step(q_function.act(obs))
            returns[episode] += reward
            if terminated or truncated:
                break
    env.close()
    return {"eval_return_mean": returns.mean(), "eval_return_std": returns.std(), "eval_episodes": len(returns)}


def check(args: Args) -> str:
    """Refuses what only this script can refuse; returns the name of what it trains on."""
    if args.env_id == "Baird-v0":
        if args.max_episode_steps or args.replay or args.capture_video:
            fail("--env-id Baird-v0: is swept, and has no --max-episode-steps, --replay or --capture-video")
        return args.env_id
    with make_discrete_env(args) as env:
        size = args.tilings * (args.tiles + 1) ** env.observation_space.shape[0]
    if args.features == "tiles" and size > 10**6:
        fail(f"--tilings {args.tilings} --tiles {args.tiles}: make {size:,} features; take fewer, or --features rbf")
    if args.features == "tiles" and args.tilings.bit_count() > 1:
        fail(f"--tilings {args.tilings}: must be a power of 2, for all dimensions to be shifted")
    if args.capture_video:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
            try:
                with make_discrete_env(args, Path(folder) / "videos") as env:
                    env.reset()
            except Exception as error:  # every renderer has its own
                fail(f"--capture-video: {args.env_id} cannot be drawn here ({error!r})")
    return args.env_id


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
