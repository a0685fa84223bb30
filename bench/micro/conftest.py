"""`pytest bench/micro`: the suite under pytest-benchmark, for its history and comparison of commits.

All variants of a case are timed together, in shuffled rounds, when the first of them is asked for. pytest-benchmark
then receives each variant's samples through a clock that replays them, so that its tables hold interleaved times.
"""

from __future__ import annotations

import pytest
import torch

from maefast.bench import environment
from maefast.bench.micro import suite
from maefast.bench.micro.shapes import DTYPES, PRESETS


class Replay:
    """A clock of which every second reading is one recorded sample later than the one before."""

    def __init__(self):
        self.readings = iter(())

    def load(self, samples: list[float]) -> None:
        self.readings = iter([t for sample in samples for t in (0.0, sample)])

    def __call__(self) -> float:
        return next(self.readings)


_clock = Replay()


def clock() -> float:
    return _clock()


def pytest_addoption(parser):
    group = parser.getgroup("maefast")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    group.addoption("--preset", choices=tuple(PRESETS), default="quick")
    group.addoption("--peers", nargs="+", choices=suite.PEERS, default=["eager", "tuned"])
    group.addoption("--rounds", type=int, default=9)


def pytest_generate_tests(metafunc):
    if "report" not in metafunc.fixturenames:
        return
    option = metafunc.config.option
    family = metafunc.module.__name__.rpartition("bench_")[2]
    shapes = PRESETS[option.preset][option.device]
    params, ids = [], []
    for case in suite.cases([family], shapes, list(DTYPES.values()), option.device):
        for variant, reason in suite.variants(case, tuple(option.peers)).items():
            marks = [pytest.mark.skip(reason=reason)] if reason else []
            marks.append(pytest.mark.benchmark(group=str(case), timer=clock))
            params.append(pytest.param((case, variant), marks=marks))
            ids.append(f"{case}-{variant}")
    metafunc.parametrize("which", params, ids=ids)


_last: dict = {}


@pytest.fixture
def which():
    raise NotImplementedError("parametrised above")


@pytest.fixture
def report(which, benchmark, request):
    """A function that gives this variant's samples to pytest-benchmark, timing its whole case first if need be."""
    case, variant = which
    option = request.config.option

    def run():
        if option.device == "cuda" and not torch.cuda.is_available():
            benchmark.skipped = True
            pytest.skip("no CUDA device here")
        if _last.get("case") != case:
            environment.exact_float32()
            _last.update(case=case, result=suite.run(case, tuple(option.peers), option.rounds))
        records, samples = _last["result"]
        record = next(r for r in records if r["variant"] == variant)
        if "error" in record:
            benchmark.skipped = True
            pytest.fail(record["error"])
        benchmark.extra_info.update({k: v for k, v in record.items() if k not in ("median_s", "low_s", "high_s")})
        _clock.load(samples[variant])
        benchmark.pedantic(lambda: None, rounds=len(samples[variant]), iterations=1)

    return run
