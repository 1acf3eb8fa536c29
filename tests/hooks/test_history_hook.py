"""SampleHistoryHook in MMEngine's Runner: data set, ranks and data loader."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch import Tensor
from torch.utils.data import IterableDataset

from mm_sharp.hooks.history import SampleHistoryHook
from mm_sharp.samples.keys import SampleIdError
from tests.distributed import run
from tests.reliability import Holds
from tests.toys import KEYS, Batch, ToySamples, same_bits, toy_config

SGD = dict(type='SGD', lr=0.01, momentum=0.9)
# Of one range of scores from the first step on: what is counted here is what draws of half of each batch leave.
AUSAM = dict(type='AUSAMOptimWrapper', rho=0.05, sampling_ratio=0.5, schedule='constant', optimizer=SGD)
HISTORY = dict(type='ESAMOptimWrapper', rho=0.05, selection='history', refresh=1, optimizer=SGD)
SAM = dict(type='SAMOptimWrapper', rho=0.05, optimizer=SGD)
IN_LOADER = dict(type='AUSAMSampler')
FIGURES = {f'sharpness/{name}' for name in ('mean_difference', 'sampling_entropy', 'large_scores')}
_numbers = itertools.count()


@DATASETS.register_module()
class CountingSamples(ToySamples):
    """Notes every sample that is loaded; the ids may begin elsewhere than at 0."""

    metainfo: ClassVar[dict[str, Any]] = {}

    def __init__(self, count: int, first: int = 0, told: bool = True) -> None:
        super().__init__(count)
        self.loaded: list[int] = []
        self.first = first
        for index, row in enumerate(self.rows):
            row['sample_idx'] = torch.tensor(first + index)
        if not told:
            self.get_data_info = None  # type: ignore[assignment]

    def __getitem__(self, index: int) -> Batch:
        self.loaded.append(index)
        return super().__getitem__(index)

    def full_init(self) -> None:
        """MMEngine's wrappers around data sets call it."""

    def get_data_info(self, index: int) -> dict[str, int]:
        return {'sample_idx': self.first + index}


def build(tmp_path: Path, wrapper: dict[str, Any], *, loader: dict[str, Any] | None = None, **changes: Any) -> Runner:
    config = toy_config(tmp_path / f'run{next(_numbers)}', optim_wrapper=dict(wrapper), **changes)
    config['train_dataloader'].update(dataset=dict(type='CountingSamples', count=20), **(loader or {}))
    return Runner.from_cfg(config)


def trained(tmp_path: Path, wrapper: dict[str, Any], **changes: Any) -> Runner:
    runner = build(tmp_path, wrapper, **changes)
    runner.train()
    return runner


def hooks_of(runner: Runner) -> list[SampleHistoryHook]:
    return [hook for hook in runner.hooks if isinstance(hook, SampleHistoryHook)]


# ------------------------------------------------------------------ one line is enough
@pytest.mark.parametrize('wrapper', [SAM, HISTORY, AUSAM], ids=lambda wrapper: wrapper['type'])
def test_added_by_itself_once(tmp_path: Path, wrapper: dict[str, Any]) -> None:
    assert len(hooks_of(build(tmp_path, wrapper, custom_hooks=[]))) == 1
    assert len(hooks_of(build(tmp_path, wrapper, custom_hooks=[dict(type='SampleHistoryHook')]))) == 1


def test_not_added_to_runs_that_do_not_use_us(tmp_path: Path) -> None:
    assert not hooks_of(build(tmp_path, dict(type='OptimWrapper', optimizer=SGD), custom_hooks=[]))


@pytest.mark.parametrize('wrapper', [HISTORY, AUSAM], ids=lambda wrapper: wrapper['type'])
def test_what_is_logged(tmp_path: Path, wrapper: dict[str, Any]) -> None:
    runner = trained(tmp_path, wrapper)
    scalars = {k.removeprefix('train/'): v.current() for k, v in runner.message_hub.log_scalars.items()}
    assert scalars.keys() >= KEYS | FIGURES | {'sharpness/share_seen'}
    # The last step's differences are still on their way when the step is logged.
    assert scalars['sharpness/share_seen'] == pytest.approx(len(runner.optim_wrapper.history) / 20, abs=4 / 20)
    assert 0 < scalars['sharpness/sampling_entropy'] <= 1
    assert 0 <= scalars['sharpness/large_scores'] <= 1


def test_exact_selection_needs_no_ids_and_logs_no_history(tmp_path: Path) -> None:
    runner = trained(tmp_path, dict(type='ESAMOptimWrapper', rho=0.05, optimizer=SGD))
    logged = {key.removeprefix('train/') for key in runner.message_hub.log_scalars}
    assert logged >= KEYS | FIGURES
    assert 'sharpness/share_seen' not in logged


def test_repeated_samples_are_one(tmp_path: Path) -> None:
    repeated = dict(type='RepeatDataset', times=3, dataset=dict(type='CountingSamples', count=20))
    config = toy_config(tmp_path / f'run{next(_numbers)}', optim_wrapper=dict(AUSAM, sampling_ratio=1.0))
    config['train_dataloader']['dataset'] = repeated
    runner = Runner.from_cfg(config)
    runner.train()
    assert runner.optim_wrapper.log_scalars() == {'share_seen': 1.0}


# ------------------------------------------------------------------ the data loader
def test_the_sampler_loads_only_what_is_drawn(tmp_path: Path) -> None:
    whole, drawn = trained(tmp_path, AUSAM), trained(tmp_path, AUSAM, loader=dict(batch_sampler=IN_LOADER))
    loaded = [runner.train_dataloader.dataset.loaded for runner in (whole, drawn)]
    assert [len(numbers) for numbers in loaded] == [2 * 20, 2 * 20 // 2]
    assert len(whole.train_dataloader) == len(drawn.train_dataloader) == 5
    assert whole.iter == drawn.iter == 10
    # Both drew half of every batch.
    for runner in (whole, drawn):
        _, visits = columns(runner.optim_wrapper.history.state_dict())
        assert visits.sum() == 20


def columns(state: dict[str, Any], name: str = '') -> tuple[Tensor, Tensor]:
    table = state['data_sets'][name]
    return table['averages'], table['visits']


@pytest.mark.parametrize('by_epoch', [True, False])
def test_the_sampler_with_workers_under_both_loops(tmp_path: Path, by_epoch: bool) -> None:
    loader = dict(batch_sampler=IN_LOADER, num_workers=2, persistent_workers=True)
    changes: dict[str, Any] = {}
    if not by_epoch:
        loader['sampler'] = dict(type='InfiniteSampler', shuffle=True)
        changes['train_cfg'] = dict(by_epoch=False, max_iters=10)
    runner = trained(tmp_path, AUSAM, loader=loader, **changes)
    assert runner.iter == 10
    _, visits = columns(runner.optim_wrapper.history.state_dict())
    assert visits.sum() == 10 * 2
    # Workers that only the garbage collector ends are waited for, 5 seconds each.
    runner.train_loop.dataloader_iterator = runner.train_dataloader._iterator = None


@pytest.mark.parametrize('wrapper', [SAM, HISTORY], ids=lambda wrapper: wrapper['type'])
def test_a_sampler_without_ausam_is_refused(tmp_path: Path, wrapper: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"uses (SAM|ESAM)OptimWrapper(.|\n)*take batch_sampler=dict\(type='AUSAM"):
        trained(tmp_path, wrapper, loader=dict(batch_sampler=IN_LOADER))


def test_a_changed_data_set_goes_on_with_its_scores(tmp_path: Path) -> None:
    """15 of 20 samples are gone, 5 are new: these are unseen, and the others keep what is known of them."""
    first = trained(tmp_path, dict(AUSAM, sampling_ratio=1.0))
    config = toy_config(tmp_path / f'run{next(_numbers)}', optim_wrapper=dict(AUSAM, sampling_ratio=1.0))
    config['train_dataloader']['dataset'] = dict(type='CountingSamples', count=10, first=15)
    config['train_cfg'] = dict(by_epoch=True, max_epochs=3)
    config.update(resume=True, load_from=str(Path(first.work_dir) / 'epoch_2.pth'))
    second = Runner.from_cfg(config)
    second.train()
    before, after = (dict(visits_of(runner)) for runner in (first, second))
    assert {key: count - before.get(key, 0) for key, count in after.items()} == {k: int(k >= 15) for k in range(25)}


def visits_of(runner: Runner) -> Iterator[tuple[int, int]]:
    runner.optim_wrapper.exchange_history()
    table = runner.optim_wrapper.history.state_dict()['data_sets']['']
    return zip(table['ids'].tolist(), table['visits'].tolist(), strict=True)


def test_combined_data_sets_that_would_share_scores_are_refused(tmp_path: Path) -> None:
    config = toy_config(tmp_path / f'run{next(_numbers)}', optim_wrapper=dict(AUSAM))
    part = dict(type='CountingSamples', count=10)
    config['train_dataloader']['dataset'] = dict(type='ConcatDataset', datasets=[part, dict(part)])
    with pytest.raises(SampleIdError, match="10 samples of two combined data sets have the same name ''"):
        Runner.from_cfg(config).train()


@DATASETS.register_module()
class StreamedSamples(IterableDataset[Batch]):
    """The samples one after the other; there is no length and no index."""

    def __iter__(self) -> Iterator[Batch]:
        yield from ToySamples(20).rows


def test_a_data_set_that_only_iterates(tmp_path: Path) -> None:
    config = toy_config(tmp_path / f'run{next(_numbers)}', optim_wrapper=dict(AUSAM), custom_hooks=[])
    config['train_dataloader'].update(dataset=dict(type='StreamedSamples'), sampler=None)
    config['train_cfg'] = dict(by_epoch=False, max_iters=5)
    config['default_hooks'] = dict(logger=None)  # MMEngine's asks for a length
    runner = Runner.from_cfg(config)
    runner.train()
    assert runner.optim_wrapper.log_scalars() == {}
    assert len(runner.optim_wrapper.history) > 0


# ------------------------------------------------------------------ ranks
def test_the_last_checkpoint_of_an_epoch_based_run_comes_after_an_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CheckpointHook(by_epoch=False) saves after the last iteration, whatever its interval."""
    checkpoint = dict(type='CheckpointHook', interval=4, by_epoch=False)
    runner = build(tmp_path, AUSAM, default_hooks=dict(checkpoint=checkpoint))
    events: list[tuple[str, int]] = []
    kind = type(runner.build_optim_wrapper(dict(AUSAM)))
    exchange, save = kind.exchange_history, runner.save_checkpoint
    monkeypatch.setattr(
        kind, 'exchange_history', lambda self: (events.append(('exchange', runner.iter)), exchange(self))
    )

    def noting(*args: Any, **kwargs: Any) -> None:
        events.append(('save', runner.iter))
        save(*args, **kwargs)

    monkeypatch.setattr(runner, 'save_checkpoint', noting)
    runner.train()
    saves = [index for index, (event, _) in enumerate(events) if event == 'save']
    assert [events[index][1] for index in saves] == [3, 7, 9]
    assert all(events[index - 1] == ('exchange', events[index][1]) for index in saves)


def train_on_ranks(rank: int, processes: int, folder: str, case: str) -> dict[str, Any]:
    """Two epochs through a Runner on each rank; every rank's history after each exchange, and what was saved."""
    config = toy_config(Path(folder) / case, optim_wrapper=dict(WRAPPERS[case]), launcher='pytorch')
    config['train_dataloader'].update(LOADERS[case])
    config['model_wrapper_cfg'] = dict(type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None)
    config['default_hooks'] = dict(logger=dict(type='LoggerHook', interval=2), **CHECKPOINTS.get(case, {}))
    if case in CHECKPOINTS:
        config['train_cfg'] = dict(by_epoch=False, max_iters=6)
    runner = Runner.from_cfg(config)
    states: list[dict[str, Any]] = []
    wrapper_class = type(runner.build_optim_wrapper(dict(WRAPPERS[case])))
    exchange = wrapper_class.exchange_history

    def noting(self: Any) -> None:
        exchange(self)
        states.append(self.history.state_dict())

    wrapper_class.exchange_history = noting  # type: ignore[method-assign]
    try:
        runner.train()
    finally:
        wrapper_class.exchange_history = exchange  # type: ignore[method-assign]
    seen = [key for key in range(20) if not np.isnan(runner.optim_wrapper.history.scores_of('', [key])[0])]
    saved = sorted(Path(folder, case).glob('*.pth'))
    return {'states': states, 'seen': seen, 'saved': [str(path) for path in saved]}


WRAPPERS = {'ausam': AUSAM, 'ausam in the loader': AUSAM, 'esam': HISTORY, 'ausam by iteration': AUSAM}
LOADERS: dict[str, dict[str, Any]] = {
    'ausam': {},
    'ausam in the loader': dict(batch_sampler=IN_LOADER),
    'esam': {},
    'ausam by iteration': {},
}
CHECKPOINTS = {
    'ausam by iteration': dict(checkpoint=dict(type='CheckpointHook', interval=2, by_epoch=False)),
}


COUNTED = {
    'base': dict(type='OptimWrapper', optimizer=SGD),
    'sam': SAM,
    'esam': dict(type='ESAMOptimWrapper', rho=0.05, optimizer=SGD),
    'esam-history': HISTORY,
    'ausam': AUSAM,
}


def collectives(folder: str, case: str, epochs: int) -> int:
    """Every operation of gloo's in a run through a Runner, DDP's own among them."""
    config = toy_config(Path(folder) / f'{case}{epochs}', optim_wrapper=dict(COUNTED[case]), launcher='pytorch')
    config.update(custom_hooks=[], train_cfg=dict(by_epoch=True, max_epochs=epochs))
    config['model_wrapper_cfg'] = dict(type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None)
    runner = Runner.from_cfg(config)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        runner.train()
    return sum(event.count for event in profiler.key_averages() if event.key.startswith('gloo:'))


def every_case(rank: int, processes: int, folder: str) -> dict[str, Any]:
    return {case: train_on_ranks(rank, processes, folder, case) for case in WRAPPERS}


def count_collectives(rank: int, processes: int, folder: str) -> dict[tuple[str, int], int]:
    return {(case, epochs): collectives(folder, case, epochs) for case in COUNTED for epochs in (1, 3)}


@pytest.fixture(scope='module')
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int], int]]:
    return run(count_collectives, 2, str(tmp_path_factory.mktemp('counted')))


@pytest.fixture(scope='module')
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(every_case, 2, str(tmp_path_factory.mktemp('ranks')))


@pytest.mark.slow
@pytest.mark.parametrize('case', WRAPPERS)
def test_ranks_hold_the_same_history_after_every_exchange(ranks: list[dict[str, Any]], case: str) -> None:
    first, second = (rank[case]['states'] for rank in ranks)
    assert len(first) == len(second) == (4 if case in CHECKPOINTS else 2)
    for left, right in zip(first, second, strict=True):
        for a, b in zip(columns(left), columns(right), strict=True):
            assert same_bits(a, b)
    # Of 20 samples, both ranks' draws: 2 ranks x 3 batches (one short) an epoch.
    _, visits = columns(first[-1])
    per_epoch = 20 if case == 'esam' else 10
    assert visits.sum() == per_epoch * 2 if case not in CHECKPOINTS else visits.sum() > 0
    assert len(ranks[0][case]['seen']) == len(first[-1]['data_sets']['']['ids'])


@pytest.mark.slow
def test_checkpoints_in_mid_epoch_hold_every_ranks_visits(ranks: list[dict[str, Any]]) -> None:
    results = ranks[0]['ausam by iteration']
    # 3 iterations an epoch: exchanged at 2 (saved), 3, 4 (saved), 6 (both).
    saved = [torch.load(path, weights_only=True)['optimizer']['mm_sharp']['history'] for path in results['saved']]
    assert len(saved) == 3
    for number, state in zip((0, 2, 3), saved, strict=True):
        for a, b in zip(columns(results['states'][number]), columns(state), strict=True):
            assert same_bits(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(('case', 'at_the_start', 'an_epoch'), [
    ('sam', 0, 0), ('esam', 2, 0), ('esam-history', 2, 2), ('ausam', 2, 2),
])  # fmt: skip
def test_communication_besides_the_base_optimizers(
    counted: list[dict[tuple[str, int], int]], case: str, at_the_start: int, an_epoch: int, holds: Holds
) -> None:
    """The seed once, and one exchange of the history an epoch: of objects, whose sizes go before their bytes."""
    for counts in counted:
        assert counts['base', 3] > counts['base', 1] > 0
        more = {epochs: counts[case, epochs] - counts['base', epochs] for epochs in (1, 3)}
        assert more == {1: at_the_start + an_epoch, 3: at_the_start + 3 * an_epoch}
    held = f'exchanges: {an_epoch // 2} an epoch, {at_the_start // 2} at the start'
    holds('Ranks', "communication besides the base optimizer's, counted", case, held, unit='counts of collectives')
