"""Stage 3: trains the router p(k | x_t, t, c) on a uniform subset of the data, each picture with its cluster's number.

    torchrun --nproc_per_node=8 -- train_router.py --run runs/laion
    python train_router.py --run runs/demo

reads   RUN/config.toml, RUN/clusters.safetensors, RUN/shards/router/*.tar
writes  RUN/router.safetensors (averaged weights), RUN/checkpoints/router/, RUN/logs/router.csv (accuracy by noise level)
--train.* and [train.router] apply. Run again, it goes on from its newest checkpoint.
"""
import math
import os

import torch

import flow
import training
from common import load_run, make_parser, parse, script, start
from data import to_float
from model import build, drop_condition


def main():
    parser = make_parser(__doc__, ["train", "train.router", "data", "router", "text"])
    args, given = parse(parser)
    # --train.* is this stage's: it goes over [train.router]
    given = {f"train.router.{n.rpartition('.')[2]}" if n.startswith("train.") else n: v for n, v in given.items()}
    config = load_run(args.run, given)
    train = training.stage_config(config, "router")
    K = config.cluster.experts
    fingerprint = training.read_fingerprint(args.run)
    router_config = training.model_config(config, "router", clusters=K)
    if not train.steps:     # 4% of the experts' training FLOPs
        with torch.device("meta"):
            expert, router = (build(c).flops() for c in (training.model_config(config, "model"), router_config))
        train.steps = math.ceil(0.04 * expert * config.train.steps * config.train.batch / (router * train.batch))

    ranks = start(args.device)
    data = training.open_shards([os.path.join(args.run, "shards", "router")], config, train, ranks, clusters=True)
    state = training.State(args.run, "router", router_config, train, ranks, config, clustering=fingerprint, images=len(data))
    info = training.describe(config, fingerprint)

    path = os.path.join(args.run, "router.safetensors")
    for step in training.steps(state, data, config, train.batch, shown="acc"):
        for b in step.batches():
            # uniform on [0,1], whatever the experts' density: the answer at t = 1 matters most
            c = drop_condition(state.model.config, b.c, b.drop < config.data.drop)
            loss, right = flow.router_loss(step.model, to_float(b.x), b.k, c, b.u, b.eps)        # [B], algorithm 1
            step.backward(loss, b.u, right)
        step.update()
        if step.save:
            state.export(path, state.step * train.batch, **info)
    if not os.path.exists(path):        # finished before, and its file gone
        state.export(path, state.step * train.batch, **info)


if __name__ == "__main__":
    script(main)
