"""Set-up of the whole suite: offline, one thread per process, reproducible random examples."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)

# Examples are tiny by construction: a failing one is reported as it is, without shrinking.
settings.register_profile(
    "suite",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=10,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# `pytest tests/laws --hypothesis-profile=explore` looks elsewhere on every run.
settings.register_profile(
    "explore",
    settings.get_profile("suite"),
    derandomize=False,
    max_examples=100,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
settings.load_profile("suite")


def pytest_sessionfinish() -> None:
    """Waits for the processes that tests have started."""
    stop_server()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first; GPU tests are skipped where there is no GPU."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


from tests.checkpoints import copied, plain  # noqa: E402, F401
from tests.planted_run import (  # noqa: E402, F401
    planted,
    planted_hybrid,
    planted_llama,
    planted_run,
    unlearned_run,
)
from tests.processes import stop_server  # noqa: E402
from tests.tiny_family import family, tiny_checkpoint  # noqa: E402, F401
from tests.tiny_run import blocks, deep_folder, run_folder, short, trained  # noqa: E402, F401
from tests.watched import scores, watch  # noqa: E402, F401
