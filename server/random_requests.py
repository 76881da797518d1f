"""Random completion requests of every kind that a server says it allows.

Knows parameters and their ranges; sends nothing. The same seed draws the same requests.
"""

from __future__ import annotations

import random
from typing import Final

from decoding.messages import Drafter
from server.api_client import Body, ServerInfo

_PIECES: Final = (
    "def fibonacci(n):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n",
    "    return ",
    "for index, value in enumerate(values):\n",
    "import os\nimport sys\n\n",
    "The first layers of a model ",
    "1, 2, 3, 4, 5, ",
    "Once upon a time there was ",
    "if __name__ == '__main__':\n    ",
    '"""Return the ',
    "naïve café – 東京 🙂\n",
    "{'a': 1, 'b': ",
    "the same the same the same ",
)
_DRAFTERS: Final = (Drafter.EARLY_EXIT, Drafter.LOOKUP, Drafter.HYBRID)
_STOP_STRINGS: Final = ("\n\n", "e", " =", "of the", "):")
# Tokens that a tokenizer may put before a text; a text has at most a token for each byte besides.
_ADDED_TOKENS: Final = 8
_MAX_ID_TOKENS: Final = 48


class RandomRequests:
    """Draws requests; some share their prompt or its beginning with an earlier one."""

    def __init__(self, bounds: ServerInfo, *, seed: int, max_tokens: int) -> None:
        self._random = random.Random(seed)
        self._bounds = bounds
        self._max_tokens = max(1, min(max_tokens, bounds.limits.max_model_len // 2))
        self._room = bounds.limits.max_model_len - self._max_tokens
        self._texts: list[str] = []

    def draw(self) -> Body:
        """The next request."""
        limits = self._bounds.limits
        max_tokens = self._random.randint(1, self._max_tokens)
        return {
            "model": self._bounds.model,
            "prompt": self._ids() if self._chance(0.3) else self._text(),
            "max_tokens": max_tokens,
            "exit_layer": self._random.choice(self._bounds.allowed_exit_layers),
            "draft_length": self._random.randint(0, limits.max_draft_length),
            **({"drafter": self._random.choice(_DRAFTERS)} if self._chance(0.4) else {}),
            **self._sampling(),
            **(self._edits() if self._chance(0.3) else {}),
            **self._ending(max_tokens),
            **self._choices(),
        }

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def _ids(self) -> list[int]:
        length = self._random.randint(1, min(_MAX_ID_TOKENS, self._room))
        ids = [self._random.randrange(self._bounds.vocab_size) for _ in range(length)]
        return ids * max(1, min(3, self._room // length)) if self._chance(0.3) else ids

    def _text(self) -> str:
        earlier = self._random.choice(self._texts) if self._texts and self._chance(0.4) else ""
        pieces = self._random.choices(_PIECES, k=self._random.randint(0 if earlier else 1, 5))
        fitting = (earlier + "".join(pieces)).encode()[: max(1, self._room - _ADDED_TOKENS)]
        self._texts.append(fitting.decode(errors="ignore"))
        return self._texts[-1]

    def _sampling(self) -> Body:
        if self._chance(0.4):
            return {"temperature": 0}
        chosen: dict[str, object] = {
            "temperature": round(self._random.uniform(0.2, 1.6), 2),
            "seed": self._random.randrange(2**31),
        }
        if self._chance(0.4):
            chosen["top_p"] = round(self._random.uniform(0.3, 1), 2)
        if self._chance(0.4):
            chosen["top_k"] = self._random.randint(1, 50)
        if self._chance(0.4):
            chosen["min_p"] = round(self._random.uniform(0, 0.3), 2)
        return chosen

    def _edits(self) -> Body:
        """What is done to logits: most of it depends on the drafts that came before in the same cycle."""
        biased = self._random.sample(range(self._bounds.vocab_size), k=min(3, self._bounds.vocab_size))
        edits: dict[str, object] = {
            "presence_penalty": round(self._random.uniform(-1, 2), 2),
            "frequency_penalty": round(self._random.uniform(-1, 2), 2),
            "repetition_penalty": round(self._random.uniform(0.8, 1.5), 2),
            "logit_bias": {str(token_id): self._random.randint(-100, 10) for token_id in biased},
        }
        return dict(self._random.sample([*edits.items()], k=self._random.randint(1, len(edits))))

    def _ending(self, max_tokens: int) -> Body:
        chosen: dict[str, object] = {}
        if self._chance(0.2):
            chosen["min_tokens"] = self._random.randint(0, max_tokens)
        if self._chance(0.2) and self._bounds.limits.max_stop_strings:
            chosen["stop"] = [self._random.choice(_STOP_STRINGS)]
        if self._chance(0.3):
            chosen["ignore_eos"] = True
        return chosen

    def _choices(self) -> Body:
        limits = self._bounds.limits
        most = min(3, limits.max_n, limits.max_sequences_per_request)
        return {"n": self._random.randint(1, most)} if self._chance(0.25) else {}
