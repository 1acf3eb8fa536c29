"""The 3-D skeleton: proportions of a body, and the positions of its points in a given pose.

Body frame, metres: x to the person's own left, y up, z forward (right-handed), the pelvis at the origin.
All lengths are ours, chosen near those of an adult of 1.7 m with a head somewhat large, so that faces keep a
few pixels in small pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

from mm_sharp.demo.exact import Draws, Matrix, Vector, add, chain, rotate, rotation
from mm_sharp.demo.pose import Pose

#: The 17 keypoints of COCO, in its order.
COCO_KEYPOINTS = (
    'nose', 'left_eye', 'right_eye', 'left_ear', 'right_ear', 'left_shoulder', 'right_shoulder',
    'left_elbow', 'right_elbow', 'left_wrist', 'right_wrist', 'left_hip', 'right_hip', 'left_knee',
    'right_knee', 'left_ankle', 'right_ankle',
)  # fmt: skip

#: The 16 joints of MPII, in its order.
MPII_JOINTS = (
    'right_ankle', 'right_knee', 'right_hip', 'left_hip', 'left_knee', 'left_ankle', 'pelvis', 'thorax',
    'upper_neck', 'head_top', 'right_wrist', 'right_elbow', 'right_shoulder', 'left_shoulder',
    'left_elbow', 'left_wrist',
)  # fmt: skip

Points = dict[str, Vector]


@dataclass(frozen=True)
class Proportions:
    """Lengths in metres; ``girth`` multiplies the thickness of every part."""

    torso: float = 0.50
    neck: float = 0.09
    head: float = 0.26
    shoulder: float = 0.175
    hip: float = 0.10
    upper_arm: float = 0.28
    forearm: float = 0.25
    hand: float = 0.09
    thigh: float = 0.42
    shin: float = 0.41
    foot: float = 0.19
    girth: float = 1.0


def draw_proportions(draws: Draws) -> Proportions:
    """A random body: limbs, trunk, breadth and girth vary on their own."""
    mean = Proportions()
    arms = draws.uniform((0.9, 1.1))
    legs = draws.uniform((0.88, 1.12))
    breadth = draws.uniform((0.88, 1.15))
    return Proportions(
        torso=mean.torso * draws.uniform((0.9, 1.1)),
        neck=mean.neck * draws.uniform((0.85, 1.15)),
        head=mean.head * draws.uniform((0.9, 1.15)),
        shoulder=mean.shoulder * breadth,
        hip=mean.hip * breadth * draws.uniform((0.92, 1.1)),
        upper_arm=mean.upper_arm * arms,
        forearm=mean.forearm * arms,
        hand=mean.hand * arms,
        thigh=mean.thigh * legs,
        shin=mean.shin * legs,
        foot=mean.foot * draws.uniform((0.9, 1.1)),
        girth=draws.uniform((0.85, 1.25)),
    )


def body_points(body: Proportions, pose: Pose) -> Points:
    """Positions of all keypoints and of the points that drawing needs.

    Args:
        body: lengths of the bones.
        pose: angle of every degree of freedom.

    Returns:
        The position of each point in the body frame, metres.
    """
    root = chain(rotation('x', pose['root_lean']), rotation('z', -pose['root_tilt']))
    bend, side, twist = (pose[f'waist_{dof}'] for dof in ('bend', 'side', 'twist'))
    chest = chain(root, rotation('x', bend), rotation('z', -side), rotation('y', twist))
    points: Points = {'pelvis': (0.0, 0.0, 0.0)}
    points['waist'] = rotate(root, (0.0, 0.4 * body.torso, 0.0))
    points['thorax'] = add(points['waist'], rotate(chest, (0.0, 0.6 * body.torso, 0.0)))
    points['upper_neck'] = add(points['thorax'], rotate(chest, (0.0, body.neck, 0.0)))
    # The middle line of the shirt's front, just outside of the trunk's surface.
    front = 0.115 * body.girth
    points['collar'] = add(points['thorax'], rotate(chest, (0.0, -0.05, 0.085 * body.girth)))
    points['belly'] = add(points['waist'], rotate(chest, (0.0, 0.0, front)))
    points['buckle'] = rotate(root, (0.0, 0.05, front))
    _add_head(points, body, pose, chest)
    for name, sign in (('left', 1), ('right', -1)):
        _add_arm(points, body, pose, chest, name, sign)
        _add_leg(points, body, pose, root, name, sign)
    return points


def _add_head(points: Points, body: Proportions, pose: Pose, chest: Matrix) -> None:
    """Head top, face and hair; offsets are fractions of the head's height."""
    pitch, roll, yaw = pose['head_pitch'], pose['head_roll'], pose['head_yaw']
    frame = chain(chest, rotation('y', yaw), rotation('x', pitch), rotation('z', -roll))
    offsets = {
        'head_top': (0.0, 1.0, 0.0),
        'skull_low': (0.0, 0.32, 0.0),
        'skull_high': (0.0, 0.66, -0.02),
        'hair_low': (0.0, 0.46, -0.10),
        'hair_high': (0.0, 0.72, -0.06),
        'hair_end': (0.0, -0.05, -0.24),
        'nose_bridge': (0.0, 0.50, 0.30),
        'nose': (0.0, 0.38, 0.41),
        'left_eye': (0.14, 0.53, 0.285),
        'right_eye': (-0.14, 0.53, 0.285),
        'left_ear': (0.33, 0.45, 0.0),
        'right_ear': (-0.33, 0.45, 0.0),
        'left_mouth': (0.09, 0.18, 0.27),
        'right_mouth': (-0.09, 0.18, 0.27),
    }
    for name, (x, y, z) in offsets.items():
        offset = rotate(frame, (x * body.head, y * body.head, z * body.head))
        points[name] = add(points['upper_neck'], offset)


def _add_arm(points: Points, body: Proportions, pose: Pose, chest: Matrix, name: str, sign: int) -> None:
    """Shoulder to hand of one side; ``sign`` is +1 for the left, -1 for the right."""
    flexion, abduction, twist, elbow = (
        pose[f'{name}_{dof}'] for dof in ('shoulder_flexion', 'shoulder_abduction', 'shoulder_twist', 'elbow_flexion')
    )
    upper = chain(
        chest,
        rotation('x', -flexion),
        rotation('z', sign * abduction),
        rotation('y', sign * twist),
    )
    lower = chain(upper, rotation('x', -elbow))
    shoulder = add(points['thorax'], rotate(chest, (sign * body.shoulder, -0.03, 0.0)))
    points[f'{name}_shoulder'] = shoulder
    points[f'{name}_elbow'] = add(shoulder, rotate(upper, (0.0, -body.upper_arm, 0.0)))
    wrist = add(points[f'{name}_elbow'], rotate(lower, (0.0, -body.forearm, 0.0)))
    points[f'{name}_wrist'] = wrist
    points[f'{name}_hand'] = add(wrist, rotate(lower, (0.0, -body.hand, 0.0)))


def _add_leg(points: Points, body: Proportions, pose: Pose, root: Matrix, name: str, sign: int) -> None:
    """Hip to toe of one side; ``sign`` is +1 for the left, -1 for the right."""
    flexion, abduction, twist, knee, ankle = (
        pose[f'{name}_{dof}'] for dof in ('hip_flexion', 'hip_abduction', 'hip_twist', 'knee_flexion', 'ankle_flexion')
    )
    upper = chain(
        root,
        rotation('x', -flexion),
        rotation('z', sign * abduction),
        rotation('y', sign * twist),
    )
    lower = chain(upper, rotation('x', knee))
    foot = chain(lower, rotation('x', -ankle))
    hip = rotate(root, (sign * body.hip, 0.0, 0.0))
    points[f'{name}_hip'] = hip
    points[f'{name}_knee'] = add(hip, rotate(upper, (0.0, -body.thigh, 0.0)))
    points[f'{name}_ankle'] = add(points[f'{name}_knee'], rotate(lower, (0.0, -body.shin, 0.0)))
    for end, forward in (('heel', -0.2), ('toe', 0.8)):
        offset = rotate(foot, (0.0, -0.05, forward * body.foot))
        points[f'{name}_{end}'] = add(points[f'{name}_ankle'], offset)
