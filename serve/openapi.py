"""The OpenAPI document of the server, and the page that shows it."""

from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any

import fdml
from fdml.serve.model import Served

_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_TENSOR_DATA = {"type": "array", "items": {"type": "number"}, "description": "Flat, in row order."}
_OUTPUT = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"type": "string"},
        "datatype": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "data": {"type": "array", "items": {}},
        "parameters": {"type": "object"},
    },
}
_INFER = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": {
            "type": "object",
            "properties": {"timeout": {"type": "integer", "minimum": 1, "description": "Microseconds."}},
        },
        "inputs": {
            "type": "array",
            "minItems": 1,
            "maxItems": 1,
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype", "data"],
                "properties": {
                    "name": {"const": "images"},
                    "shape": {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 1},
                        "minItems": 4,
                        "maxItems": 4,
                        "description": "[n, channels, height, width] of the model.",
                    },
                    "datatype": {"enum": ["FP32", "FP64", "FP16"]},
                    "data": _TENSOR_DATA | {"description": "Pixels in [0, 1], flat or nested."},
                },
            },
        },
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"enum": ["logits", "probabilities", "label"]},
                    "parameters": {"type": "object"},
                },
            },
        },
    },
}
_INFERRED = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {
        "id": {"type": "string"},
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "outputs": {"type": "array", "items": _OUTPUT},
    },
}
_CERTIFIED = {
    "type": "object",
    "required": ["norm", "radius", "asked", "holds", "label", "alpha", "samples", "method", "abstained"],
    "properties": {
        "norm": {"enum": ["l2", "linf"]},
        "radius": {"type": "number", "description": "What was shown, in pixel units; 0 for nothing."},
        "asked": {"type": "number"},
        "holds": {"type": "boolean", "description": "Whether the radius that was asked for is shown."},
        "label": {"type": ["string", "null"], "description": "The answer that is certified; null for none."},
        "alpha": {"type": "number", "description": "The chance of an error; 0 for a proof."},
        "samples": {"type": "integer"},
        "method": {"enum": ["smoothing", "bounds"]},
        "abstained": {"type": "boolean", "description": "Whether nothing was shown."},
    },
}
_CLASS = {
    "type": "object",
    "required": ["label", "index", "probability"],
    "properties": {"label": {"type": "string"}, "index": {"type": "integer"}, "probability": {"type": "number"}},
}
_CLASSIFIED = {
    "type": "object",
    "required": ["model", "version", "weights", "label", "index", "probability", "top", "probabilities"],
    "properties": {
        "model": {"type": "string"},
        "version": {"type": "string"},
        "weights": {"type": "string", "description": "SHA-256 of the network."},
        "label": {"type": "string"},
        "index": {"type": "integer"},
        "probability": {"type": "number"},
        "top": {"type": "array", "items": {"$ref": "#/components/schemas/Class"}},
        "probabilities": {"type": "array", "items": {"type": "number"}},
        "certified": {"$ref": "#/components/schemas/Certified"},
        "suspect": {
            "type": "number",
            "description": "From 0 to 1, how far the clean teacher disagrees: a hint, which an attacker can avoid.",
        },
    },
}
_ANY = {"type": "object"}


@cache
def document(admin: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document; with ``admin`` also what loads and unloads models."""
    model, version = _parameter("model", "Name of a model."), _parameter("version", "Version of a model.")
    classify = _operation(
        "Classify an image",
        "Classified",
        body={
            "required": True,
            "content": {
                "image/*": {"schema": {"type": "string", "format": "binary"}},
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["image"],
                        "properties": {"image": {"type": "string", "format": "binary"}},
                    }
                },
            },
        },
        parameters=[
            _query("top_k", {"type": "integer", "minimum": 1}, "Classes to name. (default: 3)"),
            _query("certify", {"type": "number", "minimum": 0}, "A radius in pixel units to certify the answer at."),
            _query("norm", {"enum": ["l2", "linf"]}, "Norm of that radius. (default: what the model is made for)"),
            _query("samples", {"type": "integer", "minimum": 100}, "Random copies that a certificate may take."),
            _query("suspect", {"type": "boolean"}, "false leaves the teacher's hint out."),
            _query("timeout_ms", {"type": "number", "minimum": 1}, "Give up after so many milliseconds."),
        ],
    )
    infer = _operation(
        "Classify a batch of tensors (Open Inference Protocol v2)",
        "Inferred",
        body={"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Infer"}}}},
    )
    paths: dict[str, dict[str, Any]] = {
        "/v1/models": {"get": _operation("The models", "Models")},
        "/v1/models/{model}": {"parameters": [model], "get": _operation("A model", "Any")},
        "/v1/models/{model}/classify": {"parameters": [model], "post": classify},
        "/v1/models/{model}/versions/{version}/classify": {"parameters": [model, version], "post": classify},
        "/v2": {"get": _operation("The server", "Any")},
        "/v2/health/live": {"get": _operation("Whether the server lives", None)},
        "/v2/health/ready": {"get": _operation("Whether all models are ready", None)},
        "/v2/models/stats": {"get": _operation("Counts of all models", "Any")},
        "/metrics": {"get": _operation("Counts for Prometheus", None)},
    }
    for base, where in (
        ("/v2/models/{model}", [model]),
        ("/v2/models/{model}/versions/{version}", [model, version]),
    ):
        paths[base] = {"parameters": where, "get": _operation("The tensors of a model", "Any")}
        paths[f"{base}/ready"] = {"parameters": where, "get": _operation("Whether a model is ready", None)}
        paths[f"{base}/config"] = {"parameters": where, "get": _operation("How a model is batched", "Any")}
        paths[f"{base}/stats"] = {"parameters": where, "get": _operation("Counts of a model", "Any")}
        paths[f"{base}/infer"] = {"parameters": where, "post": infer}
    if admin:
        paths["/v2/repository/index"] = {"post": _operation("All models and their state", "Any")}
        for verb in ("load", "unload"):
            paths[f"/v2/repository/models/{{model}}/{verb}"] = {
                "parameters": [model],
                "post": _operation(f"{verb.capitalize()} a model", None),
            }
    return {
        "openapi": "3.1.0",
        "info": {"title": "fdml", "version": fdml.__version__, "description": "Robust image classifiers."},
        "paths": paths,
        "components": {
            "schemas": {
                "Error": _ERROR,
                "Infer": _INFER,
                "Inferred": _INFERRED,
                "Certified": _CERTIFIED,
                "Class": _CLASS,
                "Classified": _CLASSIFIED,
                "Models": {
                    "type": "object",
                    "required": ["models"],
                    "properties": {"models": {"type": "array", "items": {"type": "object"}}},
                },
                "Any": {},
            },
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"bearer": []}],
    }


def page(models: Iterable[Served], admin: bool) -> bytes:
    """The document as one HTML page, without scripts and without anything from elsewhere."""
    rows = [
        (
            each.name,
            each.version,
            " x ".join(map(str, each.shape)),
            len(each.classifier.classes),
            " ".join(each.certificates),
        )
        for each in models
    ]
    return _page(tuple(rows), admin)


@lru_cache(maxsize=1)
def _page(models: tuple[tuple[str, str, str, int, str], ...], admin: bool) -> bytes:
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("fdml.serve", "."), autoescape=True, trim_blocks=True)
    rows = [
        (verb.upper(), path, operation)
        for path, item in document(admin)["paths"].items()
        for verb, operation in item.items()
        if verb != "parameters"
    ]
    template = environment.get_template("docs.jinja")
    return template.render(version=fdml.__version__, models=models, rows=rows).encode()


def _operation(
    summary: str, schema: str | None, *, body: dict[str, Any] | None = None, parameters: list[Any] | None = None
) -> dict[str, Any]:
    good: dict[str, Any] = {"description": "The answer."}
    if schema is not None:
        good["content"] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    bad = {
        "description": "An error, in one line.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    statuses = ["400", "401", "403", "404", "405", "413", "503"]
    found: dict[str, Any] = {"summary": summary, "responses": {"200": good, **dict.fromkeys(statuses, bad)}}
    if body is not None:
        found["requestBody"] = body
        found["responses"] |= {"415": bad, "504": bad}
    if schema is None:  # ready has no body either way
        found["responses"]["503"] = found["responses"]["404"] = {"description": "It is not."}
    if parameters:
        found["parameters"] = parameters
    return found


def _parameter(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "description": description, "schema": {"type": "string"}}


def _query(name: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": description, "schema": schema}
