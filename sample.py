"""Stage 4: prompt -> image, the experts combined by the router.

    python sample.py --run-dir runs/demo --prompt "a red circle" --num-images 8 --out circles.png
    python sample.py --run-dir runs/cifar --class 3 --strategy once --cfg 2 --solver ab2 --steps 25
    # one model instead of the ensemble; or --student, distill.py's
    python sample.py --run-dir runs/demo --prompts prompts.txt --monolith --out monolith/
    # shared out over eight GPUs
    torchrun --nproc_per_node=8 sample.py --run-dir runs/laion --prompts prompts.txt

reads   RUN/router.safetensors, RUN/experts/*.safetensors (a missing expert is left out), or with
        --monolith RUN/experts/all.safetensors, with --student RUN/student.safetensors;
        RUN/config.toml if it is there ([sample]); the autoencoder and the text encoder that these
        were trained with
writes  --out X.png: one grid, prompts down the side; --out DIR (default RUN/samples): 0000.png,
        0001.png, ... and grid.png, in place of those that an earlier call wrote there;
        with --show-routing X.routing.png or DIR/routing.png, too

Image i of each prompt starts from the noise of seed + i, at any batch size and on any number of
ranks; every PNG says how it was made.
"""
import argparse
import os
import re
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import flow
from ddm.codec import Space
from ddm.config import Sample, check_sample, make_config, make_parser, parse, read_toml
from ddm.ensemble import DENSE, Ensemble, Velocity, beginnings, open_space
from ddm.errors import UserError, script
from ddm.files import read_text, try_file, try_folder
from ddm.pictures import COLUMNS, RoutingRow, Step, image_grid, made_here, routing_sheet, save_png
from ddm.process import gather, on_rank_0, progress, start, sum_over_ranks
from ddm.text import normalise_text

# images in a grid.png beside single files, at most
GRID = 1024
# images whose routing is drawn, at most
SHOWN = 32


@dataclass
class Prompts:
    """The conditions to sample from, P of them."""

    # as in labels [P]
    captions: list[str]
    # [P,...], None for a run without a condition
    c: Tensor | None = None
    # the negative prompt's [1,...]
    negative: Tensor | None = None


@dataclass
class Job:
    """One image to make."""

    # its place among all: the name of its file
    number: int
    # which of the prompts
    prompt: int
    seed: int
    # the one that makes it alone, where that is known beforehand
    expert: int | None = None


@dataclass
class Result:
    """What is kept of an image."""

    # [S,S,3] uint8, None where neither grid nor routing sheet shows it
    image: Any
    # of each expert, the mean weight over its path [K]
    shares: list[float]
    # forwards that it would have taken of a single expert
    alone: int
    routing: RoutingRow | None = None


@dataclass
class Output:
    """Where the images go: a folder of single files, or, where it is empty, one grid."""

    folder: str
    grid: str
    routing: str
    # single files of an earlier call that made room
    removed: int = 0


@dataclass
class Setup:
    """What all batches share."""

    args: argparse.Namespace
    settings: Sample
    team: Ensemble
    # of the solver [steps + 1], from 1 to 0
    times: Tensor
    space: Space
    prompts: Prompts


def parser():
    parser = make_parser(__doc__, "sample")
    group = parser.add_argument_group("what to sample")
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                       help="a prompt; may be given several times")
    group.add_argument("--prompts", default="", metavar="FILE",
                       help="a file of prompts, one a line")
    group.add_argument("--negative-prompt", default="", metavar="TEXT",
                       help="what guidance leads away from, in place of no prompt")
    group.add_argument("--class", dest="classes", type=int, action="append", default=[],
                       metavar="N", help="a class; several times, too")
    group.add_argument("--num-images", type=int, default=4, metavar="N",
                       help="images of each (default: 4)")
    group.add_argument("--seed", type=int, default=0, help="default: 0")
    group.add_argument("--out", default="", metavar="PNG|DIR", help="default: RUN/samples")
    group.add_argument("--batch", type=int, default=64, metavar="B",
                       help="images at once (default: 64)")

    only = group.add_mutually_exclusive_group()
    for name, dense in DENSE.items():
        only.add_argument(f"--{name}", dest="only", action="store_const", const=name, default="",
                          help=f"from {dense.path} instead of the ensemble")
    group.add_argument("--require-all", action="store_true",
                       help="a missing or unreadable expert is an error")
    group.add_argument("--show-routing", action="store_true",
                       help=f"an image of the router's answers and of x_0 over time "
                       f"({SHOWN} samples at most)")
    return parser


def main():
    args, given = parse(parser())
    config = read_config(args, given)

    # all that can be refused is refused before the first image
    ranks = start(args.device)
    setup = open_models(args, config, given, device=ranks.device)
    output = choose_output(args)
    on_rank_0(lambda: clear_output(output, args.show_routing))

    # each rank makes its part of the images
    since = time.monotonic()
    jobs = list_jobs(setup)
    mine = share_out(setup, jobs, ranks)
    results = gather_results(sample(setup, mine, output))

    seconds = max(gather(time.monotonic() - since))
    cost = total_cost(setup.team)
    if ranks.rank:
        return

    # rank 0 writes what shows them all
    write_grid(setup, output, results)
    if args.show_routing:
        write_routing(setup, output, results)
    report_images(setup, output, results)
    report_cost(cost, results, seconds)


# ---- what is asked for ---------------------------------------------------------------------------

def read_config(args, given):
    """The run's config with the flags over it. UserError for what cannot be."""
    # models alone are enough: without a config.toml the defaults hold
    path = os.path.join(args.run_dir, "config.toml")
    config = make_config(read_toml(path) if os.path.exists(path) else {}, given)
    check_sample(config.sample)
    if args.only:
        # of one model, whatever the ensemble's is
        config.sample.strategy = "full"

    if args.num_images < 1 or args.batch < 1:
        raise UserError(f"--num-images {args.num_images} and --batch {args.batch} "
                        f"must be at least 1")
    # the largest seed that torch takes, seed + i included
    if not 0 <= args.seed < 2 ** 63 - args.num_images:
        raise UserError(f"--seed {args.seed} must be from 0 to 2^63")
    extension = os.path.splitext(args.out)[1].lower()
    if extension in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise UserError(f"--out {args.out}: give a name that ends in .png, or a folder")
    return config


def open_models(args, config, given, device):
    """Opens the ensemble and what surrounds it, and encodes the prompts -> Setup. UserError."""
    settings = config.sample
    team = Ensemble(args.run_dir, device, only=args.only, resident=settings.resident,
                    precision=settings.precision, compile=settings.compile,
                    require_all=args.require_all)
    team.check(settings)
    # what it means on this device, for the images' text chunks
    settings.precision = team.precision
    times = flow.time_grid(settings.steps, team.shift(settings))

    space = open_space(team, config, given, device)
    prompts = read_conditions(args, team.config, space)
    if prompts.c is None:
        # nothing to be guided to
        settings.cfg = 1.0

    # it may be larger than an expert
    space.forget("text")
    # the wrong one is refused now, not after the work
    space.network("autoencoder")
    return Setup(args, settings, team, times=times, space=space, prompts=prompts)


def read_conditions(args, model, space):
    """-> Prompts from --prompt, --prompts and --class, as the ModelConfig wants them. UserError."""
    texts = read_prompts(args)
    check_condition(args, model, texts)
    if model.condition == "none":
        return Prompts([""])
    if model.condition == "class":
        return Prompts([f"class {k}" for k in args.classes], torch.tensor(args.classes))

    # the negative prompt is encoded with the others, as their last
    captions = [normalise_text(text) for text in texts]
    if args.negative_prompt:
        texts = [*texts, args.negative_prompt]
    c = space.captions(texts)
    warn_of_wordless(texts, c)
    negative = c[len(captions):] if args.negative_prompt else None
    return Prompts(captions, c[:len(captions)], negative)


def read_prompts(args):
    """The prompts of --prompt and of the lines of --prompts that are not blank."""
    for text in args.prompt:
        check_text("--prompt", text)
    check_text("--negative-prompt", args.negative_prompt)

    if not args.prompts:
        return args.prompt
    lines = [line for line in read_text(args.prompts).split("\n") if normalise_text(line)]
    if not lines:
        raise UserError(f"--prompts {args.prompts} holds no prompt: write one a line")
    return args.prompt + lines


def check_text(flag, text):
    """UserError for the bytes of another encoding, which Python keeps as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{flag} {text!r} is not UTF-8: type it again, or give it in a file, "
                        f"--prompts FILE") from None


def check_condition(args, model, texts):
    """UserError unless what is given is what a model of this condition takes."""
    kind = model.condition

    # what the model has no input for would be ignored in silence
    takes = {"text": "--prompt or --prompts", "class": "--class",
             "none": "neither --prompt nor --class"}[kind]
    if texts and kind != "text" or args.classes and kind != "class":
        raise UserError(f"this run has condition = {kind}: it takes {takes}")
    if args.negative_prompt and kind != "text":
        raise UserError(f"this run has condition = {kind}: it takes no --negative-prompt")

    if kind == "text" and not texts:
        raise UserError("nothing to sample: this run wants --prompt TEXT")
    if kind == "class" and not args.classes:
        raise UserError("nothing to sample: this run wants --class N")
    check_classes(args.classes, model)


def check_classes(classes, model):
    """UserError unless the model knows all these classes."""
    for k in classes:
        if not 0 <= k < model.classes:
            raise UserError(f"--class {k} is not one of 0..{model.classes - 1}")


def warn_of_wordless(texts, c):
    """Names the prompts that are not empty, but in which the text encoder found nothing.

    In silence they would be as good as none.
    """
    wordless = [text for text, row in zip(texts, c, strict=True) if text and not row.any()]
    if wordless and os.environ.get("RANK", "0") == "0":
        print(f"warning: {len(wordless)} of {len(texts)} prompts hold no word, {wordless[0]!r} "
              f"the first: as if there were none", file=sys.stderr)


# ---- the places of output ------------------------------------------------------------------------

def choose_output(args):
    """-> Output of --out."""
    if args.out.lower().endswith(".png"):
        return Output(folder="", grid=args.out, routing=f"{args.out[:-4]}.routing.png")
    folder = args.out or os.path.join(args.run_dir, "samples")
    return Output(folder, os.path.join(folder, "grid.png"), os.path.join(folder, "routing.png"))


def clear_output(output, show_routing):
    """Tries the places of output and removes what an earlier call left there.

    UserError where they cannot be written, or where a folder holds images that would pass for ours.
    """
    if not output.folder:
        try_file(output.grid)
        # a sheet of other images must not stay beside the grid
        if show_routing:
            try_file(output.routing)
        elif made_here(output.routing):
            os.remove(output.routing)
        return

    folder = output.folder
    try_folder(folder)
    # what has a name of ours makes room, if it is ours
    ours = re.compile(r"([0-9]{4,}|grid|routing)\.png")
    earlier = sorted(name for name in os.listdir(folder) if ours.fullmatch(name))
    foreign = [name for name in earlier if not made_here(os.path.join(folder, name))]
    if foreign:
        raise UserError(f"--out {folder} holds {foreign[0]}, which sample.py has not made "
                        f"({len(foreign)} such in all), and ours would stand between: "
                        f"give another folder")
    for name in earlier:
        os.remove(os.path.join(folder, name))
        output.removed += name[0].isdigit()


# ---- sampling ------------------------------------------------------------------------------------

def list_jobs(setup):
    """The Jobs of all prompts, in order: image i of each prompt has the seed --seed + i."""
    jobs = []
    for prompt in range(len(setup.prompts.captions)):
        for i in range(setup.args.num_images):
            jobs.append(Job(len(jobs), prompt, seed=setup.args.seed + i))
    return jobs


def share_out(setup, jobs, ranks):
    """The jobs of this rank; with strategy `once` sorted by expert, so that a rank needs few of
    them, one after the other.
    """
    mine = jobs[ranks.rank::ranks.world]
    if setup.settings.strategy != "once" or len(setup.team.paths) == 1:
        return mine

    # which expert makes which image is known beforehand: the router decides at t = 1
    # (all batches first: they end where the expert changes, and here it is set)
    for batch in list(batches(mine, setup.args.batch)):
        noise, velocity = begin(setup, batch)
        t = torch.ones(len(batch), device=noise.device)
        weights = velocity.choose_experts(velocity.conditional, noise, t)         # [B,K]
        for job, k in zip(batch, weights.argmax(1).tolist(), strict=True):
            job.expert = k

    # every rank learns of all, and takes its piece of one and the same order
    for part in gather({job.number: job.expert for job in mine}):
        for number, k in part.items():
            jobs[number].expert = k
    by_expert = sorted(jobs, key=lambda job: (job.expert, job.number))
    first = len(jobs) * ranks.rank // ranks.world
    end = len(jobs) * (ranks.rank + 1) // ranks.world
    return by_expert[first:end]


def batches(jobs, size):
    """Jobs in lists of at most `size`; where each has its expert, a list has but one."""
    batch = []
    for job in jobs:
        if batch and (len(batch) == size or batch[-1].expert != job.expert):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def begin(setup, batch):
    """-> (noise [B,C,S,S], Velocity) of a batch of jobs, on the device."""
    team = setup.team
    settings = setup.settings
    shape = (team.config.channels, team.config.size, team.config.size)
    calls = flow.evaluations(settings.steps, settings.solver)
    noise, u = beginnings([job.seed for job in batch], shape, calls, team.K)

    # condition, what guidance leads away from, and who makes it: each may be None
    c = setup.prompts.c
    if c is not None:
        c = c[[job.prompt for job in batch]].to(team.device)
    c_null = setup.prompts.negative
    if c_null is not None:
        c_null = c_null.to(team.device).expand_as(c)
    labels = None
    if batch[0].expert is not None:
        labels = torch.tensor([job.expert for job in batch], device=team.device)

    velocity = team.velocity(settings, c, c_null=c_null, u=u.to(team.device), labels=labels)
    return noise.to(team.device), velocity


def sample(setup, jobs, output):
    """Makes the images of the jobs, and writes those that have files of their own.

    -> {the job's number: Result}.
    """
    results = {}
    bar = progress(desc="sampling", total=len(jobs) * setup.settings.steps, unit="image-steps")
    for batch in batches(jobs, setup.args.batch):
        noise, velocity = begin(setup, batch)                         # [B,C,S,S]
        trace = Trace(velocity, batch) if setup.args.show_routing else None

        # eqs. 7-8 at each step: Velocity.__call__ in ddm/ensemble.py
        for x in flow.integrate(trace or velocity, noise, setup.times, setup.settings.solver):
            bar.update(len(x))

        images = setup.space.images(x).cpu().numpy()                # [B,H,W,3]
        shares = (velocity.used / velocity.calls).tolist()            # [B,K]
        for job, image, share in zip(batch, images, shares, strict=True):
            if output.folder:
                path = os.path.join(output.folder, f"{job.number:04d}.png")
                caption = setup.prompts.captions[job.prompt]
                save_png(path, Image.fromarray(image), describe(setup, caption, job.seed, share))

            # of very many images only as many are held as a grid shows
            shown = not output.folder or job.number < GRID
            results[job.number] = Result(image if shown else None, share, velocity.alone)

        if trace:
            for job, row in trace.rows(setup, images):
                results[job.number].routing = row
    bar.close()
    return results


def gather_results(mine):
    """{number: Result} of each rank -> the Results of all, in the order of the jobs."""
    everyone = {}
    for part in gather(mine):
        everyone |= part
    return [everyone[number] for number in sorted(everyone)]


# ---- what the router said ------------------------------------------------------------------------

class Trace:
    """A velocity that takes notes, for --show-routing, of the first SHOWN images."""

    def __init__(self, velocity: Velocity, batch):
        self.velocity = velocity
        # the jobs to take notes of, n of them, and their places in the batch
        self.jobs = [job for job in batch if job.number < SHOWN]
        self.places = [i for i, job in enumerate(batch) if job.number < SHOWN]
        # what the sheet shows of each
        self.paths = [[] for _ in self.jobs]
        # (t, x_0 [n,C,S,S] as predicted there) of each call
        self.predictions = []

    def __call__(self, x_t, time):
        v = self.velocity(x_t, time)
        if self.jobs:
            # v = eps - x_0, so x_t - t v = x_0
            x_0 = x_t - time * v
            self.predictions.append((time, x_0[self.places]))

            weights = self.velocity.weights[self.places]              # [n,K]
            p = weights
            if self.velocity.team.routed:
                p = self._ask_router(x_t[self.places], time)
            p = p.tolist()
            weights = weights.tolist()
            for n, path in enumerate(self.paths):
                path.append(Step(time, p[n], weights[n]))
        return v

    def _ask_router(self, x_t, time):
        """Its answer p [n,K] at every step, also where the strategy does not ask."""
        team = self.velocity.team
        c = self.velocity.conditional.c
        if c is not None:
            c = c[self.places]
        t = torch.full((len(x_t),), time, device=x_t.device)
        settings = self.velocity.settings
        p = team.route(x_t, t, c, settings.router_temperature, settings.router_calibration)

        # asked for the sheet alone, so it is no part of the cost
        team.forwards["router"] -= len(x_t)
        return p

    def rows(self, setup, images):
        """Yields (Job, RoutingRow); images [B,H,W,3]: the whole batch's."""
        if not self.jobs:
            return

        # evenly over the path, both ends among them
        last = len(self.predictions) - 1
        columns = []
        for i in range(COLUMNS):
            t, x_0 = self.predictions[round(i * last / (COLUMNS - 1))]
            columns.append((t, setup.space.images(x_0).cpu().numpy()))

        for n, job in enumerate(self.jobs):
            title = f"seed {job.seed}  {setup.prompts.captions[job.prompt]}".strip()
            row = RoutingRow(title, self.paths[n], [(t, images_t[n]) for t, images_t in columns])
            row.images.append((0, images[self.places[n]]))
            yield job, row


# ---- what is written -----------------------------------------------------------------------------

def describe(setup, prompt, seed, share=None):
    """{name: value} of a PNG's text chunks: how it was made; share [K]: of each expert in it."""
    args = setup.args
    settings = setup.settings
    values = {
        "prompt": prompt,
        "seed": seed,
        "strategy": args.only or settings.strategy,
        "guidance": settings.cfg,
        "steps": settings.steps,
        "solver": settings.solver,
    }
    if args.negative_prompt:
        values["negative prompt"] = normalise_text(args.negative_prompt)
    if share and not args.only:
        parts = [f"{k}:{s:.2f}" for k, s in enumerate(share) if s >= 0.005]
        values["experts"] = " ".join(parts)

    # what else makes another image: not what stands above, nor what changes the speed alone
    left_out = ("strategy", "cfg", "steps", "solver", "resident", "compile")
    defaults = Sample()
    for key, value in dict(settings).items():
        if key not in left_out and value != getattr(defaults, key):
            values[key] = value
    return values


def save_sheet(setup, path, sheet):
    """Writes a PIL image that shows all prompts."""
    save_png(path, sheet, describe(setup, " | ".join(setup.prompts.captions), setup.args.seed))


def write_grid(setup, output, results):
    """Writes the grid: a row for each prompt, each image framed in its main expert's colour."""
    shown = [result for result in results if result.image is not None]
    # without a condition the images of a row have nothing in common
    captions = None
    columns = 8
    if setup.prompts.c is not None:
        captions = setup.prompts.captions
        columns = setup.args.num_images

    images = []
    frames = []
    for first in range(0, len(shown), columns):
        row = shown[first:first + columns]
        images.append([result.image for result in row])
        frames.append([result.shares.index(max(result.shares)) for result in row])
    if captions:
        # the grid may end before the prompts
        captions = captions[:len(images)]
    if setup.args.only:
        # one model made all
        frames = None
    save_sheet(setup, output.grid, image_grid(images, captions, frames))


def write_routing(setup, output, results):
    """Writes the routing sheet."""
    rows = [result.routing for result in results if result.routing]
    save_sheet(setup, output.routing, routing_sheet(rows, setup.team.K))
    first = "the first " if len(rows) < len(results) else ""
    print(f"routing and predictions of {first}{len(rows)} in {output.routing}")


# ---- what is said --------------------------------------------------------------------------------

def report_images(setup, output, results):
    """Says where the images are and who made them."""
    plural = "s" if len(results) > 1 else ""
    text = f"{len(results)} image{plural} in {output.folder or output.grid}"
    if output.folder and len(results) > GRID:
        text += f" (the first {GRID} in its grid.png)"
    if output.removed:
        text += f", in place of {output.removed} of an earlier call"

    if not setup.args.only:
        each = []
        for k in range(setup.team.K):
            mean = sum(result.shares[k] for result in results) / len(results)
            each.append(f"{k}: {mean:.0%}")
        text += "; experts used (mean weight): " + ", ".join(each)
    print(text)


@dataclass
class Cost:
    """What all ranks ran."""

    flops: float
    expert_flops: float
    # samples through any expert, and through the router
    expert_forwards: float
    router_forwards: float


def total_cost(team):
    """-> Cost, the same on all ranks."""
    router_forwards = team.forwards["router"]
    router_flops = router_forwards * team.cost.get("router", 0)
    flops = team.flops()
    mine = [flops, flops - router_flops, team.forwards.total() - router_forwards, router_forwards]
    return Cost(*sum_over_ranks(torch.tensor(mine, dtype=torch.float64)).tolist())


def report_cost(cost, results, seconds):
    """Says what an image took, beside what it would have taken of a single expert."""
    n = len(results)
    # the mean expert's, of those that were used
    alone = sum(result.alone for result in results)
    single_flops = alone * cost.expert_flops / cost.expert_forwards
    print(f"forwards per sample: {cost.expert_forwards / n:.1f} of experts, "
          f"{cost.router_forwards / n:.1f} of the router; "
          f"{cost.flops / n / 1e9:.4g} GFLOPs per image, "
          f"{cost.flops / single_flops:.3f} times a single expert's; "
          f"{n / seconds:.3g} images/s, with the time to load the experts")


if __name__ == "__main__":
    script(main)
