"""Stage 3: trains the router p(k | x_t, t, c) on a uniform subset of the data, each picture with its cluster's number.

    torchrun --nproc_per_node=8 train_router.py --run-dir runs/laion
    python train_router.py --run-dir runs/demo

reads   RUN/config.toml, RUN/clusters.safetensors, RUN/shards/router/*.tar or RUN/latents/router/*.tar; the pretrained networks whose work is not cached
writes  RUN/router.safetensors (averaged weights), RUN/checkpoints/router/, RUN/logs/router.csv (accuracy by noise level)
--train.* and [train.router] apply. Run again, it goes on from its newest checkpoint.
"""
import math
import os
import sys

import engine
import flow
import training
from ddm import plan
from ddm.config import model_config, load_run, parse
from ddm.errors import script
from ddm.plan import flops
from ddm.process import start
from ddm.run import read_clusters
from model import drop_condition



def set_steps(train, config, space):
    """-> the router's ModelConfig; train.steps = 0 becomes 4% of the experts' training FLOPs, the paper's share."""
    router_config = model_config(config, "router", space, clusters=config.cluster.experts)
    if not train.steps:
        expert, router = (flops(c) for c in (model_config(config, "model", space), router_config))
        train.steps = math.ceil(0.04 * expert * config.train.steps * config.train.batch / (router * train.batch))
        if train.steps < 1000 and os.environ.get("RANK", "0") == "0":
            print(f"warning: 4% of the experts' training FLOPs are {train.steps} steps of the router, which may be too few to learn anything: "
                  f"--train.router.steps N gives it more", file=sys.stderr)
    return router_config


def main():
    parser = training.stage_parser(__doc__, ["train", "train.router", "data", "router", "autoencoder", "text"])
    args, given = parse(parser)
    config = load_run(args.run_dir, given, "router", args.plan)
    train = config.stage("router")
    if args.plan is not None:
        return plan.report("router", set_steps(train, config, training.plan_space(args, config)), train, train.batch, config)
    clusters = read_clusters(args.run_dir)

    with training.owned(args.run_dir, "router"):
        ranks = start(args.device, training.patience(train))
        data, space = training.open_shards(args.run_dir, ["router"], config, train, ranks, clusters, labelled=True, verify=args.verify)
        state = engine.State(args.run_dir, "router", set_steps(train, config, space), train, ranks, config, space, train.batch,
                             beside=space.weight_bytes(), clustering=clusters["fingerprint"], images=len(data))
        info = training.describe(config, space, clusters)

        path = os.path.join(args.run_dir, "router.safetensors")
        for step in training.steps(state, data, space, config, shown="acc", profile=args.profile):
            for b in step.batches():
                # uniform on [0,1], whatever the experts' density: the answer at t = 1 matters most
                c = drop_condition(state.model.config, b.c, b.drop < config.data.cond_dropout)
                loss, right = flow.router_loss(step.model, b.x_0, b.k, c, b.u, b.eps)        # [B], algorithm 1
                step.backward(loss, b.u, right)
            step.update()
            if step.save:
                state.export(path, state.step * train.batch, **info)
        if training.stale(path, state):        # the last export failed, or its file is gone
            state.export(path, state.step * train.batch, last=True, **info)


if __name__ == "__main__":
    script(main)
