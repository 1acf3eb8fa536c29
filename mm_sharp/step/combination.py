"""Two methods in one class: what goes together, and what is refused.

``class FriendlyAUSAM(FriendlySAMOptimWrapper, AUSAMOptimWrapper)`` is Friendly SAM's direction on AUSAM's samples: each
of the five questions is answered by the first class that answers it. That is right if no answer is passed over, and if
each method gets what it needs.
"""

from __future__ import annotations

from mm_sharp.errors import UnsupportedError
from mm_sharp.step.method import Method

# What a method decides, by what overrides it.
_DECIDES = {
    'which samples go through each pass': ('first_batch', 'perturbed_loss'),
    'which parameters are perturbed': ('select_parameters',),
    'how far the perturbation goes': ('direction',),
    'in which direction the perturbation goes': ('perturbation_gradient', 'perturb_along'),
    'which passes run in a step': ('passes',),
    'which gradient the optimizer gets': ('final_gradient', 'beside_step'),
}
# What needs a pass at w and one at w + e.
_OF_TWO_PASSES = ('first_batch', 'perturbed_loss', 'perturbation_gradient', 'final_gradient')


def check_combination(cls: type[Method], base: type[Method]) -> None:
    """Refuse a class of two methods that do not go together, with an UnsupportedError.

    ``base`` is the class below the methods, whose answers are SAM's.
    """
    methods = [kind for kind in cls.__mro__ if issubclass(kind, base) and kind is not base]

    def having(name: str, *, on: bool = False) -> list[type[Method]]:
        return [kind for kind in methods if (vars(kind).get(name) if on else name in vars(kind))]

    for decided, names in _DECIDES.items():
        for name in names:
            first, *others = having(name) or [base]
            passed_over = [kind for kind in others if not issubclass(first, kind)]
            if passed_over and name not in first.hands_on:
                raise _refused(cls, first, passed_over[0], f'both decide {decided}')
    keeping = having('keeps', on=True)
    if len(keeping) > 1:
        raise _refused(cls, keeping[0], keeping[1], 'both keep a tensor of each parameter')
    skipping, changing = having('skips_gradients', on=True), having('changes_gradient', on=True)
    if skipping and changing:
        raise _refused(cls, skipping[0], changing[0], 'the first leaves out gradients that the second needs')
    for ahead in having('perturb_along'):
        needing = [kind for name in _OF_TWO_PASSES for kind in having(name) if not issubclass(ahead, kind)]
        if needing:
            raise _refused(cls, ahead, needing[0], 'the first has one pass, and the second needs two')


def _refused(cls: type, first: type, second: type, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f'{cls.__name__}: {first.__name__} and {second.__name__} cannot be combined: {reason}. Inherit from one of them'
    )
