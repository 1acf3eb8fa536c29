"""Quantization-aware training with Brevitas, for any model of MMEngine's kind.

Importing it registers, in MMEngine's root registries, ``QuantizedModel`` (``MODELS``), :class:`CalibrationHook`,
:class:`DistillationHook`, :class:`FreezeHook` and :class:`OscillationHook` (``HOOKS``); a run whose model is quantized
gets a :class:`CalibrationHook` by itself, and its quantizers' scales have no weight decay
(:mod:`mm_sharp.quantization.scale_decay`). Nothing else of mm_sharp imports Brevitas.
"""

import warnings as _warnings

try:
    with _warnings.catch_warnings():
        # Brevitas can do without that package, which we use nothing of.
        _warnings.filterwarnings('ignore', message='fast_hadamard_transform package not found')
        _warnings.filterwarnings('ignore', message='brevitas.fx is deprecated')  # Brevitas 0.13 imports it itself
        import brevitas.graph.quantize  # noqa: F401
        from brevitas import config as _brevitas
except ModuleNotFoundError as error:
    raise ImportError(
        'quantization needs Brevitas, which is not installed: pip install "mm_sharp[quant]" (or brevitas)'
    ) from error

from mm_sharp.compat import register_default_hook as _register_default_hook

from .build import quantize, quantized_model
from .calibration import calibrate
from .calibration_hook import CalibrationHook
from .distillation_hook import DistillationHook
from .freeze_hook import FreezeHook
from .oscillation_hook import OscillationHook
from .policy import LayerPolicy, QuantizationPolicy
from .record import (
    CheckpointMismatchError,
    LayerRecord,
    NotCalibratedError,
    QuantizationRecord,
    check_calibrated,
    is_calibrated,
)
from .scale_decay import install as _keep_scales_from_decay

__all__ = [
    'CalibrationHook', 'CheckpointMismatchError', 'DistillationHook', 'FreezeHook', 'LayerPolicy', 'LayerRecord',
    'NotCalibratedError', 'OscillationHook', 'QuantizationPolicy', 'QuantizationRecord', 'calibrate',
    'check_calibrated', 'is_calibrated', 'quantize', 'quantized_model',
]  # fmt: skip

# When a checkpoint is loaded, Brevitas would replace the scales by new parameters, which an optimizer that is built
# already would not know, and refuse checkpoints of float models.
_brevitas.REINIT_ON_STATE_DICT_LOAD = False
_brevitas.IGNORE_MISSING_KEYS = True

_register_default_hook(CalibrationHook)
_keep_scales_from_decay()
