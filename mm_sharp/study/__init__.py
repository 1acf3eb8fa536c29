"""The accuracy study: methods side by side at equal epochs and at equal compute (ours)."""
