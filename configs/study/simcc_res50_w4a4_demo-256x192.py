# The study's SimCC model with ResNet-50 at W4A4, in float32: for benchmarks on a GPU, which take random weights.
_base_ = ['./simcc_res50_demo-256x192.py', '../_base_/quantization/w4a4.py']

optim_wrapper = dict(_delete_=True, optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))
