"""Numbers that papers print for the suites, each with its source. They are shown beside ours and never mixed with them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One row of a table in a paper. parameters: trained, as printed;  scores: in percent, by task."""

    suite: str
    backbone: str
    method: str
    parameters: str
    scores: dict[str, float]
    source: str


def _rows(suite: str, tasks: str, source: str, lines: tuple[str, ...]) -> tuple[Published, ...]:
    out = []
    for line in lines:
        backbone, method, parameters, numbers = (part.strip() for part in line.split("|"))
        scores = dict(zip(tasks.split(), map(float, numbers.split()), strict=True))
        out.append(Published(suite, backbone, method, parameters, scores, source))
    return tuple(out)


PUBLISHED = (
    *_rows(
        "glue",
        "mnli sst2 mrpc cola qnli qqp rte stsb",
        "Hu et al. 2022, LoRA, arXiv 2106.09685, table 2 (full tuning, BitFit, AdapterDrop's adapters as quoted there)",
        (
            "roberta-base | full tuning | 125.0M | 87.6 94.8 90.2 63.6 92.8 91.9 78.7 91.2",
            "roberta-base | BitFit | 0.1M | 84.7 93.7 92.7 62.0 91.8 84.0 81.5 90.8",
            "roberta-base | Adapter (AdapterDrop) | 0.3M | 87.1 94.2 88.5 60.8 93.1 90.2 71.5 89.7",
            "roberta-base | Adapter (AdapterDrop) | 0.9M | 87.3 94.7 88.4 62.6 93.0 90.6 75.9 90.3",
            "roberta-base | LoRA | 0.3M | 87.5 95.1 89.7 63.4 93.3 90.8 86.6 91.5",
            "roberta-large | full tuning | 355.0M | 90.2 96.4 90.9 68.0 94.7 92.2 86.6 92.4",
            "roberta-large | LoRA | 0.8M | 90.6 96.2 90.9 68.2 94.9 91.6 87.4 92.6",
        ),
    ),
    *_rows(
        "vtab",
        "cifar100 caltech101 dtd flowers102 pets svhn sun397 camelyon eurosat resisc45",
        "Jia et al. 2022, Visual Prompt Tuning, arXiv 2203.12119, table of VTAB-1k by task",
        (
            "ViT-B/16, ImageNet-21k | full tuning | 85.8M | 68.9 87.7 64.3 97.2 86.9 87.4 38.8 79.7 95.7 84.2",
            "ViT-B/16, ImageNet-21k | linear probe | head | 63.4 85.0 63.2 97.0 86.3 36.6 51.0 78.5 87.5 68.6",
            "ViT-B/16, ImageNet-21k | VPT-deep | 0.73% | 78.8 90.8 65.8 98.0 88.3 78.1 49.6 81.8 96.1 83.4",
        ),
    ),
)  # fmt: skip
