"""Features of a sparse autoencoder as an alignment: a learned mask says which of them are swapped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.errors import ConfigError
from interventions import Intervention, JumpReLUAutoencoderIntervention
from interventions.autoencoders import LatentIntervention
from interventions.precision import without_autocast, working_dtype
from interventions.subspaces import Subspaces
from interventions.temperature import Tempered

TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
"""What an autoencoder has to have."""
LINEAR = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder.bias": "b_dec",
}
"""The same as the weights of linear layers, which are transposed."""
THRESHOLDS = ("threshold", "log_threshold")


class FeatureMaskIntervention(Tempered, Intervention):
    """Swap each feature of an autoencoder by a learned share.

    With features `a = E(x)` and directions `D`, the result is `b + ((a_s - a_b) * m) D` with `m = sigmoid(mask / T)`:
    what the autoencoder cannot express of the base stays. The autoencoder is not trained.

    Features are chosen by a mask as in Mueller et al. (2025), "MIB: A Mechanistic Interpretability Benchmark",
    https://arxiv.org/abs/2504.13151.

    Args:
        autoencoder: Has the features.
        temperature: Where the temperature starts.

    Shape:
        base, source, result: `(..., embed_dim)`.

    Example:
        >>> eye = torch.eye(2)
        >>> swap = FeatureMaskIntervention(JumpReLUAutoencoderIntervention(2, 2, W_enc=eye, W_dec=eye))
        >>> swap.mask.data = torch.tensor([-1.0, 1.0])
        >>> swap(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).detach()
        tensor([1., 4.])
    """

    mask: nn.Parameter
    """`[features]`, before temperature and sigmoid; starts at 0, a share of one half."""

    def __init__(self, autoencoder: LatentIntervention, temperature: float = 0.01) -> None:
        super().__init__(embed_dim=autoencoder.embed_dim)
        self.autoencoder = autoencoder
        for parameter in autoencoder.parameters():
            parameter.requires_grad_(False)
        self.mask = nn.Parameter(torch.zeros(autoencoder.decoder_parts()[0].shape[0]))
        self._start_temperature(temperature, False)

    def mask_weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the share by which each feature is swapped.

        Shape:
            result: `(features,)`, between 0 and 1.
        """
        return torch.sigmoid(self.mask.to(dtype) / self.temperature.to(dtype))

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        """Return the base with each chosen feature moved by its share towards the source's."""
        base, source = self.operands(base, source)
        return self._swap(base, source, self.chosen(subspaces, base, len(self.mask)))

    @without_autocast
    def _swap(self, base: Tensor, source: Tensor, chosen: Tensor | None) -> Tensor:
        dtype = working_dtype(base)
        directions = self.autoencoder.decoder_parts()[0].to(dtype)
        own, other = self.autoencoder.encode(base.to(dtype)), self.autoencoder.encode(source.to(dtype))
        change = (other - own) * self.mask_weights(dtype)
        if chosen is not None:
            change = change * chosen
        return (base.to(dtype) + change @ directions).to(base.dtype)


def read_autoencoder(sae: Any) -> LatentIntervention:
    """The intervention of an autoencoder: one as it is, or tensors by their usual names.

    Args:
        sae: A `JumpReLUAutoencoderIntervention` or `AutoencoderIntervention`; a module or mapping with `W_enc`
            `[width, features]`, `b_enc`, `W_dec` `[features, width]`, `b_dec` and, of JumpReLU ones, `threshold` (or
            `log_threshold`); or a state dict of linear layers `encoder` and `decoder`. Where the configuration of an
            object says `apply_b_dec_to_input`, and for linear layers, the decoder's bias is taken off first.

    Raises:
        ConfigError: something else, a tensor that is missing, or one of another shape.
    """
    if isinstance(sae, LatentIntervention):
        found = sae
    else:
        tensors, centred = _tensors(sae)
        encoder, decoder = tensors["W_enc"], tensors["W_dec"]
        if encoder.dim() != 2 or decoder.shape != encoder.mT.shape:
            raise ConfigError(
                f"The autoencoder has W_enc of shape {tuple(encoder.shape)} and W_dec of {tuple(decoder.shape)}. They"
                " are [width, features] and [features, width]."
            )
        if centred:
            tensors["b_enc"] = tensors["b_enc"] - tensors["b_dec"] @ encoder
        width, features = encoder.shape
        found = JumpReLUAutoencoderIntervention(width, features, "keep", **tensors)  # type: ignore[arg-type]  # tensors
    return found


def _tensors(sae: Any) -> tuple[dict[str, Tensor], bool]:
    """The tensors of an autoencoder, and whether the decoder's bias is taken off before encoding."""
    state: dict[str, Any] = dict(sae) if isinstance(sae, Mapping) else {}
    if not state:
        state = {name: getattr(sae, name) for name in (*TENSORS, *THRESHOLDS) if hasattr(sae, name)}
    if not state and isinstance(sae, nn.Module):
        state = dict(sae.state_dict())
    linear = "encoder.weight" in state
    if linear:
        state = {
            LINEAR.get(name, name): value.mT if value.dim() == 2 else value for name, value in state.items()
        }
    missing = [name for name in TENSORS if not isinstance(state.get(name), Tensor)]
    if missing:
        raise ConfigError(
            f"sae is a {type(sae).__name__} without {', '.join(missing)}. Give an autoencoder's module or state with"
            f" {', '.join(TENSORS)} and, if it has one, threshold; or a JumpReLUAutoencoderIntervention."
        )
    found = {name: state[name].detach().float().cpu() for name in TENSORS}
    if isinstance(state.get("threshold"), Tensor):
        found["threshold"] = state["threshold"].detach().float().cpu()
    elif isinstance(state.get("log_threshold"), Tensor):
        found["threshold"] = state["log_threshold"].detach().float().exp().cpu()
    config = getattr(sae, "cfg", getattr(sae, "config", None))
    return found, linear or bool(getattr(config, "apply_b_dec_to_input", False))


def active_part(autoencoder: LatentIntervention, activations: Tensor) -> LatentIntervention:
    """The features that are not the same everywhere; the others could not be told from each other by any training.

    Of an autoencoder of another class than `JumpReLUAutoencoderIntervention` all are left.

    Shape:
        activations: `(examples, width)`.
    """
    if not isinstance(autoencoder, JumpReLUAutoencoderIntervention):
        return autoencoder
    with torch.no_grad():
        features = autoencoder.encode(activations.to(autoencoder.W_enc))
        there = (features != features[:1]).any(0).nonzero().flatten()
    if not len(there):
        raise ConfigError("No feature of the autoencoder tells the examples apart: is it for this layer?")
    return JumpReLUAutoencoderIntervention(
        autoencoder.W_enc.shape[0],
        len(there),
        error="keep",
        W_enc=autoencoder.W_enc[:, there],
        b_enc=autoencoder.b_enc[there],
        threshold=autoencoder.threshold[there],
        W_dec=autoencoder.W_dec[there],
        b_dec=autoencoder.b_dec,
    )
