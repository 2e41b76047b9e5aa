"""Stacks of blocks found in a traced forward pass: lists of modules each of which is given what the last returned."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from intervenable.map_layer_calls import call_of_parts, put_in
from intervenable.map_layers import blocks_at
from intervenable.map_modules import Key, has_matrix, key_of, output_slot
from intervenable.map_trace import Call, Slot, Trace
from model_maps import Stack, path_in_layer


@dataclass(frozen=True, eq=False)
class Block:
    """One block of a stack, as it was called."""

    layer: int
    path: str
    call: Call
    given: Slot
    """Where it is given the stream; None: the usual place."""

    returned: Slot
    """Where it returns the stream; None: the usual place."""

    @property
    def entering(self) -> Tensor:
        """The residual stream as it enters."""
        slot = self.call.main_input_slot if self.given is None else self.given
        return self.call.inputs[slot]

    @property
    def leaving(self) -> Tensor:
        """The residual stream as it leaves."""
        slot = next(iter(self.call.outputs)) if self.returned is None else self.returned
        return self.call.outputs[slot]


@dataclass(frozen=True, eq=False)
class BlockStack:
    """A list of blocks."""

    path: str
    """Path of the list."""

    count: int
    """How many entries the list has, called or not."""

    blocks: tuple[Block, ...]
    """Those that were called, in order."""

    linked: int
    """How many of them were given what the one before returned."""

    role: Stack | None = None
    """Which stack it is; None for the only one, or the one that the others feed."""

    refused: str = ""
    """Why its blocks cannot be offered."""

    @property
    def first(self) -> Block:
        """The first block called."""
        return self.blocks[0]

    @property
    def last(self) -> Block:
        """The last block called."""
        return self.blocks[-1]

    @property
    def uncalled(self) -> tuple[int, ...]:
        """Entries that the forward pass did not call."""
        called = {block.layer for block in self.blocks}
        return tuple(layer for layer in range(self.count) if layer not in called)


def find_stacks(trace: Trace, model: nn.Module) -> list[BlockStack]:
    """The outermost lists of modules that hand a stream on, in the order in which they run.

    Lists whose blocks run more than once are among them, with the reason in `refused`.

    Args:
        trace: A forward pass.
        model: The model that was run.
    """
    calls: dict[nn.Module, list[Call]] = {}
    for call in trace.calls:
        calls.setdefault(call.module, []).append(call)
    found: list[BlockStack] = []
    for path, entries in _lists(model):
        if any(path.startswith(f"{outer.path}.") for outer in found):
            continue
        stack = _stack(path, entries, calls)
        if stack is not None:
            found.append(stack)
    for path, layers in _called_by_parts(model, calls, found):
        stack = _stack_of_parts(path, layers, trace)
        if stack is not None:
            found.append(stack)
    return sorted(found, key=lambda stack: stack.first.call.entered)


NO_BLOCKS = "no list of its modules hands a stream of vectors from one entry to the next"


def why_none(trace: Trace, model: nn.Module) -> str:
    """Why a model has no stack of blocks: of its lists of modules the longest that hands something on, if one does.

    Args:
        trace: A forward pass.
        model: The model that was run, in which no stack was found.
    """
    calls = {call.module: call for call in reversed(trace.calls)}
    longest: list[tuple[str, Call]] = []
    for path, entries in _lists(model):
        called = [calls[entry] for entry in entries if entry in calls and any(entry.children())]
        slots = _slots(called) if called else None
        if slots is None or len(called) <= max(1, len(longest)):
            continue
        given, returned, linked = slots
        shapes = [(call.inputs[given].shape, call.outputs[returned].shape) for call in called]
        fitting = all(one[1] == other[0] for one, other in itertools.pairwise(shapes))
        if linked < (len(called) - 1) / 2 and not fitting:  # what is added in between may break all links
            continue
        if any(one != other for one, other in shapes):
            longest = [(f"{path}.{entries.index(call.module)}", call) for call in called]
    for path, call in longest:
        before, after = call.main_input, call.main_output
        if before is not None and after is not None and before.shape != after.shape:
            sizes = f"{tuple(before.shape[1:])} for each example and hands on {tuple(after.shape[1:])}"
            return f"what its modules hand on is no stream of one size: {path!r} is given {sizes}"
    return NO_BLOCKS


def _lists(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Modules whose parts are numbered, outer ones first."""
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_children()]
        if names and names == [str(number) for number in range(len(names))]:
            yield path, list(module.children())


def _called_by_parts(
    model: nn.Module, calls: Mapping[nn.Module, list[Call]], found: Sequence[BlockStack]
) -> Iterator[tuple[str, list[nn.Module]]]:
    """Lists of layers that are not called themselves: their forward is, or each is an entry of several lists.

    The latter beside no list that is as long and hands a stream on by itself: there the model has its layers.
    """
    longest = max((one.linked + 1 for one in found), default=0)
    beside: dict[tuple[str, int], list[str]] = {}
    for path, entries in list(_lists(model)):
        if any(f"{path}.".startswith(f"{one.path}.") or one.path.startswith(f"{path}.") for one in found):
            continue
        if any(calls.get(entry) for entry in entries):
            parent, _, name = path.rpartition(".")
            beside.setdefault((parent, len(entries)), []).append(name)
        else:
            yield path, entries
    for (parent, layers), names in beside.items():
        if len(names) > 1 and layers > longest:
            path = f"{parent}.{{{','.join(names)}}}" if parent else f"{{{','.join(names)}}}"
            yield path, blocks_at(model, path)


def _stack_of_parts(path: str, layers: Sequence[nn.Module], trace: Trace) -> BlockStack | None:
    """The stack of layers of which parts alone are called, if every one is given what the one before returned."""
    made = [call_of_parts(trace, layer, f"{path}.{number}") for number, layer in enumerate(layers)]
    called = [call for call in made if call is not None]
    if len(called) < max(2, len(layers)):
        return None
    stack = _stack(path, layers, {call.module: [call] for call in called})
    if stack is None or stack.linked < len(called) - 1 or not _attends(stack):
        return None
    for call in called:
        put_in(trace, call)
    return stack


def _stack(path: str, entries: Sequence[nn.Module], calls: dict[nn.Module, list[Call]]) -> BlockStack | None:
    """The stack that a list of modules is, if it is one."""
    called = [(layer, entry) for layer, entry in enumerate(entries) if calls.get(entry)]
    if not called or not all(any(entry.children()) and has_matrix(entry) for _, entry in called):
        return None
    first = [calls[entry][0] for _, entry in called]
    slots = _slots(first)
    if slots is None:
        return None
    given, returned, linked = slots
    blocks = tuple(
        Block(
            layer,
            path_in_layer(path, layer, "") if path else str(layer),
            call,
            None if given == call.main_input_slot else given,
            output_slot(call.outputs, returned),
        )
        for (layer, _), call in zip(called, first, strict=True)
    )
    if any(block.entering.shape != block.leaving.shape for block in blocks):
        return None
    if len(blocks) > 1 and linked < (len(blocks) - 1) / 2:
        return None
    times = max(len(calls[entry]) for _, entry in called)
    reason = f"its blocks run {times} times in a forward pass, so no layer has one value" if times > 1 else ""
    return BlockStack(path, len(entries), blocks, linked, refused=reason)


def _slots(calls: Sequence[Call]) -> tuple[Slot, Slot, int] | None:
    """The slots by which most of the calls are given what the one before returned, and how many are."""
    givens = [slot for slot in calls[0].inputs if all(slot in call.inputs for call in calls)]
    returns = [slot for slot in calls[0].outputs if all(slot in call.outputs for call in calls)]
    mains = [call.main_input_slot for call in calls]
    givens.sort(key=lambda slot: slot != mains[0])
    best: tuple[Slot, Slot, int] | None = None
    for given, returned in itertools.product(givens, returns):
        first = calls[0]
        if first.inputs[given].dim() < 2 or not first.inputs[given].is_floating_point():
            continue
        if len(calls) == 1 and first.inputs[given].shape != first.outputs[returned].shape:
            continue
        linked = sum(
            _keyed(one, "output", returned) == _keyed(other, "input", given)
            for one, other in itertools.pairwise(calls)
        )
        if best is None or linked > best[2]:
            best = given, returned, linked
    return best


def _keyed(call: Call, side: str, slot: Slot) -> Key:
    return key_of((call.inputs if side == "input" else call.outputs)[slot])


# --- which stack is which ---------------------------------------------------------------------------------

_SIGNALS = {
    "vision": re.compile(r"pixel|image|vision|visual|video"),
    "audio": re.compile(r"input_features|input_values|audio|speech|sound|mel"),
}
"""What the inputs of towers, and the modules around them, are called."""


def with_roles(stacks: Sequence[BlockStack], trace: Trace) -> list[BlockStack]:
    """The stacks that components can name, each with its role: at most one of a kind.

    The main one is that which runs last. One whose blocks are given, beside the stream, what another one ended in is
    a decoder and the other its encoder.
    """
    whole = [stack for stack in stacks if stack.linked == len(stack.blocks) - 1] or list(stacks)
    if not whole:
        return []
    large = [stack for stack in whole if len(stack.blocks) > 1 or _attends(stack)] or whole
    main = _main(large, trace)
    broken = [
        replace(stack, refused=_why_broken(stack, trace))
        for stack in stacks
        if stack not in whole and _attends(stack) and tower_of(main, trace, stack)
        if not tower_of(stack, trace, main)
    ]
    if broken:  # what runs without a break is its tower
        large += broken
        main = _main(large, trace)
    encoder = next(
        (stack for stack in reversed(large) if stack is not main and reads_end_of(main, stack, trace)), None
    )
    found: list[BlockStack] = []
    if encoder is not None:
        found = [replace(encoder, role="encoder"), replace(main, role="decoder")]
    else:
        role: Stack | None = (tower_of(main, trace) or "text") if _independent(main, large, trace) else None
        found = [replace(main, role=role)]
    for stack in large:
        role = tower_of(stack, trace, main)
        if stack not in (main, encoder) and role and role not in {known.role for known in found}:
            found.append(replace(stack, role=role))
    return sorted(found, key=lambda stack: stack.first.call.entered)


def _why_broken(stack: BlockStack, trace: Trace) -> str:
    """Why the blocks of a stack, of which some are not given what the one before returned, cannot be offered."""
    for one, other in itertools.pairwise(stack.blocks):
        if key_of(one.leaving) == key_of(other.entering):
            continue
        between = (
            call.path
            for call in trace.calls
            if one.call.left <= call.entered and call.left <= other.call.entered
            if any(key_of(tensor) == key_of(other.entering) for tensor in call.outputs.values())
        )
        changed = f"{path!r} changes it" if (path := next(between, "")) else "the model changes it"
        return (
            f"block {other.layer} of {stack.path!r} is not given the stream that block {one.layer} returned:"
            f" {changed} in between"
        )
    return stack.refused


def _attends(stack: BlockStack) -> bool:
    """Whether blocks compute attention: a list of a single one might be anything."""
    return any(met.name in ("fused", "softmax") for met in stack.first.call.met_inside())


def _main(stacks: Sequence[BlockStack], trace: Trace) -> BlockStack:
    """The stack that ends in the logits: the last one that reads tokens, else the last one."""
    return max(stacks, key=lambda stack: (tower_of(stack, trace) is None, stack.last.call.left))


def tower_of(stack: BlockStack, trace: Trace, beside: BlockStack | None = None) -> Stack | None:
    """Whether a stack reads images or sound, by what the modules around it are given.

    Args:
        stack: The stack.
        trace: The forward pass.
        beside: Only modules that do not hold this other stack count.
    """
    around = stack.first.call.parent
    while around is not None and (beside is None or beside.first.call not in around.inside()):
        floats = [name for name, tensor in around.inputs.items() if isinstance(name, str)]
        for role, words in _SIGNALS.items():
            if any(words.search(name) for name in floats) and around.path:
                return role  # type: ignore[return-value]
        around = around.parent
    leaf = stack.path.lower()
    if beside is not None:
        shared = zip(leaf.split("."), beside.path.lower().split("."), strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda parts: parts[0] == parts[1], shared))
        leaf = ".".join(leaf.split(".")[same:])
    for role, words in _SIGNALS.items():
        if words.search(leaf):
            return role  # type: ignore[return-value]
    return None


def _independent(main: BlockStack, stacks: Sequence[BlockStack], trace: Trace) -> bool:
    """Whether two towers are compared in the end and none reads the other: no logits come out."""
    output = trace.output
    has_logits = isinstance(output, Mapping) and "logits" in output
    return not has_logits and any(stack is not main and tower_of(stack, trace) for stack in stacks)


def reads_end_of(stack: BlockStack, other: BlockStack, trace: Trace) -> bool:
    """Whether blocks of a stack are given, beside the stream, what another stack ended in."""
    ends = {
        key_of(tensor)
        for call in trace.calls
        if call.left >= other.last.call.left and call.entered < stack.first.call.entered
        for tensor in call.outputs.values()
        if tensor.is_floating_point() and tensor.dim() >= 2
    } | {key_of(other.last.leaving)}
    block = stack.first
    beside = [tensor for tensor in block.call.inputs.values() if tensor is not block.entering]
    return any(key_of(tensor) in ends for tensor in beside if tensor.is_floating_point())
