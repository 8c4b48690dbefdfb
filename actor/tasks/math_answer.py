r"""Reads the answer that a completion gives, and compares it with the true one by math-verify.

What is read as the answer, the first of these that the completion has:

1. The last `<SOLUTION>` block; of a block with a `\boxed{}` only the box.
2. The last `\boxed{}`. Boxes that only commas, "and" or "or" separate are one list. If the last box is not closed, the
   completion was cut off inside it and has no answer.
3. The last number or `$formula$` after the last "answer is" or "answer:", or of the whole text without one; those that
   commas, "and" or "or" join to it are one list with it.
4. The words after the last "answer is" or "answer:".

An answer counts as a whole: a list equals a list of the same length, so an answer that names several candidates is
incorrect where one is asked for. Of an equation, or a chain of them, the right side counts, unless the true answer is
an equation, too.

Two answers are equal if one of these holds:

- They are the same number, whatever currency sign, thousands separators and unit they have.
- They are the same text, but for case, spaces (those between the digits of two numbers count) and `\text{}`. A word is
  compared in this way alone.
- math-verify finds them equal: numbers to six decimals (1/3 and 0.333333), expressions after simplifying, sets,
  intervals, tuples, equations, matrices. It ignores units and case, and takes 50 % for 50 and for 0.5. Numbers must
  also agree to RELATIVE_TOLERANCE, since it takes any two tiny ones for equal. 1 1/2 is a mixed number; other numbers
  side by side cannot be read.

math-verify hangs on towers of powers and raises on some inputs. Its own time-outs use signals, which work in a main
thread alone, so they are off: call it in a process that has a time-out (actor/reward_pool.py).
"""

import logging
import re
from collections.abc import Iterator
from decimal import Decimal

from math_verify import LatexExtractionConfig
from math_verify import parse as parse_by_math_verify
from math_verify import verify as verify_by_math_verify
from sympy import Basic, MatrixBase, UnevaluatedExpr, nan, zoo

from actor.tasks.composite_reward import SOLUTION, inside, read_number

RELATIVE_TOLERANCE = 1e-5  # what six decimals are for numbers from 0.1 on; exact numbers are compared exactly
TAIL = 2000  # characters at the end of a completion in which its last expression is looked for
LATEX = [LatexExtractionConfig(boxed_match_priority=0)]
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+"
_ITEM = (  # a formula, or a number that is no part of n-1 or 2x
    r"(?:\$\$[^$]+\$\$|(?<![\\\d])\$(?:\\\$|[^$\n])+(?<!\\)\$|\\\([^\n]+?\\\)|\\\[.+?\\\]"
    rf"|(?<![^\s=:*~≈,;{{>$])[-+−]?[$€£]?(?:\d+\s(?=\d+\s?/))?(?:{_DIGITS})(?:\s?/\s?\d+)?(?![\w^]|\.\d)(?:\s?\\?%)?)"
)
_LIST = re.compile(rf"{_ITEM}(?:\s*(?:,|;|,?\s*\b(?:and|or)\b)\s*{_ITEM})*", re.DOTALL)
_ANNOUNCED = re.compile(r"\banswer(?:\s+is\b|\s*:)[\s:*]*", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(r"[\s$.,;]*+(?:\\text\s*+\{\s*+)?+(?:\b(?:and|or)\b)?+[\s$}]*+")
_DELIMITERS = re.compile(r"(?<!\\)(?:\\[()\[\]]|\$)|\*\*")  # but not the \\[ between a matrix's rows
_QUAD = re.compile(r"\\q?quad\b")
_LIST_SIGN = re.compile(r",(?!\d{3}(?!\d))|;|\b(?:and|or)\b")
_PARENTHESES = re.compile(r"\([^()]*\)")
_THIN_SPACE = re.compile(r"(?<=\d)(?:,?\\!|\\,|\{,\})\s?(?=\d{3})")  # between thousands
_TEXT = re.compile(r"\\(?:text|textbf|textrm|textit|textnormal|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_UPRIGHT_CONSTANT = re.compile(r"\\(?:mathrm|text)\{([ei])\}")  # math-verify takes \mathrm{} for a unit
_SPACE = re.compile(r"(?<!\d) | (?!\d)")  # but not the one in 2 3 or 1 1/2
_THOUSANDS = re.compile(r"(?<=\d) (?=\d{3}(?!\d))")
_SIDE_BY_SIDE = re.compile(r"\d\s+\.?\d")
_MIXED = re.compile(r"(?<![\w.,/^{])(\d+)\s+(\d+)\s?/\s?(\d+)(?![\w.^])")
_WORDS = re.compile(r"[^\W\d_]{3,}(?:[\s-]+[^\W\d_]+)*")
_NUMBER = re.compile(rf"[-+−]?(?:\\?[$€£])?[-−]?(?:{_DIGITS})(?:[eE][-+]?\d+)?(?P<unit>(?:\s+[^\W\d_]{{3,}}){{0,3}})")
_NO_UNITS = {  # nor with an s at the end
    *("and", "plus", "minus", "percent", "sqrt", "squared", "cubed", "factorial", "dozen"),
    *("hundred", "thousand", "million", "billion", "trillion", "hundredth", "thousandth"),
    *("half", "halves", "third", "quarter", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"),
}


def answer_text(completion: str) -> str | None:
    """The text that a completion gives as its answer, without the signs around it; None if it gives none."""
    solution = inside(completion, *SOLUTION)
    text = completion if solution is None else solution
    if _BOX.search(text):
        return clean(last_box(text))
    if solution is not None:
        return clean(solution)
    tail = completion[-TAIL:]
    announcements = list(_ANNOUNCED.finditer(tail))
    after = tail[announcements[-1].end() :] if announcements else tail
    *_, last = [None, *(match[0] for match in _LIST.finditer(after))]
    return clean(last or after.partition("\n")[0]) if last or announcements else None


def clean(text: str | None) -> str | None:
    """An answer without delimiters of formulas, stars and a full stop around it; None if nothing is left."""
    text = _QUAD.sub(",", _DELIMITERS.sub(" ", _THIN_SPACE.sub("", text or ""))).strip(" \t\n,;:")
    stopped = text[:-1].rstrip() if text.endswith(".") else text
    return (text if stopped.endswith("\\right") else stopped) or None


def last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{}`, with those that form a list with it; None if the last one is not closed."""
    boxes = list(_closed_boxes(text))
    if not boxes or _BOX.search(text, boxes[-1][1]):
        return None
    start, _, content = boxes.pop()
    contents = [content]
    for before, end, content in reversed(boxes):
        if not _BETWEEN_BOXES.fullmatch(text, end, start):
            break
        contents.append(content)
        start = before
    return ", ".join(dict.fromkeys(reversed(contents)))  # the same box twice is one answer


def _closed_boxes(text: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and content of each outermost box, up to one that is not closed."""
    position = 0
    while box := _BOX.search(text, position):
        depth = 1
        for brace in _BRACE.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if not depth:
                position = brace.end()
                yield box.start(), position, text[box.end() : position - 1]
                break
        else:
            return


def equal(given: str, truth: str) -> bool:
    """Whether an answer equals the true one, whose form decides how the other is understood; both cleaned.

    Raises ValueError if the true answer cannot be read, and what math-verify raises while it compares. May not return.
    """
    if "=" not in truth:
        given = _right_side(given)
    if _SPACE.sub("", _plain(given)) == _SPACE.sub("", _plain(truth)):
        return True
    number = read_as_number(truth)
    if number is not None and read_as_number(given) == number:
        return True
    if _WORDS.fullmatch(_plain(truth)):
        return False
    true, value = _parsed(truth), _parsed(given)
    if true is None:
        raise ValueError(f"math-verify cannot read the true answer {truth}")
    if value is None or not verify_by_math_verify(true, value, timeout_seconds=None, raise_on_error=True):
        return False
    return not _differ(true, value)


def _right_side(text: str) -> str:
    """What an equation or a chain of them comes to; a list of equations stays as it is."""
    left, sign, right = text.rpartition("=")
    is_list = _LIST_SIGN.search(_PARENTHESES.sub("", left))
    return text if not sign or left[-1:] in ("<", ">", "!", ":") or is_list else right.strip() or text


def read_as_number(text: str) -> Decimal | None:
    """The number that `text` is, without currency sign and unit; None for anything else, a percentage included."""
    match = _NUMBER.fullmatch(_THOUSANDS.sub("", _plain(text)))
    units = match["unit"].split() if match else []
    if match is None or "times" in units[:-1] or any(_NO_UNITS & {unit, unit.removesuffix("s")} for unit in units):
        return None
    return read_number(match[0])


def _plain(text: str) -> str:
    r"""A text without case, `\text{}` and double spaces."""
    return " ".join(_TEXT.sub(r" \1 ", text).casefold().split())


def _parsed(text: str) -> Basic | MatrixBase | None:
    """What math-verify reads; None if it can read nothing, or something undefined, as the division in 12:00."""
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", _UPRIGHT_CONSTANT.sub(r"\1", text))
    if "\\" not in text and _SIDE_BY_SIDE.search(text):  # math-verify takes 2 3 for 5
        return None
    found = parse_by_math_verify(f"\\boxed{{{text}}}", LATEX, "no_fallback", "first_match", None, raise_on_error=True)
    return None if not found or found[0].has(nan, zoo) else found[0]


def _differ(true: Basic | MatrixBase, value: Basic | MatrixBase) -> bool:
    """Whether two numbers that are equal to six decimals differ by more than RELATIVE_TOLERANCE."""
    for number in (true, value):
        if not getattr(number, "is_number", False) or number.has(UnevaluatedExpr):  # a percentage has that
            return False
    return true != value and bool(abs((true - value).evalf()) > RELATIVE_TOLERANCE * abs(true.evalf()))
