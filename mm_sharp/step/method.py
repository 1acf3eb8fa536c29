"""What a sharpness-aware method chooses; :mod:`mm_sharp.step.two_pass` has the order in which it is asked (ours).

The defaults are SAM's: the whole batch in both passes, all parameters perturbed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from mm_sharp.ops.model_call import ModelCall


class Method:
    """The places in a step where methods differ."""

    def forward_again(self, call: ModelCall) -> Tensor:
        """The loss of ``call`` at the weights as they are now, with the first pass's random draws."""
        raise NotImplementedError

    def aside(self, name: str) -> AbstractContextManager[Any]:
        """A context whose time is counted apart, where the step is timed."""
        return nullcontext()

    @property
    def skips_gradients(self) -> bool:
        """Whether the first pass computes the gradients of the perturbed parameters only."""
        return False

    def recording(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A context around the first forward of ``model`` (the DDP wrapper, where there is one)."""
        return nullcontext()

    def choose_first_batch(self, call: ModelCall) -> ModelCall:
        """The call that runs as first pass: the whole batch, or a part of it."""
        return call

    def select_parameters(self, parameters: list[nn.Parameter]) -> tuple[list[nn.Parameter], float]:
        """The tensors among ``parameters`` to perturb in this step, and the factor on the perturbation."""
        return parameters, 1.0

    def second_loss(self, call: ModelCall, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Run the second forward, at the perturbed weights.

        Args:
            call: The first pass's call.
            loss: L(w), the scalar that the first pass differentiated.
            norm: The norm of the first gradient; where it is not finite, there is no perturbation.

        Returns:
            The scalar to differentiate, and L(w + e) for the log, detached.
        """
        second = self.forward_again(call)
        return second, second.detach()

    def own_state(self) -> dict[str, Any]:
        """What a method adds to a checkpoint: tensors and plain types."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`own_state` gave, or another method's state, or an empty one."""

    def log_scalars(self) -> dict[str, float]:
        """What a method adds to the log, besides what the step's record holds."""
        return {}
