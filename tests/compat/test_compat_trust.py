"""Checkpoints that are not plain: refused with a reason, loaded on the user's word."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub

from mm_sharp.compat import PlainCheckpointHook, explain_load_error, trust_checkpoints
from tests.checkpoints import TORCH_REFUSES_CODE
from tests.tiny_runs import PLAIN, make_runner

refused = pytest.mark.skipif(not TORCH_REFUSES_CODE, reason='torch before 2.6 trusts every checkpoint')


@pytest.fixture
def saved_by_mmengine(tmp_path: Path) -> Path:
    """As ``saved``, by MMEngine's own wrapper, and so with MMEngine's own checkpoints."""
    make_runner(tmp_path, PLAIN).train()
    return tmp_path


@refused
def test_untrusted_checkpoint_is_refused_with_a_reason(saved_by_mmengine: Path) -> None:
    runner = make_runner(saved_by_mmengine, resume=True)
    with pytest.raises(pickle.UnpicklingError) as caught:
        runner.train()
    text = explain_load_error(caught.value)
    assert text is not None
    assert '--trust-checkpoint' in text
    assert 'any code' in text


def test_trusted_checkpoint_is_resumed(saved_by_mmengine: Path) -> None:
    path = saved_by_mmengine / 'epoch_1.pth'
    expected = torch.load(path, weights_only=False)['message_hub']['log_scalars']['train/loss']
    runner = make_runner(saved_by_mmengine, resume=True, load_from=str(path))
    with trust_checkpoints():
        runner.train()
    log = runner.message_hub.log_scalars['train/loss']
    np.testing.assert_array_equal(log.data[0][:2], expected.data[0])
    assert len(log.data[0]) == 4
    torch.load(saved_by_mmengine / 'epoch_2.pth', weights_only=True)


def test_checkpoint_of_mmengine_alone_passes_unchanged(saved_by_mmengine: Path) -> None:
    checkpoint = torch.load(saved_by_mmengine / 'epoch_2.pth', weights_only=False)
    entries = dict(checkpoint)
    PlainCheckpointHook().after_load_checkpoint(None, checkpoint)
    assert list(checkpoint) == list(entries)
    assert all(checkpoint[key] is entries[key] for key in entries)


def test_old_checkpoint_with_a_whole_message_hub() -> None:
    hub = MessageHub('plain_whole_hub')
    checkpoint = {'message_hub': hub}
    PlainCheckpointHook().after_load_checkpoint(None, checkpoint)
    assert checkpoint['message_hub'] is hub


@refused
def test_trust_ends(saved_by_mmengine: Path, tmp_path: Path) -> None:
    path = str(saved_by_mmengine / 'epoch_2.pth')
    with trust_checkpoints():
        make_runner(tmp_path / 'a', load_from=path).test()
        with pytest.raises(FileNotFoundError, match='nowhere'):
            make_runner(tmp_path / 'b', load_from='nowhere.pth').test()
    with pytest.raises(pickle.UnpicklingError):
        make_runner(tmp_path / 'c', load_from=path).test()


def test_trust_for_the_rest_of_the_program(saved_by_mmengine: Path, tmp_path: Path) -> None:
    trust = trust_checkpoints()
    try:
        make_runner(tmp_path / 'a', load_from=str(saved_by_mmengine / 'epoch_2.pth')).test()
    finally:
        trust.close()


def test_other_errors_are_not_explained() -> None:
    assert explain_load_error(FileNotFoundError('x')) is None
    assert explain_load_error(pickle.UnpicklingError('truncated')) is None


def test_the_cause_of_an_error_is_explained() -> None:
    with pytest.raises(pickle.UnpicklingError) as caught:
        torch.load(io.BytesIO(pickle.dumps(len, 2)), weights_only=True)
    error = RuntimeError('while loading')
    error.__cause__ = caught.value
    assert '--trust-checkpoint' in (explain_load_error(error) or '')
