# The same with the usual augmentation.
_base_ = ['./_base_/fashion-mnist_aug.py', './_base_/lenet5_32x32.py']
