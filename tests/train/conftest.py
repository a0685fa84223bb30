from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

# Bare machines (bench/gpu_check.sh) lack the training extra: there test_extra.py says so and the rest is left out.
NEEDED = ("accelerate", "PIL", "matplotlib", "safetensors", "typer", "yaml")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if MISSING:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name != "test_extra.py"]


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    from tests.train.common import write_photos

    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(autouse=True)
def one_thread():
    """Runs compared bit for bit use the same number of threads; one is fastest at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
