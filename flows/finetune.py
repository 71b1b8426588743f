"""The pipeline: one recipe, one stage after the other, each built only if the store lacks it."""

# No `from __future__ import annotations` here: it breaks Prefect flows that are served.
from typing import Any

from prefect import flow

from regrow.configs.recipe import Recipe
from regrow.flows.run import FlowRun
from regrow.infra.settings import load_settings

# On a server, what the stages say belongs on the run's page; a run without one has a terminal.
_HAS_SERVER = load_settings().prefect_api_url is not None


@flow(name="finetune", flow_run_name="{name}", log_prints=_HAS_SERVER)
def finetune(recipe: Recipe, name: str = "finetune") -> Any:
    """From raw data to a published model."""
    with FlowRun(recipe, name) as build:
        stages = build.plan
        stages.require_trainer()
        build(stages.prepare)  #  sources -> tokenized, masked, packed rows
        build(stages.train)  #    rows + base model -> adapter or weights
        if stages.merge:
            build(stages.merge)  #  adapter + base model -> whole model, checked against the adapter
        build(stages.baseline)  # the base model on held-out data
        build(stages.evaluate)  # the new model on the same data, side by side
        build(stages.publish)  #  model card, and delivery to where people use it
    return build.state


@flow(name="stages", flow_run_name="{name}", log_prints=_HAS_SERVER)
def stages_upto(recipe: Recipe, last: str, name: str = "stages") -> Any:
    """The pipeline up to and including the stage `last`."""
    with FlowRun(recipe, name) as build:
        for stage in build.plan.upto(last):
            build(stage)
    return build.state
