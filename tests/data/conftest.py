from __future__ import annotations

from tests.train.conftest import MISSING, one_thread  # noqa: F401 (a fixture of all tests here)

if MISSING:  # bare machines, see there
    collect_ignore = ["test_records.py", "test_tars.py", "test_tables.py", "test_channels.py"]
