"""Accuracy studies: methods side by side over settings and seeds, at equal epochs and at equal compute.

=========================  ==========================================================================
``spec.py``                what a study compares, read from its YAML file
``plan.py``                the runs of a study, and their configs
``run_missing.py``         makes the runs that are missing, several at a time
``worker.py``              one run, in a process that makes many
``progress.py``            shows how far the study and its runs are
``results.py``             the rows of ``results.csv``, the choice of rho, means and paired differences
``report.py``              tables and pictures
``corruption.py``          keypoint annotations of which a share is wrong
``digits.py``              scikit-learn's digits: data set, model and metric, which configs import
``cached.py``              a data set that keeps decoded pictures, or whole samples, which configs import
``efficientnet_lite0.py``  a backbone with ImageNet's weights, which configs import
=========================  ==========================================================================

``tools/study.py`` is the command line, ``configs/study/`` has the studies.
"""

from mm_sharp.analysis.study.plan import Plan, Run
from mm_sharp.analysis.study.report import as_json, markdown, markdown_trials, plot
from mm_sharp.analysis.study.results import Rows, choose_rho, compare
from mm_sharp.analysis.study.run_missing import locked, run_missing
from mm_sharp.analysis.study.spec import Study, only, read_study

__all__ = [
    'Plan', 'Rows', 'Run', 'Study', 'as_json', 'choose_rho', 'compare', 'locked', 'markdown', 'markdown_trials', 'only',
    'plot', 'read_study', 'run_missing',
]  # fmt: skip
