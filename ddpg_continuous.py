"""DDPG on continuous control in one file, after Lillicrap et al. 2016, "Continuous control with deep reinforcement
learning".

    python ddpg_continuous.py --env-id Hopper-v5 --seed 2                   # train; curves and weights in runs/
    python ddpg_continuous.py --env-id Hopper-v5 --run-name h --resume      # start, or go on after a kill, to the bit
    python ddpg_continuous.py --evaluate runs/h/model.pt --capture-video    # act with a trained network

Deep deterministic policy gradient. The numbers stand again in `train`, where each line happens.

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
- Targets can look further ahead than one step (`--n-step`, after Barth-Maron et al. 2018, D4PG): y_i = r_i +
  gamma r_{i+1} + ... + gamma^{n-1} r_{i+n-1} + gamma^n Q_phi'(s_{i+n}, pi_theta'(s_{i+n})). The default is the paper's.
- A terminal state has no value: y_i = r_i there. The end by a time limit is no terminal state: its target bootstraps.
- The first actions are drawn uniformly (`--learning-starts`), and actions are clipped to their bounds.
- The networks, rates and noise of Fujimoto's repository (sfujim/TD3) by default, with a gentle layer normalisation
  (`--layer-norm-eps`) and a tenth of the paper's weight decay; the README has the command line with the paper's own
  settings.
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
#     "tyro==1.0.17",
# ]
# ///

import copy
import dataclasses
import difflib
import importlib.util
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

try:
    import fcntl
except ImportError:  # Windows: runs are not locked
    fcntl = None
try:
    import mujoco
except ImportError:  # only its environments need it
    mujoco = None

SCRIPT = Path(__file__).stem
LOG_FREQUENCY = 1_000  # steps between two records of losses and speed
REPLAY_FILE = "replay.transitions"
FLOAT32_MAX = np.finfo(np.float32).max
OU_KEPT = 0.85  # of its value, an Ornstein-Uhlenbeck process keeps 1 - theta each step; theta = 0.15 in the paper

if mujoco:  # Gymnasium's model of HalfCheetah has an attribute that MuJoCo 4 deprecates
    mujoco.set_mju_user_warning(lambda text: None if "deprecated" in text else print(text, file=sys.stderr))


@dataclasses.dataclass
class Args:
    # The run
    seed: int = 1
    """seed of the weights, the exploration, the replay's draws and the environment"""
    total_timesteps: int = 1_000_000
    """steps to train for"""
    device: str = "auto"
    """auto, cpu, cuda or mps; auto takes cuda or mps where there is one"""
    runs_dir: Path = Path("runs")
    """folder that holds the runs"""
    run_name: str = ""
    """name of this run's folder in the runs' folder; default ENV__SCRIPT__SEED__TIMESTAMP"""
    resume: bool = False
    """go on from the checkpoint of --run-name; start the run where there is none"""
    checkpoint_frequency: int = 100_000
    """steps between two checkpoints, at most (earlier where the spare places of the replay memory, a 32nd part of it,
    are used up); 0 switches them off"""
    eval_frequency: int = 25_000
    """steps between two evaluations during training; 0 switches them off"""
    eval_episodes: int = 10
    """episodes of an evaluation"""
    evaluate: Path | None = None
    """a model.pt to evaluate, instead of training"""
    capture_video: bool = False
    """record the episodes of the last evaluation as mp4"""
    track: bool = False
    """also log to Weights & Biases (pip install wandb)"""
    wandb_project_name: str = "deep-rl-reference-scripts"
    """project name in Weights & Biases"""
    wandb_entity: str | None = None
    """team name in Weights & Biases"""

    # The environment
    env_id: str = "HalfCheetah-v5"
    """an environment with vectors of observations and bounded vectors of actions; MODULE:NAME imports one of yours"""

    # The algorithm
    learning_rate: float = 3e-4
    """learning rate of Adam for the critic, and for the actor unless it has its own"""
    actor_learning_rate: float = 0.0
    """learning rate of Adam for the actor; 0: that of the critic"""
    weight_decay: float = 1e-3
    """L2 penalty on the critic's weights (the paper: 1e-2), against overestimation"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """units in the hidden layers of actor and critic"""
    normalisation: str = "layer"
    """layer, batch or none, before each hidden layer's ReLU"""
    layer_norm_eps: float = 1.0
    """added to the variance that layer normalisation divides by: at 1 it tames large values and leaves small ones
    small, which at PyTorch's 1e-5 it would blow up"""
    action_layer: int = 1
    """hidden layer of the critic that the action joins as an input (the paper: 2)"""
    final_init: float = 0.0
    """the last layers start uniform within +- this (the paper: 3e-3); 0: as the other layers"""
    buffer_size: int = 1_000_000
    """transitions in the replay memory"""
    gamma: float = 0.99
    """discount factor"""
    n_step: int = 1
    """steps of reward in a target before the critic's value (the paper: 1); with more the critic overestimates less"""
    tau: float = 0.005
    """part of the way that the targets go to the networks at each update"""
    batch_size: int = 256
    """transitions in a minibatch"""
    noise: str = "gaussian"
    """gaussian, or ornstein-uhlenbeck (theta 0.15, as in the paper)"""
    exploration_noise: float = 0.1
    """standard deviation of the noise's draws, in units of half the range of each action"""
    learning_starts: int = 5_000
    """steps with random actions before the first update"""
    policy_frequency: int = 1
    """critic updates for each update of actor and targets"""


def plain(args: Args) -> dict:
    """The flags in types that JSON knows."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def fail(message: str) -> NoReturn:
    """Ends the program on a user's mistake: one line on standard error, exit status 2."""
    print(f"{SCRIPT}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


# --- Environment ------------------------------------------------------------------------------------------------------


class Rescaled(gym.Wrapper):
    """Actions in [-1, 1] in every dimension, float32 observations.

    Remembers how the episode began and what was done since, so that a checkpoint can play it again. Valid for
    environments that draw all their random numbers from `np_random`, as Gymnasium's do.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.action_space = gym.spaces.Box(-1, 1, env.action_space.shape)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self.env.reset(seed=seed)
        self.start, self.actions = self.unwrapped.np_random.bit_generator.state, []
        obs, info = self.env.reset(options=options)
        return obs.astype(np.float32), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Takes actions in [-1, 1], float32 (d_action,)."""
        self.actions.append(action)
        low, high = self.env.action_space.low, self.env.action_space.high
        scaled = (low + (action + 1) / 2 * (high - low)).clip(low, high)
        obs, reward, terminated, truncated, info = self.env.step(scaled.astype(self.env.action_space.dtype))
        return obs.astype(np.float32), float(reward), terminated, truncated, info

    def get_state(self) -> dict:
        actions = torch.from_numpy(np.array(self.actions, np.float32))
        return {"start": copy.deepcopy(self.start), "actions": actions}

    def set_state(self, state: dict) -> np.ndarray:
        """Plays the episode again, and returns its newest observation."""
        self.env.reset(seed=0)
        self.unwrapped.np_random.bit_generator.state = state["start"]
        obs, _ = self.reset()
        for action in state["actions"].numpy():
            obs, *_ = self.step(action)
        return obs


def make_env(args: Args, video_dir: Path | None = None) -> gym.Env:
    """The environment, recorded as mp4 where there is a `video_dir`, which is emptied first."""
    if video_dir is None:
        return Rescaled(gym.make(args.env_id))
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame's environments need no screen
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # nor do MuJoCo's
    shutil.rmtree(video_dir, ignore_errors=True)
    env = Rescaled(gym.make(args.env_id, render_mode="rgb_array"))
    if hasattr(env.unwrapped, "mujoco_renderer"):  # whose default camera, -1, stays behind where the agent runs away
        env.unwrapped.mujoco_renderer.camera_id = mujoco.mj_name2id(
            env.unwrapped.model, mujoco.mjtObj.mjOBJ_CAMERA, "track"
        )
    return gym.wrappers.RecordVideo(env, video_dir, episode_trigger=lambda _: True, disable_logger=True)


# --- Networks ---------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Hidden layers with normalisation and ReLU, then a linear layer.

    (batch, d_in) and, for the critic, the action (batch, d_extra) to (batch, d_out). The extra input joins at hidden
    layer `extra_layer`, counted from 1. Batch normalisation as in the paper's section 3: of the input, and of the
    layers before the extra input joins.
    """

    def __init__(self, args: Args, d_in: int, d_out: int, d_extra: int = 0, extra_layer: int = 1):
        super().__init__()
        widths = [d_in, *args.hidden_sizes]
        self.extra_layer = extra_layer if d_extra else 0
        self.input_norm = nn.BatchNorm1d(d_in) if args.normalisation == "batch" else nn.Identity()
        self.hidden, self.norms = nn.ModuleList(), nn.ModuleList()
        for layer, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            self.hidden.append(nn.Linear(before + d_extra * (layer == self.extra_layer), after))
            if args.normalisation == "layer":
                self.norms.append(nn.LayerNorm(after, eps=args.layer_norm_eps))
            elif args.normalisation == "batch" and not 0 < self.extra_layer <= layer:
                self.norms.append(nn.BatchNorm1d(after))
            else:
                self.norms.append(nn.Identity())
        self.last = nn.Linear(widths[-1], d_out)
        if args.final_init:
            nn.init.uniform_(self.last.weight, -args.final_init, args.final_init)
            nn.init.uniform_(self.last.bias, -args.final_init, args.final_init)

    def forward(self, x: torch.Tensor, extra: torch.Tensor | None = None) -> torch.Tensor:
        x = self.input_norm(x)
        for layer, (linear, norm) in enumerate(zip(self.hidden, self.norms, strict=True), start=1):
            x = torch.cat([x, extra], dim=1) if layer == self.extra_layer else x
            x = F.relu(norm(linear(x)), inplace=True)
        return self.last(x)


class Actor(MLP):
    """pi_theta: observations (batch, d_obs) to actions in [-1, 1], (batch, d_action)."""

    def __init__(self, args: Args, d_obs: int, d_action: int):
        super().__init__(args, d_obs, d_action)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(obs))


def greedy_action(actor: Actor, obs: np.ndarray, device: torch.device) -> np.ndarray:
    """pi(obs) for one observation, (d_obs,) to float32 (d_action,)."""
    actor.eval()  # batch normalisation by its running means
    with torch.inference_mode():
        return actor(torch.from_numpy(obs).to(device)[None])[0].cpu().numpy()


class Critic(MLP):
    """Q_phi: observations (batch, d_obs) and actions in [-1, 1], (batch, d_action), to values (batch,)."""

    def __init__(self, args: Args, d_obs: int, d_action: int):
        super().__init__(args, d_obs, 1, d_action, args.action_layer)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return super().forward(obs, action).squeeze(1)


# --- Replay memory ----------------------------------------------------------------------------------------------------


class ReplayMemory:
    """The last `capacity` transitions of n steps in a ring, a row each: s_t, a_t, return, discount, s_{t+n}.

    The return is r_t + gamma r_{t+1} + ... + gamma^{n-1} r_{t+n-1}. The discount is gamma^n, or 0 if s_{t+n} is a
    terminal state. The newest rows, and the last of an episode, have fewer steps: those that there are.

    With a `path` the rows lie in a memory-mapped file of capacity + spare places. What `state_dict` refers to stays in
    the file untouched until `spare` further rows have come, so a checkpoint need not copy it.
    """

    def __init__(
        self,
        capacity: int,
        spare: int,
        d_obs: int,
        d_action: int,
        n_step: int,
        gamma: float,
        rng: np.random.Generator,
        device: torch.device,
        path: Path | None = None,
    ):
        self.capacity, self.slots, self.rng, self.device = capacity, capacity + spare, rng, device
        self.n_step, self.gamma = n_step, gamma
        self.widths = [d_obs, d_action, 1, 1, d_obs]
        self.n_step_return, self.discount = d_obs + d_action, d_obs + d_action + 1  # their columns
        shape = (self.slots, sum(self.widths))
        self.file = None
        if path is None:
            self.rows = np.zeros(shape, np.float32)
        else:
            self.file = np.memmap(path, np.float32, mode="r+" if path.exists() else "w+", shape=shape)
            self.rows = np.asarray(self.file)  # the same memory, without np.memmap's cost at every indexing
        self.count = 0  # rows ever stored
        self.unfinished = 0  # how many of the newest rows the next reward belongs to as well

    def append(
        self,
        obs: np.ndarray,
        action: np.ndarray,
        reward: float,
        terminated: bool,
        truncated: bool,
        next_obs: np.ndarray,
    ) -> None:
        """Stores a step, and adds it to the rows of the n - 1 steps before it in its episode."""
        np.concatenate([obs, action, (0, 1), next_obs], out=self.rows[self.count % self.slots])
        self.count, self.unfinished = self.count + 1, self.unfinished + 1
        for position in self.newest():
            row = self.rows[position]
            row[self.n_step_return] += row[self.discount] * reward
            row[self.discount] *= self.gamma * (not terminated)
            row[self.discount + 1 :] = next_obs
        self.unfinished = 0 if terminated or truncated else min(self.unfinished, self.n_step - 1)

    def newest(self) -> np.ndarray:
        """Where the unfinished rows lie."""
        return np.arange(self.count - self.unfinished, self.count) % self.slots

    def sample(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        """Transitions drawn uniformly with replacement, float32.

        s_t (batch, d_obs), a_t (batch, d_action), return (batch,), discount (batch,), s_{t+n} (batch, d_obs).
        """
        position = self.rng.integers(max(0, self.count - self.capacity), self.count, batch_size)
        rows = torch.from_numpy(np.take(self.rows, position % self.slots, axis=0))
        if self.device.type == "cuda":  # from pinned memory the copy overlaps with what the GPU still computes
            rows = rows.pin_memory()
        rows = rows.to(self.device, non_blocking=True)
        obs, action, n_step_return, discount, next_obs = rows.split(self.widths, dim=1)
        return obs, action, n_step_return.squeeze(1), discount.squeeze(1), next_obs

    def state_dict(self) -> dict:
        """All but the finished rows, which must be in the file; those are written through to the disk."""
        self.file.flush()
        unfinished = torch.from_numpy(self.rows[self.newest()])
        return {"count": self.count, "bytes": self.file.nbytes, "unfinished": unfinished}

    def load_state_dict(self, state: dict) -> None:
        self.count, self.unfinished = state["count"], len(state["unfinished"])
        self.rows[self.newest()] = state["unfinished"].numpy()


# --- The update -------------------------------------------------------------------------------------------------------


def td_targets(n_step_return: torch.Tensor, discount: torch.Tensor, next_q_value: torch.Tensor) -> torch.Tensor:
    """y = r_t + ... + gamma^{n-1} r_{t+n-1} + gamma^n Q'(s_{t+n}, pi'(s_{t+n})); all float32 (batch,).

    The discount is gamma^n, but 0 where s_{t+n} is a terminal state.
    """
    return n_step_return + discount * next_q_value


def actor_loss(actor: nn.Module, critic: nn.Module, obs: torch.Tensor) -> torch.Tensor:
    """-mean Q(s, pi(s)), whose gradient by theta is -mean [grad_theta pi(s)]^T grad_a Q(s, a) at a = pi(s)."""
    return -critic(obs, actor(obs)).mean()


@torch.no_grad()
def soft_update(targets: list[torch.Tensor], parameters: list[torch.Tensor], tau: float) -> None:
    """theta' = tau theta + (1 - tau) theta', for every tensor in place."""
    torch._foreach_lerp_(targets, parameters, tau)


def exploration_noise(previous: np.ndarray, args: Args, rng: np.random.Generator) -> np.ndarray:
    """eps_t of the random process N: (d_action,), in units of half the range of each action.

    Gaussian draws are independent. An Ornstein-Uhlenbeck process keeps 1 - theta of what it was, theta = 0.15, and so
    has a standard deviation of 1.9 times that of its draws.
    """
    kept = OU_KEPT if args.noise == "ornstein-uhlenbeck" else 0.0
    return kept * previous + args.exploration_noise * rng.standard_normal(len(previous))


# --- Checkpoint and evaluation ----------------------------------------------------------------------------------------


def save(path: Path, content: dict) -> None:
    """Writes a .json or .pt file whole or not at all, also through a power cut: temporary name, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        if path.suffix == ".json":
            file.write((json.dumps(content, indent=2) + "\n").encode())
        else:
            torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the new name too must survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def load(path: Path, flag: str, kind: str) -> dict:
    """Reads a "model" or "checkpoint" that `save` wrote, tensors and plain types only; all else ends the program."""
    if not path.is_file():
        fail(f"{flag}: there is no file {path}")
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles by other programs
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types on damaged or foreign files
        fail(f"{flag}: {path} is damaged or not written by {SCRIPT}.py ({type(error).__name__})")
    if not isinstance(content, dict) or (content.get("script"), content.get("kind")) != (SCRIPT, kind):
        fail(f"{flag}: {path} is no {kind} of {SCRIPT}.py")
    return content


def lock(run_dir: Path) -> None:
    """Ends the program if another process trains in this folder; the lock goes with the process."""
    if fcntl:
        try:
            fcntl.flock(os.open(run_dir, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--run-name {run_dir.name}: another process is training in {run_dir}")


def evaluate(args: Args, actor: Actor, video_dir: Path | None = None) -> list[float]:
    """Returns of whole episodes with the actor's own actions, without noise."""
    env = make_env(args, video_dir)
    device = next(actor.parameters()).device
    returns = []
    for episode in range(args.eval_episodes):
        obs, _ = env.reset(seed=args.seed + 1_000_000 if episode == 0 else None)
        episodic_return, terminated, truncated = 0.0, False, False
        while not (terminated or truncated):
            obs, reward, terminated, truncated, _ = env.step(greedy_action(actor, obs, device))
            episodic_return += reward
        returns.append(episodic_return)
    env.close()
    return returns


def load_checkpoint(args: Args) -> dict | None:
    """The checkpoint that --resume goes on from, None where there is none; ends the program where it does not fit."""
    run_dir = args.runs_dir / args.run_name
    if not (args.resume and (run_dir / "checkpoint.pt").exists()):
        return None
    checkpoint = load(run_dir / "checkpoint.pt", "--resume", "checkpoint")
    check_same_flags(args, checkpoint["args"])
    return checkpoint


def check_same_flags(args: Args, started: dict) -> None:
    """Ends the program where a run goes on with other flags than it was started with."""
    may_differ = {"resume", "runs_dir", "run_name", "device", "eval_episodes", "evaluate", "capture_video", "track"}
    for name, value in plain(args).items():
        if value != started.get(name) and name not in may_differ and not name.startswith("wandb"):
            run_dir = args.runs_dir / args.run_name
            reject(args, name, f"{run_dir} was started with {started.get(name)}; give the same flags")


def check_replay_file(args: Args, checkpoint: dict | None) -> None:
    """Ends the program where the file that a checkpoint refers to is gone."""
    replay = args.runs_dir / args.run_name / REPLAY_FILE
    if checkpoint and (not replay.exists() or replay.stat().st_size != checkpoint["memory"]["bytes"]):
        fail(f"--resume: {replay} is missing or of another size; without it the run can only start anew")


# --- Training ---------------------------------------------------------------------------------------------------------


def choose_device(args: Args) -> torch.device:
    """The device that --device asks for."""
    if args.device != "auto":
        return torch.device(args.device)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def replay_size(args: Args) -> tuple[int, int]:
    """Transitions that the replay memory draws from, and spare places for those that come between two checkpoints."""
    capacity = min(args.buffer_size, args.total_timesteps)
    if args.checkpoint_frequency == 0:
        return capacity, 0
    return capacity, min(args.checkpoint_frequency, max(capacity // 32, 1000)) + 1


@dataclasses.dataclass
class Progress:
    """How far a run has come."""

    global_step: int = 0
    episodic_return: float = 0.0
    episodic_length: int = 0
    recent_returns: list[float] = dataclasses.field(default_factory=list)  # of the last 100 episodes, unclipped
    wall_seconds: float = 0.0
    update_steps: int = 0  # steps since the first update, and the seconds they took
    update_seconds: float = 0.0


class Clock:
    """Keeps the time in a run's progress, and shows both: a bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, progress: Progress, start_time: float):
        self.progress, self.start_time = progress, start_time
        self.wall_seconds_before = progress.wall_seconds
        self.last_time, self.last_step, self.last_shown = time.perf_counter(), progress.global_step, -math.inf
        self.sps = 0.0

    def tick(self, learning_starts: int) -> None:
        """Updates the steps per second since the last tick, and the totals."""
        now, step = time.perf_counter(), self.progress.global_step
        steps, seconds = step - self.last_step, now - self.last_time
        self.sps = steps / seconds
        if self.last_step >= learning_starts:
            self.progress.update_steps += steps
            self.progress.update_seconds += seconds
        self.progress.wall_seconds = self.wall_seconds_before + now - self.start_time
        self.last_time, self.last_step = now, step

    def show(self, total: int) -> None:
        terminal, step, returns = sys.stdout.isatty(), self.progress.global_step, self.progress.recent_returns
        if self.last_time - self.last_shown < (1 if terminal else 60) and step < total:
            return
        self.last_shown = self.last_time
        hours, minutes = divmod(int((total - step) / self.sps / 60), 60)
        score = f"{np.mean(returns):.1f}" if returns else "-"
        line = f"step {step:,}/{total:,}  return {score}  {self.sps:.0f} steps/s  {hours}:{minutes:02} h left"
        if terminal:
            filled = 24 * step // total
            print(f"\r[{'#' * filled}{'.' * (24 - filled)}] {line}\033[K", end="" if step < total else "\n", flush=True)
        else:
            print(line, flush=True)


def log_hyperparameters(writer: SummaryWriter, args: Args) -> None:
    """As a text, and for the HPARAMS tab beside the curve of returns."""
    values = {name: value if isinstance(value, (int, float)) else str(value) for name, value in vars(args).items()}
    table = "\n".join(f"|{name}|{value}|" for name, value in values.items())
    writer.add_text("hyperparameters", "|name|value|\n|-|-|\n" + table)
    for summary in hparams(values, {"charts/episodic_return": 0.0}):
        writer.file_writer.add_summary(summary)


def train(args: Args) -> None:
    """Trains as the listing above says; leaves curves, weights and a result in the run's folder.

    Raises KeyboardInterrupt, with a checkpoint written, when SIGINT or SIGTERM asks to stop.
    """
    start_time = time.perf_counter()
    device = choose_device(args)
    run_dir = args.runs_dir / args.run_name
    checkpoint = load_checkpoint(args)
    check_replay_file(args, checkpoint)
    torch.backends.cudnn.deterministic = True
    torch.set_flush_denormal(True)  # Adam's moments may decay into denormals, at less than half the speed
    torch.manual_seed(args.seed)
    rng = np.random.default_rng([args.seed, 1])  # other draws than those of the environment, seeded with the seed alone
    env = make_env(args)
    d_obs, d_action = env.observation_space.shape[0], env.action_space.shape[0]
    run_dir.mkdir(parents=True, exist_ok=args.resume)
    lock(run_dir)
    if not checkpoint:
        (run_dir / REPLAY_FILE).unlink(missing_ok=True)
        save(run_dir / "args.json", plain(args))
    if args.track:
        start_tracking(args)
    # A killed run repeats what came after its checkpoint: TensorBoard forgets the first version from purge_step on.
    writer = SummaryWriter(run_dir, purge_step=checkpoint["progress"]["global_step"] + 1 if checkpoint else 0)

    # 1: initialise critic Q_phi and actor pi_theta with random weights
    actor, critic = Actor(args, d_obs, d_action).to(device), Critic(args, d_obs, d_action).to(device)
    actor_optimizer = torch.optim.Adam(
        actor.parameters(), lr=args.actor_learning_rate or args.learning_rate, fused=True
    )
    critic_optimizer = torch.optim.Adam(
        critic.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    # 2: initialise targets phi' = phi, theta' = theta
    target_actor, target_critic = (copy.deepcopy(network).requires_grad_(False).eval() for network in (actor, critic))
    # 3: initialise replay memory R
    path = run_dir / REPLAY_FILE if args.checkpoint_frequency else None
    memory = ReplayMemory(*replay_size(args), d_obs, d_action, args.n_step, args.gamma, rng, device, path)
    learned = {
        **{"actor": actor, "critic": critic, "target_actor": target_actor, "target_critic": target_critic},
        **{"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer, "memory": memory},
    }

    def snapshot() -> dict:
        return {
            "script": SCRIPT,
            "kind": "checkpoint",
            "args": plain(args),
            "progress": dataclasses.asdict(progress),
            "env": env.get_state(),
            "obs": torch.from_numpy(obs),
            "noise": torch.from_numpy(noise),
            "rng": rng.bit_generator.state,
            **{name: part.state_dict() for name, part in learned.items()},
        }

    if checkpoint:
        progress = Progress(**checkpoint["progress"])
        for name, part in learned.items():
            part.load_state_dict(checkpoint[name])
        obs = env.set_state(checkpoint["env"])
        if not np.array_equal(obs, checkpoint["obs"].numpy()):
            fail(f"--resume: {args.env_id} does not play an episode again as it was; this run can only start anew")
        noise = checkpoint["noise"].numpy()
        rng.bit_generator.state = checkpoint["rng"]
    else:
        progress = Progress()
        log_hyperparameters(writer, args)
        # 5, 6: a random process N and the first state
        noise = np.zeros(d_action)
        obs, _ = env.reset(seed=args.seed)
    pairs = ((actor, critic), (target_actor, target_critic))
    parameters, target_parameters = ([*first.parameters(), *second.parameters()] for first, second in pairs)
    buffers, target_buffers = ([*first.buffers(), *second.buffers()] for first, second in pairs)
    clock = Clock(progress, start_time)
    checkpoint_count = memory.count
    qf1_loss = qf1_value = policy_loss = None
    stop_signals = []

    def request_stop(signum: int, _: object) -> None:
        stop_signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)  # a second signal ends the program at once

    previous_handlers = {signum: signal.signal(signum, request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}

    for step in range(progress.global_step + 1, args.total_timesteps + 1):  # 4, 7: for each step t of each episode
        # 8: the actor's action and noise; the first actions are random
        if step <= args.learning_starts:
            action = rng.uniform(-1, 1, d_action).astype(np.float32)
        else:
            noise = exploration_noise(noise, args, rng)
            action = (greedy_action(actor, obs, device) + noise).clip(-1, 1).astype(np.float32)
            if not np.isfinite(action).all():
                writer.close()
                fail(f"the actor's action is {action} at step {step:,}; try a lower --learning-rate")

        # 9, 10: execute it, store the transition
        next_obs, reward, terminated, truncated, _ = env.step(action)
        if not (np.isfinite(obs).all() and np.isfinite(next_obs).all() and abs(reward) < FLOAT32_MAX):
            writer.close()
            fail(f"--env-id {args.env_id}: the environment returned NaN or infinity at step {step:,}")
        memory.append(obs, action, reward, terminated, truncated, next_obs)
        obs = next_obs
        progress.global_step = step
        progress.episodic_return += reward
        progress.episodic_length += 1
        if terminated or truncated:
            progress.recent_returns = [*progress.recent_returns, progress.episodic_return][-100:]
            writer.add_scalar("charts/episodic_return", progress.episodic_return, step)
            writer.add_scalar("charts/episodic_length", progress.episodic_length, step)
            progress.episodic_return, progress.episodic_length = 0.0, 0
            # 5, 6: a new episode starts the random process anew
            noise = np.zeros(d_action)
            obs, _ = env.reset()

        if step >= args.learning_starts:
            # 11: sample a minibatch
            observations, actions, n_step_returns, discounts, next_observations = memory.sample(args.batch_size)
            # 12: y_i = r_i + gamma Q_phi'(s_{i+1}, pi_theta'(s_{i+1})), or n steps ahead
            with torch.no_grad():
                next_q_value = target_critic(next_observations, target_actor(next_observations))
                td_target = td_targets(n_step_returns, discounts, next_q_value)
            # 13: critic
            qf1_value = critic(observations, actions)
            qf1_loss = F.mse_loss(qf1_value, td_target)
            critic_optimizer.zero_grad()
            qf1_loss.backward()
            critic_optimizer.step()
            if step % args.policy_frequency == 0:
                # 14: actor
                actor.train()
                policy_loss = actor_loss(actor, critic, observations)
                actor_optimizer.zero_grad()
                policy_loss.backward(inputs=list(actor.parameters()))  # and none for the critic
                actor_optimizer.step()
                # 15: theta' = tau theta + (1 - tau) theta', phi' likewise
                soft_update(target_parameters, parameters, args.tau)
                for target_buffer, buffer in zip(target_buffers, buffers, strict=True):
                    target_buffer.copy_(buffer)  # batch normalisation's running means are averages already

        # The rest keeps the books.
        stopping, last = bool(stop_signals), step == args.total_timesteps
        room = memory.slots - memory.capacity - (memory.count - checkpoint_count)
        save_now = args.checkpoint_frequency > 0 and (
            step % args.checkpoint_frequency == 0 or room < 1 or stopping or last
        )
        if step % LOG_FREQUENCY == 0 or save_now or last:
            if qf1_loss is not None and not all(weight.isfinite().all() for weight in parameters):
                writer.close()
                fail(f"the critic's loss is {qf1_loss.item()} by step {step:,}; try a lower --learning-rate")
            clock.tick(args.learning_starts)
            if step % LOG_FREQUENCY == 0 and qf1_loss is not None:
                writer.add_scalar("losses/qf1_loss", qf1_loss.item(), step)
                writer.add_scalar("losses/qf1_values", qf1_value.mean().item(), step)
                writer.add_scalar("charts/SPS", clock.sps, step)
                if policy_loss is not None:
                    writer.add_scalar("losses/actor_loss", policy_loss.item(), step)
            clock.show(args.total_timesteps)
        if args.eval_frequency and args.eval_episodes and step % args.eval_frequency == 0 and not last:
            evaluation_start = time.perf_counter()
            writer.add_scalar("eval/episodic_return", np.mean(evaluate(args, actor)), step)
            clock.last_time += time.perf_counter() - evaluation_start  # it is no training
        if save_now:
            writer.flush()
            save(run_dir / "checkpoint.pt", snapshot())
            checkpoint_count = memory.count
        if stopping:
            break

    for signum, handler in previous_handlers.items():
        signal.signal(signum, handler)
    if stop_signals:
        writer.close()
        raise KeyboardInterrupt

    content = {"script": SCRIPT, "kind": "model", "args": plain(args), "actor": actor.state_dict()}
    save(run_dir / "model.pt", content)
    returns = evaluate(args, actor, run_dir / "videos" if args.capture_video else None)
    if returns:
        writer.add_scalar("eval/episodic_return", np.mean(returns), args.total_timesteps)
    writer.close()
    save(
        run_dir / "result.json",
        {
            "script": SCRIPT,
            "env_id": args.env_id,
            "seed": args.seed,
            "total_timesteps": args.total_timesteps,
            "train_return_mean": float(np.mean(progress.recent_returns)) if progress.recent_returns else None,
            "eval_return_mean": float(np.mean(returns)) if returns else None,
            "eval_return_std": float(np.std(returns)) if returns else None,
            "eval_episodes": args.eval_episodes,
            "steps_per_second": progress.update_steps / progress.update_seconds if progress.update_steps else None,
            "wall_seconds": clock.wall_seconds_before + time.perf_counter() - start_time,
            "device": device.type,
            "torch_threads": torch.get_num_threads(),
            "versions": {module.__name__: module.__version__ for module in (torch, np, gym)}
            | {"python": platform.python_version()},
        },
    )
    (run_dir / REPLAY_FILE).unlink(missing_ok=True)
    if returns:
        print(f"{run_dir}: mean return {np.mean(returns):.1f}, standard deviation {np.std(returns):.1f}")


def start_tracking(args: Args) -> None:
    import wandb

    wandb.init(
        project=args.wandb_project_name,
        entity=args.wandb_entity,
        id=args.run_name,
        resume="allow",
        config=plain(args),
        dir=args.runs_dir / args.run_name,
        sync_tensorboard=True,
    )


# --- Command line -----------------------------------------------------------------------------------------------------


def reject(args: Args, name: str, reason: str) -> NoReturn:
    fail(f"--{name.replace('_', '-')} {getattr(args, name)}: {reason}")


def check_args(args: Args) -> None:
    """Ends the program with one line where a flag cannot work, whether it trains or evaluates."""
    choices = {
        "device": ("auto", "cpu", "cuda", "mps"),
        "normalisation": ("layer", "batch", "none"),
        "noise": ("gaussian", "ornstein-uhlenbeck"),
    }
    for name, allowed in choices.items():
        if getattr(args, name) not in allowed:
            reject(args, name, f"choose one of {', '.join(allowed)}")
    counts = ("total_timesteps", "buffer_size", "batch_size", "learning_starts", "policy_frequency", "n_step")
    for name in (*counts, "learning_rate", "layer_norm_eps"):
        if not 0 < getattr(args, name) < math.inf:
            reject(args, name, "must be greater than 0")
    for name in ("actor_learning_rate", "weight_decay", "final_init", "exploration_noise"):
        if not 0 <= getattr(args, name) < math.inf:
            reject(args, name, "must not be negative")
    for name in ("seed", "checkpoint_frequency", "eval_frequency", "eval_episodes"):
        if not 0 <= getattr(args, name) < 2**62:
            reject(args, name, "must not be negative, nor 2^62 or more")
    for name in ("gamma", "tau"):
        if not 0 <= getattr(args, name) <= 1:
            reject(args, name, "must lie in [0, 1]")
    if not args.hidden_sizes or min(args.hidden_sizes) < 1:
        reject(args, "hidden_sizes", "give one positive number for each hidden layer")
    if not 1 <= args.action_layer <= len(args.hidden_sizes):
        reject(args, "action_layer", f"must be a hidden layer, 1 to {len(args.hidden_sizes)}")
    if args.normalisation == "batch" and args.batch_size == 1:
        reject(args, "batch_size", "--normalisation batch needs 2 or more")
    if args.device in ("cuda", "mps") and not getattr(torch, args.device).is_available():
        reject(args, "device", "PyTorch finds no such device here; use --device cpu")
    try:
        env = gym.make(args.env_id)
    except gym.error.UnregisteredEnv:
        near = difflib.get_close_matches(args.env_id, gym.registry, n=3, cutoff=0.4)
        reject(args, "env_id", "no such environment" + (f"; did you mean {', '.join(near)}?" if near else ""))
    except (ImportError, gym.error.Error) as error:
        reject(args, "env_id", f"{error}".splitlines()[0])
    if env.spec.max_episode_steps is None:
        reject(args, "env_id", "needs a time limit; register it with max_episode_steps")
    obs_space, action_space = env.observation_space, env.action_space
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        reject(args, "env_id", f"needs a vector of observations (Box), these are {obs_space}".replace("\n", ""))
    vector = isinstance(action_space, gym.spaces.Box) and len(action_space.shape) == 1
    if not (vector and np.issubdtype(action_space.dtype, np.floating)):
        reject(args, "env_id", f"needs a vector of continuous actions (Box), these are {action_space}")
    if not action_space.is_bounded():
        reject(
            args,
            "env_id",
            f"needs bounded actions, these are {action_space}; wrap it in gymnasium's ClipAction or the like",
        )
    if args.capture_video:
        with tempfile.TemporaryDirectory() as folder:
            try:
                with make_env(args, Path(folder) / "videos") as env:
                    env.reset()
            except Exception as error:  # every renderer has its own
                reject(args, "capture_video", f"{args.env_id} cannot be drawn here ({f'{error!r}'.splitlines()[0]})")


def check_training(args: Args) -> None:
    """Ends the program with one line where the algorithm cannot run; creates nothing."""
    if args.n_step > args.buffer_size:
        reject(args, "n_step", f"must not exceed --buffer-size {args.buffer_size}")
    env = make_env(args)
    d_obs, d_action = env.observation_space.shape[0], env.action_space.shape[0]
    check_replay(args, replay_bytes=sum(replay_size(args)) * 4 * (2 * d_obs + d_action + 2))


def check_run(args: Args) -> None:
    """Ends the program with one line where the run's folder cannot be; creates nothing."""
    run_dir = args.runs_dir / args.run_name
    if Path(args.run_name).name != args.run_name or args.run_name == "..":
        reject(args, "run_name", f"must be a plain name, for a folder in --runs-dir {args.runs_dir}")
    folder = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        reject(args, "runs_dir", f"{folder} is no folder that can be written to")
    if run_dir.exists() and not args.resume:
        reject(args, "run_name", f"{run_dir} exists; take another name, or add --resume to go on with it")
    if args.track and getattr(importlib.util.find_spec("wandb"), "origin", None) is None:  # not even a folder wandb/
        fail("--track: Weights & Biases is not installed; pip install wandb")


def check_replay(args: Args, replay_bytes: float) -> None:
    """Ends the program with one line where learning cannot start, or `replay_bytes` have no room."""
    if args.buffer_size < args.batch_size:
        reject(args, "buffer_size", f"must hold a batch, {args.batch_size} or more")
    if args.learning_starts < args.batch_size:
        reject(args, "learning_starts", f"must not be under --batch-size {args.batch_size}")
    if args.learning_starts > args.total_timesteps:
        reject(args, "learning_starts", f"must not exceed --total-timesteps {args.total_timesteps}")
    run_dir = args.runs_dir / args.run_name
    if args.checkpoint_frequency:  # the replay memory is a file
        folder = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
        replay = run_dir / REPLAY_FILE
        there = replay.stat().st_blocks * 512 if replay.exists() else 0
        needed = replay_bytes + 200e6  # with the checkpoint, its successor and the curves
        where, free = f"on the disk of {folder}", shutil.disk_usage(folder).free + there
    else:
        needed, where, free = replay_bytes, "of memory", available_memory()
    if needed > free:
        fitting = max(0, int(args.buffer_size * free * 0.9 / needed))
        have = f"{free / 1e9:.1f} GB {where} are free"
        reject(args, "buffer_size", f"needs {needed / 1e9:.1f} GB, and {have}; --buffer-size {fitting} would fit")


def available_memory() -> float:
    """Bytes that a process may still take, where the system tells (Linux); else infinity."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return math.inf
    return next(int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvailable" in line)


def evaluate_model(args: Args) -> None:
    """Acts with the weights of a model.pt, in the environment that it was trained on."""
    content = load(args.evaluate, "--evaluate", "model")
    # Parsed again, the environment and the networks default to those of the training.
    names = ("env_id", "hidden_sizes", "normalisation", "layer_norm_eps", "final_init")
    trained = Args(**{name: content["args"][name] for name in names})
    args = tyro.cli(Args, default=trained)
    if args.env_id != trained.env_id:
        reject(args, "env_id", f"{args.evaluate} was trained on {trained.env_id}")
    if args.eval_episodes == 0:
        reject(args, "eval_episodes", "must be greater than 0 with --evaluate")
    check_args(args)
    env = make_env(args)
    actor = Actor(args, env.observation_space.shape[0], env.action_space.shape[0])
    try:
        actor.load_state_dict(content["actor"])
    except RuntimeError:
        fail(
            f"--evaluate: the networks in {args.evaluate} are of another shape than {args.env_id} and the flags ask for"
        )
    returns = evaluate(
        args, actor.to(choose_device(args)), args.evaluate.parent / "videos" if args.capture_video else None
    )
    print(f"{args.env_id}: mean return {np.mean(returns):.1f}, standard deviation {np.std(returns):.1f}")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.evaluate:
        return evaluate_model(args)
    check_args(args)
    if args.resume and not args.run_name:
        fail("--resume: give the --run-name of the run to go on with")
    if not args.run_name:
        args.run_name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{SCRIPT}__{args.seed}__{int(time.time())}"
    run_dir = args.runs_dir / args.run_name
    if args.resume and (run_dir / "result.json").exists():
        (run_dir / REPLAY_FILE).unlink(missing_ok=True)
        return print(f"{run_dir} is finished: see its result.json")
    check_run(args)
    check_training(args)
    try:
        train(args)
    except KeyboardInterrupt:
        flags = [flag for flag in sys.argv[1:] if flag != "--resume"]
        if "--run-name" not in flags:
            flags += ["--run-name", args.run_name]
        command = f"python {shlex.join([sys.argv[0], *flags, '--resume'])}"
        print(f"\nstopped; go on with: {command}" if args.checkpoint_frequency else "\nstopped, without a checkpoint")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
