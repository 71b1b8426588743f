"""Learning from preferences, rewards and steps: which method, and so what the data must be."""

from __future__ import annotations

from typing import Literal

from regrow.configs.sections.section import Section

Method = Literal["dpo", "ipo", "orpo", "simpo", "kto", "grpo", "gdpo"]

_KIND_OF_METHOD = {
    "dpo": "preference",
    "ipo": "preference",
    "orpo": "preference",
    "simpo": "preference",
    "kto": "unpaired",
    "grpo": "prompts",
    "gdpo": "prompts",
}


class RLSection(Section):
    """How a model learns from something else than answers to imitate."""

    rl: Method | None = None
    """Method: dpo, ipo, orpo and simpo learn from pairs of answers, kto from answers marked good or
    bad, grpo and gdpo from rewards of the model's own answers. Data for it can be prepared
    (`regrow preprocess`); training with it is not here yet. Default: none, answers are imitated."""

    reward_model: bool = False
    """Train a model that scores answers, from pairs of them. Data can be prepared, training is not
    here yet. Default false."""

    process_reward_model: bool = False
    """Train a model that scores the steps of an answer. Data can be prepared, training is not here
    yet. Default false."""

    @property
    def data_kind(self) -> str:
        """What the examples are: "sft", "preference", "reward" (pairs, too), "unpaired", "steps" or
        "prompts"."""
        if self.process_reward_model:
            return "steps"
        if self.reward_model:
            return "reward"
        return _KIND_OF_METHOD[self.rl] if self.rl else "sft"

    @property
    def untrained_method(self) -> str | None:
        """The recipe's line that asks for a method without a trainer; None when there is one."""
        if self.process_reward_model:
            return "process_reward_model: true"
        if self.reward_model:
            return "reward_model: true"
        return f"rl: {self.rl}" if self.rl else None
