# Fine-tuning for 20 epochs: what all recipes in this folder share.
#
# It sets keys of its own, since MMEngine refuses two entries of `_base_` with the same key, and each recipe of MMPose's
# has a train_cfg, a param_scheduler and custom_hooks. The models' files put them there.
#
# Where the numbers are from: LSQ (Esser et al. 2020) starts from trained float weights, with a tenth of the float
# training's learning rate for 2 to 4 bits (less for 8), that falls along a cosine. Weights only have to move as far as
# the quantizers' grid makes them, so we take a tenth of MMPose's epochs, too. That is ours, as are the warm-up and the
# freezing, and that both bit widths and all methods train alike, so that recipes differ in one thing at a time. None
# of it has been tried at full length yet.
qat_epochs = 20

# An evaluation of COCO, with all its detections and the flip test, takes about half as long as a training epoch.
qat_train_cfg = dict(max_epochs=qat_epochs, val_interval=5)
qat_checkpoint = dict(interval=5)

qat_param_scheduler = [
    # In epochs: MMPose's 500 or 1,000 iterations would be most of the training on a small data set or many GPUs.
    dict(type='LinearLR', start_factor=0.01, begin=0, end=1, by_epoch=True, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=0.01,
        begin=1,
        end=qat_epochs,
        T_max=qat_epochs - 1,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]

# For the last quarter the grids stand still while the weights settle on them. (BatchNorm is folded: there is none.)
qat_freeze_hook = dict(type='FreezeHook', quantizer_scales=15)
