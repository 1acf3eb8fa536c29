"""AUSAM at its edges: smallest batches, values that are not finite, steps that fail, samples without an id."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from mm_sharp.samples.keys import SampleIdError
from tests.references_ausam import ReferenceAUSAM, mean_sizes, mean_squares, terms
from tests.toys import NaNSecond, Notes, ToyNet, batches, make, same_bits, same_state
from tests.wrappers import build, momentum_sgd, same_weights

both = pytest.mark.parametrize('name', ['ausam', 'ausam-reweight'])


def seen(wrapper: Any, count: int = 8) -> dict[int, float]:
    """The scores in the history as it is now, by id."""
    scores = wrapper.history.scores([('', i) for i in range(count)])
    return {i: scores[i] for i in np.flatnonzero(~np.isnan(scores))}


def visits_of(wrapper: Any) -> dict[int, int]:
    fields = wrapper.history.state_dict()['data_sets'].get('', {'ids': torch.empty(0), 'visits': torch.empty(0)})
    return dict(zip(fields['ids'].tolist(), fields['visits'].tolist(), strict=True))


# -------------------------------------------------------------------- sizes
@both
@pytest.mark.parametrize('size', [1, 5])
def test_where_all_samples_are_drawn_the_step_is_sams(name: str, size: int) -> None:
    """Batches of one sample, and K = N."""
    ours, theirs = make(), make()
    wrapper = build(name, ours, **({} if size == 1 else {'sampling_ratio': 1.0}))
    sam = build('sam', theirs)
    for batch in batches(4, size) * 2:
        ours.train_step(batch, wrapper)
        theirs.train_step(batch, sam)
        assert wrapper._draw.chosen.tolist() == list(range(size))
        assert wrapper._draw.pi.tolist() == [1.0] * size
    assert same_weights(name, ours, theirs)
    wrapper.exchange_history()
    assert visits_of(wrapper) == dict.fromkeys(range(4 * size), 2)


@both
def test_batches_of_changing_size(name: str) -> None:
    model = make()
    wrapper = build(name, model)
    (whole,) = batches(1, 13)
    expected = {size: -(-6 * size // 10) for size in (13, 1, 2, 3, 7)}
    for size, count in [*expected.items()] * 2:
        model.train_step({key: value[:size] for key, value in whole.items()}, wrapper)
        assert len(wrapper._draw.chosen) == count
        assert wrapper._draw.size == size
    wrapper.exchange_history()
    assert sum(visits_of(wrapper).values()) == 2 * sum(expected.values())


@both
def test_a_sample_that_is_several_times_in_a_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    wrapper = build(name, model, sampling_ratio=1.0)
    (batch,) = batches(1)
    batch['sample_idx'] = torch.tensor([3, 3, 3, 1, 1, 0, 2, 4])
    measured: list[Any] = []
    add = wrapper.pending_updates.add
    monkeypatch.setattr(
        wrapper.pending_updates, 'add', lambda keys, values: (measured.append(values), add(keys, values))
    )
    model.train_step(batch, wrapper)
    wrapper.exchange_history()
    (values,) = (torch.from_numpy(copy.numpy()) for copy in measured)
    assert visits_of(wrapper) == {0: 1, 1: 2, 2: 1, 3: 3, 4: 1}
    assert seen(wrapper)[3] == pytest.approx(values[:3].abs().mean().item(), rel=1e-6)
    assert seen(wrapper)[1] == pytest.approx(values[3:5].abs().mean().item(), rel=1e-6)
    wrapper.drawer.schedule = replace(wrapper.drawer.schedule, sampling_ratio=0.3)
    model.train_step(batch, wrapper)
    assert len(set(wrapper._draw.pi[:3])) == len(set(wrapper._draw.pi[3:5])) == 1
    assert len(set(wrapper._draw.pi)) == 5
    assert len(set(wrapper._draw.chosen.tolist())) == 3


# -------------------------------------------------------------------- values that are not finite
@both
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_first_gradient_that_is_not_finite_is_no_visit(name: str, bad: float) -> None:
    model = make(NaNSecond, factors={2: bad})
    wrapper = build(name, model, sampling_ratio=1.0)
    first, second, third = batches(3)
    model.train_step(first, wrapper)
    model.train_step(second, wrapper)
    assert np.isnan(wrapper.last_step.metrics()['mean_difference'])
    model.train_step(third, wrapper)
    wrapper.exchange_history()
    assert visits_of(wrapper).keys() == {*range(8), *range(16, 24)}
    assert all(torch.isfinite(p).all() for p in model.parameters())


class Spoilt(ToyNet):
    """The target of one sample is corrupted in one of the two passes of each step; no BatchNorm spreads it."""

    def __init__(self, sample: int, value: float, in_pass: int) -> None:
        super().__init__(norm=False)
        self.sample, self.value, self.in_pass, self.forwards = sample, value, in_pass, Notes()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        if len(self.forwards) % 2 == self.in_pass:
            targets = torch.where((sample_idx == self.sample)[:, None], self.value, targets)
        self.forwards.append(None)
        return super().forward(inputs, targets, sample_idx, mode)


@both
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_one_samples_loss_that_is_not_finite(name: str, bad: float) -> None:
    """Where it is drawn, there is no perturbation, and so no visit of any sample; where it is not, nothing happens."""
    outcomes = set()
    for seed in range(6):
        torch.manual_seed(seed)
        model = make(Spoilt, sample=3, value=bad, in_pass=0)
        wrapper = build(name, model)
        model.train_step(batches(1)[0], wrapper)
        drawn = 3 in wrapper._draw.chosen
        wrapper.exchange_history()
        assert seen(wrapper).keys() == (set() if drawn else set(wrapper._draw.chosen))
        outcomes.add(drawn)
    assert outcomes == {True, False}


@both
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_the_history_takes_only_finite_values(name: str, bad: float) -> None:
    """A sample's loss is lost in the second pass alone: the others' differences are as good as ever."""
    model, other = make(Spoilt, sample=3, value=bad, in_pass=1), make(Spoilt, sample=3, value=bad, in_pass=9)
    wrapper, sound = (build(name, m, sampling_ratio=1.0) for m in (model, other))
    (batch,) = batches(1)
    for m, w in ((model, wrapper), (other, sound)):
        m.train_step(batch, w)
        w.exchange_history()
    assert seen(wrapper).keys() == {0, 1, 2, 4, 5, 6, 7}
    assert seen(wrapper) == {i: score for i, score in seen(sound).items() if i != 3}


# -------------------------------------------------------------------- when visits are written
@both
def test_visits_are_written_when_the_next_step_begins(name: str) -> None:
    model, twin = make(), make()
    wrapper = build(name, model)
    reference = ReferenceAUSAM(
        twin, momentum_sgd(twin), terms(mean_squares, mean_sizes), reweight=wrapper.reweight, history_momentum=0.8
    )
    (batch,) = batches(1)
    model.train_step(batch, wrapper)
    assert len(wrapper.history) == 0
    reference.step(batch, wrapper._draw.chosen.tolist())
    with wrapper.optim_context(model):
        losses = model(**batch)
        assert seen(wrapper) == {i: pytest.approx(score) for i, (score, _) in reference.history.items()}
        assert visits_of(wrapper) == dict.fromkeys(reference.history, 1)
    wrapper.update_params(model.parse_losses(losses)[0])
    assert visits_of(wrapper) == dict.fromkeys(reference.history, 1)


@both
def test_a_checkpoint_holds_the_visits_of_the_last_step(name: str) -> None:
    """And to write one changes nothing."""
    ours, theirs = make(), make()
    wrapper, preserved_eval_mode = build(name, ours), build(name, theirs)
    for batch in batches(2) * 3:
        ours.train_step(batch, wrapper)
        theirs.train_step(batch, preserved_eval_mode)
        other = build(name, make())
        other.load_state_dict(wrapper.state_dict())
        other.exchange_history()
        assert sum(visits_of(other).values()) == 5 * wrapper.steps
    for w in (wrapper, preserved_eval_mode):
        w.exchange_history()
    assert seen(wrapper, 16) == seen(other, 16) == seen(preserved_eval_mode, 16)
    assert visits_of(wrapper) == visits_of(other) == visits_of(preserved_eval_mode)
    assert same_state(ours, theirs)


# -------------------------------------------------------------------- steps that fail
class Failing(ToyNet):
    """Raises in the forward passes whose numbers are given."""

    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.numbers, self.forwards = Notes(numbers), Notes()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        number = len(self.forwards)
        if number in self.numbers:
            self.numbers.remove(number)
            raise KeyboardInterrupt
        losses = super().forward(inputs, targets, sample_idx, mode)
        self.forwards.append(None)
        return losses


@both
@pytest.mark.parametrize('number', [4, 5], ids=['first pass', 'second pass'])
def test_a_step_that_fails_is_no_visit_and_draws_the_same_again(name: str, number: int) -> None:
    failing, sound = make(Failing), make(Failing)
    wrapper, other = build(name, failing), build(name, sound)
    data = batches(2) * 3
    for batch in data[:2]:
        failing.train_step(batch, wrapper)
        sound.train_step(batch, other)
    failing.numbers = Notes([number])
    with pytest.raises(KeyboardInterrupt):
        failing.train_step(data[2], wrapper)
    failed = wrapper._draw
    assert wrapper.steps == 2
    failing.forwards = [None] * 4
    failing.train_step(data[2], wrapper)
    assert wrapper._draw.chosen.tolist() == failed.chosen.tolist()
    assert wrapper._draw.pi.tolist() == failed.pi.tolist()
    sound.train_step(data[2], other)
    for batch in data[3:]:
        failing.train_step(batch, wrapper)
        sound.train_step(batch, other)
    for w in (wrapper, other):
        w.exchange_history()
    assert visits_of(wrapper) == visits_of(other)
    assert seen(wrapper, 16) == seen(other, 16)
    assert same_state(failing, sound)


@both
def test_an_optimizer_that_fails_leaves_no_visit(name: str) -> None:
    model = make()

    class Broken(SGD):
        def step(self, closure: Any = None) -> None:
            raise MemoryError

    wrapper = build(name, model, Broken(model.parameters(), lr=0.1))
    with pytest.raises(MemoryError):
        model.train_step(batches(1)[0], wrapper)
    wrapper.exchange_history()
    assert len(wrapper.history) == 0
    assert wrapper.steps == 0


@both
def test_a_forward_without_update_params_is_no_step(name: str) -> None:
    """Somebody looks at the loss and goes on: the next step draws the same."""
    ours, theirs = make(norm=False), make(norm=False)
    wrapper, preserved_eval_mode = build(name, ours), build(name, theirs)
    for number, batch in enumerate(batches(2) * 2):
        if number % 2:
            with wrapper.optim_context(ours):
                ours(**batch)
        ours.train_step(batch, wrapper)
        theirs.train_step(batch, preserved_eval_mode)
        assert wrapper._draw.chosen.tolist() == preserved_eval_mode._draw.chosen.tolist()
    assert same_state(ours, theirs)


# -------------------------------------------------------------------- samples without an id
@both
def test_samples_without_an_id_are_refused_and_everything_restored(name: str) -> None:
    model = make()
    wrapper = build(name, model)
    first, second = batches(2)
    model.train_step(first, wrapper)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = len(model._forward_pre_hooks), len(model._forward_hooks), len(model.square_loss._forward_hooks)
    random_state, steps = torch.get_rng_state(), wrapper.steps
    nameless = {key: value for key, value in second.items() if key != 'sample_idx'}
    with pytest.raises(SampleIdError) as error:
        model.train_step(nameless, wrapper)
    message = str(error.value)
    assert message.startswith('AUSAMOptimWrapper has to know every sample again, but found')
    assert "dict(type='PackPoseInputs', meta_keys=('id', 'img_id', 'dataset_name', ...))" in message
    assert "train_dataloader = dict(dataset=dict(_delete_=True, type='IndexedDataset'" in message
    assert all(same_bits(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert (len(model._forward_pre_hooks), len(model._forward_hooks), len(model.square_loss._forward_hooks)) == hooks
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (wrapper.steps, wrapper.inner_count) == (steps, 1)
    model.train_step(second, wrapper)
    wrapper.exchange_history()
    assert sum(visits_of(wrapper).values()) == 10


@pytest.mark.parametrize(
    'ids',
    [torch.arange(7), torch.linspace(0, 1, 8), torch.arange(8.0), torch.zeros(8, 2).long()],
    ids=['too few', 'fractions', 'floats', 'two columns'],
)
def test_ids_that_are_none(ids: Tensor) -> None:
    model = make()
    (batch,) = batches(1)
    with pytest.raises(SampleIdError, match=r"type='IndexedDataset'"):
        model.train_step({**batch, 'sample_idx': ids}, build('ausam', model))
