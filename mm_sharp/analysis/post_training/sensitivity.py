"""Which layers bear few bits: the loss with one layer alone quantized, or with one alone spared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

from torch import nn

from mm_sharp.analysis.post_training.subject import Judge, with_bar
from mm_sharp.quantization.build import replace_modules
from mm_sharp.quantization.flow import without_quantizers
from mm_sharp.quantization.record import quantized_record

FLOAT = 'float'
Choice = Mapping[str, str]  # by layer: a policy's name, or 'float'


class MixedModel:
    """A model each of whose layers can be quantized by any of several policies, or left in float.

    It is the first of ``models``: by policy's name the same model, calibrated, in evaluation mode. Layers that a policy
    leaves in float are float for all.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self.model = next(iter(models.values()))
        plain = deepcopy(self.model)
        without_quantizers(plain).__enter__()
        first, *more = ({q.name: q.weights for q in quantized_record(model).quantized} for model in models.values())
        self.weights = {name: weights for name, weights in first.items() if all(name in other for other in more)}
        self._layers = {
            policy: {name: model.get_submodule(name) for name in self.weights}
            for policy, model in {**models, FLOAT: plain}.items()
        }
        others = first.keys() - self.weights.keys()
        replace_modules(self.model, {self.model.get_submodule(name): plain.get_submodule(name) for name in others})

    def choose(self, choice: Choice) -> None:
        """Quantize each layer that is named by a policy; others stay as they are."""
        new = {self.model.get_submodule(name): self._layers[policy][name] for name, policy in choice.items()}
        replace_modules(self.model, new)


@dataclass(frozen=True)
class Sensitivity:
    """How much worse one layer's policy makes a model in which all other layers are as ``others`` says."""

    others: str  # a policy, or 'float'
    value: float  # the loss (or what else the lower is the better) with all layers as others
    costs: Mapping[str, Mapping[str, float]]  # by layer and policy: what is added to that value; 0 for `others`

    def ranked(self) -> list[str]:
        """The layers, the most sensitive first."""
        sign = 1 if self.others == FLOAT else -1  # spared: where the loss falls most

        def most(name: str) -> float:
            """Without the 0 of ``others``, which is no measurement."""
            measured = (sign * cost for policy, cost in self.costs[name].items() if policy != self.others)
            return max(measured, default=0.0)

        return sorted(self.costs, key=most, reverse=True)


def measure(mixed: MixedModel, policies: Sequence[str], others: str, judge: Judge) -> Sensitivity:
    """Judge the model with each layer alone by each of the policies, the rest as ``others``, as all are in the end."""
    mixed.choose(dict.fromkeys(mixed.weights, others))
    value = judge(mixed.model)
    costs: dict[str, dict[str, float]] = {name: {others: 0.0} for name in mixed.weights}
    trials = [(name, policy) for name in mixed.weights for policy in policies if policy != others]
    for name, policy in with_bar(trials, f'Judging {len(mixed.weights)} layers, {len(trials)} times'):
        mixed.choose({name: policy})
        costs[name][policy] = judge(mixed.model) - value
        mixed.choose({name: others})
    return Sensitivity(others, value, costs)


def assign(weights: Mapping[str, int], costs: Mapping[str, Mapping[str, float]], bits: Mapping[str, int], budget: float
) -> dict[str, str]:  # fmt: skip
    """Give each layer a policy so that all weights together take at most ``budget`` bits, at little cost.

    Costs are taken to add up. Each layer starts at its cheapest policy; then, again and again, the change to fewer bits
    that costs least for each bit saved is made; finally what is left of the budget is spent. ``weights`` are how many
    each layer has, ``bits`` those of a weight, by policy. A ValueError: with the fewest bits, the weights take more.
    """
    choice = {name: min(options, key=lambda p: (options[p], bits[p])) for name, options in costs.items()}

    def taken() -> int:
        return sum(weights[name] * bits[policy] for name, policy in choice.items())

    def changes(sign: int) -> Iterator[tuple[float, str, str]]:
        """What saves (1) or spends (-1) bits: the cost of each bit, the layer, its policy."""
        for name, options in costs.items():
            for policy, cost in options.items():
                saved = weights[name] * (bits[choice[name]] - bits[policy]) * sign
                if saved > 0:
                    yield (cost - options[choice[name]]) / saved, name, policy

    while taken() > budget:
        change = min(changes(1), default=None)
        if change is None:
            raise ValueError(f'budget={budget:g}: with the fewest bits the weights take {taken()} bits')
        choice[change[1]] = change[2]
    for gain, name, policy in sorted(changes(-1)):
        more = weights[name] * (bits[policy] - bits[choice[name]])
        if gain < 0 and costs[name][policy] < costs[name][choice[name]] and taken() + more <= budget:
            choice[name] = policy
    return choice
