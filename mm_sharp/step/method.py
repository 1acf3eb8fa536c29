"""What a sharpness-aware method decides: the five questions that a step asks.

===  ==================================================  ============================================================
1    Which samples go through each pass?                 :meth:`Method.first_batch`, :meth:`Method.perturbed_loss`
2    Which parameters are perturbed?                     :meth:`Method.select_parameters`
3    In which direction, and how far?                    :meth:`Method.direction`,
                                                         :meth:`Method.perturbation_gradient`,
                                                         :meth:`Method.perturb_along`
4    Which passes run in this step?                      :meth:`Method.passes`
5    Which gradient does the optimizer get?              :meth:`Method.final_gradient`, :meth:`Method.beside_step`
===  ==================================================  ============================================================

The defaults are SAM's. :mod:`mm_sharp.step.two_pass` has the order in which a step asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mm_sharp.ops.finite import choose
from mm_sharp.ops.fsdp import local_shard
from mm_sharp.ops.model_call import ModelCall
from mm_sharp.ops.perturbation import Direction, asam_stretches
from mm_sharp.samples.schedule import TrainingLength
from mm_sharp.step.final_gradient import FinalGradient
from mm_sharp.step.second_pass import SecondPass
from mm_sharp.step.settings import StepSettings


class Passes(Enum):
    """The passes of a step."""

    BOTH = 'both: the second one at the perturbed weights'
    FIRST = 'the first alone: the base optimizer, on the gradient that final_gradient makes of it'
    PERTURBED = 'one alone, at weights that are perturbed before it, along what perturb_along gives'


@dataclass(frozen=True)
class Cost:
    """What a step costs, in steps of the base optimizer, where a backward pass takes twice a forward pass's time."""

    step: float  # of most steps
    cycle: float  # the mean over a cycle of ``length`` steps, whose first one costs more
    length: int = 1  # of a cycle; 1 where all steps cost the same
    first_epoch: float | None = None  # of the steps in the first epoch, where they cost more than the others

    def over(self, epochs: float) -> float:
        """The mean over a training of so many epochs, the first one included."""
        if self.first_epoch is None:
            return self.cycle
        first = min(1.0, 1.0 / epochs)
        return first * self.first_epoch + (1.0 - first) * self.cycle

    def epochs_for(self, compute: float) -> float:
        """How many epochs cost as much as ``compute`` epochs of the base optimizer."""
        if self.first_epoch is None:
            return compute / self.cycle
        if compute <= self.first_epoch:
            return compute / self.first_epoch
        return 1.0 + (compute - self.first_epoch) / self.cycle


class Method:
    """Base of the methods.

    Attributes:
        settings: What the arguments say.
        second_pass: Runs the captured forward again.
        skips_gradients: Whether the first pass computes the gradients of the perturbed parameters only; without it,
            quantizers' scales alone get none there where they are not perturbed.
        changes_gradient: Whether :meth:`final_gradient` does anything; it is then given the first passes' gradients.
        kept: What the method keeps of each parameter.
        keeps: Whether it keeps anything.
        hands_on: Of the names of its own answers, those that go on to ask ``super()``, so that the next method of a
            class of two is heard, too.
    """

    settings: StepSettings
    second_pass: SecondPass
    kept: dict[nn.Parameter, Tensor]
    skips_gradients: ClassVar[bool] = False
    changes_gradient: ClassVar[bool] = False
    keeps: ClassVar[bool] = False
    hands_on: ClassVar[frozenset[str]] = frozenset()

    # ---------------------------------------------------------------- 1: which samples
    def first_batch(self, call: ModelCall) -> ModelCall:
        """The call that runs as first pass: the whole batch, or a part of it. Asked just before the forward."""
        return call

    def recording(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A context around the first forward of ``model`` (DDP's wrapper, where there is one)."""
        return nullcontext()

    def perturbed_loss(self, call: ModelCall, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Run the second forward, at the perturbed weights.

        Args:
            call: The first pass's call.
            loss: L(w), the scalar that the first pass differentiated.
            norm: The norm of the first gradient; where it is not finite, there is no perturbation.

        Returns:
            The scalar to differentiate, and L(w + e) for the log, detached.
        """
        second = self.second_pass.loss(call)
        return second, second.detach()

    # ---------------------------------------------------------------- 2: which parameters
    def select_parameters(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Those of ``parameters``, which ``perturb`` allows, that are perturbed in this step."""
        return parameters

    # ---------------------------------------------------------------- 3: which direction, how far
    def direction(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Direction:
        """How the perturbation is made of the first gradient.

        Args:
            weights: The perturbed parameters.
            gradients: Of each, with the loss scale; they may be changed in place.
        """
        settings = self.settings
        if isinstance(settings.adaptive, str):
            return Direction(settings.rho, relative=settings.adaptive)
        return Direction(settings.rho, asam_stretches(weights, settings.eta) if settings.adaptive else None)

    def perturbation_gradient(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], inverse_scale: Tensor | None
    ) -> None:
        """Change, in place, the gradients that the perturbation follows; asked before :meth:`direction`.

        Args:
            parameters: Those that are perturbed, and have a gradient.
            gradients: Of each, as memory of this process, with the loss scale.
            inverse_scale: What the gradients are multiplied by to be without it; None for 1.
        """

    def perturb_along(self, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """What stands for the gradient where the passes are ``Passes.PERTURBED``, before there is one.

        Args:
            parameters: Those that are perturbed.

        Returns:
            Of each, a new tensor as memory of this process, or None if it stays where it is. They go to
            :meth:`direction` as gradients.
        """
        return [None for _ in parameters]

    # ---------------------------------------------------------------- 4: which passes
    def passes(self) -> Passes:
        """Asked when a step begins; all micro-batches of an optimizer step must give the same answer."""
        return Passes.BOTH

    @property
    def alternates(self) -> bool:
        """Whether only some steps have both passes.

        The log shows the last one that has, so that all of these are measured. Of a method that does not say so, they
        are from the first step on that has one pass.
        """
        return False

    # ---------------------------------------------------------------- 5: what the optimizer gets
    def final_gradient(self, gradient: FinalGradient) -> None:
        """Change the gradients that the optimizer is about to step along: pass 2's, or pass 1's where it ran alone."""

    def beside_step(self) -> Mapping[nn.Parameter, Tensor]:
        """What the weights are moved by beside the optimizer's step, which has the gradients as :meth:`final_gradient`
        and clipping have left them; asked just before it.

        Returns:
            By parameter, a tensor as memory of this process. After the optimizer's step, the parameter's learning rate
            times this is subtracted from it. Where the step is left out, it must be zero.
        """
        return {}

    def keep(self, parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor], valid: Tensor) -> None:
        """Keep a tensor of each parameter's shape from step to step, and in checkpoints.

        Args:
            parameters: The parameters; of all others zero is kept.
            tensors: What to keep; nobody may write to it afterwards.
            valid: Scalar of bool; where it is False, what was kept before stays. The device is not waited for.
        """
        given = set(parameters)
        others = [parameter for parameter in self.kept if parameter not in given]
        if others:
            parameters = [*parameters, *others]
            tensors = [*tensors, *map(torch.zeros_like, self.kept_of(others))]
        self.kept = dict(zip(parameters, choose(valid, tensors, lambda: self.kept_of(parameters)), strict=True))

    def kept_of(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """What was kept of each parameter; zero where nothing was."""
        kept = [self.kept.get(parameter) for parameter in parameters]
        return [torch.zeros_like(local_shard(p)) if k is None else k for p, k in zip(parameters, kept, strict=True)]

    # ---------------------------------------------------------------- state, log, cost
    def own_state(self) -> dict[str, Any]:
        """What a method adds to a checkpoint: tensors and plain types."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`own_state` gave, or another method's state, or an empty one."""

    def log_scalars(self) -> dict[str, float]:
        """What a method adds to the log, besides what the step's record holds."""
        return {}

    @property
    def same_samples(self) -> bool:
        """Whether the L(w) and L(w + e) of a step's record are of the same samples, in all steps."""
        return True

    def in_words(self, batch_size: int, length: TrainingLength, model: nn.Module | None) -> dict[str, str]:
        """Lines for the start of the log, in place of, or beside, those of :func:`mm_sharp.hooks.start.in_words`."""
        return {}

    def cost(self, batch_size: int) -> Cost:
        """What a step costs with the arguments that this wrapper has, which are its attributes."""
        named = [name for name, p in signature(self.theoretical_cost).parameters.items() if p.kind is not p.VAR_KEYWORD]
        return self.theoretical_cost(batch_size, **{name: getattr(self, name) for name in named if hasattr(self, name)})

    @classmethod
    def theoretical_cost(cls, batch_size: int, **settings: Any) -> Cost:
        """What a step costs by counting passes.

        Args:
            batch_size: N.
            settings: The wrapper's arguments; those left out have their defaults.
        """
        return Cost(2.0, 2.0)
