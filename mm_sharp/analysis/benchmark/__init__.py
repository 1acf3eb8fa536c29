"""What a training step costs with each method, and what parts of it cost alone; ``tools/benchmark.py`` runs it.

``methods`` finds the methods and ``baselines`` has what they are compared with; ``workload`` is the model and the
batches; ``steps`` times whole steps in interleaved rounds, ``passes_only`` their passes alone, ``memory`` their peak
memory. ``compare``, ``table`` and ``chart`` show it. ``host`` has a tiny model, whose steps are the host's own time;
``perturbing`` measures the perturbation without a model.
"""
