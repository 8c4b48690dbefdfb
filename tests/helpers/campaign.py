"""Kills processes of runs at random moments, and compares each run's numbers with those of an unbroken one.

python tests/helpers/campaign.py --kills 100 [--seed 1] [--out FILE.json]

A learner rank, an actor or a reward worker is replaced within its run. After the loss of the driver or of Ray the run
is resumed. Prints a table, and one JSON object as the last line. Exit status 0: every run is equal, nothing is left.
"""

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from broken_run import FIRST_SECONDS, RESTARTED, SPARE_SECONDS, STEP, WORKERS, BrokenRun, Kill, nothing_left
from local_run import comparable
from rich.console import Console
from rich.table import Table
from small_model import save_model

from common.process import adopt_orphans

STEPS = 60
OPTIONS = [
    *("--model.dtype", "float32", "--model.lora_dropout", "0.3", "--task.name", "letters", "--task.num_train", "8"),
    *("--task.num_eval", "2", "--run.steps", str(STEPS), "--run.prompts_per_step", "2", "--run.evaluate_every", "4"),
    *("--run.checkpoint_every", "4", "--run.sample_every", "0", "--learner.learning_rate", "1e-3"),
    *("--actor.group_size", "2", "--actor.max_tokens", "8", "--actor.part_prompts", "1"),
]
ONE, TWO = "one learner, one actor", "two learner ranks, two actors"
CONFIGURATIONS = {
    ONE: [],
    TWO: ["--learner.num_ranks", "2", "--learner.gradient_accumulation", "2", "--actor.num_actors", "2"],
}
RESTARTS = 0.1  # the fraction of the kills that end the run
KILLS_OF_A_RUN = 12
MAX_PROBLEMS = 3  # then the campaign stops: each is to be looked at
LOST = re.compile(r"(?:the )?(learner|actor).* was lost \((\w+)\); replaced in ([\d.]+) s")


@dataclass(kw_only=True)
class Outcome:
    """What became of one run."""

    folder: Path
    kills: list[Kill] = field(default_factory=list)
    lines: list[tuple[float, str]] = field(default_factory=list)  # printed, with time.monotonic
    left: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)  # how it ended at each kill that ends a run
    problem: str | None = None  # None: it has finished, with equal numbers


def play(folder: Path, options: Sequence[str], kinds: Sequence[str], number: int, **attack: Any) -> Outcome:
    """A run that is attacked until it has finished; one whose driver or Ray is killed is resumed and attacked again."""
    outcome = Outcome(folder=folder)
    ray_folder = folder.parent / "ray"
    while True:
        remaining = number - len(outcome.kills)
        with nothing_left(ray_folder) as left:
            resume = ["--run.resume"] if outcome.kills else []
            run = BrokenRun([*options, *resume], ray_folder, folder.with_suffix(".log"))
            kills = run.attack(kinds, min(remaining, 1) if kinds == RESTARTED else remaining, **attack)
            status = run.end()
        outcome.kills += kills
        outcome.lines += run.lines
        outcome.left += left + [path for path in run.segments if Path(path).exists()]
        if kinds != RESTARTED or not kills or not status:
            break
        trace = any(line.startswith("Traceback") for _, line in run.lines)
        outcome.ends.append(f"{kills[0].kind}: status {status}{', a traceback' if trace else ''}")
    if status != 0:
        outcome.problem = "hangs" if status is None else f"ended with status {status}: {run.lines[-1][1]}"
    return outcome


def contents(folder: Path) -> Iterator[tuple[str, Any]]:
    """What must be equal in two runs, by name: lines without clocks, the tensors of the last checkpoint as bytes."""
    for name in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl"):
        for number, line in enumerate((folder / name).read_text().splitlines(), start=1):
            record = comparable(json.loads(line))
            numbers = {key: value for key, value in record.items() if not key.startswith("recovery/")}
            yield f"{name}:{number}", json.dumps(numbers)  # as text: NaN is then equal to NaN
    for path in sorted((folder / "checkpoints" / f"step-{STEPS:06d}").glob("*.safetensors")):
        yield path.name, path.read_bytes()


def difference(folder: Path, expected: dict[str, Any]) -> str | None:
    """The first name whose content differs; None if all are equal."""
    got = dict(contents(folder))
    names = [name for name in [*expected, *got] if got.get(name) != expected.get(name)]
    return f"differs at {names[0]}" if names else None


@dataclass
class Row:
    """The kills of one kind."""

    kills: int = 0
    equal: int = 0
    recovery: list[float] = field(default_factory=list)  # seconds from the kill until it is replaced, or steps again
    replacing: list[float] = field(default_factory=list)  # seconds of them from the detection on

    def numbers(self) -> dict[str, Any]:
        numbers: dict[str, Any] = {"kills": self.kills, "equal": self.equal}
        for name, seconds in (("recovery", self.recovery), ("replacing", self.replacing)):
            if seconds:
                numbers[f"{name}_seconds"] = [round(statistics.median(seconds), 1), round(max(seconds), 1)]
        return numbers


def count(rows: dict[str, Row], outcome: Outcome) -> None:
    """Add the kills of a run to the rows of their kinds, with the next line that says that one such is replaced."""
    lost = [(moment, match) for moment, line in outcome.lines if (match := LOST.match(line))]
    steps = [moment for moment, line in outcome.lines if STEP.match(line)]
    for kill in outcome.kills:
        row = rows.setdefault(f"{kill.kind} {kill.how}", Row())
        row.kills += 1
        row.equal += outcome.problem is None
        replaced = [(moment, match) for moment, match in lost if moment > kill.moment and match[1] == kill.kind]
        again = [moment for moment in steps if moment > kill.moment]
        if replaced:
            row.recovery.append(replaced[0][0] - kill.moment)
            row.replacing.append(float(replaced[0][1][3]))
        elif kill.kind in RESTARTED and again:
            row.recovery.append(again[0] - kill.moment)


def table(rows: dict[str, Row]) -> Table:
    """One line per kind; seconds as median (maximum)."""
    shown = Table("killed or stopped", "kills", "equal", "until it is replaced, s", "of that, replacing, s")
    for name in sorted(rows):
        numbers = rows[name].numbers()
        seconds = (numbers.get(f"{key}_seconds") for key in ("recovery", "replacing"))
        cells = ("–" if each is None else "{:.1f} ({:.1f})".format(*each) for each in seconds)
        shown.add_row(name, str(numbers["kills"]), str(numbers["equal"]), *cells)
    return shown


class Campaign:
    """Runs of the small model in `folder`, attacked with the options of BrokenRun.attack."""

    def __init__(self, folder: Path, console: Console, **attack: Any) -> None:
        self.folder, self.console, self.attack = folder, console, attack
        self.outcomes: list[Outcome] = []
        self.rows: dict[str, Row] = {}
        self.expected: dict[str, dict[str, Any]] = {}  # by configuration, from an unbroken run
        self.started = time.monotonic()
        save_model(folder / "model")
        (folder / "ray").mkdir()

    def run(self, number: int) -> None:
        """Make `number` kills, in as many runs as that takes."""
        restarts = int(RESTARTS * number)
        two = (number - restarts) // 2
        for name, kinds, kills in (
            (ONE, RESTARTED, restarts),
            (TWO, WORKERS, two),
            (ONE, WORKERS, number - restarts - two),
        ):
            if kills and name not in self.expected:
                self.play(name, (), 0)
            while kills > 0 and len(self.problems()) < MAX_PROBLEMS:
                kills -= self.play(name, kinds, min(kills, KILLS_OF_A_RUN))

    def play(self, name: str, kinds: Sequence[str], kills: int) -> int:
        """One run of a configuration; returns the number of kills that it lived to see."""
        run = self.folder / f"run{len(self.outcomes)}"
        options = [*OPTIONS, *CONFIGURATIONS[name], "--model.path", str(self.folder / "model"), "--run.dir", str(run)]
        outcome = play(run, options, kinds, kills, **self.attack)
        if outcome.problem is None:
            outcome.problem = difference(run, self.expected.setdefault(name, dict(contents(run))))
        self.outcomes.append(outcome)
        count(self.rows, outcome)
        text = f"{run.name} ({name}): {len(outcome.kills)} kills, {outcome.problem or 'equal'}"
        self.console.print(text, *outcome.left, sep="\n", markup=False)
        return len(outcome.kills)

    def problems(self) -> list[str]:
        """What is wrong, by run; empty if every run is equal."""
        return [f"{outcome.folder}: {outcome.problem}" for outcome in self.outcomes if outcome.problem]

    def result(self) -> dict[str, Any]:
        kills = sum(row.kills for row in self.rows.values())
        return {
            "kills": kills,
            "equal": sum(row.equal for row in self.rows.values()),
            "runs": len(self.outcomes),
            "problems": self.problems(),
            "left_running": [each for outcome in self.outcomes for each in outcome.left],
            "ends": Counter(end for outcome in self.outcomes for end in outcome.ends),
            "kinds": {name: row.numbers() for name, row in sorted(self.rows.items())},
            "seconds": round(time.monotonic() - self.started),
            "patience": {"first_seconds": FIRST_SECONDS, "spare_seconds": SPARE_SECONDS},
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="of the moments and of what is chosen")
    parser.add_argument("--gap", type=float, default=6.0, help="mean seconds between two kills")
    parser.add_argument("--stops", type=float, default=0.1, help="fraction that is stopped (SIGSTOP), not killed")
    parser.add_argument("--folder", type=Path, help="a short path where runs and logs stay (unset: none does)")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    arguments = parser.parse_args()
    adopt_orphans()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="c-", dir="/tmp") as temporary:  # short: Ray's sockets lie in it
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        attack = {"gap_seconds": arguments.gap, "stops": arguments.stops, "chance": random.Random(arguments.seed)}
        made = Campaign(folder, console, **attack)
        made.run(arguments.kills)
    result = made.result()
    console.print(table(made.rows))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0 if result["equal"] == result["kills"] >= arguments.kills and not result["left_running"] else 1


if __name__ == "__main__":
    sys.exit(main())
