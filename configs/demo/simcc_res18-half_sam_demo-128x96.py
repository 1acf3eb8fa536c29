# The same training with SAM.
_base_ = ['./simcc_res18-half_demo-128x96.py', '../_base_/sam.py']

optim_wrapper = _base_.sharp_optim_wrapper
custom_hooks = [*_base_.custom_hooks, _base_.sharp_hook]
