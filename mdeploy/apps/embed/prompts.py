"""What is put before a text: nothing before most, what its makers trained with before a query."""

from __future__ import annotations

from mdeploy.apps.embed import fields
from mdeploy.apps.embed.checkpoint import Checkpoint
from mdeploy.apps.embed.inputs import Wish

_OPEN = "{query}"
_TASK = "{task}"


class Prompts:
    """The prompts of one model. `instruction` takes the place of the model's own for queries."""

    def __init__(self, checkpoint: Checkpoint, instruction: str | None = None) -> None:
        self._query = checkpoint.query_prompt
        self._named = dict(checkpoint.prompts)
        task = instruction or checkpoint.instruction
        if self._query is not None and task is not None:
            self._named["query"] = _filled(self._query, task)
        self._usual = self._named.get(checkpoint.default_prompt or "", "")

    @property
    def names(self) -> tuple[str, ...]:
        """What `prompt_name` may be."""
        return tuple(sorted(self._named))

    @property
    def has_query(self) -> bool:
        """Whether a query gets another vector than a document of the same words."""
        return self._of_kind("query") != self._of_kind("document")

    def of(self, wish: Wish) -> str:
        """The text to put before each. Raises HTTPError 400 for wishes we cannot fulfil."""
        _check(wish)
        if wish.prompt is not None:
            return wish.prompt
        if wish.instruction is not None:
            return self._instructed(wish.instruction)
        if wish.prompt_name is not None:
            return self._called(wish.prompt_name)
        return self._usual if wish.kind is None else self._of_kind(wish.kind)

    def _of_kind(self, kind: str) -> str:
        names = ("query",) if kind == "query" else ("document", "passage")
        return next((self._named[name] for name in names if name in self._named), self._usual)

    def _instructed(self, instruction: str) -> str:
        if self._query is None:
            fields.wrong("instruction", "is not supported: this model was not trained with instructions")
        return _filled(self._query, instruction)

    def _called(self, name: str) -> str:
        if name not in self._named:
            known = f"the prompts of this model are {', '.join(self.names)}" if self._named else "this model has none"
            fields.wrong("prompt_name", f"is {name[:40]!r}: {known}", "unknown_prompt")
        return self._named[name]


def _filled(prompt: str, task: str) -> str:
    """`Instruct: {task}\\nQuery:{query}` up to where the query begins."""
    return prompt.partition(_OPEN)[0].replace(_TASK, task)


def _check(wish: Wish) -> None:
    given = [name for name in ("prompt", "prompt_name", "instruction") if getattr(wish, name) is not None]
    if len(given) > 1:
        fields.wrong(given[1], f"cannot be given together with {given[0]}")
    if wish.instruction is not None and wish.kind == "document":
        fields.wrong("instruction", 'is for queries, input_type is "document"')
    if wish.kind is not None and given and given != ["instruction"]:
        fields.wrong(given[0], "cannot be given together with input_type")
