"""`train`: let the interventions of a model learn from counterfactuals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from intervenable.errors import ConfigError, StorageError, TrainingError
from intervenable.evaluation_mode import evaluating
from intervenable.model import IntervenableModel
from intervenable.progress import Progress, Show
from intervenable.training_checkpoints import Checkpoint, Kept
from intervenable.training_data import Examples, read_examples
from intervenable.training_engine import Engine, device_of
from intervenable.training_evaluation import measured
from intervenable.training_failure import save_batch
from intervenable.training_fingerprint import data_fingerprint, model_fingerprint, option_fingerprint
from intervenable.training_history import history_from, history_tensor
from intervenable.training_measures import Measure, read_loss, read_metrics, total
from intervenable.training_processes import Processes
from intervenable.training_result import Row, TrainingResult
from intervenable.training_schedules import (
    OptimizerLike,
    ScheduleLike,
    TemperatureLike,
    Temperatures,
    make_optimizer,
    make_schedule,
    total_norm,
)
from intervenable.training_settings import EarlyStopping, Settings, read_settings
from intervenable.training_state import pack, unpack
from intervenable.training_suffix import make_engine
from intervenable.wave_budget import bytes_of
from interventions import NoiseIntervention
from interventions.rotation import held_bases


def train(
    model: IntervenableModel,
    dataset: object,
    *,
    evaluation: object = None,
    unit_locations: Any = None,
    subspaces: Any = None,
    loss: str | Measure = "cross_entropy",
    metric: str | Measure | Mapping[str, str | Measure] = "iia",
    optimizer: OptimizerLike = "adam",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: ScheduleLike = "linear",
    warmup: float = 0.1,
    temperature: TemperatureLike = None,
    epochs: int = 10,
    max_steps: int | None = None,
    batch_size: int = 32,
    accumulate: int = 1,
    precision: str | None = None,
    clip_norm: float | None = None,
    early_stopping: int | EarlyStopping | None = None,
    include_model: bool = False,
    fast: bool = True,
    memory: int | str | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    progress: Show = None,
) -> TrainingResult:
    """Train the interventions of a model on counterfactuals; the model itself stays as it is.

    A step takes `batch_size * accumulate` examples in an order that the seed decides, and follows the gradient of the
    mean of their losses. The wrapped model is in evaluation mode meanwhile and has no gradients; both are as before
    afterwards, and so is torch's random state.

    Args:
        model: Whose interventions train.
        dataset: A `datasets.Dataset`, a list of dicts, a mapping of columns or a torch `Dataset` of dicts. Columns:
            `input_ids`, `source_input_ids` (`[groups, length]` for several groups of representations), `labels` (the
            answer: a class, or the id of the token after the last one; or a label for each token, -100 where none is
            asked); optional: `attention_mask`, `source_attention_mask`, `base_position`, `source_position`,
            `subspaces`, `source_mask`.
        evaluation: Another data set, or the share of this one to put aside; measured after each epoch. None: the
            training data are measured at the end. False: nothing is, and `final` is the mean over the last epoch.
        unit_locations: As in a call, the same for all examples; or a function of a batch. None: as the columns
            `base_position` and `source_position` say, or else the declarations.
        subspaces: As in a call; None: as the column says.
        loss: `"cross_entropy"`, `"margin"`, or a function of (logits, labels) that gives one value, or one for each
            example.
        metric: `"iia"` (interchange intervention accuracy), `"probability"`, a loss, a function as above, or a
            mapping of names to these.
        optimizer: `"adam"`, `"adamw"`, `"sgd"`, ...; a class of `torch.optim`; a function of the parameters; or an
            optimizer of `model.parameters()`.
        lr, weight_decay: For an optimizer that is made here.
        schedule: `"linear"`, `"cosine"`, `"constant"`, or a function of the optimizer and the number of steps that
            gives a schedule of `torch.optim.lr_scheduler`.
        warmup: Share of the steps, or number of them, over which the learning rate rises. The first step has a part
            of it, and not none as in transformers.
        temperature: `(start, end)`, between which it falls evenly step by step, or a function of the share of the
            training that is done. None: from 50 to 0.1 for learned boundaries and masks in rotated spaces, from 1 to
            0.01 for masks over coordinates.
        epochs: How often all examples are seen.
        max_steps: After how many steps it ends all the same.
        batch_size: How many examples go through the model at once.
        accumulate: How many such batches make a step.
        precision: `"bf16"` or `"fp16"` to run the model under autocast; None as it is.
        clip_norm: Largest norm of the gradients.
        early_stopping: After how many epochs without a better evaluation it ends, with the best weights; or an
            `EarlyStopping`.
        include_model: Train the wrapped model as well, in the mode that it is in (interchange intervention training).
        fast: Whether to take shortcuts that do not change the result.
        memory: What may be kept between steps, in bytes or as "512MB".
        seed: Decides the order of the examples and what is put aside, and seeds torch's random state.
        checkpoint: A folder to keep the state of the training in. The same call goes on from there after a kill, with
            the same weights in the end, bit by bit.
        checkpoint_every: After how many steps it is kept; None: after each epoch, and every 30 seconds.
        progress: True for a bar, False for none, a function of (done, total); None for a bar if it takes long.

    Returns:
        The history, and the metrics at the end. The weights are in the model.

    Raises:
        ConfigError: options that cannot be, nothing that trains, or an optimizer of something that does not.
        DatasetError: the data set lacks a column, or has labels that the model has no logits for.
        TrainingError: the loss is no number; the weights are those before the step.
        StorageError: the checkpoint is of another training, is damaged, or cannot be written.

    Example:
        >>> import intervenable as iv
        >>> from intervenable.training_loop import train
        >>> mlp = iv.MLPClassifier(width=4, layers=2, classes=2)
        >>> das = iv.IntervenableModel(iv.IntervenableConfig(
        ...     [iv.RepresentationConfig(0, "block_output", low_rank_dimension=2)],
        ...     iv.LowRankRotatedSpaceIntervention), mlp)
        >>> rows = {"input_ids": torch.randn(8, 4), "source_input_ids": torch.randn(8, 4), "labels": [0, 1] * 4}
        >>> result = train(das, rows, epochs=2, batch_size=4)
        >>> result.steps, sorted(result.final)
        (4, ['iia', 'loss'])
    """
    settings = read_settings(
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        accumulate=accumulate,
        precision=precision,
        clip_norm=clip_norm,
        early_stopping=early_stopping,
        include_model=include_model,
        seed=seed,
        checkpoint_every=checkpoint_every,
        lr=lr,
        weight_decay=weight_decay,
    )
    if not isinstance(model, IntervenableModel):
        raise ConfigError(
            f"model is a {type(model).__name__}. Give an IntervenableModel: IntervenableModel(config, model)."
        )
    budget = None if memory is None else bytes_of(memory)
    measures = {"loss": read_loss(loss), **read_metrics(metric)}
    processes = Processes(device_of(model))
    where = {"unit_locations": unit_locations, "subspaces": subspaces}
    examples = read_examples(dataset, model, **where)
    rows, held_out, tested = _parts(examples, evaluation, model, where, seed)
    with prepared(model, include_model=include_model), _seeded(seed + processes.rank, processes.device):
        trainable = trainable_parameters(model, include_model)
        if not trainable:
            kinds = ", ".join(sorted({type(one).__name__ for one in model.interventions.values()}))
            raise ConfigError(
                f"There is nothing to train: no parameter of {kinds or 'the interventions'} requires gradients."
                " Declare an intervention that learns, such as LowRankRotatedSpaceIntervention."
            )
        processes.share([*trainable.values(), *model.buffers()])
        made = make_optimizer(optimizer, trainable, frozen_tensors(model, include_model), lr, weight_decay)
        with _autocast(settings.precision, processes.device):
            engine = make_engine(model, examples, fast=fast, memory=budget)
            tester = engine if tested is examples else make_engine(model, tested, fast=fast, memory=budget)
        loop = Loop(
            model, settings, measures, processes, examples, rows, held_out, engine, tester, trainable, made
        )
        loop.schedule = make_schedule(schedule, made, loop.total, warmup)
        loop.temperatures = Temperatures(temperature, model)
        loop.measures_at_end = evaluation is not False
        if checkpoint is None:
            return loop.run(progress, None)
        options = {
            "loss": loss,
            "metric": metric,
            "lr": lr,
            "schedule": schedule,
            "warmup": warmup,
            "measures at the end": evaluation is not False,
            "temperature": temperature,
            "fast": fast,
            "processes": processes.count,
        }
        about = {
            **model_fingerprint(model, include_model, frozen_tensors(model, include_model)),
            **data_fingerprint(examples, rows, "dataset"),
            **data_fingerprint(tested, held_out, "evaluation"),
            **option_fingerprint(settings, made, loop.schedule, options),
        }
        kept = Checkpoint(Path(checkpoint), about, checkpoint_every, processes)
        try:
            return loop.run(progress, kept)
        finally:
            kept.close()


class Loop:
    """One training: what it is made of, and how far it is."""

    schedule: torch.optim.lr_scheduler.LRScheduler
    temperatures: Temperatures
    measures_at_end: bool = True

    def __init__(
        self,
        model: IntervenableModel,
        settings: Settings,
        measures: Mapping[str, Measure],
        processes: Processes,
        examples: Examples,
        rows: Sequence[int],
        held_out: Sequence[int],
        engine: Engine,
        tester: Engine,
        trainable: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.model = model
        self.settings = settings
        self.measures = measures
        self.processes = processes
        self.examples = examples
        self.rows = rows
        self.held_out = held_out
        self.engine = engine
        self.tester = tester
        self.trainable = trainable
        self.optimizer = optimizer
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=settings.precision == "fp16")
        self.steps_per_epoch = math.ceil(len(rows) / settings.global_batch)
        self.total = min(self.steps_per_epoch * settings.epochs, settings.max_steps or 10**18)
        self.step = 0
        self.history: list[Row] = []
        self._order: tuple[int, list[int]] = (-1, [])
        self.stopped = False
        self.best: float | None = None
        self.best_epoch = 0
        self.best_weights: dict[str, Tensor] | None = None

    def run(self, progress: Show, checkpoint: Checkpoint | None) -> TrainingResult:
        """Take all steps that are not done, and measure what came out."""
        final: Mapping[str, float] | None = None
        if checkpoint is not None:
            final = self._go_on_from(checkpoint.kept) if checkpoint.kept else None
            self._state(None)  # what cannot be kept is to be known before the first step
        self.temperatures.set(self.step / self.total)
        show = progress if self.processes.first else False
        with Progress(self.total, show, "training", " steps") as shown:
            if self.step:
                shown.advance(self.step, computed=False)
            while self.step < self.total and not self.stopped:
                ended = self._one_step(None if checkpoint is None else checkpoint.folder)
                shown.advance(note=self._note())
                if checkpoint is not None and checkpoint.due(self.step, ended):
                    checkpoint.write(self._state(None))
        if self.best_weights is not None:
            restore(self.model, self.best_weights, self.settings.include_model)
        if final is None:
            final = self._final()
            if checkpoint is not None:
                checkpoint.write(self._state(final))
        return self._result(final)

    # --- one step -----------------------------------------------------------------------------------------

    def _one_step(self, folder: Path | None) -> bool:
        """Take a step; whether an epoch ended with it."""
        epoch, within = divmod(self.step, self.steps_per_epoch)
        size = self.settings.global_batch
        if self._order[0] != epoch:
            self._order = epoch, order_of(len(self.rows), self.settings.seed, epoch)
        rows = [self.rows[index] for index in self._order[1][within * size : (within + 1) * size]]
        rate = float(self.optimizer.param_groups[0]["lr"])
        for parameter in self.trainable.values():
            parameter.grad = None
        measured = self._gradients(rows)
        norm = self._norm()
        self._check(measured, norm, epoch, rows, folder)
        self._move()
        row: Row = {"kind": "step", "step": self.step, "epoch": epoch, **measured, "lr": rate}
        self.history.append({**row, "temperature": self.temperatures.now, "gradient_norm": norm})
        self.step += 1
        self.temperatures.set(self.step / self.total)
        ended = self.step % self.steps_per_epoch == 0 or self.step == self.total
        if ended:
            self._end_epoch(epoch)
        return ended

    def _gradients(self, rows: Sequence[int]) -> dict[str, float]:
        """Add up the gradients of a step, over batches and processes; the mean loss and metrics of its examples."""
        part = self.processes.part(rows)
        sums = torch.zeros(len(self.measures), dtype=torch.float64)
        size = self.settings.batch_size
        with held_bases(self.model):
            for start in range(0, len(part), size):
                with self._precision():
                    read = self.engine.step(part[start : start + size])
                loss = total(self.measures["loss"], read, "loss")
                sums[0] += float(loss.detach())
                if math.isfinite(float(loss.detach())):
                    self.scaler.scale(loss / len(rows)).backward()  # type: ignore[no-untyped-call]
                with torch.no_grad():
                    for index, (name, measure) in enumerate(self.measures.items()):
                        if name != "loss":
                            sums[index] += float(total(measure, read, name))
        if self.processes.count > 1:
            for parameter in self.trainable.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.processes.add([sums, *(p.grad for p in self.trainable.values() if p.grad is not None)])
        return dict(zip(self.measures, (sums / len(rows)).tolist(), strict=True))

    def _norm(self) -> float:
        """The norm of the gradients, which are those of the loss itself from here on, and are clipped."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
        norm = float(total_norm(gradients))
        limit = self.settings.clip_norm
        if limit is not None and math.isfinite(norm) and norm > limit:
            torch._foreach_mul_(gradients, limit / norm)
        return norm

    def _check(
        self,
        measured: Mapping[str, float],
        norm: float,
        epoch: int,
        rows: Sequence[int],
        folder: Path | None,
    ) -> None:
        """That loss and gradients are numbers (under fp16 too large gradients are left out instead).

        Raises:
            TrainingError: they are not.
        """
        overflow = self.scaler.is_enabled() and math.isfinite(measured["loss"])
        if math.isfinite(measured["loss"]) and (math.isfinite(norm) or overflow):
            return
        what = "norm of the gradients" if math.isfinite(measured["loss"]) else "loss"
        value = norm if math.isfinite(measured["loss"]) else measured["loss"]
        kept = save_batch(self.examples, rows, folder) if self.processes.first else None
        for parameter in self.trainable.values():
            parameter.grad = None
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise TrainingError(
            f"The {what} is {value} in step {self.step} (epoch {epoch}, rows {shown}). The weights are those before"
            f" the step. Its batch is kept in {kept}. A smaller lr, a warmup or clip_norm may help."
        )

    def _move(self) -> None:
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= before:  # else the step was left out
            self.schedule.step()

    def _precision(self) -> AbstractContextManager[Any]:
        return _autocast(self.settings.precision, self.processes.device)

    # --- after an epoch -----------------------------------------------------------------------------------

    def _end_epoch(self, epoch: int) -> None:
        found: Mapping[str, float] = {}
        if self.held_out:
            found = self._measured(self.tester, self.held_out)
            self.history.append({"kind": "evaluation", "step": self.step - 1, "epoch": epoch, **found})
        stopping = self.settings.early_stopping
        if stopping is None:
            return
        name = stopping.metric or (next((key for key in found if key != "loss"), "loss"))
        values = found or self._epoch_means(epoch)
        if name not in values:
            raise ConfigError(f"early_stopping watches {name!r}, and there are: {', '.join(values)}.")
        if stopping.better(name, values[name], self.best):
            self.best, self.best_epoch = values[name], epoch
            self.best_weights = weights_of(self.model, self.settings.include_model)
        elif epoch - self.best_epoch >= stopping.patience:
            self.stopped = True

    def _epoch_means(self, epoch: int) -> dict[str, float]:
        """Means over the examples of an epoch of what its steps measured."""
        rows = [row for row in self.history if row["kind"] == "step" and row["epoch"] == epoch]
        size, last = self.settings.global_batch, len(self.rows) % self.settings.global_batch
        weights = [
            last if last and row["step"] % self.steps_per_epoch == self.steps_per_epoch - 1 else size
            for row in rows
        ]
        return {
            name: sum(row[name] * weight for row, weight in zip(rows, weights, strict=True)) / sum(weights)
            for name in self.measures
        }

    def _measured(self, engine: Engine, rows: Sequence[int]) -> dict[str, float]:
        with self._precision():
            values = measured(
                self.model, engine, rows, self.measures, self.settings.batch_size, self.processes
            )
        return {name: float(value.mean()) for name, value in values.items()}

    # --- the end ------------------------------------------------------------------------------------------

    def _note(self) -> str:
        row = next(row for row in reversed(self.history) if row["kind"] == "step")
        return ", ".join(f"{name} {row[name]:.3g}" for name in self.measures)

    def _final(self) -> dict[str, float]:
        """Loss and metrics with the final weights."""
        last = self.history[-1]
        if last["kind"] == "evaluation" and self.best_weights is None:
            return {name: last[name] for name in self.measures}
        if not self.measures_at_end:
            return self._epoch_means(self.best_epoch if self.best_weights is not None else last["epoch"])
        return self._measured(self.tester, self.held_out or self.rows)

    def _result(self, final: Mapping[str, float]) -> TrainingResult:
        last = self.history[-1]
        epoch = self.best_epoch if self.best_weights is not None else last["epoch"]
        notes = dict.fromkeys([*self.engine.notes, *self.tester.notes])
        return TrainingResult(
            tuple(self.history),
            final,
            self._epoch_means(epoch)["loss"],
            self.step,
            last["epoch"] + 1,
            self.stopped,
            tuple(notes),
        )

    # --- what is kept -------------------------------------------------------------------------------------

    def _state(self, final: Mapping[str, float] | None) -> Kept:
        """All that the rest of the training depends on; with the final metrics if there is no rest.

        Raises:
            StorageError: the state of the optimizer or the schedule is more than tensors and plain values.
        """
        include = self.settings.include_model
        tensors = {f"weights.{name}": tensor for name, tensor in weights_of(self.model, include).items()}
        if self.best_weights is not None:
            tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        tensors["history"] = history_tensor(self.history, list(self.measures))
        tensors["random"] = torch.stack(self.processes.gathered(torch.get_rng_state()))
        for name, generator in _generators(self.model, self.processes.device).items():
            tensors[f"noise.{name}"] = torch.stack(self.processes.gathered(generator.get_state()))
        if self.processes.device.type == "cuda":
            states = self.processes.gathered(torch.cuda.get_rng_state(self.processes.device))
            tensors["random_cuda"] = torch.stack(states)
        content = {
            "step": self.step,
            "stopped": self.stopped,
            "best": None if self.best is None else repr(self.best),
            "best_epoch": self.best_epoch,
            "optimizer": pack(self.optimizer.state_dict(), "optimizer", tensors),
            "schedule": pack(self.schedule.state_dict(), "schedule", tensors),
            "scaler": pack(self.scaler.state_dict(), "scaler", tensors),
            "final": None if final is None else {name: repr(value) for name, value in final.items()},
        }
        return Kept(tensors, content)

    def _go_on_from(self, kept: Kept) -> dict[str, float] | None:
        """Take up a training where it was; its final metrics, if it was done.

        Raises:
            StorageError: what is kept is not what was written.
        """
        tensors, content = kept.tensors, kept.content
        try:
            restore(self.model, _under("weights.", tensors), self.settings.include_model)
            self.optimizer.load_state_dict(unpack(content["optimizer"], tensors))
            self.schedule.load_state_dict(unpack(content["schedule"], tensors))
            if content["scaler"] != {"dict": []}:
                self.scaler.load_state_dict(unpack(content["scaler"], tensors))
            self.history = history_from(tensors["history"], list(self.measures))
            self.step, self.stopped = int(content["step"]), bool(content["stopped"])
            self.best = None if content["best"] is None else float(content["best"])
            self.best_epoch = int(content["best_epoch"])
            self.best_weights = _under("best.", tensors) or None
            torch.set_rng_state(
                tensors["random"][self.processes.rank].clone()
            )  # of a view torch reads elsewhere
            for name, generator in _generators(self.model, self.processes.device).items():
                generator.set_state(tensors[f"noise.{name}"][self.processes.rank].clone())
            if "random_cuda" in tensors:
                torch.cuda.set_rng_state(
                    tensors["random_cuda"][self.processes.rank].clone(), self.processes.device
                )
            final = content["final"]
            return None if final is None else {name: float(value) for name, value in final.items()}
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise StorageError(
                f"The checkpoint does not hold what this training needs ({error}). Delete it to start anew."
            ) from error


def _autocast(name: str | None, device: torch.device) -> AbstractContextManager[Any]:
    """What runs the model in a precision."""
    if name in (None, "fp32"):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if name == "bf16" else torch.float16)


def _generators(model: IntervenableModel, device: torch.device) -> dict[str, torch.Generator]:
    """The random states that interventions have of their own, by name."""
    return {
        name: module._generators.setdefault(device, torch.Generator(device).manual_seed(module.seed))
        for name, module in model.named_modules()
        if isinstance(module, NoiseIntervention) and module.shape == "per_call" and module.seed is not None
    }


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# --- data -------------------------------------------------------------------------------------------------


def order_of(count: int, seed: int, epoch: int) -> list[int]:
    """The order of so many examples in an epoch."""
    state = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(state >> 1)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def _parts(
    examples: Examples, evaluation: object, model: IntervenableModel, where: Mapping[str, Any], seed: int
) -> tuple[list[int], list[int], Examples]:
    """The rows to train on, those to evaluate on, and the examples that the latter are of."""
    everything = list(range(len(examples)))
    if evaluation is None or evaluation is False:
        return everything, [], examples
    if isinstance(evaluation, (int, float)):
        aside = 0 if evaluation is True else round(evaluation * len(examples))
        if not 0 < evaluation < 1 or not 0 < aside < len(examples):
            raise ConfigError(
                f"evaluation={evaluation!r}: give another data set, or a share of the {len(examples)} examples that"
                " leaves some on both sides."
            )
        order = order_of(len(examples), seed, 2**32)
        return sorted(order[aside:]), sorted(order[:aside]), examples
    tested = read_examples(evaluation, model, **where, name="evaluation")
    return everything, list(range(len(tested))), tested


# --- the model while it trains ----------------------------------------------------------------------------


@contextmanager
def prepared(
    model: IntervenableModel, *, include_model: bool = False, training: bool = True
) -> Iterator[None]:
    """Run the block with the wrapped model in evaluation mode and without gradients, and the interventions ready.

    However the block ends, modes, `requires_grad` and `.grad` are what they were; with `include_model` the wrapped
    model is in the mode and has the gradients that its owner has set.
    """
    wrapped = model.model
    with ExitStack() as stack:
        parameters = [*model.parameters(), *wrapped.parameters()]
        kept = [(parameter, parameter.grad) for parameter in parameters]
        stack.callback(_give_back, kept)
        modes = [(module, module.training) for module in model.modules()]
        stack.callback(_set_modes, modes)
        model.train(training)
        if not include_model:
            stack.enter_context(evaluating(wrapped))
            stack.enter_context(_without_gradients(wrapped))
        yield


@contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    on = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in on:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in on:
            parameter.requires_grad_(True)


def _give_back(kept: Sequence[tuple[nn.Parameter, Tensor | None]]) -> None:
    for parameter, gradient in kept:
        if parameter.grad is not gradient:
            parameter.grad = gradient


def _set_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run the block with torch's random state from a seed, and give it back as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def trainable_parameters(model: IntervenableModel, include_model: bool) -> dict[str, nn.Parameter]:
    """What trains, by name, each once."""
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if include_model:
        found |= {f"model.{name}": p for name, p in model.model.named_parameters() if p.requires_grad}
    return found


def frozen_tensors(model: IntervenableModel, include_model: bool) -> dict[str, Tensor]:
    """What does not train, by name."""
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    named |= {f"model.{name}": parameter for name, parameter in model.model.named_parameters()}
    trained = {id(parameter) for parameter in trainable_parameters(model, include_model).values()}
    return {name: tensor for name, tensor in named.items() if id(tensor) not in trained}


def weights_of(model: IntervenableModel, include_model: bool) -> dict[str, Tensor]:
    """Copies of all state that a training changes, by name."""
    return {name: tensor.detach().cpu().clone() for name, tensor in state_of(model, include_model).items()}


@torch.no_grad()
def restore(model: IntervenableModel, weights: Mapping[str, Tensor], include_model: bool) -> None:
    """Put such copies in the place of the state, in place."""
    for name, tensor in state_of(model, include_model).items():
        tensor.copy_(weights[name])


def state_of(model: IntervenableModel, include_model: bool) -> dict[str, Tensor]:
    """All state that a training changes, by name."""
    state: dict[str, Tensor] = dict(model.state_dict())
    if include_model:
        state |= {f"model.{name}": tensor for name, tensor in model.model.state_dict().items()}
    return state
