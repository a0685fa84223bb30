"""The JSON of a run: written, read and checked in one place.

    {"schema": 1, "kind": "micro" | "step" | "dropin", "environment": {...}, "settings": {...}, "peers": [names],
     "records": [...]}

A micro record is one variant of one op at one shape; a step record is one peer at one model size; a dropin record is
somebody else's model, as it is or accelerated. All carry the shapes and dtype they were measured at, and either times
or, under "error", why there are none.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from maefast.bench.environment import ROOT

SCHEMA = 1
WRONG = 4  # exit status of a benchmark that found a wrong result, as against one that merely could not run
RESULTS = ROOT / "bench" / "results"
KINDS = ("micro", "step", "dropin")
_ENVIRONMENT = ("date", "kind", "device", "cpu", "cpu_threads", "torch", "triton", "maefast", "commit", "dirty")
_RECORD = {
    "micro": ("op", "variant", "shape", "dtype", "direction"),
    "step": ("peer", "preset", "shape", "dtype"),
    "dropin": ("peer", "family", "preset", "shape", "dtype"),
}
_STEP = ("step_s", "low_s", "high_s", "peak_bytes")
_TIMES = {"micro": ("median_s", "low_s", "high_s"), "step": _STEP, "dropin": _STEP}


def document(kind: str, environment: dict, settings: dict, peers: list[str], records: list[dict]) -> dict:
    result = {
        "schema": SCHEMA,
        "kind": kind,
        "environment": environment,
        "settings": settings,
        "peers": peers,
        "records": records,
    }
    validate(result)
    return result


def validate(doc: Any) -> None:
    """Raise ValueError, naming what is wrong, unless `doc` is a well-formed result."""
    if not isinstance(doc, dict) or doc.get("schema") != SCHEMA:
        raise ValueError(f"not a result of schema {SCHEMA}")
    if doc.get("kind") not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {doc.get('kind')!r}")
    if missing := [key for key in _ENVIRONMENT if key not in doc.get("environment", {})]:
        raise ValueError(f"environment lacks {', '.join(missing)}")
    if not isinstance(doc.get("settings"), dict) or not isinstance(doc.get("peers"), list):
        raise ValueError("settings must be an object and peers a list")
    if not isinstance(doc.get("records"), list) or not doc["records"]:
        raise ValueError("no records")
    for i, record in enumerate(doc["records"]):
        if missing := [key for key in _RECORD[doc["kind"]] if key not in record]:
            raise ValueError(f"record {i} lacks {', '.join(missing)}")
        if "error" in record:
            continue
        for key in _TIMES[doc["kind"]]:
            value = record.get(key)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"record {i}: {key} must be a positive number, got {value!r}")


def write(path: str | Path, doc: dict) -> Path:
    """Validate and `save`."""
    validate(doc)
    return save(path, doc)


def save(path: str | Path, doc: dict) -> Path:
    """Write any record, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(doc, indent=1) + "\n")
    os.replace(part, path)
    return path


def read(path: str | Path) -> dict:
    try:
        doc = json.loads(Path(path).read_text())
        validate(doc)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return doc
