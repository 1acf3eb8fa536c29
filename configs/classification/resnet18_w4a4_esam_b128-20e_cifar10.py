# W4A4, ESAM with its authors' values for ResNet-18 on CIFAR, for float models.
_base_ = ['./resnet18_w4a4_sgd_b128-20e_cifar10.py', '../_base_/esam.py']
