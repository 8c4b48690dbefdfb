"""Bad input of every kind, and what a command makes of it: status, stdout, stderr, within a time limit."""

import contextlib
import io
import json
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args, get_origin

import tomli_w
from hypothesis import strategies as st

from common.config import Config, options

SECONDS = 120  # that one input may take, on a machine with other work
OPTIONS = sorted(options())
NASTY = [
    *("", " ", "-", "--", "=", "0", "1", "-1", "2", "true", "null", "None", "nan", "inf", "-inf", "1e999", "1e-320"),
    *("1.5", "0x10", "1_0", "٣", "9" * 30, "-" + "9" * 30, "9" * 5000, str(2**31), str(2**63), str(2**64), "1e5"),
    *("[]", "{}", "[1]", '["a"]', '[""]', "[null]", '{"a": null}', '{"a": [1, {"b": NaN}]}', '{"a": "\\ud800"}'),
    *('"', "'", '"""', "[" * 2000, "{" * 2000, "[" * 2000 + "]" * 2000, '{"a":' * 2000 + "1" + "}" * 2000),
    *("\0", "a\0b", "a\nb", "\r", "\x1b[31m", "\u2028", "ü", "🙂", "\ud800", "\udcff", "a" * 300, "a/" * 3000),
    *(
        ".",
        "..",
        "/",
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        "/no/such",
        "~",
        "C:\\x",
        ".x",
        "x.",
        "a..b",
        "os.path",
    ),
    *("math.sqrt", "json", "__main__", "grpo", "sa-ah-grop", "auto", "gsm8k", "q_proj", "q_proj,", ",", "a,b", "a=b"),
    *("--run.steps", "--help", "<b>", "%s", "{0}", "$(id)", "1979-05-27", "1979-05-27T07:32:00Z"),
]
TOML = [
    *(
        "x = 1\n",
        "[run]\n",
        "[[run]]\n",
        "run = 3\n",
        "[run.steps]\n",
        "[grid]\n",
        "[scale.cpu]\n",
        "x = " + "[" * 3000,
    ),
    *(
        "x = " + "{a=" * 3000,
        "a" + ".a" * 3000 + " = 1\n",
        "run.x" + ".a" * 3000 + " = 1\n",
        "[x" + ".a" * 3000 + "]\n",
    ),
    *("task.gym_options.x" + ".a" * 3000 + " = 1\n", "x = " + "9" * 5000 + "\n", "x = 1979-13-45\n", "x = nan\n"),
    *('base = "{name}"\n', 'base = ""\n', 'base = "."\n', 'base = "none.toml"\n', 'base = "/dev/zero"\n', "base = 1\n"),
    *(
        'base = "/dev/null"\n',
        'base = "\\u0000"\n',
        f'base = "{"x" * 300}"\n',
        'base = ["a"]\n',
        '"" = 1\n',
        "'a\\nb' = 1\n",
    ),
    *("\ufeff", "\0", "\r", "x = '\ud800'", 'x = "\\ud800"', "[method]\n", '[task]\nname = "x.y"\n', "= 1\n", "[]\n"),
]
TOKEN = re.compile(rb'-?\d[\d.e+-]*|"[^"\n]*"|true|false|null|nan|[\[\]{}:,=\n]')

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(NASTY),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def near(draw: st.DrawFn, names: Sequence[str]) -> str:
    """One of the names, or one with an edit."""
    name = draw(st.sampled_from(names))
    at = draw(st.integers(0, len(name)))
    edit = draw(st.sampled_from(["", "", "", "", "", "cut", "drop", "add", "swap", "upper", "dash"]))
    return {
        "": name,
        "cut": name[:at],
        "drop": name[:at] + name[at + 1 :],
        "add": name[:at] + draw(st.sampled_from(NASTY)) + name[at:],
        "swap": name[:at] + name[at:][::-1],
        "upper": name.upper(),
        "dash": name.replace("_", "-"),
    }[edit]


SIZES = ["1", "2", "3", "8", "32", "1000", "32768", str(10**6), str(2**31 - 1), str(2**31), str(10**12), str(10**19)]
SHARES = ["0.001", "0.5", "0.999", "1.0", "1e-300", "1e300", "-0.5", "40", "1e9"]


def fitting(name: str) -> list[str]:
    """Values of the type of the option section.key."""
    section, key = name.split(".")
    annotation = Config.model_fields[section].annotation.model_fields[key].annotation
    kinds = [kind for each in (annotation, *get_args(annotation)) for kind in (each, *get_args(each))]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    found = ["true", "false"] if bool in kinds else []
    found += SIZES if int in kinds else []
    found += SHARES if float in kinds else []
    found += (
        ["q_proj", "q_proj,v_proj", '["q_proj", "lm_head"]', '["", "x"]'] if tuple in map(get_origin, kinds) else []
    )
    return found or [
        '{"min_terms": 2}',
        '{"max_terms": null}',
        "chain_sum",
        "leg_counting",
        "group_std",
        "model",
        "gsm8k",
    ]


fitted = st.sampled_from(OPTIONS).flatmap(lambda name: st.tuples(st.just(f"--{name}"), st.sampled_from(fitting(name))))
values = st.sampled_from(NASTY) | anything.map(lambda value: json.dumps(value)) | st.text(max_size=12)


def arguments(names: Sequence[str], most: int = 4) -> st.SearchStrategy[list[str]]:
    """Options with values: `--a b`, `--a=b`, `--a`, `--no-a`, and words that are no options."""
    option = near(names)
    typed = fitted if OPTIONS[0] in names else st.tuples(st.sampled_from(names).map("--{}".format), values)
    word = st.one_of(
        typed,
        typed,
        typed,
        typed,
        typed,
        st.tuples(option.map("--{}".format), values),
        st.tuples(option, values).map(lambda both: (f"--{both[0]}={both[1]}",)),
        st.tuples(option.map("--{}".format)),
        st.tuples(option.map("--no-{}".format)),
        st.tuples(values),
    )
    return st.lists(word, max_size=most).map(lambda words: [part for each in words for part in each])


@st.composite
def mutated(draw: st.DrawFn, data: bytes, nasty: Sequence[str] = NASTY) -> bytes:
    """`data` with a token exchanged, a part removed, repeated or put in, or other bytes altogether."""
    for _ in range(draw(st.integers(1, 2))):
        found = list(TOKEN.finditer(data)) or [re.match(b"", data)]
        token = draw(st.sampled_from(found))
        start, end = draw(st.sampled_from([token.span(), token.span(), (token.start(), len(data))]))
        new = draw(st.sampled_from(["exchange", "exchange", "exchange", "remove", "repeat", "bytes", "all"]))
        if new == "all":
            return draw(st.binary(max_size=60))
        part = {
            "exchange": _encoded(draw(st.sampled_from(nasty) | anything.map(json.dumps))),
            "remove": b"",
            "repeat": data[start:end] * 2,
            "bytes": draw(st.binary(max_size=8)),
        }[new]
        data = data[:start] + part + data[end:]
    return data


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")


@st.composite
def tomls(draw: st.DrawFn) -> bytes:
    """A TOML file: options with any values, then perhaps lines that do not belong; or any bytes."""
    kind = draw(st.sampled_from(["tables", "tables", "tables", "lines", "bytes"]))
    if kind == "bytes":
        return draw(st.binary(max_size=80))
    lines = [_encoded(line) for line in draw(st.lists(st.sampled_from(TOML), max_size=2))]
    if kind == "lines":
        return b"".join(lines)
    tables: dict = {}
    for name in draw(st.lists(near(OPTIONS), max_size=4)):
        section, _, key = name.partition(".")
        tables.setdefault(section, {})[key] = draw(anything.filter(lambda value: "null" not in json.dumps(value)))
    with contextlib.suppress(UnicodeEncodeError):
        lines.append(tomli_w.dumps(tables).encode())
    data = b"".join(draw(st.permutations(lines)))
    return draw(mutated(data, TOML)) if draw(st.booleans()) else data


_handle = signal.signal  # local_run.install replaces it


class TooSlow(BaseException):
    """An input took longer than SECONDS."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlow

    before = _handle(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        _handle(signal.SIGALRM, before)


def outcome(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr, which are as strict about their encoding as a terminal's."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limited():
        try:
            status = main(list(argv))
        except SystemExit as left:  # --help
            status = left.code if isinstance(left.code, int) else 1
    return status, *(each.buffer.getvalue().decode() for each in (out, err))


def check(main: Callable[[Sequence[str]], int], argv: Sequence[str], failing: Sequence[int] = (2,)) -> int:
    """Run a command; a failure is a status of `failing` and one line, a success is silent on stderr."""
    status, _, err = outcome(main, argv)
    assert status in (0, *failing), (status, err)
    assert err.count("\n") == (1 if status else 0), err
    assert "Traceback" not in err
    assert err.isprintable() or err[:-1].isprintable(), err
    assert len(err) < 10_000
    return status
