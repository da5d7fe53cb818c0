"""Scores, from scikit-learn where it has them. All are plain floats, larger is better unless the name says loss or
error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn import metrics as sk

from ..core.errors import GraftError

IGNORED = -100  # the label of a position that does not count, as transformers has it


def classification(predicted: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> dict[str, float]:
    """accuracy, macro F1 over all classes, Matthews correlation."""
    everything = list(range(classes))
    f1 = sk.f1_score(labels, predicted, labels=everything, average="macro", zero_division=0)
    scores = {"accuracy": float(sk.accuracy_score(labels, predicted)), "f1": float(f1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one class only in a small evaluation set: the correlation is 0
        scores["matthews"] = float(sk.matthews_corrcoef(labels, predicted))
    return scores


def regression(predicted: NDArray[np.float64], labels: NDArray[np.float64]) -> dict[str, float]:
    """mean squared and absolute error, R^2, Pearson and Spearman correlation (0 where one side is constant)."""
    scores = {
        "mean_squared_error": float(sk.mean_squared_error(labels, predicted)),
        "mean_absolute_error": float(sk.mean_absolute_error(labels, predicted)),
        "r2": float(sk.r2_score(labels, predicted)) if len(labels) > 1 else 0.0,
    }
    scores["pearson"] = _correlation(predicted, labels)
    scores["spearman"] = _correlation(_ranks(predicted), _ranks(labels))
    return scores


def language(predicted: NDArray[np.int64], nll: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, float]:
    """Over the tokens that count (label not -100): perplexity, token accuracy; over rows: share with every token right.

    predicted, labels [rows, positions];  nll [rows, positions], the negative log-likelihood of each label. A row
    whose tokens are all right when the model is fed the true beginning is exactly a row that greedy generation
    gets right.
    """
    counted = labels != IGNORED
    right = (predicted == labels) | ~counted
    rows = counted.any(axis=1)
    loss = float(nll[counted].mean(dtype=np.float64)) if counted.any() else 0.0
    return {
        "perplexity": math.exp(min(loss, 700.0)),
        "token_accuracy": float((predicted == labels)[counted].mean()) if counted.any() else 0.0,
        "exact": float(right.all(axis=1)[rows].mean()) if rows.any() else 0.0,
    }


def tagging(predicted: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> dict[str, float]:
    """Token accuracy, and F1: of whole entities for B-/I- tags (a span counts if its type and both ends are
    right), macro over tags otherwise."""
    flat_labels = [tag for row in labels for tag in row]
    flat_predicted = [tag for row in predicted for tag in row]
    scores = {"accuracy": float(sk.accuracy_score(flat_labels, flat_predicted))}
    if all(tag == "O" or tag[:2] in ("B-", "I-") for tag in flat_labels):
        found = {(i, *span) for i, row in enumerate(predicted) for span in entities(row)}
        true = {(i, *span) for i, row in enumerate(labels) for span in entities(row)}
        scores["f1"] = 2 * len(found & true) / max(len(found) + len(true), 1)
    else:
        scores["f1"] = float(sk.f1_score(flat_labels, flat_predicted, average="macro", zero_division=0))
    return scores


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """The spans (start, end, type) of B-/I- tags. An I- that does not go on from the same type starts a span, as
    in CoNLL."""
    spans, start, kind = set(), 0, ""
    for i, tag in enumerate([*tags, "O"]):
        begins = tag.startswith("B-") or (tag.startswith("I-") and tag[2:] != kind)
        if kind and (begins or tag == "O"):
            spans.add((start, i, kind))
            kind = ""
        if begins:
            start, kind = i, tag[2:]
    return spans


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.stats import rankdata

    return np.asarray(rankdata(values), dtype=np.float64)


def decathlon(errors: Sequence[float], fine_tuned: Sequence[float]) -> float:
    """S = sum_d a_d max(0, E'_d - E_d)^2,  E'_d = twice the error of fine-tuning on task d,  a_d = 1000 / E'_d^2.

    Errors are shares in [0, 1]. Ten tasks without an error are 10,000, ten as fine-tuning leaves them 2,500.
    Source: Rebuffi et al. 2017, eq. 3 (Visual Decathlon).
    """
    pairs = list(zip(errors, fine_tuned, strict=True))
    if any(reference <= 0 for _, reference in pairs):
        raise GraftError("a decathlon score", "a reference without errors", "give the errors of fine-tuning, above 0")
    return sum(1000 * max(0.0, 1 - error / (2 * reference)) ** 2 for error, reference in pairs)
