"""The block of lines at the start of a run, and what the console shows of our scalars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import LogProcessor, Runner

from mm_sharp.hooks.console import shorten_console_line
from mm_sharp.hooks.start import in_words
from mm_sharp.methods.ausam import AUSAMOptimWrapper
from mm_sharp.samples.schedule import TrainingLength
from tests.toys import make, toy_config
from tests.wrappers import WRAPPERS, build, momentum_sgd

LENGTH = TrainingLength(10, 5)
SHOWN = ['sharpness', 'rho_relative', 'linearity', 'g_norm']


@pytest.mark.parametrize('kind', WRAPPERS)
def test_at_most_eight_lines_for_every_method(kind: str) -> None:
    model = make()
    wrapper = build(kind, model)
    lines = in_words(wrapper, 8, LENGTH, model)
    assert {'rho', 'perturbed', 'samples', 'cost'} <= lines.keys()
    assert 1 + len(lines) <= 8
    assert not any('\n' in line for line in lines.values())
    assert lines['rho'].split()[0] == f'{wrapper.rho:g}'
    assert lines['cost'].split()[0] == f'{wrapper.cost(8).over(LENGTH.epochs):.2f}'


@pytest.mark.parametrize(
    ('kind', 'options', 'cost'),
    [('sam', dict(interval=5), 1.2), ('looksam', dict(k=2), 1.5), ('esam', dict(beta=1.0, gamma=1.0), 2.0),
     ('ausam', dict(sampling_ratio=0.25), 0.5), ('msam', {}, 1.0)],
)  # fmt: skip
def test_the_cost_is_that_of_the_wrappers_own_arguments(kind: str, options: dict[str, Any], cost: float) -> None:
    assert build(kind, make(), **options).cost(8).cycle == pytest.approx(cost)


@pytest.mark.parametrize(('kind', 'options'), [('sam', dict(interval=5)), ('looksam', dict(k=5))])
def test_steps_of_one_pass_are_said(kind: str, options: dict[str, Any]) -> None:
    line = in_words(build(kind, make(), **options), 8, LENGTH, None)['samples']
    assert line == 'all 8 of a batch, in both passes of one step of 5, in one of the others'


def test_a_training_of_one_epoch_has_none_after_the_first() -> None:
    wrapper = AUSAMOptimWrapper(momentum_sgd(make(), 0.1))
    costs = [in_words(wrapper, 8, TrainingLength(epochs, 5), None)['cost'] for epochs in (1, 2)]
    assert costs[0] == "2.00 times the base optimizer's (by counting passes)"
    assert costs[1].endswith('over 2 epochs: 2.00 in the first, then 1.00 (by counting passes)')


@pytest.mark.parametrize(
    ('options', 'weighted'), [({}, False), (dict(reweight=True), True), (dict(reweight=True, draw='uniform'), False)]
)
def test_weights_of_the_samples_are_said(options: dict[str, Any], weighted: bool) -> None:
    model = make()
    line = in_words(AUSAMOptimWrapper(momentum_sgd(model, 0.1), **options), 8, LENGTH, model)['samples']
    assert line.endswith('; each weighted by 1 / (N * pi_i)') == weighted


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The blocks that are logged."""
    blocks: list[str] = []
    monkeypatch.setattr('mm_sharp.hooks.start.print_log', lambda block, **_: blocks.append(block))
    return blocks


def test_a_run_says_it_once_and_without_a_hook_of_ours(tmp_path: Path, printed: list[str]) -> None:
    ausam = dict(type='AUSAMOptimWrapper', rho=0.02, adaptive='tensor', perturb='weights', optimizer=dict(type='Adam'))
    Runner.from_cfg(toy_config(tmp_path / 'run', optim_wrapper=ausam, custom_hooks=[])).train()
    (block,) = printed
    title, *lines = block.split('\n')
    assert title == 'AUSAMOptimWrapper around Adam'
    assert [line.split()[0] for line in lines] == ['rho:', 'perturbed:', 'samples:', 'losses:', 'cost:']
    for part in (
        "0.02 of each tensor's norm",
        "perturb='weights'",
        '2 of 4 in both passes',
        'square_loss',
        '1.50 times',
    ):
        assert part in block


def test_other_wrappers_are_not_spoken_of(tmp_path: Path, printed: list[str]) -> None:
    plain = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
    hooks = [dict(type='SampleHistoryHook')]  # which makes it a run that uses this package
    Runner.from_cfg(toy_config(tmp_path / 'run', optim_wrapper=plain, custom_hooks=hooks)).train()
    assert printed == []


# ---------------------------------------------------------------- the console
def names(line: str) -> list[str]:
    return [part.split(':')[0] for part in line.split('  ') if ':' in part]


def logged(runner: Runner) -> tuple[dict[str, float], str]:
    tag, line = runner.log_processor.get_log_after_iter(runner, 4, 'train')
    return tag, line


def test_the_console_has_four_of_ours_and_the_backends_all(tmp_path: Path) -> None:
    runner = Runner.from_cfg(toy_config(tmp_path / 'run'))
    runner.train()
    tag, line = logged(runner)
    assert names(line)[-4:] == SHOWN
    assert not {'L_w', 'pass2_share', 'share_head'} & set(names(line))
    assert 'sharpness/' not in line
    assert {f'sharpness/{name}' for name in (*SHOWN, 'L_w', 'L_w_e', 'pass2_share', 'share_head')} <= tag.keys()
    assert not set(SHOWN) & tag.keys()
    assert f'sharpness: {tag["sharpness/sharpness"]:.4f}' in line


def test_without_our_scalars_the_line_is_mmengines(tmp_path: Path) -> None:
    runner = Runner.from_cfg(toy_config(tmp_path / 'run', custom_hooks=[]))
    runner.train()
    assert 'get_log_after_iter' not in vars(runner.log_processor)
    before = logged(runner)
    shorten_console_line(runner.log_processor, runner.message_hub, [''])
    assert logged(runner) == before


def hub_of(*keys: str) -> MessageHub:
    hub = MessageHub('-'.join(keys))
    hub.log_scalars.update({key: HistoryBuffer([float(number)], [1]) for number, key in enumerate(keys)})
    return hub


def test_several_wrappers_share_the_four() -> None:
    class Processor(LogProcessor):
        def get_log_after_iter(self, runner: Any, batch_idx: int, mode: str) -> tuple[dict[str, float], str]:
            return {}, ' '.join(hub.log_scalars)

    hub = hub_of('train/loss', *(f'train/sharpness/{w}.{name}' for w in 'abc' for name in (*SHOWN, 'L_w')))
    before = dict(hub.log_scalars)
    processor = Processor()
    for _ in range(2):  # a second training of the same runner
        shorten_console_line(processor, hub, ['a.', 'b.', 'c.']).update(hub.log_scalars)
    assert processor.get_log_after_iter(None, 0, 'train')[1] == (
        'train/loss train/a.sharpness train/b.sharpness train/c.sharpness'
    )
    assert list(hub.log_scalars.items()) == list(before.items())
