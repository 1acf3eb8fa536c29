"""The runs of a study, and their configs."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config

from mm_sharp.analysis.study.spec import BASE, Selection, Setting, Study
from mm_sharp.cli.options import check_option_keys
from mm_sharp.config import fragments, preflight
from mm_sharp.config.preflight import wrapper_class
from mm_sharp.errors import UsageError
from mm_sharp.samples.schedule import schedule_name, schedule_of
from mm_sharp.step.method import Cost
from mm_sharp.step.wrapper import TwoPassOptimWrapper

# Rho is chosen on the validation data, the results are of the test data.
_NEEDED = ('train_cfg', 'train_dataloader', 'val_dataloader', 'val_evaluator', 'test_dataloader', 'test_evaluator')

# Names that have changed, as configs had them before: rows that were written then are known again.
_FORMER_NAMES = {
    'mm_sharp.analysis.study.cached': 'mm_sharp.study.remembered',
    'mm_sharp.analysis.study.digits': 'mm_sharp.study.digits',
    'CachedCocoDataset': 'RememberedCocoDataset',
}


class Run(NamedTuple):
    """One training."""

    phase: str  # 'select' to choose rho, on the validation data; 'report' on the test data
    setting: str
    method: str
    rho: float | None  # None for the base optimizer, and where the method's own is used
    epochs: int
    seed: int  # of initial weights, order of the samples and draws

    @property
    def id(self) -> str:
        """Its name in the study, which is also a relative path."""
        rho = '' if self.rho is None else f'_rho{self.rho:g}'
        return f'{self.phase}/{self.setting}/{self.method}{rho}_{self.epochs}e_seed{self.seed}'


class Plan:
    """The runs of a study, and their configs; a UsageError if one cannot be read, or a method does not fit."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.study, self.folder = study, folder
        self._configs = {name: _read(setting) for name, setting in study.settings.items()}
        # Theoretical, of a step in steps of the base optimizer, by setting and method.
        self._costs: dict[tuple[str, str], Cost] = {}
        self.tuned: set[str] = set()  # methods whose rho is to be chosen
        for setting in study.settings.values():
            if setting.corrupt:
                self._check_corrupted(setting)
            for method in study.methods_in(setting.name):
                self._check_method(setting, method)

    def check_data(self) -> None:
        """A UsageError if a data set that runs need is not there; comparing rows needs none."""
        for cfg in self._configs.values():
            preflight.check_data(cfg, 'train', 'val', 'test')

    def waves(self) -> list[list[list[str]]]:
        """Names of settings by pool, which shares the choice of rho: first the pools that start from random weights."""
        waves: tuple[dict[str, list[str]], ...] = ({}, {})
        for name, setting in self.study.settings.items():
            waves[bool(setting.load_from)].setdefault(setting.pool or name, []).append(name)
        return [list(pools.values()) for pools in waves if pools]

    def epochs(self, setting: str, method: str, budget: str) -> int:
        """Epochs of a method: its own, or at equal compute the base optimizer's over the method's cost, rounded.

        At equal time, those in which its time is measured: its own or the base optimizer's.
        """
        most, own = self.study.settings[setting].epochs, self.study.changes(setting, method).get('epochs')
        if own is not None:
            return int(own)
        return max(1, round(self._costs[setting, method].epochs_for(most))) if budget == 'compute' else most

    def compute(self, setting: str, method: str, epochs: int) -> float:
        """What so many epochs of a method cost, in trainings of the base optimizer with the setting's epochs."""
        return epochs * self._costs[setting, method].over(epochs) / self.study.settings[setting].epochs

    def selection_runs(self, setting: str) -> list[Run]:
        """The runs that choose rho in a setting."""
        selection, own = self.study.selection or Selection([], []), self.study.settings[setting]
        return [
            Run('select', setting, method, rho, own.epochs, seed)
            for seed in selection.seeds
            for method in self.study.methods_in(setting)
            if method == BASE or (method in self.tuned and own.selects)
            for rho in (selection.own_rho.get(method, selection.rho) if method in self.tuned else [None])
        ]

    def report_runs(self, setting: str, chosen: dict[str, float | None]) -> list[Run]:
        """The runs that are reported in a setting, given the rho of each method, but for those at equal time."""
        budgets = [budget for budget in self.study.budgets if budget != 'time']
        order = product(self.study.seeds, self.study.methods_in(setting), budgets)
        runs = (Run('report', setting, m, chosen[m], self.epochs(setting, m, how), seed) for seed, m, how in order)
        return list(dict.fromkeys(runs))  # two budgets may share runs

    def config(self, run: Run) -> Config:
        """The whole config of a run."""
        setting = self.study.settings[run.setting]
        cfg = copy.deepcopy(self._configs[run.setting])
        changes = self.study.changes(run.setting, run.method)
        cfg.merge_from_dict(dict(changes.get('options', {})))
        _set_epochs(cfg, run.epochs)
        cfg.optim_wrapper = _wrapper(cfg, changes, run.rho)
        cfg.randomness = {**(cfg.get('randomness') or {}), 'seed': run.seed}
        if setting.corrupt:
            cfg.train_dataloader.dataset.ann_file = str(self.corrupted(setting).resolve())
        if setting.load_from:
            cfg.load_from = str(self.weights(self._source(run, setting)))
        if run.phase == 'select':
            cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
        cfg.work_dir = str(self.folder / 'runs' / run.id)
        cfg.experiment_name = run.id.replace('/', '_')
        return cfg

    def fingerprint(self, run: Run) -> str:
        """A hash of a run's config, which does not depend on the folder of the results."""
        anywhere = copy.copy(self)
        anywhere.folder = Path('/study')
        content = {k: v for k, v in anywhere.config(run).to_dict().items() if k not in ('work_dir', 'experiment_name')}
        _name_schedule(content['optim_wrapper'])
        text = json.dumps(content, sort_keys=True, default=repr)
        for now, before in _FORMER_NAMES.items():
            text = text.replace(now, before)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def source(self, run: Run) -> Run | None:
        """The run whose weights a run starts from; None if it starts from none of the study."""
        setting = self.study.settings[run.setting]
        return self._source(run, setting) if setting.load_from else None

    def start(self, run: Run) -> str:
        """The fingerprint of :meth:`source`; '' if there is none."""
        source = self.source(run)
        return '' if source is None else self.fingerprint(source)

    def weights(self, run: Run) -> Path:
        """The file with a run's weights, if they are kept."""
        return self.folder / 'weights' / f'{run.id}.pth'

    def keeps_weights(self, run: Run) -> bool:
        """Whether other runs start from a run's weights, or the study asks for them."""
        starting = [setting for setting in self.study.settings.values() if setting.load_from == run.setting]
        return self.asks_for_weights(run) or any(run == self._source(run, setting) for setting in starting)

    def asks_for_weights(self, run: Run) -> bool:
        """Whether the study asks for a run's weights."""
        return run.phase == 'report' and run.method in self.study.keep and run.seed == self.study.seeds[0]

    def corrupted(self, setting: Setting) -> Path:
        """The file with a setting's corrupted annotations."""
        return self.folder / 'annotations' / f'{Path(self.annotations(setting)).stem}_{setting.corrupt:g}.json'

    def annotations(self, setting: Setting) -> Path:
        """The file with a setting's annotations before they are corrupted."""
        dataset = self._configs[setting.name].train_dataloader.dataset
        if not dataset.get('ann_file'):
            raise UsageError(f'settings.{setting.name}.corrupt: its training data set has no ann_file to be corrupted')
        return Path(dataset.get('data_root') or '', dataset.ann_file)

    def _source(self, run: Run, setting: Setting) -> Run:
        """The run whose weights a setting's run of the same phase, method and seed starts from."""
        method = run.method if setting.load_own else BASE
        # Of two budgets equal compute: that the weights cost no more than the base optimizer's.
        budget = 'compute' if 'compute' in self.study.budgets else 'epochs'
        return Run(run.phase, setting.load_from, method, None, self.epochs(setting.load_from, method, budget), run.seed)

    def _check_corrupted(self, setting: Setting) -> None:
        """Refuse annotations whose corrupted file would be others' too: its name is the file's and the share."""
        own = self.annotations(setting)
        for name, other in self.study.settings.items():
            if other.corrupt and self.corrupted(other) == self.corrupted(setting) and self.annotations(other) != own:
                both = f"'{own}' and '{self.annotations(other)}' of settings.{name}"
                what = f'{both} would have one corrupted file: give them different names'
                raise UsageError(f'settings.{setting.name}.corrupt: {what}')

    def _check_method(self, setting: Setting, method: str) -> None:
        cfg, changes = copy.deepcopy(self._configs[setting.name]), self.study.changes(setting.name, method)
        _change(cfg, f'methods.{method}.options', changes.get('options', {}))
        cfg.optim_wrapper = _wrapper(cfg, changes, None)
        try:
            preflight.check_training(cfg)
        except UsageError as error:
            raise UsageError(f'methods.{method} in settings.{setting.name}: {error}') from error
        kind = wrapper_class(cfg, 'optim_wrapper', cfg.optim_wrapper)
        cost = Cost(1.0, 1.0)
        if issubclass(kind, TwoPassOptimWrapper):
            cost = kind.theoretical_cost(cfg.train_dataloader.batch_size, **cfg.optim_wrapper)
            if self.study.selection is not None and 'rho' not in self.study.methods[method]:
                self.tuned.add(method)
        self._costs[setting.name, method] = cost


def _wrapper(cfg: Config, changes: Mapping[str, Any], rho: float | None) -> dict[str, Any]:
    changed = {key: value for key, value in changes.items() if key not in ('options', 'epochs')}
    return {**cfg.optim_wrapper, **changed, **({} if rho is None else {'rho': rho})}


def _name_schedule(wrapper: dict[str, Any]) -> None:
    """Write AUSAM's schedule and draw as configs had them when there were no others, and they had no names."""
    if str(wrapper.get('type')).endswith('AUSAMOptimWrapper') and wrapper.get('draw') != 'uniform':
        names = {'schedule': schedule_name(wrapper), 'draw': schedule_of(wrapper).draw}
        for key, former in (('schedule', 'constant'), ('draw', 'systematic')):
            wrapper.pop(key, None)
            if names[key] != former:
                wrapper[key] = names[key]


def _read(setting: Setting) -> Config:
    where = f'settings.{setting.name}'
    try:
        cfg = Config.fromfile(setting.config, format_python_code=False)
        fragments.apply_fragments(cfg)
    except Exception as error:  # a config is the user's code, which may raise anything
        raise UsageError(f'{where}.config: {type(error).__name__}: {" ".join(str(error).split())}') from error
    _change(cfg, f'{where}.options', setting.options)
    for key in _NEEDED:
        if not cfg.get(key):
            raise UsageError(f'{where}.config: {setting.config} has no {key}')
    if not cfg.train_cfg.get('max_epochs'):
        form = f'as studies do: write train_cfg = dict(by_epoch=True, max_epochs={setting.epochs})'
        raise UsageError(f'{where}.config: {setting.config} does not train by epochs, {form}')
    return cfg


def _change(cfg: Config, where: str, options: Mapping[str, Any]) -> None:
    check_option_keys(cfg, options, where)
    try:
        cfg.merge_from_dict(dict(options))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UsageError(f'{where} do not fit the config: {type(error).__name__}: {error}') from error


def _set_epochs(cfg: Config, epochs: int) -> None:
    """Set a run's epochs, and stretch the schedulers that end with the config's."""
    before = cfg.train_cfg.max_epochs
    cfg.train_cfg.max_epochs = epochs
    schedulers = cfg.get('param_scheduler') or []
    schedulers = schedulers if isinstance(schedulers, (list, tuple)) else [schedulers]
    by_epoch = [scheduler for scheduler in schedulers if scheduler.get('by_epoch', True)]
    # A warm-up stays as long as it is, and so what comes after it begins where it began.
    others = {scheduler.get('end') for scheduler in by_epoch} - {before}
    for scheduler in by_epoch:
        if scheduler.get('end', before) == before:
            _stretch(scheduler, before, epochs, others)


def _stretch(scheduler: dict[str, Any], before: int, epochs: int, fixed: Collection[int]) -> None:
    """Stretch a scheduler that ends with a training to other epochs of it; where it begins stays if it is ``fixed``."""
    begin, scale = scheduler.get('begin', 0), epochs / before
    start = min(begin if begin in fixed else round(begin * scale), epochs - 1)
    stretched: dict[str, Any] = {'begin': start, 'end': epochs}
    # As long as the training, or as the scheduler itself.
    lengths = {before: epochs, before - begin: epochs - start}
    stretched['T_max'] = lengths.get(scheduler.get('T_max'), scheduler.get('T_max'))
    stretched['milestones'] = [max(1, round(epoch * scale)) for epoch in scheduler.get('milestones', ())]
    scheduler.update({key: value for key, value in stretched.items() if key in scheduler})
