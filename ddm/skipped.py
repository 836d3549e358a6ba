"""The samples that stage 1 cannot use: counted by cause, listed in a CSV, too many are an error."""
import collections
import csv
import os
from dataclasses import dataclass

from ddm import found
from ddm.errors import UserError
from ddm.files import atomic
from ddm.tars import describe_samples


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be used."""

    # the tar's name, the sample's key in it, and as in ddm.tars.BadSample
    tar: str
    key: str
    cause: str
    detail: str

    def reason(self):
        return f"{self.cause}: {self.detail}" if self.detail else self.cause


def check_skipped(run_dir, tars, described, *, unused, config, ranks):
    """Lists the samples that cannot be used in RUN/logs/cluster.skipped.csv, and counts what is not
    used. UserError if it is too much.

    described: what each tar's features file says of itself; unused: what find_tars left out.
    """
    images = 0
    skipped = []
    for tar, about in zip(tars, described, strict=True):
        images += about["images"]
        for key, cause, detail, *_ in about["skipped"]:
            skipped.append(Skipped(tar.name, key, cause, detail))
    causes = collections.Counter(sample.cause for sample in skipped)
    counted = ", ".join(f"{cause}: {n}" for cause, n in sorted(causes.items()))

    path = os.path.join(run_dir, "logs", "cluster.skipped.csv")
    if ranks.rank == 0:
        listed = f"; {len(skipped)} skipped ({path}): {counted}" if skipped else ""
        rest = say_left_out([*unused, *left_of_tars(described)])
        print(f"{images} images in {len(tars)} tars{listed}{rest}", flush=True)
        write_skipped(path, tars, skipped)

    # no tar at all: an --append that has been done already
    if tars and not images:
        why = f"{counted}; " if skipped else ""
        raise UserError(f"no usable image: {why}{describe_first(tars, skipped, config)}"
                        f"{say_left_out(unused)}")
    # in a small set a handful is a large share, and no reason to stop
    total = images + len(skipped)
    most = config.data.max_bad
    if len(skipped) > max(10, most * total):
        raise UserError(
            f"{len(skipped)} of {total} samples cannot be used, more than data.max_bad = {most} of "
            f"them ({counted}): see {path}, or allow more; "
            f"{describe_first(tars, skipped, config)}")


def left_of_tars(described):
    """What of the tars is not used, besides samples that are skipped: words with numbers."""
    counts = collections.Counter()
    firsts = {}
    for about in described:
        # first: an example of the first tar that has one
        for words, (count, *first) in about["left"].items():
            counts[words] += count
            firsts.setdefault(words, first)

    described = []
    for words, count in counts.items():
        first = f" ({firsts[words][0]})" if firsts[words] else ""
        described.append(f"{words}: {count}{first}")
    return described


def say_left_out(words):
    return f"; left out: {', '.join(words)}" if words else ""


def describe_first(tars, skipped, config):
    """Of the most frequent cause the first sample, and what its tar holds."""
    condition = config.data.condition
    if not skipped:
        return describe_samples(tars[0].path, "", condition)

    causes = collections.Counter(sample.cause for sample in skipped)
    most = causes.most_common(1)[0][0]
    first = next(sample for sample in skipped if sample.cause == most)
    path = next(tar.path for tar in tars if tar.name == first.tar)
    return (f"the first: {found.printable(first.key)} ({first.reason()}); "
            f"{describe_samples(path, most, condition)}")


def write_skipped(path, tars, skipped):
    """The list of skipped samples: these, and those of other tars that are in it already."""
    names = {tar.name for tar in tars}
    rows = []
    # an --append skips others than the calls before it
    if os.path.exists(path):
        with open(path, newline="", encoding="utf-8", errors="replace") as f:
            existing = list(csv.reader(f))[1:]
        rows = [row for row in existing if row and row[0] not in names]
    rows += [(sample.tar, sample.key, sample.reason()) for sample in skipped]
    if not rows:
        return

    with atomic(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8", errors="replace") as f:
            writer = csv.writer(f)
            writer.writerow(("tar", "sample", "cause"))
            writer.writerows(rows)
