"""Where a training step's time and memory go.

    report = maefast.profiling.profile(step, model, data=loader, optimizer=optimizer)
    report.show()

`step` is a function of your own, which takes a batch (or nothing) and does forward, backward and the optimizer's step;
`model` may be any module. See docs/profile.md.

    run            what is done, in order: clock, recording, summary
    clock          how long a step takes
    calls          what torch's profiler recorded, as a tree of calls
    places         which stage a call belongs to
    attribution    time and memory by stage
    summary        from times of calls to a report
    device         kernels of a GPU, and where the host waits for it
    state          what is put back afterwards
    advice, report one sentence, a table, JSON
"""

from .advice import Advice
from .report import Memory, Report, Stage
from .run import profile

__all__ = ["Advice", "Memory", "Report", "Stage", "profile"]
