"""The structures of compiled_model.h and compiled_step.h, field for field.

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
        *_numbers("width num_heads num_kv_heads head_width mlp_width num_layers"),
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


class DraftHead(ctypes.Structure):
    """A head of some tokens, which they are, and in which order they were seen."""

    _fields_ = [*_numbers("num_tokens"), *_pointers("panels ids places older newer")]


class Ends(ctypes.Structure):
    """What every layer is without: embeddings, rotations, norm, head, and a head for drafts if there is one."""

    _fields_ = [
        *_numbers("vocab_size num_outputs"),
        *_pointers("embedding rotations norm head"),
        ("drafts", ctypes.POINTER(DraftHead)),
    ]


class Rows(ctypes.Structure):
    """How much of each row is computed, where its context lies, and by which rule its tokens are chosen."""

    _fields_ = [
        *_numbers("count context_width"),
        *_pointers("num_computed contexts temperatures top_ks top_ps min_ps first_keys second_keys"),
    ]


class Confidence(ctypes.Structure):
    """How likely drafts of each grade are kept."""

    _fields_ = [*_numbers("num_edges"), *_pointers("edges chances")]


class Drafting(ctypes.Structure):
    """Which rows draft how often, from what, until when, and where it is put."""

    _fields_ = [
        *_numbers("exit_layer"),
        *_pointers("lengths last_ids least ids grades num_made exits"),
    ]


class Step(ctypes.Structure):
    """What rows are fed, which of them choose, and where that is put."""

    _fields_ = [
        *_numbers("most_chosen num_surveyed"),
        *_pointers("fed_ids num_fed num_looked_up chooses surveyed"),
        *_pointers("num_chosen chosen grades agreed seconds"),
    ]
