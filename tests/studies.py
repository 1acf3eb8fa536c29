"""Small studies for tests, on scikit-learn's digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mm_sharp.analysis.study import Plan, Rows, Run, read_study
from tests.conftest import ROOT

SETTING: dict[str, Any] = {'config': str(ROOT / 'configs/study/digits_cnn.py'), 'epochs': 6}
# Two steps an epoch.
TINY: dict[str, Any] = {**SETTING, 'epochs': 2, 'options': {'train_dataloader.dataset.size': 80, 'model.width': 4}}
CHOSEN = {'base': None, 'sam': 0.1, 'half': 0.1}


def small(**changes: Any) -> dict[str, Any]:
    """A study of three methods in one setting, as its YAML file has it."""
    return {
        'name': 'small',
        'metric': {'name': 'digits/accuracy'},
        'seeds': [0, 1, 2],
        'selection': {'seeds': [100, 101], 'rho': [0.05, 0.1]},
        'budgets': ['epochs', 'compute'],
        'control': 'half',
        'methods': {
            'base': {},
            'sam': {'type': 'SAMOptimWrapper'},
            'half': {'type': 'AUSAMOptimWrapper', 'sampling_ratio': 0.5, 's_min': 1.0},
        },
        'settings': {'clean': SETTING},
        **changes,
    }


def tiny(**changes: Any) -> dict[str, Any]:
    """A study of nine short runs: three that choose rho; then, at two seeds, the base optimizer, and SAM twice."""
    methods = {'base': {}, 'sam': {'type': 'SAMOptimWrapper'}}
    selection = {'seeds': [100], 'rho': [0.05, 0.1]}
    fewer = {'methods': methods, 'control': '', 'seeds': [0, 1], 'selection': selection, 'keep': ['sam']}
    return small(**{**fewer, 'settings': {'clean': TINY}, **changes})


def write(folder: Path, content: Any) -> Path:
    """The study's file."""
    file = folder / 'study.yaml'
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def plan_of(folder: Path, content: Any = None, **changes: Any) -> Plan:
    """The plan of a study, :func:`small` unless another is given; its results go to ``folder/out``."""
    return Plan(read_study(write(folder, {**(content or small()), **changes})), folder / 'out')


def filled(plan: Plan, value: Callable[[Run], float], *lost: str, wild: str = '-') -> Rows:
    """Rows for all runs but those whose ids begin with one of ``lost``; those at ``wild`` have diverged."""
    rows = Rows(plan.folder / 'results.csv')
    chosen = {name: CHOSEN[name] for name in plan.study.methods}
    for setting in plan.study.settings:
        for run in (*plan.selection_runs(setting), *plan.report_runs(setting, chosen)):
            if not run.id.startswith(lost):
                metric = math.nan if run.id.startswith(wild) else value(run)
                rows.add(run, plan.fingerprint(run), {'digits/accuracy': metric})
    return Rows(rows.file)
