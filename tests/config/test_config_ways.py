"""The ways of our wrappers into a user's config, and what the cards and lists of configs say."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import mmengine
import pytest
from mmengine.config import Config
from mmengine.registry import OPTIM_WRAPPERS, DefaultScope
from mmengine.runner import Runner

import mm_sharp
from mm_sharp.config.preflight import check_data, check_wrappers
from mm_sharp.errors import UsageError
from mm_sharp.samples.dataset_keys import DatasetKeys
from mm_sharp.samples.draw import BatchDrawer
from mm_sharp.samples.history import SampleHistory
from mm_sharp.samples.schedule import Schedule
from tests.conftest import ROOT
from tests.tiny_data import draw_coco

FOLDER = ROOT / 'configs'
# By folder, the method's name.
METHODS = {
    'sam': 'SAM',
    'esam': 'ESAM',
    'ausam': 'AUSAM',
    'looksam': 'LookSAM',
    'friendlysam': 'FriendlySAM',
    'gsam': 'GSAM',
    'msam': 'MSAM',
    'wsam': 'WSAM',
}
RECIPE = 'mmpose::body_2d_keypoint/simcc/coco/simcc_res50_8xb64-210e_coco-256x192.py'
VITPOSE = 'mmpose::body_2d_keypoint/topdown_heatmap/coco/td-hm_ViTPose-small_8xb64-210e_coco-256x192.py'
# Class, and what differs from its defaults, by fragment.
# rho by each tensor of the weights, see docs/scale.md; the wrappers' defaults are the papers'.
SCALE = {'rho': 0.02, 'adaptive': 'tensor', 'perturb': 'weights'}
FRAGMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    'sam': ('SAMOptimWrapper', SCALE),
    'asam': ('SAMOptimWrapper', {'rho': 0.5, 'adaptive': True}),
    'sam_interval': ('SAMOptimWrapper', {**SCALE, 'interval': 5}),
    'esam': ('ESAMOptimWrapper', {}),
    'esam_history': ('ESAMOptimWrapper', {'selection': 'history'}),
    'ausam': ('AUSAMOptimWrapper', SCALE),
    'looksam': ('LookSAMOptimWrapper', {}),
    'friendlysam': ('FriendlySAMOptimWrapper', {}),
    'gsam': ('GSAMOptimWrapper', {}),
    'msam': ('MSAMOptimWrapper', {}),
    'wsam': ('WSAMOptimWrapper', {}),
}


def user_config(folder: Path, *lines: str) -> Config:
    file = folder / 'user.py'
    file.write_text('\n'.join(lines))
    return Config.fromfile(file)


def defaults(wrapper: str) -> dict[str, Any]:
    """Arguments of a wrapper and their defaults, those of its base classes included."""
    found: dict[str, Any] = {}
    for cls in OPTIM_WRAPPERS.get(wrapper).__mro__[:-1]:
        for argument in inspect.signature(cls).parameters.values():
            found.setdefault(argument.name, argument.default)
    return found


# ---------------------------------------------------------------- fragments
def test_every_fragment_is_tested() -> None:
    assert {path.stem for path in (FOLDER / '_base_').glob('*.py')} == set(FRAGMENTS)


@pytest.mark.parametrize('fragment', FRAGMENTS)
def test_a_fragment_beside_a_recipe(tmp_path: Path, fragment: str) -> None:
    cfg = user_config(
        tmp_path,
        f"_base_ = ['{RECIPE}', 'mm_sharp::_base_/{fragment}.py']",
        'optim_wrapper = _base_.sharp_optim_wrapper',
        'custom_hooks = [*_base_.custom_hooks, _base_.sharp_hook]',
    )
    assert cfg.optim_wrapper.type == FRAGMENTS[fragment][0]
    assert cfg.optim_wrapper.optimizer.type == 'Adam'  # the recipe's
    assert [hook.type for hook in cfg.custom_hooks] == ['SyncBuffersHook', 'SharpnessHook']
    check_wrappers(cfg)


@pytest.mark.parametrize('fragment', FRAGMENTS)
def test_a_fragment_has_the_wrappers_defaults(fragment: str) -> None:
    """All but its scale of rho and what makes it another method."""
    kind, other = FRAGMENTS[fragment]
    settings = Config.fromfile(FOLDER / '_base_' / f'{fragment}.py').sharp_optim_wrapper.to_dict()
    assert settings.pop('type') == kind
    assert settings == {**{key: defaults(kind)[key] for key in settings}, **other}


def test_a_fragment_beside_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    cfg = user_config(
        tmp_path,
        "_base_ = ['mmpose::_base_/default_runtime.py', 'mm_sharp::_base_/sam.py']",
        "optim_wrapper = dict(_base_.sharp_optim_wrapper, rho=0.1, optimizer=dict(type='SGD', lr=0.1))",
    )
    wrapper = cfg.optim_wrapper
    assert (wrapper.type, wrapper.rho, wrapper.optimizer.type) == ('SAMOptimWrapper', 0.1, 'SGD')
    check_wrappers(cfg)


@pytest.mark.parametrize('fragment', FRAGMENTS)
def test_a_fragment_needs_no_line(tmp_path: Path, fragment: str) -> None:
    cfg = user_config(tmp_path, f"_base_ = ['{RECIPE}', 'mm_sharp::_base_/{fragment}.py']")
    assert cfg.optim_wrapper.type == FRAGMENTS[fragment][0]
    check_wrappers(cfg)


@pytest.mark.parametrize(
    ('fragment', 'changed', 'names'),
    [
        ('esam', 'beta=0', 'beta=0 .*0.6'),
        ('esam', "selection='best'", "selection='best' .*exact.*history"),
        ('ausam', 'sampling_ratio=1.5', 'sampling_ratio=1.5 .*0.5'),
        ('ausam', 's_min=2.0', 's_max=1.0 .*'),
        ('ausam', 'gamma=0.5', 'gamma'),
    ],
)
def test_a_wrong_value_is_named_before_anything_is_built(
    tmp_path: Path, fragment: str, changed: str, names: str
) -> None:
    cfg = user_config(
        tmp_path,
        f"_base_ = ['{RECIPE}', 'mm_sharp::_base_/{fragment}.py']",
        f'optim_wrapper = dict(_base_.sharp_optim_wrapper, {changed})',
    )
    with pytest.raises(UsageError, match=f'optim_wrapper: .*{names}'):
        check_wrappers(cfg)


# ---------------------------------------------------------------- one line
@pytest.mark.parametrize('wrapper', ['SAMOptimWrapper', 'ESAMOptimWrapper', 'AUSAMOptimWrapper'])
def test_one_line_in_a_recipe(tmp_path: Path, wrapper: str) -> None:
    cfg = user_config(
        tmp_path,
        f"_base_ = ['{RECIPE}']",
        "custom_imports = dict(imports=['mm_sharp'])",
        f"optim_wrapper = dict(type='{wrapper}', rho=0.05)",
    )
    assert cfg.optim_wrapper.optimizer.type == 'Adam'
    check_wrappers(cfg)


def test_one_line_in_a_recipe_with_imports_of_its_own(tmp_path: Path) -> None:
    """ViTPose imports its layer decay by `custom_imports`: that list is continued, and the decay stays."""
    cfg = user_config(
        tmp_path,
        f"_base_ = ['{VITPOSE}']",
        "custom_imports = dict(imports=[*_base_.custom_imports.imports, 'mm_sharp'])",
        "optim_wrapper = dict(type='SAMOptimWrapper', rho=0.05)",
    )
    assert len(cfg.custom_imports.imports) == 2
    assert cfg.optim_wrapper.constructor == 'LayerDecayOptimWrapperConstructor'
    assert cfg.optim_wrapper.clip_grad.max_norm == 1.0
    check_wrappers(cfg)


# ---------------------------------------------------------------- drawing in the loader
LOADER = "train_dataloader = dict(drop_last=False, batch_sampler=dict(type='AUSAMSampler'))"
LOADER_WITH_DROP_LAST = LOADER.replace("'AUSAMSampler'", "'AUSAMSampler', drop_last=True")


@pytest.mark.parametrize(
    ('line', 'batches'),
    [
        ('', [3, 3]),  # of eight; the recipe drops the last two
        (LOADER_WITH_DROP_LAST, [2, 2]),
        (LOADER, [2, 2, 2]),
    ],
)
def test_drop_last_moves_into_the_batch_sampler(tmp_path: Path, line: str, batches: list[int]) -> None:
    assert LOADER_WITH_DROP_LAST in (ROOT / 'docs' / 'ausam.md').read_text()
    draw_coco(tmp_path / 'data')
    cfg = user_config(tmp_path, f"_base_ = '{FOLDER}/demo/simcc_res18-half_ausam_demo-128x96.py'", line)
    loader = cfg.train_dataloader
    loader.dataset.data_root = str(tmp_path / 'data')
    loader.update(batch_size=3, num_workers=0, persistent_workers=False)
    with DefaultScope.overwrite_default_scope('mmpose'):
        built = Runner.build_dataloader(loader)
    sampler = built.batch_sampler
    if line:
        drawer = BatchDrawer(SampleHistory(), Schedule(0.6, 0.3, 1.0))
        sampler.attach(drawer, DatasetKeys(built.dataset), seed=0, rank=0)
    assert [len(batch) for batch in sampler] == batches
    assert len(built) == len(batches)


def test_drop_last_beside_a_batch_sampler_is_torchs_error(tmp_path: Path) -> None:
    """Not passed over in silence."""
    draw_coco(tmp_path / 'data')
    cfg = user_config(
        tmp_path,
        f"_base_ = '{FOLDER}/demo/simcc_res18-half_ausam_demo-128x96.py'",
        "train_dataloader = dict(batch_sampler=dict(type='AUSAMSampler'))",
    )
    loader = cfg.train_dataloader
    loader.dataset.data_root = str(tmp_path / 'data')
    with DefaultScope.overwrite_default_scope('mmpose'), pytest.raises(ValueError, match='drop_last'):
        Runner.build_dataloader(loader)


# ---------------------------------------------------------------- cards and lists
@pytest.mark.parametrize('folder', METHODS)
def test_card_and_metafile_list_every_config(folder: str) -> None:
    files = sorted(path.name for path in (FOLDER / folder).glob('*.py'))
    listed = mmengine.load(FOLDER / folder / 'metafile.yml')
    (collection,) = listed['Collections']
    models = listed['Models']
    assert sorted(model['Config'] for model in models) == [f'configs/{folder}/{file}' for file in files]
    assert sorted(model['Name'] for model in models) == [file.removesuffix('.py') for file in files]
    assert {model['In Collection'] for model in models} == {collection['Name']} == {METHODS[folder]}
    assert (ROOT / collection['README']).is_file()
    assert (ROOT / collection['Code']).is_file()

    card = (FOLDER / folder / 'README.md').read_text()
    assert sorted(re.findall(r'^\| \[[\w-]+\]\((\S+\.py)\)', card, flags=re.MULTILINE)) == files
    assert collection['Paper']['URL'] in card


def test_the_index_lists_every_metafile() -> None:
    listed = mmengine.load(ROOT / 'model-index.yml')['Import']
    assert {f'configs/{folder}/metafile.yml' for folder in METHODS} <= set(listed)
    assert sorted(listed) == sorted(str(path.relative_to(ROOT)) for path in FOLDER.rglob('metafile.yml'))


@pytest.mark.parametrize('folder', METHODS)
def test_a_cards_table_gives_the_defaults(folder: str) -> None:
    card = (FOLDER / folder / 'README.md').read_text().split('## Hyperparameters')[1].split('\n## ')[0]
    rows = re.findall(r'^\| (`.+?) \| (.+?) \|', card, flags=re.MULTILINE)
    stated = {}
    for arguments, values in rows:
        stated.update(zip(re.findall(r'`(\w+)`', arguments), values.split(', '), strict=True))
    expected = defaults(f'{METHODS[folder]}OptimWrapper')
    assert len(stated) >= 5
    assert {argument: ast.literal_eval(value.strip('`')) for argument, value in stated.items()} == {
        argument: expected[argument] for argument in stated
    }
    own = inspect.signature(OPTIM_WRAPPERS.get(f'{METHODS[folder]}OptimWrapper')).parameters
    elsewhere = re.findall(r'`(\w+)`', card)
    assert set(own) - {'optimizer', 'kwargs', 'accumulative_counts', 'clip_grad'} <= set(elsewhere)


def test_a_method_of_the_users_own_needs_an_optimizer() -> None:
    class OwnOptimWrapper(mm_sharp.SAMOptimWrapper):
        """Its constructor is left alone: it may want a real optimizer."""

        def __init__(self, optimizer: Any) -> None:
            raise ValueError('no')

    check_wrappers(Config({'optim_wrapper': {'type': OwnOptimWrapper, 'optimizer': {'type': 'SGD', 'lr': 0.1}}}))
    with pytest.raises(UsageError, match=r'optim_wrapper\.optimizer=None is no dict with a type'):
        check_wrappers(Config({'optim_wrapper': {'type': OwnOptimWrapper}}))


def test_data_sets_with_one_folder_of_pictures(tmp_path: Path) -> None:
    """As MMPretrain's take it."""
    own = {'type': 'ImageNet', 'data_root': str(tmp_path), 'ann_file': 'meta.txt', 'data_prefix': 'train'}
    cfg = Config({'train_dataloader': {'dataset': own}, 'train_evaluator': [{'type': 'Accuracy'}]})
    (tmp_path / 'meta.txt').touch()
    with pytest.raises(
        UsageError, match=rf"no data: '{tmp_path}/train' \(train_dataloader\.dataset\.data_prefix\); put"
    ):
        check_data(cfg, 'train')
    (tmp_path / 'train').mkdir()
    check_data(cfg, 'train')


@pytest.mark.parametrize('wrong', [3, 'x', ['x'], {'a': 1}])
@pytest.mark.parametrize('place', ['ann_file', 'data_prefix', 'evaluator', 'loader'])
def test_what_is_no_data_is_left_to_mmengine(place: str, wrong: Any, tmp_path: Path) -> None:
    dataset = {'data_root': str(tmp_path), 'ann_file': '', 'data_prefix': {'img': ''}}
    cfg = {'train_dataloader': {'dataset': dataset}, 'train_evaluator': []}
    if place in dataset:
        dataset.update({'ann_file': '.', place: wrong})
    else:
        cfg['train_dataloader' if place == 'loader' else 'train_evaluator'] = wrong
    (tmp_path / 'x').touch()
    check_data(Config(cfg), 'train')
