"""M3AE: images and their captions, each hidden in part and found from what is left of both (Chen et al., MICCAI 2022,
arXiv:2209.07098).

A transformer of images (CLIP's) and one of text (RoBERTa's) lead into two streams of layers that look at each other.
With W the hidden tokens of captions, M the hidden patches, t a patch normalised by its own mean and variance, and m
whether an image is the caption's own,

    loss =   mean over W of cross_entropy(tokens(hidden caption, whole image), ids)
           + mean over M of mean((patches(whole caption, rest of the image) - t)^2)
           + mean cross_entropy(matching(whole caption, its own or another image), m)

Patches are told by the image's stream as it enters fusion layer `layer`, tokens and matching behind the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import masking, ops
from maefast.data.captioned_images import CaptionBatch, CaptionedImages
from maefast.data.images.batch import normalise
from maefast.data.shapes import MASK, WORDS
from maefast.names import Names, clip_blocks
from maefast.nn import ClipEncoder, CoAttention, Decoder, LanguageHead, Linear, Packing, TextEncoder, sincos_2d
from maefast.nn.bert import init_bert_
from maefast.nn.patch_embed import pair, patch_grid
from maefast.nn.patches import reconstruct
from maefast.nn.teachers import CLIP_MEAN, CLIP_STD
from maefast.ops import _checks
from maefast.recipe import Draw, Output, Picture, Progress, Recipe, Spec, View
from maefast.recipes._captions import frequencies, packed, pairs, said
from maefast.recipes._images import mean_colour

FASTER = ("fusion.", "mlm_head.", "mim_head.", "itm_head.")


class M3AE(Recipe):
    """Args:
        length: L, the longest caption. vocabulary: of tokens. tokenizer: see `CaptionedImages`. mask_id: of the token
            that stands for hidden ones; None: RoBERTa's, the last, or the demo's.
        mask_ratio: int(N * (1 - ratio)) patches stay visible. word_ratio, whole_words: of a caption, see
            `masking.whole_words`; without them each token is a word.
        img_size, patch_size, depth: of the image encoder. text_depth, fusion_depth, embed_dim, num_heads: of the text
            encoder, of each stream of the fusion, of all three. drop: of text and fusion, in training.
        layer: of the fusion, from 0, whose input tells the patches; `fusion_depth`: the output of the last.
        decoder_*: of the patches. norm_pix: they are normalised.

    Shapes: images [B, 3, H, W], ids [B, L]; pred: logits [W, vocabulary] and patches [B, masked, p * p * 3].
    """

    spec = Spec(
        name="m3ae",
        title="M3AE",
        paper="Chen et al., MICCAI 2022, arXiv:2209.07098",
        modality="images with captions",
        sizes={"base": {}},
        training={
            "lr": 1e-5, "betas": (0.9, 0.98), "weight_decay": 0.01, "batch_size": 256, "steps": 100000, "warmup": 0.1,
            "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0),
            "graph": "off",  # each batch has another number of tokens
        },
        demo={
            "model_args": {"length": 12, "vocabulary": 19, "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1,
                           "text_depth": 1, "fusion_depth": 2, "layer": 1, "num_heads": 3, "drop": 0.0,
                           "decoder_embed_dim": 48, "decoder_depth": 1, "decoder_num_heads": 3, "mask_ratio": 0.5,
                           "faster": 1.0},
            "steps": 330, "batch_size": 16, "lr": 2e-3, "warmup": 0.1, "clip": 1.0, "picture_rows": 6,
        },
        baseline="tokens as often as they are hidden, each patch's mean, one half",
    )  # fmt: skip
    names = Names(
        *clip_blocks("vision_encoder.visual.transformer.resblocks.", "vision_encoder.blocks."),
        ("vision_encoder.visual.", "vision_encoder."),
        ("multi_modal_", "fusion."),
        ("modality_type_embeddings.", "fusion.type_embeddings."),
        ("language_encoder.encoder.", "language_encoder."),
        ("language_encoder.embeddings.", "language_encoder.embeddings."),
        *clip_blocks("mim_head.decoder.resblocks.", "mim_head.blocks."),
        ("mim_head.decoder_", "mim_head."),
        ("mim_head.decoder_pos_embed", "mim_head.pos_embed"),
        ("mim_head.mask_token", "mim_head.mask_token"),
        unused=("vision_encoder.token_embedding", "vision_encoder.positional_embedding", "vision_encoder.ln_final",
                "language_encoder.pooler.", "language_encoder.embeddings.position_ids"),
    )  # fmt: skip

    def __init__(
        self,
        length: int = 64,
        vocabulary: int = 50265,
        tokenizer: str | None = None,
        mask_id: int | None = None,
        mask_ratio: float = 0.75,
        word_ratio: float = 0.15,
        whole_words: bool = True,
        img_size: int | Sequence[int] = 288,
        patch_size: int | Sequence[int] = 16,
        embed_dim: int = 768,
        depth: int = 11,
        text_depth: int = 12,
        fusion_depth: int = 6,
        num_heads: int = 12,
        layer: int = 3,
        drop: float = 0.1,
        decoder_embed_dim: int = 384,
        decoder_depth: int = 4,
        decoder_num_heads: int = 6,
        norm_pix: bool = True,
        faster: float = 5.0,
    ) -> None:
        super().__init__()
        size, patch = pair("img_size", img_size), pair("patch_size", patch_size)
        self.grid, self.patch = patch_grid(size, patch), patch
        _checks.integer("fusion_depth", fusion_depth, 1)
        _checks.integer("layer", layer)
        if layer > fusion_depth:
            raise ValueError(
                f"layer must name the input of one of {fusion_depth} layers, or {fusion_depth}, got {layer}"
            )
        self.wants = CaptionedImages(size, length, vocabulary, tokenizer)
        self.mask_id = (MASK if vocabulary == len(WORDS) else vocabulary - 1) if mask_id is None else mask_id
        if not 0 <= self.mask_id < vocabulary:
            raise ValueError(f"mask_id must lie in [0, {vocabulary}), got {mask_id}")
        self.mask_ratio, self.word_ratio, self.whole_words = mask_ratio, word_ratio, whole_words
        self.layer, self.norm, self.faster = layer, "mae" if norm_pix else "none", faster
        for name, numbers in (("mean", CLIP_MEAN), ("std", CLIP_STD)):
            self.register_buffer(name, torch.tensor(numbers).view(3, 1, 1), persistent=False)
        self.vision_encoder = ClipEncoder(size, patch, embed_dim, depth, num_heads)
        self.language_encoder = TextEncoder(vocabulary, length, embed_dim, text_depth, num_heads, drop=drop)
        self.fusion = CoAttention(embed_dim, fusion_depth, num_heads, drop)
        self.mlm_head = LanguageHead(embed_dim, vocabulary)
        table = nn.Parameter(sincos_2d(decoder_embed_dim, self.grid, prefix=1)[None], requires_grad=False)
        sizes, how = (decoder_embed_dim, decoder_depth, decoder_num_heads), {"activation": "quick_gelu"}
        self.mim_head = Decoder(embed_dim, 3 * patch[0] * patch[1], table, *sizes, norm_eps=1e-5, **how)
        self.itm_head = nn.ModuleDict({"fc": Linear(2 * embed_dim, 2)})
        for part in (self.mim_head, self.itm_head):
            init_bert_(part, embed_dim)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Vectors do not decay; fusion and heads learn `faster`."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                key = parameter.ndim > 1, name.startswith(FASTER) and "type_embeddings" not in name
                groups.setdefault(key, []).append(parameter)
        return [
            {"params": some, "weight_decay": weight_decay * decays, "lr_scale": self.faster if fast else 1.0}
            for (decays, fast), some in groups.items()
        ]

    def prepare(self, batch: CaptionBatch, draw: Draw, progress: Progress) -> View:
        """parts: images; plan: `Pairs`; target: `Told`."""
        images, patches = self._images(batch), self.grid[0] * self.grid[1]
        image = masking.random(
            len(images), patches, self.mask_ratio, noise=draw.uniform("mask", patches, images.device)
        )
        hide = {"ratio": self.word_ratio, "whole": self.whole_words}
        return View(images, *pairs(batch, draw, image, self.mask_id, self.wants.vocabulary, **hide))

    def _images(self, batch: CaptionBatch) -> Tensor:
        self.wants.check(batch)
        return normalise(batch.images, self.mean, self.std)

    def compute(self, view: View) -> Output:
        plan, fusion, half = view.plan, self.fusion, len(view.plan.ids) // 2
        texts = fusion.entering("language", self.language_encoder(plan.ids, plan.places, plan.texts))
        whole, rest = (fusion.entering("vision", self.vision_encoder(view.parts, mask)) for mask in (None, plan.image))
        patches = self.mim_head(fusion.seen(texts[half:], plan.text, rest, self.layer), plan.image)
        images = torch.cat([whole, whole[plan.image_of]])
        rows, pooled = fusion(texts, plan.texts, images, plan.rows, plan.telling, plan.text, half)
        pred = self.mlm_head(rows), patches, self.itm_head["fc"](pooled)
        return Output(self._terms(pred, view), pred, view)

    def _terms(self, pred: tuple[Tensor, Tensor, Tensor], view: View) -> dict[str, Tensor]:
        tokens, matching = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in pred[::2])
        return {
            "tokens": F.cross_entropy(tokens, view.target.ids),
            "patches": ops.patch_loss(pred[1], view.parts, view.plan.image, self.patch, norm=self.norm),
            "matching": F.cross_entropy(matching, view.target.matched),
        }

    def baseline(self, view: View) -> Output:
        images = view.parts
        patches = mean_colour(images, self.patch, view.plan.image.total_masked) * (self.norm == "none")
        tokens = frequencies(view.target.ids, self.wants.vocabulary, images)
        pred = tokens, patches, images.new_zeros(len(images), 2)
        return Output(self._terms(pred, view), pred, view)

    def encode(self, batch: CaptionBatch) -> Tensor:
        """[B, 2 D]: the pooled first tokens of caption and image, what the authors' tasks start from."""
        images, (ids, places, text) = self._images(batch), packed(batch)
        x = self.fusion.entering("language", self.language_encoder(ids, places, text))
        y = self.fusion.entering("vision", self.vision_encoder(images))
        starts = text.cu_seqlens[:-1].long()
        return self.fusion(x, text, y, starts, Packing.even(len(images), 1, images.device), text)[1]

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.images import pictures

        logits, patches, matching = self.compute(view).pred
        shown = reconstruct(patches, view.parts, view.plan.image, self.patch, self.norm)
        columns = [pictures.to_pixels(column, self.mean, self.std) for column in shown[:4]]
        names = [f"{name}: {text}" for name, text in zip(names, said(self.wants, view.plan, logits.argmax(1)))]
        right = (matching.argmax(1) == view.target.matched).double().mean()
        caption = f"{self.mask_ratio:.0%} masked; [hidden word: predicted]\nown or another image: {right:.0%} right"
        return pictures.Sheet(columns, names, caption)
