"""What evaluate.py says of its measurements: the ledger of training compute, tables, a figure.

    entries, lines = ledger("runs/demo", experts=4)     what training has cost
    output = Output("runs/demo/evaluation", "models")   the files of all results
    as_text(output.results)                             their tables

A result is what evaluate.py's JSON says of a run: {run, experts, reference, rows, ledger, ...}.
"""
import csv
import json
import os
from dataclasses import dataclass, field

import numpy as np

from ddm import artifacts
from ddm.errors import UserError
from ddm.files import atomic, try_file, try_folder, write_text

# compute is called equal if the ledger's FLOPs differ by no more
EQUAL = 0.05


# ---- files ---------------------------------------------------------------------------------------

@dataclass
class Output:
    """Where results go: FOLDER/TABLE.json and TABLE.md, written again after each row."""
    folder: str
    table: str
    # a result for each run, as ddm/report.py takes them
    results: list[dict] = field(default_factory=list)
    # the names of the files of samples
    written: list[str] = field(default_factory=list)

    def path(self, ending):
        return os.path.join(self.folder, f"{self.table}.{ending}")

    def check(self):
        """UserError or OSError if it cannot be written to: found out before the work."""
        try:
            self.folder.encode()
        except UnicodeEncodeError:
            # safetensors would fail later
            raise UserError(f"--out {self.folder!r} is not UTF-8: give another folder") from None

        try_folder(self.folder)
        try_file(self.path("json"))
        try_file(self.path("md"))
        # of this one there is a figure, too
        if self.table == "experts":
            try_file(self.path("png"))

    def save(self):
        """Writes what there is so far."""
        # numbers for programs; the same as tables for people
        write_text(self.path("json"), json.dumps({"results": self.results}, indent=1))
        # names of files need not be text
        text = as_text(self.results).encode(errors="backslashreplace").decode()
        write_text(self.path("md"), text)

    def save_images(self, name, images, classes=None):
        """Writes NAME.npz in ADM's format: images uint8 [N,S,S,3], and their classes, if any."""
        arrays = {"arr_0": images}
        if classes is not None:
            arrays["arr_1"] = np.array(classes)
        with atomic(os.path.join(self.folder, f"{name}.npz")) as temporary:
            # open already: to a name np.savez would add .npz
            with open(temporary, "wb") as f:
                np.savez(f, **arrays)
        self.written.append(f"{name}.npz")

    def say(self):
        """Prints the tables, and where they are."""
        print(f"\n{as_text(self.results)}")
        places = f"in {self.path('json')} and {self.path('md')}"
        if self.written:
            places += f"; samples in {', '.join(self.written)}"
        print(places)

        # those of other calls look alike, and are of other numbers
        files = [name for name in sorted(os.listdir(self.folder)) if name.endswith(".npz")]
        earlier = [name for name in files if name not in self.written]
        if earlier:
            print(f"{self.folder} holds samples of earlier calls, too, not of this table: "
                  f"{', '.join(earlier)}")


# ---- the ledger ----------------------------------------------------------------------------------

def ledger(run_dir, experts):
    """What training each model of a run of so many experts has cost.

    -> ({name: {steps, images, flops, device_hours}}, comparisons in words). FLOPs are analytic (a
    multiply-add is two; frozen networks left out), a student's with its teachers' forwards. What a
    model began with, a seed or the weights of another one, is part of what it cost; init_images and
    init_flops say how much. The ensemble is the sum of its experts and its router, what they began
    with counted once; without all of them there is none.
    """
    expert_names = [f"expert {k}" for k in range(experts)]
    entries = {}
    _enter(entries, "seed", run_dir, "experts/seed.safetensors", log="expert-seed")
    for k, name in enumerate(expert_names):
        _enter(entries, name, run_dir, f"experts/{k}.safetensors", log=f"expert-{k}")
    _enter(entries, "router", run_dir, "router.safetensors", log="router")
    _enter(entries, "monolith", run_dir, "experts/all.safetensors", log="expert-all")
    _enter(entries, "student", run_dir, "student.safetensors", log="student")

    # what an ensemble consists of
    parts = list(expert_names)
    # a single expert needs no router
    if experts > 1 or "router" in entries:
        parts.append("router")
    if any(name not in entries for name in parts):
        return entries, []

    entries["ensemble"] = _total([entries[name] for name in parts], entries)
    return entries, _comparisons(entries, expert_names)


def _enter(entries, name, run_dir, path, log):
    """Adds what the training of a model has cost, if there is such a model."""
    path = os.path.join(run_dir, path)
    if not os.path.exists(path):
        return

    try:
        info = artifacts.read_info(path)
        # a router says nothing of it: it begins with random weights
        init_images = info.get("init_images", 0)
        init_flops = info.get("init_flops", 0)
        entries[name] = {
            "steps": info["step"],
            "images": info["images"] + init_images,
            "flops": info["flops"] + init_flops,
            "init": info.get("init", ""),
            "init_shard": info.get("init_shard", ""),
            "init_images": init_images,
            "init_flops": init_flops,
            # of its own training
            "device_hours": device_hours(os.path.join(run_dir, "logs", f"{log}.csv")),
        }
    except (ValueError, KeyError):
        # it is damaged: sampling has said so
        return


def _total(parts, entries):
    """The sum of some entries, with what several of them began with counted once. Of hours that one
    of them does not know there is none.
    """
    # SHA-256 -> the entry of one that began with it
    begun = {part["init"]: part for part in parts}
    images = sum(part["images"] - part["init_images"] for part in parts)
    flops = sum(part["flops"] - part["init_flops"] for part in parts)
    hours = [part["device_hours"] for part in parts]
    for part in begun.values():
        images += part["init_images"]
        flops += part["init_flops"]
        if part["init"]:
            of_run = entries.get(part["init_shard"])
            hours.append(of_run and of_run["device_hours"])
    return {
        "steps": "",
        "images": images,
        "flops": flops,
        "device_hours": None if None in hours else sum(hours),
    }


def _comparisons(entries, expert_names):
    """Lines that hold the ensemble's and the student's training FLOPs against the monolith's."""
    if "monolith" not in entries:
        return []

    monolith = entries["monolith"]["flops"]
    ensemble = entries["ensemble"]["flops"]
    all_experts = [entries[name] for name in expert_names]
    experts = _total(all_experts, entries)["flops"]

    # as multiples of what the monolith's training cost
    of_experts = experts / monolith
    of_router = ensemble / monolith - of_experts
    parts = f" (experts {of_experts:.3f}, router {of_router:.3f})"
    lines = [_compare("the ensemble", ensemble / monolith, parts)]

    if "student" in entries:
        student = entries["student"]
        lines.append(_compare("the student", student["flops"] / monolith,
                              " (its teachers' forwards included, their training not)"))

        # one that began with the weights of an expert has that one's cost in its own; and with
        # the monolith's, the cost of the seed, if there is one
        counted_twice = student["init_flops"]
        if student["init_shard"] == "all":
            shared = entries["monolith"]["init"] in [entry["init"] for entry in all_experts]
            counted_twice = entries["monolith"]["init_flops"] if shared else 0
        both = student["flops"] - counted_twice + experts
        lines.append(_compare("the student with its teachers", both / monolith, ""))
    return lines


def _compare(name, ratio, parts):
    verdict = "equal compute" if abs(ratio - 1) <= EQUAL else "NOT equal compute"
    return f"{name}: {ratio:.3f} times the monolith's training FLOPs{parts}: {verdict}"


def device_hours(log):
    """What the last row of a training's log says. None without a log, or where it is damaged."""
    # a log that cannot be read costs its hours alone, not the evaluation
    try:
        with open(log, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        return float(rows[-1]["device_hours"])
    except (OSError, ValueError, TypeError, LookupError, csv.Error):
        return None


# ---- tables as text ------------------------------------------------------------------------------

def as_text(results):
    """The readable form of a list of results: all their tables."""
    # of a single run nobody needs the name
    several = len(results) > 1
    parts = []
    if any(result["rows"] for result in results):
        parts.append(rows_table(results))

    for result in results:
        title = f"{result['run']}: " if several else ""
        if "loss" in result:
            parts.append(title + loss_table(result["loss"]))
        if "why" in result:
            parts.append(title + why_table(result["why"]))
        if "router" in result:
            parts.append(title + router_table(result["router"], result["calibration"]))
        if "ledger" in result:
            parts.append(title + ledger_table(result["ledger"]))
            parts += result["equal_compute"]
    return "\n\n".join(parts) + "\n"


def markdown(rows):
    """Rows {column: cell} as a table whose columns line up.

    The columns stand in the order in which rows name them first; one that is empty in all rows is
    left out.
    """
    # column -> whether any row has something there
    filled = {}
    for row in rows:
        for column, cell in row.items():
            filled[column] = filled.get(column, False) or str(cell) != ""
    columns = [column for column in filled if filled[column]]

    table = [columns]
    for row in rows:
        table.append([str(row.get(column, "")) for column in columns])
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]

    # the header is the first line, the rule below it the second
    lines = []
    for cells in table:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    rule = "|".join("-" * (width + 2) for width in widths)
    lines.insert(1, f"|{rule}|")
    return "\n".join(lines)


def spaces_of(row):
    """The names of the feature spaces that a row was measured in."""
    names = []
    for key, value in row.items():
        if isinstance(value, dict) and "frechet_distance" in value:
            names.append(key)
    return names


def rows_table(results):
    """Each model under each strategy: how it was sampled, what was measured, and against what."""
    rows = []
    for result in results:
        rows += result["rows"]

    # the column of runs is left out where there is one
    several = len(results) > 1
    cells = []
    for result in results:
        run = result["run"] if several else ""
        cells += [_row_cells(row, run) for row in result["rows"]]
        if "cluster_shares" in result["reference"]:
            cells.append(_reference_cells(result["reference"], run))

    notes = []
    for name, info in results[0]["reference"]["features"].items():
        notes.append(f"{name}: {info['name']}, {info['preprocessing']}; precision and recall: "
                     f"of {rows[0][name]['of_pictures']} images each")

    # in their order, each once
    precisions = dict.fromkeys(row["settings"]["precision"] for row in rows)
    notes.append(f"samples were drawn with weights in {', '.join(precisions)}")
    return "\n\n".join([markdown(cells), *notes])


def _row_cells(row, run):
    model = row["model"]
    if row["missing"]:
        model += f" (without {', '.join(map(str, row['missing']))})"

    cells = {
        "run": run,
        "model": model,
        "strategy": row["strategy"],
        "GFLOPs/image": f"{row['gflops_per_image']:.4g}",
    }
    spaces = spaces_of(row)
    for space in spaces:
        measured = row[space]
        # of several spaces each has its own
        of = f" ({space})" if len(spaces) > 1 else ""
        cells[space] = f"{measured['frechet_distance']:.4g}"
        cells[f"precision{of}"] = f"{measured['precision']:.3f}"
        cells[f"recall{of}"] = f"{measured['recall']:.3f}"

    clip_score = row.get("clip_score")
    cells |= {
        "CLIP score": "" if clip_score is None else f"{clip_score:.2f}",
        "share per cluster": _percentages(row.get("cluster_shares", [])),
        "sampler": row["sampler"],
        "samples": row["samples"],
        "seed": row["seed"],
        "reference": row["reference"],
    }
    return cells


def _reference_cells(reference, run):
    return {
        "run": run,
        "model": "(the reference)",
        "share per cluster": _percentages(reference["cluster_shares"]),
        "samples": reference["images"],
        "reference": reference["name"],
    }


def _percentages(shares):
    return " ".join(f"{share:.1%}" for share in shares)


def _by_t(values, digits):
    """{bin of t: cell} of numbers in equal bins of t in [0,1]."""
    cells = {}
    for b, value in enumerate(values):
        low = b / len(values)
        high = (b + 1) / len(values)
        cells[f"t {low:.1f}-{high:.1f}"] = f"{value:.{digits}f}"
    return cells


def loss_table(loss):
    """The validation loss of each model, by t, with its difference to the monolith's."""
    rows = []
    for name, measured in loss["models"].items():
        difference = ""
        if "difference" in measured:
            difference = f"{measured['difference']:+.5f} +- {measured['difference_error']:.5f}"
        row = {"model": name, "loss": f"{measured['mean']:.5f}", "difference": difference}
        rows.append(row | _by_t(measured["by_t"], digits=4))
        # the same number for all models
        bins = len(measured["by_t"])

    text = (f"validation loss of the velocity: {loss['images']} images of {loss['reference']}, "
            f"at {bins} times each, the same noise for all "
            f"(seed {loss['seed']}, precision {loss['precision']})")
    if "monolith" in loss["models"]:
        text += "; difference: to the monolith, image by image, +- one standard error"
    return f"{text}\n\n{markdown(rows)}"


def why_table(why):
    """What metrics.explain says: by t, and by cluster."""
    rows = []
    for name, values in why["by_t"].items():
        mean = sum(values) / len(values)
        rows.append({"loss of": name, "mean": f"{mean:.5f}"} | _by_t(values, digits=4))
    text = ("why, on the same images: the mixture's loss is that of the experts, as the router "
            "weighs them, less their disagreement; chosen: by the router, as for top-1; own: of "
            f"the image's own cluster (oracle)\n\n{markdown(rows)}")
    if not why["clusters"]:
        return text

    rows = []
    for k, cluster in enumerate(why["clusters"]):
        row = {"cluster": k}
        for name, value in cluster.items():
            row[name] = f"{value:.5f}" if isinstance(value, float) else value
            # of no image there is no mean
            if value is None:
                row[name] = ""
        rows.append(row)
    return (f"{text}\n\nby cluster: the loss of its images; its expert beside the monolith, at "
            f"home and on the images of all others\n\n{markdown(rows)}")


def router_table(quality, calibration):
    """What metrics.router_quality says, by t. calibration: what was fitted, None for nothing."""
    calibrated = "not calibrated"
    if calibration:
        calibrated = f"calibrated on {calibration['images']} images of {calibration['reference']}"
    rows = []
    for name, values in quality.items():
        rows.append({"": name.replace("_", " ")} | _by_t(values, digits=3))
    return f"router ({calibrated}), on the same images\n\n{markdown(rows)}"


def calibration_table(temperatures, before, after, about):
    """The router's temperatures by t, and what metrics.router_quality says without and with them.

    about: the images that they were fitted on, {images, reference}.
    """
    rows = [{"": "temperature"} | _by_t(temperatures, digits=3)]
    for name in ("calibration_error", "negative_log_likelihood"):
        for when, quality in (("without", before), ("with", after)):
            rows.append({"": f"{name.replace('_', ' ')}, {when}"} | _by_t(quality[name], digits=3))
    return (f"the router's temperatures, fitted on {about['images']} images of "
            f"{about['reference']}\n\n{markdown(rows)}")


def ledger_table(entries):
    """What training has cost, a row for each model."""
    rows = []
    for name, entry in entries.items():
        hours = entry["device_hours"]
        rows.append({
            "model": name,
            "steps": entry["steps"],
            "images seen": entry["images"],
            "training FLOPs": f"{entry['flops']:.4g}",
            "of these, inherited": _inherited(entry),
            "device-hours": "" if hours is None else f"{hours:.3g}",
        })
    return f"ledger\n\n{markdown(rows)}"


def _inherited(entry):
    """The cell that says what a model's seed, or other beginning, has cost, empty without one."""
    before = entry.get("init_flops", 0)
    return f"{before:.4g}" if before else ""


# ---- figure 4 of the paper -----------------------------------------------------------------------

def experts_figure(results, path):
    """Draws quality against the number of experts, the monolith at 1, as a PNG."""
    # only this figure needs it
    import matplotlib
    # no screen is needed
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    _plot_distances(left, results)
    _plot_losses(right, results)

    ticks = sorted({1, *(result["experts"] for result in results)})
    # numbers of experts are mostly powers of two, which a log scale spaces evenly
    for axis in (left, right):
        axis.set(xlabel="experts (1: the monolith)", xscale="log")
        axis.set_xticks(ticks, labels=ticks)
        axis.minorticks_off()

    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _number_of_experts(result, model):
    return 1 if model == "monolith" else result["experts"]


def _plot_distances(axis, results):
    """The Frechet distance of each row, in the first of its spaces."""
    numbers = []
    distances = []
    for result in results:
        for row in result["rows"]:
            # it is no point on an axis of experts
            if row["model"] == "student":
                continue
            space = spaces_of(row)[0]
            numbers.append(_number_of_experts(result, row["model"]))
            distances.append(row[space]["frechet_distance"])

    # with --samples 0 there are no rows
    if distances:
        axis.plot(numbers, distances, "o")
        axis.set(ylabel=space)


def _plot_losses(axis, results):
    """The validation loss of each model and strategy."""
    # name -> [(number of experts, loss)]
    points = {}
    for result in results:
        measured = result["loss"]["models"] if "loss" in result else {}
        for name, loss in measured.items():
            if name != "student":
                point = (_number_of_experts(result, name), loss["mean"])
                points.setdefault(name, []).append(point)

    for name, of_name in points.items():
        numbers, losses = zip(*of_name, strict=True)
        axis.plot(numbers, losses, "o", label=name)
    axis.set(ylabel="validation loss")
    axis.legend()
