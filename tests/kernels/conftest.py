"""The same test bodies run on a CPU by Triton's interpreter and on a GPU by compiled kernels.

TRITON_INTERPRET is read when `triton` is imported and holds for the whole process, in which compiled kernels and
torch.compile then cannot run. So a plain `pytest` collects these tests for CUDA (marked `gpu`), and
`test_interpreter.py` runs them again in a process of their own, with the variable set, on CPU tensors.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.support import DTYPES, INTERPRET
from tests.ops.conftest import poisoned_outputs  # noqa: F401


@pytest.fixture
def device() -> str:
    if INTERPRET:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device (test_interpreter.py runs this test without one)")
    return "cuda"


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "device" in getattr(item, "fixturenames", ()) and not INTERPRET:
            item.add_marker(pytest.mark.gpu)
    if INTERPRET:
        config.hook.pytest_deselected(items=[item for item in items if _again(item)])
        items[:] = [item for item in items if not _again(item)]


def _again(item: pytest.Item) -> bool:
    """Whether the interpreter need not run a test, since it does so in float32."""
    return item.get_closest_marker("blocks") is not None and item.callspec.params["dtype"] is not torch.float32
