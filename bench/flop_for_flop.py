"""The table and the figure of bench/flop_for_flop.sh, from what evaluate.py wrote of each of its runs.

    python bench/flop_for_flop.py runs/flops --seeds 0 1 2

RUNS/SEED/evaluation/models.json -> RUNS/flop_for_flop.md and RUNS/flop_for_flop.png. +- is the standard deviation over seeds.
"""
import argparse
import json
import os
import statistics
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from ddm.report import markdown, spaces_of


def spread(values, digits):
    return f"{statistics.mean(values):.{digits}f}" + (f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    args = parser.parse_args()
    read = lambda name: json.load(open(os.path.join(args.runs, name, "evaluation", "models.json")))["results"][0]
    runs, control, first = [read(seed) for seed in args.seeds], read("random"), read(args.seeds[0])
    space = spaces_of(first["rows"][0])[0]
    # what is compared: name -> (the runs, the key of its validation loss, its model in the rows and the ledger)
    kinds = {"monolith": (runs, "monolith", "monolith"), "ensemble, top-1": (runs, "ensemble, top-1", "ensemble"),
             "ensemble, top-2": (runs, "ensemble, top-2", None), "ensemble, threshold 0.1": (runs, "ensemble, threshold-0.1", None),
             "ensemble, full": (runs, "ensemble, full", None), "ensemble, the picture's own expert": (runs, "ensemble, oracle", None),
             "random clusters, top-1": ([control], "ensemble, top-1", "ensemble"), "random clusters, full": ([control], "ensemble, full", None),
             "student": ([first], "student", "student")}
    monolith = runs[0]["ledger"]["monolith"]["flops"]
    rows, curves, bars = [], {}, {}
    for name, (of, key, model) in kinds.items():
        losses = [run["loss"]["models"][key] for run in of]
        # the control and the student are compared with the monolith of the same seed, which is the first's
        base = [run["loss"]["models"].get("monolith", first["loss"]["models"]["monolith"]) for run in of]
        difference = [loss["mean"] - b["mean"] for loss, b in zip(losses, base)]
        curves[name] = [statistics.mean(loss["by_t"][i] - b["by_t"][i] for loss, b in zip(losses, base)) for i in range(len(losses[0]["by_t"]))]
        measured = [row for run in of for row in run["rows"] if row["model"] == model]
        cells = ["", "", "", ""]
        if measured:
            bars[name] = [row[space]["frechet_distance"] for row in measured]
            cells = [spread(bars[name], 2), spread([row[space]["precision"] for row in measured], 3), spread([row[space]["recall"] for row in measured], 3),
                     f"{of[0]['ledger'][model]['flops'] / monolith:.3f}"]
        rows.append([name, len(of), spread([loss["mean"] for loss in losses], 5), "" if name == "monolith" else spread(difference, 5), *cells])
    row = first["rows"][0]
    text = markdown(["", "seeds", "validation loss", "beside the monolith's", space, "precision", "recall", "training FLOPs"], rows)
    text += (f"\n\n{space}, precision, recall: {row['samples']} samples by {row['sampler']} (top-1), reference {row['reference']}; validation loss: "
             f"{first['loss']['images']} of its pictures. FLOPs beside the monolith's.\n\n")
    text += "\n".join(f"{name}: {line}" for name, run in zip([f"seed {s}" for s in args.seeds] + ["random"], [*runs, control]) for line in run["equal_compute"]) + "\n"
    with open(os.path.join(args.runs, "flop_for_flop.md"), "w") as f:
        f.write(text)
    print(text)

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    times = [(i + 0.5) / len(first["loss"]["models"]["monolith"]["by_t"]) for i in range(len(first["loss"]["models"]["monolith"]["by_t"]))]
    for name, curve in curves.items():
        axes[0].plot(times, curve, ("k" if name == "monolith" else "") + ("--" if "random" in name else "-"), label=name)
    axes[0].set(xlabel="t (0: data, 1: noise)", ylabel="validation loss - the monolith's")
    axes[0].legend(fontsize=7)
    for i, (name, values) in enumerate(bars.items()):
        axes[1].bar(i, statistics.mean(values), color="0.8")
        axes[1].plot([i] * len(values), values, "ko", markersize=3)
    axes[1].set_xticks(range(len(bars)), labels=[name.replace(", ", ",\n") for name in bars], fontsize=7)
    axes[1].set(ylabel=f"{space} (lower is better)")
    figure.savefig(os.path.join(args.runs, "flop_for_flop.png"), dpi=90)


if __name__ == "__main__":
    main()
