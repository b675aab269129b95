"""The page: `fdml demo` serves it. What it computes is in `lab`, what it shows in `page`."""

import inspect
import random
import signal
import socket
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from fdml import pictures
from fdml.demo import api, choices, page, visit
from fdml.demo.exhibit import Exhibit
from fdml.demo.labs import Labs
from fdml.demo.quick import gr
from fdml.demo.theme import theme
from fdml.demo.visit import Stops, Visit
from fdml.errors import InputError

HERE = Path(__file__).parent
TOGETHER = 4
"""Attacks, certificates and curves that are computed at once; others wait in the queue."""

QUEUE = 64
"""Visitors who may wait; others are told to come back."""

MAX_UPLOAD = "8mb"

_PICK = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-place]');
  if (button) trigger('click', { place: Number(button.dataset.place) });
});
"""
_STATUS = "element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite');"
_ANY = "any other class"
_UNKNOWN = "the model's own answer"


def build(exhibits: Sequence[Exhibit]) -> tuple[gr.Blocks, Labs]:
    """The app of these exhibits, of which there is at least one, and its labs."""
    labs, stops = Labs(exhibits), Stops()
    start = exhibits[0]
    titles = [(exhibit.title, exhibit.name) for exhibit in exhibits]

    with gr.Blocks(title="fdml: attack a classifier", analytics_enabled=False, delete_cache=(600, 3600)) as app:
        seen = gr.State(visit.first(start))
        gr.HTML(
            '<div class="fd-head"><h1>Can you fool this classifier?</h1><p>Choose a picture and attack it: a change'
            " that a person hardly sees makes the <b>clean model</b> answer wrongly. The <b>defended model</b> was"
            " trained to withstand that.</p></div>"
        )
        models = gr.Radio(titles, value=start.name, label="Models", visible=len(exhibits) > 1, elem_id="models")
        with gr.Tabs():
            with gr.Tab("Attack", id="attack"), gr.Row():
                with gr.Column(scale=2, min_width=300):
                    thumbs = gr.HTML(str(page.thumbs(start, 0)), js_on_load=_PICK, elem_id="thumbs")
                    with gr.Row():
                        another = gr.Button("Another picture", size="sm", elem_id="another")
                        upload = gr.UploadButton(
                            "Upload a picture", file_types=["image"], type="filepath", size="sm", elem_id="upload"
                        )
                    with gr.Accordion("Draw one", open=False):
                        pad = gr.HTML(
                            '<div class="fd-pad"><canvas width="280" height="280" role="img" aria-label="A pad to draw'
                            ' on, white on black"></canvas><div class="buttons"><button type="button" class="use">Use'
                            ' the drawing</button><button type="button" class="clear">Clear</button></div></div>',
                            js_on_load=(HERE / "pad.js").read_text(encoding="utf-8"),
                            elem_id="pad",
                        )
                    method = gr.Dropdown(
                        [(text, name) for name, text in choices.METHODS.items()],
                        value="pgd-best",
                        label="Attack",
                        elem_id="method",
                    )
                    eps = gr.Slider(
                        0, choices.most_eps(start.norm, start), value=start.eps, label="Size of the change (eps)",
                        step=0.001, elem_id="eps",
                    )  # fmt: skip
                    with gr.Row():
                        go = gr.Button("Attack", variant="primary", elem_id="go")
                        halt = gr.Button("Stop", variant="stop", interactive=False, elem_id="halt")
                    with gr.Accordion("More", open=False, elem_id="more"):
                        norm = gr.Radio(
                            [(text, name) for name, text in choices.NORMS.items()],
                            value=start.norm,
                            label="What eps measures",
                        )
                        steps = gr.Slider(
                            1, choices.MAX_STEPS, value=20, step=1, label="Steps (Square, noise: pictures tried)",
                            elem_id="steps",
                        )  # fmt: skip
                        whom = gr.Radio(_whom(start), value="each", label="Whom to attack")
                        target = gr.Dropdown(
                            [_ANY, *start.classes], value=_ANY, label="Make it say (PGD and CW only)", elem_id="target"
                        )
                        label = gr.Dropdown(
                            [_UNKNOWN, *start.classes], value=_UNKNOWN, label="What the picture shows", elem_id="label"
                        )
                        seed = gr.Number(0, label="Seed of the random numbers", precision=0, minimum=0)
                with gr.Column(scale=5, min_width=320):
                    verdict = gr.HTML(js_on_load=_STATUS, elem_id="verdict")
                    compare = gr.HTML(elem_id="compare")
                    details = gr.HTML(elem_id="details")
                    keep = gr.DownloadButton(
                        "Keep this example (ZIP)", visible=False, size="sm", elem_id="keep", variant="secondary"
                    )
            with gr.Tab("How much each takes", id="curves"):
                gr.HTML(
                    '<p class="note">Every picture here is attacked with more and more room. Where a line falls, the'
                    " model is fooled; the defended one pays with a little accuracy at the left end.</p>"
                )
                curve_norm = gr.Radio(
                    [(text, name) for name, text in choices.NORMS.items()], value=start.norm, label="What eps measures"
                )
                measure = gr.Button("Measure", variant="primary", elem_id="measure")
                curves = gr.HTML(elem_id="curve", js_on_load=_STATUS)
            with gr.Tab("Certify", id="certify"):
                gr.HTML(
                    '<p class="note">An attack that fails proves nothing. A certificate does: it holds against every'
                    " change up to its radius, for the model that answers by a vote over noisy copies.</p>"
                )
                with gr.Row():
                    with gr.Column(scale=2, min_width=280):
                        whose = gr.Radio(_sides(start), value=start.sides[-1].key, label="Model")
                        sigma = gr.Slider(
                            0.01, 1.0, value=start.sigma, step=0.01, label="Noise (sigma)", elem_id="sigma"
                        )
                        samples = gr.Slider(
                            1000, choices.MAX_SAMPLES, value=20_000, step=1000, label="Noisy copies at most",
                            elem_id="samples",
                        )  # fmt: skip
                        with gr.Row():
                            prove = gr.Button("Certify this picture", variant="primary", elem_id="prove")
                            halt_proof = gr.Button("Stop", variant="stop", interactive=False, elem_id="halt-proof")
                    with gr.Column(scale=4, min_width=320):
                        certificate = gr.HTML(elem_id="certificate", js_on_load=_STATUS)
            with gr.Tab("Leaderboard", id="board"):
                gr.HTML(str(page.leaderboard(exhibits)), elem_id="leaderboard")
            with gr.Tab("What is this?", id="words"):
                gr.HTML((HERE / "templates" / "words.html").read_text(encoding="utf-8"))

        # What happens -------------------------------------------------------------------------------------------------

        def looked(now: Visit) -> tuple[Any, ...]:
            """The page with a picture that nobody has attacked yet."""
            exhibit = labs.exhibits[now.exhibit]
            faced = labs[now.exhibit].unattacked(now.image, now.label)
            words = "Press Attack and watch." if exhibit.sides[1:] else "Press Attack and see whether it holds."
            return (
                now,
                str(page.thumbs(exhibit, now.place)),
                gr.Dropdown(value=_known(now, exhibit)),
                str(page.headline(words)),
                str(page.unattacked(faced, exhibit)),
                "",
                gr.DownloadButton(visible=False),
            )

        looking = [seen, thumbs, label, verdict, compare, details, keep]

        def chosen(now: Visit, event: gr.EventData) -> tuple[Any, ...]:
            exhibit = labs.exhibits[now.exhibit]
            place = int(event.place)  # pyright: ignore[reportAttributeAccessIssue]
            if not 0 <= place < len(exhibit.images):
                raise InputError(f"there is no picture {place}: 0 to {len(exhibit.images) - 1}")
            return looked(visit.picked(exhibit, place))

        def other(now: Visit) -> tuple[Any, ...]:
            exhibit = labs.exhibits[now.exhibit]
            if not len(exhibit.images):
                raise InputError("there are no pictures of these models' data here: upload one or draw one")
            return looked(visit.picked(exhibit, random.randrange(len(exhibit.images))))

        def uploaded(now: Visit, file: str) -> tuple[Any, ...]:
            image = pictures.read(Path(file).read_bytes(), labs.exhibits[now.exhibit].input, Path(file).name)
            return looked(Visit(now.exhibit, image))

        def drawn(now: Visit, event: gr.EventData) -> tuple[Any, ...]:
            image = api.picture(str(event.picture), labs.exhibits[now.exhibit])  # pyright: ignore[reportAttributeAccessIssue]
            return looked(Visit(now.exhibit, image))

        def switched(name: str) -> tuple[Any, ...]:
            exhibit = labs.exhibits[name]
            now = visit.first(exhibit)
            shown = looked(now)
            return (
                *shown[:2],
                gr.Dropdown(choices=[_UNKNOWN, *exhibit.classes], value=_known(now, exhibit)),
                *shown[3:],
                gr.Slider(maximum=choices.most_eps(exhibit.norm, exhibit), value=exhibit.eps),
                gr.Radio(value=exhibit.norm),
                gr.Radio(choices=_whom(exhibit), value="each"),
                gr.Dropdown(choices=[_ANY, *exhibit.classes], value=_ANY),
                gr.Radio(value=exhibit.norm),
                "",
                gr.Radio(choices=_sides(exhibit), value=exhibit.sides[-1].key),
                gr.Slider(value=exhibit.sigma),
                "",
            )

        def attacked(
            now: Visit, method: str, norm: str, eps: float, steps: float, whom: str, target: str, label: str,
            seed: float, request: gr.Request,
        ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
            from fdml.demo.keep import packed

            _given({"the size of the change": eps, "the number of steps": steps, "the seed": seed})
            lab = labs[now.exhibit]
            exhibit = lab.exhibit
            asked = lab.asked(
                now.image,
                method=method,
                norm=norm,
                eps=eps,
                steps=int(steps),
                target=None if target == _ANY else target,
                label=None if label == _UNKNOWN else label,
                whom=whom,
                seed=int(seed),
            )
            stop = stops.begin(_session(request))
            buttons = gr.Button(interactive=False), gr.Button(interactive=True)
            done = gr.Button(interactive=True), gr.Button(interactive=False)
            for moment in lab.attack(asked, stop=stop, paced=True):
                shown = str(page.verdict(moment, exhibit)), str(page.compared(moment, exhibit))
                if moment.state == "running":
                    yield *shown, "", gr.DownloadButton(visible=False), *buttons
                    continue
                yield *shown, "", gr.DownloadButton(visible=False), *done
                details = page.losses(moment) + page.distances(lab, moment)
                with tempfile.TemporaryDirectory(prefix="fdml-") as folder:  # gradio copies what it is given
                    path = Path(folder) / "fdml-example.zip"
                    path.write_bytes(packed(lab, moment))
                    yield *shown, str(details), gr.DownloadButton(value=str(path), visible=True), *done

        def measured(name: str, norm: str, request: gr.Request) -> Iterator[str]:
            lab = labs[name]
            yield str(page.headline("Measuring: each model is attacked with more and more room …"))
            for found in lab.curves(norm, stops.begin(_session(request))):
                yield str(page.accuracy(found, lab.exhibit, norm))

        def proved(
            now: Visit, key: str, sigma: float, samples: float, request: gr.Request
        ) -> Iterator[tuple[Any, ...]]:
            _given({"the noise": sigma, "the number of noisy copies": samples})
            lab = labs[now.exhibit]
            stop = stops.begin(_session(request))
            buttons = gr.Button(interactive=False), gr.Button(interactive=True)
            text = ""
            for found in lab.certify(now.image, key, sigma=sigma, samples=int(samples), stop=stop):
                text = str(page.proof(found, now.image, lab.exhibit))
                yield text, *buttons
            yield text, gr.Button(interactive=True), gr.Button(interactive=False)

        def stopped(request: gr.Request) -> None:
            stops.stop(_session(request))

        def usual(method: str) -> Any:
            return gr.Slider(value=choices.USUAL_STEPS[method], interactive=method != "fgsm")

        def ranged(name: str, norm: str) -> Any:
            exhibit = labs.exhibits[name]
            return gr.Slider(maximum=choices.most_eps(norm, exhibit), value=choices.usual_eps(norm, exhibit))

        quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        slow = quick | {"concurrency_limit": TOGETHER, "concurrency_id": "compute"}
        in_place = _said(verdict, looking)
        app.load(in_place(looked), seen, looking, **quick)
        thumbs.click(in_place(chosen), seen, looking, **quick)
        another.click(in_place(other), seen, looking, **quick)
        upload.upload(in_place(uploaded), [seen, upload], looking, **quick)
        pad.click(in_place(drawn), seen, looking, **quick)
        parts = [*looking, eps, norm, whom, target, curve_norm, curves, whose, sigma, certificate]
        models.change(_said(verdict, parts)(switched), models, parts, **quick)
        method.change(usual, method, steps, **quick)
        norm.input(ranged, [models, norm], eps, **quick)
        attack_parts = [verdict, compare, details, keep, go, halt]
        go.click(
            _said(verdict, attack_parts, again=(go, halt))(attacked),
            [seen, method, norm, eps, steps, whom, target, label, seed],
            attack_parts,
            **slow,
        )
        halt.click(stopped, None, None, queue=False, **quick)
        measure.click(_said(curves, [curves])(measured), [models, curve_norm], curves, **slow)
        proof_parts = [certificate, prove, halt_proof]
        prove.click(
            _said(certificate, proof_parts, again=(prove, halt_proof))(proved),
            [seen, whose, sigma, samples],
            proof_parts,
            **slow,
        )
        halt_proof.click(stopped, None, None, queue=False, **quick)
        app.unload(stopped)
        api.add(labs)
    return app, labs


def _known(now: Visit, exhibit: Exhibit) -> str:
    return _UNKNOWN if now.label is None else exhibit.classes[now.label]


def _whom(exhibit: Exhibit) -> list[tuple[str, str]]:
    keys = {side.key for side in exhibit.sides}
    return [(text, name) for name, text in choices.WHOM.items() if name == "each" or (name in keys and len(keys) > 1)]


def _sides(exhibit: Exhibit) -> list[tuple[str, str]]:
    return [(side.name, side.key) for side in exhibit.sides]


def _session(request: gr.Request) -> str:
    return str(request.session_hash)


def _given(values: dict[str, float | None]) -> None:
    """Raises ``InputError`` for a number that the visitor left empty."""
    for name, value in values.items():
        if value is None:
            raise InputError(f"{name} is missing: give a number")


def _said(place: Any, outputs: Sequence[Any], again: tuple[Any, Any] | None = None) -> Callable[[Callable], Callable]:
    """Makes an event say what is wrong with its input at ``place``, in the page, and leave the other outputs as they
    are; ``again`` are the buttons to start and to stop, which then stand as before. A defect of ours is written to
    standard error, and the page says no more than that there was one."""

    def failed(error: Exception) -> Any:
        text = str(error) if isinstance(error, InputError) else "This did not work, and should have: the log says why."
        if not isinstance(error, InputError):
            traceback.print_exception(error)
        found: dict[Any, Any] = {place: str(page.headline(text, "error"))}
        if again is not None:
            found |= {again[0]: gr.Button(interactive=True), again[1]: gr.Button(interactive=False)}
        values = [found.get(each, gr.skip()) for each in outputs]
        return tuple(values) if len(values) > 1 else values[0]

    def wrapped(event: Callable) -> Callable:
        if inspect.isgeneratorfunction(event):

            @wraps(event)
            def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
                try:
                    yield from event(*args, **kwargs)
                except Exception as error:
                    yield failed(error)

            return stream

        @wraps(event)
        def plain(*args: Any, **kwargs: Any) -> Any:
            try:
                return event(*args, **kwargs)
            except Exception as error:
                return failed(error)

        return plain

    return wrapped


def launch(exhibits: Sequence[Exhibit], *, host: str, port: int, open_browser: bool = False) -> str:
    """Serves the page of these exhibits and returns its address; the models are loaded in the background.

    Raises ``InputError`` where the port is taken.
    """
    app, labs = build(exhibits)
    app.queue(max_size=QUEUE, default_concurrency_limit=TOGETHER)
    try:
        _, local, _ = app.launch(
            server_name=host,
            server_port=port or _free_port(host),
            share=False,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            theme=theme(),
            css_paths=[HERE / "demo.css"],
            footer_links=["api"],
            max_file_size=MAX_UPLOAD,
            ssr_mode=False,
            enable_monitoring=False,
            run_history=False,
            pwa=False,
        )
    except OSError as error:
        raise InputError(f"port {port} of {host} cannot be taken ({error}): choose another with --port") from None
    threading.Thread(target=labs.warm, name="fdml-warm", daemon=True).start()
    return local.rstrip("/")


def _free_port(host: str) -> int:
    """A port that nobody has: gradio's own choice counts up from 7860, where two that start at once meet."""
    with socket.create_server((host, 0)) as listener:
        return listener.getsockname()[1]


def wait() -> None:
    """Serves until SIGINT or SIGTERM comes."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
