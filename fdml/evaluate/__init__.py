"""How far a model withstands attack: accuracies under a list of attacks, with their intervals."""

from fdml.evaluate.accuracy import Accuracy, evaluate, interval, predictions

__all__ = ["Accuracy", "evaluate", "interval", "predictions"]
