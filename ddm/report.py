"""What evaluate.py says of its measurements: the ledger of training compute, tables as text, a figure."""
import csv
import itertools
import os

from ddm import artifacts
from ddm.files import atomic


EQUAL = 0.05        # compute is called equal if the ledger differs by no more


def ledger(run, K):
    """What training each model of the run has cost -> ({name: {steps, images, flops, device_hours}}, comparisons in words).

    FLOPs are analytic (a multiply-add is two; frozen networks left out), a student's with its teachers' forwards and those of the weights that it
    began with. The ensemble is the sum of its experts and its router; without all of them there is none.
    """
    files = {f"expert {k}": (f"experts/{k}.safetensors", f"expert-{k}") for k in range(K)}
    files |= {"router": ("router.safetensors", "router"), "monolith": ("experts/all.safetensors", "expert-all"), "student": ("student.safetensors", "student")}
    entries, words = {}, []
    for name, (path, log) in files.items():
        path, log = os.path.join(run, path), os.path.join(run, "logs", f"{log}.csv")
        if os.path.exists(path):
            try:
                info = artifacts.read_info(path)
                entries[name] = {"steps": info["step"], "images": info["images"], "flops": info["flops"] + info.get("init_flops", 0),
                                 "init": info.get("init", ""), "init_flops": info.get("init_flops", 0), "device_hours": device_hours(log)}
            except (ValueError, KeyError):      # damaged: sampling has said so
                continue
    experts = [entries[name] for name in files if name.startswith("expert ") and name in entries]
    if len(experts) == K and (K == 1 or "router" in entries):
        parts = experts + [entries[name] for name in ("router",) if name in entries]
        total = lambda key: None if None in (found := [part[key] for part in parts]) else sum(found)
        entries["ensemble"] = {"steps": "", **{key: total(key) for key in ("images", "flops", "device_hours")}}

        def compare(name, flops, other, more):
            ratio = flops / entries[other]["flops"]
            verdict = "equal compute" if abs(ratio - 1) <= EQUAL else "NOT equal compute"
            words.append(f"{name}: {ratio:.3f} times the {other}'s training FLOPs{more}: {verdict}")

        if "monolith" in entries:
            alone = sum(part["flops"] for part in experts) / entries["monolith"]["flops"]
            compare("the ensemble", entries["ensemble"]["flops"], "monolith", f" (experts {alone:.3f}, router {entries['ensemble']['flops'] / entries['monolith']['flops'] - alone:.3f})")
            if "student" in entries:
                student = entries["student"]
                compare("the student", student["flops"], "monolith", " (its teachers' forwards included, their training not)")
                twice = student["init_flops"] if student["init"] != "all" else 0       # begun with the weights of a teacher, which is counted
                compare("the student with its teachers", student["flops"] - twice + sum(part["flops"] for part in experts), "monolith", "")
    return entries, words


def device_hours(log):
    """What the last row of a training's log says. None without a log, or where it is damaged."""
    try:
        with open(log, newline="", encoding="utf-8") as f:
            return float(list(csv.DictReader(f))[-1]["device_hours"])
    except (OSError, ValueError, TypeError, LookupError, csv.Error):
        return None


def markdown(header, rows):
    """A table as text whose columns line up."""
    cells = [[str(c) for c in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def spaces_of(row):
    """The names of the feature spaces that a row was measured in."""
    return [key for key, value in row.items() if isinstance(value, dict) and "frechet_distance" in value]


def rows_table(results):
    """Each row of each run: a model under a strategy, and how it was sampled and against what it was measured."""
    rows, several = [row for result in results for row in result["rows"]], len(results) > 1
    scored, shared = any("clip_score" in row for row in rows), any("cluster_shares" in row for row in rows)
    percent = lambda shares: " ".join(f"{share:.1%}" for share in shares)
    header = ["model", "strategy", "GFLOPs/image", *itertools.chain(*([space, "precision", "recall"] for space in spaces_of(rows[0])))]
    header += ["CLIP score"] * scored + ["share per cluster"] * shared + ["sampler", "samples", "seed", "reference"]
    lines = []
    for result in results:
        for row in result["rows"]:
            missing = f" (without {', '.join(map(str, row['missing']))})" if row.get("missing") else ""
            cells = [row["model"] + missing, row["strategy"], "" if row["gflops_per_image"] is None else f"{row['gflops_per_image']:.4g}"]
            for space in spaces_of(row):
                cells += [f"{row[space]['frechet_distance']:.4g}", f"{row[space]['precision']:.3f}", f"{row[space]['recall']:.3f}"]
            cells += [f"{row['clip_score']:.2f}" if "clip_score" in row else ""] * scored + [percent(row.get("cluster_shares", []))] * shared
            lines.append([result["run"]] * several + cells + [row["sampler"], row["samples"], row["seed"], row["reference"]])
        reference = result["reference"]
        if "cluster_shares" in reference:
            cells = ["(the reference)"] + [""] * (len(header) - 6) + [percent(reference["cluster_shares"]), "", reference["images"], "", reference["name"]]
            lines.append([result["run"]] * several + cells)
    precisions = dict.fromkeys(row["settings"]["precision"] for row in rows if "settings" in row)
    sampled = f"\n\nsamples were drawn with weights in {', '.join(precisions)}" if precisions else ""
    features = results[0]["reference"]["features"]
    return markdown(["run"] * several + header, lines) + "".join(
        f"\n\n{name}: {info['name']}, {info['preprocessing']}; precision and recall: of {rows[0][name]['of_pictures']} pictures each" for name, info in features.items()) + sampled


def bins(values):
    return [f"t {b / len(values):.1f}-{(b + 1) / len(values):.1f}" for b in range(len(values))]


def loss_table(loss):
    paired = "monolith" in loss["models"]
    lines = [[name, f"{v['mean']:.5f}"] + [f"{v['difference']:+.5f} +- {v['difference_error']:.5f}" if "difference" in v else ""] * paired
             + [f"{x:.4f}" for x in v["by_t"]] for name, v in loss["models"].items()]
    times = bins(next(iter(loss["models"].values()))["by_t"])
    return (f"validation loss of the velocity: {loss['images']} pictures of {loss['reference']}, at {len(times)} times each, the same noise for all "
            f"(seed {loss['seed']}, precision {loss['precision']})"
            + "; difference: to the monolith, picture by picture, +- one standard error" * paired + "\n\n" + markdown(["model", "loss"] + ["difference"] * paired + times, lines))


def as_text(results):
    """The readable form of the results, as main() of evaluate.py collects them."""
    parts = [rows_table(results)] if any(result["rows"] for result in results) else []
    for result in results:
        title = f"{result['run']}: " if len(results) > 1 else ""
        if "loss" in result:
            parts.append(title + loss_table(result["loss"]))
        if "router" in result:
            lines = [[name.replace("_", " "), *(f"{x:.3f}" for x in values)] for name, values in result["router"].items()]
            parts.append(f"{title}router, on the same pictures\n\n" + markdown(["", *bins(result["router"]["accuracy"])], lines))
        if "ledger" in result:
            lines = [[name, e["steps"], e["images"], f"{e['flops']:.4g}", "" if e["device_hours"] is None else f"{e['device_hours']:.3g}"] for name, e in result["ledger"].items()]
            parts.append(f"{title}ledger\n\n" + markdown(["model", "steps", "images seen", "training FLOPs", "device-hours"], lines)
                         + "".join(f"\n\n{line}" for line in result["equal_compute"]))
    return "\n\n".join(parts) + "\n"


def experts_figure(results, path):
    """Figure 4 of the paper: quality against the number of experts, the monolith at 1."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    number = lambda result, model: 1 if model == "monolith" else result["experts"]
    if rows := [(result, row) for result in results for row in result["rows"] if row["model"] != "student"]:
        space = spaces_of(rows[0][1])[0]
        axes[0].plot([number(result, row["model"]) for result, row in rows], [row[space]["frechet_distance"] for _, row in rows], "o")
        axes[0].set(xlabel="experts (1: the monolith)", ylabel=space, xscale="log")
    curves = [(name, number(result, name), v["mean"]) for result in results for name, v in result.get("loss", {"models": {}})["models"].items() if name != "student"]
    for name in dict.fromkeys(name for name, *_ in curves):
        axes[1].plot([k for other, k, _ in curves if other == name], [loss for other, _, loss in curves if other == name], "o", label=name)
    axes[1].set(xlabel="experts (1: the monolith)", ylabel="validation loss", xscale="log")
    axes[1].legend()
    for axis in axes:
        ticks = sorted({1, *(r["experts"] for r in results)})
        axis.set_xticks(ticks, labels=ticks)
        axis.minorticks_off()
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
