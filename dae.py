"""The deterministic autoencoder (DAE): images to latents and back, in one file.

The first stage of "High Fidelity Image Synthesis With Deep VAEs In Latent Space" (Luhman & Luhman, 2023): the
autoencoders of latent diffusion (Rombach et al., 2022), KL and VQ, with the official files' parameter names.

    ae = load("model.ckpt")                     # an official file, or ours; its tensors tell the architecture
    h = ae.encode(x)                            # x (B, 3, H, W) in [-1, 1] -> h (B, C, H/f, W/f)
    x = ae.decode(h)

    python dae.py info FILE                     # what a file is
    python dae.py convert IN OUT.safetensors    # for diffusers; OUT.ckpt: for latent diffusion

h is the raw latent, with no factor such as 0.18215: the posterior's mean (KL), or the features before
quantisation (VQ, which quantises at the start of `decode`). Whoever models h shifts and scales it.
Shapes: B batch, H W image size, C latent channels, f downsampling factor. Needs torch only; copy it anywhere.
"""
import argparse
import contextlib
import json
import math
import os
import pickletools
import re
import sys
import tempfile
import warnings
import zipfile
from collections import Counter, OrderedDict, namedtuple
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------- configuration

def knob(default, help):
    """A field of a config with its explanation, which is also the text of `train.py --help`."""
    return field(default=default, metadata={"help": help})

@dataclass(frozen=True)
class Config:
    """An autoencoder and how it is trained. Lists are finest level first. Raises ValueError."""
    # architecture
    z_channels: int = knob(4, "channels of the latent")
    width: int = knob(128, "channels at multiplier 1, a multiple of 32")
    mult: tuple = knob((1, 2, 4, 4), "channel multiplier per level, finest first; f = 2^(levels - 1)")
    blocks: int = knob(2, "residual blocks per encoder level; the decoder has one more")
    attention: tuple = knob((), "levels with attention after each block, 0 is the finest")
    mid_attention: bool = knob(True, "attention between the two middle blocks")
    codebook: int = knob(0, "entries of the VQ codebook, 0: a KL autoencoder")
    # training (KL autoencoders)
    batch: int = knob(12, "images per training step")
    lr: float = knob(5.4e-5, "learning rate of Adam, constant (LDM: 4.5e-6 x batch)")
    steps: int = knob(250_000, "training steps")
    kl_weight: float = knob(1e-6, "weight of the KL to N(0, 1), summed over the latent")
    perceptual_weight: float = knob(1.0, "weight of LPIPS, where the lpips package is installed")
    adversarial_weight: float = knob(0.5, "adversarial gradient as a share of the reconstruction's, 0: none")
    adversarial_start: int = knob(50_001, "step at which the adversarial term starts")

    def __post_init__(self):
        for name in ("mult", "attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))       # lists come back from files
        if not all(isinstance(m, (int, float)) for m in self.mult):
            raise ValueError(f"an autoencoder's mult takes numbers, not {self.mult}")
        fits = min(self.z_channels, self.blocks, self.batch, self.lr) > 0 <= self.codebook
        fits = fits and 0 < len(self.mult) <= 12 and set(self.attention) <= set(range(len(self.mult)))
        if not fits or self.blocks > 16 or any(c % 32 or c < 32 for c in (self.width, *self.widths)):
            raise ValueError("an autoencoder needs positive sizes, attention at levels that it has, not "
                             f"{self.attention}, and widths that are multiples of 32, not {self.widths}")

    @property
    def widths(self):
        return [round(self.width * m) for m in self.mult]

    @property
    def f(self):
        return 2 ** (len(self.mult) - 1)

ARCHITECTURE = ("z_channels", "width", "mult", "blocks", "attention", "mid_attention", "codebook")

# Rombach et al. (2022), Table 8 and the published configs; small-f4 is ours, for training on a laptop.
PRESETS = {
    "kl-f4": Config(z_channels=3, mult=(1, 2, 4)),
    "kl-f8": Config(z_channels=4, mult=(1, 2, 4, 4)),
    "kl-f16": Config(z_channels=16, mult=(1, 1, 2, 2, 4), attention=(4,)),
    "kl-f32": Config(z_channels=64, mult=(1, 1, 2, 2, 4, 4), attention=(4, 5)),
    "vq-f4": Config(z_channels=3, mult=(1, 2, 4), codebook=8192),
    "vq-f4-noattn": Config(z_channels=3, mult=(1, 2, 4), codebook=8192, mid_attention=False),
    "vq-f8": Config(z_channels=4, mult=(1, 2, 2, 4), attention=(3,), codebook=16384),
    "vq-f8-n256": Config(z_channels=4, mult=(1, 2, 2, 4), attention=(3,), codebook=256),
    "vq-f16": Config(z_channels=8, mult=(1, 1, 2, 2, 4), attention=(4,), codebook=16384),
    "small-f4": Config(z_channels=4, width=64, mult=(1, 1, 2), blocks=1, mid_attention=False, batch=4,
                       lr=1e-3, steps=2000, adversarial_weight=0.0),
}

# ---------------------------------------------------------------- layers

def norm(c):
    return nn.GroupNorm(32, c, eps=1e-6)

class ResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                  # (B, c_out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)

class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)                                       # (B, c, H, W)
        q, k, v = (conv(h).flatten(2).mT for conv in (self.q, self.k, self.v))                # (B, H*W, c)
        h = F.scaled_dot_product_attention(q, k, v)            # scale 1/sqrt(c)
        return x + self.proj_out(h.mT.unflatten(2, x.shape[2:]))

def downsample(c):
    pad = nn.ZeroPad2d((0, 1, 0, 1))                           # at the right and the bottom only
    return nn.Sequential(OrderedDict(pad=pad, conv=nn.Conv2d(c, c, 3, stride=2)))

def upsample(c):
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2), conv=nn.Conv2d(c, c, 3, padding=1)))

def middle(c, attention):
    layers = OrderedDict(block_1=ResBlock(c, c))
    if attention:
        layers["attn_1"] = AttnBlock(c)
    layers["block_2"] = ResBlock(c, c)
    return nn.Sequential(layers)

class Level(nn.Module):
    """Residual blocks at one resolution, attention after each where the config says so, then down or up."""

    def __init__(self, c_in, c_out, blocks, attention, resample=None):
        super().__init__()
        self.block = nn.ModuleList([ResBlock(c_in if j == 0 else c_out, c_out) for j in range(blocks)])
        self.attn = nn.ModuleList([AttnBlock(c_out) if attention else nn.Identity() for _ in range(blocks)])
        if resample is not None:                               # the parameters' names say which
            self.add_module(resample.__name__, resample(c_out))

    def forward(self, x):
        for block, attention in zip(self.block, self.attn):
            x = attention(block(x))                            # (B, c_out, H, W)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)                     # (B, c_out, H/2, W/2), or (B, c_out, 2H, 2W)
        return x

# ---------------------------------------------------------------- the autoencoder

def encoder(config, c_out):
    """x (B, 3, H, W) -> features (B, c_out, H/f, W/f)."""
    widths, last = [config.width, *config.widths], len(config.mult) - 1
    return nn.Sequential(OrderedDict(
        conv_in=nn.Conv2d(3, config.width, 3, padding=1),
        down=nn.Sequential(*[
            Level(widths[i], c, config.blocks, i in config.attention, downsample if i < last else None)
            for i, c in enumerate(config.widths)]),
        mid=middle(widths[-1], config.mid_attention),
        norm_out=norm(widths[-1]),
        silu=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], c_out, 3, padding=1)))

class Up(nn.Sequential):
    """Levels are counted finest first, as in the official files, and run coarsest first."""

    def forward(self, h):
        for level in reversed(self):
            h = level(h)
        return h

def decoder(config):
    """Features (B, C, H/f, W/f) -> image (B, 3, H, W)."""
    widths, coarser = config.widths, [*config.widths[1:], config.widths[-1]]
    return nn.Sequential(OrderedDict(
        conv_in=nn.Conv2d(config.z_channels, widths[-1], 3, padding=1),
        mid=middle(widths[-1], config.mid_attention),
        up=Up(*[
            Level(coarser[i], c, config.blocks + 1, i in config.attention, upsample if i else None)
            for i, c in enumerate(widths)]),
        norm_out=norm(widths[0]),
        silu=nn.SiLU(),
        conv_out=nn.Conv2d(widths[0], 3, 3, padding=1)))

class Codebook(nn.Module):
    def __init__(self, entries, channels):
        super().__init__()
        self.embedding = nn.Embedding(entries, channels)

    def forward(self, h):
        """(B, C, H, W) -> each position's nearest entry (L2), same shape."""
        rows = h.permute(0, 2, 3, 1).flatten(0, 2).float()     # (B*H*W, C)
        table = self.embedding.weight.float()
        nearest = torch.cat([torch.cdist(part, table).argmin(1) for part in rows.split(4096)])
        return table[nearest].view(h.shape[0], *h.shape[2:], -1).permute(0, 3, 1, 2).to(h.dtype)

class Autoencoder(nn.Module):
    """KL or VQ autoencoder of a Config; state_dict names are those of the official latent-diffusion files."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        c = config.z_channels
        moments = c if config.codebook else 2 * c
        self.encoder = encoder(config, moments)
        self.decoder = decoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)
        if config.codebook:
            self.quantize = Codebook(config.codebook, c)

    def moments(self, x):
        """x (B, 3, H, W) in [-1, 1] -> mean and log-variance (B, C, H/f, W/f) of the posterior (KL), or
        features before quantisation and None (VQ). Raises ValueError if f does not divide H and W."""
        f = self.config.f
        if x.shape[1] != 3 or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"images are {tuple(x.shape)}: expected (B, 3, H, W), H and W multiples of {f}")
        h = self.quant_conv(self.encoder(x)).float()           # (B, 2C, H/f, W/f), or C for VQ
        if self.config.codebook:
            return h, None
        mean, logvar = h.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1] -> h (B, C, H/f, W/f), the raw latent; nothing is sampled."""
        return self.moments(x)[0]

    def decode(self, h):
        """Raw latent h (B, C, H/f, W/f) -> image (B, 3, H, W), about [-1, 1], not clipped."""
        if self.config.codebook:
            h = self.quantize(h)
        return self.decoder(self.post_quant_conv(h)).float()

class Identity(nn.Module):
    """The first stage of a model of pixels: h is the image in 0..255, modelled with shift and scale 127.5."""
    config = Config(z_channels=3, mult=(1,))

    def encode(self, x):
        return (x + 1) * 127.5                                 # (B, 3, H, W)

    def decode(self, h):
        return h / 127.5 - 1

# ---------------------------------------------------------------- training (Section 3.1)

class Discriminator(nn.Sequential):
    """PatchGAN (Isola et al., 2017): x (B, 3, H, W) -> logits of overlapping patches."""

    def __init__(self, width=64):
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
            conv = nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))
        for layer in self:
            if not isinstance(layer, nn.LeakyReLU):
                nn.init.normal_(layer.weight, 0.0 if isinstance(layer, nn.Conv2d) else 1.0, 0.02)

def perceptual_network(device="cpu"):
    """LPIPS (Zhang et al., 2018), or None where the `lpips` package or its weights cannot be had."""
    try:
        import lpips
        return lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False).to(device)
    except (ImportError, OSError):                             # not installed, or its weights not downloaded
        return None

def training_losses(ae, x, noise=None, discriminator=None, perceptual=None, average=None):
    """One step's objectives for a KL autoencoder and for the discriminator (None: no adversarial term).

    loss = sum |x - rec| + perceptual + w * adversarial + kl_weight * KL, sums over pixels, batch mean; w
    balances two gradients at the decoder's last layer, as in VQGAN (Esser et al., 2021). x (B, 3, H, W) in
    [-1, 1]; noise: the posterior's, (B, C, H/f, W/f), None draws it; average(tensors) replaces tensors by
    their mean over all processes. Returns the autoencoder's loss, the discriminator's (or None), named terms.
    """
    config, hinge = ae.config, None
    mean, logvar = ae.moments(x)                               # (B, C, H/f, W/f)
    noise = torch.randn_like(mean) if noise is None else noise
    rec = ae.decode(mean + (0.5 * logvar).exp() * noise)       # (B, 3, H, W)
    error = (x - rec).abs()
    nll = error.sum((1, 2, 3)).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
    terms = {"l1": error.mean(), "kl": kl}
    if perceptual is not None:
        terms["perceptual"] = perceptual(x, rec).float().mean()
        nll = nll + config.perceptual_weight * terms["perceptual"] * x[0].numel()
    loss = nll + config.kl_weight * kl
    if discriminator is not None:
        adversarial = -discriminator(rec).float().mean()
        last = ae.decoder.conv_out.weight
        gradients = [torch.autograd.grad(term, last, retain_graph=True)[0] for term in (nll, adversarial)]
        if average is not None:
            average(gradients)
        ratio = gradients[0].norm() / (gradients[1].norm() + 1e-4)
        weight = config.adversarial_weight * ratio.clamp(0, 1e4)
        loss = loss + weight * adversarial
        real, fake = discriminator(x).float(), discriminator(rec.detach()).float()            # (B, 1, h, w)
        hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        terms |= {"adversarial": adversarial, "adversarial_weight": weight, "discriminator": hinge}
    return loss, hinge, {name: term.detach() for name, term in terms.items()}

def make_optimizers(parts, config):
    """Adam for the autoencoder ("dae") and its adversary ("discriminator", if any), with LDM's betas; without
    an adversary others are faster."""
    betas = (0.5, 0.9) if "discriminator" in parts else (0.9, 0.99)
    return {name: torch.optim.Adam(part.parameters(), config.lr, betas=betas, fused=True)
            for name, part in parts.items()}

def train_step(parts, optimizers, x, noise, step, perceptual=None, average=None,
               context=contextlib.nullcontext()):
    """One update of the autoencoder and its adversary, as in make_optimizers. context: autocast.

    A step whose gradient is not finite leaves everything as it was. Returns named statistics.
    """
    config, buffers = parts["dae"].config, [buffer for part in parts.values() for buffer in part.buffers()]
    before = [buffer.clone() for buffer in buffers]            # batch norm's statistics
    adversary = parts.get("discriminator") if step >= config.adversarial_start else None
    with context:
        loss, hinge, terms = training_losses(parts["dae"], x, noise, adversary, perceptual, average)
    losses = {"dae": loss} if hinge is None else {"dae": loss, "discriminator": hinge}
    for name, objective in losses.items():
        optimizers[name].zero_grad()                           # the autoencoder's loss has reached the adversary
        objective.backward()
    gradients = [p.grad for name in losses for p in parts[name].parameters()]
    if average is not None:
        average(gradients)
    norm = float(torch.nn.utils.get_total_norm(gradients))
    # Constant, as LDM's, but for the last third: a short run ends sharper if its rate falls to zero.
    lr = config.lr * min(step / 100, 1, 3 * (config.steps - step + 1) / config.steps)
    optimizers["dae"].param_groups[0]["lr"] = lr
    if math.isfinite(norm):
        for name in losses:
            optimizers[name].step()
    else:
        for buffer, value in zip(buffers, before):
            buffer.copy_(value)
    return {"loss": loss.detach(), **terms, "grad_norm": norm, "skipped": not math.isfinite(norm), "lr": lr}

# ---------------------------------------------------------------- files: reading runs nothing in them

class LoadError(ValueError):
    """A file that cannot be used, in one line: which file, what is wrong, what to do."""

class Inert:
    """Stands in for what a file makes of a class or function that torch does not know. It holds nothing."""

    def __new__(cls, *ignored):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass

class InertDict:
    """The same for subclasses of dict: torch puts items into real ones only."""

    def __new__(cls, *ignored):
        return OrderedDict()

LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."                   # a pickled number: torch's files before 1.6
LIMIT = 1 << 22                                                # bytes of a pickle; real ones: below half
UNWANTED = re.compile("bytearray|sparse|_rebuild_(?!tensor|parameter|from_type)")
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
               "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
               "F8_E5M2": torch.float8_e5m2}

def check_pickle(data):
    """Refuse a pickle that would crash torch's reader or keep it busy: follows the sizes of what it builds.

    `work` is all that its operations take. Endless nesting and many uses of a large object make it grow.
    """
    stack, marks, memo, work = [], [], {}, 0                   # an object is a list of one number, its size
    for operation, value, position in pickletools.genops(data):
        name, takes = operation.name, operation.stack_before
        if name.endswith("GET"):
            stack.append(memo[value])
        elif name.endswith("PUT"):
            memo[value] = stack[-1]
        elif name == "MARK":
            marks.append(len(stack))
        else:
            start = len(stack) - len(takes)
            if pickletools.markobject in takes:
                start = marks.pop() - takes.index(pickletools.markobject)
            taken = stack[start:]
            made = taken.pop(0) if name.startswith(("APPEND", "SETITEM", "BUILD")) else [1]
            size = sum(number for number, in taken)
            made[0] += size
            work += size
            stack[start:] = [made] * len(operation.stack_after)
        slow_to_hash = type(value) is int and abs(value) >> 61
        unwanted = name == "GLOBAL" and UNWANTED.search(value)
        if max(position, work // 4) > LIMIT or slow_to_hash or unwanted:
            raise LoadError("a hostile file, or one of sparse, quantised or missing tensors")

def load_zip(path):
    """torch.save's format since 1.6, mapped; what it names and torch does not know becomes Inert."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        pickles = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
        cause = "" if pickles else "a zip without weights: it holds no .ckpt"
        if any(entry.filename.endswith("constants.pkl") for entry in entries):
            cause = "a TorchScript program, not a file of weights"
        total = sum(entry.file_size for entry in entries)
        if total > os.path.getsize(path) or any(entry.compress_type for entry in entries):
            cause = cause or "its parts are compressed or overlap, which torch does not write"
        if cause:
            raise LoadError(cause)
        for entry in pickles:
            check_pickle(archive.read(entry))
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    inert = [(InertDict if name.lower().endswith("dict") else Inert, name) for name in names]
    with torch.serialization.safe_globals(inert):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

def load_safetensors(path):
    """Header length (8 bytes), JSON {name: dtype, shape, data_offsets}, then the tensors, without gaps."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")     # where the tensors begin
        header = json.loads(file.read(min(start - 8, 100_000_000)))
    header.pop("__metadata__", None)
    spans = sorted(entry["data_offsets"] for entry in header.values())
    ends = [0] + [stop for _, stop in spans]
    if [begin for begin, _ in spans] != ends[:-1] or start + ends[-1] != size:
        raise LoadError(f"truncated or damaged: its tensors do not fill the {size} bytes of the file")
    mapped = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
    tensors = {}
    for name, entry in header.items():
        dtype, (begin, stop) = SAFETENSORS[entry["dtype"]], entry["data_offsets"]
        data = mapped[start + begin:start + stop]
        aligned = data if data.data_ptr() % dtype.itemsize == 0 else data.clone()
        tensors[name] = aligned.view(dtype).view(entry["shape"])
    return tensors

def unpack(path, folder):
    """Extract the .ckpt of latent diffusion's zip into a folder; its path, or None if the zip holds none."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name = os.path.basename(entry.filename)
            if name.endswith(".ckpt") and not name.startswith("._"):
                if entry.file_size > max(1 << 30, 4 * entry.compress_size):
                    raise LoadError(f"its .ckpt would take {entry.file_size} bytes: weights shrink less")
                entry.filename = "model.ckpt"
                return archive.extract(entry, folder)
    return None

KINDS = [(rb"\s*<", "a web page"), (rb"version https://git-lfs", "a Git LFS pointer: it was not downloaded"),
         (rb"\Z", "empty, or a folder or a device"), (rb"", "unknown content")]

def contents(path, packed=True):
    """What `read` returns; raises whatever a broken or hostile file provokes."""
    head = b""
    if os.path.isfile(path) or not os.path.exists(path):       # a pipe would wait
        with open(path, "rb") as file:
            head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            inner = unpack(path, folder) if packed else None
            if inner is not None:
                return contents(inner, packed=False)
        content = load_zip(path)
    elif LEGACY in head[:32]:
        with open(path, "rb") as file:
            file.seek(head.index(LEGACY) + len(LEGACY))
            for _ in range(4):                                 # version, machine, content, keys
                check_pickle(file)
        content = torch.load(path, map_location="cpu", weights_only=True)
    elif head[8:9] == b"{":
        content = load_safetensors(path)
    else:
        kind = next(kind for pattern, kind in KINDS if re.match(pattern, head))
        raise LoadError(f"not a checkpoint ({kind}; expected what torch.save writes, or .safetensors)")
    stack, seen, total = [content], 0, 0
    while stack:
        value = stack.pop()
        seen += 1
        if torch.is_tensor(value):
            total += value.nbytes
            vars(value).clear()                                # attributes that the file gave it
        elif isinstance(value, (dict, list, tuple)):
            stack += value.values() if isinstance(value, dict) else value
        if seen > 1_000_000 or total > 2 * os.path.getsize(path):            # tied weights count twice
            raise LoadError("a hostile file: what it holds is larger than itself")
    return content

def read(path):
    """What a file of weights holds, as plain containers and CPU tensors, running nothing from inside it.

    .safetensors, what torch.save writes or ever wrote, or such a file in a zip; told apart by content. Other
    objects become Inert. The tensors are views of the mapped file: copy what is to be kept. Raises LoadError.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            return contents(path)
    except LoadError as e:
        cause = str(e)
    except OSError as e:
        cause = e.strerror or str(e)
    except Exception as e:                                     # torch's own words are long and coloured
        cause = f"a truncated, damaged or hostile file ({type(e).__name__})"
    raise LoadError(f"{path}: {cause}")

# ---------------------------------------------------------------- the autoencoder in a file

# Parts of names in latent diffusion's files, which are ours, and in diffusers': replaced in this order, they
# translate either way. diffusers also counts the decoder's levels coarsest first; its attention is linear.
DIFFUSERS = [("mid.block_1.", "mid_block.resnets.0."), ("mid.block_2.", "mid_block.resnets.1."),
             ("mid.attn_1.", "mid_block.attentions.0."), (".down.", ".down_blocks."), (".up.", ".up_blocks."),
             (".block.", ".resnets."), (".attn.", ".attentions."), (".downsample.", ".downsamplers.0."),
             (".upsample.", ".upsamplers.0."), (".nin_shortcut.", ".conv_shortcut."),
             (".norm_out.", ".conv_norm_out."), (".norm.", ".group_norm."), (".q.", ".to_q."),
             (".k.", ".to_k."), (".v.", ".to_v."), (".proj_out.", ".to_out.0.")]
OLD_DIFFUSERS = [(".q.", ".query."), (".k.", ".key."), (".v.", ".value."), (".proj_out.", ".proj_attn.")]
LINEAR = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")
FIRST = "encoder.conv_in.weight"                               # every autoencoder has it, in both namings

def translate(state, pairs):
    """A state_dict in other names: pairs of fragments are replaced in order. Of twins, one keeps its name."""
    result = {}
    for name, value in state.items():
        other = name
        for old, new in pairs:
            other = other.replace(old, new)
        result[name if other in result else other] = value
    return result

def flip(state):
    """decoder.up.I. <-> decoder.up.(levels - 1 - I)."""
    pattern = r"(?<=^decoder\.up\.)\d+"
    last = max((int(level) for name in state for level in re.findall(pattern, name)), default=0)
    return {re.sub(pattern, lambda level: str(last - int(level[0])), name): value
            for name, value in state.items()}

def from_diffusers(state):
    """A state_dict in diffusers' names, new or old, -> latent diffusion's."""
    return flip(translate(state, [(new, old) for old, new in DIFFUSERS + OLD_DIFFUSERS]))

def to_diffusers(state):
    """A state_dict in latent diffusion's names -> diffusers' (AutoencoderKL, VQModel)."""
    state = {name: value.flatten(1) if name.endswith(LINEAR) else value for name, value in state.items()}
    return translate(flip(state), DIFFUSERS)

Found = namedtuple("Found", "state naming dropped")            # state in latent diffusion's names

def places(content, depth=3):
    """(Where, dict) of a dict and those inside it, itself first, then the usual places."""
    yield "", content
    inner = [key for key, value in content.items() if type(key) is str and isinstance(value, dict) and depth]
    for key in sorted(inner, key=lambda key: key not in ("dae", "state_dict")):
        for where, place in places(content[key], depth - 1):
            yield f"{key}.{where}".rstrip("."), place

def find(content, source):
    """The autoencoder in what `read` returned, in any wrapping and naming, as Found. Raises LoadError."""
    names, prefixes = [], []
    for where, place in places(content if isinstance(content, dict) else {}):
        tensors = {k: v.detach() for k, v in place.items() if type(k) is str and torch.is_tensor(v)}
        prefixes = [k.removesuffix(FIRST) for k in tensors if f".{k}".endswith(f".{FIRST}")]
        names += [k[:60] for k in tensors]
        if prefixes:
            break
    if not prefixes:
        found = ", ".join(names[:3]) or "no tensors"
        raise LoadError(f"{source}: holds no autoencoder (expected {FIRST}, found {found})")
    prefix = min(prefixes, key=lambda p: (p not in ("", "first_stage_model."), len(p)))
    ignored = (f"{prefix}loss.", f"{prefix}model_ema.")
    own = [k for k in tensors if k.startswith(prefix) and not k.startswith(ignored)]
    dropped = Counter(k.removeprefix(prefix).split(".")[0] for k in tensors.keys() - set(own))
    state, naming = {k.removeprefix(prefix): tensors[k] for k in own}, "latent diffusion's"
    if any(k.startswith("decoder.mid_block.") for k in state):
        naming = "diffusers' old" if any(".query." in k for k in state) else "diffusers'"
        state = from_diffusers(state)
    state = {k: v[:, :, None, None] if k.endswith(LINEAR) and v.ndim == 2 else v for k, v in state.items()}
    return Found(state, f"{naming}, after {prefix!r}, in {where or 'the file itself'}", dropped)

def config_of(state):
    """The Config of a state_dict in latent diffusion's names. Raises KeyError or ValueError."""
    def count(prefix):
        return len({k[len(prefix):].split(".")[0] for k in state if k.startswith(prefix)})
    width, levels = len(state[FIRST]), range(count("encoder.down."))
    channels = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) for i in levels]
    return Config(
        z_channels=state["decoder.conv_in.weight"].shape[1], width=width,
        blocks=count("encoder.down.0.block."),
        mult=[c // width if c % width == 0 else c / width for c in channels],
        attention=[i for i in levels if f"encoder.down.{i}.attn.0.q.weight" in state],
        mid_attention="encoder.mid.attn_1.q.weight" in state,
        codebook=len(state.get("quantize.embedding.weight", ())))

def fill(make, state, source):
    """make(), a module in evaluation mode with its own float32 copies of the tensors of `state`.

    Nothing is allocated before every tensor is accounted for. Raises LoadError.
    """
    try:
        with torch.device("meta"):                             # shapes only
            module = make()
        shapes = {name: value.shape for name, value in module.state_dict().items()}
        given = {name: value.is_floating_point() and value.shape for name, value in state.items()}
        wrong = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
        problem = wrong and f"{len(wrong)} tensors are missing, extra or misshapen: {', '.join(wrong[:4])}"
    except Exception as e:                                     # a configuration or tensors that no model has
        problem = f"not a model that we know ({type(e).__name__}: {str(e)[:150]!r})"
    if problem:
        raise LoadError(f"{source}: {problem}")
    copies = {name: value.detach().to(torch.float32, copy=True) for name, value in state.items()}
    module.load_state_dict(copies, assign=True)
    return module.eval()

def from_state(state, source="state_dict"):
    """An Autoencoder in evaluation mode from a state_dict in latent diffusion's names. Raises LoadError."""
    return fill(lambda: Autoencoder(config_of(state)), state, source)

def load(path):
    """An Autoencoder in evaluation mode from a file, recognised by what is in it. Raises LoadError.

    Reads latent diffusion's model.ckpt, in its zip or not; full latent or Stable Diffusion checkpoints;
    Stable Diffusion's VAEs; diffusers' AutoencoderKL and VQModel; the paper's pipelines; train.py's files.
    Fetches what latent diffusion published, by its name.
    """
    path = local(path)
    return from_state(find(read(path), path).state, path)

PUBLISHED = ("kl-f4", "kl-f8", "kl-f16", "kl-f32", "vq-f4", "vq-f4-noattn", "vq-f8", "vq-f8-n256", "vq-f16")
ADDRESSES = {name: f"https://ommer-lab.com/files/latent-diffusion/{name}.zip" for name in PUBLISHED}

def local(name):
    """The path of a file: `name` itself, or for a published autoencoder its file in torch's hub cache,
    downloaded if need be. Raises LoadError."""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, f"{name}.ckpt")
    if name not in ADDRESSES or os.path.isfile(name):
        return name
    for cached in (path, os.path.join(folder, f"{name}.zip")):
        if os.path.exists(cached):
            return cached
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            print(f"{name}: downloading {ADDRESSES[name]}", file=sys.stderr)
            archive = os.path.join(temporary, "download.zip")
            torch.hub.download_url_to_file(ADDRESSES[name], archive)
            inner = unpack(archive, temporary) or archive
            find(read(inner), "what came")                     # only what can be used is kept
            os.replace(inner, path)
    except Exception as e:                                     # of the network, the disk, or what came
        raise LoadError(f"{name} is not here and could not be downloaded ({e}): put {ADDRESSES[name]} as it "
                        f"is, or the model.ckpt in it as {name}.ckpt, into {folder}") from None
    return path

# ---------------------------------------------------------------- writing files, and the command line

def write(path, save):
    """Write a file whole or not at all: `save(file)` fills a temporary one, which then takes the name."""
    temporary = f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:                       # torch reports a full disk as a RuntimeError
        cause = getattr(e, "strerror", None) or getattr(e.__context__, "strerror", None) or repr(e)
        raise LoadError(f"{path}: cannot be written ({cause})") from None
    finally:                                                   # whatever ended it
        if os.path.exists(temporary):
            os.remove(temporary)

def save_safetensors(state, file):
    """Write a state_dict in the layout that load_safetensors reads."""
    names = {dtype: name for name, dtype in SAFETENSORS.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, value in state.items():
        span = [end, end + value.nbytes]
        header[key] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": span}
        end = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for value in state.values():
        file.write(value.contiguous().flatten().view(torch.uint8).numpy())

def diffusers_config(config):
    """The config.json with which diffusers' AutoencoderKL or VQModel takes our weights."""
    down = [("Attn" if i in config.attention else "") + "DownEncoderBlock2D" for i in range(len(config.mult))]
    up = [kind.replace("DownEncoder", "UpDecoder") for kind in reversed(down)]
    kind = {"_class_name": "AutoencoderKL", "scaling_factor": 1.0}
    if config.codebook:
        kind = {"_class_name": "VQModel", "num_vq_embeddings": config.codebook}
    return kind | {"down_block_types": down, "up_block_types": up, "block_out_channels": config.widths,
                   "layers_per_block": config.blocks, "latent_channels": config.z_channels,
                   "mid_block_add_attention": config.mid_attention}

def info(path):
    """Say what a file is, in a few lines."""
    path = local(path)
    state, naming, dropped = find(read(path), path)
    config = from_state(state, path).config
    fields = {name: getattr(config, name) for name in ARCHITECTURE}
    like = [name for name, preset in PRESETS.items() if fields.items() <= vars(preset).items()] or ["none"]
    left = ", ".join(f"{name[:40]}.* ({count} tensors)" for name, count in dropped.most_common(20))
    types = ", ".join({str(value.dtype).removeprefix("torch.") for value in state.values()})
    print(printable(f"file        {path}"))
    print(f"kind        {'VQ' if config.codebook else 'KL'} autoencoder, f = {config.f}, as {like[0]}")
    print("layers      " + ", ".join(f"{name} {value}" for name, value in fields.items()))
    print(f"parameters  {sum(value.numel() for value in state.values()):,} in {types}")
    print(printable(f"names       {naming}"))
    print(printable(f"left out    {left or 'nothing'}"))

def convert(source, target):
    """Write an autoencoder in latent diffusion's names (.ckpt, .pt) or diffusers' (.safetensors).

    A target called diffusion_pytorch_model.safetensors gets the config.json that diffusers wants beside it.
    """
    if not target.endswith((".ckpt", ".pt", ".safetensors")):
        raise ValueError(f"{target}: expected .ckpt or .pt (latent diffusion), or .safetensors (diffusers)")
    state = find(read(local(source)), source).state
    config = from_state(state, source).config                  # every tensor is accounted for
    if target.endswith(".safetensors"):
        write(target, lambda file: save_safetensors(to_diffusers(state), file))
    else:
        write(target, lambda file: torch.save({"state_dict": {k: v.clone() for k, v in state.items()}}, file))
    if os.path.basename(target) == "diffusion_pytorch_model.safetensors":
        beside, fields = os.path.join(os.path.dirname(target), "config.json"), diffusers_config(config)
        if os.path.isfile(beside):                             # its factor is the user's
            with open(beside, "rb") as file:
                fields |= {k: v for k, v in json.load(file).items() if k == "scaling_factor"}
        write(beside, lambda file: file.write(json.dumps(fields, indent=2).encode()))
    print(f"{target}: {len(state)} tensors")

def printable(text):
    """Text that a file may have a part in, without its control characters."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

def main(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, names in ((info, ["path"]), (convert, ["source", "target"])):
        command = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0])
        command.set_defaults(function=function)
        for name in names:
            command.add_argument(name)
    arguments = vars(parser.parse_args(argv))
    try:
        arguments.pop("function")(**arguments)
    except (ValueError, OSError) as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
