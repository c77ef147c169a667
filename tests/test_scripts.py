"""What every script promises around its algorithm: reproducible, resumable to the bit, whole in one file."""

import ast
import contextlib
import errno
import fcntl
import hashlib
import importlib
import itertools
import json
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from pathlib import Path
from unittest import mock

import gymnasium as gym
import imageio
import numpy as np
import pytest
import torch
from common import (
    AGENTS,
    DEADLINE,
    OFF_POLICY,
    ROOT,
    SHORT,
    message_of,
    read_events,
    run,
    run_interrupted,
    run_python,
    scalars,
)
from common import run_until_killed as kill

LINE = "# === The run: the same in every script "
agents_only = pytest.mark.parametrize("script", AGENTS, indirect=True)
few_only = pytest.mark.parametrize("script", FEW := ["ddpg_continuous", "mlp_regression"], indirect=True)  # for the run
off_policy_only = pytest.mark.parametrize("script", OFF_POLICY, indirect=True)


@pytest.fixture(params=sorted(SHORT))
def script(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def finished(script: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run that was never interrupted; the first test that asks makes it, for all processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "finished"
    folder.mkdir(exist_ok=True)
    with open(folder / f"{script}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "runs" / script / "result.json").exists():
            result = run(script, *SHORT[script], "--run-name", script, cwd=folder)
            assert (result.returncode, result.stderr) == (0, "")
    return folder / "runs" / script


TIMES = {"wall_seconds", "steps_per_second", "seconds", "first_update", "events", "run_name", "resume"}


def same(ours: object, theirs: object) -> bool:
    """Equal to the bit, through dictionaries and lists; but for times."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        names = ours.keys() - TIMES
        return names == theirs.keys() - TIMES and all(same(ours[name], theirs[name]) for name in names)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(same(*pair) for pair in zip(ours, theirs, strict=True))
    return ours == theirs


def curves(run_dir: Path) -> dict[str, list]:
    """Every tag with all its steps and values, of scalars, pictures, histograms and texts; but for speed."""
    events = read_events(run_dir)
    tags = events.Tags()
    read = {f"scalar {tag}": [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    read |= {f"image {tag}": [(e.step, e.encoded_image_string) for e in events.Images(tag)] for tag in tags["images"]}
    read |= {f"histogram {t}": [(e.step, e.histogram_value) for e in events.Histograms(t)] for t in tags["histograms"]}
    read |= {f"text {tag}": [e.step for e in events.Tensors(tag)] for tag in tags["tensors"]}
    speed = read.pop("scalar charts/SPS", [])
    return read | {"speed": [step for step, _ in speed]}


def assert_same_run(run_dir: Path, other_dir: Path) -> None:
    """Same weights, optimizer, replay, random states, figures and curves: every tag, each event once."""
    for name in ("model.pt", "checkpoint.pt"):
        ours, theirs = (torch.load(folder / name, "cpu", weights_only=True) for folder in (run_dir, other_dir))
        assert {part for part in ours if part not in TIMES and not same(ours[part], theirs[part])} == set()
    assert same(*(json.loads((folder / "result.json").read_text()) for folder in (run_dir, other_dir)))
    ours, theirs = curves(run_dir), curves(other_dir)
    assert ours.keys() == theirs.keys()
    assert {tag for tag in ours if ours[tag] != theirs[tag]} == set()


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_a_finished_run(script: str, finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if not path.name.startswith("events")}
    assert names == {"args.json", "checkpoint.pt", "model.pt", "result.json"}
    result = json.loads((finished / "result.json").read_text())
    sha256 = hashlib.sha256((ROOT / f"{script}.py").read_bytes()).hexdigest()
    assert (result["script"], result["script_sha256"], result["seed"], result["torch_threads"]) == (
        script,
        sha256,
        1,
        1,
    )
    assert result["device"] == "cpu"
    assert result["processor"]
    assert result["steps_per_second"] > 0
    assert result["versions"].keys() >= {"torch", "numpy"}
    tags = curves(finished)
    for tag, points in tags.items():
        steps = [point[0] if isinstance(point, tuple) else point for point in points]
        assert len(steps) == len(set(steps)), tag
    if script in AGENTS:
        returns = [value for _, value in tags["scalar charts/episodic_return"]]
        assert result["train_return_mean"] == pytest.approx(np.mean(returns[-100:]))
        flags = dict(itertools.pairwise(SHORT[script]))
        total = int(flags["--total-timesteps"])
        rollout = int(flags.get("--num-envs", 1)) * int(flags.get("--num-steps", 1))
        assert tags["scalar eval/return_mean"][-1] == (total, pytest.approx(result["eval_return_mean"]))
        assert (result["total_timesteps"], result["eval_episodes"]) == (total, 1)
        assert tags["speed"][0] == max(importlib.import_module(script).LOG_FREQUENCY, rollout)


def test_another_seed_is_another_run(script: str, tmp_path: Path) -> None:
    """Other weights, random numbers and environment. That the same seed is the same run, the killed ones show."""
    for seed in ("1", "2"):
        kill(script, "after", 2, *SHORT[script], "--run-name", seed, "--seed", seed, cwd=tmp_path)
    states = [torch.load(tmp_path / "runs" / seed / "checkpoint.pt", weights_only=True) for seed in ("1", "2")]
    assert not any(same(*(state[name] for state in states)) for name in ("rng", "torch_rng"))
    for name in states[0]["parts"]:
        if name.startswith("env"):  # each is still in its first episode, which its seed began
            assert not same(*(state["parts"][name]["start"] for state in states))
    parts = {name: same(*(state["parts"][name] for state in states)) for name in states[0]["parts"]}
    assert {name for name, equal in parts.items() if equal} <= {"optimizer", "actor_adam", "critic_adam", "memory"}


def test_killed_at_the_worst_moments_it_resumes_to_the_bit(script: str, finished: Path, tmp_path: Path) -> None:
    """Killed right before or after a file gets its name: args.json, checkpoints, model.pt, result.json.

    Before the name of a checkpoint, what was logged since the one before is on the disk already, and is logged again.
    """
    run_dir, flags = tmp_path / "runs" / "killed", [*SHORT[script], "--run-name", "killed", "--resume"]
    moments = [("before", 1), ("before", 4), ("after", 2)]
    moments += [("before", "model.pt"), ("before", "result.json"), ("after", "result.json")]
    for moment, call in moments:
        kill(script, moment, call, *flags, cwd=tmp_path)
        for path in run_dir.glob("*.json"):
            json.loads(path.read_text())
        for path in run_dir.glob("*.pt"):
            torch.load(path, weights_only=True)
    assert run(script, *flags, cwd=tmp_path).returncode == 0
    assert_same_run(finished, run_dir)
    assert not list(run_dir.glob("replay*"))


STATEFUL = [
    ("dqn_atari", "--optimizer rmsprop --loss huber --train-frequency 13 --total-timesteps 200 --eval-episodes 0"),
    ("rainbow_atari", "--no-prioritised-replay --no-noisy-nets --n-step 1 --total-timesteps 200 --eval-episodes 0"),
    ("ddpg_continuous", "--checkpoint-frequency 0 --eval-frequency 300"),
    ("trpo_continuous", "--num-envs 1 --num-steps 250 --num-minibatches 2 --eval-frequency 0"),
    ("q_learning", "--features tiles --learning-rate 0.3"),
    ("mlp_regression", "--optimizer sgd --restarts 1 --patience 5 --epochs 30 --eval-frequency 7"),
    ("mlp_regression", "--dataset sine --noise 0 --model rbf --hidden-sizes 4 --epochs 8"),
]


@pytest.mark.parametrize(("script", "flags"), STATEFUL, indirect=["script"])
def test_other_flags_resume_to_the_bit_too(script: str, flags: str, tmp_path: Path) -> None:
    flags = [*SHORT[script], *flags.split()]
    assert run(script, *flags, "--run-name", "whole", cwd=tmp_path).returncode == 0
    kill(script, "before", 3, *flags, "--run-name", "killed", cwd=tmp_path)
    assert run(script, *flags, "--run-name", "killed", "--resume", cwd=tmp_path).returncode == 0
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "killed")


CARDS = []
if torch.version.cuda and shutil.which("nvidia-smi"):
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    CARDS = found.stdout.splitlines() if found.returncode == 0 else []


@pytest.mark.skipif(not CARDS, reason="no GPU, or a torch without CUDA")
def test_on_a_gpu_it_resumes_to_the_bit_too(script: str, tmp_path: Path) -> None:
    """And what is trained there is evaluated on a CPU."""
    flags = [*SHORT[script], "--device", "cuda"]
    result = run(script, *flags, "--run-name", "whole", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    result = json.loads((tmp_path / "runs" / "whole" / "result.json").read_text())
    assert result["device"] == "cuda"
    assert result["processor"].split(", ")[1] in CARDS
    kill(script, "before", 3, *flags, "--run-name", "killed", cwd=tmp_path)
    assert run(script, *flags, "--run-name", "killed", "--resume", cwd=tmp_path).returncode == 0
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "killed")
    assert run(script, "--evaluate", "runs/whole/model.pt", cwd=tmp_path).returncode == 0


def test_a_cuda_graph_repeats_what_it_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for machines without a GPU: what runs while it records waits, and every replay runs it again."""
    kernels, asked, recording = [], [], []

    class Graph(contextlib.nullcontext):
        def __init__(self, *_: object, **__: object):
            super().__init__(self)

        def __enter__(self) -> None:
            recording.append(True)

        def __exit__(self, *_: object) -> None:
            recording.clear()

        def replay(self) -> None:
            for kernel in kernels:
                kernel()

    stream = mock.Mock()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    total, optimizer = torch.zeros(1), torch.optim.Adam([torch.zeros(1)])

    def function(x: torch.Tensor) -> torch.Tensor:
        asked.append(optimizer.param_groups[0]["capturable"])
        kernels.append(lambda: total.add_(x))
        if not recording:
            kernels.pop()()
        return total

    run = mock.Mock(device=torch.device("cuda"))
    call = importlib.import_module("dqn_atari").Run.cuda_graph(run, function, optimizer)
    arguments = [torch.tensor([float(2**i)]) for i in range(7)]
    assert [call(argument).item() for argument in arguments] == [1, 3, 7, 15, 31, 63, 127]
    assert [argument.item() for argument in arguments] == [1, 2, 4, 8, 16, 32, 64]
    assert asked == [False, False, False, True]
    assert not optimizer.param_groups[0]["capturable"]


@pytest.mark.skipif(not CARDS, reason="no GPU, or a torch without CUDA")
@off_policy_only
def test_a_cuda_graph_trains_the_same_weights(script: str, tmp_path: Path) -> None:
    """To the bit, as the same kernels launched one by one."""
    text = (ROOT / f"{script}.py").read_text()
    plain = text.replace(
        'if self.device.type != "cuda":\n            return function', "if True:\n            return function"
    )
    assert plain != text
    (tmp_path / f"{script}.py").write_text(plain)
    models = []
    for path in (script, tmp_path / script):
        flags = [*SHORT[script], "--device", "cuda", "--run-name", f"run{len(models)}"]
        result = run(path, *flags, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        models.append(torch.load(tmp_path / "runs" / flags[-1] / "model.pt", "cpu", weights_only=True))
    assert same(*models)


@pytest.mark.parametrize(
    ("script", "signals", "call"),
    [
        ("ddpg_continuous", "SIGINT", 2),
        ("ppo_continuous", "SIGHUP+SIGHUP+SIGTERM", 2),
        ("ppo_continuous", "SIGTERM", "model.pt"),
    ],
    indirect=["script"],
)
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(
    script: str, signals: str, call: int | str, finished: Path, tmp_path: Path
) -> None:
    """Between two checkpoints, some at once, before the last evaluation; the printed command leads to the same bits."""
    flags = [*SHORT[script], "--run-name", "stopped"]
    result = run_interrupted(signals, "after", call, script, *flags, cwd=tmp_path)
    assert result.returncode == 130
    first, line = result.stderr.split("\n")[1:-1:2]
    assert first == "ends after this step; a second signal ends it at once"
    assert line.startswith(f"stopped; go on with: OMP_NUM_THREADS=1 {sys.executable} ")
    assert line.endswith("--run-name stopped --resume")
    assert run(script, *line.split(f"{script}.py ")[1].split(), cwd=tmp_path).returncode == 0
    assert_same_run(finished, tmp_path / "runs" / "stopped")


@pytest.mark.parametrize(("moment", "pipe"), [("log", None), ("due", None), ("log", BrokenPipeError)])
def test_a_signal_within_a_step_waits_for_a_checkpoint(
    moment: str, pipe: type[OSError] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where Ctrl-C has ended the `tee` that reads the progress."""
    module, saved = importlib.import_module("q_learning"), []
    run = mock.Mock(start=0.0, stopping=0.0, progress={"step": 0})
    run.due.return_value = False

    def strike(*_: object) -> object:
        run.stopping = 1.0
        return mock.DEFAULT

    getattr(run, moment).side_effect = strike
    run.save_checkpoint.side_effect = lambda: saved.append(run.progress["step"])
    bar = mock.MagicMock()
    bar().__enter__().update.side_effect = pipe
    monkeypatch.setattr(module, "tqdm", bar)
    with pytest.raises(pipe or KeyboardInterrupt):
        list(module.Run.steps(run, 10))
    assert saved[-1:] == [run.progress["step"]]


def test_a_long_evaluation_tells_its_progress(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on a minute at each look; a quick one says nothing. The figures are the same."""
    module = importlib.import_module("q_learning")
    args = module.Args(env_id="CartPole-v1", features="raw", max_episode_steps=0, eval_episodes=3)
    model = {"q_function": module.QFunction(args, module.make_discrete_env(args)).state_dict()}
    quick = module.evaluate(args, model, torch.device("cpu"), None)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("tqdm.std.time", itertools.count(0, 60).__next__)
    assert module.evaluate(args, model, torch.device("cpu"), None) == quick
    assert "evaluation: 2 of 3" in capsys.readouterr().out


def test_speed_is_told_from_the_first_update_on_and_without_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of its own: a step takes a second, after the first update two; the run is stopped for a day."""
    module, clock = importlib.import_module("q_learning"), [0]
    monkeypatch.setattr(module.time, "time", lambda: clock[0])
    monkeypatch.setattr(module, "LOG_FREQUENCY", 1)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # the same process twice

    def train(**flags: object) -> module.Run:
        run = module.Run(module.Args(runs_dir=tmp_path, run_name="it", eval_episodes=0, **flags), "it")
        run.restore()
        for step in run.steps(30):
            clock[0] += 1 if step <= 10 else 2
            run.log({"losses/td_loss": 0.0} if step >= 10 else {})
            if step == 20 and not flags:
                run.stop(signal.SIGTERM, None)
        return run

    with pytest.raises(KeyboardInterrupt):
        train()
    clock[0] += 86_400
    train(resume=True).finish({})
    result = json.loads((tmp_path / "it" / "result.json").read_text())
    assert (result["steps_per_second"], result["wall_seconds"]) == ((30 - 10) / 40, 10 + 40)
    speeds = {step: pytest.approx(step / (step if step <= 10 else 2 * step - 10)) for step in range(1, 31)}
    assert dict(scalars(tmp_path / "it", "charts/SPS")) == speeds


def test_the_last_100_returns_are_kept_and_load_again(tmp_path: Path) -> None:
    """Though rewards are NumPy's."""
    module, run = importlib.import_module("q_learning"), mock.Mock(counted=0, progress={"episodes": {}, "returns": []})
    module.Run.count_reward(run, np.float64(1.5), False)
    for i in range(150):
        module.Run.count_reward(run, np.float32(i), True, env=1)
    torch.save(run.progress, tmp_path / "progress.pt")
    progress = torch.load(tmp_path / "progress.pt", weights_only=True)
    assert progress == {"episodes": {0: (1.5, 1)}, "returns": [float(i) for i in range(50, 150)]}


def test_a_checkpoint_is_on_the_disk_after_all_that_it_refers_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut needs: events and replay, the checkpoint under a temporary name, its name, and its folder."""
    module, order, fsync, replace = importlib.import_module("ddpg_continuous"), [], os.fsync, os.replace
    run = module.Run(module.Args(runs_dir=tmp_path, run_name="it", device="cpu"), "it")
    run.map_file("transitions", np.float32, (3,))
    run.restore()

    def synced(file: object) -> None:
        order.append(os.fstat(file if isinstance(file, int) else file.fileno()).st_ino)
        fsync(file)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda old, new: order.append(Path(new).name) or replace(old, new))
    run.save_checkpoint()
    referred = {path.stat().st_ino for pattern in ("events*", "replay*") for path in run.dir.glob(pattern)}
    assert (len(referred), set(order[:2])) == (2, referred)
    assert order[2:] == [(run.dir / "checkpoint.pt").stat().st_ino, "checkpoint.pt", run.dir.stat().st_ino]


def test_signals_that_are_ignored_stay_so_and_a_second_one_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup; and where a step hangs, but not for two signals within a second."""
    module, run, clock = importlib.import_module("q_learning"), mock.Mock(stopping=0.0, evaluating=False), [100.0]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    module.on_signals(run.stop)
    assert [signal.getsignal(s) for s in (signal.SIGHUP, signal.SIGTERM)] == [signal.SIG_IGN, run.stop]
    raised = mock.Mock()
    monkeypatch.setattr(module.time, "time", lambda: clock[0])
    monkeypatch.setattr(module.signal, "raise_signal", raised)
    for clock[0], count in ((100.0, 0), (100.5, 0), (102.0, 1)):
        module.Run.stop(run, signal.SIGTERM, None)
        assert raised.call_count == count
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("script", "frequency"), [("rainbow_atari", "0"), ("mlp_regression", "7")], indirect=["script"]
)
def test_evaluation_changes_nothing_in_training(script: str, frequency: str, finished: Path, tmp_path: Path) -> None:
    """Rainbow's noise and regression's shuffling are torch's draws; with evaluations or without, all is the same."""
    flags = [*SHORT[script], "--eval-frequency", frequency, "--run-name", "other"]
    assert run(script, *flags, cwd=tmp_path).returncode == 0
    dirs = finished, tmp_path / "runs" / "other"
    ours, other = (torch.load(run_dir / "checkpoint.pt", weights_only=True) for run_dir in dirs)
    assert all(same(ours[name], other[name]) for name in ("parts", "rng", "torch_rng"))
    counts = [[len(points) for tag, points in curves(d).items() if tag.startswith("scalar eval/")] for d in dirs]
    assert counts[0] != counts[1]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="macOS has none")
@pytest.mark.parametrize("script", ["ddpg_continuous"], indirect=True)
def test_a_signal_before_the_training_leaves_nothing(script: str, tmp_path: Path) -> None:
    flags = [*SHORT[script], "--run-name", "early"]
    result = run_interrupted("SIGTERM", "after", 1, script, *flags, cwd=tmp_path, function="posix_fallocate")
    assert result.returncode == 130
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("script", ["ddpg_continuous", "ppo_continuous"], indirect=True)
def test_a_signal_ends_an_evaluation_at_once(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One that would go on for ever; the run goes on from the checkpoint before it, and evaluates again."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    flags = [*SHORT[script], "--total-timesteps", "400", "--eval-frequency", "200", "--resume"]

    def evaluate_for_ever(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(DEADLINE * 100):
            time.sleep(0.01)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *flags, "--run-name", "stopped"])
        patch.setattr(module, "evaluate", evaluate_for_ever)
        with pytest.raises(SystemExit, match="130"):
            module.main()
    assert torch.load("runs/stopped/checkpoint.pt", weights_only=True)["progress"]["step"] == (
        256 if "po_" in script else 200
    )
    for name in ("stopped", "whole"):
        if name == "stopped":  # the folder's lock goes with a process
            shutil.copytree("runs/stopped", "runs/unlocked")
            name = "unlocked"
        assert run(script, *flags, "--run-name", name, cwd=tmp_path).returncode == 0
    assert_same_run(Path("runs/unlocked"), Path("runs/whole"))


@few_only
def test_a_finished_run_is_left_alone_and_other_flags_are_refused(
    script: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call has a copy, for a process keeps the lock of a folder."""
    monkeypatch.chdir(tmp_path)
    module, another = (importlib.import_module(name) for name in (script, "dqn_atari"))
    length = "--total-timesteps" if script in AGENTS else "--epochs"
    given = {"seed": ["--seed", "7"], "length": [length, "5000"], "script": [], "same": []}
    for name, flags in given.items():
        shutil.copytree(finished, f"runs/{name}")
        before, flags = files(tmp_path), [*SHORT[script], *flags, "--run-name", name, "--resume"]
        if name == "same":
            monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
            with pytest.raises(SystemExit, match="0"):
                module.main()
            assert "finished" in capsys.readouterr().out
        elif name == "script":
            message = message_of(another, ["--run-name", name, "--resume"], capsys, monkeypatch)
            assert f"runs/{name} was begun by another script than" in message
        else:
            message = message_of(module, flags, capsys, monkeypatch)
            assert f"{' '.join(given[name])}: runs/{name} was started with" in message
            assert name == "seed" or script not in AGENTS or "length is fixed" in message
        assert files(tmp_path) == before


@agents_only
def test_evaluation_repeats_and_records_video(script: str, finished: Path, tmp_path: Path) -> None:
    """--evaluate gives the figure of result.json, and a video that opens; what lies beside the model stays."""
    shutil.copy(finished / "model.pt", tmp_path)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "film.txt").write_text("mine")
    result = run(script, "--evaluate", "model.pt", "--capture-video", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    score = json.loads((finished / "result.json").read_text())["eval_return_mean"]
    assert f"eval_return_mean {score:.6g}," in result.stdout
    (video,) = tmp_path.glob("videos-*/*.mp4")
    with imageio.get_reader(video) as reader:
        frames = reader.count_frames()
        assert reader.get_data(frames // 2).std() > 1
    assert frames >= 200
    assert (tmp_path / "videos" / "film.txt").read_text() == "mine"


@pytest.mark.parametrize("script", [name for name in AGENTS if "atari" not in name], indirect=True)
def test_an_evaluation_has_its_own_seed_and_ends_where_an_episode_does_not(
    script: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many steps; Atari's, after so many frames by ALE's own limit. One seed is for all episodes."""
    module, content = importlib.import_module(script), torch.load(finished / "model.pt", weights_only=True)
    args, taken, seeds, reset = module.Args(**content["args"]), [], [], gym.Env.reset

    def seeded(env: gym.Env, *, seed: int | None = None, options: dict | None = None) -> None:
        seeds.append(seed)
        reset(env, seed=seed, options=options)

    monkeypatch.setattr(gym.Env, "reset", seeded)
    args.eval_episodes = 2
    for limit in (1, 2, 10**9):
        monkeypatch.setattr(module, "EVAL_MAX_STEPS", limit)
        taken.append(module.evaluate(args, content, torch.device("cpu"), None)["eval_return_mean"])
    assert len(set(taken)) == 3
    assert taken[0] > taken[1] > taken[2]
    assert [seed for seed in seeds if seed is not None] == [args.seed + 1_000_000] * 3
    assert len(seeds) >= 6


@few_only
def test_one_process_at_a_time_has_the_folder(
    script: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also once it is finished: nothing is looked at before the lock is had. Where there are no locks it trains."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "runs/busy")
    module, flags = importlib.import_module(script), [*SHORT[script], "--run-name", "busy", "--resume"]
    descriptor = os.open("runs/busy", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "another process is training in runs/busy" in message_of(module, flags, capsys, monkeypatch)

    def unknown(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    with pytest.raises(SystemExit, match="0"):
        module.main()
    os.close(descriptor)


@few_only
def test_names_of_runs_never_collide(script: str, tmp_path: Path) -> None:
    """Started at once from a shell loop."""
    module = importlib.import_module(script)
    args = [module.Args(runs_dir=tmp_path, device="cpu") for _ in range(20)]
    assert len({module.Run(one, "a/b c").dir for one in args}) == 20
    assert all(path.name.startswith(f"a-b-c__{script}__1__") for path in tmp_path.iterdir())


@off_policy_only
def test_a_missing_replay_file_is_named(
    script: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/whole").mkdir(parents=True)
    for name in ("checkpoint.pt", "args.json"):
        shutil.copy(finished / name, "runs/whole")
    flags = [*SHORT[script], "--run-name", "whole", "--resume"]
    module = importlib.import_module(script)
    assert "; start anew" in message_of(module, flags, capsys, monkeypatch)
    for name in ("screens", "steps", "transitions"):
        Path(f"runs/whole/replay.{name}.bin").touch()
    shutil.copytree("runs/whole", "runs/cut")  # the folder's lock goes with a process
    flags = [*SHORT[script], "--run-name", "cut", "--resume"]
    assert "it has another size" in message_of(module, flags, capsys, monkeypatch)
    assert {path.stat().st_size for path in Path("runs/cut").glob("replay.*.bin")} == {0}


@few_only
def test_a_folder_that_is_no_runs_is_left_alone(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("events.out.tfevents.1.host.1.0", "replay.mp4", "events.csv", "args.json.bak"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, name).write_text("mine")
        flags = [*SHORT[script], "--run-name", name, "--resume"]
        assert "is no run's folder" in message_of(importlib.import_module(script), flags, capsys, monkeypatch)
        assert Path("runs", name, name).read_text() == "mine"


@pytest.mark.parametrize("script", ["ddpg_continuous"], indirect=True)
def test_another_version_or_number_of_threads_is_said(script: str, finished: Path, tmp_path: Path) -> None:
    source = (ROOT / f"{script}.py").read_text()
    (tmp_path / f"{script}.py").write_text(source + "# a change\n")
    flags = [*SHORT[script], "--run-name", "changed"]
    kill(script, "before", "model.pt", *flags, cwd=tmp_path)
    result = run_python(f"{script}.py", *flags, "--resume", cwd=tmp_path, OMP_NUM_THREADS="2")
    version, threads = result.stderr.splitlines()
    assert version == f"runs/changed was begun by another version of {script}.py"
    assert threads == "runs/changed was begun with OMP_NUM_THREADS=1: its bits will differ"
    assert result.returncode == 0


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="macOS has none")
@off_policy_only
def test_space_is_taken_when_the_run_begins_or_it_leaves_nothing(script: str, tmp_path: Path) -> None:
    """Files may have 1 MB here: one line, and no folder that would be in the way. Else every block is there."""
    command = [sys.executable, ROOT / f"{script}.py", *SHORT[script], "--buffer-size", "200000"]
    command = [*map(str, command), "--total-timesteps", "200000"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))  # noqa: E731
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit, timeout=DEADLINE)
    assert result.returncode == 2
    assert "give a smaller --buffer-size" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("runs/*"))
    module = importlib.import_module(script)
    run = module.Run(module.Args(runs_dir=tmp_path, device="cpu"), "space")
    run.map_file("frames", np.uint8, (100, 10_000))
    assert (run.dir / "replay.frames.bin").stat().st_blocks * 512 >= 1_000_000


@few_only
def test_a_full_disk_loses_nothing_before_the_last_checkpoint(script: str, finished: Path, tmp_path: Path) -> None:
    flags = [*SHORT[script], "--run-name", "full", "--resume"]
    result = run_interrupted("ENOSPC", "before", 9, script, *flags, cwd=tmp_path, function="fsync")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "No space left on device; --resume goes on" in result.stderr
    assert (tmp_path / "runs" / "full" / "checkpoint.pt").exists()
    assert run(script, *flags, cwd=tmp_path).returncode == 0
    assert_same_run(finished, tmp_path / "runs" / "full")


@few_only
def test_a_disk_that_is_full_from_the_start_leaves_nothing(script: str, tmp_path: Path) -> None:
    result = run_interrupted("ENOSPC", "before", 1, script, *SHORT[script], cwd=tmp_path, function="fsync")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("script", ["ddpg_continuous"], indirect=True)
def test_a_checkpoint_that_finds_no_space_leaves_nothing_of_itself(script: str, tmp_path: Path) -> None:
    """Of files of 256 KB at most, which every other file of this run is."""
    command = [sys.executable, ROOT / f"{script}.py", *SHORT[script], "--hidden-sizes", "128", "128", "--run-name", "n"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18))  # noqa: E731
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit, timeout=DEADLINE)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "File too large" in result.stderr
    assert not list(tmp_path.glob("runs/n/*.tmp"))
    assert (tmp_path / "runs" / "n" / "args.json").exists()


@agents_only
def test_nan_stops_the_run(script: str, tmp_path: Path) -> None:
    result = run(script, *SHORT[script], "--learning-rate", "1e30", "--run-name", "nan", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "try a lower --learning-rate" in result.stderr
    assert not (tmp_path / "runs" / "nan" / "result.json").exists()


def test_weights_that_are_no_numbers_are_no_model(tmp_path: Path) -> None:
    """Between two looks at the losses."""
    flags = "--env-id CartPole-v1 --features raw --learning-rate 1e20 --total-timesteps 99 --run-name nan"
    result = run("q_learning", *flags.split(), cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "weights are no numbers any more" in result.stderr
    assert not list(tmp_path.glob("runs/nan/[mr]*.[pj]*"))  # model.pt, result.json


def test_weights_and_biases(tmp_path: Path) -> None:
    """The real package, offline: a run of an id that no other has, for names of runs are not unique there."""
    script = "ppo_continuous"  # any: what is the same in every script does it
    flags = [*SHORT[script], "--total-timesteps", "256", "--track", "--run-name", "a b:1", "--resume"]
    wandb = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    script_path = ROOT / f"{script}.py"
    result = run_python("-W", "default", script_path, *flags, cwd=tmp_path, **wandb)  # its own warnings are its own
    assert result.returncode == 0, result.stderr
    run_dir = tmp_path / "runs" / "a b:1"
    drawn = torch.load(run_dir / "checkpoint.pt", weights_only=True)["progress"]["wandb"]
    assert re.fullmatch("[0-9a-f]{8}", drawn)
    assert list(run_dir.glob(f"wandb/offline-run-*-{drawn}/run-{drawn}.wandb"))


@few_only
def test_weights_and_biases_not_installed(
    script: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = message_of(importlib.import_module(script), [*SHORT[script], "--track"], capsys, monkeypatch)
    assert "pip install wandb" in message
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("script", ["ddpg_continuous"], indirect=True)
def test_weights_and_biases_without_a_login_leaves_no_replay_memory(
    script: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    wandb = mock.Mock(Error=LookupError)
    wandb.init.side_effect = LookupError("no login")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    message = message_of(importlib.import_module(script), [*SHORT[script], "--track"], capsys, monkeypatch)
    assert "--track: no login" in message
    assert [path.name for path in tmp_path.glob("runs/*/*")] == ["args.json"]


@pytest.mark.parametrize("script", ["ddpg_continuous"], indirect=True)
def test_an_error_before_the_first_checkpoint_leaves_no_replay_memory(
    script: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A user's own, in an update, say: each try has a folder of its own."""
    module = importlib.import_module(script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *SHORT[script]])
    monkeypatch.setattr(module.Run, "count_reward", mock.Mock(side_effect=NameError))
    with pytest.raises(NameError):
        module.main()
    assert {path.name.split(".")[0] for path in tmp_path.glob("runs/*/*")} == {"args", "events"}


@agents_only
def test_video_without_moviepy_is_refused_before_the_episodes(
    script: str, finished: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "moviepy", None)
    for flags in (SHORT[script], ["--evaluate", str(finished / "model.pt")]):
        message = message_of(importlib.import_module(script), [*flags, "--capture-video"], capsys, monkeypatch)
        assert "moviepy" in message.lower()
    assert not list(tmp_path.iterdir())


# --- Bad input that is the same everywhere ----------------------------------------------------------------------------


BAD_EVERYWHERE = [
    ("--resume", "--run-name"),
    ("--run-name there", "must be a plain and new name in runs"),
    ("--run-name ../elsewhere", "--run-name ../elsewhere: must be a plain and new name"),
    ("--run-name .. --resume", "--run-name ..: must be a plain and new name"),
    (f"--run-name {'n' * 300}", "File name too long"),
    ("--runs-dir file", "file/"),
    ("--runs-dir dangling", "dangling"),
    ("--evaluate no.pt", "no.pt is missing"),
    ("--evaluate runs", "runs is missing, damaged, or no model"),
    ("--evaluate args.json", "args.json is missing, damaged, or no model"),
    ("--evaluate truncated.pt", "truncated.pt is missing, damaged"),
    ("--evaluate code.pt", "code.pt is missing, damaged, or no model of"),
    ("--evaluate other.pt", "other.pt is missing, damaged, or no model of"),
    ("--evaluate checkpoint.pt", "checkpoint.pt is missing, damaged, or no model of"),
    ("--run-name truncated --resume", "checkpoint.pt is missing, damaged"),
    ("--run-name other --resume", "checkpoint.pt is missing, damaged, or no checkpoint of"),
    ("--run-name edited --resume", "args.json is missing, damaged, or no list of flags of"),
    ("--run-name whole --resume --learning-rate 0.5", "--learning-rate 0.5: runs/whole was started with"),
]
BAD_OFF_POLICY = [
    ("--learning-starts 31 --batch-size 32", "--learning-starts 31"),
    ("--total-timesteps 100000 --learning-starts 100001", "--learning-starts 100001 <= --total-timesteps 100000"),
    ("--buffer-size 31 --batch-size 32", "--buffer-size 31"),
    ("--buffer-size 1000000000000 --total-timesteps 1000000000000", "give a smaller --buffer-size"),
]


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [(s, *bad) for s in SHORT for bad in BAD_EVERYWHERE * (s in FEW) + BAD_OFF_POLICY * (s in OFF_POLICY)],
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
    for name in ("there", "truncated", "other", "whole", "edited"):
        Path("runs", name).mkdir(parents=True)
    Path("file").touch()
    Path("dangling").symlink_to("nowhere")
    for name in ("model.pt", "checkpoint.pt", "args.json"):
        shutil.copy(finished / name, name)
    Path("truncated.pt").write_bytes(Path("model.pt").read_bytes()[:-1000])
    Path("code.pt").write_bytes(b"cposix\nsystem\n(S'touch code-ran'\ntR.")
    torch.save({"script": "another"}, "other.pt")
    shutil.copy("truncated.pt", "runs/truncated/checkpoint.pt")
    shutil.copy("other.pt", "runs/other/checkpoint.pt")
    for name in ("truncated", "other", "whole"):
        shutil.copy(finished / "args.json", f"runs/{name}/args.json")
    Path("runs/edited/args.json").write_text('{"seed": 1,}')
    given = [*(SHORT[script] if "--resume" in flags else ()), *flags.split()]
    before = {path: path.is_file() and path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert expected in message_of(importlib.import_module(script), given, capsys, monkeypatch)
    assert {path: path.is_file() and path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@few_only
def test_more_memory_than_there_is(
    script: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A layer of 256 TB, more than addresses reach."""
    monkeypatch.chdir(tmp_path)
    flags = [*SHORT[script], "--hidden-sizes", "8000000", "8000000"]
    assert "out of memory: " in message_of(importlib.import_module(script), flags, capsys, monkeypatch)
    assert not list(tmp_path.glob("runs/*"))


BOUNDS_EVERYWHERE = ["--seed -1", "--seed 2000000000000", "--checkpoint-frequency -1", "--device tpu"]
BOUNDS = {
    "dqn_atari": ["--train-frequency 0", "--sticky-actions 25", "--exploration-fraction nan", "--loss mae"],
    "ddpg_continuous": ["--tau 1.5", "--exploration-noise -1", "--hidden-sizes 0 1", "--hidden-sizes 8"],
    "ppo_atari": ["--num-envs 0"],
    "ppo_continuous": ["--num-envs 0", "--learning-rate nan"],
}


@pytest.mark.parametrize(
    ("script", "flags"),
    [(s, f) for s in SHORT for f in ["--learning-rate 0", *BOUNDS_EVERYWHERE * (s in FEW), *BOUNDS.get(s, ())]],
    indirect=["script"],
)
def test_flags_out_of_their_bounds(
    script: str, flags: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parser's own box names the flag; `--help` shows the bounds."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
    module = importlib.import_module(script)
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert flags.split()[0] in capsys.readouterr().err


def test_help_shows_bounds(script: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(script).main()
    said = capsys.readouterr().out
    assert "INT >= 0" in said
    assert "INT >= 1" in said
    assert "FLOAT > 0" in said


@pytest.mark.parametrize("name", ["", "mine"])
def test_the_command_that_goes_on_names_the_run(
    name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Once, also where the flag was given an unset variable."""
    monkeypatch.chdir(tmp_path)
    module, flags = importlib.import_module("q_learning"), ["--total-timesteps", "300", "--run-name", name]
    monkeypatch.setattr(sys, "argv", ["q_learning.py", *flags])
    monkeypatch.setattr(module, "train", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit, match="130"):
        module.main()
    words = shlex.split(capsys.readouterr().err.split("go on with: ")[1])
    *given, resume = words[words.index("q_learning.py") + 1 :]
    assert given[:4] == flags
    assert resume == "--resume"
    expected = "" if name else "--run-name MountainCar-v0__q_learning__1__.+"
    assert re.fullmatch(expected, " ".join(given[4:]))


@pytest.mark.parametrize("script", ["ppo_continuous"], indirect=True)
def test_weights_that_do_not_fit_are_named(
    script: str, finished: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a script, or an environment, that has changed since."""
    monkeypatch.chdir(tmp_path)
    module, run_dir = importlib.import_module(script), Path("runs/older")
    shutil.copytree(finished, run_dir)
    (run_dir / "result.json").unlink()
    cases = {"model": ["--evaluate", f"{run_dir}/model.pt"]}
    cases["checkpoint"] = [*SHORT[script], "--run-name", "older", "--resume"]
    for kind, flags in cases.items():
        content = torch.load(run_dir / f"{kind}.pt", weights_only=True)
        content.get("parts", content)["policy"].popitem()
        torch.save(content, run_dir / f"{kind}.pt")
        assert "older" in (message := message_of(module, flags, capsys, monkeypatch))
        assert "does not fit this script's networks or the environment's spaces" in message


def test_without_standard_output_it_trains(tmp_path: Path) -> None:
    command = f"exec {sys.executable} -W error {ROOT}/mlp_regression.py --epochs 2 --restarts 1 --run-name it >&-"
    result = subprocess.run(command, shell=True, cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=DEADLINE)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "runs" / "it" / "result.json").exists()


@few_only
def test_other_systems_get_a_line(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has neither."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delattr(signal, "SIGHUP")
    flags = ["--runs-dir", str(tmp_path / "runs")]
    assert "use Linux or macOS" in message_of(importlib.import_module(script), flags, capsys, monkeypatch)
    assert not list(tmp_path.glob("runs/*"))


# --- The files --------------------------------------------------------------------------------------------------------


def source(script: str) -> str:
    return (ROOT / f"{script}.py").read_text()


SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if LINE in path.read_text())  # and yours, if you add some


def test_the_run_is_the_same_in_every_script() -> None:
    """Byte for byte, from its line to the end of the file."""
    assert set(SCRIPTS) >= set(SHORT)
    lower = {name: source(name)[source(name).index(LINE) :] for name in SCRIPTS}
    assert len(set(lower.values())) == 1


def test_same_names_mean_same_source() -> None:
    """Above the line too, but for what the run calls: each algorithm has its own. Flags of one name in one section.

    A class may lack methods that it has elsewhere.
    """
    own = {"Args", "train", "evaluate", "check", "LOG_FREQUENCY", "EVAL_MAX_FRAMES"}
    sources, flags = defaultdict(set), defaultdict(set)
    for name in SCRIPTS:
        text = source(name).split(LINE)[0]
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and (constant := ast.unparse(node.targets[0])) not in own:
                sources[constant, "value"].add(ast.unparse(node.value))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in own:
                for part in [*node.bases, *node.body] if isinstance(node, ast.ClassDef) else [node]:
                    first = min(x.lineno for x in [part, *getattr(part, "decorator_list", [])])
                    lines = text.splitlines()[first - 1 : part.end_lineno]
                    sources[node.name, getattr(part, "name", type(part).__name__)].add("\n".join(lines))
        section = text.split("    # The run\n")[1].split("\n\n")[0].split('"""\n')
        for flag in section[:-1]:
            flags[flag.split(":")[0].strip()].add(flag.strip())
    assert [key for key, versions in sources.items() if len(versions) > 1] == []
    assert {name for name, versions in flags.items() if len(versions) > 1} == {"device"}  # two defaults
    defaults = {name: importlib.import_module(name).Args().device for name in SHORT}
    for name in ("ddpg_continuous", "dqn_atari", "ppo_atari", "rainbow_atari"):  # faster on a GPU
        assert defaults.pop(name) == "auto"
    for name in ("mlp_regression", "ppo_continuous", "q_learning", "trpo_continuous"):
        assert defaults.pop(name) == "cpu"


@pytest.mark.parametrize("cuda", [False, True])
def test_auto_is_cuda_or_the_cpu(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a Mac, whose mps nobody has tried."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    devices = runpy.run_path(str(ROOT / "mlp_regression.py"))["DEVICES"]
    assert {"auto", "cpu", "mps"} <= set(devices)
    assert devices[-1] == ("cuda" if cuda else "cpu")


def test_inline_dependencies_are_those_of_requirements_txt(script: str) -> None:
    block = source(script).split("# /// script\n")[1].split("# ///\n")[0]
    inline = tomllib.loads("".join(line.removeprefix("# ") for line in block.splitlines(keepends=True)))
    assert inline["dependencies"]
    assert set(inline["dependencies"]) <= set((ROOT / "requirements.txt").read_text().splitlines())
    assert inline["requires-python"] == ">=3.11"


def test_the_file_alone_runs(script: str, tmp_path: Path) -> None:
    """Copied elsewhere, under another name, it needs nothing beside it."""
    shutil.copy(ROOT / f"{script}.py", tmp_path / "mine.py")
    length = ("--total-timesteps", "128", "--eval-episodes", "0") if script in AGENTS else ("--epochs", "2")
    length += ("--learning-starts", "100") * (script in OFF_POLICY)
    result = run(tmp_path / "mine", *SHORT[script], *length, "--run-name", "alone", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads((tmp_path / "runs" / "alone" / "result.json").read_text())["script"] == "mine"


def test_every_flag_is_explained(script: str) -> None:
    (arguments,) = (n for n in ast.parse(source(script)).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    kinds = [type(node) for node in arguments.body]
    assert kinds == [ast.AnnAssign, ast.Expr] * (len(kinds) // 2)


README_COMMANDS = [
    (script, line.split(f"python {script}.py")[1].split("#")[0].split())
    for line in (ROOT / "README.md").read_text().splitlines()
    for script in SCRIPTS
    if line.startswith("    ") and f"python {script}.py" in line
]


@pytest.mark.parametrize(("script", "flags"), README_COMMANDS, indirect=["script"])
def test_readme_commands(script: str, flags: list[str], finished: Path, tmp_path: Path) -> None:
    """Each command that the README gives for a script runs, cut down to its first steps."""
    shutil.copytree(finished, tmp_path / "runs" / "NAME")
    rng = np.random.default_rng(0)
    table = "\n".join(f"{area},{2 * area + 5}" for area in rng.integers(40, 200, 60))
    (tmp_path / "houses.csv").write_text(f"area,price\n{table}\n")
    if "houses.csv" in flags or "new.csv" in flags:
        (tmp_path / "new.csv").write_text("area\n70\n90\n")
        trained = run(script, "--data", "houses.csv", "--target", "price", "--epochs", "2", cwd=tmp_path)
        assert trained.returncode == 0
        shutil.rmtree(tmp_path / "runs" / "NAME")
        next((tmp_path / "runs").glob("houses*")).rename(tmp_path / "runs" / "NAME")
    if "--help" in flags:
        flags = flags[:1]
    elif "--evaluate" in flags:
        flags = [*flags, *(["--eval-episodes", "1"] if script in AGENTS else [])]
    elif script == "q_learning":
        flags = [*flags, "--total-timesteps", "300", "--eval-episodes", "0"]
    elif script in AGENTS and script not in OFF_POLICY:
        flags = [*flags, "--total-timesteps", "128", "--num-steps", "32", "--num-envs", "2", "--num-minibatches", "2"]
        flags = [*flags, "--update-epochs", "2", "--eval-episodes", "0"]
    elif script in OFF_POLICY:
        batch_size = flags[flags.index("--batch-size") + 1] if "--batch-size" in flags else "256"
        flags = [*flags, "--total-timesteps", "300", "--learning-starts", batch_size, "--buffer-size", "400"]
        flags = [*flags, "--eval-episodes", "0"]
    else:
        flags = [*flags, "--epochs", "2", "--restarts", "1"]
    result = run(script, *flags, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
