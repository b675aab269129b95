"""TensorRT engines of an ONNX file, by three backends. An engine is fixed to a GPU's generation and a TensorRT version.

==============  =====================================  ===============================================================
backend         what it needs                          what it leaves in the folder
==============  =====================================  ===============================================================
ort             a GPU, onnxruntime-gpu, libnvinfer     the engine cache and the timing cache of ONNX Runtime's TensorRT
                                                       provider: a session with the same options on the same kind of
                                                       GPU loads them instead of building
torch-tensorrt  a GPU, torch-tensorrt, libnvinfer      an engine for TensorRT's own runtime, made from the torch model
rtx             tensorrt-rtx; no GPU                   an engine for TensorRT-RTX's runtime for each target asked for
==============  =====================================  ===============================================================

TensorRT 11, which torch-tensorrt takes, and TensorRT-RTX compute in the types that the network itself has: fp16 and
bf16 are made by rewriting the network. Input and output stay float32. In fp32 they are kept from rounding the factors
of products to TF32, so that the logits are those that were measured. ONNX Runtime has no such option: there, set
NVIDIA_TF32_OVERRIDE=0 in the environment.

The tests build with ``rtx``. What lies behind the checks of the other two, and loading any engine, is not run by the
default tests: it needs a GPU.
"""

import ctypes
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fdml.errors import InputError, unknown
from fdml.export.half import halved
from fdml.files import write_whole

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

Precision = Literal["fp32", "fp16", "bf16", "int8"]
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
# In the order in which "auto" tries them: first those that use the GPU at hand.
BACKENDS = ("ort", "torch-tensorrt", "rtx")
# The generations of GPU that rtx builds for unless told otherwise: Ampere (two), Ada and Blackwell. It knows no Hopper.
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_120")


@dataclass(frozen=True)
class Engine:
    """One engine that was built: a file in the folder, and what it was built with.

    ``target`` is a generation such as ``sm_89`` for rtx, else the name of the GPU it was built on; ``batches`` the
    smallest, the best and the largest batch it takes; ``bytes`` the file's size.
    """

    file: str
    backend: str
    precision: str
    target: str
    batches: tuple[int, int, int]
    versions: dict[str, str]
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**asdict(self), "batches": list(self.batches)}


def available() -> dict[str, str | None]:
    """For each backend None if it can run here, else what is missing and the one command that installs it."""
    return {name: _MISSING[name]() for name in BACKENDS}


def choose(backend: str) -> str:
    """The backend to use; "auto" takes the first that can run here, in the order of ``BACKENDS``.

    Raises ``InputError``, in one line that says what is missing, when what is asked for cannot run here.
    """
    if backend not in ("auto", *BACKENDS):
        raise unknown("TensorRT backend", backend, ("auto", *BACKENDS))
    if backend != "auto":
        missing = _MISSING[backend]()
        if missing:
            raise InputError(f"the TensorRT backend {backend} cannot run here: {missing}")
        return backend
    reasons = []
    for name in BACKENDS:
        missing = _MISSING[name]()
        if not missing:
            return name
        reasons.append(f"{name} ({missing})")
    raise InputError(f"no TensorRT backend can run here: {', '.join(reasons)}")


def build(
    backend: str,
    onnx: Path,
    folder: Path,
    *,
    precision: Precision = "fp32",
    batches: tuple[int, int, int] = (1, 64, 256),
    targets: Sequence[str] | None = None,
    model: "nn.Module | None" = None,
) -> list[Engine]:
    """Builds engines of the network in ``onnx``; files come into ``folder`` when all are built, each whole.

    The file has one input of images (b, c, h, w), float32 in [0, 1], of any name, and the logits (b, classes) as its
    output. ``batches`` is the smallest, the best and the largest batch. For int8 the file has been quantised before, by
    pairs of QuantizeLinear and DequantizeLinear. ``targets`` are the generations to build for: rtx only, by default
    ``TARGETS``. ``model`` is the torch model of the file: torch-tensorrt only, and left as it is.

    Raises ``InputError`` for a backend that cannot run here, a file that is no such network, a precision or a target
    that the backend does not know, and with the first line of TensorRT's reason when it cannot build the engine.
    """
    backend = choose(backend)
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if not 1 <= batches[0] <= batches[1] <= batches[2]:
        raise InputError(f"the smallest, best and largest batch are {batches}: each at least the one before, from 1")
    if targets is not None and backend != "rtx":
        raise InputError(f"{backend} builds for the GPU of this machine: targets are for rtx")
    network = _read(onnx, precision)
    maker: Callable[..., list[Engine]] = {"ort": _ort, "torch-tensorrt": _torch_tensorrt, "rtx": _rtx}[backend]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the folder, so that its files are moved by a rename.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".engines-") as name:
            work = Path(name)
            engines = maker(network, work, precision=precision, batches=batches, targets=targets, model=model)
            for made in sorted(work.iterdir()):
                write_whole(folder / made.name, partial(_move, made))
    except OSError as error:
        raise InputError(f"cannot write engines to {folder}: {error.strerror or error}") from error
    return engines


def _move(source: Path, target: Path) -> None:
    source.replace(target)


def inspect(path: Path) -> dict[str, Any]:
    """What TensorRT-RTX reads from an engine file of backend rtx: its tensors with shapes, and the batches it takes.

    Raises ``InputError`` for a file that it cannot load. It loads an engine only on a GPU that the engine was built
    for: what follows the loading is not run by the default tests.
    """
    choose("rtx")
    trt: Any = import_module("tensorrt_rtx")  # it names nothing to a type checker
    log = _log()
    log.lines.clear()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    engine = trt.Runtime(log).deserialize_cuda_engine(content)
    if engine is None:
        raise InputError(f"{path}: TensorRT-RTX cannot load it here: {log.reason()}")
    tensors = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        mode = engine.get_tensor_mode(name)
        tensors[name] = {
            "mode": mode.name.lower(),
            "dtype": engine.get_tensor_dtype(name).name.lower(),
            "shape": list(engine.get_tensor_shape(name)),
        }
        if mode == trt.TensorIOMode.INPUT:
            tensors[name]["batches"] = [shape[0] for shape in engine.get_tensor_profile_shape(name, 0)]
    return {"tensors": tensors, "bytes": len(content)}


# What is missing ------------------------------------------------------------------------------------------------------


def _gpu() -> str | None:
    """The name of the first GPU, asked from the driver: neither torch nor ONNX Runtime needs to be a CUDA build."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    name = ctypes.create_string_buffer(100)
    device = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDeviceGetName(name, len(name), device):
        return None
    return name.value.decode()


def _without_ort() -> str | None:
    if _gpu() is None:
        return "no CUDA device"
    provider = _provider_of_ort()
    if provider is None:
        # Both packages write the same folder, so the other one has to go first.
        other = "pip uninstall -y onnxruntime && " if find_spec("onnxruntime") else ""
        return f"package onnxruntime-gpu: {other}pip install 'fdml[gpu]'"
    libraries, package = _libraries(provider)
    missing = next((library for library in libraries if not _loads(library)), None)
    return missing and f"{missing}: pip install '{package}'"


def _without_torch_tensorrt() -> str | None:
    if _gpu() is None:
        return "no CUDA device"
    if not find_spec("torch_tensorrt"):
        return "package torch-tensorrt: pip install 'fdml[trt]'"
    import torch

    if not torch.cuda.is_available():
        return f"a CUDA build of torch in the place of {torch.__version__}: pip install --force-reinstall torch"
    try:
        with redirect_stdout(StringIO()):  # it prints before it raises
            import_module("torch_tensorrt")
    except Exception as error:  # whatever the loader of its libraries says
        # TensorRT's releases do not mix either.
        wanted = next((r for r in requires("torch-tensorrt") or () if re.match(r"tensorrt\b(?!-)", r)), "tensorrt")
        return f"libnvinfer ({_first_line(error)}): pip install '{wanted}'"
    return None


def _without_rtx() -> str | None:
    if not find_spec("tensorrt_rtx"):
        return "package tensorrt-rtx: pip install 'fdml[rtx]'"
    try:
        import_module("tensorrt_rtx")
    except Exception as error:
        return f"a tensorrt-rtx that loads ({_first_line(error)}): pip install --force-reinstall tensorrt-rtx"
    return None


_MISSING: dict[str, Callable[[], str | None]] = {
    "ort": _without_ort,
    "torch-tensorrt": _without_torch_tensorrt,
    "rtx": _without_rtx,
}


def _provider_of_ort() -> Path | None:
    """The library of ONNX Runtime's TensorRT provider; only the builds for GPUs have it."""
    spec = find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    return path if path.exists() else None


def _libraries(provider: Path) -> tuple[tuple[str, str], str]:
    """The libraries of TensorRT that the provider is linked to, and the package that has them.

    Only one version will do, and which one changes with ONNX Runtime's release: it is read from the file.
    """
    content = provider.read_bytes()
    trt = re.search(rb"libnvinfer\.so\.(\d+)", content)
    cuda = re.search(rb"libcudart\.so\.(\d+)", content)
    major, build = int(trt[1]) if trt else 10, int(cuda[1]) if cuda else 12
    package = f"tensorrt-cu{build}>={major},<{major + 1}"
    return (f"libnvinfer.so.{major}", f"libnvonnxparser.so.{major}"), package


def _loads(library: str) -> bool:
    """Loads a library of TensorRT from the system or from the package; from then on others find it by its name."""
    spec = find_spec("tensorrt_libs")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for path in (library, *(f"{folder}/{library}" for folder in folders)):
        with suppress(OSError):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return True
    return False


# The network ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Network:
    """An ONNX file as it was read: the name of its input, and the size (c, h, w) of the images that it takes."""

    path: Path
    proto: "ModelProto"
    input: str
    size: tuple[int, int, int]


def _read(path: Path, precision: str) -> _Network:
    if not find_spec("onnx"):
        raise InputError("reading an ONNX file needs the package onnx: pip install 'fdml[export]'")
    import onnx

    try:
        proto = onnx.load(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # its parser's errors have no common class
        raise InputError(f"{path}: is not an ONNX file: {_first_line(error)}") from None
    inputs = proto.graph.input
    shape = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim] if len(inputs) == 1 else []
    if len(shape) != 4 or not all(shape[1:]) or len(proto.graph.output) != 1:
        raise InputError(f"{path}: is no network of one batch of images (b, c, h, w) to logits")
    if shape[0]:
        raise InputError(f"{path}: takes batches of {shape[0]} only; export it with a batch of any size")
    quantised = any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
    if quantised and precision != "int8":
        raise InputError(f"{path}: is quantised; build it as int8, not {precision}")
    if precision == "int8" and not quantised:
        raise InputError(f"{path}: is not quantised; int8 needs a file that is")
    return _Network(path, proto, inputs[0].name, (shape[1], shape[2], shape[3]))


# The backends ---------------------------------------------------------------------------------------------------------


def _rtx(
    network: _Network,
    work: Path,
    *,
    precision: str,
    batches: tuple[int, int, int],
    targets: Sequence[str] | None,
    **_: object,
) -> list[Engine]:
    trt: Any = import_module("tensorrt_rtx")
    capabilities = {
        f"sm_{name.removeprefix('SM')}": value
        for name, value in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    for target in targets or TARGETS:
        if target not in capabilities:
            raise InputError(f"TensorRT-RTX does not build for {target!r}; it does for {', '.join(capabilities)}")

    proto = network.proto
    if precision in ("fp16", "bf16"):
        try:
            proto = halved(proto, precision)
        except InputError as error:
            raise InputError(f"{network.path}: {error}") from None
    content = proto.SerializeToString()
    log = _log()
    engines = []
    for target in dict.fromkeys(targets or TARGETS):
        log.lines.clear()
        builder = trt.Builder(log)
        found = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(found, log)
        if not parser.parse(content):
            # Its first line names the node, the second says what is wrong with it.
            why = _first_line(parser.get_error(0).desc().replace("\n", ": ", 1)) if parser.num_errors else log.reason()
            raise InputError(f"{network.path}: TensorRT-RTX cannot read it as {precision}: {why}")

        entry = found.get_input(0)
        profile = builder.create_optimization_profile()
        profile.set_shape(entry.name, *((batch, *tuple(entry.shape)[1:]) for batch in batches))
        config = builder.create_builder_config()
        config.add_optimization_profile(profile)
        config.clear_flag(trt.BuilderFlag.TF32)
        config.num_compute_capabilities = 1
        config.set_compute_capability(capabilities[target], 0)
        plan = builder.build_serialized_network(found, config)
        if plan is None:
            raise InputError(
                f"{network.path}: TensorRT-RTX cannot build it as {precision} for {target}: {log.reason()}"
            )
        file = work / f"{network.path.stem}.rtx.{precision}.{target}.engine"
        file.write_bytes(plan)
        engines.append(_engine(file, "rtx", precision, target, batches, ("tensorrt-rtx", "onnx")))
    return engines


@cache
def _log() -> Any:
    """The one logger of this process: TensorRT keeps the first that it is given and ignores those that follow."""
    trt: Any = import_module("tensorrt_rtx")

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[tuple[int, str]] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity.value <= trt.ILogger.Severity.ERROR.value:
                self.lines.append((severity.value, msg))

        def reason(self) -> str:
            return _first_line(self.lines[0][1]) if self.lines else "it gives no reason"

    return Log()


def _ort(
    network: _Network,
    work: Path,
    *,
    precision: str,
    batches: tuple[int, int, int],
    **_: object,
) -> list[Engine]:
    """Not run by the default tests: needs a GPU.

    The provider names its files by the name of the ONNX file, not by its folder: the cache may move together with it.
    """
    import numpy as np
    import onnxruntime

    shapes = [f"{network.input}:{'x'.join(map(str, (batch, *network.size)))}" for batch in batches]
    options = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(work),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(work),
        "trt_profile_min_shapes": shapes[0],
        "trt_profile_opt_shapes": shapes[1],
        "trt_profile_max_shapes": shapes[2],
        **({} if precision == "fp32" else {f"trt_{precision}_enable": "1"}),
    }
    onnxruntime.preload_dlls()  # CUDA and cuDNN, where they are packages
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            network.path, settings, providers=[("TensorrtExecutionProvider", options), "CUDAExecutionProvider"]
        )
        # It falls back to another provider without a word.
        if session.get_providers()[0] == "TensorrtExecutionProvider":
            session.run(None, {network.input: np.zeros((batches[1], *network.size), np.float32)})
        del session  # the caches are complete when it has ended
    except Exception as error:  # its errors have no common class
        raise InputError(f"{network.path}: ONNX Runtime cannot build it as {precision}: {_first_line(error)}") from None
    files = sorted(work.glob("*.engine"))
    if not files:
        raise InputError(f"{network.path}: ONNX Runtime gave no part of it to TensorRT")
    packages = ("onnxruntime-gpu", "tensorrt", "onnx")
    return [_engine(file, "ort", precision, _gpu() or "", batches, packages) for file in files]


def _torch_tensorrt(
    network: _Network,
    work: Path,
    *,
    precision: str,
    batches: tuple[int, int, int],
    model: "nn.Module | None",
    **_: object,
) -> list[Engine]:
    """Not run by the default tests beyond its checks: needs a GPU."""
    if precision == "int8":
        raise InputError("torch-tensorrt takes no ONNX file that was quantised; for int8 use ort")
    if model is None:
        raise InputError("torch-tensorrt builds from the torch model, and none was given")
    import copy

    import torch

    from fdml.models.frozen import Frozen

    torch_tensorrt: Any = import_module("torch_tensorrt")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]

    class Typed(torch.nn.Module):
        def __init__(self, inner: "nn.Module") -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.inner(images.to(dtype)).float()

    inner = model.model if isinstance(model, Frozen) else model
    typed = Typed(copy.deepcopy(inner)).to("cuda", dtype).eval()
    example = torch.zeros(2, *network.size, device="cuda")
    low, best, high = ((batch, *network.size) for batch in batches)
    try:
        with torch.no_grad():
            batch = torch.export.Dim("batch", max=max(2, batches[2]))
            program = torch.export.export(typed, (example,), dynamic_shapes=({0: batch},))
        plan = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            program,
            arg_inputs=[torch_tensorrt.Input(min_shape=low, opt_shape=best, max_shape=high, dtype=torch.float32)],
            disable_tf32=True,
            require_full_compilation=True,
        )
    except Exception as error:  # its errors have no common class
        raise InputError(f"torch-tensorrt cannot build the model as {precision}: {_first_line(error)}") from error
    target = torch.cuda.get_device_name()
    file = work / f"{network.path.stem}.torch-tensorrt.{precision}.{re.sub(r'[^A-Za-z0-9]+', '-', target)}.engine"
    file.write_bytes(plan)
    return [_engine(file, "torch-tensorrt", precision, target, batches, ("torch-tensorrt", "tensorrt", "torch"))]


def _engine(
    file: Path, backend: str, precision: str, target: str, batches: tuple[int, int, int], packages: tuple[str, ...]
) -> Engine:
    versions = {}
    for package in packages:
        with suppress(PackageNotFoundError):  # TensorRT may come from the system
            versions[package] = version(package)
    return Engine(file.name, backend, precision, target, batches, versions, file.stat().st_size)


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
