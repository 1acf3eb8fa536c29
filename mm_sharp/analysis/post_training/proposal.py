"""A mixed-precision policy for a budget, as a config takes it over."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import chain
from typing import Any

from mm_sharp.analysis.post_training.sensitivity import FLOAT, Choice, MixedModel, Sensitivity, assign
from mm_sharp.analysis.post_training.subject import Judge, Subject
from mm_sharp.errors import UsageError
from mm_sharp.quantization import LayerPolicy
from mm_sharp.quantization.record import quantized_record


@dataclass(frozen=True)
class Candidate:
    """A policy for all layers: the model's size in bytes, bits of a weight in the mean, and what was measured."""

    name: str
    bytes: int
    mean_bits: float
    value: float
    milliseconds: float = 0.0  # 0: it was not timed
    times_float: float = 0.0  # as fast, in turns with the float model


@dataclass(frozen=True)
class Proposal:
    """A policy within a budget, what it gives each layer, and what it compares with."""

    policy: dict[str, Any]
    choice: Choice
    candidates: list[Candidate]  # the smallest first, or the fastest


def propose(
    subject: Subject,
    mixed: MixedModel,
    found: Sensitivity,
    policies: Mapping[str, Mapping[str, Any]],
    allowed: Collection[str],
    judge: Judge,
    budget: float,
) -> Proposal:
    """A policy that keeps to a budget, with its own value and those of the policies that it mixes.

    ``policies`` have the same bits at the ends, and one target; ``allowed`` are the names of those that may be chosen,
    or ``'float'``. The budget is what ``budget_in_bits`` has given.
    """
    bits, total = weight_bits(policies), sum(mixed.weights.values())
    costs = {name: {p: cost for p, cost in options.items() if p in allowed} for name, options in found.costs.items()}
    choice = assign(mixed.weights, costs, bits, budget)
    policy = mixed_policy(choice, mixed.weights, policies)
    proposed = subject.quantized(policy)
    mean = bits_a_weight(choice, mixed.weights, policies)
    candidates = [Candidate('mixed', quantized_record(proposed).bytes(), mean, judge(proposed))]
    single = common_target(policies.values()) == 'generic'  # what single layers were measured in
    for name, everywhere in policies.items():
        if single:
            mixed.choose(dict.fromkeys(mixed.weights, name))
            model, size = mixed.model, total * bits[name] // 8 + quantized_record(mixed.model).other_bytes
        else:
            model = subject.quantized(everywhere)
            size = quantized_record(model).bytes()
        candidates.append(Candidate(name, size, float(bits[name]), judge(model)))
    return Proposal(policy, choice, sorted(candidates, key=lambda candidate: candidate.bytes))


def budget_in_bits(
    weights: Mapping[str, int],
    other_bytes: int,
    policies: Mapping[str, Mapping[str, Any]],
    allowed: Collection[str],
    *,
    size_mb: float | None = None,
    mean_bits: float | None = None,
) -> float:
    """What all weights together may take, in bits; a UsageError if the allowed policy of the fewest bits takes more.

    ``weights`` are how many each layer has, ``other_bytes`` what all else takes. ``size_mb`` is in 10^6 bytes (weights
    in their bits, all else in 4 bytes), ``mean_bits`` those of a weight, in the mean over the layers.
    """
    bits, total = weight_bits(policies), sum(weights.values())
    budget = total * mean_bits if mean_bits is not None else 8 * (1e6 * (size_mb or 0) - other_bytes)
    fewest = min(allowed, key=bits.__getitem__)
    if total * bits[fewest] <= budget:
        return budget
    if mean_bits is not None:
        option, given, least = '--mean-bits', mean_bits, f'{bits[fewest]:.1f}'
        takes = f'the weights have {least} bits on average'
    else:
        # Rounded up, so that what is proposed fits.
        megabytes = math.ceil((total * bits[fewest] / 8 + other_bytes) / 1e3) / 1e3
        option, given, least = '--size-mb', size_mb or 0, f'{megabytes:.3f}'
        takes = f'the model takes {least} MB'
    fewer = ', or give --policy with fewer bits, such as w2a4' if bits[fewest] > 2 else ''
    said = f'{option} {given:g}: with the fewest bits ({fewest}) {takes}'
    raise UsageError(f'{said}: write {option} {least} or more{fewer}')


def same_everywhere(policy: Mapping[str, Any]) -> dict[str, Any]:
    """A policy without exceptions for a network's ends and for single layers; what it skips stays skipped."""
    plain = {key: value for key, value in policy.items() if key != 'layers'}
    return {**plain, 'first_layers': 'same', 'last_layers': 'same'}


def with_common_skips(policies: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The policies by name, each with what any of them skips: of what is float in one, the others are not compared."""
    skips = [policy.get('skip', ()) for policy in policies.values()]
    all_skips = list(dict.fromkeys(chain(*([skip] if isinstance(skip, str) else skip for skip in skips))))
    return {name: {**policy, **({'skip': all_skips} if all_skips else {})} for name, policy in policies.items()}


def common_target(policies: Collection[Mapping[str, Any]]) -> str:
    """The target that policies say, ``'generic'`` if none of them says one; a UsageError if they say two."""
    said = sorted(stated_targets(policies))
    if len(said) > 1:
        raise UsageError(f'--policy: a model has one target, and these say {" and ".join(said)}: give those of one')
    return said[0] if said else 'generic'


def stated_targets(policies: Collection[Mapping[str, Any]]) -> set[str]:
    """The targets that policies say, ``'generic'`` apart, which goes with any."""
    return {str(policy.get('target', 'generic')) for policy in policies} - {'generic'}


def weight_bits(policies: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Bits of a weight by policy's name; 32 in float."""
    return {name: _layer_policy(policy)['weight_bit_width'] for name, policy in policies.items()} | {FLOAT: 32}


def bits_a_weight(choice: Choice, weights: Mapping[str, int], policies: Mapping[str, Mapping[str, Any]]) -> float:
    """Bits of a weight, in the mean over the layers."""
    bits = weight_bits(policies)
    return sum(weights[name] * bits[policy] for name, policy in choice.items()) / sum(weights.values())


def mixed_policy(
    choice: Choice, weights: Mapping[str, int], policies: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The policy that quantizes each layer as chosen: most weights by default, the others one by one."""
    counts: Counter[str] = Counter()
    for name, policy in choice.items():
        counts[policy] += weights[name] if policy != FLOAT else 0
    default = max(counts, key=lambda policy: (counts[policy], policy != FLOAT))
    base, layers = _layer_policy(policies[default]), []
    skip = list(policies[default].get('skip', ()))
    for name, policy in choice.items():
        pattern = f'^{re.escape(name)}$'
        if policy == FLOAT:
            skip.append(pattern)
        elif policy != default:
            changes = {key: value for key, value in _layer_policy(policies[policy]).items() if value != base[key]}
            if changes:
                layers.append({'pattern': pattern, **changes})
    found = {**same_everywhere(policies[default]), 'layers': layers, 'skip': skip}
    return {key: value for key, value in found.items() if value not in ([], ())}


def config_text(policy: Mapping[str, Any], comment: str) -> str:
    """A config file that sets the policy: a fragment for ``_base_``, and a file for ``tools/ptq.py --policy``."""
    lines = [f'# {line}'.rstrip() for line in comment.splitlines()]
    lines += ['sharp_quantization = dict(', '    policy=dict(']
    for key, value in policy.items():
        if key in ('layers', 'skip'):
            lines += [f'        {key}=[', *(f'            {_written(item)},' for item in value), '        ],']
        else:
            lines.append(f'        {key}={value!r},')
    return '\n'.join([*lines, '    )', ')', ''])


def _written(item: Any) -> str:
    """A pattern, or the dict of a layer; patterns without doubled backslashes."""
    if isinstance(item, str):
        return f"r'{item}'"
    changes = ''.join(f', {key}={value!r}' for key, value in item.items() if key != 'pattern')
    return f'dict(pattern={_written(item["pattern"])}{changes})'


def _layer_policy(policy: Mapping[str, Any]) -> dict[str, Any]:
    return asdict(LayerPolicy(**{key.name: policy[key.name] for key in fields(LayerPolicy) if key.name in policy}))
