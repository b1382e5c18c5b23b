"""Attention over packed documents: several documents in one row of tokens, none of which sees another.

Registered with transformers under `ROSE_ATTENTION`; a forward pass gets `document_lengths`. No mask is ever built. What
this cannot do (attention sinks, soft caps) is refused with NotImplementedError, and the run goes on unpacked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ROSE_ATTENTION = "rose_packed"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    document_lengths: tuple[int, ...] | None = None,
    document_borders: torch.Tensor | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally within each document.

    Shapes: query [1, heads, T, D], key and value [1, key heads, T, D], result [1, T, heads, D]. `document_lengths`
    sums to T and `document_borders` (int32, on the device) is 0 and its running sums; without them the row is one
    document.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if other.get(name) is not None:
            raise NotImplementedError(f"packed attention has no {name}")
    if attention_mask is not None or query.shape[0] != 1:
        raise NotImplementedError("packed attention takes one row of tokens and no mask")
    lengths = document_lengths or (query.shape[2],)
    varlen = _varlen()
    half = query.dtype in (torch.bfloat16, torch.float16)
    fits = query.is_cuda and half and not dropout and query.shape[-1] == value.shape[-1] <= 256
    if varlen is not None and fits and document_borders is not None:
        return varlen(query, key, value, document_borders, max(lengths), scaling, sliding_window).unsqueeze(0), None
    pieces = [
        _one_document(q, k, v, dropout, scaling, sliding_window)
        for q, k, v in zip(
            query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True
        )
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _one_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    length = query.shape[2]
    mask = None
    if window is not None and length > window:
        position = torch.arange(length, device=query.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < window)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


_Varlen = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float | None, int | None], torch.Tensor
]


@cache
def _varlen() -> _Varlen | None:
    """Return torch's own variable-length attention in our shapes, or None where this torch lacks what we need of it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size", "enable_gqa"} <= takes.keys():  # before 2.12 it had neither GQA nor a window
        return None

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        borders: torch.Tensor,
        longest: int,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        # [1, heads, T, D] -> [T, heads, D]
        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
        back = -1 if window is None else window - 1
        result = varlen_attn(
            q,
            k,
            v,
            borders,
            borders,
            longest,
            longest,
            scale=scaling,
            window_size=(back, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        assert isinstance(result, torch.Tensor)
        return result

    return attend


def use_packed_attention(model: Any) -> None:
    """Make the model attend through `packed_attention`.

    Raises: NotImplementedError when its code does not go through transformers' attention interface.
    """
    AttentionInterface.register(ROSE_ATTENTION, packed_attention)
    use_attention(model, ROSE_ATTENTION)
    if model.config._attn_implementation != ROSE_ATTENTION:
        raise NotImplementedError("its attention cannot be replaced")


def use_attention(model: Any, name: str) -> None:
    """Make the model attend through the registered function `name`, such as `sdpa`."""
    model.set_attn_implementation(name)
