"""What a study compares, read from its YAML file (ours).

::

    name: digits
    metric: {name: digits/accuracy, better: higher}
    seeds: [0, 1, 2, 3, 4]                      # of the runs that are reported
    selection: {seeds: [100], rho: [0.02, 0.05, 0.1]}   # rho is chosen by other runs, on the validation data
    budgets: [epochs, compute]
    control: uniform
    methods:
      base: {}                                  # the config's own optim_wrapper
      sam: {type: SAMOptimWrapper}              # merged into it
      uniform: {type: AUSAMOptimWrapper, sampling_ratio: 0.5, s_min: 1.0, s_max: 1.0}
    settings:
      clean: {config: configs/study/digits_cnn.py, epochs: 30}
      flipped: {config: configs/study/digits_cnn.py, epochs: 30, options: {train_dataloader.dataset.flipped: 0.2}}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from mm_sharp.errors import UsageError, did_you_mean

BASE = 'base'
BUDGETS = ('epochs', 'compute')
_FORMS = {
    'methods': 'changes of optim_wrapper, as {type: SAMOptimWrapper}',
    'settings': 'a mapping, as {config: my_config.py, epochs: 20}',
}


@dataclass(frozen=True)
class Metric:
    """The figure that methods are compared by.

    Args:
        name: Its key among the evaluators' results.
        better: ``'higher'`` or ``'lower'``.
        scale: It is multiplied by this in tables: 100 for percent.
    """

    name: str
    better: str = 'higher'
    scale: float = 1.0


@dataclass(frozen=True)
class Selection:
    """How rho is chosen: by the mean of the metric on the validation data, over runs that are not reported.

    Args:
        seeds: Of these runs.
        rho: What is tried, for each method that has a rho.
    """

    seeds: list[int]
    rho: list[float]


@dataclass(frozen=True)
class Setting:
    """A model, its data and its schedule.

    Args:
        name: Of the setting.
        config: File of its training config.
        epochs: Of the base optimizer, and of every method at equal epochs.
        options: Changes of the config by dotted keys, as ``--cfg-options`` takes them.
        pool: Settings of one pool share the choice of rho, by their mean; by default each has its own.
        selects: Whether it takes part in its pool's choice; one that does not trains its base optimizer alone in it.
        corrupt: Share of the training people whose annotated keypoints are corrupted
        (:mod:`mm_sharp.analysis.study.corruption`).
        load_from: Another setting, whose base optimizer's weights of the same seed these runs start from.
    """

    name: str
    config: str
    epochs: int
    options: Mapping[str, Any] = field(default_factory=dict)
    pool: str = ''
    selects: bool = True
    corrupt: float = 0.0
    load_from: str = ''


@dataclass(frozen=True)
class Study:
    """All of it.

    Args:
        name: Names the folder of the results, ``work_dirs/study/<name>``.
        metric: What is compared.
        methods: Changes of the config's ``optim_wrapper`` by method; ``base`` is among them and changes nothing.
        settings: By name.
        seeds: Of the runs that are reported.
        selection: How rho is chosen; None if the methods have it.
        budgets: ``'epochs'``, as many for all methods; ``'compute'``, as many as the base optimizer's time allows.
        control: The method that samplers are compared with besides the base optimizer; empty for none.
        keep: Methods whose weights are kept, of the first of ``seeds``.
    """

    name: str
    metric: Metric
    methods: dict[str, dict[str, Any]]
    settings: dict[str, Setting]
    seeds: list[int]
    selection: Selection | None = None
    budgets: list[str] = field(default_factory=lambda: ['epochs'])
    control: str = ''
    keep: list[str] = field(default_factory=list)


def read_study(file: Path) -> Study:
    """Read and check a study.

    Raises:
        UsageError: The file is missing, is no YAML, or something in it is missing or out of range; the message names
            the entry and shows a right one.
    """
    if not file.is_file():
        raise UsageError(f"no study file '{file}' in {Path.cwd()}")
    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise UsageError(f"'{file}' is no YAML: {' '.join(str(error).split())}") from error
    given = _entries(Study, 'the study', content)
    given['metric'] = Metric(**_entries(Metric, 'metric', given['metric']))
    if given.get('selection') is not None:
        given['selection'] = Selection(**_entries(Selection, 'selection', given['selection']))
    for key in ('methods', 'settings'):
        _require(isinstance(given[key], dict) and bool(given[key]), key, given[key], 'a mapping by name')
        for name, own in given[key].items():
            _require(own is None or isinstance(own, dict), f'{key}.{name}', own, _FORMS[key])
    given['methods'] = {str(name): dict(own or {}) for name, own in given['methods'].items()}
    given['settings'] = {
        str(name): Setting(**_entries(Setting, f'settings.{name}', {'name': str(name), **(own or {})}))
        for name, own in given['settings'].items()
    }
    study = Study(**given)
    _check(study)
    return study


def only(study: Study, names: Collection[str]) -> Study:
    """The study with some of its settings, those that these start from, and all of their pools, by which rho is chosen.

    Raises:
        UsageError: One of the names is no setting.
    """
    _check_names('--settings', names, study.settings)
    kept: set[str] = set()
    wanted = set(names)
    while kept != wanted:
        kept = set(wanted)
        wanted |= {study.settings[name].load_from for name in kept} - {''}
        pools = {study.settings[name].pool for name in wanted} - {''}
        wanted |= {name for name, setting in study.settings.items() if setting.pool in pools}
    return replace(study, settings={name: setting for name, setting in study.settings.items() if name in kept})


def _entries(kind: Any, where: str, content: Any) -> dict[str, Any]:
    """A mapping that has the fields of a dataclass and no others."""
    known = {entry.name: entry for entry in fields(kind)}
    if not isinstance(content, dict):
        raise UsageError(f'{where} is {content!r}: it must be a mapping with {", ".join(known)}')
    for name in content:
        if name not in known:
            raise UsageError(f'{where} has no entry {str(name)!r}; {did_you_mean(str(name), known)}')
    for name, entry in known.items():
        if name not in content and entry.default is MISSING and entry.default_factory is MISSING:
            raise UsageError(f'{where} needs an entry {name!r}; it has {", ".join(map(str, content)) or "none"}')
    return dict(content)


def _check(study: Study) -> None:
    _require(study.metric.better in ('higher', 'lower'), 'metric.better', study.metric.better, "'higher' or 'lower'")
    _require(_is_number(study.metric.scale), 'metric.scale', study.metric.scale, 'a number above 0, as 100')
    _require(study.methods.get(BASE) == {}, 'methods.base', study.methods.get(BASE), "{}: the config's own optimizer")
    _check_seeds('seeds', study.seeds)
    _require(
        bool(study.budgets) and set(study.budgets) <= set(BUDGETS), 'budgets', study.budgets, '[epochs, compute] or one'
    )
    _check_names('control', [study.control] if study.control else [], study.methods)
    _check_names('keep', study.keep, study.methods)
    if study.selection is not None:
        _check_seeds('selection.seeds', study.selection.seeds)
        both = set(study.selection.seeds) & set(study.seeds)
        _require(not both, 'selection.seeds', study.selection.seeds, f'other than seeds, which has {sorted(both)}, too')
        rho = study.selection.rho
        good = isinstance(rho, list) and bool(rho) and all(map(_is_number, rho))
        _require(good, 'selection.rho', rho, 'a list of numbers above 0, as [0.02, 0.05]')
    for name, setting in study.settings.items():
        where = f'settings.{name}'
        _require('/' not in name, where, name, 'a name without /')
        _require(Path(setting.config).is_file(), f'{where}.config', setting.config, f'a file in {Path.cwd()}')
        good = isinstance(setting.epochs, int) and not isinstance(setting.epochs, bool) and setting.epochs >= 1
        _require(good, f'{where}.epochs', setting.epochs, 'an integer of at least 1')
        _require(isinstance(setting.options, dict), f'{where}.options', setting.options, 'a mapping of dotted keys')
        _require(isinstance(setting.selects, bool), f'{where}.selects', setting.selects, 'true or false')
        pool = setting.pool or name
        selecting = any((s.pool or n) == pool and s.selects for n, s in study.settings.items())
        _require(selecting, f'{where}.selects', setting.selects, 'true for at least one setting of a pool')
        share = setting.corrupt
        good = isinstance(share, (int, float)) and not isinstance(share, bool) and 0 <= share <= 1
        _require(good, f'{where}.corrupt', share, 'a share in [0, 1], as 0.2')
        if setting.load_from:
            _check_names(f'{where}.load_from', [setting.load_from], study.settings)
            _require(
                not study.settings[setting.load_from].load_from, f'{where}.load_from', setting.load_from,
                'a setting that starts from random weights itself',
            )  # fmt: skip


def _check_seeds(where: str, seeds: Any) -> None:
    good = isinstance(seeds, list) and bool(seeds) and all(type(seed) is int and seed >= 0 for seed in seeds)
    _require(good and len(set(seeds)) == len(seeds), where, seeds, 'a list of different integers >= 0, as [0, 1, 2]')


def _check_names(where: str, names: Collection[str], known: Collection[str]) -> None:
    for name in names:
        _require(name in known, where, name, f'one of {", ".join(known)}')


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float('inf')


def _require(good: bool, where: str, value: object, allowed: str) -> None:
    if not good:
        raise UsageError(f'{where}: {value!r} is not allowed: it must be {allowed}')
