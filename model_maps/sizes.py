"""The sizes of a model, read from its config: the only place that knows how configs name them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from model_maps.sites import HeadColumns, Site, Width


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a model; None where its config has no such thing or does not say.

    Example:
        >>> Sizes(hidden=16, query_heads=4, key_value_heads=2, head_dim=6).width("query")
        24
    """

    hidden: int | None = None
    """Width of the residual stream, `D`."""

    layers: int | None = None
    """Number of blocks, `L`."""

    query_heads: int | None = None
    """Query heads of an attention, `H`."""

    key_value_heads: int | None = None
    """Key-value heads of an attention, `K`; equal to `H` without grouping, 1 where all queries share one."""

    head_dim: int | None = None
    """Width of one head, `dh`; None where queries and values differ in width."""

    mlp: int | None = None
    """Width of the MLP's nonlinearity, `M`; of one expert in a mixture."""

    vocabulary: int | None = None
    """Tokens in the vocabulary, `V`."""

    experts: int | None = None
    """Experts of a mixture, `E`."""

    embedding: int | None = None
    """Width of the token embedding, which a few models project to the residual stream."""

    def width(self, name: Width) -> int | None:
        """The number behind a width of a `Site`, or None if it is not known.

        Example:
            >>> Sizes(key_value_heads=2, head_dim=6).width("key_value")
            12
        """
        match name:
            case "query":
                return _product(self.query_heads, self.head_dim)
            case "key_value":
                return _product(self.key_value_heads, self.head_dim)
            case "any":
                return None
        sizes: dict[str, int | None] = {
            "hidden": self.hidden,
            "mlp": self.mlp,
            "vocabulary": self.vocabulary,
            "experts": self.experts,
            "embedding": self.embedding,
        }
        return sizes[name]


HIDDEN = ("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "model_dim")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
QUERY_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads", "multi_query_group_num")
HEAD_DIM = ("head_dim", "d_kv", "d_head", "kv_channels", "attention_head_size", "attention_head_dim")
MLP = (
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "ffn_hidden_size",
    "d_ff",
    "dff",
    "dim_ff",
    "hidden_dim",
    "d_inner",
    "moe_intermediate_size",
)
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EMBEDDING = ("embedding_size", "word_embed_proj_dim", "input_embedding_size")

FOUR_TIMES_HIDDEN = ("bloom", "openai-gpt", "xlm")
"""Model types whose config says nothing of the MLP, which is four times as wide as the residual stream."""


def sizes_of(config: object | None) -> Sizes:
    """The sizes that a Hugging Face config gives, whatever it calls them.

    Of a config with several towers the text tower's are read. What the config lacks is None; nothing raises.

    Example:
        >>> from types import SimpleNamespace
        >>> sizes = sizes_of(SimpleNamespace(n_embd=16, n_head=4, n_layer=2, n_inner=None, vocab_size=99))
        >>> sizes.hidden, sizes.key_value_heads, sizes.head_dim, sizes.mlp, sizes.experts
        (16, 4, 4, 64, None)
    """
    config = _text_tower(config)
    if config is None:
        return Sizes()
    hidden = _first(config, HIDDEN)
    query_heads = _first(config, QUERY_HEADS)
    return Sizes(
        hidden=hidden,
        layers=_first(config, LAYERS),
        query_heads=query_heads,
        key_value_heads=_key_value_heads(config, query_heads),
        head_dim=_head_dim(config, hidden, query_heads),
        mlp=_mlp(config, hidden),
        vocabulary=_first(config, ("vocab_size",)),
        experts=_first(config, EXPERTS),
        embedding=_first(config, EMBEDDING) or hidden,
    )


def columns_of(site: Site, sizes: Sizes, *, width: int | None = None) -> HeadColumns | None:
    """Where the heads of a site lie in the last axis of its tensor; None if no heads lie there.

    Columns that the site states win. Else they follow from its `heads`, `part` and `layout` and the sizes.
    All heads of a part of a fused projection, side by side, are that part.

    Args:
        site: The place whose tensor is to be cut.
        sizes: The sizes of the model.
        width: Size of the live tensor's last axis, if known; then it decides how wide a head is.

    Raises:
        ValueError: `width` is not a whole number of heads.

    Example:
        >>> sizes = Sizes(query_heads=4, key_value_heads=2, head_dim=6)
        >>> key = Site("qkv_proj", width="key_value", heads="key_value", part="key")
        >>> columns = columns_of(key, sizes)
        >>> columns.first_column(0), columns.first_column(1)  # after the 24 columns of the queries
        (24, 30)
    """
    if site.columns is not None:
        return site.columns
    if site.heads is None and site.part is None:
        return None
    query_heads, key_value_heads = sizes.query_heads, sizes.key_value_heads
    if site.part is None:
        heads = query_heads if site.heads == "query" else key_value_heads
        if heads is None:
            return None
        head_dim = _width_of_a_head(site, heads, width) or sizes.head_dim
        return None if head_dim is None else HeadColumns(heads, head_dim)

    if query_heads is None or key_value_heads is None:
        return None
    head_dim = _width_of_a_head(site, query_heads + 2 * key_value_heads, width) or sizes.head_dim
    if head_dim is None:
        return None
    if site.layout == "concatenated":
        start = {"query": 0, "key": query_heads, "value": query_heads + key_value_heads}[site.part]
        heads = query_heads if site.part == "query" else key_value_heads
        return HeadColumns(heads, head_dim, start=start * head_dim)
    group = query_heads // key_value_heads
    stride = (group + 2) * head_dim
    if site.part == "query":
        return HeadColumns(query_heads, head_dim, per_group=group, group_stride=stride)
    start = (group if site.part == "key" else group + 1) * head_dim
    return HeadColumns(key_value_heads, head_dim, start=start, group_stride=stride)


def _text_tower(config: object | None) -> object | None:
    """The config of the text tower, which is the config itself where there is only one."""
    get = getattr(config, "get_text_config", None)
    if callable(get):
        try:
            tower: object = get()
        except ValueError:  # more than one tower reads text
            return config
        return tower
    return getattr(config, "text_config", None) or config


def _first(config: object, names: Iterable[str]) -> int | None:
    """The first of these fields that holds a number."""
    return next((value for name in names if (value := _number(_field(config, name))) is not None), None)


def _field(config: object, name: str) -> object | None:
    """The value of a field, None if there is none."""
    try:
        value: object = getattr(config, name, None)
    except (RuntimeError, ValueError):
        # Some configs refuse to answer for a field that differs from layer to layer.
        return None
    return value


def _number(value: object) -> int | None:
    """A number as it is, a list with one number for each layer if they agree, else None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0:
        return _number(value[0]) if all(item == value[0] for item in value) else None
    return None


def _key_value_heads(config: object, query_heads: int | None) -> int | None:
    stated = _first(config, KEY_VALUE_HEADS) or _first(
        _field(config, "attn_config") or config, KEY_VALUE_HEADS
    )
    grouped = _field(config, "new_decoder_architecture")
    multi_query = _field(config, "multi_query")
    if grouped is None and multi_query is None:
        return stated or query_heads
    if grouped:
        return stated or query_heads
    # Falcon's older blocks and GPT-BigCode: one key-value head, or one for each query head.
    return 1 if multi_query else query_heads


def _head_dim(config: object, hidden: int | None, query_heads: int | None) -> int | None:
    if _number(_field(config, "qk_nope_head_dim")) is not None:
        return None  # latent attention: queries and values differ in width, and `head_dim` is the rotary part
    stated = _first(config, HEAD_DIM)
    if stated is not None:
        return stated
    return hidden // query_heads if hidden and query_heads else None


def _mlp(config: object, hidden: int | None) -> int | None:
    stated = _first(config, MLP)
    if stated is not None:
        return stated
    left_open = any(hasattr(config, name) for name in ("n_inner", "intermediate_size", "ffn_hidden_size"))
    if left_open or _field(config, "model_type") in FOUR_TIMES_HIDDEN:
        return _product(4, hidden)
    return _product(_number(_field(config, "expansion_ratio")), hidden)


def _product(left: int | None, right: int | None) -> int | None:
    return None if left is None or right is None else left * right


def _width_of_a_head(site: Site, heads: int, width: int | None) -> int | None:
    if width is None:
        return None
    if width % heads:
        raise ValueError(
            f"The tensor at {site.path!r} has {width} columns, which {heads} heads cannot share equally."
            "\nGive the site explicit columns, or correct its heads, part or layout."
        )
    return width // heads
