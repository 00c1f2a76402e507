"""Every model type that the package serves is tested by all that is tested for one."""

from __future__ import annotations

import pytest

from star_elastic.architectures import ARCHITECTURES, architecture_of
from star_elastic.axes import LAYERS
from tests.architectures import LIVELY, ROWS


def test_every_model_type_has_a_row():
    """Of its own, with a model that writes and one that is trained."""
    served = set(ARCHITECTURES)
    assert {row.model_type for row in ROWS.values()} == served
    assert set(LIVELY) == served  # those of DISTINCT run in tests; the others are there to try
    assert {row.model_type for row in ROWS.values() if row.trained} == served


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_fits_its_table(kind):
    row = ROWS[kind]
    ranked = {name for name, axis in row.axis_map.axes.items() if axis.ranked}
    assert set(row.cut) == ranked and set(row.fields) >= ranked
    for config, cut in ((row.fixed, row.cut), (row.wide, row.wide_cut)):
        table = architecture_of(config).axis_map(config)
        widths = table.complete(cut)
        assert all(widths[name] < table.axes[name].size for name in cut)


def test_every_axis_is_tested_alone_in_every_part_that_it_cuts():
    """By the kind of parent that stands for it."""

    def pairs(row, axes) -> set[tuple[str, str]]:
        found = {
            (segment.axis, spec.part)
            for spec in row.axis_map.tensors.values()
            for dim in spec.dims
            for segment in dim
            if segment.axis in axes
        }
        return found | {(axis, "") for axis in axes if axis in (LAYERS, "top_k")}

    tested = set().union(*(pairs(row, row.alone) for row in ROWS.values()))
    for kind, row in ROWS.items():
        assert set(row.alone) <= set(row.axes), kind
        assert pairs(row, row.axes) <= tested, kind
