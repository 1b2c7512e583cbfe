"""Tokenizer files, chat templates, incremental decoding and stop strings, on tokenizers made on the fly."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from ic_jax.errors import UserError
from ic_jax.tokenizer import StopMatcher, StreamDecoder, Tokenizer

SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>")


def byte_level():
    """A byte-level BPE tokenizer of 256 bytes, three merges and the special tokens."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("h", "e"), ("l", "l"), ("Ġ", "w")]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    t = tokenizers.Tokenizer(models.BPE(vocab, merges))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.add_special_tokens(list(SPECIAL))
    return t


def sentencepiece():
    """In sentencepiece's manner: ▁ for a space, a first space added and dropped, bytes for rare characters."""
    vocab = {"<unk>": 0} | {f"<0x{i:02X}>": i + 1 for i in range(256)}
    for token in ("▁", *"helowrd", "▁w", "▁h"):
        vocab[token] = len(vocab)
    t = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "w"), ("▁", "h")], byte_fallback=True, unk_token="<unk>"))
    t.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    t.add_special_tokens(list(SPECIAL))
    return t


def save(directory, tokenizer=None, template=None, **files):
    (tokenizer or byte_level()).save(str(directory / "tokenizer.json"))
    config = dict(bos_token="<s>", eos_token=dict(content="</s>"))
    if template is not None:
        config["chat_template"] = template
    files.setdefault("tokenizer_config", config)
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def byte(tmp_path_factory):
    return save(tmp_path_factory.mktemp("byte"))


@pytest.fixture(scope="module")
def piece(tmp_path_factory):
    return save(tmp_path_factory.mktemp("piece"), sentencepiece())


TEXTS = ("hello world", "naïve café – 你好 👋🏽 🇪🇺", " leading", "tail ", "", "\ufffd", "a\ufffd b")


def stream(tokenizer, ids, context=()):
    decoder = StreamDecoder(tokenizer, context)
    pieces = [decoder.add(i) for i in ids]
    return pieces, decoder.flush()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte", "piece"])
def test_round_trip_and_stream(kind, text, request):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    pieces, rest = stream(tokenizer, ids)
    assert "".join(pieces) + rest == text
    if "\ufffd" not in text:
        assert not rest and not any("\ufffd" in p for p in pieces)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 300), max_size=40))
def test_any_byte_tokens_stream_to_their_text(byte, ids):
    pieces, rest = stream(byte, ids)
    assert "".join(pieces) + rest == byte.decode(ids)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from("héllo w你👋 "), max_size=20))
def test_any_text_streams_through_byte_tokens(piece, text):
    pieces, rest = stream(piece, piece.encode(text))
    assert "".join(pieces) + rest == text and not any("\ufffd" in p for p in pieces)


def test_text_is_shown_as_soon_as_it_is_whole(byte):
    pieces, rest = stream(byte, byte.encode("a你b"))
    assert (pieces, rest) == (["a", "", "", "你", "b"], "")


def test_broken_bytes_are_shown_in_the_end_and_do_not_pile_up(byte):
    lead, stray = byte.encode("你")[0], byte.encode("你")[1]
    pieces, rest = stream(byte, [lead])
    assert (pieces, rest) == ([""], "\ufffd")
    decoder = StreamDecoder(byte)
    pieces = [decoder.add(stray) for _ in range(1000)]
    assert "".join(pieces) + decoder.flush() == "\ufffd" * 1000
    assert len("".join(pieces)) > 990 and len(decoder._window) < 10


def test_special_and_unknown_ids_are_silent(byte):
    eos = byte.token_id("</s>")
    ids = byte.encode("he") + [eos, 100_000] + byte.encode("llo")
    assert "".join(stream(byte, ids)[0]) == "hello" == byte.decode(ids)


def test_a_continued_prompt_keeps_its_space(piece):
    prompt, new = piece.encode("hello"), [piece.token_id("▁w"), piece.token_id("o")]
    assert "".join(stream(piece, new)[0]) == "wo"
    assert "".join(stream(piece, new, context=prompt)[0]) == " wo"
    turn = [*prompt, piece.token_id("<|assistant|>")]
    assert "".join(stream(piece, new, context=turn)[0]) == "wo"


def test_flush_starts_afresh(byte):
    decoder = StreamDecoder(byte)
    decoder.add(byte.encode("你")[0])
    assert decoder.flush() == "\ufffd" and decoder.flush() == ""


# Stop strings


def cut(text, stops):
    """Oracle: everything before the stop string that is complete first, the longest of several."""
    for end in range(len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.text(st.sampled_from("ab"), max_size=4), max_size=8),
    st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_cut_wherever_the_pieces_end(pieces, stops):
    matcher, shown = StopMatcher(stops), ""
    expected, stop = cut("".join(pieces), stops)
    for p in pieces:
        shown += matcher.feed(p)
        assert expected.startswith(shown)
    shown += matcher.flush()
    assert (shown, matcher.stop) == (expected, stop)
    assert matcher.stopped == (stop is not None)


def test_stop_holds_back_no_more_than_it_must():
    matcher = StopMatcher(["END", "\n\n"])
    pieces = ("aE", "N", "x", "\n", "y\n", "\nz", "more")
    assert [matcher.feed(p) for p in pieces] == ["a", "", "ENx", "", "\ny", "", ""]
    assert matcher.stop == "\n\n" and matcher.flush() == ""
    unused = StopMatcher(["END"])
    assert unused.feed("the EN") == "the " and unused.flush() == "EN"


@pytest.mark.parametrize("stops", ["END", [""], [3]])
def test_stop_must_be_a_list_of_text(stops):
    with pytest.raises(UserError, match="stop must"):
        StopMatcher(stops)


# Files


def test_eos_ids_come_from_every_file(tmp_path):
    t = save(tmp_path, config=dict(eos_token_id=[5, 6]), generation_config=dict(eos_token_id=7))
    assert t.eos_ids == {5, 6, 7, t.token_id("</s>")}
    assert t.vocab_size == 256 + 3 + 4
    t = save(tmp_path, config=dict(eos_token_id=None), generation_config=dict(eos_token_id=True), tokenizer_config={})
    assert t.eos_ids == frozenset() and t.bos_id is None


def test_bos_is_added_where_only_the_config_says_so(tmp_path):
    assert save(tmp_path).encode("he") == save(tmp_path).encode("he", add_special_tokens=False)
    t = save(tmp_path, tokenizer_config=dict(bos_token="<s>", add_bos_token=True))
    assert t.encode("he") == [t.bos_id, t.token_id("he")]
    assert t.encode("<s>he") == [t.bos_id, t.token_id("he")]
    assert t.encode("he", add_special_tokens=False) == [t.token_id("he")]


def test_a_stored_length_limit_is_ignored(tmp_path):
    limited = byte_level()
    limited.enable_truncation(3)
    limited.enable_padding(length=20)
    assert len(save(tmp_path, limited).encode("xyzuv")) == 5


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="tokenizer.json cannot be read"):
        Tokenizer(tmp_path)
    for name in ("tokenizer_config", "generation_config", "config", "special_tokens_map"):
        save(tmp_path)
        (tmp_path / f"{name}.json").write_text("{")
        with pytest.raises(UserError, match=f"{name}.json cannot be read"):
            Tokenizer(tmp_path)
        (tmp_path / f"{name}.json").write_text("[" * 100_000)
        with pytest.raises(UserError, match=f"{name}.json cannot be read: it is nested too deeply"):
            Tokenizer(tmp_path)
        (tmp_path / f"{name}.json").write_text("[]")
        with pytest.raises(UserError, match=f"{name}.json does not hold"):
            Tokenizer(tmp_path)
        (tmp_path / f"{name}.json").unlink()


def test_text_that_is_no_unicode_is_refused(byte):
    with pytest.raises(UserError, match="not valid Unicode"):
        byte.encode("a\udcff")


# Chat templates

TURNS = """{{ bos_token }}{% for m in messages %}
    <|{{ m.role }}|>{{ m.content }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>{% endif %}"""
HELLO = [dict(role="user", content="hi <b>")]


def test_template_is_rendered_as_transformers_does(tmp_path):
    t = save(tmp_path, template=TURNS)
    assert t.has_chat_template
    # trim_blocks and lstrip_blocks: the lines that hold only a block leave no trace.
    assert t.apply_chat_template(HELLO) == "<s>    <|user|>hi <b>\n<|assistant|>"
    assert t.apply_chat_template(HELLO, add_generation_prompt=False) == "<s>    <|user|>hi <b>\n"
    ids = t.encode(t.apply_chat_template(HELLO), add_special_tokens=False)
    assert ids[0] == t.bos_id and ids[-1] == t.token_id("<|assistant|>")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0]|tojson }}", '{"role": "user", "content": "hi <b>"}'),
        ("{{ {'a': 'é'}|tojson(indent=1) }}", '{\n "a": "é"\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ strftime_now('%Y')|length }}", "4"),
        ("a{% generation %}b{{ eos_token }}{% endgeneration %}c", "ab</s>c"),
        ("{% if thinking is defined %}{{ thinking }}{% endif %}", "False"),
        ("{% if tools %}x{% else %}none{% endif %}{{ undefined_name }}", "none"),
        ("{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}", "1"),
    ],
)
def test_template_features(tmp_path, template, expected):
    assert save(tmp_path, template=template).apply_chat_template(HELLO, thinking=False) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "chat template failed"),
        ("{{ messages[0].nothing.at_all }}", "no attribute 'nothing'"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ range(10000000) }}", "too big"),
    ],
)
def test_a_template_that_fails_is_one_line(tmp_path, template, message):
    with pytest.raises(UserError, match=message):
        save(tmp_path, template=template).apply_chat_template(HELLO)


@pytest.mark.parametrize(
    "messages", [[], "hi", [dict(content="x")], ["hi"], [dict(role=3, content="x")], iter([dict(role="user", content="x")])]
)
def test_malformed_messages_are_refused(tmp_path, messages):
    with pytest.raises(UserError, match="message"):
        save(tmp_path, template=TURNS).apply_chat_template(messages)


def test_named_templates_and_files(tmp_path):
    named = [dict(name="default", template="plain"), dict(name="tool_use", template="tools")]
    t = save(tmp_path, template=named)
    assert t.apply_chat_template(HELLO) == "plain"
    assert t.apply_chat_template(HELLO, tools=[{}]) == "tools"
    assert t.apply_chat_template(HELLO, template="tool_use") == "tools"
    with pytest.raises(UserError, match="no chat template is called 'rag'; there are default, tool_use"):
        t.apply_chat_template(HELLO, template="rag")
    (tmp_path / "chat_template.jinja").write_text("from a file é", "utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("documents")
    t = Tokenizer(tmp_path)
    assert t.apply_chat_template(HELLO) == "from a file é"
    assert t.apply_chat_template(HELLO, template="rag") == "documents"
    with pytest.raises(UserError, match="chat_template must"):
        save(tmp_path, template=[3])
    with pytest.raises(UserError, match="must list objects with texts name and template"):
        save(tmp_path, template=[dict(name=["default"], template="x")])
    with pytest.raises(UserError, match="chat_template must"):
        save(tmp_path, template=3)


def test_no_template_says_so(byte):
    assert not byte.has_chat_template
    with pytest.raises(UserError, match="no chat template"):
        byte.apply_chat_template(HELLO)
