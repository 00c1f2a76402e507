"""What every test can use, and what is done around all of them, in a process that runs tests."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoints import copied, plain  # noqa: F401
from tests.planted_run import (  # noqa: F401
    planted,
    planted_hybrid,
    planted_llama,
    planted_run,
    unlearned_run,
)
from tests.processes import stop_server
from tests.tiny_family import family, tiny_checkpoint  # noqa: F401
from tests.tiny_run import blocks, deep_folder, run_folder, short, trained  # noqa: F401
from tests.watched import scores, watch  # noqa: F401

torch.set_num_threads(1)


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
