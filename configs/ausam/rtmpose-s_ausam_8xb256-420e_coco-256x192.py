_base_ = [
    'mmpose::body_2d_keypoint/rtmpose/coco/rtmpose-s_8xb256-420e_coco-256x192.py',
    '../_base_/ausam.py',
]

optim_wrapper = _base_.sharp_optim_wrapper
custom_hooks = [*_base_.custom_hooks, _base_.sharp_hook]
