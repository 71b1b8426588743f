"""The scores of a model: their names in results, and how people read them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """One figure that says how good a model is."""

    name: str
    """In the results of the evaluate stage."""
    title: str
    share: bool
    """A share of one, shown in per cent."""
    lower_is_better: bool
    decimals: int = 1

    def show(self, value: float) -> str:
        """The value as people read it."""
        number = f"{100 * value if self.share else value:.{self.decimals}f}"
        return f"{number} %" if self.share else number


SCORES = (
    Score("loss", "loss (nats a token)", share=False, lower_is_better=True, decimals=4),
    Score("perplexity", "perplexity", share=False, lower_is_better=True, decimals=2),
    Score("token_accuracy", "token accuracy", share=True, lower_is_better=False),
    Score("exact", "exact answers", share=True, lower_is_better=False),
)
"""In the order in which people read them; all on held-out data."""
