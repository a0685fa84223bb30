"""Samplers that make plans. Each is a map of scores and a count: the lowest scores of a sample stay visible.

    random         uniform noise a token                                 MAE (He et al., 2021)
    tube           noise shared along time                               VideoMAE (Tong et al., 2022)
    block          rectangles masked until an exact count is reached     BEiT (Bao et al., 2021)
    enlarge        tokens of a plan as blocks of a finer grid            SimMIM (Xie et al., 2022), DMJD
    grid           one token of each cell of a regular grid stays        MAE, ablation "grid-wise sampling"
    cells          random cells of a convnet's map, as a CellMask        SparK (Tian et al., 2023)
    dual           tube, of which a running pattern is decoded           VideoMAE V2 (Wang et al., 2023)
    running_cells  that pattern; `only` puts it on another plan          VideoMAE V2
    coloured       filtered noise: red, green, blue, purple              ColorMAE (Hinojosa et al., 2024)
    weighted       kept in proportion to weights, such as attention      MaskAlign (Xue et al., 2023)
    disjoint       several plans that share no visible token             LUT (arXiv 2310.13593), DMJD (arXiv 2301.00230)
    mixing         each place visible in one sample of a group          MixedAE (Chen et al., 2023)
    channels       patches of each channel, or whole channels            ChA-MAEViT (NeurIPS 2025)
    ragged         uniform among the tokens within each length           LV-MAE (arXiv 2504.03501)
    similar        by likeness to the segment before                     LV-MAE
    near           the groups nearest to a random one are masked         Point-MAE (Pang et al., 2022)
    guided         the highest scores of each frame are masked  TGM (Fan et al., 2024)
    children       what belongs to visible groups, a finer scale         Point-M2AE (Zhang et al., 2022), I2P-MAE
    nodes          nodes of graphs, as a NodeMask                        GraphMAE (Hou et al., 2022)
    nested         a number is dropped, a larger one hidden              Vec2Face (Wu et al., 2025)
    whole_words    words of texts, as a map of hidden tokens; `replaced` BERT (Devlin et al., 2019), M3AE

Your own sampler is `from_scores(scores, keep)`. With `noise` given, nothing is drawn, so that a run can be
replayed; with `generator`, only that generator is advanced.

Arguments that samplers share: `batch`, the number of samples; `ratio`, the share that is masked, or `keep`, the number
that stays, one of them; `device`, where noise is drawn and the plan lies (that of `noise` or `generator`, if given);
`rule`, how a share becomes a count (`keep_count`); `backend`, as of the ops. What does not fit raises TypeError or
ValueError.
"""

from maefast.masking.blocks import block, enlarge, grid
from maefast.masking.colour import coloured
from maefast.masking.counts import keep_count
from maefast.masking.graphs import NodeMask, nodes
from maefast.masking.guided import guided
from maefast.masking.multichannel import channels
from maefast.masking.nested import nested
from maefast.masking.points import children, near
from maefast.masking.running import dual, only, running_cells
from maefast.masking.sequences import ragged, similar
from maefast.masking.uniform import cells, random, tube
from maefast.masking.weights import disjoint, mixing, weighted
from maefast.masking.words import replaced, whole_words
from maefast.ops.mask import TokenMask

from_scores = TokenMask.from_scores
from_bool = TokenMask.from_bool
from_indices = TokenMask.from_indices
from_ids_restore = TokenMask.from_ids_restore

__all__ = [
    "NodeMask",
    "block",
    "cells",
    "channels",
    "children",
    "coloured",
    "disjoint",
    "dual",
    "enlarge",
    "from_bool",
    "from_ids_restore",
    "from_indices",
    "from_scores",
    "grid",
    "guided",
    "keep_count",
    "mixing",
    "near",
    "nested",
    "nodes",
    "only",
    "ragged",
    "random",
    "replaced",
    "running_cells",
    "similar",
    "tube",
    "weighted",
    "whole_words",
]
