"""Models as lm-evaluation-harness asks for them. `lm_eval` itself is optional: only `evaluate` and `lm` import it."""

import importlib.util
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm import inputs, scoring

if TYPE_CHECKING:
    from jaxlm.model import Model

MAX_NEW_TOKENS = 256  # of generate_until where a task does not say, as in the harness
GENERATION = {"until", "max_gen_toks", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "do_sample"}


class Harness:
    """The three questions of the harness, answered by a model.

    Requests are anything with `.args`: (context, continuation), (text,) or (context, options). Each answer is that of
    the request alone; requests of similar length share a batch. max_length: default the model's context, at most 2048.
    """

    def __init__(self, model: "Model", batch_size: int = 8, max_length: int | None = None):
        super().__init__()  # the harness's own base class, where there is one
        inputs.positive("batch_size", batch_size)
        limit: int = model.config.max_context
        max_length = min(limit, scoring.WINDOW) if max_length is None else max_length
        inputs.positive("max_length", max_length)
        if not 2 <= max_length <= limit:
            raise ValueError(f"max_length={max_length}: expected 2 to {limit}, the model's context")
        self.model, self.max_length = model, max_length
        # Frequencies that depend on the length allow no rows of different lengths.
        self.batch_size = 1 if scoring.depends_on_length(model) else batch_size

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    @property
    def prefix(self) -> int:
        """The token that a text without a context follows: BOS, else EOS."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ValueError("the tokenizer has neither a BOS nor an EOS token for a text without a context to follow")

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids, with the special tokens that the tokenizer adds unless the text begins with its BOS."""
        bos = self.tokenizer.bos_token
        special = special and not (bos and text.startswith(bos))
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """(log p of the continuation after the context, whether greedy decoding would give it), in nats.

        Contexts that do not fit are cut at their beginning.
        """
        return self._score([self.pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """log p of whole texts after BOS: each token once, in windows that each see as much as fits."""
        scored, owners = [], []
        for owner, request in enumerate(requests):
            ids = [self.prefix, *self.encode(request.args[0], special=False)]
            for begin in range(1, len(ids), self.max_length):
                end = min(begin + self.max_length, len(ids))
                scored.append((ids[max(0, end - self.max_length - 1) : begin], ids[begin:end]))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _likeliest) in zip(owners, self._score(scored), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """What follows each context, up to the first of its `until` strings; greedy unless told otherwise."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        answers = [""] * len(requests)
        for key, members in groups.items():
            options = self._options(json.loads(key))
            room = self.max_length - options["max_new_tokens"]
            if room < 1:
                new = options["max_new_tokens"]
                raise ValueError(f"max_gen_toks={new}: expected less than max_length={self.max_length}")
            prompts = {i: self.encode(requests[i].args[0])[-room:] for i in members}
            for batch in self._batches(members, lambda i: len(prompts[i])):  # noqa: B023 (used at once)
                made = self.model.generate([np.array(prompts[i]) for i in batch], details=True, **options)
                for i, one in zip(batch, made, strict=True):
                    text = one.text
                    if text is None:  # without stop strings the model has no need of text
                        text = self.tokenizer.decode(one.tokens.tolist(), skip_special_tokens=True)
                    answers[i] = text
        return answers

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of both: of their joint text, cut where the context's end; spaces between go to the continuation."""
        text = context.rstrip()
        if not text:
            ids = self.encode(context + continuation, special=False)
            return ([self.prefix], ids) if ids[:1] != [self.prefix] else (ids[:1], ids[1:])
        before = self.encode(text)
        return before, self.encode(context + continuation)[len(before) :]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(log p, whether all are the likeliest) of each continuation."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        rows = {
            i: np.array((before + after)[-self.max_length - 1 :], np.int32) for i, (before, after) in enumerate(pairs)
        }
        for i, (before, after) in enumerate(pairs):
            if not after or not before:
                raise ValueError(
                    f"request {i} has {len(before)} tokens of context and {len(after)} after it: expected both"
                )
            if len(after) > self.max_length:
                raise ValueError(f"request {i} scores {len(after)} tokens: expected at most {self.max_length}")
            inputs.row(rows[i], self.model.config)
        for batch in self._batches(list(rows), lambda i: len(rows[i])):
            scored = scoring.score_rows(self.model, [rows[i] for i in batch])
            for i, (logprobs, likeliest) in zip(batch, scored, strict=True):
                n = len(pairs[i][1])
                found[i] = float(logprobs[-n:].sum(dtype=np.float64)), bool(likeliest[-n:].all())
        return found

    def _batches(self, members: list[int], length: Any) -> list[list[int]]:
        """Longest first, so that too little memory shows at once, and lengths in a batch are alike."""
        order = sorted(members, key=lambda i: -length(i))
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        """A task's generation options as ours; unknown ones are a ValueError."""
        if unknown := sorted(given.keys() - GENERATION):
            raise ValueError(
                f"generation options {', '.join(unknown)}: expected some of {', '.join(sorted(GENERATION))}"
            )
        until = given.get("until") or ()
        sampled = given.get("do_sample", bool(given.get("temperature")))
        options: dict[str, Any] = {name: given.get(name) for name in ("top_p", "top_k", "min_p")} if sampled else {}
        # temperature=0 is stated: generation_config.json may ask for sampling.
        temperature = float(given.get("temperature") or 1.0) if sampled else 0.0
        return options | {
            "stop": (until,) if isinstance(until, str) else tuple(stop for stop in until if stop),
            "max_new_tokens": given.get("max_gen_toks", given.get("max_new_tokens", MAX_NEW_TOKENS)),
            "temperature": temperature,
            "repetition_penalty": 1.0,
        }

    # For tasks run through a chat template.

    @property
    def tokenizer_name(self) -> str:
        name = "model" if self.model.opened is None else self.model.opened.where
        return name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )


def installed() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def require() -> None:
    """ValueError with the way out when lm_eval is not installed."""
    if not installed():
        raise ValueError("tasks need lm-evaluation-harness, which is not installed: pip install lm_eval")


def lm(model: "Model", **options: Any) -> Any:
    """A Harness that is an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=...)`."""
    require()
    from lm_eval.api.model import LM  # type: ignore[import-not-found]

    return type("JaxLM", (Harness, LM), {})(model, **options)


def evaluate(
    model: "Model", tasks: Sequence[str], *, batch_size: int = 8, max_length: int | None = None, **options: Any
) -> dict[str, dict[str, Any]]:
    """{task: {measure: value}} of lm_eval.simple_evaluate, which gets the options, num_fewshot and limit among them."""
    adapter = lm(model, batch_size=batch_size, max_length=max_length)
    import lm_eval  # type: ignore[import-not-found]

    found = lm_eval.simple_evaluate(model=adapter, tasks=list(tasks), **options)
    names = ("alias", "sample_len", "name")
    return {
        task: {name.removesuffix(",none"): value for name, value in scores.items() if name not in names}
        for task, scores in found["results"].items()
    }
