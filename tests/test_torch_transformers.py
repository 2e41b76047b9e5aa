"""Models of torch's own transformer layers, and transformers that people write by hand."""

from __future__ import annotations

import pytest
import torch
from declared import hooks_of
from torch import Tensor, nn

import intervenable as iv
from intervenable.map_view import model_map

WIDTH, HEADS, MLP = 12, 3, 20
LAYER = 1


def spread(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.4)
    return model.eval()


def encoder(batch_first: bool, norm_first: bool = False, **options) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, MLP, batch_first=batch_first, norm_first=norm_first)
    return spread(nn.TransformerEncoder(layer, 3, **{"enable_nested_tensor": False, **options}))


def two_inputs(batch_first: bool) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 7, WIDTH) if batch_first else (7, 2, WIDTH)
    return [{"src": torch.randn(shape, generator=generator)} for _ in range(2)]


def swapped_by_hand(model, module, base, source, at, side):
    """The model's output with the source's value at one index of what goes into a module or comes out of it."""
    seen = []

    def put(value: Tensor) -> Tensor | None:
        if not seen:
            seen.append(value.clone())
            return None
        new = value.clone()
        new[at] = seen[0][at]
        return new

    def before(_, args):
        new = put(args[0])
        return None if new is None else (new, *args[1:])

    def after(_, args, output):
        return put(output)

    hook = (
        module.register_forward_pre_hook(before) if side == "input" else module.register_forward_hook(after)
    )
    model(**source)
    result = model(**base)
    hook.remove()
    return result


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_positions_of_a_torch_encoder_are_positions_whichever_axis_comes_first(batch_first, norm_first):
    model = encoder(batch_first, norm_first)
    base, source = two_inputs(batch_first)
    view = model_map(model, example_inputs=base)
    layer = model.layers[LAYER]
    places = {
        "block_output": (layer, "output"),
        "block_input": (layer, "input"),
        "mlp_hidden": (layer.linear2, "input"),
        "mlp_output": (layer.linear2, "output"),
    }
    assert set(places) <= set(view.components)
    at = (slice(None), 3) if batch_first else (3,)
    with torch.no_grad():
        for component, (module, side) in places.items():
            declared = iv.IntervenableModel([iv.RepresentationConfig(LAYER, component, "pos")], model)
            found = declared(base, [source], {"sources->base": 3}).intervened
            assert torch.equal(found, swapped_by_hand(model, module, base, source, at, side)), component
            kept = iv.collect(model, base, component)[component, LAYER]
            assert kept.shape[:2] == (2, 7), component
    assert hooks_of(model) == {}


def test_a_module_that_torchs_layers_do_not_call_is_not_passed_over_in_silence():
    model = encoder(batch_first=True)
    base, source = two_inputs(batch_first=True)
    path = "layers[1].self_attn.out_proj.output"
    for intervention, given in ((iv.ZeroIntervention, None), (iv.VanillaIntervention, [source])):
        entry = iv.RepresentationConfig(None, path, "pos", intervention_type=intervention)
        declared = iv.IntervenableModel([entry], model)
        with pytest.raises(iv.NotFiredError, match="out_proj"), torch.no_grad():
            declared(base, given)
    with pytest.raises(iv.NotFiredError, match="out_proj"):
        iv.collect(model, base, path)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_with_the_switch_that_avoids_them():
    model = spread(
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, 2, MLP, batch_first=True), 2, enable_nested_tensor=True
        )
    )
    base, source = two_inputs(batch_first=True)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 5:] = True
    padded = [{**inputs, "src_key_padding_mask": mask} for inputs in (base, source)]
    declared = iv.IntervenableModel([iv.RepresentationConfig(None, "layers[1].output", "pos")], model)
    with torch.no_grad(), pytest.raises(iv.UnsupportedModelError, match="Set use_nested_tensor = False"):
        declared(padded[0], [padded[1]])
    assert hooks_of(model) == {}
    model.use_nested_tensor = False
    with torch.no_grad():
        assert declared(padded[0], [padded[1]]).intervened.shape == base["src"].shape


# --- written by hand --------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            part.view(batch, length, HEADS, width // HEADS).transpose(1, 2)
            for part in self.c_attn(x).split(width, 2)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, MLP), nn.GELU(), nn.Linear(MLP, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Mini(nn.Module):
    """A decoder in the way that people write one first."""

    def __init__(self, layers: int = 3, shared: bool = False) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(40, WIDTH), nn.Embedding(16, WIDTH)
        one = Block()
        self.h = nn.ModuleList([one if shared else Block() for _ in range(layers)])
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def ids(seed: int) -> dict[str, Tensor]:
    return {"idx": torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(seed))}


EXPECTED = {
    "query_output": ("attn.c_attn", slice(0, 12)),
    "key_output": ("attn.c_attn", slice(12, 24)),
    "value_output": ("attn.c_attn", slice(24, 36)),
    "attention_output": ("attn", slice(None)),
    "mlp_activation": ("mlp.1", slice(None)),
    "mlp_output": ("mlp", slice(None)),
    "block_output": ("", slice(None)),
}


@pytest.mark.parametrize("layers", [1, 3])
def test_a_transformer_written_by_hand_is_swapped_as_by_hooks_on_it(layers):
    model = spread(Mini(layers))
    base, source = ids(0), ids(1)
    view = model_map(model, example_inputs=base)
    assert set(EXPECTED) <= set(view.components)
    assert {"attention_pattern", "attention_scores", "block_mid"} <= set(view.components)
    last = layers - 1
    with torch.no_grad():
        for component, (path, columns) in EXPECTED.items():
            module = model.h[last].get_submodule(path)
            at = (slice(None), 3, columns)
            entry = iv.RepresentationConfig(last, component, "pos")
            declared = iv.IntervenableModel([entry], model)
            found = declared(base, [source], {"sources->base": 3}).intervened
            assert torch.equal(found, swapped_by_hand(model, module, base, source, at, "output")), component
            assert not torch.equal(found, model(**base)), component
