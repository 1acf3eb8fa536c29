"""Which ``rho`` fits a config; ``tools/find_rho.py`` runs it, ``docs/scale.md`` says how to read it.

``measure`` trains the config's model for a short while and measures at a grid of radii; ``report`` makes a proposal.
"""
