"""A figure that was measured, the bar that it has to clear, and the table of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measured number. Without a bar it is there for information."""

    what: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def is_met(self) -> bool:
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )

    def __str__(self) -> str:
        return f"{self.what}: {amount(self.value, self.unit)}" + (f" ({_bar(self)})" if self.bar else "")

    @property
    def bar(self) -> str:
        if self.at_most is not None:
            return f"at most {amount(self.at_most, self.unit)}"
        if self.at_least is not None:
            return f"at least {amount(self.at_least, self.unit)}"
        return ""


def amount(value: float, unit: str) -> str:
    """Write a number with about three digits that matter, and its unit."""
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {unit}".strip()


def table(figures: Iterable[Figure]) -> str:
    """Write figures as a table in Markdown. A bar that was not cleared says so."""
    rows = [("measured", "figure", "bar")]
    rows += ((each.what, amount(each.value, each.unit), _bar(each)) for each in figures)
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"| {what:<{widths[0]}} | {figure:>{widths[1]}} | {bar:<{widths[2]}} |" for what, figure, bar in rows]
    rule = f"|{'-' * (widths[0] + 2)}|{'-' * (widths[1] + 1)}:|{'-' * (widths[2] + 2)}|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _bar(figure: Figure) -> str:
    return figure.bar if figure.is_met else f"**missed**: {figure.bar}"
