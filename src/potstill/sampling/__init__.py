"""Sample answers: the sampler (sampler.py) and a refilled batch (batch.py)."""

from potstill.sampling.sampler import Sampling as Sampling
from potstill.sampling.sampler import sample_tokens as sample_tokens
from potstill.sampling.sampler import uniforms as uniforms

__all__ = ["Sampling", "sample_tokens", "uniforms"]
