"""
Settings that every test needs, also under a bare `pytest`: nothing is downloaded, and threads that would wait for each
other on models this small are not started.
"""

import gc
import os


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# TRL warns at every construction that rollout functions and environments are experimental
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def pytest_collection_finish() -> None:
    """Accelerate collects garbage around every training: what was imported by now needn't be looked through."""
    gc.collect()
    gc.freeze()
