"""The project around the app: settings, URLs, and the servers and processes that it runs on a developer's machine."""

import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent

HOME = Path(os.environ.get("SELFHEAL_HOME", BASE_DIR / "var")).resolve()
"""Everything that a run leaves on disk: the SQLite file, the databases that users create, logs."""
