"""maefast bench ops | attention | cells: time the token ops, print ratios, write JSON.

The file is written anew after every case, so that a run that is stopped leaves what it measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch

from maefast.bench import environment, machine, results, timing
from maefast.bench.micro import suite, tables
from maefast.bench.micro.shapes import DTYPES, PRESETS
from maefast.ops import linear_library

# Of a preset: rounds of a case; seconds after which no further round starts, once there are so many.
ROUNDS = {"toy": 3, "quick": 9, "full": 21}
SECONDS = {"toy": 4.0, "quick": 4.0, "full": 6.0}
LEAST = {"toy": 3}


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if machine.absent("maefast bench ops", args.device):
        return 3
    preset = args.preset or "full"
    peers = tuple(args.peers or (suite.PEERS if preset == "full" else suite.QUICK))
    if args.no_compile:
        peers = tuple(p for p in peers if not p.startswith("compile"))
    rounds, seconds = args.rounds or ROUNDS[preset], args.seconds_a_case
    if seconds is None and not args.rounds:
        seconds = SECONDS[preset]
    dtypes = [DTYPES[name] for name in args.dtype or DTYPES]
    families = args.family or suite.FAMILIES
    if args.check:
        return check(args.device, preset, families, dtypes, peers)
    label = args.label or f"micro-{preset}"

    def keep(doc: dict) -> None:
        results.keep(args, doc, label, final=False)

    try:
        doc = measure(args.device, preset, families, dtypes, peers, rounds, args.budget, seconds, progress=keep)
    except KeyboardInterrupt:
        print("maefast bench ops: stopped; the results hold the cases that were done", file=sys.stderr)
        return 130
    tables.show(doc)
    results.keep(args, doc, label)
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
    seconds: float | None = None,
    progress: Callable[[dict], None] | None = None,
) -> dict:
    """Run the suite; returns the document of `maefast.bench.results`.

    Args:
        budget: seconds after which no further case is started; the cases left out are counted in the settings.
        seconds: of a case, after which no further round is started, once there are 5 (preset toy: 3); None: no bound.
        progress: is given the document so far after every case but the last.
    """
    environment.exact_float32()
    start = time.monotonic()
    limits, where = machine.measure(device), environment.describe(device)
    settings = {
        "preset": preset,
        "rounds": rounds,
        "seconds_a_case": seconds,
        "least_rounds": LEAST.get(preset, timing.LEAST),
        "machine": limits,
    }
    if device == "cpu" and "linear" in families:
        settings["linear_library"] = linear_library()[0]
    records: list[dict] = []
    cases = list(suite.cases(families, PRESETS[preset][device], list(dtypes), device))

    def so_far(left_out: int) -> dict:
        settings.update(cases_left_out=left_out, seconds=round(time.monotonic() - start, 1))
        return results.document("micro", where, settings, list(peers), records)

    left = len(cases)
    for case in cases:
        if budget is not None and time.monotonic() - start > budget:
            break
        try:
            new, _ = suite.run(case, peers, rounds, limits, seconds=seconds, least=settings["least_rounds"])
        except Exception as error:  # what was measured so far must not be lost
            new = [{**suite.describe(case), "variant": "all", "error": f"{type(error).__name__}: {error}"[:200]}]
        records += new
        left -= 1
        print(tables.line(case, new), file=sys.stderr, flush=True)
        if progress is not None and left:
            progress(so_far(left))
    return so_far(left)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("maefast bench ops", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--preset", choices=tuple(PRESETS), help="full, if nothing is said")
    size.add_argument("--quick", dest="preset", action="store_const", const="quick", help="the same as --preset quick")
    parser.add_argument("--family", nargs="+", choices=suite.FAMILIES)
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES))
    parser.add_argument("--peers", nargs="+", choices=suite.PEERS, help="`eager` is always run as the check")
    parser.add_argument("--no-compile", action="store_true", help="leave out the torch.compile peers")
    parser.add_argument("--check", action="store_true", help="compare all variants and time nothing")
    parser.add_argument("--rounds", type=int, help="exactly so many, unless --seconds-a-case is given too")
    parser.add_argument(
        "--seconds-a-case",
        type=float,
        help="no further round of a case after so many seconds, once there are 5; 4 for quick, 6 for full",
    )
    parser.add_argument("--budget", type=float, help="seconds after which no further case starts")
    parser.add_argument("--label", help="the name of the file in --results")
    results.add_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
