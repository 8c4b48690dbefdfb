"""Which text is read as the answer, and which answers are equal."""

import pytest

from actor.tasks import math_answer
from actor.tasks.composite_reward import SOLUTION
from actor.tasks.math import verify
from actor.tasks.math_answer import answer_text, clean, last_box, read_as_number

S, S_ = SOLUTION


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{3} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\left\{ 1, 2 \right.} and $x$", r"\left\{ 1, 2 \right."),  # an escaped brace is none
        (r"\fbox {7}", "7"),
        (r"$\boxed{1}$, $\boxed{2}$ and $\boxed{3}$", "1, 2, 3"),
        (r"\boxed{4}. Final answer: \boxed{4}", "4"),
        (r"\boxed{3}, so again \boxed{12", None),  # cut off
        (r"5 \boxed{ }", None),
        (rf"\boxed{{3}} {S} 4 {S_}", "4"),
        (rf"{S}it is \boxed{{5}}{S_} 6", "5"),
        (f"{S}1{S_} {S}$2$.{S_}", "2"),
        (f"7 {S}{S_}", None),
        ("First 4, then 2 * 4 = 8 eggs.", "8"),
        ("The answer is 18, since 2 + 3 = 18.", "18"),
        ("She has $18 and then $2,500.50.", "2,500.50"),
        (r"So $x = 3$ or $x=4$.", "x = 3  or  x=4"),
        (r"Thus \[ x = \frac{1}{2} \]", r"x = \frac{1}{2}"),
        ("It is 1, 2 or 3.", "1, 2 or 3"),
        ("1,234, 5", "1,234, 5"),
        ("After 3 tries **Answer:** Evelyn\nBye", "Evelyn"),
        ("The answer is\n\n**42**", "42"),
        (r"that $f(n) = f(n-1) \cdot q(n-1", None),  # cut off
        ("it is 8: not 2x, 1.5x, 2^5 or f(3)", "8"),
        ("x=-3", "-3"),
        ("The answer is 1 1/2.", "1 1/2"),
        (r"\boxed{\left\{ x \right .}", r"\left\{ x \right ."),
        (r"\boxed{7 .}", "7"),
        ("**60**%", "60"),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_text_that_is_read_as_the_answer(completion: str, answer: str | None) -> None:
    assert answer_text(completion) == answer


EQUAL = [
    ("42", "42"), ("-5", "−5"), ("1000", "1,000"), ("1,234.5", "1234.50"), ("1000000", r"1\times 10^6"),
    ("18", r"\$18"), ("18", "18 dollars"), ("18", r"18\text{ eggs}"), ("5.4 \\text{ cents}", "5.4"),
    (r"\$18.90", "18.9"), (r"\frac{3}{4}", "3/4"), (r"\frac34", "0.75"), (r"\frac{1}{3}", "0.333333"),
    (r"3\frac12", "3.5"), ("0.5", r"50\%"), (r"50\%", "50"), ("106^\\circ", "106"), ("2516_8", "2516_{8}"),
    (r"2\sqrt{3}", r"\sqrt{12}"), ("(x+1)^2", "x^2+2x+1"), ("x=5", "5"), ("y=2x+3", "2x + 3"),
    ("x-2y+1=0", "4y-2x-2=0"), ("6-5i", "-5i+6"), (r"1-\frac{1}{\mathrm{e}}", r"1 - 1/e"), ("[1,2)", r"x \in [1, 2)"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty,2)"), ("1,-2", r"\{-2, 1\}"), ("3, 5, 7", "7, 5 and 3"),
    (r"1\pm\sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"), ("(3, \\frac{\\pi}{2})", r"\left(3,\pi/2\right)"),
    (r"\begin{pmatrix}1\\(2)\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"), (r"\text{Evelyn}", "evelyn"),
    (r"\text{(C)}", "C"), (r"\text{east}", r"\mathrm{East}"), ("240", r"2 \cdot 5! = 2 \cdot 120 = 240"),
    ("58,500", r"26 \times 2,250=58,\!500"), ("(8,-2)", "P = (x, y) = (8, -2)"), ("x=5", "5 = x"), ("5", "x = y = 5"),
    ("3/2", "1 1/2"), ("1 1/2", "1.5"), ("-3/2", "-1 1 / 2"), (r"1\frac12", "1 1/2"), ("3 x + 1", "3x+1"),
    ("58500", "58 500"), ("58 500", "58,500 euros"), ("6", "6 times"), ("2 3", "2 3"),
]  # fmt: skip

UNEQUAL = [
    ("42", "-42"), ("42", "42.1"), ("18", "18 thousand"), ("2", r"2\pi"), ("2", "2 pi"), (r"\frac{1}{3}", "0.33"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"), ("0.0000672", "0.0000670"), ("2516_8", "1358"), ("x+1", "x-1"),
    ("x=5", "y=5"), ("(1,2)", "[1,2]"), ("(1,2)", "(2,1)"), ("1,2", "1"), ("2", "1,2"),
    (r"1\pm\sqrt{19}", r"1+\sqrt{19}"), ("2021", r"\pm 2021"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"1-\frac{1}{\mathrm{e}}", r"1-\frac{1}{\mathrm{2}}"), (r"\text{Evelyn}", "Eve"), ("stop", "post"),
    (r"\text{even}", "odd"), (r"\text{(C)}", "D"), ("3", r"\text{}"), ("3", "}{"),
    ("5", "x = 1, y = 5"), ("5", "x = 1 or x = 5"), ("5", "x >= 5"), ("y=x", "z=x"), ("5", "5 ="), ("5", "x = "),
    ("11/2", "1 1/2"), ("1 1/2", "11/2"), ("23", "2 3"), ("5", "2 3"), ("558", "58 500"), ("3", "3 quarters"),
    ("3", "3 halves"), ("1", "1 half"), ("2", "2 thirds"), ("2", "2 fifths"), ("5", "5 squared"), ("5", "5 cubed"),
    ("2", "2 millions"), ("10", "10 minus"), ("10", "10 plus"), ("5", "5 times six"),
]  # fmt: skip


@pytest.mark.parametrize(("truth", "given"), EQUAL)
def test_equal_answers(truth: str, given: str) -> None:
    assert verify(f"so \\boxed{{{given}}}.", truth) is True
    assert verify(f"{S}{given}{S_}", truth) is True


@pytest.mark.parametrize(("truth", "given"), UNEQUAL)
def test_unequal_answers(truth: str, given: str) -> None:
    assert verify(f"so \\boxed{{{given}}}.", truth) is False
    assert verify(f"{S}{given}{S_}", truth) is False


@pytest.mark.parametrize(
    "completion",
    [
        r"\boxed{1, 2, 3, 4, 5, 6}",
        r"\boxed{1 \quad 2 \quad 3}",  # side by side they would be their product
        r"\boxed{5}, \boxed{6}",
        r"\boxed{5} and \boxed{6}",
        r"\boxed{5 \text{ or } 6}",
        f"{S}5, 6{S_}",
        f"{S}5 or 6{S_}",
        "The answer is 4, 5 or 6.",
        "The answer is $5$ or $6$.",
        r"\boxed{6}, or else \boxed{7}",  # the last one counts
        r"The answer is 6. \boxed{",
    ],
)
def test_several_answers_are_not_correct_by_chance(completion: str) -> None:
    assert verify(completion, "6") is False


@pytest.mark.parametrize("answer", ["", " $$ ", "12:00", r"\begin{"])
def test_a_true_answer_that_cannot_be_read_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="true answer"):
        verify(r"\boxed{7}", answer)


def test_an_error_of_math_verify_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not taken for an incorrect answer, which is what math-verify does with its own errors unless told otherwise."""

    def broken(*_: object) -> bool:
        raise ArithmeticError("broken")

    monkeypatch.setattr("math_verify.grader.sympy_expr_eq", broken)
    with pytest.raises(ArithmeticError, match="broken"):
        verify(r"\boxed{x}", "y")


def test_reading_is_linear_in_the_text() -> None:
    """Within the time limit of the tests; quadratic reading of these would take hours."""
    for piece in (r"\boxed{", r"\boxed{}", "$", r"\[", "1,", "answer is ", "{", " ", "\n", " .", "1 "):
        answer_text(piece * 200_000)
        last_box(rf"\boxed{{1}}{piece * 200_000}x\boxed{{2}}")
        clean(f"1{piece * 200_000}x")
        read_as_number(f"1{piece * 200_000}x")
    assert last_box(r"\boxed{1}" * 100_000) == "1"


def test_only_the_end_of_a_text_is_searched_for_its_last_expression() -> None:
    assert answer_text("7 " + "words " * math_answer.TAIL) is None
