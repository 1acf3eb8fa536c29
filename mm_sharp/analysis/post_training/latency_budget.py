"""A mixed-precision policy for a budget of time, found by timing whole models in the runtime that they are for.

A runtime fuses layers, and converts between integers and float where neighbours differ: times of single layers do not
add up to a model's. All layers begin at the fastest policy; then the most sensitive ones are spared, as many as the
budget allows: each gets the policy, or float, that costs it least. Every model is timed beside the float one.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from mm_sharp.analysis.post_training.proposal import (
    Candidate,
    Proposal,
    bits_a_weight,
    mixed_policy,
    stated_targets,
    weight_bits,
)
from mm_sharp.analysis.post_training.sensitivity import FLOAT, Sensitivity
from mm_sharp.analysis.post_training.subject import Judge, Subject
from mm_sharp.errors import UsageError
from mm_sharp.quantization import latency
from mm_sharp.quantization.export import export_onnx
from mm_sharp.quantization.record import quantized_record, size_in_bytes

_SESSIONS = 3  # of which the worst counts: two of one model differ by more than the rounds in them


@dataclass(frozen=True)
class LatencyBudget:
    """How much time a picture may take, one thread; one of the two is given."""

    milliseconds: float | None = None
    times_float: float | None = None  # at least so many times as fast as the float model

    def allows(self, candidate: Candidate) -> bool:
        """Whether a candidate, which was timed, keeps to it."""
        if self.milliseconds is not None:
            return candidate.milliseconds <= self.milliseconds
        return candidate.times_float >= (self.times_float or 0.0)


class Search:
    """Proposes a policy within a budget of time, out of ``policies`` by name, all with the same bits at the ends.

    All get one ``target``, ``'onnxruntime'`` or ``'openvino'``; ``judge`` is for what candidates are worth besides. The
    subject's float model is exported to the ``folder`` at once, with a UserError if it cannot be.
    """

    def __init__(
        self,
        subject: Subject,
        policies: Mapping[str, Mapping[str, Any]],
        budget: LatencyBudget,
        target: str,
        judge: Judge,
        folder: Path,
    ) -> None:
        self._subject, self._judge, self._budget = subject, judge, budget
        self._policies = {name: {**policy, 'target': target} for name, policy in policies.items()}
        self._target, self._folder = target, folder
        self._float = export_onnx(subject.float_model, folder / 'float.onnx', 'float', {})
        self._uniform: list[Candidate] = []  # all layers by one policy, the fastest first; at the end all in float
        self._milliseconds = 0.0  # of the float model

    def start(self) -> None:
        """Time the float model and each policy in all layers; a UsageError: it is fast enough, or none of these is."""
        model = self._subject.float_model
        plain = self._timed(Candidate(FLOAT, size_in_bytes(model.state_dict()), 32.0, self._judge(model)), self._float)
        if self._budget.allows(plain):
            raise UsageError(f'the float model keeps to the budget ({plain.milliseconds:.2f} ms): quantize nothing')
        bits = weight_bits(self._policies)
        found = [self._candidate(name, policy, bits[name]) for name, policy in self._policies.items()]
        found.sort(key=lambda candidate: -candidate.times_float)
        if not self._budget.allows(found[0]):
            raise UsageError(f'no policy fits: the fastest is {found[0].name} in all layers, {_speed(found[0])}')
        self._uniform = [*found, plain]

    def propose(self, found: Sensitivity, weights: Mapping[str, int]) -> Proposal:
        """The policy that spares the most layers within the budget, the most sensitive first; weights are by layer."""
        fastest = self._uniform[0]
        spared = spared_in_order(found.costs, fastest.name)
        timed = {0: fastest}

        def choice(count: int) -> dict[str, str]:
            return {**dict.fromkeys(weights, fastest.name), **dict(islice(spared.items(), count))}

        def policy(count: int) -> dict[str, Any]:
            return mixed_policy(choice(count), weights, self._policies)

        def fits(count: int) -> bool:
            bits = bits_a_weight(choice(count), weights, self._policies)
            timed[count] = self._candidate(f'{count} spared', policy(count), bits)
            return self._budget.allows(timed[count])

        all_float = len(spared) == len(weights) and {*spared.values()} == {FLOAT}  # which is no policy
        count = most_that_fit(len(spared) - all_float, fits)
        proposed = replace(timed.pop(count), name='mixed')
        candidates = [proposed, *{**timed, 0: fastest}.values(), *self._uniform[1:]]
        return Proposal(policy(count), choice(count), sorted(candidates, key=lambda one: one.milliseconds))

    def _candidate(self, name: str, policy: Mapping[str, Any], bits: float) -> Candidate:
        model = self._subject.quantized(policy)
        file = export_onnx(model, self._folder / 'candidate.onnx', 'qcdq', {})
        return self._timed(Candidate(name, quantized_record(model).bytes(), bits, self._judge(model)), file)

    def _timed(self, candidate: Candidate, file: Path) -> Candidate:
        files = {FLOAT: self._float, candidate.name: file}
        sessions = [latency.compare(files, only=[self._target]) for _ in range(_SESSIONS)]
        # Of one moment for all, since the machine may do other things at another.
        self._milliseconds = self._milliseconds or median(found[0].milliseconds for found in sessions)
        ratio = min(found[-1].ratio for found in sessions)
        made = replace(candidate, milliseconds=self._milliseconds / ratio, times_float=ratio)
        sys.stderr.write(f'{made.name}: {_speed(made)}\n')
        return made


def _speed(candidate: Candidate) -> str:
    return f'{candidate.milliseconds:.2f} ms, {candidate.times_float:.2f} times as fast as float'


def spared_in_order(costs: Mapping[str, Mapping[str, float]], fastest: str) -> dict[str, str]:
    """What spares each layer, where anything costs less than the fastest policy; where it wins most first."""
    best = {name: min(options, key=options.__getitem__) for name, options in costs.items()}
    gains = {name: costs[name][fastest] - costs[name][policy] for name, policy in best.items()}
    return {name: best[name] for name in sorted(gains, key=lambda name: -gains[name]) if gains[name] > 0}


def most_that_fit(most: int, fits: Callable[[int], bool]) -> int:
    """A count up to ``most`` that fits, as 0 does, by halving: the largest, or one before a count that does not fit."""
    return bisect_left(range(1, most + 1), True, key=lambda count: not fits(count))


def target_of(runtime: str | None, policies: Collection[Mapping[str, Any]]) -> str:
    """The target of all policies, for a budget of time: ``--runtime``, else what they say, else ONNX Runtime's.

    A UsageError: it cannot be timed, or the policies say another, or have inputs that cannot be exported.
    """
    said = stated_targets(policies)
    target = runtime or (min(said) if said else 'onnxruntime')
    if said - {target}:
        raise UsageError(f'--policy: target={min(said - {target})!r} is another than {target!r}: give one --runtime')
    if target not in latency.RUNTIMES:
        raise UsageError(f'--policy: target={target!r} cannot be timed here: take one of {", ".join(latency.RUNTIMES)}')
    if any(policy.get('act_bit_width', 8) > 8 for policy in policies):
        raise UsageError('--policy: inputs of 16 bits cannot be exported as QCDQ, and so not timed: leave it out')
    return target
