"""What `benchmarks/serve.py --part peers` compares with: a FastAPI handler, and LitServe with batches.

    PYTHON benchmarks/serve_peers.py fastapi|litserve MODEL.onnx PORT

Both take the bytes of float32 images and give the bytes of float32 logits, in one worker process, by uvicorn with
uvloop and httptools, without an access log. PYTHON is one that has them, and need not have fdml.
"""

# pyright: reportMissingImports=false

import argparse
import os
from typing import Annotated

import litserve as ls
import numpy as np
import onnxruntime as ort
import uvicorn
from fastapi import Body, FastAPI, Response

BATCH = 64
"""Images of the largest batch that LitServe forms, and the seconds it waits for one: those of `fdml serve`."""
DELAY = 0.002

Raw = Annotated[bytes, Body(media_type="application/octet-stream")]


def opened(path: str, *, threads: int) -> tuple[ort.InferenceSession, tuple[int, ...]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # As in `fdml serve`: threads that wait in a loop would take the cores from the connections.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session, tuple(session.get_inputs()[0].shape[1:])


def logits_of(session: ort.InferenceSession, images: np.ndarray) -> np.ndarray:
    return np.asarray(session.run(["logits"], {"images": images})[0])


def fastapi(path: str, port: int) -> None:
    # Each request is a batch of its own in a thread of its own: one thread a batch is faster than all of them.
    session, shape = opened(path, threads=1)
    app = FastAPI()

    @app.post("/predict")
    def predict(body: Raw) -> Response:
        images = np.frombuffer(body, np.float32).reshape(-1, *shape)
        return Response(logits_of(session, images).tobytes(), media_type="application/octet-stream")

    @app.get("/health")
    def health() -> str:
        return "ok"

    uvicorn.run(app, port=port, loop="uvloop", http="httptools", workers=1, access_log=False, log_level="warning")


class Batched(ls.LitAPI):
    """LitServe's way: a process that runs the network, to which the one of the connections passes the images."""

    def __init__(self, path: str) -> None:
        super().__init__(max_batch_size=BATCH, batch_timeout=DELAY)
        self.path = path

    def setup(self, device: str) -> None:
        self.session, self.shape = opened(self.path, threads=os.cpu_count() or 1)

    def decode_request(self, request: Raw) -> np.ndarray:
        return np.frombuffer(request, np.float32).reshape(-1, *self.shape)

    def batch(self, inputs: list[np.ndarray]) -> tuple[np.ndarray, list[int]]:
        return np.concatenate(inputs), [len(each) for each in inputs]

    def predict(self, x: tuple[np.ndarray, list[int]]) -> list[np.ndarray]:
        images, counts = x
        return np.split(logits_of(self.session, images), np.cumsum(counts)[:-1])

    def unbatch(self, output: list[np.ndarray]) -> list[np.ndarray]:
        return output

    def encode_response(self, output: np.ndarray) -> Response:
        return Response(output.tobytes(), media_type="application/octet-stream")


def litserve(path: str, port: int) -> None:
    server = ls.LitServer(Batched(path), accelerator="cpu", fast_queue=True)
    server.run(
        host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False, access_log=False,
        log_level="warning", loop="uvloop", http="httptools",
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=("fastapi", "litserve"))
    parser.add_argument("model")
    parser.add_argument("port", type=int)
    given = parser.parse_args()
    {"fastapi": fastapi, "litserve": litserve}[given.peer](given.model, given.port)
