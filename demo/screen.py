"""What a person sees: one line that keeps changing and, above it, what happened."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

PLAIN_SECONDS = 5.0
CLEAR_LINE = "\r\x1b[2K"


class Screen:
    """On a terminal the progress line is updated in place; elsewhere it is printed anew every few seconds."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out
        self._is_terminal = out.isatty()
        self._line = ""
        self._printed_at = -PLAIN_SECONDS

    def say(self, text: str) -> None:
        """Print something that stays."""
        self._write(f"{CLEAR_LINE}{text}\n{self._line}" if self._is_terminal else f"{text}\n")

    def progress(self, line: str) -> None:
        """Replace the progress line."""
        self._line = line[: shutil.get_terminal_size().columns - 1] if self._is_terminal else line
        if self._is_terminal:
            self._write(f"{CLEAR_LINE}{self._line}")
        elif time.monotonic() > self._printed_at + PLAIN_SECONDS:
            self._printed_at = time.monotonic()
            self._write(f"{line}\n")

    def end_progress(self) -> None:
        """Leave the progress line where it is."""
        if self._line:
            self._write("\n" if self._is_terminal else f"{self._line}\n")
        self._line = ""

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows under their heads: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(head), "  ".join("─" * width for width in widths), *map(line, rows)])
