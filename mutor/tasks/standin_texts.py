"""Generated problems and dialogues, one row at a time, from a random generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

Row = dict[str, Any]


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Ann Ben Carla David Emma Frank Grace Henry Ivy Jack Kate Leo Maria Nick Olga Paul Rosa Sam Tina Victor Wendy "
    "Yusuf Zoe Adam"
)
THINGS = _words(
    "apples books pencils marbles stamps cards shells cookies flowers eggs coins stickers tickets buttons candles "
    "oranges beads balls plates towels melons ribbons bottles badges"
)
PLACES = _words("market shop school garden park library farm beach station kitchen")
HOLDERS = _words("boxes bags baskets jars drawers trays shelves crates")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
IDLE = (
    "{name} is {n} years old.",
    "The {place} has {n} windows.",
    "It takes {n} minutes to walk to the {place}.",
    "There are {n} people at the {place}.",
    "The {place} opened {n} years ago.",
    "{other} lives {n} miles from the {place}.",
)
STEPS, STEP_WEIGHTS = (2, 3, 4, 5, 6, 7, 8), (30, 27, 18, 11, 7, 4, 3)


class _Story:
    """A word problem told sentence by sentence, with its worked solution."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.name, self.other = rng.sample(NAMES, 2)
        self.thing = rng.choice(THINGS)
        self.told: list[str] = []
        self.worked: list[str] = []
        self.value = 0
        self.holder = self.name

    def say(self, *forms: str, **values: Any) -> None:
        text = self.rng.choice(forms)
        self.told.append(text.format(name=self.name, other=self.other, who=self.holder, thing=self.thing, **values))

    def compute(self, a: int, sign: str, b: int, what: str) -> None:
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
        self.worked.append(f"{what} {a} {sign} {b} = {result} {self.thing}.")
        self.value = result

    def begin(self) -> None:
        if self.rng.random() < 0.5:
            m, n = self.rng.randint(2, 9), self.rng.randint(2, 12)
            box = self.rng.choice(HOLDERS)
            self.say(
                "{name} has {m} {box} with {n} {thing} in each.",
                "{name} fills {m} {box}. Each of them holds {n} {thing}.",
                "There are {n} {thing} in each of the {m} {box} that {name} owns.",
                m=m,
                n=n,
                box=box,
            )
            self.compute(m, "*", n, f"{self.name} has")
        else:
            m, n = self.rng.randint(4, 60), self.rng.randint(3, 40)
            day, next_day = self.rng.sample(DAYS, 2)
            self.say(
                "{name} collects {m} {thing} on {day} and {n} {thing} on {next_day}.",
                "On {day} {name} gets {m} {thing}. On {next_day} {name} gets {n} more.",
                "{name} has {m} {thing} from {day} and {n} from {next_day}.",
                m=m,
                n=n,
                day=day,
                next_day=next_day,
            )
            self.compute(m, "+", n, f"{self.name} has")

    def gain(self) -> bool:
        n = self.rng.randint(2, 40)
        self.say(
            "Then {who} buys {n} more {thing}.",
            "{who} finds {n} {thing}.",
            "A friend gives {who} {n} {thing}.",
            "After that {who} gets another {n} {thing}.",
            n=n,
        )
        self.compute(self.value, "+", n, f"Then {self.holder} has")
        return True

    def lose(self) -> bool:
        if self.value < 6:
            return False
        n = self.rng.randint(2, min(40, self.value - 2))
        self.say(
            "Then {who} gives away {n} {thing}.",
            "{who} loses {n} of the {thing}.",
            "{n} of the {thing} are sold at the {place}.",
            "After that {n} {thing} are broken.",
            n=n,
            place=self.rng.choice(PLACES),
        )
        self.compute(self.value, "-", n, f"Then {self.holder} has")
        return True

    def multiply(self) -> bool:
        if self.value > 60:
            return False
        word, n = self.rng.choice([("doubles", 2), ("triples", 3)])
        self.say("The next day the number of {thing} {word}.", "Then {who} {word} the number of {thing}.", word=word)
        self.compute(self.value, "*", n, f"Then {self.holder} has")
        return True

    def share(self) -> bool:
        parts = [n for n in (2, 3, 4, 5) if self.value % n == 0 and self.value // n >= 3]
        if not parts:
            return False
        n = self.rng.choice(parts)
        self.say(
            "{who} puts the {thing} into {n} equal piles and keeps one of them.",
            "{who} shares the {thing} equally with friends, so that each of {n} people has the same.",
            n=n,
        )
        self.compute(self.value, "/", n, f"Then {self.holder} has")
        return True

    def compare(self) -> bool:
        if self.holder == self.other:
            return False
        kind = self.rng.choice("+-*")
        if kind == "*":
            if self.value > 60:
                return False
            self.say("{other} has twice as many {thing} as {name}.", "{other} has two times what {name} has.")
            self.compute(self.value, "*", 2, f"{self.other} has")
        else:
            n = self.rng.randint(2, 20)
            if kind == "-" and self.value - n < 3:
                return False
            self.say(
                "{other} has {n} {word} {thing} than {name}.",
                "Compared with {name}, {other} has {n} {thing} {word}.",
                n=n,
                word="more" if kind == "+" else "fewer",
            )
            self.compute(self.value, kind, n, f"{self.other} has")
        self.holder = self.other
        return True

    def idle(self) -> None:
        self.say(*IDLE, n=self.rng.randint(3, 60), place=self.rng.choice(PLACES))

    def question(self) -> str:
        forms = (
            "How many {thing} does {who} have now?",
            "How many {thing} does {who} have in the end?",
            "What is the number of {thing} that {who} has at the end?",
        )
        return self.rng.choice(forms).format(thing=self.thing, who=self.holder)


def word_problem(rng: random.Random) -> tuple[str, list[str], int]:
    """(question, lines of its solution, answer): 2 to 8 steps, sometimes with a sentence that does not matter."""
    story = _Story(rng)
    steps = rng.choices(STEPS, STEP_WEIGHTS)[0]
    story.begin()
    while len(story.worked) < steps:
        rng.choice((story.gain, story.lose, story.multiply, story.share, story.compare))()
        if rng.random() < 0.1:
            story.idle()
    return " ".join([*story.told, story.question()]), story.worked, story.value


def _gsm8k(rng: random.Random) -> Row:
    question, worked, answer = word_problem(rng)
    return {"question": question, "answer": "\n".join(worked) + f"\n#### {answer}"}


def _fraction(top: int, bottom: int) -> str:
    return str(top) if bottom == 1 else rf"\frac{{{top}}}{{{bottom}}}"


def equation(rng: random.Random) -> tuple[str, str, str]:
    """(problem, solution, answer): linear equations, sums of fractions, products of linear terms."""
    x = rng.choice("xyzt")
    a, b, c, d = rng.randint(2, 9), rng.randint(1, 20), rng.randint(1, 9), rng.randint(2, 9)
    kind = rng.choice(("linear", "both", "fraction", "expand"))
    if kind == "linear":
        root = rng.randint(-9, 12)
        total = a * root + b
        asked = rng.choice((f"Solve ${a}{x} + {b} = {total}$ for ${x}$.", f"Find ${x}$ if ${a}{x} + {b} = {total}$."))
        solved = f"Subtract {b}: ${a}{x} = {total - b}$.\nDivide by {a}: ${x} = {root}$."
        return asked, solved, str(root)
    if kind == "both":
        root = rng.randint(2, 12)
        right = d * root - c
        side = f"{a}{x} + {right}" if right >= 0 else f"{a}{x} - {-right}"
        asked = f"What value of ${x}$ satisfies ${a + d}{x} - {c} = {side}$?"
        solved = f"Subtract ${a}{x}$: ${d}{x} - {c} = {right}$.\nAdd {c}: ${d}{x} = {right + c}$."
        return asked, f"{solved}\nDivide by {d}: ${x} = {root}$.", str(root)
    if kind == "fraction":
        p, q, r, s = rng.randint(1, 5), a, rng.randint(1, 5), d
        top, bottom = p * s + r * q, q * s
        sum_ = Fraction(top, bottom)
        asked = rf"Compute $\frac{{{p}}}{{{q}}} + \frac{{{r}}}{{{s}}}$."
        parts = rf"\frac{{{p * s}}}{{{bottom}}} + \frac{{{r * q}}}{{{bottom}}}"
        solved = rf"The sum is ${parts} = \frac{{{top}}}{{{bottom}}}$."
        return asked, solved, _fraction(sum_.numerator, sum_.denominator)
    asked = f"Expand $({x} + {b})({x} + {c})$."
    solved = f"The middle term is ${b}{x} + {c}{x} = {b + c}{x}$.\nThe last is ${b} * {c} = {b * c}$."
    return asked, solved, f"{x}^2 + {b + c}{x} + {b * c}"


def _openmath(rng: random.Random) -> Row:
    if rng.random() < 0.5:
        question, worked, answer = word_problem(rng)
        source, text = rng.choice(("gsm8k", "augmented_gsm8k")), str(answer)
    else:
        question, solution, text = equation(rng)
        source, worked = rng.choice(("math", "augmented_math")), solution.split("\n")
    solution = "\n".join(worked) + f"\nThe answer is \\boxed{{{text}}}."
    return {
        "problem": question,
        "generated_solution": solution,
        "expected_answer": text,
        "problem_source": source,
    }


def _math500(rng: random.Random) -> Row:
    question, solution, answer = equation(rng)
    return {"problem": question, "solution": f"{solution}\nThe answer is \\boxed{{{answer}}}.", "answer": answer}


def _aqua(rng: random.Random) -> Row:
    speed, hours, price, number = rng.randint(3, 20), rng.randint(2, 9), rng.randint(2, 15), rng.randint(3, 12)
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    extra = rng.randint(2, 30)
    cost, total, side = number * price, price * 2 + extra, speed + number
    forms = (
        (
            f"A train runs at {speed} miles an hour for {hours} hours. How many miles does it run?",
            f"{speed} * {hours} = {speed * hours}",
            speed * hours,
        ),
        (
            f"{name} buys {number} {thing} at {price} dollars each and a bag for {extra} dollars. "
            f"What does {name} pay?",
            f"{number} * {price} = {cost}\n{cost} + {extra} = {cost + extra}",
            cost + extra,
        ),
        (
            f"{number} workers need {hours} days to paint the {place}. How many days does one worker need?",
            f"{number} * {hours} = {number * hours}",
            number * hours,
        ),
        (
            f"The sum of two numbers is {total}. One is {extra} larger than the other. What is the smaller?",
            f"{total} - {extra} = {price * 2}\n{price * 2} / 2 = {price}",
            price,
        ),
        (
            f"A rectangle is {speed} long and {number} wide. What is its perimeter?",
            f"{speed} + {number} = {side}\n2 * {side} = {2 * side}",
            2 * side,
        ),
    )
    question, rationale, answer = rng.choice(forms)
    wrong = rng.sample([n for n in range(2, 2 * answer + 20) if n != answer], 4)
    options = [answer, *wrong]
    rng.shuffle(options)
    correct = "ABCDE"[options.index(answer)]
    return {
        "question": question,
        "options": [f"{x}){v}" for x, v in zip("ABCDE", options, strict=True)],
        "rationale": rationale,
        "correct": correct,
    }


MEET = ("play tennis", "see a film", "cook dinner", "go swimming", "study maths", "watch the game", "paint the fence")
FETCH = ("bread", "milk", "a lamp", "two chairs", "some fruit", "a cake", "the tickets", "new shoes")
TROUBLE = ("the car is broken", "the train is late", "the dog is ill", "the key is lost", "the heater is cold")


def _dialogue(rng: random.Random, first: str, second: str) -> tuple[str, str]:
    """(dialogue, summary) of two speakers about a plan, an errand or some trouble."""
    hour, day, place = rng.randint(1, 11), rng.choice(DAYS), rng.choice(PLACES)
    hello = rng.choice(("Hi", "Hello", "Hey", "Good morning"))
    reply = rng.choice(("Fine, thanks.", "Good, and you?", "A bit tired."))
    lines = [(first, f"{hello}, how are you?"), (second, reply)]
    kind = rng.choice(("meet", "fetch", "trouble"))
    if kind == "meet":
        what, later = rng.choice(MEET), rng.random() < 0.4
        lines += [(first, rng.choice((f"Do you want to {what} on {day}?", f"Shall we {what} on {day}?")))]
        lines += [(second, rng.choice(("Sure, when?", "Why not. What time?")))]
        lines += [(first, f"At {hour}, we meet at the {place}.")]
        if later:
            lines += [(second, f"Can we make it {hour + 1}?"), (first, rng.choice(("No problem.", "All right.")))]
            hour += 1
        else:
            lines += [(second, rng.choice(("Perfect.", "See you there.")))]
        summary = f"{first} and {second} will {what} on {day}. They meet at the {place} at {hour}."
    elif kind == "fetch":
        what, done = rng.choice(FETCH), rng.random() < 0.6
        lines += [(first, rng.choice((f"Could you get {what} from the {place}?", f"I need {what} from the {place}.")))]
        if done:
            lines += [(second, rng.choice(("Of course.", "Yes, I can."))), (first, f"I am home from {hour}.")]
            summary = f"{second} will get {what} from the {place} for {first}, who is home from {hour}."
        else:
            lines += [(second, f"Sorry, I have no time before {day}."), (first, "Then I will do it.")]
            summary = f"{second} has no time before {day}, so {first} will get {what} from the {place}."
    else:
        what = rng.choice(TROUBLE)
        lines += [(first, rng.choice((f"Bad news, {what}.", f"I am sorry, {what}."))), (second, "Oh no! What now?")]
        lines += [(first, f"I will be at the {place} at {hour} on {day}.")]
        lines += [(second, rng.choice(("I can wait.", "Do not worry.")))]
        summary = f"{first} tells {second} that {what}. {first} will be at the {place} at {hour} on {day}."
    return "\n".join(f"{who}: {text}" for who, text in lines), summary


def _samsum(rng: random.Random) -> Row:
    dialogue, summary = _dialogue(rng, *rng.sample(NAMES, 2))
    return {"dialogue": dialogue, "summary": summary}


def _dialogsum(rng: random.Random) -> Row:
    dialogue, summary = _dialogue(rng, "#Person1#", "#Person2#")
    return {"dialogue": dialogue, "summary": summary}


def _mix(rng: random.Random) -> Row:
    """A row of any dataset, which `dataset` names: what base models are trained on."""
    name = rng.choices(list(MAKERS)[:-1], (3, 3, 1, 2, 1, 1))[0]
    return {"dataset": name, **MAKERS[name](rng)}


MAKERS: dict[str, Callable[[random.Random], Row]] = {
    "gsm8k": _gsm8k,
    "openmathinstruct-2": _openmath,
    "math500": _math500,
    "aqua": _aqua,
    "samsum": _samsum,
    "dialogsum": _dialogsum,
    "mix": _mix,
}
