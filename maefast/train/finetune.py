"""`maefast finetune`: see `maefast.finetune`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from maefast.data.source import Source
from maefast.data.written import write_whole
from maefast.errors import ConfigError
from maefast.finetune.began import BEGAN, Began, digest_of_names, digest_of_weights
from maefast.finetune.classifier import timm_state
from maefast.finetune.data import LabelledSource
from maefast.finetune.judge import Judge
from maefast.finetune.layers import Published, published
from maefast.finetune.recipe import Classify
from maefast.models import FCMAE, MaskedAutoencoderViT, SparK
from maefast.models.convert import encoder_state
from maefast.probe.accuracy import Accuracy, majority
from maefast.probe.data import Labelled, held_back, labelled
from maefast.probe.samples import fixed
from maefast.recipes.masked_images import MaskedImages

from . import checkpoint
from .config import PretrainConfig
from .loop import Result, Run
from .probe import drawn, overlap
from .reopen import Opened, open_recipe
from .resume import model_changes

BETAS = (0.9, 0.999)
# Options of a run that say how its images are read.
_OF_DATA = ("value_range", "pixel_bits", "max_pixels", "channels", "mean", "std")

# Options of a run that are options here.
_RUN = (
    "epochs", "steps", "batch_size", "accum", "blr", "lr", "weight_decay", "warmup", "crop_scale", "flip", "skip_bad",
    "workers", "amp", "device", "seed", "resume", "save_every", "wandb",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """How `finetune` is asked. None: the published value of the nearest size (`maefast.finetune.layers`), or what is
    said here. Raises ConfigError for what makes no sense.

    Attributes:
        labels, val_labels: see `maefast.probe.labels.read_labels`; val_labels None: as `labels`.
        val_data: samples that are held back; None: `val_share` of each class, drawn with `seed`.
        eval_every: steps between accuracies; None: an epoch's. run: further fields of `PretrainConfig`.
    """

    labels: str = "folders"
    val_data: str | None = None
    val_labels: str | None = None
    val_share: float = 0.2
    layer_decay: float | None = None
    drop_path: float | None = None
    smoothing: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    ema_decay: float | None = None
    eval_every: int | None = None
    run: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.val_labels is not None and self.val_data is None:
            raise ConfigError("--val-labels needs --val-data, whose classes they are; those of --data are --labels")
        if self.val_data is not None and self.val_share != type(self).val_share:
            raise ConfigError("give --val-data or --val-share, not both")
        for name, good, wanted in (
            ("val_share", lambda value: 0 < value < 1, "above 0 and below 1"),
            ("layer_decay", lambda value: 0 < value <= 1, "above 0 and at most 1"),
            ("drop_path", lambda value: 0 <= value < 1, "at least 0 and below 1"),
            ("smoothing", lambda value: 0 <= value < 1, "at least 0 and below 1"),
            ("mixup", lambda value: 0 <= value < float("inf"), "at least 0, and finite"),
            ("cutmix", lambda value: 0 <= value < float("inf"), "at least 0, and finite"),
            ("ema_decay", lambda value: 0 <= value < 1, "at least 0 and below 1"),
            ("eval_every", lambda value: value >= 1, "at least 1"),
        ):
            value = getattr(self, name)
            if value is not None and not good(value):
                raise ConfigError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")
        known = {entry.name for entry in fields(PretrainConfig)}
        if unknown := set(self.run or {}) - known:
            raise ConfigError(f"run has no {', '.join(sorted(unknown))}")
        for winner, loser in (("steps", "epochs"), ("lr", "blr")):
            if {winner, loser} <= set(self.run or {}):
                raise ConfigError(f"give --{winner} or --{loser}, not both")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Of what was given on the command line, where other names are passed over."""
        mine = {entry.name for entry in fields(cls)} - {"run"}
        run = {key: value for key, value in given.items() if key in _RUN}
        return cls(**{key: value for key, value in given.items() if key in mine}, run=run)


class FineTuning(Run):
    """The loop of pre-training on a `Classify`, which is judged on the way."""

    folder_option = "--output"

    def __init__(self, config: PretrainConfig, make: Callable[[], Classify], held: Labelled) -> None:
        self._held = held
        super().__init__(config, lambda name, **arguments: make())

    def _resume(self, path: Path) -> None:
        state = checkpoint.read_state(path)
        if not model_changes(state.model_config, self.model_config):  # else there is a better word for what is wrong
            _same_average(state.config["model_args"], self.config.model_args)
            self.source.began, notes = self.source.began.going_on(state.extra.get(BEGAN))
            for line in notes:
                self._say(line)
        super()._resume(path)

    def _watch(self) -> Judge:
        config = self.config
        return Judge(
            self._held,
            self.out / "accuracy.csv",
            self.done,
            batch_size=config.batch_size,
            workers=config.workers,
            skip_bad=config.skip_bad,
            autocast=self.accelerator.autocast if config.amp != "no" else None,
        )


def _same_average(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ConfigError: one of two runs averages its weights, and the other does not."""
    before, given = (options.get("ema_decay", 0.0) for options in (then, now))
    if bool(before) != bool(given):
        raise ConfigError(
            f"the run to go on with has --ema-decay {before:g}, and now it is {given:g}: an average cannot begin, or "
            "end, on the way. Give that one again, or begin anew in another --output"
        )


def finetune(
    path: str | Path,
    data: str,
    output: str | Path = "finetune",
    options: Options | None = None,
    *,
    name: str | None = None,
    img_size: int | Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    ema: bool = False,
    say: Callable[[str], object] = print,
) -> dict[str, Any] | None:
    """Train a classifier of the encoder at `path` on the samples `data`, and say how often it is right on others.

    Leaves in the folder `output`: finetune.json, model.safetensors (timm's names), accuracy.csv, metrics.csv,
    loss_curve.png, config.yaml, checkpoints/. `name`, `img_size`, `heads`, `ema`: see `reopen.open_recipe`.

    Returns what stands in finetune.json; None where a signal ended the run early, and on all processes but the main
    one.

    Raises:
        TrainError: each says what to do.
    """
    options, output = options or Options(), Path(output)
    if int(os.environ.get("RANK", "0")):
        say = _quiet
    opened = open_recipe(path, name, img_size, heads, ema, say)
    model = getattr(opened.recipe, "model", None)
    if not isinstance(opened.recipe, MaskedImages) or not isinstance(model, (MaskedAutoencoderViT, FCMAE, SparK)):
        raise ConfigError(
            f"{path} holds a {opened.recipe.config.get('name')}; fine-tuned are mae_*, spark_* and fcmae_* models: "
            "`maefast export` writes other encoders, where they have a layout, for timm's or the authors' script"
        )
    usual = published(model)
    chosen = {key: getattr(usual if getattr(options, key) is None else options, key) for key in _CHOSEN}
    config = _config(opened, data, output, options, usual, chosen | {"labels": options.labels})
    try:
        config.check()
    except ConfigError as error:
        raise ConfigError(str(error).replace("--output-dir ", "--output ")) from error
    source, held, classes, notes = _data(opened, config, options)
    for line in notes:
        say(line)
    source.began = Began(
        checkpoint=str(path),
        ema=ema,
        step=opened.step,
        weights=digest_of_weights(encoder_state(model.state_dict())),
        split=_split(config, options),
        held=digest_of_names(held.samples.names[index] for index in held.which),
    )
    config = replace(config, probe_every=options.eval_every or max(1, len(source) // _per_step(config)))
    run = FineTuning(config, lambda: Classify(opened.recipe, classes, source, **chosen), held)
    try:
        result = run.train()
        if not run.main or result.stopped:
            return None
        judge = run.show.watch
        if judge.at != result.step:  # a finished run, called again
            judge(run.recipe, result.step, run.device)
        document = _document(path, options, usual, run, result, chosen)
        _write(output, run.recipe, document)
    finally:
        run.close()
    for line in table(document, judge.found):
        say(line)
    return document


def _document(
    path: str | Path,
    options: Options,
    usual: Published,
    run: FineTuning,
    result: Result,
    chosen: Mapping[str, Any],
) -> dict[str, Any]:
    """What stands in finetune.json: what was trained with, which a run that was finished before tells itself."""
    began, judge, trained = run.source.began, run.show.watch, run.trained
    found = list(judge.found.values())
    return {
        "checkpoint": began.checkpoint if began else str(path),  # where the run is older than `began`: as given
        "checkpoint_step": began.step if began else None,
        "model": run.recipe.config["encoder"],
        "data": trained.data,
        "labels": trained.model_args.get("labels", options.labels),
        "val_data": options.val_data,
        "val_share": options.val_share if options.val_data is None else None,
        "seed": trained.seed,
        "classes": run.recipe.classes,
        "learnt_from": len(run.source),
        "held_back": len(judge.held.which),
        "steps": result.step,
        "loss": result.loss,
        "published": usual.source,
        **{key: trained.model_args.get(key, value) for key, value in chosen.items()},
        "epochs": None if trained.steps else trained.epochs,
        "peak_lr": run.lr.peak,
        **{key: getattr(trained, key) for key in ("weight_decay", "warmup", "betas")},
        "samples_per_step": run.trained_samples,
        "weights": list(judge.found)[-1],
        **found[-1].to_dict(),
        "of the model without average": judge.found["model"].to_dict() if len(found) > 1 else None,
        "most_frequent_class": majority(run.source.labels, judge.held.labels).to_dict(),
    }


_CHOSEN = ("layer_decay", "drop_path", "smoothing", "mixup", "cutmix", "ema_decay")


def _config(
    opened: Opened, data: str, output: Path, options: Options, usual: Published, told: dict[str, Any]
) -> PretrainConfig:
    """The loop's. What it has no field for stands in `model_args`, so that a resumed run names what changed."""
    given = {key: value for key, value in (options.run or {}).items() if value is not None}
    epochs = {} if "steps" in given else {"epochs": usual.epochs}
    return PretrainConfig(
        **{
            **{key: opened.options[key] for key in _OF_DATA if key in opened.options},
            **epochs,
            "blr": usual.blr,
            "weight_decay": usual.weight_decay,
            "warmup": usual.warmup,
            "min_lr": 1e-6,
            "betas": BETAS,
            "crop_scale": (0.08, 1.0),
            "graph": "off",
            "picture_rows": 0,
            "picture_every": 0,
            **given,
            "data": data,
            "output_dir": str(output),
            "model": f"classifier of {opened.recipe.config['name']}",
            "model_args": told,
            "probe_every": 1,
            "probe_data": options.val_data or data,
            "probe_labels": (options.val_labels or options.labels) if options.val_data else options.labels,
        }
    )


def _quiet(text: str) -> None:
    """Of processes beside the main one."""


def _per_step(config: PretrainConfig) -> int:
    return config.batch_size * config.accum * int(os.environ.get("WORLD_SIZE", "1"))


def _data(
    opened: Opened, config: PretrainConfig, options: Options
) -> tuple[LabelledSource, Labelled, list[str], list[str]]:
    """(what is learnt from, what is held back, the classes, lines for the user)."""
    source = _open(opened, config, config.data, "--data")
    every = labelled(fixed(source), options.labels, "--labels")
    notes = [f"--data {config.data}: {note}" for note in every.notes]
    if options.val_data is None:
        learn, rest = held_back(every, options.val_share, config.seed, "--labels")
        held = every.only(every.which[rest].tolist())
    else:
        learn = range(len(every.which))
        spec, given = options.val_labels or options.labels, "--val-labels" if options.val_labels else "--labels"
        other = _open(opened, config, options.val_data, "--val-data")
        held = labelled(fixed(other), spec, given, every.classes)
        notes += overlap(every, config.data, held, options.val_data, "--val-data")
        notes += [f"--val-data {options.val_data}: {note}" for note in (*other.notes, *held.notes)]
    train = LabelledSource(source, every.which[learn], every.labels[learn], config.skip_bad)
    return train, held, list(every.classes), notes


def _split(config: PretrainConfig, options: Options) -> str:
    """The options that say what is learnt from and what is held back."""
    told = f"--data {config.data} --labels {options.labels}"
    if options.val_data is None:
        return f"{told} --val-share {options.val_share:g} --seed {config.seed}"
    return f"{told} --val-data {options.val_data}" + (f" --val-labels {options.val_labels}" * bool(options.val_labels))


def _open(opened: Opened, config: PretrainConfig, name: str, option: str) -> Source:
    return replace(opened, options={**config.to_dict()}).data(name, option, config.output_dir)


def _write(output: Path, recipe: Classify, document: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    network = list(recipe.networks().values())[-1]
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in timm_state(network).items()}
    described = {"format": "pt", "maefast_classes": json.dumps(document["classes"])}
    write_whole(output / checkpoint.MODEL, lambda path: save_file(tensors, path, described))
    write_whole(output / "finetune.json", lambda path: path.write_text(json.dumps(document, indent=1) + "\n"))


def table(document: dict[str, Any], found: dict[str, Accuracy]) -> list[str]:
    """What stands in a finetune.json, for people."""
    held = document["val_data"] or drawn(document)
    common = document["most_frequent_class"]
    lines = [
        f"{len(document['classes'])} classes; learnt from {document['learnt_from']}, {document['held_back']} held back "
        f"({held}); accuracy, 95 % interval, after {document['steps']} steps"
    ]
    names = {"model": "fine-tuned", "average": "fine-tuned, running average"}
    lines += [f"  {names[name]:28}{entry}" for name, entry in found.items()]
    return [*lines, f"  {'most frequent class':28}{Accuracy(common['hits'], common['count'])}"]
