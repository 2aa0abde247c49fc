"""Look at a trained model: one sub-command per figure and table of the paper. Needs a checkpoint: ours or the authors'.

    python sample.py generate runs/toy/checkpoint.pt                                   # a grid, a row per class
    python sample.py generate runs/toy/checkpoint.pt --label castle --n 16 --mean-guidance 1.5 --variance-guidance 1
    python sample.py generate runs/toy/checkpoint.pt --mean-guidance 0,1.5,1.5,1.5     # per level, coarsest first
    python sample.py generate CHECKPOINT --n 50000 --npz samples.npz                   # for the guided-diffusion evaluator
    python sample.py generate RGB16 --upsampler UPSAMPLER                              # the upsampling stack of Table 1
    python sample.py generate inet_pipeline.pt --label tench                           # the authors' weights, as published
    python sample.py reconstruct CHECKPOINT photo.jpg ... --groups 2,6                 # originals above reconstructions
    python sample.py interpolate CHECKPOINT a.jpg b.jpg                                # Figure 5
    python sample.py manifold CHECKPOINT                                               # Figure 4
    python sample.py outpaint CHECKPOINT photo.jpg --width 2                           # Figure 6
    python sample.py neighbors CHECKPOINT --data photos/                               # Figure 8
    python sample.py rates CHECKPOINT --data photos/                                   # what every latent group holds
    python sample.py evaluate CHECKPOINT --reference photos/ --features NETWORK.pt     # FID, IS, precision, recall: Table 3
    python sample.py bench CHECKPOINT                                                  # seconds per 1000 images: Table 4

Guidance (Eq. 2) is 0 when off. A sample depends on the seed, its number and its label, not on the batch it is made in.
Reads downwards: the model, then a function per command, the metrics before the command that uses them.
"""
import argparse
import contextlib
import hashlib
import itertools
import os
import sys
import time
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import dae as daes
import lvae
from train import (Parser, barrier, cli, grid, load_checkpoint, open_images, place, read_image, reserve, setup, to_tensor,
                   to_uint8, world)

# ---------------------------------------------------------------- the model

class Sampler:
    """A checkpoint's EMA weights and autoencoder, on a device: noise, labels or images in, uint8 images out."""

    def __init__(self, path, device="auto", precision="auto", dae=None, upsampler=None, state=None):
        state = state or load_checkpoint(path)
        self.device, self.dtype = setup(device, precision)
        self.config, self.dataset, self.data = state["config"], state["dataset"], state["run"].get("data")
        self.folders = self.classes = state["classes"]         # the names of the folders that it was trained on, if any
        synsets = all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in self.folders)
        if self.config.num_classes == 1000 and synsets and (self.folders or self.dataset == "imagenet"):
            with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "imagenet_classes.txt")) as file:
                self.classes = file.read().splitlines()
        self.model = daes.fill(lambda: lvae.LVAE(self.config), state["ema"], path)
        if dae or state["dae"]:
            self.dae = daes.load(dae) if dae else daes.from_state(state["dae"], path)
        elif self.config.first_stage == "none":
            self.dae = daes.Identity()
        else:
            raise ValueError(f"{path} was trained on latents and holds no autoencoder: name one with --dae FILE")
        if self.dae.config.z_channels != self.config.data_channels:
            raise ValueError(f"the autoencoder's latents have {self.dae.config.z_channels} channels, the model's "
                            f"{self.config.data_channels}")
        for module in (self.model, self.dae):
            place(module, self.device, self.dtype).requires_grad_(False)
        self.is_compiled = False
        self.size = self.config.resolution * self.dae.config.f                # side of the model's images, in pixels
        self.sides = lvae.resolutions(self.config)[::-1]                      # of the levels, coarsest first
        self.upsampler = Sampler(upsampler, device, precision) if upsampler else None
        if upsampler and self.upsampler.size != self.size * self.upsampler.config.upsample:
            raise ValueError(f"--upsampler {upsampler}: " + (
                f"it enlarges images of {self.upsampler.size // self.upsampler.config.upsample} pixels, {path} makes {self.size}"
                if self.upsampler.config.upsample else "not an upsampler"))

    def compile(self):
        """Compile what generates, for one size of batch and one setting of guidance: it takes minutes."""
        self.is_compiled = True
        self.model.generate, self.dae.decode = (compiled(f) for f in (self.model.generate, self.dae.decode))
        if self.upsampler:
            self.upsampler.compile()

    @property
    def space(self):
        return "pixels" if isinstance(self.dae, daes.Identity) else "the autoencoder's latents"

    @property
    def can_guide(self):
        return bool(self.config.num_classes and self.config.hierarchical_prior)

    @property
    def papers_guidance(self):
        """Whether the paper's guidance for ImageNet is the default."""
        return self.can_guide and self.dataset == "imagenet"

    @property
    def out_size(self):
        """Side of what `draw` gives, in pixels."""
        return self.upsampler.size if self.upsampler else self.size

    def noise(self, seed, numbers, size=None):
        """Whitened noise of samples `numbers`, a list of (B, z, h, w), top-down. Drawn on the host, a stream per sample."""
        streams = [np.random.default_rng((*np.atleast_1d(seed), int(i))) for i in numbers]
        return [torch.from_numpy(np.stack([s.standard_normal(shape, np.float32) for s in streams])).to(self.device)
                for shape in self.model.latent_shapes(size)]

    def means(self, n):
        """The posterior's eps that give its means: zeros, a list of (n, z, h, w)."""
        return [torch.zeros(n, *shape, device=self.device) for shape in self.model.latent_shapes()]

    def draw(self, seed, numbers, label, **guidance):
        """Samples `numbers` of a seed, with labels (B,) or None -> uint8 (B, H, W, 3)."""
        images = self.images(self.noise(seed, numbers), label, **guidance)
        if self.upsampler:
            up = self.upsampler
            images = up.images(up.noise((seed, 1), numbers), label if up.config.num_classes else None, low_res=up.latents(images))
        return images

    @torch.no_grad()
    def images(self, noise, label, **options):
        """Noise (and labels (B,), or None) -> uint8 images (B, H, W, 3)."""
        with lvae.autocast(self.device, self.dtype):
            return self.decode(self.model.generate(noise, label, **options))

    @torch.no_grad()
    def latents(self, images):
        """uint8 (B, H, W, 3) -> normalised latents (B, C, h, w)."""
        with lvae.autocast(self.device, self.dtype):
            h = self.dae.encode(to_tensor(images).to(self.device))
        return lvae.normalise(h, self.config)

    @torch.no_grad()
    def posterior(self, x, label):
        """Latents x (B, C, h, w) -> the whitened noise of the posterior's means, a list of (B, z, h, w)."""
        with lvae.autocast(self.device, self.dtype):
            return self.model.encode(x, label, self.means(len(x)))

    @torch.no_grad()
    def decode(self, x):
        """Normalised latents (B, C, h, w) -> uint8 images (B, H, W, 3). A few at a time: decoding is what takes memory, and a
        CPU is fastest at what fits its caches."""
        pixels = {"cpu": 1, "cuda": 16}.get(self.device.type, 4) * 256 ** 2
        parts = x.split(max(1, pixels // (x.shape[2] * x.shape[3] * self.dae.config.f ** 2)))
        with lvae.autocast(self.device, self.dtype):
            return np.concatenate([to_uint8(self.dae.decode(lvae.denormalise(part, self.config))) for part in parts])

    def label(self, text):
        """A class by its name, a unique beginning of it, or its number; 'none' is no label."""
        count = self.config.num_classes
        if not count:
            raise ValueError("--label: this model is unconditional")
        for known in (self.classes, self.folders, [name.lower() for name in self.classes]):
            for spelled in (text, text.lower()):
                if spelled in known:
                    return known.index(spelled)
        if text.isascii() and text.isdigit() and len(text) < 10 and int(text) < count:
            return int(text)
        if text == "none":
            return count
        starts = [i for i, name in enumerate(self.classes) if name.lower().startswith(text.lower())] if text else []
        if len(starts) == 1:
            return starts[0]
        names = [self.classes[i] for i in starts] or self.classes
        raise ValueError(f"--label {text}: {'fits several classes' if starts else 'no such class'}; expected 0 to {count - 1}, none"
                        + (f", or one of {', '.join(names[:20])}{' ...' * (len(names) > 20)}" if names else ""))

    @torch.no_grad()
    def likeliest(self, x):
        """The class under which the latents x (1, C, h, w) cost the fewest nats: the encoder needs some label."""
        count = self.config.num_classes
        x = x.expand(count, -1, -1, -1)
        with lvae.autocast(self.device, self.dtype):
            out = self.model(x, torch.arange(count, device=self.device), self.means(count))
        return int((lvae.distortions(out, x, self.config) + out.kl.sum(0)).argmin())

    def name(self, label):
        return ("no label" if label == self.config.num_classes else
                self.classes[label] if label < len(self.classes) else str(label))

def make_sampler(args, upsamples=False):
    """The sampler of the command line. upsamples: the command can use a model that only enlarges images."""
    sampler = Sampler(args.checkpoint, args.device, args.precision, args.dae, getattr(args, "upsampler", None))
    if sampler.config.upsample and not upsamples:
        raise ValueError("this checkpoint is an upsampler, which draws no image by itself: pass it as --upsampler to generate")
    set_up(sampler, args, many=args.command == "generate" and (args.n or 0) >= 1000)
    return sampler

def set_up(sampler, args, many):
    """Compile if asked to, or on CUDA if there are `many` images to make, and print what the sampler runs on."""
    device = sampler.device
    if args.compile and device.type == "xla":
        raise ValueError("--compile is not for XLA devices, which compile by themselves")
    if args.compile or args.compile is None and many and device.type == "cuda":
        sampler.compile()
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"{device}, {torch.get_num_threads()} threads" if device.type == "cpu" else device)
    if os.environ.get("RANK", "0") == "0":
        print(f"{args.command}: on {kind}, convs in {str(sampler.dtype).removeprefix('torch.')}, "
              f"{'' if sampler.is_compiled else 'not '}compiled", flush=True)

def check_guidance(sampler, args):
    """Command-line guidance -> keyword arguments of `generate`. A model of ImageNet has the paper's setting by default."""
    if args.mean_guidance is None and args.variance_guidance is None and sampler.papers_guidance and args.label != ["none"]:
        args.mean_guidance, args.variance_guidance = lvae.guidance_levels(sampler.config, 1.5), [3.0]
    weights = {}
    for name in ("mean_guidance", "variance_guidance"):
        values = getattr(args, name) or [0.0]
        if len(values) not in (1, len(sampler.sides)):
            raise ValueError(f"--{name.replace('_', '-')} takes one number or one per level ({len(sampler.sides)}: "
                            f"{', '.join(f'{r}x{r}' for r in sampler.sides)}), not {len(values)}")
        weights[name] = values * (len(sampler.sides) if len(values) == 1 else 1)
    if any(weights["mean_guidance"] + weights["variance_guidance"]):
        if not sampler.can_guide:
            raise ValueError("guidance needs a class-conditional model with a hierarchical prior; this one is "
                            + ("without that prior" if sampler.config.num_classes else "unconditional"))
        if args.label == ["none"]:
            raise ValueError("guidance needs a label other than none")
    return weights | {"temperature": args.temperature}

def wanted_classes(sampler, args):
    """The classes of --label, or all of them."""
    return [sampler.label(text) for text in args.label] if args.label else list(range(sampler.config.num_classes))

def even_labels(classes, n):
    """n labels, as even as can be, class after class; None without classes."""
    return np.array(classes)[np.sort(np.arange(n) % len(classes))] if classes else None

# ---------------------------------------------------------------- images in, pictures out

def check_name(path, *kinds):
    """Refuse a file's name before the work that would fill it."""
    if path and not path.lower().endswith(kinds):
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(kinds)}")

def save_grid(path, rows, smallest=128, **names):
    """Save a grid; images smaller than `smallest` pixels are enlarged by a whole factor, to be seen from afar."""
    scale = max(1, -(-smallest // min(image.shape[0] for row in rows for image in row)))
    picture = grid([[image.repeat(scale, 0).repeat(scale, 1) for image in row] for row in rows], **names)
    kind = {".jpg": "jpeg", ".webp": "webp"}.get(os.path.splitext(path)[1].lower(), "png")
    daes.write(path, lambda f: picture.save(f, kind))

def save_plot(path, draw):
    """Call draw(axes) and save the curves or bars, where matplotlib is installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: it needs matplotlib (pip install matplotlib)")
        return
    figure = Figure((8, 4.5), layout="constrained")
    draw(figure.add_subplot())
    daes.write(path, lambda f: FigureCanvasAgg(figure).print_png(f))
    print(path)

def read_photos(sampler, paths, label=None):
    """Image files -> uint8 images, their latents x (B, C, h, w) and labels (B,) or None. Bad files are named and skipped.

    The label is the one given, or the image's folder if that is a class, or else the likeliest.
    """
    images, labels = [], []
    for path in paths:
        try:
            images.append(read_image(path, sampler.size))
        except Exception as e:                                 # whatever a broken file provokes in Pillow
            print(f"skipped {path}: {e}", file=sys.stderr)
            continue
        folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
        labels.append(sampler.label(label) if label else sampler.folders.index(folder) if folder in sampler.folders else None)
    if not images:
        raise ValueError("no usable image")
    x = torch.cat([sampler.latents(images[i:i + 4]) for i in range(0, len(images), 4)])
    count = sampler.config.num_classes
    if not count:
        if label:
            sampler.label(label)
        return images, x, None
    if count > 100 and None in labels:                         # too many to try each
        print("no class known for some images, the model takes them without: --label NAME says it", file=sys.stderr)
    labels = [known if known is not None else count if count > 100 else sampler.likeliest(x[i:i + 1]) for i, known in enumerate(labels)]
    return images, x, torch.tensor(labels, device=sampler.device)

def find_images(sampler, path):
    """The images of --data, or of the data that the model was trained on."""
    if path is None and sampler.data is None:
        raise ValueError("name a folder of images with --data ('toy' is the built-in scenes)")
    path = sampler.data if path is None else path
    return open_set(path, sampler.out_size)

def open_set(path, size):
    return open_images(path, size)

def batches(images, batch, limit=None, what="images", quiet=False):
    """(Indices, uint8 images) of every batch of good images, or of `limit` of them, evenly spaced."""
    rows = np.unique(np.linspace(0, len(images.names) - 1, min(limit or len(images.names), len(images.names))).round().astype(int))
    for start in tqdm(range(0, len(rows), batch), desc=what, unit="batch", disable=quiet or len(rows) <= batch):
        good = [(i, image) for i in rows[start:start + batch] if (image := images.read(i)) is not None]
        if good:
            yield np.array([i for i, _ in good]), [image for _, image in good]

def labels_of(sampler, images):
    """The model's labels of a set of images (N,), or None for an unconditional model. Without sub-folders, the folder's name is
    the class of all."""
    if not sampler.config.num_classes:
        return None
    folder = {os.path.basename(os.path.dirname(os.path.abspath(name))) for name in images.names}
    if not images.classes and len(folder) == 1 and folder <= set(sampler.folders):
        return np.full(len(images.names), sampler.folders.index(folder.pop()))
    if images.classes == sampler.folders or (not sampler.folders and len(images.classes) <= sampler.config.num_classes and images.classes):
        return images.labels
    if not images.classes or not set(images.classes) <= set(sampler.folders):
        raise ValueError("the images' classes (sub-folders) are not those of the model: "
                        f"{', '.join(images.classes[:5]) or 'none'}, expected {', '.join(sampler.folders[:5]) or sampler.config.num_classes} ...")
    return np.array([sampler.folders.index(c) for c in images.classes])[images.labels]

# ---------------------------------------------------------------- generate

def generate(args):
    """Draw samples: a grid to look at, an .npz for metrics, or a folder of PNGs."""
    check_name(args.out, ".png", ".jpg", ".webp")
    check_name(args.npz, ".npz")
    sampler = make_sampler(args)
    guidance = check_guidance(sampler, args)
    classes = wanted_classes(sampler, args)
    if not args.n and not args.label:
        classes = classes[:10]
    n = args.n or (8 * min(len(classes), 10) if classes else 16)
    labels = even_labels(classes, n)
    out = args.out or (None if args.npz or args.png_dir else "samples.png")
    rank = world()[0]
    # Images go through a file, in which several processes can work. In the .npz the classes are shuffled, because the Inception
    # Score is taken over consecutive parts.
    place = np.random.default_rng(args.seed).permutation(n) if args.npz else np.arange(n)
    kept = n if args.npz else min(n, args.grid) if out else 0
    temporary = f"{args.npz or out}.images.tmp"
    try:
        if kept and rank == 0:
            os.makedirs(os.path.dirname(os.path.abspath(temporary)), exist_ok=True)
            np.lib.format.open_memmap(temporary, "w+", np.uint8, (kept, sampler.out_size, sampler.out_size, 3))
            reserve(temporary)
        barrier()
        array = np.lib.format.open_memmap(temporary, "r+") if kept else None
        for numbers, images in draw_all(sampler, args, n, labels, guidance):
            for at, image in zip(place[numbers], images):
                if at < kept:
                    array[at] = image
            if args.png_dir:
                for number, image in zip(numbers, images):
                    save_grid(os.path.join(args.png_dir, f"{number:06d}.png"), [[image]], smallest=1, gap=0)
        barrier()
        if rank:
            return
        if args.npz:
            shuffled = {}
            if classes:
                shuffled["arr_1"] = np.empty(n, np.int64)
                shuffled["arr_1"][place] = labels
            daes.write(args.npz, lambda f: np.savez(f, arr_0=array, **shuffled))
            print(f"{args.npz}: {n} images {array.shape[1:]}" + (", labels" if classes else ""))
        shown = [np.array(array[at]) for at in place[:args.grid]] if out else []
    finally:
        if rank == 0 and os.path.exists(temporary):
            os.remove(temporary)
    if out:
        named = []
        if classes:                                            # a row per class, in the order asked for
            rows = [[image for image, label in zip(shown, labels) if label == c] for c in dict.fromkeys(classes)]
            named = [(row, sampler.name(c)[:20]) for row, c in zip(rows, dict.fromkeys(classes)) if row]
        if len(named) > 1:
            rows, names = zip(*named)
            save_grid(out, rows, row_names=names)
        else:
            columns = int(np.ceil(np.sqrt(len(shown))))
            save_grid(out, [shown[i:i + columns] for i in range(0, len(shown), columns)])
        print(f"{out}: {len(shown)} of {n} samples")
    if args.png_dir:
        print(f"{args.png_dir}: {n} PNG files")

def draw_all(sampler, args, n, labels, guidance):
    """(Numbers, uint8 images) of every batch of samples 0 .. n - 1; under torchrun, of this process's share of the batches."""
    rank, count = world()
    for start in tqdm(range(0, n, args.batch)[rank::count], desc="sampling", unit="batch", disable=n <= args.batch or rank > 0):
        numbers = np.arange(start, min(start + args.batch, n))
        drawn = np.resize(numbers, min(n, args.batch)) if sampler.is_compiled else numbers  # compiled for batches of one size
        label = None if labels is None else torch.from_numpy(labels[drawn]).to(sampler.device)
        yield numbers, sampler.draw(args.seed, drawn, label, **guidance)[:len(numbers)]

# ---------------------------------------------------------------- manipulation (Section 5)

def psnr(a, b):
    return 10 * np.log10(255 ** 2 / max(np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2), 1e-9))

def reconstruct(args):
    """Images above what the autoencoder, and the autoencoder with the LVAE, make of them; with --groups k also what the first k
    latent groups say of them, the rest drawn from the prior."""
    check_name(args.out, ".png", ".jpg", ".webp")
    sampler = make_sampler(args, upsamples=True)
    total = sum(sampler.config.groups)
    if any(k > total for k in args.groups):
        raise ValueError(f"--groups: this model has {total} latent groups, not {max(args.groups)}")
    originals, x, label = read_photos(sampler, args.images, args.label)
    names = ["original", "autoencoder", "+ LVAE"] + [f"first {k} of {total}" for k in args.groups]
    rows = [originals] + [[] for _ in names[1:]]
    for start in range(0, len(x), args.batch):
        part, numbers = x[start:start + args.batch], np.arange(start, min(start + args.batch, len(x)))
        low_res = lvae.shrink(part, sampler.config) if sampler.config.upsample else None
        some = None if label is None else label[start:start + args.batch]
        with torch.no_grad(), lvae.autocast(sampler.device, sampler.dtype):
            noise = sampler.model.encode(part, some, sampler.means(len(part)), low_res)
        rows[1].extend(sampler.decode(part))
        rows[2].extend(sampler.images(noise, some, low_res=low_res))
        drawn = sampler.noise(args.seed, numbers)
        for row, k in zip(rows[3:], args.groups):
            row.extend(sampler.images(noise[:k] + drawn[k:], some, low_res=low_res))
    shown = [i for i in range(len(rows)) if i != 1 or not isinstance(sampler.dae, daes.Identity)]
    save_grid(args.out, [rows[i] for i in shown], row_names=[names[i] for i in shown])
    print(f"{args.out}: {len(originals)} images, PSNR of the reconstructions {psnr(originals, rows[2]):.2f} dB")

def interpolate(args):
    """Figure 5: a path from one image to another through whitened noise. The ends are the images' reconstructions.

    With a standard-normal prior the noise is the latent code; with a hierarchical one it is the reparameterisation that Section
    5.2 leaves to future work. The label's embedding moves along.
    """
    check_name(args.out, ".png", ".jpg", ".webp")
    if args.steps < 2:
        raise ValueError("--steps counts the generated images, ends included: 2 or more")
    sampler = make_sampler(args)
    originals, x, label = read_photos(sampler, [args.a, args.b], args.label)
    if len(originals) < 2:
        raise ValueError("interpolation needs two usable images")
    noise, steps = sampler.posterior(x, label), torch.linspace(0, 1, args.steps, device=sampler.device)
    path = [torch.stack([torch.lerp(eps[0], eps[1], t) for t in steps]) for eps in noise]
    embedded = None
    if label is not None:
        ends = sampler.model.embedding(label).detach()
        embedded = torch.stack([torch.lerp(ends[0], ends[1], t) for t in steps])
    images = [image for i in range(0, args.steps, args.batch) for image in sampler.images(
        [eps[i:i + args.batch] for eps in path], None if embedded is None else embedded[i:i + args.batch])]
    save_grid(args.out, [[originals[0], *images, originals[1]]], column_names=["A", *(f"{float(t):.2f}" for t in steps), "B"])
    print(f"{args.out}: A, {args.steps} steps, B; PSNR of the ends {psnr(originals[0], images[0]):.2f} and "
          f"{psnr(originals[1], images[-1]):.2f} dB")

def channel_kl(sampler, x, label):
    """Mean KL of every latent group's channels over latents x (B, C, h, w): a list of (z,), nats, summed over positions."""
    with torch.no_grad(), lvae.autocast(sampler.device, sampler.dtype):
        out = sampler.model(x, label)
    return [lvae.gaussian_kl(l.posterior, l.prior).sum((2, 3)).mean(0) for l in out.latents], out

def manifold(args):
    """Figure 4: the most active channel of each of the first two 1x1 groups, swept over linspace(-2.25, 2.25), all else fixed."""
    check_name(args.out, ".png", ".jpg", ".webp")
    sampler = make_sampler(args)
    if sampler.sides[0] > 1 or sampler.config.groups[-1] < 2:
        raise ValueError("the manifold needs two latent groups at 1x1, and this model has fewer")
    label = sampler.label(args.label or "0") if sampler.config.num_classes else None
    torch.manual_seed(args.seed)
    kl = torch.zeros(2, sampler.config.z_dim, device=sampler.device)
    if args.data is not None:
        images, source = find_images(sampler, args.data), "data"
        known = labels_of(sampler, images)
        for rows, some in batches(images, args.batch, 256):
            some_labels = None if known is None else torch.from_numpy(known[rows]).to(sampler.device)
            kl += len(rows) * torch.stack(channel_kl(sampler, sampler.latents(some), some_labels)[0][:2])
    else:
        source = "prior samples"
        for start in range(0, 128, args.batch):
            numbers = np.arange(start, min(start + args.batch, 128))
            some_labels = None if label is None else torch.full((len(numbers),), label, device=sampler.device)
            with lvae.autocast(sampler.device, sampler.dtype):
                x = sampler.model.generate(sampler.noise(args.seed, numbers), some_labels)
            kl += len(numbers) * torch.stack(channel_kl(sampler, x, some_labels)[0][:2])
    across, down = kl.argmax(1).tolist()
    share = (kl.max(1).values / kl.sum(1).clamp_min(1e-9)).tolist()
    values = np.linspace(-args.range, args.range, args.steps)
    fixed, images = sampler.noise(args.seed, [args.number]), []
    for v in values:
        noise = [eps.repeat(args.steps, 1, 1, 1) for eps in fixed]
        noise[0][:, across, 0, 0] = torch.from_numpy(values).float()
        noise[1][:, down, 0, 0] = float(v)
        images.append([image for i in range(0, args.steps, args.batch)
                       for image in sampler.images([eps[i:i + args.batch] for eps in noise], label)])
    marks = [f"{v:.2f}" for v in values]
    save_grid(args.out, images, row_names=marks, column_names=marks,
              title=f"across: group 1, channel {across};  down: group 2, channel {down}")
    print(f"{args.out}: group 1, channel {across} across ({share[0]:.0%} of the group's KL); group 2, channel {down} down "
          f"({share[1]:.0%}); KL over {source}" + (f"; class {sampler.name(label)}" if label is not None else ""))

def outpaint(args):
    """Figure 6: the latents of every level from 4x4 up are widened with fresh noise, the 1x1 groups are kept."""
    check_name(args.out, ".png", ".jpg", ".webp")
    sampler = make_sampler(args)
    downwards = args.direction in ("down", "up")
    tall, wide = args.height or (2 if downwards else 1), args.width or (1 if downwards else 2)
    originals, x, label = read_photos(sampler, [args.image], args.label)
    with torch.no_grad(), lvae.autocast(sampler.device, sampler.dtype):
        latents = sampler.model(x, label, sampler.means(1)).latents
    size = (tall * sampler.config.resolution, wide * sampler.config.resolution)
    # Where the image stands: its offset, in images.
    right = {"left": wide - 1, "both": (wide - 1) / 2}.get(args.direction, 0)
    below = {"up": tall - 1}.get(args.direction, 0)

    def around(z, fresh):
        """The noise of a group: fresh, but where the image stands what makes its latent z under the wider image's prior."""
        h, w = z.shape[2:]
        here = np.s_[:, :, int(below * h):int(below * h) + h, int(right * w):int(right * w) + w]

        def eps(prior):
            if fresh.shape == z.shape:                         # a 1x1 group is kept whole
                return (z - prior.mean) / prior.var.sqrt()
            fresh[here] = (z - prior.mean[here]) / prior.var[here].sqrt()
            return fresh
        return eps
    images = [sampler.images([around(latent.z, fresh) for latent, fresh in zip(latents, sampler.noise(args.seed, [i], size))],
                             label, size=size)[0] for i in range(args.n)]
    noise = [(latent.z - latent.prior.mean) / latent.prior.var.sqrt() for latent in latents]
    reconstruction = sampler.images(noise, label)[0]
    top, left = int(below * sampler.size), int(right * sampler.size)
    kept = [image[top:top + sampler.size, left:left + sampler.size] for image in images]
    save_grid(args.out, [[originals[0], reconstruction, *images]], column_names=["image", "reconstruction", *["outpainted"] * args.n])
    print(f"{args.out}: {images[0].shape[1]}x{images[0].shape[0]} pixels. The original region: PSNR "
          f"{np.mean([psnr(k, reconstruction) for k in kept]):.2f} dB to the reconstruction, "
          f"{np.mean([psnr(k, originals[0]) for k in kept]):.2f} dB to the image, whose reconstruction has "
          f"{psnr(reconstruction, originals[0]):.2f} dB")

# ---------------------------------------------------------------- the rate of every group

def rates(args):
    """KL of every latent group and level beside its target share, distortion, negative ELBO and active channels, on data."""
    check_name(args.out, ".png")
    sampler = make_sampler(args, upsamples=True)
    config, images = sampler.config, find_images(sampler, args.data)
    labels = labels_of(sampler, images)
    torch.manual_seed(args.seed)
    per_channel, distortion, count = 0, 0.0, 0
    for rows, some in batches(images, args.batch, args.n, "encoding"):
        x = sampler.latents(some)
        label = None if labels is None else torch.from_numpy(labels[rows]).to(sampler.device)
        kl, out = channel_kl(sampler, x, label)
        per_channel = per_channel + len(x) * torch.stack(kl)                  # (L, z)
        distortion += float(lvae.distortions(out, x, config).sum())
        count += len(x)
    if not count:
        raise ValueError("no usable image")
    kl = (per_channel / count).cpu().numpy()
    group_kl, distortion, target = kl.sum(1), distortion / count, lvae.kl_shares(config).numpy()
    share, rate = 100 * group_kl / max(group_kl.sum(), 1e-9), group_kl.sum()
    side = np.repeat(sampler.sides, config.groups[::-1])
    active = (kl > args.active).sum(1)
    print("group  level    KL nats   % of rate   target %        active channels")
    for g in range(len(kl)):
        print(f"{g + 1:5}  {f'{side[g]}x{side[g]}':7} {group_kl[g]:8.2f}  {share[g]:9.1f}   {target[g]:5.1f} - {2 * target[g]:5.1f}   "
              f"{active[g]:2} of {config.z_dim}")
    for level in sampler.sides:
        mine = side == level
        print(f"level  {f'{level}x{level}':7} {group_kl[mine].sum():8.2f}  {share[mine].sum():9.1f}   {target[mine].sum():5.1f} - "
              f"{2 * target[mine].sum():5.1f}   {active[mine].sum():2} of {config.z_dim * mine.sum()}")
    bits = lambda nats: lvae.bits_per_dim(nats, config)
    print(f"rate {rate:.2f} + distortion {distortion:.2f} = negative ELBO {rate + distortion:.2f} nats per image, "
          f"{bits(rate + distortion):.4f} bits per dimension of {sampler.space} ({bits(rate):.4f} + {bits(distortion):.4f}); "
          f"{count} images\n"
          f"target: where the schedule's weight is 1; active: mean KL above {args.active} nats")

    def draw(axes):
        groups = np.arange(1, len(kl) + 1)
        for level in sampler.sides:
            axes.bar(groups[side == level], share[side == level], label=f"{level}×{level}: {group_kl[side == level].sum():.0f} nats")
        axes.fill_between(np.repeat(groups, 2) + np.tile([-0.5, 0.5], len(kl)), np.repeat(target, 2), np.repeat(2 * target, 2),
                          color="black", alpha=0.15, label="target (weight 1)", linewidth=0)
        for g in groups:
            axes.annotate(str(active[g - 1]), (g, share[g - 1]), ha="center", va="bottom")
        axes.set(xlabel=f"latent group, top-down (above the bars: active channels, of {config.z_dim})", ylabel="share of the rate (%)",
                 title=f"rate {rate:.0f} nats, distortion {distortion:.0f} nats: {bits(rate + distortion):.3f} bits per dimension of "
                       f"{sampler.space}", xlim=(0.4, len(kl) + 0.6))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    save_plot(args.out, draw)

# ---------------------------------------------------------------- metrics

NETWORK = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"

class Network:
    """A TorchScript network that gives images their features, and classes their probabilities if it can.

    Called with uint8 images (B, 3, H, W). One with the options `return_features` and `no_output_bias`, such as NETWORK (which
    resizes images to 299 as the evaluator's does), gives both. Any other gives features, or a pair (features, logits).
    """

    def __init__(self, path, device, resize):
        if not path:
            raise ValueError(f"name a TorchScript network with --features FILE; the usual one: {NETWORK}")
        try:
            self.net = torch.jit.load(path, map_location=device).eval()
            self.both = {"return_features", "no_output_bias"} <= {a.name for a in self.net.forward.schema.arguments}
            with open(path, "rb") as file:
                self.digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else \
                    hashlib.sha256(file.read()).hexdigest()
        except (OSError, ValueError, RuntimeError) as e:
            raise ValueError(f"{path}: not a TorchScript network ({str(e).splitlines()[0][:120]})") from None
        self.path, self.device, self.resize, self.kind = path, device, resize, torch.float32 if resize else torch.uint8

    @torch.no_grad()
    def __call__(self, images, probabilities=False):
        """uint8 images, (B, H, W, 3) -> features (B, D) float32 and, if asked for, probabilities (B, K) or None."""
        x = torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2).contiguous()
        if self.resize:
            x = resize_as_tensorflow(x.float(), self.resize)
        try:
            out = self.apply(x, return_features=True) if self.both else self.apply(x)
            logits = self.apply(x, no_output_bias=True) if self.both and probabilities else None
        except RuntimeError as e:
            raise ValueError(f"{self.path}: cannot be applied to {x.shape[2]}x{x.shape[3]} images; --resize gives others "
                            f"({str(e).strip().splitlines()[-1][:120]})") from None
        if isinstance(out, (tuple, list)) and len(out):
            out, logits = out[0], out[1] if len(out) > 1 else None
        if not torch.is_tensor(out) or len(out) != len(x) or not out.isfinite().all():
            raise ValueError(f"{self.path}: gives no finite features (B, D), or a tuple that begins with them")
        if logits is not None and probabilities:
            p = logits.float()
            certain = bool((p >= 0).all()) and bool(((p.sum(1) - 1).abs() < 1e-3).all())
            logits = (p if certain else p.softmax(1)).cpu().numpy()
        return out.flatten(1).float().cpu().numpy(), logits if probabilities else None

    def apply(self, x, **options):
        """Call the network with the type of images that it takes: uint8, or floats in 0..255."""
        kinds = {torch.uint8: x.round().to(torch.uint8), torch.float32: x.float()}
        try:
            return self.net(kinds[self.kind], **options)
        except RuntimeError:
            other = torch.float32 if self.kind == torch.uint8 else torch.uint8
            out = self.net(kinds[other], **options)
            self.kind = other
            return out

def resize_as_tensorflow(x, size):
    """Bilinear with corners as TensorFlow 1 had them, source = target x scale, no antialias: x (B, C, H, W) -> (B, C, size, size)."""
    for dim in (2, 3):
        at = torch.arange(size, device=x.device) * (x.shape[dim] / size)
        low = at.long()
        high, weight = (low + 1).clamp_max(x.shape[dim] - 1), (at - low).view(-1, *[1] * (3 - dim))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight.to(x.dtype))
    return x

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
    """exp of the mean KL between each image's class probabilities (N, K) and the split's mean, averaged over consecutive splits
    of 5000, as the guided-diffusion evaluator does (Salimans et al., 2016)."""
    scores = []
    for i in range(0, len(probabilities), split):
        p = np.maximum(probabilities[i:i + split].astype(np.float64), 1e-38)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores))

def squared_distances(a, b):
    """(N, D) and (M, D) float64 -> (N, M)."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)

def precision_recall(reference, samples, k=3, device="cpu"):
    """Share of samples within the k-nearest-neighbour balls of the reference, and the reverse (Kynkäänniemi et al., 2019).
    Features (N, D) and (M, D), more than k of each."""
    a, b = (torch.from_numpy(f).to(device).double() for f in (reference, samples))
    # The (k+1)-th smallest distance, for the smallest is that to the point itself.
    radius = [torch.cat([squared_distances(part, x).kthvalue(k + 1, dim=1).values for part in x.split(1000)]) for x in (a, b)]
    within = lambda points, centres, r: torch.cat([(squared_distances(p, centres) <= r).any(1) for p in points.split(1000)])
    return float(within(b, a, radius[0]).double().mean()), float(within(a, b, radius[1]).double().mean())

BROKEN = OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error   # what a damaged .npz provokes

def npz_images(path):
    """arr_0 of an .npz, (N, H, W, 3) uint8 -> (shape, a function of a batch size that reads it piece by piece)."""
    def member():
        return zipfile.ZipFile(path).open("arr_0.npy")

    def header(file):
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        return read[np.lib.format.read_magic(file)[0]](file)
    with member() as file:
        shape, fortran, dtype = header(file)
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
        raise ValueError(f"{path}: arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3)")

    def read(batch):
        try:
            with member() as file:
                header(file)
                for start in range(0, shape[0], batch):
                    n = min(batch, shape[0] - start)
                    yield np.frombuffer(file.read(n * int(np.prod(shape[1:]))), np.uint8).reshape(n, *shape[1:])
        except BROKEN as e:
            raise ValueError(f"{path}: arr_0 is damaged ({e})") from None
    return shape, read

def side_of(path):
    """The side of a set of images, in pixels: of arr_0 of an .npz (None without), or of a folder's first image (its short one)."""
    if path == "toy":
        return 64
    if path.endswith(".npz"):
        with zipfile.ZipFile(path) as file:
            return npz_images(path)[0][1] if "arr_0.npy" in file.namelist() else None
    for name in open_images(path, 256).names:
        with contextlib.suppress(Exception), Image.open(name) as image:       # an LMDB's names are not files
            return min(image.size)
    raise ValueError(f"{path}: the images' size cannot be told: pass --image-size")

def measured(parts, network, total):
    """Batches of images -> what is known of them: features, moments and class probabilities."""
    features, probabilities = [], []
    for images in tqdm(parts, desc="features", unit="batch", total=total, disable=total == 1):
        f, p = network(images, probabilities=True)
        features.append(f)
        probabilities.append(p)
    if not features:
        raise ValueError("no usable image")
    features = np.concatenate(features)
    if len(features) < 2:
        raise ValueError("statistics need two images or more")
    mu, sigma = moments(features)
    known = {} if probabilities[0] is None else {"probabilities": np.concatenate(probabilities)}
    return dict(mu=mu, sigma=sigma, features=features) | known

def statistics(path, network, args, size=None):
    """What is known of the images of an .npz or a folder, from the cache if they were measured before. An evaluator's reference
    batch brings its own mu and sigma."""
    arrays, given = [], {}
    if path.endswith(".npz"):
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = file.files
                given = {k: file[k] for k in ("mu", "sigma", "features", "probabilities") if k in file.files}
            if "arr_0" in arrays:
                shape, read = npz_images(path)
        except BROKEN as e:
            raise ValueError(f"{path}: cannot be read as .npz ({str(e).splitlines()[0]})") from None
        mu, sigma = given.get("mu", np.zeros(1)), given.get("sigma", np.zeros((1, 1)))
        if sigma.shape != mu.shape * 2 or not np.isfinite(mu).all() or not np.isfinite(sigma).all():
            raise ValueError(f"{path}: mu {mu.shape} and sigma {sigma.shape} are no finite mean (D,) and covariance (D, D)")
        if "arr_0" not in arrays:
            if not {"mu", "sigma"} <= given.keys():
                raise ValueError(f"{path}: expected arr_0 (images) or mu and sigma, found {', '.join(arrays) or 'nothing'}")
            return given
        state = os.stat(path)
        fingerprint, parts, total = (path, state.st_size, state.st_mtime_ns), read(args.batch), -(-shape[0] // args.batch)
    else:
        size = args.image_size or size or side_of(path)
        images = open_set(path, size)
        fingerprint, total = (images.fingerprint, size), -(-len(images.names) // args.batch)
        parts = (some for _, some in batches(images, args.batch, quiet=True))
    key = hashlib.sha256(repr((network.digest, network.resize, fingerprint)).encode()).hexdigest()[:24]
    cached, found = os.path.join(args.cache, f"{key}.npz"), None
    with contextlib.suppress(*BROKEN), np.load(cached, allow_pickle=False) as file:
        found = {k: file[k] for k in file.files}
    if found is None:
        found = measured(parts, network, total)
        if "probabilities" in found and not path.endswith(".npz"):            # of a folder, which is sorted: shuffled for the splits
            found["probabilities"] = np.random.default_rng(0).permutation(found["probabilities"])
        daes.write(cached, lambda f: np.savez(f, **found))
    return found | given

def evaluate(args):
    """Table 3: FID, Inception Score, precision and recall as the guided-diffusion evaluator defines them.

    Of a checkpoint's samples (each combination of the guidance weights and temperatures given), of an .npz or of a folder,
    against an .npz (a reference batch of that evaluator, or one exported here) or a folder.
    """
    check_name(args.out, ".png")
    check_name(args.export, ".npz")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("evaluate runs in one process: start it without torchrun, on samples of `generate --npz`")
    if not args.reference and not args.export:
        raise ValueError("name what to compare with, --reference NPZ_OR_FOLDER, or a file for the statistics, --export FILE.npz")
    network = Network(args.features, setup(args.device)[0], args.resize)
    if args.source.endswith(".npz") or os.path.isdir(args.source):
        given = [name for name in ("mean_guidance", "variance_guidance", "temperature", "label", "n") if getattr(args, name) is not None]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} is for checkpoints, not for images made already")
        sampler, settings = None, [None]
    else:
        args.checkpoint = args.source
        sampler = make_sampler(args)
        paper = sampler.papers_guidance and args.mean_guidance is None and args.variance_guidance is None and args.label != ["none"]
        default = [lvae.guidance_levels(sampler.config, 1.5), [3.0]] if paper else [[0.0], [0.0]]
        settings = list(itertools.product(args.mean_guidance or default[:1], args.variance_guidance or default[1:],
                                          args.temperature or [[1.0]]))
        wanted_classes(sampler, args)
        for setting in settings:                               # mistakes now, not after hours
            check_setting(sampler, args, setting)
        if args.export and len(settings) > 1:
            raise ValueError(f"--export writes the statistics of one setting, and {len(settings)} are asked for")
    made = None if sampler else statistics(args.source, network, args)        # of images made already
    size = sampler.out_size if sampler else side_of(args.source)              # the reference's images get it too
    reference = statistics(args.reference, network, args, size) if args.reference else None
    table = []
    for setting in settings:
        found = made or sampled(sampler, network, args, setting)
        row = dict(zip(("w_mu", "w_sigma", "temperature"), [":".join(f"{v:g}" for v in value) for value in setting or ()]))
        if reference is not None:
            if found["mu"].shape != reference["mu"].shape:
                raise ValueError(f"{args.reference}: its statistics are of {len(reference['mu'])} features, --features gives {len(found['mu'])}")
            row["FID"] = frechet(found["mu"], found["sigma"], reference["mu"], reference["sigma"])
        if "probabilities" in found:
            row["IS"] = inception_score(found["probabilities"])
        both = [side["features"] for side in (reference or {}, found) if "features" in side]
        if len(both) == 2 and min(map(len, both)) > 3:
            device = network.device if network.device.type == "cuda" else "cpu"                # float64
            row["precision"], row["recall"] = precision_recall(*both, device=device)
        if not table:
            print("  ".join(f"{name:>12}" for name in row))
        print("  ".join(f"{value:>12.4f}" if isinstance(value, float) else f"{value:>12}" for value in row.values()), flush=True)
        table.append(row)
        if args.export:
            daes.write(args.export, lambda f: np.savez(f, **found))
            print(f"{args.export}: the statistics of {args.source}")
    if reference is not None and "precision" not in row:
        print("no precision and recall: they need features of more than 3 images on both sides")
    if len(table) > 1 and reference is not None:
        plot_sweep(args.out, table)

def check_setting(sampler, args, setting):
    """One setting of guidance and temperature -> keyword arguments of `generate`."""
    return check_guidance(sampler, argparse.Namespace(
        mean_guidance=setting[0], variance_guidance=setting[1], temperature=setting[2][0], label=args.label))

def sampled(sampler, network, args, setting):
    """What is known of a checkpoint's samples under one setting of guidance and temperature."""
    guidance = check_setting(sampler, args, setting)
    classes = wanted_classes(sampler, args)
    n = args.n or 10_000
    # Classes are shuffled: the Inception Score is taken over consecutive parts.
    labels = np.random.default_rng(args.seed).permutation(even_labels(classes, n)) if classes else None
    parts = (images for _, images in draw_all(sampler, args, n, labels, guidance))
    return measured(parts, network, 1)

def plot_sweep(path, table):
    """FID against whichever setting takes most values, a curve per combination of the others."""
    names = ["w_mu", "w_sigma", "temperature"]
    along = max(names, key=lambda name: len({row[name] for row in table}))
    place = str if any(":" in row[along] for row in table) else float
    others = [name for name in names if name != along]
    titles = {"w_mu": "mean guidance $w_\\mu$", "w_sigma": "variance guidance $w_\\sigma$", "temperature": "temperature"}

    def draw(axes):
        for rest in dict.fromkeys(tuple(row[name] for name in others) for row in table):
            mine = [row for row in table if tuple(row[name] for name in others) == rest]
            axes.plot([place(row[along]) for row in mine], [row["FID"] for row in mine], "o-",
                      label=", ".join(f"{titles[name]} {value}" for name, value in zip(others, rest)))
        axes.set(xlabel=titles[along], ylabel="FID", title=f"FID against {titles[along]}")
        axes.legend()
    save_plot(path, draw)

def neighbors(args):
    """Figure 8: samples, and the training images nearest to them in a feature space (by default, the autoencoder's latents)."""
    check_name(args.out, ".png", ".jpg", ".webp")
    sampler = make_sampler(args)
    guidance = check_guidance(sampler, args)
    network = Network(args.features, sampler.device, args.resize) if args.features else None
    images = find_images(sampler, args.data)
    encoder = sampler.upsampler or sampler
    features = lambda some: network(some)[0] if network else encoder.latents(some).flatten(1).cpu().numpy()
    labels = even_labels(wanted_classes(sampler, args), args.n)
    drawn = np.concatenate([some for _, some in draw_all(sampler, args, args.n, labels, guidance)])
    targets = torch.from_numpy(np.concatenate([features(drawn[i:i + args.batch]) for i in range(0, args.n, args.batch)])).double()
    best = torch.full((args.n, 0), 0.0), torch.zeros(args.n, 0, dtype=torch.long)
    for rows, some in batches(images, args.batch, what="features"):
        distance = torch.cat([best[0], squared_distances(targets, torch.from_numpy(features(some)).double())], dim=1)
        index = torch.cat([best[1], torch.from_numpy(rows).expand(args.n, -1)], dim=1)
        nearest = distance.topk(min(args.neighbors, distance.shape[1]), largest=False)
        best = nearest.values, index.gather(1, nearest.indices)
    if not best[0].shape[1]:
        raise ValueError("no usable image")
    rows = [[image, *(images.read(int(i)) for i in row)] for image, row in zip(drawn, best[1])]
    save_grid(args.out, rows, column_names=["sample", *(f"{i + 1}." for i in range(best[1].shape[1]))],
              row_names=None if labels is None else [sampler.name(c)[:20] for c in labels])
    print(f"{args.out}: {args.n} samples and their {best[1].shape[1]} nearest of {len(images.names)} images, in "
          + (f"the features of {args.features}" if network else encoder.space))
    for number, (distances, row) in enumerate(zip(best[0].sqrt(), best[1])):
        print(f"  {number}: " + ", ".join(f"{images.names[i]} ({d:.2f})" for d, i in zip(distances, row)))

# ---------------------------------------------------------------- speed (Table 4)

def compiled(function):
    """torch.compile(function) for inputs of one size, with CUDA graphs, whose next run writes over what this one gave."""
    fast = torch.compile(function, dynamic=False, mode="reduce-overhead")

    def call(*inputs, **options):
        torch.compiler.cudagraph_mark_step_begin()
        return fast(*inputs, **options).clone()
    return call

def seconds_per_call(function, device, budget, typical=np.median):
    """The median (or other `typical`) time of a call, after one to warm up, of as many as fit into `budget` seconds (3 at least)."""
    times = []
    while len(times) < 4 or sum(times[1:]) < budget:
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
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

def random_checkpoint(name):
    """An untrained model of a preset, in the form of a checkpoint."""
    config = lvae.PRESETS[name]
    stage = daes.PRESETS.get("small-f4" if config.first_stage == "train" else config.first_stage)
    return {"config": config, "dataset": name, "run": {}, "classes": [], "ema": lvae.LVAE(config).state_dict(),
            "dae": daes.Autoencoder(stage).state_dict() if stage else {}}

def peak_memory(device):
    """The most memory used so far, in bytes: the device's, or on a CPU this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

@torch.no_grad()
def bench(args):
    """Table 4: seconds per 1000 images of the LVAE and of the autoencoder's decoder, beside the arithmetic they take and the
    share of the device's peak (its fastest matrix product in the same type) that they reach."""
    state = random_checkpoint(args.source) if args.source in lvae.PRESETS else None
    sampler = Sampler(args.source, args.device, args.precision, args.dae, state=state)
    config, device = sampler.config, sampler.device
    if args.guided and not sampler.can_guide:
        raise ValueError("--guided: guidance needs a class-conditional model with a hierarchical prior")
    guided = sampler.can_guide if args.guided is None else args.guided
    guidance = dict(mean_guidance=lvae.guidance_levels(config, 1.5), variance_guidance=3.0) if guided else {}
    label = torch.arange(args.batch, device=device) % config.num_classes if config.num_classes else None
    noise = sampler.noise(0, range(args.batch))
    low_res = None
    if config.upsample:
        side = config.resolution // config.upsample
        low_res = torch.zeros(args.batch, config.data_channels, side, side, device=device)
    x = torch.randn(args.batch, config.data_channels, config.resolution, config.resolution, device=device)
    stages = {"LVAE": lambda n: sampler.model.generate([e[:n] for e in noise], None if label is None else label[:n],
                                                       low_res=None if low_res is None else low_res[:n], **guidance),
              "decoder": lambda n: sampler.decode(x[:n])}
    if isinstance(sampler.dae, daes.Identity):
        del stages["decoder"]
    with lvae.autocast(device, sampler.dtype):
        flops = {name: count_flops(lambda: stage(1)) for name, stage in stages.items()}
    set_up(sampler, args, many=True)
    peak = matmul_rate(device, sampler.dtype)
    print(f"{args.source}: {sampler.size}x{sampler.size} images, {'guided' if guided else 'not guided'}, batch {args.batch}; "
          f"peak {peak / 1e12:.3f} TFLOP/s (matrix product)")
    print("stage     GFLOP per image   s per 1000 images    TFLOP/s   share of peak")
    total_flop = total_seconds = 0.0
    for name, stage in stages.items():
        with lvae.autocast(device, sampler.dtype):
            seconds = seconds_per_call(lambda: stage(args.batch), device, args.seconds) / args.batch
        total_flop, total_seconds = total_flop + flops[name], total_seconds + seconds
        print_rate(name, flops[name], seconds, peak)
    print_rate("together", total_flop, total_seconds, peak)
    print(f"peak memory {peak_memory(device) / 2 ** 30:.2f} GiB")

def print_rate(name, flop, seconds, peak):
    print(f"{name:9} {flop / 1e9:15.4g} {1000 * seconds:19.2f} {flop / seconds / 1e12:10.3f} {flop / seconds / peak:14.1%}")

# ---------------------------------------------------------------- command line

def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(function, first="checkpoint", help="checkpoint.pt of a run, or one of the authors' pipelines", out=None):
        p = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0], description=function.__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        p.set_defaults(function=function)
        p.add_argument(first, help=help)
        p.add_argument("--batch", type=positive, default=16, help="images at a time (16)")
        p.add_argument("--device", default="auto", help="cuda, mps, cpu, xla, ... (auto)")
        p.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                       help="of the convs (auto: bf16 where the device has units for it)")
        p.add_argument("--compile", action=argparse.BooleanOptionalAction,
                       help="compile what generates images, which takes minutes (on CUDA: for bench, and to generate 1000 or more)")
        p.add_argument("--dae", help="autoencoder file, instead of the one in the checkpoint")
        p.add_argument("--seed", type=whole, default=0, help="of the noise (0)")
        if out:
            p.add_argument("--out", default=out, help=f"the picture ({out})")
        return p

    def guided(p):
        p.add_argument("--label", type=names, help="classes by name, unique beginning or number, separated by commas; none")
        p.add_argument("--temperature", type=amount, default=1.0, help="multiplies the std of every prior (1)")
        p.add_argument("--mean-guidance", type=numbers, help="w_mu: one number, or one per level, coarsest first (0; the paper's for ImageNet)")
        p.add_argument("--variance-guidance", type=numbers, help="w_sigma: likewise")
        p.add_argument("--upsampler", help="checkpoint of an upsampler, to enlarge the samples (Table 1)")

    def featured(p):
        p.add_argument("--features", help=f"TorchScript network, such as {NETWORK}")
        p.add_argument("--resize", type=positive, help="resize images to this side for the network, as TensorFlow 1 does (if it doesn't itself)")

    p = command(generate)
    guided(p)
    p.add_argument("--n", "--samples", type=positive, help="how many (8 per class, or 16); torchrun takes --n for itself, but not --samples")
    p.add_argument("--out", help="the grid (samples.png)")
    p.add_argument("--grid", type=positive, default=256, help="images in the grid at most (256)")
    p.add_argument("--npz", help="arr_0 uint8 (N, H, W, 3) in shuffled order, arr_1 labels")
    p.add_argument("--png-dir", help="a folder for a PNG per sample")

    label = "the images' class; else the folder's name, if that is a class, or the likeliest class"
    p = command(reconstruct, out="reconstructions.png")
    p.add_argument("images", nargs="+", help="image files")
    p.add_argument("--label", help=label)
    p.add_argument("--groups", type=counts, default=[], help="also with only the first k latent groups from the image: one or more k, by commas")

    p = command(interpolate, out="interpolation.png")
    p.add_argument("a", help="an image file")
    p.add_argument("b", help="another")
    p.add_argument("--steps", type=positive, default=5, help="generated images, ends included (5)")
    p.add_argument("--label", help=label)

    p = command(manifold, out="manifold.png")
    p.add_argument("--steps", type=positive, default=7, help="images per axis (7)")
    p.add_argument("--range", type=amount, default=2.25, help="the axes go from -range to range (2.25)")
    p.add_argument("--label", help="the class (0)")
    p.add_argument("--number", type=whole, default=0, help="which sample of the seed the fixed noise is (0)")
    p.add_argument("--data", help="find the channels on this folder's images ('toy': the built-in scenes) rather than on samples")

    p = command(outpaint, out="outpainted.png")
    p.add_argument("image", help="an image file")
    p.add_argument("--direction", choices=("right", "left", "both", "down", "up"), default="right", help="where it grows (right)")
    p.add_argument("--width", type=positive, help="width in images (2, or 1 if it grows down or up)")
    p.add_argument("--height", type=positive, help="height in images (1, or 2 if it grows down or up)")
    p.add_argument("--n", type=positive, default=1, help="how many versions (1)")
    p.add_argument("--label", help=label)

    data = "folder of images, LSUN LMDB folder, or 'toy' (what the model was trained on)"
    p = command(rates, out="rates.png")
    p.add_argument("--data", help=data)
    p.add_argument("--n", type=positive, default=1000, help="images, evenly spaced (1000)")
    p.add_argument("--active", type=amount, default=0.01, help="nats of mean KL above which a channel is active (0.01)")

    p = command(evaluate, "source", "checkpoint, .npz with arr_0, or folder of images", out="evaluation.png")
    featured(p)
    p.add_argument("--reference", help=".npz (mu and sigma, or arr_0, or exported) or folder of images to compare with")
    p.add_argument("--n", type=positive, help="samples of a checkpoint (10000; the paper's figures are of 50000)")
    p.add_argument("--label", type=names, help="classes to sample (all)")
    p.add_argument("--mean-guidance", type=settings, help="w_mu, one or several by commas; per level as a:b:c, coarsest first")
    p.add_argument("--variance-guidance", type=settings, help="w_sigma, likewise")
    p.add_argument("--temperature", type=settings, help="one or several (1)")
    p.add_argument("--upsampler", help="checkpoint of an upsampler, to enlarge the samples (Table 1)")
    p.add_argument("--image-size", type=positive, help="crop folders' images to squares of this side (that of the images evaluated)")
    p.add_argument("--cache", default=os.path.join("runs", "features"), help="folder that keeps measured features (runs/features)")
    p.add_argument("--export", help=".npz for mu, sigma, features and probabilities, to be a --reference")

    p = command(neighbors, out="neighbors.png")
    guided(p)
    featured(p)
    p.add_argument("--data", help=data)
    p.add_argument("--n", type=positive, default=8, help="samples (8)")
    p.add_argument("--neighbors", type=positive, default=6, help="neighbours of each (6)")

    p = command(bench, "source", f"checkpoint, or a preset with random weights: {', '.join(lvae.PRESETS)}")
    p.add_argument("--guided", action=argparse.BooleanOptionalAction, help="with guidance (if the model can)")
    p.add_argument("--seconds", type=amount, default=5.0, help="to time each stage for (5)")

    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    args.function(args)

def whole(text):
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, not {text!r}")
    return int(text)

def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, not {text!r}")
    return int(text)

def counts(text):
    return [positive(part) for part in text.split(",")]

def numbers(text):
    with contextlib.suppress(ValueError):
        values = [float(v) for v in text.split(",")]
        if np.isfinite(values).all():
            return values
    raise argparse.ArgumentTypeError(f"expected numbers separated by commas, not {text!r}")

def amount(text):
    values = numbers(text)
    if len(values) > 1 or values[0] < 0:
        raise argparse.ArgumentTypeError(f"expected a number from 0, not {text!r}")
    return values[0]

def settings(text):
    return [numbers(part.replace(":", ",")) for part in text.split(",")]

def names(text):
    return [v.strip() for v in text.split(",")]

if __name__ == "__main__":
    cli(main)
