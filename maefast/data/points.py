"""Point clouds: arrays of points, and analytic shapes as a demo."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maefast.data.arrays import load_array
from maefast.data.blob import Where, ending, opened
from maefast.data.collection import DEMO, Collection, Files, Made
from maefast.data.figure import FigurePicture, new_figure
from maefast.errors import need
from maefast.ops import _checks
from maefast.recipe import Batch

SCALE, SHIFT = (2 / 3, 3 / 2), 0.2  # of the augmentation, each axis by itself
ENDINGS = (".npy", ".npz", ".xyz", ".pts", ".txt", ".ply", ".off")
MESHES = (".ply", ".off")  # clouds or meshes
_CLOUDS = 100  # of the demo


@dataclass
class PointBatch(Batch):
    """points: float32 [B, N, 3], each cloud within the unit ball before it is augmented."""

    points: Tensor


@dataclass(frozen=True)
class Points:
    """A recipe wants `PointBatch`es of `count` points N.

    `--data` names a folder of clouds: .npy or .npz arrays [points, 3 or more], or .xyz, .pts and .txt tables (columns
    behind the third are left out), or .ply and .off files. Each sample is `count` points drawn without replacement or,
    of a mesh, uniformly from its faces; centred, scaled into the unit ball, then stretched by 2/3 to 3/2 and shifted by
    up to 0.2 along each axis, as Point-MAE does.
    """

    count: int = 1024
    unit = "cloud"

    def open(self, options: Any) -> Collection:
        if options.data == DEMO:
            made = Made("analytic shapes", _CLOUDS, lambda index: shape(index, 4 * self.count), shape_name)
            return Collection(self, made, options)
        return Collection(self, Files(options.data, ENDINGS, read_cloud, "clouds", options), options)

    def check(self, batch: Any) -> None:
        """Raise unless it is a batch of such clouds."""
        if not isinstance(batch, PointBatch):
            raise TypeError(f"a PointBatch is wanted, got {type(batch).__name__}")
        _checks.tensor("points", batch.points, ndim=3)
        if tuple(batch.points.shape[1:]) != (self.count, 3):
            raise ValueError(f"points must be [B, {self.count}, 3], got {tuple(batch.points.shape)}")

    def sample(self, raw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        cloud = normalised(self._some(raw, rng))
        low, high = SCALE
        return (cloud * rng.uniform(low, high, 3) + rng.uniform(-SHIFT, SHIFT, 3)).astype(np.float32)

    def example(self, raw: np.ndarray) -> np.ndarray:
        return normalised(self._some(raw, np.random.default_rng(0))).astype(np.float32)

    def _some(self, raw: np.ndarray | Mesh, rng: np.random.Generator) -> np.ndarray:
        if isinstance(raw, Mesh):
            return raw.points(self.count, rng)
        if len(raw) < self.count:
            raise ValueError(f"{len(raw)} points, fewer than the {self.count} that are wanted")
        return raw[rng.choice(len(raw), self.count, replace=False)]

    def collate(self, samples: Sequence[np.ndarray], key: np.ndarray) -> PointBatch:
        return PointBatch(torch.from_numpy(np.stack(samples)), key=key)


def normalised(cloud: np.ndarray) -> np.ndarray:
    """Centred, its farthest point at distance 1."""
    cloud = cloud - cloud.mean(0)
    return cloud / max(np.sqrt((cloud**2).sum(1).max()), 1e-12)


class Mesh(NamedTuple):
    """vertices: float64 [V, 3]. faces: int64 [F, 3]."""

    vertices: np.ndarray
    faces: np.ndarray

    def points(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """[count, 3], uniformly from its surface."""
        first, second, third = self.vertices[self.faces].transpose(1, 0, 2)
        areas = np.linalg.norm(np.cross(second - first, third - first), axis=1)
        chosen = np.searchsorted(np.cumsum(areas), rng.random(count) * areas.sum(), side="right")
        chosen = chosen.clip(0, len(areas) - 1)
        root, v = np.sqrt(rng.random((count, 1))), rng.random((count, 1))  # Osada et al., 2002
        return (1 - root) * first[chosen] + root * (1 - v) * second[chosen] + root * v * third[chosen]


def read_cloud(where: Where) -> np.ndarray | Mesh:
    """float64 [points, 3], or of a file with faces a mesh. ValueError: it is something else."""
    if ending(where) in MESHES:
        return _mesh(where)
    if ending(where) in (".npy", ".npz"):
        array = load_array(where)
    else:
        with opened(where) as file:
            lines = io.TextIOWrapper(file).read()
        array = np.loadtxt(io.StringIO(lines), ndmin=2, delimiter="," if "," in lines[:200] else None)
    if array.ndim != 2 or array.shape[1] < 3 or array.dtype.kind not in "fiu":
        raise ValueError(f"a cloud is numbers [points, 3 or more], not {array.dtype} {list(array.shape)}")
    cloud = array[:, :3].astype(np.float64)
    if not np.isfinite(cloud).all():
        raise ValueError("some of its coordinates are not finite")
    return cloud


def _mesh(where: Where) -> np.ndarray | Mesh:
    try:
        import trimesh
    except ImportError as error:
        raise need("trimesh", "Reading .ply and .off", "data") from error
    with opened(where) as file:
        data = file.read()
    if data[:3] == b"OFF" and data[3:4] not in (
        b"\n",
        b"\r",
        b" ",
    ):  # as in some of ModelNet40: the counts follow at once
        data = b"OFF\n" + data[3:]
    try:
        found = trimesh.load(io.BytesIO(data), file_type=ending(where)[1:], process=False)
    except Exception as error:  # of its parsers
        raise ValueError(f"{type(error).__name__}: {error}") from error
    vertices = np.asarray(getattr(found, "vertices", ()), np.float64).reshape(-1, 3)
    if not len(vertices):
        raise ValueError("no points in it")
    if not np.isfinite(vertices).all():
        raise ValueError("some of its coordinates are not finite")
    faces = np.asarray(getattr(found, "faces", ()), np.int64).reshape(-1, 3)
    if not len(faces):
        return vertices
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"a face names the vertex {faces.max()} of {len(vertices)}")
    corners = vertices[faces]
    if not np.any(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])):
        raise ValueError("its faces have no area")
    return Mesh(vertices, faces)


# --- shapes -------------------------------------------------------------------------------------------------


def _sphere(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, angle = 2 * u - 1, 2 * np.pi * v
    ring = np.sqrt(1 - height**2)
    return np.stack([ring * np.cos(angle), ring * np.sin(angle), height], 1) * rng.uniform(0.5, 1, 3)


def _box(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = rng.integers(0, 6, len(u))
    cube = np.stack([2 * u - 1, 2 * v - 1, np.where(side % 2, 1.0, -1.0)], 1)
    axes = (np.arange(3)[None] + side[:, None] // 2) % 3
    return np.take_along_axis(cube, axes, 1) * rng.uniform(0.4, 1, 3)


def _torus(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    a, b, thin = 2 * np.pi * u, 2 * np.pi * v, rng.uniform(0.15, 0.45)
    return np.stack([(1 + thin * np.cos(b)) * np.cos(a), (1 + thin * np.cos(b)) * np.sin(a), thin * np.sin(b)], 1)


def _cone(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, angle, top = np.sqrt(u), 2 * np.pi * v, rng.uniform(0, 0.8)
    ring = 1 - height * (1 - top)
    return np.stack([ring * np.cos(angle), ring * np.sin(angle), height * rng.uniform(1, 2.5)], 1)


def _spiral(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    turns, wide = rng.uniform(1, 3), rng.uniform(0.2, 0.6)
    angle = 2 * np.pi * turns * u
    return np.stack([np.cos(angle), np.sin(angle), 2 * u + wide * v], 1)


def _saddle(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    x, y = 2 * u - 1, 2 * v - 1
    return np.stack([x, y, rng.uniform(0.3, 1) * (x**2 - y**2)], 1)


_SHAPES: tuple[Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray], ...] = (
    _sphere, _box, _torus, _cone, _spiral, _saddle,
)  # fmt: skip


def shape(index: int, count: int) -> np.ndarray:
    """`count` points on the surface of shape `index`: a kind of shape in sizes and a rotation of its own."""
    rng = np.random.default_rng([index, 3])
    u, v = rng.random((2, count))
    points = _SHAPES[index % len(_SHAPES)](u, v, rng)
    rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    return points @ rotation


def shape_name(index: int) -> str:
    return f"{_SHAPES[index % len(_SHAPES)].__name__.strip('_')} {index // len(_SHAPES)}"


# --- pictures -----------------------------------------------------------------------------------------------


@dataclass
class Scatter(FigurePicture):
    """Clouds in columns, a row each, as a `maefast.recipe.Picture`. columns: title -> [B, points, 3]."""

    columns: dict[str, Tensor]
    names: Sequence[str]
    caption: str

    def _figure(self, title: str) -> Any:
        rows, columns = len(self.names), len(self.columns)
        figure = new_figure(title, figsize=(2.4 * columns, 1.9 * rows + 0.4), dpi=90)
        for place, (name, clouds) in enumerate(self.columns.items()):
            for row, cloud in enumerate(clouds.detach().float().cpu().numpy()):
                axes = figure.add_subplot(rows, columns, row * columns + place + 1, projection="3d")
                axes.scatter(*cloud.T, c=cloud[:, 2], s=4, linewidths=0)
                axes.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
                axes.set_axis_off()
                axes.set_title(name if row == 0 else "", fontsize=8)
                if place == 0:
                    axes.text2D(0, 0, self.names[row], transform=axes.transAxes, fontsize=7)
        figure.subplots_adjust(left=0, right=1, bottom=0, top=0.94, wspace=0, hspace=0)
        return figure
