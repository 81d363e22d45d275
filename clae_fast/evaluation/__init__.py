"""Measures how good an encoder is: probes on its features, fine-tuning, robustness, geometry.

No measurement chooses anything by the test images, except `released`, which says so.
"""

from clae_fast.evaluation.features import extract_features
from clae_fast.evaluation.geometry import alignment, uniformity, view_geometry
from clae_fast.evaluation.intervals import mean_and_interval, with_interval
from clae_fast.evaluation.knn import knn_accuracy, leave_one_out_knn
from clae_fast.evaluation.linear import accuracy, fit_linear, linear_accuracy

__all__ = [
    "accuracy",
    "alignment",
    "extract_features",
    "fit_linear",
    "knn_accuracy",
    "leave_one_out_knn",
    "linear_accuracy",
    "mean_and_interval",
    "uniformity",
    "view_geometry",
    "with_interval",
]
