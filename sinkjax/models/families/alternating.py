"""What the families with alternating layers share: which of them have the sliding window."""

from typing import Any

from sinkjax.models.families.common import Values, own_values, whole, window_by_layer, windows


def _local(layers: int, period: int) -> tuple[bool, ...]:
    if period < 1:
        raise ValueError(f"sliding_window_pattern must be ≥ 1, got {period}")
    return tuple((layer + 1) % period != 0 for layer in range(layers))


def alternating(hf: Values, period: int) -> dict[str, Any]:
    """`sliding_window` and `local_layers` from config.json: where it does not list the layers,
    the last one of each `period` attends to everything."""
    if hf.get("layer_types"):
        return window_by_layer(hf)
    return windows(hf, _local(whole(hf, "num_hidden_layers"), period))


def alternating_from_gguf(
    metadata: Values, period: int, window: int | None = None
) -> dict[str, Any]:
    """As `alternating`, from the metadata of a GGUF file. Few give the pattern, and not all the
    window."""
    own = own_values(metadata)
    key = "attention.sliding_window_pattern"
    if isinstance(own.get(key), list):
        local = tuple(map(bool, own[key]))
    else:
        local = _local(whole(own, "block_count"), whole(own, key, period))
    # 0 where there is none.
    return windows({"sliding_window": own.get("attention.sliding_window", window) or None}, local)
