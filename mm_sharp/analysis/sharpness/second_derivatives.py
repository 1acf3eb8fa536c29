"""Second derivatives that torch has for an equal function, and not for the one that models call (ours).

``torch.nn.functional.hardsigmoid`` (the channel attention of CSPNeXt, and so RTMPose) can be differentiated once only,
as of torch 2.13. ``relu6(x + 3) / 6`` is the same function, and can be differentiated as often as one likes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import functional as F  # noqa: N812


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Within, ``F.hardsigmoid``, and with it ``nn.Hardsigmoid``, can be differentiated twice, in all threads."""
    functional: Any = F
    original = functional.hardsigmoid
    functional.hardsigmoid = _hardsigmoid
    try:
        yield
    finally:
        functional.hardsigmoid = original


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    value = F.relu6(input + 3) / 6
    return input.copy_(value) if inplace else value
