"""What the tiny checkpoints know. Nothing but values: two interpreters read it."""

TASK = "translate English to German: "
NUMBERS = {
    "one": "eins",
    "two": "zwei und zwei",
    "three": "drei",
    "four": "vier sind vier und vier sind acht",
    "five and six": "sechs",
    "seven": "sieben mal sieben",
}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}
