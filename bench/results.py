"""The JSON of a run: written, read and checked in one place.

    {"schema": 1, "kind": one of KINDS, "environment": {...}, "settings": {...}, "peers": [names], "records": [...]}

A micro record is one variant of one op at one shape; a step record is one peer at one model size; a dropin record is
somebody else's model, as it is or accelerated; a recipes record is one recipe, both sides; a scaling record is one
peer at one batch and share of visible tokens. All carry the shapes and dtype they were measured at, and either times
or, under "error", why there are none. Under "samples_s" stand the times of the single rounds, which `compare` tests;
under "code", in the environment, digests of what was measured, by which `report` tells whether it has changed since.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maefast.bench import freshness
from maefast.bench.environment import ROOT, slug

SCHEMA = 1
WRONG = 4  # exit status of a benchmark that found a wrong result, as against one that merely could not run
RESULTS = ROOT / "bench" / "results"  # those of a checkout, which docs/results.md shows
_ENVIRONMENT = ("date", "kind", "device", "cpu", "cpu_threads", "torch", "triton", "maefast", "commit", "dirty")
_STEP = ("step_s", "low_s", "high_s", "peak_bytes")
# kind -> (what every record has, the times of one that was timed).
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "micro": (("op", "variant", "shape", "dtype", "direction"), ("median_s", "low_s", "high_s")),
    "step": (("peer", "preset", "shape", "dtype"), _STEP),
    "dropin": (("peer", "family", "preset", "shape", "dtype"), _STEP),
    "recipes": (("recipe", "size", "batch", "dtype"), ("ratio", "memory_ratio")),
    "scaling": (("peer", "batch", "visible", "tokens", "dtype"), ("median_s", "low_s", "high_s")),
    "volumes": (("peer", "batch", "side", "mask_ratio", "dtype"), ("best_s",)),
    "block": (("peer", "width", "batch", "tokens", "depth", "dtype"), ("best_s", "time_to_eager")),
    "toys": (("model", "dtype"), ("ratio",)),
    "data": (("side", "workers"), ("images_per_s",)),
}


def document(kind: str, environment: dict, settings: dict, peers: list[str], records: list[dict]) -> dict:
    """A checked result; `environment` is that of `bench.environment.describe`.

    It gets, under "code", the digests of the sources that these records depend on (`freshness`): of the checkout as it
    is, unless the environment has digests of when it was measured.
    """
    result = {
        "schema": SCHEMA,
        "kind": kind,
        "environment": environment,
        "settings": settings,
        "peers": peers,
        "records": records,
    }
    validate(result)
    targets = {freshness.target(kind, record) for record in records}
    code = environment.get("code")
    if code is None:
        code = freshness.digests(targets, environment["kind"])
    result["environment"] = {**environment, "code": {name: code[name] for name in sorted(targets) if name in code}}
    return result


def validate(doc: Any) -> None:
    """Raise ValueError, naming what is wrong, unless `doc` is a well-formed result."""
    if not isinstance(doc, dict) or doc.get("schema") != SCHEMA:
        raise ValueError(f"not a result of schema {SCHEMA}")
    if doc.get("kind") not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {doc.get('kind')!r}")
    needed, times = KINDS[doc["kind"]]
    if missing := [key for key in _ENVIRONMENT if key not in doc.get("environment", {})]:
        raise ValueError(f"environment lacks {', '.join(missing)}")
    if not isinstance(doc.get("settings"), dict) or not isinstance(doc.get("peers"), list):
        raise ValueError("settings must be an object and peers a list")
    if not isinstance(doc.get("records"), list) or not doc["records"]:
        raise ValueError("no records")
    for i, record in enumerate(doc["records"]):
        if missing := [key for key in needed if key not in record]:
            raise ValueError(f"record {i} lacks {', '.join(missing)}")
        if "error" in record:
            continue
        for key in times:
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where a run is to be kept: the same options for every benchmark."""
    parser.add_argument("--json", type=Path, help="the file to write, instead of one in --results")
    parser.add_argument("--results", type=Path, help="folder of results: the file is DEVICE/BENCHMARK.json in it")


def keep(args: argparse.Namespace, doc: dict, label: str, final: bool = True) -> None:
    """Write a run where it was asked for, if it was, and say where. label: tells it from other runs of a device.
    final: False for a run that goes on, of which nothing is said."""
    path = args.json
    if path is None and args.results is not None:
        path = args.results / slug(doc["environment"]["device"]) / f"{label}.json"
    if path is not None:
        path = write(path, doc)
        if final:
            print(f"results: {path}")


def read_all(folder: str | Path) -> list[dict]:
    """All results below a folder, each with its "file" relative to it; other JSON (evidence, tables) is left alone."""
    folder = Path(folder)
    found = []
    for path in sorted(folder.rglob("*.json")):
        doc = _read(path, lambda doc: isinstance(doc, dict) and doc.get("kind") in KINDS)
        if doc is not None:
            found.append({**doc, "file": path.relative_to(folder).as_posix()})
    return found


def read(path: str | Path) -> dict:
    return _read(path, lambda doc: True)


def _read(path: str | Path, wanted: Callable[[Any], bool]) -> dict | None:
    """A checked result, or None where it is not wanted. ValueError: what is wrong, and with which file."""
    try:
        doc = json.loads(Path(path).read_text())
        if not wanted(doc):
            return None
        validate(doc)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return doc
