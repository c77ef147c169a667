"""DDPG on continuous control in one file, after Lillicrap et al. 2016, "Continuous control with deep reinforcement
learning".

    python ddpg_continuous.py --env-id Hopper-v5 --seed 2                   # train; curves and weights in runs/
    python ddpg_continuous.py --env-id Hopper-v5 --run-name h --resume      # start, or go on after a kill, to the bit
    python ddpg_continuous.py --evaluate runs/h/model.pt --capture-video    # act with a trained network

Deep deterministic policy gradient. The numbers recur in `train`, beside the code of each line.

     1  initialise critic Q_phi and actor pi_theta with random weights
     2  initialise targets phi' = phi, theta' = theta
     3  initialise replay memory R
     4  for each episode:
     5      initialise a random process N for exploration
     6      observe the first state s_1
     7      for each step t:
     8          select action a_t = pi_theta(s_t) + eps_t, eps_t from N
     9          execute a_t, observe reward r_t and state s_{t+1}
    10          store (s_t, a_t, r_t, s_{t+1}) in R
    11          sample a minibatch of transitions (s_i, a_i, r_i, s_{i+1}) from R
    12          y_i = r_i + gamma Q_phi'(s_{i+1}, pi_theta'(s_{i+1}))
    13          critic: one step down the gradient of the mean of (y_i - Q_phi(s_i, a_i))^2 by phi
    14          actor: one step up the mean of [grad_theta pi_theta(s_i)]^T grad_a Q_phi(s_i, a) at a = pi_theta(s_i)
    15          theta' = tau theta + (1 - tau) theta', and phi' likewise

Differs from the paper:
- A terminal state has no value: y_i = r_i there. A time limit is no terminal state: its target bootstraps.
- The first actions are uniform, with no update meanwhile (`--learning-starts`); actions are clipped to their bounds.
- Networks, rates and noise are those of Fujimoto's repository (sfujim/TD3, OurDDPG.py). Its process N is Gaussian,
  independent from step to step: line 5 has nothing to do. The paper: batch normalisation, 400 and 300 units, actions
  from the critic's second layer on, small last layers, rates of 1e-4 and 1e-3, tau 0.001, batches of 64, weight decay
  in the critic, Ornstein-Uhlenbeck noise.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[classic-control,mujoco]==1.4.0",
#     "moviepy==2.2.1",
#     "mujoco==4.0.0",
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
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tyro.constructors import PrimitiveConstructorSpec

with contextlib.suppress(ImportError):  # Gymnasium's model of HalfCheetah has an attribute that MuJoCo 4 deprecates
    import mujoco

    mujoco.set_mju_user_warning(lambda text: None if "deprecated" in text else print(text, file=sys.stderr))

EVAL_SEED = 1_000_000  # added to the seed: evaluations play other episodes than the training
EVAL_MAX_STEPS = 100_000  # evaluation episodes without a time limit end there
LOG_FREQUENCY = 1_000  # steps between two records of losses


@dataclasses.dataclass
class Args:
    env_id: str = "HalfCheetah-v5"
    """with vectors of observations and of bounded float actions; MODULE:NAME imports one of yours"""
    total_timesteps: Count = 1_000_000
    """steps to train for"""
    learning_rate: Positive = 3e-4
    """learning rate of Adam for actor and critic"""
    hidden_sizes: tuple[Count, Count] = (256, 256)
    """units in the two hidden layers of actor and critic"""
    buffer_size: Count = 1_000_000
    """transitions in the replay memory"""
    gamma: Fraction = 0.99
    """discount factor"""
    tau: Fraction = 0.005
    """part of the way that the targets go to the networks at each update"""
    batch_size: Count = 256
    """transitions in a minibatch"""
    exploration_noise: NonNegative = 0.1
    """standard deviation of the noise, in units of half the range of each action"""
    learning_starts: Count = 25_000
    """steps with random actions before the first update"""

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


class Rescaled(gym.Wrapper):
    """Actions in [-1, 1] in every dimension; float32 observations, the newest of which is `obs`.

    A checkpoint holds how the episode began and what was done since, and plays it again; `--resume` ends where that
    comes out otherwise. So all randomness must come from `np_random`, and nothing else outlast an episode.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.low, self.high = np.float64(env.action_space.low), np.float64(env.action_space.high)
        self.action_space = gym.spaces.Box(-1, 1, env.action_space.shape)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self.env.reset(seed=seed)
        self.start, self.actions, self.episodic_return = self.unwrapped.np_random.bit_generator.state, [], 0.0
        obs, info = self.env.reset(options=options)
        self.take(obs)
        return self.obs, info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Takes actions, float32 (d_action,); beyond [-1, 1] they count as its ends."""
        scaled = (self.low + (action + 1) / 2 * (self.high - self.low)).clip(self.low, self.high)
        obs, reward, terminated, truncated, info = self.env.step(scaled.astype(self.env.action_space.dtype))
        reward = self.take(obs, reward, scaled)
        self.actions.append(action.copy())
        self.episodic_return += reward
        return self.obs, reward, bool(terminated), bool(truncated), info

    def take(self, obs: object, reward: object = 0.0, action: object = None) -> float:
        """Keeps the observation and returns the reward; ends the program where they are not numbers as they must be."""
        with np.errstate(over="ignore"):
            self.obs, reward = np.array(obs, np.float32), np.asarray(reward, np.float64)
        shaped = self.obs.shape == self.observation_space.shape and reward.size == 1
        if not (shaped and np.isfinite(self.obs).all() and abs(reward.item()) < 1e38):  # float32 ends at 3e38
            when = "on reset" if action is None else f"and reward {reward} for action {action}"
            hint = "" if action is None or np.isfinite(action).all() else "; try a lower --learning-rate"
            must = f"must be {self.observation_space.shape[0]} finite numbers" + " and one" * (action is not None)
            fail(f"--env-id {self.spec.id}: gave observation {self.obs} {when}; {must}{hint}")
        return reward.item()

    def state_dict(self) -> dict:
        actions = torch.from_numpy(np.array(self.actions, np.float32))
        return {"start": self.start, "actions": actions, "obs": self.obs.tolist(), "return": self.episodic_return}

    def load_state_dict(self, state: dict) -> None:
        self.env.reset(seed=0)
        self.unwrapped.np_random.bit_generator.state = state["start"]
        self.reset()
        for action in state["actions"].numpy():
            self.step(action)
        if (self.obs.tolist(), self.episodic_return) != (state["obs"], state["return"]):
            fail(f"--resume: {self.spec.id} does not play an episode again as it was; its runs can only start anew")


def make_env(args: Args, video_dir: Path | None = None) -> gym.Env:
    """The environment; with a `video_dir`, every episode is recorded there, without a screen."""
    if "DISPLAY" not in os.environ and sys.platform == "linux":
        os.environ |= {"SDL_VIDEODRIVER": "dummy", "MUJOCO_GL": "egl"} | os.environ
    if not re.fullmatch(r"(\w[\w.]*:)?[^:]+", args.env_id):
        fail(f"--env-id {args.env_id}: must be NAME or MODULE:NAME")
    atari = "; for Atari take a script whose name ends in _atari" * ("ALE/" in args.env_id)
    try:
        env = gym.make(args.env_id, **({"render_mode": "rgb_array"} if video_dir else {}))
    except (ImportError, gym.error.Error) as error:
        hint = " (PYTHONPATH names a module's folder)" * (":" in args.env_id and isinstance(error, ImportError))
        fail(f"--env-id {args.env_id}: {error}{hint}{atari}")
    spaces = env.observation_space, env.action_space
    vectors = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces)
    if not (vectors and spaces[1].is_bounded() and np.issubdtype(spaces[1].dtype, np.floating)):
        hint = atari or "; gymnasium.wrappers such as FlattenObservation and TransformAction change them"
        fail(f"--env-id {args.env_id}: needs vectors (Box): observations and bounded float actions, not {spaces}{hint}")
    env = Rescaled(env)
    if video_dir:
        renderer = getattr(env.unwrapped, "mujoco_renderer", None)
        if renderer and renderer.camera_id == -1:  # Gymnasium 1.4.0 lets a robot run out of the picture
            renderer.camera_id = mujoco.mj_name2id(renderer.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        env = gym.wrappers.RecordVideo(env, video_dir, episode_trigger=lambda _: True, disable_logger=True)
    return env


class Actor(nn.Sequential):
    """pi_theta: observations (batch, d_obs) to actions in [-1, 1], (batch, d_action)."""

    def __init__(self, d_obs: int, d_action: int, hidden_sizes: tuple[int, int]):
        first, second = hidden_sizes
        hidden = nn.Linear(d_obs, first), nn.ReLU(inplace=True), nn.Linear(first, second), nn.ReLU(inplace=True)
        super().__init__(*hidden, nn.Linear(second, d_action), nn.Tanh())

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """pi(obs) for one observation, float32 (d_obs,) to (d_action,)."""
        return self(torch.from_numpy(obs).to(self[0].weight.device)).cpu().numpy()


class Critic(nn.Sequential):
    """Q_phi: observations (batch, d_obs) and actions in [-1, 1], (batch, d_action), to values (batch,)."""

    def __init__(self, d_obs: int, d_action: int, hidden_sizes: tuple[int, int]):
        first, second = hidden_sizes
        hidden = nn.Linear(d_obs + d_action, first), nn.ReLU(inplace=True), nn.Linear(first, second)
        super().__init__(*hidden, nn.ReLU(inplace=True), nn.Linear(second, 1))

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.cat([obs, action], dim=1)).squeeze(1)


def as_vector(network: nn.Module) -> nn.Parameter:
    """The weights of a network as one vector, of which they become views: for Adam, norms and averages one tensor.

    Their gradients are views of its `grad`: `grad.zero_()` clears them; after any `zero_grad` they would learn no more.
    """
    parameters = list(network.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    vector = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    vector.grad = torch.zeros_like(vector)
    for parameter, weight, grad in zip(parameters, vector.data.split(sizes), vector.grad.split(sizes), strict=True):
        parameter.data, parameter.grad = weight.view_as(parameter), grad.view_as(parameter)
    return vector


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


def actor_loss(actor: nn.Module, critic: nn.Module, obs: torch.Tensor) -> torch.Tensor:
    """-mean Q(s, pi(s)), whose gradient by theta is -mean [grad_theta pi(s)]^T grad_a Q(s, a) at a = pi(s)."""
    return -critic(obs, actor(obs)).mean()


def train(args: Args, run: Run) -> dict[str, Actor]:
    """Trains as the listing above says; returns the actor."""
    rng, device, env = run.rng, run.device, make_env(args)
    d_obs, d_action = env.observation_space.shape[0], env.action_space.shape[0]
    # 1: initialise critic Q_phi and actor pi_theta with random weights
    actor, critic = (network(d_obs, d_action, args.hidden_sizes).to(device) for network in (Actor, Critic))
    # 2: initialise targets phi' = phi, theta' = theta
    target_actor, target_critic = copy.deepcopy(actor), copy.deepcopy(critic)
    theta, phi, target_theta, target_phi = map(as_vector, (actor, critic, target_actor, target_critic))
    actor_adam = torch.optim.Adam([theta], lr=args.learning_rate, fused=True)
    critic_adam = torch.optim.Adam([phi], lr=args.learning_rate, fused=True)
    # 3: initialise replay memory R
    slots = min(args.buffer_size + (args.checkpoint_frequency or args.total_timesteps), args.total_timesteps)
    rows = run.map_file("transitions", np.float32, (slots, 2 * d_obs + d_action + 2))
    memory = ReplayMemory(args.buffer_size, rows, d_obs, rng, device)

    networks = {"actor": actor, "critic": critic, "target_actor": target_actor, "target_critic": target_critic}
    if not run.restore(env=env, memory=memory, actor_adam=actor_adam, critic_adam=critic_adam, **networks):
        env.reset(seed=int(rng.integers(2**31)))  # 4, 6: the first episode and its first state

    # 12 to 15, called in the loop: a function, so that a GPU takes it as one CUDA graph
    def update(*minibatch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        obs, action, reward, terminated, next_obs = minibatch
        # 12: y_i = r_i + gamma Q_phi'(s_{i+1}, pi_theta'(s_{i+1})), but y_i = r_i at a terminal state
        with torch.no_grad():
            y = reward + args.gamma * (1 - terminated) * target_critic(next_obs, target_actor(next_obs))
        # 13: critic, one step down the gradient of the mean of (y_i - Q_phi(s_i, a_i))^2
        q_value = critic(obs, action)
        critic_loss = F.mse_loss(q_value, y)
        phi.grad.zero_()
        critic_loss.backward()
        critic_adam.step()
        # 14: actor, one step up the mean of Q_phi(s_i, pi_theta(s_i)) by theta
        policy_loss = actor_loss(actor, critic, obs)
        theta.grad.zero_()
        policy_loss.backward(inputs=list(actor.parameters()))  # none for the critic
        actor_adam.step()
        # 15: theta' = tau theta + (1 - tau) theta', phi' likewise
        target_theta.data.lerp_(theta.data, args.tau)
        target_phi.data.lerp_(phi.data, args.tau)
        return critic_loss.detach(), q_value.detach().mean(), policy_loss.detach()

    update = run.cuda_graph(update, critic_adam, actor_adam)
    for step in run.steps(args.total_timesteps, actor=actor):  # 7: for each step t
        # 8: select action a_t = pi_theta(s_t) + eps_t
        obs = env.obs
        noise = args.exploration_noise * rng.standard_normal(d_action)
        action = (actor.act(obs) + noise).clip(-1, 1) if step > args.learning_starts else rng.uniform(-1, 1, d_action)
        # 9: execute it, observe reward and state
        next_obs, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
        run.count_reward(reward, terminated or truncated)
        # 10: store the transition; the end by a time limit is no terminal state
        memory.append(obs, action, reward, terminated, next_obs)
        if terminated or truncated:
            env.reset()  # 4, 6: the next episode and its first state

        if step >= args.learning_starts:
            # 11: sample a minibatch; 12 to 15: learn from it
            critic_loss, q_value, policy_loss = update(*memory.sample(args.batch_size))
            run.log({"losses/qf1_loss": critic_loss, "losses/qf1_values": q_value, "losses/actor_loss": policy_loss})

    env.close()
    return {"actor": actor}


def evaluate(args: Args, model: dict[str, dict], device: torch.device, folder: Path | None) -> dict[str, float]:
    """Returns of whole episodes with the actor's own actions, without noise; videos go to a new folder in `folder`."""
    if args.eval_episodes == 0:
        return {}
    env = make_env(args, folder / f"videos-{time.time():.6f}" if folder and args.capture_video else None)
    actor = Actor(env.observation_space.shape[0], env.action_space.shape[0], args.hidden_sizes).to(device)
    actor.load_state_dict(model["actor"])
    returns = np.zeros(args.eval_episodes)
    for episode in progress_bar(range(args.eval_episodes), desc="evaluation: ", delay=10):
        obs, _ = env.reset(seed=args.seed + EVAL_SEED if episode == 0 else None)
        for _ in range(EVAL_MAX_STEPS):
            obs, reward, terminated, truncated, _ = env.step(actor.act(obs))
            returns[episode] += reward
            if terminated or truncated:
                break
    env.close()
    return {"eval_return_mean": returns.mean(), "eval_return_std": returns.std(), "eval_episodes": len(returns)}


def check(args: Args) -> str:
    """Refuses what only this script can refuse; returns the name of what it trains on."""
    if not args.batch_size <= args.learning_starts <= args.total_timesteps or args.buffer_size < args.batch_size:
        given = f"--batch-size {args.batch_size} <= --learning-starts {args.learning_starts}"
        given += f" <= --total-timesteps {args.total_timesteps}"
        fail(f"must be {given}, and --buffer-size {args.buffer_size} >= {args.batch_size}")
    if args.capture_video:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
            try:
                with make_env(args, Path(folder) / "videos") as env:
                    env.reset()
            except Exception as error:  # every renderer has its own
                sys.unraisablehook = lambda _: None  # and some raise another when they are deleted
                hint = "; install libEGL" * ("egl" in repr(error))
                fail(f"--capture-video: {args.env_id} cannot be drawn here ({error!r}){hint}")
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
