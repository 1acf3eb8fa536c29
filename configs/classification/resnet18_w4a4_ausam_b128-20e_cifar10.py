# W4A4, AUSAM. Its values are those of the fragment, not of a paper's experiment on CIFAR.
_base_ = ['./resnet18_w4a4_sgd_b128-20e_cifar10.py', '../_base_/ausam.py']
