"""When an update is not formed."""

from __future__ import annotations


def is_thin(work: int, shape: tuple[int, ...]) -> bool:
    """Whether a training step by the update's own products, `work` multiply-adds for one position, costs less than one with the whole
    update [.., out, in]: they run three times, and the gradient of the whole alone is a product as large as the host's.
    """
    return 3 * work <= shape[-1] * shape[-2]
