"""Whether a model that was built for quantization computes what the float model did, quantizers apart (ours).

Folding and replacing layers change nothing but rounding, if every class is what it is taken for. A class that does
more would lose that without a word, and no training shows why. So both models are run on the same noise and compared,
behind every layer and BatchNorm: a weight that starts at 0 hides what comes before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from brevitas.graph.calibrate import quantization_status_manager
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mm_sharp.errors import UserError
from mm_sharp.ops.rng import RandomState

from .flow import LAYERS, evaluation, tensors_of
from .policy import OWNER

# The largest difference, as a share of the largest value: rounding makes 1e-6 to 1e-5 of it.
_TOLERANCE = 1e-3
# Values that are kept of an output: all of them would take as much memory as training does.
_KEPT = 4096
_END = "the model's output"


class FloatOutputs:
    """What a float model makes of a batch, inside and at its end.

    Args:
        model: The float model; it is left as it was.
        inputs: (N, C, H, W) float, as they leave the data preprocessor.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self._inputs = inputs
        self._random = RandomState.capture([inputs.device])
        watched = (*LAYERS, _BatchNorm)
        self._kinds = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, watched)}
        self._outputs = self._run(model)

    def check(self, model: nn.Module, folded: Mapping[str, str]) -> None:
        """Compare the model that was made of the float one.

        Args:
            model: It; its quantizers may be uninitialised, and stay so.
            folded: Name of a layer to that of the BatchNorm that was folded into it.

        Raises:
            UserError: It computes something else; the message names the place where that begins.
        """
        try:
            outputs = self._run(model)
        except Exception as error:
            kind = type(error).__name__
            raise UserError(
                f'{OWNER}: with BatchNorms folded and layers replaced the model does not run ({kind}: {error}): '
                'write policy=dict(fold_batchnorm=False, …), or leave layers out by policy=dict(skip=[…], …)'
            ) from error
        for name, expected in self._outputs.items():
            distance = _distance(outputs.get(name, []), expected)
            # A layer that has a BatchNorm in it puts out what the BatchNorm did.
            if name not in folded and distance > _TOLERANCE:
                raise UserError(f'{OWNER}: {self._fault(name, distance, folded)}')

    def _run(self, model: nn.Module) -> dict[str, list[Tensor]]:
        """By name, in the order of the first calls: some values of each output."""
        outputs: dict[str, list[Tensor]] = {}

        def record(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                outputs.setdefault(name, []).extend(map(_some, tensors_of(output)))

            return hook

        modules = dict(model.named_modules())
        handles = [modules[name].register_forward_hook(record(name)) for name in self._kinds if name in modules]
        random = RandomState.capture([self._inputs.device])
        self._random.restore()
        try:
            with evaluation(model), without_quantizers(model), torch.no_grad():
                outputs[_END] = list(map(_some, tensors_of(model(self._inputs.clone(), None, mode='tensor'))))
        finally:
            random.restore()
            for handle in handles:
                handle.remove()
        return outputs

    def _fault(self, name: str, distance: float, folded: Mapping[str, str]) -> str:
        place, remedy = name, 'policy=dict(fold_batchnorm=False, …)'
        if name in self._kinds:
            place = f'{name} ({self._kinds[name]})'
            if name not in folded.values():
                remedy = f"policy=dict(skip=['^{name}$'], …)"
        return (
            f'folding BatchNorms and replacing layers must change nothing but rounding, and changes {place} by '
            f'{distance:.2g} of its largest value: write {remedy}'
        )


def without_quantizers(model: nn.Module) -> quantization_status_manager:
    """A context in which a model in evaluation mode runs in float; nothing of its quantizers' state changes."""
    return quantization_status_manager(model, disable_act_quant=True, disable_weight_quant=True, is_training=False)


def _some(output: Tensor) -> Tensor:
    values = output.detach().flatten()
    return values[:: max(1, values.numel() // _KEPT)].clone()


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a share of the largest value; values that are not finite count only if the other is.

    Infinite where shapes or the numbers of calls differ.
    """
    if [value.shape for value in found] != [value.shape for value in expected]:
        return float('inf')
    if not expected:
        return 0.0
    ours, theirs = (torch.cat(values).double() for values in (found, expected))
    finite = theirs.isfinite()
    differences = (ours - theirs)[ours.isfinite() | finite].abs().nan_to_num(torch.inf, torch.inf)
    largest = float(theirs[finite].abs().max()) if finite.any() else 0.0
    difference = float(differences.max()) if len(differences) else 0.0
    return difference / largest if largest else difference
