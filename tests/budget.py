"""How many random examples a test tries: few by default, all of them with MAEFAST_ALL_EXAMPLES=1, as CI does."""

from __future__ import annotations

import os

ALL_EXAMPLES = os.environ.get("MAEFAST_ALL_EXAMPLES") == "1"


def examples(few: int, every: int) -> int:
    return every if ALL_EXAMPLES else few
