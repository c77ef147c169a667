"""Starts scripts for the tests: a process that has imported what they all import, and forks for each of them.

A line of JSON on standard input is a script to run, the line that answers on standard output its exit status.
"""

import errno
import gc
import json
import os
import runpy
import signal
import socket
import sys

import gymnasium  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import pandas  # noqa: F401
import torch.utils.tensorboard
import tqdm  # noqa: F401
import tyro  # noqa: F401

torch.optim.Adam([torch.zeros(1)])  # the first optimizer imports as much again
gc.freeze()  # or every process looks for garbage in all of that when it ends: a second

for start, line in enumerate(sys.stdin):  # noqa: B007
    if (child := os.fork()) == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    raise SystemExit(0)

task = json.loads(line)
signal.alarm(task["deadline"])  # it ends a process that hangs
socket.gethostname = lambda: f"~{start:05}"  # TensorBoard reads files of one second by host: in the order of starts
os.chdir(task["cwd"])
for number, path in enumerate([os.devnull, *task["output"]]):
    os.dup2(os.open(path, os.O_RDWR), number)
sys.argv, sys.path[0] = task["command"], os.path.dirname(task["command"][0])
if "cuda" in sys.argv:
    del os.environ["CUDA_VISIBLE_DEVICES"]

if task["interruption"]:
    what, moment, function, call = task["interruption"]
    original, calls = getattr(os, function), 0

    def strike() -> None:
        if what == "ENOSPC":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for name in what.split("+"):
            os.kill(os.getpid(), getattr(signal, name))

    def interrupted(*args: object, **options: object) -> object:
        global calls
        calls += 1
        now = call in (calls, os.path.basename(str(args[-1])))
        if now and moment == "before":
            strike()
        result = original(*args, **options)
        if now and moment == "after":
            strike()
        return result

    setattr(os, function, interrupted)

runpy.run_path(sys.argv[0], run_name="__main__")
