# ESAM with its authors' values for ResNet-18 on CIFAR: rho=0.05, beta=0.6, gamma=0.5.
_base_ = ['./resnet18_sgd_b128-200e_cifar100.py', '../_base_/esam.py']

optim_wrapper = _base_.sharp_optim_wrapper
custom_hooks = [_base_.sharp_hook]
