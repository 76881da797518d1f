"""Breaks one rule of the engine at a time, in a copy of the tree, and checks that its test turns red.

Run as `python -m tests.mutants` from the repository's root. Exits with 1 if a mutant survives, or if a test
is red before anything was broken.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
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
        "equal_BK.cumprod(1).sum(1)",
        "equal_BK.sum(1)",
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
        "places.drafts_BK[row, :num_drafts]",
        "places.drafts_BK[row, : max(0, num_drafts - 1)]",
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
        "expected_M = batch.num_rows + ",
        "expected_M = 0 * batch.num_rows + ",
        "tests/test_controller.py::test_its_choice_equals_brute_force",
    ),
    Mutant(
        "a request is answered by the model it names",
        "server/served_models.py",
        "else self._by_name.get(name)",
        "else self._by_name.get(name) and self.first",
        "tests/test_several_models.py::test_metrics_tell_the_models_apart",
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
)


def run_test(tree: Path, test: str) -> bool:
    """Whether the test passes in this tree."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=tree, capture_output=True, check=False, timeout=300)
    # 0 is green and 1 is red; anything else means that the test did not run.
    assert done.returncode in (0, 1), done.stdout.decode()
    return done.returncode == 0


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
        return run_test(tree, mutant.test)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        unbroken = copy_tree(Path(folder))
        red_before = [test for test in sorted({m.test for m in MUTANTS}) if not run_test(unbroken, test)]
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
