"""Two methods in one class: what goes together, and what is refused.

``class FriendlyAUSAM(FriendlySAMOptimWrapper, AUSAMOptimWrapper)`` is Friendly SAM's direction on AUSAM's samples: each
of the five questions is answered by the first class that answers it. That is right if no answer is passed over, and if
each method gets what it needs.
"""

from __future__ import annotations

from mm_sharp.errors import UnsupportedError
from mm_sharp.step.method import Method

# By what overrides it, what a method decides.
_DECIDES = {
    'first_batch': 'which samples go through each pass',
    'perturbed_loss': 'which samples go through each pass',
    'select_parameters': 'which parameters are perturbed',
    'direction': 'how far the perturbation goes',
    'perturbation_gradient': 'in which direction the perturbation goes',
    'perturb_along': 'in which direction the perturbation goes',
    'passes': 'which passes run in a step',
    'final_gradient': 'which gradient the optimizer gets',
    'beside_step': 'which gradient the optimizer gets',
}
# What needs a pass at w and one at w + e.
_OF_TWO_PASSES = ('first_batch', 'perturbed_loss', 'perturbation_gradient', 'final_gradient')


def check_combination(cls: type[Method], base: type[Method]) -> None:
    """Refuse a class of two methods that do not go together.

    Args:
        cls: The class that is built.
        base: The class below the methods, whose answers are SAM's.

    Raises:
        UnsupportedError: Two methods answer the same question, or one does without what the other needs.
    """
    methods = [kind for kind in cls.__mro__ if issubclass(kind, base) and kind is not base]
    by_member = {name: [kind for kind in methods if name in vars(kind)] for name in _DECIDES}
    for name, decided in _DECIDES.items():
        first, *others = by_member[name] or [base]
        passed_over = [kind for kind in others if not issubclass(first, kind)]
        if passed_over and name not in first.hands_on:
            raise _refused(cls, first, passed_over[0], f'both decide {decided}')
    keeping = [kind for kind in methods if vars(kind).get('keeps')]
    if len(keeping) > 1:
        raise _refused(cls, keeping[0], keeping[1], 'both keep a tensor of each parameter')
    skipping = [kind for kind in methods if vars(kind).get('skips_gradients')]
    changing = [kind for kind in methods if vars(kind).get('changes_gradient')]
    if skipping and changing:
        raise _refused(cls, skipping[0], changing[0], 'the first leaves out gradients that the second needs')
    for ahead in by_member['perturb_along']:
        needing = [kind for name in _OF_TWO_PASSES for kind in by_member[name] if not issubclass(ahead, kind)]
        if needing:
            raise _refused(cls, ahead, needing[0], 'the first has one pass, and the second needs two')


def _refused(cls: type, first: type, second: type, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f'{cls.__name__}: {first.__name__} and {second.__name__} cannot be combined: {reason}. Inherit from one of them'
    )
