"""What a config says about the backbone, for those who choose a model by it."""

from __future__ import annotations

from typing import Any

from ...core.body import Body

# the ends of transformers' class names, which name the task
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def about(body: Body) -> dict[str, Any]:
    """base_model_name_or_path and task_type."""
    model = body.modules[""]
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    task = next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None)
    return {"base_model_name_or_path": name, "task_type": task, "inference_mode": True}
