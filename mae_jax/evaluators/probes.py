"""What features tell about classes, in closed form: probes cheap enough to run while training.

Plain NumPy on the host; the same features always give the same number.
"""

from collections.abc import Iterable

import numpy as np

from mae_jax.models.classifier import BATCH_NORM_EPS

PENALTIES = (1e1, 1e0, 1e-1, 1e-2, 1e-3, 1e-4)  # the strongest first: it wins where two tie
KNN_CHUNK = 512  # evaluation rows compared at once


def ridge_probe(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    eval_features: np.ndarray,
    eval_labels: np.ndarray,
    classes: int,
) -> float:
    """Top-1 accuracy (0 to 1) of a linear classifier fitted by least squares.

    Ridge regression from features [N >= 2, D] on one-hot targets, as big_vision's fewshot_lsr,
    scored on [M, D]; labels lie in [0, classes). Features are standardised by the mean and variance
    of the training part, which is batch norm without affine; the targets are less their mean; the
    weights are ``(X'X + lambda n I)^-1 X'Y``. Lambda is the one of `PENALTIES` that does best on a
    random fifth of the training part, fixed for n; then all of it is fitted. Raises ValueError:
    shapes or labels that do not fit, or features that are not finite.
    """
    _check(train_features, train_labels, eval_features, eval_labels, classes)
    x, x_eval = train_features.astype(np.float64), eval_features.astype(np.float64)
    order = np.random.default_rng(0).permutation(len(x))
    held_out, fitted = np.split(order, [max(1, len(x) // 5)])
    scores = [
        _top1(x[held_out] @ kernel + bias, train_labels[held_out])
        for kernel, bias in _ridge(x[fitted], train_labels[fitted], classes, PENALTIES)
    ]
    best = PENALTIES[int(np.argmax(scores))]
    [(kernel, bias)] = _ridge(x, train_labels, classes, [best])
    return _top1(x_eval @ kernel + bias, eval_labels)


def _ridge(
    x: np.ndarray, labels: np.ndarray, classes: int, penalties: Iterable[float]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each penalty the kernel [D, K] and bias [K] that go with features [N, D] as they are."""
    mean, deviation = x.mean(axis=0), np.sqrt(x.var(axis=0) + BATCH_NORM_EPS)  # [D] each
    z = (x - mean) / deviation  # [N, D]
    prior = np.bincount(labels, minlength=classes) / len(labels)  # [K]
    gram = z.T @ z  # [D, D]
    # z' times the one-hot targets. Centring them changes nothing, the columns of z sum to 0.
    cross = np.stack([z[labels == c].sum(axis=0) for c in range(classes)], axis=1)  # [D, K]
    classifiers = []
    for penalty in penalties:
        kernel = np.linalg.solve(gram + penalty * len(x) * np.eye(x.shape[1]), cross)  # [D, K]
        kernel /= deviation[:, None]
        classifiers.append((kernel, prior - mean @ kernel))
    return classifiers


def knn_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    eval_features: np.ndarray,
    eval_labels: np.ndarray,
    classes: int,
    *,
    k: int,
    temperature: float = 0.07,
) -> float:
    """Top-1 accuracy (0 to 1) of the vote of the k nearest training features.

    Neighbours by cosine similarity s, each voting with weight exp(s / temperature) (DINO, arXiv
    2104.14294). A poor measure of MAE: its features are spread over many directions of small
    variance that a linear layer can weigh and a distance cannot.

    Arguments and errors as in `ridge_probe`; of fewer than k training examples all vote."""
    _check(train_features, train_labels, eval_features, eval_labels, classes)
    train, evaluation = _unit(train_features), _unit(eval_features)
    k = min(k, len(train))
    hits = 0
    for start in range(0, len(evaluation), KNN_CHUNK):
        similarity = evaluation[start : start + KNN_CHUNK] @ train.T  # [m, N]
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]  # [m, k]
        similarity = np.take_along_axis(similarity, nearest, axis=1)  # [m, k]
        weights = np.exp((similarity - 1) / temperature)  # scaled to stay finite
        votes = np.zeros((len(nearest), classes))
        np.add.at(votes, (np.arange(len(nearest))[:, None], train_labels[nearest]), weights)
        hits += (votes.argmax(axis=1) == eval_labels[start : start + KNN_CHUNK]).sum()
    return float(hits / len(evaluation))


def _unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _top1(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((scores.argmax(axis=1) == labels).mean())


def _check(x: np.ndarray, y: np.ndarray, x_eval: np.ndarray, y_eval: np.ndarray, k: int) -> None:
    for features, labels in ((x, y), (x_eval, y_eval)):
        if features.shape != (len(labels), x.shape[-1]) or not len(labels):
            raise ValueError(f"features {features.shape} do not go with {len(labels)} labels")
        if labels.min() < 0 or labels.max() >= k:
            raise ValueError(f"labels {labels.min()} to {labels.max()} for {k} classes")
        if not np.isfinite(features).all():
            raise ValueError("features are not finite")
    if len(y) < 2:
        raise ValueError("a probe needs at least 2 training examples")
