"""Measures dqn_atari.py beside stable-baselines3's DQN and rainbow_atari.py: speed, memory, the pause of a checkpoint.

    uv run tests/benchmark_dqn_atari.py                 # three rounds on one thread and on all, the two in turn
    uv run tests/benchmark_dqn_atari.py --rounds 5 --threads 2 --steps 10000

Both train on the same game with batches of 32, an update every 4 steps, epsilon 0.05 and float32 screens in [0, 1] of
the same preprocessing; the speed counts from the first update on. Machines drift: only the ratio within a round tells.
"layers" is what the network alone would reach, without emulator, memory and optimizer.
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
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///

import dataclasses
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import tyro
from benchmark_common import FIRST_UPDATE, ROOT, WARM_UP, ours, print_table, theirs, time_peer
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
        buffer_size=FIRST_UPDATE + WARM_UP + steps,
        learning_starts=FIRST_UPDATE,
        batch_size=32,
        train_freq=4,
        target_update_interval=1_000,
        exploration_initial_eps=0.05,
        exploration_final_eps=0.05,
        device=device,
        seed=1,
    )
    time_peer(model, steps)


def run_layers() -> None:
    """What the layers alone would reach: for every four steps, four actions, two batches forward, one backward."""
    sys.path.insert(0, str(ROOT))
    import dqn_atari as dqn

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    network, obs = dqn.QNetwork(n_actions=4), torch.zeros(32, 4, 84, 84, dtype=torch.uint8)
    for count in (10, 60):  # the first warms up
        start = time.perf_counter()
        for _ in range(count):
            for _ in range(4):
                network.act(obs[:1])
            with torch.no_grad():
                network(obs)
            network(obs).sum().backward()
    print(4 * count / (time.perf_counter() - start))


def measure_memory() -> None:
    """Fills the script's own memory of 1,000,000 screens beside its networks; in a process of its own."""
    sys.path.insert(0, str(ROOT))
    import dqn_atari as dqn

    with tempfile.TemporaryDirectory(dir=".") as folder:
        run = dqn.Run(dqn.Args(runs_dir=Path(folder), run_name="memory", device="cpu"), "memory")
        capacity, frequency = run.args.buffer_size, run.args.checkpoint_frequency
        shape = (capacity + 2 * frequency, dqn.FRAME_SIZE, dqn.FRAME_SIZE)
        network = dqn.QNetwork(n_actions=18)
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        network(torch.zeros(1, 4, 84, 84, dtype=torch.uint8)).sum().backward()
        optimizer.step()
        screens, steps = (
            run.map_file("screens", np.uint8, shape),
            run.map_file("steps", dqn.FrameMemory.STEP, shape[:1]),
        )
        memory = dqn.FrameMemory(capacity, screens, steps, run.rng, run.device)
        run.restore(memory=memory, network=network, optimizer=optimizer)
        screens = np.random.default_rng(1).integers(0, 256, (100, 84, 84), np.uint8)
        memory.push(screens[0])
        pauses = []
        for step in range(1, capacity + 5 * frequency):
            memory.append(0, 0.0, False, screens[step % 100])
            if step % frequency == 0:
                start = time.perf_counter()
                run.save_checkpoint()
                pauses.append(time.perf_counter() - start)
        memory.sample(32)
        full, size = pauses[capacity // frequency :], sum(path.stat().st_size for path in run.dir.glob("replay.*.bin"))
        print(f"replay files {size / 1e9:.2f} GB for {capacity:,} screens and {2 * frequency:,} spare places")
        print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB")
        print(f"pause of a checkpoint: median {np.median(full):.2f} s, longest {max(full):.2f} s")


def main() -> None:
    if sys.argv[1:2] == ["theirs"]:
        library, steps, device = sys.argv[2], int(sys.argv[3]), sys.argv[4]
        return run_layers() if library == "layers" else run_stable_baselines3(steps, device)
    if sys.argv[1:] == ["memory"]:
        return measure_memory()
    args = tyro.cli(Args, description=__doc__)
    flags = {"--env-id": ENV_ID, "--start-e": 0.05, "--end-e": 0.05, "--learning-starts": FIRST_UPDATE}
    rainbow = {"--env-id": ENV_ID, "--learning-starts": FIRST_UPDATE}
    programs = {
        "this script": lambda: ours("dqn_atari.py", args, flags),
        "stable-baselines3": lambda: theirs(args, "stable-baselines3"),
        "rainbow_atari": lambda: ours("rainbow_atari.py", args, rainbow),
        "layers": lambda: theirs(args, "layers"),
    }
    print_table(args, programs)
    if args.memory:
        subprocess.run([sys.executable, __file__, "memory"], check=True)


if __name__ == "__main__":
    main()
