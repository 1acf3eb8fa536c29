"""What a study compares, read from its YAML file; ``configs/study/README.md`` shows one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from math import inf
from pathlib import Path
from typing import Any

import yaml

from mm_sharp.errors import UsageError, did_you_mean, in_folder, is_number

BASE = 'base'
BUDGETS = ('epochs', 'compute', 'time')
# What YAML may give for an entry, by the beginning of its type here; the others are checked by themselves.
_FORMS: dict[str, tuple[Any, str]] = {
    'str': ((str, int, float), 'a text'),
    'bool': (bool, 'true or false'),
    'list': (list, 'a list'),
}


@dataclass(frozen=True)
class Metric:
    """The metric that methods are compared by."""

    name: str  # its key among the evaluators' results
    better: str = 'higher'  # or 'lower'
    scale: float = 1.0  # tables show the metric times this: 100 for percent


@dataclass(frozen=True)
class Selection:
    """How rho is chosen: by the mean of the metric on the validation data, over runs that are not reported."""

    seeds: list[int]  # of these runs
    rho: list[float]  # what is tried, for each method that has a rho
    own_rho: Mapping[str, list[float]] = field(default_factory=dict)  # by method, in place of these


@dataclass(frozen=True)
class Setting:
    """A model, its data and its schedule."""

    name: str
    config: str  # file of its training config
    epochs: int  # of the base optimizer, and of every method at equal epochs
    options: Mapping[str, Any] = field(default_factory=dict)  # changes of the config, as --cfg-options takes them
    methods: list[str] = field(default_factory=list)  # those that are compared in it; all by default
    pool: str = ''  # settings of one pool share the choice of rho, by their mean; by default each has its own
    selects: bool = True  # takes part in its pool's choice; otherwise its base optimizer alone is trained for it
    corrupt: float = 0.0  # share of the training people whose keypoints are corrupted, see corruption.py
    load_from: str = ''  # another setting: runs start from its base optimizer's weights of the same seed
    # From those that each method has trained there, to be trained on alike, by the config with the base optimizer.
    load_own: bool = False


@dataclass(frozen=True)
class Study:
    """All entries of the file."""

    name: str  # of the folder of the results, work_dirs/study/<name>
    metric: Metric
    # Changes of the config's optim_wrapper, and as 'options' of the whole config; 'base' is among them, without any.
    # 'epochs' are a method's own, whatever the budget.
    methods: dict[str, dict[str, Any]]
    settings: dict[str, Setting]
    seeds: list[int]  # of the runs that are reported
    selection: Selection | None = None  # None: the methods have their rho
    # 'compute': as many epochs as the base optimizer's cost allows by counting passes; 'time': by measured seconds.
    budgets: list[str] = field(default_factory=lambda: ['epochs'])
    control: str = ''  # a method that the others are also compared with
    keep: list[str] = field(default_factory=list)  # methods whose weights are kept, of the first of the seeds
    labels: Mapping[str, str] = field(default_factory=dict)  # of methods and settings, for the picture

    def methods_in(self, setting: str) -> list[str]:
        """The methods that are compared in a setting."""
        return self.settings[setting].methods or [*self.methods]

    def changes(self, setting: str, method: str) -> dict[str, Any]:
        """What a method changes in a setting: nothing where it only gives the weights to start from."""
        return {} if self.settings[setting].load_own else self.methods[method]


def read_study(file: Path) -> Study:
    """Read and check a study; a UsageError names what is no YAML, or the entry that is wrong, and a right one."""
    if not file.is_file():
        there = [other.name for other in file.parent.glob('*.yaml')]
        hint = did_you_mean(file.name, there) if there else 'give for example configs/study/digits.yaml'
        raise UsageError(f"no study file '{file}'{in_folder(file)}: {hint}")
    if file.suffix == '.py':
        raise UsageError(f"'{file}' is a config: a study is a YAML file, such as configs/study/digits.yaml")
    try:
        content = yaml.load(file.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"'{file}' is no YAML: {' '.join(str(error).split())}") from error
    given = _entries(Study, 'the study', content)
    given['metric'] = Metric(**_entries(Metric, 'metric', given['metric']))
    if given.get('selection') is not None:
        given['selection'] = Selection(**_entries(Selection, 'selection', given['selection']))
    changes, mapping = 'changes of optim_wrapper, as {type: SAMOptimWrapper}', 'as {config: my_config.py, epochs: 20}'
    for key, form in (('methods', changes), ('settings', f'a mapping, {mapping}')):
        _require(isinstance(given[key], dict) and bool(given[key]), key, given[key], 'a mapping by name')
        for name, own in given[key].items():
            _require(own is None or isinstance(own, dict), f'{key}.{name}', own, form)
        given[key] = {str(name): dict(own or {}) for name, own in given[key].items()}
    for name, own in given['settings'].items():
        given['settings'][name] = Setting(**_entries(Setting, f'settings.{name}', {'name': name, **own}))
    study = Study(**given)
    _check(study)
    for name, setting in study.settings.items():
        _check_setting(study, f'settings.{name}', setting)
    return study


class _Loader(yaml.SafeLoader):
    """Reads YAML as it should be: where a mapping has a key twice, PyYAML would take the last and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        names = Counter(key.value for key in keys if key.tag != 'tag:yaml.org,2002:merge')
        if twice := [name for name, count in names.items() if count > 1]:
            raise UsageError(f"'{twice[0]}' is written twice in one mapping, from line {node.start_mark.line + 1} on")
        return super().construct_mapping(node, deep)


def only(study: Study, names: Collection[str]) -> Study:
    """The study with some of its settings, those that these start from, and all of their pools."""
    _check_names('--settings', names, study.settings)
    kept, more = set(names), set(names)
    while more:
        pools = {study.settings[name].pool for name in kept} - {''}
        needed = {name for name, setting in study.settings.items() if setting.pool in pools}
        more = (needed | {study.settings[name].load_from for name in kept}) - {''} - kept
        kept |= more
    return replace(study, settings={name: setting for name, setting in study.settings.items() if name in kept})


def _entries(kind: Any, where: str, content: Any) -> dict[str, Any]:
    known = {entry.name: entry for entry in fields(kind)}
    if not isinstance(content, dict):
        raise UsageError(f'{where} is {content!r}: it must be a mapping with {", ".join(known)}')
    for name in content:
        if name not in known:
            raise UsageError(f'{where} has no entry {str(name)!r}; {did_you_mean(str(name), known)}')
    for name, entry in known.items():
        if name not in content and entry.default is entry.default_factory is MISSING:
            raise UsageError(f'{where} needs an entry {name!r}; it has {", ".join(map(str, content)) or "none"}')
    given = {}
    for name, value in content.items():
        kinds, form = _FORMS.get(str(known[name].type).partition('[')[0], (object, ''))
        if value is None and not known[name].default is known[name].default_factory is MISSING:
            continue  # an entry without a value
        _require(isinstance(value, kinds), name if kind is Study else f'{where}.{name}', value, form)
        given[name] = str(value) if form == 'a text' else value  # YAML reads some names as numbers
    return given


def _check(study: Study) -> None:
    metric, budgets = study.metric, study.budgets
    _require(metric.better in ('higher', 'lower'), 'metric.better', metric.better, "'higher' or 'lower'")
    good = is_number(metric.scale) and 0 < metric.scale < inf
    _require(good, 'metric.scale', metric.scale, 'a number above 0, as 100')
    _require(study.methods.get(BASE) == {}, 'methods.base', study.methods.get(BASE), "{}: the config's own optimizer")
    _check_seeds('seeds', study.seeds)
    good = bool(budgets) and all(budget in BUDGETS for budget in budgets)
    _require(good, 'budgets', budgets, 'some of [epochs, compute, time]')
    needs = 'time' not in budgets or 'epochs' in budgets
    _require(needs, 'budgets', budgets, 'with epochs, too: time is measured in these runs')
    _check_names('control', filter(None, [study.control]), study.methods)
    _check_names('keep', study.keep, study.methods)
    good = isinstance(study.labels, dict) and all(isinstance(label, str) for label in study.labels.values())
    _require(good, 'labels', study.labels, "a mapping to texts, as {sam: 'SAM, rho 0.02'}")
    _check_names('labels', study.labels, {**study.methods, **study.settings})
    if study.selection is not None:
        seeds, rho = study.selection.seeds, study.selection.rho
        _check_seeds('selection.seeds', seeds)
        both = sorted(set(seeds) & set(study.seeds))
        _require(not both, 'selection.seeds', seeds, f'other than seeds, which has {both}, too')
        _check_rho('selection.rho', rho)
        own = study.selection.own_rho
        _require(isinstance(own, dict), 'selection.own_rho', own, 'lists by method, as {sam: [0.02, 0.05]}')
        _check_names('selection.own_rho', own, study.methods)
        for name, tried in own.items():
            _check_rho(f'selection.own_rho.{name}', tried)
            fixed = 'type' not in study.methods[name] or 'rho' in study.methods[name]
            _require(not fixed, f'selection.own_rho.{name}', tried, 'of a method whose rho is to be chosen')
    for name, method in study.methods.items():
        options = method.get('options', {})
        _require(isinstance(options, dict), f'methods.{name}.options', options, 'a mapping of dotted keys')
        _check_epochs(f'methods.{name}.epochs', method.get('epochs', 1))


def _check_setting(study: Study, where: str, setting: Setting) -> None:
    _require('/' not in setting.name, where, setting.name, 'a name without /')
    _require(Path(setting.config).is_file(), f'{where}.config', setting.config, f'a file{in_folder(setting.config)}')
    _check_epochs(f'{where}.epochs', setting.epochs)
    _require(isinstance(setting.options, dict), f'{where}.options', setting.options, 'a mapping of dotted keys')
    pool = setting.pool or setting.name
    good = any(other.selects for other in study.settings.values() if (other.pool or other.name) == pool)
    _require(good, f'{where}.selects', setting.selects, 'true for at least one setting of a pool')
    good = is_number(setting.corrupt) and 0 <= setting.corrupt <= 1
    _require(good, f'{where}.corrupt', setting.corrupt, 'a share in [0, 1], as 0.2')
    if setting.load_from:
        _check_names(f'{where}.load_from', [setting.load_from], study.settings)
        good = not study.settings[setting.load_from].load_from
        _require(good, f'{where}.load_from', setting.load_from, 'a setting that starts from random weights itself')
    _check_names(f'{where}.methods', setting.methods, study.methods)
    _require(not setting.methods or BASE in setting.methods, f'{where}.methods', setting.methods, f'with {BASE!r}')
    if setting.load_own:
        _require(bool(setting.load_from), f'{where}.load_own', True, 'false without load_from')
        _check_names(f'{where}.methods', setting.methods, study.methods_in(setting.load_from))
        alike = study.selection is None
        _require(alike, f'{where}.load_own', True, 'false where rho is chosen: settings may differ in it')


def _check_epochs(where: str, epochs: Any) -> None:
    _require(type(epochs) is int and epochs >= 1, where, epochs, 'an integer of at least 1')


def _check_rho(where: str, rho: Any) -> None:
    good = isinstance(rho, list) and bool(rho) and all(is_number(value) and 0 < value < inf for value in rho)
    _require(good, where, rho, 'a list of numbers above 0, as [0.02, 0.05]')


def _check_seeds(where: str, seeds: Any) -> None:
    good = isinstance(seeds, list) and bool(seeds) and all(type(seed) is int and seed >= 0 for seed in seeds)
    _require(good and len(set(seeds)) == len(seeds), where, seeds, 'a list of different integers >= 0, as [0, 1, 2]')


def _check_names(where: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        _require(name in list(known), where, name, f'one of {", ".join(known)}')  # what YAML gives may have no hash


def _require(good: bool, where: str, value: object, allowed: str) -> None:
    if not good:
        raise UsageError(f'{where}: {value!r} is not allowed: it must be {allowed}')
