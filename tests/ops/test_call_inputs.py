"""What a forward pass does to its inputs does not reach the next one; the caller's batch is changed by the first."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor, nn

from mm_sharp.ops.call_inputs import InputSnapshot, Kept, fresh
from mm_sharp.ops.rare_changes import RareChanges
from tests.toys import Notes, same_bits
from tests.wrappers import DISTINCT, build, momentum_sgd, same_weights

everywhere = pytest.mark.parametrize('name', [name for name in DISTINCT if 'loader' not in name])


class Sampled(BaseModel):
    """A linear model on data samples with labels and instances, which subclasses change."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.label_loss, self.point_loss = nn.CrossEntropyLoss(), nn.MSELoss()

    def spoil(self, inputs: Tensor, data_samples: list[Any]) -> Tensor:
        return inputs

    def forward(self, inputs: Tensor, data_samples: list[Any], mode: str = 'loss') -> Any:
        output = self.net(self.spoil(inputs, data_samples))
        labels = torch.stack([sample.label for sample in data_samples])
        points = torch.stack([sample.gt_instances.points for sample in data_samples])
        return {'loss': self.label_loss(output, labels), 'loss_points': self.point_loss(output, points)}


class InPlace(Sampled):
    def spoil(self, inputs: Tensor, data_samples: list[Any]) -> Tensor:
        return inputs.sub_(0.5).div_(0.5)


class PastAutograd(Sampled):
    def spoil(self, inputs: Tensor, data_samples: list[Any]) -> Tensor:
        inputs.numpy()[...] *= 2
        return inputs


class Replaced(Sampled):
    def spoil(self, inputs: Tensor, data_samples: list[Any]) -> Tensor:
        for sample in data_samples:
            sample.label = (sample.label + 1) % 3
            sample.gt_instances.points = sample.gt_instances.points * 2
        return inputs


class LabelsInPlace(Sampled):
    def spoil(self, inputs: Tensor, data_samples: list[Any]) -> Tensor:
        for sample in data_samples:
            sample.label.add_(1).remainder_(3)
            sample.gt_instances.points.mul_(2)
        return inputs


class Popped(Sampled):
    def spoil(self, inputs: Tensor, data_samples: list[Any]) -> Tensor:
        for sample in data_samples:
            sample.gt_instances.points = sample.pop('spare')
            sample.set_metainfo({'visits': sample.get('visits', 0) + 1})
            inputs = inputs * sample.visits
        return inputs


KINDS = (InPlace, PastAutograd, Replaced, LabelsInPlace, Popped)


def sampled_batch(size: int = 6, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number in range(size):
        sample = BaseDataElement(metainfo=dict(id=number, dataset_name='toy'))
        sample.label = torch.randint(3, (), generator=generator)
        sample.gt_instances = InstanceData(points=torch.randn(3, generator=generator))
        sample.spare = torch.randn(3, generator=generator)
        samples.append(sample)
    return dict(inputs=torch.randn(size, 4, generator=generator), data_samples=samples)


@everywhere
@pytest.mark.parametrize('kind', KINDS)
def test_what_a_pass_does_to_its_inputs_does_not_reach_the_next(name: str, kind: type[Sampled]) -> None:
    """And the caller's own batch is changed as the base optimizer's forward changes it, once."""
    torch.manual_seed(1)
    ours = kind().train()
    base = copy.deepcopy(ours)
    wrapper = build(name, ours, whole=True, rho=0.0)
    if name.startswith('esam'):
        wrapper.beta = 1.0
    plain = OptimWrapper(momentum_sgd(base))
    for number in range(3):
        left, right = sampled_batch(seed=number), sampled_batch(seed=number)
        ours.train_step(left, wrapper)
        base.train_step(right, plain)
        assert same_bits(left['inputs'], right['inputs'])
        assert all(map(_same_sample, left['data_samples'], right['data_samples']))
    assert same_weights(name, ours, base)


def _same_sample(left: Any, right: Any) -> bool:
    same = [*left.keys()] == [*right.keys()] and dict(left.metainfo_items()) == dict(right.metainfo_items())
    return (
        same and same_bits(left.label, right.label) and same_bits(left.gt_instances.points, right.gt_instances.points)
    )


def test_esam_selects_and_trains_on_the_same_inputs() -> None:
    """Three forwards, of which the third is on some of the samples: all on what was handed over."""
    seen: list[Tensor] = []

    class Noted(InPlace):
        def spoil(self, inputs: Tensor, data_samples: list[Any]) -> Tensor:
            seen.append(inputs.clone())
            return super().spoil(inputs, data_samples)

    model = Noted()
    wrapper = build('esam', model)
    batch = sampled_batch()
    before = batch['inputs'].clone()
    model.train_step(batch, wrapper)
    first, second, third = seen
    assert same_bits(first, before)
    assert same_bits(second, before)
    assert all(any(same_bits(row, other) for other in before) for row in third)


@contextmanager
def further_pass(kept: Kept) -> Iterator[Any]:
    """The arguments of a pass after the first one."""
    memo = {} if kept.shared is None else kept.shared.begin_pass()
    yield fresh(kept.arguments, kept.may_write, memo=memo)
    if kept.shared is not None:
        kept.shared.end_pass()


def shares(kept: Kept, batch: dict[str, Any], number: int = 0) -> bool:
    """Whether a further pass gets the caller's own data sample of that number."""
    with further_pass(kept) as arguments:
        return arguments['data_samples'][number] is batch['data_samples'][number]


def test_inputs_are_copied_in_few_steps() -> None:
    snapshot, copied = InputSnapshot(), []
    batch = sampled_batch()
    sample = batch['data_samples'][0]
    for number in range(1, 31):
        kept = snapshot.take(batch)
        snapshot.check()
        with further_pass(kept) as arguments:
            is_copy = arguments['inputs'] is not batch['inputs']
            assert (arguments['data_samples'][0].label is not sample.label) == is_copy
            assert (arguments['data_samples'][0] is not sample) == is_copy
            assert arguments['data_samples'] is not batch['data_samples']
        if is_copy:
            copied.append(number)
    assert copied == [*range(1, 11), 15, 21, 28]
    kept = snapshot.take(batch)
    batch['data_samples'][2].gt_instances.points.mul_(2)
    snapshot.check()
    assert shares(kept, batch)
    assert snapshot.take(batch).may_write, 'a change is seen though nothing was copied'


@pytest.mark.parametrize(
    'odd', [[1], torch.eye(3).to_sparse(), torch.ones(3, requires_grad=True)], ids=['a list', 'sparse', 'a leaf']
)
def test_samples_with_unusual_fields_are_copied_in_every_step(odd: Any) -> None:
    snapshot, batch = InputSnapshot(), sampled_batch()
    batch['data_samples'][3].odd = odd
    for _ in range(13):
        kept = snapshot.take(batch)
        snapshot.check()
        assert not shares(kept, batch, 3)


CHANGES: dict[str, Callable[[Any], None]] = {
    'an added field': lambda sample: sample.set_field(1, 'new'),
    'a removed field': lambda sample: sample.pop('label'),
    'a replaced tensor': lambda sample: setattr(sample, 'label', sample.label + 1),
    'of a sample within': lambda sample: sample.gt_instances.set_field(torch.zeros(1), 'new'),
    'a sample within that is replaced': lambda sample: setattr(sample, 'gt_instances', sample.gt_instances.new()),
}


def contents(sample: Any) -> list[Any]:
    within = sample.gt_instances
    return [
        *(sorted(sample.keys()), sorted(sample.metainfo_keys()), sample.get('label'), id(sample.get('label'))),
        *(sorted(within.keys()), within.get('points'), id(within.get('points'))),
    ]


def same_contents(left: list[Any], right: list[Any], *, copied: bool) -> bool:
    """Whether two :func:`contents` are equal; of copies without the objects' identity."""
    if copied:
        left, right = [[item for item in found if not isinstance(item, int)] for found in (left, right)]
    return all(a.equal(b) if isinstance(a, Tensor) else a == b for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize('step', [1, 12, 15])
@pytest.mark.parametrize('change', CHANGES)
def test_a_sample_that_a_model_changes_is_what_it_was_in_the_second_pass(change: str, step: int) -> None:
    """Whenever it begins: in step 12 the passes of a model that has done nothing to samples share them."""
    snapshot, batch = InputSnapshot(), sampled_batch()
    batch['data_samples'].append(batch['data_samples'][1])  # one sample twice stays one
    for _ in range(step - 1):
        kept = snapshot.take(batch)
        snapshot.check()
        with further_pass(kept) as arguments:
            assert arguments['data_samples'][1].label.equal(batch['data_samples'][1].label)
    sample = batch['data_samples'][1]
    before = contents(sample)
    kept = snapshot.take(batch)
    CHANGES[change](sample)
    snapshot.check()
    changed = contents(sample)
    with further_pass(kept) as arguments:
        twin = arguments['data_samples'][1]
        assert twin is arguments['data_samples'][-1]
        assert twin is not sample
        assert same_contents(contents(twin), before, copied=kept.may_write)
    assert contents(sample) == changed, "the caller's own stays as the first pass has left it"
    later = snapshot.take(batch)
    assert not shares(later, batch)


@pytest.mark.parametrize('change', CHANGES)
def test_what_a_further_pass_does_to_shared_samples_is_undone(change: str) -> None:
    """ESAM's third pass, and the caller, find them as they were; from then on there are copies."""
    snapshot, batch = InputSnapshot(), sampled_batch()
    for _ in range(11):
        kept = snapshot.take(batch)
        snapshot.check()
    sample = batch['data_samples'][1]
    before = contents(sample)
    for _ in range(2):
        with further_pass(kept) as arguments:
            assert arguments['data_samples'][1] is sample
            assert same_contents(contents(sample), before, copied=False)
            CHANGES[change](sample)
    assert same_contents(contents(sample), before, copied=False)
    later = snapshot.take(batch)
    assert not shares(later, batch)


def test_tensors_that_a_further_pass_writes_to_are_copied_from_the_next_step_on() -> None:
    snapshot, batch = InputSnapshot(), sampled_batch()
    for _ in range(11):
        kept = snapshot.take(batch)
        snapshot.check()
    with further_pass(kept) as arguments:
        arguments['inputs'].mul_(2)
    assert all(snapshot.take(batch).may_write for _ in range(5))


@pytest.mark.parametrize('meta', [{'f': 3.0}, {'deep': {'f': [3.0]}}, [3.0]], ids=['dict', 'nested', 'list'])
def test_lists_and_dicts_in_meta_information_are_watched(meta: Any) -> None:
    """From a model that changes them every pass gets copies in every step, and not in the first steps alone."""

    class InMeta(Sampled):
        def spoil(self, inputs: Tensor, data_samples: list[Any]) -> Tensor:
            factors = []
            for sample in data_samples:
                held = sample.camera.get('deep', sample.camera) if isinstance(sample.camera, dict) else sample.camera
                key = 'f' if isinstance(held, dict) else 0
                if isinstance(held[key], list):
                    held, key = held[key], 0
                held[key] = held[key] / 2
                factors.append(held[key])
            return inputs * torch.tensor(factors)[:, None]

    torch.manual_seed(1)
    ours = InMeta().train()
    base = copy.deepcopy(ours)
    wrapper, plain = build('sam', ours, rho=0.0), OptimWrapper(momentum_sgd(base))
    for number in range(13):
        for model, wrap in ((ours, wrapper), (base, plain)):
            batch = sampled_batch(seed=number)
            for sample in batch['data_samples']:
                sample.set_metainfo(dict(camera=copy.deepcopy(meta)))
            model.train_step(batch, wrap)
    assert same_weights('sam', ours, base)


def test_esam_trains_on_what_was_handed_over_though_its_selection_changes_samples() -> None:
    """Of a model that keeps predictions in passes without a gradient, which the first pass is none of."""
    seen: list[bool] = Notes()

    class Predicting(Sampled):
        def spoil(self, inputs: Tensor, data_samples: list[Any]) -> Tensor:
            seen.append(any('prior' in sample for sample in data_samples))
            if not torch.is_grad_enabled():
                for sample in data_samples:
                    sample.prior = sample.label + 1
            return inputs

    model = Predicting()
    wrapper = build('esam', model)
    for number in range(14):
        batch = sampled_batch(seed=number)
        model.train_step(batch, wrapper)
        assert not any('prior' in sample for sample in batch['data_samples'])
    assert len(seen) == 3 * 14
    assert not any(seen)


def test_samples_may_be_changed_between_the_forward_and_update_params() -> None:
    class Weighted(Sampled):
        def spoil(self, inputs: Tensor, data_samples: list[Any]) -> Tensor:
            return inputs * torch.stack([sample.spare[0] for sample in data_samples])[:, None]

    torch.manual_seed(1)
    ours = Weighted().train()
    base = copy.deepcopy(ours)
    for model, wrap in ((ours, build('sam', ours, rho=0.0)), (base, OptimWrapper(momentum_sgd(base)))):
        for number in range(13):
            batch = sampled_batch(seed=number)
            with wrap.optim_context(model):
                losses = model(**batch)
            for sample in batch['data_samples']:
                sample.spare = sample.spare * 2
            wrap.update_params(model.parse_losses(losses)[0])
            assert torch.equal(batch['data_samples'][0].spare, sampled_batch(seed=number)['data_samples'][0].spare * 2)
    assert same_weights('sam', ours, base)


def test_a_change_of_shape_counts_where_the_host_does_not_wait() -> None:
    class Elsewhere(Tensor):
        device = property(lambda self: torch.device('meta'))  # type: ignore[assignment]

    rare, tensor = RareChanges(), torch.zeros(3, 5).as_subclass(Elsewhere)
    assert rare.next_step()
    rare.watch([tensor], [torch.zeros(3, 5).as_subclass(Elsewhere)])
    tensor.t_()
    assert rare.changed()
    assert rare.every_step


def test_a_sample_that_is_drawn_twice_is_two_for_the_trial_of_a_uniform_draw() -> None:
    """Whether a loss is a mean or a sum is found by a forward on samples that come twice; this one changes each."""

    class Doubling(Sampled):
        def forward(self, inputs: Tensor, data_samples: list[Any], mode: str = 'loss') -> Any:
            for sample in data_samples:
                sample.gt_instances.points = sample.gt_instances.points * 2
                sample.spare.add_(1)
            targets = [sample.gt_instances.points + sample.spare for sample in data_samples]
            labels = [sample.pop('label') for sample in data_samples]
            output = self.net(inputs)
            return {
                'loss': self.point_loss(output, torch.stack(targets)),
                'loss_label': self.label_loss(output, torch.stack(labels)),
            }

    model = Doubling()
    wrapper: Any = build('ausam-uniform', model, whole_first_epoch=False)
    model.train_step(sampled_batch(), wrapper)
    assert {reduction.name for reduction in wrapper._scale.reductions.values()} == {'MEAN'}


def test_one_object_stays_one_for_every_pass() -> None:
    class Twice(Sampled):
        def spoil(self, inputs: Tensor, data_samples: list[Any]) -> Tensor:
            data_samples[0].label.add_(1).remainder_(3)  # which is the last one's, too
            return inputs

    torch.manual_seed(1)
    ours = Twice().train()
    base = copy.deepcopy(ours)
    wrapper, plain = build('sam', ours, rho=0.0), OptimWrapper(momentum_sgd(base))
    for model, wrap in ((ours, wrapper), (base, plain)):
        batch = sampled_batch()
        batch['data_samples'][-1] = batch['data_samples'][0]
        with wrap.optim_context(model):
            losses = model(**batch)
        wrap.update_params(model.parse_losses(losses)[0])
    assert same_weights('sam', ours, base)


def test_inputs_in_containers_of_other_kinds() -> None:
    point = namedtuple('point', 'x y')
    given = OrderedDict(a=torch.ones(3), b=point(torch.ones(2), [torch.zeros(1)]), c=np.ones(2))
    given['again'] = given['a']
    strided = given['d'] = torch.arange(12.0).view(3, 4)[:, ::2]
    odd = given['e'] = torch.eye(3).to_sparse()
    kept = fresh(given, True)
    assert type(kept) is OrderedDict
    assert isinstance(kept['b'], point)
    assert kept['again'] is kept['a']
    assert kept['a'] is not given['a']
    assert kept['b'].y is not given['b'].y
    assert kept['c'] is not given['c']
    assert kept['d'].stride() == strided.stride()
    assert same_bits(kept['d'], strided)
    assert kept['e'] is odd
    leaf = torch.ones(3, requires_grad=True)
    other = fresh([leaf], False)[0]
    other.sum().backward()
    assert leaf.grad is None
    assert other.requires_grad
