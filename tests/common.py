"""What the tests of all scripts share."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
SHORT = {  # runs of some seconds with eight checkpoints or more, that fill and wrap their replay memory
    "dqn_atari": [
        *("--env-id", "ALE/Breakout-v5", "--sticky-actions", "0.25", "--total-timesteps", "500"),
        *("--learning-starts", "100", "--buffer-size", "200", "--target-network-frequency", "120"),
        *("--train-frequency", "40", "--checkpoint-frequency", "60", "--eval-episodes", "1"),
    ],
    "rainbow_atari": [
        *("--env-id", "ALE/Asterix-v5", "--sticky-actions", "0.25", "--total-timesteps", "400", "--small-network"),
        *("--learning-starts", "100", "--buffer-size", "200", "--target-network-frequency", "100"),
        *("--train-frequency", "25", "--checkpoint-frequency", "50", "--eval-frequency", "200"),
        *("--eval-episodes", "1"),
    ],
    "ddpg_continuous": [
        *("--env-id", "Pendulum-v1", "--total-timesteps", "1200", "--learning-starts", "300", "--buffer-size", "400"),
        *("--checkpoint-frequency", "150", "--eval-frequency", "500", "--eval-episodes", "1", "--batch-size", "64"),
        *("--hidden-sizes", "32", "32"),
    ],
    "ppo_continuous": [
        *("--env-id", "Pendulum-v1", "--total-timesteps", "1280", "--num-envs", "2", "--num-steps", "64"),
        *("--num-minibatches", "4", "--update-epochs", "2", "--checkpoint-frequency", "128"),
        *("--eval-frequency", "500", "--eval-episodes", "1"),
    ],
    "ppo_atari": [
        *("--env-id", "ALE/Breakout-v5", "--sticky-actions", "0.25", "--total-timesteps", "512", "--num-envs", "2"),
        *("--num-steps", "32", "--num-minibatches", "2", "--update-epochs", "1", "--checkpoint-frequency", "64"),
        *("--eval-episodes", "1"),
    ],
    "trpo_continuous": [
        *("--env-id", "Pendulum-v1", "--total-timesteps", "1280", "--num-envs", "2", "--num-steps", "64"),
        *("--num-minibatches", "4", "--update-epochs", "2", "--cg-steps", "5", "--checkpoint-frequency", "128"),
        *("--eval-frequency", "500", "--eval-episodes", "1"),
    ],
    "q_learning": [
        *("--env-id", "MountainCar-v0", "--features", "mlp", "--replay", "--target-network", "--batch-size", "16"),
        *("--buffer-size", "300", "--target-network-frequency", "50", "--start-e", "1", "--end-e", "0.1"),
        *("--learning-rate", "0.001", "--total-timesteps", "900", "--checkpoint-frequency", "100"),
        *("--eval-frequency", "400", "--eval-episodes", "1"),
    ],
    "mlp_regression": [
        *("--dataset", "circle", "--noise", "0.1", "--samples", "200", "--optimizer", "adam", "--batch-size", "10"),
        *("--epochs", "20", "--restarts", "2", "--checkpoint-frequency", "5", "--patience", "12"),
    ],
}
OFF_POLICY = ["ddpg_continuous", "dqn_atari", "rainbow_atari"]  # the scripts with a replay memory
AGENTS = [
    *OFF_POLICY,
    "ppo_atari",
    "ppo_continuous",
    "q_learning",
    "trpo_continuous",
]  # the scripts that act in environments
STARTER = []  # the process that starts scripts, once there is one
DEADLINE = 240  # seconds that any process of a test may take, on a busy machine


def run_python(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """A Python process of one thread, with warnings as errors."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-W", "error", *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, timeout=DEADLINE)


def run(
    script: str | Path, *flags: object, cwd: Path, interruption: tuple[str, str, int | str, str] | None = None
) -> subprocess.CompletedProcess:
    """A script in a process of its own, as `run_python` would start it, but sooner: see starter.py."""
    if not STARTER:
        command, env = (
            [sys.executable, "-W", "error", ROOT / "tests" / "starter.py"],
            os.environ | {"OMP_NUM_THREADS": "1"},
        )
        STARTER.append(subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    task = {"command": [str(ROOT / f"{script}.py"), *map(str, flags)], "cwd": str(cwd), "deadline": DEADLINE}
    with tempfile.NamedTemporaryFile("r") as stdout, tempfile.NamedTemporaryFile("r") as stderr:
        task |= {"output": [stdout.name, stderr.name], "interruption": interruption}
        print(json.dumps(task), file=STARTER[0].stdin, flush=True)
        returncode = int(STARTER[0].stdout.readline())
        return subprocess.CompletedProcess(task["command"], returncode, stdout.read(), stderr.read())


def run_interrupted(
    what: str, moment: str, call: int | str, script: str, *flags: object, cwd: Path, function: str = "replace"
) -> subprocess.CompletedProcess:
    """The script, which a signal (or a full disk) meets "before" or "after" a call of a function of `os`.

    The call is a number, or the name of the file that the function is called with.
    """
    return run(script, *flags, cwd=cwd, interruption=(what, moment, function, call))


def run_until_killed(script: str, moment: str, call: int | str, *flags: object, cwd: Path) -> None:
    """The script, which SIGKILL ends "before" or "after" the renaming of a file, by number or name."""
    assert run_interrupted("SIGKILL", moment, call, script, *flags, cwd=cwd).returncode == -signal.SIGKILL


def read_events(run_dir: Path) -> EventAccumulator:
    """All that TensorBoard's own reader sees."""
    events = EventAccumulator(
        str(run_dir), size_guidance=dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    )
    return events.Reload()


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read_events(run_dir).Scalars(tag)]


def message_of(
    script: ModuleType, flags: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> str:
    """What main prints to standard error when it refuses; it must be one line and exit status 2."""
    monkeypatch.setattr(sys, "argv", [f"{script.SCRIPT}.py", *flags])
    with pytest.raises(SystemExit) as exit_info:
        script.main()
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"{script.SCRIPT}: error: ")
    assert message.count("\n") == 1
    return message


class Catch(gym.Env):
    """A ball falls through four rows of a 4 x 4 board; the paddle in the last row moves left, stays or moves right.

    Screens of 84 x 84 with the interface of AtariPreprocessing. The return is 1 for a ball caught, -1 for one missed.
    """

    observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def screen(self) -> np.ndarray:
        board = np.zeros((4, 4), np.uint8)
        board[self.row, self.column] = 255
        board[3, self.paddle] = 255
        return board.repeat(21, axis=0).repeat(21, axis=1)

    def reset(self, **_: object) -> tuple[np.ndarray, dict]:
        self.row, self.column, self.paddle = 0, int(self.rng.integers(4)), int(self.rng.integers(4))
        return self.screen(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.paddle = min(3, max(0, self.paddle + action - 1))
        self.row += 1
        over = self.row == 3
        reward = (1.0 if self.column == self.paddle else -1.0) if over else 0.0
        return self.screen(), reward, over, False, {"life_lost": False}

    def state_dict(self) -> dict:
        return {}
