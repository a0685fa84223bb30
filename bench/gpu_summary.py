"""The last words of bench/gpu_check.sh: what held, what was measured, and the exit status."""

from __future__ import annotations

import argparse
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from bench import results
from bench.micro import tables

BENCHMARKS = ("micro", "step", "dropin")


def counts(report: Path) -> dict[str, int]:
    """{"tests", "failures", "errors", "skipped"} of a JUnit report; zeros where there is none."""
    total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    try:
        suites = list(ET.parse(report).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):
        return total
    return {key: sum(int(suite.get(key, 0)) for suite in suites) for key in total}


def verdict(parts: dict[str, str], tests: dict[str, int]) -> tuple[list[str], list[str]]:
    """(what is wrong, what merely did not run). `parts`: name -> exit status, "timeout" or "skipped"."""
    wrong, trouble = [], []
    passed = tests["tests"] - tests["failures"] - tests["errors"] - tests["skipped"]
    if parts.get("build") != "0":
        wrong.append("the build failed")
    if tests["failures"] or tests["errors"]:
        wrong.append(f"{tests['failures']} tests failed, {tests['errors']} errors")
    elif parts.get("tests") != "0":
        wrong.append(f"the tests did not finish well (status {parts.get('tests')})")
    elif passed < 1:
        wrong.append("no gpu test ran")
    for name in BENCHMARKS:
        status = parts.get(name, "skipped")
        if status == str(results.WRONG):
            wrong.append(f"bench.{name} found a result that differs from the peer's")
        elif status != "0":
            trouble.append(f"bench.{name}: {status if not status.isdigit() else 'status ' + status}, see gpu_check.log")
    return wrong, trouble


def lines(out: Path) -> list[str]:
    """One line a measured op and peer; nothing for a benchmark that left no results."""
    found = []
    for name in BENCHMARKS:
        try:
            doc = results.read(out / f"{name}_cuda.json")
        except (OSError, ValueError):
            continue
        if name == "micro":
            for row in tables.rows(doc):
                if row["variant"] == "maefast-reference":
                    continue
                share = row.get("copy_share")
                found.append(
                    f"{tables.times(row['ratios'].get('eager')):>8} eager"
                    f" {tables.times(row['ratios'].get('tuned')):>8} tuned"
                    f" {'-' if share is None else f'{share:.0%}':>5} of copy  {row['op']}"
                    f" {'fwd' if row['direction'] == 'forward' else 'fwd+bwd'} {row['dtype']}"
                    f" b{row['shape']['batch']} {row['variant'].removeprefix('maefast-')}"
                    f"{' *' if row['default'] else ''}"
                )
            found.append(
                f"copy {doc['settings']['copy_gb_s']:.0f} GB/s; {doc['settings']['cases_left_out']} cases left out"
            )
        else:
            for r in doc["records"]:
                if "error" not in r:
                    what = " ".join([*([r["family"]] if "family" in r else []), r["preset"], r["dtype"]])
                    found.append(f"{r['ratio']:>7.2f}x {r['peer']}, step {r['step_s'] * 1e3:.1f} ms, {what}")
    return found


def summarise(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.gpu_summary", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="+", help="NAME=STATUS:SECONDS")
    args = parser.parse_args(argv)
    parts, seconds = {}, {}
    for text in args.parts:
        name, _, value = text.partition("=")
        parts[name], _, took = value.partition(":")
        seconds[name] = int(took or 0)
    tests = counts(args.out / "gpu_tests.xml")
    wrong, trouble = verdict(parts, tests)
    for line in lines(args.out):
        print(line)
    summary = {"parts": parts, "seconds": seconds, "tests": tests, "wrong": wrong, "trouble": trouble}
    (args.out / "gpu_check.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(
        f"tests: {tests['tests']} run, {tests['failures']} failed, {tests['errors']} errors, {tests['skipped']} skipped"
    )
    for text in trouble:
        print(f"benchmark trouble (does not count): {text}")
    print("CORRECTNESS HELD" if not wrong else "CORRECTNESS DID NOT HOLD: " + "; ".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(summarise())
