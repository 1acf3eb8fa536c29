"""Which ``rho`` fits a config; ``tools/find_rho.py`` runs it.

``docs/scale.md`` says how to read it. ``train`` trains the config's model for a short while; ``probe`` measures one
batch at a grid of radii; ``rule`` makes figures and a proposal of the batches, ``report`` shows them.
"""
