"""A model in evaluation mode whose loss can be differentiated twice, and which is put back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from mm_sharp.ops.module_state import ModuleStateBackup, StatePlan
from mm_sharp.ops.module_tree import ModuleTree
from mm_sharp.ops.tensor_backup import TensorBackup


@contextmanager
def preserved_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within, a model is in evaluation mode, and has second derivatives where they exist; then it is as it was.

    Weights and buffers come back bit for bit. Activation checkpointing (``with_cp``), which saves memory and changes no
    value, would stand in the way of second derivatives: it is off meanwhile.
    """
    training = {module: module.training for module in model.modules()}
    checkpointed: list[Any] = [module for module in model.modules() if getattr(module, 'with_cp', False)]
    weights, state, plan = TensorBackup(), ModuleStateBackup(), StatePlan(ModuleTree(model))
    weights.save(list(model.parameters()))
    state.save(plan, plan.norms)
    model.eval()
    for module in checkpointed:
        module.with_cp = False
    # torch's own, which RTMPose's backbone uses, can be differentiated once only, as of torch 2.13.
    hardsigmoid, F.hardsigmoid = F.hardsigmoid, _hardsigmoid
    try:
        yield
    finally:
        F.hardsigmoid = hardsigmoid
        weights.restore()
        state.restore()
        for module in checkpointed:
            module.with_cp = True
        for module, mode in training.items():
            module.training = mode


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    value = F.relu6(input + 3) / 6
    return input.copy_(value) if inplace else value
