"""`transformers.Trainer` for adapters: what it saves is the adapter alone, what it averages is exact, and an
interrupt costs nothing."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..core.method import Method
from ..grafting.moments import auxiliary_loss, step
from ..store import save
from .row_tasks import collating, into_context
from .tasks import Task

ADAPTER = "adapter"  # the adapter's folder within a checkpoint


class GraftTrainer(Trainer):
    """A Trainer whose checkpoints hold the adapter in graftwork's own format, in checkpoint-N/adapter. The
    backbone is never saved.

    The adapter is loaded from a checkpoint before the Trainer is made; the Trainer itself restores the optimiser,
    the schedule and the random generators.  own_rates: each method has its own learning rate (`Method.lr`), of which the
    Trainer's is that of LoRA.
    """

    def __init__(
        self, *, adapter: Adapter, task: Task, callbacks: list[TrainerCallback], own_rates: bool = False, **given: Any
    ) -> None:
        self.own_rates = own_rates
        super().__init__(
            callbacks=[Moments(self, adapter, given["model"], given["data_collator"]), *callbacks], **given
        )
        self.remove_callback(PrinterCallback)  # what is said during training is up to the caller's callbacks
        self.adapter, self.task = adapter, task
        twice = next((method for method in adapter.methods if "again" in method.needs), None)
        if twice is not None and self.args.world_size > 1:
            found = "two passes of a step, each with other copies in each process"
            do = "train in one, or with consistency=0 and ddp_find_unused_parameters=true"
            raise GraftError(f"train {twice} in {self.args.world_size} processes", found, do)
        self.data_collator = collating(self.data_collator)
        # `compute_loss` scales for accumulation and processes itself, so the Trainer must not
        self.model_accepts_loss_kwargs = True

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer does it. On CPUs accelerate drops a wish for FSDP without a word: there it is told once
        more."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer does it, with the learning rates that the methods ask for in groups of their own."""
        made, optimizer = self.optimizer is None, super().create_optimizer(model)
        if made:
            split(optimizer, self.adapter, self.own_rates)
        return optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of one optimiser step, and how many labels they hold on all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.samples = samples
        count = sum((self.task.items(batch["labels"]) for batch in samples), torch.tensor(0)).to(device)
        return samples, self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss, in training weighted so that a step is the mean over all its labels, whatever the
        accumulation and the number of processes (many models accept `num_items_in_batch` and ignore it), plus the
        adapter's auxiliary loss."""
        plain = self.accelerator.unwrap_model(model)
        given = into_context(plain, inputs)
        outputs = model(**given)
        labels = inputs["labels"]
        if self.label_smoother is not None:
            loss = self.label_smoother(outputs, labels, shift_labels=self.task.name == "causal")
        else:
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        if model.training and num_items_in_batch is not None:
            share = self.task.items(labels) / num_items_in_batch
            extra = auxiliary_loss(plain, outputs, lambda: plain(**given))
            # the processes' gradients are averaged afterwards
            loss = loss * share * self.accelerator.num_processes + extra / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def step_apart(self) -> None:
        """After the optimiser's step: the one of losses that have a step of their own, on the same batches."""
        model, optimizer = self.accelerator.unwrap_model(self.model), self.optimizer
        if optimizer is None or not any("apart" in method.needs for method in self.adapter.methods):
            return
        optimizer.zero_grad()
        for batch in self.samples:
            with self.compute_loss_context_manager():
                model(**into_context(model, self._prepare_inputs(batch)))
                loss = auxiliary_loss(model, apart=True)
            if isinstance(loss, Tensor):
                self.accelerator.backward(loss / len(self.samples))
        if self.args.world_size > 1:  # DDP averages the gradients of its own passes alone
            for p in self.adapter.parameters():
                if p.grad is not None and not isinstance(p.grad, DTensor):
                    p.grad = self.accelerator.reduce(p.grad, "mean")
        optimizer.step()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter with all that training needs, in output_dir/adapter. All processes must call it; the first
        one writes."""
        folder = Path(output_dir or str(self.args.output_dir)) / ADAPTER
        with gathered(self.adapter):
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # what a killed run left of the same step
                folder.parent.mkdir(parents=True, exist_ok=True)
                save(self.accelerator.unwrap_model(self.model), self.adapter.name, folder, resume=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the adapter was loaded before the Trainer was made."""

    def _load_best_model(self) -> None:
        """Nothing: `Best` keeps the best values in memory, which also holds where they are sharded."""


def split(optimizer: torch.optim.Optimizer, adapter: Adapter, own: bool = False) -> None:
    """Give the parameters of an adapter whose learning rate is a multiple of the others' (`Method.rate`; `own`: also `Method.lr`)
    their own groups."""
    base, asked = (Method.lr, None) if own else (1.0, 1.0)
    rates = {id(p): group["lr"] / base for group in adapter.groups(asked) for p in group["params"]}
    for group in list(optimizer.param_groups):
        for rate in sorted({rates.get(id(p), 1.0) for p in group["params"]} - {1.0}):
            alike = [p for p in group["params"] if rates.get(id(p), 1.0) == rate]
            group["params"] = [p for p in group["params"] if rates.get(id(p), 1.0) != rate]
            optimizer.add_param_group({**group, "params": alike, "lr": group["lr"] * rate})


class Moments(TrainerCallback):
    """What the adapter's methods and the data must be told during training."""

    def __init__(self, trainer: GraftTrainer, adapter: Adapter, model: nn.Module, collator: Any) -> None:
        self.trainer, self.adapter, self.model, self.collator = trainer, adapter, model, collator

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if hasattr(self.collator, "epoch"):
            self.collator.epoch = int(state.epoch or 0)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        # gradients are still there; the Trainer counts the step only afterwards
        step(self.model, min((state.global_step + 1) / state.max_steps, 1.0), given.get("optimizer"))
        self.trainer.step_apart()


class Best(TrainerCallback):
    """Keeps the values of the best evaluated state, and puts them back at the end."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.values: dict[str, Tensor] = {}
        self.score: float | None = None

    def start_from(self, values: dict[str, Tensor], score: float | None) -> None:
        """Values that an earlier, interrupted part of the run found best."""
        self.values, self.score = values, score

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # an evaluation always comes with a save, and just before it
        if state.best_global_step == state.global_step and state.best_metric != self.score:
            self.values = {name: value.detach().clone() for name, value in self.adapter.state_dict().items()}
            self.score = state.best_metric

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best values back."""
        current = self.adapter.state_dict()
        for name, value in self.values.items():
            place = current[name]
            if isinstance(place, DTensor) and not isinstance(value, DTensor):
                value = distribute_tensor(value, place.device_mesh, place.placements)
            place.copy_(value)


class Interrupt(TrainerCallback):
    """Ctrl-C (and SIGTERM) ends the step at hand, writes a checkpoint and stops; a second one stops at once.

    Only where one process trains: several would not stop at the same step. There the last checkpoint is what remains.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside this block, the first signal is kept for the end of the step."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._asked) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # the end of an epoch has its own evaluation, which belongs before the checkpoint
        if self.asked and not float(state.epoch or 0.0).is_integer():
            control.should_save = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.asked:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def gathered(adapter: Adapter) -> Iterator[None]:
    """Inside this block, the adapter's sharded tensors are whole ones, on every process. All processes must enter
    it."""
    # FSDP leaves some units whole after a pass, and shards them again at this call: now, not under our hands
    adapter.state_dict()
    sharded: list[tuple[dict[str, Any], str, Any]] = []
    for home in adapter.modules():
        for module in home.modules():
            for store in (module._parameters, module._buffers):
                for name, value in store.items():
                    if isinstance(value, DTensor):
                        sharded.append((store, name, value))  # type: ignore[arg-type]
    for store, name, value in sharded:
        whole = value.detach().full_tensor()
        store[name] = nn.Parameter(whole, value.requires_grad) if isinstance(value, nn.Parameter) else whole
    try:
        yield
    finally:
        for store, name, value in sharded:
            store[name] = value
