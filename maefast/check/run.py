"""`maefast accelerate-check`: two copies of a user's model, one of them accelerated, held against each other here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

from maefast import integrations
from maefast.errors import ConfigError
from maefast.profiling import machine
from maefast.profiling.state import unchanged

from . import factories, inputs, parity, speed
from .found import Check

DTYPES = ("float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")


def accelerate_check(
    factory: str,
    shapes: Sequence[str] = (),
    batch: str | None = None,
    *,
    batch_size: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    training: bool = True,
    seconds: float = 5.0,
    say: Callable[[str], object] = print,
) -> Check:
    """What `maefast.accelerate` would replace in a model, whether it computes the same then, and how fast it is here.

    The model is made twice from one seed. Parity is that of one call from the same random state: of all that the model
    returns, and of the gradients of its loss (a scalar that it returns alone, first or as ``.loss``) and of all that it
    returns (a sum, weighted by fixed random numbers). What is timed is forward and backward of its loss, or of that sum
    where it has none. torch, numpy and Python are seeded.

    Args:
        factory: MODULE:NAME or FILE.py:NAME of a function or class that makes the model.
        shapes: of the inputs, such as "8x3x224x224" or "pixel_values=8x3x224x224". batch: as `factory`, of a function
            that gives the input. Without either it is guessed. batch_size: of a guess.
        dtype: "float32", or "bfloat16" for autocast. device: "auto" is CUDA where there is a device.
        training: or evaluating, without gradients. seconds: for the times; comparing takes a few steps before.

    Raises:
        ConfigError: an option makes no sense, there is no such factory, it raises or makes no model, or the model
            refuses its input.
    """
    if dtype not in DTYPES or device not in DEVICES:
        raise ConfigError(f"choose a dtype from {', '.join(DTYPES)} and a device from {', '.join(DEVICES)}")
    if not seconds > 0:
        raise ConfigError(f"--seconds must be above 0, got {seconds}")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {batch_size}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    narrow = dtype == "bfloat16"
    make, load = factories.load(factory), None if batch is None else factories.load(batch)
    own, fast = _twins(make, factory, device, training)
    parity.seed()
    given = inputs.given(own, shapes, load, batch or "", batch_size)
    with unchanged(own, None), torch.no_grad(), parity.cast(device, narrow):
        parity.seed()
        parity.weighted(inputs.fits(given, own))
    where = machine.describe(device)
    say(where)
    say(f"{type(own).__name__} of {factory}, {'training' if training else 'evaluating'}, {dtype}: {given.text}\n")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "maefast.accelerate: nothing to accelerate")  # which the report says
        integrations.accelerate(fast)
    report = integrations.report(fast)
    found: list[parity.Difference] = []
    times = None
    if report.replaced:
        found = parity.compare(own, fast, given, device, narrow, training)
        report = integrations.report(fast)  # with what ran
        if not _equal(found) and not _equal(parity.compare(own, own, given, device, narrow, training)):
            raise ConfigError(
                f"{type(own).__name__} computes something else at every call, from the same random state: nothing can "
                "be compared"
            )
        if _equal(found):
            steps = tuple(_step(model, given, device, narrow, training) for model in (own, fast))
            times = speed.measure(steps, (own, fast), seconds, device)
    what = where, factory, type(own).__name__, given.text, device, dtype, training
    return Check(*what, report, tuple(found), times)


def _equal(found: Sequence[parity.Difference]) -> bool:
    return all(difference.equal for difference in found)


def _twins(make: Callable, factory: str, device: str, training: bool) -> tuple[nn.Module, nn.Module]:
    """Two models with the same weights."""
    made = []
    for _ in range(2):
        parity.seed()
        made.append(factories.model(make, factory).to(device).train(training))
    own, fast = made
    if own is fast:
        raise ConfigError(f"{factory} gives the same model twice: name a function that makes a new one")
    try:
        fast.load_state_dict(own.state_dict())  # a factory may draw from elsewhere
    except RuntimeError as error:
        raise ConfigError(f"{factory} makes another model each time: {next(iter(str(error).splitlines()))}") from error
    return own, fast


def _step(model: nn.Module, given: inputs.Given, device: str, narrow: bool, training: bool) -> Callable[[], None]:
    weights: list[torch.Tensor] = []

    def step() -> None:
        with parity.cast(device, narrow):
            output = given(model)
            loss = parity.loss(output)
            if loss is None or not loss.requires_grad:
                if not weights:
                    weights.extend(parity.weights(output))
                loss = parity.weighted(output, weights)
        if loss.requires_grad:
            loss.backward()
            model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward() -> None:
        with parity.cast(device, narrow):
            given(model)

    return step if training else forward
