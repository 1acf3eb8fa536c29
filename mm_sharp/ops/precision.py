"""Mixed precision for a two-pass step: autocast and loss scaling on any device, the CPU included.

MMEngine's ``AmpOptimWrapper`` cannot be reused: it refuses the CPU and knows one backward pass a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from mmengine.utils import digit_version
from torch import Tensor
from torch.optim import Optimizer

from mm_sharp.errors import UserError, check_choice

_DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}
_INTERVAL = 'growth_interval'
_SMALLEST = torch.finfo(torch.float32).tiny
_LARGEST = (torch.finfo(torch.float32).max, torch.iinfo(torch.int32).max)
_SCALER_ARGUMENTS = {
    'init_scale': 'init_scale, a finite number above 1.2e-38',
    'growth_factor': 'growth_factor, a finite number above 1',
    'backoff_factor': 'backoff_factor, a number in (0, 1)',
    'growth_interval': 'growth_interval, an integer of at least 1',
    'enabled': 'enabled, True or False',
}


class Precision:
    """Autocast dtype and, for float16, the gradient scaler.

    Args:
        owner: Class that takes the arguments, for error messages.
        dtype: ``None`` (no autocast), ``'float16'`` or ``'bfloat16'`` (or the torch dtypes).
        loss_scale: ``'dynamic'``, a fixed scale > 0, or a dict of ``GradScaler``'s arguments. Used with float16 only;
            with another dtype it is checked and does nothing, so that ``dtype`` alone can be switched.
        device: Where the parameters are.

    Raises:
        ValueError: ``dtype`` or ``loss_scale`` has another form, or the device or this torch cannot do it.
    """

    def __init__(
        self,
        owner: str,
        dtype: str | torch.dtype | None,
        loss_scale: str | float | Mapping[str, Any],
        device: torch.device,
    ) -> None:
        check_choice(owner, 'dtype', dtype, (*_DTYPES, None, *_DTYPES.values()))
        self.dtype = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
        self.device = device
        # Where several processes hold the gradients together: has their scalers agree on an overflow.
        self.share_overflow: Callable[[Any, Optimizer], None] | None = None
        self._fixed_scale: float | None = None
        arguments = self._scaler_arguments(owner, loss_scale)
        _check_device(owner, self.dtype, device)
        self.scaler = _grad_scaler(device, arguments) if self.dtype is torch.float16 else None

    def autocast(self) -> AbstractContextManager[Any]:
        """The context for a forward pass."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def scale(self, loss: Tensor) -> Tensor:
        """``loss`` times the loss scale."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def inverse_scale(self) -> Tensor | None:
        """1 / loss scale as a tensor on the device, without a host synchronisation; None without scaling."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        scale = self.scaler._get_scale_async()
        assert scale is not None, 'the first backward pass initialises the scale'
        inverse: Tensor = scale.reciprocal()
        return inverse

    def unscale(self, optimizer: Optimizer) -> None:
        """Undo the scaling of the optimizer's gradients, once a step at most."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
            if self.share_overflow is not None and self.scaler.is_enabled():
                self.share_overflow(self.scaler, optimizer)

    def step(self, optimizer: Optimizer, **kwargs: Any) -> None:
        """Step ``optimizer`` (unless a scaled gradient overflowed) and update the scale."""
        if self.scaler is None:
            optimizer.step(**kwargs)
            return
        if self.share_overflow is not None and self.scaler.is_enabled() and not self._unscaled(optimizer):
            self.unscale(optimizer)
        self.scaler.step(optimizer, **kwargs)
        self.scaler.update(self._fixed_scale)
        if self.scaler._scale is not None:
            # After some 160 overflows in a row the scale would be so small that one over it is infinite, and would make
            # infinite weights of finite gradients: the scaler looks for these before it multiplies.
            self.scaler._scale.clamp_(min=_SMALLEST)

    def forget_step(self) -> None:
        """Forget what the scaler has done to the gradients of a step that failed, which it would refuse to do again."""
        if self.scaler is not None:
            self.scaler._per_optimizer_states.clear()

    def _unscaled(self, optimizer: Optimizer) -> bool:
        """Whether :meth:`unscale` was called in this step."""
        scaler: Any = self.scaler
        return bool(scaler._per_optimizer_states[id(optimizer)]['found_inf_per_device'])

    def _scaler_arguments(self, owner: str, loss_scale: object) -> dict[str, Any]:
        if isinstance(loss_scale, str) and loss_scale == 'dynamic':
            return {}
        if isinstance(loss_scale, Mapping):
            wrong = [f'{key}={value!r}' for key, value in loss_scale.items() if not _fits_scaler(key, value)]
            if not wrong:
                return dict(loss_scale)
            reason = f'{", ".join(wrong)} is none of these ({"; ".join(_SCALER_ARGUMENTS.values())})'
        elif _fits_scaler('init_scale', loss_scale):
            assert isinstance(loss_scale, (int, float))
            self._fixed_scale = float(loss_scale)
            return {'init_scale': float(loss_scale)}
        else:
            reason = "it must be 'dynamic', a finite number above 1.2e-38 or a dict of GradScaler's arguments"
        raise UserError(
            f'{owner}: loss_scale={loss_scale!r} is not allowed: {reason}. Write for example: '
            f"optim_wrapper = dict(type='{owner}', dtype='float16', loss_scale=512.0, ...) or "
            'loss_scale=dict(init_scale=512.0, growth_interval=1000)'
        )


def _fits_scaler(name: object, value: object) -> bool:
    """Whether ``value`` is one that GradScaler takes as argument ``name`` and can work with."""
    if name == 'enabled':
        return isinstance(value, bool)
    # The scaler counts and multiplies in 32 bits.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= _LARGEST[name == _INTERVAL]:
        return False
    if name == _INTERVAL:
        return isinstance(value, int)
    return (
        (name == 'init_scale' and value >= _SMALLEST)
        or (name == 'growth_factor' and value > 1)
        or (name == 'backoff_factor' and value < 1)
    )


def _check_device(owner: str, dtype: torch.dtype | None, device: torch.device) -> None:
    if dtype is torch.float16 and device.type == 'cpu' and digit_version(torch.__version__) < digit_version('2.3.0'):
        raise UserError(
            f"{owner}: dtype='float16' on the CPU needs torch 2.3 or newer (found {torch.__version__}): "
            "use dtype='bfloat16', or train on a GPU"
        )
    if dtype is torch.bfloat16 and device.type == 'cuda' and not torch.cuda.is_bf16_supported():
        raise UserError(
            f"{owner}: dtype='bfloat16' is not supported by {torch.cuda.get_device_name(device)}: use dtype='float16'"
        )


def _grad_scaler(device: torch.device, arguments: dict[str, Any]) -> Any:
    if digit_version(torch.__version__) >= digit_version('2.3.0'):
        return torch.amp.GradScaler(device.type, **arguments)
    return torch.cuda.amp.GradScaler(**arguments)
