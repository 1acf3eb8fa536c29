"""Every number that decides what the demo pictures look like: ``GENERATOR_VERSION`` rises when one changes."""

from __future__ import annotations

from dataclasses import dataclass, field

GENERATOR_VERSION = 1  # part of ``meta.json``: two data sets are the same only if it agrees
WIDTH, HEIGHT = 160, 208  # pixels: small, so that decoding takes well under a millisecond
SPLITS = ('train', 'val')


@dataclass(frozen=True)
class Settings:
    """How the scenes vary. Ranges are ``(low, high)``, drawn uniformly; chances are fractions."""

    #: Relative frequency of each pose family (``body.FAMILIES``).
    pose_weights: dict[str, int] = field(
        default_factory=lambda: dict(standing=3, walking=3, sitting=2, arms_up=2, bending=2, reaching=2, free=3)
    )
    frontal_share: float = 0.4  # of the cameras; the others come from all around
    frontal_degrees: int = 70  # how far from the person's front those cameras are, at most
    elevation: tuple[int, int] = (-8, 22)  # of the camera, degrees
    roll: tuple[int, int] = (-10, 10)  # degrees
    distance: tuple[float, float] = (2.6, 6.0)  # metres; near cameras foreshorten limbs
    fill: tuple[float, float] = (0.62, 0.95)  # the person's larger extent as a fraction of the image's
    truncation_chance: float = 0.12  # that a person is pushed over an edge of the image
    truncation: tuple[float, float] = (0.1, 0.3)  # how far, as a fraction of its own extent
    second_person_chance: float = 0.2  # that another, also annotated, person stands near
    occluder_chance: float = 0.25  # that an object stands in front
    clutter: tuple[int, int] = (1, 5)  # number of shapes in the background
    limb_clutter: tuple[int, int] = (0, 3)  # number of those with the form and the colours of limbs
    ambient: tuple[float, float] = (0.45, 0.7)  # light from everywhere
    diffuse: tuple[float, float] = (0.3, 0.6)  # light from one direction
    brightness: tuple[int, int] = (-25, 25)  # grey levels added to all pixels
    contrast: tuple[float, float] = (0.75, 1.15)  # a factor around the middle grey
    noise: tuple[int, int] = (2, 10)  # grey levels per pixel
    blur_chance: float = 0.3  # of a further blur over the image
    pattern_chance: float = 0.35  # of stripes or checks on a garment
    two_tone_chance: float = 0.0  # that a garment is darker on the wearer's right: a cue where the face is hidden


SETTINGS = Settings()
