"""Tests on a CPU, 3 minutes: `python test_lvae.py [part of a name ...]`, or pytest."""
import ast
import copy
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import zipfile
import zlib
from collections import defaultdict
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.distributions import Normal, kl_divergence
from torch.utils._pytree import tree_leaves

import dae
import lvae
import sample
import train

# ---------------- helpers
HERE = Path(__file__).resolve().parent
README = (HERE / "README.md").read_text("utf-8")
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
RUN, A, B = "run/checkpoint.pt", "photos/a/0.png", "photos/b/1.png"
TRAIN, SAMPLE, DAE = (f"{HERE}/{name}.py " for name in ("train", "sample", "dae"))
TWO = "-m torch.distributed.run --nproc_per_node=2 "

def seeded(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))

X, LABEL = seeded(1, 2, 4, 16, 16), torch.tensor([0, 1])

def filled(module, rename=str):
    """Weights, a function of their names: those of the reference values."""
    state = {rename(k): v for k, v in module.state_dict().items() if not k.endswith(".u")}
    for k, v in state.items():
        a = seeded(zlib.crc32(k.encode()), *v.shape)
        state[k] = a / math.sqrt(a[0].numel()) if a.ndim > 1 else 0.1 * a + k.endswith("weight")
    return state

def released_name(key):
    """Our parameter's name in the authors' weights."""
    for ours, theirs in (
            (r"\blevels\.(\d+)", r"layer_list.\1.layer_list"), ("qkv", "qkvproj"), ("embedding", "embed"),
            (r"encoder\.layer_list", "encoder.encoder_levels"), ("initial", "initial_x"),
            (r"\bout(_proj)?\b", "outproj"), (r"(prior|posterior)_block\.dense2", r"\1_block.dense2.conv")):
        key = re.sub(ours, theirs, key)
    return key

def reference(config):
    """A model that is filled so, and noise."""
    model = lvae.LVAE(replace(config, attention="released")).eval()
    model.load_state_dict(lvae.from_released(filled(model, released_name)))
    return model, [seeded(1000 + i, 2, *shape) for i, shape in enumerate(model.latent_shapes())]

def awake(config):
    """A model with no layer near zero, and noise."""
    torch.manual_seed(0)
    model = lvae.LVAE(config).eval()
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return model, [torch.randn(2, *shape) for shape in model.latent_shapes()]

def close(a, b, limit=1e-5):
    a, b = (torch.as_tensor(t, dtype=torch.float64).detach() for t in (a, b))
    error = float((a - b).norm() / b.norm())
    assert error < limit, error

def same(a, b):
    """Whether the tensors in two containers are equal."""
    a, b = (list(filter(torch.is_tensor, tree_leaves(some))) for some in (a, b))
    return len(a) == len(b) and all(map(torch.equal, a, b))

def near(a, b, limit=1):  # uint8, the same but for rounding
    return np.allclose(a, b, rtol=0, atol=limit)

def quiet(main, line):
    """Run a command in this process; returns what it printed."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        main(line.split())
    return out.getvalue()

training = partial(quiet, train.main)

def sampling(line):
    command, words = line.split(maxsplit=1)
    return quiet(sample.main, f"{command} --precision fp32 --batch 20 {words}")

def shell(line, code=0, **variables):
    """Run python with the words of a line; returns what it said."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)} | variables
    done = subprocess.run([sys.executable, *line.split()], env=env, timeout=1200, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == code, done.stdout
    return done.stdout

def refused(expected, function, *args, **options):
    """The call must end in an error of one line that says what is expected."""
    with unittest.TestCase().assertRaisesRegex((ValueError, OSError), rf"\A.*{re.escape(expected)}.*\Z"):
        function(*args, **options)

@cache
def prepared():
    """A folder made once: photos, latents, a short run of both stages, a network."""
    made = tempfile.TemporaryDirectory()
    with chdir(made.name):
        os.makedirs("photos/a"), os.makedirs("photos/b")
        for i in range(20):
            Image.fromarray(train.toy(i, 32)[0]).save(f"photos/{'ab'[i % 2]}/{i}.png")
        np.savez("latents.npz", latents=3 + 5 * seeded(0, 24, 4, 16, 16), labels=np.arange(24) % 3)
        training(PHOTOS + "run")
        torch.jit.script(Inception(3, 6, 4, 4).requires_grad_(False)).save("net.pt")
    return made

@contextmanager
def in_folder():
    """Decorates a test, to run in a fresh folder with what is prepared."""
    with tempfile.TemporaryDirectory() as path, chdir(path):
        shutil.copytree(prepared().name, path, dirs_exist_ok=True)
        yield

def begin():
    """The prepared run's sampler; all photos, their latents, their labels."""
    sampler = sample.Sampler(RUN, precision="fp32")
    images = [train.read_image(path, 32) for path in sorted(Path("photos").glob("*/*"))]
    return sampler, images, sampler.latents(images), torch.arange(20) // 10

# ---------------- the model
def test_the_model_equals_the_original():
    for config, label, mean, kl, drawn in (
            (TINY, None, [-6.22288, -5.42245, -4.14541], [0.0762, 2.9034, 49.0746, 843.9101],
             [-7.15309, -9.96485, -3.10727]),
            (CLASSES, LABEL, [-8.25854, -15.57633, 2.78529], [0.0814, 3.5673, 53.0686, 3549.3867],
             [-3.13589, -7.53544, 4.48146])):
        model, noise = reference(config)
        out = model(X, label, noise)
        close(out.mean[0, 0, 3::6, 5], mean), close(out.kl[::3, 0], kl)
        close(model.generate(noise, label)[0, 0, 3::6, 5], drawn)
    guided = model.generate(noise, LABEL, None, [0, 1.5, 1, 0.5], [0.5, 0.25, 0, 0.3])
    close(guided[0, 0, 3::6, 5], [-2.98948, -7.27332, 4.25234])

def test_autoencoders_equal_the_original():
    x = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, (1, 3, 32, 32)).astype(np.float32))
    for name, latent, image in (
            ("kl-f8", [-0.03595, -0.17218, 0.58589], [-0.5168, -0.89573, -1.15188]),
            ("vq-f4", [0.12052, -0.27562, -0.29231], [-1.03127, -0.29836, -0.37182])):
        ae = dae.Autoencoder(dae.PRESETS[name])
        ae.load_state_dict(filled(ae))
        h = ae.encode(x)
        close(h.flatten()[:42:14], latent, 1e-4)
        close(ae.decode(seeded(2, *h.shape)).flatten()[100:1000:422], image, 1e-4)

def test_names_and_numbers_of_the_readme():
    rows = re.findall(r"^\| .* \| (\w+)\.py \| `(\w+)` \|$", README, re.M)
    assert len(rows) >= 17 and all(hasattr(sys.modules[module], name) for module, name in rows)
    names = "church bedroom-f4 bedroom-f8 bedroom-f16 imagenet church-rgb32 church-upsampler church-pixel"
    with torch.device("meta"):
        models = [lvae.LVAE(lvae.PRESETS[name]) for name in names.split()]
    counts = [f"{sum(p.numel() for p in m.parameters()):,}" for m in models]
    assert counts == re.findall(r"\d{2,3},\d{3},\d{3}", README)

def test_budgets():
    """A change pays for what it adds."""
    budgets, raises = {"lvae": 606, "dae": 590, "train": 815, "sample": 602, "test_lvae": 767}, 0
    for name, lines in budgets.items():
        text = (HERE / f"{name}.py").read_text()
        assert len(text.splitlines()) <= lines and max(map(len, text.splitlines())) <= 110, name
        for node in ast.walk(ast.parse(text)):
            raises += isinstance(node, ast.Raise) and name != "test_lvae"
            assert not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < 50, node.name
    assert raises <= 45 and sum((HERE / f"{name}.py").stat().st_size for name in budgets) <= 195_000

def test_copied_alone():
    for module in ("lvae", "dae"):
        others = {"PIL", "lvae", "dae", "train"} - {module}
        code = f"import sys, {module}; assert not {others} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)

def test_spectral_term():
    model, expected = awake(CLASSES)[0].train(), 0
    for _ in range(200):
        total = model(X, LABEL).spectral
    for side, layers in zip((1, 4, 8, 16), model.levels):
        for conv in (m for m in layers.modules() if isinstance(m, lvae.SpectralConv2d)):
            expected += side * torch.linalg.matrix_norm(conv.weight.flatten(1), 2)
    close(total, expected, 1e-3)
    close(*(torch.autograd.grad(value, conv.weight)[0] for value in (total, expected)), 0.03)

def test_layers():
    x, block, layer = seeded(0, 2, 32, 4, 4), lvae.LVAE(CLASSES).levels[1][0], lvae.Attention(32, 4, "sdpa")
    assert torch.equal(layer(x), x) and block.prior_block(x, x[:, :, 0, 0]).abs().max() < 1e-6
    assert 0 < (block.shared_block(x, x[:, :, 0, 0]) - x).norm() < 0.5 * x.norm()
    torch.nn.init.normal_(layer.out.weight)
    q, k, v = layer.qkv(x.flatten(2).mT).view(2, 16, 3, 4, 8).permute(2, 0, 3, 1, 4)
    mixed = (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
    close(layer(x), x + layer.out(mixed.transpose(1, 2).flatten(2)).mT.view_as(x))

def test_kl_schedule():
    refused("upsample", replace, TINY, upsample=-2)
    shares = lvae.kl_shares(TINY)
    close([shares.sum(), shares[-1] / shares[0]], [66.7, 1010 / 11], 1e-4)
    per = lvae.kl_shares(replace(TINY, kl_schedule=("constant_per", 8, 4, 2, 1)))
    close(per / per[0], [1, 1, 2, 2, 4, 4, 4, 8, 8, 8])
    kl = torch.tensor([0.5, 5, 10, 15, 20, 25, 30, 40], requires_grad=True)[:, None]
    weights = lvae.kl_weights(kl, torch.full((8,), 1000 / 145.5))  # a = 10, 2a = 20, 3a = 30
    close(weights[:, 0], [0.1, 0.5, 1, 1, 1, 1.5, 2, 2])
    assert not weights.requires_grad and lvae.kl_weights(kl * 0, shares[:8]).isfinite().all()

def test_objective_and_recomputing():
    found = []
    for recompute in (False, True):
        model = awake(replace(CLASSES, recompute=recompute))[0].train()
        out = model(X, LABEL)  # noise is drawn inside the blocks
        losses = lvae.objective(out, X, model.config)
        losses.loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    close(found[1], found[0])
    distortion = kl_divergence(Normal(X, TINY.sigma_q), Normal(out.mean, (0.5 * out.logvar).exp())).sum() / 2
    rate = (lvae.kl_weights(out.kl, lvae.kl_shares(CLASSES)) * out.kl).sum() / 2
    close([losses.distortion, losses.weighted_rate], [distortion, rate])
    close(losses.loss, distortion + rate + 0.1 * out.spectral)
    free = lvae.objective(out, X, replace(CLASSES, kl_schedule=("none",)))
    close([free.weighted_rate, lvae.bits_per_dim(1024 * math.log(2), TINY)], [out.kl.sum() / 2, 1.0])
    assert lvae.normalise(X + 99, TINY).max() == 4

def test_generation():
    for config, label in ((TINY, None), (CLASSES, LABEL)):
        model, noise = awake(config)
        out = model(X, label, noise)
        impose = [partial(lvae.whiten, l.z) for l in out.latents]
        for given in model.encode(X, label, noise), impose:
            close(model.generate(given, label, n=2), out.mean, 1e-4)
        cold = model.generate(noise, label, temperature=0.5)
        close(cold, model.generate([eps / 2 for eps in noise], label))
    refused("expected", model.generate, [noise[0][:1], *noise[1:]])
    close(model.generate(noise), model.generate(noise, model.embedding(torch.tensor([10, 10]))))
    refused("range", model.generate, None, [0, 11])
    refused("guidance", model.generate, noise, mean_guidance=1.0)
    model = lvae.LVAE(replace(CLASSES, hierarchical_prior=False))
    refused("guidance", model.generate, None, LABEL, mean_guidance=1.0)
    refused("expected", lvae.LVAE(lvae.PRESETS["toy-upsampler"]).generate)

def test_label_dropout_and_precision():
    (model, noise), seen = awake(replace(CLASSES, label_dropout=1.0)), []
    model.encoder.levels[0][0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[1]))
    exact, blind = model(X, LABEL, noise), model.train()(X, LABEL, noise)
    assert not blind.mean.allclose(exact.mean, atol=1e-3)
    assert torch.equal(*seen)  # the encoder sees the labels that are dropped
    with lvae.autocast(X.device, torch.bfloat16):
        out = model.eval()(X, LABEL, noise)
    assert {t.dtype for t in [*out[:4], *out.latents[0].prior, out.latents[0].z]} == {torch.float32}
    close(out.mean, exact.mean, 0.05), close(out.spectral, model(X).spectral)  # u moves in training only

def test_nothing_looks_from_the_host():
    """Hidden CPU tensors and looks at a content fail on the meta device; the compiler sees one graph."""
    with torch.device("meta"):
        model, x, label, image = lvae.LVAE(CLASSES), X.to("meta"), LABEL.to("meta"), torch.ones(2, 3, 32, 32)
        vq, ae = dae.Autoencoder(replace(SMALL, codebook=9)), dae.Autoencoder(SMALL)
        noise = [torch.empty(2, *shape) for shape in model.latent_shapes()]
    lvae.objective(model(x, label, noise, None, label > 0), x, CLASSES).loss.backward()
    model.generate(noise, label, mean_guidance=1.5, variance_guidance=[0.0, 1, 1, 2])
    vq.decode(vq.encode(image))
    for loss in dae.training_losses(ae, image, noise[-1][:, :4], dae.Discriminator().to("meta"))[0].values():
        loss.backward()
    model, noise = reference(TINY)
    close(torch.compile(model.generate, backend="eager", fullgraph=True)(noise), model.generate(noise))

# ---------------- training steps
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
    assert names["h"].shape == h.shape and (again - x).square().mean() < 0.5

def test_the_update():
    model = awake(replace(TINY, ema=0.9, lr_decay=0.5, steps=2000))[0].train()
    parts = model, ema, optimizer = model, copy.deepcopy(model).eval(), lvae.make_optimizer(model)
    ema.out_proj.weight.data.zero_()
    for step, factor, limit, rate, decay in (
            (1, 1, 1e9, 0.01, 2 / 11), (2, math.nan, 1e9, 0, 1), (1001, 1, 1e-9, 0, 1),
            (1000, 1, 1e-9, 1, 0.9), (1751, 1, 1e9, 0.25, 0.9)):
        model.config = replace(model.config, skip_threshold=limit)  # holds after step 1000
        before = copy.deepcopy([p.state_dict() for p in parts])
        stats = lvae.train_step(*parts, [(X * factor,)], step)
        close(ema.out_proj.weight, before[1]["out_proj.weight"].lerp(model.out_proj.weight, 1 - decay))
        assert stats["skipped"] == (not rate) == same(before, [p.state_dict() for p in parts]), step
        assert same(list(ema.buffers()), list(model.buffers()))
        if rate:
            close([stats["lr"], optimizer.param_groups[0]["lr"]], [rate * TINY.lr] * 2)

def test_accumulation_is_a_larger_batch():
    found = []
    for parts in (1, 2):
        model, noise = awake(TINY)  # in evaluation mode: one power-iteration state for both
        batches = [(X[i::parts], None, [eps[i::parts] for eps in noise]) for i in range(parts)]
        loss = lvae.train_step(model, copy.deepcopy(model), lvae.make_optimizer(model), batches, 1)["loss"]
        found.append(torch.cat([loss.view(1), *(p.grad.flatten() for p in model.parameters())]))
    close(found[1], found[0], 1e-4)

def test_autoencoder_training():
    torch.manual_seed(0)
    ae = dae.Autoencoder(replace(SMALL, kl_weight=0.5, edge_weight=2.0, adversarial_start=1, lr=0.01))
    adversary, x = dae.Discriminator(16), torch.rand(2, 3, 32, 32) * 2 - 1
    adversary[-1].weight.data *= 50  # ratio below the bound
    noise, seen, states = seeded(0, 2, 4, 16, 16), [], []
    mean, logvar = ae.moments(x)
    rec = ae.decode(mean + (0.5 * logvar).exp() * noise)
    loss, hinge = dae.training_losses(ae, x, noise, adversary, F.mse_loss, average=seen.extend)[0].values()
    kl = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum() / 2
    adversarial = -0.5 * seen[0].norm() / (seen[1].norm() + 1e-4) * adversary(rec).mean()
    edges = sum((x - rec).diff(dim=dim).abs().sum() for dim in (2, 3))  # twice the weight, two images
    close(loss, 3072 * (F.l1_loss(x, rec) + F.mse_loss(x, rec)) + edges + 0.5 * kl + adversarial, 1e-4)
    close(hinge, (F.relu(1 - adversary(x)) + F.relu(1 + adversary(rec))).mean() / 2)
    assert set(torch.autograd.grad(hinge, ae.parameters(), allow_unused=True)) == {None}
    parts = {"dae": ae, "discriminator": adversary}
    optimizers = dae.make_optimizers(parts, SMALL)
    adversary[-1].weight.data.zero_()  # ratio above it
    for step, factor in ((1, 1), (2, math.nan), (3, 1)):
        stats = dae.train_step(parts, optimizers, factor * x, noise, step)
        assert stats["skipped"] == (step == 2)
        states += [copy.deepcopy([p.state_dict() for p in (ae, adversary, *optimizers.values())])]
    assert same(states[0], states[1]) and not same(states[1], states[2])
    close(stats["adversarial_weight"], 0.5 * 0.05 * 3072)
    assert [[a["param_groups"][0]["lr"] for a in s[2:]] for s in states[::2]] == [[1e-4] * 2, [3e-4, 2e-4]]
    ae.quant_conv.bias.data[4:] = 99
    assert (ae.moments(x)[1] == 20).all()

# ---------------- files
@in_folder()
def test_every_file_of_autoencoders():
    new, beside = "vae/diffusion_pytorch_model.safetensors", Path("vae/config.json")
    for config in (dae.Config(z_channels=6, width=32, mult=(1, 3, 2), blocks=2, attention=(2,)),
                   replace(SMALL, mid_attention=False, codebook=8, post_quant_conv=False),
                   replace(SMALL, quant_conv=False), replace(SMALL, quant_conv=False, post_quant_conv=False)):
        state = dae.Autoencoder(config).state_dict()
        torch.save({"state_dict": {**state, "loss.x": X}, "x": defaultdict(None, a=1)}, "model.ckpt")
        quiet(dae.main, f"convert model.ckpt {new}"), quiet(dae.main, f"convert {new} back.pt")
        older = dae.translate(state, to_diffusers=True)
        last = f"decoder.up.{len(config.mult) - 1}.block.1.conv2.bias"
        assert older["decoder.up_blocks.0.resnets.1.conv2.bias"] is state[last]
        for names in ("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"):
            older = {k.replace(*names): v for k, v in older.items()}
        full = {f"first_stage_model.{k}": v for k, v in state.items()} | {"model.x": X}
        torch.save(full, "full.ckpt"), torch.save({"vae": older}, "older.bin")
        torch.save(state, "before-1.6.pt", _use_new_zipfile_serialization=False)
        with zipfile.ZipFile("download.zip", "w", zipfile.ZIP_DEFLATED) as file:
            file.write("model.ckpt")
        for name in (new, "back.pt", "older.bin", "before-1.6.pt", "download.zip", "full.ckpt"):
            assert same(dae.load(name).state_dict(), state), name
        said, convs = quiet(dae.main, "info full.ckpt"), (config.quant_conv, config.post_quant_conv)
        assert f"mult {config.mult}" in said and "quant_conv %s, post_quant_conv %s" % convs in said
        assert "first_stage_model" in said and ", 1 left out" in said
        fields = json.loads(beside.read_text())
        assert (fields["use_quant_conv"], fields["use_post_quant_conv"]) == convs
    beside.write_text('{"norm_num_groups": 32}'), dae.load(new)
    beside.write_text('{"norm_num_groups": 16}'), refused("norm_num_groups", dae.load, new)

@in_folder()
def test_hostile_files():
    call = SimpleNamespace(__reduce_ex__=lambda protocol: (os.system, ("touch broken-in",)))
    torch.save({"state_dict": {}, "x": call}, "call.pt"), Path("text.pt").write_text("hello")
    quiet(dae.main, "convert run/dae.pt cut.pt"), quiet(dae.main, "convert run/dae.pt cut.safetensors")
    os.truncate("cut.pt", 99_999), os.truncate("cut.safetensors", 99_999)
    with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"\x80\x02}." + bytes(1 << 24))
    state = dae.load("run/dae.pt").state_dict() | {"\x1b\nx" * (1 << 20): torch.ones(1)}  # a long header, too
    dae.write("name.safetensors", lambda file: dae.save_safetensors(state, file))
    parts = {i: {"dtype": "F32", "shape": [2], "data_offsets": [i, i + 8]} for i in (0, 4)}
    text = json.dumps(parts).encode()
    Path("overlap.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    for name, cause in (("call.pt", ""), ("cut.pt", "not a zip"), ("cut.safetensors", "fill it"),
                        ("overlap.safetensors", "do not fill it"), ("bomb.pt", "compressed"),
                        ("text.pt", "web page"), ("name.safetensors", "\\x1b\\nx")):
        refused(cause, dae.load, name), refused(name, train.load_checkpoint, name)
    assert not os.path.exists("broken-in")

@in_folder()
def test_downloads():
    os.mkdir("web"), Path("web/imagenet").write_text("<html>")
    state, web = dae.load("run/dae.pt").state_dict(), Path("web").absolute().as_uri()
    with zipfile.ZipFile("web/kl-f8", "w") as file:
        file.write("run/dae.pt", "model.ckpt")
    torch.save({"dae." + k: v for k, v in state.items()}, "web/church")
    published = {name: (file, f"{web}/{name}") for name, (file, _) in dae.PUBLISHED.items()}
    with patch.dict(dae.PUBLISHED, published), patch.object(torch.hub, "get_dir", lambda: "hub"):
        refused("web/imagenet as it is, as hub/checkpoints/inet_pipeline.pt", sampling, "generate imagenet")
        refused("web page", training, "--init imagenet"), refused("not be downloaded", dae.load, "vq-f4")
        dae.load("kl-f8"), quiet(dae.main, "info church")
        assert sorted(os.listdir("hub/checkpoints")) == ["church_pipeline.pt", "kl-f8.ckpt"]
        os.rename("web/church", "imagenet"), shutil.rmtree("web")
        assert all(same(dae.load(name).state_dict(), state) for name in ("kl-f8", "church", "imagenet"))

@in_folder()
def test_released_pipelines():
    config = replace(CLASSES, num_classes=1000, shift=0.5, scale=2.0, batch=2)
    (model, noise), ae = reference(config), dae.Autoencoder(SMALL)
    flat = {"vae." + released_name(k): v for k, v in model.state_dict().items() if not k.endswith(".u")}
    torch.save(flat | {"dae." + k: v for k, v in ae.state_dict().items()}, "inet.pt")
    with patch.dict(lvae.PRESETS, imagenet=config):
        for options in ("a.png", "b.png --mean-guidance 0,1.5,1.5,1.5 --variance-guidance 3",
                        "c.png --mean-guidance 0"):
            sampling(f"generate inet.pt --label tench --n 2 --out {options}")
        for steps in (1, 2):
            training(f"--init inet.pt --data latents.npz --out on --lr 1e-9 --warmup 0 --steps {steps}")
    a, b, c = (Image.open(f"{name}.png") for name in "abc")
    assert near(a, b, 0) and not near(a, c)  # the paper's guidance is the default
    state = train.load_checkpoint("on/checkpoint.pt")
    assert state["config"] == replace(config, attention="released", lr=1e-9, warmup=0, steps=2)
    assert state["step"] == 2 and same(state["dae"], ae.state_dict())
    sampler = sample.Sampler("on/checkpoint.pt", precision="fp32")
    sampler.classes += ["cats, small", "dogs"]
    texts = "tench", "TENC", "0", "Cats, small", "dogs, cats"
    assert list(map(sampler.labels, texts)) == [[0]] * 3 + [[1001], [1002, 1001]]
    close(sampler.generate(noise, 1), model.generate(noise, 1))

# ---------------- commands
def cells(path, rows, columns):
    """The 32x32 images of an enlarged grid, without its names."""
    picture = np.asarray(Image.open(path)).astype(int)[-rows * 130:, -columns * 130:]
    return picture.reshape(rows, 130, columns, 130, 3)[:, :128:4, :, :128:4].swapaxes(1, 2)

@in_folder()
@patch.object(torch, "compile", lambda function: function)
def test_samples_and_the_upsampling_stack():
    images = []
    for options in ("--npz a.npz --out samples.png", "--batch 3 --compile", "--precision bf16", "--seed 1",
                    "--temperature 0"):
        sampling(f"generate {RUN} --n 8 {options}")
        images.append(cells("samples.png", 2, 4).reshape(8, 32, 32, 3))  # four of each class
    a, small, bf16, seed, cold = images
    assert near(a, small) and near(a, bf16, 20) and not near(a, bf16, 0)
    assert not near(a, seed, 10) and near(cold[:4], cold[:1]) and not list(Path().glob("*tmp"))
    with np.load("a.npz") as file:
        order = [np.abs(a - image).max((1, 2, 3)).argmin() for image in file["arr_0"]]
        assert sorted(order) == list(range(8)) and near(a[order], file["arr_0"], 0)
        assert file["arr_1"].tolist() == [i // 4 for i in order] != sorted(file["arr_1"])
    for name in ("toy-rgb16 --num-classes 2", "toy-upsampler"):
        training(f"--data photos --steps 1 --batch 2 --width 16 --encoder-width 16 --dataset {name}")
    base, up = (f"runs/{name}/checkpoint.pt" for name in ("toy-rgb16", "toy-upsampler"))
    sampling(f"generate {base} --upsampler {up} --n 2 --npz large.npz")
    base, up = (sample.Sampler(path, precision="fp32") for path in (base, up))
    low_res = up.latents(base.images(base.noise(0, [0, 1]), LABEL))
    a, b = (up.images(up.noise((0, 1), [0, 1]), None, low_res=factor * low_res) for factor in (1, -1))
    drawn = np.load("large.npz")["arr_0"][np.random.default_rng(0).permutation(2)]  # in their order again
    assert near(drawn, a) and not near(drawn, b, 5)

@in_folder()
def test_figures():
    def nats(out, x):
        return lvae.distortions(out, x, run.config) + out.kl.sum(0)
    run, images, x, label = begin()
    pair = x[::10]
    costs = [nats(run.infer(pair, guess), pair) for guess in (0, 1)]
    own = torch.stack(costs).argmin(0)
    assert own.tolist() == [sample.likeliest(run, latent) for latent in pair]
    noise = run.posterior(pair, own)
    ends, mixed = (run.images(eps, own) for eps in (noise, noise[:1] + run.noise(0, [0, 1])[1:]))
    sampling(f"reconstruct {RUN} {A} {B} --groups 1")
    assert near(cells("reconstructions.png", 4, 2), [images[::10], run.decode(pair), ends, mixed])
    sampling(f"interpolate {RUN} {A} {B} --steps 3")
    *middle, embedded = [(a[:1] + a[1:]) / 2 for a in (*noise, run.model.embedding(own))]
    steps = [images[0], ends[0], *run.images(middle, embedded), ends[1], images[10]]
    assert near(cells("interpolation.png", 1, 5)[0], steps)
    kl = sample.channel_kl(run.infer(run.generate(run.noise(0, range(64)), 0), 0))
    channels = list(map(int, re.findall(r"channel (\d+)", sampling(f"manifold {RUN}"))))
    assert channels == kl[:2].argmax(1).tolist()
    noise = run.noise(0, [0])
    noise[0][:, channels[0]], noise[1][:, channels[1]] = 2.25, -2.25
    assert near(cells("manifold.png", 7, 7)[0, 6], run.images(noise, LABEL[:1])[0])
    torch.manual_seed(0)
    out, said = run.model(x, label), sampling(f"rates {RUN}")
    close(float(re.search(r"ELBO ([\d.]+)", said)[1]), nats(out, x).mean(), 1e-4)
    close(np.array(re.findall(r"^ +\d+ +\w+ +([\d.]+)", said, re.M), float), out.kl.mean(1), 1e-3)
    drawn = run.latents(run.images(run.noise(0, [0]), LABEL[:1]))
    distances = (x - drawn).flatten(1).norm(dim=1).sort().values[:3]
    found = re.findall(r"png \((.*?)\)", sampling(f"neighbors {RUN} --n 1 --neighbors 3"))
    close(np.array(found, float), distances, 1e-3)
    latents = run.infer(x[:1], label[:1]).latents
    with patch.object(lvae.LVAE, "generate", autospec=True, side_effect=lvae.LVAE.generate) as generate:
        sampling(f"outpaint {RUN} {A} --width 3")
    given, shapes = generate.call_args.args[1], run.model.latent_shapes((16, 48))
    for eps, (_, _, z), shape in zip(given, latents, shapes, strict=True):  # z stands, whatever the prior
        prior = lvae.Gaussian(torch.randn(1, *shape), torch.rand(1, *shape) + 0.5)
        wide = prior.mean + prior.var.sqrt() * eps(prior)
        close(wide[:, :, :, :z.shape[3]], z, 1e-4)

class Inception(torch.nn.Conv2d):  # the usual network's interface
    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        x = F.conv2d(img / 255, self.weight, self.bias, self.stride).mean([2, 3])
        return x if return_features else (50 * x if no_output_bias else x).softmax(1)

def table(line):
    """What `evaluate` prints: numbers by name."""
    said = sampling(f"evaluate {line} --batch 70 --features net.pt")
    names, numbers = (row.split() for row in said.splitlines() if row[:1] == " ")
    return dict(zip(names, map(float, numbers)))

@in_folder()
def test_evaluation():
    network, rng = torch.jit.load("net.pt"), np.random.default_rng(0)
    images = rng.integers(0, rng.integers(40, 256, (90, 1, 1, 3)), (90, 8, 8, 3)).astype(np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    features, p = network(x, True).double(), network(x, False, True).double()
    a, b = features[:50], 1.5 * features[50:]
    (m, s), (mu, sigma) = ((some.mean(0), some.T.cov()) for some in (a, b))
    cross = torch.linalg.eigvals(s @ sigma).sqrt().real.sum()
    fid = (m - mu).square().sum() + (s + sigma).trace() - 2 * cross
    radii = [torch.cdist(some, some).sort().values[:, 3] for some in (a, b)]
    precision = (torch.cdist(a, b) <= radii[1]).any(1).double().mean()
    recall = (torch.cdist(b, a) <= radii[0]).any(1).double().mean()
    parts = p.repeat_interleave(60, 0).split(5000)
    score = sum((q * (q / q.mean(0)).log()).sum(1).mean().exp() for q in parts) / 2
    np.savez("a.npz", arr_0=images[:50]), np.savez("many.npz", arr_0=np.repeat(images, 60, axis=0))
    np.savez("b.npz", mu=mu, sigma=sigma, features=b)
    row = table("a.npz --reference b.npz")
    close([row["FID"], row["precision"], row["recall"]], [fid, precision, recall], 1e-3)
    close(table("many.npz")["IS"], score, 1e-3)
    refused("inception-2015", sampling, "evaluate photos"), refused("arr_0", table, "latents.npz")
    run, images, x, label = begin()
    table("photos --image-size 32 --export x.npz")
    options = "--label a --n 8 --mean-guidance 1.5 --temperature 0.7"
    sampling(f"generate {RUN} --npz samples.npz {options}")
    for line, images in (
            ("photos", images), (f"{RUN} {options}", np.load("samples.npz")["arr_0"]),
            (f"{RUN} --reconstruct autoencoder", run.decode(x)),
            (f"{RUN} --reconstruct lvae", run.images(run.posterior(x, label), label))):
        np.savez("same.npz", arr_0=images)
        found, expected = (table(f"{of} --reference x.npz") for of in (line, "same.npz"))
        close([found["FID"], found["saturation"]], [expected["FID"], expected["saturation"]], 1e-3)
    with patch.object(sample.Sampler, "draw", autospec=True, side_effect=sample.Sampler.draw) as draw:
        table(f"{RUN} --n 16")
    assert sum(draw.call_args.args[3]) == 8 and np.abs(np.diff(draw.call_args.args[3])).sum() > 1
    refused("--image-size", table, "photos/a --reference photos/b")
    refused("no image found", table, "run --image-size 32")  # its grids are no samples

@in_folder()
def test_bench():
    flops = []
    for options in ("--train 2 --mean-guidance 1", ""):
        said = sampling(f"bench {RUN} --batch 2 --seconds 0.01 {options}")
        flops.append({k: float(v) for k, v in re.findall(r"^(\w+) +([\d.]+) ", said, re.M)})
    guided, plain = flops
    assert 1.9 < guided["LVAE"] / plain["LVAE"] < 2.1 and guided["training"] > 3 * plain["LVAE"]
    close(plain["together"], plain["LVAE"] + plain["decoder"], 1e-3)

# ---------------- data
@in_folder()
def test_images():
    scenes = np.stack([train.toy(i, 64)[0] for i in range(64)])
    assert zlib.crc32(scenes) == 0x2de29d8d  # every figure was measured on these scenes
    plain, exif = Image.fromarray(train.toy(0, 32)[0]), Image.Exif()
    palette, inks, clear, grey = map(plain.convert, ("P", "CMYK", "RGBA", "L"))
    deep, shown = Image.fromarray(np.asarray(grey, np.uint16) * 257), grey.convert("RGB")
    clear.putalpha(0)
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    cases = [(plain, plain, {"exif": b"\x00\x08\x00\x02\x01\x12\x00\x03"}), (clear, 255, {}),
             (plain.rotate(90), plain, {"exif": exif}), (deep, shown, {}), (grey, shown, {}),
             (palette, palette.convert("RGB"), {}), (inks, plain, {"format": "jpeg", "quality": 100})]
    for given, kind, shown in (  # one rule scales numbers, and some are no picture
            (1, "f4", 255), (100, "f4", 100), (51400, "f4", 200), (100, "i4", 100), (51400, "i4", 200),
            (255, "u2", 1), (math.nan, "f4", None), (-1, "f4", None), (70000, "i4", None)):
        cases.append((Image.fromarray(np.full((32, 32), given, kind)), shown, {"format": "tiff"}))
    for image, shown, options in cases:
        image.save("image.png", **options)
        if shown is None:
            refused("not those of a picture", train.read_image, "image.png", 32)
        else:
            assert near(train.read_image("image.png", 32), shown), image

@in_folder()
def test_other_peoples_folders():
    """Links are followed once, names are bytes, runs are no data, bad images and pipes are skipped."""
    os.symlink(".", "photos/self"), os.symlink(".", "photos/again"), os.symlink("none", "photos/gone.jpg")
    os.mkfifo("photos/pipe.png"), shutil.copytree("run", "photos/runs/old")
    os.mkdir(b"photos/caf\xe9\x1b"), shutil.copy(A, b"photos/caf\xe9\x1b/\xff.png")
    Path("photos/a/a\x1b[31m.png").write_text("none"), os.truncate("photos/a/2.png", 200)
    line = f"--data photos --dae none --image-size 16 --num-classes 3 {MODEL}photos/own"
    said = training(line) + training(f"{line} --steps 5") + sampling("generate photos/own/checkpoint.pt")
    assert said.count("2 of 22 are bad") == 2 and "\x1b" not in said and "a/a\\x1b[31m.png" in said
    assert said.count("17 to train on, 3 held out, 3 classes") == 2
    refused("--out may not be --data", training, "--data photos --out ./photos")
    assert "9 images" in sampling(f"reconstruct {RUN} photos/a")

@in_folder()
def test_kinds_of_data():
    training(PIXELS + "pixels")
    pixels, photo = sample.Sampler("pixels/checkpoint.pt"), train.read_image(A, 16)[None]
    assert near(pixels.decode(pixels.latents(photo)), photo, 0) and pixels.config.num_classes == 0
    assert "19 to train on, 5 held out, 3 classes" in training(LATENTS + "new")
    config = train.load_checkpoint("new/checkpoint.pt")["config"]
    close([config.shift, config.scale], [3.0, 5.0], 0.05)
    torch.save(dae.Autoencoder(replace(SMALL, z_channels=3)).state_dict(), "pixels.pt")
    refused("not for latents of 4", training, LATENTS + "x --dae pixels.pt")
    for factor in (math.nan, 1e30):
        np.savez("latents.npz", latents=X * factor)
        refused("finite numbers", training, LATENTS + "x")
    if importlib.util.find_spec("lmdb") is None:
        return print("    not tested: lmdb is not installed")
    import lmdb
    with lmdb.open("lsun") as database, database.begin(write=True) as txn:
        for path in Path("photos/a").iterdir():
            txn.put(path.name.encode(), path.read_bytes())
    assert "8 to train on, 2 held out, uncond" in training(PIXELS + "lmdb --data lsun")

# ---------------- training, and nothing lost
def log_of(out):
    """A run's log by stage and step, but for its clock."""
    entries = map(json.loads, Path(out, "log.jsonl").read_text().splitlines())
    return {(e.pop("stage"), e["step"], "held_out_rate" in e): e | {"seconds": 0} for e in entries}

@in_folder()
def test_resuming_is_bit_identical():
    a, b = (np.concatenate([train.batch_indices(0, 12, 4, n + i) for i in range(3)]) for n in (0, 3))
    assert sorted(a) == sorted(b) == list(range(12)) and a.tolist() != b.tolist()  # epochs
    drawn = [train.seed_step(0, step) or float(torch.rand(1)) for step in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    (path,), real = Path("run").glob("latents_*.npy"), train.log
    h, before = np.load(path), path.stat().st_mtime_ns
    assert h.shape == (20, 2, 4, 16, 16) and not np.array_equal(h[:, 0], h[:, 1])
    os.mkdir("other"), [Path(f"other/latents_{x}.npy").touch() for x in ("mine", 16 * "0")]  # old: goes
    for place in (("dae", 3), ("dae", 4), ("lvae", 1), ("lvae", 4), None):
        def log(run, stage, step, stats):
            if (stage, step) == place:
                raise InterruptedError  # as a kill, at a place of our choosing
            return real(run, stage, step, stats)
        with patch.object(train, "log", log), suppress(InterruptedError):
            training(PHOTOS + "other")
    refused("trained with width = 16", training, PHOTOS + "run --width 32")
    with patch.object(lvae, "train_step", side_effect=InterruptedError), suppress(InterruptedError), \
            patch.object(dae, "train_step", side_effect=dae.train_step) as steps:
        training(PHOTOS + "third")  # before the first step all may change
    seen, photos = train.to_uint8(torch.cat([call.args[2] for call in steps.call_args_list])), begin()[1]
    found = [any(near(image, photo, 0) for photo in photos) for image in seen]
    assert any(found) and not all(found)  # --flip mirrors some
    old = torch.load("third/dae.pt")
    old["discriminator"]["3.running_mean"] = torch.ones(128)  # as it was until adversaries lost theirs
    torch.save(old, "third/dae.pt")
    training(PHOTOS + "third --batch 2 --accumulate 2 --recompute --steps 1")
    training(PHOTOS.replace("photos", "photos/") + "third --batch 2 --accumulate 2 --steps 2")
    os.remove("run/dae.pt")  # the checkpoint alone is enough
    with open("run/log.jsonl", "a") as file:
        file.write('{"stage": "lvae", "st')  # as a kill may leave it
    training(PHOTOS + "run --steps 5"), training(PHOTOS + "other --steps 5")
    assert same(torch.load(RUN), torch.load("other/checkpoint.pt")) and log_of("run") == log_of("other")
    assert path.stat().st_mtime_ns == before and len(list(Path("other").glob("latents_*"))) == 2

@in_folder()
def test_full_disk_second_process_and_a_hundred_skips():
    before, saving = torch.load(RUN), (training, f"{PHOTOS}run --steps 6")
    for function, command, line in (("fsync", *saving), ("replace", *saving),
                                    ("posix_fallocate", sampling, f"generate {RUN} --n 4 --out x.png")):
        with patch.object(os, function, side_effect=OSError(28, "No space left on device")):
            refused("No space left", command, line)
    assert same(before, torch.load(RUN)) and not list(Path().rglob("*tmp"))
    with patch.object(train, "log", lambda *_: refused("another process", training, LATENTS + "new")):
        training(LATENTS + "new")
    refused("100 steps in a row", training, LATENTS + "other --every 500 --lr 1e30 --steps 300")

@in_folder()
def test_two_processes_as_one():
    line = f"{TRAIN}--accumulate 2 {PHOTOS}"
    for out, prefix in (("one", ""), ("two", TWO)):  # an adversary's batch norm would see each part
        shell(f"{prefix}{line}{out} --dae-adversarial-weight 0")
        shell(f"{prefix}{SAMPLE}generate {RUN} --samples 11 --batch 2 --precision fp32 --npz {out}.npz")
    torch.testing.assert_close(log_of("one"), log_of("two"), rtol=1e-3, atol=1e-3)
    assert Path("one.npz").read_bytes() == Path("two.npz").read_bytes()
    shell(f"{TWO}{line}one --dae-adversarial-weight 0 --steps 5")  # resumed by another number
    assert "multiple of 2" in shell(f"{TWO}{line}x --dae-batch 5", code=1)
    assert "one process" in shell(f"{SAMPLE}rates {RUN}", code=2, WORLD_SIZE="2")

@in_folder()
def test_signals():
    for name in ("SIGTERM", "SIGINT"):
        line, log = f"{TRAIN}{LATENTS}{name} --steps 99999 --every 99999", Path(name, "log.jsonl")
        child = subprocess.Popen([sys.executable, *line.split()], stdout=subprocess.PIPE, text=True,
                                 stderr=subprocess.DEVNULL)
        while child.poll() is None and not (log.exists() and len(log_of(name)) > 2):
            time.sleep(0.05)
        child.send_signal(getattr(signal, name))
        said = child.communicate(timeout=60)[0]
        assert child.returncode == 0 and name in said and "goes on from there" in said, said
        assert list(log_of(name))[-1][1] == train.load_checkpoint(f"{name}/checkpoint.pt")["step"]

XLA = """
import torch_xla, torch_xla.debug.metrics as metrics, train
real, compiled = train.average, []
def average(tensors):
    real(tensors)
    compiled.append(metrics.metric_data("CompileTime")[0])
train.average, torch_xla.launch = average, lambda function, args: function(0, *args)
train.main()
assert compiled[-1] == compiled[len(compiled) // 2], compiled
"""

@unittest.skipUnless(importlib.util.find_spec("torch_xla"), "torch_xla is not installed")
@in_folder()
def test_xla():
    """The loss of a CPU, as many programs late as early, resuming on another device."""
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
    os.mkdir("bad"), Path("bad/a.png").write_text("x")
    for cause, options in (
            ("a share", "--holdout 5"), ("expected sizes", "--dae train --dae-mult 1,x"),
            ("No such", "--dae none.pt"), ("no usable", "--data bad"), ("invalid", "--dataset x"),
            ("heads", "--heads 7,7,7,7"), ("does not fit", "--num-classes 1")):
        refused(cause, training, f"--data photos --dae none --image-size 16 --out x {options}")
    shutil.copy(A, "photos/a/new.png"), refused("16, 4] images", training, PHOTOS + "run --steps 6")
    for cause, options in (("no such class", "--label up"), ("per level", "--mean-guidance 1,2"),
                           ("File exists", f"--out {A}/x.png")):
        refused(cause, sampling, f"generate {RUN} {options}")
    refused("one per image", sampling, f"interpolate {RUN} {A} {B} --label a,b,a")
    for cause, line in (("church_outdoor_train_lmdb", f"{TRAIN}--dataset church"),
                        ("a\\x1b", f"{SAMPLE}generate a\x1b"), ("a\\x1b", f"{DAE}info a\x1b")):
        said = shell(line, code=2)
        assert cause in said and said.count("\n") == 1 and "\x1b" not in said and said.startswith("error: ")

if __name__ == "__main__":
    words, suite = sys.argv[1:] or [""], unittest.TestSuite()
    for name, test in list(globals().items()):
        if name.startswith("test_") and any(word in name for word in words):
            suite.addTest(unittest.FunctionTestCase(test))
    result = unittest.TextTestRunner(descriptions=False, verbosity=2).run(suite)
    sys.exit(not (result.testsRun and result.wasSuccessful()))
