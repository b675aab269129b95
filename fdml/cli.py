"""The command line: one short function a command. What a command needs is imported when it runs."""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import fdml
from fdml.errors import InputError, Stopped

app = typer.Typer(
    name="fdml",
    help="Train image classifiers that withstand adversarial examples, and show how far they do.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_BEGAN = time.monotonic()
"""A limit in seconds counts from here, so that it holds what imports take."""

# Which extra brings what a command may find missing.
_EXTRAS = {
    "torch": "train",
    "safetensors": "train",
    "jaxtyping": "train",
    "jinja2": "train",
    "filelock": "train",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "cpu",
    "sklearn": "train",
    "scipy": "train",
    "matplotlib": "train",
    "datasets": "hub",
    "gradio": "demo",
    "httptools": "serve",
    "msgspec": "serve",
    "prometheus_client": "serve",
    "python_multipart": "serve",
}

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines; no tables, no progress.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder that holds the data set's files; looked in first.")]
Extra = Annotated[
    str | None,
    typer.Option(metavar="npz:FILE", help="More training images, generated ones say; recipe key extra_share."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the default is a GPU where there is one.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fdml {fdml.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Examples:  fdml train  |  fdml train trades --data fashion-mnist --set epochs=10  |"
    "  fdml train --out runs/fdml-digits --resume"
)
def train(
    recipe: Annotated[str | None, typer.Argument(help="A name from `fdml recipes`. (default: fdml)")] = None,
    data: Annotated[str | None, typer.Option(help="A name from `fdml datasets`. (default: digits)")] = None,
    data_dir: DataDir = None,
    size: Annotated[int | None, typer.Option(help="Side in pixels, for folder: and hf: data.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. (default: runs/RECIPE-DATA)")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key.")] = None,
    extra: Extra = None,
    teacher: Annotated[Path | None, typer.Option(help="A model file to take as the teacher.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run folder stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a teacher on clean images and a defended student on adversarial ones."""
    from fdml.recipe import override
    from fdml.recipes import recipe as named
    from fdml.run import Run

    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other: go on with the run, or replace it")
    out = out or Path("runs") / f"{recipe or 'fdml'}-{_slug(data or 'digits')}"
    if resume and recipe is None and not set_ and (out / "recipe.json").exists():
        run = Run(out)
        chosen, data = run.recipe(), data or run.data()
    else:
        chosen = override(named(recipe or "fdml", data or "digits"), set_ or [])

    from fdml.data import load
    from fdml.threat import Threat
    from fdml.train import train as start

    Threat(chosen.norm, chosen.eps)  # refuses a wrong eps before any data is looked for
    if teacher is not None:
        fdml.read_card(teacher)
    loaded = load(data or "digits", data_dir=data_dir, size=size, val_fraction=chosen.val_fraction)
    if extra is not None:
        from fdml.data.extra import extend

        loaded = extend(loaded, extra)
    console = None if as_json else _console()
    summary = start(
        chosen, loaded, out, teacher=teacher, resume=resume, overwrite=overwrite, device=device, console=console
    )
    if as_json and summary:
        print(json.dumps(summary))


@app.command(
    epilog="Examples:  fdml evaluate runs/fdml-digits  |  fdml evaluate A.safetensors B.safetensors --suite quick  |"
    "  fdml evaluate model.onnx --data digits --eps 0.2 --attack square"
)
def evaluate(
    models: Annotated[
        list[Path], typer.Argument(help="Model files, ONNX files, bundles or run folders, side by side.")
    ],
    suite: Annotated[str, typer.Option(help="quick (minutes), standard (AutoAttack and more) or full.")] = "standard",
    protocol: Annotated[
        list[str] | None,
        typer.Option(help="white, gray, transfer, query, black or control; repeat it. (default: the suite's)"),
    ] = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="Run these attacks alone: names from `fdml attacks`; repeat it.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="A name from `fdml datasets`. (default: the first model's)")] = None,
    data_dir: DataDir = None,
    size: Annotated[int | None, typer.Option(help="Side in pixels, for folder: and hf: data.")] = None,
    norm: Annotated[str | None, typer.Option(help="linf, l2 or l1. (default: the first model's threat)")] = None,
    eps: Annotated[
        str | None, typer.Option(help="In pixel units, such as 8/255. (default: the model's threat)")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many test images.")] = 1000,
    out: Annotated[Path | None, typer.Option(help="Report folder. (default: runs/evaluate-MODEL)")] = None,
    surrogate: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="A model of the attacker's, by a name of `gray-…`.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the attacks' random numbers.")] = 0,
    rng: Annotated[str, typer.Option(help="image: a stream an image; reference: the published code's.")] = "image",
    adversarial: Annotated[bool, typer.Option("--adversarial", help="Also write adversarial-MODEL.npz.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the report folder stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the evaluation in the folder.")] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Attack models on test images, and report what stands."""
    from fdml.evaluate.target import target

    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other: go on with the evaluation, or replace it")
    given = {}
    for one in surrogate or []:
        name, equals, file = one.partition("=")
        if not equals or not name or not file:
            raise InputError(f"--surrogate {one!r}: write NAME=FILE, for example gray-teacher=teacher.safetensors")
        given[name] = Path(file)
    threat, name = target(models[0], norm, eps, data)

    from fdml.data import load
    from fdml.judge import judge

    loaded = load(name, data_dir=data_dir, size=size)
    report = judge(
        models,
        loaded,
        threat,
        out or Path("runs") / f"evaluate-{_slug(models[0].stem)}",
        suite=suite,
        protocols=protocol or (),
        attacks=attack or (),
        limit=limit,
        seed=seed,
        rng=rng,
        given=given,
        adversarial=adversarial,
        resume=resume,
        overwrite=overwrite,
        device=device,
        console=None if as_json else _console(),
    )
    if as_json and report:
        print(json.dumps(report))


@app.command(
    epilog="Examples:  fdml attack runs/fdml-digits/student.safetensors digit.png  |"
    "  fdml attack model.safetensors *.png --attack square --eps 8/255 --out crafted  |"
    "  fdml attack model.safetensors 4.png --attack pgd20 --steps 50 --label 4 --target 9"
)
def attack(
    model: Annotated[Path, typer.Argument(help="A .safetensors file of `fdml train`.")],
    images: Annotated[list[Path], typer.Argument(help="PNG, JPEG, WebP or BMP files.")],
    name: Annotated[str, typer.Option("--attack", help="A name from `fdml attacks`.")] = "apgd-ce",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps, draws or queries of the attack. (default: the attack's own)")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="The true class of the images. (default: the model's answer)")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The class to be answered. (default: any but the true one)")
    ] = None,
    guides: Annotated[
        Path | None, typer.Option(help="An .npz file of images x and labels y, for the attacks on features.")
    ] = None,
    norm: Annotated[str | None, typer.Option(help="linf, l2 or l1. (default: the model's threat)")] = None,
    eps: Annotated[
        str | None, typer.Option(help="In pixel units, such as 8/255. (default: the model's threat)")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the adversarial images.")] = Path("adversarial"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the attack's random numbers.")] = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Make adversarial images of pictures."""
    from dataclasses import asdict

    from fdml.evaluate.target import target as threat_of

    threat, _ = threat_of(model, norm, eps, None)

    from fdml.craft import craft

    found = craft(
        model,
        images,
        threat,
        out,
        attack=name,
        steps=steps,
        label=label,
        target=target,
        guides=guides,
        seed=seed,
        device=device,
    )
    if as_json:
        print(json.dumps([asdict(one) for one in found]))
        return
    from rich.table import Column, Table
    from rich.text import Text

    table = Table("image", "answer", "answer under attack", Column("distance", justify="right"), "picture")
    for one in found:
        was, now = (
            Text(f"{answer} {100 * p:.1f}%")
            for answer, p in ((one.before, one.before_probability), (one.after, one.after_probability))
        )
        now.stylize("red" if one.fooled else "green")
        table.add_row(Text(one.image), was, now, f"{one.distance:.4g}", Text(one.picture))
    _console().print(table)
    _console().print(f"{sum(one.fooled for one in found)} of {len(found)} fooled by {name} inside {threat}")


@app.command(
    epilog="Examples:  fdml reproduce  |  fdml reproduce fashion-mnist --data-dir ~/data  |"
    "  fdml reproduce digits --smoke --row pgd-at --row fdml  |  fdml reproduce mnist --row trades:epochs=3  |"
    "  fdml reproduce cifar10-linf --set architecture=wrn-28-10"
)
def reproduce(
    table: Annotated[str | None, typer.Argument(help="A table's name; without one they are listed.")] = None,
    row: Annotated[
        list[str] | None, typer.Option(help="Rows in place of the table's: RECIPE or RECIPE:key=value,…; repeat it.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds. (default: the table's)")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of every row.")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Toy size: minutes, and no figure to believe.")] = False,
    split: Annotated[
        str | None, typer.Option(help="val to choose by: validation images judge. (default: test)")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="How many images judge. (default: the table's)")] = None,
    data: Annotated[str | None, typer.Option(help="A data set in the place of the table's own.")] = None,
    data_dir: DataDir = None,
    extra: Extra = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs. (default: runs/reproduce-TABLE)")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train and attack the rows of a table, and collect it; goes on where it stopped."""
    from dataclasses import asdict

    from fdml import reproduce as tables
    from fdml.outcomes import summary

    if table is None:
        _listing(dict(tables.described()), as_json)
        return
    found = tables.reproduce(
        table,
        out
        or Path("runs") / "-".join(["reproduce", table, *(["smoke"] if smoke else []), *([split] if split else [])]),
        rows=row or (),
        seeds=seeds,
        keys=set_ or (),
        small=smoke,
        split=split,
        limit=limit,
        source=data,
        data_dir=data_dir,
        extra=extra,
        device=device,
        console=None if as_json else _console(),
    )
    if as_json:
        print(json.dumps([asdict(each) for each in found]))
    else:
        _console().print(summary(found, tables.TABLES[table].ours))


@app.command(epilog="Example:  fdml evaluate runs/fdml-digits --attack autoattack")
def attacks(as_json: Json = False) -> None:
    """List the attacks."""
    from fdml.evaluate.suites import describe

    _listing(describe(), as_json)


@app.command(
    epilog="Examples:  fdml certify runs/fdml-smooth-digits  |  fdml certify model.onnx --data mnist --eps 0.1  |"
    "  fdml certify net.onnx --vnnlib property.vnnlib --timeout 60  |  fdml certify MODEL --verify certificates.jsonl"
)
def certify(
    model: Annotated[Path, typer.Argument(help="A model file, run folder, bundle or ONNX file.")],
    method: Annotated[
        str | None,
        typer.Option(
            help="smoothing (l2), cohen (the published one) or bounds (linf, l2). (default: as it was trained)"
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="A name from `fdml datasets`. (default: the model's)")] = None,
    data_dir: DataDir = None,
    size: Annotated[int | None, typer.Option(help="Side in pixels, for folder: and hf: data.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Noise of smoothing. (default: that of the training)")] = None,
    radius: Annotated[
        list[float] | None, typer.Option(help="A radius to ask about; repeat it. (default: 1, 2 and 3 sigma)")
    ] = None,
    alpha: Annotated[float, typer.Option(help="The chance that a certificate of smoothing errs.")] = 0.001,
    n0: Annotated[int, typer.Option("--n0", help="Samples that choose the class.")] = 100,
    n: Annotated[int, typer.Option("-n", "--n", help="Samples that count it: at most, for cohen exactly.")] = 100_000,
    precision: Annotated[str, typer.Option(help="fp32 or bf16: what the network is smoothed in.")] = "fp32",
    norm: Annotated[str | None, typer.Option(help="linf or l2, for bounds. (default: the model's threat)")] = None,
    eps: Annotated[str | None, typer.Option(help="For bounds, in pixel units, such as 2/255.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds an image, or for --vnnlib in all.")] = 30.0,
    limit: Annotated[int, typer.Option(min=1, help="How many test images.")] = 500,
    skip: Annotated[int, typer.Option(min=1, help="Take every N-th test image.")] = 1,
    attack: Annotated[bool, typer.Option("--attack/--no-attack", help="Also attack what is not certified.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Smooth with another sigma than the model's own.")] = False,
    vnnlib: Annotated[Path | None, typer.Option(help="A property file: print sat, unsat, unknown or timeout.")] = None,
    verify: Annotated[Path | None, typer.Option(help="Check this certificates file against the model.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder, or file for --vnnlib. (default: runs/certify-MODEL)")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise and the searches.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the folder stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the certificates in the folder.")] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Prove that no perturbation inside a radius changes the answer."""
    if vnnlib is not None:
        from fdml.certify.competition import decide

        verdict = decide(model, vnnlib, timeout=timeout, out=out, seed=seed, began=_BEGAN)
        print(json.dumps(verdict.to_dict()) if as_json else verdict.word)
        return
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other: go on with the certificates, or replace them")

    from fdml.evaluate.target import target

    threat, name = target(model, norm, eps, data)

    from fdml.data import load

    loaded = load(name, data_dir=data_dir, size=size)
    console = None if as_json else _console()
    if verify is not None:
        from fdml.certify.recheck import recheck

        found = recheck(verify, model, loaded, limit=limit, seed=seed, device=device, console=console)
        if as_json:
            print(json.dumps(found))
        raise typer.Exit(0 if found["valid"] else 1)

    from fdml.certify.command import certify_data

    found = certify_data(
        model,
        loaded,
        out or Path("runs") / f"certify-{_slug(model.stem)}",
        method=method,
        sigma=sigma,
        radii=radius or (),
        alpha=alpha,
        n0=n0,
        n=n,
        threat=threat,
        timeout=timeout,
        limit=limit,
        skip=skip,
        seed=seed,
        precision=precision,
        attack=attack,
        force=force,
        resume=resume,
        overwrite=overwrite,
        device=device,
        console=console,
    )
    if as_json and found:
        print(json.dumps(found))


@app.command(
    epilog="Examples:  fdml export runs/fdml-digits  |  fdml export runs/fdml-digits --int8 --out bundle  |"
    "  fdml export student.safetensors --trt --trt-backend rtx --target sm_89"
)
def export(
    model: Annotated[Path, typer.Argument(help="A .safetensors file or a run folder.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="ONNX, which every bundle holds.")] = True,
    trt: Annotated[bool, typer.Option("--trt", help="Also TensorRT engines.")] = False,
    trt_backend: Annotated[str, typer.Option(help="auto, torch-tensorrt, ort or rtx.")] = "auto",
    target: Annotated[
        list[str] | None, typer.Option(help="Compute capability to build for ahead of time, such as sm_89; repeat it.")
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Eight bits, calibrated on clean and adversarial images.")
    ] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Half precision.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Also a model that takes bytes: uint8, NHWC.")] = False,
    bounds: Annotated[
        bool, typer.Option("--bounds", help="Also bounds.onnx, which proves answers in linf where it is deployed.")
    ] = False,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Also the run's clean teacher, for a hint of adversarial images.")
    ] = False,
    triton: Annotated[Path | None, typer.Option(help="Also a Triton model repository in this folder.")] = None,
    data: Annotated[str | None, typer.Option(help="A name from `fdml datasets`. (default: the model's)")] = None,
    data_dir: DataDir = None,
    size: Annotated[int | None, typer.Option(help="Side in pixels, for folder: and hf: data.")] = None,
    norm: Annotated[str | None, typer.Option(help="linf, l2 or l1. (default: the model's threat)")] = None,
    eps: Annotated[str | None, typer.Option(help="Of the attacks, in pixel units, such as 8/255.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Test images of the evidence. (default: 1,000; 128 for large models)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The bundle's folder. (default: bundles/MODEL)")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle in the folder.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write it although the evidence fails, marked so.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the attacks.")] = 0,
    as_json: Json = False,
) -> None:
    """Make a bundle to deploy, with the evidence that it is as robust as what was evaluated."""
    if int8 and fp16:
        raise InputError("--int8 and --fp16 exclude each other: one bundle has one precision")
    from fdml.data import load
    from fdml.evaluate.target import target as aim
    from fdml.export.command import Wish
    from fdml.export.command import export as run

    threat, name = aim(model, norm, eps, data)
    wish = Wish(
        precision="int8" if int8 else "fp16" if fp16 else "fp32",
        raw=raw,
        bounds=bounds,
        teacher=teacher,
        tensorrt=trt_backend if trt else None,
        targets=tuple(target or ()),
        triton=triton,
    )
    folder = model.stem if model.is_dir() or model.stem != "student" else model.resolve().parent.name
    where = out or Path("bundles") / folder
    loaded = load(name, data_dir=data_dir, size=size)
    console = None if as_json else _console()
    found = run(
        model, loaded, where, threat, wish, limit=limit, seed=seed, force=force, overwrite=overwrite, console=console
    )
    if as_json:
        print(json.dumps(found))
    else:
        print(f"bundle: {where}")


@app.command(epilog="Example:  fdml bench runs/fdml-digits bundles/fdml-digits --batch 1 --batch 64")
def bench(
    models: Annotated[list[Path], typer.Argument(help="Model files, run folders, bundles or ONNX files.")],
    batch: Annotated[list[int] | None, typer.Option(help="A batch size; repeat it. (default: 1, 8, 64)")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds for each form and batch size.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that each takes.")] = 10,
    compiled: Annotated[bool, typer.Option("--compile", help="Also torch.compile, which takes a minute.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads. (default: torch's)")] = None,
    out: Annotated[Path | None, typer.Option(help="Also a picture: a PNG file.")] = None,
    as_json: Json = False,
) -> None:
    """Time every form of a model side by side: latency and throughput."""
    import torch

    from fdml.export.bench import bench as run
    from fdml.export.bench import bench_table, draw

    if threads is not None:
        torch.set_num_threads(threads)
    console = _console()
    settings: dict[str, Any] = {"seconds": seconds, "rounds": rounds, "compiled": compiled}
    if as_json or not console.is_terminal:
        found = run(models, batches=batch or (1, 8, 64), **settings)
    else:
        with console.status("") as status:
            found = run(models, batches=batch or (1, 8, 64), watch=status.update, **settings)
    if out is not None:
        draw(found, out)
    if as_json:
        print(json.dumps(found))
    else:
        console.print(bench_table(found))


@app.command(
    epilog="Examples:  fdml serve bundles/fdml-digits  |  fdml serve digits=bundles/a digits:2=bundles/b --port 8080  |"
    "  fdml serve --config serve.toml"
)
def serve(
    bundles: Annotated[
        list[str] | None, typer.Argument(help="Bundles of `fdml export`: BUNDLE, NAME=BUNDLE or NAME:VERSION=BUNDLE.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file; flags come before what it says.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. (default: 127.0.0.1)")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port. (default: 8000; 0: a free one)")] = None,
    provider: Annotated[str | None, typer.Option(help="auto, cpu, cuda or tensorrt. (default: auto)")] = None,
    threads: Annotated[int | None, typer.Option(min=0, help="Threads of a batch. (default: 0, all cores)")] = None,
    instances: Annotated[int | None, typer.Option(min=1, help="Batches that run at once. (default: 1)")] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Largest batch. (default: 64)")] = None,
    delay_ms: Annotated[float | None, typer.Option(min=0, help="How long a batch is waited for. (default: 2)")] = None,
    queue: Annotated[int | None, typer.Option(min=1, help="Images that may wait. (default: 1024)")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds to answer a request in. (default: 10)")] = None,
    max_samples: Annotated[int | None, typer.Option(help="Random copies of a certificate. (default: 10,000)")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, a PEM file.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, a PEM file.")] = None,
    allow_admin: Annotated[bool, typer.Option("--allow-admin", help="Models may be loaded and unloaded.")] = False,
    log: Annotated[str | None, typer.Option(help="requests or errors. (default: requests)")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Send spans by OpenTelemetry.")] = False,
    new_token: Annotated[
        str | None, typer.Option(help="Make a bearer token for this name, print it with its line of the file, and end.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve bundles: the Open Inference Protocol v2, and pictures with certificates."""
    from fdml.serve.config import Config, changed, model_of, read_config

    if new_token is not None:
        import hashlib
        import secrets

        token = secrets.token_urlsafe(32)
        digest = hashlib.sha256(token.encode()).hexdigest()
        print(f'token: {token}\n\n[[tokens]]\nname = {json.dumps(new_token)}\nsha256 = "{digest}"')
        return
    if (tls_cert is None) != (tls_key is None):
        raise InputError("--tls-cert and --tls-key belong together: give both or none")
    found = Config() if config is None else read_config(config)
    found = changed(
        found,
        host=host,
        port=port,
        compute__provider=provider,
        compute__threads=threads,
        compute__instances=instances,
        batching__largest=max_batch,
        batching__delay_ms=delay_ms,
        batching__queue=queue,
        certify__max_samples=max_samples,
        deadline_seconds=deadline,
        log=log,
        allow_admin=allow_admin or None,
        tracing=trace or None,
        tls=None if tls_cert is None else {"cert": str(tls_cert), "key": str(tls_key)},
        models=[model_of(word) for word in bundles] if bundles else None,
    ).checked()
    from fdml.serve.server import serve as run

    def started(address: str) -> None:
        text = f"fdml serves {address} (addresses: {address}/docs)"
        print(json.dumps({"address": address}) if as_json else text, flush=True)

    run(found, started=started)


@app.command(
    epilog="Examples:  fdml demo  |  fdml demo runs/fdml-digits --report runs/evaluate-fdml-digits  |"
    "  fdml demo clean.safetensors defended.safetensors --data cifar10 --data-dir ~/data"
)
def demo(
    models: Annotated[
        list[Path] | None,
        typer.Argument(help="Run folders, or one or two model files, the clean one first. (default: two small pairs)"),
    ] = None,
    report: Annotated[
        list[Path] | None, typer.Option(help="A folder of `fdml evaluate`, for the leaderboard; repeat it.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Take pictures from this data set. (default: the model's)")] = None,
    data_dir: DataDir = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.")] = 7860,
    browser: Annotated[bool, typer.Option("--browser", help="Open it in a browser.")] = False,
    as_json: Json = False,
) -> None:
    """Open a page to attack models by hand, and to compare and certify them."""
    from fdml.demo import exhibit

    if not models and (report or data):
        raise InputError("--report and --data go with models: name a run folder or a model file first")
    shown = exhibit.opened(models, report or (), data=data, data_dir=data_dir) if models else exhibit.shipped()

    from fdml.demo.app import launch, wait

    address = launch(shown, host=host, port=port, open_browser=browser)
    text = f"fdml demo: {address} (Ctrl-C ends it)"
    print(json.dumps({"address": address}) if as_json else text, flush=True)
    wait()


@app.command(epilog="Examples:  fdml predict runs/fdml-digits digit.png --top 3  |  fdml predict bundle *.png")
def predict(
    model: Annotated[Path, typer.Argument(help="A bundle, an .onnx file, a .safetensors file or a run folder.")],
    images: Annotated[list[Path], typer.Argument(help="PNG, JPEG, WebP or BMP files.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 1,
    provider: Annotated[str, typer.Option(help="For bundles: auto, cpu, cuda or tensorrt.")] = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Classify images."""
    file = model / "student.safetensors" if (model / "student.safetensors").exists() else model
    answers: list[dict[str, Any]] = []
    for path, best, suspect in _answers(file, images, top, provider, device):
        named = [{"class": name, "probability": round(p, 6)} for name, p in best]
        answers.append({"image": str(path), "top": named})
        if suspect is not None:
            answers[-1]["suspect"] = round(suspect, 6)
    if as_json:
        print(json.dumps(answers))
        return
    from rich.table import Column, Table
    from rich.text import Text

    hinted = any("suspect" in answer for answer in answers)
    columns = ["probability", *(["suspect"] if hinted else [])]
    table = Table(Column("image", overflow="fold"), Column("class", overflow="fold"), *columns)
    for answer in answers:
        for place, found in enumerate(answer["top"]):
            # Text, not markup: names may hold brackets.
            names = Text("" if place else answer["image"]), Text(found["class"])
            hint = [] if place or not hinted else [f"{answer['suspect']:.2f}"]
            table.add_row(*names, f"{100 * found['probability']:.1f}%", *hint)
    _console().print(table)


def _answers(
    model: Path, images: list[Path], top: int, provider: str, device: str | None
) -> Iterator[tuple[Path, Sequence[tuple[str, float]], float | None]]:
    """For each image its most probable classes, by the runtime, or for a ``.safetensors`` file by torch; and its
    suspicion, where a bundle has a teacher."""
    if model.suffix != ".safetensors":
        from fdml.pixels import Intake
        from fdml.runtime import RobustClassifier
        from fdml.suspicion import suspicion

        classifier = RobustClassifier.load(model, provider)
        top = min(top, len(classifier.classes))
        for path in images:
            pixels = Intake([path], classifier.input).pixels(0, 1)
            (found,) = classifier.predict(pixels, top)
            suspect = None
            if classifier.has_teacher:
                suspect = float(suspicion(found.logits[None], classifier.teacher_logits(pixels))[0])
            yield path, found.top, suspect
        return
    import torch

    from fdml.checkpoint import load
    from fdml.pictures import read
    from fdml.world import World

    card = fdml.read_card(model)
    where = World.join(device).device
    network = load(model, device=where)
    for path in images:
        # A copy: the array of an image is read-only, which torch warns of.
        pixels = torch.tensor(read(path, card.input), device=where)[None].float() / 255
        with torch.inference_mode():
            best = network(pixels).softmax(1)[0].topk(min(top, len(card.classes)))
        found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        yield path, [(card.classes[i], p) for p, i in found], None


@app.command(epilog="Example:  fdml info runs/fdml-digits")
def info(
    path: Annotated[Path, typer.Argument(help="A .safetensors file, a bundle, or the folder of a run.")],
    as_json: Json = False,
) -> None:
    """Say what a model, a bundle or a run is, without loading it."""
    from fdml import bundle
    from fdml.run import Run

    if (path / bundle.SUMS).exists():
        found = bundle.read(path)
        if as_json:
            print(json.dumps({"card": json.loads(found.card.to_json()), "evidence": found.evidence}))
            return
        _console().print(_card_table(path, found.card, f"{found.evidence['precision']}, ONNX"))
        print(f"evidence: {'passed' if found.passed else 'failed'}; sums: right for {len(found.files)} files")
        return
    file = path
    summary: dict[str, Any] | None = None
    if path.is_dir():
        run = Run(path)
        recipe = run.recipe()
        summary = run.summary()
        file = run.model("student")
        if not file.exists():
            epochs = sum(row["role"] == "student" for row in run.rows())
            raise InputError(
                f"{path}: the student is not finished ({epochs} of {recipe.epochs} epochs): fdml train --resume"
            )
    card = fdml.read_card(file)
    closing = None
    if summary is not None:
        from fdml.tables import closing_table

        try:
            closing = closing_table(summary)
        except (KeyError, IndexError, TypeError, ValueError):
            raise InputError(f"{path}/report/summary.json is not a summary of a run: fdml train --resume") from None
    if as_json:
        print(json.dumps({"card": json.loads(card.to_json()), "summary": summary}))
        return
    from fdml.card import header

    weights = sum(_product(tensor.shape) for tensor in header(file).tensors.values())
    _console().print(_card_table(file, card, f"{weights:,} weights and statistics"))
    if closing is not None:
        _console().print(closing)


def _card_table(file: Path, card: Any, weights: str) -> Any:
    from rich.table import Table
    from rich.text import Text

    from fdml.card import threat_words

    threat = "none: trained on clean images" if card.threat is None else threat_words(**card.threat)
    table = Table(show_header=False, title=Text(str(file), style="italic"), box=None, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    options = [f"{name}={value}" for name, value in card.options.items()]
    rows = {
        "role": card.role,
        "architecture": f"{' '.join([card.architecture, *options])}, {weights}",
        "input": f"{card.input[0]} x {card.input[1]} x {card.input[2]}, pixels in [0, 1]",
        "classes": f"{len(card.classes)}: {', '.join(card.classes[:10])}{', …' if len(card.classes) > 10 else ''}",
        "threat": threat,
        "recipe": f"{card.recipe.get('name', '?')}, seed {card.seed}",
        "data": f"{card.data['name']}, fingerprint {card.data['fingerprint'][:12]}",
        "metrics": json.dumps(card.metrics),
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(card.versions.items())),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


@app.command(epilog="Example:  fdml recipes fdml --data fashion-mnist")
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show every key of this recipe.")] = None,
    data: Annotated[str, typer.Option(help="The data set whose settings apply.")] = "digits",
    as_json: Json = False,
) -> None:
    """List the recipes, or the keys of one."""
    from fdml.recipes import RECIPES
    from fdml.recipes import recipe as named

    if name is not None:
        _listing(named(name, data).to_dict(), as_json)
    else:
        _listing({name: (make.__doc__ or "").strip() for name, make in RECIPES.items()}, as_json)


@app.command(epilog="Example:  fdml train --data fashion-mnist")
def datasets(as_json: Json = False) -> None:
    """List the data sets."""
    from fdml.data import CATALOGUE

    _listing(CATALOGUE, as_json)


def main() -> None:
    """Runs a command; a mistake of the user's becomes one line and the exit status 2."""
    try:
        app(prog_name="fdml")  # also where it runs as `python -m fdml`
    except InputError as error:
        _fail(str(error), 2)
    except Stopped as stopped:
        _fail(str(stopped), stopped.code)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRAS:
            raise
        _fail(f"this needs {module}, which is not installed: pip install 'fdml[{_EXTRAS[module]}]'", 2)


def _fail(message: str, code: int) -> None:
    print(f"fdml: {message}", file=sys.stderr)
    sys.exit(code)


def _console() -> Any:
    from rich.console import Console

    # Outside a terminal rich takes 80 columns and would break paths and tables in the middle.
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=120)


def _listing(rows: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows))
        return
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")


def _slug(data: str) -> str:
    """A data set's name as part of a folder's."""
    kind, _, rest = data.partition(":")
    return f"{kind}-{Path(rest).stem}" if rest else kind


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
