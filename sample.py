"""Look at a trained model: one sub-command per thing to see. Needs a checkpoint and no data.

    python sample.py generate runs/toy/checkpoint.pt                                   # a grid, a row per class
    python sample.py generate runs/toy/checkpoint.pt --label castle --n 16 --mean-guidance 1.5 --variance-guidance 1
    python sample.py generate runs/toy/checkpoint.pt --mean-guidance 0,1.5,1.5,1.5     # per level, coarsest first
    python sample.py generate CHECKPOINT --n 50000 --npz samples.npz                   # for the guided-diffusion evaluator
    python sample.py generate inet_pipeline.pt --label tench                           # the authors' weights, as published
    python sample.py reconstruct runs/toy/checkpoint.pt photo.jpg ...                  # originals above reconstructions

Guidance (Eq. 2) is 0 when off. A sample depends on the seed, its number and its label, not on the batch it is made in.
"""
import argparse
import os
import sys

import numpy as np
import torch
from tqdm import tqdm

import dae as daes
import lvae
from train import (Parser, UserError, autocast, cli, grid, guidance_levels, load_checkpoint, pick_device, pick_dtype,
                   read_image, reserve, to_tensor, to_uint8, write)

# ---------------------------------------------------------------- the model


class Sampler:
    """A checkpoint's EMA weights and autoencoder, on a device: noise, labels or images in, uint8 images out."""

    def __init__(self, path, device="auto", precision="fp32", dae=None):
        state = load_checkpoint(path)
        self.device = pick_device(device)
        self.dtype = pick_dtype(self.device, precision)
        self.config, self.dataset = state["config"], state["run"].get("dataset")
        self.folders = self.classes = state["classes"]         # the names of the folders that it was trained on, if any
        synsets = all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in self.folders)
        if self.config.num_classes == 1000 and synsets and (self.folders or self.dataset == "imagenet"):
            self.classes = IMAGENET_CLASSES
        self.model = daes.fill(lambda: lvae.LVAE(self.config), state["ema"], path)
        if dae or state["dae"]:
            self.dae = daes.load(dae) if dae else daes.from_state(state["dae"], path)
        elif self.config.first_stage == "none":
            self.dae = daes.Identity()
        else:
            raise UserError(f"{path} was trained on latents and holds no autoencoder: name one with --dae FILE")
        if self.dae.config.z_channels != self.config.data_channels:
            raise UserError(f"the autoencoder's latents have {self.dae.config.z_channels} channels, the model's "
                            f"{self.config.data_channels}")
        self.model.to(self.device, memory_format=torch.channels_last)
        self.dae.to(self.device)
        self.size = self.config.resolution * self.dae.config.f                # side of the images, in pixels

    def noise(self, seed, numbers):
        """Whitened noise of samples `numbers`, a list of (B, z, h, w), top-down. Drawn on the host, a stream per sample."""
        streams = [np.random.default_rng((seed, int(i))) for i in numbers]
        return [torch.from_numpy(np.stack([s.standard_normal(shape, np.float32) for s in streams])).to(self.device)
                for shape in self.model.latent_shapes()]

    def means(self, n):
        """The posterior's eps that give its means: zeros, a list of (n, z, h, w)."""
        return [torch.zeros(n, *shape, device=self.device) for shape in self.model.latent_shapes()]

    @torch.no_grad()
    def images(self, noise, label, **guidance):
        """Noise (and labels (B,), or None) -> uint8 images (B, H, W, 3)."""
        with autocast(self.device, self.dtype):
            return self.decode(self.model.generate(noise, label, **guidance))

    @torch.no_grad()
    def latents(self, images):
        """uint8 (B, H, W, 3) -> normalised latents (B, C, h, w)."""
        with autocast(self.device, self.dtype):
            h = self.dae.encode(to_tensor(images).to(self.device))
        return ((h - self.config.shift) / self.config.scale).clamp(-4, 4)

    @torch.no_grad()
    def decode(self, x):
        """Normalised latents (B, C, h, w) -> uint8 images (B, H, W, 3). A few at a time: decoding is what takes memory."""
        parts = x.split(max(1, 4 * 256 ** 2 // self.size ** 2))
        with autocast(self.device, self.dtype):
            return np.concatenate([to_uint8(self.dae.decode(part * self.config.scale + self.config.shift)) for part in parts])

    def label(self, text):
        """A class by its name, a unique beginning of it, or its number; 'none' is no label."""
        count = self.config.num_classes
        if not count:
            raise UserError("--label: this model is unconditional")
        for known in (self.classes, self.folders):
            if text in known:
                return known.index(text)
        if text.isdigit() and int(text) < count:
            return int(text)
        if text == "none":
            return count
        starts = [i for i, name in enumerate(self.classes) if name.lower().startswith(text.lower())] if text else []
        if len(starts) == 1:
            return starts[0]
        names = [self.classes[i] for i in starts] or self.classes
        raise UserError(f"--label {text}: {'fits several classes' if starts else 'no such class'}; expected 0 to {count - 1}, none"
                        + (f", or one of {', '.join(names[:20])}{' ...' * (len(names) > 20)}" if names else ""))

    @torch.no_grad()
    def likeliest(self, x):
        """The class under which the latents x (1, C, h, w) cost the fewest nats: the encoder needs some label."""
        count = self.config.num_classes
        x = x.expand(count, -1, -1, -1)
        with autocast(self.device, self.dtype):
            out = self.model(x, torch.arange(count, device=self.device), self.means(count))
        return int((lvae.distortions(out, x, self.config) + out.kl.sum(0)).argmin())

    def name(self, label):
        return ("no label" if label == self.config.num_classes else
                self.classes[label] if label < len(self.classes) else str(label))


def make_sampler(args):
    return Sampler(args.checkpoint, args.device, args.precision, args.dae)


def check_guidance(sampler, args):
    """Command-line guidance -> keyword arguments of `generate`. A model of ImageNet has the paper's setting by default."""
    levels = lvae.resolutions(sampler.config)[::-1]
    if args.mean_guidance is None and args.variance_guidance is None and sampler.dataset == "imagenet" and args.label != ["none"]:
        args.mean_guidance, args.variance_guidance = guidance_levels(sampler.config, 1.5), [3.0]
    weights = {}
    for name in ("mean_guidance", "variance_guidance"):
        values = getattr(args, name) or [0.0]
        if len(values) not in (1, len(levels)):
            raise UserError(f"--{name.replace('_', '-')} takes one number or one per level ({len(levels)}: "
                            f"{', '.join(f'{r}x{r}' for r in levels)}), not {len(values)}")
        weights[name] = values * (len(levels) if len(values) == 1 else 1)
    if any(weights["mean_guidance"] + weights["variance_guidance"]):
        if not sampler.config.num_classes or not sampler.config.hierarchical_prior:
            raise UserError("guidance needs a class-conditional model with a hierarchical prior; this one is "
                            + ("without that prior" if sampler.config.num_classes else "unconditional"))
        if args.label == ["none"]:
            raise UserError("guidance needs a label other than none")
    return weights | {"temperature": args.temperature}


def check_name(path, *kinds):
    """Refuse a file's name before the work that would fill it."""
    if path and not path.lower().endswith(kinds):
        raise UserError(f"{path}: expected a name that ends in {' or '.join(kinds)}")


# ---------------------------------------------------------------- generate


def generate(args):
    """Draw samples: a grid to look at, an .npz for metrics, or a folder of PNGs."""
    sampler = make_sampler(args)
    guidance = check_guidance(sampler, args)
    count = sampler.config.num_classes
    if sampler.config.upsample:
        raise UserError("this checkpoint is an upsampler: it turns small images into large ones and draws none by itself")
    classes = [sampler.label(text) for text in args.label] if args.label else list(range(count))
    n = args.n or (8 * min(len(classes), 10) if classes else 16)
    if not args.n and not args.label:
        classes = classes[:10]
    labels = np.sort(np.arange(n) % len(classes)) if classes else None        # as even as can be, class after class
    if classes:
        labels = np.array(classes)[labels]
    check_name(args.out, ".png", ".jpg", ".webp")
    check_name(args.npz, ".npz")
    out = args.out or (None if args.npz or args.png_dir else "samples.png")
    # Classes are shuffled in the .npz: the Inception Score is taken over consecutive parts.
    place = np.random.default_rng(args.seed).permutation(n)
    array, temporary = None, None
    if args.npz:
        temporary = args.npz + ".images.tmp"
        os.makedirs(os.path.dirname(os.path.abspath(args.npz)), exist_ok=True)
        array = np.lib.format.open_memmap(temporary, "w+", np.uint8, (n, sampler.size, sampler.size, 3))
        reserve(temporary)
    shown = []
    try:
        for start in tqdm(range(0, n, args.batch), desc="sampling", unit="batch", disable=n <= args.batch):
            numbers = np.arange(start, min(start + args.batch, n))
            label = torch.from_numpy(labels[numbers]).to(sampler.device) if classes else None
            images = sampler.images(sampler.noise(args.seed, numbers), label, **guidance)
            if out:
                shown.extend(images[:max(0, args.grid - start)])
            if array is not None:
                array[place[numbers]] = images
            if args.png_dir:
                for number, image in zip(numbers, images):
                    picture = grid([[image]], gap=0)
                    write(os.path.join(args.png_dir, f"{number:06d}.png"), lambda f: picture.save(f, "png"))
        if array is not None:
            shuffled = {}
            if classes:
                shuffled["arr_1"] = np.empty(n, np.int64)
                shuffled["arr_1"][place] = labels
            write(args.npz, lambda f: np.savez(f, arr_0=array, **shuffled))
            print(f"{args.npz}: {n} images {array.shape[1:]}" + (", labels" if classes else ""))
    finally:
        if temporary and os.path.exists(temporary):
            os.remove(temporary)
    if out:
        if classes:                                            # a row per class, in the order asked for
            rows = [[image for image, label in zip(shown, labels) if label == c] for c in dict.fromkeys(classes)]
            named = [(row, sampler.name(c)[:20]) for row, c in zip(rows, dict.fromkeys(classes)) if row]
            if len(named) == 1:                                # one class: a square
                rows, names = square(named[0][0]), None
            else:
                rows, names = zip(*named)
        else:
            rows, names = square(shown), None
        picture = grid(list(rows), row_names=names)
        kind = {".jpg": "jpeg", ".webp": "webp"}.get(os.path.splitext(out)[1].lower(), "png")
        write(out, lambda f: picture.save(f, kind))
        print(f"{out}: {len(shown)} of {n} samples")
    if args.png_dir:
        print(f"{args.png_dir}: {n} PNG files")


def square(images):
    columns = int(np.ceil(np.sqrt(len(images))))
    return [images[i:i + columns] for i in range(0, len(images), columns)]


# ---------------------------------------------------------------- reconstruct


def reconstruct(args):
    """Images above what the autoencoder, and the autoencoder with the LVAE, make of them."""
    check_name(args.out, ".png")
    sampler = make_sampler(args)
    originals, labels = [], []
    for path in args.images:
        try:
            originals.append(read_image(path, sampler.size))
        except Exception as e:                                 # whatever a broken file provokes in Pillow
            print(f"skipped {path}: {e}", file=sys.stderr)
            continue
        folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
        labels.append(sampler.label(args.label) if args.label else
                      sampler.folders.index(folder) if folder in sampler.folders else None)
    if not originals:
        raise UserError("no usable image")
    if sampler.config.num_classes > 100 and None in labels:    # too many to try each
        print("no class known for some images, the model takes them without: --label NAME says it", file=sys.stderr)
        labels = [sampler.config.num_classes if label is None else label for label in labels]
    rows = [originals, [], []]
    for start in range(0, len(originals), args.batch):
        x = sampler.latents(originals[start:start + args.batch])
        low_res = lvae.shrink(x, sampler.config) if sampler.config.upsample else None
        label = None
        if sampler.config.num_classes:
            label = torch.tensor([sampler.likeliest(x[i:i + 1]) if known is None else known
                                  for i, known in enumerate(labels[start:start + args.batch])], device=sampler.device)
        noise = sampler.model.encode(x, label, sampler.means(len(x)), low_res)
        rows[1].extend(sampler.decode(x))
        rows[2].extend(sampler.images(noise, label, low_res=low_res))
    picture = grid(rows, row_names=["original", "autoencoder", "+ LVAE"])
    write(args.out, lambda f: picture.save(f, "png"))
    error = np.mean([np.mean((a.astype(float) - b) ** 2) for a, b in zip(originals, rows[2])])
    print(f"{args.out}: {len(originals)} images, PSNR of the reconstructions {10 * np.log10(255 ** 2 / max(error, 1e-9)):.2f} dB")


# ---------------------------------------------------------------- command line


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(function):
        p = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0], description=function.__doc__,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
        p.set_defaults(function=function)
        p.add_argument("checkpoint", help="checkpoint.pt of a run, or one of the authors' pipelines")
        p.add_argument("--batch", type=positive, default=16, help="images at a time")
        p.add_argument("--device", default="auto", help="cuda, mps, cpu, ...")
        p.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="fp32", help="of the convs")
        p.add_argument("--dae", help="autoencoder file, instead of the one in the checkpoint")
        return p

    p = command(generate)
    p.add_argument("--n", type=positive, help="how many (8 per class, or 16)")
    p.add_argument("--label", type=names, help="classes by name, unique beginning or number, separated by commas; none")
    p.add_argument("--seed", type=whole, default=0, help="of the noise")
    p.add_argument("--temperature", type=float, default=1.0, help="multiplies the std of every prior")
    p.add_argument("--mean-guidance", type=numbers, help="w_mu: one number, or one per level, coarsest first (0; the paper's for ImageNet)")
    p.add_argument("--variance-guidance", type=numbers, help="w_sigma: likewise")
    p.add_argument("--out", help="the grid (samples.png)")
    p.add_argument("--grid", type=positive, default=256, help="images in the grid at most")
    p.add_argument("--npz", help="arr_0 uint8 (N, H, W, 3) in shuffled order, arr_1 labels")
    p.add_argument("--png-dir", help="a folder for a PNG per sample")

    p = command(reconstruct)
    p.add_argument("images", nargs="+", help="image files")
    p.add_argument("--label", help="their class; else the folder's name, if that is a class, or the likeliest class")
    p.add_argument("--out", default="reconstructions.png", help="the picture")

    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    args.function(args)


def whole(text):
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, not {text!r}")
    return int(text)


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, not {text!r}")
    return int(text)


def numbers(text):
    try:
        return [float(v) for v in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, not {text!r}") from None


def names(text):
    return [v.strip() for v in text.split(",")]


# ---------------------------------------------------------------- the names of ImageNet's classes, 0 to 999

IMAGENET_CLASSES = """
tench, goldfish, great white shark, tiger shark, hammerhead, electric ray, stingray, cock, hen, ostrich, brambling, goldfinch,
house finch, junco, indigo bunting, robin, bulbul, jay, magpie, chickadee, water ouzel, kite, bald eagle, vulture, great grey
owl, European fire salamander, common newt, eft, spotted salamander, axolotl, bullfrog, tree frog, tailed frog, loggerhead,
leatherback turtle, mud turtle, terrapin, box turtle, banded gecko, common iguana, American chameleon, whiptail, agama,
frilled lizard, alligator lizard, Gila monster, green lizard, African chameleon, Komodo dragon, African crocodile, American
alligator, triceratops, thunder snake, ringneck snake, hognose snake, green snake, king snake, garter snake, water snake, vine
snake, night snake, boa constrictor, rock python, Indian cobra, green mamba, sea snake, horned viper, diamondback, sidewinder,
trilobite, harvestman, scorpion, black and gold garden spider, barn spider, garden spider, black widow, tarantula, wolf
spider, tick, centipede, black grouse, ptarmigan, ruffed grouse, prairie chicken, peacock, quail, partridge, African grey,
macaw, sulphur-crested cockatoo, lorikeet, coucal, bee eater, hornbill, hummingbird, jacamar, toucan, drake, red-breasted
merganser, goose, black swan, tusker, echidna, platypus, wallaby, koala, wombat, jellyfish, sea anemone, brain coral,
flatworm, nematode, conch, snail, slug, sea slug, chiton, chambered nautilus, Dungeness crab, rock crab, fiddler crab, king
crab, American lobster, spiny lobster, crayfish, hermit crab, isopod, white stork, black stork, spoonbill, flamingo, little
blue heron, American egret, bittern, crane bird, limpkin, European gallinule, American coot, bustard, ruddy turnstone, red-
backed sandpiper, redshank, dowitcher, oystercatcher, pelican, king penguin, albatross, grey whale, killer whale, dugong, sea
lion, Chihuahua, Japanese spaniel, Maltese dog, Pekinese, Shih-Tzu, Blenheim spaniel, papillon, toy terrier, Rhodesian
ridgeback, Afghan hound, basset, beagle, bloodhound, bluetick, black-and-tan coonhound, Walker hound, English foxhound,
redbone, borzoi, Irish wolfhound, Italian greyhound, whippet, Ibizan hound, Norwegian elkhound, otterhound, Saluki, Scottish
deerhound, Weimaraner, Staffordshire bullterrier, American Staffordshire terrier, Bedlington terrier, Border terrier, Kerry
blue terrier, Irish terrier, Norfolk terrier, Norwich terrier, Yorkshire terrier, wire-haired fox terrier, Lakeland terrier,
Sealyham terrier, Airedale, cairn, Australian terrier, Dandie Dinmont, Boston bull, miniature schnauzer, giant schnauzer,
standard schnauzer, Scotch terrier, Tibetan terrier, silky terrier, soft-coated wheaten terrier, West Highland white terrier,
Lhasa, flat-coated retriever, curly-coated retriever, golden retriever, Labrador retriever, Chesapeake Bay retriever, German
short-haired pointer, vizsla, English setter, Irish setter, Gordon setter, Brittany spaniel, clumber, English springer, Welsh
springer spaniel, cocker spaniel, Sussex spaniel, Irish water spaniel, kuvasz, schipperke, groenendael, malinois, briard,
kelpie, komondor, Old English sheepdog, Shetland sheepdog, collie, Border collie, Bouvier des Flandres, Rottweiler, German
shepherd, Doberman, miniature pinscher, Greater Swiss Mountain dog, Bernese mountain dog, Appenzeller, EntleBucher, boxer,
bull mastiff, Tibetan mastiff, French bulldog, Great Dane, Saint Bernard, Eskimo dog, malamute, Siberian husky, dalmatian,
affenpinscher, basenji, pug, Leonberg, Newfoundland, Great Pyrenees, Samoyed, Pomeranian, chow, keeshond, Brabancon griffon,
Pembroke, Cardigan Welsh corgi, toy poodle, miniature poodle, standard poodle, Mexican hairless, timber wolf, white wolf, red
wolf, coyote, dingo, dhole, African hunting dog, hyena, red fox, kit fox, Arctic fox, grey fox, tabby, tiger cat, Persian cat,
Siamese cat, Egyptian cat, cougar, lynx, leopard, snow leopard, jaguar, lion, tiger, cheetah, brown bear, American black bear,
ice bear, sloth bear, mongoose, meerkat, tiger beetle, ladybug, ground beetle, long-horned beetle, leaf beetle, dung beetle,
rhinoceros beetle, weevil, fly, bee, ant, grasshopper, cricket, walking stick, cockroach, mantis, cicada, leafhopper,
lacewing, dragonfly, damselfly, admiral, ringlet, monarch, cabbage butterfly, sulphur butterfly, lycaenid, starfish, sea
urchin, sea cucumber, wood rabbit, hare, Angora, hamster, porcupine, fox squirrel, marmot, beaver, guinea pig, sorrel, zebra,
hog, wild boar, warthog, hippopotamus, ox, water buffalo, bison, ram, bighorn, ibex, hartebeest, impala, gazelle, Arabian
camel, llama, weasel, mink, polecat, black-footed ferret, otter, skunk, badger, armadillo, three-toed sloth, orangutan,
gorilla, chimpanzee, gibbon, siamang, guenon, patas, baboon, macaque, langur, colobus, proboscis monkey, marmoset, capuchin,
howler monkey, titi, spider monkey, squirrel monkey, Madagascar cat, indri, Indian elephant, African elephant, lesser panda,
giant panda, barracouta, eel, coho, rock beauty, anemone fish, sturgeon, gar, lionfish, puffer, abacus, abaya, academic gown,
accordion, acoustic guitar, aircraft carrier, airliner, airship, altar, ambulance, amphibian, analog clock, apiary, apron,
ashcan, assault rifle, backpack, bakery, balance beam, balloon, ballpoint, Band Aid, banjo, bannister, barbell, barber chair,
barbershop, barn, barometer, barrel, barrow, baseball, basketball, bassinet, bassoon, bathing cap, bath towel, bathtub, beach
wagon, beacon, beaker, bearskin, beer bottle, beer glass, bell cote, bib, bicycle-built-for-two, bikini, binder, binoculars,
birdhouse, boathouse, bobsled, bolo tie, bonnet, bookcase, bookshop, bottlecap, bow, bow tie, brass, brassiere, breakwater,
breastplate, broom, bucket, buckle, bulletproof vest, bullet train, butcher shop, cab, caldron, candle, cannon, canoe, can
opener, cardigan, car mirror, carousel, carpenter's kit, carton, car wheel, cash machine, cassette, cassette player, castle,
catamaran, CD player, cello, cellular telephone, chain, chainlink fence, chain mail, chain saw, chest, chiffonier, chime,
china cabinet, Christmas stocking, church, cinema, cleaver, cliff dwelling, cloak, clog, cocktail shaker, coffee mug,
coffeepot, coil, combination lock, computer keyboard, confectionery, container ship, convertible, corkscrew, cornet, cowboy
boot, cowboy hat, cradle, crane, crash helmet, crate, crib, Crock Pot, croquet ball, crutch, cuirass, dam, desk, desktop
computer, dial telephone, diaper, digital clock, digital watch, dining table, dishrag, dishwasher, disk brake, dock, dogsled,
dome, doormat, drilling platform, drum, drumstick, dumbbell, Dutch oven, electric fan, electric guitar, electric locomotive,
entertainment center, envelope, espresso maker, face powder, feather boa, file, fireboat, fire engine, fire screen, flagpole,
flute, folding chair, football helmet, forklift, fountain, fountain pen, four-poster, freight car, French horn, frying pan,
fur coat, garbage truck, gasmask, gas pump, goblet, go-kart, golf ball, golfcart, gondola, gong, gown, grand piano,
greenhouse, grille, grocery store, guillotine, hair slide, hair spray, half track, hammer, hamper, hand blower, hand-held
computer, handkerchief, hard disc, harmonica, harp, harvester, hatchet, holster, home theater, honeycomb, hook, hoopskirt,
horizontal bar, horse cart, hourglass, iPod, iron, jack-o'-lantern, jean, jeep, jersey, jigsaw puzzle, jinrikisha, joystick,
kimono, knee pad, knot, lab coat, ladle, lampshade, laptop, lawn mower, lens cap, letter opener, library, lifeboat, lighter,
limousine, liner, lipstick, Loafer, lotion, loudspeaker, loupe, lumbermill, magnetic compass, mailbag, mailbox, maillot,
maillot tank suit, manhole cover, maraca, marimba, mask, matchstick, maypole, maze, measuring cup, medicine chest, megalith,
microphone, microwave, military uniform, milk can, minibus, miniskirt, minivan, missile, mitten, mixing bowl, mobile home,
Model T, modem, monastery, monitor, moped, mortar, mortarboard, mosque, mosquito net, motor scooter, mountain bike, mountain
tent, mouse, mousetrap, moving van, muzzle, nail, neck brace, necklace, nipple, notebook, obelisk, oboe, ocarina, odometer,
oil filter, organ, oscilloscope, overskirt, oxcart, oxygen mask, packet, paddle, paddlewheel, padlock, paintbrush, pajama,
palace, panpipe, paper towel, parachute, parallel bars, park bench, parking meter, passenger car, patio, pay-phone, pedestal,
pencil box, pencil sharpener, perfume, Petri dish, photocopier, pick, pickelhaube, picket fence, pickup, pier, piggy bank,
pill bottle, pillow, ping-pong ball, pinwheel, pirate, pitcher, plane, planetarium, plastic bag, plate rack, plow, plunger,
Polaroid camera, pole, police van, poncho, pool table, pop bottle, pot, potter's wheel, power drill, prayer rug, printer,
prison, projectile, projector, puck, punching bag, purse, quill, quilt, racer, racket, radiator, radio, radio telescope, rain
barrel, recreational vehicle, reel, reflex camera, refrigerator, remote control, restaurant, revolver, rifle, rocking chair,
rotisserie, rubber eraser, rugby ball, rule, running shoe, safe, safety pin, saltshaker, sandal, sarong, sax, scabbard, scale,
school bus, schooner, scoreboard, screen, screw, screwdriver, seat belt, sewing machine, shield, shoe shop, shoji, shopping
basket, shopping cart, shovel, shower cap, shower curtain, ski, ski mask, sleeping bag, slide rule, sliding door, slot,
snorkel, snowmobile, snowplow, soap dispenser, soccer ball, sock, solar dish, sombrero, soup bowl, space bar, space heater,
space shuttle, spatula, speedboat, spider web, spindle, sports car, spotlight, stage, steam locomotive, steel arch bridge,
steel drum, stethoscope, stole, stone wall, stopwatch, stove, strainer, streetcar, stretcher, studio couch, stupa, submarine,
suit, sundial, sunglass, sunglasses, sunscreen, suspension bridge, swab, sweatshirt, swimming trunks, swing, switch, syringe,
table lamp, tank, tape player, teapot, teddy, television, tennis ball, thatch, theater curtain, thimble, thresher, throne,
tile roof, toaster, tobacco shop, toilet seat, torch, totem pole, tow truck, toyshop, tractor, trailer truck, tray, trench
coat, tricycle, trimaran, tripod, triumphal arch, trolleybus, trombone, tub, turnstile, typewriter keyboard, umbrella,
unicycle, upright, vacuum, vase, vault, velvet, vending machine, vestment, viaduct, violin, volleyball, waffle iron, wall
clock, wallet, wardrobe, warplane, washbasin, washer, water bottle, water jug, water tower, whiskey jug, whistle, wig, window
screen, window shade, Windsor tie, wine bottle, wing, wok, wooden spoon, wool, worm fence, wreck, yawl, yurt, web site, comic
book, crossword puzzle, street sign, traffic light, book jacket, menu, plate, guacamole, consomme, hot pot, trifle, ice cream,
ice lolly, French loaf, bagel, pretzel, cheeseburger, hotdog, mashed potato, head cabbage, broccoli, cauliflower, zucchini,
spaghetti squash, acorn squash, butternut squash, cucumber, artichoke, bell pepper, cardoon, mushroom, Granny Smith,
strawberry, orange, lemon, fig, pineapple, banana, jackfruit, custard apple, pomegranate, hay, carbonara, chocolate sauce,
dough, meat loaf, pizza, potpie, burrito, red wine, espresso, cup, eggnog, alp, bubble, cliff, coral reef, geyser, lakeside,
promontory, sandbar, seashore, valley, volcano, ballplayer, groom, scuba diver, rapeseed, daisy, yellow lady's slipper, corn,
acorn, hip, buckeye, coral fungus, agaric, gyromitra, stinkhorn, earthstar, hen-of-the-woods, bolete, ear, toilet tissue""".replace("\n", " ").strip().split(", ")


if __name__ == "__main__":
    cli(main)
