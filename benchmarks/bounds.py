"""Branch and bound on a small network: how many properties are decided, and in what time.

    python benchmarks/bounds.py --data-dir ~/data            # a 3-layer, 256-unit network on MNIST, 100 properties
    python benchmarks/bounds.py --folder vnncomp2022/benchmarks/mnist_fc    # a benchmark of the competition

The network is trained here (Adam, 5 epochs, seed 0) on clean images or, with ``--defended``, on PGD examples of two
steps at linf 0.05. The properties are the first test images that it answers rightly, 25 at each of linf 0.02, 0.03,
0.04 and 0.05. A folder holds ``instances.csv`` with an ONNX file, a property file and a limit in each row, as the
verification competition lays them out.
"""

import argparse
import csv
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fdml.attacks import pgd
from fdml.certify.graph import Network
from fdml.certify.property import Property
from fdml.certify.region import robust
from fdml.certify.runner import OnnxRunner
from fdml.certify.verify import verify
from fdml.certify.vnnlib import read
from fdml.data import load
from fdml.evaluate.session import onnx_of
from fdml.threat import Threat

THREAT = Threat("linf", 0.05)
EPS = (0.02, 0.03, 0.04, 0.05)
EACH = 25

Problem = tuple[str, str, Network, OnnxRunner, list[Property]]


def trained(data_dir: Path | None, defended: bool) -> Iterator[Problem]:
    """The properties of a network that is trained here."""
    torch.manual_seed(0)
    data = load("mnist", data_dir=data_dir)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(784, 256), nn.ReLU()),
        nn.Sequential(nn.Linear(256, 256), nn.ReLU()),
        nn.Sequential(nn.Linear(256, 256), nn.ReLU()),
        nn.Linear(256, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(5):
        for _, x, y in data.train.batches(list(torch.randperm(len(data.train)).split(100))):
            if defended:
                x = pgd(model, x, y, THREAT, steps=2, step_size=0.04, keep="last")
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    _, x, y = data.test.head(2 * EACH * len(EPS)).all()
    with torch.no_grad():
        right = (model.eval()(x).argmax(1) == y).nonzero().squeeze(1).tolist()
    source = onnx_of(model, x)
    network, runner = Network.read(source), OnnxRunner(source)
    for place, index in enumerate(right[: EACH * len(EPS)]):
        eps = EPS[place // EACH]
        claim = robust(x[index], int(y[index]), 10, norm="linf", eps=eps)
        yield f"eps {eps:g}", f"image {index}", network, runner, [claim]


def competition(folder: Path) -> Iterator[Problem]:
    """The instances of a folder, each network read once."""
    networks: dict[Path, tuple[Network, OnnxRunner]] = {}
    with (folder / "instances.csv").open(newline="") as stream:
        for net, prop, *_ in csv.reader(stream):
            path = _there(folder / net)
            if path not in networks:
                networks[path] = Network.read(path), OnnxRunner(path)
            network, runner = networks[path]
            name = Path(net).name
            yield name, Path(prop).name, network, runner, read(_there(folder / prop), network.inputs, network.outputs)


def _there(path: Path) -> Path:
    return path if path.exists() else path.with_name(path.name + ".gz")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data-dir", type=Path)
    options.add_argument("--folder", type=Path)
    options.add_argument("--defended", action="store_true")
    options.add_argument("--timeout", type=float, default=60.0)
    options.add_argument("--every", type=int, default=1, help="take every N-th property")
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()

    torch.set_num_threads(chosen.threads)
    problems = competition(chosen.folder) if chosen.folder else trained(chosen.data_dir, chosen.defended)
    verdicts: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: dict[str, float] = defaultdict(float)
    for place, (group, name, network, runner, claims) in enumerate(problems):
        if place % chosen.every:
            continue
        began = time.monotonic()
        found = verify(network, claims, runner=runner, timeout=chosen.timeout)
        taken = time.monotonic() - began
        verdicts[group][found.status] += 1
        seconds[group] += taken
        print(f"{group:24} {name:24} {found.status:10} {found.method:17} {found.domains:7} {taken:6.1f} s", flush=True)
    print()
    total: Counter[str] = Counter()
    for group, counts in verdicts.items():
        total += counts
        print(f"{group:24} {dict(counts)}, {seconds[group] / counts.total():.1f} s each")
    decided = total["certified"] + total["falsified"]
    print(f"{'all':24} {decided} of {total.total()} decided, {sum(seconds.values()) / total.total():.1f} s each")


if __name__ == "__main__":
    main()
