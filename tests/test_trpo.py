"""Tests of trpo_continuous.py against independent oracles; what it shares with ppo_continuous.py is tested there."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ppo import make_run

import trpo_continuous as trpo

ARGS = trpo.Args(cg_steps=200, target_kl=1e-6, cg_damping=0.1)


def make_step(seed: int = 0) -> tuple:
    """A small policy of double precision, its vector of weights, and a batch for it."""
    torch.manual_seed(seed)
    policy = trpo.Policy(3, 2)
    policy.mean = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    policy.log_std.data = torch.tensor([-0.5, 0.3])
    policy.double()
    theta = trpo.as_vector(policy)
    obs = torch.randn(60, 3, dtype=torch.float64)
    action = policy.mean(obs).detach() + policy.log_std.detach().exp() * torch.randn(60, 2, dtype=torch.float64)
    return policy, theta, obs, action, trpo.normalise(torch.randn(60, dtype=torch.float64))


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
    policy, theta, *batch = make_step()
    fisher, seen, made = dense_fisher(policy, batch[0]), [], []
    original, kl = trpo.conjugate_gradients, trpo.gaussian_kl

    def spy(product: Callable, g: torch.Tensor, steps: int) -> torch.Tensor:
        seen.append(torch.stack([product(unit) for unit in torch.eye(len(g), dtype=torch.float64)]))
        return original(product, g, steps)

    monkeypatch.setattr(trpo, "conjugate_gradients", spy)
    monkeypatch.setattr(trpo, "gaussian_kl", lambda *a: made.append(torch.is_grad_enabled()) or kl(*a))
    trpo.trust_region_step(policy, theta, *batch, ARGS)
    torch.testing.assert_close(seen[0], fisher + 0.1 * torch.eye(len(fisher), dtype=torch.float64))
    assert made.count(True) == 1


def test_a_step_is_the_natural_gradient_to_the_trust_regions_edge() -> None:
    """Direction and length against a dense solve; the gradient at the old policy is the mean of A grad log pi."""
    policy, theta, obs, action, advantage = make_step()
    matrix = dense_fisher(policy, obs) + 0.1 * torch.eye(len(theta), dtype=torch.float64)
    (advantage * policy.log_prob(obs, action)).mean().backward()
    g, before = theta.grad.clone(), theta.detach().clone()
    x = torch.linalg.solve(matrix, g)
    said = trpo.trust_region_step(policy, theta, obs, action, advantage, ARGS)
    assert said["losses/line_search_steps"] == 1
    expected = x * (2 * 1e-6 / (x @ matrix @ x)).sqrt()
    assert (theta.detach() - before - expected).norm() < 1e-3 * expected.norm()
    assert 0 < said["losses/kl"] <= 1e-6


def test_the_line_search_takes_the_first_step_that_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """A KL that is reported too large until the third trial; its step is 0.8^2 of the first."""
    steps = []
    for factors in ([1, 1, 1], [1e9, 1e9, 1]):
        policy, theta, *batch = make_step()
        before, left, kl = theta.detach().clone(), iter(factors), trpo.gaussian_kl
        with monkeypatch.context() as patch:
            factor = lambda: 1 if torch.is_grad_enabled() else next(left)  # noqa: B023, E731
            patch.setattr(trpo, "gaussian_kl", lambda *a: kl(*a) * factor())  # noqa: B023
            said = trpo.trust_region_step(policy, theta, *batch, ARGS)
        steps.append(theta.detach() - before)
        assert said["losses/line_search_steps"] == factors.index(1) + 1
    torch.testing.assert_close(steps[1], 0.64 * steps[0])


def test_where_no_step_is_good_the_weights_are_put_back_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, theta, *batch = make_step()
    before, kl = theta.detach().clone(), trpo.gaussian_kl
    monkeypatch.setattr(trpo, "gaussian_kl", lambda *a: kl(*a) * (1 if torch.is_grad_enabled() else 1e9))
    said = trpo.trust_region_step(policy, theta, *batch, ARGS)
    assert torch.equal(theta, before)
    assert (said["losses/line_search_steps"], said["losses/kl"]) == (0, 0.0)


def test_a_step_that_makes_the_surrogate_worse_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down its gradient, within the trust region."""
    policy, theta, *batch = make_step()
    before = theta.detach().clone()
    monkeypatch.setattr(trpo, "conjugate_gradients", lambda product, g, steps: -g)
    said = trpo.trust_region_step(policy, theta, *batch, ARGS)
    assert torch.equal(theta, before)
    assert said["losses/line_search_steps"] == 0


def test_a_gradient_of_zero_moves_nothing() -> None:
    policy, theta, obs, action, _ = make_step()
    before = theta.detach().clone()
    said = trpo.trust_region_step(policy, theta, obs, action, torch.zeros(60, dtype=torch.float64), ARGS)
    assert torch.equal(theta, before)
    assert all(np.isfinite(float(value)) for value in said.values())


def test_in_a_whole_run_no_step_leaves_the_trust_region(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL and surrogate by torch.distributions, before and after every iteration; and it learns to hit what it sees."""
    steps, original = [], trpo.trust_region_step

    def spy(policy: trpo.Policy, theta: torch.Tensor, obs: torch.Tensor, action: torch.Tensor, *rest: object) -> dict:
        def now() -> torch.distributions.Normal:
            return torch.distributions.Normal(policy.mean(obs).detach(), policy.log_std.detach().exp())

        old = now()
        said, new = original(policy, theta, obs, action, *rest), now()
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
        assert surrogate > 0 or said["losses/line_search_steps"] == 0
    assert np.mean([said["losses/line_search_steps"] > 0 for *_, said in steps]) > 0.9
    run.args.eval_episodes = 10
    states = {name: part.state_dict() for name, part in model.items()}
    assert trpo.evaluate(run.args, states, torch.device("cpu"), None)["eval_return_mean"] > -3
