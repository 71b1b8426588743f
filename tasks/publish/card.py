"""The model card: what the model is, how good it is, and how to make it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from regrow.infra.secrets import mask_secrets
from regrow.tasks.scores import SCORES

# Front matter that the hub knows: https://huggingface.co/docs/hub/model-cards
_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Card:
    """All that a model card tells."""

    name: str
    base_model: str
    """As people know it: a hub name, or the name of a directory."""
    base_on_hub: bool
    datasets: Sequence[str]
    """Names on the hub."""
    adapter: str | None
    """How it was trained ("lora"), or None: all weights."""
    license: Mapping[str, str]
    """The base model's, as far as it is known."""
    scores: Mapping[str, Any] | None
    """What the evaluate stage returned."""
    lineage: Sequence[tuple[str, str, str]]
    """(stage, key, figure) in order."""
    recipe_text: str
    versions: Mapping[str, str]

    def text(self) -> str:
        """The card as markdown with a YAML head; secrets are masked."""
        parts = [
            self._head(),
            f"# {self.name}",
            self._summary(),
            self._scores(),
            self._usage(),
            self._lineage(),
            f"## Recipe\n\n```yaml\n{self.recipe_text.strip()}\n```",
            self._versions(),
            "Built with Regrow.",
        ]
        return mask_secrets("\n\n".join(part for part in parts if part) + "\n")

    def _head(self) -> str:
        head: dict[str, Any] = {"base_model": self.base_model} if self.base_on_hub else {}
        head |= {key: self.license[key] for key in _LICENSE_KEYS if key in self.license}
        head |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
        if self.datasets:
            head["datasets"] = list(self.datasets)
        head["tags"] = ["regrow", "fine-tuned", *([self.adapter] if self.adapter else [])]
        return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"

    def _summary(self) -> str:
        kind = {"lora": "LoRA"}.get(self.adapter or "", self.adapter)
        how = f"with {kind}" if kind else "training all weights"
        data = f" on {', '.join(self.datasets)}" if self.datasets else ""
        return f"A fine-tune of `{self.base_model}`{data}, {how}."

    def _scores(self) -> str:
        if self.scores is None:
            return ""
        comparison = self.scores.get("comparison")
        after = self.scores["scores"]
        before = comparison["before"] if comparison else {}
        rows = ["| score | before | after |", "|---|---:|---:|"]
        for score in SCORES:
            if after.get(score.name) is not None:
                was = score.show(before[score.name]) if score.name in before else ""
                rows.append(f"| {score.title} | {was} | {score.show(after[score.name])} |")
        notes = [f"{note[0].upper()}{note[1:]}." for note in self.scores.get("notes", ())]
        if len(rows) == 2:
            return "\n\n".join(["## Scores", *notes])
        measured = (
            "On held-out data. *Before* is the base model. Loss and accuracy are over the tokens "
            "to be learnt; *exact answers* is the share of greedy answers equal to the expected."
        )
        return "\n\n".join(["## Scores", "\n".join(rows), measured, *notes])

    def _usage(self) -> str:
        return f"""## Use

```python
from transformers import pipeline

generate = pipeline("text-generation", model="{self.name}")  # or the directory of this card
print(generate([{{"role": "user", "content": "..."}}], max_new_tokens=128)[0]["generated_text"])
```"""

    def _lineage(self) -> str:
        rows = ["| stage | key | |", "|---|---|---|"]
        rows += [f"| {stage} | `{key}` | {figure} |" for stage, key, figure in self.lineage]
        why = (
            "Each key is the sha256 of all that decided the stage's result: equal keys, equal "
            "results."
        )
        return "\n\n".join(["## Lineage", "\n".join(rows), why])

    def _versions(self) -> str:
        known = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"## Versions\n\n{known}" if known else ""


def known_license(directory: Path) -> dict[str, str]:
    """The licence keys in the head of a model's own card; empty where none says so."""
    card = directory / "README.md"
    if not card.is_file():
        return {}
    before, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    if before.strip():
        return {}
    try:
        head = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return {}  # somebody's free text, which then says nothing about a licence
    if not isinstance(head, dict):
        return {}
    return {key: head[key] for key in _LICENSE_KEYS if isinstance(head.get(key), str)}
