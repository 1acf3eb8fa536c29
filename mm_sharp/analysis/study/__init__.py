"""Accuracy studies: methods side by side over settings and seeds, at equal epochs and at equal compute (ours).

======================  ===============================================================================
``spec.py``             what a study compares, read from its YAML file
``plan.py``             the runs it consists of, and their configs
``corruption.py``       keypoint annotations of which a share is wrong
``execute.py``          one run
``run_missing.py``          all runs that are missing, several at a time
``lock.py``             one process at a time in a folder of results
``metric_check.py``     whether the evaluators give the study's metric
``progress.py``         how far the study is, and each run under way
``rows.py``             the file with one row a run
``results.py``          the choice of rho, and the comparisons
``unfinished.py``       what there is of a study whose runs have not all been made
``statistics.py``       means, intervals and paired differences
``report.py``           tables and pictures
``digits.py``           scikit-learn's digits: data set, model and metric, which configs import
``remembered.py``       a data set that keeps its pre-processed pictures, which configs import
======================  ===============================================================================

``tools/study.py`` is the command line, ``configs/study/`` has the studies.
"""

from mm_sharp.analysis.study.lock import locked
from mm_sharp.analysis.study.plan import Plan, Run
from mm_sharp.analysis.study.report import as_json, markdown, markdown_trials, plot
from mm_sharp.analysis.study.results import Comparison, choose_rho, comparisons
from mm_sharp.analysis.study.rows import Rows
from mm_sharp.analysis.study.run_missing import Workers, run_missing
from mm_sharp.analysis.study.spec import Study, only, read_study
from mm_sharp.analysis.study.unfinished import SoFar, compare_what_is_there

__all__ = [
    'Comparison',
    'Plan',
    'Rows',
    'Run',
    'SoFar',
    'Study',
    'Workers',
    'as_json',
    'choose_rho',
    'compare_what_is_there',
    'comparisons',
    'locked',
    'markdown',
    'markdown_trials',
    'only',
    'plot',
    'read_study',
    'run_missing',
]
