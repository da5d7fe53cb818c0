"""Scores against hand-made numbers."""

from __future__ import annotations

import numpy as np
import pytest

from graftwork.train import metrics


def test_classification() -> None:
    scores = metrics.classification(np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0]), 2)
    assert scores["accuracy"] == 0.75
    assert scores["f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert metrics.classification(np.array([0, 0]), np.array([0, 0]), 3)["f1"] == pytest.approx(1 / 3)


def test_regression() -> None:
    scores = metrics.regression(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))
    assert scores["mean_squared_error"] == pytest.approx(1 / 3)
    assert scores["spearman"] == pytest.approx(1.0)
    assert metrics.regression(np.array([1.0, 1.0]), np.array([1.0, 2.0]))["pearson"] == 0.0


def test_language_counts_labelled_tokens_only() -> None:
    labels = np.array([[5, 6, -100], [7, -100, -100]])
    predicted = np.array([[5, 0, 3], [7, 9, 9]])
    nll = np.array([[1.0, 2.0, 50.0], [3.0, 50.0, 50.0]])
    scores = metrics.language(predicted, nll, labels)
    assert scores["perplexity"] == pytest.approx(np.exp(2.0))
    assert scores["token_accuracy"] == pytest.approx(2 / 3)
    assert scores["exact"] == 0.5


def test_entities_are_scored_whole() -> None:
    tags = ["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-PER"]
    assert metrics.entities(tags) == {(0, 2, "PER"), (3, 4, "LOC"), (4, 5, "LOC"), (5, 6, "PER")}
    scores = metrics.tagging([["B-PER", "O", "B-LOC"]], [["B-PER", "I-PER", "B-LOC"]])
    assert scores["f1"] == 0.5 and scores["accuracy"] == pytest.approx(2 / 3)
    assert metrics.tagging([["x", "y"]], [["x", "x"]])["f1"] == pytest.approx((2 / 3) / 2)
