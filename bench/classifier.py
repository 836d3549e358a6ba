"""A small classifier of the training pictures, whose features evaluate.py can then measure Frechet distances in. About ten minutes on a core.

    python bench/classifier.py 'CIFAR/0000[0-8].tar' 'CIFAR/00009.tar' runs/flops/classifier
    python evaluate.py ... --features runs/flops/classifier        # "FD-classifier": never to be called FID

A ResNet of transformers' class in its format, 256 features a picture, shown pictures of 32 pixels at 48. Prints its accuracy on held-out ones.
"""
import argparse
import json
import os
import shutil
import sys

import torch
from transformers import ResNetConfig, ResNetForImageClassification

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from ddm.process import progress
from data import TarDataset, collate
from ddm.tars import find_tars
from training import positions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("validation")
    parser.add_argument("out")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--size", type=int, default=48, help="pixels a side that the network sees")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    open_tars = lambda pattern, **options: TarDataset(list(find_tars([pattern]).values()), args.size, "class", classes=args.classes, noise_shape=(1,), **options)
    data, held_out = open_tars(args.train, flip=True, crop="center"), open_tars(args.validation)
    network = ResNetForImageClassification(ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1], layer_type="basic",
                                                        num_labels=args.classes)).to(device)
    pixels = lambda batch: batch["x"].to(device).permute(0, 3, 1, 2) / 127.5 - 1
    steps = int(args.epochs * len(data) / args.batch)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    loader = torch.utils.data.DataLoader(data, batch_sampler=positions(0, steps, args.batch, 0, 1, args.batch), num_workers=1, collate_fn=collate)
    for batch in progress(loader, desc="classifier", total=steps):
        loss = network(pixels(batch), labels=batch["c"].to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    network.eval()
    with torch.no_grad():
        right = sum((network(pixels(batch)).logits.argmax(1).cpu() == batch["c"]).sum().item()
                    for batch in torch.utils.data.DataLoader(held_out, batch_size=250, collate_fn=collate))
    temporary = f"{args.out}.tmp"
    network.save_pretrained(temporary)
    with open(os.path.join(temporary, "preprocessor_config.json"), "w") as f:       # what networks.image_features reads
        json.dump({"size": {"shortest_edge": args.size}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, f)
    shutil.rmtree(args.out, ignore_errors=True)
    os.rename(temporary, args.out)
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f}M parameters, {steps} steps of {args.batch}: right on {right / len(held_out):.1%} of "
          f"{len(held_out)} held-out pictures")


if __name__ == "__main__":
    main()
