"""The composite reward of Eq. 10 on completions scored by hand."""

import ast
import inspect
import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actor.tasks import TASKS, task_module
from actor.tasks.composite_reward import TAGS, completion_of, read_number, score

FIVE_STEPS = "3 * 12 = 36\n36 - 8 = 28\n28 / 4 = 7\n7 - 2 = 5\n5 + 37 = 42"
W, W_, S, S_ = TAGS


def parts(completion: str, answer: str = "42") -> tuple[float, ...]:
    return tuple(score(completion, answer)[key] for key in ("correct", "format", "present", "steps", "total"))


def test_the_two_examples_of_the_paper() -> None:
    assert parts(completion_of(FIVE_STEPS, "42")) == (4.0, 1.5, 1.0, 1.0, 7.5)
    assert parts("The answer is 42.") == (4.0, 0.0, 0.0, 0.1, 4.1)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("", (-0.5, 0.0, 0.0, 0.0, -0.5)),
        ("I do not know.", (-0.5, 0.0, 0.0, 0.1, -0.4)),
        (completion_of(FIVE_STEPS, "41"), (1.5, 1.5, 1.0, 1.0, 5.0)),
        (completion_of(FIVE_STEPS, "43"), (1.5, 1.5, 1.0, 1.0, 5.0)),
        (completion_of(FIVE_STEPS, "1"), (0.0, 1.5, 1.0, 1.0, 3.5)),
        (completion_of("so it is", "42"), (4.0, 1.5, 1.0, 0.1, 6.6)),
        (completion_of("", "42"), (4.0, 1.5, 1.0, 0.0, 6.5)),
        (completion_of(FIVE_STEPS, ""), (-0.5, 1.5, 1.0, 1.0, 3.0)),  # the 42 of the working is not an answer
        (f"{W}{FIVE_STEPS}", (4.0, 0.2, 0.0, 1.0, 5.2)),
        (f"{FIVE_STEPS}{W_}", (4.0, 0.3, 0.0, 0.1, 4.4)),
        (f"{S}42", (4.0, 0.2, 0.3, 0.1, 4.6)),
        (f"42{S_}", (4.0, 0.3, 0.0, 0.1, 4.4)),
        (f"{W}{S}42", (4.0, 0.4, 0.3, 0.0, 4.7)),
        (f"{S}42{S_}", (4.0, 0.5, 1.0, 0.1, 5.6)),
        (f"{W}x{S_}42", (4.0, 0.5, 0.0, 0.1, 4.6)),
        (f"{W_}{S_}42", (4.0, 0.6, 0.0, 0.1, 4.7)),
        (f"{W}x{W_}{S}42", (4.0, 0.7, 0.3, 0.1, 5.1)),
        (f"{W}x{S}42{S_}", (4.0, 0.7, 1.0, 0.1, 5.8)),
        (f"{W}x{W_}42{S_}", (4.0, 0.8, 0.0, 0.1, 4.9)),
        (f"{S}42{S_}{W}x{W_}", (4.0, 1.0, 1.0, 0.1, 6.1)),  # all four tags, out of order
        (f"{W}x{S}42{W_}{S_}", (4.0, 1.0, 1.0, 0.1, 6.1)),
        (f"{W}x{W_}{S}42{S_}{S}", (4.0, -0.5, 1.0, 0.1, 4.6)),  # a duplicated tag
        (f"{W}{W}x{W_}{S}42{S_}", (4.0, -0.5, 1.0, 0.1, 4.6)),
        (f"{S}41{S_}{S}42{S_}", (4.0, -0.5, 1.0, 0.1, 4.6)),  # the last block counts
        (f"{S}{S}42{S_}{S_}", (4.0, -0.5, 1.0, 0.1, 4.6)),
        (r"we add 40 and 2, so \boxed{42}. That took 2 steps", (4.0, 0.0, 0.0, 0.1, 4.1)),
    ],
)
def test_completions_scored_by_hand(completion: str, expected: tuple[float, ...]) -> None:
    assert parts(completion) == expected


@pytest.mark.parametrize(
    ("reasoning", "steps"),
    [
        (" \n\t", 0.0),
        ("we think about it, 12 pens", 0.1),
        ("x >= 3, y == 4, z != 5, a <= 2", 0.1),
        ("3.5 pens\n2024 was a year", 0.1),
        ("1 + 1 = 2", 0.4),
        ("Step 1: add\nStep 2: add", 0.4),
        ("1. we add\n2) we take\n3: we stop", 0.7),
        ("**Step 1**: 1 + 1 = 2\n**Step 2**: 2 + 2 = $4\n**Step 3**: 1 + 4 = -5", 0.7),  # label and equation: one step
        ("1+1 = 2, 2+1 = 3, 3+1 = 4, 4+1 = 5", 0.7),
        ("1+1 = 2, 2+1 = 3, 3+1 = 4, 4+1 = 5, 5+1 = 6", 1.0),
        ("48/2 = <<48/2=24>>24\n" * 5, 0.4),  # a repeated line counts once, a calculator note once
        ("\n".join(f"{n}. think" for n in range(5)), 1.0),
    ],
)
def test_steps(reasoning: str, steps: float) -> None:
    assert score(completion_of(reasoning, "42"), "42")["steps"] == steps


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"),
        ("$1,234.50.", "1234.5"),
        ("1,234,567", "1234567"),
        (r"\$1\,234", "1234"),
        ("1{,}234", "1234"),
        ("1, 2, 3", "3"),
        ("-$7", "-7"),
        ("$-7", "-7"),
        ("\N{MINUS SIGN}7", "-7"),
        ("x=-7", "-7"),
        ("10-7", "7"),
        ("10 - 7 = 3", "3"),
        ("20%", "20"),
        ("42 km2", "42"),
        ("42 m^2", "42"),
        (".5", "0.5"),
        ("Rs.5", "5"),
        ("٤٢", "42"),
        ("４２", "42"),
        ("1e3", "1000"),
        ("**42**", "42"),
        (r"\text{about }42\text{ pens}", "42"),
        ("1" + "0" * 400, "1" + "0" * 400),
    ],
)
def test_numbers(text: str, number: str) -> None:
    assert read_number(text) == Decimal(number)


@pytest.mark.parametrize(
    "text", ["", "none", "nan", "inf", "-", "$", "1e99999", "1e999999999999999999999999", "9" * 6000]
)
def test_no_numbers(text: str) -> None:
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("value", "answer", "correct"),
    [
        ("90", "100", 1.5),
        ("110", "100", 1.5),
        ("89.99", "100", 0.0),
        ("110.01", "100", 0.0),
        ("-110", "-100", 1.5),
        ("100", "-100", 0.0),
        ("0", "0", 4.0),
        ("-0.0", "0", 4.0),
        ("0.0001", "0", 0.0),  # 10 % of zero is nothing
        ("9007199254740993", "9007199254740992", 1.5),  # equal as floats
        ("0.30", ".3", 4.0),
        ("1" + "0" * 400, "1" + "0" * 400, 4.0),
        ("42", "no number", -0.5),
    ],
)
def test_near_and_exact(value: str, answer: str, correct: float) -> None:
    assert score(f"{S}{value}{S_}", answer)["correct"] == correct


PIECES = [*TAGS, "42", "4.2", "-", "−", "$", ",", ".", "=", "\n", "1e9", "Step 2", "\\boxed{", "}", " "]


@given(
    st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=30).map("".join), st.sampled_from(["42", "0", ""])
)
def test_any_text_has_a_score_of_allowed_terms(completion: str, answer: str) -> None:
    terms = score(completion, answer)
    assert terms["correct"] in (-0.5, 0.0, 1.5, 4.0)
    assert terms["format"] in (-0.5, 0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.5)
    assert terms["present"] in (0.0, 0.3, 1.0)
    assert terms["steps"] in (0.0, 0.1, 0.4, 0.7, 1.0)
    assert terms["total"] == pytest.approx(terms["correct"] + terms["format"] + terms["present"] + terms["steps"])
    assert terms["total"] <= 7.5


@pytest.mark.parametrize(
    "piece", ["1", "1,", "1,111", "= ", "=", "(", "-$", ".", " ", "\n", "step ", "\\boxed{", "e1", S, W]
)
@pytest.mark.parametrize("opening", ["", W, W + "=", "1e"])
def test_a_huge_text_is_scored_fast(piece: str, opening: str) -> None:
    start = time.process_time()
    score(opening + piece * (100_000 // len(piece)) + "x", "42")
    assert time.process_time() - start < 2  # a quadratic pattern takes minutes


@pytest.mark.parametrize("name", TASKS)
def test_no_task_imports_another(name: str) -> None:
    """What tasks share is in composite_reward.py."""
    imported = {
        module
        for node in ast.walk(ast.parse(inspect.getsource(task_module(name))))
        if isinstance(node, ast.ImportFrom)
        for module in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    }
    assert not imported & {f"actor.tasks.{other}" for other in TASKS}
