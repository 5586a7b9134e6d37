"""The item-level head: one query vector of a history scores whole items, on the encoder that the decoder reads too."""

# L history tokens, P queries, N items, D model width (docs/shapes.md)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gbla_rec.config import ItemHeadConfig
from gbla_rec.models.layers import initialized_linear


class ItemHead(nn.Module):
    """Scores ``query . item / sqrt(D)``; an item's vector is its input token, so that ids, codes and features serve on both sides."""

    def __init__(self, model_dim: int, config: ItemHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.query_projection = initialized_linear(model_dim, model_dim)

    def query(self, encoded: Tensor, positions: Tensor) -> Tensor:
        """Query vectors.

        Args:
            encoded: ``(L, D)`` from the encoder.
            positions: ``(P,)`` int64 tokens that ask.

        Returns:
            ``(P, D)``, already scaled by ``D ** -0.5``: its products with item vectors are the scores.
        """
        return self.query_projection(encoded[positions]) * encoded.shape[1] ** -0.5  # type: ignore[no-any-return]

    def newest_query(self, encoded: Tensor, offsets: Tensor) -> Tensor:
        """Query vectors ``(B, D)`` of the newest event of each row; an empty row's is zero.

        Args:
            encoded: ``(L, D)`` from the encoder.
            offsets: ``(B + 1,)`` int64 of the rows.
        """
        with_nothing = torch.cat([encoded, encoded.new_zeros(1, encoded.shape[1])])
        newest = torch.where(offsets.diff() > 0, offsets[1:] - 1, encoded.shape[0])
        return self.query(with_nothing, newest)

    def nll(self, queries: Tensor, labels: Tensor, vectors: Tensor, candidates: Tensor, log_expected: Tensor) -> Tensor:
        """The loss of each query ``(P,)`` in nats, fp32.

        Args:
            queries: ``(P, D)``.
            labels: ``(P,)`` int64 places of the right items among the candidates.
            vectors: of the candidates, ``(candidates, D)``.
            candidates: int64 item indices; see ``ItemQueries``.
            log_expected: see ``ItemQueries``.
        """
        if self.config.num_sampled == 0:
            scores = (queries @ vectors.T).float()
            return F.cross_entropy(scores, labels, reduction="none", label_smoothing=self.config.label_smoothing if self.training else 0.0)
        num_queries = queries.shape[0]
        right = (queries * vectors[:num_queries]).sum(-1).float()
        if self.config.loss == "bce":
            # every size is stated: a rank without rows has no element to infer one from
            negatives = vectors[num_queries:].view(num_queries, self.config.num_sampled, queries.shape[1])
            wrong = torch.einsum("pd,pnd->pn", queries, negatives).float()
            return -F.logsigmoid(right) - F.logsigmoid(-wrong).mean(-1)
        return sampled_softmax_nll(
            right, (queries @ vectors[num_queries:].T).float(), candidates[:num_queries], candidates[num_queries:], log_expected
        )


def sampled_softmax_nll(right: Tensor, wrong: Tensor, items: Tensor, negatives: Tensor, log_expected: Tensor) -> Tensor:
    """Softmax over the right item and negatives drawn with replacement, log-Q corrected (Bengio and Senecal, 2008).

    ``-right + log(exp(right) + sum_j exp(wrong_j - log_expected_j))``, negatives that are the right item left out: the sum is an unbiased
    estimate of that over all other items of the catalogue.

    Args:
        right: ``(P,)`` fp32 scores of the items asked for.
        wrong: ``(P, n)`` fp32 scores of the negatives.
        items: ``(P,)`` int64 items asked for.
        negatives: ``(n,)`` int64 items drawn.
        log_expected: ``(n,)`` fp32, log of the expected number of times that each is drawn.
    """
    corrected = (wrong - log_expected).masked_fill(items[:, None] == negatives, -torch.inf)
    return torch.logsumexp(torch.cat([right[:, None], corrected], dim=1), dim=1) - right
