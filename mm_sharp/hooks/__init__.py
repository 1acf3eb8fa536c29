"""Hooks of a Runner."""

from mm_sharp.hooks.sharpness import SharpnessHook

__all__ = ['SharpnessHook']
