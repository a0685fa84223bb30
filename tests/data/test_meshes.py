"""Clouds and meshes from .ply and .off."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from maefast.data.blob import Blob
from maefast.data.points import Mesh, Points, read_cloud
from maefast.errors import BadFile

trimesh = pytest.importorskip("trimesh")

# Two triangles of areas 1 and 3, in one plane.
VERTICES = np.array([[0, 0, 0], [2, 0, 0], [0, 1, 0], [2, 3, 0]], np.float64)
FACES = np.array([[0, 1, 2], [1, 3, 0]])


def write(path, vertices=VERTICES, faces=FACES, kind="ascii"):
    if faces is None:
        made = trimesh.PointCloud(vertices)
        path.write_bytes(made.export(file_type="ply"))
        return path
    made = trimesh.Trimesh(vertices, faces, process=False)
    more = {"encoding": kind} if path.suffix == ".ply" else {}
    data = made.export(file_type=path.suffix[1:], **more)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_meshes(tmp_path):
    for path in (write(tmp_path / "a.off"), write(tmp_path / "b.ply"), write(tmp_path / "c.ply", kind="binary")):
        for where in (path, Blob("x.tar/" + path.name, path.read_bytes)):
            mesh = read_cloud(where)
            assert isinstance(mesh, Mesh)
            np.testing.assert_allclose(mesh.vertices, VERTICES, atol=1e-6)
            assert mesh.faces.tolist() == FACES.tolist()
    glued = (tmp_path / "a.off").read_text().replace("OFF\n", "OFF", 1)  # as some of ModelNet40's are
    (tmp_path / "d.off").write_text(glued)
    assert read_cloud(tmp_path / "d.off").faces.tolist() == FACES.tolist()
    quad = "OFF\n4 1 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n4 0 1 2 3\n"
    (tmp_path / "e.off").write_text(quad)
    assert read_cloud(tmp_path / "e.off").faces.shape == (2, 3)


def test_clouds(tmp_path):
    points = np.random.default_rng(0).standard_normal((30, 3))
    np.testing.assert_allclose(read_cloud(write(tmp_path / "a.ply", points, None)), points, atol=1e-6)


def test_points_of_a_surface():
    mesh = Mesh(VERTICES, FACES)
    points = mesh.points(20_000, np.random.default_rng(0))
    assert points.shape == (20_000, 3)
    assert not points[:, 2].any()
    x, y = points[:, 0], points[:, 1]
    lower = y <= (2 - x) / 2 + 1e-12
    upper = (y <= 1.5 * x + 1e-12) & (x <= 2 + 1e-12)
    assert (lower | upper).all()
    areas = 0.5 * np.abs(np.cross(VERTICES[FACES][:, 1] - VERTICES[FACES][:, 0],
                                  VERTICES[FACES][:, 2] - VERTICES[FACES][:, 0])).max(1)  # fmt: skip
    one = Mesh(VERTICES, FACES[:1]).points(20_000, np.random.default_rng(1))
    np.testing.assert_allclose(one.mean(0), VERTICES[FACES[0]].mean(0), atol=0.02)  # uniform in a triangle
    want = sum(area * VERTICES[face].mean(0) for area, face in zip(areas, FACES)) / areas.sum()
    np.testing.assert_allclose(points.mean(0), want, atol=0.02)
    assert np.array_equal(points, mesh.points(20_000, np.random.default_rng(0)))


def test_samples_of_meshes(tmp_path):
    write(tmp_path / "a.off")
    options = SimpleNamespace(data=str(tmp_path), seed=0, skip_bad=False)
    source = Points(64).open(options)
    batch, _ = source.collate([source[0, 0, 0], source[1, 1, 0]])
    assert batch.points.shape == (2, 64, 3)
    assert batch.points.isfinite().all()
    again, _ = source.collate([source[0, 0, 0], source[1, 1, 0]])
    assert batch.points.equal(again.points)
    example, names = source.examples(1)
    assert names == ["a.off"]
    assert example.points.norm(dim=2).max() <= 1 + 1e-6


def test_refusals(tmp_path):
    for name, text, match in (
        ("a.off", "no mesh", "."),
        ("b.ply", "ply\nformat ascii 1.0\nelement vertex 0\nend_header\n", "."),
        ("c.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "."),
        ("d.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n", "no area"),
        ("e.off", "OFF\n3 1 0\n0 0 0\nnan 0 0\n2 0 0\n3 0 1 2\n", "not finite"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=match):
            read_cloud(tmp_path / name)
    source = Points(8).open(SimpleNamespace(data=str(tmp_path), seed=0, skip_bad=False))
    with pytest.raises(BadFile, match=r"d\.off: its faces have no area"):
        source.entries[3]
