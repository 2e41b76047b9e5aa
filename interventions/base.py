"""What an intervention is: a rule from activations to an activation, with one method to write."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from interventions.errors import (
    InterventionArgumentError,
    InterventionError,
    InterventionShapeError,
    MissingSourceError,
    SubspaceError,
    UnusedSourceError,
)
from interventions.signatures import CallPattern, pattern_of_method
from interventions.subspaces import (
    HasToList,
    Part,
    Partition,
    SubspacePerPosition,
    Subspaces,
    parse_partition,
    partition_to_config,
    select,
)

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Sees: TypeAlias = Literal["per_unit", "concatenated", "raw"]
Parts: TypeAlias = Iterable[Part] | HasToList | None


class Intervention(nn.Module):
    """A rule that makes a new activation out of the activation(s) it is given.

    It knows tensors and nothing else: no model, layer, hook or position. To make your own, subclass it and
    write `forward(base, source, subspaces)`, leaving out what you do not use; no `__init__` is needed.
    Parameters make it trainable. Keep the arguments of an `__init__` of your own under their own names, so
    that it can be saved.

    Args:
        embed_dim: Size of the last axis it is given; None if it does not care.
        subspace_partition: Groups of coordinates that `subspaces` then addresses by number
            (`parse_partition`).
        source_representation: A constant source, used when a call brings none. An `nn.Parameter` is trained.
        sees: `"per_unit"` (the class default): it is given one vector for each unit; `"concatenated"`: the
            vectors of all units of an example as one; `"raw"`: the whole activation as the model has it.

    Raises:
        InterventionArgumentError: An argument that cannot work.
        SubspaceError: A malformed partition, or one that does not fit the width.
        UnusedSourceError: A constant source for a formula without a source.

    Example:
        >>> class Halfway(Intervention):
        ...     def forward(self, base, source):
        ...         return (base + source) / 2
        >>> Halfway()(torch.zeros(2), torch.ones(2))
        tensor([0.5000, 0.5000])
    """

    needs_source: ClassVar[bool] = True
    """Whether a call without any source is an error. False for a `forward` that takes none."""
    collects: ClassVar[bool] = False
    """Whether the result is a reading, kept for the user, and nothing is written back."""
    source_side: ClassVar[Literal["site", "module_input"]] = "site"
    """Whether the source is read at the site itself or is the module's input in the source run."""
    sees: Sees = "per_unit"
    """How the activation is laid out for it."""

    embed_dim: int | None
    """Size of the last axis it is given; None if it does not care."""
    source_representation: Tensor | None
    """The constant source, if it has one."""

    _call_pattern: ClassVar[CallPattern]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            cls._call_pattern = pattern_of_method(cls.forward)
            if not cls._call_pattern.takes("source") and "needs_source" not in cls.__dict__:
                cls.needs_source = False

    def __init__(
        self,
        *,
        embed_dim: int | None = None,
        subspace_partition: Parts = None,
        source_representation: Tensor | Mapping[str, Json] | None = None,
        sees: Sees | None = None,
    ) -> None:
        super().__init__()
        if embed_dim is not None:
            check_count("embed_dim", embed_dim)
        self.embed_dim = embed_dim
        if sees is not None:
            if sees not in get_args(Sees):
                raise InterventionArgumentError(
                    f"sees={sees!r} is unknown; allowed: {', '.join(get_args(Sees))}."
                )
            self.sees = sees
        self.subspace_partition = subspace_partition
        self.register_buffer("source_representation", None)
        if source_representation is not None:
            self.set_source_representation(source_representation)

    @property
    def accepts_source(self) -> bool:
        """Whether a source is of any use to it."""
        return self.needs_source

    @property
    def subspace_size(self) -> int | None:
        """How many coordinates ids can address without a partition; None if only a call will tell."""
        return self.embed_dim

    @property
    def subspace_partition(self) -> Partition | None:
        """The parts that ids address, as tuples of coordinates; None if ids are coordinates themselves."""
        return self._subspace_partition

    @subspace_partition.setter
    def subspace_partition(self, parts: Parts) -> None:
        self._subspace_partition = parse_partition(parts, self.subspace_size)

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        """Return the new activation; the one method a subclass writes.

        Args:
            base: The activation to replace. Not to be changed in place.
            source: What the replacement is made from, or None.
            subspaces: Which coordinates to touch, or None for all.

        Shape:
            base, source, result: `(..., embed_dim)`; the source broadcasts to the base.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no forward(base, source, subspaces) yet; write it."
        )

    def __call__(
        self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None, **extra: object
    ) -> Tensor:
        """Call `forward` with those of source and subspaces that it takes; `extra` goes to it as it is.

        Raises:
            MissingSourceError: It needs a source, and neither this call nor its constructor gave one.
            SubspaceError: Subspaces for a `forward` that takes none.
        """
        if source is None:
            source = self.source_representation
        if source is None and self.needs_source:
            raise missing_source(self)
        if subspaces is not None and not self._call_pattern.takes("subspaces"):
            raise self._no_subspaces(subspaces)
        arguments, keywords = self._call_pattern.arguments(source, subspaces)
        result: Tensor = super().__call__(base, *arguments, **keywords, **extra)
        return result

    def check_subspaces(self, subspaces: Subspaces, batch: int | None = None) -> None:
        """Raise what a call with these subspaces would raise, before any model is run.

        Raises:
            SubspaceIndexError: An id that does not exist.
            SubspaceError: Anything else that makes no sense for this intervention and `batch` examples.

        Example:
            >>> from interventions import VanillaIntervention
            >>> VanillaIntervention(embed_dim=4).check_subspaces([1, 4])
            Traceback (most recent call last):
            interventions.errors.SubspaceIndexError: Subspace id 4 is out of range: the ids of its 4
            dimensions are 0 to 3.
        """
        if subspaces is None:
            return
        if not self._call_pattern.takes("subspaces"):
            raise self._no_subspaces(subspaces)
        if isinstance(subspaces, SubspacePerPosition) and self.sees == "concatenated":
            raise SubspaceError(
                f"{type(self).__name__} is given the units of an example as one vector, so there is no axis"
                f" of positions for SubspacePerPosition. Make it with sees='per_unit'."
            )
        select(subspaces, size=self.subspace_size, partition=self.subspace_partition, batch=batch)

    def set_source_representation(self, source: Tensor | Mapping[str, Json] | None) -> None:
        """Set, replace or (with None) remove the constant source.

        A tensor is copied; an `nn.Parameter` is kept as it is and becomes a parameter of the intervention. A
        mapping as `to_config` writes it makes room for one that a state dict brings.

        Raises:
            UnusedSourceError: The formula has no source.
            InterventionArgumentError: A tensor that requires gradients but is no `nn.Parameter`.
        """
        if source is None:
            _forget(self, "source_representation")
            self.register_buffer("source_representation", None)
            return
        if not self.accepts_source:
            raise UnusedSourceError(
                f"{type(self).__name__} uses no source, so source_representation would be ignored."
                f" Leave it out."
            )
        if isinstance(source, Mapping):
            source = _placeholder(source)
        if not isinstance(source, Tensor):
            raise InterventionArgumentError(
                f"source_representation is a {type(source).__name__}; give a tensor or an nn.Parameter."
            )
        if isinstance(source, nn.Parameter):
            _forget(self, "source_representation")
            self.register_parameter("source_representation", source)
            return
        if source.requires_grad:
            raise InterventionArgumentError(
                "source_representation requires gradients, but is no nn.Parameter: they would be lost."
                " Wrap it in nn.Parameter to train it, or detach() it."
            )
        _forget(self, "source_representation")
        self.register_buffer("source_representation", source.clone(memory_format=torch.contiguous_format))

    def to_config(self) -> dict[str, Json]:
        """Return constructor arguments as JSON, so that `type(self)(**to_config())` has the same shape.

        Tensors are left to the state dict. Arguments are read from attributes of the same names; a class that
        keeps them otherwise overrides this.

        Raises:
            InterventionError: An argument that is not kept, or is no JSON.

        Example:
            >>> from interventions import LowRankRotatedSpaceIntervention
            >>> LowRankRotatedSpaceIntervention(8, 2, subspace_partition=[[0, 1], [1, 2]]).to_config()
            {'embed_dim': 8, 'low_rank_dimension': 2, 'subspace_partition': [[0, 1], [1, 2]]}
        """
        config: dict[str, Json] = {}
        for name, default in _constructor_arguments(type(self)).items():
            if name == "subspace_partition":
                value: object = partition_to_config(self.subspace_partition)
            elif name == "source_representation":
                value = _describe(self.source_representation)
            elif hasattr(self, name):
                value = getattr(self, name)
            else:
                raise InterventionError(
                    f"{type(self).__name__} does not keep its constructor argument {name!r}."
                    f" Keep it as self.{name}, or override to_config()."
                )
            if name == "sees" and value == type(self).sees:
                continue
            if isinstance(value, Tensor) or (default is None and value is None):
                continue
            config[name] = self.argument_to_json(name, value)
        return config

    def argument_to_json(self, name: str, value: object) -> Json:
        """Return one constructor argument as JSON; a class with arguments of another kind overrides this.

        Raises:
            InterventionError: JSON cannot hold the value.
        """
        return _as_json(value, f"{type(self).__name__}.{name}")

    def operands(self, base: Tensor, source: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return base and source broadcast to one shape, the source in the base's dtype and on its device.

        Without a source the constant one is taken. The results may share memory with what was given.

        Raises:
            MissingSourceError: There is no source at all.
            InterventionShapeError: The source does not broadcast, or the last axis is not `embed_dim`.
        """
        source = self.source_representation if source is None else source
        if source is None:
            raise missing_source(self)
        self.check_width(base)
        source = source.to(device=base.device, dtype=base.dtype)
        if source.shape == base.shape:
            return base, source
        while source.dim() > base.dim() and source.shape[0] == 1:
            source = source[0]
        try:
            # torch leaves this function untyped
            wide_base, wide_source = torch.broadcast_tensors(base, source)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise self._no_broadcast(base, source) from error
        if wide_base.shape[-1] != base.shape[-1]:
            raise self._no_broadcast(base, source)
        return wide_base, wide_source

    def check_width(self, base: Tensor) -> None:
        """Raise InterventionShapeError unless the last axis of `base` is `embed_dim` long."""
        if base.dim() == 0:
            raise InterventionShapeError(
                f"{type(self).__name__} got a tensor without axes; it works on the last one."
            )
        if self.embed_dim is not None and base.shape[-1] != self.embed_dim:
            raise InterventionShapeError(
                f"{type(self).__name__} was made for embed_dim={self.embed_dim}, but the activation is"
                f" {base.shape[-1]} wide (shape {tuple(base.shape)})."
            )

    def chosen(self, subspaces: Subspaces, base: Tensor, size: int) -> Tensor | None:
        """Return the mask of the coordinates that `subspaces` chooses among `size`, or None for all of them.

        Shape:
            result: broadcasts against `(*base.shape[:-1], size)`.
        """
        if subspaces is None:
            return None
        batch = base.shape[0] if base.dim() > 1 else 1
        selection = select(subspaces, size=size, partition=self.subspace_partition, batch=batch)
        return None if selection is None else selection.mask(size, base.shape, base.device)

    def extra_repr(self) -> str:
        """Show the constructor arguments that are not at their defaults, tensors aside."""
        shown = {name: getattr(self, name, None) for name in _constructor_arguments(type(self))}
        defaults = {**_constructor_arguments(type(self)), "sees": type(self).sees}
        simple = {name: value for name, value in shown.items() if isinstance(value, (int, float, str))}
        return ", ".join(f"{name}={value!r}" for name, value in simple.items() if value != defaults[name])

    def _no_broadcast(self, base: Tensor, source: Tensor) -> InterventionShapeError:
        return InterventionShapeError(
            f"{type(self).__name__}: a source of shape {tuple(source.shape)} does not broadcast to a base of"
            f" shape {tuple(base.shape)}. Give each example and unit its source, or one source for all."
        )

    def _no_subspaces(self, subspaces: Subspaces) -> SubspaceError:
        return SubspaceError(
            f"subspaces={subspaces!r} was given, but {type(self).__name__}.forward takes no subspaces."
            f" Add the parameter, or leave them out."
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A constant source is the one tensor whose shape the constructor arguments need not fix.
        saved = state_dict.get(f"{prefix}source_representation")
        current = self.source_representation
        if isinstance(saved, Tensor) and (current is None or current.shape != saved.shape):
            room = torch.empty_like(saved, device=None if current is None else current.device)
            self.source_representation = nn.Parameter(room) if isinstance(current, nn.Parameter) else room
        super()._load_from_state_dict(state_dict, prefix, *args)


Intervention._call_pattern = pattern_of_method(Intervention.forward)


def missing_source(intervention: nn.Module) -> MissingSourceError:
    """Return the error for a needed source that nobody gave."""
    return MissingSourceError(
        f"{type(intervention).__name__} needs a source: give one to the call, or a source_representation when"
        f" making it."
    )


def check_count(name: str, value: object, most: int | None = None, of: str = "") -> None:
    """Raise InterventionArgumentError unless `value` is a whole number from 1 to `most`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 1 or (most is not None and value > most):  # type: ignore[operator]  # whole is checked
        allowed = f"a whole number from 1 to {most}{of}" if most is not None else "a whole number from 1 on"
        raise InterventionArgumentError(f"{name}={value!r} is out of range; give {allowed}.")


def _constructor_arguments(cls: type[Intervention]) -> dict[str, object]:
    """Return the constructor's arguments with their defaults; `**kwargs` stands for the next class's."""
    arguments: dict[str, object] = {}
    for owner in cls.__mro__:
        if "__init__" not in owner.__dict__ or not issubclass(owner, Intervention):
            continue
        parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]
        variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        for parameter in parameters:
            if parameter.kind not in variadic:
                arguments.setdefault(parameter.name, parameter.default)
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return arguments


def _as_json(value: object, what: str) -> Json:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_as_json(item, what) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _as_json(item, what) for key, item in value.items()}
    raise InterventionError(
        f"{what} is {value!r}, which JSON cannot hold. Override to_config() to say how to save it."
    )


def _describe(source: Tensor | None) -> Json:
    if source is None:
        return None
    return {
        "shape": list(source.shape),
        "dtype": str(source.dtype).removeprefix("torch."),
        "trainable": isinstance(source, nn.Parameter),
    }


def _placeholder(description: Mapping[str, Json]) -> Tensor:
    shape, name = description.get("shape"), description.get("dtype", "float32")
    dtype = getattr(torch, str(name), None)
    if not isinstance(shape, list) or not isinstance(dtype, torch.dtype):
        raise InterventionArgumentError(
            f"source_representation={dict(description)!r} is no description of a tensor; give a tensor, or"
            f" {{'shape': [4], 'dtype': 'float32', 'trainable': False}}."
        )
    zeros = torch.zeros([int(str(size)) for size in shape], dtype=dtype)
    return nn.Parameter(zeros) if description.get("trainable") else zeros


def _forget(module: nn.Module, name: str) -> None:
    """Take a tensor's name off a module, be it a buffer or a parameter."""
    module._buffers.pop(name, None)
    module._parameters.pop(name, None)
    module._non_persistent_buffers_set.discard(name)
