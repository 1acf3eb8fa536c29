"""Joint angles: which ones there are, how far they go, and how a random pose is drawn.

A pose maps every degree of freedom to an angle in units of 1/4096 turn. A pose *family* narrows some of
the limits; what it doesn't name stays near the neutral pose. Sitting, bending or arms raised are nothing
but such ranges, and ``free`` opens most of the limits.
"""

from __future__ import annotations

from mm_sharp.demo.exact import Draws, angle_units
from mm_sharp.demo.settings import SETTINGS, Settings

#: Angle in units of 1/4096 turn for each degree of freedom.
Pose = dict[str, int]
Ranges = dict[str, tuple[int, int]]

#: Anatomical limits, degrees. Positive: forward for the trunk, to the left for turns and side bends.
CENTRAL_LIMITS: Ranges = {
    'root_lean': (-12, 20),
    'root_tilt': (-10, 10),
    'waist_bend': (-15, 70),
    'waist_side': (-20, 20),
    'waist_twist': (-30, 30),
    'head_pitch': (-30, 35),
    'head_yaw': (-50, 50),
    'head_roll': (-15, 15),
}

#: Limits of the left and of the right side alike, degrees. Flexion is forward, except of the knee;
#: abduction and twist are away from the body.
SIDED_LIMITS: Ranges = {
    'shoulder_flexion': (-45, 175),
    'shoulder_abduction': (2, 140),
    'shoulder_twist': (-60, 50),
    'elbow_flexion': (0, 140),
    'hip_flexion': (-25, 110),
    'hip_abduction': (-8, 45),
    'hip_twist': (-15, 30),
    'knee_flexion': (0, 130),
    'ankle_flexion': (-25, 25),
}

LIMITS: Ranges = {
    **CENTRAL_LIMITS,
    **{f'{side}_{dof}': limit for side in ('left', 'right') for dof, limit in SIDED_LIMITS.items()},
}

_NEUTRAL: Ranges = {
    'root_lean': (-4, 6),
    'root_tilt': (-5, 5),
    'waist_bend': (-6, 14),
    'waist_side': (-8, 8),
    'waist_twist': (-15, 15),
    'head_pitch': (-15, 20),
    'head_yaw': (-35, 35),
    'head_roll': (-8, 8),
    'shoulder_flexion': (-20, 25),
    'shoulder_abduction': (4, 30),
    'shoulder_twist': (-30, 20),
    'elbow_flexion': (0, 70),
    'hip_flexion': (-8, 12),
    'hip_abduction': (0, 12),
    'hip_twist': (-5, 15),
    'knee_flexion': (0, 12),
    'ankle_flexion': (-8, 8),
}

#: Keys without a side hold for both sides. Asymmetric families are mirrored half of the time.
FAMILIES: dict[str, Ranges] = {
    'standing': {},
    'walking': {
        'left_hip_flexion': (15, 45),
        'left_knee_flexion': (0, 40),
        'right_hip_flexion': (-22, 0),
        'right_knee_flexion': (5, 60),
        'left_shoulder_flexion': (-40, 5),
        'right_shoulder_flexion': (0, 45),
        'elbow_flexion': (5, 95),
    },
    'sitting': {
        'hip_flexion': (60, 100),
        'knee_flexion': (55, 105),
        'hip_abduction': (2, 25),
        'shoulder_flexion': (0, 60),
        'elbow_flexion': (20, 100),
        'waist_bend': (-5, 25),
    },
    'arms_up': {
        'shoulder_flexion': (0, 60),
        'shoulder_abduction': (85, 140),
        'elbow_flexion': (0, 90),
        'hip_abduction': (0, 30),
    },
    'bending': {
        'root_lean': (0, 20),
        'waist_bend': (25, 70),
        'hip_flexion': (5, 40),
        'knee_flexion': (5, 50),
        'shoulder_flexion': (20, 90),
        'head_pitch': (-30, 10),
    },
    'reaching': {
        'left_shoulder_flexion': (50, 165),
        'left_shoulder_abduction': (2, 60),
        'left_elbow_flexion': (0, 60),
        'right_hip_flexion': (-20, 30),
        'waist_side': (-18, 18),
        'waist_twist': (-30, 30),
    },
    'free': {
        'root_lean': (-10, 18),
        'waist_bend': (-12, 35),
        'waist_side': (-18, 18),
        'waist_twist': (-28, 28),
        'head_yaw': (-45, 45),
        'shoulder_flexion': (-40, 150),
        'shoulder_abduction': (4, 120),
        'shoulder_twist': (-55, 45),
        'elbow_flexion': (0, 130),
        'hip_flexion': (-20, 80),
        'hip_abduction': (0, 40),
        'knee_flexion': (0, 100),
        'ankle_flexion': (-20, 20),
    },
}


def family_ranges(family: str) -> Ranges:
    """The range of every degree of freedom in a pose family, degrees.

    Raises:
        ValueError: if there is no such family.
    """
    if family not in FAMILIES:
        raise ValueError(f'family={family!r} must be one of {sorted(FAMILIES)}')
    own = FAMILIES[family]
    ranges: Ranges = {}
    for dof in LIMITS:
        plain = dof.removeprefix('left_').removeprefix('right_')
        ranges[dof] = own.get(dof) or own.get(plain) or _NEUTRAL[plain]
    return ranges


def draw_pose(draws: Draws, settings: Settings = SETTINGS) -> Pose:
    """A random pose: a family by its weight, then every angle uniformly in the family's range."""
    ranges = family_ranges(draws.weighted(settings.pose_weights))
    pose = {dof: draws.angle(bounds) for dof, bounds in ranges.items()}
    return mirror(pose) if draws.chance(0.5) else pose


def mirror(pose: Pose) -> Pose:
    """The pose seen in a mirror: sides swapped, turns and tilts reversed."""
    swapped = dict(pose)
    for dof in SIDED_LIMITS:
        swapped[f'left_{dof}'], swapped[f'right_{dof}'] = pose[f'right_{dof}'], pose[f'left_{dof}']
    for dof in ('root_tilt', 'waist_side', 'waist_twist', 'head_yaw', 'head_roll'):
        swapped[dof] = -pose[dof]
    return swapped


def within_limits(pose: Pose) -> bool:
    """Whether every angle is inside its anatomical limits."""
    return all(angle_units(low) <= pose[dof] <= angle_units(high) for dof, (low, high) in LIMITS.items())
