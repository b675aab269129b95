"""How well the disagreement of teacher and student tells adversarial images from clean ones, and how it is bypassed.

    python benchmarks/suspect.py runs/fdml-digits --choose          # the candidates, on the validation split
    python benchmarks/suspect.py runs/fdml-digits --limit 500       # the score of fdml.suspicion, on the test split

Negatives are the first ``--limit`` images of the split, rightly answered or not. Positives are adversarial versions of
those that the student answers rightly, made by each attack by itself, inside the run's threat model; ``fooling`` counts
those alone that the student then answers wrongly. ``passed`` is the share of the rightly answered images for which the
attack fools the student and stays at or below the threshold, the 95th percentile of clean validation images. The
attacks do not know the score, but for the adaptive ones, which follow its gradient through both models. Attacks named
``…@teacher`` are made on the teacher and shown to both.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

import fdml
from fdml.attacks import FEATURES, pgd
from fdml.attacks.objective import Model, answer
from fdml.data import load
from fdml.data.dataset import Batch
from fdml.evaluate.suites import Step, step
from fdml.evaluate.target import target
from fdml.evaluate.victim import Victim
from fdml.losses import cross_entropy, margin
from fdml.randomness import Streams
from fdml.run import Run
from fdml.suspicion import suspicion

GUIDES = 256
FALSE_POSITIVES = 0.05

ATTACKS = (
    "fgsm", "pgd20", "pgd50x3", "cw", "apgd-ce", "apgd-dlr", "apgd-t3", "fab-t", "feature+ce", "feature+dlr",
    "metric+dlr", "square1000", "mi-fgsm@teacher", "di-ti@teacher", "pgd50-transfer@teacher", "noise",
)  # fmt: skip
"""The standard suite by its cheaper budgets, and what is crafted on the teacher; noise is the control."""
CHOOSING = ("fgsm", "pgd20", "cw", "apgd-ce", "apgd-dlr", "fab-t", "feature+ce", "square1000")
CONTROL = "noise"

ADAPTIVE_STEPS = 100
WEIGHTS = (0.3, 1.0, 10.0)
"""The lambdas of the adaptive attack."""
TARGETS = 3
ENOUGH = 0.5
"""The margin by which the student is to be fooled; beyond it only the score counts."""


def total_variation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = (logits.double().div(temperature).softmax(1) for logits in (student, teacher))
    return (p - q).abs().sum(1) / 2


def jensen_shannon(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = (logits.double().div(temperature).log_softmax(1) for logits in (student, teacher))
    mean = torch.logaddexp(p, q) - np.log(2)
    both = (p.exp() * (p - mean)).sum(1) + (q.exp() * (q - mean)).sum(1)
    return both.clamp_min(0) / (2 * np.log(2))


def doubt(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """1 − the teacher's probability of the student's class."""
    p = teacher.double().div(temperature).softmax(1)
    return 1 - p.gather(1, student.argmax(1, keepdim=True)).squeeze(1)


def apart(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The probability that a draw from each gives different classes."""
    p, q = (logits.double().div(temperature).softmax(1) for logits in (student, teacher))
    return 1 - (p * q).sum(1)


TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
FORMS = {"total variation": total_variation, "Jensen-Shannon": jensen_shannon, "doubt": doubt, "apart": apart}
CANDIDATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    f"{name}, T={temperature:g}": partial(form, temperature=temperature)
    for name, form in FORMS.items()
    for temperature in TEMPERATURES
}
CHOSEN = "apart, T=1"
"""What fdml.suspicion computes."""
ALONE = "student's own doubt"
"""The yardstick that needs no teacher: one minus the student's largest probability."""


@dataclass(frozen=True)
class Made:
    """Adversarial images of one attack, and which of them fool the student."""

    student: Tensor
    teacher: Tensor
    fooled: Tensor


class Bench:
    """The pair of one run, and the images that it is measured on."""

    def __init__(self, options: argparse.Namespace, split: str) -> None:
        run = Run(options.run)
        self.threat, name = target(options.run, None, None, options.data)
        data = load(name, data_dir=options.data_dir, val_fraction=run.recipe().val_fraction)
        self.name, self.seed, self.run = name, options.seed, options.run
        part = data.val if split == "val" else data.test
        self.index, self.x, self.y = part.head(options.limit).all()
        self.guides: Batch = data.train.head(GUIDES).all()
        like = self.x[:8]
        self.student = Victim.of("student", fdml.load(run.model("student")), like=like)
        self.teacher = Victim.of("teacher", fdml.load(run.model("teacher")), like=like)
        self.clean = self.both(self.x)
        self.calm = self.both(data.val.head(options.limit).all().x)
        self.right = (self.clean[0].argmax(1) == self.y).nonzero().flatten()

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return answer(self.student.model, x), answer(self.teacher.model, x)

    def look(self, x_adv: Tensor) -> Made:
        right, x = self.right, self.x[self.right]
        assert bool(self.threat.contains(x_adv, x).all())
        student, teacher = self.both(x_adv)
        return Made(student, teacher, student.argmax(1) != self.y[right])

    def attacked(self, name: str) -> Made:
        """What one attack of fdml makes, which knows nothing of the score."""
        base, _, source = name.partition("@")
        one: Step = step(base, source or None)
        victim = self.teacher if source else self.student
        x, y = self.x[self.right], self.y[self.right]
        options: dict[str, Any] = {}
        model: Model = victim.forward if one.counted else victim.model
        if base in FEATURES:
            options |= {"guides": self.guides.x, "guide_y": self.guides.y}
        if one.helped:
            options["forward"] = victim.forward
        generator = Streams.of(self.index[self.right], self.seed, one.name)
        return self.look(one.attack(model, x, y, self.threat, generator=generator, **options))

    def adaptive(self, steps: int) -> dict[str, Made]:
        """PGD through both models that knows the score, in two forms.

        One ascends min(margin of the student, ``ENOUGH``) − lambda · score. The other drives both models to the same
        wrong class t, the student's ``TARGETS`` likeliest ones in turn: it ascends log p_t + log q_t, whose gradient
        does not vanish where a model is sure; the score is at most 1 − p_t q_t. First comes, image by image, the best
        of all: fooling, and of the least score.
        """
        score, right = CANDIDATES[CHOSEN], self.right
        classes = self.clean[0].shape[1]
        x, y = self.x[right], self.y[right]

        def joint(images: Tensor) -> Tensor:
            return torch.cat([self.student.model(images), self.teacher.model(images)], 1)

        def hide(logits: Tensor, labels: Tensor, weight: float) -> Tensor:
            student, teacher = logits.split(classes, 1)
            return margin(student, labels).clamp_max(ENOUGH) - weight * score(student, teacher).to(student.dtype)

        def agree(logits: Tensor, aims: Tensor) -> Tensor:
            student, teacher = logits.split(classes, 1)
            return -cross_entropy(student, aims) - cross_entropy(teacher, aims)

        jobs = {f"adaptive, lambda {weight:g}": (y, partial(hide, weight=weight)) for weight in WEIGHTS}
        wrong = self.clean[0][right].scatter(1, y[:, None], -torch.inf).topk(min(TARGETS, classes - 1)).indices
        jobs |= {f"adaptive, both to wrong class {n}": (aims, agree) for n, aims in enumerate(wrong.unbind(1), 1)}
        found: dict[str, Made] = {}
        best, value = x, torch.full((len(x),), torch.inf, dtype=torch.float64)
        for name, (labels, objective) in jobs.items():
            generator = Streams.of(self.index[right], self.seed, name)
            # What fools is read off the student alone, so PGD is not to look at the logits of both.
            x_adv = pgd(
                joint, x, labels, self.threat, steps=steps, objective=objective, keep="last", generator=generator
            )
            made = found[name] = self.look(x_adv)
            # What fools no one ranks behind everything that does.
            cost = score(made.student, made.teacher) + 2.0 * ~made.fooled
            better = cost < value
            best = torch.where(better[:, None, None, None], x_adv, best)
            value = torch.where(better, cost, value)
        return {"adaptive, best of these": self.look(best), **found}


def figures(clean: np.ndarray, adversarial: np.ndarray) -> dict[str, float | int | None]:
    """The area under the ROC curve and the true positive rate at ``FALSE_POSITIVES``."""
    if not len(adversarial):
        return {"images": 0, "auroc": None, "tpr": None}
    truth = np.repeat([0, 1], [len(clean), len(adversarial)])
    scores = np.concatenate([clean, adversarial])
    fpr, tpr, _ = roc_curve(truth, scores)
    reached = float(tpr[fpr <= FALSE_POSITIVES].max())
    return {"images": len(adversarial), "auroc": float(roc_auc_score(truth, scores)), "tpr": reached}


def row(score: Callable[[Tensor, Tensor], np.ndarray], clean: tuple[Tensor, Tensor], made: Made) -> dict[str, Any]:
    adversarial = score(made.student, made.teacher)
    fooled = made.fooled.numpy()
    return {
        "fooled": float(fooled.mean()),
        "all": figures(score(*clean), adversarial),
        "fooling": figures(score(*clean), adversarial[fooled]),
    }


def numpy_of(score: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], np.ndarray]:
    return lambda student, teacher: score(student, teacher).numpy()


def alone(student: Tensor, _teacher: Tensor) -> Tensor:
    return 1 - student.double().softmax(1).amax(1)


def choose(bench: Bench, attacks: tuple[str, ...], console: Console) -> dict[str, Any]:
    """Every candidate on every attack; the best has the highest mean area over the attacks' fooling images."""
    made = {name: bench.attacked(name) for name in attacks}
    found = {
        name: {attack: row(numpy_of(score), bench.clean, each) for attack, each in made.items()}
        for name, score in {**CANDIDATES, ALONE: alone}.items()
    }
    table = Table("candidate", "mean AUROC, fooling", "mean AUROC, all", "mean TPR at 5%, fooling")
    means: dict[str, dict[str, float]] = {}
    for name, rows in found.items():
        means[name] = {
            f"{which} {what}": float(np.mean([r[which][what] for r in rows.values() if r[which][what] is not None]))
            for which, what in (("fooling", "auroc"), ("all", "auroc"), ("fooling", "tpr"))
        }
        table.add_row(name, *(f"{value:.3f}" for value in means[name].values()))
    console.print(table)
    return {"means": means, "rows": found}


def library(student: Tensor, teacher: Tensor) -> np.ndarray:
    return suspicion(student.numpy(), teacher.numpy())


def measure(bench: Bench, attacks: tuple[str, ...], steps: int, console: Console) -> dict[str, Any]:
    """The score of the library on every attack, and on those that know it."""
    clean = library(*bench.clean)
    assert np.allclose(clean, CANDIDATES[CHOSEN](*bench.clean).numpy(), atol=1e-6)
    threshold = float(np.quantile(library(*bench.calm), 1 - FALSE_POSITIVES))
    rows: dict[str, Any] = {}

    def add(name: str, made: Made) -> None:
        hidden = made.fooled.numpy() & (library(made.student, made.teacher) <= threshold)
        rows[name] = row(library, bench.clean, made) | {"passed": float(hidden.mean())}
        rows[name][ALONE] = row(numpy_of(alone), bench.clean, made)["fooling"]
        console.print(name, {key: value for key, value in rows[name].items() if key != "all"}, style="dim")

    for name in attacks:
        add(name, bench.attacked(name))
    if steps:
        for name, made in bench.adaptive(steps).items():
            add(name, made)
    table = Table(
        "attack", "fooled", "AUROC, all", "TPR at 5%", "AUROC, fooling", "TPR at 5%", "own doubt, fooling", "passed"
    )
    for name, found in rows.items():
        shares = [found["all"]["auroc"], found["all"]["tpr"], found["fooling"]["auroc"], found["fooling"]["tpr"]]
        cells = [*shares, found[ALONE]["auroc"]]
        table.add_row(
            name,
            f"{100 * found['fooled']:.1f}%",
            *("" if value is None else f"{value:.3f}" for value in cells),
            f"{100 * found['passed']:.1f}%",
        )
    console.print(table)
    return {"threshold": threshold, "false_positives": float((clean > threshold).mean()), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder with a student and a teacher")
    parser.add_argument("--data", help="a data set; by default the run's")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--limit", type=int, default=1000, help="images of the split, the first ones")
    parser.add_argument("--seed", type=int, default=0, help="seed of the attacks")
    parser.add_argument("--attack", nargs="*", help="by default the list in this file; none for the adaptive alone")
    parser.add_argument("--adaptive-steps", type=int, default=ADAPTIVE_STEPS, help="0 leaves the adaptive attacks out")
    parser.add_argument("--choose", action="store_true", help="compare the candidates, on the validation split")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    console = Console(width=140)
    bench = Bench(options, "val" if options.choose else "test")
    usual = CHOOSING if options.choose else ATTACKS
    attacks = usual if options.attack is None else tuple(options.attack)
    found: dict[str, Any] = {
        "run": bench.run.name, "data": bench.name, "split": "val" if options.choose else "test", "seed": options.seed,
        "images": len(bench.x), "right": len(bench.right), "threat": [bench.threat.norm, bench.threat.eps],
        "torch": torch.__version__,
    }  # fmt: skip
    if options.choose:
        found |= choose(bench, attacks, console)
    else:
        found |= measure(bench, attacks, options.adaptive_steps, console)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
