"""A deep hierarchical VAE with classifier-free guidance, in one file.

This is the second stage of "High Fidelity Image Synthesis With Deep VAEs In Latent Space" (Luhman & Luhman, 2023):
a VAE with dozens of latent groups z_1 .. z_L that models the latents of an image autoencoder (dae.py), or pixels.

    log p(x) >= E_q [ log p(x|z) ] - sum_i E_q [ KL( q(z_i | z_<i, x) || p(z_i | z_<i) ) ]                       (Eq. 1)
                 - distortion                          rate, one KL per latent group

The encoder runs bottom-up (fine to coarse); the top-down path starts at 1x1 and adds one latent group per block. A latent
group is always represented by its noise under the prior, eps_i = (z_i - mean_i) / std_i, so that "a list of eps in, x out,
None = draw it" is sampling, reconstruction, interpolation and outpainting in one function.

    model = LVAE(PRESETS["church"])
    out = model(x, label)                       # training: out.mean, out.logvar, out.kl, out.spectral
    loss = objective(out, x, model.config)      # a Loss of named scalars; loss.loss.backward()
    x = model.generate(n=16)                    # sampling, one forward pass
    x = model.generate(model.encode(x))         # reconstruction

Shapes: B batch, C data channels, c channels of a level, z latent channels, L latent groups. "Level" is one resolution of the
hierarchy; lists per level in a Config are finest first, as in the paper's Table 5. Latent groups are numbered top-down.
Needs torch only; copy it anywhere.
"""
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------- configuration


def knob(default, help):
    """A config field with its explanation: the comment beside it and the text of `train.py --help` are one."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """A model and how it is trained: one column of Table 5. Raises ValueError, naming the field, if it does not fit."""
    # data
    resolution: int = knob(32, "height and width of what the LVAE models (latents, or pixels), 4 * 2^k")
    data_channels: int = knob(4, "channels of what the LVAE models")
    num_classes: int = knob(0, "number of labels, 0: unconditional")
    first_stage: str = knob("kl-f8", "the autoencoder: a name in dae.PRESETS, 'train', 'file', 'none' (pixels), 'latents'")
    shift: float = knob(0.0, "latents are normalised to (h - shift) / scale")
    scale: float = knob(1.0, "latents are normalised to (h - shift) / scale; 0: measure both on the training set")
    # architecture
    width: int = knob(192, "channels of the top-down path, times mult")
    encoder_width: int = knob(192, "channels of the bottom-up path, times mult")
    mult: tuple = knob((1, 1, 1, 1, 1), "channel multiplier per level, finest first")
    ffn: tuple = knob((4, 4, 4, 4, 4), "expansion of the 1x1 convs in a block per level, finest first; 0: none")
    groups: tuple = knob((8, 8, 8, 8, 8), "latent groups per level, finest first")
    encoder_layers: tuple = knob((4, 4, 4, 4, 4), "encoder blocks per level, finest first")
    attention_layers: tuple = knob((4, 4, 4, 0, 0), "attention layers per level and path, finest first")
    heads: tuple = knob((4, 8, 8, 0, 0), "attention heads per level, finest first")
    z_dim: int = knob(16, "channels of a latent group")
    hierarchical_prior: bool = knob(False, "learn p(z_i | z_<i), rather than standard normal; guidance acts on it")
    attention: str = knob("sdpa", "'sdpa', or 'released': the bug that the authors' weights were trained with")
    upsample: int = knob(0, "factor of an upsampler given a smaller image, 0: not an upsampler")
    # objective
    sigma_q: float = knob(0.07, "std of the noise around the target (App. B), in units of normalised data")
    spectral_weight: float = knob(0.1, "weight of the spectral regularisation")
    kl_schedule: tuple = knob(("shifted_exp", 1000, 10), "target share of the rate per group: shifted_exp,scale,shift, "
                              "or constant_per and a weight per level, finest first")
    label_dropout: float = knob(0.1, "probability of training without the label, for guidance")
    # optimisation
    batch: int = knob(128, "samples per forward pass")
    accumulate: int = knob(1, "forward passes per step; effective batch = batch x accumulate")
    lr: float = knob(2e-4, "learning rate of Adam")
    warmup: int = knob(100, "steps of linear learning-rate warm-up")
    ema: float = knob(0.9999, "decay of the weights' moving average per step (reached gradually)")
    skip_threshold: float = knob(300.0, "skip steps whose gradient norm exceeds this per data dimension, after step 1000")
    steps: int = knob(250_000, "training steps")
    recompute: bool = knob(False, "recompute each block's activations in the backward pass: far less memory, more time")

    def __post_init__(self):
        for name in ("mult", "ffn", "groups", "encoder_layers", "attention_layers", "heads", "kl_schedule"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists come back from files

        def need(ok, message):
            if not ok:
                raise ValueError(f"config: {message}")
        k = math.log2(max(self.resolution, 1) / 4)
        need(k >= 0 and k == int(k), f"resolution must be 4, 8, 16, 32, ..., not {self.resolution}")
        whole = int(k) + 2                                     # ... 8, 4, then 1
        if self.upsample:
            need(self.upsample > 1 and math.log2(self.upsample) in range(int(k) + 1),
                 f"upsample must be a power of two up to {self.resolution // 4}, not {self.upsample}")
            whole = int(math.log2(self.upsample)) + 1
        for name in ("mult", "ffn", "groups", "encoder_layers", "attention_layers", "heads"):
            need(len(getattr(self, name)) == whole,
                 f"{name} needs one value per level: {whole} for levels {','.join(map(str, resolutions(self)))}, "
                 f"not {len(getattr(self, name))}")
        for name in ("mult", "ffn", "groups", "encoder_layers", "attention_layers", "heads"):
            need(all(isinstance(v, int) for v in getattr(self, name)),
                 f"{name} takes whole numbers, not {getattr(self, name)}")
        need(min(self.mult + self.groups + self.encoder_layers) > 0, "mult, groups and encoder_layers must be positive")
        need(min(self.ffn + self.attention_layers + self.heads) >= 0, "ffn, attention_layers and heads may not be negative")
        need(all(a <= max(blocks) for a, *blocks in zip(self.attention_layers, self.groups, self.encoder_layers)),
             f"attention_layers {self.attention_layers} may not exceed the blocks of their level")
        for m, a, h in zip(self.mult, self.attention_layers, self.heads):
            need(not a or h > 0 and self.width * m % h == 0 and self.encoder_width * m % h == 0,
                 f"heads {h} must divide width {self.width * m} and encoder_width {self.encoder_width * m}")
        need(min(self.width, self.encoder_width, self.data_channels, self.z_dim) > 0, "widths and channels must be positive")
        need(self.attention in ("sdpa", "released"), f"attention must be 'sdpa' or 'released', not {self.attention!r}")
        need(self.kl_schedule and (self.kl_schedule[0] == "shifted_exp" and len(self.kl_schedule) == 3 or
                                   self.kl_schedule[0] == "constant_per" and len(self.kl_schedule) == whole + 1),
             f"kl_schedule must be shifted_exp,scale,shift or constant_per and {whole} weights, not {self.kl_schedule}")
        need(all(isinstance(v, (int, float)) and v > 0 for v in self.kl_schedule[1:2]) and
             all(isinstance(v, (int, float)) and v >= 0 for v in self.kl_schedule[1:]),
             f"kl_schedule takes positive numbers, not {self.kl_schedule}")
        need(self.sigma_q > 0, "sigma_q must be positive")
        need(all(isinstance(v, (int, float)) and math.isfinite(v) for v in (self.shift, self.scale)), "shift and scale are numbers")
        need(self.batch > 0 and self.accumulate > 0 and self.lr > 0, "batch, accumulate and lr must be positive")
        need(self.steps >= 0 and self.warmup >= 0, "steps and warmup may not be negative")
        need(0 <= self.label_dropout <= 1 and 0 <= self.ema < 1, "label_dropout and ema are fractions")


def resolutions(config):
    """Side of each level, finest first: halved down to 4, then 1 (an upsampler stops at its input's size)."""
    levels, r = [], config.resolution
    while r >= (config.resolution // config.upsample if config.upsample else 4):
        levels.append(r)
        r //= 2
    return levels if config.upsample else levels + [1]


_CHURCH = dict(mult=(1, 1, 1, 1, 1), ffn=(4, 4, 4, 4, 4), groups=(8, 8, 8, 8, 8), encoder_layers=(4, 4, 4, 4, 4),
               attention_layers=(4, 4, 4, 0, 0), heads=(4, 8, 8, 0, 0))

# Table 5 and the released configs; the toys are ours, chosen to train on a laptop in minutes: the system, and the rivals of
# Table 1 (an upsampling stack, and pixels) at its size.
PRESETS = {
    "toy": Config(
        resolution=16, data_channels=4, num_classes=8, first_stage="train", scale=0.0, width=64, encoder_width=64,
        mult=(1, 2, 2, 2), ffn=(0, 2, 2, 2), groups=(2, 4, 4, 2), encoder_layers=(2, 2, 2, 1), attention_layers=(0, 1, 1, 0),
        heads=(0, 4, 4, 0), hierarchical_prior=True, sigma_q=0.2, spectral_weight=0.1, kl_schedule=("shifted_exp", 100, 10),
        batch=32, lr=1.5e-3, ema=0.995, steps=1200),
    "toy-rgb16": Config(
        resolution=16, data_channels=3, num_classes=8, first_stage="none", shift=127.5, scale=127.5, width=64, encoder_width=64,
        mult=(1, 2, 2, 2), ffn=(0, 2, 2, 2), groups=(2, 4, 4, 2), encoder_layers=(2, 2, 2, 1), attention_layers=(0, 1, 1, 0),
        heads=(0, 4, 4, 0), hierarchical_prior=True, sigma_q=0.1, kl_schedule=("shifted_exp", 100, 10),
        batch=32, lr=1.5e-3, ema=0.995, steps=1200),
    "toy-upsampler": Config(
        resolution=64, data_channels=3, first_stage="none", shift=127.5, scale=127.5, width=32, encoder_width=32, upsample=4,
        mult=(1, 1, 2), ffn=(0, 0, 2), groups=(2, 3, 3), encoder_layers=(1, 2, 2), attention_layers=(0, 0, 1), heads=(0, 0, 4),
        sigma_q=0.1, spectral_weight=0.25, kl_schedule=("constant_per", 4, 2, 1), batch=16, lr=1e-3, ema=0.995,
        skip_threshold=10_000.0, steps=800),
    "toy-pixel": Config(
        resolution=64, data_channels=3, num_classes=8, first_stage="none", shift=127.5, scale=127.5, width=32, encoder_width=32,
        mult=(1, 2, 3, 4, 4, 4), ffn=(0, 0, 2, 2, 2, 2), groups=(2, 3, 4, 4, 4, 2), encoder_layers=(1, 2, 2, 2, 2, 1),
        attention_layers=(0, 0, 1, 1, 0, 0), heads=(0, 0, 4, 4, 0, 0), hierarchical_prior=True, sigma_q=0.1, spectral_weight=0.25,
        kl_schedule=("constant_per", 32, 16, 8, 4, 2, 1), batch=16, lr=1e-3, ema=0.995, steps=1200),
    "church": Config(
        resolution=32, data_channels=4, first_stage="kl-f8", shift=0.25, scale=4.1, width=192, encoder_width=192, **_CHURCH),
    "church-rgb32": Config(
        resolution=32, data_channels=3, first_stage="none", shift=127.5, scale=127.5, width=192, encoder_width=192, **_CHURCH,
        sigma_q=0.035),
    "church-upsampler": Config(
        resolution=256, data_channels=3, first_stage="none", shift=127.5, scale=127.5, width=64, encoder_width=64, upsample=8,
        mult=(2, 2, 3, 3), ffn=(0, 0, 4, 4), groups=(3, 6, 8, 8), encoder_layers=(2, 3, 4, 4),
        attention_layers=(0, 0, 0, 4), heads=(0, 0, 0, 4), sigma_q=0.05, spectral_weight=0.25,
        kl_schedule=("constant_per", 8, 4, 2, 1), batch=32, accumulate=4, lr=1e-4, ema=0.9998, skip_threshold=10_000.0),
    "church-pixel": Config(
        resolution=256, data_channels=3, first_stage="none", shift=127.5, scale=127.5, width=64, encoder_width=64,
        mult=(2, 2, 3, 3, 3, 3, 3, 3), ffn=(0, 0, 0, 4, 4, 4, 4, 4), groups=(2, 5, 8, 8, 8, 8, 8, 8),
        encoder_layers=(2, 3, 4, 4, 4, 4, 4, 4), attention_layers=(0, 0, 0, 4, 4, 4, 0, 0), heads=(0, 0, 0, 4, 8, 8, 0, 0),
        sigma_q=0.05, spectral_weight=0.25, kl_schedule=("constant_per", 256, 128, 64, 32, 16, 8, 4, 1),
        batch=32, accumulate=4, lr=1e-4),
    "bedroom-f4": Config(
        resolution=64, data_channels=3, first_stage="vq-f4", shift=0.075, scale=0.84, width=64, encoder_width=64,
        mult=(2, 2, 2, 3, 3, 3), ffn=(0, 4, 4, 4, 4, 4), groups=(8, 12, 10, 8, 6, 6), encoder_layers=(4, 6, 5, 4, 3, 3),
        attention_layers=(0, 4, 4, 4, 0, 0), heads=(0, 4, 8, 8, 0, 0), sigma_q=0.1, kl_schedule=("shifted_exp", 2000, 10),
        batch=32, accumulate=4),
    "bedroom-f8": Config(
        resolution=32, data_channels=4, first_stage="kl-f8", shift=0.25, scale=4.1, width=192, encoder_width=192,
        mult=(1, 1, 1, 1, 1), ffn=(4, 4, 4, 4, 4), groups=(8, 8, 7, 6, 6), encoder_layers=(4, 4, 4, 3, 3),
        attention_layers=(4, 4, 4, 0, 0), heads=(4, 8, 8, 0, 0)),
    "bedroom-f16": Config(
        resolution=16, data_channels=16, first_stage="kl-f16", shift=0.0, scale=3.5, width=192, encoder_width=192,
        mult=(1, 1, 1, 1), ffn=(4, 4, 4, 4), groups=(10, 9, 8, 6), encoder_layers=(5, 5, 4, 3),
        attention_layers=(4, 4, 0, 0), heads=(8, 8, 0, 0), kl_schedule=("shifted_exp", 600, 10)),
    "imagenet": Config(
        resolution=32, data_channels=4, num_classes=1000, first_stage="kl-f8", shift=0.25, scale=4.4, width=256, encoder_width=384,
        mult=(1, 1, 1, 1, 1), ffn=(4, 6, 8, 10, 12), groups=(10, 12, 10, 8, 8), encoder_layers=(4, 5, 4, 3, 3),
        attention_layers=(4, 4, 4, 0, 0), heads=(4, 8, 8, 8, 8), hierarchical_prior=True,
        batch=128, accumulate=8, lr=3e-4, ema=0.9998, steps=475_000),
}

# ---------------------------------------------------------------- Gaussians (always fp32)


class Gaussian(NamedTuple):
    mean: torch.Tensor                                         # (B, z, H, W)
    var: torch.Tensor                                          # (B, z, H, W)


def gaussian(params):
    """Mean and raw variance stacked (B, 2z, H, W) -> Gaussian. Raw 0 is variance 1; the floor keeps logarithms finite."""
    mean, raw = params.float().chunk(2, dim=1)
    return Gaussian(mean, F.softplus(raw, beta=0.693).clamp_min(1e-30))


def gaussian_kl(q, p):
    """KL(q || p) of diagonal Gaussians, elementwise, in nats."""
    ratio = q.var / p.var
    return 0.5 * (ratio - 1 - ratio.log() + (q.mean - p.mean).square() / p.var)


def guide(conditional, unconditional, mean_weight, variance_weight):
    """The guided prior (Eq. 2): extrapolate from the unconditional Gaussian through the conditional one. 0 = unguided."""
    mean = conditional.mean + mean_weight * (conditional.mean - unconditional.mean)
    var = conditional.var * (conditional.var / unconditional.var) ** variance_weight
    return Gaussian(mean, var)


# ---------------------------------------------------------------- layers


def scaled_(layer, scale=1.0):
    """Every conv starts Xavier-uniform times a scale, without bias. The scales keep a deep stack near the identity."""
    nn.init.xavier_uniform_(layer.weight)
    with torch.no_grad():
        layer.weight.mul_(scale)
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
        """Largest singular value of the (k*k*c_in, c_out) kernel: one power-iteration step, kept in training. The gradient
        is that of sigma = u' W v with u and v fixed."""
        with torch.autocast(self.weight.device.type, enabled=False):
            w = self.weight.flatten(1).float()                 # (c_out, c_in*k*k)
            with torch.no_grad():
                v = F.normalize(w.T @ self.u.float(), dim=0)
                u = F.normalize(w @ v, dim=0)
                if self.training:
                    self.u.copy_(u)
            return u @ (w @ v)


class Block(nn.Module):
    """The inverted bottleneck (App. B): two k x k convs, then two 1x1 convs that widen by `ffn` (none if 0).

    It adds its input when the channels agree, unless it outputs a distribution's parameters: then its last conv is spectral.
    """

    def __init__(self, c, c_out, kernel, ffn, label_dim, scale, spectral=False):
        super().__init__()
        self.residual = c == c_out and not spectral
        last = SpectralConv2d if spectral else conv
        self.classproj = scaled_(nn.Linear(label_dim, c)) if label_dim else None
        self.conv1 = conv(c, c, kernel)
        if ffn:
            self.conv2 = conv(c, c, kernel)
            self.dense1 = conv(c, c * ffn)
            self.dense2 = last(c * ffn, c_out, 1, scale)
        else:
            self.conv2 = last(c, c_out, kernel, scale)
        self.ffn = ffn

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

    mode "released": the authors' code computes the attention and then projects the queries instead; their weights need it.
    """

    def __init__(self, c, heads, mode):
        super().__init__()
        self.heads, self.mode = heads, mode
        self.qkv = scaled_(nn.Linear(c, 3 * c))
        self.out = scaled_(nn.Linear(c, c), 0.0)

    def forward(self, x):
        B, c, H, W = x.shape
        tokens = x.flatten(2).transpose(1, 2)                  # (B, H*W, c)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)            # (B, H*W, c) each
        if self.mode == "released":
            mixed = q
        else:
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, H*W, c/heads)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)        # (B, H*W, c)
        return x + self.out(mixed).transpose(1, 2).unflatten(2, (H, W))


class Resample(nn.Module):
    """Between two levels: average-pool down or nearest-neighbour up to `side`, and a 1x1 conv if the channels change."""

    def __init__(self, c_in, c_out, factor, up):
        super().__init__()
        self.factor, self.up = factor, up
        self.conv = conv(c_in, c_out) if c_in != c_out else None

    def forward(self, x, size=None):
        x = F.interpolate(x, size, mode="nearest") if self.up else F.avg_pool2d(x, self.factor)
        return x if self.conv is None else self.conv(x)


def shrink(x, config):
    """What an upsampler is given of x (B, C, H, W) in training: (B, C, H/f, W/f), bilinear with antialiasing."""
    return F.interpolate(x, scale_factor=1 / config.upsample, mode="bilinear", antialias=True)


def attention_positions(blocks, layers):
    """Where `layers` attention layers go, spread evenly through `blocks` blocks (Python's round: half to even).

    Two that fall on one position are one layer, as in the released models: the encoders of Table 5 with 4 blocks and 4
    attention layers have 3. The top-down path counts blocks from 1, the encoder from 0.
    """
    return {round(blocks / (layers + 1) * i) for i in range(1, layers + 1)}


def run(config, block, *inputs):
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
            layers = nn.ModuleList()
            blocks = config.encoder_layers[i]
            positions = attention_positions(blocks, config.attention_layers[i])
            for j in range(blocks):
                layers.append(Block(c, c, 3 if side > 1 else 1, config.ffn[i], label_dim, scale))
                if j in positions:                             # after the block with 0-based index p
                    layers.append(Attention(c, config.heads[i], config.attention))
            if i + 1 < len(sides):
                layers.append(Resample(c, widths[i + 1], side // sides[i + 1], up=False))
            self.levels.append(layers)

    def forward(self, x, label):
        x = self.in_proj(x)                                    # (B, c, H, W)
        features = []
        for layers in self.levels:
            for layer in layers:
                if isinstance(layer, Resample):
                    features.append(x)                         # what the top-down path sees: before downsampling
                x = run(self.config, layer, x, label) if isinstance(layer, Block) else layer(x)
        return features + [x]


# ---------------------------------------------------------------- top-down


class Latent(NamedTuple):
    """One latent group: its prior, its posterior (None when generating) and its value."""
    prior: Gaussian
    posterior: Gaussian
    z: torch.Tensor                                            # (B, z, H, W)


class TopDownBlock(nn.Module):
    """One latent group: draw z from the posterior (training) or the prior (generation), add it to the hidden state.

    The same forward serves both. Under guidance the batch holds two streams, with and without the label: [c; u]. Each
    gives its own prior, the two are combined (Eq. 2), and one z enters both (App. C).
    """

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
        """x (B, c, H, W), or (2B, ...) under guidance; eps (B, z, H, W), None to draw it, or a function of the prior that
        gives it; evidence (features, label) is what the posterior sees; guidance (mean weight, variance weight). Returns x and
        the Latent."""
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
            acts = self.actsproj(torch.cat([x.to(features.dtype), features], dim=1))
            posterior = gaussian(self.posterior_block(acts, true_label))

        source = prior if posterior is None else posterior
        if eps is None:
            eps = torch.randn_like(source.mean)
        elif callable(eps):
            eps = eps(source)
        z = source.mean + temperature * source.var.sqrt() * eps              # (B, z, H, W)
        zs = z if guidance is None else torch.cat([z, z])
        # A sum takes the memory format of its first term: h is channels-last where the convs are, x may not be yet.
        x = h + self.zproj(zs) + x
        return self.shared_block(x, label), Latent(prior, posterior, z)


# ---------------------------------------------------------------- the model


class Output(NamedTuple):
    """What a training pass gives: p(x|z), the KL of every group, the spectral term, and the latents."""
    mean: torch.Tensor                                         # (B, C, H, W)
    logvar: torch.Tensor                                       # (B, C, H, W)
    kl: torch.Tensor                                           # (L, B) nats, unweighted
    spectral: torch.Tensor                                     # scalar, times the level's resolution, without its weight
    latents: list                                              # L Latents, top-down


class LVAE(nn.Module):
    """The hierarchical VAE of a Config. Data are normalised, (B, C, resolution, resolution), about unit variance."""

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
            layers = nn.ModuleList()
            c, kernel = widths[i], 3 if sides[i] > 1 else 1
            positions = attention_positions(config.groups[i], config.attention_layers[i])
            for j in range(config.groups[i]):
                layers.append(TopDownBlock(c, config.encoder_width * config.mult[i], kernel, config.ffn[i], label_dim,
                                           scale, config))
                if j + 1 in positions:                         # after the p-th block, counting from 1
                    layers.append(Attention(c, config.heads[i], config.attention))
            if i:
                layers.append(Resample(c, widths[i - 1], sides[i - 1] // sides[i], up=True))
            self.levels.append(layers)
        self.out_proj = conv(widths[0], 2 * config.data_channels)

    def forward(self, x, label=None, noise=None, low_res=None, lost=None):
        """One training pass: posterior samples of every group, p(x|z) and the terms of the objective.

        x (B, C, H, W); label (B,) int64, or None for "no label"; noise: L posterior eps, top-down, None draws them;
        low_res (B, C, H/f, W/f): an upsampler's input, by default x shrunk; lost (B,) bool: whose label the prior and shared
        blocks do not see, by default in training mode a share `label_dropout`, drawn. Returns an Output.
        """
        seen = label = self._labels(label, len(x), x.device)
        if lost is None and self.training:
            lost = torch.rand(len(x), device=x.device) < self.config.label_dropout
        if lost is not None and label is not None:
            seen = torch.where(lost, self.config.num_classes, label)
        mean, logvar, latents = self._infer(x, label, seen, noise, low_res)
        kl = torch.stack([gaussian_kl(l.posterior, l.prior).sum((1, 2, 3)) for l in latents])  # (L, B)
        return Output(mean, logvar, kl, self.spectral(), latents)

    @torch.no_grad()
    def encode(self, x, label=None, noise=None, low_res=None):
        """Draw z from the posterior of x and whiten it under the prior: a list of L eps (B, z, h, w), top-down.

        `generate` gives x's reconstruction back from it, for the same label. noise: the posterior's eps, None draws them;
        a list of zeros gives the posterior means.
        """
        label = self._labels(label, len(x), x.device)
        _, _, latents = self._infer(x, label, label, noise, low_res)
        return [(l.z - l.prior.mean) / l.prior.var.sqrt() for l in latents]

    @torch.no_grad()
    def generate(self, noise=None, label=None, n=None, mean_guidance=0.0, variance_guidance=0.0, temperature=1.0,
                 low_res=None, size=None):
        """Samples: the mean of p(x|z), z from the prior. (n, C, H, W), normalised data.

        noise: L whitened eps (B, z, h, w), top-down; None, or None for some groups, draws them, so that a prefix of
            `encode(x)` and then None keeps what the first groups say of x. An entry may also be a function of the group's prior,
            a Gaussian, that returns its eps: (z - mean) / std imposes z.
        label: an int, (n,) ints, or None; or (n, label_dim) floats, mixtures of rows of `embedding`.
        n: how many, if neither noise nor label says so.
        mean_guidance, variance_guidance: w_mu and w_sigma of Eq. 2, one number, or one per level, coarsest first;
            0 is unguided. temperature: every prior's std is multiplied by it.
        low_res (n, C, H/f, W/f): an upsampler's input. size (H, W): wider or taller than the training data by whole
            factors (the 1x1 groups stay 1x1); read off noise if it has entries.
        Raises ValueError where these do not fit each other or the model.
        """
        noise = [None] * sum(self.config.groups) if noise is None else list(noise)
        given = [eps for eps in noise if torch.is_tensor(eps)]
        sizes = [len(t) for t in given + [low_res] if t is not None]
        if label is not None:
            label = torch.as_tensor(label)
            sizes += [len(label)] if label.ndim else []
        n = n or (sizes[0] if sizes else 1)
        if any(s != n for s in sizes):
            raise ValueError(f"noise, label and low_res are for {sizes} samples, expected {n} of each")
        device = self.out_proj.weight.device
        guidance = self._guidance(mean_guidance, variance_guidance)
        if guidance is not None and (label is None or not self.config.num_classes):
            raise ValueError("guidance needs a class-conditional model and a label")
        embedded = self._embed(self._labels(label, n, device))
        if guidance is not None:
            embedded = torch.cat([embedded, self.embedding.weight[-1:].expand(n, -1)])
        mean, _, _ = self._top_down(n, embedded, noise, low_res, guidance=guidance, temperature=temperature, size=size)
        return mean

    def spectral(self):
        """Sum over the regularised convs of (level's resolution) x (largest singular value). Scalar."""
        total = torch.zeros((), device=self.out_proj.weight.device)
        for side, layers in zip(reversed(resolutions(self.config)), self.levels):
            for block in (layer for layer in layers if isinstance(layer, TopDownBlock)):
                for b in (block.prior_block, block.posterior_block) if block.hierarchical else (block.posterior_block,):
                    total = total + side * (b.dense2 if b.ffn else b.conv2).sigma()
        return total

    def latent_shapes(self, size=None):
        """(z, h, w) of every group, top-down, for data of size (H, W)."""
        H, W = size or (self.config.resolution,) * 2
        shapes = []
        for side, groups in zip(reversed(resolutions(self.config)), reversed(self.config.groups)):
            h, w = (1, 1) if side == 1 else (side * H // self.config.resolution, side * W // self.config.resolution)
            shapes += [(self.config.z_dim, h, w)] * groups
        return shapes

    def _infer(self, x, label, seen, noise, low_res):
        """Bottom-up, then top-down with the posterior: mean, logvar, latents."""
        expected = (self.config.data_channels, self.config.resolution, self.config.resolution)
        if x.shape[1:] != expected:
            raise ValueError(f"x is {tuple(x.shape)}, expected (B, {', '.join(map(str, expected))})")
        if self.config.upsample and low_res is None:
            low_res = shrink(x, self.config)
        label = self._embed(label)
        features = self.encoder(x, label)
        noise = [None] * sum(self.config.groups) if noise is None else list(noise)
        return self._top_down(len(x), self._embed(seen), noise, low_res, evidence=(features, label))

    def _top_down(self, n, label, noise, low_res, evidence=None, guidance=None, temperature=1.0, size=None):
        """The one top-down path. Posterior if there is evidence (features of every level, label embedding), else prior."""
        sides = resolutions(self.config)[::-1]                 # coarsest first
        size = size or self._size(noise)
        shapes = self.latent_shapes(size)
        if len(noise) != len(shapes):
            raise ValueError(f"noise has {len(noise)} entries, expected one per latent group: {len(shapes)}")
        for i, (eps, shape) in enumerate(zip(noise, shapes)):
            if torch.is_tensor(eps) and eps.shape != (n, *shape):
                raise ValueError(f"noise of group {i} is {tuple(eps.shape)}, expected {(n, *shape)}")
        streams = n if guidance is None else 2 * n
        if self.config.upsample:
            h, w = (s // self.config.upsample for s in size)
            if low_res is None or low_res.shape != (n, self.config.data_channels, h, w):
                raise ValueError(f"low_res is {None if low_res is None else tuple(low_res.shape)}, "
                                 f"expected {(n, self.config.data_channels, h, w)}")
            x = self.low_res_proj(low_res if guidance is None else torch.cat([low_res, low_res]))
        else:
            x = self.initial.expand(streams, -1, -1, -1)       # (B, c, 1, 1); fp32 under autocast, up to a conv between levels
        latents = []
        for level, layers in enumerate(self.levels):
            given = None if evidence is None else (evidence[0][-1 - level], evidence[1])
            weights = None if guidance is None else guidance[level]
            for layer in layers:
                if isinstance(layer, TopDownBlock):
                    eps = noise[len(latents)]
                    x, latent = run(self.config, layer, x, label, eps, given, weights, temperature)
                    latents.append(latent)
                elif isinstance(layer, Resample):
                    x = layer(x, [s * sides[level + 1] // self.config.resolution for s in size])
                else:
                    x = layer(x)                               # (B, c, h, w)
        mean, logvar = self.out_proj(x)[:n].float().chunk(2, dim=1)          # (B, C, H, W)
        return mean, logvar, latents

    def _size(self, noise):
        """Data size (H, W) that given noise is for: the training size unless an entry of a level >= 4 is larger."""
        r = self.config.resolution
        for eps, (_, h, w) in zip(noise, self.latent_shapes()):
            if torch.is_tensor(eps) and h > 1:
                return r * eps.shape[2] // h, r * eps.shape[3] // w
        return r, r

    def _labels(self, label, n, device):
        """None, an int or ints -> (n,) int64 on `device`; None for an unconditional model. Embeddings stay. Raises ValueError."""
        classes = self.config.num_classes
        if not classes:
            if label is not None:
                raise ValueError("this model is unconditional: it takes no label")
            return None
        label = torch.as_tensor(classes if label is None else label)
        if label.is_floating_point():
            if label.shape != (n, self.embedding.embedding_dim):
                raise ValueError(f"embedded labels are {tuple(label.shape)}, expected {(n, self.embedding.embedding_dim)}")
            return label.to(device)
        if label.device.type == "cpu" and label.numel() and not 0 <= label.min() <= label.max() <= classes:
            raise ValueError(f"label {label.tolist()} is out of range: 0 to {classes - 1}, or {classes} for no label")
        if label.ndim and len(label) != n:
            raise ValueError(f"{len(label)} labels for {n} samples")
        return label.to(device, torch.long).expand(n)

    def _embed(self, label):
        """Labels (B,) -> (B, label_dim)."""
        return label if label is None or label.is_floating_point() else self.embedding(label)

    def _guidance(self, mean_weight, variance_weight):
        """Weights -> [(w_mu, w_sigma)] per level, coarsest first; None if all are 0."""
        levels = len(self.config.groups)
        weights = []
        for name, w in (("mean_guidance", mean_weight), ("variance_guidance", variance_weight)):
            w = w.tolist() if hasattr(w, "tolist") else w      # of a tensor or an array
            w = list(w) if isinstance(w, (list, tuple)) else [w]
            w = w * levels if len(w) == 1 else w
            if len(w) != levels:
                raise ValueError(f"{name} takes one number or one per level, coarsest first: {levels}, not {len(w)}")
            weights.append(w)
        return list(zip(*weights)) if any(weights[0] + weights[1]) else None


# ---------------------------------------------------------------- objective


def kl_shares(config):
    """Target share of the total rate for every group, in percent, top-down (L,). They sum to 66.7, as published."""
    name, *values = config.kl_schedule
    if name == "shifted_exp":
        scale, shift = values
        shares = torch.linspace(0, math.log(scale), sum(config.groups), dtype=torch.float64).exp() + shift
    else:                                                      # constant_per: one value per level, finest first
        shares = torch.tensor([v for v, g in zip(values, config.groups) for _ in range(g)][::-1], dtype=torch.float64)
    return (66.7 * shares / shares.sum()).float()


@torch.no_grad()
def kl_weights(kl, shares):
    """KL scheduling (Luhman & Luhman, 2022): each group's weight, from its share of each sample's total KL.

    kl (L, B) nats; shares (L,) percent. With a = share x total: below a the weight falls to 0.1, so that the group may use
    more; between a and 2a it is 1; it rises to 2 at 3a. No gradient passes. Returns (L, B).
    """
    target = (shares.to(kl.device)[:, None] / 100 * kl.sum(0)).clamp_min(1e-20)   # (L, B)
    share = kl / target
    return torch.where(share < 1, share.clamp_min(0.1), 1 + (share - 2).clamp(0, 1))


class Loss(NamedTuple):
    """Named statistics of a step; batch means, nats per sample. `loss` is what is minimised."""
    loss: torch.Tensor
    distortion: torch.Tensor
    rate: torch.Tensor                                         # sum of KL, unweighted
    weighted_rate: torch.Tensor
    spectral: torch.Tensor                                     # weighted
    kl: torch.Tensor                                           # (L,) batch mean per group


def distortions(out, x, config):
    """KL( N(x, sigma_q^2) || p(x|z) ) of every sample (App. B), (B,) nats."""
    mean, logvar, x = out.mean.float(), out.logvar.float(), x.float()
    var_q = config.sigma_q ** 2
    kl = 0.5 * ((var_q + (x - mean).square()) * torch.exp(-logvar) - 1 + logvar - math.log(var_q))
    return kl.sum((1, 2, 3))


def objective(out, x, config):
    """loss = distortion + weighted rate + spectral term (Section 3, App. B).

    The distortion is the KL from N(x, sigma_q^2) to p(x|z), which keeps the predicted variance above sigma_q^2; -ELBO is
    distortion + rate up to the constant entropy of that noise. out: an Output; x (B, C, H, W). Returns a Loss.
    """
    distortion = distortions(out, x, config).mean()
    weights = kl_weights(out.kl, kl_shares(config))            # (L, B)
    weighted_rate = (weights * out.kl).sum(0).mean()
    spectral = config.spectral_weight * out.spectral
    loss = distortion + weighted_rate + spectral
    return Loss(loss, distortion, out.kl.sum(0).mean(), weighted_rate, spectral, out.kl.mean(1))


def bits_per_dim(nats, config):
    """Nats per sample -> bits per data dimension."""
    return nats / (math.log(2) * config.data_channels * config.resolution ** 2)


# ---------------------------------------------------------------- the authors' weights

_RELEASED = [("encoder.encoder_levels.", "encoder.levels."), (".layer_list.", "."), ("layer_list.", "levels."),
             ("dense2.conv.", "dense2."), ("conv2.conv.", "conv2."), ("qkvproj", "qkv"), ("qproj", "qkv"),
             ("conv_layer", "conv"), ("initial_x", "initial"), ("embed.", "embedding.")]


def from_released(state_dict):
    """The authors' released weights (their names) -> a state_dict for LVAE(config with attention="released").

    Their power-iteration vectors were not saved: each starts anew from its kernel's columns.
    """
    state = {}
    for name, value in state_dict.items():
        ours = name
        for old, new in _RELEASED:
            ours = ours.replace(old, new)
        if ours.startswith("outproj"):
            ours = "out_proj" + ours[len("outproj"):]
        ours = ours.replace(".outproj.", ".out.")
        state[ours] = value
        if name.endswith((".dense2.conv.weight", ".conv2.conv.weight")):
            w = value.float().flatten(1)                       # (c_out, c_in*k*k)
            state[ours[:-len("weight")] + "u"] = F.normalize(w @ w.sum(0), dim=0)
    return state
