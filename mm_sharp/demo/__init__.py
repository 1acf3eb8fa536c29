"""A keypoint data set that draws itself: people with annotations, in minutes, from nothing but a seed.

===================  ==========================================================================
``settings``         sizes, and every number that sets the difficulty
``exact``            arithmetic and random numbers that are the same on every machine
``pose``             joint angles: limits, families of poses
``skeleton``         proportions; positions of the points of a body in a pose
``camera``           the pinhole camera
``render``           tapered capsules into colour, depth and part number
``body``             flesh, clothes, hair and face on the skeleton
``backdrop``         background, clutter, objects in front
``person``           what a picture shows of a person: keypoints seen and hidden, box, area
``scene``            one picture: people, camera, light, what hides them
``coco_format``      ... as COCO keypoint annotations
``mpii_format``      ... as MPII annotations, the way MMPose reads them
``folder``           whose a folder is, and whether it is complete
``dataset``          the whole data set, in several processes
``preview``          a contact sheet
===================  ==========================================================================

Nothing here is needed to train; ``import mm_sharp`` doesn't import it.
"""

from mm_sharp.demo.dataset import make_dataset
from mm_sharp.demo.person import Person
from mm_sharp.demo.preview import write_preview
from mm_sharp.demo.scene import Scene, draw_scene
from mm_sharp.demo.settings import GENERATOR_VERSION, SETTINGS, Settings

__all__ = [
    'GENERATOR_VERSION',
    'SETTINGS',
    'Person',
    'Scene',
    'Settings',
    'draw_scene',
    'make_dataset',
    'write_preview',
]
