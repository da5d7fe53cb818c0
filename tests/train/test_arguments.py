"""Settings, and the arguments that are passed through to the Trainer."""

from __future__ import annotations

import pytest

from graftwork.core.errors import GraftError
from graftwork.train.arguments import arguments, passed_through
from graftwork.train.columns import Columns
from graftwork.train.settings import DataSettings, FitSettings, TrainSettings
from graftwork.train.tasks.classification import Classification

TASK = Classification(Columns("texts", "text", None, "label"), ("a", "b"))


def test_values_are_typed() -> None:
    found = passed_through(("max_grad_norm=0.5", "adam-beta1=0.8", "fp16_full_eval=true", "optim=adafactor"))
    assert found == {"max_grad_norm": 0.5, "adam_beta1": 0.8, "fp16_full_eval": True, "optim": "adafactor"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_grad_nom=1", "did you mean 'max_grad_norm'"),
        ("max_grad_norm=high", "invalid float"),
        ("output_dir=elsewhere", "graftwork sets it itself"),
        ("bf16", "no '='"),
    ],
)
def test_wrong_arguments_are_refused(text: str, says: str) -> None:
    with pytest.raises(GraftError, match=says):
        passed_through((text,))


def test_settings_reach_the_trainer(tmp_path) -> None:
    fit = FitSettings(steps=7, accumulate=3, checkpointing=True, schedule="cosine", trainer=("max_grad_norm=0.1",))
    made = arguments(fit, TASK, str(tmp_path), 1e-3, evaluates=True)
    assert made.max_steps == 7 and made.gradient_accumulation_steps == 3 and made.max_grad_norm == 0.1
    assert made.gradient_checkpointing or getattr(made, "activation_checkpointing", False)
    assert made.lr_scheduler_type == "cosine" and made.metric_for_best_model == "eval_accuracy"


def test_settings_refuse_what_makes_no_sense(tmp_path) -> None:
    for make in (
        lambda: FitSettings(batch=0),
        lambda: FitSettings(lr=-1.0),
        lambda: DataSettings("x", holdout=1.0),
        lambda: DataSettings(" "),
        lambda: TrainSettings("", "out", DataSettings("x")),
    ):
        with pytest.raises(GraftError, match="the setting --"):
            make()
    with pytest.raises(GraftError, match="no rows to evaluate on"):
        arguments(FitSettings(early_stopping=2), TASK, str(tmp_path), 1e-3, evaluates=False)
    with pytest.raises(GraftError, match="did you mean 'cosine'"):
        arguments(FitSettings(schedule="cosin"), TASK, str(tmp_path), 1e-3, evaluates=True)
