"""What a profile must say of the machine, and what advice depends on."""

from __future__ import annotations

import os

import torch

from maefast import doctor


def describe(device: str) -> str:
    """In one line."""
    cpu = doctor.cpu()
    if device == "cuda":
        gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        return f"{gpu}; {cpu['name']}, {cpu['usable']} CPUs; torch {torch.__version__}"
    threads = cpu["torch_threads"]
    return f"{cpu['name']}, {cpu['usable']} CPUs, {threads} thread{'s' * (threads != 1)}; torch {torch.__version__}"


def cpus() -> int:
    """How many may be used."""
    return doctor.cpu()["usable"]


def load() -> float | None:
    """Processes that wanted to run, on average over the last minute; None where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def idle_cpus() -> int:
    """How many CPUs may be used that torch does not use."""
    cpu = doctor.cpu()
    return max(0, cpu["usable"] - cpu["torch_threads"])


def has_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return bool(doctor.cpu()["features"].get("avx512bf16"))
