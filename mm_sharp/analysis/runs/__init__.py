"""Trained runs side by side: ``trained_run`` reads and compares them, ``people`` draws what they predict."""
