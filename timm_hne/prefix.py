"""The outputs of nested ensembles: what the first n members say together (Eq. 5 of the paper)."""
from collections.abc import Sequence
from itertools import accumulate

import torch

from .tree import prefixes


def prefix_means(member_logits: torch.Tensor, sizes: Sequence[int] | None = None) -> torch.Tensor:
    """Return the mean logits of the first n members for several n (Eq. 5).

    Args:
        member_logits: (B, N, C)
        sizes: Increasing numbers of members; 1, 2, 4, ..., N if None.

    Shape:
        - output: (B, len(sizes), C)
    """
    sizes = prefixes(member_logits.shape[1]) if sizes is None else sizes
    # Sums of what each prefix adds to the one before: their backward is one pass, that of N cumulated sums is one each.
    added = member_logits[:, :sizes[-1]].split([size - before for before, size in zip((0, *sizes), sizes)], dim=1)
    totals = accumulate(members.sum(dim=1) for members in added)
    return torch.stack([total / size for total, size in zip(totals, sizes)], dim=1)
