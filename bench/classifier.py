"""A small image classifier, in whose features evaluate.py can measure Frechet distances.

    python bench/classifier.py 'CIFAR/0000[0-8].tar' 'CIFAR/00009.tar' runs/claim/classifier
    # "FD-classifier": never to be called FID
    python evaluate.py ... --features runs/claim/classifier

reads   tars of images with class labels, to train on and to validate on
writes  a ResNet of transformers' class in its format: 256 features an image

Images of 32 pixels are shown to it at 48. About ten minutes on a core. Prints its accuracy on the
images that it has not seen.
"""
import argparse
import json
import os
import shutil
import sys

import torch
from transformers import ResNetConfig, ResNetForImageClassification

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import TarDataset, collate
from ddm.loading import positions
from ddm.process import progress
from ddm.tars import find_tars


def main():
    args = read_arguments()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build(args.classes).to(device)

    data = open_tars(args.train, args, flip=True, crop="center")
    steps = int(args.epochs * len(data) / args.batch)
    train(network, data, steps=steps, batch=args.batch, device=device)

    held_out = open_tars(args.validation, args)
    right = count_right(network, held_out, device)
    save(network, args.out, args.size)

    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    print(f"{parameters:.2f}M parameters, {steps} steps of {args.batch}: right on "
          f"{right / len(held_out):.1%} of {len(held_out)} held-out images")


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("validation")
    parser.add_argument("out")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--size", type=int, default=48, help="pixels a side that it sees")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=128)
    return parser.parse_args()


def open_tars(pattern, args, **options):
    tars = list(find_tars([pattern]).values())
    # the noise of a training sample is not used here
    return TarDataset(tars, args.size, "class", classes=args.classes, noise_shape=(1,), **options)


def build(classes):
    shape = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128, 256],
                         depths=[1, 1, 1, 1], layer_type="basic", num_labels=classes)
    return ResNetForImageClassification(shape)


def pixels(batch, device):
    """uint8 [B,S,S,3] -> [B,3,S,S] in [-1,1]."""
    return batch["x"].to(device).permute(0, 3, 1, 2) / 127.5 - 1


def train(network, data, *, steps, batch, device):
    order = positions(0, steps, batch, rank=0, world=1, micro=batch)
    loader = torch.utils.data.DataLoader(data, batch_sampler=order, num_workers=1,
                                         collate_fn=collate)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)

    for samples in progress(loader, desc="classifier", total=steps):
        loss = network(pixels(samples, device), labels=samples["c"].to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def count_right(network, data, device):
    network.eval()
    right = 0
    for batch in torch.utils.data.DataLoader(data, batch_size=250, collate_fn=collate):
        answer = network(pixels(batch, device)).logits.argmax(1).cpu()
        right += (answer == batch["c"]).sum().item()
    return right


def save(network, folder, size):
    """Writes the network, and how encoders.image_features must prepare an image for it."""
    temporary = f"{folder}.tmp"
    network.save_pretrained(temporary)
    half = [0.5, 0.5, 0.5]
    preprocessing = {"size": {"shortest_edge": size}, "image_mean": half, "image_std": half}
    with open(os.path.join(temporary, "preprocessor_config.json"), "w") as f:
        json.dump(preprocessing, f)

    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)


if __name__ == "__main__":
    main()
