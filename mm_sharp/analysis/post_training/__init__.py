"""Quantization without training: what it costs by policy and by layer, and which layers to give more bits."""
