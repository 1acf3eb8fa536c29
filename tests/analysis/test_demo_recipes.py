"""The recipes of `make train` and `make train-qat`: they train, and differ as they say."""

from __future__ import annotations

import math
import multiprocessing
import re
from pathlib import Path

import pytest

from mm_sharp.analysis.study.run_missing import new_runner
from mm_sharp.methods.ausam import AUSAMOptimWrapper
from tests.conftest import ROOT
from tests.recipe_runs import QUIET, name, read
from tests.tiny_data import draw_coco

RECIPES = sorted((ROOT / 'configs' / 'demo').glob('*_lite0_*.py'))
MAKEFILE = (ROOT / 'Makefile').read_text()

pytestmark = QUIET


# The quantized ones; tests/quantization/test_qat_configs.py trains others.
SLOW = re.compile(r'_w\da\d_')


@pytest.mark.parametrize(
    'path', [pytest.param(path, marks=pytest.mark.slow if SLOW.search(path.stem) else ()) for path in RECIPES], ids=name
)
def test_a_recipe_trains_and_is_evaluated(path: Path, tmp_path: Path) -> None:
    pytest.importorskip('timm', reason="timm is not installed: pip install 'mm_sharp[timm]'")
    cfg = read(path)
    if cfg.model.type == 'QuantizedModel':
        pytest.importorskip('brevitas', reason='needs the extra: pip install mm_sharp[quant]')
        cfg.model.policy.scale_init = 'max'  # without a search
        next(hook for hook in cfg.custom_hooks if hook.type == 'CalibrationHook').num_batches = 1
    # The package with the weights would be read, and nothing else changed.
    cfg.model.backbone.pretrained = False
    data = draw_coco(tmp_path / 'people', train=4, val=2)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(data)
        loader.batch_size = 4
    cfg.train_dataloader.dataset.indices = 4
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator[0].ann_file = str(data / 'annotations' / 'person_keypoints_val.json')
    cfg.env_cfg.mp_cfg.mp_start_method = multiprocessing.get_start_method()  # of this process, other tests' too
    cfg.train_cfg.max_epochs = 1
    cfg.work_dir, cfg.experiment_name, cfg.load_from = str(tmp_path), path.stem, None
    runner = new_runner(cfg)
    runner.train()
    (loss,) = runner.message_hub.get_scalar('train/loss').data[0]
    assert math.isfinite(loss)
    assert 0 <= runner.test()['PCK'] <= 1


@pytest.mark.parametrize('path', [path for path in RECIPES if '_ausam_' in path.stem], ids=name)
def test_ausam_changes_nothing_but_the_wrapper_and_costs_as_much(path: Path) -> None:
    ours = read(path)
    plain = read(
        next(p for p in RECIPES if re.sub(r'_ausam_b16-\d+e', '', path.stem) == re.sub(r'_b16-\d+e', '', p.stem))
    )
    wrapper = ours.optim_wrapper
    epochs = ours.train_cfg.max_epochs
    cost = AUSAMOptimWrapper.theoretical_cost(ours.train_dataloader.batch_size, **wrapper)
    assert epochs * cost.over(epochs) == pytest.approx(plain.train_cfg.max_epochs)
    assert [ours.param_scheduler[1].end, ours.param_scheduler[1].T_max] == [epochs] * 2
    fragment = read(ROOT / 'configs' / '_base_' / 'ausam.py').sharp_optim_wrapper
    assert wrapper == {**plain.optim_wrapper, **fragment}
    own = {'optim_wrapper', 'custom_hooks', 'train_cfg', 'max_epochs', 'param_scheduler'}
    assert {k: v for k, v in ours.items() if k not in own} == {k: v for k, v in plain.items() if k not in own}


def test_the_makefile_uses_these_recipes() -> None:
    assert {ROOT / found for found in re.findall(r'configs/demo/\S+\.py', MAKEFILE)} == {*RECIPES}
    (float_model,) = {read(path).load_from for path in RECIPES if re.search(r'_w\da\d_', path.stem)}
    assert float_model == re.findall(r'^FLOATS := (\S+)', MAKEFILE, flags=re.MULTILINE)[0]
