"""What `bounds.onnx` of a bundle certifies, and how long it takes beside the network's own answer.

    fdml export runs/ibp-mnist --bounds --out bundles/ibp-mnist
    python benchmarks/boxed.py --bundle bundles/ibp-mnist --data mnist --eps 0.1 --skip 10 --limit 1000

One image at a time; the two sessions take turns, and each image's milliseconds are the median over the images. The
bisection for the largest radius runs on the first `--radii` images.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from fdml import bundle
from fdml.boxed import Boxed
from fdml.data import load
from fdml.runtime import RobustClassifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--skip", type=int, default=1, help="every so many test images")
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--radii", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    clf = RobustClassifier.load(args.bundle, "cpu", args.threads)
    boxed = Boxed.load(bundle.read(args.bundle), args.threads)
    if boxed is None:
        parser.error(f"{args.bundle} has no {bundle.BOUNDS}: fdml export --bounds writes it")
    test = load(args.data, data_dir=args.data_dir).test
    index = torch.arange(0, len(test), args.skip)[: args.limit]
    _, images, labels = next(iter(test.batches([index])))
    x, y = images.numpy(), labels.numpy()

    clf.logits(x[:1])
    boxed.bound(x[0], args.eps)
    answers, proofs, seconds = [], [], {"answer": [], "bounds": [], "radius": []}
    for image in x:
        began = time.perf_counter()
        answers.append(int(clf.logits(image[None]).argmax()))
        middle = time.perf_counter()
        proofs.append(boxed.bound(image, args.eps))
        seconds["answer"].append(middle - began)
        seconds["bounds"].append(time.perf_counter() - middle)
    radii = []
    for image in x[: args.radii]:
        began = time.perf_counter()
        radii.append(boxed.radius(image).eps)
        seconds["radius"].append(time.perf_counter() - began)

    index_of = np.array([proof.index for proof in proofs])
    certified = np.array([proof.certified for proof in proofs])
    print(f"{len(y)} images, linf {args.eps:g}, {args.threads} threads")
    print(f"right             {100 * (index_of == y).mean():.1f}%")
    print(f"certified         {100 * (certified & (index_of == y)).mean():.1f}%, wrong answers included", end=" ")
    print(f"{100 * certified.mean():.1f}%")
    print(f"as model.onnx     {100 * (index_of == answers).mean():.1f}%")
    print(f"median radius     {statistics.median(radii):.3f}, of {len(radii)} images")
    for name, each in seconds.items():
        print(f"{name:<17} {1000 * statistics.median(each):.3f} ms an image")


if __name__ == "__main__":
    main()
