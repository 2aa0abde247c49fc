"""Train the two stages: an autoencoder (dae.py), then a hierarchical VAE on its latents (lvae.py).

    python train.py                                              # built-in toy scenes, a laptop, 10 minutes
    python train.py --data photos/                               # a folder of images; sub-folders are classes
    python train.py --data photos/ --dae kl-f8 --image-size 256  # latents of an official autoencoder
    python train.py --dataset church --data church_outdoor_train_lmdb          # the paper's, Table 5
    python train.py --dataset church --data DATA --init church_pipeline.pt     # on from the authors' weights
    python train.py --data latents.npz                           # latents of any other autoencoder
    torchrun --nproc-per-node 8 train.py --dataset church --data DATA          # the same curve on eight GPUs

Any option of either stage can be set (`--width 96 --dae-steps 3000`); --help explains each. A run's folder,
runs/NAME or --out, holds checkpoint.pt (all that sampling or resuming needs), log.jsonl and samples/*.png. The same
command again resumes; on a CPU the result is that of a run never stopped, to the last bit.

Reads from the whole to its parts: options, the loop, what happens in which order, stage two, stage one, latents,
images, files, devices, the command line. At the end the toy scenes are drawn.
"""
import argparse
import atexit
import contextlib
import copy
import ctypes
import hashlib
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache
from io import BytesIO

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

import dae as daes
import lvae
from lvae import knob

@dataclass(frozen=True)
class Run:
    """What a run reads and writes; the two stages' own options are those of lvae.Config and dae.Config."""
    dataset: str = knob("toy", "preset: " + ", ".join(lvae.PRESETS))
    data: str = knob("", "folder of images (sub-folders are classes), LSUN LMDB folder, or .npz of latents")
    init: str = knob("", "begin with the model and autoencoder of this checkpoint, or pipeline of the paper")
    dae: str = knob("", "first stage: FILE, kl-f8, .. (downloaded), train, or none (pixels); empty: as --init or the "
                    "preset has it")
    dae_preset: str = knob("small-f4", "what --dae train trains: " + ", ".join(daes.PRESETS))
    out: str = knob("", "the run's folder; empty: runs/DATASET, or runs/ and the data folder's name")
    image_size: int = knob(0, "side of the square images in pixels; 0: the preset's")
    flip: bool = knob(False, "horizontal flips")
    val: str = knob("", "folder of held-out images; empty: a share of --data")
    holdout: float = knob(0.05, "share of --data held out (at most 2000 images), where there is no --val")
    seed: int = knob(0, "of initialisation, order and noise")
    device: str = knob("auto", "cuda, cuda:1, mps, cpu, xla, ...")
    precision: str = knob("auto", "bf16 or fp32; auto: bf16 where the hardware has it")
    compile: str = knob("auto", "yes or no: torch.compile the LVAE; auto: on CUDA, for 500 steps or more")
    log_every: int = knob(20, "steps between lines of log.jsonl")
    every: int = knob(500, "steps between checkpoints, evaluations and sample grids")

# ---------------------------------------------------------------- the loop of both stages

class Stopped(Exception):
    """The run was asked to stop, and has saved."""

def loop(run, stage, progress, steps, update, save, look):
    """Run a stage on from progress["step"] to `steps`. Raises Stopped after a signal, ValueError if it diverges.

    update(step) gives named statistics, "skipped" among them; save(); look(step): what people look at.
    """
    bar, in_a_row = progress_bar(stage, progress["step"], steps), 0
    for step in range(progress["step"] + 1, steps + 1):
        seed_step(run.seed, step)                              # all that is random is of (seed, step)
        stats = update(step)
        bar.update()
        in_a_row = in_a_row + 1 if stats["skipped"] else 0
        if in_a_row == 100:
            raise ValueError(f"100 steps in a row skipped, the last with gradient norm {stats['grad_norm']:.3g}: lower "
                             f"the learning rate of the {stage}; {run.out} holds its last good state")
        progress |= {"step": step, "skipped": progress["skipped"] + stats["skipped"]}
        stopping, last = asked_to_stop(), step == steps
        if step % run.log_every == 0 or last:
            average([value for value in stats.values() if torch.is_tensor(value)])
            bar.set_postfix(log(run, stage, step, stats | {"skipped": progress["skipped"]}))
        if step % run.every == 0 or last or stopping:
            save()
            if stopping and not last:
                raise Stopped(f"saved at step {step} of the {stage}")
            look(step)
    bar.close()

def seed_step(seed, step):
    torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))

def log(run, stage, step, stats):
    """Append to log.jsonl, in one write; of a step run twice the later line counts. Returns a few statistics."""
    entry = {"stage": stage, "step": step}
    for name, value in stats.items():
        entry[name] = np.round(value.tolist() if torch.is_tensor(value) else value, 5).tolist()
    if world()[0] == 0:
        with open(os.path.join(run.out, "log.jsonl"), "a") as file:
            file.write(json.dumps(entry) + "\n")
    return {name: entry[name] for name in ("loss", "rate", "l1") if name in entry}

# ---------------------------------------------------------------- what happens in which order

def train_both(run, model_options, dae_options):
    """The two stages of a run, or what is left of them: first stage and data, encoding, then the LVAE."""
    device, dtype = setup(run.device, run.precision)
    path, on_latents = os.path.join(run.out, "checkpoint.pt"), run.data.endswith(".npz")
    resumed = load_checkpoint(path) if os.path.exists(path) else None            # this run, stopped before
    initial = load_checkpoint(run.init) if run.init and not resumed else None    # another's, to begin with
    known = resumed or initial
    preset = known["config"] if run.init else lvae.PRESETS[run.dataset]
    if run.init and run.dataset not in ("toy", known["dataset"]):
        raise ValueError(f"--init {run.init}: a model of {known['dataset']}, not of {run.dataset}")
    first_stage = run.dae or ("latents" if on_latents else "init" if run.init else preset.first_stage)
    same = ("dataset", "data", "val", "holdout", "init", "image_size", "flip", "seed")
    origin = {name: getattr(run, name) for name in same} | {"dae": first_stage, "dae_options": dae_options}
    if resumed:
        compare(resumed["run"], origin, path)
    if dae_options and first_stage != "train":
        raise ValueError("--dae-... options are for --dae train")
    ae = open_first_stage(run, first_stage, resumed, initial)
    if on_latents:
        data, classes = read_latents(run.data, run.holdout)
        config = fit_config(run, preset, first_stage, data.train.h.shape[2:], classes, model_options)
    else:
        stage = ae.config if ae else replace(daes.PRESETS[run.dae_preset], **dae_options)
        size = run.image_size or preset.resolution * stage.f
        images, val = open_images(run.data, size), open_images(run.val, size) if run.val else None
        if run.init and known["classes"]:
            relabel(images, known["classes"], run.data)
        elif run.init and preset.num_classes not in (0, len(images.classes)):
            raise ValueError(f"{run.data}: its {len(images.classes)} classes (sub-folders) cannot be matched with the "
                             f"{preset.num_classes} of --init {run.init}, which have no names")
        shape = (stage.z_channels, size // stage.f, size / stage.f)
        config = fit_config(run, preset, first_stage, shape, len(images.classes), model_options)
        if val and config.num_classes:
            relabel(val, images.classes, f"--val {run.val}")
    lock = claim(run.out)                                      # only now: what was asked for fits
    if not on_latents:
        ae = ae or train_dae(run, stage, images, origin, device, dtype)
    ae = ae and place(ae, device)                              # channels-last: only training is slower so
    if not on_latents:
        data = encode_all(run, config, ae, images, val, device, dtype)
    if not config.scale or initial and run.dae:                # a preset's are those of its own autoencoder
        like = resumed["config"] if resumed else measure(data.train, config)
        config = replace(config, shift=like.shift, scale=like.scale)
    if resumed:
        compare(asdict(resumed["config"]), asdict(config), path)
        compare(resumed, {"classes": data.classes}, path)
    if initial:
        known = {"dataset": initial["dataset"], "model": initial["ema"], "ema": initial["ema"]}
    train_lvae(run, config, ae, data, origin, known, device, dtype)
    del lock

def open_first_stage(run, stage, resumed, initial):
    """The autoencoder of a run; None if it is to be trained, or if latents come without one."""
    if not run.data and not run.dataset.startswith("toy"):
        source = SOURCES.get(run.dataset.split("-")[0], "a folder of its images")
        raise ValueError(f"--dataset {run.dataset} needs --data: {source}")
    if run.data.endswith(".npz") and (run.flip or run.val or run.image_size or stage in ("train", "none")):
        raise ValueError("--flip, --val, --image-size and --dae train are for images, not for an .npz of latents")
    known = resumed or initial
    if stage == "none" or stage == "init" and known["config"].first_stage == "none":
        return daes.Identity()
    if known and known["dae"] and (resumed or stage in ("init", "latents")):
        return daes.from_state(known["dae"], run.init or run.out)
    if stage == "init":
        raise ValueError(f"--init {run.init} holds no autoencoder: name one with --dae FILE")
    return None if stage in ("train", "latents") else daes.load(stage)

def fit_config(run, preset, first_stage, shape, classes, model_options):
    """The LVAE's configuration for data (channels, side, side) in so many classes. Raises ValueError."""
    channels, side, _ = shape
    if side < 4 or side & (side - 1) or side != shape[2]:
        raise ValueError("--image-size: divided by the autoencoder's f it must be one of 4, 8, 16, 32, ...")
    if run.dataset == "toy" and not run.init:                  # the user's own data: the preset follows them
        preset = lvae.adapted(preset, channels, side, classes)
    known = ("none", "train", "latents", *daes.ADDRESSES)
    options = {} if run.init else {"first_stage": first_stage if first_stage in known else "file"}
    if first_stage == "train":
        options["scale"] = 0.0                                 # to be measured
    if first_stage == "none" and not run.init:
        options |= {"shift": 127.5, "scale": 127.5}
    config = replace(preset, **options | model_options)
    if (config.data_channels, config.resolution) != (channels, side):
        raise ValueError(f"the data are {channels}x{side}x{side}, the config is for {config.data_channels}x"
                         f"{config.resolution}x{config.resolution} (--image-size, --resolution)")
    if config.num_classes and not 0 < classes <= config.num_classes:
        raise ValueError(f"{run.data or 'the toy'} has {classes} classes (sub-folders, labels), which does not fit "
                         f"num_classes {config.num_classes}")
    return config

# ---------------------------------------------------------------- stage two: the hierarchical VAE

def train_lvae(run, config, ae, data, origin, start, device, dtype):
    """Train the LVAE: on from a checkpoint `start`, this run's or that of --init, or anew (None)."""
    seed_step(run.seed, 0)
    model = place(lvae.LVAE(config).train(), device)
    ema, optimizer = copy.deepcopy(model).eval(), lvae.make_optimizer(model)
    path, parts = os.path.join(run.out, "checkpoint.pt"), {"model": model, "ema": ema, "optimizer": optimizer}
    dataset = start["dataset"] if run.init else run.dataset
    progress = resume(start, parts, run.init or path)
    start = None                                               # lets go of the mapped file
    long = device.type == "cuda" and config.steps - progress["step"] >= 500
    if run.compile == "yes" or run.compile == "auto" and long:
        model.compile(dynamic=False)
    describe(run, config, data, device, dtype)
    mine = my_part(config.batch)

    def batch(number):
        indices = batch_indices(run.seed, len(data.train.rows), config.batch, number)
        view = np.random.default_rng((run.seed, number)).integers(2, size=len(indices))
        x, label = data.train.batch(indices[mine], config, device, view[mine])
        noise, drop_label = lvae.draw_noise(model, config.batch, device, mine)
        return x, label, noise, None, drop_label

    def update(step):
        started = time.time()
        batches = [batch((step - 1) * config.accumulate + micro) for micro in range(config.accumulate)]
        stats = lvae.train_step(model, ema, optimizer, batches, step, dtype, average)
        stats["kl_levels"] = torch.stack([kl.sum() for kl in stats.pop("kl").split(config.groups[::-1])])
        for name in ("distortion", "rate"):
            stats[f"{name}_bits"] = lvae.bits_per_dim(stats[name], config)
        return stats | {"images_per_s": config.batch * config.accumulate / (time.time() - started)}

    @only_first
    def save():
        facts = {"config": asdict(config), "run": origin, "classes": data.classes, "dataset": dataset}
        save_checkpoint(path, facts | progress, parts | {"dae": ae or daes.Identity()})

    @only_first
    def look(step):
        if len(data.held.rows):
            log(run, "lvae", step, evaluate(ema, data.held, device, dtype))
        if ae is not None:
            save_pictures(run, ema, ae, data, step, device, dtype)
    if progress["step"] == 0:
        save()
    loop(run, "lvae", progress, config.steps, update, save, look)
    say(f"done: {path}, {progress['skipped']} steps skipped. Samples: python sample.py generate {path}")

def evaluate(model, held, device, dtype):
    """Held-out distortion and rate, nats per sample, and negative ELBO, bits per dimension. Repeatable."""
    def batches():
        for first in range(0, len(held.rows), model.config.batch):
            rows = np.arange(first, min(first + model.config.batch, len(held.rows)))
            yield *held.batch(rows, model.config, device), lvae.draw_noise(model, len(rows), device)[0]
    seed_step(0, 0)
    distortion, rate = lvae.evaluate(model, batches(), dtype)
    bits = lvae.bits_per_dim(distortion + rate, model.config)
    tqdm.write(f"negative ELBO of {len(held.rows)} held-out images: {bits:.4f} bits/dim")
    return {"held_out_distortion": distortion, "held_out_rate": rate, "held_out_nelbo_bits": bits}

@torch.no_grad()
def save_pictures(run, model, ae, data, step, device, dtype):
    """Samples, a row of eight per class, unguided and guided, and reconstructions of held-out images."""
    config, held = model.config, data.held if len(data.held.rows) else data.train
    x, x_label = held.batch(np.linspace(0, len(held.rows) - 1, 8).astype(int), config, device)
    low_res = lvae.shrink(x, config) if config.upsample else None
    rows = 1 if config.upsample else min(config.num_classes, 10) or 8
    label = torch.arange(rows, device=device).repeat_interleave(8) if config.num_classes else None
    names = [data.classes[i][:16] if i < len(data.classes) else str(i) for i in range(rows)]
    names = names if config.num_classes else None

    def sample(**guidance):
        seed_step(0, 0)                                        # the same at every step: progress shows
        noise, _ = lvae.draw_noise(model, 8 * rows, device)
        return model.generate(noise, label, low_res=low_res, **guidance)
    with lvae.autocast(device, dtype):
        pictures = {"": (sample(), names)}
        if config.num_classes and config.hierarchical_prior:
            weights = lvae.guidance_levels(config, 1.5)
            pictures["_guided"] = sample(mean_guidance=weights, variance_guidance=1.0), names
        eps = model.encode(x, x_label, lvae.draw_noise(model, len(x), device)[0], low_res)
        rebuilt = model.generate(eps, x_label, low_res=low_res)
        pictures["_reconstructions"] = torch.cat([x, rebuilt]), ["encoded", "+ LVAE"]
        for name, (samples, names) in pictures.items():
            images = [to_uint8(ae.decode(row)) for row in lvae.denormalise(samples, config).split(8)]
            save_picture(os.path.join(run.out, "samples", f"{step:07d}{name}.png"), images, row_names=names)

# ---------------------------------------------------------------- stage one: the autoencoder

def train_dae(run, config, images, origin, device, dtype):
    """Train an autoencoder on images (Section 3.1), on every process; resumes from OUT/dae.pt."""
    if device.type == "xla":                                   # there the hosts train
        device, dtype = setup("cpu", run.precision)
    if config.codebook or config.adversarial_weight and images.size < 32:
        raise ValueError("--dae train trains KL autoencoders, not VQ ones (--dae-codebook 0), and with an adversary only "
                         "on images of 32 pixels or more (--dae-adversarial-weight 0)")
    path, mine = os.path.join(run.out, "dae.pt"), my_part(config.batch)
    rows, side, seen = split(len(images.names), 0 if run.val else run.holdout)[0], images.size // config.f, []
    seed_step(run.seed, 0)
    ae = daes.Autoencoder(config).to(device)
    parts = {"dae": ae}
    if config.adversarial_weight:
        parts["discriminator"] = daes.Discriminator().to(device)
    optimizers = daes.make_optimizers(parts, config)
    everything = parts | {f"{name}_optimizer": optimizer for name, optimizer in optimizers.items()}
    start = daes.read(path) if os.path.exists(path) else None
    if start is not None:
        if not isinstance(start, dict) or not {"dae_config", "run", "step", *everything} <= start.keys():
            raise ValueError(f"{path}: not a save of this version's first stage; choose another --out")
        compare(start["dae_config"], asdict(config), path)
        compare(start["run"] | {"dae_options": origin["dae_options"]}, origin, path)
    progress = resume(start, everything, path)
    perceptual = daes.perceptual_network(device) if config.perceptual_weight else None
    say(f"autoencoder {run.dae_preset}: f = {config.f}, {config.steps} steps of {config.batch} of {len(rows)} images, "
        f"{images.size}x{images.size}" + ("" if perceptual else "; no perceptual term (pip install lpips)"))
    batches = read_ahead(lambda number: dae_batch(run, config, images, rows, number, mine), progress["step"])

    def update(step):
        started, x = time.time(), to_tensor(next(batches)).to(device)
        seen[:] = x[:8]
        noise = torch.randn(config.batch, config.z_channels, side, side, device=device)[mine]
        context = lvae.autocast(device, dtype)
        stats = daes.train_step(parts, optimizers, x, noise, step, perceptual, average, context)
        return stats | {"images_per_s": config.batch / (time.time() - started)}

    @only_first
    def save():
        save_checkpoint(path, {"dae_config": asdict(config), "run": origin} | progress, everything)

    @only_first
    def look(step):
        x = torch.stack(seen)
        with torch.no_grad(), lvae.autocast(device, dtype):
            pictures = [to_uint8(x), to_uint8(ae.decode(ae.encode(x)))]
        save_picture(os.path.join(run.out, "samples", f"dae_{step:06d}.png"), pictures)
    loop(run, "dae", progress, config.steps, update, save, look)
    return ae.eval()

def dae_batch(run, config, images, rows, number, mine):
    """Part `mine` of batch `number`, with --flip half of it mirrored; for a bad image the next good one."""
    mirrored = np.random.default_rng((run.seed, number)).random(config.batch)[mine] < (0.5 if run.flip else 0)
    batch = []
    for index, mirror in zip(batch_indices(run.seed, len(rows), config.batch, number)[mine], mirrored):
        following = (images.read(rows[(index + k) % len(rows)]) for k in range(len(rows)))
        image = next((image for image in following if image is not None), None)
        if image is None:
            raise ValueError(f"no usable image among {len(rows)}: {next(iter(images.bad.items()))}")
        batch.append(image[:, ::-1] if mirror else image)
    return batch

def read_ahead(read, number):
    """read(number), read(number + 1), ..: each made in a thread while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, number)
        while True:
            result, number = ahead.result(), number + 1
            ahead = pool.submit(read, number)
            yield result

# ---------------------------------------------------------------- from images to latents

@dataclass
class Latents:
    """Raw latents (N, views, C, h, w), labels (N,) or None, and the rows to use."""
    h: np.ndarray
    labels: np.ndarray
    rows: np.ndarray

    def batch(self, indices, config, device, view=0):
        """Rows `indices` -> normalised x (B, C, h, w) and labels (B,) or None."""
        rows = self.rows[indices]
        h = self.h[rows, np.broadcast_to(view, rows.shape) % self.h.shape[1]].astype(np.float32)
        label = torch.from_numpy(self.labels[rows]).to(device) if config.num_classes else None
        return lvae.normalise(torch.from_numpy(h).to(device), config), label

@dataclass
class Data:
    """What stage two trains on, what it is evaluated on, and the names of its classes, if any."""
    train: Latents
    held: Latents
    classes: list

def read_latents(path, holdout):
    """An .npz with `latents` (N, C, H, H) and optional `labels` (N,) -> Data and the number of classes."""
    try:
        with np.load(path, allow_pickle=False) as file:
            h, labels = file["latents"], file["labels"] if "labels" in file else None
    except Exception as e:                                     # whatever a broken file provokes
        raise ValueError(f"{path}: expected an .npz with an array named latents ({e})") from None
    square = h.ndim == 4 and len(h) and h.shape[2] == h.shape[3]
    if not square or h.dtype.kind not in "fiu" or not np.isfinite(h).all():
        raise ValueError(f"{path}: latents are {h.dtype} {h.shape}, expected numbers (N, C, H, H) without NaN")
    if labels is not None and (labels.shape != h.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0):
        raise ValueError(f"{path}: labels are {labels.dtype} {labels.shape}, expected {len(h)} integers from 0 up")
    labels = None if labels is None else labels.astype(np.int64)
    train, held = (Latents(h[:, None], labels, rows) for rows in split(len(h), holdout))
    return Data(train, held, []), 0 if labels is None else int(labels.max()) + 1

def encode_all(run, config, ae, images, val, device, dtype):
    """Encode all images, once -> Data."""
    h, good = encode_images(run, ae, images, "train", device, dtype)
    train, held = (Latents(h, images.labels, rows[good[rows]])
                   for rows in split(len(images.names), 0 if val else run.holdout))
    if val:
        h, good = encode_images(run, ae, val, "val", device, dtype)
        held = Latents(h, val.labels, np.flatnonzero(good))
    return Data(train, held, images.classes if config.num_classes else [])

def encode_images(run, ae, images, name, device, dtype):
    """Latents of images (N, 1 or 2, C, h, w), as they are and with --flip mirrored, and which are good (N,).

    They stay in OUT, as float16, NaN for bad images; another autoencoder, size or listing of files makes them
    anew. The first process encodes, the others wait.
    """
    sums = [value.cpu().double().sum().item() for value in ae.state_dict().values()]
    key = hashlib.sha256(repr((images.fingerprint, images.size, run.flip, sums)).encode()).hexdigest()[:16]
    path, side = os.path.join(run.out, f"latents_{name}_{key}.npy"), images.size // ae.config.f
    shape = (len(images.names), 1 + run.flip, ae.config.z_channels, side, side)

    def save(file):
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        for h in encodings(ae, images, 1 + run.flip, device, dtype):
            file.write(h.astype(np.float16).tobytes())
    if world()[0] == 0 and not os.path.exists(path):
        with contextlib.suppress(Stopped):
            daes.write(path, save)
    if asked_to_stop():                                        # all processes wait here
        raise Stopped(f"the {name} images are not all encoded yet")
    h = np.load(path, mmap_mode="r")
    good = ~np.isnan(h[:, 0, 0, 0, 0])
    say(f"{name} images: {len(good) - good.sum()} of {len(good)} are bad and left out")
    if not good.any():
        raise ValueError(f"no usable image among {len(good)}")
    return h, good

@torch.no_grad()
def encodings(ae, images, views, device, dtype):
    """The latents of all images, (batch, views, C, h, w) at a time; NaN for bad ones."""
    count, pixels = len(images.names), 64 ** 3 * (4 if device.type == "cuda" else 1)
    batch = max(1, min(64, pixels // images.size ** 2))
    readers, bar = ThreadPoolExecutor(8), progress_bar("encoding", 0, count)
    blank = np.zeros((images.size, images.size, 3), np.uint8)

    def read(number):
        return list(readers.map(images.read, range(number * batch, min((number + 1) * batch, count))))
    for _, part in zip(range(0, count, batch), read_ahead(read, 0)):
        if asked:
            raise Stopped
        x = to_tensor([blank if image is None else image for image in part]).to(device)
        with lvae.autocast(device, dtype):
            h = torch.stack([ae.encode(view) for view in [x, x.flip(3)][:views]], dim=1).float().cpu().numpy()
        for row, image in zip(h, part):
            if image is None or not np.isfinite(row).all():
                row[:] = np.nan
        bar.update(len(part))
        yield h
    bar.close()

def measure(latents, config):
    """The config with shift and scale such that up to 10,000 of the latents have mean 0 and variance 1."""
    h = latents.h[latents.rows[::max(1, len(latents.rows) // 10_000)], 0].astype(np.float32)
    if not len(h) or not h.std() > 0:
        raise ValueError("nothing to learn from: no image is left to train on, or all latents are the same")
    return replace(config, shift=float(h.mean()), scale=float(h.std()))

def split(count, share):
    """Indices (training, held out): a fixed shuffle, the same for every run on the same data."""
    order = np.random.default_rng(0).permutation(count)
    held = min(round(share * count), 2000) if count > 1 else 0
    return np.sort(order[held:]), np.sort(order[:held])

@lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    return np.random.default_rng((seed, epoch)).permutation(count)

def batch_indices(seed, count, batch, number):
    """Batch `number` of an endless pass over `count` items, shuffled anew each epoch: a pure function."""
    places = range(number * batch, (number + 1) * batch)
    return np.array([epoch_order(seed, place // count, count)[place % count] for place in places])

# ---------------------------------------------------------------- images

SOURCES = {  # where the data of the paper's presets come from
    "church": "LSUN Church outdoor, unpacked: http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip",
    "bedroom": "LSUN Bedroom, unpacked: http://dl.yf.io/lsun/scenes/bedroom_train_lmdb.zip",
    "imagenet": "ImageNet's training folder of synset folders: https://image-net.org/download.php"}
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")  # none that starts a program

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

    def read(self, i):
        if self.names[i] in self.bad:
            return None
        try:
            return self.open(i)
        except Exception as e:                                 # whatever a broken file provokes in Pillow
            reason = self.bad[self.names[i]] = daes.printable(str(e) or type(e).__name__)
            tqdm.write(f"skipped {daes.printable(self.names[i])}: {reason}")
            return None

def open_images(path, size):
    """The images of a folder or of an LSUN LMDB folder; of '' or 'toy' the built-in scenes. Raises ValueError."""
    if path in ("", "toy"):
        labels = np.arange(TOY_COUNT, dtype=np.int64) % len(TOY_CLASSES)
        names = [f"toy {i}" for i in range(TOY_COUNT)]
        return Images(names, labels, list(TOY_CLASSES), size, lambda i: toy(i, size)[0], f"toy {TOY_COUNT}")
    if not os.path.isdir(path):
        raise ValueError(f"{path}: no such folder; expected one of images, an LSUN LMDB folder, or an .npz of latents")
    return (lmdb_images if os.path.exists(os.path.join(path, "data.mdb")) else folder_images)(path, size)

def folder_images(path, size):
    """Every image below a folder, sorted. If all lie in sub-folders, and there are several, those are the classes."""
    extensions = tuple(e for e, kind in Image.registered_extensions().items() if kind in FORMATS)
    files = []
    for folder, inside, names in os.walk(path, followlinks=True):
        inside[:] = [name for name in inside if not name.startswith(".")]
        files += [os.path.relpath(os.path.join(folder, name), path) for name in names
                  if name.lower().endswith(extensions) and not name.startswith(".")]
    if not files:
        raise ValueError(f"{path}: no image found in it (expected .jpg, .png, ... at any depth)")
    files.sort(key=lambda file: file.split(os.sep))
    parents = [os.path.dirname(file).split(os.sep)[0] for file in files]         # "" for those outside
    classes = sorted(set(parents))
    if "" in classes and len(classes) > 2:
        say(f"{path}: {parents.count('')} images lie outside the {len(classes) - 1} sub-folders: these are not classes")
    if "" in classes or len(classes) < 2:
        classes = []
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number.get(parent, 0) for parent in parents], np.int64)
    paths = [os.path.join(path, file) for file in files]
    stats = [os.stat(p) if os.path.exists(p) else os.lstat(p) for p in paths]    # of what a link leads to
    listing = [(file, s.st_size, s.st_mtime_ns) for file, s in zip(files, stats)]
    return Images(paths, labels, classes, size, lambda i: read_image(paths[i], size), repr(listing))

def relabel(images, classes, what):
    """Number the images' classes as in `classes`, by name. Raises ValueError for one that is not there."""
    strange = sorted(set(images.classes) - set(classes)) or ["nothing"] * (not images.classes)
    if strange:
        raise ValueError(f"{what}: its classes (sub-folders) must be among {', '.join(classes[:5])} ..; {strange[0]} is not")
    images.labels = np.array([classes.index(name) for name in images.classes])[images.labels]
    images.classes = classes

def lmdb_images(path, size):
    """An LSUN LMDB folder: key -> JPEG or WebP bytes."""
    try:
        import lmdb
    except ImportError:
        raise ValueError(f"{path} is an LMDB: reading it needs `pip install lmdb`") from None
    env = lmdb.open(path, readonly=True, lock=False, readahead=False)
    with env.begin() as txn:
        keys = list(txn.cursor().iternext(values=False))

    def read(i):
        with env.begin() as txn:
            return read_image(BytesIO(txn.get(keys[i])), size)
    fingerprint = f"lmdb {len(keys)} {os.path.getmtime(os.path.join(path, 'data.mdb'))}"
    return Images([key.decode(errors="replace") for key in keys], np.zeros(len(keys), np.int64), [], size, read, fingerprint)

def read_image(source, size):
    """An image file (path or file object) -> (size, size, 3) uint8: short side to `size`, centre square. OSError."""
    Image.init()
    with Image.open(source, formats=[kind for kind in FORMATS if kind in Image.OPEN]) as image:
        if min(image.size) < 8:
            raise OSError(f"{image.width}x{image.height} pixels is too small")
        image.draft("RGB", (2 * size, 2 * size))               # lets the JPEG decoder skip what shrinking would discard
        return np.asarray(ImageOps.fit(to_rgb(image), (size, size), Image.LANCZOS))

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

def to_tensor(images):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1

def to_uint8(x):
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3) array."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

# ---------------------------------------------------------------- files

def grid(rows, gap=2, row_names=None, column_names=None, title=None):
    """Rows of uint8 images (H, W, 3), of any lengths and sizes -> one Pillow image, named before rows, above columns."""
    columns = range(max(map(len, rows)))
    widths = [max(row[c].shape[1] for row in rows if c < len(row)) for c in columns]
    heights = [max(image.shape[0] for image in row) for row in rows]
    font = ImageFont.load_default(max(10, min(32, min(widths + heights) // 7)))
    left = max(8 + int(font.getlength(name)) for name in row_names or [""]) if row_names else 0
    line, above = 4 + int(font.size * 1.3), bool(column_names) + bool(title)
    widths = [max(width, 8 + int(font.getlength(name))) for width, name in zip(widths, column_names or [""] * len(widths))]
    xs = left + gap + np.cumsum([0] + [width + gap for width in widths])
    ys = line * above + gap + np.cumsum([0] + [height + gap for height in heights])
    wide = max(xs[-1], left + 8 + int(font.getlength(title or "")))
    sheet = Image.new("RGB", (int(wide), int(ys[-1])), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((left + gap, line // 2), title or "", fill="black", font=font, anchor="lm")
    for name, x, width in zip(column_names or [], xs, widths):
        draw.text((x + width // 2, line * above - line // 2), name, fill="black", font=font, anchor="mm")
    for r, (row, y, height) in enumerate(zip(rows, ys, heights)):
        draw.text((4, y + height // 2), row_names[r] if row_names else "", fill="black", font=font, anchor="lm")
        for image, x, width in zip(row, xs, widths):
            spare = width - image.shape[1], height - image.shape[0]
            sheet.paste(Image.fromarray(image), (int(x) + spare[0] // 2, int(y) + spare[1] // 2))
    return sheet

def save_picture(path, rows, **names):
    """A grid of images as a file: JPEG or WebP if it is called so, else PNG."""
    picture = grid(rows, **names)
    kind = {".jpg": "jpeg", ".webp": "webp"}.get(os.path.splitext(path)[1].lower(), "png")
    daes.write(path, lambda file: picture.save(file, kind))

def save_checkpoint(path, facts, parts):
    """Replace a checkpoint, whole or not at all, by facts and the states of modules and optimizers, for every device."""
    state = facts | {name: part.state_dict() for name, part in parts.items()}
    state = tree_map_only(torch.Tensor, torch.Tensor.cpu, state)
    daes.write(path, lambda file: torch.save(state, file))

def load_checkpoint(path):
    """A checkpoint.pt of stage two, or one of the authors' pipelines, -> a dict with config (an lvae.Config), ema, dae,
    classes, dataset (the preset), step and run (how it was made). The tensors are views of the file. Raises LoadError."""
    state = daes.read(path)
    if isinstance(state, dict) and "vae.encoder.in_proj.weight" in state:
        try:
            return released_checkpoint(state, path)
        except (AttributeError, RuntimeError, IndexError):
            raise daes.LoadError(f"{path}: misshapen weights, or names that are none") from None
    if not isinstance(state, dict) or not {"config", "ema", "dae", "classes"} <= state.keys():
        raise daes.LoadError(f"{path}: not a checkpoint of train.py's second stage, nor one of the paper's pipelines")
    try:
        state = {"run": {}, "step": 0, "skipped": 0} | state
        config = lvae.Config(**state["config"])
        if sum(config.groups + config.encoder_layers) > 1000 or not config.scale:
            raise ValueError("a thousand blocks, or a scale of 0")
        dataset = state.get("dataset", state["run"].get("dataset"))
        return state | {"config": config, "classes": list(map(str, state["classes"])), "dataset": dataset}
    except Exception as e:                                     # whatever a foreign file holds there
        raise daes.LoadError(f"{path}: its configuration does not fit this version ({str(e)[:200]})") from None

def released_checkpoint(state, path):
    """A pipeline that the authors published, one dict of dae.* and vae.* tensors, as a checkpoint of ours.

    Which preset it is shows in its shapes. Shift and scale are the preset's, and attention is "released".
    """
    ema = lvae.from_released({k.removeprefix("vae."): v for k, v in state.items() if k.startswith("vae.")})
    shapes = {name: value.shape for name, value in ema.items()}
    autoencoder = daes.find(state, path).state if any(k.startswith("dae.") for k in state) else {}
    for dataset, preset in lvae.PRESETS.items():
        config = replace(preset, attention="released")
        with torch.device("meta"):
            expected = {name: value.shape for name, value in lvae.LVAE(config).state_dict().items()}
        if shapes == expected:
            return {"config": config, "ema": ema, "dae": autoencoder, "classes": [], "step": 0, "run": {}, "dataset": dataset}
    raise daes.LoadError(f"{path}: a pipeline of the paper, but of no preset")

def restore(optimizer, state):
    """Give an optimizer another's moments; learning rate and implementation stay this device's own."""
    optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, moments in optimizer.state.items():         # fused Adam takes its memory format for granted
        for key, value in moments.items():
            like = parameter if value.shape == parameter.shape else value
            moments[key] = torch.empty_like(like).copy_(value)

@torch.no_grad()
def resume(start, parts, path):
    """Put a checkpoint's state (None: nothing) into modules and optimizers; returns the progress."""
    start = start or {}
    for name, part in parts.items():
        try:
            if name in start and isinstance(part, torch.optim.Optimizer):
                restore(part, start[name])
            elif name in start:
                part.load_state_dict(start[name])
        except (RuntimeError, TypeError, KeyError, AttributeError) as e:
            raise ValueError(f"{path}: the {name} in it does not fit ({(str(e).splitlines() or [''])[-1].strip()})") from None
    if start.get("step"):
        say(f"resuming {path} at step {start['step']}")
    return {name: start.get(name, 0) for name in ("step", "skipped")}

def compare(found, asked, path):
    """A run resumes with the options it began with; only the number of steps may differ. Raises ValueError."""
    for name, value in asked.items():
        if name != "steps" and found.get(name) != value:
            raise ValueError(f"{path} was trained with {name} = {found.get(name)}, asked for {value}: "
                             "give the same options to resume, or another --out to start anew")

def claim(out):
    """Make a run's folder and lock it against other runs, for as long as the file returned lives. Raises ValueError."""
    if world()[0]:
        return None
    os.makedirs(out, exist_ok=True)
    lock = open(os.path.join(out, "lock"), "w")
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:                                        # Windows has none
        pass
    except OSError:
        raise ValueError(f"{out}: another process is training there; wait, or choose another --out") from None
    with open(os.path.join(out, "log.jsonl"), "a+b") as file:  # whose last line a kill may have torn
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    return lock

# ---------------------------------------------------------------- devices and processes

def setup(name="auto", precision="auto"):
    """--device and --precision -> a device and the dtype of convs; joins torchrun's other processes. ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"       # under torchrun: a GPU for each process
    try:
        if name == "xla":
            import torch_xla                                   # makes the device known to torch
        device = torch.empty(1, device=name).device
    except (ImportError, RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: {str(e).splitlines()[0]}") from None
    if device.type == "cpu":
        keep_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and device.type != "xla" and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=2))
        atexit.register(dist.destroy_process_group)            # its threads must end before the interpreter does
    if precision == "auto":
        fast = {"cpu": getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"),
                "cuda": device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False),
                "xla": os.environ.get("PJRT_DEVICE") == "TPU"}
        precision = "bf16" if fast.get(device.type) else "fp32"
    return device, {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]

def keep_memory():
    """Let glibc keep freed memory: to return large blocks and clear new ones is a fifth of a decoder's time on a CPU."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)                                     # M_MMAP_MAX: large blocks are of the heap too ...
            mallopt(-1, 2 ** 31 - 1)                           # M_TRIM_THRESHOLD: ... of which up to 2 GiB may stay free

def place(module, device, dtype=torch.float32):
    """Move a module to the device, channels-last. dtype: of convs and linear layers; bf16 for inference only."""
    for layer in module.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.to(dtype)
    return module.to(device) if device.type == "xla" else module.to(device, memory_format=torch.channels_last)

def world():
    """(Rank of this process, number of processes)."""
    if "torch_xla" in sys.modules:                             # imported for --device xla only
        import torch_xla.runtime as xr
        return xr.global_ordinal(), xr.world_size()
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)

def my_part(batch):
    """The slice of a batch that this process takes. Raises ValueError where the processes do not divide it."""
    rank, count = world()
    if batch % count:
        raise ValueError(f"a batch of {batch} is shared by {count} processes: it must be a multiple of {count}")
    return slice(rank * batch // count, (rank + 1) * batch // count)

def only_first(function):
    """The function, which does nothing on other processes than the first."""
    def call(*arguments):
        if world()[0] == 0:
            function(*arguments)
    return call

@only_first
def say(text):
    print(text, flush=True)

def progress_bar(what, done, total):
    return tqdm(total=total, initial=done, desc=what, unit="step", disable=done >= total or world()[0] > 0)

def average(tensors):
    """Replace tensors by their mean over all processes, in place: one message for all."""
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
        xla.sync()                                             # a step is two programs, each compiled once

asked = []  # the signals that came since `signals` began

@contextlib.contextmanager
def signals():
    """Inside, SIGTERM (pre-emption) and Ctrl-C only fill `asked`, which is looked at between steps; a second one ends."""
    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)
    asked.clear()
    main = threading.current_thread() is threading.main_thread()            # no other may set handlers
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT) if main}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def asked_to_stop():
    """Whether a signal came, to any process: all get the same answer, and so wait here for each other."""
    if world()[1] == 1:
        return bool(asked)
    cuda = "torch_xla" not in sys.modules and dist.get_backend() == "nccl"
    flag = torch.tensor([float(len(asked))], device="cuda" if cuda else "cpu")
    average([flag])
    return bool(flag > 0)

def barrier():
    """Wait for the other processes."""
    asked_to_stop()

# ---------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are ValueErrors of one line."""

    def error(self, message):
        raise ValueError(f"{message} (see --help)")

def values(text):
    """argparse type: A,B,.. -> a tuple of ints, floats or words."""
    def value(word):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(word)
        return word
    return tuple(value(word) for word in text.split(",") if word)

def add_options(parser, title, group, prefix, defaults):
    """An option for each field of a dataclass; only those given arrive, as GROUP.FIELD."""
    section = parser.add_argument_group(title)
    for f in fields(defaults):
        default = getattr(defaults, f.name)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        more = {"type": type(default), "metavar": type(default).__name__.upper()}
        if isinstance(default, bool):
            more = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, tuple):
            more = {"type": values, "metavar": "A,B,.."}
        if f.name != "first_stage":                            # decided by --dae
            section.add_argument(prefix + f.name.replace("_", "-"), dest=f"{group}.{f.name}", default=argparse.SUPPRESS,
                                 help=f"{f.metadata['help']} (default: {shown})".replace("%", "%%"), **more)

def parse(argv):
    """Command line -> Run, and the options given for the LVAE and for the autoencoder. Raises ValueError."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default="toy", choices=lvae.PRESETS)
    first.add_argument("--dae-preset", default="small-f4", choices=daes.PRESETS)
    chosen, _ = first.parse_known_args(argv)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_options(parser, "run", "run", "--", Run())
    add_options(parser, f"LVAE (defaults: {chosen.dataset})", "lvae", "--", lvae.PRESETS[chosen.dataset])
    add_options(parser, f"autoencoder, with --dae train (defaults: {chosen.dae_preset})", "dae", "--dae-",
                daes.PRESETS[chosen.dae_preset])
    given = {"run": {}, "lvae": {}, "dae": {}}
    for name, value in vars(parser.parse_args(argv)).items():
        group, _, name = name.partition(".")
        given[group][name] = value
    run = Run(**given["run"])
    name = os.path.basename(os.path.abspath(run.data)).removesuffix(".npz") if run.data else run.dataset
    run = replace(run, out=run.out or os.path.join("runs", name if run.dataset == "toy" else run.dataset))
    for ok, rule in ((0 <= run.holdout < 1, "--holdout is a fraction from 0 up to 1"),
                     (min(run.seed, run.image_size) >= 0, "--seed and --image-size may not be negative"),
                     (min(run.log_every, run.every) > 0, "--every and --log-every count steps, from 1 up"),
                     (run.precision in ("auto", "bf16", "fp32"), "--precision is auto, bf16 or fp32"),
                     (run.compile in ("auto", "yes", "no"), "--compile is auto, yes or no"),
                     (not (run.device == "xla" and (run.compile == "yes" or given["lvae"].get("recompute"))),
                      "--compile and --recompute are not for XLA devices")):
        if not ok:
            raise ValueError(rule)
    return run, given["lvae"], given["dae"]

def describe(run, config, data, device, dtype):
    """Print the resolved configuration, once."""
    say(f"data        {run.data or 'toy scenes, drawn by code'}: {len(data.train.rows)} to train on, {len(data.held.rows)} "
        f"held out, {f'{config.num_classes} classes' if config.num_classes else 'unconditional'}")
    say(f"device      {device}, {world()[1]} process(es), {torch.get_num_threads()} threads, convs in {str(dtype)[6:]}")
    say("config      " + "  ".join(f"{name}={value}" for name, value in asdict(config).items()))

def main(argv=None):
    """The command line; for XLA a process for each device."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    if arguments[0].device == "xla":
        try:
            import torch_xla
        except ImportError as e:
            raise ValueError(f"--device xla needs the package torch_xla and the torch it was built for ({e})") from None
        torch_xla.launch(train_process, args=arguments)
    else:
        train_process(0, *arguments)

def train_process(index, run, model_options, dae_options):
    """One process of a run."""
    with signals():
        try:
            train_both(run, model_options, dae_options)
        except Stopped as e:
            say(f"\n{asked[0] if asked else 'a signal'}: {e}. The same command goes on from there.")

def cli(main):
    """Run a command; a user's mistake, a full disk or a bad file is one line and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as e:
        text = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else str(e)
        print(f"error: {daes.printable(text)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from the last save", file=sys.stderr)
        sys.exit(130)

# ---------------------------------------------------------------- the toy scenes: a data set drawn by code

SEED, OVERSAMPLE, TOY_COUNT = 1789, 4, 6144
BREADTH = {"church": 0.96, "house": 1.34, "castle": 1.2, "windmill": 0.92, "lighthouse": 0.52, "temple": 1.5,
           "pyramid": 1.6, "mosque": 1.28}  # the width of each landmark as a multiple of its height
TOY_CLASSES = tuple(BREADTH)
WALLS = "eee2c8 d6a076 c06856 e2be7c cec6cc a2b4be f0eeea".split()
ROOFS = "b04236 5472b2 427e74 8c624e 646274 d2923e 945a90".split()
LANDS = "749e4e 9ea658 d4b880 608c6e e2e6ee b08a68".split()
SKIES = (  # day, dusk, night and overcast: zenith, horizon, the light that tints the rest, the sun or moon
    ("5294de", "c4e2f4", (1, 1, 0.98), "#fff4be"), ("584a8a", "faa870", (0.96, 0.8, 0.74), "#ffd682"),
    ("12183e", "5868a0", (0.7, 0.75, 0.92), "#f0f0de"), ("8894a4", "ced4d8", (0.84, 0.87, 0.9), None))

class Brush:
    """Draws in a frame with y pointing up: its origin is the pixel (x, y) and its unit `unit` pixels long."""

    def __init__(self, canvas, x, y, unit):
        self.draw, self.x, self.y, self.unit = ImageDraw.Draw(canvas), x, y, unit

    def place(self, points):
        return [(self.x + self.unit * x, self.y - self.unit * y) for x, y in points]

    def ellipse(self, colour, x, y, width, height, start=0):  # start=180: its upper half
        box = self.place([(x - width / 2, y + height / 2), (x + width / 2, y - height / 2)])
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
            self.draw.polygon(self.place([(x + width * dx, y + dy) for dx, dy in corners]), fill=colour)

def landmark(name, rng, wall, roof, gap):
    """The solids of a landmark one unit high, from back to front: paint, x, y, width, height, top, lit."""
    flip = rng.choice((-1, 1))
    if name == "church":
        yield from [(wall, -0.15 * flip, 0, 0.6, 0.3), (roof, -0.15 * flip, 0.3, 0.66, 0.2, 0.84, 1),
                    (wall, 0.27 * flip, 0, 0.26, 0.56), (roof, 0.27 * flip, 0.56, 0.33, 0.44, 0),
                    (gap, 0.27 * flip, 0, 0.12, 0.22, "arch")]
        yield from [(gap, x * flip, 0.08, 0.08, 0.16, "arch") for x in (-0.34, -0.18, -0.02)]
    elif name == "house":
        yield wall, 0.34 * flip, 0.6, 0.16, 0.4  # the chimney, behind the roof
        yield from [(wall, 0, 0, 1.1, 0.48, 1, 0.75), (gap, -0.12 * flip, 0, 0.17, 0.34),
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
        for paint, low, high in zip((wall, roof) * 4, edges, edges[1:]):  # the stripes of a tapering tower
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
        yield from [(wall, x, 0, 0.12, 0.8) for x in (-0.56, 0.56)]
        yield from [(roof, x, 0.8, 0.16, 0.2, 0) for x in (-0.56, 0.56)]
        yield from [(wall, 0, 0, 0.88, 0.36), (wall, 0, 0.36, 0.58, 0.1), (roof, 0, 0.45, 0.66, 0.43, "dome")]
        yield from [(gap, x, 0, 0.15, 0.24, "arch") for x in (-0.27, 0, 0.27)]

def toy(index, size=64):
    """Scene `index` as a (size, size, 3) array of uint8, and its class."""
    rng = np.random.default_rng((SEED, index))
    name, breadth = list(BREADTH.items())[index % len(BREADTH)]
    (zenith, haze, light, sun), *codes = [row[rng.integers(len(row))] for row in (SKIES, WALLS, ROOFS, LANDS)]
    zenith, haze, *colours = np.array([list(bytes.fromhex(code)) for code in (zenith, haze, *codes)])
    wall, roof, ground = (colours + rng.uniform(-14, 14, (3, 3))) * light
    paints = (0.45 * haze + 140.25 * np.array(light), 0.62 * haze + 0.304 * ground,
              0.3 * haze + 0.56 * ground, 0.66 * ground, 0.3 * wall, wall, 0.7 * wall, roof, 0.7 * roof)
    cloud, far, near, shadow, dark, *paints = map(tuple, np.clip(paints, 0, 255).astype(int).tolist())
    unit = rng.uniform(0.78, 1) * min(0.8, 0.92 / breadth)  # the landmark's height; it fits the frame
    room = min(0.12, 0.47 - breadth * unit / 2)
    x, y, depth = rng.uniform((0.5 - room, 0.08, 0.05), (0.5 + room, 0.15, 0.16))
    horizon = y + depth
    side = size * OVERSAMPLE
    heights = 1 - (np.arange(side) + 0.5) / side
    stops = zip(0.86 * ground, ground, haze, zenith)  # per channel, from the foot of the picture up
    column = np.stack([np.interp(heights, (0, horizon, horizon, 1), channel) for channel in stops], axis=-1)
    canvas = Image.fromarray(column.astype(np.uint8)[:, None]).resize((side, side))
    brush, front = Brush(canvas, 0, side, side), Brush(canvas, side * x, side * (1 - y), side * unit)
    x, y, width = rng.uniform((0.08, 0.72, 0.1), (0.42, 0.92, 0.17))
    if sun:
        brush.ellipse(sun, x, y, width, width)
    x, y, width = rng.uniform((0.2, 0.66, 0.26), (0.9, 0.9, 0.44))
    if rng.random() < 0.6:
        for across, up, share in (-0.3, 0, 0.4), (0, 0.04, 0.64), (0.3, 0, 0.48):
            brush.ellipse(cloud, x + across * width, y + up * width, share * width, 0.6 * share * width)
    across = np.linspace(0, 1, 33)
    for hill, rise in (far, 1.22), (near, 0.9):  # the far hills are higher, and paler in the haze
        height, swell, phase, pace = rng.uniform((0.04, 0.02, 0, 3), (0.1, 0.05, 6.3, 8))
        ridge = horizon + rise * (height + swell * np.sin(phase + pace * across))
        brush.draw.polygon(brush.place([(0, horizon), *zip(across, ridge), (1, horizon)]), fill=hill)
    front.ellipse(shadow, 0.12, 0, breadth, 0.12)  # on the ground
    gap = (255, 214, 110) if sum(light) < 2.7 and rng.random() < 0.7 else dark  # lamps, unless by day
    for solid in landmark(name, rng, paints[:2], paints[2:], (gap, gap)):
        front.solid(*solid)
    if name == "windmill":
        sail = np.array((-0.03j, 0.08 - 0.06j, 0.43 - 0.08j, 0.43 + 0.11j, 0.08 + 0.09j, 0.03j))
        for quarter in rng.uniform(0.15, 0.85) + np.arange(4):
            turned = 0.58j + sail * np.exp(0.5j * np.pi * quarter)  # a complex factor turns
            front.draw.polygon(front.place(zip(turned.real, turned.imag)), fill=paints[2])
    picture = np.array(canvas.reduce(OVERSAMPLE))  # half are mirrored: lit from the right
    return picture[:, ::-1].copy() if rng.random() < 0.5 else picture, TOY_CLASSES.index(name)

if __name__ == "__main__":
    cli(main)
