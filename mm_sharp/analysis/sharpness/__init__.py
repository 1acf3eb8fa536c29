"""How sharp the minimum is at which a checkpoint lies; ``tools/analyze_sharpness.py`` runs it.

``docs/sharpness.md`` says what the figures mean, and which library computes what. ``loading`` loads a model and a fixed
part of a data set. ``objective`` is the mean loss as a function of the weights, with its derivatives; ``measures`` are
taken of it, ``measure`` takes them all, ``report`` shows them.
"""
