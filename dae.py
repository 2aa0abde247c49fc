"""The deterministic autoencoder (DAE): images to latents and back, in one file.

This is the first stage of "High Fidelity Image Synthesis With Deep VAEs In Latent Space" (Luhman & Luhman, 2023): the
autoencoders of latent diffusion (Rombach et al., 2022), KL and VQ, with the parameter names of the official files.

    ae = load("model.ckpt")                     # an official file, or ours; the architecture is read off its tensors
    h = ae.encode(x)                            # x (B, 3, H, W) in [-1, 1] -> h (B, C, H/f, W/f)
    x = ae.decode(h)

Normalisation: h is the raw latent. It is the posterior's mean (KL) or the feature map before quantisation (VQ, which
quantises at the start of `decode`), with no factor such as 0.18215 applied. Whoever models h shifts and scales it.

`training_losses` is the objective of Section 3.1 for training one: L1, perceptual, adversarial and KL terms.

Shapes: B batch, H W image size, C latent channels, f downsampling factor. Needs torch only; copy it anywhere.
"""
import pickle
import types
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field

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
        return [int(self.width * m) for m in self.mult]

    @property
    def f(self):
        return 2 ** (len(self.mult) - 1)


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


# ---------------------------------------------------------------- reading the files people have


class LoadError(ValueError):
    """A file that cannot be used, in one line: which file, what is wrong, what to do."""


class Inert:
    """Stands in for every class or function that a pickle names and we do not know. It takes anything and does nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return Inert()

    def _ignore(self, *args, **kwargs):
        pass

    __setstate__ = __setitem__ = append = extend = add = update = _ignore


class _Unpickler(pickle.Unpickler):
    """Builds tensors and plain containers; everything else that a file asks for becomes Inert, and nothing is called."""

    def find_class(self, module, name):
        if module == "collections" and name == "OrderedDict":
            return OrderedDict                                 # a state_dict carries _metadata, which a dict cannot
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"):
            return super().find_class(module, name)
        if module == "torch" and name == "Size":
            return tuple
        return Inert


def read(path):
    """What a torch file holds, as plain containers and CPU tensors, running nothing from inside it.

    Files of weights and plain containers load as they are. Others, such as Lightning's, load with every foreign object
    replaced by an Inert one. Raises LoadError.
    """
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise LoadError(f"{path}: not a checkpoint, or a truncated one (expected torch's zip format)")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            inert = types.ModuleType("inert")                  # torch asks it for an Unpickler and nothing else
            inert.Unpickler = _Unpickler
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=inert)
    except OSError as e:
        raise LoadError(f"{path}: {e.strerror or e}") from None
    except LoadError:
        raise
    except Exception as e:  # whatever a broken or hostile file provokes; nothing in it has run
        raise LoadError(f"{path}: cannot be read as a checkpoint ({type(e).__name__}: {str(e).splitlines()[0][:100]})") from None


def config_of(state):
    """The Config that a state_dict in official names was made with. Raises KeyError or ValueError if it is none."""
    def count(prefix):
        return len({k[len(prefix):].split(".")[0] for k in state if k.startswith(prefix)})
    width = len(state["encoder.conv_in.weight"])
    channels = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(count("encoder.down."))]
    codebook = state.get("quantize.embedding.weight")
    return Config(
        z_channels=state["post_quant_conv.weight"].shape[1], width=width,
        mult=tuple(c // width if c % width == 0 else c / width for c in channels), blocks=count("encoder.down.0.block."),
        attention=tuple(i for i in range(len(channels)) if f"encoder.down.{i}.attn.0.q.weight" in state),
        mid_attention="encoder.mid.attn_1.q.weight" in state, codebook=0 if codebook is None else len(codebook))


def from_state(state, source="state_dict"):
    """An Autoencoder in evaluation mode from a state_dict in official names. Every tensor is accounted for, or LoadError."""
    if "encoder.conv_in.weight" not in state:
        raise LoadError(f"{source}: holds no autoencoder (expected encoder.conv_in.weight, found {', '.join(list(state)[:3])} ...)")
    try:
        config = config_of(state)
        ae = Autoencoder(config)
    except (KeyError, ValueError, AttributeError, IndexError, TypeError) as e:
        raise LoadError(f"{source}: not an autoencoder that we know ({type(e).__name__}: {e})") from None
    own = ae.state_dict()
    wrong = [k for k in own if k not in state] + [k for k in state if k not in own]
    wrong += [k for k in own if k in state and own[k].shape != state[k].shape]
    if wrong:
        raise LoadError(f"{source}: missing, left over or misshapen: {', '.join(wrong[:4])}" + " ..." * (len(wrong) > 4))
    ae.load_state_dict(state)
    return ae.eval()


def load(path):
    """An Autoencoder in evaluation mode from a file, recognised by what is in it. Raises LoadError.

    Reads LDM's model.ckpt as downloaded, its first stage inside a full LDM checkpoint, bare state_dicts, and the
    checkpoints that train.py writes for either stage.
    """
    state = read(path)
    for key in ("dae", "state_dict"):                          # ours; Lightning's
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise LoadError(f"{path}: holds no autoencoder (expected a state_dict, found {type(state).__name__})")
    state = {k: v for k, v in state.items() if isinstance(k, str) and torch.is_tensor(v)}
    if any(k.startswith("first_stage_model.") for k in state):
        state = {k.removeprefix("first_stage_model."): v for k, v in state.items() if k.startswith("first_stage_model.")}
    state = {k: v.float() for k, v in state.items() if not k.startswith(("loss.", "model_ema."))}
    return from_state(state, path)
