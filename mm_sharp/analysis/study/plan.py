"""Which runs a study consists of (ours).

A run is a setting, a method, a rho, a number of epochs and a seed. A run that two budgets have in common is made once:
at ``sampling_ratio=0.5``, AUSAM's equal compute is its equal epochs.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mm_sharp.analysis.study.spec import BASE, Setting, Study
from mm_sharp.config import fragments, preflight
from mm_sharp.config.wrapper_checks import wrapper_class
from mm_sharp.errors import UsageError
from mm_sharp.step.wrapper import TwoPassOptimWrapper

# What a config must have; the validation is what rho is chosen by, the test what is reported.
_NEEDED = ('train_cfg', 'train_dataloader', 'val_dataloader', 'val_evaluator', 'test_dataloader', 'test_evaluator')


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        phase: ``'select'``: to choose rho, evaluated on the validation data. ``'report'``: evaluated on the test data.
        setting: Name of the setting.
        method: Name of the method.
        rho: None for the base optimizer, and where the method's own is used.
        epochs: Of the training.
        seed: Of initial weights, order of the samples and draws.
    """

    phase: str
    setting: str
    method: str
    rho: float | None
    epochs: int
    seed: int

    @property
    def recipe(self) -> str:
        """What it has in common with the runs of other seeds, in its setting and phase."""
        rho = '' if self.rho is None else f'_rho{self.rho:g}'
        return f'{self.method}{rho}_{self.epochs}e'

    @property
    def id(self) -> str:
        """A name, which is a relative path, too."""
        return f'{self.phase}/{self.setting}/{self.recipe}_seed{self.seed}'


class Plan:
    """The runs of a study, and their configs.

    Args:
        study: What is compared.
        folder: Where its results go.

    Raises:
        UsageError: A config cannot be read, or a method's arguments do not fit.
    """

    def __init__(self, study: Study, folder: Path) -> None:
        self.study = study
        self.folder = folder
        self._configs = {name: _read(setting) for name, setting in study.settings.items()}
        self._costs: dict[tuple[str, str], float] = {}
        self._has_rho: dict[str, bool] = {}
        for setting in study.settings.values():
            if setting.corrupt:
                self.annotations(setting)
            for method in study.methods:
                self._learn(setting, method)

    def cost(self, setting: str, method: str) -> float:
        """What a step costs by arithmetic, in steps of the base optimizer."""
        return self._costs[setting, method]

    def has_rho(self, method: str) -> bool:
        """Whether rho is to be chosen for a method."""
        return self.study.selection is not None and self._has_rho[method]

    def epochs(self, setting: str, method: str, budget: str) -> int:
        """How many epochs a method gets: at equal compute the base optimizer's over the method's cost, rounded."""
        most = self.study.settings[setting].epochs
        return most if budget == 'epochs' else max(1, round(most / self.cost(setting, method)))

    def selection_runs(self, setting: str) -> list[Run]:
        """The runs that choose rho in a setting."""
        selection = self.study.selection
        if selection is None:
            return []
        epochs = self.study.settings[setting].epochs
        return [
            Run('select', setting, method, rho, epochs, seed)
            for seed in selection.seeds
            for method in self.study.methods
            if method == BASE or (self.has_rho(method) and self.study.settings[setting].selects)
            for rho in (selection.rho if self.has_rho(method) else [None])
        ]

    def report_runs(self, setting: str, chosen: dict[str, float | None]) -> list[Run]:
        """The runs that are reported in a setting, with the rho chosen for each method."""
        runs = [
            Run('report', setting, method, chosen[method], self.epochs(setting, method, budget), seed)
            for seed in self.study.seeds
            for method in self.study.methods
            for budget in self.study.budgets
        ]
        return list(dict.fromkeys(runs))

    def config(self, run: Run) -> Config:
        """The whole config of a run; its files lie in the study's folder."""
        setting = self.study.settings[run.setting]
        cfg = copy.deepcopy(self._configs[run.setting])
        _set_epochs(cfg, run.epochs)
        cfg.optim_wrapper = self._wrapper(cfg, run.method, run.rho)
        cfg.randomness = {**(cfg.get('randomness') or {}), 'seed': run.seed}
        if setting.corrupt:
            cfg.train_dataloader.dataset.ann_file = str(self.corrupted(setting).resolve())
        if setting.load_from:
            source = self.study.settings[setting.load_from]
            cfg.load_from = str(self.weights(Run(run.phase, source.name, BASE, None, source.epochs, run.seed)))
        if run.phase == 'select':
            cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
        cfg.work_dir = str(self.folder / 'runs' / run.id)
        cfg.experiment_name = run.id.replace('/', '_')
        return cfg

    def fingerprint(self, run: Run) -> str:
        """What tells a run's config from another's; where the results go does not count."""
        anywhere = copy.copy(self)
        anywhere.folder = Path('/study')
        content = {k: v for k, v in anywhere.config(run).to_dict().items() if k not in ('work_dir', 'experiment_name')}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()[:12]

    def weights(self, run: Run) -> Path:
        """Where the weights of a run are kept, if they are."""
        return self.folder / 'weights' / f'{run.id}.pth'

    def keeps_weights(self, run: Run) -> bool:
        """Whether a run's weights are kept: other runs start from them, or the study asks for them."""
        needed = run.method == BASE and any(s.load_from == run.setting for s in self.study.settings.values())
        return needed or (run.phase == 'report' and run.method in self.study.keep and run.seed == self.study.seeds[0])

    def corrupted(self, setting: Setting) -> Path:
        """The file with the setting's corrupted annotations."""
        return self.folder / 'annotations' / f'{Path(self.annotations(setting)).stem}_{setting.corrupt:g}.json'

    def annotations(self, setting: Setting) -> Path:
        """The file with the setting's annotations as they are.

        Raises:
            UsageError: The config's training data has no annotation file to spoil.
        """
        dataset = self._configs[setting.name].train_dataloader.dataset
        if not dataset.get('ann_file'):
            raise UsageError(f'settings.{setting.name}.corrupt: its training data set has no ann_file to be corrupted')
        return Path(dataset.get('data_root') or '', dataset.ann_file)

    def _wrapper(self, cfg: Config, method: str, rho: float | None) -> dict[str, Any]:
        own = {} if rho is None else {'rho': rho}
        return {**cfg.optim_wrapper, **self.study.methods[method], **own}

    def _learn(self, setting: Setting, method: str) -> None:
        """Check a method in a setting, and note what it costs and whether it has a rho."""
        cfg = copy.deepcopy(self._configs[setting.name])
        cfg.optim_wrapper = self._wrapper(cfg, method, None)
        try:
            preflight.check_wrappers(cfg)
        except UsageError as error:
            raise UsageError(f'methods.{method} in settings.{setting.name}: {error}') from error
        kind = wrapper_class(cfg, 'optim_wrapper', cfg.optim_wrapper)
        ours = issubclass(kind, TwoPassOptimWrapper)
        self._has_rho[method] = ours and 'rho' not in self.study.methods[method]
        batch_size = cfg.train_dataloader.batch_size
        cost = kind.theoretical_cost(batch_size, **cfg.optim_wrapper).cycle if ours else 1.0
        self._costs[setting.name, method] = cost


def order_by_need(settings: Iterable[Setting]) -> list[list[Setting]]:
    """The settings that start from random weights, and then those that start from the weights of others."""
    both: tuple[list[Setting], list[Setting]] = ([], [])
    for setting in settings:
        both[bool(setting.load_from)].append(setting)
    return [wave for wave in both if wave]


def pools(wave: Iterable[Setting]) -> list[list[str]]:
    """The names of the settings that share a choice of rho, for each choice."""
    found: dict[str, list[str]] = {}
    for setting in wave:
        found.setdefault(setting.pool or setting.name, []).append(setting.name)
    return list(found.values())


def _read(setting: Setting) -> Config:
    where = f'settings.{setting.name}'
    try:
        cfg = Config.fromfile(setting.config, format_python_code=False)
        fragments.apply_fragments(cfg)
    except Exception as error:  # a config is code of the user's: whatever it raises is theirs to put right
        raise UsageError(f'{where}.config: {type(error).__name__}: {" ".join(str(error).split())}') from error
    try:
        cfg.merge_from_dict(dict(setting.options))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UsageError(f'{where}.options do not fit the config: {type(error).__name__}: {error}') from error
    for key in _NEEDED:
        if not cfg.get(key):
            raise UsageError(f'{where}.config: {setting.config} has no {key}')
    if not cfg.train_cfg.get('max_epochs'):
        raise UsageError(
            f'{where}.config: {setting.config} does not train by epochs, as studies do: write '
            f'train_cfg = dict(by_epoch=True, max_epochs={setting.epochs})'
        )
    for split in ('train', 'val', 'test'):
        preflight.check_data(cfg, split)
    return cfg


def _set_epochs(cfg: Config, epochs: int) -> None:
    """Train for so many epochs, and stretch the schedules that ended with the config's own."""
    before = cfg.train_cfg.max_epochs
    cfg.train_cfg.max_epochs = epochs
    schedulers = cfg.get('param_scheduler') or []
    for scheduler in schedulers if isinstance(schedulers, (list, tuple)) else [schedulers]:
        for key in ('end', 'T_max'):
            if scheduler.get('by_epoch', True) and scheduler.get(key) == before:
                scheduler[key] = epochs
