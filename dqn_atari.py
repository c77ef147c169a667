"""DQN on Atari in one file, after Mnih et al. 2015, "Human-level control through deep reinforcement learning".

    python dqn_atari.py --env-id ALE/Breakout-v5 --seed 2                 # train; curves and weights in runs/
    python dqn_atari.py --env-id ALE/Breakout-v5 --run-name b --resume    # start, or go on after a kill, to the bit
    python dqn_atari.py --evaluate runs/b/model.pt --capture-video        # play with a trained network

Deep Q-learning with experience replay. The numbers stand again in `train`, where each line happens.

     1  initialise replay memory D to capacity N
     2  initialise action-value network Q with random weights
     3  initialise target network Q- with the weights of Q
     4  for each step t:
     5      with probability epsilon select a random action a_t, else a_t = argmax_a Q(phi_t, a)
     6      execute a_t, observe reward r_t and screen x_{t+1}
     7      phi_{t+1} = the last four screens, preprocessed; store (phi_t, a_t, r_t, phi_{t+1}) in D
     8      sample a minibatch of transitions (phi_j, a_j, r_j, phi_{j+1}) from D
     9      y_j = r_j where the episode terminates at j, else r_j + gamma max_a' Q-(phi_{j+1}, a')
    10      one gradient step on the mean of (y_j - Q(phi_j, a_j))^2 by the weights of Q
    11      every C steps Q- = Q

Differs from the paper:
- Adam on the squared error, a shorter exploration and a faster target network by default, because they learn from
  fewer frames. The README gives the command line with the paper's own settings: its centred RMSProp, its error clipped
  to [-1, 1] (`--loss huber`), and its gradients, summed over the batch, translated to the averaged ones here.
- All steps are agent steps of four emulator frames; the paper gives the length of a run and of exploration in frames.
- The end by a time limit is no terminal state: its target bootstraps. The paper's code treats it as the game's end.
- The lecture's slide prints 32 filters in the second convolution and a softmax output. The paper has 64 filters and
  a linear output (Q-values are no probabilities), and so has this script.
- On processors with bfloat16 instructions the layers before the last compute in bfloat16, on float32 weights
  (`--precision`).
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
#     "tyro==1.0.17",
# ]
# ///

import copy
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import NoReturn

import ale_py
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

SCRIPT = Path(__file__).stem
FRAME_SIZE = 84  # pixels; a preprocessed screen is 84 x 84 grey levels
STACK = 4  # screens in one observation
ACTION_REPEAT = 4  # emulator frames per agent step
NOOP_MAX = 30  # emulator frames without action at the start of a game, at most
EVAL_EPSILON = 0.05
EVAL_MAX_FRAMES = 18_000  # emulator frames of an evaluation game: five minutes at 60 Hz
LOG_FREQUENCY = 400  # agent steps between two records of losses and speed
REPLAY_FILE = "replay.frames"
RAW_SCREENS = {"frameskip": 1, "obs_type": "grayscale"}  # of Gymnasium's Atari environments; the rest is done here

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


@dataclasses.dataclass
class Args:
    # The run
    seed: int = 1
    """seed of the weights, the exploration, the replay's draws and the environment"""
    total_timesteps: int = 1_000_000
    """agent steps to train for (one step is four emulator frames)"""
    device: str = "auto"
    """auto, cpu, cuda or mps; auto takes cuda or mps where there is one"""
    precision: str = "auto"
    """arithmetic of the layers before the last: float32, bfloat16, or auto, which is bfloat16 on a CPU that has
    instructions for it and float32 elsewhere; the weights are float32 in any case"""
    runs_dir: Path = Path("runs")
    """folder that holds the runs"""
    run_name: str = ""
    """name of this run's folder in the runs' folder; default ENV__SCRIPT__SEED__TIMESTAMP"""
    resume: bool = False
    """go on from the checkpoint of --run-name; start the run where there is none"""
    checkpoint_frequency: int = 100_000
    """agent steps between two checkpoints, at most (earlier where the spare places of the replay memory, a 32nd part of
    it, are used up); 0 switches them off"""
    eval_episodes: int = 10
    """games to play for evaluation after training"""
    evaluate: Path | None = None
    """a model.pt to evaluate, instead of training"""
    capture_video: bool = False
    """record the games of the evaluation as mp4 (a game of five minutes takes 2 GB of memory until it is written)"""
    track: bool = False
    """also log to Weights & Biases (pip install wandb)"""
    wandb_project_name: str = "deep-rl-reference-scripts"
    """project name in Weights & Biases"""
    wandb_entity: str | None = None
    """team name in Weights & Biases"""

    # The environment
    env_id: str = "ALE/Pong-v5"
    """the game: an Atari environment id"""
    sticky_actions: float = 0.0
    """probability that an emulator frame repeats the action before (Machado et al. 2018 recommend 0.25)"""

    # The algorithm
    learning_rate: float = 1e-4
    """learning rate of the optimizer"""
    optimizer: str = "adam"
    """adam, or rmsprop (the paper's: centred, decay 0.95)"""
    optimizer_eps: float = 1e-8
    """epsilon in the optimizer's denominator: added to the root by adam, under the root by rmsprop"""
    loss: str = "mse"
    """mse, or huber (its gradient is the paper's error clipped to [-1, 1])"""
    buffer_size: int = 1_000_000
    """screens in the replay memory, 7,056 bytes each: one a transition, and one more a game"""
    gamma: float = 0.99
    """discount factor"""
    target_network_frequency: int = 1_000
    """agent steps between two copies of the weights to the target network; 1: no separate target"""
    batch_size: int = 32
    """transitions in a minibatch"""
    start_e: float = 1.0
    """epsilon of the exploration at the start"""
    end_e: float = 0.01
    """epsilon of the exploration at its end"""
    exploration_fraction: float = 0.1
    """part of the run over which epsilon falls from start to end"""
    learning_starts: int = 20_000
    """agent steps before the first update"""
    train_frequency: int = 4
    """agent steps between two updates"""


def plain(args: Args) -> dict:
    """The flags in types that JSON knows."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def fail(message: str) -> NoReturn:
    """Ends the program on a user's mistake: one line on standard error, exit status 2."""
    print(f"{SCRIPT}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


# --- Environment ------------------------------------------------------------------------------------------------------


def area_weights(size: int, new_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """How to shrink an axis of `size` pixels to `new_size` by area.

    A new pixel covers size / new_size old ones and is their mean, those at its edges counted by the part covered. For
    the first, second, ... old pixel that it touches: the index, int64 (new_size,), and the weight, float32 (new_size,).
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
    """The paper's preprocessing ("Methods: Preprocessing") around a raw grey-scale Atari environment.

    `reset` plays 0 to 30 frames without action; `step` repeats an action for 4 frames, adds up their rewards and takes
    the maximum of the last two screens, which removes the flicker of sprites drawn on every other frame. Both give one
    screen, uint8 (84, 84), shrunk by area. `info["life_lost"]` tells whether the step cost a life.

    The no-ops are drawn from `rng`, a NumPy generator that the caller may share. Two games (Backgammon, VideoCheckers)
    know no no-op and start without.
    """

    def __init__(self, env: gym.Env, rng: np.random.Generator):
        super().__init__(env)
        self.rng = rng
        self.noop_max = NOOP_MAX if env.unwrapped.get_action_meanings()[0] == "NOOP" else 0
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

    def get_state(self) -> dict:
        """The emulator's state at the start of this game and what was played since, for a weights-only load.

        The state now would not do: ALE leaves out the action that sticky actions repeat, and in two games (Qbert,
        Tetris) a part of the screen.
        """
        return {"start": self.start.__getstate__(), "noops": self.noops, "actions": self.actions}

    def set_state(self, state: dict) -> None:
        """Plays the game again from its start: some seconds at most, for a game of half an hour."""
        screen, info = self.env.reset()
        self.start, self.noops, self.actions = ale_py.ALEState(state["start"]), state["noops"], []
        self.unwrapped.restore_state(self.start)
        self.play_noops(screen, info)
        for action in state["actions"]:
            self.step(action)


def make_env(args: Args, rng: np.random.Generator) -> gym.Env:
    return AtariPreprocessing(gym.make(args.env_id, repeat_action_probability=args.sticky_actions, **RAW_SCREENS), rng)


def make_eval_env(args: Args, rng: np.random.Generator, video_dir: Path) -> gym.Env:
    """The game under the limits of the paper's evaluation; with --capture-video its mp4 files replace `video_dir`."""
    limits = {"max_num_frames_per_episode": EVAL_MAX_FRAMES, "repeat_action_probability": args.sticky_actions}
    if not args.capture_video:
        return AtariPreprocessing(gym.make(args.env_id, **limits, **RAW_SCREENS), rng)
    shutil.rmtree(video_dir, ignore_errors=True)
    env = gym.make(args.env_id, render_mode="rgb_array", **limits, **RAW_SCREENS)
    env = gym.wrappers.RecordVideo(env, video_dir, episode_trigger=lambda _: True, fps=60, disable_logger=True)
    return AtariPreprocessing(env, rng)


# --- Network ----------------------------------------------------------------------------------------------------------


class QNetwork(nn.Module):
    """The paper's network: observations, uint8 (batch, 4, 84, 84), to action values, float32 (batch, n_actions).

    `features` may compute in bfloat16. The last layer stays float32: action values often differ by less than bfloat16
    can tell apart, and the greedy action would be a tie.
    """

    def __init__(self, n_actions: int):
        super().__init__()
        self.features = nn.Sequential(
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
        self.q_values = nn.Linear(512, n_actions)
        self.to(memory_format=torch.channels_last)  # a tenth more steps per second in float32 on a CPU

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        features = self.features(obs.to(self.features[0].weight.dtype).div_(255))
        return self.q_values(features.float())


def greedy_action(q_network: QNetwork, obs: torch.Tensor) -> int:
    """argmax_a Q(obs, a) for one observation, uint8 (1, 4, 84, 84) on the network's device."""
    with torch.inference_mode():
        return int(q_network(obs).argmax())


# --- Replay memory ----------------------------------------------------------------------------------------------------


class ReplayMemory:
    """The last `capacity` screens in a ring, each stored once; observations are stacked again when they are sampled.

    An episode of T steps takes T + 1 places, for its last screen is the next observation of its last transition. Beside
    each screen stand the action taken there, its reward, whether it ended in a terminal state, whether there was an
    action at all (not at an episode's last screen) and the number of screens of the same episode before it, up to 3.

    With a `path` the screens lie in a memory-mapped file of capacity + spare places. What `state_dict` refers to stays
    in the file untouched until `spare` further screens have come, so a checkpoint need not copy it. An agent step
    stores one screen, two where an episode ends.
    """

    BESIDE_SCREENS = ("action", "reward", "terminated", "acted", "age")

    def __init__(
        self, capacity: int, spare: int, rng: np.random.Generator, device: torch.device, path: Path | None = None
    ):
        self.capacity, self.slots, self.rng, self.device = capacity, capacity + spare, rng, device
        shape = (self.slots, FRAME_SIZE, FRAME_SIZE)
        self.file = None
        if path is None:
            self.frames = np.zeros(shape, np.uint8)
        else:
            self.file = np.memmap(path, np.uint8, mode="r+" if path.exists() else "w+", shape=shape)
            self.frames = np.asarray(self.file)  # the same memory, without np.memmap's cost at every indexing
        self.action = np.zeros(self.slots, np.uint8)
        self.reward = np.zeros(self.slots, np.float32)
        self.terminated = np.zeros(self.slots, bool)
        self.acted = np.zeros(self.slots, bool)
        self.age = np.zeros(self.slots, np.uint8)
        self.count = 0  # screens ever stored; the newest lies at (count - 1) % slots

    def begin_episode(self, frame: np.ndarray) -> None:
        """Stores the first screen of an episode, uint8 (84, 84)."""
        self._push(frame, age=0)

    def append(self, action: int, reward: float, terminated: bool, next_frame: np.ndarray) -> None:
        """Stores the action taken at the newest screen, what it brought, and the screen after it, uint8 (84, 84)."""
        newest = (self.count - 1) % self.slots
        self.action[newest] = action
        self.reward[newest] = reward
        self.terminated[newest] = terminated
        self.acted[newest] = True
        self._push(next_frame, age=min(self.age[newest] + 1, STACK - 1))

    def _push(self, frame: np.ndarray, age: int) -> None:
        slot = self.count % self.slots
        self.frames[slot] = frame
        self.age[slot] = age
        self.acted[slot] = False
        self.count += 1

    def _stack(self, position: np.ndarray, first: int, last: int) -> torch.Tensor:
        """Screens from `first` to `last` (included) relative to `position`, those before the episode's start black."""
        offset = np.arange(first, last + 1)
        frames = np.take(self.frames, (position[:, None] + offset) % self.slots, axis=0)
        before_start = -offset > self.age[position % self.slots, None]
        if before_start.any():
            frames[before_start] = 0
        return self._to_device(frames)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":  # from pinned memory the copy overlaps with what the GPU still computes
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def newest_obs(self) -> torch.Tensor:
        """The observation that the newest screen completes: uint8 (1, 4, 84, 84)."""
        return self._stack(np.array([self.count - 1]), 1 - STACK, 0)

    def sample(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        """Transitions drawn uniformly with replacement.

        obs uint8 (batch, 4, 84, 84), action int64 (batch,), reward float32 (batch,), next_obs like obs, terminated
        float32 (batch,), 1 where the target must not bootstrap.
        """
        oldest = self.count - self.capacity + STACK - 1 if self.count > self.capacity else 0
        position = self.rng.integers(oldest, self.count - 1, batch_size)
        while not (drawable := self.acted[position % self.slots]).all():
            position[~drawable] = self.rng.integers(oldest, self.count - 1, (~drawable).sum())
        slot = position % self.slots
        frames = self._stack(position, 1 - STACK, 1)
        return (
            frames[:, :-1],
            self._to_device(self.action[slot].astype(np.int64)),
            self._to_device(self.reward[slot]),
            frames[:, 1:],
            self._to_device(self.terminated[slot].astype(np.float32)),
        )

    def state_dict(self) -> dict:
        """All but the screens, which must be in the file; those are written through to the disk."""
        self.file.flush()
        used = min(self.count, self.slots)
        beside = {name: torch.from_numpy(getattr(self, name)[:used].copy()) for name in self.BESIDE_SCREENS}
        return {"count": self.count, "bytes": self.file.nbytes, **beside}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]
        for name in self.BESIDE_SCREENS:
            getattr(self, name)[: len(state[name])] = state[name].numpy()


# --- The update -------------------------------------------------------------------------------------------------------


def td_targets(
    reward: torch.Tensor, terminated: torch.Tensor, next_q_values: torch.Tensor, gamma: float
) -> torch.Tensor:
    """y = r + gamma max_a' Q-(s', a'), but y = r at a terminal state: float32 (batch,).

    reward and terminated: float32 (batch,); next_q_values: (batch, actions) of the target network.
    """
    return reward + gamma * (1 - terminated) * next_q_values.max(dim=1).values


def td_loss(q_value: torch.Tensor, td_target: torch.Tensor, loss: str) -> torch.Tensor:
    """Mean over the batch of (y - Q(s, a))^2 ("mse"), or of half of it with slope 1 from an error of 1 on ("huber").

    q_value (of the action taken) and td_target: float32 (batch,).
    """
    return F.mse_loss(q_value, td_target) if loss == "mse" else F.smooth_l1_loss(q_value, td_target)


class RMSprop(torch.optim.Optimizer):
    """The paper's RMSProp: w -= lr g / sqrt(v - m^2 + eps), m and v running means of g and g^2.

    PyTorch's centred one adds eps outside the root, where rounding can leave v - m^2 negative.
    """

    def __init__(self, weights: list[torch.Tensor], lr: float, eps: float, decay: float = 0.95):
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
                weight.addcdiv_(grad, (v - m**2 + group["eps"]).sqrt_(), value=-group["lr"])


def gradient_step(
    loss: torch.Tensor, q_network: nn.Module, weights: list[torch.Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """One optimizer step on the float32 `weights`, of which the network's parameters are copies in their precision."""
    q_network.zero_grad()
    loss.backward()
    for weight, parameter in zip(weights, q_network.parameters(), strict=True):
        weight.grad = parameter.grad.float()
    optimizer.step()
    for weight, parameter in zip(weights, q_network.parameters(), strict=True):
        parameter.data.copy_(weight)


def linear_schedule(start_e: float, end_e: float, duration: float, step: int) -> float:
    """Epsilon at an agent step: from start_e at step 0 in a straight line to end_e at `duration`, then constant."""
    return end_e if step >= duration else start_e + (end_e - start_e) * step / duration


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


def evaluate(args: Args, q_network: QNetwork, video_dir: Path) -> list[float]:
    """Unclipped scores of whole games under the paper's protocol: random no-ops at the start, epsilon 0.05."""
    rng = np.random.default_rng(args.seed)
    env = make_eval_env(args, rng, video_dir)
    device = next(q_network.parameters()).device
    returns = []
    for episode in range(args.eval_episodes):
        frame, _ = env.reset(seed=args.seed if episode == 0 else None)
        obs = np.zeros((1, STACK, FRAME_SIZE, FRAME_SIZE), np.uint8)
        episodic_return, terminated, truncated = 0.0, False, False
        while not (terminated or truncated):
            obs = np.concatenate([obs[:, 1:], frame[None, None]], axis=1)
            if rng.random() < EVAL_EPSILON:
                action = int(rng.integers(env.action_space.n))
            else:
                action = greedy_action(q_network, torch.from_numpy(obs).to(device))
            frame, reward, terminated, truncated, _ = env.step(action)
            episodic_return += float(reward)
        returns.append(episodic_return)
        print(f"evaluation game {episode + 1}/{args.eval_episodes}: {episodic_return:g}")
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


def choose_device(args: Args) -> tuple[torch.device, torch.dtype]:
    """The device and the precision of the network's arithmetic that --device and --precision ask for."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if args.precision != "auto":
        return torch.device(name), getattr(torch, args.precision)
    cpu = torch.cpu.get_capabilities()
    native = name == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    return torch.device(name), torch.bfloat16 if native else torch.float32


def make_optimizer(args: Args, weights: list[torch.Tensor]) -> torch.optim.Optimizer:
    if args.optimizer == "adam":
        return torch.optim.Adam(weights, lr=args.learning_rate, eps=args.optimizer_eps, fused=True)
    return RMSprop(weights, lr=args.learning_rate, eps=args.optimizer_eps)


def replay_size(args: Args) -> tuple[int, int]:
    """Screens that the replay memory draws from, and spare places for those that come between two checkpoints.

    The spare places are a tenth more than checkpoints are apart, for the games that end, but no more than a 32nd of the
    memory; when they are used up a checkpoint comes early.
    """
    capacity = min(args.buffer_size, 2 * args.total_timesteps + STACK + 1)  # a run stores no more
    if args.checkpoint_frequency == 0:
        return capacity, 0
    return capacity, min(11 * args.checkpoint_frequency // 10, max(capacity // 32, 1000)) + 2


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
    device, dtype = choose_device(args)
    args = dataclasses.replace(args, precision=str(dtype).removeprefix("torch."))
    run_dir = args.runs_dir / args.run_name
    checkpoint = load_checkpoint(args)
    check_replay_file(args, checkpoint)
    torch.backends.cudnn.deterministic = True
    torch.set_flush_denormal(True)  # Adam's moments may decay into denormals, at less than half the speed
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    env = make_env(args, rng)
    n_actions = int(env.action_space.n)
    run_dir.mkdir(parents=True, exist_ok=args.resume)
    lock(run_dir)
    if not checkpoint:
        (run_dir / REPLAY_FILE).unlink(missing_ok=True)
        save(run_dir / "args.json", plain(args))
    if args.track:
        start_tracking(args)
    # A killed run repeats what came after its checkpoint: TensorBoard forgets the first version from purge_step on.
    writer = SummaryWriter(run_dir, purge_step=checkpoint["progress"]["global_step"] + 1 if checkpoint else 0)

    # 1: initialise replay memory D to capacity N
    path = run_dir / REPLAY_FILE if args.checkpoint_frequency else None
    memory = ReplayMemory(*replay_size(args), rng, device, path)
    # 2: initialise action-value network Q with random weights
    q_network = QNetwork(n_actions).to(device)
    weights = [parameter.detach().clone() for parameter in q_network.parameters()]
    q_network.features.to(dtype)
    optimizer = make_optimizer(args, weights)
    # 3: initialise target network Q- with the weights of Q
    target_network = copy.deepcopy(q_network).requires_grad_(False)

    def snapshot() -> dict:
        return {
            "script": SCRIPT,
            "kind": "checkpoint",
            "args": plain(args),
            "progress": dataclasses.asdict(progress),
            "weights": weights,
            "target_network": target_network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "memory": memory.state_dict(),
            "env": env.get_state(),
            "rng": rng.bit_generator.state,
        }

    if checkpoint:
        progress = Progress(**checkpoint["progress"])
        for weight, parameter, saved in zip(weights, q_network.parameters(), checkpoint["weights"], strict=True):
            weight.copy_(saved)
            parameter.data.copy_(saved)
        target_network.load_state_dict(checkpoint["target_network"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        memory.load_state_dict(checkpoint["memory"])
        env.set_state(checkpoint["env"])
        rng.bit_generator.state = checkpoint["rng"]
    else:
        progress = Progress()
        log_hyperparameters(writer, args)
        frame, _ = env.reset(seed=args.seed)
        memory.begin_episode(frame)
    clock = Clock(progress, start_time)
    checkpoint_count = memory.count
    loss = q_value = None
    stop_signals = []

    def request_stop(signum: int, _: object) -> None:
        stop_signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)  # a second signal ends the program at once

    previous_handlers = {signum: signal.signal(signum, request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}

    for step in range(progress.global_step + 1, args.total_timesteps + 1):  # 4: for each step t
        # 5: with probability epsilon a random action, else the one of the highest value
        epsilon = linear_schedule(args.start_e, args.end_e, args.exploration_fraction * args.total_timesteps, step)
        if rng.random() < epsilon:
            action = int(rng.integers(n_actions))
        else:
            action = greedy_action(q_network, memory.newest_obs())

        # 6, 7: execute it, store the transition; the loss of a life is terminal for learning, but the game goes on
        frame, reward, terminated, truncated, info = env.step(action)
        memory.append(action, np.sign(reward), terminated or info["life_lost"], frame)
        progress.global_step = step
        progress.episodic_return += float(reward)
        progress.episodic_length += 1
        if terminated or truncated:
            progress.recent_returns = [*progress.recent_returns, progress.episodic_return][-100:]
            writer.add_scalar("charts/episodic_return", progress.episodic_return, step)
            writer.add_scalar("charts/episodic_length", progress.episodic_length, step)
            progress.episodic_return, progress.episodic_length = 0.0, 0
            frame, _ = env.reset()
            memory.begin_episode(frame)

        if step >= args.learning_starts and step % args.train_frequency == 0:
            # 8: sample a minibatch
            obs, actions, rewards, next_obs, terminals = memory.sample(args.batch_size)
            # 9: y_j = r_j at a terminal state, else r_j + gamma max_a' Q-(phi_{j+1}, a')
            with torch.no_grad():
                td_target = td_targets(rewards, terminals, target_network(next_obs), args.gamma)
            # 10: one gradient step
            q_value = q_network(obs).gather(1, actions[:, None]).squeeze(1)
            loss = td_loss(q_value, td_target, args.loss)
            gradient_step(loss, q_network, weights, optimizer)

        # 11: every C steps Q- = Q
        if step % args.target_network_frequency == 0:
            target_network.load_state_dict(q_network.state_dict())

        # The rest keeps the books.
        stopping, last = bool(stop_signals), step == args.total_timesteps
        room = memory.slots - memory.capacity - (memory.count - checkpoint_count)
        save_now = args.checkpoint_frequency > 0 and (
            step % args.checkpoint_frequency == 0 or room < 2 or stopping or last
        )
        if step % LOG_FREQUENCY == 0 or save_now or last:
            if loss is not None and not (loss.isfinite() and all(weight.isfinite().all() for weight in weights)):
                writer.close()
                fail(f"the loss is {loss.item()} by step {step:,}; try a lower --learning-rate")
            clock.tick(args.learning_starts)
            if step % LOG_FREQUENCY == 0 and loss is not None:
                writer.add_scalar("losses/td_loss", loss.item(), step)
                writer.add_scalar("losses/q_values", q_value.mean().item(), step)
                writer.add_scalar("charts/epsilon", epsilon, step)
                writer.add_scalar("charts/SPS", clock.sps, step)
            clock.show(args.total_timesteps)
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

    model = {name: weight for (name, _), weight in zip(q_network.named_parameters(), weights, strict=True)}
    content = {"script": SCRIPT, "kind": "model", "args": plain(args), "n_actions": n_actions, "weights": model}
    save(run_dir / "model.pt", content)
    returns = evaluate(args, q_network, run_dir / "videos")
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
            "precision": args.precision,
            "torch_threads": torch.get_num_threads(),
            "versions": {module.__name__: module.__version__ for module in (torch, np, gym, ale_py)}
            | {"python": platform.python_version()},
        },
    )
    (run_dir / REPLAY_FILE).unlink(missing_ok=True)
    if returns:
        print(f"{run_dir}: mean score {np.mean(returns):.1f}, standard deviation {np.std(returns):.1f}")


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
        "precision": ("auto", "float32", "bfloat16"),
        "optimizer": ("adam", "rmsprop"),
        "loss": ("mse", "huber"),
    }
    counts = ("total_timesteps", "buffer_size", "batch_size", "learning_starts", "train_frequency")
    for name, allowed in choices.items():
        if getattr(args, name) not in allowed:
            reject(args, name, f"choose one of {', '.join(allowed)}")
    for name in (*counts, "target_network_frequency", "learning_rate", "optimizer_eps"):
        if not 0 < getattr(args, name) < math.inf:
            reject(args, name, "must be greater than 0")
    for name in ("seed", "checkpoint_frequency", "eval_episodes"):
        if not 0 <= getattr(args, name) < 2**63:
            reject(args, name, "must not be negative, nor 2^63 or more")
    for name in ("gamma", "start_e", "end_e", "exploration_fraction", "sticky_actions"):
        if not 0 <= getattr(args, name) <= 1:
            reject(args, name, "must lie in [0, 1]")
    if args.device in ("cuda", "mps") and not getattr(torch, args.device).is_available():
        reject(args, "device", "PyTorch finds no such device here; use --device cpu")
    spec = gym.registry.get(args.env_id)
    if spec is None:
        games = [name for name in gym.registry if name.startswith("ALE/")]
        near = difflib.get_close_matches(args.env_id, games, n=3, cutoff=0.4)
        reject(args, "env_id", "no such game" + (f"; did you mean {', '.join(near)}?" if near else ""))
    if spec.entry_point != "ale_py.env:AtariEnv":
        reject(args, "env_id", "not an Atari game; this script plays ids such as ALE/Pong-v5")


def check_training(args: Args) -> None:
    """Ends the program with one line where the algorithm cannot run; creates nothing."""
    if args.buffer_size < args.batch_size + STACK + 1:
        reject(args, "buffer_size", f"must hold a batch and its stacks, {args.batch_size + STACK + 1} or more")
    check_replay(args, replay_bytes=sum(replay_size(args)) * FRAME_SIZE**2)


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
    """Plays with the weights of a model.pt, in the game that it was trained on."""
    content = load(args.evaluate, "--evaluate", "model")
    # Parsed again, the game and its stickiness default to those of the training.
    trained = Args(**{name: content["args"][name] for name in ("env_id", "sticky_actions")})
    args = tyro.cli(Args, default=trained)
    if args.env_id != trained.env_id:
        reject(args, "env_id", f"{args.evaluate} was trained on {trained.env_id}")
    if args.eval_episodes == 0:
        reject(args, "eval_episodes", "must be greater than 0 with --evaluate")
    device, dtype = choose_device(args)
    q_network = QNetwork(content["n_actions"])
    q_network.load_state_dict(content["weights"])
    q_network.to(device).features.to(dtype)
    returns = evaluate(args, q_network, args.evaluate.parent / "videos")
    print(f"{args.env_id}: mean score {np.mean(returns):.1f}, standard deviation {np.std(returns):.1f}")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    check_args(args)
    if args.evaluate:
        return evaluate_model(args)
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
