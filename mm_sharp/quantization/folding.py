"""BatchNorm folded into the layer before it, in a model and in checkpoints of float models.

W' = W * gamma / sqrt(var + eps), b' = (b - mean) * gamma / sqrt(var + eps) + beta. What follows what is known from
:mod:`mm_sharp.quantization.flow`, so that deconvolutions are folded too, and nothing that another branch reads. Only
exact classes are folded: subclasses may do more than normalise. Of those, timm's ``BatchNormAct2d`` is known: what it
does after normalising stays in its place.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from mmengine.model.utils import _BatchNormXd
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .record import CheckpointMismatchError

_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
# MMEngine's are the 'SyncBN' of configs and what `revert_sync_batchnorm` makes of it.
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm, _BatchNormXd)


def fold_batchnorms(model: nn.Module, layers: Mapping[str, str]) -> dict[str, str]:
    """Fold BatchNorms into the layers before them, in place, and have the model fold checkpoints that it loads.

    ``layers`` has the layer's name by the BatchNorm's. Returned is, for each BatchNorm of the model, why it was not
    folded; '' if it was.
    """
    modules = dict(model.named_modules())
    names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    found = {}
    for name, norm in modules.items():
        if not isinstance(norm, _BatchNorm):
            continue
        layer = layers.get(name)
        found[name] = 'no layer directly before it' if layer is None else _obstacle(modules[layer], norm, names)
        if layer is not None and not found[name]:
            _fold(modules, layer, name)
    return found


def is_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module does what its class, one of ``kinds``, says: subclasses and hooks may do something else."""
    hooks = module._forward_hooks or module._forward_pre_hooks or 'forward' in vars(module)
    return type(module) in kinds and not hooks


def _activates(norm: nn.Module) -> bool:
    """Whether a module is timm's BatchNorm with dropout and an activation behind it."""
    # By name, since timm need not be installed, and so that it is not imported here.
    return (type(norm).__module__, type(norm).__name__) == ('timm.layers.norm_act', 'BatchNormAct2d')


def _obstacle(layer: nn.Module, norm: _BatchNorm, names: Counter[nn.Module]) -> str:
    """Why a BatchNorm cannot be folded into the layer before it; '' if it can be."""
    if not is_plain(norm, (type(norm),) if _activates(norm) else _NORMS):
        return f'{type(norm).__name__} has hooks or a forward of its own'
    if names[norm] > 1 or names[layer] > 1:
        return 'it or the layer before it has several names in the model'
    if norm.running_mean is None:
        return 'no running statistics'
    if isinstance(layer, nn.Linear):
        return 'behind a fully connected layer'
    if not is_plain(layer, _FOLDABLE):
        return f'behind {type(layer).__name__}, which has hooks or a forward of its own'
    return 'behind a grouped deconvolution' if isinstance(layer, _TRANSPOSED) and layer.groups > 1 else ''


def _fold(modules: Mapping[str, nn.Module], layer_name: str, norm_name: str) -> None:
    layer: Any = modules[layer_name]
    norm: Any = modules[norm_name]
    transposed = isinstance(layer, _TRANSPOSED)
    statistics, affine = (norm.running_mean, norm.running_var), (norm.weight, norm.bias)
    with torch.no_grad():
        fused = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, norm.eps, *affine, transposed)
    layer.weight, layer.bias = fused[0], fused[1].requires_grad_(layer.weight.requires_grad)
    # The hook is on the innermost module that holds both: checkpoints of parts of the model are folded, too.
    parent = layer_name.rpartition('.')[0]
    while parent and not norm_name.startswith(f'{parent}.'):
        parent = parent.rpartition('.')[0]
    start = len(parent) + 1 if parent else 0
    hook = partial(_fold_checkpoint, layer_name[start:], norm_name[start:], norm.eps, transposed)
    modules[parent]._register_load_state_dict_pre_hook(hook)
    owner, _, leaf = norm_name.rpartition('.')
    behind = nn.Sequential(OrderedDict(drop=norm.drop, act=norm.act)) if _activates(norm) else nn.Identity()
    setattr(modules[owner], leaf, behind.train(norm.training))


def _fold_checkpoint(
    layer: str, norm: str, eps: float, transposed: bool, state: dict[str, Tensor], prefix: str, *args: Any
) -> None:
    """Fold a BatchNorm of a float model's checkpoint while it is loaded.

    One of a quantized model in which it is not folded cannot be loaded: its scales are those of other weights.
    """
    layer, norm = f'{prefix}{layer}.', f'{prefix}{norm}.'
    if f'{norm}running_mean' not in state or f'{layer}weight' not in state:
        return
    if any(key.startswith(f'{layer}weight_quant.') for key in state):
        raise CheckpointMismatchError(
            f'the checkpoint is of a quantized model with a BatchNorm {norm[:-1]}, which the config folds into '
            f'{layer[:-1]}: use the policy that it was trained with (fold_batchnorm=False)'
        )
    state.pop(f'{norm}num_batches_tracked', None)
    mean, variance = state.pop(f'{norm}running_mean'), state.pop(f'{norm}running_var')
    gamma, beta = state.pop(f'{norm}weight', None), state.pop(f'{norm}bias', None)
    weight, bias = state[f'{layer}weight'], state.get(f'{layer}bias')
    fused = fuse_conv_bn_weights(weight, bias, mean, variance, eps, gamma, beta, transposed)
    state[f'{layer}weight'], state[f'{layer}bias'] = fused
