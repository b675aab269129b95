"""Smoothing beside the published code, in alternating runs: samples a second, and samples an image.

    python benchmarks/certify.py --model student.safetensors --data fashion-mnist --data-dir ~/data

The published code (Cohen et al. 2019) repeats the image, adds float noise of torch's generator, and counts the answers
400 at a time. It is written here anew from its description, and runs the same weights in stock torch modules; `folded`
is the same loop over the model as fdml loads it. Times are CPU seconds of all threads (`--threads`, 1 unless given),
`--rounds` rounds in turn; the ratio is the median over rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from stock import plain

import fdml
from fdml.certify.by_smoothing import Sampling
from fdml.certify.noise import GridNoise
from fdml.certify.prove import certify, classifier
from fdml.certify.smoothing import Smoother
from fdml.data import load
from fdml.sequence import LOOK

BATCH = 400


def published(model: torch.nn.Module, image: torch.Tensor, sigma: float, samples: int) -> None:
    """Counts the answers to noisy copies, in the plain way."""
    counts = torch.zeros(10, dtype=torch.int64)
    with torch.no_grad():
        for first in range(0, samples, BATCH):
            batch = image.repeat((min(BATCH, samples - first), 1, 1, 1))
            answers = model(batch + torch.randn_like(batch) * sigma).argmax(1)
            counts += torch.bincount(answers, minlength=10)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--data", default="fashion-mnist")
    options.add_argument("--data-dir", type=Path)
    options.add_argument("--sigma", type=float, default=0.25)
    options.add_argument("--samples", type=int, default=20_000, help="a round and method")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--images", type=int, default=50, help="for the samples an image")
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()

    torch.set_num_threads(chosen.threads)
    model = fdml.load(chosen.model).eval()
    data = load(chosen.data, data_dir=chosen.data_dir)
    image = data.test.head(1).images[0]
    x = image[None].float() / 255
    noise = GridNoise(chosen.sigma)
    ways: dict[str, Callable[[], object]] = {
        "published": partial(published, plain(model), x, chosen.sigma, chosen.samples),
        "folded": partial(published, model, x, chosen.sigma, chosen.samples),
    }
    for precision in ("fp32", "bf16"):
        smoother = Smoother(classifier(model, x, precision), len(data.classes), noise, batch=2 * LOOK)
        ways[precision] = partial(smoother.counts, image, 0, chosen.samples)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(chosen.rounds):
        for name, way in ways.items():
            began = time.process_time()
            way()
            rates[name].append(chosen.samples / (time.process_time() - began))
    for name, found in rates.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(found, rates["published"], strict=True))
        print(f"{name:10} {statistics.median(found):9,.0f} samples a CPU second   {ratio:.2f}x")

    found = certify(model, data.test.head(chosen.images).all().x, Sampling(sigma=chosen.sigma))
    counts = [c.n or 0 for c in found]
    mean = statistics.mean(counts)
    print(f"sequential {mean:9,.0f} samples an image   {100_000 / mean:.1f}x fewer")


if __name__ == "__main__":
    main()
