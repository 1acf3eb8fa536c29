"""Two methods in one class: those that go together do both, and the others are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mm_sharp import (
    AUSAMOptimWrapper,
    ESAMOptimWrapper,
    FriendlySAMOptimWrapper,
    GSAMOptimWrapper,
    LookSAMOptimWrapper,
    MSAMOptimWrapper,
    SAMOptimWrapper,
    WSAMOptimWrapper,
)
from mm_sharp.errors import UserError
from tests.references_family import GSAM, FlatReference, FriendlySAM
from tests.toys import batches, make, same_state
from tests.wrappers import build, momentum_sgd


class FriendlyAUSAM(FriendlySAMOptimWrapper, AUSAMOptimWrapper):
    """Friendly SAM's direction on AUSAM's samples."""


class FriendlyGSAM(FriendlySAMOptimWrapper, GSAMOptimWrapper):
    """Friendly SAM's direction, GSAM's step."""


class IntervalGSAM(SAMOptimWrapper, GSAMOptimWrapper):
    """GSAM in one step of n."""


class IntervalWSAM(SAMOptimWrapper, WSAMOptimWrapper):
    """WSAM in one step of n."""


class IntervalAUSAM(SAMOptimWrapper, AUSAMOptimWrapper):
    """AUSAM in one step of n."""


class IntervalFriendly(SAMOptimWrapper, FriendlySAMOptimWrapper):
    """Friendly SAM in one step of n."""


def test_friendly_sam_on_drawn_samples() -> None:
    ours, theirs = make(norm=False), make(norm=False)
    combined: Any = FriendlyAUSAM(momentum_sgd(ours), sampling_ratio=0.5, lmbda=0.5)
    alone: Any = FriendlySAMOptimWrapper(momentum_sgd(theirs), lmbda=0.5)
    for batch in batches(6):
        ours.train_step(batch, combined)
        chosen = combined._draw.chosen
        assert len(chosen) == 4
        theirs.train_step({key: value[chosen] for key, value in batch.items()}, alone)
        for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(left, right)
    combined.pending_updates.flush()
    assert len(combined.history) > 0
    assert combined.kept.keys() == set(ours.parameters())


def test_whole_batches_for_steps_of_one_pass_are_not_drawn_while_loading() -> None:
    wrapper: Any = IntervalAUSAM(momentum_sgd(make()), interval=2)
    nothing: Any = None
    with pytest.raises(UserError, match=r'^IntervalAUSAM: AUSAMSampler leaves out samples in every step'):
        wrapper.attach_sampler(nothing, nothing, 0, nothing)


class FriendlyGSAMReference(FriendlySAM, GSAM):
    """One after the other."""

    def perturbation(self, gradient: torch.Tensor) -> torch.Tensor:
        return FlatReference.perturbation(self, gradient - self.sigma * self.update(gradient))

    def final(self, plain: torch.Tensor, perturbed: torch.Tensor) -> torch.Tensor:
        return GSAM.final(self, plain, FriendlySAM.final(self, plain, perturbed))


def test_a_method_that_hands_on() -> None:
    ours, theirs = make(norm=False).double(), make(norm=False).double()
    wrapper: Any = FriendlyGSAM(momentum_sgd(ours), rho_min=0.05)
    settings: Any = dict(sigma=1.0, lmbda=0.9, alpha=0.4, rho_min=0.05)
    reference = FriendlyGSAMReference(theirs, momentum_sgd(theirs), **settings)
    for batch in batches(10):
        double = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        ours.train_step(double, wrapper)
        reference.step([double])
        for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(('kind', 'name'), [(IntervalGSAM, 'gsam'), (IntervalWSAM, 'wsam')])
def test_the_steps_between_are_the_base_optimizer_s(kind: Any, name: str) -> None:
    ours, theirs = make(), make()
    optimizer = momentum_sgd(theirs)
    wrapper, method = kind(momentum_sgd(ours), interval=2), build(name, theirs, optimizer)
    base = build('sam', theirs, optimizer, rho=0.0)
    for number, batch in enumerate(batches(6)):
        ours.train_step(batch, wrapper)
        theirs.train_step(batch, base if number % 2 else method)
        assert same_state(ours, theirs)


def test_the_average_takes_up_the_gradient_of_steps_with_one_pass() -> None:
    ours, theirs = make(), make()
    data = batches(2)
    every: Any = build('friendlysam', ours, rho=0.0)
    between: Any = IntervalFriendly(momentum_sgd(theirs), rho=0.0, interval=2)
    for batch in data:
        ours.train_step(batch, every)
        theirs.train_step(batch, between)
    assert between.last_step.perturbed_loss is None
    assert all(map(torch.equal, every.kept.values(), between.kept.values()))


REFUSED: list[tuple[tuple[type[Any], ...], str]] = [
    (
        (GSAMOptimWrapper, WSAMOptimWrapper),
        'GSAMOptimWrapper and WSAMOptimWrapper .* which gradient the optimizer gets',
    ),
    ((SAMOptimWrapper, LookSAMOptimWrapper), 'both decide which passes run'),
    ((LookSAMOptimWrapper, FriendlySAMOptimWrapper), 'which gradient the optimizer gets'),
    ((FriendlySAMOptimWrapper, LookSAMOptimWrapper), 'both keep a tensor of each parameter'),
    ((ESAMOptimWrapper, AUSAMOptimWrapper), 'both decide which samples'),
    (
        (FriendlySAMOptimWrapper, ESAMOptimWrapper),
        'ESAMOptimWrapper and FriendlySAMOptimWrapper .*leaves out gradients',
    ),
    ((MSAMOptimWrapper, AUSAMOptimWrapper), 'MSAMOptimWrapper and AUSAMOptimWrapper .*one pass'),
    ((MSAMOptimWrapper, FriendlySAMOptimWrapper), 'one pass, and the second needs two'),
    ((MSAMOptimWrapper, SAMOptimWrapper), 'both decide which passes run'),
]


@pytest.mark.parametrize(('kinds', 'message'), REFUSED, ids=lambda value: value if isinstance(value, str) else '')
def test_what_does_not_go_together_is_refused(kinds: tuple[type[Any], ...], message: str) -> None:
    both: Any = type('Both', kinds, {})
    with pytest.raises(NotImplementedError, match=f'^Both: .*{message}.*Inherit from one of them$'):
        both(momentum_sgd(make()))


def test_a_class_that_decides_itself_may_inherit_from_both() -> None:
    """Whoever overrides an answer has seen the others."""

    class Mine(GSAMOptimWrapper, WSAMOptimWrapper):
        def final_gradient(self, gradient: Any) -> None:
            GSAMOptimWrapper.final_gradient(self, gradient)

    model = make()
    model.train_step(batches(1)[0], Mine(momentum_sgd(model)))
