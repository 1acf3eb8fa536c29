"""Two gloo processes under FSDP, of both of torch's kinds, against references in one process."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from mm_sharp.ops.perturbation import RELATIVE, weight_mask
from mm_sharp.samples.seeds import RngStream, make_generator
from tests.distributed import run
from tests.fsdp_cases import STEPS, Faulty, error_of, norm_beside_ignored, overflow_of_one, sizes_of, train
from tests.fsdp_runs import WHOLE, run_and_resume
from tests.rank_steps import esam_gradients, loss_of, shard
from tests.references import sam_training
from tests.references_esam import ReferenceESAM
from tests.references_family import FAMILY
from tests.reliability import Holds
from tests.toys import Batch, ToyNet, batches, make
from tests.wrappers import build, momentum_sgd

# Two processes for many seconds.
pytestmark = pytest.mark.slow

# What they are called on the page of findings.
KINDS = {
    'flat': 'FSDP1, one flat parameter',
    'layers': 'FSDP1, layer by layer',
    'zero2': 'FSDP1, SHARD_GRAD_OP',
    'whole': 'FSDP1, NO_SHARD',
    'no names': 'FSDP1, use_orig_params=False',
    'fsdp2': 'FSDP2',
    'fsdp2 layers': 'FSDP2, layer by layer',
    'fsdp2 hybrid': 'FSDP2, each piece held twice',
    'fsdp2 layers before 2.13': 'FSDP2 before torch 2.13',
}
STEPPED = list(KINDS)[:-1]
BOTH = ('flat', 'fsdp2 layers')
COMPARED = 'steps compared with one process'
CONV = dict(include=['^conv'])
CLIP = dict(clip_grad=dict(max_norm=0.3))


def named(kind: str, relative: str) -> bool:
    """Whether a sharded model's tensors can be told apart, or need not be."""
    return kind != 'no names' or relative == 'global'


# By name: (how it is sharded, wrapper, options). All run in one pair of processes, since starting them takes seconds.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f'{kind} sam': (kind, 'sam', {}) for kind in STEPPED},
    **{f'{kind} asam': (kind, 'asam', {}) for kind in BOTH},
    **{f'{kind} {to}': (kind, 'sam', dict(adaptive=to)) for kind in STEPPED for to in RELATIVE if named(kind, to)},
    **{f'{kind} sizes': (kind, 'sam', dict(sizes=True)) for kind in STEPPED if kind != 'no names'},
    **{f'{kind} part sizes': (kind, 'sam-tensor', dict(sizes=True, perturb=CONV)) for kind in BOTH},
    **{f'{kind} part by tensor': (kind, 'sam', dict(adaptive='tensor', perturb=CONV)) for kind in BOTH},
    **{f'{kind} esam': (kind, 'esam', {}) for kind in (*BOTH, 'zero2')},
    **{f'{kind} ausam': (kind, 'ausam', {}) for kind in BOTH},
    **{f'{kind} {name}': (kind, name, {}) for kind in BOTH for name in FAMILY},
    **{f'{kind} accumulated': (kind, 'sam', dict(accumulative_counts=2)) for kind in (*BOTH, 'no names')},
    **{f'{kind} part': (kind, 'sam', dict(perturb=CONV)) for kind in BOTH},
    **{f'{kind} clipped': (kind, 'sam', CLIP) for kind in BOTH},
    **{f'{kind} clipped by value': (kind, 'sam', dict(clip_grad=dict(type='value', clip_value=0.01))) for kind in BOTH},
    **{f'{kind} corrupted': (kind, 'sam', dict(corrupted=1)) for kind in BOTH},
    **{f'{kind} validated': (kind, 'sam', dict(validate=True)) for kind in BOTH},
    **{
        f'{kind} {dtype}': (kind, 'sam', dict(dtype=dtype, **(dict(loss_scale=512.0) if dtype == 'float16' else {})))
        for kind in BOTH
        for dtype in ('float16', 'bfloat16')
    },
    **{f'{kind} still {name}': (kind, name, dict(lr=0.0)) for kind in BOTH for name in ('asam', 'esam', 'ausam')},
}
FAULTS = [(kind, fault, at) for kind in BOTH for fault in ('forward', 'backward') for at in (2, 3)]
FAULTS += [(kind, 'step', -1) for kind in BOTH]
FAULTS += [('fsdp2 layers before 2.13', fault, at) for _, fault, at in FAULTS[:4]]


def run_all(rank: int, processes: int, folder: str) -> dict[str, Any]:
    """Every case, one after the other."""
    results: dict[str, Any] = {
        case: train(rank, processes, kind, name, **options) for case, (kind, name, options) in CASES.items()
    }
    for kind, fault, at in FAULTS:
        results[f'{kind} {fault} {at}'] = train(
            rank, processes, kind, 'sam', model=make(Faulty, fault=fault, at=at), faults=1, accumulative_counts=2
        )
    for kind in BOTH:
        for fault in ('forward', 'backward'):
            # In the second micro-batch of the second step, which has a momentum to perturb along.
            results[f'{kind} msam {fault}'] = train(
                rank, processes, kind, 'msam', model=make(Faulty, fault=fault, at=3), faults=1, accumulative_counts=2
            )
        for dtype in (None, 'float16'):
            results[f'{kind} overflow {dtype}'] = overflow_of_one(rank, processes, kind, dtype)
    results['ignored'] = norm_beside_ignored(rank, processes)
    for key, (cfg, wrapper, _) in RUNS.items():
        results[key] = run_and_resume(rank, processes, f'{folder}/{key}', cfg, wrapper)
    for key, (kind, name, options) in REFUSED.items():
        results[key] = error_of(lambda kind=kind, name=name, options=options: train(rank, 2, kind, name, **options))
    return results


RUNS: dict[str, tuple[Any, dict[str, Any], str]] = {
    'parts': ('local', dict(type='AUSAMOptimWrapper', accumulative_counts=3), "a checkpoint of each rank's part"),
    'whole': (
        WHOLE,
        dict(type='ESAMOptimWrapper', selection='history', refresh=2, dtype='float16'),
        'one whole checkpoint',
    ),
    'kept parts': ('local', dict(type='LookSAMOptimWrapper', k=2), "a checkpoint of each rank's part"),
    'kept whole': (WHOLE, dict(type='LookSAMOptimWrapper', k=2), 'one whole checkpoint'),
    'average parts': ('local', dict(type='FriendlySAMOptimWrapper'), "a checkpoint of each rank's part"),
    'average whole': (WHOLE, dict(type='FriendlySAMOptimWrapper'), 'one whole checkpoint'),
}
SUBJECTS = {
    'AUSAMOptimWrapper': 'ausam',
    'ESAMOptimWrapper': 'esam-history',
    'LookSAMOptimWrapper': 'looksam',
    'FriendlySAMOptimWrapper': 'friendlysam',
}
REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    'perturb': ('no names', 'sam', dict(perturb='weights')),
    'masks': ('no names', 'esam', {}),
    'norm type': ('fsdp2', 'sam', dict(clip_grad=dict(max_norm=1.0, norm_type='inf'))),
    'quantized': ('flat', 'sam', dict(perturb_quantized=True)),
    'by tensor': ('no names', 'sam', dict(adaptive='tensor')),
}


@pytest.fixture(scope='module')
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes reports, by case."""
    return run(run_all, 2, str(tmp_path_factory.mktemp('fsdp')))


def reference(steps: list[list[Batch]], **options: Any) -> tuple[ToyNet, list[float]]:
    """SAM in one process on whole batches, several a step where gradients are accumulated; and the climbs' norms."""
    model = make(norm=False)
    norms = sam_training(model, momentum_sgd(model), lambda batch: loss_of(model, batch), steps, **options)
    return model, norms


def assert_weights(result: dict[str, Any], model: ToyNet, tolerance: float = 1e-6) -> None:
    ours = np.concatenate(result['weights'])
    theirs = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]).numpy()
    # One flat parameter has a few numbers more at its end, that stand for nothing.
    np.testing.assert_allclose(ours[: len(theirs)], theirs, rtol=tolerance, atol=tolerance)


SINGLY = [[batch] for batch in batches(STEPS, size=8)]


@pytest.mark.parametrize('case', [f'{kind} sam' for kind in STEPPED] + [f'{kind} asam' for kind in BOTH])
def test_sharded_equals_one_process_with_the_joint_batch(ranks: Any, case: str, holds: Holds) -> None:
    model, norms = reference(SINGLY, adaptive=case.endswith('asam'))
    for rank in ranks:
        assert_weights(rank[case], model)
        assert rank[case]['norms'] == pytest.approx(norms, rel=1e-5)
        # Where several processes hold a piece, FSDP itself reduces whole gradients.
        assert rank[case]['reduced'].count(1) == 2 * STEPS, 'one number for the climb and one for the step'
    assert ranks[0][case]['norms'] == ranks[1][case]['norms']
    kind, subject = case.rsplit(' ', 1)
    holds(
        'Ranks', f'sharded by {KINDS[kind]}', subject, 'equal to one process', STEPS, 'steps compared with one process'
    )


@pytest.mark.parametrize('case', [f'{kind} {to}' for kind in STEPPED for to in RELATIVE if named(kind, to)])
def test_relative_to_whole_tensors(ranks: Any, case: str) -> None:
    relative = case.rsplit(' ', 1)[1]
    model, norms = reference(SINGLY, adaptive=relative)
    plain, _ = reference(SINGLY)
    assert not torch.allclose(model.head.weight, plain.head.weight, atol=1e-4), 'the scale makes no difference'
    for rank in ranks:
        assert_weights(rank[case], model)
        assert rank[case]['norms'] == pytest.approx(norms, rel=1e-5)
    assert ranks[0][case]['norms'] == ranks[1][case]['norms']


SIZES = [f'{kind} sizes' for kind in STEPPED if kind != 'no names'] + [f'{kind} part sizes' for kind in BOTH]


@pytest.mark.parametrize('case', SIZES)
def test_how_far_whole_tensors_are_moved(ranks: Any, case: str) -> None:
    model = make(norm=False)
    part = 'part' in case
    wrapper = build('sam-tensor' if part else 'sam', model, **(dict(perturb=CONV) if part else {}))
    wrapper.record_sizes = True
    for (batch,) in SINGLY:
        model.train_step(batch, wrapper)
    for rank in ranks:
        assert rank[case]['sizes'] == [pytest.approx(values, rel=1e-4) for values in sizes_of(wrapper)]
    assert ranks[0][case]['sizes'] == ranks[1][case]['sizes']


@pytest.mark.parametrize('kind', BOTH)
def test_a_process_without_a_piece_of_a_chosen_tensor(ranks: Any, kind: str) -> None:
    model, norms = reference(SINGLY, part='conv', adaptive='tensor')
    for rank in ranks:
        assert_weights(rank[f'{kind} part by tensor'], model)
        assert rank[f'{kind} part by tensor']['norms'] == pytest.approx(norms, rel=1e-5)


def test_what_fsdp_leaves_alone_counts_once(ranks: Any) -> None:
    """Every process has a gradient of its own of the convolution: the mean of their squares, so that all agree."""
    gradients = [[torch.from_numpy(gradient) for gradient in rank['ignored']['own']] for rank in ranks]
    whole = sum((sum(parts) / 2).square().sum() for parts in zip(*(own[2:] for own in gradients), strict=True))
    whole += sum(gradient.square().sum() for own in gradients for gradient in own[:2]) / 2
    assert ranks[0]['ignored']['norm'] == ranks[1]['ignored']['norm'] == pytest.approx(whole.sqrt().item(), rel=1e-5)


def test_some_pieces_are_empty(ranks: Any) -> None:
    """Else the cases would not show that processes without a gradient take part."""
    assert ranks[1]['flat part']['empty'] == 2


@pytest.mark.parametrize('kind', BOTH)
def test_a_process_without_anything_to_perturb(ranks: Any, kind: str) -> None:
    """In the flat parameter, the second process holds nothing of the convolution; patterns match the plain names."""
    model, norms = reference(SINGLY, part='conv')
    for rank in ranks:
        assert_weights(rank[f'{kind} part'], model)
        assert rank[f'{kind} part']['norms'] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize('kind', [*BOTH, 'no names'])
def test_accumulation(ranks: Any, kind: str) -> None:
    data = batches(STEPS, size=8)
    model, norms = reference([data[:2], data[2:]])
    for rank in ranks:
        assert_weights(rank[f'{kind} accumulated'], model)
        assert rank[f'{kind} accumulated']['norms'] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize('kind', [*BOTH, 'zero2'])
def test_esam(ranks: Any, kind: str, holds: Holds) -> None:
    """The averaged gradient of the drawn tensors; each process selects from its own part of the batch."""
    results = [rank[f'{kind} esam'] for rank in ranks]
    model = make(norm=False)
    optimizer = momentum_sgd(model)
    references = [ReferenceESAM(model, optimizer) for _ in range(2)]
    parameters = list(model.parameters())
    for step, batch in enumerate(batches(STEPS, size=8)):
        mask = weight_mask(len(parameters), 0.6, make_generator(results[0]['seed'], RngStream.MASK, step))
        final = [
            esam_gradients(one, batch, shard(batch, rank, 2), mask)
            for rank, one in zip(range(2), references, strict=True)
        ]
        for parameter, *parts in zip(parameters, *final, strict=True):
            parameter.grad = sum(parts) / 2
        optimizer.step()
    for result in results:
        assert_weights(result, model)
    holds(
        'Ranks', f'sharded by {KINDS[kind]}', 'esam', 'equal to one process', STEPS, 'steps compared with one process'
    )


@pytest.mark.parametrize('kind', BOTH)
def test_ausam(ranks: Any, kind: str, holds: Holds) -> None:
    results = [rank[f'{kind} ausam'] for rank in ranks]
    assert results[0]['drawn'] != results[1]['drawn'], 'the processes share their draws'
    joint: list[list[Batch]] = []
    for step, batch in enumerate(batches(STEPS, size=8)):
        parts = [shard(batch, rank, 2) for rank in range(2)]
        drawn = [
            {key: value[result['drawn'][step]] for key, value in part.items()}
            for part, result in zip(parts, results, strict=True)
        ]
        joint.append([{key: torch.cat([part[key] for part in drawn]) for key in batch}])
    model, norms = reference(joint)
    for result in results:
        assert_weights(result, model)
        assert result['norms'] == pytest.approx(norms, rel=1e-5)
    holds(
        'Ranks', f'sharded by {KINDS[kind]}', 'ausam', 'equal to one process', STEPS, 'steps compared with one process'
    )


@pytest.mark.parametrize('kind', BOTH)
def test_clipping_is_by_the_whole_gradient(ranks: Any, kind: str) -> None:
    norms: list[float] = []
    model, _ = reference(SINGLY, clip=lambda ps: norms.append(torch.nn.utils.clip_grad_norm_(ps, 0.3).item()))
    assert min(norms) > 0.3, 'nothing is clipped'
    for rank in ranks:
        assert_weights(rank[f'{kind} clipped'], model)
        assert rank[f'{kind} clipped']['logged'] == pytest.approx(norms[-1], rel=1e-5)
        assert rank[f'{kind} clipped']['reduced'] == [1] * 3 * STEPS


@pytest.mark.parametrize('kind', BOTH)
def test_clipping_by_value(ranks: Any, kind: str) -> None:
    model, _ = reference(SINGLY, clip=lambda ps: torch.nn.utils.clip_grad_value_(ps, 0.01))
    for rank in ranks:
        assert_weights(rank[f'{kind} clipped by value'], model)


@pytest.mark.parametrize('kind', BOTH)
def test_validation_leaves_no_stale_weights(ranks: Any, kind: str) -> None:
    model, _ = reference(SINGLY)
    assert_weights(ranks[0][f'{kind} validated'], model)


@pytest.mark.parametrize('kind', BOTH)
def test_a_sample_that_is_nan_on_one_rank(ranks: Any, kind: str, holds: Holds) -> None:
    model, _ = reference([SINGLY[0], *SINGLY[2:]])
    for rank in ranks:
        assert_weights(rank[f'{kind} corrupted'], model)
        assert [math.isfinite(norm) for norm in rank[f'{kind} corrupted']['norms']] == [True, False, True, True]
    holds('Values that are not finite', f'a sample on one rank under {KINDS[kind]}', 'sam', 'no rank steps')


@pytest.mark.parametrize('kind', BOTH)
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_mixed_precision(ranks: Any, kind: str, dtype: str) -> None:
    """Half of the batch is rounded otherwise than the whole: about as far as one process is from itself."""
    model = make(norm=False)
    wrapper = build('sam', model, dtype=dtype, **(dict(loss_scale=512.0) if dtype == 'float16' else {}))
    for batch in batches(STEPS, size=8):
        model.train_step(batch, wrapper)
    for rank in ranks:
        assert_weights(rank[f'{kind} {dtype}'], model, tolerance=1e-2)
        assert rank[f'{kind} {dtype}']['norms'][-1] == pytest.approx(wrapper.last_step.grad_norm.item(), rel=2e-2)
    assert ranks[0][f'{kind} {dtype}']['norms'] == ranks[1][f'{kind} {dtype}']['norms']
    assert ranks[0][f'{kind} {dtype}']['scale'] == (512.0 if dtype == 'float16' else None)


@pytest.mark.parametrize('kind', BOTH)
@pytest.mark.parametrize('dtype', [None, 'float16'])
def test_an_overflow_of_one_process_is_all_processes(ranks: Any, kind: str, dtype: str | None, holds: Holds) -> None:
    expected = {'kept': True, 'halved': None if dtype is None else True}
    assert [rank[f'{kind} overflow {dtype}'] for rank in ranks] == [expected] * 2
    holds('Ranks', f"one rank's gradient overflows under {KINDS[kind]}", 'sam', 'no rank steps')


@pytest.mark.parametrize('kind', BOTH)
@pytest.mark.parametrize('name', ['asam', 'esam', 'ausam'])
def test_pieces_come_back_bit_for_bit(ranks: Any, kind: str, name: str) -> None:
    for rank in ranks:
        result = rank[f'{kind} still {name}']
        assert result['kept'] == [True] * STEPS
        assert all(math.isfinite(norm) and norm > 0 for norm in result['norms'])
        assert any(result['climbed']) or name != 'asam'


@pytest.mark.parametrize(('kind', 'fault', 'at'), FAULTS)
def test_a_step_that_fails_leaves_no_trace(ranks: Any, kind: str, fault: str, at: int, holds: Holds) -> None:
    """The second micro-batch fails in its first (2) or second (3) pass, or the first step, and is tried again."""
    data = batches(STEPS, size=8)
    model, _ = reference([data[:2], data[2:]])
    for rank in ranks:
        assert_weights(rank[f'{kind} {fault} {at}'], model)
    where = 'optimizer' if fault == 'step' else {2: 'first', 3: 'second'}[at]
    holds('Faults in a step', f'error in the {where} {fault} under {KINDS[kind]}', 'sam', 'the step can be tried again')


@pytest.mark.parametrize('kind', BOTH)
@pytest.mark.parametrize('name', FAMILY)
def test_the_family_in_pieces_is_one_process(ranks: Any, name: str, kind: str) -> None:
    model = make(norm=False)
    wrapper = build(name, model)
    for (batch,) in SINGLY:
        model.train_step(batch, wrapper)
    for rank in ranks:
        assert_weights(rank[f'{kind} {name}'], model)


@pytest.mark.parametrize('fault', ['forward', 'backward'])
@pytest.mark.parametrize('kind', BOTH)
def test_a_pass_at_perturbed_weights_that_fails_leaves_no_trace(ranks: Any, kind: str, fault: str) -> None:
    model = make(norm=False)
    wrapper = build('msam', model, accumulative_counts=2)
    for (batch,) in SINGLY:
        model.train_step(batch, wrapper)
    for rank in ranks:
        assert_weights(rank[f'{kind} msam {fault}'], model)


@pytest.mark.parametrize('key', RUNS)
def test_a_resumed_run_is_one_that_never_stopped(ranks: Any, key: str, holds: Holds) -> None:
    """Under MMEngine's FlexibleRunner and FSDPStrategy; the checkpoints load with weights_only=True."""
    for rank in ranks:
        result = rank[key]
        for whole, resumed in zip(*result['weights'], strict=True):
            assert whole.tobytes() == resumed.tobytes()
        assert result['states'][0] == result['states'][1]
        assert result['saved at'] == 3
        assert result['steps'] == [6, 6]
        expected = {'mm_sharp', 'param_groups', 'state'} | ({'loss_scaler'} if key == 'whole' else set())
        assert set(result['saved']) == expected
        assert math.isfinite(result['logged'])
    subject = SUBJECTS[RUNS[key][1]['type']]
    assert ("'visits'" in ranks[0][key]['states'][0]) == (subject in ('ausam', 'esam-history'))
    holds(
        'Ranks',
        f'resumed under FSDP, from {RUNS[key][2]}',
        subject,
        'as if never stopped',
        1,
        'resumes compared with a run never stopped',
    )


MESSAGES = {
    'perturb': 'UserError: SAMOptimWrapper perturbs chosen parameters.*use_orig_params=True',
    'masks': 'UserError: ESAMOptimWrapper perturbs chosen parameters.*use_orig_params=True',
    'norm type': "UserError: SAMOptimWrapper: clip_grad with norm_type='inf' .* write clip_grad=",
    'by tensor': 'UserError: SAMOptimWrapper perturbs chosen parameters.*use_orig_params=True',
    'quantized': 'UnsupportedError: SAMOptimWrapper: perturb_quantized=True is not supported under FSDP',
}


@pytest.mark.parametrize('key', REFUSED)
def test_what_cannot_be_is_refused(ranks: Any, key: str) -> None:
    for rank in ranks:
        assert re.match(MESSAGES[key], rank[key]), rank[key]
