"""Measures ddpg_continuous.py beside stable-baselines3's DDPG in steps per second.

    uv run tests/benchmark_ddpg_continuous.py                # three rounds on one thread and on all, the two in turn
    uv run tests/benchmark_ddpg_continuous.py --rounds 5 --threads 2 --steps 10000

Both train on HalfCheetah-v5 with two hidden layers of 256 units without normalisation, batches of 256, and an update of
actor and critic at every step; the speed counts from the first update on. Machines drift: only the ratio within a round
tells.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[classic-control,mujoco]==1.4.0",
#     "moviepy==2.2.1",
#     "mujoco==4.0.0",
#     "numpy==2.4.6",
#     "stable-baselines3==2.9.2",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tyro==1.0.17",
# ]
# ///

import sys

import numpy as np
import tyro
from benchmark_common import FIRST_UPDATE, Args, ours, print_table, theirs, time_stable_baselines3

ENV_ID = "HalfCheetah-v5"


def run_stable_baselines3(steps: int, device: str) -> None:
    from stable_baselines3 import DDPG
    from stable_baselines3.common.noise import NormalActionNoise

    model = DDPG(
        "MlpPolicy",
        ENV_ID,
        learning_rate=3e-4,
        buffer_size=FIRST_UPDATE + steps,
        learning_starts=FIRST_UPDATE,
        batch_size=256,
        train_freq=1,
        gradient_steps=1,
        action_noise=NormalActionNoise(np.zeros(1), np.full(1, 0.1)),
        policy_kwargs={"net_arch": [256, 256]},
        device=device,
        seed=1,
    )
    time_stable_baselines3(model, steps)


def main() -> None:
    if sys.argv[1:2] == ["theirs"]:
        return run_stable_baselines3(int(sys.argv[2]), sys.argv[3])
    args = tyro.cli(Args, description=__doc__)
    flags = {"--env-id": ENV_ID, "--eval-frequency": 0}
    programs = {
        "no normalisation": lambda: ours("ddpg_continuous.py", args, flags | {"--normalisation": "none"}),
        "layer normalisation": lambda: ours("ddpg_continuous.py", args, flags),
        "stable-baselines3": lambda: theirs(args),
    }
    print_table(args, programs)


if __name__ == "__main__":
    main()
