"""Every law of a map, on models whose maps are right, and what becomes of a map that is wrong in places."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from tiny_registry import build
from torch import nn
from written_maps import find_map

import intervenable as iv
from intervenable.map_inference import infer_map
from intervenable.map_laws import LAWS, deviation
from intervenable.map_laws_focus import of_the_same_parts
from intervenable.map_laws_heads import Coded
from intervenable.map_laws_heads import _told as told_of_heads
from intervenable.map_verification import check_map, proved
from intervenable.map_verification_result import Verification
from model_maps import COMPONENTS, AttentionHeads, LayerKind, ModelMap, Site
from tiny_models import CASES, ENCODER_DECODER_CASES, MULTIMODAL, tiny, tiny_inputs

PLAIN = [
    case
    for case in (*CASES, (MULTIMODAL, None))
    if case[1] not in ("full", "single") and case[0] not in ("mistral", "qwen2", "gemma", "gemma3")
]


def map_of(model: nn.Module) -> ModelMap:
    config = getattr(model, "config", None)
    return find_map([base.__name__ for base in type(model).__mro__], config).for_config(config)


def with_sites(model_map: ModelMap, **sites: Site) -> ModelMap:
    return replace(model_map, sites={**model_map.sites, **sites})


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny("llama")


@pytest.fixture(scope="module")
def right(llama) -> Verification:
    return check_map(llama, map_of(llama), tiny_inputs(llama))


# --- maps that are right ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "variant"), PLAIN)
def test_every_component_of_a_right_map_keeps_every_law(family, variant):
    model = tiny(family, variant=variant)
    described = map_of(model)
    found = check_map(model, described, tiny_inputs(model))
    assert found.refused == {}
    assert found.passed
    assert found.components == described.components()
    assert found.map == described
    assert found.check() is found


@pytest.mark.parametrize(("family", "variant"), [("t5", None), ("umt5", "gated")])
def test_both_stacks_and_cross_attention_keep_every_law(family, variant):
    assert (family, variant) in ENCODER_DECODER_CASES
    model = tiny(family, variant=variant)
    found = check_map(model, map_of(model), tiny_inputs(model))
    assert found.refused == {}
    assert {COMPONENTS[name].prefix for name in found.components} == {"", "encoder", "decoder", "cross"}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_laws_hold_under_each_attention(attention):
    model = tiny("qwen3", attention=attention)
    assert check_map(model, map_of(model), tiny_inputs(model)).refused == {}
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_laws_hold_in_each_dtype(dtype):
    model = tiny("llama", dtype=dtype)
    assert check_map(model, map_of(model), tiny_inputs(model)).refused == {}


def test_one_example_is_enough(llama):
    assert check_map(llama, map_of(llama), tiny_inputs(llama, batch=1, length=5)).refused == {}


def test_padding_is_no_violation():
    model = tiny("gpt2")
    assert check_map(model, map_of(model), tiny_inputs(model, padding="left")).refused == {}


@pytest.mark.parametrize("head", ["base", "classifier"])
def test_models_with_another_head_or_none_keep_the_laws(head):
    for family in ("gpt2", "bert"):
        model = tiny(family, head=head)
        assert check_map(model, map_of(model), tiny_inputs(model)).refused == {}


# --- maps that are wrong ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exchanged(llama) -> Verification:
    described = map_of(llama)
    key, value = described.sites["key_output"], described.sites["value_output"]
    return check_map(llama, with_sites(described, key_output=value, value_output=key), tiny_inputs(llama))


@pytest.mark.parametrize("at", ["row", "column"])
def test_a_head_changed_at_a_position_that_the_matrix_has_not_tells_that_the_place_is_wrong(at):
    """What lies in another stack may have more positions than the scores have rows or columns."""
    old = torch.randn(1, 4, 5, 5)
    new = old.clone()
    new[:, [0, 2], 3] += 1
    changed = Coded("query_output", "attention_scores", at)
    assert told_of_heads(new, old, changed, [(0, 3), (1, 6)], 4, 1e-4) == (float("inf"), False)


@pytest.mark.parametrize(("change", "right"), [(1e-3, True), (0.0, False)])
def test_a_small_head_is_told_by_a_change_that_is_large_for_it(change, right):
    """A gate may let hardly anything of a head through; one that does not change at all is told all the same."""
    torch.manual_seed(0)
    old = torch.randn(1, 4, 5, 8)
    old[:, 2] *= 1e-6
    new = old.clone()
    new[:, 0, 3] += 1
    new[:, 2, 3] += change * 1e-6
    changed = Coded("head_attention_value_output", "attention_output", "row")
    assert told_of_heads(new, old, changed, [(0, 3)], 4, 1e-4) == (0.0, right)


def test_what_breaks_a_law_is_refused_with_its_views_and_nothing_else(exchanged, right):
    wrong = {"key_output", "value_output", "head_key_output", "head_value_output"}
    # Queries with these keys give no scores that any run has: nothing tells a right query beside a wrong key.
    beside = {"query_output", "head_query_output"}
    assert wrong <= set(exchanged.refused) <= wrong | beside
    assert set(right.components) - wrong - beside <= set(exchanged.components)


def test_the_map_that_comes_back_says_why(exchanged):
    assert exchanged.map.site("head_value_output") is None
    reason = exchanged.map.reason("value_output")
    assert reason == exchanged.refused["value_output"]
    assert reason.startswith("what the map places there breaks the law '")
    assert "in layers 0 to 2" in reason
    assert reason.endswith("register a map that places it with iv.register_map(...), or name its module path")
    assert exchanged.map.site("attention_pattern") is not None


def test_check_raises_and_lists_every_component_that_was_refused(exchanged):
    with pytest.raises(iv.MapError) as raised:
        exchanged.check()
    lines = str(raised.value).splitlines()
    count = len(exchanged.refused)
    assert lines[0] == f"The map of LlamaForCausalLM is wrong about {count} components:"
    assert [line.split(":")[0] for line in lines[1:-1]] == [f"- {name}" for name in exchanged.refused]
    assert lines[-1].startswith("Correct the sites, or register a map")


def test_a_component_that_is_wrong_in_one_layer_stays_in_the_others(llama):
    described = map_of(llama)
    wrong = LayerKind((1,), sites={"mlp_output": Site("self_attn")})
    found = check_map(llama, replace(described, kinds=(wrong,)), tiny_inputs(llama))
    assert "in layer 1:" in found.refused["mlp_output"]
    assert found.map.site("mlp_output", 0) == found.map.site("mlp_output", 2) == Site("mlp")
    assert found.map.site("mlp_output", 1) is None
    assert "breaks the law" in found.map.reason("mlp_output", 1)
    assert not found.passed


def test_a_contribution_that_is_taken_before_the_norm_behind_it_is_refused_and_the_rest_is_not():
    model = tiny("gemma2")
    described = map_of(model)
    found = check_map(
        model, with_sites(described, mlp_contribution=described.sites["mlp_output"]), tiny_inputs(model)
    )
    assert "mlp_contribution" in found.refused
    assert {"attention_contribution", "block_mid", "block_output", "attention_input"} <= set(found.components)


def test_keys_repeated_for_the_heads_of_queries_are_not_those_after_the_rotary_embedding():
    model = tiny("llama", attention="eager")
    described, config = map_of(model), model.config
    heads = AttentionHeads(config.num_attention_heads, config.num_attention_heads, config.head_dim)
    wrong = replace(described.sites["attention_input"], attention=heads)
    assert config.num_key_value_heads < config.num_attention_heads
    found = check_map(model, with_sites(described, attention_input=wrong), tiny_inputs(model))
    assert set(found.refused) == {"rotary_key"}


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_an_output_that_is_taken_behind_the_norm_is_refused(part):
    model = tiny("gemma2")
    described = map_of(model)
    site = {f"{part}_output": described.sites[f"{part}_contribution"]}
    found = check_map(model, with_sites(described, **site), tiny_inputs(model))
    assert f"{part}_output" in found.refused
    assert f"{part}_contribution" in found.components


def test_a_place_that_does_not_exist_is_refused_with_what_is_there(llama):
    described = map_of(llama)
    found = check_map(llama, with_sites(described, mlp_hidden=Site("mlp.down", "input")), tiny_inputs(llama))
    assert "'bound'" in found.refused["mlp_hidden"]
    assert "mlp_hidden" not in found.components
    assert "mlp_output" in found.components


def test_a_parallel_block_that_is_said_to_have_a_middle_is_refused_there():
    model = tiny("gptj")
    found = check_map(model, replace(map_of(model), sequential=True), tiny_inputs(model))
    assert set(found.refused) == {"block_mid"}


class Replaced(nn.Module):
    """A norm of a class of its own."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps


class Centred(Replaced):
    def forward(self, hidden):
        return nn.functional.layer_norm(hidden, hidden.shape[-1:], self.weight, self.bias, self.eps)


class ByTheLargest(Replaced):
    def forward(self, hidden):
        return self.weight * hidden / hidden.abs().amax(-1, keepdim=True) + self.bias


@pytest.mark.parametrize(("norm", "refused"), [(Centred, set()), (ByTheLargest, {"final_norm_scale"})])
def test_a_norm_that_divides_by_something_else_loses_its_scale_alone(norm, refused):
    model = tiny("gpt2")
    model.transformer.ln_f = norm(model.transformer.ln_f)
    found = check_map(model, map_of(model), tiny_inputs(model))
    assert set(found.refused) == refused


def test_what_no_law_tells_is_not_offered(llama):
    described = map_of(llama)
    lonely = replace(described, sites={"mlp_activation": described.sites["mlp_activation"]}, sequential=False)
    found = check_map(llama, lonely, tiny_inputs(llama))
    assert set(found.refused) == {"mlp_activation"}
    assert found.refused["mlp_activation"].startswith("none of the laws that tell it from other places")


# --- what it leaves alone, what it refuses to look at -------------------------------------------------------


def test_nothing_about_the_model_changes(llama):
    inputs = tiny_inputs(llama)
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    ids = inputs["input_ids"].clone()
    hooks = {
        path: (len(part._forward_hooks), len(part._forward_pre_hooks)) for path, part in llama.named_modules()
    }

    check_map(llama, map_of(llama), inputs)

    after = {
        path: (len(part._forward_hooks), len(part._forward_pre_hooks)) for path, part in llama.named_modules()
    }
    assert after == hooks
    assert not llama.training
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in llama.parameters())
    assert torch.equal(inputs["input_ids"], ids)


def test_a_model_with_dropout_on_is_not_looked_at():
    model = tiny("gpt2").train()
    with pytest.raises(iv.MapError) as raised:
        check_map(model, map_of(model), tiny_inputs(model))
    assert str(raised.value) == (
        "GPT2LMHeadModel gave two different results for the same inputs. It is in training mode, in which dropout is"
        " on: call model.eval() first."
    )
    assert model.training


def test_a_name_that_is_no_component_is_refused(llama):
    with pytest.raises(
        iv.UnknownNameError, match=r"Unknown component 'mlp_ouput'. Did you mean 'mlp_output'\?"
    ):
        check_map(llama, map_of(llama), tiny_inputs(llama), components=["mlp_ouput"])


# --- what it tells ----------------------------------------------------------------------------------------


def test_findings_are_numbers_within_their_limits(right):
    assert {finding.law for finding in right.findings} <= set(LAWS)
    for finding in right.findings:
        assert finding.passed
        if finding.law not in ("moves", "once", "bound", "about"):
            assert finding.deviation <= finding.limit
        assert finding.why


def test_each_component_is_told_from_other_places(right):
    told = {"chain", "lookup", "residual", "norm", "logits", "determines", "ends", "heads", "sum", "rows"}
    for name in right.components:
        laws = {finding.law for finding in right.findings if finding.component == name}
        assert laws & told, name


def test_the_table_has_a_row_for_each_component_and_a_column_for_each_law(right, exchanged):
    lines = str(right).splitlines()
    assert lines[0] == f"LlamaForCausalLM: {len(right.components)} components keep every law"
    laws = [law for law in LAWS if any(finding.law == law for finding in right.findings)]
    row = next(line for line in lines if line.startswith("mlp_hidden "))
    marks = row.split()[1:]
    assert len(marks) == len(laws)
    assert marks[laws.index("determines")] == "✓"
    assert marks[laws.index("chain")] == "·"
    assert any(line.startswith("absent router_input") for line in lines)
    assert "✗" in str(exchanged)
    assert f"{len(exchanged.refused)} are refused" in str(exchanged).splitlines()[0]


def test_findings_become_a_table(right):
    frame = right.to_pandas()
    assert len(frame) == len(right.findings)
    assert {"component", "law", "layer", "passed", "deviation", "limit", "why", "compared"} == set(
        frame.columns
    )


def test_components_narrow_what_is_told(llama):
    found = check_map(llama, map_of(llama), tiny_inputs(llama), components=["mlp_hidden", "block_mid"])
    assert found.components == ("block_mid", "mlp_hidden")
    assert {finding.component for finding in found.findings} == {"block_mid", "mlp_hidden"}


def test_of_one_component_is_found_what_is_found_of_it_among_all(llama, right, exchanged):
    """Fewer experiments are made for it, and none is left out that says something of it."""
    own = map_of(llama)
    turned = with_sites(own, key_output=own.site("value_output"), value_output=own.site("key_output"))
    for described, whole in ((own, right), (turned, exchanged)):
        for name in (*whole.components, *whole.refused):
            found = check_map(llama, described, tiny_inputs(llama), components=[name])
            assert _told(found, name) == _told(whole, name)
            assert (name in found.refused) == (name in whole.refused)


def _told(verification, name):
    return {
        (finding.law, finding.layer, finding.passed, finding.why)
        for finding in verification.findings
        if finding.component == name
    }


def test_verify_looks_at_the_models_own_map_or_at_one_that_is_given(llama):
    described = map_of(llama)
    assert iv.verify(llama, example_inputs=tiny_inputs(llama)).passed
    wrong = with_sites(described, mlp_hidden=Site("mlp.up_proj", "input"))
    found = iv.verify(llama, example_inputs=tiny_inputs(llama), model_map=wrong)
    assert "mlp_hidden" in found.refused


def test_deviation_is_of_the_largest_at_the_position():
    expected = torch.tensor([[1.0, 100.0], [2.0, 1.0]])
    found = torch.tensor([[1.0, 100.0], [2.0, 1.5]])
    assert deviation(found, expected) == pytest.approx(0.25)
    assert deviation(found[0], expected) == float("inf")
    masked = torch.tensor([[1.0, -torch.inf]])
    assert deviation(masked, masked) == 0.0
    assert deviation(torch.tensor([[1.0, 0.0]]), masked) == float("inf")
    assert deviation(torch.tensor([[float("nan"), 0.0]]), torch.tensor([[0.0, 0.0]])) == float("inf")


def test_what_has_a_row_for_each_window_is_no_place_of_an_example():
    config = transformers.SwinConfig(
        image_size=64, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    )
    torch.manual_seed(0)
    model = transformers.SwinForImageClassification(config).eval()

    found = iv.verify(model, example_inputs={"pixel_values": torch.randn(2, 3, 64, 64)})

    assert {"block_input", "block_output"} <= {*found.components}
    for name in ("attention_output", "query_output", "head_value_output"):
        assert "rows where the stream has 2 examples" in (found.refused | found.absent)[name]


@pytest.mark.parametrize(
    ("name", "path"),
    [("mlp_output", "feed_forward.receptance"), ("mixer_output", "attention.receptance")],
)
def test_a_gate_is_not_taken_for_what_it_lets_through(name, path):
    made = build("rwkv")
    right = infer_map(made.model, made.inputs)
    wrong = replace(right, sites={**right.sites, name: replace(right.sites[name], path=path)})

    assert name in check_map(made.model, right, made.inputs).components
    reason = check_map(made.model, wrong, made.inputs).refused[name]
    assert "'linear'" in reason
    assert "'only'" in reason


@pytest.mark.parametrize(
    ("model_type", "task", "lost"),
    [
        ("wav2vec2-bert", "ctc", "mixer_output"),  # what its input tells is gone with the input
        ("reformer", "causal-lm", ""),  # its last layer has no output of its own
        ("funnel", "masked-lm", ""),
        ("videoprism", "zero-shot", ""),  # a picture at a time: one position has no others
    ],
)
def test_what_is_left_of_a_map_keeps_all_laws_by_itself(model_type, task, lost):
    made = build(model_type, task)
    inferred = infer_map(made.model, made.inputs)
    assert check_map(made.model, inferred, made.inputs).refused

    found = proved(made.model, inferred, made.inputs)

    assert not lost or lost in found.refused
    assert check_map(made.model, found.map, made.inputs).refused == {}


@pytest.mark.parametrize(
    ("model_type", "task"), [("reformer", "causal-lm"), ("funnel", "masked-lm"), ("wav2vec2-bert", "ctc")]
)
def test_experiments_made_before_tell_what_they_would_if_they_were_made_again(model_type, task):
    made = build(model_type, task)
    inferred = infer_map(made.model, made.inputs)

    last = check_map(made.model, inferred, made.inputs)
    left = frozenset(last.map.for_config(made.model.config).components()) | last.refused.keys()
    while gone := left - frozenset(last.map.components()):
        left -= gone
        asked = of_the_same_parts(gone, left)
        if asked:
            last = check_map(made.model, last.map, made.inputs, components=asked)

    found = proved(made.model, inferred, made.inputs).map
    assert found.components() == last.map.components()
    for name in found.components():
        for layer in range(4):
            assert found.site(name, layer) == last.map.site(name, layer)


def test_cross_attention_that_is_wrong_in_some_layers_has_nothing_there():
    model = tiny("t5")
    described = map_of(model)
    key, value = described.site("cross_key_output", 1), described.site("cross_value_output", 1)
    wrong = LayerKind((1,), "decoder", sites={"cross_key_output": value, "cross_value_output": key})

    found = check_map(model, replace(described, kinds=(wrong,)), tiny_inputs(model)).map

    assert (found.site("cross_key_output", 0), found.site("cross_key_output", 1)) == (key, None)
    assert (found.site("cross_value_output", 0), found.site("cross_value_output", 1)) == (value, None)


def test_a_layer_without_a_pattern_is_not_told_by_what_others_hold_there(llama):
    without = LayerKind((1,), absent=dict.fromkeys(("attention_pattern", "attention_scores"), "not here"))

    found = check_map(llama, replace(map_of(llama), kinds=(without,)), tiny_inputs(llama))

    assert not [
        one for one in found.findings if (one.layer, one.law, one.component) == (1, "only", "query_output")
    ]
    assert {"query_output", "key_output"} <= {*found.components}
