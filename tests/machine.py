"""The machine under the tests, which may be busy with something else."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail when the block takes longer than it may on a machine that has a core for everybody who wants one.

    Where four want each core, everything takes four times as long, and that is nobody's fault here.
    """
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
