"""When loss differences travel, and what a step leaves in memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mm_sharp import AUSAMOptimWrapper, ESAMOptimWrapper
from mm_sharp.ops.host_copy import HostCopy
from mm_sharp.per_sample_loss import PerSampleLossError
from tests.toys import Functional, batches, make
from tests.wrappers import build, momentum_sgd


@pytest.mark.parametrize('name', ['ausam', 'ausam-loader', 'esam-history'])
def test_differences_are_copied_before_the_second_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU work is queued: a copy behind the backward pass would make the next step wait for all of this one."""
    events: list[str] = []
    model = make()
    wrapper = build(name, model)

    class Noted(HostCopy):
        def __init__(self, tensor: Tensor) -> None:
            events.append('copy')
            super().__init__(tensor)

        def numpy(self) -> Any:
            events.append('read')
            return super().numpy()

    backward = wrapper._two_pass._backward
    monkeypatch.setattr('mm_sharp.methods.per_sample.HostCopy', Noted)
    monkeypatch.setattr(
        wrapper._two_pass, '_backward', lambda *args: (events.append('second backward'), backward(*args))
    )
    for batch in batches(2):
        model.train_step(batch, wrapper)
    first, second = events[:2], events[2:]
    assert first == ['copy', 'second backward']
    assert second[0] == 'read'


class Masked(nn.Module):
    """A loss that vmap cannot do, for it selects by values."""

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        keep = targets < 1e9
        return (output - targets).square()[keep].mean()


@pytest.mark.parametrize('kind', [AUSAMOptimWrapper, ESAMOptimWrapper])
def test_no_batch_outlives_the_next_steps(kind: type[AUSAMOptimWrapper]) -> None:
    model = make()
    model.square_loss = Masked()
    wrapper = kind(momentum_sgd(model))
    outputs: list[weakref.ref[Tensor]] = []
    model.head.register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output)))
    for batch in batches(4):
        model.train_step(batch, wrapper)
    assert wrapper.losses_of(model).looped
    gc.collect()
    forwards = len(outputs) // 4
    assert [reference() for reference in outputs[: 2 * forwards]] == [None] * (2 * forwards)


@pytest.mark.parametrize('selection', ['exact', 'history'])
def test_esam_on_all_samples_needs_no_losses_of_samples_and_no_ids(selection: str) -> None:
    (batch,) = batches(1)
    del batch['sample_idx']
    model = make(Functional)
    wrapper = ESAMOptimWrapper(momentum_sgd(model), gamma=1.0, selection=selection)
    before = model.conv.weight.detach().clone()
    model.train_step(batch, wrapper)
    assert not torch.equal(model.conv.weight, before)
    with pytest.raises(PerSampleLossError):
        make(Functional).train_step(batch, ESAMOptimWrapper(momentum_sgd(model), gamma=0.5))
