"""The configuration of a pre-training run: one dataclass, checked before anything starts, dumped beside results."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from maefast.data.images.options import parse_value_range
from maefast.data.written import write_whole
from maefast.errors import ConfigError, need

from .parse import parse_numbers


@dataclass
class PretrainConfig:
    """Options of `maefast pretrain`, with its defaults; `maefast pretrain --help` says what each is. Counts of
    steps are optimizer steps. ConfigError: an option that makes no sense, here or in `check`."""

    data: str = ""
    column: str | None = None
    stream: bool = False
    shuffle: int = 1000
    output_dir: str = "out"
    # What is trained: a recipe of `maefast.recipes` in one of its sizes, or a masked model of images. None leaves a
    # choice to the recipe's, or the model's, own definition.
    recipe: str | None = None
    size: str | None = None
    model: str = "mae_base"
    model_args: dict[str, Any] = field(default_factory=dict)
    img_size: int | list[int] | None = None
    patch_size: int | None = None
    mask_ratio: float | None = None
    norm_pix: bool | None = None
    init_from: str | None = None
    init_ema: bool = False
    init_exact: bool = False
    recompute: bool = False
    # Length and optimisation.
    epochs: float = 400.0
    steps: int | None = None
    batch_size: int = 64
    accum: int = 1
    blr: float = 1.5e-4
    lr: float | None = None
    min_lr: float = 0.0
    warmup: float = 0.05
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = None
    optim_state: str = "fp32"
    # Augmentation.
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.5
    # Files to pixels.
    channels: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    value_range: list[float] | str = "auto"
    pixel_bits: int = 8
    max_pixels: int | None = None
    gpu_decode: bool = False
    # Machine.
    amp: str = "no"
    device: str = "auto"
    graph: str = "auto"
    fsdp: bool = False
    workers: int = field(default_factory=lambda: default_workers())
    cache_mb: int = 512
    skip_bad: bool = False
    seed: int = 0
    # Output.
    resume: str = "auto"
    save_every: int = 500
    keep: int = 3
    picture_every: int = 1000
    picture_rows: int = 6
    picture: str = "restored"
    log_every: int = 10
    tensorboard: bool = True
    wandb: str | None = None
    # What is learned: k-NN accuracy on the way.
    probe_every: int = 0
    probe_data: str | None = None
    probe_labels: str = "folders"

    def __post_init__(self) -> None:
        if isinstance(self.probe_data, os.PathLike):
            self.probe_data = str(self.probe_data)
        for name in ("data", "output_dir", "resume", "probe_labels"):
            value = getattr(self, name)
            if not isinstance(value, (str, os.PathLike)):
                raise ConfigError(f"{_flag(name)} must be a name, not {value!r}")
            setattr(self, name, str(value))
        for name in ("crop_scale", "crop_ratio", "betas"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(type(number) in (int, float) for number in value):
                raise ConfigError(f"{_flag(name)} wants two numbers, not {value!r}")
            setattr(self, name, tuple(value))
        if not isinstance(self.model_args, dict):
            raise ConfigError(f"model_args wants names and values, not {self.model_args!r}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, parse_numbers(_flag(name), value))
        if isinstance(self.value_range, tuple):
            self.value_range = list(self.value_range)
        if isinstance(self.img_size, (tuple, list)):
            self.img_size = self.img_size[0] if len(self.img_size) == 1 else list(self.img_size)

    def check(self, *, writes: bool = True) -> None:
        """Raise ConfigError for the first option that makes no sense. `writes`: something into `output_dir`."""

        def must(good: bool, text: str) -> None:
            if not good:
                raise ConfigError(text)

        for entry in fields(self):
            value, (wanted, *optional) = getattr(self, entry.name), str(entry.type).split(" | ")
            if wanted in _TYPES and len(optional) < 2 and not (optional and value is None):
                kinds = (int, float) if wanted == "float" else (_TYPES[wanted],)
                must(type(value) in kinds, f"{_flag(entry.name)} must be {wanted}, not {value!r}")
        must(
            bool(self.data),
            "--data is missing: give a folder, a list or tars of images, or 'skimage' for the shipped photographs"
            if self.recipe is None
            else f"--data is missing: give a folder, or 'demo' for what ships with the recipe {self.recipe}",
        )
        must(
            self.size is None or self.recipe is not None,
            "--size goes with --recipe; a --model has its size in its name",
        )
        for name in ("init_ema", "init_exact"):
            must(self.init_from is not None or not getattr(self, name), f"{_flag(name)} goes with --init-from")
        must(
            not self.stream or self.steps is not None,
            "--stream does not know how many samples there are: --steps, in place of --epochs, says how long a run is",
        )
        for name in ("batch_size", "accum", "shuffle", "save_every", "keep", "log_every"):
            must(getattr(self, name) >= 1, f"{_flag(name)} must be at least 1, not {getattr(self, name)}")
        for name in ("workers", "cache_mb", "picture_every", "picture_rows", "probe_every", "weight_decay", "min_lr"):
            value = getattr(self, name)
            must(value >= 0 and math.isfinite(value), f"{_flag(name)} must not be negative, and is {value}")
        must(
            bool(self.probe_every) == (self.probe_data is not None),
            f"--probe-every {self.probe_every} needs --probe-data: samples with classes"
            if self.probe_every
            else f"--probe-data {self.probe_data}: --probe-every N says when it is looked at",
        )
        must(0 <= self.seed < 2**63, f"--seed must lie in 0 … 2**63-1, not {self.seed}")
        must(
            self.mask_ratio is None or 0 < self.mask_ratio < 1,
            f"--mask-ratio must lie strictly between 0 and 1, not {self.mask_ratio}",
        )
        must(self.steps is None or self.steps >= 1, f"--steps must be at least 1, not {self.steps}")
        must(self.epochs > 0 and math.isfinite(self.epochs), f"--epochs must be positive, not {self.epochs}")
        must(self.blr > 0 and math.isfinite(self.blr), f"--blr must be positive, not {self.blr}")
        must(self.lr is None or 0 < self.lr < math.inf, f"--lr must be positive, not {self.lr}")
        must(self.clip is None or 0 < self.clip < math.inf, f"--clip must be positive, not {self.clip}")
        must(len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), f"--betas lie in [0, 1): {self.betas}")
        must(self.warmup >= 0 and math.isfinite(self.warmup), f"--warmup must not be negative, and is {self.warmup}")
        must(0 <= self.flip <= 1, f"--flip is a probability, not {self.flip}")
        low, high = self.crop_scale if len(self.crop_scale) == 2 else (0, 0)
        must(0 < low <= high <= 1, f"--crop-scale needs 0 < low <= high <= 1, not {self.crop_scale}")
        low, high = self.crop_ratio if len(self.crop_ratio) == 2 else (0, 0)
        must(0 < low <= high < math.inf, f"--crop-ratio needs 0 < low <= high, not {self.crop_ratio}")
        must(
            self.init_from is None or self.resume in ("auto", "none"),
            "give --init-from or --resume PATH, not both: a checkpoint of a run brings its own weights",
        )
        if writes:
            must_take_files("--output-dir", Path(self.output_dir))
        must(self.amp in ("no", "bf16", "fp16"), f"--amp must be no, bf16 or fp16, not {self.amp!r}")
        must(self.optim_state in ("fp32", "bf16"), f"--optim-state must be fp32 or bf16, not {self.optim_state!r}")
        must(self.pixel_bits in (8, 16), f"--pixel-bits must be 8 or 16, not {self.pixel_bits}")
        must(self.max_pixels is None or self.max_pixels >= 0, f"--max-pixels must not be negative: {self.max_pixels}")
        parse_value_range(self.value_range)
        must(self.channels is None or self.channels >= 1, f"--channels must be at least 1, not {self.channels}")
        must(
            self.channels is not None or (self.mean is None and self.std is None),
            "--mean and --std go with --channels; photographs are normalised as ImageNet's are",
        )
        must(self.std is None or min(self.std) > 0, f"--std must be positive, not {self.std}")
        must(
            self.channels is None or self.pixel_bits == 8,
            "--pixel-bits is for photographs: with --channels values are taken as they are",
        )
        must(self.wandb != "", "--wandb wants the name of a project")
        must(
            not self.gpu_decode or (self.channels is None and self.pixel_bits == 8 and self.value_range == "auto"),
            "--gpu-decode is for photographs of eight bits: without --channels, --pixel-bits 16 and --value-range",
        )
        must(
            not (self.gpu_decode and self.stream),
            "--gpu-decode is for data with an index: without --stream",
        )
        must(self.picture in PICTURES, f"--picture must be {' or '.join(PICTURES)}, not {self.picture!r}")
        must(self.device in ("auto", "cpu"), f"--device must be auto or cpu, not {self.device!r}")
        must(self.graph in ("auto", "on", "off"), f"--graph must be auto, on or off, not {self.graph!r}")
        sizes = self.img_size if isinstance(self.img_size, list) else [self.img_size]
        must(
            len(sizes) <= 2 and len(sizes) > 0 and all(s is None or s >= 1 for s in sizes),
            f"--img-size cannot be {self.img_size}",
        )
        if self.patch_size is not None:
            must(self.patch_size >= 1, f"--patch-size must be at least 1, not {self.patch_size}")
            for size in sizes:
                must(
                    size is None or size % self.patch_size == 0,
                    f"--img-size {size} is not a multiple of --patch-size {self.patch_size}",
                )

    @property
    def title(self) -> str:
        """What is trained, as messages and pictures name it."""
        return self.model if self.recipe is None else " ".join(filter(None, (self.recipe, self.size)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return json.loads(json.dumps(asdict(self)))

    def dump(self, path: Path, **more: Any) -> None:
        """Write the configuration as YAML, which `--config` reads back; `more` is added as a comment for readers."""
        import yaml

        comment = "".join(f"# {name}: {json.dumps(value)}\n" for name, value in more.items())
        text = comment + yaml.safe_dump(self.to_dict(), sort_keys=False)
        write_whole(path, lambda temporary: temporary.write_text(text))


def must_take_files(option: str, folder: Path) -> None:
    """ConfigError: nothing can be written below `folder`, which `option` names and which need not exist yet."""
    path = folder
    while not path.exists() and path != path.parent:
        path = path.parent
    if not path.is_dir():
        raise ConfigError(f"{option} {folder}: {path} is not a folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {folder}: {path} may not be written to; give another folder")


def load_config(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file of PretrainConfig's fields; unknown names are an error."""
    try:
        import yaml
    except ImportError as error:
        raise need("pyyaml", "Reading a configuration file") from error
    try:
        document = yaml.load(Path(path).read_text(), Loader=_loader(yaml))  # JSON is YAML
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: no text ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not valid YAML or JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"--config {path}: expected names and values")
    unknown = sorted(set(document) - {f.name for f in fields(PretrainConfig)})
    if unknown:
        raise ConfigError(f"--config {path}: unknown names {', '.join(map(str, unknown))}")
    counts = {f.name for f in fields(PretrainConfig) if str(f.type).startswith("int")}
    for name, value in document.items():
        if name in counts and isinstance(value, float) and value.is_integer():  # steps: 1e5
            document[name] = int(value)
    return document


def _loader(yaml: Any) -> type:
    """PyYAML's safe loader with words as in YAML 1.2 and JSON: 1e-3 is a number, and no and off are no booleans."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.yaml_implicit_resolvers = {
        start: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:bool"]
        for start, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
    number = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def default_workers() -> int:
    """Up to 8 loader processes, with a core left for the step itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores - 1))


PICTURES = ("restored", "raw")
_TYPES = {"int": int, "float": float, "bool": bool, "str": str}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# Fields whose change leaves the loss sequence of a resumed run as it was.
HARMLESS = {
    "output_dir", "resume", "save_every", "keep", "picture_every", "picture_rows", "picture", "log_every",
    "tensorboard", "wandb", "max_pixels", "workers", "cache_mb", "init_from", "init_ema", "init_exact", "recompute",
    "skip_bad", "graph", "fsdp", "data", "column", "epochs", "steps", "probe_every", "probe_data", "probe_labels",
}  # fmt: skip


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines "name: old -> new" for every option whose change alters the loss sequence. (The data and the length of the
    run are compared by what they come to: the list of images and the number of steps.)"""
    names = [f.name for f in fields(PretrainConfig) if f.name not in HARMLESS | {"model_args"}]
    lines = [f"{name}: {old[name]} -> {new[name]}" for name in names if name in old and old[name] != new[name]]
    then, now = (options.get("model_args", {}) for options in (old, new))
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return lines + [f"{name}: {then.get(name)} -> {now.get(name)}" for name in names]
