"""What a GPU can break: on the first one if there is one, else the same steps on the CPU.

`tools/gpu_report.sh` runs this file first. Those of waiting for the device and of SyncBatchNorm need a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from torch import Tensor, nn

from mm_sharp.ops import multi_tensor
from tests.distributed import free_port
from tests.rank_steps import loss_of
from tests.references import sam_training
from tests.toys import Batch, batches, make
from tests.wrappers import DISTINCT, TWO_PASS, build, momentum_sgd

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
on_a_gpu = pytest.mark.skipif(DEVICE.type == 'cpu', reason='there is no GPU: tools/gpu_report.sh runs this on one')


def on_device(count: int, *, ids_on_host: bool = True) -> list[Batch]:
    """Batches on the device, with ids on the host, as data samples have them, or there too."""
    found = [{name: tensor.to(DEVICE) for name, tensor in batch.items()} for batch in batches(count)]
    return [{**b, 'sample_idx': b['sample_idx'].tolist()} if ids_on_host else b for b in found]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error within."""
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone: NCCL on a GPU, gloo on the CPU."""
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()), LOCAL_RANK='0')
    dist.init_process_group('nccl' if DEVICE.type == 'cuda' else 'gloo', rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize('adaptive', [False, 'tensor'])
def test_steps_equal_the_reference_on_the_device(adaptive: bool | str) -> None:
    ours, theirs = make(norm=False).to(DEVICE), make(norm=False).to(DEVICE)
    wrapper = build('sam', ours, adaptive=adaptive)
    data = on_device(4)
    for batch in data:
        ours.train_step(batch, wrapper)
    sam_training(theirs, momentum_sgd(theirs), partial(loss_of, theirs), [[batch] for batch in data], adaptive)
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert left.device.type == DEVICE.type
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('name', DISTINCT)
def test_mixed_precision_trains_and_puts_the_weights_back(name: str, dtype: str) -> None:
    """With a learning rate of zero every weight is what it was, bit for bit, and the losses are finite."""
    model = make().to(DEVICE)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    wrapper = build(name, model, momentum_sgd(model, lr=0.0), dtype=dtype)
    for batch in on_device(3):
        assert torch.isfinite(model.train_step(batch, wrapper)['loss'])
    wrapper.state_dict()  # momentum SAM keeps perturbed weights between the steps, and saves unperturbed ones
    if name in TWO_PASS:
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize('name', DISTINCT)
def test_one_process_under_ddp_equals_none(name: str) -> None:
    plain, parallel = make().to(DEVICE), make().to(DEVICE)
    data = on_device(3)
    with one_process():
        wrapped = MMDistributedDataParallel(parallel, device_ids=[0] if DEVICE.type == 'cuda' else None)
        for model in (plain, wrapped):
            wrapper = build(name, model)
            for batch in data:
                model.train_step(batch, wrapper)
    for left, right in zip(plain.parameters(), parallel.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_a_sharded_model_of_one_process_equals_a_whole_one() -> None:
    fsdp = pytest.importorskip('torch.distributed.fsdp')
    if not hasattr(fsdp, 'fully_shard'):
        pytest.skip('fully_shard is absent before torch 2.6')

    plain, sharded = make(norm=False).to(DEVICE), make(norm=False).to(DEVICE)
    data = on_device(3)
    with one_process():
        fsdp.fully_shard(sharded)
        for model in (plain, sharded):
            wrapper = build('sam-tensor', model)
            for batch in data:
                model.train_step(batch, wrapper)
        whole = [parameter.full_tensor().detach() for parameter in sharded.parameters()]
    for left, right in zip(plain.parameters(), whole, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@on_a_gpu
@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
@pytest.mark.parametrize('name', [name for name in DISTINCT if 'loader' not in name])
def test_no_step_waits_for_the_device(name: str, dtype: str | None) -> None:
    """After the first steps, which find out about the model, and read what has come back from earlier ones.

    Where ESAM selects by what the same step has measured, it has to wait if there is a list to be cut.
    """
    model = make().to(DEVICE)
    wrapper = build(name, model, **({'dtype': dtype} if dtype else {}))
    data = on_device(7, ids_on_host=name != 'esam')
    for number, batch in enumerate(data):
        measures = name == 'esam-history' and number % 2 == 0
        with nullcontext() if number < 3 or measures else no_waiting():
            model.train_step(batch, wrapper)
        torch.cuda.synchronize()


@on_a_gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_kernels_over_many_tensors_equal_torchs_operations(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of empty tensors too, of several layouts, more elements than a program takes, and unaligned memory."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (4097,), (), (2, 3, 5, 7), (0,), (100, 101)] * 4

    def draw(start: int) -> list[Tensor]:
        found = [torch.randn(torch.Size(shape).numel() + start, generator=generator) for shape in shapes]
        tensors = [f.to(DEVICE, dtype)[start:].view(shape) for f, shape in zip(found, shapes, strict=True)]
        return [t.to(memory_format=torch.channels_last) if t.ndim == 4 and not start else t for t in tensors]

    def results(weights: list[Tensor], steps: list[Tensor], factor: Tensor, finite: Tensor) -> list[Tensor]:
        weights, steps = [w.clone() for w in weights], [s.clone() for s in steps]
        multi_tensor.add_scaled_(weights, steps, factor, finite)
        assert all(tensor._version for tensor in (*weights, *steps))
        zeros = [w.clone() for w in weights]
        multi_tensor.zero_unless_(finite, zeros)
        full = [w for w in weights if w.numel()]
        return [*weights, *steps, *zeros, multi_tensor.norms(weights), multi_tensor.finite_each(full)]

    for start, bad, each in product((0, 1), (False, True), (False, True)):
        weights, steps = draw(start), draw(start)
        steps[1][4096] = float('inf') if bad else 1.0
        weights[-1][0, 0] = float('nan') if bad else 1.0
        factor = torch.rand(len(shapes) if each else (), generator=generator).to(DEVICE, dtype)
        finite = torch.tensor(not bad, device=DEVICE)
        ours = results(weights, steps, factor, finite)
        with monkeypatch.context() as patch:
            patch.setattr(multi_tensor, 'FEW', 1000)
            theirs = results(weights, steps, factor, finite)
        for left, right in zip(ours[:-2], theirs[:-2], strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(ours[-2], theirs[-2], rtol=1e-5, atol=0, equal_nan=True)
        assert torch.equal(ours[-1], theirs[-1])
        assert bool(ours[-1].all()) != bad


@on_a_gpu
def test_synchronised_batch_norm_equals_batch_norm_of_one_process() -> None:
    plain, synced = make().to(DEVICE), make().to(DEVICE)
    data = on_device(3)
    with one_process():
        parallel = MMDistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(synced), device_ids=[0])
        for model in (plain, parallel):
            wrapper = build('sam', model)
            for batch in data:
                model.train_step(batch, wrapper)
    left, right = plain.state_dict(), parallel.module.state_dict()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-4, atol=1e-5)


@on_a_gpu
def test_a_compiled_backbone_gives_the_same_step() -> None:
    plain, compiled = make().to(DEVICE), make().to(DEVICE)
    compiled.features = torch.compile(compiled.features)  # type: ignore[method-assign]
    for model in (plain, compiled):
        wrapper = build('ausam', model)
        for batch in on_device(3):
            model.train_step(batch, wrapper)
    for left, right in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)
