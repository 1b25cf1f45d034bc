"""A language model as the assistant: that of OpenAI, or any server that speaks the same protocol."""

import logging
from collections.abc import Iterator, Sequence

import openai
from openai.types.chat import ChatCompletionMessageParam

from .assistant import AssistantError, Message

log = logging.getLogger(__name__)

GREETING = "Hello! What can I do for you?"
INSTRUCTION = "You are a helpful assistant in a chat. Answer in plain text, without markup, and keep it short."
TIMEOUT = 60.0


class LanguageModel:
    """Asks a server for chat completions and passes on the pieces as they come.

    The address is that of the environment variable ``OPENAI_BASE_URL``, or OpenAI's.
    """

    def __init__(self, api_key: str, model: str, timeout: float = TIMEOUT) -> None:
        self.name = model
        self._client = openai.OpenAI(api_key=api_key, timeout=timeout)

    def answer(self, dialogue: Sequence[Message]) -> Iterator[str]:
        """Yield the answer in pieces. Raises ``AssistantError`` where the server does not give a whole one."""
        if not dialogue:
            yield GREETING
            return
        try:
            yield from self._pieces(dialogue)
        except openai.OpenAIError as error:
            # Without its text, in which servers repeat a part of the key.
            log.warning("no answer from the language model: %s", type(error).__name__)
            raise AssistantError(in_words(error)) from error
        except ValueError as error:  # what came is no JSON
            raise AssistantError("The language model sent something else than an answer. Please try again.") from error

    def _pieces(self, dialogue: Sequence[Message]) -> Iterator[str]:
        complete = False
        with self._client.chat.completions.create(model=self.name, messages=_as_asked(dialogue), stream=True) as stream:
            for chunk in stream:
                for choice in chunk.choices[:1]:
                    if choice.delta.content:
                        yield choice.delta.content
                    complete = complete or choice.finish_reason is not None
        if not complete:
            raise AssistantError("The language model broke off in the middle of its answer. Please try again.")


def _as_asked(dialogue: Sequence[Message]) -> list[ChatCompletionMessageParam]:
    messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": INSTRUCTION}]
    for message in dialogue:
        if message["role"] == "user":
            messages.append({"role": "user", "content": message["content"]})
        else:
            messages.append({"role": "assistant", "content": message["content"]})
    return messages


def in_words(error: openai.OpenAIError) -> str:
    """Tell the user why there is no answer, and what to do."""
    match error:
        case openai.AuthenticationError() | openai.PermissionDeniedError():
            return "The language model does not accept the key of this server (OPENAI_API_KEY)."
        case openai.NotFoundError():
            return "The language model server does not know the model or the address (OPENAI_MODEL, OPENAI_BASE_URL)."
        case openai.RateLimitError():
            return "The language model has too much to do just now. Please try again in a moment."
        case openai.APITimeoutError():
            return "The language model did not answer in time. Please try again."
        case openai.APIConnectionError():
            return "The language model cannot be reached. Please try again in a moment."
        case openai.APIStatusError():
            return f"The language model answered with the error {error.status_code}. Please try again."
        case _:
            return "The language model could not answer. Please try again."
