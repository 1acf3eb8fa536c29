"""Mixed precision for a two-pass step: autocast and loss scaling on any device.

MMEngine's ``AmpOptimWrapper`` refuses the CPU and allows one backward pass a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from mmengine.utils import digit_version
from torch import Tensor
from torch.optim import Optimizer

from mm_sharp.errors import UserError, check_choice, is_number

_NOTHING = nullcontext()
_DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}
# The scaler counts and multiplies in 32 bits.
_RANGES = {'init_scale': (1.2e-38, 3.4e38), 'growth_factor': (1.0, 3.4e38), 'backoff_factor': (0.0, 1.0)}
_ARGUMENTS = (
    'init_scale, a finite number above 1.2e-38; growth_factor, a finite number above 1; backoff_factor, a number in '
    '(0, 1); growth_interval, an integer of at least 1; enabled, True or False'
)


class Precision:
    """Autocast dtype and, for float16, the gradient scaler.

    Args:
        owner: Class that takes the arguments, for error messages.
        dtype: ``None`` (no autocast), ``'float16'`` or ``'bfloat16'`` (or the torch dtypes).
        loss_scale: ``'dynamic'``, a fixed scale > 0, or a dict of ``GradScaler``'s arguments. Used with float16 only;
            with another dtype it is checked and does nothing, so that ``dtype`` alone can be switched.
        device: Where the parameters are.
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
        # Of sharded models: shares an overflow among the processes' scalers.
        self.share_overflow: Callable[[Any, Optimizer], None] | None = None
        self._fixed_scale: float | None = None
        arguments = self._scaler_arguments(owner, loss_scale)
        is_old = digit_version(torch.__version__) < digit_version('2.3.0')
        if self.dtype is torch.float16 and device.type == 'cpu' and is_old:
            raise UserError(
                f"{owner}: dtype='float16' on the CPU needs torch 2.3 or newer (found {torch.__version__}): "
                "use dtype='bfloat16', or train on a GPU"
            )
        if self.dtype is torch.bfloat16 and device.type == 'cuda' and not torch.cuda.is_bf16_supported():
            name = torch.cuda.get_device_name(device)
            raise UserError(f"{owner}: dtype='bfloat16' is not supported by {name}: use dtype='float16'")
        self.scaler: Any = None
        if self.dtype is torch.float16 and arguments.pop('enabled', True):
            kind = torch.cuda.amp.GradScaler if is_old else partial(torch.amp.GradScaler, device.type)
            self.scaler = kind(**arguments)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context for a forward pass."""
        if self.dtype is None:
            return _NOTHING
        return torch.autocast(self.device.type, dtype=self.dtype)

    def scale(self, loss: Tensor) -> Tensor:
        """``loss`` times the loss scale."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def inverse_scale(self) -> Tensor | None:
        """1 / loss scale as a tensor on the device, without a host synchronisation; None without scaling."""
        if self.scaler is None:
            return None
        scale = self.scaler._get_scale_async()
        assert scale is not None, 'the first backward pass initialises the scale'
        inverse: Tensor = scale.reciprocal()
        return inverse

    def unscale(self, optimizer: Optimizer) -> None:
        """Undo the scaling of the optimizer's gradients, once a step at most."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
            if self.share_overflow is not None:
                self.share_overflow(self.scaler, optimizer)

    def step(self, optimizer: Optimizer, **kwargs: Any) -> None:
        """Step ``optimizer`` (unless a scaled gradient overflowed) and update the scale."""
        if self.scaler is None:
            optimizer.step(**kwargs)
            return
        if self.share_overflow is not None:
            is_unscaled = self.scaler._per_optimizer_states[id(optimizer)]['found_inf_per_device']
            if not is_unscaled:
                self.unscale(optimizer)
        self.scaler.step(optimizer, **kwargs)
        self.scaler.update(self._fixed_scale)
        # Of a smaller scale, one over it is infinite, and would make infinite weights of finite gradients: the scaler
        # checks these before it multiplies.
        self.scaler._scale.clamp_(min=torch.finfo(torch.float32).tiny)

    def forget_step(self) -> None:
        """Let the scaler unscale again after a step that failed."""
        if self.scaler is not None:
            self.scaler._per_optimizer_states.clear()

    def _scaler_arguments(self, owner: str, loss_scale: Any) -> dict[str, Any]:
        if isinstance(loss_scale, str) and loss_scale == 'dynamic':
            return {}
        arguments = dict(loss_scale) if isinstance(loss_scale, Mapping) else {'init_scale': loss_scale}
        wrong = [f'{key}={value!r}' for key, value in arguments.items() if not _fits_scaler(key, value)]
        if wrong:
            raise UserError(
                f"{owner}: loss_scale={loss_scale!r} is not allowed: it must be 'dynamic', a finite number above "
                f"1.2e-38 or a dict of GradScaler's arguments; {', '.join(wrong)} is none of these ({_ARGUMENTS}). "
                f"Write for example: optim_wrapper = dict(type='{owner}', dtype='float16', loss_scale=512.0, ...) or "
                'loss_scale=dict(init_scale=512.0, growth_interval=1000)'
            )
        if not isinstance(loss_scale, Mapping):
            self._fixed_scale = float(arguments['init_scale'])
        return arguments


def _fits_scaler(name: object, value: Any) -> bool:
    """Whether GradScaler can work with ``value`` as argument ``name``."""
    if name == 'enabled':
        return isinstance(value, bool)
    if name == 'growth_interval':
        return isinstance(value, int) and is_number(value) and 1 <= value < 2**31
    low, high = _RANGES.get(str(name), (0.0, 0.0))
    return is_number(value) and low < value < high
