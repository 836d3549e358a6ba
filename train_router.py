"""Stage 3: trains the router p(k | x_t, t, c) on a uniform subset of the data, each image with its
cluster's number.

    torchrun --nproc_per_node=8 train_router.py --run-dir runs/laion
    python train_router.py --run-dir runs/demo

    # trains nothing: fits temperatures of a trained router's logits to images that it never saw
    python train_router.py --run-dir runs/demo --calibrate 'data/val/*.tar'

--train.* and [train.router] apply. Run again, it resumes from its newest checkpoint.

reads   RUN/config.toml, RUN/clusters.safetensors, RUN/shards/router/*.tar or
        RUN/latents/router/*.tar; the pretrained networks whose work is not cached
writes  RUN/router.safetensors (EMA weights), RUN/checkpoints/router/, RUN/logs/router.csv (accuracy
        by noise level)

--calibrate reads config.toml, clusters.safetensors, router.safetensors and the tars, and writes
temperatures into the metadata of router.safetensors.
"""
import math
import os
import sys

import torch

import flow
from ddm import plan
from ddm.calibration import calibrate
from ddm.checkpoint import Checkpoints, check_finite, identity_of, training
from ddm.config import load_run, make_training_parser, model_config, parse
from ddm.engine import Engine, learning_rate
from ddm.errors import script
from ddm.loading import Batches, describe, encode, open_shards, planned_space
from ddm.log import Log
from ddm.process import Stop, start, watchdog
from ddm.run import collective_timeout, owned, read_clusters
from model import drop_condition


def parser():
    parser = make_training_parser(__doc__)
    parser.add_argument("--calibrate", nargs="+", default=[], metavar="GLOB",
                        help="train nothing: fit the trained router's temperatures to the images "
                        "of these tars, which nobody trained on")
    return parser


def main():
    args, given = parse(parser())
    config = load_run(args.run_dir, given, stage="router", path=args.plan)
    if args.calibrate:
        calibrate(args.run_dir, args.calibrate, config, args.device)
        return

    settings = config.stage("router")
    if args.plan is not None:
        shape = set_steps(settings, config, planned_space(args, config))
        plan.report("router", shape, settings, settings.batch, config)
        return

    with owned(args.run_dir, "router"):
        open_and_train(args, config, settings)


def set_steps(train, config, space):
    """-> the router's ModelConfig; train.steps = 0 becomes 4% of the experts' training FLOPs, the
    paper's share.
    """
    shape = model_config(config, "router", space, clusters=config.cluster.experts)
    if train.steps:
        return shape

    # of a forward pass: the backward pass costs both the same multiple
    expert_flops = plan.flops(model_config(config, "model", space))
    experts_flops = expert_flops * config.train.steps * config.train.batch
    train.steps = math.ceil(0.04 * experts_flops / (plan.flops(shape) * train.batch))
    # where experts take few steps, as on a laptop, 4% of them are next to nothing
    if train.steps < 1000 and os.environ.get("RANK", "0") == "0":
        print(f"warning: 4% of the experts' training FLOPs are {train.steps} steps of the router, "
              f"which may be too few to learn anything: --train.router.steps N gives it more",
              file=sys.stderr)
    return shape


def open_and_train(args, config, train):
    """Opens data, model, optimiser and checkpoints; trains; exports the EMA weights."""
    clusters = read_clusters(args.run_dir)
    ranks = start(args.device, collective_timeout(train))
    # labelled: each sample of shards/router says its cluster
    data, space = open_shards(args.run_dir, ["router"], config, train, ranks, clusters,
                              labelled=True, verify=args.verify)

    # only now: the share of the FLOPs depends on the latents' size
    shape = set_steps(train, config, space)
    # what a resume may not change; more steps, or another number of ranks, are no change
    identity = identity_of(config, train, shape, space, images=len(data),
                           clustering=clusters["fingerprint"])
    checkpoints = Checkpoints(args.run_dir, "router", train, ranks, identity)
    engine = Engine("router", shape, train, ranks, batch=train.batch, resumed=checkpoints.resumed,
                    beside=space.weight_bytes())

    # fused: it can skip a step on the device, where nobody waits for it
    optimizer = torch.optim.AdamW(engine.model.parameters(), train.lr,
                                  weight_decay=train.weight_decay, fused=True)
    log = Log(args.run_dir, engine, config, profile=args.profile)
    # last: it fills what has been made above
    checkpoints.resume(engine, optimizer, log)
    # from here on a signal ends the training after its step
    stop = Stop()
    batches = Batches(data, config, engine, stop)

    path = os.path.join(args.run_dir, "router.safetensors")
    info = describe(config, space, clusters)
    training_loop(engine, batches, config=config, space=space, optimizer=optimizer,
                  checkpoints=checkpoints, log=log, path=path, info=info)

    # the last export failed, or its file is gone
    if checkpoints.is_stale(path, engine):
        checkpoints.export(path, engine, last=True, **info)


def training_loop(engine, batches, *, config, space, optimizer, checkpoints, log, path, info):
    """The loop, to the last step or to a signal. EMA weights go to `path`, with `info`."""
    train = engine.train
    meter = log.meter
    saving = False

    with training(engine, optimizer, checkpoints, log, batches):
        while engine.step < train.steps:
            # a step that takes longer ends the process
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
                # uniform on [0,1], whatever the experts' density: the answer at t = 1 matters most
                t = b.u
                c = drop_condition(engine.config, c, b.drop < config.data.cond_dropout)

                # [B] each, algorithm 1
                loss, right = flow.router_loss(engine, x_0, b.k, c, t, b.eps)
                # the rank's mean, of which DDP and FSDP take the mean over ranks
                (loss.sum() / batches.share).backward()
                meter.add("loss", loss)
                meter.add_by_t("acc", right, t)
                batches.note_losses(b, t, loss)
            # a signal came while it waited for data: this step was not made
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
            # after a skipped step nothing is saved, the weights may be ruined: after the next one
            if saving and norm.isfinite():
                checkpoints.export(path, engine, **info)
                checkpoints.save(engine, optimizer, log)
                saving = False
            if stopping and not saving:
                break


if __name__ == "__main__":
    script(main)
