"""Views of scenes with their cameras: arrays; shaded spheres as a demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maefast.data.blob import Where, opened
from maefast.data.collection import DEMO, Collection, Files, Made
from maefast.ops import _checks
from maefast.recipe import Batch

_SCENES = 64  # of the demo


class Scene(NamedTuple):
    """views: uint8 [n, H, W, 3]. poses: float32 [n, 3, 4], camera to world, x right, y down, z ahead. focal: pixels."""

    views: np.ndarray
    poses: np.ndarray
    focal: float


@dataclass
class SceneBatch(Batch):
    """views: uint8 [B, V, 3, H, W], the first of which is given, the others are asked for. poses: float32 [B, V, 3, 4],
    camera to world, x right, y down, z ahead, the scene around the origin. focals: float32 [B], in pixels."""

    views: Tensor
    poses: Tensor
    focals: Tensor


@dataclass(frozen=True)
class Scenes:
    """A recipe wants `SceneBatch`es: `views` V of `size` (H, W).

    `--data` names a folder of .npz files, each a scene: arrays `views` uint8 [n, H, W, 3], `poses` [n, 3, 4] and
    `focal`, a number of pixels. A sample is V of its views; views are taken as they are, neither cropped nor flipped.
    """

    size: tuple[int, int]
    views: int = 5
    unit = "scene"

    def open(self, options: Any) -> Collection:
        if options.data == DEMO:
            made = Made(
                "shaded spheres", _SCENES, lambda i: sphere_scene(i, 3 * self.views, self.size), "scene {}".format
            )
            return Collection(self, made, options)
        return Collection(self, Files(options.data, (".npz",), read_scene, "scenes", options), options)

    def check(self, batch: Any) -> None:
        """Raise unless it is a batch of such views."""
        if not isinstance(batch, SceneBatch):
            raise TypeError(f"a SceneBatch is wanted, got {type(batch).__name__}")
        _checks.tensor("views", batch.views, ndim=5, floating=False)
        want, found = (self.views, 3, *self.size), batch.views
        if tuple(found.shape[1:]) != want or found.dtype is not torch.uint8:
            raise ValueError(
                f"views must be uint8 [B, {', '.join(map(str, want))}], got {found.dtype} {tuple(found.shape)}"
            )
        _checks.tensor("poses", batch.poses, ndim=4)
        _checks.tensor("focals", batch.focals, ndim=1)
        if batch.poses.shape != (len(found), self.views, 3, 4) or len(batch.focals) != len(found):
            raise ValueError(
                f"poses must be [{len(found)}, {self.views}, 3, 4] and focals [{len(found)}], "
                f"got {tuple(batch.poses.shape)} and {tuple(batch.focals.shape)}"
            )

    # --- as a `Kind` of samples

    def sample(self, raw: Scene, rng: np.random.Generator) -> Scene:
        self._fits(raw)
        return self._taken(raw, rng.permutation(len(raw.views))[: self.views])

    def example(self, raw: Scene) -> Scene:
        self._fits(raw)
        return self._taken(raw, np.linspace(0, len(raw.views), self.views, endpoint=False).astype(int))

    def _fits(self, raw: Scene) -> None:
        if raw.views.shape[1:3] != self.size or len(raw.views) < self.views:
            raise ValueError(f"{self.views} views of {self.size} pixels are wanted, it has {list(raw.views.shape)}")

    def _taken(self, raw: Scene, which: np.ndarray) -> Scene:
        return Scene(raw.views[which], raw.poses[which], raw.focal)

    def collate(self, samples: Sequence[Scene], key: np.ndarray) -> SceneBatch:
        views = torch.from_numpy(np.stack([scene.views for scene in samples])).permute(0, 1, 4, 2, 3).contiguous()
        poses = torch.from_numpy(np.stack([scene.poses for scene in samples]))
        return SceneBatch(views, poses, torch.tensor([scene.focal for scene in samples]), key=key)


def read_scene(where: Where) -> Scene:
    """ValueError: it is something else."""
    with opened(where) as stream, np.load(stream) as file:
        if missing := {"views", "poses", "focal"} - set(file.files):
            raise ValueError(
                f"the arrays views, poses and focal are wanted, and it has no {', '.join(sorted(missing))}"
            )
        views, poses, focal = file["views"], file["poses"].astype(np.float32), float(file["focal"])
    if views.dtype != np.uint8 or views.ndim != 4 or views.shape[3] != 3 or poses.shape != (len(views), 3, 4):
        raise ValueError(
            f"views must be uint8 [n, H, W, 3] and poses [n, 3, 4], "
            f"not {views.dtype} {list(views.shape)} and {list(poses.shape)}"
        )
    if not np.isfinite(poses).all() or not 0 < focal < np.inf:
        raise ValueError("its poses and focal must be finite, and the focal positive")
    return Scene(views, poses, focal)


def sphere_scene(index: int, views: int, size: tuple[int, int]) -> Scene:
    """A sphere of two colours, lit from above, in front of nothing (black); cameras look at the origin from around it,
    at a distance of 1. The same for an index every time."""
    rng = np.random.default_rng([index, 23])
    centre, radius = rng.uniform(-0.12, 0.12, 3), rng.uniform(0.22, 0.34)
    colours, axis = rng.uniform(0.2, 1.0, (2, 3)), rng.standard_normal(3)
    focal = 1.1 * max(size)
    poses = np.stack([_camera(angle, rng.uniform(-0.4, 0.4)) for angle in rng.uniform(-1.2, 1.2, views)])
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    ahead = np.stack([(columns - size[1] / 2) / focal, (rows - size[0] / 2) / focal, np.ones(size)], -1)
    ahead /= np.linalg.norm(ahead, axis=-1, keepdims=True)
    pictures = []
    for pose in poses:
        ray, start = ahead @ pose[:, :3].T, pose[:, 3] - centre
        half = ray @ start
        under = half**2 - (start @ start - radius**2)
        normal = (start + ray * (-half - np.sqrt(under.clip(0)))[..., None]) / radius
        light = 0.6 + 0.4 * (-normal[..., 1]).clip(0)  # y points down
        colour = np.where((normal @ axis > 0)[..., None], colours[0], colours[1]) * light[..., None]
        pictures.append(np.where((under > 0)[..., None], colour, 0.0))
    pixels = (255 * np.stack(pictures)).round().astype(np.uint8)
    return Scene(pixels, poses.astype(np.float32), float(focal))


def _camera(angle: float, height: float) -> np.ndarray:
    """[3, 4], one that looks at the origin from a distance of 1, at an angle around the vertical axis."""
    place = np.array([np.sin(angle) * np.cos(height), np.sin(height), -np.cos(angle) * np.cos(height)])
    ahead = -place
    right = np.cross([0.0, 1.0, 0.0], ahead)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(ahead, right), ahead, place], 1)
