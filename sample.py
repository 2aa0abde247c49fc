"""Look at a trained model: a sub-command per figure and table of the paper. CKPT is a checkpoint.

    python sample.py generate imagenet --label tench                     # the authors' weights, downloaded
    python sample.py generate CKPT --label castle --n 16 --mean-guidance 0,1.5,1.5,1.5 --variance-guidance 1
    python sample.py generate CKPT --n 50000 --npz samples.npz           # for the guided-diffusion evaluator
    python sample.py generate RGB16 --upsampler UPSAMPLER                # the upsampling stack of Table 1
    python sample.py reconstruct CKPT photo.jpg folder/ --groups 2,6     # originals above reconstructions
    python sample.py manifold CKPT                                       # Figure 4
    python sample.py interpolate CKPT a.jpg b.jpg                        # Figure 5
    python sample.py outpaint CKPT photo.jpg --width 2                   # Figure 6
    python sample.py neighbors CKPT --data photos/                       # Figure 8
    python sample.py rates CKPT --data photos/                           # what every latent group holds
    python sample.py evaluate CKPT --reference photos/ --features NET    # Table 3: FID, IS, precision, recall
    python sample.py bench CKPT                                          # Table 4: seconds per 1000 images

A sample depends on its seed, number and label, not on its batch. Guidance (Eq. 2) is 0 when off.
Reads downwards: the model, then a function per command, the metrics before the command that uses them.
"""
import argparse
import contextlib
import copy
import itertools
import math
import os
import sys
import time
import zipfile
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import dae as daes
import lvae
from dae import at_least, cli, require, to_tensor, to_uint8
from train import (asked_to_stop, autoencoder_of, image_files, list_images, load_checkpoint, open_images,
                   place, relabel, save_picture, say, setup, world)

# ---------------------------------------------------------------- the model
class Sampler:
    """A checkpoint's EMA weights and autoencoder on a device: noise or images in, uint8 images out."""
    def __init__(self, path, device="auto", precision="auto", dae=None, upsampler=None, state=None):
        """dae: a file, instead of the checkpoint's own; upsampler: a checkpoint; state: what is in `path`."""
        state = state or load_checkpoint(path)
        self.device, self.dtype = setup(device, precision)
        self.config, self.dataset, self.data = state["config"], state["dataset"], state["run"].get("data")
        self.folders = self.classes = state["classes"]         # the names of the folders that it learned from
        synsets = all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in self.folders)
        if self.config.num_classes == 1000 and synsets and (self.folders or self.dataset == "imagenet"):
            names = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "imagenet_classes.txt")
            with open(names, encoding="utf-8") as file:
                self.classes = file.read().splitlines()
        self.model = daes.fill(lambda: lvae.LVAE(self.config), state["ema"], path)
        place(self.model, self.device, self.dtype).requires_grad_(False)
        self.dae = daes.load(dae) if dae else autoencoder_of(state, path)
        require(self.dae, f"{path} holds no autoencoder: name one with --dae FILE")
        fits = self.dae.config.z_channels == self.config.data_channels
        require(fits, f"{path} does not fit its autoencoder of {self.dae.config.z_channels} channels: --dae")
        place(self.dae, self.device, self.dtype).requires_grad_(False)
        self.compiled = False
        self.space = "pixels" if isinstance(self.dae, daes.Identity) else "the autoencoder's latents"
        self.sides = self.model.sides                          # of the levels, coarsest first
        self.can_guide = bool(self.config.num_classes and self.config.hierarchical_prior)
        self.size = self.config.resolution * self.dae.config.f               # of the images, in pixels
        self.upsampler = Sampler(upsampler, device, precision) if upsampler else None
        self.out_size = self.upsampler.size if upsampler else self.size      # of what `draw` gives
        fits = not upsampler or self.size * self.upsampler.config.upsample == self.out_size
        require(fits, f"--upsampler {upsampler}: not an upsampler of images of {self.size} pixels")

    def compile(self):
        """Compile what generates, for one size of batch and one setting of guidance: it takes minutes."""
        self.compiled = True
        self.model.generate, self.dae.decode = compiled(self.model.generate), compiled(self.dae.decode)
        if self.upsampler:
            self.upsampler.compile()

    def noise(self, seed, numbers, size=None):
        """Whitened noise of samples `numbers`, a list of (B, z, h, w), top-down; a stream each."""
        streams = [np.random.default_rng((*np.atleast_1d(seed), int(number))) for number in numbers]
        shapes = self.model.latent_shapes(size)
        drawn = [np.stack([s.standard_normal(shape, np.float32) for s in streams]) for shape in shapes]
        return [torch.from_numpy(eps).to(self.device) for eps in drawn]

    def means(self, n):
        """The posterior's eps that give its means: zeros, a list of (n, z, h, w)."""
        return [torch.zeros(n, *shape, device=self.device) for shape in self.model.latent_shapes()]

    def draw(self, seed, numbers, label, **guidance):
        """Samples `numbers` of a seed, with labels (B,) or None -> uint8 (B, H, W, 3)."""
        images, up = self.images(self.noise(seed, numbers), label, **guidance), self.upsampler
        if up:
            label = label if up.config.num_classes else None
            images = up.images(up.noise((seed, 1), numbers), label, low_res=up.latents(images))
        return images

    @torch.no_grad()
    def images(self, noise, label, **options):
        """Noise, and labels (B,) or None -> uint8 images (B, H, W, 3). options: those of LVAE.generate."""
        with lvae.autocast(self.device, self.dtype):
            return self.decode(self.model.generate(noise, label, **options))

    @torch.no_grad()
    def decode(self, x):
        """Latents (B, C, h, w) -> uint8 images (B, H, W, 3), a few at a time: they take memory."""
        # A CPU is fastest at what fits its caches: one image.
        pixels = {"cpu": 1, "cuda": 16}.get(self.device.type, 4) * 256 ** 2
        parts = x.split(max(1, pixels // (x.shape[2] * x.shape[3] * self.dae.config.f ** 2)))
        with lvae.autocast(self.device, self.dtype):
            images = [to_uint8(self.dae.decode(lvae.denormalise(part, self.config))) for part in parts]
        return np.concatenate(images)

    @torch.no_grad()
    def latents(self, images):
        """uint8 (B, H, W, 3) -> normalised latents (B, C, h, w)."""
        with lvae.autocast(self.device, self.dtype):
            return lvae.normalise(self.dae.encode(to_tensor(images).to(self.device)), self.config)

    @torch.no_grad()
    def infer(self, x, label, draw=False):
        """Latents x (B, C, h, w) -> the model's Output, of the posterior's means or of a draw from it."""
        with lvae.autocast(self.device, self.dtype):
            return self.model(x, label, None if draw else self.means(len(x)))

    def posterior(self, x, label, low_res=None):
        """Latents x (B, C, h, w) -> the whitened noise of the posterior's means, a list of (B, z, h, w)."""
        with lvae.autocast(self.device, self.dtype):
            return self.model.encode(x, label, self.means(len(x)), low_res)

    def known(self):
        """Names and numbers of classes, in lower case or as they are -> the class. 'none' is no label."""
        count = self.config.num_classes
        known = {str(i): i for i in range(count)} | ({"none": count} if count else {})
        for names in (self.classes, self.folders):
            known |= {names[i].strip().lower(): i for i in reversed(range(min(count, len(names))))}
        return known | {name: i for i, name in enumerate(self.folders[:count])}

    def label(self, text):
        """A class by its name, a unique beginning of it, or its number; 'none': no label. ValueError."""
        known = self.known()
        text = text if text in known else text.strip().lower()
        found = {known[text]} if text in known else {known[name] for name in known if name.startswith(text)}
        if len(found) != 1 or not text:
            names = [name for i, name in enumerate(self.classes) if i in found] or self.classes
            problem = "fits several classes" if found else "no such class" if known else "no model of classes"
            raise ValueError(f"--label {text}: {problem}; expected 0 to {self.config.num_classes - 1}, none, "
                             f"{', '.join(names[:20])} ..")
        return found.pop()

    def labels(self, text):
        """Classes by commas, as for `label`; a name that has commas itself is found first. ValueError."""
        words, labels, known = text.split(","), [], self.known()
        while words:
            for n in range(len(words), 0, -1):
                name = ",".join(words[:n])
                if n == 1 or {name, name.strip().lower()} & known.keys():
                    break
            labels.append(self.label(name))
            words = words[n:]
        return labels

    def name(self, label):
        """What a class is called in a picture."""
        names = dict(enumerate(self.classes)) | {self.config.num_classes: "no label"}
        return names.get(label, str(label))[:20]

    def likeliest(self, x):
        """The class for which the latents x (1, C, h, w) cost the fewest nats."""
        x = x.expand(self.config.num_classes, -1, -1, -1)
        out = self.infer(x, torch.arange(len(x), device=self.device))
        return int((lvae.distortions(out, x, self.config) + out.kl.sum(0)).argmin())

def compiled(function):
    """torch.compile(function), which gives a tensor, for inputs of one size, as a CUDA graph."""
    fast = torch.compile(function, dynamic=False, mode="reduce-overhead")

    def call(*inputs, **options):
        torch.compiler.cudagraph_mark_step_begin()
        return fast(*inputs, **options).clone()                # the graph's next run writes over what it gave
    return call

def make_sampler(args, upsamples=False):
    """The sampler of the command line. upsamples: the command can use a model that only enlarges images."""
    sampler = Sampler(args.source, args.device, args.precision, args.dae, getattr(args, "upsampler", None))
    alone = upsamples or not sampler.config.upsample
    require(alone, f"{args.source} is an upsampler, which draws nothing alone: pass it as --upsampler")
    set_up(sampler, args, many=args.command in ("generate", "evaluate") and (args.n or 0) >= 1000)
    return sampler

def set_up(sampler, args, many):
    """Compile if asked to, or on CUDA if there are `many` images to make; print what the sampler runs on."""
    cuda = sampler.device.type == "cuda"
    if args.compile or args.compile is None and many and cuda:
        sampler.compile()
    if world()[0] == 0:
        kind = torch.cuda.get_device_name() if cuda else sampler.device
        print(f"{args.command}: on {kind}, {torch.get_num_threads()} threads, convs in "
              f"{str(sampler.dtype)[6:]}, {'' if sampler.compiled else 'not '}compiled", flush=True)

def guidance_settings(sampler, args):
    """What is asked for of guidance and temperature, as arguments of `generate`; for ImageNet the paper's."""
    means, variances = args.mean_guidance or [0.0], args.variance_guidance or [0.0]
    given = args.mean_guidance or args.variance_guidance or args.label == "none"
    if sampler.dataset == "imagenet" and sampler.can_guide and not given:
        means, variances = [lvae.guidance_levels(sampler.config, 1.5)], [3.0]
    for weights in map(np.atleast_1d, means + variances):
        fits = len(weights) in (1, len(sampler.sides))
        require(fits, f"guidance takes a number, or one per level: {sampler.sides}")
        require(sampler.can_guide and args.label != "none" or not weights.any(),
                "guidance needs a class-conditional model, a hierarchical prior, and a label")
    names = ("mean_guidance", "variance_guidance", "temperature")
    return [dict(zip(names, values)) for values in itertools.product(means, variances, args.temperature)]

def even_labels(sampler, text, n, some=None):
    """n labels, as even as can be over the classes that `text` names (None: `some`, or all), in order."""
    classes = sampler.labels(text) if text else some or range(sampler.config.num_classes)
    return np.array(classes)[np.sort(np.arange(n) % len(classes))] if classes else None

def pick(sampler, labels, rows):
    """Labels (N,) of the host, or None -> those of `rows` on the device, (B,), or None."""
    return None if labels is None else torch.from_numpy(labels[rows]).to(sampler.device)

# ---------------------------------------------------------------- images in, pictures out
def save_grid(path, rows, smallest=128, **names):
    """Save a grid; images smaller than `smallest` pixels are enlarged by a whole factor."""
    scale = max(1, -(-smallest // min(image.shape[0] for row in rows for image in row)))
    save_picture(path, [[image.repeat(scale, 0).repeat(scale, 1) for image in row] for row in rows], **names)

def folder_of(path):
    """The name of the folder that a file is in."""
    return os.path.basename(os.path.dirname(os.path.abspath(path)))

def read_photos(sampler, paths, text=None, needed=1):
    """Image files and folders -> uint8 images, their latents (B, C, h, w), labels (B,) or None; no bad files.
    The label is what `text` names, or the image's folder if a class is called so, or the likeliest."""
    files = [[os.path.join(path, name) for name, *_ in list_images(path)] if os.path.isdir(path) else [path]
             for path in paths]
    photos, count = image_files(list(itertools.chain(*files)), sampler.size), sampler.config.num_classes
    good = [(name, image) for i, name in enumerate(photos.names) if (image := photos.read(i)) is not None]
    require(len(good) >= needed, f"no usable image, or too few: {len(good)}, expected {needed} or more")
    images, labels = [image for _, image in good], []
    x = torch.cat([sampler.latents(images[i:i + 4]) for i in range(0, len(images), 4)])
    for i, (name, _) in enumerate(good if count else ()):
        known = text or (folder_of(name) if folder_of(name) in sampler.folders else None)
        unknown = sampler.likeliest(x[i:i + 1]) if not known and count <= 100 else count
        labels.append(sampler.label(known) if known else unknown)
    if count in labels and not text:                           # of more than 100 it is too slow to try each
        say("no class known for some images, they get none: --label NAME says it")
    return images, x, torch.tensor(labels, device=sampler.device) if count else None

def find_images(sampler, path):
    """The images of --data, or of the data that the model was trained on."""
    path = sampler.data if path is None else path
    require(path is not None, "name a folder of images with --data ('toy' is the built-in scenes)")
    return open_images(path, sampler.out_size)

def batches(images, batch, limit=None):
    """(Indices, uint8 images) of every batch of good images, or of `limit` of them, evenly spaced."""
    count, found = len(images.names), 0
    rows = np.unique(np.linspace(0, count - 1, min(limit or count, count)).round().astype(int))
    for start in tqdm(range(0, len(rows), batch), desc="images", unit="batch", disable=len(rows) <= batch):
        good = {i: image for i in rows[start:start + batch] if (image := images.read(i)) is not None}
        found += len(good)
        if good:
            yield np.array(list(good)), list(good.values())
    require(found, "no usable image")

def encoded(sampler, args, limit):
    """(Latents (B, C, h, w), labels (B,) or None) of batches of `limit` images of --data. Their classes are
    the sub-folders, or the one folder that all are in; a model that knows no names takes them in order."""
    images, labels, count = find_images(sampler, args.data), None, sampler.config.num_classes
    if count:
        parents = sorted({folder_of(name) for name in images.names})
        if not images.classes and len(parents) == 1:
            images.classes = parents
        if sampler.folders or not 0 < len(images.classes) <= count:
            relabel(images, sampler.folders, "the images")
        labels = images.labels
    for rows, some in batches(images, args.batch, limit):
        yield sampler.latents(some), pick(sampler, labels, rows)

# ---------------------------------------------------------------- generate
GRID = 256  # images in a grid at most

def generate(args):
    """Draw samples: a grid to look at, an .npz for metrics, or a folder of PNGs."""
    if args.png_dir:
        os.makedirs(args.png_dir, exist_ok=True)               # refused before the work
    sampler = make_sampler(args)
    weights, = guidance_settings(sampler, args)
    classes = sampler.labels(args.label) if args.label else range(min(sampler.config.num_classes, 10))
    n = args.n or 8 * min(len(classes), 10) or 16
    labels = even_labels(sampler, args.label, n, None if args.n else classes)
    out = args.out or (None if args.npz or args.png_dir else "samples.png")
    # In the .npz the classes are shuffled: the Inception Score is taken over consecutive parts.
    position = np.random.default_rng(args.seed).permutation(n) if args.npz else np.arange(n)
    kept = n if args.npz else min(n, GRID) if out else 1
    shape = (kept, sampler.out_size, sampler.out_size, 3)
    with shared_array(f"{args.npz or out or args.png_dir}.images.tmp", shape) as array:
        for numbers, images in draw_all(sampler, args, n, labels, weights):
            for number, image in zip(numbers, images):
                if position[number] < len(array):
                    array[position[number]] = image
                if args.png_dir:
                    save_grid(os.path.join(args.png_dir, f"{number:06d}.png"), [[image]], smallest=1, gap=0)
        asked_to_stop()                                        # all processes wait here
        if world()[0]:
            return
        if args.npz:
            arrays = {"arr_0": array} | ({} if labels is None else {"arr_1": labels[np.argsort(position)]})
            daes.write(args.npz, lambda file: np.savez(file, **arrays))
        if out:
            save_samples(sampler, out, [np.array(array[at]) for at in position[:GRID]], labels)
    say(f"{n} samples of {shape[1]}x{shape[2]} pixels: "
        + " ".join(filter(None, (args.npz, out, args.png_dir))))

def draw_all(sampler, args, n, labels, weights):
    """(Numbers, uint8 images) of every batch of samples 0 .. n - 1; under torchrun, of a share."""
    rank, count = world()
    starts = range(0, n, args.batch)[rank::count]
    for start in tqdm(starts, desc="sampling", unit="batch", disable=n <= args.batch or rank > 0):
        numbers = drawn = np.arange(start, min(start + args.batch, n))
        if sampler.compiled:                                   # for batches of one size
            drawn = np.resize(numbers, min(n, args.batch))
        images = sampler.draw(args.seed, drawn, pick(sampler, labels, drawn), **weights)
        yield numbers, images[:len(numbers)]

@contextlib.contextmanager
def shared_array(path, shape):
    """An array of uint8 in a temporary file: several processes fill it, and it may be larger than memory."""
    try:
        if world()[0] == 0:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            np.lib.format.open_memmap(path, "w+", np.uint8, shape)
            if hasattr(os, "posix_fallocate"):                 # a full disk is an error now, no crash later
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
        asked_to_stop()                                        # the others wait until it is there
        yield np.lib.format.open_memmap(path, "r+")
    finally:
        if world()[0] == 0 and os.path.exists(path):
            os.remove(path)

def save_samples(sampler, path, images, labels):
    """The grid of samples: a row per class, or a square of one class."""
    classes = [] if labels is None else list(dict.fromkeys(labels[:len(images)].tolist()))
    columns = math.ceil(math.sqrt(len(images)))
    rows, names = [images[i:i + columns] for i in range(0, len(images), columns)], None
    if len(classes) > 1:
        rows = [[image for image, label in zip(images, labels) if label == c] for c in classes]
        names = [sampler.name(c) for c in classes]
    save_grid(path, rows, row_names=names)

# ---------------------------------------------------------------- manipulation (Section 5)
def psnr(a, b):
    """Peak signal-to-noise ratio of uint8 images, in dB."""
    return 10 * np.log10(255 ** 2 / max(np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2), 1e-9))

def reconstruct(args):
    """Images, what the autoencoder alone and with the LVAE make of them, and what its first k groups say."""
    sampler = make_sampler(args, upsamples=True)
    originals, x, label = read_photos(sampler, args.images, args.label)
    total = sum(sampler.config.groups)
    require(max(args.groups, default=0) <= total, f"--groups: this model has {total} latent groups")
    rows = {"original": originals, "autoencoder": [], "+ LVAE": []}
    rows |= {f"first {k} of {total}": [] for k in args.groups}
    for numbers in torch.arange(len(x)).split(args.batch):
        part, some = x[numbers], None if label is None else label[numbers]
        low_res = lvae.shrink(part, sampler.config) if sampler.config.upsample else None
        noise, drawn = sampler.posterior(part, some, low_res), sampler.noise(args.seed, numbers)
        rows["autoencoder"].extend(sampler.decode(part))
        for name, k in zip(list(rows)[2:], [total, *args.groups]):             # the other groups are drawn
            rows[name].extend(sampler.images(noise[:k] + drawn[k:], some, low_res=low_res))
    if sampler.space == "pixels":
        del rows["autoencoder"]
    save_grid(args.out, list(rows.values()), row_names=list(rows))
    say(f"{args.out}: {len(originals)} images, PSNR of + LVAE {psnr(originals, rows['+ LVAE']):.2f} dB")

def interpolate(args):
    """Figure 5: a path from one image to another through whitened noise. The ends are their reconstructions.

    With a standard-normal prior the noise is the latent code; with a hierarchical one it is the
    reparameterisation that Section 5.2 leaves to future work. The label's embedding moves along.
    """
    sampler = make_sampler(args)
    originals, x, label = read_photos(sampler, [args.a, args.b], args.label, needed=2)
    ends, steps, images = sampler.posterior(x, label), torch.linspace(0, 1, args.steps, device=x.device), []
    if label is not None:
        ends.append(sampler.model.embedding(label))            # (2, label_dim)
    for part in steps.split(args.batch):
        mixed = [torch.stack([torch.lerp(end[0], end[1], t) for t in part]) for end in ends]
        embedded = None if label is None else mixed.pop()
        images.extend(sampler.images(mixed, embedded))
    names = ["A", *(f"{float(t):.2f}" for t in steps), "B"]
    save_grid(args.out, [[originals[0], *images, originals[1]]], column_names=names)
    say(f"{args.out}: A, {args.steps} steps, B; PSNR of the ends {psnr(originals[0], images[0]):.2f} and "
        f"{psnr(originals[1], images[-1]):.2f} dB")

def channel_kl(out):
    """Mean KL of every latent group's channels in an Output: (L, z) nats, summed over positions."""
    return torch.stack([lvae.gaussian_kl(l.posterior, l.prior).sum((2, 3)).mean(0) for l in out.latents])

@torch.no_grad()
def prior_samples(sampler, args, label):
    """(x (B, C, h, w), labels (B,) or None) of batches of 128 samples of a class."""
    for numbers in torch.arange(128).split(args.batch):
        some = None if label is None else torch.full((len(numbers),), label, device=sampler.device)
        with lvae.autocast(sampler.device, sampler.dtype):
            x = sampler.model.generate(sampler.noise(args.seed, numbers), some)
        yield x, some

def manifold(args):
    """Figure 4: the most active channel of the first group and of the second, swept from -range to range."""
    sampler = make_sampler(args)
    require(sampler.sides[0] == 1 < sampler.config.groups[-1], "this model has no two latent groups at 1x1")
    label = sampler.label(args.label or "0") if sampler.config.num_classes else None
    torch.manual_seed(args.seed)
    parts = prior_samples(sampler, args, label) if args.data is None else encoded(sampler, args, 256)
    kl = sum(len(x) * channel_kl(sampler.infer(x, some, draw=True)) for x, some in parts)[:2]        # (2, z)
    (across, down), share = kl.argmax(1).tolist(), kl.amax(1) / kl.sum(1).clamp_min(1e-9)
    values = torch.linspace(-args.range, args.range, args.steps, device=sampler.device)
    fixed, rows = sampler.noise(args.seed, [0]), []
    for value in values:
        noise, row = [eps.repeat(args.steps, 1, 1, 1) for eps in fixed], []
        noise[0][:, across], noise[1][:, down] = values[:, None, None], value
        for start in range(0, args.steps, args.batch):
            row.extend(sampler.images([eps[start:start + args.batch] for eps in noise], label))
        rows.append(row)
    marks = [f"{float(value):.2f}" for value in values]
    title = f"across: group 1, channel {across};  down: group 2, channel {down}"
    save_grid(args.out, rows, row_names=marks, column_names=marks)
    say(f"{args.out}: {title}; they hold {share[0]:.0%} and {share[1]:.0%} of their groups' KL over "
        f"{'prior samples' if args.data is None else 'data'}")

def outpaint(args):
    """Figure 6: the latents of every level from 4x4 up are widened with fresh noise."""
    sampler = make_sampler(args)
    side, downwards = sampler.config.resolution, args.direction in ("down", "up")
    tall, wide = args.height or (2 if downwards else 1), args.width or (1 if downwards else 2)
    originals, x, label = read_photos(sampler, [args.image], args.label)
    latents = sampler.infer(x, label).latents
    right = {"left": wide - 1, "both": (wide - 1) / 2}.get(args.direction, 0)    # the offset, in images
    below = {"up": tall - 1}.get(args.direction, 0)

    def around(z, fresh):
        """A group's noise: fresh, but where the image stands what makes its z under the new prior."""
        top, left = int(below * z.shape[2]), int(right * z.shape[3])
        here = np.s_[:, :, top:top + z.shape[2], left:left + z.shape[3]]

        def eps(prior):
            if fresh.shape == z.shape:                         # a 1x1 group is kept whole
                return lvae.whiten(z, prior)
            fresh[here] = lvae.whiten(z, lvae.Gaussian(prior.mean[here], prior.var[here]))
            return fresh
        return eps
    images, size = [], (tall * side, wide * side)
    for number in range(args.n):
        fresh = sampler.noise(args.seed, [number], size)
        noise = [around(latent.z, eps) for latent, eps in zip(latents, fresh)]
        images.extend(sampler.images(noise, label, size=size))
    back = sampler.images([lvae.whiten(latent.z, latent.prior) for latent in latents], label)[0]
    names = ["image", "reconstruction", *["outpainted"] * args.n]
    save_grid(args.out, [[originals[0], back, *images]], column_names=names)
    top, left = int(below * sampler.size), int(right * sampler.size)
    kept = [image[top:top + sampler.size, left:left + sampler.size] for image in images]
    say(f"{args.out}: {wide * sampler.size}x{tall * sampler.size} pixels; where the image was, PSNR "
        f"{psnr(kept, [back] * args.n):.2f} dB to its reconstruction")

# ---------------------------------------------------------------- the rate of every group
def rates(args):
    """KL of every latent group and level beside its target, distortion, negative ELBO and active channels."""
    sampler = make_sampler(args, upsamples=True)
    config, kl, distortion, count = sampler.config, 0, 0.0, 0
    torch.manual_seed(args.seed)
    for x, label in encoded(sampler, args, args.n):
        out = sampler.infer(x, label, draw=True)
        kl, count = kl + len(x) * channel_kl(out), count + len(x)             # (L, z)
        distortion += float(lvae.distortions(out, x, config).sum())
    kl, distortion, target = (kl / count).cpu().numpy(), distortion / count, lvae.kl_shares(config).numpy()
    rate, active, sides = kl.sum(), kl > 0.01, np.repeat(sampler.sides, config.groups[::-1])
    rows = [(group + 1, side, [group]) for group, side in enumerate(sides)]
    rows += [("level", side, sides == side) for side in sampler.sides]
    print("group  level    KL nats   % of rate   target %        active channels")
    for name, side, mine in rows:
        nats, goal = kl[mine].sum(), target[mine].sum()
        share = 100 * nats / max(rate, 1e-9)
        print(f"{name:>5}  {f'{side}x{side}':7} {nats:8.2f}  {share:9.1f}   {goal:5.1f} - {2 * goal:5.1f}   "
              f"{active[mine].sum():2} of {active[mine].size}")
    total = rate + distortion
    print(f"rate {rate:.2f} + distortion {distortion:.2f} = negative ELBO {total:.2f} nats per image, "
          f"{lvae.bits_per_dim(total, config):.4f} bits per dimension of {sampler.space}; {count} images\n"
          "target: where the schedule's weight is 1; active: mean KL above 0.01 nats")

# ---------------------------------------------------------------- metrics
NETWORK = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"

@contextlib.contextmanager
def reading(path, expected):
    """Whatever a damaged or foreign file provokes is one line that says what was expected."""
    try:
        yield
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[-1][:120]
        raise ValueError(f"{path}: expected {expected} ({reason})") from None

class Network:
    """A TorchScript network: uint8 images (B, 3, H, W) -> features (B, D), or a pair (features, logits).

    One with the options `return_features` and `no_output_bias`, such as NETWORK, gives features with the one,
    class probabilities with the other.
    """
    def __init__(self, path, device):
        self.path, self.device = path, device
        with reading(path or "--features", f"a TorchScript network, such as {NETWORK}"):
            self.net = torch.jit.load(path, map_location=device).eval()
        options = {argument.name for argument in self.net.forward.schema.arguments}
        self.both = {"return_features", "no_output_bias"} <= options

    @torch.no_grad()
    def __call__(self, images):
        """uint8 images, (B, H, W, 3) -> features (B, D) float32, and probabilities (B, K) or None."""
        x = torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2).contiguous()
        with reading(self.path, f"a network for uint8 images {tuple(x.shape)}"):
            if self.both:
                out = self.net(x, return_features=True), self.net(x, no_output_bias=True)
            else:
                out = self.net(x)
                out = (out, None) if torch.is_tensor(out) else (out[0], out[1].float().softmax(1))
            return [None if t is None else t.flatten(1).float().cpu().numpy() for t in out]

def moments(features):
    """Mean and unbiased covariance of features (N, D), float64."""
    features = features.astype(np.float64)
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))

def frechet(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|² + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^½), of two Gaussians (Heusel et al., 2017)."""
    s1, s2 = (torch.from_numpy(np.asarray(s, np.float64)) for s in (sigma1, sigma2))
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T    # R s2 R is symmetric, with s1 s2's eigenvalues
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp_min(0).sqrt().sum()
    return max(0.0, float(np.square(mu1 - mu2).sum() + s1.trace() + s2.trace() - 2 * cross))

def inception_score(probabilities, split=5000):
    """exp of the mean KL between each image's class probabilities (N, K) and their split's mean, averaged
    over splits of 5000, as the guided-diffusion evaluator does (Salimans et al., 2016)."""
    scores = []
    for i in range(0, len(probabilities), split):
        p = np.maximum(probabilities[i:i + split].astype(np.float64), 1e-38)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores))

def precision_recall(reference, samples, k=3, device="cpu"):
    """Share of samples within the k-nearest-neighbour balls of the reference, and the reverse (Kynkäänniemi
    et al., 2019). Features (N, D) and (M, D), more than k of each."""
    a, b = (torch.from_numpy(features).to(device).double() for features in (reference, samples))

    def within(points, centres):                               # k + 1 nearest: the first is the point itself
        radii = torch.cat([torch.cdist(p, centres).kthvalue(k + 1).values for p in centres.split(1000)])
        inside = torch.cat([(torch.cdist(p, centres) <= radii).any(1) for p in points.split(1000)])
        return float(inside.double().mean())
    return within(b, a), within(a, b)

def npz_images(path, batch):
    """arr_0 of an .npz, batches of uint8 (B, H, W, 3), piece by piece: it may be larger than memory."""
    with reading(path, "arr_0, uint8 (N, H, W, 3)"), zipfile.ZipFile(path) as archive:
        file = archive.open("arr_0.npy")
        header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = header[np.lib.format.read_magic(file)[0]](file)
        require(shape[3:] == (3,) and shape[0] and dtype == np.uint8, f"it is {dtype} {shape}")
        whole = np.load(path)["arr_0"] if fortran else None    # not in pieces of images
        for start in range(0, shape[0], batch):
            count = min(batch, shape[0] - start)
            if fortran:
                yield whole[start:start + count]
            else:
                data = file.read(count * math.prod(shape[1:]))
                yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:])

def side_of(path):
    """The side of the images of an .npz (None: not known), or of a folder, if all have one. ValueError."""
    if path.endswith(".npz"):
        with reading(path, "an .npz"), np.load(path) as file:
            if "arr_0" not in file.files:
                return int(file["side"]) if "side" in file.files else None
        return next(npz_images(path, 1)).shape[1]
    if path == "toy":
        return 64
    sides = set()
    for name in open_images(path, 8).names:
        with contextlib.suppress(Exception), Image.open(name) as image:
            sides.add(min(image.size))
    extremes = f"from {min(sides)} to {max(sides)} pixels" if sides else "unknown"
    require(len(sides) == 1, f"{path}: the images' short sides are {extremes}: say the --image-size")
    return sides.pop()

def common_side(paths):
    """The side at which sets of images are compared: an .npz's, if one says it, else that of folders."""
    known = [side for path in paths if path.endswith(".npz") and (side := side_of(path))]
    known = known or [side_of(path) for path in paths if not path.endswith(".npz")]
    return known[0] if known else None

def described(parts, network):
    """Batches of images -> what is known of them: features, their moments, class probabilities, and the mean
    saturation of their colours (HSV)."""
    features, probabilities, saturation, side = [], [], [], 0
    for images in parts:
        found, p = network(images)
        features.append(found)
        probabilities.append(p)
        top, side = np.max(images, axis=3).astype(float), images[0].shape[0]       # (B, H, W)
        saturation.append(((top - np.min(images, axis=3)) / np.maximum(top, 1)).mean((1, 2)))
    features, saturation = np.concatenate(features), np.concatenate(saturation)
    found = dict(zip(("mu", "sigma"), moments(features)), features=features, side=side)
    found["saturation"] = saturation.mean()
    return found if probabilities[0] is None else found | {"probabilities": np.concatenate(probabilities)}

def statistics(path, network, args, size=None):
    """What is known of the images of an .npz, or of a folder. A reference batch has its mu and sigma."""
    if path.endswith(".npz"):
        with reading(path, "an .npz with arr_0 (images), or finite mu and sigma"), np.load(path) as file:
            names = ("mu", "sigma", "features", "probabilities", "saturation", "side")
            given = {name: file[name] for name in names if name in file.files}
            require(all(np.isfinite(value).all() for value in given.values()), "they are not finite")
            if "arr_0" not in file.files:
                return {"mu": file["mu"], "sigma": file["sigma"]} | given
        return described(npz_images(path, args.batch), network) | given
    images = open_images(path, args.image_size or size)
    found = described((some for _, some in batches(images, args.batch)), network)
    if "probabilities" in found:                               # a folder is sorted: shuffled for the splits
        found["probabilities"] = np.random.default_rng(0).permutation(found["probabilities"])
    return found

def compared(found, reference, device):
    """The metrics that two sets of statistics allow; reference may be empty."""
    row, sets = {}, [known["features"] for known in (reference, found) if "features" in known]
    if reference:
        with reading("--reference", f"statistics of {len(found['mu'])} features, as --features gives"):
            row["FID"] = frechet(found["mu"], found["sigma"], reference["mu"], reference["sigma"])
    if "probabilities" in found:
        row["IS"] = inception_score(found["probabilities"])
    if len(sets) == 2 and min(map(len, sets)) > 3:
        device = device if device.type == "cuda" else "cpu"    # for float64
        row["precision"], row["recall"] = precision_recall(*sets, device=device)
    return row | ({"saturation": float(found["saturation"])} if "saturation" in found else {})

def rebuilt(sampler, args):
    """Batches of what the autoencoder, alone or with the LVAE, makes of --data."""
    for x, label in encoded(sampler, args, args.n):
        alone = args.reconstruct == "autoencoder"
        yield sampler.decode(x) if alone else sampler.images(sampler.posterior(x, label), label)

def evaluate(args):
    """Table 3: FID, Inception Score, precision and recall as the guided-diffusion evaluator defines them.

    Of a checkpoint's samples (each combination of the guidance weights and temperatures given) or
    reconstructions, an .npz or a folder, against an .npz (a reference batch of that evaluator, or one
    exported here) or a folder. Saturation is the mean of HSV's: guidance at 1x1 saturates colours.
    """
    network, reference, settings = Network(args.features, setup(args.device)[0]), {}, [{}]
    made = args.source.endswith(".npz") or args.source == "toy" or os.path.isdir(args.source)
    if made:
        size = args.image_size or common_side([path for path in (args.source, args.reference) if path])
        found = statistics(args.source, network, args, size)
    else:
        sampler = make_sampler(args)
        size, settings = sampler.out_size, guidance_settings(sampler, args)
        labels = even_labels(sampler, args.label, args.n)
        if labels is not None:                                 # shuffled, for the Inception Score's splits
            labels = np.random.default_rng(args.seed).permutation(labels)
    require(len(settings) == 1 or not args.export, "--export writes the statistics of one setting only")
    if args.reference:
        reference = statistics(args.reference, network, args, size)
    for i, setting in enumerate(settings):
        if not made:
            drawn = (some for _, some in draw_all(sampler, args, args.n, labels, setting))
            found = described(rebuilt(sampler, args) if args.reconstruct else drawn, network)
        texts = [":".join(f"{w:g}" for w in np.atleast_1d(weights)) for weights in setting.values()]
        row = dict(zip(("w_mu", "w_sigma", "temperature"), texts))
        row |= {name: f"{value:.4f}" for name, value in compared(found, reference, network.device).items()}
        if i == 0:
            side = f"images of {found['side']}x{found['side']}, " if "side" in found else ""
            say(f"{args.source}: {side}{len(found['mu'])} features")
            print("  ".join(f"{name:>12}" for name in row))
        print("  ".join(f"{text:>12}" for text in row.values()), flush=True)
    if args.export:
        daes.write(args.export, lambda file: np.savez(file, **found))
        say(f"{args.export}: the statistics of {args.source}")

def neighbors(args):
    """Figure 8: samples, and the training images nearest to them in latent space, or in features."""
    sampler = make_sampler(args)
    weights, = guidance_settings(sampler, args)
    images, encoder = find_images(sampler, args.data), sampler.upsampler or sampler
    network = Network(args.features, sampler.device) if args.features else None

    def features(some):                                        # (B, D) float64
        found = torch.from_numpy(network(some)[0]) if network else encoder.latents(some).flatten(1).cpu()
        return found.double()
    labels = even_labels(sampler, args.label, args.n)
    drawn = [image for _, some in draw_all(sampler, args, args.n, labels, weights) for image in some]
    targets = torch.cat([features(drawn[i:i + args.batch]) for i in range(0, args.n, args.batch)])
    nearest, index = torch.zeros(args.n, 0), torch.zeros(args.n, 0, dtype=torch.long)      # (n, neighbours)
    for rows, some in batches(images, args.batch):
        distance = torch.cat([nearest, torch.cdist(targets, features(some))], dim=1)
        index = torch.cat([index, torch.from_numpy(rows).expand(args.n, -1)], dim=1)
        nearest, order = distance.topk(min(args.neighbors, distance.shape[1]), largest=False)
        index = index.gather(1, order)
    rows = [[image, *(images.read(i) for i in row)] for image, row in zip(drawn, index.tolist())]
    save_grid(args.out, rows, column_names=["sample", *(f"{i + 1}." for i in range(index.shape[1]))],
              row_names=None if labels is None else [sampler.name(c) for c in labels])
    where = f"the features of {args.features}" if network else encoder.space
    say(f"{args.out}: {args.n} samples, {index.shape[1]} nearest of {len(images.names)} images, in {where}")
    for number, (distances, row) in enumerate(zip(nearest, index)):
        say(f"  {number}: " + ", ".join(f"{images.names[i]} ({d:.2f})" for d, i in zip(distances, row)))

# ---------------------------------------------------------------- speed (Table 4)
def bench(args):
    """Table 4: seconds per 1000 images, FLOP, and the share of the device's fastest matrix product."""
    state = random_checkpoint(args.source) if args.source in lvae.PRESETS else None
    sampler = Sampler(args.source, args.device, args.precision, args.dae, state=state)
    config, device, total = sampler.config, sampler.device, np.zeros(2)
    guided = sampler.can_guide if args.guided is None else args.guided
    guidance = dict(mean_guidance=lvae.guidance_levels(config, 1.5), variance_guidance=3.0) if guided else {}
    (x, label), noise = random_batch(config, args.batch, device), sampler.noise(0, range(args.batch))

    def model(n=args.batch):
        low_res = lvae.shrink(x[:n], config) if config.upsample else None
        some = None if label is None else label[:n]
        sampler.model.generate([eps[:n] for eps in noise], some, low_res=low_res, **guidance)

    def decoder(n=args.batch):
        sampler.decode(x[:n])

    def row(name, flop, seconds):                              # of one image
        print(f"{name:9} {flop / 1e9:15.4g} {1000 * seconds:19.2f} {flop / seconds / 1e12:10.3f} "
              f"{flop / seconds / peak:14.1%}")
    stages = {"LVAE": model} if sampler.space == "pixels" else {"LVAE": model, "decoder": decoder}
    with lvae.autocast(device, sampler.dtype):
        flops = {name: count_flops(lambda: stage(1)) for name, stage in stages.items()}
        set_up(sampler, args, many=True)                       # what is compiled cannot be counted
        peak = matmul_rate(device, sampler.dtype)
        say(f"{args.source}: {sampler.size}x{sampler.size} images, {'' if guided else 'not '}guided, batch "
            f"{args.batch}; peak {peak / 1e12:.3f} TFLOP/s (matrix product)")
        print("stage     GFLOP per image   s per 1000 images    TFLOP/s   share of peak")
        for name, stage in stages.items():
            cost = np.array([flops[name], seconds_per_call(stage, device, args.seconds) / args.batch])
            total += cost
            row(name, *cost)
    row("together", *total)
    print(f"peak memory {peak_memory(device) / 2 ** 30:.2f} GiB")
    if args.train:
        flop = count_flops(training_step(sampler, 1))
        step = training_step(sampler, args.train, sampler.compiled)
        seconds = seconds_per_call(step, device, args.seconds) / args.train
        row("training", flop, seconds)
        print(f"{1 / seconds:.2f} images/s in training, peak memory {peak_memory(device) / 2 ** 30:.2f} GiB")

def training_step(sampler, n, compiled=False):
    """A function that does a training step of n samples with a new model like the sampler's."""
    config = replace(sampler.config, accumulate=1)
    model = place(lvae.LVAE(config).train(), sampler.device)
    ema, optimizer = copy.deepcopy(model).eval(), lvae.make_optimizer(model)
    if compiled:
        model.compile(dynamic=False)
    data = [random_batch(config, n, sampler.device)]
    return lambda: lvae.train_step(model, ema, optimizer, data, 1, sampler.dtype)

def random_checkpoint(name):
    """An untrained model of a preset, in the form of a checkpoint."""
    config = lvae.PRESETS[name]
    stage = daes.PRESETS.get("small-f4" if config.first_stage == "train" else config.first_stage)
    return {"config": config, "dataset": name, "run": {}, "classes": [],
            "ema": lvae.LVAE(config).state_dict(),
            "dae": daes.Autoencoder(stage).state_dict() if stage else {}}

def random_batch(config, n, device="cpu"):
    """Data (n, C, side, side), and labels (n,) or None."""
    x = torch.randn(n, config.data_channels, config.resolution, config.resolution, device=device)
    return x, torch.arange(n, device=device) % config.num_classes if config.num_classes else None

def count_flops(function):
    """The floating-point operations of a call, 2 for each multiplication with an addition."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()

def matmul_rate(device, dtype):
    """FLOP/s of the device's fastest large square matrix product: its peak, as measured."""
    rates = []
    for n in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        rates.append(2 * n ** 3 / seconds_per_call(lambda: a @ b, device, 0.5, typical=np.min))
    return max(rates)

def seconds_per_call(function, device, budget, typical=np.median):
    """The median (or other `typical`) time of a call, after one to warm up; 3 calls at least."""
    times = []
    while len(times) < 4 or sum(times[1:]) < budget:
        started = time.perf_counter()
        function()
        if device.type in ("cuda", "mps"):
            getattr(torch, device.type).synchronize()
        times.append(time.perf_counter() - started)
    return float(typical(times[1:]))

def peak_memory(device):
    """The most memory used so far, in bytes: the device's, or on a CPU this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

# ---------------------------------------------------------------- command line
def writable(*endings):
    """argparse type: the name of a file to write, refused before the work that would fill it."""
    def name(text):
        folder = os.path.dirname(os.path.abspath(text))
        while not os.path.exists(folder):                      # it is made
            folder = os.path.dirname(folder)
        hopeless = os.path.isdir(text) or not os.path.isdir(folder) or not os.access(folder, os.W_OK)
        if hopeless or not text.lower().endswith(endings):
            raise argparse.ArgumentTypeError(f"{text}: expected a name that ends in {' or '.join(endings)}, "
                                             "in a folder that can be written to")
        return text
    return name

def several(kind, separator=","):
    """argparse type: A,B,.. -> a list."""
    def values(text):
        return [kind(word.strip()) for word in text.split(separator)]
    return values

def weights(text, separator=","):
    """argparse type, of guidance: a number, or A,B,.. one per level, as a list of one setting."""
    values = [float(word) for word in text.split(separator)]
    return [values if len(values) > 1 else values[0]]

def settings(text):
    """argparse type: several such, by commas, each a number or A:B:.."""
    return [setting for word in text.split(",") for setting in weights(word, ":")]

positive, whole, amount = at_least(1), at_least(0), at_least(0, float)
picture, table = writable(".png", ".jpg", ".webp"), writable(".npz")
# Name, kind, default, explanation. A kind that is a tuple is a choice, list is one or more, bool a switch.
COMMON = [
    ("--batch", positive, 16, "images at a time"), ("--seed", whole, 0, "of the noise"),
    ("--device", str, "auto", "cuda, mps, cpu, xla, .."),
    ("--precision", ("auto", "bf16", "fp32"), "auto", "of the convs; auto: bf16 where the hardware has it"),
    ("--compile", bool, None, "torch.compile: takes minutes (on CUDA: for bench, and 1000 images or more)"),
    ("--dae", str, None, "autoencoder file, instead of the one in the checkpoint")]
SAMPLED = [
    ("--label", str, None, "classes by name, unique beginning or number, by commas; none (all)"),
    ("--upsampler", str, None, "checkpoint of an upsampler, to enlarge the samples (Table 1)")]
GUIDED = SAMPLED + [
    ("--mean-guidance", weights, None, "w_mu, or one per level, coarsest first (0; ImageNet: the paper's)"),
    ("--variance-guidance", weights, None, "w_sigma, likewise"),
    ("--temperature", several(amount), [1.0], "multiplies the std of every prior (1)")]
FEATURES = ("--features", str, None, f"TorchScript network, such as {NETWORK}")
LABEL = ("--label", str, None, "the images' class; else the folder's name if it is a class, or the likeliest")
DATA = ("--data", str, None, "folder of images, LSUN LMDB folder, or 'toy' (what the model was trained on)")
COMMANDS = {
    generate: GUIDED + [
        ("--n --samples", positive, None, "how many (8 per class, or 16); under torchrun: --samples"),
        ("--out", picture, None, "the grid, .png, .jpg or .webp (samples.png)"),
        ("--npz", table, None, "arr_0 uint8 (N, H, W, 3) in shuffled order, arr_1 labels"),
        ("--png-dir", str, None, "a folder for a PNG per sample")],
    reconstruct: [
        ("images", list, None, "image files, folders"), LABEL,
        ("--out", picture, "reconstructions.png", "the picture"),
        ("--groups", several(positive), [], "also with only the first k latent groups: one or more k")],
    interpolate: [
        ("a", str, None, "an image file"), ("b", str, None, "another"), LABEL,
        ("--out", picture, "interpolation.png", "the picture"),
        ("--steps", at_least(2), 5, "generated images, ends included")],
    manifold: [
        ("--out", picture, "manifold.png", "the picture"), ("--label", str, None, "the class (0)"),
        ("--steps", positive, 7, "images per axis"), ("--range", amount, 2.25, "where the axes end"),
        ("--data", str, None, "find the channels on this folder's images, or 'toy' (on samples)")],
    outpaint: [
        ("image", str, None, "an image file"), LABEL, ("--out", picture, "outpainted.png", "the picture"),
        ("--direction", ("right", "left", "both", "down", "up"), "right", "where it grows"),
        ("--n", positive, 1, "how many versions"),
        ("--width", positive, None, "width in images (2, or 1 if it grows down or up)"),
        ("--height", positive, None, "height in images (1, or 2 if it grows down or up)")],
    rates: [DATA, ("--n", positive, 1000, "images, evenly spaced")],
    evaluate: SAMPLED + [
        FEATURES, ("--reference", str, None, ".npz (mu and sigma, or arr_0, or both) or folder of images"),
        ("--n", positive, 10_000, "samples of a checkpoint; the paper's figures are of 50000"), DATA,
        ("--reconstruct", ("autoencoder", "lvae"), None, "not samples, but what it makes of --data"),
        ("--mean-guidance", settings, None, "w_mu, one or several; a:b:c per level, coarsest first"),
        ("--variance-guidance", settings, None, "w_sigma, likewise"),
        ("--temperature", several(amount), [1.0], "one or several (1)"),
        ("--image-size", positive, None, "side to crop folders' images to (that of the images evaluated)"),
        ("--export", table, None, ".npz for their statistics, to be a --reference")],
    neighbors: GUIDED + [
        FEATURES, DATA, ("--out", picture, "neighbors.png", "the picture"),
        ("--n", positive, 8, "samples"), ("--neighbors", positive, 6, "neighbours of each")],
    bench: [
        ("--guided", bool, None, "with guidance (if the model can)"),
        ("--seconds", amount, 5.0, "to time each stage for"),
        ("--train", positive, None, "also time a training step of so many images: it takes more memory")]}
INPUTS = {evaluate: "checkpoint, .npz with arr_0, or folder of images",
          bench: f"checkpoint, or a preset with random weights: {', '.join(lvae.PRESETS)}"}

def main(argv=None):
    """The command line."""
    parser = daes.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for function, options in COMMANDS.items():
        text = function.__doc__
        own = commands.add_parser(function.__name__, help=text.splitlines()[0], description=text)
        own.add_argument("source", help=INPUTS.get(function, "checkpoint, or church, bedroom, imagenet"))
        for name, kind, default, text in options + COMMON:
            more = {"default": default}
            if kind is bool:
                more["action"] = argparse.BooleanOptionalAction
            elif kind is list:
                more["nargs"] = "+"
            else:
                more["choices" if isinstance(kind, tuple) else "type"] = kind
            more["help"] = text if default is None or isinstance(default, list) else f"{text} ({default})"
            own.add_argument(*name.split(), **more)
        own.set_defaults(function=function)
    args = parser.parse_args(argv)
    if args.command != "generate" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{args.command} runs in one process: start it with python, not torchrun")
    args.function(args)

if __name__ == "__main__":
    cli(main)
