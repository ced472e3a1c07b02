"""Train the shipped network: ``python -m thresher.models.train_fashion --data FOLDER``.

FOLDER holds the four gzipped IDX files of Fashion-MNIST (Xiao et al., 2017; MIT licence).
Coarse epochs run on 50 tokens (the stem's grid pooled 2x2), which costs a fifth; fine epochs on all
197.  ``--resume`` goes on from the shipped weights.  Writes the weights, the packed test set and
the log beside the network.  The shipped weights are two runs, an hour on two cores::

    --coarse-epochs 6 --fine-epochs 0.6 --lr 1.5e-3 --seed 0
    --coarse-epochs 0 --fine-epochs 1.5 --lr 7e-4 --seed 1 --resume
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from thresher.models.fashion import FOLDER, MEAN, STD, TEST_SET, WEIGHTS, FashionViT, vit


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of one gzipped IDX file (magic number, then big-endian sizes)."""
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", rank, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``uint8 [n, 28, 28]`` images and ``int64 [n]`` labels."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def normalise(images: torch.Tensor) -> torch.Tensor:
    """``uint8 [B, 28, 28] -> float32 [B, 1, 28, 28]``."""
    return (images.float().div(255).sub(MEAN).div(STD)).unsqueeze(1)


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random mirror and a shift of up to two pixels, one draw per image."""
    batch = x.shape[0]
    flip = torch.rand(batch, generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    padded = F.pad(x, (2, 2, 2, 2), value=-MEAN / STD)
    dy, dx = torch.randint(0, 5, (2, batch), generator=generator)
    rows = (dy[:, None] + torch.arange(28))[:, :, None]
    cols = (dx[:, None] + torch.arange(28))[:, None, :]
    return padded[torch.arange(batch)[:, None, None], 0, rows, cols].unsqueeze(1)


def pool_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """``[B, 197, D] -> [B, 50, D]``: the grid averaged 2x2, the class token untouched."""
    grid = tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, 14, 14)
    pooled = F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
    return torch.cat([tokens[:, :1], pooled], dim=1)


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless shuffled index batches."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from torch.split(order[: count - count % size], size)


def accuracy(model: FashionViT, images: torch.Tensor, labels: torch.Tensor, coarse: bool) -> float:
    """Share of correct answers in evaluation mode."""
    model.eval()
    hits = 0
    with torch.inference_mode():
        for part, target in zip(torch.split(images, 250), torch.split(labels, 250), strict=True):
            tokens = model.embed(normalise(part))
            answer = model.encode(pool_tokens(tokens) if coarse else tokens).argmax(1)
            hits += int((answer == target).sum())
    model.train()
    return hits / len(labels)


def rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up over 4 %, then cosine to zero."""
    warm = max(1, round(0.04 * total))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = load(args.data, "train")
    test_images, test_labels = load(args.data, "t10k")
    model = (vit() if args.resume else FashionViT()).train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    coarse_steps = round(args.coarse_epochs * len(labels) / args.batch)
    total = coarse_steps + round(args.fine_epochs * len(labels) / args.batch)
    FOLDER.mkdir(exist_ok=True)
    start = time.perf_counter()
    with (FOLDER / "train.log").open("a" if args.resume else "w", buffering=1) as log:
        settings = {k: v for k, v in vars(args).items() if k != "data"}
        print(json.dumps({"settings": settings, "torch": torch.__version__}), file=log)
        running = 0.0
        for step, index in enumerate(islice(batches(len(labels), args.batch, generator), total)):
            coarse = step < coarse_steps
            tokens = model.embed(augment(normalise(images[index]), generator))
            logits = model.encode(pool_tokens(tokens) if coarse else tokens)
            loss = F.cross_entropy(logits, labels[index], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate(step, total, args.lr)
            optimizer.step()
            running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
            if (step + 1) % args.report == 0 or step + 1 == total:
                record = {
                    "step": step + 1,
                    "of": total,
                    "tokens": 50 if coarse else 197,
                    "loss": round(running, 4),
                    "test_2000": accuracy(model, test_images[:2000], test_labels[:2000], coarse),
                    "seconds": round(time.perf_counter() - start),
                }
                print(json.dumps(record), file=log)
        final = accuracy(model, test_images, test_labels, coarse=False)
        print(json.dumps({"test_accuracy": final, "images": len(test_labels)}), file=log)
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(half, WEIGHTS)
    np.savez_compressed(
        TEST_SET, images=test_images.numpy(), labels=test_labels.numpy().astype(np.uint8)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--coarse-epochs", type=float, default=6)
    parser.add_argument("--fine-epochs", type=float, default=0.6)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", type=int, default=100)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
