"""What a window on a GPU leaves behind: one JSON line for each result, written when it is known, so that a command that
is killed loses nothing. Everything else (what did not run, the summary, the dispatch tables) is made from the lines.

    {"stage": "smoke", "id": "triton/add_norm/bfloat16", "outcome": "passed", "seconds": 0.8, "tree": "9c1f...", ...}

Outcomes: passed, measured, skipped (with a reason), unable (a library cannot take the case) are final; failed, crashed,
timeout are tried again by the next call. Lines of other outcomes are no results: "planned" names all `ids` of a stage,
"environment" the machine, "again" what a later call is about to try again, "cut" what ran when the time was over. Of
several results of an id the last one counts.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from maefast.bench.environment import ROOT

STAGES = ("build", "smoke", "speed", "all-tests", "tune")
FINAL = ("passed", "measured", "skipped", "unable")
WRONG = ("failed", "crashed", "timeout")
MARKS = ("planned", "environment", "again", "cut")
COPY = "MAEFAST_CHECK_COPY"  # environment: a second file for every line, which a later call goes on from
TAIL = 600  # characters of an error that are kept
SOURCES = ("maefast", "kernels", "csrc", "tests", "bench/micro", "bench/peers")

Line = dict[str, Any]


@functools.cache
def tree() -> str:
    """A digest of the code that is tested: results of other code are not those of this one."""
    digest = hashlib.sha256()
    for path in sorted(p for top in SOURCES for p in (ROOT / top).rglob("*")):
        if any(path.is_relative_to(ROOT / "maefast" / copy) for copy in ("kernels", "bench")):  # of a staged tree
            continue
        if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh") and path.is_file():
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def tail(text: str) -> str:
    """The end of an error, which says most."""
    text = text.strip()
    return text if len(text) <= TAIL else "... " + text[-TAIL:]


class Lines:
    """Appends the lines of one stage to a file; several processes may share it.

    path: made with its folder, where they are missing. Every line is one write to a file opened for appending.
    """

    def __init__(self, path: str | Path, stage: str):
        self.path, self.stage = Path(path), stage
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, id: str, outcome: str, **fields: Any) -> None:
        if "error" in fields:
            fields["error"] = tail(str(fields["error"]))
        line = {"stage": self.stage, "id": id, "outcome": outcome, "tree": tree(), **fields}
        data = (json.dumps(line, default=str) + "\n").encode()
        for path in filter(None, (self.path, os.environ.get(COPY))):
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, data)
                os.fsync(file)
            finally:
                os.close(file)

    def plan(self, ids: Iterable[str]) -> None:
        self.write("plan", "planned", ids=list(ids))

    def environment(self, device: str) -> None:
        from maefast.bench import environment, freshness

        code = freshness.digests(freshness.all_targets(), device)  # results are made of the lines later, elsewhere
        self.write("environment", "environment", environment={**environment.describe(device), "code": code})

    def left(self, ids: Iterable[str]) -> list[str]:
        """Those of `ids` without a final outcome for this code yet."""
        done = {
            line["id"]
            for line in latest(read(self.path)).values()
            if line["stage"] == self.stage and line["outcome"] in FINAL and line["tree"] == tree()
        }
        return [id for id in ids if id not in done]


def read(*paths: str | Path) -> list[Line]:
    """The lines of these files in order; a last line that was cut off is left out, a missing file is empty."""
    found = []
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            continue
        for row in text.splitlines():
            try:
                line = json.loads(row)
            except ValueError:
                continue
            if isinstance(line, dict) and {"stage", "id", "outcome"} <= line.keys():
                found.append({"tree": None, **line})
    return found


def latest(lines: Iterable[Line]) -> dict[tuple[str, str], Line]:
    """(stage, id) -> its last line."""
    return {(line["stage"], line["id"]): line for line in lines if line["outcome"] not in MARKS}


def not_run(lines: Iterable[Line]) -> dict[str, list[str]]:
    """stage -> the ids that its last plan named and that have no line, in the plan's order."""
    lines = list(lines)
    known = latest(lines)
    plans = {line["stage"]: line["ids"] for line in lines if line["outcome"] == "planned"}
    found = {stage: [id for id in ids if (stage, id) not in known] for stage, ids in plans.items()}
    return {stage: ids for stage, ids in found.items() if ids}


def environment(lines: Iterable[Line]) -> dict[str, Any]:
    """The last environment that the lines name; {} without one."""
    return next((line["environment"] for line in reversed(list(lines)) if line["outcome"] == "environment"), {})


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
