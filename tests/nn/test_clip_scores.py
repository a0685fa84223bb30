from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maefast.nn.clip_scores import ClipScores
from maefast.nn.teachers import CLIP_MEAN, CLIP_STD


def tiny():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 50, "max_position_embeddings": 8},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    return transformers.CLIPModel(config).eval().double()


def test_scores_are_cosines_of_patches_and_caption():
    model = tiny()
    clips, text = torch.rand(2, 3, 4, 32, 32, dtype=torch.double), torch.randn(2, 12, dtype=torch.double)
    scores = ClipScores(model, (2, 4, 4)).double()
    found = scores.maps(clips, text)
    assert found.shape == (2, 4, 4, 4)
    mean, std = (torch.tensor(numbers, dtype=torch.double).view(3, 1, 1) for numbers in (CLIP_MEAN, CLIP_STD))
    for sample in range(2):
        for frame in range(4):
            pixels = ((clips[sample, :, frame] - mean.float()) / std.float())[None]
            with torch.no_grad():
                tokens = model.vision_model(pixel_values=pixels).last_hidden_state[0, 1:]
                patches = model.visual_projection(model.vision_model.post_layernorm(tokens))
            want = F.cosine_similarity(patches, text[sample][None]).view(4, 4)
            torch.testing.assert_close(found[sample, frame], want, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(scores(clips, text), found.view(2, 2, 2, 16).mean(2), rtol=1e-6, atol=1e-6)
    finer = ClipScores(model, (4, 8, 8)).double()(clips, text)
    assert finer.shape == (2, 4, 64)
    torch.testing.assert_close(finer.mean(2), found.flatten(2).mean(2), rtol=0, atol=1e-6)
    assert ClipScores(model, (2, 4, 4)).double()(F.interpolate(clips, (4, 48, 40)), text).shape == (2, 2, 16)


def test_scores_of_what_cannot_be():
    with pytest.raises(TypeError, match="without vision_model, visual_projection"):
        ClipScores(nn.Linear(2, 2), (2, 4, 4))
    scores = ClipScores(tiny(), (3, 4, 4)).double()
    clips, text = torch.rand(2, 3, 4, 32, 32, dtype=torch.double), torch.randn(2, 12, dtype=torch.double)
    with pytest.raises(ValueError, match="a multiple of 3 frames, got 4"):
        scores(clips, text)
    with pytest.raises(ValueError, match=r"text \[B, 12\], got"):
        scores(clips, text[:, :5])
