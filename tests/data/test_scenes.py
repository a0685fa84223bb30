from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from maefast.data.scenes import SceneBatch, Scenes, read_scene, sphere_scene

OPTIONS = {"seed": 0, "skip_bad": False, "column": None}
WANTS = Scenes((6, 8), views=2)


def test_files(tmp_path):
    scene = sphere_scene(3, 4, (6, 8))
    np.savez(tmp_path / "one.npz", views=scene.views, poses=scene.poses, focal=scene.focal)
    source = WANTS.open(SimpleNamespace(data=str(tmp_path), **OPTIONS))
    batch, bad = source.collate([source[0, 0, 0]])
    assert not bad
    WANTS.check(batch)
    again = source.collate([source[0, 0, 0]])[0]
    assert torch.equal(batch.views, again.views)
    examples, names = source.examples(1)
    assert names == ["one.npz"]
    assert np.array_equal(examples.views[0, 1].permute(1, 2, 0).numpy(), scene.views[2])
    assert np.array_equal(examples.poses[0].numpy(), scene.poses[[0, 2]])
    with pytest.raises(ValueError, match="3 views of"):
        Scenes((6, 8), views=3).example(scene._replace(views=scene.views[:2]))
    np.savez(tmp_path / "two.npz", views=scene.views)
    with pytest.raises(ValueError, match="it has no focal, poses"):
        read_scene(tmp_path / "two.npz")
    np.savez(tmp_path / "three.npz", views=scene.views, poses=scene.poses[:2], focal=1.0)
    with pytest.raises(ValueError, match=r"poses \[n, 3, 4\]"):
        read_scene(tmp_path / "three.npz")
    np.savez(tmp_path / "four.npz", views=scene.views, poses=scene.poses, focal=-1.0)
    with pytest.raises(ValueError, match="the focal positive"):
        read_scene(tmp_path / "four.npz")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            (torch.zeros(1, 2, 3, 6, 7, dtype=torch.uint8), torch.zeros(1, 2, 3, 4), torch.ones(1)),
            "views must be uint8",
        ),
        ((torch.zeros(1, 2, 3, 6, 8, dtype=torch.uint8), torch.zeros(1, 2, 4, 4), torch.ones(1)), "poses must be"),
        ((torch.zeros(1, 2, 3, 6, 8, dtype=torch.uint8), torch.zeros(1, 2, 3, 4), torch.ones(2)), "focals"),
    ],
)
def test_batches_that_do_not_fit(batch, message):
    with pytest.raises(ValueError, match=message):
        WANTS.check(SceneBatch(*batch))


def test_cameras_of_the_demo_look_at_the_origin():
    scene = sphere_scene(0, 5, (16, 16))
    for pose in scene.poses:
        turn, place = pose[:, :3], pose[:, 3]
        assert np.allclose(turn.T @ turn, np.eye(3), atol=1e-6)
        assert np.linalg.det(turn) == pytest.approx(1, abs=1e-5)
        assert np.allclose(turn[:, 2], -place, atol=1e-6)
        assert turn[1, 1] > 0  # y points down, as in the picture
    assert np.array_equal(sphere_scene(0, 5, (16, 16)).views, scene.views)
    assert all((view > 0).any() for view in scene.views)
