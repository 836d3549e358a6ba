"""From a run's shards to batches on the device.

    data, space = open_shards(...)          the samples of some shards, and what x_0 and c are
    batches = Batches(data, config, engine, Stop())
    for b in batches.of_step(step):         this rank's micro-batches of one step
        x_0, c = encode(space, b)

Everything random about a sample is a function of (seed, position in the stream) (data.py), so a run
gives the same loss curve, up to rounding, on any number of ranks and with any micro-batch, and a
resumed run on a CPU the same bits as an undisturbed one.
"""
import atexit
import functools
import glob
import multiprocessing
import multiprocessing.queues
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass

import torch

from data import TarDataset, collate, index_tar, mix, to_tensor
from ddm import encoders, plan
from ddm.codec import Space, read_cache
from ddm.errors import UserError, kill_children
from ddm.process import barrier, cores, local_world
from ddm.run import check_shard, read_clusters, read_manifest
from ddm.text import hash_words

# batches that each decoding process has ready
AHEAD = 4
# warnings of single samples that cannot be used; more are only listed
WARNINGS = 20


# ---- opening shards ------------------------------------------------------------------------------

def open_shards(run_dir, shards, config, train, ranks, clusters, *, labelled=False, apart=False,
                verify=False):
    """-> (the TarDataset of all tars of these shards, the Space of the run's models).

    Of their latents, if all of them are cached. clusters: what run.read_clusters says; labelled:
    each sample must say its cluster; apart: a list of a TarDataset for each shard; verify: compare
    the tars' SHA-256 with the manifest. UserError if a shard is missing or damaged.
    """
    origin = os.path.join(run_dir, "clusters.safetensors")
    space = Space(config, ranks.device, clusters.get("networks"), origin)
    cache = open_cache(run_dir, shards, config, clusters, space)

    folders = [os.path.join(run_dir, "latents" if cache else "shards", k) for k in shards]
    tars = find_shard_tars(folders, config, cache)
    check_shards(run_dir, shards, clusters, ranks, cached=bool(cache), verify=verify)
    if ranks.rank == 0:
        announce_cache(config, space, folders, cache)
    index_all(tars, ranks)

    # one stream of samples for each shard, or one for all
    parts = dict(zip(folders, tars, strict=True))
    if not apart:
        parts = {", ".join(folders): sorted(sum(tars, []))}
    data = []
    for i, (folder, paths) in enumerate(parts.items()):
        # of its own: with the same seed all shards would be shuffled alike
        seed = mix(train.seed, i) if apart else train.seed
        data.append(_dataset(paths, config, space, cache, seed, labelled))
        if not len(data[-1]):
            raise UserError(f"no samples in {folder}")
    # of latents there may be fewer: samples that cannot be used are left out
    if not cache:
        check_samples(data)

    load_networks(space, cache)
    return (data if apart else data[0]), space


def index_all(tars, ranks):
    """Indexes the tars of all folders; the ranks share the work of the first time."""
    every = sum(tars, [])
    for path in every[ranks.rank::ranks.world]:
        index_tar(path)
    # only now are all of them there, so that no rank makes one a second time
    barrier()


def load_networks(space, cache):
    """Loads the frozen networks whose work is not cached: now, not in the midst of the first step.
    """
    if not cache:
        space.network("autoencoder")
    if not has_tokens(cache):
        space.network("text")


def has_tokens(cache):
    """Whether a cache holds the captions' token features as well."""
    return cache is not None and bool(cache["text"]["name"])


def open_cache(run_dir, shards, config, clusters, space):
    """What is known of the cached latents of all these shards; None without them.

    What is cached was made in the cache's precision: `space` says so from now on.
    """
    if not (config.data.use_latents and config.autoencoder.name):
        return None

    cache = read_cache(run_dir, shards, config, clusters)
    if cache is None:
        return None

    # from here on the frozen networks work as they did for the cache
    for role in ("autoencoder", "text"):
        made = cache[role]
        if made["name"]:
            info = space.info[role]
            precision = made.get("precision", info.get("precision"))
            space.info[role] = info | {"precision": precision}
    return cache


def find_shard_tars(folders, config, cache):
    """-> the sorted tars of each folder. UserError if one has none."""
    tars = []
    missing = []
    for folder in folders:
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar")))
        tars.append(paths)
        if not paths:
            missing.append(folder)

    if missing:
        # one shard without them, and all are read as images
        hint = ""
        if not cache and config.autoencoder.name and config.data.use_latents:
            hint = "; latents are used where all shards have them"
        raise UserError(f"no tars in {', '.join(missing)}: copy them there, or make them with "
                        f"cluster.py{hint}")
    return tars


def check_shards(run_dir, shards, clusters, ranks, *, cached, verify):
    """UserError unless the tars of all shards are those of their manifests."""
    for k in shards:
        folder = os.path.join(run_dir, "shards", k)
        if verify and not os.path.isdir(folder):
            raise UserError(f"--verify compares {folder} with its manifest, but only its latents "
                            f"are here: leave it out")
        # of latents alone there is no shard here to compare
        if not cached or verify:
            check_shard(folder, clusters["fingerprint"], ranks, verify)


def announce_cache(config, space, folders, cache):
    """Says which of the frozen networks' work is done already."""
    if config.autoencoder.name and cache:
        print(f"latents cached in {', '.join(folders)}")
    elif config.autoencoder.name:
        print("latents not cached: images are encoded at each step (cache_latents.py caches them)")
    if space.text_dim and not has_tokens(cache):
        print("token features not cached: captions are encoded at each step "
              "(cache_latents.py --captions caches them)")


def _dataset(tars, config, space, cache, seed, labelled):
    """The TarDataset of some tars, of a run's images or of their cached latents."""
    text = config.text
    # how the decoding processes read a condition
    encode = to_tensor
    if config.data.condition == "text":
        # a pretrained encoder reads a batch of captions at once, in the training process
        encode = None
        if not space.text_dim:
            encode = functools.partial(hash_words, length=text.length, vocab=text.vocab)
    # (length, width) of KEY.tok
    tokens = (text.length, space.text_dim) if has_tokens(cache) else None

    return TarDataset(
        tars,
        config.data.size,
        config.data.condition,
        encode=encode,
        classes=config.data.classes,
        seed=seed,
        crop=config.data.crop,
        flip=config.data.flip,
        shuffle_block=config.data.shuffle_block,
        noise_shape=(space.channels, space.size, space.size),
        clusters=labelled,
        posterior=space.posterior,
        latent=cache["shapes"][0] if cache else None,
        tokens=tokens,
    )


def check_samples(data):
    """UserError unless each tar has as many samples as its manifest says."""
    # read once a folder
    manifests = {}
    for part in data:
        for tar, rows in zip(part.tars, part.index, strict=True):
            folder, name = os.path.split(tar)
            if folder not in manifests:
                manifests[folder] = read_manifest(folder)["tars"]
            meant = manifests[folder][name]["samples"]
            if len(rows) != meant:
                raise UserError(f"{tar} has {len(rows)} samples, its manifest says {meant}: it is "
                                f"damaged, copy it again")


# ---- batches -------------------------------------------------------------------------------------

def positions(first, last, batch, rank, world, micro):
    """The positions of a rank's micro-batches (lists of `micro` or fewer) in steps first..last-1:
    its share of each global batch.
    """
    # rank after rank, side by side: the batch is the same whatever their number
    share = batch // world
    for step in range(first, last):
        begin = step * batch + rank * share
        for i in range(begin, begin + share, micro):
            # the last one may have fewer
            yield list(range(i, min(i + micro, begin + share)))


class Reader(torch.utils.data.Dataset):
    """Reads whole batches of `data`. A mistake of the user's is handed over as a value: an
    exception would come out of the decoding process as text.
    """

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitems__(self, positions):
        try:
            return collate([self.data[position] for position in positions])
        except UserError as error:
            return error


def as_it_is(batch):
    """The loader's collate_fn: Reader has done it."""
    return batch


@dataclass
class Batch:
    """One micro-batch on the device. B images, S x S pixels; latents [C,h,w]."""

    position: int           # of its first sample in the stream
    x: torch.Tensor         # images [B,S,S,3] uint8, or x_0 [B,C,h,w] float
    c: object               # condition [B,...], a list of captions, or None
    k: torch.Tensor         # cluster [B], where samples say theirs
    u: torch.Tensor         # uniform numbers [B], for the time
    eps: torch.Tensor       # noise [B,C,h,w]
    drop: torch.Tensor      # uniform numbers [B]: drop the condition below the rate
    post: torch.Tensor      # noise [B,C,h,w] for the autoencoder's posterior
    last: bool              # of this step


def encode(space, batch):
    """-> (x_0 [B,C,h,w], c): images and captions that are not cached go through the frozen
    networks.
    """
    c = batch.c
    # captions, where no token features are cached
    if isinstance(c, list):
        c = space.captions(c)
    # images; cached latents come as floats
    if batch.x.dtype == torch.uint8:
        return space.x_0(batch.x, batch.post), c
    return batch.x, c


class Batches:
    """This rank's batches, step after step, decoded ahead by other processes.

    stop: a process.Stop: a wait for data is given up once a signal has come; `interrupted` then.
    """

    def __init__(self, data, config, engine, stop):
        self.data = data
        self.train = engine.train
        self.ranks = engine.ranks
        self.batch = engine.batch
        self.name = engine.name
        self.stop = stop

        # this rank's images a step, and those of a forward pass
        self.share = self.batch // self.ranks.world
        self.micro = min(self.train.micro_batch or self.share, self.share)

        self.workers = config.data.workers
        if self.workers < 0:
            # the training process wants a core of its own
            self.workers = max(1, min(8, cores() // local_world() - 1))

        # opened by the first step, which after a resume is not 0
        self.loader = None
        self.interrupted = False
        # of the step: seconds spent waiting, (tar, sample, cause) of those that cannot be used, and
        # (positions, t, loss) of each micro-batch, to say which were not finite
        self.waited = 0.0
        self.bad = []
        self.losses = []
        self.warned = 0

    def _open(self, step):
        """Starts the decoding processes, at `step`."""
        check_shared_memory(self.data, step * self.batch, self.micro, self.workers)
        # a fork shares the index; and when this process fails, nobody else stops decoding
        # processes that ignore signals
        can_fork = "fork" in multiprocessing.get_all_start_methods()
        atexit.register(kill_children)

        # to the last step of all: decoding runs ahead across steps
        mine = positions(step, self.train.steps, self.batch, self.ranks.rank, self.ranks.world,
                         self.micro)

        self.loader = iter(torch.utils.data.DataLoader(
            Reader(self.data),
            batch_sampler=mine,
            num_workers=self.workers,
            collate_fn=as_it_is,
            worker_init_fn=prepare_worker,
            multiprocessing_context="fork" if self.workers and can_fork else None,
            pin_memory=self.ranks.device.type == "cuda",
            prefetch_factor=AHEAD if self.workers else None,
        ))
        # torch's handler would raise wherever the main thread is when a decoding process dies; the
        # loader finds it out, too, when it waits for it
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def of_step(self, step):
        """Yields the micro-batches of a step, which must come one after the other."""
        if self.loader is None:
            self._open(step)

        self.waited = 0.0
        self.bad = []
        self.losses = []

        # the loader goes through the same positions, without saying where it is
        own = positions(step, step + 1, self.batch, self.ranks.rank, self.ranks.world, self.micro)
        own = list(own)
        for places in own:
            since = time.perf_counter()
            try:
                with self.stop.wait():
                    tensors = self._next()
            except self.stop.Interrupted:
                self.interrupted = True
                return
            self.waited += time.perf_counter() - since

            self._note_bad(tensors["bad"])
            yield self._to_device(tensors, places[0], last=places is own[-1])

    def _to_device(self, tensors, position, last):
        # from pinned memory the copies run beside the GPU's work
        moved = {}
        for name, value in tensors.items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(self.ranks.device, non_blocking=True)

        c = tensors["c"]
        if isinstance(c, torch.Tensor):
            # condition = none has no numbers
            c = moved["c"] if c.numel() else None
        return Batch(position=position, x=moved["x"], c=c, k=moved.get("k"), u=moved["u"],
                     eps=moved["eps"], drop=moved["drop"], post=moved.get("post"), last=last)

    def _next(self):
        """The loader's next batch. UserError of this rank alone where a decoding process has met
        one, or died.
        """
        try:
            batch = next(self.loader)
        except RuntimeError as error:
            # of a decoding process torch hands over no more than a text
            words = str(error)
            if "Too many open files" in words:
                raise UserError("too many open files, of which decoding processes need one a "
                                "tensor: ulimit -n 65536, or fewer --data.workers",
                                local=True) from None
            if "DataLoader worker" not in words:
                raise
            raise UserError(f"a decoding process has died ({words.splitlines()[0]}), for want of "
                            f"shared memory (/dev/shm), of memory or of open files (ulimit -n), "
                            f"or killed: fewer --data.workers (0: none), or more room",
                            local=True) from None

        if isinstance(batch, UserError):
            raise UserError(str(batch), local=True)
        return batch

    def _note_bad(self, bad):
        """Warns of samples that cannot be used, the first few."""
        for tar, sample, cause in bad:
            self.bad.append((tar, sample, cause))
            self.warned += 1
            if self.warned > WARNINGS:
                continue

            more = ""
            if self.warned == WARNINGS:
                more = f" (more are only listed in logs/{self.name}.skipped.csv)"
            print(f"warning: {tar}: {sample}: {cause}; another takes its place{more}",
                  file=sys.stderr)

    def note_losses(self, batch, t, loss):
        """Keeps the times and losses [B] of a micro-batch until the next step."""
        self.losses.append((batch.position, t.detach(), loss.detach()))

    def nonfinite(self):
        """The samples of the step whose loss is not finite, as this rank sees them, in words."""
        found = []
        for position, t, loss in self.losses:
            # waits for the device, as nothing else of a step does: something has gone wrong
            t = t.cpu()
            loss = loss.cpu()
            for i in range(len(loss)):
                if not loss[i].isfinite():
                    found.append(f"position {position + i} (t = {float(t[i]):.4f})")
        return found


def prepare_worker(_):
    """Decoding processes leave SIGTERM and Ctrl-C to their rank, which finishes its step and still
    needs them.

    A batch that cannot be sent, for want of shared memory, ends its process, and so the training:
    torch would drop it, and wait for it for ever.
    """
    def end_process(error, batch):
        print(f"a decoding process could not hand over a batch: {error}", file=sys.stderr,
              flush=True)
        os._exit(1)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end_process)


def check_shared_memory(data, position, micro, workers):
    """UserError unless the batches that this node's decoding processes hand over fit into /dev/shm.

    position: of a sample, which all are like.
    """
    if not workers or not os.path.isdir("/dev/shm"):
        return

    # each tensor is a file of its own there, in whole pages
    page = 4096
    batch = 0
    for value in collate([data[position]]).values():
        if isinstance(value, torch.Tensor):
            batch += -(-value.nbytes * micro // page) * page

    # those that are ready, and the one in use
    need = batch * (AHEAD * workers + 1) * local_world()
    free = shutil.disk_usage("/dev/shm").free

    if free < need:
        raise UserError(f"the shared memory /dev/shm has {free / 1e6:.3g} MB free, and {workers} "
                        f"decoding processes a rank put up to {need / 1e6:.3g} MB there: make it "
                        f"larger (docker run --shm-size 8g), or take fewer --data.workers "
                        f"(0: none)", local=os.environ.get("LOCAL_RANK", "0") == "0")


# ---- what a model's file says, and what a plan needs ---------------------------------------------

def describe(config, space, clusters):
    """What a model's file must say besides its shape, for it to be used together with others."""
    fingerprint = clusters["fingerprint"]
    return space.info | {"shift": config.flow.shift, "fingerprint": fingerprint}


@dataclass
class PlannedSpace:
    """The parts of a Space that a model's shape depends on."""

    size: int
    channels: int
    text_dim: int


def planned_space(args, config):
    """What model_config asks of a Space, for --plan: no network is loaded, and the hub is not asked
    where ddm/plan.py knows the name.
    """
    names = []
    if config.data.condition == "text" and config.text.name != encoders.NONE["text"]:
        names = config.text.name.split(" + ")

    known = plan.AUTOENCODERS.get(config.autoencoder.name)
    if args.plan and known and all(name in plan.TEXT_ENCODERS for name in names):
        factor, channels = known
        text_dim = sum(plan.TEXT_ENCODERS[name] for name in names)
        return PlannedSpace(config.data.size // factor, channels, text_dim)

    # with a config file there need not be a run
    networks = None if args.plan else read_clusters(args.run_dir)["networks"]
    return Space(config, None, networks)
