"""PPO on Atari in one file, after Schulman et al. 2017, "Proximal policy optimization algorithms".

    python ppo_atari.py --env-id ALE/Breakout-v5 --seed 2                 # train; curves and weights in runs/
    python ppo_atari.py --env-id ALE/Breakout-v5 --run-name b --resume    # start, or go on after a kill, to the bit
    python ppo_atari.py --evaluate runs/b/model.pt --capture-video        # play with a trained policy

Proximal policy optimisation, the variant with clipping. The numbers recur in `train`, beside the code of each line.

     1  initialise policy pi_theta and value function V_phi
     2  for each iteration:
     3      run pi_theta_old in N environments for T steps
     4      keep states s_t, actions a_t, rewards r_t, values V(s_t), log-probabilities log pi_theta_old(a_t | s_t)
     5      advantages A_t = sum over l of (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
     6      for K epochs, for each minibatch of the shuffled N T steps:
     7          ratio r(theta) = pi_theta(a | s) / pi_theta_old(a | s)
     8          L_CLIP = mean of min(r A, clip(r, 1 - eps, 1 + eps) A)
     9          L = -L_CLIP + c_1 mean of (V_phi(s) - (A + V_old(s)))^2 / 2 - c_2 entropy of pi_theta
    10          one step of Adam down the gradient of L, its norm clipped
    11      the learning rate falls linearly

A state is the last four screens. Policy and value function share all layers but the last.

Differs from the paper:
- A time limit is no terminal state: delta_t takes V of its true last state. A lost life is one, as in OpenAI's code and
  CleanRL, though the game goes on; but the screens before it stay in the state, where theirs begin anew.
- As in OpenAI's code (baselines, ppo2) and CleanRL: K = 4 (the paper's is 3), c_1 = 0.5 on half the squared error (1 on
  the whole), DQN's convolutions and rewards clipped to their sign; Adam's epsilon is 1e-5, advantages are normalised in
  each minibatch, initial weights are orthogonal, the gradient's norm is clipped. The paper lets eps fall with the
  learning rate; theirs does not (ppo2's once did).
- Theirs, but not ours: a time limit that counts as a terminal state; a clipped value loss, which hurts in MuJoCo
  (Andrychowicz et al. 2021, section 3.4); FIRE pressed at a game's start and after a lost life: the policy has to.
- All steps are agent steps of four emulator frames. Screens are made grey before the maximum of two is taken; theirs
  after it.

An evaluation samples its actions from the policy, as the training does, in games of at most five minutes.
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
import ctypes
import dataclasses
import difflib
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
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NoReturn

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
EVAL_MAX_FRAMES = 18_000  # emulator frames of an evaluation game: five minutes at 60 Hz
EVAL_SEED = 1_000_000  # added to the seed: evaluations play other games than the training
LOG_FREQUENCY = 1  # steps between two records of losses: every iteration

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


@dataclasses.dataclass
class Args:
    env_id: str = "ALE/Pong-v5"
    """the game: an Atari environment id"""
    sticky_actions: Fraction = 0.0
    """probability that an emulator frame repeats the last action (Machado et al. 2018 recommend 0.25)"""
    total_timesteps: Count = 10_000_000
    """agent steps (of four frames) of all environments together; the last ones that fill no rollout are left out"""
    learning_rate: Positive = 2.5e-4
    """learning rate of Adam at the beginning; it falls linearly to 0"""
    num_envs: Count = 8
    """N: environments"""
    num_steps: Count = 128
    """T: steps of each environment in a rollout"""
    gamma: Fraction = 0.99
    """discount factor"""
    gae_lambda: Fraction = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: Count = 4
    """minibatches in an epoch"""
    update_epochs: Count = 4
    """K: epochs over a rollout"""
    clip_coef: Positive = 0.1
    """eps: a ratio further than this from 1 has nothing more to gain"""
    ent_coef: NonNegative = 0.01
    """c_2: weight of the entropy"""
    vf_coef: NonNegative = 0.5
    """c_1: weight of the value loss"""
    max_grad_norm: Positive = 0.5
    """largest norm of the gradient"""

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


class StackedScreens(gym.Wrapper):
    """The last four screens of a game, uint8 (84, 84, 4), black before its start: `obs`."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        screen, info = self.env.reset(seed=seed, options=options)
        self.obs = np.zeros((*screen.shape, STACK), np.uint8)
        self.obs[..., -1] = screen
        return self.obs, info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        screen, reward, terminated, truncated, info = self.env.step(action)
        self.obs = np.concatenate([self.obs[..., 1:], screen[..., None]], axis=-1)
        return self.obs, reward, terminated, truncated, info

    def state_dict(self) -> dict:
        return self.env.state_dict() | {"obs": torch.from_numpy(self.obs)}

    def load_state_dict(self, state: dict) -> None:
        self.env.load_state_dict(state)
        self.obs = state["obs"].numpy()


class ActorCritic(nn.Module):
    """pi_theta and V_phi: observations, uint8 (batch, 84, 84, 4), to logits (batch, n_actions) and values (batch,)."""

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
        )
        self.policy, self.value = nn.Linear(512, n_actions), nn.Linear(512, 1)
        gains = {self.policy: 0.01, self.value: 1.0}
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.orthogonal_(layer.weight, gains.get(layer, math.sqrt(2)))
                nn.init.zeros_(layer.bias)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.layers((obs / 255).permute(0, 3, 1, 2))  # screens last in memory: a third faster on a CPU
        return self.policy(features), self.value(features).squeeze(1)

    @torch.inference_mode()
    def act(self, obs: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples actions for observations (batch, 84, 84, 4): actions, log pi(a | s) and V(s), each (batch,)."""
        logits, value = (x.cpu().numpy() for x in self(torch.from_numpy(obs).to(self.value.weight.device)))
        action = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)  # distributed as softmax(logits)
        log_prob = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return action, log_prob[np.arange(len(action)), action], value


def gae(
    reward: np.ndarray,
    terminated: np.ndarray,
    done: np.ndarray,
    value: np.ndarray,
    next_value: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> np.ndarray:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16); all arrays are (T, n_envs), float32.

    `terminated`: s_{t+1} is terminal; `done`: the episode ends there, by that or by a time limit; `next_value` is that
    of the true s_{t+1}, which stands for all that follows a time limit or the rollout's last step.
    """
    delta = reward + gamma * next_value * (1 - terminated) - value
    advantage, following, decay = np.zeros_like(delta), 0.0, gamma * gae_lambda * (1 - done)
    for t in reversed(range(len(delta))):
        following = advantage[t] = delta[t] + decay[t] * following
    return advantage


def clipped_loss(log_ratio: torch.Tensor, advantage: torch.Tensor, clip_coef: float) -> torch.Tensor:
    """-L_CLIP: minus the mean of min(r A, clip(r, 1 - eps, 1 + eps) A), of log r and A, both (batch,)."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage).mean()


def normalise(advantage: torch.Tensor) -> torch.Tensor:
    """Advantages, (batch,), at mean 0 and standard deviation 1."""
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


def diagnostics(
    log_ratio: torch.Tensor, clip_coef: float, value: np.ndarray, target: np.ndarray
) -> dict[str, float | torch.Tensor]:
    """Of the last minibatch (batch,): mean r - 1 - log r, an estimate of KL(pi_old || pi); part of r beyond 1 +- eps.

    Of a rollout (T, n_envs): the part of the targets' variance that the values before the update explain.
    """
    ratio = log_ratio.exp()
    kl, beyond = (ratio - 1 - log_ratio).mean(), ((ratio - 1).abs() > clip_coef).float().mean()
    explained = 1 - (target - value).var() / target.var() if target.var() > 0 else 0.0
    return {"losses/approx_kl": kl, "losses/clipfrac": beyond, "losses/explained_variance": explained}


def train(args: Args, run: Run) -> dict[str, object]:
    """Trains as the listing above says; returns policy and value function."""
    rng, device, envs = run.rng, run.device, [StackedScreens(make_atari(args, run.rng)) for _ in range(args.num_envs)]
    # 1: initialise policy pi_theta and value function V_phi
    actor_critic = ActorCritic(int(envs[0].action_space.n)).to(device)
    adam = torch.optim.Adam(actor_critic.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)

    parts = {"actor_critic": actor_critic, "adam": adam} | {f"env_{i}": env for i, env in enumerate(envs)}
    if not run.restore(**parts):
        for env in envs:
            env.reset(seed=int(rng.integers(2**31)))

    shape = args.num_steps, args.num_envs
    obs = np.zeros((*shape, FRAME_SIZE, FRAME_SIZE, STACK), np.uint8)
    action = np.zeros(shape, np.int64)
    reward, log_prob, value, cut_value, terminal, done = np.zeros((6, *shape), np.float32)
    size = args.num_steps * args.num_envs
    iterations = args.total_timesteps // size
    for step in run.steps(iterations * size, size, actor_critic=actor_critic):  # 2: for each iteration
        # 3: run pi_theta_old in N environments for T steps
        for t in range(args.num_steps):
            # 4: keep states, actions, rewards, values, log-probabilities; a lost life is terminal, but the game goes on
            obs[t] = [env.obs for env in envs]
            action[t], log_prob[t], value[t] = actor_critic.act(obs[t], rng)
            for i, env in enumerate(envs):
                next_obs, score, terminated, truncated, info = env.step(int(action[t, i]))
                reward[t, i], terminal[t, i] = np.sign(score), terminated or info["life_lost"]
                done[t, i] = terminal[t, i] or truncated
                run.count_reward(score, terminated or truncated, i)
                if truncated:
                    cut_value[t, i] = actor_critic.act(next_obs[None], rng)[2].item()
                if terminated or truncated:
                    env.reset()
        # 5: advantages
        last_value = actor_critic.act(np.array([env.obs for env in envs]), rng)[2]
        next_value = np.where(done, cut_value, np.concatenate([value[1:], last_value[None]]))
        advantage = gae(reward, terminal, done, value, next_value, args.gamma, args.gae_lambda)
        target = advantage + value

        # 6: for K epochs, for each minibatch of the shuffled steps
        kept = (torch.from_numpy(x).to(device).flatten(0, 1) for x in (obs, action, log_prob, advantage, target))
        b_obs, b_action, b_log_prob, b_advantage, b_target = kept
        for _ in range(args.update_epochs):
            for index in torch.from_numpy(rng.permutation(size)).to(device).chunk(args.num_minibatches):
                # 7: ratio r(theta)
                logits, new_value = actor_critic(b_obs[index])
                log_probs = logits.log_softmax(dim=1)
                log_ratio = log_probs.gather(1, b_action[index, None]).squeeze(1) - b_log_prob[index]
                # 8: L_CLIP
                policy_loss = clipped_loss(log_ratio, normalise(b_advantage[index]), args.clip_coef)
                # 9: value loss and entropy
                value_loss = F.mse_loss(new_value, b_target[index]) / 2
                entropy = -(log_probs.exp() * log_probs).sum(dim=1).mean()
                loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
                # 10: one step of Adam, the gradient's norm clipped
                adam.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(actor_critic.parameters(), args.max_grad_norm)
                adam.step()
        run.log({"losses/policy_loss": policy_loss, "losses/value_loss": value_loss, "losses/entropy": entropy})
        run.log(diagnostics(log_ratio, args.clip_coef, value, target))
        run.log({"charts/learning_rate": adam.param_groups[0]["lr"]})
        # 11: the learning rate falls linearly
        adam.param_groups[0]["lr"] = args.learning_rate * (1 - step / (iterations * size))

    for env in envs:
        env.close()
    return {"actor_critic": actor_critic}


def evaluate(args: Args, model: dict[str, dict], device: torch.device, folder: Path | None) -> dict[str, float]:
    """Unclipped scores of games from random no-ops, by actions sampled; videos go to a new folder in `folder`."""
    if args.eval_episodes == 0:
        return {}
    rng = np.random.default_rng(args.seed + EVAL_SEED)
    video_dir = folder / f"videos-{time.time():.6f}" if folder and args.capture_video else None
    env = StackedScreens(make_atari(args, rng, video_dir, max_num_frames_per_episode=EVAL_MAX_FRAMES))
    actor_critic = ActorCritic(int(env.action_space.n)).to(device)
    actor_critic.load_state_dict(model["actor_critic"])
    returns = np.zeros(args.eval_episodes)
    for episode in progress_bar(range(args.eval_episodes), desc="evaluation: ", delay=10):
        obs, _ = env.reset(seed=args.seed + EVAL_SEED if episode == 0 else None)
        done = False
        while not done:
            (action,), _, _ = actor_critic.act(obs[None], rng)
            obs, reward, terminated, truncated, _ = env.step(int(action))
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
    size = args.num_envs * args.num_steps
    if size > args.total_timesteps:
        fail(f"--num-envs {args.num_envs} --num-steps {args.num_steps}: a rollout must not exceed --total-timesteps")
    if size % args.num_minibatches or size == args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches}: must divide the {size} steps of a rollout into 2 or more each")
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
