"""Train the two stages: an autoencoder (dae.py), then a hierarchical VAE on its latents (lvae.py).

    python train.py                                              # built-in toy scenes, a laptop, 15 minutes
    python train.py --data photos/                               # a folder of images; sub-folders are classes
    python train.py --data photos/ --dae kl-f8 --image-size 256  # latents of an official autoencoder
    python train.py --data latents.npz                           # latents of any other autoencoder
    python train.py --dataset church --data church_outdoor_train_lmdb      # the paper's, Table 5
    torchrun --nproc-per-node 8 train.py --dataset church --data DATA      # the same curve on eight GPUs

A run's folder, runs/NAME or --out, holds checkpoint.pt (all that sampling or resuming needs), log.jsonl and
samples/*.png. The same command again resumes, on a CPU to the last bit.
"""
import argparse
import atexit
import copy
import ctypes
import glob
import itertools
import json
import os
import signal
import sys
import time
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache
from io import BytesIO

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from tqdm import tqdm

import dae as daes
import lvae
from dae import cli, explained, printable, require
from lvae import knob

@dataclass(frozen=True)
class Run:
    """What a run reads and writes. Also options: lvae.Config's fields and, as --dae-.., dae.Config's."""
    dataset: str = knob("toy", "preset, a column of Table 5")
    data: str = knob("", "folder of images (sub-folders are classes), LSUN LMDB, or .npz of latents")
    init: str = knob("", "checkpoint, or pipeline of the paper, whose model and autoencoder to begin with")
    dae: str = knob("", "first stage: FILE, kl-f8, .. (downloaded), train, none (pixels); else the preset's")
    dae_preset: str = knob("small-f4", "what --dae train trains")
    out: str = knob("", "the run's folder, else runs/DATASET, or runs/ and the data folder's name")
    image_size: int = knob(0, "side of the square images; 0: the preset's")
    flip: bool = knob(False, "horizontal flips")
    val: str = knob("", "folder of held-out images")
    holdout: float = knob(0.05, "without --val: share of --data held out, at most 2000 images")
    seed: int = knob(0, "of weights, order and noise")
    device: str = knob("auto", "cuda, cuda:1, mps, cpu, xla, ...")
    precision: str = knob("auto", "auto: bf16 where the hardware has it")
    compile: str = knob("auto", "of the LVAE; auto: on CUDA, for 500 steps or more")
    log_every: int = knob(20, "steps between lines of log.jsonl")
    every: int = knob(500, "steps between checkpoints, evaluations and sample grids")

# ---------------- the loop of both stages
def loop(run, stage, steps, path, facts, parts, update, look):
    """Train a stage with update(step) -> statistics; `path` keeps facts and parts."""
    done, in_a_row = facts["step"], 0
    if done == 0:
        save_checkpoint(path, facts, parts)
    bar = tqdm(range(done + 1, steps + 1), stage, steps, initial=done, unit="step", disable=world()[0] > 0)
    for step in bar:
        seed_step(run.seed, step)  # all that is random is of (seed, step)
        started = time.time()
        stats = update(step) | {"seconds": time.time() - started}
        in_a_row = in_a_row + 1 if stats["skipped"] else 0
        require(in_a_row < 100, f"100 steps in a row of the {stage} skipped: another --out, a lower rate")
        stats["skipped"] += facts["skipped"]
        facts |= {"step": step, "skipped": stats["skipped"]}
        stopping, last = asked_to_stop(), step == steps
        if step % run.log_every == 0 or last:
            average(list(filter(torch.is_tensor, stats.values())))
            log(run, stage, step, stats)
            bar.set_postfix(loss=float(stats["loss"]))
        if step % run.every == 0 or last or stopping:
            save_checkpoint(path, facts, parts)
            if stopping and not last:
                say(f"{' '.join(asked) or 'signal'}: saved step {step}. The same command goes on from there.")
                sys.exit()
            if world()[0] == 0:
                look(step)

def seed_step(seed, step):
    torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))

def log(run, stage, step, stats):
    """Append to log.jsonl, in one write; of a step run twice the later line counts."""
    if world()[0] == 0:
        line = json.dumps({"stage": stage, "step": step} | stats, default=torch.Tensor.tolist)
        with open(f"{run.out}/log.jsonl", "a") as file:
            file.write(line + "\n")

# ---------------- what happens in which order
def train_both(index, run, model_options, dae_options):
    """One process (XLA's `index`) of a run: first stage, latents, second stage."""
    with suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGTERM, ask), signal.signal(signal.SIGINT, ask)
    device, dtype = setup(run.device, run.precision)
    wanted, npz = asdict(run) | {"dae_options": dae_options}, run.data.endswith(".npz")
    start, ae = starting_point(run, wanted | model_options)
    if npz:
        data = read_latents(run.data, run.holdout)
        shape, classes = data.h.shape[2:], 0 if data.labels is None else int(data.labels.max()) + 1
        require(not ae or ae.config.z_channels == shape[0], f"--dae: not for latents of {shape[0]} channels")
    else:
        ae_config = ae.config if ae else replace(daes.PRESETS[run.dae_preset], **dae_options)
        f, size = ae_config.f, run.image_size or start["config"].resolution * ae_config.f
        images = first = open_images(run.data, size, start["classes"])
        n = len(first.names)
        rows = split(n, run.holdout)
        if run.val:
            val = open_images(run.val, size, first.classes)
            images = Images(first.names + val.names, lambda i: first.open(i) if i < n else val.open(i - n),
                            np.append(first.labels, val.labels), first.classes)
            rows = np.arange(n), np.arange(n, len(images.names))
        shape, classes = (ae_config.z_channels, size / f, size / f), len(images.classes)
    config = fitted(run, start, model_options, shape, classes)
    counts = list(map(len, (data.train, data.held) if npz else rows))
    require(start.setdefault("counts", counts) == counts, f"--out had {start['counts']} images, now {counts}")
    with claim(run.out):  # only now: what was asked for fits
        if not (ae or npz):
            ae = train_dae(run, ae_config, size, images, rows[0], wanted, device, dtype)
        ae = ae and lvae.place(ae, device)  # channels-last: only training is slower so
        if not npz:
            data = encode_all(run, ae, size, images, rows, device, dtype)
        if not config.scale:  # to be measured on up to 10,000 of the latents
            h = data.h[data.train[::1 + len(data.train) // 10_000], 0].astype(np.float32)
            require(h.std() > 0, "nothing to learn from: all images are the same")
            shift = model_options.get("shift", float(h.mean()))
            config = replace(config, shift=shift, scale=float(h.std()))
        train_lvae(run, config, ae, data, start | {"run": wanted}, device, dtype)

def starting_point(run, options):
    """What to go on from (own checkpoint, --init's, preset), as load_checkpoint has it; its autoencoder."""
    path = f"{run.out}/checkpoint.pt"
    if start := begun(path, load_checkpoint, options):
        return start, autoencoder_of(start, path)
    start = {"config": lvae.PRESETS[run.dataset], "dataset": run.dataset, "classes": [], "dae": {}}
    if run.init:
        known = load_checkpoint(run.init)
        require(run.dataset in ("toy", known["dataset"]), f"{run.init} is a model of {known['dataset']}")
        start = {name: known[name] for name in start} | {"model": known["ema"], "ema": known["ema"]}
    config, npz = start["config"], run.data.endswith(".npz")
    name = run.dae or ("--init's" if start["dae"] else "latents" if npz else config.first_stage)
    require(name == "train" or not options["dae_options"], "--dae-.. options are for --dae train")
    if name == "none" and config.first_stage != name:
        start["config"] = replace(config, first_stage=name, shift=127.5, scale=127.5)
    if name in ("none", "--init's"):
        return start, autoencoder_of(start, run.init)
    new = name == "train" or config.first_stage == "none" or start["dae"]  # scale to be measured
    ae = None if name == "train" or npz and not run.dae else daes.load(name)
    return start | {"config": replace(config, first_stage=name, scale=0.0 if new else config.scale)}, ae

def autoencoder_of(state, path):
    """A checkpoint's autoencoder, or None."""
    if state["config"].first_stage == "none":
        return daes.Identity()
    return daes.from_state(state["dae"], path) if state["dae"] else None

def fitted(run, start, options, shape, classes):
    """The Config for data of a shape (C, H, W) in so many classes."""
    config = start["config"]
    if run.dataset == "toy" and "model" not in start:  # this preset follows the user's own data
        config = lvae.adapted(config, shape[0], int(shape[1]), classes)
    config = replace(config, **options)
    expected = config.data_channels, config.resolution, config.resolution
    require(shape == expected, f"data are (C, H, W) = {shape}, the config for {expected}: --image-size?")
    require(not config.num_classes or 1 <= classes <= config.num_classes,
            f"data of {classes} classes does not fit num_classes {config.num_classes}")
    return config

# ---------------- stage two: the hierarchical VAE
def train_lvae(run, config, ae, data, start, device, dtype):
    """Train the LVAE. ae: the autoencoder, or None for latents of another."""
    seed_step(run.seed, 0)
    model = lvae.place(lvae.LVAE(config), device)
    ema, optimizer = copy.deepcopy(model).eval(), lvae.make_optimizer(model)
    path, parts = f"{run.out}/checkpoint.pt", {"model": model, "ema": ema, "optimizer": optimizer}
    facts = start | {"config": asdict(config), "classes": data.classes if config.num_classes else []}
    facts |= resume(start, parts)
    if run.compile == "yes" or run.compile == "auto" and device.type == "cuda" and config.steps >= 500:
        model.compile(dynamic=False)
    kind = f"{config.num_classes} classes" if config.num_classes else "unconditional"
    say(f"data    {run.data or 'toy'}: {len(data.train)} to train on, {len(data.held)} held out, {kind}")
    say(f"device  {device}, {world()[1]} process(es), {torch.get_num_threads()} threads, in {dtype}")
    say(f"config  {config}")
    mine, source = my_part(config.batch), "cpu" if device.type == "xla" else device

    def batch(number):
        """Part `mine` of a batch; noise is drawn for all of it, so that N processes train as one."""
        rows = data.train[batch_indices(run.seed, len(data.train), config.batch, number)[mine]]
        view = np.random.default_rng((run.seed, number)).integers(2, size=config.batch)[mine]
        x, label = load_batch(data, rows, config, device, view)
        noise = [torch.randn(config.batch, *s, device=source)[mine].to(device) for s in model.latent_shapes()]
        dropped = torch.rand(config.batch, device=source)[mine].to(device) < config.label_dropout
        return x, label, noise, None, dropped

    def update(step):
        batches = [batch((step - 1) * config.accumulate + micro) for micro in range(config.accumulate)]
        stats = lvae.train_step(model, ema, optimizer, batches, step, dtype, average)
        stats["kl_levels"] = torch.stack([kl.sum() for kl in stats.pop("kl").split(config.groups[::-1])])
        return stats

    def look(step):
        with torch.no_grad(), lvae.autocast(device, dtype):
            if len(data.held):
                log(run, "lvae", step, held_out(ema, data, device))
            if ae:
                save_pictures(run, ema, ae, data, step, device)
    loop(run, "lvae", config.steps, path, facts, parts | {"dae": ae or daes.Identity()}, update, look)
    say(f"done: {path}, {facts['skipped']} steps skipped")

def held_out(model, data, device):
    """Held-out distortion and rate, nats per sample, and negative ELBO, bits per dimension."""
    seed_step(0, 0)
    config, total = model.config, np.zeros(2)
    for rows in np.split(data.held, range(config.batch, len(data.held), config.batch)):
        x, label = load_batch(data, rows, config, device)
        losses = lvae.objective(model(x, label), x, config)
        total += len(x) * np.array([float(losses.distortion), float(losses.rate)])
    distortion, rate = total / len(data.held)
    bits = lvae.bits_per_dim(distortion + rate, config)
    tqdm.write(f"negative ELBO of {len(data.held)} held-out images: {bits:.4f} bits/dim")
    return {"held_out_distortion": distortion, "held_out_rate": rate, "held_out_nelbo_bits": bits}

def save_pictures(run, model, ae, data, step, device):
    """Held-out images, their reconstructions, and samples: eight of each class, guided if they can be."""
    config, held = model.config, data.held if len(data.held) else data.train
    x, label = load_batch(data, held[np.linspace(0, len(held) - 1, 8).astype(int)], config, device)
    low_res, rebuilt = lvae.shrink(x, config), model(x, label).mean
    rows, names, guidance = 1 if config.upsample else min(config.num_classes, 10) or 8, [], {}
    if config.num_classes and not config.upsample:
        label, names = torch.arange(rows, device=device).repeat_interleave(8), data.classes[:rows]
    if config.num_classes and config.hierarchical_prior:
        guidance = {"mean_guidance": lvae.guidance_levels(config, 1.5), "variance_guidance": 1.0}
    seed_step(0, 0)  # the same at every step: progress shows
    samples = model.generate(None, label, 8 * rows, low_res=low_res, **guidance)
    parts = lvae.denormalise(torch.cat([x, rebuilt, samples]), config).split(8)
    images = [to_uint8(ae.decode(part)) for part in parts]
    save_picture(f"{run.out}/samples/{step:07d}.png", images, ["encoded", "LVAE", *names])

# ---------------- stage one: the autoencoder
def train_dae(run, config, size, images, rows, wanted, device, dtype):
    """Train an autoencoder on rows of images (Section 3.1); resumes from OUT/dae.pt."""
    require(not config.codebook, "--dae train trains KL autoencoders: --dae-codebook 0")
    require(size >= 32 or not config.adversarial_weight, "an adversary needs --image-size 32 or more")
    if device.type == "xla":  # there the hosts train
        device, dtype = setup("cpu", run.precision)
    path, mine = f"{run.out}/dae.pt", my_part(config.batch)
    seed_step(run.seed, 0)
    parts = {"dae": daes.Autoencoder(config).to(device)}
    if config.adversarial_weight:
        parts["discriminator"] = daes.Discriminator().to(device)
    optimizers = daes.make_optimizers(parts, config)
    saved = parts | {f"{name}_optimizer": adam for name, adam in optimizers.items()}
    wanted = wanted | {"dae_options": asdict(config)}
    facts = {"run": wanted} | resume(begun(path, daes.read, wanted), saved)
    perceptual = None
    with suppress(ImportError, OSError):  # no `lpips` package (Zhang et al., 2018), or not its weights
        if config.perceptual_weight:
            import lpips
            perceptual = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False).to(device)
    say(f"autoencoder f = {config.f}" + ("" if perceptual else ", without lpips' perceptual term"))

    def batch(number):
        """Part `mine` of a batch, with --flip half of it mirrored; for a bad image the next good one."""
        mirror = np.random.default_rng((run.seed, number)).random(config.batch)[mine] < run.flip / 2
        indices = batch_indices(run.seed, len(rows), config.batch, number)[mine]
        good = [images.first_good(rows, i) for i in indices]
        return [image[:, ::-1] if flip else image for image, flip in zip(good, mirror)]
    batches = read_ahead(batch, itertools.count(facts["step"]))

    def update(step):
        x, side = to_tensor(next(batches)).to(device), size // config.f
        noise = torch.randn(config.batch, config.z_channels, side, side, device=device)[mine]
        return daes.train_step(parts, optimizers, x, noise, step, perceptual, average,
                               lvae.autocast(device, dtype))

    def look(step):
        good = batch(0)
        with torch.no_grad(), lvae.autocast(device, dtype):
            rebuilt = parts["dae"].decode(parts["dae"].encode(to_tensor(good).to(device)))
        save_picture(f"{run.out}/samples/dae_{step:06d}.png", [good, to_uint8(rebuilt)])
    loop(run, "dae", config.steps, path, facts, saved, update, look)
    return parts["dae"].eval()

def read_ahead(read, items):
    """read(item) of every item, in order; four threads read ahead."""
    with ThreadPoolExecutor(4) as pool:
        begun = (pool.submit(read, item) for item in items)
        waiting = list(itertools.islice(begun, 4))
        while waiting:
            yield waiting.pop(0).result()
            waiting += itertools.islice(begun, 1)

# ---------------- images and their latents
# Raw latents (N, views, C, h, w); labels (N,) or None; rows to train on and held out; the classes' names.
Data = namedtuple("Data", "h labels train held classes")

def load_batch(data, rows, config, device, view=0):
    """Rows -> normalised x (B, C, h, w) and labels (B,) or None, on the device."""
    h = data.h[rows, view % data.h.shape[1]].astype(np.float32)
    label = torch.from_numpy(data.labels[rows]).to(device) if config.num_classes else None
    return lvae.normalise(torch.from_numpy(h).to(device), config), label

def read_latents(path, holdout):
    """An .npz with `latents` (N, C, H, H) and perhaps `labels` (N,) -> Data."""
    with explained(f"{path}: expected latents (N, C, H, H), finite numbers"), np.load(path) as file:
        h, labels = file["latents"], None
        require(h.ndim == 4 and np.abs(h, dtype=np.float32).max() < 1e12, str(h.shape))
        if "labels" in file:
            labels = file["labels"].astype(np.int64)
            require(labels.shape == h.shape[:1] and 0 <= labels.min() <= labels.max() < 1e6, "labels")
    return Data(h[:, None], labels, *split(len(h), holdout), [])

@torch.no_grad()
def encode_all(run, ae, size, images, rows, device, dtype):
    """Encode all images, once -> Data. The latents, NaN for bad images, stay in OUT."""
    sums = [v.cpu().double().sum().item() for v in ae.state_dict().values()]
    times = [os.path.getmtime(name) for name in [*images.names, f"{run.data}/data.mdb"]
             if os.path.isfile(name)]
    key = zlib.crc32(repr((images.names, times, size, run.flip, sums)).encode())
    path, side = f"{run.out}/latents_{key:016x}.npy", size // ae.config.f
    shape = len(images.names), 1 + run.flip, ae.config.z_channels, side, side  # (N, views, C, h, w)
    batch = max(1, 64 ** 3 // size ** 2)
    parts = np.split(np.arange(shape[0]), range(batch, shape[0], batch))

    def save(file):
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        decoded = read_ahead(lambda some: [images.read(i) for i in some], parts)
        blank = np.zeros((size, size, 3), np.uint8)
        for part in tqdm(decoded, "encoding", len(parts)):
            if asked:
                raise KeyboardInterrupt
            x = to_tensor([blank if image is None else image for image in part]).to(device)
            with lvae.autocast(device, dtype):
                h = torch.stack([ae.encode(view) for view in [x, x.flip(3)][:shape[1]]], dim=1)
            h = h.float().cpu().numpy()
            h[[image is None or not np.isfinite(row).all() for row, image in zip(h, part)]] = np.nan
            file.write(h.astype(np.float16).tobytes())
    if world()[0] == 0 and not os.path.exists(path):
        for old in glob.glob(f"{glob.escape(run.out)}/latents_{16 * '[0-9a-f]'}.npy"):  # no user's
            os.remove(old)
        with suppress(KeyboardInterrupt):
            daes.write(path, save)
    if asked_to_stop():  # all processes wait here
        sys.exit()
    h = np.load(path, mmap_mode="r")
    good = ~np.isnan(h[:, 0, 0, 0, 0])
    say(f"images: {(~good).sum()} of {len(good)} are bad and left out")
    train, held = (some[good[some]] for some in rows)
    require(len(train), f"no usable image of {len(good)}")
    return Data(h, images.labels, train, held, images.classes)

def split(count, share):
    """Indices (training, held out): a fixed shuffle."""
    order = np.random.default_rng(0).permutation(count)
    held = min(round(share * count), 2000, count - 1)
    return np.sort(order[held:]), np.sort(order[:held])

@lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    return np.random.default_rng((seed, epoch)).permutation(count)

def batch_indices(seed, count, batch, number):
    """Batch `number` of an endless pass over `count` items, shuffled anew each epoch."""
    places = range(number * batch, (number + 1) * batch)
    return np.array([epoch_order(seed, place // count, count)[place % count] for place in places])

FORMATS = "JPEG MPO PNG WEBP BMP GIF TIFF PPM JPEG2000 AVIF".split()  # they start no program
PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20  # bytes: no picture is lost for its text

class Images:
    """Names, open(i), which raises on a bad one, labels, classes."""
    def __init__(self, names, open, labels=None, classes=()):
        self.names, self.open, self.bad = names, open, set()
        self.labels, self.classes = np.zeros(len(names), int) if labels is None else labels, list(classes)

    def read(self, i):
        """Image i, (size, size, 3) uint8; None for a bad one, which is named once."""
        if i not in self.bad:
            try:
                return self.open(i)
            except Exception as e:  # whatever a broken file provokes in Pillow
                self.bad.add(i)
                tqdm.write(printable(f"skipped {self.names[i]}: {str(e) or type(e).__name__}"))

    def first_good(self, rows, start):
        """The first of `rows`, from `start` on, that is not bad."""
        for row in itertools.chain(rows[start:], rows[:start]):
            if (image := self.read(row)) is not None:
                return image
        raise ValueError(f"no usable image of {len(rows)}")

def open_images(path, size, known=()):
    """The images of a folder, an LSUN LMDB or the toy ('', 'toy'), of known classes if any."""
    if path in ("", "toy"):
        images = Images([f"toy {i}" for i in range(6144)], lambda i: toy(i, size)[0],
                        np.arange(6144) % len(BREADTH), BREADTH)
    elif os.path.exists(f"{path}/data.mdb"):
        with explained(f"{path} is an LMDB: it needs `pip install lmdb`"):
            import lmdb
            env = lmdb.open(path, readonly=True, lock=False, readahead=False)
            with env.begin() as txn:
                keys = list(txn.cursor().iternext(values=False))
        images = Images([key.decode(errors="replace") for key in keys],
                        lambda i: read_image(BytesIO(env.begin().get(keys[i])), size))
    else:
        files = list_images(path)
        require(files, f"{path}: no image found (expected a folder of .jpg, .png, ..)")
        images = Images(files, lambda i: read_image(files[i], size))
        parents = [os.path.dirname(os.path.relpath(file, path)).split(os.sep)[0] for file in files]
        classes, labels = np.unique(parents, return_inverse=True)
        if "" not in classes and len(classes) > 1:  # all in sub-folders
            images.classes, images.labels = classes.tolist(), labels
    if known:
        relabel(images, known, path)
    return images

def list_images(path):
    """All image files below a folder, sorted; each folder once, and none of a run."""
    endings = tuple(e for e, kind in Image.registered_extensions().items() if kind in FORMATS)
    seen, files = set(), []
    for folder, inside, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or {"checkpoint.pt", "dae.pt"} & set(names):
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(name for name in inside if name[0] != ".")
        files += [os.path.join(folder, name) for name in names
                  if name[0] != "." and name.lower().endswith(endings)]
    return sorted(filter(os.path.isfile, files), key=lambda file: file.split(os.sep))

def relabel(images, classes, what):
    """Number the images' classes as in `classes`, by name."""
    strange = sorted(set(images.classes) - set(classes))
    require(images.classes and not strange,
            f"{what}: sub-folders are {strange[:1] or 'no classes'}, expected {classes[:5]} ..")
    images.labels = np.array([classes.index(name) for name in images.classes])[images.labels]
    images.classes = classes

def read_image(source, size):
    """An image (path or file object) -> (size, size, 3) uint8: EXIF-rotated, numbers to 8 bits as README
    says, transparency over white, short side to `size`, centre cut."""
    Image.init()
    with Image.open(source, formats=[kind for kind in FORMATS if kind in Image.OPEN]) as image:
        image.draft("RGB", (2 * size, 2 * size))  # a JPEG decoder skips what shrinking discards
        with suppress(Exception):  # a broken EXIF says nothing
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image, np.float64)
            require(0 <= values.min() <= values.max() <= 65535, "its numbers are not those of a picture")
            whole = image.mode != "F" and (image.format != "TIFF" or "16" in image.mode)
            tops = [65535] if whole else [1, 255, 65535]
            top = min(top for top in tops if values.max() <= top)
            image = Image.fromarray((values / top * 255).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.LANCZOS))

def to_tensor(images):
    """Arrays of uint8, (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1

def to_uint8(x):
    """float (B, 3, H, W) in [-1, 1] -> array of uint8, (B, H, W, 3)."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

# ---------------- files
def save_picture(path, rows, row_names=(), column_names=()):
    """Save rows of uint8 images (H, W, 3) as one, in the format that its name says, else PNG."""
    names = [[printable(name) for name in some or ()] for some in (row_names, column_names)]
    height, width = (np.max([image.shape[:2] for row in rows for image in row], axis=0) + 2).tolist()
    font = ImageFont.load_default(10 + min(height, width) // 16)
    left = max((8 + int(font.getlength(name)) for name in names[0]), default=2)
    top = 4 + int(font.size * 1.3) if column_names else 2
    sheet = Image.new("RGB", (left + width * max(map(len, rows)), top + height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(Image.fromarray(image), (left + x * width, top + y * height))
    for y, name in enumerate(names[0]):
        draw.text((4, top + (y + 0.5) * height), name, fill="black", font=font, anchor="lm")
    for x, name in enumerate(names[1]):
        draw.text((left + (x + 0.5) * width, top // 2), name, fill="black", font=font, anchor="mm")
    kind = Image.registered_extensions().get(os.path.splitext(path)[1].lower(), "PNG")
    daes.write(path, lambda file: sheet.save(file, kind))

def save_checkpoint(path, facts, parts):
    """Write a checkpoint: facts, and the states of modules and optimizers."""
    if world()[0] == 0:
        state = facts | {name: part.state_dict() for name, part in parts.items()}
        state = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, state)
        daes.write(path, lambda file: torch.save(state, file))

def load_checkpoint(path):
    """A checkpoint, or a pipeline of the authors (a file or its published name) -> a dict: config, a Config;
    ema, dae, classes, dataset, run, step; ours also model, optimizer, skipped."""
    state = daes.read(path)
    with explained(f"{path}: not a checkpoint of the second stage, nor a pipeline of the paper"):
        state = {"run": {}, "step": 0, "dataset": None} | state
        if "vae.encoder.in_proj.weight" in state:
            state |= released_checkpoint(state, path)
        config = lvae.Config(**state["config"])
        require(sum(config.groups + config.encoder_layers) < 1000 and config.scale, "a strange config")
        parts = {name: dict(state[name]) for name in ("run", "ema", "dae")}
        return state | parts | {"config": config, "classes": list(map(str, state["classes"]))}

def released_checkpoint(state, path):
    """A pipeline of the authors, dae.* and vae.*, as our checkpoint; shapes tell the preset."""
    ema = lvae.from_released({k.removeprefix("vae."): v for k, v in state.items() if k.startswith("vae.")})
    for dataset, preset in lvae.PRESETS.items():
        with torch.device("meta"):
            like = lvae.LVAE(preset).state_dict()
        if {k: v.shape for k, v in like.items()} == {k: v.shape for k, v in ema.items()}:
            return {"config": asdict(replace(preset, attention="released")), "ema": ema, "classes": [],
                    "dae": daes.find(state, path)[0], "dataset": dataset}

def resume(start, parts):
    """Put a checkpoint's state, if any, into modules and optimizers; returns the progress."""
    for name in parts.keys() & start.keys():
        part, state = parts[name], start[name]
        with explained(f"the {name} of the checkpoint does not fit"):
            state = {k: state[k] for k in part.state_dict()}  # adversaries once had statistics, too
            if isinstance(part, torch.optim.Optimizer):  # rate and implementation are this device's
                state["param_groups"] = part.state_dict()["param_groups"]
            part.load_state_dict(state)
            for p, moments in getattr(part, "state", {}).items():  # fused Adam expects its memory format
                moments |= {k: torch.empty_like(p).copy_(v) for k, v in moments.items() if v.shape == p.shape}
    if start.get("step"):
        say(f"resuming at step {start['step']}")
    return {name: start.get(name, 0) for name in ("step", "skipped")}

def begun(path, read, wanted):
    """What `read` finds in a stage's file; {} before its first step. Refused if it was begun otherwise."""
    state = read(path) if os.path.exists(path) else {}
    run = state.get("run", {}) if isinstance(state, dict) else {}
    if not state or run and state.get("step") == 0:  # all may change yet, as memory may run out
        return {}
    known = run | (asdict(state["config"]) if read is load_checkpoint else {})
    free = "out device precision compile log_every every dae_preset steps recompute".split()
    for name, value in wanted.items():
        was, measured = known.get(name), (name, value) == ("scale", 0)
        require(name in free or measured or str(was).rstrip("/") == str(value).rstrip("/"),  # photos/
                f"{path} was trained with {name} = {was}, not {value}: the same options, or another --out")
    return state

def claim(out):
    """Make a run's folder, and lock its log until what is returned is closed."""
    os.makedirs(out, exist_ok=True)
    log = open(f"{out}/log.jsonl", "a+b")
    if world()[0] == 0:
        with suppress(ImportError):  # Windows has no locks of this kind
            import fcntl
            with explained(f"{out}: another process is training there"):
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        log.seek(0)
        log.truncate(log.read().rfind(b"\n") + 1)  # a kill may have torn its last line
    return log

# ---------------- devices and processes
def setup(name="auto", precision="auto"):
    """--device and --precision -> device and dtype of convs; joins torchrun's other processes."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # under torchrun: a GPU for each process
    with explained(f"--device {name} cannot be used"):
        if name == "xla":
            import torch_xla  # noqa: F401  # makes the device known to torch
        device = torch.empty(1, device=name).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with suppress(Exception):  # glibc is to keep freed memory: clearing it anew is a fifth of decoding
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks too are of the heap
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD, bytes
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and device.type != "xla" and not dist.is_initialized():
        dist.init_process_group(timeout=timedelta(days=2))  # NCCL for CUDA, gloo for CPUs
        atexit.register(dist.destroy_process_group)  # its threads end before Python
    fast = {"cpu": getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"),
            "cuda": device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False),
            "xla": os.environ.get("PJRT_DEVICE") == "TPU"}
    bf16 = fast.get(device.type) if precision == "auto" else precision == "bf16"
    return device, torch.bfloat16 if bf16 else torch.float32

def world():
    """(Rank of this process, number of processes)."""
    if "torch_xla" in sys.modules:  # imported for --device xla only
        import torch_xla.runtime as xr
        return xr.global_ordinal(), xr.world_size()
    count = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    return int(os.environ.get("RANK", 0)) if count > 1 else 0, count

def my_part(batch):
    """The slice of a batch that this process takes."""
    rank, count = world()
    require(batch % count == 0, f"{count} processes need a multiple of {count}, not batches of {batch}")
    return slice(rank * batch // count, (rank + 1) * batch // count)

def say(text):
    if world()[0] == 0:
        print(printable(text), flush=True)

def average(tensors):
    """Put their mean over all processes into tensors: one message for all."""
    xla, count = sys.modules.get("torch_xla"), world()[1]
    if count > 1:
        flat = torch.cat([t.flatten().float() for t in tensors])
        if xla:
            import torch_xla.core.xla_model as xm
            flat = xm.all_reduce(xm.REDUCE_SUM, flat.to(xla.device()))
        else:
            dist.all_reduce(flat)
        for t, mean in zip(tensors, (flat / count).split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))
    if xla:
        xla.sync()  # a step is two programs, each compiled once

asked = []  # names of signals that came: looked at between steps

def ask(number, frame):
    """What SIGTERM and Ctrl-C do; a second one ends at once."""
    asked.append(signal.Signals(number).name)
    signal.signal(number, signal.SIG_DFL)

def asked_to_stop():
    """Whether a signal came, to any process. All wait here for each other."""
    flag = torch.tensor([float(len(asked))])
    if world()[1] > 1:
        average([flag])
    return bool(flag > 0)

# ---------------- command line
def values(text):
    """argparse type: A,B,.. -> a tuple of ints, floats or words."""
    return tuple(int(word) if word.isdecimal() else word if word.isidentifier() else float(word)
                 for word in text.split(",") if word)

def parse(argv):
    """Command line -> Run, and the options given for the LVAE and for the autoencoder."""
    parser = daes.Parser(description=__doc__, argument_default=argparse.SUPPRESS)
    kinds = ("run", "", Run), ("lvae", "", lvae.Config), ("dae", "dae_", daes.Config)
    choices = {"precision": ("auto", "bf16", "fp32"), "compile": ("auto", "yes", "no"),
               "dataset": lvae.PRESETS, "dae_preset": daes.PRESETS}
    for title, prefix, kind in kinds:
        section = parser.add_argument_group(title, "" if kind is Run else "finest first; else the preset's")
        for f in fields(kind):
            more = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"type": values},
                    str: {"choices": choices.get(f.name)}}.get(type(f.default), {"type": type(f.default)})
            text = f.metadata["help"] + (f" ({f.default})" if kind is Run and f.default != "" else "")
            if f.name != "first_stage":  # --dae decides
                section.add_argument(f"--{prefix}{f.name}".replace("_", "-"), help=text, **more)
    given = vars(parser.parse_args(argv))
    run, model_options, dae_options = (
        {f.name: given[prefix + f.name] for f in fields(kind) if prefix + f.name in given}
        for _, prefix, kind in kinds)
    run = Run(**run)
    name = os.path.basename(os.path.abspath(run.data)).removesuffix(".npz") if run.data else run.dataset
    run = replace(run, out=run.out or f"runs/{name if run.dataset == 'toy' else run.dataset}")
    for_images = run.flip or run.val or run.image_size or run.dae in ("train", "none")
    require(0 <= run.holdout < 1 and min(run.image_size, run.seed) >= 0 and min(run.log_every, run.every) > 0,
            "--holdout: a share, below 1; --log-every, --every: from 1 up; other numbers: from 0 up")
    require(run.data or run.dataset.startswith("toy"),
            f"{run.dataset} needs --data, as http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip")
    require(os.path.realpath(run.data or "/") != os.path.realpath(run.out), "--out may not be --data")
    require(not for_images or not run.data.endswith(".npz"),
            "--flip, --val, --image-size, --dae train and none are not for an .npz of latents")
    require(run.device != "xla" or run.compile != "yes" and not model_options.get("recompute"),
            "--compile and --recompute are not for XLA")
    return run, model_options, dae_options

def main(argv=None):
    """For XLA a process per device."""
    args = parse(argv)
    if args[0].device != "xla":
        return train_both(0, *args)
    with explained("--device xla needs torch_xla and its torch"):
        import torch_xla
    torch_xla.launch(train_both, args=args)

# ---------------- the toy scenes: a data set drawn by code
BREADTH = {"church": 0.96, "house": 1.34, "castle": 1.2, "windmill": 0.92, "lighthouse": 0.52, "temple": 1.5,
           "pyramid": 1.6, "mosque": 1.28}  # widths of landmarks, as multiples of their heights
WALLS = "eee2c8 d6a076 c06856 e2be7c cec6cc a2b4be f0eeea".split()
ROOFS = "b04236 5472b2 427e74 8c624e 646274 d2923e 945a90".split()
LANDS = "749e4e 9ea658 d4b880 608c6e e2e6ee b08a68".split()
SKIES = (  # day, dusk, night, overcast: zenith, horizon, the light that tints the rest, sun or moon
    ("5294de", "c4e2f4", (1, 1, 0.98), "#fff4be"), ("584a8a", "faa870", (0.96, 0.8, 0.74), "#ffd682"),
    ("12183e", "5868a0", (0.7, 0.75, 0.92), "#f0f0de"), ("8894a4", "ced4d8", (0.84, 0.87, 0.9), None))

class Brush:
    """Draws with y pointing up, from the pixel (x, y), in units of `unit` pixels."""
    def __init__(self, canvas, x, y, unit):
        self.draw, self.x, self.y, self.unit = ImageDraw.Draw(canvas), x, y, unit

    def pixels(self, points):
        return [(self.x + self.unit * x, self.y - self.unit * y) for x, y in points]

    def ellipse(self, colour, x, y, width, height, start=0):  # start=180: its upper half
        box = self.pixels([(x - width / 2, y + height / 2), (x + width / 2, y - height / 2)])
        self.draw.pieslice(box, start, 360, fill=colour)

    def solid(self, paint, x, y, width, height, top=1, lit=0.62):
        """Stands on (x, y); `top`: "dome", "arch" or the share of its width left; `lit`: its lit share."""
        if top == "dome":
            self.ellipse(paint[1], x, y, width, 2 * height, 180)
            self.ellipse(paint[0], x - 0.14 * width, y, 0.72 * width, 2 * height, 180)  # leaves a crescent
            return
        if top == "arch":
            height, top = height - width / 2, 1
            self.ellipse(paint[0], x, y + height, width, width, 180)
        for colour, left, right in zip(paint, (-0.5, lit - 0.5), (lit - 0.5, 0.5)):
            corners = (left, 0), (right, 0), (right * top, height), (left * top, height)
            self.draw.polygon(self.pixels([(x + width * dx, y + dy) for dx, dy in corners]), fill=colour)

def landmark(name, rng, wall, roof, gap):
    """The solids of a landmark one unit high, back to front: paint, x, y, width, height, top, lit."""
    flip = rng.choice((-1, 1))
    if name == "church":
        yield from [(wall, -0.15 * flip, 0, 0.6, 0.3), (roof, -0.15 * flip, 0.3, 0.66, 0.2, 0.84, 1),
                    (wall, 0.27 * flip, 0, 0.26, 0.56), (roof, 0.27 * flip, 0.56, 0.33, 0.44, 0),
                    (gap, 0.27 * flip, 0, 0.12, 0.22, "arch")]
        yield from [(gap, x * flip, 0.08, 0.08, 0.16, "arch") for x in (-0.34, -0.18, -0.02)]
    elif name == "house":
        yield from [(wall, 0.34 * flip, 0.6, 0.16, 0.4),  # the chimney, behind the roof
                    (wall, 0, 0, 1.1, 0.48, 1, 0.75), (gap, -0.12 * flip, 0, 0.17, 0.34),
                    (roof, 0, 0.46, 1.34, 0.46, rng.uniform(0.35, 0.6), 0.75)]
        yield from [(gap, x * flip, 0.17, 0.19, 0.17) for x in (-0.38, 0.26)]
    elif name == "castle":
        left, right = rng.permutation((0.9, rng.uniform(0.7, 0.9)))
        for x, height, width, merlons in (0, 0.44, 0.8, 5), (-0.43, left, 0.32, 3), (0.43, right, 0.32, 3):
            pitch = width / (2 * merlons - 1)
            yield from [(wall, x, 0, width, height), (roof, x, height - 0.11, width + 0.02, 0.05)]
            yield from [(wall, x + i * pitch, height, pitch, 0.1) for i in range(1 - merlons, merlons, 2)]
        yield gap, 0, 0, 0.26, 0.3, "arch"
        yield from [(gap, x, y - 0.36, 0.09, 0.17, "arch") for x, y in ((-0.43, left), (0.43, right))]
    elif name == "windmill":  # `toy` adds its sails
        yield from [(wall, 0, 0, 0.5, 0.58, 0.62), (roof, 0, 0.56, 0.36, 0.18, "dome"),
                    (gap, 0, 0, 0.13, 0.2, "arch")]
    elif name == "lighthouse":
        edges = np.linspace(0, 1, rng.choice((6, 8)))
        for paint, low, high in zip((wall, roof) * 4, edges, edges[1:]):
            yield paint, 0, 0.72 * low, 0.5 - 0.2 * low, 0.72 * (high - low), (5 - 2 * high) / (5 - 2 * low)
        yield from [(roof, 0, 0.72, 0.44, 0.05), (gap, 0, 0.77, 0.26, 0.11),
                    (roof, 0, 0.88, 0.36, 0.12, "dome")]
    elif name == "temple":
        columns = [(wall, x, 0.14, 0.14, 0.46) for x in np.linspace(-0.55, 0.55, rng.integers(4, 7))]
        yield from [(wall, 0, 0, 1.5, 0.07, 1, 0.8), (wall, 0, 0.07, 1.36, 0.07, 1, 0.8),
                    (gap, 0, 0.14, 1.14, 0.46), *columns, (wall, 0, 0.6, 1.32, 0.09, 1, 0.8),
                    (roof, 0, 0.69, 1.5, 0.31, 0, 1), (wall, 0, 0.74, 0.96, 0.18, 0, 1)]
    elif name == "pyramid":
        yield from [(wall, 0, 0, 1.6, 1, 0), (roof, 0, 0.76, 0.384, 0.24, 0)]
    elif name == "mosque":
        for x in (-0.56, 0.56):
            yield from [(wall, x, 0, 0.12, 0.8), (roof, x, 0.8, 0.16, 0.2, 0)]
        yield from [(wall, 0, 0, 0.88, 0.36), (wall, 0, 0.36, 0.58, 0.1), (roof, 0, 0.45, 0.66, 0.43, "dome")]
        yield from [(gap, x, 0, 0.15, 0.24, "arch") for x in (-0.27, 0, 0.27)]

def toy(index, size=64):
    """Scene `index`, uint8 (size, size, 3), and its class."""
    rng = np.random.default_rng((1789, index))
    name, breadth = list(BREADTH.items())[index % len(BREADTH)]
    (zenith, haze, light, sun), *codes = [row[rng.integers(len(row))] for row in (SKIES, WALLS, ROOFS, LANDS)]
    zenith, haze, *colours = np.array([list(bytes.fromhex(code)) for code in (zenith, haze, *codes)])
    wall, roof, ground = (colours + rng.uniform(-14, 14, (3, 3))) * light
    paints = (0.45 * haze + 140.25 * np.array(light), 0.62 * haze + 0.304 * ground,
              0.3 * haze + 0.56 * ground, 0.66 * ground, 0.3 * wall, wall, 0.7 * wall, roof, 0.7 * roof)
    cloud, far, near, shadow, dark, *paints = map(tuple, np.clip(paints, 0, 255).astype(int).tolist())
    unit = rng.uniform(0.78, 1) * min(0.8, 0.92 / breadth)  # the landmark's height
    room = min(0.12, 0.47 - breadth * unit / 2)
    x, y, depth = rng.uniform((0.5 - room, 0.08, 0.05), (0.5 + room, 0.15, 0.16))
    horizon, side = y + depth, 4 * size
    heights = 1 - (np.arange(side) + 0.5) / side
    stops = zip(0.86 * ground, ground, haze, zenith)  # per channel, from the foot up
    column = np.transpose([np.interp(heights, (0, horizon, horizon, 1), channel) for channel in stops])
    canvas = Image.fromarray(column.astype(np.uint8)[:, None]).resize((side, side))
    brush, front = Brush(canvas, 0, side, side), Brush(canvas, side * x, side * (1 - y), side * unit)
    x, y, width = rng.uniform((0.08, 0.72, 0.1), (0.42, 0.92, 0.17))
    if sun:
        brush.ellipse(sun, x, y, width, width)
    x, y, width = rng.uniform((0.2, 0.66, 0.26), (0.9, 0.9, 0.44))
    if rng.random() < 0.6:
        for dx, dy, share in (-0.3, 0, 0.4), (0, 0.04, 0.64), (0.3, 0, 0.48):
            brush.ellipse(cloud, x + dx * width, y + dy * width, share * width, 0.6 * share * width)
    across = np.linspace(0, 1, 33)
    for hill, rise in (far, 1.22), (near, 0.9):
        height, swell, phase, pace = rng.uniform((0.04, 0.02, 0, 3), (0.1, 0.05, 6.3, 8))
        ridge = horizon + rise * (height + swell * np.sin(phase + pace * across))
        brush.draw.polygon(brush.pixels([(0, horizon), *zip(across, ridge), (1, horizon)]), fill=hill)
    front.ellipse(shadow, 0.12, 0, breadth, 0.12)
    gap = (255, 214, 110) if sum(light) < 2.7 and rng.random() < 0.7 else dark  # lamps, unless by day
    for solid in landmark(name, rng, paints[:2], paints[2:], (gap, gap)):
        front.solid(*solid)
    if name == "windmill":
        sail = np.array((-0.03j, 0.08 - 0.06j, 0.43 - 0.08j, 0.43 + 0.11j, 0.08 + 0.09j, 0.03j))
        for quarter in rng.uniform(0.15, 0.85) + np.arange(4):
            turned = 0.58j + sail * np.exp(0.5j * np.pi * quarter)  # a complex factor turns
            front.draw.polygon(front.pixels(zip(turned.real, turned.imag)), fill=paints[2])
    picture = np.array(canvas.reduce(4))  # half are lit from the right
    return picture[:, ::-1].copy() if rng.random() < 0.5 else picture, index % len(BREADTH)

if __name__ == "__main__":
    cli(main)
