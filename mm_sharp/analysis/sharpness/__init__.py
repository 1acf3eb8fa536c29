"""How sharp the minimum is at which a checkpoint lies (ours).

=========================  ===============================================================================
``samples.py``             a fixed part of a data set, loaded once
``checkpoint.py``          the model of a config with a checkpoint's weights
``averaging.py``           what one batch's loss adds to the mean over all samples
``objective.py``           that mean as a function of the weights, and its first and second derivatives
``preserved_eval_mode.py``         a model in evaluation mode, put back as it was
``second_derivatives.py``  derivatives that torch lacks and an equal function has
``custom_functions.py``    functions in the model that may have no second derivative
``hessian.py``             largest eigenvalues and trace of the Hessian
``ball.py``                how far the loss rises within a distance rho: what SAM minimizes
``landscape.py``           the loss along random directions, normalised by filters
``measure.py``             all of it for one model
``table.py``               the figures as text, CSV and JSON
``figure.py``              the figures as a picture
=========================  ===============================================================================

``tools/analyze_sharpness.py`` is the command line, and ``docs/sharpness.md`` says what the figures mean.

**What is ours and what is a library's.** Eigenvalues are ARPACK's, by ``scipy.sparse.linalg.eigsh`` (implicitly
restarted Lanczos, which finds the largest eigenvalue where a power iteration would find the one of largest magnitude);
the products of Hessian and vector that it asks for are two calls of ``torch.autograd.grad``. Libraries that make these
products were looked at: curvlinops 3.0 wants a model that maps an input to a prediction and a loss function of
prediction and label, and differentiates both by ``torch.func``, which MMPose's heads (labels in data samples,
accuracies computed in NumPy on the way) and Brevitas's functions do not go through; hessian-eigenthings has left its
0.x interface and its new one is an alpha; PyHessian is of 2019 (0.1), has power iteration only and wants pairs of
tensors as well.
"""

from mm_sharp.analysis.sharpness.averaging import Averaging, LossForm
from mm_sharp.analysis.sharpness.ball import BallSharpness, ball_sharpness
from mm_sharp.analysis.sharpness.checkpoint import LoadedModel, load_model, prepared
from mm_sharp.analysis.sharpness.figure import draw
from mm_sharp.analysis.sharpness.hessian import Eigenvalues, Trace, hutchinson, top_eigenvalues
from mm_sharp.analysis.sharpness.landscape import filter_direction, line, plane
from mm_sharp.analysis.sharpness.measure import Bar, Findings, Settings, measure
from mm_sharp.analysis.sharpness.objective import Objective
from mm_sharp.analysis.sharpness.preserved_eval_mode import preserved_eval_mode
from mm_sharp.analysis.sharpness.samples import SPLITS, Samples, load_samples, loader_options
from mm_sharp.analysis.sharpness.table import Entry, row, table, write_csv, write_json

__all__ = [
    'SPLITS',
    'Averaging',
    'BallSharpness',
    'Bar',
    'Eigenvalues',
    'Entry',
    'Findings',
    'LoadedModel',
    'LossForm',
    'Objective',
    'Samples',
    'Settings',
    'Trace',
    'ball_sharpness',
    'draw',
    'filter_direction',
    'hutchinson',
    'line',
    'load_model',
    'load_samples',
    'loader_options',
    'measure',
    'plane',
    'prepared',
    'preserved_eval_mode',
    'row',
    'table',
    'top_eigenvalues',
    'write_csv',
    'write_json',
]
