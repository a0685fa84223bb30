"""maefast bench ops | attention | cells: time the token ops, print ratios, write JSON."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from maefast.bench import environment, machine, results
from maefast.bench.micro import suite, tables
from maefast.bench.micro.shapes import DTYPES, PRESETS
from maefast.ops import linear_library


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("maefast.bench.micro: no CUDA device here", file=sys.stderr)
        return 3
    preset = "quick" if args.quick else args.preset
    peers = tuple(args.peers or (suite.PEERS if preset == "full" else suite.QUICK))
    if args.no_compile:
        peers = tuple(p for p in peers if not p.startswith("compile"))
    rounds = args.rounds or {"toy": 3, "quick": 9}.get(preset, 21)
    dtypes = [DTYPES[name] for name in args.dtype or DTYPES]
    if args.check:
        return check(args.device, preset, args.family or suite.FAMILIES, dtypes, peers)
    doc = measure(args.device, preset, args.family or suite.FAMILIES, dtypes, peers, rounds, args.budget)
    tables.show(doc)
    results.keep(args, doc, args.label or f"micro-{preset}")
    return results.WRONG if any("WRONG RESULT" in r.get("error", "") for r in doc["records"]) else 0


def check(device: str, preset: str, families, dtypes, peers: tuple[str, ...]) -> int:
    """Compare all variants and time nothing; the exit status."""
    environment.exact_float32()
    cases = list(suite.cases(families, PRESETS[preset][device], dtypes, device))
    wrong = [record for case in cases for record in suite.check(case, peers)]
    for record in wrong:
        print(f"{record['op']} {record['dtype']} {record['direction']}, {record['variant']}: {record['error']}")
    print(f"{len(cases)} cases compared, {len(wrong)} variants wrong")
    return results.WRONG if wrong else 0


def measure(
    device: str,
    preset: str,
    families=suite.FAMILIES,
    dtypes=(torch.float32, torch.bfloat16),
    peers: tuple[str, ...] = suite.QUICK,
    rounds: int = 9,
    budget: float | None = None,
) -> dict:
    """Run the suite; returns the document of `maefast.bench.results`.

    budget: seconds after which no further case is started; the cases left out are counted in the settings.
    """
    environment.exact_float32()
    start = time.monotonic()
    limits = machine.measure(device)
    records: list[dict] = []
    skipped = 0
    for case in suite.cases(families, PRESETS[preset][device], list(dtypes), device):
        if budget is not None and time.monotonic() - start > budget:
            skipped += 1
            continue
        try:
            new, _ = suite.run(case, peers, rounds, limits)
        except Exception as error:  # what was measured so far must not be lost
            new = [{**suite.describe(case), "variant": "all", "error": f"{type(error).__name__}: {error}"[:200]}]
        records += new
        print(tables.line(case, new), file=sys.stderr, flush=True)
    settings = {
        "preset": preset,
        "rounds": rounds,
        "machine": limits,
        "cases_left_out": skipped,
        "seconds": round(time.monotonic() - start, 1),
    }
    if device == "cpu" and "linear" in families:
        settings["linear_library"] = linear_library()[0]
    return results.document("micro", environment.describe(device), settings, list(peers), records)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("maefast bench ops", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="full")
    parser.add_argument("--quick", action="store_true", help="the same as --preset quick: under a minute")
    parser.add_argument("--family", nargs="+", choices=suite.FAMILIES)
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES))
    parser.add_argument("--peers", nargs="+", choices=suite.PEERS, help="`eager` is always run as the check")
    parser.add_argument("--no-compile", action="store_true", help="leave out the torch.compile peers")
    parser.add_argument("--check", action="store_true", help="compare all variants and time nothing")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--budget", type=float, help="seconds after which no further case starts")
    parser.add_argument("--label", help="the name of the file in --results")
    results.add_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
