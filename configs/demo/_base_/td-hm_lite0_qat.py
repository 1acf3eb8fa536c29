# Quantization-aware fine-tuning, with AdamW, of a float model that `make train` has trained. In so few epochs a
# sharpness-aware method would be behind it, whichever of the two has trained the float model.
_base_ = ['../td-hm_lite0_b16-20e_demo-192x144.py']

load_from = 'work_dirs/demo/base/epoch_20.pth'
# Shown by tools/train.py where that file is missing.
load_hint = 'make it with: make work_dirs/demo/base/epoch_20.pth'

# ImageNet's weights would not fit: the BatchNorms are folded. Those of load_from are folded when they are loaded.
model = dict(backbone=dict(pretrained=False))

# A quarter of the float training's learning rate: the weights are to settle on the quantizers' grid, not to leave.
base_lr = 5e-4
max_epochs = 3
train_cfg = dict(max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=base_lr))
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=max_epochs, T_max=max_epochs),
]
default_hooks = dict(checkpoint=dict(interval=1))
