"""The autoencoders of latent diffusion (Rombach et al., 2022), KL and VQ, in one file that needs torch only.

    ae = load("model.ckpt")                   # an official file, or ours; its tensors tell the architecture
    h = ae.encode(x)                          # x (B, 3, H, W) in [-1, 1] -> h (B, C, H/f, W/f)
    x = ae.decode(h)

    python dae.py info FILE                   # what a file is
    python dae.py convert IN OUT.safetensors  # for diffusers; OUT.ckpt: for latent diffusion

h is raw, without a factor such as 0.18215: the posterior's mean (KL), or what `decode` quantises (VQ).
What cannot be used is a ValueError of one line.
Shapes: B batch, H W image size, C latent channels, f downsampling factor.
"""
import argparse
import json
import math
import mmap
import os
import pickletools
import re
import sys
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

# ---------------- configuration
def knob(default, help):
    """A field of a config and its explanation, here and in `train.py --help`."""
    return field(default=default, metadata={"help": help})

@dataclass(frozen=True)
class Config:
    """An autoencoder and its training."""
    z_channels: int = knob(4, "channels of the latent")
    width: int = knob(128, "channels at multiplier 1, a multiple of 32")
    mult: tuple = knob((1, 2, 4, 4), "channel multiplier per level; f = 2^(levels - 1)")
    blocks: int = knob(2, "residual blocks per encoder level; the decoder has one more")
    attention: tuple = knob((), "levels with attention after each block, 0 is the finest")
    mid_attention: bool = knob(True, "attention between the two middle blocks")
    codebook: int = knob(0, "entries of the VQ codebook, 0: a KL autoencoder")
    quant_conv: bool = knob(True, "1x1 convolution after the encoder; SD3 and FLUX have none")
    post_quant_conv: bool = knob(True, "1x1 convolution before the decoder, likewise")
    # training (KL autoencoders)
    batch: int = knob(12, "images per training step")
    lr: float = knob(5.4e-5, "Adam's rate (LDM: 4.5e-6 x batch; adversary <= 2e-4), to 0 in the last third")
    steps: int = knob(250_000, "training steps")
    kl_weight: float = knob(1e-6, "weight of the KL to N(0, 1), summed over the latent")
    edge_weight: float = knob(0.0, "weight of the L1 of the error's differences between neighbours")
    perceptual_weight: float = knob(1.0, "weight of LPIPS, where the lpips package is installed")
    adversarial_weight: float = knob(0.5, "adversarial gradient as a share of the reconstruction's, 0: none")
    adversarial_start: int = knob(50_001, "step at which the adversarial term starts")

    def __post_init__(self):
        numbers = [*self.mult, *(v for v in vars(self).values() if not isinstance(v, tuple))]
        if not (all(isinstance(v, (int, float)) and 0 <= v < 1e9 for v in numbers)
                and min(self.z_channels, self.blocks, self.batch, self.lr) > 0 and self.blocks <= 16
                and 0 < len(self.mult) <= 12 and set(self.attention) <= set(range(len(self.mult)))
                and all(c > 0 and c % 32 == 0 for c in self.widths)):
            raise ValueError("dae: expected sizes > 0, widths 32n, levels 1-12, attention there, blocks 1-16")

    @property
    def widths(self):
        return [round(self.width * m) for m in self.mult]

    @property
    def f(self):
        return 2 ** (len(self.mult) - 1)

# Rombach et al. (2022), Table 8 and the published configs; small-f4 is ours, for laptops.
PRESETS = {
    "kl-f4": Config(z_channels=3, mult=(1, 2, 4)),
    "kl-f8": Config(),
    "kl-f16": Config(z_channels=16, mult=(1, 1, 2, 2, 4), attention=(4,)),
    "kl-f32": Config(z_channels=64, mult=(1, 1, 2, 2, 4, 4), attention=(4, 5)),
    "vq-f4": Config(z_channels=3, mult=(1, 2, 4), codebook=8192),
    "vq-f4-noattn": Config(z_channels=3, mult=(1, 2, 4), codebook=8192, mid_attention=False),
    "vq-f8": Config(mult=(1, 2, 2, 4), attention=(3,), codebook=16384),
    "vq-f8-n256": Config(mult=(1, 2, 2, 4), attention=(3,), codebook=256),
    "vq-f16": Config(z_channels=8, mult=(1, 1, 2, 2, 4), attention=(4,), codebook=16384),
    "small-f4": Config(width=64, mult=(1, 1, 2), blocks=1, mid_attention=False, batch=4, lr=1e-3, steps=2400,
                       edge_weight=0.5, adversarial_weight=0.0),
}

# ---------------- layers
def norm(c):
    return nn.GroupNorm(32, c, eps=1e-6)

def conv(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)

def named(**layers):
    return nn.Sequential(OrderedDict(layers))

class ResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), conv(c_in, c_out)
        self.norm2, self.conv2 = norm(c_out), conv(c_out, c_out)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        for value in self.conv2.parameters():  # starts as the shortcut: trains much faster
            nn.init.zeros_(value)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, H, W)
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))

class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""
    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)                                                          # (B, c, H, W)
        q, k, v = (layer(h).flatten(2).mT for layer in (self.q, self.k, self.v))  # (B, H*W, c)
        h = F.scaled_dot_product_attention(q, k, v)                               # scale 1/sqrt(c)
        return x + self.proj_out(h.mT.unflatten(2, x.shape[2:]))

def middle(c, attention):
    attn = AttnBlock(c) if attention else nn.Identity()
    return named(block_1=ResBlock(c, c), attn_1=attn, block_2=ResBlock(c, c))

class Level(nn.Module):
    """Residual blocks at one resolution, each with attention if the config says so, then down or up."""
    def __init__(self, c_in, c, blocks, attention, down=False, up=False):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c if j else c_in, c) for j in range(blocks))
        same = nn.Identity()
        self.attn = nn.ModuleList(AttnBlock(c) if attention else same for _ in range(blocks))
        self.downsample = named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, 2)) if down else same
        self.upsample = named(nearest=nn.Upsample(scale_factor=2), conv=conv(c, c)) if up else same

    def forward(self, x):
        for block, attention in zip(self.block, self.attn):
            x = attention(block(x))               # (B, c, H, W)
        return self.upsample(self.downsample(x))  # (B, c, H/2, W/2), or (B, c, 2H, 2W)

# ---------------- the autoencoder
def encoder(config, c_out):
    """x (B, 3, H, W) -> features (B, c_out, H/f, W/f)."""
    widths, last = [config.width, *config.widths], len(config.mult) - 1
    return named(conv_in=conv(3, config.width),
                 down=nn.Sequential(*[Level(widths[i], c, config.blocks, i in config.attention, down=i < last)
                                      for i, c in enumerate(config.widths)]),
                 mid=middle(widths[-1], config.mid_attention),
                 norm_out=norm(widths[-1]), silu=nn.SiLU(), conv_out=conv(widths[-1], c_out))

class Up(nn.Sequential):
    """Levels are counted finest first, as in the official files, and run coarsest first."""
    def forward(self, h):
        for level in reversed(self):
            h = level(h)
        return h

def decoder(config):
    """Features (B, C, H/f, W/f) -> image (B, 3, H, W)."""
    widths = [*config.widths, config.widths[-1]]
    return named(conv_in=conv(config.z_channels, widths[-1]), mid=middle(widths[-1], config.mid_attention),
                 up=Up(*[Level(widths[i + 1], c, config.blocks + 1, i in config.attention, up=i > 0)
                         for i, c in enumerate(config.widths)]),
                 norm_out=norm(widths[0]), silu=nn.SiLU(), conv_out=conv(widths[0], 3))

class Autoencoder(nn.Module):
    """KL or VQ autoencoder of a Config; its state_dict has the names of latent diffusion's files."""
    def __init__(self, config):
        super().__init__()
        self.config, c = config, config.z_channels
        moments = c if config.codebook else 2 * c
        self.encoder, self.decoder = encoder(config, moments), decoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(c, c, 1) if config.post_quant_conv else nn.Identity()
        if config.codebook:
            self.quantize = named(embedding=nn.Embedding(config.codebook, c))

    def moments(self, x):
        """x as in `encode` -> mean and log-variance of a KL autoencoder's posterior, (B, C, H/f, W/f)."""
        mean, logvar = self.quant_conv(self.encoder(x)).float().chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1] -> raw latent h (B, C, H/f, W/f), not sampled."""
        f, (H, W) = self.config.f, x.shape[2:]
        require(H % f == W % f == 0, f"images of {H}x{W}: expected multiples of {f}")
        return self.quant_conv(self.encoder(x)).float()[:, :self.config.z_channels]  # of 2C, or C for VQ

    def decode(self, h):
        """Raw latent h (B, C, H/f, W/f) -> image (B, 3, H, W), about [-1, 1], not clipped."""
        if self.config.codebook:  # of which every position takes the nearest entry (L2)
            rows, table = h.movedim(1, 3).float(), self.quantize.embedding.weight.float()
            nearest = [torch.cdist(part, table).argmin(1) for part in rows.flatten(0, 2).split(4096)]
            h = table[torch.cat(nearest)].view(rows.shape).movedim(3, 1).to(h.dtype)  # (B, C, H/f, W/f)
        return self.decoder(self.post_quant_conv(h)).float()

class Identity(nn.Module):
    """The first stage of a model of pixels: h is the image in 0..255."""
    config = Config(z_channels=3, mult=(1,))

    def encode(self, x):
        return (x + 1) * 127.5  # (B, 3, H, W)

    def decode(self, h):
        return h / 127.5 - 1

# ---------------- training (Section 3.1)
class Discriminator(nn.Sequential):
    """PatchGAN (Isola et al., 2017): x (B, 3, H, W) -> logits of overlapping patches."""
    def __init__(self, width=64):
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
            batch_norm = nn.BatchNorm2d(2 * c, track_running_stats=False)  # it only ever trains
            layers += nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False), batch_norm, nn.LeakyReLU(0.2)
        super().__init__(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))
        for layer in self:
            if hasattr(layer, "weight"):
                nn.init.normal_(layer.weight, 1.0 if isinstance(layer, nn.BatchNorm2d) else 0.0, 0.02)

def training_losses(ae, x, noise, discriminator=None, perceptual=None, average=None):
    """Losses of a KL autoencoder ("dae") and its adversary ("discriminator", if any), and their terms, by
    name. x (B, 3, H, W) in [-1, 1]; noise (B, C, H/f, W/f); average(tensors): their mean over processes."""
    config = ae.config
    mean, logvar = ae.moments(x)                          # (B, C, H/f, W/f)
    rec = ae.decode(mean + (0.5 * logvar).exp() * noise)  # (B, 3, H, W)
    error = x - rec
    edges = sum(error.diff(dim=d).abs().sum() for d in (2, 3)) / len(x)
    nll = error.abs().sum((1, 2, 3)).mean() + config.edge_weight * edges
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
    terms = {"l1": error.abs().mean(), "kl": kl}
    if perceptual:
        terms["perceptual"] = perceptual(x, rec).float().mean()
        nll = nll + config.perceptual_weight * terms["perceptual"] * x[0].numel()
    losses = {"dae": nll + config.kl_weight * kl}
    if discriminator is not None:
        adversarial, last = -discriminator(rec).float().mean(), ae.decoder.conv_out.weight
        gradients = [torch.autograd.grad(term, last, retain_graph=True)[0] for term in (nll, adversarial)]
        if average:
            average(gradients)
        ratio = gradients[0].norm() / (gradients[1].norm() + 1e-4)  # as in VQGAN (Esser et al., 2021)
        weight = config.adversarial_weight * ratio.clamp(0, 0.05 * x[0].numel())  # LDM: 1e4
        real, fake = discriminator(x).float(), discriminator(rec.detach()).float()  # (B, 1, h, w)
        hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        losses = {"dae": losses["dae"] + weight * adversarial, "discriminator": hinge}
        terms |= {"adversarial": adversarial, "adversarial_weight": weight, "discriminator": hinge}
    return losses, {k: v.detach() for k, v in terms.items()}

def make_optimizers(parts, config):
    """Adam for each part: "dae", and perhaps "discriminator", then with LDM's betas."""
    betas = (0.5, 0.9) if "discriminator" in parts else (0.9, 0.99)
    return {k: torch.optim.Adam(v.parameters(), config.lr, betas=betas, fused=True) for k, v in parts.items()}

def train_step(parts, optimizers, x, noise, step, perceptual=None, average=None, context=nullcontext()):
    """One update, in a context (autocast) -> statistics. No change if a gradient is not finite."""
    config = parts["dae"].config
    adversary = parts.get("discriminator") if step >= config.adversarial_start else None
    with context:
        losses, terms = training_losses(parts["dae"], x, noise, adversary, perceptual, average)
    for name, loss in losses.items():
        optimizers[name].zero_grad()  # the autoencoder's loss has reached the adversary
        loss.backward()
    gradients = [p.grad for name in losses for p in parts[name].parameters()]
    if average:
        average(gradients)
    norm = float(torch.nn.utils.get_total_norm(gradients))
    # LDM's is constant; but a run starts calmer if its rate warms up, and ends sharper if it falls to zero.
    lr = config.lr * min(step / 100, 1, 3 * (config.steps - step + 1) / config.steps)
    skipped = not math.isfinite(norm)
    if not skipped:
        for name in losses:  # an adversary learns nothing at 1e-3
            optimizers[name].param_groups[0]["lr"] = lr if name == "dae" else min(lr, 2e-4)
            optimizers[name].step()
    return {"loss": losses["dae"].detach(), **terms, "grad_norm": norm, "skipped": skipped, "lr": lr}

# ---------------- files: reading runs nothing in them
def printable(text):
    """Text that a file may have a part in, its control characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

def require(condition, problem):
    if not condition:
        raise ValueError(problem)

@contextmanager
def explained(problem):
    """Whatever goes wrong inside becomes a ValueError: the problem, and in brackets its cause."""
    try:
        yield
    except Exception as e:  # of a broken file, a library, a device, the network; torch's words are many
        e = e.__context__ if type(e) is RuntimeError and e.__context__ else e  # torch's writer: a full disk
        cause = printable(re.split(r"\b\. ", str(e).replace("\n\t", " "))[0][:300]) or type(e).__name__
        raise ValueError(f"{problem} ({cause})") from None

class Inert:
    """What a file makes of a class or function that torch does not know. It holds nothing."""
    def __new__(cls, *ignored):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass

class InertDict:
    def __new__(cls, *ignored):
        return OrderedDict()  # torch puts items into real dicts only

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch's files before 1.6 begin
UNWANTED = r"\d{20}|bytearray|sparse|_rebuild_(?!tensor|parameter|from_type)"  # ints of one hash; names
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}

def check_pickle(data):
    """Refuse a pickle that would crash torch's reader or keep it busy: its operations are run on the sizes
    alone of what they build, and these are added up."""
    stack, marks, memo, work = [], [], {}, 0  # an object is a list of one number, its size
    for op, value, position in pickletools.genops(data):
        name, takes = op.name, op.stack_before
        start = len(stack) - len(takes)
        if name.endswith("PUT"):
            memo[value] = stack[-1]
        elif name == "MARK":
            marks.append(start)
        elif pickletools.markobject in takes:
            start = marks.pop() - takes.index(pickletools.markobject)
        made, taken = memo[value] if name.endswith("GET") else [1], stack[start:]
        if name.startswith(("APPEND", "SETITEM", "BUILD")):
            made = taken.pop(0)
        size = sum(n for n, in taken)
        made[0] += size
        work += size  # grows with nesting and with repeated use
        stack[start:] = [made] * len(op.stack_after)
        unwanted = name in ("LONG1", "GLOBAL") and re.search(UNWANTED, str(value))
        short = max(position, work // 4) <= 1 << 22  # bytes; real pickles stay below half of it
        require(short and not unwanted, "it is hostile, or of sparse or quantised tensors")

def load_zip(path):
    """torch.save's format since 1.6; what it names and torch does not know becomes Inert."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        total = sum(entry.file_size for entry in entries)
        require(total <= os.path.getsize(path) and not any(entry.compress_type for entry in entries),
                "no .ckpt in it; or its parts are compressed or overlap")
        for entry in entries:
            if entry.filename.lower().endswith("data.pkl"):
                check_pickle(archive.read(entry))
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    inert = [(InertDict if name.lower().endswith("dict") else Inert, name) for name in names]
    with torch.serialization.safe_globals(inert):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

def load_safetensors(file):
    """Header length (8 bytes), JSON {name: dtype, shape, data_offsets}, then the tensors; floats only."""
    mapped, tensors = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)), {}
    start = 8 + int.from_bytes(mapped[:8], "little")  # where the tensors begin
    header, data = json.loads(bytes(mapped[8:min(start, 100_000_000)])), mapped[start:]
    header.pop("__metadata__", None)
    lengths = [end - begin for begin, end in (entry["data_offsets"] for entry in header.values())]
    require(start + sum(lengths) == len(mapped), "its tensors do not fill it")
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] in SAFETENSORS and begin < end:
            values = torch.frombuffer(data[begin:end], dtype=SAFETENSORS[entry["dtype"]])
            tensors[name] = values.view(entry["shape"])
    return tensors

def unpack(path, folder):
    """The .ckpt of latent diffusion's zip, extracted into a folder; any other file is its own."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(".ckpt") and "._" not in entry.filename:  # a Mac's own
                    require(entry.file_size <= max(1 << 30, 4 * entry.compress_size), "its .ckpt is a bomb")
                    return archive.extract(entry, folder)
    return path

def read(path):
    """A file, or what is published so, as plain containers and tensors, views of it."""
    path = local(path)
    with explained(f"{path} cannot be read: missing, truncated or no checkpoint"), \
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, \
            warnings.catch_warnings(action="ignore"):
        require(os.path.isfile(path) or not os.path.exists(path), "not a file")  # a pipe would wait
        path = unpack(path, folder)
        with open(path, "rb") as file:
            head = file.read(len(LEGACY))
            if head == LEGACY:
                for _ in range(4):  # version, machine, content, keys
                    check_pickle(file)
                content = torch.load(path, map_location="cpu", weights_only=True)
            elif head.startswith(b"PK\x03\x04"):
                content = load_zip(path)
            else:
                require(head[8:9] == b"{", f"a web page? It begins with {head!r}")
                content = load_safetensors(file)
        tensors = list(filter(torch.is_tensor, tree_leaves(content)))
        for tensor in tensors:
            vars(tensor).clear()  # attributes that the file gave it
        size = sum(t.nbytes for t in tensors)
        require(size <= 2 * os.path.getsize(path), "it holds more than its size")  # tied weights count twice
        return content

# ---------------- the autoencoder in a file
# Fragments of names in latent diffusion's files (ours) and in diffusers', replaced in this order.
DIFFUSERS = [("mid.block_1.", "mid_block.resnets.0."), ("mid.block_2.", "mid_block.resnets.1."),
             ("mid.attn_1.", "mid_block.attentions.0."), (".down.", ".down_blocks."), (".up.", ".up_blocks."),
             (".block.", ".resnets."), (".attn.", ".attentions."), (".downsample.", ".downsamplers.0."),
             (".upsample.", ".upsamplers.0."), (".nin_shortcut.", ".conv_shortcut."),
             (".norm_out.", ".conv_norm_out."), (".norm.", ".group_norm."), (".q.", ".to_q."),
             (".k.", ".to_k."), (".v.", ".to_v."), (".proj_out.", ".to_out.0."),  # and in older files:
             (".q.", ".query."), (".k.", ".key."), (".v.", ".value."), (".proj_out.", ".proj_attn.")]
FIRST = "encoder.conv_in.weight"                    # every autoencoder has it
LEVEL = re.compile(r"^(decoder\.up\w*\.)(\d{1,3})")  # of the decoder: diffusers counts from the other end

def translate(state, to_diffusers):
    """A state_dict in diffusers' names, or from them in ours. Attention: matrices there, 1x1 kernels here."""
    pairs = DIFFUSERS if to_diffusers else [(theirs, ours) for ours, theirs in DIFFUSERS]
    levels, result = [int(m[2]) for m in map(LEVEL.match, state) if m], {}
    for name, value in state.items():
        if ".att" in name and value.ndim == (4 if to_diffusers else 2):
            value = value.flatten(1) if to_diffusers else value[:, :, None, None]
        for old, new in pairs:
            name = name.replace(old, new)
        result[LEVEL.sub(lambda m: f"{m[1]}{max(levels) - int(m[2])}", name)] = value
    return result

def find(content, source):
    """What `read` returned -> the autoencoder's tensors in our names, what they are."""
    parts = [content, *content.values()] if isinstance(content, dict) else [()]
    found = [(name.removesuffix(FIRST), part) for part in parts if isinstance(part, dict) for name in part
             if type(name) is str and f".{name}".endswith(f".{FIRST}")]
    require(found, f"{source}: no autoencoder: expected {FIRST}, found {str([*parts[0]])[:200]}")
    prefix, tensors = min(found, key=lambda some: (not some[0].endswith("first_stage_model."), len(some[0])))
    state = {name.removeprefix(prefix): value for name, value in tensors.items()
             if torch.is_tensor(value) and value.is_floating_point() and type(name) is str
             and name.startswith(prefix) and not name.startswith((f"{prefix}loss.", f"{prefix}model_ema."))}
    theirs = any(name.startswith("decoder.mid_block.") for name in state)
    told = f"{'diffusers' if theirs else 'our'} names after {prefix!r}, {len(tensors) - len(state)} left out"
    return translate(state, to_diffusers=False) if theirs else state, told

def architecture(state):
    """What a state_dict in latent diffusion's names tells of its Config, as a dict. Raises KeyError."""
    width, levels = len(state[FIRST]), range(12)  # Config takes no more, nor more than 16 blocks
    channels = [len(state.get(f"encoder.down.{i}.block.0.conv1.weight", ())) for i in levels]
    return {"z_channels": state["decoder.conv_in.weight"].shape[1], "width": width,
            "mult": tuple(c // width if c % width == 0 else c / width for c in channels if c),
            "blocks": sum(f"encoder.down.0.block.{j}.conv1.weight" in state for j in range(16)),
            "attention": tuple(i for i in levels if f"encoder.down.{i}.attn.0.q.weight" in state),
            "mid_attention": "encoder.mid.attn_1.q.weight" in state,
            "codebook": len(state.get("quantize.embedding.weight", ())),
            "quant_conv": "quant_conv.weight" in state, "post_quant_conv": "post_quant_conv.weight" in state}

def fill(make, state, source):
    """make(), a module in evaluation mode, with float32 copies of a state_dict."""
    with explained(f"{source}: not a model that we know"), torch.device("meta"):  # shapes only
        module = make()
        copies = {k: v.detach().to(torch.float32, copy=True) for k, v in state.items()}
        module.load_state_dict(copies, assign=True)
    return module.eval()

def from_state(state, source="state_dict"):
    """An Autoencoder in evaluation mode from a state_dict in latent diffusion's names."""
    return fill(lambda: Autoencoder(Config(**architecture(state))), state, source)

# What is published, by name: its file in torch's hub cache, and its address.
PUBLISHED = {name: (f"{name}.ckpt", f"https://ommer-lab.com/files/latent-diffusion/{name}.zip")
             for name in PRESETS if name != "small-f4"}
DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="  # the paper's pipelines
PUBLISHED |= {"church": ("church_pipeline.pt", DRIVE + "1-174o5MywJYhhOcYI6yzMfUP5DvnlPcK"),
              "bedroom": ("bedroom_pipeline.pt", DRIVE + "1--uqW9S8-tbMJG8whHDx1qPJeH5W0j9r"),
              "imagenet": ("inet_pipeline.pt", DRIVE + "1-Td-danBSRX4IhlXAD_CtgFARbu4C9hH")}

def local(name):
    """The path of a file: `name`, or what is published under it, in torch's hub cache."""
    if os.path.isfile(name) or name not in PUBLISHED:
        return name
    file, address = PUBLISHED[name]
    path = f"{torch.hub.get_dir()}/checkpoints/{file}"
    if not os.path.isfile(path):
        with explained(f"{name} could not be downloaded: get {address} as it is, as {path}"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
                came = f"{folder}/download"
                torch.hub.download_url_to_file(address, came)
                came = unpack(came, folder)
                read(came)  # only what can be used is kept
                os.replace(came, path)
    return path

def load(path):
    """An Autoencoder in evaluation mode, of any file that README names."""
    ae, beside = from_state(find(read(path), path)[0], path), Path(local(path)).with_name("config.json")
    text = beside.read_text(errors="replace") if beside.is_file() else ""  # diffusers', perhaps
    require(not re.search(r'"norm_num_groups":\s*(?!32\b)\d', text), f"{beside}: norm_num_groups is not 32")
    return ae

# ---------------- writing files, and the command line
def write(path, save):
    """Write a file whole or not at all: `save(file)` fills a temporary one, which then takes the name."""
    draft = f"{path}.tmp"
    with explained(f"{path}: cannot be made"):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        try:
            with open(draft, "wb") as file:
                save(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            Path(draft).unlink(missing_ok=True)

def save_safetensors(state, file):
    """Write a state_dict of float32 as load_safetensors reads it."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for k, v in state.items():
        begin, end = end, end + v.nbytes
        header[k] = {"dtype": "F32", "shape": list(v.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for v in state.values():
        file.write(v.contiguous().numpy())

def diffusers_config(config):
    """The config.json with which diffusers' AutoencoderKL or VQModel takes our weights."""
    down = ["AttnDownEncoderBlock2D" if i in config.attention else "DownEncoderBlock2D"
            for i in range(len(config.mult))]
    return {"_class_name": "VQModel" if config.codebook else "AutoencoderKL", "scaling_factor": 1.0,
            "num_vq_embeddings": config.codebook, "use_quant_conv": config.quant_conv,
            "use_post_quant_conv": config.post_quant_conv, "down_block_types": down,
            "up_block_types": [name.replace("DownEncoder", "UpDecoder") for name in reversed(down)],
            "block_out_channels": config.widths, "layers_per_block": config.blocks,
            "latent_channels": config.z_channels, "mid_block_add_attention": config.mid_attention}

def info(path):
    """Say what a file is."""
    ae, (state, told) = load(path), find(read(path), path)
    fields = architecture(state)
    like = [k for k, v in PRESETS.items() if fields.items() <= vars(v).items()] or ["none"]
    print(f"{'VQ' if ae.config.codebook else 'KL'} autoencoder, f = {ae.config.f}, as {like[0]}")
    print(", ".join(f"{k} {v}" for k, v in fields.items()))
    print(f"{sum(v.numel() for v in state.values()):,} parameters, {told}")

def convert(source, target):
    """Write an autoencoder, in float32: a .safetensors for diffusers, any other for latent diffusion."""
    ae = load(source)
    state = ae.state_dict()
    if target.endswith(".safetensors"):
        write(target, lambda file: save_safetensors(translate(state, to_diffusers=True), file))
    else:
        write(target, lambda file: torch.save({"state_dict": state}, file))
    if Path(target).name == "diffusion_pytorch_model.safetensors":
        text = json.dumps(diffusers_config(ae.config), indent=2)
        write(Path(target).with_name("config.json"), lambda file: file.write(text.encode()))

class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ValueErrors of one line, and which takes no shortened options."""
    def __init__(self, **options):
        super().__init__(**options, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise ValueError(f"{message} (see --help)")

def cli(main):
    """Run a command; a user's mistake, a bad file, a full disk or memory: one line, exit code 2."""
    try:
        main()
    except (ValueError, OSError, RuntimeError, MemoryError) as e:
        if isinstance(e, RuntimeError) and not re.search("(?i)of ?memory|allocate memory|compiler", repr(e)):
            raise  # not the user's
        print(f"error: {printable(str(e))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

def main(argv=None):
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    commands.add_parser("info", help=info.__doc__).add_argument("files", nargs=1, metavar="FILE")
    commands.add_parser("convert", help=convert.__doc__).add_argument("files", nargs=2, metavar="FILE")
    args = parser.parse_args(argv)
    {"info": info, "convert": convert}[args.command](*args.files)

if __name__ == "__main__":
    cli(main)
