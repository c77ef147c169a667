"""What holds for all tests, before anything else is imported."""

import os
import signal
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # starter.py shows the GPU to a run that asks for it
# A job in the background ignores Ctrl-C, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """A training in the tests' own process handles signals; afterwards pytest does again."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Puts an environment in the place of a script's Atari games, in training and evaluation."""

    def put(script: ModuleType, env: Callable) -> None:
        monkeypatch.setattr(script, "make_atari", lambda args, rng, video_dir=None, **limits: env(rng))

    return put
