"""Tidied graphs compute the same, with constant shapes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
import onnx
import onnxoptimizer
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mm_sharp.quantization import export
from mm_sharp.quantization.onnx_graph import tidy

Forward = Callable[[Tensor], Tensor]


class Shaping(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        nn.init.zeros_(self.first.bias)
        nn.init.zeros_(self.second.bias)  # stored once, with the other
        self.shape = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.shape(self.second(self.first(x).relu()))


def graph_of(module: nn.Module) -> onnx.ModelProto:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # this exporter is to be removed, says torch; Brevitas needs it
        torch.onnx.export(
            module.eval(),
            (torch.zeros(2, 3, 2, 5),),
            file,
            input_names=['input'],
            output_names=['output'],
            dynamic_axes={'input': {0: 'batch'}},
            opset_version=17,
            **export._OLDER_EXPORTER,
            keep_initializers_as_inputs=True,
        )
    return onnxoptimizer.optimize(onnx.load_from_string(file.getvalue()), ['extract_constant_to_initializer'])


def run(graph: onnx.ModelProto, inputs: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=['CPUExecutionProvider'])
    (output,) = session.run(None, {'input': inputs})
    return output  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    'forward',
    [
        lambda x: x.flatten(1),
        lambda x: x.flatten(2),
        lambda x: x.view(x.size(0), 2, -1),
        lambda x: x.view(x.size(0), x.size(1), -1),
        lambda x: x.mean((2, 3)).view(x.size(0), 2, 2),
        # The first size of what is reshaped is not the batch's here.
        lambda x: x.view(-1, 5).view(x.size(0), 4, 2, 5),
        lambda x: x.view(-1, 5).view(x.size(0), -1),
        lambda x: x.view(x.size(0) * 2, -1),
        lambda x: x.transpose(0, 1).reshape(4, x.size(0), -1).transpose(0, 1),
    ],
)
def test_the_same_is_computed_with_constant_shapes(forward: Forward) -> None:
    module = Shaping(forward)
    graph = graph_of(module)
    tidied = onnx.ModelProto()
    tidied.CopyFrom(graph)
    tidied = tidy(tidied, {'output': list(module(torch.zeros(2, 3, 2, 5)).shape)})
    onnx.checker.check_model(tidied)
    assert not {'Identity', 'Shape', 'Constant'} & {node.op_type for node in tidied.graph.node}
    assert [value.name for value in tidied.graph.input] == ['input']
    for batch in (1, 3):
        inputs = torch.randn(batch, 3, 2, 5)
        output = run(tidied, inputs.numpy())
        assert np.allclose(output, module(inputs).detach().numpy(), atol=1e-6)
