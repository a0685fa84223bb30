"""Choices and arguments that commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .train.options import HELP


class Amp(str, Enum):
    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class OptimState(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"


class AnyDevice(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Graph(str, Enum):
    auto = "auto"
    on = "on"
    off = "off"


class Picture(str, Enum):
    restored = "restored"
    raw = "raw"


class Pool(str, Enum):
    mean = "mean"
    cls = "cls"
    both = "both"
    attentive = "attentive"


class Format(str, Enum):
    timm = "timm"
    hf = "hf"
    hf4 = "hf4"
    hf_mae = "hf-mae"
    mae = "mae"
    official = "official"


# Arguments that several commands share.
Source = Annotated[
    Path,
    typer.Argument(
        help="A run, a checkpoint, .safetensors, .pth, .ckpt, or a folder of Hugging Face.", show_default=False
    ),
]
Name = Annotated[
    str | None,
    typer.Option(help="Model of a file whose shapes do not tell (mae_base, ...).", show_default=False),
]
ImgSize = Annotated[
    str | None,
    typer.Option(help="Image size, N or HEIGHTxWIDTH, of a file that does not tell.", show_default=False),
]
Heads = Annotated[
    str | None,
    typer.Option(help="Attention heads, ENCODER or ENCODER,DECODER, of a file that does not tell.", show_default=False),
]
ValueRange = Annotated[str | None, typer.Option(help=HELP["Data"]["value_range"], show_default="the run's, or auto")]
MaxPixels = Annotated[int | None, typer.Option(help=HELP["Data"]["max_pixels"], show_default="179 million")]
Ema = Annotated[bool, typer.Option("--ema", help="Take the running average (EMA) that the file holds.")]
