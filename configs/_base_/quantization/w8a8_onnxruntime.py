# Quantization-aware training at 8 bits for ONNX Runtime; used as w8a8.py is. What it changes: docs/deployment.md.
_base_ = ['./w8a8.py']

sharp_quantization = dict(policy=dict(target='onnxruntime'))
