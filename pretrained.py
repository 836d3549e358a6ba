"""The space that models work in, pixels or latents, words or token features; and the frozen networks' work done once: a cache of it.

    torchrun --nproc_per_node=8 -- pretrained.py --run runs/laion --shard 3     # node 3; --captions caches token features, too
    python pretrained.py --run runs/emoji --shard router

reads   RUN/config.toml, RUN/clusters.safetensors, RUN/shards/K/*.tar, the networks that [autoencoder] and [text] name
writes  RUN/latents/K/NAME.tar      the samples of shards/K/NAME.tar with latents instead of pictures: KEY.lat, float16
                                    [flips, mean|std, C, H, W], standardised; the flips are the picture and its mirror image. With --captions
                                    KEY.tok, float16 [tokens, E], too. All other members as they are
        RUN/latents/K/about.json    shapes of KEY.lat, the networks that made it and their preprocessing, the clustering, the shards' SHA-256
Run again, it goes on where it stopped. Training then reads RUN/latents/K instead of RUN/shards/K. It sees the same distribution: mean and
standard deviation are kept (AutoencoderTiny has no deviation: one row, the latents), and each epoch draws from the posterior anew, with the
noise that encoding on the fly would use.
"""
import collections
import glob
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

from common import (NETWORK, UserError, alone, gather, load_run, make_parser, on_rank_0, parse, progress, read_clusters, read_json, read_manifest, script, start,
                    sum_over_ranks, write_text)
from data import TarWriter, index_tar, square, to_float, to_uint8, usable
from model import hash_words, normalise_text, words
from networks import NONE, autoencoder, autoencoder_info, identity, label, pinned, resolve, text_encoder, text_info

BATCH = 64      # pictures that are cached together
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


# ---- what a model's x and c are made of ---------------------------------------------------------------------------

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


# ---- the cache ----------------------------------------------------------------------------------------------------

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
        anew = f"delete {folder} and make it anew with pretrained.py, or train with --data.cached false"
        there, source = _tars(folder), os.path.join(run, "shards", shard)
        wanted = read_shard(source) if _tars(source) else about["tars"]
        if missing := sorted(wanted.keys() - there.keys()):
            raise UserError(f"{folder} lacks {len(missing)} of {len(wanted)} tars, {missing[0]} the first: let pretrained.py --run {run} --shard {shard} "
                            f"finish, or train with --data.cached false")
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
            raise UserError(f"{without} was made without --captions, others with: delete it and make it anew with pretrained.py --captions, "
                            f"or train with --data.cached false")
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
            "it anew with pretrained.py"
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


def cache_tar(source, target, space, about, bad, bar):
    """Writes one tar of latents; appends the unusable samples to bad, as data.usable does. -> number of samples."""
    size, shape, count = space.config.data.size, about["shapes"][0], 0

    def crops(image):
        return np.stack([square(image, size, mirror=mirror) for mirror in (False, True)[:shape[0]]])        # [flips,S,S,3]

    samples = usable(source, crops, size, space.config.data, bad)
    with TarWriter(target) as tar:
        while part := list(itertools.islice(samples, BATCH)):
            x = torch.from_numpy(np.concatenate([pictures for *_, pictures in part])).to(space.device)
            moments = space.network("autoencoder").encode(to_float(x))
            latents = torch.stack([m for m in moments if m is not None], dim=1).view(-1, *shape).half().cpu().numpy()
            tokens = space.captions([caption for _, _, caption, _ in part]).cpu() if about["text"]["name"] else None
            for i, (sample, members, *_) in enumerate(part):
                members["lat"] = latents[i].tobytes()
                if tokens is not None:
                    members["tok"] = tokens[i][tokens[i].any(1)].numpy().tobytes()
                for extension, payload in members.items():
                    if extension != "image":
                        tar.add(f"{sample.key}.{extension}", payload)
            count += len(part)
            bar.update(len(part))
    return count


def estimate(source, space, about):
    """Bytes that a sample takes in the cache: latents exactly, captions and other members by the mean over the first samples of a tar."""
    in_tar = lambda size: 512 + -(-size // 512) * 512
    first = list(itertools.islice(usable(source, lambda image: None, 1, space.config.data, []), BATCH))
    latents, captions = in_tar(2 * math.prod(about["shapes"][0])), 0.0
    if about["text"]["name"] and first:
        tokens = space.captions([caption for _, _, caption, _ in first]).any(2).sum(1).tolist()
        captions = sum(in_tar(2 * n * space.text_dim) for n in tokens) / len(first)
    rest = sum(in_tar(len(payload)) for _, members, *_ in first for role, payload in members.items() if role != "image") / max(1, len(first))
    return latents, captions, rest


def main():
    parser = make_parser(__doc__, ["autoencoder", "text"])
    parser.add_argument("--shard", required=True, metavar="K", help="whose pictures to encode: 0, 1, ..., or router")
    parser.add_argument("--captions", action="store_true", help="cache the token features of the captions, too")
    args, given = parse(parser)
    config, clusters = load_run(args.run, given), read_clusters(args.run)
    source, target = (os.path.join(args.run, folder, args.shard) for folder in ("shards", "latents"))
    if not _tars(source):
        there = sorted(os.path.basename(os.path.dirname(path)) for path in glob.glob(os.path.join(glob.escape(args.run), "shards", "*", "")))
        raise UserError(f"no tars in {source}: there are the shards {', '.join(there) or 'none'}")
    if not config.autoencoder.name:
        raise UserError(f"nothing to cache: {args.run} is in pixel space (autoencoder.name is empty)")
    if config.data.crop != "center":
        raise UserError(f"data.crop = {config.data.crop!r} is drawn anew each time and cannot be cached: train on the fly")
    if args.captions and (config.data.condition != "text" or config.text.name == NONE["text"]):
        raise UserError(f"--captions caches a text encoder's features; this run has condition = {config.data.condition}, text.name = {config.text.name!r}")

    tars = read_shard(source)
    with alone(os.path.join(target, "lock"), target):
        ranks = start(args.device, timeout=timedelta(days=7))      # a rank may have a much larger tar than the others
        space = Space(config, ranks.device, clusters["networks"], os.path.join(args.run, "clusters.safetensors"))
        space.network("autoencoder")        # found out now, if it is another one
        about = {"fingerprint": clusters["fingerprint"], "size": config.data.size, "condition": config.data.condition, "flip": config.data.flip,
                 # a list, for pictures of several shapes: all KEY.lat here have the first one
                 "shapes": [[1 + config.data.flip, 1 + space.posterior, space.channels, space.size, space.size]],
                 "autoencoder": space.info["autoencoder"] | {"precision": resolve(config.autoencoder.precision, ranks.device)},
                 "text": space.info["text"] | {"precision": resolve(config.text.precision, ranks.device)} if args.captions else {"name": ""}}
        old = _read_about(target) or about | {"tars": {}}       # without an old one, as if it were the same
        if bool(old["text"]["name"]) != args.captions:
            raise UserError(f"{target} was made with{'' if old['text']['name'] else 'out'} --captions: call it so again, or delete {target} to make it anew")
        for key in about:
            is_network = key in ("autoencoder", "text")
            a, b = (identity(v[key]) | {"precision": v[key].get("precision")} if is_network else v[key] for v in (old, about))
            if a != b:
                shown = [label(v[key]) + f" in {v[key].get('precision')}" if is_network else repr(v[key]) for v in (old, about)]
                raise UserError(f"{target} was made with {key} {shown[0]}, now it would be {shown[1]}: delete {target} to make it anew")

        mine = list(tars)[ranks.rank::ranks.world]
        counts = torch.zeros(len(tars), dtype=torch.int64)
        counts[ranks.rank::ranks.world] = torch.tensor([len(index_tar(os.path.join(source, name))) for name in mine], dtype=torch.int64)
        sum_over_ranks(counts)

        def prepare():
            largest = list(tars)[int(counts.argmax())]
            samples, each = int(counts.sum()), estimate(os.path.join(source, largest), space, about)
            print(f"{target}: {samples} samples of {each[0]} bytes of latents {about['shapes'][0]}, {each[1]:.0f} of token features and {each[2]:.0f} of other "
                  f"members: {samples * sum(each) / 1e9:.3g} GB, {sum(each) / 1e3:.3g} GB per million images", flush=True)
            os.makedirs(target, exist_ok=True)
            for name in _tars(target):
                if name not in tars or old["tars"].get(name) != tars[name]:     # of a shard that is gone or has changed since
                    os.remove(os.path.join(target, name))
            for torn in glob.glob(os.path.join(glob.escape(target), "*.tmp")):     # of a call that was killed
                os.remove(torn)
            needed = samples * sum(each) - sum(_tars(target).values())
            if (free := shutil.disk_usage(target).free) < needed:
                raise UserError(f"{target} needs {needed / 1e9:.3g} GB more, the disk has {free / 1e9:.3g} GB left")
            write_text(os.path.join(target, "about.json"), json.dumps(about | {"tars": tars}, indent=1))

        on_rank_0(prepare)
        bad, made = [], 0
        mine = [name for name in mine if not os.path.exists(os.path.join(target, name))]
        samples = dict(zip(tars, counts.tolist()))
        bar = progress(desc=f"latents/{args.shard}, {len(mine)} tars", total=sum(samples[name] for name in mine), unit=" images")
        for name in mine:
            made += cache_tar(os.path.join(source, name), os.path.join(target, name), space, about, bad, bar)
        bar.close()
        every = gather((made, collections.Counter(error.cause for _, error in bad)))
        if ranks.rank == 0:
            bad = sum((b for _, b in every), collections.Counter())
            print(f"{target}: {len(tars)} tars, {sum(_tars(target).values()) / 1e9:.3g} GB; {sum(n for n, _ in every)} samples made now"
                  + "".join(f"; {n} left out: {cause}" for cause, n in sorted(bad.items())))


if __name__ == "__main__":
    script(main)
