"""What a training step costs with each method, and what parts of it cost alone (ours).

======================  ===============================================================================
``methods.py``          the methods by name: wrapper, settings and the theoretical cost
``autocast.py``         the base optimizer under autocast, where MMEngine's own wrapper refuses
``peers.py``            SAM by hand and of another package, to compare with
``subject.py``          the model, the optimizer wrappers and the batches of a training config
``floors.py``           the passes of a method alone: what its own work is measured against
``steps.py``            steps of all methods side by side, timed in interleaved rounds
``phases.py``           where the time of a step goes
``memory.py``           peak memory
``compare.py``          from times to medians, paired ratios and rows
``table.py``            all of that at one batch size
``chart.py``            the tables as bars
``climbing.py``         climb and restoration alone, against the copy bandwidth
``host.py``             the host's own time of a step
``history.py``          memory and times of a :class:`mm_sharp.samples.history.SampleHistory`
======================  ===============================================================================

``tools/benchmark.py`` is the command line.
"""

from mm_sharp.analysis.benchmark.baselines import PEERS, check_peers
from mm_sharp.analysis.benchmark.chart import draw_chart
from mm_sharp.analysis.benchmark.compare import Quartiles, Row, compare, quartiles, step_table
from mm_sharp.analysis.benchmark.history import HistoryCost, history_table, measure_history
from mm_sharp.analysis.benchmark.host import measure_host
from mm_sharp.analysis.benchmark.memory import keep_freed_memory
from mm_sharp.analysis.benchmark.methods import METHODS, Method, StepLimit, parse_methods, step_limit, wrapper_settings
from mm_sharp.analysis.benchmark.perturbing import ClimbCost, climb_table, measure_climb
from mm_sharp.analysis.benchmark.phases import measure_phases, phase_table
from mm_sharp.analysis.benchmark.steps import Candidate, measure_rounds
from mm_sharp.analysis.benchmark.table import Table, measure_table
from mm_sharp.analysis.benchmark.workload import FLOAT, Workload, load_subject

__all__ = [
    'FLOAT',
    'METHODS',
    'PEERS',
    'Candidate',
    'ClimbCost',
    'HistoryCost',
    'Method',
    'Quartiles',
    'Row',
    'StepLimit',
    'Table',
    'Workload',
    'check_peers',
    'climb_table',
    'compare',
    'draw_chart',
    'history_table',
    'keep_freed_memory',
    'load_subject',
    'measure_climb',
    'measure_history',
    'measure_host',
    'measure_phases',
    'measure_rounds',
    'measure_table',
    'parse_methods',
    'phase_table',
    'quartiles',
    'step_limit',
    'step_table',
    'wrapper_settings',
]
