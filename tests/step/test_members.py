"""Several wrappers that are trained side by side draw independently; one by itself draws as ever."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.optim import OptimWrapperDict
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import Tensor

from mm_sharp import AUSAMOptimWrapper, ESAMOptimWrapper
from mm_sharp.samples.history import Keys
from mm_sharp.samples.seeds import RngStream, make_generator
from tests.checkpoints import through_disk
from tests.toys import Batch, Notes, ToyNet, ToyPair, batches, make, toy_config
from tests.wrappers import momentum_sgd

STEPS = 8
BATCHES = batches(STEPS, 12)


class Noting(ToyNet):
    """Notes the samples that come."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.seen: list[list[int]] = Notes()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        self.seen.append(sample_idx.tolist())
        return super().forward(inputs, targets, sample_idx, mode)


def drawer(model: ToyNet) -> AUSAMOptimWrapper:
    return AUSAMOptimWrapper(momentum_sgd(model), sampling_ratio=0.5, s_min=1.0)


def train(pairs: list[tuple[ToyNet, Any]], first: int = 0, last: int = STEPS) -> list[list[list[int]]]:
    """Each step of all, in turn; returns the samples of each one's first passes."""
    for batch in BATCHES[first:last]:
        for model, wrapper in pairs:
            model.train_step(batch, wrapper)
    drawn = [model.seen[::2] for model, _ in pairs]
    for model, _ in pairs:
        model.seen = []
    return drawn


def pair(seeds: tuple[int, int] = (1, 2)) -> list[tuple[ToyNet, AUSAMOptimWrapper]]:
    torch.manual_seed(0)
    models = [make(Noting, seed=seed) for seed in seeds]
    return [(model, drawer(model)) for model in models]


def ids_of(batch: Batch) -> Keys:
    return [('', number) for number in batch['sample_idx'].tolist()]


def equal_steps(left: list[Any], right: list[Any]) -> int:
    return sum(a == b for a, b in zip(left, right, strict=True))


# -------------------------------------------------------------------- without a Runner
def test_one_by_itself_draws_by_seed_and_step_alone() -> None:
    ((model, wrapper), _) = pair()
    for step, batch in enumerate(BATCHES):
        model.train_step(batch, wrapper)
        expected = wrapper.drawer.draw(ids_of(batch), make_generator(0, RngStream.SAMPLES, 0, step))
        assert wrapper._draw is not None
        assert wrapper._draw.chosen.tolist() == expected.chosen.tolist()


def test_trainings_after_each_other_are_each_by_themselves() -> None:
    first, second = pair()
    assert train([first]) == train([second]) == train([pair()[1]])


@pytest.mark.parametrize('stop', [1, 2, 5])
def test_they_go_on_from_their_checkpoints(stop: int) -> None:
    straight = train(pair())
    broken_off = pair()
    begun = train(broken_off, 0, stop)
    states = [(copy.deepcopy(model.state_dict()), through_disk(w.state_dict())) for model, w in broken_off]
    train(pair((5, 6)))  # another training in between
    resumed = pair((3, 4))
    for (model, wrapper), (weights, state) in zip(resumed, states, strict=True):
        model.load_state_dict(weights)
        wrapper.load_state_dict(state)
    ended = train(resumed, stop)
    assert [a + b for a, b in zip(begun, ended, strict=True)] == straight


def test_a_checkpoint_from_before_members_goes_on_as_it_drew() -> None:
    torch.manual_seed(0)
    ((model, wrapper), _) = pair()
    straight = train([(model, wrapper)])
    ((model, wrapper), _) = pair()
    train([(model, wrapper)], 0, 3)
    state = through_disk(wrapper.state_dict())
    del state['mm_sharp']['member']
    ((other, resumed), _) = pair((7, 8))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    assert train([(other, resumed)], 3) == [straight[0][3:]]


def test_shared_draws_differ_from_member_to_member_too() -> None:
    torch.manual_seed(0)
    seeds = set()
    for number in range(2):
        wrapper = ESAMOptimWrapper(momentum_sgd(make(Noting)))
        wrapper.number = number
        seeds.add(wrapper.generator(RngStream.MASK, shared=True).initial_seed())
    assert len(seeds) == 2


# -------------------------------------------------------------------- in a Runner
@MODELS.register_module()
class AlikePair(ToyPair):
    """Two models with the same weights, and the samples that each was given."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = make(Noting, seed=1), make(Noting, seed=1)

    def train_step(self, data: dict[str, Tensor], optim_wrapper: OptimWrapperDict) -> dict[str, Tensor]:
        for name, part in (('left', self.left), ('right', self.right)):
            part.train_step(data, optim_wrapper[name])
        return {'loss': torch.zeros(())}


def test_members_of_a_dict_draw_independently_from_the_first_step_on(tmp_path: Path) -> None:
    """Even where their weights are the same; the first one draws as a wrapper by itself."""
    torch.manual_seed(0)
    runs = []
    for name in ('pair', 'again'):
        model = AlikePair()
        wrappers = OptimWrapperDict(left=drawer(model.left), right=drawer(model.right))
        config = toy_config(tmp_path / name, model=model, optim_wrapper=wrappers, custom_hooks=[])
        config['train_dataloader'].update(dataset=dict(type='ToySamples', count=48), batch_size=12)
        runner = Runner(**config)
        runner.train()
        runs.append((model.left.seen[::2], model.right.seen[::2]))
    left, right = runs[0]
    assert len(left) == 8
    assert equal_steps(left, right) == 0
    assert runs[0] == runs[1]


def test_the_first_member_draws_as_if_it_were_alone() -> None:
    (left, right) = pair()
    for number, (_, wrapper) in enumerate((left, right)):
        wrapper.number = number
    both = train([left, right])
    assert left[1].own_state()['member'] == {'number': 0}
    assert [both[0]] == train([pair()[0]])
    assert equal_steps(*both) == 0
