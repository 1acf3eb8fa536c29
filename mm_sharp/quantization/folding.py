"""BatchNorm folded into the layer before it, in a model and in checkpoints of float models (ours).

``torch.nn.utils.fusion`` computes the folded weights: W' = W * gamma / sqrt(var + eps), b' = (b - mean) * gamma /
sqrt(var + eps) + beta. What follows what is known from :mod:`mm_sharp.quantization.flow`, so that deconvolutions are
folded too, and nothing that another branch reads. Subclasses of BatchNorm may do more than normalise (timm's
``BatchNormAct2d`` activates, too), so exact classes are folded, and those of which the rest is known and kept.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.model.utils import _BatchNormXd
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .loading import CheckpointMismatchError

_STATE = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
# MMEngine's are the 'SyncBN' of configs and what `revert_sync_batchnorm` makes of it.
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm, _BatchNormXd)
# timm's normalise, drop blocks (as `.drop`) and activate (as `.act`).
_TIMM_NORMS = ('BatchNormAct2d', 'SyncBatchNormAct')


def fold_batchnorms(model: nn.Module, pairs: Mapping[str, str]) -> list[str]:
    """Fold BatchNorms into layers, in place, and have the model fold checkpoints that it loads.

    Args:
        model: A float model.
        pairs: Name of a layer to the name of the BatchNorm behind it.

    Returns:
        Names of the BatchNorms that were folded; of the others, :func:`unfolded_batchnorms` says why they were not.
    """
    modules, names = dict(model.named_modules()), _names(model)
    folded = []
    for layer_name, norm_name in pairs.items():
        layer, norm = modules[layer_name], modules[norm_name]
        assert isinstance(norm, _BatchNorm)
        transposed = isinstance(layer, _TRANSPOSED)
        rest = _rest(norm)
        if rest is None or _obstacle(layer, norm, names):
            continue
        parent = _common_parent(layer_name, norm_name)
        start = len(parent) + 1 if parent else 0
        fold = FoldCheckpoint(layer_name[start:], norm_name[start:], norm.eps, transposed)
        _fold_modules(layer, norm, transposed)
        modules[parent]._register_load_state_dict_pre_hook(fold)
        owner, _, leaf = norm_name.rpartition('.')
        setattr(modules[owner], leaf, rest.train(norm.training))
        folded.append(norm_name)
    return folded


def unfolded_batchnorms(model: nn.Module, pairs: Mapping[str, str]) -> dict[str, str]:
    """The BatchNorms that are left in a model after folding, and why.

    Args:
        model: What :func:`fold_batchnorms` was given.
        pairs: The same.
    """
    modules, layers = dict(model.named_modules()), {norm: layer for layer, norm in pairs.items()}
    names = _names(model)
    return {
        name: _obstacle(modules[layers[name]], norm, names) if name in layers else 'no layer directly before it'
        for name, norm in modules.items()
        if isinstance(norm, _BatchNorm)
    }


def has_hooks(module: nn.Module) -> bool:
    """Whether a module does more than its class says: weight normalisation is a hook, for one."""
    return bool(module._forward_hooks or module._forward_pre_hooks or 'forward' in vars(module))


def _names(model: nn.Module) -> Counter[nn.Module]:
    """How many names each module has."""
    return Counter(module for _, module in model.named_modules(remove_duplicate=False))


def _obstacle(layer: nn.Module, norm: _BatchNorm, names: Counter[nn.Module]) -> str:
    """Why a BatchNorm cannot be folded into the layer before it; '' if it can be."""
    kind = type(layer).__name__
    if _rest(norm) is None:
        return f'{type(norm).__name__} has a forward of its own'
    if has_hooks(norm):
        return f'{type(norm).__name__} has hooks'
    if names[norm] > 1 or names[layer] > 1:
        return 'it or the layer before it has several names in the model'
    if norm.running_mean is None:
        return 'no running statistics'
    if isinstance(layer, nn.Linear):
        return 'behind a fully connected layer'
    # Others than torch's own may do something to the weight before they multiply by it.
    if type(layer) not in _FOLDABLE:
        return f'behind {kind}, which has a forward of its own'
    if has_hooks(layer):
        return f'behind {kind}, which has hooks'
    return 'behind a grouped deconvolution' if isinstance(layer, _TRANSPOSED) and layer.groups > 1 else ''


def _rest(norm: Any) -> nn.Module | None:
    """What a BatchNorm does besides normalising; None if that is not known."""
    kind = type(norm)
    if kind in _NORMS:
        return nn.Identity()
    if kind.__module__.startswith('timm.') and kind.__name__ in _TIMM_NORMS:
        # By the names that they had, so that the parameters of a PReLU keep theirs.
        return nn.Sequential(OrderedDict((name, getattr(norm, name, nn.Identity())) for name in ('drop', 'act')))
    return None


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
