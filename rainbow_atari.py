"""Rainbow on Atari in one file, after Hessel et al. 2018, "Rainbow: combining improvements in deep RL".

    python rainbow_atari.py --env-id ALE/Breakout-v5 --run-name b             # train; curves and weights in runs/b
    python rainbow_atari.py --env-id ALE/Pong-v5 --no-noisy-nets --n-step 1   # without two of the six tricks
    python rainbow_atari.py --evaluate runs/b/model.pt --capture-video        # play with a trained network

Deep Q-learning with six tricks, each a flag. Without them it trains the weights of dqn_atari.py, bit for bit, if given
`--learning-rate 1e-4 --optimizer-eps 1e-8 --target-network-frequency 1000 --max-grad-norm 1e9`. The numbers recur in
`train`, beside the code of each line.

     1  initialise replay memory D to capacity N
     2  initialise network with random weights: for each action the distribution of its return  --distributional (a)
        a head for the state's value and one for the actions' advantages                        --dueling (b)
     3  initialise target network with the weights of the network
     4  for each step t:
     5      a_t = argmax_a Q(phi_t, a) under fresh noise in the weights of the heads            --noisy-nets (c)
     6      execute a_t, observe reward r_t and screen x_{t+1}
     7      phi_{t+1} = the last four screens, preprocessed; store (phi_t, a_t, sign of r_t, phi_{t+1}) in D
     8      every fourth step: sample transitions j in proportion to p_j                    --prioritised-replay (d)
     9      R = r_j + gamma r_{j+1} + ... and phi_{j+n} of n steps, fewer where it ends          --n-step (e)
        a* = argmax_a Q(phi_{j+n}, a) by the network, its distribution by the target network    --double-q (f)
        shrink it by gamma^n (to 0 at a terminal state), shift it by R, and project it onto the atoms
    10      one gradient step on the mean of w_j times the KL divergence, w_j in proportion to p_j^-beta
        p_j = that KL divergence^0.5; a transition not drawn yet has the largest p so far
    11      every C steps target network = network

(a) Bellemare et al. 2017; (b) Wang et al. 2016; (c) Fortunato et al. 2018; (d) Schaul et al. 2016; (e) Sutton 1988;
(f) van Hasselt et al. 2016.

Differs from the paper:
- Steps are agent steps of four emulator frames. Screens are made grey, then the maximum of two taken and shrunk by
  area; theirs: maximum, grey, bilinear.
- By default 1,000,000 steps, not 50,000,000. beta grows from step 1 to the run's last (DQN Zoo: from the first update).
- A lost life is terminal, as theirs, but leaves its last screens in the next life's first observations.
- As in DeepMind's published code (DQN Zoo) the gradient's norm is clipped to 10, and the loss in a priority to 100.
  (There a priority is of the cross-entropy: more by the entropy of the target, and so nearly the same for all.)
- The noisy last layers' biases start at 0 (DQN Zoo's have no mu): with random ones, one action would be the best in
  nearly every state, by more than the noise.
- A transition with fewer than n steps ahead of it, before an end or the newest screen, is drawn with those it has. At
  the newest screen, and at a time limit, its target bootstraps: neither is a terminal state.
- `--no-distributional` takes the squared error, whose root makes the priority; Schaul's is clipped to [-1, 1].
- The dueling streams' gradient enters the convolutions whole; Wang's, divided by the root of 2.
- Evaluation keeps the noise, as DQN Zoo's does; without noisy nets it acts at random in 5 of 100 steps, as DQN's does,
  and epsilon falls over a tenth of the run (the paper: over 62,500 steps).
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
from collections.abc import Callable, Iterator
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
PRIORITY_EXPONENT = 0.5  # alpha: 0, all transitions alike; 1, in proportion to their loss
WEIGHT_EXPONENT = 0.4  # beta at the start; 1, full correction of the draw's bias, at the end
ATOMS, V_MAX = 51, 10.0  # of a distribution: returns from -V_MAX to V_MAX
EVAL_EPSILON = 0.05  # without noisy nets
EVAL_MAX_FRAMES = 108_000  # emulator frames of an evaluation game: half an hour at 60 Hz
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
    learning_rate: Positive = 6.25e-5
    """learning rate of Adam"""
    optimizer_eps: Positive = 1.5e-4
    """epsilon in Adam's denominator"""
    max_grad_norm: Positive = 10.0
    """longer gradients are shortened to this norm"""
    buffer_size: Count = 1_000_000
    """screens in the replay memory, 7,064 bytes each: one a transition, and one more a game"""
    gamma: Fraction = 0.99
    """discount factor"""
    target_network_frequency: Count = 8_000
    """agent steps between two copies of the weights to the target network; 1: no separate target"""
    batch_size: Count = 32
    """transitions in a minibatch"""
    double_q: bool = True
    """the network chooses the next action, the target network only values it"""
    prioritised_replay: bool = True
    """draw transitions by their last loss, not uniformly"""
    dueling: bool = True
    """estimate a state's value and its actions' advantages in two streams"""
    n_step: Count = 3
    """steps of reward in a target; 1: DQN's"""
    distributional: bool = True
    """learn the distribution of the return, not its mean"""
    noisy_nets: bool = True
    """explore by noise in the weights, not by epsilon"""
    noisy_sigma: Positive = 0.5
    """sigma_0: sigmas start at sigma_0 / sqrt(a layer's inputs) (DQN Zoo, and the paper for noise from a CPU: 0.1)"""
    small_network: bool = False
    """two convolutions and 256 units, for short runs (van Hasselt et al. 2019), instead of DQN's three and 512"""
    start_e: Fraction = 1.0
    """epsilon of the exploration at the start, without noisy nets"""
    end_e: Fraction = 0.01
    """epsilon of the exploration at its end, without noisy nets"""
    exploration_fraction: Fraction = 0.1
    """part of the run over which epsilon falls from start to end, without noisy nets"""
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


class NoisyLinear(nn.Module):
    """A linear layer whose weights and biases are mu + sigma * noise (Fortunato et al. 2018, section 3), drawn at every
    call: f(e_i) f(e_j) for the weight from input i to output j and f(e_j) for the bias, f(e) = sign(e) sqrt(|e|) of
    normal e."""

    def __init__(self, n_inputs: int, n_outputs: int, sigma: float):
        super().__init__()
        self.mu, self.sigma = nn.Linear(n_inputs, n_outputs), nn.Linear(n_inputs, n_outputs)  # mu: uniform, as theirs
        for parameter in self.sigma.parameters():
            nn.init.constant_(parameter, sigma / math.sqrt(n_inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(sum(self.mu.weight.shape), device=x.device)
        noise_out, noise_in = (noise.sign() * noise.abs().sqrt()).split(self.mu.weight.shape)
        if len(x) == 1:  # two products: acting without a matrix of noise is worth 1.07 times as many steps per second
            return self.mu(x) + noise_out * self.sigma(noise_in * x)
        weight = torch.addcmul(self.mu.weight, self.sigma.weight, torch.outer(noise_out, noise_in))
        return F.linear(x, weight, torch.addcmul(self.mu.bias, self.sigma.bias, noise_out))


class RainbowNetwork(nn.Module):
    """Observations, uint8 (batch, 4, 84, 84), to the logits of the return's distribution for every action, float32
    (batch, n_actions, 51); with `--no-distributional`, to its mean, (batch, n_actions, 1)."""

    def __init__(self, n_actions: int, args: Args):
        super().__init__()
        self.output_shape = n_actions, ATOMS if args.distributional else 1
        if args.small_network:
            layers = [nn.Conv2d(STACK, 32, kernel_size=5, stride=5), nn.ReLU(inplace=True)]
            layers += [nn.Conv2d(32, 64, kernel_size=5, stride=5), nn.ReLU(inplace=True)]
            n_features, hidden = 64 * 3 * 3, 256
        else:
            layers = [nn.Conv2d(STACK, 32, kernel_size=8, stride=4), nn.ReLU(inplace=True)]
            layers += [nn.Conv2d(32, 64, kernel_size=4, stride=2), nn.ReLU(inplace=True)]
            layers += [nn.Conv2d(64, 64, kernel_size=3, stride=1), nn.ReLU(inplace=True)]
            n_features, hidden = 64 * 7 * 7, 512
        linear = functools.partial(NoisyLinear, sigma=args.noisy_sigma) if args.noisy_nets else nn.Linear

        def stream(size: int) -> nn.Sequential:
            head = nn.Sequential(linear(n_features, hidden), nn.ReLU(inplace=True), linear(hidden, size))
            if args.noisy_nets:
                nn.init.zeros_(head[-1].mu.bias)  # no action is preferred from the start
            return head

        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        self.advantage = stream(math.prod(self.output_shape))
        self.value = stream(self.output_shape[1]) if args.dueling else None
        self.register_buffer("support", torch.linspace(-V_MAX, V_MAX, ATOMS), persistent=False)
        self.to(memory_format=torch.channels_last)  # a tenth more steps per second on a CPU

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        features = self.convolutions(obs / 255)
        outputs = self.advantage(features).view(-1, *self.output_shape)
        if self.value is not None:  # for each atom, before the softmax
            outputs = outputs - outputs.mean(dim=1, keepdim=True) + self.value(features)[:, None]
        return outputs

    def q_values(self, outputs: torch.Tensor) -> torch.Tensor:
        """Expected returns (batch, n_actions) of what `forward` gives."""
        return outputs.squeeze(2) if self.output_shape[1] == 1 else outputs.softmax(dim=2) @ self.support

    @torch.inference_mode()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """argmax_a Q(obs, a) under fresh noise, int64 (), for one observation, uint8 (1, 4, 84, 84)."""
        return self.q_values(self(obs)).argmax()


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

    def state_dict(self) -> dict:
        return {"count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]


class SumTree:
    """Priorities, float64 (size,), that can be drawn in proportion: every node is the sum of 128 below it.

    So a million take three steps from the root to a leaf, each of all draws at once. Sums are taken anew from the nodes
    below, never adjusted, so that they do not drift.
    """

    FAN_OUT: ClassVar = 128

    def __init__(self, size: int):
        self.levels = []  # from the leaves to the children of the root
        while size > 1:
            size = -(-size // self.FAN_OUT)
            self.levels.append(np.zeros((size, self.FAN_OUT)))

    def set(self, leaf: np.ndarray, priority: np.ndarray | float) -> None:
        """Changes the priorities of leaves, int64 (n,)."""
        self.levels[0].flat[leaf] = priority
        for below, above in itertools.pairwise(self.levels):
            leaf = leaf // self.FAN_OUT
            above.flat[leaf] = below[leaf].sum(axis=1)

    def find(self, fraction: np.ndarray) -> np.ndarray:
        """The leaves, int64 (n,), at fractions of the whole sum, float64 (n,) in [0, 1); none has priority zero."""
        node, rest = np.zeros(len(fraction), np.int64), fraction * self.levels[-1].sum()
        for level in reversed(self.levels):
            reached = level[node].cumsum(axis=1)
            rest = np.minimum(rest, np.nextafter(reached[:, -1], 0))  # for the two sums are rounded in their own ways
            child = (reached <= rest[:, None]).sum(axis=1)
            rest -= np.where(child > 0, reached[np.arange(len(node)), child - 1], 0)
            node = node * self.FAN_OUT + child
        return node


class RainbowMemory(FrameMemory):
    """DQN's memory, read n steps ahead and, if `prioritised`, drawn by priority (Schaul et al. 2016, section 3.3); then
    a checkpoint holds the priorities too."""

    def __init__(self, *ring: object, n_step: int, gamma: float, prioritised: bool):
        super().__init__(*ring)
        self.n_step, self.gamma = n_step, gamma
        self.tree = SumTree(self.slots) if prioritised else None
        self.largest = 1.0  # of all priorities so far: that of a new transition

    def append(self, action: int, reward: float, terminated: bool, next_screen: np.ndarray) -> None:
        super().append(action, reward, terminated, next_screen)
        if self.tree:
            self.tree.set(np.array([(self.count - 2) % self.slots]), self.largest)

    def push(self, screen: np.ndarray, age: int = 0) -> None:
        super().push(screen, age)
        if self.tree:  # what has just become too old: STACK places where the ring first runs over, later one
            self.tree.set(np.arange(self.oldest - STACK, self.oldest) % self.slots, 0.0)

    def draw(self, batch_size: int) -> np.ndarray:
        """Places of transitions, int64 (batch,): one from each of `batch_size` equal parts of the priorities' sum."""
        if not self.tree:
            return super().draw(batch_size)
        return self.tree.find((np.arange(batch_size) + self.rng.random(batch_size)) / batch_size)

    def sample(self, batch_size: int, beta: float) -> tuple[np.ndarray, tuple[torch.Tensor, ...]]:
        """Places of transitions, int64 (batch,), and what begins there:

        obs uint8 (batch, 4, 84, 84), action int64 (batch,), reward float32 (batch,), of up to n steps, discount float32
        (batch,), of what follows them, 0 at a terminal state, next_obs like obs, after them, and weight float32
        (batch,), P(j)^-beta divided by the batch's largest.
        """
        position = self.draw(batch_size)
        ahead = self.steps[(position[:, None] + np.arange(self.n_step)) % self.slots]
        # A window ends at an episode's last screen, at the newest, or after a terminal step
        ahead["acted"][:, 1:] &= ~ahead["terminated"][:, :-1]
        inside = np.logical_and.accumulate(ahead["acted"], axis=1)
        length = inside.sum(axis=1)
        reward = (inside * ahead["reward"] * self.gamma ** np.arange(self.n_step)).sum(axis=1)
        discount = self.gamma**length * ~(inside & ahead["terminated"]).any(axis=1)
        priority = self.tree.levels[0].flat[position] if self.tree else np.ones(batch_size)
        weight = (priority / priority.min()) ** -beta  # (N P)^-beta over its maximum: N and the sum cancel
        action = torch.from_numpy(ahead["action"][:, 0].astype(np.int64)).to(self.device)
        reward, discount, weight = torch.from_numpy(np.array([reward, discount, weight], np.float32)).to(self.device)
        obs, next_obs = (self._stack(place, 0) for place in (position, position + length))
        return position, (obs, action, reward, discount, next_obs, weight)

    def update(self, position: np.ndarray, loss: torch.Tensor) -> None:
        """New priorities from losses, or absolute TD errors, (batch,), of the transitions at these places."""
        if self.tree:
            loss = np.fmin(loss.cpu().numpy().astype(np.float64), 100)  # as DQN Zoo does; nan too, which `log` tells of
            # Rounding may leave a divergence below 0; and without 1e-6, at 0 it would never be drawn again
            priority = (loss.clip(0) + 1e-6) ** PRIORITY_EXPONENT
            self.tree.set(position, priority)
            self.largest = max(self.largest, priority.max().item())

    def state_dict(self) -> dict:
        levels = [torch.from_numpy(level) for level in self.tree.levels] if self.tree else []
        return super().state_dict() | {"levels": levels, "largest": self.largest}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.largest = state["largest"]
        for level, saved in zip(self.tree.levels if self.tree else [], state["levels"], strict=True):
            level[:] = saved.numpy()


def project(atoms: torch.Tensor, probability: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """Shares the probability of every atom among its two neighbours on the support (Bellemare et al. 2017, eq. 7).

    atoms, of any value, clamped to the support's range, and probability: (batch, n); support: (n,), evenly spaced.
    Returns probabilities of the support, (batch, n).
    """
    atoms, spacing = atoms.clamp(support[0], support[-1]), support[1] - support[0]
    distance = (atoms[:, None, :] - support[None, :, None]).abs() / spacing  # (batch, to, from)
    return torch.einsum("btf,bf->bt", (1 - distance).clamp(min=0), probability)


def targets(reward: torch.Tensor, discount: torch.Tensor, chosen: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """Distribution of R + discount Z(s', a*), (batch, 51), or its mean, (batch, 1), from the target network's outputs
    `chosen` at s' and a*, (batch, 51) or (batch, 1); reward and discount: float32 (batch,)."""
    if chosen.shape[1] == 1:
        return reward[:, None] + discount[:, None] * chosen
    return project(reward[:, None] + discount[:, None] * support, chosen.softmax(dim=1), support)


def losses(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """D_KL(target || softmax of outputs), both (batch, 51), or squared error of values, (batch, 1): float32 (batch,)"""
    if outputs.shape[1] == 1:
        return (outputs - target).squeeze(1) ** 2
    return F.kl_div(outputs.log_softmax(dim=1), target, reduction="none").sum(dim=1)


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    """The value at a step: from `start` at step 0 in a straight line to `end` at `duration`, then constant."""
    return end if step >= duration else start + (end - start) * step / duration


def train(args: Args, run: Run) -> dict[str, RainbowNetwork]:
    """Trains as the listing above says; returns the network."""
    rng, device = run.rng, run.device
    env = make_atari(args, rng)
    # 1: initialise replay memory D to capacity N
    most = 2 * args.total_timesteps + STACK + 1  # screens that a run stores: one or two a step
    capacity = min(args.buffer_size, most)
    slots = min(capacity + 2 * (args.checkpoint_frequency or args.total_timesteps), most)
    screens = run.map_file("screens", np.uint8, (slots, FRAME_SIZE, FRAME_SIZE))
    ring = capacity, screens, run.map_file("steps", FrameMemory.STEP, (slots,)), rng, device
    memory = RainbowMemory(*ring, n_step=args.n_step, gamma=args.gamma, prioritised=args.prioritised_replay)
    # 2: initialise the network with random weights
    q_network = RainbowNetwork(int(env.action_space.n), args).to(device)
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, eps=args.optimizer_eps, fused=True)
    # 3: initialise target network with the weights of the network
    target_network = copy.deepcopy(q_network).requires_grad_(False)

    if not run.restore(env=env, memory=memory, q_network=q_network, target_network=target_network, optimizer=optimizer):
        memory.push(env.reset(seed=args.seed)[0])

    # Called in the loop; a function, so that a GPU takes it as one CUDA graph
    def update(*minibatch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        obs, actions, rewards, discounts, next_obs, weights = minibatch
        each = torch.arange(args.batch_size, device=device)
        # 9, its second half: a* by double Q-learning, its distribution shrunk, shifted and projected
        with torch.no_grad():
            next_outputs = target_network(next_obs)
            best = q_network.q_values(q_network(next_obs) if args.double_q else next_outputs).argmax(dim=1)
            target = targets(rewards, discounts, next_outputs[each, best], q_network.support)
        # 10: one gradient step
        outputs = q_network(obs)[each, actions]
        loss = losses(outputs, target)
        optimizer.zero_grad()
        (weights * loss).mean().backward()
        nn.utils.clip_grad_norm_(q_network.parameters(), args.max_grad_norm)
        optimizer.step()
        return loss.detach(), q_network.q_values(outputs.detach()[:, None]).mean()

    act, update = run.cuda_graph(q_network.act), run.cuda_graph(update, optimizer)
    for step in run.steps(args.total_timesteps, q_network=q_network):  # 4: for each step t
        # 5: the action of the highest value under fresh noise; without noise, a random one with probability epsilon
        decay = args.exploration_fraction * args.total_timesteps
        epsilon = 0.0 if args.noisy_nets else linear_schedule(args.start_e, args.end_e, decay, step)
        action = int(rng.integers(env.action_space.n) if rng.random() < epsilon else act(memory.newest_obs()))
        # 6, 7: execute it, store the transition; a lost life is terminal for learning, but the game goes on
        screen, reward, terminated, truncated, info = env.step(action)
        memory.append(action, np.sign(reward), terminated or info["life_lost"], screen)
        run.count_reward(reward, terminated or truncated)
        run.log({"charts/epsilon": epsilon})
        if terminated or truncated:
            memory.push(env.reset()[0])

        if step >= args.learning_starts and step % args.train_frequency == 0:
            # 8, and 9 up to phi_{j+n}: sample by priority, with the rewards of n steps
            beta = linear_schedule(WEIGHT_EXPONENT, 1.0, args.total_timesteps, step)
            places, minibatch = memory.sample(args.batch_size, beta)
            # 10: one gradient step, and new priorities; of a squared error the root, |TD error|
            loss, q_value = update(*minibatch)
            memory.update(places, loss if args.distributional else loss.sqrt())
            run.log({"losses/td_loss": loss.mean(), "losses/q_values": q_value})

        # 11: every C steps target network = network
        if step % args.target_network_frequency == 0:
            target_network.load_state_dict(q_network.state_dict())

    env.close()
    return {"q_network": q_network}


def evaluate(args: Args, model: dict[str, dict], device: torch.device, folder: Path | None) -> dict[str, float]:
    """Unclipped scores of games from random no-ops, with noise (without: epsilon 0.05); videos go to a new folder."""
    if args.eval_episodes == 0:
        return {}
    rng, epsilon = np.random.default_rng(args.seed + EVAL_SEED), 0.0 if args.noisy_nets else EVAL_EPSILON
    torch.manual_seed(args.seed + EVAL_SEED)
    video_dir = folder / f"videos-{time.time():.6f}" if folder and args.capture_video else None
    env = make_atari(args, rng, video_dir, max_num_frames_per_episode=EVAL_MAX_FRAMES)
    q_network = RainbowNetwork(int(env.action_space.n), args).to(device)
    q_network.load_state_dict(model["q_network"])
    returns = np.zeros(args.eval_episodes)
    for episode in progress_bar(range(args.eval_episodes), desc="evaluation: ", delay=10):
        screen, _ = env.reset(seed=args.seed + EVAL_SEED if episode == 0 else None)
        obs, done = np.zeros((1, STACK, FRAME_SIZE, FRAME_SIZE), np.uint8), False
        while not done:
            obs = np.concatenate([obs[:, 1:], screen[None, None]], axis=1)
            random = rng.random() < epsilon
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
    least = max(args.batch_size, args.n_step) + STACK + 1
    if not args.batch_size <= args.learning_starts <= args.total_timesteps or args.buffer_size < least:
        given = f"--batch-size {args.batch_size} <= --learning-starts {args.learning_starts}"
        given += f" <= --total-timesteps {args.total_timesteps}"
        given += f", and --buffer-size {args.buffer_size} >= {least}, for --batch-size and --n-step {args.n_step}"
        fail(f"must be {given}")
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
