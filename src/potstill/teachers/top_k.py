"""A target of the k most likely tokens and one cell for all others: what most servers can give.

N tokens, k entries, V the student's vocabulary. The cells are the k tokens and the rest
(losses/partitions.py). Merging tokens into a cell can only lower an f-divergence, so a divergence
over cells is a lower bound of that over tokens. All divergences of `potstill.losses` are of this
kind. The loss adds the cross-entropy within the rest: if the text was sampled from the teacher, the
expected gradient of forward KL is the exact one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.errors import ConfigError
from potstill.losses import Head, forward_kl, fused_linear_topk
from potstill.losses.partitions import TopKPartition
from potstill.teachers.targets import BlockScores, LossSettings

SMALLEST_REST = 1e-6
"""Mass of the rest where the k rounded probabilities sum to 1."""


@dataclass(frozen=True)
class TopKTarget:
    """The k most likely tokens of the teacher at each position, the most likely first.

    An id of −1, with log-probability −∞, is no token.
    """

    ids: Tensor
    """``[N, k]``, int64."""
    log_probabilities: Tensor
    """``[N, k]`` in nats, float32."""
    nll: Tensor
    """−log q of the text's token in nats ``[N]``, also where it is not among the k."""

    @staticmethod
    def refuse(loss: LossSettings) -> None:
        """Raises: ConfigError for a loss at another temperature, which needs all logits."""
        if loss.temperature != 1.0:
            raise ConfigError(
                f"temperature {loss.temperature:g}: this teacher gives its most likely tokens "
                "at temperature 1, and another one needs the probabilities of all tokens; leave "
                "out --temperature, or use potstill serve"
            )

    def to(self, device: torch.device) -> TopKTarget:
        """Return the same on ``device``."""
        return TopKTarget(
            self.ids.to(device), self.log_probabilities.to(device), self.nll.to(device)
        )

    def summed_loss(
        self, student_hidden: Tensor, student_head: Head, labels: Tensor, loss: LossSettings
    ) -> Tensor:
        """Return the divergence over cells and the cross-entropy within the rest.

        Raises: ConfigError as `refuse`.
        """
        self.refuse(loss)
        shared = self.cut(len(student_head))
        return fused_linear_topk(
            student_hidden,
            student_head,
            shared.ids,
            shared.log_probabilities,
            labels,
            divergence=loss.divergence,
            within_weight=loss.within_weight,
            hard_label_weight=loss.hard_label_weight,
            smallest_rest=SMALLEST_REST,
            **loss.divergence_parameters,  # type: ignore[arg-type]
        )

    def label_nll(self, labels: Tensor) -> Tensor:
        """Return −log q(label), which the server gives for every token of the text."""
        return self.nll

    def block_scores(
        self, labels: Tensor, *, rows: int | None = None, likeliest: int = 0
    ) -> Callable[[slice, Tensor], BlockScores]:
        """Compare cells: the KL is a lower bound. Agreement is exact.

        Beyond the k tokens, ``ids`` and ``probabilities`` of the scores are 0.
        """

        def scores(positions: slice, student_logits: Tensor) -> BlockScores:
            compared = student_logits[:, :rows]
            shared = self[positions].cut(compared.shape[-1])
            p = TopKPartition(shared.ids, compared.shape[-1]).pool(compared.softmax(-1))
            log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
            kl = forward_kl(shared.masses(compared.shape[-1]).to(p.dtype).log(), log_p)
            agrees = (compared.argmax(-1) == shared.ids[:, 0]).to(p.dtype)
            return BlockScores(kl, agrees, *shared.most_likely(likeliest))

        return scores

    def __getitem__(self, positions: slice) -> TopKTarget:
        return TopKTarget(
            self.ids[positions], self.log_probabilities[positions], self.nll[positions]
        )

    def cut(self, rows: int) -> TopKTarget:
        """Return the distribution over the first ``rows`` tokens, as far as it is known.

        Entries beyond are dropped, and their mass goes to the others in proportion.
        """
        beyond = self.ids >= rows
        if not bool(beyond.any()):
            return self
        kept = self.log_probabilities.masked_fill(beyond, -math.inf)
        dropped = self.log_probabilities.masked_fill(~beyond, -math.inf).exp().sum(-1, keepdim=True)
        kept = kept - torch.log1p(-dropped.clamp_max(1 - SMALLEST_REST))
        order = kept.argsort(dim=-1, descending=True, stable=True)
        ids = self.ids.masked_fill(beyond, -1)
        return TopKTarget(ids.gather(-1, order), kept.gather(-1, order), self.nll)

    def masses(self, rows: int) -> Tensor:
        """Return the mass of each entry, and of the rest of ``rows`` tokens: ``[N, k + 1]``."""
        kept = self.log_probabilities.exp()
        rest = (1 - kept.sum(-1, keepdim=True)).clamp_min(SMALLEST_REST)
        is_whole = (self.ids >= 0).sum(-1, keepdim=True) == rows
        return torch.cat([kept, rest.masked_fill(is_whole, 0)], -1)

    def most_likely(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the ``count`` most likely tokens and their probabilities, ``[N, count]`` each."""
        missing = max(0, count - self.ids.shape[-1])
        ids = torch.nn.functional.pad(self.ids[:, :count], (0, missing))
        probabilities = self.log_probabilities[:, :count].exp()
        return ids.clamp_min(0).int(), torch.nn.functional.pad(probabilities, (0, missing))
