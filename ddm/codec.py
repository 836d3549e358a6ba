"""What x_0 and c are made of: pixels or latents, words or token features. And the cache of them.

Space turns images and captions into what the models see, and samples back into images; read_cache
checks what cache_latents.py has made beforehand of a shard.
"""
import glob
import os
import sys

import torch

from data import to_float, to_uint8
from ddm.encoders import (
    NONE,
    Autoencoder,
    TextEncoder,
    find_autoencoder,
    find_text_encoder,
    identity,
    label,
    pinned,
    resolve,
)
from ddm.errors import UserError
from ddm.files import read_json
from ddm.run import NETWORK, check_shard, read_manifest
from ddm.text import hash_words, normalise_text, words

# what a space needs a network for: a table of the config each
ROLES = ("autoencoder", "text")

# RUN/latents/K/about.json
ABOUT = {
    "fingerprint": str,
    # name of each tar that the latents are made of: its SHA-256
    "tars": {str: str},
    # of KEY.lat: flips, mean and std (or the latents alone), C, h, w
    "shapes": [[int]],
    "autoencoder": NETWORK,
    "text": NETWORK,
    "size": int,
    "condition": str,
    "flip": bool,
}


class Space:
    """Turns images into x_0 and captions into c, and samples x back into images.

    size, channels, text_dim: the model's, S/factor, C and E (0: words are numbers). posterior:
    whether x_0 is sampled from a distribution of each image. info: {"autoencoder": ..., "text":
    ...}, for artifacts' metadata.

    wanted: such an info, of the artifact `origin`: the networks that the config names must be
    those, or there is a UserError with both names. A network is loaded when it is first needed;
    without a device only its config is read.
    """

    def __init__(self, config, device=None, wanted=None, origin=""):
        self.config = config
        self.device = device
        self.wanted = wanted or {}
        self.origin = origin
        self.warned = False
        # role -> Autoencoder or TextEncoder, those that are loaded now
        self._networks = {}
        self.info = {role: self._find(role) for role in ROLES}

        latent = self.info["autoencoder"]
        factor = latent.get("factor", 1)
        if config.data.size % factor:
            raise UserError(f"data.size = {config.data.size} is not a multiple of {factor}, by "
                            f"which {latent['name']!r} reduces images")
        self.size = config.data.size // factor
        self.channels = latent.get("channels", 3)
        self.text_dim = self.info["text"].get("dim", 0)
        self.posterior = latent.get("class") == "AutoencoderKL"

    # ---- its networks

    def _needs_network(self, role):
        if role == "text" and self.config.data.condition != "text":
            return False
        return getattr(self.config, role).name != NONE[role]

    def _find(self, role):
        """The info of a role's network, by its config alone where that is enough."""
        settings = getattr(self.config, role)
        wanted = self.wanted.get(role)

        if not self._needs_network(role):
            reads_none = role == "text" and self.config.data.condition != "text"
            info = {"name": "" if reads_none else settings.name}
        elif wanted and wanted["name"] == settings.name:
            # taken at its word until it is loaded
            info = dict(wanted)
            if role == "text":
                info["length"] = settings.length
                info["layer"] = settings.layer
            if self.device is not None:
                info["precision"] = resolve(settings.precision, self.device)
        elif self.device is not None:
            info = self.network(role).info
        # without its weights there is nothing to compare
        elif role == "autoencoder":
            return find_autoencoder(settings.name).info
        else:
            return find_text_encoder(settings).info

        self._check(role, info)
        return info

    def _check(self, role, info):
        wanted = self.wanted.get(role)
        if wanted and identity(wanted) != identity(info):
            raise UserError(f"{self.origin} needs the {role} {label(wanted)}; {label(info)} is "
                            f"another network: give that one, wherever it lies on this machine, as "
                            f"--{role}.name, or leave the flag out")

    def network(self, role):
        """The Autoencoder or the TextEncoder, loaded if it is not yet; None where pixels or word
        numbers need none. UserError if it is another one than wanted.
        """
        if not self._needs_network(role):
            return None
        if role in self._networks:
            return self._networks[role]

        settings = getattr(self.config, role)
        name = settings.name
        wanted = self.wanted.get(role)
        if wanted and wanted["name"] == name:
            # at the commit that was used before
            settings = settings.model_copy(update={"name": pinned(wanted)})

        # for name_weights, before there is a device, a CPU will do
        device = self.device or torch.device("cpu")
        if role == "autoencoder":
            network = Autoencoder(settings.name, device, settings.precision)
        else:
            network = TextEncoder(settings, device)

        # as the user calls it, without the commit
        network.info["name"] = name
        self._check(role, network.info)
        self._networks[role] = network
        return network

    def name_weights(self):
        """Loads each network once to complete its info by the digest of its weights."""
        for role in ROLES:
            network = self.network(role)
            if network is None:
                continue

            # without a precision: each stage has its own
            info = dict(network.info)
            del info["precision"]
            self.info[role] = info
            self.forget(role)

    def weight_bytes(self):
        """Bytes of the networks that are loaded now."""
        return sum(network.bytes for network in self._networks.values())

    def forget(self, role):
        """Frees the memory of a network that is done."""
        self._networks.pop(role, None)

    # ---- what the models see

    def x_0(self, x, post=None):
        """uint8 images [B,S,S,3] -> x_0 [B,C,h,w] float32; latents are sampled from the posterior
        by post, N(0, I) [B,C,h,w].
        """
        autoencoder = self.network("autoencoder")
        if autoencoder is None:
            return to_float(x)

        mean, std = autoencoder.encode(to_float(x))
        if std is None:
            # of AutoencoderTiny, the latents themselves
            return mean
        return mean + std * post

    def images(self, x):
        """x_0 [B,C,h,w] -> uint8 images [B,S,S,3]."""
        autoencoder = self.network("autoencoder")
        if autoencoder is not None:
            x = autoencoder.decode(x)
        return to_uint8(x)

    def captions(self, texts):
        """n captions -> c: word numbers [n,L] int64, or token features [n,L,E] f16. An empty
        caption is all zeros, no condition.
        """
        texts = [normalise_text(text) for text in texts]
        encoder = self.network("text")
        if encoder is not None:
            return encoder.encode(texts)

        settings = self.config.text
        if not self.warned:
            self._warn(texts, settings.length)
        rows = [hash_words(text, settings.length, settings.vocab) for text in texts]
        return torch.stack(rows)

    def _warn(self, texts, length):
        """Says once that captions are cut, from rank 0."""
        longer = sum(len(words(text)) > length for text in texts)
        if not longer:
            return
        self.warned = True
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {longer} of {len(texts)} captions are longer than text.length = "
                  f"{length} words: cut (said once)", file=sys.stderr)


# ---- the cache -----------------------------------------------------------------------------------

def read_cache(run_dir, shards, config, clusters):
    """What RUN/latents/K/about.json says (ABOUT) of the first of `shards`, if each of them has one;
    None if not. clusters: what run.read_clusters says.

    UserError if latents are incomplete, or of another clustering, other tars, networks or settings
    than the run's.
    """
    abouts = {}
    for shard in shards:
        folder = os.path.join(run_dir, "latents", shard)
        about = read_about(folder)
        if about is None:
            return None

        _check_tars(run_dir, shard, about, clusters)
        _check_settings(folder, about, config, clusters)
        abouts[folder] = about

    # token features are read from the cache for all samples, or for none
    with_captions = [folder for folder, about in abouts.items() if about["text"]["name"]]
    without = [folder for folder in abouts if folder not in with_captions]

    if with_captions and without:
        raise UserError(f"{without[0]} was made without --captions, others with: delete it and "
                        f"make it anew with cache_latents.py --captions, or train with "
                        f"--data.use_latents false")
    return next(iter(abouts.values()))


def read_about(folder):
    """What RUN/latents/K/about.json says (ABOUT), None if there is none. UserError if damaged."""
    path = os.path.join(folder, "about.json")
    try:
        about = read_json(path, ABOUT)
        whole = [len(shape) == 5 and min(shape) > 0 for shape in about["shapes"]]
        if not whole or not all(whole):
            raise ValueError(f"shapes = {about['shapes']} are none of KEY.lat")
        return about
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete {folder} and make it anew with "
                        f"cache_latents.py") from None


def _remedy(folder):
    return (f"delete {folder} and make it anew with cache_latents.py, or train with "
            f"--data.use_latents false")


def _check_tars(run_dir, shard, about, clusters):
    """UserError unless the latents are of all tars of the shard, as these are now."""
    folder = os.path.join(run_dir, "latents", shard)
    source = os.path.join(run_dir, "shards", shard)
    made = about["tars"]

    # a node may have the latents alone
    wanted = made
    if tar_sizes(source):
        wanted = shard_digests(source, clusters)

    existing = tar_sizes(folder)
    missing = sorted(wanted.keys() - existing.keys())
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of {len(wanted)} tars, {missing[0]} the "
                        f"first: let cache_latents.py --run-dir {run_dir} --shard {shard} finish, "
                        f"or train with --data.use_latents false")

    for name in existing:
        if name not in wanted or made.get(name) != wanted[name]:
            raise UserError(f"{folder}/{name} was not made of {source}/{name} as it is now: "
                            f"{_remedy(folder)}")


def _check_settings(folder, about, config, clusters):
    """UserError unless the latents are of this clustering, and as this config would make them."""
    data = config.data
    # what was mirrored serves a training that does not mirror
    flip = about["flip"] or data.flip

    for what, made, now in (
        ("the clustering (fingerprint)", about["fingerprint"], clusters["fingerprint"]),
        ("data.size", about["size"], data.size),
        ("data.condition", about["condition"], data.condition),
        ("data.crop", "center", data.crop),
        ("data.flip", about["flip"], flip),
    ):
        if made != now:
            raise UserError(f"{folder} was made with {what} {made!r}, now it is {now!r}: "
                            f"{_remedy(folder)}")

    for role in ROLES:
        made = about[role]
        meant = clusters["networks"][role]
        # without a name nothing of this role is cached
        if made["name"] and identity(made) != identity(meant):
            raise UserError(f"{folder} was made with {role} {label(made)}, the run is for "
                            f"{label(meant)}: {_remedy(folder)}")


def tar_sizes(folder):
    """{name: bytes} of the tars in a folder, sorted."""
    sizes = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar"))):
        sizes[os.path.basename(path)] = os.path.getsize(path)
    return sizes


def shard_digests(folder, clusters):
    """{name: SHA-256} of the tars of RUN/shards/K, sorted. UserError unless they are those of its
    manifest, and of this clustering.
    """
    check_shard(folder, clusters["fingerprint"], ranks=None)
    tars = read_manifest(folder)["tars"]
    return {name: tars[name]["sha256"] for name in sorted(tars)}
