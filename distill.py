"""Stage 6: distils the ensemble into one dense student, which needs no router and is used like a monolith (section 3.6 of the paper).

    torchrun --nproc_per_node=8 distill.py --run-dir runs/laion
    python distill.py --run-dir runs/demo --init 3 --train.steps 500       # begins with the weights of expert 3 (or all: the monolith's)
    python sample.py --run-dir runs/demo --student --prompt "a red circle"

reads   RUN/config.toml, RUN/clusters.safetensors, RUN/experts/K.safetensors of all clusters, RUN/shards/K/*.tar or RUN/latents/K/*.tar; the
        pretrained networks whose work is not cached
writes  RUN/student.safetensors (averaged weights), RUN/checkpoints/student/, RUN/logs/student.csv, RUN/samples/student-STEP.png
--train.* and [train.student] apply; by default a quarter of the monolith's batch, as in the paper. The student predicts velocity on the
linear path, whatever its teachers do. Run again, it goes on from its newest checkpoint.

The teacher of a picture is the expert of its own cluster. A micro-batch is of one cluster, so that one teacher at a time is needed on the device;
clusters come in the data's proportions. As many teachers stay there as there is room for (--resident N: at most N); others are read again
when their turn comes.
"""
import math
import os

import numpy as np
import torch

import engine
import flow
import model as models
import training
from ddm import artifacts, encoders, plan
from ddm.config import model_config, load_run, parse
from ddm.ensemble import Ensemble
from ddm.errors import UserError, script
from ddm.process import broadcast, on_rank_0, start
from ddm.run import read_clusters


GOLDEN = (5 ** 0.5 - 1) / 2
BLOCK = 2 ** 16      # micro-batches whose clusters are worked out together


class ByCluster(torch.utils.data.Dataset):
    """The student's stream of samples: micro-batch m (positions m * micro, ...) is of one cluster.

    Which one, the golden ratio's sequence says, frac(m * GOLDEN) in the cumulative shares: over any stretch of the stream clusters have the
    data's shares to within a micro-batch or two, and the stream is the same on any number of ranks. Within a cluster every sample comes
    once an epoch, as in TarDataset. parts: the TarDataset of each cluster; micro: samples a micro-batch.
    """

    def __init__(self, parts, micro):
        self.parts, self.micro = parts, micro
        self.shares = np.cumsum([len(part) for part in parts]) / len(self)
        # of each block so far, how many micro-batches of each cluster come before it
        self.before = [np.zeros(len(parts), np.int64)]
        # the block that was asked for last: its number, and the clusters in it
        self.block = -1, None

    def __len__(self):
        return sum(map(len, self.parts))

    def _clusters(self, block):
        """[BLOCK] of a block of micro-batches."""
        m = np.arange(block * BLOCK, (block + 1) * BLOCK)
        return np.searchsorted(self.shares[:-1], m * GOLDEN % 1, side="right")

    def _open(self, block):
        """The clusters [BLOCK] of a block.

        A training has as many micro-batches as it likes: of all other blocks a row each is kept.
        """
        if self.block[0] != block:
            while len(self.before) <= block:
                counts = np.bincount(self._clusters(len(self.before) - 1), minlength=len(self.parts))
                self.before.append(self.before[-1] + counts)
            self.block = block, self._clusters(block)
        return self.block[1]

    def cluster(self, m):
        """The cluster of micro-batch m."""
        block, i = divmod(m, BLOCK)
        return int(self._open(block)[i])

    def turn(self, m):
        """How many micro-batches of its cluster come before micro-batch m."""
        block, i = divmod(m, BLOCK)
        clusters = self._open(block)
        return int(self.before[block][clusters[i]] + (clusters[:i] == clusters[i]).sum())

    def __getitem__(self, position):
        m, i = divmod(position, self.micro)
        k = self.cluster(m)
        return self.parts[k][self.turn(m) * self.micro + i] | {"k": k}


def initial_weights(run, shard, config):
    """-> (weights, info) of the expert (or "all") that the student begins with. UserError if it is another model than `config`, or not velocity."""
    path = os.path.join(run, "experts", f"{shard}.safetensors")
    if not os.path.exists(path):
        raise UserError(f"--init {shard}: there is no {path}; give the number of an expert that is there, or all for the monolith")
    try:
        network, info = artifacts.load(path)
    except ValueError as error:
        raise UserError(f"--init {shard}: {error}") from None
    if (info["objective"], info["path"]) != ("velocity", "linear"):
        raise UserError(f"--init {shard}: {path} predicts {info['objective']} on the {info['path']} path, the student velocity on the linear one")
    if network.config != config:
        there, here = ({k: v for k, v in vars(c).items() if v != vars(d)[k]} for c, d in ((network.config, config), (config, network.config)))
        raise UserError(f"--init {shard}: {path} is another model than the student is to be ({there} / {here}): see --model.*")
    return network.state_dict(), info


def keep_teachers(teachers, resident, config, train, ranks, share, frozen):
    """Sets how many teachers stay on the device: `resident`, 0 for all, -1 for as many as fit.

    A micro-batch is of one cluster, and so nearly each wants another teacher than the one before: one
    that is not there is read from disk. frozen: bytes of the frozen networks. -> bytes of the teachers.
    """
    shapes = [models.ModelConfig(**info["model"]) for info in teachers.infos.values()]
    sizes = [plan.parameter_count(shape) * teachers.dtype.itemsize for shape in shapes]
    if resident < 0 and ranks.device.type == "cuda":
        bf16 = encoders.resolve(train.precision, ranks.device) == "bf16"
        need = plan.Memory(config, bf16, beside=frozen)
        fit = need.teachers(train, ranks.world, share, sizes, plan.device_memory(ranks.device))
        resident = broadcast(fit)       # GPUs may differ by a few bytes
        if ranks.rank == 0 and resident < len(sizes):
            print(f"{resident} of {len(sizes)} teachers stay on each GPU, there is no room for more: the "
                  f"others are read when their turn comes", flush=True)
    teachers.resident = max(0, resident)
    return sum(sorted(sizes)[-(teachers.resident or len(sizes)):])


def main():
    parser = training.stage_parser(__doc__, ["train", "train.student", "data", "model", "autoencoder", "text"])
    parser.add_argument("--init", default="", metavar="K|all", help="begin with the weights of this expert, or the monolith's (default: from scratch)")
    parser.add_argument("--resident", type=int, default=-1, metavar="N",
                        help="teachers on the device at most (default: as many as fit by the estimate of "
                        "--plan, on a CPU all; 0: all)")
    args, given = parse(parser)
    config = load_run(args.run_dir, given, "student", args.plan)
    config.flow.objective, config.flow.path = "velocity", "linear"      # the student's, whatever its teachers'
    train = config.stage("student")
    K = config.cluster.experts
    train.batch = batch = train.batch or max(1, config.train.batch // 4)
    if args.plan is not None:       # teachers of the student's size: a forward of each image, and their weights
        shape = model_config(config, "model", training.plan_space(args, config))
        return plan.report("student", shape, train, batch, config, teachers=K, resident=args.resident)
    clusters = read_clusters(args.run_dir)
    if there := set(map(str, range(K))) - set(training.find_shards(args.run_dir)):
        raise UserError(f"the student needs all {K} shards, {args.run_dir} lacks {', '.join(sorted(there, key=int))}")

    with training.owned(args.run_dir, "student"):
        ranks = start(args.device, training.patience(train))
        share = batch // ranks.world
        train.micro_batch = micro = train.micro_batch or math.gcd(share, max(1, batch // K))
        if batch % ranks.world or share % micro:
            raise UserError(f"a batch of {batch} on {ranks.world} ranks is {batch / ranks.world:g} each, which must be a multiple of the micro-batch of one "
                            f"cluster, {micro}: change --train.batch or --train.micro_batch")
        parts, space = training.open_shards(args.run_dir, [str(k) for k in range(K)], config, train, ranks, clusters, apart=True, verify=args.verify)
        data = ByCluster(parts, micro)
        if config.autoencoder.name:
            on_rank_0(lambda: space.network("autoencoder"))     # what draws the pictures: missed now, not after hours
        student_config = model_config(config, "model", space)
        info = training.describe(config, space, clusters) | {"objective": "velocity", "path": "linear", "shard": "student", "init": args.init}
        teachers = Ensemble(args.run_dir, ranks.device, require_all=True)
        if len(teachers.paths) != K:
            raise UserError(f"the student needs all {K} experts as teachers, {args.run_dir}/experts has {', '.join(map(str, teachers.paths))}")
        teachers.check_fits("the student", {"model": vars(student_config), **info})
        initial, begun = initial_weights(args.run_dir, args.init, student_config) if args.init else (None, {"flops": 0})
        beside = space.weight_bytes() + keep_teachers(teachers, args.resident, student_config, train, ranks, share, space.weight_bytes())
        state = engine.State(args.run_dir, "student", student_config, train, ranks, config, space, batch, initial, beside, shard="student", init=args.init,
                             clustering=clusters["fingerprint"], images=len(data), micro_batch=micro,
                             teachers=" ".join(f"{k}:{about['step']}" for k, about in teachers.infos.items()))
        # beside its own training, of each image: the forward of its teacher
        state.image_flops += sum(len(part) * plan.flops(models.ModelConfig(**teachers.infos[k]["model"])) for k, part in enumerate(parts)) // len(data)
        info["init_flops"] = begun["flops"]

        path = os.path.join(args.run_dir, "student.safetensors")
        data.cluster(state.step * batch // micro)       # after a resume: counted once, before the decoding processes are forked
        for step in training.steps(state, data, space, config, shown="loss", profile=args.profile):
            first = (state.step * batch + ranks.rank * share) // micro      # this rank's first micro-batch of the step
            for m, b in enumerate(step.batches(), first):
                t = flow.sample_time(b.u, config.flow.t_density, config.flow.shift)
                c = models.drop_condition(state.model.config, b.c, b.drop < config.data.cond_dropout)
                teacher = lambda x_t, t, c: teachers.expert_velocity(data.cluster(m), x_t, t, c)
                loss = flow.distillation_loss(step.model, teacher, b.x_0, c, t, b.eps)        # [B], section 3.6
                step.backward(loss, t)
            step.update()
            if step.save:
                state.export(path, state.step * batch, **info)
            if step.sample:
                training.save_samples(state, config, data, space)
        if training.stale(path, state):        # the last export failed, or its file is gone
            state.export(path, state.step * batch, last=True, **info)


if __name__ == "__main__":
    script(main)
