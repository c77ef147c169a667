"""Tests of benchmark.sh and results/summary.py, with short runs of real scripts and a real Slurm cluster."""

import csv
import itertools
import json
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from common import ROOT
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "results"))
import summary

FLAGS = [
    "--samples",
    "100",
    "--model",
    "linear",
    "--optimizer",
    "adam",
    "--epochs",
    "200",
    "--checkpoint-frequency",
    "10",
]
PLANE = ["mlp_regression.py", "--env-ids", "plane", "--seeds"]
NAMES = ["plane__mlp_regression__1", "plane__mlp_regression__2"]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has none
PROBE = """
import json, os, sys
run_dir = os.path.join(*(sys.argv[sys.argv.index(flag) + 1] for flag in ("--runs-dir", "--run-name")))
print(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"])
os.makedirs(run_dir)
json.dump(sys.argv, open(os.path.join(run_dir, "result.json"), "w"))
"""


STARTED = []


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    """Of a sweep that a failed test leaves, nothing goes on."""
    yield
    while STARTED:
        if (process := STARTED.pop()).poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def start(*arguments: object, cwd: Path, threads: int | None = None, **options: object) -> subprocess.Popen:
    """benchmark.sh as a user starts it, in the folder of the scripts, its runs in `cwd`."""
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": str(threads or "")}
    command = [str(part) for part in (ROOT / "benchmark.sh", *arguments)]
    STARTED.append(subprocess.Popen(command, cwd=cwd, env=env, text=True, start_new_session=True, **options))
    return STARTED[-1]


def sweep(*arguments: object, cwd: Path, threads: int | None = None) -> subprocess.CompletedProcess:
    process = start(*arguments, cwd=cwd, threads=threads, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)


def weights(content: object) -> list[torch.Tensor]:
    """All tensors in what a model.pt holds."""
    if isinstance(content, dict):
        return [tensor for value in content.values() for tensor in weights(value)]
    return [content] if isinstance(content, torch.Tensor) else []


def assert_same_weights(ours: Path, theirs: Path) -> None:
    ours, theirs = (weights(torch.load(run_dir / "model.pt", weights_only=True)) for run_dir in (ours, theirs))
    assert ours
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with the scripts in it, and one that writes down what it is given."""
    for name in ("mlp_regression.py", "dqn_atari.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "probe.py").write_text(PROBE)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of a sweep that was never interrupted."""
    cwd = tmp_path_factory.mktemp("sweep")
    (cwd / "mlp_regression.py").symlink_to(ROOT / "mlp_regression.py")
    result = sweep(*PLANE, 1, 2, "--", *FLAGS, cwd=cwd)
    assert (result.returncode, result.stderr) == (0, "")
    assert "2/2 done, 0 running, 0 failed" in result.stdout
    return cwd / "runs"


# --- On one machine ---------------------------------------------------------------------------------------------------


def test_a_sweep_leaves_runs_logs_tables_and_figures(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {*NAMES, "logs", "summary"}
    assert {path.name for path in (whole / "logs").iterdir()} == {f"{name}.log" for name in NAMES}
    tables = {"table.csv", "table.md", "mlp_regression__plane.png"}
    assert {path.name for path in (whole / "summary").iterdir()} == tables
    for name in NAMES:
        args = json.loads((whole / name / "args.json").read_text())
        assert (args["dataset"], str(args["seed"]), args["epochs"]) == ("plane", name[-1], 200)
        assert json.loads((whole / name / "result.json").read_text())["torch_threads"] == max(1, CORES // 2)


def test_killed_with_its_runs_it_goes_on_to_the_same_bits_and_a_finished_run_stays(whole: Path, here: Path) -> None:
    finished, killed = (here / "runs" / name for name in NAMES)
    shutil.copytree(whole / NAMES[0], finished)
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    process = start(*PLANE, 2, "--", *FLAGS, cwd=here, stdout=subprocess.DEVNULL)
    wait_until((killed / "checkpoint.pt").exists)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert not (killed / "result.json").exists()
    assert sweep(*PLANE, 1, 2, "--", *FLAGS, cwd=here).returncode == 0
    assert_same_weights(whole / NAMES[1], killed)
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM], ids=["ctrl-c", "hangup", "term"])
@pytest.mark.parametrize("reader", ["there", "gone"])
def test_interrupted_it_ends_its_runs_with_checkpoints(signum: signal.Signals, reader: str, here: Path) -> None:
    """By Ctrl-C or a terminal that closes, which signal the runs and its reader (`| tee`) too, or by SIGTERM alone."""
    flags = ["--workers", "1", "--", *FLAGS, "--epochs", "1000000"]
    heard = partial(signal.signal, signum, signal.SIG_DFL)  # also where this test runs under nohup
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = start(*PLANE, 1, 2, *flags, cwd=here, preexec_fn=heard, **pipes)
    wait_until(lambda: list(here.glob("runs/*/checkpoint.pt")))
    if reader == "gone":
        process.stdout.close()
    os.kill(process.pid, signum) if signum == signal.SIGTERM else os.killpg(process.pid, signum)
    output = process.communicate(timeout=60)[0] if reader == "there" else process.wait(timeout=60)
    assert process.returncode == 130
    assert reader == "gone" or "the same command goes on" in output
    assert "stopped; go on with" in (here / "runs" / "logs" / f"{NAMES[0]}.log").read_text()
    assert [path.name for path in here.glob("runs/*__*")] == NAMES[:1]


def test_a_second_signal_ends_runs_in_a_long_step(here: Path) -> None:
    (here / "long.py").write_text("""
import signal, time
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(print(len(heard), "heard", flush=True)))
print("ready", flush=True)
while len(heard) < 2:
    time.sleep(0.02)
""")
    process = start("long.py", "--env-ids", "x", "--seeds", 1, cwd=here, stdout=subprocess.DEVNULL)
    log = here / "runs" / "logs" / "x__long__1.log"
    for word in ("ready", "0 heard"):
        wait_until(lambda word=word: log.exists() and word in log.read_text())
        process.terminate()
    assert process.wait(timeout=60) == 130
    assert "1 heard" in log.read_text()


def test_tables_of_ones_own_and_a_run_that_fails_stops_no_other(here: Path) -> None:
    (here / "my data").mkdir()
    rows = "".join(f"{i},{i % 7},{2 * i + i % 7}\n" for i in range(60))
    (here / "my data" / "houses.csv").write_text("area,age,price\n" + rows)
    names = ["no.csv", "my data/houses.csv"]
    flags = ["--target", "price", "--epochs", "2", "--model", "linear"]
    result = sweep("mlp_regression.py", "--env-ids", *names, "--seeds", 3, "--", *flags, cwd=here)
    assert result.returncode == 1
    assert "no__mlp_regression__3 failed with status 2" in result.stderr
    assert "no.csv: No such file" in result.stderr
    assert "1 of 2 runs failed" in result.stderr
    run_dir = here / "runs" / "houses__mlp_regression__3"
    assert json.loads((run_dir / "args.json").read_text())["data"] == "my data/houses.csv"
    content = json.loads((run_dir / "result.json").read_text())
    assert content["env_id"] == "houses"
    assert re.search("houses +[|] 1 of 1", result.stdout)
    del content["test_r2"]  # as where the test's targets are alike
    (run_dir / "result.json").write_text(json.dumps(content))
    assert "return, last quarter" not in table(here / "runs")[0]


def test_each_gpu_gets_a_worker(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three GPUs by a stand-in for nvidia-smi: three runs at a time, each sees one of them."""
    (here / "nvidia-smi").write_text("#!/bin/sh\nprintf '4\\n6\\n7\\n'\n")
    (here / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    result = sweep("probe.py", "--env-ids", "x", "--seeds", *range(4), cwd=here)
    assert "0/4 done, 3 running" in result.stdout
    seen = [(here / f"runs/logs/x__probe__{seed}.log").read_text().split()[0] for seed in range(4)]
    assert seen[:3] == ["4", "6", "7"]
    assert seen[3] in seen[:3]
    (here / "small.py").write_text(f'{PROBE}class Args:\n    device: str = "cpu"\n')
    cases = [
        ("probe", "--device=cpu"),
        ("probe", "--device cuda --device cpu"),
        ("small", "--device-of-another cuda"),
    ]
    for number, (script, flags) in enumerate(cases):  # on the CPU
        arguments = "--env-ids", number, "--seeds", *range(CORES + 1), "--", *flags.split()
        assert f"0/{CORES + 1} done, {CORES} running" in sweep(f"{script}.py", *arguments, cwd=here).stdout
    result = sweep("small.py", "--env-ids", "z", "--seeds", *range(4), "--", "--device", "cuda", cwd=here)
    assert "0/4 done, 3 running" in result.stdout
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # none
    result = sweep("probe.py", "--env-ids", "y", "--seeds", *range(CORES + 1), cwd=here)
    assert f"0/{CORES + 1} done, {CORES} running" in result.stdout


@pytest.mark.parametrize(("threads", "runs", "workers"), [(1, CORES + 1, CORES), (10_000, 2, 1)])
def test_threads_that_are_given_are_kept(threads: int, runs: int, workers: int, here: Path) -> None:
    """And leave room for so many runs at a time."""
    result = sweep("probe.py", "--env-ids", "x", "--seeds", *range(runs), cwd=here, threads=threads)
    assert f"0/{runs} done, {workers} running" in result.stdout
    assert {path.read_text().split()[-1] for path in (here / "runs" / "logs").glob("*.log")} == {str(threads)}


def test_dry_run_prints_the_commands_and_does_nothing(here: Path) -> None:
    """Odd characters reach the script as they are; the names of runs hold none."""
    before = sorted(here.rglob("*"))
    odd = ["ALE/Pong-v5", "a b", "it's", 'say "$HOME"', "ü*"]
    arguments = ["dqn_atari.py", "--env-ids", *odd, "--seeds", "0", "7", "--runs-dir", "my runs", "--dry-run"]
    result = sweep(*arguments, "--", "--loss", "huber", "--odd", "x y", cwd=here)
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(here.rglob("*")) == before
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    given = [(env_id, seed) for env_id in odd for seed in ("0", "7")]
    for command, (env_id, seed) in zip(commands, given, strict=True):
        name = command[command.index("--run-name") + 1]
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name)
        assert command == [
            *(sys.executable, "dqn_atari.py", "--env-id", env_id, "--seed", seed, "--run-name", name),
            *("--runs-dir", "my runs", "--resume", "--loss", "huber", "--odd", "x y"),
        ]
    assert commands[0][commands[0].index("--run-name") + 1] == "ALE-Pong-v5__dqn_atari__0"
    arguments = [ROOT / "benchmark.sh", "mlp_regression.py", "--env-ids", "my/Häuser.CSV", "--seeds", "1", "--dry-run"]
    for locale in ("C", "C.UTF-8"):
        env = os.environ | {"PYTHON": sys.executable, "LC_ALL": locale}
        command = subprocess.check_output(arguments, cwd=here, env=env, text=True, timeout=60)
        assert re.search("--data .+ --run-name H--user__mlp_regression__1 ", command)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--env-ids sine --seeds 1", "give a script"),
        ("no.py --env-ids sine --seeds 1", "no.py: no such script"),
        ("mlp_regression.py --seeds 1", "--env-ids: give one environment or more"),
        ("mlp_regression.py --env-ids --seeds 1", "--env-ids: give one environment or more"),
        ("mlp_regression.py --env-ids sine", "--seeds: give one seed or more"),
        ("mlp_regression.py --env-ids sine --seeds -1", "--seeds -1"),
        ("mlp_regression.py --env-ids sine --seeds 01", "--seeds 01: a seed is a whole number"),
        ("mlp_regression.py --env-ids sine --seeds 1 1", "two runs would be called sine__mlp_regression__1"),
        ("mlp_regression.py --env-ids a/b.csv b.csv --seeds 1", "two runs would be called b__mlp_regression__1"),
        ("mlp_regression.py --env-ids sine --seeds 1 --workers 0", "--workers 0: give a number"),
        ("mlp_regression.py --env-ids sine --seeds 1 --workers", "--workers : give a number"),
        ("mlp_regression.py --summary runs", "--summary: no option here; the script comes first"),
        ("mlp_regression.py --env-ids sine --seeds 1 --epochs 3", "--epochs: no option here; the script comes first"),
        ("mlp_regression.py --env-ids sine --seeds 1 --runs-dir file/sub", "cannot write to file/sub/logs"),
        ("mlp_regression.py --env-ids sine --seeds 1 --runs-dir --dry-run", "--runs-dir: give a folder"),
        ("mlp_regression.py --env-ids sine --seeds 1 -- --seed=2", "-- --seed: the sweep"),
        ("mlp_regression.py --env-ids sine --seeds 1 -- --run_name x", "-- --run_name: the sweep"),
        ("mlp_regression.py --env-ids sine --seeds 1 -- --data x.csv", "-- --data: the sweep"),
        ("mlp_regression.py --env-ids sine --seeds 1 --sbatch --time=1", "--sbatch: is for --slurm"),
        ("mlp_regression.py --env-ids sine --seeds 1 --slurm --sbatch", "--sbatch: give options"),
        ("--summary", "give one folder"),
        ("--summary nowhere", "--summary nowhere: give one folder that exists"),
    ],
)
def test_bad_input_of_the_sweep(arguments: str, expected: str, here: Path) -> None:
    (here / "file").touch()
    before = sorted(here.rglob("*"))
    result = sweep(*arguments.split(), cwd=here)
    assert result.returncode == 2
    assert result.stderr.startswith("benchmark.sh: error: ")
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr
    assert sorted(here.rglob("*")) == before


# --- On Slurm ---------------------------------------------------------------------------------------------------------


def test_words_of_sbatch_reach_it_and_a_task_becomes_its_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for sbatch, which shows what it is given and runs the second task."""
    run = "SLURM_ARRAY_TASK_ID=1 SLURM_CPUS_PER_TASK=3 bash"
    (here / "sbatch").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >"{here}/given"\n{run}\n')
    (here / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    options = ["--account=lab --mem 8G ", "--qos=low\n--cpus-per-task=3"]
    arguments = ["--slurm", "--workers", 5, "--sbatch", options[0], "--sbatch", options[1]]
    arguments += ["--runs-dir", "my 5% runs", "--", "--odd", "x y"]
    result = sweep("probe.py", "--env-ids", "a", "b", "--seeds", 0, *arguments, cwd=here)
    assert result.returncode == 0
    words = (here / "given").read_text().splitlines()
    assert words[0] == "--array=0-1%5"
    assert words[-5:] == " ".join(options).split()  # the last one counts
    assert "--output=my 5%% runs/logs/slurm-%A_%a.log" in words
    assert result.stdout.split("\n")[0].endswith(" 3")
    (run_dir,) = (here / "my 5% runs").glob("*__probe__*")
    assert run_dir.name == "b__probe__0"
    assert json.loads((run_dir / "result.json").read_text())[-2:] == ["--odd", "x y"]
    (here / "sbatch").write_text(f"#!/bin/sh\nrm */logs/*.list\n{run}\n")
    assert sweep("probe.py", "--env-ids", "a", "b", "--seeds", 0, *arguments, cwd=here).returncode != 0


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster of one node on this machine."""
    if missing := [program for program in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(program)]:
        pytest.skip(f"needs {', '.join(missing)}: Debian's packages slurm-wlm and munge")
    if os.geteuid() != 0:
        pytest.skip("slurmctld and slurmd must be started by root")
    node, folder = socket.gethostname().split(".")[0], tmp_path / "slurm"
    (folder / "state").mkdir(parents=True)
    (folder / "slurm.conf").write_text(
        f"""
ClusterName=test
SlurmctldHost={node}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
KillWait=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
NodeName={node} Gres=gpu:2 NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
"""
    )
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")  # stand for GPUs
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    user = pwd.getpwnam("munge")
    Path("/run/munge").mkdir(exist_ok=True)
    os.chown("/run/munge", user.pw_uid, user.pw_gid)
    started = []
    try:
        if not slurm_says("pgrep", "munged"):
            options = {"user": "munge", "group": "munge", "extra_groups": [], "stderr": subprocess.DEVNULL}
            started.append(subprocess.Popen(["munged", "--foreground"], **options))
            wait_until(Path("/run/munge/munge.socket.2").exists)
        started += [subprocess.Popen([name, "-D"], stderr=subprocess.DEVNULL) for name in ("slurmctld", "slurmd")]
        wait_until(lambda: "idle" in slurm_says("sinfo", "--noheader"))
        yield
    finally:
        for daemon in reversed(started):
            daemon.terminate()
            daemon.wait(timeout=60)


def slurm_says(*command: str) -> str:
    """What a program prints."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.usefixtures("slurm")
def test_slurm_runs_the_array_and_a_requeued_task_resumes(here: Path) -> None:
    options = "--partition=main --gpus-per-task=1 --time=1:00:00"
    result = sweep(*PLANE, 1, 2, "--slurm", "--sbatch", options, "--", *FLAGS, cwd=here)
    assert (result.returncode, result.stderr) == (0, "")
    job = result.stdout.split("Submitted batch job ")[1].split()[0]
    runs = [here / "runs" / name for name in NAMES]
    wait_until((runs[0] / "checkpoint.pt").exists)
    slurm_says("scontrol", "requeue", f"{job}_0")
    wait_until(lambda: "PENDING" in slurm_says("scontrol", "show", "job", f"{job}_0"))
    assert not (runs[0] / "result.json").exists()
    assert re.search("[01] of 2", sweep("--summary", "runs", cwd=here).stdout)  # works before the sweep has ended
    slurm_says("scontrol", "update", f"JobId={job}_0", "StartTime=now")  # it would wait two minutes
    wait_until(lambda: all((run_dir / "result.json").exists() for run_dir in runs))
    wait_until(lambda: "COMPLETED" in slurm_says("scontrol", "show", "job", f"{job}_0"))
    assert "Restarts=1" in slurm_says("scontrol", "show", "job", f"{job}_0")
    assert {path.name for path in (here / "runs" / "logs").glob("slurm*")} == {f"slurm-{job}_{i}.log" for i in (0, 1)}
    log = (here / "runs" / "logs" / f"slurm-{job}_0.log").read_text()
    assert len(re.findall(r"\b0 of 200,", log)) == 1  # the second time it began where the first one stopped


# --- The summary ------------------------------------------------------------------------------------------------------


def make_run(
    folder: Path,
    seed: int,
    returns: list[float],
    evaluation: float,
    game: str = "Pong",
    script: str = "dqn_atari",
    **flags: object,
) -> Path:
    """A run as the scripts leave it."""
    env_id = f"ALE/{game}-v5"
    run_dir = folder / f"ALE-{game}-v5__{script}__{seed}{''.join(flags)}"
    args = {"env_id": env_id, "seed": seed, "run_name": run_dir.name, "total_timesteps": 1_000} | flags
    with SummaryWriter(run_dir) as writer:
        writer.add_text("flags", "|seed|1|")
        for step, value in zip(np.linspace(0, 1_000, len(returns) + 1)[1:], returns, strict=True):
            writer.add_scalar("charts/episodic_return", value, int(step))
            writer.add_scalar("charts/SPS", 100, int(step))
        writer.add_scalar("eval/return_mean", evaluation, 1_000)
    (run_dir / "args.json").write_text(json.dumps(args))
    result = {"script": script, "env_id": env_id, "seed": seed, "total_timesteps": 1_000}
    result |= {"train_return_mean": float(np.mean(returns[-100:])), "eval_return_mean": evaluation}
    result |= {"wall_seconds": 1_800.0, "steps_per_second": 100.0 + seed}
    (run_dir / "result.json").write_text(json.dumps(result))
    return run_dir


def table(folder: Path) -> list[dict[str, str]]:
    summary.summarise(folder)
    with open(folder / "summary" / "table.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_the_table_by_hand(seeds: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Every value of fewer than five seeds; of five mean and interval, of all 5^5 samples (a random game: -20.7)."""
    evaluations = [-21.0, 3.0, 5.0, 7.0, 16.0][:seeds]
    for seed, evaluation in enumerate(evaluations):
        make_run(tmp_path, seed, [-20.0, -10.0, 0.0, 10.0 + seed], evaluation)
    (make_run(tmp_path, 99, [0.0], 0.0) / "result.json").unlink()
    (row,) = table(tmp_path)
    assert row["seeds done"] == f"{seeds} of {seeds + 1} begun"
    assert (row["steps/s"], row["hours in all"]) == (f"{100 + (seeds - 1) / 2:.0f}", f"{seeds / 2:.2f}")
    relative = [100 * (evaluation + 20.7) / (14.6 + 20.7) for evaluation in evaluations]
    if seeds < 5:
        assert row["evaluation"] == ", ".join(["-21", "3", "5"][:seeds])
        assert row["return, last quarter"] == ", ".join(["10", "11", "12"][:seeds])
        assert row["human-normalised, %"] == ", ".join(f"{score:.3g}" for score in relative)
    else:
        mean, low, high = (float(word.strip("[],")) for word in row["evaluation"].split())
        means = [np.mean(sample) for sample in itertools.product(evaluations, repeat=5)]
        assert mean == 2
        assert [low, high] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.7)
        assert row["human-normalised, %"].split()[0] == f"{np.mean(relative):.3g}"
    assert f"{seeds} of {seeds + 1}" in capsys.readouterr().out
    assert "interquartile" not in (tmp_path / "summary" / "table.md").read_text()  # it is one game
    assert (tmp_path / "summary" / "dqn_atari__ALE-Pong-v5.png").stat().st_size > 5_000


def test_the_interquartile_mean_is_over_games_and_seeds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of 2 x 5 scores 2.5 are cut off at each end, that is two.

    A game of fewer than five seeds does not count, nor do runs with other flags or of another folder.
    """
    scores = {("Pong", 3): [0, 10, 20, 30, 40], ("Breakout", 3): [25, 35, 45, 55, 75], ("BeamRider", 3): [1, 2]}
    scores |= {("Pong", 1): [90] * 5, ("Boxing", 7): [99] * 5}
    for (game, n_step), values in scores.items():
        zero, one = (summary.human_normalised(f"ALE/{game}-v5", value) for value in (0.0, 1.0))
        for seed, value in enumerate(values):
            make_run(tmp_path / str(n_step), seed, [1.0], (value - zero) / (one - zero), game, n_step=n_step)
        for run_dir in (tmp_path / str(n_step)).iterdir():
            shutil.move(run_dir, tmp_path / f"{run_dir.name}{n_step}")
    summary.summarise(tmp_path)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "interquartile mean" in line]
    assert line.startswith("dqn_atari (n_step 3), 10 runs of ALE/Breakout-v5, ALE/Pong-v5: ")
    mean, low, high = map(float, re.search(r"(\S+) % \[(\S+), (\S+)\]", line).groups())
    assert mean == pytest.approx(np.mean([20, 25, 30, 35, 40, 45]), abs=0.1)
    pong, breakout = scores["Pong", 3], scores["Breakout", 3]
    draws = np.random.default_rng(7).integers(5, size=(2, 20_000, 5))
    samples = np.sort(np.hstack([np.array(pong)[draws[0]], np.array(breakout)[draws[1]]]))  # of each game its seeds
    assert [low, high] == pytest.approx(np.percentile(samples[:, 2:-2].mean(axis=1), [2.5, 97.5]), abs=2)
    assert line in (tmp_path / "summary" / "table.md").read_text()
    for name in ("old", "new"):
        for run_dir in tmp_path.glob("*__*n_step3"):
            shutil.copytree(run_dir, tmp_path / "both" / name / run_dir.name)
    lines = summary.over_games(summary.read_runs(tmp_path / "both"))
    assert [line.split(",")[0] for line in lines] == ["dqn_atari (new)", "dqn_atari (old)"]


def test_seeds_without_a_value_keep_their_places() -> None:
    assert summary.over_seeds([1.0, None, 999.7]) == "1, -, 1,000"
    assert summary.over_seeds([None, None]) == ""
    assert summary.over_seeds([1.0] * 5 + [None]) == "1 [1, 1] (5 of 6 seeds)"


def test_what_is_no_run_is_left_out(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """So are a second run of one seed, and curves that a damaged file cuts off."""
    make_run(tmp_path, 1, [1.0], 1.0)
    begun = make_run(tmp_path, 1, [2.0], 2.0, again=None).rename(tmp_path / "0__dqn_atari__1")
    (begun / "result.json").unlink()
    (events,) = make_run(tmp_path, 2, [float(i) for i in range(200)], 1.0).glob("events*")
    content = bytearray(events.read_bytes())
    content[len(content) // 2] ^= 1
    events.write_bytes(content)
    foreign = ["", "[1]", "null", "7", '{"lr": 1}', '{"env_id": "x"}', "{", '{"dataset": "x", "seed": 1}']
    for index, content in enumerate(foreign):
        (tmp_path / f"foreign-{index}").mkdir()
        (tmp_path / f"foreign-{index}" / "args.json").write_text(content)
        (tmp_path / f"foreign-{index}" / "result.json").write_text('{"loss": 1}')
    (tmp_path / "foreign-8" / "args.json").mkdir(parents=True)
    (tmp_path / "foreign-9" / "args.json").parent.mkdir()
    (tmp_path / "foreign-9" / "args.json").write_bytes(b"\xff\xfe")
    for name in ("empty", "logs", "summary"):
        (tmp_path / name).mkdir()
    (row,) = table(tmp_path)
    assert (row["seeds done"], row["return, last quarter"]) == ("2 of 2 begun", "1, -")
    lines = capfd.readouterr().err.splitlines()
    folders = ["empty", *(f"foreign-{index}" for index in range(10)), "0__dqn_atari__1"]
    expected = [f"summary: {tmp_path / name} is left out" for name in folders]
    expected.append(f"summary: the curves of {events.parent} are left out: event files are damaged")
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
    assert not (events.parent / "returns.csv").exists()


def test_damaged_curves_leave_the_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for seed, text in enumerate(["step,return\n10,1\n\n20,2\n", "step,return\n10,1\n20\n"]):
        (make_run(tmp_path, seed, [1.0], 1.0) / "returns.csv").write_text(text)
        assert len(summary.read_returns(next(tmp_path.glob(f"*__{seed}")))) == 0
    assert capsys.readouterr().err.count("are left out") == 2


def test_flags_tell_runs_apart(tmp_path: Path) -> None:
    """By their values, in order of size; a flag that an older script did not have tells nothing."""
    for target in ("$_a_$", "$$"):  # no mathematics
        make_run(tmp_path / "targets", 1, [1.0], 1.0, target=target).rename(tmp_path / "targets" / target)
    summary.summarise(tmp_path / "targets")
    shutil.rmtree(tmp_path / "targets")
    for n_step in (10, 9):
        make_run(tmp_path, 1, [1.0], 1.0, n_step=n_step, gamma=0.9)
        make_run(tmp_path, 2, [1.0], 1.0, n_step=n_step)
        shutil.move(tmp_path / "ALE-Pong-v5__dqn_atari__2n_step", tmp_path / f"{n_step}-2")
        shutil.move(tmp_path / "ALE-Pong-v5__dqn_atari__1n_stepgamma", tmp_path / f"{n_step}-1")
    found = {
        variant: [run["folder"].name for run in runs] for (*_, variant), runs in summary.read_runs(tmp_path).items()
    }
    assert list(found.items()) == [("n_step 9", ["9-1", "9-2"]), ("n_step 10", ["10-1", "10-2"])]


def test_runs_of_the_folders_in_a_folder_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Each setting has a folder of its own, `runs/tau/9` and `runs/tau/10`, that tells it; a word needs no "tau"."""
    folder = tmp_path / "tau"
    none, ten, nine = (make_run(folder / tau, 1, [1.0], 1.0) for tau in ("none", "10", "9"))
    found = [(variant, [run["folder"] for run in runs]) for (*_, variant), runs in summary.read_runs(folder).items()]
    assert found == [("tau 9", [nine]), ("tau 10", [ten]), ("none", [none])]
    assert capsys.readouterr().err == ""
    run_dir = make_run(folder, 1, [1.0], 1.0)
    ((run,),) = summary.read_runs(folder).values()
    assert run["folder"] == run_dir
    assert capsys.readouterr().err == f"summary: {folder} has runs of its own; those of folders in it are left out\n"


def test_algorithms_of_one_environment_are_drawn_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one folder and of several; each in its colour, the hours by the fastest seed's rate from the first update."""
    for script, folder in (("dqn_atari", "dqn"), ("rainbow_atari", "rainbow"), ("rainbow_atari", "again")):
        for seed in (1, 2):
            flags = {"learning_starts": 400} if folder == "dqn" else {}
            run_dir = make_run(tmp_path / folder, seed, [1.0, 2.0, 3.0], 1.0, script=script, **flags)
            shutil.copytree(run_dir, tmp_path / "all" / run_dir.name, dirs_exist_ok=True)
    summary.summarise(tmp_path / "all")
    assert (tmp_path / "all/summary/ALE-Pong-v5.png").stat().st_size > 5_000
    drawn, draw_curves = [], summary.draw_curves

    def draw(axes: object, curves: dict, **options: object) -> None:
        draw_curves(axes, curves, **options)
        drawn.append({line.get_label(): line.get_xdata()[-1] for line in axes.lines if "seed" in line.get_label()})

    monkeypatch.setattr(summary, "draw_curves", draw)
    monkeypatch.setattr(summary, "ProcessPoolExecutor", lambda **_: ThreadPoolExecutor())
    summary.summarise(*(tmp_path / folder for folder in ("dqn", "rainbow", "again")))
    steps, hours = drawn
    assert {path.name for path in (tmp_path / "summary").iterdir()} == {"ALE-Pong-v5.png"}
    labels = ["dqn_atari (2 seeds)", "rainbow_atari (2 seeds)", "rainbow_atari, again (2 seeds)"]
    assert steps == dict.fromkeys(labels, 1_000)
    assert hours == {label: pytest.approx((600 if "dqn" in label else 1_000) / 102 / 3_600) for label in labels}
    for path in tmp_path.glob("dqn/*/result.json"):  # no update, no rate
        path.write_text(json.dumps(json.loads(path.read_text()) | {"steps_per_second": 0.0}))
    summary.summarise(*(tmp_path / folder for folder in ("dqn", "rainbow", "again")))
    assert np.isnan(drawn[-1][labels[0]])
    summary.summarise(*(tmp_path / folder for folder in ("rainbow", "again")))
    assert list(drawn[-1]) == labels[1:]
    make_run(tmp_path / "boxing", 1, [1.0], 1.0, "Boxing")
    with pytest.raises(SystemExit, match="2"):
        summary.summarise(tmp_path / "boxing", tmp_path / "dqn")


def test_an_algorithm_has_one_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colours = {}

    def draw_together(environment: str, algorithms: dict, folder: Path) -> None:
        axes = Figure().subplots()
        summary.draw_curves(axes, algorithms, regression=False)
        colours[environment] = {line.get_label(): line.get_color() for line in axes.lines}

    for game, scripts in {"Boxing": "ab", "Pong": "bc"}.items():
        for script in scripts:
            make_run(tmp_path, 1, [1.0, 2.0], 1.0, game, script)
    monkeypatch.setattr(summary, "draw_together", draw_together)
    monkeypatch.setattr(summary, "ProcessPoolExecutor", lambda **_: ThreadPoolExecutor())
    summary.summarise(tmp_path)
    one, other = colours["ALE/Boxing-v5"], colours["ALE/Pong-v5"]
    assert one["b (1 seed)"] == other["b (1 seed)"]
    assert len({*one.values(), *other.values()}) == 3


def test_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of each run; a run of the same name with other flags or another result is not replaced."""
    run_dir = make_run(tmp_path / "runs", 1, [1.0, 2.0], 3.0)
    monkeypatch.chdir(run_dir)
    monkeypatch.setattr("sys.argv", ["summary", "--publish", str(tmp_path / "results" / "tau"), "."])
    summary.main()
    published = tmp_path / "results" / "tau" / run_dir.name
    assert {path.name for path in published.iterdir()} == {"args.json", "result.json", "returns.csv", "evaluations.csv"}
    assert (published / "evaluations.csv").read_text().split() == ["step,return", "1000,3"]
    (published / "args.json").unlink()  # as an interrupted one leaves it
    summary.main()
    for name in ("result.json", "args.json"):
        (run_dir / name).write_text("{}")
        with pytest.raises(SystemExit, match="2"):
            summary.main()
        assert (published / name).read_text() != "{}"


@pytest.mark.parametrize("arguments", ["", "nowhere", "--publish", "--publish RUN RUN", "--publish a EMPTY", "EMPTY"])
def test_bad_input_of_the_summary(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "EMPTY").mkdir()
    make_run(tmp_path, 1, [1.0], 1.0).rename(tmp_path / "RUN")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["summary", *arguments.split()])
    with pytest.raises(SystemExit, match="2"):
        summary.main()
    assert re.fullmatch("summary: error: .+\n", capsys.readouterr().err)
    assert sorted(tmp_path.rglob("*")) == before


def test_published_runs_are_those_of_their_readme() -> None:
    """Each command of results/README.md and no other left runs there, under the same names, with the flags it gives."""
    text = (ROOT / "results" / "README.md").read_text()
    lines = re.findall(r"^    (.*\./benchmark\.sh .*|for .*; do|done)$", text, re.M)
    dry = re.sub(r"(benchmark\.sh \S+)", r"\1 --dry-run", "\n".join(lines))
    env = os.environ | {"PYTHON": sys.executable}
    options = {"cwd": ROOT, "capture_output": True, "text": True, "check": True, "timeout": 60}
    commands = subprocess.run(["bash", "-c", dry], env=env, **options).stdout
    published = set()
    for command in commands.splitlines():
        given = {}
        for word in shlex.split(command)[2:]:
            if word.startswith("--"):
                values = given[word[2:].replace("-", "_")] = []
            else:
                values.append(word)
        run_dir = ROOT / "results" / Path(*given.pop("runs_dir")).relative_to("runs") / given.pop("run_name")[0]
        published.add(run_dir / "args.json")
        told = json.loads((run_dir / "args.json").read_text())
        for name in given.keys() - {"resume"}:
            flag = name.removeprefix("no_")
            if flag != "layer_norm_eps" or flag in told:  # the first script had PyTorch's and no flag
                asked = [json.loads(value) if re.match(r"[\d.]", value) else value for value in given[name]]
                wanted = told[flag] if isinstance(told[flag], list) else [told[flag]]
                assert (asked or [flag == name]) == wanted, f"{run_dir}: {name}"
        result = json.loads((run_dir / "result.json").read_text())
        assert (result["device"], result["torch_threads"]) == ("cpu", 1)
    assert {*(ROOT / "results").rglob("args.json")} - published == {ROOT / "results" / "units" / "args.json"}
    assert len(published) > 90


def test_the_57_games_have_their_figures() -> None:
    gym.register_envs(ale_py)
    games = [env_id for env_id in gym.registry if re.fullmatch(r"ALE/\w+-v5", env_id)]
    assert sum(summary.human_normalised(env_id, 0.0) is not None for env_id in games) == 57
    assert summary.human_normalised("ALE/UpNDown-v5", 533.4) == 0  # as by a random player


def test_smooth_by_hand() -> None:
    """Means over windows of 2 steps, the last episode where a window is empty, nothing before the first."""
    steps, returns = np.array([2.0, 3.0, 9.0]), np.array([4.0, 8.0, 1.0])
    smoothed = summary.smooth(steps, returns, np.array([1.0, 2.0, 3.0, 4.0, 7.0, 9.0]), 2)
    np.testing.assert_array_equal(smoothed, [np.nan, 4, 6, 8, 8, 1])


def test_long_curves_are_thinned_to_means(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=12_345)
    run_dir = make_run(tmp_path, 1, list(values), 0.0)
    returns = summary.read_returns(run_dir)
    assert len(returns) == 1_764
    assert (run_dir / "returns.csv").stat().st_size < 40_000
    assert returns[-1, 0] == 1_000
    assert returns[0, 1] == pytest.approx(values[:4].mean(), rel=1e-4)  # 12,345 = 4 + 1,763 * 7
    np.testing.assert_allclose(returns[1:, 1], values[4:].reshape(-1, 7).mean(1), rtol=1e-4, atol=1e-5)
