"""Look at a trained model: a sub-command per figure and table of the paper. CKPT is a checkpoint.

    python sample.py generate CKPT --label castle --n 16 --mean-guidance 0,1.5,1.5,1.5 --variance-guidance 1
    python sample.py generate CKPT --n 50000 --npz samples.npz  # for the guided-diffusion evaluator
    python sample.py generate RGB16 --upsampler UPSAMPLER       # the upsampling stack of Table 1
    python sample.py reconstruct CKPT photo.jpg folder/         # interpolate and outpaint likewise
    python sample.py rates CKPT --data photos/                  # neighbors likewise; manifold, bench: CKPT
    python sample.py evaluate CKPT --reference photos/ --features NET

A sample depends on its seed, number and label, not on its batch. Guidance (Eq. 2) is 0 when off.
"""
import argparse
import contextlib
import copy
import math
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

import dae as daes
import lvae
from dae import cli, explained, require
from train import (Images, asked_to_stop, autoencoder_of, list_images, load_checkpoint, open_images,
                   read_image, relabel, save_picture, say, setup, to_tensor, to_uint8, world)

# ---------------- the model
class Sampler:
    """A checkpoint's EMA weights and autoencoder on a device: noise or images in, uint8 images out. A label
    is a class's number, (B,) of them, or None; a model without classes ignores it."""
    def __init__(self, path, device="auto", precision="auto", dae=None, upsampler=None, state=None,
                 compile=False):
        """dae: a file, instead of the checkpoint's; upsampler: a checkpoint; state: what is in `path`."""
        state = state or load_checkpoint(path)
        self.device, self.dtype = setup(device, precision)
        self.config, self.dataset, self.data = state["config"], state["dataset"], state["run"].get("data")
        self.folders = names = state["classes"]  # the sub-folders that it learned from
        synsets = len(names) in (0, 1000) and all(re.fullmatch(r"n\d+", name) for name in names)
        if self.dataset == "imagenet" and synsets:
            names = (Path(__file__).parent / "assets/imagenet_classes.txt").read_text("utf-8").splitlines()
        count = self.config.num_classes
        self.classes = [*names[:count], *map(str, range(len(names), count)), "none"]
        self.model = daes.fill(lambda: lvae.LVAE(self.config), state.pop("ema"), path)
        self.dae = daes.load(dae) if dae else autoencoder_of(state, path)
        require(self.dae and self.dae.config.z_channels == self.config.data_channels,
                f"{path} needs an autoencoder of {self.config.data_channels} channels: --dae FILE")
        for module in (self.model, self.dae):
            lvae.place(module, self.device, self.dtype).requires_grad_(False)
        self.size = self.config.resolution * self.dae.config.f  # of images, in pixels
        self.upsampler = Sampler(upsampler, device, precision, compile=compile) if upsampler else None
        self.out_size = self.upsampler.size if upsampler else self.size  # of what `draw` gives
        require(not upsampler or self.size * self.upsampler.config.upsample == self.out_size,
                f"{upsampler} is no upsampler of images of {self.size} pixels")
        if compile:
            self.model.generate, self.dae.decode = map(torch.compile, (self.model.generate, self.dae.decode))

    def noise(self, seed, numbers, size=None):
        """Whitened noise of samples `numbers`, a list of (B, z, h, w), top-down; a stream each."""
        streams = [np.random.default_rng((*np.atleast_1d(seed), int(i))) for i in numbers]
        shapes = self.model.latent_shapes(size)
        drawn = [np.stack([s.standard_normal(shape, np.float32) for s in streams]) for shape in shapes]
        return [torch.from_numpy(eps).to(self.device) for eps in drawn]

    def draw(self, seed, numbers, label, **guidance):
        """Samples `numbers` of a seed -> uint8 (B, H, W, 3)."""
        images, up = self.images(self.noise(seed, numbers), label, **guidance), self.upsampler
        if up:
            images = up.images(up.noise((seed, 1), numbers), self.known(label), low_res=up.latents(images))
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
        most = 16 if self.device.type == "cuda" else 1  # of 256x256; a CPU's caches hold one
        parts = x.split(max(1, most * 256 ** 2 // self.size ** 2))
        with lvae.autocast(self.device, self.dtype):
            images = [to_uint8(self.dae.decode(lvae.denormalise(part, self.config))) for part in parts]
        return np.concatenate(images)

    def latents(self, images):
        """uint8 (B, H, W, 3) -> normalised latents (B, C, h, w)."""
        with lvae.autocast(self.device, self.dtype):
            return lvae.normalise(self.dae.encode(to_tensor(images).to(self.device)), self.config)

    def infer(self, x, label, draw=False):
        """Latents x (B, C, h, w) -> Output, of the posterior's means or a draw."""
        noise = None if draw else [x.new_zeros(len(x), *shape) for shape in self.model.latent_shapes()]
        with lvae.autocast(self.device, self.dtype):
            return self.model(x, self.known(label), noise)

    def posterior(self, x, label):
        """The same -> whitened noise of the posterior's means, a list of (B, z, h, w)."""
        return [lvae.whiten(l.z, l.prior) for l in self.infer(x, label).latents]

    def known(self, label):
        """A label as the model takes it: on its device, None if it has no classes."""
        if label is not None and self.config.num_classes:
            return torch.as_tensor(label, device=self.device)

    def labels(self, text):
        """Classes by commas: names, beginnings, numbers or none -> numbers; None: all."""
        if not text:
            return list(range(self.config.num_classes or 1))
        text, labels = text.strip().lower(), []
        numbers = {str(i): i for i in range(self.config.num_classes)}
        for names in (self.folders, self.classes):
            numbers |= {name.strip().lower(): i for i, name in enumerate(names)}
        for word in [text] if text in numbers else text.split(","):  # a name may have commas itself
            word = word.strip()
            names = [word] if word in numbers else [n for n in numbers if n.startswith(word)]
            found = {numbers[n] for n in names}
            require(len(found) == 1,
                    f"--label {word}: no such class, or several; known: .. {', '.join(numbers)[-300:]}")
            labels += found
        return labels

# ---------------- what commands share
def guidance(sampler, args):
    """Options -> arguments of `generate`; for ImageNet by default the paper's."""
    mu, sigma, levels = args.mean_guidance, args.variance_guidance, len(sampler.model.sides)
    if sampler.dataset == "imagenet" and sampler.config.num_classes and not (mu or sigma):
        mu, sigma = lvae.guidance_levels(sampler.config, 1.5), [3.0]
    mu, sigma = (w * levels if len(w) == 1 else w for w in (mu or [0.0], sigma or [0.0]))
    return {"mean_guidance": mu, "variance_guidance": sigma, "temperature": args.temperature}

def even_labels(classes, n):
    """n labels, as evenly of the classes as can be, in their order: (N,)."""
    return np.array(classes)[np.sort(np.arange(n) % len(classes))]

def draw_all(sampler, args, labels):
    """Batches (numbers, uint8 images) of samples with labels (N,), under torchrun a share."""
    (rank, count), n, weights = world(), len(labels), guidance(sampler, args)
    starts = range(0, n, args.batch)[rank::count]
    for start in tqdm(starts, "sampling", unit="batch", disable=n <= args.batch or rank > 0):
        numbers = np.arange(start, min(start + args.batch, n))
        yield numbers, sampler.draw(args.seed, numbers, labels[numbers], **weights)

def batches(images, batch, limit=None):
    """(Indices, uint8 images) of batches of the good images, or of `limit`, evenly spaced."""
    count = len(images.names)
    n = min(limit or count, count)
    for start in tqdm(range(0, n, batch), "images", unit="batch", disable=n <= batch):
        rows = np.arange(start, min(start + batch, n)) * count // n
        good = {i: image for i in rows.tolist() if (image := images.read(i)) is not None}
        if good:
            yield list(good), list(good.values())
    require(len(images.bad) < n, "no usable image")

def find_images(sampler, args):
    """The images named, or of --data, or of the model's training."""
    if "images" in args:
        files = [file for path in args.images for file in list_images(path) or [path]]
        return Images(files, lambda i: read_image(files[i], sampler.size))
    path = args.data or sampler.data
    require(path is not None, "name images with --data, or toy")
    return open_images(path, sampler.size)

def encoded(sampler, args):
    """(uint8 images, latents (B, C, h, w), labels (B,)) of batches. A class is --label's (of all, or each),
    else the sub-folder (in their order if the model knows no names), else the likeliest."""
    images, count = find_images(sampler, args), sampler.config.num_classes
    if count and args.label:
        labels = sampler.labels(args.label)
        require(len(labels) in (1, len(images.names)), f"--label {args.label}: not one, nor one per image")
        images.labels[:] = labels
    elif count and images.classes and (sampler.folders or len(images.classes) != count):
        relabel(images, sampler.folders, "without --label")
    for rows, some in batches(images, args.batch, getattr(args, "n", None)):
        x, labels = sampler.latents(some), images.labels[rows]
        if count and not (args.label or images.classes):
            labels = [likeliest(sampler, latent) for latent in x]
        yield some, x, torch.as_tensor(labels, device=sampler.device)

def likeliest(sampler, x):
    """The class for which latents (C, h, w) cost the fewest nats."""
    count = sampler.config.num_classes
    require(count <= 100, "which class? Name it: --label")
    x = x.expand(count, -1, -1, -1)
    out = sampler.infer(x, torch.arange(count))
    return int((lvae.distortions(out, x, sampler.config) + out.kl.sum(0)).argmin())

def save_grid(path, what, rows, **names):
    """Save a grid, images smaller than 128 pixels enlarged by a whole factor."""
    scale = math.ceil(128 / len(rows[0][0]))
    save_picture(path, [[image.repeat(scale, 0).repeat(scale, 1) for image in row] for row in rows], **names)
    say(f"{path}: {what}")

# ---------------- generate
def generate(sampler, args):
    """Samples: a grid to look at, with --npz an array for metrics, or both."""
    classes, size, out = sampler.labels(args.label), sampler.out_size, args.out or "samples.png"
    path = args.npz or out
    require(not os.path.isdir(path), f"{path} is a folder")
    if not (args.n or args.label):
        classes = classes[:10]
    n = args.n or max(16, 8 * len(classes))
    labels = even_labels(classes, n)
    row = np.random.default_rng(args.seed).permutation(n)  # the Inception Score goes by parts
    with shared_array(f"{path}.images.tmp", (n, size, size, 3)) as array:
        for numbers, images in draw_all(sampler, args, labels):
            array[row[numbers]] = images
        asked_to_stop()  # all processes wait here
        if world()[0]:
            return
        if args.npz:
            more = {"arr_1": labels[np.argsort(row)]} if sampler.config.num_classes else {}
            daes.write(args.npz, lambda file: np.savez(file, arr_0=array, **more))
            say(f"{args.npz}: {n} samples of {size}x{size}")
            if not args.out:
                return
        shown = np.linspace(0, n - 1, min(n, 256)).astype(int)
        images, labels = array[row[shown]], labels[shown]
    ends = np.flatnonzero(np.diff(labels)) + 1  # a row per class, or a square of one class
    names = [sampler.classes[c][:20] for c in labels[[0, *ends]]]
    if len(names) == 1:
        columns, names = math.ceil(math.sqrt(len(images))), None
        ends = range(columns, len(images), columns)
    save_grid(out, f"{len(images)} samples of {size}x{size}", np.split(images, ends), row_names=names)

@contextlib.contextmanager
def shared_array(path, shape):
    """uint8 in a temporary file that processes share, perhaps larger than memory."""
    try:
        if world()[0] == 0:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            with open(path, "wb") as file:
                if hasattr(os, "posix_fallocate"):  # a full disk is an error now, no crash later
                    os.posix_fallocate(file.fileno(), 0, math.prod(shape))
        asked_to_stop()  # the others wait until it is there
        yield np.memmap(path, np.uint8, "r+", shape=shape)
    finally:
        if world()[0] == 0 and os.path.exists(path):
            os.remove(path)

# ---------------- manipulation (Section 5)
def reconstruct(sampler, args):
    """Images, what the autoencoder and the LVAE make of them, and what its first k groups say."""
    total = sum(sampler.config.groups)
    kept = {"+ LVAE": total} | {f"first {k} of {total}": k for k in args.groups or ()}
    require(max(kept.values()) == total, f"--groups: this model has {total} latent groups")
    rows = {name: [] for name in ("original", "autoencoder", *kept)}
    for images, x, label in encoded(sampler, args):
        numbers = len(rows["original"]) + np.arange(len(x))
        noise, drawn = sampler.posterior(x, label), sampler.noise(args.seed, numbers)
        low_res = lvae.shrink(x, sampler.config)
        rows["original"].extend(images)
        rows["autoencoder"].extend(sampler.decode(x))
        for name, k in kept.items():  # the other groups are drawn
            rows[name].extend(sampler.images(noise[:k] + drawn[k:], label, low_res=low_res))
    save_grid(args.out, f"{len(rows['original'])} images", list(rows.values()), row_names=list(rows))

def interpolate(sampler, args):
    """Figure 5: a path between two images through whitened noise and the label's embedding.
    Its ends are reconstructions. With a hierarchical prior this is Section 5.2's future work."""
    pair, x, label = next(encoded(sampler, args))
    require(len(pair) == 2, "expected two good images in one --batch")
    steps, embedding = torch.linspace(0, 1, args.steps, device=x.device), sampler.model.embedding
    ends = [*sampler.posterior(x, label), embedding(label) if embedding else label.float()]
    *mixed, embedded = [torch.stack([torch.lerp(*end, t) for t in steps]) for end in ends]
    row, names = [pair[0], *sampler.images(mixed, embedded), pair[1]], [f"{float(t):.2f}" for t in steps]
    save_grid(args.out, f"{args.steps} steps from A to B", [row], column_names=["A", *names, "B"])

def channel_kl(out):
    """Mean KL of every latent group's channels in an Output: (L, z) nats, summed over positions."""
    return torch.stack([lvae.gaussian_kl(l.posterior, l.prior).sum((2, 3)).mean(0) for l in out.latents])

def manifold(sampler, args):
    """Figure 4: groups 1 and 2's most active channels (in 64 samples of the first class named), swept."""
    require(sampler.model.sides[0] == 1 < sampler.config.groups[-1], "the model has no two groups at 1x1")
    label = sampler.labels(args.label)[0]
    x = sampler.generate(sampler.noise(args.seed, range(64)), label)
    across, down = channel_kl(sampler.infer(x, label))[:2].argmax(1).tolist()  # of (L, z)
    values, rows = torch.linspace(-2.25, 2.25, args.steps), []
    for value in values:
        noise = [eps.repeat(args.steps, 1, 1, 1) for eps in sampler.noise(args.seed, [0])]
        noise[0][:, across], noise[1][:, down] = values[:, None, None], value
        rows.append(sampler.images(noise, label))
    marks = [f"{float(v):.2f}" for v in values]
    what = f"across: group 1, channel {across}; down: group 2, channel {down}"
    save_grid(args.out, what, rows, row_names=marks, column_names=marks)

def outpaint(sampler, args):
    """Figure 6: latents of one --batch, from 4x4 up, are widened with fresh noise."""
    size = sampler.config.resolution, sampler.config.resolution * args.width
    images, x, label = next(encoded(sampler, args))

    def around(z, fresh, prior):
        """A group's noise: fresh, but where the image stands what makes its z under the new prior."""
        here = np.s_[:, :, :, :z.shape[3]]  # all of a 1x1 group
        fresh[here] = lvae.whiten(z, lvae.Gaussian(prior.mean[here], prior.var[here]))
        return fresh
    fresh = sampler.noise(args.seed, range(len(x)), size)
    noise = [partial(around, l.z, eps) for l, eps in zip(sampler.infer(x, label).latents, fresh)]
    wide = sampler.images(noise, label, n=len(x), size=size)  # (B, H, W, 3)
    save_grid(args.out, f"{len(wide)} images", list(zip(images, wide)), column_names=["image", "outpainted"])

# ---------------- the rate of every group
def rates(sampler, args):
    """KL of every latent group and level, its target (where its weight is 1), distortion, negative ELBO.
    Active channels: mean KL above 0.01 nats."""
    config, kl, distortion, count = sampler.config, 0, 0.0, 0
    torch.manual_seed(args.seed)
    for _, x, label in encoded(sampler, args):
        out = sampler.infer(x, label, draw=True)
        kl, count = kl + len(x) * channel_kl(out), count + len(x)  # (L, z)
        distortion += float(lvae.distortions(out, x, config).sum())
    kl, distortion, target = (kl / count).cpu().numpy(), distortion / count, lvae.kl_shares(config).numpy()
    rate, sides = kl.sum(), np.repeat(sampler.model.sides, config.groups[::-1])  # (L,)
    rows = [(i + 1, side, [i]) for i, side in enumerate(sides)]
    rows += [("level", side, sides == side) for side in sampler.model.sides]
    print("group  level    KL nats   % of rate   target %        active channels")
    for name, side, mine in rows:
        nats, goal, active = kl[mine].sum(), target[mine].sum(), kl[mine] > 0.01
        print(f"{name:>5}  {f'{side}x{side}':7} {nats:8.2f}  {100 * nats / rate:9.1f}   "
              f"{goal:5.1f} - {2 * goal:5.1f}   {active.sum():2} of {active.size}")
    total = rate + distortion
    print(f"rate {rate:.2f} + distortion {distortion:.2f} = negative ELBO {total:.2f} nats per image, "
          f"{lvae.bits_per_dim(total, config):.4f} bits/dim; {count} images")

# ---------------- metrics
NETWORK = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"

def load_network(path, device):
    """A TorchScript network that gives features, or features and logits, or has NETWORK's two options -> a
    function of uint8 (B, H, W, 3): features (B, D) and perhaps class probabilities (B, K)."""
    with explained(f"--features {path}: expected a TorchScript network, such as {NETWORK}"):
        net = torch.jit.load(path, map_location=device).eval()
        two = "no_output_bias" in str(net.forward.schema)

    @torch.no_grad()
    def network(images):
        x = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).contiguous()
        with explained(f"{path}: expected a network for uint8 images {tuple(x.shape)}"):
            if two:
                out = net(x, return_features=True), net(x, no_output_bias=True)
            else:
                out = net(x)
                out = [out] if torch.is_tensor(out) else [out[0], out[1].float().softmax(1)]
            out = [t.flatten(1).float().cpu().numpy() for t in out]
        return dict(zip(("features", "probabilities"), out))
    return network

def frechet(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|² + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^½) (Heusel et al., 2017)."""
    cross = np.emath.sqrt(np.linalg.eigvals(sigma1.astype(np.float64) @ sigma2)).real.sum()
    return max(float(np.square(mu1 - mu2).sum() + sigma1.trace() + sigma2.trace() - 2 * cross), 0.0)

def inception_score(probabilities):
    """exp of the mean KL between each image's class probabilities (N, K) and their split's mean, averaged
    over splits of 5000 (Salimans et al., 2016)."""
    parts = torch.from_numpy(probabilities).double().clamp_min(1e-38).split(5000)
    return float(np.mean([(p * (p / p.mean(0)).log()).sum(1).mean().exp() for p in parts]))

def precision_recall(reference, samples, device, k=3):
    """Share of samples within the k-nearest-neighbour balls of the reference, and the reverse (Kynkäänniemi
    et al., 2019). Features (N, D) and (M, D), more than k of each."""
    device = device if device.type == "cuda" else "cpu"  # for float64
    a, b = (torch.from_numpy(features).to(device).double() for features in (reference, samples))

    def within(points, centres):  # k + 1 nearest: the first is the point itself
        radii = torch.cat([torch.cdist(p, centres).kthvalue(k + 1).values for p in centres.split(1000)])
        inside = torch.cat([(torch.cdist(p, centres) <= radii).any(1) for p in points.split(1000)])
        return float(inside.double().mean())
    return within(b, a), within(a, b)

def described(parts, network):
    """Batches of images -> features, their moments, class probabilities, mean saturation of HSV."""
    rows, saturation = [], []
    for images in parts:
        top, low = np.max(images, axis=3).astype(float), np.min(images, axis=3)  # (B, H, W)
        saturation += ((top - low) / np.maximum(top, 1)).mean((1, 2)).tolist()
        rows.append(network(images))
    require(len(saturation) > 1, "one image has no covariance")
    known = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    return known | {"mu": known["features"].mean(0, dtype=np.float64),
                    "sigma": np.cov(known["features"], rowvar=False, dtype=np.float64),
                    "saturation": np.mean(saturation), "side": len(images[0])}

def statistics(path, network, batch, size):
    """What `described` says, of an .npz or a folder. A reference batch has its mu and sigma."""
    if not path.endswith(".npz"):
        require(size, f"{path}: compared at which --image-size?")
        known = described((some for _, some in batches(open_images(path, size), batch)), network)
        if "probabilities" in known:  # sorted, and the IS goes by parts
            known["probabilities"] = np.random.default_rng(0).permutation(known["probabilities"])
        return known
    with explained(f"{path}: expected arr_0, uint8 (N, H, W, 3), or mu and sigma"), np.load(path) as file:
        given = dict(file)
        if "arr_0" not in given:
            return given | {"mu": file["mu"], "sigma": file["sigma"]}  # a KeyError if they are missing
        images = given.pop("arr_0")
        require(images.dtype == np.uint8 and images.shape[3:] == (3,), f"it is {images.dtype} {images.shape}")
    return described(np.split(images, range(batch, len(images), batch)), network) | given

def made(sampler, args):
    """Batches of samples, or of what autoencoder or LVAE make of --data."""
    if args.reconstruct == "autoencoder":
        parts = batches(find_images(sampler, args), args.batch, args.n)
        return (sampler.decode(sampler.latents(images)) for _, images in parts)
    if args.reconstruct == "lvae":
        parts = encoded(sampler, args)
        return (sampler.images(sampler.posterior(x, label), label) for _, x, label in parts)
    labels = even_labels(sampler.labels(args.label), args.n)
    labels = np.random.default_rng(args.seed).permutation(labels)  # the IS goes by parts
    return (images for _, images in draw_all(sampler, args, labels))

def evaluate(sampler, args):
    """Table 3: FID, IS, precision, recall as guided-diffusion's evaluator; saturation (footnote 2)."""
    device, reference, row = setup(args.device)[0], {}, {}
    network = load_network(args.features, device)
    size = args.image_size or ((sampler.size if args.reconstruct else sampler.out_size) if sampler else 0)
    if args.reference:
        reference = statistics(args.reference, network, args.batch, size)
    if sampler:
        found = described(made(sampler, args), network)
    else:
        found = statistics(args.source, network, args.batch, size or int(reference.get("side", 0)))
    with explained("--reference: expected statistics of the same --features"):
        if reference:
            row["FID"] = frechet(found["mu"], found["sigma"], reference["mu"], reference["sigma"])
        if "probabilities" in found:
            row["IS"] = inception_score(found["probabilities"])
        sets = [some.get("features", ()) for some in (reference, found)]
        if min(map(len, sets)) > 3:
            row["precision"], row["recall"] = precision_recall(*sets, device)
        row["saturation"] = float(found.get("saturation", math.nan))
    print("  ".join(f"{name:>12}" for name in row))
    print("  ".join(f"{value:12.4f}" for value in row.values()))
    if args.export:
        daes.write(args.export, lambda file: np.savez(file, **found))
        say(f"{args.export}: statistics of {args.source}")

def neighbors(sampler, args):
    """Figure 8: samples, and the images of --data nearest to them in latent space or in --features."""
    images, labels = find_images(sampler, args), even_labels(sampler.labels(args.label), args.n)
    network = load_network(args.features, sampler.device) if args.features else None

    def features(some):  # (B, D) float64
        if network:
            return torch.from_numpy(network(some)["features"]).double()
        return sampler.latents(some).flatten(1).cpu().double()
    drawn = np.concatenate([some for _, some in draw_all(sampler, args, labels)])
    targets, found, distances = features(drawn), [], []
    for rows, some in batches(images, args.batch):
        found += rows
        distances.append(torch.cdist(targets, features(some)))  # (n, B)
    nearest = torch.cat(distances, 1).topk(min(args.neighbors, len(found)), largest=False)
    rows = [[found[i] for i in order] for order in nearest.indices]
    names = [sampler.classes[c][:20] for c in labels] if sampler.config.num_classes else None
    grid = [[image, *map(images.read, row)] for image, row in zip(drawn, rows)]
    save_grid(args.out, f"{args.n} samples and the nearest of {len(found)} images", grid,
              row_names=names, column_names=["sample", "nearest"])
    for number, (row, values) in enumerate(zip(rows, nearest.values)):
        say(f"  {number}: " + ", ".join(f"{images.names[i]} ({d:.2f})" for i, d in zip(row, values)))

# ---------------- speed (Table 4)
def bench(sampler, args):
    """Table 4: seconds per 1000 images, FLOP, and the share of the fastest matrix product."""
    config, device, most = sampler.config, sampler.device, max(args.batch, args.train or 0)
    x = torch.randn(most, config.data_channels, config.resolution, config.resolution, device=device)
    label, weights = even_labels(sampler.labels(args.label), most), guidance(sampler, args)
    noise = sampler.noise(0, range(args.batch))

    def draw(n):
        low_res = lvae.shrink(x[:n], config)
        sampler.generate([eps[:n] for eps in noise], label[:n], low_res=low_res, **weights)
    stages = {"LVAE": (draw, args.batch), "decoder": (lambda n: sampler.decode(x[:n]), args.batch)}
    if args.train:
        model = lvae.place(lvae.LVAE(config).train(), device)
        state = model, copy.deepcopy(model).eval(), lvae.make_optimizer(model)
        if args.compile:
            model.compile(dynamic=False)

        def update(n):
            lvae.train_step(*state, [(x[:n], sampler.known(label[:n]))], 1, sampler.dtype)
        stages["training"] = update, args.train
    side = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, side, side, device=device).to(sampler.dtype)
    peak = 2 * side ** 3 / min(timed(lambda: a @ b, 1.0))  # FLOP/s of a large matrix product
    print(f"{args.source}: {sampler.size}x{sampler.size} images, w_mu {weights['mean_guidance']}, batch "
          f"{args.batch}, {str(sampler.dtype)[6:]}; {device}, peak {peak / 1e12:.3f} TFLOP/s")
    print("stage     GFLOP per image   s per 1000 images    images/s  share of peak")
    costs = {name: np.array([count_flops(stage), np.median(timed(partial(stage, n), args.seconds)) / n])
             for name, (stage, n) in stages.items()}
    costs["together"] = costs["LVAE"] + costs["decoder"]
    for name, (flop, seconds) in costs.items():
        print(f"{name:9} {flop / 1e9:15.4g} {1000 * seconds:19.2f} {1 / seconds:11.2f} "
              f"{flop / seconds / peak:14.1%}")

def count_flops(stage):
    """The floating-point operations of stage(1), 2 per multiplication with addition."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    eager = torch.compiler.set_stance("force_eager")  # what is compiled cannot be counted
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), eager:
        stage(1)
    return counter.get_total_flops()

def timed(function, budget):
    """The seconds of calls, after one to warm up, for `budget` seconds."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=budget).times

# ---------------- command line
def at_least(low, kind=int, several=False):
    """argparse type: a number from `low` up, or A,B,.. -> a list of them."""
    def number(text):
        values = [kind(word) for word in (text.split(",") if several else [text])]
        if not all(low <= value < math.inf for value in values):
            raise argparse.ArgumentTypeError(f"expected numbers from {low} up, not {text}")
        return values if several else values[0]
    return number

positive, amount, weights = at_least(1), at_least(0, float), at_least(-math.inf, float, several=True)
OPTIONS = {  # kind (a tuple is a choice, bool a switch, list one or more), default, help
    "images": (list, None, "images, folders"),
    "--label": (str, None, "names, their beginnings, numbers or none, by commas (all; the images' own)"),
    "--mean-guidance": (weights, None, "w_mu, or A,B,.. per level, coarsest first (0; ImageNet 1.5)"),
    "--variance-guidance": (weights, None, "w_sigma, likewise (0; ImageNet 3); given one, the other is 0"),
    "--temperature": (amount, 1.0, "factor of every prior's std, but an upsampler's"),
    "--upsampler": (str, None, "an upsampler's checkpoint, to enlarge the samples"),
    "--n": (positive, None, "how many images"),
    "--out": (str, None, "the picture"),
    "--npz": (str, None, "arr_0 uint8 (N, H, W, 3), shuffled; arr_1 labels"),
    "--groups": (at_least(1, several=True), None, "also with only the first k latent groups: one or more k"),
    "--steps": (at_least(2), None, "images per axis, ends included"),
    "--width": (positive, 2, "images wide"),
    "--data": (str, None, "folder of images, LSUN LMDB, or toy (what it was trained on)"),
    "--features": (str, None, f"TorchScript network, such as {NETWORK}"),
    "--reference": (str, None, ".npz (mu and sigma, arr_0, or both) or folder of images"),
    "--reconstruct": (("autoencoder", "lvae"), None, "not samples, but what it makes of --data"),
    "--image-size": (positive, None, "side of folders' images (the checkpoint's)"),
    "--export": (str, None, ".npz of the statistics, a --reference"),
    "--neighbors": (positive, 6, "per sample"), "--seconds": (amount, 5.0, "to time each stage for"),
    "--train": (positive, None, "also time a training step of so many images"),
    "--batch": (positive, 16, "images at a time"), "--seed": (at_least(0), 0, "of the noise"),
    "--device": (str, "auto", "cuda, mps, cpu, .."),
    "--precision": (("auto", "bf16", "fp32"), "auto", "of the convs; auto: bf16 if the device has it"),
    "--compile": (bool, False, "torch.compile: takes minutes"),
    "--dae": (str, None, "autoencoder, instead of the checkpoint's")}
COMMON = "--batch --seed --device --precision --compile --dae"
GUIDED = "--label --mean-guidance --variance-guidance --temperature"
COMMANDS = {  # options, some with another default
    generate: f"{GUIDED} --upsampler --n --out --npz",
    reconstruct: "images --label --groups --out=reconstructions.png",
    interpolate: "images --label --steps=5 --out=interpolation.png",
    manifold: "--label --steps=7 --out=manifold.png",
    outpaint: "images --label --width --out=outpainted.png",
    rates: "--data --label --n=1000",
    evaluate: f"{GUIDED} --upsampler --n=10000 --data --reconstruct --features --reference --export "
              "--image-size",
    neighbors: f"{GUIDED} --n=8 --neighbors --data --features --out=neighbors.png",
    bench: f"{GUIDED} --seconds --train"}

def main(argv=None):
    parser = daes.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for function, options in COMMANDS.items():
        text = function.__doc__
        own = commands.add_parser(function.__name__, help=text.splitlines()[0], description=text)
        own.set_defaults(function=function)
        own.add_argument("source", help="checkpoint, church, bedroom, imagenet; evaluate: also .npz, folder, "
                         "toy; bench: also a preset")
        for name, _, special in (word.partition("=") for word in f"{options} {COMMON}".split()):
            kind, default, text = OPTIONS[name]
            more = {bool: {"action": "store_true"}, list: {"nargs": "+"}}.get(
                kind, {"choices" if isinstance(kind, tuple) else "type": kind})
            default = special or default
            text = f"{text} ({default})" if default else text
            alias = ["--samples"] if name == "--n" else []  # torchrun has a --n of its own
            own.add_argument(name, *alias, default=default, help=text, **more)
    args = parser.parse_args(argv)
    require(args.command == "generate" or world()[1] == 1, f"{args.command} runs in one process: no torchrun")
    sampler = state = None
    if args.command == "bench" and args.source in lvae.PRESETS:  # with random weights
        config = lvae.PRESETS[args.source]
        stage = daes.PRESETS.get(config.first_stage, daes.PRESETS["small-f4"])
        state = {"config": config, "dataset": args.source, "run": {}, "classes": [],
                 "ema": lvae.LVAE(config).state_dict(), "dae": daes.Autoencoder(stage).state_dict()}
    images = args.source.endswith(".npz") or args.source == "toy" or os.path.isdir(args.source)
    if not images or args.command != "evaluate":
        sampler = Sampler(args.source, args.device, args.precision, args.dae,
                          getattr(args, "upsampler", None), state, args.compile)
    require(not sampler or not sampler.config.upsample or args.command in ("reconstruct", "rates", "bench"),
            f"{args.source} is an upsampler, which draws nothing alone: pass it as --upsampler")
    args.function(sampler, args)

if __name__ == "__main__":
    cli(main)
