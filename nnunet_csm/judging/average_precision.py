"""How much of the lesions a linear classifier finds in the features of tokens."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

# strengths of the classifier's ridge to choose from, as scikit-learn's C
STRENGTHS = (1e-4, 1e-2, 1.0)


@dataclass(frozen=True)
class LabelledTokens:
    """Tokens of some subjects."""

    lesion: Bool[np.ndarray, " n"]
    """More than half of the voxels are labelled."""
    subject: Int[np.ndarray, " n"]


def average_precision(
    training: Float[np.ndarray, "n f"],
    labels: LabelledTokens,
    validation: Float[np.ndarray, "m f"],
    lesion: Bool[np.ndarray, " m"],
) -> float:
    """Score a logistic regression fitted on the training tokens, on all validation tokens together.

    Its ridge is chosen on every other training subject. NaN when either side lacks tokens of a class, or when features are not
    finite: those of a network that diverged.
    """
    if not (np.isfinite(training).all() and np.isfinite(validation).all()):
        return float("nan")
    odd = np.isin(labels.subject, np.unique(labels.subject)[1::2])
    if not (_both(labels.lesion) and _both(lesion)):
        return float("nan")
    strength = STRENGTHS[len(STRENGTHS) // 2]
    if _both(labels.lesion[odd]) and _both(labels.lesion[~odd]):
        scores = [_score(_fitted(training[~odd], labels.lesion[~odd], c), training[odd], labels.lesion[odd]) for c in STRENGTHS]
        strength = STRENGTHS[int(np.argmax(scores))]
    return _score(_fitted(training, labels.lesion, strength), validation, lesion)


def _both(lesion: np.ndarray) -> bool:
    return bool(lesion.any() and not lesion.all())


def _fitted(features: np.ndarray, lesion: np.ndarray, strength: float) -> Pipeline:
    # exact in a few steps when there are more tokens than features; double precision, since features may nearly repeat others
    classifier = LogisticRegression(C=strength, solver="newton-cholesky")
    return make_pipeline(StandardScaler(), classifier).fit(features.astype(np.float64), lesion)


def _score(classifier: Pipeline, features: np.ndarray, lesion: np.ndarray) -> float:
    return float(average_precision_score(lesion, classifier.decision_function(features)))
