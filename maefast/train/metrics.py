"""Where the numbers of a run go: metrics.csv, TensorBoard, the progress line, the loss curve."""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TextIO

from maefast.data.runs import SOFTWARE, complete_rows
from maefast.data.written import naming, write_whole


@dataclass
class Row:
    """One optimizer step. `data_wait` is the share of the step's time spent waiting for the loader; `terms` are the
    parts of the loss by their names, where it has several."""

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float | None
    samples_per_s: float
    data_wait: float
    terms: dict[str, float] = field(default_factory=dict)

    def values(self) -> list[float | None]:
        """In the order of `header`."""
        return [getattr(self, entry.name) for entry in fields(self)[:-1]] + list(self.terms.values())

    def cells(self) -> list[str]:
        # repr() of a float reads back as the same float, so two runs can be compared exactly.
        return ["" if value is None else repr(value) for value in self.values()]


def header(unit: str = "image", terms: Sequence[str] = ()) -> list[str]:
    """The names of the columns, where a sample is called `unit`: a rate says what it counts."""
    names = [f"{unit}s_per_s" if entry.name == "samples_per_s" else entry.name for entry in fields(Row)[:-1]]
    return names + [f"loss/{name}" for name in terms]


HEADER = header()


class MetricsFile:
    """Appends rows to a CSV. Opening it for a run that starts after step `done` drops the rows beyond `done`:
    they belong to steps that a killed run had taken after its last checkpoint and that will be taken again.

    Columns of terms come with the first row that has some."""

    def __init__(self, path: Path, done: int, unit: str = "image"):
        self.path, self._unit = path, unit
        self._file: TextIO | None = None
        self._rewrite([row for row in read_rows(path) if int(row["step"]) <= done] if path.exists() else [], ())

    def _rewrite(self, kept: list[dict[str, str]], terms: Sequence[str]) -> None:
        known = [name.removeprefix("loss/") for name in (kept[0] if kept else ()) if name.startswith("loss/")]
        self._terms = list(dict.fromkeys([*known, *terms]))
        if self._file is not None:
            self._file.close()
        write_whole(self.path, lambda temporary: self._write_kept(temporary, kept))
        self._file = open(self.path, "a", newline="")  # noqa: SIM115 (closed by close())
        self._writer = csv.writer(self._file)

    def _write_kept(self, path: Path, kept: list[dict[str, str]]) -> None:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header(self._unit, self._terms))
            writer.writerows([row.get(name, "") for name in header(terms=self._terms)] for row in kept)
            file.flush()
            os.fsync(file.fileno())

    def write(self, rows: list[Row]) -> None:
        if new := [name for row in rows for name in row.terms if name not in self._terms]:
            self._rewrite(read_rows(self.path), new)
        with naming(self.path):
            self._writer.writerows(
                replace(row, terms={name: row.terms.get(name) for name in self._terms}).cells() for row in rows
            )
            self._file.flush()

    def sync(self) -> None:
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with naming(self.path):
            self._file.close()


def read_rows(path: Path) -> list[dict[str, str]]:
    """`complete_rows` of a metrics CSV, by the names of `header` for images, whatever the unit."""
    header, rows = complete_rows(path)
    names = HEADER + header[len(HEADER) :]
    return [dict(zip(names, cells, strict=True)) for cells in rows]


def open_tensorboard(folder: Path, done: int):
    """A SummaryWriter that hides events beyond step `done`, or None when tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=done + 1)


def printable(text: str) -> str:
    """`text` as stdout can print it: a name of a file may be no text in any encoding."""
    encoding, errors = getattr(sys.stdout, "encoding", None) or "utf-8", getattr(sys.stdout, "errors", None) or "strict"
    try:
        text.encode(encoding, errors)
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


class Progress:
    """A bar on a terminal; elsewhere (log files) a line now and then, so that logs stay readable."""

    def __init__(self, total: int, done: int, show: bool, seconds: float = 20.0, unit: str = "image"):
        self.total, self.first, self.seconds, self.unit = total, done, seconds, unit
        self.at = done
        self.show, self._bar = show, None
        self._began = self._printed = time.monotonic()
        if show and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, smoothing=0.05)

    def update(self, steps: int, row: Row | None) -> None:
        """`steps` more are done; `row` is the newest measurement, if there is a new one."""
        self.at += steps
        if self._bar is not None:
            self._bar.update(steps)
            if row is not None:
                self._bar.set_postfix_str(self._numbers(row), refresh=False)
        elif self.show and row is not None:
            now = time.monotonic()
            if now - self._printed >= self.seconds or row.step in (self.first + 1, self.total):
                self._printed = now
                left = (now - self._began) / max(1, row.step - self.first) * (self.total - row.step)
                print(f"step {row.step}/{self.total}  {self._numbers(row)}  left {left:.0f} s", flush=True)

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if not self.show:
            return
        if self._bar is not None:
            self._bar.write(printable(text))
        else:
            print(printable(text), flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _numbers(self, row: Row) -> str:
        speed = f"{row.samples_per_s:.0f} {self.unit}s/s"
        terms = ", ".join(f"{name} {value:.4f}" for name, value in row.terms.items())
        loss = f"loss {row.loss:.4f} ({terms})" if terms else f"loss {row.loss:.4f}"
        return f"{loss}  lr {row.lr:.2e}  {speed}  data wait {row.data_wait:.0%}"


class Counter:
    """Steps of work that is no run, on stderr: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, seconds: float = 20.0):
        self.seconds, self._bar = seconds, None
        self._printed = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=total, unit="step", dynamic_ncols=True)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._printed >= self.seconds:
            self._printed = time.monotonic()
            print(f"step {done}/{total}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def save_loss_curve(metrics: Path, picture: Path) -> None:
    """Plot the loss of every step and its running mean, and the learning rate, into a PNG."""
    from maefast.errors import need

    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise need("matplotlib", "The loss curve") from error
    rows = read_rows(metrics)
    if not rows:
        return
    steps = [int(row["step"]) for row in rows]
    losses = [float(row["loss"]) for row in rows]
    width = max(1, len(rows) // 50)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(steps, losses, color="#9db8d9", linewidth=0.8, label="each step")
    if width > 1:
        sums = [0.0]
        for loss in losses:
            sums.append(sums[-1] + loss)
        # Centred, so that it lies in the curve where the loss falls fast, and not above it.
        ends = [(max(0, i - width // 2), min(len(losses), i + width - width // 2)) for i in range(len(losses))]
        mean = [(sums[stop] - sums[start]) / (stop - start) for start, stop in ends]
        axes.plot(steps, mean, color="#1f4e8c", linewidth=1.8, label=f"mean of {width} steps")
    low = min(losses)
    if low > 0 and max(losses) > 20 * low:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(
        steps, [float(row["lr"]) for row in rows], color="#c77", linewidth=1.0, linestyle="--", label="learning rate"
    )
    rate.set_ylabel("learning rate")
    handles = axes.get_lines() + rate.get_lines()
    axes.legend(handles, [line.get_label() for line in handles], loc="upper right")
    how = {"format": "png", "dpi": 120, "metadata": {"Software": SOFTWARE}}
    write_whole(picture, lambda temporary: figure.savefig(temporary, **how))
