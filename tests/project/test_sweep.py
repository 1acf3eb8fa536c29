"""The sweep of ``make sweep`` works, and three of the models that have most to say are equal to the base optimizer."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest

import mm_sharp  # noqa: F401
from tests.mmpose_cases import QUIET

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec('mmpretrain') is None,
        reason='MMPretrain is not installed: pip install "mm_sharp[classification]"',
    ),
    *QUIET,
]

BYOL = 'byol/byol_resnet50_16xb256-coslr-200e_in1k.py'
RESNET = 'resnet/resnet18_8xb16_cifar10.py'
RTMDET_INS = 'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py'


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight channels: the sweep itself leaves widths as they are."""
    from tests.sweep.recipes import Recipe

    original = Recipe.config

    def narrow(recipe: Recipe) -> Any:
        cfg = original(recipe)
        if recipe.path == BYOL:
            cfg.model.backbone.update(depth=18, base_channels=8, stem_channels=8)
            cfg.model.neck.update(in_channels=64, hid_channels=32, out_channels=16)
            cfg.model.head.predictor.update(in_channels=16, hid_channels=32, out_channels=16)
        if recipe.path == RESNET:
            cfg.model.backbone.update(base_channels=8, stem_channels=8)
            cfg.model.head.in_channels = 64
        return cfg

    monkeypatch.setattr(Recipe, 'config', narrow)


@pytest.mark.parametrize(
    ('package', 'path', 'loss'),
    [
        pytest.param('mmpretrain', BYOL, '', id='BYOL', marks=pytest.mark.slow),
        pytest.param('mmpretrain', RESNET, 'SeesawLoss', id='SeesawLoss'),
        pytest.param('mmdet', RTMDET_INS, '', id='RTMDet-Ins', marks=pytest.mark.slow),
    ],
)
def test_a_step_at_rho_zero_is_the_base_optimizers(package: str, path: str, loss: str) -> None:
    from tests.sweep.process import attempt
    from tests.sweep.recipes import Recipe

    found = attempt(Recipe(package, path, loss=loss))
    assert found.get('error') is None
    assert found['SAM'] == 'equal'


def test_what_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.sweep.process import attempt
    from tests.sweep.recipes import Recipe
    from tests.sweep.trial import METHODS

    monkeypatch.setitem(METHODS, 'SAM', {'type': 'SAMOptimWrapper', 'rho': 0.05})
    assert 'model.backbone.conv1._parameters.weight' in attempt(Recipe('mmpretrain', RESNET))['SAM']


@pytest.mark.parametrize(
    ('does', 'said'),
    [
        (lambda *_: all(iter(lambda: True, False)), 'takes more than 1 s'),  # for ever
        (lambda *_: os._exit(3), 'the process ended with code 3'),
    ],
    ids=['hangs', 'crashes'],
)
def test_a_model_that_hangs_or_crashes_ends_alone(
    does: Callable[..., Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.sweep import process
    from tests.sweep.recipes import Recipe

    monkeypatch.setattr(process, 'trial', does)
    assert process.attempt(Recipe('mmpretrain', RESNET), limit=1) == {'error': said}


def test_the_page_counts_and_lists() -> None:
    from tests.sweep.page import page

    found = [
        {'package': 'mmdet', 'path': 'a.py', 'alike': 2, 'SAM': 'equal'},
        {'package': 'mmdet', 'path': 'b.py', 'alike': 1, 'SAM': 'model.weight: 1e-3 of 1e+0'},
        {'package': 'mmdet', 'path': 'c.py', 'alike': 4, 'error': "MissingOperatorError: the operator 'carafe'"},
    ]
    text = page(found, {'mmdet': {'d.py': 'KeyError'}}, ['SAM'])
    assert '| mmdet | 7 | 3 | 2 | 1 | 1 |' in text
    assert '## SAM: not equal\n\n- mmdet `b.py`: model.weight' in text
    assert "no stand-in\n\n- mmdet `c.py`: MissingOperatorError: the operator 'carafe'" in text
    assert '1 configs cannot be read' in text
