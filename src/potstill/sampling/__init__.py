"""Sample answers: the sampler, and a batch that is refilled as answers end."""

from potstill.sampling.refilled import RefilledSampler as RefilledSampler
from potstill.sampling.refilled import SampledRow as SampledRow
from potstill.sampling.refilled import end_tokens as end_tokens
from potstill.sampling.sampler import Sampling as Sampling
from potstill.sampling.sampler import sample_tokens as sample_tokens
from potstill.sampling.sampler import uniforms as uniforms

__all__ = [
    "RefilledSampler",
    "SampledRow",
    "Sampling",
    "end_tokens",
    "sample_tokens",
    "uniforms",
]
