"""The ONNX model itself, run by ONNX Runtime: what a counter-example has to convince."""

import gzip
import os
import sys
import zlib
from math import prod
from pathlib import Path

import numpy as np

from fdml.errors import InputError

LIMIT = 2**31  # ONNX files are protocol buffers, which end at 2 GiB


class OnnxRunner:
    """Float32 rows (b, n) through an ONNX file to rows (b, m), both flat in the C order of the file's own tensors.

    ``source`` is the path (``.onnx`` or ``.onnx.gz``) or the content of a file with one float32 input and one output.
    A first axis that is symbolic or 1 counts as the batch, unless it is the only one; any other input is one sample
    without a batch axis. ``inputs`` is n, ``outputs`` is m. Raises ``InputError`` for a file that ONNX Runtime cannot
    read or run and for another signature.
    """

    def __init__(self, source: Path | bytes) -> None:
        import onnxruntime

        self._what = str(source) if isinstance(source, Path) else "the ONNX model"
        options = onnxruntime.SessionOptions()
        if torch := sys.modules.get("torch"):
            options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Threads that wait in a loop would take the cores from torch, which runs between two calls.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        content = _open(source) if isinstance(source, Path) else source
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common class
            raise InputError(f"{self._what}: ONNX Runtime cannot read it: {_first_line(error)}") from None
        # Initializers that old files list among the inputs are not among these.
        entries, results = self._session.get_inputs(), self._session.get_outputs()
        if len(entries) != 1 or len(results) != 1:
            names = ", ".join(entry.name for entry in entries), ", ".join(entry.name for entry in results)
            raise InputError(f"{self._what}: one input and one output are needed, not ({names[0]}) to ({names[1]})")
        entry = entries[0]
        self._input = entry.name
        shape = list(entry.shape)
        batched = len(shape) > 1 and (not isinstance(shape[0], int) or shape[0] == 1)
        self._shape = shape[1:] if batched else shape
        if entry.type != "tensor(float)" or not all(isinstance(size, int) and size > 0 for size in self._shape):
            raise InputError(
                f"{self._what}: its input {entry.name} is {entry.type} {entry.shape}, but float32 of a fixed shape "
                "after the batch axis is needed"
            )
        self.inputs = prod(self._shape)
        self._one = [1, *self._shape] if batched else self._shape
        self.outputs = self._run(np.zeros((1, self.inputs), np.float32), self._one).size
        self._batches = batched and not isinstance(shape[0], int) and self._keeps_rows_apart()

    def run(self, x: np.ndarray) -> np.ndarray:
        """Rows (b, n), float32, to rows (b, m), float32. A batch may differ from single rows in the last bits."""
        if x.ndim != 2 or x.shape[1] != self.inputs:
            raise InputError(f"{self._what}: inputs of shape {x.shape} were given, but (b, {self.inputs}) is needed")
        x = np.ascontiguousarray(x, dtype=np.float32)
        if self._batches and len(x) > 1:
            found = self._run(x, [len(x), *self._shape])
        else:
            rows = [self._run(row, self._one) for row in x]
            found = np.stack(rows) if rows else np.empty((0, self.outputs), np.float32)
        return found.reshape(len(x), self.outputs)

    def _run(self, x: np.ndarray, shape: list[int]) -> np.ndarray:
        try:
            found = self._session.run(None, {self._input: x.reshape(shape)})[0]
        except Exception as error:
            raise InputError(f"{self._what}: ONNX Runtime cannot run it: {_first_line(error)}") from None
        if not isinstance(found, np.ndarray) or found.dtype != np.float32:
            raise InputError(f"{self._what}: its output is not a float32 tensor")
        return found.reshape(-1)

    def _keeps_rows_apart(self) -> bool:
        """Whether two rows together give what they give alone: a Reshape inside may fix the batch of a model that
        declares a symbolic one."""
        pair = np.random.default_rng(0).random((2, self.inputs), np.float32)
        try:
            together = self._run(pair, [2, *self._shape])
        except InputError:
            return False
        apart = np.concatenate([self._run(row, self._one) for row in pair])
        return together.shape == apart.shape and np.allclose(together, apart, rtol=1e-3, atol=1e-3, equal_nan=True)


def _open(path: Path) -> bytes | str:
    """The path for ONNX Runtime, or the content of a compressed file."""
    if path.suffix != ".gz":
        return os.fspath(path)
    try:
        with gzip.open(path) as file:
            content = file.read(LIMIT)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot decompress it: {error}") from None
    if len(content) == LIMIT:
        raise InputError(f"{path}: it decompresses to {LIMIT:,} bytes or more, but an ONNX file is smaller")
    return content


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
