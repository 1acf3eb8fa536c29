"""Trained runs side by side: what their logs say, how sharp their minima are, and what they predict.

``trained_run`` reads the folder of a run, ``curves`` draws its log, ``people`` draws keypoints on pictures.
"""
