"""Who says what in a chat: the messages of a text that a chat template laid out."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from intervenable.errors import LocationError
from intervenable.token_text import Span, decoder

# Plain words that no template contains: they come back from any tokenizer that knows letters.
_CONTENTS = ("zqone", "zqtwo", "zqthree", "zqfour")


@dataclass(frozen=True)
class Layout:
    """What a chat template writes around messages."""

    starts: Mapping[str, tuple[str, ...]]
    """By role, what stands before a first message."""

    joints: Mapping[str, tuple[tuple[str, str], ...]]
    """By role, what may follow a message: text and the role of the next one, longest text first."""

    ends: Mapping[str, tuple[str, ...]]
    """By role, what stands after a last message."""


def messages(tokenizer: Any, text: str) -> list[tuple[str, Span]]:
    """The messages of a chat in order: the role of each, and where in the text its content is.

    Raises:
        LocationError: the tokenizer has no chat template, or the text is not laid out by it.
    """
    if not getattr(tokenizer, "chat_template", None) or not hasattr(tokenizer, "apply_chat_template"):
        raise LocationError(
            f"The tokenizer ({type(tokenizer).__name__}) has no chat template, which says where roles begin and end."
            " Set tokenizer.chat_template, or choose by words."
        )
    layout = _layout(tokenizer)
    role, place = _first(layout, text)
    found: list[tuple[str, Span]] = []
    while True:
        following = [
            (text.find(joint, place), -len(joint), joint, speaker)
            for joint, speaker in layout.joints.get(role, ())
        ]
        nearest = min((item for item in following if item[0] >= 0), default=None)
        if nearest is None:
            ends = [text.find(end, place) for end in layout.ends.get(role, ()) if end.strip()]
            stop = min((end for end in ends if end >= 0), default=len(text))
            last = (
                [(role, (place, stop))] if text[place:stop].strip() else []
            )  # or a message yet to be generated
            return [*found, *last]
        stop, _, joint, speaker = nearest
        found.append((role, (place, stop)))
        role, place = speaker, stop + len(joint)


def _first(layout: Layout, text: str) -> tuple[str, int]:
    """The first role and where its message begins. A system prompt written in by the template counts as a message."""
    found = [
        (text.find(start), role != "system", -len(start), role)
        for role, starts in layout.starts.items()
        for start in starts
        if start and start in text
    ]
    if not found:
        raise LocationError(
            f"The text {text[:80]!r} is not laid out by the tokenizer's chat template: no message begins in it."
            " Make it with tokenizer.apply_chat_template."
        )
    place, _, length, role = min(found)
    return role, place - length


_layouts: weakref.WeakKeyDictionary[Any, tuple[object, Layout]] = weakref.WeakKeyDictionary()


def _layout(tokenizer: Any) -> Layout:
    """The layout of a tokenizer's chat template, found out by laying out messages with it."""
    template = tokenizer.chat_template
    known = _layouts.get(tokenizer)
    if known is None or known[0] != template:
        known = _layouts[tokenizer] = (template, _found_out(tokenizer))
    return known[1]


def _found_out(tokenizer: Any) -> Layout:
    starts: dict[str, set[str]] = {}
    joints: dict[str, set[tuple[str, str]]] = {}
    ends: dict[str, set[str]] = {}
    reasons = []
    talk = ("user", "assistant", "user", "assistant")
    chats = [talk[:count] for count in (1, 2, 3, 4)] + [("system", *talk[:count]) for count in (1, 2)]
    for roles in chats:
        for prompted in (False, True) if roles[-1] == "user" else (False,):
            try:
                parts = _laid_out(tokenizer, roles, prompted)
            except (
                Exception
            ) as error:  # templates refuse in their own ways what they do not know, a system prompt say
                reasons.append(str(error))
                continue
            starts.setdefault(roles[0], set()).add(parts[0])
            for role, speaker, joint in zip(roles, roles[1:], parts[1:-1], strict=False):
                joints.setdefault(role, set()).add((joint, speaker))
            if prompted:
                joints.setdefault("user", set()).add((parts[-1], "assistant"))
            else:
                ends.setdefault(roles[-1], set()).add(parts[-1])
    if not starts:
        raise LocationError(f"The tokenizer's chat template cannot be used: {reasons[0]}")
    # A joint without letters or signs of its own would be found anywhere. Texts may come without their first token.
    bos = getattr(tokenizer, "bos_token", None) or ""
    return Layout(
        {role: tuple(found | {start.removeprefix(bos) for start in found}) for role, found in starts.items()},
        {role: tuple(item for item in found if item[0].strip()) for role, found in joints.items()},
        {role: tuple(found | {end.strip() for end in found}) for role, found in ends.items()},
    )


def _laid_out(tokenizer: Any, roles: tuple[str, ...], prompted: bool) -> list[str]:
    """What the template writes before, between and after messages of these roles."""
    contents = _CONTENTS if roles[0] != "system" else ("zqzero", *_CONTENTS)
    chat = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    written = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompted)
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    # As the tokens write it, since some tokenizers move spaces; the template's own text if they lose the contents.
    for text in (decoder(tokenizer)(ids), written):
        parts, rest = [], text
        for item in chat:
            part, content, rest = rest.partition(item["content"])
            parts.append(part)
            if not content:
                break
        else:
            return [*parts, rest]
    raise LocationError("the contents of messages do not appear in what it writes.")
