"""Quantization-aware training with Brevitas, for any model of MMEngine's kind.

Importing it registers, in MMEngine's root registries, ``QuantizedModel`` (``MODELS``), :class:`CalibrationHook` and
:class:`FreezeHook` (``HOOKS``); a run whose model is quantized gets a :class:`CalibrationHook` by itself, and its
quantizers' scales have no weight decay (:mod:`mm_sharp.quantization.scale_decay`). Nothing else of mm_sharp imports
Brevitas.
"""

from mm_sharp.compat import register_default_hook as _add_to_our_runs

from . import brevitas_switches  # noqa: F401  # first: it says what is missing, if Brevitas is
from .build import quantize, quantized_model
from .calibration import calibrate
from .calibration_hook import CalibrationHook
from .freeze_hook import FreezeHook
from .guard import NotCalibratedError, check_calibrated, is_calibrated
from .loading import CheckpointMismatchError
from .policy import LayerPolicy, QuantizationPolicy
from .record import LayerRecord, QuantizationRecord
from .scale_decay import install as _keep_scales_from_decay

__all__ = [
    'CalibrationHook',
    'CheckpointMismatchError',
    'FreezeHook',
    'LayerPolicy',
    'LayerRecord',
    'NotCalibratedError',
    'QuantizationPolicy',
    'QuantizationRecord',
    'calibrate',
    'check_calibrated',
    'is_calibrated',
    'quantize',
    'quantized_model',
]

_add_to_our_runs(CalibrationHook)
_keep_scales_from_decay()
