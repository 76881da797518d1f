"""What one step shall do and what it did: fresh values between the scheduler and the cycle.

Plain arrays but for the sampling columns, which lie on the device already.

Shapes: B rows, N tokens fed, W blocks of the longest row, K drafts, Q verified positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from decoding.edits import Edited
from decoding.logits import Sampling
from decoding.messages import TokenLogprob
from decoding.ragged import Ints


@dataclass(frozen=True, slots=True)
class PromptScoring:
    """Log-probabilities of prompt tokens: `targets` follow the fed tokens from the `first`-th on."""

    first: int
    targets: Ints
    num_top: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a row reports besides its tokens: log-probabilities beside this many most probable tokens, those of its
    prompt, its drafts. None and False ask for nothing.
    """

    num_top: int | None = None
    prompt: PromptScoring | None = None
    drafts: bool = False


@dataclass(frozen=True, slots=True)
class Reported:
    """What a row reported: of its chosen tokens, of its prompt's, and the ids of its drafts."""

    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    drafted_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Following:
    """What a separate draft model lacks of the known tokens: row b's `counts_B[b]` ≥ 1 from position `starts_B[b]`
    on, the last known one included.
    """

    ids_N: Ints
    counts_B: Ints
    starts_B: Ints


@dataclass(frozen=True, slots=True)
class Stops:
    """Row b stops drafting behind a draft with which the chance that all of its drafts are kept falls below
    `least_B[b]`, float32; `chances_2G` are those of drafts by their grades, of greedy rows and of sampled ones.
    """

    chances_2G: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    least_B: np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Plan:
    """One step for B rows. Row b is fed `num_fed_B[b]` ≥ 1 known tokens from position `num_computed_B[b]` on.

    A row whose known tokens are all fed `chooses` its next token; the others are chunks of a longer prompt.
    The last `num_looked_up_B[b]` of the fed are not known but drafts that were looked up; they run from layer
    0 on. A row with one token pending may draft: `draft_lengths_B[b]` tokens at `exit_layers_B[b]`; draft length 0
    is plain decoding. Rows come in the order of falling draft lengths. Or a separate draft model drafts
    `model_lengths_B[b]` tokens for it, which run from layer 0 on; `following` is None without such a model.
    `edited` and `wanted` are None for rows that asked for nothing. What drafting at each exit layer of `surveyed`
    would propose is compared with what is chosen; then nothing is drafted. Where there are `stops`, rows may draft
    less; whoever cannot tell how sure a draft is makes all.
    """

    sequence_ids: tuple[int, ...]
    fed_N: Ints
    num_fed_B: Ints
    num_looked_up_B: Ints
    num_computed_B: Ints
    draft_lengths_B: Ints
    exit_layers_B: Ints
    model_lengths_B: Ints
    following: Following | None
    chooses_B: np.ndarray[tuple[int], np.dtype[np.bool_]]
    blocks_BW: Ints
    sampling: Sampling
    edited: tuple[Edited | None, ...]
    wanted: tuple[Wanted | None, ...]
    surveyed: tuple[int, ...] = ()
    stops: Stops | None = None

    @property
    def num_made_B(self) -> Ints:
        """Drafts that a model makes for each row in this step."""
        num_made_B: Ints = self.draft_lengths_B + self.model_lengths_B
        return num_made_B

    @property
    def num_drafts_B(self) -> Ints:
        """Drafts of each row, whoever made them."""
        num_drafts_B: Ints = self.num_made_B + self.num_looked_up_B
        return num_drafts_B

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.sequence_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that the verification pass computes."""
        return int(self.num_fed_B.sum() + self.num_made_B.sum())

    def part(self, is_own_B: np.ndarray[tuple[int], np.dtype[np.bool_]], sampling: Sampling) -> Plan:
        """The same for these rows alone, whose sampling columns are given. No draft model follows a part."""
        assert self.following is None
        own = np.flatnonzero(is_own_B).tolist()
        return Plan(
            sequence_ids=tuple(self.sequence_ids[row] for row in own),
            fed_N=self.fed_N[np.repeat(is_own_B, self.num_fed_B)],
            num_fed_B=self.num_fed_B[is_own_B],
            num_looked_up_B=self.num_looked_up_B[is_own_B],
            num_computed_B=self.num_computed_B[is_own_B],
            draft_lengths_B=self.draft_lengths_B[is_own_B],
            exit_layers_B=self.exit_layers_B[is_own_B],
            model_lengths_B=self.model_lengths_B[is_own_B],
            following=None,
            chooses_B=self.chooses_B[is_own_B],
            blocks_BW=self.blocks_BW[is_own_B],
            sampling=sampling,
            edited=tuple(self.edited[row] for row in own),
            wanted=tuple(self.wanted[row] for row in own),
        )


@dataclass(frozen=True, slots=True)
class Result:
    """What a plan came to. `chosen[b]` are row b's new tokens: the drafts that stand and the full model's next.

    Empty for rows that choose nothing. `reported[b]` is None where row b wanted nothing. `draft_s` and
    `verify_s` are wall seconds. `agreed[i][b]` says whether row b's token is what a draft at the i-th surveyed
    exit layer would have been, and `surveyed_grades`, if they are known, how sure that would have been; both mean
    nothing where the row chooses nothing. `grades[b]` are those of the drafts
    that row b made by early exit; there are none of any row where the plan's were made, all of them.
    """

    chosen: tuple[tuple[int, ...], ...]
    reported: tuple[Reported | None, ...]
    draft_s: float
    verify_s: float
    agreed: Sequence[Sequence[bool]] = ()
    surveyed_grades: Sequence[Sequence[int]] = ()
    grades: tuple[tuple[int, ...], ...] = ()

    def num_tokens(self, plan: Plan) -> int:
        """Tokens that the verification pass computed: fewer than planned where rows stopped drafting."""
        if not self.grades:
            return plan.num_tokens
        num_known = len(plan.fed_N)
        return num_known + sum(map(len, self.grades)) + int(plan.model_lengths_B.sum())

    def of_one_token(self) -> Result:
        """The same as if no draft had been kept."""
        return replace(self, chosen=tuple(chosen[:1] for chosen in self.chosen))
