"""The perturbation of sharpness-aware minimization, as pure functions over lists of tensors.

SAM (Foret et al. 2021, arXiv 2010.01412, eq. 2), with ``g`` the gradient of the batch loss::

    e = rho * g / (||g||_2 + eps)

ASAM (Kwon et al. 2021, arXiv 2102.11600, eq. 9), with ``T = |w| + eta`` element by element::

    e = rho * T^2 g / (||T g||_2 + eps)

The norm is taken over all perturbed tensors together. Deviations, all ours: ``eps`` is added to the norm, so that
a zero gradient gives no perturbation and not a division by zero; ASAM uses ``T`` for every tensor, biases included;
a gradient that is not finite gives ``e = 0``.

ESAM's stochastic weight perturbation (Du et al. 2022, arXiv 2110.03141, section 3.1) takes each tensor with probability
``beta`` (:func:`weight_mask`) and scales ``e`` by ``1 / beta``. As in the authors' code the norm is that of the tensors
taken.

The weights come back by copying (:class:`TensorBackup`), never by subtracting ``e``: floating-point subtraction
does not undo an addition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from operator import is_
from weakref import ref

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def group_by_device_and_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of ``tensors`` that one ``torch._foreach_*`` call may take together.

    Args:
        tensors: Any tensors.

    Returns:
        Index lists, each over one device and one dtype, in order of first appearance.
    """
    kinds = [(tensor.dtype, tensor.device) for tensor in tensors]
    if kinds and kinds.count(kinds[0]) == len(kinds):
        return [list(range(len(kinds)))]
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(index)
    return list(groups.values())


def foreach_copy_(destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy every source into its destination, in as few kernels as devices and dtypes allow.

    Args:
        destinations: Tensors to write.
        sources: As many tensors, each of its destination's shape and dtype.
    """
    groups = group_by_device_and_dtype(destinations)
    if len(groups) == 1:
        torch._foreach_copy_(destinations, sources)  # type: ignore[arg-type]  # any sequence does
        return
    for group in groups:
        torch._foreach_copy_([destinations[i] for i in group], [sources[i] for i in group])


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all tensors taken as one vector, in at least float32.

    Args:
        tensors: At least one dense tensor; devices and dtypes may be mixed.

    Returns:
        A scalar on the device of the first tensor. No host synchronisation.
    """
    norms: list[Tensor] = []
    for group in group_by_device_and_dtype(tensors):
        members = [tensors[i] for i in group]
        if members[0].dtype in _LOW_PRECISION:
            # The squares of half-precision gradients overflow or vanish long before the gradients do.
            norms += [torch.linalg.vector_norm(member, dtype=torch.float32) for member in members]
        else:
            norms += torch._foreach_norm(members, 2)
    device = norms[0].device
    dtype = torch.float64 if any(n.dtype == torch.float64 for n in norms) else torch.float32
    total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(device=device, dtype=dtype) for n in norms]))
    return total


@dataclass(frozen=True)
class Direction:
    """How a perturbation is made of the gradients.

    Args:
        rho: Radius, in the units of the weights' norm; with ``stretches`` in those of the stretched weights.
        stretches: T of each tensor, of its shape; None for 1. They are scratch memory afterwards.
    """

    rho: float
    stretches: list[Tensor] | None = None


@torch.no_grad()
def asam_stretches(parameters: Sequence[Tensor], eta: float) -> list[Tensor]:
    """ASAM's ``T = |w| + eta`` of each tensor."""
    return [parameter.abs().add_(eta) for parameter in parameters]


@torch.no_grad()
def perturb_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    direction: Direction,
    *,
    eps: float = 1e-12,
    inverse_grad_scale: Tensor | None = None,
    norm_of: Callable[[Sequence[Tensor]], Tensor] = global_norm,
) -> Tensor:
    """Add the perturbation ``e = rho * T^2 g / (||T g|| + eps)`` to the parameters in place.

    Args:
        parameters: Tensors ``w`` to perturb; they keep their storage.
        gradients: Their gradients ``g``, of the same shapes. Overwritten: they are scratch memory afterwards.
        direction: ``rho`` and ``T``.
        eps: Added to the norm.
        inverse_grad_scale: Scalar by which ``gradients`` are to be multiplied to undo loss scaling, or None.
        norm_of: What takes the norm, where the tensors are pieces of larger ones.

    Returns:
        ``||T g||_2`` without loss scaling, a scalar on the first gradient's device. Where it is not finite, the
        parameters are left exactly as they were.
    """
    if direction.stretches:
        torch._foreach_mul_(list(gradients), direction.stretches)
    norm = norm_of(gradients)
    groups = group_by_device_and_dtype(gradients)
    plain = inverse_grad_scale is None and norm.device.type == 'cpu'
    if plain and len(groups) == 1 and gradients[0].dtype is norm.dtype:
        _perturb_on_host(list(parameters), list(gradients), direction, norm, eps)
        return norm
    if inverse_grad_scale is not None:
        inverse = inverse_grad_scale.to(device=norm.device, dtype=norm.dtype)
        norm = norm * inverse
        step = direction.rho * inverse / (norm + eps)
    else:
        step = direction.rho / (norm + eps)
    if direction.stretches:
        torch._foreach_mul_(list(gradients), direction.stretches)
    finite = torch.isfinite(norm)
    for group in groups:
        members = [parameters[i] for i in group]
        steps = [gradients[i] for i in group]
        device = steps[0].device
        _add_if(finite.to(device), members, steps, step.to(device))
    return norm


def _perturb_on_host(
    parameters: list[Tensor], gradients: list[Tensor], direction: Direction, norm: Tensor, eps: float
) -> None:
    """The rest of it where the host knows the norm: the same operations, in the same precision, on a plain number."""
    number = np.float64 if norm.dtype is torch.float64 else np.float32
    value = number(norm.item())
    if not np.isfinite(value):
        return
    if direction.stretches:
        torch._foreach_mul_(gradients, direction.stretches)
    step = float(number(1) / (value + number(eps)) * number(direction.rho))
    torch._foreach_mul_(gradients, step)
    torch._foreach_add_(parameters, gradients)


def _add_if(finite: Tensor, parameters: list[Tensor], gradients: list[Tensor], step: Tensor) -> None:
    """``parameters += step * gradients`` where ``finite``; otherwise nothing. All on one device, of one dtype."""
    if finite.device.type != 'cpu':
        _add_where(finite, parameters, gradients, step)
    elif finite:
        torch._foreach_mul_(gradients, step.to(gradients[0].dtype))
        torch._foreach_add_(parameters, gradients)


def _add_where(finite: Tensor, parameters: list[Tensor], gradients: list[Tensor], step: Tensor) -> None:
    """The same without asking the device, which would stall the host."""
    torch._foreach_mul_(gradients, step.to(gradients[0].dtype))
    for gradient in gradients:
        # 0 * inf is nan, so that a zero step cannot stand for "no step".
        gradient.copy_(torch.where(finite, gradient, torch.zeros_like(gradient)))
    torch._foreach_add_(parameters, gradients)


def storage_of(tensor: Tensor) -> int:
    """A number that tensors have in common which share memory."""
    storage: int = tensor.untyped_storage()._cdata
    return storage


def weight_mask(count: int, beta: float, generator: torch.Generator) -> list[bool]:
    """Which of ``count`` tensors take part in the perturbation (ESAM's SWP).

    Args:
        count: Number of tensors, at least 1.
        beta: Probability of each, in (0, 1].
        generator: Source of the draws, on the CPU.

    Returns:
        At least one is True: where none was drawn, one is taken at random (ours).
    """
    mask = torch.rand(count, generator=generator, dtype=torch.float64) < beta
    # Drawn in any case, so that later draws of the same generator do not depend on this one's outcome.
    spare = int(torch.randint(count, (), generator=generator))
    if not mask.any():
        mask[spare] = True
    chosen: list[bool] = mask.tolist()
    return chosen


class TensorBackup:
    """An exact copy of some tensors, in memory that is allocated once and used again every step.

    One backup at a time: :meth:`save`, :meth:`write_back` any number of times, then :meth:`restore` or :meth:`drop`.
    Restoring twice, or without saving, does nothing.
    """

    def __init__(self) -> None:
        # Weak: memory for a tensor that is gone goes with it.
        self._memory: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
        self._last: list[ref[Tensor]] = []  # what was saved last, which is mostly saved again
        self._last_copies: list[Tensor] = []
        self._kinds: list[tuple[object, ...]] = []
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []

    @property
    def saved(self) -> bool:
        """Whether tensors are kept that have not been restored."""
        return bool(self._tensors)

    @torch.no_grad()
    def save(self, tensors: Sequence[Tensor]) -> None:
        """Copy ``tensors``.

        Args:
            tensors: What to keep; the backup holds on to them until :meth:`restore` or :meth:`drop`.

        Raises:
            RuntimeError: An earlier backup is still kept, and would be lost.
        """
        if self.saved:
            raise RuntimeError('The tensors of an earlier backup have not been restored')
        if not tensors:
            return
        kinds = list(map(_kind, tensors))
        same = len(tensors) == len(self._last) and all(map(is_, [last() for last in self._last], tensors))
        if not same or kinds != self._kinds:
            self._last_copies = [self._copy_of(tensor) for tensor in tensors]
            self._last, self._kinds = [ref(tensor) for tensor in tensors], kinds
        foreach_copy_(self._last_copies, tensors)
        self._tensors, self._copies = list(tensors), self._last_copies

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The tensors that are kept now, each with what was saved of it."""
        return list(zip(self._tensors, self._copies, strict=True))

    @torch.no_grad()
    def write_back(self, apart_from: Iterable[Tensor] = ()) -> None:
        """Write the copies back, bit for bit, into the storage they were taken from.

        Args:
            apart_from: Tensors whose memory is not written to, whatever else lies in it.
        """
        if not self._tensors:
            return
        tensors, copies = self._tensors, self._copies
        if taken := {storage_of(tensor) for tensor in apart_from}:
            pairs = [pair for pair in zip(tensors, copies, strict=True) if storage_of(pair[0]) not in taken]
            tensors, copies = [tensor for tensor, _ in pairs], [copy for _, copy in pairs]
        for tensor, copy in zip(tensors, copies, strict=True):
            if tensor.shape != copy.shape:  # resized since
                tensor.data = torch.empty_like(copy)
        if tensors:
            foreach_copy_(tensors, copies)

    def restore(self) -> None:
        """Write the copies back, and forget them."""
        self.write_back()
        self.drop()

    def drop(self) -> None:
        """Forget the backup; the memory stays for the next one."""
        self._tensors, self._copies = [], []

    def release(self) -> None:
        """Forget the backup, and give the memory back."""
        self.drop()
        self._memory, self._last, self._last_copies = WeakTensorKeyDictionary(), [], []

    def _copy_of(self, tensor: Tensor) -> Tensor:
        memory = self._memory.get(tensor)
        if memory is None or _kind(memory) != _kind(tensor):
            memory = torch.empty_like(tensor, requires_grad=False)
            self._memory[tensor] = memory
        return memory


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device
