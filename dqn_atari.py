"""DQN on Atari in one file, after Mnih et al. 2015, "Human-level control through deep reinforcement learning".

    python dqn_atari.py --env-id ALE/Breakout-v5 --seed 2                 # train; curves and weights in runs/
    python dqn_atari.py --env-id ALE/Breakout-v5 --run-name b --resume    # start, or go on after a kill, to the bit
    python dqn_atari.py --evaluate runs/b/model.pt --capture-video        # play with a trained network

Deep Q-learning with experience replay. The numbers recur in `train`, beside the code of each line.

     1  initialise replay memory D to capacity N
     2  initialise action-value network Q with random weights
     3  initialise target network Q- with the weights of Q
     4  for each step t:
     5      with probability epsilon select a random action a_t, else a_t = argmax_a Q(phi_t, a)
     6      execute a_t, observe reward r_t and screen x_{t+1}
     7      phi_{t+1} = the last four screens, preprocessed; store (phi_t, a_t, sign of r_t, phi_{t+1}) in D
     8      every fourth step: sample a minibatch of transitions (phi_j, a_j, r_j, phi_{j+1}) from D
     9      y_j = r_j where the episode terminates at j, else r_j + gamma max_a' Q-(phi_{j+1}, a')
    10      one gradient step on the mean of (y_j - Q(phi_j, a_j))^2 by the weights of Q
    11      every C steps Q- = Q

Differs from the paper and its code (DeepMind's, in Lua):
- By default 1,000,000 steps, not 50,000,000, and so Adam on the squared error, updates from step 20,000 on, not 50,000,
  a target network copied every 1,000 steps, not 10,000, and an epsilon that falls sooner and to 0.01, not 0.1. The
  README gives the command line with the paper's own settings: centred RMSProp, the error clipped to [-1, 1]
  (`--loss huber`), an epsilon under the root for gradients that here are averaged over the batch, theirs summed.
- All steps are agent steps of four emulator frames, C's too, as in their code; the paper counts C in updates. Epsilon
  falls from step 0 on; theirs, from the first update. Of equal values the first one counts; theirs draw one.
- A time limit (half an hour; their code has none) is no terminal state: its target bootstraps.
- A lost life is terminal, but its screens stay in the stack and play goes on; theirs ends the action's repetition
  there, blackens the stack and first plays some frames without action.
- Screens are made grey, the maximum of two taken and shrunk by area; theirs: maximum, grey, bilinear.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1",
#     "gymnasium==1.4.0",
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
import difflib
import errno
import functools
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
from typing import Annotated, ClassVar, Literal, NoReturn

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tyro.constructors import PrimitiveConstructorSpec

FRAME_SIZE = 84  # pixels; a preprocessed screen is 84 x 84 grey levels
STACK = 4  # screens in one observation
ACTION_REPEAT = 4  # emulator frames per agent step
NOOP_MAX = 30  # emulator frames without action at the start of a game, at most
EVAL_EPSILON = 0.05
EVAL_MAX_FRAMES = 18_000  # emulator frames of an evaluation game: five minutes at 60 Hz
EVAL_SEED = 1_000_000  # added to the seed: evaluations play other games than the training
LOG_FREQUENCY = 400  # agent steps between two records of losses

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


@dataclasses.dataclass
class Args:
    env_id: str = "ALE/Pong-v5"
    """the game: an Atari environment id"""
    sticky_actions: Fraction = 0.0
    """probability that an emulator frame repeats the last action (Machado et al. 2018 recommend 0.25)"""
    total_timesteps: Count = 1_000_000
    """agent steps to train for (one step is four emulator frames)"""
    learning_rate: Positive = 1e-4
    """learning rate of the optimizer"""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """rmsprop is the paper's: centred, decay 0.95"""
    optimizer_eps: Positive = 1e-8
    """epsilon in the optimizer's denominator: added to the root by adam, under the root by rmsprop"""
    loss: Literal["mse", "huber"] = "mse"
    """the gradient of huber is the paper's error clipped to [-1, 1]"""
    buffer_size: Count = 1_000_000
    """screens in the replay memory, 7,064 bytes each: one a transition, and one more a game"""
    gamma: Fraction = 0.99
    """discount factor"""
    target_network_frequency: Count = 1_000
    """agent steps between two copies of the weights to the target network; 1: no separate target"""
    batch_size: Count = 32
    """transitions in a minibatch"""
    start_e: Fraction = 1.0
    """epsilon of the exploration at the start"""
    end_e: Fraction = 0.01
    """epsilon of the exploration at its end"""
    exploration_fraction: Fraction = 0.1
    """part of the run over which epsilon falls from start to end"""
    learning_starts: Count = 20_000
    """agent steps before the first update"""
    train_frequency: Count = 4
    """agent steps between two updates"""

    # The run
    seed: Natural = 1
    """seed of the weights, of all draws and of the environment"""
    device: Literal[DEVICES] = "auto"
    """auto takes cuda where there is one, or else the CPU"""
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


def area_weights(size: int, new_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """How to shrink an axis of `size` pixels by area: a new pixel is the mean of the size / new_size that it covers.

    For the first, second, ... old pixel that it touches: index, int64 (new_size,), and weight, the part covered.
    """
    scale = size / new_size
    start = np.arange(new_size) * scale
    touched = []
    for offset in range(math.ceil(scale) + 1):
        index = np.floor(start + 1e-9).astype(np.int64) + offset
        covered = np.minimum(index + 1, start + scale) - np.maximum(index, start)
        touched.append((np.minimum(index, size - 1), (covered.clip(0) / scale).astype(np.float32)))
    return touched


class AtariPreprocessing(gym.Wrapper):
    """The preprocessing of Mnih et al. 2015 ("Methods: Preprocessing") around a raw grey-scale Atari environment.

    `reset` plays 0 to 30 frames (by `rng`) without action; `step` repeats an action for 4 frames, adds up their
    rewards and takes the maximum of the last two screens, which removes the flicker of sprites drawn on every other
    frame. Both give one screen, uint8 (84, 84), shrunk by area. `info["life_lost"]` tells whether the step cost a life.
    """

    def __init__(self, env: gym.Env, rng: np.random.Generator):
        super().__init__(env)
        self.rng = rng
        self.noop_max = NOOP_MAX if env.unwrapped.get_action_meanings()[0] == "NOOP" else 0  # two games have none
        height, width = env.observation_space.shape
        self.observation_space = gym.spaces.Box(0, 255, (FRAME_SIZE, FRAME_SIZE), np.uint8)
        self.rows, self.columns = area_weights(height, FRAME_SIZE), area_weights(width, FRAME_SIZE)

    def shrink(self, screen: np.ndarray) -> np.ndarray:
        rows = sum(weight[:, None] * screen[index] for index, weight in self.rows)
        return np.rint(sum(weight * rows[:, index] for index, weight in self.columns)).astype(np.uint8)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        screen, info = self.env.reset(seed=seed, options=options)
        self.start = self.unwrapped.clone_state(include_rng=True)
        self.noops, self.actions = int(self.rng.integers(self.noop_max + 1)), []
        return self.play_noops(screen, info)

    def play_noops(self, screen: np.ndarray, info: dict) -> tuple[np.ndarray, dict]:
        for _ in range(self.noops):
            screen, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                screen, info = self.env.reset()
        self.lives = info["lives"]
        return self.shrink(screen), info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.actions.append(action)
        total_reward, screen = 0.0, None
        for _ in range(ACTION_REPEAT):
            previous = screen
            screen, reward, terminated, truncated, info = self.env.step(action)
            total_reward += reward
            if terminated or truncated:
                break
        info["life_lost"] = info["lives"] < self.lives
        self.lives = info["lives"]
        screen = screen if previous is None else np.maximum(previous, screen)
        return self.shrink(screen), total_reward, terminated, truncated, info

    def state_dict(self) -> dict:
        """The emulator's state at the start of this game, and what was played since. Its state now would not do: ALE
        leaves out the action that sticky actions repeat, and in two games (Qbert, Tetris) a part of the screen."""
        return {"start": self.start.__getstate__(), "noops": self.noops, "actions": self.actions}

    def load_state_dict(self, state: dict) -> None:
        """Plays the game again from its start: in 10 to 20 seconds, if it is one of half an hour, the longest."""
        screen, info = self.env.reset()
        self.start, self.noops, self.actions = ale_py.ALEState(state["start"]), state["noops"], []
        self.unwrapped.restore_state(self.start)
        self.play_noops(screen, info)
        for action in state["actions"]:
            self.step(action)


def make_atari(args: Args, rng: np.random.Generator, video_dir: Path | None = None, **limits: int) -> gym.Env:
    """The game; with a `video_dir`, every episode is recorded there."""
    options = {"frameskip": 1, "obs_type": "grayscale", "repeat_action_probability": args.sticky_actions, **limits}
    env = gym.make(args.env_id, render_mode="rgb_array" if video_dir else None, **options)
    if video_dir:
        env = gym.wrappers.RecordVideo(env, video_dir, episode_trigger=lambda _: True, fps=60, disable_logger=True)
    return AtariPreprocessing(env, rng)


class QNetwork(nn.Module):
    """The paper's network: observations, uint8 (batch, 4, 84, 84), to action values, float32 (batch, n_actions)."""

    def __init__(self, n_actions: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(STACK, 32, kernel_size=8, stride=4),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, kernel_size=4, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, kernel_size=3, stride=1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 512),
            nn.ReLU(inplace=True),
            nn.Linear(512, n_actions),
        )
        self.to(memory_format=torch.channels_last)  # a tenth more steps per second on a CPU

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.layers(obs / 255)

    @torch.inference_mode()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """argmax_a Q(obs, a), int64 (), for one observation, uint8 (1, 4, 84, 84)."""
        return self(obs).argmax()


class FrameMemory:
    """The last `capacity` screens in a ring, each stored once; observations are stacked again when they are sampled.

    An episode of T steps takes T + 1 places, for its last screen is the next observation of its last transition. Beside
    each screen stand the action taken there, its reward, whether it ended in a terminal state, whether there was an
    action at all (not at an episode's last screen) and the number of screens of the same episode before it, up to 3.

    `screens`, uint8 (slots, 84, 84), and `steps`, STEP (slots,), may lie in files. What could be drawn at a checkpoint
    is not overwritten by the next slots - capacity screens, and so a checkpoint holds the count alone.
    """

    STEP: ClassVar = [("action", "u1"), ("reward", "f4"), ("terminated", "?"), ("acted", "?"), ("age", "u1")]

    def __init__(
        self, capacity: int, screens: np.ndarray, steps: np.ndarray, rng: np.random.Generator, device: torch.device
    ):
        self.capacity, self.slots, self.screens, self.steps = capacity, len(screens), screens, steps
        self.rng, self.device = rng, device
        self.count = 0  # screens ever stored; the newest lies at (count - 1) % slots

    def append(self, action: int, reward: float, terminated: bool, next_screen: np.ndarray) -> None:
        """Stores the action taken at the newest screen, what it brought, and the screen after it, uint8 (84, 84)."""
        newest = (self.count - 1) % self.slots
        age = int(self.steps["age"][newest])
        self.steps[newest] = action, reward, terminated, True, age
        self.push(next_screen, age=min(age + 1, STACK - 1))

    def push(self, screen: np.ndarray, age: int = 0) -> None:
        """Stores a screen, uint8 (84, 84): without an age, the first of an episode."""
        self.screens[self.count % self.slots] = screen
        self.steps[self.count % self.slots] = 0, 0.0, False, False, age
        self.count += 1

    def _stack(self, position: np.ndarray, last: int) -> torch.Tensor:
        """Screens from three before `position` to `last` after it, those before the episode's start black, as channels,
        in memory the last axis: the first convolution takes them as they lie."""
        offset = np.arange(1 - STACK, last + 1)
        screens = np.empty((len(position), FRAME_SIZE, FRAME_SIZE, len(offset)), np.uint8)
        for channel, place in enumerate(position + offset[:, None]):
            screens[..., channel] = self.screens[place % self.slots]
        screens = screens.transpose(0, 3, 1, 2)
        screens[-offset > self.steps["age"][position % self.slots, None]] = 0  # before the episode's start
        return torch.from_numpy(screens).to(self.device)

    def newest_obs(self) -> torch.Tensor:
        """The observation that the newest screen completes: uint8 (1, 4, 84, 84)."""
        return self._stack(np.array([self.count - 1]), 0)

    @property
    def oldest(self) -> int:
        """The first screen that may be drawn: the three before it are still there."""
        return self.count - self.capacity + STACK - 1 if self.count > self.capacity else 0

    def draw(self, batch_size: int) -> np.ndarray:
        """Places of transitions, drawn uniformly with replacement: int64 (batch,)."""
        position = self.rng.integers(self.oldest, self.count - 1, batch_size)
        while not (drawable := self.steps["acted"][position % self.slots]).all():
            position[~drawable] = self.rng.integers(self.oldest, self.count - 1, (~drawable).sum())
        return position

    def sample(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        """Transitions drawn uniformly with replacement.

        obs uint8 (batch, 4, 84, 84), action int64 (batch,), reward float32 (batch,), next_obs like obs, terminated
        float32 (batch,), 1 where the target must not bootstrap.
        """
        position = self.draw(batch_size)
        steps, screens = self.steps[position % self.slots], self._stack(position, 1)
        dtypes = {"action": np.int64, "reward": np.float32, "terminated": np.float32}
        action, reward, terminated = (torch.from_numpy(steps[n].astype(t)).to(self.device) for n, t in dtypes.items())
        return screens[:, :-1], action, reward, screens[:, 1:], terminated

    def state_dict(self) -> dict:
        return {"count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]


def td_targets(reward: torch.Tensor, terminated: torch.Tensor, next_q: torch.Tensor, gamma: float) -> torch.Tensor:
    """y = r + gamma max_a' Q-(s', a'), but y = r at a terminal state: float32 (batch,).

    reward and terminated: float32 (batch,); next_q: (batch, actions) of the target network.
    """
    return reward + gamma * (1 - terminated) * next_q.max(dim=1).values


def td_loss(q_value: torch.Tensor, td_target: torch.Tensor, loss: str) -> torch.Tensor:
    """Mean over the batch of (y - Q(s, a))^2 ("mse"), or of half of it with slope 1 from an error of 1 on ("huber").

    q_value (of the action taken) and td_target: float32 (batch,).
    """
    return F.mse_loss(q_value, td_target) if loss == "mse" else F.smooth_l1_loss(q_value, td_target)


class RMSprop(torch.optim.Optimizer):
    """The paper's RMSProp: w -= lr g / sqrt(v - m^2 + eps), m and v running means of g and g^2.

    PyTorch's centred one adds eps outside the root, which is no number where rounding has left v - m^2 negative.
    """

    def __init__(self, weights: Iterable[torch.Tensor], lr: float, eps: float, decay: float = 0.95):
        super().__init__(weights, {"lr": lr, "eps": eps, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state, grad = self.state[weight], weight.grad
                if not state:
                    state["m"], state["v"] = torch.zeros_like(weight), torch.zeros_like(weight)
                m = state["m"].lerp_(grad, 1 - group["decay"])
                v = state["v"].lerp_(grad**2, 1 - group["decay"])
                weight.addcdiv_(grad, (v - m**2).clamp_(min=0).add_(group["eps"]).sqrt_(), value=-group["lr"])


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    """The value at a step: from `start` at step 0 in a straight line to `end` at `duration`, then constant."""
    return end if step >= duration else start + (end - start) * step / duration


def train(args: Args, run: Run) -> dict[str, QNetwork]:
    """Trains as the listing above says; returns Q."""
    rng, device = run.rng, run.device
    env = make_atari(args, rng)
    # 1: initialise replay memory D to capacity N
    most = 2 * args.total_timesteps + STACK + 1  # screens that a run stores: one or two a step
    capacity = min(args.buffer_size, most)
    slots = min(capacity + 2 * (args.checkpoint_frequency or args.total_timesteps), most)
    screens = run.map_file("screens", np.uint8, (slots, FRAME_SIZE, FRAME_SIZE))
    memory = FrameMemory(capacity, screens, run.map_file("steps", FrameMemory.STEP, (slots,)), rng, device)
    # 2: initialise action-value network Q with random weights
    q_network = QNetwork(int(env.action_space.n)).to(device)
    make_optimizer = functools.partial(torch.optim.Adam, fused=True) if args.optimizer == "adam" else RMSprop
    optimizer = make_optimizer(q_network.parameters(), lr=args.learning_rate, eps=args.optimizer_eps)
    # 3: initialise target network Q- with the weights of Q
    target_network = copy.deepcopy(q_network).requires_grad_(False)

    if not run.restore(env=env, memory=memory, q_network=q_network, target_network=target_network, optimizer=optimizer):
        memory.push(env.reset(seed=args.seed)[0])

    # 9, 10, called in the loop: a function, so that a GPU takes it as one CUDA graph
    def update(*minibatch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        obs, actions, rewards, next_obs, terminals = minibatch
        # 9: y_j = r_j at a terminal state, else r_j + gamma max_a' Q-(phi_{j+1}, a')
        with torch.no_grad():
            td_target = td_targets(rewards, terminals, target_network(next_obs), args.gamma)
        # 10: one gradient step
        q_value = q_network(obs).gather(1, actions[:, None]).squeeze(1)
        loss = td_loss(q_value, td_target, args.loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach(), q_value.detach().mean()

    act, update = run.cuda_graph(q_network.act), run.cuda_graph(update, optimizer)
    for step in run.steps(args.total_timesteps, q_network=q_network):  # 4: for each step t
        # 5: with probability epsilon a random action, else the one of the highest value
        epsilon = linear_schedule(args.start_e, args.end_e, args.exploration_fraction * args.total_timesteps, step)
        action = int(rng.integers(env.action_space.n) if rng.random() < epsilon else act(memory.newest_obs()))
        # 6, 7: execute it, store the transition; a lost life is terminal for learning, but the game goes on
        screen, reward, terminated, truncated, info = env.step(action)
        memory.append(action, np.sign(reward), terminated or info["life_lost"], screen)
        run.count_reward(reward, terminated or truncated)
        run.log({"charts/epsilon": epsilon})
        if terminated or truncated:
            memory.push(env.reset()[0])

        if step >= args.learning_starts and step % args.train_frequency == 0:
            # 8: sample a minibatch; 9, 10: one gradient step
            loss, q_value = update(*memory.sample(args.batch_size))
            run.log({"losses/td_loss": loss, "losses/q_values": q_value})

        # 11: every C steps Q- = Q
        if step % args.target_network_frequency == 0:
            target_network.load_state_dict(q_network.state_dict())

    env.close()
    return {"q_network": q_network}


def evaluate(args: Args, model: dict[str, dict], device: torch.device, folder: Path | None) -> dict[str, float]:
    """Unclipped scores of games from random no-ops, with epsilon 0.05; videos go to a new folder in `folder`."""
    if args.eval_episodes == 0:
        return {}
    rng = np.random.default_rng(args.seed + EVAL_SEED)
    video_dir = folder / f"videos-{time.time():.6f}" if folder and args.capture_video else None
    env = make_atari(args, rng, video_dir, max_num_frames_per_episode=EVAL_MAX_FRAMES)
    q_network = QNetwork(int(env.action_space.n)).to(device)
    q_network.load_state_dict(model["q_network"])
    returns = np.zeros(args.eval_episodes)
    for episode in progress_bar(range(args.eval_episodes), desc="evaluation: ", delay=10):
        screen, _ = env.reset(seed=args.seed + EVAL_SEED if episode == 0 else None)
        obs, done = np.zeros((1, STACK, FRAME_SIZE, FRAME_SIZE), np.uint8), False
        while not done:
            obs = np.concatenate([obs[:, 1:], screen[None, None]], axis=1)
            random = rng.random() < EVAL_EPSILON
            action = rng.integers(env.action_space.n) if random else q_network.act(torch.from_numpy(obs).to(device))
            screen, reward, terminated, truncated, _ = env.step(int(action))
            returns[episode] += reward
            done = terminated or truncated
    env.close()
    return {"eval_return_mean": returns.mean(), "eval_return_std": returns.std(), "eval_episodes": len(returns)}


def check(args: Args) -> str:
    """Refuses what only this script can refuse; returns the name of what it trains on."""
    if args.capture_video:
        importlib.import_module("moviepy")  # fails now, not after the training
    if getattr(gym.registry.get(args.env_id), "entry_point", None) != "ale_py.env:AtariEnv":
        games = [name for name in gym.registry if name.startswith("ALE/")]
        near = difflib.get_close_matches(args.env_id, games, cutoff=0.4) or ["ALE/Pong-v5"]
        fail(f"--env-id {args.env_id}: no Atari game of this name; did you mean {', '.join(near)}?")
    least = args.batch_size + STACK + 1
    if not args.batch_size <= args.learning_starts <= args.total_timesteps or args.buffer_size < least:
        given = f"--batch-size {args.batch_size} <= --learning-starts {args.learning_starts}"
        given += f" <= --total-timesteps {args.total_timesteps}"
        fail(f"must be {given}, and --buffer-size {args.buffer_size} >= {least}")
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
