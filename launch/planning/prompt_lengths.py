"""Tokens of prompts: counted in batches, and for the rows of a table only once.

The lengths of a table's rows are kept in the cache of `datasets`, whose fingerprint of the table is in the file's name.
What else makes a prompt (the task's code, the tokenizer's files) may change under the same names: kept lengths are
used only if NUM_COMPARED of them are found again.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from actor.tasks.table import Problems
from common.config import TaskConfig
from common.types import Prompt, UserError

NUM_COMPARED = 32
DRAWN = {"num_train", "num_eval", "seed", "max_prompt_tokens"}  # options that choose rows and do not change a prompt


class Lengths:
    """The lengths of `prompts`, in tokens, as they are asked for."""

    def __init__(self, prompts: Sequence[Prompt], task: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._file = _file(prompts, task, tokenizer) if isinstance(prompts, Problems) else None
        self._rows = prompts.rows if isinstance(prompts, Problems) else np.arange(len(prompts))
        num_rows = len(prompts.table) if isinstance(prompts, Problems) else len(prompts)
        self._of_rows = np.zeros(num_rows, dtype=np.int32)  # 0: not known
        self._num_kept = 0
        if self._file is not None:
            self._read(self._file)

    def of(self, positions: np.ndarray) -> np.ndarray:
        """int32 [positions]: the number of tokens of each of these prompts. Raises UserError for a broken row."""
        rows = self._rows[positions]
        if len(missing := positions[self._of_rows[rows] == 0]):
            self._of_rows[self._rows[missing]] = self._counted(missing)
        return self._of_rows[rows]

    def keep(self) -> None:
        """Write what was counted, for the next plan. A cache that cannot be written only makes that one slower."""
        if self._file is None or np.count_nonzero(self._of_rows) == self._num_kept:
            return
        partial = self._file.with_suffix(f".{os.getpid()}.npy")
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            np.save(partial, self._of_rows)
            partial.replace(self._file)

    def _counted(self, positions: np.ndarray) -> list[int]:
        if isinstance(self._prompts, Problems):
            return num_tokens(self._tokenizer, list(self._prompts.at(positions)))
        return num_tokens(self._tokenizer, [self._prompts[position] for position in positions])

    def _read(self, file: Path) -> None:
        try:
            kept = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return
        if kept.dtype != self._of_rows.dtype or kept.shape != self._of_rows.shape:
            return
        known = np.flatnonzero(kept[self._rows])
        if not len(known):
            return
        compared = known[np.linspace(0, len(known) - 1, min(NUM_COMPARED, len(known)), dtype=np.int64)]
        if self._counted(compared) == kept[self._rows[compared]].tolist():
            self._of_rows, self._num_kept = kept, int(np.count_nonzero(kept))


def num_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[int]:
    """Lengths of what `prompt_tokens` makes, on all processors. Raises UserError if the chat template refuses one."""
    chats = [[dict(message) for message in prompt.messages] for prompt in prompts]
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # the commands set false, which keeps later child processes quiet
    try:
        tokens = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=False)
    except TemplateError as error:
        raise UserError(
            f"the chat template of model.path refuses the task's messages ({error}); use another model or task"
        ) from None
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return [len(each) for each in tokens]


def _file(problems: Problems, task: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> Path:
    import datasets  # slow to import; the problems come from it

    of = (problems.fingerprint, task.model_dump(mode="json", exclude=DRAWN), tokenizer.name_or_path)
    key = hashlib.sha256(json.dumps([*of, tokenizer.chat_template, len(tokenizer)]).encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / "prompt_lengths" / f"{key}.npy"
