"""Tasks and dimensions as data: what is edited, what it is judged on, and the question put to the judge.

Everything that names a task or a dimension is read from `taxonomy.yaml` (or another file of the same form, so that a
team adds a task such as background replacement without touching code):

    taxonomy = Taxonomy.load()
    taxonomy.task("remove").dimensions
    taxonomy.query("fill", "text_alignment", prompt="a red circle")

The query follows section 3.1 of arXiv 2508.21066: task, dimension and, for dimensions that read it, the prompt.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from models.errors import ConfigError, UnknownDimension, UnknownTask

MaskKind = Literal["brush", "box", "border", "object", "background"]
PromptKind = Literal["caption", "words", "fixed"]
ConditionKind = Literal["object", "word", "scene", "clean", "background"]


class _Entry(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Dimension(_Entry):
    """One quality axis.

    On procedural scenes the scripted annotator ranks by the measure `labelled_by` (models/mini/measures.py); win rates are counted by
    `accepted_by` (models/mini/acceptance.py), and `labelled_by` has to confirm them. Where evaluation reads blind evidence
    `measured_by` counts and `confirmed_by` confirms (both models/blind.py).
    """

    name: str
    title: str
    question: str
    reads_prompt: bool
    labelled_by: str
    accepted_by: str
    measured_by: str
    confirmed_by: str


class Task(_Entry):
    """One editing task. `probability` is p_k of Algorithm 1; zero keeps a task out of training and reports.

    `mask` lists the kinds a mask is drawn from where the user gives none; a single name is a list of one.
    """

    name: str
    title: str
    probability: float = pydantic.Field(ge=0, le=1)
    mask: tuple[MaskKind, ...] = pydantic.Field(min_length=1)
    prompt: PromptKind
    condition: ConditionKind
    dimensions: tuple[str, ...] = pydantic.Field(min_length=1)
    fixed_prompt: str | None = None

    @pydantic.field_validator("mask", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _fixed_prompt_given(self) -> Task:
        if (self.prompt == "fixed") != (self.fixed_prompt is not None):
            raise ValueError(f"task {self.name}: `fixed_prompt` goes with `prompt: fixed` and only with it")
        return self


class Query(_Entry):
    """The wording put to the judge. `version` is stored with every label and reward model."""

    version: int
    template: str
    prompt_clause: str
    answers: tuple[str, str]


class Taxonomy(_Entry):
    """All tasks, dimensions and the query. Build it with `Taxonomy.load`."""

    query_template: Query
    dimensions: tuple[Dimension, ...]
    tasks: tuple[Task, ...]

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Taxonomy:
        known = {d.name for d in self.dimensions}
        for task in self.tasks:
            if unknown := set(task.dimensions) - known:
                raise ValueError(f"task {task.name} is judged on unknown dimensions {sorted(unknown)}")
        total = sum(task.probability for task in self.tasks)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the tasks' probabilities add up to {total:g}, not 1")
        return self

    @classmethod
    def load(cls, path: str | Path | None = None) -> Taxonomy:
        """Read a taxonomy file; without a path, the one shipped here. Raises ConfigError naming the file and the entry."""
        source = Path(path) if path else Path(__file__).with_name("taxonomy.yaml")
        try:
            raw = yaml.safe_load(source.read_text())
            return cls(
                query_template=raw["query"],
                dimensions=[{"name": name, **entry} for name, entry in raw["dimensions"].items()],
                tasks=[{"name": name, **entry} for name, entry in raw["tasks"].items()],
            )
        except (OSError, yaml.YAMLError, KeyError, TypeError, pydantic.ValidationError) as error:
            raise ConfigError(
                f"{source} is not a usable taxonomy: {error}.", f"Compare it with {Path(__file__).with_name('taxonomy.yaml').name}."
            ) from error

    def task(self, name: str) -> Task:
        """The task of that name. Raises UnknownTask."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise UnknownTask(f"Unknown task {name!r}.", f"Use one of {', '.join(t.name for t in self.tasks)}, or add it to the taxonomy file.")

    def dimension(self, name: str) -> Dimension:
        """The dimension of that name. Raises UnknownDimension."""
        for dimension in self.dimensions:
            if dimension.name == name:
                return dimension
        raise UnknownDimension(
            f"Unknown dimension {name!r}.", f"Use one of {', '.join(d.name for d in self.dimensions)}, or add it to the taxonomy file."
        )

    @property
    def active(self) -> tuple[Task, ...]:
        """Tasks with a probability above zero: those that are trained, judged and reported, in file order."""
        return tuple(task for task in self.tasks if task.probability > 0)

    @property
    def cells(self) -> tuple[tuple[str, str], ...]:
        """Every (task, dimension) of the active tasks, in file order."""
        return tuple((task.name, dimension) for task in self.active for dimension in task.dimensions)

    def query(self, task: str, dimension: str, prompt: str = "") -> str:
        """The judge's question q(k, e). `prompt` enters only where the dimension reads it."""
        kind, axis = self.task(task), self.dimension(dimension)
        if dimension not in kind.dimensions:
            raise UnknownDimension(f"Task {task!r} is not judged on {dimension!r}.", f"Use one of {', '.join(kind.dimensions)}.")
        clause = self.query_template.prompt_clause.format(prompt=prompt) if axis.reads_prompt else ""
        return self.query_template.template.format(
            task=task, task_title=kind.title, dimension=dimension, dimension_title=axis.title, question=axis.question, prompt_clause=clause
        )

    def digest(self) -> str:
        """SHA-256 (hex) of the whole taxonomy."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()
