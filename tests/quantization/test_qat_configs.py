"""Configs of quantized models: each says what its name says, quantizes the right layers, trains, and is on its card."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import mmengine
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch.nn.modules.batchnorm import _BatchNorm

from mm_sharp.config.preflight import check_wrappers
from mm_sharp.quantization import CalibrationHook, FreezeHook, LayerPolicy, QuantizationPolicy, is_calibrated
from tests.conftest import ROOT
from tests.mmpose_cases import without_pretrained
from tests.narrow import narrow
from tests.recipe_runs import QUIET, STEPS, Steps, cost, inherited, method, name, read, two_steps

FOLDER = ROOT / 'configs' / 'qat'
DEMO = ROOT / 'configs' / 'demo'
CARD = (FOLDER / 'README.md').read_text()
QUANTIZED = re.compile(r'_(w\da\d)_')
FLOAT = FOLDER / 'simcc_res50_float_wo-deconv-8xb64-210e_mpii-256x256.py'
RECIPES = sorted(path for path in FOLDER.glob('*.py') if path != FLOAT)
DEMOS = sorted(path for path in DEMO.glob('*half*.py') if QUANTIZED.search(path.stem))
CONFIGS = [*RECIPES, *DEMOS]
METHODS = ('', 'sam', 'ausam')
BITS = ('w8a8', 'w4a4')
MODELS_HERE = {
    'simcc_res50_mpii': ('simcc_res50_{}_wo-deconv-8xb64-20e_mpii-256x256', 'work_dirs/simcc_res50_float_'),
    'simcc_res50_coco': ('simcc_res50_{}_8xb64-20e_coco-256x192', 'https://'),
    'td-hm_res50_coco': ('td-hm_res50_{}_8xb64-20e_coco-256x192', 'https://'),
    'rtmpose-s_coco': ('rtmpose-s_{}_8xb256-20e_coco-256x192', 'https://'),
}
# A model and bits for each, and each method several times; the others differ from them in the wrapper alone.
TRAINED = {
    'simcc_res50_mpii': ('w8a8_sam', 'w4a4_ausam'),
    'simcc_res50_coco': ('w8a8_ausam', 'w4a4_sam'),
    'td-hm_res50_coco': ('w8a8', 'w4a4_ausam'),
    'rtmpose-s_coco': ('w8a8_ausam', 'w4a4_sam'),
}
FRAGMENTS = {'sharp_optim_wrapper', 'sharp_hook', 'sharp_quantization', 'custom_imports'}
# What differs from MMPose's recipe besides: the fine-tuning.
SCHEDULE = {
    'train_cfg',
    'param_scheduler',
    'optim_wrapper',
    'default_hooks',
    'custom_hooks',
    'load_from',
    'load_hint',
    'model',
}
SCHEDULE |= {'qat_epochs', 'qat_train_cfg', 'qat_checkpoint', 'qat_param_scheduler', 'qat_freeze_hook'}
OF_RTMPOSE = {'base_lr', 'max_epochs', 'stage2_num_epochs'}

pytestmark = QUIET


def recipe(model: str, variant: str) -> Path:
    """A recipe's file; ``variant`` is the bits, or the bits and the method."""
    return FOLDER / f'{MODELS_HERE[model][0].format(variant)}.py'


def bits(path: Path) -> str:
    (found,) = QUANTIZED.findall(path.stem)
    return str(found)


def build(cfg: Config) -> torch.nn.Module:
    with DefaultScope.overwrite_default_scope('mmpose'):
        return MODELS.build(cfg.model)  # type: ignore[no-any-return]


PAIRS = [recipe(model, variant) for model, variants in TRAINED.items() for variant in variants]


# ---------------------------------------------------------------- every config
def test_there_is_one_for_each_model_bits_and_method() -> None:
    names = {recipe(model, f'{b}_{m}'.strip('_')) for model in MODELS_HERE for b in BITS for m in METHODS}
    assert set(RECIPES) == names
    assert len(RECIPES) == 24
    assert [path.stem.removeprefix('simcc_res18-half_') for path in DEMOS] == sorted(
        f'{b}_{m}_demo-128x96'.replace('__', '_') for b in BITS for m in METHODS
    )


@pytest.mark.parametrize('path', CONFIGS, ids=name)
def test_it_is_what_its_name_says(path: Path) -> None:
    cfg = read(path)
    (wrapper,) = re.findall(r'_w\da\d_(sam|ausam)_', path.stem) or ['']
    assert cfg.optim_wrapper.get('type', 'OptimWrapper') == f'{wrapper.upper()}OptimWrapper'
    assert ('SharpnessHook' in [hook.type for hook in cfg.custom_hooks]) == bool(wrapper)
    assert cfg.model.type == 'QuantizedModel'
    assert f'w{cfg.model.policy.weight_bit_width}a{cfg.model.policy.act_bit_width}' == bits(path)
    assert [hook.type for hook in cfg.custom_hooks].count('CalibrationHook') == 1
    check_wrappers(cfg)


@pytest.mark.parametrize('path', [path for path in CONFIGS if '_sam_' in path.stem or '_ausam_' in path.stem], ids=name)
def test_the_methods_differ_in_nothing_but_the_wrapper(path: Path) -> None:
    ours = read(path).to_dict()
    plain = read(path.with_name(re.sub(r'_(sam|ausam)_', '_', path.name))).to_dict()
    assert ours['custom_hooks'][:-2] == plain['custom_hooks'][:-1]
    assert ours['custom_hooks'][-1] == plain['custom_hooks'][-1]
    wrapper = {**plain['optim_wrapper'], **ours['sharp_optim_wrapper']}
    if path.parent == DEMO:  # as the figures in the docs were made
        wrapper.update(rho=0.05, adaptive=False, perturb='auto')
        if '_ausam_' in path.stem:
            wrapper.update(sampling_ratio=0.6, schedule='constant')
    else:  # a quarter of the fragments': the BatchNorms are folded
        wrapper.update(rho=0.005)
    assert ours['optim_wrapper'] == wrapper
    own = {'custom_hooks', 'optim_wrapper', 'custom_imports', 'sharp_optim_wrapper', 'sharp_hook'}
    if path.parent == DEMO:  # equal compute
        own |= {'max_epochs', 'train_cfg', 'param_scheduler'}
    assert {k: v for k, v in ours.items() if k not in own} == {k: v for k, v in plain.items() if k not in own}


@pytest.mark.parametrize('path', DEMOS, ids=name)
def test_the_demos_take_equal_compute(path: Path) -> None:
    """As near to four epochs of the base optimizer as whole epochs come; the schedule ends with the last."""
    cfg = read(path)
    epochs, factor = cfg.train_cfg.max_epochs, cost(cfg.optim_wrapper, cfg.train_dataloader.batch_size)
    assert abs(epochs * factor - 4) <= factor / 2
    assert [cfg.param_scheduler[1].end, cfg.param_scheduler[1].T_max, cfg.train_cfg.val_interval] == [epochs] * 3


# ---------------------------------------------------------------- fine-tuning
@pytest.mark.parametrize('model', MODELS_HERE)
def test_fine_tuning_changes_the_schedule_alone(model: str, tmp_path: Path) -> None:
    base = FOLDER / '_base_' / f'{model}.py'
    (tmp_path / 'theirs.py').write_text(f"_base_ = '{inherited(base)}'")
    ours, theirs = read(recipe(model, 'w4a4')).to_dict(), Config.fromfile(tmp_path / 'theirs.py').to_dict()
    own = FRAGMENTS | SCHEDULE | (OF_RTMPOSE if 'rtmpose' in model else set())
    assert {k: v for k, v in ours.items() if k not in own} == {k: v for k, v in theirs.items() if k not in own}
    assert set(ours) - set(theirs) <= FRAGMENTS | SCHEDULE

    rate = theirs['optim_wrapper']['optimizer'].pop('lr')
    assert ours['optim_wrapper']['optimizer'].pop('lr') == pytest.approx(rate / 10)
    assert ours['optim_wrapper'] == theirs['optim_wrapper']
    network = theirs['model']
    assert ours['model'].pop('policy')['fold_batchnorm']
    assert [ours['model'].pop('type'), ours['model'].pop('model')] == ['QuantizedModel', network.pop('type')]
    assert ours['model']['backbone'].pop('init_cfg') is None, 'a second download, which load_from would overwrite'
    network['backbone'].pop('init_cfg')
    assert ours['model'] == network


@pytest.mark.parametrize('model', MODELS_HERE)
def test_the_schedule_fits_in_its_epochs(model: str) -> None:
    cfg = read(recipe(model, 'w8a8_ausam'))
    epochs = cfg.train_cfg.max_epochs
    assert f'-{epochs}e_' in recipe(model, 'w8a8_ausam').stem
    warm_up, decay = cfg.param_scheduler
    assert all(part.by_epoch and part.convert_to_iter_based for part in cfg.param_scheduler)
    assert [warm_up.begin, warm_up.end, decay.end, decay.T_max] == [0, decay.begin, epochs, epochs - decay.begin]
    assert epochs % cfg.train_cfg.val_interval == epochs % cfg.default_hooks.checkpoint.interval == 0
    hooks = {hook.type: hook for hook in cfg.custom_hooks}
    assert 0 < hooks['FreezeHook'].quantizer_scales < epochs
    assert cfg.load_from.startswith(MODELS_HERE[model][1])
    if 'rtmpose' in model:
        assert 0 < hooks['mmdet.PipelineSwitchHook'].switch_epoch < epochs
        assert hooks['EMAHook'].momentum * epochs == pytest.approx(0.0002 * 420)
        assert (cfg.base_lr, cfg.max_epochs) == (cfg.optim_wrapper.optimizer.lr, epochs)


@pytest.mark.parametrize('model', [model for model, (_, start) in MODELS_HERE.items() if start == 'https://'])
def test_the_float_weights_are_those_that_mmpose_publishes(model: str) -> None:
    import mmpose

    theirs = inherited(FOLDER / '_base_' / f'{model}.py').removeprefix('mmpose::')
    folder = (Path(mmpose.__file__).parent / '.mim' / 'configs' / theirs).parent
    listed = [entry for file in folder.glob('*.yml') for entry in mmengine.load(file)['Models']]
    (entry,) = [entry for entry in listed if entry['Config'] == f'configs/{theirs}']
    assert read(recipe(model, 'w4a4')).load_from == entry['Weights']
    text = (FOLDER / '_base_' / f'{model}.py').read_text()
    assert f'AP {entry["Results"][0]["Metrics"]["AP"]}' in text


def test_the_float_model_on_mpii_is_mmposes_recipe(tmp_path: Path) -> None:
    (tmp_path / 'theirs.py').write_text(f"_base_ = '{inherited(FLOAT)}'")
    assert Config.fromfile(FLOAT).to_dict() == Config.fromfile(tmp_path / 'theirs.py').to_dict()
    assert inherited(FLOAT) == inherited(FOLDER / '_base_' / 'simcc_res50_mpii.py')
    folder, checkpoint = Path(read(recipe('simcc_res50_mpii', 'w8a8')).load_from).parts[-2:]
    assert folder == FLOAT.stem
    assert checkpoint == f'epoch_{Config.fromfile(FLOAT).train_cfg.max_epochs}.pth'


# ---------------------------------------------------------------- building and training
@pytest.mark.parametrize(
    'model', [pytest.param(model, marks=() if 'rtmpose' in model else pytest.mark.slow) for model in MODELS_HERE]
)
def test_every_layer_is_quantized_and_the_card_gives_the_size(model: str) -> None:
    record = build(read(recipe(model, 'w4a4'))).quantization
    assert not [layer.name for layer in record.layers if layer.policy is None]
    found = [(layer.policy.weight_bit_width, layer.policy.act_bit_width) for layer in record.layers]
    # The image and what the decoder reads: SimCC has a last layer for each axis.
    assert found.count((8, 8)) == (2 if 'td-hm' in model else 3)
    assert set(found) == {(4, 4), (8, 8)}

    ((_, *sizes),) = [row for row in _rows(_section('Size')) if f'`{model}`' in row[0]]
    eight = [replace(layer, policy=replace(layer.policy, weight_bit_width=8)) for layer in record.layers]
    counted = [record.float_bytes, replace(record, layers=eight).bytes(), record.bytes()]
    assert [size.split(' ')[0] for size in sizes] == [f'{count / 1e6:.1f}' for count in counted]
    factors = [re.findall(r'\(([\d.]+)', size) for size in sizes]
    assert factors == [[], *([f'{counted[0] / count:.1f}'] for count in counted[1:])]


def shrink(cfg: Config) -> None:
    """A narrow network, one batch to calibrate with, and, but for the demo's, scales from maxima: without a search."""
    narrow(cfg.model)
    if 'demo' not in Path(cfg.filename).stem:
        cfg.model.policy.scale_init = 'max'
    cfg.randomness = {'seed': 0}
    for hook in cfg.custom_hooks:
        if hook.type == 'CalibrationHook':
            hook.update(num_batches=1, baseline=False)


@pytest.mark.parametrize('path', [*PAIRS, *DEMOS[:2]], ids=name)
def test_written_and_read_again_it_is_the_same(path: Path, tmp_path: Path) -> None:
    cfg = read(path)
    cfg.dump(tmp_path / 'copy.py')
    assert Config.fromfile(tmp_path / 'copy.py').to_dict() == cfg.to_dict()


def test_formatted_it_is_the_same(tmp_path: Path, neat_configs: None) -> None:
    test_written_and_read_again_it_is_the_same(PAIRS[1], tmp_path)


def float_checkpoint(cfg: Config, file: Path) -> Path:
    """What the recipe would load: random weights, with BatchNorm statistics that fit them."""
    config = {key: value for key, value in cfg.model.items() if key not in ('model', 'policy')}
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpose'):
        model = MODELS.build({**config, 'type': cfg.model.model})
    model.init_weights()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    width, height = cfg.codec.input_size
    model.train()(torch.randn(2, 3, height, width), None, mode='tensor')
    torch.save({'state_dict': model.state_dict()}, file)
    return file


# Those of 8 bits are built and looked at in the tests above; here they would take the same steps.
@pytest.mark.slow
@pytest.mark.parametrize(
    'path',
    [
        *(pytest.param(path, marks=pytest.mark.slow) for path in PAIRS if 'w4a4' in path.stem),
        DEMOS[0],
    ],
    ids=name,
)
def test_two_training_steps(path: Path, tmp_path: Path) -> None:
    cfg = read(path)
    shrink(cfg)
    runner = two_steps(cfg, tmp_path, float_checkpoint(cfg, tmp_path / 'float.pth'))
    model = runner.model
    steps = Steps()
    runner.register_hook(steps)
    runner.train()

    assert is_calibrated(model)
    widths = [(layer.policy.weight_bit_width, layer.policy.act_bit_width) for layer in model.quantization.quantized]
    weight, act = (int(width) for width in bits(path)[1::2])
    assert (weight, act) in widths
    assert set(widths) <= {(weight, act), (8, 8)}
    assert len(steps.losses) == 2
    assert all(math.isfinite(loss) for loss in steps.losses)
    _, batch_size, passes = STEPS[method(cfg)]
    assert steps.batches == [batch_size] * 2
    assert steps.passes == passes
    assert not steps.left_out(model)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    logged = {key.rpartition('/')[2] for key in runner.message_hub.log_scalars}
    assert ('sharpness' in logged) == ('SAM' in method(cfg))


# ---------------------------------------------------------------- the card
def _section(title: str) -> str:
    return CARD.split(f'\n## {title}\n')[1].split('\n## ')[0]


def _rows(text: str) -> list[list[str]]:
    """The rows of the tables in a text, without heads."""
    lines = [line for line in text.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if not re.match(r'\| ?-|\|-', line)]


def _stated(title: str) -> dict[str, str]:
    """Argument to default, as a section's tables give them."""
    return {row[0].strip('`'): row[1].strip('`') for row in _rows(_section(title)) if row[0].startswith('`')}


def test_the_card_lists_every_config() -> None:
    links = re.findall(r'\]\(([\w.-]+\.py)\)', CARD)
    assert {path.name for path in [*RECIPES, FLOAT]} <= set(links)
    assert all((FOLDER / link).is_file() for link in links)


def test_the_metafile_lists_every_config() -> None:
    listed = mmengine.load(FOLDER / 'metafile.yml')
    (collection,) = listed['Collections']
    assert collection['Name'] == 'QAT'
    assert (ROOT / collection['README']).is_file()
    assert (ROOT / collection['Code']).is_file()
    assert collection['Paper']['URL'] in CARD
    assert {model['In Collection'] for model in listed['Models']} == {'QAT'}
    found = {model['Config']: (model['Name'], model['Metadata']['Training Data']) for model in listed['Models']}
    assert found == {
        f'configs/qat/{path.name}': (path.stem, 'MPII' if 'mpii' in path.stem else 'COCO') for path in RECIPES
    }


def test_the_cards_tables_give_every_argument_and_its_default() -> None:
    layer = {field.name: field.default for field in fields(LayerPolicy)}
    model: dict[str, Any] = {
        field.name: () if field.default is MISSING else field.default for field in fields(QuantizationPolicy)
    }
    del model['default']
    model['layers'] = model.pop('overrides')
    assert _stated('The policy') == {key: _written(value) for key, value in {**layer, **model}.items()}
    for title, kind in (('Calibration', CalibrationHook), ('Freezing', FreezeHook)):
        arguments = inspect.signature(kind).parameters
        assert _stated(title) == {key: _written(argument.default) for key, argument in arguments.items()}


def _written(value: Any) -> str:
    return '[]' if value == () else repr(value)


def test_the_cards_examples_are_complete(tmp_path: Path) -> None:
    blocks = re.findall(r'```python\n(.*?)```', CARD, flags=re.DOTALL)
    assert len(blocks) == 5
    for number, block in enumerate(blocks):
        file = tmp_path / f'example{number}.py'
        file.write_text(block)
        cfg = Config.fromfile(file)
        assert cfg.load_from == 'float.pth'
        check_wrappers(cfg)
        if 'skip=' not in block:
            QuantizationPolicy.from_config(cfg.model.policy)
            continue
        without_pretrained(cfg._cfg_dict)
        layers = {layer.name: layer.policy for layer in build(cfg).quantization.layers}
        head = {name: policy for name, policy in layers.items() if name.startswith('head.')}
        assert [name for name, policy in head.items() if policy is None] == ['head.gau.o', 'head.gau.uv']
        assert {policy.weight_bit_width for policy in head.values() if policy} == {8}
        assert [policy.weight_bit_width for policy in layers.values() if policy].count(4) == len(layers) - len(head) - 1
