"""What the tests of all scripts share."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
SHORT = {  # runs of some seconds with eight checkpoints, that fill and wrap their replay memory
    "dqn_atari": [
        *("--env-id", "ALE/Breakout-v5", "--sticky-actions", "0.25", "--total-timesteps", "1200"),
        *("--learning-starts", "100", "--buffer-size", "400", "--target-network-frequency", "100"),
        *("--checkpoint-frequency", "150", "--eval-episodes", "1"),
    ],
    "ddpg_continuous": [
        *("--env-id", "Pendulum-v1", "--total-timesteps", "1200", "--learning-starts", "300", "--buffer-size", "400"),
        *("--checkpoint-frequency", "150", "--eval-frequency", "500", "--eval-episodes", "1", "--hidden-sizes", "32"),
        *("--noise", "ornstein-uhlenbeck", "--batch-size", "64", "--n-step", "3"),
    ],
    "mlp_regression": [
        *("--dataset", "circle", "--noise", "0.1", "--samples", "400", "--optimizer", "adam", "--batch-size", "10"),
        *("--epochs", "100", "--restarts", "2", "--checkpoint-frequency", "25"),
    ],
}
AGENTS = ["ddpg_continuous", "dqn_atari"]  # the scripts that act in environments
KILLER = """
import os, runpy, signal, sys
moment, call = sys.argv[1], int(sys.argv[2])
replace = os.replace
def killing_replace(*paths):
    global call
    call -= 1
    if moment == "after":
        replace(*paths)
    if call == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if moment == "before":
        replace(*paths)
os.replace = killing_replace
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def spawn(command: list[object], cwd: Path, **options: object) -> subprocess.Popen:
    """A Python process of one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, env=env, text=True, **options)


def run(script: str, *flags: object, cwd: Path) -> subprocess.CompletedProcess:
    """The script's own end, with warnings as errors."""
    command = ["-W", "error", ROOT / f"{script}.py", *flags]
    process = spawn(command, cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def run_until_killed(script: str, moment: str, call: int, *flags: object, cwd: Path) -> None:
    """The script, which SIGKILL ends "before" or "after" its call-th renaming of a file."""
    command = ["-c", KILLER, moment, call, ROOT / f"{script}.py", *flags]
    assert spawn(command, cwd, stdout=subprocess.DEVNULL).wait() == -signal.SIGKILL


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    """A curve as TensorBoard's own reader sees it."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


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
