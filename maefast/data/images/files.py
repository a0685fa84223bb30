"""Finding images: folders of any nesting, and the photographs that two libraries ship."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maefast.data import runs
from maefast.data.records import TABLES, TARS, Names, Paths, Records, inside, no_column, open_records
from maefast.errors import ConfigError, TrainError

from .pixels import PLUGINS, drawn_by_us, open_header, register_plugin

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".webp",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".jp2",
    ".avif",
    *PLUGINS,
)

# The colour photographs inside the wheels of scikit-image and scikit-learn (no download).
SHIPPED = {
    "skimage": (
        "data",
        "astronaut.png chelsea.png coffee.png hubble_deep_field.jpg ihc.png motorcycle_left.png "
        "motorcycle_right.png retina.jpg rocket.jpg",
    ),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
}


def find_images(
    data: str | Path, output: str | Path | None = None, options: Any = None, endings: Sequence[str] = EXTENSIONS
) -> Records:
    """The images of `data`: "skimage" for the shipped photographs, what `open_records` knows (lists, tars, tables),
    else a folder, searched at any depth; one without images for tars and tables.

    Files of a folder are those with a common image extension, sorted by their path relative to the folder (hidden files
    and folders are left out, links are followed), so the order is the same on every machine. What maefast writes is no
    data: the folder `output` (but not images that lie in it, if it is `data` itself) and the pictures that it draws.
    """
    if str(data) in ("skimage", "demo") and not Path(data).is_dir():
        return Paths("skimage", "", Names(str(path) for path in shipped_photographs()))
    if (found := open_records(data, endings, options)) is not None:
        return found
    root = Path(data).expanduser()
    if not root.exists():
        pattern = any(mark in str(data) for mark in "*?[")
        more = "; patterns are for tars and tables: give files of images as a folder or a list" if pattern else ""
        raise ConfigError(
            f"--data {data}: no such folder or file (give a folder, a list or tars of images, or 'skimage'){more}"
        )
    if not root.is_dir():
        raise ConfigError(
            f"--data {data}: is a file; give the folder that holds the images, a list of them (.txt, .csv, .parquet), "
            "tars (.tar), or with --channels N an array of them (.npy)"
        )
    left_out = _LeftOut()
    files = sorted(_walk(root, _identity(output), left_out, endings))
    notes = tuple(f"--data {data}: {line}" for line in left_out.lines())
    if not files and (found := inside(root, endings, options)) is not None:
        return found
    if not files:
        more = "; ".join(["", *notes])
        if left_out.arrays:
            more += f"; {len(left_out.arrays)} array(s), such as {min(left_out.arrays)}, are read with --channels N"
        raise ConfigError(f"--data {data}: no images in it (looked at any depth for {' '.join(endings)}){more}")
    no_column(data, options)
    return Paths(str(root), str(root), Names(files), notes)


@dataclass
class _LeftOut:
    output: str = ""
    closed: list[str] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)
    unreadable: dict[str, int] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    arrays: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        if self.output:
            yield f"left out {self.output}: the output folder"
        if self.drawn:
            yield f"left out {', '.join(self.drawn[:3])}{', …' * (len(self.drawn) > 3)}: drawn by maefast"
        if self.closed:
            yield f"left out {', '.join(self.closed[:3])}{', …' * (len(self.closed) > 3)}: may not be read"
        if self.others:
            yield (
                f"left out {len(self.others)} tar(s) or table(s) that lie beside images, such as {self.others[0]}: a "
                "pattern such as '*.tar' names them"
            )
        for extension, count in self.unreadable.items():
            package = PLUGINS[extension][0].replace("_", "-")
            yield f"left out {count} {extension} file(s), which Pillow reads with the package {package} (not installed)"


def _identity(path: str | Path | None) -> tuple[int, int] | None:
    try:
        status = os.stat(path) if path is not None else None
    except OSError:  # not there yet
        return None
    return status and (status.st_dev, status.st_ino)


def _walk(root: Path, output: tuple[int, int] | None, left_out: _LeftOut, endings: Sequence[str]) -> Iterator[str]:
    """Names of the images below `root`, relative to it."""
    seen: set[tuple[int, int]] = set()

    def closed(error: OSError) -> None:
        left_out.closed.append(os.path.relpath(error.filename, root))

    for folder, folders, names in os.walk(root, followlinks=True, onerror=closed):
        identity, inside = _identity(folder), os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        known, apart = identity in seen, identity == output and bool(prefix)
        if apart and not known:
            left_out.output = inside
        if known or apart:  # known: a link back to a folder above would be followed for ever
            folders.clear()
            continue
        seen.add(identity)
        ours = identity == output or _is_run(folder, folders, names)  # images that lie beside what it wrote are data
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures = _is_run(*_above(folder)) if os.path.basename(folder) == "pictures" else False
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            if extension in (*TARS, *TABLES) and not name.startswith("."):
                left_out.others.append(prefix + name)
            if extension not in endings or name.startswith("."):
                if extension in (".npy", ".npz"):
                    left_out.arrays.append(prefix + name)
                continue
            if extension in PLUGINS and not register_plugin(extension):
                left_out.unreadable[extension] = left_out.unreadable.get(extension, 0) + 1
            elif (ours and name in _ENDS) or (pictures and _STEP.fullmatch(name)) or _is_drawn(folder, name):
                left_out.drawn.append(prefix + name)
            else:
                yield prefix + name


# Pictures in a run's folder and in its pictures/: those of older versions have no mark.
_ENDS, _STEP = ("reconstruction.png", "loss_curve.png"), re.compile(r"step-\d{8,}\.png")


def _above(folder: str) -> tuple[str, list[str], list[str]]:
    above = os.path.dirname(folder)
    names = os.listdir(above)
    return above, names, names


def _is_run(folder: str, folders: list[str], names: list[str]) -> bool:
    """Whether a folder is that of a run: by what is in it, whatever it is called."""
    if "checkpoints" in folders and runs.latest(Path(folder, "checkpoints"))[0] is not None:
        return True
    if "config.yaml" not in names or "metrics.csv" not in names:
        return False
    try:
        text = Path(folder, "config.yaml").read_text(errors="replace")
    except OSError:
        return False
    return "\noutput_dir:" in text and "\nmask_ratio:" in text


def _is_drawn(folder: str, name: str) -> bool:
    """Whether a file with a name that we give to pictures is one of them. (Others are told when they are decoded.)"""
    if not name.startswith(("reconstruction.", "loss_curve.", "step-")):
        return False
    try:
        with open_header(os.path.join(folder, name)) as image:
            return drawn_by_us(image)
    except Exception:  # told when it is read
        return False


def shipped_photographs() -> list[Path]:
    """The photographs of `SHIPPED` that are installed, sorted by file name.

    Neither library is imported. At least scikit-image's must be there.
    """
    found = []
    for package, (folder, names) in SHIPPED.items():
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            root = Path(spec.submodule_search_locations[0], folder)
            found += [root / name for name in names.split() if (root / name).is_file()]
        elif package == "skimage":
            raise TrainError('--data skimage needs the package scikit-image: pip install "maefast[train]"')
    if not found:
        raise TrainError("the installed scikit-image ships no photographs; give --data a folder of images")
    return sorted(found, key=lambda path: path.name)
