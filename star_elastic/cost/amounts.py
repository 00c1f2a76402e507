"""Budgets as a user writes them: a share of the parent's cost, or an amount in real units."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from star_elastic.errors import BudgetError, ConfigError

_PARAMETERS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BYTES = {
    "KB": 10**3, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_FLOPS = {"MFLOP": 10**6, "GFLOP": 10**9, "TFLOP": 10**12}
_MILLISECONDS = {"us": 1e-3, "ms": 1, "s": 1e3}
UNITS: dict[str, Mapping[str, float]] = {
    "active": _PARAMETERS,
    "total": _PARAMETERS,
    "bytes": _BYTES,
    "flops": _FLOPS,
    "ms": _MILLISECONDS,
}
"""For every metric its units, in terms of what the metric counts: parameters, bytes, operations
per token, milliseconds per token."""
_EXAMPLES = {"active": "830M", "total": "12B", "bytes": "1.6GB", "flops": "3GFLOP", "ms": "8.5ms"}
SHARE = ", or a share like 0.5"
_NUMBER_AND_UNIT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True, slots=True)
class Amount:
    """A budget: a fraction of the parent's cost, or a count in the metric's own unit."""

    value: float
    is_fraction: bool

    def fraction_of(self, full: float) -> float:
        """The share of a parent whose cost is `full`; above 1 if the parent costs less."""
        return self.value if self.is_fraction else self.value / full


def parse_budget(budget: float | str, metric: str, where: str = "") -> Amount:
    """A budget as it stands in a config: `0.5` or `"50%"` is a share, `"1.6GB"` an amount.

    Shares lie in (0, 1]. Units (`UNITS`) are read as they are written: `MB` is a million bytes,
    `MiB` 2^20, `M` and `B` a million and a billion parameters, `ms` milliseconds per token. `where`
    is put before the metric in messages, for example `sizes.small.`. Raises BudgetError for an
    unknown metric and ConfigError for anything that is neither a share nor an amount.
    """
    if metric not in UNITS:
        raise BudgetError(f"budget {metric!r} is unknown; use {', '.join(UNITS)}")
    said = f"{where}{metric}={budget!r}"
    advice = f"write a share like 0.5 or an amount like '{_EXAMPLES[metric]}'"
    if isinstance(budget, str) and budget.rstrip().endswith("%"):
        budget = _parse_percent(budget, said, advice)
    if isinstance(budget, str):
        return _parse_text(budget, UNITS[metric], said, advice)
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
        raise ConfigError(f"{said} is not a positive budget; {advice}")
    if budget > 1:
        raise ConfigError(f"{said} is more than the parent; {advice}, with its unit")
    return Amount(float(budget), is_fraction=True)


def parse_bytes(text: str, name: str) -> int:
    """An amount of memory in whole bytes, `"16GB"` or `"24GiB"`; `name` is what the user gave it
    as. Raises ConfigError for anything else, shares included."""
    said, advice = f"{name} {text!r}", "write an amount like '16GB'"
    return max(math.floor(_parse_text(text, _BYTES, said, advice, "").value), 1)


def _parse_percent(text: str, said: str, advice: str) -> float:
    number = text.strip().removesuffix("%")
    try:
        return float(number) / 100
    except ValueError:
        raise ConfigError(f"{said} is not a percentage; {advice}") from None


def show_amount(count: float, metric: str) -> str:
    """A cost in the largest unit that leaves at least one: `134.5M`, `1.2 GB`, `8.51 ms`."""
    units = [(unit, size) for unit, size in UNITS[metric].items() if "i" not in unit]
    unit, size = next((pair for pair in reversed(units) if count >= pair[1]), units[0])
    space = "" if metric in ("active", "total") else " "
    return f"{count / size:.4g}{space}{unit}"


def _parse_text(
    text: str, units: Mapping[str, float], said: str, advice: str, share: str = SHARE
) -> Amount:
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None:
        raise ConfigError(f"{said} is not a number with a unit; {advice}")
    number, unit = float(match[1]), match[2]
    if not 0 < number < math.inf:
        raise ConfigError(f"{said} is not a positive budget; {advice}")
    if unit not in units:
        problem = f"has the unknown unit {unit!r}" if unit else "has no unit"
        raise ConfigError(f"{said} {problem}; use {', '.join(units)}{share}")
    return Amount(number * units[unit], is_fraction=False)
