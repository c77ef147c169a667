"""What every script promises around its algorithm: reproducible, resumable to the bit, whole in one file."""

import ast
import importlib
import json
import random
import shutil
import signal
import subprocess
import time
import tomllib
from collections import defaultdict
from pathlib import Path

import imageio
import numpy as np
import pytest
import torch
from common import AGENTS, ROOT, SHORT, message_of, run, run_until_killed, scalars, spawn

TAGS = {
    "dqn_atari": {"charts/episodic_return", "charts/epsilon", "losses/td_loss", "losses/q_values"},
    "ddpg_continuous": {"charts/episodic_return", "losses/qf1_loss", "losses/qf1_values", "losses/actor_loss"},
    "mlp_regression": {"losses/train", "losses/validation", "charts/validation_r2"},
}
agents_only = pytest.mark.parametrize("script", AGENTS, indirect=True)


@pytest.fixture(params=sorted(SHORT))
def script(request: pytest.FixtureRequest) -> str:
    return request.param


FINISHED = {}  # by script; a fixture of the whole session would be made again whenever its parameter changes


@pytest.fixture
def finished(script: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run that was never interrupted."""
    if script not in FINISHED:
        cwd = tmp_path_factory.mktemp("finished")
        result = run(script, *SHORT[script], "--run-name", "whole", cwd=cwd)
        assert (result.returncode, result.stderr) == (0, "")
        FINISHED[script] = cwd / "runs" / "whole"
    return FINISHED[script]


def same(ours: object, theirs: object) -> bool:
    """Equal to the bit, through dictionaries and lists; but for times."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        names = {name for name in ours if "second" not in str(name) and name not in ("update_steps", "run_name")}
        return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in names)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(same(*pair) for pair in zip(ours, theirs, strict=True))
    return ours == theirs


def assert_same_run(run_dir: Path, other_dir: Path) -> None:
    """Same weights, optimizer, replay, random states and curves."""
    for name in ("model.pt", "checkpoint.pt"):
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (run_dir, other_dir))
        ours["args"]["resume"] = theirs["args"]["resume"] = None
        assert {part for part in ours if not same(ours[part], theirs[part])} == set()
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (run_dir, other_dir))
    assert same(ours, theirs)
    for tag in TAGS[ours["script"]]:
        assert scalars(run_dir, tag) == scalars(other_dir, tag)


# --- Runs -------------------------------------------------------------------------------------------------------------


@agents_only
def test_a_finished_run(script: str, finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if not path.name.startswith("events")}
    assert names == {"args.json", "checkpoint.pt", "model.pt", "result.json"}
    result = json.loads((finished / "result.json").read_text())
    assert (result["script"], result["total_timesteps"], result["torch_threads"]) == (script, 1200, 1)
    assert result["steps_per_second"] > 0
    returns = [value for _, value in scalars(finished, "charts/episodic_return")]
    assert result["train_return_mean"] == pytest.approx(np.mean(returns))
    for tag in ("charts/SPS", "charts/episodic_length", "eval/episodic_return", *TAGS[script]):
        assert scalars(finished, tag), tag
    assert json.loads((finished / "args.json").read_text())["buffer_size"] == 400


def test_same_seed_same_run_other_seed_another(script: str, finished: Path, tmp_path: Path) -> None:
    assert run(script, *SHORT[script], "--run-name", "again", cwd=tmp_path).returncode == 0
    assert_same_run(finished, tmp_path / "runs" / "again")
    assert run(script, *SHORT[script], "--run-name", "other", "--seed", "2", cwd=tmp_path).returncode == 0
    ours, theirs = (
        torch.load(folder / "model.pt", weights_only=True) for folder in (finished, tmp_path / "runs" / "other")
    )
    assert not same(ours, theirs)


def test_killed_at_random_moments_it_resumes_to_the_bit(script: str, finished: Path, tmp_path: Path) -> None:
    """Weights, replay memory (its file too) and curves equal those of the run that was never interrupted."""
    run_dir = tmp_path / "runs" / "killed"
    flags = [*SHORT[script], "--run-name", "killed", "--resume"]
    for _ in range(3):
        process = spawn([ROOT / f"{script}.py", *flags], tmp_path, stdout=subprocess.DEVNULL)
        time.sleep(random.uniform(3, 8))
        process.kill()
        process.wait()
    assert run(script, *flags, cwd=tmp_path).returncode == 0
    assert_same_run(finished, run_dir)
    assert not list(run_dir.glob("replay*"))


def test_killed_at_the_worst_moments_it_resumes_to_the_bit(script: str, finished: Path, tmp_path: Path) -> None:
    """Killed right before or after a file gets its name: args.json, checkpoints, model.pt and result.json.

    Before the name of the checkpoint of step 450 what was logged since step 300 is on the disk, and is logged again.
    """
    run_dir = tmp_path / "runs" / "killed"
    flags = [*SHORT[script], "--run-name", "killed", "--resume"]
    for moment, call in [("before", 1), ("before", 4), ("after", 1), ("before", 2), ("after", 5), ("before", 2)]:
        run_until_killed(script, moment, call, *flags, cwd=tmp_path)
        for path in run_dir.glob("*.json"):
            json.loads(path.read_text())
        for path in run_dir.glob("*.pt"):
            torch.load(path, weights_only=True)
    assert run(script, *flags, cwd=tmp_path).returncode == 0
    assert_same_run(finished, run_dir)


def test_interrupted_it_says_how_to_go_on_and_does(script: str, finished: Path, tmp_path: Path) -> None:
    """Ctrl-C between two checkpoints writes one more; the printed command finishes the run with the same bits."""
    run_dir = tmp_path / "runs" / "stopped"
    command = ["-u", ROOT / f"{script}.py", *SHORT[script], "--run-name", "stopped"]
    process = spawn(command, tmp_path, stdout=subprocess.PIPE)
    while not (run_dir / "checkpoint.pt").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    line = process.communicate()[0].splitlines()[-1]
    assert process.returncode == 130
    assert line.startswith("stopped; go on with: python ")
    assert line.endswith("--run-name stopped --resume")
    assert run(script, *line.split(f"{script}.py ")[1].split(), cwd=tmp_path).returncode == 0
    assert_same_run(finished, run_dir)


def test_a_finished_run_is_left_alone(script: str, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    result = run(script, *SHORT[script], "--run-name", "whole", "--resume", cwd=finished.parent.parent)
    assert (result.returncode, result.stderr) == (0, "")
    assert "finished" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before


@agents_only
def test_evaluation_repeats_and_records_video(script: str, finished: Path, tmp_path: Path) -> None:
    """--evaluate gives the figure of result.json, and a video that opens and has pictures, in place of an older one."""
    shutil.copy(finished / "model.pt", tmp_path)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "old.mp4").touch()
    result = run(script, "--evaluate", "model.pt", "--eval-episodes", "1", "--capture-video", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    score = json.loads((finished / "result.json").read_text())["eval_return_mean"]
    assert f" {score:.1f}, standard deviation" in result.stdout
    (video,) = (tmp_path / "videos").glob("*.mp4")
    with imageio.get_reader(video) as reader:
        frames = reader.count_frames()
        assert reader.get_data(frames // 2).std() > 1
    assert frames >= 200


def test_a_run_in_use_is_locked(script: str, tmp_path: Path) -> None:
    flags = [*SHORT[script], "--run-name", "busy", "--resume"]
    process = spawn([ROOT / f"{script}.py", *flags], tmp_path, stdout=subprocess.DEVNULL)
    while not (tmp_path / "runs" / "busy" / "args.json").exists():
        time.sleep(0.02)
    result = run(script, *flags, cwd=tmp_path)
    process.kill()
    process.wait()
    assert result.returncode == 2
    assert "another process is training" in result.stderr


@agents_only
def test_a_missing_replay_file_is_named(
    script: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/whole").mkdir(parents=True)
    shutil.copy(finished / "checkpoint.pt", "runs/whole")
    module = importlib.import_module(script)
    flags = [*SHORT[script], "--run-name", "whole", "--resume"]
    assert f"{module.REPLAY_FILE} is missing" in message_of(module, flags, capsys, monkeypatch)


def test_wandb_not_installed(
    script: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    flags = [*SHORT[script], "--track"]
    assert "pip install wandb" in message_of(module, flags, capsys, monkeypatch)
    assert not list(tmp_path.iterdir())


@agents_only
def test_nan_stops_the_run_and_leaves_the_checkpoint(script: str, tmp_path: Path) -> None:
    flags = [*SHORT[script], "--learning-starts", "200", "--learning-rate", "1e30", "--run-name", "nan"]
    result = run(script, *flags, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert {"dqn_atari": "by step 300", "ddpg_continuous": "at step 201"}[script] in result.stderr
    assert "--learning-rate" in result.stderr
    checkpoint = torch.load(tmp_path / "runs" / "nan" / "checkpoint.pt", weights_only=True)
    assert checkpoint["progress"]["global_step"] == 150


# --- Bad input that is the same everywhere ----------------------------------------------------------------------------


BAD_EVERYWHERE = [
    ("--batch-size 0", "--batch-size 0"),
    ("--learning-rate 0", "--learning-rate 0"),
    ("--learning-rate nan", "--learning-rate nan"),
    ("--checkpoint-frequency -1", "--checkpoint-frequency -1"),
    ("--seed 9999999999999999999999", "or more"),
    ("--device tpu", "--device tpu: choose one of auto, cpu, cuda, mps"),
    ("--resume", "--run-name"),
    ("--run-name there", "runs/there exists"),
    ("--run-name ../elsewhere", "--run-name ../elsewhere"),
    ("--run-name ..", "--run-name ..: must be a plain name"),
    ("--runs-dir file", "file is no folder"),
    ("--runs-dir file/sub", "file is no folder"),
    ("--evaluate no.pt", "there is no file no.pt"),
    ("--evaluate runs", "there is no file runs"),
    ("--evaluate truncated.pt", "truncated.pt is damaged"),
    ("--evaluate code.pt", "code.pt is damaged or not written by"),
    ("--evaluate other.pt", "other.pt is no model of"),
    ("--evaluate checkpoint.pt", "checkpoint.pt is no model of"),
    ("--run-name truncated --resume", "checkpoint.pt is damaged"),
    ("--run-name other --resume", "checkpoint.pt is no checkpoint of"),
    ("--run-name whole --resume --learning-rate 0.5", "--learning-rate 0.5: runs/whole was started with"),
]
BAD_FOR_AGENTS = [
    ("--total-timesteps 0", "--total-timesteps 0: must be greater than 0"),
    ("--total-timesteps -5", "--total-timesteps -5"),
    ("--buffer-size -1", "--buffer-size -1"),
    ("--eval-episodes -1", "--eval-episodes -1"),
    ("--learning-starts 31", "--learning-starts 31: must not be under --batch-size"),
    ("--total-timesteps 1000 --learning-starts 1001", "must not exceed --total-timesteps 1000"),
    ("--buffer-size 31", "--buffer-size 31"),
    ("--gamma 2", "must lie in [0, 1]"),
    ("--buffer-size 1000000000000 --total-timesteps 1000000000000", "--buffer-size 1000000000000: needs"),
    ("--checkpoint-frequency 0 --buffer-size 1000000000000 --total-timesteps 1000000000000", "of memory"),
    ("--evaluate model.pt --eval-episodes 0", "--eval-episodes 0"),
]


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [(script, *case) for script in SHORT for case in BAD_EVERYWHERE + BAD_FOR_AGENTS * (script in AGENTS)],
    indirect=["script"],
)
def test_bad_input(
    script: str,
    flags: str,
    expected: str,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line, exit status 2, nothing created and nothing changed."""
    monkeypatch.chdir(tmp_path)
    for name in ("there", "truncated", "other", "whole"):
        Path("runs", name).mkdir(parents=True)
    Path("file").touch()
    for name in ("model.pt", "checkpoint.pt"):
        shutil.copy(finished / name, name)
    Path("truncated.pt").write_bytes(Path("model.pt").read_bytes()[:-1000])
    Path("code.pt").write_bytes(b"cposix\nsystem\n(S'touch code-ran'\ntR.")
    torch.save({"script": "another"}, "other.pt")
    shutil.copy("truncated.pt", "runs/truncated/checkpoint.pt")
    shutil.copy("other.pt", "runs/other/checkpoint.pt")
    shutil.copy("checkpoint.pt", "runs/whole/checkpoint.pt")
    given = [*(SHORT[script] if "whole" in flags else ()), *flags.split()]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert expected in message_of(importlib.import_module(script), given, capsys, monkeypatch)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# --- The files --------------------------------------------------------------------------------------------------------


def test_inline_dependencies_are_those_of_requirements_txt(script: str) -> None:
    block = (ROOT / f"{script}.py").read_text().split("# /// script\n")[1].split("# ///\n")[0]
    inline = tomllib.loads("".join(line.removeprefix("# ") for line in block.splitlines(keepends=True)))
    required = (ROOT / "requirements.txt").read_text().splitlines()
    assert inline["dependencies"]
    assert set(inline["dependencies"]) <= set(required)
    assert inline["requires-python"] == ">=3.11"


def test_the_file_alone_runs(script: str, tmp_path: Path) -> None:
    """Copied elsewhere, under another name, it needs nothing beside it."""
    shutil.copy(ROOT / f"{script}.py", tmp_path / "mine.py")
    length = ("--total-timesteps", "320") if script in AGENTS else ("--epochs", "2")
    command = ["-I", "mine.py", *SHORT[script], *length, "--run-name", "alone"]
    assert spawn(command, tmp_path, stdout=subprocess.DEVNULL).wait() == 0
    assert json.loads((tmp_path / "runs" / "alone" / "result.json").read_text())["script"] == "mine"


def test_every_flag_is_explained(script: str) -> None:
    (arguments,) = (
        node
        for node in ast.parse((ROOT / f"{script}.py").read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "Args"
    )
    kinds = [type(node) for node in arguments.body]
    assert kinds == [ast.AnnAssign, ast.Expr] * (len(kinds) // 2)


# Names that mean something else in each script, and why.
DIFFERENT = {
    "Args": "each algorithm has its own flags",
    "ReplayMemory": "screens that are stacked again when sampled; rows of transitions",
    "replay_size": "a step may store two screens, but one row",
    "MLP": "hidden layers that an action joins; with values to look at",
    "make_env": "Atari's preprocessing; any vectors",
    "make_optimizer": "the paper's RMSProp; L-BFGS",
    "evaluate": "Nature's protocol with an epsilon; the actor without noise",
    "evaluate_model": "the networks to load; tables and predictions",
    "Progress": "steps and returns; epochs and losses",
    "log_hyperparameters": "beside the curve of returns; of losses",
    "main": "a run is named after its environment; after its data",
    "choose_device": "DQN has a precision to choose",
    "greedy_action": "an argmax; an actor",
    "td_targets": "a maximum over actions; a target actor's action",
    "check_args": "each algorithm has its own flags",
    "check_training": "the size of a replay memory",
    "train": "the algorithm",
}


def test_same_names_mean_same_source() -> None:
    """A function or class that bears the same name in two scripts is the same to the letter."""
    sources = defaultdict(set)
    for name in SHORT:
        text = (ROOT / f"{name}.py").read_text()
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                sources[node.name].add(ast.get_source_segment(text, node))
    assert {name for name, versions in sources.items() if len(versions) > 1} == set(DIFFERENT)


README_COMMANDS = [
    (script, line.split(f"python {script}.py")[1].split("#")[0].split())
    for line in (ROOT / "README.md").read_text().splitlines()
    for script in AGENTS
    if line.startswith("    ") and f"python {script}.py" in line
]


@pytest.mark.parametrize(("script", "flags"), README_COMMANDS, indirect=["script"])
def test_readme_commands(script: str, flags: list[str], tmp_path: Path, finished: Path) -> None:
    """Each command that the README gives for the script runs, cut down to its first steps."""
    shutil.copytree(finished, tmp_path / "runs" / "NAME")
    if "--evaluate" in flags:
        flags = [*flags, "--eval-episodes", "1"]
    else:
        buffer_size = min(400, int(flags[flags.index("--buffer-size") + 1])) if "--buffer-size" in flags else 400
        batch_size = int(flags[flags.index("--batch-size") + 1]) if "--batch-size" in flags else 256
        flags = [*flags, "--total-timesteps", str(batch_size + 40), "--learning-starts", str(batch_size)]
        flags = [*flags, "--buffer-size", str(buffer_size), "--eval-episodes", "0"]
    result = run(script, *flags, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
