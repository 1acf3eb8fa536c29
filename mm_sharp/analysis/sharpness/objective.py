"""The mean loss over fixed samples as a function of the weights, with its first and second derivatives.

``L(w) = 1/n sum_i l_i(w)``, in evaluation mode, is a sum over batches, whatever their size: a batch of b samples adds
its loss over n where that is the sum of its samples' losses (``KLDiscretLoss``: SimCC, RTMPose), and b times as much
where it is their mean, which :mod:`mm_sharp.per_sample_loss` finds by comparison. ``H v = d/dw (g(w) . v)``. Vectors
over all perturbed parameters are flat, float64, on the model's device; so are sums over batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812
from torch.utils._pytree import tree_map

from mm_sharp.analysis.sharpness.loading import Samples
from mm_sharp.errors import UsageError, UserError
from mm_sharp.ops.module_state import ModuleStateBackup, StatePlan
from mm_sharp.ops.module_tree import ModuleTree
from mm_sharp.ops.tensor_backup import TensorBackup
from mm_sharp.per_sample_loss import PerSampleLoss, PerSampleLossError, Reduction
from mm_sharp.samples.keys import without_keys

# What a training loss is of its samples' losses, and what is to be said of it.
_FORMS: dict[Reduction | None, tuple[str, str]] = {
    Reduction.MEAN: ('mean over the batch', ''),
    Reduction.SUM: (
        'sum over the batch',
        'training adds the losses of a batch up: its loss, gradient, curvature and rises are these times its size',
    ),
}
_SHARE = 'batches count by their size, and what is measured depends on --batch-size, unless it is 1'
_MIXED = f'the model adds losses that are sums over the batch to means: {_SHARE}'
_WHOLE = f"the model's loss is not made of losses of single samples ({{}}): {_SHARE}"


class Objective:
    """L(w) over some samples, around the weights that the model has now.

    Args:
        model: Within ``preserved_eval_mode``. Its loss is what ``parse_losses`` makes of ``model(..., mode='loss')``.
        parameters: Those that w stands for.
        batch_size: At most so many samples at once; of influence on results only if ``remark`` says so.
        tick: Called after each computation of L or of its derivatives.

    Raises UsageError: The model has no loss in evaluation mode; later, if something in it cannot be differentiated.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Samples,
        parameters: Sequence[nn.Parameter],
        batch_size: int,
        tick: Callable[[], object] = lambda: None,
    ) -> None:
        self.model, self.samples, self.parameters = model, samples, list(parameters)
        self._form = loss_form(model, samples, batch_size)
        self.averaging, self.loss_name, self.remark = self._form
        self.batch_size = batch_size
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self.device = self.parameters[0].device
        self.custom: list[str] | None = None  # functions with a backward pass of their own, after second derivatives
        self._tick, self._start = tick, TensorBackup()

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """L at the model's weights and its gradient, (size,)."""
        loss, gradient = 0.0, torch.zeros(self.size, dtype=torch.float64, device=self.device)
        for weight, total in self._terms():
            loss += total.item() * weight
            gradient.add_(_flat(self._differentiate(total)), alpha=weight)
        return loss, gradient

    def hessian_times(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The products of the Hessian with each of some vectors, (size,), which share the first derivative."""
        products = [torch.zeros_like(vector) for vector in vectors]
        pieces = [[part.to(p.dtype) for part, p in self._split(vector)] for vector in vectors]
        for weight, total in self._terms():
            if self.custom is None:
                self.custom = self._custom_functions(total)
            gradients = self._differentiate(total, again=True)
            for product, piece in zip(products, pieces, strict=True):
                dot = torch.stack([(g * v).sum() for g, v in zip(gradients, piece, strict=True)]).sum()
                if dot.requires_grad:  # else the gradient is the same everywhere
                    product.add_(_flat(self._differentiate(dot, what='second derivatives')), alpha=weight)
        return products

    @contextmanager
    def moved(self, offset: Tensor) -> Iterator[None]:
        """Within, the weights are moved by ``offset``, (size,); then they are bit for bit as before."""
        self._start.save(self.parameters)
        try:
            with torch.no_grad():
                for piece, parameter in self._split(offset):
                    parameter.copy_(parameter.double() + piece)
            yield
        finally:
            self._start.restore()

    @torch.no_grad()
    def loss_at(self, offset: Tensor) -> float:
        """L at the model's weights plus ``offset``, (size,); nan or infinite where it is."""
        with self.moved(offset):
            return sum(total.item() * weight for weight, total in self._terms())

    def _terms(self) -> Iterator[tuple[float, Tensor]]:
        for size, batch in self.samples.batches(self.batch_size):
            share = 1 if self._form.adds_up else size
            yield share / len(self.samples), _loss_of(self.model, batch)
        self._tick()

    def _differentiate(self, value: Tensor, again: bool = False, what: str = 'derivatives') -> tuple[Tensor, ...]:
        """The derivative of ``value`` by each parameter, which can be differentiated ``again``; 0 if independent."""
        if not value.requires_grad:
            raise UsageError(f'{type(self.model).__name__}: the loss does not depend on any parameter')
        try:
            keep, own = again or what != 'derivatives', self.parameters
            return torch.autograd.grad(value, own, retain_graph=keep, create_graph=again, materialize_grads=True)
        except (RuntimeError, NotImplementedError) as error:
            raise self._no_derivatives(what, str(error).strip().partition('\n')[0]) from error

    def _custom_functions(self, total: Tensor) -> list[str]:
        """Functions in a loss's graph with derivatives of their authors'; torch takes 0 for second ones that miss."""
        nodes: dict[Any, None] = {total.grad_fn: None}
        waiting = list(nodes)
        while waiting:
            new = {before: None for before, _ in waiting.pop().next_functions if before and before not in nodes}
            nodes |= new
            waiting += new
        kinds = dict.fromkeys(kind for node in nodes if (kind := getattr(type(node), '_forward_cls', None)))
        for kind in kinds:
            code = getattr(kind.backward, '__code__', None)
            if code is not None and code.co_filename == once_differentiable.__code__.co_filename:
                raise self._no_derivatives('second derivatives', f'{kind.__name__} is marked @once_differentiable')
        return [kind.__name__ for kind in kinds]

    def _no_derivatives(self, what: str, line: str) -> UsageError:
        hint = ': leave them out with --eigenvalues 0 --trace-draws 0' if what == 'second derivatives' else ''
        return UsageError(f'{type(self.model).__name__}: its loss has no {what} ({line}){hint}')

    def _split(self, vector: Tensor) -> list[tuple[Tensor, nn.Parameter]]:
        pieces = vector.split([parameter.numel() for parameter in self.parameters])
        return [(piece.view_as(p), p) for piece, p in zip(pieces, self.parameters, strict=True)]


class LossForm(NamedTuple):
    """How a batch's loss counts, of which loss modules it is, and what is to be said of it, or ''."""

    averaging: str
    loss_name: str
    remark: str

    @property
    def adds_up(self) -> bool:
        """Whether a batch's loss is the sum of its samples' losses."""
        return self.averaging == _FORMS[Reduction.SUM][0]


def loss_form(model: nn.Module, samples: Samples, batch_size: int) -> LossForm:
    """That of a model in evaluation mode, by its first batch; a UsageError if it has no loss there."""
    _, batch = next(samples.batches(batch_size))
    try:
        with torch.no_grad(), PerSampleLoss(model).record() as record:
            total = _loss_of(model, batch)
        record.losses(total)
    except PerSampleLossError as error:
        return LossForm('by share', type(model).__name__, _WHOLE.format(error.what))
    except UserError:
        raise
    except Exception as error:  # of anyone's model: RTMO's head, for one, has no loss in evaluation mode
        what = f'its loss cannot be computed in evaluation mode ({type(error).__name__}: {error})'
        raise UsageError(f'{type(model).__name__}: {what}; --debug shows where') from error
    averaging, remark = _FORMS.get(record.reduction, ('by share', _MIXED))
    return LossForm(averaging, ', '.join(dict.fromkeys(term.name for term in record.terms)), remark)


def _loss_of(model: nn.Module, batch: Any) -> Tensor:
    preprocessor: Any = getattr(model, 'data_preprocessor', None)
    data = batch if preprocessor is None else preprocessor(batch, False)
    return batch_loss(model, as_double(data) if next(model.parameters()).dtype == torch.float64 else data)


def batch_loss(model: Any, data: Any) -> Tensor:
    """The loss, scalar, of a batch that has been through the model's data preprocessor."""
    args, kwargs = without_keys(model, *(((), data) if isinstance(data, dict) else (data, {})))
    return model.parse_losses(model(*args, **kwargs, mode='loss'))[0]  # type: ignore[no-any-return]


@contextmanager
def preserved_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within, a model is in evaluation mode, and has second derivatives where they exist; nothing of it stays.

    Activation checkpointing (``with_cp``), which would stand in their way and changes no value, is off meanwhile.
    """
    training = {module: module.training for module in model.modules()}
    checkpointed: list[Any] = [module for module in model.modules() if getattr(module, 'with_cp', False)]
    weights, state, plan = TensorBackup(), ModuleStateBackup(), StatePlan(ModuleTree(model))
    weights.save(list(model.parameters()))
    state.save(plan, plan.norms)
    model.eval()
    for module in checkpointed:
        module.with_cp = False
    try:
        # torch's own, which RTMPose's backbone uses, can be differentiated once only, as of torch 2.13.
        with patch.object(F, 'hardsigmoid', _hardsigmoid):
            yield
    finally:
        weights.restore()
        state.restore()
        for module in checkpointed:
            module.with_cp = True
        for module, mode in training.items():
            module.training = mode


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    value = F.relu6(input + 3) / 6
    return input.copy_(value) if inplace else value


def as_double(value: Any) -> Any:
    """A copy of a batch in which tensors of floating-point numbers are float64."""

    def convert(item: Any) -> Any:
        if isinstance(item, BaseDataElement):
            copy = item.clone()
            for name, inner in item.items():
                setattr(copy, name, as_double(inner))
            return copy
        return item.double() if isinstance(item, Tensor) and item.is_floating_point() else item

    return tree_map(convert, value)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])
