"""Every number that decides what the demo pictures look like and how hard they are.

Raise ``GENERATOR_VERSION`` when anything here, or how anything is drawn, changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

GENERATOR_VERSION = 1  # part of ``meta.json``: two data sets are the same only if it agrees
WIDTH, HEIGHT = 160, 208  # pixels: small, so that decoding takes well under a millisecond
SPLITS = ('train', 'val')


@dataclass(frozen=True)
class Settings:
    """How the scenes vary. Ranges are ``(low, high)``, drawn uniformly; chances are fractions."""

    #: Relative frequency of each pose family (``skeleton.FAMILIES``).
    pose_weights: dict[str, int] = field(
        default_factory=lambda: dict(standing=3, walking=3, sitting=2, arms_up=2, bending=2, reaching=2, free=3)
    )
    #: Share of the cameras within ``frontal_degrees`` of the person's front; the others come from all around.
    frontal_share: float = 0.4
    frontal_degrees: int = 70
    #: Of the camera: degrees, degrees, metres. Near cameras foreshorten limbs.
    elevation: tuple[int, int] = (-8, 22)
    roll: tuple[int, int] = (-10, 10)
    distance: tuple[float, float] = (2.6, 6.0)
    #: The person's larger extent as a fraction of the image's.
    fill: tuple[float, float] = (0.62, 0.95)
    #: How often a person is pushed over an edge of the image, and how far, as a fraction of its own extent.
    truncation_chance: float = 0.12
    truncation: tuple[float, float] = (0.1, 0.3)
    #: How often another, also annotated, person stands near, and an object in front.
    second_person_chance: float = 0.2
    occluder_chance: float = 0.25
    #: Numbers of shapes in the background, and of those with the form and the colours of limbs.
    clutter: tuple[int, int] = (1, 5)
    limb_clutter: tuple[int, int] = (0, 3)
    #: Light from everywhere and from one direction, fractions.
    ambient: tuple[float, float] = (0.45, 0.7)
    diffuse: tuple[float, float] = (0.3, 0.6)
    #: Grey levels added to all pixels; a factor around the middle grey; grey levels of noise per pixel.
    brightness: tuple[int, int] = (-25, 25)
    contrast: tuple[float, float] = (0.75, 1.15)
    noise: tuple[int, int] = (2, 10)
    blur_chance: float = 0.3  # of a further blur over the image
    pattern_chance: float = 0.35  # of stripes or checks on a garment
    #: How often a garment is darker on the wearer's right: a cue to the side where the face is hidden.
    two_tone_chance: float = 0.0


SETTINGS = Settings()
