"""Every number that decides what the demo pictures look like and how hard they are.

Two things set the difficulty of the data: how much the people vary (poses, headings, clothing) and
how much hides them (occluders, edges, a second person, clutter, noise). Both are set here and nowhere
else. Changing anything here, or how anything is drawn, changes the pictures: raise
``GENERATOR_VERSION`` then, so that an old data set is not taken for a new one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

#: Part of ``meta.json``; two data sets are the same only if it agrees.
GENERATOR_VERSION = 1

#: Size of an image in pixels: small, so that decoding takes well under a millisecond.
WIDTH, HEIGHT = 160, 208

SPLITS = ('train', 'val')


@dataclass(frozen=True)
class Settings:
    """How the scenes vary. Ranges are ``(low, high)``, drawn uniformly; chances are fractions.

    Attributes:
        pose_weights: relative frequency of each pose family (``pose.FAMILIES``).
        frontal_share: share of the cameras within ``frontal_degrees`` of the person's front; the
            others come from all around. Seen from behind or from the side, left and right are
            harder to tell apart.
        frontal_degrees: half the width of that sector, degrees.
        elevation, roll: of the camera, degrees.
        distance: of the camera, metres; near cameras foreshorten limbs.
        fill: the person's larger extent as a fraction of the image's.
        truncation_chance: how often a person is pushed over an edge of the image.
        truncation: how far it is pushed, as a fraction of its own extent.
        second_person_chance: how often another, also annotated, person stands near.
        occluder_chance: how often an object stands in front.
        clutter: number of shapes in the background.
        limb_clutter: number of background shapes with the form and the colours of limbs.
        ambient, diffuse: light from everywhere and from one direction, fractions.
        brightness: added to all pixels, grey levels.
        contrast: factor around the middle grey.
        noise: amplitude of the per-pixel noise, grey levels.
        blur_chance: how often a further blur goes over the image.
        pattern_chance: how often a garment has stripes or checks.
        two_tone_chance: how often a shirt or a pair of trousers is darker on the wearer's right: a
            cue to the side where the face is hidden. Zero leaves the body as the only cue.
    """

    pose_weights: dict[str, int] = field(
        default_factory=lambda: {
            'standing': 3,
            'walking': 3,
            'sitting': 2,
            'arms_up': 2,
            'bending': 2,
            'reaching': 2,
            'free': 3,
        }
    )
    frontal_share: float = 0.4
    frontal_degrees: int = 70
    elevation: tuple[int, int] = (-8, 22)
    roll: tuple[int, int] = (-10, 10)
    distance: tuple[float, float] = (2.6, 6.0)
    fill: tuple[float, float] = (0.62, 0.95)
    truncation_chance: float = 0.12
    truncation: tuple[float, float] = (0.1, 0.3)
    second_person_chance: float = 0.2
    occluder_chance: float = 0.25
    clutter: tuple[int, int] = (1, 5)
    limb_clutter: tuple[int, int] = (0, 3)
    ambient: tuple[float, float] = (0.45, 0.7)
    diffuse: tuple[float, float] = (0.3, 0.6)
    brightness: tuple[int, int] = (-25, 25)
    contrast: tuple[float, float] = (0.75, 1.15)
    noise: tuple[int, int] = (2, 10)
    blur_chance: float = 0.3
    pattern_chance: float = 0.35
    two_tone_chance: float = 0.0


SETTINGS = Settings()
