"""Two gloo processes under MMEngine's DDP, against references in one process."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.model import MMDistributedDataParallel, MMSeparateDistributedDataParallel
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from mm_sharp import AUSAMOptimWrapper
from mm_sharp.ops.perturbation import weight_mask
from mm_sharp.samples.seeds import RngStream, make_generator
from tests.corrupted import finite, logged
from tests.distributed import run
from tests.memory_toys import Queue
from tests.rank_steps import esam_gradients, loss_of, shard
from tests.rank_toys import SyncedNet, digest
from tests.references import sam_gradients, sam_step
from tests.references_esam import ReferenceESAM
from tests.references_family import FAMILY, FlatReference
from tests.reliability import Holds
from tests.toys import Batch, Notes, ToyNet, batches, make
from tests.wrappers import DISTINCT, WRAPPERS, build, forwards_in, momentum_sgd

STEPS = 4
Arrays = list[np.ndarray]


def uneven_shard(batch: Batch, rank: int, processes: int) -> Batch:
    """All but one sample for the first of two ranks, one for the second."""
    return {key: value[:-1] if rank == 0 else value[-1:] for key, value in batch.items()}


# Every case by name: (wrapper, options). All run in one pair of processes, since starting them takes seconds.
PLAIN = dict(norm=False)
CHECKPOINTED = dict(norm=False, with_cp=True)
BUCKETS = dict(gradient_as_bucket_view=True)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    'synced sam': ('sam', dict(model=PLAIN, sync_perturbation=True)),
    'synced asam': ('asam', dict(model=PLAIN, sync_perturbation=True)),
    'synced sam-tensor': ('sam-tensor', dict(model=PLAIN, sync_perturbation=True, perturb='all')),
    'per rank': ('sam', dict(model=PLAIN)),
    'accumulated per rank': ('sam', dict(model=PLAIN, accumulative_counts=2)),
    'accumulated synced': ('sam', dict(model=PLAIN, accumulative_counts=2, sync_perturbation=True)),
    'esam per rank': ('esam', dict(model=PLAIN)),
    'esam synced': ('esam', dict(model=PLAIN, sync_perturbation=True)),
    'ausam': ('ausam', dict(model=PLAIN)),
    **{name: (name, dict(model=PLAIN)) for name in FAMILY},
    **{f'{name} synced': (name, dict(model=PLAIN, sync_perturbation=True)) for name in FAMILY},
    **{f'{name} accumulated': (name, dict(model=PLAIN, accumulative_counts=2)) for name in FAMILY},
    'ausam synced': ('ausam', dict(model=PLAIN, sync_perturbation=True)),
    'zeroed buckets': ('sam', dict(model=PLAIN, sync_perturbation=True, zeroed=True, ddp=BUCKETS)),
    'checkpointed per rank': ('sam', dict(model=CHECKPOINTED)),
    'parts checkpointed per rank': ('sam', dict(model=CHECKPOINTED, kind=MMSeparateDistributedDataParallel)),
    'parts per rank': ('sam', dict(model=PLAIN, kind=MMSeparateDistributedDataParallel)),
    'parts synced sam': ('sam', dict(model=PLAIN, kind=MMSeparateDistributedDataParallel, sync_perturbation=True)),
    'parts esam per rank': ('esam', dict(model=PLAIN, kind=MMSeparateDistributedDataParallel)),
    'parts esam synced': ('esam', dict(model=PLAIN, kind=MMSeparateDistributedDataParallel, sync_perturbation=True)),
    'parts ausam': ('ausam', dict(model=PLAIN, kind=MMSeparateDistributedDataParallel)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    'unused': dict(ddp=dict(find_unused_parameters=True), sync_perturbation=True),
    'buckets': dict(ddp=dict(broadcast_buffers=True, gradient_as_bucket_view=True), accumulative_counts=2),
    'fp16': dict(ddp=dict(broadcast_buffers=True), sync_perturbation=True, dtype='float16'),
    'anomalous': dict(ddp=dict(detect_anomalous_params=True), dtype='bfloat16', clip_grad=dict(max_norm=0.5)),
    'static synced': dict(ddp=dict(static_graph=True), sync_perturbation=True),
    'uneven': dict(uneven=True, model=dict(kind=SyncedNet)),
    'uneven synced': dict(uneven=True, model=dict(kind=SyncedNet), sync_perturbation=True, accumulative_counts=2),
}
if torch.__version__ < (2, 3):  # no float16 on its CPU
    del OPTIONS['fp16']
SAID = {
    'unused': 'find_unused_parameters, sync_perturbation',
    'buckets': 'broadcast_buffers, gradients as bucket views, accumulation',
    'fp16': 'float16, broadcast_buffers, sync_perturbation',
    'anomalous': 'detect_anomalous_params, bfloat16, clipping',
    'static synced': 'static_graph, sync_perturbation',
    'uneven': '7 samples and 1, synchronised BatchNorm',
    'uneven synced': '7 samples and 1, synchronised BatchNorm, sync_perturbation, accumulation',
}
# DDP learns a static graph in its first backward pass, which ESAM must run without synchronisation.
# Of methods that differ in what no option of DDP's can break, one is enough.
NAMES = [name for name in DISTINCT if name != 'gsam']
PAIRS = [(option, name) for option in OPTIONS for name in NAMES if (option, name[:4]) != ('static synced', 'esam')]
CORRUPTED = [name for name in DISTINCT if 'loader' not in name]
# Momentum SAM has no first gradients.
ROUTED = [(name, count) for name in FAMILY if name != 'msam' for count in (1, 2)]
CASES.update({f'{option} {name}': (name, OPTIONS[option]) for option, name in PAIRS})


def train_all(rank: int, processes: int) -> dict[str, Any]:
    """Every case, one after the other, and the keys of a wrapper's own state."""
    results: dict[str, Any] = {case: train(rank, processes, *CASES[case]) for case in CASES}
    try:
        train(rank, processes, 'sam', dict(ddp=dict(static_graph=True)))
    except NotImplementedError as error:
        results['static error'] = str(error)
    try:
        train(rank, processes, 'esam', dict(ddp=dict(static_graph=True), sync_perturbation=True))
    except NotImplementedError as error:
        results['esam static error'] = str(error)
    results['corrupted'] = {name: train_corrupted(rank, name) for name in CORRUPTED}
    results['broadcast'] = [train_queue(rank, processes, name) for name in (None, 'sam', 'esam', 'ausam')]
    results['fork'] = [train_fork(processes, **ddp) for ddp in ({}, BUCKETS)]
    results['routed'] = {case: train_routed(rank, processes, *case) for case in ROUTED}
    results['routed synced'] = [train_routed(rank, processes, 'sam', n, sync_perturbation=True) for n in (1, 2)]
    results['state keys'] = sorted(build('sam', make()).state_dict()['mm_sharp'])
    return results


@pytest.fixture(scope='module')
def ranks() -> list[dict[str, Any]]:
    """What each of two ranks reports, by case."""
    return run(train_all, 2)


def arrays(model: nn.Module) -> Arrays:
    return [value.numpy().copy() for value in model.state_dict().values()]


def train(rank: int, processes: int, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train the toy on this rank's shards and report its weights and collectives."""
    options = dict(options)
    model_options, ddp_options = options.pop('model', {}), options.pop('ddp', {})
    part = uneven_shard if options.pop('uneven', False) else shard
    model = options.pop('kind', MMDistributedDataParallel)(make(**model_options), **ddp_options)
    zeroed = options.pop('zeroed', False)
    wrapper = build(name, model, momentum_sgd(model), **options)
    if zeroed:
        wrapper.zero_grad = partial(wrapper.optimizer.zero_grad, set_to_none=False)  # type: ignore[method-assign]
    wrapper.initialize_count_status(model, 0, STEPS)
    reduced: list[int] = []
    # How many bytes DDP averages over the ranks, and when.
    for child in [model] if type(model) is MMDistributedDataParallel else model.module.children():
        if isinstance(child, MMDistributedDataParallel):
            child.register_comm_hook(reduced, counting_all_reduce)
    counts, drawn, hashes = [], [], []
    for batch in batches(STEPS, size=8):
        model.train_step(part(batch, rank, processes), wrapper)
        hashes.append(digest(model))
        counts.append(sum(reduced))
        reduced.clear()
        if isinstance(wrapper, AUSAMOptimWrapper):
            drawn.append(wrapper._draw.chosen.tolist())
    record = wrapper.last_step
    return {
        'state': arrays(model.module),
        'weights': [parameter.detach().numpy().copy() for parameter in model.parameters()],
        'reduced': counts,
        'norm': None if record.grad_norm is None else record.grad_norm.item(),
        'seed': getattr(wrapper, 'seed', None),
        'drawn': drawn,
        'hashes': hashes,
    }


def train_queue(rank: int, processes: int, name: str | None) -> Arrays:
    """The weights of a model with memory, whose buffers DDP sends from the first rank, at a radius of zero."""
    model = MMDistributedDataParallel(make(Queue), broadcast_buffers=True)
    optimizer = momentum_sgd(model)
    kwargs = {'beta': 1.0} if name == 'esam' else {}
    wrapper = OptimWrapper(optimizer) if name is None else build(name, model, optimizer, whole=True, rho=0.0, **kwargs)
    for batch in batches(STEPS, size=8):
        model.train_step(shard(batch, rank, processes), wrapper)
    return [parameter.detach().numpy().copy() for parameter in model.parameters()]


class Fork(ToyNet):
    """Its first and its second pass have heads of their own, as experts have that are chosen by what they see."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.other, self.unused = nn.Linear(6 * 4 * 4, 3), nn.Linear(2, 2)
        self.passes = Notes()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        self.passes.append(None)
        head = self.head if len(self.passes) % 2 else self.other
        return {'loss': self.square_loss(head(self.features(inputs).flatten(1)), targets)}


def train_fork(processes: int, **ddp: Any) -> Arrays:
    """The weights of a model that uses other parameters in each pass, on the same samples in all processes."""
    fork = make(Fork)
    model = fork if processes == 1 else MMDistributedDataParallel(fork, find_unused_parameters=True, **ddp)
    wrapper = build('sam', model, torch.optim.SGD(model.parameters(), lr=0.05), accumulative_counts=2)
    for batch in batches(STEPS, size=8):
        model.train_step(batch, wrapper)
    return [parameter.detach().numpy().copy() for parameter in model.parameters()]


class Routed(ToyNet):
    """Samples of other ids go through another head; ``whole``: the one that they do not use has a gradient of zero."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__(norm=False)
        self.other, self.unused = nn.Linear(6 * 4 * 4, 3), nn.Linear(6 * 4 * 4, 3)
        self.whole = whole

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        number = int(sample_idx[0])
        features = self.features(inputs).flatten(1)
        heads = [self.head, self.other] if (number // 4 + number // 8) % 2 else [self.other, self.head]
        loss = self.square_loss(heads[0](features), targets)
        if self.whole:
            loss = loss + sum(0.0 * head(features).sum() for head in (heads[1], self.unused))
        return {'loss': loss}


def train_routed(rank: int, processes: int, name: str, count: int, **options: Any) -> Arrays:
    """The weights of a model of which each process uses other parts."""
    model = MMDistributedDataParallel(make(Routed), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wrapper = build(name, model, optimizer, accumulative_counts=count, **options)
    for batch in batches(2 * STEPS, size=8):
        model.train_step(shard(batch, rank, processes), wrapper)
    return arrays(model.module)


# DDP compares the annotations themselves, and here they would be strings.
def counting_all_reduce(reduced, bucket):  # type: ignore[no-untyped-def]
    reduced.append(bucket.buffer().numel())
    return allreduce_hook(None, bucket)


def assert_close(left: Arrays, right: Arrays, tolerance: float = 1e-6) -> None:
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def assert_identical(left: Arrays, right: Arrays) -> None:
    assert all(a.tobytes() == b.tobytes() for a, b in zip(left, right, strict=True))


PARAMETERS = sum(p.numel() for p in make(norm=False).parameters())


@pytest.mark.parametrize('name', ['sam', 'asam', 'sam-tensor'])
def test_synced_perturbation_equals_one_process_with_the_joint_batch(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[f'synced {name}'] for rank in ranks)
    model = make(norm=False)
    optimizer = momentum_sgd(model)
    options = WRAPPERS[name][1]
    rho, adaptive = options['rho'], options.get('adaptive', False)
    for batch in batches(STEPS, size=8):
        sam_step(model, optimizer, lambda batch=batch: loss_of(model, batch), rho, adaptive)
    assert_identical(first['state'], second['state'])
    assert_close(first['state'], arrays(model))
    assert first['norm'] == second['norm']
    assert first['reduced'] == [2 * PARAMETERS] * STEPS, 'one all-reduce for each pass'


@pytest.mark.parametrize('name', FAMILY)
def test_the_family_on_ranks_equals_its_reference(ranks: list[dict[str, Any]], name: str) -> None:
    """A rank's part of a batch is as a micro-batch of one process; what a method keeps is the same on all ranks."""
    for case, count in ((name, 1), (f'{name} accumulated', 2)):
        first, second = (rank[case] for rank in ranks)
        model = make(norm=False)
        reference = FAMILY[name](model, momentum_sgd(model))
        parts = [shard(batch, rank, 2) for batch in batches(STEPS, size=8) for rank in range(2)]
        for start in range(0, len(parts), 2 * count):
            reference.step(parts[start : start + 2 * count])
        assert_identical(first['state'], second['state'])
        assert_close(first['state'], arrays(model))
    assert ranks[0][name]['reduced'] == [PARAMETERS] * STEPS, "DDP's own averaging takes part in the first pass"


@pytest.mark.parametrize('name', FAMILY)
def test_the_family_with_a_joint_perturbation_is_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[f'{name} synced'] for rank in ranks)
    model = make(norm=False)
    wrapper = build(name, model)
    for batch in batches(STEPS, size=8):
        model.train_step(batch, wrapper)
    assert_identical(first['state'], second['state'])
    assert_close(first['state'], arrays(model))
    assert first['reduced'] == [forwards_in(name, step) * PARAMETERS for step in range(STEPS)]


def test_per_rank_perturbation_equals_its_own_reference(ranks: list[dict[str, Any]]) -> None:
    """Each rank climbs by its own gradient; the final gradients are averaged."""
    first, second = (rank['per rank'] for rank in ranks)
    model = make(norm=False)
    optimizer = momentum_sgd(model)
    for batch in batches(STEPS, size=8):
        shards = [shard(batch, rank, 2) for rank in range(2)]
        final = [sam_gradients(model, lambda part=part: loss_of(model, part), 0.05) for part in shards]
        for parameter, *parts in zip(model.parameters(), *final, strict=True):
            parameter.grad = sum(parts) / 2
        optimizer.step()
    assert_identical(first['state'], second['state'])
    assert_close(first['state'], arrays(model))
    assert first['norm'] != second['norm'], 'the ranks share a perturbation'
    assert first['reduced'] == [PARAMETERS] * STEPS, 'the first pass communicates'


@pytest.mark.parametrize('synced', [False, True])
def test_accumulation_communicates_once_a_cycle(ranks: list[dict[str, Any]], synced: bool) -> None:
    case = f'accumulated {"synced" if synced else "per rank"}'
    first, second = (rank[case] for rank in ranks)
    model = make(norm=False)
    optimizer = momentum_sgd(model)
    data = batches(STEPS, size=8)
    for start in range(0, STEPS, 2):
        final = []
        for batch in data[start : start + 2]:
            parts = [batch] if synced else [shard(batch, rank, 2) for rank in range(2)]
            each = [sam_gradients(model, lambda part=part: loss_of(model, part), 0.05) for part in parts]
            final.append([sum(g) / len(parts) for g in zip(*each, strict=True)])
        for parameter, *gradients in zip(model.parameters(), *final, strict=True):
            parameter.grad = sum(gradients) / 2
        optimizer.step()
    assert_identical(first['state'], second['state'])
    assert_close(first['state'], arrays(model))
    pass1 = PARAMETERS if synced else 0
    assert first['reduced'] == [pass1, pass1 + PARAMETERS] * (STEPS // 2)


@pytest.mark.parametrize('synced', [False, True])
def test_esam_on_ranks_equals_its_reference(ranks: list[dict[str, Any]], synced: bool) -> None:
    """The ranks perturb the same tensors; each selects from its own shard."""
    first, second = (rank[f'esam {"synced" if synced else "per rank"}'] for rank in ranks)
    assert first['seed'] == second['seed']
    model = make(norm=False)
    optimizer = momentum_sgd(model)
    references = [ReferenceESAM(model, optimizer) for _ in range(2)]
    parameters = list(model.parameters())
    for step, batch in enumerate(batches(STEPS, size=8)):
        mask = weight_mask(len(parameters), 0.6, make_generator(first['seed'], RngStream.MASK, step))
        shards = [shard(batch, rank, 2) for rank in range(2)]
        climbs = [batch, batch] if synced else shards
        final = [
            esam_gradients(reference, climb, part, mask)
            for reference, climb, part in zip(references, climbs, shards, strict=True)
        ]
        for parameter, *parts in zip(parameters, *final, strict=True):
            parameter.grad = sum(parts) / 2
        optimizer.step()
    assert_identical(first['state'], second['state'])
    assert_close(first['state'], arrays(model))
    assert (first['norm'] == second['norm']) == synced
    assert first['reduced'] == [PARAMETERS] * STEPS, "DDP's own averaging takes part in the first pass"


@pytest.mark.parametrize('synced', [False, True])
def test_ausam_on_ranks_equals_sam_on_what_each_draws(ranks: list[dict[str, Any]], synced: bool) -> None:
    first, second = (rank[f'ausam{" synced" if synced else ""}'] for rank in ranks)
    assert first['drawn'] != second['drawn'], 'the ranks share their draws'
    model = make(norm=False)
    optimizer = momentum_sgd(model)
    for step, batch in enumerate(batches(STEPS, size=8)):
        shards = [shard(batch, rank, 2) for rank in range(2)]
        drawn = [
            {key: value[result['drawn'][step]] for key, value in part.items()}
            for part, result in zip(shards, (first, second), strict=True)
        ]
        joint = {key: torch.cat([part[key] for part in drawn]) for key in batch}
        parts = [joint] if synced else drawn
        final = [sam_gradients(model, lambda part=part: loss_of(model, part), 0.05) for part in parts]
        for parameter, *gradients in zip(model.parameters(), *final, strict=True):
            parameter.grad = sum(gradients) / len(parts)
        optimizer.step()
    assert_identical(first['state'], second['state'])
    assert_close(first['state'], arrays(model))


def test_gradients_that_live_in_buckets_do_not_mix(ranks: list[dict[str, Any]]) -> None:
    """The first pass averages into the memory of gradients that were set to zero and not taken away."""
    for rank in ranks:
        assert_identical(rank['zeroed buckets']['state'], rank['synced sam']['state'])


def test_every_pass_has_the_buffers_that_ddp_sent(ranks: list[dict[str, Any]]) -> None:
    """They are sent in a step's first forward only, and the other ranks had others before."""
    for base, *ours in (rank['broadcast'] for rank in ranks):
        for weights in ours:
            assert_identical(base, weights)


def test_ddp_finds_what_the_second_pass_alone_does_not_use(ranks: list[dict[str, Any]]) -> None:
    expected = train_fork(1)
    for rank in ranks:
        for weights in rank['fork']:
            assert_close(weights, expected)


@pytest.mark.parametrize(('name', 'count'), ROUTED)
def test_processes_that_use_other_parts_of_a_model_equal_the_reference(
    ranks: list[dict[str, Any]], name: str, count: int
) -> None:
    """Each has first gradients of its own parameters, or has them in another order."""
    model = make(Routed, whole=name != 'friendlysam')
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    parts = [shard(batch, rank, 2) for batch in batches(2 * STEPS, size=8) for rank in range(2)]
    if name == 'friendlysam':  # it perturbs what has a gradient, be it zero, along its average: no zeros, but ours
        wrapper = build(name, model, optimizer, accumulative_counts=2 * count)
        for part in parts:
            model.train_step(part, wrapper)
    else:
        reference = FAMILY[name](model, optimizer)
        for start in range(0, len(parts), 2 * count):
            reference.step(parts[start : start + 2 * count])
    for rank in ranks:
        assert_close(rank['routed'][name, count], arrays(model))


@pytest.mark.parametrize('count', [1, 2])
def test_synced_processes_that_use_other_parts_of_a_model_equal_the_reference(
    ranks: list[dict[str, Any]], count: int
) -> None:
    model = make(Routed, whole=True)
    reference = FlatReference(model, torch.optim.SGD(model.parameters(), lr=0.05))
    joint = batches(2 * STEPS, size=8)
    for start in range(0, len(joint), count):
        final = []
        for batch in joint[start : start + count]:
            parts = [shard(batch, rank, 2) for rank in range(2)]
            e = reference.perturbation(torch.stack([reference.gradient(part) for part in parts]).mean(0))
            final += [reference.gradient(part, e) for part in parts]
        reference.finish(torch.stack(final).mean(0))
    for rank in ranks:
        assert_close(rank['routed synced'][count - 1], arrays(model))


@pytest.mark.parametrize(
    'case', ['per rank', 'checkpointed per rank', 'synced sam', 'esam per rank', 'esam synced', 'ausam']
)
def test_ddp_around_each_part_is_as_ddp_around_the_whole(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        parts, whole = rank[f'parts {case}'], rank[case]
        assert_close(parts['state'], whole['state'])
        assert parts['reduced'] == whole['reduced'], 'the first pass communicates as it should not, or the other way'
        assert parts['norm'] == pytest.approx(whole['norm'], rel=1e-5)
    assert_identical(*(rank[f'parts {case}']['state'] for rank in ranks))


@pytest.mark.parametrize(('option', 'name'), PAIRS)
def test_ddp_options_keep_the_ranks_equal(ranks: list[dict[str, Any]], option: str, name: str, holds: Holds) -> None:
    results = [rank[f'{option} {name}'] for rank in ranks]
    assert_identical(*(result['weights'] for result in results))
    assert all(np.isfinite(array).all() for result in results for array in result['state'])
    start = arrays(make(**OPTIONS[option].get('model', {})))
    assert any((a != b).any() for a, b in zip(results[0]['state'], start, strict=True))
    assert results[0]['hashes'] == results[1]['hashes']
    count = 2 * STEPS
    unit = 'weights compared by hash (steps × ranks)'
    holds('Ranks', f'{SAID[option]}', name, 'the same weights on 2 ranks', count=count, unit=unit)


def test_a_static_graph_needs_a_synchronised_first_pass(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert 'set sync_perturbation=True' in rank['static error']
        assert 'Take static_graph=True out of model_wrapper_cfg' in rank['esam static error']
        assert 'sync_perturbation' not in rank['esam static error']


def test_checkpoints_of_several_processes_hold_no_random_state(ranks: list[dict[str, Any]]) -> None:
    assert [rank['state keys'] for rank in ranks] == [['base_optimizer', 'optimizer_steps', 'version', 'wrapper']] * 2


# ------------------------------------------------------------------ values that are not finite
def train_corrupted(rank: int, name: str) -> dict[str, Any]:
    """Four steps on batches of this rank's own; rank 1's second one is not finite."""
    model = MMDistributedDataParallel(make())
    wrapper = build(name, model, momentum_sgd(model))
    weights = []
    with logged() as records:
        for step, batch in enumerate(batches(4, seed=rank)):
            if (rank, step) == (1, 1):
                batch['inputs'].fill_(torch.nan)
            model.train_step(batch, wrapper)
            weights.append([parameter.detach().numpy().copy() for parameter in model.parameters()])
    # Others say once where the training stands.
    messages = [(record.levelno, record.getMessage()) for record in records if 'Samples: ' in record.getMessage()]
    return {'weights': weights, 'messages': messages, 'finite': finite(model, wrapper)}


@pytest.mark.parametrize('name', CORRUPTED)
def test_one_rank_has_a_batch_that_is_not_finite(ranks: list[dict[str, Any]], name: str, holds: Holds) -> None:
    first, second = (rank['corrupted'][name] for rank in ranks)
    assert first['finite']
    assert second['finite']
    for left, right in zip(first['weights'], second['weights'], strict=True):
        assert_identical(left, right)
    assert_identical(first['weights'][0], first['weights'][1])  # the second step is left out on both
    assert any((a != b).any() for a, b in zip(first['weights'][1], first['weights'][2], strict=True))
    ((level, message),), ((their_level, their_message),) = first['messages'], second['messages']
    # Of ranks other than the first, MMEngine shows errors only.
    assert (level, their_level) == (logging.WARNING, logging.ERROR)
    assert 'the losses of this batch are; the optimizer does not step' in message
    assert 'the loss is nan' in their_message
    holds('Values that are not finite', 'nan on one of two ranks', name, 'no rank steps; weights equal on all ranks')
