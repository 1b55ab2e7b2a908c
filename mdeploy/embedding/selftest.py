"""Is a running service what it says it is? Invariants of its answers, and golden vectors where somebody made some."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from mdeploy.embedding import phrases, pictures
from mdeploy.embedding.client import Client
from mdeploy.embedding.golden import Golden, GoldenItem
from mdeploy.embedding.types import Encoding, Item, RefusedError, Wish, cosine, norm, numbers
from mdeploy.errors import UsageError

Status = Literal["ok", "failed", "warning", "skipped"]
Vectors = list[Sequence[float]]

AT_ONCE = 16
_EXACT, _CLOSE = 0.9999, 0.999
"""Least cosines in float32, and in what has fewer bits."""

_NORM, _ELEMENT = 1e-3, 1e-3
_SCORE, _SCORE_OF_FEW_BITS = 1e-3, 2e-2


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. A warning is what may be right for this model."""

    name: str
    status: Status
    detail: str


Finding = tuple[Status, str]


class Asker:
    """The service as the checks see it. `least` is the cosine below which two vectors are not the same."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.about: Mapping[str, Any] = client.about()
        self.model = client.model()
        self.kind = str(self.about.get("kind", "embedder"))
        self.dtype = str(self.about.get("dtype", ""))
        self.least = _EXACT if self.dtype == "float32" else _CLOSE

    def vectors(self, inputs: Sequence[Item], wish: Wish | None = None, encoding: Encoding = "float") -> Vectors:
        """Of `inputs`, in one request."""
        answer = self.client.embed(self.model, inputs, wish or Wish(), encoding)
        return [numbers(vector) for vector in answer.vectors]

    def one(self, text: Item, wish: Wish | None = None) -> Sequence[float]:
        """Of one input, alone."""
        return self.vectors([text], wish)[0]

    @cached_property
    def known(self) -> Mapping[str, Sequence[float]]:
        """Vectors of all our texts, asked for together: what the others are compared with."""
        return dict(zip(_TEXTS, self.vectors(_TEXTS), strict=True))

    def scores(self, query: str, documents: Sequence[str]) -> list[float]:
        """What /v1/rerank says, in the order of `documents`."""
        body = {"model": self.model, "query": query, "documents": list(documents)}
        results = self.client.post("v1/rerank", body)["results"]
        found = {row["index"]: float(row["relevance_score"]) for row in results}
        return [found[index] for index in range(len(documents))]


Ask = Callable[[Asker], Finding]


def run(client: Client, golden: Golden | None) -> Iterator[Check]:
    """Every check, as it is made. Raises MdeployError where the service cannot be asked at all."""
    asker = Asker(client)
    if asker.kind == "cross-encoder":
        checks = _CROSS_ENCODER
    else:
        asker.one("Are you there?")
        compared: Ask = lambda asker: _golden(asker, golden)  # noqa: E731
        checks = {**_EMBEDDER, **(_PICTURES if asker.kind == "gme" else {}), "golden vectors": compared}
    for name, check in checks.items():
        yield Check(name, *_guarded(check, asker))


def record(client: Client, base: Golden | None) -> Golden:
    """Golden vectors as the service gives them now, of the texts of `base` or of our own."""
    asker = Asker(client)
    items = base.items if base else tuple(GoldenItem(text, ()) for text in phrases.GOLDEN)
    made = tuple(GoldenItem(one.input, tuple(asker.one(one.input, _wish(one))), one.fields) for one in items)
    return Golden(asker.model, asker.dtype, f"mdeploy selftest --record, {client.root}", made)


def _guarded(check: Ask, asker: Asker) -> Finding:
    """A request that is refused is a finding too; a service that is gone is not."""
    try:
        return check(asker)
    except (RefusedError, UsageError) as error:
        return "failed", f"refused: {error.message}"


def _same(asker: Asker, pairs: Iterable[tuple[Sequence[float], Sequence[float]]]) -> Finding:
    least = min(cosine(one, other) for one, other in pairs)
    return _judged(least >= asker.least, f"least cosine {least:.6f}, at least {asker.least}")


def _equal(one: Vectors, other: Vectors) -> Finding:
    pairs = zip(itertools.chain(*one), itertools.chain(*other), strict=True)
    farthest = max(abs(a - b) for a, b in pairs)
    return _judged(farthest <= _ELEMENT, f"numbers differ by {farthest:.1e}")


def _judged(good: bool, detail: str) -> Finding:
    return ("ok" if good else "failed"), detail


# embedders

_TRIPLES = {"English": phrases.ENGLISH, "Chinese": phrases.CHINESE}
_TEXTS = [text for triples in _TRIPLES.values() for triple in triples for text in triple]


def _size(asker: Asker) -> Finding:
    sizes = {len(vector) for vector in asker.known.values()}
    said = asker.about.get("dim")
    detail = f"{', '.join(map(str, sorted(sizes)))} numbers" + (f", /health says {said}" if said else "")
    return _judged(len(sizes) == 1 and said in (None, *sizes), detail)


def _norm(asker: Asker) -> Finding:
    worst = max(map(norm, asker.known.values()), key=lambda value: abs(value - 1) if value == value else math.inf)
    return _judged(abs(worst - 1) <= _NORM, f"farthest {worst:.6f}")


def _twice(asker: Asker) -> Finding:
    return _equal([asker.one(_TEXTS[0])], [asker.one(_TEXTS[0])])


def _mates(asker: Asker) -> Finding:
    return _same(asker, [(asker.one(text), asker.known[text]) for text in _TEXTS[::5]])


def _order(asker: Asker) -> Finding:
    back = asker.vectors(_TEXTS[::-1])
    return _same(asker, zip(asker.known.values(), back[::-1], strict=True))


def _load(asker: Asker) -> Finding:
    texts = _TEXTS[:AT_ONCE]
    with ThreadPoolExecutor(AT_ONCE) as crew:
        found = list(crew.map(asker.one, texts))
    return _same(asker, [(asker.known[text], vector) for text, vector in zip(texts, found, strict=True)])


def _encodings(asker: Asker) -> Finding:
    return _equal(asker.vectors(_TEXTS[:3]), asker.vectors(_TEXTS[:3], encoding="base64"))


def _cut(asker: Asker) -> Finding:
    least, dim = asker.about.get("smallest"), asker.about.get("dim")
    if not isinstance(least, int) or not isinstance(dim, int):
        return "skipped", "this model's vectors are not made to be cut"
    size = max(least, dim // 2)
    whole, cut = asker.one(_TEXTS[0]), asker.one(_TEXTS[0], Wish(dimensions=size))
    good = len(cut) == size and cosine(whole[:size], cut) >= asker.least and abs(norm(cut) - 1) <= _NORM
    return _judged(good, f"{len(cut)} of {len(whole)} numbers, norm {norm(cut):.6f}")


def _query(asker: Asker) -> Finding:
    if not asker.about.get("has_query"):
        return "skipped", "this model makes no difference"
    found = cosine(asker.known[_TEXTS[0]], asker.one(_TEXTS[0], Wish(query=True)))
    return _judged(found < asker.least, f"cosine {found:.4f}")


def _meaning(asker: Asker) -> Finding:
    def is_closer(triple: phrases.Triple) -> bool:
        text, same, other = (asker.known[text] for text in triple)
        return cosine(text, same) > cosine(text, other)

    return _by_language(is_closer)


def _by_language(is_right: Callable[[phrases.Triple], bool]) -> Finding:
    """How many are as they should be; a model may know one language only, so one that is right throughout will do."""
    right = {language: sum(map(is_right, triples)) for language, triples in _TRIPLES.items()}
    good = any(right[language] == len(triples) for language, triples in _TRIPLES.items())
    detail = ", ".join(f"{count} of {len(_TRIPLES[language])} in {language}" for language, count in right.items())
    return ("ok" if good else "warning"), detail


_EMBEDDER: Mapping[str, Ask] = {
    "vectors have one size": _size,
    "vectors have norm 1": _norm,
    "the same text twice": _twice,
    "batch-mates do not matter": _mates,
    "order is kept": _order,
    f"{AT_ONCE} requests at once": _load,
    "base64 is the same as float": _encodings,
    "dimensions: the beginning, of norm 1": _cut,
    "queries differ from documents": _query,
    "paraphrases are closer than strangers": _meaning,
}


# pictures


def _picture(asker: Asker) -> Finding:
    red = pictures.item("red")
    together = asker.vectors([_TEXTS[0], pictures.item("blue"), red])
    return _same(asker, [(asker.one(red), together[2])])


def _fused(asker: Asker) -> Finding:
    text = "What is shown here?"
    inputs: list[Item] = [text, pictures.item("red"), pictures.item("blue"), pictures.item("red", text)]
    found = asker.vectors(inputs)
    closest = max(cosine(one, other) for one, other in itertools.combinations(found, 2))
    good = closest < asker.least and all(abs(norm(vector) - 1) <= _NORM for vector in found)
    return _judged(good, f"closest cosine {closest:.4f}")


_PICTURES: Mapping[str, Ask] = {
    "a picture among others": _picture,
    "text, pictures and both together differ": _fused,
}


# cross-encoders


def _rerank_mates(asker: Asker) -> Finding:
    query, documents = _TEXTS[0], _TEXTS[1:8]
    alone = [asker.scores(query, [document])[0] for document in documents]
    farthest = max(abs(a - b) for a, b in zip(asker.scores(query, documents), alone, strict=True))
    bound = _SCORE if asker.dtype == "float32" else _SCORE_OF_FEW_BITS
    return _judged(farthest <= bound, f"scores differ by {farthest:.1e}, at most {bound}")


def _rerank_meaning(asker: Asker) -> Finding:
    def is_closer(triple: phrases.Triple) -> bool:
        same, other = asker.scores(triple.text, [triple.same, triple.other])
        return same > other

    return _by_language(is_closer)


_CROSS_ENCODER: Mapping[str, Ask] = {
    "scores do not depend on batch-mates": _rerank_mates,
    "what fits is ranked before what does not": _rerank_meaning,
}


# golden vectors


def _golden(asker: Asker, golden: Golden | None) -> Finding:
    if golden is None:
        return "skipped", "none are known for this model; --record FILE makes some"
    least, where = 2.0, ""
    for item in golden.items:
        found = asker.one(item.input, _wish(item))
        if len(found) != len(item.embedding):
            return "failed", f"{len(found)} numbers, golden ones have {len(item.embedding)}"
        value = cosine(found, item.embedding)
        if not value >= least:  # NaN is the worst
            least, where = value, _short(item.input)
    detail = f"{len(golden.items)} inputs, least cosine {least:.6f} ({where}), at least {asker.least}"
    return _judged(least >= asker.least, detail)


def _wish(item: GoldenItem) -> Wish:
    fields = item.fields
    return Wish(None, fields.get("prompt_name"), fields.get("instruction"), fields.get("input_type") == "query")


def _short(value: Item) -> str:
    text = value if isinstance(value, str) else value.get("text", "a picture")
    return repr(text if len(text) <= 24 else text[:23] + "…")
