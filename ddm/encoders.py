"""The frozen pretrained networks: where they lie, which ones they are, what they compute.

    image_features     DINOv2, CLIP or a ResNet: images -> features, to cluster and to measure by
    clip_scorer        CLIP: how well images and captions fit
    Autoencoder        AutoencoderKL or AutoencoderTiny: images <-> latents
    TextEncoder        CLIP, T5, ... or several of them: captions -> token features

Each is given by its hub name (NAME@REVISION pins it) or by a local folder in the format of
transformers or diffusers, which are imported here alone, and only where a config asks for a
network. What an artifact says of a network (`info`) is its class, a digest of its weights and its
preprocessing; that, not the name, decides whether two of them are the same (`identity`).
"""
import contextlib
import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from data import square
from ddm.errors import UserError
from ddm.files import read_json

# names that stand for no network: pixels, and words hashed to a learned table
NONE = {"autoencoder": "", "text": "words"}

# pixels a side of an image that is encoded or decoded whole; a larger one in overlapping tiles
TILE = 1024
# pixels that are encoded or decoded together: 16 images of 256 x 256
AT_ONCE = 2 ** 20
# captions that are encoded together
CAPTIONS_AT_ONCE = 256


# ---- where a network lies ------------------------------------------------------------------------

@dataclass
class Place:
    """Where a network is loaded from."""

    folder: str             # or its name on the hub
    revision: str | None    # the hub's commit
    about: dict             # its config.json


def locate(key, name):
    """-> Place of a network. UserError if there is none, or its config.json is damaged.

    key: the config's, for messages; name: NAME or NAME@REVISION of the hub, or a local folder.
    """
    whole = os.path.expanduser(name)
    base, _, revision = whole.partition("@")

    # the name of a folder may have an @ in it
    for folder in (whole, base):
        if os.path.isdir(folder):
            path = os.path.join(folder, "config.json")
            if not os.path.exists(path):
                raise UserError(f"{key} = {name!r} is a folder without config.json: give the one "
                                f"that save_pretrained wrote")
            return Place(folder, None, _read_about(key, name, path))

    # a path, which the hub would only refuse
    if name.startswith(("/", "./", "../", "~")):
        raise UserError(f"{key} = {name!r}: there is no such folder; give one that save_pretrained "
                        f"wrote, or a hub's name: --{key} NAME")

    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    # its retries; what failed is said once, below
    logging.set_verbosity_error()
    try:
        path = hf_hub_download(base, "config.json", revision=revision or None)
    except Exception as error:
        # unreachable, unknown, gated, not a name at all: the hub has a class for each
        raise UserError(f"{key} = {name!r} is no folder here and cannot be fetched "
                        f"({_cause(error)}); {_remedy(key, base)}") from None

    # a snapshot's folder is named after its commit
    commit = os.path.basename(os.path.dirname(path))
    return Place(base, commit, _read_about(key, name, path))


def _read_about(key, name, path):
    try:
        return read_json(path, dict)
    except (OSError, ValueError) as error:
        raise UserError(f"{key} = {name!r} is damaged: {path}: {_cause(error)}") from None


def _cause(error):
    """What went wrong, on one line."""
    error = error.__cause__ or error
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line[:300]


def _remedy(key, name):
    return (f"where it cannot be fetched, bring it (hf download {name} --local-dir DIR, where "
            f"there is a network) and give the folder: --{key} DIR")


def load(key, kind, place):
    """The network of class `kind`, frozen, in fp32. UserError where it cannot be loaded, or weights
    would be left random.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        network, report = kind.from_pretrained(place.folder, revision=place.revision,
                                               output_loading_info=True)
    except Exception as error:
        raise UserError(f"{key} = {place.folder!r} cannot be loaded as {kind.__name__} "
                        f"({_cause(error)}); {_remedy(key, place.folder)}") from None

    # nobody asks the pooler
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise UserError(f"{key} = {place.folder!r} lacks weights of a {kind.__name__}: "
                        f"{missing[0]} and {len(missing) - 1} more")
    return network.float().eval().requires_grad_(False)


def load_tokenizer(key, place):
    """The tokenizer beside a network. UserError if there is none."""
    import transformers

    # token features are kept from the left, and zero behind the last token
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            place.folder, revision=place.revision, padding_side="right")
    except Exception as error:
        raise UserError(f"{key} = {place.folder!r} has no tokenizer that can be loaded "
                        f"({_cause(error)}); {_remedy(key, place.folder)}") from None

    # GPT-like ones have no token of their own to pad with
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


# ---- which network it is -------------------------------------------------------------------------

def digest(network):
    """Twelve hex digits that name a network's weights: of up to 1,024 values of each tensor,
    whatever the tensors are called.
    """
    tensors = []
    for tensor in network.state_dict().values():
        values = tensor.detach().float().flatten()

        # evenly over the tensor, which may be large
        count = min(1024, len(values))
        values = values[torch.arange(count) * len(values) // count]
        shape = str(tuple(tensor.shape)).encode()
        tensors.append(shape + values.cpu().numpy().tobytes())

    # sorted, as another class of the same network may order and name them in another way
    return hashlib.sha256(b"".join(sorted(tensors))).hexdigest()[:12]


def weight_bytes(network):
    """Bytes of memory that the weights take."""
    return sum(tensor.nbytes for tensor in network.state_dict().values())


def identity(info):
    """What two networks must have in common to stand for each other: all but where they came from
    and the precision that they run in.
    """
    origin = ("name", "revision", "precision")
    return {key: value for key, value in info.items() if key not in origin}


def pinned(info):
    """The names of a network, each with its commit, so that a hub gives the same one again."""
    names = info["name"].split(" + ")
    revisions = (info["revision"] or "-").split(" + ")

    # a local folder has no revision: "-"
    pins = []
    for name, revision in zip(names, revisions, strict=False):
        if "@" not in name and revision != "-":
            name = f"{name}@{revision}"
        pins.append(name)
    return " + ".join(pins)


def label(info):
    """A network in an error message."""
    if not info["name"]:
        return "none"

    details = []
    for key in ("class", "revision", "weights", "scale", "shift", "length", "layer"):
        if info.get(key) not in (None, "-"):
            details.append(f"{key} {info[key]}")

    if not details:
        return repr(info["name"])
    return f"{info['name']!r} ({' '.join(details)})"


def bound(info):
    """The largest |x_0| of an autoencoder's space: pixels end at 1; latents are standardised, so
    hardly any is beyond six deviations.
    """
    return 6.0 if info["name"] else 1.0


# ---- precision -----------------------------------------------------------------------------------

def dtype_of(precision, device):
    """The torch.dtype of weights in a precision: auto, bf16, tf32 or fp32."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def resolve(precision, device):
    """What a precision means on a device: bf16, tf32 or fp32. That is what results are named by.

    On a GPU fp32 weights are multiplied as TF32 (process.start), but within exact_products().
    """
    if dtype_of(precision, device) == torch.bfloat16:
        return "bf16"
    return "tf32" if device.type == "cuda" else "fp32"


@contextlib.contextmanager
def exact_products():
    """In here products and convolutions of fp32 numbers are fp32's on a GPU, too, not TF32's. For
    the whole process, so not beside training.
    """
    precision = torch.get_float32_matmul_precision()
    allow_tf32 = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = allow_tf32


# ---- features of images --------------------------------------------------------------------------

class ImageFeatures(NamedTuple):
    """What image_features gives."""

    prepare: Callable       # PIL image -> uint8 [S,S,3]
    features: Callable      # list of n of these -> [n,D] float32
    info: dict              # the network and its preprocessing


@dataclass
class ImageNetwork:
    """A network that sees images, and how it wants them."""

    network: torch.nn.Module
    mean: list              # of red, green and blue in 0..1, as it was trained with
    std: list
    side: int               # pixels


def image_features(settings, device, normalise=True, key="features.name"):
    """DINOv2, CLIP's image tower or a ResNet -> ImageFeatures. settings: [features] of a config.

    The middle square at 224 pixels (CLIP: at the size of its config; ResNet: at that of its
    preprocessor_config.json). normalise: to length 1, as for clustering; Frechet distances take
    features as they come. key: what the user calls the name. In fp32 they are computed without
    TF32, so that a GPU and a CPU give the same, which is cached under the same name.
    """
    place = locate(key, settings.name)
    found = load_image_network(key, settings, place)
    network = found.network
    dtype = dtype_of(settings.precision, device)

    # features that are cached are used again where all of this is the same
    length = "L2-normalised, " if normalise else ""
    name_of_dtype = str(dtype).removeprefix("torch.")
    info = {
        "name": settings.name,
        "revision": place.revision,
        "class": type(network).__name__,
        "weights": digest(network),
        "preprocessing": f"middle square at {found.side} pixels (Lanczos), mean {list(found.mean)}"
                         f", std {list(found.std)}, pool {settings.pool}, {length}{name_of_dtype}",
    }
    network.to(device, dtype)

    def prepare(image):
        return square(image, found.side)

    @torch.no_grad()
    @exact_products()
    def features(images):
        if not images:
            # [0,D], and only the network knows D
            blank = np.zeros((found.side, found.side, 3), np.uint8)
            return features([blank])[:0]

        rows = []
        for first in range(0, len(images), settings.batch):
            part = images[first:first + settings.batch]
            x = standardise(part, found.mean, found.std, device)
            x = pooled(network, x.to(dtype), settings.pool).float()
            if normalise:
                x = torch.nn.functional.normalize(x, dim=1)
            rows.append(x.cpu())
        return torch.cat(rows).numpy()

    return ImageFeatures(prepare, features, info)


def load_image_network(key, settings, place):
    """-> ImageNetwork of a kind that we know. UserError."""
    import transformers
    from transformers import image_utils

    kind = place.about.get("model_type")
    if kind in ("dinov2", "dinov2_with_registers"):
        network = load(key, transformers.AutoModel, place)
        mean = image_utils.IMAGENET_DEFAULT_MEAN
        std = image_utils.IMAGENET_DEFAULT_STD
        return ImageNetwork(network, mean, std, side=224)

    if settings.pool != "cls":
        raise UserError(f"features.pool = {settings.pool!r} is DINOv2's; {settings.name!r} is a "
                        f"{kind!r}, with one feature vector an image: cls")
    if kind == "resnet":
        mean, std, side = _read_preprocessor(key, settings, place)
        network = load(key, transformers.AutoModel, place)
        return ImageNetwork(network, mean, std, side)
    if kind in ("clip", "clip_vision_model"):
        network = load(key, transformers.CLIPVisionModelWithProjection, place)
        mean = image_utils.OPENAI_CLIP_MEAN
        std = image_utils.OPENAI_CLIP_STD
        return ImageNetwork(network, mean, std, side=network.config.image_size)
    raise UserError(f"{key} = {settings.name!r} is a {kind!r}: features come from dinov2, "
                    f"dinov2_with_registers, clip or resnet")


def _read_preprocessor(key, settings, place):
    """-> (mean, std, side) of a network's preprocessor_config.json. UserError."""
    from transformers.image_processing_base import ImageProcessingMixin
    try:
        read, _ = ImageProcessingMixin.get_image_processor_dict(place.folder,
                                                                revision=place.revision)
        side = read["size"]
        if not isinstance(side, int):
            side = side.get("shortest_edge") or side["height"]
        return read["image_mean"], read["image_std"], side
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key} = {settings.name!r} has no preprocessor_config.json with size, "
                        f"image_mean and image_std ({_cause(error)})") from None


def standardise(images, mean, std, device):
    """List of uint8 [S,S,3] -> [B,3,S,S] float32 by a mean and a deviation of each channel."""
    mean = torch.tensor(mean, device=device).view(3, 1, 1)
    std = torch.tensor(std, device=device).view(3, 1, 1)
    x = torch.from_numpy(np.stack(images)).to(device)
    return (x.permute(0, 3, 1, 2) / 255 - mean) / std


def pooled(network, x, pool):
    """[B,3,S,S] -> features [B,D]: one vector an image, whatever the network."""
    out = network(x)
    # CLIP projects its class token
    if hasattr(out, "image_embeds"):
        return out.image_embeds
    # a ResNet has a map, and takes its mean
    if out.last_hidden_state.ndim == 4:
        return out.pooler_output.flatten(1)

    tokens = out.last_hidden_state
    if pool == "cls":
        return tokens[:, 0]
    first_patch = 1 + getattr(network.config, "num_register_tokens", 0)
    return torch.cat([tokens[:, 0], tokens[:, first_patch:].mean(1)], dim=1)


# ---- how well image and caption fit --------------------------------------------------------------

class ClipScorer(NamedTuple):
    """What clip_scorer gives."""

    prepare: Callable       # PIL image -> uint8 [S,S,3]
    score: Callable         # list of n of these, list of n captions -> [n]
    info: dict              # names the network


def clip_scorer(name, device):
    """A whole CLIP -> ClipScorer. The score is 100 max(cos(image, text), 0) (Hessel et al. 2021).
    """
    place = locate("clip", name)
    import transformers
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    kind = place.about.get("model_type")
    if kind != "clip":
        raise UserError(f"--clip {name} is a {kind!r}, not a CLIP with both image and text")

    network = load("clip", transformers.CLIPModel, place).to(device)
    tokenizer = load_tokenizer("clip", place)
    side = network.config.vision_config.image_size
    length = network.config.text_config.max_position_embeddings
    info = {
        "name": name,
        "revision": place.revision,
        "class": "CLIPModel",
        "weights": digest(network),
        "precision": "fp32",
    }

    def prepare(image):
        return square(image, side)

    @torch.no_grad()
    @exact_products()
    def score(images, captions):
        x = standardise(images, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, device)
        text = tokenizer(captions, padding=True, truncation=True, max_length=length,
                         return_tensors="pt").to(device)
        out = network(input_ids=text["input_ids"], attention_mask=text["attention_mask"],
                      pixel_values=x)
        # both of length 1
        cosine = (out.image_embeds * out.text_embeds).sum(1)
        return 100 * cosine.clamp(min=0).cpu()

    return ClipScorer(prepare, score, info)


# ---- autoencoder ---------------------------------------------------------------------------------

@dataclass
class Unloaded:
    """What the configs of some networks say, before any weights are loaded."""

    parts: list             # (class, Place) of each
    info: dict


def find_autoencoder(name):
    """-> Unloaded of an AutoencoderKL or AutoencoderTiny. UserError if it is another network.

    Latents are standardised as the autoencoder's own config says: z' = (z - shift) scale, per
    channel where it has statistics of each.
    """
    place = locate("autoencoder.name", name)
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    class_name = place.about.get("_class_name")
    if class_name not in ("AutoencoderKL", "AutoencoderTiny"):
        found = class_name or place.about.get("model_type")
        raise UserError(f"autoencoder.name = {name!r} is a {found!r}, not an AutoencoderKL or "
                        f"AutoencoderTiny")

    # the class knows the defaults of what the file leaves out: sd-vae-ft-mse's has no
    # scaling_factor
    kind = getattr(diffusers, class_name)
    with torch.device("meta"):
        about = kind.from_config(place.about).config

    # one number, or one of each channel
    std = about.get("latents_std")
    scale = about.scaling_factor
    if std is not None:
        scale = [about.scaling_factor / s for s in std]

    # every level but the first halves the side
    if class_name == "AutoencoderKL":
        levels = len(about.block_out_channels)
    else:
        levels = len(about.encoder_block_out_channels)

    info = {
        "name": name,
        "revision": place.revision,
        "class": class_name,
        "channels": about.latent_channels,
        "factor": 2 ** (levels - 1),
        "scale": scale,
        "shift": about.get("latents_mean") or about.get("shift_factor") or 0.0,
    }
    return Unloaded([(kind, place)], info)


class Autoencoder:
    """A frozen AutoencoderKL or AutoencoderTiny. Images are [B,3,S,S] in [-1,1], latents [B,C,h,w].

    info: what names it; bytes: of its weights. Both ways go in batches of bounded memory, and in
    tiles where an image is larger than TILE. UserError if it cannot be loaded.
    """

    def __init__(self, name, device, precision="fp32"):
        found = find_autoencoder(name)
        kind, place = found.parts[0]
        self.network = load("autoencoder.name", kind, place).to(device)
        self.device = device
        self.precision = precision
        self.bytes = weight_bytes(self.network)
        self.info = found.info | {
            "weights": digest(self.network),
            "precision": resolve(precision, device),
        }

        # of one element, or of one a channel
        self.scale = torch.tensor(self.info["scale"], device=device).float().view(-1, 1, 1)
        self.shift = torch.tensor(self.info["shift"], device=device).float().view(-1, 1, 1)

        self.factor = self.info["factor"]
        self.network.tile_sample_min_size = TILE
        self.network.tile_latent_min_size = TILE // self.factor
        # AutoencoderTiny's tiles take it for 8 always
        self.network.spatial_scale_factor = self.factor

    def _parts(self, x, pixels):
        """x in batches of bounded memory, for images of so many pixels each."""
        return x.split(max(1, AT_ONCE // pixels))

    @torch.no_grad()
    def encode(self, x):
        """Images -> (mean, std) of the standardised latents' posterior, float32; std is None for
        AutoencoderTiny, which has no posterior.
        """
        has_posterior = self.info["class"] == "AutoencoderKL"
        # the tiles of AutoencoderTiny take its channels for 4 always
        self.network.use_tiling = has_posterior and x.shape[-1] > TILE

        means = []
        stds = []
        bf16 = self.precision == "bf16"

        for part in self._parts(x, pixels=x[0, 0].numel()):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                out = self.network.encode(part)
            if has_posterior:
                mean = out.latent_dist.mean
                stds.append(out.latent_dist.std.float() * self.scale)
            else:
                mean = out.latents

            means.append((mean.float() - self.shift) * self.scale)

        std = torch.cat(stds) if stds else None
        return torch.cat(means), std

    @torch.no_grad()
    def decode(self, z):
        """Latents -> images, float32; computed in bf16 on a GPU."""
        side = z.shape[-1] * self.factor
        self.network.use_tiling = max(z.shape[-2:]) * self.factor > TILE

        z = z.float() / self.scale + self.shift
        images = []
        bf16 = self.device.type == "cuda"

        for part in self._parts(z, pixels=side * side):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                images.append(self.network.decode(part).sample.float())
        return torch.cat(images)


# ---- text encoder --------------------------------------------------------------------------------

def find_text_encoder(settings):
    """-> Unloaded of the text encoders `A + B + ...` of [text]. UserError."""
    parts = []
    dims = []
    for name in settings.name.split(" + "):
        place = locate("text.name", name.strip())
        import transformers

        # AutoModel would load CLIP's image tower and T5's decoder, too
        kind = transformers.AutoModel
        model_type = place.about.get("model_type")
        if model_type in ("clip", "clip_text_model"):
            kind = transformers.CLIPTextModel
        elif model_type in ("t5", "mt5", "umt5"):
            kind = transformers.AutoModelForTextEncoding
        parts.append((kind, place))

        try:
            about = transformers.AutoConfig.from_pretrained(place.folder, revision=place.revision)
        except Exception as error:
            raise UserError(f"text.name = {name!r} is not a network that transformers knows "
                            f"({_cause(error)})") from None
        dims.append(about.get_text_config().hidden_size)

    info = {
        "name": settings.name,
        "revision": " + ".join(place.revision or "-" for _, place in parts),
        "dim": sum(dims),
        "length": settings.length,
        "layer": settings.layer,
        "precision": settings.precision,
    }
    return Unloaded(parts, info)


class TextEncoder:
    """The frozen encoders of [text]. Several encoders' features of a token are set side by side (E
    is the sum of theirs), as Stable Diffusion XL does.

    info: what names them; bytes: of their weights. UserError if one cannot be loaded, or is none.
    """

    def __init__(self, settings, device):
        found = find_text_encoder(settings)
        self.settings = settings
        self.device = device
        dtype = dtype_of(settings.precision, device)

        # (tokenizer, network) of each
        self.encoders = []
        marks = []
        for kind, place in found.parts:
            network = load("text.name", kind, place)
            if network.config.is_encoder_decoder:
                # BART's half; its decoder is freed
                network = network.get_encoder()
            marks.append(f"{type(network).__name__}:{digest(network)}")
            tokenizer = load_tokenizer("text.name", place)
            self._check_length(tokenizer, network, place)
            self.encoders.append((tokenizer, network.to(device, dtype)))

        self.bytes = sum(weight_bytes(network) for _, network in self.encoders)
        self.info = found.info | {
            "precision": resolve(settings.precision, device),
            "weights": " ".join(marks),
        }
        # one warning is enough, of rank 0
        self.warned = os.environ.get("RANK", "0") != "0"
        self._try()

    def _check_length(self, tokenizer, network, place):
        # T5's positions are relative: it has no limit of its own
        positions = getattr(network.config, "max_position_embeddings", None)
        longest = min(tokenizer.model_max_length, positions or 10 ** 9)
        if self.settings.length > longest:
            raise UserError(f"text.length = {self.settings.length}, but {place.folder!r} reads "
                            f"{longest} tokens at most")

    def _try(self):
        """UserError unless a caption gives token features of the width that the config promises."""
        name = self.settings.name

        try:
            width = self.encode(["a"]).shape[2]
        except Exception as error:
            # a network of images and text, say
            raise UserError(f"text.name = {name!r} gives no token features of a caption "
                            f"({_cause(error)}): give a text encoder") from None

        if width != self.info["dim"]:
            raise UserError(f"text.name = {name!r} gives {width} features a token, its config says "
                            f"{self.info['dim']}: give a text encoder")

    @torch.no_grad()
    def encode(self, captions):
        """n captions -> token features [n,L,E] f16, zeros behind the last token.

        The empty caption has no tokens at all: it is the unconditional branch. Longer ones than L
        tokens are cut, with one warning.
        """
        rows = []
        for first in range(0, len(captions), CAPTIONS_AT_ONCE):
            part = captions[first:first + CAPTIONS_AT_ONCE]

            # [n,L,D] of each encoder, side by side
            features = []
            for tokenizer, network in self.encoders:
                self._warn(tokenizer, part)
                features.append(self._features(tokenizer, network, part))
            rows.append(torch.cat(features, dim=2).half())
        return torch.cat(rows)

    def _features(self, tokenizer, network, captions):
        """Token features [n,L,D] of one encoder."""
        tokens = tokenizer(captions, padding="max_length", truncation=True,
                           max_length=self.settings.length, return_tensors="pt").to(self.device)
        penultimate = self.settings.layer == "penultimate"
        out = network(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
                      output_hidden_states=penultimate)
        hidden = out.hidden_states[-2] if penultimate else out.last_hidden_state

        # what a tokenizer puts around an empty caption are tokens, too
        not_empty = [bool(caption.strip()) for caption in captions]
        not_empty = torch.tensor(not_empty, device=self.device)
        mask = tokens.attention_mask.bool() & not_empty[:, None]

        # some of T5's are larger than any number of f16
        limit = torch.finfo(torch.float16).max
        return torch.where(mask[..., None], hidden.float().clamp(-limit, limit), 0)

    def _warn(self, tokenizer, captions):
        """Says once that captions are cut."""
        if self.warned:
            return
        length = self.settings.length
        longer = sum(len(ids) > length for ids in tokenizer(captions)["input_ids"])
        if longer:
            self.warned = True
            print(f"warning: {longer} of {len(captions)} captions are longer than text.length = "
                  f"{length} tokens: cut; further ones are not reported", file=sys.stderr)


# ---- sizes, for --plan ---------------------------------------------------------------------------

def frozen_parameters(config):
    """Weights of the autoencoder and of each text encoder that a config names, [their numbers], by
    their configs alone. UserError.
    """
    networks = []
    if config.autoencoder.name != NONE["autoencoder"]:
        kind, place = find_autoencoder(config.autoencoder.name).parts[0]
        with torch.device("meta"):
            networks.append(kind.from_config(place.about))

    if config.data.condition == "text" and config.text.name != NONE["text"]:
        for kind, place in find_text_encoder(config.text).parts:
            networks.append(_text_encoder_without_weights(kind, place))

    return [sum(p.numel() for p in network.parameters()) for network in networks]


def _text_encoder_without_weights(kind, place):
    """A text encoder on the meta device."""
    import transformers

    about = transformers.AutoConfig.from_pretrained(place.folder, revision=place.revision)
    with torch.device("meta"):
        # an Auto class chooses by the config, CLIPTextModel takes the half that is its own
        if hasattr(kind, "from_config"):
            network = kind.from_config(about)
        else:
            network = kind(about.get_text_config())

    if network.config.is_encoder_decoder:
        return network.get_encoder()
    return network
