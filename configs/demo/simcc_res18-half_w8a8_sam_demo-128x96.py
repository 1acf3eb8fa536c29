# W8A8 quantization-aware training with SAM, at the base optimizer's compute: half the epochs.
_base_ = ['./_base_/simcc_res18-half_qat.py', '../_base_/quantization/w8a8.py', '../_base_/sam.py']

max_epochs = 2
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=max_epochs, T_max=max_epochs),
]
# The paper's scale of rho, with which the figures in the docs were made.
optim_wrapper = dict(rho=0.05, adaptive=False, perturb='auto')
