"""Quantized base models."""

from __future__ import annotations

from regrow.configs.sections.section import Section


class QuantizationSection(Section):
    """In how many bits the frozen base model is held."""

    load_in_8bit: bool = False
    """Hold the base model in 8 bits (not yet)."""

    load_in_4bit: bool = False
    """Hold the base model in 4 bits, for `adapter: qlora` (not yet)."""
