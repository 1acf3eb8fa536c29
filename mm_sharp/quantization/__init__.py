"""Quantization-aware training with Brevitas, for any model of MMEngine's kind.

Importing it registers, in MMEngine's root registries, ``QuantizedModel`` (``MODELS``), :class:`CalibrationHook` and
:class:`FreezeHook` (``HOOKS``); a run whose model is quantized gets a :class:`CalibrationHook` by itself. Nothing
else of mm_sharp imports Brevitas.

Two of Brevitas's global switches are set, for this process: what it does when a checkpoint is loaded. By default it
replaces the scales by new parameters, which an optimizer that is built already would not know, and refuses checkpoints
of float models.
"""

try:
    from brevitas import config as _config
except ModuleNotFoundError as _error:
    raise ImportError(
        'quantization needs Brevitas, which is not installed: pip install "mm_sharp[quant]" (or brevitas)'
    ) from _error

_config.REINIT_ON_STATE_DICT_LOAD = False
_config.IGNORE_MISSING_KEYS = True

from mm_sharp.compat import add_to_our_runs as _add_to_our_runs

from .build import quantize, quantized_model
from .calibration import calibrate
from .calibration_hook import CalibrationHook
from .freeze_hook import FreezeHook
from .guard import check_calibrated, is_calibrated
from .loading import CheckpointMismatchError
from .policy import LayerPolicy, QuantizationPolicy
from .record import LayerRecord, QuantizationRecord

__all__ = [
    'CalibrationHook',
    'CheckpointMismatchError',
    'FreezeHook',
    'LayerPolicy',
    'LayerRecord',
    'QuantizationPolicy',
    'QuantizationRecord',
    'calibrate',
    'check_calibrated',
    'is_calibrated',
    'quantize',
    'quantized_model',
]

_add_to_our_runs(CalibrationHook)
