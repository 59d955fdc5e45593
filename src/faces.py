"""Built-in faces: a procedural cartoon-face dataset, so that everything runs without a download.

    python -m src.faces data/faces

writes `<root>/<id>.png` and train_split.txt, val_split.txt beside them. The same id is always the same face.
All coordinates are fractions of the image's width, x to the right, y down.
"""

import argparse
import colorsys
import math
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from src.errors import UserError, one_line_errors
from src.files import replacing

INK = (45, 32, 30)
SKINS = ("#ffd90f", "#ffcf3a", "#f7c948", "#e8b04b", "#c98f4e", "#9a6238", "#f3c79b", "#ffe066")
HAIRS = ("#2b2320", "#4a2f22", "#7a4a24", "#b5762f", "#e0a83c", "#c8452c", "#3f5fae", "#7b4a9c", "#9aa0a6", "#e6e1d6")
STYLES = ("bald", "strands", "spikes", "beehive", "curls", "bob", "flat", "bun", "cap", "parting")
MOUTHS = ("smile", "grin", "flat", "frown", "open", "smirk")


class Canvas:
    """An image drawn four times too large, in fractions of its width, and shrunk at the end."""

    def __init__(self, size: int):
        self.size = size
        self.pixels = 4 * size
        self.image = Image.new("RGB", (self.pixels, self.pixels))
        self.draw = ImageDraw.Draw(self.image)
        self.line = max(2, round(0.016 * self.pixels))

    def _scaled(self, points):
        return [(x * self.pixels, y * self.pixels) for x, y in points]

    def ellipse(self, x, y, rx, ry, fill, outline=INK):
        box = self._scaled([(x - rx, y - ry), (x + rx, y + ry)])
        self.draw.ellipse(box, fill=fill, outline=outline, width=self.line if outline else 0)

    def polygon(self, points, fill, outline=INK):
        points = self._scaled(points)
        self.draw.polygon(points, fill=fill)
        if outline:
            self.draw.line([*points, points[0]], fill=outline, width=self.line, joint="curve")

    def stroke(self, points, fill=INK, width=1.0):
        self.draw.line(self._scaled(points), fill=fill, width=round(self.line * width), joint="curve")

    def shrunk(self) -> Image.Image:
        return self.image.resize((self.size, self.size), Image.Resampling.BOX)


def arc(x, y, rx, ry, start, end, count=24):
    """Points on an ellipse from angle `start` to `end`, in degrees, clockwise from the right."""
    angles = [math.radians(start + (end - start) * i / (count - 1)) for i in range(count)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def tint(rng: Random, saturation: float, value: float) -> tuple[int, ...]:
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(rng.random(), saturation, value))


def draw_face(identity: int, size: int = 64) -> Image.Image:
    """The face of an id: RGB, size x size, antialiased."""
    rng = Random(f"face {identity}")
    c = Canvas(size)
    _background(c, rng)
    cx = 0.5 + rng.uniform(-0.05, 0.05)
    cy = 0.5 + rng.uniform(-0.02, 0.06)
    rx = rng.uniform(0.20, 0.27)
    ry = rng.uniform(0.25, 0.32)
    skin, hair, style = rng.choice(SKINS), rng.choice(HAIRS), rng.choice(STYLES)
    turn = rng.uniform(-0.05, 0.05)  # how far the features are shifted: the head looks to that side

    if style in ("bob", "bun", "beehive", "curls"):
        _hair_behind(c, rng, style, cx, cy, rx, ry, hair)
    _clothes(c, rng, cx, cy, ry, skin)
    for side in (-1, 1):
        c.ellipse(cx + side * rx, cy + 0.03, 0.045, 0.06, skin)
    c.ellipse(cx, cy, rx, ry, skin)
    _features(c, rng, cx + turn, cy, rx, ry, skin, hair)
    _hair_in_front(c, rng, style, cx, cy, rx, ry, hair)
    return c.shrunk()


def _background(c: Canvas, rng: Random) -> None:
    kind = rng.choice(("plain", "wall", "outdoors", "stripes", "window"))
    base = tint(rng, rng.uniform(0.15, 0.55), rng.uniform(0.55, 0.95))
    other = tint(rng, rng.uniform(0.15, 0.55), rng.uniform(0.45, 0.9))
    c.polygon([(0, 0), (1, 0), (1, 1), (0, 1)], base, None)
    if kind == "wall":
        split = rng.uniform(0.5, 0.8)
        c.polygon([(0, split), (1, split), (1, 1), (0, 1)], other, None)
    elif kind == "outdoors":
        c.polygon([(0, 0), (1, 0), (1, 1), (0, 1)], (135, 200, 240), None)
        for _ in range(2):
            x, y = rng.random(), rng.uniform(0.08, 0.25)
            for dx in (-0.08, 0, 0.08):
                c.ellipse(x + dx, y, 0.08, 0.05, (250, 250, 250), None)
        c.ellipse(rng.random(), 1.15, 0.9, 0.45, (105, 175, 80), None)
    elif kind == "stripes":
        for i in range(0, 8, 2):
            c.polygon([(i / 8, 0), ((i + 1) / 8, 0), ((i + 1) / 8, 1), (i / 8, 1)], other, None)
    elif kind == "window":
        x = rng.choice((0.02, 0.62))
        c.polygon([(x, 0.06), (x + 0.36, 0.06), (x + 0.36, 0.5), (x, 0.5)], (190, 225, 250))
        c.stroke([(x + 0.18, 0.06), (x + 0.18, 0.5)])


def _clothes(c: Canvas, rng: Random, cx, cy, ry, skin) -> None:
    colour = tint(rng, rng.uniform(0.4, 0.9), rng.uniform(0.4, 0.95))
    shoulder, top = rng.uniform(0.3, 0.42), cy + ry + 0.07
    left, right = (
        arc(cx - shoulder + 0.1, top + 0.1, 0.1, 0.1, 180, 270),
        arc(cx + shoulder - 0.1, top + 0.1, 0.1, 0.1, 270, 360),
    )
    body = [(cx - shoulder, 1.1), *left, *right, (cx + shoulder, 1.1)]
    c.polygon(body, colour)
    kind = rng.choice(("plain", "collar", "stripes", "suit", "necklace"))
    if kind == "stripes":
        other = tint(rng, 0.5, 0.95)
        for y in (top + 0.06, top + 0.16):
            c.polygon(
                [
                    (cx - shoulder + 0.02, y),
                    (cx + shoulder - 0.02, y),
                    (cx + shoulder, y + 0.05),
                    (cx - shoulder, y + 0.05),
                ],
                other,
                None,
            )
        c.stroke([*body, body[0]])
    c.polygon(
        [(cx - 0.075, cy + 0.5 * ry), (cx + 0.075, cy + 0.5 * ry), (cx + 0.085, top + 0.02), (cx - 0.085, top + 0.02)],
        skin,
    )
    c.ellipse(cx, top + 0.01, 0.085, 0.03, skin, None)
    if kind == "collar":
        for side in (-1, 1):
            c.polygon(
                [(cx, top + 0.06), (cx + side * 0.09, top - 0.03), (cx + side * 0.15, top + 0.06)], (250, 250, 250)
            )
    elif kind == "suit":
        c.polygon([(cx - 0.1, top), (cx + 0.1, top), (cx, top + 0.25)], (250, 250, 250))
        c.polygon(
            [(cx - 0.03, top + 0.02), (cx + 0.03, top + 0.02), (cx + 0.04, 1.1), (cx - 0.04, 1.1)], tint(rng, 0.8, 0.7)
        )
    elif kind == "necklace":
        for x, y in arc(cx, top - 0.01, 0.1, 0.06, 15, 165, 7):
            c.ellipse(x, y, 0.02, 0.02, (240, 90, 90))


def _features(c: Canvas, rng: Random, cx, cy, rx, ry, skin, hair) -> None:
    eye, gap = rng.uniform(0.068, 0.095), rng.uniform(0.005, 0.02)
    eye_y = cy - rng.uniform(0.02, 0.06)
    gaze = rng.uniform(0, 0.55) * eye
    angle = rng.uniform(0, 2 * math.pi)
    lid = rng.choice((0, 0, 0.35, 0.6))
    mouth_y, beard = cy + 0.58 * ry, rng.choice(("none", "none", "none", "muzzle", "full", "moustache"))

    if beard == "full":
        c.polygon(arc(cx, cy + 0.3 * ry, 0.9 * rx, 0.72 * ry, 0, 180), hair)
    elif beard == "muzzle":
        c.ellipse(cx, mouth_y, 0.72 * rx, 0.34 * ry, "#c9a063")

    brow = rng.uniform(-0.03, 0.03)
    for side in (-1, 1):
        x = cx + side * (eye + gap)
        c.ellipse(x, eye_y, eye, eye, "white")
        c.ellipse(x + gaze * math.cos(angle), eye_y + gaze * math.sin(angle), 0.022, 0.026, INK, None)
        if lid:
            c.polygon(arc(x, eye_y, eye, eye, 180 + 60 * (1 - lid), 360 - 60 * (1 - lid)), skin)
        c.stroke(
            [(x - side * 0.04, eye_y - eye - 0.025 + brow), (x + side * 0.05, eye_y - eye - 0.03 - brow)], width=1.3
        )
    if rng.random() < 0.2:  # glasses
        for side in (-1, 1):
            ring = arc(cx + side * (eye + gap), eye_y, eye + 0.012, eye + 0.012, 0, 360)
            c.stroke(ring, (60, 60, 90), 1.6)

    width = rng.uniform(0.45, 0.65) * rx
    mouth = rng.choice(MOUTHS)
    if mouth == "smile":
        c.stroke(arc(cx, mouth_y - 0.05, width, 0.07, 20, 160), width=1.2)
    elif mouth == "frown":
        c.stroke(arc(cx, mouth_y + 0.06, width, 0.07, 200, 340), width=1.2)
    elif mouth == "flat":
        c.stroke([(cx - width, mouth_y), (cx + width, mouth_y)], width=1.2)
    elif mouth == "smirk":
        c.stroke([(cx - width, mouth_y + 0.01), (cx, mouth_y + 0.02), (cx + width, mouth_y - 0.03)], width=1.2)
    elif mouth == "grin":
        c.polygon(arc(cx, mouth_y - 0.03, width, 0.09, 0, 180), "white")
        c.stroke([(cx - 0.9 * width, mouth_y + 0.005), (cx + 0.9 * width, mouth_y + 0.005)], width=0.6)
    else:
        c.ellipse(cx, mouth_y, 0.55 * width, 0.06, (120, 25, 30))
        c.ellipse(cx, mouth_y + 0.03, 0.35 * width, 0.025, (220, 90, 90), None)

    if beard == "moustache":
        c.polygon([(cx, mouth_y - 0.065), *arc(cx, mouth_y - 0.02, 0.12, 0.04, 0, 180), (cx, mouth_y - 0.065)], hair)
    c.ellipse(cx, eye_y + eye + 0.02, rng.uniform(0.03, 0.045), rng.uniform(0.028, 0.05), skin)


def _hair_behind(c: Canvas, rng: Random, style, cx, cy, rx, ry, hair) -> None:
    if style == "bob":
        length = rng.uniform(0.2, 0.42)
        c.polygon(
            [*arc(cx, cy - 0.05, rx + 0.07, ry, 180, 360), (cx + rx + 0.1, cy + length), (cx - rx - 0.1, cy + length)],
            hair,
        )
    elif style == "bun":
        c.ellipse(cx, cy - ry - 0.05, 0.11, 0.1, hair)
    elif style == "beehive":
        tall = rng.uniform(0.3, 0.5)
        c.polygon([(cx - rx, cy), *arc(cx, cy - tall, 0.8 * rx, 0.12, 180, 360), (cx + rx, cy)], hair)
    else:
        for x, y in arc(cx, cy - 0.03, rx + 0.02, ry, 160, 380, 11):
            c.ellipse(x, y, 0.085, 0.085, hair)


def _hair_in_front(c: Canvas, rng: Random, style, cx, cy, rx, ry, hair) -> None:
    line = cy - rng.uniform(0.5, 0.62) * ry  # where the forehead ends
    cos = math.sqrt(1 - ((line - cy) / ry) ** 2)
    edge = math.degrees(math.asin((cy - line) / ry))
    dome = arc(cx, cy, rx + 0.012, ry + 0.015, 180 + edge, 360 - edge)
    if style == "strands":
        for dx in (-0.04, 0.03):
            c.stroke(arc(cx + dx, cy - ry, 0.06, 0.09, 180, 330), width=0.8)
    elif style == "spikes":
        count = rng.randint(6, 9)
        base = arc(cx, cy, rx, ry, 180 + edge, 360 - edge, 2 * count + 1)
        tips = [(x + (x - cx) * 0.35, y - 0.11) if i % 2 else (x, y) for i, (x, y) in enumerate(base)]
        c.polygon([*tips, (cx + cos * rx * 0.5, line + 0.01), (cx - cos * rx * 0.5, line + 0.01)], hair)
    elif style == "flat":
        w, top = cos * rx + 0.02, cy - ry - rng.uniform(0.05, 0.14)
        c.polygon([(cx - w, line), (cx - w - 0.01, top), (cx + w + 0.01, top), (cx + w, line)], hair)
    elif style == "cap":
        colour = tint(rng, 0.75, 0.8)
        c.polygon(dome, colour)
        side = rng.choice((-1, 1))
        c.polygon(
            [
                (cx - side * 0.05, line - 0.03),
                (cx + side * (rx + 0.14), line),
                (cx + side * (rx + 0.12), line + 0.04),
                (cx - side * 0.05, line + 0.03),
            ],
            colour,
        )
    elif style == "parting":
        side = rng.choice((-1, 1))
        c.polygon([*dome, (cx + side * 0.5 * rx, line - 0.06)], hair)
    elif style == "curls":
        for x, y in arc(cx, cy - 0.2 * ry, 0.75 * rx, 0.62 * ry, 205, 335, 5):
            c.ellipse(x, y, 0.07, 0.065, hair)
    elif style in ("bob", "bun", "beehive"):
        c.polygon([*dome, (cx, line - rng.uniform(0, 0.07))], hair)


def _write(identity: int, root: Path, size: int) -> None:
    with replacing(root / f"{identity}.png") as temporary:
        draw_face(identity, size).save(temporary, format="png")


def _same(a: Image.Image, b: Image.Image) -> bool:
    """Whether two images are the same face, but for how versions of Pillow draw it."""
    if a.mode != b.mode or a.size != b.size:
        return False
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b)).mean() < 4


def write_dataset(root: Path, train: int, val: int, size: int) -> None:
    """Draw ids 1 .. train + val; every (train + val) / val-th is for validation. Split files come last."""
    if train < 1 or val < 1 or size < 16:
        raise UserError("need at least one training and one validation face, of at least 16 pixels")
    ids = range(1, train + val + 1)
    chosen = {ids[i * len(ids) // val] for i in range(val)}
    splits = {"train": [i for i in ids if i not in chosen], "val": sorted(chosen)}
    lists = {root / f"{split}_split.txt": "".join(f"{i}\n" for i in members) for split, members in splits.items()}
    taken = [path for path, text in lists.items() if path.exists() and path.read_text() != text]
    drawn = next((i for i in ids if (root / f"{i}.png").exists()), None)  # by an interrupted command of ours?
    if drawn and not _same(Image.open(root / f"{drawn}.png"), draw_face(drawn, size)):
        taken.append(root / f"{drawn}.png")
    if taken:
        raise UserError(f"{taken[0]} would be lost: name another folder, or delete it first")
    root.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        jobs = pool.map(partial(_write, root=root, size=size), ids, chunksize=64)
        list(tqdm(jobs, total=len(ids), desc="drawing faces", unit="face"))
    for path, text in lists.items():
        with replacing(path) as temporary:
            temporary.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder to write")
    parser.add_argument("--train", type=int, default=2000, help="training faces (default: 2000)")
    parser.add_argument("--val", type=int, default=500, help="validation faces (default: 500)")
    parser.add_argument("--size", type=int, default=64, help="pixels a side (default: 64)")
    args = parser.parse_args()
    write_dataset(args.root, args.train, args.val, args.size)
    print(f"{args.train} training and {args.val} validation faces, {args.size}x{args.size}, in {args.root}")


if __name__ == "__main__":
    with one_line_errors():
        main()
