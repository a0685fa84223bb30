"""A kernel as it would be launched for one case on one architecture, and what it takes there."""

from __future__ import annotations

from typing import NamedTuple

from tests.kernels.occupancy import LIMITS, Occupancy, occupancy
from tests.kernels.resources import Code, Resources, read

TARGETS = (80, 90, 100)
ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}


class Variant(NamedTuple):
    """family, kernel: "embed", "gather_tokens_fwd_kernel". case: what it is compiled for. launch: a number that its
    compilations for several targets share. warps: of a block. dynamic: bytes of shared memory beyond the static ones.
    columns: of tensor memory. found: None where no tool could read it, or it did not compile, for which `error` gives
    the reason. language: "triton" or "cuda". code: until its accesses are counted."""

    family: str
    kernel: str
    case: str
    launch: int
    target: int
    warps: int
    dynamic: int = 0
    columns: int = 0
    found: Resources | None = None
    error: str = ""
    language: str = "triton"
    code: bytes = b""

    @property
    def shared(self) -> int:
        """Bytes of a block."""
        return self.dynamic + (self.found.shared if self.found else 0)

    @property
    def occupancy(self) -> Occupancy:
        return occupancy(self.target, self.warps, self.found.registers, self.shared, self.columns)

    def problem(self) -> str:
        """Why it is not acceptable, or ''."""
        if self.error:
            return self.error.splitlines()[0]
        if self.shared > LIMITS[self.target].shared_block:
            return f"{self.shared} bytes of shared memory"
        if self.found and self.found.spilled and "(large)" not in self.case:
            return f"spills: {self.found.spilled} bytes of local memory"
        return ""


def with_accesses(variants: list[Variant]) -> list[Variant]:
    """Those of one target, their accesses to memory counted."""
    known = [v for v in variants if v.code]
    found = iter(read([Code(v.found, v.code) for v in known], ARCHITECTURES[known[0].target]) if known else ())
    return [v._replace(found=next(found), code=b"") if v.code else v for v in variants]
