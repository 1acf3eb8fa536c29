"""bfloat16 in MMPose's ``to_numpy``, through which its heads compute the accuracy that they log.

Cause: NumPy has no bfloat16, and MMPose 1.3.2's ``to_numpy`` hands tensors over as they are; so every head that logs an
accuracy fails under bfloat16 autocast, with any optimizer wrapper.

Repair: where it fails, give it float32 copies of bfloat16 tensors, before the heads import it by name.

Ends with: an mmpose whose ``to_numpy`` takes bfloat16 (none as of 1.3.2).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .fix import Fix
from .import_hook import before_import, is_present

_NAME = 'bfloat16 arrays'
_ENDS = 'an mmpose whose to_numpy takes bfloat16 (none as of 1.3.2)'
_active = False


def install() -> None:
    """Arrange for the repair to run when MMPose's models are imported."""
    before_import('mmpose.models', _repair)


def describe() -> Fix:
    """Whether the function was replaced; MMPose's models should have been imported before."""
    if _active:
        return Fix(_NAME, True, "mmpose's heads cannot log accuracy under bfloat16 autocast", _ENDS)
    if not is_present('mmpose'):
        return Fix(_NAME, False, 'mmpose is not installed', _ENDS)
    return Fix(_NAME, False, "to_numpy takes bfloat16, or MMPose's models were not imported", _ENDS)


def _repair(name: str) -> None:
    """Replace ``to_numpy`` if it refuses bfloat16."""
    global _active
    module: Any = importlib.import_module('mmpose.utils.tensor_utils')
    try:
        module.to_numpy(torch.zeros(1, dtype=torch.bfloat16))
    except TypeError:
        module.to_numpy = _widening(module.to_numpy)
        _active = True


def _widening(to_numpy: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to_numpy)
    def wrapper(x: Any, return_device: bool = False, unzip: bool = False) -> Any:
        return to_numpy(_widen(x), return_device, unzip)

    return wrapper


def _widen(x: Any) -> Any:
    """``x`` with its bfloat16 tensors in float32; everything else is returned as it is."""
    if isinstance(x, Tensor):
        return x.float() if x.dtype == torch.bfloat16 else x
    if isinstance(x, (list, tuple)) and all(isinstance(item, Tensor) for item in x):
        return [_widen(item) for item in x]
    return x
