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
from hypothesis import HealthCheck, Phase, settings

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


def pytest_configure(config: pytest.Config) -> None:
    """Loads what tests share, unless this process only hands them to others: imports are slow."""
    hands_on = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_on:
        config.pluginmanager.import_plugin("tests.fixtures")
