"""bfloat16 in MMPose's ``to_numpy``.

Cause: NumPy has no bfloat16, and MMPose 1.3.2's ``to_numpy`` hands tensors over as they are. Every head that logs an
accuracy calls it, and so fails under bfloat16 autocast, with any optimizer wrapper.

Fix: before the heads import it by name, it gets float32 copies of bfloat16 tensors.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from .fix import Fix


def _patch(module: str) -> str | None:
    utils: Any = importlib.import_module('mmpose.utils.tensor_utils')
    to_numpy = utils.to_numpy
    try:
        to_numpy(torch.zeros(1, dtype=torch.bfloat16))
    except TypeError:

        @functools.wraps(to_numpy)
        def wrapper(x: Any, return_device: bool = False, unzip: bool = False) -> Any:
            return to_numpy(_widen(x), return_device, unzip)

        utils.to_numpy = wrapper
        return "mmpose's heads cannot log accuracy under bfloat16 autocast"
    return None


def _widen(x: Any) -> Any:
    """``x``, a tensor or several, with float32 for bfloat16."""
    if isinstance(x, torch.Tensor):
        return x.float() if x.dtype == torch.bfloat16 else x
    return type(x)(map(_widen, x)) if isinstance(x, (list, tuple)) else x


FIX = Fix(
    name='bfloat16 arrays',
    package='mmpose',
    patch=_patch,
    ends_with='an mmpose whose to_numpy takes bfloat16 (none as of 1.3.2)',
    before=('mmpose.models',),
)
