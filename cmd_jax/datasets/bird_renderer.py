"""Draws one procedural bird: the species sits in five small parts, everything else is nuisance.

A species is five digits, one variant (0..3) for each of `PARTS`. Pose, scale, mirror, colours, lighting, background and
clutter come from the generator alone and never look at the species, so only the parts tell two species apart.
"""

import dataclasses

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

PARTS = ("beak", "crest", "wing_bar", "tail", "eye_ring")
VARIANTS = {
    "beak": ("cone", "needle", "curved", "hooked"),
    "crest": ("cap", "spike", "fan", "plume"),
    "wing_bar": ("one_bar", "two_bars", "spots", "chevrons"),
    "tail": ("forked", "fan", "pointed", "racket"),
    "eye_ring": ("plain", "ring", "mask", "brow"),
}
SUPERSAMPLE = 3
Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Bird:
    """One rendered example.

    Attributes:
        image: [px, px, 3] uint8, RGB.
        boxes: part name -> (ymin, xmin, ymax, xmax), fractions of the image in 0..1.
    """

    image: np.ndarray
    boxes: dict[str, tuple[float, float, float, float]]


class Pose:
    """Similarity transform from the bird's own frame (facing right, y down, body at the origin) to pixels."""

    def __init__(self, rng: np.random.Generator, px: int):
        self.tilt = np.deg2rad(rng.uniform(-10, 10))
        self.head_tilt = np.deg2rad(rng.uniform(-10, 10))
        self.mirror = rng.random() < 0.5
        self.scale, self.offset = 1.0, np.zeros(2)
        # Fitted to the outline of all variants together, so that every part is in the frame and the fit knows no species.
        low, high = (
            extreme(self.place(np.concatenate([EVERY_OUTLINE, self.turn_head(EVERY_HEAD_OUTLINE)])), axis=0)
            for extreme in (np.min, np.max)
        )
        self.scale = px * rng.uniform(0.82, 0.98) / np.max(high - low)
        slack = px - (high - low) * self.scale
        self.offset = rng.uniform(0.35, 0.65, 2) * slack - low * self.scale

    def place(self, points: np.ndarray) -> np.ndarray:
        """[N, 2] (x, y) in the bird's frame -> [N, 2] pixels of the final image."""
        points = np.asarray(points, np.float64)
        cos, sin = np.cos(self.tilt), np.sin(self.tilt)
        turned = points @ np.array([[cos, sin], [-sin, cos]])
        if self.mirror:
            turned = turned * (-1, 1)
        return turned * self.scale + self.offset

    def turn_head(self, points: np.ndarray) -> np.ndarray:
        """Rotates points of the head, [N, 2] in the bird's frame, about the neck."""
        neck = np.array([0.33, -0.22])
        cos, sin = np.cos(self.head_tilt), np.sin(self.head_tilt)
        return (np.asarray(points, np.float64) - neck) @ np.array([[cos, sin], [-sin, cos]]) + neck


def smooth(points, closed: bool = True, steps: int = 8) -> np.ndarray:
    """Catmull-Rom curve through the points, [N, 2] -> [N * steps, 2]."""
    p = np.asarray(points, np.float64)
    if closed:
        previous, after, beyond = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
        here = p
    else:
        padded = np.concatenate([p[:1], p, p[-1:]])
        previous, here, after, beyond = padded[:-3], padded[1:-2], padded[2:-1], padded[3:]
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    a, b, c, d = (q[:, None] for q in (previous, here, after, beyond))
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return curve.reshape(-1, 2)


def disc(x: float, y: float, rx: float, ry: float | None = None, turn: float = 0.0) -> np.ndarray:
    """Outline of an ellipse, [24, 2]."""
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    raw = np.stack([rx * np.cos(angle), (rx if ry is None else ry) * np.sin(angle)], -1)
    cos, sin = np.cos(turn), np.sin(turn)
    return raw @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


def stripe(points, width: float) -> np.ndarray:
    """Outline of a line of the given width through the points."""
    line = smooth(points, closed=False) if len(points) > 2 else np.asarray(points, np.float64)
    direction = np.gradient(line, axis=0)
    normal = np.stack([-direction[:, 1], direction[:, 0]], -1)
    normal *= width / 2 / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    return np.concatenate([line + normal, (line - normal)[::-1]])


# The parts: each variant is a list of outlines in the bird's frame. Facing right, head centre at HEAD.
HEAD = np.array([0.43, -0.37])
EYE = HEAD + (0.06, -0.03)
RUMP = np.array([-0.44, 0.12])


def _beak(variant: str) -> list[np.ndarray]:
    x, y = HEAD + (0.15, 0.0)
    shapes = {
        "cone": [(x, y - 0.1), (x + 0.2, y + 0.02), (x, y + 0.12)],
        "needle": [(x, y - 0.035), (x + 0.33, y + 0.0), (x, y + 0.045)],
        "curved": smooth([(x, y - 0.06), (x + 0.18, y - 0.03), (x + 0.29, y + 0.19), (x + 0.15, y + 0.07), (x, y + 0.05)]),
        "hooked": smooth(
            [
                (x, y - 0.1),
                (x + 0.13, y - 0.08),
                (x + 0.2, y + 0.02),
                (x + 0.17, y + 0.16),
                (x + 0.1, y + 0.06),
                (x, y + 0.08),
            ]
        ),
    }
    return [np.asarray(shapes[variant])]


def _crest(variant: str) -> list[np.ndarray]:
    x, y = HEAD + (-0.02, -0.15)
    if variant == "cap":
        return [
            smooth(
                [
                    (x - 0.16, y + 0.1),
                    (x - 0.12, y - 0.01),
                    (x + 0.02, y - 0.05),
                    (x + 0.15, y + 0.04),
                    (x + 0.0, y + 0.04),
                ]
            )
        ]
    if variant == "spike":
        return [np.array([(x + 0.13, y + 0.05), (x - 0.27, y - 0.24), (x - 0.15, y + 0.12)])]
    if variant == "fan":
        tips = [(-0.27, -0.12), (-0.13, -0.25), (0.04, -0.27), (0.19, -0.19)]
        return [stripe([(x, y + 0.05), (x + dx, y + dy)], 0.05) for dx, dy in tips] + [
            disc(x + dx, y + dy, 0.055) for dx, dy in tips
        ]
    stem = [(x + 0.03, y + 0.04), (x + 0.02, y - 0.14), (x + 0.11, y - 0.24)]
    return [stripe(stem, 0.045), disc(x + 0.14, y - 0.23, 0.1)]


def _wing_bar(variant: str) -> list[np.ndarray]:
    def across(x: float, half: float, width: float) -> np.ndarray:
        return stripe([(x + 0.06, -0.02 - half + 0.05), (x, 0.05), (x - 0.02, 0.03 + half)], width)

    if variant == "one_bar":
        return [across(-0.02, 0.15, 0.12)]
    if variant == "two_bars":
        return [across(0.09, 0.14, 0.065), across(-0.12, 0.13, 0.065)]
    if variant == "spots":
        return [
            disc(x, y, 0.047)
            for x, y in [(0.16, -0.04), (0.05, 0.1), (0.02, -0.06), (-0.1, 0.11), (-0.12, -0.03), (-0.25, 0.08)]
        ]
    return [stripe([(x - 0.08, -0.09), (x + 0.05, 0.04)], 0.052) for x in (-0.16, 0.0, 0.16)] + [
        stripe([(x + 0.05, 0.03), (x - 0.08, 0.15)], 0.052) for x in (-0.16, 0.0, 0.16)
    ]


def _tail(variant: str) -> list[np.ndarray]:
    along, across = np.array([-0.93, 0.36]), np.array([0.36, 0.93])

    def at(*uv: Point) -> np.ndarray:
        return np.array([RUMP + u * along + v * across for u, v in uv])

    return {
        "forked": [at((-0.1, -0.09), (0.38, -0.26), (0.1, 0.0), (0.38, 0.26), (-0.1, 0.09))],
        "fan": [at((-0.1, -0.07), (0.22, -0.28), (0.31, -0.16), (0.35, 0.0), (0.31, 0.16), (0.22, 0.28), (-0.1, 0.07))],
        "pointed": [at((-0.1, -0.1), (0.15, -0.09), (0.44, 0.0), (0.15, 0.09), (-0.1, 0.1))],
        "racket": [
            at((-0.1, -0.09), (0.08, -0.06), (0.08, 0.06), (-0.1, 0.09)),
            at((0.0, -0.028), (0.3, -0.028), (0.3, 0.028), (0.0, 0.028)),
            disc(*at((0.33, 0.0))[0], 0.125, 0.105),
        ],
    }[variant]


def _eye_ring(variant: str) -> list[np.ndarray]:
    x, y = EYE
    return {
        "plain": [disc(x, y, 0.05)],
        "ring": [disc(x, y, 0.12)],
        "mask": [
            smooth(
                [
                    (x + 0.11, y - 0.02),
                    (x - 0.02, y - 0.075),
                    (x - 0.22, y + 0.0),
                    (x - 0.2, y + 0.07),
                    (x + 0.08, y + 0.07),
                ]
            )
        ],
        "brow": [stripe([(x + 0.11, y - 0.07), (x - 0.04, y - 0.105), (x - 0.23, y - 0.03)], 0.075)],
    }[variant]


PART_OUTLINES = {"beak": _beak, "crest": _crest, "wing_bar": _wing_bar, "tail": _tail, "eye_ring": _eye_ring}
ON_HEAD = ("beak", "crest", "eye_ring")


def _all_variants(parts: tuple[str, ...]) -> np.ndarray:
    return np.concatenate([shape for part in parts for variant in VARIANTS[part] for shape in PART_OUTLINES[part](variant)])


EVERY_HEAD_OUTLINE = _all_variants(ON_HEAD)
EVERY_OUTLINE = _all_variants(("wing_bar", "tail"))
BODY = smooth(
    [
        (0.44, -0.14),
        (0.3, 0.14),
        (0.02, 0.27),
        (-0.28, 0.24),
        (-0.54, 0.13),
        (-0.44, 0.02),
        (-0.16, -0.14),
        (0.14, -0.28),
    ]
)
NECK = smooth([(0.28, -0.5), (0.56, -0.32), (0.5, -0.02), (0.2, 0.12), (-0.05, -0.18), (0.14, -0.36)])
BELLY = smooth([(0.46, -0.1), (0.32, 0.16), (0.04, 0.28), (-0.26, 0.25), (-0.1, 0.16), (0.2, 0.1), (0.36, -0.04)])
WING = smooth(
    [(0.24, -0.1), (0.2, 0.08), (0.02, 0.17), (-0.26, 0.17), (-0.56, 0.16), (-0.34, 0.0), (-0.06, -0.13), (0.12, -0.18)]
)


# Luma of everything behind the bird: hues vary at will, while the outline stands out alike in every image. Brightness that
# differs from image to image is what a network picks up first, and crops of one image share it.
GROUND = (0.6, 0.64)


def _hsv(h: float, s: float, v: float) -> np.ndarray:
    """Hue, saturation, value in 0..1 -> RGB, [3] in 0..255."""
    k = (np.array([5.0, 3.0, 1.0]) + h * 6) % 6
    return 255 * v * (1 - s * np.clip(np.minimum(k, 4 - k), 0, 1))


def _tint(rng: np.random.Generator, saturation: tuple[float, float], luma: tuple[float, float]) -> np.ndarray:
    """A colour of any hue, with saturation and luma drawn from ranges in 0..1; RGB, [3] in 0..255."""
    colour = _hsv(rng.random(), rng.uniform(*saturation), 1.0)
    return np.clip(colour * rng.uniform(*luma) * 255 / (colour @ (0.299, 0.587, 0.114)), 0, 255)


def _noise(rng: np.random.Generator, px: int, cell: int) -> np.ndarray:
    """Smooth noise with features of about `cell` pixels, [px, px] in 0..1."""
    side = max(2, px // cell + 2)
    small = Image.fromarray((rng.random((side, side)) * 255).astype(np.uint8))
    return np.asarray(small.resize((px, px), Image.Resampling.BICUBIC), np.float32) / 255


def _background(rng: np.random.Generator, px: int) -> np.ndarray:
    """Out-of-focus habitat: a gradient of two colours, noise at three scales and blurred blobs; [px, px, 3] in 0..255."""
    top, bottom = (_tint(rng, (0.05, 0.5), GROUND) for _ in range(2))
    ramp = np.linspace(0, 1, px, dtype=np.float32)[:, None, None]
    image = top * (1 - ramp) + bottom * ramp + np.zeros((px, px, 1), np.float32)
    for cell, strength in ((px // 3, 0.4), (px // 8, 0.2), (px // 32, rng.uniform(0.03, 0.1))):
        tint = _tint(rng, (0.0, 0.5), GROUND)
        weight = (_noise(rng, px, max(1, cell)) * strength)[..., None]
        image = image * (1 - weight) + tint * weight
    canvas = Image.fromarray(image.astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(3, 9)):
        colour = tuple(int(c) for c in _tint(rng, (0.1, 0.6), GROUND))
        outline = disc(*rng.uniform(0, px, 2), rng.uniform(0.03, 0.16) * px, rng.uniform(0.02, 0.1) * px, rng.uniform(0, np.pi))
        draw.polygon([tuple(p) for p in outline], fill=colour)
    return np.asarray(canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.025, 0.035) * px)), np.float32)


class Painter:
    """A supersampled colour image on which outlines in final-image pixels are filled."""

    def __init__(self, background: np.ndarray):
        side = background.shape[0] * SUPERSAMPLE
        self.image = Image.fromarray(background.astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)
        self.draw = ImageDraw.Draw(self.image)
        self.mask = Image.new("L", (side, side))
        self.mask_draw = ImageDraw.Draw(self.mask)

    def fill(self, outline: np.ndarray, colour: np.ndarray, on_bird: bool = True) -> None:
        points = [tuple(p) for p in outline * SUPERSAMPLE]
        self.draw.polygon(points, fill=tuple(int(c) for c in np.clip(colour, 0, 255)))
        if on_bird:
            self.mask_draw.polygon(points, fill=255)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Colour [px, px, 3] in 0..255 and the bird's mask [px, px] in 0..1, both float32."""
        return np.asarray(self.image.reduce(SUPERSAMPLE), np.float32), np.asarray(
            self.mask.reduce(SUPERSAMPLE), np.float32
        ) / 255


def _clutter(painter: Painter, rng: np.random.Generator, px: int, count: int) -> None:
    """Twigs and leaves of random place, size and colour."""
    for _ in range(count):
        colour = _tint(rng, (0.1, 0.6), (GROUND[0] - 0.03, GROUND[1] + 0.03))
        start, turn = rng.uniform(0, px, 2), rng.uniform(0, 2 * np.pi)
        length = rng.uniform(0.1, 0.3) * px
        end = start + length * np.array([np.cos(turn), np.sin(turn)])
        if rng.random() < 0.5:
            painter.fill(
                stripe([start, (start + end) / 2 + rng.normal(0, 0.03 * px, 2), end], rng.uniform(0.008, 0.03) * px),
                colour,
                False,
            )
        else:
            painter.fill(disc(*start, 0.3 * length, 0.1 * length, turn), colour, False)


def _light(rng: np.random.Generator, colour: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Rounds the bird with a light from one side, adds plumage grain, then exposure, white balance and sensor noise."""
    px = mask.shape[0]
    height = sum(ndimage.gaussian_filter(mask, s * px) for s in (0.015, 0.04, 0.08)) / 3
    slope_y, slope_x = np.gradient(height * px * 0.35)
    angle = rng.uniform(-0.7 * np.pi, -0.3 * np.pi)
    shade = 1 + rng.uniform(0.25, 0.35) * np.tanh(-(slope_x * np.cos(angle) + slope_y * np.sin(angle)))
    grain = 1 + 0.18 * (_noise(rng, px, max(1, px // 64)) - 0.5)
    colour = colour * (1 + mask[..., None] * ((shade * grain)[..., None] - 1))
    ramp_x, ramp_y = np.meshgrid(np.linspace(-1, 1, px), np.linspace(-1, 1, px))
    sun = 1 + rng.uniform(0, 0.03) * (np.cos(angle) * ramp_x + np.sin(angle) * ramp_y)
    colour = colour * sun[..., None] * rng.uniform(0.92, 1.06) * rng.uniform(0.92, 1.08, 3)
    return colour + rng.normal(0, rng.uniform(1, 3), colour.shape)


def render(species: tuple[int, ...], rng: np.random.Generator, px: int) -> Bird:
    """Draws one bird.

    Args:
        species: one variant index (0..3) for each of PARTS.
        rng: source of every nuisance; the draws do not depend on the species.
        px: side of the square image in pixels.
    """
    variant = {part: VARIANTS[part][digit] for part, digit in zip(PARTS, species, strict=True)}
    pose = Pose(rng, px)
    body = _tint(rng, (0.1, 0.8), (0.5, 0.53))
    belly = 0.4 * body + 0.6 * _tint(rng, (0.0, 0.3), (0.78, 0.82))
    wing = body * rng.uniform(0.48, 0.52)
    mark = _tint(rng, (0.0, 0.15), (0.92, 0.95))
    beak = _tint(rng, (0.2, 0.8), (0.2, 0.24))
    tail, crest = wing * rng.uniform(0.75, 0.8), _tint(rng, (0.3, 0.9), (0.16, 0.22))
    legs = beak * 0.6

    painter = Painter(_background(rng, px))
    _clutter(painter, rng, px, int(rng.integers(1, 5)))
    foot = pose.place([(0.1, 0.52)])[0]
    perch = [(-0.1 * px, foot[1]), tuple(foot), (1.1 * px, foot[1])] + rng.normal(0, 0.015 * px, (3, 2))
    painter.fill(stripe(perch, rng.uniform(0.02, 0.03) * px), _tint(rng, (0.2, 0.5), (0.35, 0.45)), False)

    outlines = {}
    for part in PARTS:
        shapes = PART_OUTLINES[part](variant[part])
        outlines[part] = [pose.place(pose.turn_head(s) if part in ON_HEAD else s) for s in shapes]

    def paint(part: str, colour: np.ndarray) -> None:
        for outline in outlines[part]:
            painter.fill(outline, colour)

    for foot in (0.05, 0.17):
        painter.fill(pose.place(stripe([(foot, 0.2), (foot - 0.02, 0.52)], 0.035)), legs)
    paint("tail", tail)
    if variant["crest"] != "cap":
        paint("crest", crest)
    paint("beak", beak)
    head = pose.place(pose.turn_head(disc(*HEAD, 0.195)))
    for outline in (pose.place(BODY), pose.place(NECK), head):
        painter.fill(outline, body)
    painter.fill(pose.place(BELLY), belly)
    painter.fill(pose.place(WING), wing)
    for feather in range(3):
        y = 0.03 + 0.045 * feather
        painter.fill(pose.place(stripe([(-0.16, y), (-0.46 + 0.02 * feather, y + 0.08)], 0.014)), wing * 0.7)
    paint("wing_bar", mark)
    if variant["crest"] == "cap":
        paint("crest", crest)
    if variant["eye_ring"] != "plain":
        paint("eye_ring", np.array([25.0, 22, 20]) if variant["eye_ring"] == "mask" else mark)
    painter.fill(pose.place(pose.turn_head(disc(*EYE, 0.05))), np.array([18.0, 14, 12]))
    painter.fill(pose.place(pose.turn_head(disc(*(EYE + (0.015, -0.017)), 0.015))), np.array([250.0, 250, 250]))

    image = np.clip(_light(rng, *painter.result()), 0, 255).astype(np.uint8)
    return Bird(image, {part: _box(np.concatenate(outlines[part]), px) for part in PARTS})


def _box(points: np.ndarray, px: int) -> tuple[float, float, float, float]:
    low, high = np.clip(points.min(0) / px, 0, 1), np.clip(points.max(0) / px, 0, 1)
    return float(low[1]), float(low[0]), float(high[1]), float(high[0])
