"""Tests of trpo_continuous.py against independent oracles; what it shares with ppo_continuous.py is tested there."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from common import scalars
from test_ppo import Count, Rollouts, advantage_by_sums, make_run

import trpo_continuous as trpo

ARGS = trpo.Args(cg_steps=150, target_kl=1e-6, cg_damping=0.1, line_search_shrink=0.7, line_search_steps=4)


def make_step(seed: int = 0) -> tuple:
    """A small policy of double precision, and a batch for it."""
    torch.manual_seed(seed)
    policy = trpo.Policy(3, 2)
    policy.mean = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    policy.log_std.data = torch.tensor([-0.5, 0.3])
    policy.double()
    obs = torch.randn(60, 3, dtype=torch.float64)
    action = policy.mean(obs).detach() + policy.log_std.detach().exp() * torch.randn(60, 2, dtype=torch.float64)
    return policy, obs, action, trpo.normalise(torch.randn(60, dtype=torch.float64))


def weights_of(policy: trpo.Policy) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()


def dense_fisher(policy: trpo.Policy, obs: torch.Tensor) -> torch.Tensor:
    """Of a Gaussian: the mean over states of J^T Sigma^-1 J by the mean's weights, and 2 for each log_std."""
    weights = {name: weight.detach() for name, weight in policy.named_parameters()}

    def mean(weights: dict, s: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(policy, weights, (s,))

    policy.forward = policy.mean.forward
    fisher = 0
    for s in obs:
        jacobian = torch.func.jacrev(mean)(weights, s)
        rows = torch.cat([jacobian[name].flatten(1) for name in weights], dim=1)
        fisher = fisher + rows.T @ torch.diag((-2 * policy.log_std.detach()).exp()) @ rows / len(obs)
    names = [name for name, weight in weights.items() for _ in range(weight.numel())]
    return fisher + torch.diag(torch.tensor([2.0 * (name == "log_std") for name in names], dtype=torch.float64))


def test_kl_is_that_of_the_distributions() -> None:
    torch.manual_seed(0)
    mean, new_mean = torch.randn(2, 7, 3)
    log_std, new_log_std = torch.randn(2, 3)
    old, new = (torch.distributions.Normal(*pair) for pair in ((mean, log_std.exp()), (new_mean, new_log_std.exp())))
    expected = torch.distributions.kl_divergence(old, new).sum(1).mean()
    torch.testing.assert_close(trpo.gaussian_kl(mean, log_std, new_mean, new_log_std), expected)
    assert trpo.gaussian_kl(mean, log_std, mean, log_std) == 0


@pytest.mark.parametrize("size", [1, 5, 30])
def test_conjugate_gradients_solve(size: int) -> None:
    torch.manual_seed(size)
    root, g = torch.randn(size, size, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(size, dtype=torch.float64)
    x = trpo.conjugate_gradients(lambda v: matrix @ v, g, 10 * size, tolerance=1e-24)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, g))
    errors = [trpo.conjugate_gradients(lambda v: matrix @ v, g, steps) for steps in range(min(size, 4))]
    energy = [((e - x) @ matrix @ (e - x)).item() for e in errors]  # what the method makes smaller at every step
    assert energy == sorted(energy, reverse=True)


def test_fisher_products_are_those_of_the_dense_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Column by column; and the gradient of the KL is made once for all of them."""
    policy, *batch = make_step()
    fisher, seen, made = dense_fisher(policy, batch[0]), [], []
    original, kl = trpo.conjugate_gradients, trpo.gaussian_kl

    def spy(product: Callable, g: torch.Tensor, steps: int) -> torch.Tensor:
        assert steps == 150
        seen.append(torch.stack([product(unit) for unit in torch.eye(len(g), dtype=torch.float64)]))
        return original(product, g, steps)

    monkeypatch.setattr(trpo, "conjugate_gradients", spy)
    monkeypatch.setattr(trpo, "gaussian_kl", lambda *a: made.append(torch.is_grad_enabled()) or kl(*a))
    trpo.trust_region_step(policy, *batch, ARGS)
    torch.testing.assert_close(seen[0], fisher + 0.1 * torch.eye(len(fisher), dtype=torch.float64))
    assert made.count(True) == 1


def test_a_step_is_the_natural_gradient_to_the_trust_regions_edge() -> None:
    """Direction and length against a dense solve; the gradient at the old policy is the mean of A grad log pi."""
    policy, obs, action, advantage = make_step()
    matrix = dense_fisher(policy, obs)
    matrix += 0.1 * torch.eye(len(matrix), dtype=torch.float64)
    (advantage * policy.log_prob(obs, action)).mean().backward()
    g, before = torch.cat([weight.grad.flatten() for weight in policy.parameters()]), weights_of(policy)
    x = torch.linalg.solve(matrix, g)
    said = trpo.trust_region_step(policy, obs, action, advantage, ARGS)
    assert said["losses/line_search_steps"] == 1
    expected = x * (2 * 1e-6 / (x @ matrix @ x)).sqrt()
    assert (weights_of(policy) - before - expected).norm() < 1e-3 * expected.norm()
    assert 0 < said["losses/kl"] <= 1e-6


def test_the_line_search_takes_the_first_step_that_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """A KL that is reported too large until the third trial; its step is 0.7^2 of the first."""
    steps = []
    for factors in ([1, 1, 1], [1e9, 1e9, 1]):
        policy, *batch = make_step()
        before, left, kl = weights_of(policy), iter(factors), trpo.gaussian_kl
        with monkeypatch.context() as patch:
            factor = lambda: 1 if torch.is_grad_enabled() else next(left)  # noqa: B023, E731
            patch.setattr(trpo, "gaussian_kl", lambda *a: kl(*a) * factor())  # noqa: B023
            said = trpo.trust_region_step(policy, *batch, ARGS)
        steps.append(weights_of(policy) - before)
        assert said["losses/line_search_steps"] == factors.index(1) + 1
    torch.testing.assert_close(steps[1], 0.49 * steps[0])


def test_where_no_step_is_good_the_weights_are_put_back_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many trials, each of which asks for the KL once."""
    policy, *batch = make_step()
    before, kl = weights_of(policy), trpo.gaussian_kl
    trials = []

    def far(*given: torch.Tensor) -> torch.Tensor:
        return kl(*given) * (1 if torch.is_grad_enabled() else trials.append(given) or 1e9)

    monkeypatch.setattr(trpo, "gaussian_kl", far)
    said = trpo.trust_region_step(policy, *batch, ARGS)
    assert torch.equal(weights_of(policy), before)
    assert (said["losses/line_search_steps"], said["losses/kl"], len(trials)) == (0, 0.0, 4)


def test_a_step_that_makes_the_surrogate_worse_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down its gradient, within the trust region."""
    policy, *batch = make_step()
    before = weights_of(policy)
    monkeypatch.setattr(trpo, "conjugate_gradients", lambda product, g, steps: -g)
    said = trpo.trust_region_step(policy, *batch, ARGS)
    assert torch.equal(weights_of(policy), before)
    assert said["losses/line_search_steps"] == 0


def test_a_gradient_of_zero_moves_nothing() -> None:
    policy, obs, action, _ = make_step()
    before = weights_of(policy)
    said = trpo.trust_region_step(policy, obs, action, torch.zeros(60, dtype=torch.float64), ARGS)
    assert torch.equal(weights_of(policy), before)
    assert all(np.isfinite(float(value)) for value in said.values())


def test_in_a_whole_run_no_step_leaves_the_trust_region(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL and surrogate by torch.distributions, before and after every iteration; and it learns to hit what it sees."""
    steps, original = [], trpo.trust_region_step

    def spy(policy: trpo.Policy, obs: torch.Tensor, action: torch.Tensor, *rest: object) -> dict:
        def now() -> torch.distributions.Normal:
            return torch.distributions.Normal(policy.mean(obs).detach(), policy.log_std.detach().exp())

        old = now()
        said, new = original(policy, obs, action, *rest), now()
        ratio = (new.log_prob(action) - old.log_prob(action)).sum(1).exp()
        steps.append((torch.distributions.kl_divergence(old, new).sum(1).mean(), (ratio * rest[0]).mean(), said))
        return said

    monkeypatch.setattr(trpo, "trust_region_step", spy)
    flags = {"num_envs": 4, "num_steps": 128, "total_timesteps": 20_480, "gamma": 0.5}
    run = make_run(tmp_path, trpo, "test_ppo:Target-v0", **flags)
    model = trpo.train(run.args, run)
    assert len(steps) == 40
    for kl, surrogate, said in steps:
        assert kl <= 0.01 * 1.001
        assert said["losses/kl"] == pytest.approx(kl.item(), rel=1e-2, abs=1e-6)
        assert said["losses/policy_loss"].item() == pytest.approx(-surrogate.item(), rel=1e-3, abs=1e-5)
        assert surrogate > 0 or said["losses/line_search_steps"] == 0
    assert np.mean([said["losses/line_search_steps"] > 0 for *_, said in steps]) > 0.9
    run.args.eval_episodes = 10
    monkeypatch.setattr(trpo.RunningMoments, "update", None)  # an evaluation changes nothing
    states = {name: part.state_dict() for name, part in model.items()}
    assert trpo.evaluate(run.args, states, torch.device("cpu"), None)["eval_return_mean"] > -0.1


def test_two_iterations_by_hand(tmp_path: Path) -> None:
    """The whole training once more, but for lines 5 to 8, as PPO's."""
    flags = {"num_envs": 2, "num_steps": 16, "num_minibatches": 4, "update_epochs": 3, "total_timesteps": 64}
    flags |= {"learning_rate": 1e-2, "seed": 3, "gamma": 0.9, "gae_lambda": 0.8}
    run, Count.episodes = make_run(tmp_path, trpo, "Count-v0", **flags), 0
    trained = trpo.train(run.args, run)

    torch.manual_seed(3)
    policy, value_function = trpo.Policy(1, 2), trpo.mlp(1, 1, gain=1.0)
    adam = torch.optim.Adam(value_function.parameters(), lr=1e-2)
    rollouts, logged = Rollouts(policy, rng := np.random.default_rng(3), 0.9), []
    for _ in range(2):
        s, s_after, a, reward, terminated, done = rollouts.next()
        value, next_value = (value_function(o)[..., 0].detach().numpy() for o in (s, s_after))
        advantage = advantage_by_sums(reward, terminated, done, value, next_value, 0.9, 0.8)
        gain, target = (torch.from_numpy(v).float().flatten() for v in (advantage, advantage + value))
        gain, s = (gain - gain.mean()) / (gain.std() + 1e-8), s.flatten(0, 1)
        trpo.trust_region_step(policy, s, a.flatten(0, 1), gain, run.args)
        for _ in range(3):
            for index in np.split(rng.permutation(32), 4):
                error = ((value_function(s[index])[:, 0] - target[index]) ** 2).mean()
                adam.zero_grad()
                error.backward()
                adam.step()
        entropy = torch.distributions.Normal(0, policy.log_std.detach().exp()).entropy().sum().item()
        logged.append([1 - np.var(advantage) / np.var(advantage + value), entropy, error.item()])
    ours = [*trained["policy"].parameters(), *run.parts["value_function"].parameters()]
    for one, other in zip(ours, [*policy.parameters(), *value_function.parameters()], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=5e-5)
    np.testing.assert_allclose(trained["obs_moments"].mean, [np.mean(rollouts.raw)])
    run.writer.flush()
    for tag, expected in zip(("explained_variance", "entropy", "value_loss"), np.transpose(logged), strict=True):
        np.testing.assert_allclose([value for _, value in scalars(run.dir, f"losses/{tag}")], expected, rtol=1e-3)


def test_minibatches_may_be_single_steps() -> None:
    """Advantages are normalised over the rollout, not in a minibatch as PPO's."""
    assert trpo.check(trpo.Args(num_envs=1, num_steps=4, num_minibatches=4)) == "HalfCheetah-v5"
