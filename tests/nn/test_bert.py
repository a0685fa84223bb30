"""Post-norm layers of text, and CLIP's image encoder, against transformers."""

from __future__ import annotations

import pytest
import torch

from maefast import masking
from maefast.names import clip_blocks
from maefast.nn import Block, ClipEncoder, CoAttention, Packing, PostNormLayer, TextEncoder

LENGTHS = [5, 2, 7]


def test_text_is_roberta():
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=10, layer_norm_eps=1e-5, type_vocab_size=1, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = RobertaModel(config, add_pooling_layer=False).double().eval()
    ours = TextEncoder(20, 8, 16, 2, 2).double().eval()
    ours.load_state_dict({k.removeprefix("encoder."): v for k, v in theirs.state_dict().items()})
    there = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(2, 20, (3, 7)).masked_fill(~there, 1)
    want = theirs(ids, attention_mask=there.long()).last_hidden_state[there]
    places = torch.arange(7).expand(3, -1)[there]
    found = ours(ids[there], places, Packing.of_lengths(LENGTHS, "cpu"))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def test_images_are_clip():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    torch.manual_seed(0)
    theirs = CLIPVisionModel(config).double().eval()
    ours = ClipEncoder(16, 4, 16, 2, 2).double()
    given = {name.removeprefix("vision_model."): value for name, value in theirs.state_dict().items()}
    with torch.no_grad():
        for mine, name in (("class_embedding", "embeddings.class_embedding"),
                           ("positional_embedding", "embeddings.position_embedding.weight"),
                           ("conv1.weight", "embeddings.patch_embedding.weight")):  # fmt: skip
            ours.get_parameter(mine).copy_(given[name])
        for i, block in enumerate(ours.blocks):
            at = f"encoder.layers.{i}."
            for what in ("weight", "bias"):
                qkv = [given[f"{at}self_attn.{part}_proj.{what}"] for part in "qkv"]
                getattr(block.attn.qkv, what).copy_(torch.cat(qkv))
                getattr(block.attn.proj, what).copy_(given[f"{at}self_attn.out_proj.{what}"])
                for part in ("fc1", "fc2"):
                    getattr(getattr(block.mlp, part), what).copy_(given[f"{at}mlp.{part}.{what}"])
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    want = theirs(images).last_hidden_state
    torch.testing.assert_close(
        ours(images)[:, 1:], torch.nn.functional.layer_norm(want, (16,))[:, 1:], rtol=0, atol=1e-9
    )
    plan = masking.random(2, 16, 0.5, generator=torch.Generator().manual_seed(0))
    assert ours(images, plan).shape == (2, 9, 16)


def test_rows_are_those_of_the_whole():
    torch.manual_seed(0)
    layer = PostNormLayer(16, 2, cross=True).double()
    x, y = (torch.randn(n, 16, dtype=torch.float64) for n in (14, 9))
    packing, other = Packing.of_lengths(LENGTHS, "cpu"), Packing.of_lengths([3, 3, 3], "cpu")
    rows = torch.tensor([1, 3, 6, 7, 13])
    found = layer(x, packing, y, other, rows, Packing.of_lengths([2, 1, 2], "cpu"))
    torch.testing.assert_close(found, layer(x, packing, y, other)[rows], rtol=0, atol=1e-12)


def test_co_attention_stops_where_it_is_asked():
    torch.manual_seed(0)
    fusion = CoAttention(16, 3, 2).double()
    texts = Packing.of_lengths(LENGTHS, "cpu")
    x, y = torch.randn(14, 16, dtype=torch.float64), torch.randn(3, 4, 16, dtype=torch.float64)
    images = Packing.of_lengths([4, 4, 4], "cpu")
    a, b, entering = x, y.flatten(0, 1), []
    for layer, other in zip(fusion.language_layers, fusion.vision_layers):
        entering.append(b)
        a, b = layer(a, texts, b, images), other(b, images, a, texts)
    for i, want in enumerate([*entering, b]):
        torch.testing.assert_close(fusion.seen(x, texts, y, i).flatten(0, 1), want, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="at least one pair"):
        CoAttention(16, 0, 2)


def test_quick_gelu_and_names():
    block = Block(16, 2, activation="quick_gelu").double()
    x = torch.randn(5, 16, dtype=torch.float64)
    inner = block.mlp.fc1(x)
    torch.testing.assert_close(block.mlp(x), block.mlp.fc2(inner * torch.sigmoid(1.702 * inner)))
    with pytest.raises(ValueError, match="activation must be"):
        Block(16, 2, activation="relu")
    assert ("a.1.mlp.c_fc.", "b.1.mlp.fc1.") in clip_blocks("a.", "b.", 2)
