"""The tests here are about what accelerated code computes: it runs, however small the model is."""

import pytest

from maefast.integrations import _worth


@pytest.fixture(autouse=True)
def _always(request):
    if "worth" in request.node.path.name:
        yield
        return
    with _worth.always():
        yield
