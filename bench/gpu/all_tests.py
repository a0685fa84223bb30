"""Stage `all-tests`: every test marked `gpu`, in several processes that take the next test in turn, a line for each.

bfloat16 comes first, then one test of each file in turn, so that whatever the time allows covers every family;
implicit_conv and sparse_conv, which few need, come last. This module is also the pytest plugin of the processes.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

from maefast.bench.environment import ROOT
from maefast.bench.gpu import lines

LAST = ("implicit_conv", "sparse_conv")
FOLDER = "MAEFAST_GPU_TESTS"  # environment: the folder that the processes share
ROUNDS = 4  # processes lost to a bad address are replaced this often


def order(ids: Iterable[str]) -> list[str]:
    """The ids as they should run."""
    groups: dict[tuple[bool, bool], dict[str, list[str]]] = {}
    for id in ids:
        file = id.partition("::")[0]
        late = any(name in file for name in LAST)
        group = groups.setdefault((late, "bfloat16" not in id), {})
        group.setdefault(file, []).append(id)
    # CUDA C++ waits for evidence, and it is quick.
    found = []
    for _, files in sorted(groups.items()):
        turns = sorted(files.values(), key=lambda group: "/cuda/" not in group[0])
        found += [id for turn in zip_longest(*turns) for id in turn if id is not None]
    return found


# --- the plugin: runs in each pytest process -----------------------------------------------------------------------


class Turns:
    """A list of test ids that processes take from, one after the other."""

    def __init__(self, folder: Path):
        self.ids = json.loads((folder / "ids.json").read_text())
        self.counter = folder / "counter"

    def take(self) -> str | None:
        with open(self.counter, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            number = int(file.read() or 0)
            file.truncate(0)
            file.write(str(number + 1))
        return self.ids[number] if number < len(self.ids) else None


def pytest_runtestloop(session):
    """Instead of pytest's loop: what the shared list gives, until it or the time is over."""
    if FOLDER not in os.environ or session.config.option.collectonly:
        return None
    folder = Path(os.environ[FOLDER])
    turns, deadline = Turns(folder), float((folder / "deadline").read_text())
    items = {item.nodeid: item for item in session.items}
    marker = folder / f"running-{os.getpid()}"
    output = lines.Lines((folder / "lines").read_text(), "all-tests")
    session.config.pluginmanager.register(reporter := Reporter(output))

    def following():
        while time.time() < deadline and (id := turns.take()) is not None:
            if id in items:
                return items[id]
        return None

    item = following()
    while item is not None:
        nextitem = following()
        marker.write_text(item.nodeid)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=nextitem)
        if reporter.lost:
            break  # the device no longer answers this process; a new one takes what is left
        item = nextitem
    marker.unlink(missing_ok=True)
    return True


class Reporter:
    """One line a test."""

    def __init__(self, output: lines.Lines):
        self.output, self.lost = output, False
        self.seconds, self.outcome, self.error = 0.0, "passed", ""

    def pytest_runtest_logreport(self, report):
        if report.when == "setup":
            self.seconds, self.outcome, self.error = 0.0, "passed", ""
        self.seconds += report.duration
        if report.failed:
            self.outcome, self.error = "failed", str(report.longrepr)
        elif report.skipped and self.outcome == "passed":
            self.outcome = "skipped"
            where = report.longrepr
            self.error = str(where[2] if isinstance(where, tuple) else where)
        if report.when == "teardown":
            self.lost = "CUDA error" in self.error
            fields = {"error": self.error} if self.error else {}
            self.output.write(report.nodeid, self.outcome, seconds=round(self.seconds, 3), **fields)


# --- the stage -------------------------------------------------------------------------------------------------


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "--color=no", "--tb=short", "-p", "no:cacheprovider", *arguments]


def collect(selection: list[str], marker: str) -> list[str]:
    """The ids of the tests with this marker.

    Raises:
        RuntimeError: pytest could not collect.
    """
    command = command_line("--collect-only", "-m", marker, *selection)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    ids = [row.strip() for row in done.stdout.splitlines() if "::" in row and not row.startswith(("ERROR", "="))]
    if done.returncode not in (0, 5):
        raise RuntimeError(f"pytest could not collect the tests: {lines.tail(done.stdout + done.stderr)}")
    return ids


def run(ids: list[str], selection: list[str], path: Path, processes: int, seconds: float, log) -> None:
    """Run the tests as far as the time goes; what a lost process was at is reported as crashed. selection: what the ids
    were collected from."""
    deadline = time.time() + seconds
    output = lines.Lines(path, "all-tests")
    for _ in range(ROUNDS):
        ids = _unknown(path, ids)
        if not ids or time.time() >= deadline:
            return
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "ids.json").write_text(json.dumps(ids))
            (folder / "deadline").write_text(str(deadline))
            (folder / "lines").write_text(str(path.resolve()))
            files = sorted({id.partition("::")[0] for id in ids})
            files = files if all((ROOT / file).exists() for file in files) else selection
            command = command_line("-p", "maefast.bench.gpu.all_tests", *files)
            env = {**os.environ, FOLDER: name}
            group = [
                subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
                for _ in range(min(processes, len(ids)))
            ]
            over = _wait(group, deadline)
            for marker in folder.glob("running-*"):
                id = marker.read_text()
                if id in _unknown(path, [id]):
                    what = {"outcome": "cut", "error": "the stage's time was over"}
                    output.write(id, **(what if over else {"outcome": "crashed", "error": "its process ended"}))
            if not over and len(_unknown(path, ids)) == len(ids):
                status = [process.returncode for process in group]
                output.write("pytest", "failed", error=f"no test ran: pytest ended with {status}, see its log")
                return


def _wait(group: list[subprocess.Popen], deadline: float) -> bool:
    """Whether the time was over before all ended by themselves."""
    over = False
    for process in group:
        try:
            process.wait(max(0.0, deadline + 2 - time.time()))
        except subprocess.TimeoutExpired:
            over = True
            process.kill()
            process.wait()
    return over


def _unknown(path: Path, ids: list[str]) -> list[str]:
    """The ids without a result for this code, or with one that is about to be tried again."""
    known = {}
    for line in lines.read(path):
        if line["stage"] == "all-tests" and line["tree"] == lines.tree():
            known[line["id"]] = line["outcome"] != "again"
    return [id for id in ids if not known.get(id)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m maefast.bench.gpu.all_tests", description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=Path, required=True, help="the file that lines are appended to")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--processes", type=int, default=max(1, len(os.sched_getaffinity(0)) - 2))
    parser.add_argument("--marker", default="gpu", help="`not_gpu` for the others")
    parser.add_argument("--log", type=Path, help="what pytest prints goes here")
    parser.add_argument("tests", nargs="*", default=["tests"])
    args = parser.parse_args(argv)
    start = time.monotonic()
    output = lines.Lines(args.lines, "all-tests")
    try:
        ids = order(collect(args.tests, args.marker.replace("_", " ")))
    except RuntimeError as error:
        output.write("collection", "failed", error=str(error))
        print(error, file=sys.stderr)
        return 1
    output.plan(ids)
    left = output.left(ids)
    again = [id for id in left if id not in _unknown(args.lines, left)]  # failed in an earlier call
    for id in again:
        output.write(id, "again")
    with open(args.log or os.devnull, "a") as log:
        run(left, args.tests, args.lines, args.processes, args.seconds - (time.monotonic() - start), log)
    known = lines.latest(lines.read(args.lines))
    outcomes = [known[("all-tests", id)]["outcome"] for id in [*ids, "pytest"] if ("all-tests", id) in known]
    counts = {name: outcomes.count(name) for name in dict.fromkeys(outcomes)}
    print("all-tests: " + ", ".join(f"{n} {name}" for name, n in counts.items()) + f" of {len(ids)}")
    return 1 if any(name in lines.WRONG for name in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
