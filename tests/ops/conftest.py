"""Every output that a kernel of these tests allocates starts as NaN (integers: as the largest value)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_outputs():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all(), "the poison does not work: a kernel could leave elements unwritten unseen"
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill
