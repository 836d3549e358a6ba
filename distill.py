"""Stage 6: distils the ensemble into one dense student (section 3.6 of the paper), which needs no
router and is used like a monolith.

    torchrun --nproc_per_node=8 distill.py --run-dir runs/laion
    python distill.py --run-dir runs/demo --init 3     # begins with expert 3 (or all: the monolith)
    python sample.py --run-dir runs/demo --student --prompt "a red circle"

--train.* and [train.student] apply; by default a quarter of the monolith's batch, as in the paper.
The student predicts velocity on the linear path, whatever its teachers do. Run again, it resumes
from its newest checkpoint.

The teacher of an image is the expert of its own cluster. A micro-batch is of one cluster, so that
one teacher at a time is needed on the device; clusters come in the data's proportions. As many
teachers stay there as there is room for (--resident N: at most N); others are read again when their
turn comes.

reads   RUN/config.toml, RUN/clusters.safetensors, RUN/experts/K.safetensors of all clusters,
        RUN/shards/K/*.tar or RUN/latents/K/*.tar; the pretrained networks whose work is not cached
writes  RUN/student.safetensors (EMA weights), RUN/checkpoints/student/, RUN/logs/student.csv,
        RUN/samples/student-STEP.png
"""
import functools
import math
import os

import numpy as np
import torch

import flow
from ddm import plan
from ddm.checkpoint import Checkpoints, check_finite, identity_of, training
from ddm.config import load_run, make_training_parser, model_config, parse
from ddm.encoders import resolve
from ddm.engine import Engine, learning_rate
from ddm.ensemble import Ensemble
from ddm.errors import UserError, script
from ddm.initial import RANDOM, read_initial
from ddm.loading import Batches, describe, encode, open_shards, planned_space
from ddm.log import Log, save_samples
from ddm.process import Stop, broadcast, on_rank_0, start, watchdog
from ddm.run import collective_timeout, find_shards, owned, read_clusters
from model import ModelConfig, drop_condition

# multiples of it, modulo 1, fill [0,1) evenly, however many there are
GOLDEN = (5 ** 0.5 - 1) / 2
# micro-batches whose clusters are worked out together
BLOCK = 2 ** 16


class ByCluster(torch.utils.data.Dataset):
    """The student's stream of samples: micro-batch m (positions m * micro, ...) is of one cluster.

    Which one, the golden ratio's sequence says, frac(m * GOLDEN) in the cumulative shares: over any
    stretch of the stream clusters have the data's shares to within a micro-batch or two, and the
    stream is the same on any number of ranks. Within a cluster every sample comes once an epoch, as
    in TarDataset. parts: the TarDataset of each cluster; micro: samples a micro-batch.
    """

    def __init__(self, parts, micro):
        self.parts = parts
        self.micro = micro
        # [K]: where each cluster's part of [0,1] ends
        self.shares = np.cumsum([len(part) for part in parts]) / len(self)
        # of each block so far, how many micro-batches of each cluster come before it
        self.before = [np.zeros(len(parts), np.int64)]
        # the block that was asked for last, and the clusters in it
        self.block = -1
        self.clusters = None

    def __len__(self):
        return sum(map(len, self.parts))

    def _clusters_of(self, block):
        """[BLOCK] of a block of micro-batches."""
        m = np.arange(block * BLOCK, (block + 1) * BLOCK)
        # without the last end, which rounding may leave below 1
        return np.searchsorted(self.shares[:-1], m * GOLDEN % 1, side="right")

    def _open(self, block):
        """The clusters [BLOCK] of a block.

        A training has as many micro-batches as it likes: of all other blocks a row each is kept.
        """
        if self.block != block:
            while len(self.before) <= block:
                last = self._clusters_of(len(self.before) - 1)
                counts = np.bincount(last, minlength=len(self.parts))
                self.before.append(self.before[-1] + counts)
            self.block = block
            self.clusters = self._clusters_of(block)
        return self.clusters

    def cluster(self, m):
        """The cluster of micro-batch m."""
        block, i = divmod(m, BLOCK)
        return int(self._open(block)[i])

    def turn(self, m):
        """How many micro-batches of its cluster come before micro-batch m."""
        block, i = divmod(m, BLOCK)
        clusters = self._open(block)

        # before it in the block, and in all blocks before that
        in_block = (clusters[:i] == clusters[i]).sum()
        return int(self.before[block][clusters[i]] + in_block)

    def __getitem__(self, position):
        m, i = divmod(position, self.micro)
        k = self.cluster(m)
        # its place in the cluster's own stream, in which no sample is left out
        return self.parts[k][self.turn(m) * self.micro + i] | {"k": k}


def parser():
    parser = make_training_parser(__doc__)
    parser.add_argument("--init", default="", metavar="K|all|seed",
                        help="begin with the weights of this expert of the run, the monolith or "
                        "the seed (default: from scratch)")
    parser.add_argument("--resident", type=int, default=-1, metavar="N",
                        help="teachers on the device at most (default: as many as fit by the "
                        "estimate of --plan, on a CPU all; 0: all)")
    return parser


def main():
    args, given = parse(parser())
    config = load_run(args.run_dir, given, stage="student", path=args.plan)
    # refused rather than ignored
    for name in ("flow.objective", "flow.path"):
        if name in given:
            raise UserError(f"--{name}: the student predicts velocity on the linear path, "
                            f"whatever its teachers do: leave it out")

    config.flow.objective = "velocity"
    config.flow.path = "linear"

    train = config.stage("student")
    train.batch = train.batch or max(1, config.train.batch // 4)
    experts = config.cluster.experts

    if args.plan is not None:
        # teachers of the student's size: a forward of each image, and their weights
        shape = model_config(config, "model", planned_space(args, config))
        plan.report("student", shape, train, train.batch, config, teachers=experts,
                    resident=args.resident)
        return

    # a teacher is asked about images of its own cluster alone
    missing = set(map(str, range(experts))) - set(find_shards(args.run_dir))
    if missing:
        raise UserError(f"the student needs all {experts} shards, {args.run_dir} lacks "
                        f"{', '.join(sorted(missing, key=int))}")
    if args.init and not os.path.exists(expert_path(args)):
        raise UserError(f"--init {args.init}: there is no {expert_path(args)}; give the number of "
                        f"an expert that is there, all for the monolith, or seed")
    with owned(args.run_dir, "student"):
        open_and_train(args, config, train)


def expert_path(args):
    """The file that --init means."""
    return os.path.join(args.run_dir, "experts", f"{args.init}.safetensors")


# ---- teachers and the first weights --------------------------------------------------------------

def set_micro_batch(train, experts, ranks):
    """Sets train.micro_batch, of one cluster each. UserError if a rank's share is no multiple."""
    share = train.batch // ranks.world
    if not train.micro_batch:
        # the largest that divides a rank's share as well as an expert's batch
        train.micro_batch = math.gcd(share, max(1, train.batch // experts))

    if train.batch % ranks.world or share % train.micro_batch:
        raise UserError(f"a batch of {train.batch} on {ranks.world} ranks is "
                        f"{train.batch / ranks.world:g} each, which must be a multiple of the "
                        f"micro-batch of one cluster, {train.micro_batch}: change --train.batch "
                        f"or --train.micro_batch")


def open_teachers(args, config, shape, info, ranks):
    """The run's experts. UserError if one is missing, or does not fit the student."""
    experts = config.cluster.experts
    teachers = Ensemble(args.run_dir, ranks.device, require_all=True)
    if len(teachers.paths) != experts:
        raise UserError(f"the student needs all {experts} experts as teachers, "
                        f"{args.run_dir}/experts has {', '.join(map(str, teachers.paths))}")
    # the same latents, text encoder and clustering, or its velocities mean something else
    teachers.check_fits("the student", {"model": vars(shape), **info})
    return teachers


def keep_teachers(teachers, resident, shape, train, ranks, frozen):
    """Sets how many teachers stay on the device: `resident`, 0 for all, -1 for as many as fit.

    A micro-batch is of one cluster, and so nearly each wants another teacher than the one before:
    one that is not there is read from disk. frozen: bytes of the frozen networks. -> bytes of the
    teachers.
    """
    # bytes of each, in the dtype that it works in
    sizes = []
    for info in teachers.infos.values():
        weights = plan.parameter_count(ModelConfig(**info["model"]))
        sizes.append(weights * teachers.dtype.itemsize)

    if resident < 0 and ranks.device.type == "cuda":
        bf16 = resolve(train.precision, ranks.device) == "bf16"
        need = plan.Memory(shape, bf16, beside=frozen)
        share = train.batch // ranks.world
        fit = need.teachers(train, ranks.world, share, sizes, plan.device_memory(ranks.device))
        # GPUs may differ by a few bytes
        resident = broadcast(fit)
        if ranks.rank == 0 and resident < len(sizes):
            print(f"{resident} of {len(sizes)} teachers stay on each GPU, there is no room for "
                  f"more: the others are read when their turn comes", flush=True)
    teachers.resident = max(0, resident)

    # of a few, the largest ones may be there at once
    return sum(sorted(sizes)[-(teachers.resident or len(sizes)):])


def teacher_flops(teachers, parts):
    """FLOPs of the teacher's forward of an image, the mean over the data."""
    # clusters come in the data's proportions
    total = 0
    for k, part in enumerate(parts):
        total += len(part) * plan.flops(ModelConfig(**teachers.infos[k]["model"]))
    return total // sum(map(len, parts))


# ---- training ------------------------------------------------------------------------------------

def open_and_train(args, config, train):
    """Opens data, teachers, model, optimiser and checkpoints; trains; exports the EMA weights."""
    clusters = read_clusters(args.run_dir)
    ranks = start(args.device, collective_timeout(train))
    # first: the order of the samples depends on it
    set_micro_batch(train, config.cluster.experts, ranks)
    shards = [str(k) for k in range(config.cluster.experts)]
    parts, space = open_shards(args.run_dir, shards, config, train, ranks, clusters, apart=True,
                               verify=args.verify)
    data = ByCluster(parts, train.micro_batch)
    if config.autoencoder.name:
        # what decodes the samples: missed now, not after hours
        on_rank_0(lambda: space.network("autoencoder"))

    shape = model_config(config, "model", space)
    info = describe(config, space, clusters)
    info |= {"objective": "velocity", "path": "linear", "shard": "student"}
    teachers = open_teachers(args, config, shape, info, ranks)

    # weights that it may begin with
    initial = RANDOM
    if args.init:
        initial = read_initial(expert_path(args), shape, space, "velocity", "linear")
        initial.shard = args.init
    info |= initial.about()
    frozen = space.weight_bytes()
    beside = frozen + keep_teachers(teachers, args.resident, shape, train, ranks, frozen)

    # with teachers that have trained further it would be another training
    trained = [f"{k}:{about['step']}" for k, about in teachers.infos.items()]
    identity = identity_of(config, train, shape, space, shard="student", init=initial.sha256,
                           clustering=clusters["fingerprint"], images=len(data),
                           micro_batch=train.micro_batch, teachers=" ".join(trained))
    checkpoints = Checkpoints(args.run_dir, "student", train, ranks, identity)
    engine = Engine("student", shape, train, ranks, batch=train.batch, initial=initial,
                    resumed=checkpoints.resumed, beside=beside)
    # beside its own training, of each image: the forward of its teacher
    engine.image_flops += teacher_flops(teachers, parts)
    optimizer = torch.optim.AdamW(engine.model.parameters(), train.lr,
                                  weight_decay=train.weight_decay, fused=True)
    log = Log(args.run_dir, engine, config, profile=args.profile)
    checkpoints.resume(engine, optimizer, log)
    # after a resume: counted once, before the decoding processes are forked
    data.cluster(engine.step * engine.batch // data.micro)
    # from here on a signal ends the training after its step
    stop = Stop()
    batches = Batches(data, config, engine, stop)

    path = os.path.join(args.run_dir, "student.safetensors")
    training_loop(engine, batches, config=config, space=space, teachers=teachers,
                  optimizer=optimizer, checkpoints=checkpoints, log=log, path=path, info=info)

    # the last export failed, or its file is gone
    if checkpoints.is_stale(path, engine):
        checkpoints.export(path, engine, last=True, **info)


def training_loop(engine, batches, *, config, space, teachers, optimizer, checkpoints, log, path,
                  info):
    """The loop, to the last step or to a signal. EMA weights go to `path`, with `info`."""
    train = engine.train
    meter = log.meter
    saving = False

    with training(engine, optimizer, checkpoints, log, batches):
        while engine.step < train.steps:
            watchdog(train.timeout)
            # all ranks learn of a signal before the step, so that all do the same
            stopping = batches.stop.requested()
            lr = learning_rate(train, engine.step)
            for group in optimizer.param_groups:
                group["lr"] = lr

            for b in batches.of_step(engine.step):
                # the last micro-batch sums the gradients over the ranks
                engine.sum_gradients(b.last)
                # [B,C,h,w]; [B,...] or None
                x_0, c = encode(space, b)
                t = flow.sample_time(b.u, config.flow.t_density, config.flow.shift)
                c = drop_condition(engine.config, c, b.drop < config.data.cond_dropout)

                k = batches.data.cluster(b.position // batches.data.micro)
                teacher = functools.partial(teachers.expert_velocity, k)
                # [B], section 3.6
                loss = flow.distillation_loss(engine, teacher, x_0, c, t, b.eps)
                # the rank's mean, of which DDP and FSDP take the mean over ranks
                (loss.sum() / batches.share).backward()
                meter.add("loss", loss)
                meter.add_by_t("loss", loss, t)
                batches.note_losses(b, t, loss)
            if batches.interrupted:
                break

            norm = engine.clip_gradients(train.grad_clip)
            # all ranks skip the step unless the norm is finite
            engine.optimizer_step(norm, optimizer)
            engine.update_ema(train.ema_decay)
            log.step(norm, lr, batches)

            # once asked for, it stays due until a step is good
            saving |= stopping or engine.is_due(train.save_every)
            check_finite(engine, checkpoints, log, batches, saving)
            if engine.is_due(train.log_every):
                log.row(checkpoints)
            if engine.is_due(train.sample_every):
                save_samples(engine, config, batches.data, space, folder=log.samples)
            # after a skipped step nothing is saved, the weights may be ruined: after the next one
            if saving and norm.isfinite():
                checkpoints.export(path, engine, **info)
                checkpoints.save(engine, optimizer, log)
                saving = False
            if stopping and not saving:
                break


if __name__ == "__main__":
    script(main)
