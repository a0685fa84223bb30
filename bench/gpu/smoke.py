"""Stage `smoke`: every Triton and CUDA C++ kernel once in each dtype it serves, forward and backward against float64,
and two steps of training of four models; what most users need first."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from maefast.bench.gpu import lines, pool


def plan(rehearse: bool) -> list[str]:
    """The ids of the stage, in order."""
    from maefast.bench.gpu import cases, trainings

    kernels = [run.id for run in _runs(rehearse)]
    dtypes = [str(dtype)[6:] for dtype in trainings.DTYPES if not (rehearse and dtype.itemsize == 2)]
    early, late = (
        [f"train/{name}/{dtype}" for name in tasks for dtype in dtypes] for tasks in (trainings.EARLY, trainings.LATE)
    )
    first = {run.name for group in cases.COMMON for run in group(cases.TOY if rehearse else cases.REAL)}
    common = [id for id in kernels if id.split("/")[1] in first]
    rare = [id for id in kernels if id.split("/")[1] not in first]
    last = [id for id in rare if "implicit" in id]
    return [*common, *early, *(id for id in rare if id not in last), *late, *last]


def _runs(rehearse: bool):
    from maefast.bench.gpu import cases

    backends = ("triton",) if rehearse else ("triton", "cuda")
    return cases.runs(cases.TOY if rehearse else cases.REAL, backends)


def make(rehearse: bool) -> pool.Work:
    """A process's worker: id -> outcome."""
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from maefast.bench.environment import exact_float32
    from maefast.bench.gpu import cases, compare, trainings

    torch.set_num_threads(1)
    exact_float32()
    compare.poison()
    device = "cpu" if rehearse else "cuda"
    runs = {run.id: run for run in _runs(rehearse)}

    def work(id: str) -> pool.Outcome:
        if id.startswith("train/"):
            _, name, text = id.split("/")
            if name == "videomae" and not lines.has_module("transformers"):
                return {"outcome": "skipped", "error": "transformers is not installed"}
            dtype = getattr(torch, text)
            found = trainings.errors(name, device, dtype, rehearse, "triton" if rehearse else None)
            problem = trainings.too_large(found, dtype)
            fields = {"model": name}
        else:
            run = runs[id]
            emulate = rehearse and run.dtype is torch.bfloat16
            inputs = cases.inputs(run.case)
            found = compare.errors(run.case.call, inputs, run.backend, device, run.dtype, emulate)
            problem = compare.too_large(found, run.dtype)
            fields = {"backend": run.backend, "ops": list(run.case.raw), "emulated": emulate}
        worst = {"errors": {name: float(f"{error:.3g}") for name, error in found.items()}}
        if problem:
            return {"outcome": "failed", "error": problem, **fields, **worst}
        return {"outcome": "passed", **fields, **worst}

    return work


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m maefast.bench.gpu.smoke", description=__doc__)
    parser.add_argument("--lines", type=Path, required=True, help="the file that lines are appended to")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rehearse", action="store_true", help="in Triton's interpreter, on a CPU, at toy sizes")
    parser.add_argument("--only", nargs="+", help="ids that contain one of these")
    args = parser.parse_args(argv)
    start = time.monotonic()
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    output = lines.Lines(args.lines, "smoke")
    output.environment("cpu" if args.rehearse else "cuda")
    ids = [id for id in plan(args.rehearse) if not args.only or any(text in id for text in args.only)]
    output.plan(ids)
    counts: dict[str, int] = {}

    def report(id: str, outcome: pool.Outcome) -> None:
        output.write(id, **outcome)
        counts[outcome["outcome"]] = counts.get(outcome["outcome"], 0) + 1
        if outcome["outcome"] != "passed":
            print(f"{outcome['outcome']:8} {id}: {outcome.get('error', '')}", flush=True)

    left = output.left(ids)
    seconds = args.seconds - (time.monotonic() - start)
    pool.run(left, make, (args.rehearse,), report, args.processes, seconds, each=120.0 if args.rehearse else 60.0)
    text = ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing left to do"
    print(f"smoke: {text}; {len(ids) - len(left)} were done before; {time.monotonic() - start:.0f} s")
    wrong = any(
        line["stage"] == "smoke" and line["outcome"] in lines.WRONG
        for line in lines.latest(lines.read(args.lines)).values()
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
