"""What the processes of tests/step/test_fsdp.py do: every case is trained in one group of them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from mmengine.model import MMFullyShardedDataParallel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim import SGD

from mm_sharp.ops.fsdp import local_shard
from mm_sharp.step.wrapper import TwoPassOptimWrapper
from tests.rank_steps import shard
from tests.references import gradients_of
from tests.toys import Notes, ToyNet, batches, make
from tests.wrappers import build, momentum_sgd

STEPS = 4
CPU = torch.device('cpu')
LAYERS = ModuleWrapPolicy({nn.Conv2d, nn.Linear})
Result = dict[str, Any]


class Faulty(ToyNet):
    """Fails in a forward or a backward pass, counted from 0 over all passes, or in the optimizer's first step."""

    def __init__(self, fault: str = '', at: int = -1) -> None:
        super().__init__(norm=False)
        self.fault, self.at, self.passes = fault, at, Notes()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        # A list, because the wrapper takes numbers back.
        self.passes.append(len(self.passes))
        due = self.passes[-1] == self.at
        if due and self.fault == 'forward':
            super().forward(inputs, targets, sample_idx, mode)
            raise ArithmeticError(self.fault)
        losses = super().forward(inputs, targets, sample_idx, mode)
        if due and self.fault == 'backward':
            # Between the head, whose gradient is there, and the convolution, whose is not.
            self.seen.register_hook(self.fail)
        return losses

    def features(self, inputs: Tensor) -> Tensor:
        self.seen = super().features(inputs)
        return self.seen

    def fail(self, *_: object) -> None:
        raise ArithmeticError(self.fault)


def sharded(kind: str, model: ToyNet) -> nn.Module:
    """``model`` under one of torch's ways to shard it."""
    if kind.startswith('fsdp2'):
        # Twice the same model beside each other for 'hybrid': no piece is cut, and each is held by both processes.
        size = dist.get_world_size()
        shape, names = ((size, 1), ('copies', 'pieces')) if kind.endswith('hybrid') else ((size,), ('pieces',))
        mesh = init_device_mesh('cpu', shape, mesh_dim_names=names)
        for part in (model.conv, model.head) if kind.startswith('fsdp2 layers') else ():
            fully_shard(part, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    options: dict[str, dict[str, Any]] = {
        'flat': {},
        'layers': dict(auto_wrap_policy=LAYERS),
        'zero2': dict(sharding_strategy='SHARD_GRAD_OP', auto_wrap_policy=LAYERS),
        'whole': dict(sharding_strategy='NO_SHARD'),
        'no names': dict(use_orig_params=False),
        'ignored': dict(ignored_modules=[model.conv]),
    }
    return MMFullyShardedDataParallel(model, device_id=CPU, **options[kind])


def whole_weights(model: nn.Module) -> list[np.ndarray]:
    """All parameters, gathered from all processes."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return [parameter.detach().clone().numpy().reshape(-1) for parameter in model.parameters()]
    return [parameter.full_tensor().detach().clone().numpy().reshape(-1).copy() for parameter in model.parameters()]


def sizes_of(wrapper: TwoPassOptimWrapper) -> list[list[float]] | None:
    """How far the last step has moved each tensor, the tensors' norms, and <e, g>."""
    sizes = wrapper.last_step.sizes
    return None if sizes is None else [sizes.perturbation.tolist(), sizes.weights.tolist(), [sizes.slope.item()]]


def pieces(model: nn.Module) -> list[tuple[int, bytes]]:
    """Where this process's pieces are, and their bits."""
    held = [local_shard(parameter).detach() for parameter in model.parameters()]
    return [(piece.data_ptr(), piece.clone().numpy().tobytes()) for piece in held]


def train(
    rank: int,
    processes: int,
    kind: str,
    name: str,
    *,
    model: ToyNet | None = None,
    validate: bool = False,
    lr: float = 0.05,
    faults: int = 0,
    corrupted: int = -1,
    sizes: bool = False,
    **options: Any,
) -> Result:
    """Train a toy on this process's shards of the batches.

    Args:
        rank: This process's.
        processes: Their number.
        kind: How the model is sharded.
        name: The wrapper's.
        model: By default one without BatchNorm, whose statistics are each process's own.
        validate: Run the model without gradients between the steps, which leaves FSDP's outermost weights gathered.
        lr: The optimizer's; 0 leaves the weights in place.
        faults: Steps that are to fail; each is tried again with the same batch.
        corrupted: The step in which the last process has a sample that is nan.
        sizes: Record how far each tensor is moved.
        options: The wrapper's.
    """
    net = sharded(kind, make(norm=False) if model is None else model)
    optimizer = SGD(net.parameters(), lr=lr) if lr == 0 else momentum_sgd(net, lr)
    wrapper = build(name, net, optimizer, **options)
    wrapper.initialize_count_status(net, 0, STEPS)
    wrapper.record_sizes = sizes
    if getattr(model, 'fault', '') == 'step':
        once = optimizer.register_step_pre_hook(lambda *_: (once.remove(), model.fail()))
    norms, kept, failed, drawn, losses = [], [], 0, [], []
    with count_all_reduces() as reduced, as_before_213() if 'before' in kind else nullcontext():
        for step, batch in enumerate(batches(STEPS, size=8)):
            part = shard(batch, rank, processes)
            if step == corrupted and rank == processes - 1:
                part['inputs'][0] = float('nan')
            if validate:
                with torch.no_grad():
                    net(**part, mode='tensor')
            before = pieces(net) if lr == 0 else None
            while True:
                try:
                    net.train_step(part, wrapper)
                    break
                except ArithmeticError:
                    failed += 1
            kept.append(before == pieces(net) if lr == 0 else None)
            if wrapper.last_step.grad_norm is None:  # LookSAM, in the steps between
                continue
            norms.append(wrapper.last_step.grad_norm.item())
            losses.append(bool(wrapper.last_step.perturbed_loss > wrapper.last_step.loss))
            drawn.append(wrapper._draw.chosen.tolist() if name == 'ausam' else None)
    assert failed == faults
    scaler = wrapper.precision.scaler
    return {
        'weights': whole_weights(net),
        'norms': norms,
        'sizes': sizes_of(wrapper),
        'kept': kept,
        'climbed': losses,
        'drawn': drawn,
        'seed': getattr(wrapper, 'seed', None),
        'reduced': list(reduced),
        'empty': sum(parameter.numel() == 0 for parameter in net.parameters()),
        'scale': None if scaler is None else scaler.get_scale(),
        'logged': wrapper.message_hub.get_scalar('train/grad_norm').current() if options.get('clip_grad') else None,
    }


@contextmanager
def as_before_213() -> Iterator[None]:
    """FSDP2 that cannot recover from an error by itself, as it could not before torch 2.13."""
    with mock.patch.object(FSDPModule, 'reset_iter_state', property()):
        yield


class count_all_reduces:  # noqa: N801  # used as a function
    """Sizes of the tensors that are all-reduced inside: FSDP itself gathers and scatters."""

    def __enter__(self) -> list[int]:
        sizes: list[int] = []
        original = dist.all_reduce

        def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            sizes.append(tensor.numel())
            return original(tensor, *args, **kwargs)

        self._patch = mock.patch.object(dist, 'all_reduce', counting)
        self._patch.start()
        return sizes

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


def overflow_of_one(rank: int, processes: int, kind: str, dtype: str | None) -> Result:
    """The gradient of the last process overflows; the first has a finite one or none at all."""
    net = sharded(kind, make(norm=False))
    wrapper: TwoPassOptimWrapper = build('sam', net, SGD(net.parameters(), lr=0.1), dtype=dtype)
    net.train_step(shard(batches(1, size=8)[0], rank, processes), wrapper)
    before, scaler = pieces(net), wrapper.precision.scaler
    scale = None if scaler is None else scaler.get_scale()
    for parameter in net.parameters():
        # In a flat parameter a piece may have no gradient; a DTensor has one everywhere or nowhere.
        none = kind == 'flat' and (rank == 0 or parameter.numel() == 0)
        parameter.grad = None if none else torch.ones_like(parameter)
        if parameter.grad is not None and rank == processes - 1:
            local_shard(parameter.grad).fill_(float('inf'))
    wrapper._within_update = True
    finite = wrapper._two_pass.verdict()
    if finite is None or finite:
        wrapper.step()
    return {'kept': before == pieces(net), 'halved': None if scale is None else scaler.get_scale() == scale / 2}


def norm_beside_ignored(rank: int, processes: int) -> Result:
    """The first climb of a model whose convolution FSDP leaves alone, and this process's own gradient of that."""
    net = sharded('ignored', make(norm=False))
    batch = shard(batches(1, size=8)[0], rank, processes)
    alone = make(norm=False)
    own = gradients_of(alone.parse_losses(alone(**batch))[0], list(alone.parameters()))
    wrapper = build('sam', net, SGD(net.parameters(), lr=0.1))
    net.train_step(batch, wrapper)
    return {'norm': wrapper.last_step.grad_norm.item(), 'own': [gradient.numpy() for gradient in own]}


def error_of(function: Callable[[], Any]) -> str:
    """What ``function`` raises, as text."""
    try:
        function()
    except (ValueError, NotImplementedError) as error:
        return f'{type(error).__name__}: {error}'
    except Exception:  # a test reads it, and fails
        return traceback.format_exc()
    return ''
