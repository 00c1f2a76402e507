"""No hook is left behind: over many steps on two ranks their number stays what it was."""

from __future__ import annotations

import torch

from tests.hooks import count_hooks, hooks_after_steps
from tests.processes import on_ranks
from tests.tiny_run import SHORT, config_in

ENGINES = ("autocast = true", "autocast = false\nrecompute = true")


def test_twelve_steps_leave_no_hook(run_folder, tmp_path):
    """The router's steps and those with fixed sizes, of which the largest has the whole head:
    FSDP's own parameter, if a forward returned it, would gather a hook each time."""
    files = []
    for number, engine in enumerate(ENGINES):
        name = f"hooks-{number}"
        config_in(run_folder, name, **SHORT, **{"autocast = false": engine})
        files.append(run_folder / f"{name}.toml")
    for counts in on_ranks(2, hooks_after_steps, files, tmp_path):
        assert counts == [[0] * 12] * len(ENGINES)


def test_hooks_are_counted_wherever_they_hang():
    before = count_hooks()
    leaf = torch.ones(2, requires_grad=True)
    inner = leaf * 2
    leaf.register_hook(lambda gradient: gradient)
    inner.register_hook(lambda gradient: gradient)
    assert count_hooks() == before + 2
