"""Measures dqn_atari.py beside stable-baselines3's DQN: steps per second, peak memory, the pause of a checkpoint.

    uv run tests/benchmark_dqn_atari.py                 # three rounds on one thread and on all, the two in turn
    uv run tests/benchmark_dqn_atari.py --rounds 5 --threads 2 --steps 10000

Both train on the same game with batches of 32, an update every 4 steps, epsilon 0.05 and float32 screens in [0, 1] of
the same preprocessing; the speed counts from the first update on. Machines drift: only the ratio within a round tells.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1",
#     "gymnasium==1.4.0",
#     "moviepy==2.2.1",
#     "numpy==2.4.6",
#     "opencv-python-headless==5.0.0.93",
#     "stable-baselines3==2.9.2",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tyro==1.0.17",
# ]
# ///

import dataclasses
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import tyro
from benchmark_common import FIRST_UPDATE, ROOT, ours, print_table, theirs, time_stable_baselines3
from benchmark_common import Args as CommonArgs

ENV_ID = "BreakoutNoFrameskip-v4"  # no frame skip, no stickiness


@dataclasses.dataclass
class Args(CommonArgs):
    memory: bool = True
    """also measure a full memory of 1,000,000 screens and its checkpoint (8 GB of disk)"""


def run_stable_baselines3(steps: int, device: str) -> None:
    import ale_py
    import gymnasium as gym
    from stable_baselines3 import DQN
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gym.register_envs(ale_py)
    model = DQN(
        "CnnPolicy",
        VecFrameStack(make_atari_env(ENV_ID, n_envs=1, seed=1), 4),
        learning_rate=1e-4,
        buffer_size=FIRST_UPDATE + steps,
        learning_starts=FIRST_UPDATE,
        batch_size=32,
        train_freq=4,
        target_update_interval=1_000,
        exploration_initial_eps=0.05,
        exploration_final_eps=0.05,
        device=device,
        seed=1,
    )
    time_stable_baselines3(model, steps)


def measure_memory() -> None:
    """Fills the script's own memory of 1,000,000 screens beside its networks; in a process of its own."""
    sys.path.insert(0, str(ROOT))
    import dqn_atari as dqn

    args = dqn.Args()
    network = dqn.QNetwork(n_actions=18)
    weights = [parameter.detach() for parameter in network.parameters()]
    optimizer = dqn.make_optimizer(args, weights)
    dqn.gradient_step(network(torch.zeros(1, 4, 84, 84, dtype=torch.uint8)).sum(), network, weights, optimizer)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        capacity, spare = dqn.replay_size(args)
        path = Path(folder) / dqn.REPLAY_FILE
        memory = dqn.ReplayMemory(capacity, spare, np.random.default_rng(1), torch.device("cpu"), path)
        screens = np.random.default_rng(1).integers(0, 256, (100, 84, 84), np.uint8)
        memory.begin_episode(screens[0])
        pauses = []
        for step in range(1, capacity + 5 * spare):
            memory.append(0, 0.0, False, screens[step % 100])
            if step % spare == 0:
                start = time.perf_counter()
                content = {"memory": memory.state_dict(), "optimizer": optimizer.state_dict(), "weights": weights}
                dqn.save(Path(folder) / "checkpoint.pt", content)
                pauses.append(time.perf_counter() - start)
        memory.sample(32)
        full = pauses[capacity // spare :]
        print(f"replay file {path.stat().st_size / 1e9:.2f} GB for {capacity:,} screens and {spare:,} spare places")
        print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB")
        print(
            f"pause of a checkpoint: median {np.median(full):.2f} s, longest {max(full):.2f} s, no screen yet on disk"
        )


def main() -> None:
    if sys.argv[1:2] == ["theirs"]:
        return run_stable_baselines3(int(sys.argv[2]), sys.argv[3])
    if sys.argv[1:] == ["memory"]:
        return measure_memory()
    args = tyro.cli(Args, description=__doc__)
    flags = {"--env-id": ENV_ID, "--start-e": 0.05, "--end-e": 0.05}
    programs = {
        "this script": lambda: ours("dqn_atari.py", args, flags),
        "in float32": lambda: ours("dqn_atari.py", args, flags | {"--precision": "float32"}),
        "stable-baselines3": lambda: theirs(args),
    }
    print_table(args, programs)
    if args.memory:
        subprocess.run([sys.executable, __file__, "memory"], check=True)


if __name__ == "__main__":
    main()
