"""The mean loss over fixed samples as a function of the weights, with its first and second derivatives (ours).

``L(w) = 1/n sum_i l_i(w)``, in evaluation mode, is a sum over batches (:mod:`mm_sharp.analysis.sharpness.averaging`),
and so are
its gradient and the product of its Hessian with a vector, which is the gradient of a gradient's dot product::

    H v = d/dw (g(w) . v)

Vectors over all perturbed parameters are flat, float64, on the model's device. The model computes in its own dtype;
sums over batches are float64.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mm_sharp.analysis.sharpness.averaging import Averaging, LossForm, loss_form
from mm_sharp.analysis.sharpness.custom_functions import custom_functions
from mm_sharp.analysis.sharpness.samples import Samples
from mm_sharp.errors import UsageError, UserError

# What torch says of operations that it cannot differentiate (twice).
_CHECKPOINTING = re.compile(r'(?i)checkpoint\S* is (?:not |in)compatible with \.grad\(\)')
_NO_DERIVATIVE = re.compile(rf'{_CHECKPOINTING.pattern}|once_differentiable|derivative for .* is not implemented')


class Objective:
    """L(w) over some samples, around the weights that the model has now.

    To be used within :func:`mm_sharp.analysis.sharpness.preserved_eval_mode.preserved_eval_mode`, after which the
    model is as it was.
    :attr:`custom` names the functions in the loss's graph that have a backward pass of their own, once a second
    derivative was taken.

    Args:
        model: In evaluation mode. Its loss is what ``parse_losses`` makes of ``model(..., mode='loss')``.
        samples: At least one.
        parameters: The parameters that w stands for.
        batch_size: At most so many samples at once; memory and time, and no result unless :attr:`form` says so.

    Raises:
        UsageError: The model has no loss in evaluation mode.
    """

    def __init__(self, model: nn.Module, samples: Samples, parameters: Sequence[nn.Parameter], batch_size: int) -> None:
        self.model, self.samples, self.parameters = model, samples, list(parameters)
        self.form: LossForm = loss_form(model, lambda: self._first_total(batch_size))
        self.batch_size = 1 if self.form.averaging is Averaging.SINGLY else batch_size
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self.custom: list[str] | None = None
        self._start = [parameter.detach().clone() for parameter in self.parameters]

    @property
    def device(self) -> torch.device:
        """Where vectors are."""
        return self.parameters[0].device

    @torch.no_grad()
    def loss(self) -> float:
        """L at the model's weights; nan or infinite where it is."""
        return sum(total.item() * weight for weight, total in self._terms())

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """L at the model's weights and its gradient, (size,).

        Raises:
            UsageError: Something in the model cannot be differentiated.
        """
        loss, gradient = 0.0, self._zeros()
        for weight, total in self._terms():
            loss += total.item() * weight
            gradient.add_(_flat(self._differentiate(total)), alpha=weight)
        return loss, gradient

    def hessian_times(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The products of the Hessian with each of some vectors.

        Several at once take less time than one by one: they share the first derivative.

        Args:
            vectors: (size,) each.

        Raises:
            UsageError: Something in the model cannot be differentiated twice.
        """
        products = [self._zeros() for _ in vectors]
        pieces = [self._shaped(vector) for vector in vectors]
        for weight, total in self._terms():
            if self.custom is None:
                self.custom = self._custom_functions(total)
            gradients = self._differentiate(total, create_graph=True)
            for number, piece in enumerate(pieces):
                dot = torch.stack([(g * v).sum() for g, v in zip(gradients, piece, strict=True)]).sum()
                if dot.requires_grad:  # else the gradient is the same everywhere
                    second = self._differentiate(dot, keep=number < len(pieces) - 1, twice=True)
                    products[number].add_(_flat(second), alpha=weight)
        return products

    @contextmanager
    def moved(self, offset: Tensor) -> Iterator[None]:
        """Within, the weights are the start's plus ``offset``, (size,); then they are the start's, bit for bit."""
        try:
            with torch.no_grad():
                for parameter, start, piece in zip(self.parameters, self._start, self._split(offset), strict=True):
                    parameter.copy_(start.double() + piece)
            yield
        finally:
            with torch.no_grad():
                for parameter, start in zip(self.parameters, self._start, strict=True):
                    parameter.copy_(start)

    def loss_at(self, offset: Tensor) -> float:
        """L at the start's weights plus ``offset``, (size,)."""
        with self.moved(offset):
            return self.loss()

    def _terms(self) -> Iterator[tuple[float, Tensor]]:
        """Weight and loss of each batch."""
        for size, batch in self.samples.batches(self.batch_size):
            yield self.form.averaging.weight(size, len(self.samples)), self._total(batch)

    def _first_total(self, batch_size: int) -> Tensor:
        """The loss of the first batch.

        Raises:
            UsageError: It cannot be computed.
        """
        _, batch = next(self.samples.batches(batch_size))
        try:
            return self._total(batch)
        except UserError:
            raise
        except Exception as error:  # of anyone's model: RTMO's head, for one, has no loss in evaluation mode
            said = (str(error).strip().splitlines() or [''])[0]
            raise UsageError(
                f'{type(self.model).__name__}: its loss cannot be computed in evaluation mode, in which sharpness is '
                f'measured ({type(error).__name__}: {said}); --debug shows where'
            ) from error

    def _total(self, batch: Any) -> Tensor:
        """The loss of a batch, ()."""
        preprocessor: Any = getattr(self.model, 'data_preprocessor', None)
        data = batch if preprocessor is None else preprocessor(batch, False)
        if next(self.model.parameters()).dtype == torch.float64:
            data = as_double(data)
        output = self.model(**data, mode='loss') if isinstance(data, dict) else self.model(*data, mode='loss')
        model: Any = self.model
        total: Tensor = output.mean() if isinstance(output, Tensor) else model.parse_losses(output)[0]
        return total

    def _differentiate(
        self, value: Tensor, create_graph: bool = False, keep: bool = False, twice: bool = False
    ) -> tuple[Tensor, ...]:
        """The derivative of ``value`` by each parameter, zero where it does not depend on it."""
        if not value.requires_grad:
            raise UsageError(f'{type(self.model).__name__}: the loss does not depend on any parameter')
        try:
            return torch.autograd.grad(
                value,
                self.parameters,
                create_graph=create_graph,
                retain_graph=create_graph or keep,
                allow_unused=True,
                materialize_grads=True,
            )
        except (RuntimeError, NotImplementedError) as error:
            if not _NO_DERIVATIVE.search(str(error)):
                raise
            raise UsageError(self._why(error, twice)) from error

    def _custom_functions(self, total: Tensor) -> list[str]:
        """The functions in the graph of a loss whose second derivatives are of their authors' making.

        Raises:
            UsageError: One has none.
        """
        custom, once = custom_functions(total)
        if once:
            raise UsageError(self._no_derivatives(f'{", ".join(once)} is marked @once_differentiable', twice=True))
        return custom

    def _why(self, error: Exception, twice: bool) -> str:
        """What to do about an operation without a derivative."""
        line = str(error).strip().splitlines()[0]
        if _CHECKPOINTING.search(line):
            return (
                f'{type(self.model).__name__} recomputes activations by re-entrant checkpointing, which '
                f'torch.autograd.grad does not go through ({line}): switch it off in the config'
            )
        return self._no_derivatives(line, twice)

    def _no_derivatives(self, line: str, twice: bool) -> str:
        kind = 'second derivatives' if twice else 'derivatives'
        hint = ': leave them out with --eigenvalues 0 --trace-draws 0' if twice else ''
        return f'{type(self.model).__name__}: its loss has no {kind} ({line}){hint}'

    def _zeros(self) -> Tensor:
        return torch.zeros(self.size, dtype=torch.float64, device=self.device)

    def _split(self, vector: Tensor) -> list[Tensor]:
        """A flat vector in the parameters' shapes."""
        pieces = vector.split([parameter.numel() for parameter in self.parameters])
        return [piece.view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)]

    def _shaped(self, vector: Tensor) -> list[Tensor]:
        """The same in the parameters' dtypes."""
        return [piece.to(p.dtype) for piece, p in zip(self._split(vector), self.parameters, strict=True)]


def as_double(value: Any) -> Any:
    """A copy of a batch in which tensors of floating-point numbers are float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: as_double(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(as_double(item) for item in value)
    if isinstance(value, BaseDataElement):
        copy = value.clone()
        for name, item in value.items():
            setattr(copy, name, as_double(item))
        return copy
    return value


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])
