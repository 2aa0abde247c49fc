"""Tests of the whole system, on a CPU, in about a minute: `python test_lvae.py [part of a name ...]`, or pytest.

They hold the models against reference values computed with the original code, check the mathematics against independent
implementations, and run the command lines as a user would, with good input and with bad.
"""
import contextlib
import copy
import dataclasses
import functools
import glob
import hashlib
import http.server
import importlib.util
import io
import json
import math
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import warnings
import zipfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import dae
import lvae
import sample
import train

HERE = os.path.dirname(os.path.abspath(__file__))

# ---------------------------------------------------------------- helpers

# Two levels of attention, widths that differ, several groups: small, but every kind of layer is there.
TINY = lvae.Config(resolution=16, data_channels=4, width=32, encoder_width=32, mult=(1,) * 4, ffn=(4,) * 4, groups=(3, 3, 2, 2),
                   encoder_layers=(2, 3, 2, 1), attention_layers=(2, 1, 0, 0), heads=(4, 8, 0, 0), z_dim=8)
TINY_CLASSES = dataclasses.replace(TINY, encoder_width=48, ffn=(4, 6, 8, 10), num_classes=10, hierarchical_prior=True)
SMALL = dae.Config(z_channels=4, width=32, mult=(1, 2), blocks=1, attention=(1,))

def filled(module, rename=lambda key: key):
    """Weights as a function of their names: what the reference values were computed with, without storing weights."""
    state = {}
    for key, value in module.state_dict().items():
        key, shape = rename(key), tuple(value.shape)
        if not key.endswith(".u"):
            a = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, dtype=np.float32)
            state[key] = torch.from_numpy(a / np.float32(math.sqrt(math.prod(shape[1:]))) if len(shape) > 1 else
                                          1 + 0.1 * a if key.endswith("weight") else 0.1 * a)
    return state

def released_name(key):
    """Our parameter's name in the authors' released weights."""
    parts = key.split(".")
    if parts[:2] == ["encoder", "levels"]:
        parts = ["encoder", "encoder_levels", parts[2], "layer_list", *parts[3:]]
    elif parts[0] == "levels":
        parts = ["layer_list", parts[1], "layer_list", *parts[2:]]
    names = {"qkv": "qkvproj", "out": "outproj", "out_proj": "outproj", "embedding": "embed", "initial": "initial_x"}
    parts = [names.get(p, p) for p in parts]
    if any(p in ("prior_block", "posterior_block") for p in parts) and parts[-2] == "dense2":
        parts.insert(-1, "conv")
    return ".".join(parts)

def reference_model(config):
    model = lvae.LVAE(dataclasses.replace(config, attention="released")).eval()
    model.load_state_dict(lvae.from_released(filled(model, released_name)))
    return model

def reference_noise(model, n=2):
    return [torch.from_numpy(np.random.default_rng(1000 + i).standard_normal((n, *shape), dtype=np.float32))
            for i, shape in enumerate(model.latent_shapes())]

def awake(config, seed=0, scale=1.0):
    """A model whose zero-initialised and tiny layers have been given weights, in evaluation mode."""
    torch.manual_seed(seed)
    model = lvae.LVAE(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * scale * 0.5 / math.sqrt(max(1, p[0].numel())))
    return model

def close(a, b, tolerance=1e-5):
    a, b = (t.detach() if torch.is_tensor(t) else torch.tensor(t) for t in (a, b))
    error = float((a - b).norm() / b.norm().clamp_min(1e-9))
    assert error < tolerance, f"relative error {error:.2e}"

def picks(x):
    """Eight values of a (2, 4, 16, 16) tensor."""
    return x[..., 3::6, 5::9][:, :2].flatten()[:8]

@contextlib.contextmanager
def folder():
    """A temporary folder that is the current one."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as path:
        os.chdir(path)
        try:
            yield path
        finally:
            os.chdir(before)

def photos(path, count=10, classes=("left", "right"), size=16):
    """A folder of small PNGs in class folders."""
    for c, name in enumerate(classes):
        os.makedirs(os.path.join(path, name), exist_ok=True)
        for i in range(count):
            image, _ = train.toy(8 * i + c, size)
            Image.fromarray(image).save(os.path.join(path, name, f"{i}.png"))

def quiet(function, *arguments):
    """Run a command's main in this process; returns what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        function(list(arguments))
    return out.getvalue()

FAST = ["--data", "photos", "--out", "run", "--image-size", "16", "--dae-width", "32", "--dae-mult", "1,1", "--dae-steps", "4",
        "--dae-batch", "4", "--width", "16", "--encoder-width", "16", "--groups", "1,1,1", "--encoder-layers", "1,1,1",
        "--mult", "1,1,1", "--ffn", "2,0,2", "--attention-layers", "0,0,0", "--heads", "0,0,0", "--steps", "4", "--batch", "4",
        "--log-every", "1", "--every", "2", "--holdout", "0.2",
        "--precision", "fp32"]

def trained(*options):
    """A checkpoint of a few steps on a few pictures, in the current folder."""
    photos("photos")
    quiet(train.main, *FAST, *options)
    return os.path.join("run", "checkpoint.pt")

def refused(expected, function, *arguments):
    """The command must end in one line that says `expected`."""
    try:
        quiet(function, *arguments)
    except (ValueError, OSError) as e:
        assert expected in str(e) and "\n" not in str(e), f"expected {expected!r} in {str(e)!r}"
        return
    raise AssertionError(f"not refused: {arguments}")

# ---------------------------------------------------------------- equal to the original code

def test_generation_equals_the_original():
    model = reference_model(TINY)
    close(picks(model.generate(reference_noise(model))),
          [-7.15309, 4.43881, -9.96485, -0.52472, -3.10727, -18.20146, 0.30003, 3.61808])
    model, label = reference_model(TINY_CLASSES), torch.tensor([0, 1])
    noise = reference_noise(model)
    close(picks(model.generate(noise, label)),
          [-3.13589, -3.19042, -7.53544, -6.77058, 4.48146, -13.22091, 0.95021, 3.85834])
    close(picks(model.generate(noise, label, mean_guidance=1.5, variance_guidance=0.5)),
          [-3.14659, -3.12228, -7.22835, -7.7586, 3.90352, -13.3559, 1.41633, 4.32155])
    close(picks(model.generate(noise, label, mean_guidance=[0, 1.5, 1, 0.5], variance_guidance=[0.5, 0.25, 0, 0.3])),
          [-2.98948, -2.98542, -7.27332, -7.28363, 4.25234, -13.19478, 1.19931, 4.1527])

def test_inference_equals_the_original():
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 4, 16, 16), dtype=np.float32))
    model = reference_model(TINY)
    out = model(x, noise=reference_noise(model))
    close(picks(out.mean), [-6.22288, 2.4089, -5.42245, 0.39339, -4.14541, -17.77948, -1.26039, 1.59639])
    close(picks(out.logvar), [3.03534, 1.49342, 19.87991, 9.32785, -1.84952, 5.18778, -15.4279, -1.64691])
    close(out.kl[:, 0], [0.0762, 0.038, 0.74, 2.9034, 12.2834, 12.0116, 49.0746, 136.19, 610.617, 843.9101])
    model = reference_model(TINY_CLASSES)
    out = model(x, torch.tensor([0, 1]), noise=reference_noise(model))
    close(picks(out.mean), [-8.25854, -11.91525, -15.57633, -10.9756, 2.78529, -15.29165, 2.86355, 5.21535])
    close(out.kl[:, 0], [0.0814, 0.0713, 1.2668, 3.5673, 18.9498, 33.0768, 53.0686, 458.4966, 1062.7463, 3549.3867])

def test_autoencoders_equal_the_original():
    x = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, (1, 3, 32, 32)).astype(np.float32))
    for name, side, latent, image in (
            ("kl-f8", 4, [-0.03595, -0.07759, -0.17218, 0.06318, 0.58589, -0.17296, -0.16594, 0.15891],
             [-0.5168, 0.1423, -0.89573, -0.50549, -1.15188, -0.57578, -1.43795, -0.76543]),
            ("vq-f4", 8, [0.12052, 0.16987, -0.27562, -0.06283, -0.29231, 0.3617, 0.06827, -0.4601],
             [-1.03127, -1.24748, -0.29836, -0.28563, -0.37182, 0.08105, 0.39748, -0.71605])):
        ae = dae.Autoencoder(dae.PRESETS[name]).eval()
        ae.load_state_dict(filled(ae))
        h = torch.from_numpy(np.random.default_rng(2).standard_normal((1, ae.config.z_channels, side, side), dtype=np.float32))
        with torch.no_grad():
            close(ae.encode(x).flatten()[::7][:8], latent, 1e-4)
            close(ae.decode(h).flatten()[100::211][:8], image, 1e-4)

def test_parameter_counts_are_those_of_table_5():
    counts = {"church": 119_137_672, "church-rgb32": 119_135_558, "church-upsampler": 62_868_326, "church-pixel": 143_320_038,
              "bedroom-f4": 96_241_478, "bedroom-f8": 107_179_944, "bedroom-f16": 99_837_632, "imagenet": 386_366_344}
    for name, count in counts.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in lvae.LVAE(lvae.PRESETS[name]).parameters()) == count, name

def test_every_name_in_the_map_exists():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        rows = re.findall(r"^\| .* \| (\w+)\.py \| `(\w+)` \|$", file.read(), re.MULTILINE)
    modules = {"lvae": lvae, "dae": dae, "train": train, "sample": sample}
    assert len(rows) >= 17 and not [row for row in rows if not hasattr(modules[row[0]], row[1])]

def test_copied_alone():
    for module in ("lvae", "dae"):
        with folder():
            with open(os.path.join(HERE, f"{module}.py")) as source, open(f"{module}.py", "w") as copy:
                copy.write(source.read())
            code = f"import sys, {module}; assert not {{'PIL', 'lvae', 'dae', 'train'}} - {{'{module}'}} & set(sys.modules)"
            subprocess.run([sys.executable, "-c", code], check=True, cwd=os.getcwd())

# ---------------------------------------------------------------- the mathematics

def test_gaussians_match_torch_distributions():
    torch.manual_seed(0)
    q, p = (lvae.gaussian(torch.randn(3, 8, 2, 2) * 3) for _ in range(2))
    normal = lambda g: torch.distributions.Normal(g.mean, g.var.sqrt())
    close(lvae.gaussian_kl(q, p), torch.distributions.kl_divergence(normal(q), normal(p)))
    close(lvae.gaussian(torch.zeros(1, 2, 1, 1)).var, torch.ones(1, 1, 1, 1), 1e-2)
    close(lvae.gaussian(torch.tensor([0.0, 3.0]).view(1, 2, 1, 1)).var.flatten(), [math.log1p(math.exp(0.693 * 3)) / 0.693])
    far = lvae.gaussian(torch.tensor([[0.0, -500.0], [0.0, 500.0]])[:, :, None, None])
    assert far.var.log().isfinite().all() and (far.var > 0).all()
    x, mean, logvar = torch.randn(3, 3, 4, 4, 4)
    out = lvae.Output(mean, logvar, torch.ones(10, 3), torch.zeros(()), [])
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(x, 0.07),
                                                 torch.distributions.Normal(mean, (0.5 * logvar).exp()))
    close(lvae.objective(out, x, TINY).distortion, expected.sum((1, 2, 3)).mean())

def test_spectral_term_is_the_largest_singular_value():
    torch.manual_seed(0)
    conv = lvae.SpectralConv2d(8, 12, 3, 1.0)
    before = conv.u.clone()
    for _ in range(200):
        conv.sigma()
    kernel = conv.weight.permute(2, 3, 1, 0).reshape(-1, 12)
    close(conv.sigma(), torch.linalg.svdvals(kernel)[0], 1e-4)
    assert not torch.equal(before, conv.u) and "u" in conv.state_dict()
    gradient, = torch.autograd.grad(conv.sigma(), conv.weight)
    U, S, V = torch.linalg.svd(kernel.detach())
    close(gradient.permute(2, 3, 1, 0).reshape(-1, 12), torch.outer(U[:, 0], V[0]), 1e-2)
    conv.eval()
    kept = conv.u.copy_(F.normalize(torch.randn(12), dim=0)).clone()
    conv.sigma()
    assert torch.equal(kept, conv.u)

    model = awake(TINY_CLASSES).train()
    for _ in range(100):
        total = model.spectral()
    expected = sum(side * torch.linalg.svdvals(conv.weight.flatten(1))[0]
                   for side, layers in zip((1, 4, 8, 16), model.levels) for block in layers if isinstance(block, lvae.TopDownBlock)
                   for conv in (block.prior_block.dense2, block.posterior_block.dense2))
    close(total, expected, 1e-2)
    assert lvae.LVAE(TINY).levels[0][0].prior_block.residual is False      # even where it is not regularised

def test_attention_mixes_positions():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 4, 4)
    for mode, mixes in (("sdpa", True), ("released", False)):
        layer = lvae.Attention(8, 2, mode)
        assert torch.equal(layer(x), x), "starts as the identity"
        torch.nn.init.normal_(layer.out.weight)
        moved = x.clone()
        moved[0, :, 3, 3] += 1
        assert torch.equal(layer(x)[0, :, 0, 0], layer(moved)[0, :, 0, 0]) != mixes
    layer = lvae.Attention(8, 2, "sdpa")
    torch.nn.init.normal_(layer.out.weight)
    reference = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    reference.load_state_dict({"in_proj_weight": layer.qkv.weight, "in_proj_bias": layer.qkv.bias,
                               "out_proj.weight": layer.out.weight, "out_proj.bias": layer.out.bias})
    tokens = x.flatten(2).transpose(1, 2)
    close(layer(x), x + reference(tokens, tokens, tokens)[0].transpose(1, 2).view_as(x))

def test_kl_schedule():
    shares = lvae.kl_shares(TINY)
    assert abs(float(shares.sum()) - 66.7) < 1e-3 and bool((shares.diff() > 0).all())
    close(shares[-1] / shares[0], 1010 / 11, 1e-4)
    per = lvae.kl_shares(dataclasses.replace(TINY, kl_schedule=("constant_per", 8, 4, 2, 1)))
    close(per / per[0], [1.0, 1, 2, 2, 4, 4, 4, 8, 8, 8])
    # total 100, shares 10 %: a = 10, 2a = 20, 3a = 30
    kl = torch.tensor([0.5, 5, 10, 15, 20, 25, 30, 40])[:, None] * 1.0
    shares = torch.full((8,), 10 / float(kl.sum()) * 100)
    close(lvae.kl_weights(kl, shares)[:, 0], [0.1, 0.5, 1, 1, 1, 1.5, 2, 2])
    kl.requires_grad_()
    assert not lvae.kl_weights(kl, shares).requires_grad and lvae.kl_weights(kl * 0, shares).isfinite().all()

def test_recomputing_gives_the_same_gradient():
    gradients = []
    for recompute in (False, True):
        model = awake(dataclasses.replace(TINY_CLASSES, recompute=recompute), scale=0.1).train()
        torch.manual_seed(1)
        out = model(torch.ones(2, 4, 16, 16), torch.tensor([1, 2]))              # draws noise inside the blocks
        lvae.objective(out, torch.ones(2, 4, 16, 16), model.config).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    close(gradients[1], gradients[0], 1e-6)

def test_objective_adds_up():
    model = awake(TINY_CLASSES, scale=0.1)
    x, label = torch.randn(3, 4, 16, 16), torch.tensor([1, 2, 3])
    out = model(x, label)
    losses = lvae.objective(out, x, model.config)
    close(losses.loss, losses.distortion + losses.weighted_rate + model.config.spectral_weight * out.spectral)
    weights = lvae.kl_weights(out.kl, lvae.kl_shares(model.config))
    close(losses.weighted_rate, (weights * out.kl).sum() / 3)
    losses.loss.backward()
    assert model.levels[0][0].prior_block.dense2.weight.grad.abs().sum() > 0

# ---------------------------------------------------------------- the model

def test_reconstruction_is_generation_from_encoded_noise():
    for config in (TINY, TINY_CLASSES):
        model, x = awake(config, scale=0.3), torch.randn(2, 4, 16, 16)
        label = torch.tensor([3, 4]) if config.num_classes else None
        noise = [torch.randn(2, *shape) for shape in model.latent_shapes()]
        eps = model.encode(x, label, noise)
        expected = model(x, label, noise).mean
        close(model.generate(eps, label), expected, 1e-4)
        assert not torch.allclose(model.generate([None] + eps[1:], label), expected, atol=1e-3)
        part = model.generate(eps[:4] + [None] * 6, label)
        assert part.shape == x.shape and part.isfinite().all()
        torch.manual_seed(5)
        drawn = model.encode(x, label)
        torch.manual_seed(5)
        close(model.generate(drawn, label), model(x, label).mean, 1e-4)

def test_guidance():
    c, u = (lvae.Gaussian(torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) + 0.1) for _ in range(2))
    mean, var = lvae.guide(c, u, 1.5, 0.5)
    close(mean, c.mean + 1.5 * (c.mean - u.mean))
    close(var.log(), c.var.log() + 0.5 * (c.var.log() - u.var.log()), 1e-4)
    model, label = awake(TINY_CLASSES, scale=0.3), torch.tensor([0, 1])
    noise = [torch.randn(2, *shape) for shape in model.latent_shapes()]
    plain = model.generate(noise, label)
    close(model.generate(noise, label, mean_guidance=0, variance_guidance=[0] * 4), plain, 1e-6)
    close(model.generate(noise, label, mean_guidance=1e-9), plain, 1e-4)               # two streams, the same result
    none = torch.tensor([10, 10])                              # guided away from no label: nowhere
    close(model.generate(noise, none, mean_guidance=2.0, variance_guidance=1.0), model.generate(noise, none), 1e-4)
    # One stochastic layer by hand (App. C): two streams, one guided prior, one z for both.
    block, embedded = model.levels[2][0], model.embedding(torch.tensor([0, 1, 10, 10]))
    x, eps = torch.randn(4, 32, 8, 8), torch.randn(2, 8, 8, 8)
    out, latent = block(x, embedded, eps, guidance=(1.5, 0.5))
    prior = lvae.gaussian(block.prior_block(x, embedded)[:, :16])
    by_hand = lvae.guide(lvae.Gaussian(prior.mean[:2], prior.var[:2]), lvae.Gaussian(prior.mean[2:], prior.var[2:]), 1.5, 0.5)
    close(latent.prior.mean, by_hand.mean), close(latent.prior.var, by_hand.var)
    z = by_hand.mean + by_hand.var.sqrt() * eps
    h = block.prior_block(x, embedded)[:, 16:]
    close(out, block.shared_block(x + h + block.zproj(torch.cat([z, z])), embedded))
    assert (model.generate(noise, label, mean_guidance=2.0) - plain).abs().max() > 1e-3
    for arguments in (dict(label=None, mean_guidance=1.0), dict(label=label, mean_guidance=[1.0, 2.0])):
        try:
            model.generate(noise, **arguments)
        except ValueError as e:
            assert "guidance" in str(e)
        else:
            raise AssertionError(arguments)

def test_temperature_and_size():
    model = awake(TINY, scale=0.3)
    close(model.generate(n=2, temperature=0.0), model.generate(n=2, temperature=0.0), 1e-6)
    noise = [torch.randn(2, *shape) for shape in model.latent_shapes()]
    close(model.generate(noise, temperature=0.5), model.generate([0.5 * e for e in noise]))
    assert model.generate(n=1, size=(16, 32)).shape == (1, 4, 16, 32)
    wide = [torch.randn(1, *shape) for shape in model.latent_shapes((32, 16))]
    assert wide[0].shape[2:] == (1, 1) and wide[2].shape[2:] == (8, 4)
    assert model.generate(wide).shape == (1, 4, 32, 16)
    try:
        model.generate([n[:, :4] for n in noise])
    except ValueError as e:
        assert "expected" in str(e)
    else:
        raise AssertionError("misshapen noise accepted")

def test_labels():
    model = awake(TINY_CLASSES, scale=0.3)
    x, label = torch.randn(2, 4, 16, 16), torch.tensor([1, 2])
    noise = [torch.randn(2, *shape) for shape in model.latent_shapes()]
    assert not torch.allclose(model.generate(noise, 1), model.generate(noise, 2), atol=1e-3)
    close(model.generate(noise), model.generate(noise, torch.tensor([10, 10])))
    # In training all labels may be lost, but never on the way to the posterior's features.
    blind = dataclasses.replace(TINY_CLASSES, label_dropout=1.0)
    model.config = blind
    seen = []
    hook = model.encoder.levels[0][0].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[1]))
    trained_mean = model.train()(x, label, noise).mean
    assert torch.equal(seen[0], model.embedding(label))
    hook.remove()
    assert not torch.allclose(trained_mean, model.eval()(x, label, noise).mean, atol=1e-4)
    for bad in (11, -1, [0, 99]):
        try:
            model.generate(label=bad)
        except ValueError as e:
            assert "out of range" in str(e)
        else:
            raise AssertionError(f"label {bad} accepted")

def test_blocks_start_near_the_identity():
    torch.manual_seed(0)
    model = lvae.LVAE(TINY_CLASSES)
    x, label = torch.randn(2, 32, 8, 8), torch.randn(2, 32)
    for block, limit in ((model.levels[2][0].shared_block, 0.5), (model.encoder.levels[1][0], 0.6)):
        x_in = torch.randn(2, block.conv1.in_channels, 8, 8)
        assert (block(x_in, label) - x_in).norm() < limit * x_in.norm()
    prior = model.levels[2][0].prior_block(x, label)
    assert prior.abs().max() < 1e-6
    close(lvae.gaussian(prior[:, :16]).var, torch.ones(2, 8, 8, 8), 1e-2)
    assert torch.equal(model.initial, torch.zeros_like(model.initial))

def test_upsampler():
    config = lvae.Config(resolution=32, data_channels=3, width=16, encoder_width=16, upsample=4, mult=(1, 2, 2), ffn=(0, 0, 2),
                         groups=(1, 2, 2), encoder_layers=(1, 1, 2), attention_layers=(0, 0, 1), heads=(0, 0, 2))
    assert lvae.resolutions(config) == [32, 16, 8]
    model, x, small = awake(config, scale=0.3), torch.randn(2, 3, 32, 32), torch.randn(2, 3, 8, 8)
    noise = [torch.randn(2, *shape) for shape in model.latent_shapes()]
    close(model.generate(model.encode(x, noise=noise, low_res=small), low_res=small), model(x, noise=noise, low_res=small).mean, 1e-4)
    shrunk = F.interpolate(x, scale_factor=0.25, mode="bilinear", antialias=True)
    close(model(x, noise=noise).mean, model(x, noise=noise, low_res=shrunk).mean, 1e-6)
    assert not torch.allclose(model.generate(noise, low_res=small), model.generate(noise, low_res=small + 1))

def test_fp32_where_it_matters():
    model, x = awake(TINY_CLASSES, scale=0.1), torch.randn(2, 4, 16, 16)
    noise = [torch.randn(2, *shape) for shape in model.latent_shapes()]
    label = torch.tensor([0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, label, noise)
        inside = model.spectral()
    assert {out.mean.dtype, out.logvar.dtype, out.kl.dtype, out.spectral.dtype} == {torch.float32}
    assert all(t.dtype == torch.float32 for latent in out.latents for g in (latent.prior, latent.posterior) for t in g)
    close(inside, model.spectral(), 1e-6)
    close(out.mean, model(x, label, noise).mean, 0.05)

def test_bad_configs_are_named():
    for field, value in (("resolution", 12), ("groups", (1, 2)), ("attention", "flash"), ("heads", (5, 8, 0, 0)),
                         ("kl_schedule", ("linear", 1)), ("groups", (0, 1, 1, 1)), ("sigma_q", 0.0)):
        try:
            dataclasses.replace(TINY, **{field: value})
        except ValueError as e:
            assert field in str(e), e
        else:
            raise AssertionError(f"{field} = {value} accepted")

# ---------------------------------------------------------------- the update

def updated(config, seed=0):
    torch.manual_seed(seed)
    model = lvae.LVAE(config).train()
    return model, copy.deepcopy(model).eval(), lvae.make_optimizer(model)

def test_a_whole_training_as_the_docstring_has_it():
    code = textwrap.dedent("\n".join(line for line in lvae.__doc__.splitlines() if line.startswith("    ") and "log p" not in line
                                     and "distortion  " not in line))
    small = dataclasses.replace(TINY_CLASSES, steps=2, batch=2)
    scope = dict(lvae=lvae, torch=torch, copy=copy, replace=dataclasses.replace, h=torch.randn(6, 4, 16, 16) * 3, labels=torch.arange(6))
    presets, lvae.PRESETS["toy"] = dict(lvae.PRESETS), small
    try:
        exec(code, scope)
    finally:
        lvae.PRESETS.update(presets)
    assert scope["step"] == 2 and scope["h"].shape == (4, 4, 16, 16) and not scope["stats"]["skipped"]

def test_overfits_one_batch():
    config = lvae.Config(resolution=8, data_channels=2, width=32, encoder_width=32, mult=(1,) * 3, ffn=(2,) * 3, groups=(2, 2, 1),
                         encoder_layers=(1, 1, 1), attention_layers=(1, 0, 0), heads=(2, 0, 0), z_dim=4, hierarchical_prior=True,
                         sigma_q=0.1, lr=3e-3, warmup=20)
    model, ema, optimizer = updated(config)
    x = torch.randn(4, 2, 8, 8)
    losses = [float(lvae.train_step(model, ema, optimizer, [(x,)], step)["loss"]) for step in range(1, 351)]
    assert losses[-1] < 0.4 * losses[0], (losses[0], losses[-1])
    rec = model.eval().generate(model.encode(x))
    assert (rec - x).square().mean() < 0.1 * x.square().mean(), "reconstructions are not the batch"

def test_a_skipped_step_leaves_no_trace():
    model, ema, optimizer = updated(dataclasses.replace(TINY, warmup=0))
    x = torch.randn(2, 4, 16, 16)
    assert not lvae.train_step(model, ema, optimizer, [(x,)], 1)["skipped"]

    def everything():
        moments = [v for s in optimizer.state.values() for v in s.values()]
        return [t.clone() for t in [*model.state_dict().values(), *ema.state_dict().values(), *moments]]
    before = everything()
    assert lvae.train_step(model, ema, optimizer, [(x * float("nan"),)], 2)["skipped"]
    model.config = dataclasses.replace(model.config, skip_threshold=1e-9)
    assert lvae.train_step(model, ema, optimizer, [(x,)], 1001)["skipped"], "an exploding gradient was not skipped"
    assert all(torch.equal(a, b) for a, b in zip(before, everything())), "not even the spectral vectors may move"
    assert not lvae.train_step(model, ema, optimizer, [(x,)], 1000)["skipped"], "the threshold holds after step 1000 only"

def test_the_average_is_warmed_up():
    model, ema, optimizer = updated(dataclasses.replace(TINY, ema=0.9, lr=1e-30))
    ema.initial.data.zero_(), model.initial.data.fill_(1)
    lvae.train_step(model, ema, optimizer, [(torch.randn(1, 4, 16, 16),)], 1)
    close(ema.initial, torch.full_like(ema.initial, 1 - 2 / 11), 1e-4)
    for mine, current in zip(ema.buffers(), model.buffers()):
        assert torch.equal(mine, current)

def test_accumulation_is_a_larger_batch():
    gradients, x = [], torch.randn(4, 4, 16, 16)
    for parts in (1, 2):
        model, ema, optimizer = updated(TINY)
        model.eval()                                           # one power-iteration state for both
        noise, _ = lvae.draw_noise(model, 4, torch.device("cpu"))
        split = zip(x.chunk(parts), *(eps.chunk(parts) for eps in noise))
        seen = []
        lvae.train_step(model, ema, optimizer, [(part, None, eps) for part, *eps in split], 1, average=seen.extend)
        gradients.append(torch.cat([g.flatten() for g in seen]))
    close(gradients[1], gradients[0], 1e-4)

def test_nothing_looks_from_the_host():
    """On the meta device, where hidden CPU tensors and looks at a tensor's content fail, as on a GPU they would cost."""
    with torch.device("meta"):
        model, x, label = lvae.LVAE(TINY_CLASSES).train(), torch.randn(2, 4, 16, 16), torch.zeros(2, dtype=torch.long)
        noise, dropped = lvae.draw_noise(model, 2, x.device)
        out = model(x, label, noise, None, dropped)
        lvae.objective(out, x, model.config).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        assert model.generate(noise, label, mean_guidance=1.5, variance_guidance=[0.0, 1, 1, 2]).shape == x.shape
        for codebook in (0, 16):
            ae = dae.Autoencoder(dataclasses.replace(SMALL, codebook=codebook))
            assert ae.decode(ae.encode(torch.randn(2, 3, 16, 16))).shape == (2, 3, 16, 16)
        ae = dae.Autoencoder(SMALL)
        loss, hinge, _ = dae.training_losses(ae, torch.randn(2, 3, 32, 32), None, dae.Discriminator(16))
        loss.backward(), hinge.backward()

# ---------------------------------------------------------------- the autoencoder and its files

def test_autoencoder_training():
    torch.manual_seed(0)
    ae = dae.Autoencoder(dataclasses.replace(SMALL, kl_weight=0.5, adversarial_weight=0.5))
    discriminator, x = dae.Discriminator(16), torch.rand(2, 3, 32, 32) * 2 - 1
    loss, hinge, terms = dae.training_losses(ae, x, None, discriminator, perceptual=lambda a, b: (a - b).square().mean((1, 2, 3)))
    assert {"l1", "perceptual", "kl", "adversarial", "adversarial_weight", "discriminator"} == terms.keys()
    pixels = 3 * 32 * 32
    close(loss, pixels * (terms["l1"] + terms["perceptual"]) + 0.5 * terms["kl"] + terms["adversarial_weight"] * terms["adversarial"],
          1e-4)
    mean, logvar = ae.moments(x)
    standard = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (0.5 * logvar).exp()), standard)
    close(terms["kl"], kl.sum((1, 2, 3)).mean(), 1e-4)
    assert torch.equal(ae.encode(x), mean)
    hinge.backward()
    assert all(p.grad is None for p in ae.parameters())        # the discriminator's loss does not move the autoencoder
    loss.backward()
    assert all(p.grad is not None for p in ae.parameters())
    assert dae.training_losses(ae, x)[1] is None

def test_vq_decodes_the_nearest_entry():
    ae = dae.Autoencoder(dataclasses.replace(SMALL, codebook=16))
    h = torch.randn(2, 4, 3, 3)
    nearest = ae.quantize(h)
    table = ae.quantize.embedding.weight
    for b, i, j in ((0, 0, 0), (1, 2, 1)):
        best = min(table.detach(), key=lambda row: float((row - h[b, :, i, j]).square().sum()))
        assert torch.equal(nearest[b, :, i, j], best)
    assert torch.equal(ae.decode(h), ae.decode(nearest))

class Callback:
    """Stands for a class of a training framework that the reader of a file does not have."""

    def __init__(self, state):
        self.state = state

class Hostile:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

def test_foreign_checkpoints():
    with folder():
        ae = dae.Autoencoder(dataclasses.replace(SMALL, mult=(1, 2, 2), attention=(2,), codebook=8))
        x = torch.rand(1, 3, 16, 16)
        state = ae.state_dict()                                # an OrderedDict with _metadata, as Lightning saves it
        def plus(more):
            together = state.copy()
            together.update(more)
            return together
        extra = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(3), "model_ema.decay": torch.ones(())}
        files = {"lightning.ckpt": {"state_dict": plus(extra), "callbacks": {Callback: Callback({"a": 1})}, "epoch": 3},
                 "whole.ckpt": {"state_dict": {"first_stage_model." + k: v for k, v in state.items()} | {"model.x": x}}, "bare.pt": state}
        for name, content in files.items():
            torch.save(content, name)
            loaded = dae.load(name)
            assert loaded.config.mult == (1, 2, 2) and loaded.config.attention == (2,) and loaded.config.codebook == 8
            with torch.no_grad():
                close(loaded.decode(loaded.encode(x)), ae.decode(ae.encode(x)), 1e-6)
        assert not os.path.exists("broken-in"), "a file ran code"

        torch.save({"state_dict": plus({"encoder.extra.weight": x})}, "more.ckpt")
        torch.save({"state_dict": {k: v for k, v in state.items() if k != "decoder.conv_out.bias"}}, "less.ckpt")
        with open("lightning.ckpt", "rb") as whole, open("cut.ckpt", "wb") as cut:
            cut.write(whole.read()[:20_000])
        with open("text.ckpt", "w") as text:
            text.write("hello")
        for name, message in (("more.ckpt", "encoder.extra.weight"), ("less.ckpt", "decoder.conv_out.bias"),
                              ("cut.ckpt", "truncated"), ("text.ckpt", "not a checkpoint"), ("none.ckpt", "No such file")):
            refused(message, lambda arguments: dae.load(arguments[0]), name)

def as_old_diffusers(state):
    for new, old in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
        state = {k.replace(new, old): v for k, v in state.items()}
    return state

def test_every_naming_of_autoencoders():
    """One autoencoder with attention inside a level and an odd width, and one without any, in every file that people have."""
    with folder():
        for config in (dae.Config(z_channels=6, width=32, mult=(1, 3, 2), blocks=2, attention=(2,)),
                       dae.Config(z_channels=3, width=64, mult=(1, 2), blocks=1, mid_attention=False, codebook=8)):
            ae = dae.Autoencoder(config)
            state = ae.state_dict()
            theirs = dae.to_diffusers(state)
            assert theirs.keys().isdisjoint(state.keys() - {k for k in state if "conv_in" in k or "conv_out" in k or "quant" in k})
            assert dae.from_diffusers(theirs).keys() == state.keys()
            finest = len(config.mult) - 1
            assert theirs[f"decoder.up_blocks.{finest}.resnets.1.conv2.weight"] is state["decoder.up.0.block.1.conv2.weight"]
            assert theirs["decoder.up_blocks.0.upsamplers.0.conv.bias"] is state[f"decoder.up.{finest}.upsample.conv.bias"]
            assert all(v.ndim == 2 for k, v in theirs.items() if k.endswith("to_q.weight"))
            torch.save({"state_dict": state, "epoch": 1}, "model.ckpt")
            with zipfile.ZipFile("download.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                archive.write("model.ckpt")
            torch.save({"state_dict": {"first_stage_model." + k: v for k, v in state.items()} | {"model.x": torch.ones(1)}}, "full.ckpt")
            torch.save(state, "before-1.6.pt", _use_new_zipfile_serialization=False)
            torch.save(as_old_diffusers(theirs), "old.bin")
            torch.save({"vae." + k: v for k, v in theirs.items()}, "vae.bin")
            torch.save({"dae." + k: v for k, v in state.items()} | {"dae.loss.x": torch.ones(1), "vae.y": torch.ones(1)}, "pipeline.pt")
            torch.save({"dae": state, "optimizer": {}, "step": 1}, "ours.pt")
            for name, weights in (("ldm", state), ("diffusers", theirs)):
                for dtype in (torch.float32, torch.float16, torch.bfloat16):
                    cast = {k: v.to(dtype) for k, v in weights.items()}
                    dae.write(f"{name}-{str(dtype)[6:]}.safetensors", lambda file: dae.save_safetensors(cast, file))
            files = os.listdir(".")
            assert len(files) == 14
            for name in files:
                loaded = dae.load(name)
                assert all(getattr(loaded.config, k) == getattr(config, k) for k in dae.ARCHITECTURE), name
                dtype = torch.float16 if "float16" in name and "b" not in name.split("-")[1] else torch.bfloat16 if "bfloat16" in name else torch.float32
                for k, v in loaded.state_dict().items():
                    assert torch.equal(v, state[k].to(dtype).float()) and v.dtype == torch.float32, (name, k)
            quiet(dae.main, "convert", "model.ckpt", "there.safetensors")
            quiet(dae.main, "convert", "there.safetensors", "back.ckpt")
            back = torch.load("back.ckpt", weights_only=True)["state_dict"]
            assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items()), "not the same bits"
            said = quiet(dae.main, "info", "full.ckpt")
            assert "first_stage_model" in said and "model.* (1 tensors)" in said and f"{sum(v.numel() for v in state.values()):,}" in said
            for name in os.listdir("."):
                os.remove(name)

def test_hostile_files():
    """A call, cuts, an overlap, a bomb, a tensor larger than its storage, a maze, texts: nothing runs, hangs or is let in."""
    state = dae.Autoencoder(SMALL).state_dict()
    with folder():
        torch.save({"state_dict": Hostile(os.system, "touch broken-in")}, "call.pt")
        torch.save({"state_dict": Hostile(eval, "open('broken-in', 'w')")}, "old-call.pt", _use_new_zipfile_serialization=False)
        torch.save({"a": torch.zeros(1).expand(1 << 20, 1 << 10)}, "expanded.pt")
        torch.save({"encoder.conv_in.weight": torch.zeros(2, 2).to_sparse()}, "sparse.pt")
        torch.save(state, "cut.pt"), os.truncate("cut.pt", os.path.getsize("cut.pt") - 30)
        torch.save(state, "old-cut.pt", _use_new_zipfile_serialization=False), os.truncate("old-cut.pt", 999)
        header = json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]} for name, at in (("a", 0), ("b", 4))}).encode()
        contents = {"overlap.safetensors": struct.pack("<Q", len(header)) + header + bytes(12), "text.pt": b"hello", "empty.pt": b"",
                    "length.safetensors": struct.pack("<Q", 1 << 60) + b"{", "page.pt": b"<!DOCTYPE html>",
                    "plain.pt": pickle.dumps(Hostile(os.system, "touch broken-in"))}
        for name, content in contents.items():
            with open(name, "wb") as file:
                file.write(content)
        for name, pickled in (("bomb.pt", b"\x80\x02}."), ("deep.pt", b"\x80\x02" + b")" + b"\x85" * 300_000 + b".")):
            with zipfile.ZipFile(name, "w", zipfile.ZIP_DEFLATED if name == "bomb.pt" else zipfile.ZIP_STORED) as archive:
                archive.writestr("a/data.pkl", pickled), archive.writestr("a/data/0", bytes(50 << 20 if name == "bomb.pt" else 4))
        for name in os.listdir("."):
            started = time.time()
            for reader in (dae.load, train.load_checkpoint):
                refused(name, lambda path: reader(path[0]), name)
            assert not os.path.exists("broken-in"), f"{name} ran code"
            assert time.time() - started < 30, f"{name} hangs"
        for path in (".", os.devnull):
            refused("folder or a device", lambda arguments: dae.load(arguments[0]), path)

def test_downloads():
    """A published autoencoder by its name: from a server, then from the cache, or one line that says where to put it."""
    with folder() as path:
        ae = dae.Autoencoder(SMALL)
        torch.save({"state_dict": ae.state_dict()}, "model.ckpt")
        with zipfile.ZipFile("kl-f8.zip", "w") as archive:
            archive.write("model.ckpt")
        with open("kl-f4.zip", "wb") as file:
            file.write(b"PK\x03\x04 half a zip")
        os.chdir(path)
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=path)
        handler.func.log_message = lambda *arguments: None
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        addresses, cache = dict(dae.ADDRESSES), torch.hub.get_dir()
        assert addresses["vq-f4-noattn"] == "https://ommer-lab.com/files/latent-diffusion/vq-f4-noattn.zip" and len(addresses) == 9
        torch.hub.set_dir(os.path.join(path, "hub"))
        load = lambda arguments: quiet(lambda names: dae.load(*names), *arguments)
        dae.ADDRESSES.update({name: f"http://127.0.0.1:{server.server_port}/{name}.zip" for name in addresses})
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                os.mkdir("elsewhere"), os.chdir("elsewhere")
                loaded = dae.load("kl-f8")
            os.chdir(path)
            assert torch.equal(loaded.decoder.conv_out.weight, ae.decoder.conv_out.weight)
            with zipfile.ZipFile("vq-f8.zip", "w") as junk:
                junk.writestr("model.ckpt", b"junk")
            with zipfile.ZipFile("vq-f16.zip", "w") as mac:
                mac.writestr("__MACOSX/._model.ckpt", b"junk")
            for name, message in (("kl-f4", "could not be downloaded"), ("vq-f8", "not a checkpoint"), ("vq-f16", "holds no .ckpt"), ("vq-f4", "vq-f4.zip as it is")):
                refused(message, load, name)
            server.shutdown()
            server.server_close()
            assert torch.equal(dae.load("kl-f8").decoder.conv_out.weight, ae.decoder.conv_out.weight), "not cached"
            refused(os.path.join(path, "hub", "checkpoints"), load, "kl-f16")
            assert os.listdir(os.path.join(path, "hub", "checkpoints")) == ["kl-f8.ckpt"]
        finally:
            dae.ADDRESSES.update(addresses)
            torch.hub.set_dir(cache)
            os.chdir(path)

def test_released_pipelines():
    """The authors' file: sampled with the paper's guidance and class names, reconstructed with, and trained on from."""
    config = dataclasses.replace(TINY_CLASSES, num_classes=1000, shift=0.5, scale=2.0, batch=2)
    model, ae = reference_model(config), dae.Autoencoder(dataclasses.replace(SMALL, attention=()))
    flat = {"vae." + released_name(k): v for k, v in model.state_dict().items() if not k.endswith(".u")}
    flat |= {"dae." + k: v for k, v in ae.state_dict().items()} | {"dae.loss.logvar": torch.zeros(())}
    presets = dict(lvae.PRESETS)
    with folder():
        torch.save(flat, "inet_pipeline.pt")
        refused("of no preset", lambda arguments: sample.Sampler(arguments[0]), "inet_pipeline.pt")
        lvae.PRESETS["imagenet"] = config
        try:
            sampler = sample.Sampler("inet_pipeline.pt", precision="fp32")
            assert sampler.config == dataclasses.replace(config, attention="released") and sampler.size == 32
            noise = reference_noise(model)
            close(sampler.model.generate(noise, torch.tensor([0, 1])), model.generate(noise, torch.tensor([0, 1])), 1e-6)
            assert sampler.label("tench") == sampler.label("TENC") == sampler.label("0") == 0 and sampler.label("toilet t") == 999
            assert sampler.label("Crane") == 517 and sampler.name(134) == "crane bird"
            refused("great white shark, great grey owl", lambda a: sampler.label(a[0]), "great")
            pictures = []
            for options in ([], ["--mean-guidance", "0,1.5,1.5,1.5", "--variance-guidance", "3"], ["--mean-guidance", "0"]):
                quiet(sample.main, "generate", "inet_pipeline.pt", "--label", "tench", "--n", "2", "--png-dir", "p", *options)
                pictures.append(np.asarray(Image.open("p/000001.png")))
            assert np.array_equal(pictures[0], pictures[1]), "the paper's guidance is not the default"
            assert not np.array_equal(pictures[0], pictures[2])
            photos("photos", count=2, classes=("a", "b"), size=32)
            said = quiet(sample.main, "reconstruct", "inet_pipeline.pt", "photos/a/0.png")
            assert "--label" in said and os.path.exists("reconstructions.png")
            refused("cannot be matched", train.main, "--init", "inet_pipeline.pt", "--data", "photos", "--out", "x")
            np.savez("latents.npz", latents=np.random.default_rng(0).standard_normal((8, 4, 16, 16)), labels=np.arange(8) * 100)
            begin = ["--init", "inet_pipeline.pt", "--data", "latents.npz", "--lr", "1e-9", "--warmup", "0", "--precision", "fp32",
                     "--out", "run", "--holdout", "0", "--log-every", "1"]
            quiet(train.main, *begin, "--steps", "1")
            quiet(train.main, *begin, "--steps", "2")
            state = torch.load("run/checkpoint.pt", weights_only=True)
            assert state["step"] == 2 and state["config"]["attention"] == "released" and state["config"]["scale"] == 2.0
            close(state["model"]["out_proj.weight"], model.out_proj.weight, 1e-5)
            close(state["ema"]["out_proj.weight"], model.out_proj.weight, 1e-5)
            assert torch.equal(state["dae"]["decoder.conv_out.weight"], ae.decoder.conv_out.weight), "resuming lost the autoencoder"
            assert sample.Sampler("run/checkpoint.pt").dataset == "imagenet" and sample.Sampler("run/checkpoint.pt").label("tench") == 0
            refused("not of church", train.main, "--dataset", "church", "--init", "inet_pipeline.pt", "--data", "photos")
        finally:
            lvae.PRESETS.clear()
            lvae.PRESETS.update(presets)

# ---------------------------------------------------------------- figures and metrics

def test_noise_may_be_a_function_and_labels_a_mixture():
    model, label = awake(TINY_CLASSES, scale=0.3), torch.tensor([0, 1])
    x = torch.randn(2, 4, 16, 16)
    latents = model(x, label).latents
    impose = [lambda prior, z=latent.z: (z - prior.mean) / prior.var.sqrt() for latent in latents]
    close(model.generate(impose, label), model.generate([impose[i](l.prior) for i, l in enumerate(latents)], label), 1e-4)
    noise = [torch.randn(2, *shape) for shape in model.latent_shapes()]
    table = model.embedding.weight
    assert torch.equal(model.generate(noise, table[:2]), model.generate(noise, label))
    close(model.generate(noise, table[:2], mean_guidance=1.0), model.generate(noise, label, mean_guidance=1.0), 1e-6)
    assert not torch.allclose(model.generate(noise, table[:2].lerp(table[2:4], 0.5)), model.generate(noise, label))
    try:
        model.generate(noise, torch.zeros(2, 3))
    except ValueError as e:
        assert "expected (2, 32)" in str(e)
    else:
        raise AssertionError("a misshapen embedding was accepted")

def cells(path, rows, columns, size, gap=2):
    """The images of a grid picture, its names left aside."""
    picture, scale = np.asarray(Image.open(path).convert("RGB")).astype(int), -(-128 // size)
    step = size * scale + gap
    picture = picture[-rows * step:, -columns * step:]         # the names are above and to the left
    return [[picture[r * step:r * step + size * scale:scale, c * step:c * step + size * scale:scale] for c in range(columns)]
            for r in range(rows)]

def test_figures():
    with folder():
        for prior, options in (("hierarchical", ["--hierarchical-prior"]), ("normal", ["--no-hierarchical-prior", "--num-classes", "0"])):
            path = trained("--groups", "1,2,2", "--out", prior, *options).replace("run", prior)
            a, b = os.path.join("photos", "left", "0.png"), os.path.join("photos", "right", "1.png")
            quiet(sample.main, "reconstruct", path, a, b, "--groups", "1,5")
            original, _, reconstruction, first, whole = cells("reconstructions.png", 5, 2, 16)
            assert np.array_equal(whole[0], reconstruction[0]) and not np.array_equal(first[0], reconstruction[0])
            assert np.array_equal(original[0], train.read_image(a, 16))
            sampler = sample.Sampler(path)
            images, x, label = sample.read_photos(sampler, [a, b])
            ends = sampler.images(sampler.posterior(x, label), label).astype(int)
            steps = interpolated(path, a, b)
            assert np.abs(steps[0] - ends[0]).max() <= 1 and np.abs(steps[-1] - ends[1]).max() <= 1, "the ends are not reconstructions"
            assert np.abs(ends[0] - reconstruction[0]).max() <= 1
            eps, drawn = sampler.posterior(x, label), sampler.noise(0, [0, 1])
            assert np.abs(sampler.images(eps[:1] + drawn[1:], label)[0].astype(int) - first[0]).max() <= 1
            said = quiet(sample.main, "manifold", path, "--steps", "3")
            assert "group 1, channel" in said and os.path.exists("manifold.png")
            assert "KL over data" in quiet(sample.main, "manifold", path, "--steps", "2", "--data", "photos")
            for direction, size in (("right", (32, 16)), ("left", (32, 16)), ("both", (48, 16)), ("down", (16, 32)), ("up", (16, 32))):
                said = quiet(sample.main, "outpaint", path, a, "--direction", direction, *["--width", "3"] * (direction == "both"))
                assert f"{size[0]}x{size[1]} pixels" in said and "dB to the reconstruction" in said
            said = quiet(sample.main, "rates", path, "--data", "photos")
            shares = [float(line.split()[3]) for line in said.splitlines() if line.endswith("of 16") and line.split()[0].isdigit()]
            assert len(shares) == 5 and abs(sum(shares) - 100) < 0.3 and "bits per dimension of the autoencoder's latents" in said and "20 images" in said
            said = quiet(sample.main, "neighbors", path, "--data", "photos", "--n", "2", "--neighbors", "3")
            assert said.count(".png (") == 6 and os.path.exists("neighbors.png")
        refused("from 2 up", sample.main, "interpolate", path, a, b, "--steps", "1")
        refused("has 5 latent groups", sample.main, "reconstruct", path, a, "--groups", "6")
        refused("two latent groups", sample.main, "manifold", trained("--out", "few").replace("run", "few"))

def interpolated(path, a, b):
    """The generated images of `interpolate`, before they become a picture."""
    seen, real = [], sample.save_grid
    sample.save_grid = lambda name, rows, **names: seen.extend(rows[0][1:-1])
    try:
        quiet(sample.main, "interpolate", path, a, b)
    finally:
        sample.save_grid = real
    return [image.astype(int) for image in seen]

def test_outpainting_keeps_the_image():
    """Without attention or wide convs between them, what is beside an image does not change it."""
    config = dataclasses.replace(TINY_CLASSES, attention_layers=(0, 0, 0, 0), heads=(0, 0, 0, 0), shift=127.5, scale=127.5, data_channels=3,
                                 first_stage="none")
    torch.manual_seed(0)
    state = {"config": config, "run": {}, "dataset": "toy", "classes": [], "ema": awake(config, scale=0.05).state_dict(), "dae": {}}
    with folder():
        Image.fromarray(train.toy(0, 16)[0]).save("a.png")
        seen, real_load, real_save = [], sample.load_checkpoint, sample.save_grid
        sample.load_checkpoint, sample.save_grid = lambda path: state, lambda name, rows, **names: seen.append(rows[0])
        try:
            for direction, left in (("right", 0), ("left", 16)):
                quiet(sample.main, "outpaint", "x", "a.png", "--direction", direction, "--label", "0")
                _, reconstruction, wide = seen.pop()
                kept = wide[:, left:left + 16].astype(int)
                assert np.abs(kept - reconstruction).mean() < 0.5 * np.abs(wide[:, 16 - left:32 - left].astype(int) - reconstruction).mean()
            # Whatever the wide image's prior, the posterior's z stands where the image does; the 1x1 groups are kept whole.
            sampler = sample.Sampler("x", precision="fp32")
            with torch.no_grad():
                expected = [l.z for l in sampler.model(sampler.latents([train.read_image("a.png", 16)]), torch.tensor([0]), sampler.means(1)).latents]
            given, real_images = [], sample.Sampler.images
            sample.Sampler.images = lambda self, noise, *rest, **options: given.append(noise) or real_images(self, noise, *rest, **options)
            quiet(sample.main, "outpaint", "x", "a.png", "--direction", "both", "--width", "3", "--label", "0", "--precision", "fp32")
            sample.Sampler.images = real_images
            for eps, z, shape in zip(given[0], expected, sampler.model.latent_shapes((16, 48))):
                prior = lvae.Gaussian(torch.randn(1, *shape), torch.rand(1, *shape) + 0.5)
                wide = prior.mean + prior.var.sqrt() * eps(prior)
                third = shape[2] // 3 if shape[2] > 1 else 0
                close(wide[..., third:third + z.shape[3]], z, 1e-4)
        finally:
            sample.load_checkpoint, sample.save_grid = real_load, real_save

def test_metrics():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((60, 8)).astype(np.float32), 0.2 + 1.3 * rng.standard_normal((80, 8)).astype(np.float32)
    mu, sigma = sample.moments(a)
    close(sigma, (a - a.mean(0)).T.astype(np.float64) @ (a - a.mean(0)) / 59, 1e-5)
    other = sample.moments(b)
    roots = np.sqrt(np.linalg.eigvals(sigma @ other[1]).real.clip(0)).sum()
    close(sample.frechet(mu, sigma, *other), ((mu - other[0]) ** 2).sum() + np.trace(sigma) + np.trace(other[1]) - 2 * roots, 1e-6)
    assert sample.frechet(mu, sigma, mu, sigma) < 1e-9
    few = sample.moments(a[:5])                                # fewer images than features
    assert np.isfinite(sample.frechet(*few, mu, sigma))
    distance = lambda x, y: np.linalg.norm(x[:, None].astype(np.float64) - y[None], axis=2)
    ball = lambda x: np.sort(distance(x, x), axis=1)[:, 3]
    between = distance(a, b)
    expected = (between <= ball(a)[:, None]).any(0).mean(), (between <= ball(b)[None]).any(1).mean()
    assert sample.precision_recall(a, b) == expected and 0 < expected[0] < 1
    p = rng.dirichlet(np.ones(10), 7000)
    parts = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in (p[:5000], p[5000:])]
    close(sample.inception_score(p), np.mean(parts), 1e-6)
    assert sample.inception_score(np.eye(10)) > 9.99           # probabilities of 0

class Inception(torch.nn.Module):
    """The interface of the usual network, small."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = torch.nn.Conv2d(3, 6, 4, 4), torch.nn.Linear(6, 5)

    def forward(self, img: torch.Tensor, use_fp16: bool = False, return_features: bool = False, no_output_bias: bool = False):
        x = self.conv(img.float()).mean([2, 3])
        if return_features:
            return x
        return torch.softmax(F.linear(x, self.out.weight) if no_output_bias else self.out(x), 1)

class Mean(torch.nn.Module):
    """Features only."""

    def forward(self, x):
        return x.float().mean([2, 3]).repeat(1, 3)

class Broken(torch.nn.Module):
    def forward(self, x):
        return x.float().mean([2, 3]) * float("nan")

def test_evaluation():
    with folder(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = trained()
        torch.manual_seed(0)
        network = Inception()
        network.out.bias.data[0] = 100                         # must not count
        torch.jit.script(network).save("inception.pt")
        torch.jit.script(Mean()).save("plain.pt")
        torch.jit.script(Broken()).save("nan.pt")
        np.savez("nan.npz", mu=np.zeros(6), sigma=np.full((6, 6), np.nan))
        np.save("array.npy", np.zeros(3)), os.replace("array.npy", "array.npz")
        quiet(sample.main, "generate", path, "--n", "30", "--npz", "samples.npz")
        with open("samples.npz", "rb") as whole, open("damaged.npz", "wb") as damaged:
            content = bytearray(whole.read())
            content[5000] ^= 255
            damaged.write(content)
        with np.load("samples.npz") as file:
            images = file["arr_0"]
        photographs = np.stack([train.read_image(os.path.join("photos", c, name), 16) for c in ("left", "right")
                                for name in sorted(os.listdir(os.path.join("photos", c)))])
        features = lambda x: network(torch.from_numpy(x).permute(0, 3, 1, 2), return_features=True).detach().numpy()
        expected = sample.frechet(*sample.moments(features(images)), *sample.moments(features(photographs)))
        asked = ["evaluate", "samples.npz", "--features", "inception.pt", "--batch", "7"]

        def table(*arguments):
            lines = [line.split() for line in quiet(sample.main, *arguments).splitlines()]
            start = next(i for i, line in enumerate(lines) if "FID" in line or "IS" in line)
            return [dict(zip(lines[start], line)) for line in lines[start + 1:] if len(line) == len(lines[start])]
        row, = table(*asked, "--reference", "photos")
        assert abs(float(row["FID"]) - expected) <= 1e-3 * expected + 1e-4
        p = network(torch.from_numpy(images).permute(0, 3, 1, 2), no_output_bias=True).detach().numpy()
        assert abs(float(row["IS"]) - sample.inception_score(p)) < 1e-3
        assert [float(row["precision"]), float(row["recall"])] == [round(v, 4) for v in sample.precision_recall(features(photographs), features(images))]
        # The evaluator's own reference batches, and one exported here.
        mu, sigma = sample.moments(features(photographs))
        np.savez("statistics.npz", mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
        np.savez("batch.npz", mu=mu, sigma=sigma, arr_0=photographs)
        quiet(sample.main, "evaluate", "photos", "--image-size", "16", "--features", "inception.pt", "--export", "exported.npz")
        for name, balls in (("statistics.npz", False), ("batch.npz", True), ("exported.npz", True)):
            again, = table(*asked, "--reference", name)
            assert abs(float(again["FID"]) - float(row["FID"])) < 1e-5 * expected and ("precision" in again) == balls, (name, again)
            assert not balls or again["recall"] == row["recall"]
        np.savez("moved.npz", mu=mu + 10, sigma=sigma, arr_0=photographs)        # a batch's own statistics are those of all its images
        moved, = table(*asked, "--reference", "moved.npz")
        assert abs(float(moved["FID"]) - float(row["FID"])) > 100 and moved["recall"] == row["recall"]
        rows = table("evaluate", path, "--features", "inception.pt", "--reference", "exported.npz", "--n", "12", "--mean-guidance", "0,1.5,0:1:2",
                     "--variance-guidance", "0,1", "--temperature", "0.5")
        assert [(r["w_mu"], r["w_sigma"], r["temperature"]) for r in rows] == [
            (m, v, "0.5") for m in ("0", "1.5", "0:1:2") for v in ("0", "1")] and rows[0]["FID"] != rows[4]["FID"]
        assert "IS" not in table("evaluate", "samples.npz", "--features", "plain.pt", "--reference", "photos")[0]
        for message, *arguments in (
                ("inception-2015-12-05.pt", "samples.npz", "--reference", "photos"), ("expected a TorchScript", "samples.npz", "--reference", "photos",
                 "--features", "samples.npz"), ("no such folder", "samples.npz", "--features",
                 "inception.pt", "--reference", "nowhere"), ("one setting", path, "--features", "inception.pt", "--export", "x.npz",
                 "--mean-guidance", "0,1"),
                ("--features gives 9", "samples.npz", "--features", "plain.pt", "--reference", "exported.npz"),
                ("no finite features", "samples.npz", "--features", "nan.pt", "--reference", "photos"),
                ("expected an .npz", "array.npz", "--features", "inception.pt", "--reference", "photos"),
                ("not finite", "samples.npz", "--features", "inception.pt", "--reference", "nan.npz"),
                ("damaged.npz", "damaged.npz", "--features", "inception.pt", "--reference", "photos"),
                ("per level", path, "--features", "inception.pt", "--reference", "nowhere", "--mean-guidance", "0,1:2")):
            refused(message, sample.main, "evaluate", *arguments)
        few, = table("evaluate", path, "--features", "inception.pt", "--reference", "photos", "--n", "3")
        assert "FID" in few and "precision" not in few
        assert "FID" in table("evaluate", path, "--features", "inception.pt", "--reference", "toy", "--n", "4", "--batch", "512")[0]

def test_upsampling_stack():
    with folder():
        photos("photos")
        small = ["--data", "photos", "--batch", "2", "--steps", "1", "--holdout", "0.2", "--precision", "fp32", "--width", "16",
                 "--encoder-width", "16"]
        quiet(train.main, *small, "--dataset", "toy-rgb16", "--num-classes", "2", "--out", "base")
        quiet(train.main, *small, "--dataset", "toy-upsampler", "--out", "up")
        quiet(sample.main, "generate", "base/checkpoint.pt", "--upsampler", "up/checkpoint.pt", "--n", "4", "--npz", "x.npz")
        with np.load("x.npz") as file:
            assert file["arr_0"].shape == (4, 64, 64, 3) and len({image.tobytes() for image in file["arr_0"]}) == 4
            large = sorted(image.tobytes() for image in file["arr_0"])
        quiet(sample.main, "generate", "base/checkpoint.pt", "--upsampler", "up/checkpoint.pt", "--n", "4", "--batch", "1", "--npz", "y.npz")
        with np.load("y.npz") as file:
            assert sum(np.abs(np.frombuffer(a, np.uint8).astype(int) - np.frombuffer(b.tobytes(), np.uint8)).mean() < 1
                       for a, b in zip(large, sorted(file["arr_0"], key=lambda image: image.tobytes()))) >= 3
        sampler = sample.Sampler("base/checkpoint.pt", precision="fp32", upsampler="up/checkpoint.pt")
        up, label = sampler.upsampler, torch.tensor([0, 1])
        low_res = up.latents(sampler.images(sampler.noise(0, [5, 6]), label))
        expected = up.images(up.noise((0, 1), [5, 6]), None, low_res=low_res)
        assert np.array_equal(sampler.draw(0, [5, 6], label), expected) and not np.array_equal(expected[0], expected[1])
        refused("an upsampler", sample.main, "generate", "up/checkpoint.pt")
        refused("not an upsampler", sample.main, "generate", "base/checkpoint.pt", "--upsampler", "base/checkpoint.pt")
        quiet(sample.main, "reconstruct", "up/checkpoint.pt", "photos/left/0.png")

def test_bench():
    with folder():
        said = quiet(sample.main, "bench", trained(), "--batch", "2", "--seconds", "0.01", "--precision", "fp32")
        forward = sample.count_flops(lambda: lvae.LVAE(TINY)(torch.zeros(1, 4, 16, 16)))
        assert 2.9 < sample.training_flops(TINY) / forward < 3.01              # the backward pass is two more
        assert abs(sample.training_flops(lvae.PRESETS["church"]) / 3e9 - 81) < 1              # GFLOP of a forward pass
        assert "guided" in said and all(f"\n{name}" in said for name in ("LVAE", "decoder", "together", "peak memory"))
        once = quiet(sample.main, "bench", "run/checkpoint.pt", "--no-guided", "--batch", "2", "--seconds", "0.01", "--precision", "fp32")
        flop = lambda text: float(next(line for line in text.splitlines() if line.startswith("LVAE")).split()[1])
        assert "not guided" in once and 1.9 < flop(said) / flop(once) < 2.1

def test_compiling():
    with torch.no_grad():                                      # the compiler sees one graph, without a look at a tensor's content
        for config in (TINY, TINY_CLASSES):
            model = reference_model(config).eval()
            noise, guided = reference_noise(model), {}
            if config.num_classes:
                guided = dict(label=torch.tensor([0, 1]), mean_guidance=1.5, variance_guidance=[0.0, 1, 1, 2])
            graph = torch.compile(model.generate, backend="eager", fullgraph=not guided)      # a CPU's labels are checked
            close(graph(noise, **guided), model.generate(noise, **guided), 1e-6)
        ae, h = dae.Autoencoder(dataclasses.replace(SMALL, codebook=16)), torch.randn(2, 4, 8, 8)
        close(torch.compile(ae.decode, backend="eager", fullgraph=True)(h), ae.decode(h), 1e-6)
    model = reference_model(TINY).train()
    x, noise = torch.randn(2, 4, 16, 16), reference_noise(model)
    close(torch.compile(model, backend="eager", fullgraph=True)(x, noise=noise).kl, model(x, noise=noise).kl, 1e-6)

    calls, real = [], torch.compile

    def stand_in(function, **options):                         # gives its result in the same memory each time, as a CUDA graph does
        calls.append(options["mode"])
        memory = {}

        def fast(*inputs, **others):
            out = function(*inputs, **others)
            return memory.setdefault("out", out).copy_(out)
        return fast
    try:
        torch.compile = stand_in
        double = sample.compiled(lambda x: 2 * x)
        kept = double(torch.ones(2))
        assert double(torch.zeros(2)).sum() == 0 and kept.sum() == 4
        with folder():
            path = trained()
            quiet(sample.main, "generate", path, "--n", "7", "--batch", "7", "--out", "a.png", "--precision", "fp32")
            del calls[:]
            said = quiet(sample.main, "generate", path, "--n", "7", "--batch", "3", "--compile", "--out", "b.png", "--precision", "fp32")
            assert calls == ["reduce-overhead"] * 2 and "float32, compiled" in said
            a, b = (np.asarray(Image.open(name)).astype(int) for name in ("a.png", "b.png"))
            assert np.abs(a - b).max() <= 1
    finally:
        torch.compile = real

def test_sampling_in_bf16_is_close():
    with folder():
        path = trained()
        exact, fast = (sample.Sampler(path, precision=precision) for precision in ("fp32", "bf16"))
        assert fast.model.out_proj.weight.dtype == torch.bfloat16 and fast.model.embedding.weight.dtype == torch.float32
        label = torch.arange(8) % 2
        a, b = (s.images(s.noise(0, range(8)), label, mean_guidance=1.0).astype(float) for s in (exact, fast))
        assert 0 < sample.psnr(a, b) and not np.array_equal(a, b) and sample.psnr(a, b) > 40, sample.psnr(a, b)

# ---------------------------------------------------------------- data

def test_toy_is_a_function_of_its_index():
    image, label = train.toy(11, 64)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and label == 3 and len(train.TOY_CLASSES) == 8
    digest = hashlib.sha256(b"".join(train.toy(i, 64)[0].tobytes() for i in range(64))).hexdigest()
    assert digest.startswith("f7d796c9ead86f45"), "every figure was measured on the scenes as they were"

def test_every_kind_of_image():
    with folder():
        plain = Image.fromarray(train.toy(0, 32)[0])
        grey, clear, exif = plain.convert("L"), plain.convert("RGBA"), Image.Exif()
        clear.putalpha(0)
        exif[0x0112] = 6                                       # to be shown turned a quarter clockwise
        plain.transpose(Image.Transpose.ROTATE_90).save("exif.png", exif=exif)
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save("deep.png")
        for name, image in (("rgb.png", plain), ("grey.png", grey), ("palette.png", plain.convert("P")), ("clear.png", clear)):
            image.save(name)
        plain.convert("CMYK").save("cmyk.jpg", quality=98, subsampling=0)
        expected, shades = np.asarray(plain).astype(int), np.asarray(grey.convert("RGB")).astype(int)
        for name, target, tolerance in (("rgb.png", expected, 0), ("exif.png", expected, 0), ("grey.png", shades, 0), ("deep.png", shades, 1),
                                        ("cmyk.jpg", expected, 8), ("palette.png", expected, 16), ("clear.png", 255, 0)):
            assert np.abs(train.read_image(name, 32) - target).mean() <= tolerance, name
        assert train.read_image("rgb.png", 16).shape == (16, 16, 3)

def test_bad_images_are_named_and_skipped():
    with folder():
        photos("photos")
        with open("photos/left/broken.png", "wb") as file:
            file.write(b"\x89PNG\r\n\x1a\nnothing")
        os.truncate("photos/left/2.png", 200)
        Image.new("RGB", (1, 1)).save("photos/right/dot.png")
        said = quiet(train.main, *FAST)
        assert all(f"skipped {os.path.join('photos', name)}" in said for name in ("left/broken.png", "left/2.png", "right/dot.png"))
        assert "3 of 22 are bad" in said and "1x1" in said

def test_batches_cover_every_epoch():
    seen = np.concatenate([train.batch_indices(0, 10, 4, i) for i in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and not np.array_equal(seen[:10], seen[10:])
    rows, held = train.split(100, 0.1)
    assert len(held) == 10 and set(rows) | set(held) == set(range(100)) and not set(rows) & set(held)
    draws = []
    for seed, step in ((0, 0), (1, 0), (0, 1), (2 ** 33, 0), (0, 0)):
        train.seed_step(seed, step)
        draws.append(float(torch.rand(())))
    assert len(set(draws)) == 4 and draws[0] == draws[-1]

def test_latents_are_encoded_once_and_normalised():
    with folder():
        trained("--flip")
        path, = glob.glob("run/latents_train_*.npy")
        h, before = np.load(path), os.stat(path).st_mtime_ns
        assert h.shape == (20, 2, 4, 8, 8) and np.isfinite(h).all() and not np.array_equal(h[:, 0], h[:, 1])
        quiet(train.main, *FAST, "--flip", "--steps", "5")
        assert os.stat(path).st_mtime_ns == before, "encoded again for nothing"
        os.rename("photos/left/0.png", "gone.png")
        quiet(train.main, *FAST, "--flip", "--steps", "6")
        assert sorted(len(np.load(name)) for name in glob.glob("run/latents_train_*.npy")) == [19, 20], "the files changed"
    data = train.Latents(np.array([1.0, 3, 100, -100]).reshape(4, 1, 1, 1, 1), np.array([0, 1, 2, 3]), np.array([0, 1, 3]))
    config = dataclasses.replace(TINY_CLASSES, shift=1.0, scale=2.0)
    x, label = data.batch(np.array([2, 1, 0]), config, torch.device("cpu"))
    assert x.flatten().tolist() == [-4, 1, 0] and label.tolist() == [3, 1, 0]
    config = train.measure(dataclasses.replace(data, h=np.array([2.0, 4, 9, 6]).reshape(4, 1, 1, 1, 1)), config)
    close(config.shift, 4.0), close(config.scale, math.sqrt(8 / 3))

def test_beginning_from_a_checkpoint():
    with folder():
        path = trained()
        photos("more"), photos("other", classes=("left", "up")), photos("one", classes=("right", "x/y"))
        begin = ["--init", path, "--image-size", "16", "--steps", "1", "--lr", "1e-9", "--warmup", "0", "--precision", "fp32"]
        quiet(train.main, *begin, "--data", "more", "--out", "next")
        first, second = (torch.load(f"{name}/checkpoint.pt", weights_only=True) for name in ("run", "next"))
        assert second["classes"] == ["left", "right"] and second["config"]["scale"] == first["config"]["scale"]
        close(second["model"]["embedding.weight"], first["ema"]["embedding.weight"], 1e-6)
        refused("up is not", train.main, *begin, "--data", "other", "--out", "x")
        small = ["--dae-width", "32", "--dae-mult", "1,1", "--dae-steps", "1", "--dae-batch", "2"]
        quiet(train.main, *begin, "--data", "more", "--out", "third", "--dae", "train", *small)
        third = torch.load("third/checkpoint.pt", weights_only=True)
        assert third["config"]["scale"] != first["config"]["scale"], "another autoencoder needs another scale"

# ---------------------------------------------------------------- training

def log_of(out):
    """A run's log without what depends on the clock."""
    with open(os.path.join(out, "log.jsonl")) as file:
        return [{k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in file]

def states(out):
    checkpoint = torch.load(f"{out}/checkpoint.pt", weights_only=True)
    return {f"{part}.{k}": v for part in ("model", "ema", "dae") for k, v in checkpoint[part].items()}

WHOLE = ["--flip", "--image-size", "32", "--groups", "1,1,1,1", "--encoder-layers", "1,1,1,1", "--mult", "1,1,1,1", "--ffn", "2,0,2,2",
         "--attention-layers", "0,1,0,0", "--heads", "0,2,0,0", "--dae-adversarial-weight", "0.5", "--dae-adversarial-start", "2"]

class Stop(Exception):
    pass

def test_resuming_is_bit_identical():
    """A run stopped within either stage, and resumed, ends where one never stopped does."""
    with folder():
        trained(*WHOLE)
        real = train.log
        for stage, number in (("dae", 3), ("dae", 4), ("lvae", 1), ("lvae", 4), ("", 0)):
            def log(run, at, step, stats):
                if (at, step) == (stage, number):
                    raise Stop
                return real(run, at, step, stats)
            train.log = log
            with contextlib.suppress(Stop):
                quiet(train.main, *FAST, *WHOLE, "--out", "other")
            train.log = real
        whole, resumed = states("run"), states("other")
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole), "not the same bits"
        later = {(line["stage"], line["step"], len(line)): line for line in log_of("other")}
        assert [later[(line["stage"], line["step"], len(line))] for line in log_of("run")] == log_of("run")
        refused("trained with width = 16", train.main, *FAST, *WHOLE, "--width", "32")
        refused("trained with seed = 0", train.main, *FAST, *WHOLE, "--seed", "1")
        os.remove("run/dae.pt")                                # the checkpoint alone is enough
        with open("run/log.jsonl", "a") as file:
            file.write('{"stage": "lvae", "st')                # as a kill may leave it
        quiet(train.main, *FAST, *WHOLE)
        assert not os.path.exists("run/dae.pt") and all(torch.equal(whole[k], v) for k, v in states("run").items())
        assert log_of("run")

def test_a_skipped_step_of_stage_one_leaves_no_trace():
    torch.manual_seed(0)
    parts = {"dae": dae.Autoencoder(SMALL), "discriminator": dae.Discriminator(16)}
    optimizers = dae.make_optimizers(parts, SMALL)
    x, noise = torch.rand(2, 3, 32, 32), torch.randn(2, 4, 16, 16)
    config = dataclasses.replace(SMALL, adversarial_start=1)
    parts["dae"].config = config
    assert not dae.train_step(parts, optimizers, x, noise, 1)["skipped"]
    def everything():
        moments = [v for o in optimizers.values() for s in o.state.values() for v in s.values()]
        return [t.clone() for t in [*moments, *(t for part in parts.values() for t in part.state_dict().values())]]
    before = everything()
    assert dae.train_step(parts, optimizers, x * float("nan"), noise, 2)["skipped"]
    assert all(torch.equal(a, b) for a, b in zip(before, everything()))
    assert not dae.train_step(parts, optimizers, x, noise, 3)["skipped"] 
    assert not all(torch.equal(a, b) for a, b in zip(before, everything()))

def test_a_run_that_skips_for_ever_stops():
    with folder():
        run, saved = train.Run(out="."), []
        refused("100 steps in a row", lambda a: train.loop(run, "lvae", {"step": 0, "skipped": 0}, 200, lambda step: {
            "skipped": True, "grad_norm": float("nan")}, lambda: saved.append(1), None))
        assert not saved

def test_a_full_disk_loses_nothing():
    with folder():
        path = trained()
        with open(path, "rb") as file:
            before = file.read()
        real = torch.save

        def full(state, file):
            file.write(b"x" * 100)
            raise OSError(28, "No space left on device")
        torch.save = full
        try:
            refused("No space left", train.main, *FAST, "--steps", "6")
        finally:
            torch.save = real
        with open(path, "rb") as file:
            assert file.read() == before and not [name for name in os.listdir("run") if name.endswith(".tmp")]

# ---------------------------------------------------------------- many processes, and nothing lost

def shell(*arguments, code=0, **options):
    """Run a command as a shell does; returns what it said."""
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": HERE, **options})
    assert done.returncode == code, done.stdout
    return done.stdout

TRAIN, SAMPLE = (os.path.join(HERE, name) for name in ("train.py", "sample.py"))
TWO = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
ON_LATENTS = ["--data", "latents.npz", *FAST[FAST.index("--width"):]]

def latents(count=24):
    h = 3 + 5 * np.random.default_rng(0).standard_normal((count, 4, 8, 8)).astype(np.float32)
    np.savez("latents.npz", latents=h, labels=np.arange(count) % 3)
    torch.save({"dae": dae.Autoencoder(dataclasses.replace(SMALL, attention=())).state_dict()}, "dae.pt")

def test_many_processes_train_and_sample_as_one():
    with folder():
        photos("photos", size=32)
        options = [*FAST, *WHOLE[:-4], "--accumulate", "2"]     # the adversary's batch norm would see each process's own part
        for out, prefix in (("one", []), ("two", TWO)):
            said = shell(*prefix, TRAIN, *options, "--out", out)
            assert said.count("to train on") == 1, said
        one, two = log_of("one"), log_of("two")
        assert len(one) == len(two) == 10
        for a, b in zip(one, two):
            assert a.keys() == b.keys()
            assert all(key == "stage" or np.allclose(a[key], b[key], rtol=1e-3, atol=1e-3) for key in a), (a, b)
        shell(*TWO, TRAIN, *options, "--out", "one", "--steps", "5")             # resumed by another number
        assert log_of("one")[-1]["step"] == 5
        assert "multiple of 2" in shell(*TWO, TRAIN, *options, "--out", "x", "--dae-batch", "5", code=1)
        for out, prefix in (("one", []), ("two", TWO)):
            shell(*prefix, SAMPLE, "generate", "two/checkpoint.pt", "--samples", "11", "--batch", "2", "--precision", "fp32",
                  "--npz", f"{out}.npz", "--out", f"{out}.png")
        with np.load("one.npz") as a, np.load("two.npz") as b:
            assert np.array_equal(a["arr_0"], b["arr_0"]) and np.array_equal(a["arr_1"], b["arr_1"]) and len(a["arr_0"]) == 11
        assert not [name for name in os.listdir(".") if name.endswith("tmp")]
        said = shell(*TWO, SAMPLE, "evaluate", "one.npz", "--features", "x", "--reference", "two.npz", code=1)
        assert "one process" in said

def test_one_process_and_two_have_the_same_curve():
    with folder():
        latents()
        options = [*ON_LATENTS, "--dae", "dae.pt", "--batch", "6", "--accumulate", "2"]
        shell(TRAIN, *options, "--out", "one")
        shell(*TWO, TRAIN, *options, "--out", "two")
        for a, b in zip(log_of("one"), log_of("two"), strict=True):
            assert all(key == "stage" or np.allclose(a[key], b[key], rtol=2e-5, atol=1e-4) for key in a), (a, b)

def test_signals_finish_the_step_and_save():
    with folder():
        latents()
        for number in (signal.SIGTERM, signal.SIGINT):
            process = subprocess.Popen([sys.executable, TRAIN, *ON_LATENTS, "--steps", "100000", "--every", "100000"], text=True,
                                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                       preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
            log, before = os.path.join("runs", "latents", "log.jsonl"), 0
            if os.path.exists(log):
                before = len(log_of("runs/latents"))
            while process.poll() is None and (not os.path.exists(log) or len(log_of("runs/latents")) < before + 3):
                time.sleep(0.05)
            process.send_signal(number)
            said = process.communicate(timeout=60)[0]
            assert process.returncode == 0 and number.name in said and "goes on from there" in said, said
            state = torch.load("runs/latents/checkpoint.pt", weights_only=True)
            assert state["step"] == log_of("runs/latents")[-1]["step"] >= before

def test_two_processes_on_one_folder_are_refused():
    with folder():
        latents()
        lock = train.claim("run")
        refused("another process", train.main, *ON_LATENTS, "--out", "run")
        lock.close()
        quiet(train.main, *ON_LATENTS, "--out", "run")

XLA = """
import sys, torch_xla.debug.metrics as metrics, train
real, compiled = train.average, []
def average(tensors):
    real(tensors)
    compiled.append(metrics.metric_data("CompileTime")[0])
train.average = average
train.train_process(0, *train.parse(sys.argv[1:]))
assert compiled[-1] == compiled[len(compiled) // 2], compiled
"""

def test_xla():
    """On torch_xla's CPU backend: the loss of a CPU, as many programs at the end as early, resuming across devices."""
    if importlib.util.find_spec("torch_xla") is None:
        print("        torch_xla is not installed: nothing tested on it")
        return
    with folder():
        latents()
        with open("count.py", "w") as file:
            file.write(XLA)
        options = [*ON_LATENTS, "--dae", "dae.pt", "--every", "100", "--log-every", "2"]
        shell("count.py", *options, "--out", "xla", "--device", "xla", "--steps", "20", PJRT_DEVICE="CPU")
        for out, device, steps in (("cpu", "cpu", "20"), ("cpu", "xla", "22"), ("xla", "cpu", "22"), ("whole", "cpu", "22")):
            shell(TRAIN, *options, "--out", out, "--device", device, "--steps", steps, PJRT_DEVICE="CPU")
        whole = {line["step"]: line["loss"] for line in log_of("whole") if "loss" in line}
        for out in ("xla", "cpu"):
            for line in log_of(out):
                assert "loss" not in line or abs(line["loss"] - whole[line["step"]]) < 1e-5 * abs(whole[line["step"]]), (out, line)
        for device in ("xla", "cpu"):
            shell(SAMPLE, "generate", "xla/checkpoint.pt", "--device", device, "--precision", "fp32", "--n", "4", "--npz", f"{device}.npz",
                  PJRT_DEVICE="CPU")
        with np.load("xla.npz") as a, np.load("cpu.npz") as b:
            assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1

# ---------------------------------------------------------------- the command lines

def test_commands_end_to_end():
    """As a shell runs them: the toy from nothing, its samples, and the exit code of a mistake."""
    with folder():
        photos("photos")
        shell(TRAIN, *FAST)
        assert {"checkpoint.pt", "dae.pt", "log.jsonl", "samples"} <= set(os.listdir("run"))
        entries = [line for line in log_of("run") if line["stage"] == "lvae"]
        assert {"loss", "distortion", "rate", "rate_bits", "kl_levels", "spectral", "grad_norm", "skipped", "lr"} <= entries[0].keys()
        assert any("held_out_nelbo_bits" in line for line in entries)
        assert {"0000004.png", "0000004_guided.png", "0000004_reconstructions.png", "dae_000004.png"} <= set(os.listdir("run/samples"))
        shell(SAMPLE, "generate", "run/checkpoint.pt", "--n", "16", "--mean-guidance", "1.5")
        assert Image.open("samples.png").width > 2 * 16
        said = shell(TRAIN, "--widht", "3", code=2)
        assert "--widht" in said and said.count("\n") == 1 and "Traceback" not in said
        assert "church_outdoor_train_lmdb.zip" in shell(TRAIN, "--dataset", "church", code=2)
        assert "--attention-layers" in shell(TRAIN, "--dataset", "church", "--help")

def test_pixels_latents_and_presets_of_ones_own():
    plain = FAST[FAST.index("--width"):]
    with folder():
        photos("flat", classes=("",)), latents()
        quiet(train.main, *plain, "--data", "flat", "--out", "pixels", "--dae", "none", "--image-size", "8")
        state = torch.load("pixels/checkpoint.pt", weights_only=True)["config"]
        assert (state["shift"], state["scale"], state["data_channels"], state["num_classes"]) == (127.5, 127.5, 3, 0)
        quiet(train.main, *plain, "--data", "latents.npz", "--out", "latents")
        state = torch.load("latents/checkpoint.pt", weights_only=True)["config"]
        assert state["num_classes"] == 3 and abs(state["scale"] - 5) < 0.5
        refused("holds no autoencoder", sample.main, "generate", "latents/checkpoint.pt")
        with np.load("latents.npz") as file:
            h = file["latents"]
        np.savez("wrong.npz", images=h)
        h[3, 0, 0, 0] = np.nan
        np.savez("nan.npz", latents=h)
        for message, *options in (("NaN", "--data", "nan.npz"), ("named latents", "--data", "wrong.npz"),
                                  ("does not fit", "--data", "latents.npz", "--num-classes", "2")):
            refused(message, train.main, *plain, *options, "--out", "x")
        config = torch.load("latents/checkpoint.pt", weights_only=True)["config"]
        lvae.PRESETS["celeba"] = lvae.Config(**config)
        try:
            refused("needs --data", train.main, "--dataset", "celeba")
            quiet(train.main, "--dataset", "celeba", "--data", "latents.npz", "--steps", "1", "--precision", "fp32")
            assert os.path.exists("runs/celeba/checkpoint.pt")
        finally:
            del lvae.PRESETS["celeba"]

def test_mistakes_are_refused():
    with folder():
        os.makedirs("empty")
        path = trained()
        for expected, *arguments in (
                ("no image found", "--data", "empty"), ("no such folder", "--data", "nowhere"), ("--image-size", "--image-size", "20"),
                ("invalid choice", "--dataset", "chruch"), ("none.ckpt", "--data", "photos", "--dae", "none.ckpt"),
                ("heads", "--data", "photos", "--heads", "7,7,7,7"), ("invalid int value", "--width", "wide"),
                ("does not fit", "--data", "photos", "--num-classes", "1", "--dae", "none", "--image-size", "16"),
                ("whole numbers", "--data", "photos", "--mult", "1,1.5,1,1", "--dae", "none", "--image-size", "16"),
                ("--precision", "--precision", "fp16"), ("--seed", "--seed", "-1"), ("--holdout", "--holdout", "1"),
                ("--log-every", "--log-every", "0"), ("lr", "--data", "photos", "--lr", "-1"), ("--device", "--device", "abacus")):
            refused(expected, train.main, "--out", "x", *arguments)
        for expected, *arguments in (
                ("no such class", "--label", "up"), ("no such class", "--label", "2"), ("per level", "--mean-guidance", "1,2"),
                ("from 1 up", "--n", "0"), ("ends in", "--out", "grid.xyz")):
            refused(expected, sample.main, "generate", path, *arguments)
        refused("not a checkpoint", sample.main, "generate", os.path.join("run", "dae.pt"))
        os.truncate(path, os.path.getsize(path) - 1000)
        refused("checkpoint.pt", sample.main, "generate", path)
        for name in os.listdir("photos/left"):
            with open(f"photos/left/{name}", "w") as file:
                file.write("x")
        refused("no usable image", train.main, *FAST, "--out", "y", "--data", "photos/left")

# ---------------------------------------------------------------- running them

def main(words):
    tests = {name: f for name, f in globals().items() if name.startswith("test_") and (not words or any(w in name for w in words))}
    failed = 0
    for name, test in tests.items():
        started = time.time()
        try:
            test()
            print(f"ok      {name} ({time.time() - started:.1f} s)", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {name}\n{traceback.format_exc()}", flush=True)
    print(f"{len(tests) - failed} passed, {failed} failed")
    return 1 if failed or not tests else 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
