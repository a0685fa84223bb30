"""Options of image data as text."""

from __future__ import annotations

import math
from typing import Any

from maefast.errors import ConfigError


def parse_value_range(value: Any) -> str | tuple[float, float] | None:
    """None for "auto", (low, high) for numbers, and "1%,99%" as it is.

    Raises:
        ConfigError: anything else.
    """
    if value is None or value == "auto":
        return None
    try:
        parts = [str(part).strip() for part in (value.split(",") if isinstance(value, str) else value)]
        low, high = (float(part.removesuffix("%")) for part in parts)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--value-range wants LOW,HIGH or LOW%,HIGH% or auto, not {value!r}") from error
    percent = {part.endswith("%") for part in parts}
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or len(percent) > 1:
        raise ConfigError(f"--value-range needs LOW < HIGH, both numbers or both percentiles, not {value!r}")
    if percent == {True} and not 0 <= low < high <= 100:
        raise ConfigError(f"--value-range: percentiles lie between 0% and 100%, not {value!r}")
    return ",".join(parts) if percent == {True} else (low, high)
