"""GSM8K: grade-school word problems, and the composite reward of arXiv 2606.05434 (section 3.4, Eq. 10).

What the paper leaves open is read as follows [R]:

- Numbers: digits of any script, with `1,234` groups, decimals, an exponent, a sign (ASCII or U+2212), and a currency
  sign, a percent sign or units around them, which do not count. The last number of a text is its answer.
- The answer is the last number inside <SOLUTION>. A solution without a number has no answer. Where there is no
  <SOLUTION>, it is the number of the last `\\boxed{...}`, or else the last number of the whole text.
- Of several blocks the last one counts; a block that is never closed reaches to the end of the text.
- "Within 10 %" includes the bound, and leaves no partial credit where the true answer is 0.
- "Well formed": each tag once, in the order of TAGS.
- A step is a label ("Step 2", "2." or "2)" at the start of a line) or an equation ("=" before a number). A line counts
  its labels or its equations, whichever are more; a repeated line counts once. Text outside the reasoning tags is
  reasoning without steps.
"""

import json
import random
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

from common.config import TaskConfig
from common.types import Prompt, Score, UserError

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
"""The worked example: question, working, answer."""

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

    Returns its four terms `correct`, `format`, `present`, `steps`, and their sum `total`. Never raises:
    whatever holds no number is an absent answer, also as the true answer.
    """
    parts = {"correct": correctness(read_answer(completion), read_number(answer)), **style(completion)}
    return {**parts, "total": round(sum(parts.values()), 1)}


def style(completion: str) -> dict[str, float]:
    """The terms of Eq. 10 that do not look at the answer: `format`, `present` and `steps`."""
    return {"format": _format(completion), "present": _present(completion), "steps": _steps(completion)}


def correctness(value: Decimal | None, truth: Decimal | None) -> float:
    """The first term of Eq. 10: 4.0 exact, 1.5 within 10 % of the truth, 0.0 wrong, -0.5 absent or unparseable."""
    if value is None or truth is None:
        return -0.5
    if value == truth:
        return 4.0
    return 1.5 if 10 * abs(value - truth) <= abs(truth) else 0.0


def read_answer(completion: str) -> Decimal | None:
    """The number that a completion gives as its answer; None: it gives none."""
    solution = inside(completion, *SOLUTION)
    if solution is not None:
        return read_number(solution)
    boxed = _BOXED.findall(completion)
    return read_number(boxed[-1] if boxed else completion)


def read_number(text: str) -> Decimal | None:
    """The last number of a text; None where there is none, or none of fewer than 5000 digits."""
    text = text.translate(_PLAIN).replace("{,}", ",").replace("\\", "")
    match = max(_NUMBER.finditer(text), key=lambda found: found.start(), default=None)
    if match is None:
        return None
    sign = "-" if "-" in (match["sign"], match["inner"]) else ""
    try:
        value = Decimal(sign + match["digits"].replace(",", "") + (match["exponent"] or ""))
    except InvalidOperation:  # an exponent that Decimal cannot hold
        return None
    return value if abs(value.adjusted()) < 5000 else None  # beyond, differences could overflow


def inside(text: str, opening: str, closing: str) -> str | None:
    """What the last block between two tags holds; None: the opening tag is absent."""
    end = text.rfind(closing)
    start = text.rfind(opening, 0, end) if end >= 0 else -1
    if start < 0:  # no closed block
        start, end = text.rfind(opening), len(text)
    return text[start + len(opening) : end] if start >= 0 else None


def _format(completion: str) -> float:
    places = [completion.find(tag) for tag in TAGS]
    if any(completion.count(tag) > 1 for tag in TAGS):
        return -0.5
    if places[0] >= 0 and places == sorted(places):
        return 1.5
    terms = zip((0.2, 0.3, 0.2, 0.3), places, strict=True)
    return round(sum((term for term, place in terms if place >= 0), 0.0), 1)


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


def reward(completion: str, prompt: Prompt) -> Score:
    """The composite reward of a completion of a prompt; correct is the exact answer."""
    parts = score(completion, prompt.answer)
    return Score(total=parts.pop("total"), correct=parts["correct"] == 4.0, parts=parts)


def load(task: TaskConfig, split: Literal["train", "eval"]) -> list[Prompt]:
    """`task.num_train` (`task.num_eval`) problems of the train (test) split, drawn by `task.seed` without replacement.

    A larger number extends a smaller draw, and neither split depends on the other. Raises UserError for data that
    cannot be read, for a bad row, and for fewer rows than asked.
    """
    name, wanted = ("train", task.num_train) if split == "train" else ("test", task.num_eval)
    rows = _rows(task.data, name)
    if len(rows) < wanted:
        raise UserError(
            f"task.num_{split}={wanted} exceeds the {len(rows)} {name} problems of task.data={task.data}; lower it"
        )
    random.Random(task.seed).shuffle(rows)
    example = EXAMPLE if task.example else None
    return [
        Prompt(messages=chat(question, example), answer=answer, index=index)
        for index, (question, answer) in enumerate(rows[:wanted])
    ]


def chat(question: str, example: tuple[str, str, str] | None) -> tuple[Mapping[str, str], ...]:
    """The messages of a problem: the tags explained, an example (question, working, answer) if any, the question."""
    turns = [("system", SYSTEM)]
    if example is not None:
        asked, working, answer = example
        turns += [("user", asked), ("assistant", completion_of(working, answer))]
    return tuple({"role": role, "content": content} for role, content in [*turns, ("user", question)])


def completion_of(working: str, answer: str) -> str:
    """A completion in the format that Eq. 10 rewards."""
    return f"{REASONING[0]}\n{working}\n{REASONING[1]}\n{answer.join(SOLUTION)}"


def _rows(data: str | None, name: str) -> list[tuple[str, str]]:
    """(question, answer) of every row of the split `name` of a folder or a hub data set."""
    if not data:
        raise UserError("task.data is not set; name a folder with train.jsonl and test.jsonl, or openai/gsm8k")
    if not Path(data).is_dir():
        return [_row(row, f"{data}[{name}] row {number}") for number, row in enumerate(_hub_rows(data, name), start=1)]
    path = Path(data) / f"{name}.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); task.data needs train.jsonl and test.jsonl"
        ) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # ValueError: not JSON, or not UTF-8
                raise UserError(f"{path}:{number} is not JSON; correct or remove the line") from None
            rows.append(_row(row, f"{path}:{number}"))
    if not rows:
        raise UserError(f"{path} is empty; task.data needs one JSON object a line with question and answer")
    return rows


def _hub_rows(data: str, name: str) -> Iterable[Any]:
    import datasets  # heavy, and only needed for the hub

    try:
        return datasets.load_dataset(data, "main", split=name)
    except Exception as error:  # noqa: BLE001 (the hub's client and transports raise many unrelated types)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"task.data={data} is no folder and could not be loaded from the hub ({reason}); "
            "name a folder with train.jsonl and test.jsonl, or openai/gsm8k"
        ) from None


def _row(row: Any, where: str) -> tuple[str, str]:
    """Question and final answer of a row of GSM8K: {"question": "...", "answer": "... #### 42"}."""
    for key in ("question", "answer"):
        if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{where} has no {key}; give each row a question and an answer that ends in '#### 42'")
    _, mark, answer = row["answer"].rpartition("####")
    if not mark or read_number(answer) is None:
        raise UserError(f"{where}: the answer has no number after '####'; end it in '#### 42'")
    return row["question"], answer.strip()
