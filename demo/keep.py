"""The example of a session as files: everything that `fdml attack` needs to make it again, byte for byte."""

import io
import json
import shlex
import zipfile

import numpy as np
from PIL import Image

import fdml
from fdml.attacks import FEATURES
from fdml.craft import as_image, side_by_side
from fdml.demo.lab import Lab, Moment

MAX_MODEL = 32 << 20
"""A larger model file is not packed: whoever has it, by its digest, gives it the name in the command."""


def packed(lab: Lab, moment: Moment) -> bytes:
    """A ZIP of ``example.json``, ``clean.png``, for each model that was attacked ``adversarial-KEY.png`` and
    ``compared-KEY.png``, its file, and the guides where the attack needed them."""
    asked, exhibit = moment.asked, lab.exhibit
    buffer = io.BytesIO()
    runs = []
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        clean = moment.faced[0].clean.x.numpy()
        archive.writestr("clean.png", _png(as_image(clean)))
        for faced in moment.faced:
            key, side = faced.side.key, faced.side
            if asked.whom not in ("each", key):
                continue
            adversarial = faced.attacked.x.numpy()
            archive.writestr(f"adversarial-{key}.png", _png(as_image(adversarial)))
            archive.writestr(f"compared-{key}.png", _png(side_by_side(clean, adversarial)))
            model = f"{key}.safetensors"
            if side.file.stat().st_size <= MAX_MODEL:
                archive.write(side.file, model)
            words = ["fdml", "attack", model, "clean.png", "--attack", asked.method]
            if asked.steps is not None and asked.method != "fgsm":
                words += ["--steps", str(asked.steps)]
            if asked.target is not None:
                words += ["--target", exhibit.classes[asked.target]]
            if asked.method in FEATURES:
                words += ["--guides", "guides.npz"]
            words += ["--norm", asked.norm, "--eps", repr(asked.eps), "--seed", str(asked.seed)]
            if asked.label is not None:
                words += ["--label", exhibit.classes[faced.label]]
            words += ["--out", f"again-{key}"]
            runs.append(
                {
                    "model": {"file": model, "sha256": side.sha256, "name": side.name},
                    "command": shlex.join(words),
                    "gives": f"again-{key}/clean-adversarial.png",
                    "equals": f"adversarial-{key}.png",
                    "label": exhibit.classes[faced.label],
                    "before": _answer(exhibit.classes, faced.clean),
                    "after": _answer(exhibit.classes, faced.attacked),
                }
            )
        if asked.method in FEATURES:
            guides = io.BytesIO()
            np.savez_compressed(guides, x=exhibit.images, y=exhibit.labels, classes=np.array(exhibit.classes))
            archive.writestr("guides.npz", guides.getvalue())
        example = {
            "format": 1,
            "fdml": fdml.__version__,
            "exhibit": exhibit.name,
            "attack": asked.method,
            "norm": asked.norm,
            "eps": asked.eps,
            "steps": asked.steps,
            "target": None if asked.target is None else exhibit.classes[asked.target],
            "whom": asked.whom,
            "seed": asked.seed,
            "state": moment.state,
            "reproducible": moment.state == "done",
            "runs": runs,
        }
        archive.writestr("example.json", json.dumps(example, indent=2, ensure_ascii=False) + "\n")
    return buffer.getvalue()


def _answer(classes: tuple[str, ...], seen) -> dict[str, object]:
    return {"class": classes[seen.answer], "probability": round(seen.confidence, 6)}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()
