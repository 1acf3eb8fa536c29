# The study's SimCC model with ResNet-50, under bfloat16: for a GPU.
_base_ = ['./simcc_res18_demo-256x192.py']

model = dict(backbone=dict(depth=50), head=dict(in_channels=2048))
