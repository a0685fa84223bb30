"""Options of the command line that are written as text: sizes, heads, numbers, arguments of a model, files to write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from maefast.errors import ConfigError


def parse_model_args(pairs: list[str]) -> dict[str, Any]:
    """Read ["depth=4", "positions=learned"] as {"depth": 4, "positions": "learned"}: JSON where it is, else text."""
    args = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name.isidentifier():
            raise ConfigError(f"--model-arg wants NAME=VALUE, not {pair!r}")
        try:
            args[name] = json.loads(text)
        except ValueError:
            args[name] = {"True": True, "False": False, "None": None}.get(text, text)
    return args


def parse_size(text: str) -> int | list[int]:
    """Read "64" as 64 and "64x128" as [64, 128] (height, width)."""
    numbers = text.lower().split("x")
    if not (1 <= len(numbers) <= 2 and all(number.strip().isdigit() for number in numbers)):
        raise ConfigError(f"--img-size wants N or HEIGHTxWIDTH, not {text!r}")
    sizes = [int(number) for number in numbers]
    return sizes[0] if len(sizes) == 1 else sizes


def parse_numbers(option: str, given: Any) -> list[float]:
    """Numbers, or text such as "0.5,1e3". ConfigError: something else."""
    try:
        parts = given.split(",") if isinstance(given, str) else [given] if isinstance(given, (int, float)) else given
        numbers = [float(part) for part in parts]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{option} wants numbers, such as 0.5 or 0.5,0.4,0.3, not {given!r}") from error
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"{option} wants finite numbers, not {given!r}")
    return numbers


def parse_heads(text: str) -> list[int]:
    """Read "6" as [6] and "6,8" as [6, 8] (encoder, decoder)."""
    numbers = [number.strip() for number in text.split(",")]
    if len(numbers) > 2 or not all(number.isdigit() and int(number) for number in numbers):
        raise ConfigError(f"--heads wants ENCODER or ENCODER,DECODER, not {text!r}")
    return [int(number) for number in numbers]


def must_be_file(option: str, path: Path | None) -> None:
    """Before the work whose results are to be written there."""
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no such folder")
    if path is not None and path.is_dir():
        raise ConfigError(f"{option} {path} is a folder; give the name of a file")
