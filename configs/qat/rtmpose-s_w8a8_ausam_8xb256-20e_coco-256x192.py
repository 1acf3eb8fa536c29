_base_ = ['./_base_/rtmpose-s_coco.py', '../_base_/quantization/w8a8.py', '../_base_/ausam.py']
