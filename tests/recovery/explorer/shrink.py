"""The shortest trace that still fails: delta debugging over the list of decisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def shortest(items: list[T], still_fails: Callable[[list[T]], bool], most_tries: int = 400) -> list[T]:
    """Leave out what can be left out, in big parts first. Of what remains no single item can be left out.

    `still_fails` is asked about `most_tries` parts at most; with no more tries the shortest so far is returned.
    """
    size = max(len(items) // 2, 1)
    tries = 0
    while items:
        left_out_any = False
        start = 0
        while start < len(items):
            part = items[:start] + items[start + size :]
            if tries >= most_tries:
                return items
            tries += 1
            if still_fails(part):
                items, left_out_any = part, True
            else:
                start += size
        if size > 1:
            size = max(size // 2, 1)
        elif not left_out_any:
            break
    return items
