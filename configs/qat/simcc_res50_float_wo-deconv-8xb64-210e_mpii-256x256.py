# The float model that the recipes on MPII start from: MMPose's recipe as it is, of which it publishes no weights.
_base_ = ['mmpose::body_2d_keypoint/simcc/mpii/simcc_res50_wo-deconv-8xb64-210e_mpii-256x256.py']
