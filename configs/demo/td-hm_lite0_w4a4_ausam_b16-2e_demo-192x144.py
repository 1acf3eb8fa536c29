# W4A4 quantization-aware training with AUSAM, at equal compute: 2 + 1 = 3 epochs of the base optimizer.
_base_ = ['./_base_/td-hm_lite0_qat.py', '../_base_/quantization/w4a4.py']

max_epochs = 2
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=max_epochs, T_max=max_epochs),
]

# As in ../_base_/ausam.py.
optim_wrapper = dict(type='AUSAMOptimWrapper', rho=0.02, adaptive='tensor', perturb='weights', sampling_ratio=0.5)
custom_hooks = [*_base_.custom_hooks, dict(type='SharpnessHook')]

# Instead of 16: the search for scales takes a second a batch and more.
sharp_quantization = dict(calibration=dict(num_batches=4))
