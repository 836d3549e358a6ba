"""Stage 4: prompt -> image, the experts combined by the router.

    python sample.py --run-dir runs/demo --prompt "a red circle" --prompt "a white cross" --num-images 8 --out shapes.png
    python sample.py --run-dir runs/cifar --class 3 --strategy once --cfg 2 --solver ab2 --steps 25
    python sample.py --run-dir runs/demo --prompts prompts.txt --monolith --out monolith/                # or --student, distill.py's
    torchrun --nproc_per_node=8 sample.py --run-dir runs/laion --prompts prompts.txt --num-images 4        # shared out over eight GPUs

reads   RUN/router.safetensors, RUN/experts/*.safetensors (a missing expert is left out), or with --monolith RUN/experts/all.safetensors, with
        --student RUN/student.safetensors; RUN/config.toml if it is there ([sample]); the autoencoder and the text encoder that these were trained with
writes  --out X.png: one grid, prompts down the side; --out DIR (default RUN/samples): 0000.png, 0001.png, ... and grid.png, in place of
        those that an earlier call wrote there; with --show-routing X.routing.png or DIR/routing.png, too
Sample i of each prompt starts from the noise of seed + i, at any batch size and on any number of ranks; every PNG says how it was made.
"""
import os
import re
import sys
import time

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngImageFile, PngInfo

import flow
from ddm.config import Sample, check_sample, check_strategy, make_config, make_parser, parse, read_toml
from ddm.ensemble import DENSE, Ensemble, beginnings, open_space
from ddm.errors import UserError, script
from ddm.files import atomic, read_text, try_file, try_folder
from ddm.pictures import COLOURS, cut_label, label_font, picture_grid
from ddm.process import gather, on_rank_0, progress, start, sum_over_ranks
from ddm.text import normalise_text


GRID = 1024         # pictures in a grid.png beside single files, at most
SHOWN = 32          # images whose routing is drawn, at most
COLUMNS = 8         # x_0 predictions of each
SOFTWARE = "nanoDDM"        # what our PNGs say of their origin


def read_prompts(args):
    """The prompts of --prompt and of the lines of --prompts that are not blank."""
    for flag, texts in (("--prompt", args.prompt), ("--negative-prompt", [args.negative_prompt])):
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"{flag} {text!r} is not UTF-8: type it again, or give it in a file, "
                                f"--prompts FILE") from None
    if not args.prompts:
        return args.prompt
    lines = [line for line in read_text(args.prompts).split("\n") if normalise_text(line)]
    if not lines:
        raise UserError(f"--prompts {args.prompts} holds no prompt: write one a line")
    return args.prompt + lines


def read_conditions(args, model, space):
    """-> (captions for the grid [P], conditions [P,...] or None, the negative prompt's [1,...] or None) from --prompt, --prompts and --class."""
    prompts, classes = read_prompts(args), args.classes
    given = {"text": prompts, "class": classes}.get(model.condition, [])
    if (prompts and model.condition != "text") or (classes and model.condition != "class"):
        wanted = {"text": "--prompt or --prompts", "class": "--class", "none": "neither --prompt nor --class"}[model.condition]
        raise UserError(f"this run has condition = {model.condition}: it takes {wanted}")
    if args.negative_prompt and model.condition != "text":
        raise UserError(f"this run has condition = {model.condition}: it takes no --negative-prompt")
    if model.condition == "none":
        return [""], None, None
    if not given:
        raise UserError(f"nothing to draw: this run wants {'--prompt TEXT' if model.condition == 'text' else '--class N'}")
    if model.condition == "text":
        negative = [args.negative_prompt] if args.negative_prompt else []
        conditions = space.captions(prompts + negative)
        warn_of_wordless(prompts + negative, conditions)
        captions = [normalise_text(prompt) for prompt in prompts]
        return captions, conditions[:len(prompts)], conditions[len(prompts):] if negative else None
    if wrong := [k for k in classes if not 0 <= k < model.classes]:
        raise UserError(f"--class {wrong[0]} is not one of 0..{model.classes - 1}")
    return [f"class {k}" for k in classes], torch.tensor(classes), None


def warn_of_wordless(prompts, conditions):
    """Names the prompts that are not empty, but in which the text encoder found nothing: in silence they would be none."""
    wordless = [prompt for prompt, c in zip(prompts, conditions) if prompt and not c.any()]
    if wordless and os.environ.get("RANK", "0") == "0":
        print(f"warning: {len(wordless)} of {len(prompts)} prompts hold no word, {wordless[0]!r} the first: "
              f"as if there were none", file=sys.stderr)


def clear_output(out, files, grid, routing, show_routing):
    """Tries the places of output and removes what an earlier call left there -> number of single images removed.

    UserError where they cannot be written, or where a folder holds images that would pass for ours.
    """
    if not files:
        try_file(grid)
        if show_routing:
            try_file(routing)
        elif made_here(routing):
            os.remove(routing)
        return 0
    try_folder(out)
    ours = re.compile(r"([0-9]{4,}|grid|routing)\.png")
    earlier = sorted(name for name in os.listdir(out) if ours.fullmatch(name))
    if foreign := [name for name in earlier if not made_here(os.path.join(out, name))]:
        raise UserError(f"--out {out} holds {foreign[0]}, which sample.py has not made ({len(foreign)} such in all), "
                        f"and ours would stand between: give another folder")
    for name in earlier:
        os.remove(os.path.join(out, name))
    return sum(name[0].isdigit() for name in earlier)


def made_here(path):
    """Whether a file is a PNG that says that it comes from here."""
    if not os.path.isfile(path):
        return False
    try:
        with PngImageFile(path) as image:       # Image.open would refuse a large grid
            return image.info.get("software") == SOFTWARE
    except Exception:       # whatever Pillow makes of a file that is no PNG
        return False


def batches(jobs, size, expert=None):
    """Numbers of jobs in batches of at most `size`; given the expert of each job, a batch has but one."""
    batch = []
    for job in jobs:
        if batch and (len(batch) == size or expert and expert[batch[-1]] != expert[job]):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def routing_picture(rows, K):
    """A picture for teaching. For each image (title, [(t, p [K], weights [K])] along its path, [(t, picture)]): the pictures, x_0 as
    predicted and at last the sample; under them the router's p(k | x_t, t, c) over time, stacked, and below that the experts in use.
    """
    side = max(64, rows[0][2][0][1].shape[0])
    gap, line, band, used = 4, 18, 40, 10
    width = (COLUMNS + 1) * (side + gap)
    height = line + side + gap + band + used + 3 * gap
    font, colours = label_font(11), [COLOURS[k % len(COLOURS)] for k in range(K)]
    name = round(font.getlength(f"expert {K - 1}")) + 3 * gap
    names = width // name       # in a line of the legend
    begin = (2 + -(-K // names)) * line + gap
    sheet = Image.new("RGB", (width + gap, begin + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 2), "x_0 as predicted at time t, and the sample.", "black", font)
    about = "Strips, from noise to data: p(k | x_t, t, c); thin: the experts in use"
    draw.text((gap, 2 + line), about, "black", font)
    for k in range(K):
        place = gap + k % names * name, 2 + (2 + k // names) * line
        draw.text(place, f"expert {k}", colours[k], font)
    for r, (title, path, pictures) in enumerate(rows):
        top = begin + r * height
        draw.text((gap, top), cut_label(title, font, width - gap), "black", font)
        for i, (t, picture) in enumerate(pictures):
            x, y = gap + i * (side + gap), top + line
            sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (x, y))
            draw.text((x + 3, y + side - 15), f"t = {t:.2f}" if t else "sample", "white", font, stroke_width=1, stroke_fill="black")
        y = top + line + side + gap
        times = [t for t, *_ in path] + [0.0]
        for i, (t, p, weights) in enumerate(path):      # from its own time to the next one's
            x = [gap + round((1 - t) * (width - gap)) for t in times[i:i + 2]]
            for shares, low, tall in ((p, y, band), (weights, y + band + gap // 2, used)):
                edge = 0.0
                for k, share in enumerate(shares):
                    box = (x[0], low + round(edge * tall), x[1] - 1, low + round((edge + share) * tall) - 1)
                    edge += share
                    if box[2] >= box[0] and box[3] >= box[1]:
                        draw.rectangle(box, fill=colours[k])
    return sheet


def png_info(args, settings, prompt, seed, share=None):
    """Text chunks that say how a picture was made; share [K]: of each expert in it."""
    values = {"prompt": prompt, "seed": seed, "strategy": args.only or settings.strategy, "guidance": settings.cfg,
              "steps": settings.steps, "solver": settings.solver, "software": SOFTWARE}
    if args.negative_prompt:
        values["negative prompt"] = normalise_text(args.negative_prompt)
    if share and not args.only:
        values["experts"] = " ".join(f"{k}:{s:.2f}" for k, s in enumerate(share) if s >= 0.005)
    values |= {key: value for key, value in vars(settings).items()      # what else makes another picture
               if value != getattr(Sample(), key) and key not in ("steps", "solver", "cfg", "strategy", "resident", "compile")}
    chunks = PngInfo()
    for key, value in values.items():
        chunks.add_text(key, str(value))
    return chunks


def main():
    parser = make_parser(__doc__, "sample")
    group = parser.add_argument_group("what to draw")
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given several times")
    group.add_argument("--prompts", default="", metavar="FILE", help="a file of prompts, one a line")
    group.add_argument("--negative-prompt", default="", metavar="TEXT", help="what guidance leads away from, in place of no prompt")
    group.add_argument("--class", dest="classes", type=int, action="append", default=[], metavar="N", help="a class; several times, too")
    group.add_argument("--num-images", type=int, default=4, metavar="N", help="images of each (default: 4)")
    group.add_argument("--seed", type=int, default=0, help="default: 0")
    group.add_argument("--out", default="", metavar="PNG|DIR", help="default: RUN/samples")
    group.add_argument("--batch", type=int, default=64, metavar="B", help="images at once (default: 64)")
    only = group.add_mutually_exclusive_group()
    for name, (path, *_) in DENSE.items():
        only.add_argument(f"--{name}", dest="only", action="store_const", const=name, default="", help=f"from {path} instead of the ensemble")
    group.add_argument("--require-all", action="store_true", help="a missing or unreadable expert is an error")
    group.add_argument("--show-routing", action="store_true", help=f"a picture of the router's answers and of x_0 over time ({SHOWN} images at most)")
    args, given = parse(parser)
    path = os.path.join(args.run_dir, "config.toml")
    config = make_config(read_toml(path) if os.path.exists(path) else {}, given)
    settings = config.sample
    strategy, _ = check_strategy(settings.strategy)
    if args.only:
        if "sample.strategy" in given:
            raise UserError(f"--{args.only} is one model: it takes no --strategy {settings.strategy}")
        settings.strategy = strategy = "full"
    if min(args.num_images, args.batch) < 1:
        raise UserError(f"--num-images {args.num_images} and --batch {args.batch} must be at least 1")
    if not 0 <= args.seed < 2 ** 63 - args.num_images:
        raise UserError(f"--seed {args.seed} must be from 0 to 2^63")
    check_sample(settings)
    if os.path.splitext(args.out)[1].lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise UserError(f"--out {args.out}: give a name that ends in .png, or a folder")
    if args.negative_prompt and settings.cfg == 1:
        raise UserError("--negative-prompt needs guidance, --cfg other than 1")

    ranks = start(args.device)
    device = ranks.device
    team = Ensemble(args.run_dir, device, args.only, settings.resident, settings.precision, settings.compile, args.require_all)
    team.check(settings)
    settings.precision = team.precision         # what it means on this device, for the images' text chunks
    times = flow.time_grid(settings.steps, team.shift(settings))
    space = open_space(team, config, given, device)
    captions, conditions, negative = read_conditions(args, team.config, space)
    if conditions is None:      # nothing to be guided to
        if idle := [name for name in given if name.startswith("sample.cfg")]:
            raise UserError(f"this run has condition = none: --{idle[0]} does nothing")
        settings.cfg = 1.0
    space.forget("text")            # it may be larger than an expert
    space.network("autoencoder")    # the wrong one is refused now, not after the work
    files, grid, routing_file = not args.out.lower().endswith(".png"), args.out, f"{args.out[:-4]}.routing.png"
    folder, removed = args.out or os.path.join(args.run_dir, "samples"), []
    if files:
        grid, routing_file = (os.path.join(folder, name) for name in ("grid.png", "routing.png"))
    on_rank_0(lambda: removed.append(clear_output(folder, files, grid, routing_file, args.show_routing)))

    calls = flow.evaluations(settings.steps, settings.solver)
    shape = (team.config.channels, team.config.size, team.config.size)
    jobs = [(p, args.seed + i) for p in range(len(captions)) for i in range(args.num_images)]

    def begin(batch):
        """-> (noise, u, c, c_null) of a batch of jobs, on the device."""
        noise, u = beginnings([jobs[j][1] for j in batch], shape, calls, team.K)
        c = None if conditions is None else conditions[[jobs[j][0] for j in batch]].to(device)
        return noise.to(device), u.to(device), c, None if negative is None else negative.to(device).expand_as(c)

    since = time.monotonic()
    mine, expert = list(range(ranks.rank, len(jobs), ranks.world)), None
    if strategy == "once" and len(team.paths) > 1:
        # who draws which image is known beforehand: sorted by expert, a rank needs few of them, one after the other
        drawn = {}
        for batch in batches(mine, args.batch):
            x, u, c, c_null = begin(batch)
            weights = team.velocity(settings, c, c_null, u).route(x, torch.ones(len(x), device=device), 0)
            drawn |= dict(zip(batch, weights.argmax(1).tolist()))
        expert = {job: k for part in gather(drawn) for job, k in part.items()}
        order = sorted(expert, key=lambda job: (expert[job], job))
        mine = order[len(order) * ranks.rank // ranks.world:len(order) * (ranks.rank + 1) // ranks.world]

    pictures, shares, routing, alone = {}, {}, {}, 0      # of each job
    bar = progress(desc="sampling", total=len(mine) * calls, unit="image-steps")
    for batch in batches(mine, args.batch, expert):
        x, u, c, c_null = begin(batch)
        labels = None if expert is None else torch.tensor([expert[j] for j in batch], device=device)
        velocity = team.velocity(settings, c, c_null, u, labels)
        shown, trace = [i for i, j in enumerate(batch) if args.show_routing and j < SHOWN], []

        def step(x_t, now):
            v = velocity(x_t, now)
            if shown:
                forwards, t = team.forwards.copy(), torch.full((len(shown),), now, device=device)
                p = velocity.weights[shown] if not team.routed else team.route(x_t[shown], t, None if c is None else c[shown], settings.router_temperature)
                team.forwards = forwards        # asked for the picture alone
                trace.append((now, p.tolist(), velocity.weights[shown].tolist(), (x_t - now * v)[shown]))
            bar.update(len(batch))
            return v

        for x in flow.integrate(step, x, times, settings.solver):
            pass
        for i, (job, picture, share) in enumerate(zip(batch, space.pictures(x).cpu().numpy(), (velocity.used / velocity.calls).tolist())):
            p, seed = jobs[job]
            shares[job] = share
            if files:
                with atomic(os.path.join(folder, f"{job:04d}.png")) as temporary:
                    Image.fromarray(picture).save(temporary, "PNG", pnginfo=png_info(args, settings, captions[p], seed, share))
            if not files or job < GRID:
                pictures[job] = picture
        alone += velocity.alone * len(batch)
        if shown:
            columns = [trace[round(i * (len(trace) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]
            predicted = [space.pictures(x_0).cpu().numpy() for *_, x_0 in columns]
            for i, row in enumerate(shown):
                routing[batch[row]] = ([(now, p[i], w[i]) for now, p, w, _ in trace],
                                       [(now, x_0[i]) for (now, *_), x_0 in zip(columns, predicted)] + [(0, pictures[batch[row]])])
    bar.close()

    seconds = max(gather(time.monotonic() - since))
    pictures, shares, routing = ({job: value for part in gather(found) for job, value in part.items()} for found in (pictures, shares, routing))
    router = team.forwards["router"]
    flops, by_experts, by_router, experts_flops, alone = sum_over_ranks(torch.tensor(
        [team.flops(), team.forwards.total() - router, router, team.flops() - router * team.cost.get("router", 0), alone], dtype=torch.float64)).tolist()
    if ranks.rank:
        return
    frames = {job: max(range(team.K), key=share.__getitem__) for job, share in shares.items()}
    columns = args.num_images if conditions is not None else 8
    cut = [range(i, min(i + columns, len(pictures))) for i in range(0, len(pictures), columns)]
    with atomic(grid) as temporary:
        picture_grid([[pictures[j] for j in row] for row in cut], captions[:len(cut)] if conditions is not None else None,
                     None if args.only else [[frames[j] for j in row] for row in cut]
                     ).save(temporary, "PNG", pnginfo=png_info(args, settings, " | ".join(captions), args.seed))
    if routing:
        rows = [(f"seed {jobs[j][1]}  {captions[jobs[j][0]]}".strip(), *routing[j]) for j in sorted(routing)]
        with atomic(routing_file) as temporary:
            routing_picture(rows, team.K).save(temporary, "PNG", pnginfo=png_info(args, settings, " | ".join(captions), args.seed))
        print(f"routing and predictions of {'the first ' if len(rows) < len(jobs) else ''}{len(rows)} in {routing_file}")
    share = [sum(column) / len(shares) for column in zip(*shares.values())]
    print(f"{len(jobs)} picture{'s' * (len(jobs) > 1)} in {folder if files else grid}"
          + (f" (the first {len(pictures)} in its grid.png)" if len(pictures) < len(jobs) else "")
          + (f", in place of {removed[0]} of an earlier call" if removed[0] else "")
          + ("" if args.only else "; experts used (mean weight): " + ", ".join(f"{k}: {s:.0%}" for k, s in enumerate(share))))
    print(f"forwards per sample: {by_experts / len(jobs):.1f} of experts, {by_router / len(jobs):.1f} of the router; "
          f"{flops / len(jobs) / 1e9:.4g} GFLOPs per image, {flops / (alone * experts_flops / by_experts):.3f} times a single expert's; "
          f"{len(jobs) / seconds:.3g} images/s, with the time to load the experts")


if __name__ == "__main__":
    script(main)
