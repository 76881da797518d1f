"""The structures of compiled_model.h and compiled_drafts.cpp, field for field.

Knows names and widths; knows nothing of what they hold.
"""

from __future__ import annotations

import ctypes


def _numbers(names: str) -> list[tuple[str, type[ctypes.c_int64]]]:
    return [(name, ctypes.c_int64) for name in names.split()]


def _pointers(names: str) -> list[tuple[str, type[ctypes.c_void_p]]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


class Layer(ctypes.Structure):
    """Where a layer's norms, matrices and cache lie."""

    _fields_ = _pointers("attention_norm qkv attention_out mlp_norm gate_up down cache")


class Model(ctypes.Structure):
    """Widths, number formats and layers."""

    _fields_ = [
        *_numbers("width num_heads num_kv_heads head_width mlp_width"),
        ("eps", ctypes.c_float),
        ("stored", ctypes.c_int32),
        ("cached", ctypes.c_int32),
        ("layers", ctypes.POINTER(Layer)),
    ]


class Tokens(ctypes.Structure):
    """Which tokens are computed, and where their rows' contexts lie."""

    _fields_ = [
        *_numbers("count context_width"),
        *_pointers("rows steps num_computed contexts rotations"),
    ]


class Drafting(ctypes.Structure):
    """Which rows draft how often, from what, by which rule, and where it is put."""

    _fields_ = [
        *_numbers("num_steps exit_layer vocab_size num_outputs context_width"),
        *_pointers("num_rows last_ids num_computed contexts embedding rotations norm head"),
        *_pointers("temperatures top_ps min_ps first_keys second_keys ids exits"),
    ]
