"""What a model costs: exact bits of a text or of images, distance from a known law, bounds on images."""

from dflow.evaluate.images import ExactEvaluation, ImageEvaluation, evaluate_exact, evaluate_images
from dflow.evaluate.text import Evaluation, LawEvaluation, evaluate, evaluate_law

__all__ = [
    "Evaluation",
    "ExactEvaluation",
    "ImageEvaluation",
    "LawEvaluation",
    "evaluate",
    "evaluate_exact",
    "evaluate_images",
    "evaluate_law",
]
