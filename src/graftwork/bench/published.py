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


def _rows(suite: str, backbone: str, tasks: str, source: str, lines: tuple[str, ...]) -> tuple[Published, ...]:
    out = []
    for line in lines:
        method, parameters, numbers = (part.strip() for part in line.split("|"))
        scores = dict(zip(tasks.split(), map(float, numbers.split()), strict=True))
        out.append(Published(suite, backbone, method, parameters, scores, source))
    return tuple(out)


GLUE = "mnli sst2 mrpc cola qnli qqp rte stsb"
LORA = "Hu et al. 2022, LoRA, arXiv 2106.09685, table 2 (full tuning, BitFit, AdapterDrop's adapters as quoted there)"
VTAB = (
    "cifar100 caltech101 dtd flowers102 pets svhn sun397 camelyon eurosat resisc45 retinopathy clevr_count clevr_dist dmlab kitti_dist "
    "dsprites_loc dsprites_ori smallnorb_azi smallnorb_ele"
)
VPT = "Jia et al. 2022, Visual Prompt Tuning, arXiv 2203.12119, table of VTAB-1k by task"
PETL = "Xin et al. 2024, V-PETL Bench, NeurIPS 2024, table of VTAB-1k (partly quoted there from the methods' papers)"
VIT = "ViT-B/16, ImageNet-21k"
PUBLISHED = (
    *_rows(
        "glue",
        "roberta-base",
        GLUE,
        LORA,
        (
            "full tuning           | 125.0M | 87.6 94.8 90.2 63.6 92.8 91.9 78.7 91.2",
            "BitFit                | 0.1M   | 84.7 93.7 92.7 62.0 91.8 84.0 81.5 90.8",
            "Adapter (AdapterDrop) | 0.3M   | 87.1 94.2 88.5 60.8 93.1 90.2 71.5 89.7",
            "Adapter (AdapterDrop) | 0.9M   | 87.3 94.7 88.4 62.6 93.0 90.6 75.9 90.3",
            "LoRA                  | 0.3M   | 87.5 95.1 89.7 63.4 93.3 90.8 86.6 91.5",
        ),
    ),
    *_rows(
        "glue",
        "roberta-large",
        GLUE,
        LORA,
        (
            "full tuning | 355.0M | 90.2 96.4 90.9 68.0 94.7 92.2 86.6 92.4",
            "LoRA        | 0.8M   | 90.6 96.2 90.9 68.2 94.9 91.6 87.4 92.6",
        ),
    ),
    *_rows(
        "vtab",
        VIT,
        VTAB,
        VPT,
        (
            "full tuning  | 85.8M | 68.9 87.7 64.3 97.2 86.9 87.4 38.8 79.7 95.7 84.2 73.9 56.3 58.6 41.7 65.5 57.5 46.7 25.7 29.1",
            "linear probe | head  | 63.4 85.0 63.2 97.0 86.3 36.6 51.0 78.5 87.5 68.6 74.0 34.3 30.6 33.2 55.4 12.5 20.0 9.6 19.2",
            "VPT-deep     | 0.73% | 78.8 90.8 65.8 98.0 88.3 78.1 49.6 81.8 96.1 83.4 68.4 68.5 60.0 46.5 72.8 73.6 47.9 32.9 37.8",
        ),
    ),
    *_rows(
        "vtab",
        VIT,
        VTAB,
        PETL,
        (
            "BitFit      | 0.10M | 72.8 87.0 59.2 97.5 85.3 59.9 51.4 78.7 91.6 72.9 69.8 61.5 55.6 32.4 55.9 66.6 40.0 15.7 25.1",
            "Adapter     | 0.16M | 69.2 90.1 68.0 98.8 89.9 82.8 54.3 84.0 94.9 81.9 75.5 80.9 65.3 48.6 78.3 74.8 48.5 29.9 41.6",
            "LoRA        | 0.29M | 67.1 91.4 69.4 98.8 90.4 85.3 54.0 84.9 95.3 84.4 73.6 82.9 69.2 49.8 78.5 75.7 47.1 31.0 44.0",
            "AdaptFormer | 0.16M | 70.8 91.2 70.5 99.1 90.9 86.6 54.8 83.0 95.8 84.4 76.3 81.9 64.3 49.3 80.3 76.3 45.7 31.7 41.1",
            "SSF         | 0.21M | 69.0 92.6 75.1 99.4 91.8 90.2 52.9 87.4 95.9 87.4 75.5 75.9 62.3 53.3 80.6 77.3 54.9 29.5 37.9",
            "Hydra       | 0.28M | 72.7 91.3 72.0 99.2 91.4 90.7 55.5 85.8 96.0 86.1 75.9 83.2 68.2 50.9 82.3 80.3 50.8 34.5 43.1",
            "LST         | 2.38M | 59.5 91.5 69.0 99.2 89.9 79.5 54.6 86.9 95.9 85.3 74.1 81.8 61.8 52.2 81.0 71.7 49.5 33.7 45.2",
        ),
    ),
)  # fmt: skip
