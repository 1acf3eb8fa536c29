"""BatchNorm folded into the layer before it, in a model and in checkpoints of float models (ours).

``torch.nn.utils.fusion`` computes the folded weights: W' = W * gamma / sqrt(var + eps), b' = (b - mean) * gamma /
sqrt(var + eps) + beta. What follows what is known from :mod:`mm_sharp.quantization.flow`, so that deconvolutions are
folded too, and nothing that another branch reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .loading import CheckpointMismatchError

_STATE = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def fold_batchnorms(model: nn.Module, pairs: Mapping[str, str]) -> list[str]:
    """Fold BatchNorms into layers, in place, and have the model fold checkpoints that it loads.

    Args:
        model: A float model.
        pairs: Name of a layer to the name of the BatchNorm behind it.

    Returns:
        Names of the BatchNorms that were folded. Those without running statistics are left, and those behind fully
        connected layers, behind grouped deconvolutions, which torch cannot fold, and behind classes of layers that
        are not torch's own.
    """
    modules = dict(model.named_modules())
    folded = []
    for layer_name, norm_name in pairs.items():
        layer, norm = modules[layer_name], modules[norm_name]
        assert isinstance(norm, _BatchNorm)
        transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d))
        # Others than torch's own may do something to the weight before they multiply by it.
        if norm.running_mean is None or (transposed and layer.groups > 1) or type(layer) not in _FOLDABLE:
            continue
        parent = _common_parent(layer_name, norm_name)
        start = len(parent) + 1 if parent else 0
        fold = FoldCheckpoint(layer_name[start:], norm_name[start:], norm.eps, transposed)
        _fold_modules(layer, norm, transposed)
        modules[parent]._register_load_state_dict_pre_hook(fold)
        owner, _, leaf = norm_name.rpartition('.')
        setattr(modules[owner], leaf, nn.Identity())
        folded.append(norm_name)
    return folded


class FoldCheckpoint:
    """Fold a BatchNorm of a float model's checkpoint while it is loaded: a hook for ``load_state_dict``.

    A checkpoint in which it is folded already is left alone. One of a quantized model in which it is not folded cannot
    be loaded: the scales in it are those of other weights.

    Args:
        layer: Name of the layer, as seen from the module that the hook is on.
        norm: Name of the BatchNorm.
        eps: Its ``eps``.
        transposed: Whether the layer is a deconvolution.
    """

    def __init__(self, layer: str, norm: str, eps: float, transposed: bool) -> None:
        self.layer = layer
        self.norm = norm
        self.eps = eps
        self.transposed = transposed

    def __call__(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Rewrite ``state`` in place.

        Raises:
            CheckpointMismatchError: The checkpoint's model is quantized, and its BatchNorm not folded.
        """
        layer, norm = f'{prefix}{self.layer}.', f'{prefix}{self.norm}.'
        if f'{norm}running_mean' not in state or f'{layer}weight' not in state:
            return
        if any(key.startswith(f'{layer}weight_quant.') for key in state):
            raise CheckpointMismatchError(
                f'the checkpoint is of a quantized model with a BatchNorm {norm[:-1]}, which the config folds into '
                f'{layer[:-1]}: use the policy that it was trained with (fold_batchnorm=False)'
            )
        parts = {name: state.pop(norm + name, None) for name in _STATE}
        weight, bias = _fused(state[f'{layer}weight'], state.get(f'{layer}bias'), parts, self.eps, self.transposed)
        state[f'{layer}weight'], state[f'{layer}bias'] = weight, bias


def _fold_modules(layer: Any, norm: _BatchNorm, transposed: bool) -> None:
    parts = {name: getattr(norm, name) for name in _STATE}
    with torch.no_grad():
        weight, bias = _fused(layer.weight, layer.bias, parts, norm.eps, transposed)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=layer.weight.requires_grad)
    layer.bias = nn.Parameter(bias.detach(), requires_grad=layer.weight.requires_grad)


def _fused(
    weight: Tensor, bias: Tensor | None, norm: Mapping[str, Any], eps: float, transposed: bool
) -> tuple[Tensor, Tensor]:
    return fuse_conv_bn_weights(
        weight, bias, norm['running_mean'], norm['running_var'], eps, norm['weight'], norm['bias'], transposed
    )


def _common_parent(first: str, second: str) -> str:
    """Dotted name of the innermost module that holds both; '' for the model itself."""
    common = []
    for a, b in zip(first.split('.')[:-1], second.split('.')[:-1], strict=False):
        if a != b:
            break
        common.append(a)
    return '.'.join(common)
