"""What a model costs: exact bits of a text or of images, or bounds; distance from a known law; labels."""

from dflow.evaluate.images import (
    ExactEvaluation,
    ImageEvaluation,
    check_data,
    evaluate_exact,
    evaluate_images,
)
from dflow.evaluate.labels import LabelEvaluation, LabelScore, evaluate_labels
from dflow.evaluate.text import Evaluation, LawEvaluation, Protocol, evaluate, evaluate_law

__all__ = [
    "Evaluation",
    "ExactEvaluation",
    "ImageEvaluation",
    "LabelEvaluation",
    "LabelScore",
    "LawEvaluation",
    "Protocol",
    "check_data",
    "evaluate",
    "evaluate_exact",
    "evaluate_images",
    "evaluate_labels",
    "evaluate_law",
]
