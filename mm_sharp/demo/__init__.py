"""A keypoint data set that draws itself: people with annotations, from nothing but a seed.

Read ``settings``, ``exact``, ``render``, ``body``, ``scene``, ``dataset``.
"""

from mm_sharp.demo.dataset import make_dataset
from mm_sharp.demo.scene import Person, Scene, draw_scene
from mm_sharp.demo.settings import SETTINGS, Settings

__all__ = ['SETTINGS', 'Person', 'Scene', 'Settings', 'draw_scene', 'make_dataset']
