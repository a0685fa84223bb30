from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.common import write_photos


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(autouse=True)
def one_thread():
    """Runs compared bit for bit use the same number of threads; one is fastest at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
