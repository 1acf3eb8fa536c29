"""The settings of a step that all methods share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mm_sharp.errors import check_bool, check_choice, check_clip_grad, check_number, check_positive_int
from mm_sharp.ops.perturbation import RELATIVE


@dataclass(frozen=True)
class StepSettings:
    """What the arguments of a wrapper, the class ``owner``, say about its steps.

    :class:`mm_sharp.step.wrapper.TwoPassOptimWrapper` describes them.
    """

    owner: str
    rho: float = 0.05
    adaptive: bool | str = False
    eta: float = 0.01
    eps: float = 1e-12
    perturb_quantized: bool = False
    sync_perturbation: bool = False
    replay_rng: bool = True
    accumulative_counts: int = 1
    clip_grad: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_positive_int(self.owner, 'accumulative_counts', self.accumulative_counts, example='4')
        check_clip_grad(self.owner, self.clip_grad)
        check_number(self.owner, 'rho', self.rho, example='0.02' if isinstance(self.adaptive, str) else '0.05')
        check_number(self.owner, 'eta', self.eta, example='0.01')
        check_number(self.owner, 'eps', self.eps, low_open=True, example='1e-12')
        check_choice(self.owner, 'adaptive', self.adaptive, (True, False, *RELATIVE))
        for name in ('perturb_quantized', 'sync_perturbation', 'replay_rng'):
            check_bool(self.owner, name, getattr(self, name))
