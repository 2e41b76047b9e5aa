"""`IntervenableModel`: a configuration bound to a model, ready to be called."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self, TextIO

import torch
from torch import Tensor, nn

from intervenable import saving, saving_hub, saving_pyvene
from intervenable.binding import bind
from intervenable.config import config_from
from intervenable.errors import ConfigError, IntervenableWarning
from intervenable.inputs import check_options
from intervenable.locations import RelativeTo
from intervenable.output import IntervenableOutput
from intervenable.plan import Plan, make_plan
from intervenable.receipt import Explanation, Receipt
from intervenable.runs import Fired, plain_run, run_base, run_source
from intervenable.saving_types import Registry
from intervenable.token_text import Decodes
from intervenable.units import Units
from interventions import Intervention
from interventions.temperature import Tempered


class IntervenableModel(nn.Module):
    """A model together with the interventions declared on it.

    The model is held by reference and nothing about it changes: its hooks, mode and gradients are its owner's.
    Parameters and state of this module are those of the interventions alone.

    Args:
        config: An `IntervenableConfig`, or what one can be made of. It is read now, and not again.
        model: Any model whose class has a map, or any `nn.Module` if all components are module paths.
        tokenizer: Finds the words of locations in the text of each example, and shows tokens in receipts and
            explanations. A `PositionResolver` brings names for positions too.
        use_fast: Accepted for pyvene's sake, with a warning: every path is fast.

    Raises:
        ConfigError: the configuration does not fit this model.
        UnsupportedModelError: no map for the model, or no such component in it.

    Example:
        >>> from intervenable import IntervenableConfig, MLPClassifier, RepresentationConfig, ZeroIntervention
        >>> mlp = MLPClassifier(width=4, layers=2, classes=3)
        >>> model = IntervenableModel(
        ...     IntervenableConfig(RepresentationConfig(0, "block_output"), ZeroIntervention), mlp)
        >>> original, intervened = model(torch.ones(1, 4), unit_locations={"base": 0}, output_original_output=True)
        >>> model.names
        ('layer_0.block_output.pos',)
    """

    accepts_loss_kwargs: ClassVar[bool] = False
    """Whether `forward` knows what `transformers.Trainer` counts for a loss; its other options are the model's."""

    def __init__(
        self,
        config: object,
        model: nn.Module,
        tokenizer: Decodes | None = None,
        *,
        use_fast: bool | None = None,
    ) -> None:
        super().__init__()
        if use_fast is not None:
            warnings.warn(
                "IntervenableModel: 'use_fast' has no effect: every path is fast here, with locations of any shape.",
                IntervenableWarning,
                stacklevel=2,
            )
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"model is a {type(model).__name__}, not a torch module. Give the configuration and the model itself:"
                " IntervenableModel(config, model)."
            )
        # In __dict__, so that torch does not take the model for a part of this module.
        self.__dict__["_model"] = model
        self.config = config_from(config)
        self.tokenizer = tokenizer
        self._bound = bind(self.config, model)
        # Under the name of the read-only property, so that parameters and state are called `interventions.<name>`.
        kept = self._modules["interventions"] = nn.ModuleDict()
        for entry in self._bound:
            if entry.intervention not in kept.values():
                kept[_key(entry.name)] = entry.intervention

    @property
    def model(self) -> nn.Module:
        """The wrapped model itself."""
        wrapped: nn.Module = self.__dict__["_model"]
        return wrapped

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the representations, in declared order."""
        return tuple(entry.name for entry in self._bound)

    @property
    def interventions(self) -> Mapping[str, Intervention]:
        """The intervention of each representation by its name; linked ones are the same module. Read-only."""
        return MappingProxyType({entry.name: entry.intervention for entry in self._bound})

    def forward(
        self,
        base: Any,
        sources: Any = None,
        unit_locations: Mapping[str, Any] | None = None,
        source_representations: Any = None,
        subspaces: Any = None,
        *,
        output_original_output: bool = False,
        return_dict: bool | None = None,
        relative_to: RelativeTo = "tokens",
        labels: Any = None,
        **model_options: Any,
    ) -> IntervenableOutput:
        """Run the sources, then the base with all interventions applied in one pass.

        Args:
            base: Inputs of the model, as a mapping (what a tokenizer returns), a tensor or a tuple.
            sources: Inputs for each group of representations (None for a group without a source), or a single source
                for all. Groups count in the order in which they first appear in the configuration.
            unit_locations: Where: `{"sources->base": ...}` or `{"base": ...}`; see `intervenable.locations`. None for
                whole activations. Positions count the real tokens of each example; they may be names and words.
            source_representations: Constant values instead of source runs: a tensor for all, a list with one (or
                None) for each representation, or a mapping from names.
            subspaces: Which coordinates: an id or a flat list for all, or `[representations][batch][ids]`.
            output_original_output: Also run the base without interventions.
            return_dict: Accepted as in pyvene; the output has both forms.
            relative_to: `"tokens"`: positions count real tokens. `"tensor"`: they count padding too.
            labels: For a loss that the model itself computes, in the runs of the base.
            model_options: Anything else that the model takes (`use_cache`, `logits_to_keep`, ...), for the runs of
                the base.

        Returns:
            `IntervenableOutput`, which unpacks as `original, intervened`.

        Raises:
            InputError, SourceError, LocationError, SubspaceError: something is wrong with the call; no model was run.
            EditError: an intervention gave back something that does not fit.
            NotFiredError: an intervention was not applied exactly once.
        """
        plan = self._plan(base, sources, unit_locations, source_representations, subspaces, relative_to)
        if labels is not None:
            model_options["labels"] = labels
        if model_options:
            check_options(model_options, plan.base, self.model)
        captured: dict[int, Tensor] = {}
        for run in plan.source_runs:
            captured |= run_source(self.model, run.inputs, run.captures)
        original = plain_run(self.model, plan.base, model_options) if output_original_output else None
        intervened = run_base(self.model, plan, captured, model_options)
        collected, masks = _readings(plan, intervened.fired)
        receipt = Receipt(plan, intervened.fired, self.tokenizer)
        return IntervenableOutput(original, intervened.output, receipt, collected, masks)

    def explain(
        self,
        base: Any,
        sources: Any = None,
        unit_locations: Mapping[str, Any] | None = None,
        source_representations: Any = None,
        subspaces: Any = None,
        *,
        relative_to: RelativeTo = "tokens",
        file: TextIO | None = None,
    ) -> Explanation:
        """Print what a call with these arguments would do, as a table, without running the model.

        Args:
            file: Where to print; standard output if None.

        Returns:
            The same rows, to look at or to print again.

        Raises:
            InputError, SourceError, LocationError, SubspaceError: as the call would.
        """
        plan = self._plan(base, sources, unit_locations, source_representations, subspaces, relative_to)
        explanation = Explanation(plan, self.tokenizer)
        (file or sys.stdout).write(f"{explanation}\n")
        return explanation

    def save_pretrained(
        self, folder: str | Path, *, include_model: bool = False, registry: Registry | None = None
    ) -> Path:
        """Write the configuration and everything that the interventions hold to a folder, for `from_pretrained`.

        `config.json` says what was declared and for what model; a safetensors file has the tensors. Both are replaced
        together: whoever reads, also after a kill, finds what was there before or what is there now. The state of
        optimisers and of generators of noise is not kept.

        Args:
            folder: Where. What an earlier call has written there is replaced; anything else is refused.
            include_model: Save the wrapped model too, in a folder within, as after training it.
            registry: Names for intervention classes that are not registered; the same go to `from_pretrained`.

        Returns:
            The folder.

        Raises:
            ConfigError: something has no form in a file, such as a class or a function without a name; nothing was
                written.
            StorageError: it could not be written. What was there is as it was.

        Example:
            >>> import tempfile
            >>> from intervenable import LowRankRotatedSpaceIntervention, MLPClassifier, RepresentationConfig
            >>> mlp = MLPClassifier(width=4, layers=2, classes=3)
            >>> entry = RepresentationConfig(0, intervention=LowRankRotatedSpaceIntervention(4, 2))
            >>> das = IntervenableModel(entry, mlp)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = das.save_pretrained(folder)
            ...     again = IntervenableModel.from_pretrained(folder, model=mlp)
            >>> swap = torch.ones(1, 4), torch.zeros(1, 4), {"sources->base": 0}
            >>> torch.equal(das(*swap).intervened, again(*swap).intervened)
            True
        """
        return saving.save(
            folder, self.config, self._bound, self.model, include_model=include_model, registry=registry
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        model: nn.Module | None = None,
        *,
        tokenizer: Decodes | None = None,
        registry: Registry | None = None,
        check_model: saving.CheckModel = True,
        revision: str | None = None,
        api: Any = None,
    ) -> Self:
        """Make a model of what `save_pretrained` or `push_to_hub` has written, in evaluation mode.

        Files are data here: nothing is unpickled, and no class is imported because a file names it.

        Args:
            folder: A folder; or `owner/name`, a repository of the Hub, where there is no folder `owner` here.
            model: The model that the interventions are for; None for one that was saved with them.
            tokenizer: As for the constructor.
            registry: Classes by their names in the file, before those of `register_intervention`.
            check_model: Whether the model must be the one that the interventions were saved with: True for its class,
                its sizes and its weights (as far as a few values of each tell), `"sizes"` for all but the weights.
            revision: Branch, tag or commit of the repository.
            api: What to ask instead of a new `huggingface_hub.HfApi`.

        Raises:
            MissingFileError: there is no such folder, or not what it should hold.
            StorageError: the files are damaged, of another kind, or those of a later version.
            UnknownNameError: a class or a function that is not known here.
            ModelMismatchError: the model is another one; the message says what differs.
        """
        found = saving_hub.fetched(folder, revision, api)
        return cls._of(saving.load(found, model, registry=registry, check_model=check_model), tokenizer)

    @classmethod
    def from_pyvene(cls, folder: str | Path, model: nn.Module, *, tokenizer: Decodes | None = None) -> Self:
        """Make a model of what pyvene 0.1 has saved (`IntervenableModel.save`), in evaluation mode.

        Its pickles are read by torch's reader for tensors alone, and its classes come from a fixed table. Where
        pyvene computes something else than this library (`docs/migration-from-pyvene.md`), the result is ours.

        Args:
            folder: With a `config.json` and, for what was trained, `intkey_*.bin`.
            model: The model that the interventions are for.
            tokenizer: As for the constructor.

        Raises:
            MissingFileError: a file or the folder is not there.
            StorageError: it is damaged, of another kind, or speaks of something that has no counterpart.
            ModelMismatchError: it is for a model of another size.
        """
        config, entries = saving_pyvene.read_pyvene(folder)
        with torch.random.fork_rng(devices=[]):
            made = cls(config, model, tokenizer)
            saving_pyvene.fill(entries, [entry.intervention for entry in made._bound])
        return made.eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        include_model: bool = False,
        registry: Registry | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Save interventions",
        card: str | None = None,
        api: Any = None,
    ) -> str:
        """Put what `save_pretrained` writes into a repository of the Hub, in one commit.

        Args:
            repo_id: `owner/name`; made if it is not there.
            include_model, registry: As for `save_pretrained`.
            private: Whether a new repository is private; None for what its owner has set.
            revision: The branch.
            commit_message: Of the commit.
            card: Text of the README; None for one that says how to load what is there, where there is none yet.
            api: What to ask instead of a new `huggingface_hub.HfApi`, for instance one with a token of its own.

        Returns:
            The address of the commit.

        Raises:
            ConfigError: something has no form in a file; nothing was sent.
            StorageError: the Hub did not take it.
        """
        return saving_hub.push(
            lambda folder: self.save_pretrained(folder, include_model=include_model, registry=registry),
            repo_id,
            card or saving_hub.card_for(repo_id, self._bound, self.model, includes_model=include_model),
            private=private,
            revision=revision,
            commit_message=commit_message,
            replace_card=card is not None,
            api=api,
        )

    @classmethod
    def _of(cls, loaded: saving.Loaded, tokenizer: Decodes | None) -> Self:
        made = cls(loaded.made, loaded.model, tokenizer)
        for entry in made._bound:
            device = next((weight.device for weight in entry.site.module.parameters()), None)
            if device is not None and device.type != "meta":
                entry.intervention.to(device)
        made.config = loaded.declared
        declared = loaded.declared.representations
        made._bound = tuple(replace(entry, config=declared[entry.index]) for entry in made._bound)
        return made.eval()

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters of the interventions that train, those of linked ones once: what an optimizer takes.

        Example:
            >>> from intervenable import LowRankRotatedSpaceIntervention, MLPClassifier, RepresentationConfig
            >>> entry = RepresentationConfig(0, "block_output", low_rank_dimension=2,
            ...     intervention_type=LowRankRotatedSpaceIntervention)
            >>> model = IntervenableModel([entry], MLPClassifier(width=4, layers=2, classes=3))
            >>> [tuple(parameter.shape) for parameter in model.get_trainable_parameters()]
            [(4, 2)]
        """
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def count_parameters(self, include_model: bool = False) -> int:
        """How many numbers train, those of linked interventions once; with those of the model if asked for."""
        trained = {id(parameter): parameter for parameter in self.get_trainable_parameters()}
        if include_model:
            trained |= {id(p): p for p in self.model.parameters() if p.requires_grad}
        return sum(parameter.numel() for parameter in trained.values())

    def disable_model_gradients(self) -> None:
        """Keep the wrapped model from gathering gradients, as a loop that trains the interventions alone wants it."""
        self.model.requires_grad_(False)

    def enable_model_gradients(self) -> None:
        """Let every parameter of the wrapped model gather gradients."""
        self.model.requires_grad_(True)

    def set_temperature(self, value: float | Tensor) -> None:
        """Set the temperature of every intervention that has one, as a schedule does while training.

        Raises:
            ConfigError: none of the interventions has a temperature.
        """
        tempered = [entry for entry in self.interventions.values() if isinstance(entry, Tempered)]
        if not tempered:
            kinds = ", ".join(sorted({type(entry).__name__ for entry in self.interventions.values()}))
            raise ConfigError(f"No intervention of this model has a temperature. It has: {kinds or 'none'}.")
        for intervention in tempered:
            intervention.set_temperature(value)

    def _plan(self, *call: Any) -> Plan:
        arguments = (*call, self.tokenizer)
        return make_plan(self._bound, self.model, *arguments)

    def _apply(self, function: Any, recurse: bool = True) -> Self:
        # `.to()` and its kin move both; all else speaks of the interventions alone.
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        self.model._apply(function, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Name the wrapped model, which is no submodule."""
        return f"model={type(self.model).__name__}"


_TAKEN = frozenset(dir(nn.ModuleDict()))


def _key(name: str) -> str:
    """A name as a key of a `ModuleDict`, which takes no dots and none of its own attributes. Names have no slash."""
    key = name.replace(".", "/")
    return f"{key}/" if key in _TAKEN else key


def _readings(plan: Plan, fired: list[Fired]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What was collected, by name, and for ragged readings which entries are units."""
    collected: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for edit, record in zip(plan.edits, fired, strict=True):
        values = record.collected
        if values is None:
            continue
        if isinstance(edit.units, Units) and edit.units.real is not None:
            mask = edit.units.real.to(values.device)
            if (
                edit.bound.site.matrix
            ):  # entries; where rows or whole matrices are located, all that is in them
                mask = mask.view(*mask.shape, *[1] * (values.dim() - mask.dim())).expand(values.shape)
                values = torch.where(mask, values, torch.zeros_like(values))
            else:
                if mask.dim() < values.dim() - 1:  # unit `h`: all positions of each head
                    mask = mask[..., None].expand(values.shape[:-1])
                values = torch.where(mask[..., None], values, torch.zeros_like(values))
            masks[edit.bound.name] = mask
        collected[edit.bound.name] = values
    return collected, masks
