"""What holds for all tests, before anything else is imported."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a job in the background ignores it, and so would its children
