"""Train the two stages: an autoencoder (dae.py), then a hierarchical VAE on its latents (lvae.py).

    python train.py                                                  # built-in toy scenes, a laptop, about 10 minutes
    python train.py --data photos/                                   # a folder of images; sub-folders are classes
    python train.py --data photos/ --dae kl-f8 --image-size 256      # latents of an official autoencoder
    python train.py --dataset church --data church_outdoor_train_lmdb                        # the paper's, Table 5
    python train.py --dataset church --data DATA --init church_pipeline.pt                   # on from the authors' weights
    python train.py --data latents.npz                               # latents of any other autoencoder

Any option of either stage can be set (`--width 96 --groups 4,4,2,2 --dae-steps 3000`); --help explains each. A run's
folder, runs/NAME or --out, holds checkpoint.pt (all that sampling or resuming needs), log.jsonl and samples/*.png.
The same command again resumes; on a CPU the result is the same to the last bit as that of a run never stopped.

Reads downwards: the toy scenes, data, pictures and files, then stage one, stage two, and the command line.
"""
import argparse
import contextlib
import copy
import ctypes
import glob
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import dae as daes
import lvae


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit code 2."""


# ---------------------------------------------------------------- the toy scenes: a data set drawn by code

SEED, OVERSAMPLE = 1789, 4
BREADTH = {"church": 0.96, "house": 1.34, "castle": 1.20, "windmill": 0.92, "lighthouse": 0.52, "temple": 1.50,
           "pyramid": 1.60, "mosque": 1.28}  # the width of each landmark as a multiple of its height
TOY_CLASSES = tuple(BREADTH)
WALLS = (238, 226, 200), (214, 160, 118), (192, 104, 86), (226, 190, 124), (206, 198, 204), (162, 180, 190), (240, 238, 234)
ROOFS = (176, 66, 54), (84, 114, 178), (66, 126, 116), (140, 98, 78), (100, 98, 116), (210, 146, 62), (148, 90, 144)
GROUNDS = (116, 158, 78), (158, 166, 88), (212, 184, 128), (96, 140, 110), (226, 230, 238), (176, 138, 104)
SKIES = (  # zenith, horizon, the light that tints whatever it falls on, and the sun or moon (None: hidden)
    ((82, 148, 222), (196, 226, 244), (1.00, 1.00, 0.98), (255, 244, 190)),  # day
    ((88, 74, 138), (250, 168, 112), (0.96, 0.80, 0.74), (255, 214, 130)),  # dusk
    ((18, 24, 62), (88, 104, 160), (0.70, 0.75, 0.92), (240, 240, 222)),  # night
    ((136, 148, 164), (206, 212, 216), (0.84, 0.87, 0.90), None))  # overcast


def tint(colour, light=1.0):
    """The colour as it looks in this light, in the form that Pillow takes."""
    return tuple(np.clip(np.multiply(colour, light), 0, 255).astype(int).tolist())


class Brush:
    """Draws in a frame whose origin is (x, y) of the unit square, with y pointing up and the light coming from the left.

    A colour fills a flat shape; a paint is a pair of colours, one for the lit and one for the shaded side of a solid.
    """

    def __init__(self, canvas, x=0.0, y=0.0, unit=1.0):
        self.draw, self.side, self.x, self.y, self.unit = ImageDraw.Draw(canvas), canvas.width, x, y, unit

    def place(self, x, y):  # in pixels
        return self.side * (self.x + self.unit * x), self.side * (1 - self.y - self.unit * y)

    def polygon(self, colour, points):
        self.draw.polygon([self.place(x, y) for x, y in points], fill=colour)

    def ellipse(self, colour, x, y, width, height, start=0, end=360):
        box = self.place(x - width / 2, y + height / 2), self.place(x + width / 2, y - height / 2)
        self.draw.pieslice(box, start, end, fill=colour)

    def block(self, paint, x, y, width, height, top=1.0, lit=0.62):
        """A trapezoid on the base centre (x, y), `top` times as wide above (0: a spire); `lit` is the share in the light."""
        for colour, left, right in zip(paint, (-0.5, lit - 0.5), (lit - 0.5, 0.5)):
            corners = (left, 0), (right, 0), (right * top, height), (left * top, height)
            self.polygon(colour, [(x + width * across, y + up) for across, up in corners])

    def dome(self, paint, x, y, width, height):
        self.ellipse(paint[1], x, y, width, 2 * height, 180, 360)
        self.ellipse(paint[0], x - 0.14 * width, y, 0.72 * width, 2 * height, 180, 360)  # leaves a crescent of shade

    def arch(self, paint, x, y, width, height):
        self.block(paint, x, y, width, height - width / 2)
        self.ellipse(paint[0], x, y + height - width / 2, width, width, 180, 360)


def landmark(name, brush, rng, wall, roof, gap):
    """Draws a landmark that stands on y = 0, centred on x = 0 and one unit high; `gap` paints its doors and windows."""
    block, dome, arch, flip = brush.block, brush.dome, brush.arch, rng.choice((-1, 1))
    if name == "church":
        block(wall, -0.15 * flip, 0, 0.60, 0.30)
        block(roof, -0.15 * flip, 0.30, 0.66, 0.20, top=0.84, lit=1)
        block(wall, 0.27 * flip, 0, 0.26, 0.56)
        block(roof, 0.27 * flip, 0.56, 0.33, 0.44, top=0)
        arch(gap, 0.27 * flip, 0, 0.12, 0.22)
        for x in (-0.34, -0.18, -0.02):
            arch(gap, x * flip, 0.08, 0.08, 0.16)
    elif name == "house":
        block(wall, 0.34 * flip, 0.60, 0.16, 0.40)  # the chimney, behind the roof
        block(wall, 0, 0, 1.10, 0.48, lit=0.75)
        block(roof, 0, 0.46, 1.34, 0.46, top=rng.uniform(0.35, 0.60), lit=0.75)
        block(gap, -0.12 * flip, 0, 0.17, 0.34)
        for x in (-0.38, 0.26):
            block(gap, x * flip, 0.17, 0.19, 0.17)
    elif name == "castle":
        left, right = rng.permutation((0.90, rng.uniform(0.70, 0.90)))
        for x, height, width, merlons in (0, 0.44, 0.80, 5), (-0.43, left, 0.32, 3), (0.43, right, 0.32, 3):
            block(wall, x, 0, width, height)
            block(roof, x, height - 0.11, width + 0.02, 0.05)
            pitch = width / (2 * merlons - 1)
            for i in range(merlons):
                block(wall, x + (2 * i - merlons + 1) * pitch, height, pitch, 0.10)
        for x, y, width, height in (0, 0, 0.26, 0.30), (-0.43, left - 0.36, 0.09, 0.17), (0.43, right - 0.36, 0.09, 0.17):
            arch(gap, x, y, width, height)
    elif name == "windmill":
        block(wall, 0, 0, 0.50, 0.58, top=0.62)
        dome(roof, 0, 0.56, 0.36, 0.18)
        arch(gap, 0, 0, 0.13, 0.20)
        sail = np.array((-0.03j, 0.08 - 0.06j, 0.43 - 0.08j, 0.43 + 0.11j, 0.08 + 0.09j, 0.03j))
        for quarter in rng.uniform(0.15, 0.85) + np.arange(4):  # a complex factor turns the sail
            brush.polygon(roof[0], [(p.real, 0.58 + p.imag) for p in sail * np.exp(0.5j * np.pi * quarter)])
    elif name == "lighthouse":
        edges = np.linspace(0, 1, rng.choice((6, 8)))
        for i, (low, high) in enumerate(zip(edges, edges[1:])):  # the stripes of a tower that tapers to 0.6 of its foot
            width = 0.50 * (1 - 0.4 * low)
            block((wall, roof)[i % 2], 0, 0.72 * low, width, 0.72 * (high - low), top=0.50 * (1 - 0.4 * high) / width)
        block(roof, 0, 0.72, 0.44, 0.05)
        block(gap, 0, 0.77, 0.26, 0.11)
        dome(roof, 0, 0.88, 0.36, 0.12)
    elif name == "temple":
        block(wall, 0, 0, 1.50, 0.07, lit=0.8)
        block(wall, 0, 0.07, 1.36, 0.07, lit=0.8)
        block(gap, 0, 0.14, 1.14, 0.46)
        for x in np.linspace(-0.55, 0.55, rng.integers(4, 7)):
            block(wall, x, 0.14, 0.14, 0.46)
        block(wall, 0, 0.60, 1.32, 0.09, lit=0.8)
        block(roof, 0, 0.69, 1.50, 0.31, top=0, lit=1)
        block(wall, 0, 0.74, 0.96, 0.18, top=0, lit=1)
    elif name == "pyramid":
        block(wall, 0, 0, 1.60, 1, top=0)
        block(roof, 0, 0.76, 0.24 * 1.60, 0.24, top=0)
    elif name == "mosque":
        for x in (-0.56, 0.56):
            block(wall, x, 0, 0.12, 0.80)
            block(roof, x, 0.80, 0.16, 0.20, top=0)
        block(wall, 0, 0, 0.88, 0.36)
        block(wall, 0, 0.36, 0.58, 0.10)
        dome(roof, 0, 0.45, 0.66, 0.43)
        for x in (-0.27, 0, 0.27):
            arch(gap, x, 0, 0.15, 0.24)


def backdrop(side, rng, sky, ground, horizon):
    """A canvas of `side` pixels with sky, sun, cloud, hills and ground."""
    zenith, haze, light, sun = sky
    ground, haze = np.multiply(ground, light), np.array(haze)
    heights = 1 - (np.arange(side) + 0.5) / side
    stops = zip(0.86 * ground, ground, haze, zenith)  # for each channel, from the foot of the picture to its top
    column = np.stack([np.interp(heights, (0, horizon, horizon, 1), channel) for channel in stops], axis=-1)
    canvas = Image.fromarray(column.astype(np.uint8)[:, None]).resize((side, side))
    brush = Brush(canvas)
    x, y, size = rng.uniform((0.08, 0.72, 0.10), (0.42, 0.92, 0.17))
    if sun:
        brush.ellipse(sun, x, y, size, size)
    x, y, size = rng.uniform((0.20, 0.66, 0.26), (0.90, 0.90, 0.44))
    if rng.random() < 0.6:
        cloud = tint(0.45 * haze + 0.55 * 255 * np.array(light))
        for across, up, width in (-0.30, 0, 0.40), (0, 0.04, 0.64), (0.30, 0, 0.48):
            brush.ellipse(cloud, x + across * size, y + up * size, width * size, 0.6 * width * size)
    for distance in 0.62, 0.30:  # the farther hills are the higher, and paler in the haze
        height, swell, phase, pace = rng.uniform((0.04, 0.02, 0, 3), (0.10, 0.05, 6.3, 8))
        across = np.linspace(0, 1, 33)
        ridge = horizon + (0.6 + distance) * (height + swell * np.sin(phase + pace * across))
        hill = tint(distance * haze + (1 - distance) * 0.8 * ground)
        brush.polygon(hill, [(0, horizon), *zip(across, ridge), (1, horizon)])
    return canvas


def toy(index, size=64):
    """Scene `index` as a (size, size, 3) array of uint8, and its class."""
    rng = np.random.default_rng((SEED, index))
    label = int(index) % len(TOY_CLASSES)
    name, breadth = list(BREADTH.items())[label]
    sky, *colours = (choices[rng.integers(len(choices))] for choices in (SKIES, WALLS, ROOFS, GROUNDS))
    wall, roof, ground = np.array(colours) + rng.uniform(-14, 14, (3, 3))
    tallest = min(0.80, 0.92 / breadth)
    unit = rng.uniform(0.78, 1.0) * tallest  # the height of the landmark, which stays inside the frame
    room = min(0.12, 0.47 - breadth * unit / 2)
    x, y = rng.uniform((0.5 - room, 0.08), (0.5 + room, 0.15))
    canvas = backdrop(size * OVERSAMPLE, rng, sky, ground, horizon=y + rng.uniform(0.05, 0.16))
    light, brush = sky[2], Brush(canvas, x, y, unit)
    brush.ellipse(tint(0.66 * ground, light), 0.12, 0, breadth, 0.12)  # the shadow on the ground
    gap = tint((255, 214, 110)) if sum(light) < 2.7 and rng.random() < 0.7 else tint(0.3 * wall, light)  # lamps
    landmark(name, brush, rng, *((tint(c, light), tint(0.7 * c, light)) for c in (wall, roof)), (gap, gap))
    picture = np.asarray(canvas.reduce(OVERSAMPLE))
    return (picture[:, ::-1] if rng.random() < 0.5 else picture).copy(), label  # mirrored: the light is from the right


# ---------------------------------------------------------------- images

SOURCES = {  # what a preset's data is called, and where it comes from
    "church": ("LSUN Church outdoor", "http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip"),
    "bedroom": ("LSUN Bedroom", "http://dl.yf.io/lsun/scenes/bedroom_train_lmdb.zip"),
    "imagenet": ("ImageNet (the training folder of synset folders)", "https://image-net.org/download.php"),
}
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")  # none that starts a program
SMALLEST = 8  # pixels; an image with a shorter side holds nothing to learn
MEMORY = 512 << 20  # bytes of decoded images that are kept


@dataclass
class Images:
    """A set of images: `read(i)` gives (size, size, 3) uint8, or None where the image is bad (then named in `bad`)."""
    names: list
    labels: np.ndarray                                         # (N,) int64, all 0 without classes
    classes: list                                              # names, empty without classes
    size: int
    open: object                                               # function of an index -> array; raises on a bad image
    fingerprint: str                                           # changes when the files do
    bad: dict = field(default_factory=dict)                    # name -> reason
    kept: dict = field(default_factory=dict)

    def read(self, i):
        if self.names[i] in self.bad:
            return None
        if i in self.kept:
            return self.kept[i]
        try:
            image = self.open(i)
        except Exception as e:                                 # whatever a broken file provokes in Pillow
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            self.bad[self.names[i]] = reason
            tqdm.write(f"skipped {self.names[i]}: {reason}")
            return None
        if (len(self.kept) + 1) * image.nbytes <= MEMORY:
            self.kept[i] = image
        return image


def to_rgb(image):
    """Any Pillow image -> RGB: EXIF-rotated, 16-bit and float scaled to 8, transparency over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float32)
        top = 65535 if image.mode.startswith("I") else 255 if values.max() > 1 else 1
        image = Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_image(source, size):
    """An image file (path or file object) -> (size, size, 3) uint8: short side to `size`, centre square. Raises OSError."""
    Image.init()
    with Image.open(source, formats=[f for f in FORMATS if f in Image.OPEN]) as image:
        if min(image.size) < SMALLEST:
            raise OSError(f"{image.width}x{image.height} pixels is too small")
        image.draft("RGB", (2 * size, 2 * size))               # lets the JPEG decoder skip what shrinking would discard
        return np.asarray(ImageOps.fit(to_rgb(image), (size, size), Image.LANCZOS))


def toy_images(size, count=6144):
    labels = np.arange(count, dtype=np.int64) % len(TOY_CLASSES)
    return Images([f"toy {i}" for i in range(count)], labels, list(TOY_CLASSES), size, lambda i: toy(i, size)[0],
                  f"toy {count}")


def folder_images(path, size):
    """Every image below a folder, sorted. If all lie in sub-folders, and there are several, those are the classes."""
    extensions = {e for e, kind in Image.registered_extensions().items() if kind in FORMATS}
    files, other = [], 0
    for folder, inside, names in os.walk(path, followlinks=True):
        inside[:] = sorted(d for d in inside if not d.startswith("."))
        for name in sorted(n for n in names if not n.startswith(".")):
            if os.path.splitext(name)[1].lower() in extensions:
                files.append(os.path.relpath(os.path.join(folder, name), path))
            else:
                other += 1
    if other:
        print(f"{path}: {other} files are not images by their names, skipped")
    if not files:
        raise UserError(f"{path}: no image found in it (expected .jpg, .png, ... at any depth)")
    parts = [f.split(os.sep)[0] if os.sep in f else None for f in files]
    classes = sorted(set(parts) - {None})
    if len(classes) > 1 and None in parts:
        print(f"{path}: {parts.count(None)} images lie outside the {len(classes)} sub-folders, so these are not classes")
    if len(classes) < 2 or None in parts:
        classes = []
    number = {c: i for i, c in enumerate(classes)}
    labels = np.array([number.get(p, 0) for p in parts], np.int64)
    stats = [os.stat(p) if os.path.exists(p) else os.lstat(p) for p in (os.path.join(path, f) for f in files)]
    listing = [(f, s.st_size, s.st_mtime_ns) for f, s in zip(files, stats)]
    return Images([os.path.join(path, f) for f in files], labels, classes, size,
                  lambda i: read_image(os.path.join(path, files[i]), size), repr(listing))


def lmdb_images(path, size):
    """An LSUN LMDB folder: key -> JPEG or WebP bytes."""
    try:
        import lmdb
    except ImportError:
        raise UserError(f"{path} is an LMDB: reading it needs `pip install lmdb`") from None
    from io import BytesIO
    env = lmdb.open(path, readonly=True, lock=False, readahead=False)
    with env.begin() as txn:
        keys = list(txn.cursor().iternext(values=False))

    def read(i):
        with env.begin() as txn:
            return read_image(BytesIO(txn.get(keys[i])), size)
    if not keys:
        raise UserError(f"{path}: the LMDB is empty")
    return Images([k.decode(errors="replace") for k in keys], np.zeros(len(keys), np.int64), [], size, read,
                  f"lmdb {len(keys)} {os.path.getmtime(os.path.join(path, 'data.mdb'))}")


def open_images(path, size):
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such folder of images" if not os.path.exists(path) else
                        f"{path}: expected a folder of images, an LSUN LMDB folder, or an .npz of latents")
    return (lmdb_images if os.path.exists(os.path.join(path, "data.mdb")) else folder_images)(path, size)


def split(count, share):
    """Indices (training, held out): a fixed shuffle, the same for every run on the same data."""
    order = np.random.default_rng(0).permutation(count)
    held = min(round(share * count), 2000) if count > 1 else 0
    return np.sort(order[held:]), np.sort(order[:held])


@lru_cache(maxsize=2)
def _epoch(seed, epoch, count):
    return np.random.default_rng((seed, epoch)).permutation(count)


def batch_indices(seed, count, batch, number):
    """Batch `number` of an endless pass over `count` items, shuffled anew each epoch: a pure function of its arguments."""
    places = np.arange(number * batch, (number + 1) * batch)
    return np.array([_epoch(seed, int(p) // count, count)[p % count] for p in places])


def to_tensor(images):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def to_uint8(x):
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3) array."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


# ---------------------------------------------------------------- pictures and files


def grid(rows, gap=2, row_names=None, column_names=None, title=None):
    """Rows of uint8 images (H, W, 3), possibly of unequal length or size -> one Pillow image, with names before the rows and
    above the columns, and a title. The columns are as wide as their widest image, the rows as high as their highest."""
    widths = [max(row[c].shape[1] for row in rows if c < len(row)) for c in range(max(map(len, rows)))]
    heights = [max(image.shape[0] for image in row) for row in rows]
    font = ImageFont.load_default(max(10, min(32, min(widths + heights) // 7)))
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    left = 8 + max(int(measure.textlength(name, font)) for name in row_names) if row_names else 0
    line = 4 + int(font.size * 1.3)
    top = line * (bool(column_names) + bool(title))
    if column_names:                                           # a column is at least as wide as its name
        widths = [max(w, 4 + int(measure.textlength(name, font))) for w, name in zip(widths, column_names)]
    width = left + max(sum(widths) + gap * (len(widths) + 1), 8 + int(measure.textlength(title, font)) if title else 0)
    sheet = Image.new("RGB", (width, top + sum(heights) + gap * (len(heights) + 1)), "white")
    draw, y = ImageDraw.Draw(sheet), top + gap
    if title:
        draw.text((left + gap, line // 2), title, fill="black", font=font, anchor="lm")
    for r, row in enumerate(rows):
        x = left + gap
        if row_names:
            draw.text((4, y + heights[r] // 2), row_names[r], fill="black", font=font, anchor="lm")
        for c, image in enumerate(row):
            if column_names and r == 0:
                draw.text((x + widths[c] // 2, top - line // 2), column_names[c], fill="black", font=font, anchor="mm")
            sheet.paste(Image.fromarray(image), (x + (widths[c] - image.shape[1]) // 2, y + (heights[r] - image.shape[0]) // 2))
            x += widths[c] + gap
        y += heights[r] + gap
    return sheet


def write(path, save):
    """Write a file whole or not at all: `save(file)` fills a temporary one, which then takes the name."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:                       # torch reports a full disk as a RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        cause = e if isinstance(e, OSError) else e.__context__
        raise UserError(f"{path}: cannot be written ({getattr(cause, 'strerror', None) or str(e).splitlines()[0]})") from None


def reserve(path):
    """Take a sparse file's space on the disk: a full disk is then an error now, not a crash later."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))


def save_checkpoint(path, state, previous, keep):
    """Replace a checkpoint, whole. The one that stands there, of step `previous`, stays beside it as NAME-STEP.pt, with the
    `keep` newest of those; at every moment the name itself is that of a loadable checkpoint."""
    stem = path.removesuffix(".pt")
    if keep and previous is not None and previous != state["step"] and os.path.exists(path):
        older = f"{stem}-{previous:07d}.pt"
        with contextlib.suppress(FileNotFoundError):
            os.remove(older)
        try:
            os.link(path, older)
        except OSError:                                        # a file system without hard links
            shutil.copyfile(path, older)
    write(path, lambda file: torch.save(state, file))
    for old in sorted(glob.glob(f"{glob.escape(stem)}-*.pt"))[:-keep or None]:
        os.remove(old)


def load_newest(path, load):
    """What `load` makes of a checkpoint, or of the one kept before it where that is damaged; and whether it is the newest.
    (None, True) if there is none."""
    paths = [path] + sorted(glob.glob(f"{glob.escape(path.removesuffix('.pt'))}-*.pt"), reverse=True)
    paths = [p for p in paths if os.path.exists(p)]
    for p in paths:
        try:
            return load(p), p == path
        except daes.LoadError as e:
            print(f"{e}" + ("; going on from the one saved before" if p != paths[-1] else ""), file=sys.stderr, flush=True)
    if paths:
        raise UserError(f"{path}: no checkpoint here can be loaded; choose another --out to begin anew")
    return None, True


class Stopped(Exception):
    """The run was asked to stop and has saved."""


@contextlib.contextmanager
def signals():
    """Inside, SIGTERM (pre-emption) and Ctrl-C only fill the list given, which is looked at between steps. A second one is a
    KeyboardInterrupt."""
    asked = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)
    main = threading.current_thread() is threading.main_thread()            # no other may set handlers
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT) if main}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def claim(out):
    """Make a run's folder and lock it against other processes, until the file returned is closed. Raises UserError."""
    os.makedirs(out, exist_ok=True)
    file = open(os.path.join(out, "lock"), "w")
    with contextlib.suppress(ImportError):                     # Windows has no fcntl
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{out}: another process is training there; wait for it, or choose another --out") from None
    return file


def write_log(out, **stats):
    """Append a line to log.jsonl."""
    with open(os.path.join(out, "log.jsonl"), "a") as file:
        file.write(json.dumps(stats) + "\n")


def trim_log(out, stage, step):
    """Forget what a stage logged after `step`: the steps since the last save are run again."""
    path = os.path.join(out, "log.jsonl")
    if os.path.exists(path):
        with open(path) as file:
            lines = [line for line in file if line.endswith("}\n")]
        kept = [line for line in lines if (entry := json.loads(line))["stage"] != stage or entry["step"] <= step]
        write(path, lambda file: file.write("".join(kept).encode()))


def load_checkpoint(path):
    """A checkpoint.pt of stage two, or one of the authors' pipelines, -> a dict with config (an lvae.Config), ema, dae,
    classes, dataset (the preset) and run (how it was made). The tensors are views of the file. Raises LoadError."""
    state = daes.read(path)
    if isinstance(state, dict) and "vae.encoder.in_proj.weight" in state:
        return released_checkpoint(state, path)
    if not isinstance(state, dict) or not {"config", "ema", "dae", "classes"} <= state.keys():
        raise daes.LoadError(f"{path}: not a checkpoint of train.py's second stage (expected config, ema, dae, classes), nor one "
                             "of the paper's pipelines")
    try:
        config = lvae.Config(**state["config"])
        if sum(config.groups + config.encoder_layers) > 1000:
            raise ValueError(f"{sum(config.groups)} latent groups")
        if not all(isinstance(state.get(name, {}), dict) for name in ("run", "ema", "dae")):
            raise ValueError("run, ema and dae must be dictionaries")
        if not config.scale:
            raise ValueError("scale is 0")
        state = {"run": {}, "step": 0} | state
        dataset = state.get("dataset", state["run"].get("dataset"))
        return state | {"config": config, "classes": [str(name) for name in state["classes"]], "dataset": dataset}
    except Exception as e:  # whatever a foreign file holds there
        raise daes.LoadError(f"{path}: its configuration does not fit this version ({str(e)[:200]})") from None


def released_checkpoint(state, path):
    """A pipeline that the authors published, one dict of dae.* and vae.* tensors, as a checkpoint of ours.

    Which preset it is shows in its shapes. The shift and scale of the latents are the preset's, and attention is "released".
    """
    weights = {k.removeprefix("vae."): v for k, v in state.items() if isinstance(k, str) and k.startswith("vae.") and torch.is_tensor(v)}
    try:
        ema = lvae.from_released(weights)
    except (RuntimeError, IndexError) as e:
        raise daes.LoadError(f"{path}: misshapen weights ({str(e).splitlines()[0][:150]})") from None
    shapes = {name: value.shape for name, value in ema.items()}
    for dataset, preset in lvae.PRESETS.items():
        config = replace(preset, attention="released")
        if shapes.get("encoder.in_proj.weight") != (config.encoder_width * config.mult[0], config.data_channels, 3, 3):
            continue                                           # a quick no
        with torch.device("meta"):
            expected = {name: value.shape for name, value in lvae.LVAE(config).state_dict().items()}
        if shapes == expected:
            has_dae = any(isinstance(k, str) and k.startswith("dae.") for k in state)
            return {"config": config, "ema": ema, "dae": daes.find(state, path).state if has_dae else {}, "classes": [], "step": 0,
                    "run": {}, "dataset": dataset}
    raise daes.LoadError(f"{path}: a pipeline of the paper, but of no preset: {len(weights)} tensors under vae., expected those of "
                         + ", ".join(name for name in lvae.PRESETS if not name.startswith("toy")))


# ---------------------------------------------------------------- devices


def import_xla():
    try:
        import torch_xla
        return torch_xla
    except ImportError as e:
        raise UserError(f"--device xla needs the torch_xla package and the torch that it was built for ({e})") from None


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:          # under torchrun: a GPU for each process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name == "xla":
        return import_xla().device()
    try:
        torch.empty(1, device=name)
        device = torch.device(name)
        if device.type == "cpu":
            keep_memory()
        return device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name}: {str(e).splitlines()[0]}") from None


def keep_memory():
    """Let freed memory stay with the process. glibc returns large blocks to the system, which then clears every page of the next
    one: a fifth of the time of a decoder on a CPU. Without glibc this does nothing."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)                                     # M_MMAP_MAX: large blocks are of the heap too ...
            mallopt(-1, 2 ** 31 - 1)                           # M_TRIM_THRESHOLD: ... of which up to 2 GiB may stay free


def pick_dtype(device, precision):
    """bf16 where the device has the units for it, else fp32; --precision overrules."""
    if precision == "auto":
        fast = (device.type == "xla" and os.environ.get("PJRT_DEVICE") == "TPU" or
                device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) or
                device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False))
        precision = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def join(device):
    """Join the other processes, if torchrun started several."""
    if device.type != "xla" and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=2))


def world():
    """(Rank of this process, number of processes)."""
    if "torch_xla" in sys.modules:                             # imported for --device xla only
        import torch_xla.runtime as xr
        return xr.global_ordinal(), xr.world_size()
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def say(text):
    """Print, from the first process only."""
    if world()[0] == 0:
        print(text, flush=True)


def barrier(asked=()):
    """Wait for the other processes. Raises Stopped when `asked` to stop meanwhile."""
    if world()[1] > 1 and "torch_xla" in sys.modules:
        import torch_xla.core.xla_model as xm
        xm.rendezvous("barrier")
    elif world()[1] > 1:
        others = dist.barrier(async_op=True)
        while not others.is_completed():
            if asked:
                raise Stopped(asked[0])
            time.sleep(0.05)


def average(tensors):
    """Replace tensors by their mean over all processes, in place: one message for all."""
    if world()[1] > 1:
        flat = torch.cat([t.flatten().float() for t in tensors])
        if flat.device.type == "xla":
            import torch_xla.core.xla_model as xm
            xm.all_reduce(xm.REDUCE_SUM, [flat])
        else:
            dist.all_reduce(flat)
        for t, mean in zip(tensors, (flat / world()[1]).split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))


def place(module, device, dtype=torch.float32):
    """Move a module to the device, channels-last where there is such a thing. dtype: of the weights that autocast would
    convert at every call; other than fp32 for inference only."""
    for layer in module.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.to(dtype)
    return module.to(device) if device.type == "xla" else module.to(device, memory_format=torch.channels_last)


def on_host(state):
    """A checkpoint's dict with all tensors on the CPU."""
    if isinstance(state, dict):
        return {k: on_host(v) for k, v in state.items()}
    return [on_host(v) for v in state] if isinstance(state, list) else state.cpu() if torch.is_tensor(state) else state


def compiled(function, graphs=False):
    """torch.compile(function) for inputs of one size. Where its forward does not compile, that is said and it runs as it was.
    graphs: launch its many kernels at once, as CUDA graphs; it must return one tensor."""
    try:
        fast = torch.compile(function, dynamic=False, mode="reduce-overhead" if graphs else "default")
    except RuntimeError as e:                                  # a Python that this torch cannot compile for
        say(f"not compiled after all: {str(e).strip().splitlines()[0]}")
        return function

    def call(*inputs, **options):
        nonlocal fast
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            out = fast(*inputs, **options)
        except torch._dynamo.exc.TorchDynamoException as e:
            say(f"not compiled after all: {str(e).strip().splitlines()[0]}")
            fast = function
            out = fast(*inputs, **options)
        return out.clone() if graphs else out                  # the next run of a graph writes over what this one gave
    return call


def autocast(device, dtype):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def seed_step(seed, step):
    """All randomness of a step is a function of (seed, step), so resuming needs no generator's state."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_per_call(function, device, budget, typical=np.median):
    """The median (or other `typical`) time of a call, after one to warm up, of as many as fit into `budget` seconds (3 at least)."""
    times = []
    while len(times) < 4 or sum(times[1:]) < budget:
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return float(typical(times[1:]))


@torch.no_grad()
def matmul_rate(device, dtype):
    """FLOP/s of the device's fastest large square matrix product: its peak, as measured."""
    rates = []
    for n in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        rates.append(2 * n ** 3 / seconds_per_call(lambda: a @ b, device, 0.5, typical=np.min))
    return max(rates)


def count_flops(function):
    """The floating-point operations of a call, 2 for each multiplication with an addition."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):       # attention as products, which it counts
        function()
    return counter.get_total_flops()


def training_flops(config):
    """FLOPs of one sample's forward and backward pass, counted on tensors without content. (Labels would add next to nothing.)"""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        model = lvae.LVAE(replace(config, num_classes=0, recompute=False))
        x = torch.zeros(1, config.data_channels, config.resolution, config.resolution)
        return count_flops(lambda: model(x).mean.sum().backward())


# ---------------------------------------------------------------- stage one: the autoencoder


def train_dae(images, indices, config, run, device, dtype):
    """Train an autoencoder on images (Section 3.1), resuming from OUT/dae.pt; returns it in evaluation mode."""
    path = os.path.join(run.out, "dae.pt")
    seed_step(run.seed, 0)
    ae = daes.Autoencoder(config).to(device)
    adversarial = config.adversarial_weight > 0
    if adversarial and images.size < 32:
        raise UserError(f"the discriminator needs images of 32 pixels or more, not {images.size}: --dae-adversarial-weight 0")
    discriminator = daes.Discriminator().to(device) if adversarial else None
    perceptual = daes.perceptual_network() if config.perceptual_weight else None
    if perceptual is not None:
        perceptual.to(device)
    elif config.perceptual_weight:
        print("autoencoder: no perceptual term (the lpips package is not installed, or its weights cannot be had)")
    betas = (0.5, 0.9) if adversarial else (0.9, 0.99)         # LDM's; without an adversary, the second is faster
    optimizer = torch.optim.Adam(ae.parameters(), config.lr, betas=betas, fused=True)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), config.lr, betas=(0.5, 0.9), fused=True) if adversarial else None

    def load(path):
        state = daes.read(path)
        if not isinstance(state, dict) or not {"dae", "optimizer", "step", "dae_config", "run"} <= state.keys():
            raise daes.LoadError(f"{path}: not a save of this run's autoencoder")
        return state
    step, skipped, saved = 0, 0, None
    state, newest = load_newest(path, load)
    if state:
        compare_configs(state.get("dae_config", {}), asdict(config), path)
        compare_configs(state.get("run", {}), {k: v for k, v in run.origin.items() if k != "dae_options"}, path)
        ae.load_state_dict(state["dae"])
        restore(optimizer, state["optimizer"])
        if adversarial:
            discriminator.load_state_dict(state["discriminator"])
            restore(d_optimizer, state["d_optimizer"])
        step = state["step"]
        saved = step if newest else None
        del state                                              # and with it the mapped file
    if world()[0] == 0:
        trim_log(run.out, "dae", step)

    def save():
        state = {"dae": ae.state_dict(), "dae_config": asdict(config), "step": step, "optimizer": optimizer.state_dict(),
                 "run": run.origin}
        if adversarial:
            state |= {"discriminator": discriminator.state_dict(), "d_optimizer": d_optimizer.state_dict()}
        save_checkpoint(path, state, saved, run.keep)

    def read_batch(number):                                    # numpy only: torch's threads belong to the main one
        mirror = np.random.default_rng((run.seed, number)).random(config.batch) < (0.5 if run.flip else 0)
        chosen = []
        for i, mirrored in zip(batch_indices(run.seed, len(indices), config.batch, number), mirror):
            following = (images.read(indices[(i + k) % len(indices)]) for k in range(len(indices)))
            image = next((image for image in following if image is not None), None)    # a bad one: the next instead
            if image is None:
                raise UserError(f"no usable image among {len(indices)}: {next(iter(images.bad.items()))}")
            chosen.append(image[:, ::-1] if mirrored else image)
        return chosen

    bar = tqdm(total=config.steps, initial=step, desc="autoencoder", unit="step", disable=step >= config.steps)
    with ThreadPoolExecutor(1) as reader:                      # reads a batch ahead
        ahead = reader.submit(read_batch, step)
        started, since = time.time(), step
        while step < config.steps:
            x = to_tensor(ahead.result()).to(device)
            ahead = reader.submit(read_batch, step + 1)
            step += 1
            seed_step(run.seed, step)
            # Constant, as LDM's, but for the last third: a short run ends sharper if its rate falls to zero.
            optimizer.param_groups[0]["lr"] = config.lr * min(step / 100, 1, 3 * (config.steps - step + 1) / config.steps)
            with autocast(device, dtype):
                loss, hinge, terms = daes.training_losses(
                    ae, x, discriminator if step >= config.adversarial_start else None, perceptual)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in ae.parameters()])
            skipped = 0 if norm.isfinite() else skipped + 1    # in a row
            if skipped == 100:
                raise UserError(f"the autoencoder's gradient was not finite for 100 steps: lower --dae-lr; {path} holds the last save")
            if not skipped:
                optimizer.step()
                if hinge is not None:
                    d_optimizer.zero_grad()
                    hinge.backward()
                    d_optimizer.step()
            bar.update()
            if step % run.log_every == 0 or step == config.steps:
                stats = {k: round(float(v), 5) for k, v in terms.items()}
                rate = (step - since) * config.batch / (time.time() - started)
                started, since = time.time(), step
                bar.set_postfix(l1=stats["l1"])
                write_log(run.out, stage="dae", step=step, loss=round(loss.item(), 3), **stats,
                          grad_norm=round(float(norm), 3), lr=optimizer.param_groups[0]["lr"], images_per_s=round(rate, 1))
            if step % run.save_every == 0 or step == config.steps or run.asked:
                save()
                saved = step
            if run.asked and step < config.steps:
                raise Stopped(f"{run.asked[0]}: saved {path} at step {step} of the autoencoder")
            if step % run.sample_every == 0 or step == config.steps:
                with torch.no_grad(), autocast(device, dtype):
                    rec = ae.decode(ae.encode(x[:8]))
                picture = grid([to_uint8(x[:8]), to_uint8(rec)])
                write(os.path.join(run.out, "samples", f"dae_{step:06d}.png"), lambda f: picture.save(f, "png"))
    bar.close()
    return ae.eval()


# ---------------------------------------------------------------- from images to latents


def report_changes(path, names):
    """Keep the names of the images in a file, and say which have come or gone since it was written."""
    if os.path.exists(path):
        with open(path) as file:
            before = set(file.read().split("\n"))
        for what, changed in (("new", set(names) - before), ("gone", before - set(names))):
            if changed:
                print(f"{len(changed)} images are {what} since the last encoding: {', '.join(sorted(changed)[:5])}{' ...' * (len(changed) > 5)}")
    write(path, lambda file: file.write("\n".join(names).encode()))


@torch.no_grad()
def encode_images(ae, images, run, name, device, dtype):
    """Latents of every image, (N, 1 or 2, C, h, w): as it is and, with --flip, mirrored; and which rows are good, (N,).

    They are kept in OUT/latents_NAME.npy; an interrupted encoding goes on where it stopped, and another autoencoder, size
    or listing of files starts anew. Latents are float16 (to 1 part in 2000), pixels uint8.
    """
    ae = place(ae, device)                                     # channels-last: faster, but for training, where group norm is slower so
    digest = hashlib.sha256()
    for key, value in ae.state_dict().items():
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    digest.update(repr((images.fingerprint, images.size, run.flip)).encode())
    key, views = digest.hexdigest(), 2 if run.flip else 1
    side = images.size // ae.config.f
    shape = (len(images.names), views, ae.config.z_channels, side, side)
    path = os.path.join(run.out, f"latents_{name}.npy")
    notes_path = path[:-len(".npy")] + ".json"
    notes, cache = {"key": key, "done": 0, "bad": {}}, None
    try:
        with open(notes_path) as file:
            found = json.load(file)
        if found["key"] == key and found["done"]:
            cache, notes = np.lib.format.open_memmap(path, "r+"), found
    except (OSError, ValueError, KeyError):                    # none, or broken: encode anew
        pass
    if cache is None:
        report_changes(os.path.join(run.out, f"latents_{name}.txt"), images.names)
        try:
            cache = np.lib.format.open_memmap(path, "w+", shape=shape,
                                              dtype=np.uint8 if isinstance(ae, daes.Identity) else np.float16)
            reserve(path)
        except OSError as e:
            raise UserError(f"{path}: cannot be written ({e.strerror})") from None
    images.bad.update(notes["bad"])

    def save():
        cache.flush()
        write(notes_path, lambda file: file.write(json.dumps({**notes, "bad": images.bad}).encode()))

    pixels, threads = (64 ** 3 * 4, min(16, os.cpu_count() or 1)) if device.type == "cuda" else (64 ** 3, 1)
    batch, saved = max(1, min(64, pixels // images.size ** 2)), time.time()

    def read(start):
        rows = range(start, min(start + batch, shape[0]))
        return [(i, image) for i, image in zip(rows, readers.map(images.read, rows)) if image is not None]
    bar = tqdm(total=shape[0], initial=notes["done"], desc=f"encoding {name} images", unit="image",
               disable=notes["done"] >= shape[0])
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, notes["done"])
        while notes["done"] < shape[0]:
            good = ahead.result()
            ahead = reader.submit(read, notes["done"] + batch)
            if good:
                x = to_tensor([image for _, image in good]).to(device)
                with autocast(device, dtype):
                    h = torch.stack([ae.encode(v) for v in [x, x.flip(3)][:views]], dim=1).float().cpu().numpy()
                h = h.round() if cache.dtype == np.uint8 else h.astype(cache.dtype)
                for (i, _), row in zip(good, h):
                    if np.isfinite(row).all():
                        cache[i] = row
                    else:
                        images.bad[images.names[i]] = "the autoencoder's output is not finite"
            notes["done"] = min(notes["done"] + batch, shape[0])
            bar.update(notes["done"] - bar.n)
            if notes["done"] == shape[0] or time.time() > saved + 10 or run.asked:
                save()
                saved = time.time()
            if run.asked:
                raise Stopped(f"{run.asked[0]}: {notes['done']} of {shape[0]} {name} images are encoded")
    bar.close()
    good = np.array([n not in images.bad for n in images.names])
    if not good.any():
        raise UserError(f"no usable image among {len(good)}")
    if not good.all():
        say(f"{name} images: {len(good) - good.sum()} of {len(good)} are bad and were left out, named in {notes_path}")
    return cache, good


@dataclass
class Latents:
    """What stage two trains on: raw latents (N, views, C, h, w), labels and the rows to use."""
    h: np.ndarray
    labels: np.ndarray
    rows: np.ndarray

    def batch(self, indices, config, device, view=None):
        """Rows `indices` -> normalised x (B, C, h, w), clipped to +-4, and labels (B,) or None."""
        rows = self.rows[indices]
        view = np.zeros(len(rows), int) if view is None else view % self.h.shape[1]
        x = torch.from_numpy(self.h[rows, view].astype(np.float32)).to(device)
        x = ((x - config.shift) / config.scale).clamp(-4, 4)
        label = torch.from_numpy(self.labels[rows]).to(device) if config.num_classes else None
        return x, label


def read_latents(path):
    """An .npz with `latents` (N, C, H, W) and optional `labels` (N,) -> Latents."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if "latents" not in file:
                raise UserError(f"{path}: expected an array named latents, found {', '.join(file) or 'nothing'}")
            h = file["latents"]
            labels = file["labels"] if "labels" in file else None
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"{path}: cannot be read as .npz ({str(e).splitlines()[0]})") from None
    if h.ndim != 4 or h.dtype.kind not in "fiu" or not len(h) or h.shape[2] != h.shape[3]:
        raise UserError(f"{path}: latents are {h.dtype} {h.shape}, expected numbers (N, C, H, W) with H = W")
    if h.dtype.kind == "f" and (bad := int((~np.isfinite(h)).any((1, 2, 3)).sum())):
        raise UserError(f"{path}: {bad} of {len(h)} latents hold NaN or infinity")
    if labels is not None and (labels.shape != h.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0):
        raise UserError(f"{path}: labels are {labels.dtype} {labels.shape}, expected {len(h)} integers from 0")
    return Latents(h[:, None], None if labels is None else labels.astype(np.int64), np.arange(len(h)))


def measure(latents, config):
    """Shift and scale that make the training latents zero-mean and unit-variance, from up to 10,000 of them."""
    rows = latents.rows[:: max(1, len(latents.rows) // 10_000)]
    h = latents.h[rows, 0].astype(np.float32)
    std = float(h.std())
    if not std > 0:
        raise UserError("the latents are constant: nothing to learn (is the autoencoder trained?)")
    return replace(config, shift=float(h.mean()), scale=std)


# ---------------------------------------------------------------- stage two: the hierarchical VAE


def train_step(model, ema, optimizer, batches, step, device, dtype):
    """One update (Section 3): accumulate, skip if the gradient is out of bounds, Adam, EMA. Returns named statistics, the norm of
    the gradient and whether the step was skipped, all on the device.

    batches: config.accumulate pairs (x, label), this process's part of each batch. Gaussians and losses are fp32 whatever
    dtype the convs run in.
    """
    config = model.config
    set_lr(optimizer, config.lr * min(1, step / config.warmup) if config.warmup else config.lr)
    optimizer.zero_grad()
    total = None
    for x, label in batches:
        noise, lost = draw_noise(model, len(x), device)
        with autocast(device, dtype):
            out = model(x, label, noise, lost=lost)
        losses = lvae.objective(out, x, config)
        (losses.loss / len(batches)).backward()
        losses = lvae.Loss(*(t.detach() / len(batches) for t in losses))
        total = losses if total is None else lvae.Loss(*map(torch.add, total, losses))

    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    average(gradients)
    norm = torch.nn.utils.get_total_norm(gradients)
    limit = config.skip_threshold * config.data_channels * config.resolution ** 2 if step > 1000 else math.inf
    decay = min(config.ema, (1 + step) / (10 + step))          # warmed up, or early averages are mostly initialisation
    good = (norm.isfinite() & (norm <= on_device(limit, device))).reshape(())
    if device.type == "xla":
        update_unseen(good, optimizer, ema, model, decay)
    elif good:
        optimizer.step()
        update_ema(ema, model, 1 - decay)
    return total, norm, ~good


def on_device(value, device):
    """A number as a tensor (1,). XLA takes one of no dimensions for the constant of the same value, where the program has one:
    the step at which they agree would be another program."""
    return torch.tensor([value]).to(device)


def set_lr(optimizer, lr):
    """The learning rate is a number, or on XLA a tensor, where each new number would be a new program."""
    if torch.is_tensor(optimizer.param_groups[0]["lr"]):
        optimizer.param_groups[0]["lr"].copy_(torch.tensor([lr]))
    else:
        optimizer.param_groups[0]["lr"] = lr


@torch.no_grad()
def update_unseen(good, optimizer, ema, model, decay):
    """Adam and EMA where `good`, and everything as it was where not, without a look at it from the host: for XLA."""
    tensors = lambda: {id(t): t for t in [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]}
    before = {key: t.clone() for key, t in tensors().items()}
    optimizer.step()
    for key, t in tensors().items():
        t.copy_(torch.where(good, t, before.get(key, torch.zeros_like(t))))   # new ones, of the first step, began as 0
    update_ema(ema, model, torch.where(good, on_device(1 - decay, good.device), 0.0))


def draw_noise(model, n, device, alone=False):
    """The posterior's noise of n samples, L x (n, z, h, w), and who loses the label (n,). Every process draws that of all, and
    takes its part: a run is the same on any number of them. alone: for this process only. For XLA the host draws."""
    rank, count = (0, 1) if alone else world()
    mine = slice(rank * n, (rank + 1) * n)
    source = "cpu" if device.type == "xla" else device
    noise = [torch.randn(count * n, *shape, device=source)[mine].to(device) for shape in model.latent_shapes()]
    return noise, (torch.rand(count * n, device=source)[mine] < model.config.label_dropout).to(device)


@torch.no_grad()
def restore(optimizer, state):
    """Give an optimizer the moments in a state_dict of one, in its own parameters' memory format, which fused Adam takes for
    granted; learning rate and implementation stay this device's own."""
    optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            moments[name] = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value.clone()


@torch.no_grad()
def update_ema(ema, model, weight):
    """Move the average to the model by `weight`, a number or a tensor."""
    if torch.is_tensor(weight):
        for mine, current in zip(ema.parameters(), model.parameters()):
            mine.lerp_(current, weight)
    else:
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight)
    for mine, current in zip(ema.buffers(), model.buffers()):
        mine.copy_(current)


@torch.no_grad()
def evaluate(model, data, device, dtype):
    """Mean (distortion, rate) in nats per sample over `data`: the two terms of the negative ELBO. Repeatable."""
    config, sums, count = model.config, np.zeros(2), len(data.rows)
    seed_step(0, 0)
    for start in range(0, count, config.batch):
        x, label = data.batch(np.arange(start, min(start + config.batch, count)), config, device)
        noise, _ = draw_noise(model, len(x), device, alone=True)
        with autocast(device, dtype):
            out = model(x, label, noise)
        losses = lvae.objective(out, x, config)
        sums += len(x) * np.array([float(losses.distortion), float(losses.rate)])
    return sums / count


@torch.no_grad()
def save_pictures(model, ae, data, classes, step, run, device, dtype):
    """Sample grids (a row per class, unguided and guided) and reconstructions of held-out images, from EMA weights."""
    config, folder = model.config, os.path.join(run.out, "samples")

    def decode(x):
        with autocast(device, dtype):
            return to_uint8(torch.cat([ae.decode(part) for part in (x * config.scale + config.shift).split(16)]))
    x, x_label = data.batch(np.linspace(0, len(data.rows) - 1, 8).astype(int), config, device)
    low_res = lvae.shrink(x, config) if config.upsample else None
    rows = 1 if config.upsample else min(config.num_classes, 10) or 8
    label = torch.arange(rows, device=device).repeat_interleave(8) if config.num_classes else None
    names = [classes[i][:16] if i < len(classes) else str(i) for i in range(rows)] if config.num_classes else None
    guided = dict(mean_guidance=guidance_levels(config, 1.5), variance_guidance=1.0)
    for name, weights in [("", {}), ("_guided", guided)][:1 + (config.num_classes > 0 and config.hierarchical_prior)]:
        seed_step(0, 0)                                        # the same noise at every step, so that progress shows
        noise, _ = draw_noise(model, 8 * rows, device, alone=True)
        with autocast(device, dtype):
            images = decode(model.generate(noise, label, low_res=low_res, **weights))
        picture = grid([images[8 * r:8 * r + 8] for r in range(rows)], row_names=names)
        write(os.path.join(folder, f"{step:07d}{name}.png"), lambda f: picture.save(f, "png"))
    noise, _ = draw_noise(model, len(x), device, alone=True)
    with autocast(device, dtype):
        rec = model.generate(model.encode(x, x_label, noise, low_res=low_res), x_label, low_res=low_res)
    picture = grid([decode(x), decode(rec)], row_names=["encoded", "+ LVAE"])
    write(os.path.join(folder, f"{step:07d}_reconstructions.png"), lambda f: picture.save(f, "png"))


def guidance_levels(config, weight):
    """The paper's mean guidance: `weight` at every level but the 1x1 one, where it saturates colours (footnote 2)."""
    return [0.0 if side == 1 else weight for side in lvae.resolutions(config)[::-1]]


def train_lvae(config, ae, train, held, classes, state, newest, init, run, device, dtype):
    """Train the LVAE: on from the checkpoint `state` of this run (`newest`: OUT/checkpoint.pt itself), or else with the weights
    of another, `init`, or anew."""
    path = os.path.join(run.out, "checkpoint.pt")
    dataset = (state or init)["dataset"] if run.init else run.dataset         # what the model is: of ImageNet, say
    if state:
        compare_configs(asdict(state["config"]) | {"classes": state["classes"]}, asdict(config) | {"classes": classes}, path)
    seed_step(run.seed, 0)
    make = lambda: lvae.LVAE(config)
    model = (daes.fill(make, state["model"], path) if state else daes.fill(make, init["ema"], run.init) if init else make()).train()
    place(model, device)
    ema = copy.deepcopy(model).eval()
    how = dict(capturable=True, lr=on_device(config.lr, device)) if device.type == "xla" else dict(fused=True, lr=config.lr)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.9), **how)
    step, saved, skipped, row = 0, None, torch.zeros((), device=device), torch.zeros((), device=device)     # skipped: in all, in a row
    if state:
        ema.load_state_dict(state["ema"])
        restore(optimizer, state["optimizer"])
        step, skipped = state["step"], skipped + state["skipped"]
        saved = step if newest else None
        state.clear()                                          # lets go of the mapped file
        say(f"resuming {path} at step {step}")
    rank, count = world()
    if config.batch % count:
        raise UserError(f"--batch {config.batch} is shared by {count} processes: it must be a multiple of {count}")
    if rank == 0:
        trim_log(run.out, "lvae", step)
    board = tensorboard(run.out) if rank == 0 else None
    if run.compile == "auto":                                  # it takes minutes
        run.compile = "yes" if device.type == "cuda" and config.steps - step >= 500 else "no"
    if run.compile == "yes":
        model.forward = compiled(model.forward)
    describe(run, config, ae, train, held, device, dtype, sum(p.numel() for p in model.parameters()))

    def save():
        state = {"config": asdict(config), "step": step, "skipped": int(skipped), "run": run.origin, "classes": classes, "dataset": dataset,
                 "model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                 "dae": ae.state_dict() if ae else {}}
        save_checkpoint(path, on_host(state) if device.type == "xla" else state, saved, run.keep)

    if step == 0 and rank == 0:
        save()
        saved = step
    bits = lambda nats: round(float(lvae.bits_per_dim(nats, config)), 5)
    per_level = np.repeat(range(len(config.groups)), config.groups[::-1])    # level of each group, coarsest first
    bar = tqdm(total=config.steps, initial=step, desc="lvae", unit="step", disable=step >= config.steps or rank > 0)
    measured = config.steps - step >= 20 and device.type != "xla"            # the share of the device's peak: not worth it for less
    share = training_flops(config) / (count * matmul_rate(device, dtype)) if measured else None
    started, since = time.time(), step
    part = slice(rank * config.batch // count, (rank + 1) * config.batch // count)
    while step < config.steps:
        batches = []
        for micro in range(config.accumulate):
            number = step * config.accumulate + micro
            indices = batch_indices(run.seed, len(train.rows), config.batch, number)
            view = np.random.default_rng((run.seed, number)).integers(2, size=len(indices))
            batches.append(train.batch(indices[part], config, device, view[part]))
        step += 1
        seed_step(run.seed, step)
        losses, norm, skip = train_step(model, ema, optimizer, batches, step, device, dtype)
        skipped, row = skipped + skip, (row + 1) * skip
        if device.type == "xla":
            import_xla().sync()
        bar.update()
        last = step == config.steps
        logs = step % run.log_every == 0 or last
        looks = logs or device.type != "xla"                   # each look from the host at a result stops an XLA device
        if looks and int(row) >= 100:
            raise UserError(f"{int(row)} steps in a row skipped (gradient norm {float(norm):.3g}): training has diverged. Lower --lr, "
                            f"or raise --skip-threshold; {path} holds the last good state")
        stop = looks and bool(run.asked)
        if looks and count > 1:                                # all processes stop after the same step
            flag = torch.tensor(float(stop), device=device)
            average([flag])
            stop = bool(flag)
        if logs:
            average(losses)
        if logs and rank == 0:
            losses = lvae.Loss(*(t.cpu() for t in losses))
            rate = (step - since) * config.batch * config.accumulate / (time.time() - started)
            levels = [round(float(losses.kl[torch.from_numpy(per_level == i)].sum()), 3) for i in range(len(config.groups))]
            entry = dict(loss=round(float(losses.loss), 3), distortion=round(float(losses.distortion), 3),
                         distortion_bits=bits(losses.distortion), rate=round(float(losses.rate), 3), rate_bits=bits(losses.rate),
                         kl_levels=levels, spectral=round(float(losses.spectral), 3), grad_norm=round(float(norm), 3),
                         skipped=int(skipped), lr=float(optimizer.param_groups[0]["lr"]), images_per_s=round(rate, 1),
                         **({"mfu": round(rate * share, 4)} if measured else {}))
            bar.set_postfix(loss=entry["loss"], rate=entry["rate"], bits=bits(losses.distortion + losses.rate))
            write_log(run.out, stage="lvae", step=step, **entry)
            for name, value in entry.items():
                if board and name != "kl_levels":
                    board.add_scalar(name, value, step)
            started, since = time.time(), step
        if rank == 0 and len(held.rows) and (step % run.eval_every == 0 or last):
            before = time.time()
            distortion, rate = evaluate(ema, held, device, dtype)
            entry = dict(held_out_distortion=round(distortion, 3), held_out_rate=round(rate, 3),
                         held_out_nelbo_bits=bits(distortion + rate))
            write_log(run.out, stage="lvae", step=step, **entry)
            bar.write(f"step {step}: negative ELBO of {len(held.rows)} held-out images {entry['held_out_nelbo_bits']:.4f} bits/dim")
            if board:
                board.add_scalar("held_out_nelbo_bits", entry["held_out_nelbo_bits"], step)
            started += time.time() - before
        if rank == 0 and (step % run.save_every == 0 or last or stop):
            save()
            saved = step
        if stop and not last:
            raise Stopped(f"{run.asked[0] if run.asked else 'a signal'}: saved {path} at step {step}")
        if rank == 0 and ae is not None and (step % run.sample_every == 0 or last):
            before = time.time()
            save_pictures(ema, ae, held if len(held.rows) else train, classes, step, run, device, dtype)
            started += time.time() - before
    bar.close()
    barrier()
    say(f"done: {path} ({int(skipped)} of {step} steps skipped). Samples: python sample.py generate {path}")


def tensorboard(out):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(os.path.join(out, "tensorboard"))


def compare_configs(found, asked, path):
    """A run resumes with the configuration it began with; only the number of steps may differ."""
    for name in asked:
        if name != "steps" and found.get(name) != asked[name]:
            raise UserError(f"{path} was trained with {name} = {found.get(name)}, asked for {asked[name]}: "
                            "give the same options to resume, or another --out to start anew")


# ---------------------------------------------------------------- command line


@dataclass
class Run:
    """What a run reads and writes; the two stages' own options are lvae.Config and dae.Config."""
    dataset: str = lvae.knob("toy", "preset: " + ", ".join(lvae.PRESETS))
    data: str = lvae.knob("", "folder of images (sub-folders are classes), LSUN LMDB folder, or .npz of latents")
    init: str = lvae.knob("", "begin with the weights, configuration and autoencoder of a checkpoint or of a pipeline of the paper")
    dae: str = lvae.knob("", "first stage: FILE, a published one's name (kl-f8, vq-f4, ..: downloaded), 'train' to train one, "
                         "'none' to model pixels; empty: that of --init, or the preset's")
    dae_preset: str = lvae.knob("small-f4", "what --dae train trains: " + ", ".join(daes.PRESETS))
    out: str = lvae.knob("", "the run's folder; empty: runs/DATASET, or runs/ and the data folder's name")
    image_size: int = lvae.knob(0, "side of the square images in pixels; 0: the preset's")
    flip: bool = lvae.knob(False, "horizontal flips")
    val: str = lvae.knob("", "folder of held-out images; empty: a share of --data")
    holdout: float = lvae.knob(0.05, "share of --data held out (at most 2000 images), where there is no --val")
    seed: int = lvae.knob(0, "of initialisation, order and noise")
    device: str = lvae.knob("auto", "cuda, cuda:1, mps, cpu, xla, ...")
    precision: str = lvae.knob("auto", "bf16 or fp32; auto: bf16 where the device has units for it")
    compile: str = lvae.knob("auto", "yes or no: torch.compile the LVAE; auto: yes on CUDA, for 500 steps or more")
    log_every: int = lvae.knob(20, "steps between lines of log.jsonl")
    eval_every: int = lvae.knob(500, "steps between evaluations on held-out images")
    sample_every: int = lvae.knob(500, "steps between sample grids")
    save_every: int = lvae.knob(500, "steps between checkpoints")
    keep: int = lvae.knob(1, "earlier checkpoints that stay, as checkpoint-STEP.pt")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def number(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def parse(argv):
    """Command line -> Run, and the options given for the LVAE and for the DAE."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default="toy")
    first.add_argument("--dae-preset", default="small-f4")
    known, _ = first.parse_known_args(argv)
    for name, table in ((known.dataset, lvae.PRESETS), (known.dae_preset, daes.PRESETS)):
        if name not in table:
            raise UserError(f"no preset named {name!r}: choose from {', '.join(table)}")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    groups = (("run", "", Run()), (f"LVAE (defaults: {known.dataset})", "", lvae.PRESETS[known.dataset]),
              (f"autoencoder, with --dae train (defaults: {known.dae_preset})", "dae_", daes.PRESETS[known.dae_preset]))
    for title, prefix, defaults in groups:
        section = parser.add_argument_group(title)
        for f in fields(defaults):
            if f.name == "first_stage":                        # decided by --dae
                continue
            value = getattr(defaults, f.name)
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            options = dict(default=argparse.SUPPRESS, help=f"{f.metadata['help']} (default: {shown})".replace("%", "%%"))
            if isinstance(value, bool):
                options["action"] = argparse.BooleanOptionalAction
            elif isinstance(value, tuple):
                options |= dict(type=lambda text: tuple(number(v) for v in text.split(",") if v), metavar="A,B,..")
            else:
                options |= dict(type=type(value), metavar=type(value).__name__.upper())
            section.add_argument("--" + (prefix + f.name).replace("_", "-"), dest=title + prefix + f.name, **options)
    given = vars(parser.parse_args(argv))
    run, model, ae = ({k[len(title + prefix):]: v for k, v in given.items() if k.startswith(title + prefix)}
                      for title, prefix, _ in groups)
    return Run(**run), model, ae


def describe(run, config, ae, train, held, device, dtype, count):
    """The resolved configuration, once."""
    if world()[0]:
        return
    print(f"data        {run.data or 'toy scenes, drawn by code'}: {len(train.rows)} to train on, {len(held.rows)} held out, "
          f"{f'{config.num_classes} classes' if config.num_classes else 'unconditional'}")
    stage = "none: latents as given" if ae is None else "none: pixels" if isinstance(ae, daes.Identity) else (
        f"{run.dae}, f = {ae.config.f}, {sum(p.numel() for p in ae.parameters()):,} parameters")
    print(f"autoencoder {stage}; latents {config.data_channels}x{config.resolution}x{config.resolution}, "
          f"shift {config.shift:.4g}, scale {config.scale:.4g}")
    print(f"lvae        {count:,} parameters, effective batch {config.batch} x {config.accumulate}, {config.steps} steps")
    print(f"device      {device}, {world()[1]} process{'es' * (world()[1] > 1)}, convs in {str(dtype).split('.')[1]}, "
          f"{'' if run.compile == 'yes' else 'not '}compiled, {torch.get_num_threads()} threads")
    print("config      " + "  ".join(f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
                                     for k, v in asdict(config).items()), flush=True)


def missing_inputs(run, preset):
    """Raise one message for whatever a preset of the paper still needs, if anything."""
    steps = []
    name, address = SOURCES[run.dataset.split("-")[0]]
    if not run.data or not os.path.exists(run.data):
        what = f"--data {run.data}: not there. It" if run.data else "--data"
        steps.append(f"{what} must be {name}, unpacked: {address}")
    stage = preset.first_stage
    if run.dae and run.dae not in ("train", "none", *daes.ADDRESSES) and not os.path.exists(run.dae):
        steps.append(f"--dae {run.dae}: not there. It must be the autoencoder {stage}, which is downloaded if --dae is left out "
                     f"({daes.ADDRESSES[stage]})")
    if steps:
        raise UserError(f"--dataset {run.dataset} needs files of yours. " + ". ".join(steps))


def fit_levels(config, resolution):
    """The toy's config for data of another size: its finest level repeated, or left out, to fit."""
    levels = max(2, int(math.log2(resolution / 4)) + 2)
    lists = {name: getattr(config, name) for name in ("mult", "ffn", "groups", "encoder_layers", "attention_layers", "heads")}
    return dict(resolution=resolution, **{k: ((v[0],) * levels + v)[-levels:] for k, v in lists.items()})


def build_config(kind, base, options):
    try:
        return replace(base, **options) if base else kind(**options)
    except (ValueError, TypeError) as e:
        raise UserError(str(e)) from None


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k].cpu(), b[k].float()) for k in a)


def prepare_images(run, preset, model_options, dae_options, state, init, device, dtype):
    """Images -> (config, autoencoder, training Latents, held-out Latents, class names).

    The autoencoder is that of the checkpoint `state` when resuming, else the one asked for, trained here if need be.
    """
    if run.dae == "none":
        ae = daes.Identity()
    elif state:
        ae = daes.from_state(state["dae"], os.path.join(run.out, "checkpoint.pt")).to(device)
    elif run.dae == "init":
        if not init["dae"]:
            raise UserError(f"--init {run.init} holds no autoencoder: name one with --dae FILE")
        ae = daes.from_state(init["dae"], run.init).to(device)
    elif run.dae == "train":
        ae = None
        dae_config = build_config(daes.Config, daes.PRESETS[run.dae_preset], dae_options)
        if dae_config.codebook:
            raise UserError(f"--dae train trains KL autoencoders; {run.dae_preset} is a VQ one: choose a kl- preset, "
                            "or pass --dae-codebook 0")
    else:
        ae = daes.load(run.dae).to(device)
    stage = ae.config if ae else dae_config

    own = run.dataset == "toy" and not run.init                # data of the user's own: the config follows the data
    size = run.image_size or preset.resolution * stage.f
    resolution = size // stage.f
    if size % stage.f or resolution < 4 or resolution & (resolution - 1):
        raise UserError(f"--image-size {size} does not fit: with an autoencoder of f = {stage.f} it must be one of "
                        f"{', '.join(str(stage.f * r) for r in (4, 8, 16, 32, 64, 128))} ...")
    images = open_images(run.data, size) if run.data else toy_images(size)
    options = dict(first_stage=run.dae if run.dae in ("none", "train", *daes.ADDRESSES) else "file" if own else preset.first_stage)
    foreign = init and init["dae"] and ae and not same_weights(ae.state_dict(), init["dae"])
    if run.dae == "train" or foreign:
        options["scale"] = 0.0                                 # a preset's constants are those of its own autoencoder
    if own:
        options |= dict(fit_levels(preset, resolution), data_channels=stage.z_channels, num_classes=len(images.classes))
        if run.dae == "none":
            options |= dict(shift=127.5, scale=127.5)
    config = build_config(lvae.Config, preset, options | model_options)
    if (config.resolution, config.data_channels) != (resolution, stage.z_channels):
        raise UserError(f"latents are {stage.z_channels}x{resolution}x{resolution} ({size} pixels, f = {stage.f}), "
                        f"the config is for {config.data_channels}x{config.resolution}x{config.resolution}")
    begun = state or init
    if config.num_classes and run.init and begun["classes"]:   # the model's classes, by name
        if not images.classes or (strange := sorted(set(images.classes) - set(begun["classes"]))):
            raise UserError(f"{run.data}: its classes (sub-folders) must be those of --init {run.init}, "
                            + (f"{strange[0]} is not" if images.classes else "it has none"))
        images.labels = np.array([begun["classes"].index(c) for c in images.classes])[images.labels]
        images.classes = begun["classes"]
    if config.num_classes and run.init and len(images.classes) != config.num_classes:
        raise UserError(f"{run.data or 'the toy data'} has {len(images.classes)} classes (sub-folders), the model of --init {run.init} "
                        f"has {config.num_classes} without names: they cannot be matched")
    if config.num_classes and (not images.classes or len(images.classes) > config.num_classes):
        raise UserError(f"{run.data or 'the toy data'} has {len(images.classes)} classes (sub-folders), which does not fit "
                        f"num_classes = {config.num_classes}: pass --num-classes {len(images.classes)}")

    if run.val:
        val = open_images(run.val, size)
        if config.num_classes and (strange := sorted(set(val.classes) - set(images.classes)) or not val.classes):
            raise UserError(f"--val {run.val}: its sub-folders must be classes of --data"
                            + (f", {strange[0]} is not" if strange is not True else ""))
        lookup = np.array([images.classes.index(c) for c in val.classes if c in images.classes] or [0])
        val.labels = lookup[val.labels] if config.num_classes else val.labels
        train_rows, held_rows = np.arange(len(images.names)), np.arange(len(val.names))
    else:
        val = images
        train_rows, held_rows = split(len(images.names), run.holdout)

    run.lock = claim(run.out) if world()[0] == 0 else None     # only now: what was asked for fits
    if world()[0]:
        barrier(run.asked)                                     # until the first process has trained and encoded
    if ae is None:
        say(f"autoencoder {run.dae_preset}: f = {dae_config.f}, batch {dae_config.batch}, {dae_config.steps} steps on "
            f"{len(train_rows)} images of {size}x{size}, {device}, convs in {str(dtype).split('.')[1]}")
        host = torch.device("cpu") if device.type == "xla" else device        # its loop looks at every step's loss
        ae = train_dae(images, train_rows, dae_config, run, host, pick_dtype(host, run.precision))
    h, good = encode_images(ae, images, run, "train", device, dtype)
    train = Latents(h, images.labels, train_rows[good[train_rows]])
    if val is not images:
        h, good = encode_images(ae, val, run, "val", device, dtype)
    if world()[0] == 0:
        barrier()
    held = Latents(h, val.labels, held_rows[good[held_rows]])
    return config, ae, train, held, images.classes if config.num_classes else []


def prepare_latents(run, preset, model_options, begun, device):
    """An .npz of latents -> the same as prepare_images; the autoencoder is that of --dae FILE or of the
    checkpoint `begun` that the run goes on from, or None."""
    if run.dae in ("train", "none") or run.flip or run.val or run.image_size:
        raise UserError(f"{run.data}: latents are taken as they are; --dae FILE only decodes samples, and --flip, --val and "
                        "--image-size are for images")
    data = read_latents(run.data)
    channels, side = data.h.shape[2:4]
    if side < 4 or side & (side - 1):
        raise UserError(f"{run.data}: latents are {side}x{side}; the side must be 4, 8, 16, 32, ...")
    options = dict(first_stage="latents")
    if run.dataset == "toy" and not run.init:
        options |= dict(fit_levels(preset, side), data_channels=channels,
                        num_classes=0 if data.labels is None else int(data.labels.max()) + 1)
    config = build_config(lvae.Config, preset, options | model_options)
    if (config.data_channels, config.resolution) != (channels, side):
        raise UserError(f"{run.data}: latents are {channels}x{side}x{side}, the config is for "
                        f"{config.data_channels}x{config.resolution}x{config.resolution}")
    if config.num_classes and (data.labels is None or data.labels.max() >= config.num_classes):
        raise UserError(f"{run.data}: " + ("no labels, but" if data.labels is None else f"label {data.labels.max()} is out of "
                        f"range:") + f" num_classes = {config.num_classes}")
    train_rows, held_rows = split(len(data.rows), run.holdout)
    ae = daes.load(run.dae) if run.dae else daes.from_state(begun["dae"], run.init) if begun and begun["dae"] else None
    ae = ae and ae.to(device)
    run.lock = claim(run.out) if world()[0] == 0 else None
    return config, ae, replace(data, rows=train_rows), replace(data, rows=held_rows), []


def replica(index, argv):
    """What torch_xla.launch starts."""
    main(argv, launched=True)


def main(argv=None, launched=False):
    run, model_options, dae_options = parse(sys.argv[1:] if argv is None else argv)
    if run.device == "xla" and not launched:                   # a process for each device
        import_xla().launch(replica, args=(sys.argv[1:] if argv is None else argv,))
        return
    with signals() as run.asked:
        try:
            train_both(run, model_options, dae_options)
        except Stopped as e:
            say(f"\n{e}. The same command goes on from there.")


def train_both(run, model_options, dae_options):
    """The two stages of a run, or what is left of them."""
    preset = lvae.PRESETS[run.dataset]
    latents = run.data.endswith(".npz")
    if not run.dataset.startswith("toy") and not latents:
        missing_inputs(run, preset)
    name = os.path.basename(os.path.abspath(run.data)).removesuffix(".npz") if run.data else run.dataset
    run.out = run.out or os.path.join("runs", name if run.dataset == "toy" else run.dataset)
    for ok, message in [
            (run.precision in ("auto", "bf16", "fp32"), f"--precision is auto, bf16 or fp32, not {run.precision}"),
            (run.compile in ("auto", "yes", "no"), f"--compile is auto, yes or no, not {run.compile}"),
            (0 <= run.holdout < 1, f"--holdout is a fraction from 0 up to 1, not {run.holdout}"),
            (run.seed >= 0, f"--seed may not be negative: {run.seed}"),
            (run.keep >= 0, f"--keep may not be negative: {run.keep}"),
            (min(run.log_every, run.eval_every, run.sample_every, run.save_every) > 0, "--...-every counts steps, from 1 up")]:
        if not ok:
            raise UserError(message)
    device = pick_device(run.device)
    if device.type == "xla" and model_options.get("recompute"):
        raise UserError("--recompute is not for XLA devices")
    if device.type == "xla" and run.compile == "yes":
        raise UserError("--compile is not for XLA devices, which compile by themselves")
    join(device)
    dtype = pick_dtype(device, run.precision)
    path = os.path.join(run.out, "checkpoint.pt")
    state, newest = load_newest(path, load_checkpoint)
    init = load_checkpoint(run.init) if run.init and not state else None
    if run.init:                                               # the configuration is the file's
        preset = (state or init)["config"]
        if run.dataset != "toy" and (found := (state or init)["dataset"]) != run.dataset:
            raise UserError(f"--init {run.init}: a model of {found}, not of {run.dataset}")
    run.dae = run.dae or ("" if latents else "init" if run.init and preset.first_stage != "none" else preset.first_stage)
    if dae_options and run.dae != "train":
        raise UserError("--dae-... options are for --dae train")
    # What a run is, beside its two configurations: kept with it, so that only the same command resumes it.
    run.origin = {name: getattr(run, name) for name in ("dataset", "data", "val", "holdout", "init", "dae", "image_size", "flip", "seed")}
    run.origin["dae_options"] = dae_options
    if state:
        compare_configs(state.get("run", {}), run.origin, path)

    if latents:
        config, ae, train, held, classes = prepare_latents(run, preset, model_options, state or init, device)
    else:
        config, ae, train, held, classes = prepare_images(run, preset, model_options, dae_options, state, init, device, dtype)
    if not len(train.rows):
        raise UserError("nothing to train on: every image is bad or held out")
    if not config.scale:                                       # measured once, then part of the run
        config = (replace(config, shift=state["config"].shift, scale=state["config"].scale) if state else measure(train, config))
    train_lvae(config, ae, train, held, classes, state, newest, init, run, device, dtype)


def cli(main):
    """Run a command; a user's mistake is one line and exit code 2."""
    try:
        main()
    except (UserError, daes.LoadError) as e:
        print(f"error: {e}", file=sys.stderr)
    except OSError as e:                                       # a full disk, an unwritable folder
        print(f"error: {e.filename or ''}: {e.strerror or e}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from the last save", file=sys.stderr)
        sys.exit(130)
    else:
        return
    sys.exit(2)


if __name__ == "__main__":
    cli(main)
