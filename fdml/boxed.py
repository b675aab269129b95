"""Proofs in linf without torch: ``bounds.onnx`` of a bundle, run by ONNX Runtime on a CPU.

The file computes bounds on the network's outputs over a box of images, rounding included (docs/certify.md).
"""

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fdml import bundle as bundles
from fdml.bundle import Bundle, BundleError
from fdml.errors import InputError
from fdml.pixels import check_batch
from fdml.session import session_options

if TYPE_CHECKING:
    import onnxruntime

EPS, LABEL, MARGIN = "eps", "label", "margin"
MODEL_KEY = "fdml.model"
"""Where the metadata of bounds.onnx holds the SHA-256 of the model.onnx that it bounds."""

_FINE = 2.0**-12


@dataclass(frozen=True)
class BoxProof:
    """The network's answer about one image, and what is proved of the box of all images in [0, 1] within ``eps``.

    ``label`` (``index`` among the classes) is what the network answers. On the whole box its logit exceeds every other
    by more than ``margin``; where that is above 0 the answer is ``certified``: no image of the box is answered
    otherwise. A margin of 0 or less shows nothing.
    """

    label: str
    index: int
    margin: float
    eps: float

    @property
    def certified(self) -> bool:
        """Whether every image of the box is proved to be answered alike."""
        return self.margin > 0


class Boxed:
    """The bounds of a bundle, ready to run. ``load`` makes one; calls may come from several threads at once.

    The result for an image depends on nothing but the image, eps and the machine: images are bounded one at a time.
    """

    def __init__(self, session: "onnxruntime.InferenceSession", classes: tuple[str, ...], shape: tuple) -> None:
        self._run: Any = session.run  # its type allows outputs that are no arrays
        self._classes, self._shape = classes, shape

    @classmethod
    def load(cls, bundle: Bundle, threads: int | None = None, *, spin: bool = True) -> "Boxed | None":
        """The bounds in ``bundle``; None where it has none. ``threads`` compute one image, and sleep between two
        without ``spin``.

        Raises ``BundleError`` for a file that was exchanged since the bundle was read, bounds another network than that
        of the bundle, or cannot be read.
        """
        import onnxruntime

        if bundles.BOUNDS not in bundle.files:
            return None
        path = bundle.folder / bundles.BOUNDS
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from None
        if hashlib.sha256(content).hexdigest() != bundle.files[bundles.BOUNDS]:
            raise BundleError(f"{path}: was exchanged since the bundle was loaded: load it anew")
        options = session_options(threads, spin)
        try:
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common class
            raise BundleError(f"{path}: ONNX Runtime cannot read it: {str(error).splitlines()[0][:200]}") from None
        of = session.get_modelmeta().custom_metadata_map.get(MODEL_KEY)
        names = [entry.name for entry in (*session.get_inputs(), *session.get_outputs())]
        if of != bundle.files[bundles.MODEL] or names != ["images", EPS, LABEL, MARGIN]:
            raise BundleError(f"{path}: does not bound the {bundles.MODEL} beside it: export with --bounds anew")
        return cls(session, bundle.card.classes, bundle.card.input)

    def bound(self, image: np.ndarray, eps: float) -> BoxProof:
        """What is proved of the images in [0, 1] within ``eps`` (linf, pixel units) of ``image``, (c, h, w) float32 in
        [0, 1]. An eps that is no float32 is rounded up, so that what is proved holds for it.

        Raises ``InputError`` for another shape, dtype or range, and for an eps outside [0, 1].
        """
        check_batch(image[None], self._shape)
        return self._bound(image, _float32(eps, up=True), eps)

    def radius(self, image: np.ndarray, largest: float = 1.0, fine: float = _FINE) -> BoxProof:
        """The largest eps, at most ``largest``, that bisection down to ``fine`` finds to be certified, and its margin.

        Every eps that is given was itself shown, whatever rounding does to the order of margins. Where none was, not
        even 0, the margin is not above 0. Raises ``InputError`` as ``bound`` does, and for a ``fine`` below 2⁻²⁰.
        """
        check_batch(image[None], self._shape)
        if not 2.0**-20 <= fine <= 1:
            raise InputError(f"fine={fine:g} is out of range: bisection stops between 2**-20 and 1")
        top = _float32(largest, up=False)
        found = self._bound(image, top, float(top))
        if found.certified:
            return found
        found = self._bound(image, np.float32(0), 0.0)
        low, high = 0.0, float(top)
        while found.certified and high - low > fine:
            middle = _float32((low + high) / 2, up=False)
            tried = self._bound(image, middle, float(middle))
            if tried.certified:
                found, low = tried, tried.eps
            else:
                high = tried.eps
        return found

    def _bound(self, image: np.ndarray, eps: np.float32, said: float) -> BoxProof:
        label, margin = self._run([LABEL, MARGIN], {"images": image[None], EPS: np.asarray(eps)})
        index = int(label[0])
        return BoxProof(self._classes[index], index, float(margin[0]), said)


def _float32(eps: float, *, up: bool) -> np.float32:
    if not 0 <= eps <= 1 or math.isnan(eps):
        raise InputError(f"eps={eps:g} is out of range: 0 to 1, in pixel units, such as 8/255")
    nearest = np.float32(eps)
    if up and float(nearest) < eps:
        return np.nextafter(nearest, np.float32(2))
    if not up and float(nearest) > eps:
        return np.nextafter(nearest, np.float32(0))
    return nearest
