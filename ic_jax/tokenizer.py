"""Text in and out: tokenizer.json, chat templates, and the incremental decoding and stop strings of a stream.

Flow: text -> Tokenizer.encode -> engine -> StreamDecoder -> StopMatcher -> the user. Holds no arrays and no JAX.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jinja2
import tokenizers
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from . import json_file
from .errors import UserError
from .pattern_file import model_name

REPLACEMENT = "\ufffd"


class Tokenizer:
    """The tokenizer of a model directory in Hugging Face layout.

    Reads tokenizer.json (required), tokenizer_config.json, special_tokens_map.json, chat_template.jinja,
    additional_chat_templates/*.jinja, config.json and generation_config.json where they exist.
    Raises UserError when tokenizer.json is absent or any of them is malformed.

    Attributes: eos_ids, the frozenset of ids that end a text; vocab_size, how many tokens there are;
    special_tokens, ``bos_token`` and the like -> text; bos_id, or None.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        path = self.directory / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{self.directory} has no tokenizer.json; copy it from the model's repository")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exception for every defect of the file
            raise UserError(f"{path} cannot be read: {e}") from None
        # A length limit or padding stored in the file would change prompts silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        settings = self._json("tokenizer_config.json")
        self.special_tokens = _special_tokens({**self._json("special_tokens_map.json"), **settings})
        self.bos_id = self.token_id(self.special_tokens.get("bos_token"))
        self._add_bos = settings.get("add_bos_token") is True
        self.eos_ids = frozenset(
            [
                *_ids(self._json("config.json").get("eos_token_id")),
                *_ids(self._json("generation_config.json").get("eos_token_id")),
                *_ids(self.token_id(self.special_tokens.get("eos_token"))),
            ]
        )
        self._special_ids = frozenset(i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special)
        self._templates = self._read_templates(settings.get("chat_template"))

    def token_id(self, token: str | None) -> int | None:
        """The id of a token's text, or None."""
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written in the text become their ids.

        ``add_special_tokens`` adds what the model expects around plain text (a first token, usually); leave it off for
        text from a chat template, which has its own. Raises UserError for text that is not valid Unicode.
        """
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError) as e:
            raise UserError(f"the text cannot be tokenised, it is not valid Unicode: {e}") from None
        # Files that leave the first token to the Python class say so only here (DeepSeek-V3's do).
        if add_special_tokens and self._add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD, ids that name no token become nothing."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def is_silent(self, token: int) -> bool:
        """Whether ``decode`` leaves this id out: a special token, or no token at all (vocabularies are padded)."""
        return token in self._special_ids or self._tokenizer.id_to_token(token) is None

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping],
        add_generation_prompt: bool = True,
        *,
        tools: list | None = None,
        template: str | None = None,
        **variables,
    ) -> str:
        """The prompt of a conversation, ``[{"role": "user", "content": "…"}, …]``; encode it without special tokens.

        ``template`` is the name of one of several templates; by default ``tool_use`` when there are ``tools`` and it
        exists, else ``default``. Other keywords become variables of the template (``enable_thinking=False``).
        Renders as transformers' ``apply_chat_template`` does. Raises UserError when there is no template, the messages
        are malformed, or the template fails or refuses them.
        """
        if not self._templates:
            raise UserError(f"{model_name(str(self.directory))} has no chat template; send plain text (--no-chat-template)")
        if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
            raise UserError("messages must be a non-empty list of objects with role and content")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise UserError(f"a message must be an object with a role, not {message!r}")
        if template is None:
            template = "tool_use" if tools and "tool_use" in self._templates else "default"
            if template not in self._templates and len(self._templates) == 1:
                (template,) = self._templates
        if template not in self._templates:
            raise UserError(f"no chat template is called {template!r}; there are {', '.join(sorted(self._templates))}")
        values = dict(tools=tools, documents=None, **self.special_tokens)
        values |= dict(messages=list(messages), add_generation_prompt=add_generation_prompt, **variables)
        try:
            return _compile(self._templates[template]).render(values)
        except Exception as e:  # a template is foreign code: whatever it raises is its message to the user
            raise UserError(f"the chat template failed: {e or type(e).__name__}") from None

    def _json(self, name: str) -> dict:
        path = self.directory / name
        return json_file.read(path) if path.is_file() else {}

    def _read_templates(self, stored) -> dict[str, str]:
        # transformers' precedence: files beside the tokenizer win over the field of tokenizer_config.json.
        templates: dict[str, str] = {}
        if isinstance(stored, str):
            templates["default"] = stored
        elif isinstance(stored, list):
            for entry in stored:
                if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("name", "template")):
                    raise UserError("tokenizer_config.json: chat_template must list objects with texts name and template")
                templates[entry["name"]] = entry["template"]
        elif stored is not None:
            raise UserError("tokenizer_config.json: chat_template must be a string or a list")
        files = {path.stem: path for path in sorted(self.directory.glob("additional_chat_templates/*.jinja"))}
        if (single := self.directory / "chat_template.jinja").is_file():
            files["default"] = single
        for name, path in files.items():
            try:
                templates[name] = path.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as e:
                raise UserError(f"{path} cannot be read: {e}") from None
        return templates


class StreamDecoder:
    """Turns token ids into text as they come, never showing half a character.

    Joined increments equal ``tokenizer.decode`` of all the ids (with byte tokens in sentencepiece's manner: of ids that
    are text). ``context`` is the prompt's ids: tokenizers that write a word's space into its token drop the first one,
    and must not where the text continues a prompt.
    """

    # A character has at most 4 bytes: tokens still broken after more than that are not going to mend.
    _PATIENCE = 4

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the tokens of the last increment, then the held ones
        for token in reversed(context[-8:]):
            if tokenizer.is_silent(token):
                break
            self._window.insert(0, token)
        self._shown = len(tokenizer.decode(self._window)) if self._window else 0
        self._held = 0

    def add(self, token: int) -> str:
        """The text that is certain after one more token; often empty in the middle of a character."""
        if self._tokenizer.is_silent(token):
            return ""
        self._window.append(token)
        self._held += 1
        text = self._tokenizer.decode(self._window)
        if not text.endswith(REPLACEMENT):
            piece = text[self._shown :]
            if piece:
                self._keep(self._held, 0)
            return piece
        if self._held <= self._PATIENCE:
            return ""
        piece = text[self._shown : -1]  # only the last character can still become another one
        self._keep(self._PATIENCE, 1)
        return piece

    def flush(self) -> str:
        """What was held back, broken or not; call once at the end."""
        piece = self._tokenizer.decode(self._window)[self._shown :] if self._held else ""
        self._window, self._shown, self._held = [], 0, 0
        return piece

    def _keep(self, tokens: int, hidden: int) -> None:
        self._window = self._window[-tokens:]
        self._shown = len(self._tokenizer.decode(self._window)) - hidden
        self._held = tokens if hidden else 0


class StopMatcher:
    """Cuts a stream of text at the first stop string, wherever the pieces of the stream begin and end.

    The stop string that is complete first ends the text (the longest of several); it is never shown, nor is a beginning
    that it might still turn out to be. Attributes: stopped, whether one was found; stop, which one, or None.
    """

    def __init__(self, stops: Sequence[str] = ()):
        if isinstance(stops, str) or not all(isinstance(s, str) and s for s in stops):
            raise UserError("stop must be a list of non-empty strings")
        self._stops = tuple(stops)
        self._held = ""
        self.stop: str | None = None

    @property
    def stopped(self) -> bool:
        return self.stop is not None

    def feed(self, text: str) -> str:
        """What may be shown after ``text``; nothing more once stopped."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = [(at + len(s), at, s) for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            _, at, self.stop = min(found)
            piece, self._held = self._held[:at], ""
            return piece
        longest = min(max(map(len, self._stops)) - 1, len(self._held))
        hold = next((n for n in range(longest, 0, -1) if self._may_begin(self._held[-n:])), 0)
        cut = len(self._held) - hold
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece

    def flush(self) -> str:
        """What was held back, at the end of the stream."""
        piece, self._held = self._held, ""
        return piece

    def _may_begin(self, tail: str) -> bool:
        return any(s.startswith(tail) for s in self._stops)


class _GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}`` marks what an assistant wrote, for training; here it only prints it."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    # The environment that published templates are written for; immutable and sandboxed, they come with the weights.
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env.from_string(source)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes <, >, & and ' for HTML, which a model must not see.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _special_tokens(settings: dict) -> dict[str, str]:
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in settings.items() if k.endswith("_token")}
    return {k: v for k, v in texts.items() if isinstance(v, str)}


def _ids(value) -> list[int]:
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]
