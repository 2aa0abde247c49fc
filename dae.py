"""The deterministic autoencoder (DAE): images to latents and back, in one file.

This is the first stage of "High Fidelity Image Synthesis With Deep VAEs In Latent Space" (Luhman & Luhman, 2023): the
autoencoders of latent diffusion (Rombach et al., 2022), KL and VQ, with the parameter names of the official files.

    ae = load("model.ckpt")                     # an official file, or ours; the architecture is read off its tensors
    h = ae.encode(x)                            # x (B, 3, H, W) in [-1, 1] -> h (B, C, H/f, W/f)
    x = ae.decode(h)

    python dae.py info FILE                     # what a file is
    python dae.py convert IN OUT.safetensors    # for diffusers; OUT.ckpt: for latent diffusion

Normalisation: h is the raw latent. It is the posterior's mean (KL) or the feature map before quantisation (VQ, which
quantises at the start of `decode`), with no factor such as 0.18215 applied. Whoever models h shifts and scales it.

`training_losses` is the objective of Section 3.1 for training one: L1, perceptual, adversarial and KL terms.

Shapes: B batch, H W image size, C latent channels, f downsampling factor. Needs torch only; copy it anywhere.
"""
import argparse
import contextlib
import io
import json
import math
import mmap
import os
import pickle
import shutil
import struct
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------- configuration


def knob(default, help):
    """A config field with its explanation: the comment beside it and the text of `train.py --help` are one."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """An autoencoder and how it is trained. Levels are finest first; f = 2^(levels - 1)."""
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
    adversarial_weight: float = knob(0.5, "adversarial gradient, as a share of the reconstruction's; 0: none")
    adversarial_start: int = knob(50_001, "step at which the adversarial term starts")

    def __post_init__(self):
        for name in ("mult", "attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists come back from files
        for ok, message in [
                (self.mult and all(isinstance(m, (int, float)) and m > 0 for m in self.mult), f"mult must be positive numbers, not {self.mult}"),
                (all(c % 32 == 0 and c > 0 for c in (self.width, *self.widths)),
                 f"width times mult must be multiples of 32, not {self.widths}"),
                (all(level in range(len(self.mult)) for level in self.attention),
                 f"attention must name levels 0 to {len(self.mult) - 1}, not {self.attention}"),
                (self.z_channels > 0 and self.blocks > 0 and self.codebook >= 0, "sizes must be positive"),
                (self.batch > 0 and self.steps >= 0 and self.lr > 0, "batch and lr must be positive, steps not negative")]:
            if not ok:
                raise ValueError(f"dae config: {message}")

    @property
    def widths(self):
        return [round(self.width * m) for m in self.mult]

    @property
    def f(self):
        return 2 ** (len(self.mult) - 1)


ARCHITECTURE = ("z_channels", "width", "mult", "blocks", "attention", "mid_attention", "codebook")  # what a file's tensors tell

# Rombach et al. (2022), Table 8 and the published configs. Attention is at sides 32, 16 and 8 of a 256 x 256 image.
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
    # Ours: small enough to train on a laptop.
    "small-f4": Config(z_channels=4, width=64, mult=(1, 1, 2), blocks=1, mid_attention=False, batch=4, lr=1e-3, steps=2000,
                       adversarial_weight=0.0),
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
        q, k, v = (m(h).flatten(2).transpose(1, 2) for m in (self.q, self.k, self.v))     # (B, H*W, c)
        h = F.scaled_dot_product_attention(q, k, v)            # scale 1/sqrt(c)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))               # zeros at the right and the bottom only


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, attention after each where the config says so, then down or up."""

    def __init__(self, c_in, c_out, blocks, attention, resample=None):
        super().__init__()
        self.block = nn.ModuleList([ResBlock(c_in if j == 0 else c_out, c_out) for j in range(blocks)])
        self.attn = nn.ModuleList([AttnBlock(c_out) for _ in range(blocks if attention else 0)])
        if resample is Downsample:
            self.downsample = Downsample(c_out)
        if resample is Upsample:
            self.upsample = Upsample(c_out)

    def forward(self, x):
        for j, block in enumerate(self.block):
            x = block(x)                                       # (B, c_out, H, W)
            if len(self.attn):
                x = self.attn[j](x)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                x = getattr(self, resample)(x)                 # (B, c_out, H/2, W/2), or (B, c_out, 2H, 2W)
        return x


class Middle(nn.Module):
    def __init__(self, c, attention):
        super().__init__()
        self.block_1 = ResBlock(c, c)
        if attention:
            self.attn_1 = AttnBlock(c)
        self.block_2 = ResBlock(c, c)

    def forward(self, x):
        x = self.block_1(x)
        if hasattr(self, "attn_1"):
            x = self.attn_1(x)
        return self.block_2(x)


# ---------------------------------------------------------------- the autoencoder


class Encoder(nn.Module):
    def __init__(self, config, c_out):
        super().__init__()
        widths = [config.width, *config.widths]
        last = len(config.mult) - 1
        self.conv_in = nn.Conv2d(3, config.width, 3, padding=1)
        self.down = nn.ModuleList([
            Level(widths[i], widths[i + 1], config.blocks, i in config.attention, Downsample if i < last else None)
            for i in range(last + 1)])
        self.mid = Middle(widths[-1], config.mid_attention)
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)                                    # (B, c, H, W)
        for level in self.down:
            x = level(x)
        x = self.mid(x)                                        # (B, c, H/f, W/f)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = config.widths
        coarser = widths[1:] + widths[-1:]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.mid_attention)
        self.up = nn.ModuleList([                              # up[0] is the finest level, as in the official files
            Level(coarser[i], widths[i], config.blocks + 1, i in config.attention, Upsample if i else None)
            for i in range(len(widths))])
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, h):
        h = self.mid(self.conv_in(h))                          # (B, c, H/f, W/f)
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))         # (B, 3, H, W)


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
        self.encoder = Encoder(config, moments)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)
        if config.codebook:
            self.quantize = Codebook(config.codebook, c)

    def moments(self, x):
        """x (B, 3, H, W) in [-1, 1] -> mean and log-variance (B, C, H/f, W/f) of a KL autoencoder's posterior; for VQ the
        features before quantisation and None. Raises ValueError if f does not divide H and W."""
        f = self.config.f
        if x.shape[2] % f or x.shape[3] % f or x.shape[1] != 3:
            raise ValueError(f"images are {tuple(x.shape)}: expected (B, 3, H, W) with H and W multiples of {f}")
        h = self.quant_conv(self.encoder(x))                   # (B, 2C, H/f, W/f), or C for VQ
        if self.config.codebook:
            return h.float(), None
        mean, logvar = h.float().chunk(2, dim=1)
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


# ---------------------------------------------------------------- training objective (Section 3.1)


class Discriminator(nn.Module):
    """PatchGAN (Isola et al., 2017): x (B, 3, H, W) -> logits of overlapping patches, as in latent diffusion."""

    def __init__(self, width=64):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, stride in enumerate((2, 2, 1)):
            c, c_out = width * min(2 ** i, 8), width * min(2 ** (i + 1), 8)
            layers += [nn.Conv2d(c, c_out, 4, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(c_out, 1, 4, 1, 1))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0.0, 0.02)
            if isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight, 1.0, 0.02)

    def forward(self, x):
        return self.layers(x)


def perceptual_network():
    """LPIPS (Zhang et al., 2018) in evaluation mode if the `lpips` package and its weights can be had, else None."""
    try:
        import lpips
        return lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
    except (ImportError, OSError):                             # not installed, or its weights cannot be downloaded
        return None


def training_losses(ae, x, discriminator=None, perceptual=None):
    """One step's objectives for the autoencoder and for the discriminator (None: no adversarial term).

    loss = sum |x - rec| + perceptual + w * adversarial + kl_weight * KL, sums over pixels, batch mean. w balances the two
    gradients at the decoder's last layer, as in VQGAN (Esser et al., 2021). x (B, 3, H, W) in [-1, 1]. Returns the
    autoencoder's loss, the discriminator's hinge loss (or None) and a dict of named terms.
    """
    config = ae.config
    mean, logvar = ae.moments(x)
    rec = ae.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean))                 # (B, 3, H, W)
    error = (x - rec).abs()
    terms = {"l1": error.mean()}
    nll = error.sum((1, 2, 3)).mean()
    if perceptual is not None:
        terms["perceptual"] = perceptual(x, rec).float().mean()
        nll = nll + config.perceptual_weight * terms["perceptual"] * x[0].numel()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
    terms["kl"] = kl
    loss = nll + config.kl_weight * kl
    if discriminator is None:
        return loss, None, {k: v.detach() for k, v in terms.items()}

    adversarial = -discriminator(rec).float().mean()
    last = ae.decoder.conv_out.weight
    g_nll, = torch.autograd.grad(nll, last, retain_graph=True)
    g_adv, = torch.autograd.grad(adversarial, last, retain_graph=True)
    weight = config.adversarial_weight * (g_nll.norm() / (g_adv.norm() + 1e-4)).clamp(0, 1e4).detach()
    real, fake = discriminator(x).float(), discriminator(rec.detach()).float()            # (B, 1, h, w)
    hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    terms |= {"adversarial": adversarial, "adversarial_weight": weight, "discriminator": hinge}
    return loss + weight * adversarial, hinge, {k: v.detach() for k, v in terms.items()}


# ---------------------------------------------------------------- files: containers of tensors, read without running them
#
# torch.load(weights_only=True) refuses what Lightning saves, and with weights_only=False it runs what a file says. So both
# of torch's formats, and safetensors, are read here. All sizes that a file declares are checked against the file's own.


class LoadError(ValueError):
    """A file that cannot be used, in one line: which file, what is wrong, what to do."""


def _reason(e):
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:150]}"


class Inert:
    """Stands in for every object that a pickle would make of a class or function that we do not know. It holds nothing."""

    def append(self, *items):
        pass

    extend = append


def _shape(values):
    """A shape, a stride or an offset: at most 16 numbers that no arithmetic on them can make slow."""
    if not type(values) in (list, tuple) or len(values) > 16 or not all(type(n) is int and 0 <= n < 1 << 62 for n in values):
        raise ValueError("a shape that no tensor has")
    return tuple(values)


def _tensor(storage, offset, size, stride, *ignored):
    """What torch._utils._rebuild_tensor_v2 makes, of a flat storage; never larger than the storage."""
    if not torch.is_tensor(storage):                           # of a kind that we do not know
        return Inert()
    (offset,), size, stride = _shape([offset]), _shape(size), _shape(stride)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if math.prod(size) > len(storage) or (math.prod(size) and last >= len(storage)):
        raise ValueError("a tensor is larger than its storage")
    return storage.as_strided(size, stride, offset)


def _dict(pairs=()):                                           # Python 2 wrote OrderedDicts as lists of pairs
    return {k: v for k, v in pairs if type(k) is str} if type(pairs) is list else {}


def _first(tensor, *ignored):
    return tensor


def _with_attributes(function, kind, args, state):             # attributes of a tensor are left out
    return _tensor(*args) if function is _tensor else Inert()


_DTYPES = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64,
           "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
           "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}
_KNOWN = {
    "torch._utils._rebuild_tensor": _tensor, "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _first, "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _with_attributes, "collections.OrderedDict": _dict, "collections.defaultdict": _dict,
    "torch.Size": _shape, "torch.storage.UntypedStorage": torch.uint8,
    **{f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()},
}
_LIMIT = 1 << 22  # bytes of a pickle or a header: real ones, with thousands of names, have less than half of it


class _Unpickler(pickle._Unpickler):
    """Builds tensors and plain containers. Whatever else a file names becomes Inert; nothing of the file's is called.

    The interpreter written in Python, because its operations can be replaced: here only the functions of _KNOWN are called, with
    few arguments; objects take no state; keys are such as cannot be slow or deep to hash; and no operation allocates or does
    more than the file is long.
    """
    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file, storage):
        super().__init__(file, encoding="utf-8", errors="replace")
        self.storage = storage                                 # (dtype, key, count) -> flat tensor
        self.pairs = 0                                         # elements passed to functions so far

    def find_class(self, module, name):
        return _KNOWN.get(f"{module}.{name}", Inert)

    def persistent_load(self, pid):
        if type(pid) is not tuple or not 5 <= len(pid) <= 6 or type(pid[2]) is not str or type(pid[4]) is not int:
            raise ValueError("it refers to tensors in an unknown way")
        kind, dtype, key, _, count, *view = pid
        known = kind == "storage" and isinstance(dtype, torch.dtype) and not any(view)
        return self.storage(dtype, key, count) if known else Inert()

    def _reduce(self):
        args, function = self.stack.pop(), self.stack.pop()
        if function not in (_tensor, _dict, _first, _shape, _with_attributes):
            return self.append(Inert())
        self.pairs += sum(len(arg) for arg in args if type(arg) is list)
        if len(args) > 16 or self.pairs > 1_000_000:
            self._refuse()
        self.append(function(*args))

    def _new(self):                                            # pops class and arguments
        del self.stack[-2:]
        self.append(Inert())

    def _new_with_names(self):
        self.stack.pop()
        self._new()

    def _from_mark(self):
        self.pop_mark()
        self.append(Inert())

    def _from_mark_and_names(self):
        self.readline(), self.readline()
        self._from_mark()

    def _empty_set(self):
        self.append(Inert())

    def _add_items(self):
        self.pop_mark()

    def _build(self):
        self.stack.pop()

    def _set_items(self):
        items = self.pop_mark()
        self._store(items[::2], items[1::2])

    def _set_item(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._store([key], [value])

    def _store(self, keys, values):
        plain = lambda key: type(key) is str or type(key) is int and abs(key) < 1 << 60
        if type(self.stack[-1]) is dict:
            self.stack[-1].update((k if plain(k) else Inert(), v) for k, v in zip(keys, values))

    def _byte_array(self):
        self.read(min(_LIMIT, int.from_bytes(self.read(8), "little")))
        self.append(Inert())

    def _put(self):
        index = self.readline()[:-1]
        if not index.isdigit() or len(index) > 9:
            self._refuse()
        self.memo[int(index)] = self.stack[-1]

    def _refuse(self):
        raise ValueError("it uses an operation that files of weights do not need")

    dispatch |= {operation[0]: function for operation, function in (
        (pickle.REDUCE, _reduce), (pickle.NEWOBJ, _new), (pickle.NEWOBJ_EX, _new_with_names), (pickle.OBJ, _from_mark),
        (pickle.INST, _from_mark_and_names), (pickle.FROZENSET, _from_mark), (pickle.EMPTY_SET, _empty_set),
        (pickle.ADDITEMS, _add_items), (pickle.BUILD, _build), (pickle.SETITEMS, _set_items), (pickle.SETITEM, _set_item),
        (pickle.DICT, _from_mark), (pickle.BYTEARRAY8, _byte_array), (pickle.PUT, _put))}


def _view(mapped, dtype, offset, count):
    """`count` numbers at byte `offset` of a mapped file, as a flat tensor."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    raw = torch.frombuffer(mapped, dtype=torch.uint8, offset=offset, count=count * dtype.itemsize)
    return (raw.clone() if offset % dtype.itemsize else raw).view(dtype)


def _read_zip(archive, mapped):
    """torch.save's format since 1.6: a zip of ROOT/data.pkl and one uncompressed ROOT/data/KEY per storage."""
    members = {entry.filename: entry for entry in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("data.pkl") and name.count("/") < 2]
    if not roots:
        raise ValueError("it is a zip of other things than weights")
    root = roots[0]
    if f"{root}constants.pkl" in members:
        raise ValueError("it is a TorchScript program, not a file of weights")
    entries = members.values()
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > len(mapped):
        raise ValueError("its parts are compressed or overlap, which torch does not write")
    if members[f"{root}data.pkl"].file_size > _LIMIT:
        raise ValueError("its pickle is too long for a file of weights")
    if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine")
    flat = {}

    def storage(dtype, key, count):
        if key not in flat:
            entry = members[f"{root}data/{key}"]
            name, extra = struct.unpack("<HH", mapped[entry.header_offset + 26:entry.header_offset + 30])
            if not 0 <= count * dtype.itemsize <= entry.file_size:
                raise ValueError("a storage is shorter than its tensor")
            flat[key] = _view(mapped, dtype, entry.header_offset + 30 + name + extra, count)
        return flat[key]
    return _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")), storage).load()


_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch's older format begins with, pickled


def _read_legacy(mapped):
    """torch.save's format before 1.6: five pickles (magic, version, machine, content, keys), then the storages."""
    stream, flat = io.BytesIO(mapped[:_LIMIT]), {}

    def storage(dtype, key, count):
        if key not in flat:
            if not 0 <= count * dtype.itemsize + sum(t.nbytes for t in flat.values()) <= len(mapped):
                raise ValueError("its storages are longer than the file")
            flat[key] = torch.empty(count, dtype=dtype)
        return flat[key]
    _, _, machine, content, keys = (_Unpickler(stream, storage).load() for _ in range(5))
    if not machine["little_endian"] or not all(type(k) is str for k in keys) or set(keys) != set(flat):
        raise ValueError("its storages are not all there, or in another byte order")
    at = stream.tell()
    for key in keys:
        if int.from_bytes(mapped[at:at + 8], "little") != len(flat[key]):
            raise ValueError("a storage is not of the size that it is said to have")
        flat[key].copy_(_view(mapped, flat[key].dtype, at + 8, len(flat[key])))
        at += 8 + flat[key].nbytes
    return content


_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
                "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
                "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
                "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def _read_safetensors(mapped):
    """Header length (8 bytes), JSON {name: dtype, shape, data_offsets}, then the tensors, without gaps or overlaps."""
    length = int.from_bytes(mapped[:8], "little")
    if length > min(_LIMIT, len(mapped) - 8):
        raise ValueError(f"its header has {length} bytes, the file {len(mapped)}")
    header = json.loads(mapped[8:8 + length])
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (begin, stop), dtype, shape = entry["data_offsets"], _SAFETENSORS[entry["dtype"]], _shape(entry["shape"])
        if begin != end or math.prod(shape) * dtype.itemsize != stop - begin:
            raise ValueError(f"{name} has the bytes {begin} to {stop}, which do not fit its shape or its neighbours")
        tensors[name] = _view(mapped, dtype, 8 + length + begin, math.prod(shape)).view(shape)
        end = stop
    if 8 + length + end != len(mapped):
        raise ValueError(f"truncated: its tensors need {8 + length + end} bytes, the file has {len(mapped)}")
    return tensors


def _check(content, size):
    """No maze of containers, and no more tensors than the file has bytes for: whoever uses the content may trust both."""
    stack, seen, total = [(content, 0)], 0, 0
    while stack:
        value, depth = stack.pop()
        seen += 1
        if seen > 1_000_000 or depth > 50:
            raise ValueError("its containers are nested beyond reason")
        if torch.is_tensor(value):
            total += value.nbytes
        elif isinstance(value, (dict, list, tuple)):
            stack.extend((v, depth + 1) for v in (value.values() if isinstance(value, dict) else value))
    if total > 2 * size:                                       # tied weights are counted twice
        raise ValueError(f"its tensors take {total} bytes, the file has {size}")


def unpack(archive, folder):
    """The .ckpt inside latent diffusion's download, extracted into a folder; None if the zip holds none. Raises LoadError."""
    named = lambda path: os.path.basename(path).endswith(".ckpt") and not os.path.basename(path).startswith("._")
    entry = next((e for e in archive.infolist() if named(e.filename)), None)
    if entry is None:
        return None
    if entry.file_size > max(1 << 30, 4 * entry.compress_size):
        raise LoadError(f"{archive.filename}: its .ckpt would take {entry.file_size} bytes, and weights do not shrink so much")
    path = os.path.join(folder, "model.ckpt")
    with archive.open(entry) as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target)
    return path


def read(path, packed=True):
    """What a file of weights holds, as plain containers and CPU tensors, running nothing from inside it.

    .safetensors, what torch.save writes or ever wrote, and (if `packed`) such a file in a zip; told apart by content. Foreign
    objects become Inert ones. The tensors are views of the mapped file: copy what is to be kept. Raises LoadError.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise LoadError(f"{path}: a file of weights is expected, this is a folder or a device")
        with open(path, "rb") as file:
            head = file.read(512)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if head else b""
            if head[:4] == b"PK\x03\x04":
                archive = zipfile.ZipFile(file)
                with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                    if packed and (inner := unpack(archive, folder)):
                        try:
                            return read(inner, packed=False)
                        except LoadError as e:
                            raise LoadError(str(e).replace(inner, f"{path}: model.ckpt")) from None
                content = _read_zip(archive, mapped)
            elif _LEGACY in head[:32]:
                content = _read_legacy(mapped)
            elif head[8:9] == b"{":
                content = _read_safetensors(mapped)
            else:
                hint = ("a Git LFS pointer: the file was not downloaded" if head.startswith(b"version https://git-lfs") else
                        "a web page" if head.lstrip()[:1] == b"<" else "empty" if not head else "unknown content")
                raise LoadError(f"{path}: not a checkpoint ({hint}; expected what torch.save writes, or .safetensors)")
        _check(content, len(mapped))
        return content
    except LoadError:
        raise
    except OSError as e:
        raise LoadError(f"{path}: {e.strerror or e}") from None
    except zipfile.BadZipFile:
        raise LoadError(f"{path}: truncated or damaged (expected a whole zip, as torch.save writes)") from None
    except Exception as e:  # whatever a broken or hostile file provokes; nothing in it has run
        raise LoadError(f"{path}: a truncated, damaged or hostile file ({_reason(e)})") from None


# ---------------------------------------------------------------- the autoencoder in a file
#
# Fragments of parameter names in latent diffusion's files, which are our names, and in diffusers'. Replacing them in this
# order translates either way. Besides, diffusers counts the decoder's levels coarsest first, and its attention is linear.

_DIFFUSERS = [("mid.block_1.", "mid_block.resnets.0."), ("mid.block_2.", "mid_block.resnets.1."),
              ("mid.attn_1.", "mid_block.attentions.0."), (".down.", ".down_blocks."), (".up.", ".up_blocks."),
              (".block.", ".resnets."), (".attn.", ".attentions."), (".downsample.", ".downsamplers.0."),
              (".upsample.", ".upsamplers.0."), (".nin_shortcut.", ".conv_shortcut."), (".norm_out.", ".conv_norm_out."),
              (".norm.", ".group_norm."), (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."), (".proj_out.", ".to_out.0.")]
_OLD_DIFFUSERS = [(".q.", ".query."), (".k.", ".key."), (".v.", ".value."), (".proj_out.", ".proj_attn.")]
_FIRST = "encoder.conv_in.weight"                              # every autoencoder has it, in both namings


def _flip(name, levels):
    """decoder.up.I. <-> decoder.up.(levels - 1 - I)."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "up"]:
        parts[2] = str(levels - 1 - int(parts[2]))
    return ".".join(parts)


def from_diffusers(state):
    """A state_dict in diffusers' names, new or old, -> latent diffusion's. Raises ValueError where two names mean the same."""
    levels = 1 + max((int(k.split(".")[2]) for k in state if k.startswith("decoder.up_blocks.")), default=0)
    ours = {}
    for name, value in state.items():
        new_name = name
        for old, new in _DIFFUSERS + _OLD_DIFFUSERS:
            new_name = new_name.replace(new, old)
        new_name = _flip(new_name, levels)
        if new_name in ours:
            raise ValueError(f"{name} is there twice")
        ours[new_name] = value
    return ours


def to_diffusers(state):
    """A state_dict in latent diffusion's names -> diffusers' (AutoencoderKL, VQModel)."""
    levels = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("decoder.up."))
    theirs = {}
    for name, value in state.items():
        if name.endswith((".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")):
            value = value.flatten(1)
        name = _flip(name, levels)
        for old, new in _DIFFUSERS:
            name = name.replace(old, new)
        theirs[name] = value
    return theirs


class Found(NamedTuple):
    """An autoencoder's tensors as a file holds them."""
    state: dict                                                # latent diffusion's names, the file's own precision
    naming: str                                                # how the file names them
    dropped: dict                                              # what else it holds: first part of the name -> tensors


def _dicts(content, depth=3):
    """(Where, dict) of a dict and those inside it, itself first, then the usual places."""
    yield "", content
    for key in sorted((k for k in content if type(k) is str), key=lambda k: k not in ("dae", "state_dict")):
        if depth and isinstance(content[key], dict):
            for where, inner in _dicts(content[key], depth - 1):
                yield f"{key}.{where}".rstrip("."), inner


def find(content, source):
    """The autoencoder in what `read` returned, whatever it is wrapped in and however it is named. Raises LoadError."""
    if not isinstance(content, dict):
        raise LoadError(f"{source}: holds no autoencoder (expected a dictionary of tensors, found {type(content).__name__})")
    names = []
    for where, place in _dicts(content):
        tensors = {k: v for k, v in place.items() if type(k) is str and torch.is_tensor(v)}
        names = names or list(tensors)[:3]
        prefixes = [k.removesuffix(_FIRST) for k in tensors if k.endswith("." + _FIRST) or k == _FIRST]
        if prefixes:
            break
    else:
        raise LoadError(f"{source}: holds no autoencoder (expected {_FIRST}, found "
                        f"{', '.join(k[:60] for k in names) + ' ...' if names else 'no tensors'})")
    prefix = min(prefixes, key=lambda p: (p not in ("", "first_stage_model."), len(p)))
    state, dropped = {}, {}
    for name, value in tensors.items():
        own = name.removeprefix(prefix)
        if name.startswith(prefix) and not own.startswith(("loss.", "model_ema.")):
            state[own] = value
        else:                                                  # loss.* and the like, or the rest of a larger model
            group = (own if name.startswith(prefix) else name).split(".")[0]
            dropped[group] = dropped.get(group, 0) + 1
    naming = "latent diffusion's"
    if any(k.startswith("decoder.mid_block.") for k in state):
        old = any(k.endswith(".query.weight") for k in state)
        naming = "diffusers'" + (f" ({'old' if old else 'new'} attention names)" * any(".attentions." in k for k in state))
        try:
            state = from_diffusers(state)
        except (ValueError, IndexError) as e:
            raise LoadError(f"{source}: not an autoencoder of diffusers ({_reason(e)})") from None
    attention = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")
    state = {k: v[:, :, None, None] if k.endswith(attention) and v.ndim == 2 else v for k, v in state.items()}    # Linear -> conv
    return Found(state, naming + f" under {prefix[:-1]}" * bool(prefix) + f" in {where!r}" * bool(where), dropped)


def config_of(state):
    """The Config that a state_dict in latent diffusion's names was made with. Raises KeyError or ValueError if it is none."""
    def count(prefix):
        return len({k[len(prefix):].split(".")[0] for k in state if k.startswith(prefix)})
    width = len(state[_FIRST])
    channels = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(count("encoder.down."))]
    if len(channels) > 12 or count("encoder.down.0.block.") > 16:
        raise ValueError(f"{len(channels)} levels of {count('encoder.down.0.block.')} blocks")
    codebook = state.get("quantize.embedding.weight")
    return Config(
        z_channels=state["post_quant_conv.weight"].shape[1], width=width,
        mult=tuple(c // width if c % width == 0 else c / width for c in channels), blocks=count("encoder.down.0.block."),
        attention=tuple(i for i in range(len(channels)) if f"encoder.down.{i}.attn.0.q.weight" in state),
        mid_attention="encoder.mid.attn_1.q.weight" in state, codebook=0 if codebook is None else len(codebook))


def fill(make, state, source):
    """make(), a module in evaluation mode with its own float32 copies of the tensors of `state`.

    Nothing is allocated before every tensor is accounted for: one that is missing, left over or misshapen is a LoadError.
    """
    try:
        with torch.device("meta"):                             # shapes only
            module = make()
    except Exception as e:  # a configuration or shapes that no model has
        raise LoadError(f"{source}: not a model that we know ({_reason(e)})") from None
    if not isinstance(state, dict):
        raise LoadError(f"{source}: a dictionary of tensors is expected, not {type(state).__name__}")
    own = module.state_dict()
    fits = lambda a, b: torch.is_tensor(b) and b.is_floating_point() and a.shape == b.shape
    wrong = [k for k in own if k not in state or not fits(own[k], state[k])] + [k for k in state if k not in own]
    if wrong:
        raise LoadError(f"{source}: {len(wrong)} tensors are missing, left over or misshapen: "
                        + ", ".join(str(k)[:80] for k in wrong[:4]) + " ..." * (len(wrong) > 4))
    module.load_state_dict({k: v.to(torch.float32, copy=True) for k, v in state.items()}, assign=True)
    return module.eval()


def from_state(state, source="state_dict"):
    """An Autoencoder in evaluation mode from a state_dict in latent diffusion's names. Raises LoadError."""
    return fill(lambda: Autoencoder(config_of(state)), state, source)


def load(path):
    """An Autoencoder in evaluation mode from a file, recognised by what is in it. Raises LoadError.

    Reads latent diffusion's model.ckpt as downloaded (or still in its zip), the first stage of a full latent diffusion or
    Stable Diffusion checkpoint, Stable Diffusion's VAEs, diffusers' AutoencoderKL and VQModel, the paper's pipelines, and the
    checkpoints of train.py. The name of one of the PRESETS that latent diffusion published is fetched.
    """
    path = local(path)
    return from_state(find(read(path), path).state, path)


# ---------------------------------------------------------------- latent diffusion's downloads

ADDRESSES = {name: f"https://ommer-lab.com/files/latent-diffusion/{name}.zip" for name in PRESETS if name != "small-f4"}


def local(name):
    """The path of a file: the name itself, or for a published autoencoder its file in torch's hub cache, downloaded if it is
    not there yet. Raises LoadError."""
    if name not in ADDRESSES or os.path.isfile(name):
        return name
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, f"{name}.ckpt")
    for found in (path, os.path.join(folder, f"{name}.zip")):
        if os.path.exists(found):
            return found
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            archive = os.path.join(temporary, "download.zip")
            print(f"{name}: downloading {ADDRESSES[name]}", file=sys.stderr)
            torch.hub.download_url_to_file(ADDRESSES[name], archive)
            with zipfile.ZipFile(archive) as opened:
                inner = unpack(opened, temporary)
            if inner is None:
                raise LoadError("the zip that came holds no .ckpt")
            find(read(inner, packed=False), "what came")
            os.replace(inner, path)
    except Exception as e:  # of the network, of the disk, or of what came
        raise LoadError(f"{name} is not here and could not be downloaded ({getattr(e, 'reason', None) or e}): put "
                        f"{ADDRESSES[name]} as it is, or the model.ckpt in it as {name}.ckpt, into {folder}") from None
    return path


# ---------------------------------------------------------------- command line


def info(path):
    """What a file is, in a few lines."""
    path = local(path)
    found = find(read(path), path)
    config = from_state(found.state, path).config
    like = [name for name, preset in PRESETS.items() if all(getattr(preset, k) == getattr(config, k) for k in ARCHITECTURE)]
    attention = [f"1/{2 ** i} of the image's side" for i in config.attention] + ["the middle"] * config.mid_attention
    precision = sorted({str(t.dtype).removeprefix("torch.") for t in found.state.values()})
    print(f"file        {path}")
    print(f"kind        {'VQ' if config.codebook else 'KL'} autoencoder, {f'as {like[0]}' if like else 'of no preset'}")
    print(f"latents     f = {config.f}, {config.z_channels} channels; "
          + (f"codebook of {config.codebook} entries" if config.codebook else "no codebook"))
    print(f"layers      widths {', '.join(map(str, config.widths))}; {config.blocks} residual blocks per level; "
          f"attention: {', '.join(attention) or 'none'}")
    print(f"parameters  {sum(t.numel() for t in found.state.values()):,} in {', '.join(precision)}")
    print(f"names       {found.naming}")
    left = [f"{k[:40]}.* ({n} tensors)".encode("ascii", "backslashreplace").decode() for k, n in found.dropped.items()]
    print("left out    " + (", ".join(left[:20]) + " ..." * (len(left) > 20) or "nothing"))


def write(path, *parts):
    """Write a file whole or not at all. Raises LoadError."""
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(f"{path}.tmp", "wb") as file:
            for part in parts:
                file.write(part)
        os.replace(f"{path}.tmp", path)
    except OSError as e:
        raise LoadError(f"{path}: cannot be written ({e.strerror or e})") from None
    finally:
        if os.path.exists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")


def safetensors(state):
    """The parts of a .safetensors file that holds a state_dict."""
    names = {dtype: name for name, dtype in _SAFETENSORS.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, value in state.items():
        header[key] = dict(dtype=names[value.dtype], shape=list(value.shape), data_offsets=[end, end + value.nbytes])
        end += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)), text, *(v.contiguous().flatten().view(torch.uint8).numpy() for v in state.values())]


def diffusers_config(config):
    """The config.json with which diffusers' AutoencoderKL or VQModel takes our weights."""
    down = ["AttnDownEncoderBlock2D" if i in config.attention else "DownEncoderBlock2D" for i in range(len(config.mult))]
    kind = (dict(_class_name="VQModel", num_vq_embeddings=config.codebook) if config.codebook else
            dict(_class_name="AutoencoderKL", scaling_factor=1.0))
    return kind | dict(
        down_block_types=down, up_block_types=[name.replace("DownEncoder", "UpDecoder") for name in reversed(down)],
        block_out_channels=config.widths, layers_per_block=config.blocks, latent_channels=config.z_channels,
        mid_block_add_attention=config.mid_attention)


def convert(source, target):
    """Write an autoencoder in latent diffusion's names (.ckpt, .pt) or in diffusers' (.safetensors). The numbers stay as they
    are. A target called diffusion_pytorch_model.safetensors gets the config.json that diffusers wants beside it."""
    state = find(read(local(source)), source).state
    config = from_state(state, source).config                  # every tensor is accounted for
    if target.endswith((".ckpt", ".pt")):
        content = io.BytesIO()
        torch.save({"state_dict": {k: v.clone() for k, v in state.items()}}, content)
        write(target, content.getbuffer())
    elif target.endswith(".safetensors"):
        write(target, *safetensors(to_diffusers(state)))
        if os.path.basename(target) == "diffusion_pytorch_model.safetensors":
            beside = os.path.join(os.path.dirname(target), "config.json")
            kept = {}
            if os.path.isfile(beside):                         # whose factor is the user's
                with open(beside, "rb") as file, contextlib.suppress(ValueError, AttributeError):
                    kept = {k: v for k, v in json.load(file).items() if k == "scaling_factor"}
            write(beside, json.dumps(diffusers_config(config) | kept, indent=2).encode())
    else:
        raise LoadError(f"{target}: expected .ckpt or .pt (latent diffusion's names), or .safetensors (diffusers')")
    print(f"{target}: {len(state)} tensors")


def main(argv=None):
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise LoadError(f"{message} (see --help)")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for function, arguments in ((info, ["path"]), (convert, ["source", "target"])):
        command = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0], description=function.__doc__)
        for name in arguments:
            command.add_argument(name)
    try:
        arguments = vars(parser.parse_args(argv))
        {"info": info, "convert": convert}[arguments.pop("command")](**arguments)
    except (LoadError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
