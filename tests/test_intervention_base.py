"""What every intervention promises, built in or written by a user."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from built_in_interventions import BUILT_INS, COORDINATEWISE, SWAPS, is_trainable, moved_off_start
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import interventions as iv
from interventions import Intervention
from interventions.base import Json

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
law = settings(deadline=None, max_examples=25)
every_built_in = pytest.mark.parametrize("name", BUILT_INS)

shapes = st.lists(st.integers(1, 4), min_size=0, max_size=3).flatmap(
    lambda leading: st.integers(1, 6).map(lambda width: (*leading, width))
)


@every_built_in
@law
@given(shape=shapes, dtype=st.sampled_from(DTYPES))
def test_a_call_returns_a_new_tensor_like_the_base_and_touches_neither_operand(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    intervention = BUILT_INS[name](shape[-1])
    base, source = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    base_before, source_before = base.clone(), source.clone()

    result = intervention(base, source)

    assert (result.shape, result.dtype, result.device) == (base.shape, base.dtype, base.device)
    with torch.no_grad():
        result.detach().fill_(7.0)
    assert torch.equal(base, base_before)
    assert torch.equal(source, source_before)


@pytest.mark.parametrize("name", SWAPS)
@law
@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))
def test_a_swap_of_the_base_with_itself_is_the_base_bit_for_bit(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    intervention = moved_off_start(BUILT_INS[name](shape[-1]))
    base = (100 * torch.randn(shape)).to(dtype)

    assert torch.equal(intervention(base, base.clone()), base)
    assert torch.equal(intervention(base, base.clone(), subspaces=0), base)


@pytest.mark.parametrize("name", SWAPS)
def test_a_swap_leaves_the_base_bit_for_bit_where_one_source_serves_many_units(name: str) -> None:
    intervention = moved_off_start(BUILT_INS[name](24))
    vector = torch.randn(24)
    base = vector.expand(3, 50, 24).clone()

    assert torch.equal(intervention(base, vector), base)


@pytest.mark.parametrize("name", COORDINATEWISE)
@law
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_what_is_not_chosen_stays_bit_for_bit(name: str, data: st.DataObject, dtype: torch.dtype) -> None:
    shape = data.draw(shapes)
    ids = data.draw(st.lists(st.integers(0, shape[-1] - 1), unique=True))
    intervention = BUILT_INS[name](shape[-1])
    base, source = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    others = [dim for dim in range(shape[-1]) if dim not in ids]

    everywhere, result = intervention(base, source), intervention(base, source, subspaces=ids)

    assert torch.equal(result[..., others], base[..., others])
    assert torch.equal(result[..., ids], everywhere[..., ids])


@pytest.mark.parametrize("name", [name for name in BUILT_INS if name not in ("Noise", "Callable", "Collect")])
@law
@given(data=st.data())
def test_ids_for_each_example_do_to_each_what_the_same_ids_do_to_it_alone(
    name: str, data: st.DataObject
) -> None:
    batch, units, width = data.draw(st.tuples(st.integers(2, 3), st.integers(1, 3), st.integers(2, 5)))
    intervention = BUILT_INS[name](width).eval()
    size = intervention.subspace_size or width
    ids = [data.draw(st.lists(st.integers(0, size - 1), unique=True)) for _ in range(batch)]
    base, source = torch.randn(2, batch, units, width)

    together = intervention(base, source, subspaces=ids)

    alone = [intervention(base[i : i + 1], source[i : i + 1], subspaces=ids[i]) for i in range(batch)]
    assert_close(together, torch.cat(alone))


@pytest.mark.parametrize(
    "name", [name for name in BUILT_INS if name != "Noise"]
)  # its noise is new in each call
def test_gradients_agree_with_finite_differences(name: str) -> None:
    torch.manual_seed(5)
    intervention = moved_off_start(BUILT_INS[name](3).double())
    if isinstance(intervention, iv.SigmoidMaskIntervention):
        intervention.set_temperature(0.5)
    base, source = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    parameters = dict(intervention.named_parameters())

    def run(base: Tensor, source: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(
            intervention, dict(zip(parameters, values, strict=True)), (base, source)
        )
        return result

    given_parameters = [value.detach().clone().requires_grad_() for value in parameters.values()]
    assert torch.autograd.gradcheck(run, (base, source, *given_parameters))


@every_built_in
def test_a_copy_made_from_config_and_state_dict_gives_the_same_bits(name: str) -> None:
    original = moved_off_start(BUILT_INS[name](4)).eval()
    config = json.loads(json.dumps(original.to_config()))
    base, source = torch.randn(2, 2, 3, 4)

    loaded = type(original)(**config).eval()
    loaded.load_state_dict(original.state_dict())

    assert loaded.to_config() == original.to_config()
    assert is_trainable(loaded) == is_trainable(original)
    fresh = copy.deepcopy(original)
    assert torch.equal(loaded(base, source), fresh(base, source))


@pytest.mark.parametrize(
    "name", [name for name in BUILT_INS if BUILT_INS[name](4).needs_source and "of any width" not in name]
)
def test_a_constant_source_is_used_saved_and_overruled_by_a_call(name: str) -> None:
    original, constant = BUILT_INS[name](4), torch.randn(4)
    base = torch.randn(2, 3, 4)
    wanted = original(base, constant.expand(2, 3, 4))

    original.set_source_representation(constant)
    loaded = type(original)(**json.loads(json.dumps(original.to_config())))
    loaded.load_state_dict(original.state_dict())

    assert_close(original(base), wanted)
    assert torch.equal(loaded(base), original(base))
    assert torch.equal(original(base, 2 * constant), loaded(base, 2 * constant))
    assert not torch.equal(original(base, 2 * constant), original(base))


def test_a_constant_source_is_a_copy_that_does_not_follow_the_users_tensor() -> None:
    constant = torch.ones(2)
    intervention = iv.AdditionIntervention(source_representation=constant)
    constant.fill_(9.0)

    assert intervention(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_a_state_dict_brings_a_constant_source_of_a_shape_nobody_announced() -> None:
    saved = iv.VanillaIntervention(source_representation=torch.randn(3, 4)).state_dict()
    intervention = iv.VanillaIntervention()

    intervention.load_state_dict(saved)

    assert torch.equal(intervention(torch.zeros(3, 4)), saved["source_representation"])


def test_a_parameter_as_constant_source_is_trained() -> None:
    steer = iv.AdditionIntervention(source_representation=nn.Parameter(torch.zeros(3)))
    wanted = torch.tensor([1.0, -2.0, 3.0])
    optimizer = torch.optim.SGD(steer.parameters(), lr=0.5)
    for _ in range(50):
        optimizer.zero_grad()
        (steer(torch.zeros(3)) - wanted).square().sum().mul(0.5).backward()
        optimizer.step()

    assert_close(steer(torch.zeros(3)).detach(), wanted)
    reloaded = type(steer)(**steer.to_config())  # type: ignore[arg-type]
    assert is_trainable(reloaded)


def test_a_constant_source_whose_gradients_would_be_lost_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Wrap it in nn\.Parameter to train it, or detach"):
        iv.AdditionIntervention(source_representation=torch.ones(2, requires_grad=True))


@pytest.mark.parametrize("kind", [iv.ZeroIntervention, iv.CollectIntervention])
def test_a_constant_source_for_a_formula_without_one_is_refused(kind: type[Intervention]) -> None:
    with pytest.raises(iv.UnusedSourceError) as caught:
        kind(source_representation=torch.ones(2))
    assert str(caught.value) == (
        f"{kind.__name__} uses no source, so source_representation would be ignored. Leave it out."
    )


@pytest.mark.parametrize("name", [name for name in BUILT_INS if BUILT_INS[name](4).needs_source])
def test_a_needed_source_that_is_missing_is_an_error(name: str) -> None:
    intervention = BUILT_INS[name](4)
    for call in (intervention, intervention.forward):
        with pytest.raises(iv.MissingSourceError) as caught:
            call(torch.randn(2, 4))
        assert str(caught.value) == (
            f"{type(intervention).__name__} needs a source: give one to the call, or a source_representation when"
            f" making it."
        )


@pytest.mark.parametrize(
    "name", [name for name in BUILT_INS if not BUILT_INS[name](4).needs_source and name != "Callable"]
)
def test_what_needs_no_source_does_the_same_with_and_without_one(name: str) -> None:
    intervention, base = BUILT_INS[name](4), torch.randn(2, 4)
    twin = copy.deepcopy(intervention)

    assert torch.equal(intervention(base), twin(base, torch.randn(2, 4)))


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 1, 4), (1, 1, 1, 4), (3, 4), (2, 1, 4)])
def test_a_source_broadcasts_to_the_base(shape: tuple[int, ...]) -> None:
    base, source = torch.randn(2, 3, 4), torch.randn(shape)
    wanted = source.reshape(shape[-3:]).expand(2, 3, 4)

    assert torch.equal(iv.VanillaIntervention()(base, source), wanted)


def test_a_source_in_another_dtype_is_taken_in_that_of_the_base() -> None:
    base, source = torch.zeros(2, 4, dtype=torch.bfloat16), torch.randn(2, 4, dtype=torch.float64)

    assert torch.equal(iv.VanillaIntervention()(base, source), source.bfloat16())


def test_a_source_that_does_not_fit_is_an_error_with_both_shapes() -> None:
    with pytest.raises(iv.InterventionShapeError) as caught:
        iv.VanillaIntervention()(torch.zeros(2, 3, 4), torch.zeros(5, 4))
    assert str(caught.value) == (
        "VanillaIntervention: a source of shape (5, 4) does not broadcast to a base of shape (2, 3, 4)."
        " Give each example and unit its source, or one source for all."
    )


def test_an_activation_of_another_width_is_an_error_with_both_widths() -> None:
    with pytest.raises(iv.InterventionShapeError) as caught:
        iv.RotatedSpaceIntervention(4)(torch.zeros(2, 6), torch.zeros(2, 6))
    assert str(caught.value) == (
        "RotatedSpaceIntervention was made for embed_dim=4, but the activation is 6 wide (shape (2, 6))."
    )


@pytest.mark.parametrize("name", [name for name in BUILT_INS if is_trainable(BUILT_INS[name](8))])
def test_autocast_does_not_lower_the_precision(name: str) -> None:
    intervention = moved_off_start(BUILT_INS[name](8)).eval()
    base, source = torch.randn(2, 5, 8)
    wanted = intervention(base, source)

    with torch.autocast("cpu", torch.bfloat16):
        result = intervention(base, source)

    assert torch.equal(result, wanted)


@pytest.mark.parametrize("name", SWAPS)
def test_bfloat16_is_computed_in_float32_and_rounded_once(name: str) -> None:
    intervention = moved_off_start(BUILT_INS[name](16))
    base, source = torch.randn(2, 5, 16).bfloat16()

    result = intervention(base, source)

    assert torch.equal(result, intervention(base.float(), source.float()).bfloat16())


def test_a_user_writes_forward_and_nothing_else() -> None:
    class Halfway(Intervention):
        def forward(self, base: Tensor, source: Tensor | None = None, subspaces: object = None) -> Tensor:
            assert source is not None
            return (base + source) / 2

    halfway = Halfway(embed_dim=2, source_representation=torch.ones(2))

    assert Halfway()(torch.zeros(2), torch.ones(2)).tolist() == [0.5, 0.5]
    assert halfway(torch.zeros(2)).tolist() == [0.5, 0.5]
    assert (Halfway.needs_source, halfway.accepts_source, halfway.sees, Halfway.collects) == (
        True,
        True,
        "per_unit",
        False,
    )


def test_a_forward_without_source_needs_none_and_one_without_subspaces_refuses_them() -> None:
    class Negate(Intervention):
        def forward(self, base: Tensor) -> Tensor:  # type: ignore[override]
            return -base

    assert not Negate.needs_source
    assert Negate()(torch.ones(2)).tolist() == [-1.0, -1.0]
    for fails in (lambda: Negate()(torch.ones(2), subspaces=[0]), lambda: Negate().check_subspaces([0])):
        with pytest.raises(iv.SubspaceError, match=r"Negate\.forward takes no subspaces"):
            fails()


def test_subspaces_and_extra_arguments_reach_a_users_forward_by_name() -> None:
    seen: dict[str, object] = {}

    class Spy(Intervention):
        def forward(self, base: Tensor, *, subspaces: object = None, strength: float = 1.0) -> Tensor:  # type: ignore[override]
            seen.update(subspaces=subspaces, strength=strength)
            return strength * base

    assert Spy()(torch.ones(1), torch.zeros(1), [3], strength=2.0).tolist() == [2.0]
    assert seen == {"subspaces": [3], "strength": 2.0}


def test_a_pyvene_style_constructor_works_and_is_saved() -> None:
    class Doubling(Intervention):
        def __init__(self, strength: float = 2.0, **kwargs: Json) -> None:
            super().__init__(**kwargs)  # type: ignore[arg-type]
            self.strength = strength

        def forward(
            self, base: Tensor, source: Tensor | None = None, subspaces: object = None, **kwargs: object
        ) -> Tensor:
            return self.strength * base

    doubling = Doubling(strength=3.0, embed_dim=4, subspace_partition=[[0, 2], [2, 4]])

    config = doubling.to_config()
    assert config == {"strength": 3.0, "embed_dim": 4, "subspace_partition": [[0, 2], [2, 4]]}
    assert Doubling(**config).subspace_partition == ((0, 1), (2, 3))  # type: ignore[arg-type]


def test_a_constructor_argument_that_is_not_kept_cannot_be_saved() -> None:
    class Forgetful(Intervention):
        def __init__(self, strength: float) -> None:
            super().__init__()

    with pytest.raises(iv.InterventionError) as caught:
        Forgetful(2.0).to_config()
    assert str(caught.value) == (
        "Forgetful does not keep its constructor argument 'strength'. Keep it as self.strength, or override"
        " to_config()."
    )


def test_forward_hooks_and_apply_work_as_on_any_module() -> None:
    intervention, calls = iv.VanillaIntervention(), []
    intervention.register_forward_hook(lambda *_: calls.append(1))

    intervention(torch.zeros(2), torch.ones(2))
    intervention.apply(lambda module: calls.append(2))

    assert calls == [1, 2]


def test_its_repr_shows_what_it_was_made_with() -> None:
    assert repr(iv.VanillaIntervention()) == "VanillaIntervention()"
    assert repr(iv.ScaleIntervention(2.0, embed_dim=3, sees="raw")) == (
        "ScaleIntervention(factor=2.0, embed_dim=3, sees='raw')"
    )
    assert repr(iv.LowRankRotatedSpaceIntervention(4, 2)).startswith(
        "LowRankRotatedSpaceIntervention(\n  embed_dim=4, low_rank_dimension=2\n"
    )


@pytest.mark.parametrize("embed_dim", [0, -1, 2.5, True])
def test_a_width_that_is_no_count_is_refused(embed_dim: object) -> None:
    with pytest.raises(iv.InterventionArgumentError, match=f"embed_dim={embed_dim} is out of range"):
        iv.VanillaIntervention(embed_dim=embed_dim)  # type: ignore[arg-type]


def test_sees_can_be_chosen_for_each_instance() -> None:
    assert iv.RotatedSpaceIntervention(4).sees == "concatenated"
    assert iv.RotatedSpaceIntervention(4, sees="per_unit").sees == "per_unit"
    assert iv.RotatedSpaceIntervention(4, sees="per_unit").to_config()["sees"] == "per_unit"
    with pytest.raises(ValueError, match=r"sees='units' is unknown; allowed: per_unit, concatenated, raw"):
        iv.VanillaIntervention(sees="units")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BUILT_INS)
def test_only_what_learns_has_parameters(name: str) -> None:
    learns = ("Rotated", "SigmoidMask", "Autoencoder", "reft")
    fixed = ("PCA", "JumpReLU")
    expected = any(word in name for word in learns) and not any(word in name for word in fixed)

    assert is_trainable(BUILT_INS[name](4)) == expected
