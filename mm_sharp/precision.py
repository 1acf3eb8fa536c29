"""Mixed precision for a two-pass step: autocast and loss scaling on any device, the CPU included.

MMEngine's ``AmpOptimWrapper`` cannot be reused: it refuses the CPU and knows one backward pass a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from mmengine.utils import digit_version
from torch import Tensor
from torch.optim import Optimizer

from mm_sharp.validation import check_choice

_DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}


class Precision:
    """Autocast dtype and, for float16, the gradient scaler.

    Args:
        owner: Class that takes the arguments, for error messages.
        dtype: ``None`` (no autocast), ``'float16'`` or ``'bfloat16'`` (or the torch dtypes).
        loss_scale: ``'dynamic'``, a fixed scale > 0, or a dict of ``GradScaler``'s arguments. Used with float16 only.
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
        check_choice(owner, 'dtype', dtype, (None, *_DTYPES, *_DTYPES.values()))
        self.dtype = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
        self.device = device
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

    def step(self, optimizer: Optimizer, **kwargs: Any) -> None:
        """Step ``optimizer`` (unless a scaled gradient overflowed) and update the scale."""
        if self.scaler is None:
            optimizer.step(**kwargs)
            return
        self.scaler.step(optimizer, **kwargs)
        self.scaler.update(self._fixed_scale)

    def forget_step(self) -> None:
        """Forget what the scaler has done to the gradients of a step that failed, which it would refuse to do again."""
        if self.scaler is not None:
            self.scaler._per_optimizer_states.clear()

    def _scaler_arguments(self, owner: str, loss_scale: object) -> dict[str, Any]:
        if loss_scale == 'dynamic':
            return {}
        if isinstance(loss_scale, Mapping):
            return dict(loss_scale)
        if isinstance(loss_scale, (int, float)) and not isinstance(loss_scale, bool) and loss_scale > 0:
            self._fixed_scale = float(loss_scale)
            return {'init_scale': float(loss_scale)}
        raise ValueError(
            f"{owner}: loss_scale={loss_scale!r} is not allowed: it must be 'dynamic', a number above 0 or a dict "
            f"of GradScaler's arguments. Write for example: dtype='float16', loss_scale=512.0 or "
            'loss_scale=dict(init_scale=512.0, growth_interval=1000)'
        )


def _check_device(owner: str, dtype: torch.dtype | None, device: torch.device) -> None:
    if dtype is torch.float16 and device.type == 'cpu' and digit_version(torch.__version__) < digit_version('2.3.0'):
        raise ValueError(
            f"{owner}: dtype='float16' on the CPU needs torch 2.3 or newer (found {torch.__version__}): "
            "use dtype='bfloat16', or train on a GPU"
        )
    if dtype is torch.bfloat16 and device.type == 'cuda' and not torch.cuda.is_bf16_supported():
        raise ValueError(
            f"{owner}: dtype='bfloat16' is not supported by {torch.cuda.get_device_name(device)}: use dtype='float16'"
        )


def _grad_scaler(device: torch.device, arguments: dict[str, Any]) -> Any:
    if digit_version(torch.__version__) >= digit_version('2.3.0'):
        return torch.amp.GradScaler(device.type, **arguments)
    return torch.cuda.amp.GradScaler(**arguments)
