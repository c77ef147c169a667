"""Tests of benchmark.sh and results/summary.py, with short runs of real scripts and a real Slurm cluster."""

import csv
import importlib
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
from functools import partial
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from common import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "results"))
import summary

FLAGS = ["--optimizer", "adam", "--batch-size", "10", "--epochs", "50", "--checkpoint-frequency", "10"]
SWEEP = ["mlp_regression.py", "--env-ids", "plane", "circle", "--seeds", "1", "2"]
CORES = len(os.sched_getaffinity(0))
NAMES = [f"{dataset}__mlp_regression__{seed}" for dataset in ("plane", "circle") for seed in (1, 2)]


def start(*arguments: object, cwd: Path, threads: int | None = None, **options: object) -> subprocess.Popen:
    """benchmark.sh as a user starts it, in the folder of the scripts, its runs in `cwd`."""
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": str(threads or "")}
    command = [ROOT / "benchmark.sh", *arguments]
    return subprocess.Popen([str(part) for part in command], cwd=cwd, env=env, text=True, **options)


def sweep(*arguments: object, cwd: Path, threads: int | None = None) -> subprocess.CompletedProcess:
    process = start(*arguments, cwd=cwd, threads=threads, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def wait_until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.05)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "model.pt", weights_only=True)["weights"]


def assert_same_weights(ours: Path, theirs: Path) -> None:
    ours, theirs = weights(ours), weights(theirs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with the scripts in it."""
    for name in ("mlp_regression.py", "dqn_atari.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of a sweep that was never interrupted."""
    cwd = tmp_path_factory.mktemp("sweep")
    (cwd / "mlp_regression.py").symlink_to(ROOT / "mlp_regression.py")
    result = sweep(*SWEEP, "--", *FLAGS, cwd=cwd)
    assert (result.returncode, result.stderr) == (0, "")
    assert "4/4 done, 0 running, 0 failed" in result.stdout
    return cwd / "runs"


# --- On one machine ---------------------------------------------------------------------------------------------------


def test_a_sweep_leaves_runs_logs_tables_and_figures(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {*NAMES, "logs", "summary"}
    assert {path.name for path in (whole / "logs").glob("*.log")} == {f"{name}.log" for name in NAMES}
    figures = {f"mlp_regression__{dataset}.png" for dataset in ("plane", "circle")}
    assert {path.name for path in (whole / "summary").iterdir()} == {"table.csv", "table.md", *figures}
    for name in NAMES:
        args = json.loads((whole / name / "args.json").read_text())
        assert (args["dataset"], str(args["seed"]), args["epochs"]) == (name.split("__")[0], name[-1], 50)
        assert json.loads((whole / name / "result.json").read_text())["torch_threads"] == max(1, os.cpu_count() // 4)


def test_other_flags_need_another_folder(whole: Path) -> None:
    result = sweep(*SWEEP, "--", *FLAGS, "--noise", "0.1", cwd=whole.parent)
    assert result.returncode == 2
    assert "plane__mlp_regression__1 was started with other flags" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_finished_sweep_does_nothing(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for name in NAMES for path in (whole / name).iterdir()}
    result = sweep(*SWEEP, "--", *FLAGS, cwd=whole.parent)
    assert (result.returncode, result.stderr) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sweep("--summary", "runs", cwd=whole.parent).stdout in result.stdout


def test_killed_with_all_its_runs_it_goes_on_to_the_same_bits(whole: Path, here: Path) -> None:
    process = start(*SWEEP, "--", *FLAGS, cwd=here, stdout=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: list(here.glob("runs/*/checkpoint.pt")))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(here.glob("runs/*/result.json"))) < 4
    assert sweep(*SWEEP, "--", *FLAGS, cwd=here).returncode == 0
    for name in NAMES:
        assert_same_weights(whole / name, here / "runs" / name)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP], ids=["ctrl-c", "hangup"])
def test_interrupted_it_ends_its_runs_and_goes_on(signum: signal.Signals, whole: Path, here: Path) -> None:
    """By Ctrl-C or a terminal that closes, which signal the runs as well."""
    plane = ["mlp_regression.py", "--env-ids", "plane", "--seeds", "1", "2", "--workers", "1", "--", *FLAGS]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    heard = partial(signal.signal, signum, signal.SIG_DFL)  # also where this test runs under nohup
    process = start(*plane, cwd=here, start_new_session=True, preexec_fn=heard, **pipes)
    wait_until(lambda: list(here.glob("runs/*/checkpoint.pt")))
    os.killpg(process.pid, signum)
    stderr = process.communicate()[1]
    assert process.returncode == 130
    assert "the same command goes on" in stderr
    assert "stopped; go on with" in (here / "runs" / "logs" / f"{NAMES[0]}.log").read_text()
    (unfinished,) = here.glob("runs/*__mlp_regression__*")
    assert not (unfinished / "result.json").exists()
    assert sweep(*plane, cwd=here).returncode == 0
    for name in NAMES[:2]:
        assert_same_weights(whole / name, here / "runs" / name)


def test_one_run_that_fails_stops_no_other(here: Path) -> None:
    arguments = ["mlp_regression.py", "--env-ids", "plane", "no such", "--seeds", "3", "--", "--epochs", "2"]
    result = sweep(*arguments, cwd=here)
    assert result.returncode == 1
    assert "no-such__mlp_regression__3 failed with status 2" in result.stderr
    assert "--dataset no such: choose one of" in result.stderr
    assert "1 of 2 runs failed" in result.stderr
    assert (here / "runs/plane__mlp_regression__3/result.json").exists()
    again = sweep("mlp_regression.py", "--env-ids", "no such", "--seeds", "3", "--", "--epochs", "3", cwd=here)
    assert again.returncode == 1  # what never came to be a run may be tried with other flags


def test_each_gpu_gets_a_worker(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three GPUs by a stand-in for nvidia-smi: three runs at a time, each sees one of them."""
    (here / "nvidia-smi").write_text("#!/bin/sh\nprintf '4\\n6\\n7\\n'\n")
    (here / "nvidia-smi").chmod(0o755)
    (here / "probe.py").write_text(
        "import os, runpy\n"
        'print("GPU", os.environ["CUDA_VISIBLE_DEVICES"], flush=True)\n'
        'runpy.run_path("mlp_regression.py", run_name="__main__")\n'
    )
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    flags = ["--device", "cpu", "--optimizer", "adam", "--epochs", "1"]
    result = sweep("probe.py", "--env-ids", "plane", "--seeds", "1", "2", "3", "4", "--", *flags, cwd=here)
    assert (result.returncode, result.stderr) == (0, "")
    assert "0/4 done, 3 running" in result.stdout
    seen = [(here / f"runs/logs/plane__probe__{seed}.log").read_text().split("\n")[0] for seed in (1, 2, 3, 4)]
    assert seen[:3] == ["GPU 4", "GPU 6", "GPU 7"]
    assert seen[3] in seen[:3]


@pytest.mark.parametrize(("threads", "runs", "workers"), [(1, CORES + 1, CORES), (10_000, 2, 1)])
def test_threads_that_are_given_are_kept(threads: int, runs: int, workers: int, here: Path) -> None:
    """And leave room for so many runs at a time."""
    (here / "probe.py").write_text('import os\nprint(os.environ["OMP_NUM_THREADS"])')
    result = sweep("probe.py", "--env-ids", "x", "--seeds", *range(runs), cwd=here, threads=threads)
    assert f"0/{runs} done, {workers} running" in result.stdout
    assert {path.read_text() for path in (here / "runs" / "logs").glob("*.log")} == {f"{threads}\n"}


def test_dry_run_prints_the_commands_and_does_nothing(here: Path) -> None:
    """Odd characters reach the script as they are; the names of runs hold none."""
    odd = ["ALE/Pong-v5", "a b", "it's", 'say "$HOME"', "ü*"]
    arguments = ["dqn_atari.py", "--env-ids", *odd, "--seeds", "0", "7", "--runs-dir", "my runs", "--dry-run"]
    result = sweep(*arguments, "--", "--loss", "huber", "--wandb-entity", "x y", cwd=here)
    assert (result.returncode, result.stderr) == (0, "")
    assert {path.name for path in here.iterdir()} == {"mlp_regression.py", "dqn_atari.py"}
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    given = [(env_id, seed) for env_id in odd for seed in ("0", "7")]
    for command, (env_id, seed) in zip(commands, given, strict=True):
        name = command[command.index("--run-name") + 1]
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        assert command == [
            *(sys.executable, "dqn_atari.py", "--env-id", env_id, "--seed", seed, "--run-name", name),
            *("--runs-dir", "my runs", "--resume", "--loss", "huber", "--wandb-entity", "x y"),
        ]
    assert len({tuple(command) for command in commands}) == 10
    assert commands[0][commands[0].index("--run-name") + 1] == "ALE-Pong-v5__dqn_atari__0"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--env-ids sine --seeds 1", "give a script"),
        ("no.py --env-ids sine --seeds 1", "no.py: no such script"),
        ("mlp_regression.py --seeds 1", "--env-ids: give one environment or more"),
        ("mlp_regression.py --env-ids --seeds 1", "--env-ids: give one environment or more"),
        ("mlp_regression.py --env-ids sine", "--seeds: give one seed or more"),
        ("mlp_regression.py --env-ids sine --seeds -1", "--seeds -1"),
        ("mlp_regression.py --env-ids sine --seeds one", "--seeds one: a seed is a whole number"),
        ("mlp_regression.py --env-ids sine --seeds 1 1", "a second run that would be called sine__mlp_regression__1"),
        ("mlp_regression.py --env-ids a/b a-b --seeds 1", "a second run that would be called a-b__mlp_regression__1"),
        ("mlp_regression.py --env-ids sine --seeds 1 --workers 0", "--workers 0: must be a number greater than 0"),
        ("mlp_regression.py --env-ids sine --seeds 1 --workers", "--workers: give a value"),
        ("mlp_regression.py --env-ids sine --seeds 1 --epochs 3", "--epochs: no such option"),
        ("mlp_regression.py --env-ids sine --seeds 1 --runs-dir file", "file is no folder"),
        ("mlp_regression.py --env-ids sine --seeds 1 --runs-dir file/sub", "file is no folder"),
        ("mlp_regression.py --env-ids sine --seeds 1 -- --seed=2", "the sweep sets this flag"),
        ("mlp_regression.py --env-ids sine --seeds 1 --slurm --gpus-per-task x", "--gpus-per-task x"),
        ("mlp_regression.py --env-ids sine --seeds 1 -- --run_name x", "the sweep sets this flag"),
        ("mlp_regression.py --env-ids sine --seeds 1 -- --units 1 2", "a sweep only trains"),
        ("mlp_regression.py --env-ids sine --seeds 01", "--seeds 01"),
        ("mlp_regression.py --env-ids sine --seeds 1 --partition gpu", "--partition: is for --slurm"),
        ("mlp_regression.py --env-ids sine --seeds 1 --runs-dir --dry-run", "--runs-dir: give a value"),
        ("--summary", "no such folder"),
        ("--summary nowhere extra", "no such folder"),
        ("--summary nowhere", "--summary nowhere: no such folder"),
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
    munged = None
    if subprocess.run(["pgrep", "munged"], capture_output=True).returncode != 0:
        command = ["munged", "--foreground"]
        munged = subprocess.Popen(command, user="munge", group="munge", extra_groups=[], stderr=subprocess.DEVNULL)
        wait_until(Path("/run/munge/munge.socket.2").exists)
    daemons = [subprocess.Popen([name, "-D"], stderr=subprocess.DEVNULL) for name in ("slurmctld", "slurmd")]
    wait_until(lambda: "idle" in slurm_says("sinfo", "--noheader"))
    yield
    for daemon in [*reversed(daemons), *([munged] if munged else [])]:
        daemon.terminate()
        daemon.wait()


def slurm_says(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


@pytest.mark.usefixtures("slurm")
def test_slurm_runs_the_array_and_a_requeued_task_resumes(whole: Path, here: Path) -> None:
    flags = ["--slurm", "--partition", "main", "--gpus-per-task", "1", "--time", "1:00:00", "--", *FLAGS]
    result = sweep("mlp_regression.py", "--env-ids", "plane", "circle", "--seeds", "1", *flags, cwd=here)
    assert (result.returncode, result.stderr) == (0, "")
    job = result.stdout.split("Submitted batch job ")[1].split()[0]
    runs = [here / "runs" / f"{dataset}__mlp_regression__1" for dataset in ("plane", "circle")]
    wait_until((runs[0] / "checkpoint.pt").exists)
    subprocess.run(["scontrol", "requeue", f"{job}_0"], check=True)
    wait_until(lambda: "PENDING" in slurm_says("scontrol", "show", "job", f"{job}_0"))
    assert not (runs[0] / "result.json").exists()
    assert "0 of 1" in sweep("--summary", "runs", cwd=here).stdout  # works before the sweep has ended
    subprocess.run(["scontrol", "update", f"JobId={job}_0", "StartTime=now"], check=True)  # it would wait two minutes
    wait_until(lambda: all((run_dir / "result.json").exists() for run_dir in runs))
    wait_until(lambda: "COMPLETED" in slurm_says("scontrol", "show", "job", f"{job}_0"))
    assert "Restarts=1" in slurm_says("scontrol", "show", "job", f"{job}_0")
    assert {path.name for path in (here / "runs" / "logs").glob("slurm*")} == {f"slurm-{job}_{i}.log" for i in (0, 1)}
    for run_dir in runs:
        assert_same_weights(whole / run_dir.name, run_dir)


# --- The summary ------------------------------------------------------------------------------------------------------


def make_run(folder: Path, seed: int, returns: list[float], evaluation: float, **flags: object) -> Path:
    """A run as the scripts leave it."""
    run_dir = folder / f"ALE-Pong-v5__dqn_atari__{seed}{''.join(flags)}"
    args = {"env_id": "ALE/Pong-v5", "seed": seed, "run_name": run_dir.name, "total_timesteps": 1_000} | flags
    with SummaryWriter(run_dir) as writer:
        for step, value in zip(np.linspace(0, 1_000, len(returns) + 1)[1:], returns, strict=True):
            writer.add_scalar("charts/episodic_return", value, int(step))
            writer.add_scalar("charts/SPS", 100, int(step))
    (run_dir / "args.json").write_text(json.dumps(args))
    result = {"script": "dqn_atari", "env_id": "ALE/Pong-v5", "seed": seed, "total_timesteps": 1_000}
    result |= {"train_return_mean": float(np.mean(returns)), "eval_return_mean": evaluation, "wall_seconds": 1_800.0}
    (run_dir / "result.json").write_text(json.dumps(result | {"steps_per_second": 100.0 + seed}))
    return run_dir


def test_the_table_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Means, standard deviations, interquartile mean and score relative to human (Pong: random -20.7, human 14.6)."""
    evaluations = [-21.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 21.0]
    for seed, evaluation in enumerate(evaluations):
        make_run(tmp_path, seed, [-20.0, -10.0, 0.0, 10.0 + seed], evaluation)
    (make_run(tmp_path, 99, [0.0], 0.0) / "result.json").unlink()
    make_run(tmp_path, 1, [-20.0], -20.0, n_step=10)
    make_run(tmp_path, 2, [-20.0], -20.0, n_step=9)
    summary.summarise(tmp_path)
    with open(tmp_path / "summary" / "table.csv") as file:
        *others, row = csv.DictReader(file)
    assert row["seeds done"] == "8 of 9"
    assert row["return, last quarter"] == f"13.5 ± {np.std(range(8), ddof=1):.2g}"
    assert row["evaluation"] == f"6 ± {np.std(evaluations, ddof=1):.2g}"
    assert row["evaluation, IQM"].split()[0] == "8"  # the mean of 5, 7, 9 and 11
    low, high = (float(bound.strip("[],")) for bound in row["evaluation, IQM"].split()[1:])
    assert -5 < low < 8 < high < 14
    relative = 100 * (np.array(evaluations) + 20.7) / (14.6 + 20.7)
    assert row["human-normalised, %"] == f"{relative.mean():.3g} ± {relative.std(ddof=1):.2g}"
    assert (row["steps/s"], row["hours"]) == ("104", "4.00")
    assert [other["environment"] for other in others] == ["ALE/Pong-v5 (n_step 9)", "ALE/Pong-v5 (n_step 10)"]
    assert (tmp_path / "summary" / "table.md").read_text().splitlines()[1].startswith("|---|")
    assert "8 of 9" in capsys.readouterr().out
    assert (tmp_path / "summary" / "dqn_atari__ALE-Pong-v5.png").stat().st_size > 5_000


@pytest.mark.parametrize("into", [[], ["--into", "brittle"]])
def test_publish(into: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of each run, tables and curves; a run of the same name with other flags is not replaced."""
    run_dir = make_run(tmp_path / "runs", 1, [1.0, 2.0], 3.0)
    with SummaryWriter(run_dir) as writer:
        writer.add_scalar("eval/episodic_return", 7.0, 600)
    monkeypatch.setattr(summary, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(summary, "human_normalised", lambda environment, score: None)
    monkeypatch.setattr("sys.argv", ["summary", "--publish", *into, str(run_dir)])
    summary.main()
    published = tmp_path / "results" / Path(*into[1:]) / run_dir.name
    assert {path.name for path in published.iterdir()} == {"args.json", "result.json", "returns.csv", "evaluations.csv"}
    assert (published / "evaluations.csv").read_text().split() == ["step,return", "600,7"]
    assert (published.parent / "summary" / "table.csv").exists()
    (run_dir / "args.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        summary.main()
    assert (published / "args.json").read_text() != "{}"


def test_runs_of_the_folders_in_a_folder_are_compared(tmp_path: Path) -> None:
    """Each setting has a folder of its own, `runs/n-step/9` and `runs/n-step/10`, whose name it bears."""

    def read(folder: Path) -> list[tuple[str, list[Path]]]:
        groups = summary.read_runs(folder).items()
        return [(variant, [run["folder"] for run in group]) for (_, _, variant), group in groups]

    folder = tmp_path / "n-step"
    ten, nine = (make_run(folder / n_step, 1, [1.0], 1.0) for n_step in ("10", "9"))
    other = make_run(folder / "9", 2, [1.0], 1.0, gamma=0.9)
    assert read(folder) == [("n-step 9, gamma 0.9", [other]), ("n-step 9, gamma None", [nine]), ("n-step 10", [ten])]
    run_dir = make_run(folder, 1, [1.0], 1.0)
    assert read(folder) == [("", [run_dir])]


def test_published_runs_are_those_of_readme() -> None:
    """Each sweep that README gives with its results, and no other: under the same names, with the same flags."""
    text = (ROOT / "README.md").read_text().split("## Sweeps")[0]
    lines = re.findall(r"^    (.*\./benchmark\.sh .*|for .*; do|done)$", text, re.M)
    dry = re.sub(r"(benchmark\.sh \S+)", r"\1 --dry-run", "\n".join(lines))
    commands = subprocess.run(["bash", "-c", dry], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    published = set()
    for command in commands.splitlines():
        _, script, *flags = shlex.split(command)
        module = importlib.import_module(script.removesuffix(".py"))
        args = tyro.cli(module.Args, args=flags)
        if script == "mlp_regression.py":
            module.fill_defaults(args)
        run_dir = ROOT / "results" / args.runs_dir.relative_to("runs") / args.run_name
        published.add(run_dir / "args.json")
        asked = json.loads(json.dumps(module.plain(args)))
        told = json.loads((run_dir / "args.json").read_text())
        for name in asked.keys() - {"run_name", "runs_dir", "checkpoint_frequency"}:
            assert told[name] == asked[name] or (name, asked[name]) == ("precision", "auto"), f"{run_dir.name}: {name}"
        result = json.loads((run_dir / "result.json").read_text())
        assert (result["device"], result["torch_threads"]) == ("cpu", 1)
    assert {*(ROOT / "results").rglob("args.json")} - published == {ROOT / "results" / "units" / "args.json"}
    assert len(published) > 90


@pytest.mark.parametrize("into", ["/tmp", "../tau", "tau/..", "."])
def test_what_is_published_stays_in_results(
    into: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run_dir = make_run(tmp_path, 1, [1.0], 1.0)
    monkeypatch.setattr("sys.argv", ["summary", "--publish", "--into", into, str(run_dir)])
    with pytest.raises(SystemExit, match="2"):
        summary.main()
    assert capsys.readouterr().err.startswith(f"summary: error: --into {into}: give the name of a folder")


def test_a_missing_package_is_named() -> None:
    command = [sys.executable, "-S", ROOT / "results" / "summary.py"]  # sees the standard library alone
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "summary: error: numpy is not installed; pip install -r requirements.txt\n"


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


def test_trials_of_several_trainings_are_left_out(tmp_path: Path) -> None:
    """`--units` leaves the folder of another kind of result, README's command in the folder of the runs."""
    run_dir = make_run(tmp_path, 1, [1.0], 1.0)
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "args.json").write_text('{"dataset": "sine", "units": [1, 2]}')
    (tmp_path / "units" / "result.json").write_text('{"units": [1, 2], "largest_error": [1.0, 0.5]}')
    ((run,),) = summary.read_runs(tmp_path).values()
    assert run["folder"] == run_dir


def test_returns_of_a_resumed_run_are_those_that_tensorboard_shows(tmp_path: Path) -> None:
    """What was logged twice, because a kill came after the checkpoint, stands once; a record cut short is left out."""
    run_dir = make_run(tmp_path, 1, [1.0, 2.0, 3.0, 4.0], 0.0)
    (first,) = run_dir.glob("events*")
    time.sleep(1.1)  # the file's name has the second in which it was begun
    with SummaryWriter(run_dir, purge_step=501) as writer:
        writer.add_scalar("charts/episodic_return", 3.5, 750)
        writer.add_scalar("charts/episodic_return", 9.0, 990)
    events = EventAccumulator(str(run_dir))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("charts/episodic_return")]
    assert shown == [(250, 1.0), (500, 2.0), (750, 3.5), (990, 9.0)]
    first.write_bytes(first.read_bytes()[:-3])
    np.testing.assert_array_equal(summary.read_curve(run_dir), shown)
    assert (run_dir / "returns.csv").read_text().split() == ["step,return", "250,1", "500,2", "750,3.5", "990,9"]


def test_long_curves_are_thinned_to_means(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    run_dir = make_run(tmp_path, 1, list(rng.normal(size=12_345)), 0.0)
    returns = summary.read_curve(run_dir)
    assert len(returns) == 5_000
    assert (run_dir / "returns.csv").stat().st_size < 100_000
    assert returns[-1, 0] == 1_000
    points = np.array(summary.read_events(run_dir, ("charts/episodic_return",)))
    np.testing.assert_allclose(returns[0], [points[2, 0], points[:3, 1].mean()], rtol=1e-5)
