"""What a change of a schema would take away. Read from its words alone: nothing is asked of a server."""

import re
from collections.abc import Iterator

# One pass over the text, whatever is in it: what begins and does not end goes on to the end of the text.
TOKENS = re.compile(r"""(?P<comment>--[^\r\n]*|/\*.*?(?:\*/|\Z))|'[^']*'?|"[^"]*"?|\w+""", re.DOTALL)
IN_DOUBT = re.compile(r"\\|\$\w*\$")
"""Whether a backslash ends a text says a setting of the server, and what is a body of code says its language."""


def losses(sql: str) -> list[str]:
    """Return what in a change destroys something, in its order and each kind once: DROP TABLE, TRUNCATE, DELETE FROM.

    A question before a mistake, not a wall before an enemy: it asks rather once too often, and does not see what a
    function of the database does. Where it is in doubt what is a text, it takes texts for statements as well.
    """
    found = list(_losses(sql))
    if IN_DOUBT.search(sql):
        found += _losses(re.sub("['\"$]", "\n", sql))
    return list(dict.fromkeys(found))


def _losses(sql: str) -> Iterator[str]:
    words = [found[0].upper() for found in TOKENS.finditer(sql) if not found["comment"]]
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word == "DROP":
            yield f"DROP {following}".strip()
        elif word == "TRUNCATE":
            yield "TRUNCATE"
        elif word == "DELETE" and following == "FROM":
            # And not ON DELETE CASCADE.
            yield "DELETE FROM"
