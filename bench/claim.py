"""The tables and figures of bench/claim.sh, from what evaluate.py wrote of its arms.

    python bench/claim.py --choose RUNS/lr --arm k4 --rates 1e-3 2e-3 4e-3    # "k4 2e-3"
"""
import argparse
import json
import os


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", metavar="FOLDER")
    parser.add_argument("--arm")
    parser.add_argument("--rates", nargs="+")
    args = parser.parse_args()
    if args.choose:
        print(args.arm, best_rate(args.choose, args.arm, args.rates))


def read(run):
    with open(os.path.join(run, "evaluation", "models.json")) as f:
        return json.load(f)["results"][0]


def best_rate(folder, arm, rates):
    """The learning rate whose short run has the lowest validation loss."""
    losses = {}
    for rate in rates:
        models = read(os.path.join(folder, f"{arm}-{rate}"))["loss"]["models"]
        model = "monolith" if arm == "monolith" else "ensemble, full"
        losses[rate] = models[model]["mean"]
    return min(losses, key=losses.get)


if __name__ == "__main__":
    main()
