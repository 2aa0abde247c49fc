"""A deep hierarchical VAE with classifier-free guidance, in one file: model, objective and update.

The second stage of "High Fidelity Image Synthesis With Deep VAEs In Latent Space" (Luhman & Luhman, 2023):
dozens of latent groups z_1 .. z_L that model the latents of an image autoencoder (dae.py), or pixels.

    log p(x) >= E_q [ log p(x|z) ] - sum_i E_q [ KL( q(z_i | z_<i, x) || p(z_i | z_<i) ) ]           (Eq. 1)
                 - distortion                          rate, one KL per latent group

A group is represented by its noise under the prior, eps_i = (z_i - mean_i) / std_i: "eps in, x out, None =
draw it" is sampling, reconstruction, interpolation and outpainting. A training on latents h, labels (N,):

    config = replace(lvae.PRESETS["toy"], shift=h.mean().item(), scale=h.std().item())
    model = lvae.LVAE(config).train()
    ema, optimizer = copy.deepcopy(model).eval(), lvae.make_optimizer(model)
    for step in range(1, config.steps + 1):
        rows = torch.randint(len(h), (config.batch,))
        x = lvae.normalise(h[rows], config)
        stats = lvae.train_step(model, ema, optimizer, [(x, labels[rows])], step)
    x = ema.generate(label=labels[:4], mean_guidance=1.5)       # sampling, one forward pass
    x = ema.generate(ema.encode(x, labels[:4]), labels[:4])     # reconstruction
    h = lvae.denormalise(x, config)                             # for the autoencoder's decoder

Shapes: B batch, C data channels, c channels of a level, z latent channels, L latent groups.
Orders: a "level" is one resolution. A Config's lists and `encoder.levels` are finest first, as in Table 5;
`model.levels`, latent groups, noise, KL and guidance are top-down, coarsest first.
"""
import math
from collections import namedtuple
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------- configuration

def knob(default, help):
    """A field of a config and its explanation, here and in `train.py --help`."""
    return field(default=default, metadata={"help": help})

PER_LEVEL = ("mult", "ffn", "groups", "encoder_layers", "attention_layers", "heads")

@dataclass(frozen=True)
class Config:
    """A model and how it is trained: one column of Table 5. The defaults are LSUN Church's."""
    # data
    resolution: int = knob(32, "height and width of what the LVAE models (latents, or pixels), 4 * 2^k")
    data_channels: int = knob(4, "channels of what the LVAE models")
    num_classes: int = knob(0, "number of labels, 0: unconditional")
    first_stage: str = knob("kl-f8", "the autoencoder: of dae.PRESETS, train, file, none (pixels), latents")
    shift: float = knob(0.0, "data are normalised to (h - shift) / scale")
    scale: float = knob(1.0, "data are normalised to (h - shift) / scale; 0: measure both on the data")
    # architecture; lists are finest level first
    width: int = knob(192, "channels of the top-down path, times mult")
    encoder_width: int = knob(192, "channels of the bottom-up path, times mult")
    mult: tuple = knob((1, 1, 1, 1, 1), "channel multiplier per level, finest first")
    ffn: tuple = knob((4, 4, 4, 4, 4), "expansion of the 1x1 convs in a block per level; 0: none")
    groups: tuple = knob((8, 8, 8, 8, 8), "latent groups per level")
    encoder_layers: tuple = knob((4, 4, 4, 4, 4), "encoder blocks per level")
    attention_layers: tuple = knob((4, 4, 4, 0, 0), "attention layers per level, in each path")
    heads: tuple = knob((4, 8, 8, 0, 0), "attention heads per level")
    z_dim: int = knob(16, "channels of a latent group")
    hierarchical_prior: bool = knob(False, "learn p(z_i | z_<i), not standard normal; guidance acts on it")
    attention: str = knob("sdpa", "sdpa, or released: the bug that the authors' weights were trained with")
    upsample: int = knob(0, "factor of an upsampler given a smaller image, 0: not an upsampler")
    # objective
    sigma_q: float = knob(0.07, "std of the noise around the target (App. B), in units of normalised data")
    spectral_weight: float = knob(0.1, "weight of the spectral regularisation")
    kl_schedule: tuple = knob(("shifted_exp", 1000, 10), "target KL share of each group, see kl_shares")
    label_dropout: float = knob(0.1, "probability of training without the label, for guidance")
    # optimisation
    batch: int = knob(128, "samples per forward pass, over all processes")
    accumulate: int = knob(1, "forward passes per step; effective batch = batch x accumulate")
    lr: float = knob(2e-4, "learning rate of Adam")
    warmup: int = knob(100, "steps of linear learning-rate warm-up")
    ema: float = knob(0.9999, "decay of the weights' moving average per step (reached gradually)")
    skip_threshold: float = knob(300.0, "skip larger gradient norms per data dimension, after step 1000")
    steps: int = knob(250_000, "training steps")
    recompute: bool = knob(False, "activation checkpointing: far less memory, 5 to 25 % more time")

    def __post_init__(self):
        def need(ok, name, rule):
            if not ok:
                raise ValueError(f"config: {name} must be {rule}, not {getattr(self, name)}")
        for name in (*PER_LEVEL, "kl_schedule"):
            object.__setattr__(self, name, tuple(getattr(self, name)))       # lists come back from files
        for name in ("width", "encoder_width", "data_channels", "z_dim", "sigma_q", "batch", "accumulate", "lr"):
            need(getattr(self, name) > 0, name, "positive")
        for name in ("num_classes", "spectral_weight", "warmup", "steps"):
            need(getattr(self, name) >= 0, name, "0 or more")
        for name in ("label_dropout", "ema"):
            need(0 <= getattr(self, name) < 1 or name == "label_dropout" and self.label_dropout == 1, name, "a fraction")
        for name in ("shift", "scale"):
            need(math.isfinite(getattr(self, name)), name, "a finite number")
        need(self.attention in ("sdpa", "released"), "attention", "sdpa or released")
        powers = [2 ** k for k in range(16)]
        need(self.resolution / 4 in powers, "resolution", "4, 8, 16, 32, ...")
        factors = [f for f in powers[1:] if f <= self.resolution / 4]
        need(self.upsample in (0, *factors), "upsample", f"0 or one of {factors}")
        levels = len(resolutions(self))
        for name in PER_LEVEL:
            values, low = getattr(self, name), 0 if name in ("ffn", "attention_layers", "heads") else 1
            need(len(values) == levels and all(isinstance(v, int) and v >= low for v in values), name,
                 f"{levels} whole numbers from {low} up, for levels {resolutions(self)}")
        for i, (m, a, h) in enumerate(zip(self.mult, self.attention_layers, self.heads)):
            need(a <= max(self.groups[i], self.encoder_layers[i]), "attention_layers", "at most the level's blocks")
            need(not a or h and self.width * m % h == 0 == self.encoder_width * m % h, "heads",
                 "divisors of both widths times mult")
        kind, *values = self.kl_schedule or [""]
        fits = len(values) == {"shifted_exp": 2, "constant_per": levels}.get(kind)
        need(fits and all(isinstance(v, (int, float)) and v >= 0 for v in values) and values[0] > 0,
             "kl_schedule", f"shifted_exp,scale,shift or constant_per and {levels} weights")

def resolutions(config):
    """Side of each level, finest first: halved down to 4, then 1 (an upsampler stops at its input's size)."""
    last = config.resolution // config.upsample if config.upsample else 4
    sides = [config.resolution]
    while sides[-1] > last:
        sides.append(sides[-1] // 2)
    return sides if config.upsample else sides + [1]

def guidance_levels(config, weight):
    """The paper's mean guidance, coarsest first: `weight`, but 0 at 1x1, where it saturates colours."""
    return [0.0 if side == 1 else weight for side in reversed(resolutions(config))]

# Table 5 and the released configs, but for bedroom-f4's multipliers: Table 5 prints ones, (2,2,2,3,3,3) gives its
# 96.2M parameters. The toys are ours: the system and the rivals of Table 1, for minutes on a laptop.
_PIXELS = dict(data_channels=3, first_stage="none", shift=127.5, scale=127.5)
_BIG_PIXELS = dict(_PIXELS, resolution=256, width=64, encoder_width=64, sigma_q=0.05, spectral_weight=0.25,
                   batch=32, accumulate=4, lr=1e-4)
_TOY = dict(resolution=16, num_classes=8, width=64, encoder_width=64, mult=(1, 2, 2, 2), ffn=(0, 2, 2, 2),
            groups=(2, 4, 4, 2), encoder_layers=(2, 2, 2, 1), attention_layers=(0, 1, 1, 0), heads=(0, 4, 4, 0),
            hierarchical_prior=True, kl_schedule=("shifted_exp", 100, 10), lr=1.5e-3, batch=32, ema=0.995,
            steps=1200)
_TOY_PIXELS = dict(_PIXELS, resolution=64, width=32, encoder_width=32, sigma_q=0.1, spectral_weight=0.25,
                   lr=1e-3, batch=16, ema=0.995)
PRESETS = {
    "toy": Config(first_stage="train", scale=0.0, sigma_q=0.2, **_TOY),
    "toy-rgb16": Config(sigma_q=0.1, **_PIXELS, **_TOY),
    "toy-upsampler": Config(
        upsample=4, mult=(1, 1, 2), ffn=(0, 0, 2), groups=(2, 3, 3), encoder_layers=(1, 2, 2),
        attention_layers=(0, 0, 1), heads=(0, 0, 4), kl_schedule=("constant_per", 4, 2, 1),
        skip_threshold=10_000.0, steps=800, **_TOY_PIXELS),
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
    """A preset for data of another size: its finest level is repeated, or left out."""
    levels = max(2, resolution.bit_length() - 1)
    lists = {name: getattr(config, name) for name in PER_LEVEL}
    lists = {name: ((values[0],) * levels + values)[-levels:] for name, values in lists.items()}
    return replace(config, resolution=resolution, data_channels=channels, num_classes=num_classes, **lists)

def normalise(h, config):
    """Raw latents or 0..255 pixels h -> data of about unit variance, clipped to +-4 (Section 3.1)."""
    return ((h - config.shift) / config.scale).clamp(-4, 4)

def denormalise(x, config):
    """The inverse of `normalise`."""
    return x * config.scale + config.shift

# ---------------------------------------------------------------- Gaussians (always fp32)

def autocast(device, dtype):
    """Convs and linear layers in bf16 if that is `dtype`; Gaussians, KL and losses always stay fp32."""
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"    # meta has none
    return torch.autocast(kind, torch.bfloat16, enabled=dtype == torch.bfloat16)

Gaussian = namedtuple("Gaussian", "mean var")                  # (B, z, H, W) each

def gaussian(params):
    """Mean and raw variance stacked (B, 2z, H, W) -> Gaussian. Raw 0 is variance 1; logs stay finite."""
    mean, raw = params.float().chunk(2, dim=1)
    return Gaussian(mean, F.softplus(raw, beta=0.693).clamp_min(1e-30))

def gaussian_kl(q, p):
    """KL(q || p) of diagonal Gaussians, elementwise, in nats."""
    ratio = q.var / p.var
    return 0.5 * (ratio - 1 - ratio.log() + (q.mean - p.mean).square() / p.var)

def whiten(z, prior):
    """The noise under the prior that gives z, the one representation of a latent (Section 5.2)."""
    return (z - prior.mean) / prior.var.sqrt()

def guide(conditional, unconditional, mean_weight, variance_weight):
    """The guided prior (Eq. 2): from the unconditional Gaussian through the conditional one, and on."""
    mean = conditional.mean + mean_weight * (conditional.mean - unconditional.mean)
    var = conditional.var * (conditional.var / unconditional.var) ** variance_weight
    return Gaussian(mean, var)

# ---------------------------------------------------------------- layers

def scaled_(layer, scale=1.0):
    """Xavier-uniform times a scale, zero bias. The scales keep a deep stack near the identity."""
    nn.init.xavier_uniform_(layer.weight)
    layer.weight.data.mul_(scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer

def conv(c_in, c_out, kernel=1, scale=1.0, bias=True):
    """A conv that keeps its input's size."""
    return scaled_(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=bias), scale)

class SpectralConv2d(nn.Conv2d):
    """A conv that can tell the largest singular value of its kernel (Yoshida & Miyato, 2017)."""
    def __init__(self, c_in, c_out, kernel, scale):
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)
        scaled_(self, scale)
        self.register_buffer("u", F.normalize(torch.randn(c_out), dim=0))

    def sigma(self):
        """Largest singular value of the kernel by a power iteration, kept in training; no gradient to u, v."""
        with autocast(self.weight.device, torch.float32):
            w = self.weight.flatten(1).float()                 # (c_out, c_in*k*k)
            with torch.no_grad():
                v = F.normalize(w.T @ self.u.float(), dim=0)
                u = F.normalize(w @ v, dim=0)
                if self.training:
                    self.u.copy_(u)
            return u @ (w @ v)

class Block(nn.Module):
    """The inverted bottleneck (App. B): two k x k convs, then two 1x1 convs that widen by `ffn` (none if 0).
    It adds its input if channels agree, unless it gives a distribution: then its last conv is spectral."""
    def __init__(self, c, c_out, kernel, ffn, label_dim, scale, spectral=False):
        super().__init__()
        self.ffn, self.residual = ffn, c == c_out and not spectral
        last = SpectralConv2d if spectral else conv
        self.classproj = scaled_(nn.Linear(label_dim, c)) if label_dim else None
        self.conv1 = conv(c, c, kernel)
        if ffn:
            self.conv2 = conv(c, c, kernel)
            self.dense1 = conv(c, c * ffn)
            self.dense2 = last(c * ffn, c_out, 1, scale)
        else:
            self.conv2 = last(c, c_out, kernel, scale)

    @property
    def last(self):
        return self.dense2 if self.ffn else self.conv2

    def forward(self, x, label):
        h = x                                                  # (B, c, H, W)
        if self.classproj is not None:
            h = h + self.classproj(label)[:, :, None, None]    # label (B, label_dim)
        h = self.conv1(F.silu(h))
        h = self.conv2(F.silu(h))                              # (B, c, H, W), or c_out
        if self.ffn:
            h = self.dense1(F.silu(h))                         # (B, c*ffn, H, W)
            h = self.dense2(F.silu(h))                         # (B, c_out, H, W)
        return x + h if self.residual else h

class Attention(nn.Module):
    """Multi-head self-attention over all positions, residual, starting as the identity.
    Mode released: the authors' code computes the attention and then projects the queries."""
    def __init__(self, c, heads, mode):
        super().__init__()
        self.heads, self.mode = heads, mode
        self.qkv = scaled_(nn.Linear(c, 3 * c))
        self.out = scaled_(nn.Linear(c, c), 0.0)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)                  # (B, H*W, c)
        mixed, k, v = self.qkv(tokens).chunk(3, dim=-1)        # (B, H*W, c) each; the first are the queries
        if self.mode != "released":
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (mixed, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v)    # (B, heads, H*W, c/heads)
            mixed = mixed.transpose(1, 2).flatten(2)           # (B, H*W, c)
        return x + self.out(mixed).transpose(1, 2).unflatten(2, x.shape[2:])

class Resample(nn.Module):
    """Between levels: average pooling, or nearest-neighbour up to a size; a 1x1 conv if channels change."""
    def __init__(self, c_in, c_out, pool=None):
        super().__init__()
        self.pool = pool
        self.conv = conv(c_in, c_out) if c_in != c_out else nn.Identity()

    def forward(self, x, size=None):
        return self.conv(F.avg_pool2d(x, self.pool) if self.pool else F.interpolate(x, size, mode="nearest"))

def shrink(x, config):
    """What an upsampler is given of x (B, C, H, W) in training: (B, C, H/f, W/f), with antialiasing."""
    return F.interpolate(x, scale_factor=1 / config.upsample, mode="bilinear", antialias=True)

def attention_positions(blocks, layers):
    """After which of `blocks` blocks attention follows, spread evenly. As in the released weights, the top-down
    path counts them from 1, the encoder from 0: Table 5's encoders of 4 blocks get 3 of 4 attention layers."""
    return {round(blocks / (layers + 1) * i) for i in range(1, layers + 1)}

def run_block(config, block, *inputs):
    """block(*inputs); in training with config.recompute, without keeping what happens inside."""
    if config.recompute and block.training and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)

# ---------------------------------------------------------------- bottom-up

class Encoder(nn.Module):
    """Bottom-up path: data (B, C, H, W) -> the features of every level, finest first."""
    def __init__(self, config):
        super().__init__()
        sides = resolutions(config)
        widths = [config.encoder_width * m for m in config.mult]
        label_dim = config.width * config.mult[-1] if config.num_classes else 0
        scale = 1 / math.sqrt(sum(config.encoder_layers))
        self.config = config
        self.in_proj = conv(config.data_channels, widths[0], 3)
        self.levels = nn.ModuleList()
        for i, (side, c) in enumerate(zip(sides, widths)):
            layers, blocks = nn.ModuleList(), config.encoder_layers[i]
            positions = attention_positions(blocks, config.attention_layers[i])
            for j in range(blocks):
                layers.append(Block(c, c, 3 if side > 1 else 1, config.ffn[i], label_dim, scale))
                if j in positions:
                    layers.append(Attention(c, config.heads[i], config.attention))
            if i + 1 < len(sides):
                layers.append(Resample(c, widths[i + 1], side // sides[i + 1]))
            self.levels.append(layers)

    def forward(self, x, label):
        x = self.in_proj(x)                                    # (B, c, H, W)
        features = []                                          # of each level before it is pooled
        for layers in self.levels:
            for layer in layers:
                if isinstance(layer, Resample):
                    features.append(x)
                x = run_block(self.config, layer, x, label) if isinstance(layer, Block) else layer(x)
        return features + [x]

# ---------------------------------------------------------------- top-down

# A latent group's prior, posterior (None when generating), both Gaussians, and value (B, z, H, W).
Latent = namedtuple("Latent", "prior posterior z")

class TopDownBlock(nn.Module):
    """One latent group: draw z from the posterior (training) or the prior (generation), add it to the hidden
    state. Under guidance the batch holds two streams, with and without the label: [c; u]. Each gives its own
    prior, the two are combined (Eq. 2), and one z enters both (App. C)."""
    def __init__(self, c, c_encoder, kernel, ffn, label_dim, scale, config):
        super().__init__()
        self.z_dim, self.hierarchical = config.z_dim, config.hierarchical_prior
        prior_out = c + 2 * config.z_dim if self.hierarchical else c
        self.prior_block = Block(c, prior_out, kernel, ffn, label_dim, 1e-10, spectral=True)
        self.actsproj = conv(c + c_encoder, c)
        self.posterior_block = Block(c, 2 * config.z_dim, kernel, ffn, label_dim, 1.0, spectral=True)
        self.zproj = conv(config.z_dim, c, scale=scale, bias=False)
        self.shared_block = Block(c, c, kernel, ffn, label_dim, scale)

    def forward(self, x, label, eps=None, evidence=None, guidance=None, temperature=1.0):
        """x (B, c, H, W), or (2B, ...) under guidance -> x and the Latent. eps (B, z, H, W), None to draw it, or a
        function of the prior that gives it; evidence: the features and label that the posterior sees."""
        h = self.prior_block(x, label)                         # (B, c [+ 2z], H, W)
        if self.hierarchical:
            prior, h = gaussian(h[:, :2 * self.z_dim]), h[:, 2 * self.z_dim:]
        else:
            zeros = x.new_zeros(len(x), self.z_dim, *x.shape[2:], dtype=torch.float32)
            prior = Gaussian(zeros, zeros + 1)
        if guidance is not None:
            c, u = (Gaussian(*stream) for stream in zip(prior.mean.chunk(2), prior.var.chunk(2)))
            prior = guide(c, u, *guidance)                     # (B, z, H, W)
        posterior = None
        if evidence is not None:
            features, true_label = evidence
            acts = self.actsproj(torch.cat([x.to(features.dtype), features], dim=1))    # (B, c, H, W)
            posterior = gaussian(self.posterior_block(acts, true_label))
        source = prior if posterior is None else posterior
        if eps is None:
            eps = torch.randn_like(source.mean)
        elif callable(eps):
            eps = eps(source)
        z = source.mean + temperature * source.var.sqrt() * eps   # (B, z, H, W)
        zs = z if guidance is None else torch.cat([z, z])
        x = h + self.zproj(zs) + x                             # h first: the sum keeps channels-last
        return self.shared_block(x, label), Latent(prior, posterior, z)

# ---------------------------------------------------------------- the model

# p(x|z), mean and logvar (B, C, H, W); KL of every group (L, B), nats; spectral term, times the level's
# resolution but not its weight; L Latents, top-down.
Output = namedtuple("Output", "mean logvar kl spectral latents")

def expect(name, tensor, *shape):
    """Raise a ValueError, naming both, where a tensor has not the shape that is expected."""
    found = None if tensor is None else tuple(tensor.shape)
    if found != shape:
        raise ValueError(f"{name}: shape {found}, expected {shape}")

class LVAE(nn.Module):
    """The hierarchical VAE of a Config. Data are normalised, (B, C, resolution, resolution)."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        sides = resolutions(config)
        widths = [config.width * m for m in config.mult]
        label_dim = widths[-1] if config.num_classes else 0
        scale = 1 / math.sqrt(sum(config.groups))
        # The last row of the embedding is "no label".
        self.embedding = nn.Embedding(config.num_classes + 1, label_dim) if label_dim else None
        self.encoder = Encoder(config)
        if config.upsample:
            self.low_res_proj = conv(config.data_channels, widths[-1])
        else:
            self.initial = nn.Parameter(torch.zeros(1, widths[-1], 1, 1))
        self.levels = nn.ModuleList()                          # coarsest first
        for i in reversed(range(len(sides))):
            layers, kernel = nn.ModuleList(), 3 if sides[i] > 1 else 1
            c, c_encoder = widths[i], config.encoder_width * config.mult[i]
            positions = attention_positions(config.groups[i], config.attention_layers[i])
            for j in range(1, config.groups[i] + 1):
                layers.append(TopDownBlock(c, c_encoder, kernel, config.ffn[i], label_dim, scale, config))
                if j in positions:
                    layers.append(Attention(c, config.heads[i], config.attention))
            if i:
                layers.append(Resample(c, widths[i - 1]))
            self.levels.append(layers)
        self.out_proj = conv(widths[0], 2 * config.data_channels)

    def forward(self, x, label=None, noise=None, low_res=None, drop_label=None):
        """One pass with posterior samples of every group -> Output: p(x|z) and the terms of the objective.
        x (B, C, H, W); label (B,) int64, or None for "no label"; noise: L posterior eps, top-down, None draws
        them; low_res (B, C, H/f, W/f): an upsampler's input, by default x shrunk; drop_label (B,) bool: whose
        label the prior and shared blocks do not see, by default in training a share `label_dropout`."""
        if drop_label is None and self.training:
            drop_label = torch.rand(len(x), device=x.device) < self.config.label_dropout
        mean, logvar, latents = self._infer(x, label, noise, low_res, drop_label)
        kl = torch.stack([gaussian_kl(l.posterior, l.prior).sum((1, 2, 3)) for l in latents])   # (L, B)
        return Output(mean, logvar, kl, self.spectral(), latents)

    @torch.no_grad()
    def encode(self, x, label=None, noise=None, low_res=None):
        """Posterior samples of x, whitened under the prior: L eps (B, z, h, w), top-down, of which `generate` makes
        x again, given the same label. noise: the posterior's eps; None draws them, zeros give its means."""
        _, _, latents = self._infer(x, label, noise, low_res)
        return [whiten(latent.z, latent.prior) for latent in latents]

    @torch.no_grad()
    def generate(self, noise=None, label=None, n=None, mean_guidance=0.0, variance_guidance=0.0,
                 temperature=1.0, low_res=None, size=None):
        """Samples: the mean of p(x|z), z from the prior. (n, C, H, W), normalised data.
        noise: L whitened eps (B, z, h, w), top-down; None, or None for some groups, draws them: a prefix of
            `encode(x)`, then None, keeps what the first groups say of x. A function as an entry gives eps of the
            group's prior, a Gaussian: `lambda prior: whiten(z, prior)` imposes z.
        label: an int, (n,) ints, or None; or (n, label_dim) floats, mixtures of rows of `embedding`.
        mean_guidance, variance_guidance: w_mu, w_sigma of Eq. 2, a number, or one per level, coarsest first.
        n: how many, if nothing else says so. temperature: every prior's std is multiplied by it.
        low_res (n, C, H/f, W/f): an upsampler's input. size (H, W): a multiple of the training data's, where
            the 1x1 groups stay 1x1; by default what the noise is for."""
        label = None if label is None else torch.as_tensor(label)
        given = [t for t in (*(noise or ()), label, low_res) if torch.is_tensor(t) and t.ndim]
        n = n or (len(given[0]) if given else 1)
        guidance = self._guidance(mean_guidance, variance_guidance)
        if guidance is not None and (label is None or not self.config.num_classes):
            raise ValueError("guidance needs a class-conditional model and a label")
        label = self._embed(label, n)
        if guidance is not None:
            label = torch.cat([label, self.embedding.weight[-1:].expand(n, -1)])
        return self._top_down(n, label, noise, low_res, None, guidance, temperature, size)[0]

    def spectral(self):
        """Sum over the regularised convs of (level's resolution) x (largest singular value). Scalar."""
        total = torch.zeros((), device=self.out_proj.weight.device)
        for side, layers in zip(reversed(resolutions(self.config)), self.levels):
            for block in (layer for layer in layers if isinstance(layer, TopDownBlock)):
                if block.hierarchical:
                    total = total + side * block.prior_block.last.sigma()
                total = total + side * block.posterior_block.last.sigma()
        return total

    def latent_shapes(self, size=None):
        """(z, h, w) of every group, top-down, for data of size (H, W)."""
        r = self.config.resolution
        H, W = size or (r, r)
        shapes = []
        for side, groups in zip(reversed(resolutions(self.config)), reversed(self.config.groups)):
            h, w = (1, 1) if side == 1 else (side * H // r, side * W // r)
            shapes += [(self.config.z_dim, h, w)] * groups
        return shapes

    def _infer(self, x, label, noise, low_res, drop_label=None):
        """Bottom-up, then top-down with the posterior: mean, logvar, latents."""
        expect("x", x, len(x), self.config.data_channels, self.config.resolution, self.config.resolution)
        if self.config.upsample and low_res is None:
            low_res = shrink(x, self.config)
        true_label = self._embed(label, len(x))
        evidence = self.encoder(x, true_label), true_label
        return self._top_down(len(x), self._embed(label, len(x), drop_label), noise, low_res, evidence)

    def _top_down(self, n, label, noise, low_res, evidence=None, guidance=None, temperature=1.0, size=None):
        """The one top-down path. Posterior if there is evidence (features, label), else prior."""
        noise = [None] * sum(self.config.groups) if noise is None else list(noise)
        size = size or self._size(noise)
        shapes = self.latent_shapes(size)
        if len(noise) != len(shapes):
            raise ValueError(f"noise has {len(noise)} entries, expected one per group: {len(shapes)}")
        for i, (eps, shape) in enumerate(zip(noise, shapes)):
            if torch.is_tensor(eps):
                expect(f"noise of group {i}", eps, n, *shape)
        if self.config.upsample:
            expect("low_res", low_res, n, self.config.data_channels, *(s // self.config.upsample for s in size))
        x = self.low_res_proj(low_res) if self.config.upsample else self.initial.expand(n, -1, -1, -1)
        if guidance is not None:
            x = torch.cat([x, x])                              # two streams: with and without the label
        sides, latents = resolutions(self.config)[::-1], []    # coarsest first
        for level, layers in enumerate(self.levels):
            given = None if evidence is None else (evidence[0][-1 - level], evidence[1])
            weights = None if guidance is None else guidance[level]
            for layer in layers:
                if isinstance(layer, TopDownBlock):
                    eps = noise[len(latents)]
                    x, latent = run_block(self.config, layer, x, label, eps, given, weights, temperature)
                    latents.append(latent)
                elif isinstance(layer, Resample):
                    x = layer(x, [s * sides[level + 1] // self.config.resolution for s in size])
                else:
                    x = layer(x)                               # (B, c, h, w)
        mean, logvar = self.out_proj(x)[:n].float().chunk(2, dim=1)          # (B, C, H, W)
        return mean, logvar, latents

    def _size(self, noise):
        """Data size (H, W) that given noise is for: the training size unless an entry above 1x1 is larger."""
        r = self.config.resolution
        for eps, (_, h, w) in zip(noise, self.latent_shapes()):
            if torch.is_tensor(eps) and h > 1:
                return r * eps.shape[2] // h, r * eps.shape[3] // w
        return r, r

    def _embed(self, label, n, drop=None):
        """None, an int or ints -> embeddings (n, label_dim), which stay as they are; None if unconditional.
        drop (n,) bool: whose label is replaced by "no label"."""
        classes, device = self.config.num_classes, self.out_proj.weight.device
        if not classes and label is not None:
            raise ValueError("this model is unconditional: it takes no label")
        if not classes:
            return None
        label = torch.as_tensor(classes if label is None else label)
        if label.is_floating_point():
            expect("embedded labels", label, n, self.embedding.embedding_dim)
            return label.to(device)
        if label.ndim and len(label) != n:
            raise ValueError(f"{len(label)} labels for {n} samples")
        if label.device.type == "cpu" and not ((label >= 0) & (label <= classes)).all():
            raise ValueError(f"label {label.tolist()} is out of range 0 to {classes - 1} ({classes}: none)")
        label = label.to(device, torch.long).expand(n)
        return self.embedding(label if drop is None else torch.where(drop, classes, label))

    def _guidance(self, *weights):
        """w_mu and w_sigma, each a number or one per level -> a pair per level; None if all are 0."""
        levels, lists = len(self.levels), []
        for weight in weights:
            weight = weight.tolist() if hasattr(weight, "tolist") else weight    # of a tensor or an array
            weight = list(weight) if isinstance(weight, (list, tuple)) else [weight]
            lists.append(weight * levels if len(weight) == 1 else weight)
            if len(lists[-1]) != levels:
                raise ValueError(f"guidance takes one number, or one per level, coarsest first: {levels}")
        return list(zip(*lists)) if any(lists[0] + lists[1]) else None

# ---------------------------------------------------------------- objective

def kl_shares(config):
    """Target share of the total rate for every group, in percent, top-down (L,). They sum to 66.7:
    the band of weight 1 runs from 1x to 2x a share, so its middles, 1.5x, sum to 100."""
    name, *values = config.kl_schedule                         # shifted_exp, scale, shift
    if name == "shifted_exp":
        scale, shift = values
        shares = torch.linspace(0, math.log(scale), sum(config.groups), dtype=torch.float64).exp() + shift
    else:                                                      # constant_per, a value per level, finest first
        shares = [value for value, groups in zip(values, config.groups) for _ in range(groups)]
        shares = torch.tensor(shares[::-1], dtype=torch.float64)
    return (66.7 * shares / shares.sum()).float()

@torch.no_grad()
def kl_weights(kl, shares):
    """KL scheduling (Luhman & Luhman, 2022): each group's weight, from its share of each sample's total KL.
    kl (L, B) nats; shares (L,) percent. With a = share x total: below a the weight falls to 0.1, so that the
    group may use more; between a and 2a it is 1; it rises to 2 at 3a. No gradient passes. Returns (L, B)."""
    target = (shares.to(kl.device)[:, None] / 100 * kl.sum(0)).clamp_min(1e-20)   # (L, B)
    share = kl / target
    return torch.where(share < 1, share.clamp_min(0.1), 1 + (share - 2).clamp(0, 1))

# Means over a batch, nats per sample; loss is what is minimised. rate: the sum of kl (L,); spectral: weighted.
Loss = namedtuple("Loss", "loss distortion rate weighted_rate spectral kl")

def distortions(out, x, config):
    """KL( N(x, sigma_q^2) || p(x|z) ) of every sample (App. B), (B,) nats."""
    mean, logvar, x = out.mean.float(), out.logvar.float(), x.float()
    var_q = config.sigma_q ** 2
    kl = 0.5 * ((var_q + (x - mean).square()) * torch.exp(-logvar) - 1 + logvar - math.log(var_q))
    return kl.sum((1, 2, 3))

def objective(out, x, config):
    """loss = distortion + weighted rate + spectral term (Section 3, App. B). Output, x (B, C, H, W) -> Loss.
    The distortion is a KL from N(x, sigma_q^2), so that the predicted variance stays above sigma_q^2;
    distortion + rate is the negative ELBO up to a constant."""
    distortion = distortions(out, x, config).mean()
    weights = kl_weights(out.kl, kl_shares(config))            # (L, B)
    weighted_rate = (weights * out.kl).sum(0).mean()
    spectral = config.spectral_weight * out.spectral
    loss = distortion + weighted_rate + spectral
    return Loss(loss, distortion, out.kl.sum(0).mean(), weighted_rate, spectral, out.kl.mean(1))

def bits_per_dim(nats, config):
    """Nats per sample -> bits per data dimension."""
    return nats / (math.log(2) * config.data_channels * config.resolution ** 2)

# ---------------------------------------------------------------- the update

def make_optimizer(model):
    """Adam with the paper's betas (App. B). Its rate is a tensor: on XLA each new number is a new program."""
    first = next(model.parameters())
    kind = dict(capturable=True) if first.device.type == "xla" else dict(fused=True)
    rate = torch.full((1,), model.config.lr, device=first.device)
    return torch.optim.Adam(model.parameters(), rate, betas=(0.9, 0.9), **kind)

def draw_noise(model, n, device, part=slice(None)):
    """`part` of the randomness of n samples in training: L posterior eps (n, z, h, w), top-down, and whose label is
    dropped (n,). A process that takes its part of every batch trains as one process would. For XLA the host draws."""
    source = "cpu" if device.type == "xla" else device
    noise = [torch.randn(n, *shape, device=source)[part].to(device) for shape in model.latent_shapes()]
    return noise, (torch.rand(n, device=source) < model.config.label_dropout)[part].to(device)

def train_step(model, ema, optimizer, batches, step, dtype=torch.float32, average=None):
    """One update, step = 1, 2, ..: Adam and the average, or no change if the gradient is out of bounds.
    batches: config.accumulate tuples of `forward`'s arguments, from (x,) on; dtype: of the convs;
    average(tensors) replaces tensors by their mean over all processes. Returns named statistics: those of
    Loss on the device, grad_norm, skipped and lr on the host."""
    config, device = model.config, batches[0][0].device
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    optimizer.zero_grad()
    parts = []
    for batch in batches:
        with autocast(device, dtype):
            out = model(*batch)
        losses = objective(out, batch[0], config)
        (losses.loss / len(batches)).backward()
        parts.append([value.detach() for value in losses])
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if average is not None:
        average(gradients)
    norm = float(torch.nn.utils.get_total_norm(gradients))     # the only look from the host
    limit = config.skip_threshold * config.data_channels * config.resolution ** 2 if step > 1000 else math.inf
    good = math.isfinite(norm) and norm <= limit
    rate = config.lr * min(1, step / max(config.warmup, 1))
    if good:
        optimizer.param_groups[0]["lr"].copy_(torch.tensor([rate]))
        optimizer.step()
        update_average(ema, model, step)
    else:
        for buffer, value in before:
            buffer.copy_(value)
    stats = Loss(*(torch.stack(values).mean(0) for values in zip(*parts)))
    return stats._asdict() | {"grad_norm": norm, "skipped": not good, "lr": rate}

@torch.no_grad()
def evaluate(model, batches, dtype=torch.float32):
    """Mean distortion and rate, nats per sample, the two terms of the negative ELBO, of batches as in train_step."""
    sums, count = [0.0, 0.0], 0
    for batch in batches:
        with autocast(batch[0].device, dtype):
            out = model(*batch)
        losses = objective(out, batch[0], model.config)
        sums = [sums[0] + len(batch[0]) * float(losses.distortion), sums[1] + len(batch[0]) * float(losses.rate)]
        count += len(batch[0])
    return sums[0] / count, sums[1] / count

@torch.no_grad()
def update_average(ema, model, step):
    """Move the exponential moving average to the model; its decay warms up, as early weights are chance."""
    decay = min(model.config.ema, (1 + step) / (10 + step))
    weight = torch.tensor([1 - decay]).to(next(ema.parameters()).device)
    for mine, current in zip(ema.parameters(), model.parameters()):
        mine.lerp_(current, weight)
    for mine, current in zip(ema.buffers(), model.buffers()):
        mine.copy_(current)

# ---------------------------------------------------------------- the authors' weights

_RELEASED = [
    ("encoder.encoder_levels.", "encoder.levels."), (".layer_list.", "."), ("layer_list.", "levels."),
    ("dense2.conv.", "dense2."), ("conv2.conv.", "conv2."), ("qkvproj", "qkv"), ("qproj", "qkv"),
    ("conv_layer", "conv"), ("initial_x", "initial"), ("embed.", "embedding."), (".outproj.", ".out."),
    ("outproj", "out_proj")]

def from_released(state_dict):
    """The authors' released weights (their names) -> a state_dict for LVAE(config with attention="released").
    Their power-iteration vectors were not saved: each starts anew from its kernel's columns."""
    state = {}
    for name, value in state_dict.items():
        ours = name
        for old, new in _RELEASED:
            ours = ours.replace(old, new)
        state[ours] = value
        if name.endswith((".dense2.conv.weight", ".conv2.conv.weight")):
            w = value.float().flatten(1)                       # (c_out, c_in*k*k)
            state[ours.removesuffix("weight") + "u"] = F.normalize(w @ w.sum(0), dim=0)
    return state
