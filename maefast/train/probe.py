"""`maefast probe`, and what `--probe-every` opens: see `maefast.probe`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maefast.data.images.source import ImageSource
from maefast.data.source import Source
from maefast.data.written import write_whole
from maefast.errors import ConfigError
from maefast.probe import pictures
from maefast.probe.accuracy import Accuracy, accuracy, majority
from maefast.probe.attentive import attentive_probe
from maefast.probe.data import Labelled, held_back, labelled
from maefast.probe.features import POOLS, Features, extract, kept, no_features, raw_pixels
from maefast.probe.knn import TEMPERATURE, K, knn
from maefast.probe.linear import linear_probe
from maefast.probe.samples import batches, fixed
from maefast.probe.tokens import kept_tokens
from maefast.probe.watch import Watch
from maefast.recipe import Recipe

from .config import PretrainConfig, must_take_files
from .metrics import Counter
from .reopen import Opened, open_data, open_recipe

ATTENTIVE = "attentive"
_PATCHES = 8  # images whose features are drawn


@dataclass(frozen=True)
class Options:
    """How `probe` is asked. Raises ConfigError for what makes no sense.

    Attributes:
        labels, test_labels: see `maefast.probe.labels.read_labels`; test_labels None: as `labels`.
        test: samples that are held back; None: `test_share` of each class, drawn with `seed`.
        k: neighbours. pool: "mean" of the tokens, "cls", "both" side by side, or "attentive": the mean, and a third
            probe that learns to pool them. tsne: another picture of the classes.
        baselines: the same of random weights, drawn with `seed`, and of raw pixels.
        value_range, max_pixels: of images; None: as the run read its own.
    """

    labels: str = "folders"
    test: str | None = None
    test_labels: str | None = None
    test_share: float = 0.2
    k: int = K
    pool: str = "mean"
    tsne: bool = False
    baselines: bool = False
    seed: int = 0
    batch_size: int = 64
    workers: int = 0
    skip_bad: bool = False
    value_range: Any = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if self.test_labels is not None and self.test is None:
            raise ConfigError("--test-labels needs --test, whose classes they are; those of --data are --labels")
        if self.test is not None and self.test_share != type(self).test_share:
            raise ConfigError("give --test or --test-share, not both")
        for name, good, wanted in (
            ("pool", self.pool in (*POOLS, ATTENTIVE), " or ".join((*POOLS, ATTENTIVE))),
            ("k", self.k >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("workers", self.workers >= 0, "at least 0"),
            ("test_share", 0 < self.test_share < 1, "above 0 and below 1"),
            ("seed", 0 <= self.seed < 2**63, "at least 0 and below 2**63"),
        ):
            if not good:
                raise ConfigError(f"--{name.replace('_', '-')} must be {wanted}, not {getattr(self, name)}")

    @property
    def of_data(self) -> dict[str, Any]:
        """Options of a run that were given here."""
        told = {"value_range": self.value_range, "max_pixels": self.max_pixels}
        return {"skip_bad": self.skip_bad, **{key: value for key, value in told.items() if value is not None}}


class Probe:
    """The samples of one or two folders one after another: `labels` of all, rows that are learnt from and rows that are
    held back."""

    def __init__(self, opened: Opened, data: str, options: Options, output: Path, say: Callable[[str], object]) -> None:
        self.opened, self.options, self.output, self.say = opened, options, output, say
        self.device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.parts = [self._labelled(data, options.labels, "--data", "--labels")]
        if options.test is not None:
            spec, given = options.test_labels or options.labels, "--labels"
            if options.test_labels is not None:
                given = "--test-labels"
            self.parts.append(self._labelled(options.test, spec, "--test", given, self.parts[0].classes))
            for line in overlap(self.parts[0], data, self.parts[1], options.test, "--test"):
                self.say(line)
        self.classes, self.unit = self.parts[0].classes, self.parts[0].samples.unit
        opened.recipe.to(self.device)
        found = [self._kept(part) for part in self.parts]
        self.unreadable = sum(len(entry.bad) for entry in found)
        self.parts = [part.only(entry.index) for part, entry in zip(self.parts, found)]
        self.features = self._pooled(found)
        self.labels = np.concatenate([part.labels for part in self.parts])
        if options.test is None:
            self.learn, self.held = held_back(self.parts[0], options.test_share, options.seed, "--labels")
        else:
            self.learn, self.held = np.split(np.arange(len(self.labels)), [len(self.parts[0].labels)])

    def _labelled(
        self, data: str, spec: str, option: str, given: str, classes: Sequence[str] | None = None
    ) -> Labelled:
        options = {**self.opened.options, **self.options.of_data}
        source = replace(self.opened, options=options).data(data, option, self.output)
        found = labelled(fixed(source), spec, given, classes)
        for line in (*source.notes, *(f"{option} {data}: {note}" for note in found.notes)):
            self.say(line)
        return found

    def _batches(self, part: Labelled) -> Any:
        options = self.options
        how = {"workers": options.workers, "skip_bad": options.skip_bad}
        return batches(part.samples, part.which, options.batch_size, **how)

    def _pooled(self, found: Sequence[Features]) -> Tensor:
        how = "mean" if self.options.pool == ATTENTIVE else self.options.pool
        return torch.cat([entry.pooled(how) for entry in found])

    def _identity(self, part: Labelled) -> list[str]:
        """All that features are a function of."""
        status, about = self.opened.file.stat(), (str(self.opened.recipe.config), str(self.opened.ema))
        weights = [str(self.opened.file.resolve()), str(status.st_size), str(status.st_mtime_ns), *about]
        return [*weights, str(part.which.tolist()), *part.samples.identity()]

    def _kept(self, part: Labelled) -> Features:
        unit, folder, recipe = f"{part.samples.unit}s", self.output / "features", self.opened.recipe

        def compute() -> Features:
            self.say(f"features of {len(part.which)} {unit} ...")
            return extract(recipe, self._batches(part), self.device)

        found, cached = kept(folder, self._identity(part), compute)
        if cached:
            self.say(f"features of {len(found.index)} {unit}: found in {folder}")
        for name, reason in found.bad[:20]:
            self.say(f"skipped unreadable {part.samples.unit} {name}: {reason}")
        return found

    def random_weights(self) -> Recipe:
        return self.opened.with_random_weights(self.options.seed).to(self.device)

    def of(self, recipe: Recipe) -> Tensor:
        return self._pooled([extract(recipe, self._batches(part), self.device) for part in self.parts])

    def attentive(self, recipe: Recipe | None = None) -> dict[str, dict[str, Any]]:
        """What attentive probing makes of the tokens of the weights or of another recipe, if it is asked for."""
        if self.options.pool != ATTENTIVE:
            return {}
        more = [] if recipe is None else [f"random weights, seed {self.options.seed}"]
        folder, tokens = self.output / "features", []
        for part in self.parts:
            began = partial(self.say, f"tokens of {len(part.which)} {self.unit}s ...")
            how = recipe or self.opened.recipe, self._batches(part), len(part.which), self.device, began
            tokens.append(kept_tokens(folder, [*self._identity(part), *more], *how))
        starts = np.cumsum([0, *map(len, tokens)])

        def read(rows: np.ndarray) -> Tensor:
            places = np.searchsorted(starts, rows, "right") - 1
            found = [tokens[place][row - starts[place]] for place, row in zip(places, rows)]
            return torch.from_numpy(np.stack(found))

        self.say(f"attentive probe of {' x '.join(map(str, tokens[0].shape[1:]))} numbers per {self.unit} ...")
        known, bar = self.labels[self.learn], Counter()
        try:
            found = attentive_probe(
                read, self.learn, known, self.held, self.options.seed, device=self.device, progress=bar
            )
        finally:
            bar.close()
        how = {"weight_decay": found.weight_decay, "grid": [list(entry) for entry in found.grid]}
        return {"attentive": {**accuracy(found.found, self.labels[self.held]).to_dict(), **how}}

    def of_pixels(self) -> Tensor | None:
        rows = [raw_pixels(batch) for part in self.parts for batch, _, _ in self._batches(part) if batch is not None]
        return None if any(row is None for row in rows) else torch.cat(rows)

    def judged(self, features: Tensor) -> dict[str, Any]:
        """What both probes make of features [n, D] of all samples."""
        known, true = self.labels[self.learn], self.labels[self.held]
        one, two = features[self.learn], features[self.held]
        near = accuracy(knn(one, known, two, self.options.k, device=self.device), true)
        linear = linear_probe(one, known, two, self.options.seed)
        return {
            "knn": {**near.to_dict(), "k": min(self.options.k, len(one)), "temperature": TEMPERATURE},
            "linear": {
                **accuracy(linear.found, true).to_dict(),
                "weight_decay": linear.weight_decay,
                "grid": [list(entry) for entry in linear.grid],
                "converged": linear.converged,
            },
        }

    def draw(self, title: str) -> list[str]:
        """Write the pictures; their names."""
        scatter = pictures.Scatter(self.features, self.labels, self.classes)
        scatter.save(self.output / "classes.png", f"{title}: {scatter.caption}")
        written = ["classes.png"]
        if self.options.tsne:
            spread = pictures.Neighbours(self.features, self.labels, self.classes, seed=self.options.seed)
            spread.save(self.output / "tsne.png", f"{title}: {spread.caption}")
            written.append("tsne.png")
        part = self.parts[-1]
        chosen = np.linspace(0, len(part.which), min(_PATCHES, len(part.which)), endpoint=False).astype(int)
        batch, index, _ = next(batches(part.samples, part.which[chosen], _PATCHES))
        names = [part.samples.names[i] for i in index]
        sheet = pictures.patch_sheet(self.opened.recipe, batch, names, self.device)
        if sheet is None:
            return written
        sheet.save(self.output / "patches.png", f"{title}, {sheet.caption}")
        return [*written, "patches.png"]


def probe(
    path: str | Path,
    data: str,
    output: str | Path = "probe",
    options: Options | None = None,
    *,
    name: str | None = None,
    img_size: int | Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    ema: bool = False,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Probe the features of the weights at `path` on the samples `data`. Leaves in the folder `output`: probe.json,
    classes.png, patches.png (of images), and the features, where the next call finds them.

    `name`, `img_size`, `heads`, `ema`: see `reopen.open_recipe`. Returns what stands in probe.json.

    Raises:
        TrainError: each says what to do.
    """
    options, output = options or Options(), Path(output)
    must_take_files("--output", output)  # before minutes of work
    opened = open_recipe(path, name, img_size, heads, ema, say)
    if reason := no_features(opened.recipe):
        raise ConfigError(f"{path}: {reason}")
    asked = Probe(opened, data, options, output, say)
    true = asked.labels[asked.held]
    document = {
        "checkpoint": str(path),
        "step": opened.step,
        "model": dict(opened.recipe.config),
        "data": data,
        "labels": options.labels,
        "test": options.test,
        "test_share": options.test_share if options.test is None else None,
        "seed": options.seed,
        "unit": asked.unit,
        "classes": list(asked.classes),
        "learnt_from": len(asked.learn),
        "held_back": len(asked.held),
        "unreadable": asked.unreadable,
        "pool": options.pool,
        "features": asked.features.shape[1],
        **asked.judged(asked.features),
        **asked.attentive(),
        "most_frequent_class": majority(asked.labels[asked.learn], true).to_dict(),
    }
    if options.baselines:
        fresh = asked.random_weights()
        document["baselines"] = {"random weights": {**asked.judged(asked.of(fresh)), **asked.attentive(fresh)}}
        if (pixels := asked.of_pixels()) is not None:
            document["baselines"]["pixels"] = asked.judged(pixels)
    written = ["probe.json", *asked.draw(str(path) if opened.step is None else f"{path}, step {opened.step}")]
    text = json.dumps(document, indent=1) + "\n"
    write_whole(output / "probe.json", lambda place: place.write_text(text))
    for line in table(document):
        say(line)
    say(f"wrote {', '.join(str(output / file) for file in written)}")
    return document


def table(document: dict[str, Any]) -> list[str]:
    """What stands in a probe.json, for people."""
    held = document["test"] or drawn(document)
    count, unit = len(document["classes"]), document["unit"]
    near = f"k-NN, k={document['knn']['k']}"
    lines = [
        f"{count} classes; {document['learnt_from']} {unit}s to learn from, {document['held_back']} held back ({held})"
        f"; {document['features']} features ({document['pool']})",
        f"{'accuracy, 95 % interval':26}{near:26}{'linear':26}{ATTENTIVE if ATTENTIVE in document else ''}".rstrip(),
    ]
    for name, row in {"these weights": document, **document.get("baselines", {})}.items():
        near, linear = (str(_accuracy(row[kind])) for kind in ("knn", "linear"))
        how = f"weight decay {row['linear']['weight_decay']:g}{'' if row['linear']['converged'] else ', not converged'}"
        third = _accuracy(row[ATTENTIVE]) if ATTENTIVE in row else ""
        more = f"{third!s:26}" if ATTENTIVE in document else ""
        lines.append(f"  {name:24}{near:26}{linear:26}{more}{how}")
    lines.append(f"  {'most frequent class':24}{_accuracy(document['most_frequent_class'])}")
    return lines


def drawn(document: dict[str, Any]) -> str:
    """Of a probe.json or finetune.json: the share that is held back. In small classes it is not the one asked for."""
    held = document["held_back"]
    return f"{held / (document['learnt_from'] + held):.1%} of all, by class, seed {document['seed']}"


def overlap(learnt: Labelled, data: str, held: Labelled, other: str, option: str) -> list[str]:
    """A warning if samples of `data` are held back as well, as those of `other`, which was given as `option`."""

    def places(part: Labelled, root: str) -> list[str]:
        root = os.path.realpath(os.path.expanduser(root))
        return [os.path.join(root, part.samples.names[index]) for index in part.which]

    known, asked = set(places(learnt, data)), places(held, other)
    both = sum(place in known for place in asked)
    why = "are in --data too, so the accuracy counts what was learnt"
    return [f"warning: {option} {other}: {both} of {len(asked)} {why}"] if both else []


def _accuracy(entry: dict[str, Any]) -> Accuracy:
    return Accuracy(entry["hits"], entry["count"])


def open_watch(
    recipe: Recipe, config: PretrainConfig, source: Source, done: int, say: Callable[[str], object]
) -> Watch:
    """What `--probe-every` of a run asks for; `source` is its training data, whose images are decoded by one rule.

    Raises:
        TrainError: the recipe has no features, or the data or their classes cannot be used.
    """
    opened = open_data(recipe, config.to_dict(), config.probe_data, "--probe-data", config.output_dir)
    if isinstance(opened, ImageSource) and isinstance(source, ImageSource):
        opened.decoder = source.decoder
    return Watch(
        recipe,
        fixed(opened),
        config.probe_labels,
        Path(config.output_dir) / "probe.csv",
        done,
        seed=config.seed,
        workers=config.workers,
        keep=config.cache_mb * 2**20,
        skip_bad=config.skip_bad,
        say=say,
    )
