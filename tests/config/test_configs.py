"""Every config builds, trains two steps, and changes only what it says."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

import mm_sharp  # noqa: F401  (registers the wrappers)
from mm_sharp.config.preflight import check_wrappers
from mm_sharp.step.wrapper import TwoPassOptimWrapper
from tests.conftest import ROOT
from tests.narrow import narrow
from tests.recipe_runs import QUIET, STEPS, Steps, cost, inherited, method, name, read, two_steps

FOLDER = ROOT / 'configs'
METHODS = ('sam', 'esam', 'ausam')
# Configs for another package than MMPose, of quantized models and of `make train` have tests in files of their own.
CONFIGS = sorted(
    path
    for path in FOLDER.rglob('*.py')
    if path.parent.name in {*METHODS, 'demo'} and not re.search(r'_w\da\d_|_lite0_', path.stem)
)
INTERVAL = FOLDER / 'sam' / 'simcc_res50_sam-interval_8xb64-210e_coco-256x192.py'
CONFIGS.remove(INTERVAL)
# One recipe each.
FAMILY = [
    INTERVAL,
    *(next((FOLDER / name).glob('*.py')) for name in ('looksam', 'friendlysam', 'gsam', 'wsam', 'msam')),
]
DEMOS = [path for path in CONFIGS if path.parent.name == 'demo']
LOADER = FOLDER / 'ausam' / 'simcc_res50_ausam-loader_8xb64-210e_coco-256x192.py'
RECIPES = [path for path in CONFIGS if path not in {*DEMOS, LOADER}]
OWN = {'optim_wrapper', 'custom_hooks', 'custom_imports', 'sharp_optim_wrapper', 'sharp_hook'}

pytestmark = QUIET


@pytest.mark.parametrize(
    'path',
    # One recipe of each method is fast.
    [pytest.param(path, marks=() if 'simcc' in path.stem else pytest.mark.slow) for path in CONFIGS],
    ids=name,
)
def test_two_training_steps(path: Path, tmp_path: Path) -> None:
    cfg = read(path)
    narrow(cfg.model)
    runner = two_steps(cfg, tmp_path)
    before = {key: value.clone() for key, value in runner.model.state_dict().items()}
    steps = Steps()
    runner.register_hook(steps)
    runner.train()

    assert len(steps.losses) == 2
    assert all(math.isfinite(loss) for loss in steps.losses)
    _, batch_size, passes = STEPS[method(cfg)]
    assert steps.batches == ([3, 2] if path == LOADER else [batch_size] * 2)
    assert steps.passes == passes
    after = runner.model.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(bool(value.isfinite().all()) for value in after.values())
    sharp = 'sharp_optim_wrapper' in cfg
    assert isinstance(runner.optim_wrapper, TwoPassOptimWrapper) == sharp
    logged = {key.rpartition('/')[2] for key in runner.message_hub.log_scalars}
    assert ('sharpness' in logged) == sharp
    assert ('sampling_entropy' in logged) == (method(cfg) not in ('OptimWrapper', 'SAMOptimWrapper'))
    assert ('share_seen' in logged) == (method(cfg).startswith(('ESAMOptimWrapper-history', 'AUSAMOptimWrapper')))


@pytest.mark.parametrize('path', CONFIGS, ids=name)
def test_the_wrapper_is_the_one_in_the_name(path: Path) -> None:
    cfg = read(path)
    (found,) = re.findall(r'_(sam|esam|esam-history|ausam|ausam-loader)_', path.stem) or ['']
    base, _, variant = found.partition('-')
    assert path.parent.name in ('demo', base)
    assert method(cfg).partition('OptimWrapper')[0] == base.upper()
    assert cfg.optim_wrapper.get('selection') == ('history' if variant == 'history' else None)
    assert ('batch_sampler' in cfg.train_dataloader) == (variant == 'loader')
    check_wrappers(cfg)


@pytest.mark.parametrize(
    'path', [pytest.param(path, marks=() if 'msam' in path.stem else pytest.mark.slow) for path in FAMILY], ids=name
)
def test_two_steps_of_the_family(path: Path, tmp_path: Path) -> None:
    cfg = read(path)
    assert (
        cfg.optim_wrapper.type.lower() == re.findall(r'_([a-z]*sam)(?:-interval)?_8xb', path.stem)[0] + 'optimwrapper'
    )
    narrow(cfg.model)
    runner = two_steps(cfg, tmp_path)
    steps = Steps()
    runner.register_hook(steps)
    runner.train()
    assert all(math.isfinite(loss) for loss in steps.losses)
    assert steps.passes == STEPS[method(cfg)][2]
    assert all(bool(value.isfinite().all()) for value in runner.model.state_dict().values())
    logged = {key.rpartition('/')[2] for key in runner.message_hub.log_scalars}
    assert 'L_w' in logged
    assert ('rho' in logged) == ('gsam' in path.stem)


@pytest.mark.parametrize('path', [*CONFIGS, *FAMILY], ids=name)
def test_written_and_read_again_it_is_the_same(path: Path, tmp_path: Path) -> None:
    cfg = read(path)
    cfg.dump(tmp_path / 'copy.py')
    assert Config.fromfile(tmp_path / 'copy.py').to_dict() == cfg.to_dict()


@pytest.mark.parametrize('folder', [*METHODS, 'demo'])
def test_formatted_it_is_the_same(folder: str, tmp_path: Path, neat_configs: None) -> None:
    path = next(path for path in CONFIGS if path.parent.name == folder)
    test_written_and_read_again_it_is_the_same(path, tmp_path)


@pytest.mark.parametrize('path', [*RECIPES, *FAMILY], ids=name)
def test_a_recipe_of_ours_changes_only_what_it_must(path: Path, tmp_path: Path) -> None:
    (tmp_path / 'theirs.py').write_text(f"_base_ = '{inherited(path)}'")
    ours, theirs = read(path).to_dict(), Config.fromfile(tmp_path / 'theirs.py').to_dict()
    wrapper, hooks, fragment = ours['optim_wrapper'], ours['custom_hooks'], ours['sharp_optim_wrapper']

    assert {key: value for key, value in ours.items() if key not in OWN} == {
        key: value for key, value in theirs.items() if key not in OWN
    }
    assert wrapper == {**theirs['optim_wrapper'], **fragment}
    assert not set(fragment) & set(theirs['optim_wrapper']) - {'type'}
    assert hooks == [*theirs['custom_hooks'], {'type': 'SharpnessHook'}]


def test_every_method_has_the_same_recipes() -> None:
    sam, *others = [sorted(inherited(path) for path in RECIPES if path.parent.name == folder) for folder in METHODS]
    assert len(sam) == 6
    assert others == [sam, sam]


def test_drawing_in_the_loader_changes_the_batch_sampler_alone() -> None:
    drawn, loaded = (read(path).to_dict() for path in (LOADER, LOADER.with_name(LOADER.name.replace('-loader', ''))))
    assert drawn['train_dataloader'].pop('batch_sampler') == {'type': 'AUSAMSampler'}
    assert drawn == loaded


@pytest.mark.parametrize('path', DEMOS, ids=name)
def test_the_demos_take_equal_compute(path: Path) -> None:
    """As near to ten epochs of the base optimizer as whole epochs come; the schedule ends with the last."""
    cfg = read(path)
    epochs, factor = cfg.train_cfg.max_epochs, cost(cfg.optim_wrapper, cfg.train_dataloader.batch_size)
    assert abs(epochs * factor - 10) <= factor / 2
    assert [cfg.param_scheduler[1].end, cfg.param_scheduler[1].T_max, cfg.train_cfg.val_interval] == [epochs] * 3
    base = read(FOLDER / 'demo' / 'simcc_res18-half_demo-128x96.py')
    schedule = {'max_epochs', 'train_cfg', 'param_scheduler'}
    assert {k: v for k, v in cfg.to_dict().items() if k not in OWN | schedule} == {
        k: v for k, v in base.to_dict().items() if k not in OWN | schedule
    }
