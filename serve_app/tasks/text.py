"""Texts to tokens, by a ``tokenizer.json`` and the library tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.core.contract import Axis
from serve_app.errors import InvalidRequest, StoreError
from serve_app.tasks.base import RawInput, TaskModel
from serve_app.tasks.tensors import NUMPY_TYPES

_IDS, _MASK, _TYPES = "input_ids", "attention_mask", "token_type_ids"

#: Inputs that a text can be made for, by their names in a model.
TOKEN_INPUTS = (_IDS, _MASK, _TYPES)

#: Characters of a text at most for each token that a model takes: the library holds the interpreter while it encodes a
#: text, a second for a megabyte, in which the whole worker would stand still.
_MOST_CHARACTERS = 256

#: Tokenizers that a process keeps; each takes some megabytes.
_KEPT = 4


def decode_text(data: bytes) -> str:
    """Decode UTF-8.

    Raises:
        InvalidRequest: it is empty, or not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"the body is not text in UTF-8 (byte {error.start} is {data[error.start]:#04x}); send text/plain in UTF-8"
        ) from error
    if not text.strip():
        raise InvalidRequest("the text is empty; send at least one word")
    return text


def texts_of(raw: RawInput) -> list[str]:
    """Return the texts of a request: the body, or of JSON a string or a list of strings.

    Raises:
        InvalidRequest: the body is neither.
    """
    if raw.content_type != "application/json":
        return [decode_text(raw.data)]
    try:
        content = json.loads(raw.data)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON ({error}); send a string, or a list of strings") from error
    texts = [content] if isinstance(content, str) else content
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        found = f"a list of {len(content)}" if isinstance(content, list) else type(content).__name__
        raise InvalidRequest(f"the body must be a JSON string or a list of strings, not {found}")
    for position, text in enumerate(texts):
        if not text.strip():
            raise InvalidRequest(f"text {position} is empty; send at least one word")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"text {position} has half of a surrogate pair, which is no character") from error
    return texts


def one_text(raw: RawInput) -> str:
    """Return the text of a request.

    Raises:
        InvalidRequest: there is none, or more than one.
    """
    texts = texts_of(raw)
    if len(texts) > 1:
        raise InvalidRequest(f"the task takes one text, not {len(texts)}; send one request for each")
    return texts[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedText:
    """A text, and its tokens: a list of numbers for each of ``TOKEN_INPUTS``; none for a model without a tokenizer."""

    text: str
    tokens: Mapping[str, list[int]]

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(self.tokens.get(_IDS, ()))


def encode(texts: Sequence[str], model: TaskModel) -> list[EncodedText]:
    """Encode texts.

    Raises:
        InvalidRequest: a text has more tokens than the model takes.
    """
    if model.tokenizer is None:
        return [EncodedText(text=text, tokens={}) for text in texts]
    tokenizer, most = open_tokenizer(model.tokenizer), _token_axis(model).largest
    encoded = []
    for position, text in enumerate(texts):
        which = f"text {position}" if len(texts) > 1 else "the text"
        if len(text) > most * _MOST_CHARACTERS:
            raise InvalidRequest(
                f"{which} has {len(text)} characters, which cannot be {most} tokens, the limit of model "
                f"{model.model_id!r}; send a shorter text"
            )
        # One by one: the library would use threads of its own for a batch.
        found = tokenizer.encode(text)
        if len(found.ids) > most:
            raise InvalidRequest(
                f"{which} has {len(found.ids)} tokens, more than the limit of {most} of model {model.model_id!r}; "
                "send a shorter text"
            )
        tokens = {_IDS: found.ids, _MASK: found.attention_mask, _TYPES: found.type_ids}
        encoded.append(EncodedText(text=text, tokens=tokens))
    return encoded


def token_inputs(texts: Sequence[EncodedText], model: TaskModel) -> dict[str, NDArray[Any]]:
    """Return the inputs of a model for some texts, one row for each, filled up to the longest.

    A model without a tokenizer takes the texts themselves.
    """
    inputs = model.contract.inputs
    if model.tokenizer is None:
        tensor = inputs[0]
        rows = np.array([each.text.encode() for each in texts], np.object_)
        return {tensor.name: rows.reshape((len(texts), *[1] * (len(tensor.shape) - 1)))}
    width = _token_axis(model).at_least(max(each.length for each in texts))
    tensors: dict[str, NDArray[Any]] = {}
    for spec in inputs:
        if spec.name not in TOKEN_INPUTS:
            continue
        filling = _padding_id(model.tokenizer) if spec.name == _IDS else 0
        rows = np.full((len(texts), width), filling, NUMPY_TYPES[spec.datatype])
        for row, each in zip(rows, texts, strict=True):
            row[: each.length] = each.tokens[spec.name]
        tensors[spec.name] = rows
    return tensors


def _token_axis(model: TaskModel) -> Axis:
    """Return how many tokens the model takes."""
    spec = model.contract.input(_IDS) or model.contract.inputs[0]
    if not spec.axes[-1]:
        return Axis(name="tokens", least=spec.shape[-1], most=spec.shape[-1])
    return next(axis for axis in model.contract.axes if axis.name == spec.axes[-1])


@lru_cache(maxsize=_KEPT)
def open_tokenizer(path: Path) -> Any:
    """Read a tokenizer of the store, see ``read_tokenizer``; a process keeps the last few."""
    return read_tokenizer(path)


def read_tokenizer(path: Path) -> Any:
    """Read a tokenizer, which neither cuts nor fills up what it encodes.

    Raises:
        StoreError: the library is not installed, or the file is not a tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise StoreError(f"tokenizers cannot be imported ({error}); run: pip install 'edgeserve[text]'") from error
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise StoreError(f"{path} is not a tokenizer.json ({error}); save one with tokenizers or transformers") from (
            error
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@lru_cache(maxsize=_KEPT)
def _padding_id(path: Path) -> int:
    """Return the token that fills up; 0 where the tokenizer names none, which the mask takes out anyway."""
    tokenizer = open_tokenizer(path)
    names = ("[PAD]", "<pad>", "<|endoftext|>")
    return next((found for name in names if (found := tokenizer.token_to_id(name)) is not None), 0)
