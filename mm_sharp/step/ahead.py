"""One pass at perturbed weights: from w to w + e before the forward, and back to w, exactly, around everything else.

The weights are ``w + e`` in the forward and in the backward pass. In between, while the caller adds up the losses, they
are ``w``: so a forward that is never followed by its update, or an error, leaves nothing perturbed behind. Under FSDP,
whose forward may leave whole weights gathered for the backward pass, they stay at ``w + e`` until that is over, and a
forward that is left without its update is undone when the next step begins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mm_sharp.ops.fsdp import local_shard
from mm_sharp.ops.perturbation import perturb_
from mm_sharp.ops.tensor_backup import TensorBackup
from mm_sharp.step.method import Method
from mm_sharp.step.parallel import ParallelModel
from mm_sharp.step.settings import StepSettings


class PerturbationAhead:
    """Moves parameters from ``w`` to ``w + e`` and back, in the order :meth:`choose`, :meth:`perturb`, the forward,
    :meth:`set_aside`, :meth:`take_up`, the backward pass, :meth:`restore`.

    :meth:`restore` may come at any time, and does nothing where there is nothing to undo.
    """

    def __init__(self, settings: StepSettings, parallel: ParallelModel) -> None:
        self._settings = settings
        self._parallel = parallel
        self._perturbed: Sequence[nn.Parameter] = ()
        self._before, self._moved = TensorBackup(), TensorBackup()
        self._is_aside = False

    def choose(self, perturbed: Sequence[nn.Parameter]) -> None:
        """Settle what this step perturbs."""
        self._perturbed = perturbed

    @torch.no_grad()
    def perturb(self, method: Method, device: torch.device) -> None:
        """Go to w + e, along what ``method`` gives for each parameter; ``device`` is that of the norm without any."""
        pairs = zip(self._perturbed, method.perturb_along(self._perturbed), strict=True)
        known = [(parameter, vector) for parameter, vector in pairs if vector is not None]
        parameters, vectors = [parameter for parameter, _ in known], [vector for _, vector in known]
        if not known and self._parallel.shards is None:
            return
        weights = [local_shard(parameter) for parameter in parameters]
        self._before.save(weights)
        perturb_(
            weights,
            vectors,
            method.direction(weights, vectors),
            eps=self._settings.eps,
            norms=self._parallel.norms(parameters, device, self._perturbed),
        )
        torch.clear_autocast_cache()

    def set_aside(self) -> None:
        """Have the weights be w until the backward pass."""
        if not self._before.saved or self._parallel.shards is not None:
            return
        self._moved.save([weight for weight, _ in self._before.pairs])
        self._before.write_back(unseen=True)
        self._is_aside = True
        torch.clear_autocast_cache()

    def take_up(self) -> None:
        """Have them be what the forward has seen, bit for bit."""
        self._is_aside = False
        self._moved.write_back(unseen=True)
        self._moved.discard()

    def restore(self) -> None:
        """Put w back, bit for bit. What was set aside is w already, and whoever has written to it since was right."""
        if self._before.saved:
            if not self._is_aside:
                self._before.write_back()
            self._before.discard()
            self._moved.discard()
            torch.clear_autocast_cache()
        self._is_aside = False
