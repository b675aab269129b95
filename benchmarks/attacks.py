"""The attacks beside those of the libraries that people use: same weights, images, labels and budget, in one run.

    pip install --no-deps torchattacks foolbox eagerpy adversarial-robustness-toolbox adv-lib
    pip install --no-deps git+https://github.com/fra31/auto-attack
    python benchmarks/attacks.py --model student.safetensors --eps 0.122

Ours and the peer take turns, and the ratio is taken of CPU seconds (user and system of the whole process), pair by
pair, so that a busy machine slows both; one thread by default. The peers get the network as one writes it: convolution,
BatchNorm and ReLU as stock modules, in eval mode, images in NCHW. `--attacked-form` gives them our folded copy instead.
A peer that is not installed is left out and named.
"""

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from stock import plain
from torch import Tensor, nn

import fdml
from fdml.attacks import alma, apgd, apgd_targeted, fab, fmn, pgd, square, within
from fdml.data import load
from fdml.evaluate import predictions
from fdml.evaluate.curve import around, curve
from fdml.evaluate.victim import Victim
from fdml.randomness import Generator, Streams, take
from fdml.threat import Threat

Attack = Callable[[], Tensor]


class Bench:
    """One model and its rightly answered images."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.model = fdml.load(path)
        data = load(options.data, data_dir=options.data_dir)
        _, x, y = data.test.head(options.n * 3).all()
        self.victim = Victim.of("ours", self.model, like=x[:8])
        right = predictions(self.victim.model, x) == y
        self.x, self.y = x[right][: options.n].contiguous(), y[right][: options.n]
        self.stock = self.victim.model if options.attacked_form else plain(self.model)
        self.threat = Threat(options.norm, options.eps)
        self.rounds, self.only = options.rounds, options.only
        self.rows: list[dict[str, Any]] = []

    def streams(self, name: str = "bench") -> Streams:
        return Streams.of(torch.arange(len(self.x)), 0, name)

    def reference(self) -> Generator:
        return torch.Generator().manual_seed(0)

    def fooled(self, x_adv: Tensor) -> Tensor:
        """Which images fell, by the stock network: it has the last word for both."""
        with torch.no_grad():
            return self.stock(x_adv.contiguous()).argmax(1) != self.y

    def compare(self, what: str, bar: str, ours: Attack, peers: dict[str, Attack], rounds: int | None = None) -> None:
        """Runs all in turn, prints and keeps a row a peer: seconds, ratio, how many fell."""
        contenders = {"fdml": ours, **peers}
        taken: dict[str, list[float]] = {name: [] for name in contenders}
        fell: dict[str, Tensor] = {}
        for _ in range(rounds or self.rounds):
            for name, attack in contenders.items():
                began = time.process_time()
                x_adv = attack()
                taken[name].append(time.process_time() - began)
                fell[name] = self.fooled(x_adv)
                assert (
                    bool(self.threat.contains(x_adv.contiguous(), self.x, slack=1e-4)[fell[name]].all())
                    or name != "fdml"
                )
        for name in peers:
            ratio = statistics.median(b / a for a, b in zip(taken["fdml"], taken[name], strict=True))
            row = {
                "what": what,
                "peer": name,
                "bar": bar,
                "ours_s": round(statistics.median(taken["fdml"]), 2),
                "peer_s": round(statistics.median(taken[name]), 2),
                "times_faster": round(ratio, 2),
                "ours_standing": 1 - float(fell["fdml"].double().mean()),
                "peer_standing": 1 - float(fell[name].double().mean()),
                "differ": int((fell["fdml"] != fell[name]).sum()),
            }
            self.rows.append(row)
            print(json.dumps(row), flush=True)


def installed(name: str) -> bool:
    """Whether a peer is there. adversarial-library imports torchvision and visdom for what is not used here; they are
    replaced by empty modules for that import."""
    for unused, needs in (("torchvision", "models"), ("visdom", "Visdom")) if name == "adv_lib" else ():
        if importlib.util.find_spec(unused) is None:
            sys.modules[unused] = types.ModuleType(unused)
            setattr(sys.modules[unused], needs, None)
            for other in ("transforms", "ops"):
                setattr(sys.modules[unused], other, None)
    if name == "adv_lib":
        sys.modules.setdefault("adv_lib.distances.lpips", types.ModuleType("lpips")).__dict__["LPIPS"] = None
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{name} is left out: {error}")
        return False
    return True


def bench_pgd(b: Bench, bars: str) -> None:
    steps, size = 20, 2.5 * b.threat.eps / 20
    peers: dict[str, Attack] = {}
    if installed("torchattacks"):
        import torchattacks  # pyright: ignore[reportMissingImports]

        peers["torchattacks"] = lambda: torchattacks.PGD(b.stock, eps=b.threat.eps, alpha=size, steps=steps)(b.x, b.y)
    if installed("foolbox"):
        import foolbox  # pyright: ignore[reportMissingImports]

        wrapped = foolbox.PyTorchModel(b.stock, bounds=(0, 1))
        one = foolbox.attacks.LinfPGD(abs_stepsize=size, steps=steps, random_start=True)
        peers["foolbox"] = lambda: one(wrapped, b.x, b.y, epsilons=b.threat.eps)[1]
    if installed("art"):
        from art.attacks.evasion import ProjectedGradientDescentPyTorch  # pyright: ignore[reportMissingImports]
        from art.estimators.classification import PyTorchClassifier  # pyright: ignore[reportMissingImports]

        shape = tuple(b.x.shape[1:])
        art_model = PyTorchClassifier(b.stock, nn.CrossEntropyLoss(), shape, 10, clip_values=(0, 1), device_type="cpu")
        attack = ProjectedGradientDescentPyTorch(
            art_model,
            eps=b.threat.eps,
            eps_step=size,
            max_iter=steps,
            num_random_init=1,
            batch_size=len(b.x),
            verbose=False,
        )
        peers["ART"] = lambda: torch.from_numpy(attack.generate(b.x.numpy(), b.y.numpy()))
    b.compare("PGD-20", bars, lambda: pgd(b.victim.model, b.x, b.y, b.threat, steps=20, generator=b.streams()), peers)


NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def cascade(b: Bench, generator: Callable[[str], Generator], steps: list[tuple[str, Callable]]) -> Tensor:
    """The steps one after the other, each on the images that stand."""
    found, left = b.x.clone(), torch.arange(len(b.x))
    for name, attack in steps:
        if not len(left):
            break
        x_adv = attack(b.x[left], b.y[left], generator=take(generator(name), left))
        fell = predictions(b.victim.model, x_adv) != b.y[left]
        found[left[fell]] = x_adv[fell]
        left = left[~fell]
    return found


def standard(b: Bench) -> list[tuple[str, Callable]]:
    model, forward, threat = b.victim.model, b.victim.forward, b.threat
    minimal = within(partial(fab, forward=forward))
    return [
        ("apgd-ce", lambda x, y, generator: apgd(model, x, y, threat, generator=generator)),
        ("apgd-t", lambda x, y, generator: apgd_targeted(model, x, y, threat, generator=generator)),
        ("fab-t", lambda x, y, generator: minimal(model, x, y, threat, generator=generator)),
        ("square", lambda x, y, generator: square(forward, x, y, threat, budget=5002, generator=generator)),
    ]


def fast(b: Bench) -> list[tuple[str, Callable]]:
    model, forward, threat = b.victim.model, b.victim.forward, b.threat
    return [
        ("apgd-ce", lambda x, y, generator: apgd(model, x, y, threat, generator=generator)),
        ("apgd-t3", lambda x, y, generator: apgd_targeted(model, x, y, threat, targets=3, generator=generator)),
        ("square1000", lambda x, y, generator: square(forward, x, y, threat, budget=1000, generator=generator)),
    ]


def reference_autoattack(b: Bench) -> Attack:
    from autoattack import AutoAttack  # pyright: ignore[reportMissingImports]

    def run() -> Tensor:
        attack = AutoAttack(
            b.stock, norm=NORM[b.threat.norm], eps=b.threat.eps, version="standard", device="cpu", verbose=False, seed=0
        )
        return attack.run_standard_evaluation(b.x, b.y, bs=len(b.x))

    return run


def bench_autoattack(b: Bench, bars: str) -> None:
    if installed("autoattack"):
        peers = {"auto-attack, standard": reference_autoattack(b)}
        b.compare(
            "autoattack", bars, lambda: cascade(b, lambda _: b.streams(), standard(b)), peers, rounds=min(b.rounds, 2)
        )


def bench_same_streams(b: Bench, bars: str) -> None:
    if installed("autoattack"):
        peers = {"auto-attack, standard": reference_autoattack(b)}
        b.compare(
            "autoattack, --rng reference",
            bars,
            lambda: cascade(b, lambda _: b.reference(), standard(b)),
            peers,
            rounds=1,
        )


def bench_fast(b: Bench, bars: str) -> None:
    if installed("autoattack"):
        peers = {"auto-attack, standard": reference_autoattack(b)}
        b.compare("fast cascade", bars, lambda: cascade(b, lambda _: b.streams(), fast(b)), peers, rounds=1)


def bench_square(b: Bench, bars: str) -> None:
    if installed("autoattack"):
        from autoattack.square import SquareAttack  # pyright: ignore[reportMissingImports]

        one = SquareAttack(
            b.stock, p_init=0.8, n_queries=5000, eps=b.threat.eps, norm=NORM[b.threat.norm], n_restarts=1, seed=0,
            verbose=False, device="cpu", resc_schedule=False,
        )  # fmt: skip
        ours = partial(square, b.victim.forward, b.x, b.y, b.threat, budget=5002)
        peers = {"auto-attack": lambda: one.perturb(b.x, b.y)}
        b.compare("Square, 5,000 queries", bars, lambda: ours(generator=b.streams()), peers, rounds=min(b.rounds, 2))
        b.compare("Square, --rng reference", bars, lambda: ours(generator=b.reference()), peers, rounds=1)


def bench_fab(b: Bench, bars: str) -> None:
    if installed("autoattack"):
        from autoattack.fab_pt import FABAttack_PT  # pyright: ignore[reportMissingImports]

        one = FABAttack_PT(
            b.stock, n_restarts=1, n_iter=100, eps=b.threat.eps, seed=0, norm=NORM[b.threat.norm], verbose=False,
            device="cpu", targeted=True, n_target_classes=9,
        )  # fmt: skip
        minimal = within(partial(fab, forward=b.victim.forward))
        ours = partial(minimal, b.victim.model, b.x, b.y, b.threat)
        peers = {"auto-attack": lambda: one.perturb(b.x, b.y)}
        b.compare("FAB-T", bars, lambda: ours(generator=b.streams()), peers, rounds=min(b.rounds, 2))


def bench_curve(b: Bench, bars: str) -> None:
    if not installed("foolbox"):
        return
    import foolbox  # pyright: ignore[reportMissingImports]

    epsilons = around(b.threat.eps, b.threat.norm)
    wrapped = foolbox.PyTorchModel(b.stock, bounds=(0, 1))
    taken: dict[str, list[float]] = {"fdml": [], "foolbox": []}
    shares: dict[str, list[float]] = {}
    for _ in range(b.rounds):
        began = time.process_time()
        stands = curve(b.victim.model, b.x, b.y, b.threat.norm, epsilons, steps=20, generator=b.streams())
        taken["fdml"].append(time.process_time() - began)
        shares["fdml"] = [float(row.double().mean()) for row in stands]
        began = time.process_time()
        attack = foolbox.attacks.LinfPGD(rel_stepsize=2.5 / 20, steps=20, random_start=True)
        _, _, success = attack(wrapped, b.x, b.y, epsilons=list(epsilons))
        taken["foolbox"].append(time.process_time() - began)
        shares["foolbox"] = [1 - float(row.double().mean()) for row in success]
    ratios = [peer / ours for ours, peer in zip(taken["fdml"], taken["foolbox"], strict=True)]
    row = {
        "what": f"curve, {len(epsilons)} eps, PGD-20", "peer": "foolbox", "bar": bars,
        "ours_s": round(statistics.median(taken["fdml"]), 2), "peer_s": round(statistics.median(taken["foolbox"]), 2),
        "times_faster": round(statistics.median(ratios), 2),
        "ours_standing": [round(s, 3) for s in shares["fdml"]],
        "peer_standing": [round(s, 3) for s in shares["foolbox"]],
        "differ": int(sum(o > p for o, p in zip(shares["fdml"], shares["foolbox"], strict=True))),
    }  # fmt: skip
    b.rows.append(row)
    print(json.dumps(row), flush=True)


def bench_minimal(b: Bench, bars: str) -> None:
    x, y = b.x[:64], b.y[:64]
    streams = Streams.of(torch.arange(len(x)), 0, "minimal")
    pairs: list[tuple[str, str, Attack, Attack]] = []
    if installed("adv_lib"):
        from adv_lib.attacks import alma as peer_alma  # pyright: ignore[reportMissingImports]

        ours = partial(alma, b.victim.model, x, y, "l2", generator=streams)
        pairs.append(("l2", "adversarial-library ALMA", ours, lambda: peer_alma(b.stock, x, y, distance="l2")))
    if installed("foolbox"):
        import foolbox  # pyright: ignore[reportMissingImports]

        wrapped = foolbox.PyTorchModel(b.stock, bounds=(0, 1))
        peer = foolbox.attacks.LInfFMNAttack()
        ours = partial(fmn, b.victim.model, x, y, "linf", generator=streams)
        pairs.append(("linf", "foolbox FMN", ours, lambda: peer(wrapped, x, y, epsilons=None)[1]))
    for norm, name, ours, theirs in pairs:
        taken, medians = {}, {}
        for who, attack in (("ours", ours), ("peer", theirs)):
            began = time.process_time()
            x_adv = attack()
            taken[who] = time.process_time() - began
            distance = Threat(norm, 1.0).distance(x_adv, x)
            with torch.no_grad():
                distance[b.stock(x_adv.contiguous()).argmax(1) == y] = torch.inf
            medians[who] = round(float(distance.median()), 5)
        row = {
            "what": f"minimal {norm}, median", "peer": name, "bar": bars, "ours_s": round(taken["ours"], 2),
            "peer_s": round(taken["peer"], 2), "times_faster": round(taken["peer"] / taken["ours"], 2),
            "ours_standing": medians["ours"], "peer_standing": medians["peer"], "differ": 0,
        }  # fmt: skip
        b.rows.append(row)
        print(json.dumps(row), flush=True)


BENCHES: dict[str, tuple[Callable[[Bench, str], None], str]] = {
    "pgd": (bench_pgd, "1.8 / 2.4 / 2.4"),
    "curve": (bench_curve, "3"),
    "minimal": (bench_minimal, "median not above"),
    "square": (bench_square, "3"),
    "fab": (bench_fab, "2"),
    "autoattack": (bench_autoattack, "2.5"),
    "reference": (bench_same_streams, "same set"),
    "fast": (bench_fast, "8"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a defended model of `fdml train`")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--norm", default="linf")
    parser.add_argument("--eps", type=float, required=True, help="where about 30% of the images stand")
    parser.add_argument("--n", type=int, default=96, help="images, all answered rightly")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--attacked-form", action="store_true", help="give the peers our folded copy of the network")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options.model, options)
    for name in options.only:
        run, bars = BENCHES[name]
        run(bench, bars)
    if options.json:
        found = {
            "options": {k: str(v) for k, v in vars(options).items()},
            "torch": torch.__version__,
            "rows": bench.rows,
        }
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    table = Table(
        title=f"{options.model.name}, {len(bench.x)} images, eps {options.eps:g}, {options.threads} thread(s)"
    )
    for column in ("attack", "peer", "ours s", "peer s", "times faster", "bar", "standing, ours", "peer's", "differ"):
        table.add_column(column)
    for row in bench.rows:
        shares = [
            f"{100 * row[k]:.1f}%"
            if isinstance(row[k], float) and row["differ"] is not None and "median" not in row["what"]
            else str(row[k])
            for k in ("ours_standing", "peer_standing")
        ]
        table.add_row(
            row["what"],
            row["peer"],
            str(row["ours_s"]),
            str(row["peer_s"]),
            str(row["times_faster"]),
            row["bar"],
            *shares,
            str(row["differ"]),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
