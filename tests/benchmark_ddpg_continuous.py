"""Measures ddpg_continuous.py beside SBX's (JAX) and stable-baselines3's DDPG in steps per second.

    uv run tests/benchmark_ddpg_continuous.py                # three rounds on one thread and on all, the three in turn
    uv run tests/benchmark_ddpg_continuous.py --rounds 5 --threads 2 --steps 10000

All train on HalfCheetah-v5 with two hidden layers of 256 units, batches of 256, and an update of actor and critic at
every step; the speed counts from the first update on. Machines drift: only the ratio within a round tells. "products"
is what the ten products of 256 x 256 matrices that an update needs would reach alone.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[classic-control,mujoco]==1.4.0",
#     "moviepy==2.2.1",
#     "mujoco==4.0.0",
#     "numpy==2.4.6",
#     "sbx-rl==0.28.0",
#     "stable-baselines3==2.9.2",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///

import os
import sys
import time

import numpy as np
import tyro
from benchmark_common import FIRST_UPDATE, WARM_UP, Args, ours, print_table, theirs, time_peer

ENV_ID = "HalfCheetah-v5"


def run_peer(library: str, steps: int, device: str) -> None:
    from stable_baselines3.common.noise import NormalActionNoise

    threads, options = int(os.environ["OMP_NUM_THREADS"]), {}
    if library == "sbx":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # XLA's only limit
        from sbx import DDPG
    else:
        from stable_baselines3 import DDPG

        options = {"device": device}
    model = DDPG(
        "MlpPolicy",
        ENV_ID,
        learning_rate=3e-4,
        buffer_size=FIRST_UPDATE + WARM_UP + steps,
        learning_starts=FIRST_UPDATE,
        batch_size=256,
        train_freq=1,
        gradient_steps=1,
        action_noise=NormalActionNoise(np.zeros(6), np.full(6, 0.1)),
        policy_kwargs={"net_arch": [256, 256]},
        seed=1,
        **options,
    )
    time_peer(model, steps)


def run_products() -> None:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    a, b = torch.randn(2, 256, 256)
    for count in (500, 2_000):  # the first warms up
        start = time.perf_counter()
        for _ in range(count):
            a @ b
    print(count / 10 / (time.perf_counter() - start))


def main() -> None:
    if sys.argv[1:2] == ["theirs"]:
        library, steps, device = sys.argv[2], int(sys.argv[3]), sys.argv[4]
        return run_products() if library == "products" else run_peer(library, steps, device)
    args = tyro.cli(Args, description=__doc__)
    programs = {
        "this script": lambda: ours(
            "ddpg_continuous.py", args, {"--env-id": ENV_ID, "--learning-starts": FIRST_UPDATE}
        ),
        "SBX": lambda: theirs(args, "sbx"),
        "stable-baselines3": lambda: theirs(args, "stable-baselines3"),
        "products": lambda: theirs(args, "products"),
    }
    print_table(args, programs)


if __name__ == "__main__":
    main()
