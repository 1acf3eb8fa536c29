"""A keypoint data set that draws itself: people with annotations, in minutes, from nothing but a seed.

Read ``settings``, ``exact`` (arithmetic that is the same on every machine), ``skeleton``, ``render``, ``body``,
``backdrop``, ``scene`` (one picture), ``formats``, ``dataset``, in this order. Nothing here is needed to train;
``import mm_sharp`` doesn't import it.
"""

from mm_sharp.demo.dataset import make_dataset
from mm_sharp.demo.scene import Person, Scene, draw_scene
from mm_sharp.demo.settings import SETTINGS, Settings

__all__ = ['SETTINGS', 'Person', 'Scene', 'Settings', 'draw_scene', 'make_dataset']
