"""The base class of the configuration's sections, and the roles of their fields.

A role is written at the field, as in `dir: Annotated[Path, COSMETIC]`; `common.config.options(COSMETIC)` lists them.
"""

from enum import Enum, auto

from pydantic import BaseModel, ConfigDict


class Role(Enum):
    """What a field controls besides the learning. A field without a role is part of an experiment's identity."""

    COSMETIC = auto()  # where and how often a run saves, reports and waits; may change when it resumes
    # Which devices do the work. It may change when a run resumes: the gradient stays, but for rounding, and so do the
    # samples if actor.part_prompts is set.
    PLACEMENT = auto()
    REPETITION = auto()  # differs between the repetitions of one experiment
    MACHINE = auto()  # how a step is fitted to a machine
    PLANNED = auto()  # unset by default, so that the plan chooses it; a resumed run keeps the choice


COSMETIC, PLACEMENT, REPETITION, MACHINE, PLANNED = Role


class Section(BaseModel):
    """Unknown keys are errors, values are frozen, and the docstring below a field is its help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
