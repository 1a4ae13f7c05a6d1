"""The pure functions behind the modules, in the order in which data meets them."""

from vqssl.functional.bags import bag_of_codes, soft_codes
from vqssl.functional.code_anchors import anchor_loss, code_anchor
from vqssl.functional.code_cross_entropy import code_cross_entropy
from vqssl.functional.commitment import commitment_loss
from vqssl.functional.cosine_regression import cosine_regression_loss
from vqssl.functional.diversity import diversity_loss
from vqssl.functional.ema_rules import EMA_RULES, CodebookState, batch_mean_ema, count_weighted_ema
from vqssl.functional.estimators import ESTIMATORS, rotation_trick, straight_through
from vqssl.functional.metrics import METRICS, euclidean
from vqssl.functional.places import Grid, canonical_cells, matched_cells
from vqssl.functional.refinement import REFINEMENTS, align_refinement, detached_refinement, predict_refinement
from vqssl.functional.schedules import cosine_momentum
from vqssl.functional.search import nearest_codeword
from vqssl.functional.serf_operators import (
    OPERATORS,
    SERFOperator,
    batch_attention,
    channel_attention,
    concatenation,
    masked_mean,
    pooled_codes,
    spatial_attention,
    spatial_attention_weights,
)
from vqssl.functional.sinkhorn import sinkhorn
from vqssl.functional.teacher_buffers import BUFFER_POLICIES, copy_buffer, ema_buffer, ema_buffers, own_buffer
from vqssl.functional.usage import code_counts, codebook_usage, target_spread
from vqssl.functional.vectors import unit

__all__ = [
    "euclidean",
    "unit",
    "METRICS",
    "nearest_codeword",
    "straight_through",
    "rotation_trick",
    "ESTIMATORS",
    "commitment_loss",
    "CodebookState",
    "count_weighted_ema",
    "batch_mean_ema",
    "EMA_RULES",
    "masked_mean",
    "channel_attention",
    "batch_attention",
    "spatial_attention",
    "spatial_attention_weights",
    "pooled_codes",
    "concatenation",
    "SERFOperator",
    "OPERATORS",
    "cosine_regression_loss",
    "predict_refinement",
    "align_refinement",
    "detached_refinement",
    "REFINEMENTS",
    "bag_of_codes",
    "soft_codes",
    "code_cross_entropy",
    "sinkhorn",
    "diversity_loss",
    "code_anchor",
    "anchor_loss",
    "Grid",
    "matched_cells",
    "canonical_cells",
    "cosine_momentum",
    "ema_buffer",
    "ema_buffers",
    "copy_buffer",
    "own_buffer",
    "BUFFER_POLICIES",
    "code_counts",
    "codebook_usage",
    "target_spread",
]
