# LeNet-5 on 2,000 pictures of Fashion-MNIST: a few seconds a run on one core.
_base_ = ['./_base_/fashion-mnist.py', './_base_/lenet5_32x32.py']
