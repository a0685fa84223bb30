"""What the lines of a window say: what held, what did not run, what was measured, and the exit status. Needs no GPU.

python -m maefast.bench.gpu.summary LINES ... [--results FOLDER --name h100]
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from maefast.bench import machine, results
from maefast.bench.environment import slug
from maefast.bench.gpu import lines

SHOWN = 12  # of ids that did not run, and of failures, for each stage
CORRECTNESS = ("build", "smoke", "all-tests")


def verdict(found: list[lines.Line], stages: Iterable[str]) -> tuple[list[str], list[str]]:
    """(what is wrong, what merely did not run or could not be measured) of `stages`."""
    known, missing = lines.latest(found), lines.not_run(found)
    wrong, trouble = [], []
    for stage in stages:
        mine = [line for (name, _), line in known.items() if name == stage]
        bad = [line for line in mine if line["outcome"] in lines.WRONG]
        if bad and stage in CORRECTNESS:
            wrong.append(f"{stage}: {len(bad)} of {len(mine)} did not pass")
        elif bad:
            differing = [line for line in bad if "WRONG" in line.get("error", "") or "wrong:" in line.get("error", "")]
            where = wrong if differing else trouble
            where.append(f"{stage}: {len(bad)} failed")
        if not any(line["outcome"] in ("passed", "measured") for line in mine):
            (wrong if stage in CORRECTNESS else trouble).append(f"{stage}: nothing ran")
        if missing.get(stage):
            trouble.append(f"{stage}: {len(missing[stage])} not run")
    return wrong, trouble


def table(found: list[lines.Line]) -> Iterable[str]:
    """A line a stage, then failures with the end of their errors, then what did not run."""
    known, missing = lines.latest(found), lines.not_run(found)
    for stage in lines.STAGES:
        mine = [line for (name, _), line in known.items() if name == stage]
        if not mine and not missing.get(stage):
            continue
        counts = Counter(line["outcome"] for line in mine)
        counts["not run"] = len(missing.get(stage, ()))
        yield f"{stage:9} " + ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    for stage in lines.STAGES:
        bad = [line for (name, _), line in known.items() if name == stage and line["outcome"] in lines.WRONG]
        for line in bad[:SHOWN]:
            yield f"  {line['outcome']} {stage} {line['id']}: {' '.join(line.get('error', '').split())[-300:]}"
        if len(bad) > SHOWN:
            yield f"  ... and {len(bad) - SHOWN} more of {stage}"
    for stage, ids in missing.items():
        yield f"  not run in {stage}: {', '.join(ids[:SHOWN])}{' ...' if len(ids) > SHOWN else ''}"


def speeds(found: list[lines.Line]) -> Iterable[str]:
    """What was measured: steps, then attention by shape, then ops with their share of copy bandwidth."""
    records = [line for line in lines.latest(found).values() if "median_s" in line.get("record", {}) or _is_step(line)]
    for line in (line for line in records if _is_step(line)):
        r = line["record"]
        what = f"{r['preset']} b{r['shape']['batch']} {r['dtype']}"
        ratio = f"{r['ratio']:.2f}x of maefast's time" if r["peer"] != "maefast" else "maefast"
        yield f"step {what:24} {r['step_s'] * 1e3:8.2f} ms  {r['peak_bytes'] / 2**30:5.1f} GiB  {r['peer']}: {ratio}"
    shapes: dict[str, dict[str, float]] = {}
    for line in (line for line in records if "attention" in line or "conv" in line):
        shapes.setdefault(line["id"].rpartition("/")[0], {})[line["record"]["variant"]] = line["record"]["median_s"]
    for name, times in shapes.items():
        row = ", ".join(f"{n.removeprefix('maefast-')} {t * 1e6:.0f}" for n, t in sorted(times.items(), key=_second))
        yield f"{name:24} µs: {row}"
    for line in (line for line in records if not _is_step(line) and "attention" not in line and "conv" not in line):
        r = line["record"]
        if r["variant"].startswith("maefast") and r["variant"] != "maefast-reference":
            share = f"{r['limit_share']:.0%} of {r['limit']}" if r.get("limit_share") else "-"
            eager = f"{r['ratios']['eager']:.2f}x eager" if "eager" in r["ratios"] else ""
            yield f"op {r['op']} {r['dtype']} {r['direction']} {r['variant']}: {share}, {eager}"


def _second(pair: tuple[str, float]) -> float:
    return pair[1]


def _is_step(line: lines.Line) -> bool:
    return "step_s" in line.get("record", {})


def documents(found: list[lines.Line], name: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """(file name, document of `maefast.bench.results`) of all that was measured, for docs/results.md."""
    env = {"code": {}, **lines.environment(found)}  # without digests they are not of the code as it is now
    micro, steps = [], {}
    for (_, id), line in lines.latest(found).items():
        record = line.get("record")
        if record is None:
            continue
        if "peer" in record:
            key = record["preset"], record["dtype"], f"b{record['shape']['batch']}{'-tuned' * ('/tuned/' in id)}"
            steps.setdefault(key, ([], line["settings"]))[0].append(record)
        elif "conv" not in line:
            micro.append(record)
    if micro:
        settings = {"rounds": max(r.get("rounds", 0) for r in micro), "cases_left_out": 0}
        copies = [r["gb_s"] / r["limit_share"] for r in micro if r.get("limit") == "memory"]
        settings["machine"] = {**machine.UNKNOWN, "copy_gb_s": copies[0] if copies else None}
        peers = list(dict.fromkeys(r["variant"] for r in micro if not r["variant"].startswith("maefast")))
        yield f"micro-{name}.json", results.document("micro", env, settings, peers, micro)
    for (preset, dtype, batch), (records, settings) in steps.items():
        records = sorted(records, key=lambda record: record["peer"] != "maefast")
        doc = results.document("step", env, settings, [r["peer"] for r in records], records)
        yield f"step-{preset}-{dtype}-{batch}-{name}.json", doc


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m maefast.bench.gpu.summary", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="files of lines, in the order they were written")
    parser.add_argument("--stages", nargs="+", choices=lines.STAGES, help="judge these; default: those with lines")
    parser.add_argument("--results", type=Path, help="write what was measured into this folder, for bench.report")
    parser.add_argument("--name", default="gpu", help="of the device, in the names of these files")
    args = parser.parse_args(argv)
    found = lines.read(*args.files)
    stages = args.stages or [stage for stage in lines.STAGES if any(line["stage"] == stage for line in found)]
    env = lines.environment(found)
    if env:
        print(f"{env['device']}, torch {env['torch']}, commit {env['commit']}, {env['date']}")
    for row in (*speeds(found), *table(found)):
        print(row)
    if args.results:
        for name, doc in documents(found, args.name):
            folder = args.results / slug(doc["environment"]["device"])
            print(f"written: {results.write(folder / name, doc)}")
    wrong, trouble = verdict(found, stages)
    for text in trouble:
        print(f"does not count: {text}")
    partly = " IN WHAT RAN" if any("not run" in text for text in trouble) else ""
    print(f"CORRECTNESS HELD{partly}" if not wrong else "CORRECTNESS DID NOT HOLD: " + "; ".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
