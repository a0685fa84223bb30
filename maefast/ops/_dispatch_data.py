"""What was measured and tested, in one generated file: `dispatch_data.json`, which `python -m bench.gpu.tune` writes.

    {"schema": 1,
     "evidence": {"cuda": {op: {"device", "commit", "date", "faster"}}, "triton": {op: ...}},
     "attention": [the fields of `AttentionRule`], "conv": [the fields of `ConvRule`]}

Without evidence of a real device a CUDA C++ kernel is never chosen by itself, whatever a table says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

PATH = Path(__file__).with_name("dispatch_data.json")
SCHEMA = 1
KINDS = ("cuda", "triton")  # of evidence


class Evidence(NamedTuple):
    """Where the tests of a GPU kernel passed."""

    device: str
    commit: str
    date: str
    faster: float | None = None  # how many times longer the Triton kernel took there, where both were timed

    def __str__(self) -> str:
        ratio = "" if self.faster is None else f", {self.faster:.2f}x of Triton's speed"
        return f"tested on {self.device} at {self.commit} ({self.date}){ratio}"


class AttentionRule(NamedTuple):
    """Use `backend` for calls that fit: up to this many queries and keys, of heads no wider than the last and wider
    than the first of `widths`, of these dtypes, packed or not. None: all."""

    device: str
    backend: str
    longest: int | None
    why: str
    packed: bool | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    widths: tuple[int, int] | None = None


class ConvRule(NamedTuple):
    """Use `route` for output cells of `smallest` sites a side or more, of convolutions with or without groups, on maps
    of `sides` sides (3: volumes), with or without a stride; None: both."""

    device: str
    route: str
    grouped: bool
    smallest: int
    why: str
    sides: int = 2
    strided: bool | None = None


class Data(NamedTuple):
    cuda: dict[str, Evidence]
    triton: dict[str, Evidence]
    attention: tuple[AttentionRule, ...]
    conv: tuple[ConvRule, ...]


def parse(doc: Mapping[str, Any]) -> Data:
    """The document as tuples.

    Raises:
        ValueError: another schema, or a field that is missing or unknown.
    """
    if doc.get("schema") != SCHEMA:
        raise ValueError(f"dispatch data of schema {doc.get('schema')!r}; this version reads {SCHEMA}")
    try:
        evidence = [{op: Evidence(**fields) for op, fields in doc["evidence"][name].items()} for name in KINDS]
        attention = tuple(_attention_rule(rule) for rule in doc["attention"])
        return Data(*evidence, attention, tuple(ConvRule(**rule) for rule in doc["conv"]))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"dispatch data is not well formed: {error}") from error


def _attention_rule(fields: Mapping[str, Any]) -> AttentionRule:
    given = dict(fields)
    if given.get("dtypes") is not None:
        given["dtypes"] = tuple(getattr(torch, name) for name in given["dtypes"])
    if given.get("widths") is not None:
        given["widths"] = tuple(given["widths"])
    return AttentionRule(**given)


def read(path: Path = PATH) -> Data:
    return parse(json.loads(path.read_text(encoding="utf-8")))


DATA = read()
