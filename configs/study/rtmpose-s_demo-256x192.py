# RTMPose-s on drawn people, in float32 as MMPose's recipe: for benchmarks on a GPU. Nothing is augmented.
_base_ = ['./simcc_res18_demo-256x192.py']

optim_wrapper = dict(_delete_=True, optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))

codec = dict(_base_.codec, normalize=False, use_dark=False)
model = dict(
    _delete_=True,
    type='TopdownPoseEstimator',
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(
        _scope_='mmdet',
        type='CSPNeXt',
        arch='P5',
        expand_ratio=0.5,
        deepen_factor=0.33,
        widen_factor=0.5,
        out_indices=(4,),
        channel_attention=True,
        norm_cfg=dict(type='BN'),
        act_cfg=dict(type='SiLU'),
    ),
    head=dict(
        type='RTMCCHead',
        in_channels=512,
        out_channels=17,
        input_size=_base_.input_size,
        in_featuremap_size=(6, 8),
        simcc_split_ratio=2.0,
        final_layer_kernel_size=7,
        gau_cfg=dict(
            hidden_dims=256,
            s=128,
            expansion_factor=2,
            dropout_rate=0.0,
            drop_path=0.0,
            act_fn='SiLU',
            use_rel_bias=False,
            pos_enc=False,
        ),
        loss=dict(type='KLDiscretLoss', use_target_weight=True, beta=10.0, label_softmax=True),
        decoder=codec,
    ),
    test_cfg=dict(flip_test=False),
)
train_dataloader = dict(
    dataset=dict(pipeline=[*_base_.train_pipeline[:3], dict(type='GenerateTarget', encoder=codec), _base_.pack])
)
