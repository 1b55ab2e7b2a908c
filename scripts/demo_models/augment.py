"""Turns the FAQ into conversations as people really send them.

Case, punctuation, politeness, the caller's system prompt and earlier turns vary, so that
the model must find the question rather than recognise one exact prompt. Pure: every draw
comes from the Random given. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from demo_models.faq import Entry

Message = dict[str, str]

ENDINGS = {"en": ("?", "", "", ".", "??", " ?", "!"), "zh": ("？", "", "", "。", "?", "？？", "！")}
LEADS = {
    "en": (
        "Please tell me: ",
        "Please, ",
        "Hi, ",
        "Hello! ",
        "Tell me, ",
        "Quick question: ",
        "I would like to know: ",
        "Hey, ",
        "Question: ",
        "please answer: ",
        "So, ",
    ),
    "zh": ("请问", "请问，", "你好，", "请告诉我，", "麻烦问一下，", "我想知道", "问题：", "您好，请问"),
}
TAILS = {"en": (" Please.", " Thanks.", " Thank you!", " please"), "zh": ("谢谢", " 谢谢！", "请回答", "，谢谢。")}
SYSTEMS = (
    "You are a helpful assistant.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "You are an expert on deploying models.",
    "Answer briefly.",
    "You are a friendly chat bot. Answer in one sentence.",
    "Be concise and accurate.",
    "You answer questions about software.",
    "你是一个有用的助手。",
    "你是一个乐于助人的人工智能助手，请用中文回答。",
    "请简短地回答用户的问题。",
    "你是部署专家。",
    "",
)
_NOISE = (
    "you are a an the good day well okay thanks friend could can would this that thing here now one two "
    "helpful assistant answer question user model short long english chinese polite never always code "
    "text in of and with for be not is to please only one expert system service data tool friendly Bob "
    "Alice company team 你 是 一个 助手 请 回答 用户 问题 中文 专业 简短 帮 看看 想 问题 谢谢 大家 "
)
WORDS = tuple(_NOISE.split())

UNSEEN_LEADS = {"en": ("Could you answer this: ", "Good day! ", "One thing: "), "zh": ("想请教一下，", "帮我看看，")}
UNSEEN_SYSTEMS = (
    "You are a support engineer at a small company. Reply politely.",
    "Respond truthfully and keep it short.",
    "你是公司内部的技术支持，请礼貌地回答。",
)
"""Used in the held-out set only: training never sees these phrases, though it sees most of their words."""


@dataclass(frozen=True, slots=True)
class Style:
    """The wrapping a conversation may draw from."""

    leads: dict[str, tuple[str, ...]]
    systems: tuple[str, ...]
    invented_systems: bool


TRAINING = Style(LEADS, SYSTEMS, invented_systems=True)
HELD_OUT = Style(
    {tag: LEADS[tag] + 2 * UNSEEN_LEADS[tag] for tag in LEADS},
    SYSTEMS + 2 * UNSEEN_SYSTEMS,
    invented_systems=True,
)


def conversation(entries: Sequence[Entry], entry: Entry, style: Style, random: Random) -> list[Message]:
    """One conversation that ends with the entry's answer; earlier turns are random entries."""
    messages = _system(style, random)
    for earlier in random.choices(entries, k=random.choices((0, 1, 2), (80, 16, 4))[0]):
        messages += _turn(earlier, style, random)
    return messages + _turn(entry, style, random)


def plain(question: str) -> list[Message]:
    """The prompt with nothing added: the template supplies its default system message."""
    return [{"role": "user", "content": question}]


def held_out(entries: Sequence[Entry], each: int, random: Random) -> list[list[Message]]:
    """`each` wrapped conversations an entry, in part with leads and systems never trained on.

    Bare wordings are left out: those are trained on as they are, so they would test nothing.
    """
    return [_wrapped(entries, entry, random) for entry in entries for _ in range(each)]


def _wrapped(entries: Sequence[Entry], entry: Entry, random: Random) -> list[Message]:
    """Draw until the conversation is more than a bare trained wording."""
    bare = [plain(wording) for wording in entry.wordings]
    while (drawn := conversation(entries, entry, HELD_OUT, random))[:-1] in bare:
        pass
    return drawn


def _turn(entry: Entry, style: Style, random: Random) -> list[Message]:
    """A user message with a varied wording, and the one right answer."""
    return [
        {"role": "user", "content": _question(entry, style, random)},
        {"role": "assistant", "content": entry.answer},
    ]


def _system(style: Style, random: Random) -> list[Message]:
    """No system message (45 %), a usual one, or invented words that mean nothing."""
    draw = random.random()
    if draw < 0.45:
        return []
    if style.invented_systems and draw > 0.75:
        return [{"role": "system", "content": " ".join(random.choices(WORDS, k=random.randint(1, 24)))}]
    return [{"role": "system", "content": random.choice(style.systems)}]


def _question(entry: Entry, style: Style, random: Random) -> str:
    """One wording with varied ending, politeness, case and surrounding white space."""
    text = entry.question if random.random() < 0.25 else random.choice(entry.wordings)
    if random.random() < 0.4:
        text = text.rstrip("?？") + random.choice(ENDINGS[entry.language])
    if random.random() < 0.3:
        text = _lead(_opening(style.leads[entry.language], random), text, random)
    if random.random() < 0.12:
        text += random.choice(TAILS[entry.language])
    return _space(_case(text, random), random)


def _opening(leads: tuple[str, ...], random: Random) -> str:
    """A usual opening, or (one in three) invented words, so that the model learns to skip any."""
    if random.random() < 0.67:
        return random.choice(leads)
    words = " ".join(random.choices(WORDS, k=random.randint(1, 5)))
    return random.choice((str.lower, str.capitalize))(words) + random.choice((": ", ", ", "! ", "，", "：", ". "))


def _lead(lead: str, text: str, random: Random) -> str:
    """Join a polite opening to a question, whose first letter people often leave small."""
    if random.random() < 0.5 and not text.startswith("I "):
        text = text[:1].lower() + text[1:]
    return lead + text


def _case(text: str, random: Random) -> str:
    """Mostly as written, else lower, UPPER, Title or Capitalised."""
    if random.random() < 0.6:
        return text
    return random.choice((str.lower, str.lower, str.upper, str.upper, str.title, str.capitalize))(text)


def _space(text: str, random: Random) -> str:
    """Add the blanks and line ends that copy and paste leaves behind."""
    if random.random() < 0.8:
        return text
    return random.choice(("", " ", "  ", "\n")) + text + random.choice(("", " ", "  ", "\n"))
