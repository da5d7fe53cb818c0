"""Benchmarks of the literature: where their rows are, which split is tested on, and what is measured, as published.

GLUE's test labels are kept back, so papers report its validation rows; these are tested on here, once for each seed, and the dev
rows of the tuning are taken from the training rows. VTAB-1k trains on 1,000 rows: learning rates are chosen with 800 and 200 of
them, then all 1,000 are trained on, and all test rows tested on.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import GraftError, nearest


@dataclass(frozen=True)
class Source:
    """Where a task's rows are and what is measured.

    place: what `graftwork train --data` takes;  metric: "" for the main score of the kind of task;  tested: the split that is
    tested on;  train_rows, dev_rows: how many (None: all, and what the settings say);  refit: the runs that count learn from the
    dev rows too, once the learning rate is chosen.
    """

    name: str
    place: str
    metric: str = ""
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    tested: str = "test"
    train_rows: int | None = None
    dev_rows: int | None = None
    refit: bool = False


def _glue(name: str, text: str, pair: str | None, metric: str = "accuracy") -> Source:
    return Source(name, f"hub:nyu-mll/glue/{name}", metric, text, pair, "label", tested="eval")


def _vtab(name: str, repo: str, label: str = "label", image: str = "image") -> Source:
    return Source(name, f"hub:{repo}", "accuracy", image, None, label, train_rows=800, dev_rows=200, refit=True)


def _shards(name: str, task: str) -> Source:
    """A task of VTAB that CLIP benchmark holds as archives of images (webp) and numbers of classes (cls)."""
    return _vtab(name, f"clip-benchmark/wds_vtab-{task}/*.tar", "cls", "webp")


# Wang et al. 2019, "GLUE", table 1; metrics as in the tables of LoRA and its followers (MNLI: matched)
GLUE = (
    _glue("mnli", "premise", "hypothesis"),
    _glue("sst2", "sentence", None),
    _glue("mrpc", "sentence1", "sentence2"),
    _glue("cola", "sentence", None, "matthews"),
    _glue("qnli", "question", "sentence"),
    _glue("qqp", "question1", "question2"),
    _glue("rte", "sentence1", "sentence2"),
    _glue("stsb", "sentence1", "sentence2", "pearson"),
)
# Zhai et al. 2019, "A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark", table 2: the natural
# tasks, the specialised ones, the structured ones
VTAB = (
    _vtab("cifar100", "uoft-cs/cifar100", "fine_label", "img"),
    _vtab("caltech101", "dpdl-benchmark/caltech101"),
    _vtab("dtd", "tanganke/dtd"),
    _vtab("flowers102", "dpdl-benchmark/oxford_flowers102"),
    _vtab("pets", "timm/oxford-iiit-pet"),
    _vtab("svhn", "ufldl-stanford/svhn/cropped_digits"),
    _vtab("sun397", "tanganke/sun397"),
    _vtab("camelyon", "dpdl-benchmark/patch_camelyon"),
    _vtab("eurosat", "tanganke/eurosat"),
    _vtab("resisc45", "tanganke/resisc45"),
    _shards("retinopathy", "diabetic_retinopathy"),
    _shards("clevr_count", "clevr_count_all"),
    _shards("clevr_dist", "clevr_closest_object_distance"),
    _shards("dmlab", "dmlab"),
    _shards("kitti_dist", "kitti_closest_vehicle_distance"),
    _shards("dsprites_loc", "dsprites_label_x_position"),
    _shards("dsprites_ori", "dsprites_label_orientation"),
    _shards("smallnorb_azi", "smallnorb_label_azimuth"),
    _shards("smallnorb_ele", "smallnorb_label_elevation"),
)
SUITES = {"glue": GLUE, "vtab": VTAB}


def suite(name: str) -> tuple[Source, ...]:
    """The tasks of a suite. GraftError for an unknown one."""
    if name not in SUITES:
        raise GraftError(f"--suite {name}", f"unknown{nearest(name, SUITES)}", f"choose one of {', '.join(SUITES)}")
    return SUITES[name]
