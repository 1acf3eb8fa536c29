"""What a training step costs with each method, and what parts of it cost alone; ``tools/benchmark.py`` runs it.

``candidates`` has the methods and what they are compared with; ``workload`` the model and the batches; ``steps``
measures time, in interleaved rounds, and peak memory, and perturbation alone; ``table`` shows it.
"""
