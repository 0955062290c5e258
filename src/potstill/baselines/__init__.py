"""Methods from the literature to compare with, each with its known defects."""

from potstill.baselines.cells import BytePrefixCells as BytePrefixCells
from potstill.baselines.cells import PushForwardCells as PushForwardCells
from potstill.baselines.cells import StrictCells as StrictCells
from potstill.baselines.chunk_likelihoods import fused_linear_chunks as fused_linear_chunks
from potstill.baselines.last_token import fused_linear_last_token as fused_linear_last_token
from potstill.baselines.sorted_probabilities import fused_linear_sorted as fused_linear_sorted
from potstill.baselines.targets import LastTokenTarget as LastTokenTarget
from potstill.baselines.targets import SortedTarget as SortedTarget
from potstill.baselines.targets import SpanLikelihoodTarget as SpanLikelihoodTarget

__all__ = [
    "BytePrefixCells",
    "LastTokenTarget",
    "PushForwardCells",
    "SortedTarget",
    "SpanLikelihoodTarget",
    "StrictCells",
    "fused_linear_chunks",
    "fused_linear_last_token",
    "fused_linear_sorted",
]
