"""Stage 4: prompt -> image, the experts combined by the router.

    python sample.py --run runs/demo --prompt "a red circle" --prompt "a white cross" --n 8 --out shapes.png
    python sample.py --run runs/cifar --class 3 --strategy once --cfg 2
    python sample.py --run runs/demo --prompts prompts.txt --monolith --out monolith/

reads   RUN/router.safetensors, RUN/experts/*.safetensors (a missing expert is left out), RUN/config.toml if it is there ([sample]); the
        autoencoder and the text encoder that these were trained with
writes  --out X.png: one grid, prompts down the side; --out DIR (default RUN/samples): 0000.png, 0001.png, ... and grid.png
Sample i of each prompt starts from the noise of seed + i, at any batch size; every PNG says how it was made.
"""
import os

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import flow
import pretrained
from common import UserError, atomic, make_config, make_parser, parse, progress, read_toml, script, start
from data import picture_grid
from ensemble import STRATEGIES, Ensemble, parse_strategy


def open_space(team, run_config, given, device):
    """The pretrained.Space that the models of `team` were trained in. Where its networks are now: flags say, or the run's config, or the models."""
    config, info = make_config(given), team.info
    config.data.condition, config.data.size = team.config.condition, team.config.size * info["autoencoder"].get("factor", 1)
    for role in ("autoencoder", "text"):
        if f"{role}.name" not in given:
            local = getattr(run_config, role).name
            getattr(config, role).name = local if "weights" in info[role] and local != pretrained.NONE[role] else info[role]["name"]
        elif "weights" not in info[role]:
            raise UserError(f"--{role}.name {given[f'{role}.name']}: {team.path} was trained without a pretrained {role} network")
    config.text.length, config.text.vocab = team.config.length, team.config.vocab
    config.text.layer, config.text.precision = info["text"].get("layer", "last"), info["text"].get("precision", "auto")
    return pretrained.Space(config, device, info, team.path)


def read_conditions(args, model, space):
    """-> (captions for the grid [P], conditions [P,...] or None) from --prompt, --prompts and --class."""
    prompts, classes = list(args.prompt), args.classes
    if args.prompts:
        try:
            with open(args.prompts, encoding="utf-8") as f:
                prompts += [line.strip() for line in f if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --prompts {args.prompts}: {error}") from None
    given = {"text": prompts, "class": classes}.get(model.condition, [])
    if (prompts and model.condition != "text") or (classes and model.condition != "class"):
        wanted = {"text": "--prompt or --prompts", "class": "--class", "none": "neither --prompt nor --class"}[model.condition]
        raise UserError(f"this run has condition = {model.condition}: it takes {wanted}")
    if model.condition == "none":
        return [""], None
    if not given:
        raise UserError(f"nothing to draw: this run wants {'--prompt TEXT' if model.condition == 'text' else '--class N'}")
    if model.condition == "text":
        return prompts, space.captions(prompts)
    if wrong := [k for k in classes if not 0 <= k < model.classes]:
        raise UserError(f"--class {wrong[0]} is not one of 0..{model.classes - 1}")
    return [f"class {k}" for k in classes], torch.tensor(classes)


def main():
    parser = make_parser(__doc__, ["sample"])
    group = parser.add_argument_group("what to draw")
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given several times")
    group.add_argument("--prompts", default="", metavar="FILE", help="a file of prompts, one a line")
    group.add_argument("--class", dest="classes", type=int, action="append", default=[], metavar="N", help="a class; several times, too")
    group.add_argument("--n", type=int, default=4, metavar="N", help="images of each (default: 4)")
    group.add_argument("--seed", type=int, default=0, help="default: 0")
    group.add_argument("--out", default="", metavar="PNG|DIR", help="default: RUN/samples")
    group.add_argument("--batch", type=int, default=64, metavar="B", help="images at once (default: 64)")
    group.add_argument("--monolith", action="store_true", help="from experts/all.safetensors instead of the ensemble")
    group = parser.add_argument_group("short for --sample.*")
    for key, text in (("steps", "solver steps"), ("cfg", "guidance scale"), ("strategy", STRATEGIES), ("solver", "euler | heun")):
        group.add_argument(f"--{key}", dest=f"sample.{key}", metavar="X", help=text)
    group = parser.add_argument_group("where the pretrained networks are, if not where they were in training")
    for role in ("autoencoder", "text"):
        group.add_argument(f"--{role}.name", metavar="NAME", help="hub name or local folder of the same network")
    args, given = parse(parser)
    path = os.path.join(args.run, "config.toml")
    config = make_config(read_toml(path) if os.path.exists(path) else {}, given)
    settings = config.sample
    parse_strategy(settings.strategy)
    if min(args.n, args.batch, settings.steps) < 1:
        raise UserError(f"--n {args.n}, --batch {args.batch} and --steps {settings.steps} must be at least 1")
    if os.path.splitext(args.out)[1].lower() in (".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {args.out}: give a name that ends in .png, or a folder")

    device = start(args.device).device
    team = Ensemble(args.run, device, args.monolith)
    space = open_space(team, config, given, device)
    captions, conditions = read_conditions(args, team.config, space)
    space.forget("text")            # it may be larger than an expert
    space.network("autoencoder")    # the wrong one is refused now, not after the work
    shape, times = (team.config.channels, team.config.size, team.config.size), flow.time_grid(settings.steps, team.info["shift"])

    pictures, shares = [], []
    jobs = [(p, args.seed + i) for p in range(len(captions)) for i in range(args.n)]
    forwards = settings.steps * (2 if settings.solver == "heun" else 1) - (settings.solver == "heun")
    bar = progress(desc="sampling", total=len(jobs) * forwards, unit="forwards")
    for begin in range(0, len(jobs), args.batch):
        batch = jobs[begin:begin + args.batch]
        noise, u = [], []
        for _, seed in batch:       # a generator an image: the same image in any batch
            generator = torch.Generator().manual_seed(seed)
            noise.append(torch.randn(shape, generator=generator))
            u.append(torch.rand((), generator=generator))
        c = None if conditions is None else conditions[[p for p, _ in batch]].to(device)
        velocity, used = team.velocity(c, settings.cfg, settings.strategy, torch.stack(u).to(device))
        x, before = torch.stack(noise).to(device), 0
        for x in flow.integrate(velocity, x, times, settings.solver):
            done = round(used.sum(1)[0].item())
            bar.update((done - before) * len(batch))
            before = done
        pictures += list(space.pictures(x).cpu().numpy())
        shares += (used / used.sum(1, keepdim=True)).tolist()
    bar.close()

    def info(prompt, seed, share=None):
        chunks = PngInfo()
        values = {"prompt": prompt, "seed": seed, "strategy": "monolith" if args.monolith else settings.strategy, "guidance": settings.cfg,
                  "steps": settings.steps, "solver": settings.solver, "software": "nanoDDM"}
        if share and not args.monolith:
            values["experts"] = " ".join(f"{k}:{s:.2f}" for k, s in enumerate(share) if s >= 0.005)
        for key, value in values.items():
            chunks.add_text(key, str(value))
        return chunks

    if args.out.lower().endswith(".png"):
        folder, grid = os.path.dirname(args.out), args.out
    else:
        folder = args.out or os.path.join(args.run, "samples")
        grid = os.path.join(folder, "grid.png")
    if grid != args.out:
        for i, ((p, seed), picture, share) in enumerate(zip(jobs, pictures, shares)):
            with atomic(os.path.join(folder, f"{i:04d}.png")) as temporary:
                Image.fromarray(picture).save(temporary, "PNG", pnginfo=info(captions[p], seed, share))
    main_expert = [max(range(team.K), key=share.__getitem__) for share in shares]
    columns = args.n if conditions is not None else 8
    rows, frames = ([values[i:i + columns] for i in range(0, len(values), columns)] for values in (pictures, main_expert))
    with atomic(grid) as temporary:
        picture_grid(rows, captions if conditions is not None else None, None if args.monolith else frames).save(temporary, "PNG", pnginfo=info(" | ".join(captions), args.seed))
    total = [sum(column) / len(shares) for column in zip(*shares)]
    print(f"{len(pictures)} pictures in {grid if grid == args.out else folder}"
          + ("" if args.monolith else "; experts used: " + ", ".join(f"{k}: {s:.0%}" for k, s in enumerate(total))))


if __name__ == "__main__":
    script(main)
