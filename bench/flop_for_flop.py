"""The table and the figure of bench/flop_for_flop.sh, from what evaluate.py wrote of its runs.

    python bench/flop_for_flop.py runs/flops --seeds 0 1 2

reads   RUNS/SEED/evaluation/models.json, RUNS/random/evaluation/models.json
writes  RUNS/flop_for_flop.md, RUNS/flop_for_flop.png

+- is the standard deviation over seeds.
"""
import argparse
import json
import os
import statistics
import sys
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from ddm.report import markdown, spaces_of


@dataclass
class Kind:
    """What is compared: one model under one strategy, in one run or more."""
    name: str
    # evaluate.py's results of the runs
    runs: list
    # what its validation loss is called there
    loss: str
    # its model in the rows and the ledger, if samples of it were drawn
    model: str = ""


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    args = parser.parse_args()
    runs = [read(args.runs, seed) for seed in args.seeds]
    control = read(args.runs, "random")
    kinds = list_kinds(runs, control)

    text = table(kinds, runs[0]) + "\n\n"
    names = [f"seed {seed}" for seed in args.seeds] + ["random"]
    for name, run in zip(names, [*runs, control], strict=True):
        for line in run["equal_compute"]:
            text += f"{name}: {line}\n"
    with open(os.path.join(args.runs, "flop_for_flop.md"), "w") as f:
        f.write(text)
    print(text)
    draw(kinds, runs[0], os.path.join(args.runs, "flop_for_flop.png"))


def read(folder, name):
    with open(os.path.join(folder, name, "evaluation", "models.json")) as f:
        return json.load(f)["results"][0]


def list_kinds(runs, control):
    # the student was distilled from the first run alone
    return [
        Kind("monolith", runs, "monolith", model="monolith"),
        Kind("ensemble, top-1", runs, "ensemble, top-1", model="ensemble"),
        Kind("ensemble, top-2", runs, "ensemble, top-2"),
        Kind("ensemble, threshold 0.1", runs, "ensemble, threshold-0.1"),
        Kind("ensemble, full", runs, "ensemble, full"),
        Kind("ensemble, the image's own expert", runs, "ensemble, oracle"),
        Kind("random clusters, top-1", [control], "ensemble, top-1", model="ensemble"),
        Kind("random clusters, full", [control], "ensemble, full"),
        Kind("student", runs[:1], "student", model="student"),
    ]


# ---- the figures of a kind, one for each of its runs ---------------------------------------------

def losses_of(kind):
    return [run["loss"]["models"][kind.loss] for run in kind.runs]


def monoliths_of(kind, first):
    """The monolith's loss of each run; the control has none, and its seed is the first run's."""
    own = first["loss"]["models"]["monolith"]
    return [run["loss"]["models"].get("monolith", own) for run in kind.runs]


def differences(kind, first):
    """The mean loss of each run less its monolith's."""
    pairs = zip(losses_of(kind), monoliths_of(kind, first), strict=True)
    return [loss["mean"] - monolith["mean"] for loss, monolith in pairs]


def difference_by_t(kind, first):
    """The same by bins of t, as means over runs."""
    by_run = []
    for loss, monolith in zip(losses_of(kind), monoliths_of(kind, first), strict=True):
        pairs = zip(loss["by_t"], monolith["by_t"], strict=True)
        by_run.append([ours - theirs for ours, theirs in pairs])
    return [statistics.mean(values) for values in zip(*by_run, strict=True)]


def sampled(kind, first):
    """What was measured of its samples in each run: {frechet_distance, precision, recall}."""
    space = spaces_of(first["rows"][0])[0]
    found = []
    for run in kind.runs:
        for row in run["rows"]:
            if row["model"] == kind.model:
                found.append(row[space])
    return found


# ---- table and figure ----------------------------------------------------------------------------

def spread(values, digits):
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" +- {statistics.stdev(values):.{digits}f}"
    return text


def table(kinds, first):
    space = spaces_of(first["rows"][0])[0]
    monolith_flops = first["ledger"]["monolith"]["flops"]
    rows = []
    for kind in kinds:
        row = {
            "model": kind.name,
            "seeds": len(kind.runs),
            "validation loss": spread([loss["mean"] for loss in losses_of(kind)], 5),
            "beside the monolith's": "",
        }
        if kind.name != "monolith":
            row["beside the monolith's"] = spread(differences(kind, first), 5)

        measured = sampled(kind, first)
        if measured:
            flops = kind.runs[0]["ledger"][kind.model]["flops"]
            row |= {
                space: spread([each["frechet_distance"] for each in measured], 2),
                "precision": spread([each["precision"] for each in measured], 3),
                "recall": spread([each["recall"] for each in measured], 3),
                "training FLOPs": f"{flops / monolith_flops:.3f}",
            }
        rows.append(row)

    row = first["rows"][0]
    return (f"{markdown(rows)}\n\n{space}, precision, recall: {row['samples']} samples by "
            f"{row['sampler']} (top-1), reference {row['reference']}; validation loss: "
            f"{first['loss']['images']} of its images. FLOPs beside the monolith's.")


def draw(kinds, first, path):
    """Left the loss by t beside the monolith's, right the Frechet distances."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    bins = len(first["loss"]["models"]["monolith"]["by_t"])
    times = [(i + 0.5) / bins for i in range(bins)]
    for kind in kinds:
        style = "--" if "random" in kind.name else "-"
        colour = "k" if kind.name == "monolith" else None
        left.plot(times, difference_by_t(kind, first), style, color=colour, label=kind.name)
    left.set(xlabel="t (0: data, 1: noise)", ylabel="validation loss - the monolith's")
    left.legend(fontsize=7)

    labels = []
    for kind in kinds:
        values = [each["frechet_distance"] for each in sampled(kind, first)]
        if not values:
            continue
        place = len(labels)
        right.bar(place, statistics.mean(values), color="0.8")
        right.plot([place] * len(values), values, "ko", markersize=3)
        labels.append(kind.name.replace(", ", ",\n"))
    right.set_xticks(range(len(labels)), labels=labels, fontsize=7)
    right.set(ylabel=f"{spaces_of(first['rows'][0])[0]} (lower is better)")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
