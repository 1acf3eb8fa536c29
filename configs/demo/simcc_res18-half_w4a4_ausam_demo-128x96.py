# W4A4 quantization-aware training with AUSAM, at the base optimizer's compute: a step costs 1.25 of its (10 of 16
# samples, twice), so 4 epochs / 1.25 = 3.2, so 3.
_base_ = ['./_base_/simcc_res18-half_qat.py', '../_base_/quantization/w4a4.py', '../_base_/ausam.py']

max_epochs = 3
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=max_epochs, T_max=max_epochs),
]
# As the figures in the docs were made, and not by the authors' schedule.
optim_wrapper = dict(rho=0.05, adaptive=False, perturb='auto', sampling_ratio=0.6, schedule='constant')
