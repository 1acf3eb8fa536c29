# ResNet-18 of a quarter of its width on 2,000 pictures of Fashion-MNIST: it learns them by heart, wrong labels too.
_base_ = ['./_base_/fashion-mnist.py', './_base_/resnet18-quarter_32x32.py']
