# Quantization-aware fine-tuning of the demo's float model: what its six recipes share.
_base_ = ['../simcc_res18-half_demo-128x96.py']

load_from = 'work_dirs/demo-float/epoch_10.pth'
# Shown by tools/train.py where that file is missing.
load_hint = (
    'make it with: python tools/train.py configs/demo/simcc_res18-half_demo-128x96.py --work-dir work_dirs/demo-float'
)

# A quarter of the float training's learning rate: the weights are to settle on the quantizers' grid, not to leave.
base_lr = 1e-3
optim_wrapper = dict(optimizer=dict(lr=base_lr))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=25),
    dict(
        type='CosineAnnealingLR',
        eta_min=base_lr * 0.01,
        begin=0,
        end=4,
        T_max=4,
        convert_to_iter_based=True,
    ),
]

# Two fifths of the float model's epochs; sharpness-aware recipes take fewer, for the same compute.
train_cfg = dict(max_epochs=4, val_interval=4)
