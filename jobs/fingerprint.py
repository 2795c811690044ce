"""What one error has in common with its like: the same failure on a thousand rows is one failure."""

import hashlib
import re

# What differs from row to row and from run to run: what is quoted, and anything with a digit in it.
PARTICULARS = re.compile(r"""'[^']*'|"[^"]*"|\S*\d\S*""")


def fingerprint(error: str) -> str:
    """Return 32 hex digits that are the same for errors which differ in particulars only; "" for no error."""
    if not error:
        return ""
    return hashlib.sha256(PARTICULARS.sub("*", error.partition("\n")[0][:1000]).encode()).hexdigest()[:32]
