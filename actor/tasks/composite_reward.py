"""The composite reward of arXiv 2606.05434 (section 3.4, Eq. 10), and the prompt that asks for what it rewards.

The tasks gsm8k and gym use it; a task may judge the answer, the first term, with a scorer of its own.

Our reading [R] of what the paper does not specify:

- A number is digits of any script, with `1,234` groups, decimals, an exponent and a sign (ASCII or U+2212). Currency
  signs, percent signs and units around it are ignored. The last number of a text is its answer.
- The answer is the last number inside <SOLUTION>; a solution without a number is no answer. Without <SOLUTION>, it is
  the number of the last `\\boxed{...}`, or else the last number of the whole text.
- Of several blocks the last one counts; an unclosed block extends to the end of the text.
- "Within 10 %" includes the bound. There is no partial credit if the true answer is 0.
- "Well formed": each tag once, in the order of TAGS.
- A step is a label ("Step 2", "2." or "2)" at the start of a line) or an equation ("=" before a number). The steps of a
  line are its labels or its equations, whichever are more; a repeated line counts once. Text outside the reasoning tags
  is reasoning without steps.
"""

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation

REASONING = ("<start_working_out>", "</start_working_out>")
SOLUTION = ("<SOLUTION>", "</SOLUTION>")
TAGS = (*REASONING, *SOLUTION)

SYSTEM = (
    "Solve the problem. Write your working, one calculation a line, between <start_working_out> and "
    "</start_working_out>. Then write only the final answer between <SOLUTION> and </SOLUTION>."
)

EXAMPLE = (
    (
        "A box holds 12 pens. Mia buys 3 boxes, gives 8 pens away and shares the rest among 4 friends. "
        "Then each friend loses 2 pens and finds 1. How many pens has each friend?"
    ),
    "3 * 12 = 36\n36 - 8 = 28\n28 / 4 = 7\n7 - 2 = 5\n5 + 1 = 6",
    "6",
)
"""The worked example of the tasks gsm8k and math: question, working, answer."""

# Every pattern is linear in the text: no two neighbouring repeats can match the same character.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])(?P<sign>[-+]))?[$€£]?(?P<inner>(?<=[$€£])-)?"
    r"(?P<digits>(?<![A-Za-z_^])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?P<exponent>[eE][-+]?\d+)?"
)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_EQUATION = re.compile(r"(?<![=<>!])=[ \t$€£(+\-−]{0,8}\.?\d")
_STEP = re.compile(r"\bstep\s?\d", re.IGNORECASE)
_NUMBERED = re.compile(r"[ \t#*>(]{0,8}\d{1,3}[.):](?:\s|$)")
_PLAIN = str.maketrans({"−": "-", "﹣": "-", "－": "-", "＋": "+", "，": ",", "．": ".", "＄": "$"})


def score(completion: str, answer: str) -> dict[str, float]:
    """The composite reward of a completion against the true answer: Eq. 10, at most 7.5.

    Returns its four terms `correct`, `format`, `present`, `steps`, and their sum `total`. Never raises: if either text
    has no number, the answer counts as absent.
    """
    parts = {"correct": correctness(read_answer(completion), read_number(answer)), **style(completion)}
    return {**parts, "total": round(sum(parts.values()), 1)}


def style(completion: str) -> dict[str, float]:
    """The terms of Eq. 10 that do not depend on the answer: `format`, `present` and `steps`."""
    return {"format": _format(completion), "present": _present(completion), "steps": _steps(completion)}


def correctness(value: Decimal | None, truth: Decimal | None) -> float:
    """The first term of Eq. 10: 4.0 exact, 1.5 within 10 % of the truth, 0.0 incorrect, -0.5 absent or unparseable."""
    if value is None or truth is None:
        return -0.5
    if value == truth:
        return 4.0
    return 1.5 if 10 * abs(value - truth) <= abs(truth) else 0.0


def read_answer(completion: str) -> Decimal | None:
    """The number that a completion gives as its answer, or None."""
    solution = inside(completion, *SOLUTION)
    if solution is not None:
        return read_number(solution)
    boxed = _BOXED.findall(completion)
    return read_number(boxed[-1] if boxed else completion)


def read_number(text: str) -> Decimal | None:
    """The last number of a text; None if there is none, or it has 5000 digits or more."""
    text = text.translate(_PLAIN).replace("{,}", ",").replace("\\", "")
    match = max(_NUMBER.finditer(text), key=lambda found: found.start(), default=None)
    if match is None:
        return None
    sign = "-" if "-" in (match["sign"], match["inner"]) else ""
    try:
        value = Decimal(sign + match["digits"].replace(",", "") + (match["exponent"] or ""))
    except InvalidOperation:  # an exponent that Decimal cannot hold
        return None
    return value if abs(value.adjusted()) < 5000 else None  # differences of larger numbers could overflow


def inside(text: str, opening: str, closing: str) -> str | None:
    """The text of the last block between two tags; None if the opening tag is absent."""
    end = text.rfind(closing)
    start = text.rfind(opening, 0, end) if end >= 0 else -1
    if start < 0:  # no closed block
        start, end = text.rfind(opening), len(text)
    return text[start + len(opening) : end] if start >= 0 else None


def _format(completion: str) -> float:
    positions = [completion.find(tag) for tag in TAGS]
    if any(completion.count(tag) > 1 for tag in TAGS):
        return -0.5
    if positions[0] >= 0 and positions == sorted(positions):
        return 1.5
    terms = zip((0.2, 0.3, 0.2, 0.3), positions, strict=True)
    return round(sum((term for term, position in terms if position >= 0), 0.0), 1)


def _present(completion: str) -> float:
    opening, closing = SOLUTION
    if opening not in completion:
        return 0.0
    return 1.0 if closing in completion else 0.3


def _steps(completion: str) -> float:
    block = inside(completion, *REASONING)
    if block is None:
        return 0.1 if completion.strip() else 0.0
    reasoning = block.partition(SOLUTION[0])[0]
    if not reasoning.strip():
        return 0.0
    num_steps = sum(map(_num_steps, {line.strip() for line in reasoning.splitlines()}))
    if num_steps == 0:
        return 0.1
    return 0.4 if num_steps <= 2 else 0.7 if num_steps <= 4 else 1.0


def _num_steps(line: str) -> int:
    num_labels = max(len(_STEP.findall(line)), 1 if _NUMBERED.match(line) else 0)
    return max(num_labels, len(_EQUATION.findall(line)))


def chat(question: str, example: tuple[str, str, str] | None) -> tuple[Mapping[str, str], ...]:
    """The messages of a problem: the system prompt, an example (question, working, answer) if any, the question."""
    turns = [("system", SYSTEM)]
    if example is not None:
        example_question, working, answer = example
        turns += [("user", example_question), ("assistant", completion_of(working, answer))]
    return tuple({"role": role, "content": content} for role, content in [*turns, ("user", question)])


def completion_of(working: str, answer: str) -> str:
    """A completion in the format that Eq. 10 rewards."""
    return f"{REASONING[0]}\n{working}\n{REASONING[1]}\n{answer.join(SOLUTION)}"
