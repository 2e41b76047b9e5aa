"""Interchange in the latents of autoencoders."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

import interventions as iv

law = settings(deadline=None, max_examples=25)


def jump_relu(
    W_enc: Tensor, W_dec: Tensor, threshold: float, b_dec: float = 0.0
) -> iv.JumpReLUAutoencoderIntervention:
    width, latents = W_enc.shape
    return iv.JumpReLUAutoencoderIntervention(
        width,
        latents,
        W_enc=W_enc,
        W_dec=W_dec,
        threshold=torch.full((latents,), threshold),
        b_dec=torch.full((width,), b_dec),
    )


def test_one_latent_and_all_latents_above_their_threshold() -> None:
    swap = jump_relu(torch.eye(2), torch.eye(2), 0.5, 0.1)
    base, source = torch.tensor([0.4, 2.0]), torch.tensor([3.0, 0.2])

    assert_close(swap(base, source, subspaces=0), torch.tensor([3.1, 2.1]))
    assert_close(swap(base, source), torch.tensor([3.1, 0.1]))


def test_without_subspaces_every_latent_is_swapped_however_many_there_are() -> None:
    W_enc = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]])
    W_dec = torch.tensor([[1.0, 0], [0, 1], [10, 0], [0, 10]])

    result = jump_relu(W_enc, W_dec, 0.0)(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 3.0]))

    assert result.tolist() == [22.0, 33.0]


@pytest.mark.parametrize("error", ["drop", "keep"])
@law
@given(data=st.data(), seed=st.integers(0, 100))
def test_the_chosen_latents_are_the_sources_before_decoding(
    error: str, data: st.DataObject, seed: int
) -> None:
    torch.manual_seed(seed)
    width, latents = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 7)))
    ids = data.draw(st.lists(st.integers(0, latents - 1), unique=True))
    plain = iv.AutoencoderIntervention(width, latents, error)  # type: ignore[arg-type]
    jump = iv.JumpReLUAutoencoderIntervention(
        width,
        latents,
        error,  # type: ignore[arg-type]
        W_enc=torch.randn(width, latents),
        b_enc=torch.randn(latents),
        W_dec=torch.randn(latents, width),
        b_dec=torch.randn(width),
        threshold=torch.rand(latents) - 0.3,
    )
    base, source = torch.randn(2, 3, width)

    def plain_decode(a: Tensor) -> Tensor:
        return torch.einsum("...l,dl->...d", a, plain.decoder.weight.detach()) + plain.decoder.bias.detach()

    def jump_decode(a: Tensor) -> Tensor:
        return torch.einsum("...l,ld->...d", a, jump.W_dec) + jump.b_dec

    def plain_encode(x: Tensor) -> Tensor:
        return functional.relu(plain.encoder(x - plain.decoder.bias)).detach()

    def jump_encode(x: Tensor) -> Tensor:
        before = torch.einsum("...d,dl->...l", x, jump.W_enc) + jump.b_enc
        before[before <= jump.threshold] = 0.0
        return before.clamp(min=0.0)

    for swap, encode, decode in ((plain, plain_encode, plain_decode), (jump, jump_encode, jump_decode)):
        own, swapped = encode(base), encode(base)
        swapped[:, ids] = encode(source)[:, ids]
        wanted = decode(swapped)
        if error == "keep":
            wanted = base + wanted - decode(own)
        assert_close(swap(base, source, subspaces=ids).detach(), wanted, atol=1e-5, rtol=1e-4)


def test_the_base_comes_back_with_its_error_kept_and_reconstructed_with_it_dropped() -> None:
    keep = iv.AutoencoderIntervention(4, 3, "keep")
    drop = iv.AutoencoderIntervention(4, 3)
    drop.load_state_dict(keep.state_dict())
    base = torch.randn(5, 4)

    assert torch.equal(keep(base, base), base)
    assert_close(drop(base, base), drop.decoder(drop.encode(base)))
    assert (drop(base, base) - base).norm() > 0.1


def test_a_trained_autoencoder_learns_to_swap_one_factor() -> None:
    torch.manual_seed(0)
    swap = iv.AutoencoderIntervention(2, 8)
    optimizer = torch.optim.Adam(swap.parameters(), lr=0.02)
    base, source = torch.rand(2, 128, 2)
    wanted = torch.stack([source[:, 0], base[:, 1]], dim=1)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (swap(base, source, subspaces=[0, 1, 2, 3]) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.05 * losses[0]


def test_published_weights_load_under_their_published_names_and_are_not_trained() -> None:
    swap = iv.JumpReLUAutoencoderIntervention(3, 5)
    published = {
        "W_enc": torch.randn(3, 5),
        "b_enc": torch.randn(5),
        "threshold": torch.rand(5),
        "W_dec": torch.randn(5, 3),
        "b_dec": torch.randn(3),
    }

    swap.load_state_dict(published)

    assert list(swap.parameters()) == []
    assert all(torch.equal(swap.state_dict()[name], value) for name, value in published.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: iv.JumpReLUAutoencoderIntervention(3, 5, W_enc=torch.zeros(5, 3)),
            "W_enc has shape (5, 3); for embed_dim=3 and low_rank_dimension=5 give (3, 5).",
        ),
        (
            lambda: iv.AutoencoderIntervention(3, 0),
            "latent_dim=0 is out of range; give a whole number from 1 on.",
        ),
        (
            lambda: iv.AutoencoderIntervention(3, 4, "add"),  # type: ignore[arg-type]
            "error='add' is unknown; allowed: 'drop', 'keep'.",
        ),
    ],
)
def test_arguments_that_cannot_work_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(iv.InterventionArgumentError) as caught:
        make()
    assert str(caught.value) == message
