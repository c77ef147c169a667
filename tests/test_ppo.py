"""Tests of ppo_continuous.py and ppo_atari.py against independent oracles; each says what it compares with.

What scripts share is the same to the letter (test_scripts.py), and tested in one; where a loop uses it, in each.
"""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
import torch
from common import message_of, scalars
from test_dqn_atari import papers_network

import ppo_atari
import ppo_continuous as ppo
import trpo_continuous as trpo

both = pytest.mark.parametrize("script", [ppo, ppo_atari])


@pytest.fixture
def estimated(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Fills with what each iteration of a training gives to `gae`, and what it gets."""
    calls = []
    for script in (ppo, ppo_atari, trpo):

        def gae(*arguments: np.ndarray, original: Callable = script.gae) -> np.ndarray:
            calls.append((*(np.copy(a) for a in arguments), original(*arguments)))
            return calls[-1][-1]

        monkeypatch.setattr(script, "gae", gae)
    return calls


def make_run(tmp_path: Path, script: ModuleType, env_id: str, **flags: object) -> object:
    args = script.Args(runs_dir=tmp_path, env_id=env_id, run_name="it", device="cpu", eval_episodes=0, **flags)
    return script.Run(args, script.check(args))


# --- Advantages -------------------------------------------------------------------------------------------------------


def advantage_by_sums(reward, terminated, done, value, next_value, gamma, gae_lambda) -> np.ndarray:
    """The definition: for each step the sum of (gamma lambda)^l delta over the rest of its episode in the rollout."""
    advantage = np.zeros(reward.shape)
    for t, i in np.ndindex(reward.shape):
        for later in range(t, len(reward)):
            after = 0.0 if terminated[later, i] else next_value[later, i]
            delta = float(reward[later, i]) + gamma * float(after) - float(value[later, i])
            advantage[t, i] += (gamma * gae_lambda) ** (later - t) * delta
            if done[later, i]:
                break
    return advantage


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (0.9, 1.0), (1.0, 0.0), (0.5, 0.5)])
def test_gae_is_the_sum_over_whole_episodes(gamma: float, gae_lambda: float) -> None:
    """With terminal states and time limits at every place: first, last, one after the other, both at once."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        reward, value, next_value = rng.normal(size=(3, 9, 4)).astype(np.float32)
        terminated, truncated = rng.random((2, 9, 4)) < rng.choice([0.1, 0.5, 0.9])
        columns = reward, terminated.astype(np.float32), (terminated | truncated).astype(np.float32), value, next_value
        expected = advantage_by_sums(*columns, gamma, gae_lambda)
        np.testing.assert_allclose(ppo.gae(*columns, gamma, gae_lambda), expected, rtol=1e-4, atol=1e-5)


class Count(gym.Env):
    """Its observation is the number of steps so far, and its time limit is drawn; every 3rd episode really ends."""

    metadata = {"render_modes": []}  # noqa: RUF012
    observation_space, action_space = gym.spaces.Box(-1e6, 1e6, (1,)), gym.spaces.Box(-2, 6, (2,))
    episodes, taken = 0, []

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        Count.episodes += 1
        self.t, self.last = 0, int(self.np_random.integers(1, 6))
        return np.float32([0]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        Count.taken.append(action)
        self.t += 1
        over = self.t == self.last
        return np.float32([self.t]), 1.0, over and Count.episodes % 3 == 0, over, {}


gym.register("Count-v0", "test_ppo:Count")
SMALL = {"num_envs": 3, "num_steps": 20, "num_minibatches": 4, "update_epochs": 1, "total_timesteps": 180}


@pytest.mark.parametrize("script", [ppo, trpo])
def test_an_episode_that_a_time_limit_cuts_has_the_value_of_its_true_last_state(
    script: ModuleType, tmp_path: Path, estimated: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    """V(count) = count, as the observations are left alone: what follows count t is t + 1, and never the new 0."""
    monkeypatch.setattr(script.RunningMoments, "normalise", lambda _, rows: rows)

    class FirstDimension(torch.nn.Linear):
        def forward(self, obs: torch.Tensor) -> torch.Tensor:
            return obs[:, :1] + 0 * self.bias

    mlp = script.mlp  # of V, and of the policy's mean, which is made with a smaller gain
    monkeypatch.setattr(script, "mlp", lambda *a, gain: FirstDimension(1, 1) if gain == 1 else mlp(*a, gain))
    script.train((run := make_run(tmp_path, script, "Count-v0", **SMALL)).args, run)
    run.writer.flush()
    assert len(estimated) == 3  # an iteration, of one epoch, each
    for _, terminated, done, value, next_value, *_ in estimated:
        assert 0 < terminated.sum() < done.sum() < done.size
        np.testing.assert_array_equal(next_value, value + 1)
        np.testing.assert_array_equal(value[1:], np.where(done[:-1], 0, value[:-1] + 1))
    lengths = [length for _, length in scalars(run.dir, "charts/episodic_length")]  # by step, then by environment
    assert lengths == [count + 1 for _, _, done, value, *_ in estimated for count in value[done == 1]]


class Screens(gym.Wrapper):
    """In Atari's place: a screen's grey is the number of steps so far; lives are lost, and time limits come."""

    def __init__(self, rng: np.random.Generator, limit: int):
        super().__init__(gym.make("CartPole-v1"))
        self.rng, self.limit, self.action_space = rng, limit, gym.spaces.Discrete(3)

    def reset(self, **_: object) -> tuple[np.ndarray, dict]:
        self.t = 0
        return np.full((84, 84), 0, np.uint8), {}

    def step(self, _: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        over, end = self.t == self.limit, self.limit % 2 == 1
        screen = np.full((84, 84), self.t, np.uint8)
        return screen, 7.0 * (self.t - 4), over and end, over and not end, {"life_lost": self.t == 3}

    def state_dict(self) -> dict:
        return {}


def test_atari_by_hand_and_a_lost_life_is_terminal_but_the_game_goes_on(
    tmp_path: Path, estimated: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop once more, with three logits for all screens and V(screens) = the newest grey + b.

    Games of 5 steps end, those of 8 are cut; a life is lost in the third step.
    """
    limits, limit = iter([5, 8, 8]), np.array([5, 8, 8])
    monkeypatch.setattr(ppo_atari, "make_atari", lambda _, rng: Screens(rng, next(limits)))

    def forward(network: torch.nn.Module, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return network.policy.bias.expand(len(obs), -1), obs[:, 0, 0, -1].float() + network.value.bias

    monkeypatch.setattr(ppo_atari.ActorCritic, "forward", forward)
    flags = {"update_epochs": 2, "learning_rate": 0.1, "clip_coef": 0.05, "ent_coef": 0.5, "vf_coef": 0.3}
    flags |= {"gamma": 0.9, "gae_lambda": 0.8, "max_grad_norm": 1e-4}
    run = make_run(tmp_path, ppo_atari, "ALE/Pong-v5", **SMALL | flags)
    network = ppo_atari.train(run.args, run)["actor_critic"]

    rng, logits, b = np.random.default_rng(1), torch.zeros(3, requires_grad=True), torch.zeros(1, requires_grad=True)
    adam = torch.optim.Adam([logits, b], lr=0.1, eps=1e-5)
    rng.integers(2**31, size=3)  # the seeds of the environments
    for iteration, (reward, terminal, done, value, next_value, gamma, gae_lambda, advantage) in enumerate(estimated):
        step = (20 * iteration + np.arange(20)[:, None]) % limit + 1
        np.testing.assert_array_equal(reward, np.sign(step - 4))
        np.testing.assert_array_equal(terminal, (step == 3) | ((step == limit) & (limit == 5)))
        np.testing.assert_array_equal(done, (step == 3) | (step == limit))
        np.testing.assert_allclose(value, step - 1 + b.item(), rtol=1e-5)
        np.testing.assert_allclose(next_value[terminal == 0], step[terminal == 0] + b.item(), rtol=1e-5)
        assert (gamma, gae_lambda) == (0.9, 0.8)
        action = []
        for row in step:  # a value for what the time limit cuts takes a draw too
            action.append((logits.detach().numpy() + rng.gumbel(size=(3, 3))).argmax(axis=1))
            rng.gumbel(size=(2 * (row[1] == 8), 3))
        rng.gumbel(size=(3, 3))
        kept = (np.array(action), step - 1, advantage, advantage + value)
        action, grey, advantage, target = (torch.from_numpy(x).flatten() for x in kept)
        old = logits.detach().log_softmax(0)[action]
        for _ in range(2):
            for index in np.split(rng.permutation(60), 4):
                policy = torch.distributions.Categorical(logits=logits)
                ratio = torch.exp(policy.log_prob(action[index]) - old[index])
                gain = (advantage[index] - advantage[index].mean()) / advantage[index].std()
                surrogate = torch.min(ratio * gain, torch.clip(ratio, 0.95, 1.05) * gain).mean()
                loss = -surrogate + 0.3 * ((grey[index] + b - target[index]) ** 2).mean() / 2 - 0.5 * policy.entropy()
                adam.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_([logits, b], 1e-4)
                adam.step()
        adam.param_groups[0]["lr"] = 0.1 * (1 - (iteration + 1) / 3)
    torch.testing.assert_close(network.policy.bias, logits, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(network.value.bias, b, rtol=1e-3, atol=1e-5)
    explained = 1 - (advantage.var() / target.var()).item()  # of the last rollout
    assert scalars(run.dir, "losses/explained_variance")[-1] == (180, pytest.approx(explained, rel=1e-4))
    episodes = scalars(run.dir, "charts/episodic_return")
    assert {value for _, value in episodes} == {7.0 * (-3 - 2 - 1 + 0 + 1), 7.0 * (-3 - 2 - 1 + 0 + 1 + 2 + 3 + 4)}


def test_screens_are_stacked_and_black_before_the_start() -> None:
    screens = Screens(np.random.default_rng(0), limit=9)
    env = ppo_atari.StackedScreens(gym.wrappers.TransformObservation(screens, lambda screen: screen + 1, None))
    obs, _ = env.reset()
    greys = [obs[0, 0].tolist()]
    for _ in range(5):
        obs, *_ = env.step(0)
        greys.append(obs[0, 0].tolist())
        assert obs is env.obs
    assert greys == [[0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]


# --- The loss ---------------------------------------------------------------------------------------------------------


def test_clipped_loss_by_hand() -> None:
    """min(r A, clip(r) A) with eps 0.2: clipped where it would gain, never where it would lose; flat where clipped."""
    cases = [(1.5, 2.0, 1.2 * 2), (1.5, -2.0, -3.0), (0.5, 2.0, 1.0), (0.5, -2.0, -0.8 * 2), (1.1, 2.0, 2.2)]
    for ratio, advantage, expected in cases:
        log_ratio = torch.tensor([ratio]).log().requires_grad_()
        loss = ppo.clipped_loss(log_ratio, torch.tensor([advantage]), 0.2)
        loss.backward()
        assert -loss.item() == pytest.approx(expected, rel=1e-5)
        assert (log_ratio.grad == 0).item() == (expected != pytest.approx(ratio * advantage))


def test_diagnostics_by_hand() -> None:
    ratio = torch.tensor([1.0, 1.5, 0.7, 1.05])
    value, target = np.float32([[1], [2], [3]]), np.float32([[1], [2], [6]])
    said = ppo.diagnostics(ratio.log(), 0.2, value, target)
    assert said["losses/approx_kl"] == pytest.approx(np.mean([r - 1 - np.log(r) for r in ratio.numpy()]), rel=1e-4)
    assert said["losses/clipfrac"] == 0.5
    assert said["losses/explained_variance"] == pytest.approx(1 - np.var([0, 0, 3]) / np.var([1, 2, 6]))
    constant = ppo.diagnostics(ratio.log(), 0.2, value, np.zeros_like(target))
    assert constant["losses/explained_variance"] == 0


def test_the_explained_variance_is_that_of_the_values_before_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though advantages, and values with them, are taken anew in each of three epochs."""
    estimated, explained, gae, diagnostics = [], [], ppo.gae, ppo.diagnostics
    monkeypatch.setattr(ppo, "gae", lambda *given: estimated.append(given[3]) or gae(*given))
    monkeypatch.setattr(ppo, "diagnostics", lambda *given: explained.append(given[2]) or diagnostics(*given))
    flags = {"num_steps": 64, "num_minibatches": 4, "update_epochs": 3, "total_timesteps": 128}
    run = make_run(tmp_path, ppo, "Target-v0", **flags)
    ppo.train(run.args, run)
    assert len(estimated) == 6
    assert all(np.array_equal(*pair) for pair in zip(explained, estimated[::3], strict=True))
    assert not np.array_equal(estimated[0], estimated[2])


def test_policy_is_a_gaussian() -> None:
    """Against torch.distributions; the means of a new one are near 0, and its standard deviation exp(-0.5)."""
    torch.manual_seed(0)
    policy = ppo.Policy(5, 3)
    torch.testing.assert_close(policy.entropy() / 3, torch.distributions.Normal(0.0, math.exp(-0.5)).entropy())
    policy.log_std.data = torch.tensor([-1.0, 0.0, 0.5])
    obs, action = torch.randn(7, 5), torch.randn(7, 3)
    gaussian = torch.distributions.Normal(policy.mean(obs), policy.log_std.exp())
    torch.testing.assert_close(policy.log_prob(obs, action), gaussian.log_prob(action).sum(1))
    torch.testing.assert_close(policy.entropy(), gaussian.entropy()[0].sum())
    np.testing.assert_allclose(policy.in_numpy()(obs.numpy()), policy.mean(obs).detach(), rtol=1e-4, atol=1e-6)
    assert policy.mean(obs).abs().max() < 0.1


def test_atari_samples_from_the_softmax() -> None:
    """Of the paper's network, with a second output for the value."""
    torch.manual_seed(0)
    network = ppo_atari.ActorCritic(3)
    network.policy.bias.data = torch.tensor([0.0, 1.0, -1.0])
    obs = np.random.default_rng(0).integers(256, size=(1, 84, 84, 4)).astype(np.uint8)
    logits, value = network(torch.from_numpy(obs))
    for head, given in ((network.policy, logits), (network.value, value[:, None])):
        weights = [*network.layers.parameters(), *head.parameters()]
        expected = papers_network(weights, torch.from_numpy(obs).permute(0, 3, 1, 2))
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    categorical = torch.distributions.Categorical(logits=logits[0])
    rng, counts = np.random.default_rng(0), np.zeros(3)
    with torch.no_grad():
        network.forward = lambda batch: (logits.expand(len(batch), -1), value.expand(len(batch)))
        action, log_prob, values = network.act(np.repeat(obs, 20_000, axis=0), rng)
    counts = np.bincount(action, minlength=3) / len(action)
    np.testing.assert_allclose(counts, categorical.probs.detach(), atol=0.015)  # four standard deviations
    np.testing.assert_allclose(log_prob, categorical.log_prob(torch.from_numpy(action)).detach(), rtol=1e-5)
    np.testing.assert_array_equal(values, value.item())


def test_atari_evaluation_samples_other_games_and_counts_whole_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """7 for each action 1, of probability p, in games of 8 steps: 56 p on average, within five standard deviations."""
    made, seeds = [], []

    class Rewarded(Screens):
        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
            seeds.append(seed)
            return super().reset()

        def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
            screen, _, *rest = super().step(action)
            return screen, 7.0 * (action == 1), *rest

    def make(_: object, rng: np.random.Generator, video_dir: None, **limits: int) -> gym.Env:
        made.append((rng.bit_generator.seed_seq.entropy, limits))
        return Rewarded(rng, limit=8)

    monkeypatch.setattr(ppo_atari, "make_atari", make)
    monkeypatch.setattr(
        ppo_atari.ActorCritic, "forward", lambda net, x: (net.policy.bias.expand(len(x), -1), net.value.bias)
    )
    network = ppo_atari.ActorCritic(3)
    network.policy.bias.data = torch.tensor([0.0, 1.0, -1.0])
    model = {"actor_critic": network.state_dict()}
    figures = ppo_atari.evaluate(ppo_atari.Args(seed=2, eval_episodes=40), model, torch.device("cpu"), None)
    p = network.policy.bias.softmax(0)[1].item()
    assert figures["eval_return_mean"] == pytest.approx(56 * p, abs=5 * 7 * (8 * p * (1 - p) / 40) ** 0.5)
    assert figures["eval_return_std"] == pytest.approx(7 * (8 * p * (1 - p)) ** 0.5, rel=0.5)
    assert made == [(1_000_002, {"max_num_frames_per_episode": 18_000})]
    assert seeds == [1_000_002] + [None] * 39


@both
def test_initial_weights_are_orthogonal(script: ModuleType) -> None:
    torch.manual_seed(0)
    if script is ppo:
        networks = {0.01: ppo.Policy(20, 3).mean, 1.0: ppo.mlp(20, 1, gain=1.0)}
    else:
        network = ppo_atari.ActorCritic(6)
        networks = {gain: [*network.layers, head] for gain, head in {0.01: network.policy, 1.0: network.value}.items()}
    for gain, network in networks.items():
        layers = [layer for layer in network if hasattr(layer, "weight")]
        for layer in layers:
            weight, scale = layer.weight.detach().flatten(1), gain if layer is layers[-1] else 2**0.5
            product = weight @ weight.T if len(weight) < weight.shape[1] else weight.T @ weight
            torch.testing.assert_close(product, scale**2 * torch.eye(len(product)), atol=1e-4, rtol=0)
            assert not layer.bias.any()


# --- Statistics -------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_all_rows() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.normal(3, 50, (n, 2, 5)).astype(np.float32) for n in (1, 7, 100)]
    moments = ppo.RunningMoments(5)
    np.testing.assert_array_equal(moments.normalise(np.float32([[1, -2, 3, 40, -50]])), [[1, -2, 3, 10, -10]])
    for batch in batches:
        moments.update(batch)
    rows = np.concatenate(batches).reshape(-1, 5).astype(np.float64)
    np.testing.assert_allclose(moments.mean, rows.mean(0))
    np.testing.assert_allclose(moments.var, rows.var(0))
    normalised = moments.normalise(rows)
    np.testing.assert_allclose([normalised.mean(0), normalised.std(0)], [[0] * 5, [1] * 5], atol=1e-5)


def test_rewards_are_scaled_by_the_discounted_return() -> None:
    """Returns by hand over rollouts; episodes go on from one to the next, and the last one has two rare rewards."""
    scale, rng = ppo.RewardScale(2, 0.9), np.random.default_rng(0)
    returns, carry = [], np.zeros(2)
    for i in range(60):
        reward, done = rng.normal(5, 2, (4, 2)).astype(np.float32), np.float32(rng.random((4, 2)) < 0.3)
        if i == 59:
            reward[3] = 1e4, -1e4
        for t in range(4):
            carry = 0.9 * carry + reward[t]
            returns.append(carry)
            carry = np.where(done[t], 0, carry)
        np.testing.assert_allclose(scale.scale(reward, done), (reward / np.std(returns)).clip(-10, 10), rtol=1e-5)


# --- The loop ---------------------------------------------------------------------------------------------------------


class Rollouts:
    """Of 16 steps in each of two environments, the statistics by numpy over all that was seen before."""

    def __init__(self, policy: torch.nn.Module, rng: np.random.Generator, gamma: float):
        self.policy, self.rng, self.gamma, Count.episodes = policy, rng, gamma, 0
        self.envs, self.obs = [Count(), Count()], []
        for env in self.envs:  # as the wrapper does: one reset for the seed, one for the episode
            env.reset(seed=int(rng.integers(2**31)))
            self.obs.append(env.reset()[0])
        self.raw, self.returns, self.carry = [], [], np.zeros(2)

    def normalised(self, obs: np.ndarray) -> torch.Tensor:
        mean, var = (np.mean(self.seen), np.var(self.seen)) if self.seen else (0, 1)
        return torch.from_numpy(np.clip((obs - mean) / np.sqrt(var + 1e-8), -10, 10)).float()

    def next(self) -> tuple:
        """Normalised states and next ones, actions, scaled rewards, ends by a terminal state and all ends: (16, 2)."""
        self.seen, rows = list(self.raw), []
        for _ in range(16):
            x = np.array(self.obs)
            with torch.no_grad():
                mu, sigma = self.policy.mean(self.normalised(x)), self.policy.log_std.exp()
            action = (mu + sigma * torch.from_numpy(self.rng.standard_normal((2, 2), np.float32))).numpy()
            step = []
            for i, env in enumerate(self.envs):
                after, reward, terminated, truncated, _ = env.step(np.clip(-2 + (action[i] + 1) / 2 * 8, -2, 6))
                step.append((after, reward, terminated, terminated or truncated))
                self.obs[i] = env.reset()[0] if step[i][-1] else after
            after, reward, terminated, done = (np.array(column) for column in zip(*step, strict=True))
            rows.append((x, after, action, reward, terminated, done))
            self.raw.append(x)
            self.carry = self.gamma * self.carry + reward
            self.returns.append(self.carry)
            self.carry = np.where(done, 0, self.carry)
        x, after, action, reward, terminated, done = (np.array(column) for column in zip(*rows, strict=True))
        reward = np.clip(reward / np.sqrt(np.var(self.returns) + 1e-8), -10, 10)
        return self.normalised(x), self.normalised(after), torch.from_numpy(action), reward, terminated, done


def test_two_iterations_by_hand(tmp_path: Path) -> None:
    """The whole training once more, with PyTorch's plain modules, distributions, Adam and clipping, in one function."""
    flags = {"num_envs": 2, "num_steps": 16, "num_minibatches": 4, "update_epochs": 3, "total_timesteps": 64}
    flags |= {"ent_coef": 0.01, "learning_rate": 1e-2, "seed": 3, "gamma": 0.9, "gae_lambda": 0.8}
    flags |= {"clip_coef": 0.1, "vf_coef": 0.3, "max_grad_norm": 0.2}
    run, Count.episodes = make_run(tmp_path, ppo, "Count-v0", **flags), 0
    trained = ppo.train(run.args, run)

    torch.manual_seed(3)
    policy, value_function = ppo.Policy(1, 2), ppo.mlp(1, 1, gain=1.0)
    weights = [*policy.parameters(), *value_function.parameters()]
    adam = torch.optim.Adam(weights, lr=1e-2, eps=1e-5)
    rollouts, logged = Rollouts(policy, rng := np.random.default_rng(3), 0.9), []
    for iteration in range(2):
        s, s_after, a, reward, terminated, done = rollouts.next()
        with torch.no_grad():
            old = torch.distributions.Normal(policy.mean(s), policy.log_std.exp()).log_prob(a).sum(-1)
        for _ in range(3):
            value, next_value = (value_function(o)[..., 0].detach().numpy() for o in (s, s_after))
            advantage = advantage_by_sums(reward, terminated, done, value, next_value, 0.9, 0.8)
            advantage, target = (torch.from_numpy(v).float() for v in (advantage, advantage + value))
            for index in np.split(rng.permutation(32), 4):
                i, j = torch.from_numpy(index // 2), torch.from_numpy(index % 2)
                gaussian = torch.distributions.Normal(policy.mean(s[i, j]), policy.log_std.exp())
                ratio = torch.exp(gaussian.log_prob(a[i, j]).sum(-1) - old[i, j])
                gain = (advantage[i, j] - advantage[i, j].mean()) / (advantage[i, j].std() + 1e-8)
                surrogate = torch.min(ratio * gain, torch.clip(ratio, 0.9, 1.1) * gain).mean()
                error = ((value_function(s[i, j])[:, 0] - target[i, j]) ** 2).mean()
                entropy = gaussian.entropy().sum(-1).mean()
                adam.zero_grad()
                (-surrogate + 0.3 * error / 2 - 0.01 * entropy).backward()
                torch.nn.utils.clip_grad_norm_(weights, 0.2)
                adam.step()
        kl, outside = (ratio - 1 - ratio.log()).mean(), ((ratio < 0.9) | (ratio > 1.1)).float().mean()
        logged.append([x.item() for x in (-surrogate, error / 2, entropy, kl, outside)] + [adam.param_groups[0]["lr"]])
        adam.param_groups[0]["lr"] = 1e-2 * (1 - (iteration + 1) / 2)
    assert trained["obs_moments"].count == 64
    np.testing.assert_allclose(trained["obs_moments"].mean, [np.mean(rollouts.raw)])
    for ours, theirs in zip(trained["policy"].parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-5)
    run.writer.flush()
    tags = [f"losses/{name}" for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")]
    said = [[value for _, value in scalars(run.dir, tag)] for tag in [*tags, "charts/learning_rate"]]
    np.testing.assert_allclose(said, np.transpose(logged), rtol=1e-2, atol=1e-4)
    assert 0 < outside < 1


def test_the_environment_gets_clipped_actions_within_its_bounds(tmp_path: Path) -> None:
    """Bounds of -2 and 6, a standard deviation of 0.6 times half their distance: a tenth of the actions lie outside."""
    Count.taken = []
    ppo.train((run := make_run(tmp_path, ppo, "Count-v0", **SMALL)).args, run)
    taken = np.array(Count.taken)
    assert (taken.min(), taken.max()) == (-2, 6)
    assert 0.03 < np.mean((taken == -2) | (taken == 6)) < 0.2
    assert taken.mean() == pytest.approx(2, abs=0.6)


class Target(gym.Env):
    """The reward of an action is minus its squared distance from the observation; every episode is cut."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-2, 2, (1,))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t, self.target = 0, self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.target, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward, self.t = -float((action[0] - self.target[0]) ** 2), self.t + 1
        self.target = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.target, reward, False, self.t == 20, {}


gym.register("Target-v0", "test_ppo:Target")


def test_it_learns_to_hit_what_it_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Always in the middle 20 steps cost 20 / 3 = 6.7, at random more. It evaluates by the mean and changes nothing."""
    flags = {"num_envs": 4, "num_steps": 64, "num_minibatches": 8, "total_timesteps": 15_000, "learning_rate": 3e-3}
    run = make_run(tmp_path, ppo, "Target-v0", **flags, gamma=0.5)
    model = ppo.train(run.args, run)
    run.args.eval_episodes = 10
    monkeypatch.setattr(ppo.RunningMoments, "update", None)
    states = {name: part.state_dict() for name, part in model.items()}
    figures = ppo.evaluate(run.args, states, torch.device("cpu"), None)
    assert figures["eval_return_mean"] > -0.5  # without the statistics of observations it would be 1 less
    assert figures == ppo.evaluate(run.args, states, torch.device("cpu"), None)


BAD = [
    (ppo, "--num-envs 3 --num-steps 50 --num-minibatches 4", "--num-minibatches 4: must divide the 150 steps"),
    (ppo, "--num-steps 64 --num-minibatches 64", "--num-minibatches 64: must divide the 64 steps"),
    (ppo, "--num-envs 2 --num-steps 600 --total-timesteps 1199", "must not exceed --total-timesteps"),
    (trpo, "--num-steps 64 --num-minibatches 10", "--num-minibatches 10: must divide the 64 steps"),
    (trpo, "--num-envs 1 --num-steps 1", "a rollout must have 2 steps or more"),
    (ppo, "--env-id CartPole-v1", "vectors (Box): observations and bounded float actions"),
    (ppo, "--env-id ALE/Pong-v5", "for Atari take a script"),
    (ppo_atari, "--env-id ALE/Pong-v5 --num-envs 3 --num-steps 50", "--num-minibatches 4: must divide the 150 steps"),
    (ppo_atari, "--env-id ALE/Pong-v5 --total-timesteps 1000", "must not exceed --total-timesteps"),
    (ppo_atari, "--env-id Pong", "did you mean ALE/Pong-v5"),
]


@pytest.mark.parametrize(("script", "flags", "expected"), BAD)
def test_bad_input(
    script: ModuleType,
    flags: str,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in message_of(script, flags.split(), capsys, monkeypatch)
    assert not list(tmp_path.glob("runs/*"))
