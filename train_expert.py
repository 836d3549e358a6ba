"""Stage 2: trains the expert of one cluster, on that cluster's shards alone; no node needs to know of another.

    torchrun --nproc_per_node=8 train_expert.py --run-dir runs/laion --shard 3     # one node, eight GPUs
    python train_expert.py --run-dir runs/demo --shard 3                           # one GPU, or a CPU
    python train_expert.py --run-dir runs/demo --shard all                         # the monolith, to compare with
    python train_expert.py --run-dir runs/demo --shard 3 --plan                    # trains nothing: what will it need?

reads   RUN/config.toml, RUN/clusters.safetensors, RUN/shards/K/*.tar, or RUN/latents/K/*.tar if cache_latents.py made them (for all:
        every cluster's); the pretrained networks that the config names: the autoencoder, if only to draw RUN/samples, and the text encoder
        unless its work is cached
writes  RUN/experts/K.safetensors (averaged weights), RUN/checkpoints/expert-K/, RUN/logs/expert-K.csv,
        RUN/samples/expert-K-STEP.png; with --profile RUN/logs/expert-K.trace.json
Run again, it goes on from its newest checkpoint.
"""
import os

import engine
import flow
import training
from ddm import plan
from ddm.config import model_config, load_run, parse
from ddm.errors import UserError, script
from ddm.process import on_rank_0, start
from ddm.run import read_clusters
from model import drop_condition



def main():
    parser = training.stage_parser(__doc__, ["train", "data", "model", "flow", "autoencoder", "text"])
    parser.add_argument("--shard", required=True, metavar="K", help="the cluster to train on: 0, 1, ..., or all for the monolith")
    args, given = parse(parser)
    config = load_run(args.run_dir, given, path=args.plan)
    train = config.train
    K = config.cluster.experts
    if train.batch % K:
        raise UserError(f"train.batch = {train.batch} is the whole ensemble's and must be a multiple of its {K} experts")
    batch = train.batch if args.shard == "all" else train.batch // K      # equal compute: the monolith's batch, divided evenly
    name = f"expert-{args.shard}"
    if args.plan is not None:
        return plan.report(name, model_config(config, "model", training.plan_space(args, config)), train, batch, config)

    clusters = read_clusters(args.run_dir)
    there = training.find_shards(args.run_dir)
    if args.shard != "all" and args.shard not in there:
        raise UserError(f"no shard {args.shard!r} in {args.run_dir}/shards: there are {', '.join(there) or 'none'}, and all for the monolith")
    if args.shard == "all" and len(there) < K:
        raise UserError(f"the monolith needs all {K} shards, {args.run_dir}/shards has {', '.join(there) or 'none'}")

    with training.owned(args.run_dir, name):
        ranks = start(args.device, training.patience(train))
        data, space = training.open_shards(args.run_dir, there if args.shard == "all" else [args.shard], config, train, ranks, clusters, verify=args.verify)
        if space.config.autoencoder.name:
            on_rank_0(lambda: space.network("autoencoder"))     # what draws the pictures, also of cached latents: missed now, not after hours
        state = engine.State(args.run_dir, name, model_config(config, "model", space), train, ranks, config, space, batch,
                             beside=space.weight_bytes(), shard=args.shard, clustering=clusters["fingerprint"], images=len(data))
        info = training.describe(config, space, clusters) | {"objective": config.flow.objective, "path": config.flow.path, "shard": args.shard}

        path = os.path.join(args.run_dir, "experts", f"{args.shard}.safetensors")
        for step in training.steps(state, data, space, config, shown="loss", profile=args.profile):
            for b in step.batches():
                t = flow.sample_time(b.u, config.flow.t_density, config.flow.shift)
                c = drop_condition(state.model.config, b.c, b.drop < config.data.cond_dropout)
                loss = flow.expert_loss(step.model, b.x_0, c, t, b.eps, config.flow.objective, config.flow.path)      # [B], eq. 6
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
