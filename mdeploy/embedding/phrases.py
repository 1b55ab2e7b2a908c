"""Texts whose order of likeness nobody would dispute, to ask a model what it makes of them."""

from __future__ import annotations

from typing import NamedTuple


class Triple(NamedTuple):
    """A text, one that says the same, and one that is about something else."""

    text: str
    same: str
    other: str


ENGLISH = (
    Triple("How do I reset my password?", "I forgot my password, what now?", "The train leaves at noon."),
    Triple("The cat sleeps on the sofa.", "A cat is napping on the couch.", "Interest rates rose again in May."),
    Triple("The company fired half its staff.", "Half of the employees were laid off.", "This soup needs more salt."),
    Triple("It will rain tomorrow.", "Wet weather is forecast for the next day.", "She plays the violin very well."),
    Triple("The doctor prescribed antibiotics.", "A physician ordered medicine.", "Our car has a flat tyre."),
    Triple("Python is a programming language.", "People write software in Python.", "The castle was built in 1320."),
)

CHINESE = (
    Triple("我忘记了密码怎么办？", "如何重置我的密码？", "火车中午十二点出发。"),
    Triple("猫在沙发上睡觉。", "一只小猫正躺在沙发上打盹。", "央行五月再次上调了利率。"),
    Triple("公司裁掉了一半员工。", "这家企业解雇了半数职工。", "这碗汤需要多放点盐。"),
    Triple("明天会下雨。", "天气预报说明天有雨。", "她小提琴拉得非常好。"),
    Triple("医生给他开了抗生素。", "大夫开了消炎药给病人。", "我们的车爆胎了。"),
    Triple("北京是中国的首都。", "中国的首都是北京。", "这座城堡建于十四世纪。"),
)

GOLDEN = (
    "A cat sleeps on the sofa.",
    "一只小猫正躺在沙发上打盹。",
    "def add(a, b):\n    return a + b",
    "¿Dónde está la biblioteca? Ça va? Größe: 5 µm, 100 % 🙂",
    "word",
    "The quick brown fox jumps over the lazy dog. " * 12,
)
"""What `mdeploy selftest --record` asks: short and long, several scripts, code."""
