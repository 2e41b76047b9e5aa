"""What is before and behind the blocks: the embedding, the last norm, the head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from intervenable.map_blocks import BlockStack
from intervenable.map_layout import Layout
from intervenable.map_mlp import Placed
from intervenable.map_modules import Key, holds, is_norm, key_of, output_slot
from intervenable.map_trace import Call, Trace
from model_maps import Side, Site

NO_TABLE = "no module looks up the embeddings of the tokens that its blocks read"
NO_NORM = "no norm follows its last block"
NORMED_BLOCKS = "each of its blocks ends in a norm and none follows the last block"
NO_LOGITS = "its towers are compared with each other, and neither ends in logits"
NO_HEAD = "it is the bare stack of blocks, without a head"


def end_sites(trace: Trace, stack: BlockStack, layout: Layout) -> Placed:
    """The embedding before a stack and the norm behind it.

    Args:
        trace: The forward pass.
        stack: The stack.
        layout: The layout of its stream.
    """
    sites: dict[str, Site] = {}
    absent: dict[str, str] = {}
    embedding = _embedding(trace, stack)
    if embedding is None:
        absent["embedding_output"] = NO_TABLE
    elif len(trace.of(embedding.path)) > 1:
        absent["embedding_output"] = (
            f"{embedding.path!r} runs {len(trace.of(embedding.path))} times in a forward pass"
        )
    else:
        sites["embedding_output"] = _placed(layout, embedding, "output")
    norm = _norm_behind(trace, stack, layout)
    if norm is not None and len(trace.of(norm.path)) > 1:
        times = len(trace.of(norm.path))
        again = f"the norm after its last block, {norm.path!r}, runs {times} times in a forward pass"
        absent |= dict.fromkeys(("final_norm_input", "final_norm_output"), again)
    elif norm is None:
        reason = NORMED_BLOCKS if _ends_in_norm(stack) else NO_NORM
        absent |= dict.fromkeys(("final_norm_input", "final_norm_output"), reason)
    else:
        sites["final_norm_input"] = _placed(layout, norm, "input")
        sites["final_norm_output"] = _placed(layout, norm, "output")
    return Placed(sites, absent)


def _placed(layout: Layout, call: Call, side: Side) -> Site:
    tensor = call.main_input if side == "input" else call.main_output
    site = Site(call.path, side, width="any")
    return site if tensor is None else layout.placed(site, tensor)


def _embedding(trace: Trace, stack: BlockStack) -> Call | None:
    """The module that turns tokens into vectors: the first table that is given the stack's tokens."""
    names = ("decoder_input_ids", "input_ids") if stack.role == "decoder" else ("input_ids",)
    whole = [trace.root.inputs[name] for name in names if name in trace.root.inputs]
    tokens = {key_of(tensor) for tensor in (*whole[:1], *(tensor.mT for tensor in whole[:1]))}
    for call in trace.calls:
        if call.entered > stack.first.call.entered:
            break
        given, returned = call.main_input, call.main_output
        if given is None or returned is None or given.is_floating_point() or not _is_table(call.module):
            continue
        if returned.shape[:-1] == given.shape and key_of(given) in tokens and _looks_up(call):
            return call
    return None


def _looks_up(call: Call) -> bool:
    """Whether a table gives each token its own row, up to a factor; one of positions may be given tokens as well."""
    given, returned, table = call.main_input, call.main_output, getattr(call.module, "weight", None)
    if (
        given is None
        or returned is None
        or not isinstance(table, Tensor)
        or table.shape[-1] != returned.shape[-1]
    ):
        return True
    if int(given.min()) < 0 or int(given.max()) >= len(table):
        return False
    rows, found = table.detach()[given].double(), returned.double()
    factor = float((rows * found).sum()) / (float((rows * rows).sum()) or 1.0)
    return float((found - factor * rows).abs().max()) <= 1e-4 * float(found.abs().max())


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or not any(module.children())


def _norm_behind(trace: Trace, stack: BlockStack, layout: Layout) -> Call | None:
    """The norm that is given what the last block returned, or what the modules around the blocks make of that."""
    end, last = key_of(stack.last.leaving), stack.last.call
    behind = [call for call in trace.calls if call.entered > last.left and is_norm(call)]
    beside = [call for call in behind if call.parent is not None and holds(call.parent, last)]
    beside = [call for call in beside if _rows(call) == layout.examples * layout.positions]
    found = next((call for call in behind if _given(call) == end), None)
    return found or (beside[-1] if beside and not _ends_in_norm(stack) else None)


def _rows(call: Call) -> int:
    """How many vectors a module is given."""
    given = call.main_input
    return 0 if given is None or given.dim() < 2 else given.numel() // given.shape[-1]


def _given(call: Call) -> Key | None:
    return None if call.main_input is None else key_of(call.main_input)


def _ends_in_norm(stack: BlockStack) -> bool:
    end = key_of(stack.last.leaving)
    return any(
        is_norm(call) and call.main_output is not None and key_of(call.main_output) == end
        for call in stack.last.call.inside()
    )


# --- the head ---------------------------------------------------------------------------------------------


def head_sites(trace: Trace, stack: BlockStack, model: nn.Module) -> Placed:
    """The head whose output becomes the logits.

    Args:
        trace: The forward pass.
        stack: The stack that it reads.
        model: The model.
    """
    logits = _logits(trace)
    if logits is None:
        return Placed({}, {"logits": NO_HEAD})
    behind = [call for call in trace.calls if call.entered > stack.last.call.left and call.parent is not None]
    same = [
        (call, slot)
        for call in behind
        for slot, tensor in call.outputs.items()
        if key_of(tensor) == key_of(logits)
    ]
    if same:
        call, slot = same[0]
        return Placed({"logits": Site(call.path, slot=output_slot(call.outputs, slot), width="any")}, {})
    # A soft-cap or a factor follows the head.
    wide = [
        call
        for call in behind
        if call.main_output is not None and call.main_output.shape[-1:] == logits.shape[-1:]
    ]
    heads = [call for call in wide if any(met.name == "linear" for met in call.met)]
    if len(heads) != 1:
        return Placed({}, {"logits": "no module returns its logits, nor what a function makes them of"})
    return Placed({"logits": Site(heads[0].path, width="any")}, {})


def _logits(trace: Trace) -> Tensor | None:
    """The logits among the outputs of the model."""
    output = trace.output
    if isinstance(output, Mapping):
        names = ("logits", "prediction_logits", "start_logits")
        return next((output[name] for name in names if isinstance(output.get(name), Tensor)), None)
    return output if isinstance(output, Tensor) else None
