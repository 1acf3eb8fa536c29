# W4A4 quantization-aware fine-tuning of the study's SimCC model; the study gives the float weights.
_base_ = ['./simcc_res18-quarter_demo-64x48.py', '../_base_/quantization/w4a4.py']

load_from = 'work_dirs/study/keypoints/weights/report/simcc-1024/base_6e_seed0.pth'
load_hint = 'make it with: python tools/study.py configs/study/keypoints.yaml --settings simcc-1024'

# A quarter of the float training's learning rate, as the demo's recipes.
base_lr = 1e-3
max_epochs = 4
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=base_lr))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=16),
    dict(
        type='CosineAnnealingLR',
        eta_min=base_lr * 0.01,
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        convert_to_iter_based=True,
    ),
]
