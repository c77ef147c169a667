"""Tests run side by side, so that one thread each is faster: set before PyTorch is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
