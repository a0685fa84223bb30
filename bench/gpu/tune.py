"""Stage `tune`: measured lines become dispatch truth, in maefast/ops/dispatch_data.json.

    python -m maefast.bench.gpu.tune LINES ...            print what would change
    python -m maefast.bench.gpu.tune LINES ... --write    write it
    python -m bench.gpu.tune --measure --lines FILE     on a GPU: first measure what the tables need beyond `speed`

Evidence: a kernel of which every smoke result passed, in every dtype it serves, and every gpu test of its family, all
of the code that ran last. Rules: for each measured length the fastest of what can be chosen; a call is served as the
shortest measured case that is at least as long and as wide, float16 as bfloat16. What was not measured keeps the rules
of before. Without evidence there is no rule for CUDA C++.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from maefast.bench.gpu import lines
from maefast.ops import _dispatch_data, _registry

KEEP = 0.02  # a gain below this is noise: what served before goes on
# variant of a micro record -> what the attention table calls it
DENSE = {"eager": "sdpa", "maefast-triton": "triton", "maefast-cuda": "cuda"}
PACKED = {"varlen": "varlen", "maefast-triton": "triton", "maefast-cuda": "cuda"}
ROUTES = {f"maefast-{route}": route for route in ("halo", "taps", "dense", "implicit")}
HALF = ("float16", "bfloat16")
# family -> the files of its gpu tests, for each kind of kernel
FILES = {
    "cuda": ("tests/ops/cuda/test_{}", "tests/ops/test_{}"),
    "triton": ("tests/kernels/test_{}_kernels", "tests/ops/test_{}"),
}

Found = dict[tuple[str, str], lines.Line]


def data(found: Iterable[lines.Line], before: dict[str, Any]) -> dict[str, Any]:
    """The document of `maefast.ops._dispatch_data` that the lines speak for; `before`: the one they improve on.

    Raises:
        ValueError: the lines were not measured on a CUDA device.
    """
    found = list(found)
    machine = lines.environment(found)
    if machine.get("kind") != "cuda":
        raise ValueError("these lines name no CUDA device: a rehearsal is no evidence")
    known = lines.latest(found)
    same = [line for line in found if line["tree"] == found[-1]["tree"]]
    ran, unfinished = lines.latest(same), lines.not_run(same)
    where = {"device": machine["device"], "commit": _commit(machine), "date": str(machine["date"])[:10]}
    evidence = {
        kind: {
            op: {**where, "faster": _faster(op, known) if kind == "cuda" else None}
            for op in _registry.SCHEMAS
            if tested(op, kind, ran, unfinished)
        }
        for kind in _dispatch_data.KINDS
    }
    evidence = {kind: {**_still(before, kind, known), **new} for kind, new in evidence.items()}
    result = {**before, "evidence": evidence}
    named = f"measured on {machine['device']}"
    rules = attention_rules(known, named, "attention" in evidence["cuda"])
    if rules:
        new = {rule["packed"] for rule in rules}
        kept = [rule for rule in before["attention"] if "measured on" not in rule["why"] or rule["packed"] not in new]
        result["attention"] = [*rules, *kept]
    routes = conv_rules(known, named)
    if routes:
        replaced = [r for r in before["conv"] if r["device"] != "cuda" or r["grouped"]]
        result["conv"] = [*replaced, *routes]
    _dispatch_data.parse(result)
    return result


def _commit(machine: dict[str, Any]) -> str:
    dirty = {True: " with changes", None: ""}.get(machine.get("dirty"), "")
    return f"{machine.get('commit') or 'an unknown commit'}{dirty}"


def tested(op: str, kind: str, known: Found, unfinished: dict[str, list[str]]) -> bool:
    """Whether all that was planned to run of this kernel ran, and passed."""
    smoke = [line for (stage, _), line in known.items() if stage == "smoke" and op in line.get("ops", ())]
    smoke = [line for line in smoke if line.get("backend") == kind]
    if not smoke or any(line["outcome"] != "passed" for line in smoke):
        return False
    if any(id.startswith(f"{kind}/") for id in unfinished.get("smoke", ())):
        return False
    family = _registry.FAMILY_OF[op]
    starts = tuple(name.format(family) for name in FILES[kind])
    mine = lambda id: id.startswith(starts) and _of_kind(id, kind)  # noqa: E731
    if any(mine(id) for id in unfinished.get("all-tests", ())):
        return False
    outcomes = [line["outcome"] for (stage, id), line in known.items() if stage == "all-tests" and mine(id)]
    return "passed" in outcomes and not any(outcome in lines.WRONG for outcome in outcomes)


def _of_kind(id: str, kind: str) -> bool:
    """Whether a test is of this kind of kernel: those of tests/ops name the backend among their parameters."""
    if not id.startswith("tests/ops/test_"):
        return True
    return kind in id.partition("[")[2]


def _still(before: dict[str, Any], kind: str, known: Found) -> dict[str, Any]:
    """Evidence of before, but for kernels that failed now."""
    failed = {
        op
        for line in known.values()
        if line.get("backend") == kind and line["outcome"] in lines.WRONG
        for op in line.get("ops", ())
    }
    return {op: entry for op, entry in before["evidence"][kind].items() if op not in failed}


def _faster(op: str, known: Found) -> float | None:
    """How many times longer Triton took than CUDA C++: the geometric mean over the measured cases of the op."""
    public = op.removesuffix("_backward")
    times: dict[str, dict[str, float]] = {}
    for (stage, id), line in known.items():
        record = line.get("record", {})
        if stage in ("speed", "tune") and "median_s" in record and record.get("op", "").split(" (")[0] == public:
            times.setdefault(id.rpartition("/")[0], {})[record["variant"]] = record["median_s"]
    ratios = [
        case["maefast-triton"] / case["maefast-cuda"]
        for case in times.values()
        if {"maefast-triton", "maefast-cuda"} <= case.keys()
    ]
    return round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 3) if ratios else None


# --- attention -------------------------------------------------------------------------------------------------


def attention_rules(known: Found, named: str, has_cuda: bool) -> list[dict[str, Any]]:
    """Rules for measured 16-bit calls, dense ones and packed ones, narrow heads first and short sequences first."""
    cases: dict[tuple, dict[int, dict[str, float]]] = {}
    for line in known.values():
        what, record = line.get("attention"), line.get("record", {})
        if what is None or "median_s" not in record or line["outcome"] != "measured":
            continue
        names = PACKED if what["packed"] else DENSE
        if (name := names.get(record["variant"])) is None or (name == "cuda" and not has_cuda):
            continue
        shape = cases.setdefault((what["packed"], what["width"], what["length"]), {})
        shape.setdefault(what["batch"], {})[name] = record["median_s"]
    found = []
    for packed in (False, True):
        narrower = 0
        for width in sorted({w for p, w, _ in cases if p == packed}):
            lengths = {n: batches for (p, w, n), batches in cases.items() if (p, w) == (packed, width)}
            found += _of_width(lengths, packed, (narrower, width), named)
            narrower = width
    return found


def _of_width(lengths: dict[int, dict[int, dict[str, float]]], packed: bool, widths, named: str) -> list[dict]:
    """The rules for one width of heads: neighbours with the same winner are one rule."""
    rules: list[dict] = []
    default = "varlen" if packed else "sdpa"
    for length in sorted(lengths):
        times = _mean(lengths[length])
        if not times:
            continue
        best = min(times, key=times.get)
        if default in times and times[best] > times[default] * (1 - KEEP):
            best = default
        others = {name: time / times[best] for name, time in times.items() if name != best}
        text = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in sorted(others.items(), key=lambda item: item[1]))
        rule = {"device": "cuda", "backend": best, "longest": length, "why": f"{named}: {text or 'alone'}"}
        rule |= {"packed": packed, "dtypes": list(HALF), "widths": list(widths)}
        if rules and rules[-1]["backend"] == best:
            rules.pop()
        rules.append(rule)
    return rules


def _mean(batches: dict[int, dict[str, float]]) -> dict[str, float]:
    """name -> geometric mean of its time over the batches; only names that were measured at all of them."""
    names = set.intersection(*(set(times) for times in batches.values()))
    return {n: math.exp(sum(math.log(times[n]) for times in batches.values()) / len(batches)) for n in sorted(names)}


# --- convolution -----------------------------------------------------------------------------------------------


def conv_rules(known: Found, named: str) -> list[dict[str, Any]]:
    """Rules for convolutions without groups, large cells first."""
    cells: dict[int, dict[str, float]] = {}
    for line in known.values():
        what, record = line.get("conv"), line.get("record", {})
        if what is None or "median_s" not in record or line["outcome"] != "measured" or what["grouped"]:
            continue
        if record["variant"] in ROUTES:
            cells.setdefault(what["cell"], {})[ROUTES[record["variant"]]] = record["median_s"]
    rules: list[dict] = []
    for cell in sorted(cells, reverse=True):
        times = cells[cell]
        best = min(times, key=times.get)
        text = ", ".join(f"{time / times[best]:.2f}x {route}" for route, time in sorted(times.items()) if route != best)
        rule = {"device": "cuda", "route": best, "grouped": False, "smallest": cell}
        rule["why"] = f"{named}: {text or 'alone'}"
        if rules and rules[-1]["route"] == best:
            rules.pop()
        rules.append(rule)
    if rules:
        rules[-1]["smallest"] = 1
    return rules


# --- the command -----------------------------------------------------------------------------------------------


def text(doc: dict[str, Any]) -> str:
    """The document with one rule a line."""
    one = lambda value: json.dumps(value, ensure_ascii=False)  # noqa: E731
    parts = []
    for key, value in doc.items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {one(row)}" for row in value)
            parts.append(f' "{key}": [\n{rows}\n ]')
        elif key == "evidence":
            kinds = []
            for kind, ops in value.items():
                rows = ",\n".join(f"   {one(op)}: {one(entry)}" for op, entry in sorted(ops.items()))
                kinds.append(f'  "{kind}": {{\n{rows}\n  }}' if ops else f'  "{kind}": {{}}')
            parts.append(' "evidence": {\n' + ",\n".join(kinds) + "\n }")
        else:
            parts.append(f' "{key}": {one(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def report(before: dict[str, Any], after: dict[str, Any]) -> Iterable[str]:
    """What changes, a line each."""
    for kind in _dispatch_data.KINDS:
        for op, entry in after["evidence"][kind].items():
            if before["evidence"][kind].get(op) != entry:
                yield f"evidence {kind:6} {op}: {_dispatch_data.Evidence(**entry)}"
        for op in before["evidence"][kind].keys() - after["evidence"][kind].keys():
            yield f"evidence {kind:6} {op}: withdrawn, it failed"
    for table in ("attention", "conv"):
        for rule in after[table]:
            if rule not in before[table]:
                yield f"{table} {json.dumps(rule, ensure_ascii=False)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m maefast.bench.gpu.tune", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="files of lines, in the order they were written")
    parser.add_argument("--write", action="store_true", help="write the tables instead of only printing what changes")
    parser.add_argument("--data", type=Path, default=_dispatch_data.PATH, help="the file that is read and written")
    parser.add_argument("--measure", action="store_true", help="measure what the tables need beyond `speed` first")
    parser.add_argument("--lines", type=Path, help="with --measure: the file that lines are appended to, and read")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rehearse", action="store_true", help="with --measure: on a CPU, at toy sizes")
    args = parser.parse_args(argv)
    status = 0
    if args.measure:
        status = measure(args.lines, args.seconds, args.rehearse)
    files = [*args.files, *([args.lines] if args.lines else [])]
    if args.data == _dispatch_data.PATH or args.data.exists():
        before = json.loads(args.data.read_text(encoding="utf-8"))
    else:
        before = json.loads(_dispatch_data.PATH.read_text(encoding="utf-8"))
    found = lines.read(*files)
    if args.rehearse:
        # The tables are made all the same, so that a mistake in their making shows; nobody reads them.
        stamp = {**lines.environment(found), "kind": "cuda", "device": "no device: a rehearsal"}
        row = {"stage": "tune", "id": "environment", "outcome": "environment", "tree": lines.tree()}
        found.append({**row, "environment": stamp})
    try:
        after = data(found, before)
    except ValueError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 1
    for row in report(before, after):
        print(row)
    if args.write:
        if args.rehearse and args.data == _dispatch_data.PATH:
            parser.error("a rehearsal writes no tables; name another file with --data")
        args.data.write_text(text(after), encoding="utf-8")
        print(f"tune: wrote {args.data}")
    return status


def measure(path: Path, seconds: float, rehearse: bool) -> int:
    """Ragged attention and the convolution's routes."""
    from maefast.bench.environment import exact_float32
    from maefast.bench.gpu import speed

    exact_float32()
    device = "cpu" if rehearse else "cuda"
    limits = speed.device_limits(device)
    chosen = [*speed.ragged_items(device, rehearse, limits), *speed.route_items(device, rehearse, limits)]
    return speed.run("tune", path, chosen, device, seconds)


if __name__ == "__main__":
    sys.exit(main())
