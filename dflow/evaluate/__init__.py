"""What a model costs: exact bits of a text or of images, or bounds; distance from a known law; labels."""

from dflow.evaluate.images import (
    ExactEvaluation,
    ImageEvaluation,
    check_data,
    evaluate_exact,
    evaluate_images,
)
from dflow.evaluate.labels import LabelEvaluation, Score, evaluate_labels
from dflow.evaluate.text import Evaluation, LawEvaluation, Protocol, evaluate, evaluate_law

__all__ = [
    "Evaluation",
    "ExactEvaluation",
    "ImageEvaluation",
    "LabelEvaluation",
    "LawEvaluation",
    "Protocol",
    "Score",
    "check_data",
    "evaluate",
    "evaluate_exact",
    "evaluate_images",
    "evaluate_labels",
    "evaluate_law",
]
