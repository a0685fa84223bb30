"""One sentence on what bounds a step, with the option that would help."""

from __future__ import annotations

import math
from dataclasses import dataclass

DATA_BOUND, LAUNCH_BOUND, MEMORY_BOUND, GEMM_BOUND, HOST_BOUND = (
    "data-bound", "launch-bound", "memory-bound", "GEMM-bound", "host-bound",
)  # fmt: skip
WAITS = 0.2  # share of a step from which on waiting for a batch is what to mend first


@dataclass(frozen=True)
class Advice:
    """kind: data-bound, launch-bound, memory-bound or GEMM-bound; host-bound where the time is in other libraries' C
    functions. sentence: for a person. option: what it names, or None where no option would help."""

    kind: str
    sentence: str
    option: str | None


@dataclass(frozen=True)
class Facts:
    """What advice is made of. Shares of the time of a step, which add up to one:

        data: waiting for a batch. launch: Python, autograd and ops too small to be more than their call; on a GPU the
        time that it is idle. products: matrix products, convolutions, attention. memory: all other ops. elsewhere: C
        functions that are no ops.

    ops: how many a step calls. dtype: of most products. largest: the stage with most of `memory`. culprit: the C
    function with most of `elsewhere`. workers: processes that load data, None if unknown. bfloat16: whether the device
    multiplies it faster. replaceable: whether `maefast.accelerate` knows the model and was not used. graphed: whether
    the loop of the run takes CUDA graphs by itself. command: whether options of the command line can be named.
    idle_cpus: that torch does not use. waits: how often the host waits for the device.
    """

    device: str
    data: float
    launch: float
    products: float
    memory: float
    elsewhere: float = 0.0
    ops: int = 0
    dtype: str = "float32"
    largest: str = ""
    culprit: str = ""
    workers: int | None = None
    cpus: int = 1
    bfloat16: bool = False
    replaceable: bool = False
    narrow: bool = False
    graphed: bool = False
    command: bool = False
    idle_cpus: int = 0
    waits: int = 0

    @property
    def kind(self) -> str:
        if self.data >= WAITS:
            return DATA_BOUND
        shares = {
            LAUNCH_BOUND: self.launch, GEMM_BOUND: self.products, MEMORY_BOUND: self.memory, HOST_BOUND: self.elsewhere,
        }  # fmt: skip
        return max(shares, key=shares.__getitem__)


def advise(facts: Facts) -> Advice:
    kind = facts.kind
    why, remedy, option = {
        DATA_BOUND: _data, LAUNCH_BOUND: _launch, MEMORY_BOUND: _memory, GEMM_BOUND: _gemm, HOST_BOUND: _host,
    }[kind](facts)  # fmt: skip
    return Advice(kind, f"{kind[0].upper()}{kind[1:]}: {why}; {remedy}.", option)


Parts = tuple[str, str, str | None]  # what is so, what would help, the option
Remedy = tuple[str, str | None]


def _data(facts: Facts) -> Parts:
    why = f"{facts.data:.0%} of a step is spent waiting for its batch"
    workers = facts.workers or 0
    # What loads a batch in the time of waiting and step together has to do it in that of the step.
    needed = math.ceil(max(1, workers) / max(1e-3, 1.0 - facts.data))
    if needed > max(facts.cpus, 1 + workers):
        few = f"{needed} loading processes would keep up and there are {facts.cpus} CPUs: smaller files help"
        if facts.command:
            return why, f"{few}, and --cache-mb where they fit into memory", "--cache-mb"
        return why, few, None
    if facts.command:
        return why, f"--workers {needed} would keep up", "--workers"
    return why, f"a DataLoader with num_workers={needed} would keep up", "num_workers"


def _launch(facts: Facts) -> Parts:
    if facts.device == "cuda":
        why = f"the device is idle for {facts.launch:.0%} of a step, behind Python and {facts.ops} kernels"
        if facts.waits:
            why += f", and the host waits for it {facts.waits} times"
        return why, *_graph(facts)
    why = f"{facts.launch:.0%} of a step passes between {facts.ops} ops and in those that do little"
    if facts.replaceable:
        return why, "maefast.accelerate(model) calls fewer", "maefast.accelerate"
    if facts.command:
        return why, "a larger --batch-size shares that among more samples", "--batch-size"
    return why, "a larger batch shares that among more samples", None


def _graph(facts: Facts) -> Remedy:
    if facts.graphed:
        return "maefast pretrain replays it as one CUDA graph, and --graph on says where it cannot", "--graph"
    if facts.command:
        return "--graph on would replay it as one CUDA graph", "--graph"
    return "maefast.graphed_step(model, optimizer) would replay it as one CUDA graph", "maefast.graphed_step"


def _gemm(facts: Facts) -> Parts:
    why = f"{facts.products:.0%} of a step is matrix products, convolutions and attention, in {facts.dtype}"
    return why, *(
        _float32(facts) or _bfloat16(facts) or _accelerate(facts) or _more_cpus(facts) or _nothing("multiplies faster")
    )


def _memory(facts: Facts) -> Parts:
    why = f"{facts.memory:.0%} of a step is ops that move much and compute little, most of it in {facts.largest}"
    if facts.largest == "optimizer":
        return why, *_narrower(facts)
    return why, *(
        _float32(facts) or _accelerate(facts) or _bfloat16(facts) or _more_cpus(facts) or _nothing("moves less")
    )


def _host(facts: Facts) -> Parts:
    why = f"{facts.elsewhere:.0%} of a step is C code that is none of torch's ops, most of it in {facts.culprit}"
    return why, "move it out of the step, into the processes that load data", None


def _narrower(facts: Facts) -> Remedy:
    if facts.narrow and facts.command:
        return "a larger --batch-size takes fewer steps", "--batch-size"
    if facts.command:
        return "--optim-state bf16 halves what AdamW keeps and moves", "--optim-state"
    return "maefast.optim.AdamW(state_dtype=torch.bfloat16) halves what it keeps and moves", "maefast.optim.AdamW"


def _float32(facts: Facts) -> Remedy | None:
    if facts.dtype not in ("bfloat16", "float16") or facts.device != "cpu" or facts.bfloat16:
        return None
    said = "this processor has no instructions for them, and float32 is faster on it"
    return (f"{said}: --amp no", "--amp") if facts.command else (f"{said}: leave out autocast", None)


def _bfloat16(facts: Facts) -> Remedy | None:
    if facts.dtype not in ("float32", "float64") or not facts.bfloat16:
        return None
    if facts.command:
        return "--amp bf16 multiplies faster and moves half the bytes", "--amp"
    return "torch.autocast in torch.bfloat16 multiplies faster and moves half the bytes", "torch.autocast"


def _accelerate(facts: Facts) -> Remedy | None:
    if not facts.replaceable:
        return None
    return "maefast.accelerate(model) does the same with fused kernels", "maefast.accelerate"


def _more_cpus(facts: Facts) -> Remedy | None:
    if facts.device != "cpu" or not facts.idle_cpus:
        return None
    return f"torch uses {facts.cpus - facts.idle_cpus} of {facts.cpus} CPUs: raise OMP_NUM_THREADS", "OMP_NUM_THREADS"


def _nothing(what: str) -> Remedy:
    return f"no option of maefast {what} here, a smaller model or other hardware would", None
