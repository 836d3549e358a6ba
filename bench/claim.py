"""The tables and figures of bench/claim.sh, from what evaluate.py wrote of its arms.

    python bench/claim.py runs/claim --lengths 800 3200 12800 --arms monolith k4 k4-seed50

    # steps of claim.sh: the best learning rate of an arm; a tar in two halves; a monolith in the
    # run folder of other clusters
    python bench/claim.py --choose runs/claim/lr --arm k4 --rates 1e-3 2e-3 4e-3
    python bench/claim.py --halve CIFAR/00009.tar FOLDER
    python bench/claim.py --adopt runs/claim/800/monolith-0/experts/all.safetensors RUN

reads   RUNS/LENGTH/ARM-SEED/{loss,samples-*}/models.json and its samples, RUNS/classifier
writes  RUNS/claim.md, RUNS/claim.png, RUNS/claim_by_t.png; RUNS/judged.json, what the classifier
        sees in the samples, kept for the next call

Whatever arms, lengths and seeds are there are shown. Differences are to the monolith of the same
seed and length, on the same images and noise; +- is the standard deviation over seeds, and "of the
images" one standard error over images, paired.
"""
import argparse
import glob
import json
import os
import re
import shutil
import statistics
import sys
import tarfile
from dataclasses import dataclass, field

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import TarDataset, square
from ddm import artifacts
from ddm.report import markdown, spaces_of
from ddm.run import read_clusters

STRATEGIES = ("full", "top-1", "top-2", "oracle")


@dataclass
class Arm:
    """One arm at one length, with what was measured of each of its seeds."""
    name: str
    length: int
    # seed -> evaluate.py's result of its validation loss
    losses: dict = field(default_factory=dict)
    # seed -> that of the monolith at this length
    monoliths: dict = field(default_factory=dict)
    # (strategy, guidance scale) -> seed -> the row of evaluate.py's table
    rows: dict = field(default_factory=dict)


def main():
    args = read_arguments()
    if args.choose:
        print(args.arm, best_rate(args.choose, args.arm, args.rates))
        return
    if args.halve:
        halve(*args.halve)
        return
    if args.adopt:
        adopt(*args.adopt)
        return

    arms = [read_arm(args.runs, name, length) for length in args.lengths for name in args.arms]
    arms = [arm for arm in arms if arm.losses]
    monoliths = {arm.length: arm.losses for arm in arms if arm.name == "monolith"}
    for arm in arms:
        arm.monoliths = monoliths.get(arm.length, {})
    if not arms:
        return
    parts = [rates_table(args.runs), loss_table(arms), hours_table(arms),
             samples_table(arms, args.runs, args.validation)]
    parts += [why_tables(arm) for arm in arms if arm.length == args.lengths[-1]]
    parts.append(calibration_table(args.runs))
    text = "\n\n".join(part for part in parts if part) + "\n"
    with open(os.path.join(args.runs, "claim.md"), "w") as f:
        f.write(text)
    print(text)
    draw_lengths(arms, os.path.join(args.runs, "claim.png"))
    draw_by_t(arms, os.path.join(args.runs, "claim_by_t.png"))


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?")
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--choose", metavar="FOLDER")
    parser.add_argument("--arm")
    parser.add_argument("--rates", nargs="+")
    parser.add_argument("--halve", nargs=2, metavar=("TAR", "FOLDER"))
    parser.add_argument("--adopt", nargs=2, metavar=("FILE", "RUN"))
    parser.add_argument("--validation", metavar="TAR")
    return parser.parse_args()


# ---- steps of claim.sh ---------------------------------------------------------------------------

def best_rate(folder, arm, rates):
    """The learning rate whose short run has the lowest validation loss."""
    losses = {rate: rate_loss(folder, arm, rate) for rate in rates}
    return min(losses, key=losses.get)


def rate_loss(folder, arm, rate):
    models = read(os.path.join(folder, f"{arm}-{rate}", "loss"))["loss"]["models"]
    model = "monolith" if arm.startswith("monolith") else "ensemble, full"
    return models[model]["mean"]


def halve(tar, folder):
    """Every other sample of a tar into FOLDER/fit.tar, the rest into test.tar."""
    paths = [os.path.join(folder, name) for name in ("fit.tar", "test.tar")]
    if os.path.exists(paths[-1]):
        return
    with tarfile.open(tar) as source:
        members = source.getmembers()
        keys = sorted({member.name.split(".")[0] for member in members})
        for i, path in enumerate(paths):
            chosen = set(keys[i::2])
            with tarfile.open(f"{path}.tmp", "w") as target:
                for member in members:
                    if member.name.split(".")[0] in chosen:
                        target.addfile(member, source.extractfile(member))
            os.rename(f"{path}.tmp", path)


def adopt(path, run):
    """Copies a monolith into a run of another clustering of the same images."""
    target = os.path.join(run, "experts", "all.safetensors")
    shutil.copyfile(path, f"{target}.tmp")
    artifacts.add_info(f"{target}.tmp", fingerprint=read_clusters(run)["fingerprint"])
    os.rename(f"{target}.tmp", target)


# ---- what there is -------------------------------------------------------------------------------

def read(folder):
    with open(os.path.join(folder, "models.json")) as f:
        return json.load(f)["results"][0]


def read_arm(runs, name, length):
    arm = Arm(name, length)
    for run in sorted(glob.glob(os.path.join(runs, str(length), f"{name}-[0-9]*"))):
        if not re.fullmatch(re.escape(name) + r"-\d+", os.path.basename(run)):
            continue
        seed = int(run.rpartition("-")[2])
        if os.path.exists(os.path.join(run, "loss", "done")):
            arm.losses[seed] = read(os.path.join(run, "loss"))
        for done in glob.glob(os.path.join(run, "samples-*", "done")):
            folder = os.path.dirname(done)
            strategy, cfg = os.path.basename(folder).removeprefix("samples-").rsplit("-", 1)
            row = read_samples(runs, folder)
            arm.rows.setdefault((strategy, float(cfg)), {})[seed] = row
    return arm


def read_samples(runs, folder):
    """The row of evaluate.py's table, and the share of samples that show their class."""
    row = read(folder)["rows"][0]
    path = os.path.join(runs, "judged.json")
    judged = {}
    if os.path.exists(path):
        with open(path) as f:
            judged = json.load(f)
    name = os.path.relpath(folder, runs)
    if name not in judged:
        judged[name] = share_right(os.path.join(runs, "classifier"), folder)
        with open(f"{path}.tmp", "w") as f:
            json.dump(judged, f, indent=1)
        os.rename(f"{path}.tmp", path)
    return row | {"right": judged[name]}


def share_right(classifier, folder):
    """The share of samples that show their class, as share_right_of sees it."""
    with np.load(glob.glob(os.path.join(folder, "*.npz"))[0]) as arrays:
        return share_right_of(classifier, arrays["arr_0"], arrays["arr_1"])


@torch.no_grad()
def share_right_of(classifier, images, classes):
    """The share of images [N,S,S,3] in which bench/classifier.py's network sees their class [N]."""
    # only this needs it
    from transformers import ResNetForImageClassification

    with open(os.path.join(classifier, "preprocessor_config.json")) as f:
        size = json.load(f)["size"]["shortest_edge"]
    network = ResNetForImageClassification.from_pretrained(classifier).eval()
    classes = torch.from_numpy(classes)

    right = 0
    for first in range(0, len(images), 250):
        batch = []
        for image in images[first:first + 250]:
            image = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
            batch.append(np.asarray(image))
        x = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2) / 127.5 - 1
        right += (network(x).logits.argmax(1) == classes[first:first + 250]).sum().item()
    return right / len(images)


def relative(arm, strategy):
    """How much the loss is above the monolith's, in percent, of each seed."""
    found = []
    for ours, theirs in pairs(arm, strategy):
        found.append(100 * (ours["mean"] / theirs["mean"] - 1))
    return found


def pairs(arm, strategy):
    """[(the arm's loss, the monolith's)] of each seed that has both, as evaluate.py has them."""
    name = f"ensemble, {strategy}"
    if arm.name.startswith("monolith-") and strategy == "full":
        name = "monolith"
    found = []
    for seed, result in arm.losses.items():
        models = result["loss"]["models"]
        if name in models and seed in arm.monoliths:
            found.append((models[name], arm.monoliths[seed]["loss"]["models"]["monolith"]))
    return found


def spread(values, digits, sign=""):
    if not values:
        return ""
    text = f"{statistics.mean(values):{sign}.{digits}f}"
    if len(values) > 1:
        text += f" +- {statistics.stdev(values):.{digits}f}"
    return text


# ---- tables --------------------------------------------------------------------------------------

def rates_table(runs):
    """The learning rates that were tried, and the loss of each."""
    rows = {}
    for folder in sorted(glob.glob(os.path.join(runs, "lr", "*", "loss", "done"))):
        name = os.path.basename(os.path.dirname(os.path.dirname(folder)))
        arm, rate = re.fullmatch(r"(.*?)-([\d.]+(?:e-\d+)?)", name).groups()
        rows.setdefault(arm, {"arm": arm})[rate] = f"{rate_loss(f'{runs}/lr', arm, rate):.5f}"
    return f"learning rates: validation loss of short runs\n\n{markdown(list(rows.values()))}"


def loss_table(arms):
    rows = []
    for arm in arms:
        row = {"steps": arm.length, "arm": arm.name, "seeds": len(arm.losses)}
        models = [result["loss"]["models"] for result in arm.losses.values()]
        if arm.name.startswith("monolith"):
            row["loss"] = spread([each["monolith"]["mean"] for each in models], 5)
        for strategy in STRATEGIES:
            name = "own expert" if strategy == "oracle" else strategy
            row[name] = spread(relative(arm, strategy), 2, sign="+")
        if "ensemble, full" in models[0] and "monolith" in models[0]:
            errors = [100 * each["ensemble, full"]["difference_error"] / each["monolith"]["mean"]
                      for each in models]
            row["full, of the images"] = f"{statistics.mean(errors):.2f}"
        rows.append(row)
    return f"validation loss, percent above the monolith's\n\n{markdown(rows)}"


def hours_table(arms):
    rows = []
    for arm in arms:
        ledgers = [result["ledger"] for result in arm.losses.values()]
        model = "monolith" if arm.name.startswith("monolith") else "ensemble"
        hours = [each[model]["device_hours"] for each in ledgers if model in each]
        flops = [each[model]["flops"] / each["monolith"]["flops"] for each in ledgers
                 if model in each]
        hours = [each for each in hours if each is not None]
        rows.append({"steps": arm.length, "arm": arm.name, "device-hours": spread(hours, 2),
                     "FLOPs of the monolith's": spread(flops, 3)})
    return f"training cost\n\n{markdown(rows)}"


def samples_table(arms, runs, validation):
    rows = []
    for arm in arms:
        for (strategy, cfg), by_seed in sorted(arm.rows.items(), key=lambda item: item[0][::-1]):
            measured = list(by_seed.values())
            space = spaces_of(measured[0])[0]
            row = {"steps": arm.length, "arm": arm.name,
                   "strategy": "" if arm.name.startswith("monolith") else strategy,
                   "guidance": f"{cfg:g}", "seeds": len(measured),
                   "MFLOPs an image": f"{1000 * measured[0]['gflops_per_image']:.0f}"}
            row[space] = spread([each[space]["frechet_distance"] for each in measured], 2)
            row["precision"] = spread([each[space]["precision"] for each in measured], 3)
            row["recall"] = spread([each[space]["recall"] for each in measured], 3)
            row["right class"] = spread([100 * each["right"] for each in measured], 1)
            rows.append(row)
    if not rows:
        return ""
    real = share_right_of(os.path.join(runs, "classifier"), *real_images(validation, arms[0]))
    return (f"samples\n\n{markdown(rows)}\n\nright class: of the real held-out images, at this "
            f"size, {100 * real:.1f}%")


def real_images(validation, arm):
    """-> (the held-out images [N,S,S,3] uint8 at the arm's size, their classes [N])."""
    size = next(iter(arm.losses.values()))["reference"]["size"]
    data = TarDataset([validation], size, "class", classes=1000)
    images = []
    classes = []
    for i in range(len(data)):
        image, label, _ = data.sample(i)
        images.append(square(image, size))
        classes.append(label)
    return np.stack(images), np.array(classes)


def why_tables(arm):
    """What evaluate.py says of why, as the mean over seeds; clusters of the first seed."""
    if arm.name.startswith("monolith"):
        return ""
    whys = [result["why"] for result in arm.losses.values()]
    rows = []
    for name in whys[0]["by_t"]:
        values = np.mean([why["by_t"][name] for why in whys], axis=0)
        row = {"loss of": name, "mean": f"{values.mean():.5f}"}
        for i, value in enumerate(values):
            row[f"t {i / 10:.1f}"] = f"{value:.4f}"
        rows.append(row)
    text = f"why, {arm.name}, {arm.length} steps, {len(whys)} seeds\n\n{markdown(rows)}"

    rows = []
    for k, cluster in enumerate(whys[0]["clusters"]):
        shown = {"cluster": k}
        for name, value in cluster.items():
            shown[name] = f"{value:.5f}" if isinstance(value, float) else value
        rows.append(shown)
    return f"{text}\n\n{markdown(rows)}" if rows else text


def calibration_table(runs):
    """What temperatures change, arm by arm."""
    rows = []
    for done in sorted(glob.glob(os.path.join(runs, "calibrated", "*", "done"))):
        run = os.path.dirname(done)
        for on in ("false", "true"):
            result = read(os.path.join(run, f"loss-{on}"))
            router = result["router"]
            row = {"arm": os.path.basename(run), "calibrated": on}
            row["router's NLL"] = f"{statistics.mean(router['negative_log_likelihood']):.4f}"
            row["its calibration error"] = f"{statistics.mean(router['calibration_error']):.4f}"
            for strategy in ("full", "top-1", "top-2"):
                loss = result["loss"]["models"][f"ensemble, {strategy}"]["mean"]
                row[f"loss, {strategy}"] = f"{loss:.5f}"
            for strategy in ("full", "top-1", "top-2", "once"):
                sampled = read(os.path.join(run, f"samples-{strategy}-{on}"))["rows"][0]
                space = spaces_of(sampled)[0]
                row[f"FD, {strategy}"] = f"{sampled[space]['frechet_distance']:.2f}"
            rows.append(row)
    return f"calibrated routers\n\n{markdown(rows)}" if rows else ""


# ---- figures -------------------------------------------------------------------------------------

def draw_lengths(arms, path):
    """Loss beside the monolith's against the length of training: full, top-1, own expert."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained", sharey=True)
    titles = {"full": "all experts (full)", "top-1": "the likeliest (top-1)",
              "oracle": "the image's own expert"}
    for axis, (strategy, title) in zip(axes, titles.items(), strict=True):
        for name in dict.fromkeys(arm.name for arm in arms):
            points = [(arm.length, relative(arm, strategy)) for arm in arms if arm.name == name]
            points = [(length, values) for length, values in points if values]
            if not points:
                continue
            means = [statistics.mean(values) for _, values in points]
            errors = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in points]
            style = "--" if name.startswith("random") else "-"
            axis.errorbar([length for length, _ in points], means, errors, fmt=f"o{style}",
                          markersize=3, capsize=3, label=name)
        axis.axhline(0, color="k", linewidth=0.8)
        axis.set(title=title, xscale="log", xlabel="steps of 128 images")
        lengths = sorted({arm.length for arm in arms})
        axis.set_xticks(lengths, labels=lengths)
        axis.minorticks_off()
    axes[0].set(ylabel="validation loss, % above the monolith's")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_by_t(arms, path):
    """The same by noise level, of the longest runs."""
    longest = max(arm.length for arm in arms)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for axis, strategy in zip(axes, ("full", "oracle"), strict=True):
        for arm in arms:
            if arm.length != longest or arm.name == "monolith" or not relative(arm, strategy):
                continue
            by_seed = []
            for ours, theirs in pairs(arm, strategy):
                ratio = np.array(ours["by_t"]) / np.array(theirs["by_t"])
                by_seed.append(100 * (ratio - 1))
            times = (np.arange(len(by_seed[0])) + 0.5) / len(by_seed[0])
            errors = np.std(by_seed, axis=0, ddof=1) if len(by_seed) > 1 else None
            style = "--" if arm.name.startswith("random") else "-"
            axis.errorbar(times, np.mean(by_seed, axis=0), errors, fmt=style, capsize=2,
                          label=arm.name)
        axis.axhline(0, color="k", linewidth=0.8)
        title = "all experts (full)" if strategy == "full" else "the image's own expert"
        axis.set(title=f"{title}, {longest} steps", xlabel="t (0: data, 1: noise)")
    axes[0].set(ylabel="validation loss, % above the monolith's")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
