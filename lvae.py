"""A deep hierarchical VAE with classifier-free guidance, in one file: model, objective and update.

The second stage of "High Fidelity Image Synthesis With Deep VAEs In Latent Space" (Luhman & Luhman, 2023):
groups z_1 .. z_L that model the latents of an autoencoder (dae.py), or pixels.

    log p(x) >= E_q [ log p(x|z) ] - sum_i E_q [ KL( q(z_i | z_<i, x) || p(z_i | z_<i) ) ]           (Eq. 1)
                 - distortion                          rate, one KL per latent group

A group is represented by its noise under the prior, eps_i = (z_i - mean_i) / std_i: "eps in, x out, None =
draw it" is sampling, reconstruction, interpolation and outpainting. A training on latents h (N, 4, 16, 16)
and labels (N,), 0 to 7 (for others: `adapted`), after importing copy, torch, lvae and dataclasses.replace:

    config = replace(lvae.PRESETS["toy"], shift=h.mean().item(), scale=h.std().item())
    model = lvae.LVAE(config).train()
    ema, optimizer = copy.deepcopy(model).eval(), lvae.make_optimizer(model)
    for step in range(1, config.steps + 1):
        rows = torch.randint(len(h), (config.batch,))
        x = lvae.normalise(h[rows], config)
        stats = lvae.train_step(model, ema, optimizer, [(x, labels[rows])], step)
    x = ema.generate(label=labels[:4], mean_guidance=1.5)    # sampling, one forward pass
    x = ema.generate(ema.encode(x, labels[:4]), labels[:4])  # reconstruction
    h = lvae.denormalise(x, config)                          # for the autoencoder's decoder

Shapes: B batch, C data channels, c channels of a level (one resolution), z latent channels, L latent groups.
Orders: a Config's tuples, `resolutions`, the encoder are finest first, as Table 5; all else coarsest first.
"""
import math
from collections import namedtuple
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---------------- configuration
def knob(default, help, low=0):
    """A field of a config, with an explanation, also for `train.py --help`, and a least value."""
    return field(default=default, metadata={"help": help, "low": low})

PER_LEVEL = ("mult", "ffn", "groups", "encoder_layers", "attention_layers", "heads")

@dataclass(frozen=True)
class Config:
    """A model and its training: one column of Table 5. The defaults are LSUN Church's."""
    resolution: int = knob(32, "side of the data, --image-size over f: 4, 8, 16, ..", 4)
    data_channels: int = knob(4, "channels of the data", 1)
    num_classes: int = knob(0, "number of labels, 0: unconditional")
    first_stage: str = knob("kl-f8", "autoencoder: of dae.PRESETS, train, file, none (pixels), latents")
    shift: float = knob(0.0, "data are normalised to (h - shift) / scale", -math.inf)
    scale: float = knob(1.0, "divisor of (h - shift); 0: train.py measures both")
    width: int = knob(192, "channels of the top-down path, times mult", 1)
    encoder_width: int = knob(192, "channels of the bottom-up path, times mult", 1)
    mult: tuple = knob((1, 1, 1, 1, 1), "channel multiplier per level", 1)
    ffn: tuple = knob((4, 4, 4, 4, 4), "expansion of the 1x1 convs per level; 0: none")
    groups: tuple = knob((8, 8, 8, 8, 8), "latent groups per level", 1)
    encoder_layers: tuple = knob((4, 4, 4, 4, 4), "encoder blocks per level", 1)
    attention_layers: tuple = knob((4, 4, 4, 0, 0), "attention layers per level, at most, in each path")
    heads: tuple = knob((4, 8, 8, 0, 0), "heads per level, divisors of its widths")
    z_dim: int = knob(16, "channels of a latent group", 1)
    hierarchical_prior: bool = knob(False, "learn p(z_i | z_<i), not N(0, 1); guidance acts on it")
    attention: str = knob("sdpa", "sdpa, or released: the authors' bug, for their weights")
    upsample: int = knob(0, "factor of an upsampler given a smaller image, 2, 4, ..; 0: none")
    sigma_q: float = knob(0.07, "std of the noise around the target (App. B)", 1e-6)
    spectral_weight: float = knob(0.1, "weight of the spectral term")
    kl_schedule: tuple = knob(("shifted_exp", 1000, 10), "shifted_exp,scale,shift; constant_per,A,B,..; none")
    label_dropout: float = knob(0.1, "share trained without the label, for guidance")
    batch: int = knob(128, "samples per forward pass, over all processes", 1)
    accumulate: int = knob(1, "batches per step", 1)
    lr: float = knob(2e-4, "learning rate of Adam", 1e-12)
    warmup: int = knob(100, "steps of linear warm-up")
    lr_decay: float = knob(0.0, "last share of the steps, in which the rate falls to 0")
    ema: float = knob(0.9999, "decay of the weights' average per step, reached gradually")
    skip_threshold: float = knob(300.0, "skip larger gradient norms per data dimension, after step 1000")
    steps: int = knob(250_000, "training steps")
    recompute: bool = knob(False, "activation checkpointing: far less memory, up to a quarter more time")

    def __post_init__(self):
        def need(name, fits):
            if not fits:
                value, sides = getattr(self, name), resolutions(self)
                raise ValueError(f"config: {name} {value} ({known[name]['help']}; levels {sides})")
        known = {f.name: f.metadata for f in fields(self)}
        for name, value in vars(self).items():
            values = value if isinstance(value, tuple) else [value]
            need(name, all(isinstance(v, str) or known[name]["low"] <= v < math.inf for v in values))
        powers = [4 << k for k in range(16)]
        need("resolution", self.resolution in powers)
        need("upsample", self.resolution / (self.upsample or 1) in powers)
        need("attention", self.attention in ("sdpa", "released"))
        levels, (kind, *weights) = len(resolutions(self)), self.kl_schedule or [""]
        for name in PER_LEVEL:
            need(name, list(map(type, getattr(self, name))) == [int] * levels)
        for m, a, h in zip(self.mult, self.attention_layers, self.heads):
            need("heads", not a or h and self.width * m % h == self.encoder_width * m % h == 0)
        need("kl_schedule", len(weights) == {"none": 0, "shifted_exp": 2, "constant_per": levels}.get(kind)
             and 0 not in weights[:1] and str not in map(type, weights))

def resolutions(config):
    """Side of each level, finest first: halved to 4, then 1 (an upsampler's stop at its input's size)."""
    side, factor = config.resolution, config.upsample
    sides = [side >> k for k in range((factor or side // 4).bit_length())]
    return sides if factor else sides + [1]

def guidance_levels(config, weight):
    """The paper's mean guidance, coarsest first: `weight`, but 0 at 1x1, where it saturates colours."""
    return [0.0 if side == 1 else weight for side in reversed(resolutions(config))]

# Table 5; bedroom-f4's multipliers, printed as ones, are those that give 96.2M. The toys are ours.
_PIXELS = dict(data_channels=3, first_stage="none", shift=127.5, scale=127.5)
_BIG_PIXELS = dict(_PIXELS, resolution=256, width=64, encoder_width=64, sigma_q=0.05, spectral_weight=0.25,
                   batch=32, accumulate=4, lr=1e-4)
_TOY = dict(resolution=16, num_classes=8, width=48, encoder_width=48, mult=(1, 2, 2, 2), ffn=(0, 2, 2, 2),
            groups=(2, 3, 3, 2), encoder_layers=(2, 2, 2, 1), attention_layers=(0, 1, 1, 0),
            heads=(0, 4, 4, 0), hierarchical_prior=True, kl_schedule=("shifted_exp", 100, 10), lr=1.2e-3,
            lr_decay=0.5, batch=16, ema=0.995, steps=3200)
_TOY_PIXELS = dict(_PIXELS, resolution=64, width=32, encoder_width=32, sigma_q=0.1, spectral_weight=0.25,
                   lr=1e-3, lr_decay=0.5, batch=16, ema=0.995)
PRESETS = {
    "toy": Config(first_stage="train", scale=0.0, sigma_q=0.2, **_TOY),
    "toy-rgb16": Config(sigma_q=0.1, **_PIXELS, **_TOY),
    "toy-upsampler": Config(
        upsample=4, mult=(1, 1, 2), ffn=(0, 0, 2), groups=(2, 3, 3), encoder_layers=(1, 2, 2), steps=800,
        attention_layers=(0, 0, 1), heads=(0, 0, 4), kl_schedule=("constant_per", 4, 2, 1), **_TOY_PIXELS),
    "toy-pixel": Config(
        num_classes=8, mult=(1, 2, 3, 4, 4, 4), ffn=(0, 0, 2, 2, 2, 2), groups=(2, 3, 4, 4, 4, 2),
        encoder_layers=(1, 2, 2, 2, 2, 1), attention_layers=(0, 0, 1, 1, 0, 0), heads=(0, 0, 4, 4, 0, 0),
        hierarchical_prior=True, kl_schedule=("constant_per", 32, 16, 8, 4, 2, 1), steps=1200, **_TOY_PIXELS),
    "church": Config(shift=0.25, scale=4.1),
    "church-rgb32": Config(sigma_q=0.035, **_PIXELS),
    "church-upsampler": Config(
        upsample=8, mult=(2, 2, 3, 3), ffn=(0, 0, 4, 4), groups=(3, 6, 8, 8), encoder_layers=(2, 3, 4, 4),
        attention_layers=(0, 0, 0, 4), heads=(0, 0, 0, 4), kl_schedule=("constant_per", 8, 4, 2, 1),
        ema=0.9998, skip_threshold=10_000.0, **_BIG_PIXELS),
    "church-pixel": Config(
        mult=(2, 2, 3, 3, 3, 3, 3, 3), ffn=(0, 0, 0, 4, 4, 4, 4, 4), groups=(2, 5, 8, 8, 8, 8, 8, 8),
        encoder_layers=(2, 3, 4, 4, 4, 4, 4, 4), attention_layers=(0, 0, 0, 4, 4, 4, 0, 0), **_BIG_PIXELS,
        heads=(0, 0, 0, 4, 8, 8, 0, 0), kl_schedule=("constant_per", 256, 128, 64, 32, 16, 8, 4, 1)),
    "bedroom-f4": Config(
        resolution=64, data_channels=3, first_stage="vq-f4", shift=0.075, scale=0.84, sigma_q=0.1, width=64,
        encoder_width=64, mult=(2, 2, 2, 3, 3, 3), ffn=(0, 4, 4, 4, 4, 4), groups=(8, 12, 10, 8, 6, 6),
        encoder_layers=(4, 6, 5, 4, 3, 3), attention_layers=(0, 4, 4, 4, 0, 0), heads=(0, 4, 8, 8, 0, 0),
        kl_schedule=("shifted_exp", 2000, 10), batch=32, accumulate=4),
    "bedroom-f8": Config(shift=0.25, scale=4.1, groups=(8, 8, 7, 6, 6), encoder_layers=(4, 4, 4, 3, 3)),
    "bedroom-f16": Config(
        resolution=16, data_channels=16, first_stage="kl-f16", scale=3.5, mult=(1, 1, 1, 1), ffn=(4, 4, 4, 4),
        groups=(10, 9, 8, 6), encoder_layers=(5, 5, 4, 3), attention_layers=(4, 4, 0, 0), heads=(8, 8, 0, 0),
        kl_schedule=("shifted_exp", 600, 10)),
    "imagenet": Config(
        num_classes=1000, shift=0.25, scale=4.4, width=256, encoder_width=384, ffn=(4, 6, 8, 10, 12),
        groups=(10, 12, 10, 8, 8), encoder_layers=(4, 5, 4, 3, 3), heads=(4, 8, 8, 8, 8),
        hierarchical_prior=True, accumulate=8, lr=3e-4, ema=0.9998, steps=475_000),
}

def adapted(config, channels, resolution, num_classes):
    """A preset for other data: its finest level is repeated, or left out."""
    levels = resolution.bit_length() - 1
    lists = {name: getattr(config, name) for name in PER_LEVEL}
    lists = {k: (v[:1] * levels + v)[-levels:] for k, v in lists.items()}
    return replace(config, resolution=resolution, data_channels=channels, num_classes=num_classes, **lists)

def normalise(h, config):
    """Raw latents or 0..255 pixels h -> data of about unit variance, within +-4 (Section 3.1)."""
    return ((h - config.shift) / config.scale).clamp(-4, 4)

def denormalise(x, config):
    """The inverse of `normalise`."""
    return x * config.scale + config.shift

# ---------------- Gaussians (always fp32)
def autocast(device, dtype):
    """Convs and linear layers in bf16 if that is `dtype`; Gaussians and losses stay fp32."""
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"  # meta has none
    return torch.autocast(kind, torch.bfloat16, enabled=dtype == torch.bfloat16)

Gaussian = namedtuple("Gaussian", "mean var")                 # (B, z, H, W) each

def gaussian(params):
    """Mean and raw variance (B, 2z, H, W) -> Gaussian. Raw 0 is variance 1; logs stay finite."""
    mean, raw = params.float().chunk(2, dim=1)
    return Gaussian(mean, F.softplus(raw, beta=0.693).clamp_min(1e-30))

def gaussian_kl(q, p):
    """KL(q || p) of diagonal Gaussians, elementwise, in nats."""
    ratio = q.var / p.var
    return 0.5 * (ratio - 1 - ratio.log() + (q.mean - p.mean).square() / p.var)

def whiten(z, prior):
    """The noise under the prior that gives z (Section 5.2)."""
    return (z - prior.mean) / prior.var.sqrt()

def guide(c, u, mean_weight, variance_weight):
    """The guided prior (Eq. 2): from the unconditional Gaussian u through the conditional c, and on."""
    mean = c.mean + mean_weight * (c.mean - u.mean)
    var = c.var * (c.var / u.var) ** variance_weight
    return Gaussian(mean, var)

# ---------------- layers
def conv(c_in, c_out, kernel=1, scale=1.0, bias=True):
    """A conv that keeps its input's size."""
    return scaled_(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=bias), scale)

def scaled_(layer, scale=1.0):
    """Xavier-uniform times a scale, which keeps a deep stack near the identity; zero bias."""
    nn.init.xavier_uniform_(layer.weight, gain=scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer

class SpectralConv2d(nn.Conv2d):
    """A conv that knows its kernel's largest singular value (Yoshida & Miyato, 2017)."""
    def __init__(self, c_in, c_out, kernel, scale, penalty):
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)
        scaled_(self, scale).penalty = penalty
        self.register_buffer("u", F.normalize(torch.randn(c_out), dim=0))

    def sigma(self):
        """That value, by a power iteration that goes on in training; u and v get no gradient."""
        with autocast(self.weight.device, torch.float32):
            w = self.weight.flatten(1).float()                # (c_out, c_in*k*k)
            with torch.no_grad():
                v = F.normalize(w.T @ self.u.float(), dim=0)
                u = F.normalize(w @ v, dim=0)
                if self.training:
                    self.u.copy_(u)
            return u @ (w @ v)

class Block(nn.Module):
    """The inverted bottleneck (App. B): two k x k convs, then two 1x1 convs that widen by `ffn` (none if 0).
    It adds its input if channels agree and there is no `penalty` (its last conv's spectral weight)."""
    def __init__(self, c, c_out, kernel, ffn, label_dim, scale, penalty=None):
        super().__init__()
        last = conv if penalty is None else partial(SpectralConv2d, penalty=penalty)
        self.ffn, self.residual = ffn, c == c_out and penalty is None
        self.classproj = scaled_(nn.Linear(label_dim, c)) if label_dim else None
        self.conv1 = conv(c, c, kernel)
        self.conv2 = conv(c, c, kernel) if ffn else last(c, c_out, kernel, scale)
        if ffn:
            self.dense1 = conv(c, c * ffn)
            self.dense2 = last(c * ffn, c_out, 1, scale)

    def forward(self, x, label):
        h = x                                                 # (B, c, H, W)
        if self.classproj is not None:
            h = h + self.classproj(label)[:, :, None, None]   # label (B, label_dim)
        h = self.conv1(F.silu(h))
        h = self.conv2(F.silu(h))                             # (B, c, H, W), or c_out without ffn
        if self.ffn:
            h = self.dense2(F.silu(self.dense1(F.silu(h))))   # (B, c*ffn, H, W), then (B, c_out, H, W)
        return x + h if self.residual else h

class Attention(nn.Module):
    """Multi-head self-attention over all positions, residual, at first the identity. In mode "released" the
    queries are projected, not the result, as in the authors' code."""
    def __init__(self, c, heads, mode):
        super().__init__()
        self.heads, self.mode = heads, mode
        self.qkv = scaled_(nn.Linear(c, 3 * c))
        self.out = scaled_(nn.Linear(c, c), 0.0)

    def forward(self, x):
        mixed, k, v = self.qkv(x.flatten(2).mT).chunk(3, 2)   # (B, H*W, c) each; the first are the queries
        if self.mode != "released":
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (mixed, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v)   # (B, heads, H*W, c/heads)
            mixed = mixed.transpose(1, 2).flatten(2)          # (B, H*W, c)
        return x + self.out(mixed).mT.unflatten(2, x.shape[2:])

class Resample(nn.Module):
    """Average pooling, or nearest-neighbour up to a size, and a 1x1 conv if channels change."""
    def __init__(self, c_in, c_out, pool=None):
        super().__init__()
        self.pool = pool
        self.conv = conv(c_in, c_out) if c_in != c_out else nn.Identity()

    def forward(self, x, size=None):
        return self.conv(F.avg_pool2d(x, self.pool) if self.pool else F.interpolate(x, size, mode="nearest"))

def shrink(x, config):
    """An upsampler's input in training: x (B, C, H, W) -> (B, C, H/f, W/f). None for other models."""
    if config.upsample:
        return F.interpolate(x, scale_factor=1 / config.upsample, mode="bilinear", antialias=True)

def level(make, count, first, c, i, config):
    """Level i: `count` blocks, numbered from `first`, and attention after those in `positions`, as released.
    Positions that round alike are one: 4 layers for church's 4 encoder blocks make 3."""
    layers, attentions = nn.ModuleList(), config.attention_layers[i]
    positions = {round(count / (attentions + 1) * k) for k in range(1, attentions + 1)}
    for j in range(first, first + count):
        layers.append(make())
        if j in positions:
            layers.append(Attention(c, config.heads[i], config.attention))
    return layers

def run_block(config, block, *inputs):
    """block(*inputs); in training with config.recompute nothing inside is kept."""
    keep = not (config.recompute and block.training)
    return block(*inputs) if keep else checkpoint(block, *inputs, use_reentrant=False)

# ---------------- the two paths
class Encoder(nn.Module):
    """Bottom-up: data (B, C, H, W) -> the features of every level, finest first."""
    def __init__(self, config, label_dim):
        super().__init__()
        self.config = config
        sides, widths = resolutions(config), [config.encoder_width * m for m in config.mult]
        scale = 1 / math.sqrt(sum(config.encoder_layers))
        self.in_proj = conv(config.data_channels, widths[0], 3)
        self.levels = nn.ModuleList()
        for i, (side, c) in enumerate(zip(sides, widths)):
            make = partial(Block, c, c, 3 if side > 1 else 1, config.ffn[i], label_dim, scale)
            layers = level(make, config.encoder_layers[i], 0, c, i, config)
            if i + 1 < len(sides):
                layers.append(Resample(c, widths[i + 1], side // sides[i + 1]))
            self.levels.append(layers)

    def forward(self, x, label):
        x, features = self.in_proj(x), []                     # (B, c, H, W); of each level, not yet pooled
        for layers in self.levels:
            for layer in layers:
                if isinstance(layer, Resample):
                    features.append(x)
                x = run_block(self.config, layer, x, label) if isinstance(layer, Block) else layer(x)
        return features + [x]

# A group's prior and posterior (None when generating), Gaussians, and value (B, z, H, W).
Latent = namedtuple("Latent", "prior posterior z")

class TopDownBlock(nn.Module):
    """One latent group: draw z from the posterior (training) or the prior (generation), add it to the hidden
    state. Under guidance the batch holds two streams, with and without the label: [c; u]. Each has its
    prior, the two are combined (Eq. 2), and one z enters both (App. C)."""
    def __init__(self, side, c, c_encoder, ffn, label_dim, scale, config):
        super().__init__()
        self.z_dim, self.hierarchical = config.z_dim, config.hierarchical_prior
        prior_out = c + 2 * config.z_dim if self.hierarchical else c
        kernel = 3 if side > 1 else 1
        penalty = side if self.hierarchical else 0  # nothing to penalise in a standard normal
        self.prior_block = Block(c, prior_out, kernel, ffn, label_dim, 1e-10, penalty)
        self.actsproj = conv(c + c_encoder, c)
        self.posterior_block = Block(c, 2 * config.z_dim, kernel, ffn, label_dim, 1.0, side)
        self.zproj = conv(config.z_dim, c, scale=scale, bias=False)
        self.shared_block = Block(c, c, kernel, ffn, label_dim, scale)

    def forward(self, x, label, eps=None, evidence=None, guidance=None, temperature=1.0):
        """x (B, c, H, W), or (2B, ...) under guidance -> x, Latent. eps (B, z, H, W), None to draw it, or a
        function of the prior; evidence: the features and label that the posterior sees."""
        h = self.prior_block(x, label)                        # (B, c [+ 2z], H, W)
        if self.hierarchical:
            prior, h = gaussian(h[:, :2 * self.z_dim]), h[:, 2 * self.z_dim:]
        else:
            zeros = x.new_zeros(len(x), self.z_dim, *x.shape[2:], dtype=torch.float32)
            prior = Gaussian(zeros, zeros + 1)
        if guidance:
            c, u = (Gaussian(*stream) for stream in zip(prior.mean.chunk(2), prior.var.chunk(2)))
            prior = guide(c, u, *guidance)                    # (B, z, H, W)
        source, posterior = prior, None
        if evidence:
            features, true_label = evidence
            acts = self.actsproj(torch.cat([x.to(features.dtype), features], dim=1))  # (B, c, H, W)
            source = posterior = gaussian(self.posterior_block(acts, true_label))
        if eps is None:
            eps = torch.randn_like(source.mean)
        elif callable(eps):
            eps = eps(source)
        z = source.mean + temperature * source.var.sqrt() * eps  # (B, z, H, W)
        zs = torch.cat([z, z]) if guidance else z
        x = h + self.zproj(zs) + x  # h first: the sum keeps channels-last
        return self.shared_block(x, label), Latent(prior, posterior, z)

# ---------------- the model
# p(x|z): mean, logvar (B, C, H, W); KL per group (L, B), nats; spectral, unweighted; L Latents.
Output = namedtuple("Output", "mean logvar kl spectral latents")

class LVAE(nn.Module):
    """The hierarchical VAE of a Config. Data are normalised, (B, C, resolution, resolution)."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        sides, widths = resolutions(config), [config.width * m for m in config.mult]
        self.sides = sides[::-1]  # as self.levels
        label_dim = widths[-1] if config.num_classes else 0
        scale = 1 / math.sqrt(sum(config.groups))
        self.embedding = nn.Embedding(config.num_classes + 1, label_dim) if label_dim else None  # + "none"
        self.encoder = Encoder(config, label_dim)
        if config.upsample:
            self.low_res_proj = conv(config.data_channels, widths[-1])
        else:
            self.initial = nn.Parameter(torch.zeros(1, widths[-1], 1, 1))
        self.levels = nn.ModuleList()  # coarsest first
        for i in reversed(range(len(sides))):
            c, c_encoder = widths[i], config.encoder_width * config.mult[i]
            make = partial(TopDownBlock, sides[i], c, c_encoder, config.ffn[i], label_dim, scale, config)
            layers = level(make, config.groups[i], 1, c, i, config)
            if i:
                layers.append(Resample(c, widths[i - 1]))
            self.levels.append(layers)
        self.out_proj = conv(widths[0], 2 * config.data_channels)

    def forward(self, x, label=None, noise=None, low_res=None, drop_label=None):
        """One pass with posterior samples of every group -> Output: p(x|z) and the terms of the objective.
        x (B, C, H, W); label (B,) int64, None: "no label"; noise: L posterior eps, None draws them; low_res
        (B, C, H/f, W/f): an upsampler's input, by default x shrunk; drop_label (B,) bool: whose label the
        prior and shared blocks do not see, by default in training a share `label_dropout`."""
        config, n = self.config, len(x)
        if drop_label is None and self.training:
            drop_label = torch.rand(n, device=x.device) < config.label_dropout
        low_res = shrink(x, config) if low_res is None else low_res
        true_label = self._embed(label, n)
        evidence = [(features, true_label) for features in reversed(self.encoder(x, true_label))]
        label = self._embed(label, n, drop_label)
        mean, logvar, latents = self._top_down(n, label, noise, low_res, evidence)
        kl = torch.stack([gaussian_kl(l.posterior, l.prior).sum((1, 2, 3)) for l in latents])  # (L, B)
        convs = [m for m in self.levels.modules() if isinstance(m, SpectralConv2d) and m.penalty]
        spectral = sum(m.penalty * m.sigma() for m in convs)
        return Output(mean, logvar, kl, spectral, latents)

    @torch.no_grad()
    def encode(self, x, label=None, noise=None, low_res=None):
        """Posterior samples of x, whitened under the prior: L eps (B, z, h, w), of which `generate` makes x
        again, given the same label. noise: the posterior's; None draws it, zeros give its means."""
        out = self.forward(x, label, noise, low_res, x.new_zeros(len(x), dtype=torch.bool))
        return [whiten(l.z, l.prior) for l in out.latents]

    @torch.no_grad()
    def generate(self, noise=None, label=None, n=None, mean_guidance=0.0, variance_guidance=0.0,
                 temperature=1.0, low_res=None, size=None):
        """Samples: the mean of p(x|z), z from the prior. (n, C, H, W), normalised data.
        noise: L whitened eps (B, z, h, w); None, or None for some groups, draws them. An entry may be a
            function of its group's prior: `lambda prior: whiten(z, prior)` imposes z (temperature 1).
        label: an int, (n,) ints, or None; or (n, label_dim) floats, mixtures of rows of `embedding`.
        mean_guidance, variance_guidance: w_mu, w_sigma of Eq. 2, a number, or one per level.
        n: how many, if nothing else says so. temperature: multiplies every prior's std. low_res (n, C, H/f,
            W/f): an upsampler's input. size (H, W): of the data, if not as in training."""
        label = None if label is None else torch.as_tensor(label)
        given = [t for t in (*(noise or ()), label, low_res) if torch.is_tensor(t) and t.ndim]
        n = n or (len(given[0]) if given else 1)
        levels, asked = len(self.levels), (mean_guidance, variance_guidance)
        weights = [w if isinstance(w, (list, tuple)) else [w] * levels for w in asked]
        guidance = list(zip(*weights)) if any(map(any, weights)) else None  # a pair per level
        possible = self.config.num_classes and self.config.hierarchical_prior and label is not None
        if guidance and not (possible and all(len(w) == levels for w in weights)):
            raise ValueError("guidance needs classes, a hierarchical prior, a label; weights: 1 or per level")
        label = self._embed(label, n)
        if guidance:
            label = torch.cat([label, self.embedding.weight[-1:].expand(n, -1)])
        return self._top_down(n, label, noise, low_res, None, guidance, temperature, size)[0]

    def latent_shapes(self, size=None):
        """(z, h, w) of every group for data of size (H, W)."""
        r, z = self.config.resolution, self.config.z_dim
        H, W = size or (r, r)
        shapes = [(z, 1, 1) if side == 1 else (z, side * H // r, side * W // r) for side in self.sides]
        return [s for s, count in zip(shapes, self.config.groups[::-1]) for _ in range(count)]

    def _top_down(self, n, label, noise, low_res, evidence=None, guidance=None, temperature=1.0, size=None):
        """The one top-down path: posterior if there is evidence, per level (features, label), else prior."""
        config, shapes = self.config, [(n, *shape) for shape in self.latent_shapes(size)]
        noise = noise or [None] * len(shapes)
        fits = [eps.shape == s for eps, s in zip(noise, shapes) if torch.is_tensor(eps)]
        if len(noise) != len(shapes) or not all(fits):
            raise ValueError(f"noise: expected one per group, {shapes}")
        expected = n, config.data_channels, *shapes[0][2:]    # (B, C, H/f, W/f)
        if config.upsample and getattr(low_res, "shape", None) != expected:
            raise ValueError(f"low_res: expected {expected}")
        x = self.low_res_proj(low_res) if config.upsample else self.initial.expand(n, -1, -1, -1)
        if guidance:
            x = torch.cat([x, x])  # with and without the label
        latents, nothing = [], [None] * len(self.levels)
        for layers, seen, weights in zip(self.levels, evidence or nothing, guidance or nothing):
            for layer in layers:
                if isinstance(layer, TopDownBlock):
                    eps = noise[len(latents)]
                    x, latent = run_block(config, layer, x, label, eps, seen, weights, temperature)
                    latents.append(latent)
                elif isinstance(layer, Resample):
                    x = layer(x, shapes[len(latents)][2:])    # the size of the next group
                else:
                    x = layer(x)                              # (B, c, h, w)
        mean, logvar = self.out_proj(x)[:n].float().chunk(2, dim=1)  # (B, C, H, W)
        return mean, logvar, latents

    def _embed(self, label, n, drop=None):
        """Labels -> embeddings (n, label_dim), or None. drop (n,) bool: for whom it is "no label"."""
        classes, device = self.config.num_classes, self.out_proj.weight.device
        if label is None and not classes:
            return None
        label = torch.as_tensor(classes if label is None else label)
        if label.is_floating_point():
            return label.to(device)
        if label.device.type == "cpu" and not ((label >= 0) & (label <= classes) & (classes > 0)).all():
            raise ValueError(f"label {label.tolist()} is out of range: {classes} classes")
        label = label.to(device, torch.long).expand(n)
        return self.embedding(label if drop is None else torch.where(drop, classes, label))

# ---------------- objective
def kl_shares(config):
    """Target share of the total rate of every group (L,), percent. They sum to 66.7: the band of weight 1
    runs from 1x to 2x a share, so its middles sum to 100."""
    kind, *values = config.kl_schedule
    if kind == "shifted_exp":
        steps = torch.linspace(0, math.log(values[0]), sum(config.groups), dtype=torch.float64)
        shares = steps.exp() + values[1]
    else:  # constant_per, finest level first, or none
        values = torch.tensor(values or [1] * len(config.groups), dtype=torch.float64)
        shares = values.repeat_interleave(torch.tensor(config.groups)).flip(0)
    return (66.7 * shares / shares.sum()).float()

@torch.no_grad()
def kl_weights(kl, shares):
    """KL scheduling (Luhman & Luhman, 2022): each group's weight (L, B), from its share of each sample's KL.
    kl (L, B) nats; shares (L,) percent. With a = share x total: below a the weight falls to 0.1, so that the
    group may use more; between a and 2a it is 1; it rises to 2 at 3a. No gradient passes."""
    share = kl / (shares.to(kl.device)[:, None] / 100 * kl.sum(0)).clamp_min(1e-20)  # in units of a
    return torch.where(share < 1, share.clamp_min(0.1), 1 + (share - 2).clamp(0, 1))

# Means over a batch, nats per sample; `loss` is minimised. rate: the sum of kl (L,); spectral: weighted.
Loss = namedtuple("Loss", "loss distortion rate weighted_rate spectral kl")

def distortions(out, x, config):
    """KL( N(x, sigma_q^2) || p(x|z) ) of every sample (App. B), (B,) nats. Variances below sigma_q^2 cost."""
    var_q, error = config.sigma_q ** 2, x.float() - out.mean  # (B, C, H, W)
    kl = 0.5 * ((var_q + error.square()) * torch.exp(-out.logvar) - 1 + out.logvar - math.log(var_q))
    return kl.sum((1, 2, 3))

def objective(out, x, config):
    """loss = distortion + weighted rate + spectral term (Section 3, App. B): Output, x (B, C, H, W) -> Loss.
    Distortion + rate: the negative ELBO up to a constant."""
    distortion = distortions(out, x, config).mean()
    weights = kl_weights(out.kl, kl_shares(config)) if config.kl_schedule != ("none",) else 1.0  # (L, B)
    weighted_rate = (weights * out.kl).sum(0).mean()
    spectral = config.spectral_weight * out.spectral
    loss = distortion + weighted_rate + spectral
    return Loss(loss, distortion, out.kl.sum(0).mean(), weighted_rate, spectral, out.kl.mean(1))

def bits_per_dim(nats, config):
    """Nats per sample -> bits per data dimension."""
    return nats / (math.log(2) * config.data_channels * config.resolution ** 2)

# ---------------- the update
def place(module, device, dtype=torch.float32):
    """Move a module to a device, channels-last. dtype: of convs and linear layers; bf16 to infer only."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.to(dtype)
    return module.to(device) if device.type == "xla" else module.to(device, memory_format=torch.channels_last)

def make_optimizer(model):
    """Adam as in App. B. Its rate is a tensor: on XLA each new number is a new program."""
    rate = torch.full((1,), model.config.lr, device=next(model.parameters()).device)
    kind = {"capturable": True} if rate.device.type == "xla" else {"fused": True}
    return torch.optim.Adam(model.parameters(), rate, betas=(0.9, 0.9), **kind)

def train_step(model, ema, optimizer, batches, step, dtype=torch.float32, average=None):
    """One update, step = 1, 2, ..: Adam, then `ema`; no change if the gradient is out of bounds. batches:
    config.accumulate tuples of `forward`'s arguments; dtype: the convs'; average(tensors) puts their mean
    over all processes into them. Returns Loss's fields, grad_norm, skipped, lr."""
    config, device = model.config, batches[0][0].device
    optimizer.zero_grad()
    parts = []
    for batch in batches:
        with autocast(device, dtype):
            out = model(*batch)
        losses = objective(out, batch[0], config)
        (losses.loss / len(batches)).backward()
        parts.append([v.detach() for v in losses])
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if average:
        average(gradients)
    norm = float(torch.nn.utils.get_total_norm(gradients))  # the only look from the host
    limit = config.skip_threshold * config.data_channels * config.resolution ** 2 if step > 1000 else math.inf
    good = math.isfinite(norm) and norm <= limit
    left, fall = max(0, config.steps - step + 1), config.lr_decay * config.steps
    rate = config.lr * min(1, step / max(config.warmup, 1), left / fall if fall else 1)
    if good:
        optimizer.param_groups[0]["lr"].copy_(torch.tensor([rate]))
        optimizer.step()
        decay = min(config.ema, (1 + step) / (10 + step))  # warmed up: early weights are chance
        weight = torch.tensor([1 - decay]).to(device)
        with torch.no_grad():
            for old, new in zip(ema.parameters(), model.parameters()):
                old.lerp_(new, weight)
    source, target = (model, ema) if good else (ema, model)  # ema holds the buffers of the last good step
    for old, new in zip(target.buffers(), source.buffers()):
        old.copy_(new)
    stats = Loss(*(torch.stack(v).mean(0) for v in zip(*parts)))
    return stats._asdict() | {"grad_norm": norm, "skipped": not good, "lr": rate}

# ---------------- the authors' weights
_RELEASED = [("encoder.encoder_levels", "encoder.levels"), (".layer_list.", "."), ("layer_list.", "levels."),
             ("dense2.conv.", "dense2."), ("conv2.conv.", "conv2."), ("qkvproj", "qkv"), ("qproj", "qkv"),
             ("conv_layer", "conv"), ("initial_x", "initial"), ("embed.", "embedding."),
             (".outproj.", ".out."), ("outproj", "out_proj")]

def from_released(state_dict):
    """The authors' weights, which lack u -> a state_dict for attention="released"."""
    state = {}
    for name, value in state_dict.items():
        ours = name
        for old, new in _RELEASED:
            ours = ours.replace(old, new)
        state[ours] = value
        if name.endswith((".dense2.conv.weight", ".conv2.conv.weight")):
            state[ours.removesuffix("weight") + "u"] = F.normalize(torch.ones(len(value)), dim=0)
    return state
