"""cache_latents"""
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

from data import index_tar, square, to_float, usable
from ddm.codec import Space, _read_about, _tars, read_shard
from ddm.config import load_run, make_parser, parse
from ddm.encoders import NONE, identity, label, resolve
from ddm.errors import UserError, script
from ddm.files import write_text
from ddm.process import gather, on_rank_0, progress, start, sum_over_ranks
from ddm.run import alone, read_clusters
from ddm.tars import TarWriter


BATCH = 64      # pictures that are cached together


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
    parser = make_parser(__doc__)
    parser.add_argument("--shard", required=True, metavar="K", help="whose pictures to encode: 0, 1, ..., or router")
    parser.add_argument("--captions", action="store_true", help="cache the token features of the captions, too")
    args, given = parse(parser)
    config, clusters = load_run(args.run_dir, given), read_clusters(args.run_dir)
    source, target = (os.path.join(args.run_dir, folder, args.shard) for folder in ("shards", "latents"))
    if not _tars(source):
        there = sorted(os.path.basename(os.path.dirname(path)) for path in glob.glob(os.path.join(glob.escape(args.run_dir), "shards", "*", "")))
        raise UserError(f"no tars in {source}: there are the shards {', '.join(there) or 'none'}")
    if not config.autoencoder.name:
        raise UserError(f"nothing to cache: {args.run_dir} is in pixel space (autoencoder.name is empty)")
    if config.data.crop != "center":
        raise UserError(f"data.crop = {config.data.crop!r} is drawn anew each time and cannot be cached: train on the fly")
    if args.captions and (config.data.condition != "text" or config.text.name == NONE["text"]):
        raise UserError(f"--captions caches a text encoder's features; this run has condition = {config.data.condition}, text.name = {config.text.name!r}")

    tars = read_shard(source)
    with alone(os.path.join(target, "lock"), target):
        ranks = start(args.device, timeout=timedelta(days=7))      # a rank may have a much larger tar than the others
        space = Space(config, ranks.device, clusters["networks"], os.path.join(args.run_dir, "clusters.safetensors"))
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
