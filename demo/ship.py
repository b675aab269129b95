"""Makes a pair that comes with the package, of a run and its evaluation:

fdml train fdml --data fashion-mnist --set width=8 --set epochs=6 --set teacher_epochs=3
fdml evaluate runs/fdml-fashion-mnist/{teacher,student}.safetensors --out runs/evaluated
python -m fdml.demo.ship runs/fdml-fashion-mnist runs/evaluated demo/shipped/fashion-mnist
"""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from fdml.data import load
from fdml.demo.exhibit import EACH, chosen
from fdml.files import write_whole
from fdml.run import Run

_OF_REPORT = ("format", "fdml", "suite", "seed", "threat", "hardware", "versions")
_OF_ATTACK = ("name", "label", "source", "settings", "accuracy", "interval")


def ship(run: Run, report: Path, out: Path, data_dir: Path | None) -> None:
    """Writes ``teacher.safetensors``, ``student.safetensors``, ``images.npz`` (``x`` uint8 (n, c, h, w), ``y``: the
    first ten test images of each class) and ``report.json``, without what it says of single images."""
    for role in ("teacher", "student"):
        write_whole(out / f"{role}.safetensors", run.model(role).read_bytes())
    test = load(run.data(), data_dir=data_dir).test
    part = test.take(chosen(test.labels)).head(EACH * int(test.labels.max() + 1))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=part.images.numpy(), y=part.labels.numpy())
    write_whole(out / "images.npz", buffer.getvalue())
    found = json.loads((report / "report.json").read_text(encoding="utf-8"))
    write_whole(out / "report.json", json.dumps(trimmed(found), indent=1) + "\n")


def trimmed(report: dict[str, Any]) -> dict[str, Any]:
    """The report without its lists of images and the places of files."""
    kept = {name: report[name] for name in _OF_REPORT}
    kept["data"] = {name: report["data"][name] for name in ("name", "fingerprint", "split", "n")}
    kept["models"] = [
        {
            "name": model["name"],
            "sha256": model["sha256"],
            "clean": {name: model["clean"][name] for name in ("accuracy", "interval")},
            "attacks": [{name: attack[name] for name in _OF_ATTACK} for attack in model["attacks"]],
            "worst": {name: model["worst"][name] for name in ("accuracy", "interval")},
            "flags": model["flags"],
        }
        for model in report["models"]
    ]
    return kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args()
    ship(Run(options.run), options.report, options.out, options.data_dir)
