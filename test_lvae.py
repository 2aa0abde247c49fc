"""Tests of the whole system on a CPU, in 3 minutes: `python test_lvae.py [part of a name ...]`, or pytest.

The models are held against values of the original code, losses and metrics against their formulas.
"""
import ast
import contextlib
import copy
import functools
import glob
import hashlib
import http.server
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch.distributions import Normal, kl_divergence

import dae
import lvae
import sample
import train

# ---------------------------------------------------------------- helpers
HERE = Path(__file__).resolve().parent
TINY = lvae.Config(
    resolution=16, width=32, encoder_width=32, mult=(1,) * 4, ffn=(4,) * 4, groups=(3, 3, 2, 2), z_dim=8,
    encoder_layers=(2, 3, 2, 1), attention_layers=(2, 1, 0, 0), heads=(4, 8, 0, 0))
CLASSES = replace(TINY, encoder_width=48, ffn=(4, 6, 8, 10), num_classes=10, hierarchical_prior=True)
SMALL = dae.Config(width=32, mult=(1, 2), blocks=1, attention=(1,))
MODEL = ("--width 16 --encoder-width 16 --groups 1,1,2,2 --encoder-layers 1,1,1,1 --mult 1,1,1,1 --steps 4 "
         "--batch 4 --log-every 1 --every 2 --holdout 0.2 --precision fp32 --out ")
PHOTOS = ("--data photos --image-size 32 --flip --dae-width 32 --dae-mult 1,1 --dae-steps 4 --dae-batch 4 "
          "--dae-adversarial-weight 0.5 --dae-adversarial-start 2 " + MODEL)
PIXELS = "--data photos --dae none --image-size 16 --num-classes 0 --no-hierarchical-prior " + MODEL
LATENTS = "--data latents.npz " + MODEL
RUN, PHOTO = "run/checkpoint.pt", "photos/left/0.png"

def seeded(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))

X, LABEL = seeded(1, 2, 4, 16, 16), torch.tensor([0, 1])

def filled(module, rename=str):
    """Weights as a function of their names: those of the reference values."""
    state = {rename(key): value for key, value in module.state_dict().items() if not key.endswith(".u")}
    for key, value in state.items():
        a = seeded(zlib.crc32(key.encode()), *value.shape)
        scaled = a / np.float32(math.sqrt(math.prod(a.shape[1:])))
        state[key] = scaled if a.ndim > 1 else 0.1 * a + (1 if key.endswith("weight") else 0)
    return state

def released_name(key):
    """Our parameter's name in the authors' released weights."""
    for ours, theirs in (
            (r"^levels\.(\d+)", r"layer_list.\1.layer_list"), ("qkv", "qkvproj"), ("embedding", "embed"),
            (r"^encoder\.levels\.(\d+)", r"encoder.encoder_levels.\1.layer_list"), ("initial", "initial_x"),
            (r"\bout(_proj)?\b", "outproj"), (r"(prior|posterior)_block\.dense2", r"\1_block.dense2.conv")):
        key = re.sub(ours, theirs, key)
    return key

def reference(config):
    model = lvae.LVAE(replace(config, attention="released")).eval()
    model.load_state_dict(lvae.from_released(filled(model, released_name)))
    return model, [seeded(1000 + i, 2, *shape) for i, shape in enumerate(model.latent_shapes())]

def awake(config, scale=0.3):
    """A model whose zero-initialised and tiny layers have been given weights, and noise."""
    torch.manual_seed(0)
    model = lvae.LVAE(config).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * scale * 0.5 / math.sqrt(max(1, p[0].numel()))
    return model, [torch.randn(2, *shape) for shape in model.latent_shapes()]

def close(a, b, tolerance=1e-5):
    a, b = (torch.as_tensor(t, dtype=torch.float64).detach() for t in (a, b))
    error = float((a - b).norm() / b.norm())
    assert error < tolerance, error

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def near(a, b, tolerance=1):
    """Whether uint8 images are the same, but for rounding."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= tolerance

def quiet(main, line):
    """Run a command's main in this process, with the words of a line; returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        main(line.split())
    return out.getvalue()

training, sampling = (functools.partial(quiet, module.main) for module in (train, sample))

def refused(expected, function, *arguments, **options):
    """The call must end in an error of one line that says what is expected."""
    said = None
    try:
        function(*arguments, **options)
    except (ValueError, OSError) as e:
        said = str(e)
    assert said and expected in said and "\n" not in said, (expected, said)

@functools.cache
def prepared():
    """A folder made once: photos, latents, a short run of both stages and one of pixels."""
    made = tempfile.TemporaryDirectory()
    with contextlib.chdir(made.name):
        os.makedirs("photos/left"), os.makedirs("photos/right")
        for i in range(20):
            Image.fromarray(train.toy(i, 32)[0]).save(f"photos/{('left', 'right')[i % 2]}/{i}.png")
        np.savez("latents.npz", latents=3 + 5 * seeded(0, 24, 4, 16, 16), labels=np.arange(24) % 3)
        training(PHOTOS + "run"), training(PIXELS + "pixels")
    return made

@contextlib.contextmanager
def in_folder():
    """Decorates a test that runs in a fresh folder with a copy of what is prepared."""
    with tempfile.TemporaryDirectory() as path, contextlib.chdir(path):
        shutil.copytree(prepared().name, path, dirs_exist_ok=True)
        yield

# ---------------------------------------------------------------- equal to the original code
def test_the_model_equals_the_original():
    model, noise = reference(TINY)
    out = model(X, noise=noise)
    close(out.mean[0, 0, 3::6, 5], [-6.22288, -5.42245, -4.14541])
    close(out.kl[::3, 0], [0.0762, 2.9034, 49.0746, 843.9101])
    close(model.generate(noise)[0, 0, 3::6, 5], [-7.15309, -9.96485, -3.10727])
    model, noise = reference(CLASSES)
    out = model(X, LABEL, noise)
    close(out.mean[0, 0, 3::6, 5], [-8.25854, -15.57633, 2.78529])
    close(out.kl[::3, 0], [0.0814, 3.5673, 53.0686, 3549.3867])
    close(model.generate(noise, LABEL)[0, 0, 3::6, 5], [-3.13589, -7.53544, 4.48146])
    guided = model.generate(noise, LABEL, None, [0, 1.5, 1, 0.5], [0.5, 0.25, 0, 0.3])
    close(guided[0, 0, 3::6, 5], [-2.98948, -7.27332, 4.25234])

def test_autoencoders_equal_the_original():
    x = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, (1, 3, 32, 32)).astype(np.float32))
    for name, side, latent, image in (
            ("kl-f8", 4, [-0.03595, -0.17218, 0.58589], [-0.5168, -0.89573, -1.15188]),
            ("vq-f4", 8, [0.12052, -0.27562, -0.29231], [-1.03127, -0.29836, -0.37182])):
        ae = dae.Autoencoder(dae.PRESETS[name]).eval()
        ae.load_state_dict(filled(ae))
        with torch.no_grad():
            close(ae.encode(x).flatten()[:42:14], latent, 1e-4)
            decoded = ae.decode(seeded(2, 1, ae.config.z_channels, side, side))
            close(decoded.flatten()[100:1000:422], image, 1e-4)

def test_parameter_counts():
    counts = {"church": 119_137_672, "church-rgb32": 119_135_558, "church-upsampler": 62_868_326,
              "church-pixel": 143_320_038, "bedroom-f4": 96_241_478, "bedroom-f8": 107_179_944,
              "bedroom-f16": 99_837_632, "imagenet": 386_366_344}
    for name, count in counts.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in lvae.LVAE(lvae.PRESETS[name]).parameters()) == count, name

def test_every_name_in_the_map_exists():
    rows = re.findall(r"^\| .* \| (\w+)\.py \| `(\w+)` \|$", (HERE / "README.md").read_text("utf-8"), re.M)
    assert len(rows) >= 17 and all(hasattr(sys.modules[module], name) for module, name in rows)

def test_budgets():
    """A change pays for what it adds: lines and bytes of each file, width, length of functions, `raise`s."""
    budgets, raises = {"lvae": 620, "dae": 717, "train": 931, "sample": 845, "test_lvae": 925}, 0
    for name, lines in budgets.items():
        text = (HERE / f"{name}.py").read_text()
        assert len(text.splitlines()) <= lines and max(map(len, text.splitlines())) <= 110, name
        for node in ast.walk(ast.parse(text)):
            raises += isinstance(node, ast.Raise) and name != "test_lvae"
            assert not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < 50, node.name
    assert raises <= 45 and sum((HERE / f"{name}.py").stat().st_size for name in budgets) <= 233_500

@in_folder()
def test_copied_alone():
    for module in ("lvae", "dae"):
        os.mkdir(module), shutil.copy(HERE / f"{module}.py", module)
        others = {"PIL", "lvae", "dae", "train"} - {module}
        code = f"import sys, {module}; assert not {others} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=module)

# ---------------------------------------------------------------- the model
def test_spectral_term():
    model, expected = awake(CLASSES)[0].train(), 0
    for _ in range(200):
        total = model(X, LABEL).spectral
    for side, layers in zip((1, 4, 8, 16), model.levels):
        for conv in (layer for layer in layers.modules() if isinstance(layer, lvae.SpectralConv2d)):
            U, S, V = torch.linalg.svd(conv.weight.detach().flatten(1), full_matrices=False)
            expected += side * S[0]
    close(total, expected, 1e-3)
    gradient, = torch.autograd.grad(conv.sigma(), conv.weight)
    close(gradient.flatten(1), torch.outer(U[:, 0], V[0]), 0.03)
    conv.eval().u.fill_(1)
    conv.sigma()
    assert (conv.u == 1).all()  # it moves in training only

def test_layers():
    x, block, layer = seeded(0, 2, 32, 4, 4), lvae.LVAE(CLASSES).levels[1][0], lvae.Attention(32, 4, "sdpa")
    assert torch.equal(layer(x), x) and block.prior_block(x, x[:, :, 0, 0]).abs().max() < 1e-6
    assert 0 < (block.shared_block(x, x[:, :, 0, 0]) - x).norm() < 0.5 * x.norm()
    torch.nn.init.normal_(layer.out.weight)
    tokens = layer.qkv(x.flatten(2).mT).view(2, 16, 3, 4, 8)  # heads of 8 channels
    q, k, v = tokens.permute(2, 0, 3, 1, 4)
    mixed = (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
    close(layer(x), x + layer.out(mixed.transpose(1, 2).flatten(2)).mT.view_as(x))

def test_kl_schedule():
    shares = lvae.kl_shares(TINY)
    close([shares.sum(), shares[-1] / shares[0]], [66.7, 1010 / 11], 1e-4)
    per = lvae.kl_shares(replace(TINY, kl_schedule=("constant_per", 8, 4, 2, 1)))
    close(per / per[0], [1, 1, 2, 2, 4, 4, 4, 8, 8, 8])
    kl = torch.tensor([0.5, 5, 10, 15, 20, 25, 30, 40], requires_grad=True)[:, None]
    weights = lvae.kl_weights(kl, torch.full((8,), 1000 / 145.5))  # a = 10, 2a = 20, 3a = 30
    close(weights[:, 0], [0.1, 0.5, 1, 1, 1, 1.5, 2, 2])
    free = lvae.objective(awake(TINY)[0](X), X, replace(TINY, kl_schedule=("none",)))
    assert torch.equal(free.weighted_rate, free.rate)
    assert not weights.requires_grad and lvae.kl_weights(kl * 0, shares[:8]).isfinite().all()

def test_objective_and_recomputing():
    found = []
    for recompute in (False, True):
        model = awake(replace(CLASSES, recompute=recompute), scale=0.1)[0].train()
        out = model(X, LABEL)  # noise is drawn inside the blocks
        losses = lvae.objective(out, X, model.config)
        expected = kl_divergence(Normal(X, TINY.sigma_q), Normal(out.mean, (0.5 * out.logvar).exp()))
        close(losses.distortion, expected.sum() / 2)
        close(losses.weighted_rate, (lvae.kl_weights(out.kl, lvae.kl_shares(CLASSES)) * out.kl).sum() / 2)
        close(losses.loss, losses.distortion + losses.weighted_rate + 0.1 * out.spectral)
        losses.loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    close(found[1], found[0])
    close([lvae.bits_per_dim(1024 * math.log(2), TINY), lvae.normalise(X + 99, TINY).max()], [1.0, 4.0])

def test_generation():
    for config, label in ((TINY, None), (CLASSES, LABEL)):
        model, noise = awake(config)
        eps, out = model.encode(X, label, noise), model(X, label, noise)
        close(model.generate(eps, label), out.mean, 1e-4)
        impose = [functools.partial(lvae.whiten, latent.z) for latent in out.latents]
        close(model.generate(impose, label, n=2), out.mean, 1e-4)
        cold = model.generate(noise, label, temperature=0.5)
        close(cold, model.generate([eps / 2 for eps in noise], label))
    assert model.generate(n=1, size=(16, 32)).shape == (1, 4, 16, 32)
    close(model.generate(noise), model.generate(noise, 10))
    close(model.generate(noise, model.embedding(LABEL)), model.generate(noise, LABEL))
    refused("expected", model.generate, [eps[:, :4] for eps in noise])
    refused("guidance", model.generate, noise, mean_guidance=1.0)
    refused("out of range", model.generate, label=[0, 11])

def test_label_dropout():
    (model, noise), seen = awake(replace(CLASSES, label_dropout=1.0)), []
    model.encoder.levels[0][0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[1]))
    out, blind = model(X, LABEL, noise), model.train()(X, LABEL, noise)
    assert not blind.mean.allclose(out.mean, atol=1e-3)
    assert torch.equal(*seen)  # the encoder sees the labels that are dropped

def test_fp32_where_it_matters():
    model, noise = awake(CLASSES, scale=0.1)
    exact = model(X, LABEL, noise)
    with lvae.autocast(X.device, torch.bfloat16):
        out = model(X, LABEL, noise)
    assert {t.dtype for t in [*out[:4], *out.latents[0].prior, out.latents[0].z]} == {torch.float32}
    close(out.spectral, exact.spectral), close(out.mean, exact.mean, 0.05)

def test_nothing_looks_from_the_host():
    """Hidden CPU tensors and looks at a content fail on the meta device; the compiler sees one graph."""
    with torch.device("meta"):
        model, x, label, image = lvae.LVAE(CLASSES), X.to("meta"), LABEL.to("meta"), torch.ones(2, 3, 32, 32)
        vq, ae = dae.Autoencoder(replace(SMALL, codebook=9)), dae.Autoencoder(SMALL)
        adversary = dae.Discriminator()
    noise = [torch.empty(2, *shape, device="meta") for shape in model.latent_shapes()]
    lvae.objective(model(x, label, noise, None, label > 0), x, CLASSES).loss.backward()
    model.generate(noise, label, mean_guidance=1.5, variance_guidance=[0.0, 1, 1, 2])
    vq.decode(vq.encode(image))
    for loss in dae.training_losses(ae, image, None, adversary)[:2]:
        loss.backward()
    model, noise = reference(TINY)
    close(torch.compile(model.generate, backend="eager", fullgraph=True)(noise), model.generate(noise))

# ---------------------------------------------------------------- the update
def begun(config):
    torch.manual_seed(0)
    model = lvae.LVAE(config).train()
    return model, copy.deepcopy(model).eval(), lvae.make_optimizer(model)

def snapshot(modules, optimizers):
    """Copies of all that an update may change."""
    tensors = [t for module in modules for t in module.state_dict().values()]
    tensors += [t for optimizer in optimizers for state in optimizer.state.values() for t in state.values()]
    return {i: t.clone() for i, t in enumerate(tensors)}

def test_training_as_the_docstring_has_it():
    code = lvae.__doc__[lvae.__doc__.index("    config ="):].split("\n\n")[0].replace("\n    ", "\n").strip()
    h, labels = 3 * seeded(0, 4, 2, 8, 8), torch.arange(4)
    names = dict(lvae=lvae, torch=torch, copy=copy, replace=replace, labels=labels, h=h)
    small = lvae.adapted(replace(CLASSES, sigma_q=0.1, lr=3e-3, warmup=20, steps=150, batch=4), 2, 8, 4)
    torch.manual_seed(0)
    with patch.dict(lvae.PRESETS, toy=small):
        exec(code, names)
    x, ema = lvae.normalise(h, names["config"]), names["ema"]
    again = ema.generate(ema.encode(x, labels), labels)
    assert names["h"].shape == h.shape and (again - x).square().mean() < 0.5  # it has learnt its samples

def test_a_skipped_step_leaves_no_trace():
    model, ema, optimizer = begun(TINY)
    states = {}
    for step, factor, limit in ((1, 1, 1), (2, math.nan, 1), (1001, 1, 1e-9), (1000, 1, 1e-9)):
        model.config = replace(TINY, skip_threshold=limit)  # holds after step 1000
        stats = lvae.train_step(model, ema, optimizer, [(X * factor,)], step)
        assert stats["skipped"] == (step in (2, 1001)), step
        states[step] = snapshot([model, ema], [optimizer])
    assert same(states[1], states[2]) and same(states[1], states[1001])

def test_the_average_is_warmed_up():
    model, ema, optimizer = begun(replace(TINY, ema=0.9))
    for step, decay in ((1, 2 / 11), (1000, 0.9)):
        ema.out_proj.weight.data.zero_()
        lvae.train_step(model, ema, optimizer, [(X,)], step)
        close(ema.out_proj.weight, (1 - decay) * model.out_proj.weight)
    assert same(dict(ema.named_buffers()), dict(model.named_buffers()))

def test_accumulation_is_a_larger_batch():
    noise, found = awake(TINY)[1], []
    for parts in (1, 2):
        update, seen = begun(TINY), []
        update[0].eval()  # one power-iteration state for both
        batches = [(X[i::parts], None, [eps[i::parts] for eps in noise]) for i in range(parts)]
        stats = lvae.train_step(*update, batches, 1, average=seen.extend)
        found.append(torch.cat([*(g.flatten() for g in seen), stats["loss"].view(1)]))
    close(found[1], found[0], 1e-4)
    close(stats["lr"], TINY.lr / TINY.warmup)
    update = begun(replace(TINY, warmup=0, lr_decay=0.5, steps=10))
    rates = [lvae.train_step(*update, [(X,)], step)["lr"] for step in (1, 6, 8, 10)]
    close(rates, [TINY.lr, TINY.lr, TINY.lr * 3 / 5, TINY.lr / 5])

# ---------------------------------------------------------------- the autoencoder and its files
def test_autoencoder_training():
    torch.manual_seed(0)
    ae = dae.Autoencoder(replace(SMALL, kl_weight=0.5, edge_weight=2.0, adversarial_start=1))
    adversary = dae.Discriminator(16)
    x, noise, seen, states = torch.rand(2, 3, 32, 32) * 2 - 1, seeded(0, 2, 4, 16, 16), [], {}
    mean, logvar = ae.moments(x)
    rec = ae.decode(mean + (0.5 * logvar).exp() * noise)
    loss, hinge, _ = dae.training_losses(ae, x, noise, adversary, F.mse_loss, average=seen.extend)
    kl = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum() / 2
    adversarial = -0.5 * seen[0].norm() / (seen[1].norm() + 1e-4) * adversary(rec).mean()
    error = x - rec
    edges = (error[:, :, 1:] - error[:, :, :-1]).abs().sum() + (error[..., 1:] - error[..., :-1]).abs().sum()
    expected = 3072 * (error.abs().mean() + F.mse_loss(x, rec)) + edges + 0.5 * kl + adversarial
    close(loss, expected, 1e-4)
    moved = torch.autograd.grad(hinge, list(ae.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in moved)
    parts = {"dae": ae, "discriminator": adversary}
    optimizers = dae.make_optimizers(parts, SMALL)
    for step, factor in ((1, 1), (2, math.nan), (3, 1)):
        assert dae.train_step(parts, optimizers, factor * x, noise, step)["skipped"] == (step == 2)
        states[step] = snapshot(parts.values(), optimizers.values())
    assert same(states[1], states[2]) and not same(states[2], states[3])

class ForeignDict(dict):
    """Stands for a class of a training framework."""

@in_folder()
def test_every_file_of_autoencoders():
    for config in (dae.Config(z_channels=6, width=32, mult=(1, 3, 2), blocks=2, attention=(2,)),
                   dae.Config(width=64, mult=(1, 2), blocks=1, mid_attention=False, codebook=8)):
        state = dae.Autoencoder(config).state_dict()
        old = theirs = dae.to_diffusers(state)
        last = state[f"decoder.up.{len(config.mult) - 1}.block.1.conv2.bias"]
        assert theirs["decoder.up_blocks.0.resnets.1.conv2.bias"] is last
        for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            old = {k.replace(new, name): v for k, v in old.items()}
        full = {f"first_stage_model.{k}": v for k, v in state.items()} | {"model.x": torch.ones(1)}
        torch.save({"state_dict": {**state, "loss.x": torch.ones(1)}, "x": ForeignDict(a=1)}, "model.ckpt")
        torch.save(full, "full.ckpt"), torch.save(old, "old.bin"), torch.save({"vae": theirs}, "vae.bin")
        torch.save(state, "before-1.6.pt", _use_new_zipfile_serialization=False)
        with zipfile.ZipFile("download.zip", "w", zipfile.ZIP_DEFLATED) as file:
            file.write("model.ckpt")
        quiet(dae.main, "convert model.ckpt new.safetensors")
        quiet(dae.main, "convert new.safetensors back.pt")
        for name in ("model.ckpt", "full.ckpt", "vae.bin", "old.bin", "before-1.6.pt", "download.zip",
                     "new.safetensors", "back.pt"):
            assert same(dae.load(name).state_dict(), state), name
        said = quiet(dae.main, "info full.ckpt")
        assert "first_stage_model" in said and "model.* (1 tensors)" in said and f"mult {config.mult}" in said

class Call:
    """Pickles as the call of a function."""

    def __reduce__(self):
        return os.system, ("touch broken-in",)

@in_folder()
def test_hostile_files():
    torch.save({"state_dict": {}, "x": Call()}, "call.pt"), Path("text.pt").write_text("hello")
    shutil.copy("run/dae.pt", "cut.pt"), os.truncate("cut.pt", 99_999)
    text = json.dumps({i: {"dtype": "U8", "shape": [8], "data_offsets": [i, i + 8]} for i in (0, 4)}).encode()
    Path("overlap.pt").write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
    with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"\x80\x02}." + bytes(1 << 24))
    for name, cause in (("call.pt", ""), ("cut.pt", "truncated"), ("overlap.pt", "damaged"),
                        ("bomb.pt", "compressed"), ("text.pt", "not a checkpoint")):
        refused(cause, dae.load, name), refused(name, train.load_checkpoint, name)
    assert not os.path.exists("broken-in")

@contextlib.contextmanager
def published():
    """A server of this folder for what is published, and an empty cache; yields what ends the server."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}/"
    autoencoders = {name: f"{here}{name}.zip" for name in dae.ADDRESSES}
    pipelines = {name: f"{here}{name}.pt?id=x" for name in dae.PIPELINES}
    with patch.dict(dae.ADDRESSES, autoencoders), patch.dict(dae.PIPELINES, pipelines), \
            patch.object(torch.hub, "get_dir", lambda: "hub"), contextlib.redirect_stderr(io.StringIO()):
        yield lambda: (server.shutdown(), server.server_close())

@in_folder()
def test_downloads():
    """A published autoencoder by its name: from a server, then from the cache."""
    with zipfile.ZipFile("kl-f8.zip", "w") as file:
        file.write("run/dae.pt", "model.ckpt")
    Path("vq-f8.zip").write_text("junk")
    with published() as end:
        first = dae.load("kl-f8").state_dict()
        refused("could not be downloaded", dae.load, "vq-f8"), refused("as it is", dae.load, "vq-f4")
        end()
        assert same(dae.load("kl-f8").state_dict(), first)  # from the cache
    assert os.listdir("hub/checkpoints") == ["kl-f8.ckpt"]

@in_folder()
def test_published_pipelines():
    """The authors' weights by name: a file called so, then the cache, then Drive or its web page."""
    Path("imagenet.pt").write_text("<!DOCTYPE html> Virus scan warning")
    torch.save({"dae." + k: v for k, v in dae.Autoencoder(SMALL).state_dict().items()}, "church.pt")
    assert dae.PIPELINES["church"].endswith("?id=1-174o5MywJYhhOcYI6yzMfUP5DvnlPcK&export=download&confirm=t")
    with published() as end:
        assert dae.local("church") == "hub/checkpoints/church_pipeline.pt"
        for cause in ("web page", "/d/1-Td-danBSRX4IhlXAD_CtgFARbu4C9hH/view", "inet_pipeline.pt"):
            refused(cause, sampling, "generate imagenet"), refused(cause, training, "--init imagenet")
        refused("/d/1--uqW9S8-tbMJG8whHDx1qPJeH5W0j9r/view", dae.local, "bedroom")
        end()
        assert dae.load("church").config.z_channels == 4  # from the cache
        os.rename("church.pt", "imagenet")
        assert dae.local("imagenet") == "imagenet"

@in_folder()
def test_first_stages_without_quant_convs():
    """SD3's and FLUX's, and either conv alone: loaded, described, and converted both ways to the bit."""
    beside = "vae/diffusion_pytorch_model.safetensors"
    for quant, post in ((False, False), (True, False), (False, True)):
        config = replace(SMALL, z_channels=16, quant_conv=quant, post_quant_conv=post)
        state = dae.Autoencoder(config).state_dict()
        torch.save(state, "a.ckpt"), quiet(dae.main, f"convert a.ckpt {beside}")
        quiet(dae.main, f"convert {beside} back.ckpt")
        for name in ("a.ckpt", beside, "back.ckpt"):
            assert same(dae.load(name).state_dict(), state)
            assert f"quant_conv {quant}, post_quant_conv {post}" in quiet(dae.main, f"info {name}")
        fields = json.loads(Path("vae/config.json").read_text())
        assert (fields["use_quant_conv"], fields["use_post_quant_conv"]) == (quant, post)

@in_folder()
def test_what_tensors_cannot_tell():
    """diffusers' config.json beside a file; metadata of 5 MiB; control characters in a tensor's name."""
    state = dae.Autoencoder(SMALL).state_dict()
    dae.write("a.safetensors", lambda file: dae.save_safetensors(state | {"\x1b\nx": torch.ones(1)}, file))
    content = Path("a.safetensors").read_bytes()
    size, = struct.unpack("<Q", content[:8])
    header = json.loads(content[8:8 + size]) | {"__metadata__": {"thumbnail": "x" * (5 << 20)}}
    text = json.dumps(header).encode()
    Path("a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size:])
    refused("\\x1b\\nx", dae.load, "a.safetensors")
    torch.save(state, "b.ckpt")
    for fields in ({"norm_num_groups": 16}, {"act_fn": "relu"}, {"vq_embed_dim": 8},
                   {"vq_embed_dim": None, "x": 1}):
        for kind in ("AutoencoderKL", "VQModel", "UNet2DModel"):
            Path("config.json").write_text(json.dumps({"_class_name": kind} | fields))
            if "x" in fields or kind == "UNet2DModel":
                dae.load("b.ckpt")
            else:
                refused(next(iter(fields)), dae.load, "b.ckpt")

@in_folder()
def test_released_pipelines():
    config = replace(CLASSES, num_classes=1000, shift=0.5, scale=2.0, batch=2)
    (model, noise), ae = reference(config), dae.Autoencoder(SMALL)
    flat = {"vae." + released_name(k): v for k, v in model.state_dict().items() if not k.endswith(".u")}
    torch.save(flat | {"dae." + k: v for k, v in ae.state_dict().items()}, "inet.pt")
    with patch.dict(lvae.PRESETS, imagenet=config):
        sampler = sample.Sampler("inet.pt", precision="fp32")
        close(sampler.model.generate(noise, 1), model.generate(noise, 1))
        paper = "--mean-guidance 0,1.5,1.5,1.5 --variance-guidance 3"
        for options in ("a.png", f"b.png {paper}", "c.png --mean-guidance 0"):
            sampling(f"generate inet.pt --label tench --n 2 --out {options}")
        a, b, c = (Image.open(f"{name}.png") for name in "abc")
        assert near(a, b, 0) and not near(a, c)  # the paper's guidance is the default
        line = "--init inet.pt --data latents.npz --out on --lr 1e-9 --warmup 0 --precision fp32 --steps "
        training(line + "1"), training(line + "2")
        state = train.load_checkpoint("on/checkpoint.pt")
        assert state["step"] == 2 and state["config"] == replace(sampler.config, lr=1e-9, warmup=0, steps=2)
        close(state["model"]["out_proj.weight"], model.out_proj.weight)
        assert same(state["dae"], ae.state_dict())
        sampler = sample.Sampler("on/checkpoint.pt")
        assert [sampler.label(text) for text in ("tench", "TENC", "0")] == [0, 0, 0]

# ---------------------------------------------------------------- figures and tables
def cells(path, rows, columns):
    """The 32x32 images of a grid, which are enlarged, without the names above and to the left."""
    picture = np.asarray(Image.open(path)).astype(int)[-rows * 130:, -columns * 130:]
    return picture.reshape(rows, 130, columns, 130, 3)[:, :128:4, :, :128:4].swapaxes(1, 2)

@in_folder()
def test_samples():
    """They depend on the seed and the number, not on the batch or the compiler."""
    images = []
    for options in ("--batch 7 --npz a.npz", "--batch 3", "--batch 3 --compile", "--precision bf16",
                    "--seed 1", "--temperature 0"):
        with patch.object(torch, "compile", lambda function, **options: function):
            sampling(f"generate {RUN} --n 7 --png-dir pngs --precision fp32 {options}")
        images.append(np.stack([Image.open(f"pngs/{i:06d}.png") for i in range(7)]))
    a, small_batch, compiled, bf16, seed, cold = images
    assert near(a, small_batch) and near(a, compiled) and near(a, bf16, 20) and not near(a, bf16, 0)
    assert not near(a, seed, 10) and near(cold[:4], cold[:1])
    with np.load("a.npz") as file:
        order = [[image.tobytes() for image in a].index(image.tobytes()) for image in file["arr_0"]]
        assert file["arr_1"].tolist() == [i // 4 for i in order] != sorted(file["arr_1"])
    assert not glob.glob("*tmp")

@in_folder()
def test_figures():
    other, sampler = "photos/right/1.png", sample.Sampler(RUN)
    photos = [train.read_image(path, 32) for path in (PHOTO, other)]
    noise = sampler.posterior(sampler.latents(photos), LABEL)
    ends = sampler.images(noise, LABEL)
    mixed = sampler.images(noise[:1] + sampler.noise(0, [0, 1])[1:], LABEL)
    sampling(f"reconstruct {RUN} {PHOTO} {other} --groups 1,6")
    original, _, back, first, whole = cells("reconstructions.png", 5, 2)
    assert near(original, photos, 0) and near(back, ends) and near(whole, ends) and near(first, mixed)
    sampling(f"interpolate {RUN} {PHOTO} {other}")
    steps = cells("interpolation.png", 1, 7)[0]
    assert near(steps[[1, 5]], ends) and near(steps[[0, 6]], photos) and not near(steps[3], steps[1])
    assert "group 2, channel" in sampling(f"manifold {RUN} --data photos --range 99")
    sheet = cells("manifold.png", 7, 7)
    assert not near(sheet[0, 0], sheet[0, 6]) and not near(sheet[0, 0], sheet[6, 0])
    said = sampling(f"rates {RUN} --data photos")
    shares = [float(line.split()[3]) for line in said.splitlines() if re.match(r" +\d+ .* of 16$", line)]
    assert len(shares) == 6 and abs(sum(shares) - 100) < 0.4 and "20 images" in said
    said = sampling(f"neighbors {RUN} --n 1 --neighbors 3")
    distances = [float(number) for number in re.findall(r"png \((.*?)\)", said)]
    assert len(distances) == 3 and distances == sorted(distances)

@in_folder()
def test_outpainting_keeps_the_image():
    """Whatever the wide prior, the posterior's z stands where the image does; 1x1 groups are kept."""
    given, real, sampler = [], lvae.LVAE.generate, sample.Sampler(RUN, precision="fp32")

    def generate(model, noise, *rest, **options):
        given.append(noise)
        return real(model, noise, *rest, **options)
    x = sampler.latents([train.read_image(PHOTO, 32)])
    latents = sampler.model(x, LABEL[:1], [0 * eps for eps in sampler.noise(0, [0])]).latents
    for direction, size, top, left in (("right", (16, 32), 0, 0), ("left", (16, 32), 0, 1),
                                       ("up", (32, 16), 1, 0), ("both --width 3", (16, 48), 0, 1)):
        given.clear()
        with patch.object(lvae.LVAE, "generate", generate):
            sampling(f"outpaint {RUN} {PHOTO} --precision fp32 --direction {direction}")
        for eps, latent, shape in zip(given[0], latents, sampler.model.latent_shapes(size), strict=True):
            prior = lvae.Gaussian(torch.randn(1, *shape), torch.rand(1, *shape) + 0.5)
            wide, (h, w) = prior.mean + prior.var.sqrt() * eps(prior), latent.z.shape[2:]
            corner = wide[:, :, top * h % shape[1]:, left * w % shape[2]:]
            close(corner[:, :, :h, :w], latent.z, 1e-4)

class Inception(torch.nn.Module):
    """The interface of the usual network, small."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = torch.nn.Conv2d(3, 6, 4, 4), torch.nn.Linear(6, 5)

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        x = self.conv(img / 255).mean([2, 3])
        if no_output_bias:
            return F.linear(x, self.out.weight).softmax(1)
        return x if return_features else self.out(x).softmax(1)

def share_within(points, centres):
    """The share of points within the balls of centres that reach their 3rd neighbours."""
    distance = np.linalg.norm(points[:, None] - centres, axis=2)
    radius = np.sort(np.linalg.norm(centres[:, None] - centres, axis=2), axis=1)[:, 3]
    return (distance <= radius).any(1).mean()

def table(line):
    """The rows that `evaluate` prints, as dicts of numbers, weights per level left out."""
    names, *rows = (line.split() for line in sampling(f"evaluate {line}").splitlines() if line[:1] == " ")
    return [{name: float(value) for name, value in zip(names, row) if ":" not in value} for row in rows]

@in_folder()
def test_evaluation():
    torch.manual_seed(0)
    network, use, rng = Inception(), " --batch 70 --features net.pt", np.random.default_rng(0)
    network.out.weight.data *= 50
    network.out.bias.data[0] = 999  # must not count
    torch.jit.script(network).save("net.pt")
    images = rng.integers(0, rng.integers(40, 256, (90, 1, 1, 3)), (90, 8, 8, 3)).astype(np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    features, p = (network(x, wanted, not wanted).detach().double().numpy() for wanted in (True, False))
    a, b, p = features[:50], 1.5 * features[50:], np.repeat(p, 60, axis=0)
    (m, s), (mu, sigma) = ((some.mean(0), np.cov(some, rowvar=False)) for some in (a, b))
    fid = ((m - mu) ** 2).sum() + np.trace(s + sigma) - 2 * np.sqrt(np.linalg.eigvals(s @ sigma).real).sum()
    scores = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in (p[:5000], p[5000:])]
    np.savez("a.npz", arr_0=images[:50]), np.savez("many.npz", arr_0=np.repeat(images, 60, axis=0))
    np.savez("b.npz", mu=mu, sigma=sigma, features=b)
    row, = table("a.npz --reference b.npz" + use)
    close([row["FID"], row["precision"], row["recall"]], [fid, share_within(a, b), share_within(b, a)], 1e-3)
    close(table("many.npz" + use)[0]["IS"], np.mean(scores), 1e-4)
    sampling("evaluate photos --export x.npz" + use)
    rows = table(f"{RUN} --reference x.npz --n 8 --mean-guidance 0,0:1:2:3 --temperature 1,0" + use)
    assert [(row.get("w_mu"), row["temperature"]) for row in rows] == [(0, 1), (0, 0), (None, 1), (None, 0)]
    sampler, paths = sample.Sampler(RUN, precision="fp32"), sorted(glob.glob("photos/*/*"))
    x, label = sampler.latents([train.read_image(path, 32) for path in paths]), torch.arange(20) // 10
    for kind, rebuilt in (("autoencoder", sampler.decode(x)),
                          ("lvae", sampler.images(sampler.posterior(x, label), label))):
        np.savez(f"{kind}.npz", arr_0=rebuilt)
        row, = table(f"{kind}.npz --reference x.npz" + use)
        found, = table(f"{RUN} --reconstruct {kind} --reference x.npz --precision fp32" + use)
        close([found["FID"], found["saturation"]], [row["FID"], row["saturation"]], 0.01)
    refused("inception-2015", table, "photos"), refused("arr_0", table, "latents.npz" + use)
    np.savez("fortran.npz", arr_0=np.asfortranarray(images[:50]))
    close(table("fortran.npz --reference b.npz" + use)[0]["FID"], fid, 1e-3)
    with patch.object(np, "savez", side_effect=OSError(30, "Read-only file system")):
        refused("Read-only", sampling, "evaluate photos --export y.npz" + use)
    refused("written", sampling, "evaluate photos --export photos/left/0.png/y.npz" + use)
    plain = Image.open(PHOTO)
    plain.resize((10, 10)).save("photos/left/icon.png")
    refused("from 10 to 32", table, "photos" + use)
    assert "images of 24x24" in sampling("evaluate photos --image-size 24" + use)

@in_folder()
def test_upsampling_stack():
    small = "--data photos --steps 1 --batch 2 --width 16 --encoder-width 16 --precision fp32 --out "
    training("--dataset toy-rgb16 --num-classes 2 " + small + "base")
    training("--dataset toy-upsampler " + small + "up")
    base, up = "base/checkpoint.pt", "up/checkpoint.pt"
    sampling(f"generate {base} --upsampler {up} --n 2 --precision fp32 --png-dir large")
    sampler = sample.Sampler(base, precision="fp32", upsampler=up)
    up = sampler.upsampler
    low_res = up.latents(sampler.images(sampler.noise(0, [0, 1]), LABEL))
    large, noise = [Image.open(f"large/00000{i}.png") for i in (0, 1)], up.noise((0, 1), [0, 1])
    assert near(large, up.images(noise, None, low_res=low_res))
    assert not near(large, up.images(noise, None, low_res=-low_res), 5)

@in_folder()
def test_bench():
    flops = []
    for options in ("--train 2", "--no-guided"):
        said = sampling(f"bench {RUN} --batch 2 --seconds 0.01 --precision fp32 {options}")
        flops.append({name: float(number) for name, number in re.findall(r"^(\w+) +([\d.]+) ", said, re.M)})
        assert {"LVAE", "decoder", "together"} <= flops[-1].keys()
    assert 1.9 < flops[0]["LVAE"] / flops[1]["LVAE"] < 2.1 and flops[0]["training"] > 3 * flops[1]["LVAE"]

# ---------------------------------------------------------------- data
@in_folder()
def test_images():
    digest = hashlib.sha256(b"".join(train.toy(i, 64)[0].tobytes() for i in range(64))).hexdigest()
    assert digest.startswith("f7d796c9ead86f45")  # every figure was measured on these scenes
    plain, exif = Image.fromarray(train.toy(0, 32)[0]), Image.Exif()
    grey, clear = plain.convert("L"), plain.convert("RGBA")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    clear.putalpha(0)
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    for image, target, tolerance, options in (
            (plain, plain, 0, {}), (plain.rotate(90), plain, 0, {"exif": exif}), (clear, 255, 0, {}),
            (grey, grey.convert("RGB"), 0, {}), (deep, grey.convert("RGB"), 1, {}),
            (plain.convert("P"), plain, 16, {}), (plain.convert("CMYK"), plain, 8, {"format": "jpeg"})):
        image.save("image.png", **options)
        error = np.asarray(target).astype(int) - train.read_image("image.png", 32)
        assert np.abs(error).mean() <= tolerance, image
    Path("photos/left/a\x1b[31m.png").write_text("none"), os.truncate("photos/left/2.png", 200)
    said = training(PIXELS + "new")
    assert "skipped photos/left/a\\x1b[31m.png" in said and "skipped photos/left/2.png" in said
    assert "2 of 21 are bad" in said

@in_folder()
def test_other_peoples_images():
    """No picture is lost for its text or EXIF; one rule scales numbers, and some are no picture."""
    plain, text = Image.fromarray(train.toy(0, 32)[0]), PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * (3 << 20), zip=True)
    for options in ({"pnginfo": text}, {"exif": b"\x00\x08\x00\x02\x01\x12\x00\x03"}):
        plain.save("image.png", **options)
        assert near(train.read_image("image.png", 32), plain, 0)
    for kind, given, shown in (
            (np.float32, 0.5, 128), (np.float32, 1.0, 255), (np.float32, 100, 100), (np.float32, 51400, 200),
            (np.int32, 100, 100), (np.int32, 51400, 200), (np.uint16, 25700, 100), (np.uint16, 255, 1),
            (np.float32, math.nan, None), (np.float32, -1, None), (np.int32, 70000, None)):
        values = np.zeros((32, 32), kind)
        values[8:] = given
        Image.fromarray(values).save("image.tiff")
        if shown is None:
            refused("not those of a picture", train.read_image, "image.tiff", 32)
        else:
            assert near(train.read_image("image.tiff", 32)[-1], shown)

@in_folder()
def test_other_peoples_folders():
    """Links are followed once, names are bytes, runs are not data, and nothing waits for a pipe."""
    os.symlink(".", "photos/self"), os.symlink(".", "photos/again"), os.symlink("none", "photos/gone.jpg")
    os.mkfifo("photos/pipe.png"), shutil.copytree("run", "photos/runs/old")
    os.mkdir(b"photos/caf\xe9\x1b"), shutil.copy(PHOTO, b"photos/caf\xe9\x1b/\xff.png")
    line = f"{TRAIN}--data photos --dae none --image-size 16 --num-classes 3 {MODEL}photos/own"
    for steps in (4, 5):
        said = shell(f"{line} --steps {steps}")
        assert "17 to train on, 4 held out, 3 classes" in said and "\x1b" not in said
    shell(f"{SAMPLE}generate photos/own/checkpoint.pt")
    refused("--out may not be --data", training, "--data photos --out ./photos")
    assert "10 images" in sampling(f"reconstruct {RUN} photos/left")
    sampler = sample.Sampler(RUN)
    sampler.classes = sampler.folders = ["cats, small", "dogs"]
    assert sampler.labels("dogs,cats, small") == [1, 0] == sampler.labels("1,cats")
    np.savez("latents.npz", latents=X * 1e30)
    refused("finite numbers", training, LATENTS + "new")

@in_folder()
def test_lmdb():
    if importlib.util.find_spec("lmdb") is None:
        return print("    not tested: lmdb is not installed")
    import lmdb
    with lmdb.open("lsun") as database, database.begin(write=True) as transaction:
        for path in Path("photos/left").iterdir():
            transaction.put(path.name.encode(), path.read_bytes())
    assert "8 to train on, 2 held out, uncond" in training(PIXELS + "new --data lsun")

@in_folder()
def test_kinds_of_data():
    pixels, photo = sample.Sampler("pixels/checkpoint.pt"), train.read_image(PHOTO, 16)[None]
    assert near(pixels.decode(pixels.latents(photo)), photo, 0) and pixels.config.num_classes == 0
    assert "19 to train on, 5 held out, 3 classes" in training(LATENTS + "new")
    config = train.load_checkpoint("new/checkpoint.pt")["config"]
    close([config.shift, config.scale], [3.0, 5.0], 0.05)
    np.savez("nan.npz", latents=X * math.nan)
    torch.save(dae.Autoencoder(replace(SMALL, z_channels=3)).state_dict(), "pixels.pt")
    refused("finite numbers", training, "--data nan.npz")
    refused("not for latents of 4", training, LATENTS + "x --dae pixels.pt")

# ---------------------------------------------------------------- training, and nothing lost
def log_of(out):
    """A run's log but for its clock; of a step run twice the later line counts."""
    entries = {}
    for entry in map(json.loads, Path(out, "log.jsonl").read_text().splitlines()):
        entry.pop("images_per_s", None)
        entries[entry.pop("stage"), entry["step"], "held_out_rate" in entry] = entry
    return entries

def states(out):
    checkpoint = torch.load(f"{out}/checkpoint.pt")
    return {f"{part}.{k}": v for part in ("model", "ema", "dae") for k, v in checkpoint[part].items()}

@in_folder()
def test_resuming_is_bit_identical():
    (path,), real = glob.glob("run/latents_*.npy"), train.log
    h, before = np.load(path), os.stat(path).st_mtime_ns
    assert h.shape == (20, 2, 4, 16, 16) and not np.array_equal(h[:, 0], h[:, 1])
    for place in (("dae", 3), ("dae", 4), ("lvae", 1), ("lvae", 4), None):
        def log(run, stage, step, stats):
            if (stage, step) == place:
                raise InterruptedError  # as a kill, at a place of our choosing
            return real(run, stage, step, stats)
        with patch.object(train, "log", log), contextlib.suppress(InterruptedError):
            training(PHOTOS + "other")
    assert same(states("run"), states("other")) and log_of("run") == log_of("other")
    refused("trained with width = 16", training, PHOTOS + "run --width 32")
    os.remove("run/dae.pt")  # the checkpoint alone is enough
    with open("run/log.jsonl", "a") as file:
        file.write('{"stage": "lvae", "st')  # as a kill may leave it
    training(PHOTOS + "run --steps 5"), training(PHOTOS + "other --steps 5")
    assert same(states("run"), states("other")) and log_of("run") == log_of("other")
    assert os.stat(path).st_mtime_ns == before  # not encoded again

@in_folder()
def test_a_full_disk_loses_nothing():
    def full(*arguments):
        raise OSError(28, "No space left on device")
    before = states("run")
    with patch.object(os, "fsync", full):
        refused("No space left", training, PHOTOS + "run --steps 6")
    with patch.object(os, "posix_fallocate", full):
        refused("No space left", sampling, f"generate {RUN} --n 4 --out x.png")
    assert same(before, states("run")) and not glob.glob("**/*tmp", recursive=True)

@in_folder()
def test_a_second_run_and_a_hundred_skips():
    real = train.log

    def log(*arguments):
        refused("another process", training, LATENTS + "new")
        return real(*arguments)
    with patch.object(train, "log", log):
        training(LATENTS + "new")
    refused("100 steps in a row", training, LATENTS + "other --every 500 --lr 1e30 --steps 300")

def shell(line, code=0, **variables):
    """Run python with the words of a line; returns what it said."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), **variables}
    done = subprocess.run([sys.executable, *line.split()], env=variables, timeout=1200, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == code, done.stdout
    return done.stdout

TRAIN, SAMPLE, DAE = (f"{HERE}/{name}.py " for name in ("train", "sample", "dae"))
TWO = "-m torch.distributed.run --nproc_per_node=2 "

@in_folder()
def test_two_processes_as_one():
    line = TRAIN + "--accumulate 2 " + PHOTOS
    for out, prefix in (("one", ""), ("two", TWO)):  # an adversary's batch norm would see each part
        shell(f"{prefix}{line}{out} --dae-adversarial-weight 0")
        shell(f"{prefix}{SAMPLE}generate {RUN} --samples 11 --batch 2 --precision fp32 --npz {out}.npz")
    one, two = log_of("one"), log_of("two")
    assert one.keys() == two.keys()
    for place, entry in one.items():
        for key, value in entry.items():
            assert np.allclose(value, two[place][key], rtol=1e-3, atol=1e-3), (place, key)
    with np.load("one.npz") as a, np.load("two.npz") as b:
        assert np.array_equal(a["arr_0"], b["arr_0"]) and np.array_equal(a["arr_1"], b["arr_1"])
    shell(f"{TWO}{line}one --dae-adversarial-weight 0 --steps 5")  # resumed by another number
    assert "multiple of 2" in shell(f"{TWO}{line}x --dae-batch 5", code=1)
    assert "one process" in shell(f"{SAMPLE}rates {RUN}", code=2, WORLD_SIZE="2")

@in_folder()
def test_signals():
    for number in (signal.SIGTERM, signal.SIGINT):
        line, log = f"{TRAIN}{LATENTS}{number.name} --steps 99999 --every 99999", f"{number.name}/log.jsonl"
        process = subprocess.Popen([sys.executable, *line.split()], stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.DEVNULL)
        while process.poll() is None and not (os.path.exists(log) and len(log_of(number.name)) > 2):
            time.sleep(0.05)
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 0 and number.name in said and "goes on from there" in said, said
        step = train.load_checkpoint(f"{number.name}/checkpoint.pt")["step"]
        assert list(log_of(number.name))[-1] == ("lvae", step, False)

XLA = """
import torch_xla, torch_xla.debug.metrics as metrics, train
real, compiled = train.average, []
def average(tensors):
    real(tensors)
    compiled.append(metrics.metric_data("CompileTime")[0])
def launch(function, args):
    function(0, *args)
train.average, torch_xla.launch = average, launch
train.main()
assert compiled[-1] == compiled[len(compiled) // 2], compiled
"""

@in_folder()
def test_xla():
    """The loss of a CPU, as many programs late as early, resuming on another device."""
    if importlib.util.find_spec("torch_xla") is None:
        return print("    not tested: torch_xla is not installed")
    Path("count.py").write_text(XLA)
    for program, out, device, steps in (("count.py ", "xla", "xla", 12), (TRAIN, "xla", "cpu", 14),
                                        (TRAIN, "cpu", "cpu", 12), (TRAIN, "cpu", "xla", 14)):
        pictures = "--dae run/dae.pt" if out == "cpu" else ""
        shell(f"{program}{LATENTS}{out} {pictures} --every 100 --log-every 2 --device {device} "
              f"--steps {steps}", PJRT_DEVICE="CPU")
    for place, entry in log_of("cpu").items():
        close(log_of("xla")[place].get("loss", 1.0), entry.get("loss", 1.0))

@in_folder()
def test_mistakes_are_refused():
    os.mkdir("empty"), os.mkdir("bad"), Path("bad/a.png").write_text("x")
    for cause, line in (
            ("no image found", "--data empty"), ("no usable image", "--data bad"), ("invalid", "--dataset x"),
            ("No such", "--dae none.pt"), ("heads", "--heads 7,7,7,7"), ("does not fit", "--num-classes 1")):
        refused(cause, training, f"--data photos --dae none --image-size 16 --out x {line}")
    refused("no such class", sampling, f"generate {RUN} --label up")
    refused("per level", sampling, f"generate {RUN} --mean-guidance 1,2")
    for cause, line in (("church_outdoor_train_lmdb", f"{TRAIN}--dataset church"),
                        ("a\\x1b", f"{SAMPLE}generate a\x1b"), ("a\\x1b", f"{DAE}info a\x1b")):
        said = shell(line, code=2)
        assert cause in said and said.count("\n") == 1 and "\x1b" not in said and said.startswith("error: ")

if __name__ == "__main__":
    words, passed, failed = sys.argv[1:] or [""], 0, 0
    for name, test in list(globals().items()):
        if name.startswith("test_") and any(word in name for word in words):
            started = time.time()
            try:
                test()
                passed += 1
                print(f"ok      {name} ({time.time() - started:.1f} s)", flush=True)
            except Exception:
                failed += 1
                print(f"FAILED  {name}\n{traceback.format_exc()}", flush=True)
    print(f"{passed} passed, {failed} failed")
    sys.exit(bool(failed or not passed))
