"""The digits of scikit-learn: real handwriting that needs no download."""

import numpy as np
import torch

from fdml.data.splits import Parts, arrays, stratified

TEST_IMAGES = 360


def read() -> Parts:
    """1,437 images to train with and 360 to test with, 8x8 grey, cut by class with a fixed seed.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998), its test set, as packed in
    scikit-learn. Pixels there count 0 to 16 inked dots; here they are 0 to 255.
    """
    from sklearn.datasets import load_digits

    counts, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    images = np.rint(counts * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    rest, test = stratified(torch.from_numpy(labels.astype(np.int64)), TEST_IMAGES)
    digits = arrays(images, labels, 10, "digits")
    return Parts(tuple("0123456789"), digits.take(rest), digits.take(test))
