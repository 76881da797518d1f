"""Breaks one rule of the engine at a time, in a copy of the tree, and checks that its test turns red.

Run as `python -m tests.mutants` from the repository's root. Exits with 1 if a mutant survives, or if a test
is red before anything was broken.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Tests run in forks of a process that has imported what takes long, and nothing of the project.
_WARM = multiprocessing.get_context("forkserver")
_WARM.set_forkserver_preload(["pytest", "torch", "transformers.models.llama.modeling_llama"])
COPIED = (
    "config",
    "decoding",
    "training",
    "server",
    "tests",
    "benchmarks",
    "docker",
    "pyproject.toml",
    "README.md",
)
# Exit codes of a process that ran pytest: pytest's own, beyond those of a process that did not come so far.
_RAN = 100
_GREEN, _RED = _RAN + pytest.ExitCode.OK, _RAN + pytest.ExitCode.TESTS_FAILED
EXACTNESS = "tests/test_exactness.py"
MIXES = f"{EXACTNESS}::test_random_mixes_equal_naive_decoding"
TRANSPARENT = f"{EXACTNESS}::test_drafts_of_a_model_whose_later_layers_add_nothing_are_all_kept"
UNFED = "tests/test_draft_model.py::test_a_last_draft_that_was_never_fed_is_not_taken_for_computed"


@dataclass(frozen=True)
class Mutant:
    """A rule, the line that holds it, what breaks it, and the test that must notice."""

    rule: str
    file: str
    line: str
    broken: str
    test: str


MUTANTS = (
    Mutant(
        "a refused draft ends the kept run",
        "decoding/acceptance.py",
        "np.multiply.accumulate(is_equal_BK, axis=1, dtype=np.int64).sum(axis=1)",
        "is_equal_BK.sum(axis=1)",
        MIXES,
    ),
    Mutant(
        "computed positions are rewound to the committed tokens",
        "decoding/scheduler.py",
        "sequence.num_computed = len(sequence.token_ids) - 1",
        "sequence.num_computed = min(\n"
        "            sequence.num_computed + share.num_fed + share.draft_length, len(sequence.token_ids)\n"
        "        )",
        MIXES,
    ),
    Mutant(
        "verification starts from the exit hidden of its own position",
        "decoding/verification.py",
        "torch.cat((hidden_ND, exits_MD))",
        "torch.cat((hidden_ND, exits_MD.roll(1, dims=0)))",
        MIXES,
    ),
    Mutant(
        "only blocks computed in all layers are published",
        "decoding/blocks.py",
        "return num_computed // block_size",
        "return (num_computed + 1) // block_size",
        f"{EXACTNESS}::test_a_prompt_that_continues_a_finished_row_reads_only_what_was_computed",
    ),
    Mutant(
        "the noise is keyed by the position",
        "decoding/noise.py",
        "_mix(keys_2N + positions_N.to(torch.int32))",
        "_mix(keys_2N + 0 * positions_N.to(torch.int32))",
        MIXES,
    ),
    Mutant(
        "a draft is chosen with the noise of its own position",
        "decoding/drafting.py",
        "next_positions_B[:num_rows] + ahead",
        "next_positions_B[:num_rows] + ahead - 1",
        TRANSPARENT,
    ),
    Mutant(
        "a draft is chosen with the processors of its own row",
        "decoding/drafting.py",
        "plan.sampling.first(num_rows)",
        "plan.sampling.first(num_rows).take(torch.arange(num_rows).flip(0))",
        TRANSPARENT,
    ),
    Mutant(
        "a draft is edited behind the drafts of its cycle",
        "decoding/drafting.py",
        "for step_P in ids]",
        "for step_P in ids[:-1]]",
        TRANSPARENT,
    ),
    Mutant(
        "a choice is edited behind the drafts before it",
        "decoding/verification.py",
        "Before(places.rows_M, places.num_drafts_M, drafts_MK)",
        "Before(places.rows_M, np.maximum(places.num_drafts_M - 1, 0), drafts_MK)",
        MIXES,
    ),
    Mutant(
        "the last prompt token is always computed",
        "decoding/scheduler.py",
        "max_tokens = len(known) - 1 if",
        "max_tokens = len(known) if",
        f"{EXACTNESS}::test_a_cached_prompt_still_computes_its_last_token",
    ),
    Mutant(
        "the controller weighs all tokens of a step, not only its drafts",
        "decoding/weighing.py",
        "expected_LM = batch.num_rows + ",
        "expected_LM = 0 * batch.num_rows + ",
        "tests/test_controller.py::test_its_choice_equals_brute_force",
    ),
    Mutant(
        "drafts behind one that was refused say nothing of how sure drafts are kept",
        "decoding/confidence.py",
        "for grade in grades[: count + 1]",
        "for grade in grades",
        "tests/test_confidence.py::test_shares_and_chances_are_those_of_drafts_that_were_reached",
    ),
    Mutant(
        "a row stops drafting behind the draft that it is unsure of",
        "decoding/compiled_drafts.cpp",
        "&& !(chances[row] < drafting->least[row])",
        "&& !(chances[row] < 0)",
        "tests/test_stopping_rows.py::test_a_row_stops_behind_the_draft_with_which_too_little_is_left",
    ),
    Mutant(
        "compiled code, too, keeps drafts up to the first that is refused",
        "decoding/compiled_step.cpp",
        "while (kept < num_drafts &&",
        "while (kept + 1 < num_drafts &&",
        "tests/test_compiled_cycle.py::test_one_call_does_what_the_parts_do[early_exit-float32]",
    ),
    Mutant(
        "a request is answered by the model it names",
        "server/served_models.py",
        "else self._by_name.get(name)",
        "else self._by_name.get(name) and self.first",
        "tests/test_several_models.py::test_one_that_does_not_load_leaves_the_other_serving[refused]",
    ),
    Mutant(
        "what a worker reported before it died is known to the next",
        "decoding/sequence.py",
        "[*self.request.prompt_ids, *self.request.resumed_ids]",
        "[*self.request.prompt_ids]",
        "tests/test_resume.py::test_what_came_before_is_output_and_not_prompt",
    ),
    Mutant(
        "whoever may have killed a worker runs alone",
        "server/roster.py",
        "if self._alone is not None and not self._is_worker_empty:",
        "if self._num_given < 0:",
        "tests/test_roster.py::test_killers_fail_and_all_others_finish",
    ),
    Mutant(
        "a block is shared once a draft model has computed it too",
        "decoding/scheduler.py",
        "num_publishable(num_computed=sequence.num_followed",
        "num_publishable(num_computed=sequence.num_computed",
        UNFED,
    ),
    Mutant(
        "a draft model has not computed the last draft it made",
        "decoding/planning.py",
        "max(0, self.model_length - 1)",
        "self.model_length",
        UNFED,
    ),
    Mutant(
        "of those that run, the last in line gives way",
        "decoding/scheduler.py",
        "last = max(self._running, key=_RANK)",
        "last = self._running[-1]",
        "tests/test_scheduler.py::test_shortage_takes_the_youngest_of_those_that_matter_least",
    ),
    Mutant(
        "who may have been in a dead worker's step is suspected",
        "server/roster.py",
        "(each[0] not in running, each[1].priority)",
        "(each[0] not in running, 0)",
        "tests/test_roster.py",
    ),
    Mutant(
        "a draft among few tokens is known by its own id",
        "decoding/draft_head.py",
        "return self._ids_R[logits_PR.argmax(-1)]",
        "return logits_PR.argmax(-1)",
        "tests/test_draft_head.py::test_it_chooses_as_if_all_other_tokens_were_forbidden",
    ),
    Mutant(
        "what ranks have of a sum is added up",
        "decoding/parallel_linear.py",
        "self._collectives.add_up(sum_NO)",
        "pass",
        "tests/test_sharding.py::test_shares_put_together_are_the_whole_matrix",
    ),
    Mutant(
        "edits that a rank has not seen are sent to it",
        "decoding/parallel_plan.py",
        "self._editors.get(sequence_id) is edited.editor",
        "sequence_id in self._editors",
        "tests/test_parallel_plan.py::test_plans_are_read_as_they_were_written",
    ),
    Mutant(
        "drafts that pay no more give way to the best others",
        "decoding/controller.py",
        "if known.drafts and known.rate <= _WORTH_CHANGING * plain.rate:\n            return found",
        "if known.drafts and known.rate <= _WORTH_CHANGING * plain.rate:\n            return plain",
        "tests/test_controller.py::test_drafts_that_pay_no_more_give_way_to_others_that_do_and_not_to_none",
    ),
)


def passes(tree: Path, *tests: str) -> bool:
    """Whether these tests pass in this tree."""
    with tempfile.NamedTemporaryFile() as log:
        process = _WARM.Process(target=_run_tests, args=(tree, tests, log.name))
        process.start()
        process.join(timeout=600)
        if process.exitcode is None:
            process.kill()
        # Anything else means that the tests did not run; 1 is also what a process ends with that raised.
        assert process.exitcode in (_GREEN, _RED), Path(log.name).read_text(encoding="utf-8")
        return process.exitcode == _GREEN


def _run_tests(tree: Path, tests: Sequence[str], log: str) -> NoReturn:
    """End this process with pytest's answer. Nothing of the project may come from anywhere but `tree`."""
    output = os.open(log, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    for name in [name for name in sys.modules if name.partition(".")[0] in COPIED]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path).resolve() != ROOT)]
    # Plugins of pytest are among what was imported before.
    is_warm = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
    sys.exit(_RAN + pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-W", is_warm, *tests]))


def copy_tree(folder: Path) -> Path:
    for name in COPIED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    return folder


def survives(mutant: Mutant) -> bool:
    """Break the rule in a fresh copy; whether its test still passes."""
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder))
        path = tree / mutant.file
        text = path.read_text(encoding="utf-8")
        assert text.count(mutant.line) == 1, f"{mutant.file}: the line of «{mutant.rule}» has changed"
        path.write_text(text.replace(mutant.line, mutant.broken), encoding="utf-8")
        return passes(tree, mutant.test)


def red_before_anything_is_broken() -> list[str]:
    tests = sorted({mutant.test for mutant in MUTANTS})
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder))
        return [] if passes(tree, *tests) else [test for test in tests if not passes(tree, test)]


def main() -> int:
    red_before = red_before_anything_is_broken()
    for test in red_before:
        print(f"red before anything was broken: {test}")
    num_survivors = 0
    for mutant in MUTANTS:
        is_alive = survives(mutant)
        num_survivors += is_alive
        print(f"{'SURVIVED' if is_alive else 'caught  '} {mutant.rule}", flush=True)
    print(f"{len(MUTANTS) - num_survivors} of {len(MUTANTS)} mutants caught")
    return 1 if num_survivors or red_before else 0


if __name__ == "__main__":
    sys.exit(main())
