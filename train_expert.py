"""Stage 2: trains the expert of one cluster, on that cluster's shards alone.

    torchrun --nproc_per_node=8 train_expert.py --run-dir runs/laion --shard 3   # a node, 8 GPUs
    python train_expert.py --run-dir runs/demo --shard 3                         # a GPU, or a CPU
    python train_expert.py --run-dir runs/demo --shard all                       # the monolith
    python train_expert.py --run-dir runs/demo --shard 3 --plan                  # trains nothing

    # with train.seed_steps = N: first the model that experts and monolith begin with
    python train_expert.py --run-dir runs/demo --shard seed
    # or begin with the weights of any model file of the same shape
    python train_expert.py --run-dir runs/demo --shard 3 --init other.safetensors

No node needs to know of another. Run again, it resumes from its newest checkpoint.

reads   RUN/config.toml, RUN/clusters.safetensors, RUN/shards/K/*.tar, or RUN/latents/K/*.tar if
        cache_latents.py has made them (for all: every cluster's; for seed: the router's); with
        train.seed_steps RUN/experts/seed.safetensors; the pretrained networks that the config
        names: the autoencoder, if only to write RUN/samples, and the text encoder unless its work
        is cached
writes  RUN/experts/K.safetensors (EMA weights; of the seed also the raw ones),
        RUN/checkpoints/expert-K/, RUN/logs/expert-K.csv, RUN/samples/expert-K-STEP.png; with
        --profile RUN/logs/expert-K.trace.json
"""
import os

import torch

import flow
from ddm import plan
from ddm.checkpoint import Checkpoints, check_finite, identity_of, training
from ddm.config import check_seed, load_run, make_training_parser, model_config, parse
from ddm.engine import Engine, learning_rate
from ddm.errors import UserError, script
from ddm.initial import RANDOM, check_exists, read_initial, read_seed
from ddm.loading import Batches, describe, encode, open_shards, planned_space
from ddm.log import Log, save_samples
from ddm.process import Stop, on_rank_0, start, watchdog
from ddm.run import collective_timeout, find_shards, owned, read_clusters
from model import drop_condition


def parser():
    parser = make_training_parser(__doc__)
    parser.add_argument("--shard", required=True, metavar="K",
                        help="the cluster to train on: 0, 1, ...; all: the monolith; seed: what "
                        "they begin with")
    parser.add_argument("--init", default="", metavar="FILE",
                        help="begin with the weights of this model file (default: random ones, or "
                        "those of the run's seed)")
    return parser


def main():
    args, given = parse(parser())
    config = load_run(args.run_dir, given, path=args.plan)
    check_seed(config.train)
    settings = settings_of(config, args.shard)
    batch = expert_batch(config, args.shard)
    first_step = begin_at(args, config)
    name = f"expert-{args.shard}"
    if args.plan is not None:
        shape = model_config(config, "model", planned_space(args, config))
        plan.report(name, shape, settings, batch, config, first_step=first_step,
                    raw=args.shard == "seed")
        return

    # before the lock: a wrong number is an error of this call, not of the training
    shards = choose_shards(args, config)
    with owned(args.run_dir, name):
        open_and_train(args, config, settings, name=name, shards=shards, batch=batch)


def settings_of(config, shard):
    """[train] as this shard trains: the seed its own steps, at a constant learning rate."""
    train = config.train
    if shard != "seed":
        return train
    if not train.seed_steps:
        raise UserError("--shard seed: train.seed_steps is 0, so experts begin with random "
                        "weights: give it --train.seed_steps N, and the experts, too")
    # others go on from its weights, so these are not rounded
    return train.model_copy(update={"steps": train.seed_steps, "decay": 0, "export": "fp32"})


def expert_batch(config, shard):
    """Images a step: the monolith's batch, divided evenly among the experts (equal compute)."""
    experts = config.cluster.experts
    if config.train.batch % experts:
        raise UserError(f"train.batch = {config.train.batch} is the whole ensemble's and must be "
                        f"a multiple of its {experts} experts")
    return config.train.batch if shard in ("all", "seed") else config.train.batch // experts


def begin_at(args, config):
    """The step of the schedule at which training begins: the seed has made those before."""
    seed_steps = 0 if args.shard == "seed" else config.train.seed_steps
    if seed_steps and args.init:
        raise UserError(f"--init {args.init}: with train.seed_steps = {seed_steps} experts begin "
                        f"with the run's seed: give --init to --shard seed, or leave it out, or "
                        f"give --train.seed_steps 0")
    check_exists(args.init)
    return seed_steps


def choose_shards(args, config):
    """The shards to train on: one, or for the monolith all. UserError if they are not here."""
    # the router's uniform subset, so that no node needs all of the data
    if args.shard == "seed":
        check_router_shard(args.run_dir)
        return ["router"]
    existing = find_shards(args.run_dir)
    here = f"{args.run_dir}/shards"
    if args.shard == "all":
        if len(existing) < config.cluster.experts:
            raise UserError(f"the monolith needs all {config.cluster.experts} shards, {here} has "
                            f"{', '.join(existing) or 'none'}")
        return existing
    if args.shard not in existing:
        raise UserError(f"no shard {args.shard!r} in {here}: there are "
                        f"{', '.join(existing) or 'none'}, and all for the monolith")
    return [args.shard]


def check_router_shard(run_dir):
    """UserError where the router's images are not."""
    folders = [os.path.join(run_dir, part, "router") for part in ("shards", "latents")]
    if not any(map(os.path.isdir, folders)):
        raise UserError(f"the seed trains on the router's images, and there is no {folders[0]}: "
                        f"train it on the node that has them, or copy them here")


def choose_initial(args, config, shape, space):
    """What the weights begin with -> Initial."""
    of_run = (shape, space, config.flow.objective, config.flow.path)
    if args.init:
        return read_initial(args.init, *of_run)
    if args.shard != "seed" and config.train.seed_steps:
        return read_seed(args.run_dir, config.train.seed_steps, *of_run)
    return RANDOM


def open_and_train(args, config, train, *, name, shards, batch):
    """Opens data, model, optimiser and checkpoints; trains; exports the EMA weights."""
    clusters = read_clusters(args.run_dir)
    ranks = start(args.device, collective_timeout(train))
    data, space = open_shards(args.run_dir, shards, config, train, ranks, clusters,
                              verify=args.verify)
    if config.autoencoder.name:
        # what decodes the samples, also of cached latents: missed now, not after hours
        on_rank_0(lambda: space.network("autoencoder"))

    shape = model_config(config, "model", space)
    initial = choose_initial(args, config, shape, space)
    # what a resume may not change; more steps, or another number of ranks, are no change
    identity = identity_of(config, train, shape, space, shard=args.shard, images=len(data),
                           clustering=clusters["fingerprint"], init=initial.sha256[:12],
                           first_step=initial.step)
    checkpoints = Checkpoints(args.run_dir, name, train, ranks, identity,
                              raw=args.shard == "seed")
    engine = Engine(name, shape, train, ranks, batch=batch, initial=initial,
                    resumed=checkpoints.resumed, beside=space.weight_bytes())

    # fused: it can skip a step on the device, where nobody waits for it
    optimizer = torch.optim.AdamW(engine.model.parameters(), train.lr,
                                  weight_decay=train.weight_decay, fused=True)
    log = Log(args.run_dir, engine, config, profile=args.profile)
    # last: it fills what has been made above
    checkpoints.resume(engine, optimizer, log)
    # from here on a signal ends the training after its step
    stop = Stop()
    batches = Batches(data, config, engine, stop)

    path = os.path.join(args.run_dir, "experts", f"{args.shard}.safetensors")
    info = describe(config, space, clusters)
    # how a sampler gets a velocity from its answers
    info |= {"objective": config.flow.objective, "path": config.flow.path, "shard": args.shard}
    info |= initial.about()
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
            lr = learning_rate(train, engine.step, engine.first_step)
            for group in optimizer.param_groups:
                group["lr"] = lr

            for b in batches.of_step(engine.step):
                # the last micro-batch sums the gradients over the ranks
                engine.sum_gradients(b.last)
                # [B,C,h,w]; [B,...] or None
                x_0, c = encode(space, b)
                t = flow.sample_time(b.u, config.flow.t_density, config.flow.shift)
                c = drop_condition(engine.config, c, b.drop < config.data.cond_dropout)

                loss = flow.expert_loss(engine, x_0, c, t, b.eps,
                                        config.flow.objective, config.flow.path)    # [B], eq. 6
                # the rank's mean, of which DDP and FSDP take the mean over ranks
                (loss.sum() / batches.share).backward()
                meter.add("loss", loss)
                meter.add_by_t("loss", loss, t)
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
