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
Reads downwards: the model, what commands share, then a function per figure or table, after its own helpers.
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
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import dae as daes
import lvae
from dae import at_least, cli, require, to_tensor, to_uint8
from train import (asked_to_stop, autoencoder_of, explained, image_files, list_images, load_checkpoint,
                   open_images, place, relabel, save_picture, say, setup, world)

# ---------------------------------------------------------------- the model
class Sampler:
    """A checkpoint's EMA weights and autoencoder on a device: noise or images in, uint8 images out.

    A label is a class's number, or (B,) of them, or None; a model without classes takes no notice of it.
    """
    def __init__(self, path, device="auto", precision="auto", dae=None, upsampler=None, state=None):
        """dae: a file, instead of the checkpoint's own; upsampler: a checkpoint; state: what is in `path`."""
        state = state or load_checkpoint(path)
        self.device, self.dtype = setup(device, precision)
        self.config, self.dataset, self.data = state["config"], state["dataset"], state["run"].get("data")
        self.folders = self.classes = state["classes"]         # the names of the folders that it learned from
        synsets = all(name[0] == "n" and name[1:].isdigit() for name in self.folders)
        if self.dataset == "imagenet" and synsets and len(self.folders) in (0, 1000):
            names = Path(__file__).parent / "assets" / "imagenet_classes.txt"
            self.classes = names.read_text("utf-8").splitlines()
        self.model = daes.fill(lambda: lvae.LVAE(self.config), state["ema"], path)
        self.dae = daes.load(dae) if dae else autoencoder_of(state, path)
        require(self.dae, f"{path} holds no autoencoder: name one with --dae FILE")
        fits = self.dae.config.z_channels == self.config.data_channels
        require(fits, f"{path} does not fit its autoencoder of {self.dae.config.z_channels} channels: --dae")
        for module in (self.model, self.dae):
            place(module, self.device, self.dtype).requires_grad_(False)
        self.can_guide = bool(self.config.num_classes and self.config.hierarchical_prior)
        self.size = self.out_size = self.config.resolution * self.dae.config.f       # of images, in pixels
        self.compiled, self.upsampler = False, None
        if upsampler:
            self.upsampler = Sampler(upsampler, device, precision)
            self.out_size = self.upsampler.size                # of what `draw` gives
            fits = self.size * self.upsampler.config.upsample == self.out_size
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

    def draw(self, seed, numbers, label, **guidance):
        """Samples `numbers` of a seed -> uint8 (B, H, W, 3)."""
        images, up = self.images(self.noise(seed, numbers), label, **guidance), self.upsampler
        if up:
            images = up.images(up.noise((seed, 1), numbers), label, low_res=up.latents(images))
        return images

    def generate(self, noise, label, **options):
        """Noise -> latents (B, C, h, w). options: those of LVAE.generate."""
        with lvae.autocast(self.device, self.dtype):
            return self.model.generate(noise, self.known(label), **options)

    def images(self, noise, label, **options):
        """The same -> uint8 images (B, H, W, 3)."""
        return self.decode(self.generate(noise, label, **options))

    def decode(self, x):
        """Latents (B, C, h, w) -> uint8 images (B, H, W, 3), a few at a time: they take memory."""
        most = 16 if self.device.type == "cuda" else 1         # of 256x256; a CPU's caches hold one
        parts = x.split(max(1, most * 256 ** 2 // self.size ** 2))
        with lvae.autocast(self.device, self.dtype):
            images = [to_uint8(self.dae.decode(lvae.denormalise(part, self.config))) for part in parts]
        return np.concatenate(images)

    def latents(self, images):
        """uint8 (B, H, W, 3) -> normalised latents (B, C, h, w)."""
        with lvae.autocast(self.device, self.dtype):
            return lvae.normalise(self.dae.encode(to_tensor(images).to(self.device)), self.config)

    def infer(self, x, label, draw=False):
        """Latents x (B, C, h, w) -> the model's Output, of the posterior's means or of a draw from it."""
        shapes = self.model.latent_shapes()
        noise = None if draw else [torch.zeros(len(x), *shape, device=self.device) for shape in shapes]
        with lvae.autocast(self.device, self.dtype):
            return self.model(x, self.known(label), noise)

    def posterior(self, x, label):
        """Latents x (B, C, h, w) -> the whitened noise of the posterior's means, a list of (B, z, h, w)."""
        return [lvae.whiten(latent.z, latent.prior) for latent in self.infer(x, label).latents]

    def known(self, label):
        """A label as the model takes it: on its device, None if it has no classes."""
        known = label is not None and self.config.num_classes
        return torch.as_tensor(label, device=self.device) if known else None

    def numbers(self):
        """What a class may be called, in lower case -> its number; 'none' is no label."""
        count = self.config.num_classes
        numbers = {"none": count} | {str(i): i for i in range(count)}
        for names in (self.folders, self.classes):
            numbers |= {name.strip().lower(): i for i, name in enumerate(names[:count])}
        return numbers

    def label(self, text):
        """A class by its name, a unique beginning of it, or its number; 'none': no label. ValueError."""
        numbers, word = self.numbers(), text.strip().lower()
        begun = {i for name, i in numbers.items() if name.startswith(word)}
        found = {numbers[word]} if word in numbers else begun
        names = ", ".join(map(self.name, found or range(self.config.num_classes)))
        problem = "fits several classes" if found else "no such class"
        require(len(found) == 1, f"--label {text}: {problem}; expected none, a number below "
                f"{self.config.num_classes}, or a name: {names[:300]} ..")
        return found.pop()

    def labels(self, text):
        """Classes by commas, as for `label`; a name that has commas itself is found first. None: all (of a
        model without classes [0]). ValueError."""
        if not text:
            return list(range(self.config.num_classes or 1))
        words, labels, numbers = text.split(","), [], self.numbers()
        while words:
            names = [",".join(words[:n]) for n in range(len(words), 0, -1)]
            name = next((name for name in names if name.strip().lower() in numbers), words[0])
            labels.append(self.label(name))
            words = words[name.count(",") + 1:]
        return labels

    def name(self, label):
        """What a class is called in a picture."""
        names = dict(enumerate(self.classes)) | {self.config.num_classes: "no label"}
        return names.get(label, str(label))[:20]

def compiled(function):
    """torch.compile(function), which gives a tensor, for inputs of one size, as a CUDA graph."""
    fast = torch.compile(function, dynamic=False, mode="reduce-overhead")

    def call(*inputs, **options):
        torch.compiler.cudagraph_mark_step_begin()
        return fast(*inputs, **options).clone()                # the graph's next run writes over what it gave
    return call

# ---------------------------------------------------------------- what commands share
def make_sampler(args):
    """The sampler of the command line: of a checkpoint, or, to bench a preset, with random weights."""
    preset = args.command == "bench" and args.source in lvae.PRESETS
    sampler = Sampler(args.source, args.device, args.precision, args.dae, getattr(args, "upsampler", None),
                      random_checkpoint(args.source) if preset else None)
    require(not sampler.config.upsample or args.command in ("reconstruct", "rates", "bench"),
            f"{args.source} is an upsampler, which draws nothing alone: pass it as --upsampler")
    many = args.command == "bench" or args.command in ("generate", "evaluate") and (args.n or 0) >= 1000
    if args.compile or args.compile is None and many and sampler.device.type == "cuda":
        sampler.compile()
    return sampler

def guidance_settings(sampler, args):
    """What is asked for of guidance and temperature, as arguments of `generate`; for ImageNet the paper's."""
    means, variances = args.mean_guidance or [0.0], args.variance_guidance or [0.0]
    possible, sides = sampler.can_guide and args.label != "none", sampler.model.sides
    if possible and sampler.dataset == "imagenet" and not (args.mean_guidance or args.variance_guidance):
        means, variances = [lvae.guidance_levels(sampler.config, 1.5)], [3.0]
    for weights in map(np.atleast_1d, means + variances):
        require(len(weights) in (1, len(sides)), f"guidance takes a number, or one per level: {sides}")
        require(possible or not weights.any(),
                "guidance needs a class-conditional model, a hierarchical prior, and a label")
    names = ("mean_guidance", "variance_guidance", "temperature")
    temperatures = np.atleast_1d(args.temperature).tolist()
    return [dict(zip(names, values)) for values in itertools.product(means, variances, temperatures)]

def even_labels(classes, n):
    """n labels, as evenly of the classes as can be, in their order: (N,)."""
    return np.array(classes)[np.sort(np.arange(n) % len(classes))]

def draw_all(sampler, args, labels, weights):
    """(Numbers, uint8 images) of every batch of samples with labels (N,); under torchrun, of a share."""
    (rank, count), n = world(), len(labels)
    starts = range(0, n, args.batch)[rank::count]
    for start in tqdm(starts, desc="sampling", unit="batch", disable=n <= args.batch or rank > 0):
        numbers = drawn = np.arange(start, min(start + args.batch, n))
        if sampler.compiled:                                   # for batches of one size
            drawn = np.resize(numbers, min(n, args.batch))
        yield numbers, sampler.draw(args.seed, drawn, labels[drawn], **weights)[:len(numbers)]

def batches(images, batch, limit=None):
    """(Indices, uint8 images) of every batch of good images, or of `limit` of them, evenly spaced."""
    count, found = len(images.names), 0
    n = min(limit or count, count)
    for start in tqdm(range(0, n, batch), desc="images", unit="batch", disable=n <= batch):
        rows = np.arange(start, min(start + batch, n)) * count // n
        good = {i: image for i in rows.tolist() if (image := images.read(i)) is not None}
        found += len(good)
        if good:
            yield list(good), list(good.values())
    require(found, "no usable image")

def find_images(sampler, path):
    """The images of --data, or of the data that the model was trained on."""
    path = sampler.data if path is None else path
    require(path is not None, "name a folder of images with --data ('toy' is the built-in scenes)")
    return open_images(path, sampler.size)

def find_photos(sampler, paths):
    """The images of files and folders."""
    inside = [[os.path.join(path, name) for name, *_ in list_images(path)] if os.path.isdir(path) else [path]
              for path in paths]
    return image_files(list(itertools.chain(*inside)), sampler.size)

def encoded(sampler, images, batch, text=None, limit=None):
    """(uint8 images, latents (B, C, h, w), labels (B,)) of batches, as in `batches`. The class is what `text`
    names, or the sub-folder (a model that knows no names takes these in order), or what `class_of` finds."""
    count = sampler.config.num_classes
    if count and not text and images.classes and (sampler.folders or len(images.classes) > count):
        relabel(images, sampler.folders, "the images")
    named = sampler.label(text) if text and count else None
    for rows, some in batches(images, batch, limit):
        x = sampler.latents(some)
        if named is not None:
            labels = [named] * len(x)
        elif images.classes or not count:
            labels = images.labels[rows]
        else:
            labels = [class_of(sampler, images.names[i], latent) for i, latent in zip(rows, x)]
        yield some, x, torch.as_tensor(labels, device=sampler.device)

def class_of(sampler, name, x):
    """The class of an image, latents x (C, h, w): its folder, if a class is called so, or the class for which
    x costs the fewest nats."""
    folder, count, numbers = Path(name).absolute().parent.name, sampler.config.num_classes, sampler.numbers()
    if folder.lower() in numbers and not folder.isdigit():
        return numbers[folder.lower()]
    require(count <= 100, f"{name}: no class is called like its folder: say it with --label")
    x = x.expand(count, -1, -1, -1)
    out = sampler.infer(x, torch.arange(count))
    return int((lvae.distortions(out, x, sampler.config) + out.kl.sum(0)).argmin())

def save_grid(path, rows, **names):
    """Save a grid; images smaller than 128 pixels are enlarged by a whole factor."""
    scale = math.ceil(128 / min(128, *(image.shape[0] for row in rows for image in row)))
    save_picture(path, [[image.repeat(scale, 0).repeat(scale, 1) for image in row] for row in rows], **names)

# ---------------------------------------------------------------- generate
GRID = 256  # images in a grid at most

def generate(sampler, args):
    """Draw samples: a grid to look at, an .npz for metrics, or a folder of PNGs."""
    if args.png_dir:
        os.makedirs(args.png_dir, exist_ok=True)               # refused before the work
    weights, = guidance_settings(sampler, args)
    classes = sampler.labels(args.label)
    if not (args.n or args.label):
        classes = classes[:10]
    n, size = args.n or max(16, 8 * len(classes)), sampler.out_size
    labels, shown = even_labels(classes, n), np.linspace(0, n - 1, min(n, GRID)).astype(int)
    out = args.out or (None if args.npz or args.png_dir else "samples.png")
    # Where a sample goes. An .npz is shuffled: the Inception Score is taken over consecutive parts.
    if args.npz:
        row, kept = np.random.default_rng(args.seed).permutation(n), n
    else:
        row, kept = np.full(n, n), len(shown)                  # most go nowhere
        row[shown] = np.arange(kept)
    with shared_array(f"{args.npz or out or args.png_dir}.images.tmp", (kept, size, size, 3)) as array:
        for numbers, images in draw_all(sampler, args, labels, weights):
            for number, image in zip(numbers, images):
                if row[number] < kept:
                    array[row[number]] = image
                if args.png_dir:
                    save_picture(os.path.join(args.png_dir, f"{number:06d}.png"), [[image]], gap=0)
        asked_to_stop()                                        # all processes wait here
        if world()[0]:
            return
        if args.npz:
            more = {"arr_1": labels[np.argsort(row)]} if sampler.config.num_classes else {}
            daes.write(args.npz, lambda file: np.savez(file, arr_0=array, **more))
        if out:
            save_samples(sampler, out, [np.array(array[i]) for i in row[shown]], labels[shown])
    say(f"{n} samples of {size}x{size} pixels: " + " ".join(filter(None, (args.npz, out, args.png_dir))))

@contextlib.contextmanager
def shared_array(path, shape):
    """uint8 in a temporary file, which several processes fill: it may be larger than memory."""
    try:
        if world()[0] == 0:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            with open(path, "wb") as file:
                file.truncate(math.prod(shape))
                if hasattr(os, "posix_fallocate"):             # a full disk is an error now, no crash later
                    os.posix_fallocate(file.fileno(), 0, math.prod(shape))
        asked_to_stop()                                        # the others wait until it is there
        yield np.memmap(path, np.uint8, "r+", shape=shape)
    finally:
        if world()[0] == 0 and os.path.exists(path):
            os.remove(path)

def save_samples(sampler, path, images, labels):
    """The grid of samples: a row per class, or a square of one class."""
    several, groups = len(set(labels.tolist())) > 1, {}
    columns = math.ceil(math.sqrt(len(images)))
    for i, image in enumerate(images):
        groups.setdefault(int(labels[i]) if several else i // columns, []).append(image)
    save_grid(path, list(groups.values()), row_names=[sampler.name(c) for c in groups] if several else None)

# ---------------------------------------------------------------- manipulation (Section 5)
def reconstruct(sampler, args):
    """Images, what the autoencoder alone and with the LVAE make of them, and what its first k groups say."""
    total, config = sum(sampler.config.groups), sampler.config
    require(max(args.groups, default=0) <= total, f"--groups: this model has {total} latent groups")
    kept = {"+ LVAE": total} | {f"first {k} of {total}": k for k in args.groups}
    rows = {name: [] for name in ("original", "autoencoder", *kept)}
    for images, x, label in encoded(sampler, find_photos(sampler, args.images), args.batch, args.label):
        low_res, first = lvae.shrink(x, config) if config.upsample else None, len(rows["original"])
        noise, drawn = sampler.posterior(x, label), sampler.noise(args.seed, range(first, first + len(x)))
        rows["original"].extend(images)
        rows["autoencoder"].extend(sampler.decode(x))
        for name, k in kept.items():                           # the other groups are drawn
            rows[name].extend(sampler.images(noise[:k] + drawn[k:], label, low_res=low_res))
    save_grid(args.out, list(rows.values()), row_names=list(rows))
    say(f"{args.out}: {len(rows['original'])} images")

def interpolate(sampler, args):
    """Figure 5: a path from one image to another through whitened noise. The ends are their reconstructions.

    With a standard-normal prior the noise is the latent code; with a hierarchical one it is the
    reparameterisation that Section 5.2 leaves to future work. The label's embedding moves along.
    """
    (a, *b), x, label = next(encoded(sampler, find_photos(sampler, [args.a, args.b]), 2, args.label))
    require(b, "expected two usable images")
    ends, steps = sampler.posterior(x, label), torch.linspace(0, 1, args.steps, device=x.device)
    if sampler.config.num_classes:
        ends.append(sampler.model.embedding(label))            # (2, label_dim)
    mixed = [torch.stack([torch.lerp(end[0], end[1], t) for t in steps]) for end in ends]
    embedded = mixed.pop() if sampler.config.num_classes else None
    row = [a, *sampler.images(mixed, embedded), *b]
    save_grid(args.out, [row], column_names=["A", *(f"{float(t):.2f}" for t in steps), "B"])
    say(f"{args.out}: {args.steps} steps from A to B")

def channel_kl(out):
    """Mean KL of every latent group's channels in an Output: (L, z) nats, summed over positions."""
    return torch.stack([lvae.gaussian_kl(l.posterior, l.prior).sum((2, 3)).mean(0) for l in out.latents])

def manifold(sampler, args):
    """Figure 4: the most active channel of the first group and of the second, swept from -range to range."""
    require(sampler.model.sides[0] == 1 < sampler.config.groups[-1], "the model has no two groups at 1x1")
    label = sampler.label(args.label or "0") if sampler.config.num_classes else None
    if args.data is None:
        parts = [(None, sampler.generate(sampler.noise(args.seed, range(64)), label), label)]
    else:
        parts = encoded(sampler, find_images(sampler, args.data), args.batch, limit=256)
    kl = sum(len(x) * channel_kl(sampler.infer(x, some)) for _, x, some in parts)        # (L, z)
    across, down = kl[:2].argmax(1).tolist()
    values, rows = torch.linspace(-args.range, args.range, args.steps, device=sampler.device), []
    for value in values:
        noise = [eps.repeat(args.steps, 1, 1, 1) for eps in sampler.noise(args.seed, [0])]
        noise[0][:, across], noise[1][:, down] = values[:, None, None], value
        rows.append(sampler.images(noise, label))
    marks = [f"{float(value):.2f}" for value in values]
    save_grid(args.out, rows, row_names=marks, column_names=marks)
    say(f"{args.out}: across: group 1, channel {across}; down: group 2, channel {down}")

def outpaint(sampler, args):
    """Figure 6: the latents of every level from 4x4 up are widened with fresh noise."""
    side, extra = sampler.config.resolution, args.width - 1
    size = [side * args.width, side] if args.direction in ("down", "up") else [side, side * args.width]
    # Where the image stands in the larger one, in images from its top and from its left.
    above, before = {"up": (extra, 0), "left": (0, extra), "both": (0, extra / 2)}.get(args.direction, (0, 0))
    images, x, label = next(encoded(sampler, find_photos(sampler, [args.image]), 1, args.label))
    latents, outpainted = sampler.infer(x, label).latents, []

    def around(z, fresh):
        """A group's noise: fresh, but where the image stands what makes its z under the new prior."""
        h, w = z.shape[2:]
        top, left = int(above * h), int(before * w)
        here = np.s_[:, :, top:top + h, left:left + w]

        def eps(prior):
            if fresh.shape == z.shape:                         # a 1x1 group is kept whole
                return lvae.whiten(z, prior)
            fresh[here] = lvae.whiten(z, lvae.Gaussian(prior.mean[here], prior.var[here]))
            return fresh
        return eps
    for number in range(args.n):
        fresh = sampler.noise(args.seed, [number], size)
        noise = [around(latent.z, eps) for latent, eps in zip(latents, fresh)]
        outpainted.extend(sampler.images(noise, label, size=size))
    back = sampler.images([lvae.whiten(latent.z, latent.prior) for latent in latents], label)
    row = [*images, *back, *outpainted]
    save_grid(args.out, [row], column_names=["image", "reconstruction", *["outpainted"] * args.n])
    say(f"{args.out}: {args.n} of {row[-1].shape[1]}x{row[-1].shape[0]} pixels")

# ---------------------------------------------------------------- the rate of every group
def rates(sampler, args):
    """KL of every latent group and level beside its target, distortion, negative ELBO and active channels."""
    config, kl, distortion, count = sampler.config, 0, 0.0, 0
    torch.manual_seed(args.seed)
    images = find_images(sampler, args.data)
    for _, x, label in encoded(sampler, images, args.batch, args.label, args.n):
        out = sampler.infer(x, label, draw=True)
        kl, count = kl + len(x) * channel_kl(out), count + len(x)             # (L, z)
        distortion += float(lvae.distortions(out, x, config).sum())
    kl, distortion, target = (kl / count).cpu().numpy(), distortion / count, lvae.kl_shares(config).numpy()
    rate, sides = kl.sum(), np.repeat(sampler.model.sides, config.groups[::-1])          # (L,)
    rows = [(i + 1, side, [i]) for i, side in enumerate(sides)]
    rows += [("level", side, sides == side) for side in sampler.model.sides]
    print("group  level    KL nats   % of rate   target %        active channels")
    for name, side, mine in rows:
        nats, goal, active = kl[mine].sum(), target[mine].sum(), kl[mine] > 0.01
        print(f"{name:>5}  {f'{side}x{side}':7} {nats:8.2f}  {100 * nats / rate:9.1f}   "
              f"{goal:5.1f} - {2 * goal:5.1f}   {active.sum():2} of {active.size}")
    total = rate + distortion
    print(f"rate {rate:.2f} + distortion {distortion:.2f} = negative ELBO {total:.2f} nats per image, "
          f"{lvae.bits_per_dim(total, config):.4f} bits per dimension; {count} images\n"
          "target: where the schedule's weight is 1; active: mean KL above 0.01 nats")

# ---------------------------------------------------------------- metrics
NETWORK = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"

def load_network(path, device):
    """A TorchScript network of uint8 (B, 3, H, W) -> a function of uint8 (B, H, W, 3), which gives features
    (B, D) and class probabilities (B, K) or None. The network gives features, or features and logits; one
    with NETWORK's two options gives features with the first, probabilities with the second."""
    with explained(f"{path or '--features'}: expected a TorchScript network, such as {NETWORK}"):
        net = torch.jit.load(path, map_location=device).eval()
        options = {argument.name for argument in net.forward.schema.arguments}

    @torch.no_grad()
    def network(images):
        x = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).contiguous()
        with explained(f"{path}: expected a network for uint8 images {tuple(x.shape)}"):
            if {"return_features", "no_output_bias"} <= options:
                out = net(x, return_features=True), net(x, no_output_bias=True)
            else:
                out = net(x)
                out = (out, None) if torch.is_tensor(out) else (out[0], out[1].float().softmax(1))
            return [None if t is None else t.flatten(1).float().cpu().numpy() for t in out]
    return network

def frechet(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|² + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^½), of two Gaussians (Heusel et al., 2017)."""
    s1, s2 = (torch.from_numpy(np.asarray(s, np.float64)) for s in (sigma1, sigma2))
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T    # root s2 root is symmetric, and has the
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp_min(0).sqrt().sum()  # eigenvalues of s1 s2
    return max(0.0, float(np.square(mu1 - mu2).sum() + s1.trace() + s2.trace() - 2 * cross))

def inception_score(probabilities, split=5000):
    """exp of the mean KL between each image's class probabilities (N, K) and their split's mean, averaged
    over splits of 5000, as the guided-diffusion evaluator does (Salimans et al., 2016)."""
    scores = []
    for i in range(0, len(probabilities), split):
        p = np.maximum(probabilities[i:i + split].astype(np.float64), 1e-38)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores))

def precision_recall(reference, samples, device, k=3):
    """Share of samples within the k-nearest-neighbour balls of the reference, and the reverse (Kynkäänniemi
    et al., 2019). Features (N, D) and (M, D), more than k of each."""
    device = device if device.type == "cuda" else "cpu"        # for float64
    a, b = (torch.from_numpy(features).to(device).double() for features in (reference, samples))

    def within(points, centres):                               # k + 1 nearest: the first is the point itself
        radii = torch.cat([torch.cdist(p, centres).kthvalue(k + 1).values for p in centres.split(1000)])
        inside = torch.cat([(torch.cdist(p, centres) <= radii).any(1) for p in points.split(1000)])
        return float(inside.double().mean())
    return within(b, a), within(a, b)

def npz_images(path, batch):
    """arr_0 of an .npz, batches of uint8 (B, H, W, 3), piece by piece: it may be larger than memory."""
    with explained(f"{path}: expected arr_0, uint8 (N, H, W, 3)"), zipfile.ZipFile(path) as archive:
        file = archive.open("arr_0.npy")
        major, minor = np.lib.format.read_magic(file)
        shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{major}_{minor}")(file)
        require(shape[3:] == (3,) and shape[0] and dtype == np.uint8, f"it is {dtype} {shape}")
        if fortran:                                            # no pieces of it are images
            whole = np.load(path)["arr_0"]
            yield from np.split(whole, range(batch, len(whole), batch))
        while not fortran and (data := file.read(batch * math.prod(shape[1:]))):
            yield np.frombuffer(data, np.uint8).reshape(-1, *shape[1:])

def common_side(paths):
    """The side at which images are compared: an .npz's, if one says it, else that of all those in folders."""
    sides, folders = set(), [path for path in paths if not path.endswith(".npz")]
    for path in [path for path in paths if path not in folders]:
        with explained(f"{path}: expected an .npz"), np.load(path) as file:
            if "arr_0" in file.files:
                return next(npz_images(path, 1)).shape[1]
            if "side" in file.files:
                return int(file["side"])
    for name in itertools.chain(*(open_images(path, 8).names for path in folders)):
        with contextlib.suppress(Exception), Image.open(name) as image:
            sides.add(min(image.size))
    extremes = f"from {min(sides)} to {max(sides)} pixels" if sides else "unknown"
    require(len(sides) == 1 or not folders,
            f"{', '.join(folders)}: the images' short sides are {extremes}: say the --image-size")
    return max(sides, default=None)

def described(parts, network, shuffle=False):
    """Batches of images -> what is known of them: features, their moments, class probabilities, and the mean
    saturation of their colours (HSV). shuffle: they are sorted, and the Inception Score goes by parts."""
    rows = []
    for images in parts:
        top, low = np.max(images, axis=3).astype(float), np.min(images, axis=3)          # (B, H, W)
        rows.append((*network(images), ((top - low) / np.maximum(top, 1)).mean((1, 2))))
    features, probabilities, saturation = (None if part[0] is None else np.concatenate(part)
                                           for part in zip(*rows))
    known = {"mu": features.mean(0, dtype=np.float64), "features": features, "side": top.shape[1],
             "sigma": np.cov(features, rowvar=False, dtype=np.float64), "saturation": saturation.mean()}
    if probabilities is not None and shuffle:
        probabilities = np.random.default_rng(0).permutation(probabilities)
    return known if probabilities is None else known | {"probabilities": probabilities}

def statistics(path, network, batch, size):
    """What is known of the images of an .npz, or of a folder. A reference batch has its mu and sigma."""
    if not path.endswith(".npz"):
        parts = batches(open_images(path, size), batch)
        return described((some for _, some in parts), network, shuffle=True)
    with explained(f"{path}: expected arr_0 (images), or finite mu and sigma"), np.load(path) as file:
        names, images = {"mu", "sigma", "features", "probabilities", "saturation", "side"}, "arr_0" in file
        given = {name: file[name] for name in names & set(file)}
        require(all(np.isfinite(value).all() for value in given.values()), "they are not finite")
        require(images or {"mu", "sigma"} <= given.keys(), f"it holds {file.files}")
    return (described(npz_images(path, batch), network) if images else {}) | given

def compared(found, reference, device):
    """The metrics that two sets of statistics allow; reference may be empty."""
    row = {}
    if reference:
        with explained(f"--reference: expected {len(found['mu'])} features' statistics, as --features gives"):
            row["FID"] = frechet(found["mu"], found["sigma"], reference["mu"], reference["sigma"])
    if "probabilities" in found:
        row["IS"] = inception_score(found["probabilities"])
    sets = [known.get("features", ()) for known in (reference, found)]
    if min(map(len, sets)) > 3:
        row["precision"], row["recall"] = precision_recall(*sets, device)
    if "saturation" in found:
        row["saturation"] = found["saturation"]
    return row

def made(sampler, args, labels, weights):
    """Batches of samples, or of what the autoencoder, alone or with the LVAE, makes of --data."""
    if not args.reconstruct:
        yield from (images for _, images in draw_all(sampler, args, labels, weights))
    elif args.reconstruct == "autoencoder":
        for _, images in batches(find_images(sampler, args.data), args.batch, args.n):
            yield sampler.decode(sampler.latents(images))
    else:
        for _, x, label in encoded(sampler, find_images(sampler, args.data), args.batch, args.label, args.n):
            yield sampler.images(sampler.posterior(x, label), label)

def evaluate(sampler, args):
    """Table 3: FID, Inception Score, precision and recall as the guided-diffusion evaluator defines them.

    Of a checkpoint's samples (each combination of the guidance weights and temperatures given) or
    reconstructions, an .npz or a folder, against an .npz (a reference batch of that evaluator, or one
    exported here) or a folder. Saturation is the mean of HSV's: guidance at 1x1 saturates colours.
    """
    device = setup(args.device)[0]
    network, settings = load_network(args.features, device), [{}]
    if sampler:
        settings = [{}] if args.reconstruct else guidance_settings(sampler, args)
        size = args.image_size or (sampler.size if args.reconstruct else sampler.out_size)
        # Shuffled, because the Inception Score is taken over consecutive parts.
        order = np.random.default_rng(args.seed).permutation(args.n)
        labels = even_labels(sampler.labels(args.label), args.n)[order]
    else:
        size = args.image_size or common_side([path for path in (args.source, args.reference) if path])
    require(len(settings) == 1 or not args.export, "--export writes the statistics of one setting only")
    reference = statistics(args.reference, network, args.batch, size) if args.reference else {}
    for i, weights in enumerate(settings):
        if sampler:
            found = described(made(sampler, args, labels, weights), network)
        else:
            found = statistics(args.source, network, args.batch, size)
        texts = [":".join(f"{w:g}" for w in np.atleast_1d(value)) for value in weights.values()]
        row = dict(zip(("w_mu", "w_sigma", "temperature"), texts))
        row |= {name: f"{value:.4f}" for name, value in compared(found, reference, device).items()}
        if i == 0:
            side = f"images of {found['side']}x{found['side']}, " if "side" in found else ""
            say(f"{args.source}: {side}{len(found['mu'])} features")
            print("  ".join(f"{name:>12}" for name in row))
        print("  ".join(f"{text:>12}" for text in row.values()), flush=True)
    if args.export:
        daes.write(args.export, lambda file: np.savez(file, **found))
        say(f"{args.export}: the statistics of {args.source}")

def neighbors(sampler, args):
    """Figure 8: samples, and the training images nearest to them in latent space, or in features."""
    weights, = guidance_settings(sampler, args)
    images, labels = find_images(sampler, args.data), even_labels(sampler.labels(args.label), args.n)
    network = load_network(args.features, sampler.device) if args.features else None

    def features(some):                                        # (B, D) float64
        found = torch.from_numpy(network(some)[0]) if network else sampler.latents(some).flatten(1).cpu()
        return found.double()
    drawn = [some for _, some in draw_all(sampler, args, labels, weights)]
    targets, found, distances = torch.cat([features(some) for some in drawn]), [], []
    for rows, some in batches(images, args.batch):
        found += rows
        distances.append(torch.cdist(targets, features(some)))                # (n, B)
    nearest = torch.cat(distances, 1).topk(min(args.neighbors, len(found)), largest=False)
    rows = [[found[i] for i in order] for order in nearest.indices]
    grid = [[image, *map(images.read, row)] for image, row in zip(np.concatenate(drawn), rows)]
    names = [sampler.name(c) for c in labels] if sampler.config.num_classes else None
    save_grid(args.out, grid, row_names=names, column_names=["sample", "nearest"])
    say(f"{args.out}: {args.n} samples and the nearest of {len(found)} images")
    for number, (row, values) in enumerate(zip(rows, nearest.values)):
        say(f"  {number}: " + ", ".join(f"{images.names[i]} ({d:.2f})" for i, d in zip(row, values)))

# ---------------------------------------------------------------- speed (Table 4)
def bench(sampler, args):
    """Table 4: seconds per 1000 images, FLOP, and the share of the device's fastest matrix product."""
    config, device, guided = sampler.config, sampler.device, sampler.can_guide and args.guided
    weights = dict(mean_guidance=lvae.guidance_levels(config, 1.5), variance_guidance=3.0) if guided else {}
    (x, label), noise = random_batch(config, args.batch, device), sampler.noise(0, range(args.batch))
    low_res = lvae.shrink(x, config) if config.upsample else None

    def model(n):
        small = None if low_res is None else low_res[:n]
        sampler.generate([eps[:n] for eps in noise], label[:n], low_res=small, **weights)

    def row(name, flop, seconds):                              # of one image
        print(f"{name:9} {flop / 1e9:15.4g} {1000 * seconds:19.2f} {flop / seconds / peak:14.1%}")
    total, peak = np.zeros(2), matmul_rate(device, sampler.dtype)
    kind = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{args.source}: {sampler.size}x{sampler.size} images, {'' if guided else 'not '}guided, batch "
          f"{args.batch}, {str(sampler.dtype)[6:]}, {'' if sampler.compiled else 'not '}compiled; "
          f"{kind}, peak {peak / 1e12:.3f} TFLOP/s (matrix product)")
    print("stage     GFLOP per image   s per 1000 images  share of peak")
    for name, stage in {"LVAE": model, "decoder": lambda n: sampler.decode(x[:n])}.items():
        seconds = timed(lambda: stage(args.batch), device, args.seconds)
        cost = np.array([count_flops(lambda: stage(1)), np.median(seconds) / args.batch])
        total += cost
        row(name, *cost)
    row("together", *total)
    if args.train:
        seconds = timed(training_step(sampler, args.train), device, args.seconds)
        row("training", count_flops(training_step(sampler, 1)), np.median(seconds) / args.train)
        print(f"{args.train / np.median(seconds):.2f} images/s in training")
    print(f"peak memory {peak_memory(device) / 2 ** 30:.2f} GiB")

def random_checkpoint(name):
    """An untrained model of a preset, in the form of a checkpoint."""
    config = lvae.PRESETS[name]
    stage = daes.PRESETS.get("small-f4" if config.first_stage == "train" else config.first_stage)
    return {"config": config, "dataset": name, "run": {}, "classes": [],
            "ema": lvae.LVAE(config).state_dict(),
            "dae": daes.Autoencoder(stage).state_dict() if stage else {}}

def random_batch(config, n, device):
    """Data (n, C, side, side) and labels (n,)."""
    x = torch.randn(n, config.data_channels, config.resolution, config.resolution, device=device)
    return x, torch.arange(n, device=device) % max(1, config.num_classes)

def training_step(sampler, n):
    """A function that does a training step of n samples with a new model like the sampler's."""
    model = place(lvae.LVAE(sampler.config).train(), sampler.device)
    ema, optimizer = copy.deepcopy(model).eval(), lvae.make_optimizer(model)
    if sampler.compiled:
        model.compile(dynamic=False)
    x, label = random_batch(sampler.config, n, sampler.device)
    return lambda: lvae.train_step(model, ema, optimizer, [(x, sampler.known(label))], 1, sampler.dtype)

def count_flops(function):
    """The floating-point operations of a call, 2 for each multiplication with an addition."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    eager = torch.compiler.set_stance("force_eager")           # what is compiled cannot be counted
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), eager:
        function()
    return counter.get_total_flops()

def matmul_rate(device, dtype):
    """FLOP/s of the device's fastest large square matrix product: its peak, as measured."""
    rates = []
    for n in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        rates.append(2 * n ** 3 / min(timed(lambda: a @ b, device, 0.5)))
    return max(rates)

def timed(function, device, budget):
    """The seconds of calls, after one to warm up: of 3 at least, and for `budget` seconds."""
    times = []
    while len(times) < 4 or sum(times[1:]) < budget:
        started = time.perf_counter()
        function()
        if device.type in ("cuda", "mps"):
            getattr(torch, device.type).synchronize()
        times.append(time.perf_counter() - started)
    return times[1:]

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
        folder = next(folder for folder in Path(text).absolute().parents if folder.exists())
        if os.path.isdir(text) or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise argparse.ArgumentTypeError(f"{text}: cannot be written")
        if not text.lower().endswith(endings):
            raise argparse.ArgumentTypeError(f"{text}: expected a name that ends in {' or '.join(endings)}")
        return text
    return name

def several(kind):
    """argparse type: A,B,.. -> a list."""
    def values(text):
        return [kind(word) for word in text.split(",")]
    return values

def levels(text):
    """Weights of guidance: a number, or A:B:.. one per level."""
    values = [float(word) for word in text.split(":")]
    return values if len(values) > 1 else values[0]

def weights(text):
    """argparse type: one setting of guidance, a number or A,B,.. one per level, in a list."""
    return [levels(text.replace(",", ":"))]

positive, whole, amount = at_least(1), at_least(0), at_least(0, float)
picture, table = writable(".png", ".jpg", ".webp"), writable(".npz")
# Name, kind, default, explanation. A kind that is a tuple is a choice, list is one or more, bool a switch.
COMMON = [
    ("--batch", positive, 16, "images at a time"), ("--seed", whole, 0, "of the noise"),
    ("--device", str, "auto", "cuda, mps, cpu, xla, .."),
    ("--precision", ("auto", "bf16", "fp32"), "auto", "of the convs; auto: bf16 where the hardware has it"),
    ("--compile", bool, None, "torch.compile: takes minutes (on CUDA: for bench, and 1000 images or more)"),
    ("--dae", str, None, "autoencoder file, instead of the one in the checkpoint")]
CLASSES = ("--label", str, None, "classes by name, unique beginning or number, by commas; none (all)")
UPSAMPLER = ("--upsampler", str, None, "checkpoint of an upsampler, to enlarge the samples (Table 1)")
GUIDED = [
    CLASSES,
    ("--mean-guidance", weights, None, "w_mu, or one per level, coarsest first (0; ImageNet: the paper's)"),
    ("--variance-guidance", weights, None, "w_sigma, likewise"),
    ("--temperature", amount, 1.0, "multiplies the std of every prior")]
FEATURES = ("--features", str, None, f"TorchScript network, such as {NETWORK}")
LABEL = ("--label", str, None, "the images' class; else the folder's name if it is a class, or the likeliest")
DATA = ("--data", str, None, "folder of images, LSUN LMDB folder, or 'toy' (what the model was trained on)")
COMMANDS = {
    generate: GUIDED + [
        UPSAMPLER,
        ("--n --samples", positive, None, "how many (8 per class, 16 at least); under torchrun: --samples"),
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
        ("--width", positive, 2, "in images; the height, if it grows down or up")],
    rates: [DATA, LABEL, ("--n", positive, 1000, "images, evenly spaced")],
    evaluate: [
        CLASSES, UPSAMPLER, FEATURES, DATA,
        ("--reference", str, None, ".npz (mu and sigma, or arr_0, or both) or folder of images"),
        ("--n", positive, 10_000, "samples of a checkpoint; the paper's figures are of 50000"),
        ("--reconstruct", ("autoencoder", "lvae"), None, "not samples, but what it makes of --data"),
        ("--mean-guidance", several(levels), None, "w_mu, one or several; a:b:c per level"),
        ("--variance-guidance", several(levels), None, "w_sigma, likewise"),
        ("--temperature", several(amount), [1.0], "one or several (1)"),
        ("--image-size", positive, None, "side to crop folders' images to (that of the images evaluated)"),
        ("--export", table, None, ".npz for their statistics, to be a --reference")],
    neighbors: GUIDED + [
        FEATURES, DATA, ("--out", picture, "neighbors.png", "the picture"),
        ("--n", positive, 8, "samples"), ("--neighbors", positive, 6, "neighbours of each")],
    bench: [
        ("--guided", bool, True, "with guidance, if the model can"),
        ("--seconds", amount, 5.0, "to time each stage for"),
        ("--train", positive, None, "also time a training step of so many images: it takes more memory")]}
SOURCE = "checkpoint, or church, bedroom, imagenet; to evaluate also .npz or folder; to bench also a preset"

def main(argv=None):
    """The command line."""
    parser = daes.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for function, options in COMMANDS.items():
        text = function.__doc__
        own = commands.add_parser(function.__name__, help=text.splitlines()[0], description=text)
        own.add_argument("source", help=SOURCE)
        for name, kind, default, text in options + COMMON:
            more = {"choices" if isinstance(kind, tuple) else "type": kind}
            if kind is bool:
                more = {"action": argparse.BooleanOptionalAction}
            if kind is list:
                more = {"nargs": "+"}
            text = text if default is None or isinstance(default, list) else f"{text} ({default})"
            own.add_argument(*name.split(), default=default, help=text, **more)
        own.set_defaults(function=function)
    args = parser.parse_args(argv)
    if args.command != "generate" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{args.command} runs in one process: start it with python, not torchrun")
    images = args.source.endswith(".npz") or args.source == "toy" or os.path.isdir(args.source)
    args.function(None if images and args.command == "evaluate" else make_sampler(args), args)

if __name__ == "__main__":
    cli(main)
