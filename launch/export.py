"""Export a checkpoint: the PEFT adapter as it is, or a merged model; with tokenizer and model card; to the hub.

python launch/export.py RUN/checkpoints/step-000030 --out FOLDER [--merge] [--dtype bfloat16] [--push NAME]
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from launch/, whose names shadow packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from common.command_line import Parser
from common.config import dump
from common.files import check_started_elsewhere, usable
from common.types import UserError
from launch.exporting import card, comparison, folder, hub, merge, names, source
from launch.exporting.card import Merge
from launch.exporting.source import Source

DTYPES = ("bfloat16", "float16", "float32")
MOST_LOST, MUCH_LOST = 0.5, 0.1  # part of the update, or of its effect: an export is refused, or warns
FLOAT32_LOST = 0.01


def options(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed command line. Raises UserError if it is invalid."""
    parser = Parser(description="Export a checkpoint for PEFT, transformers and vLLM.", allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="such as RUN/checkpoints/step-000030")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="a new or an empty folder")
    parser.add_argument("--merge", action="store_true", help="a whole model, with the adapter merged into its weights")
    parser.add_argument("--dtype", choices=DTYPES, help="of the merged model (default: bfloat16)")
    parser.add_argument(
        "--push",
        metavar="NAME",
        help="upload the folder to the hub; a new repository is public unless its organisation's default is private",
    )
    chosen = parser.parse_args(list(argv))
    if chosen.dtype and not chosen.merge:
        raise UserError(f"--dtype {chosen.dtype} is of a merged model; add --merge, or leave it out")
    for path in (chosen.checkpoint, chosen.out):
        usable(path)
    return chosen


def merged(found: Source, dtype: str, made: Path) -> Merge:
    """Merge into the folder `made`, reload and compare. Raises UserError if rounding has eaten the update."""
    comparison.check_memory(found)
    prompts = comparison.held_out_tokens(found)
    adapter_N, base_N = comparison.adapter_logprobs(found, prompts)
    retained = merge.merge(found, getattr(torch, dtype), made)
    merged_N = comparison.merged_logprobs(made, prompts)
    compared = comparison.compare(merged_N, adapter_N, base_N, len(prompts))
    result = Merge(dtype=dtype, retained=retained, comparison=compared)
    print(f"merged in float32, rounded to {dtype}: {retained}")
    print(compared)
    check_loss(result)
    return result


def check_loss(result: Merge) -> None:
    """Raise UserError if most of the update is lost; print a warning if much is."""
    share, lost = result.retained.share, result.comparison.lost
    if result.dtype == "float32" and lost > FLOAT32_LOST:
        raise UserError(
            f"the merged model misses {lost:.1%} of the adapter's effect, which rounding to float32 does not explain: "
            "transformers computes this base otherwise than the learner; leave out --merge"
        )
    what = f"--dtype {result.dtype} keeps {share:.0%} of the update and misses {lost:.0%} of the adapter's effect"
    if max(1 - share, lost) > MOST_LOST:
        finer = "float16 or float32" if result.dtype == "bfloat16" else "float32"
        raise UserError(f"{what}, so most is lost to rounding; use --dtype {finer}, or leave out --merge")
    if max(1 - share, lost) > MUCH_LOST:
        print(f"warning: {what}; --dtype float32, and the adapter without --merge, keep all")


def export(found: Source, out: Path, dtype: str | None, name: str) -> None:
    """Write the export of `found` to `out`, whole or not at all: merged in `dtype`, or the adapter if it is None."""
    with folder.written_whole(out) as made:
        if dtype is None:
            folder.save_adapter(found, made)
            result = None
        else:
            result = merged(found, dtype, made)
        folder.copy_tokenizer(found, made)
        (made / "run.toml").write_text(dump(names.shared(found.config)), encoding="utf-8")
        (made / "README.md").write_text(card.render(found, name, result), encoding="utf-8")
    print(f"wrote {out}")


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 exported, 2 bad input, or a hub that refuses; 128 + the signal's number if a signal ended it."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # by default nothing would remove the unfinished folder
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        chosen = options(argv)
        check_started_elsewhere()
        folder.check_new(chosen.out)
        found = source.read(chosen.checkpoint)
        name = hub.check(chosen.push) if chosen.push else None
        dtype = (chosen.dtype or "bfloat16") if chosen.merge else None
        export(found, chosen.out, dtype, name or chosen.out.resolve().name)
        if name:
            print(f"pushed to {hub.push(chosen.out, name, f'Step {found.step} of a Horizon run')}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
