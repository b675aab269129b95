"""What the server says of its models, as JSON values: for people, and as the protocol and Triton have it."""

from typing import Any

from fdml.serve import wire
from fdml.serve.config import Config
from fdml.serve.model import Place, Served


def state(place: Place) -> dict[str, Any]:
    """A place of the repository, as its index lists it."""
    reason = "" if place.served else ("unloaded" if not place.wanted else "it could not be loaded")
    return {"name": place.of.called, "version": place.of.version, "state": place.state, "reason": reason}


def described(served: Served) -> dict[str, Any]:
    """A model, for people and applications."""
    card = served.classifier.card
    evidence = served.classifier.evidence or {}
    return {
        "name": served.name,
        "version": served.version,
        "weights": served.weights,
        "classes": list(card.classes),
        "input": list(card.input),
        "threat": card.threat,
        "precision": evidence.get("precision"),
        "robust_accuracy": (evidence.get("robust_accuracy") or {}).get("artefact"),
        "provider": served.classifier.provider,
        "certificates": served.certificates,
        "suspect": served.teacher is not None,
    }


def _tensors(served: Served) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    classes = len(served.classifier.classes)
    outputs: list[dict[str, Any]] = [
        {"name": name, "datatype": "FP32", "shape": [-1, classes]} for name in ("logits", "probabilities")
    ]
    outputs.append({"name": "label", "datatype": "BYTES", "shape": [-1]})
    return {"name": wire.IMAGES, "datatype": "FP32", "shape": [-1, *served.shape]}, outputs


def metadata(served: Served, versions: list[str]) -> dict[str, Any]:
    """Its tensors."""
    images, outputs = _tensors(served)
    return {
        "name": served.name,
        "versions": versions,
        "platform": "onnxruntime_onnx",
        "inputs": [images],
        "outputs": outputs,
    }


def model_config(served: Served, config: Config) -> dict[str, Any]:
    """How it is batched, as Triton configures it."""
    images, outputs = _tensors(served)

    def tensor(of: dict[str, Any]) -> dict[str, Any]:
        kind = "TYPE_STRING" if of["datatype"] == "BYTES" else "TYPE_" + of["datatype"]
        return {"name": of["name"], "data_type": kind, "dims": of["shape"][1:] or [1]}

    return {
        "name": served.name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": config.batching.largest,
        "input": [tensor(images)],
        "output": [tensor(each) for each in outputs],
        "dynamic_batching": {
            "preferred_batch_size": config.batching.preferred,
            "max_queue_delay_microseconds": round(1000 * config.batching.delay_ms),
        },
    }


def stats(served: Served) -> dict[str, Any]:
    """Its counts."""
    return {"name": served.name, "version": served.version, "inference_count": served.inferences}
