"""ddm.codec"""
import glob
import os
import sys
from types import SimpleNamespace

import torch

from data import to_float, to_uint8
from ddm.encoders import (
    NONE,
    autoencoder,
    autoencoder_info,
    identity,
    label,
    pinned,
    resolve,
    text_encoder,
    text_info,
)
from ddm.errors import UserError
from ddm.files import read_json
from ddm.run import NETWORK, read_manifest
from ddm.text import hash_words, normalise_text, words


ABOUT = {
    "fingerprint": str,
    "tars": {str: str},
    "shapes": [[int]],
    "autoencoder": NETWORK,
    "text": NETWORK,
    "size": int,
    "condition": str,
    "flip": bool,
}


class Space:
    """Pixels or latents, words or token features: turns pictures into x_0 and captions into c, and x into pictures.

    size, channels, text_dim: the model's. info: {"autoencoder": ..., "text": ...}, for artifacts' metadata. wanted: such an info, of an
    artifact `origin`: the networks that the config names must be those, or there is a UserError with both names. A network is loaded when
    it is first needed; without a device only its config is read.
    """

    def __init__(self, config, device=None, wanted=None, origin=""):
        self.config, self.device, self.wanted, self.origin, self._networks, self.warned = config, device, wanted or {}, origin, {}, False
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
        elif wanted and wanted["name"] == settings.name:        # taken at its word until it is loaded
            info = wanted | ({"length": settings.length, "layer": settings.layer} if role == "text" else {})
            if self.device is not None:
                info["precision"] = resolve(settings.precision, self.device)
        elif self.device is None:
            return autoencoder_info(settings.name)[-1] if role == "autoencoder" else text_info(settings)[-1]
        else:
            return self.network(role).info
        self._check(role, info)
        return info

    def _check(self, role, info):
        if (wanted := self.wanted.get(role)) and identity(wanted) != identity(info):
            raise UserError(f"{self.origin} needs the {role} {label(wanted)}; {label(info)} is another network: give that one, wherever it lies on "
                            f"this machine, as --{role}.name, or leave the flag out")

    def network(self, role):
        """The autoencoder or the text encoder, loaded if it is not yet; None where pixels or word numbers need none."""
        if role not in self._networks:
            settings, wanted = SimpleNamespace(**vars(getattr(self.config, role))), self.wanted.get(role)
            if settings.name == NONE[role] or role == "text" and self.config.data.condition != "text":
                return None
            if wanted and wanted["name"] == settings.name:
                settings.name = pinned(wanted)
            device = self.device or torch.device("cpu")
            network = autoencoder(settings.name, device, settings.precision) if role == "autoencoder" else text_encoder(settings, device)
            network.info["name"] = getattr(self.config, role).name
            self._check(role, network.info)
            self._networks[role] = network
        return self._networks[role]

    def name_weights(self):
        """Loads each network once to complete its info by the digest of its weights."""
        for role in self.info:
            if network := self.network(role):
                # without a precision: each stage has its own
                self.info[role] = {key: value for key, value in network.info.items() if key != "precision"}
                self.forget(role)

    def weight_bytes(self):
        """Bytes that the networks take which are loaded now."""
        return sum(network.bytes for network in self._networks.values())

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
        texts = [normalise_text(text) for text in texts]
        if text := self.network("text"):
            return text.encode(texts)
        length = self.config.text.length
        if not self.warned and (longer := sum(len(words(text)) > length for text in texts)):
            self.warned = True
            if os.environ.get("RANK", "0") == "0":
                print(f"warning: {longer} of {len(texts)} captions are longer than text.length = {length} words: cut (said once)", file=sys.stderr)
        return torch.stack([hash_words(text, length, self.config.text.vocab) for text in texts])


def read_cache(run, shards, config, clusters):
    """What RUN/latents/K/about.json says, if each of `shards` has one; None if not. clusters: what common.read_clusters says.

    UserError if the latents are incomplete, or of another clustering, other tars, networks or settings than the run's.
    """
    abouts = []
    for shard in shards:
        folder = os.path.join(run, "latents", shard)
        about = _read_about(folder)
        if about is None:
            return None
        anew = f"delete {folder} and make it anew with cache_latents.py, or train with --data.use_latents false"
        there, source = _tars(folder), os.path.join(run, "shards", shard)
        wanted = read_shard(source) if _tars(source) else about["tars"]
        if missing := sorted(wanted.keys() - there.keys()):
            raise UserError(f"{folder} lacks {len(missing)} of {len(wanted)} tars, {missing[0]} the first: let cache_latents.py --run-dir {run} --shard {shard} "
                            f"finish, or train with --data.use_latents false")
        if other := sorted(name for name in there if name not in wanted or about["tars"].get(name) != wanted[name]):
            raise UserError(f"{folder}/{other[0]} was not made of {run}/shards/{shard}/{other[0]} as it is now: {anew}")
        data, meant = config.data, clusters["networks"]
        for what, made, now in (("the clustering (fingerprint)", about["fingerprint"], clusters["fingerprint"]), ("data.size", about["size"], data.size),
                                ("data.condition", about["condition"], data.condition), ("data.crop", "center", data.crop),
                                ("data.flip", about["flip"], about["flip"] or data.flip)):
            if made != now:
                raise UserError(f"{folder} was made with {what} {made!r}, now it is {now!r}: {anew}")
        for role in ("autoencoder", "text"):
            if about[role]["name"] and identity(about[role]) != identity(meant[role]):
                raise UserError(f"{folder} was made with {role} {label(about[role])}, the run is for {label(meant[role])}: {anew}")
        abouts.append(about | {"folder": folder})
    first = abouts[0]
    for about in abouts[1:]:
        if bool(about["text"]["name"]) != bool(first["text"]["name"]):
            without = (first if about["text"]["name"] else about)["folder"]
            raise UserError(f"{without} was made without --captions, others with: delete it and make it anew with cache_latents.py --captions, "
                            f"or train with --data.use_latents false")
    return first


def _read_about(folder):
    """What about.json says (ABOUT), None if there is none. UserError if it is damaged."""
    try:
        about = read_json(os.path.join(folder, "about.json"), ABOUT)
        if not about["shapes"] or not all(
            len(shape) == 5 and min(shape) > 0 for shape in about["shapes"]
        ):
            raise ValueError(f"shapes = {about['shapes']} are none of KEY.lat")
        return about
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{os.path.join(folder, 'about.json')} is damaged ({error}): delete {folder} and make "
            "it anew with cache_latents.py"
        ) from None


def _tars(folder):
    """{name: size} of the tars in a folder."""
    return {os.path.basename(path): os.path.getsize(path) for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar")))}


def read_shard(folder):
    """{name: SHA-256} of the tars of RUN/shards/K, as its manifest says. UserError if their names
    or sizes are others.
    """
    tars, sizes = read_manifest(folder)["tars"], _tars(folder)
    wrong = sorted(
        name
        for name in tars.keys() | sizes.keys()
        if name not in tars or sizes.get(name) != tars[name]["bytes"]
    )
    if wrong:
        raise UserError(
            f"{folder} is not as its manifest says ({wrong[0]}: {sizes.get(wrong[0])} bytes "
            f"there, {tars.get(wrong[0], {}).get('bytes')} in the "
            f"manifest): copy it again"
        )
    return {name: entry["sha256"] for name, entry in sorted(tars.items())}
