"""What every section of the configuration is, and the roles that mark its fields.

A role stands on the field, as in `dir: Annotated[Path, COSMETIC]`; `common.config.options(COSMETIC)` lists them.
"""

from enum import Enum, auto

from pydantic import BaseModel, ConfigDict


class Role(Enum):
    """What else than the learning a field decides. A field without a role is part of what identifies an experiment."""

    COSMETIC = auto()  # where and how often a run saves and reports; may differ when it resumes
    REPETITION = auto()  # differs between the repetitions of one experiment
    MACHINE = auto()  # how the same step is fitted to a machine
    PLANNED = auto()  # its default leaves the choice to the plan; a resumed run keeps what was chosen


COSMETIC, REPETITION, MACHINE, PLANNED = Role


class Section(BaseModel):
    """Unknown keys fail, values are frozen, and a docstring below a field is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
