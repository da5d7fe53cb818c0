"""Training objectives beside the task's own loss: pure functions of what a model returns."""
