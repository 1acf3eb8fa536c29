"""A policy within a budget of time: what is chosen, against trying every count, with times that are given."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from mm_sharp.analysis.post_training import latency_budget
from mm_sharp.analysis.post_training.latency_budget import (
    LatencyBudget,
    Search,
    most_that_fit,
    spared_in_order,
    target_of,
)
from mm_sharp.analysis.post_training.proposal import Candidate
from mm_sharp.analysis.post_training.sensitivity import Sensitivity
from mm_sharp.errors import UsageError
from mm_sharp.quantization.latency import Latency
from tests.mmpose_cases import QUIET

pytestmark = QUIET
WEIGHTS = {'a': 100, 'b': 300, 'c': 200, 'd': 50}
COSTS = {
    'a': {'float': 0.0, 'w4': 5.0, 'w8': 0.1},
    'b': {'float': 0.0, 'w4': 2.0, 'w8': -0.1},  # noise: fewer bits can look better
    'c': {'float': 0.0, 'w4': -0.1, 'w8': 0.1},
    'd': {'float': 0.0, 'w4': 9.0, 'w8': 0.2},
}
POLICIES: dict[str, Any] = {
    'w4': dict(weight_bit_width=4, first_layers='same', last_layers='same'),
    'w8': dict(weight_bit_width=8, first_layers='same', last_layers='same'),
}


@pytest.mark.parametrize('most', [0, 1, 2, 7, 8])
def test_halving_finds_what_trying_every_count_finds(most: int) -> None:
    for limit in range(most + 1):
        tried: list[int] = []

        def fits(count: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(count)
            return count <= limit

        assert most_that_fit(most, fits) == max(count for count in range(most + 1) if count <= limit)
        assert len(tried) == len({*tried}) <= 4


def test_times_that_do_not_only_grow_still_give_one_that_fits() -> None:
    for answers in product([True, False], repeat=6):
        fits = (True, *answers)
        count = most_that_fit(6, fits.__getitem__)
        assert fits[count]
        assert count == 6 or not fits[count + 1]


def test_layers_are_spared_by_what_costs_least_where_it_wins_most() -> None:
    assert spared_in_order(COSTS, 'w4') == {'d': 'float', 'a': 'float', 'b': 'w8'}
    assert list(spared_in_order(COSTS, 'w4')) == ['d', 'a', 'b']
    assert spared_in_order(COSTS, 'w8') == {'d': 'float', 'c': 'w4', 'a': 'float'}
    assert list(spared_in_order(COSTS, 'w8')) == ['c', 'd', 'a']


class Times(Search):
    """Models take a millisecond for each layer at 4 bits, 2 at 8 bits, 3 in float; all layers in float take 12."""

    def __init__(self, budget: LatencyBudget) -> None:
        self._policies, self._budget = POLICIES, budget
        kinds = (('w4', 4.0), ('w8', 8.0), ('float', 12.0))
        self._uniform = [Candidate(name, 0, 32.0, 0.0, time, 12 / time) for name, time in kinds]

    def _candidate(self, name: str, policy: Any, bits: float) -> Candidate:
        default = policy['weight_bit_width'] // 4
        changed = [layer['weight_bit_width'] // 4 - default for layer in policy.get('layers', ())]
        time = 4.0 * default + sum(changed) + (3 - default) * len(policy.get('skip', ()))
        return Candidate(name, 0, bits, 0.0, time, 12 / time)


@pytest.mark.parametrize('milliseconds', [4, 5.5, 6, 7.9, 8, 9, 100])
def test_the_proposal_is_the_best_along_the_order_by_brute_force(milliseconds: float) -> None:
    proposal = Times(LatencyBudget(milliseconds)).propose(Sensitivity('float', 0.0, COSTS), WEIGHTS)
    order = [('d', 'float', 2), ('a', 'float', 2), ('b', 'w8', 1)]
    fitting = [n for n in range(4) if 4 + sum(more for *_, more in order[:n]) <= milliseconds]
    spared = {name: policy for name, policy, _ in order[: max(fitting)]}
    assert proposal.choice == {**dict.fromkeys(WEIGHTS, 'w4'), **spared}
    times = {candidate.name: candidate.milliseconds for candidate in proposal.candidates}
    assert times['mixed'] == 4 + sum(more for *_, more in order[: max(fitting)])
    assert list(times.values()) == sorted(times.values())
    assert {'w4', 'w8', 'float'} <= {*times} | ({'w4'} if times['mixed'] == 4 else set())
    same = Times(LatencyBudget(times_float=12 / milliseconds))
    assert same.propose(Sensitivity('float', 0.0, COSTS), WEIGHTS).choice == proposal.choice


def test_one_layer_at_least_stays_quantized() -> None:
    costs = {name: {'float': 0.0, 'w4': 1.0, 'w8': 1.0} for name in WEIGHTS}
    proposal = Times(LatencyBudget(11.9)).propose(Sensitivity('float', 0.0, costs), WEIGHTS)
    assert sorted(proposal.choice.values()) == ['float'] * 3 + ['w4']


@pytest.mark.parametrize(
    ('milliseconds', 'message'),
    [
        (2.0, r'no policy fits: the fastest is w8 in all layers, 4\.00 ms, 3\.00 times'),
        (12.0, r'the float model keeps to the budget \(12\.00 ms\)'),
    ],
)
def test_a_budget_that_nothing_or_all_keeps_to_is_refused_at_the_start(
    milliseconds: float, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Subject:
        float_model = nn.Linear(1, 1)

        def quantized(self, policy: dict[str, Any]) -> str:
            return f'w{policy["weight_bit_width"]}'

    def compare(files: dict[str, Path], only: list[str]) -> list[Latency]:
        assert only == ['openvino']
        times = {'float': 12.0, 'w4': 6.0, 'w8': 4.0}
        return [Latency('', name, times[name], 12 / times[name], 0, 0) for name in files]

    monkeypatch.setattr(latency_budget, 'export_onnx', lambda *args: tmp_path / 'x.onnx')
    monkeypatch.setattr(latency_budget, 'quantized_record', lambda model: type('R', (), {'bytes': lambda self: 1})())
    monkeypatch.setattr(latency_budget.latency, 'compare', compare)
    subject: Any = Subject()
    search = Search(subject, POLICIES, LatencyBudget(milliseconds), 'openvino', lambda model: 0.0, tmp_path)
    with pytest.raises(UsageError, match=message):
        search.start()


def test_the_target_is_the_runtimes_or_the_policies() -> None:
    plain, openvino = {'weight_bit_width': 8}, {'target': 'openvino'}
    assert target_of(None, [plain]) == 'onnxruntime'
    assert target_of(None, [plain, openvino]) == 'openvino'
    assert target_of('openvino', [plain]) == 'openvino'
    for runtime, policies, message in (
        ('onnxruntime', [openvino], "target='openvino' is another than 'onnxruntime'"),
        (None, [openvino, {'target': 'onnxruntime'}], "target='openvino' is another"),
        (None, [{'target': 'tensorrt'}], "target='tensorrt' cannot be timed here"),
        (None, [{'act_bit_width': 16}], 'inputs of 16 bits cannot be exported'),
    ):
        with pytest.raises(UsageError, match=message):
            target_of(runtime, policies)
