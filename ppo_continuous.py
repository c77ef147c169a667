"""PPO on continuous control in one file, after Schulman et al. 2017, "Proximal policy optimization algorithms".

    python ppo_continuous.py --env-id Hopper-v5 --seed 2                   # train; curves and weights in runs/
    python ppo_continuous.py --env-id Hopper-v5 --run-name h --resume      # start, or go on after a kill, to the bit
    python ppo_continuous.py --evaluate runs/h/model.pt --capture-video    # act with a trained policy

Proximal policy optimisation, the variant with clipping. The numbers recur in `train`, beside the code of each line.

     1  initialise policy pi_theta and value function V_phi
     2  for each iteration:
     3      run pi_theta_old in N environments for T steps
     4      keep states s_t, actions a_t, rewards r_t, log-probabilities log pi_theta_old(a_t | s_t)
     5      for K epochs:
     6          advantages A_t = sum over l of (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
     7          for each minibatch of the shuffled N T steps: ratio r(theta) = pi_theta(a | s) / pi_theta_old(a | s)
     8              L_CLIP = mean of min(r A, clip(r, 1 - eps, 1 + eps) A)
     9              L = -L_CLIP + c_1 mean of (V_phi(s) - target)^2 / 2 - c_2 entropy of pi_theta, target = A + V(s)
    10              one step of Adam down the gradient of L, its norm clipped
    11      the learning rate falls linearly

Differs from the paper:
- A terminal state has no value. A time limit is no terminal state: delta_t takes V of its true last state.
- As in OpenAI's code (baselines, ppo2) and CleanRL: observations are normalised by their mean and variance so far and
  rewards divided by the standard deviation of a discounted sum of past ones, both clipped to [-10, 10]; advantages are
  normalised in each minibatch; initial weights are orthogonal; the gradient's norm is clipped, that of policy and V
  together: only so does c_1 = 0.5, on half the squared error, touch the policy, which shares no weights with V; the
  learning rate falls, and Adam's epsilon is 1e-5.
- Theirs, but not ours: a time limit that counts as a terminal state; a clipped value loss, which hurts (Andrychowicz et
  al. 2021, section 3.4); statistics that change within a rollout. Here those of observations are of the rollouts
  before, so that a state has one value (in the first they are only clipped); those of rewards include this one.
- As that study recommends (section 3.5), advantages are estimated anew in each epoch; in the paper, once a rollout. The
  policy's standard deviation begins at exp(-0.5), as in Spinning Up and Tianshou; CleanRL's at 1.
- Actions are in units of [-1, 1], stretched to their bounds and clipped there for the environment alone;
  log-probabilities are of the unclipped ones. CleanRL and baselines only clip them.

The statistics of observations are part of the model. An evaluation acts by the policy's mean, with them as they are.
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
LOG_FREQUENCY = 1  # steps between two records of losses: every iteration


@dataclasses.dataclass
class Args:
    env_id: str = "HalfCheetah-v5"
    """with vectors of observations and of bounded float actions; MODULE:NAME imports one of yours"""
    total_timesteps: Count = 1_000_000
    """steps to train for, of all environments together; the last ones that fill no rollout are left out"""
    learning_rate: Positive = 3e-4
    """learning rate of Adam at the beginning; it falls linearly to 0"""
    num_envs: Count = 1
    """N: environments"""
    num_steps: Count = 2048
    """T: steps of each environment in a rollout"""
    gamma: Fraction = 0.99
    """discount factor"""
    gae_lambda: Fraction = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: Count = 32
    """minibatches in an epoch"""
    update_epochs: Count = 10
    """K: epochs over a rollout"""
    clip_coef: Positive = 0.2
    """eps: a ratio further than this from 1 has nothing more to gain"""
    ent_coef: NonNegative = 0.0
    """c_2: weight of the entropy"""
    vf_coef: NonNegative = 0.5
    """c_1: weight of the value loss"""
    max_grad_norm: Positive = 0.5
    """largest norm of the gradient"""

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


class RunningMoments:
    """Mean and variance of all rows so far (Chan, Golub and LeVeque 1983); 0 and 1 before the first row."""

    def __init__(self, *shape: int):
        self.count, self.mean, self.var = 0, np.zeros(shape), np.ones(shape)

    def update(self, rows: np.ndarray) -> None:
        """Takes in rows (..., *shape)."""
        rows = rows.reshape(-1, *self.mean.shape).astype(np.float64)
        count, delta = self.count + len(rows), rows.mean(0) - self.mean
        between = delta**2 * self.count * len(rows) / count
        self.var = (self.count * self.var + len(rows) * rows.var(0) + between) / count
        self.mean, self.count = self.mean + delta * len(rows) / count, count

    def normalise(self, rows: np.ndarray) -> np.ndarray:
        """Rows (..., *shape) at mean 0 and variance 1, clipped to [-10, 10], float32."""
        return ((rows - self.mean) / np.sqrt(self.var + 1e-8)).clip(-10, 10).astype(np.float32)

    def state_dict(self) -> dict:
        return {"count": self.count, "mean": torch.tensor(self.mean), "var": torch.tensor(self.var)}

    def load_state_dict(self, state: dict) -> None:
        self.count, self.mean, self.var = state["count"], state["mean"].numpy(), state["var"].numpy()


class RewardScale(RunningMoments):
    """Divides rewards by the standard deviation so far of R_t = gamma R_{t-1} + r_t, a sum of past ones."""

    def __init__(self, n_envs: int, gamma: float):
        super().__init__()
        self.gamma, self.discounted = gamma, np.zeros(n_envs)

    def scale(self, reward: np.ndarray, done: np.ndarray) -> np.ndarray:
        """Rewards and ends of episodes, both (T, n_envs), of the next rollout; gives float32, clipped to [-10, 10]."""
        returns = np.zeros(reward.shape)
        for t in range(len(reward)):
            returns[t] = self.discounted = self.gamma * self.discounted + reward[t]
            self.discounted = self.discounted * (1 - done[t])
        self.update(returns)
        return (reward / np.sqrt(self.var + 1e-8)).clip(-10, 10).astype(np.float32)

    def state_dict(self) -> dict:
        return super().state_dict() | {"discounted": torch.tensor(self.discounted)}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.discounted = state["discounted"].numpy()


def mlp(d_in: int, d_out: int, gain: float) -> nn.Sequential:
    """Two hidden layers of 64 tanh units; weights are orthogonal, times `gain` in the last layer, and biases 0."""
    layers = nn.Linear(d_in, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, d_out)
    for layer, scale in zip(layers[::2], (math.sqrt(2), math.sqrt(2), gain), strict=True):
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Policy(nn.Module):
    """pi_theta: a Gaussian with independent dimensions, whose standard deviation does not depend on the state."""

    def __init__(self, d_obs: int, d_action: int):
        super().__init__()
        self.mean, self.log_std = mlp(d_obs, d_action, gain=0.01), nn.Parameter(torch.full((d_action,), -0.5))

    def log_prob(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """log pi(a | s) of observations (batch, d_obs) and actions (batch, d_action): (batch,)."""
        z = (action - self.mean(obs)) * (-self.log_std).exp()
        return -0.5 * (z * z).sum(1) - (self.log_std + 0.5 * math.log(2 * math.pi)).sum()

    def entropy(self) -> torch.Tensor:
        """Of the distribution, in nats; it is the same in every state."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()

    def in_numpy(self) -> Callable[[np.ndarray], np.ndarray]:
        """The mean in NumPy, of observations float32 (batch, d_obs): for one, in a third of torch's time."""
        layers = [[x.detach().cpu().numpy() for x in (layer.weight.T, layer.bias)] for layer in self.mean[::2]]

        def mean(obs: np.ndarray) -> np.ndarray:
            for weight, bias in layers[:-1]:
                obs = np.tanh(obs @ weight + bias)  # as in `mlp`: change both
            return obs @ layers[-1][0] + layers[-1][1]

        return mean


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
    """Trains as the listing above says; returns the policy and the statistics of observations."""
    rng, device, envs = run.rng, run.device, [make_env(args) for _ in range(args.num_envs)]
    d_obs, d_action = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
    # 1: initialise policy pi_theta and value function V_phi
    policy, value_function = Policy(d_obs, d_action).to(device), mlp(d_obs, 1, gain=1.0).to(device)
    weights = as_vector(nn.ModuleList([policy, value_function]))  # with its norm by hand, a sixth less time a minibatch
    adam = torch.optim.Adam([weights], lr=args.learning_rate, eps=1e-5, fused=True)
    obs_moments, reward_scale = RunningMoments(d_obs), RewardScale(args.num_envs, args.gamma)

    parts = {"policy": policy, "value_function": value_function} | {f"env_{i}": env for i, env in enumerate(envs)}
    if not run.restore(adam=adam, obs_moments=obs_moments, reward_scale=reward_scale, **parts):
        for env in envs:
            env.reset(seed=int(rng.integers(2**31)))

    shape = args.num_steps, args.num_envs
    obs, next_obs = np.zeros((2, *shape, d_obs), np.float32)
    action = np.zeros((*shape, d_action), np.float32)
    reward, terminated, done = np.zeros((3, *shape), np.float32)
    size = args.num_steps * args.num_envs
    iterations = args.total_timesteps // size
    for step in run.steps(iterations * size, size, policy=policy, obs_moments=obs_moments):  # 2: for each iteration
        # 3: run pi_theta_old in N environments for T steps
        mean, std = policy.in_numpy(), policy.log_std.exp().detach().cpu().numpy()
        for t in range(args.num_steps):
            # 4: keep states, actions, rewards
            obs[t] = [env.obs for env in envs]
            noise = std * rng.standard_normal((args.num_envs, d_action), np.float32)
            action[t] = mean(obs_moments.normalise(obs[t])) + noise
            for i, env in enumerate(envs):
                next_obs[t, i], score, terminated[t, i], truncated, _ = env.step(action[t, i])
                reward[t, i], done[t, i] = score, terminated[t, i] or truncated
                run.count_reward(score, done[t, i], i)
                if done[t, i]:
                    env.reset()
        # 4: log-probabilities
        rows = obs_moments.normalise(obs), obs_moments.normalise(next_obs), action
        b_obs, b_next_obs, b_action = (torch.from_numpy(x).to(device).flatten(0, 1) for x in rows)
        with torch.no_grad():
            b_log_prob = policy.log_prob(b_obs, b_action)
        scaled = reward_scale.scale(reward, done)

        for epoch in range(args.update_epochs):  # 5: for K epochs
            # 6: advantages
            with torch.no_grad():
                value, next_value = (value_function(x).view(shape).cpu().numpy() for x in (b_obs, b_next_obs))
            advantage = gae(scaled, terminated, done, value, next_value, args.gamma, args.gae_lambda)
            target = advantage + value
            if epoch == 0:  # what V explains is logged as it was before the update
                before = value, target
            # 7: for each minibatch of the shuffled steps
            b_advantage, b_target = (torch.from_numpy(x).to(device).flatten() for x in (advantage, target))
            batch = b_obs, b_action, b_log_prob, b_advantage, b_target
            order = torch.from_numpy(rng.permutation(size)).to(device)
            minibatches = zip(*(x[order].chunk(args.num_minibatches) for x in batch), strict=True)
            for mb_obs, mb_action, mb_log_prob, mb_advantage, mb_target in minibatches:
                # its ratio r(theta)
                log_ratio = policy.log_prob(mb_obs, mb_action) - mb_log_prob
                # 8: L_CLIP
                policy_loss = clipped_loss(log_ratio, normalise(mb_advantage), args.clip_coef)
                # 9: value loss and entropy
                value_loss = F.mse_loss(value_function(mb_obs).squeeze(1), mb_target) / 2
                entropy = policy.entropy()
                loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
                # 10: one step of Adam, the gradient's norm clipped
                weights.grad.zero_()
                loss.backward()
                weights.grad.mul_((args.max_grad_norm / (weights.grad.norm() + 1e-6)).clamp(max=1))
                adam.step()
        obs_moments.update(obs)  # for the next rollout
        run.log({"losses/policy_loss": policy_loss, "losses/value_loss": value_loss, "losses/entropy": entropy})
        run.log(diagnostics(log_ratio, args.clip_coef, *before) | {"charts/learning_rate": adam.param_groups[0]["lr"]})
        # 11: the learning rate falls linearly
        adam.param_groups[0]["lr"] = args.learning_rate * (1 - step / (iterations * size))

    for env in envs:
        env.close()
    return {"policy": policy, "obs_moments": obs_moments}


def evaluate(args: Args, model: dict[str, dict], device: torch.device, folder: Path | None) -> dict[str, float]:
    """Returns of whole episodes with the policy's mean, which sees observations normalised as the training left it."""
    if args.eval_episodes == 0:
        return {}
    env = make_env(args, folder / f"videos-{time.time():.6f}" if folder and args.capture_video else None)
    policy = Policy(env.observation_space.shape[0], env.action_space.shape[0]).to(device)
    obs_moments = RunningMoments(env.observation_space.shape[0])
    policy.load_state_dict(model["policy"])
    obs_moments.load_state_dict(model["obs_moments"])
    returns, mean = np.zeros(args.eval_episodes), policy.in_numpy()
    for episode in progress_bar(range(args.eval_episodes), desc="evaluation: ", delay=10):
        obs, _ = env.reset(seed=args.seed + EVAL_SEED if episode == 0 else None)
        for _ in range(EVAL_MAX_STEPS):
            obs, reward, terminated, truncated, _ = env.step(mean(obs_moments.normalise(obs[None]))[0])
            returns[episode] += reward
            if terminated or truncated:
                break
    env.close()
    return {"eval_return_mean": returns.mean(), "eval_return_std": returns.std(), "eval_episodes": len(returns)}


def check(args: Args) -> str:
    """Refuses what only this script can refuse; returns the name of what it trains on."""
    size = args.num_envs * args.num_steps
    if size > args.total_timesteps:
        fail(f"--num-envs {args.num_envs} --num-steps {args.num_steps}: a rollout must not exceed --total-timesteps")
    if size % args.num_minibatches or size == args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches}: must divide the {size} steps of a rollout into 2 or more each")
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
