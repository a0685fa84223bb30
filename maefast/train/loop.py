"""`maefast pretrain`: the loop. Thin on purpose: Accelerate places and scales, the recipe computes, this file counts.

Of what is learned it sees `prepare -> View -> Output` only (see `maefast.recipe`), of the data a `Source`. Nothing here
keeps state that a checkpoint does not hold: samples, what recipes draw and the learning rate are functions of the step
(see `maefast.seeds` and schedule.py), so a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from maefast import seeds
from maefast.errors import CheckpointError, ConfigError, NonFiniteLoss, TrainError
from maefast.recipe import Batch, Progress, Recipe, View

from . import checkpoint, metrics, schedule, sharding
from .accelerator import Processes, make_accelerator
from .build import build_recipe, load_start
from .config import PretrainConfig
from .data import Loader, Positions
from .graph import GraphSteps, Step, mean, parts
from .lock import FolderLock
from .metrics import MetricsFile, Row, open_tensorboard, read_rows, save_loss_curve
from .resume import choose_checkpoint, compare, trained_with
from .sharding import whole
from .show import Show
from .signals import StopSignal
from .streamed import Streams

if TYPE_CHECKING:
    from maefast.probe.watch import Watch


@dataclass
class Result:
    """What a run came to. `stopped` names the signal that ended it early; `bad` maps unreadable files to reasons;
    `baseline` is (loss, loss of a trivial predictor), of the terms that both have, on the examples of the picture."""

    step: int
    total: int
    loss: float | None
    checkpoint: Path | None
    stopped: str | None
    bad: dict[str, str] = field(default_factory=dict)
    baseline: tuple[float, float] | None = None


@dataclass
class Pending:
    """A step whose loss has not been read from the device yet."""

    step: int
    epoch: float
    lr: float
    loss: torch.Tensor
    grad_norm: torch.Tensor | None
    terms: Mapping[str, torch.Tensor]


def pretrain(config: PretrainConfig, *, create_model: Callable[..., nn.Module] | None = None) -> Result:
    """Train a masked model as `config` says. Everything it leaves is under `config.output_dir`:

        config.yaml, metrics.csv, probe.csv (with probe_every), tensorboard/, wandb/ (with wandb), pictures/step-*.png,
        checkpoints/step-*/, and at the end reconstruction.png and loss_curve.png

    `create_model(name, **arguments)` replaces `maefast.models.create`, for a model of your own with its interface, or a
    `maefast.recipe.Recipe`.

    Raises:
        TrainError: bad options, unreadable data, unusable checkpoint, non-finite loss; each says what to do.
    """
    config.check()
    run = Run(config, create_model)
    try:
        return run.train()
    finally:
        run.close()


class Run:
    folder_option = "--output-dir"  # which names its folder

    def __init__(self, config: PretrainConfig, create_model: Callable[..., nn.Module] | None):
        self.out = Path(config.output_dir)
        self.accelerator = make_accelerator(config)
        self.main, self.world = self.accelerator.is_main_process, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.graph = GraphSteps(config, self.accelerator, own_model=create_model is not None)
        torch.manual_seed(config.seed)
        self.recipe = build_recipe(config, create_model)
        self.model = self.recipe.network
        self.model_config = getattr(self.model, "config", None) or {}  # a SparK around your own net has none
        self._others = Processes(self.world)
        self.source = self._others.in_turn(lambda: self.recipe.wants.open(config), self.accelerator)
        rank = self.accelerator.process_index
        self.streams = Streams(self.source, config, rank, self.world) if config.stream else None
        # What was left to the recipe and the data is written down as what it came to.
        self.config = replace(config, **self.recipe.settled, **self.source.settled)
        self._lock: FolderLock | None = None
        self._before: checkpoint.State | None = None  # of a finished run, called again: what it was trained with
        self.step_samples = config.batch_size * config.accum * self.world
        self.total = config.steps or max(1, -(-int(config.epochs * len(self.source)) // self.step_samples))
        self.folder = self.out / "checkpoints"
        self.last: Path | None = None
        self.done = self.position = self._saved = 0
        self.loss: float | None = None
        self.metrics = self.progress = self.loader = None
        self.writers: list[Any] = []  # with the methods of TensorBoard's
        self._pending: list[Pending] = []
        self._batches: list[Batch] = []
        self._failed: Exception | None = None

    # ---- setting up

    def _prepare(self) -> None:
        config = self.config
        self._take_folder()
        path, notes = choose_checkpoint(self.accelerator, config.resume, self.out)
        if path is None and config.init_from:
            load_start(self.recipe, config, self._say)
        gathered = None
        if config.fsdp and (config.picture_rows or config.probe_every):
            gathered = sharding.Gathered(self.recipe, self.device, self.main)
        self.recipe.to(self.device)
        if config.fsdp:
            self.objective = sharding.shard(self.recipe, config, self.world, self.device)
        self.optimizer = schedule.make_optimizer(self.model, config.weight_decay, config.betas, config.optim_state)
        if config.fsdp:
            self.stepper = self.accelerator.prepare(self.optimizer)
        else:
            self.objective, self.stepper = self.accelerator.prepare(self.recipe, self.optimizer)
        for note in (*self.source.notes, *notes):
            self._say(note)
        if path is not None:
            self._resume(path)
            config = self.config
        self.trained, total, self.trained_samples = trained_with(self._before, config, self.total, self.step_samples)
        given = self.trained
        peak = given.lr if given.lr is not None else schedule.peak_lr(given.blr, self.trained_samples)
        warmup = schedule.warmup_steps(given.warmup, total)
        if given.min_lr > peak:
            raise ConfigError(f"--min-lr {given.min_lr} is above the peak learning rate {peak:.3g}")
        self.lr = schedule.Schedule(peak, total, warmup, given.min_lr)
        self.loader = self._open_loader()
        examples = self.source.examples(config.picture_rows) if self.main and config.picture_rows else None
        self.graph.prepare(self.objective, self.optimizer)
        if self.main:
            checkpoint.clean(self.folder)
            self.out.mkdir(parents=True, exist_ok=True)
            units = f"{self.source.unit}s"
            known = {"streams": self.streams.count} if self.streams else {units: len(self.source)}
            facts = {"peak_lr": peak, **known, f"{units}_per_step": self.trained_samples}
            given.dump(self.out / "config.yaml", steps=total, warmup_steps=warmup, **facts)
            self.metrics = MetricsFile(self.out / "metrics.csv", self.done, self.source.unit)
            self._open_writers()
        self.progress = metrics.Progress(self.total, self.done, self.main, unit=self.source.unit)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        samples = self.streams or f"{len(self.source)} {self.source.unit}{'s' * (len(self.source) > 1)}"
        self._say(
            f"{config.title}: {trained / 1e6:.2f} M parameters; "
            f"{samples} of {self.source.name}; "
            f"steps {self.done} to {self.total} of {self.step_samples} {self.source.unit}s; "
            f"peak lr {peak:.3g}; {self.world} x {self.device.type}, amp {config.amp}"
            f"{', as a CUDA graph' if self.graph.step else ''}; into {self.out}"
        )
        self.show = Show(
            self.recipe,
            config.title,
            self.source.unit,
            self.main,
            config.picture_rows,
            examples,
            self._prepared,
            self._say,
            gathered,
            self.writers,
        )
        if config.probe_every:
            if self.main:
                self.show.watch = self._watch()
            if self._others.any(self.show.watch is not None and not self.show.watch.rows):
                self.show.probe(self.done, self.device, first=True)  # where the run, or the watch, begins

    def _take_folder(self) -> None:
        """For this run alone, before anything in it is looked at. Whether another has it the main process finds out."""
        refused = None
        if self.main:
            try:
                self._lock = FolderLock(self.out, self.folder_option)
            except ConfigError as error:
                refused = str(error)
        if refused := next(filter(None, self._others.all(refused)), None):
            raise ConfigError(refused)

    def _watch(self) -> Watch:
        """What looks at the recipe every `probe_every` steps; on the main process."""
        from .probe import open_watch

        return open_watch(self.recipe, self.config, self.source, self.done, self._say)

    def _open_loader(self) -> Loader:
        config, samples, pin = self.config, self.source.samples(), self.device.type == "cuda"
        micro_batches = (self.total - self.done) * config.accum
        if self.streams is not None:
            positions = self.streams.positions(self.position, micro_batches)
            return Loader(self.streams.samples(samples), positions, workers=config.workers, pin=pin)
        positions = Positions(
            len(self.source),
            config.seed,
            batch=config.batch_size,
            rank=self.accelerator.process_index,
            world=self.world,
            start=self.position,
            micro_batches=micro_batches,
        )
        return Loader(samples, positions, workers=config.workers, pin=pin)

    def _open_writers(self) -> None:
        config = self.config
        if config.tensorboard:
            board = open_tensorboard(self.out / "tensorboard", self.done)
            if board is not None:
                self.writers.append(board)
            else:
                missing = 'tensorboard is not installed (pip install "maefast[train]")'
                self._say(f"{missing}; metrics.csv has the same numbers")
        if config.wandb is not None:
            from .weights_and_biases import WandbWriter

            self.writers.append(WandbWriter(config.wandb, self.out, self.done, self.trained.to_dict(), self._say))

    def _resume(self, path: Path) -> None:
        state = checkpoint.read_state(path)
        self.source.resume(state.config, state.extra)
        if self.streams is not None:
            self.streams.resume(state.extra)
        self.config = replace(self.config, **self.source.settled)
        for line in compare(state, self.config, self.model_config, self.source, self.total, self.world):
            self._say(line)
        if self.config.init_from not in (None, state.config.get("init_from")):
            self._say(f"--init-from {self.config.init_from} is not used: the run in {self.out} goes on")
        checkpoint.restore(path, self.model, self.optimizer)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.done, self.position, self.last = state.step, state.position, path
        self._saved = state.step
        self._before = state if self.done == self.total else None
        if self.main:
            for old in checkpoint.set_aside_newer(self.folder, state.step):
                self._say(f"set aside a newer checkpoint as {old}")
        self._say(f"resuming from {path}, {state.step} steps done")

    # ---- training

    def train(self) -> Result:
        self._prepare()
        config = self.config
        every = 1 if self.device.type == "cpu" else config.log_every  # reading a loss is free on a CPU
        self.objective.train()
        self._restart_clock()
        stopping = False
        with StopSignal(tell=self.main) as signal:
            while self.done < self.total:
                stopping = self._fetch(signal)
                if stopping:
                    break
                self._step()
                end = self.done == self.total
                save = end or self.done % config.save_every == 0
                picture = not end and config.picture_every and self.done % config.picture_every == 0
                probe = config.probe_every and (end or self.done % config.probe_every == 0)
                if save or picture or probe or self.done % every == 0:
                    self._flush()
                else:
                    self.progress.update(1, None)
                if probe:  # before it is saved: a checkpoint has the rows of all its steps
                    self.show.probe(self.done, self.device)
                if save:
                    self._save()
                if picture:
                    self.show.picture(self.out / "pictures" / f"step-{self.done:08d}.png", self.done)
                if save or picture or probe:
                    self._restart_clock()
            if self._pending:
                self._flush()
            if self.done > self._saved:
                self._save()
            return self._finish(self._stopped_by(signal) if stopping else None)

    def _fetch(self, signal: StopSignal) -> bool:
        """Get the batches of the next step. True if the run must stop before it: this process was told to, or could not
        read its data, or that happened to another one.

        All of a step's batches come before any of it is computed, so a failure always lies between two steps.
        """
        try:
            self._batches = [self.loader.next() for _ in range(self.config.accum)]
        except Exception as error:  # raised when what was trained so far is saved
            self._failed = error
        return self._others.any(signal.name is not None or self._failed is not None)

    def _stopped_by(self, signal: StopSignal) -> str:
        """The signal that ended the run early. Without one, what a process could not read is raised, on all of them."""
        reason = None if self._failed is None else f"{type(self._failed).__name__}: {self._failed}"
        told = self._others.all((signal.name, reason))
        if signal.name or any(name for name, _ in told):
            return signal.name or "a signal to another process"
        if self.last is not None:
            self._say(f"stopped after step {self.done} of {self.total}, saved as {self.last}")
            self._say("once the cause is mended, the same command goes on from there")
        raise self._failed or TrainError(f"stopped by another process: {next(text for _, text in told if text)}")

    def _step(self) -> None:
        config, step = self.config, self.done
        rate = self.lr(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        torch.manual_seed(seeds.torch_seed(config.seed, step, self.accelerator.process_index))
        loss, norm, terms = self.graph(self._views(), self._say) or self._plain_step()
        self.done += 1
        self.position += self.step_samples
        if self.streams is not None:
            self.streams.mine.update(self.loader.places)
        progress = self._progress()
        with torch.no_grad():
            self.recipe.after_step(progress)
        self._pending.append(Pending(self.done, progress.epoch, rate, loss, norm, terms))

    def _progress(self) -> Progress:
        epoch = self.streams.epoch if self.streams is not None else self.position / len(self.source)
        return Progress(self.done, self.total, epoch)

    def _views(self) -> Iterator[View]:
        """The micro-batches of the step, each prepared when its turn comes."""
        return (self._prepared(batch, seeds.MASK) for batch in self._batches)

    def _prepared(self, batch: Batch, purpose: int, recipe: Recipe | None = None) -> View:
        draw = seeds.Draw(self.config.seed, batch.key, purpose)
        with self.accelerator.autocast():
            return (recipe or self.recipe).prepared(batch.to(self.device), draw, self._progress())

    def _plain_step(self) -> Step:
        config, total, norm, terms = self.config, None, None, []
        for view in self._views():
            with self.accelerator.accumulate(self.objective):
                output = self.objective(view)
                loss = output.loss
                self.accelerator.backward(loss)
                if config.clip is not None and self.accelerator.sync_gradients:
                    norm = whole(self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip))
                self.stepper.step()
                self.stepper.zero_grad()
            total = loss.detach() if total is None else total + loss.detach()
            terms.append(parts(output.terms))
        return Step(total / config.accum, norm, mean(terms))

    @property
    def _rate_option(self) -> str:
        return "--blr" if self.config.lr is None else "--lr"

    def _restart_clock(self) -> None:
        self._clock, self.loader.waited = time.perf_counter(), 0.0

    def _flush(self) -> None:
        """Read the pending losses from the device, stop on a non-finite one, and write them down."""
        pending = self._pending
        values = torch.stack(
            [torch.stack([t.float() for t in (entry.loss, *entry.terms.values())]) for entry in pending]
        )
        if self.world > 1:
            values = self.accelerator.reduce(values, "mean")
        losses, norms = values.tolist(), [None] * len(pending)
        if pending[0].grad_norm is not None:  # with clipping all have one
            norms = torch.stack([entry.grad_norm.double() for entry in pending]).tolist()
        seconds = time.perf_counter() - self._clock
        speed = len(pending) * self.step_samples / seconds
        wait = min(1.0, self.loader.waited / seconds)
        rows = [
            Row(entry.step, entry.epoch, loss, entry.lr, norm, speed, wait, dict(zip(entry.terms, each, strict=True)))
            for entry, (loss, *each), norm in zip(pending, losses, norms, strict=True)
        ]
        self._pending.clear()
        self._restart_clock()
        broken = next((row for row in rows if not math.isfinite(row.loss)), None)
        if self.main:
            self._write([row for row in rows if broken is None or row.step <= broken.step])
        if broken is not None:
            raise NonFiniteLoss(broken.step, broken.loss, self.last, rate=self._rate_option)
        self.loss = losses[-1][0]
        self.progress.update(self.done - self.progress.at, rows[-1])

    def _write(self, rows: list[Row]) -> None:
        self.metrics.write(rows)
        for row in rows if self.writers else ():
            for name, value in zip(metrics.header(self.source.unit, tuple(row.terms)), row.values()):
                if name not in ("step", "epoch") and value is not None:
                    for writer in self.writers:
                        writer.add_scalar(f"train/{name}", value, row.step)

    # ---- what is left behind

    def _save(self) -> None:
        # A finite loss can still have had infinite gradients; such weights must not replace a good checkpoint.
        buffers = (buffer for buffer in self.model.buffers() if buffer.is_floating_point())  # of batch norms
        norm = sharding.total_norm([*self.model.parameters(), *buffers])
        if not bool(norm.isfinite()):
            raise NonFiniteLoss(self.done, float(norm), self.last, what="norm of the weights", rate=self._rate_option)
        state, streams = None, self.streams.record(self._others) if self.streams is not None else {}
        if self.main:
            self.metrics.sync()
            scaler = self.accelerator.scaler
            state = checkpoint.State(
                step=self.done,
                position=self.position,
                config=self.config.to_dict(),
                model_config=self.model_config,
                scaler=scaler.state_dict() if scaler is not None else None,
                extra={
                    "total": self.total,
                    "processes": self.world,
                    **self.source.record(),
                    **streams,
                    "torch": torch.__version__,
                },
            )
        save = checkpoint.save_shards if self.config.fsdp else checkpoint.save
        if self.main or self.config.fsdp:
            try:
                self.last = save(self.folder, state, self.model, self.optimizer, self.config.keep)
            except (OSError, SafetensorError, CheckpointException) as error:  # disk full, no permission
                text = f"the checkpoint of step {self.done} cannot be written: {error}. The last good is {self.last}"
                if self._failed is not None:
                    text += f". The run was to stop because of this: {self._failed}"
                raise CheckpointError(text) from error
        self._saved = self.done
        self.accelerator.wait_for_everyone()

    def _finish(self, stopped: str | None) -> Result:
        bad = self._gather_bad()
        if self.main:
            self.metrics.sync()
            if self.loss is None:  # a finished run, called again
                self.loss = next((float(row["loss"]) for row in reversed(read_rows(self.metrics.path))), None)
        self.show.picture(self.out / "reconstruction.png", self.done)
        baseline = self.show.baseline()
        if self.main:
            save_loss_curve(self.out / "metrics.csv", self.out / "loss_curve.png")
            for path, reason in list(bad.items())[:20]:
                self._say(f"skipped unreadable {self.source.unit} {path}: {reason}")
            if bad:
                self._say(f"{len(bad)} unreadable {self.source.unit}(s) met and skipped")
            if stopped:
                self._say(
                    f"stopped by {stopped} after step {self.done} of {self.total}; saved {self.last}; "
                    "the same command with --resume auto goes on from there"
                )
            else:
                self._say(f"finished {self.total} steps; checkpoint {self.last}; pictures and metrics in {self.out}")
        return Result(self.done, self.total, self.loss, self.last, stopped, bad, baseline)

    def _gather_bad(self) -> dict[str, str]:
        if self.world == 1:
            return self.loader.bad
        from accelerate.utils import gather_object

        return dict(gather_object(list(self.loader.bad.items())))

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.say(text)
        elif self.main:
            print(metrics.printable(text), flush=True)

    def close(self) -> None:
        try:
            for part in (self.progress, self.metrics, *self.writers, self.loader):
                if part is not None:
                    part.close()
            self._others.close()
        finally:
            if self._lock is not None:  # last: now another run may have the folder
                self._lock.close()
