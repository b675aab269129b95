"""Forward passes by ONNX Runtime: for attacks that only query, and for models that are ONNX files."""

import io
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fdml.errors import InputError
from fdml.models.frozen import SMALLEST, Frozen


class Session:
    """A callable from images in [0, 1] to logits, as a model, without gradients.

    ``source`` is the path or the content of an ONNX file with one input (b, c, h, w) and logits (b, classes) as its
    first output. With ``spin`` its threads wait for work in a loop, which is fastest where nothing else runs. Raises
    ``InputError`` for a file that ONNX Runtime cannot read or whose input is no batch of images, and at the call for
    images of another size.
    """

    def __init__(self, source: Path | bytes, *, spin: bool = False) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        if not spin:
            # Threads that wait in a loop would take the cores from torch, which runs between two calls.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                os.fspath(source) if isinstance(source, Path) else source, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its errors have no common class
            what = source if isinstance(source, Path) else "the exported model"
            raise InputError(f"{what}: ONNX Runtime cannot read it: {str(error).splitlines()[0][:200]}") from None
        entries = self._session.get_inputs()
        if len(entries) != 1 or len(entries[0].shape) != 4:
            shapes = ", ".join(str(entry.shape) for entry in entries)
            raise InputError(f"{source}: its inputs are {shapes}, but one batch of images (b, c, h, w) is needed")
        self._input = entries[0].name
        self._output = self._session.get_outputs()[0].name
        batch, *self.shape = entries[0].shape
        self._batch = batch if isinstance(batch, int) else None

    def __call__(self, x: Tensor) -> Tensor:
        count = len(x)
        missing = (self._batch and -count % self._batch) or max(0, SMALLEST - count)
        if missing:
            x = torch.cat([x, x[-1:].expand(missing, -1, -1, -1)])
        rows = x.detach().float().contiguous().cpu().numpy()
        parts = [rows] if not self._batch else [rows[i : i + self._batch] for i in range(0, len(rows), self._batch)]
        try:
            found = [self._session.run([self._output], {self._input: part})[0] for part in parts]
        except Exception as error:
            raise InputError(f"the ONNX model refused images {tuple(x.shape)}: {str(error).splitlines()[0]}") from None
        return torch.cat([torch.from_numpy(part) for part in found])[:count].to(x.device, x.dtype)

    def bare(self, rows: np.ndarray) -> Callable[[], object]:
        """A call that passes ``rows`` (b, c, h, w), float32, and does nothing else: for timing."""
        return lambda: self._session.run([self._output], {self._input: rows})


def exported(model: nn.Module, like: Tensor) -> Session | None:
    """The session of a torch model on a CPU; None where ONNX Runtime is not installed or cannot take the model."""
    if like.device.type != "cpu" or not all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        return None
    try:
        session = Session(onnx_of(model, like))
        with torch.no_grad():
            close = torch.allclose(session(like), model(like), rtol=1e-3, atol=1e-3)
    except (RuntimeError, InputError):  # a model that cannot be exported is attacked by torch alone
        return None
    return session if close else None


def onnx_of(model: nn.Module, like: Tensor) -> bytes:
    """The content of an ONNX file that takes a batch of any size."""
    return program(model.model if isinstance(model, Frozen) else model, like).SerializeToString()


def program(
    model: nn.Module,
    like: Tensor,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Any:
    """The ``onnx.ModelProto`` of a module, for a batch of any size of images such as ``like``. Whatever the exporter
    says on the way is kept back."""
    example = like[:1].expand(2, -1, -1, -1).contiguous()
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            batch = torch.export.Dim("batch", max=1 << 20)
            found = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: batch},),
                input_names=input_names,
                output_names=output_names,
                verbose=False,
            )
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
    assert found is not None
    return found.model_proto
