"""The frozen pretrained networks: image features, autoencoder, text encoder; and their work done once, as cached latents and captions.

    torchrun --nproc_per_node=8 -- pretrained.py --run runs/laion --shard 3     # node 3; --captions caches token features, too
    python pretrained.py --run runs/emoji --shard router

reads   RUN/config.toml, RUN/shards/K/*.tar, the networks that [autoencoder] and [text] name
writes  RUN/latents/K/NAME.tar      the samples of shards/K/NAME.tar with latents instead of pictures: KEY.lat, float16
                                    [flips, mean|std, C, H, W], standardised; the flips are the picture and its mirror image. With --captions
                                    KEY.tok, float16 [tokens, E], too. All other members as they are
        RUN/latents/K/about.json    shapes of KEY.lat, the networks that made it, their preprocessing
Run again, it goes on where it stopped. Training then reads RUN/latents/K instead of RUN/shards/K. Nothing is lost: mean and standard
deviation are kept, and each epoch draws from the posterior anew, with the noise that encoding on the fly would use.

Each network is given as a hub name (NAME@REVISION pins it) or a local folder in the format of transformers or diffusers, which are
imported only where a config asks for one. What an artifact says of its networks (`info`) is their class, a digest of their weights and
their preprocessing; that, not a name, decides whether two of them are the same.
"""
import collections
import glob
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from common import UserError, atomic, barrier, load_run, make_parser, parse, progress, script, start, sum_over_ranks
from data import TarWriter, index_tar, square, to_float, to_uint8, usable
from model import hash_words

NONE = {"autoencoder": "", "text": "words"}     # names that stand for no network: pixels, and words hashed to a learned table
TILE = 1024             # pixels a side that a picture is decoded at, at most; larger ones in overlapping tiles
AT_ONCE = 2 ** 20       # pixels that are encoded or decoded together: some 2 GB with Stable Diffusion's autoencoder


# ---- names and weights --------------------------------------------------------------------------------------------

def locate(key, name):
    """Hub name, NAME@REVISION or local folder of config key `key` -> (name or folder, commit or None, its config.json)."""
    folder, revision = os.path.expanduser(name), None
    if os.path.isdir(folder):
        path = os.path.join(folder, "config.json")
        if not os.path.exists(path):
            raise UserError(f"{key} = {name!r} is a folder without config.json: give the one that save_pretrained wrote")
    else:
        import huggingface_hub
        huggingface_hub.utils.logging.set_verbosity_error()     # its retries; what failed is said once, below
        folder, _, revision = name.partition("@")
        try:
            path = huggingface_hub.hf_hub_download(folder, "config.json", revision=revision or None)
        except Exception as error:      # unreachable, unknown, gated, not a name at all: the hub has a class for each
            cause = error.__cause__ or error
            raise UserError(f"{key} = {name!r} is no folder here and cannot be fetched ({type(cause).__name__}: {str(cause).strip().splitlines()[0]}): "
                            f"fetch it where there is a network (hf download {folder} --local-dir DIR) and give the folder: --{key} DIR") from None
        revision = os.path.basename(os.path.dirname(path))      # a snapshot's folder is named after its commit
    with open(path) as f:
        return folder, revision, json.load(f)


def load(key, kind, folder, revision):
    """The network of class `kind`, frozen, in fp32. UserError where it cannot be loaded, or weights would be left random."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        network, report = kind.from_pretrained(folder, revision=revision, output_loading_info=True)
    except Exception as error:
        raise UserError(f"{key} = {folder!r} cannot be loaded as {kind.__name__} ({type(error).__name__}: {str(error).strip().splitlines()[0]})") from None
    if missing := sorted(name for name in report["missing_keys"] if "pooler" not in name):      # nobody asks the pooler
        raise UserError(f"{key} = {folder!r} lacks weights of a {kind.__name__}: {missing[0]} and {len(missing) - 1} more")
    return network.float().eval().requires_grad_(False)


def digest(network):
    """Twelve hex digits that name a network's weights: of up to 1,024 values of each tensor, whatever the tensors are called."""
    tensors = []
    for tensor in network.state_dict().values():
        values = tensor.detach().float().flatten()
        values = values[torch.arange(min(1024, len(values))) * len(values) // min(1024, len(values))]
        tensors.append(str(tuple(tensor.shape)).encode() + values.cpu().numpy().tobytes())
    return hashlib.sha256(b"".join(sorted(tensors))).hexdigest()[:12]


def identity(info):
    """What two networks must have in common to stand for each other: all but the name."""
    return {k: v for k, v in info.items() if k not in ("name", "revision")}


def label(info):
    """A network in an error message."""
    about = " ".join(f"{k} {v}" for k, v in identity(info).items() if k in ("class", "weights", "scale", "shift", "length", "layer"))
    return f"{info['name']!r}" + (f" ({about})" if about else "")


def dtype_of(precision, device):
    return torch.bfloat16 if precision == "bf16" or precision == "auto" and device.type == "cuda" else torch.float32


# ---- image features -----------------------------------------------------------------------------------------------

def image_features(config, device):
    """DINOv2, or CLIP's image tower -> (function from a list of PIL images to L2-normalised features [n,D] float32, its description).

    The middle square at 224 pixels (CLIP: at the size of its config) with the statistics that the network was trained with.
    """
    key, settings = "features.name", config.features
    folder, revision, about = locate(key, settings.name)
    import transformers
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    if about.get("model_type") in ("dinov2", "dinov2_with_registers"):
        network, statistics, side = load(key, transformers.AutoModel, folder, revision), (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), 224
    elif about.get("model_type") in ("clip", "clip_vision_model"):
        if settings.pool != "cls":
            raise UserError(f"features.pool = {settings.pool!r} is DINOv2's; {settings.name!r} is a CLIP, with one feature vector an image: cls")
        network = load(key, transformers.CLIPVisionModelWithProjection, folder, revision)
        statistics, side = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD), network.config.image_size
    else:
        raise UserError(f"{key} = {settings.name!r} is a {about.get('model_type')!r}: features come from dinov2, dinov2_with_registers or clip")
    dtype, mark = dtype_of(settings.precision, device), digest(network)
    network.to(device, dtype)
    mean, std = (torch.tensor(s, device=device).view(3, 1, 1) for s in statistics)
    first_patch = 1 + getattr(network.config, "num_register_tokens", 0)

    def pooled(x):
        out = network(x)
        if hasattr(out, "image_embeds"):
            return out.image_embeds
        tokens = out.last_hidden_state
        return tokens[:, 0] if settings.pool == "cls" else torch.cat([tokens[:, 0], tokens[:, first_patch:].mean(1)], dim=1)

    @torch.inference_mode()
    def features(images):
        if not images:
            return features([Image.new("RGB", (side, side))])[:0]       # [0,D]
        rows = []
        for first in range(0, len(images), settings.batch):
            x = np.stack([square(image, side) for image in images[first:first + settings.batch]])
            x = (torch.from_numpy(x).to(device).permute(0, 3, 1, 2) / 255 - mean) / std
            rows.append(torch.nn.functional.normalize(pooled(x.to(dtype)).float(), dim=1).cpu())
        return torch.cat(rows).numpy()

    return features, (f"{type(network).__name__} {mark}: middle square at {side} pixels (Lanczos), mean {list(statistics[0])}, "
                      f"std {list(statistics[1])}, pool {settings.pool}, L2-normalised, {str(dtype).removeprefix('torch.')}")


# ---- autoencoder --------------------------------------------------------------------------------------------------

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
    info["weights"] = digest(network)
    scale, shift = (torch.tensor(info[k], device=device, dtype=torch.float32).view(-1, 1, 1) for k in ("scale", "shift"))
    network.tile_sample_min_size, network.tile_latent_min_size = TILE, TILE // info["factor"]
    network.spatial_scale_factor = info["factor"]       # AutoencoderTiny's tiles take it for 8 always

    @torch.inference_mode()
    def encode(x):
        means, stds = [], []
        for part in x.split(max(1, AT_ONCE // x[0, 0].numel())):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                out = network.encode(part)
            posterior = getattr(out, "latent_dist", None)
            means.append(((posterior.mean if posterior else out.latents).float() - shift) * scale)
            if posterior:
                stds.append(posterior.std.float() * scale)
        return torch.cat(means), torch.cat(stds) if stds else None

    @torch.inference_mode()
    def decode(z):
        side, pictures = z.shape[-1] * info["factor"], []
        network.use_tiling = max(z.shape[-2:]) * info["factor"] > TILE
        for part in (z.float() / scale + shift).split(max(1, AT_ONCE // (side * side))):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                pictures.append(network.decode(part).sample.float())
        return torch.cat(pictures)

    return SimpleNamespace(info=info, encode=encode, decode=decode)


# ---- text encoder -------------------------------------------------------------------------------------------------

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
            raise UserError(f"text.name = {name!r} is not a network that transformers knows ({str(error).strip().splitlines()[0]})") from None
        dims.append(about.get_text_config().hidden_size)
    return parts, {"name": settings.name, "revision": " + ".join(str(revision) for *_, revision in parts), "dim": sum(dims),
                   "length": settings.length, "layer": settings.layer}


def text_encoder(settings, device):
    """The encoders of [text] -> namespace of info and encode: list of captions -> token features [n,L,E] f16, zeros behind the last token.

    Several encoders' features of a token are set side by side (E is the sum of theirs), as Stable Diffusion XL does. The empty caption
    has no tokens at all: it is the unconditional branch. Longer ones than L tokens are cut, with one warning.
    """
    parts, info = text_info(settings)
    import transformers
    dtype, encoders, marks = dtype_of(settings.precision, device), [], []
    for kind, folder, revision in parts:
        network = load("text.name", kind, folder, revision)
        marks.append(f"{type(network).__name__}:{digest(network)}")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, revision=revision, padding_side="right")
        except Exception as error:
            raise UserError(f"text.name = {folder!r} has no tokenizer that can be loaded ({type(error).__name__}: {str(error).strip().splitlines()[0]})") from None
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        longest = min(tokenizer.model_max_length, getattr(network.config, "max_position_embeddings", None) or 10 ** 9)
        if settings.length > longest:
            raise UserError(f"text.length = {settings.length}, but {folder!r} reads {longest} tokens at most")
        encoders.append((tokenizer, network.to(device, dtype)))
    info["weights"], warned = " ".join(marks), os.environ.get("RANK", "0") != "0"
    limit = torch.finfo(torch.float16).max

    @torch.inference_mode()
    def encode(captions):
        nonlocal warned
        rows = []
        for part in (captions[i:i + 256] for i in range(0, len(captions), 256)):
            features = []
            for tokenizer, network in encoders:
                if not warned and (longer := sum(len(ids) > settings.length for ids in tokenizer(part)["input_ids"])):
                    print(f"warning: {longer} of {len(part)} captions are longer than text.length = {settings.length} tokens: cut, as all such "
                          f"from here on", file=sys.stderr)
                    warned = True
                tokens = tokenizer(part, padding="max_length", truncation=True, max_length=settings.length, return_tensors="pt").to(device)
                out = network(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=settings.layer == "penultimate")
                hidden = out.hidden_states[-2] if settings.layer == "penultimate" else out.last_hidden_state
                there = torch.tensor([bool(caption.strip()) for caption in part], device=device)
                mask = tokens.attention_mask.bool() & there[:, None]
                features.append(torch.where(mask[..., None], hidden.float().clamp(-limit, limit), 0))
            rows.append(torch.cat(features, dim=2).half())
        return torch.cat(rows)

    return SimpleNamespace(info=info, encode=encode)


# ---- what a model's x and c are made of ---------------------------------------------------------------------------

class Space:
    """Pixels or latents, words or token features: turns pictures into x_0 and captions into c, and x into pictures.

    size, channels, text_dim: the model's. info: {"autoencoder": ..., "text": ...}, for artifacts' metadata. The networks are the
    config's and are loaded at once; without a device only their configs are read. wanted: what an artifact, `origin`, says that it was made with:
    a network of that name is then loaded when first needed, and one that is not the same gives a UserError with both names.
    """

    def __init__(self, config, device=None, wanted=None, origin=""):
        self.config, self.device, self.wanted, self.origin, self._networks = config, device, wanted or {}, origin, {}
        self.info = {role: self._find(role) for role in ("autoencoder", "text")}
        latent, text = self.info["autoencoder"], self.info["text"]
        factor = latent.get("factor", 1)
        if config.data.size % factor:
            raise UserError(f"data.size = {config.data.size} is not a multiple of {factor}, by which {latent['name']!r} reduces pictures")
        self.size, self.channels, self.text_dim = config.data.size // factor, latent.get("channels", 3), text.get("dim", 0)
        self.posterior = latent.get("class") == "AutoencoderKL"

    def _find(self, role):
        settings, wanted = getattr(self.config, role), self.wanted.get(role)
        if role == "text" and self.config.data.condition != "text":
            info = {"name": ""}
        elif settings.name == NONE[role]:
            info = {"name": settings.name}
        elif wanted and wanted["name"] == settings.name:
            info = wanted | ({"length": settings.length, "layer": settings.layer} if role == "text" else {})
        elif self.device is None:
            return autoencoder_info(settings.name)[-1] if role == "autoencoder" else text_info(settings)[-1]
        else:
            return self.network(role).info
        self._check(role, info)
        return info

    def _check(self, role, info):
        if (wanted := self.wanted.get(role)) and identity(wanted) != identity(info):
            raise UserError(f"{self.origin} was made with {role} {label(wanted)}, not with {label(info)}: where the same network lies elsewhere "
                            f"on this machine, give it as --{role}.name")

    def network(self, role):
        """The autoencoder or the text encoder, loaded if it is not yet; None where pixels or word numbers need none."""
        if role not in self._networks:
            settings = getattr(self.config, role)
            if settings.name == NONE[role]:
                return None
            network = autoencoder(settings.name, self.device, settings.precision) if role == "autoencoder" else text_encoder(settings, self.device)
            self._check(role, network.info)
            self._networks[role] = network
        return self._networks[role]

    def forget(self, role):
        """Frees the memory of a network that is done."""
        self._networks.pop(role, None)

    def x_0(self, x, post=None):
        """uint8 pictures [B,S,S,3] -> x_0 [B,C,h,w] float32; latents are drawn from the posterior by post, N(0, I) [B,C,h,w]."""
        if (latent := self.network("autoencoder")) is None:
            return to_float(x)
        mean, std = latent.encode(to_float(x))
        return mean if std is None else mean + std * post

    def pictures(self, x):
        """x_0 [B,C,h,w] -> uint8 pictures [B,S,S,3]."""
        latent = self.network("autoencoder")
        return to_uint8(latent.decode(x) if latent else x)

    def captions(self, texts):
        """list of captions -> c: word numbers [B,L], or token features [B,L,E] f16. An empty caption is all zeros, no condition."""
        if text := self.network("text"):
            return text.encode(texts)
        return torch.stack([hash_words(text, self.config.text.length, self.config.text.vocab) for text in texts])


# ---- the cache ----------------------------------------------------------------------------------------------------

def read_cache(run, shards, config):
    """What RUN/latents/K/about.json says, if all of `shards` have complete latents that fit the config; None if one has none.

    UserError if they are incomplete, or differ from the config or from each other.
    """
    abouts = []
    for shard in shards:
        folder = os.path.join(run, "latents", shard)
        try:
            with open(os.path.join(folder, "about.json")) as f:
                about = json.load(f)
        except FileNotFoundError:
            return None
        names, wanted = _names(folder), _names(os.path.join(run, "shards", shard)) or about["tars"]
        if missing := sorted(set(wanted) - set(names)):
            raise UserError(f"{folder} lacks {len(missing)} of {len(wanted)} tars, {missing[0]} the first: let pretrained.py --run {run} --shard {shard} "
                            f"finish, or train with --data.cached false")
        data = config.data
        for key, there, now in (("data.size", about["size"], data.size), ("data.condition", about["condition"], data.condition),
                                ("data.crop", "center", data.crop), ("data.flip", about["flip"], about["flip"] or data.flip)):
            if there != now:
                raise UserError(f"{folder} was made with {key} = {there!r}, the config says {now!r}: make it anew, or train with --data.cached false")
        abouts.append(about | {"folder": folder})
    first = abouts[0]
    for about in abouts[1:]:
        for role in ("autoencoder", "text"):
            if identity(about[role] or {}) != identity(first[role] or {}):
                raise UserError(f"{about['folder']} and {first['folder']} were made with different networks: {role} "
                                f"{label(about[role] or {'name': ''})} / {label(first[role] or {'name': ''})}")
    return first


def _names(folder):
    return sorted(os.path.basename(path) for path in glob.glob(os.path.join(glob.escape(folder), "*.tar")))


def cache_tar(source, target, space, about, batch, bad, bar):
    """Writes one tar of latents; counts the causes of unusable samples in bad. -> number of samples."""
    size, shape, count = space.config.data.size, about["shapes"][0], 0

    def crops(image):
        return np.stack([square(image, size, mirror=mirror) for mirror in (False, True)[:shape[0]]])        # [flips,S,S,3]

    samples = usable(source, crops, size, space.config.data, bad)
    with TarWriter(target) as tar:
        while part := list(itertools.islice(samples, batch)):
            x = torch.from_numpy(np.concatenate([pictures for *_, pictures in part])).to(space.device)
            moments = space.network("autoencoder").encode(to_float(x))
            latents = torch.stack([m for m in moments if m is not None], dim=1).view(-1, *shape).half().cpu().numpy()
            tokens = space.captions([_caption(members) for _, members, _ in part]).cpu() if about["text"] else None
            for i, (sample, members, _) in enumerate(part):
                members["lat"] = latents[i].tobytes()
                if tokens is not None:
                    members["tok"] = tokens[i][tokens[i].any(1)].numpy().tobytes()
                for extension, payload in members.items():
                    if extension != "image":
                        tar.add(f"{sample.key}.{extension}", payload)
            count += len(part)
            bar.update(len(part))
    return count


def _caption(members):
    return members["txt"].decode(errors="replace").strip()


def estimate(source, space, about):
    """Bytes that a sample takes in the cache: latents exactly, captions and other members by the mean over the first samples of a tar."""
    in_tar = lambda size: 512 + -(-size // 512) * 512
    first = list(itertools.islice(usable(source, lambda image: None, 0, space.config.data, collections.Counter()), 64))
    latents, captions = in_tar(2 * math.prod(about["shapes"][0])), 0.0
    if about["text"] and first:
        tokens = space.captions([_caption(members) for _, members, _ in first]).any(2).sum(1).tolist()
        captions = sum(in_tar(2 * n * space.text_dim) for n in tokens) / len(first)
    rest = sum(in_tar(len(payload)) for _, members, _ in first for role, payload in members.items() if role != "image") / max(1, len(first))
    return latents, captions, rest


def main():
    parser = make_parser(__doc__, ["autoencoder", "text"])
    parser.add_argument("--shard", required=True, metavar="K", help="whose pictures to encode: 0, 1, ..., or router")
    parser.add_argument("--captions", action="store_true", help="cache the token features of the captions, too")
    parser.add_argument("--batch", type=int, default=64, metavar="B", help="pictures at once (default: 64)")
    args, given = parse(parser)
    config = load_run(args.run, given)
    source, target = (os.path.join(args.run, folder, args.shard) for folder in ("shards", "latents"))
    names = _names(source)
    if not names:
        raise UserError(f"no tars in {source}: give --shard K of a shard that is here")
    if not config.autoencoder.name:
        raise UserError(f"nothing to cache: {args.run} is in pixel space (autoencoder.name is empty)")
    if config.data.crop != "center":
        raise UserError(f"data.crop = {config.data.crop!r} is drawn anew each time and cannot be cached: train on the fly")
    if args.captions and (config.data.condition != "text" or config.text.name == "words"):
        raise UserError(f"--captions caches a text encoder's features; this run has condition = {config.data.condition}, text.name = {config.text.name!r}")
    if args.batch < 1:
        raise UserError(f"--batch {args.batch} must be at least 1")

    ranks = start(args.device, timeout=timedelta(days=7))      # a rank may have a much larger tar than the others
    space = Space(config, ranks.device)
    about = {"size": config.data.size, "condition": config.data.condition, "flip": config.data.flip, "autoencoder": space.info["autoencoder"],
             # a list, for pictures of several shapes: all KEY.lat here have the first one
             "shapes": [[1 + config.data.flip, 1 + space.posterior, space.channels, space.size, space.size]],
             "text": space.info["text"] if args.captions else None}
    path = os.path.join(target, "about.json")
    if os.path.exists(path):
        with open(path) as f:
            old = json.load(f)
        old.pop("tars")
        for key in about:
            a, b = (identity(v[key]) if isinstance(v[key], dict) else v[key] for v in (old, about))
            if a != b:
                shown = [label(v[key]) if isinstance(v[key], dict) else repr(v[key]) for v in (old, about)]
                raise UserError(f"{target} was made with {key} {shown[0]}, now it would be {shown[1]}: delete the folder to make it anew")

    barrier()
    samples = 0
    for name in names[ranks.rank::ranks.world]:
        samples += len(index_tar(os.path.join(source, name)))
    samples = int(sum_over_ranks(torch.tensor(samples)))
    if ranks.rank == 0:
        each = estimate(os.path.join(source, names[0]), space, about)
        print(f"{target}: {samples} samples of {each[0]} bytes of latents {about['shapes'][0]}, {each[1]:.0f} of token features and {each[2]:.0f} of other "
              f"members: {samples * sum(each) / 1e9:.3g} GB, {sum(each) / 1e3:.3g} GB per million images", flush=True)
        os.makedirs(target, exist_ok=True)
        have = sum(os.path.getsize(os.path.join(target, name)) for name in _names(target))
        if (free := shutil.disk_usage(target).free) < samples * sum(each) - have:
            raise UserError(f"{target} needs {(samples * sum(each) - have) / 1e9:.3g} GB, the disk has {free / 1e9:.3g} GB left")
        for torn in glob.glob(os.path.join(glob.escape(target), "*.tmp")):     # of a call that was killed
            os.remove(torn)
        with atomic(path) as temporary, open(temporary, "w") as f:
            json.dump(about | {"tars": names}, f, indent=1)
    barrier()

    bad, made = collections.Counter(), 0
    bar = progress(desc=f"latents/{args.shard}", unit=" images")
    for name in names[ranks.rank::ranks.world]:
        if not os.path.exists(os.path.join(target, name)):
            made += cache_tar(os.path.join(source, name), os.path.join(target, name), space, about, args.batch, bad, bar)
    bar.close()
    made, unusable = sum_over_ranks(torch.tensor([made, sum(bad.values())])).tolist()
    if ranks.rank == 0:
        size = sum(os.path.getsize(os.path.join(target, name)) for name in names)
        print(f"{target}: {len(names)} tars, {size / 1e9:.3g} GB; {made} samples made now"
              + (f", {unusable} unusable ones left out" + "".join(f"; {cause}: {n}" for cause, n in sorted(bad.items())) if unusable else ""))


if __name__ == "__main__":
    script(main)
