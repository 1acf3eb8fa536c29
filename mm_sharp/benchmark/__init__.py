"""What a training step costs with each method, and what a sample history costs (ours).

======================  ===============================================================================
``methods.py``          the methods by name: wrapper, settings and the limit by arithmetic
``subject.py``          the model, the optimizer wrappers and the batches of a training config
``steps.py``            steps of all methods side by side, timed in interleaved rounds
``compare.py``          from times to medians, paired ratios and the table
``history.py``          memory and times of a :class:`mm_sharp.sample_history.SampleHistory`
======================  ===============================================================================

``tools/benchmark.py`` is the command line.
"""

from mm_sharp.benchmark.compare import Quartiles, Row, compare, quartiles, step_table
from mm_sharp.benchmark.history import HistoryCost, history_table, measure_history
from mm_sharp.benchmark.methods import METHODS, Method, StepLimit, parse_methods, step_limit, wrapper_settings
from mm_sharp.benchmark.steps import Contestant, measure_rounds
from mm_sharp.benchmark.subject import FLOAT, Subject, load_subject

__all__ = [
    'FLOAT',
    'METHODS',
    'Contestant',
    'HistoryCost',
    'Method',
    'Quartiles',
    'Row',
    'StepLimit',
    'Subject',
    'compare',
    'history_table',
    'load_subject',
    'measure_history',
    'measure_rounds',
    'parse_methods',
    'quartiles',
    'step_limit',
    'step_table',
    'wrapper_settings',
]
