"""Stage 1b, optional: what the frozen networks make of a shard's images and captions, done once.

    torchrun --nproc_per_node=8 cache_latents.py --run-dir runs/laion --shard 3
    python cache_latents.py --run-dir runs/emoji --shard router --captions

Run again, it continues where it stopped. Training then reads RUN/latents/K instead of RUN/shards/K
and sees the same distribution: mean and standard deviation are kept (AutoencoderTiny has no
deviation: the latents alone), and each epoch samples from the posterior anew, with the noise that
encoding on the fly would use.

reads   RUN/config.toml, RUN/clusters.safetensors, RUN/shards/K/*.tar; the networks that
        [autoencoder] and, with --captions, [text] name
writes  RUN/latents/K/NAME.tar      the samples of shards/K/NAME.tar with latents instead of images:
                                    KEY.lat [flips, mean|std, C, h, w] f16, standardised; flips are
                                    the image and its mirror image. With --captions KEY.tok
                                    [tokens, E] f16, too. All other members as they are
        RUN/latents/K/about.json    shapes of KEY.lat, the networks that made it, the clustering,
                                    the tars' SHA-256
"""
import collections
import glob
import itertools
import json
import math
import os
import shutil
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch

from data import index_tar, square, to_float, usable
from ddm.codec import ROLES, Space, read_about, shard_digests, tar_sizes
from ddm.config import load_run, make_parser, parse
from ddm.encoders import NONE, identity, label, resolve
from ddm.errors import UserError, script
from ddm.files import write_text
from ddm.lock import alone
from ddm.process import gather, on_rank_0, progress, start, sum_over_ranks
from ddm.run import read_clusters
from ddm.tars import TarWriter

# images that are cached together
BATCH = 64


def parser():
    parser = make_parser(__doc__)
    parser.add_argument("--shard", required=True, metavar="K",
                        help="whose images to encode: 0, 1, ..., or router")
    parser.add_argument("--captions", action="store_true",
                        help="cache the token features of the captions, too")
    return parser


def main():
    args, given = parse(parser())
    config = load_run(args.run_dir, given)
    clusters = read_clusters(args.run_dir)
    source = os.path.join(args.run_dir, "shards", args.shard)
    target = os.path.join(args.run_dir, "latents", args.shard)
    check_arguments(args, config, source)
    tars = shard_digests(source, clusters)

    with alone(os.path.join(target, "lock"), target):
        # a rank may have a much larger tar than the others
        ranks = start(args.device, timeout=timedelta(days=7))
        origin = os.path.join(args.run_dir, "clusters.safetensors")
        space = Space(config, ranks.device, clusters["networks"], origin)
        # found out now, if it is another one
        space.network("autoencoder")

        # it must continue as it began
        about = describe(space, clusters, args.captions)
        existing = read_existing(target, about, args.captions)
        samples = count_samples(source, tars, ranks)

        def prepare():
            # all that can go wrong goes wrong before the work
            need = estimate(source, samples, space, about)
            announce(target, need, about)
            tidy(target, tars, existing)
            check_room(target, need)
            write_text(os.path.join(target, "about.json"),
                       json.dumps(about | {"tars": tars}, indent=1))

        on_rank_0(prepare)
        made, bad = cache_tars(source, target, samples, space, about, ranks)
        announce_end(target, made=made, bad=bad, ranks=ranks)


# ---- what is asked for, and what is there --------------------------------------------------------

def check_arguments(args, config, source):
    """UserError if there is nothing to cache, or if it cannot be cached."""
    if not tar_sizes(source):
        pattern = os.path.join(glob.escape(args.run_dir), "shards", "*", "")
        existing = sorted(os.path.basename(os.path.dirname(path)) for path in glob.glob(pattern))
        raise UserError(f"no tars in {source}: there are the shards "
                        f"{', '.join(existing) or 'none'}")

    if config.autoencoder.name == NONE["autoencoder"]:
        raise UserError(f"nothing to cache: {args.run_dir} is in pixel space (autoencoder.name is "
                        f"empty)")

    if config.data.crop != "center":
        raise UserError(f"data.crop = {config.data.crop!r} is chosen anew each time and cannot be "
                        f"cached: train on the fly")

    has_encoder = config.data.condition == "text" and config.text.name != NONE["text"]
    if args.captions and not has_encoder:
        raise UserError(f"--captions caches a text encoder's features; this run has condition = "
                        f"{config.data.condition}, text.name = {config.text.name!r}")


def describe(space, clusters, captions):
    """What about.json says (codec.ABOUT), but for the tars."""
    config = space.config

    # the image and its mirror image; mean and standard deviation, or the latents alone
    flips = 1 + config.data.flip
    moments = 1 + space.posterior

    # without a name: nothing of the captions is cached
    text = {"name": ""}
    if captions:
        precision = resolve(config.text.precision, space.device)
        text = space.info["text"] | {"precision": precision}

    return {
        "fingerprint": clusters["fingerprint"],
        "size": config.data.size,
        "condition": config.data.condition,
        "flip": config.data.flip,
        # a list, for images of several shapes: all KEY.lat here have the first one
        "shapes": [[flips, moments, space.channels, space.size, space.size]],
        "autoencoder": space.info["autoencoder"] | {
            "precision": resolve(config.autoencoder.precision, space.device),
        },
        "text": text,
    }


def read_existing(target, about, captions):
    """-> {tar: SHA-256} of what the latents in `target` were made of. UserError unless they were
    made in the same way.
    """
    existing = read_about(target)
    if existing is None:
        return {}

    had_captions = bool(existing["text"]["name"])
    if had_captions != captions:
        raise UserError(f"{target} was made with{'' if had_captions else 'out'} --captions: call "
                        f"it so again, or delete {target} to make it anew")

    # only what decides about the bytes: the list of tars may grow
    for key in about:
        was = existing[key]
        now = about[key]

        if key in ROLES:
            same = _made_alike(was) == _made_alike(now)
            was = f"{label(was)} in {was.get('precision')}"
            now = f"{label(now)} in {now.get('precision')}"
        else:
            same = was == now
            was = repr(was)
            now = repr(now)

        if not same:
            raise UserError(f"{target} was made with {key} {was}, now it would be {now}: delete "
                            f"{target} to make it anew")
    return existing["tars"]


def _made_alike(info):
    """What must be the same of a network for its results to be the same, bit for bit."""
    return identity(info) | {"precision": info.get("precision")}


def count_samples(source, tars, ranks):
    """{tar: number of its samples}; the ranks share the work of indexing."""
    # zeros where another rank counts: their sum is all
    counts = torch.zeros(len(tars), dtype=torch.int64)
    for i, name in enumerate(tars):
        if i % ranks.world == ranks.rank:
            counts[i] = len(index_tar(os.path.join(source, name)))
    sum_over_ranks(counts)
    return dict(zip(tars, counts.tolist(), strict=True))


# ---- before the work, on rank 0 ------------------------------------------------------------------

@dataclass
class Need:
    """Bytes that the cache will take, with the headers of the tars."""

    samples: int
    # of each sample, on average
    latents: int
    captions: float
    others: float

    def each(self):
        return self.latents + self.captions + self.others

    def total(self):
        return self.samples * self.each()


def in_tar(size):
    """Bytes that a member of so many bytes takes: a header, and whole blocks of 512."""
    return 512 + math.ceil(size / 512) * 512


def estimate(source, samples, space, about):
    """-> Need: latents exactly, captions and other members by the first samples of a tar."""
    # the largest, for a tar may be empty
    largest = max(samples, key=samples.get)
    found = usable(os.path.join(source, largest), lambda image: None, 1,
                   settings=space.config.data, bad=[])

    captions = []
    others = 0
    for _, members, caption, _ in itertools.islice(found, BATCH):
        captions.append(caption)
        for role, payload in members.items():
            if role != "image":
                others += in_tar(len(payload))

    features = 0
    if about["text"]["name"] and captions:
        # the zeros of the padding are not written
        tokens = space.captions(captions).any(2).sum(1)
        features = sum(in_tar(2 * n * space.text_dim) for n in tokens.tolist())

    n = max(1, len(captions))
    return Need(
        samples=sum(samples.values()),
        latents=in_tar(2 * math.prod(about["shapes"][0])),
        captions=features / n,
        others=others / n,
    )


def announce(target, need, about):
    print(f"{target}: {need.samples} samples of {need.latents} bytes of latents "
          f"{about['shapes'][0]}, {need.captions:.0f} of token features and {need.others:.0f} of "
          f"other members: {need.total() / 1e9:.3g} GB, {need.each() / 1e3:.3g} GB per million "
          f"images", flush=True)


def tidy(target, tars, existing):
    """Removes latents of tars that have gone or changed since, and what a call that was killed has
    left. tars, existing: {name: SHA-256} now, and when the latents were made.
    """
    os.makedirs(target, exist_ok=True)
    for name in tar_sizes(target):
        if name not in tars or existing.get(name) != tars[name]:
            os.remove(os.path.join(target, name))

    for torn in glob.glob(os.path.join(glob.escape(target), "*.tmp")):
        os.remove(torn)


def check_room(target, need):
    """UserError if the disk has not the room."""
    # what is there already needs no more
    missing = need.total() - sum(tar_sizes(target).values())
    free = shutil.disk_usage(target).free
    if free < missing:
        raise UserError(f"{target} needs {missing / 1e9:.3g} GB more, the disk has "
                        f"{free / 1e9:.3g} GB left")


# ---- the work ------------------------------------------------------------------------------------

def cache_tars(source, target, samples, space, about, ranks):
    """Writes this rank's tars of latents that are not there yet -> (number of samples, bad).

    samples: {tar: number of its samples}; bad: the unusable ones, as data.usable lists them.
    """
    # a tar is written whole or not at all
    mine = []
    for name in list(samples)[ranks.rank::ranks.world]:
        if not os.path.exists(os.path.join(target, name)):
            mine.append(name)

    made = 0
    bad = []
    bar = progress(desc=f"latents/{os.path.basename(target)}, {len(mine)} tars",
                   total=sum(samples[name] for name in mine), unit=" images")

    for name in mine:
        made += cache_tar(os.path.join(source, name), os.path.join(target, name), space, about,
                          bad=bad, bar=bar)
    bar.close()
    return made, bad


def cache_tar(source, target, space, about, bad, bar):
    """Writes one tar of latents; appends the unusable samples to bad. -> number of samples."""
    size = space.config.data.size
    flips = about["shapes"][0][0]

    def crops(image):
        """The image and its mirror image [flips,S,S,3]."""
        mirrored = (False, True)[:flips]
        return np.stack([square(image, size, mirror=mirror) for mirror in mirrored])

    # images are decoded as they are asked for
    samples = usable(source, crops, size, settings=space.config.data, bad=bad)
    count = 0

    with TarWriter(target) as tar:
        while True:
            part = list(itertools.islice(samples, BATCH))
            if not part:
                return count
            write_samples(tar, part, space, about)
            count += len(part)
            bar.update(len(part))


def write_samples(tar, samples, space, about):
    """Encodes some samples together, as data.usable yields them, and writes them to a tar."""
    images = np.concatenate([images for *_, images in samples])    # [n*flips,S,S,3]
    latents = encode_images(images, space, about["shapes"][0])
    tokens = None
    if about["text"]["name"]:
        tokens = space.captions([caption for _, _, caption, _ in samples]).cpu()

    for i, (sample, members, *_) in enumerate(samples):
        # in the image's place
        del members["image"]
        members["lat"] = latents[i].tobytes()
        if tokens is not None:
            # without the padding
            is_token = tokens[i].any(1)
            members["tok"] = tokens[i][is_token].numpy().tobytes()

        for extension, payload in members.items():
            tar.add(f"{sample.key}.{extension}", payload)


def encode_images(images, space, shape):
    """uint8 images [n*flips,S,S,3] -> latents [n,*shape] f16, shape: flips, mean|std, C, h, w."""
    x = torch.from_numpy(images).to(space.device)
    mean, std = space.network("autoencoder").encode(to_float(x))

    # AutoencoderTiny has no deviation
    moments = [mean] if std is None else [mean, std]
    latents = torch.stack(moments, dim=1)                           # [n*flips,mean|std,C,h,w]
    return latents.view(-1, *shape).half().cpu().numpy()


def announce_end(target, made, bad, ranks):
    """Says what all ranks have made and left out, from rank 0."""
    causes = collections.Counter(error.cause for _, error in bad)
    total = 0
    left_out = collections.Counter()

    for count, theirs in gather((made, causes)):
        total += count
        left_out += theirs
    if ranks.rank:
        return

    sizes = tar_sizes(target)
    line = (f"{target}: {len(sizes)} tars, {sum(sizes.values()) / 1e9:.3g} GB; {total} samples "
            f"made now")
    for cause, count in sorted(left_out.items()):
        line += f"; {count} left out: {cause}"
    print(line)


if __name__ == "__main__":
    script(main)
