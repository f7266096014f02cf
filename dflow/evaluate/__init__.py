"""What a model costs: exact bits of a text, distance from a known law, bounds on images and tables."""

from dflow.evaluate.images import ImageEvaluation, evaluate_images
from dflow.evaluate.text import Evaluation, LawEvaluation, evaluate, evaluate_law

__all__ = [
    "Evaluation",
    "ImageEvaluation",
    "LawEvaluation",
    "evaluate",
    "evaluate_images",
    "evaluate_law",
]
