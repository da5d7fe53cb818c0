"""What a config says about the backbone, for those who choose a model by it."""

from __future__ import annotations

from typing import Any

from ...sites.body import Body

# the ends of transformers' class names, which name the task; and the class that opens any backbone for it
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
HEADED = (
    "SEQ_CLS",
    "TOKEN_CLS",
    "QUESTION_ANS",
)  # PEFT takes the head from the file, for these, and fails where it is not in it
OPENERS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def about(body: Body, with_head: bool) -> dict[str, Any]:
    """base_model_name_or_path and task_type.  with_head: whether the file holds whole modules."""
    model = body.modules[""]
    config = getattr(model, "config", None)
    task = next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None)
    if type(model).__name__.endswith("ForConditionalGeneration") and getattr(config, "is_encoder_decoder", False):
        task = "SEQ_2_SEQ_LM" if getattr(model, "main_input_name", "") == "input_ids" else None
    task = task if with_head or task not in HEADED else None
    name = getattr(config, "_name_or_path", "") or None
    return {"base_model_name_or_path": name, "task_type": task, "inference_mode": True}


def origin(data: dict[str, Any]) -> tuple[str | None, str | None]:
    """(the backbone's name, transformers' name of its class) as a config says them."""
    name, mapping, task = (data.get(key) for key in ("base_model_name_or_path", "auto_mapping", "task_type"))
    kind = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    kind = kind or (OPENERS.get(task) if isinstance(task, str) else None)
    return name if isinstance(name, str) else None, kind if isinstance(kind, str) else None
