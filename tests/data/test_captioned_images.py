"""Images with captions: tokens given, or from a tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from maefast.data import shapes
from maefast.data.captioned_images import CaptionedImages
from maefast.errors import BadFile, ConfigError
from maefast.train import PretrainConfig

WANTS = {"size": (8, 8), "length": 6, "vocabulary": 12}


def options(data, **changes):
    return PretrainConfig(data=str(data), crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), **changes)


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((10, 16, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_ids_are_given(folder):
    np.save(folder / "0.npy", np.array([0, 5, 6, 1]))
    np.save(folder / "1.npy", np.array([[0, 5, 6, 7, 1], [-1, 3, 3, 9, -1]]))
    np.save(folder / "2.npy", np.arange(9))
    source = CaptionedImages(**WANTS).open(options(folder))
    batch, names = source.examples(3)
    source.kind.wants.check(batch)
    assert names == ["0.png", "1.png", "2.png"]
    assert batch.images.flatten(1)[:, 0].tolist() == [0, 40, 80]
    assert batch.words.tolist() == [[-1, 0, 1, -1, -2, -2], [-1, 0, 0, 1, -1, -2], [-1, 0, 1, 2, 3, -1]]
    assert batch.ids[2].tolist() == [0, 1, 2, 3, 4, 8]  # cut, the last one kept
    assert torch.equal(torch.from_numpy(source[0, 0, 1][0].ids), batch.ids[1, :5])
    with pytest.raises(BadFile, match="160 pixels are more than 100"):
        CaptionedImages(**WANTS).open(options(folder, max_pixels=100)).examples(1)


@pytest.mark.parametrize(
    ("ids", "message"),
    [([0, 12, 1], "beyond 0 to 11"), ([0, 1], "no word"), ([[0, 1]], "ids and words"), ([0.5, 1, 2], "float64")],
)
def test_captions_that_are_none(folder, ids, message):
    np.save(folder / "0.npy", np.array(ids))
    with pytest.raises(BadFile, match=message):
        CaptionedImages(**WANTS).open(options(folder)).examples(1)


def test_an_image_without_a_caption(folder):
    with pytest.raises(BadFile, match=r"no caption 0\.npy"):
        CaptionedImages(**WANTS).open(options(folder)).examples(1)


def test_a_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = {"<s>": 0, "</s>": 1, "red": 2, "squ": 3, "##are": 4, "[UNK]": 5, ",": 6}
    made = Tokenizer(models.WordPiece(known, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder / "tokenizer")
    for i in range(3):
        (folder / f"{i}.txt").write_text("red square\n" if i else "red, red, red, red")
    wants = CaptionedImages(**WANTS, tokenizer=str(folder / "tokenizer"))
    batch, _ = wants.open(options(folder)).examples(3)
    assert batch.ids[1, :5].tolist() == [0, 2, 3, 4, 1]
    assert batch.words[1].tolist() == [-1, 0, 1, 1, -1, -2]
    assert batch.ids[0].tolist() == [0, 2, 6, 2, 6, 1]
    assert wants.say(2) == "red"
    with pytest.raises(ConfigError, match="more than 3"):
        CaptionedImages((8, 8), 6, 3, str(folder / "tokenizer")).open(options(folder))
    with pytest.raises(ConfigError, match="tokenizer"):
        CaptionedImages(**WANTS, tokenizer=str(folder / "nothing")).open(options(folder))


def test_drawn_shapes():
    wants = CaptionedImages((16, 16), 12, len(shapes.WORDS))
    batch, _ = wants.open(options("demo")).examples(40)
    wants.check(batch)
    said = [" ".join(map(wants.say, ids[words > -2].tolist())) for ids, words in zip(batch.ids, batch.words)]
    assert all(text.startswith("<s> a ") and text.endswith(" </s>") for text in said)
    assert len(set(said)) > 30
    for text, image in zip(said, batch.images):
        for name, colour in shapes.COLOURS.items():
            there = (image == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(0).any()
            assert bool(there) <= (name in text)
    with pytest.raises(ConfigError, match="19 words, not 20"):
        CaptionedImages((16, 16), 12, 20).open(options("demo"))
    with pytest.raises(ValueError, match="shape must be one of"):
        shapes.inside("star", np.zeros(1), np.zeros(1))
