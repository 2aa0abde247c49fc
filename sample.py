"""Look at a trained model: a sub-command per figure and table of the paper. CKPT is a checkpoint, ours or theirs.

    python sample.py generate CKPT                                              # a grid, a row per class
    python sample.py generate CKPT --label castle --n 16 --mean-guidance 1.5 --variance-guidance 1
    python sample.py generate CKPT --mean-guidance 0,1.5,1.5,1.5                # per level, coarsest first
    python sample.py generate CKPT --n 50000 --npz samples.npz                  # for the guided-diffusion evaluator
    python sample.py generate RGB16 --upsampler UPSAMPLER                       # the upsampling stack of Table 1
    python sample.py generate inet_pipeline.pt --label tench                    # the authors' weights, as published
    python sample.py reconstruct CKPT photo.jpg ... --groups 2,6                # originals above reconstructions
    python sample.py interpolate CKPT a.jpg b.jpg                               # Figure 5
    python sample.py manifold CKPT                                              # Figure 4
    python sample.py outpaint CKPT photo.jpg --width 2                          # Figure 6
    python sample.py neighbors CKPT --data photos/                              # Figure 8
    python sample.py rates CKPT --data photos/                                  # what every latent group holds
    python sample.py evaluate CKPT --reference photos/ --features NETWORK.pt    # Table 3: FID, IS, precision, recall
    python sample.py bench CKPT                                                 # Table 4: seconds per 1000 images

Guidance (Eq. 2) is 0 when off. A sample depends on the seed, its number and its label, not on the batch it is made in.
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
from train import (Parser, barrier, cli, load_checkpoint, open_images, place, read_image, relabel, save_picture, setup,
                   to_tensor, to_uint8, world)

NETWORK = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"

# ---------------------------------------------------------------- the model

class Sampler:
    """A checkpoint's EMA weights and autoencoder, on a device: noise, labels or images in, uint8 images out.

    dae: an autoencoder's file, instead of the checkpoint's own; upsampler: a checkpoint that enlarges the samples;
    state: the content of a checkpoint, instead of the file. Raises ValueError where these do not fit each other.
    """

    def __init__(self, path, device="auto", precision="auto", dae=None, upsampler=None, state=None):
        state = state or load_checkpoint(path)
        self.device, self.dtype = setup(device, precision)
        self.config, self.dataset, self.data = state["config"], state["dataset"], state["run"].get("data")
        self.folders = self.classes = state["classes"]         # the names of the folders it was trained on, if any
        synsets = all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in self.folders)
        if self.config.num_classes == 1000 and synsets and (self.folders or self.dataset == "imagenet"):
            self.classes = imagenet_classes()
        self.model = daes.fill(lambda: lvae.LVAE(self.config), state["ema"], path)
        self.dae = (daes.load(dae) if dae else daes.from_state(state["dae"], path) if state["dae"] else
                    daes.Identity() if self.config.first_stage == "none" else None)
        if self.dae is None or self.dae.config.z_channels != self.config.data_channels:
            has = f"its autoencoder has {self.dae.config.z_channels}" if self.dae else "it holds no autoencoder"
            raise ValueError(f"{path} models latents of {self.config.data_channels} channels, but {has}: name one that fits "
                             "with --dae FILE")
        for module in (self.model, self.dae):
            place(module, self.device, self.dtype).requires_grad_(False)
        self.is_compiled = False
        self.can_guide = bool(self.config.num_classes and self.config.hierarchical_prior)
        self.sides = lvae.resolutions(self.config)[::-1]       # of the levels, coarsest first
        self.size = self.out_size = self.config.resolution * self.dae.config.f     # side of the images, in pixels
        self.upsampler = Sampler(upsampler, device, precision) if upsampler else None
        if upsampler:
            self.out_size = self.upsampler.size
            if self.size * self.upsampler.config.upsample != self.out_size:
                raise ValueError(f"--upsampler {upsampler}: not an upsampler of images of {self.size} pixels")

    def compile(self):
        """Compile what generates, for one size of batch and one setting of guidance: it takes minutes."""
        self.is_compiled = True
        self.model.generate, self.dae.decode = compiled(self.model.generate), compiled(self.dae.decode)
        if self.upsampler:
            self.upsampler.compile()

    def noise(self, seed, numbers, size=None):
        """Whitened noise of samples `numbers`, a list of (B, z, h, w), top-down; a stream of the host's per sample."""
        streams = [np.random.default_rng((*np.atleast_1d(seed), int(number))) for number in numbers]
        drawn = [np.stack([stream.standard_normal(shape, np.float32) for stream in streams])
                 for shape in self.model.latent_shapes(size)]
        return [torch.from_numpy(eps).to(self.device) for eps in drawn]

    def means(self, n):
        """The posterior's eps that give its means: zeros, a list of (n, z, h, w)."""
        return [torch.zeros(n, *shape, device=self.device) for shape in self.model.latent_shapes()]

    def draw(self, seed, numbers, label, **guidance):
        """Samples `numbers` of a seed, with labels (B,) or None -> uint8 (B, H, W, 3)."""
        images = self.images(self.noise(seed, numbers), label, **guidance)
        up = self.upsampler
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
    def latents(self, images):
        """uint8 (B, H, W, 3) -> normalised latents (B, C, h, w)."""
        with lvae.autocast(self.device, self.dtype):
            h = self.dae.encode(to_tensor(images).to(self.device))
        return lvae.normalise(h, self.config)

    @torch.no_grad()
    def posterior(self, x, label, low_res=None):
        """Latents x (B, C, h, w) -> the whitened noise of the posterior's means, a list of (B, z, h, w)."""
        with lvae.autocast(self.device, self.dtype):
            return self.model.encode(x, label, self.means(len(x)), low_res)

    @torch.no_grad()
    def infer(self, x, label, noise=None):
        """Latents x (B, C, h, w) -> the lvae.Output of a training pass. noise: the posterior's, None draws it."""
        with lvae.autocast(self.device, self.dtype):
            return self.model(x, label, noise)

    @torch.no_grad()
    def decode(self, x):
        """Normalised latents (B, C, h, w) -> uint8 images (B, H, W, 3).

        A few at a time: decoding is what takes memory, and a CPU is fastest at what fits its caches.
        """
        pixels = {"cpu": 1, "cuda": 16}.get(self.device.type, 4) * 256 ** 2
        parts = x.split(max(1, pixels // (x.shape[2] * x.shape[3] * self.dae.config.f ** 2)))
        with lvae.autocast(self.device, self.dtype):
            return np.concatenate([to_uint8(self.dae.decode(lvae.denormalise(part, self.config))) for part in parts])

    def label(self, text):
        """A class by its name, a unique beginning of it, or its number; 'none' is no label. Raises ValueError."""
        count, low = self.config.num_classes, [name.lower() for name in self.classes]
        for known in (self.classes, self.folders, low):
            for spelled in (text, text.lower()):
                if count and spelled in known:
                    return known.index(spelled)
        if text.isascii() and text.isdigit() and int(text) < count:
            return int(text)
        if count and text == "none":
            return count
        starts = [i for i, name in enumerate(low) if text and name.startswith(text.lower())]
        if count and len(starts) == 1:
            return starts[0]
        names = [self.classes[i] for i in starts] or self.classes
        expected = f"0 to {count - 1}, none, {', '.join(names[:20])} .." if count else "nothing, this model is unconditional"
        raise ValueError(f"--label {text}: {'fits several classes' if starts else 'no such class'}; expected {expected}")

    def likeliest(self, x):
        """The class under which the latents x (1, C, h, w) cost the fewest nats: the encoder needs some label."""
        count = self.config.num_classes
        x = x.expand(count, -1, -1, -1)
        out = self.infer(x, torch.arange(count, device=self.device), self.means(count))
        return int((lvae.distortions(out, x, self.config) + out.kl.sum(0)).argmin())

    def name(self, label):
        """The name of a class, to be shown."""
        if label == self.config.num_classes:
            return "no label"
        return self.classes[label] if label < len(self.classes) else str(label)

def imagenet_classes():
    """The names of ImageNet's classes, 0 to 999."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "imagenet_classes.txt")
    with open(path, encoding="utf-8") as file:
        return file.read().splitlines()

def compiled(function):
    """torch.compile(function), which returns a tensor, for inputs of one size, its kernels launched as CUDA graphs."""
    fast = torch.compile(function, dynamic=False, mode="reduce-overhead")

    def call(*inputs, **options):
        torch.compiler.cudagraph_mark_step_begin()
        return fast(*inputs, **options).clone()                # the next run of a graph writes over what this one gave
    return call

def make_sampler(args, upsamples=False):
    """The sampler of the command line. upsamples: the command can use a model that only enlarges images."""
    sampler = Sampler(args.source, args.device, args.precision, args.dae, getattr(args, "upsampler", None))
    if sampler.config.upsample and not upsamples:
        raise ValueError(f"{args.source} is an upsampler, which draws no image by itself: pass it as --upsampler")
    set_up(sampler, args, many=args.command == "generate" and (args.n or 0) >= 1000)
    return sampler

def set_up(sampler, args, many):
    """Compile if asked to, or on CUDA if there are `many` images to make, and print what the sampler runs on."""
    device = sampler.device
    if args.compile or args.compile is None and many and device.type == "cuda":
        sampler.compile()
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    if world()[0] == 0:
        print(f"{args.command}: on {kind}, {torch.get_num_threads()} threads, convs in {str(sampler.dtype)[6:]}, "
              f"{'' if sampler.is_compiled else 'not '}compiled", flush=True)

def default_guidance(sampler, args):
    """(w_mu, w_sigma) where the command line leaves both open: 0, but the paper's for a model of ImageNet."""
    given = args.mean_guidance or args.variance_guidance or args.label == ["none"]
    if sampler.dataset == "imagenet" and sampler.can_guide and not given:
        return lvae.guidance_levels(sampler.config, 1.5), [3.0]
    return [0.0], [0.0]

def guidance(sampler, args, mean, variance, temperature):
    """Lists of one weight or one per level -> keyword arguments of `generate`. Raises ValueError."""
    sides = ", ".join(f"{side}x{side}" for side in sampler.sides)
    for name, values in (("mean", mean), ("variance", variance)):
        if len(values) not in (1, len(sampler.sides)):
            raise ValueError(f"--{name}-guidance takes one number or one per level ({len(sampler.sides)}: {sides})")
    if any(mean + variance) and (not sampler.can_guide or args.label == ["none"]):
        raise ValueError("guidance needs a class-conditional model with a hierarchical prior, and a label")
    return dict(mean_guidance=mean, variance_guidance=variance, temperature=temperature)

def given_guidance(sampler, args):
    """The one setting of guidance and temperature of the command line, as keyword arguments of `generate`."""
    mean, variance = default_guidance(sampler, args)
    return guidance(sampler, args, args.mean_guidance or mean, args.variance_guidance or variance, args.temperature)

def wanted_classes(sampler, args):
    """The classes of --label, or all of them."""
    return [sampler.label(text) for text in args.label] if args.label else list(range(sampler.config.num_classes))

def even_labels(classes, n):
    """n labels, as even as can be, class after class; None without classes."""
    return np.array(classes)[np.sort(np.arange(n) % len(classes))] if classes else None

def on_device(sampler, labels, rows):
    """Labels (N,) of the host, or None -> those of `rows` on the device, (B,), or None."""
    return None if labels is None else torch.from_numpy(labels[rows]).to(sampler.device)

# ---------------------------------------------------------------- images in, pictures out

def save_grid(path, rows, smallest=128, **names):
    """Save a grid; images smaller than `smallest` pixels are enlarged by a whole factor, to be seen from afar."""
    scale = max(1, -(-smallest // min(image.shape[0] for row in rows for image in row)))
    save_picture(path, [[image.repeat(scale, 0).repeat(scale, 1) for image in row] for row in rows], **names)

def read_photos(sampler, paths, label=None, needed=1):
    """Image files -> uint8 images, their latents x (B, C, h, w) and labels (B,) or None. Bad files are named, skipped.

    The label is the one given, or the image's folder if that is a class, or else the likeliest.
    """
    images, labels = [], []
    given, count = sampler.label(label) if label else None, sampler.config.num_classes
    for path in paths:
        try:
            images.append(read_image(path, sampler.size))
        except Exception as e:                                 # whatever a broken file provokes in Pillow
            print(f"skipped {path}: {e}", file=sys.stderr)
            continue
        folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
        labels.append(sampler.folders.index(folder) if given is None and folder in sampler.folders else given)
    if len(images) < needed:
        raise ValueError(f"no usable image, or too few: {len(images)}, expected {needed} or more")
    x = torch.cat([sampler.latents(images[i:i + 4]) for i in range(0, len(images), 4)])
    if not count:
        return images, x, None
    if count > 100 and None in labels:                         # too many to try each
        print("no class known for some images, the model takes them without: --label NAME says it", file=sys.stderr)
    for i, known in enumerate(labels):
        if known is None:
            labels[i] = count if count > 100 else sampler.likeliest(x[i:i + 1])
    return images, x, torch.tensor(labels, device=sampler.device)

def find_images(sampler, path):
    """The images of --data, or of the data that the model was trained on."""
    path = sampler.data if path is None else path
    if path is None:
        raise ValueError("name a folder of images with --data ('toy' is the built-in scenes)")
    return open_images(path, sampler.out_size)

def labels_of(sampler, images):
    """The model's labels of a set of images (N,), or None for an unconditional model.

    Without sub-folders, the folder's name is the class of all. Raises ValueError if they are not the model's classes.
    """
    if not sampler.config.num_classes:
        return None
    parents = {os.path.basename(os.path.dirname(os.path.abspath(name))) for name in images.names}
    if not images.classes and len(parents) == 1 and parents <= set(sampler.folders):
        return np.full(len(images.names), sampler.folders.index(parents.pop()))
    if sampler.folders or not 0 < len(images.classes) <= sampler.config.num_classes:
        relabel(images, sampler.folders, "the images")
    return images.labels                                       # without names, in the model's order

def batches(images, batch, limit=None, what="images"):
    """(Indices, uint8 images) of every batch of good images, or of `limit` of them, evenly spaced."""
    count, found = len(images.names), False
    rows = np.unique(np.linspace(0, count - 1, min(limit or count, count)).round().astype(int))
    for start in tqdm(range(0, len(rows), batch), desc=what, unit="batch", disable=len(rows) <= batch):
        read = [(i, images.read(i)) for i in rows[start:start + batch]]
        good = [(i, image) for i, image in read if image is not None]
        if good:
            found = True
            yield np.array([i for i, _ in good]), [image for _, image in good]
    if not found:
        raise ValueError("no usable image")

# ---------------------------------------------------------------- generate

def generate(args):
    """Draw samples: a grid to look at, an .npz for metrics, or a folder of PNGs."""
    sampler = make_sampler(args)
    weights, classes = given_guidance(sampler, args), wanted_classes(sampler, args)
    if not args.n and not args.label:
        classes = classes[:10]
    n = args.n or (8 * min(len(classes), 10) if classes else 16)
    labels = even_labels(classes, n)
    out = args.out or (None if args.npz or args.png_dir else "samples.png")
    # In the .npz the classes are shuffled, because the Inception Score is taken over consecutive parts.
    position = np.random.default_rng(args.seed).permutation(n) if args.npz else np.arange(n)
    kept = n if args.npz else min(n, args.grid) if out else 0
    with shared_array(f"{args.npz or out}.images.tmp", kept, sampler.out_size) as array:
        for numbers, images in draw_all(sampler, args, n, labels, weights):
            for number, image in zip(numbers, images):
                if position[number] < kept:
                    array[position[number]] = image
                if args.png_dir:
                    save_grid(os.path.join(args.png_dir, f"{number:06d}.png"), [[image]], smallest=1, gap=0)
        barrier()
        if world()[0]:
            return
        if args.npz:
            arrays = {"arr_0": array}
            if classes:
                arrays["arr_1"] = labels[np.argsort(position)]
            daes.write(args.npz, lambda file: np.savez(file, **arrays))
            print(f"{args.npz}: {n} images {array.shape[1:]}" + (", labels" if classes else ""))
        if out:
            shown = [np.array(array[at]) for at in position[:args.grid]]
            save_samples(sampler, out, shown, labels, list(dict.fromkeys(classes)))
            print(f"{out}: {len(shown)} of {n} samples")
    if args.png_dir:
        print(f"{args.png_dir}: {n} PNG files")

def reserve(path):
    """Take a sparse file's space on the disk: a full disk is then an error now, not a crash later."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))

@contextlib.contextmanager
def shared_array(path, count, size):
    """Room for `count` images (None for 0) in a temporary file, which all processes fill, and which may be larger than
    memory."""
    if not count:
        yield None
        return
    first = world()[0] == 0
    try:
        if first:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            np.lib.format.open_memmap(path, "w+", np.uint8, (count, size, size, 3))
            reserve(path)
        barrier()
        yield np.lib.format.open_memmap(path, "r+")
    finally:
        if first and os.path.exists(path):
            os.remove(path)

def draw_all(sampler, args, n, labels, weights):
    """(Numbers, uint8 images) of every batch of samples 0 .. n - 1; under torchrun, of this process's share of them."""
    rank, count = world()
    starts = range(0, n, args.batch)[rank::count]
    for start in tqdm(starts, desc="sampling", unit="batch", disable=n <= args.batch or rank > 0):
        numbers = drawn = np.arange(start, min(start + args.batch, n))
        if sampler.is_compiled:                                # for batches of one size
            drawn = np.resize(numbers, min(n, args.batch))
        images = sampler.draw(args.seed, drawn, on_device(sampler, labels, drawn), **weights)
        yield numbers, images[:len(numbers)]

def save_samples(sampler, path, images, labels, classes):
    """The grid of samples: a row per class, in the order asked for, or a square of one class."""
    if len(classes) > 1:
        rows = [[image for image, label in zip(images, labels) if label == c] for c in classes]
        names = [sampler.name(c)[:20] for c, row in zip(classes, rows) if row]
        save_grid(path, [row for row in rows if row], row_names=names)
    else:
        columns = math.ceil(math.sqrt(len(images)))
        save_grid(path, [images[i:i + columns] for i in range(0, len(images), columns)])

# ---------------------------------------------------------------- manipulation (Section 5)

def psnr(a, b):
    """Peak signal-to-noise ratio of uint8 images, in dB."""
    return 10 * np.log10(255 ** 2 / max(np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2), 1e-9))

def reconstruct(args):
    """Images above what the autoencoder, and the autoencoder with the LVAE, make of them; with --groups k also what the
    first k latent groups say of them, the rest drawn from the prior."""
    sampler = make_sampler(args, upsamples=True)
    originals, x, label = read_photos(sampler, args.images, args.label)
    total = sum(sampler.config.groups)
    if max(args.groups, default=0) > total:
        raise ValueError(f"--groups: this model has {total} latent groups, not {max(args.groups)}")
    names = ["original", "autoencoder", "+ LVAE"] + [f"first {k} of {total}" for k in args.groups]
    rows = [originals] + [[] for _ in names[1:]]
    for start in range(0, len(x), args.batch):
        part = x[start:start + args.batch]                     # (B, C, h, w)
        low_res = lvae.shrink(part, sampler.config) if sampler.config.upsample else None
        some = None if label is None else label[start:start + args.batch]
        noise, drawn = sampler.posterior(part, some, low_res), sampler.noise(args.seed, range(start, start + len(part)))
        rows[1].extend(sampler.decode(part))
        rows[2].extend(sampler.images(noise, some, low_res=low_res))
        for row, k in zip(rows[3:], args.groups):
            row.extend(sampler.images(noise[:k] + drawn[k:], some, low_res=low_res))
    quality = psnr(originals, rows[2])
    if isinstance(sampler.dae, daes.Identity):
        del rows[1], names[1]
    save_grid(args.out, rows, row_names=names)
    print(f"{args.out}: {len(originals)} images, PSNR of the reconstructions {quality:.2f} dB")

def interpolate(args):
    """Figure 5: a path from one image to another through whitened noise. The ends are the images' reconstructions.

    With a standard-normal prior the noise is the latent code; with a hierarchical one it is the reparameterisation that
    Section 5.2 leaves to future work. The label's embedding moves along.
    """
    sampler = make_sampler(args)
    originals, x, label = read_photos(sampler, [args.a, args.b], args.label, needed=2)
    steps = torch.linspace(0, 1, args.steps, device=sampler.device)

    def path(ends):                                            # (2, ..) -> (steps, ..)
        return torch.stack([torch.lerp(ends[0], ends[1], t) for t in steps])
    noise = [path(eps) for eps in sampler.posterior(x, label)]
    label = None if label is None else path(sampler.model.embedding(label))    # (steps, label_dim)
    images = []
    for i in range(0, args.steps, args.batch):
        some = None if label is None else label[i:i + args.batch]
        images.extend(sampler.images([eps[i:i + args.batch] for eps in noise], some))
    names = ["A", *(f"{float(t):.2f}" for t in steps), "B"]
    save_grid(args.out, [[originals[0], *images, originals[1]]], column_names=names)
    print(f"{args.out}: A, {args.steps} steps, B; PSNR of the ends {psnr(originals[0], images[0]):.2f} and "
          f"{psnr(originals[1], images[-1]):.2f} dB")

def channel_kl(out):
    """Mean KL of every latent group's channels in an Output: (L, z) nats, summed over positions."""
    return torch.stack([lvae.gaussian_kl(l.posterior, l.prior).sum((2, 3)).mean(0) for l in out.latents])

def active_channels(sampler, args, label):
    """The most active channel of each of the first two groups, its share of the group's KL, and on what it was found."""
    torch.manual_seed(args.seed)
    kl = torch.zeros(2, sampler.config.z_dim, device=sampler.device)
    if args.data is not None:
        images, source = find_images(sampler, args.data), "data"
        known = labels_of(sampler, images)
        for rows, some in batches(images, args.batch, 256):
            out = sampler.infer(sampler.latents(some), on_device(sampler, known, rows))
            kl += len(rows) * channel_kl(out)[:2]
    else:
        source = "prior samples"
        for start in range(0, 128, args.batch):
            noise = sampler.noise(args.seed, range(start, min(start + args.batch, 128)))
            some = None if label is None else torch.full((len(noise[0]),), label, device=sampler.device)
            with lvae.autocast(sampler.device, sampler.dtype):
                x = sampler.model.generate(noise, some)
            kl += len(x) * channel_kl(sampler.infer(x, some))[:2]
    return kl.argmax(1).tolist(), (kl.max(1).values / kl.sum(1).clamp_min(1e-9)).tolist(), source

def manifold(args):
    """Figure 4: the most active channel of each of the first two groups, swept over linspace(-2.25, 2.25), all else
    fixed."""
    sampler = make_sampler(args)
    if sampler.sides[0] > 1 or sampler.config.groups[-1] < 2:
        raise ValueError("the manifold needs two latent groups at 1x1, and this model has fewer")
    label = sampler.label(args.label or "0") if sampler.config.num_classes else None
    (across, down), share, source = active_channels(sampler, args, label)
    values = torch.linspace(-args.range, args.range, args.steps)
    fixed, rows = sampler.noise(args.seed, [args.number]), []
    for value in values:
        noise = [eps.repeat(args.steps, 1, 1, 1) for eps in fixed]
        noise[0][:, across] = values[:, None, None].to(sampler.device)
        noise[1][:, down] = value
        rows.append([])
        for i in range(0, args.steps, args.batch):
            rows[-1].extend(sampler.images([eps[i:i + args.batch] for eps in noise], label))
    marks = [f"{float(value):.2f}" for value in values]
    save_grid(args.out, rows, row_names=marks, column_names=marks,
              title=f"across: group 1, channel {across};  down: group 2, channel {down}")
    print(f"{args.out}: group 1, channel {across} across ({share[0]:.0%} of the group's KL); group 2, channel {down} down "
          f"({share[1]:.0%}); KL over {source}" + (f"; class {sampler.name(label)}" if label is not None else ""))

def outpaint(args):
    """Figure 6: the latents of every level from 4x4 up are widened with fresh noise, the 1x1 groups are kept."""
    sampler = make_sampler(args)
    downwards = args.direction in ("down", "up")
    tall, wide = args.height or (2 if downwards else 1), args.width or (1 if downwards else 2)
    originals, x, label = read_photos(sampler, [args.image], args.label)
    latents = sampler.infer(x, label, sampler.means(1)).latents
    size = (tall * sampler.config.resolution, wide * sampler.config.resolution)
    # Where the image stands: its offset, in images.
    right = {"left": wide - 1, "both": (wide - 1) / 2}.get(args.direction, 0)
    below = {"up": tall - 1}.get(args.direction, 0)

    def around(z, fresh):
        """The noise of a group: fresh, but where the image stands what makes its z under the wider image's prior."""
        h, w = z.shape[2:]
        top, left = int(below * h), int(right * w)
        here = np.s_[:, :, top:top + h, left:left + w]

        def eps(prior):
            if fresh.shape == z.shape:                         # a 1x1 group is kept whole
                return lvae.whiten(z, prior)
            fresh[here] = lvae.whiten(z, lvae.Gaussian(prior.mean[here], prior.var[here]))
            return fresh
        return eps
    images = []
    for number in range(args.n):
        fresh = sampler.noise(args.seed, [number], size)
        noise = [around(latent.z, eps) for latent, eps in zip(latents, fresh)]
        images.extend(sampler.images(noise, label, size=size))
    reconstruction = sampler.images([lvae.whiten(l.z, l.prior) for l in latents], label)[0]
    names = ["image", "reconstruction", *["outpainted"] * args.n]
    save_grid(args.out, [[originals[0], reconstruction, *images]], column_names=names)
    top, left = int(below * sampler.size), int(right * sampler.size)
    kept = [image[top:top + sampler.size, left:left + sampler.size] for image in images]
    print(f"{args.out}: {images[0].shape[1]}x{images[0].shape[0]} pixels. The original region: PSNR "
          f"{np.mean([psnr(k, reconstruction) for k in kept]):.2f} dB to the reconstruction, "
          f"{np.mean([psnr(k, originals[0]) for k in kept]):.2f} dB to the image, whose reconstruction has "
          f"{psnr(reconstruction, originals[0]):.2f} dB")

# ---------------------------------------------------------------- the rate of every group

def rates(args):
    """KL of every latent group and level beside its target share, distortion, negative ELBO, active channels: on data."""
    sampler = make_sampler(args, upsamples=True)
    config, images = sampler.config, find_images(sampler, args.data)
    labels = labels_of(sampler, images)
    torch.manual_seed(args.seed)
    kl, distortion, count = 0, 0.0, 0
    for rows, some in batches(images, args.batch, args.n, "encoding"):
        x = sampler.latents(some)
        out = sampler.infer(x, on_device(sampler, labels, rows))
        kl = kl + len(x) * channel_kl(out)                     # (L, z)
        distortion += float(lvae.distortions(out, x, config).sum())
        count += len(x)
    kl, distortion, target = (kl / count).cpu().numpy(), distortion / count, lvae.kl_shares(config).numpy()
    rate, active = kl.sum(), kl > args.active
    sides = np.repeat(sampler.sides, config.groups[::-1])

    def print_row(name, side, mine):
        nats, goal = kl[mine].sum(), target[mine].sum()
        print(f"{name:>5}  {f'{side}x{side}':7} {nats:8.2f}  {100 * nats / max(rate, 1e-9):9.1f}   {goal:5.1f} - "
              f"{2 * goal:5.1f}   {active[mine].sum():2} of {active[mine].size}")
    print("group  level    KL nats   % of rate   target %        active channels")
    for group, side in enumerate(sides):
        print_row(group + 1, side, [group])
    for side in sampler.sides:
        print_row("level", side, sides == side)
    nats = np.array([rate + distortion, rate, distortion])
    total, of_rate, of_distortion = lvae.bits_per_dim(nats, config)
    print(f"rate {rate:.2f} + distortion {distortion:.2f} = negative ELBO {nats[0]:.2f} nats per image, {total:.4f} bits per "
          f"dimension of {space(sampler)} ({of_rate:.4f} + {of_distortion:.4f}); {count} images\n"
          f"target: where the schedule's weight is 1; active: mean KL above {args.active} nats")

def space(sampler):
    """What the model models, in words."""
    return "pixels" if isinstance(sampler.dae, daes.Identity) else "the autoencoder's latents"

# ---------------------------------------------------------------- metrics

@contextlib.contextmanager
def reading(path, expected):
    """Whatever a damaged or foreign file provokes is one line that says what was expected."""
    try:
        yield
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[-1]
        raise ValueError(f"{path}: expected {expected} ({reason[:120]})") from None

class Network:
    """A TorchScript network that gives images their features, and classes their probabilities if it can.

    Called with uint8 images (B, 3, H, W) it gives features (B, D), or a pair (features, logits). One with the options
    `return_features` and `no_output_bias`, such as NETWORK (which resizes images as the evaluator's does), gives both.
    """

    def __init__(self, path, device):
        with reading(path, f"a TorchScript network, such as {NETWORK}"):
            self.net = torch.jit.load(path, map_location=device).eval()
        self.both = {"return_features", "no_output_bias"} <= {a.name for a in self.net.forward.schema.arguments}
        self.path, self.device = path, device

    @torch.no_grad()
    def __call__(self, images):
        """uint8 images, (B, H, W, 3) -> features (B, D) float32, and probabilities (B, K) or None."""
        x = torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2).contiguous()
        with reading(self.path, f"a network for uint8 images (B, 3, {x.shape[2]}, {x.shape[3]})"):
            if self.both:
                features, p = self.net(x, return_features=True), self.net(x, no_output_bias=True)
            else:
                out = self.net(x)
                features, logits = (out, None) if torch.is_tensor(out) else out
                p = None if logits is None else logits.float().softmax(1)
            if not features.isfinite().all():
                raise ValueError("it gives no finite features")
        return features.flatten(1).float().cpu().numpy(), None if p is None else p.float().cpu().numpy()

def moments(features):
    """Mean and unbiased covariance of features (N, D), float64."""
    features = features.astype(np.float64)
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))

def frechet(mu1, sigma1, mu2, sigma2):
    """Fréchet distance of two Gaussians: |mu1 - mu2|² + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^½) (Heusel et al., 2017).

    (sigma1 sigma2)^½ has the trace of (R sigma2 R)^½ with R = sigma1^½, which is symmetric.
    """
    s1, s2 = (torch.from_numpy(np.asarray(s, np.float64)) for s in (sigma1, sigma2))
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp_min(0).sqrt().sum()
    return max(0.0, float(np.square(mu1 - mu2).sum() + s1.trace() + s2.trace() - 2 * cross))

def inception_score(probabilities, split=5000):
    """exp of the mean KL between each image's class probabilities (N, K) and their split's mean, averaged over
    consecutive splits of 5000, as the guided-diffusion evaluator does (Salimans et al., 2016)."""
    scores = []
    for i in range(0, len(probabilities), split):
        p = np.maximum(probabilities[i:i + split].astype(np.float64), 1e-38)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores))

def squared_distances(a, b):
    """(N, D) and (M, D) float64 -> (N, M)."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)

def precision_recall(reference, samples, k=3, device="cpu"):
    """Share of samples within the k-nearest-neighbour balls of the reference, and the reverse (Kynkäänniemi et al.,
    2019). Features (N, D) and (M, D), more than k of each."""
    a, b = (torch.from_numpy(features).to(device).double() for features in (reference, samples))

    def within(points, centres):
        # The (k+1)-th smallest distance, for the smallest is that to the point itself.
        radii = torch.cat([squared_distances(p, centres).kthvalue(k + 1, dim=1).values for p in centres.split(1000)])
        inside = torch.cat([(squared_distances(p, centres) <= radii).any(1) for p in points.split(1000)])
        return float(inside.double().mean())
    return within(b, a), within(a, b)

def npz_images(path, batch):
    """arr_0 of an .npz, batches of uint8 (B, H, W, 3), piece by piece: it may be larger than memory."""
    with reading(path, "arr_0, uint8 (N, H, W, 3)"), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = header[np.lib.format.read_magic(file)[0]](file)
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
            raise ValueError(f"it is {dtype} {shape}")
        for start in tqdm(range(0, shape[0], batch), desc="features", unit="batch", disable=shape[0] <= batch):
            n = min(batch, shape[0] - start)
            yield np.frombuffer(file.read(n * math.prod(shape[1:])), np.uint8).reshape(n, *shape[1:])

def side_of(path):
    """The side of a set of images, in pixels: of an .npz's, or of a folder's first image (its short one)."""
    if path.endswith(".npz"):
        return next(npz_images(path, 1)).shape[1]
    if path == "toy":
        return 64
    with Image.open(open_images(path, 256).names[0]) as image:
        return min(image.size)

def measured(parts, network):
    """Batches of two images or more -> what is known of them: features, moments and class probabilities."""
    pairs = [network(images) for images in parts]
    features = np.concatenate([f for f, _ in pairs])
    mu, sigma = moments(features)
    found = dict(mu=mu, sigma=sigma, features=features)
    if pairs[0][1] is not None:
        found["probabilities"] = np.concatenate([p for _, p in pairs])
    return found

def statistics(path, network, args, size=None):
    """What is known of the images of an .npz or a folder. An evaluator's reference batch brings its own mu and sigma.

    size: the side that a folder's images are cropped to, by default their own.
    """
    if not path.endswith(".npz"):
        images = open_images(path, args.image_size or size or side_of(path))
        found = measured((some for _, some in batches(images, args.batch, what="features")), network)
        if "probabilities" in found:                           # a folder is sorted: shuffled for the splits
            found["probabilities"] = np.random.default_rng(0).permutation(found["probabilities"])
        return found
    with reading(path, "an .npz with arr_0 (images), or mu and sigma"), np.load(path) as file:
        has_images = "arr_0" in file.files
        wanted = () if has_images else ("mu", "sigma")
        given = {k: file[k] for k in ("mu", "sigma", "features", "probabilities") if k in wanted or k in file.files}
        if not all(np.isfinite(value).all() for value in given.values()):
            raise ValueError("its statistics are not finite")
    return measured(npz_images(path, args.batch), network) | given if has_images else given

def evaluate(args):
    """Table 3: FID, Inception Score, precision and recall as the guided-diffusion evaluator defines them.

    Of a checkpoint's samples (each combination of the guidance weights and temperatures given), of an .npz or of a
    folder, against an .npz (a reference batch of that evaluator, or one exported here) or a folder.
    """
    network = Network(args.features, setup(args.device, args.precision)[0])
    reference, made, size, settings = None, None, None, [()]
    if args.source.endswith(".npz") or args.source == "toy" or os.path.isdir(args.source):
        made = statistics(args.source, network, args)
        if args.reference and not args.reference.endswith(".npz") and not args.image_size:
            size = side_of(args.source)                        # the reference's images get it too
    else:
        sampler = make_sampler(args)
        size, (mean, variance) = sampler.out_size, default_guidance(sampler, args)
        settings = list(itertools.product(args.mean_guidance or [mean], args.variance_guidance or [variance],
                                          args.temperature or [[1.0]]))
        weights = [guidance(sampler, args, m, v, t[0]) for m, v, t in settings]    # mistakes now, not after hours
    if args.export and len(settings) > 1:
        raise ValueError(f"--export writes the statistics of one setting, and {len(settings)} are asked for")
    if args.reference:
        reference = statistics(args.reference, network, args, size)
    for i, setting in enumerate(settings):
        found = made or sampled(sampler, network, args, weights[i])
        texts = [":".join(f"{value:g}" for value in values) for values in setting]
        row = dict(zip(("w_mu", "w_sigma", "temperature"), texts)) | compared(found, reference, network.device)
        if i == 0:
            print("  ".join(f"{name:>12}" for name in row))
        print("  ".join(f"{v:>12.4f}" if isinstance(v, float) else f"{v:>12}" for v in row.values()), flush=True)
    if args.reference and "precision" not in row:
        print("no precision and recall: they need features of more than 3 images on both sides")
    if args.export:
        daes.write(args.export, lambda file: np.savez(file, **found))
        print(f"{args.export}: the statistics of {args.source}")

def sampled(sampler, network, args, weights):
    """What is known of a checkpoint's samples under one setting of guidance and temperature."""
    labels = even_labels(wanted_classes(sampler, args), args.n)
    if labels is not None:                                     # shuffled: the Inception Score is over consecutive parts
        labels = np.random.default_rng(args.seed).permutation(labels)
    return measured((images for _, images in draw_all(sampler, args, args.n, labels, weights)), network)

def compared(found, reference, device):
    """The metrics that two sets of statistics allow; reference may be None."""
    row = {}
    if reference and reference["mu"].shape != found["mu"].shape:
        raise ValueError(f"the reference has {len(reference['mu'])} features, --features gives {len(found['mu'])}")
    if reference:
        row["FID"] = frechet(found["mu"], found["sigma"], reference["mu"], reference["sigma"])
    if "probabilities" in found:
        row["IS"] = inception_score(found["probabilities"])
    sets = [known["features"] for known in (reference or {}, found) if "features" in known]
    if len(sets) == 2 and min(map(len, sets)) > 3:
        device = device if device.type == "cuda" else "cpu"    # float64
        row["precision"], row["recall"] = precision_recall(*sets, device=device)
    return row

def neighbors(args):
    """Figure 8: samples, and the training images nearest to them in a feature space (by default the autoencoder's
    latents)."""
    sampler = make_sampler(args)
    weights = given_guidance(sampler, args)
    network = Network(args.features, sampler.device) if args.features else None
    images, encoder = find_images(sampler, args.data), sampler.upsampler or sampler

    def features(some):                                        # (B, D) float64
        found = torch.from_numpy(network(some)[0]) if network else encoder.latents(some).flatten(1).cpu()
        return found.double()
    labels = even_labels(wanted_classes(sampler, args), args.n)
    drawn = [some for _, some in draw_all(sampler, args, args.n, labels, weights)]
    targets, drawn = torch.cat([features(some) for some in drawn]), np.concatenate(drawn)
    nearest, index = torch.zeros(args.n, 0), torch.zeros(args.n, 0, dtype=torch.long)
    for rows, some in batches(images, args.batch, what="features"):
        distance = torch.cat([nearest, squared_distances(targets, features(some))], dim=1)
        index = torch.cat([index, torch.from_numpy(rows).expand(args.n, -1)], dim=1)
        nearest, order = distance.topk(min(args.neighbors, distance.shape[1]), largest=False)
        index = index.gather(1, order)                         # (n, neighbours)
    rows = [[image, *(images.read(int(i)) for i in row)] for image, row in zip(drawn, index)]
    save_grid(args.out, rows, column_names=["sample", *(f"{i + 1}." for i in range(index.shape[1]))],
              row_names=None if labels is None else [sampler.name(c)[:20] for c in labels])
    print(f"{args.out}: {args.n} samples and their {index.shape[1]} nearest of {len(images.names)} images, in "
          + (f"the features of {args.features}" if network else space(encoder)))
    for number, (distances, row) in enumerate(zip(nearest.sqrt(), index)):
        print(f"  {number}: " + ", ".join(f"{images.names[i]} ({d:.2f})" for d, i in zip(distances, row)))

# ---------------------------------------------------------------- speed (Table 4)

def bench(args):
    """Table 4: seconds per 1000 images of the LVAE and of the autoencoder's decoder, beside the arithmetic they take and
    the share of the device's peak (its fastest matrix product in the same type) that they reach; training with --train."""
    state = random_checkpoint(args.source) if args.source in lvae.PRESETS else None
    sampler = Sampler(args.source, args.device, args.precision, args.dae, state=state)
    config, device, dtype = sampler.config, sampler.device, sampler.dtype
    guided = sampler.can_guide if args.guided is None else args.guided
    options = dict(mean_guidance=lvae.guidance_levels(config, 1.5), variance_guidance=3.0) if guided else {}
    noise, x = sampler.noise(0, range(args.batch)), random_data(config, args.batch, device)
    label = random_labels(config, args.batch, device)
    low_res = lvae.shrink(x, config) if config.upsample else None

    def model(n):
        given = [None if t is None else t[:n] for t in (label, low_res)]
        sampler.model.generate([eps[:n] for eps in noise], given[0], low_res=given[1], **options)

    def decoder(n):
        sampler.decode(x[:n])
    stages = {"LVAE": model} | ({} if isinstance(sampler.dae, daes.Identity) else {"decoder": decoder})
    total = np.zeros(2)
    with lvae.autocast(device, dtype):
        flops = {name: count_flops(lambda: stage(1)) for name, stage in stages.items()}
        set_up(sampler, args, many=True)
        peak = matmul_rate(device, dtype)
        print(f"{args.source}: {sampler.size}x{sampler.size} images, {'guided' if guided else 'not guided'}, batch "
              f"{args.batch}; peak {peak / 1e12:.3f} TFLOP/s (matrix product)")
        print("stage     GFLOP per image   s per 1000 images    TFLOP/s   share of peak")
        for name, stage in stages.items():
            seconds = seconds_per_call(lambda: stage(args.batch), device, args.seconds) / args.batch
            total += flops[name], seconds
            print_rate(name, flops[name], seconds, peak)
    print_rate("together", *total, peak)
    print(f"peak memory {peak_memory(device) / 2 ** 30:.2f} GiB")
    if args.train:
        bench_training(config, device, dtype, args, peak, sampler.is_compiled)

def bench_training(config, device, dtype, args, peak, is_compiled):
    """A training step without accumulation, at a micro-batch of args.train, with its backward pass, Adam and average."""
    model = place(lvae.LVAE(replace(config, accumulate=1)).train(), device)
    ema, optimizer = copy.deepcopy(model).eval(), lvae.make_optimizer(model)
    if is_compiled:
        model.compile(dynamic=False)
    batch = random_data(config, args.train, device), random_labels(config, args.train, device)

    def step():
        lvae.train_step(model, ema, optimizer, [batch], 1, dtype)
    seconds = seconds_per_call(step, device, args.seconds) / args.train
    print_rate("training", training_flops(config), seconds, peak)
    print(f"{1 / seconds:.2f} images per second in training at batch {args.train}, peak memory "
          f"{peak_memory(device) / 2 ** 30:.2f} GiB")

def print_rate(name, flop, seconds, peak):
    """One row of the table: FLOP and seconds of an image."""
    print(f"{name:9} {flop / 1e9:15.4g} {1000 * seconds:19.2f} {flop / seconds / 1e12:10.3f} {flop / seconds / peak:14.1%}")

def random_checkpoint(name):
    """An untrained model of a preset, in the form of a checkpoint."""
    config = lvae.PRESETS[name]
    stage = daes.PRESETS.get("small-f4" if config.first_stage == "train" else config.first_stage)
    config = replace(config, scale=config.scale or 1.0)
    return {"config": config, "dataset": name, "run": {}, "classes": [], "ema": lvae.LVAE(config).state_dict(),
            "dae": daes.Autoencoder(stage).state_dict() if stage else {}}

def random_data(config, n, device):
    return torch.randn(n, config.data_channels, config.resolution, config.resolution, device=device)

def random_labels(config, n, device):
    return torch.arange(n, device=device) % config.num_classes if config.num_classes else None

def training_flops(config):
    """FLOPs of one sample's forward and backward pass, counted on tensors without content, labels left out."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        model = lvae.LVAE(replace(config, num_classes=0, recompute=False))
        x = random_data(config, 1, "cpu")
        return count_flops(lambda: model(x).mean.sum().backward())

def count_flops(function):
    """The floating-point operations of a call, 2 for each multiplication with an addition."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):    # attention as products: counted
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
    """The median (or other `typical`) time of a call, after one to warm up, of as many as fit into `budget` seconds (3 at
    least)."""
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

def at_least(minimum, kind=int):
    """argparse type: a number from `minimum` up."""
    def number(text):
        value = kind(text)
        if not minimum <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number from {minimum} up, not {text}")
        return value
    return number

def ending(*kinds):
    """argparse type: the name of a file to write, refused before the work that would fill it."""
    def name(text):
        if not text.lower().endswith(kinds):
            raise argparse.ArgumentTypeError(f"{text}: expected a name that ends in {' or '.join(kinds)}")
        return text
    return name

def names(text):
    """argparse type: A,B,.. -> words."""
    return [word.strip() for word in text.split(",")]

def counts(text):
    """argparse type: 1,2,.. -> numbers from 1 up."""
    return [at_least(1)(word) for word in text.split(",")]

def numbers(text):
    """argparse type: 0,1.5,.. -> floats."""
    return [float(word) for word in text.split(",")]

def settings(text):
    """argparse type: 0,1.5,0:1:2,.. -> lists of floats."""
    return [numbers(word.replace(":", ",")) for word in text.split(",")]

positive, whole, amount = at_least(1), at_least(0), at_least(0, float)
picture, table = ending(".png", ".jpg", ".webp"), ending(".npz")

# Name, kind, default, explanation. A tuple of a kind is a choice, a list one or more, bool a switch.
COMMON = [
    ("--batch", positive, 16, "images at a time"),
    ("--device", str, "auto", "cuda, mps, cpu, xla, .."),
    ("--precision", ("auto", "bf16", "fp32"), "auto", "of the convs; auto: bf16 where the hardware has it"),
    ("--compile", bool, None, "torch.compile what generates, which takes minutes (on CUDA: for bench, for 1000 images)"),
    ("--dae", str, None, "autoencoder file, instead of the one in the checkpoint"),
    ("--seed", whole, 0, "of the noise")]
UPSAMPLER = ("--upsampler", str, None, "checkpoint of an upsampler, to enlarge the samples (Table 1)")
GUIDED = [
    ("--label", names, None, "classes by name, unique beginning or number, separated by commas; none"),
    ("--temperature", amount, 1.0, "multiplies the std of every prior"),
    ("--mean-guidance", numbers, None, "w_mu: one number or one per level, coarsest first (0; ImageNet: the paper's)"),
    ("--variance-guidance", numbers, None, "w_sigma: likewise"),
    UPSAMPLER]
FEATURES = ("--features", str, None, f"TorchScript network, such as {NETWORK}")
LABEL = ("--label", str, None, "the images' class; else the folder's name, if that is a class, or the likeliest class")
DATA = ("--data", str, None, "folder of images, LSUN LMDB folder, or 'toy' (what the model was trained on)")
COMMANDS = {
    generate: [
        *GUIDED,
        ("--n --samples", positive, None, "how many (8 per class, or 16); torchrun leaves --samples to us, but not --n"),
        ("--out", picture, None, "the grid (samples.png)"),
        ("--grid", positive, 256, "images in the grid at most"),
        ("--npz", table, None, "arr_0 uint8 (N, H, W, 3) in shuffled order, arr_1 labels"),
        ("--png-dir", str, None, "a folder for a PNG per sample")],
    reconstruct: [
        ("images", list, None, "image files"), LABEL,
        ("--out", picture, "reconstructions.png", "the picture"),
        ("--groups", counts, [], "also with only the first k latent groups from the image: one or more k, by commas")],
    interpolate: [
        ("a", str, None, "an image file"), ("b", str, None, "another"), LABEL,
        ("--out", picture, "interpolation.png", "the picture"),
        ("--steps", at_least(2), 5, "generated images, ends included")],
    manifold: [
        ("--out", picture, "manifold.png", "the picture"),
        ("--steps", positive, 7, "images per axis"),
        ("--range", amount, 2.25, "the axes go from -range to range"),
        ("--label", str, None, "the class (0)"),
        ("--number", whole, 0, "which sample of the seed the fixed noise is"),
        ("--data", str, None, "find the channels on this folder's images ('toy': the scenes), rather than on samples")],
    outpaint: [
        ("image", str, None, "an image file"), LABEL,
        ("--out", picture, "outpainted.png", "the picture"),
        ("--direction", ("right", "left", "both", "down", "up"), "right", "where it grows"),
        ("--width", positive, None, "width in images (2, or 1 if it grows down or up)"),
        ("--height", positive, None, "height in images (1, or 2 if it grows down or up)"),
        ("--n", positive, 1, "how many versions")],
    rates: [
        DATA,
        ("--n", positive, 1000, "images, evenly spaced"),
        ("--active", amount, 0.01, "nats of mean KL above which a channel is active")],
    evaluate: [
        FEATURES,
        ("--reference", str, None, ".npz (mu and sigma, or arr_0, or exported) or folder of images to compare with"),
        ("--n", positive, 10_000, "samples of a checkpoint; the paper's figures are of 50000"),
        ("--label", names, None, "classes to sample (all)"),
        ("--mean-guidance", settings, None, "w_mu, one or several by commas; per level as a:b:c, coarsest first"),
        ("--variance-guidance", settings, None, "w_sigma, likewise"),
        ("--temperature", settings, None, "one or several (1)"),
        UPSAMPLER,
        ("--image-size", positive, None, "side that folders' images are cropped to (that of the images evaluated)"),
        ("--export", table, None, ".npz for mu, sigma, features and probabilities, to be a --reference")],
    neighbors: [
        *GUIDED, FEATURES, DATA,
        ("--out", picture, "neighbors.png", "the picture"),
        ("--n", positive, 8, "samples"),
        ("--neighbors", positive, 6, "neighbours of each")],
    bench: [
        ("--guided", bool, None, "with guidance (if the model can)"),
        ("--seconds", amount, 5.0, "to time each stage for"),
        ("--train", positive, None, "also time a training step at this micro-batch, such as 4: it takes more memory")]}
SOURCES = {evaluate: "checkpoint, .npz with arr_0, or folder of images",
           bench: f"checkpoint, or a preset with random weights: {', '.join(lvae.PRESETS)}"}

def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for function, options in COMMANDS.items():
        own = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0], allow_abbrev=False,
                                  description=function.__doc__)
        own.set_defaults(function=function)
        own.add_argument("source", help=SOURCES.get(function, "checkpoint.pt of a run, or one of the authors' pipelines"))
        for name, kind, default, text in (*options, *COMMON):
            more = {"type": kind}
            if kind is bool:
                more = {"action": argparse.BooleanOptionalAction}
            elif kind is list:
                more = {"nargs": "+"}
            elif isinstance(kind, tuple):
                more = {"choices": kind}
            text = text if default in (None, []) else f"{text} ({default})"
            own.add_argument(*name.split(), default=default, help=text, **more)
    args = parser.parse_args(argv)
    if args.function is not generate and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{args.command} runs in one process: start it with python, not torchrun")
    args.function(args)

if __name__ == "__main__":
    cli(main)
