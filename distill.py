"""Stage 6: distils the ensemble into one dense student, which needs no router and is used like a monolith (section 3.6 of the paper).

    torchrun --nproc_per_node=8 -- distill.py --run runs/laion
    python distill.py --run runs/demo --init 3 --train.steps 500       # begins with the weights of expert 3 (or all: the monolith's)
    python sample.py --run runs/demo --student --prompt "a red circle"

reads   RUN/config.toml, RUN/clusters.safetensors, RUN/experts/K.safetensors of all clusters, RUN/shards/K/*.tar or RUN/latents/K/*.tar; the
        pretrained networks whose work is not cached
writes  RUN/student.safetensors (averaged weights), RUN/checkpoints/student/, RUN/logs/student.csv, RUN/samples/student-STEP.png
--train.* and [train.student] apply; by default a quarter of the monolith's batch, as in the paper. The student predicts velocity on the
linear path, whatever its teachers do. Run again, it goes on from its newest checkpoint.

The teacher of a picture is the expert of its own cluster. A micro-batch is of one cluster, so that one teacher at a time is on the device;
clusters come in the data's proportions. Where there is room, --resident N keeps more teachers there, which saves reading them again.
"""
import math
import os

import numpy as np
import torch

import engine
import flow
import model as models
import plan
import training
from common import UserError, load_run, on_rank_0, parse, read_clusters, script, start
from ensemble import Ensemble

GOLDEN = (5 ** 0.5 - 1) / 2


class ByCluster(torch.utils.data.Dataset):
    """The student's stream of samples: micro-batch m (positions m * micro, ...) is of one cluster.

    Which one, the golden ratio's sequence says, frac(m * GOLDEN) in the cumulative shares: over any stretch of the stream clusters have the
    data's shares to within a micro-batch or two, and the stream is the same on any number of ranks. Within a cluster every sample comes
    once an epoch, as in TarDataset. parts: the TarDataset of each cluster; count: micro-batches of the whole training.
    """

    def __init__(self, parts, micro, count):
        self.parts, self.micro = parts, micro
        count += -(-16 // micro)        # the conditions of the pictures that are drawn while training may be beyond the last step
        shares = np.cumsum([len(part) for part in parts]) / len(self)
        self.cluster = np.searchsorted(shares[:-1], np.arange(count) * GOLDEN % 1, side="right")       # [count]
        self.turn = np.zeros(count, np.int64)       # how many micro-batches of the same cluster came before
        for k in range(len(parts)):
            of_k = self.cluster == k
            self.turn[of_k] = np.arange(of_k.sum())

    def __len__(self):
        return sum(map(len, self.parts))

    def __getitem__(self, position):
        m, i = divmod(position, self.micro)
        k = int(self.cluster[m])
        return self.parts[k][int(self.turn[m]) * self.micro + i] | {"k": k}


def initial_weights(run, shard, config):
    """-> (weights, info) of the expert (or "all") that the student begins with. UserError if it is another model than `config`, or not velocity."""
    path = os.path.join(run, "experts", f"{shard}.safetensors")
    if not os.path.exists(path):
        raise UserError(f"--init {shard}: there is no {path}; give the number of an expert that is there, or all for the monolith")
    try:
        network, info = models.load(path)
    except ValueError as error:
        raise UserError(f"--init {shard}: {error}") from None
    if (info["objective"], info["path"]) != ("velocity", "linear"):
        raise UserError(f"--init {shard}: {path} predicts {info['objective']} on the {info['path']} path, the student velocity on the linear one")
    if network.config != config:
        there, here = ({k: v for k, v in vars(c).items() if v != vars(d)[k]} for c, d in ((network.config, config), (config, network.config)))
        raise UserError(f"--init {shard}: {path} is another model than the student is to be ({there} / {here}): see --model.*")
    return network.state_dict(), info


def main():
    parser = training.stage_parser(__doc__, ["train", "train.student", "data", "model", "autoencoder", "text"])
    parser.add_argument("--init", default="", metavar="K|all", help="begin with the weights of this expert, or the monolith's (default: from scratch)")
    parser.add_argument("--resident", type=int, default=1, metavar="N", help="teachers on the device at most (default: 1; 0: all)")
    args, given = parse(parser)
    config = load_run(args.run, given, "student", args.plan)
    config.flow.objective, config.flow.path = "velocity", "linear"      # the student's, whatever its teachers'
    train = training.stage_config(config, "student")
    K = config.cluster.experts
    train.batch = batch = train.batch or max(1, config.train.batch // 4)
    if args.plan is not None:       # teachers of the student's size: a forward of each image, and their weights
        shape = training.model_config(config, "model", training.plan_space(args, config))
        return plan.report("student", shape, train, batch, config.plan, teachers=args.resident or K)
    clusters = read_clusters(args.run)
    if there := set(map(str, range(K))) - set(training.find_shards(args.run)):
        raise UserError(f"the student needs all {K} shards, {args.run} lacks {', '.join(sorted(there, key=int))}")

    with training.owned(args.run, "student"):
        ranks = start(args.device, training.patience(train))
        share = batch // ranks.world
        train.micro_batch = micro = train.micro_batch or math.gcd(share, max(1, batch // K))
        if batch % ranks.world or share % micro:
            raise UserError(f"a batch of {batch} on {ranks.world} ranks is {batch / ranks.world:g} each, which must be a multiple of the micro-batch of one "
                            f"cluster, {micro}: change --train.batch or --train.micro_batch")
        parts, space = training.open_shards(args.run, [str(k) for k in range(K)], config, train, ranks, clusters, apart=True, verify=args.verify)
        data = ByCluster(parts, micro, train.steps * batch // micro)
        if config.autoencoder.name:
            on_rank_0(lambda: space.network("autoencoder"))     # what draws the pictures: missed now, not after hours
        student_config = training.model_config(config, "model", space)
        info = training.describe(config, space, clusters) | {"objective": "velocity", "path": "linear", "shard": "student", "init": args.init}
        teachers = Ensemble(args.run, ranks.device, resident=args.resident, require_all=True)
        if len(teachers.paths) != K:
            raise UserError(f"the student needs all {K} experts as teachers, {args.run}/experts has {', '.join(map(str, teachers.paths))}")
        teachers.check_fits("the student", {"model": vars(student_config), **info})
        initial, begun = initial_weights(args.run, args.init, student_config) if args.init else (None, {"flops": 0})
        sizes = sorted(models.parameters(models.ModelConfig(**about["model"])) for about in teachers.infos.values())
        beside = sum(sizes[-(args.resident or K):]) * teachers.dtype.itemsize
        state = engine.State(args.run, "student", student_config, train, ranks, config, space, batch, initial, beside, shard="student", init=args.init,
                             clustering=clusters["fingerprint"], images=len(data), micro_batch=micro,
                             teachers=" ".join(f"{k}:{about['step']}" for k, about in teachers.infos.items()))
        # beside its own training, of each image: the forward of its teacher
        state.image_flops += sum(len(part) * models.flops(models.ModelConfig(**teachers.infos[k]["model"])) for k, part in enumerate(parts)) // len(data)
        info["init_flops"] = begun["flops"]

        path = os.path.join(args.run, "student.safetensors")
        for step in training.steps(state, data, space, config, shown="loss", profile=args.profile):
            first = (state.step * batch + ranks.rank * share) // micro      # this rank's first micro-batch of the step
            for m, b in enumerate(step.batches(), first):
                t = flow.sample_time(b.u, config.flow.time, config.flow.shift)
                c = models.drop_condition(state.model.config, b.c, b.drop < config.data.drop)
                teacher = lambda x_t, t, c: teachers.expert_velocity(int(data.cluster[m]), x_t, t, c)
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
