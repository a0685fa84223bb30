"""The shape that most recipes share: visible tokens in, predictions of masked ones out, one loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from maefast.recipe import Output, Recipe, View


class Autoencoder(Recipe):
    """An `encoder` (parts, plan -> latents) and a `decoder` (latents, plan -> predictions), as of `maefast.nn`.

    A subclass builds both and defines `prepare` and `score`.
    """

    encoder: nn.Module
    decoder: nn.Module

    def score(self, pred: Tensor, view: View) -> Mapping[str, Tensor]:
        """The terms of the loss of predictions in plan order."""
        raise NotImplementedError

    def guess(self, view: View) -> Tensor:
        """What the baseline predicts, in the place of the decoder: by default the mean of normalised targets, zero."""
        some = view.parts if isinstance(view.parts, Tensor) else view.target
        return some.new_zeros(view.plan.total_masked, self.decoder.pred.out_features)

    def compute(self, view: View) -> Output:
        pred = self.decoder(self.encoder(view.parts, view.plan, features=False), view.plan, parts=view.parts)
        return Output(self.score(pred, view), pred, view)

    def baseline(self, view: View) -> Output:
        pred = self.guess(view)
        return Output(self.score(pred, view), pred, view)
