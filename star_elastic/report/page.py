"""Pieces of the page of an evaluation: names, lists, tables as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from star_elastic.report.findings import Data
from star_elastic.report.tables import Table


def name_of(result: Data) -> str:
    """A family by its directory; runs keep it in `run/elastic`."""
    parts = [part for part in Path(result["elastic"]).parts if part not in ("elastic", "run", "/")]
    return parts[-1] if parts else result["elastic"]


def largest_of(result: Data) -> str:
    """The name of the largest size."""
    return next(iter(result["sizes"]))


def alone_labels(result: Data) -> list[str]:
    """Labels of the largest size alone."""
    own = [largest_of(result)]
    return [plan["label"] for plan in result["plans"] if plan["sizes"] == own]


def capital(text: str) -> str:
    """With its first letter in upper case."""
    return text[:1].upper() + text[1:]


def details(table: Table, *, is_open: bool = False) -> str:
    """A table under its title, to open and close."""
    opened = " open" if is_open else ""
    return f"<details{opened}><summary>{escape(table.title)}</summary>{table_html(table)}</details>"


def table_html(table: Table) -> str:
    """A table; cells carry the names of their columns, for pages too narrow for columns."""
    text = " class='text'"
    styles = [text] * table.num_text + [""] * (len(table.columns) - table.num_text)
    labels = [f' data-label="{escape(column)}"' for column in table.columns]
    head = "".join(
        f"<th{style}>{escape(column)}</th>"
        for column, style in zip(table.columns, styles, strict=True)
    )
    tones: Sequence[str] = table.tones or [""] * len(table.rows)
    rows = []
    for row, tone in zip(table.rows, tones, strict=True):
        own = [*styles[:-1], f" class='{tone}'"] if tone else styles
        cells = (
            f"<td{style}{label}>{escape(cell)}</td>"
            for cell, style, label in zip(row, own, labels, strict=True)
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<div class='table'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
