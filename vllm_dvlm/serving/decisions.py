"""Decisions about pictures in one forward pass: vLLM's `/v1/systemone` (choice, yes or no, score) for these models.

A canvas of answer slots is denoised once, and the probabilities of the options are read from the logits of exactly
those slots. An autoregressive model reads one token; here an option may have several, since all slots are read at once:
its probability is the product of those of its tokens, each given that all slots are masked.

Of a request, `chat_template_kwargs` says how it is asked:

- `decision_labels`: "letters" (default) shows the options as A, B, C and reads the letter, as vLLM asks other models;
  "words" asks the question alone and reads the options' own words.
- `decision_reading`: "separate" (default): a prompt for each question, all in one batch; "joint": one prompt and one
  canvas with a slot for each.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from vllm import SamplingParams
from vllm.entrypoints.generate.structured_decisions import strategies
from vllm.entrypoints.generate.structured_decisions.question_types import (
    Question,
    StructuredDecisionError,
    label_softmax,
)
from vllm.entrypoints.generate.structured_decisions.strategies import LABELS, DecisionLimits, QuestionRead, ReadStrategy

from vllm_dvlm.families import FAMILIES
from vllm_dvlm.options import DenoiseParams

if TYPE_CHECKING:
    from vllm.entrypoints.generate.structured_decisions.protocol import ReadPromptRequest
    from vllm.inputs import EngineInput
    from vllm.lora.request import LoRARequest
    from vllm.outputs import RequestOutput

LABEL_KINDS = ("letters", "words")
READINGS = ("separate", "joint")
# Slots of a canvas at least: these models are not trained to answer in less.
LEAST_CANVAS = 8
# vLLM's bound on `logprob_token_ids`.
MOST_IDS = 128
# Questions of a request in the engine at a time: each takes its picture's pixels along.
AT_ONCE = 16
# Options that would make more steps of a decision than one, or other rows.
NOT_OF_DECISIONS = (
    "diffusion_block_length",
    "diffusion_threshold",
    "diffusion_step_ratio",
    "diffusion_schedule",
    "diffusion_schedule_shift",
    "diffusion_suffix",
    "diffusion_cfg_scale",
    "diffusion_refresh_interval",
)
# Characters of a text whose ids are remembered.
SHORT = 32


@dataclass(frozen=True)
class Slots:
    """Where a question's answer is read, and what may stand there: for each option its spellings as token ids."""

    first: int
    options: list[list[list[int]]]

    @property
    def token_ids(self) -> set[int]:
        return {i for spellings in self.options for spelling in spellings for i in spelling}

    @property
    def width(self) -> int:
        return max(len(spelling) for spellings in self.options for spelling in spellings)


class CanvasStrategy(strategies.NextTokenStrategy):
    """One denoising step over answer slots; see the module."""

    modalities: ClassVar[frozenset[str]] = frozenset({"image"})

    def __init__(self, context: Any) -> None:
        ReadStrategy.__init__(self, context)
        config = context.engine_client.model_config.hf_config
        self.mask, self.end = config.mask_token_id, config.end_of_turn_token_id
        self._remembered = lru_cache(maxsize=4096)(self._encoded)

    def limits(self) -> DecisionLimits:
        return DecisionLimits(max_questions=64, max_options=len(LABELS))

    def render_state(self, state: Any) -> str:
        """Null leaves picture and question alone."""
        return "" if state is None else super().render_state(state)

    # -- what is asked -----------------------------------------------------------------------------------------

    def _encoded(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer().encode(text, add_special_tokens=False))

    def _encode(self, text: str) -> tuple[int, ...]:
        """Ids of an option or a number. Short ones are remembered: questions repeat their options."""
        return self._remembered(text) if len(text) <= SHORT else self._encoded(text)

    def _slots(self, question: Question, kind: str, first: int) -> Slots:
        """Spellings of the options at the start of a reply, with a space in front and without."""
        if kind == "letters":
            texts, ending = list(question.labels), []
        else:  # of options with different numbers of tokens only the end tells whether a short one is meant
            texts, ending = [option.name for option in question.options], [self.end]
        options = []
        for text in texts:
            spellings = [ids for ids in (self._encode(f" {text}"), self._encode(text)) if ids]
            if kind == "letters":
                spellings = [ids for ids in spellings if len(ids) == 1]
            unique = [list(ids) for ids in dict.fromkeys(spellings)]
            if not unique:
                raise StructuredDecisionError(
                    f"question {question.id!r}: {text!r} is not one token of this model; ask with "
                    'chat_template_kwargs={"decision_labels": "words"}'
                )
            options.append([[*ids, *ending] for ids in unique])
        return Slots(first, options)

    @staticmethod
    def _ask(question: Question, kind: str) -> str:
        if kind == "letters":
            return question.type.prompt(question)
        notes = [f"{o.name}: {o.description}" for o in question.options if o.description]
        return "\n".join([question.instructions or question.id, *notes])

    def _draft(self, questions: Sequence[Question], kind: str) -> tuple[list[int], list[Slots]]:
        """A canvas with numbered slots, as a list of ids, and where they are."""
        ids: list[int] = []
        found = []
        for number, question in enumerate(questions, start=1):
            ids += self._encode(f"{number}:" if number == 1 else f"\n{number}:")
            slots = self._slots(question, kind, len(ids))
            found.append(slots)
            ids += [self.mask] * slots.width
        return ids, found

    def _params(self, slots: Sequence[Slots], canvas: int, draft: list[int] | None) -> SamplingParams:
        wanted = sorted(set().union(*(each.token_ids for each in slots)))
        if len(wanted) > MOST_IDS:
            raise StructuredDecisionError(
                f"the options have {len(wanted)} different tokens; use at most {MOST_IDS}: fewer options, or letters"
            )
        # As if nobody had set them: the server may have defaults.
        options: dict[str, Any] = {name: getattr(DenoiseParams(), name) for name in NOT_OF_DECISIONS} | {
            "diffusion_canvas_length": canvas,
            "diffusion_max_steps": 1,
            "diffusion_draft": draft or "",
        }
        return SamplingParams(
            max_tokens=canvas,
            temperature=0.0,
            logprob_token_ids=wanted,
            ignore_eos=True,  # every slot is read, whatever stands before it
            detokenize=False,
            extra_args=options,
        )

    async def _render(
        self, read_request: ReadPromptRequest, messages: list[dict[str, Any]]
    ) -> tuple[EngineInput, list[int]]:
        """vLLM's, with its cache of processed pictures: these models' does not count on what the engine has kept."""
        context = self.context
        _, (engine_input,) = await context.online_renderer.preprocess_chat(
            read_request,
            messages,
            default_template=context.chat_template,
            default_template_content_format=context.chat_template_content_format,
            default_template_kwargs=context.default_chat_template_kwargs,
        )
        return engine_input, []

    # -- reading -----------------------------------------------------------------------------------------------

    async def read(
        self,
        questions: list[Question],
        instructions: str | None,
        state: str,
        *,
        request_id: str,
        chat_template_kwargs: dict[str, Any] | None,
        lora_request: LoRARequest | None,
        priority: int,
        cache_salt: str | None = None,
        trace_headers: Mapping[str, str] | None = None,
        media: Mapping[str, Sequence[str]] | None = None,
    ) -> list[QuestionRead]:
        """One read per question, in order. StructuredDecisionError (HTTP 400) for what cannot be asked so."""
        given = dict(chat_template_kwargs or {})
        kind = _choice(given, "decision_labels", LABEL_KINDS)
        reading = _choice(given, "decision_reading", READINGS)
        read_request = self._read_request(given or None, cache_salt)
        pictures = await self._image_parts((media or {}).get("image", ()))

        async def rendered(text: str) -> EngineInput:
            text = f"{state}\n\n{text}" if state else text
            content: Any = [*pictures, {"type": "text", "text": text}] if pictures else text
            messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
            if instructions:
                messages.insert(0, {"role": "system", "content": instructions})
            engine_input, _ = await self._render(read_request, messages)
            return engine_input

        async def answered(number: int, engine_input: EngineInput, params: SamplingParams) -> RequestOutput:
            result = None
            async for result in self.context.engine_client.generate(  # noqa: B007 - the last one counts
                engine_input,
                params,
                f"{request_id}-{number}",
                lora_request=lora_request,
                trace_headers=trace_headers,
                priority=priority,
            ):
                pass
            if result is None or not result.outputs or not result.outputs[0].logprobs:
                raise ValueError(f"no answer to question {number + 1}")
            return result

        work: list[tuple[str, SamplingParams, list[Slots]]] = []
        if reading == "joint":
            asked = "\n\n".join(f"{i}: {self._ask(q, kind)}" for i, q in enumerate(questions, start=1))
            draft, slots = self._draft(questions, kind)
            work.append((asked, self._params(slots, len(draft), draft), slots))
        else:
            for question in questions:
                slots = [self._slots(question, kind, 0)]
                params = self._params(slots, max(LEAST_CANVAS, slots[0].width), None)
                work.append((self._ask(question, kind), params, slots))
        tasks: list[asyncio.Future[Any]] = []
        results: list[RequestOutput] = []
        try:
            for first in range(0, len(work), AT_ONCE):
                part = work[first : first + AT_ONCE]
                inputs = await asyncio.gather(*(rendered(text) for text, _, _ in part))
                tasks = [
                    asyncio.ensure_future(answered(number, engine_input, params))
                    for number, (engine_input, (_, params, _)) in enumerate(zip(inputs, part, strict=True), start=first)
                ]
                results += await asyncio.gather(*tasks)
        except ValueError as error:  # what admission says of prompt and pictures
            raise StructuredDecisionError(str(error)) from error
        finally:
            for task in tasks:  # one that fails leaves none behind
                task.cancel()
        return [
            _read(each, result, number == 0)
            for (_, _, slots), result in zip(work, results, strict=True)
            for number, each in enumerate(slots)
        ]


def _choice(given: dict[str, Any], name: str, allowed: tuple[str, ...]) -> str:
    """Take an option out of the keyword arguments; the first one allowed is the default."""
    value = given.pop(name, allowed[0])
    if value not in allowed:
        raise StructuredDecisionError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    return value


def _read(slots: Slots, result: RequestOutput, is_first: bool) -> QuestionRead:
    """Probabilities of a question's options from the rows of its slots. is_first: of the questions of a pass."""
    output = result.outputs[0]
    rows = output.logprobs[slots.first : slots.first + slots.width]
    written = list(output.token_ids[slots.first : slots.first + slots.width])
    scores, masses = [], []
    for spellings in slots.options:
        found = [sum(rows[place][i].logprob for place, i in enumerate(ids)) for ids in spellings]
        scores.append(max(found))
        masses += [math.exp(score) for score in found]
    return QuestionRead(
        probs=label_softmax([max(score, -1e4) for score in scores]),
        label_mass=min(1.0, sum(masses)),
        argmax_is_label=any(written[: len(ids)] == ids for spellings in slots.options for ids in spellings),
        input_tokens=len(result.prompt_token_ids or ()) if is_first else 0,
        output_tokens=slots.width,
    )


def install() -> None:
    """Register with vLLM's structured decisions; called where an API server of our models is built."""
    for architecture in FAMILIES:
        strategies.READ_STRATEGIES[architecture] = CanvasStrategy
