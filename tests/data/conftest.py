from __future__ import annotations

from tests.train.conftest import MISSING, one_thread  # noqa: F401 (a fixture of all tests here)

if MISSING:  # bare machines, see there
    names = ("records", "tars", "tables", "channels", "http", "video_files")
    collect_ignore = [f"test_{name}.py" for name in names]
