"""Sharpness of quantized models: what is the model's, and what is the straight-through surrogate's."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch.utils.data import default_collate

from mm_sharp.analysis.sharpness.loading import Samples, load_samples
from mm_sharp.analysis.sharpness.measure import measure
from mm_sharp.analysis.sharpness.objective import Objective, preserved_eval_mode
from mm_sharp.quantization import calibrate
from tests.mmpose_cases import QUIET
from tests.quantized_toys import ResidualToy, batches, is_spared, plain_state, quantized
from tests.sharpness import OPTIONS, QUICK, figures, rows_of
from tests.tiny_data import write_float_and_w4a4
from tests.tool_runs import PLAIN, Tools
from tests.toys import same_state

pytestmark = QUIET


def toy_samples() -> Samples:
    (batch,) = batches(1)
    return rows_of(**batch)


def perturbed(model: ResidualToy) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if not is_spared(name)]


@pytest.mark.slow
def test_a_measurement_leaves_no_trace_and_spares_scales_and_biases() -> None:
    model = quantized('W4A4').train()
    before, state = copy.deepcopy(model), plain_state(model)
    found = measure(model, toy_samples(), QUICK, surrogate=True)
    assert same_state(model, before)
    assert plain_state(model) == state
    assert found.parameters == sum(parameter.numel() for parameter in perturbed(model)) < found.all_parameters
    (remark,) = found.remarks
    assert 'straight-through surrogate' in remark
    again = measure(model, toy_samples(), QUICK, surrogate=True)
    assert figures(again) == figures(found)


@pytest.mark.slow
def test_rises_and_landscapes_are_values_of_the_quantized_model() -> None:
    model, data = quantized('W4A4').eval(), toy_samples()
    batch, parameters = default_collate(data.rows), perturbed(model)
    with preserved_eval_mode(model):
        objective = Objective(model, data, parameters, 3)
        loss, gradient = objective.loss_and_gradient()
    found = measure(model, data, replace(QUICK, rhos=(0.5,)), surrogate=True)

    def loss_here() -> float:
        with torch.no_grad():
            return sum(model(**batch).values()).item()

    assert loss == pytest.approx(loss_here())
    step = (0.5 * gradient / gradient.norm()).split([parameter.numel() for parameter in parameters])
    with torch.no_grad():
        for parameter, piece in zip(parameters, step, strict=True):
            parameter.add_(piece.view_as(parameter))
    assert found.balls[0].one_step == pytest.approx(loss_here() - loss, rel=1e-3)


def test_the_surrogates_hessian_is_that_of_the_network_at_its_rounded_weights() -> None:
    """Seen on the last layer alone, whose loss is a square: its inputs are all that counts."""
    model, data = quantized('W8A8').eval(), toy_samples()
    model.size_loss.forward = lambda output: 0 * output.sum()  # its corners would be at other places
    head = model.head
    inputs: list[torch.Tensor] = []
    watch = head.input_quant.register_forward_hook(lambda module, args, output: inputs.append(_plain(output)))
    with preserved_eval_mode(model), torch.no_grad():
        model(**default_collate(data.rows))
    watch.remove()
    (taken,) = inputs
    rows = taken.flatten(1).double()
    expected = 2 * rows.T @ rows / (len(rows) * 3)  # a mean over 3 outputs: for each the same block
    with preserved_eval_mode(model):
        objective = Objective(model, data, [head.weight], 3)
        vector = torch.randn(objective.size, generator=torch.Generator().manual_seed(0)).double()
        (product,) = objective.hessian_times([vector])
    assert torch.allclose(product.view(3, -1), vector.view(3, -1) @ expected, rtol=1e-3, atol=1e-4)


def _plain(value: object) -> torch.Tensor:
    tensor = getattr(value, 'value', value)
    tensor = tensor[0] if isinstance(tensor, tuple) else tensor
    assert isinstance(tensor, torch.Tensor)
    return tensor.detach()


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float config and a quantized one of 8 drawn people, and checkpoints of both."""
    folder = tmp_path_factory.mktemp('sharp_quantized')
    write_float_and_w4a4(folder, PLAIN, 4)
    with DefaultScope.overwrite_default_scope('mmpose'), torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS.build(Config.fromfile(folder / 'float.py').model)
        torch.save({'state_dict': model.state_dict()}, folder / 'float.pth')
        model = MODELS.build(Config.fromfile(folder / 'w4a4.py').model)
        people = load_samples(Config.fromfile(folder / 'float.py'), 'train', 4, 0)
        calibrate(model, [batch for _, batch in people.batches(4)])
        torch.save({'state_dict': model.state_dict()}, folder / 'w4a4.pth')
    return folder


@pytest.mark.slow
def test_a_quantized_checkpoint_beside_a_float_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = Tools(folder, monkeypatch, capsys)
    tools(
        'analyze_sharpness',
        'w4a4.py',
        'w4a4.pth',
        'float.py:float.pth',
        *OPTIONS,
        '--eigenvalues',
        0,
        '--out-dir',
        'out',
    )
    first, second = json.loads((folder / 'out' / 'sharpness.json').read_text())['checkpoints']
    assert (first['surrogate'], second['surrogate']) == (True, False)
    assert first['samples']['digest'] == second['samples']['digest']
    assert first['trace']['value'] != 0
    assert first['balls'][0]['one_step'] != 0


@pytest.mark.slow
def test_a_float_checkpoint_for_a_quantized_config(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = Tools(folder, monkeypatch, capsys)
    said = tools('analyze_sharpness', 'w4a4.py', 'float.pth', *OPTIONS, code=2)
    assert "cannot use the checkpoint 'float.pth'" in said
    assert 'has not been calibrated' in said or 'of its weights are missing' in said
