"""The space that models work in, pixels or latents, words or token features; and the frozen networks' work done once: a cache of it.

    torchrun --nproc_per_node=8 -- pretrained.py --run runs/laion --shard 3     # node 3; --captions caches token features, too
    python pretrained.py --run runs/emoji --shard router

reads   RUN/config.toml, RUN/shards/K/*.tar, the networks that [autoencoder] and [text] name
writes  RUN/latents/K/NAME.tar      the samples of shards/K/NAME.tar with latents instead of pictures: KEY.lat, float16
                                    [flips, mean|std, C, H, W], standardised; the flips are the picture and its mirror image. With --captions
                                    KEY.tok, float16 [tokens, E], too. All other members as they are
        RUN/latents/K/about.json    shapes of KEY.lat, the networks that made it, their preprocessing
Run again, it goes on where it stopped. Training then reads RUN/latents/K instead of RUN/shards/K. Nothing is lost: mean and standard
deviation are kept, and each epoch draws from the posterior anew, with the noise that encoding on the fly would use.
"""
import collections
import glob
import itertools
import json
import math
import os
import shutil
from datetime import timedelta

import numpy as np
import torch

from common import UserError, atomic, barrier, load_run, make_parser, parse, progress, script, start, sum_over_ranks
from data import TarWriter, index_tar, square, to_float, to_uint8, usable
from model import hash_words
from networks import NONE, autoencoder, autoencoder_info, identity, label, text_encoder, text_info


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
