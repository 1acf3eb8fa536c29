# Quantization-aware fine-tuning with 4-bit weights and inputs by the base optimizer alone: what the other W4A4 configs
# are compared with. Everything that is different from the float training on CIFAR-10 is here.
_base_ = ['./resnet18_sgd_b128-200e_cifar10.py', '../_base_/quantization/w4a4.py']

# MMPretrain's model, trained by its own recipe (resnet18_8xb16_cifar10): top-1 accuracy 94.82 in float. It is the same
# network on the same data, normalised in the same way; so nobody has to train for 200 epochs first.
load_from = 'https://download.openmmlab.com/mmclassification/v0/resnet/resnet18_b16x8_cifar10_20210528-bd6371c8.pth'

# Classifiers have no codec that knows it.
sharp_quantization = dict(policy=dict(input_size=(32, 32)))

# A tenth of the learning rate that those weights were trained with, which is LSQ's (Esser et al. 2020) for 2 to 4 bits,
# too, and their own weight decay. The number of epochs and the freezing are ours, as in configs/qat, and not tried at
# full length yet.
max_epochs = 20
optim_wrapper = dict(optimizer=dict(lr=0.01, weight_decay=1e-4))
param_scheduler = dict(T_max=max_epochs, end=max_epochs)
train_cfg = dict(max_epochs=max_epochs)
# For the last quarter the quantizers' grids stand still while the weights settle on them.
custom_hooks = [dict(type='FreezeHook', quantizer_scales=15)]
