"""Look at a trained model: one sub-command per thing to see. Needs a checkpoint and no data.

    python sample.py generate runs/toy/checkpoint.pt                                   # a grid, a row per class
    python sample.py generate runs/toy/checkpoint.pt --label castle --n 16 --mean-guidance 1.5 --variance-guidance 1
    python sample.py generate runs/toy/checkpoint.pt --mean-guidance 0,1.5,1.5,1.5     # per level, coarsest first
    python sample.py generate CHECKPOINT --n 50000 --npz samples.npz                   # for the guided-diffusion evaluator
    python sample.py reconstruct runs/toy/checkpoint.pt photo.jpg ...                  # originals above reconstructions

Guidance (Eq. 2) is 0 when off. A sample depends on the seed, its number and its label, not on the batch it is made in.
"""
import argparse
import os
import sys

import numpy as np
import torch
from tqdm import tqdm

import dae as daes
import lvae
from train import (Parser, UserError, autocast, cli, config_from, grid, load_checkpoint, pick_device, pick_dtype, read_image,
                   reserve, to_tensor, to_uint8, write)

# ---------------------------------------------------------------- the model


class Sampler:
    """A checkpoint's EMA weights and autoencoder, on a device: noise, labels or images in, uint8 images out."""

    def __init__(self, path, device="auto", precision="fp32", dae=None):
        state = load_checkpoint(path)
        self.device = pick_device(device)
        self.dtype = pick_dtype(self.device, precision)
        self.config, self.classes = config_from(state, path), state["classes"]
        self.model = lvae.LVAE(self.config).eval()
        try:
            self.model.load_state_dict(state["ema"])
        except RuntimeError as e:
            raise UserError(f"{path}: weights and configuration do not fit ({str(e).splitlines()[1].strip()[:120]})") from None
        if dae or state["dae"]:
            self.dae = daes.load(dae) if dae else daes.from_state(state["dae"], path)
        elif self.config.first_stage == "none":
            self.dae = daes.Identity()
        else:
            raise UserError(f"{path} was trained on latents and holds no autoencoder: name one with --dae FILE")
        if self.dae.config.z_channels != self.config.data_channels:
            raise UserError(f"the autoencoder's latents have {self.dae.config.z_channels} channels, the model's "
                            f"{self.config.data_channels}")
        self.model.to(self.device, memory_format=torch.channels_last)
        self.dae.to(self.device)
        self.size = self.config.resolution * self.dae.config.f                # side of the images, in pixels

    def noise(self, seed, numbers):
        """Whitened noise of samples `numbers`, a list of (B, z, h, w), top-down. Drawn on the host, a stream per sample."""
        streams = [np.random.default_rng((seed, int(i))) for i in numbers]
        return [torch.from_numpy(np.stack([s.standard_normal(shape, np.float32) for s in streams])).to(self.device)
                for shape in self.model.latent_shapes()]

    def means(self, n):
        """The posterior's eps that give its means: zeros, a list of (n, z, h, w)."""
        return [torch.zeros(n, *shape, device=self.device) for shape in self.model.latent_shapes()]

    @torch.no_grad()
    def images(self, noise, label, **guidance):
        """Noise (and labels (B,), or None) -> uint8 images (B, H, W, 3)."""
        with autocast(self.device, self.dtype):
            return self.decode(self.model.generate(noise, label, **guidance))

    @torch.no_grad()
    def latents(self, images):
        """uint8 (B, H, W, 3) -> normalised latents (B, C, h, w)."""
        with autocast(self.device, self.dtype):
            h = self.dae.encode(to_tensor(images).to(self.device))
        return ((h - self.config.shift) / self.config.scale).clamp(-4, 4)

    @torch.no_grad()
    def decode(self, x):
        """Normalised latents (B, C, h, w) -> uint8 images (B, H, W, 3)."""
        with autocast(self.device, self.dtype):
            return to_uint8(self.dae.decode(x * self.config.scale + self.config.shift))

    def label(self, text):
        """A class by its name, a unique beginning of it, or its number; 'none' is no label."""
        count = self.config.num_classes
        if not count:
            raise UserError("--label: this model is unconditional")
        if text in self.classes:
            return self.classes.index(text)
        if text.isdigit() and int(text) < count:
            return int(text)
        if text == "none":
            return count
        starts = [i for i, name in enumerate(self.classes) if name.lower().startswith(text.lower())] if text else []
        if len(starts) == 1:
            return starts[0]
        names = f", one of {', '.join(self.classes[:20])}{' ...' * (len(self.classes) > 20)}" if self.classes else ""
        raise UserError(f"--label {text}: {'fits several classes' if starts else 'no such class'}; "
                        f"expected 0 to {count - 1}{names}, or none")

    @torch.no_grad()
    def likeliest(self, x):
        """The class under which the latents x (1, C, h, w) cost the fewest nats: the encoder needs some label."""
        count = self.config.num_classes
        x = x.expand(count, -1, -1, -1)
        with autocast(self.device, self.dtype):
            out = self.model(x, torch.arange(count, device=self.device), self.means(count))
        return int((lvae.distortions(out, x, self.config) + out.kl.sum(0)).argmin())

    def name(self, label):
        return "no label" if label == self.config.num_classes else self.classes[label] if self.classes else str(label)


def make_sampler(args):
    return Sampler(args.checkpoint, args.device, args.precision, args.dae)


def check_guidance(sampler, args):
    """Command-line guidance -> keyword arguments of `generate`."""
    levels = lvae.resolutions(sampler.config)[::-1]
    weights = {}
    for name in ("mean_guidance", "variance_guidance"):
        values = getattr(args, name)
        if len(values) not in (1, len(levels)):
            raise UserError(f"--{name.replace('_', '-')} takes one number or one per level ({len(levels)}: "
                            f"{', '.join(f'{r}x{r}' for r in levels)}), not {len(values)}")
        weights[name] = values * (len(levels) if len(values) == 1 else 1)
    if any(weights["mean_guidance"] + weights["variance_guidance"]):
        if not sampler.config.num_classes or not sampler.config.hierarchical_prior:
            raise UserError("guidance needs a class-conditional model with a hierarchical prior; this one is "
                            + ("without that prior" if sampler.config.num_classes else "unconditional"))
        if args.label == ["none"]:
            raise UserError("guidance needs a label other than none")
    return weights | {"temperature": args.temperature}


def check_name(path, *kinds):
    """Refuse a file's name before the work that would fill it."""
    if path and not path.lower().endswith(kinds):
        raise UserError(f"{path}: expected a name that ends in {' or '.join(kinds)}")


# ---------------------------------------------------------------- generate


def generate(args):
    """Draw samples: a grid to look at, an .npz for metrics, or a folder of PNGs."""
    sampler = make_sampler(args)
    guidance = check_guidance(sampler, args)
    count = sampler.config.num_classes
    if sampler.config.upsample:
        raise UserError("this checkpoint is an upsampler: it turns small images into large ones and draws none by itself")
    classes = [sampler.label(text) for text in args.label] if args.label else list(range(count))
    n = args.n or (8 * min(len(classes), 10) if classes else 16)
    if not args.n and not args.label:
        classes = classes[:10]
    labels = np.sort(np.arange(n) % len(classes)) if classes else None        # as even as can be, class after class
    if classes:
        labels = np.array(classes)[labels]
    check_name(args.out, ".png", ".jpg", ".webp")
    check_name(args.npz, ".npz")
    out = args.out or (None if args.npz or args.png_dir else "samples.png")
    # Classes are shuffled in the .npz: the Inception Score is taken over consecutive parts.
    place = np.random.default_rng(args.seed).permutation(n)
    array, temporary = None, None
    if args.npz:
        temporary = args.npz + ".images.tmp"
        os.makedirs(os.path.dirname(os.path.abspath(args.npz)), exist_ok=True)
        array = np.lib.format.open_memmap(temporary, "w+", np.uint8, (n, sampler.size, sampler.size, 3))
        reserve(temporary)
    shown = []
    try:
        for start in tqdm(range(0, n, args.batch), desc="sampling", unit="batch", disable=n <= args.batch):
            numbers = np.arange(start, min(start + args.batch, n))
            label = torch.from_numpy(labels[numbers]).to(sampler.device) if classes else None
            images = sampler.images(sampler.noise(args.seed, numbers), label, **guidance)
            if out:
                shown.extend(images[:max(0, args.grid - start)])
            if array is not None:
                array[place[numbers]] = images
            if args.png_dir:
                for number, image in zip(numbers, images):
                    picture = grid([[image]], gap=0)
                    write(os.path.join(args.png_dir, f"{number:06d}.png"), lambda f: picture.save(f, "png"))
        if array is not None:
            shuffled = {}
            if classes:
                shuffled["arr_1"] = np.empty(n, np.int64)
                shuffled["arr_1"][place] = labels
            write(args.npz, lambda f: np.savez(f, arr_0=array, **shuffled))
            print(f"{args.npz}: {n} images {array.shape[1:]}" + (", labels" if classes else ""))
    finally:
        if temporary and os.path.exists(temporary):
            os.remove(temporary)
    if out:
        if classes:                                            # a row per class, in the order asked for
            rows = [[image for image, label in zip(shown, labels) if label == c] for c in dict.fromkeys(classes)]
            named = [(row, sampler.name(c)[:20]) for row, c in zip(rows, dict.fromkeys(classes)) if row]
            if len(named) == 1:                                # one class: a square
                rows, names = square(named[0][0]), None
            else:
                rows, names = zip(*named)
        else:
            rows, names = square(shown), None
        picture = grid(list(rows), row_names=names)
        kind = {".jpg": "jpeg", ".webp": "webp"}.get(os.path.splitext(out)[1].lower(), "png")
        write(out, lambda f: picture.save(f, kind))
        print(f"{out}: {len(shown)} of {n} samples")
    if args.png_dir:
        print(f"{args.png_dir}: {n} PNG files")


def square(images):
    columns = int(np.ceil(np.sqrt(len(images))))
    return [images[i:i + columns] for i in range(0, len(images), columns)]


# ---------------------------------------------------------------- reconstruct


def reconstruct(args):
    """Images above what the autoencoder, and the autoencoder with the LVAE, make of them."""
    check_name(args.out, ".png")
    sampler = make_sampler(args)
    originals, labels = [], []
    for path in args.images:
        try:
            originals.append(read_image(path, sampler.size))
        except Exception as e:                                 # whatever a broken file provokes in Pillow
            print(f"skipped {path}: {e}", file=sys.stderr)
            continue
        folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
        labels.append(sampler.label(args.label) if args.label else
                      sampler.classes.index(folder) if folder in sampler.classes else None)
    if not originals:
        raise UserError("no usable image")
    if sampler.config.num_classes > 100 and None in labels:
        raise UserError("name the images' class with --label (no folder of theirs has a class's name)")
    rows = [originals, [], []]
    for start in range(0, len(originals), args.batch):
        x = sampler.latents(originals[start:start + args.batch])
        low_res = lvae.shrink(x, sampler.config) if sampler.config.upsample else None
        label = None
        if sampler.config.num_classes:
            label = torch.tensor([sampler.likeliest(x[i:i + 1]) if known is None else known
                                  for i, known in enumerate(labels[start:start + args.batch])], device=sampler.device)
        noise = sampler.model.encode(x, label, sampler.means(len(x)), low_res)
        rows[1].extend(sampler.decode(x))
        rows[2].extend(sampler.images(noise, label, low_res=low_res))
    picture = grid(rows, row_names=["original", "autoencoder", "+ LVAE"])
    write(args.out, lambda f: picture.save(f, "png"))
    error = np.mean([np.mean((a.astype(float) - b) ** 2) for a, b in zip(originals, rows[2])])
    print(f"{args.out}: {len(originals)} images, PSNR of the reconstructions {10 * np.log10(255 ** 2 / max(error, 1e-9)):.2f} dB")


# ---------------------------------------------------------------- command line


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(function):
        p = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0], description=function.__doc__,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
        p.set_defaults(function=function)
        p.add_argument("checkpoint", help="checkpoint.pt of a run")
        p.add_argument("--batch", type=positive, default=16, help="images at a time")
        p.add_argument("--device", default="auto", help="cuda, mps, cpu, ...")
        p.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="fp32", help="of the convs")
        p.add_argument("--dae", help="autoencoder file, instead of the one in the checkpoint")
        return p

    p = command(generate)
    p.add_argument("--n", type=positive, help="how many (8 per class, or 16)")
    p.add_argument("--label", type=names, help="classes by name, unique beginning or number, separated by commas; none")
    p.add_argument("--seed", type=whole, default=0, help="of the noise")
    p.add_argument("--temperature", type=float, default=1.0, help="multiplies the std of every prior")
    p.add_argument("--mean-guidance", type=numbers, default=[0.0], help="w_mu: one number, or one per level, coarsest first")
    p.add_argument("--variance-guidance", type=numbers, default=[0.0], help="w_sigma: likewise")
    p.add_argument("--out", help="the grid (samples.png)")
    p.add_argument("--grid", type=positive, default=256, help="images in the grid at most")
    p.add_argument("--npz", help="arr_0 uint8 (N, H, W, 3) in shuffled order, arr_1 labels")
    p.add_argument("--png-dir", help="a folder for a PNG per sample")

    p = command(reconstruct)
    p.add_argument("images", nargs="+", help="image files")
    p.add_argument("--label", help="their class; else the folder's name, if that is a class, or the likeliest class")
    p.add_argument("--out", default="reconstructions.png", help="the picture")

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


def numbers(text):
    try:
        return [float(v) for v in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, not {text!r}") from None


def names(text):
    return [v.strip() for v in text.split(",")]


if __name__ == "__main__":
    cli(main)
