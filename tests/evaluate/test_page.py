"""The page, on a made-up report: what it shows and leaves out, what it must never do, and what docs/report.md says."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fdml import showing
from fdml.evaluate import interval, pictures
from fdml.evaluate.page import page, write_page

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
EPS = [0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3]

# label, protocol, source, what share of the images that stand the attack fools, the queries it may ask.
ATTACKS = {
    "fgsm": ("FGSM", "white", None, 0.5, 0),
    "pgd20": ("PGD-20", "white", None, 0.8, 0),
    "feature": ("feature space, CE", "white", None, 0.75, 0),
    "autoattack": ("AutoAttack", "white", None, 0.95, 0),
    "gray-clone": ("PGD-20", "gray", "gray-clone", 0.2, 0),
    "square": ("Square, 5,000 queries", "black", None, 0.7, 5000),
    "hopskipjump": ("HopSkipJump", "black", None, 0.5, 10000),
    "noise": ("uniform noise", "control", None, 0.04, 0),
}
CASCADE = {"apgd-ce": "APGD-CE", "apgd-t": "APGD-T, 9 targets", "fab-t": "FAB-T", "square": "Square"}
CARD = {"architecture": "cnn", "threat": {"norm": "linf", "eps": 0.1}, "recipe": {"name": "fdml"}, "seed": 0}


def made_up(n: int = 300, models: int = 2, classes: list[str] = CLASSES, *, gradients: bool = True) -> dict[str, Any]:
    """A report whose numbers fit together; models get weaker, and the last may lack gradients."""
    rng = np.random.default_rng(0)
    labels = rng.integers(len(classes), size=n)
    names = ["student", "teacher", *(f"model {number}" for number in range(3, models + 1))]
    made = [
        _model(rng, names[k], labels, classes, hardness=0.1 / (1 + 2 * k), gradients=gradients or k < models - 1)
        for k in range(models)
    ]
    return {
        "format": 1, "fdml": "0.1.0", "suite": "standard", "protocols": ["white", "gray", "black", "control"],
        "attacks": [], "rng": "image", "seed": 0, "seconds": 3723.4,
        "data": {"name": "fashion-mnist", "fingerprint": "ae19" * 16, "split": "test", "n": n, "classes": classes,
                 "input": [1, 28, 28]},
        "threat": {"norm": "linf", "eps": 0.1},
        "hardware": {"device": "cpu", "processor": "AMD EPYC 9B14", "threads": 2, "processes": 1},
        "versions": {"fdml": "0.1.0", "numpy": "2.4.6", "torch": "2.13.0+cpu"},
        "images": list(range(n)), "labels": labels.tolist(), "models": made,
        "transfer": {"sources": ["clone", "resnet18", *names[:models]], "targets": names[:models], "attack": "MI-FGSM",
                     "accuracy": rng.uniform(0.05, 0.9, (2 + models, models)).tolist()},
    }  # fmt: skip


def _model(
    rng: np.random.Generator, name: str, labels: np.ndarray, classes: list[str], *, hardness: float, gradients: bool
) -> dict[str, Any]:
    n, wrong = len(labels), (labels + rng.integers(1, len(classes), len(labels))) % len(classes)
    right = rng.random(n) < 0.88
    clean = np.where(right, labels, wrong)
    # How far each image withstands; what an attack finds is a little more than that.
    distance = np.where(right, rng.gamma(3, hardness / 2, n), 0)
    attacks = []
    for key, (label, protocol, source, strength, most) in ATTACKS.items():
        if gradients or (protocol != "white" and source is None):
            fooled = right & (distance < 0.1) & (rng.random(n) < strength)
            attacks.append(_attack(rng, key, label, protocol, source, labels, right, fooled, wrong, most))
    stands = right.copy()
    for attack in (each for each in attacks if each["protocol"] != "control"):
        stands &= np.array([outcome == "." for outcome in attack["outcomes"]])
    worst = np.where(stands, labels, wrong)
    curve = [float((right & (distance >= eps)).mean()) for eps in EPS]
    confusion = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(confusion, (labels, worst), 1)
    found = [None if d > 0.6 else round(float(d), 5) for d in distance]
    median = round(float(np.median(distance)), 5)

    def under(protocol: str) -> dict[str, Any]:
        return _share(np.all([[o == "." for o in a["outcomes"]] for a in attacks if a["protocol"] == protocol], 0))

    return {
        "name": name, "file": f"runs/fdml/{name}.{'safetensors' if gradients else 'onnx'}", "sha256": "5e" * 32,
        "card": CARD, "gradients": gradients,
        "clean": _share(right) | {"predictions": clean.tolist()},
        "attacks": attacks,
        "worst": _share(stands) | {"predictions": worst.tolist()},
        "by_protocol": {each: under(each) for each in ("white", "gray", "black")[0 if gradients else 2 :]},
        "classes": [
            {"name": each, "n": int(own.sum()), "clean": _mean(right[own]), "worst": _mean(stands[own])}
            for each, own in zip(classes, np.arange(len(classes))[:, None] == labels, strict=True)
        ],
        "confusion": confusion.tolist(),
        "curves": [
            {"attack": "APGD-CE", "eps": EPS, "accuracy": curve, "intervals": [list(interval(a, n)) for a in curve]},
        ] if gradients else [],
        "minimal": [
            {"attack": "FMN", "norm": "linf", "distances": found, "median": median, "seconds": 12.5},
            {"attack": "ALMA", "norm": "l2", "distances": [d and 9 * d for d in found], "median": 1.5, "seconds": 31.0},
        ] if gradients else [],
        "corruptions": [
            {"name": each, "severity": severity, "accuracy": max(0.1, 0.88 - 0.05 * severity - 0.1 * k)}
            for k, each in enumerate(("gaussian noise", "blur", "contrast")) for severity in (1, 3, 5)
        ],
        "flags": [] if hardness > 0.09 else [
            {"name": "gap", "level": "fail", "figure": 11.3, "page": "https://example.org/flags#gap",
             "meaning": "From PGD-20 to the worst case the accuracy falls by more than 10 points: PGD is misled."},
            {"name": "huge-eps", "level": "warn", "figure": 0.14, "page": "docs/flags.md#huge-eps",
             "meaning": "At a huge eps some images still stand."},
        ],
    }  # fmt: skip


def _attack(
    rng: np.random.Generator, key: str, label: str, protocol: str, source: str | None, labels: np.ndarray,
    right: np.ndarray, fooled: np.ndarray, wrong: np.ndarray, most: int,
) -> dict[str, Any]:  # fmt: skip
    parts = rng.random(len(fooled))
    steps = [
        {"name": name, "label": words, "accuracy": _mean(right & ~(fooled & (parts < bound))), "seconds": 40.0 * bound,
         "fooled": int((fooled & (parts < bound) & (parts >= bound - 0.25)).sum())}
        for (name, words), bound in zip(CASCADE.items(), (0.25, 0.5, 0.75, 1.0), strict=True)
    ]  # fmt: skip
    queries = np.where(right, np.where(fooled, rng.integers(1, max(2, most), len(right)), most), 0).tolist()
    return {
        "name": key, "label": label, "protocol": protocol, "source": source,
        "settings": {step["name"]: {"steps": 100} for step in steps} if key == "autoattack"
        else {"queries": most} if most else {"steps": 20, "step_size": 0.025, "objective": "ce"},
        **_share(right & ~fooled), "seconds": 12.3,
        "outcomes": "".join(np.where(~right, "-", np.where(fooled, "x", "."))),
        "predictions": np.where(right & ~fooled, labels, wrong).tolist(),
        "queries": queries if most else None, "steps": steps if key == "autoattack" else [],
    }  # fmt: skip


def _mean(stands: np.ndarray) -> float:
    return float(stands.mean()) if len(stands) else 0.0


def _share(stands: np.ndarray) -> dict[str, Any]:
    return {"accuracy": _mean(stands), "interval": list(interval(_mean(stands), len(stands)))}


def bare(report: dict[str, Any]) -> dict[str, Any]:
    """The report without what takes charts, which are most of the time that a page takes."""
    for model in report["models"]:
        model |= {"curves": [], "minimal": []}
    return report


def pictured(report: dict[str, Any], k: int = 6, side: int | None = None) -> dict[str, dict[str, Any]]:
    """A few attacked images for each model: shapes in noise."""
    rng = np.random.default_rng(1)
    channels, height, width = report["data"]["input"] if side is None else (3, side, side)
    down, across = np.mgrid[:height, :width] / max(height, width)
    made = {}
    for model in report["models"]:
        radius = rng.uniform(0.2, 0.45, (k, 1, 1, 1))
        x = (np.hypot(down - 0.5, across - 0.5) < radius) * rng.uniform(0.4, 0.9, (k, channels, 1, 1))
        x_adv = np.clip(x + rng.choice([-0.1, 0.1], x.shape), 0, 1)
        y = rng.integers(len(report["data"]["classes"]), size=k)
        answers = np.where(rng.random(k) < 0.4, y, (y + 1) % len(report["data"]["classes"]))
        made[model["name"]] = {
            "x": x.astype(np.float32), "x_adv": x_adv.astype(np.float32), "y": y, "answers": answers,
            "attack": ["PGD-20"] * k,
        }  # fmt: skip
    return made


class Parts(HTMLParser):
    """Every tag with its attributes, and the text that is read outside of style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._style = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = self._style and tag != "style"

    def handle_data(self, data: str) -> None:
        if not self._style and data.strip():
            self.text.append(" ".join(data.split()))

    def ids(self) -> list[str]:
        return [attributes["id"] or "" for _, attributes in self.tags if "id" in attributes]

    def said(self) -> str:
        return " ".join(self.text)


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}"


def hostile() -> dict[str, Any]:
    report = made_up(60, 2, [EVIL, *CLASSES[1:]])
    report["data"]["name"] = report["hardware"]["processor"] = report["suite"] = EVIL
    report["transfer"] |= {"sources": [EVIL] * 4, "targets": [EVIL] * 2, "attack": EVIL}
    report["versions"] = {EVIL: EVIL}
    for model in report["models"]:
        model["card"] = {EVIL: EVIL}
        model["flags"] = [{"name": EVIL, "level": EVIL, "figure": 1.0, "meaning": EVIL, "page": "javascript:alert(1)"}]
        for attack in model["attacks"]:
            attack |= {"label": EVIL, "protocol": EVIL, "settings": {EVIL: EVIL}}
        for found in (*model["curves"], *model["minimal"]):
            found["attack"] = EVIL
        for found in model["corruptions"]:
            found["name"] = EVIL
        model["file"] = EVIL
    report["models"][0]["name"] = EVIL
    return report


@pytest.fixture(scope="module")
def whole() -> str:
    return page(made_up(), pictured(made_up()))


def test_a_whole_report_is_shown(whole: str) -> None:
    report, found = made_up(), Parts(whole)
    every = [
        "run", "flags", "attacks", "curves", "minimal", "classes", "confusion", "transfer", "corruptions", "gallery",
        "provenance",
    ]  # fmt: skip
    assert found.ids() == every
    links = [attributes["href"] for tag, attributes in found.tags if tag == "a" and attributes["href"]]
    assert {link[1:] for link in links if link.startswith("#")} == set(every)
    for model in report["models"]:
        for key in ("clean", "worst"):
            assert found.text.count(f"{100 * model[key]['accuracy']:.1f}%") >= 2
        for attack in model["attacks"]:
            assert f"{100 * attack['accuracy']:.1f}%" in found.text
    words = found.said()
    for text in (
        "300 test images", "linf 0.1", "62 min", "images 0 to 299", "PGD-20 from gray-clone", "huge-eps", "0.14",
        "white-box", "APGD-T, 9 targets", "worst of black-box", "steps 20, step_size 0.025", "✗", "5e5e",
        "apgd-ce (steps 100)", "magnified 5 times", "median 1.5", "Ankle boot", '"architecture": "cnn"',
    ):  # fmt: skip
        assert text in words, text
    assert "fdml evaluate runs/fdml/student.safetensors runs/fdml/teacher.safetensors --suite standard" in words
    images = [attributes["src"] or "" for tag, attributes in found.tags if tag == "img"]
    # Three charts, for light and for dark, and three pictures of each example.
    assert len(images) == 3 * 2 + 3 * 6 * 2
    assert all(image.startswith("data:image/png;base64,iVBORw0KGgo") for image in images)


def test_nothing_leaves_the_page_and_nothing_runs_in_it(whole: str) -> None:
    found = Parts(whole)
    (policy,) = [each["content"] or "" for _, each in found.tags if each.get("http-equiv") == "Content-Security-Policy"]
    (css,) = re.findall(r"<style>(.*?)</style>", whole, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    # What the policy would block is not there in the first place.
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in found.tags}
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        assert (attributes.get("src") or "data:").startswith("data:")
    assert "url(" not in css
    assert "@import" not in css


def test_hostile_names_stay_names(whole: str) -> None:
    plain, found = Parts(whole), Parts(page(hostile(), pictured(hostile(), 1)))
    assert "script" not in {tag for tag, _ in found.tags}
    # The one policy cannot be undone by names, nor are images or links added by them.
    assert [a["src"] for t, a in found.tags if t == "img" and not (a["src"] or "").startswith("data:")] == []
    assert all((a["href"] or "").startswith("#") for t, a in found.tags if t == "a")
    assert {name for _, a in found.tags for name in a} == {name for _, a in plain.tags for name in a} - {"rel"}
    assert EVIL in found.said()
    assert "'<script>" in found.said()  # the file, quoted for a shell


def test_what_there_is_no_data_for_is_left_out() -> None:
    report = made_up(20, 1)
    report["transfer"] = None
    (model,) = report["models"]
    model |= {
        "attacks": [],
        "curves": [],
        "minimal": [],
        "corruptions": [],
        "flags": [],
        "classes": [],
        "confusion": [],
    }
    model |= {"card": None, "sha256": None, "file": None, "by_protocol": {}}
    found = Parts(page(report, {"student": None, "someone else": pictured(report)["student"]}))
    assert found.ids() == ["run", "provenance"]
    assert "fdml evaluate" not in found.said()
    assert "none: the model was made in Python" in found.said()
    assert "no red flags" in found.said()


def test_no_gradients_is_said_plainly() -> None:
    words = Parts(page(bare(made_up(50, 2, gradients=False)), {})).said()
    said = "No gradients were used: only query and transfer attacks were run."
    assert said not in Parts(page(bare(made_up(50)), {})).said()
    assert words.index(said) < words.index("What was run")
    # Its white-box attacks are lacking, the other model's stay.
    assert re.search(r"FGSM \d\S+% [\d.]+ to [\d.]+ - PGD-20", words)


@pytest.mark.parametrize(("models", "classes"), [(1, 2), (1, 30), (7, 10)])
def test_any_number_of_models_and_classes(models: int, classes: int) -> None:
    report = bare(made_up(200, models, [f"class {k}" for k in range(classes)]))
    found = Parts(page(report, {}))
    assert found.text.count("model 3") >= 5 * (models > 2)
    assert f"class {classes - 1}" in found.said()
    assert ("The most frequent errors" in found.said()) == (classes > 20)


def test_ten_thousand_images_make_a_small_page(tmp_path: Path) -> None:
    report = bare(made_up(10_000, 2, [f"class {k}" for k in range(1000)]))
    report["data"]["input"] = [3, 224, 224]
    report["models"][0]["card"] = {"recipe": {f"key {k}": "x" * 100 for k in range(9000)}}
    write_page(report, tmp_path / "report.html", pictured(report, k=20, side=224))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert 200_000 < (tmp_path / "report.html").stat().st_size < 3_000_000


def test_attacks_that_were_named_are_shown_in_place_of_the_suite() -> None:
    report = bare(made_up(30)) | {"attacks": ["fgsm", "autoattack"], "protocols": []}
    words = Parts(page(report, {})).said()
    assert "attacks fgsm, autoattack: these alone" in words
    assert "--attack fgsm --attack autoattack" in words
    assert "--protocol" not in words
    assert "--attack " not in Parts(page(bare(made_up(30)), {})).said()


def test_what_leaves_the_threat_is_never_the_strongest() -> None:
    report = bare(made_up(100, 1))
    attacks = report["models"][0]["attacks"]
    strongest = min(attack["accuracy"] for attack in attacks)
    for accuracy in (0.0, strongest):
        turned = attacks[-1] | {"name": "spatial", "label": "shifts and turns", "accuracy": accuracy}
        report["models"][0]["attacks"] = [*attacks, turned]
        assert re.findall(r'class="low">([\d.]+%)', page(report, {})) == [f"{100 * strongest:.1f}%"]


def test_a_part_of_the_split_is_named() -> None:
    report = bare(made_up(30))
    report["images"] = [*range(5, 34), 90]
    assert "30 images drawn from the split" in Parts(page(report, {})).said()


def test_distances_fall_from_clean_accuracy_to_what_was_never_found() -> None:
    assert pictures.standing([0.0, 0.2, 0.1, None]) == ([0.0, 0.1, 0.2], [0.75, 0.5, 0.25])
    assert pictures.standing([0.3, 0.3]) == ([0.0, 0.3], [1.0, 0.0])
    assert pictures.standing([None]) == ([0.0], [1.0])


def test_distances_may_be_of_the_first_images_alone() -> None:
    report = made_up(100, 1)
    (model,) = report["models"]
    model |= {"curves": [], "minimal": [model["minimal"][0] | {"distances": model["minimal"][0]["distances"][:40]}]}
    assert "minimal" in Parts(page(report, {})).ids()


def test_lines_differ_by_more_than_colour() -> None:
    lines = [pictures.Line(model, model, [0.0], [1.0]) for model in range(15)]
    looks = {(line.model % len(pictures.LIGHT.lines), line.dashes) for line in lines}
    assert len(looks) == 15
    assert len({line.dashes for line in lines[:5]}) == 5


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))


def test_a_change_is_magnified_and_never_averaged_away() -> None:
    delta = np.zeros((1, 8, 8))
    delta[0, ::2, ::2], delta[0, 1::2, 1::2] = 0.1, -0.1
    whole = np.asarray(decoded(showing.change(delta, 5.0, 8)))
    assert whole[0, 0] == 255
    assert whole[1, 1] == 0
    assert whole[0, 1] == 128
    # Averaged, plus and minus would cancel to grey.
    assert np.asarray(decoded(showing.change(delta, 5.0, 4))).tolist() == [[255] * 4] * 4
    assert decoded(showing.pixels(np.zeros((3, 40, 20)), 10)).size == (5, 10)
    assert decoded(showing.pixels(np.full((3, 4, 4), 0.5), 10)).mode == "RGB"


def example() -> dict[str, Any]:
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text("utf-8")
    (found,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    return json.loads(found)


def keys(value: Any, path: str = "") -> set[str]:
    """The paths of all fields, those inside tables whose keys are names left out."""
    if isinstance(value, list):
        return set().union(*(keys(item, f"{path}[]") for item in value))
    if not isinstance(value, dict) or path.split(".")[-1] in ("settings", "versions", "card", "by_protocol"):
        return {path}
    return {path}.union(*(keys(item, f"{path}.{name}") for name, item in value.items()))


def test_the_documentation_names_every_field_and_its_example_is_whole() -> None:
    documented = (Path(__file__).parents[2] / "docs" / "report.md").read_text("utf-8").split("## An example")[0]
    report = example()
    assert keys(report) == keys(made_up(50))
    for path in keys(report) - {""}:
        name = path.split(".")[-1].strip("[]")
        assert f"`{name}`" in documented, path


def test_the_example_fits_together_and_makes_a_page() -> None:
    report = example()
    n, labels = report["data"]["n"], report["labels"]
    (model,) = report["models"]
    for shares in (model["clean"], *model["attacks"], model["worst"]):
        right = [answer == y for answer, y in zip(shares["predictions"], labels, strict=True)]
        assert shares["accuracy"] == sum(right) / n
        assert shares["interval"] == pytest.approx(interval(shares["accuracy"], n), abs=1e-4)
    for attack in model["attacks"]:
        assert [letter == "." for letter in attack["outcomes"]] == [
            answer == y for answer, y in zip(attack["predictions"], labels, strict=True)
        ]
    confusion = np.zeros((3, 3), dtype=int)
    np.add.at(confusion, (labels, model["worst"]["predictions"]), 1)
    assert model["confusion"] == confusion.tolist()
    found = Parts(page(report, {}))
    assert "gallery" not in found.ids()
    assert "folder:shapes" in found.said()
