"""AUSAM by its authors' schedule in MMEngine's Runner, against a reference written by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mm_sharp import AUSAMOptimWrapper
from mm_sharp.samples.schedule import TrainingLength
from mm_sharp.samples.seeds import RngStream, make_generator
from tests.references_ausam import ReferenceAUSAM, mean_sizes, mean_squares, terms
from tests.toys import batches, make, same_state, toy_config
from tests.wrappers import momentum_sgd

BATCH, SAMPLES, EPOCHS = 4, 20, 3
STEPS = SAMPLES // BATCH
RAMP = 0.9


class Reference(Hook):
    """Trains a reference beside a Runner's model, with draws of its own where the kind is the authors'."""

    def __init__(self, kind: str) -> None:
        self.kind, self.drawn = kind, []
        self.model = self.reference = None

    def before_train(self, runner: Any) -> None:
        self.model = make()
        runner.model.load_state_dict(self.model.state_dict())
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.reference = ReferenceAUSAM(self.model, sgd, terms(mean_squares, mean_sizes), s_min=0.1)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        draw, reference = runner.optim_wrapper._draw, self.reference
        rows = draw.chosen.tolist()
        # The authors': in epoch 0 all; then half, by s_max that rises linearly over the first epochs.
        reference.s_max = 0.5 - max(0.0, (RAMP * EPOCHS - runner.epoch) / (RAMP * EPOCHS)) * (0.5 - 0.1)
        if runner.epoch == 0:
            assert rows == list(range(BATCH))
        elif self.kind == 'sequential':
            assert rows == self.multinomial(runner, data_batch)
        pi = reference.step(data_batch, rows)
        if self.kind == 'systematic':
            assert draw.pi == pytest.approx(pi, rel=1e-12, abs=0)
        assert same_state(runner.model, self.model), f'step {runner.iter}'
        self.drawn.append(len(rows))

    def multinomial(self, runner: Any, data_batch: Any) -> list[int]:
        scores = [self.reference.history[i][0] for i in data_batch['sample_idx'].tolist()]
        low, high = min(scores), max(scores)
        sizes = [0.1 + (self.reference.s_max - 0.1) * (score - low) / (high - low) for score in scores]
        generator = make_generator(runner.optim_wrapper.seed, RngStream.SAMPLES, 0, runner.iter)
        chosen = torch.multinomial(torch.tensor(sizes, dtype=torch.float64), BATCH // 2, generator=generator)
        return sorted(chosen.tolist())


def ausam(**options: Any) -> dict[str, Any]:
    return dict(type='AUSAMOptimWrapper', rho=0.05, optimizer=dict(type='SGD', lr=0.01, momentum=0.9), **options)


def runner_of(path: Path, **changes: Any) -> Runner:
    return Runner.from_cfg(toy_config(path, train_cfg=dict(by_epoch=True, max_epochs=EPOCHS), **changes))


@pytest.mark.parametrize('by_epoch', [True, False], ids=['epochs', 'iterations'])
@pytest.mark.parametrize('kind', ['systematic', 'sequential'])
def test_three_epochs_equal_the_reference_step_by_step(tmp_path: Path, kind: str, by_epoch: bool) -> None:
    loop = dict(by_epoch=True, max_epochs=EPOCHS) if by_epoch else dict(by_epoch=False, max_iters=EPOCHS * STEPS)
    config = toy_config(tmp_path, optim_wrapper=ausam(draw=kind, ramp=RAMP), train_cfg=loop)
    if not by_epoch:
        config['train_dataloader']['sampler'] = dict(type='InfiniteSampler', shuffle=True)
        config['log_processor'] = dict(by_epoch=False)
    runner = Runner.from_cfg(config)
    reference = Reference(kind)
    if not by_epoch:  # the loop's own epoch is always 0
        reference.after_train_iter = by_iterations(reference)  # type: ignore[method-assign]
    runner.register_hook(reference, priority='LOWEST')
    runner.train()
    assert reference.drawn == [BATCH] * STEPS + [BATCH // 2] * (EPOCHS - 1) * STEPS
    runner.optim_wrapper.exchange_history()
    assert len(runner.optim_wrapper.history) == SAMPLES


def by_iterations(reference: Reference) -> Any:
    """The hook's check with the epoch that an iteration is in."""

    class View:
        def __init__(self, runner: Any) -> None:
            self.epoch, self.iter = runner.iter // STEPS, runner.iter
            self.optim_wrapper, self.model = runner.optim_wrapper, runner.model

    checked = reference.after_train_iter
    return lambda runner, *args, **kwargs: checked(View(runner), *args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('by_epoch', [True, False], ids=['epochs', 'iterations'])
@pytest.mark.filterwarnings('ignore:This process .* is multi-threaded:DeprecationWarning')
def test_drawn_in_the_loader_the_first_epoch_is_whole_however_far_ahead_it_loads(
    tmp_path: Path, by_epoch: bool, workers: int
) -> None:
    loop = dict(by_epoch=True, max_epochs=EPOCHS) if by_epoch else dict(by_epoch=False, max_iters=EPOCHS * STEPS)
    config = toy_config(tmp_path, optim_wrapper=ausam(), train_cfg=loop)
    config['train_dataloader'].update(
        batch_sampler=dict(type='AUSAMSampler'), num_workers=workers, persistent_workers=workers > 0
    )
    if not by_epoch:
        config['train_dataloader']['sampler'] = dict(type='InfiniteSampler', shuffle=True)
        config['log_processor'] = dict(by_epoch=False)
    runner, sizes = Runner.from_cfg(config), []

    class Sizes(Hook):
        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            sizes.append(len(data_batch['sample_idx']))

    runner.register_hook(Sizes())
    runner.train()
    assert sizes == [BATCH] * STEPS + [BATCH // 2] * (EPOCHS - 1) * STEPS
    assert len(runner.optim_wrapper.history) == SAMPLES


@pytest.mark.slow
def test_accumulated_micro_batches_are_of_their_epoch(tmp_path: Path) -> None:
    """An optimizer step of 3 micro-batches reaches over the end of the first epoch, of 5: each has its own draw."""
    runner = runner_of(tmp_path, optim_wrapper=ausam(accumulative_counts=3))
    sizes: list[int] = []

    class Sizes(Hook):
        def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
            sizes.append(len(runner.optim_wrapper._draw.chosen))

    runner.register_hook(Sizes())
    runner.train()
    assert sizes == [BATCH] * STEPS + [BATCH // 2] * (EPOCHS - 1) * STEPS


def test_the_start_of_a_run_says_what_it_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr('mm_sharp.hooks.start.print_log', lambda message, **_: said.append(message))
    runner_of(tmp_path, optim_wrapper=ausam()).train()
    (line,) = said
    assert '2 of 4 in both passes' in line
    assert "1.33 times the base optimizer's over 3 epochs" in line


# -------------------------------------------------------------------- loops of one's own
def test_without_a_runner_draws_are_those_after_the_ramp() -> None:
    model = make()
    wrapper = AUSAMOptimWrapper(momentum_sgd(model))
    wrapper.history.update([('', i) for i in range(8)], [0.1 * i for i in range(8)])
    model.train_step(batches(1)[0], wrapper)
    assert len(wrapper._draw.chosen) == 4
    assert wrapper._draw.pi.max() / wrapper._draw.pi.min() == pytest.approx(5.0)


def test_a_loop_of_ones_own_says_where_it_is() -> None:
    model = make()
    wrapper, sizes = AUSAMOptimWrapper(momentum_sgd(model)), []
    for epoch in range(2):
        wrapper.place = TrainingLength(2, 1).place(epoch)
        model.train_step(batches(1)[0], wrapper)
        sizes.append(len(wrapper._draw.chosen))
    assert sizes == [8, 4]


def test_mmengines_count_alone_gives_the_ramp_by_iterations() -> None:
    model = make()
    wrapper = AUSAMOptimWrapper(momentum_sgd(model), ramp=1.0)
    wrapper.initialize_count_status(model, 0, 10)
    wrapper.history.update([('', i) for i in range(8)], [0.1 * i for i in range(8)])
    ratios = []
    for _ in range(3):
        model.train_step(batches(1)[0], wrapper)
        ratios.append(wrapper._draw.pi.max() / wrapper._draw.pi.min())
    assert ratios == pytest.approx([1.0, 1.4, 1.8])


# -------------------------------------------------------------------- resume, old checkpoints
def test_an_old_state_loads_and_its_own_loads_again() -> None:
    """A state of before there were schedules has the same keys."""
    model = make()
    wrapper = AUSAMOptimWrapper(momentum_sgd(model), sampling_ratio=0.6, s_min=0.3, s_max=1.0)
    for batch in batches(2):
        model.train_step(batch, wrapper)
    state, weights = copy.deepcopy((wrapper.state_dict(), model.state_dict()))
    assert state['mm_sharp'].keys() == {
        'version', 'wrapper', 'base_optimizer', 'random_state', 'optimizer_steps',
        'seed', 'member', 'steps', 'history', 'visits',
    }  # fmt: skip
    model.train_step(batches(1)[0], wrapper)
    twin = make()
    twin.load_state_dict(weights)
    other = AUSAMOptimWrapper(momentum_sgd(twin), sampling_ratio=0.6, s_min=0.3, s_max=1.0)
    other.load_state_dict(state)
    twin.train_step(batches(1)[0], other)
    assert wrapper._draw.chosen.tolist() == other._draw.chosen.tolist()
    assert same_state(model, twin)
