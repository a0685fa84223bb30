"""Compile every Triton kernel for sm_80, sm_90 and sm_100 without a GPU: `python -m tests.kernels.compile_all`.

The launchers run on meta tensors and their launches are recorded, not executed, so exactly what they would launch
(their own block sizes, warps and specialisations) is compiled. What the machine code takes is printed for each launch
and each kernel of CUDA C++, and shown by docs/kernels.md, which is written anew where it showed something else. Exit
status 1 where a kernel does not compile, a variant of a common shape spills, or the page was out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from tests.kernels import cuda_variants, page, resources
from tests.kernels.compile_cases import CASES
from tests.kernels.variants import TARGETS, Variant, with_accesses

TILES = ("BLOCK", "COLS", "PARTS", "PIX", "REGISTERS", "ROWS", "SITES", "TAPS", "TENSORS", "UNIT", "WARPS")


class Launch(NamedTuple):
    """One recorded launch, as Triton would specialise it."""

    case: str
    module: str
    kernel: str
    signature: dict
    constants: dict
    attributes: dict
    options: dict

    def family(self) -> str:
        return self.module.rpartition(".")[2].removesuffix("_kernel").strip("_")

    def text(self) -> str:
        """The case, and what the launcher chose for it: tiles and switches."""
        chosen = [
            name if value is True else f"{name} {value}"
            for name, value in self.constants.items()
            if name.isupper() and value is not False and (value is True or name.split("_")[0] in TILES)
        ]
        return "; ".join(filter(None, (self.case.strip(), ", ".join(chosen))))


DIVISIBLE = [["tt.divisibility", 16]]


def kind_of(value, special: bool) -> tuple[str, bool]:
    """The type that Triton gives an argument, and whether it takes it for a multiple of 16."""
    if isinstance(value, torch.Tensor):
        short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
        return "*" + (short.get(value.dtype) or f"i{8 * value.element_size()}"), special
    if isinstance(value, float):
        return "fp32", False
    return "i32" if -(2**31) <= value < 2**31 else "i64", special and value % 16 == 0


def record(full: bool) -> list[Launch]:
    """Every distinct launch of the cases."""
    from triton.runtime.jit import JITFunction

    seen: dict[str, Launch] = {}
    label = ""

    def run(self, *args, grid, warmup, **kwargs):
        signature, constants, attributes, options = {}, {}, {}, {}
        bound = dict(zip(self.arg_names, args))
        bound.update({key: value for key, value in kwargs.items() if key in self.arg_names})
        options = {key: value for key, value in kwargs.items() if key not in self.arg_names}
        assert set(bound) == set(self.arg_names)
        assert min(grid) > 0
        for position, param in enumerate(self.params):
            value = bound[param.name]
            special = not param.do_not_specialize
            if isinstance(value, tuple):
                kinds = [kind_of(item, special) for item in value]
                signature[param.name] = tuple(kind for kind, _ in kinds)
                attributes.update({(position, i): DIVISIBLE for i, (_, whole) in enumerate(kinds) if whole})
                continue
            if param.is_constexpr or value is None or (special and type(value) is int and value == 1):
                signature[param.name], constants[param.name] = "constexpr", value
                continue
            signature[param.name], whole = kind_of(value, special)
            if whole:
                attributes[(position,)] = DIVISIBLE
        launch = Launch(label, self.fn.__module__, self.fn.__name__, signature, constants, attributes, options)
        seen.setdefault(repr(launch[1:]), launch)

    original, JITFunction.run = JITFunction.run, run
    try:
        for cases in CASES:
            for label, op, args in cases(full):  # noqa: B007 (run reads it)
                op(*args)
    finally:
        JITFunction.run = original
    return list(seen.values())


def compile_one(job: tuple[int, Launch, int]) -> Variant:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    number, launch, target = job
    made = Variant(launch.family(), launch.kernel, launch.text(), number, target, launch.options["num_warps"])
    try:
        function = getattr(importlib.import_module(launch.module), launch.kernel)
        source = ASTSource(function, launch.signature, launch.constants, launch.attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=launch.options)
    except Exception as error:
        return made._replace(error=f"{type(error).__name__}: {error}")
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    made = made._replace(dynamic=kernel.metadata.shared, columns=columns)
    if resources.tools() is None:
        return made
    code = resources.load(kernel.asm["cubin"])[kernel.metadata.name]
    return made._replace(found=code.resources, code=code.instructions)


def compilers() -> str:
    """Triton and the assemblers that it calls, with their versions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    named = {}
    for target in TARGETS:
        release = re.search(r"V(\d[\d.]*)", make_backend(GPUTarget("cuda", target, 32)).hash())
        named.setdefault(release.group(1) if release else "unknown", []).append(f"sm_{target}")
    assemblers = ", ".join(f"ptxas {release} for {' and '.join(kinds)}" for release, kinds in named.items())
    return f"Triton {triton.__version__}, {assemblers}"


def run_all(full: bool = False, targets=TARGETS, jobs: int = 2, nvcc: bool = True) -> list[Variant]:
    """Those of Triton in the order of the cases, then those of CUDA C++."""
    work = [(number, launch, target) for number, launch in enumerate(record(full)) for target in targets]
    with ProcessPoolExecutor(jobs) as pool:
        others = []
        if resources.tools() is not None:
            others = [pool.submit(cuda_variants.variants, target, nvcc) for target in targets]
        made = list(pool.map(compile_one, work, chunksize=2))
        made += [variant for other in others for variant in other.result()]
        groups = [[v for v in made if v.target == target] for target in targets]
        done = [variant for group in pool.map(with_accesses, groups) for variant in group]
    return sorted(done, key=lambda v: (v.language != "triton", v.launch, targets.index(v.target)))


def show(v: Variant) -> str:
    if v.found is None:
        return f"{v.kernel:28} {v.target:4} {v.warps:5}{'':38}  {v.case}"
    widest = [max(widths, default=0) for widths in (v.found.loads, v.found.stores)]
    numbers = f"{v.warps:5} {v.found.registers:4} {v.found.spilled:5} {v.shared:6} {v.occupancy.share:4.0%}"
    return f"{v.kernel:28} {v.target:4} {numbers} {widest[0]:4} {widest[1]:5}  {v.case}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--full", action="store_true", help="every dtype, size and flag; ten minutes on two cores")
    parser.add_argument("--check", action="store_true", help="say if docs/kernels.md is out of date, do not write it")
    parser.add_argument("--no-nvcc", action="store_true", help="CUDA C++ only from the library, if one was built")
    parser.add_argument("--adopt", action="store_true", help="write it with these compilers, whichever it names")
    args = parser.parse_args()
    start = time.perf_counter()
    made = run_all(args.full, args.targets, args.jobs, not args.no_nvcc)
    print(f"{'kernel':28} {'sm':>4} warps regs spill shared  occ load store  case")
    for v in made:
        print(show(v) + ("  <-- " + v.problem() if v.problem() else ""))
    bad = [v for v in made if v.problem()]
    status = 1 if bad else 0
    if resources.tools() is None:
        print("no cuobjdump found: registers and spills are not known")
    elif not bad and not args.full and set(args.targets) == set(TARGETS):
        named = {"triton": compilers(), "cuda": cuda_variants.compiler()}
        sections = [page.Section(name, what, [v for v in made if v.language == name]) for name, what in named.items()]
        fresh, notes = page.update(sections, write=not args.check, adopt=args.adopt)
        print(*notes, sep="\n")
        status = 0 if fresh else 1
    print(
        f"compiled {len(made) - len(bad)} of {len(made)} (kernel, target) pairs, "
        f"{sum(v.language == 'cuda' for v in made)} of them CUDA C++, "
        f"in {time.perf_counter() - start:.0f} s, {len(bad)} problems"
    )
    return status


if __name__ == "__main__":
    sys.exit(main())
