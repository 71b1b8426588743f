"""Recipe -> Plan: the stages of a run with their keys. Must not import torch.

Everything that decides a result is found here, before any work: which model (a digest or a commit),
which tokenizer, which source files (their sha256). So a plan tells what a run will do, and a fault
in the recipe or its files shows before anything is spent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from regrow.configs.recipe import Recipe
from regrow.infra.devices import local_gpus
from regrow.infra.digests import DigestMemo
from regrow.tasks import identity
from regrow.tasks.build import Outcome
from regrow.tasks.evaluate import spec as evaluate
from regrow.tasks.forecast.forecast import local_device, placement_of
from regrow.tasks.merge import spec as merge
from regrow.tasks.prepare import sources
from regrow.tasks.prepare import spec as prepare
from regrow.tasks.publish import spec as publish
from regrow.tasks.stage import Stage, StageError
from regrow.tasks.train import spec as train


@dataclass(frozen=True)
class Plan:
    """The stages of one recipe, in the order in which they run."""

    name: str
    prepare: Stage
    train: Stage
    merge: Stage | None
    """None when all weights are trained: there is nothing to merge."""
    baseline: Stage
    """The base model evaluated; one unit for all runs on that base and data."""
    evaluate: Stage
    publish: Stage
    register_as: str | None = None
    """Name in MLflow's model registry, if the model goes there."""
    untrained_method: str | None = None
    """The recipe's line that asks for a method whose data can be prepared and no more."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages in order."""
        stages = (self.prepare, self.train, self.merge, self.baseline, self.evaluate, self.publish)
        return tuple(stage for stage in stages if stage is not None)

    @property
    def model(self) -> Stage:
        """The stage whose artifact is the whole new model."""
        return self.merge or self.train

    def upto(self, title: str) -> Iterator[Stage]:
        """The stages up to and including the one of that title.

        Raises:
            StageError: when the plan has no such stage.
        """
        titles = [stage.title for stage in self.stages]
        if title not in titles:
            raise StageError(
                f"this recipe has no stage {title!r}; its stages are {', '.join(titles)}"
            )
        if title != self.prepare.title:
            self.require_trainer()
        return iter(self.stages[: titles.index(title) + 1])

    def require_trainer(self) -> None:
        """Raises StageError when the method has no trainer, so that nothing is begun in vain."""
        if self.untrained_method is not None:
            raise StageError(
                f"{self.untrained_method}: its data can be prepared (`regrow preprocess`), but "
                "training with it is not here yet. Remove it to train on answers to imitate"
            )

    def publishes(self, outcomes: Sequence[Outcome]) -> bool:
        """Whether these outcomes reach the end of the plan."""
        return bool(outcomes) and outcomes[-1].stage.key == self.publish.key


def make_plan(recipe: Recipe, name: str, memo: DigestMemo) -> Plan:
    """The stages that a recipe means here and now.

    Args:
        name: of the run: its recipe, as people call it.
        memo: remembers digests of files, so that nothing large is read twice.

    Raises:
        StageError: for files that are missing or cannot be what the recipe says.
        HubError: for a model or data set that neither this machine nor the hub has.
    """
    model = identity.locate(recipe.base_model, recipe.revision_of_model)
    tokenizer = model
    if recipe.tokenizer_config and recipe.tokenizer_config != recipe.base_model:
        tokenizer = identity.locate(recipe.tokenizer_config, None, "tokenizer_config")
    weights = identity.weights_digest(model, memo)
    prepared = _prepare_stage(recipe, tokenizer, memo)
    trained = _train_stage(recipe, model, weights, prepared, memo)
    merged = _merge_stage(recipe, model, weights, prepared, trained)
    baseline = _evaluate_stage(recipe, model, weights, {"prepare": prepared})
    scores = _evaluate_stage(
        recipe,
        model,
        None,
        {"prepare": prepared, "model": merged or trained, "baseline": baseline},
    )
    inputs = {"prepare": prepared, "train": trained, "model": merged or trained, "evaluate": scores}
    published = Stage(
        name="publish",
        version=publish.VERSION,
        spec=publish.PublishSpec.from_recipe(recipe, name),
        runner="regrow.tasks.publish.run:run",
        inputs=inputs,
        placement=publish.PublishPlacement.from_recipe(recipe, model),
    )
    stages = (prepared, trained, merged, baseline, scores, published)
    return Plan(name, *stages, recipe.register_as or None, recipe.untrained_method)


def _train_stage(
    recipe: Recipe, model: str, weights: str, prepared: Stage, memo: DigestMemo
) -> Stage:
    start, start_digest = _start_adapter(recipe, memo)
    return Stage(
        name="train",
        version=train.VERSION,
        spec=train.TrainSpec.from_recipe(recipe, weights, start_digest),
        runner="regrow.tasks.train.run:run",
        inputs={"prepare": prepared},
        placement=train.TrainPlacement.from_recipe(
            recipe, model, _processes(), start, _micro_batch(recipe, model)
        ),
    )


def _start_adapter(recipe: Recipe, memo: DigestMemo) -> tuple[str | None, str | None]:
    """(place, digest) of the adapter that training goes on from."""
    if not (recipe.lora_model_dir and recipe.uses_adapter):
        return None, None
    place = identity.locate(recipe.lora_model_dir, None, "lora_model_dir")
    return place, identity.adapter_digest(place, memo)


def _prepare_stage(recipe: Recipe, tokenizer: str, memo: DigestMemo) -> Stage:
    files = {
        "dataset_files": _files(recipe.datasets, "datasets", memo, recipe.streaming),
        "test_dataset_files": _files(recipe.test_datasets, "test_datasets", memo),
    }
    digest = identity.tokenizer_digest(tokenizer, memo)
    return Stage(
        name="prepare",
        version=prepare.VERSION,
        spec=prepare.PrepareSpec.from_recipe(recipe, **files, tokenizer_digest=digest),
        runner="regrow.tasks.prepare.run:run",
        placement=prepare.PreparePlacement.from_recipe(recipe, **files, tokenizer_path=tokenizer),
    )


def _files(
    datasets: Sequence[Any], key: str, memo: DigestMemo, streaming: bool = False
) -> list[list[dict[str, str]]]:
    """For each dataset, and each part of its split, {place: digest} in the order of reading."""
    return [
        sources.identified(dataset, f"{key}.{i}", memo, streaming)
        for i, dataset in enumerate(datasets)
    ]


def _merge_stage(
    recipe: Recipe, model: str, weights: str, prepared: Stage, trained: Stage
) -> Stage | None:
    if not recipe.uses_adapter:
        return None
    return Stage(
        name="merge",
        version=merge.VERSION,
        spec=merge.MergeSpec.from_recipe(recipe, weights),
        runner="regrow.tasks.merge.run:run",
        inputs={"prepare": prepared, "train": trained},
        placement=merge.MergePlacement.from_recipe(recipe, model),
    )


def _evaluate_stage(
    recipe: Recipe, model: str, weights: str | None, inputs: dict[str, Stage]
) -> Stage:
    return Stage(
        name="evaluate",
        version=evaluate.VERSION,
        spec=evaluate.EvaluateSpec.from_recipe(recipe, weights),
        runner="regrow.tasks.evaluate.run:run",
        inputs=inputs,
        placement=evaluate.EvaluatePlacement.from_recipe(recipe, model),
        label="baseline" if weights else "evaluate",
    )


def _processes() -> int:
    """One for each GPU of this machine, found without loading torch; 1 where there is none."""
    return max(1, len(local_gpus()))


def _micro_batch(recipe: Recipe, model: str) -> int | None:
    """What `micro_batch_size: auto` means on this machine's GPUs; None where it is a number."""
    if recipe.micro_batch_size != "auto":
        return None
    processes = recipe.num_processes or _processes()
    return placement_of(recipe, model, local_device(), processes).micro_batch
