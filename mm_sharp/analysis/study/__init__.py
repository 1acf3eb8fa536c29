"""Accuracy studies: methods side by side over settings and seeds, at equal epochs and at equal compute.

``spec`` reads what a study compares, ``plan`` has its runs and their configs; ``run_missing`` makes those that are
missing; ``results`` compares them, ``report`` has tables and pictures. ``corruption`` makes wrong annotations; configs
import ``digits``, ``cached`` and ``efficientnet_lite0``. ``tools/study.py`` is the command line, ``configs/study/`` has
the studies.
"""

from mm_sharp.analysis.study.plan import Plan, Run
from mm_sharp.analysis.study.report import content, markdown, markdown_trials, plot
from mm_sharp.analysis.study.results import Rows, choose_rho, compare
from mm_sharp.analysis.study.run_missing import locked, run_missing
from mm_sharp.analysis.study.spec import Study, only, read_study

__all__ = [
    'Plan', 'Rows', 'Run', 'Study', 'choose_rho', 'compare', 'content', 'locked', 'markdown', 'markdown_trials', 'only',
    'plot', 'read_study', 'run_missing',
]  # fmt: skip
