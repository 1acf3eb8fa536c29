# W8A8 quantization-aware training with AUSAM, for ONNX Runtime, at equal compute: 2 + 1 = 3 epochs of AdamW.
_base_ = ['./_base_/td-hm_lite0_qat.py', '../_base_/quantization/w8a8_onnxruntime.py']

# AUSAM's own float model.
load_from = 'work_dirs/demo/ausam/epoch_19.pth'
load_hint = 'make it with: make work_dirs/demo/ausam/epoch_19.pth'

max_epochs = 2
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=max_epochs, T_max=max_epochs),
]

# As in ../_base_/ausam.py.
optim_wrapper = dict(type='AUSAMOptimWrapper', rho=0.02, adaptive='tensor', perturb='weights', sampling_ratio=0.5)
custom_hooks = [*_base_.custom_hooks, dict(type='SharpnessHook')]
