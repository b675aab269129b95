"""An exported network in ONNX Runtime: opened on the provider that was asked for, and checked against its card."""

import io
import json
import os
import shutil
import stat
import tempfile
import weakref
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdml.bundle import Bundle, BundleError
from fdml.card import KEY, Card
from fdml.errors import InputError, unknown

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
"""Our name to ONNX Runtime's, in the order in which "auto" tries them."""

_NEEDS = {
    "tensorrt": "it needs a GPU, TensorRT and pip install 'fdml[gpu]'",
    "cuda": "it needs a GPU and pip install 'fdml[gpu]' in place of the package onnxruntime",
    "cpu": "it needs pip install 'fdml[cpu]'",
}
_ENGINES_LIMIT = 1 << 20


@dataclass(frozen=True)
class Opened:
    """A session, the provider it took (a name of ``PROVIDERS``), the card in the file, and the largest batch that it
    takes (None: any)."""

    session: "onnxruntime.InferenceSession"
    provider: str
    card: Card
    largest: int | None = None


def open_session(path: Path, bundle: Bundle | None, provider: str, threads: int | None, *, spin: bool = True) -> Opened:
    """Opens the ONNX file at ``path``, the network of ``bundle`` or a file by itself.

    ``provider`` is a name of ``PROVIDERS`` or "auto": the first of them that is there, "tensorrt" only where the bundle
    has engines for it. ONNX Runtime falls back to another provider without a word; here that is an error unless "auto"
    was asked for. ``threads`` is the number of threads that compute one batch; None leaves it to ONNX Runtime. Without
    ``spin`` they sleep between batches, and leave the cores to others.

    Raises ``BundleError`` for a file that ONNX Runtime cannot read, one without a valid card or with another signature
    than a bundle's model has, and a provider that cannot be had; ``InputError`` for a bad argument.
    """
    if provider not in ("auto", *PROVIDERS):
        raise unknown("provider", provider, ("auto", *PROVIDERS))
    if threads is not None and threads < 1:
        raise InputError(f"threads={threads} is out of range: at least 1, or None to leave it to ONNX Runtime")
    onnxruntime = _imported()
    there = onnxruntime.get_available_providers()
    asked = list(PROVIDERS) if provider == "auto" else [provider]
    for name in asked:
        if PROVIDERS[name] not in there:
            if provider != "auto":
                raise BundleError(f"{path}: onnxruntime here has no {PROVIDERS[name]}: {_NEEDS[name]}")
            continue
        engines = _Engines.of(bundle) if name == "tensorrt" else None
        if name == "tensorrt" and provider == "auto" and engines is None:
            continue
        opened = _open(path, name, threads, engines, spin=spin, lenient=provider == "auto" and name != "cpu")
        if opened is not None:
            _check_signature(path, opened.session, opened.card)
            return opened
    raise BundleError(f"{path}: onnxruntime could load none of its providers ({', '.join(there)})")


def _imported() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        message = "running a bundle needs onnxruntime: pip install 'fdml[cpu]', or 'fdml[gpu]' for a GPU"
        raise ImportError(message, name=error.name) from error
    return onnxruntime


def session_options(threads: int | None, spin: bool) -> "onnxruntime.SessionOptions":
    """How many threads compute a batch (None: ONNX Runtime's choice), and whether they wait for the next in a loop."""
    options = _imported().SessionOptions()
    options.log_severity_level = 4  # what it has to say is in its exceptions
    if threads is not None:
        options.intra_op_num_threads = threads
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _open(
    path: Path, name: str, threads: int | None, engines: "_Engines | None", *, spin: bool, lenient: bool
) -> Opened | None:
    """The session on the provider ``name``; None where it is not to be had and ``lenient``."""
    onnxruntime = _imported()
    options = session_options(threads, spin)
    scratch = None
    settings: dict[str, str] = {}
    if name == "tensorrt" and engines is not None:
        # A copy: where an engine does not fit this GPU a new one is written, and a bundle is never written to.
        scratch = tempfile.mkdtemp(prefix="fdml-engines-")
        settings = engines.copied_to(Path(scratch))
    if name != "cpu":
        # CUDA's libraries may lie in the packages of pip, where the loader does not look; what is missing is printed.
        with redirect_stdout(io.StringIO()), suppress(Exception):
            onnxruntime.preload_dlls()
    # A provider first and those it leaves work to after it.
    chain = list(PROVIDERS)[list(PROVIDERS).index(name) :]
    wanted = [(PROVIDERS[each], settings if each == "tensorrt" else {}) for each in chain]
    wanted = [each for each in wanted if each[0] in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=wanted, enable_fallback=0)
    except Exception as error:  # its errors have no common class
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if lenient:
            return None
        raise BundleError(f"{path}: ONNX Runtime cannot read it: {_first_line(error)}") from None
    if scratch is not None:
        weakref.finalize(session, shutil.rmtree, scratch, ignore_errors=True)
    if session.get_providers()[0] != PROVIDERS[name]:
        if lenient:
            return None
        raise BundleError(f"{path}: {PROVIDERS[name]} could not be loaded: {_NEEDS[name]}; or use provider='cpu'")
    return Opened(session, name, _card(path, session), engines.largest if engines else None)


def _card(path: Path, session: "onnxruntime.InferenceSession") -> Card:
    text = session.get_modelmeta().custom_metadata_map.get(KEY)
    if text is None:
        raise BundleError(f"{path}: has no fdml card in its metadata; name a bundle or a model of `fdml export`")
    try:
        return Card.from_json(text)
    except InputError as error:
        raise BundleError(f"{path}: {error}") from None


def _check_signature(path: Path, session: "onnxruntime.InferenceSession", card: Card) -> None:
    entries, results = session.get_inputs(), session.get_outputs()
    found = [(each.name, each.type, list(each.shape)) for each in (*entries, *results)]
    right = (
        [(name, kind) for name, kind, _ in found] == [("images", "tensor(float)"), ("logits", "tensor(float)")]
        and found[0][2][1:] == list(card.input)
        and not any(isinstance(shape[0], int) for _, _, shape in found if shape)
        and len(found[1][2]) == 2
        and (found[1][2][1] == len(card.classes) or not isinstance(found[1][2][1], int))
    )
    if not right:
        shown = ", ".join(f"{name} {kind} {shape}" for name, kind, shape in found)
        raise BundleError(
            f"{path}: its tensors are {shown[:300]}; its card asks for images [batch,"
            f" {', '.join(map(str, card.input))}] and logits [batch, {len(card.classes)}], both float32; export it anew"
        )


@dataclass(frozen=True)
class _Engines:
    """The engine cache of ONNX Runtime's TensorRT provider in a bundle; ``largest`` is the largest batch it takes."""

    files: tuple[Path, ...]
    options: dict[str, str]
    largest: int

    @classmethod
    def of(cls, bundle: Bundle | None) -> "_Engines | None":
        """The cache that ``engines.json`` names; None where the bundle has none for this provider."""
        if bundle is None or "engines.json" not in bundle.files:
            return None
        path = bundle.folder / "engines.json"
        files = tuple(bundle.folder / name for name in bundle.files if name.startswith("TensorrtExecutionProvider"))
        try:
            with path.open(encoding="utf-8") as file:
                listed = json.loads(file.read(_ENGINES_LIMIT))
            ours = [each for each in listed if each["backend"] == "ort"]
            if not ours or not files:
                return None
            precision = str(ours[0]["precision"])
            batches = [int(each) for each in ours[0]["batches"]]
            least, best, largest = batches
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            raise BundleError(f"{path}: is not the list of engines that `fdml export` writes; export anew") from None
        shapes = ["x".join(map(str, (batch, *bundle.card.input))) for batch in (least, best, largest)]
        # As they were built: with other options the provider takes the cache for one of another network.
        options = {
            "trt_engine_cache_enable": "1",
            "trt_timing_cache_enable": "1",
            "trt_profile_min_shapes": f"images:{shapes[0]}",
            "trt_profile_opt_shapes": f"images:{shapes[1]}",
            "trt_profile_max_shapes": f"images:{shapes[2]}",
        }
        if precision != "fp32":
            options[f"trt_{precision}_enable"] = "1"
        return cls(files, options, largest)

    def copied_to(self, folder: Path) -> dict[str, str]:
        """Copies the cache; the provider's options that make it use the copy."""
        for path in self.files:
            shutil.copyfile(path, folder / path.name)
        return {**self.options, "trt_engine_cache_path": str(folder), "trt_timing_cache_path": str(folder)}


def check_file(path: Path) -> None:
    """Raises ``BundleError`` for what is no regular ``.onnx`` file, before ONNX Runtime is asked."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise BundleError(f"{path}: {'no such file or folder' if missing else error.strerror or error}") from None
    except ValueError:
        raise BundleError(f"{os.fspath(path)!r} is no file name") from None  # a NUL byte in it
    if not stat.S_ISREG(mode):
        raise BundleError(f"{path}: is no regular file; name a bundle folder or an .onnx file")
    if path.suffix != ".onnx":
        raise BundleError(f"{path}: is no .onnx file; name a bundle folder or an .onnx file of `fdml export`")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
