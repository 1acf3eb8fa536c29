"""Two of Brevitas's global switches, set for this process: what it does when a checkpoint is loaded (ours).

By default it replaces the scales by new parameters, which an optimizer that is built already would not know, and
refuses checkpoints of float models.
"""

import warnings

try:
    with warnings.catch_warnings():
        # Brevitas can do without that package, which we use nothing of.
        warnings.filterwarnings('ignore', message='fast_hadamard_transform package not found')
        warnings.filterwarnings('ignore', message='brevitas.fx is deprecated')  # Brevitas 0.13 imports it itself
        import brevitas.graph.quantize  # noqa: F401
        from brevitas import config
except ModuleNotFoundError as error:
    raise ImportError(
        'quantization needs Brevitas, which is not installed: pip install "mm_sharp[quant]" (or brevitas)'
    ) from error

config.REINIT_ON_STATE_DICT_LOAD = False
config.IGNORE_MISSING_KEYS = True
