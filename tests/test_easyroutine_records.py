"""Interventions as easyroutine declares them: what each does here, on known patterns, on a toy and on tiny models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import by_hand
import pytest
import torch
from declared import main_output
from test_attention_constructors import THREE, patterns, set_scores, uniform
from torch import Tensor, nn
from torch.testing import assert_close

import intervenable as iv
from intervenable.collecting import collect
from intervenable.easyroutine import from_easyroutine
from intervenable.easyroutine_keys import KEY_KINDS
from intervenable.easyroutine_records import TYPES, EasyroutineIntervention
from intervenable.easyroutine_values import FromCache
from model_maps import lookup
from tiny_models import HEAD_DIM, HEADS, HIDDEN, tiny, tiny_inputs


def record(
    kind: str, key: str, positions: Any = (), values: Any = None, **more: Any
) -> EasyroutineIntervention:
    return EasyroutineIntervention(kind, key, positions, values, **more)


def edited_pattern(
    model: Any, inputs: Any, *records: Any, before: Any = (), head: int = 2, tokenizer: Any = None
) -> Tensor:
    """`[b, q, k]`: the pattern of head 2 in layer 1 after the records."""
    config = from_easyroutine(list(records), model, inputs)
    return patterns(model, inputs, *before, *config.representations, head=head, tokenizer=tokenizer)


def of_three(*records: Any, before: Any = ()) -> Tensor:
    """`[3, 3]`: what records make of a uniform causal pattern of three tokens."""
    return edited_pattern(uniform(), THREE, *records, before=before)[0]


def intervened(model: Any, inputs: Any, *records: Any) -> Tensor:
    config = from_easyroutine(list(records), model, inputs)
    with torch.no_grad():
        return main_output(iv.IntervenableModel(config, model)(inputs).intervened)


# --- matrices: the worked examples ------------------------------------------------------------------------

KEY = "pattern_L1H2"


def test_columns_rows_and_grids_scale_the_entries_that_they_choose():
    assert_close(
        of_three(record("columns", KEY, [1])), torch.tensor([[1, 0, 0], [0.5, 0, 0], [1 / 3, 0, 1 / 3]])
    )
    halved = of_three(record("rows", KEY, [2], multiplication_value=0.5))
    assert_close(halved, torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [1 / 6, 1 / 6, 1 / 6]]))
    entry = of_three(record("grid", KEY, ([2], [0])))
    assert_close(entry, torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 1 / 3, 1 / 3]]))
    own = of_three(record("keep-self-attn", KEY, [2]))
    assert_close(own, torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1 / 3]]))
    assert of_three(record("full", KEY)).abs().max() == 0


def test_a_softmax_that_was_asked_for_is_a_division_by_the_sum_and_a_warning():
    with pytest.warns(iv.IntervenableWarning, match="renormalize='rows'"):
        edited = of_three(record("columns", KEY, [1], apply_softmax=True))
    assert_close(edited, torch.tensor([[1, 0, 0], [1, 0, 0], [0.5, 0, 0.5]]))
    with pytest.warns(iv.IntervenableWarning, match="renormalize='rows'"):
        edited = of_three(record("grid", KEY, ([2], [0]), apply_softmax=True))
    assert edited[0].tolist() == [1, 0, 0]  # the first token does not come to read what follows
    with pytest.warns(iv.IntervenableWarning, match="renormalize='rows'"):
        own = of_three(record("keep_self_attn", KEY, [2], apply_softmax=True))
    assert_close(own[2], torch.tensor([0.0, 0, 1]))


def test_an_ablation_before_the_softmax_removes_and_lets_nothing_of_the_future_in():
    assert_close(of_three(record("columns_pre_softmax", KEY, [1]))[0], torch.tensor([1.0, 0, 0]))
    rows = torch.tensor([[1, 1, 1], [0.5, 0.5, 1], [0.2, 0.3, 0.5]]).log().tolist()
    edited = of_three(record("columns-pre-softmax", KEY, [1]), before=[set_scores(rows)])
    assert_close(edited, torch.tensor([[1, 0, 0], [1, 0, 0], [0.2857, 0, 0.7143]]), atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("values", "factor", "expected"),
    [
        (None, 0.0, [0.8808, 0, 0.1192]),
        ("ablation", 0.0, [0.8808, 0, 0.1192]),
        ("zero", 0.0, [0.7870, 0.1065, 0.1065]),
        (None, 2.0, [0.4683, 0.4683, 0.0634]),
    ],
)
def test_a_score_is_removed_scaled_or_zeroed(values, factor, expected):
    scores = set_scores([[0, 0, 0], [0, 0, 0], [2, 1, 0]])
    one = record("grid_pre_softmax", KEY, ([2], [1]), values, multiplication_value=factor)
    assert_close(of_three(one, before=[scores])[2], torch.tensor(expected), atol=5e-5, rtol=0)


# --- matrices: every type, and every spelling of it -------------------------------------------------------

CHOOSE = {
    "columns": ([1, 3], lambda m: m.index_fill_(1, torch.tensor([1, 3]), True)),
    "rows": ([2, -3], lambda m: m.index_fill_(0, torch.tensor([2, 4]), True)),
    "grid": (
        ([2, 5], [0, 1]),
        lambda m: m.__setitem__((torch.tensor([[2], [5]]), torch.tensor([0, 1])), True),
    ),
    "full": ((), lambda m: m.fill_(True)),
    "keep_self_attn": ([3], lambda m: m[3].logical_not_()[3].fill_(False)),
}


def mask_of(kind: str) -> Tensor:
    mask = torch.zeros(7, 7, dtype=torch.bool)
    CHOOSE[kind][1](mask)
    return mask


@pytest.mark.parametrize("kind", CHOOSE)
@pytest.mark.parametrize(
    "spelled", [str, lambda kind: kind.replace("_", "-")], ids=["underscores", "hyphens"]
)
def test_every_type_is_there_after_and_before_the_softmax(kind, spelled):
    model = tiny("llama")
    inputs = tiny_inputs(model)
    plain, mask = patterns(model, inputs), mask_of(kind)
    assert mask.any()
    after = edited_pattern(
        model, inputs, record(spelled(kind), KEY, CHOOSE[kind][0], multiplication_value=0.25)
    )
    assert_close(after, torch.where(mask, plain / 4, plain))
    before = edited_pattern(model, inputs, record(spelled(f"{kind}_pre_softmax"), KEY, CHOOSE[kind][0]))
    left = torch.where(mask, torch.zeros(()), plain)
    total = left.sum(-1, keepdim=True)
    assert_close(before, torch.where(total > 0, left / total, torch.zeros(())), atol=1e-6, rtol=1e-5)


def test_the_slip_under_which_easyroutine_registers_a_type_is_known():
    assert record("colums_pre_softmax", KEY, [1]).type == "columns_pre_softmax"


@pytest.mark.parametrize(
    "kind", ["block-img-txt", "block_img_txt", "block-img-img", "block_img_img_pre_softmax"]
)
def test_blocks_of_images_and_text_choose_by_kinds_of_tokens(kind):
    (entry,) = from_easyroutine(record(kind, KEY), tiny("llama")).representations
    reader = "all-text" if "txt" in kind else "all-image"
    assert entry.where == {"heads": 2, "queries": [reader], "keys": ["all-image"]}
    assert entry.component == ("attention_scores" if "pre" in kind else "attention_pattern")


def test_positions_that_a_type_does_not_look_at_are_warned_of():
    with pytest.warns(iv.IntervenableWarning, match=r"token_positions=\[3\] has no effect on 'full'"):
        from_easyroutine(record("full", KEY, [3]), tiny("llama"))
    from_easyroutine(record("full", KEY, ["all"]), tiny("llama"))


@pytest.mark.parametrize("positions", [1, [1], (1,), range(1, 2), [(1, 2)], ["last-2"]])
def test_positions_are_numbers_lists_and_half_open_ranges(positions):
    assert_close(of_three(record("columns", KEY, positions)), of_three(record("columns", KEY, [1])))


def test_records_apply_to_every_example_and_each_sees_what_the_last_left():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    plain = patterns(model, inputs)
    edited = edited_pattern(
        model,
        inputs,
        record("columns", KEY, [1], multiplication_value=3.0),
        record("rows", KEY, [4], multiplication_value=0.5),
    )
    expected = plain.clone()
    expected[:, :, 1] *= 3
    expected[:, 4] *= 0.5
    assert_close(edited, expected)
    assert torch.equal(edited_pattern(model, inputs, record("full", "pattern_L1H3")), plain)


# --- positions by name ------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["left", "right"])
def test_names_are_resolved_in_each_example_without_its_padding(padding):
    model = tiny("llama")
    inputs = tiny_inputs(model, batch=3, padding=padding)
    real = [row.nonzero().flatten().tolist() for row in inputs["attention_mask"]]
    plain = patterns(model, inputs)
    edited = edited_pattern(model, inputs, record("grid", KEY, (["last", 1], ["first", (2, 4)])))
    expected = plain.clone()
    for example, tokens in enumerate(real):
        for query in (tokens[-1], tokens[1]):
            for key in (tokens[0], tokens[2], tokens[3]):
                expected[example, query, key] = 0
    assert_close(edited, expected)
    given = torch.rand(7, 7)
    edited = edited_pattern(model, inputs, record("rows", KEY, ["last"], given))
    for example, tokens in enumerate(real):
        last = tokens[-1]
        assert_close(edited[example, last, tokens], given[last, tokens])
        assert torch.equal(edited[example, tokens[:-1]], plain[example, tokens[:-1]])


def test_blocks_of_an_image_are_where_its_markers_are():
    model = tiny("llama")
    inputs = {"input_ids": torch.tensor([[5, 60, 7, 8, 61, 9, 10], [60, 7, 8, 8, 8, 61, 9]])}
    image, text = ([1, 2, 3, 4], [0, 1, 2, 3, 4, 5]), ([0, 5, 6], [6])  # markers are of the image
    resolver = iv.PositionResolver(None, classes={"image": (60, None, 61)})
    plain = patterns(model, inputs)
    for kind, readers in (("block-img-txt", text), ("block_img_img", image)):
        edited = edited_pattern(model, inputs, record(kind, KEY), tokenizer=resolver)
        expected = plain.clone()
        for example in range(2):
            expected[example][torch.tensor(readers[example])[:, None], image[example]] = 0
        assert_close(edited, expected)
        assert (expected != plain).any()


def test_a_name_that_is_not_there_is_an_error():
    tokenizer, model = iv.load_small_lm()
    inputs = tokenizer("The capital of Spain is", return_tensors="pt")
    config = from_easyroutine([record("full", "resid_out_1", ["Spian"])], model)
    with pytest.raises(iv.LocationError, match="'Spian'"):
        iv.IntervenableModel(config, model, tokenizer=tokenizer)(inputs)


# --- matrices: values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 7), (1, 7, 7), (2, 7, 7), (2, 1, 7, 7)])
@pytest.mark.parametrize("kind", ["columns", "rows", "grid", "full"])
def test_a_tensor_of_the_whole_matrix_gives_the_entries_that_are_chosen(kind, shape):
    model = tiny("llama")
    inputs = tiny_inputs(model)
    plain = patterns(model, inputs)
    given = torch.rand(shape)
    before = given.clone()
    edited = edited_pattern(
        model, inputs, record(kind, KEY, CHOOSE[kind][0], given, multiplication_value=7.0)
    )
    matrices = given if given.dim() == 2 else given.reshape(-1, 7, 7)
    assert_close(edited, torch.where(mask_of(kind), matrices.expand(2, 7, 7), plain))
    assert torch.equal(given, before)


@pytest.mark.parametrize("shape", [(5, 5), (3, 7, 7), (2, 4, 7, 7), (7,)])
def test_a_tensor_that_is_no_such_matrix_is_an_error(shape):
    model = tiny("llama")
    with pytest.raises((iv.ConfigError, iv.SourceError), match=r"shape|batch"):
        edited_pattern(model, tiny_inputs(model), record("columns", KEY, [1, 3], torch.ones(shape)))


def test_scores_take_a_tensor_and_stay_hidden_where_they_were():
    scores = torch.randn(7, 7)
    model = tiny("llama")
    edited = edited_pattern(model, tiny_inputs(model), record("full_pre_softmax", KEY, (), scores))
    expected = scores.masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf).softmax(-1)
    assert_close(edited, expected.expand(2, 7, 7), atol=1e-6, rtol=1e-5)


def test_a_function_gets_the_chosen_entries_of_one_head():
    shapes = []

    def half(entries):
        shapes.append(tuple(entries.shape))
        return entries / 2

    model = tiny("llama")
    inputs = tiny_inputs(model)
    edited = edited_pattern(model, inputs, record("grid", KEY, ([3, 5], [0]), half))
    expected = patterns(model, inputs)
    expected[:, [3, 5], 0] /= 2
    assert_close(edited, expected)
    assert shapes == [(2, 2, 1)]


def test_a_pattern_comes_from_a_cache():
    model = tiny("llama")
    inputs, other = tiny_inputs(model), tiny_inputs(model, seed=1)
    cached = patterns(model, other)
    cache = {KEY: cached}
    edited = edited_pattern(model, inputs, record("rows", KEY, [4], FromCache(cache, KEY)))
    expected = patterns(model, inputs)
    expected[:, 4] = cached[:, 4]
    assert_close(edited, expected)
    with pytest.raises(iv.ConfigError, match="makes no sense for a matrix"):
        from_easyroutine(record("rows", KEY, [4], FromCache(cache, KEY, [4])), model)


# --- vectors ----------------------------------------------------------------------------------------------


class OneBlock(nn.Module):
    """A model of one block whose output is its input, to see what records make of known vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity()])

    def forward(self, vectors: Tensor) -> Tensor:
        result: Tensor = self.blocks[0](vectors)
        return result


@pytest.fixture(autouse=True)
def _one_block_has_a_map(monkeypatch):
    monkeypatch.setattr(lookup, "_MAPS", dict(lookup._MAPS))
    places = {"block_output": iv.Site("", "output")}
    iv.register_map(iv.ModelMap(classes=("OneBlock",), blocks="blocks", sites=places))


X = torch.tensor([[[0.0, 1], [2, 3], [4, 5]]])


def on_line(values: Any = None, positions: Any = 1, x: Tensor = X, **more: Any) -> Tensor:
    config = from_easyroutine(record("full", "resid_out_0", positions, values, **more), OneBlock(), x)
    return iv.IntervenableModel(config, OneBlock())(x).intervened


def test_vectors_are_ablated_or_replaced_at_the_chosen_positions_alone():
    assert on_line().tolist() == [[[0, 1], [0, 0], [4, 5]]]
    assert on_line("ablation", multiplication_value=0.5).tolist() == [[[0, 1], [1, 1.5], [4, 5]]]
    assert on_line("zero", multiplication_value=0.5).tolist() == [[[0, 1], [0, 0], [4, 5]]]
    assert on_line(torch.full((1, 1, 2), 9.0)).tolist() == [[[0, 1], [9, 9], [4, 5]]]
    assert on_line(lambda vectors: vectors + 1, [0, -1]).tolist() == [[[1, 2], [2, 3], [5, 6]]]
    assert on_line("mean", [0, 1]).tolist() == [[[2, 3], [2, 3], [4, 5]]]


@pytest.mark.parametrize("shape", [(2,), (1, 1, 2), (2, 1, 2), (2, 2, 2), (1, 2, 2)])
def test_values_broadcast_to_the_chosen_vectors(shape):
    x = torch.rand(2, 3, 2)
    given = torch.rand(shape)
    expected = x.clone()
    expected[:, [0, 2]] = given if given.dim() == 3 else given.expand(2, 2, 2)
    assert_close(on_line(given, [0, 2], x), expected)


def test_values_that_do_not_fit_are_an_error():
    with pytest.raises((iv.SourceError, iv.EditError), match="does not broadcast"):
        on_line(torch.ones(1, 3, 2), [0, 2])
    with pytest.raises((iv.SourceError, iv.EditError), match="does not broadcast"):
        on_line(torch.ones(3))


def test_gradients_pass_through_an_edit():
    x = X.clone().requires_grad_()
    on_line(multiplication_value=0.5, x=x).sum().backward()
    assert x.grad.tolist() == [[[1, 1], [0.5, 0.5], [1, 1]]]


def test_the_mean_is_over_the_real_positions_of_each_example():
    model = tiny("llama")
    inputs = tiny_inputs(model, padding="left")
    mask = inputs["attention_mask"].bool()
    assert not mask.all()
    with torch.no_grad():
        stream = by_hand.seen(model, "block_output", inputs)
        means = torch.stack([row[real].mean(0) for row, real in zip(stream, mask, strict=True)])

        def change(value):
            value = value.clone()
            value[:, -2:] = means[:, None]
            return value

        expected = main_output(by_hand.run_with(model, "block_output", change, inputs))
    result = intervened(model, inputs, record("full", "resid_out_1", [-1, -2], "mean"))
    assert_close(result[mask], expected[mask], atol=1e-5, rtol=1e-5)


def test_the_mean_of_a_head_is_its_own():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    columns = slice(3 * HEAD_DIM, 4 * HEAD_DIM)
    with torch.no_grad():

        def change(value):
            value = value.clone()
            value[:, 5, columns] = value[..., columns].mean(1)
            return value

        expected = main_output(by_hand.run_with(model, "query_output", change, inputs))
    result = intervened(model, inputs, record("full", "head_queries_L1H3", 5, "mean"))
    assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_what_depends_on_the_inputs_asks_for_them():
    with pytest.raises(iv.ConfigError, match=r"from_easyroutine\(records, model, inputs\)"):
        from_easyroutine(record("full", "resid_out_1", 0, "mean"), tiny("llama"))
    with pytest.raises(iv.ConfigError, match="'mean' is for vectors"):
        from_easyroutine(record("columns", KEY, [1], "mean"), tiny("llama"))


VECTORS = {
    "resid_in_1": "block_input",
    "resid_mid_1": "block_mid",
    "resid_out_1": "block_output",
    "attn_in_1": "attention_input",
    "attn_out_1": "attention_output",
    "mlp_out_1": "mlp_output",
    "queries_L1": "query_output",
    "keys_L1": "key_output",
    "values_L1": "value_output",
}


@pytest.mark.parametrize(("key", "component"), VECTORS.items(), ids=VECTORS)
def test_every_vector_is_halved_where_its_key_says(key, component):
    model = tiny("llama")
    inputs = tiny_inputs(model)
    result = intervened(model, inputs, record("full", key, [2, 4], multiplication_value=0.5))
    by_name = iv.RepresentationConfig(1, component, intervention=iv.ScaleIntervention(0.5), where=[2, 4])
    with torch.no_grad():
        expected = main_output(iv.IntervenableModel(by_name, model)(inputs).intervened)
        if component != "block_mid":  # which no single hook can write

            def change(value):
                value = value.clone()
                value[:, [2, 4]] *= 0.5
                return value

            expected = main_output(by_hand.run_with(model, component, change, inputs))
        assert (expected - main_output(model(**inputs))).abs().max() > 1e-3
    assert_close(result, expected, atol=1e-5, rtol=1e-5)


# --- heads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [None, "full", "single"])
@pytest.mark.parametrize("kind", ["queries", "keys", "values"])
@pytest.mark.parametrize("head", range(HEADS))
def test_a_head_is_edited_by_its_query_head(kind, head, variant):
    model = tiny("llama", variant=variant)
    inputs = tiny_inputs(model)
    shared = by_hand.key_value_heads("llama", variant)
    own = head if kind == "queries" else head // (HEADS // shared)
    columns = slice(own * HEAD_DIM, (own + 1) * HEAD_DIM)
    component = {"queries": "query_output", "keys": "key_output", "values": "value_output"}[kind]

    def change(value):
        value = value.clone()
        value[:, 3, columns] *= 0.25
        return value

    with torch.no_grad():
        expected = main_output(by_hand.run_with(model, component, change, inputs))
    one = record("full", f"head_{kind}_L1H{head}", 3, multiplication_value=0.25, kv="shared")
    assert_close(intervened(model, inputs, one), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_a_head_that_others_share_is_not_edited_without_saying_so(kind):
    key = f"head_{kind}_L1H3"
    with pytest.raises(
        iv.ConfigError, match=rf"{key}' is key-value head 1, .* query heads 2 to 3 share.*kv='shared'"
    ):
        from_easyroutine(record("full", key, 0), tiny("llama"))
    assert from_easyroutine(record("full", key, 0), tiny("llama", variant="full")).representations


@pytest.mark.parametrize("shape", [(HEAD_DIM,), (1, 1, HEAD_DIM), (2, 1, HEAD_DIM), (2, 2, HEAD_DIM)])
def test_values_of_a_head_have_the_shape_that_easyroutine_gives_them(shape):
    model = tiny("llama")
    inputs = tiny_inputs(model)
    given = torch.randn(shape)
    columns = slice(HEAD_DIM, 2 * HEAD_DIM)

    def change(value):
        value = value.clone()
        value[:, [1, 4], columns] = given.expand(2, 2, HEAD_DIM)
        return value

    with torch.no_grad():
        expected = main_output(by_hand.run_with(model, "query_output", change, inputs))
    result = intervened(model, inputs, record("full", "head_queries_L1H1", [1, 4], given))
    assert_close(result, expected, atol=1e-5, rtol=1e-5)
    through = intervened(
        model, inputs, record("full", "head_queries_L1H1", [1, 4], lambda old: given.expand_as(old).clone())
    )
    assert_close(through, expected, atol=1e-5, rtol=1e-5)


def test_what_a_head_adds_is_replaced_in_the_attention_output():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    new = torch.randn(2, 1, HIDDEN)
    weight = model.model.layers[1].self_attn.o_proj.weight
    columns = slice(2 * HEAD_DIM, 3 * HEAD_DIM)
    with torch.no_grad():
        z = by_hand.seen(model, "attention_value_output", inputs)
        old = z[:, 3, columns] @ weight[:, columns].T

        def change(value):
            value = value.clone()
            value[:, 3] += new[:, 0] - old
            return value

        expected = main_output(by_hand.run_with(model, "attention_output", change, inputs))

        def clear(value):
            value = value.clone()
            value[:, 3, columns] = 0
            return value

        cleared = main_output(by_hand.run_with(model, "attention_value_output", clear, inputs))
    result = intervened(model, inputs, record("full", "head_out_L1H2", 3, new))
    assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert_close(intervened(model, inputs, record("full", "head_out_L1H2", 3)), cleared, atol=1e-5, rtol=1e-5)


# --- values from caches -----------------------------------------------------------------------------------


def test_vectors_come_from_a_cache_by_number_and_by_name():
    cache = {"resid_out_0": torch.arange(8.0).view(1, 4, 2), "mapping_index": {"last": [3], "two": [0, 2]}}
    assert on_line(FromCache(cache, "resid_out_0", [2]), 1).tolist() == [[[0, 1], [4, 5], [4, 5]]]
    assert on_line(FromCache(cache, "resid_out_0", ["last"]), 1).tolist() == [[[0, 1], [6, 7], [4, 5]]]
    assert on_line(FromCache(cache, "resid_out_0", ["two"]), [0, 1]).tolist() == [[[0, 1], [4, 5], [4, 5]]]
    assert on_line(FromCache(cache, "resid_out_0", [-2, 1]), [0, 1]).tolist() == [[[4, 5], [2, 3], [4, 5]]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (FromCache({}, "resid_out_0"), "Unknown activation 'resid_out_0' in the cache"),
        (FromCache({"resid_out_0": X}, "resid_out_0", ["lst"]), "Unknown name of positions 'lst'"),
        (FromCache({"resid_out_0": X}, "resid_out_0", [3]), "position 3 is out of range: example 0 has 3"),
        (FromCache({"resid_out_0": X}, "resid_out_0", [1.5]), "1.5 is no position"),
        (
            FromCache({"resid_out_0": X[0]}, "resid_out_0"),
            r"has shape \(3, 2\), not \[batch, positions, width\]",
        ),
        (FromCache({"resid_out_0": X}, "resid_otu_0"), "Did you mean 'resid_out_0'"),
    ],
)
def test_what_a_cache_does_not_have_is_an_error(values, message):
    with pytest.raises(iv.ConfigError, match=message):
        on_line(values)


@pytest.mark.parametrize("padding", [None, "left"])
def test_vectors_and_patterns_come_from_collected_activations(padding):
    model = tiny("llama")
    inputs, other = tiny_inputs(model), tiny_inputs(model, padding=padding, seed=1)
    cache = collect(model, other, ["block_output", "head_value_output", "attention_pattern"], layers=[1])
    first = [0, 0] if padding is None else [0, 1]
    with torch.no_grad():
        stream = by_hand.seen(model, "block_output", other)
        values = by_hand.seen(model, "value_output", other)

    def change_stream(value):
        value = value.clone()
        for example, start in enumerate(first):
            value[example, 4] = stream[example, start + 2]
        return value

    def change_values(value):
        value = value.clone()
        for example, start in enumerate(first):
            value[example, 4, HEAD_DIM:] = values[example, start + 2, HEAD_DIM:]
        return value

    with torch.no_grad():
        left = main_output(by_hand.run_with(model, "block_output", change_stream, inputs))
        right = main_output(by_hand.run_with(model, "value_output", change_values, inputs))
    one = record("full", "resid_out_1", 4, FromCache(cache, "resid_out_1", 2))
    assert_close(intervened(model, inputs, one), left, atol=1e-5, rtol=1e-5)
    one = record("full", "head_values_L1H3", 4, FromCache(cache, "head_values_L1H3", [2]), kv="shared")
    assert_close(intervened(model, inputs, one), right, atol=1e-5, rtol=1e-5)
    pattern = record("grid", KEY, ([3], [0, 1]), FromCache(cache, KEY))
    if padding is None:
        there = patterns(model, other)
        assert_close(edited_pattern(model, inputs, pattern)[:, 3, [0, 1]], there[:, 3, [0, 1]])
    else:  # matrices of different sizes
        with pytest.raises(iv.ConfigError, match="differ in number between examples"):
            from_easyroutine(pattern, model)
    with pytest.raises(iv.ConfigError, match="position 9 was not collected for example 0"):
        from_easyroutine(record("full", "resid_out_1", 4, FromCache(cache, "resid_out_1", 9)), model)


def test_collected_positions_are_found_by_the_names_of_their_groups():
    model = tiny("llama")
    inputs, other = tiny_inputs(model), tiny_inputs(model, padding="left", seed=1)
    named = iv.collect(model, other, "block_output", [1], positions={"two": (1, 3), "end": -1})
    plain = iv.collect(model, other, "block_output", [1])
    stream = plain.by_example(("block_output", 1))
    assert [len(row) for row in stream] == [7, 6]
    for positions, of in ((["end"], [-1]), (["two", "end"], [1, 3, -1]), ([3], [3])):
        places = list(range(len(of)))
        cached = FromCache(named, "resid_out_1", positions)
        result = intervened(model, inputs, record("full", "resid_out_1", places, cached))
        given = torch.stack([row[of] for row in stream])
        expected = intervened(model, inputs, record("full", "resid_out_1", places, given))
        assert torch.equal(result, expected)
    with pytest.raises(iv.UnknownNameError, match="Unknown name of positions 'edn'"):
        from_easyroutine(record("full", "resid_out_1", 1, FromCache(named, "resid_out_1", "edn")), model)


# --- records ----------------------------------------------------------------------------------------------


def test_records_may_be_mappings_or_easyroutines_own():
    fields = {"type": "columns", "activation": KEY, "token_positions": [1], "multiplication_value": 0.5}
    own = SimpleNamespace(**fields, patching_values=None, apply_softmax=False)
    model = tiny("llama")
    made = [from_easyroutine(one, model) for one in (fields, own, [EasyroutineIntervention(**fields)])]
    assert made[0] == made[1] == made[2]
    assert record("columns", KEY, [1])["token_positions"] == [1]
    for wrong in ([3], "columns", None):
        with pytest.raises(iv.ConfigError, match=r"intervention 0: .* is no intervention of easyroutine's"):
            from_easyroutine(wrong, model)
    assert from_easyroutine([], model).representations == []


def test_records_cannot_be_changed():
    one = record("columns", KEY, [1])
    with pytest.raises(ValueError, match="frozen"):
        one.type = "rows"


WRONG = {
    "type": (("column", KEY, [1]), "Unknown type of intervention 'column'. Did you mean 'columns'"),
    "key": (("columns", "patern_L1H2", [1]), "Did you mean 'pattern_L1H2'"),
    "vectors in columns": (("columns", "resid_out_1", [1]), "vectors such as 'resid_out_1' take 'full'"),
    "grid without a pair": (("grid", KEY, [1, 2]), r"give a pair of lists"),
    "grid of three": (("grid", KEY, ([1], [2], [3])), r"give a pair of lists"),
    "values": (("columns", KEY, [1], "men"), "Unknown patching_values 'men'. Did you mean 'mean'"),
    "list as values": (("columns", KEY, [1], [1.0]), "patching_values is a list"),
    "factor": (("columns", KEY, [1], None, float("inf")), "multiplication_value=inf is not a finite number"),
    "softmax of scores": (
        ("columns_pre_softmax", KEY, [1], None, 0.0, True),
        "apply_softmax makes no sense for 'columns_pre_softmax'",
    ),
    "softmax of vectors": (("full", "resid_out_1", [1], None, 0.0, True), "apply_softmax makes no sense"),
    "projected": (
        ("full", "projected_value_L1H2", [1]),
        r"no tensor of the forward pass holds it.*head_values_L1H2.*head_out_L1H2",
    ),
    "extraction": (("full", "logits", [1]), "'logits' cannot be written"),
    "kv": (("full", "head_values_L1H2", [1], None, 0.0, False, "share"), "shared"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_a_record_that_makes_no_sense_is_refused_when_it_is_made(fields, message):
    with pytest.raises(iv.ConfigError, match=message):
        EasyroutineIntervention(*fields)


def test_all_faults_of_a_record_and_of_all_records_are_told_at_once():
    with pytest.raises(iv.ConfigError) as one:
        EasyroutineIntervention("column", "patern_L1H2", [1], "men", float("nan"))
    assert all(word in str(one.value) for word in ("column", "patern", "men", "nan"))
    with pytest.raises(iv.IntervenableError) as several:
        from_easyroutine(
            [
                {"type": "full", "activation": "resid_out_9", "token_positions": [0]},
                {"type": "columns", "activation": KEY, "token_positions": [1]},
                {"type": "columns", "activation": "pattern_L1H7", "token_positions": [1]},
                {"type": "columns", "activation": KEY, "token_positions": []},
                {"type": "columns", "activation": KEY, "token_positions": [(1, 2, 3)]},
            ],
            tiny("llama"),
        )
    text = str(several.value)
    assert all(f"intervention {index}:" in text for index in (0, 2, 3, 4))
    assert "intervention 1:" not in text
    assert "layers 0 to 2" in text
    assert "query heads 0 to 3" in text
    assert "name no position" in text
    assert "(1, 2, 3) among token_positions is no range" in text


def test_every_key_is_written_or_says_why_it_cannot_be():
    model = tiny("llama")
    for kind in KEY_KINDS:
        key = kind.template.format(layer=1, head=2)
        fields = {"type": "full", "activation": key, "token_positions": ["all"], "kv": "shared"}
        if kind.read_only:
            with pytest.raises(iv.ConfigError, match=f"'{key}' cannot be written: "):
                EasyroutineIntervention(**fields)
        else:
            (entry,) = from_easyroutine(fields, model).representations
            assert (entry.component, entry.layer) == (kind.component, 1)


def test_the_models_own_layers_and_heads_are_the_limits():
    with pytest.raises(iv.LayerRangeError, match="layers 0 to 2"):
        from_easyroutine(record("full", "resid_out_3", 0), tiny("llama"))
    with pytest.raises(iv.LocationRangeError, match="query heads 0 to 3"):
        from_easyroutine(record("columns", "pattern_L0H4", 0), tiny("llama"))


def test_every_type_of_the_table_makes_a_configuration():
    model = tiny("llama")
    for kind in TYPES:
        positions = (
            ([1], [0]) if kind.startswith("grid") else () if kind.startswith(("full", "block")) else [1]
        )
        assert len(from_easyroutine(record(kind, KEY, positions), model).representations) == 1
