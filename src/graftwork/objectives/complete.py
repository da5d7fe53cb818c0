"""Self-distillation from the complete model: the second half of the loss of a model that leaves out some of its work.

Zhao et al. 2024, "Dynamic Tuning Towards Parameter and Inference Efficiency for ViT Adaptation", section 3;
NUS-HPC-AI-Lab/Dynamic-Tuning, engine_finetune.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def complete_loss(dynamic: Tensor, complete: Tensor, labels: Tensor) -> Tensor:
    """CE(complete, labels) + KL(p_complete || p_dynamic), p_complete without a gradient; a scalar in nats, a mean over the batch.

    dynamic, complete: logits [batch, classes] of a pass as it is, and of one in which nothing is left out:

        out = model(**batch)
        with gw.context(model, complete=True):
            whole = model(**batch)
        loss = out.loss + gw.auxiliary_loss(model) + gw.complete_loss(out.logits, whole.logits, batch["labels"])

    The direction is that of the released code: `kl_div` with the complete model as its target.
    """
    student, teacher = dynamic.float().log_softmax(-1), complete.detach().float().log_softmax(-1)
    kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return F.cross_entropy(complete.float(), labels) + kl
