"""ddm.encoders"""
import contextlib
import hashlib
import os
import sys
from types import SimpleNamespace

import numpy as np
import torch

from data import square
from ddm.errors import UserError
from ddm.files import read_json


NONE = {"autoencoder": "", "text": "words"}     # names that stand for no network: pixels, and words hashed to a learned table
TILE = 1024             # pixels a side that a picture is encoded or decoded at, at most; larger ones in overlapping tiles
AT_ONCE = 2 ** 20       # pixels that are encoded or decoded together: 16 pictures of 256 x 256


def _cause(error):
    """What went wrong, on one line."""
    error = error.__cause__ or error
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _remedy(key, name):
    return f"where it cannot be fetched, bring it (hf download {name} --local-dir DIR, where there is a network) and give the folder: --{key} DIR"


def locate(key, name):
    """Hub name, NAME@REVISION or local folder of config key `key` -> (name or folder, commit or None, its config.json)."""
    base, _, revision = os.path.expanduser(name).partition("@")
    if folder := next((f for f in (os.path.expanduser(name), base) if os.path.isdir(f)), None):
        path, revision = os.path.join(folder, "config.json"), None
        if not os.path.exists(path):
            raise UserError(f"{key} = {name!r} is a folder without config.json: give the one that save_pretrained wrote")
    elif name.startswith(("/", "./", "../", "~")):
        raise UserError(f"{key} = {name!r}: there is no such folder; give one that save_pretrained wrote, or a hub's name: --{key} NAME")
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging
        logging.set_verbosity_error()       # its retries; what failed is said once, below
        folder = base
        try:
            path = hf_hub_download(base, "config.json", revision=revision or None)
        except Exception as error:      # unreachable, unknown, gated, not a name at all: the hub has a class for each
            raise UserError(f"{key} = {name!r} is no folder here and cannot be fetched ({_cause(error)}); {_remedy(key, base)}") from None
        revision = os.path.basename(os.path.dirname(path))      # a snapshot's folder is named after its commit
    try:
        return folder, revision, read_json(path, dict)
    except (OSError, ValueError) as error:
        raise UserError(f"{key} = {name!r} is damaged: {path}: {_cause(error)}") from None


def load(key, kind, folder, revision):
    """The network of class `kind`, frozen, in fp32. UserError where it cannot be loaded, or weights would be left random."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        network, report = kind.from_pretrained(folder, revision=revision, output_loading_info=True)
    except Exception as error:
        raise UserError(f"{key} = {folder!r} cannot be loaded as {kind.__name__} ({_cause(error)}); {_remedy(key, folder)}") from None
    if missing := sorted(name for name in report["missing_keys"] if "pooler" not in name):      # nobody asks the pooler
        raise UserError(f"{key} = {folder!r} lacks weights of a {kind.__name__}: {missing[0]} and {len(missing) - 1} more")
    return network.float().eval().requires_grad_(False)


def load_tokenizer(key, folder, revision):
    import transformers
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, revision=revision, padding_side="right")
    except Exception as error:
        raise UserError(f"{key} = {folder!r} has no tokenizer that can be loaded ({_cause(error)}); {_remedy(key, folder)}") from None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def digest(network):
    """Twelve hex digits that name a network's weights: of up to 1,024 values of each tensor, whatever the tensors are called."""
    tensors = []
    for tensor in network.state_dict().values():
        values = tensor.detach().float().flatten()
        values = values[torch.arange(min(1024, len(values))) * len(values) // min(1024, len(values))]
        tensors.append(str(tuple(tensor.shape)).encode() + values.cpu().numpy().tobytes())
    return hashlib.sha256(b"".join(sorted(tensors))).hexdigest()[:12]


def weight_bytes(network):
    return sum(tensor.nbytes for tensor in network.state_dict().values())


def identity(info):
    """What two networks must have in common to stand for each other: all but where they came from and the precision that they run in."""
    return {k: v for k, v in info.items() if k not in ("name", "revision", "precision")}


def pinned(info):
    """The names of a network, each with its commit, so that a hub gives the same one again."""
    names, revisions = info["name"].split(" + "), (info["revision"] or "-").split(" + ")
    return " + ".join(name if "@" in name or revision == "-" else f"{name}@{revision}" for name, revision in zip(names, revisions))


def bound(info):
    """The largest |x_0| of an autoencoder's space: pixels end at 1; latents are standardised, so hardly any is beyond six deviations."""
    return 6.0 if info["name"] else 1.0


def label(info):
    """A network in an error message."""
    if not info["name"]:
        return "none"
    about = " ".join(f"{k} {info[k]}" for k in ("class", "revision", "weights", "scale", "shift", "length", "layer") if info.get(k) not in (None, "-"))
    return f"{info['name']!r}" + (f" ({about})" if about else "")


def dtype_of(precision, device):
    return torch.bfloat16 if precision == "bf16" or precision == "auto" and device.type == "cuda" else torch.float32


def resolve(precision, device):
    """What a precision (auto, bf16, tf32 or fp32, of weights) means on a device: bf16, tf32 or fp32. That is what results are named by.

    On a GPU fp32 weights are multiplied as TF32 (common.start), but within exact_products().
    """
    if dtype_of(precision, device) == torch.bfloat16:
        return "bf16"
    return "tf32" if device.type == "cuda" else "fp32"


@contextlib.contextmanager
def exact_products():
    """In here products and convolutions of fp32 numbers are fp32's on a GPU, too, not TF32's. For the whole process, so not beside training."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def image_features(settings, device, normalise=True, key="features.name"):
    """DINOv2, CLIP's image tower or a ResNet -> (prepare, features, info). settings: [features] of a config.

    prepare: PIL image -> uint8 [S,S,3]; features: list of these -> [n,D] float32; info names the network and its preprocessing. The middle square
    at 224 pixels (CLIP: at the size of its config; ResNet: at that of its preprocessor_config.json) with the statistics that the network was
    trained with. normalise: to length 1, as for clustering; Frechet distances take features as they come. key: what the user calls the name.
    In fp32 they are computed without TF32, so that a GPU and a CPU give the same, which is cached under the same name.
    """
    folder, revision, about = locate(key, settings.name)
    import transformers
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    if about.get("model_type") in ("dinov2", "dinov2_with_registers"):
        network, statistics, side = load(key, transformers.AutoModel, folder, revision), (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), 224
    elif settings.pool != "cls":
        raise UserError(f"features.pool = {settings.pool!r} is DINOv2's; {settings.name!r} is a {about.get('model_type')!r}, with one feature vector an image: cls")
    elif about.get("model_type") == "resnet":
        try:
            read = ImageProcessingMixin.get_image_processor_dict(folder, revision=revision)[0]
            statistics, size = (read["image_mean"], read["image_std"]), read["size"]
            side = size if isinstance(size, int) else size.get("shortest_edge") or size["height"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{key} = {settings.name!r} has no preprocessor_config.json with size, image_mean and image_std ({_cause(error)})") from None
        network = load(key, transformers.AutoModel, folder, revision)
    elif about.get("model_type") in ("clip", "clip_vision_model"):
        network = load(key, transformers.CLIPVisionModelWithProjection, folder, revision)
        statistics, side = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD), network.config.image_size
    else:
        raise UserError(f"{key} = {settings.name!r} is a {about.get('model_type')!r}: features come from dinov2, dinov2_with_registers, clip or resnet")
    dtype = dtype_of(settings.precision, device)
    info = {"name": settings.name, "revision": revision, "class": type(network).__name__, "weights": digest(network),
            "preprocessing": f"middle square at {side} pixels (Lanczos), mean {list(statistics[0])}, std {list(statistics[1])}, pool {settings.pool}, "
                             f"{'L2-normalised, ' if normalise else ''}{str(dtype).removeprefix('torch.')}"}
    network.to(device, dtype)
    mean, std = (torch.tensor(s, device=device).view(3, 1, 1) for s in statistics)
    first_patch = 1 + getattr(network.config, "num_register_tokens", 0)

    def pooled(x):
        out = network(x)
        if hasattr(out, "image_embeds"):
            return out.image_embeds
        if out.last_hidden_state.ndim == 4:     # a ResNet's
            return out.pooler_output.flatten(1)
        tokens = out.last_hidden_state
        return tokens[:, 0] if settings.pool == "cls" else torch.cat([tokens[:, 0], tokens[:, first_patch:].mean(1)], dim=1)

    @torch.no_grad()
    @exact_products()
    def features(pictures):
        if not pictures:
            return features([np.zeros((side, side, 3), np.uint8)])[:0]      # [0,D]
        rows = []
        for first in range(0, len(pictures), settings.batch):
            x = np.stack(pictures[first:first + settings.batch])
            x = (torch.from_numpy(x).to(device).permute(0, 3, 1, 2) / 255 - mean) / std
            x = pooled(x.to(dtype)).float()
            rows.append((torch.nn.functional.normalize(x, dim=1) if normalise else x).cpu())
        return torch.cat(rows).numpy()

    return lambda image: square(image, side), features, info


def clip_scorer(name, device):
    """A whole CLIP -> (prepare, score, info). score: list of prepare(PIL image), list of captions -> [n], 100 max(cos(image, text), 0) (Hessel et al. 2021)."""
    folder, revision, about = locate("clip", name)
    import transformers
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    if about.get("model_type") != "clip":
        raise UserError(f"--clip {name} is a {about.get('model_type')!r}, not a CLIP with both image and text")
    network = load("clip", transformers.CLIPModel, folder, revision).to(device)
    tokenizer, side = load_tokenizer("clip", folder, revision), network.config.vision_config.image_size
    length = network.config.text_config.max_position_embeddings
    mean, std = (torch.tensor(s, device=device).view(3, 1, 1) for s in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))

    @torch.no_grad()
    @exact_products()
    def score(pictures, captions):
        x = (torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2) / 255 - mean) / std
        text = tokenizer(captions, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        out = network(input_ids=text["input_ids"], attention_mask=text["attention_mask"], pixel_values=x)       # both of length 1
        return 100 * (out.image_embeds * out.text_embeds).sum(1).clamp(min=0).cpu()

    info = {"name": name, "revision": revision, "class": "CLIPModel", "weights": digest(network), "precision": "fp32"}
    return lambda image: square(image, side), score, info


def autoencoder_info(name):
    """What is known of an autoencoder without its weights: -> (class, folder, revision, info).

    Latents are standardised as the autoencoder's own config says: z' = (z - shift) scale, per channel where it has statistics of each.
    """
    folder, revision, about = locate("autoencoder.name", name)
    import diffusers
    diffusers.utils.logging.set_verbosity_error()
    if about.get("_class_name") not in ("AutoencoderKL", "AutoencoderTiny"):
        raise UserError(f"autoencoder.name = {name!r} is a {about.get('_class_name') or about.get('model_type')!r}, not an AutoencoderKL or AutoencoderTiny")
    kind = getattr(diffusers, about["_class_name"])
    with torch.device("meta"):      # the class knows the defaults of what the file leaves out: sd-vae-ft-mse's has no scaling_factor
        about = kind.from_config(about).config
    mean, std = about.get("latents_mean"), about.get("latents_std")
    scale = about.scaling_factor if std is None else [about.scaling_factor / s for s in std]
    levels = about.block_out_channels if kind is diffusers.AutoencoderKL else about.encoder_block_out_channels
    return kind, folder, revision, {"name": name, "revision": revision, "class": kind.__name__, "channels": about.latent_channels,
                                    "factor": 2 ** (len(levels) - 1), "scale": scale, "shift": mean or about.get("shift_factor") or 0.0}


def autoencoder(name, device, precision="fp32"):
    """AutoencoderKL or AutoencoderTiny -> namespace of info, encode and decode. Pictures are [B,3,S,S] in [-1,1], latents [B,C,h,w].

    encode: pictures -> mean and std of the standardised latents' posterior, float32; std is None for AutoencoderTiny, which has none.
    decode: latents -> pictures, float32; in bf16 on a GPU, in batches of bounded memory, in tiles above TILE pixels.
    """
    kind, folder, revision, info = autoencoder_info(name)
    network = load("autoencoder.name", kind, folder, revision).to(device)
    info |= {"weights": digest(network), "precision": resolve(precision, device)}
    scale, shift = (torch.tensor(info[k], device=device, dtype=torch.float32).view(-1, 1, 1) for k in ("scale", "shift"))
    network.tile_sample_min_size, network.tile_latent_min_size = TILE, TILE // info["factor"]
    network.spatial_scale_factor = info["factor"]       # AutoencoderTiny's tiles take it for 8 always

    @torch.no_grad()
    def encode(x):
        means, stds = [], []
        network.use_tiling = x.shape[-1] > TILE and info["class"] == "AutoencoderKL"       # AutoencoderTiny's takes channels for 4 always
        for part in x.split(max(1, AT_ONCE // x[0, 0].numel())):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                out = network.encode(part)
            posterior = getattr(out, "latent_dist", None)
            means.append(((posterior.mean if posterior else out.latents).float() - shift) * scale)
            if posterior:
                stds.append(posterior.std.float() * scale)
        return torch.cat(means), torch.cat(stds) if stds else None

    @torch.no_grad()
    def decode(z):
        side, pictures = z.shape[-1] * info["factor"], []
        network.use_tiling = max(z.shape[-2:]) * info["factor"] > TILE
        for part in (z.float() / scale + shift).split(max(1, AT_ONCE // (side * side))):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                pictures.append(network.decode(part).sample.float())
        return torch.cat(pictures)

    return SimpleNamespace(info=info, encode=encode, decode=decode, bytes=weight_bytes(network))


def frozen_parameters(config):
    """Weights of the autoencoder and the text encoders that a config names, [number of each], by their configs alone. UserError."""
    counted = []
    if config.autoencoder.name != NONE["autoencoder"]:
        kind, folder, revision, _ = autoencoder_info(config.autoencoder.name)
        with torch.device("meta"):
            counted.append(kind.from_config(kind.load_config(folder, revision=revision)))
    if config.data.condition == "text" and config.text.name != NONE["text"]:
        import transformers
        for kind, folder, revision in text_info(config.text)[0]:
            about = transformers.AutoConfig.from_pretrained(folder, revision=revision)
            with torch.device("meta"):
                # an Auto class chooses by the config, CLIPTextModel takes the half that is its own
                network = kind.from_config(about) if hasattr(kind, "from_config") else kind(about.get_text_config())
            counted.append(network.get_encoder() if network.config.is_encoder_decoder else network)
    return [sum(p.numel() for p in network.parameters()) for network in counted]


def text_info(settings):
    """What is known of the text encoders `A + B + ...` of [text] without their weights: -> ([(class, folder, revision)], info)."""
    parts, dims = [], []
    for name in settings.name.split(" + "):
        folder, revision, about = locate("text.name", name.strip())
        import transformers
        kind, model_type = transformers.AutoModel, about.get("model_type")
        if model_type in ("clip", "clip_text_model"):
            kind = transformers.CLIPTextModel
        elif model_type in ("t5", "mt5", "umt5"):       # AutoModel would load the decoder, too
            kind = transformers.AutoModelForTextEncoding
        parts.append((kind, folder, revision))
        try:
            about = transformers.AutoConfig.from_pretrained(folder, revision=revision)
        except Exception as error:
            raise UserError(f"text.name = {name!r} is not a network that transformers knows ({_cause(error)})") from None
        dims.append(about.get_text_config().hidden_size)
    return parts, {"name": settings.name, "revision": " + ".join(revision or "-" for *_, revision in parts), "dim": sum(dims),
                   "length": settings.length, "layer": settings.layer, "precision": settings.precision}


def text_encoder(settings, device):
    """The encoders of [text] -> namespace of info and encode: list of captions -> token features [n,L,E] f16, zeros behind the last token.

    Several encoders' features of a token are set side by side (E is the sum of theirs), as Stable Diffusion XL does. The empty caption
    has no tokens at all: it is the unconditional branch. Longer ones than L tokens are cut, with one warning.
    """
    parts, info = text_info(settings)
    dtype, encoders, marks = dtype_of(settings.precision, device), [], []
    for kind, folder, revision in parts:
        network = load("text.name", kind, folder, revision)
        if network.config.is_encoder_decoder:
            network = network.get_encoder()
        marks.append(f"{type(network).__name__}:{digest(network)}")
        tokenizer = load_tokenizer("text.name", folder, revision)
        longest = min(tokenizer.model_max_length, getattr(network.config, "max_position_embeddings", None) or 10 ** 9)
        if settings.length > longest:
            raise UserError(f"text.length = {settings.length}, but {folder!r} reads {longest} tokens at most")
        encoders.append((tokenizer, network.to(device, dtype)))
    info["precision"] = resolve(settings.precision, device)
    info["weights"], warned = " ".join(marks), os.environ.get("RANK", "0") != "0"
    limit = torch.finfo(torch.float16).max

    @torch.no_grad()
    def encode(captions):
        nonlocal warned
        rows = []
        for part in (captions[i:i + 256] for i in range(0, len(captions), 256)):
            features = []
            for tokenizer, network in encoders:
                if not warned and (longer := sum(len(ids) > settings.length for ids in tokenizer(part)["input_ids"])):
                    print(f"warning: {longer} of {len(part)} captions are longer than text.length = {settings.length} tokens: cut; further ones are "
                          f"not reported", file=sys.stderr)
                    warned = True
                tokens = tokenizer(part, padding="max_length", truncation=True, max_length=settings.length, return_tensors="pt").to(device)
                out = network(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=settings.layer == "penultimate")
                hidden = out.hidden_states[-2] if settings.layer == "penultimate" else out.last_hidden_state
                there = torch.tensor([bool(caption.strip()) for caption in part], device=device)
                mask = tokens.attention_mask.bool() & there[:, None]
                features.append(torch.where(mask[..., None], hidden.float().clamp(-limit, limit), 0))
            rows.append(torch.cat(features, dim=2).half())
        return torch.cat(rows)

    try:
        width = encode(["a"]).shape[2]
    except Exception as error:      # a network of images and text, say
        raise UserError(f"text.name = {settings.name!r} gives no token features of a caption ({_cause(error)}): give a text encoder") from None
    if width != info["dim"]:
        raise UserError(f"text.name = {settings.name!r} gives {width} features a token, its config says {info['dim']}: give a text encoder")
    return SimpleNamespace(info=info, encode=encode, bytes=sum(weight_bytes(network) for _, network in encoders))
