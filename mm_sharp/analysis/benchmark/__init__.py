"""What a training step costs with each method, and what parts of it cost alone; ``tools/benchmark.py`` runs it.

``methods`` finds the methods, ``candidates`` has what makes their steps, and what these are compared with; ``workload``
is the model and the batches, or a tiny model, whose steps are the host's own time; ``steps`` measures their time, in
interleaved rounds, and their peak memory; ``compare`` and ``table`` show it. ``perturbing`` needs no model.
"""
