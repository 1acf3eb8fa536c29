# The same with the usual augmentation.
_base_ = ['./_base_/fashion-mnist_aug.py', './_base_/resnet18-quarter_32x32.py']
